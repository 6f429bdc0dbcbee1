# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Comparison with one or several right answers: exactly, by edit distance, or by value."""

from typing import Any, ClassVar

from .metric import Metric, Question, Result, texts_of


class ExactMatch(Metric):
    """Right if the answer is one of the right ones, apart from case and from white space around it."""

    name = "exact_match"
    source = "this package"
    needs = {"answers": "a right answer, or a list of them, texts or mappings with 'answer'"}
    uses = {"category": "a kind of question"}
    groups: ClassVar[tuple[str, ...]] = ("category",)

    def _fits(self, field: str, value: Any, question: Question) -> bool:
        return len(_right(value)) > 0

    def _read(self, question: Question, answer: str) -> Result:
        read = answer.strip().lower()
        return {
            "score": float(any(read == right.strip().lower() for right in _right(question["answers"]))),
            "read": read,
        }


class Anls(ExactMatch):
    """Average normalised Levenshtein similarity: the share of characters that need no edit, of the right answer that is
    nearest; 0 if it is below a half."""

    name = "anls"
    source = (
        "arXiv 1905.13648 (ST-VQA) and 2007.00398 (DocVQA); as in github.com/EvolvingLMMs-Lab/lmms-eval: "
        "lmms_eval/api/metrics.py (anls)"
    )
    headline = "ANLS"
    threshold = 0.5

    def _read(self, question: Question, answer: str) -> Result:
        read = _one_spaced(answer)
        best = 1 - min(self._distance(answer, read, right) for right in _right(question["answers"]))
        return {"score": best if best >= self.threshold else 0.0, "read": read}

    @staticmethod
    def _distance(answer: str, read: str, right: str) -> float:
        # the length is that of the texts as they were given, with all white space, in upper case
        length = max(len(right.upper()), len(answer.upper()))
        return edits(_one_spaced(right), read) / length if length else 0.0


class RelaxedAccuracy(ExactMatch):
    """For numbers, a relative difference of at most 5%, where a percent sign divides by a hundred; for all else, the same
    text apart from case. A right answer of 0 is compared as a text."""

    name = "relaxed_accuracy"
    source = "arXiv 2203.10244 (ChartQA); as in github.com/EvolvingLMMs-Lab/lmms-eval: lmms_eval/tasks/chartqa/utils.py"
    uses = {"category": "a kind of question", "type": "human or augmented"}
    groups = ("category", "type")
    tolerance = 0.05

    def _read(self, question: Question, answer: str) -> Result:
        return {"score": float(any(self._near(answer, right) for right in _right(question["answers"]))), "read": answer}

    def _near(self, answer: str, right: str) -> bool:
        said, true = _number(answer), _number(right)
        if said is None or not true:
            return answer.lower() == right.lower()
        return abs(said - true) / abs(true) <= self.tolerance


def _right(answers: Any) -> list[str]:
    return [answers] if isinstance(answers, str) else texts_of(answers)


def _one_spaced(text: str) -> str:
    return " ".join(text.strip().lower().split())


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def edits(one: str, other: str) -> int:
    """Levenshtein distance: the fewest characters to insert, delete or replace so that `one` becomes `other`."""
    before = list(range(len(other) + 1))
    for row, character in enumerate(one, 1):
        line = [row]
        for column, wanted in enumerate(other):
            line.append(min(before[column] + (character != wanted), before[column + 1] + 1, line[-1] + 1))
        before = line
    return before[-1]
