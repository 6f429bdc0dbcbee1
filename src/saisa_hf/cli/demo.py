# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa demo`: a small model that anybody can try, or train again."""

import argparse
from pathlib import Path

from ..common.arguments import positive, seed
from ..demo import CHECKPOINT
from .options import Commands, add_command


HELP = """\
Asks a small SAISA questions about images of handwritten digits that it has never seen, shows image, question and answer,
and prints the exact-match accuracy by kind of question.
"""


def add_to(commands: Commands) -> None:
    summary = "ask a small model about images of handwritten digits, or train it again"
    command = add_command(commands, "demo", run, summary=summary, description=HELP)
    add = command.add_argument
    add("--checkpoint", type=Path, default=CHECKPOINT, help="folder (default: the shipped checkpoint)")
    add("--questions", type=positive, default=500, help="how many to ask (default: %(default)s)")
    add("--seed", type=seed, default=1, help="seed of images and questions (default: %(default)s)")
    add("--output", type=Path, default=Path("saisa-demo.png"), help="contact sheet (default: %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, mps ... (default: %(default)s)")
    export = "write the questions and images for saisa eval to DIR instead"
    add("--export", type=Path, metavar="DIR", help=export)
    add("--train", type=Path, metavar="DIR", help="train a new checkpoint from scratch instead, and save it to DIR")


def run(arguments: argparse.Namespace) -> int:
    if arguments.export is not None:
        from ..demo.dataset import write_questions

        write_questions(arguments.export, arguments.questions, arguments.seed)
        return 0
    if arguments.train is not None:
        import logging

        from ..demo.train import Recipe, train

        logging.basicConfig(level=logging.INFO)
        train(arguments.train, Recipe())
        return 0
    import torch

    from ..demo.run import run_demo

    run_demo(
        arguments.checkpoint,
        arguments.questions,
        arguments.seed,
        arguments.output,
        getattr(torch, arguments.dtype),
        arguments.device,
    )
    return 0
