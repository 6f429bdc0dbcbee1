# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""A task on the demo's digit scenes that no single digit answers: each question relates two or more visual tokens.

    neighbour  Which digit is left of the red one?
    larger     Is the digit left of the red one larger?
    agree      Do two digits agree?

Images have four to six digits, all in different inks. Yes and no are equally frequent, so guessing without the image is right
half of the time. Reading only one of the two digits is enough to tell which is larger in 78% of the cases.
"""

from dataclasses import replace

import numpy as np
from tokenizers import AddedToken

from saisa_hf.demo import scenes
from saisa_hf.demo.scenes import GRID, INKS, NOTHING, Question, Scene


SIDES = {"left of": -1, "right of": 1}
QUESTIONS = {
    "neighbour": "Which digit is {side} the {ink} one?",
    "larger": "Is the digit {side} the {ink} one larger?",
    "agree": "Do two digits agree?",
}
KINDS = tuple(QUESTIONS)
LIST = "List the neighbours."
WORDS = ("of", "one", "larger", "two", "agree", "neighbours")  # not in the demo's vocabulary
MOST_TURNS = 6


def add_words(tokenizer) -> None:
    """Adds the words of this task to the demo's tokenizer."""
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=True) for word in WORDS])


def make_scene(split: str, rng: np.random.Generator) -> Scene:
    """A random scene with four to six digits, all in different inks; in half of the scenes two or more digits agree."""
    count, agreeing = int(rng.integers(4, len(INKS) + 1)), rng.random() < 0.5
    scene = None
    while scene is None or (len({glyph.digit for glyph in scene.glyphs}) < count) != agreeing:
        scene = scenes.make_scene(split, rng, count)
    glyphs = []
    for glyph, ink in zip(scene.glyphs, rng.permutation(list(INKS))):
        shade = np.clip(INKS[ink] + rng.normal(0, 12, 3), 0, 255)
        glyphs.append(replace(glyph, ink=str(ink), rgb=tuple(int(value) for value in shade)))
    return replace(scene, glyphs=tuple(glyphs))


def pairs(scene: Scene) -> list[tuple[str, str, int, int]]:
    """(side, ink, digit, neighbour's digit) for each digit and each side where it has a neighbour."""
    found = []
    for glyph in scene.glyphs:
        for side, step in SIDES.items():
            inside = 0 <= glyph.cell % GRID + step < GRID
            if inside and (beside := scene.at(glyph.cell + step)):
                found.append((side, glyph.ink, glyph.digit, beside.digit))
    return found


def ask(scene: Scene, kind: str, rng: np.random.Generator, pair: tuple | None = None) -> Question | None:
    """A random question of a kind, about `pair` if given; None if the scene allows none. Which of two equal digits is larger
    is not asked."""
    if kind == "agree":
        digits = [glyph.digit for glyph in scene.glyphs]
        return Question(kind, QUESTIONS[kind], "yes" if len(set(digits)) < len(digits) else "no")
    fitting = [pair] if pair is not None else pairs(scene)
    if kind == "larger":
        yes = pair is None and rng.random() < 0.5
        fitting = [(*names, own, other) for *names, own, other in fitting if own != other]
        if pair is None:
            fitting = [found for found in fitting if (found[3] > found[2]) == yes]
    if not fitting:
        return None
    side, ink, own, other = fitting[rng.integers(len(fitting))]
    answer = str(other) if kind == "neighbour" else "yes" if other > own else "no"
    return Question(kind, QUESTIONS[kind].format(side=side, ink=ink), answer)


def turns(scene: Scene, rng: np.random.Generator) -> list[Question]:
    """Questions about a scene for one training sequence, in random order: whether digits agree, and one about each pair, at
    most `MOST_TURNS` in all."""
    found = pairs(scene)
    asked = [ask(scene, "agree", rng)]
    for index in rng.permutation(len(found))[: MOST_TURNS - 1]:
        kind = "larger" if rng.random() < 0.5 else "neighbour"
        asked.append(ask(scene, kind, rng, found[index]) or ask(scene, "neighbour", rng, found[index]))
    return [asked[index] for index in rng.permutation(len(asked))]


def list_all(scene: Scene) -> str:
    """The answer to `LIST`, the digits left and right of each ink: "red nothing 7, orange 7 3, ...". A dense exercise, like
    the demo's lists."""
    beside = {(ink, side): str(other) for side, ink, _, other in pairs(scene)}
    return ", ".join(f"{ink} {' '.join(beside.get((ink, side), NOTHING) for side in SIDES)}" for ink in INKS)


def held_out_questions(count: int, seed: int) -> list[tuple[Scene, Question]]:
    """`count` new scenes of the test split with one question each, cycling through the kinds."""
    return scenes.questions_in_turn(KINDS, count, (seed, 3), make_scene, ask)
