# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa build`: a new SAISA, from a language model and a vision encoder or from a trained LLaVA."""

import argparse
import itertools
import re
from typing import Any

from ..common.arguments import count, grid, positive, seed
from ..costs.presets import VICA_LAYERS
from .options import (
    Commands,
    Options,
    add_chat_template,
    add_command,
    add_fit,
    add_reduction,
    add_result,
    fit_of,
    layers,
    result,
)


HELP = """\
Builds a model from a language model and a vision encoder, untrained and ready for the first training stage:

  saisa build Qwen/Qwen3-0.6B google/siglip-base-patch16-224 ./my-saisa
  saisa build ./llama ./clip ./my-saisa --projector-sharing shared --dtype bfloat16

The weights of the language model and the encoder are kept bit for bit, the projectors are new. The tokenizer keeps its
image token, or gets one; its chat template is changed to accept images.

Or makes a SAISA from a trained LLaVA, without training on text. Language model and encoder are the LLaVA's own; each
layer's projector is fitted to the states that the LLaVA's visual tokens have there, on any images:

  saisa build --from-llava llava-hf/llava-1.5-7b-hf --images ./photos ./saisa-of-llava
  saisa build --from-llava ./my-llava --images ./photos ./saisa-of-my-llava --visual-layers auto:8

A report in DST gives the errors by layer, and how well the next-token distributions agree with the LLaVA's on held-out
images. After an interruption, the same command resumes the work.

DST appears when everything is written.
"""


def add_to(commands: Commands) -> None:
    command = add_command(
        commands,
        "build",
        run,
        summary="build a model from a language model and a vision encoder, or from a LLaVA",
        description=HELP,
        usage="saisa build LANGUAGE_MODEL VISION_MODEL DST [options]\n"
        "       saisa build --from-llava MODEL --images FOLDER DST [options]",
    )
    add = command.add_argument
    paths = (
        "folders or hub ids of the language model and the vision encoder, and the folder to create; with --from-llava only "
        "the last"
    )
    add("paths", metavar="LANGUAGE_MODEL VISION_MODEL DST", nargs="*", help=paths)
    add_result(command, "as in the language model, or the LLaVA")
    width = "inner width of the projectors (default: the language model's hidden size, or as in the LLaVA's)"
    add("--projector-hidden-size", metavar="N", type=positive, help=width)
    add("--seed", metavar="N", type=seed, default=0, help="of all random numbers (default: %(default)s)")
    seeing = (
        "decoder layers that see images, with commas or spaces, or vica-7b, vica-13b, vica-2.7b for ViCA's; with "
        "--from-llava also auto:8 for the 8 that need it most, or another number (default: all)"
    )
    add("--visual-layers", metavar="LAYER", nargs="+", action=VisualLayers, help=seeing)
    command.set_defaults(behind_layers=[], layers_first=False)
    parts = command.add_argument_group("from parts")
    _add_parts(parts)
    llava = command.add_argument_group("from a LLaVA")
    _add_llava(llava)
    of_parts, of_llava = ([action.dest for action in group._group_actions] for group in (parts, llava))
    command.set_defaults(of_parts=of_parts, of_llava=of_llava)


def _add_parts(group: Options) -> None:
    add = group.add_argument
    token = "stands for an image in prompts (default: the tokenizer's own, else <image>)"
    add("--image-token", metavar="TEXT", help=token)
    add_chat_template(group, "the tokenizer's own, else plain")
    states = "states of the encoder to use (default: -2)"
    add("--vision-feature-layer", metavar="N", type=int, nargs="+", help=states)
    strategy = "full: with the class token (default: without)"
    add("--vision-feature-select-strategy", choices=("default", "full"), help=strategy)
    sharing = "shared: one projector for all layers, for the first stage"
    add("--projector-sharing", choices=("per_layer", "shared"), help=sharing)
    add_reduction(group, "reduce the visual tokens of an image (default: no reduction)")
    tiles = "read images in tiles too, as LLaVA-NeXT does, in the best of these grids: --tiles 1x2 2x1 2x2 1x3 3x1"
    add("--tiles", metavar="ROWSxCOLUMNS", type=grid, nargs="+", help=tiles)
    add("--pad-to-square", action="store_true", help="pad images to squares, as LLaVA-1.5 does")


