# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Where training data comes from: files, folders, data sets of the hub."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..common.extras import needs


@dataclass
class Source:
    """Records, their name in error messages, and the folder of their images."""

    records: Any  # a sequence, or an iterable to be streamed
    name: str = "data"
    folder: str = ""


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
    folder = images or (os.path.dirname(path) if os.path.isfile(path) else path if os.path.isdir(path) else "")
    suffix = Path(path).suffix.lower()
    if suffix in (".json", ".jsonl"):
        if streaming:
            raise ValueError(f"streaming=True: {path} is read as a whole. Stream Parquet files or hub data sets.")
        records = _json_records(Path(path))
    else:
        datasets = needs("datasets", f"reading {path}", extra="datasets")
        if suffix == ".parquet":
            where = {"path": "parquet", "data_files": path, "split": "train"}
        elif os.path.isdir(path):
            where = {"path": "imagefolder", "data_dir": path, "split": split}
        else:
            where = {"path": path, "split": split}
        records = _undecoded(datasets.load_dataset(**where, streaming=streaming))
    if not streaming and len(records) == 0:
        raise ValueError(f"{path} has no samples.")
    return Source(records, path, folder)


def _undecoded(records: Any) -> Any:
    """A data set of `datasets` whose image columns give paths and bytes, so that a broken image affects only its sample."""
    from datasets import Image

    for name, feature in (records.features or {}).items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, Image):
            records = records.cast_column(name, Image(decode=False))
        elif isinstance(inner, Image):
            records = records.cast_column(name, type(feature)(Image(decode=False)))
    return records


def _json_records(path: Path) -> list:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix.lower() == ".json":
            records = json.loads(text)
            if not isinstance(records, list):
                raise ValueError(f"{path}: expected a list of samples, got a {type(records).__name__}.")
            return records
        lines = text.split("\n")  # not at all of Unicode's line breaks: JSON may contain them
        return [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not a JSON{'' if path.suffix == '.json' else ' lines'} file: {error}") from error
