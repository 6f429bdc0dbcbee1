# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa redundancy`: which layers of a LLaVA need its visual tokens."""

import argparse
import json
import sys

from ..common.arguments import positive
from .options import Commands, add_command, add_placement


HELP = """\
Reports what each decoder layer of a LLaVA, or LLaVA-NeXT, contributes through its visual tokens: how far the distribution
of the next token moves (KL divergence in nats) when in that layer alone they stop attending, skip the feed-forward network,
or both. Nothing is trained or changed:

  saisa redundancy llava-hf/llava-1.5-7b-hf --images ./photos
  saisa redundancy ./llava --images ./photos --prompt "How many people are there?" --plot layers.png

An image costs three forward passes for each layer, and one more. With a folder of a few dozen images the order of the
layers, printed last, shows where ShortV (arXiv 2504.00502) would freeze visual tokens.
"""


def add_to(commands: Commands) -> None:
    summary = "report which layers of a LLaVA need its visual tokens to attend and to be fed"
    command = add_command(commands, "redundancy", run, summary=summary, description=HELP)
    add = command.add_argument
    add("model", metavar="MODEL", help="folder, or hub id, of a LLaVA or LLaVA-NeXT in transformers' layout")
    add("--images", metavar="FOLDER", required=True, help="images to measure on")
    add("--pictures", metavar="N", type=positive, default=32, help="use at most the first N (default: %(default)s)")
    add("--prompt", metavar="TEXT", help="question about each image (default: asks for a description)")
    add_placement(command)
    add("--json", action="store_true", help="print all numbers as JSON")
    add("--plot", metavar="FILE", help="plot them into this file, .png for instance")


def run(arguments: argparse.Namespace) -> int:
    from ..checkpoints.from_llava import load_llava, picture_files
    from ..common.loading import device_named
    from ..common.plots import check_plot
    from ..inspection.naavit import LLAVAS
    from ..inspection.redundancy import PROMPT, plot, redundancy, show

    images = picture_files(arguments.images)[: arguments.pictures]
    if arguments.plot is not None:  # now rather than after hours of work
        check_plot(arguments.plot)
    dtype = None if arguments.dtype == "auto" else arguments.dtype
    model, processor = load_llava(arguments.model, dtype, device_named(arguments.device), named="MODEL", kinds=LLAVAS)

    def log(line: str) -> None:
        print(f"\r{line}", end="", file=sys.stderr, flush=True)

    shown = {"log": log} if sys.stderr.isatty() else {}
    found = redundancy(model, processor, images, arguments.prompt or PROMPT, **shown)
    if shown:
        print(file=sys.stderr)
    print(json.dumps(found, indent=1) if arguments.json else show(found))
    if arguments.plot is not None:
        plot(found, arguments.plot)
    return 0
