# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a run is asked for, checked before anything is loaded: the questions, their metric, and what tells runs apart."""

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.identity import of_data, of_model, of_template
from ..common.shown import shown
from ..common.sources import check_local
from ..scoring import get_metric
from ..scoring.metric import Metric
from .benchmarks import BENCHMARKS, OWN, Benchmark, benchmark_names
from .files import Files, Item, missing_images
from .own import own_questions


@dataclass(frozen=True)
class Plan:
    """A run to be made.

    Attributes:
        name, benchmark: what is asked.
        items: the questions.
        metric: what scores them; None: nothing here does.
        max_new_tokens: of an answer.
        request: what answers depend on, for `Journal`.
    """

    model: str
    name: str
    benchmark: Benchmark
    files: Files
    items: list[Item]
    metric: Metric | None
    max_new_tokens: int
    request: dict[str, Any]

    def note(self) -> str:
        """Why there is no score."""
        if self.benchmark.upload is not None and (not self.benchmark.metric or not self.benchmark.labels):
            return f"No score: {self.benchmark.receiver} scores {self.benchmark.file}."
        if not self.benchmark.metric:
            return "No score: the judge of the benchmark, a language model, scores answers.jsonl."
        upload = f" {self.benchmark.receiver} scores {self.benchmark.file}." if self.benchmark.upload else ""
        return (
            f"No score: the files have no right answers. Give them with --annotations: {self.benchmark.labels}.{upload}"
        )


def make_plan(
    model: str,
    benchmark: str,
    questions: str | os.PathLike,
    annotations: str | os.PathLike | None,
    images: str | os.PathLike | None,
    metric: str | None,
    limit: int | None,
    seed: int | None,
    max_new_tokens: int | None,
    **settings: Any,
) -> Plan:
    """The plan of `evaluate`'s arguments; `settings` are further ones that answers depend on.

    Raises:
        OSError: a file is not there or cannot be read.
        ValueError: there is no such benchmark or metric, or a file is not as expected.
    """
    chosen = _benchmark(benchmark, metric)
    labels = None if annotations is None else _path("--annotations", annotations)
    files = Files(_path("--questions", questions), labels, None if images is None else _path("--images", images))
    whole = own_questions(files, chosen.metric) if benchmark == OWN else chosen.read(files)
    items = _limited(whole, limit, seed)
    for item, image in missing_images(items):
        raise FileNotFoundError(
            f"question {item.id!r:.80} is about the image {image}, which is not there: see --images."
        )
    tokens = chosen.max_new_tokens if max_new_tokens is None else max_new_tokens
    known = {"benchmark": benchmark, "metric": chosen.metric, "limit": limit, "seed": seed, "max_new_tokens": tokens}
    settings["chat_template"] = of_template(settings.get("chat_template", ""))
    known |= {**settings, "images": None if files.images is None else os.path.abspath(files.images)}
    data = [of_data(str(path)) for path in (files.questions, files.annotations) if path is not None]
    request = {"model": of_model(str(check_local("MODEL", model) or model)), "data": data, "settings": known}
    return Plan(model, benchmark, chosen, files, items, _metric(chosen, items, files), tokens, request)


def _benchmark(name: str, metric: str | None) -> Benchmark:
    if name == OWN:
        if metric is None:
            raise ValueError(f"{OWN} needs --metric, by which your questions are scored: exact_match for instance.")
        return Benchmark("questions of your own", lambda files: [], get_metric(metric).name)
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark {shown(name)} is not known. Known are: {', '.join(benchmark_names())}.")
    if metric is not None:
        raise ValueError(f"--metric {metric} is for questions of your own ({OWN}): {name} has its own metric.")
    return BENCHMARKS[name]


def _path(option: str, given: str | os.PathLike) -> Path:
    path = Path(given).expanduser()
    if not path.exists() or not os.fspath(given):
        raise FileNotFoundError(f"{option} {os.fspath(given)!r} is not there.")
    if option == "--images" and not path.is_dir():
        raise NotADirectoryError(f"{option} {os.fspath(given)!r} is a file: expected the folder of the images.")
    return path


def _limited(items: list[Item], limit: int | None, seed: int | None) -> list[Item]:
    """So many of `items`, in their order; those of a group are taken together."""
    groups: dict[Any, list[int]] = {}
    for index, item in enumerate(items):
        groups.setdefault(("alone", index) if item.group is None else item.group, []).append(index)
    if limit is None or limit >= len(groups):
        return items
    names = list(groups)
    taken = names[:limit] if seed is None else random.Random(seed).sample(names, limit)
    return [items[index] for index in sorted(index for name in taken for index in groups[name])]


def _metric(benchmark: Benchmark, items: list[Item], files: Files) -> Metric | None:
    """The metric, if the questions have what it needs.

    Raises:
        ValueError: some have it and some do not, or it is of another kind.
    """
    if not benchmark.metric:
        return None
    metric = get_metric(benchmark.metric)
    if not any(
        set(metric.needs) <= {name for name, value in item.fields.items() if value is not None} for item in items
    ):
        given = files.annotations is not None and not benchmark.whole_split
        if given or (not benchmark.upload and not benchmark.labels):
            where = files.annotations if given else files.questions
            metric.check(items[0].fields, f"question {items[0].id!r:.80} of {where}")
        return None
    for item in items:
        metric.check(item.fields, f"question {item.id!r:.80} of {files.questions}")
    return metric
