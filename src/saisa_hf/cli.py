# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The console script `saisa`: one sub-command per thing that can be done without writing Python.

Heavy modules are imported by the sub-command that needs them, so that `saisa --help` answers at once.
"""

import argparse
import json
import math
import os
import sys
from pathlib import Path

from . import __version__
from .costs.presets import LANGUAGE_MODELS


# of visual tokens; `vision_saisa` has the same, and is slow to import
REDUCTIONS = ("avg_pool", "pixel_unshuffle", "resampler", "class_attention")

CONVERT_HELP = """\
Converts a checkpoint in the layout of the SAISA authors' code (yuanqianhao/saisa-vicuna, yuanqianhao/saisa-llama3, or
one trained with that code) into one that transformers loads:

  saisa convert yuanqianhao/saisa-vicuna ./saisa-vicuna

The result holds weights, configuration, code files, model card and, where SRC has a tokenizer, the processor with its
chat template. Memory stays below one weight file of SRC plus 1 GB, whatever the size of the model. DST appears when
everything is written, loaded back and compared; on failure it is left as it was. After an interruption, run the same
command again.
"""

BUILD_HELP = """\
Builds a model from a language model and a vision encoder, untrained and ready for the first training stage:

  saisa build Qwen/Qwen3-0.6B google/siglip-base-patch16-224 ./my-saisa
  saisa build ./llama ./clip ./my-saisa --projector-sharing shared --dtype bfloat16

The language model's and the encoder's weights are kept bit for bit, the projectors are new. The tokenizer keeps the
image token it has, or gets one; its chat template is made to take pictures.

Or makes a SAISA of a trained LLaVA, without training on text. Language model and encoder are the LLaVA's own; the projector
of each layer is fitted to the states that the LLaVA's visual tokens have there, on any pictures:

  saisa build --from-llava llava-hf/llava-1.5-7b-hf --images ./photos ./saisa-of-llava

A report in DST tells the errors by layer, and how well the next-token distributions agree with the LLaVA's on pictures
that were held out. An interrupted run goes on where it was.

DST appears when everything is written.
"""

CHAT_HELP = """\
Answers questions about pictures in the terminal:

  saisa chat ./saisa-vicuna --image cat.jpg dog.jpg
  echo "how many cats are there?" | saisa chat ./saisa-vicuna --image cat.jpg

Keys and values of the conversation are kept: each turn computes its own tokens alone. Commands,
among them /image PATH at any turn, are listed by /help; Ctrl-C stops an answer. Where stdin or stdout
is no terminal, each line of stdin is a question or a command, stdout holds nothing but answers, and
the first error ends the program.
"""

ATTEND_HELP = """\
Answers a question about a picture and shows where each word of the answer looks:

  saisa attend ./saisa-vicuna cat.jpg "what is on the sofa?"
  saisa attend ./saisa-vicuna cat.jpg dog.jpg "which is larger?" --layers all --output which

Written are a contact sheet, attention.png, with the picture once for each word, and a page for the browser,
attention.html, with sliders over words and layers, which needs no network. Weights are attention probabilities, averaged
over heads; without --layers over the layers that see the picture as well.
"""

TRAIN_HELP = """\
Trains a model: the paper's two stages, or fine-tuning.

  saisa train configs/vicuna_7b_stage1.yaml
  saisa train configs/tiny_stage2.yaml --max-steps 20 --output ./try
  torchrun --nproc-per-node 8 -m saisa_hf train configs/vicuna_7b_stage2.yaml

CONFIG is a YAML file of lines `option: value`; the options are those below, with _ for -, and what the
command line says comes before what the file says. A run that was stopped goes on from its newest
checkpoint when the same command is given again.
"""

CHECK_HELP = """\
Reads the data of a training configuration as `saisa train` would, prints samples token by token with a mark
at those the model learns to say, and tells which samples cannot be used:

  saisa data check configs/tiny_stage2.yaml
