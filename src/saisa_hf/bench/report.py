# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Results of `saisa bench` as tables and as curves."""

import operator
from itertools import cycle
from pathlib import Path
from typing import Any

from ..common.plots import drawing
from ..common.tables import table
from .measure import quartiles
from .names import LABELS, MODELS, REFERENCE
from .roof import BOUNDS


FAMILY_NOTE = """\
time: a member's over that of the member llava, and over that of transformers' LLaVA, in the same round; median (quartiles)
peak, activations: over those of the member llava. cache: keys and values behind the prompt\
"""
RATIO_NOTE = "ratio: SAISA's time over the other's in the same round; median (quartiles)"
ROOF_NOTE = """\
roof: what products, attention and bytes take at the best rates that this machine was seen to reach at the same shapes, in
milliseconds (saisa bench --help says what is counted); reached: roof / ms. by weights, by FLOPs: products that wait for their
weights or for arithmetic; by bytes: norms, residuals, activations, rotations and the cache\
"""
NOTES = """\
{repeats} rounds, in which all take turns
FLOPs: the ratio of matrix products, the lowest possible ratio of times if only they took time; over: ratio of times / FLOPs
ms: median {clock} time (quartiles). peak: beyond weights and what is kept between calls, as {peak}
activations: the same for a prefill that keeps no keys and values\
"""
COLORS = ("C0", "C1", "C2", "C7", "black", "C3", "C4", "C5", "C6", "C8")  # of `LABELS`


def show_ratios(results: list[dict]) -> str:
    """A table of SAISA's time, FLOPs and bytes over the others'."""
    rows = []
    for result in results:
        ratios = {"saisa": result["ratios"]} | result.get("narrow_ratios", {})
        for one, other, ratio in ((one, *pair) for one, found in ratios.items() for pair in found.items()):
            row = [f"{result['name']}: {LABELS[one]} / {MODELS[other]}", *_time_beside_flops(ratio)]
            row += [f"{ratio[key]:.2f}" if key in ratio else "" for key in ("peak_bytes", "activation_bytes")]
            rows.append([*row, f"{ratio['roof']:.3f}"] if "roof" in ratio else row)
    header = ["", "ratio", "FLOPs", "over", "peak", "activations", "roof"]
    widest = max(map(len, rows), default=len(header) - 1)
    return table(header[:widest], [[*row, *[""] * (widest - len(row))] for row in rows])


def show_family(results: list[dict]) -> str:
    """For each case a table with a line per member of the family: time, FLOPs and peak memory over those of the member
    llava, time over that of transformers' LLaVA, and the cache."""
    tables = []
    for result in results:
        rows: list[list[str]] = []
        for key, ratios in result.get("member_ratios", {}).items():
            own, found = ratios.get(REFERENCE, {}), result["models"][key]
            row = [LABELS[key].removeprefix("member "), *_time_beside_flops(own)]
            row += [f"{own[size]:.2f}" if size in own else "" for size in ("peak_bytes", "activation_bytes")]
            row.append(f"{found['cache_bytes'] / 2**20:,.1f}" if "cache_bytes" in found else "")
            rows.append([*row, _time_beside_flops(ratios.get("llava", {}))[0]])
        header = [
            result["name"],
            "time / llava",
            "FLOPs",
            "over",
            "peak",
            "activations",
            "cache, MiB",
            "time / transformers' LLaVA",
        ]
        columns = [column for column in zip(header, *rows) if any(column[1:]) or column[0] == result["name"]]
        first, *others = map(list, zip(*columns))
        tables.append(table(first, others))
    return "\n\n".join(tables)


def _time_beside_flops(ratio: dict) -> list[str]:
    """Cells: the ratio of times with its quartiles, that of FLOPs, and the first over the second."""
    if not ratio:
        return ["", "", ""]
    low, mid, high = ratio["time"]
    return [f"{mid:.3f} ({low:.3f}-{high:.3f})", f"{ratio['flops']:.3f}", f"{mid / ratio['flops']:.2f}"]


def show_times(results: list[dict], clock: str) -> str:
    """A table of each model's time, FLOPs and bytes."""
    rows = []
    for result in results:
        for name, found in result["models"].items():
            low, mid, high = (1e3 * second for second in quartiles(found["seconds"][clock]))
            row = [f"{result['name']}: {LABELS[name]}", f"{mid:.1f} ({low:.1f}-{high:.1f})"]
            row += [f"{found['flops'] / 1e9:.1f}", f"{found['flops'] / mid / 1e6:.0f}"]
            rate = result["tokens"] * result["batch"] / mid * 1e3 if result["work"] == "decode" else None
            row.append("" if rate is None else f"{rate:.1f}")
            for key in ("peak_bytes", "activation_bytes", "held_bytes", "cache_bytes"):
                row.append(f"{found[key] / 2**20:.1f}" if found.get(key) else "")
            rows.append(row)
    header = ["", "ms", "GFLOPs", "GFLOP/s", "tokens/s", "peak MiB", "activations MiB", "kept MiB", "cache MiB"]
    return table(header, rows)


