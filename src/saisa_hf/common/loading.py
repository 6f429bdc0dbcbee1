# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Loading what a command is given by name: a model, a device, an image. And keeping transformers quiet meanwhile."""

import contextlib
import os
from collections.abc import Iterator

import PIL.Image
import torch
import transformers
from transformers import PretrainedConfig

from ..images_saisa import load_image
from ..modeling_saisa import SaisaForConditionalGeneration
from ..processing_saisa import SaisaProcessor
from .sources import check_local, first_line, read_json, reading


@contextlib.contextmanager
def quiet_transformers(progress: bool) -> Iterator[None]:
    """Turns off the warnings of transformers and, unless `progress`, its progress bars."""
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


def load_model(
    checkpoint: str,
    dtype: str,
    device: str,
    attn_implementation: str | None,
    device_map: str | None = None,
) -> tuple[SaisaForConditionalGeneration, SaisaProcessor]:
    """Model and processor of a checkpoint, loaded with the package's own classes.

    Args:
        checkpoint: folder or hub id.
        dtype: `"auto"`, or a name like `"bfloat16"`.
        device: see `device_named`.
        attn_implementation: as `from_pretrained` takes it.
        device_map: in place of `device`, how the model is laid out over several: `"auto"` for instance.

    Raises:
        OSError: no such folder or repository.
        ValueError: it is not a SAISA, or the device cannot be used.
    """
    checkpoint = check_saisa("MODEL", checkpoint)
    device = device_map or device_named(device)
    with reading(checkpoint):
        model = SaisaForConditionalGeneration.from_pretrained(
            checkpoint, dtype=dtype, device_map=device, attn_implementation=attn_implementation
        )
        return model.eval(), SaisaProcessor.from_pretrained(checkpoint)


def check_saisa(name: str, checkpoint: str) -> str:
    """The folder, or hub id, `checkpoint`, of which nothing but config.json is read: seconds, where a processor would be
    looked for on the hub for minutes.

    Args:
        name: what error messages call it.

    Raises:
        OSError: no such folder or repository.
        ValueError: it is not a SAISA.
    """
    if (folder := check_local(name, checkpoint)) is None:
        with reading(checkpoint):
            config, _ = PretrainedConfig.get_config_dict(checkpoint)
    else:
        checkpoint, config = str(folder), read_json(folder / "config.json")
    found = config.get("model_type") if isinstance(config, dict) else config
    if found != "saisa":
        raise ValueError(f"{name} {checkpoint!r} has model_type {found!r:.80}: expected 'saisa'.")
    return checkpoint


def device_named(name: str) -> str:
    """The device called `name`; for `"auto"` CUDA, else MPS, else the CPU.

    Raises:
        ValueError: it cannot be used.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).tolist()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device {name!r} cannot be used here, expected auto or cpu: {first_line(error)}") from error
    return name


def read_image(path: str) -> tuple[PIL.Image.Image, str]:
    """The image at a path or address, and what to call it.

    Raises:
        OSError: it cannot be read.
    """
    try:
        return load_image(found(path, "image"), f"image {path!r}", timeout=60), path
    except ValueError as error:
        raise OSError(str(error)) from error


def found(path: str, kind: str) -> str:
    """A path without `~`, or an address as it is.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if path.startswith(("http://", "https://", "data:")):
        return path
    expanded = os.path.expanduser(path)
    if not os.path.isfile(expanded):
        raise FileNotFoundError(f"There is no {kind} {path!r}.")
    return expanded
