# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Multiple choice: by the letter that an answer names, or by the likelihood of each option."""

import math
import re
import string
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from .metric import Metric, Question, Result, mean, parted


LETTERS = string.ascii_uppercase


def options_of(choices: Any) -> dict[str, str]:
    """The options by their letters: of a list, or of a mapping of letters; empty if `choices` is neither."""
    if isinstance(choices, Mapping):
        options = {key: str(value) for key, value in choices.items() if value is not None}
        return options if all(isinstance(key, str) and len(key) == 1 and key in LETTERS for key in options) else {}
    if isinstance(choices, (list, tuple)) and len(choices) <= len(LETTERS):
        return {letter: str(choice) for letter, choice in zip(LETTERS, choices)}
    return {}


def letter_of(answer: Any, options: Mapping[str, str]) -> str | None:
    """The letter of a right answer that is given as a letter or as a position from 0; None: it is neither."""
    letters = list(options)
    if isinstance(answer, int) and not isinstance(answer, bool):
        return letters[answer] if 0 <= answer < len(letters) else None
    return answer if isinstance(answer, str) and answer in options else None


REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
FAILED = "Failed to obtain answer via API"
NOT_WORDS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
SAYS_SO = re.compile(r"(?i)answer\s+is\s+\**([ABCD])")


def named_option(answer: str, options: Mapping[str, str]) -> str:
    """The letter of the option that `answer` names, by VLMEvalKit's rules for exact matching; "Z": it refuses; empty: it
    names none, or several.

    A letter counts if it is the only option's letter among the words, and one of the last four. Then "answer is X" does; and
    then the text of an option, if no other option's text is in the answer.
    """
    if FAILED not in answer:
        if any(refusal in answer for refusal in REFUSALS):
            return "Z"
        words = answer.translate(NOT_WORDS).split()
        named = [letter for letter in options if letter in words]
        if len(named) == 1 and words.index(named[0]) > len(words) - 5:
            return named[0]
        if not named and "Z" in words:
            return "Z"
        said = SAYS_SO.search(answer)
        if said and said.group(1).upper() in options:
            return said.group(1).upper()
    text, texts = answer.lower(), {letter: option.lower() for letter, option in options.items()}
    if len(text) > 2 * sum(map(len, options.values())):
        return ""
    inside = [letter for letter, option in texts.items() if option in text]
    return inside[0] if len(inside) == 1 else ""


class MultipleChoice(Metric):
    name = "multiple_choice"
    source = "github.com/open-compass/VLMEvalKit: vlmeval/utils/matching_util.py (can_infer)"
    needs = {
        "choices": "a list of options, or a mapping of their letters",
        "answer": "the letter of the right option, or its position from 0",
    }
    uses = {"category": "a kind of question"}
    groups: ClassVar[tuple[str, ...]] = ("category",)

    def _fits(self, field: str, value: Any, question: Question) -> bool:
        options = options_of(question.get("choices"))
        return len(options) > 0 if field == "choices" else letter_of(value, options) is not None

    def _read(self, question: Question, answer: Any) -> Result:
        options = options_of(question["choices"])
        read = named_option(answer, options)
        return {"score": float(read == letter_of(question["answer"], options)), "read": read}


class ChoiceByLikelihood(MultipleChoice):
    """The option that is the likeliest for the model. `score` compares log-likelihoods of whole options; `normalised` divides
    each by its option's number of characters, which does not favour short options (`acc` and `acc_norm` of lm-eval)."""

    name = "multiple_choice_likelihood"
    source = "github.com/EvolvingLMMs-Lab/lmms-eval: lmms_eval/api/task.py (acc and acc_norm)"
    answer = "a list with the log-likelihood of each option, in their order"

    def _is_answer(self, answer: Any, question: Question) -> bool:
        numbers = isinstance(answer, (list, tuple)) and all(
            isinstance(value, (int, float)) and not math.isnan(value) for value in answer
        )
        return numbers and len(answer) == len(options_of(question["choices"]))

    def _read(self, question: Question, answer: Any) -> Result:
        options = options_of(question["choices"])
        letters, right = list(options), letter_of(question["answer"], options)
        by_character = [value / max(len(option), 1) for value, option in zip(answer, options.values())]
        read, normalised = (
            letters[max(range(len(letters)), key=values.__getitem__)] for values in (answer, by_character)
        )
        return {"score": float(read == right), "read": read, "normalised": float(normalised == right)}

    def _more(self, questions: Sequence[Question], results: Sequence[Result]) -> Result:
        return {"normalised": mean(results, "normalised")}


