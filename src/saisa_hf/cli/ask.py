# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa ask`: answers about many images, from a folder or a table into a table."""

import argparse
import json
from typing import Any

from ..common.arguments import not_negative, positive, seed
from .options import Commands, add_answerer, add_answering, add_command, add_model, given


HELP = """\
Asks a model about many images, and writes a table with the answers:

  saisa ask ./saisa-vicuna photos --prompt "Describe the image." --output captions.jsonl
  saisa ask ./saisa-vicuna 'scans/*.png' --prompt "What is the total?" --output totals.csv
  saisa ask ./saisa-vicuna questions.parquet --output answers.parquet

INPUT is a folder, a pattern, or a table (.jsonl, .json, .csv, .parquet) with a column of images and one of prompts: paths,
base64, bytes, the Image feature of datasets, or lists of these. The table of answers has the other columns of INPUT too, in
its order. A row that cannot be asked gets an error in place of an answer. After an interruption, the same command goes on
from where it was.
`accelerate launch -m saisa_hf ask ...` shares the rows out among several GPUs.

The exit status is 0 if all rows were answered, 4 if some have an error, 1 or 2 if there is no result.
"""
SOME_FAILED = 4


def add_to(commands: Commands) -> None:
    summary = "answer questions about many images, from a folder or a table into a table"
    command = add_command(
        commands,
        "ask",
        run,
        summary=summary,
        description=HELP,
        usage="saisa ask MODEL INPUT --output FILE [--prompt TEXT] [options]",
    )
    add_model(command)
    add = command.add_argument
    add("input", metavar="INPUT", help="folder, pattern or table of images")
    add("--output", metavar="FILE", required=True, help="table to write: .jsonl, .csv or .parquet")
    add("--prompt", metavar="TEXT", help="what to ask about every image (default: the row's own prompt)")
    add("--overwrite", action="store_true", help="replace FILE if it exists, and what another run has begun of it")
    add("--strict", action="store_true", help="stop at the first row that cannot be asked")
    _add_table(command.add_argument_group("tables"))
    add_answering(command, longest=512)
    add("--temperature", metavar="T", type=not_negative, default=0.0, help="of sampling (default: 0, greedy)")
    add("--top-p", metavar="P", type=_probability, default=1.0, help="of sampling (default: 1)")
    add("--seed", metavar="N", type=seed, default=0, help="of sampling (default: %(default)s)")
    add_answerer(command)
    backend = "what runs the model (default: auto, vLLM if it is installed)"
    add("--backend", choices=("auto", "transformers", "vllm"), default="auto", help=backend)
    options = "arguments of vllm.LLM, for instance '{\"tensor_parallel_size\": 2}'"
    add("--vllm-options", metavar="JSON", type=_mapping, default={}, help=options)
    most = "images of a row, for vLLM (default: 1, or 16 if rows have lists of images)"
    add("--max-images", metavar="N", type=positive, help=most)


def _add_table(group: Any) -> None:
    add = group.add_argument
    add("--image-column", metavar="NAME", default="image", help="(default: %(default)s)")
    add("--video-column", metavar="NAME", help="of videos, in place of images or behind them (default: none)")
    add("--prompt-column", metavar="NAME", help="(default: prompt)")
    add("--answer-column", metavar="NAME", default="answer", help="of the result (default: %(default)s)")
    add("--error-column", metavar="NAME", default="error", help="of the result (default: %(default)s)")
    add("--images", metavar="FOLDER", default="", help="what paths are relative to (default: the table's folder)")
    addresses = "read images at http(s) addresses, within the limits of SAISA_IMAGE_... in the environment"
    add("--allow-urls", action="store_true", help=addresses)


def _mapping(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"expected a mapping in JSON, got {text!r:.80}")
    return found


def _probability(text: str) -> float:
    value = not_negative(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, up to 1, got {text!r:.40}")
    return value


def run(arguments: argparse.Namespace) -> int:
    if arguments.prompt is not None and arguments.prompt_column is not None:
        arguments.parser.error("--prompt asks the same of all: leave out --prompt-column")
    from ..evaluation.ask.questions import Columns
    from ..evaluation.ask.run import Asking, ask

    options = given(arguments)
    names = {name: options.pop(f"{name}_column") for name in ("image", "video", "prompt", "answer", "error")}
    columns = Columns(**{name: value for name, value in names.items() if value is not None})
    source, output, overwrite = options.pop("input"), options.pop("output"), options.pop("overwrite")
    model = options.pop("model")
    _, failed = ask(model, source, output, Asking(columns=columns, **options), overwrite=overwrite)
    return SOME_FAILED if failed else 0
