# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Fills the marked blocks of docs/performance.md, and the block `family` of docs/family.md, from the results of
`saisa bench --json`:

  python scripts/performance.py
  python scripts/performance.py h200=h200.json

A block is the text between <!-- NAME: start --> and <!-- NAME: end -->. Without arguments, blocks are filled from the files
NAME.json in benchmarks/performance and from benchmarks/family.json.
"""

import json
import sys
from pathlib import Path

from saisa_hf.bench import measure
from saisa_hf.bench.report import show_family, show_rates, show_ratios, show_roof, show_slopes
from saisa_hf.bench.targets import show_targets
from saisa_hf.common.tables import fill_blocks


ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "performance"
FAMILY_PAGE, FAMILY = ROOT / "docs" / "family.md", ROOT / "benchmarks" / "family.json"


def machine(result: dict) -> str:
    settings = result["settings"]
    how = f"{settings['clock']} time, median of {settings['repeats']} rounds"
    return f"{measure.describe(result['machine'])}; {how}".replace("\n", "; ") + "."


def block(result: dict) -> str:
    """The text of a block: the machine, the table of targets or of members of the family or else that of ratios, the roofs
    and the rates that they are made of, and the exponents."""
    parts = [machine(result)]
    if "targets" in result:
        parts.append(show_targets(result["targets"]))
    else:
        parts.append((show_family if result["settings"].get("members") else show_ratios)(result["results"]))
    if any("rates" in one for one in result["results"]):
        parts += [show_roof(result["results"], result["settings"]["clock"]), show_rates(result["results"])]
    if result["slopes"]:
        first, *lines = show_slopes(result["slopes"]).splitlines()
        parts.append("\n".join([first.capitalize(), "", *(f"- {line}" for line in lines)]))
    return "\n\n".join(parts)


def main(arguments: list[str]) -> None:
    paths = dict(argument.split("=", 1) for argument in arguments)
    paths = paths or {path.stem: path for path in (*sorted(RESULTS.glob("*.json")), FAMILY)}
    blocks = {name: block(json.loads(Path(path).read_text(encoding="utf-8"))) for name, path in paths.items()}
    if "family" in blocks:
        fill_blocks(FAMILY_PAGE, {"family": blocks.pop("family")})
    if blocks:
        fill_blocks(PAGE, blocks)


if __name__ == "__main__":
    main(sys.argv[1:])
