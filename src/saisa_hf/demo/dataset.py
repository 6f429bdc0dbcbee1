# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The demo's scenes as files, to try `saisa train` on: images, captions, questions, and a model that has yet to learn them.

The model has the demo's encoder and language model as they are, and a new projector that all layers share: the starting point
of the paper's first stage.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from ..configuration_saisa import SaisaConfig
from ..modeling_saisa import SaisaForConditionalGeneration
from ..processing_saisa import SaisaProcessor
from . import CHECKPOINT
from .scenes import KINDS, Scene, ask, draw, held_out_questions, list_all, make_scene


def write_dataset(
    folder: str | Path, pictures: int = 4000, held_out: int = 210, seed: int = 0, log: Callable[[str], None] = print
) -> Path:
    """Writes `images/`, `captions.json`, `questions.json` (LLaVA's format, for `pictures` images), `held_out.json`
    (`held_out` questions about images of held-out handwriting) and `model/` into `folder`, which must not exist.

    Raises:
        ValueError: the folder exists, or a number is not positive.
    """
    folder = Path(folder)
    if pictures < 1 or held_out < 1:
        raise ValueError(f"pictures={pictures}, held_out={held_out}: expected positive numbers.")
    if folder.exists():
        raise ValueError(f"{folder} exists: choose another folder, or remove it.")
    (folder / "images").mkdir(parents=True)
    captions, questions = [], []
    for index in range(pictures):
        rng = np.random.default_rng([seed, index, 2])
        scene = make_scene("train", rng)
        path = _write_image(folder, f"{index:05d}.png", scene)
        by = ("places", "digits", "inks", "counts")[index % 4]
        captions.append(_sample(index, path, [("Describe the picture.", list_all(scene, by))]))
        asked = [ask(scene, kind, rng) for kind in rng.permutation(KINDS)]
        questions.append(_sample(index, path, [(q.text, q.answer) for q in asked if q is not None]))
    unseen = []
    for index, (scene, question) in enumerate(held_out_questions(held_out, seed + 1)):
        path = _write_image(folder, f"held-out-{index:04d}.png", scene)
        unseen.append(_sample(index, path, [(question.text, question.answer)]))
    for name, samples in (("captions", captions), ("questions", questions), ("held_out", unseen)):
        (folder / f"{name}.json").write_text(json.dumps(samples, indent=1) + "\n", encoding="utf-8")
    write_model(folder / "model", seed)
    log(f"wrote {pictures} images with captions and questions, {held_out} held-out questions and a model to {folder}")
    return folder


def write_questions(folder: str | Path, count: int = 500, seed: int = 1, log: Callable[[str], None] = print) -> Path:
    """Writes the demo's questions for `saisa eval`: `questions.jsonl`, with a line `{"image", "question", "answers",
    "category"}` for each, and `images/` into `folder`, which must not exist.

    Raises:
        ValueError: the folder exists, or `count` is not positive.
    """
    folder = Path(folder)
    if count < 1 or folder.exists():
        raise ValueError(
            f"{folder} exists: choose another folder." if count > 0 else f"count={count}: expected questions."
        )
    (folder / "images").mkdir(parents=True)
    lines = []
    for index, (scene, question) in enumerate(held_out_questions(count, seed)):
        path = _write_image(folder, f"{index:04d}.png", scene)
        line = {"image": path, "question": question.text, "answers": [question.answer], "category": question.kind}
        lines.append(json.dumps(line) + "\n")
    (folder / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
    log(f"wrote {count} questions about unseen images to {folder}")
    return folder


def write_model(folder: Path, seed: int = 0) -> None:
    """Writes the demo's encoder, language model and processor, with one new projector for all layers."""
    trained = SaisaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    config = SaisaConfig.from_dict({**trained.config.to_dict(), "projector_sharing": "shared", "dtype": "float32"})
    torch.manual_seed(seed)
    model = SaisaForConditionalGeneration(config)
    kept = {name: value for name, value in trained.state_dict().items() if "visual_projector." not in name}
    model.load_state_dict(kept, strict=False)
    model.generation_config = trained.generation_config
    model.save_pretrained(folder)
    SaisaProcessor.from_pretrained(CHECKPOINT).save_pretrained(folder)


def _write_image(folder: Path, name: str, scene: Scene) -> str:
    PIL.Image.fromarray(draw(scene)).save(folder / "images" / name)
    return f"images/{name}"


def _sample(index: int, path: str, turns: list[tuple[str, str]]) -> dict:
    conversation = []
    for number, (question, answer) in enumerate(turns):
        mark = "<image>\n" if number == 0 else ""
        conversation += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
    return {"id": str(index), "image": path, "conversations": conversation}
