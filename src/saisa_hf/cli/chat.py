# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa chat`: a conversation in the terminal."""

import argparse

from ..common.arguments import not_negative, positive
from .options import Commands, add_answering, add_command, add_model, add_placement, given


HELP = """\
Answers questions about images and videos in the terminal:

  saisa chat ./saisa-vicuna --image cat.jpg dog.jpg
  saisa chat ./saisa-vicuna --video cats.mp4 --num-frames 64
  echo "how many cats are there?" | saisa chat ./saisa-vicuna --image cat.jpg

Keys and values of the conversation are kept: each turn computes only its own tokens. /help lists the commands, among
them /image PATH and /video PATH at any turn; Ctrl-C stops an answer. If stdin or stdout is not a terminal, each line
of stdin is a question or a command, stdout holds nothing but answers, and the first error ends the program.
"""


def add_to(commands: Commands) -> None:
    summary = "talk with a model about images"
    command = add_command(commands, "chat", run, summary=summary, description=HELP)
    add_model(command)
    add = command.add_argument
    images = "images (or their URLs) for the first question"
    add("--image", metavar="PATH", nargs="+", default=[], action="extend", help=images)
    add("--video", metavar="PATH", nargs="+", default=[], action="extend", help="videos (or their URLs), likewise")
    frames = "taken of each video (default: as the checkpoint says)"
    add("--num-frames", metavar="N", type=positive, help=frames)
    add_placement(command)
    add("--attn-implementation", metavar="NAME", help="eager, sdpa, flex_attention, flash_attention_2 ...")
    add_answering(command, longest=512)
    temperature = "of sampling; 0: greedy (default: as the checkpoint says)"
    add("--temperature", metavar="T", type=not_negative, help=temperature)


def run(arguments: argparse.Namespace) -> int:
    from ..chat.terminal import chat

    options = given(arguments)
    return chat(options.pop("model"), options.pop("image"), options.pop("video"), **options)
