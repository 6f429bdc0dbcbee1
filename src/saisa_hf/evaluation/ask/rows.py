# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What is asked about: images in a folder, or the rows of a table. Rows are read when they are needed, again and again."""

import codecs
import csv
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ...common.extras import needs
from ...common.identity import of_data
from ...common.shown import shown
from ...image_sources_saisa import formats
from ...training.sources import parse_json, read_json, read_text, unreadable


IMAGE = "image"  # the column of images, in tables and of what a folder has
READ_AT_ONCE = 16  # rows of a Parquet file: they may hold encoded images
MOST_COLUMNS = 1000
CELL = 2**28  # characters, of a CSV file


@dataclass(frozen=True)
class Rows:
    """The rows of an input.

    Attributes:
        name: the input, as it was given.
        folder: what paths of images are relative to.
        identity: its path and a digest of its contents, see `common.identity`.
        read: yields the rows, mappings of columns to values, from the first on; with `False`, encoded images may be missing.
        count: how many there are.
        columns: all that some row has.
        schema: of a Parquet file, its `pyarrow.Schema`.
        several: whether rows may have several images.
    """

    name: str
    folder: str
    identity: dict[str, str]
    read: Callable[[bool], Iterator[dict[str, Any]]]
    count: int
    columns: Sequence[str]
    schema: Any = None
    several: bool = False


