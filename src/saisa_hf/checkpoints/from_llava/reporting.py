# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What is said about the fit: lines of progress, and the report as text."""

import sys
from collections.abc import Callable


def show_progress(log: Callable[[str], None], line: str, last: bool = True) -> None:
    """On a terminal, a line that the next one replaces; elsewhere only the last one is logged."""
    if log is print and sys.stderr.isatty():
        print(f"\r{line} ", end="\n" if last else "", file=sys.stderr, flush=True)
    elif last:
        log(line)


def layer_line(row: dict, layers: int) -> str:
    """One layer's row of the report (see `fit_projectors`) as a line of text."""
    before, places = row.get("copied"), ("norm", "keys", "values")
    parts = [f"{name} {f'{before[name]:.2%} -> ' if before else ''}{row['fitted'][name]:.2%}" for name in places]
    return f"layer {row['layer'] + 1} of {layers}: error of {', '.join(parts)} ({row['seconds']:.0f} s)"


def keys_values_error(errors: dict[str, float]) -> float:
    """The mean of the two."""
    return (errors["keys"] + errors["values"]) / 2


def report_text(report: dict, teacher: str = "LLaVA") -> str:
    """The whole report (see `from_llava` and `compress`) as lines of text."""
    images, agreements = report["pictures"], report["agreement"]
    chosen_on = f"layers chosen on {images['chosen_on']} others, " if "chosen_on" in images else ""
    lines = [
        f"fitted on {images['fitted']} images, {chosen_on}measured on {images['held_out']} others "
        f"({agreements['fitted']['tokens']} tokens of the {teacher}'s answers), {len(images['skipped'])} skipped",
        f"{'projectors':<12}{f'KL from {teacher}':>16}{'same top token':>17}",
    ]
    lines += [f"{stage:<12}{row['kl']:>16.4f}{row['top1']:>17.1%}" for stage, row in agreements.items()]
    if "by_number" in report:
        lines.append(f"{'seeing':<12}{'KL from LLaVA':>16}{'same top token':>17}   layers, each set part of the next")
        for row in report["by_number"]:
            which = "all" if row["number"] == len(report["least"]) else " ".join(map(str, row["layers"]))
            lines.append(f"{row['number']:<12}{row['kl']:>16.4f}{row['top1']:>17.1%}   {which}")
    stages = [stage for stage in ("copied", "fitted") if stage in report["layers"][0]]
    lines.append(f"{'layer':<12}{''.join(f'{stage:>16}' for stage in stages)}   relative error of keys and values")
    for row in report["layers"]:
        lines.append(f"{row['layer']:<12}" + "".join(f"{keys_values_error(row[stage]):>16.2%}" for stage in stages))
    return "\n".join(lines)
