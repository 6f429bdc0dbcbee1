# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Accuracy by the agreement of several annotators: VQAv2, VizWiz, TextVQA."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from .metric import Metric, Question, Result, mean, texts_of
from .normalise import VIZWIZ_EXPANSIONS, m4c_answer, on_one_line, vqa_answer


# One annotator is left out, and three of the others have to agree: with fewer than four no answer is entirely right.
FEWEST = 4


def agreement(answer: str, annotators: Sequence[str]) -> float:
    """The share of three annotators that say `answer`, at most 1, on average over which one of all is left out."""
    same = [annotator == answer for annotator in annotators]
    return sum(min(1.0, (sum(same) - own) / 3) for own in same) / len(same)


class VqaAccuracy(Metric):
    name = "vqa_accuracy"
    source = "github.com/GT-Vision-Lab/VQA: PythonEvaluationTools/vqaEvaluation/vqaEval.py"
    needs = {
        "answers": "the answers of at least four annotators (the official files have ten), texts or mappings with 'answer'"
    }
    uses = {"answer_type": "yes/no, number or other", "question_type": "its first words, as in the official file"}
    groups: ClassVar[tuple[str, ...]] = ("answer_type", "question_type")

    def _fits(self, field: str, value: Any, question: Question) -> bool:
        return len(texts_of(value)) >= FEWEST

    def _read(self, question: Question, answer: str) -> Result:
        annotators, read = [on_one_line(text) for text in texts_of(question["answers"])], on_one_line(answer)
        if len(set(annotators)) > 1:  # else the script compares them as they are
            annotators, read = [vqa_answer(text) for text in annotators], vqa_answer(answer)
        return {"score": agreement(read, annotators), "read": read}


class VizwizAccuracy(VqaAccuracy):
    """Annotators' answers are compared as they are. A model says that a question cannot be answered with `unanswerable`."""

    name = "vizwiz_accuracy"
    source = "vizwiz.org, VQA API; as in github.com/TRI-ML/vlm-evaluation: vlm_eval/util/evaluation/vizwiz/eval.py"
    uses = {
        "answer_type": "yes/no, number, other or unanswerable",
        "answerable": "0 if the annotators agree that it cannot be answered, else 1",
    }
    groups = ("answer_type",)

    def _fits_use(self, field: str, value: Any) -> bool:
        return value in (0, 1) if field == "answerable" else super()._fits_use(field, value)

    def _read(self, question: Question, answer: str) -> Result:
        read = vqa_answer(answer, VIZWIZ_EXPANSIONS)
        return {"score": agreement(read, texts_of(question["answers"])), "read": read}

    def _more(self, questions: Sequence[Question], results: Sequence[Result]) -> Result:
        asked = [(q.get("answerable"), r["read"] == "unanswerable") for q, r in zip(questions, results)]
        known = [(not answerable, said) for answerable, said in asked if answerable is not None]
        if not known:
            return {}
        right, said, true = (sum(map(of, known)) for of in (all, lambda pair: pair[1], lambda pair: pair[0]))
        precision, recall = right / said if said else 0.0, right / true if true else 0.0
        # Average precision where a model says only yes or no: first come those it says yes to, then all others together.
        average = precision * recall + true / len(known) * (1 - recall if true else 0.0)
        f1 = 2 * right / (said + true) if said + true else 0.0
        return {"unanswerable_f1": 100 * f1, "unanswerable_average_precision": 100 * average}


class TextVqaAccuracy(VqaAccuracy):
    name = "textvqa_accuracy"
    source = "github.com/haotian-liu/LLaVA: llava/eval/eval_textvqa.py, llava/eval/m4c_evaluator.py"
    uses = {}
    groups = ()

    def _read(self, question: Question, answer: str) -> Result:
        read = m4c_answer(answer)
        return {"score": agreement(read, [m4c_answer(text) for text in texts_of(question["answers"])]), "read": read}