"""

DIGITS_HELP = """\
Writes a small data set to try training on: pictures of handwritten digits with captions and questions in
LLaVA's form, questions about unseen pictures, and a model whose projector is new:

  saisa data digits ./digits
  saisa train configs/tiny_stage1.yaml
  saisa train configs/tiny_stage2.yaml
"""


FLOPS_HELP = """\
Tells what a prompt costs: FLOPs by part, parameters, keys and values in the cache and activations, for a SAISA, a
LLaVA and a Flamingo (gated cross-attention in front of every few layers) of the same language model and encoder:

  saisa flops vicuna-7b --text 64 --visual 576
  saisa flops ./saisa-vicuna --images 4 --generate 128 --json

MODEL is a preset ({presets}),
or the folder or hub id of a SAISA, of a LLaVA, or of a language model of a supported family, which is counted with
the paper's encoder, CLIP ViT-L/14 at 336 pixels.
"""

BENCH_HELP = """\
Measures SAISA beside what else reads pictures, with random weights of the same language model and encoder,
on the same work in the same run: transformers' LLaVA, a Flamingo (transformers' Idefics), and the language
model on the text alone, which is the floor.

  saisa bench --batch 1 8
  saisa bench --curve --llava-up-to 8192 --plot curve.png --json curve.json
  saisa bench --preset vicuna-7b --device cuda --dtype bfloat16 --batch 1 8 32

Rounds in which all models take turns; medians with quartiles, ratios first, and the ratio of FLOPs, which
is their limit, beside each.
"""


FIT_HELP = """\
Tells what of a model fits into a memory, from its configuration alone: in which dtype or quantization, with how much
text and how many pictures.

  saisa fit vicuna-7b --gpu-memory 8GiB
  saisa fit ./saisa-vicuna --gpu-memory 24GB --images 8 --generate 1024

MODEL is what `saisa flops` takes. Quantized are the decoder layers' linear maps, as `from_pretrained` does it.
"""

REDUNDANCY_HELP = """\
Tells what each decoder layer of a LLaVA, or LLaVA-NeXT, contributes through its visual tokens: how far the distribution
of the next token moves (KL divergence in nats) when in that layer alone they stop attending, stop passing the
feed-forward network, or both. Nothing is trained or changed:

  saisa redundancy llava-hf/llava-1.5-7b-hf --images ./photos
  saisa redundancy ./llava --images ./photos --prompt "How many people are there?" --plot layers.png

A picture costs three forward passes for each layer, and one more. With a folder of a few dozen pictures the order of the
layers, printed last, tells where ShortV (arXiv 2504.00502) would freeze visual tokens.
"""

UPGRADE_HELP = """\
Brings a checkpoint that was saved by an older release up to this one: the code files beside config.json, auto_map, and what
this package wrote into the model card. Weights and settings stay as they are, byte for byte:

  saisa upgrade ./saisa-vicuna --check
  saisa upgrade ./saisa-vicuna
  saisa upgrade me/saisa-vicuna --push-to-hub

A folder loads at every moment, and a run that was interrupted is completed by the next. Of a repository only the small files
are downloaded, and the changes are one commit. With --check the exit status is 1 if something would change, else 0.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (None: the process's own) and returns the exit status.

    0: done. 1: a file, folder, repository or optional package is missing or cannot be used. 2: the command line or
    something in the input is not as expected. Errors are one line on stderr.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv[:1] == ["demo"]:  # it has an argument parser of its own
            from .demo.run import main as demo

            return demo(argv[1:]) or 0
        arguments, unknown = _parser(argv[:1]).parse_known_args(argv)
        if unknown:
            _refuse(argv, arguments, unknown)
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ImportError) as error:
        return _fail(error, 1)
    except ValueError as error:
        return _fail(error, 2)


