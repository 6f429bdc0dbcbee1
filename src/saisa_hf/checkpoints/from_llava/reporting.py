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
    parts = [f"{name} {row['copied'][name]:.2%} -> {row['fitted'][name]:.2%}" for name in ("norm", "keys", "values")]
    return f"layer {row['layer'] + 1} of {layers}: error of {', '.join(parts)} ({row['seconds']:.0f} s)"


def report_text(report: dict) -> str:
    """The whole report (see `from_llava`) as lines of text."""
    images, agreements = report["pictures"], report["agreement"]
    chosen_on = f"layers chosen on {images['chosen_on']} others, " if "chosen_on" in images else ""
    lines = [
        f"fitted on {images['fitted']} images, {chosen_on}measured on {images['held_out']} others "
        f"({agreements['copied']['tokens']} tokens of the LLaVA's answers), {len(images['skipped'])} skipped",
        f"{'projectors':<12}{'KL from LLaVA':>15}{'same top token':>17}",
    ]
    lines += [f"{stage:<12}{row['kl']:>15.4f}{row['top1']:>17.1%}" for stage, row in agreements.items()]
    if "by_number" in report:
        lines.append(f"{'seeing':<12}{'KL from LLaVA':>15}{'same top token':>17}   layers, each set part of the next")
        for row in report["by_number"]:
            which = "all" if row["number"] == len(report["least"]) else " ".join(map(str, row["layers"]))
            lines.append(f"{row['number']:<12}{row['kl']:>15.4f}{row['top1']:>17.1%}   {which}")
    lines.append(f"{'layer':<12}{'copied':>15}{'fitted':>17}   relative error of keys and values")
    for row in report["layers"]:
        copied, fitted = ((row[stage]["keys"] + row[stage]["values"]) / 2 for stage in ("copied", "fitted"))
        lines.append(f"{row['layer']:<12}{copied:>15.2%}{fitted:>17.2%}")
    return "\n".join(lines)
