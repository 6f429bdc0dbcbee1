# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`auto_map` in the JSON files of a checkpoint: what it should be, and how it is replaced without touching another byte."""

import json
from typing import Any

from ..checkpoint_saisa import AUTO_MAP, PROCESSOR_AUTO_MAP


def parsed(content: bytes, name: str) -> dict:
    """The object in the JSON file `name`.

    Raises:
        ValueError: it is not JSON, or not an object.
    """
    try:
        settings = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not JSON: {error}. Take it from the original checkpoint again.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{name} holds a {type(settings).__name__}: expected a JSON object.")
    return settings


def is_ours(reference: Any) -> bool:
    """Whether a value of auto_map names code of this package: 'modeling_saisa.SaisaModel', or with 'user/name--' in front."""
    return isinstance(reference, str) and reference.split("--")[-1].split(".")[0].endswith("_saisa")


def wanted_auto_map(file: str, settings: dict) -> Any:
    """The auto_map that `file`, whose content is `settings`, should have. Entries that name other code stay."""
    present = settings.get("auto_map")
    entries = present if isinstance(present, dict) else {}
    others = {key: value for key, value in entries.items() if not is_ours(value)}
    if file == "config.json":
        return AUTO_MAP | others
    if file == "processor_config.json" and (entries or settings.get("processor_class") == "SaisaProcessor"):
        return PROCESSOR_AUTO_MAP | others
    if len(others) == len(entries):
        return present
    return {key: AUTO_MAP[key] for key in entries if key in AUTO_MAP} | others


def with_auto_map(content: bytes, auto_map: dict) -> bytes:
    """The JSON object `content`, which is not empty, with this `auto_map`; every byte outside of it stays the same.

    Raises:
        ValueError: `content` is not JSON.
    """
    text = content.decode("utf-8")
    newline = "\r\n" if "\r\n" in text else "\n"
    span = _span_of_auto_map(text)
    if span is None:  # it becomes the first member
        start = text.index('"')
        space = text[text.index("{") + 1 : start]
        indent = space.rpartition("\n")[2] if "\n" in space else None
        member = f'"auto_map": {_rendered(auto_map, indent, newline)},{" " if indent is None else space}'
        return (text[:start] + member + text[start:]).encode("utf-8")
    start, end = span
    line = text[text.rfind("\n", 0, start) + 1 : start]
    indent = line[: len(line) - len(line.lstrip())] if "\n" in text[start:end] else None
    return (text[:start] + _rendered(auto_map, indent, newline) + text[end:]).encode("utf-8")


def _rendered(auto_map: dict, indent: str | None, newline: str) -> str:
    """`auto_map` as JSON, on one line if `indent` is None, else with that indentation of its closing brace."""
    if indent is None:
        return json.dumps(auto_map, sort_keys=True, ensure_ascii=False)
    text = json.dumps(auto_map, sort_keys=True, ensure_ascii=False, indent=indent or 2)
    return text.replace("\n", f"{newline}{indent}")


def _span_of_auto_map(text: str) -> tuple[int, int] | None:
    """Where the value of the outermost object's `auto_map` begins and ends."""
    decoder, found = json.JSONDecoder(), None
    at = _behind_space(text, text.index("{") + 1)
    while text[at] == '"':
        key, at = decoder.raw_decode(text, at)
        start = _behind_space(text, _behind_space(text, at) + 1)  # behind the colon
        _, at = decoder.raw_decode(text, start)
        if key == "auto_map":
            found = (start, at)
        at = _behind_space(text, at)
        if text[at] == ",":
            at = _behind_space(text, at + 1)
    return found


def _behind_space(text: str, at: int) -> int:
    """The first place from `at` on that is not white space."""
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at
