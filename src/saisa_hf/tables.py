# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Tables for terminals and for pages."""


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns are aligned, the first to the left."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

    def line(cells):
        padded = [cells[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells[1:], widths[1:]))]
        return f"| {' | '.join(padded)} |"

    return "\n".join(map(line, [header, rule, *rows]))
