# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs the demo: loads its checkpoint, asks it fresh questions about images that it has never seen, shows and scores them."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from PIL import Image

from ..common.destination import check_file
from ..common.loading import device_named
from . import CHECKPOINT
from .asking import ask_model, by_kind, load, table
from .contact_sheet import contact_sheet, terminal_images
from .scenes import draw, held_out_questions


SHOWN = 12


def run_demo(
    checkpoint: str | Path = CHECKPOINT,
    questions: int = 500,
    seed: int = 1,
    output: str | Path | None = "saisa-demo.png",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, tuple[int, int]]:
    """Runs the demo and returns the scores by kind of question.

    `questions` fresh scenes of held-out handwriting are drawn from `seed`, one question each; the first twelve are shown
    in the terminal and on a contact sheet, which is written to `output` as PNG (None: not written).
    """
    if questions < 1:
        raise ValueError(f"questions must be at least 1, got {questions}")
    if output is not None:  # now rather than after all questions
        check_file(Path(output))
        if Path(output).suffix.lower() not in Image.registered_extensions():
            raise ValueError(f"output {output}: expected a file that ends in .png, .jpg or the like.")
    device = device_named(device)
    model, processor = load(checkpoint, dtype, device)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{type(model).__name__} with {size:.1f} million parameters from {checkpoint}\n")
    asked = held_out_questions(questions, seed)
    start = time.perf_counter()
    answers = ask_model(model, processor, asked)
    seconds = time.perf_counter() - start
    shown = [(draw(scene), question, answer) for (scene, question), answer in zip(asked[:SHOWN], answers)]
    if sys.stdout.isatty():
        print(terminal_images([image for image, _, _ in shown]), end="\n\n")
    for number, (_, question, answer) in enumerate(shown, start=1):
        verdict = "right" if answer == question.answer else f"WRONG, it is {question.answer}"
        print(f"{number:>3}  {question.text:<42} {answer:<15} {verdict}")
    scores = by_kind(asked, answers)
    print(f"\n{table(scores)}\n\n{questions} questions about unseen images in {seconds:.1f} seconds")
    if output is not None:
        right = sum(hits for hits, _ in scores.values())
        title = f"{right} of {questions} fresh questions answered exactly ({right / questions:.1%})"
        contact_sheet(shown, title).save(output)
        print(f"images, questions and answers: {output}")
    return scores
