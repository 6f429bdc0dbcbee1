# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa data`: checks training data, or writes some to try training on."""

import argparse

from ..common.arguments import positive, seed
from .options import Commands, add_command


CHECK_HELP = """\
Reads the data of a training configuration as `saisa train` would, prints samples token by token, with a mark at those
that the model learns to predict, and reports which samples cannot be used:

  saisa data check configs/tiny_stage2.yaml
"""

DIGITS_HELP = """\
Writes a small data set to try training on: images of handwritten digits with captions and questions in LLaVA's format,
questions about unseen images, and a model whose projector is new:

  saisa data digits ./digits
  saisa train configs/tiny_stage1.yaml
  saisa train configs/tiny_stage2.yaml
"""


def add_to(commands: Commands) -> None:
    summary = "check training data, or write a small data set to try training on"
    command = commands.add_parser("data", help=summary)
    actions = command.add_subparsers(title="commands", metavar="COMMAND", required=True)
    summary = "show what the model will see of the data, and what cannot be used"
    action = add_command(actions, "check", run_check, summary=summary, description=CHECK_HELP)
    add = action.add_argument
    add("config", metavar="CONFIG", help="YAML file of options, as for saisa train")
    add("--samples", metavar="N", type=positive, default=2, help="samples to print (default: %(default)s)")
    add("--limit", metavar="N", type=positive, help="samples to check (default: all)")

    summary = "write images of digits with captions and questions"
    action = add_command(actions, "digits", run_digits, summary=summary, description=DIGITS_HELP)
    add = action.add_argument
    add("folder", metavar="FOLDER", help="folder to create")
    add("--pictures", metavar="N", type=positive, default=4000, help="training images (default: %(default)s)")
    add("--seed", metavar="N", type=seed, default=0, help="of all random numbers (default: %(default)s)")


def run_check(arguments: argparse.Namespace) -> int:
    from ..training.inputs import check_inputs
    from ..training.options import load_options

    options = load_options(arguments.config)
    check_inputs(options)  # before torch is loaded
    from ..training.check import check

    checked, bad = check(options, arguments.samples, arguments.limit or 0)
    if bad:
        raise ValueError(f"{bad} of {checked} samples cannot be used")
    return 0


def run_digits(arguments: argparse.Namespace) -> int:
    from ..demo.dataset import write_dataset

    write_dataset(arguments.folder, arguments.pictures, seed=arguments.seed)
    return 0
