# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Images of handwritten digits in coloured ink, and questions about them with exactly one right answer.

The handwriting is scikit-learn's `load_digits`: 1797 scans of 8 x 8 pixels with 16 grey levels, the test part of the UCI
"Optical Recognition of Handwritten Digits". Everything else (place, ink, paper, distortion) is drawn from a seed, so a
scene is a function of (split, seed, index) and any number of them can be made without a file on disk.

An image is 72 x 72 pixels, a grid of 3 x 3 cells of 24 pixels, each empty or holding one digit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TypeVar

import numpy as np
from PIL import Image

from ..common.extras import needs


T = TypeVar("T")

GRID = 3
CELL = 24
SIZE = GRID * CELL

PLACES = tuple(f"{row} {column}" for row in ("top", "middle", "bottom") for column in ("left", "center", "right"))

INKS = {
    "red": (205, 32, 38),
    "orange": (245, 140, 20),
    "green": (28, 140, 60),
    "blue": (40, 90, 215),
    "purple": (135, 45, 160),
    "black": (30, 30, 34),
}

NOTHING = "nothing"

# The scans are in the order of the 14 sheets they were cut from. Every sheet has the same row of digits, but for a few
# gaps (012345678901234567890123456789 0955650 ...), so the labels show that one starts at 1415. Sheets 12 to 14 are held
# out: not only their scans but, if a sheet is one hand, their handwriting stays out of training.
FIRST_TEST_SCAN = 1415

# Distorted copies of each scan, and how much they are distorted. Training needs variety: it has to learn from eleven
# hands to read all others. A test scene only has to be fresh.
VARIANTS = {"train": 32, "test": 4}
STRENGTH = {"train": 1.6, "test": 1.0}

QUESTIONS = {
    "digit at a place": ("Which digit is in the {place}?", "What digit is at the {place}?", "What is in the {place}?"),
    "digit of a colour": ("Which digit is {ink}?", "What digit is written in {ink}?"),
    "colour of a digit": ("What colour is the {digit}?", "What color is the {digit}?", "Which colour is the {digit}?"),
    "place of a digit": ("Where is the {digit}?", "In which place is the {digit}?"),
    "is it there": ("Is there a {digit}?", "Is there a {digit} in the picture?"),
    "how many digits": ("How many digits are there?", "How many digits do you see?"),
    "how many of a colour": ("How many digits are {ink}?", "How many {ink} digits are there?"),
}
KINDS = tuple(QUESTIONS)

# Dense exercises for training: each makes the model look up everything in one of the ways that questions ask for.
LISTS = {
    "places": "Describe the picture.",
    "digits": "List the digits.",
    "inks": "List the colours.",
    "counts": "Count the digits.",
}


@dataclass(frozen=True)
class Glyph:
    """One digit of a scene: its cell (0 to 8 in reading order), its value, the name and the exact colour of its ink, the
    index of its scan in `load_digits`, and which distorted copy of that scan is drawn."""

    cell: int
    digit: int
    ink: str
    rgb: tuple[int, int, int]
    scan: int
    variant: int


@dataclass(frozen=True)
class Scene:
    """Everything in an image: the digits in reading order, the colour of the paper, and the split ("train" or
    "test") whose scans it uses."""

    split: str
    glyphs: tuple[Glyph, ...]
    paper: tuple[int, int, int]

    def at(self, cell: int) -> Glyph | None:
        """The digit in a cell, None if it is empty."""
        return next((glyph for glyph in self.glyphs if glyph.cell == cell), None)


@dataclass(frozen=True)
class Question:
    """A question about a scene, its only right answer, and its kind (a key of `QUESTIONS`)."""

    kind: str
    text: str
    answer: str


@cache
def load_scans() -> tuple[np.ndarray, np.ndarray]:
    """The scans, uint8 (1797, 8, 8) with values 0 to 255, and their labels, int64 (1797,)."""
    digits = needs("sklearn.datasets", "drawing handwritten digits", "scikit-learn", extra="demo").load_digits()
    return (digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)


def scan_indices(split: str) -> np.ndarray:
    """Indices of the scans of a split, "train" (the first 11 sheets) or "test" (the last three); they never overlap."""
    if split not in VARIANTS:
        raise ValueError(f"split must be one of {sorted(VARIANTS)}, got {split!r}")
    n_scans = len(load_scans()[1])
    return np.arange(FIRST_TEST_SCAN) if split == "train" else np.arange(FIRST_TEST_SCAN, n_scans)


