# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a command reads, given by name: a folder or a file, or a repository on the hub."""

import contextlib
import json
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path


# endings of what people name by mistake or on purpose, and repositories do not end in
_ENDINGS = (
    ".json .jsonl .parquet .csv .arrow .txt .yaml .yml .jinja .safetensors .bin .pt .pth .gguf .zip .tar .gz .png .jpg"
)
FILE_ENDINGS = tuple(_ENDINGS.split())

# of a checkpoint: each holds an object
_SETTINGS = ("config", "generation_config", "processor_config", "preprocessor_config", "tokenizer_config", "tokenizer")


def check_local(name: str, value: str | os.PathLike, files: bool = False, presets: Collection[str] = ()) -> Path | None:
    """The folder, or file, that `value` means; None if it is the id of a repository on the hub: 'name' or 'user/name'.

    What exists, or looks like a path, is never looked up on the hub: that would take minutes without a network, and end in an
    error about the hub. A path begins with '.', '/' or '~', has the ending of a file, a backslash or more than one '/', or
    its first folder is here and no repository of that name in the hub's cache.

    Args:
        name: what error messages call it: "MODEL", "data" ...
        files: whether it may be a file.
        presets: names that mean something else than a folder or a repository, for the message.

    Raises:
        FileNotFoundError: it looks like a path, and is not there, or is a file where that is not expected.
    """
    text = os.fspath(value)
    path = Path(os.path.expanduser(text) or os.devnull)  # an empty path would be this folder
    if os.path.isdir(path) or (files and os.path.isfile(path)):
        return path
    wanted = "a file, a folder" if files else "a folder"
    if text and os.path.exists(path):
        kind = "neither a file nor a folder" if files else "a file"
        raise FileNotFoundError(f"{name} {text!r} is {kind}: expected {wanted}, or a hub id ('user/name').")
    first, _, rest = text.partition("/")
    not_here = "is not a folder" if not files else "is neither a file nor a folder"
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", text) or text.lower().endswith(FILE_ENDINGS):
        preset = f", and is no preset ({', '.join(presets)})" if presets else ""
        raise FileNotFoundError(f"{name} {text!r} {not_here}, nor does it look like a hub id ('user/name'){preset}.")
    if rest and os.path.isdir(first) and not _is_cached(text):
        raise FileNotFoundError(
            f"{name} {text!r} {not_here}: the folder {first!r} is here, and has no {rest!r}. To name a repository of the "
            f"hub, run this where there is no folder {first!r}."
        )
    return None


def _is_cached(repo_id: str) -> bool:
    """Whether something of that repository has been downloaded: then a folder of its owner's name is a coincidence."""
    from huggingface_hub import constants

    folders = (Path(constants.HF_HUB_CACHE, f"{kind}--{repo_id.replace('/', '--')}") for kind in ("models", "datasets"))
    return any(folder.is_dir() for folder in folders)


def local_folder(source: str | os.PathLike, role: str) -> Path | None:
    """The folder that `source` means, or None if it is the id of a repository on the hub: see `check_local`."""
    return check_local(role, source)


def first_line(error: BaseException) -> str:
    """What an error of another library says, without its explanations; its type if it says nothing."""
    first, *others = str(error).strip().split("\n")
    if first.rstrip().endswith(":") and others:
        first = f"{first.rstrip()} {others[0].strip()}"
    return first[:500] or type(error).__name__


def read_json(file: Path) -> dict:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or not an object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # deep nesting
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected an object.")
    return content


@contextlib.contextmanager
def reading(source: str | os.PathLike, what: str = "") -> Iterator[None]:
    """Inside, whatever other libraries raise for what `source` holds becomes an error that names it, and `what` of it was to
    be read: an OSError remains one, everything else is a ValueError. Of a folder, it names the JSON file that holds no
    object, if there is one."""
    try:
        yield
    except (MemoryError, ImportError):  # not for want of something in it
        raise
    except Exception as error:
        for file in (Path(source, f"{name}.json") for name in _SETTINGS):
            if file.is_file():
                read_json(file)
        if isinstance(error, (OSError, ValueError)) and str(source) in str(error):
            raise
        said = first_line(error) if str(error) and not isinstance(error, KeyError) else repr(error)
        raise (OSError if isinstance(error, OSError) else ValueError)(
            f"{what + ' of ' if what else ''}{source}: {said}"
        ) from error
