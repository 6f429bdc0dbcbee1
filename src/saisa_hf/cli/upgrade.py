# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa upgrade`: the code of this release for a checkpoint that an older one saved."""

import argparse

from .options import Commands, add_command


HELP = """\
Updates a checkpoint that an older release saved: the code files beside config.json, auto_map, and the package's own text in
the model card. Weights and settings stay as they are, byte for byte:

  saisa upgrade ./saisa-vicuna --check
  saisa upgrade ./saisa-vicuna
  saisa upgrade me/saisa-vicuna --push-to-hub

A folder can be loaded at every moment, and the next run completes an interrupted one. From a repository only the small files
are downloaded, and the changes are one commit. With --check the exit status is 1 if something would change, else 0.
"""


def add_to(commands: Commands) -> None:
    summary = "update the code of an older checkpoint to this release"
    command = add_command(commands, "upgrade", run, summary=summary, description=HELP)
    command.add_argument("target", metavar="FOLDER_OR_REPO", help="folder, or hub id, of a SAISA checkpoint")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--check", action="store_true", help="report what would change, and change nothing")
    how.add_argument("--push-to-hub", action="store_true", help="change the repository on the hub, in one commit")


def run(arguments: argparse.Namespace) -> int:
    from ..checkpoints.upgrade import upgrade

    changes = upgrade(arguments.target, check=arguments.check, push_to_hub=arguments.push_to_hub)
    return int(changes and arguments.check)
