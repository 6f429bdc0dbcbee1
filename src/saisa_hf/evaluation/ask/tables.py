# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The table of answers, as JSON lines, CSV or Parquet by the ending of its name. Rows pass through one by one."""

import base64
import csv
import itertools
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ...common.destination import check_file
from ...common.extras import needs
from ...common.shown import printable


WRITTEN_AT_ONCE = 1000  # rows, of a Parquet file
TEXT = "text"  # the type of a column whose values have several


def check_output(path: str) -> None:
    """Whether a table can be written there: before the work is done.

    Raises:
        OSError: its folder is not there, or cannot be written to.
        ValueError: its name has another ending.
        ImportError: PyArrow is not installed, and it is Parquet.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in WRITERS:
        raise ValueError(f"--output {path!r}: expected a file whose name ends in {', '.join(WRITERS)}.")
    if suffix == ".parquet":
        needs("pyarrow", f"writing {path}", extra="datasets")
    check_file(Path(path))


def write_table(
    path: Path, rows: Callable[[], Iterable[dict[str, Any]]], columns: Sequence[str], schema: Any = None
) -> None:
    """Writes the file `path`.

    Args:
        rows: yields the rows, each time it is called: a column's type is known when all have been seen.
        columns: all of them, in order.
        schema: a `pyarrow.Schema` with types that are known already, for Parquet.
    """
    WRITERS[path.suffix.lower()](path, rows, columns, schema)


def _write_json_lines(path: Path, rows: Callable, columns: Sequence[str], schema: Any) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows():
            file.write(_json({name: plain(value) for name, value in row.items()}) + "\n")


def _write_csv(path: Path, rows: Callable, columns: Sequence[str], schema: Any) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        # whatever ends a line for a reader is quoted only if it is in the writer's own end of a line
        writer = csv.writer(SimpleNamespace(write=lambda line: file.write(f"{line[:-2]}\n")), lineterminator="\r\n")
        writer.writerow(map(printable, columns))
        for row in rows():
            writer.writerow([_cell(row.get(name)) for name in columns])


def _write_parquet(path: Path, rows: Callable, columns: Sequence[str], schema: Any) -> None:
    import pyarrow
    from pyarrow import parquet

    known = {field.name: field.type for field in schema or ()}
    kinds = _types(rows(), [name for name in columns if name not in known])
    fields = [(name, known[name] if name in known else kinds[name] or pyarrow.string()) for name in columns]
    whole = pyarrow.schema([(printable(name), pyarrow.string() if kind == TEXT else kind) for name, kind in fields])
    with parquet.ParquetWriter(path, whole) as writer:
        for chunk in _chunks(rows()):
            arrays = []
            for (name, kind), field in zip(fields, whole):
                values = [row.get(name) for row in chunk]
                if name not in known:
                    values = [_cell(value, none=None) if kind == TEXT else _sound(plain(value)) for value in values]
                arrays.append(pyarrow.array(values, field.type))
            writer.write_table(pyarrow.Table.from_arrays(arrays, schema=whole))


WRITERS = {".jsonl": _write_json_lines, ".csv": _write_csv, ".parquet": _write_parquet}


def _types(rows: Iterable[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    """The Arrow type of each column, None if it has no values."""
    found: dict[str, Any] = dict.fromkeys(names)
    for chunk in _chunks(rows):
        for name in names:
            if found[name] != TEXT:
                found[name] = _joined(found[name], [_sound(plain(row.get(name))) for row in chunk])
    return found


def _joined(kind: Any, values: list[Any]) -> Any:
    """The type of values of type `kind` and of `values`: a number, text, truth value or a list of these; else `TEXT`."""
    import pyarrow
    from pyarrow import types

    try:
        own = pyarrow.array(values).type
        inner = own.value_type if types.is_list(own) else own
        if types.is_null(own):
            return kind
        if types.is_nested(inner) or types.is_null(inner):
            return TEXT
        schemas = [pyarrow.schema([("", one)]) for one in (kind, own) if one is not None]
        return pyarrow.unify_schemas(schemas, promote_options="permissive").field(0).type
    except (pyarrow.ArrowException, OverflowError, TypeError, ValueError):
        return TEXT


def _chunks(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(rows)
    while chunk := list(itertools.islice(iterator, WRITTEN_AT_ONCE)):
        yield chunk


def plain(value: Any) -> Any:
    """A value as JSON has it: bytes in base64, None in place of what is no number, times and others as text."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (bytes, bytearray)):
        return base64.b64encode(value).decode()
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    return str(value)


def _sound(value: Any) -> Any:
    """A value whose texts have no halves of characters, which Arrow does not take."""
    if isinstance(value, str):
        return printable(value)
    return [_sound(one) for one in value] if isinstance(value, list) else value


def _json(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    try:
        text.encode()
    except UnicodeEncodeError:  # half a character, which an escape can stand for
        return json.dumps(value)
    return text


def _cell(value: Any, none: Any = "") -> Any:
    """A value as a cell of a table of texts."""
    value = plain(value)
    if value is None:
        return none
    return printable(value) if isinstance(value, str) else _json(value)
