# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""A journal: the finished lines of a long run, written as they are finished. A run that was killed goes on from there.

A journal is a folder. `settings.json` says what was asked for; each process appends to a part of its own, a file of lines
`[index, line]` in JSON. A line that a kill cut off is removed when the journal is opened again.
"""

import array
import contextlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from .identity import differences, read_record, write_record


SETTINGS, RESULT = "settings.json", "result"
MOST_PARTS, MOST_LINES = 2**12, 2**27  # an index beyond the latter is no index, but damage
WRITTEN_AT_ONCE, WRITTEN_EACH = 64, 2.0  # lines, and seconds, that a kill costs at most
LOCK_WAIT = 10  # seconds: the workers of a run that was killed live on for some seconds


class Journal:
    """The finished lines of a run, by index: that of its question, row or file. A context manager: closed at its end.

    Args:
        folder: where it lies; made if need be.
        request: what the lines depend on: `model` and `data` as `identity.of_model` and `of_data` say, and `settings`, a
            mapping of names to values that JSON has.
        part: the number of this process among those that write at the same time.

    Raises:
        ValueError: the folder has the lines of a run that was asked for something else, or its settings are damaged.
        OSError: another process writes to the same part, or the folder cannot be written.
    """

    def __init__(self, folder: str | os.PathLike, request: dict[str, Any], part: int = 0):
        if not 0 <= part < MOST_PARTS:
            raise ValueError(f"part is {part}: expected a number from 0 to {MOST_PARTS - 1}.")
        self.folder, self._stack = Path(folder), contextlib.ExitStack()
        try:
            self._open(request, part)
        except BaseException:
            self._stack.close()
            raise

    def _open(self, request: dict[str, Any], part: int) -> None:
        from ..saving_saisa import locked  # with transformers, which whoever only looks does not need

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / _name(part)
        path.touch()
        if self._stack.enter_context(locked(path, LOCK_WAIT)) is False:
            raise BlockingIOError(f"Another run writes to {self.folder}: wait for its end, or stop it.")
        if not path.exists():
            raise BlockingIOError(f"Another run has just finished what {self.folder} was for: look at its result.")
        with locked(self.folder, LOCK_WAIT):  # processes that begin together
            if not check_request(self.folder, request):
                write_record(self.folder / SETTINGS, request)
        self._places, self._count = array.array("q"), 0  # by index: position * MOST_PARTS + part; -1: not finished
        for found in sorted(self.folder.glob("part-*.jsonl")):
            end = self._read(found, int(found.stem.partition("-")[2]))
            if found == path:
                os.truncate(path, end)
        self._part, self._end, self._path = part, path.stat().st_size, path
        self._file = self._stack.enter_context(path.open("ab", buffering=0))

    def _read(self, path: Path, part: int) -> int:
        """Notes where the lines of a part are. Returns where the last whole one ends; what follows does not count."""
        end = 0
        with path.open("rb") as file:
            for text in file:
                index = _index(text)
                if index is None:
                    break
                self._note(index, end, part)
                end += len(text)
        return end

    def _note(self, index: int, position: int, part: int) -> None:
        if index >= len(self._places):
            self._places.extend([-1] * (index + 1 - len(self._places)))
        if self._places[index] < 0:  # processes that came after one another may have answered the same
            self._places[index] = position * MOST_PARTS + part
            self._count += 1

    def __contains__(self, index: object) -> bool:
        return isinstance(index, int) and 0 <= index < len(self._places) and self._places[index] >= 0

    def __len__(self) -> int:
        """How many lines are finished, those of all parts that were there at the beginning included."""
        return self._count

    def write(self, lines: Iterable[tuple[int, Any]]) -> None:
        """Appends pairs of an index and a line, whatever JSON can hold. They are on the disk when it returns.

        Raises:
            OSError: the disk is full, for instance; none of these lines is in the journal then.
        """
        texts = [(index, json.dumps([index, line]).encode() + b"\n") for index, line in lines]
        try:
            content = memoryview(b"".join(text for _, text in texts))
            while content:
                content = content[self._file.write(content) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                os.truncate(self._path, self._end)
            what = f"{self.folder} cannot be written: {error.strerror or error}. It keeps {self._count} finished lines"
            raise OSError(f"{what}: the same command goes on from there.") from error
        for index, text in texts:
            self._note(index, self._end, self._part)
            self._end += len(text)

    def lines(self) -> Iterator[tuple[int, Any]]:
        """The finished lines of all parts as pairs of index and line, in the order of the indices; each is read when needed.
        What other processes have written since is read first: call it when they are done."""
        for path in sorted(self.folder.glob("part-*.jsonl")):
            self._read(path, int(path.stem.partition("-")[2]))
        with contextlib.ExitStack() as stack:
            files: dict[int, BinaryIO] = {}
            for index, place in enumerate(self._places):
                if place >= 0:
                    position, part = divmod(place, MOST_PARTS)
                    if part not in files:
                        files[part] = stack.enter_context((self.folder / _name(part)).open("rb"))
                    files[part].seek(position)
                    yield index, json.loads(files[part].readline())[1]

    @contextlib.contextmanager
    def result(self, path: str | os.PathLike) -> Iterator[Path]:
        """A file in the journal's folder to write a result into. When the block ends, it takes the place of `path`, which is
        on the same file system, in one step."""
        partial = self.folder / f"result-{self._part}{Path(path).suffix}"
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, path)

    def remove(self, **result: Any) -> None:
        """Closes the journal and deletes it: when its result is in place, and no other process writes to it. If it is killed
        meanwhile, `result_of` says what is known of the `result`."""
        if result:
            write_record(self.folder / SETTINGS, {**(read_record(self.folder / SETTINGS) or {}), RESULT: result})
        remove(self.folder)
        self.close()

    def close(self) -> None:
        """Lets other processes write to this part."""
        self._stack.close()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Writer:
    """Puts lines into a journal, several at a time. A context manager: the last ones are written when the block ends, however
    it ends."""

    def __init__(self, journal: Journal):
        self.journal, self.lines, self.since = journal, [], time.monotonic()

    def add(self, index: int, line: dict[str, Any]) -> None:
        """A finished line; it is on the disk when 64 have come together, or with the first that comes two seconds later."""
        self.lines.append((index, line))
        if len(self.lines) >= WRITTEN_AT_ONCE or time.monotonic() - self.since > WRITTEN_EACH:
            self.write()

    def write(self) -> None:
        """Writes what has come together."""
        lines, self.lines, self.since = self.lines, [], time.monotonic()
        self.journal.write(lines)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error: object) -> None:
        self.write()


def check_request(folder: str | os.PathLike, request: dict[str, Any]) -> bool:
    """Whether `folder` has a journal of a run that was asked for the same; False if it has none. Changes nothing.

    Raises:
        ValueError: it has one of a run that was asked for something else, or its settings are damaged.
    """
    try:
        found = read_record(Path(folder, SETTINGS))
    except ValueError as error:
        raise ValueError(f"{error} Delete the folder {os.fspath(folder)!r} to begin anew.") from error
    if found is None:
        return False
    if differing := differences(found, json.loads(json.dumps(request))):
        raise ValueError(
            f"{os.fspath(folder)!r} has the beginning of a run with other settings: {'; '.join(differing)}. Finish it with "
            "its own settings, choose another output, or delete that folder to begin anew."
        )
    return True


def result_of(folder: str | os.PathLike) -> dict[str, Any] | None:
    """What `Journal.remove` was told of a result that is in place; None of a journal that is to be gone on with."""
    found = (read_record(Path(folder, SETTINGS)) or {}).get(RESULT)
    return found if isinstance(found, dict) else None


def remove(folder: str | os.PathLike) -> None:
    """Deletes a journal; its settings last, so that what a kill leaves is still a journal of the same run."""
    folder = Path(folder)
    if folder.is_dir():
        for path in sorted(folder.glob("*.*"), key=lambda path: path.name == SETTINGS):
            path.unlink()
        shutil.rmtree(folder)


def _name(part: int) -> str:
    return f"part-{part:04}.jsonl"


def _index(text: bytes) -> int | None:
    """The index of a line of a part; None if it is not whole."""
    try:
        found = json.loads(text) if text.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if isinstance(found, list) and len(found) == 2 and type(found[0]) is int and 0 <= found[0] < MOST_LINES:
        return found[0]
    return None
