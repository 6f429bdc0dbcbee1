# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Saving: the files of one save come into their folder together, or the folder refuses to be loaded.

A save writes into a hidden folder in the one where its files belong. Killed until then, it has changed nothing, and the next
one removes what it left. When all is written, the `ENTRIES`, which loaders read first, are replaced by ones that none accepts
and that name the hidden folder; the other files take their places; the true entries come last. Killed meanwhile, the folder
is refused with what to do about it, and the next save begins by finishing that one.
"""

import contextlib
import filecmp
import glob
import json
import os
import re
import shutil
import tempfile
import time
from pathlib import Path

from .compat_saisa import optional


flock, FLAGS = optional("fcntl", "flock"), optional("fcntl", "LOCK_EX", 0) | optional("fcntl", "LOCK_NB", 0)
# in the order in which they are closed; they are opened in reverse
PROCESSOR_ENTRIES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
ENTRIES = (*PROCESSOR_ENTRIES, "adapter_config.json", "config.json")
HIDDEN, COMPLETE, UNFINISHED = ".saving.", ".complete", "saving_unfinished"
# of an earlier processor, what a later one would read if it has none itself
PROCESSOR_FILES = ("chat_template.jinja", "chat_template.json", "special_tokens_map.json", "added_tokens.json")


@contextlib.contextmanager
def saved_together(folder, keep: bool = True):
    """A hidden folder in `folder`, made if need be, to write into. When the block ends, its files take their places in
    `folder` together; if it fails, or with `keep=False`, none does. Within another such block it is that one's folder.
    Raises ValueError if `folder` is a file, OSError if there is no room for the new files beside the old ones."""
    folder = Path(folder)
    if folder.name.startswith(HIDDEN):
        yield folder
        return
    if folder.is_file():
        raise ValueError(f"save_directory {str(folder)!r} is a file. Expected a folder.")
    folder.mkdir(parents=True, exist_ok=True)
    finish_saving(folder)
    with hidden_folder(folder, HIDDEN) as new:
        try:
            yield new
            for path in _files(new) if keep else ():
                # Windows syncs only what is open for writing, and some file systems of Linux open nothing for writing twice
                with path.open("rb" if os.name == "posix" else "rb+") as file:
                    os.fsync(file.fileno())
        except Exception as error:
            if not re.search("no space left|quota exceeded", str(error), re.I):
                raise
            why = f"{error}. New files need room beside the old ones, which are as they were"
            raise OSError(f"Saving into {folder} failed: {why}.") from error
        if keep and any(new.iterdir()):
            with locked(folder, wait=60):
                _finish(folder)  # what another process, killed since, has begun
                _begin(folder, new)
                _finish(folder)


def finish_saving(folder: Path) -> None:
    """Completes a save into `folder` that was interrupted with all files written; removes what others left."""
    with locked(folder, wait=60):
        _finish(folder)
        sweep(folder, HIDDEN)


def check_finished(folder, entries: tuple[str, ...], subfolder: str | None = None) -> None:
    """Raises ValueError if `folder` has one of `entries` whose saving was interrupted. None and names on the hub pass."""
    for entry in entries if folder is not None else ():
        if journal := _journal(Path(folder, subfolder or "", entry)):
            raise ValueError(journal[UNFINISHED])


def _begin(folder: Path, new: Path) -> None:
    """Announces in `folder` that the files in `new` are to come."""
    names = {path.relative_to(new).as_posix() for path in _files(new)}
    for path in folder.glob("*_saisa.py"):
        if path.name in names and filecmp.cmp(path, new / path.name, shallow=False):
            if path.is_symlink():  # it stays one; a file is replaced, as 4.57 uploads what is newer than before
                (new / path.name).unlink()
        elif path.name in names:  # what names code is not to be loaded while the code changes
            for entry in ENTRIES:
                if (folder / entry).is_file() and entry not in names:
                    shutil.copy(folder / entry, new)
    place = folder.resolve()
    message = f"Saving into {place} has not finished. If no process is doing it, it was interrupted: save again, or "
    message += f"finish it with `saisa upgrade {place}`."
    code: dict = dict.fromkeys(("AutoConfig", "AutoProcessor", "AutoImageProcessor"), f"{UNFINISHED}.Class")
    code["AutoTokenizer"] = [f"{UNFINISHED}.Class"] * 2
    journal = {UNFINISHED: message, "folder": new.name, "files": sorted(names), "auto_map": code}
    journal |= {"model_type": "saisa", "processor_class": "SaisaProcessor", "text_config": {"model_type": message}}
    journal |= dict.fromkeys(("peft_type", "tokenizer_class", "image_processor_type", "size"), message)
    journal["added_tokens_decoder"] = {message: {"content": ""}}  # which tokenizers of any class repeat
    (new / COMPLETE).touch()
    _write(folder / f"{UNFINISHED}.py", f"raise ValueError({message!r})\n", new)
    _write(folder / next(name for name in ENTRIES if (new / name).exists()), json.dumps(journal, indent=2), new)


def _finish(folder: Path) -> None:
    """Does what `_begin` has announced, or what an interrupted call has left of it."""
    for journal in filter(None, [_journal(folder / entry) for entry in ENTRIES]):
        new = folder / os.path.basename(str(journal.get("folder")))
        if new.name.startswith(HIDDEN) and (new / COMPLETE).exists():
            for name in ENTRIES:
                if (new / name).exists() and not _journal(folder / name):
                    _write(folder / name, json.dumps(journal, indent=2), new)
            for name in _stale(folder, set(journal["files"])):
                (folder / name).unlink(missing_ok=True)
            _put_in_place(folder, new)


def _files(new: Path) -> list[Path]:
    return [path for path in new.rglob("*") if path.is_file() and path.name not in (COMPLETE, UNFINISHED)]


def _write(path: Path, text: str, new: Path) -> None:
    (new / UNFINISHED).write_text(text, encoding="utf-8")
    os.replace(new / UNFINISHED, path)


def _put_in_place(folder: Path, new: Path) -> None:
    last = ENTRIES[::-1]
    for path in sorted(_files(new), key=lambda path: last.index(path.name) if path.name in last else -1):
        place = folder / path.relative_to(new)
        place.parent.mkdir(exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # without locks, another process may be finishing it too
            os.replace(path, place)
    (folder / f"{UNFINISHED}.py").unlink(missing_ok=True)
    shutil.rmtree(new, ignore_errors=True)


def _stale(folder: Path, names: set[str]) -> set[str]:
    """What would be read in `folder` in place of, or beside, the files `names` that are saved there: other weight files of
    the same variant, code of this package that it no longer has, parts of an earlier processor."""
    weights = {key for key in map(_weights_key, names) if key & {"safetensors", "bin"}}
    weights |= {key - {"pytorch_model", "bin"} | {"model", "safetensors"} for key in weights if "bin" in key}
    others = {path.name for path in folder.glob("*") if path.is_file()} - names
    stale = {name for name in others if _weights_key(name) in weights}
    if "processor_config.json" in names:
        templates = {path.relative_to(folder).as_posix() for path in folder.glob("additional_chat_templates/*.jinja")}
        stale |= others.intersection(PROCESSOR_FILES) | templates - names
    if "configuration_saisa.py" in names:  # `upgrade_...` are for `saisa upgrade` to remove
        code = [name for name in others if name.endswith("_saisa.py") and not name.startswith("upgrade_")]
        stale |= {name for name in code if b"The saisa_hf authors" in (folder / name).read_bytes()[:80]}
    return stale


def _weights_key(name: str) -> frozenset[str]:
    """The same for the shards and the index of a weight file, and for the file in one piece."""
    return frozenset(re.sub(r"-\d{5}-of-\d{5}|\.index|\.json$", "", name).split("."))


def _journal(entry: Path) -> dict | None:
    """What an entry says that is not to be loaded yet; None of all others."""
    try:
        found = json.loads(entry.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and UNFINISHED in found else None


@contextlib.contextmanager
def hidden_folder(parent: Path, prefix: str, suffix: str = ""):
    """A new folder in `parent`, removed in the end unless it is `COMPLETE`; locked while its process lives, for `sweep`."""
    while True:
        new = Path(tempfile.mkdtemp(suffix, prefix, parent))
        with locked(new) as held:
            if held is False or not new.exists():
                continue  # another process took it for a left-over before it was locked
            try:
                yield new
            finally:
                if not (new / COMPLETE).exists():
                    shutil.rmtree(new, ignore_errors=True)
            return


def sweep(parent: Path, prefix: str, suffix: str = "", log=lambda line: None) -> None:
    """Removes hidden folders whose process died. Where there are no locks to tell, those that a day has not changed."""
    for left in parent.glob(f"{glob.escape(prefix)}*{suffix}"):
        with locked(left) as held, contextlib.suppress(FileNotFoundError):
            if held or (held is None and time.time() - left.stat().st_mtime > 24 * 3600):
                log(f"removing {left}, which an interrupted run left")
                shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path, wait: float = 0):
    """Whether this process holds the folder now: False if another one does, after `wait` seconds too, None if that is
    unknown, as on systems and file systems without locks."""
    held, until = None, time.monotonic() + wait
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)  # not on Windows
            stack.callback(os.close, handle)
            while not held and (held is None or time.monotonic() < until):
                try:
                    flock(handle, FLAGS)
                    held = True
                except BlockingIOError:
                    held = False
                    time.sleep(0.01)
        yield held
