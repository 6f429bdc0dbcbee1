# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Fills the marked blocks of docs/performance.md, the block `family` of docs/family.md, and the block `speed` of README.md
from the results of `saisa bench --json`:

  python scripts/performance.py
  python scripts/performance.py h200=h200.json

A block is the text between <!-- NAME: start --> and <!-- NAME: end -->. Without arguments, blocks are filled from the files
NAME.json in benchmarks/performance and from benchmarks/family.json. `speed` is filled together with `two-cores`.
"""

import json
import sys
import textwrap
from pathlib import Path

from saisa_hf.bench import measure
from saisa_hf.bench.report import show_family, show_rates, show_ratios, show_roof, show_slopes
from saisa_hf.bench.targets import show_targets, shown_target
from saisa_hf.common.tables import fill_blocks, table


ROOT = Path(__file__).parent.parent
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "performance"
FAMILY_PAGE, FAMILY = ROOT / "docs" / "family.md", ROOT / "benchmarks" / "family.json"
README, LINE = ROOT / "README.md", 124  # characters


def machine(result: dict) -> str:
    settings = result["settings"]
    how = f"{settings['clock']} time, median of {settings['repeats']} rounds"
    how += " or fewer" * ("targets" in result) + ", memory kept" * settings.get("keep_memory", False)
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


def speed(result: dict) -> str:
    """The README's block: times over LLaVA's beside the ratios of FLOPs, and which targets are missed."""
    computer = f"{result['machine']['threads']} CPU cores"
    intro = f"Times over LLaVA's on {computer} ([how](docs/performance.md#two-cpu-cores)), beside the ratio of FLOPs:"
    rows = [row | {"work": row["work"].replace(", 64 + 576 tokens", "")} for row in result["targets"] if row["target"]]
    lines = []
    for row in rows:
        if row["work"].endswith(" / LLaVA") and row["spread"]:
            numbers = [f"{row[key]:.2f}" for key in ("measured", "limit", "target")]
            lines.append([row["work"].removesuffix(" / LLaVA"), *numbers])
    missed = [f"{row['work']} ({row['measured']:.3f}, {shown_target(row)})" for row in rows if not row["met"]]
    counted = f"[{len(rows)} targets](docs/performance.md#two-cpu-cores)"
    said = f"{len(missed)} of {counted} missed: {'; '.join(missed)}." if missed else f"All {counted} met."
    tabled = table(["", "time", "FLOPs", "target: at most"], lines)
    return "\n\n".join([intro, tabled, textwrap.fill(said, LINE, break_on_hyphens=False)])


def main(arguments: list[str]) -> None:
    paths = dict(argument.split("=", 1) for argument in arguments)
    paths = paths or {path.stem: path for path in (*sorted(RESULTS.glob("*.json")), FAMILY)}
    results = {name: json.loads(Path(path).read_text(encoding="utf-8")) for name, path in paths.items()}
    blocks = {name: block(result) for name, result in results.items()}
    if "two-cores" in results:
        fill_blocks(README, {"speed": speed(results["two-cores"])})
    if "family" in blocks:
        fill_blocks(FAMILY_PAGE, {"family": blocks.pop("family")})
    if blocks:
        fill_blocks(PAGE, blocks)


if __name__ == "__main__":
    main(sys.argv[1:])
