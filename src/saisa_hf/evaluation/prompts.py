# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What questions are asked with, as LLaVA-1.5 asks them."""

from typing import Any

from .files import Entry, Files, Item


SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


def of_llava(entries: list[Entry]) -> bool:
    """Whether these are questions of LLaVA's: their text is the whole prompt."""
    return "text" in entries[0] and "question_id" in entries[0] and "label" not in entries[0]


def llava_item(entry: Entry, files: Files, fields: dict[str, Any] | None = None, **more: Any) -> Item:
    """The item of a question of LLaVA's."""
    known = {"category": entry.values["category"]} if "category" in entry else {}
    image = (files.image(entry.text("image")),)
    return Item(entry.id("question_id"), entry.text("text"), image, {**known, **(fields or {})}, **more)


def with_options(question: str, options: dict[str, str], request: str) -> str:
    """A question, its options by letter, and what is asked for, each on a line."""
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in options.items()), request])


def short_item(own: str | int, entry: Entry, image: str, fields: dict[str, Any]) -> Item:
    """A question to be answered shortly."""
    return Item(own, f"{entry.text('question')}\n{SHORT}", (image,), fields)
