# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa bench`: measures what it is asked for, prints ratios first, and writes JSON and curves."""

import argparse
import math
import operator
from itertools import product
from pathlib import Path

import torch

from ..cli import positive
from ..common.destination import check_file
from ..common.loading import device_named
from ..common.plots import drawing
from . import measure
from .models import PRESETS, Models, add_size_options, build, with_sizes
from .work import MODELS, TRAINED, WITHOUT_PICTURE, WORKS, Case, tasks


CURVE = (64, 256, 576, 1024, 2048, 4096, 8192, 16384)
NOTES = """\
ratio: SAISA's time over the other's in the same round; median (quartiles) of {repeats} rounds in which all take turns
FLOPs: the same ratio of matrix products, the least that it can be where these are all that takes time; over: ratio / FLOPs
ms: median {clock} time (quartiles). peak: beyond weights and what is kept between calls, as {peak}
activations: the same of a prefill that keeps no keys and values\
"""


def measure_case(models: Models, names: list[str], case: Case, args) -> dict:
    """One case: seconds by clock, FLOPs and bytes of each model, and the ratios of SAISA to the others."""
    with tasks(models, names, case, args, args.cross_every) as todo:
        calls = {name: task.call for name, task in todo.items()}
        clocks = measure.interleaved_by_clock(calls, args.repeats, args.device)
        found = {}
        for name, task in todo.items():
            seconds = {clock: clocks[clock][name] for clock in clocks}
            found[name] = {"seconds": seconds, "flops": task.flops, "held_bytes": task.held()}
            if args.memory:
                found[name]["peak_bytes"] = measure.peak_memory(task.call, args.device)
                if task.uncached is not None:
                    found[name]["activation_bytes"] = measure.peak_memory(task.uncached, args.device)
    ratios = {name: _ratio(found["saisa"], found[name], args.clock) for name in names if "saisa" in names != name}
    ratios.pop("saisa", None)
    return {**vars(case), "name": case.name, "models": found, "ratios": ratios}


def _ratio(one: dict, other: dict, clock: str) -> dict:
    """Quartiles of `one`'s time over `other`'s, round by round, and the ratios of FLOPs and bytes."""
    rounds = [a / b for a, b in zip(one["seconds"][clock], other["seconds"][clock])]
    ratio = {"time": measure.quartiles(rounds), "flops": one["flops"] / other["flops"]}
    ratio |= {key: one[key] / other[key] for key in ("peak_bytes", "activation_bytes") if key in one and other.get(key)}
    return ratio


def slope(points: list[tuple[float, float]]) -> float:
    """The exponent that fits (x, y) best: the slope of log y over log x by least squares."""
    xs, ys = zip(*[(math.log(x), math.log(y)) for x, y in points])
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys)) / sum((a - x) ** 2 for a in xs)


def median(result: dict, name: str, clock: str) -> float:
    """Median seconds of a model in a result of `measure_case`."""
    return measure.quartiles(result["models"][name]["seconds"][clock])[1]


# --- text -------------------------------------------------------------------------------------------------------------


def show_ratios(results: list[dict]) -> str:
    rows = []
    for result in results:
        for other, ratio in result["ratios"].items():
            low, mid, high = ratio["time"]
            row = [f"{result['name']}: SAISA / {MODELS[other]}", f"{mid:.3f} ({low:.3f}-{high:.3f})"]
            row += [f"{ratio['flops']:.3f}", f"{mid / ratio['flops']:.2f}"]
            rows.append(
                row + [f"{ratio[key]:.2f}" if key in ratio else "" for key in ("peak_bytes", "activation_bytes")]
            )
    return measure.table(["", "ratio", "FLOPs", "over", "peak", "activations"], rows)


def show_times(results: list[dict], clock: str) -> str:
    rows = []
    for result in results:
        for name, found in result["models"].items():
            low, mid, high = (1e3 * second for second in measure.quartiles(found["seconds"][clock]))
            row = [f"{result['name']}: {MODELS[name]}", f"{mid:.1f} ({low:.1f}-{high:.1f})"]
            row += [f"{found['flops'] / 1e9:.1f}", f"{found['flops'] / mid / 1e6:.0f}"]
            rate = result["tokens"] * result["batch"] / mid * 1e3 if result["work"] == "decode" else None
            row.append("" if rate is None else f"{rate:.1f}")
            for key in ("peak_bytes", "activation_bytes", "held_bytes"):
                row.append(f"{found[key] / 2**20:.1f}" if found.get(key) else "")
            rows.append(row)
    header = ["", "ms", "GFLOPs", "GFLOP/s", "tokens/s", "peak MiB", "activations MiB", "kept MiB"]
    return measure.table(header, rows)


def show_slopes(slopes: list[dict]) -> str:
    lines = []
    for one in slopes:
        exponents = ", ".join(f"{what} {one[what]:.2f}" for what in ("time", "peak", "FLOPs") if what in one)
        lines.append(f"{MODELS[one['model']]}: {exponents}, from {one['from']} to {one['to']} visual tokens")
    return "\n".join(["exponents in the number of visual tokens:", *lines])


