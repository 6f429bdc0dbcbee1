# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa bench --targets`: the targets beside the measurements. One set of rows is for two CPU cores, one for an H200; each
comes from one run."""

import argparse
import copy
import sys
import time
from collections.abc import Iterable, Iterator

import torch

from ..common.extras import needs
from ..common.tables import table
from ..costs.family import MEMBERS
from . import measure
from .models import build
from .names import CURVE, MEMBER_MODELS, PRESETS
from .options import with_sizes
from .results import compared, measure_case, median, slopes
from .work import Case


CPU, H200 = "two CPU cores", "H200"
PEAK_FLOPS = 790e12  # bfloat16 matrix products on an H200, as measured
SAMPLES = 1_000_000
NAMES = {"saisa": "SAISA", "llava": "LLaVA", "language_model": "language model on the text"}
PAIR = ["saisa", "llava"]
EXPONENTS_FROM = 1024  # visual tokens
FOLDED = "saisa-folded"
FEW = ["saisa-shared", "vica"]  # the same projector in all layers, and in eight of 32


def run_targets(args: argparse.Namespace, which: str) -> dict:
    """Measures the rows of `which`, `"cpu"` or `"h200"`.

    Returns:
        `results` (of `measure_case`), `slopes`, and `targets`, one dict per row: `work`, `machine`, `target` (the largest
        value that meets it, or the smallest where `at_least`), `measured`, `spread` (quartiles of ratios of times), `limit`
        (the ratio of FLOPs, if there is one), `over` (target / limit, if the target is set like that), and `met` (None: no
        target, for information).
    """
    results, targets = [], []
    start = time.perf_counter()
    for result, rows in (_cpu_rows if which == "cpu" else _h200_rows)(args):
        results.append(result)
        targets += rows
        for line in [f"{row['work']}: {row['measured']:.3f}" for row in rows] or [result["name"]]:
            print(f"{time.perf_counter() - start:4.0f} s: {line}", file=sys.stderr, flush=True)
        if args.keep_memory:
            measure.give_back()  # else what one case had would be beside what the next one needs
    found = slopes(results, args.clock, EXPONENTS_FROM)
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
        target = "" if row["target"] is None else shown_target(row)
        if row["over"] is not None:
            target += f" = {row['over']:.2f} x FLOPs"
        spread = "" if row["spread"] is None else f"{row['spread'][0]:.3f}-{row['spread'][1]:.3f}"
        verdict = {None: "", True: "met", False: "missed"}[row["met"]]
        limit = "" if row["limit"] is None else f"{row['limit']:.3f}"
        rows.append([row["work"], row["machine"], limit, target, f"{row['measured']:.3f}", spread, verdict])
    return table(["work", "machine", "FLOPs", "target", "measured", "quartiles", ""], rows)


def shown_target(row: dict) -> str:
    """The target of a row that has one."""
    return f"{'at least' if row['at_least'] else 'at most'} {row['target']:.3f}"


def _row(work, machine, measured, target=None, spread=None, limit=None, over=None, at_least=False) -> dict:
    target = over * limit if over is not None else target
    met = None if target is None else bool(measured >= target if at_least else measured <= target)
    row = {"work": work, "machine": machine, "target": target, "measured": measured, "spread": spread}
    return row | {"limit": limit, "over": over, "at_least": at_least, "met": met}


def _training(sized: "_Sized", result: dict) -> list[dict]:
    """Rows of a training step: time and memory beside the ratio of FLOPs, and GPU-hours."""
    ratio, found, machine = result["ratios"]["llava"], result["models"], sized.machine
    rows, limit = [sized.row(result, "saisa", "llava", over=1.15)], ratio["flops"]
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


class _Sized:
    """Models of one size, what is measured of them, and rows about it.

    Args:
        preset: their sizes, and `machine` where they are measured.
        members, narrow: as for `build`; the inner width of narrow projectors is a quarter of the hidden size.
        sharing: SAISA's `projector_sharing`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        preset: str,
        machine: str,
        members: Iterable[str] = (),
        narrow: Iterable[str] = (),
        sharing: str = "per_layer",
    ):
        self.args = _sized(args, preset, "float32" if machine == CPU else "bfloat16")
        self.args.projector_hidden_size, self.args.projector_sharing = self.args.hidden_size // 4, sharing
        thin = f"{self.args.layers} layers of width {self.args.hidden_size}"
        self.machine, self.label = machine, {"small": "", "thin": thin}.get(preset, preset)
        self.models = build(self.args, members=members, narrow=narrow)

    def measure(
        self,
        names: list[str],
        case: Case,
        rounds: int | None = None,
        memory: bool = True,
        roof: bool = False,
        curve: bool = False,
    ) -> dict:
        """`measure_case` in at most so many rounds. Memory and roof, which take longer than times, have to be asked for by
        `--memory` and `--roof` as well. The points of a curve are not told apart by the size of the models."""
        args = copy.copy(self.args)
        args.repeats = min(args.repeats, rounds or args.repeats)
        args.memory, args.roof = args.memory and memory, args.roof and roof
        result = measure_case(self.models, names, case, args)
        if curve or not self.label:
            return result
        return result | {"name": f"{self.label}, {result['name']}", "preset": self.args.preset}

    def row(
        self,
        result: dict,
        one: str,
        other: str,
        most: float | None = None,
        over: float | None = None,
        what: str | None = None,
    ) -> dict:
        """The row of the time of the model `one` over that of `other` (in words, `what`), which may be at most `most`, or
        `over` times the ratio of FLOPs."""
        ratio = compared(result["models"][one], result["models"][other], self.args.clock)
        low, mid, high = ratio["time"]
        work = f"{result['name']}: {what or f'{self._called(one)} / {self._called(other)}'}"
        return _row(work, self.machine, mid, most, (low, high), ratio["flops"], over)

    def few_layers(self, visual: int, tokens: int) -> tuple[dict, dict]:
        """Decoding behind a long prompt where few layers see the image and where all do, with its row."""
        few, every = "member-vica", "member-saisa-shared"
        result = self.measure(
            [few, every], Case("decode", visual=visual, tokens=tokens), 5, memory=self.machine == H200
        )
        most = 0.5 if self.machine == CPU else None
        return result, self.row(result, few, every, most, what=f"{self._seeing} seeing layers / all")

    @property
    def _seeing(self) -> str:
        return f"{len(self.models.members['vica'].config.visual_layers)} of {self.args.layers}"

    def _called(self, name: str) -> str:
        if name == FOLDED:
            return f"SAISA, folded at {self.args.projector_hidden_size}"
        return f"ViCA, {self._seeing} layers" if name == "member-vica" else NAMES.get(name) or MEMBER_MODELS[name]


