# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa attend`: where in an image each word of an answer looks."""

import argparse
from typing import NoReturn

from ..common.arguments import count
from .options import Commands, add_answering, add_command, add_model, add_placement


HELP = """\
Answers a question about an image and shows where each word of the answer looks:

  saisa attend ./saisa-vicuna cat.jpg "what is on the sofa?"
  saisa attend ./saisa-vicuna cat.jpg dog.jpg "which is larger?" --layers all --output which

Writes a contact sheet, attention.png, with the image once for each word, and a page for the browser, attention.html,
with sliders over words and layers, which needs no network. Weights are attention probabilities, averaged over heads,
and, without --layers, also over the layers that see the image.
"""


def add_to(commands: Commands) -> None:
    command = add_command(
        commands,
        "attend",
        run,
        summary="show where in an image each word of an answer looks",
        description=HELP,
        usage="saisa attend MODEL IMAGE [IMAGE ...] QUESTION [options]",
    )
    add_model(command)
    add = command.add_argument
    add("images", metavar="IMAGE", nargs="+", help="images, or their URLs; they come before the question")
    add("question", metavar="QUESTION", help="what to ask about them")
    plain = command.error

    def error(message: str) -> NoReturn:  # of one argument beside MODEL, argparse would say that it is the image
        plain(message.replace("required: QUESTION", "required: at least one IMAGE, and QUESTION"))

    command.error = error  # type: ignore[method-assign]
    files = "write PATH.png and PATH.html (default: %(default)s)"
    add("--output", metavar="PATH", default="attention", help=files)
    layers = "decoder layers to draw one by one, counted from 0, or all (default: only their mean)"
    add("--layers", metavar="N", nargs="+", type=_layer, default=[], help=layers)
    add("--json", action="store_true", help="print the weights as JSON: by image, layer, word, row, column")
    add_placement(command)
    add_answering(command, longest=64)


def _layer(text: str) -> int | None:
    return None if text == "all" else count(text)


def run(arguments: argparse.Namespace) -> int:
    from ..inspection.attention_pages import attend_and_draw

    return attend_and_draw(
        arguments.model,
        arguments.images,
        arguments.question,
        output=arguments.output,
        layers=None if None in arguments.layers else arguments.layers,
        as_json=arguments.json,
        dtype=arguments.dtype,
        device=arguments.device,
        system=arguments.system,
        max_new_tokens=arguments.max_new_tokens,
    )
