# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Where training data comes from: files, folders, data sets of the hub."""

import codecs
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.extras import needs
from ..common.shown import shown
from ..common.sources import check_local, first_line


FORMATS = (".json", ".jsonl", ".parquet")


@dataclass
class Source:
    """Records, their name in error messages, and the folder of their images."""

    records: Any  # a sequence, or an iterable to be streamed
    name: str = "data"
    folder: str = ""


def check_source(name: str, path: str) -> None:
    """Whether `path` may be training data: a file of a known format, a folder, or the id of a data set on the hub.

    Args:
        name: what error messages call it.

    Raises:
        FileNotFoundError: it looks like a path, and is not there.
        ValueError: it is a file of another format.
    """
    found = check_local(name, path, files=True)
    if found is not None and found.is_file() and found.suffix.lower() not in FORMATS:
        raise ValueError(f"{name} {path!r}: expected a file whose name ends in {', '.join(FORMATS)}.")


def open_source(path: str, *, images: str = "", split: str = "train", streaming: bool = False) -> Source:
    """A file (.json, .jsonl, .parquet), a folder of images with metadata, or a data set of the hub.

    Args:
        path: file, folder or hub id. JSON files are read here, everything else by `datasets`.
        images: folder that image paths are relative to; empty: the file's own.
        split: of a folder or hub data set.
        streaming: read records when they are needed; not for JSON files.

    Raises:
        ValueError: the file is not of the format of its name, or is empty.
        ImportError: `datasets` is not installed.
        OSError: it cannot be read.
    """
    check_source("data", path)
    folder = images or (os.path.dirname(path) if os.path.isfile(path) else path if os.path.isdir(path) else "")
    suffix = Path(path).suffix.lower() if os.path.isfile(path) else ""
    if suffix in (".json", ".jsonl"):
        if streaming:
            raise ValueError(f"streaming=True: {path} is read as a whole. Stream Parquet files or hub data sets.")
        records = read_json(path)
    else:
        if suffix == ".parquet":
            where = {"path": "parquet", "data_files": path, "split": "train"}
        elif os.path.isdir(path):
            where = {"path": "imagefolder", "data_dir": path, "split": split}
        else:
            where = {"path": path, "split": split}
        records = _loaded(path, where, streaming)
    if not streaming and len(records) == 0:
        raise ValueError(f"{path} has no samples.")
    return Source(records, path, folder)


def _loaded(path: str, where: dict[str, str], streaming: bool) -> Any:
    """A data set of `datasets` whose image columns give paths and bytes, so that a broken image affects only its sample."""
    datasets = needs("datasets", f"reading {path}", extra="datasets")
    try:
        return _undecoded(datasets.load_dataset(**where, streaming=streaming))
    except Exception as error:  # of `datasets`, PyArrow, pandas, HTTP libraries
        raise unreadable(f"{path} cannot be read", error) from error


def unreadable(what: str, error: Exception) -> OSError | ValueError:
    """The error to raise in place of one of `datasets`, which may name no file: `what`, and what went wrong."""
    chained = type(error).__module__.startswith("datasets.")  # "An error occurred while generating the dataset"
    cause = (error.__cause__ if chained else None) or error
    kind = OSError if isinstance(cause, OSError) else ValueError
    return kind(f"{what}: {type(cause).__name__}: {first_line(cause)}")


def _undecoded(records: Any) -> Any:
    from datasets import Image

    for name, feature in (records.features or {}).items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, Image):
            records = records.cast_column(name, Image(decode=False))
        elif isinstance(inner, Image):
            records = records.cast_column(name, type(feature)(Image(decode=False)))
    return records


def read_json(path: str | Path) -> list:
    """The samples in a JSON file, a list, or in a JSON lines file; UTF-8, with or without byte order mark. Whole numbers of
    thousands of digits become floats.

    Raises:
        ValueError: it is not such a file; the message has file and line.
        OSError: it cannot be read.
    """
    path = Path(path)
    text = read_text(path)
    if path.suffix.lower() == ".jsonl":
        # not at all of Unicode's line breaks: JSON may contain them
        lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        return [parse_json(line, f"{path}, line {number}") for number, line in lines]
    if not text.strip():
        raise ValueError(f"{path} is empty: expected a list of samples.")
    records = parse_json(text, str(path))
    if not isinstance(records, list):
        raise ValueError(f"{path}: expected a list of samples, got {shown(records)}.")
    return records


def read_text(path: Path) -> str:
    """The text in a file, UTF-8 with or without byte order mark. Raises ValueError, with file and line, if it is not."""
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content[:4]:
        raise ValueError(f"{path} is in UTF-16 or UTF-32, or is not a text: expected UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise ValueError(
            f"{path}, line {line}: byte {byte:#04x} at {error.start} is not UTF-8, as expected."
        ) from error


def parse_json(text: str, name: str) -> Any:
    """The value that `text`, called `name` in error messages, is in JSON. Raises ValueError if it is none."""
    try:
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            raise
        except ValueError:  # Python reads no whole numbers of more than some thousand digits
            return json.loads(text, parse_int=lambda digits: int(digits) if len(digits) < 1000 else float(digits))
    except json.JSONDecodeError as error:
        lines = ""
        if error.msg == "Extra data" and text[error.pos - 1 :].lstrip().startswith("{"):
            lines = " One value per line is JSON lines: call the file .jsonl."
        raise ValueError(f"{name}: not JSON: {error}.{lines}") from error
    except RecursionError as error:
        raise ValueError(f"{name}: lists or mappings are nested too deeply.") from error
