# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Language models in GGUF files, as llama.cpp has them: transformers reads such a file, here it is found and asked for.

The file's weights are usually quantized; transformers makes ordinary tensors of them, which is what a SAISA is built from.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..common.extras import needs
from ..common.sources import reading
from .weight_files import check_whole


GGUF = ".gguf"
_PART = re.compile(r"-\d{5}-of-\d{5}$")  # at the end of the name of a part, as llama.cpp splits files


def is_gguf(source: str | os.PathLike) -> bool:
    """Whether something is named like a GGUF file."""
    return os.fspath(source).lower().endswith(GGUF)


def gguf_file(source: str | os.PathLike) -> Path | None:
    """The GGUF file that `source` is, or that a folder without config.json holds; None for everything else.

    Raises:
        FileNotFoundError: it is named like one, and is not there.
        ValueError: such a folder holds several, or the file is one part of several.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        if is_gguf(path) and not path.is_file():
            raise FileNotFoundError(f"{path} is missing.")
        return _whole(path) if is_gguf(path) else None
    if (path / "config.json").exists():
        return None
    files = sorted(file for file in path.iterdir() if is_gguf(file))
    whole = [file for file in files if not _PART.search(file.stem)]
    if len(whole) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path} holds {len(files)} GGUF files, {names}: expected one, or the path of one of them.")
    return _whole((whole or files)[0]) if files else None


def _whole(file: Path) -> Path:
    if _PART.search(file.stem):
        raise ValueError(
            f"{file} is one part of several, which transformers does not put together: join them with llama.cpp's "
            "'llama-gguf-split --merge'."
        )
    return file


@contextmanager
def _alone(file: Path) -> Iterator[dict[str, str]]:
    """Inside, the arguments of `from_pretrained` for `file` and nothing else: given a name, transformers would prefer a file
    of that name in the working directory, and a tokenizer beside the file to the one in it."""
    needs("gguf", f"reading {file.name}", extra="gguf")
    with tempfile.TemporaryDirectory() as empty, reading(file):
        yield {"pretrained_model_name_or_path": empty, "gguf_file": str(file.absolute())}


def gguf_model(file: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The language model in `file`, dequantized, in `dtype` (None: float32).

    Raises:
        ImportError: the package gguf is not installed.
        ValueError, OSError: transformers cannot read the file, or it lacks tensors of its model.
    """
    with _alone(file) as source:
        model, found = AutoModelForCausalLM.from_pretrained(
            **source, dtype=dtype or torch.float32, output_loading_info=True
        )
    check_whole(file, model.config.model_type, found)
    # its weights are ordinary tensors; what releases from 5.x on note about the file would make it count as quantized
    model.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `file`. Its special tokens are those whose ids the file names, and it puts them around a text as the
    file says; transformers 4.57 mistakes both."""
    with _alone(file) as source:
        tokenizer = AutoTokenizer.from_pretrained(**source)
        config = AutoConfig.from_pretrained(**source)
        fields = needs("gguf", f"reading {file.name}", extra="gguf").GGUFReader(file).fields
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        index = getattr(config, f"{name}_id", None)
        if isinstance(index, int) and 0 <= index < len(tokenizer):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(index))
    for name in ("add_bos_token", "add_eos_token"):
        field = fields.get(f"tokenizer.ggml.{name}")
        if field is not None and hasattr(tokenizer, name):
            setattr(tokenizer, name, bool(field.parts[field.data[0]][0]))
    return tokenizer
