# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Writing weight files that are larger than memory: tensor by tensor in pieces, read back and compared with their source."""

import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from tqdm import tqdm

from .weight_files import STORED_DTYPES, WeightFiles, as_bytes


@dataclass
class Source:
    """One tensor of the result: where it comes from, and how many rows it has in the end (None: as many as there)."""

    weights: WeightFiles
    name: str
    rows: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        old = self.weights.shapes[self.name]
        return old if self.rows is None else (self.rows, *old[1:])

    def nbytes(self, dtype: torch.dtype) -> int:
        """Bytes of the result in `dtype`."""
        return dtype.itemsize * torch.Size(self.shape).numel()

    def pieces(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The result in `dtype`, in contiguous pieces that follow each other. New rows are the mean of the old ones.

        Raises:
            ValueError: a value is too large for `dtype`.
        """
        old = self.weights.shapes[self.name]
        new_rows = self.shape[0] - old[0] if old else 0
        total = torch.zeros((), dtype=torch.float64)
        for piece in self.weights.rows(self.name):
            if new_rows:
                total = total + sum(rows.double().sum(0) for rows in piece.split(1024))
            yield self._cast(piece, dtype)
        if new_rows:  # as a head row, the mean of all rows gives the mean of all logits, which is never the largest
            mean = (total / old[0]).to(self.weights.dtypes[self.name])
            yield self._cast(mean.expand(new_rows, -1), dtype).contiguous()

    def _cast(self, piece: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        cast = piece.to(dtype)
        if cast.dtype != piece.dtype and bool(cast.isinf().any()) and not bool(piece.isinf().any()):
            raise ValueError(
                f"{self.weights.files[self.name]}: {self.name} has values too large for {dtype}; "
                f"convert with --dtype bfloat16 or --dtype float32."
            )
        return cast


def write_safetensors(
    file: Path, sources: dict[str, Source], dtype: torch.dtype, progress: Callable[[int], None] = lambda n: None
) -> dict[str, str]:
    """Writes `sources` into a safetensors file, piece by piece, and waits until it is on the disk.

    Args:
        progress: called with the number of bytes after each piece.

    Returns:
        Tensor name -> SHA-256 of the bytes written for it.

    Raises:
        OSError: the disk is full, or the file is larger than allowed; the message names the file and the tensor.
    """
    header: dict[str, dict[str, Any]] = {"__metadata__": {"format": "pt"}}
    end, digests = 0, {}
    for name, source in sources.items():
        start, end = end, end + source.nbytes(dtype)
        header[name] = {"dtype": STORED_DTYPES[dtype], "shape": list(source.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb", buffering=0) as stream:
        _write(stream, struct.pack("<Q", len(encoded)) + encoded, file, "its header")
        for name, source in sources.items():
            digest = hashlib.sha256()
            for piece in source.pieces(dtype):
                data = as_bytes(piece)
                _write(stream, data, file, name)
                digest.update(data)
                progress(len(data))
            digests[name] = digest.hexdigest()
        try:
            os.fsync(stream.fileno())
        except OSError as error:
            raise OSError(error.errno, f"{file} cannot be written: {error.strerror}") from error
    return digests


def check_safetensors(
    file: Path,
    sources: dict[str, Source],
    dtype: torch.dtype,
    digests: dict[str, str],
    progress: Callable[[int], None] = lambda n: None,
) -> None:
    """Loads each tensor of a written file, with the safetensors library, and compares its checksum with `digests`.

    Raises:
        OSError: the file does not hold the bytes that were written.
    """
    if hasattr(os, "posix_fadvise"):  # from the disk, not from the system's memory of what was written
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with safe_open(file, framework="pt") as written:
        names = sorted(written.keys())
    if names != sorted(digests):
        raise OSError(f"{file} does not hold the tensors that were written to it: is the disk sound?")
    for name, digest in digests.items():
        with safe_open(file, framework="pt") as written:  # anew each time: what is mapped counts as used memory
            tensor = written.get_tensor(name)
        whole = (tensor.dtype, tuple(tensor.shape)) == (dtype, sources[name].shape)
        if not whole or hashlib.sha256(as_bytes(tensor)).hexdigest() != digest:
            raise OSError(f"{file}: {name} read back differs from its source: is the disk sound?")
        progress(tensor.nbytes)


def _write(stream: BinaryIO, data: Any, file: Path, what: str) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[stream.write(view) :]
    except OSError as error:
        raise OSError(error.errno, f"{file}: {what} cannot be written: {error.strerror}") from error


# --- a whole checkpoint -----------------------------------------------------------------------------------------------


def weight_shards(sources: dict[str, Source], dtype: torch.dtype, max_bytes: int) -> dict[str, dict[str, Source]]:
    """File name -> the tensors that go into it, at most `max_bytes` (or one tensor) each."""
    shards: list[dict[str, Source]] = [{}]
    room = max_bytes
    for name, source in sources.items():
        size = source.nbytes(dtype)
        if size > room and shards[-1]:
            shards.append({})
            room = max_bytes
        shards[-1][name] = source
        room -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": shard for n, shard in enumerate(shards, 1)}


def write_weights(
    folder: Path,
    files: dict[str, dict[str, Source]],
    dtype: torch.dtype,
    read_from: list[WeightFiles],
    size: int,
    progress: bool | None,
    log: Callable[[str], None],
) -> None:
    """Writes weight files and the index of those of the model. Each is read back and compared before the next is begun;
    source files that carry checksums are verified before that.

    Args:
        files: see `weight_shards`; one whose name does not begin with "model" lies beside the model's.
        read_from: where the sources are.
        size: bytes of all tensors in `dtype`.
        progress: whether a bar on stderr shows bytes and the time left; None: on a terminal.
        log: called with one line of text per file.

    Raises:
        OSError: a file cannot be read or written, or does not hold what it should.
    """
    summed = [(weights, file) for weights in read_from for file in weights.checksummed()]
    total = 2 * size + sum(file.stat().st_size for _, file in summed)
    hidden = None if progress is None else not progress  # None: shown on a terminal alone
    with tqdm(total=total, unit="B", unit_scale=True, disable=hidden, file=sys.stderr, smoothing=0.1) as bar:

        def say(line: str):
            bar.clear()
            log(line)
            bar.refresh()

        for weights, file in summed:
            bar.set_description(f"verifying {file.name}")
            weights.verify(file, bar.update)
        for name, sources in files.items():
            say(f"writing {name} ({len(sources)} tensors)")
            bar.set_description(f"writing {name}")
            digests = write_safetensors(folder / name, sources, dtype, bar.update)
            for weights in read_from:
                weights.close()
            bar.set_description(f"checking {name}")
            check_safetensors(folder / name, sources, dtype, digests, bar.update)
        bar.update(total - bar.n)  # what lies around the tensors of the files with checksums
    models = {file: sources for file, sources in files.items() if file.startswith("model")}
    if len(models) > 1:
        weight_map = {name: file for file, sources in models.items() for name in sources}
        nbytes = sum(source.nbytes(dtype) for sources in models.values() for source in sources.values())
        index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    log(f"checked {sum(map(len, files.values()))} tensors ({size / 1e9:.2f} GB) against their source")
