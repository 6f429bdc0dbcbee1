# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa bench`: measures what it is asked for, prints ratios first, and writes JSON and curves."""

import argparse
from itertools import product
from pathlib import Path

import torch

from ..common.destination import check_file
from ..common.loading import device_named
from ..common.plots import check_plot
from . import measure
from .models import build
from .names import CURVE, MEMBER_MODELS, MODELS, NARROW, PRESETS, REFERENCE, UNPADDED, WITHOUT_IMAGE
from .options import with_sizes
from .report import (
    FAMILY_NOTE,
    NOTES,
    RATIO_NOTE,
    ROOF_NOTE,
    plot,
    show_family,
    show_rates,
    show_ratios,
    show_roof,
    show_slopes,
    show_times,
)
from .results import measure_case, slopes
from .targets import run_targets, show_targets
from .work import Case


def bench(args: argparse.Namespace) -> dict:
    """Measures, prints and writes what the options ask for; returns what the JSON file holds."""
    args = prepared(args)
    if args.json:
        check_file(Path(args.json))  # now rather than after all measurements
    if args.plot:
        check_plot(args.plot)
    result: dict = {"machine": measure.machine(args.device), "settings": vars(args).copy()}
    print(measure.describe(result["machine"]))
    if args.targets:
        result |= run_targets(args, _machine_of_targets(args))
        print("\n" + show_targets(result["targets"]))
    else:
        print(describe_models(args))
        result |= _measured(args)
    found = result["results"]
    tables, notes = ([show_family(found)], [FAMILY_NOTE]) if args.members else ([], [])
    if not args.members or any(one["ratios"] or one.get("narrow_ratios") for one in found):
        tables, notes = [*tables, show_ratios(found)], [*notes, RATIO_NOTE]
    tables.append(show_times(found, args.clock))
    if any("rates" in one for one in found):
        tables, notes = [*tables, show_roof(found, args.clock), show_rates(found)], [*notes, ROOF_NOTE]
    print("\n" + "\n\n".join(tables) + "\n")
    if result["slopes"]:
        print(show_slopes(result["slopes"]) + "\n")
    peak = measure.PEAK_MEMORY[torch.device(args.device).type]
    print("\n".join([*notes, NOTES.format(repeats=args.repeats, clock=args.clock, peak=peak)]))
    if args.plot:
        plot(found, args.clock, args.plot)
    if args.json:
        measure.write_json(args.json, result)
    return result


def prepared(args: argparse.Namespace) -> argparse.Namespace:
    """`args` complete, and PyTorch set to them.

    Raises:
        ValueError: sizes do not go together, or the device is not there.
    """
    if args.targets and (args.members or args.projector_hidden_size):
        raise ValueError("--targets chooses its models: leave out --member, --family and --projector-hidden-size.")
    if args.fold and not args.projector_hidden_size:
        raise ValueError("--fold: only narrow projectors can be folded. Add --projector-hidden-size, 0.25 for example.")
    args.given_sizes = [name for name in PRESETS[args.preset] if hasattr(args, name)]
    args = with_sizes(args)
    for many, name, few, other in (
        (args.hidden_size, "hidden-size", args.heads, "heads"),
        (args.heads, "heads", args.kv_heads, "kv-heads"),
    ):
        if many % few:
            raise ValueError(f"--{name} {many} is not a multiple of --{other} {few}.")
    if isinstance(args.projector_hidden_size, float):
        args.projector_hidden_size = max(1, round(args.projector_hidden_size * args.hidden_size))
    device_named(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.keep_memory:
        measure.keep_memory()
    return args


def cases(args: argparse.Namespace) -> list[Case]:
    """What the options ask for."""
    works, visuals = (["prefill"], CURVE) if args.curve else (args.work, args.visual)
    found = []
    for work, batch, text, visual in product(works, args.batch, args.text, visuals):
        if work == "train":
            found += [Case(work, batch, text, visual, trained=trained) for trained in args.train]
        else:
            found.append(Case(work, batch, text, visual, tokens=args.tokens))
    return found


def names_for(case: Case, args: argparse.Namespace) -> list[str]:
    """The models that take part in a case. Where members of the family do, they are compared with its LLaVA."""
    chosen = args.models or ([] if args.members else list(MODELS))
    members = [key for key, name in MEMBER_MODELS.items() if args.members and name in ("llava", *args.members)]
    if case.work in ("second-question", "kept-beginning"):
        chosen = [name for name in chosen if name in ("saisa", WITHOUT_IMAGE)]
    if case.trained in ("projectors", "lora"):
        chosen = [name for name in chosen if name in ("saisa", "llava")]
    chosen = [name for name in (*chosen, *members) if case.work != "mixed" or name not in UNPADDED]
    kinds = ("narrow", "folded")[: 1 + (args.fold and case.work != "train")] if args.projector_hidden_size else ()
    chosen += [key for key, (name, kind) in NARROW.items() if name in chosen and kind in kinds]
    if args.llava_up_to and case.batch * case.visual > args.llava_up_to:
        chosen = [name for name in chosen if name not in ("llava", REFERENCE)]
    return chosen


def _measured(args: argparse.Namespace) -> dict:
    """`results` of the cases that the options ask for, and their `slopes`."""
    todo = cases(args)
    taking_part = {name for case in todo for name in names_for(case, args)}
    every = args.cross_every if "flamingo" in taking_part else None
    members = [name for key, name in MEMBER_MODELS.items() if key in taking_part]
    models = build(args, every, members, [key for key in NARROW if key in taking_part])
    results = [measure_case(models, names_for(case, args), case, args) for case in todo]
    return {"results": results, "slopes": slopes(results, args.clock)}


def _machine_of_targets(args: argparse.Namespace) -> str:
    if args.targets != "auto":
        return args.targets
    return "h200" if torch.device(args.device).type == "cuda" else "cpu"


def describe_models(args: argparse.Namespace) -> str:
    """The sizes of the models, in a line."""
    return (
        f"{args.layers} layers, hidden {args.hidden_size}, {args.heads} heads, {args.kv_heads} key/value heads, vocabulary "
        f"{args.vocab_size}; encoder {args.vision_width} wide, {args.vision_layers} layers; {args.dtype}, "
        f"{args.attn_implementation}; random weights"
    )
