# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The whole way from a LLaVA checkpoint and a folder of images to a SAISA checkpoint."""

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .agreement import agreement, answered
from .choosing import choose_layers, keep_layers, nested, seeing, sizes_of
from .distilling import distill
from .fitting import fit_projectors
from .model import processor_from_llava, saisa_from_llava
from .places import Places
from .reading import load_llava
from .reporting import report_text
from .settings import PROMPTS, Fit
from .teacher import Teacher
from .work_folder import Workbench, write_json


REPORT = "from_llava.json"


def from_llava(
    source: str | os.PathLike,
    images: str | os.PathLike | Sequence,
    destination: str | os.PathLike,
    *,
    fit: Fit | None = None,
    prompts: Sequence[str] = PROMPTS,
    prompt_format: str | None = None,
    work_folder: str | os.PathLike | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
    log: Callable[[str], None] = print,
) -> dict:
    """Makes a SAISA from a LLaVA, writes model, processor and report into the folder `destination`, and returns the report.

    Args:
        source: folder or hub id of a LLaVA: see `load_llava`.
        images: a folder of images, or a list of what `load_image` takes. They need no labels.
        destination: folder to make. An existing one must be empty, or `overwrite` must be True.
        fit: settings.
        prompts: prompts that suit any image; agreement is measured and distilled along the answers to them.
        prompt_format: see `Workbench`.
        work_folder: where features, states and finished layers are kept, so that an interrupted run can resume; None: beside
            the destination, removed at the end.
        dtype: "float32", "float16" or "bfloat16"; None: as stored. Projectors are fitted in float32 in any case.
        device: where the model is.
        max_shard_size: the largest size of a weight file, as a number of bytes or like "5GB".
        overwrite: whether `destination` may be replaced.
        push_to_hub: a repository, "user/name", to upload the result to as well; made if needed.
        private: whether the repository is private, if it is made; None leaves that to the hub.
        log: called with one line of text per step.

    Returns:
        `layers`: errors by layer (see `fit_projectors`); `agreement`: by stage, `copied`, `fitted` and, if asked for,
        `chosen` and `distilled` (see `agreement`); `visual_layers`: those that see the image, None for all;
        `pictures`, `visual_tokens` (the mean per image), `settings` and `seconds`. If layers were chosen, `least`: all
        layers, the one that needs the image least first; `by_number`: for 1, 2, 4, 8, 16 and all, and for as many as were
        asked for, `{"number", "layers"}` with the agreement when those see it, on the held-out images.

    Raises:
        ValueError, OSError: something is not as expected; the message says what.
    """
    fit = fit or Fit()
    places = Places(
        source,
        images,
        destination,
        work_folder=work_folder,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        push_to_hub=push_to_hub,
        private=private,
        log=log,
    )
    start = time.perf_counter()
    bench, teacher = _prepared(source, places.files, places.work, fit, prompts, prompt_format, dtype, device, log)
    pictures = {"fitted": len(bench.fitted), "held_out": len(bench.held_out), "skipped": bench.skipped}
    if fit.layers_to_choose:
        pictures["chosen_on"] = len(bench.choosing)
    report = {
        "source": str(source),
        "pictures": pictures,
        "visual_tokens": round(len(bench.features) / len(bench.kept), 1),
        **_fitted(bench, teacher),
        "visual_layers": bench.model.config.visual_layers,
        "prompts": list(prompts),
        "settings": asdict(fit),
        "seconds": round(time.perf_counter() - start, 1),
    }
    places.write(bench, report, REPORT, report_text(report))
    return report


def _prepared(
    source: str | os.PathLike,
    files: Sequence,
    work: Path,
    fit: Fit,
    prompts: Sequence[str],
    prompt_format: str | None,
    dtype: str | None,
    device: str,
    log: Callable[[str], None],
) -> tuple[Workbench, Teacher]:
    """Student and teacher of one set of weights, and the images' features."""
    llava, llava_processor = load_llava(source, dtype, device)
    if getattr(llava.config, "image_grid_pinpoints", None) is not None and not fit.tiles:
        log("note: tiles are not used: of each image only the whole, at the encoder's size")
    count = llava.config.text_config.num_hidden_layers
    if fit.layers_to_choose > count:
        raise ValueError(f"visual_layers={fit.visual_layers!r}: {source} has {count} layers, choose at most {count}.")
    model = saisa_from_llava(llava, fit.projector_hidden_size, fit.seed, fit.tiles, fit.given_layers)
    processor = processor_from_llava(llava_processor, model.config)
    teacher = Teacher.of(model, llava)
    return Workbench(model, processor, files, work, fit, prompts, prompt_format, log, teacher.embed), teacher


def _fitted(bench: Workbench, teacher: Teacher) -> dict[str, Any]:
    """Fits, chooses layers and distills; returns what the report has of it."""
    measured = answered(bench, teacher, bench.held_out, "held-out-answers.json")
    path = bench.folder / "agreement.json"
    agreements = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if "copied" not in agreements:
        agreements["copied"] = agreement(bench, teacher, measured)
        write_json(path, agreements)
    found: dict[str, Any] = {"layers": fit_projectors(bench, teacher), "agreement": agreements}
    agreements["fitted"] = agreement(bench, teacher, measured)
    if wanted := bench.fit.layers_to_choose:
        order = choose_layers(bench, teacher)
        rows = {
            number: _agreement_of(bench, teacher, measured, nested(order, number))
            for number in sizes_of(len(order), wanted)
        }
        found |= {"least": order, "by_number": list(rows.values())}
        agreements["chosen"] = {name: rows[wanted][name] for name in agreements["fitted"]}
        keep_layers(bench.model, nested(order, wanted))
    if bench.fit.distill_steps:
        distill(bench, teacher)
        agreements["distilled"] = agreement(bench, teacher, measured)
    return found


def _agreement_of(bench: Workbench, teacher: Teacher, rows: list[dict], layers: list[int]) -> dict[str, Any]:
    with seeing(bench.model, layers):
        return {"number": len(layers), "layers": layers, **agreement(bench, teacher, rows)}
