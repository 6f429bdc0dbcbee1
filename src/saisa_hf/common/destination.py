# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The folder or file that a command makes: written hidden beside its place, put there in one step, and uploaded if asked for.

A command that dies at any moment leaves the destination as it was.
"""

import contextlib
import ctypes
import errno
import fcntl
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id


def size_in_bytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", str(size).strip().upper())
    found = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
    if not found:
        raise ValueError(f"max_shard_size={size!r}: expected a number of bytes, or one with a unit like '5GB'.")
    return found


def check_destination(destination: Path, overwrite: bool) -> None:
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(f"DST {destination} is a file, expected a folder to make.")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise FileExistsError(f"DST {destination} exists and is not empty. Choose another, or pass --overwrite.")


def check_file(path: Path) -> None:
    """Raises OSError if the file `path` cannot be written, before the work that it is for is done."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: expected a file to write.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is no folder: make it first, or choose another.")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}.") from error


def write_file(path: Path, content: bytes) -> None:
    """Writes the file `path` beside its place and puts it there in one step."""
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def check_outside(destination: Path, part: Path, role: str = "") -> None:
    """Raises ValueError if `part`, a folder that a command reads, is `destination` or lies in it and would be replaced."""
    if destination == part.resolve() or destination in part.resolve().parents:
        raise ValueError(f"DST {destination} contains {role}{part}: choose another DST.")


def check_space(parent: Path, size: int) -> None:
    needed = size + 20_000_000  # tokenizer, configuration, code
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"{parent}: the result takes {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB of the disk are free.",
        )


@contextlib.contextmanager
def new_folder(destination: Path, overwrite: bool, log: Callable[[str], None]) -> Iterator[Path]:
    """A hidden folder beside `destination` to write into. It takes its place in one step when the block ends, and is removed
    when the block fails."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    with _partial_folder(destination, log) as partial:
        yield partial
        check_destination(destination, overwrite)  # hours may have passed
        _put_in_place(partial, destination)


@contextlib.contextmanager
def _partial_folder(destination: Path, log: Callable[[str], None]) -> Iterator[Path]:
    """A hidden folder beside `destination`, removed in the end. It is locked while its process lives: those that nobody
    holds were left by conversions that died, and are removed first."""
    for left in destination.parent.glob(f".{glob.escape(destination.name)}.*.partial"):
        with _locked(left) as held:
            if held:
                log(f"removing {left}, which an interrupted run left")
                shutil.rmtree(left, ignore_errors=True)
    while True:
        partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=destination.parent))
        with _locked(partial) as held:
            if held is False or not partial.exists():
                continue  # another conversion to the same place took it for a left-over before it was locked
            try:
                partial.chmod(0o755)
                yield partial
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            return


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool | None]:
    """Whether this process holds the folder now: False where another one does, None where it cannot be told."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        yield None
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            held = False
        except OSError:  # some network file systems have no locks
            held = None
        yield held
    finally:
        os.close(handle)


def _put_in_place(finished: Path, destination: Path) -> None:
    """Makes `finished` the folder `destination`, in one step; what was there takes its place."""
    for path in [*finished.rglob("*"), finished]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    if not destination.exists():
        os.rename(finished, destination)
    elif not _exchange(finished, destination):
        aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".old", dir=destination.parent))
        os.rename(destination, aside / destination.name)
        try:
            os.rename(finished, destination)
        except BaseException:
            os.rename(aside / destination.name, destination)
            aside.rmdir()
            raise
        shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two paths in one step; False where the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def check_hub(repo_id: str) -> None:
    """Raises now what would else be raised after hours of work."""
    validate_repo_id(repo_id)
    try:
        HfApi().whoami()
    except Exception as error:  # what the HTTP library of the installed huggingface_hub raises
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"--push-to-hub {repo_id}: the hub does not let us in: {reason} Log in with `hf auth login`, or set HF_TOKEN."
        ) from error


def upload(folder: Path, repo_id: str, private: bool | None, log: Callable[[str], None]) -> None:
    """Uploads `folder` in one commit. Weight files that were there before go; a card that was there stays."""
    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Upload SAISA model",
            ignore_patterns=["README.md"] if api.file_exists(repo_id, "README.md") else None,
            delete_patterns=["*.safetensors", "*.safetensors.index.json", "pytorch_model*"],
        )
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"{folder} is complete, but was not uploaded to {repo_id}: {reason} `hf upload {repo_id} {folder}` does that."
        ) from error
    log(f"uploaded it to {commit.commit_url}")
