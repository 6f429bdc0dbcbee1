# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a finished run writes: a line for each question, the summary, the table."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..common.tables import table
from ..scoring.metric import Metric
from .files import Item
from .own import LIKELIHOOD


SHOWN_APART = ("metric", "questions", "score", "unit", "headline", "by")


def scored(items: Sequence[Item], lines: Sequence[Mapping[str, Any]], metric: Metric | None) -> list[dict[str, Any]]:
    """What each answer is worth; empty mappings without a metric."""
    if metric is None:
        return [{} for _ in items]
    key = "log_likelihoods" if metric.name == LIKELIHOOD else "text"
    return [metric.question(item.fields, line[key]) for item, line in zip(items, lines)]


def answer_lines(
    items: Sequence[Item], lines: Sequence[Mapping[str, Any]], results: Sequence[dict[str, Any]], model: str
) -> Iterator[dict[str, Any]]:
    """The lines of the file of answers: those of LLaVA's scripts, with what an answer is worth and how it ended."""
    for item, line, result in zip(items, lines, results):
        known = {"question_id": item.fields.get("question_id", item.id), "prompt": item.prompt, **line, **result}
        yield {**known, "model_id": model}


def summary_of(
    items: Sequence[Item],
    lines: Sequence[Mapping[str, Any]],
    results: Sequence[dict[str, Any]],
    metric: Metric | None,
    about: dict[str, Any],
) -> dict[str, Any]:
    """The summary of a run; `about` is what comes first in it."""
    images = {image for item in items for image in item.images}
    told = {**about, "questions": len(items), "images": len(images)}
    told["cut_off"] = sum(line.get("finish") == "length" for line in lines)
    told["score"] = None if metric is None else metric.summary([item.fields for item in items], results)
    return told


def summary_table(summary: Mapping[str, Any]) -> str:
    """A summary for people."""
    score, lines = summary["score"], []
    if score is None:
        rows = [[summary["title"], str(summary["questions"]), "none"]]
        lines += [table(["benchmark", "questions", "score"], rows), "", summary["note"]]
    else:
        unit = f"score ({score['unit']})"
        rows = [[f"{summary['title']}: {score['headline']}", str(score["questions"]), f"{score['score']:.2f}"]]
        for name, value in score.items():
            if name not in SHOWN_APART and isinstance(value, (int, float)):
                rows.append([name, "", str(value) if isinstance(value, int) else f"{value:.2f}"])
        for field, parts in score.get("by", {}).items():
            for value, part in parts.items():
                rows.append([f"{field}: {value}", str(part["questions"]), f"{part['score']:.2f}"])
        lines.append(table(["benchmark", "questions", unit], rows))
    if summary["cut_off"]:
        lines += ["", f"{summary['cut_off']} answers were cut off at --max-new-tokens."]
    return "\n".join(lines)
