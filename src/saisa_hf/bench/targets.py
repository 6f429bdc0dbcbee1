# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa bench --targets`: SAISA's targets beside the measurements. One set of rows is for two CPU cores, one for an H200;
each comes from one run."""

import argparse
import copy
from collections.abc import Iterator

import torch

from ..common.tables import table
from .models import Models, build
from .names import CURVE, PRESETS
from .options import with_sizes
from .results import measure_case, median, slopes
from .work import Case


CPU, H200 = "two CPU cores", "H200"
PEAK_FLOPS = 790e12  # bfloat16 matrix products on an H200, as measured
SAMPLES = 1_000_000


def run_targets(args: argparse.Namespace, which: str) -> dict:
    """Measures the rows of `which`, `"cpu"` or `"h200"`.

    Returns:
        `results` (of `measure_case`), `slopes`, and `targets`, one dict per row: `work`, `machine`, `target` (the largest
        value that meets it, or the smallest where `at_least`), `measured`, `spread` (quartiles of ratios of times), `limit`
        (the ratio of FLOPs, if there is one), `over` (target / limit, if the target is set like that), and `met` (None: no
        target, for information).
    """
    results, targets = [], []
    for result, rows in (_cpu_rows if which == "cpu" else _h200_rows)(args):
        results.append(result)
        targets += rows
    found = slopes(results, args.clock)
    if which == "cpu":
        for one in found:
            work = f"{one['model']}: exponent of time in visual tokens, {one['from']} to {one['to']}"
            targets.append(_row(work, CPU, one["time"], 1.05 if one["model"] == "saisa" else None))
            if "peak" in one:
                targets.append(_row(work.replace("time", "memory"), CPU, one["peak"]))
    return {"results": results, "slopes": found, "targets": targets}


def show_targets(targets: list[dict]) -> str:
    """The rows of `run_targets` as a table."""
    rows = []
    for row in targets:
        sign = "at least" if row["at_least"] else "at most"
        target = "" if row["target"] is None else f"{sign} {row['target']:.3f}"
        if row["over"] is not None:
            target += f" = {row['over']:.2f} x FLOPs"
        spread = "" if row["spread"] is None else f"{row['spread'][0]:.3f}-{row['spread'][1]:.3f}"
        verdict = {None: "", True: "met", False: "missed"}[row["met"]]
        limit = "" if row["limit"] is None else f"{row['limit']:.3f}"
        rows.append([row["work"], row["machine"], limit, target, f"{row['measured']:.3f}", spread, verdict])
    return table(["work", "machine", "FLOPs", "target", "measured", "quartiles", ""], rows)


def _row(work, machine, measured, target=None, spread=None, limit=None, over=None, at_least=False) -> dict:
    target = over * limit if over is not None else target
    met = None if target is None else bool(measured >= target if at_least else measured <= target)
    row = {"work": work, "machine": machine, "target": target, "measured": measured, "spread": spread}
    return row | {"limit": limit, "over": over, "at_least": at_least, "met": met}


def _ratio(result: dict, other: str, machine: str, most: float | None = None, over: float | None = None) -> dict:
    """The row of SAISA's time over `other`'s, which may be at most `most`, or `over` times the ratio of FLOPs."""
    low, mid, high = result["ratios"][other]["time"]
    limit = result["ratios"][other]["flops"]
    name = {"llava": "LLaVA", "language_model": "language model on the text"}[other]
    return _row(f"{result['name']}: SAISA / {name}", machine, mid, most, (low, high), limit, over)


def _training(result: dict, machine: str) -> list[dict]:
    """Rows of a training step: time and memory beside the ratio of FLOPs, and GPU-hours."""
    ratio, found = result["ratios"]["llava"], result["models"]
    rows, limit = [_ratio(result, "llava", machine, over=1.15)], ratio["flops"]
    if "peak_bytes" in ratio:
        beyond = f"{result['name']}: memory beyond weights and optimizer, SAISA / LLaVA"
        rows.append(_row(beyond, machine, ratio["peak_bytes"], limit=limit, over=1.15))
        whole = {name: one["held_bytes"] + one["peak_bytes"] for name, one in found.items()}
        rows.append(_row(f"{result['name']}: all memory, SAISA / LLaVA", machine, whole["saisa"] / whole["llava"]))
    if machine == H200:
        for name, label in (("saisa", "SAISA"), ("llava", "LLaVA")):
            hours = median(result, name, "wall") / result["batch"] * SAMPLES / 3600
            rows.append(_row(f"{result['name']}: {label}'s GPU-hours per million samples", machine, hours))
    return rows


def _sized(args: argparse.Namespace, preset: str, dtype: str) -> argparse.Namespace:
    """The options with the sizes of `preset`, except those that were given one by one."""
    sized = copy.copy(args)
    for name in PRESETS[preset].keys() - args.given_sizes:
        delattr(sized, name)
    sized.preset, sized.dtype = preset, dtype
    return with_sizes(sized)


def _cpu_rows(args: argparse.Namespace) -> Iterator[tuple[dict, list[dict]]]:
    args = _sized(args, "small", "float32")
    models = build(args)

    def measured(names, case, repeats=args.repeats):
        return measure_case(models, names, case, _repeating(args, repeats))

    pair, floor = ["saisa", "llava"], ["saisa", "language_model"]
    for batch in (1, 8):
        result = measured(pair, Case("prefill", batch))
        rows = [_ratio(result, "llava", CPU, over=1.10)]
        if args.roof and batch == 1:
            reached = result["models"]["saisa"]["roof"]["reached"]
            rows.append(_row(f"{result['name']}: SAISA's share of the roof", CPU, reached, 0.90, at_least=True))
        yield result, rows
    result = measured(pair, Case("decode", tokens=16))
    yield result, [_ratio(result, "llava", CPU, most=1.03)]
    result = measured(floor, Case("second-question"))
    yield result, [_ratio(result, "language_model", CPU, most=1.15)]
    for visual in CURVE:
        names = pair if visual <= (args.llava_up_to or 8192) else ["saisa"]
        yield measured(names, Case("prefill", 1, visual=visual), 5), []
    # last, since memory that was in use before costs less the next time
    result = measured(pair, Case("train", 8, trained="full"), 5)
    yield result, _training(result, CPU)


def _h200_rows(args: argparse.Namespace) -> Iterator[tuple[dict, list[dict]]]:
    pair = ["saisa", "llava"]
    for preset in ("vicuna-7b", "llama3-8b"):
        sized = _sized(args, preset, "bfloat16")
        models = build(sized)
        for batch in (1, 8, 32):
            result = _named(measure_case(models, pair, Case("prefill", batch), sized), preset)
            rows = [_ratio(result, "llava", H200, **({"most": 0.45} if batch == 1 else {"over": 1.15}))]
            if batch == 32:
                rate = result["models"]["saisa"]["flops"] / median(result, "saisa", "wall") / PEAK_FLOPS
                work = f"{result['name']}: SAISA's FLOPs per second, of {PEAK_FLOPS / 1e12:.0f} T"
                rows.append(_row(work, H200, rate, 0.60, at_least=True))
            if batch == 8 and args.memory:
                ratio = result["ratios"]["llava"]["activation_bytes"]
                rows.append(_row(f"{result['name']}: activation memory, SAISA / LLaVA", H200, ratio, 0.5))
            yield result, rows
        if preset == "vicuna-7b":
            result = _named(measure_case(models, pair, Case("train", 8, trained="lora"), sized), preset)
            yield result, _training(result, H200)
            for visual in CURVE:
                yield measure_case(models, pair, Case("prefill", 1, visual=visual), _repeating(sized, 5)), []
            del models
            models = _stage_one(sized)
            result = _named(measure_case(models, pair, Case("train", 8, trained="projectors"), sized), preset)
            yield result, _training(result, H200)
        del models
        if torch.device(args.device).type == "cuda":
            torch.cuda.empty_cache()


def _stage_one(args: argparse.Namespace) -> Models:
    """The models of the paper's first stage, in which all layers share one projector."""
    args = copy.copy(args)
    args.projector_sharing = "shared"
    return build(args)


def _named(result: dict, preset: str) -> dict:
    return result | {"name": f"{preset}, {result['name']}", "preset": preset}


def _repeating(args: argparse.Namespace, most: int) -> argparse.Namespace:
    """The options with at most `most` rounds, for what takes long."""
    args = copy.copy(args)
    args.repeats = min(args.repeats, most)
    return args
