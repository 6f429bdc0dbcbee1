# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa compress`: a SAISA with narrower projectors."""

import argparse

from ..common.arguments import positive, seed
from .options import Commands, add_command, add_fit, add_result, fit_of, result


HELP = """\
Makes the projectors of a SAISA narrower, so that they can be folded into the maps behind them (docs/folding.md). No labels
and no training on text: each layer's projector is fitted to the keys and values that the old one makes of any images:

  saisa compress ./saisa ./narrow --images ./photos --projector-hidden-size 1024
  saisa compress ./saisa ./narrow --images ./photos --error 0.02

A report in DST gives the errors by layer, and how well the next-token distributions agree with the old model's on held-out
images. After an interruption, the same command resumes the work.

DST appears when everything is written. Load it with fold_projectors=True.
"""


def add_to(commands: Commands) -> None:
    summary = "make projectors narrower, to be folded"
    command = add_command(commands, "compress", run, summary=summary, description=HELP)
    add = command.add_argument
    add("source", metavar="SRC", help="folder, or hub id, of a SAISA checkpoint")
    add("destination", metavar="DST", help="folder to create")
    add("--images", metavar="FOLDER", required=True, help="images to fit on; no other data is needed")
    how = command.add_mutually_exclusive_group(required=True)
    how.add_argument("--projector-hidden-size", metavar="N", type=positive, help="inner width of the new projectors")
    error = (
        "instead, the largest relative squared error of a layer's keys and values: the narrowest width that meets it"
    )
    how.add_argument("--error", metavar="E", type=float, help=error)
    add("--seed", metavar="N", type=seed, default=0, help="of all random numbers (default: %(default)s)")
    add_fit(command)
    add_result(command, "as stored")


def run(arguments: argparse.Namespace) -> int:
    from ..checkpoints.compress import compress

    how = {"projector_hidden_size": arguments.projector_hidden_size, "error": arguments.error}
    how |= fit_of(arguments) | result(arguments)
    compress(arguments.source, arguments.images, arguments.destination, **how)
    return 0
