# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Metrics by name."""

import difflib

from ..common.shown import shown
from .choices import ChoiceByLikelihood, MmBench, MultipleChoice, ScienceQa, SeedBench
from .metric import Metric
from .texts import Anls, ExactMatch, RelaxedAccuracy
from .vqa import GqaAccuracy, TextVqaAccuracy, VizwizAccuracy, VqaAccuracy
from .yes_no import Mme, Pope


# for questions of one's own first, then those of a benchmark
_METRICS: tuple[type[Metric], ...] = (
    ExactMatch,
    VqaAccuracy,
    Anls,
    RelaxedAccuracy,
    MultipleChoice,
    ChoiceByLikelihood,
    VizwizAccuracy,
    TextVqaAccuracy,
    GqaAccuracy,
    Pope,
    ScienceQa,
    Mme,
    MmBench,
    SeedBench,
)
METRICS: dict[str, Metric] = {metric.name: metric() for metric in _METRICS}


def metric_names() -> list[str]:
    """The names that `get_metric` takes."""
    return list(METRICS)


def get_metric(name: str) -> Metric:
    """The metric of a name.

    Raises:
        ValueError: there is none of this name.
    """
    if isinstance(name, str) and name in METRICS:
        return METRICS[name]
    near = difflib.get_close_matches(name, METRICS, n=1, cutoff=0.5) if isinstance(name, str) else []
    hint = f"Did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"metric {shown(name)} is not known. {hint}Known are: {', '.join(METRICS)}.")
