# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What is wrong with weight files that transformers could not load: looked for after it has failed."""

import copy
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import safe_open
from transformers.utils import cached_file


def fault_of_weights(cls, checkpoint, config, files: dict, given: dict) -> str | None:
    """What is wrong with the weight files that `from_pretrained` reads: file, tensor where one is known, and why. None if
    nothing is found, or if it reads other weights.

    Args:
        cls: the model class, which expects certain tensors.
        checkpoint: folder or hub id.
        config: as it was given to `from_pretrained`, or None.
        files: arguments that say how to read a file: `subfolder`, `revision` ...
        given: all keyword arguments, `key_mapping` among them.
    """
    folder, expected, tensor = Path(checkpoint or "", files.get("subfolder") or ""), {}, None
    if checkpoint is None or given.get("state_dict") is not None or given.get("gguf_file"):
        return None
    with suppress(Exception):  # what is raised elsewhere says what is wrong there
        if not folder.is_dir():
            folder = Path(cached_file(checkpoint, "config.json", **{**files, "local_files_only": True})).parent
        config = config if hasattr(config, "text_config") else cls.config_class.from_pretrained(folder)
        if getattr(config, "quantization_config", None) is None:
            with torch.device("meta"):
                expected = cls(copy.deepcopy(config)).state_dict()
    part = f".{given['variant']}" if given.get("variant") else ""
    kinds = [f"model{part}.safetensors", f"model.safetensors.index{part}.json"]
    kinds += [f"pytorch_model{part}.bin", f"pytorch_model.bin.index{part}.json"]
    read = [folder / kind for kind in kinds if os.path.lexists(folder / kind)][:1]
    try:
        for file in [path for path in read if path.suffix == ".json"]:
            index = json.loads(file.read_bytes())
            _, weight_map = index["metadata"], index["weight_map"]  # transformers wants both
            for tensor, shard in weight_map.items():  # noqa: B007, for the message
                read.append(folder / str(shard))
                if read[-1].name != shard or not read[-1].is_file() or read[-1].suffix == ".json":
                    raise ValueError(f"its weight_map has {shard!r:.80}, which is no weight file beside it")
            if not (read := read[1:]):
                raise ValueError("it names no file")
        for file in dict.fromkeys(read):
            tensor, is_bin = None, file.suffix == ".bin"
            options: dict[str, Any] = {"map_location": "cpu", "weights_only": True, "mmap": is_zipfile(file)}
            stored: Any = torch.load(file, **options) if is_bin else safe_open(file, framework="pt")
            for tensor in stored.keys():  # noqa: SIM118, it need not be a dict
                found = stored[tensor] if is_bin else stored.get_slice(tensor)
                shape, kind = (found.shape, "F") if is_bin else (found.get_shape(), found.get_dtype())
                renamed = (re.subn(old, new, tensor) for old, new in given["key_mapping"].items())
                want = expected.get(next((name for name, count in renamed if count), tensor))
                if want is not None and ([*shape] != [*want.shape] or kind[0] not in "BF"):
                    raise ValueError(f"it is {kind} {[*shape]}, expected floats {[*want.shape]} by config.json")
    except Exception as error:  # each library has its own
        what = "is no index, JSON with metadata and a weight_map" if file.suffix == ".json" else "cannot be read"
        where = f"{file} {what}: " if tensor is None else f"{file}: tensor {tensor}: "
        said = " ".join(str(error).split())[:300].removesuffix(".") or type(error).__name__
        return f"{where}{said}. Download or copy it again; `saisa check` lists all that is wrong."
    return None
