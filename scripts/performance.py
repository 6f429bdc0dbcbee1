# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Fills the marked blocks of docs/performance.md from what `saisa bench --json` wrote:

  python scripts/performance.py two-cores=cpu.json h200=h200.json curve=curve.json

A block is what stands between <!-- NAME: start --> and <!-- NAME: end -->.
"""

import json
import sys
from pathlib import Path

from saisa_hf.bench import measure
from saisa_hf.bench.run import show_ratios, show_slopes
from saisa_hf.bench.targets import show_targets
from saisa_hf.tables import fill_blocks


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


def main(arguments: list[str]) -> None:
    pairs = [argument.split("=", 1) for argument in arguments]
    fill_blocks(PAGE, {name: block(json.loads(Path(path).read_text(encoding="utf-8"))) for name, path in pairs})


if __name__ == "__main__":
    main(sys.argv[1:])
