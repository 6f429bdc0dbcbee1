# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Results of `saisa bench` as tables and as curves."""

import operator
from pathlib import Path
from typing import Any

from ..common.plots import drawing
from ..common.tables import table
from .measure import quartiles
from .names import MODELS


NOTES = """\
ratio: SAISA's time over the other's in the same round; median (quartiles) of {repeats} rounds in which all take turns
FLOPs: the same ratio of matrix products, the lowest possible ratio if only they took time; over: ratio / FLOPs
ms: median {clock} time (quartiles). peak: beyond weights and what is kept between calls, as {peak}
activations: the same for a prefill that keeps no keys and values\
"""


def show_ratios(results: list[dict]) -> str:
    """A table of SAISA's time, FLOPs and bytes over the others'."""
    rows = []
    for result in results:
        for other, ratio in result["ratios"].items():
            low, mid, high = ratio["time"]
            row = [f"{result['name']}: SAISA / {MODELS[other]}", f"{mid:.3f} ({low:.3f}-{high:.3f})"]
            row += [f"{ratio['flops']:.3f}", f"{mid / ratio['flops']:.2f}"]
            row += [f"{ratio[key]:.2f}" if key in ratio else "" for key in ("peak_bytes", "activation_bytes")]
            rows.append(row)
    return table(["", "ratio", "FLOPs", "over", "peak", "activations"], rows)


def show_times(results: list[dict], clock: str) -> str:
    """A table of each model's time, FLOPs and bytes."""
    rows = []
    for result in results:
        for name, found in result["models"].items():
            low, mid, high = (1e3 * second for second in quartiles(found["seconds"][clock]))
            row = [f"{result['name']}: {MODELS[name]}", f"{mid:.1f} ({low:.1f}-{high:.1f})"]
            row += [f"{found['flops'] / 1e9:.1f}", f"{found['flops'] / mid / 1e6:.0f}"]
            rate = result["tokens"] * result["batch"] / mid * 1e3 if result["work"] == "decode" else None
            row.append("" if rate is None else f"{rate:.1f}")
            for key in ("peak_bytes", "activation_bytes", "held_bytes"):
                row.append(f"{found[key] / 2**20:.1f}" if found.get(key) else "")
            rows.append(row)
    header = ["", "ms", "GFLOPs", "GFLOP/s", "tokens/s", "peak MiB", "activations MiB", "kept MiB"]
    return table(header, rows)


def show_slopes(slopes: list[dict]) -> str:
    """The exponents of `saisa_hf.bench.results.slopes`, a line per model."""
    lines = []
    for one in slopes:
        exponents = ", ".join(f"{what} {one[what]:.2f}" for what in ("time", "peak", "FLOPs") if what in one)
        lines.append(f"{MODELS[one['model']]}: {exponents}, from {one['from']} to {one['to']} visual tokens")
    return "\n".join(["exponents in the number of visual tokens:", *lines])


def plot(results: list[dict], clock: str, path: str | Path) -> None:
    """Prefill over visual tokens as PNG: times, memory, and the ratio of SAISA to LLaVA with that of their FLOPs, the limit.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = drawing()
    results = [r for r in results if r["work"] == "prefill" and "preset" not in r]
    batches = sorted({r["batch"] for r in results})
    batches = [batch for batch in batches if len({r["visual"] for r in results if r["batch"] == batch}) > 1] or batches
    figure, (times, memory, ratios) = pyplot.subplots(1, 3, figsize=(16, 5), sharex=True)
    for batch, style in zip(batches, ("-", "--", ":", "-.")):
        prefills = sorted((r for r in results if r["batch"] == batch), key=operator.itemgetter("visual"))
        for name, color in zip(MODELS, ("C0", "C1", "C2", "C7")):
            own = [r for r in prefills if name in r["models"]]
            label = f"{MODELS[name]}, batch {batch}"
            marks: dict[str, Any] = {"color": color, "linestyle": style, "marker": "o", "markersize": 4, "label": label}
            _plot_spread(times, own, [quartiles(r["models"][name]["seconds"][clock]) for r in own], **marks)
            measured = [r for r in own if "peak_bytes" in r["models"][name]]
            if measured:
                peaks = [r["models"][name]["peak_bytes"] / 2**20 for r in measured]
                memory.plot([r["visual"] for r in measured], peaks, **marks)
        both = [r for r in prefills if "llava" in r["ratios"]]
        marks = {"color": "C0", "linestyle": style, "marker": "o", "label": f"time, batch {batch}"}
        _plot_spread(ratios, both, [r["ratios"]["llava"]["time"] for r in both], **marks)
        limit = [r["ratios"]["llava"]["flops"] for r in both]
        label = f"FLOPs (the limit), batch {batch}"
        ratios.plot([r["visual"] for r in both], limit, color="black", linestyle=style, label=label)
    ticks = sorted({r["visual"] for r in results})
    for axes, title, unit in (
        (times, "prefill", f"{clock} seconds"),
        (memory, "peak memory beyond weights", "MiB"),
        (ratios, "SAISA / LLaVA", "ratio"),
    ):
        _finish(axes, ticks, title=title, ylabel=unit)
    times.set_yscale("log")
    memory.set_yscale("log")
    ratios.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_spread(axes: Any, results: list[dict], spread: list[tuple], *, color: str, **marks) -> None:
    """A line through the medians of `spread`, (first quartile, median, third quartile) of each result, in a band."""
    visual = [r["visual"] for r in results]
    axes.plot(visual, [mid for _, mid, _ in spread], color=color, **marks)
    axes.fill_between(visual, [low for low, _, _ in spread], [high for *_, high in spread], color=color, alpha=0.2)


def _finish(axes: Any, ticks: list[int], **names: str) -> None:
    axes.set(xlabel="visual tokens", xscale="log", **names)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45, fontsize=8)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)