def slopes(results: list[dict], clock: str, first: int = 1024) -> list[dict]:
    """For each model the exponents of time, memory and FLOPs in visual tokens, from `first` on, over prefills of one batch
    size that differ in nothing else."""
    found = []
    for name in MODELS:
        prefills = [r for r in results if r["work"] == "prefill" and name in r["models"] and r["visual"] >= first]
        prefills = [r for r in prefills if r["batch"] == prefills[0]["batch"] and r["text"] == prefills[0]["text"]]
        if name == WITHOUT_PICTURE or len({r["visual"] for r in prefills}) < 2:
            continue
        one = {"model": name, "from": min(r["visual"] for r in prefills), "to": max(r["visual"] for r in prefills)}
        one["time"] = slope([(r["visual"], median(r, name, clock)) for r in prefills])
        one["FLOPs"] = slope([(r["visual"], r["models"][name]["flops"]) for r in prefills])
        if all("peak_bytes" in r["models"][name] for r in prefills):
            one["peak"] = slope([(r["visual"], r["models"][name]["peak_bytes"]) for r in prefills])
        found.append(one)
    return found


# --- curves -----------------------------------------------------------------------------------------------------------


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
        for (name, label), color in zip(MODELS.items(), ("C0", "C1", "C2", "C7")):
            own = [r for r in prefills if name in r["models"]]
            marks = {"color": color, "linestyle": style, "marker": "o", "markersize": 4}
            visual = [r["visual"] for r in own]
            spread = [measure.quartiles(r["models"][name]["seconds"][clock]) for r in own]
            times.plot(visual, [mid for _, mid, _ in spread], label=f"{label}, batch {batch}", **marks)
            times.fill_between(
                visual, [low for low, _, _ in spread], [high for *_, high in spread], color=color, alpha=0.2
            )
            kept = [
                (r["visual"], r["models"][name]["peak_bytes"] / 2**20) for r in own if "peak_bytes" in r["models"][name]
            ]
            if kept:
                memory.plot(*zip(*kept), label=f"{label}, batch {batch}", **marks)
        both = [r for r in prefills if "llava" in r["ratios"]]
        visual, marks = [r["visual"] for r in both], {"linestyle": style, "color": "C0"}
        spread = [r["ratios"]["llava"]["time"] for r in both]
        ratios.plot(visual, [mid for _, mid, _ in spread], marker="o", label=f"time, batch {batch}", **marks)
        ratios.fill_between(visual, [low for low, _, _ in spread], [high for *_, high in spread], color="C0", alpha=0.2)
        limit = [r["ratios"]["llava"]["flops"] for r in both]
        ratios.plot(visual, limit, label=f"FLOPs (the limit), batch {batch}", **(marks | {"color": "black"}))
    for axes, title, unit in (
        (times, "prefill", f"{clock} seconds"),
        (memory, "peak memory beyond weights", "MiB"),
        (ratios, "SAISA / LLaVA", "ratio"),
    ):
        axes.set(title=title, xlabel="visual tokens", ylabel=unit, xscale="log")
        ticks = sorted({r["visual"] for r in results})
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=45, fontsize=8)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    times.set_yscale("log")
    memory.set_yscale("log")
    ratios.set_ylim(bottom=0)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# --- command line -----------------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `saisa bench`."""
    what = parser.add_argument_group("what is measured")
    add = what.add_argument
    works = "; ".join(f"{name}: {meaning}" for name, meaning in WORKS.items())
    default = ["prefill", "first-token", "decode"]
    add("--work", nargs="+", choices=WORKS, default=default, help=f"{works} (default: {' '.join(default)})")
    add(
        "--models",
        nargs="+",
        choices=MODELS,
        help="default: all, but for a question whose picture is kept those it concerns",
    )
    add("--batch", type=positive, nargs="+", metavar="N", default=[1], help="samples (default: 1)")
    add("--text", type=positive, nargs="+", metavar="N", default=[64], help="text tokens of a sample (default: 64)")
    add(
        "--visual",
        type=positive,
        nargs="+",
        metavar="N",
        default=[576],
        help="visual tokens of a sample (default: 576)",
    )
    add(
        "--curve",
        action="store_true",
        help=f"prefill alone, with {', '.join(map(str, CURVE))} visual tokens, and exponents",
    )
    targets = "measure what SAISA is held to instead: rows for two CPU cores, or for an H200 where --device is cuda"
    add("--targets", nargs="?", choices=("auto", "cpu", "h200"), const="auto", help=targets)
    llava = "leave LLaVA out beyond so many visual tokens in all, batch times tokens"
    add("--llava-up-to", type=positive, metavar="N", help=llava)
    trained = "with --work train: all but the encoder, the projectors alone, or adapters (default: full)"
    add("--train", nargs="+", choices=TRAINED, default=["full"], help=trained)
    add("--tokens", type=positive, metavar="N", default=8, help="with --work decode: tokens a call (default: 8)")
    every = "the Flamingo's cross-attention stands in front of each Nth layer (default: 4)"
    add("--cross-every", type=positive, metavar="N", default=4, help=every)
    how = parser.add_argument_group("how")
    add = how.add_argument
    add("--repeats", type=positive, metavar="N", default=9, help="timed rounds (default: 9)")
    clock = "of ratios: wall, or processor, the time of all threads of the process, which other load disturbs less (default: "
    add("--clock", choices=tuple(measure.CLOCKS), default="wall", help=clock + "wall; both are in the JSON)")
    add("--threads", type=positive, metavar="N", help="of PyTorch on a CPU (default: as PyTorch chooses)")
    keep = "have the C library keep freed memory (glibc), so that no model waits for the system to clear pages"
    add("--keep-memory", action="store_true", help=keep)
    memory = "measure peak memory, too (default: yes)"
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help=memory)
    add("--json", metavar="PATH", help="write all numbers to this file")
    add("--plot", metavar="PATH", help="draw prefill over visual tokens, with --curve or several --visual, as PNG")
    add_size_options(parser.add_argument_group("sizes of the random models"))


