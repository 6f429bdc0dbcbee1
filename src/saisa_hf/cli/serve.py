# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa serve`: a checkpoint behind HTTP."""

import argparse

from ..common.arguments import not_negative, positive
from .options import Commands, add_command, add_placement


HELP = """\
Answers requests in OpenAI's format (chat completions and responses, streamed or not) about texts and images:

  saisa serve ./saisa-vicuna
  saisa serve ./saisa-vicuna --host 0.0.0.0 --port 80 --max-image-pixels 5000000
  saisa serve ./saisa-vicuna --backend vllm -- --tensor-parallel-size 2

It is vLLM's server where vLLM is installed, else transformers' server, with the same limits: images come as data: URIs or
from public addresses, are read beside other requests, and a request that cannot be answered gets status 400 and a reason.
Limits of images can be set in the environment as well.
"""


def add_to(commands: Commands) -> None:
    summary = "answer HTTP requests in OpenAI's format"
    command = add_command(commands, "serve", run, summary=summary, description=HELP)
    command.set_defaults(further=())
    add = command.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="folder, or hub id, of a SAISA checkpoint")
    backend = "what runs the model (default: auto, vLLM if it is installed); options behind -- are for vllm serve"
    add("--backend", choices=("auto", "vllm", "transformers"), default="auto", help=backend)
    add("--host", metavar="ADDRESS", default="127.0.0.1", help="listen here (default: %(default)s, this machine alone)")
    add("--port", metavar="N", type=port, default=8000, help="(default: %(default)s)")
    add_placement(command)
    add("--attn-implementation", metavar="NAME", help="eager, sdpa, flex_attention, flash_attention_2 ...")
    limits = command.add_argument_group("limits")
    add = limits.add_argument
    add("--url-timeout", metavar="SECONDS", type=not_negative, help="for an image's address (default: 10)")
    add("--max-image-bytes", metavar="N", type=positive, help="of an encoded image (default: 20971520)")
    add("--max-image-pixels", metavar="N", type=positive, help="of a decoded image (default: 20000000)")
    add("--max-images", metavar="N", type=positive, default=16, help="of a request (default: %(default)s)")
    body = "of a request's body, and of the images at its addresses (default: %(default)s)"
    add("--max-request-bytes", metavar="N", type=positive, default=32 * 2**20, help=body)
    requests = "at work or waiting; further ones get status 503 (default: %(default)s)"
    add("--max-requests", metavar="N", type=positive, default=64, help=requests)
    private = "let addresses lead to this machine and into private networks"
    add("--allow-private-urls", action="store_true", default=None, help=private)
    add("--allow-local-files", action="store_true", default=None, help="let requests name files of this machine")


def behind_dashes(argv: list[str]) -> tuple[list[str], list[str]]:
    """A command line of this command in two: what is for it, and what stands behind `--`, for vLLM. Others stay whole."""
    if argv[:1] != ["serve"] or "--" not in argv:
        return argv, []
    where = argv.index("--")
    return argv[:where], argv[where + 1 :]


def port(text: str) -> int:
    """A port's number, as argparse reads it."""
    if not (text.isdecimal() and 0 < int(text[:9]) < 2**16):
        raise argparse.ArgumentTypeError(f"expected a port from 1 to 65535, got {text!r:.80}")
    return int(text)


def run(arguments: argparse.Namespace) -> int:
    from ..serving.run import DEFAULTS, ServeOptions, serve
    from .options import given

    options = given(arguments)
    options["further"] = tuple(options["further"])
    limits = {name: options.pop(name) for name in DEFAULTS}
    serve(backend=options.pop("backend"), options=ServeOptions(**options), **limits)
    return 0