def _add_llava(group: Options) -> None:
    add = group.add_argument
    source = (
        "folder, or hub id, of a LLaVA, LLaVA-NeXT or LLaVA-OneVision in transformers' layout, or of a SAISA in embedding "
        "space that is a LLaVA"
    )
    add("--from-llava", metavar="MODEL", help=source)
    add("--images", metavar="FOLDER", help="images to fit the projectors on; no other data is needed")
    add_fit(group)
    choose_on = "with --visual-layers auto:8, keep N of them to choose layers on (default: %(default)s)"
    add("--choose-on", metavar="N", type=positive, default=16, help=choose_on)
    distill = "then train the projectors for STEPS steps on MODEL's own answers to the prompts (default: %(default)s)"
    add("--distill", metavar="STEPS", type=count, default=0, help=distill)
    tiles = "read the whole image alone, without the tiles of a LLaVA-NeXT or LLaVA-OneVision"
    add("--no-tiles", action="store_true", help=tiles)


class VisualLayers(argparse.Action):
    """`--visual-layers 0,1,7`, `0 1 7`, `auto:8` or the name of a ViCA. Words behind it that are none of these are paths."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        numbers = list(itertools.takewhile(lambda word: re.fullmatch(r"[\d,]+", word), values))
        own, name = numbers or values[:1], values[0]
        namespace.visual_layers = VICA_LAYERS[name] if name in VICA_LAYERS else layers(" ".join(own))
        namespace.behind_layers, namespace.layers_first = values[len(own) :], not namespace.paths
        if isinstance(namespace.visual_layers, str) and not name.startswith("auto:"):
            names = ", ".join(VICA_LAYERS)
            parser.error(
                f"argument --visual-layers: expected layers like 0,1,7, or auto:8, or {names}, got {name!r:.80}"
            )


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    if arguments.from_llava is None:
        _from_parts(arguments)
    else:
        _from_llava(arguments)
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Ends the program if options of both ways are given, or the wrong number of paths."""
    parser, from_llava = arguments.parser, arguments.from_llava is not None
    halves = [arguments.paths, arguments.behind_layers]
    arguments.paths = [path for half in (halves[::-1] if arguments.layers_first else halves) for path in half]
    wanted = ["DST"] if from_llava else ["LANGUAGE_MODEL", "VISION_MODEL", "DST"]
    images = " --images FOLDER" if from_llava and arguments.images is None else ""
    if len(arguments.paths) != len(wanted):
        with_llava = f" with --from-llava {arguments.from_llava}" if from_llava else ""
        got = " ".join(arguments.paths) or "none"
        parser.error(f"expected {' '.join(wanted)}{images}{with_llava}, got {got}")
    for name in arguments.of_parts if from_llava else arguments.of_llava:
        if getattr(arguments, name) != parser.get_default(name):
            rule = "does not go with --from-llava" if from_llava else "only goes with --from-llava"
            parser.error(f"--{name.replace('_', '-')} {rule}")
    if not from_llava and isinstance(arguments.visual_layers, str):
        parser.error(f"--visual-layers {arguments.visual_layers} only goes with --from-llava")
    if arguments.choose_on != parser.get_default("choose_on") and not isinstance(arguments.visual_layers, str):
        parser.error("--choose-on only goes with --visual-layers auto:8, or another number")
    if images:
        parser.error("--from-llava needs --images FOLDER, images to fit the projectors on")


def _from_parts(arguments: argparse.Namespace) -> None:
    from ..checkpoints.build import build

    names = (*arguments.of_parts, "projector_hidden_size", "seed", "visual_layers")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in names} | result(arguments)
    options = {name: value for name, value in options.items() if value is not None}
    if len(options.get("vision_feature_layer", ())) == 1:
        options["vision_feature_layer"] = options["vision_feature_layer"][0]
    build(*arguments.paths, **options)


def _from_llava(arguments: argparse.Namespace) -> None:
    from ..checkpoints.from_llava import from_llava

    settings: dict[str, Any] = {"distill_steps": arguments.distill, "tiles": not arguments.no_tiles}
    settings |= {name: getattr(arguments, name) for name in ("projector_hidden_size", "visual_layers", "choose_on")}
    how = fit_of(arguments, **settings) | result(arguments)
    from_llava(arguments.from_llava, arguments.images, *arguments.paths, **how)