def cases(args) -> list[Case]:
    """What the options ask for."""
    works, visuals = (["prefill"], CURVE) if args.curve else (args.work, args.visual)
    found = []
    for work, batch, text, visual in product(works, args.batch, args.text, visuals):
        if work == "train":
            found += [Case(work, batch, text, visual, trained=trained) for trained in args.train]
        else:
            found.append(Case(work, batch, text, visual, tokens=args.tokens))
    return found


def names_for(case: Case, args) -> list[str]:
    """The models that take part in a case."""
    chosen = args.models or list(MODELS)
    if case.work == "second-question":
        chosen = [name for name in chosen if name in ("saisa", WITHOUT_PICTURE)]
    if case.trained in ("projectors", "lora"):
        chosen = [name for name in chosen if name in ("saisa", "llava")]
    if args.llava_up_to and case.batch * case.visual > args.llava_up_to:
        chosen = [name for name in chosen if name != "llava"]
    return chosen


def prepared(args) -> argparse.Namespace:
    """`args` complete, and PyTorch set to them.

    Raises:
        ValueError: sizes that do not go together, or a device that is not there.
    """
    args.given_sizes = [name for name in PRESETS[args.preset] if hasattr(args, name)]
    args = with_sizes(args)
    for many, name, few, other in (
        (args.hidden_size, "hidden-size", args.heads, "heads"),
        (args.heads, "heads", args.kv_heads, "kv-heads"),
    ):
        if many % few:
            raise ValueError(f"--{name} {many} is no multiple of --{other} {few}.")
    device_named(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.keep_memory:
        measure.keep_memory()
    return args


def bench(args: argparse.Namespace) -> dict:
    """Measures, prints and writes what the options ask for; returns what the JSON file holds."""
    args = prepared(args)
    for path in filter(None, (args.json, args.plot)):
        check_file(Path(path))  # not to be found out when all is measured
    if args.plot:
        drawing()
    result = {"machine": measure.machine(args.device), "settings": _settings(args)}
    print(measure.describe(result["machine"]))
    if args.targets:
        from .targets import run_targets, show_targets

        which = args.targets
        if which == "auto":
            which = "h200" if torch.device(args.device).type == "cuda" else "cpu"
        result |= run_targets(args, which)
        print("\n" + show_targets(result["targets"]))
    else:
        print(describe_models(args))
        todo = cases(args)
        every = args.cross_every if any("flamingo" in names_for(case, args) for case in todo) else None
        models = build(args, every)
        result["results"] = [measure_case(models, names_for(case, args), case, args) for case in todo]
        result["slopes"] = slopes(result["results"], args.clock)
    found = result["results"]
    print("\n" + show_ratios(found) + "\n\n" + show_times(found, args.clock) + "\n")
    if result["slopes"]:
        print(show_slopes(result["slopes"]) + "\n")
    peak = measure.PEAK_MEMORY[torch.device(args.device).type]
    print(NOTES.format(repeats=args.repeats, clock=args.clock, peak=peak))
    if args.plot:
        plot(found, args.clock, args.plot)
    if args.json:
        measure.write_json(args.json, result)
    return result


def describe_models(args) -> str:
    return (
        f"{args.layers} layers, hidden {args.hidden_size}, {args.heads} heads, {args.kv_heads} of keys, vocabulary "
        f"{args.vocab_size}; encoder {args.vision_width} wide, {args.vision_layers} layers; {args.dtype}, "
        f"{args.attn_implementation}; random weights"
    )


def _settings(args) -> dict:
    return {name: value for name, value in vars(args).items() if name not in ("run", "parser")}
