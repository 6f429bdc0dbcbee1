# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Scores of answers, as the benchmarks' own scripts compute them. Pure Python: neither torch nor transformers is imported.

    metric = get_metric("vqa_accuracy")
    results = [metric.question(question, answer) for question, answer in zip(questions, answers)]
    metric.summary(questions, results)

A question is a mapping with the fields that the metric names in `needs` (and, for tables, those in `uses`), as in the
official files. A result is a mapping for JSON: what was read from the answer (`read`) and what it is worth (`score`, 0 to 1).
A summary has the number of `questions`, the `score` that the benchmark is known for, its `unit`, and parts of it (`by`).
"""

from typing import TYPE_CHECKING

from .._lazy import lazy_names


if TYPE_CHECKING:
    from .metric import Metric
    from .normalise import m4c_answer, vqa_answer
    from .registry import get_metric, metric_names

__all__ = ["Metric", "get_metric", "m4c_answer", "metric_names", "vqa_answer"]

_MODULE_OF = {
    "Metric": "metric",
    "get_metric": "registry",
    "m4c_answer": "normalise",
    "metric_names": "registry",
    "vqa_answer": "normalise",
}

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
