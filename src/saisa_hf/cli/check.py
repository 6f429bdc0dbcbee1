# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa check`: whether a checkpoint is sound."""

import argparse
import json
import os

from ..common.sources import check_local
from .options import Commands, add_command


HELP = """\
Reads all of a checkpoint and says what is wrong with it, a line for each finding:

  saisa check ./saisa-vicuna

That is: the configuration; the weights, their files and index, each tensor's name, shape and dtype, and NaN or infinite
numbers in them; stop tokens; the processor, its image token and chat template; the code files; visual states, if there
are any. A finding is ok, a note, or a problem. Nothing in the folder is run or changed. The exit status is 1 if there
are problems, else 0.
"""


def add_to(commands: Commands) -> None:
    summary = "read all of a checkpoint, and say what is wrong with it"
    command = add_command(commands, "check", run, summary=summary, description=HELP)
    command.add_argument("folder", metavar="FOLDER", help="folder of a SAISA checkpoint")
    command.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace) -> int:
    if not os.path.isfile(arguments.folder):
        check_local("FOLDER", arguments.folder)  # before torch is imported
    from ..checkpoints.check import as_json, check, problems
    from ..common.loading import quiet_transformers

    with quiet_transformers(progress=False):
        found = check(arguments.folder, **({"log": lambda line: None} if arguments.json else {}))
    if arguments.json:
        print(json.dumps(as_json(found), indent=1))
    return int(problems(found) > 0)