class ScienceQa(MultipleChoice):
    """An answer is a letter, begins with "X. ", or has "The answer is X." once; else it is wrong: nothing is chosen at
    random. Questions that have an `image` make up the summary's `image_score`, IMG in LLaVA's tables."""

    name = "scienceqa"
    source = "github.com/haotian-liu/LLaVA: llava/eval/eval_science_qa.py"
    needs = {
        "choices": "a list of at most five options",
        "answer": "the position of the right one, from 0, or its letter",
    }
    uses = {
        "image": "the question's image, which makes it one of ScienceQA-IMG",
        "subject": "natural, social or language science",
        "grade": "that of the school",
    }
    groups = ("subject", "grade")
    SAYS_SO = re.compile(r"The answer is ([A-Z]).")

    def _fits(self, field: str, value: Any, question: Question) -> bool:
        return super()._fits(field, value, question) and len(question["choices"]) <= 5

    def _fits_use(self, field: str, value: Any) -> bool:
        return field == "image" or super()._fits_use(field, value)

    def _read(self, question: Question, answer: str) -> Result:
        said = self.SAYS_SO.findall(answer)
        if answer in list("ABCDE") or (answer[:1] in list("ABCDE") and answer[1:3] == ". "):
            read = answer[0]
        else:
            read = said[0] if len(said) == 1 else ""
        options = options_of(question["choices"])
        read = read if read in options else ""
        return {"score": float(read == letter_of(question["answer"], options)), "read": read}

    def _more(self, questions: Sequence[Question], results: Sequence[Result]) -> Result:
        with_image = [result for question, result in zip(questions, results) if question.get("image")]
        return {"image_questions": len(with_image), "image_score": mean(with_image)} if with_image else {}


class MmBench(MultipleChoice):
    """Circular evaluation: a question is asked once for each rotation of its options, and counts if all answers are right.

    `question` scores one rotation. In the summary, rotations are those whose `index` is the same modulo a million; a group
    without the rotation of that index itself does not count.
    """

    name = "mmbench"
    source = (
        "github.com/open-compass/VLMEvalKit: vlmeval/dataset/utils/multiple_choice.py (mcq_circular_eval, exact matching), "
        "vlmeval/utils/matching_util.py"
    )
    needs = {**MultipleChoice.needs, "index": "a whole number, of the official file"}
    uses = {"category": "a kind of question", "l2-category": "a kind of category", "split": "dev or test"}
    groups = ("l2-category", "category", "split")
    headline = "circular accuracy"

    def _fits(self, field: str, value: Any, question: Question) -> bool:
        return isinstance(value, int) if field == "index" else super()._fits(field, value, question)

    def _more(self, questions: Sequence[Question], results: Sequence[Result]) -> Result:
        groups: dict[int, list[float]] = {}
        for question, result in zip(questions, results):
            groups.setdefault(question["index"] % 1_000_000, []).append(result["score"])
        first = [question for question in questions if question["index"] == question["index"] % 1_000_000]
        circular = [{"score": float(all(groups[question["index"]]))} for question in first]
        by = {
            field: {value: {"questions": len(part), "score": mean(part)} for value, part in parts.items()}
            for field in self.groups
            if (parts := parted(first, circular, field))
        }
        told: Result = {"questions": len(first), "asked": len(questions), "score": mean(circular)}
        return told | {"vanilla": mean(results)} | ({"by": by} if by else {})


class SeedBench(Metric):
    name = "seed_bench"
    source = "github.com/haotian-liu/LLaVA: scripts/convert_seed_for_submission.py"
    needs = {"answer": "the letter of the right option"}
    uses = {"question_type_id": "the kind of question", "data_type": "image or video"}
    groups = ("data_type", "question_type_id")

    def _read(self, question: Question, answer: str) -> Result:
        return {"score": float(answer == question["answer"]), "read": answer}
