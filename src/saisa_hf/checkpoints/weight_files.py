# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Weight files that are larger than memory: read in pieces, written in pieces, read back and compared.

No file is mapped as a whole where that can be helped, and none is read as a whole: what a process needs is one piece of a
tensor, and for `.bin` files the pages of the one file that is open.
"""

import hashlib
import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORED_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

_PIECE = 32 * 2**20  # bytes read, converted, hashed and written at a time
_CORRUPT = "It is truncated or not a weight file; download or copy it again."


def read_json(file: Path) -> dict:
    """The object in a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not JSON, or no object.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected an object.")
    return content


class WeightFiles:
    """The tensors in a folder's weight files, of which one at a time is open.

    `files`, `shapes` and `dtypes` map tensor names, in file order, to the file, the shape and the dtype (a string where
    torch has none of that name). `listing` is the path that says which tensors there are: the one weight file, or the
    index of several.

    Raises:
        OSError: a file is missing, truncated or cannot be read.
        ValueError: a file or the index does not hold what it should.
    """

    def __init__(self, folder: Path):
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | str] = {}
        self._open: tuple[Path, _SafetensorsFile | _PickleFile] | None = None
        self.listing, paths, index = _weight_files(folder)
        for file in paths:
            for name, (shape, dtype) in self._handle(file).described().items():
                if name in self.files and index.get(name) != file:
                    continue  # a tensor that is in two files is the one that the index names
                self.files[name], self.shapes[name], self.dtypes[name] = file, shape, dtype
        for name, file in index.items():
            if self.files.get(name) != file:
                raise ValueError(f"{file}: tensor {name} is missing, which {self.listing.name} says is there.")
        self.close()

    def rows(self, name: str) -> Iterator[torch.Tensor]:
        """The tensor in slices of its first dimension, 32 MiB or one row each; a scalar as one row."""
        shape, dtype = self.shapes[name], self.dtypes[name]
        row_bytes = dtype.itemsize * torch.Size(shape[1:]).numel()
        step = max(_PIECE // max(row_bytes, 1), 1)
        count = shape[0] if shape else 1
        for start in range(0, count, step):
            yield self._handle(self.files[name]).rows(name, start, min(start + step, count))

    def close(self) -> None:
        """Lets go of the file that is open, whose pages count as used memory; it is opened again when it is needed."""
        self._open = None

    def checksummed(self) -> list[Path]:
        """The files that carry checksums of their content: `.bin` files that are zip archives."""
        return [file for file in dict.fromkeys(self.files.values()) if _is_zip(file)]

    def verify(self, file: Path, progress: Callable[[int], None] = lambda n: None) -> None:
        """Reads one of the `checksummed` files and compares it with its checksums.

        Raises:
            OSError: they differ; the message names the file and the tensor.
        """
        try:
            archive = zipfile.ZipFile(file)
        except zipfile.BadZipFile as error:
            raise _unreadable(file, error) from error
        with archive:
            records = sorted((i for i in archive.infolist() if i.file_size), key=lambda info: info.header_offset)
            data = [info.filename for info in records if info.filename.split("/")[-2:-1] == ["data"]]
            pickle = next((info for info in records if info.filename.endswith("/data.pkl")), None)
            if pickle is None or not _matches(archive, pickle):
                progress(file.stat().st_size)  # written without checksums: torch.serialization.set_crc32_options(False)
                return
            for info in records:
                if not _matches(archive, info, progress):
                    names = self._handle(file).names_by_place()
                    place = data.index(info.filename) if info.filename in data and len(names) == len(data) else None
                    what = info.filename if place is None else f"tensor {names[place]}"
                    raise OSError(f"{file}: {what} is corrupt, its checksum differs. Download or copy the file again.")

    def _handle(self, file: Path) -> "_SafetensorsFile | _PickleFile":
        if self._open is None or self._open[0] != file:
            self._open = None  # before the next one is opened
            self._open = (file, (_SafetensorsFile if file.suffix == ".safetensors" else _PickleFile)(file))
        return self._open[1]


class _SafetensorsFile:
    """One safetensors file: checked by the safetensors library, read without mapping it."""

    def __init__(self, file: Path):
        self.file = file
        try:
            with safe_open(file, framework="pt"):  # complete, without gaps and overlaps, sizes as the shapes say
                pass
            with file.open("rb") as stream:
                (length,) = struct.unpack("<Q", stream.read(8))
                header = json.loads(stream.read(length))
        except FileNotFoundError:
            raise
        except (OSError, SafetensorError, ValueError) as error:
            raise _unreadable(file, error) from error
        header.pop("__metadata__", None)
        dtypes = {stored: dtype for dtype, stored in STORED_DTYPES.items()}
        self.tensors = {  # name -> shape, dtype, where it begins
            name: (
                tuple(entry["shape"]),
                dtypes.get(entry["dtype"], entry["dtype"]),
                8 + length + entry["data_offsets"][0],
            )
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"])
        }

    def described(self) -> dict[str, tuple[tuple[int, ...], torch.dtype | str]]:
        return {name: (shape, dtype) for name, (shape, dtype, _) in self.tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        shape, dtype, place = self.tensors[name]
        piece = torch.empty((stop - start, *shape[1:]), dtype=dtype)
        view = memoryview(as_bytes(piece).numpy())
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(place + start * (len(view) // max(stop - start, 1)))
                while view:
                    if not (count := stream.readinto(view)):
                        raise OSError(None, "the file ends within it")
                    view = view[count:]
        except OSError as error:
            raise OSError(
                f"{self.file}: tensor {name} cannot be read: {error.strerror or error}. {_CORRUPT}"
            ) from error
        return piece


class _PickleFile:
    """One file of `torch.save`, mapped where it is a zip archive; code in it is never run."""

    def __init__(self, file: Path):
        self.file = file
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=_is_zip(file))
        except FileNotFoundError:
            raise
        except Exception as error:
            raise _unreadable(file, error) from error
        if not isinstance(content, dict):
            raise ValueError(f"{file} holds a {type(content).__name__}, expected a state dict.")
        for name, tensor in content.items():
            if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
                kind = getattr(tensor, "layout", type(tensor).__name__)
                raise ValueError(f"{file}: {name} is a {kind}, expected a tensor.")
        self.tensors = content

    def described(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self.tensors.items()}

    def rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        tensor = self.tensors[name].detach()
        return tensor.reshape(1) if tensor.dim() == 0 else tensor[start:stop].contiguous()

    def names_by_place(self) -> list[str]:
        """A tensor's name for each storage, in the order in which the file holds them."""
        first = {}
        for name, tensor in self.tensors.items():
            if tensor.untyped_storage().nbytes():
                first.setdefault(tensor.untyped_storage().data_ptr(), name)
        return [first[place] for place in sorted(first)]


def _unreadable(file: Path, error: Exception) -> OSError:
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return OSError(f"{file} cannot be read: {reason} {_CORRUPT}")


def _is_zip(file: Path) -> bool:
    """Whether torch.save wrote a zip archive, as it does from 1.6 on: only these can be mapped and have checksums."""
    if file.suffix == ".safetensors":
        return False
    with file.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _matches(archive: zipfile.ZipFile, info: zipfile.ZipInfo, progress: Callable[[int], None] = lambda n: None) -> bool:
    try:
        with archive.open(info) as stream:
            while piece := stream.read(2**20):
                progress(len(piece))
    except (zipfile.BadZipFile, EOFError):
        return False
    return True


def _weight_files(folder: Path) -> tuple[Path, list[Path], dict[str, Path]]:
    """The path that lists the folder's tensors, the weight files, and tensor name -> file (empty without an index). As for
    transformers, a single file comes before an index, which may be left from an earlier save."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return folder / single, [folder / single], {}
        index = folder / f"{single}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index}: weight_map={weight_map!r}, expected a map of tensor names to files.")
            files = sorted({folder / name for name in weight_map.values()})
            for file in files:
                if not file.is_file():
                    raise FileNotFoundError(f"{file} is missing, which {index.name} names. Download or copy it.")
            return index, files, {name: folder / file for name, file in weight_map.items()}
    raise FileNotFoundError(
        f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin, or either's index and shards."
    )


# --- writing ----------------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """One tensor of the result: where it comes from, and how many rows it gets in the end (None: those it has)."""

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
            ValueError: `dtype` has no number for a value.
        """
        old = self.weights.shapes[self.name]
        new_rows = self.shape[0] - old[0] if old else 0
        total = 0
        for piece in self.weights.rows(self.name):
            total = total + sum(rows.double().sum(0) for rows in piece.split(1024)) if new_rows else 0
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
    """Writes `sources` into a safetensors file, one piece after the other, down to the disk.

    Args:
        progress: called with the number of bytes after each piece.

    Returns:
        Tensor name -> SHA-256 of the bytes written for it.

    Raises:
        OSError: the disk is full, or a limit on the size of files is met; the message names the file and the tensor.
    """
    header, end, digests = {"__metadata__": {"format": "pt"}}, 0, {}
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
                data = memoryview(as_bytes(piece).numpy())
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
    file: Path, sources: dict[str, Source], dtype: torch.dtype, digests: dict[str, str], progress=lambda n: None
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
        if not whole or hashlib.sha256(as_bytes(tensor).numpy()).hexdigest() != digest:
            raise OSError(f"{file}: {name} read back differs from its source: is the disk sound?")
        progress(tensor.nbytes)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor, uint8 (bytes,)."""
    return tensor.reshape(-1).view(torch.uint8)


def _write(stream, data, file: Path, what: str) -> None:
    view = memoryview(data)
    try:
        while view:
            view = view[stream.write(view) :]
    except OSError as error:
        raise OSError(error.errno, f"{file}: {what} cannot be written: {error.strerror}") from error
