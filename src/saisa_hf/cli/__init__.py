# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The console script `saisa`: what can be done without writing Python.

Each command has a file here, which declares its options (`add_to`) and runs it (`run`). What takes long to import, torch and
transformers above all, is imported by `run`, so that `--help` answers at once.
"""

import argparse
import os
import sys

from .. import __version__
from ..common.sources import check_local
from . import (
    ask,
    attend,
    bench,
    build,
    chat,
    check,
    compress,
    convert,
    data,
    demo,
    eval,
    fit,
    flops,
    redundancy,
    serve,
    train,
    upgrade,
)


COMMANDS = (
    *(demo, convert, build, compress, upgrade, check, chat, ask, eval, attend),
    *(train, flops, fit, redundancy, bench, serve, data),
)

# arguments that name the model a command reads, by what its help calls them; and all that name what it reads
MODELS = {"model": "MODEL", "source": "SRC", "checkpoint": "CHECKPOINT", "target": "FOLDER_OR_REPO"}
READ = ("model", "checkpoint", "input", "source", "target", "folder", "paths", "from_llava", "vision_tower", "config")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (None: that of the process) and returns the exit status.

    0: done. 1: a file, folder, repository or optional package is missing or cannot be used. 2: the command line or
    something in the input is not as expected. 3: what nobody foresaw. 4: done, but for rows of `ask` that have an error.
    Errors are one line on stderr; with SAISA_TRACEBACK=1 in the environment they are raised instead.
    """
    traceback, arguments = os.environ.get("SAISA_TRACEBACK", "") not in ("", "0"), argparse.Namespace()
    try:
        argv, further = serve.behind_dashes(sys.argv[1:] if argv is None else argv)
        arguments, unknown = make_parser().parse_known_args(argv)
        if unknown:
            arguments.refuse(arguments, unknown)
        for name, role in MODELS.items():
            if name in arguments:  # to import torch, only to say that this is not there, would take seconds
                check_local(role, getattr(arguments, name), presets=getattr(arguments, "presets", ()))
        if further:
            arguments.further = further
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output is gone, as with `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if traceback:
            raise
        missing = isinstance(error, (OSError, ImportError))
        if missing or isinstance(error, ValueError):
            return _fail(error, 1 if missing else 2)
        read = [str(value) for name, value in vars(arguments).items() if name in READ and value is not None]
        said = f"{type(error).__name__}: {error} (with {', '.join(read) or 'no model'}; SAISA_TRACEBACK=1 tells where)"
        return _fail(said, 3)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line."""
    parser = argparse.ArgumentParser(prog="saisa", description="SAISA vision-language models for transformers.")
    parser.add_argument("--version", action="version", version=f"saisa-hf {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_to(commands)
    return parser


def _fail(error: object, status: int) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    print(f"saisa: error: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
    return status
