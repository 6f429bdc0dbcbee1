# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What all metrics have in common: fields of a question, results of single questions, means."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from ..common.shown import shown


Question = Mapping[str, Any]
Result = dict[str, Any]


class Metric:
    """A score. Subclasses say what a single answer is worth (`_read`), and add to the summary.

    Attributes:
        name: by which `get_metric` finds it.
        source: the script or paper that it follows.
        needs: fields that a question must have, and what they are.
        uses: fields that a question may have, and what they are.
        groups: fields of `uses` whose values the summary splits the score by.
        answer: what an answer is.
        headline: the key of the summary's `score`, in words.
        unit: of the summary's scores.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    needs: ClassVar[dict[str, str]]
    uses: ClassVar[dict[str, str]] = {}
    groups: ClassVar[tuple[str, ...]] = ()
    answer: ClassVar[str] = "a text"
    headline: ClassVar[str] = "accuracy"
    unit: ClassVar[str] = "%"

    def check(self, question: Question, name: str = "the question") -> None:
        """Whether `question` has what the metric needs.

        Args:
            name: what error messages call it.

        Raises:
            ValueError: a field is not there, or its value is of another kind.
        """
        for field, wanted in self.needs.items():
            if field not in question:
                has = ", ".join(shown(key) for key in list(question)[:12]) or "nothing"
                raise ValueError(f"{name} has no {field!r}, which {self.name} needs: {wanted}. It has {has}.")
            if not self._fits(field, question[field], question):
                raise ValueError(f"{name}: {field}={shown(question[field])}, but {self.name} needs {wanted}.")
        for field, told in self.uses.items():
            if question.get(field) is not None and not self._fits_use(field, question[field]):
                raise ValueError(
                    f"{name}: {field}={shown(question[field])}: {self.name} expects {told}, or no such field."
                )

    def question(self, question: Question, answer: Any) -> Result:
        """What `answer` to `question` is worth.

        Returns:
            `score` (0 to 1) and `read` (what was taken from the answer), of types that JSON has.

        Raises:
            ValueError: see `check`; or the answer is of another kind.
        """
        self.check(question)
        if not self._is_answer(answer, question):
            raise ValueError(f"an answer for {self.name} is {self.answer}, got {shown(answer)}.")
        return self._read(question, answer)

    def summary(self, questions: Sequence[Question], results: Sequence[Result]) -> Result:
        """The score of a benchmark.

        Args:
            questions: as given to `question`.
            results: what it returned, in the same order.

        Returns:
            `metric`, `questions` (their number), `score`, `unit`, `headline`; further numbers; and `by`, which has for each
            field of `groups` that the questions have, and each of its values, `{"questions": ..., "score": ...}`.

        Raises:
            ValueError: there are no questions, or not as many results.
        """
        if not questions or len(questions) != len(results):
            raise ValueError(
                f"{self.name}: {len(results)} results for {len(questions)} questions: expected one for each."
            )
        told = {"metric": self.name, "questions": len(questions), "score": mean(results)}
        told |= {"unit": self.unit, "headline": self.headline}
        by = {}
        for field in self.groups:
            if parts := parted(questions, results, field):
                by[field] = {value: {"questions": len(part), "score": mean(part)} for value, part in parts.items()}
        return told | ({"by": by} if by else {}) | self._more(questions, results)

    def _fits(self, field: str, value: Any, question: Question) -> bool:
        """Whether `value` is what `needs` says of `field`."""
        return isinstance(value, str)

    def _fits_use(self, field: str, value: Any) -> bool:
        """Whether `value` is what `uses` says of `field`."""
        return isinstance(value, (str, int, float))

    def _is_answer(self, answer: Any, question: Question) -> bool:
        return isinstance(answer, str)

    def _read(self, question: Question, answer: Any) -> Result:
        raise NotImplementedError

    def _more(self, questions: Sequence[Question], results: Sequence[Result]) -> Result:
        """Further entries of the summary; may replace any."""
        return {}


def mean(results: Iterable[Result], key: str = "score") -> float:
    """100 times the mean of `key`; 0.0 of nothing."""
    values = [float(result[key]) for result in results]
    return 100 * sum(values) / len(values) if values else 0.0


def parted(questions: Sequence[Question], results: Sequence[Result], field: str) -> dict[str, list[Result]]:
    """The results by the value that the questions have for `field`, sorted; without those that have none."""
    parts: dict[str, list[Result]] = {}
    for question, result in zip(questions, results):
        if question.get(field) is not None:
            parts.setdefault(str(question[field]), []).append(result)
    return dict(sorted(parts.items()))


def texts_of(answers: Any) -> list[str]:
    """The texts of `answers`, each of which is a text or, as in VQA's files, a mapping with `answer`; else an empty list."""
    if not isinstance(answers, (list, tuple)):
        return []
    found = [answer.get("answer") if isinstance(answer, Mapping) else answer for answer in answers]
    texts = [text for text in found if isinstance(text, str)]
    return texts if len(texts) == len(found) else []
