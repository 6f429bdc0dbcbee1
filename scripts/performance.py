# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Fills the marked blocks of docs/performance.md from what `saisa bench --json` wrote:

  python scripts/performance.py two-cores=cpu.json h200=h200.json curve=curve.json

A block is what stands between <!-- NAME: start --> and <!-- NAME: end -->.
"""

import json
import re
import sys
from pathlib import Path

from saisa_hf.bench import measure
from saisa_hf.bench.run import show_ratios, show_slopes
from saisa_hf.bench.targets import show_targets


PAGE = Path(__file__).parent.parent / "docs" / "performance.md"


def block(result: dict) -> str:
    """The text of a block: the machine, the table of targets where there is one, else that of ratios, and exponents."""
    settings = result["settings"]
    how = f"{settings['clock']} time, median of {settings['repeats']} rounds"
    parts = [f"{measure.describe(result['machine'])}; {how}".replace("\n", "; ") + "."]
    parts.append(show_targets(result["targets"]) if "targets" in result else show_ratios(result["results"]))
    if result["slopes"]:
        first, *lines = show_slopes(result["slopes"]).splitlines()
        parts.append("\n".join([first.capitalize(), "", *(f"- {line}" for line in lines)]))
    return "\n\n".join(parts)


def filled(page: str, name: str, result: dict) -> str:
    """`page` with the block `name` made of `result`.

    Raises:
        ValueError: the page has no such block.
    """
    start, end = f"<!-- {name}: start -->", f"<!-- {name}: end -->"
    pattern = f"{re.escape(start)}.*?{re.escape(end)}"
    if not re.search(pattern, page, re.S):
        names = ", ".join(re.findall(r"<!-- (\S+): start -->", page))
        raise ValueError(f"{name!r}: there is no such block; expected one of {names}.")
    return re.sub(pattern, lambda _: f"{start}\n{block(result)}\n{end}", page, flags=re.S)


def main(arguments: list[str]) -> None:
    page = PAGE.read_text(encoding="utf-8")
    for argument in arguments:
        name, _, path = argument.partition("=")
        page = filled(page, name, json.loads(Path(path).read_text(encoding="utf-8")))
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
