# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Reading LLaVA checkpoints, and finding images in a folder."""

import os
from collections.abc import Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
    ProcessorMixin,
)

from ...checkpoint_saisa import LLAVAS
from ...common.loading import load_model
from ...common.sources import check_local, reading
from ...configuration_saisa import SaisaConfig
from .model import check_is_llava


SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


def load_llava(
    source: str | os.PathLike,
    dtype: str | None = None,
    device: str = "cpu",
    named: str = "--from-llava",
    kinds: Collection[str] = (*LLAVAS, SaisaConfig.model_type),
) -> tuple[PreTrainedModel, Any]:
    """Model and processor of a LLaVA, LLaVA-NeXT or LLaVA-OneVision checkpoint in transformers' layout, or of a SAISA that is
    a LLaVA (see `saisa_from_llava`).

    Args:
        source: folder or hub id.
        dtype: "float32", "float16" or "bfloat16"; None: as stored.
        device: where the model is loaded.
        named: what error messages call `source`.
        kinds: the `model_type`s that are expected.

    Raises:
        ValueError: a checkpoint of another kind.
        OSError: no such folder or repository.
    """
    source = check_local(named, source) or source
    with reading(source):
        config = AutoConfig.from_pretrained(source)
    if config.model_type not in kinds:
        raise ValueError(f"{named} {str(source)!r} is a {config.model_type!r}: expected one of {', '.join(kinds)}.")
    if config.model_type == SaisaConfig.model_type:
        try:
            check_is_llava(config)
        except ValueError as error:
            raise ValueError(f"{named} {str(source)!r} has {error}") from None
        return load_model(str(source), dtype or "auto", device, None)
    with reading(source):
        whole = config.model_type != "llava_onevision"
        processor = AutoProcessor.from_pretrained(source) if whole else _without_videos(source)
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"{named} {str(source)!r} has no image processor: preprocessor_config.json is missing.")
    with reading(source):
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype or "auto", device_map=device)
    return model.eval(), processor


def _without_videos(source: str | os.PathLike) -> Any:
    """The parts of a processor that are for images and text: transformers' video processors need torchvision."""
    settings, _ = ProcessorMixin.get_processor_dict(source)
    return SimpleNamespace(
        image_processor=AutoImageProcessor.from_pretrained(source),
        tokenizer=(tokenizer := AutoTokenizer.from_pretrained(source)),
        image_token=getattr(tokenizer, "image_token", None) or settings.get("image_token", "<image>"),
        chat_template=settings.get("chat_template") or tokenizer.chat_template,
    )


def picture_files(folder: str | os.PathLike) -> list[Path]:
    """The images below `folder`, recognised by suffix, in alphabetical order.

    Raises:
        FileNotFoundError: there is no such folder, or it has no images.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {str(folder)!r} is not a folder.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise FileNotFoundError(f"--images {str(folder)!r} holds no images ({', '.join(SUFFIXES)}).")
    return files