def _cpu_rows(args: argparse.Namespace) -> Iterator[tuple[dict, list[dict]]]:
    small = _Sized(args, "small", CPU, narrow=[FOLDED])
    result = small.measure(PAIR, Case("prefill"), memory=False, roof=True)
    rows = [small.row(result, "saisa", "llava", over=1.10)]
    if args.roof:
        reached = result["models"]["saisa"]["roof"]["reached"]
        rows.append(_row(f"{result['name']}: SAISA's share of the roof", CPU, reached, 0.90, at_least=True))
    yield result, rows
    result = small.measure([*PAIR, FOLDED], Case("prefill", 8), 5, memory=False)
    folded = small.row(result, FOLDED, "llava", over=1.15)
    yield result, [small.row(result, "saisa", "llava", over=1.10), folded]
    for case, other, rounds, most, over in (
        (Case("mixed", 8), "llava", 4, None, 1.10),
        (Case("first-token"), "llava", 5, None, 1.10),
        (Case("decode", tokens=16), "llava", None, 1.03, None),
        (Case("second-question"), "language_model", None, 1.15, None),
        (Case("kept-beginning"), "language_model", None, 1.12, None),
        (Case("kept-beginning", 16), "language_model", 5, 1.12, None),
    ):
        result = small.measure(["saisa", other], case, rounds, memory=False)
        yield result, [small.row(result, "saisa", other, most, over)]
    yield from _thin_rows(args)
    for visual in (visual for visual in CURVE if visual >= EXPONENTS_FROM):
        names = PAIR if visual <= (args.llava_up_to or 0) else ["saisa"]
        yield small.measure(names, Case("prefill", visual=visual), 3, memory=False, curve=True), []
    # last, since memory that was in use before costs less the next time
    result = small.measure(PAIR, Case("train", 8, trained="full"), 3)
    yield result, _training(small, result)


def _thin_rows(args: argparse.Namespace) -> Iterator[tuple[dict, list[dict]]]:
    """What layers save that do not see the image. The models are thin, so that all layers and a long cache, of 2.2 GB where
    they all see, fit into memory."""
    thin = _Sized(args, "thin", CPU, members=FEW)
    result = thin.measure(["member-vica", "llava"], Case("prefill", 8), 4, memory=False)
    yield result, [thin.row(result, "member-vica", "llava", over=1.15)]
    result, row = thin.few_layers(CURVE[-1], tokens=4)
    yield result, [row]


def _h200_rows(args: argparse.Namespace) -> Iterator[tuple[dict, list[dict]]]:
    needs("peft", "training adapters", extra="lora")  # now rather than after minutes
    for preset in ("vicuna-7b", "llama3-8b"):
        every = preset == "vicuna-7b"
        # the others have LLaVA and SAISA among them
        members = [name for name in MEMBERS if name not in ("llava", "saisa")] if every else ["vica"]
        sized = _Sized(args, preset, H200, members, narrow=[FOLDED])
        others = [FOLDED, *(key for key, name in MEMBER_MODELS.items() if name in members)]
        for batch in (1, 8, 32):
            names = [*PAIR, *others] if batch == 8 else PAIR
            result = sized.measure(names, Case("prefill", batch), roof=True)
            most, over = (0.45, None) if batch == 1 else (None, 1.15)
            rows = [sized.row(result, "saisa", "llava", most, over)]
            if batch == 32:
                rate = result["models"]["saisa"]["flops"] / median(result, "saisa", "wall") / PEAK_FLOPS
                work = f"{result['name']}: SAISA's FLOPs per second, of {PEAK_FLOPS / 1e12:.0f} T"
                rows.append(_row(work, H200, rate, 0.60, at_least=True))
            if batch == 8 and args.memory:
                ratio = result["ratios"]["llava"]["activation_bytes"]
                rows.append(_row(f"{result['name']}: activation memory, SAISA / LLaVA", H200, ratio, 0.5))
            if batch == 8:
                limits = {FOLDED: 1.15, "member-vica": 1.15}
                rows += [sized.row(result, name, "llava", over=limits.get(name)) for name in others]
            yield result, rows
        if every:
            result, row = sized.few_layers(CURVE[-1], tokens=8)
            yield result, [row]
            result = sized.measure(PAIR, Case("train", 8, trained="lora"))
            yield result, _training(sized, result)
            for visual in CURVE:
                yield sized.measure(PAIR, Case("prefill", visual=visual), 5, curve=True), []
            del sized
            sized = _Sized(args, preset, H200, sharing="shared")  # of the paper's first stage
            result = sized.measure(PAIR, Case("train", 8, trained="projectors"))
            yield result, _training(sized, result)
        del sized
        if torch.device(args.device).type == "cuda":
            torch.cuda.empty_cache()
