# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Rows as questions."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...answering import Question
from ...common.shown import printable, shown
from ...processing_saisa import Video
from ...training.samples import resolved
from .rows import IMAGE, Rows


PROMPT = "prompt"
LONGEST_NAME = 4096  # characters, of a path in the result; what is longer is an image in base64


@dataclass(frozen=True)
class Columns:
    """Where a table has what is asked, and where the result has what is answered.

    Args:
        image: the column of images: paths, base64 text, bytes of files, `datasets`' Image feature, or a list of these.
        video: the column of videos, likewise, beside or in place of images; None: there is none.
        prompt: the column of prompts, unless all rows have the same.
        answer, error: columns of the result.
    """

    image: str = IMAGE
    video: str | None = None
    prompt: str = PROMPT
    answer: str = "answer"
    error: str = "error"

    @property
    def media(self) -> list[str]:
        """The columns of images and videos."""
        return [self.image] if self.video is None else [self.image, self.video]


def check_columns(rows: Rows, columns: Columns, prompt: str | None) -> None:
    """Raises ValueError if the rows lack a column that is needed, or have one that the result needs."""
    there = f"{rows.name} has the columns {', '.join(shown(name) for name in list(rows.columns)[:20])}"
    if columns.video is not None and columns.video not in rows.columns:
        raise ValueError(f"{there}, but no {columns.video!r}: name that of the videos with --video-column.")
    if columns.image not in rows.columns and columns.video is None:
        raise ValueError(f"{there}, but no {columns.image!r}: name that of the images with --image-column.")
    if prompt is None and columns.prompt not in rows.columns:
        ask = "ask the same of all with --prompt, or name that of the prompts with --prompt-column"
        raise ValueError(f"{there}, but no {columns.prompt!r}: {ask}.")
    if columns.answer == columns.error:
        raise ValueError(f"--answer-column and --error-column are both {columns.answer!r}: name two.")
    for option, name in (("--answer-column", columns.answer), ("--error-column", columns.error)):
        if name in rows.columns:
            raise ValueError(f"{there}: the result cannot have another {name!r}. Choose one with {option}.")


def question_of(
    row: dict[str, Any], index: int, rows: Rows, columns: Columns, prompt: str | None, urls: bool
) -> Question:
    """What a row asks.

    Args:
        prompt: of all rows; None: the row's own.
        urls: whether images may be at addresses.

    Raises:
        ValueError: the row has no image or no prompt, or an image at an address where that is not allowed.
    """
    words = row.get(columns.prompt) if prompt is None else prompt
    if not isinstance(words, str) or not words.strip():
        raise ValueError(f"{columns.prompt!r} is {shown(words)}: expected a text.")
    found: list[Any] = []
    if columns.video is None or row.get(columns.image) is not None:
        found += [_source(image, columns.image, rows, urls) for image in _images(row.get(columns.image), columns.image)]
    if columns.video is not None and (row.get(columns.video) is not None or not found):
        videos = _images(row.get(columns.video), columns.video, "video")
        found += [Video(_source(video, columns.video, rows, urls)) for video in videos]
    return Question(words, found, index)


def _source(image: Any, column: str, rows: Rows, urls: bool) -> str | bytes:
    """What to open. Raises ValueError if it is nothing, or at an address where that is not allowed."""
    source = resolved(image, rows.folder)
    if source is None or source == "" or not isinstance(source, (str, bytes)):
        raise ValueError(f"{column!r} is {shown(source)}: expected a path, base64 text, bytes, or a list of them.")
    if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")) and not urls:
        raise ValueError(f"image {shown(source)} is an address: allow that with --allow-urls.")
    return source


def _images(value: Any, column: str, kind: str = "image") -> list[Any]:
    """The images of a row, or its videos, one or several."""
    if isinstance(value, str) and value.lstrip()[:2] in ('["', "[]"):  # a list in a CSV file
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    images = value if isinstance(value, list) else [value]
    if value is None or not images:
        raise ValueError(f"{column!r} is {shown(value)}: there is no {kind}.")
    return images


def named(value: Any) -> Any:
    """An image of a row as the result shows it: its path or address; None for what the row itself holds."""
    if isinstance(value, list):
        return [named(one) for one in value]
    if isinstance(value, dict):
        return value.get("path") if isinstance(value.get("path"), str) else None
    is_name = isinstance(value, str) and len(value) <= LONGEST_NAME and not value.startswith("data:")
    return value if is_name else None


def merged(rows: Rows, columns: Columns, lines: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """The rows of the result: those of the input, in their order, with what the journal has of each."""
    for (_, line), row in zip(lines, rows.read(False)):
        shown_row = {name: named(value) if name in columns.media else value for name, value in row.items()}
        error = line.get("error")
        yield {
            **shown_row,
            columns.answer: line.get("answer"),
            columns.error: None if error is None else printable(error),
        }
