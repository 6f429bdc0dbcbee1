# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Kinds of numbers on a command line: the `type` of an `argparse` argument."""

import argparse
import math


DIGITS = 15  # more of them make sums and products that fit nowhere
MOST_STARTED = 256  # processes or threads; a machine stands no arbitrary number of them


def positive(text: str) -> int:
    """A whole number, 1 or more."""
    if not text.isdecimal() or len(text) > DIGITS or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r:.40}")
    return int(text)


def count(text: str) -> int:
    """A whole number, 0 or more."""
    if not text.isdecimal() or len(text) > DIGITS:
        raise argparse.ArgumentTypeError(f"expected a number that is not negative, got {text!r:.40}")
    return int(text)


def started(text: str) -> int:
    """A number of processes or threads to start."""
    if not text.isdecimal() or len(text) > DIGITS or not 0 < int(text) <= MOST_STARTED:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {MOST_STARTED}, got {text!r:.40}")
    return int(text)


def seed(text: str) -> int:
    """A whole number that every random generator takes."""
    if not text.isdecimal() or len(text) > DIGITS or int(text) >= 2**32:
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 to {2**32 - 1}, got {text!r:.40}")
    return int(text)


def not_negative(text: str) -> float:
    """A finite number, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number that is not negative, got {text!r}")
    return value


def width(text: str) -> int | float:
    """A number of columns, or as a decimal fraction below 1 a share of the hidden size."""
    share = float(text) if text.startswith(("0.", ".")) and text.replace(".", "", 1).isdecimal() else 0.0
    if not share and not (text.isdecimal() and len(text) <= DIGITS and int(text)):
        raise argparse.ArgumentTypeError(
            f"expected a number of columns like 256, or a share like 0.25, got {text!r:.40}"
        )
    return share or int(text)


def grid(text: str) -> tuple[int, int]:
    """Rows and columns, like 2x3."""
    rows, _, columns = text.partition("x")
    if not all(part.isdecimal() and len(part) <= DIGITS and int(part) for part in (rows, columns)):
        raise argparse.ArgumentTypeError(f"expected ROWSxCOLUMNS like 2x3, got {text!r:.40}")
    return int(rows), int(columns)
