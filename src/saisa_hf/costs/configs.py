# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The configuration that is counted, given by name."""

from typing import Any

from transformers import AutoConfig

from ..common.sources import check_local, first_line, reading
from ..configuration_saisa import SaisaConfig
from .presets import CLIP_336, LANGUAGE_MODELS


def read_config(model: str) -> SaisaConfig:
    """The configuration of a SAISA with the sizes of `model`: a preset (`LANGUAGE_MODELS`), or the folder or hub id of a
    SAISA, of a LLaVA or of a language model, which gets the paper's encoder.

    Raises:
        ValueError: it is a model of another kind.
        OSError: there is no such folder or repository.
    """
    if model in LANGUAGE_MODELS:
        return _with_encoder(dict(LANGUAGE_MODELS[model]), dict(CLIP_336))
    try:
        with reading(model):
            config = AutoConfig.from_pretrained(check_local("MODEL", model) or model)
    except OSError as error:
        raise OSError(
            f"{model!r} is neither a preset ({', '.join(LANGUAGE_MODELS)}) nor a folder or hub id with a config.json: "
            f"{first_line(error)}"
        ) from error
    if isinstance(config, SaisaConfig):
        return config
    if hasattr(config, "vision_config") and hasattr(config, "text_config"):
        names = (
            "vision_feature_layer",
            "vision_feature_select_strategy",
            "image_grid_pinpoints",
            "vision_aspect_ratio",
        )
        settings = {name: getattr(config, name) for name in names if hasattr(config, name)}
        settings["projector_bias"] = getattr(config, "multimodal_projector_bias", True)
        return _with_encoder(config.text_config, config.vision_config, **settings)
    return _with_encoder(config, dict(CLIP_336))


def _with_encoder(text_config: Any, vision_config: Any, **settings: Any) -> SaisaConfig:
    # any token will do: it does not affect the counts
    return SaisaConfig(text_config=text_config, vision_config=vision_config, image_token_id=0, **settings)
