# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a vision encoder hands out: how many states, how wide, of how many tokens, and how many of these are no patches.

For the encoders in `CLASS_TOKENS` the configuration says so. Any other that transformers' `AutoModel` builds is asked: it is
made without memory and run on a picture without memory.
"""

import json
from functools import lru_cache
from typing import NamedTuple

import torch
from transformers import AutoModel

from .compat_saisa import model_class_of


# encoder -> how many tokens in front of the patch tokens are no picture of a patch
CLASS_TOKENS = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "siglip2_vision_model": 0,
    "dinov2": 1,
    "convnext": 0,
}


class EncoderStates(NamedTuple):
    """Of each state in an encoder's `hidden_states`, for pictures of the size that its config names.

    Attributes:
        widths: channels.
        tokens: tokens, class and register tokens included; of a feature map, its height times its width.
        prefix: how many tokens at the front are no picture of a patch.
    """

    widths: tuple[int, ...]
    tokens: tuple[int, ...]
    prefix: int


def encoder_states(config) -> EncoderStates:
    """What the encoder of `config`, which is none of `CLASS_TOKENS`, hands out.

    Raises:
        ValueError: it cannot be built, or yields no states for a picture.
        ImportError: it needs a package that is not installed, timm for instance.
    """
    settings = {key: value for key, value in config.to_dict().items() if "attn_implementation" not in key}
    return _asked(type(config), json.dumps(settings, sort_keys=True, default=str))


def picture_size(config) -> tuple[int, int]:
    """(height, width) of the pictures that an encoder is made for."""
    size = (
        getattr(config, "image_size", None) or (getattr(config, "pretrained_cfg", None) or {}).get("input_size") or 224
    )
    return (size, size) if isinstance(size, int) else tuple(size[-2:])


def has_choice_of_attention(config) -> bool:
    """Whether the encoder of `config` has attention whose implementation can be chosen; a convolutional one has none."""
    model_class = model_class_of(config)
    if model_class is None:
        return config.model_type not in ("convnext", "convnextv2", "regnet", "resnet")
    return bool(getattr(model_class, "_supports_sdpa", False))


@lru_cache(maxsize=32)
def _asked(config_class: type, settings: str) -> EncoderStates:
    settings = json.loads(settings)
    name = settings["model_type"]
    config = config_class.from_dict(settings)
    height, width = picture_size(config)
    try:
        with torch.device("meta"), torch.no_grad():
            encoder = AutoModel.from_config(config).eval()
            pixel_values = torch.empty(1, getattr(config, "num_channels", 3), height, width)
            pixel_values = pixel_values.to(next(encoder.parameters()).dtype)
            states = encoder(pixel_values=pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    except ImportError as error:
        extra = ": pip install 'saisa-hf[timm]'" if name == "timm_wrapper" else ""
        raise ImportError(
            f"vision_config.model_type={name!r} needs a package that is not installed{extra}. {error}"
        ) from error
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"vision_config.model_type={name!r} is not supported: it is no encoder that takes pictures of {height} x {width} "
            f"pixels as `pixel_values` ({type(error).__name__}: {reason}). Such are {', '.join(CLASS_TOKENS)} and vit."
        ) from error
    if not states or any(state.ndim not in (3, 4) for state in states):
        raise ValueError(f"vision_config.model_type={name!r} is not supported: it yields no hidden states of patches.")
    hidden_size = getattr(config, "hidden_size", None)
    if any(state.ndim == 4 and state.shape[-1] == hidden_size != state.shape[1] for state in states):
        raise ValueError(f"vision_config.model_type={name!r} is not supported: its feature maps have channels last.")
    widths = tuple(state.shape[1 if state.ndim == 4 else 2] for state in states)
    tokens = tuple(state.shape[2] * state.shape[3] if state.ndim == 4 else state.shape[1] for state in states)
    return EncoderStates(widths, tokens, _prefix(config, states, tokens))


def _prefix(config, states, tokens: tuple[int, ...]) -> int:
    """Tokens beyond those of a grid of patches, where all states have the same."""
    patch = getattr(config, "patch_size", None)
    if patch is None or len(set(tokens)) > 1 or states[0].ndim == 4:
        return 0
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    height, width = picture_size(config)
    return max(tokens[0] - (height // rows) * (width // columns), 0)