def distort(scan: np.ndarray, rng: np.random.Generator, strength: float = 1.0) -> np.ndarray:
    """One scan (8, 8) as the ink coverage of a cell, float32 (24, 24) in 0 to 1: about 18 pixels high, slightly turned,
    slanted, stretched, moved, and thinned or thickened. `strength` scales all of it."""
    turn, slant = strength * rng.uniform(-0.2, 0.2), strength * rng.uniform(-0.15, 0.15)
    width, height = 2.1 + strength * rng.uniform(-0.25, 0.25, size=2)
    shift_x, shift_y = rng.uniform(-2.0, 2.0, size=2)
    thickness = np.exp(strength * rng.uniform(-0.3, 0.3))
    forward = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    forward = forward @ np.array([[1.0, slant], [0.0, 1.0]]) @ np.diag([width, height])
    inverse = np.linalg.inv(forward)
    margin = 3
    center = 4 + margin
    offset = center - inverse @ np.array([CELL / 2 + shift_x, CELL / 2 + shift_y])
    padded = Image.fromarray(np.pad(scan, margin))
    coefficients = (inverse[0, 0], inverse[0, 1], offset[0], inverse[1, 0], inverse[1, 1], offset[1])
    drawn = padded.transform((CELL, CELL), Image.Transform.AFFINE, coefficients, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(drawn, dtype=np.float32) * (1.25 / 255), 0.0, 1.0) ** (1 / thickness)


@lru_cache(maxsize=4)
def sprites(split: str) -> np.ndarray:
    """Ink coverage of every distorted copy of every scan of a split: float16 (scans, variants, 24, 24)."""
    scans, rng = load_scans()[0], np.random.default_rng([20250206, len(split)])
    variants, strength = VARIANTS[split], STRENGTH[split]
    copies = [[distort(scans[index], rng, strength) for _ in range(variants)] for index in scan_indices(split)]
    return np.asarray(copies, dtype=np.float16)


def make_scene(split: str, rng: np.random.Generator, n_digits: int | None = None) -> Scene:
    """A random scene with `n_digits` digits (0 to 9; None: two to seven, evenly). Digits, inks and cells are independent;
    a digit or an ink may occur more than once."""
    scans = scan_indices(split)
    if n_digits is None:
        n_digits = int(rng.integers(2, 8))
    cells = np.sort(rng.permutation(GRID * GRID)[:n_digits])
    labels = load_scans()[1]
    names = tuple(INKS)
    chosen = scans[rng.integers(len(scans), size=n_digits)]
    inks = rng.integers(len(names), size=n_digits)
    variants = rng.integers(VARIANTS[split], size=n_digits)
    shades = np.clip(
        np.array([INKS[names[ink]] for ink in inks]).reshape(-1, 3) + rng.normal(0, 12, (n_digits, 3)), 0, 255
    )
    paper = np.clip(rng.uniform(232, 250) + rng.normal(0, 5, size=3), 215, 255)
    glyphs = tuple(
        Glyph(int(cell), int(labels[scan]), names[ink], _colour(rgb), int(scan), int(variant))
        for cell, scan, ink, rgb, variant in zip(cells, chosen, inks, shades, variants)
    )
    return Scene(split, glyphs, _colour(paper))


