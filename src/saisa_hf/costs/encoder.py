# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the vision encoder costs for one image, counted by running it on the meta device."""

import json
import math
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModel

from ..configuration_saisa import SaisaConfig
from ..vision_saisa import has_choice_of_attention, image_size
from .products import Pairs, Product


def encoder_flops(config: SaisaConfig) -> int:
    """FLOPs of the vision encoder for one image, counted on a model without memory, and of the choice among its patches by
    the attention of the class token. The image has the size that the number of visual tokens implies or, if these are
    reduced, the size that the encoder is made for."""
    settings = json.dumps(config.vision_config.to_dict(), sort_keys=True, default=str)
    flops = _encoder_flops(settings, _image_size(config))
    if config.visual_token_reduction == "class_attention":  # one query, all keys, and their scores
        c, tokens = config.vision_config.hidden_size, config.encoder_tokens_per_image + config.dropped_vision_tokens
        flops += 2 * (1 + tokens) * c * c + 2 * tokens * c
    return flops


def clip_products(config: SaisaConfig, images: int) -> Iterator[Product]:
    """The matrix products of a CLIP encoder that reads so many images, one by one. Its convolution is one of them."""
    vision, (height, width) = config.vision_config, image_size(config.vision_config)
    h, heads = vision.hidden_size, vision.num_attention_heads
    patches = (height // vision.patch_size) * (width // vision.patch_size)

    def linear(tokens: int, inputs: int, outputs: int) -> Product:
        sizes = (images * tokens, inputs, outputs)
        return Product("encoder", 2 * math.prod(sizes), sizes)

    yield linear(patches, vision.num_channels * vision.patch_size**2, h)
    pairs = Pairs(images, patches + 1, patches + 1, heads, heads, h // heads, causal=False)
    for _ in range(vision.num_hidden_layers):
        yield from (linear(patches + 1, h, h) for _ in ("queries", "keys", "values", "output"))
        yield Product("encoder", pairs.flops, pairs=pairs)
        yield linear(patches + 1, h, vision.intermediate_size)
        yield linear(patches + 1, vision.intermediate_size, h)


def _image_size(config: SaisaConfig) -> tuple[int, int]:
    """(height, width) of processed images. They may differ from those that the encoder's configuration names: DINOv2, whose
    positions are interpolated, is configured for 518 x 518 pixels and gets 224 x 224 from its image processor."""
    vision, (height, width) = config.vision_config, image_size(config.vision_config)
    kept, patch = config.kept_prefix_tokens, getattr(vision, "patch_size", None)
    if config.visual_token_reduction is None and isinstance(patch, int):
        of_patches = (height // patch) * (width // patch) + kept == config.encoder_tokens_per_image
        side = math.isqrt(config.image_seq_length - kept)
        if of_patches and side**2 + kept == config.image_seq_length != config.encoder_tokens_per_image:
            return side * patch, side * patch
    return height, width


@lru_cache(maxsize=8)
def _encoder_flops(settings: str, size: tuple[int, int]) -> int:
    config = CONFIG_MAPPING[json.loads(settings)["model_type"]].from_dict(json.loads(settings))
    arguments = {"attn_implementation": "eager"} if has_choice_of_attention(config) else {}
    channels = getattr(config, "num_channels", 3)
    with torch.device("meta"):
        encoder = AutoModel.from_config(config, **arguments).eval()
        dtype = next(encoder.parameters()).dtype
        inputs: dict[str, torch.Tensor | None] = {"pixel_values": torch.empty(1, channels, *size, dtype=dtype)}
        if (
            config.model_type == "siglip2_vision_model"
        ):  # takes patches, and values that say how many there are each way
            patches, side = config.num_patches, math.isqrt(config.num_patches)
            inputs["pixel_values"] = torch.empty(1, patches, channels * config.patch_size**2, dtype=dtype)
            inputs["pixel_attention_mask"] = None
            inputs["spatial_shapes"] = torch.tensor([[side, side]], device="cpu")
        with FlopCounterMode(display=False) as counter:
            encoder(**inputs)
    return counter.get_total_flops()