class GqaAccuracy(Metric):
    """Exact match of the answer in lower case without dots at its end, which is how LLaVA prepares answers for the script.

    The summary has what the questions have fields for; the script's values under the script's names.
    """

    name = "gqa"
    source = (
        "github.com/PKU-YuanGroup/Video-LLaVA: videollava/eval/eval_gqa.py (the official eval.py); "
        "github.com/haotian-liu/LLaVA: scripts/convert_gqa_for_eval.py"
    )
    needs = {"answer": "a text"}
    uses = {
        "types": "a mapping with the types 'structural' and 'semantic', and perhaps 'detailed'",
        "question": "its text, which tells the number of its words",
        "semantic": "a list of the steps to the answer, mappings with 'operation' and 'argument'",
        "isBalanced": "whether the question counts, true or false",
        "valid": "a list of the answers that a question of this kind can have, of the choices file",
        "plausible": "a list of the answers that make sense, of the choices file",
        "entailed": "a list of the ids of questions whose answers follow, for consistency",
        "id": "its id, a text or a number",
    }

    def _fits_use(self, field: str, value: Any) -> bool:
        if field in ("semantic", "valid", "plausible", "entailed"):
            listed = isinstance(value, (list, tuple))
            return listed and (field != "semantic" or all(_has(step, "operation", "argument") for step in value))
        if field == "types":
            return _has(value, "structural", "semantic") and isinstance(value.get("detailed", ""), (str, type(None)))
        kinds: tuple[type, ...] = {"question": (str,), "isBalanced": (bool,)}.get(field, (str, int))
        return isinstance(value, kinds)

    def _read(self, question: Question, answer: str) -> Result:
        read = answer.rstrip(".").lower()
        result: Result = {"score": float(read == question["answer"]), "read": read}
        common = "Common" in ((question.get("types") or {}).get("detailed") or "")
        for field in ("valid", "plausible"):
            if question.get(field) is not None:
                result[field] = float(read in (("color", "material", "shape") if common else question[field]))
        return result

    def _more(self, questions: Sequence[Question], results: Sequence[Result]) -> Result:
        counted = [(q, r) for q, r in zip(questions, results) if q.get("isBalanced", True)]
        told: Result = {"questions": len(counted), "score": mean(r for _, r in counted)}
        kinds = {
            "answers": lambda q: "open" if q["types"]["structural"] == "query" else "binary",
            "structural": lambda q: q["types"]["structural"],
            "semantic": lambda q: q["types"]["semantic"],
            "steps": lambda q: sum(map(_is_step, q["semantic"])),
            "words": lambda q: len(q["question"].split()),
        }
        needed = {
            "answers": "types",
            "structural": "types",
            "steps": "semantic",
            "words": "question",
            "semantic": "types",
        }
        by: dict[str, dict[str, Result]] = {}
        for kind, value in kinds.items():
            parts: dict[Any, list[Result]] = {}
            for q, r in counted:
                if q.get(needed[kind]) is not None:
                    parts.setdefault(value(q), []).append(r)
            if parts:
                by[kind] = {str(v): {"questions": len(parts[v]), "score": mean(parts[v])} for v in sorted(parts)}
        for field, name in (("valid", "validity"), ("plausible", "plausibility")):
            if counted and all(field in r for _, r in counted):
                told[name] = mean((r for _, r in counted), field)
        consistency = _consistency(questions, results)
        return told | ({} if consistency is None else {"consistency": consistency}) | ({"by": by} if by else {})


def _has(value: Any, *fields: str) -> bool:
    """Whether `value` is a mapping with texts for `fields`."""
    return isinstance(value, Mapping) and all(isinstance(value.get(field), str) for field in fields)


def _is_step(step: Question) -> bool:
    """Whether a step is one of reasoning, and not the last one, which only asks."""
    told = f"{step['operation']}: {step['argument']}"
    return not any(asked in told for asked in ("exist", "query: name", "choose name"))


def _consistency(questions: Sequence[Question], results: Sequence[Result]) -> float | None:
    """The share of right answers among the questions that a right answer entails, on average over right answers; None: not
    all of them were asked."""
    if not all("id" in q and isinstance(q.get("entailed"), (list, tuple)) for q in questions):
        return None
    right = {str(q["id"]): r["score"] for q, r in zip(questions, results)}
    shares = []
    for q, r in zip(questions, results):
        others = [str(other) for other in q["entailed"] if str(other) != str(q["id"])]
        if not q.get("isBalanced", True) or not r["score"] or not others:
            continue
        if any(other not in right for other in others):
            return None
        shares.append({"share": sum(right[other] for other in others) / len(others)})
    return mean(shares, "share")
