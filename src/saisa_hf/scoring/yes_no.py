# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Questions that are answered with yes or no: POPE and MME."""

from collections.abc import Sequence
from typing import Any

from .metric import Metric, Question, Result, mean


class Pope(Metric):
    """The score is F1 for "yes", on average over the splits (`category`: random, popular, adversarial), each with all that
    the script prints. A ratio of nothing is 0, where the script stops."""

    name = "pope"
    source = "github.com/haotian-liu/LLaVA: llava/eval/eval_pope.py"
    needs = {"label": "'yes' or 'no'"}
    uses = {"category": "the split: random, popular or adversarial"}
    headline = "F1, mean of the splits"

    def _fits(self, field: str, value: Any, question: Question) -> bool:
        return value in ("yes", "no")

    def _read(self, question: Question, answer: str) -> Result:
        words = answer.split(".")[0].replace(",", "").split(" ")
        read = "no" if {"No", "not", "no"} & set(words) else "yes"
        return {"score": float(read == question["label"]), "read": read}

    def _more(self, questions: Sequence[Question], results: Sequence[Result]) -> Result:
        parts: dict[str, list[tuple[str, str]]] = {}
        for question, result in zip(questions, results):
            parts.setdefault(str(question.get("category") or "all"), []).append((result["read"], question["label"]))
        by = {category: _detection(pairs) for category, pairs in sorted(parts.items())}
        means = {name: sum(part[name] for part in by.values()) / len(by) for name in ("accuracy", "f1", "yes_ratio")}
        return {"score": means["f1"], **means, "by": {"category": by}}


def _detection(pairs: list[tuple[str, str]]) -> Result:
    """Counts and ratios, in percent, of (answer, label)."""
    said = [pair[0] == "yes" for pair in pairs]
    tp, fp = pairs.count(("yes", "yes")), pairs.count(("yes", "no"))
    fn, tn = pairs.count(("no", "yes")), pairs.count(("no", "no"))

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else 0.0

    precision, recall = ratio(tp, tp + fp), ratio(tp, tp + fn)
    ratios = {"accuracy": (tp + tn) / len(pairs), "precision": precision, "recall": recall}
    ratios |= {"f1": ratio(2 * precision * recall, precision + recall), "yes_ratio": sum(said) / len(pairs)}
    told = {"questions": len(pairs), "tp": tp, "fp": fp, "tn": tn, "fn": fn}
    return {**told, **{name: 100 * value for name, value in ratios.items()}, "score": 100 * ratios["f1"]}


PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")


class Mme(Metric):
    """Each image has two questions. A task's score, up to 200, is its accuracy plus the share of images with both answers
    right (accuracy+), in percent; perception and cognition are sums over their tasks, and the score is the sum of both."""

    name = "mme"
    source = "github.com/BradyFU/Awesome-Multimodal-Large-Language-Models, branch Evaluation: tools/eval_tool.zip"
    needs = {
        "answer": "'Yes' or 'No'",
        "category": f"the task, one of {', '.join(PERCEPTION + COGNITION)}",
        "image": "the name of the image, the same for its two questions",
    }
    headline = "perception and cognition"
    unit = "points"

    def _fits(self, field: str, value: Any, question: Question) -> bool:
        if field == "answer":
            return isinstance(value, str) and value.lower() in ("yes", "no")
        return value in PERCEPTION + COGNITION if field == "category" else isinstance(value, str)

    def _read(self, question: Question, answer: str) -> Result:
        begin = answer.lower()[:4]
        read = next((word for word in ("yes", "no") if word in begin), "other")
        return {"score": float(read == question["answer"].lower()), "read": read}

    def _more(self, questions: Sequence[Question], results: Sequence[Result]) -> Result:
        tasks: dict[str, dict[str, list[Result]]] = {}
        for question, result in zip(questions, results):
            tasks.setdefault(question["category"], {}).setdefault(question["image"], []).append(result)
        by: dict[str, Result] = {}
        for task in (task for task in PERCEPTION + COGNITION if task in tasks):
            images = tasks[task]
            for image, pair in images.items():
                if len(pair) != 2:
                    raise ValueError(
                        f"mme: image {image!r} of {task} has {len(pair)} questions: expected two, which count together. Ask "
                        "both, or leave out the image."
                    )
            each = [result for pair in images.values() for result in pair]
            both = [{"score": all(result["score"] for result in pair)} for pair in images.values()]
            others = sum(result["read"] == "other" for result in each)
            by[task] = {
                "questions": len(each),
                "accuracy": mean(each),
                "accuracy_plus": mean(both),
                "other_answers": others,
            }
            by[task]["score"] = by[task]["accuracy"] + by[task]["accuracy_plus"]
        sums = {
            name: sum(by[task]["score"] for task in of if task in by)
            for name, of in (("perception", PERCEPTION), ("cognition", COGNITION))
        }
        return {"score": sums["perception"] + sums["cognition"], **sums, "by": {"category": by}}
