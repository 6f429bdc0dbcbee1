# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Malformed inputs in great number, each within bounds of time and memory: what `test_fuzz_*.py` share."""

import contextlib
import resource
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path


# what JSON can hold in place of what is expected
JSON_VALUES = (None, 0, -1, 1.5, True, "", "a", [], {}, [[]], [None], {"a": 1}, 10**30, "\ud800", "<image>", "\0")


class OutOfTime(BaseException):
    """Not an Exception: what is under test must not be able to catch it."""


@contextlib.contextmanager
def bounded(seconds: float = 10, megabytes: int = 500) -> Iterator[None]:
    """Raises OutOfTime when the block takes longer, and lets it allocate no more than so many megabytes: what goes beyond
    gets a MemoryError, or PyTorch's RuntimeError. In the main thread only, on Linux."""

    def stop(*_):
        raise OutOfTime(f"more than {seconds} seconds")

    status = Path("/proc/self/status").read_text()
    used = int(status.partition("VmData:")[2].split()[0]) * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    before = signal.signal(signal.SIGALRM, stop)
    resource.setrlimit(resource.RLIMIT_DATA, (used + megabytes * 2**20, hard))
    left, _ = signal.setitimer(signal.ITIMER_REAL, seconds)  # of a limit around this one, pytest-timeout's for instance
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, left)


def unclear(
    cases: Iterable[tuple[str, Callable[[], object]]],
    clear: tuple[type[Exception], ...] = (ValueError,),
    names: Callable[[str, Exception], bool] = lambda case, error: True,
    seconds: float = 10,
    megabytes: int = 500,
) -> tuple[dict[str, str], int, int]:
    """Runs each of `cases`, pairs of a name and a call. Returns (what went wrong by name, calls that were right, calls that
    ended in a clear error): a call may return, having checked its own result, or raise exactly one of `clear` whose message
    is not empty and of which `names(case, error)` holds. Subclasses count only where they are listed."""
    wrong, right, refused = {}, 0, 0
    for case, call in cases:
        try:
            with bounded(seconds, megabytes):
                call()
            right += 1
        except (Exception, OutOfTime) as error:
            if type(error) in clear and str(error).strip() and names(case, error):
                refused += 1
            else:
                wrong[case] = f"{type(error).__name__}: {str(error)[:300]}"
    return wrong, right, refused


def refused_clearly(cases: Sequence, calls: Iterable[tuple[str, Callable[[], object]]], **bounds) -> int:
    """Asserts that each of `calls`, one for each of `cases`, was right or ended in a clear error; `bounds` as in `unclear`.
    Returns how many were refused."""
    wrong, right, refused = unclear(calls, **bounds)
    assert not wrong, f"{len(wrong)} of {len(cases)}:\n" + "\n".join(f"{case}: {text}" for case, text in wrong.items())
    assert right + refused == len(cases)
    return refused