def _colour(values: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = (int(value) for value in values)
    return red, green, blue


def draw(scene: Scene) -> np.ndarray:
    """The image of a scene: uint8 (72, 72, 3), RGB."""
    coverage, first = sprites(scene.split), scan_indices(scene.split)[0]
    paper = np.array(scene.paper, dtype=np.float32)
    image = np.empty((SIZE, SIZE, 3), dtype=np.float32)
    image[:] = paper
    for glyph in scene.glyphs:
        row, column = divmod(glyph.cell, GRID)
        ink = coverage[glyph.scan - first, glyph.variant].astype(np.float32)[..., None]
        cell = image[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL]
        cell += ink * (np.array(glyph.rgb, dtype=np.float32) - paper)
    return np.rint(image).astype(np.uint8)


def _one_of(options: Sequence[T], rng: np.random.Generator) -> T:
    return options[int(rng.integers(len(options)))]


def _one_of_any(options: Sequence[T], rng: np.random.Generator) -> T | None:
    """One of `options`; None, without a random number, if there are none."""
    return _one_of(options, rng) if len(options) else None


def _once(values: list) -> list:
    """The values that occur only once, sorted."""
    return sorted(value for value in set(values) if values.count(value) == 1)


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Question | None:
    """A random question of a kind about a scene, or None if the scene has none with exactly one right answer (the
    colour of the 7 is asked only if there is one 7). "Is it there" is answered yes and no equally often."""
    found = _subject(scene, kind, rng)
    if found is None:
        return None
    blanks, answer = found
    return Question(kind, _one_of(QUESTIONS[kind], rng).format(**blanks), answer)


def _subject(scene: Scene, kind: str, rng: np.random.Generator) -> tuple[dict[str, str | int], str] | None:
    """What a random question of a kind is about, as the blanks of its wordings, and the answer."""
    digits, inks = [glyph.digit for glyph in scene.glyphs], [glyph.ink for glyph in scene.glyphs]
    if kind == "digit at a place":
        glyph = _one_of_any(scene.glyphs, rng)
        return None if glyph is None else ({"place": PLACES[glyph.cell]}, str(glyph.digit))
    if kind == "digit of a colour":
        ink = _one_of_any(_once(inks), rng)
        return None if ink is None else ({"ink": ink}, str(digits[inks.index(ink)]))
    if kind in ("colour of a digit", "place of a digit"):
        digit = _one_of_any(_once(digits), rng)
        if digit is None:
            return None
        glyph = scene.glyphs[digits.index(digit)]
        return {"digit": digit}, glyph.ink if kind == "colour of a digit" else PLACES[glyph.cell]
    if kind == "is it there":
        there = sorted(set(digits))
        answer = "yes" if there and rng.random() < 0.5 else "no"
        return {"digit": _one_of(there if answer == "yes" else sorted(set(range(10)) - set(there)), rng)}, answer
    if kind == "how many digits":
        return {}, str(len(digits))
    if kind == "how many of a colour":
        # any ink a quarter of the time, so that 0 is an answer, too
        ink = _one_of(tuple(INKS) if not inks or rng.random() < 0.25 else inks, rng)
        return {"ink": ink}, str(inks.count(ink))
    raise ValueError(f"kind must be one of {list(QUESTIONS)}, got {kind!r}")


def list_all(scene: Scene, by: str) -> str:
    """The answer to `LISTS[by]`, with every possible entry:

    places: "top left red 7, top center nothing, ..."
    digits: "0 nothing, 1 red middle center blue top left, ..."
    inks: "red 1 middle center 7 top left, orange nothing, ..."
    counts: "red 2, orange 0, ..., digits 5"
    """
    things = [(str(glyph.digit), glyph.ink, PLACES[glyph.cell]) for glyph in scene.glyphs]
    if by == "places":
        entries = {place: [f"{i} {d}" for d, i, p in things if p == place] for place in PLACES}
    elif by == "digits":
        entries = {digit: [f"{i} {p}" for d, i, p in things if d == digit] for digit in "0123456789"}
    elif by == "inks":
        entries = {ink: [f"{d} {p}" for d, i, p in things if i == ink] for ink in INKS}
    elif by == "counts":
        entries = {ink: [str(sum(i == ink for _, i, _ in things))] for ink in INKS} | {"digits": [str(len(things))]}
    else:
        raise ValueError(f"by must be one of {list(LISTS)}, got {by!r}")
    return ", ".join(f"{name} {' '.join(found) or NOTHING}" for name, found in entries.items())


def held_out_questions(count: int, seed: int) -> list[tuple[Scene, Question]]:
    """`count` fresh scenes of the test split with one question each, the kinds in turn."""
    return questions_in_turn(KINDS, count, (seed, 1))


def questions_in_turn(
    kinds: Sequence[str],
    count: int,
    key: tuple[int, int],
    make_scene: Callable = make_scene,
    ask: Callable = ask,
) -> list[tuple[Scene, Question]]:
    """`count` scenes of the test split with one question each, the `kinds` in turn. Item i is a function of (key, i) alone.

    Args:
        make_scene, ask: as in this module, for other scenes and questions.
    """
    asked = []
    for index in range(count):
        rng = np.random.default_rng([key[0], index, key[1]])
        question = None
        while question is None:
            scene = make_scene("test", rng)
            question = ask(scene, kinds[index % len(kinds)], rng)
        asked.append((scene, question))
    return asked
