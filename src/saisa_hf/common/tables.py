# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Markdown tables, for terminals and for pages."""

import re
from collections.abc import Iterable
from pathlib import Path


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells: Iterable[str]) -> str:
        first, *others = cells
        padded = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:]))]
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, [header, rule, *rows]))


def fill_blocks(path: str | Path, blocks: dict[str, str]) -> None:
    """Replaces what is between <!-- NAME: start --> and <!-- NAME: end --> in the file `path`, for each name in `blocks`.

    Raises:
        ValueError: the file has no such block.
    """
    page = Path(path).read_text(encoding="utf-8")
    for name, text in blocks.items():
        start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
        around = re.split(f"{start}.*?{end}", page, flags=re.S)
        if len(around) == 1:
            names = ", ".join(re.findall(r"<!-- (\S+): start -->", page)) or "none"
            raise ValueError(f"{path} has no block {name!r} to replace; it has {names}.")
        page = f"{start}\n{text}\n{end}".join(around)
    Path(path).write_text(page, encoding="utf-8")
