# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The folder or file that a command makes: written under a hidden name beside its place, put there in one step, and uploaded
if asked for.

A command that dies at any moment leaves the destination as it was.
"""

import contextlib
import ctypes
import errno
import glob
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from ..saving_saisa import hidden_folder, locked, sweep
from .sources import first_line


class Destination:
    """The folder that a command makes. Everything that could stop it from being made is checked at once.

    Args:
        path: the folder. An existing one must be empty, or `overwrite` must be True.
        overwrite: whether it replaces what is there.
        push_to_hub: a repository, "user/name", to upload it to as well; made if needed.
        private: whether that repository is private, if it is made; None leaves that to the hub.
        log: called with one line of text per step.

    Raises:
        OSError: the folder is not empty, is a file, or the hub does not accept the login.
        ValueError: `push_to_hub` is not a valid name.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        overwrite: bool = False,
        push_to_hub: str | None = None,
        private: bool | None = None,
        log: Callable[[str], None] = print,
    ):
        self.path = Path(path).expanduser().resolve()
        self.overwrite, self.push_to_hub, self.private, self.log = overwrite, push_to_hub, private, log
        _restore(self.path, log)
        self._check()
        if push_to_hub is not None:
            check_hub(push_to_hub)

    @property
    def repo_id(self) -> str:
        """What a model card calls it: the repository, or the folder's name."""
        return self.push_to_hub or self.path.name

    def _check(self) -> None:
        if self.path.exists() and not self.path.is_dir():
            raise FileExistsError(f"DST {self.path} is a file, expected a folder to make.")
        if self.path.is_dir() and any(self.path.iterdir()) and not self.overwrite:
            raise FileExistsError(f"DST {self.path} exists and is not empty. Choose another, or pass --overwrite.")

    def check_outside(self, part: Path, role: str = "") -> None:
        """Raises ValueError if `part`, a folder that the command reads, would be replaced: it is the destination or in it."""
        if self.path == part.resolve() or self.path in part.resolve().parents:
            raise ValueError(f"DST {self.path} contains {role}{part}: choose another DST.")

    def check_space(self, size: int) -> None:
        """Raises OSError if the disk has no room for `size` bytes of weights."""
        needed = size + 20_000_000  # tokenizer, configuration, code
        free = shutil.disk_usage(self.path.parent).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"{self.path.parent}: the result takes {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB of the disk are free.",
            )

    @contextlib.contextmanager
    def new_folder(self) -> Iterator[Path]:
        """A hidden folder beside the destination to write into. It takes the destination's place in one step when the block
        ends, and is removed if the block fails."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        sweep(self.path.parent, f".{self.path.name}.", ".partial", self.log)
        with hidden_folder(self.path.parent, f".{self.path.name}.", ".partial") as partial:
            content = partial / self.path.name  # the lock on `partial` is not one on what is written
            content.mkdir()
            yield content
            self._check()  # hours may have passed
            _put_in_place(content, self.path)

    def publish(self) -> None:
        """Says where the result is, and uploads it if that was asked for."""
        self.log(f"wrote {self.path}")
        if self.push_to_hub is not None:
            _upload(self.path, self.push_to_hub, self.private, self.log)


def size_in_bytes(size: int | str) -> int:
    """A number of bytes, or one with a unit like "5GB" (10^9 bytes each), as a number.

    Raises:
        ValueError: it is neither, or 0.
    """
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)\s*([KMGT]?)B?", str(size).strip().upper())
    found = int(float(match[1]) * 1000 ** " KMGT".index(match[2] or " ")) if match else 0
    if not found:
        raise ValueError(f"max_shard_size={size!r:.80}: expected a number of bytes, or one with a unit like '5GB'.")
    return found


def check_file(path: Path) -> None:
    """Raises OSError if the file `path` cannot be written: before the work is done, not after it."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: expected a file to write.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent} is not a folder: make it first, or choose another.")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(f"{path} cannot be written: {error.strerror}.") from error


def write_file(path: Path, content: bytes) -> None:
    """Writes the file `path` under another name and puts it in place in one step."""
    handle, partial = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


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
        with hidden_folder(destination.parent, f".{destination.name}.", ".old") as aside:
            os.rename(destination, aside / destination.name)
            try:
                os.rename(finished, destination)
            except BaseException:
                os.rename(aside / destination.name, destination)
                raise


def _restore(destination: Path, log: Callable[[str], None]) -> None:
    """Puts `destination` back where a run that was killed in `_put_in_place` had moved it aside and not come further."""
    for aside in destination.parent.glob(f".{glob.escape(destination.name)}.????????.old"):
        with locked(aside) as held:
            if held is False or not aside.is_dir() or {path.name for path in aside.iterdir()} - {destination.name}:
                continue  # a run is at it now, or it is somebody else's
            if not destination.exists() and (aside / destination.name).exists():
                log(f"putting {destination} back, which an interrupted run had moved aside")
                os.rename(aside / destination.name, destination)
            shutil.rmtree(aside, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two paths in one step; False if the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    here, exchange = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
    return renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0


def check_hub(repo_id: str) -> None:
    """Raises OSError if the hub does not accept the login: now, not after hours of work."""
    validate_repo_id(repo_id)
    try:
        HfApi().whoami()
    except Exception as error:  # what the HTTP library of the installed huggingface_hub raises
        raise OSError(
            f"--push-to-hub {repo_id}: the hub does not accept the login: {first_line(error)} Log in with `hf auth login`, "
            "or set HF_TOKEN."
        ) from error


def _upload(folder: Path, repo_id: str, private: bool | None, log: Callable[[str], None]) -> None:
    """Uploads `folder` in one commit. Weight files that were there before are deleted; a model card that was there stays."""
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
        raise OSError(
            f"{folder} is complete, but was not uploaded to {repo_id}: {first_line(error)} Upload it with "
            f"`hf upload {repo_id} {folder}`."
        ) from error
    log(f"uploaded it to {commit.commit_url}")
