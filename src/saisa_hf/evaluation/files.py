# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The files of a benchmark: entries with names for error messages, and the images that they speak of."""

import csv
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common.shown import shown
from ..training.sources import parse_json, read_text


# what pandas, with which the official scripts read tables, takes for no value, and "none", which they add
_WORDS = "nan none null n/a na #n/a #na <na> -nan 1.#ind -1.#ind 1.#qnan -1.#qnan"
NO_VALUE = {"", *_WORDS.split(), "#n/a n/a"}
KINDS = {str: "a text", int: "a whole number", list: "a list", dict: "a mapping"}


@dataclass(frozen=True)
class Files:
    """Where a benchmark lies.

    Args:
        questions: a file, or a folder of files.
        annotations: where the right answers are, if they are not with the questions.
        images: the folder that names of images refer to; None: that of the questions.
    """

    questions: Path
    annotations: Path | None = None
    images: Path | None = None

    def image(self, name: str) -> str:
        """The path of the image `name`."""
        folder = self.images or (self.questions if self.questions.is_dir() else self.questions.parent)
        return os.path.join(folder, name)


@dataclass(frozen=True)
class Item:
    """A question of a benchmark.

    Attributes:
        id: as the benchmark has it.
        prompt: what the model is asked, beside the images.
        images: paths, or encoded images.
        fields: what the metric needs to know of the question, and what results are grouped by.
        group: questions that are scored together have the same; None: this one alone.
        choices: answers to choose from, where their likelihood decides.
    """

    id: str | int
    prompt: str
    images: tuple[str | bytes, ...] = ()
    fields: dict[str, Any] = field(default_factory=dict)
    group: str | int | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Entry:
    """An entry of a file."""

    where: str  # what error messages call it
    values: dict[str, Any]
    key: str = ""  # its name, where the file is a mapping

    def __contains__(self, name: str) -> bool:
        return self.values.get(name) is not None

    def get(self, name: str, *kinds: type) -> Any:
        """The value of `name`, of one of `kinds`. Raises ValueError if it is not there, or of another kind."""
        value = self.values.get(name)
        if value is None:
            has = ", ".join(shown(key) for key in list(self.values)[:12]) or "nothing"
            raise ValueError(f"{self.where} has no {name!r}: it has {has}.")
        if not isinstance(value, kinds) or isinstance(value, bool):
            expected = " or ".join(KINDS[kind] for kind in kinds)
            raise ValueError(f"{self.where}: {name}={shown(value)}: expected {expected}.")
        return value

    def text(self, name: str) -> str:
        """The text `name`."""
        return self.get(name, str)

    def id(self, name: str) -> str | int:
        """The text or number `name`, by which something is found."""
        return self.get(name, str, int)

    def texts(self, name: str) -> list[str]:
        """The list of texts `name`."""
        values = self.get(name, list)
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{self.where}: {name}={shown(values)}: expected a list of texts.")
        return values


def read_entries(path: Path, inside: Iterable[str] = ()) -> list[Entry]:
    """The entries of a JSON or JSON lines file, whatever its name ends in: those of a list; of a mapping its values, or those
    of the list that it has under one of the names `inside`.

    Raises:
        ValueError: it is not such a file, an entry is no mapping, or there are none.
        OSError: it cannot be read.
    """
    if path.is_dir() or not path.exists():
        raise FileNotFoundError(f"{path} is {'a folder' if path.is_dir() else 'not there'}: expected a file.")
    text = read_text(path)
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix == ".jsonl" or (len(lines) > 1 and all(line.strip()[0] == "{" for _, line in lines[:2])):
        found = [(f"{path}, line {number}", "", parse_json(line, f"{path}, line {number}")) for number, line in lines]
    else:
        value = parse_json(text, str(path)) if text.strip() else []
        if isinstance(value, dict):
            value = next((value[name] for name in inside if name in value), value)
        if isinstance(value, dict) and not any(isinstance(one, dict) for one in value.values()):
            value = [value] if value else []  # JSON lines with a single line
        if isinstance(value, dict):
            found = [(f"{path}, {key!r:.80}", key, one) for key, one in value.items()]
        elif isinstance(value, list):
            found = [(f"{path}, entry {index}", "", one) for index, one in enumerate(value)]
        else:
            raise ValueError(f"{path}: expected a list or a mapping of entries, got {shown(value)}.")
    if not found:
        raise ValueError(f"{path} is empty: it has no entries.")
    for where, _, one in found:
        if not isinstance(one, dict):
            raise ValueError(f"{where}: expected a mapping, got {shown(one)}.")
    return [Entry(where, one, key) for where, key, one in found]


def read_value(path: Path, name: str) -> Any:
    """What a JSON file, a mapping, has under `name`; None if it has nothing."""
    value = parse_json(read_text(path), str(path))
    return value.get(name) if isinstance(value, dict) else None


def read_tsv(path: Path) -> list[Entry]:
    """The rows of a table with a header, separated by tabs, as pandas reads it: values by column; columns without a value are
    left out.

    Raises:
        ValueError: it is not such a file, or has no rows.
        OSError: it cannot be read.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is {'a folder' if path.is_dir() else 'not there'}: expected a file.")
    csv.field_size_limit(2**31 - 1)  # images are in it
    rows = csv.reader(io.StringIO(read_text(path), newline=""), delimiter="\t")
    entries: list[Entry] = []
    try:
        header = next(rows, [])
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if len(row) > len(header):
                raise ValueError(f"{where}: {len(row)} columns, but the header has {len(header)}.")
            entries += [Entry(where, {n: x for n, x in zip(header, row) if x.lower() not in NO_VALUE})] if row else []
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: {error}.") from error
    if not entries:
        raise ValueError(f"{path} is empty: it has no rows.")
    return entries


def unique(items: Iterable[Item], path: Path) -> list[Item]:
    """The `items` of a file. Raises ValueError if there are none, or two with the same id."""
    found: dict[str | int, Item] = {}
    for item in items:
        if item.id in found:
            raise ValueError(f"{path} has two questions with the id {item.id!r:.80}.")
        found[item.id] = item
    if not found:
        raise ValueError(f"{path} has no questions for this benchmark.")
    return list(found.values())


def annotated(entries: Iterable[Entry], ids: Iterable[Any], path: Path, name: str = "question_id") -> dict[str, Entry]:
    """Those of `entries`, the annotations in the file `path`, that are about the questions `ids`, by id as text.

    Raises:
        ValueError: a question has none.
    """
    found = {str(entry.id(name) if name else entry.key): entry for entry in entries}
    wanted = [str(one) for one in ids]
    missing = [one for one in wanted if one not in found]
    if missing:
        raise ValueError(
            f"{path} has no annotation for {len(missing)} of {len(wanted)} questions, {missing[0]!r:.80} for instance: do "
            "they belong to the same split?"
        )
    return found


def missing_images(items: Iterable[Item]) -> Iterator[tuple[Item, str]]:
    """The images that should be files and are none."""
    seen: set[str] = set()
    for item in items:
        for image in item.images:
            if isinstance(image, str) and image not in seen:
                seen.add(image)
                if not os.path.isfile(image):
                    yield item, image
