# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The options of `saisa bench`, and those that set the sizes of its random models, which other benchmarks take as well."""

import argparse

from ..common.arguments import positive, seed, started, width
from ..costs.presets import MEMBERS
from .names import CLOCKS, CURVE, MODELS, PRESETS, TRAINED, WORKS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `saisa bench`."""
    _add_cases(parser.add_argument_group("what is measured"))
    _add_measurement(parser.add_argument_group("how"))
    add_size_options(parser.add_argument_group("sizes of the random models"))


def _add_cases(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    works = "; ".join(f"{name}: {meaning}" for name, meaning in WORKS.items())
    default = ["prefill", "first-token", "decode"]
    add("--work", nargs="+", choices=WORKS, default=default, help=f"{works} (default: {' '.join(default)})")
    models = "default: all, or none beside members; for a second question, those that it concerns"
    add("--models", nargs="+", choices=MODELS, help=models)
    members = group.add_mutually_exclusive_group()
    some = (
        "members of the family (docs/family.md), each as a setting of this package's model; llava is always among them"
    )
    members.add_argument("--member", "--members", nargs="+", choices=MEMBERS, dest="members", help=some)
    every = "all members"
    members.add_argument("--family", action="store_const", const=list(MEMBERS), dest="members", help=every)
    narrow = (
        "also measure SAISA, and members with projectors of their own, with projectors of this inner width, a number or"
    )
    add("--projector-hidden-size", type=width, metavar="N", help=narrow + " a share of the hidden size, like 0.25")
    add(
        "--fold",
        action="store_true",
        help="also measure those with folded projectors (docs/folding.md; not in training)",
    )
    add("--batch", type=positive, nargs="+", metavar="N", default=[1], help="samples (default: 1)")
    add("--text", type=positive, nargs="+", metavar="N", default=[64], help="text tokens per sample (default: 64)")
    visual = "visual tokens per sample (default: 576)"
    add("--visual", type=positive, nargs="+", metavar="N", default=[576], help=visual)
    curve = f"measure prefill only, with {', '.join(map(str, CURVE))} visual tokens, and exponents"
    add("--curve", action="store_true", help=curve)
    targets = "measure SAISA's targets instead: rows for two CPU cores, or for an H200 where --device is cuda"
    add("--targets", nargs="?", choices=("auto", "cpu", "h200"), const="auto", help=targets)
    llava = "leave LLaVA (the member too) out beyond this many visual tokens in all, batch times tokens"
    add("--llava-up-to", type=positive, metavar="N", help=llava)
    trained = "with --work train: all but the encoder, the projectors alone, or adapters (default: full)"
    add("--train", nargs="+", choices=TRAINED, default=["full"], help=trained)
    add("--tokens", type=positive, metavar="N", default=8, help="with --work decode: tokens per call (default: 8)")
    every = "the Flamingo has cross-attention before every Nth layer (default: 4)"
    add("--cross-every", type=positive, metavar="N", default=4, help=every)


def _add_measurement(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--repeats", type=positive, metavar="N", default=9, help="timed rounds (default: 9)")
    clock = "clock for ratios: wall, or processor (all threads of the process), which is less affected by other load"
    add("--clock", choices=tuple(CLOCKS), default="wall", help=clock + " (default: wall; the JSON has both)")
    add("--threads", type=started, metavar="N", help="PyTorch's threads on a CPU (default: PyTorch's choice)")
    roof = "also measure what the machine allows at the shapes that occur, and the share of it that is reached"
    add("--roof", action="store_true", help=roof + " (not in training)")
    keep = "make the C library (glibc) keep freed memory, so that no model waits for the system to clear pages"
    add("--keep-memory", action="store_true", help=keep)
    memory = "also measure peak memory (default: yes)"
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help=memory)
    add("--json", metavar="PATH", help="write all numbers to this file")
    add("--plot", metavar="PATH", help="plot prefill over visual tokens as PNG, with --curve or several --visual")


def add_size_options(parser: argparse._ActionsContainer) -> None:
    """The options of the models that `saisa_hf.bench.models.build` makes; `with_sizes` completes what they parse to."""
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="small", help="sizes; the next options change single ones")
    for name in PRESETS["small"]:
        values = ", ".join(f"{preset}: {sizes[name]}" for preset, sizes in PRESETS.items())
        add(f"--{name.replace('_', '-')}", type=positive, metavar="N", default=argparse.SUPPRESS, help=values)
    add("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    add("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of all weights")
    add("--attn-implementation", default="sdpa", help="eager, sdpa, flex_attention, ...")
    add("--seed", type=seed, default=0, help="of weights and prompts")


def with_sizes(args: argparse.Namespace) -> argparse.Namespace:
    """`args` with the preset's sizes where no option gave one. Where only `--heads` was given, there are as many key/value
    heads."""
    if not hasattr(args, "kv_heads") and hasattr(args, "heads"):
        args.kv_heads = args.heads
    for name, value in PRESETS[args.preset].items():
        setattr(args, name, getattr(args, name, value))
    return args