def show_roof(results: list[dict], clock: str) -> str:
    """A table of each model's time beside its roof, and of what the roof is made of, in milliseconds."""
    rows = []
    for result in results:
        for name, found in result["models"].items():
            if "roof" in found:
                roof, mid = found["roof"], quartiles(found["seconds"][clock])[1]
                times = [mid, *(roof[key] for key in ("seconds", *BOUNDS))]
                shown = [f"{1e3 * second:.1f}" for second in times]
                rows.append([f"{result['name']}: {LABELS[name]}", *shown, f"{roof['reached']:.0%}"])
    return table(["", "ms", "roof", "by weights", "by FLOPs", "by bytes", "reached"], rows)


def show_rates(results: list[dict]) -> str:
    """Tables of the rates that the roofs of `results` are made of, each the best of all cases, and a line about memory."""
    measured = [result["rates"] for result in results if "rates" in result]
    products = {tuple(one["sizes"]): one for rates in measured for one in _by_rate(rates["products"])}
    rows = [
        ["{:,} x {:,} x {:,}".format(*sizes), f"{one['flops_per_second'] / 1e9:,.0f}", one["bound"]]
        for sizes, one in sorted(products.items())
    ]
    pairs = {}
    for one in (one for rates in measured for one in _by_rate(rates["attention"])):
        what = f"{one['samples'] * one['heads']:,} heads: {one['queries']:,} queries, {one['keys']:,} keys"
        pairs[what] = max(one["flops_per_second"], pairs.get(what, 0.0))
    rows += [[what, f"{rate / 1e9:,.0f}", ""] for what, rate in pairs.items()]
    memory = max(rates["memory_bytes_per_second"] for rates in measured) / 1e9
    cache = measured[0]["cache_bytes"] / 2**20
    line = f"memory: {memory:.1f} GB/s, of more than the cache holds ({cache:,.0f} MiB)"
    return f"{table(['rows x inputs x outputs', 'GFLOP/s', 'bound by'], rows)}\n\n{line}"


def _by_rate(rates: list[dict]) -> list[dict]:
    """The best last, where it replaces others."""
    return sorted(rates, key=operator.itemgetter("flops_per_second"))


def show_slopes(slopes: list[dict]) -> str:
    """The exponents of `saisa_hf.bench.results.slopes`, a line per model."""
    lines = []
    for one in slopes:
        exponents = ", ".join(f"{what} {one[what]:.2f}" for what in ("time", "peak", "FLOPs") if what in one)
        lines.append(f"{LABELS[one['model']]}: {exponents}, from {one['from']} to {one['to']} visual tokens")
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
        for name, color in zip(LABELS, cycle(COLORS)):
            own = [r for r in prefills if name in r["models"]]
            if not own:
                continue
            label = f"{LABELS[name]}, batch {batch}"
            marks: dict[str, Any] = {"color": color, "linestyle": style, "marker": "o", "markersize": 4, "label": label}
            _plot_spread(times, own, [quartiles(r["models"][name]["seconds"][clock]) for r in own], **marks)
            measured = [r for r in own if "peak_bytes" in r["models"][name]]
            if measured:
                peaks = [r["models"][name]["peak_bytes"] / 2**20 for r in measured]
                memory.plot([r["visual"] for r in measured], peaks, **marks)
        _plot_ratios(ratios, prefills, f", batch {batch}", style)
    pair = "SAISA / LLaVA" if any(r["ratios"] for r in results) else "member / member llava"
    ticks = sorted({r["visual"] for r in results})
    for axes, title, unit in (
        (times, "prefill", f"{clock} seconds"),
        (memory, "peak memory beyond weights", "MiB"),
        (ratios, pair, "ratio"),
    ):
        _finish(axes, ticks, title=title, ylabel=unit)
    times.set_yscale("log")
    memory.set_yscale("log")
    ratios.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _plot_ratios(axes: Any, prefills: list[dict], batch: str, style: str) -> None:
    """Times over LLaVA's with the ratios of FLOPs: of SAISA, or where it is not compared with LLaVA, of members."""
    of_saisa = [(r, r["ratios"]["llava"]) for r in prefills if "llava" in r["ratios"]]
    lines = {"": ("C0", "black", of_saisa)}
    for key, color in zip(LABELS, cycle(COLORS)):
        found = [(r, r.get("member_ratios", {}).get(key, {})) for r in prefills]
        own = [(r, ratios[REFERENCE]) for r, ratios in found if REFERENCE in ratios]
        if own and key != REFERENCE and not of_saisa:
            lines[f"{LABELS[key]}: "] = (color, color, own)
    for name, (color, limit_color, own) in lines.items():
        if not own:
            continue
        results = [r for r, _ in own]
        marks = {"color": color, "linestyle": style, "marker": "o", "label": f"{name}time{batch}"}
        _plot_spread(axes, results, [ratio["time"] for _, ratio in own], **marks)
        limit, label = [ratio["flops"] for _, ratio in own], f"{name}FLOPs (the limit){batch}"
        axes.plot(
            [r["visual"] for r in results], limit, color=limit_color, linestyle=":" if name else style, label=label
        )


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
