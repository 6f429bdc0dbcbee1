# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Reading weight files that are larger than memory.

No file is read as a whole: a process needs one piece of a tensor and, for `.bin` files, which are mapped, the pages of the
one file that is open. `weight_writing.py` is the other direction.
"""

import json
import os
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..common.sources import first_line, read_json


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORED_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}

_PIECE = 32 * 2**20  # bytes read, converted, hashed and written at a time
_CORRUPT = "It is truncated or not a weight file; download or copy it again."


def check_whole(source: str | os.PathLike, model_type: str, found: dict, expected: str = "") -> None:
    """Raises ValueError if transformers, by its loading info `found`, did not find all of a model's tensors in `source`: it
    would fill them with random numbers."""
    if missing := sorted(found["missing_keys"]):
        raise ValueError(
            f"{source} lacks {len(missing)} of the tensors of a {model_type}: {', '.join(missing[:8])}.{expected}"
        )


def check_layers(config: Any, most: int, file: Path) -> None:
    """Raises ValueError if a configuration, an object or a dict read from `file`, has more than `most` layers: more than
    there are tensors in its weights, so that nobody makes a model of them."""
    settings = config if isinstance(config, dict) else config.to_dict()
    for part in (settings, settings.get("text_config"), settings.get("vision_config")):
        layers = part.get("num_hidden_layers") if isinstance(part, dict) else None
        if isinstance(layers, int) and layers > most:
            raise ValueError(
                f"{file}: num_hidden_layers={layers!r:.40}, but there are {most} tensors in all in its weights."
            )


def tensors_of(file: Path) -> "_SafetensorsFile | _PickleFile":
    """One weight file, open: `described()` gives shapes and dtypes by name, `rows(name, start, stop)` a piece of a tensor.

    Raises:
        OSError: it cannot be read.
        ValueError: it holds something else than tensors.
    """
    return (_SafetensorsFile if file.suffix == ".safetensors" else _PickleFile)(file)


class WeightFiles:
    """The tensors in a folder's weight files. One file at a time is open.

    `files`, `shapes` and `dtypes` map tensor names, in file order, to the file, the shape and the dtype (a string if torch
    has no such dtype). `listing` is the path that says which tensors there are: the one weight file, or the index of several.

    Raises:
        OSError: a file is missing, truncated or cannot be read.
        ValueError: a file or the index does not hold what it should.
    """

    def __init__(self, folder: Path):
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype | str] = {}
        self._open: tuple[Path, _SafetensorsFile | _PickleFile] | None = None
        self.listing, paths, index = listed_files(folder)
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
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"{self.files[name]}: tensor {name} is {dtype}, which cannot be read.")
        row_bytes = dtype.itemsize * torch.Size(shape[1:]).numel()
        step = max(_PIECE // max(row_bytes, 1), 1)
        count = shape[0] if shape else 1
        for start in range(0, count, step):
            yield self._handle(self.files[name]).rows(name, start, min(start + step, count))

    def close(self) -> None:
        """Closes the file that is open, whose pages count as used memory; it is opened again when it is needed."""
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
                    names = _PickleFile(file).names_by_place()
                    place = data.index(info.filename) if info.filename in data and len(names) == len(data) else None
                    what = info.filename if place is None else f"tensor {names[place]}"
                    raise OSError(f"{file}: {what} is corrupt, its checksum differs. Download or copy the file again.")

    def _handle(self, file: Path) -> "_SafetensorsFile | _PickleFile":
        if self._open is None or self._open[0] != file:
            self._open = None  # before the next one is opened
            self._open = (file, tensors_of(file))
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
        view = as_bytes(piece)
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
            if not isinstance(name, str):
                raise ValueError(f"{file}: a tensor is called {name!r:.80}, expected text.")
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
    return OSError(f"{file} cannot be read: {first_line(error).rstrip('.')}. {_CORRUPT}")


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


def listed_files(folder: Path) -> tuple[Path, list[Path], dict[str, Path]]:
    """The path that lists the folder's tensors, the weight files, and tensor name -> file (empty without an index). As for
    transformers, a single file comes before an index, which may be left from an earlier save.

    Raises:
        OSError: there are none, or a file is missing.
        ValueError: the index is not one.
    """
    for single in ("model.safetensors", "pytorch_model.bin"):
        if (folder / single).is_file():
            return folder / single, [folder / single], {}
        index = folder / f"{single}.index.json"
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index}: weight_map={weight_map!r:.80}, expected a map of tensor names to files.")
            for name, file in weight_map.items():
                if not isinstance(file, str) or Path(file).name != file or Path(file).suffix != Path(single).suffix:
                    expected = f"a file beside it that ends in {Path(single).suffix}"
                    raise ValueError(
                        f"{index}: weight_map has {file!r:.80} for tensor {name:.200}, expected {expected}."
                    )
            files = sorted({folder / name for name in weight_map.values()})
            for file in files:
                if not file.is_file():
                    raise FileNotFoundError(f"{file} is missing, which {index.name} names. Download or copy it.")
            return index, files, {name: folder / file for name, file in weight_map.items()}
    raise FileNotFoundError(
        f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin, or either's index and shards."
    )


def as_bytes(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
