# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa train`: a training run, by a YAML file and options."""

import argparse
import os

from ..training.options import add_arguments, unknown_argument
from .options import Commands, add_command, given


HELP = """\
Trains a model: the paper's two stages, or fine-tuning.

  saisa train configs/vicuna_7b_stage1.yaml
  saisa train configs/tiny_stage2.yaml --max-steps 20 --output ./try
  torchrun --nproc-per-node 8 -m saisa_hf train configs/vicuna_7b_stage2.yaml

CONFIG is a YAML file of lines `option: value`; the options are those below, with _ instead of -. Options on the
command line override the file. To resume a run that was stopped, give the same command again: it continues from its
newest checkpoint. A run that is finished is left as it is, and so is an output with another run.
"""


def add_to(commands: Commands) -> None:
    command = add_command(
        commands,
        "train",
        run,
        summary="train a model: the paper's two stages, or fine-tuning",
        description=HELP,
        usage="saisa train CONFIG [options]",
        allow_abbrev=False,
    )
    command.add_argument("config", metavar="CONFIG", help="YAML file of options")
    add_arguments(command)
    command.set_defaults(refuse=_refuse)


def _refuse(arguments: argparse.Namespace, unknown: list[str]) -> None:
    if unknown[0].startswith("-"):
        raise ValueError(unknown_argument(unknown[0]))
    arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")


def run(arguments: argparse.Namespace) -> int:
    from ..training.inputs import finished_already
    from ..training.options import load_options

    overrides = given(arguments)
    options = load_options(overrides.pop("config"), overrides)
    if (told := finished_already(options)) is not None:  # known without torch
        if os.environ.get("RANK", "0") == "0":
            print(told)
        return 0
    from ..training.run import train

    train(options)
    return 0
