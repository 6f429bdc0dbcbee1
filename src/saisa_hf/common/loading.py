# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a command is given by name: a model, a device, an image file; and transformers kept quiet meanwhile."""

import contextlib
import os
import re
from pathlib import Path

import torch
import transformers
from transformers import PretrainedConfig

from ..images_saisa import load_image
from ..modeling_saisa import SaisaForConditionalGeneration
from ..processing_saisa import SaisaProcessor


@contextlib.contextmanager
def quiet_transformers(progress: bool):
    """No warnings of transformers between the lines of a conversation, and progress bars only where somebody sees them."""
    settings = transformers.logging
    verbosity, bars = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    if not progress:
        settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(verbosity)
        if bars:
            settings.enable_progress_bar()


def load_model(checkpoint: str, dtype: str, device: str, attn_implementation: str | None):
    """Model and processor, by the package's own classes."""
    path = Path(checkpoint).expanduser()
    if path.is_dir():
        checkpoint = str(path)
    elif path.exists() or not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", checkpoint):
        raise FileNotFoundError(f"MODEL {checkpoint!r} is not a folder, nor does it look like a hub id ('user/name').")
    config, _ = PretrainedConfig.get_config_dict(checkpoint)
    if config.get("model_type") != "saisa":
        raise ValueError(f"MODEL {checkpoint!r} has model_type {config.get('model_type')!r}: expected 'saisa'.")
    model = SaisaForConditionalGeneration.from_pretrained(
        checkpoint, dtype=dtype, device_map=device_named(device), attn_implementation=attn_implementation
    )
    return model.eval(), SaisaProcessor.from_pretrained(checkpoint)


def device_named(name: str) -> str:
    """The device of that name; of `"auto"` the fastest there is."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return name


def read_picture(path: str):
    """(PIL picture, what to call it); OSError where it cannot be had."""
    name = path
    if not path.startswith(("http://", "https://", "data:")):
        path = os.path.expanduser(path)
        if not os.path.isfile(path):
            raise FileNotFoundError(f"There is no picture {name!r}.")
    try:
        return load_image(path, f"picture {name!r}", timeout=60), name
    except ValueError as error:
        raise OSError(str(error)) from error
