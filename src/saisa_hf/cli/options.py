# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What several commands share: how a command is added, and the options that they have in common."""

import argparse
import re
from collections.abc import Callable
from typing import Any, TypeAlias

from ..common.arguments import count, positive
from ..costs.presets import MEMBERS


Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
Options: TypeAlias = argparse._ActionsContainer  # a parser, or a group of its options

DTYPES = ("float32", "float16", "bfloat16")
REDUCTIONS = ("avg_pool", "pixel_unshuffle", "resampler", "class_attention")  # as in `vision_saisa`


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    *,
    summary: str,
    description: str,
    **options: Any,
) -> argparse.ArgumentParser:
    """Adds the command `name`, which `run` runs; it gets the parsed arguments, with the command's parser as `parser`.

    Args:
        summary: its line in `saisa --help`.
        description: what its own `--help` says before the options, printed as it is.
        options: of `argparse.ArgumentParser`.
    """
    layout = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(name, help=summary, description=description, formatter_class=layout, **options)
    parser.set_defaults(run=run, refuse=_refuse, parser=parser)
    return parser


def _refuse(arguments: argparse.Namespace, unknown: list[str]) -> None:
    """Ends the program because of arguments that the command does not have."""
    arguments.parser.error(f"unrecognized arguments: {' '.join(unknown)}")


def given(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments themselves, without what `add_command` put beside them."""
    return {
        name: value for name, value in vars(arguments).items() if name not in ("run", "refuse", "parser", "presets")
    }


# --- a model that runs: chat, attend, redundancy ---


def add_model(options: Options) -> None:
    """MODEL, a SAISA."""
    options.add_argument("model", metavar="MODEL", help="folder, or hub id, of a SAISA checkpoint")


def add_placement(options: Options) -> None:
    """--dtype and --device."""
    dtype = "compute in this (default: auto, as the checkpoint is stored)"
    options.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help=dtype)
    add_device(options)


def add_device(options: Options) -> None:
    """--device."""
    device = "cpu, cuda, cuda:1, mps ... (default: auto, the fastest available)"
    options.add_argument("--device", default="auto", help=device)


def add_answering(options: Options, longest: int) -> None:
    """--system and --max-new-tokens."""
    add = options.add_argument
    tokens = "longest answer (default: %(default)s)"
    add("--max-new-tokens", metavar="N", type=positive, default=longest, help=tokens)
    add("--system", metavar="TEXT", help="system message, if the model's chat template has one")


# --- a new checkpoint: convert, build ---


def add_result(options: Options, stored: str) -> None:
    """How the result is stored, and where else it goes. `stored` is the default of --dtype, in words."""
    add = options.add_argument
    add("--dtype", choices=DTYPES, help=f"store the weights like this (default: {stored})")
    add("--max-shard-size", metavar="SIZE", default="5GB", help="largest weight file (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace DST if it exists")
    repository = "also upload the result to this repository, user/name, which is created if necessary"
    add("--push-to-hub", metavar="REPO", help=repository)
    private = "with --push-to-hub: make a new repository private"
    add("--private", action="store_true", default=None, help=private)


def result(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the options of `add_result` say, as arguments of the functions that write a checkpoint."""
    names = ("dtype", "max_shard_size", "overwrite", "push_to_hub", "private")
    return {name: getattr(arguments, name) for name in names}


def add_fit(options: Options) -> None:
    """How projectors are fitted, beside `--images` and `--seed`; the defaults are those of
    `saisa_hf.checkpoints.from_llava.Fit`."""
    add = options.add_argument
    number = "use at most N of the images (default: %(default)s)"
    add("--pictures", metavar="N", type=positive, default=2000, help=number)
    held_out = "keep N of these to measure on (default: %(default)s)"
    add("--held-out", metavar="N", type=positive, default=64, help=held_out)
    steps = "gradient steps for each layer (default: %(default)s)"
    add("--steps", metavar="N", type=count, default=500, help=steps)
    prompts = "generic prompts, one per line, to measure with (default: four)"
    add("--prompts", metavar="FILE", help=prompts)
    form = "how to ask the model, for instance 'USER: <image>\\n{prompt} ASSISTANT:' (default: its chat template)"
    add("--prompt-format", metavar="TEXT", help=form)
    work = "keep features, states and finished layers there (default: a folder beside DST, removed at the end)"
    add("--work-folder", metavar="DIR", help=work)
    add_device(options)


def fit_of(arguments: argparse.Namespace, **settings: Any) -> dict[str, Any]:
    """What `add_fit` has read, and further `settings` of `Fit`, as arguments of a function."""
    from ..checkpoints.from_llava import PROMPTS, Fit, read_prompts
    from ..common.loading import device_named

    form = arguments.prompt_format
    own = {name: getattr(arguments, name) for name in ("pictures", "held_out", "steps", "seed")}
    return {
        "fit": Fit(**own, **settings),
        "prompts": PROMPTS if arguments.prompts is None else read_prompts(arguments.prompts),
        "prompt_format": None if form is None else form.replace("\\n", "\n"),
        "work_folder": arguments.work_folder,
        "device": device_named(arguments.device),
    }


def add_chat_template(options: Options, default: str) -> None:
    """--chat-template."""
    template = f"vicuna, llama_3, chatml, plain, or a .jinja file (default: {default})"
    options.add_argument("--chat-template", metavar="NAME", help=template)


# --- a model that answers many questions: eval, ask ---


def add_answerer(options: Options) -> None:
    """--chat-template, --batch-size, and where and how the model computes."""
    add = options.add_argument
    add_chat_template(options, "the checkpoint's")
    options.set_defaults(chat_template="")
    add("--batch-size", metavar="N", type=positive, default=16, help="questions at once (default: %(default)s)")
    add_placement(options)
    add("--device-map", metavar="MAP", help="lay the model out over several devices: auto, balanced, sequential")
    add("--attn-implementation", metavar="NAME", help="eager, sdpa, flash_attention_2 ...")


def layers(text: str) -> str | list[int]:
    """Whole numbers between commas or spaces, or a name."""
    parts = re.split(r"\s*,\s*|\s+", text.strip())
    return [count(part) for part in parts] if all(part.isdecimal() for part in parts) else text


# --- sizes: build, flops, fit ---


def add_reduction(options: Options, meaning: str) -> None:
    """--visual-token-reduction, which does what `meaning` says, and its number."""
    options.add_argument("--visual-token-reduction", choices=REDUCTIONS, help=meaning)
    number = "how many, for resampler and class_attention"
    options.add_argument("--reduced-visual-tokens", metavar="N", type=positive, help=number)


def add_member(options: Options) -> None:
    """--member, a name of the family's."""
    meaning = "count MODEL as this member of the family, with the same encoder and language model (docs/family.md)"
    options.add_argument("--member", choices=MEMBERS, help=meaning)


def add_prompt_sizes(options: Options, text: int, generate: int) -> None:
    """--text, --generate and --batch, with these defaults."""
    add = options.add_argument
    add("--text", metavar="N", type=positive, default=text, help="text tokens of a prompt (default: %(default)s)")
    add("--generate", metavar="N", type=count, default=generate, help="tokens to generate (default: %(default)s)")
    add("--batch", metavar="N", type=positive, default=1, help="samples (default: %(default)s)")