def open_rows(source: str, images: str = "", media: Sequence[str] = (IMAGE,), leave_out: Sequence[Path] = ()) -> Rows:
    """The rows of a folder of images (its subfolders included, in the order of their paths), of images by a pattern like
    `photos/*.jpg`, or of a table: a file of JSON lines, a JSON list, CSV with names of columns in its first line, or Parquet.
    Tables but Parquet are read once from beginning to end, so that what is wrong in them is known at once.

    Args:
        source: path or pattern.
        images: folder that paths in a table are relative to; empty: the table's own.
        media: the columns of a table that have images, first, and videos: a Parquet file may hold them encoded.
        leave_out: files, and folders with all in them, that are none of the images, whatever a pattern says.

    Raises:
        OSError: there is no such file, folder or image, or it cannot be read.
        ValueError: the file is not what its name says, is empty, or has no rows.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        return _of_images(source, _images_in(path), leave_out, "no images: none of its files ends like one")
    if os.path.isfile(path):
        readers = {".jsonl": _of_json, ".json": _of_json, ".csv": _of_csv, ".parquet": _of_parquet}
        suffix = Path(path).suffix.lower()
        if suffix not in readers:
            raise ValueError(
                f"INPUT {source!r}: expected a folder, a pattern, or a file whose name ends in {', '.join(readers)}."
            )
        if images and not os.path.isdir(os.path.expanduser(images)):
            raise FileNotFoundError(f"--images {images!r} is not a folder.")
        folder = os.path.expanduser(images) or os.path.dirname(path)
        rows = readers[suffix](source, path, folder, media)
        if not rows.count:
            raise ValueError(f"{source} has no rows.")
        return rows
    if glob.has_magic(path):
        found = sorted(name for name in glob.iglob(path, recursive=True) if os.path.isfile(name))
        return _of_images(source, found, leave_out, "no files: nothing has such a name")
    raise FileNotFoundError(f"INPUT {source!r} is neither a file nor a folder.")


# --- images ---


def _images_in(folder: str) -> list[str]:
    known = Image.registered_extensions() if formats() else {}
    endings = {ending for ending, kind in known.items() if kind in formats()}
    found = []
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(root, name) for name in names if os.path.splitext(name)[1].lower() in endings]
    return sorted(path for path in found if os.path.isfile(path))


def _of_images(source: str, paths: list[str], leave_out: Sequence[Path], nothing: str) -> Rows:
    left = {os.path.realpath(path) for path in leave_out}
    paths = [path for path in paths if left.isdisjoint(_upwards(os.path.realpath(path)))] if left else paths
    if not paths:
        raise FileNotFoundError(f"INPUT {source!r} has {nothing}.")
    digest = hashlib.sha256()
    for path in paths:
        digest.update(json.dumps([path, os.path.getsize(path)]).encode())
    identity = {"path": source, "contents": digest.hexdigest()[:32]}
    return Rows(source, "", identity, lambda encoded: ({IMAGE: path} for path in paths), len(paths), [IMAGE])


def _upwards(path: str) -> Iterator[str]:
    """An absolute path, and the folders that it is in."""
    yield path
    while (folder := os.path.dirname(path)) != path:
        path = folder
        yield path


# --- tables ---


def _surveyed(
    source: str, path: str, folder: str, media: Sequence[str], read: Callable[[], Iterator[dict[str, Any]]]
) -> Rows:
    """A table that `read` reads, after its first reading."""
    count, several = 0, False
    columns: dict[str, None] = {}
    for row in read():
        count += 1
        columns.update(dict.fromkeys(row))
        value = row.get(media[0])
        several = several or isinstance(value, list) or (isinstance(value, str) and value.startswith("["))
        if len(columns) > MOST_COLUMNS:
            raise ValueError(f"{source} has more than {MOST_COLUMNS} columns.")
    return Rows(source, folder, of_data(path), lambda encoded: read(), count, list(columns), several=several)


def _of_json(source: str, path: str, folder: str, media: Sequence[str]) -> Rows:
    if path.lower().endswith(".jsonl"):
        return _surveyed(source, path, folder, media, lambda: _json_lines(path))
    records = [_mapping(record, f"{path}, value {number}") for number, record in enumerate(read_json(path), 1)]
    return _surveyed(source, path, folder, media, lambda: iter(records))


def _json_lines(path: str) -> Iterator[dict[str, Any]]:
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                read_text(Path(path))  # says what is wrong, and where
                raise
            if number == 1 and (line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in line[:4]):
                read_text(Path(path))
            if text.strip():
                name = f"{path}, line {number}"
                yield _mapping(parse_json(text, name), name)


def _mapping(record: Any, name: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise ValueError(f"{name}: expected a mapping of columns to values, got {shown(record)}.")
    return record


def _of_csv(source: str, path: str, folder: str, media: Sequence[str]) -> Rows:
    return _surveyed(source, path, folder, media, lambda: _csv_rows(path))


def _csv_rows(path: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(CELL)
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        header: list[str] | None = None
        try:
            for cells in reader:
                if not cells:
                    continue
                if header is None:
                    header = cells
                    _check_names(path, header)
                elif len(cells) != len(header):
                    where = f"{path}, line {reader.line_num}"
                    raise ValueError(f"{where}: {len(cells)} cells, where the first line names {len(header)} columns.")
                else:
                    yield dict(zip(header, cells))
        except UnicodeDecodeError:
            read_text(Path(path))  # says what is wrong, and where
            raise
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not CSV: {error}.") from error
        if header is None:
            raise ValueError(f"{path} is empty: expected the names of columns in its first line.")


def _check_names(path: str, names: Sequence[str]) -> None:
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"{path} has several columns {shown(twice[0])}.")
    if len(names) > MOST_COLUMNS:
        raise ValueError(f"{path} has more than {MOST_COLUMNS} columns.")


def _of_parquet(source: str, path: str, folder: str, media: Sequence[str]) -> Rows:
    parquet = needs("pyarrow.parquet", f"reading {source}", package="pyarrow", extra="datasets")

    def read(encoded: bool) -> Iterator[dict[str, Any]]:
        found = 0
        try:
            with parquet.ParquetFile(path) as file:
                columns = None if encoded else _without_bytes(file.schema_arrow, media)
                for batch in file.iter_batches(READ_AT_ONCE, columns=columns):
                    found += len(batch)
                    yield from batch.to_pylist()
                if found != count:
                    raise ValueError(f"it says that it has {count} rows, and has {found}")
        except Exception as error:  # of PyArrow, which has dozens of kinds
            raise unreadable(f"{source} cannot be read", error) from error

    try:
        with parquet.ParquetFile(path) as file:
            schema, count = file.schema_arrow, file.metadata.num_rows
    except Exception as error:
        raise unreadable(f"{source} cannot be read", error) from error
    _check_names(path, schema.names)
    several = media[0] in schema.names and "list" in str(schema.field(media[0]).type)
    return Rows(source, folder, of_data(path), read, count, schema.names, schema, several)


def _without_bytes(schema: Any, media: Sequence[str]) -> list[str] | None:
    """The columns to read where encoded images are not wanted, None for all: of `datasets`' Image and Video features the path
    alone."""
    from pyarrow import types

    def is_feature(field: Any) -> bool:
        return types.is_struct(field.type) and {part.name for part in field.type} == {"bytes", "path"}

    names = [f"{field.name}.path" if field.name in media and is_feature(field) else field.name for field in schema]
    return None if names == schema.names else names
