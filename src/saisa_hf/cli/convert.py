# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa convert`: a checkpoint of the SAISA or the ViCA authors' code as one of transformers."""

import argparse

from .options import Commands, add_chat_template, add_command, add_result, layers, result


HELP = """\
Converts a checkpoint in the layout of the SAISA authors' code (yuanqianhao/saisa-vicuna, yuanqianhao/saisa-llama3, or
one trained with that code) into one that transformers loads:

  saisa convert yuanqianhao/saisa-vicuna ./saisa-vicuna

With --visual-layers, SRC is a ViCA (arXiv 2602.07574), a LLaVA-1.5 of which only some layers see the image:

  saisa convert ./vica-7b ./vica --visual-layers vica-7b
  saisa convert ./my-vica ./vica --visual-layers 0,1,7,8

The result holds weights, configuration, code files, model card and, if SRC has a tokenizer, the processor with its
chat template. Memory use stays below one weight file of SRC plus 1 GB, whatever the size of the model. DST appears when
everything is written, loaded back and compared; if that fails, it stays as it was. After an interruption, run the same
command again.
"""


def add_to(commands: Commands) -> None:
    summary = "convert a checkpoint of the SAISA authors' code"
    command = add_command(commands, "convert", run, summary=summary, description=HELP)
    add = command.add_argument
    add("source", metavar="SRC", help="folder, or hub id, of the checkpoint")
    add("destination", metavar="DST", help="folder to create")
    tower = (
        "folder, or hub id, of the vision encoder (default: mm_vision_tower in SRC's config.json); its weights are used if "
        "SRC has none of its own"
    )
    add("--vision-tower", metavar="PATH", help=tower)
    projector = (
        "the one projector of the first training stage: drop it, keep it beside the model in shared_projector.safetensors, "
        "or use it, if SRC is a checkpoint of that stage (default: %(default)s)"
    )
    add("--shared-projector", choices=("drop", "keep", "use"), default="drop", help=projector)
    seeing = (
        "layers of a ViCA that see the image, with commas, or vica-7b, vica-13b, vica-2.7b for the published models'"
    )
    add("--visual-layers", metavar="LIST", type=layers, help=seeing)
    add_chat_template(command, "llama_3 for Llama 3 tokenizers, else vicuna")
    add_result(command, "as in SRC")
    progress = "show bytes and the time left on stderr (default: if it is a terminal)"
    add("--progress", action=argparse.BooleanOptionalAction, help=progress)


def run(arguments: argparse.Namespace) -> int:
    from ..checkpoints.convert import convert

    convert(
        arguments.source,
        arguments.destination,
        vision_tower=arguments.vision_tower,
        shared_projector=arguments.shared_projector,
        visual_layers=arguments.visual_layers,
        chat_template=arguments.chat_template,
        progress=arguments.progress,
        **result(arguments),
    )
    return 0
