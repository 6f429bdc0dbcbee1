# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""One case measured on all its models, and what follows from it: ratios, medians, exponents."""

import argparse
import math

import torch

from . import measure
from .models import Models
from .names import CLOCKS, LABELS, NARROW, REFERENCE, WITHOUT_IMAGE, is_member
from .rates import Meter
from .roof import roof
from .work import Case, Task, tasks


def measure_case(models: Models, names: list[str], case: Case, args: argparse.Namespace) -> dict:
    """One case: seconds by clock, FLOPs and bytes of each model, and with `args.roof` its roof and the rates that it is made
    of; the ratios of SAISA to the others, those of members of the family to their LLaVA and to transformers', and those of
    SAISAs with narrow projectors to all that are not members."""
    with tasks(models, names, case, args, args.cross_every) as todo:
        meter = _meter(todo, args)
        calls = {name: task.call for name, task in todo.items()}
        if meter is not None:
            meter.measure()
        clocks = measure.interleaved_by_clock(calls, args.repeats, args.device)
        if meter is not None:
            meter.measure()  # again: the machine may have been busier before
        found: dict[str, dict] = {}
        for name, task in todo.items():
            seconds = {clock: clocks[clock][name] for clock in clocks}
            found[name] = {"seconds": seconds, "flops": task.flops, "held_bytes": task.held()}
            if meter is not None:
                found[name]["roof"] = roof(task.passes, meter.rates)
                mid = measure.quartiles(seconds[args.clock])[1]
                found[name]["roof"]["reached"] = found[name]["roof"]["seconds"] / mid
            if args.memory:
                found[name]["peak_bytes"] = measure.peak_memory(task.call, args.device)
                if task.uncached is not None:
                    found[name]["activation_bytes"] = measure.peak_memory(task.uncached, args.device)
                if task.cache is not None:
                    found[name]["cache_bytes"] = measure.cache_bytes(task.cache())
    members = [name for name in names if is_member(name)]
    narrow = [name for name in names if name in NARROW and name not in members]
    wide = [name for name in names if name not in (*members, *narrow)]
    others = [name for name in wide if name != "saisa"] if "saisa" in names else []
    ratios = {name: compared(found["saisa"], found[name], args.clock) for name in others}
    result = {**vars(case), "name": case.name, "models": found, "ratios": ratios}
    if meter is not None:
        result["rates"] = meter.described()
    against = [name for name in (REFERENCE, "llava") if name in names]
    for key, models_of_kind, those in (("member_ratios", members, against), ("narrow_ratios", narrow, wide)):
        if models_of_kind:
            result[key] = {
                name: {other: compared(found[name], found[other], args.clock) for other in those}
                for name in models_of_kind
            }
    return result


def compared(one: dict, other: dict, clock: str) -> dict:
    """Quartiles of `one`'s time over `other`'s, round by round, and the ratios of FLOPs and bytes."""
    rounds = [a / b for a, b in zip(one["seconds"][clock], other["seconds"][clock])]
    ratio = {"time": measure.quartiles(rounds), "flops": one["flops"] / other["flops"]}
    sizes = ("peak_bytes", "activation_bytes", "cache_bytes")
    ratio |= {key: one[key] / other[key] for key in sizes if key in one and other.get(key)}
    if "roof" in one and "roof" in other:
        ratio["roof"] = one["roof"]["seconds"] / other["roof"]["seconds"]
    return ratio


def _meter(todo: dict[str, Task], args: argparse.Namespace) -> Meter | None:
    """What measures the rates that bound these tasks, if the roof is asked for and they are not training."""
    passes = [one for task in todo.values() for one in task.passes]
    if not args.roof or not passes:
        return None
    return Meter(passes, args.device, getattr(torch, args.dtype), CLOCKS[args.clock])


def median(result: dict, name: str, clock: str) -> float:
    """Median seconds of a model in a result of `measure_case`."""
    return measure.quartiles(result["models"][name]["seconds"][clock])[1]


def slope(points: list[tuple[float, float]]) -> float:
    """The exponent that fits (x, y) best: the slope of log y over log x by least squares."""
    xs, ys = zip(*[(math.log(x), math.log(y)) for x, y in points])
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys)) / sum((a - x) ** 2 for a in xs)


def slopes(results: list[dict], clock: str, first: int = 1024) -> list[dict]:
    """For each model the exponents of time, memory and FLOPs in visual tokens, from `first` on, over prefills that differ in
    nothing else: of one batch size, and with the same text."""
    found = []
    for name in LABELS:
        prefills = [r for r in results if r["work"] == "prefill" and name in r["models"] and r["visual"] >= first]
        prefills = [r for r in prefills if r["batch"] == prefills[0]["batch"] and r["text"] == prefills[0]["text"]]
        if name == WITHOUT_IMAGE or len({r["visual"] for r in prefills}) < 2:
            continue
        one = {"model": name, "from": min(r["visual"] for r in prefills), "to": max(r["visual"] for r in prefills)}
        one["time"] = slope([(r["visual"], median(r, name, clock)) for r in prefills])
        one["FLOPs"] = slope([(r["visual"], r["models"][name]["flops"]) for r in prefills])
        if all("peak_bytes" in r["models"][name] for r in prefills):
            one["peak"] = slope([(r["visual"], r["models"][name]["peak_bytes"]) for r in prefills])
        found.append(one)
    return found
