# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa flops`: the cost of a prompt."""

import argparse
import json
from typing import Any

from ..common.arguments import count, positive
from ..costs.presets import LANGUAGE_MODELS, MEMBERS
from .options import DTYPES, Commands, add_command, add_member, add_prompt_sizes, add_reduction


HELP = f"""\
Reports the cost of a prompt: FLOPs by part, parameters, keys and values in the cache and activations, for a SAISA, a
LLaVA and a Flamingo (gated cross-attention before every few layers) with the same language model and encoder:

  saisa flops vicuna-7b --text 64 --visual 576
  saisa flops ./saisa-vicuna --images 4 --generate 128 --json
  saisa flops vicuna-7b --family
  saisa flops vicuna-7b --projector-hidden-size 1024 --folded

MODEL is a preset ({", ".join(LANGUAGE_MODELS)}),
or the folder or hub id of a SAISA, of a LLaVA, or of a language model of a supported family, which is counted with
the paper's encoder, CLIP ViT-L/14 at 336 pixels.
"""


def add_to(commands: Commands) -> None:
    summary = "report FLOPs, parameters and memory, beside LLaVA's and a Flamingo's"
    command = add_command(commands, "flops", run, summary=summary, description=HELP)
    add = command.add_argument
    add("model", metavar="MODEL", help="preset, folder, or hub id")
    command.set_defaults(presets=tuple(LANGUAGE_MODELS))
    visual = command.add_mutually_exclusive_group()
    visual.add_argument("--visual", metavar="N", type=count, help="visual tokens (default: those of one image)")
    images = "images, with as many tokens as the encoder gives"
    visual.add_argument("--images", metavar="N", type=count, help=images)
    size = "of the images, for a model that reads tiles (default: that with most visual tokens)"
    add("--image-size", metavar=("HEIGHT", "WIDTH"), type=positive, nargs=2, help=size)
    add_prompt_sizes(command, text=64, generate=0)
    add("--dtype", choices=DTYPES, default="bfloat16", help="for all bytes (default: %(default)s)")
    every = "the Flamingo has cross-attention before every Nth layer (default: %(default)s)"
    add("--cross-every", metavar="N", type=positive, default=4, help=every)
    trained = (
        "what a training step trains: all but the encoder, the projectors alone, or adapters (default: %(default)s)"
    )
    add("--train", choices=("full", "projectors", "lora"), default="full", help=trained)
    add_reduction(command, "count MODEL with this reduction of its visual tokens (default: its own)")
    inner = "width between the two linear maps of MODEL's projectors (default: its own)"
    add("--projector-hidden-size", metavar="N", type=positive, help=inner)
    folded = "count MODEL after fold_projectors(): narrow projectors are folded into the maps behind them"
    add("--folded", action="store_true", help=folded)
    members = command.add_mutually_exclusive_group()
    add_member(members)
    members.add_argument("--family", action="store_true", help="one line for each member in place of the report")
    add("--json", action="store_true", help="print all numbers as JSON")


def run(arguments: argparse.Namespace) -> int:
    from ..costs.family import member
    from ..costs.flops import Step, account, family_table, read_config, show
    from ..costs.images import image_of

    if arguments.visual is not None and arguments.image_size is not None:
        arguments.parser.error("--image-size does not go with --visual, which says how many tokens there are")
    config = _projected(_reduced(read_config(arguments.model), arguments), arguments)
    if arguments.member is not None:
        config = member(config, arguments.member)
    image = image_of(config, None if arguments.image_size is None else tuple(arguments.image_size))
    visual, pictures = arguments.visual, None
    if visual is None:
        images = 1 if arguments.images is None else arguments.images
        visual, pictures = image.length * images, image.pictures * images
    step = Step(arguments.text, visual, batch=arguments.batch)
    options: dict[str, Any] = {"cross_every": arguments.cross_every, "trained": arguments.train}
    itemsize = 4 if arguments.dtype == "float32" else 2
    if arguments.family:
        rows = {}
        for name in MEMBERS:
            found = account(member(config, name), step, itemsize, arguments.generate, **options, pictures=pictures)
            rows[name] = found["llava" if name == "llava" else "saisa"]
        print(json.dumps(rows, indent=1) if arguments.json else family_table(rows))
        return 0
    found = account(config, step, itemsize, arguments.generate, **options, pictures=pictures)
    if arguments.json:
        asked = {"model": arguments.model, "text": arguments.text, "visual": visual, "batch": arguments.batch}
        asked |= {"generated": arguments.generate, "dtype": arguments.dtype, **options}
        print(json.dumps(asked | found, indent=1))
        return 0
    text, vision = config.text_config, config.vision_config
    tiles = "" if image.pictures == 1 else f", read in {image.pictures} pictures"
    print(
        f"{arguments.model}: {text.model_type}, {text.num_hidden_layers} layers, hidden {text.hidden_size}; "
        f"{vision.model_type}, {image.length} tokens per image{tiles}\n{arguments.text} text and {visual} visual tokens, "
        f"batch {arguments.batch}, {arguments.dtype}\n"
    )
    own = arguments.member or ("this model" if config.in_embedding_space else "SAISA")
    print(show(found, arguments.generate, own=own, **options))
    return 0


def _reduced(config, arguments: argparse.Namespace):
    """`config` with the reduction of visual tokens that the options ask for."""
    reduction, number = arguments.visual_token_reduction, arguments.reduced_visual_tokens
    if reduction is None:
        if number is not None:
            arguments.parser.error(
                "--reduced-visual-tokens goes with --visual-token-reduction resampler or class_attention"
            )
        return config
    changes = {"visual_token_reduction": reduction, "reduced_visual_tokens": number, "image_seq_length": None}
    return type(config).from_dict(config.to_dict() | changes)


def _projected(config, arguments: argparse.Namespace):
    """`config` with the projectors that the options ask for."""
    if (arguments.folded or arguments.projector_hidden_size) and (arguments.family or arguments.member):
        arguments.parser.error(
            "--folded and --projector-hidden-size are for MODEL itself, not for --family or --member"
        )
    changes = {}
    if arguments.projector_hidden_size is not None:
        changes["projector_hidden_size"] = arguments.projector_hidden_size
    if arguments.folded:
        changes["fold_projectors"] = True
    return type(config).from_dict(config.to_dict() | changes) if changes else config
