# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Questions of one's own, in a JSON lines file."""

from typing import Any

from ..common.shown import shown
from ..scoring.choices import letter_of, options_of
from .files import Entry, Files, Item, read_entries, unique
from .prompts import LETTER, with_options


LIKELIHOOD = "multiple_choice_likelihood"
LIST_OF_CHOICES = ("multiple_choice", LIKELIHOOD)


def own_questions(files: Files, metric: str) -> list[Item]:
    """The questions of a file of lines `{"image": path or list of them, "question": text, "answers": text or list of texts}`;
    for multiple choice `"choices"` and `"answer"`, a letter, a position from 0 or the choice itself. `"id"` may be left out.

    Args:
        metric: how they are scored. With `multiple_choice`, options and the request for a letter follow the question.

    Raises:
        ValueError: a line is not like that.
    """
    entries = read_entries(files.questions)
    return unique((_item(entry, index, files, metric) for index, entry in enumerate(entries)), files.questions)


def _item(entry: Entry, index: int, files: Files, metric: str) -> Item:
    question, fields = entry.text("question"), dict(entry.values)
    names = fields.get("image") if "image" in entry else []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{entry.where}: image={shown(names)}: expected a path, or a list of them.")
    options: dict[str, str] = {}
    if metric in LIST_OF_CHOICES:
        options = options_of(entry.get("choices", list, dict))
        if not options or not all(options.values()):
            raise ValueError(f"{entry.where}: choices={shown(fields['choices'])}: expected a list of texts.")
        fields["answer"] = _right(entry, options)
        if metric != LIKELIHOOD:
            question = with_options(question, options, LETTER)
    own = entry.id("id") if "id" in entry else index
    choices = tuple(options.values()) if metric == LIKELIHOOD else ()
    return Item(own, question, tuple(files.image(name) for name in names), fields, choices=choices)


def _right(entry: Entry, options: dict[str, str]) -> Any:
    """The letter of the right answer."""
    answer = entry.values.get("answer", entry.values.get("answers"))
    answer = answer[0] if isinstance(answer, list) and len(answer) == 1 else answer
    letters = [letter for letter, option in options.items() if option == answer]
    found = letters[0] if len(letters) == 1 else letter_of(answer, options)
    if found is None:
        raise ValueError(
            f"{entry.where}: answer={shown(answer)}: expected one of the choices {shown(list(options.values()))}, its "
            "letter or its position from 0."
        )
    return found
