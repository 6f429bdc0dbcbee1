# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Language models in GGUF files, as llama.cpp has them: transformers reads such a file, here it is found and asked for.

The file's weights are usually quantized; transformers makes ordinary tensors of them, which is what a SAISA is built from.
"""

import os
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..common.extras import needs


GGUF = ".gguf"


def gguf_file(source: str | os.PathLike) -> Path | None:
    """The GGUF file that `source` is, or that a folder without config.json holds; None for everything else.

    Raises:
        ValueError: such a folder holds several.
    """
    path = Path(source).expanduser()
    if path.suffix == GGUF and path.is_file():
        return path
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = sorted(path.glob(f"*{GGUF}"))
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ValueError(f"{path} holds {len(files)} GGUF files, {names}: expected one, or the path of one of them.")
    return files[0] if files else None


def gguf_model(file: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The language model in `file`, dequantized, in `dtype` (None: float32).

    Raises:
        ImportError: the package gguf is not installed.
        ValueError, OSError: transformers cannot read the file.
    """
    needs("gguf", f"reading {file.name}", extra="gguf")
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype or torch.float32)
    # its weights are ordinary tensors; what releases from 5.x on note about the file would make it count as quantized
    model.hf_quantizer = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    return model


def gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `file`. Its special tokens are those whose ids the file names, which transformers 4.57 mistakes."""
    needs("gguf", f"reading {file.name}", extra="gguf")
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        index = getattr(config, f"{name}_id", None)
        if isinstance(index, int) and 0 <= index < len(tokenizer):
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(index))
    return tokenizer
