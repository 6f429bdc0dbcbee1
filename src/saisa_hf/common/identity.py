# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether two runs are the same: what each was asked for, written beside its result, with digests of what it reads."""

import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any


PARTIAL = ".partial"  # what is not complete yet, or not any more, has a name that begins so
OF_A_RUN = ("training_run.json", "trainer_state.json")  # files beside weights that do not describe them
WEIGHTS_AND_SETTINGS = {".json", ".safetensors", ".bin", ".model", ".jinja", ".txt"}
BLOCK, MEGABYTE = 4096, 2**20


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two requests, in words. What one of them does not know is not compared."""
    found = []
    if not _same(old["model"], new["model"]):
        found.append(_change("model", [old["model"]], [new["model"]]))
    if len(old["data"]) != len(new["data"]) or not all(map(_same, old["data"], new["data"])):
        found.append(_change("data", old["data"], new["data"]))
    before, now = old["settings"], new["settings"]
    for key in [key for key in ("epochs", "max_steps") if (key in before) != (key in now)]:
        before, now = {key: "not given", **before}, {key: "not given", **now}
    found += [f"{key} was {before[key]!r}, is {now[key]!r}" for key in before if key in now and before[key] != now[key]]
    return found


def _same(one: dict[str, str], other: dict[str, str]) -> bool:
    key = "contents" if one["contents"] and other["contents"] else "path"
    return one[key] == other[key]


def _change(name: str, old: list[dict[str, str]], new: list[dict[str, str]]) -> str:
    before, now = (", ".join(repr(part["path"]) for part in parts) for parts in (old, new))
    return f"the contents of {name} {now} have changed" if before == now else f"{name} was {before}, is {now}"


def of_model(path: str) -> dict[str, str]:
    """What is known of a model, a folder or a repository of the hub: its path, and a digest of its contents or its commit."""
    return {"path": path, "contents": of_folder(path, weights=True) if os.path.isdir(path) else of_commit(path)}


def of_data(path: str) -> dict[str, str]:
    """What is known of a file or folder that is read: its path, and a digest of its contents, empty if it is neither."""
    contents = of_folder(path) if os.path.isdir(path) else of_file(path) if os.path.isfile(path) else ""
    return {"path": path, "contents": contents}


def of_template(name: str) -> str:
    """What a chat template is known by: its name, or the digest of the file that is named."""
    return f"contents {of_file(name)}" if os.path.isfile(name) else name


def of_folder(folder: str, weights: bool = False) -> str:
    """A digest of a folder: of the names and sizes of all files in it, and of the contents of those that describe them; with
    `weights`, of the contents of weights and settings, those of a run left out."""
    digest = hashlib.sha256()
    for root, folders, names in os.walk(folder):
        folders.sort()
        if weights:
            folders.clear()
        for name in sorted(names):
            path = os.path.join(root, name)
            if not os.path.isfile(path) or (weights and Path(name).suffix not in WEIGHTS_AND_SETTINGS):
                continue
            if weights and name in OF_A_RUN:
                continue
            read = weights or name.startswith("metadata.")
            about = [os.path.relpath(path, folder), os.path.getsize(path), of_file(path) if read else ""]
            digest.update(json.dumps(about).encode())
    return digest.hexdigest()[:32]


def of_file(path: str) -> str:
    """A digest of a file's contents; of large files but JSON and CSV, of its size and the beginning of each megabyte."""
    about = os.stat(path)
    whole = about.st_size <= 64 * MEGABYTE or path.endswith((".json", ".jsonl", ".csv"))
    return _digest_of(os.path.realpath(path), about.st_size, about.st_mtime_ns, whole)


@functools.lru_cache(maxsize=4096)
def _digest_of(path: str, size: int, changed: int, whole: bool) -> str:
    digest = hashlib.sha256(str(size).encode())
    with open(path, "rb") as file:
        for start in range(0, size, MEGABYTE):
            file.seek(start)
            digest.update(file.read(MEGABYTE if whole else BLOCK))
    return digest.hexdigest()[:32]


def of_commit(repository: str) -> str:
    """The commit of a repository of the hub that is in the cache, or empty."""
    from huggingface_hub.constants import HF_HUB_CACHE

    reference = Path(HF_HUB_CACHE, "models--" + repository.replace("/", "--"), "refs", "main")
    return reference.read_text(encoding="utf-8").strip() if reference.is_file() else ""


def read_record(path: Path) -> dict[str, Any] | None:
    """What `write_record` wrote; None if there is no such file.

    Raises:
        ValueError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        parts = [found["model"], *found["data"]]
        complete = isinstance(found["settings"], dict)
        complete = complete and all(isinstance(part[key], str) for part in parts for key in ("path", "contents"))
    except (ValueError, LookupError, TypeError, RecursionError):
        complete = False
    if not complete:
        raise ValueError(f"{path} is damaged, so that it is not known what the run in this folder was asked for.")
    return found


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a request, `model` and `data` as here and `settings`, with whatever else is known, in one step."""
    partial = path.parent / f"{PARTIAL}-{path.name}"
    partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
