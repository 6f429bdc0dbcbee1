# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Asks a checkpoint the demo's questions, and counts the right answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from transformers import AutoProcessor

from ..answering import Answerer
from ..answering import Question as Asked
from ..common.sources import reading
from . import CHECKPOINT
from .scenes import KINDS, Question, Scene, draw


if TYPE_CHECKING:
    from ..modeling_saisa import SaisaForConditionalGeneration
    from ..processing_saisa import SaisaProcessor


def load(
    checkpoint: str | Path = CHECKPOINT, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[SaisaForConditionalGeneration, SaisaProcessor]:
    """Model and processor of a checkpoint, loaded as anybody would load it: with the code that the checkpoint contains.

    Raises:
        FileNotFoundError: the folder is not a checkpoint.
    """
    from saisa_hf import AutoModelForVision2Seq

    checkpoint = str(checkpoint)
    if not (Path(checkpoint) / "config.json").is_file():
        raise FileNotFoundError(
            f"checkpoint must be a folder with a config.json, got {checkpoint!r}; train one with "
            "`saisa demo --train DIR` and name it with --checkpoint DIR"
        )
    with reading(checkpoint):
        model = AutoModelForVision2Seq.from_pretrained(checkpoint, trust_remote_code=True, dtype=dtype)
        processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    return model.to(device).eval(), processor


def ask_model(
    model: SaisaForConditionalGeneration,
    processor: SaisaProcessor,
    asked: list[tuple[Scene, Question]],
    batch_size: int = 50,
) -> list[str]:
    """The model's answers, by greedy decoding, to one question per scene."""
    answerer = Answerer(model, processor, batch_size=batch_size, max_new_tokens=8, strict=True)
    questions = (Asked(question.text, [Image.fromarray(draw(scene))]) for scene, question in asked)
    return [answer.text for answer in answerer.answer(questions)]


def by_kind(asked: list[tuple[Scene, Question]], answers: list[str]) -> dict[str, tuple[int, int]]:
    """(exact matches, questions) of every kind of question."""
    scores = dict.fromkeys(KINDS, (0, 0))
    for (_, question), answer in zip(asked, answers):
        hits, count = scores[question.kind]
        scores[question.kind] = (hits + (answer == question.answer), count + 1)
    return scores


def table(scores: dict[str, tuple[int, int]]) -> str:
    """The scores as lines of text, with a total."""
    rows = [*scores.items(), ("all", (sum(hits for hits, _ in scores.values()), sum(n for _, n in scores.values())))]
    lines = [f"{'question':<22}{'asked':>7}{'right':>7}{'exact match':>13}"]
    lines += [f"{kind:<22}{n:>7}{hits:>7}{hits / n if n else 0:>13.1%}" for kind, (hits, n) in rows]
    return "\n".join(lines)
