# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa fit`: which way of loading a model fits into a memory."""

import argparse
import json

from ..common.arguments import count
from .options import Commands, add_command, add_member, add_prompt_sizes


HELP = """\
Reports how a model fits into a given memory, from its configuration alone: in which dtype or quantization, with how much
text and how many images.

  saisa fit vicuna-7b --gpu-memory 8GiB
  saisa fit ./saisa-vicuna --gpu-memory 24GB --images 8 --generate 1024
  saisa fit vicuna-7b --gpu-memory 16GiB --member vica

MODEL is as for `saisa flops`. Quantization is of the decoder layers' linear maps, as in `from_pretrained`.
"""


def add_to(commands: Commands) -> None:
    summary = "report which dtype, quantization, context and images fit into a memory"
    command = add_command(commands, "fit", run, summary=summary, description=HELP)
    add = command.add_argument
    add("model", metavar="MODEL", help="preset, folder, or hub id")
    add("--gpu-memory", metavar="SIZE", required=True, help="8GiB, 24GB ...")
    add("--reserve", metavar="SIZE", default="512MiB", help="what CUDA and others need of it (default: %(default)s)")
    add("--images", metavar="N", type=count, default=1, help="images of a prompt (default: %(default)s)")
    add_prompt_sizes(command, text=512, generate=256)
    add_member(command)
    add("--json", action="store_true", help="print all numbers, in bytes, as JSON")


def run(arguments: argparse.Namespace) -> int:
    from ..costs.family import member
    from ..costs.flops import read_config
    from ..costs.memory import fit, show

    memory = _bytes_of("--gpu-memory", arguments.gpu_memory) - _bytes_of("--reserve", arguments.reserve)
    if memory <= 0:
        raise ValueError(
            f"--gpu-memory {arguments.gpu_memory}: nothing is left of it beside --reserve {arguments.reserve}, which CUDA "
            "and others need. Give more memory, or a smaller reserve."
        )
    text, images, config = arguments.text, arguments.images, read_config(arguments.model)
    if arguments.member is not None:
        config = member(config, arguments.member)
    found = fit(config, memory, text, images, arguments.generate, arguments.batch)
    print(json.dumps(found, indent=1) if arguments.json else show(found, memory, text, images))
    return 0


def _bytes_of(option: str, size: str) -> int:
    from ..costs.memory import bytes_of

    try:
        return bytes_of(size)
    except ValueError as error:
        raise ValueError(f"{option} {error}") from error