def _fail(error: object, status: int) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    print(f"saisa: error: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
    return status


def _refuse(argv: list[str], arguments: argparse.Namespace, unknown: list[str]) -> None:
    """Raises for arguments that the parser does not know; for training, with the nearest that it does."""
    if argv[0] == "train" and unknown[0].startswith("-"):
        from .training.options import unknown_argument

        raise ValueError(unknown_argument(unknown[0]))
    arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")


def _parser(asked_for: list[str] | tuple = ()) -> argparse.ArgumentParser:
    """The parser of the whole command line. The options of training, which take a second to import, are there if `train` is
    among `asked_for`."""
    parser = argparse.ArgumentParser(prog="saisa", description="SAISA vision-language models for transformers.")
    parser.add_argument("--version", action="version", version=f"saisa-hf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    commands.add_parser("demo", help="ask a small model about pictures of handwritten digits, or train it again")

    command = commands.add_parser(
        "convert",
        help="convert a checkpoint of the SAISA authors' code",
        description=CONVERT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("source", metavar="SRC", help="folder, or hub id, of the checkpoint")
    command.add_argument("destination", metavar="DST", help="folder to make")
    command.add_argument(
        "--vision-tower",
        metavar="PATH",
        help="folder, or hub id, of the vision encoder (default: mm_vision_tower in SRC's config.json); its weights are "
        "used where SRC has none of its own",
    )
    command.add_argument(
        "--shared-projector",
        choices=("drop", "keep", "use"),
        default="drop",
        help="the one projector of the first training stage: drop it, keep it beside the model in "
        "shared_projector.safetensors, or use it, where SRC is a checkpoint of that stage (default: %(default)s)",
    )
    command.add_argument(
        "--chat-template",
        metavar="NAME",
        help="vicuna, llama_3, chatml, plain, or a .jinja file (default: llama_3 for Llama 3 tokenizers, else vicuna)",
    )
    command.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="store the weights so (default: as SRC does)"
    )
    command.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="largest weight file (default: %(default)s)"
    )
    command.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    command.add_argument(
        "--push-to-hub",
        metavar="REPO",
        help="upload the result to this repository, user/name, which is made if need be",
    )
    command.add_argument(
        "--private", action="store_true", default=None, help="with --push-to-hub: make a new repository private"
    )
    command.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        help="show bytes and the time left on stderr (default: where it is a terminal)",
    )
    command.set_defaults(run=_convert, parser=command)

    _add_build(commands)
    _add_upgrade(commands)

    command = commands.add_parser(
        "chat",
        help="talk with a model about pictures",
        description=CHAT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("model", metavar="MODEL", help="folder, or hub id, of a SAISA checkpoint")
    command.add_argument(
        "--image",
        metavar="PATH",
        nargs="+",
        default=[],
        action="extend",
        help="pictures (or addresses) for the first question",
    )
    command.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="compute in this (default: auto, what the checkpoint is stored in)",
    )
    command.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps ... (default: auto, the fastest there is)"
    )
    command.add_argument(
        "--attn-implementation", metavar="NAME", help="eager, sdpa, flex_attention, flash_attention_2 ..."
    )
    command.add_argument(
        "--max-new-tokens", metavar="N", type=_positive, default=512, help="longest answer (default: %(default)s)"
    )
    command.add_argument("--system", metavar="TEXT", help="system message, where the model's chat template has one")
    command.add_argument(
        "--temperature", metavar="T", type=_temperature, help="of sampling; 0: greedy (default: as the checkpoint says)"
    )
    command.set_defaults(run=_chat, parser=command)

    _add_attend(commands)

    command = commands.add_parser(
        "train",
        help="train a model: the paper's two stages, or fine-tuning",
        usage="saisa train CONFIG [options]",
        description=TRAIN_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("config", metavar="CONFIG", help="YAML file of options")
    if "train" in asked_for:
        from .training.options import add_arguments

        add_arguments(command)
    command.set_defaults(run=_train, parser=command)

    _add_flops(commands)
    _add_fit(commands)
    _add_redundancy(commands)

    command = commands.add_parser(
        "bench",
        help="measure speed and memory, beside LLaVA, a Flamingo and the language model alone",
        usage="saisa bench [options]",
        description=BENCH_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    if "bench" in asked_for:
        from .bench.options import add_arguments

        add_arguments(command)
    command.set_defaults(run=_bench, parser=command)

    command = commands.add_parser("data", help="check training data, or write a small data set to try training on")
    actions = command.add_subparsers(title="commands", metavar="COMMAND", required=True)
    action = actions.add_parser(
        "check",
        help="show what the model will see of the data, and what cannot be used",
        description=CHECK_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action.add_argument("config", metavar="CONFIG", help="YAML file of options, as for saisa train")
    action.add_argument(
        "--samples", metavar="N", type=_positive, default=2, help="samples to print (default: %(default)s)"
    )
    action.add_argument("--limit", metavar="N", type=_positive, help="samples to check (default: all)")
    action.set_defaults(run=_data_check, parser=action)
    action = actions.add_parser(
        "digits",
        help="write pictures of digits with captions and questions",
        description=DIGITS_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    action.add_argument("folder", metavar="FOLDER", help="folder to make")
    action.add_argument(
        "--pictures", metavar="N", type=_positive, default=4000, help="training pictures (default: %(default)s)"
    )
    action.add_argument("--seed", metavar="N", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    action.set_defaults(run=_data_digits, parser=action)
    return parser


def _add_build(commands) -> None:
    command = commands.add_parser(
        "build",
        help="build a model from a language model and a vision encoder, or make one of a LLaVA",
        usage="saisa build LANGUAGE_MODEL VISION_MODEL DST [options]\n"
        "       saisa build --from-llava MODEL --images FOLDER DST [options]",
        description=BUILD_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add(
        "paths",
        metavar="LANGUAGE_MODEL VISION_MODEL DST",
        nargs="+",
        help="folders or hub ids of the language model and the vision encoder, and the folder to make; with --from-llava "
        "the latter alone",
    )
    add(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="of the weights (default: the language model's, or the LLaVA's)",
    )
    width = "inner width of the projectors (default: the language model's hidden size, or that of the LLaVA's)"
    add("--projector-hidden-size", metavar="N", type=_positive, help=width)
    add("--seed", metavar="N", type=_count, default=0, help="of what is drawn (default: %(default)s)")
    add("--max-shard-size", metavar="SIZE", default="5GB", help="largest weight file (default: %(default)s)")
    add("--push-to-hub", metavar="REPO", help="upload the result to this repository, user/name, as well")
    add("--private", action="store_true", default=None, help="with --push-to-hub: make a new repository private")
    add("--overwrite", action="store_true", help="replace DST if it exists")

    group = command.add_argument_group("from parts")
    add = group.add_argument
    add("--image-token", metavar="TEXT", help="what stands for a picture (default: the tokenizer's own, else <image>)")
    template = "vicuna, llama_3, chatml, plain, or a .jinja file (default: the tokenizer's own, else plain)"
    add("--chat-template", metavar="NAME", help=template)
    layers = "states of the encoder to use (default: -2)"
    add("--vision-feature-layer", metavar="N", type=int, nargs="+", help=layers)
    strategy = "full: with class token (default: without)"
    add("--vision-feature-select-strategy", choices=("default", "full"), help=strategy)
    sharing = "shared: one projector, for the first stage"
    add("--projector-sharing", choices=("per_layer", "shared"), help=sharing)
    seeing = "decoder layers that see pictures (default: all)"
    add("--visual-layers", metavar="N", type=int, nargs="+", help=seeing)
    _add_reduction(add, "make fewer visual tokens of a picture (default: none of these)")
    add("--pad-to-square", action="store_true", help="pad pictures to squares, as LLaVA-1.5 does")
    parts = [action.dest for action in group._group_actions]

    # the defaults are those of `saisa_hf.checkpoints.from_llava.Fit`
    group = command.add_argument_group("a LLaVA as a starting point")
    add = group.add_argument
    add("--from-llava", metavar="MODEL", help="folder, or hub id, of a LLaVA or LLaVA-NeXT in transformers' layout")
    add("--images", metavar="FOLDER", help="pictures to fit the projectors on; nothing else is needed")
    add("--pictures", metavar="N", type=_positive, default=2000, help="use N of them at most (default: %(default)s)")
    held_out = "keep N of these to measure on (default: %(default)s)"
    add("--held-out", metavar="N", type=_positive, default=64, help=held_out)
    steps = "steps of descent for each layer (default: %(default)s)"
    add("--steps", metavar="N", type=_count, default=500, help=steps)
    distill = "then train the projectors, STEPS steps, on MODEL's own answers to the prompts (default: %(default)s)"
    add("--distill", metavar="STEPS", type=_count, default=0, help=distill)
    prompts = "generic prompts, one a line, to measure and distill with (default: four)"
    add("--prompts", metavar="FILE", help=prompts)
    add(
        "--prompt-format",
        metavar="TEXT",
        help="how MODEL is asked, 'USER: <image>\\n{prompt} ASSISTANT:' for instance (default: its chat template)",
    )
    add(
        "--work-folder",
        metavar="DIR",
        help="keep features, states and finished layers there (default: a folder beside DST, removed at the end)",
    )
    device = "cpu, cuda, cuda:1, mps ... (default: auto, the fastest there is)"
    add("--device", default="auto", help=device)
    llava = [action.dest for action in group._group_actions]
    command.set_defaults(run=_build, parser=command, of_parts=parts, of_llava=llava)


def _add_upgrade(commands) -> None:
    command = commands.add_parser(
        "upgrade",
        help="bring the code of an older checkpoint up to this release",
        description=UPGRADE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("target", metavar="FOLDER_OR_REPO", help="folder, or hub id, of a SAISA checkpoint")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="tell what would change, and change nothing")
    how.add_argument("--push-to-hub", action="store_true", help="change the repository on the hub, in one commit")
    command.set_defaults(run=_upgrade, parser=command)


def _add_reduction(add, meaning: str) -> None:
    add("--visual-token-reduction", choices=REDUCTIONS, help=meaning)
    add("--reduced-visual-tokens", metavar="N", type=_positive, help="how many, for resampler and class_attention")


def _add_attend(commands) -> None:
    command = commands.add_parser(
        "attend",
        help="show where in a picture each word of an answer looks",
        usage="saisa attend MODEL IMAGE [IMAGE ...] QUESTION [options]",
        description=ATTEND_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("model", metavar="MODEL", help="folder, or hub id, of a SAISA checkpoint")
    add("images", metavar="IMAGE", nargs="+", help="pictures, or their addresses; they stand in front of the question")
    add("question", metavar="QUESTION", help="what to ask about them")
    files = "write PATH.png and PATH.html (default: %(default)s)"
    add("--output", metavar="PATH", default="attention", help=files)
    layers = "decoder layers to draw one by one, counted from 0, or all (default: their mean alone)"
    add("--layers", metavar="N", nargs="+", type=_layer, default=[], help=layers)
    add("--json", action="store_true", help="print the weights as JSON: by picture, layer, word, row, column")
    dtypes = "compute in this (default: auto, what the checkpoint is stored in)"
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help=dtypes)
    device = "cpu, cuda, cuda:1, mps ... (default: auto, the fastest there is)"
    add("--device", default="auto", help=device)
    add("--system", metavar="TEXT", help="system message, where the model's chat template has one")
    longest = "longest answer (default: %(default)s)"
    add("--max-new-tokens", metavar="N", type=_positive, default=64, help=longest)
    command.set_defaults(run=_attend, parser=command)


def _add_flops(commands) -> None:
    command = commands.add_parser(
        "flops",
        help="tell FLOPs, parameters and memory, beside LLaVA's and a Flamingo's",
        description=FLOPS_HELP.format(presets=", ".join(LANGUAGE_MODELS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("model", metavar="MODEL", help="preset, folder, or hub id")
    add("--text", metavar="N", type=_positive, default=64, help="text tokens (default: %(default)s)")
    visual = command.add_mutually_exclusive_group()
    visual.add_argument("--visual", metavar="N", type=_count, help="visual tokens (default: those of one picture)")
    visual.add_argument("--images", metavar="N", type=_count, help="pictures, of as many tokens as the encoder yields")
    add("--batch", metavar="N", type=_positive, default=1, help="samples (default: %(default)s)")
    add("--generate", metavar="N", type=_count, default=0, help="tokens to generate (default: %(default)s)")
    bytes_of = "that the bytes are of (default: %(default)s)"
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="bfloat16", help=bytes_of)
    every = "the Flamingo's cross-attention stands in front of each Nth layer (default: %(default)s)"
    add("--cross-every", metavar="N", type=_positive, default=4, help=every)
    trained = (
        "what a training step trains: all but the encoder, the projectors alone, or adapters (default: %(default)s)"
    )
    add("--train", choices=("full", "projectors", "lora"), default="full", help=trained)
    _add_reduction(add, "count MODEL with this reduction of its visual tokens (default: its own)")
    add("--json", action="store_true", help="print all numbers as JSON")
    command.set_defaults(run=_flops, parser=command)


def _add_fit(commands) -> None:
    command = commands.add_parser(
        "fit",
        help="tell which dtype, quantization, context and pictures fit into a memory",
        description=FIT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("model", metavar="MODEL", help="preset, folder, or hub id")
    add("--gpu-memory", metavar="SIZE", required=True, help="8GiB, 24GB ...")
    add("--reserve", metavar="SIZE", default="512MiB", help="what CUDA and others take of it (default: %(default)s)")
    add("--text", metavar="N", type=_positive, default=512, help="text tokens of a prompt (default: %(default)s)")
    add("--images", metavar="N", type=_count, default=1, help="its pictures (default: %(default)s)")
    add("--generate", metavar="N", type=_count, default=256, help="tokens to generate (default: %(default)s)")
    add("--batch", metavar="N", type=_positive, default=1, help="samples (default: %(default)s)")
    add("--json", action="store_true", help="print all numbers, in bytes, as JSON")
    command.set_defaults(run=_fit, parser=command)


def _add_redundancy(commands) -> None:
    command = commands.add_parser(
        "redundancy",
        help="tell which layers of a LLaVA need its visual tokens to attend and to be fed",
        description=REDUNDANCY_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = command.add_argument
    add("model", metavar="MODEL", help="folder, or hub id, of a LLaVA or LLaVA-NeXT in transformers' layout")
    add("--images", metavar="FOLDER", required=True, help="pictures to measure on")
    add("--pictures", metavar="N", type=_positive, default=32, help="use the first N at most (default: %(default)s)")
    add("--prompt", metavar="TEXT", help="what is asked about each (default: a description)")
    stored = "compute in this (default: auto, what the checkpoint is stored in)"
    add("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help=stored)
    device = "cpu, cuda, cuda:1, mps ... (default: auto, the fastest there is)"
    add("--device", default="auto", help=device)
    add("--json", action="store_true", help="print all numbers as JSON")
    add("--plot", metavar="FILE", help="draw them into this file, .png for instance")
    command.set_defaults(run=_redundancy, parser=command)


def _positive(text: str) -> int:
    """An argument of the command line that has to be 1 or more."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number that is not negative, got {text!r}")
    return int(text)


def _layer(text: str) -> int | None:
    return None if text == "all" else _count(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number that is not negative, got {text!r}")
    return value


def _chat(arguments: argparse.Namespace) -> int:
    from .chat.terminal import chat

    return chat(
        arguments.model,
        arguments.image,
        dtype=arguments.dtype,
        device=arguments.device,
        attn_implementation=arguments.attn_implementation,
        system=arguments.system,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
    )


def _attend(arguments: argparse.Namespace) -> int:
    from .inspection.attention_pages import attend_and_draw

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


def _train(arguments: argparse.Namespace) -> int:
    from .training.options import load_options
    from .training.run import train

    given = {name: value for name, value in vars(arguments).items() if name not in ("config", "run", "parser")}
    train(load_options(arguments.config, given))
    return 0


def _fit(arguments: argparse.Namespace) -> int:
    import json

    from .costs.flops import read_config
    from .costs.memory import bytes_of, fit, show

    memory = bytes_of(arguments.gpu_memory) - bytes_of(arguments.reserve)
    text, images = arguments.text, arguments.images
    found = fit(read_config(arguments.model), memory, text, images, arguments.generate, arguments.batch)
    print(json.dumps(found, indent=1) if arguments.json else show(found, memory, text, images))
    return 0


def _redundancy(arguments: argparse.Namespace) -> int:
    from .checkpoints.from_llava import load_llava, picture_files
    from .common.destination import check_file
    from .common.loading import device_named
    from .common.plots import drawing
    from .inspection.redundancy import PROMPT, plot, redundancy, show

    pictures = picture_files(arguments.images)[: arguments.pictures]
    if arguments.plot is not None:  # not to be found out behind hours of work
        check_file(Path(arguments.plot))
        drawing()
    dtype = None if arguments.dtype == "auto" else arguments.dtype
    model, processor = load_llava(arguments.model, dtype, device_named(arguments.device), named="MODEL")

    def log(line: str) -> None:
        print(f"\r{line}", end="", file=sys.stderr, flush=True)

    shown = {"log": log} if sys.stderr.isatty() else {}
    found = redundancy(model, processor, pictures, arguments.prompt or PROMPT, **shown)
    if shown:
        print(file=sys.stderr)
    print(json.dumps(found, indent=1) if arguments.json else show(found))
    if arguments.plot is not None:
        plot(found, arguments.plot)
    return 0


def _flops(arguments: argparse.Namespace) -> int:
    from .costs.flops import Step, account, read_config, show

    config = read_config(arguments.model)
    if arguments.visual_token_reduction is None and arguments.reduced_visual_tokens is not None:
        arguments.parser.error(
            "--reduced-visual-tokens goes with --visual-token-reduction resampler or class_attention"
        )
    if arguments.visual_token_reduction is not None:
        settings = ("visual_token_reduction", "reduced_visual_tokens")
        changes = {name: getattr(arguments, name) for name in settings}
        config = type(config).from_dict(config.to_dict() | changes | {"image_seq_length": None})
    visual = arguments.visual
    if visual is None:
        visual = config.image_seq_length * (1 if arguments.images is None else arguments.images)
    step = Step(arguments.text, visual, batch=arguments.batch)
    options = {"cross_every": arguments.cross_every, "trained": arguments.train}
    itemsize = 4 if arguments.dtype == "float32" else 2
    found = account(config, step, itemsize, arguments.generate, **options)
    text, vision = config.text_config, config.vision_config
    if arguments.json:
        asked = {"model": arguments.model, "text": arguments.text, "visual": visual, "batch": arguments.batch}
        asked |= {"generated": arguments.generate, "dtype": arguments.dtype, **options}
        print(json.dumps(asked | found, indent=1))
        return 0
    print(
        f"{arguments.model}: {text.model_type}, {text.num_hidden_layers} layers, hidden {text.hidden_size}; "
        f"{vision.model_type}, {config.image_seq_length} tokens a picture\n{arguments.text} text and {visual} visual tokens, "
        f"batch {arguments.batch}, {arguments.dtype}\n"
    )
    print(show(found, arguments.generate, own="this model" if config.in_embedding_space else "SAISA", **options))
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    from .bench.run import bench

    given = {name: value for name, value in vars(arguments).items() if name not in ("run", "parser")}
    bench(argparse.Namespace(**given))
    return 0


def _data_check(arguments: argparse.Namespace) -> int:
    from .training.options import load_options
    from .training.run import check

    checked, bad = check(load_options(arguments.config), arguments.samples, arguments.limit or 0)
    return _fail(f"{bad} of {checked} samples cannot be used", 2) if bad else 0


def _data_digits(arguments: argparse.Namespace) -> int:
    from .demo.dataset import write_dataset

    write_dataset(arguments.folder, arguments.pictures, seed=arguments.seed)
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from .checkpoints.convert import convert

    convert(
        arguments.source,
        arguments.destination,
        vision_tower=arguments.vision_tower,
        shared_projector=arguments.shared_projector,
        chat_template=arguments.chat_template,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        overwrite=arguments.overwrite,
        push_to_hub=arguments.push_to_hub,
        private=arguments.private,
        progress=arguments.progress,
    )
    return 0


def _build(arguments: argparse.Namespace) -> int:
    parser, from_llava = arguments.parser, arguments.from_llava is not None
    wanted = ["DST"] if from_llava else ["LANGUAGE_MODEL", "VISION_MODEL", "DST"]
    if len(arguments.paths) != len(wanted):
        parser.error(f"expected {' '.join(wanted)}, got {' '.join(arguments.paths)}")
    for name in arguments.of_parts if from_llava else arguments.of_llava:
        if getattr(arguments, name) != parser.get_default(name):
            rule = "does not go with --from-llava" if from_llava else "goes with --from-llava alone"
            parser.error(f"--{name.replace('_', '-')} {rule}")
    shared = ("dtype", "projector_hidden_size", "seed", "max_shard_size", "overwrite", "push_to_hub", "private")
    options = {name: getattr(arguments, name) for name in shared}
    if from_llava:
        return _build_from_llava(arguments, **options)
    from .checkpoints.build import build

    settings = {name: getattr(arguments, name) for name in arguments.of_parts}
    settings = {name: value for name, value in (settings | options).items() if value is not None}
    if len(settings.get("vision_feature_layer", ())) == 1:
        settings["vision_feature_layer"] = settings["vision_feature_layer"][0]
    build(*arguments.paths, **settings)
    return 0


def _build_from_llava(arguments: argparse.Namespace, projector_hidden_size: int | None, seed: int, **options) -> int:
    from .checkpoints.from_llava import PROMPTS, Fit, from_llava, read_prompts
    from .common.loading import device_named

    if arguments.images is None:
        arguments.parser.error("--from-llava needs --images FOLDER, pictures to fit the projectors on")
    text = arguments.prompt_format
    from_llava(
        arguments.from_llava,
        arguments.images,
        *arguments.paths,
        fit=Fit(
            pictures=arguments.pictures,
            held_out=arguments.held_out,
            steps=arguments.steps,
            projector_hidden_size=projector_hidden_size,
            distill_steps=arguments.distill,
            seed=seed,
        ),
        prompts=PROMPTS if arguments.prompts is None else read_prompts(arguments.prompts),
        prompt_format=None if text is None else text.replace("\\n", "\n"),
        work_folder=arguments.work_folder,
        device=device_named(arguments.device),
        **options,
    )
    return 0


def _upgrade(arguments: argparse.Namespace) -> int:
    from .checkpoints.upgrade import upgrade

    changes = upgrade(arguments.target, check=arguments.check, push_to_hub=arguments.push_to_hub)
    return int(changes and arguments.check)
