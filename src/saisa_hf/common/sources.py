# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a command reads, given by name: a folder, or a repository on the hub."""

import os
import re
from pathlib import Path


def local_folder(source: str | os.PathLike, role: str) -> Path | None:
    """The folder that `source` means, or None if it is the id of a repository on the hub: 'name' or 'user/name'.

    What exists, or has the form of a path, is never looked up on the hub.

    Args:
        role: what error messages call it, "MODEL" for instance.

    Raises:
        FileNotFoundError: it is neither.
    """
    text = os.fspath(source)
    path = Path(os.path.expanduser(text))
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(f"{role} {text!r} is a file: expected a folder, or a hub id ('user/name').")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", text):
        raise FileNotFoundError(f"{role} {text!r} is not a folder, nor does it look like a hub id ('user/name').")
    return None


def first_line(error: BaseException) -> str:
    """What an error of another library says, without its explanations; its type if it says nothing."""
    return str(error).strip().split("\n")[0] or type(error).__name__
