# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa fit`: what fits into a given memory (dtype, quantization, context and images), from the configuration alone.

Bytes of weights are counted as bitsandbytes stores them; cache and activations are those of `saisa flops`.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from ..common.tables import table
from ..configuration_saisa import SaisaConfig
from ..hardware_saisa import KEPT_PRECISE
from ..modeling_saisa import SaisaForConditionalGeneration
from .images import image_of
from .products import Step
from .sizes import activation_bytes, cache_bytes, folded_numbers


# dtype of what is not quantized, and the quantization of the decoder layers' linear maps
WAYS = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "8-bit": (torch.bfloat16, "8-bit"),
    "4-bit (nf4)": (torch.bfloat16, "4-bit"),
    "4-bit (nf4), double quantization": (torch.bfloat16, "4-bit twice"),
}
BLOCK, OUTER_BLOCK = 64, 256  # weights that share a scale, and scales that share one of their own
UNITS = {"B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
MOST_TOKENS = 2**22


def bytes_of(text: str) -> int:
    """`"8GiB"`, `"8 GB"`, `"8000MB"` in bytes; `"0"` needs no unit.

    Raises:
        ValueError: it is not a size, or has no unit.
    """
    found = re.fullmatch(r"(\d{1,20}|\d{0,20}\.\d{1,20})\s*(?:([KMGT]I?)B?|(B))", text.strip().upper())
    if found:
        return int(float(found[1]) * UNITS[found[2] or found[3]])
    if text.strip() == "0":
        return 0
    raise ValueError(f"{text!r} is not a size of memory: expected a number with a unit, such as 8GiB or 8GB.")


class Weight(NamedTuple):
    """A parameter: how many numbers and rows it has, and whether quantization applies to it."""

    numbers: int
    rows: int
    quantizable: bool


def weight_bytes(config: SaisaConfig, way: str) -> int:
    """Bytes of the weights of a model of `config`, loaded in one of `WAYS`; of folded ones, which are not quantized, too."""
    return _stored_bytes(_weights(config), way) + _folded_bytes(config, way)


def _folded_bytes(config: SaisaConfig, way: str) -> int:
    dtype, quantization = WAYS[way]
    return folded_numbers(config) * dtype.itemsize if quantization is None else 0


def _weights(config: SaisaConfig) -> list[Weight]:
    with torch.device("meta"):
        model = SaisaForConditionalGeneration(config)
    quantizable = {
        module.weight
        for name, module in model.named_modules()
        if type(module) is nn.Linear and not any(part in name for part in KEPT_PRECISE)
    }
    return [Weight(p.numel(), p.shape[0] if p.ndim else 1, p in quantizable) for p in model.parameters()]


def _stored_bytes(weights: list[Weight], way: str) -> int:
    dtype, quantization = WAYS[way]
    total = 0
    for numbers, rows, quantizable in weights:
        if not quantizable or quantization is None:
            total += numbers * dtype.itemsize
        elif quantization == "8-bit":
            total += numbers + 4 * rows
        else:
            scales = -(-numbers // BLOCK)
            of_scales = 4 * scales if quantization == "4-bit" else scales + 4 * -(-scales // OUTER_BLOCK) + 4 * 256
            total += -(-numbers // 2) + of_scales + 4 * 16
    return total


def use_bytes(
    config: SaisaConfig, way: str, text: int, images: int, generated: int = 0, batch: int = 1
) -> dict[str, int]:
    """Bytes beside the weights: `"cache"` after the last token, and `"work"`, the most that is held at once beside the cache
    while a prompt of `text` tokens and `images` images is read.

    Args:
        text, images, generated: of each of `batch` samples.
    """
    dtype, quantization = WAYS[way]
    image = image_of(config)
    step = Step(text, images * image.length, batch=batch)
    behind = Step(text + max(generated - 1, 0), step.visual, batch=batch)  # the last token is not read again
    decoder, vision = config.text_config, config.vision_config
    work = activation_bytes(config, "saisa", step, dtype.itemsize)
    width = getattr(vision, "hidden_size", config.vision_feature_size)
    states = getattr(vision, "num_hidden_layers", 0) + 1
    inner = getattr(vision, "intermediate_size", None) or 4 * width
    # all states of the encoder are kept until the end of its pass, beside what its last layer works with
    each = config.image_seq_length if config.visual_token_reduction is None else config.encoder_tokens_per_image
    patches = batch * images * image.pictures * each
    encoder = patches * dtype.itemsize * (states * width + 4 * width + 2 * inner)
    if quantization is not None:  # a prompt's products take the largest matrix in full
        work += decoder.hidden_size * max(decoder.intermediate_size, decoder.hidden_size) * dtype.itemsize
    logits = 4 * batch * decoder.vocab_size * 2
    cache = cache_bytes(config, "saisa", behind, dtype.itemsize)
    # the cache is filled only after the encoder is done
    return {"cache": cache, "work": max(work, encoder - cache) + logits}


def fit(
    config: SaisaConfig, memory: int, text: int = 512, images: int = 1, generated: int = 256, batch: int = 1
) -> list[dict]:
    """For each of `WAYS` the bytes of `weights`, `cache` and `work`, whether it `fits` into `memory` bytes, whether the model
    has enough positions for prompt and answer (`in_context`), and the largest `text` with this number of images and the
    largest number of `images` with this much text (None: none fits)."""
    parameters = _weights(config)
    weights = {way: _stored_bytes(parameters, way) + _folded_bytes(config, way) for way in WAYS}
    return [_fit(config, way, weights[way], memory, text, images, generated, batch) for way in WAYS]


def _fit(
    config: SaisaConfig, way: str, weights: int, memory: int, text: int, images: int, generated: int, batch: int
) -> dict:
    limit = getattr(config.text_config, "max_position_embeddings", MOST_TOKENS)
    each = image_of(config).length
    room = limit - generated - images * each
    most_images = (limit - generated - text) // each
    parts = {"weights": weights, **use_bytes(config, way, text, images, generated, batch)}

    def fits(text: int, images: int) -> bool:
        return weights + sum(use_bytes(config, way, text, images, generated, batch).values()) <= memory

    return {
        "way": way,
        **parts,
        "fits": sum(parts.values()) <= memory,
        "in_context": text <= room,
        "largest_text": _largest(lambda count: fits(count, images), 1, room),
        "largest_images": _largest(lambda count: fits(text, count), 0, most_images),
    }


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int | None:
    """The largest number in [low, high] that `fits`, as all smaller ones do; None if `low` does not."""
    if high < low or not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def show(found: list[dict], memory: int, text: int, images: int) -> str:
    """`fit`'s result as a table, and what follows from it."""

    def gib(count: int) -> str:
        return f"{count / 2**30:.2f}"

    rows = []
    for one in found:
        total = sum(one[part] for part in ("weights", "cache", "work"))
        most = ["-" if one[name] is None else str(one[name]) for name in ("largest_text", "largest_images")]
        answer = "yes" if one["fits"] else "no"
        rows.append([one["way"], *map(gib, (one["weights"], one["cache"], one["work"], total)), answer, *most])
    header = [
        "GiB",
        "weights",
        "cache",
        "work",
        "total",
        "fits",
        f"text with {images} image{'' if images == 1 else 's'}",
    ]
    lines = [table([*header, f"images with {text} tokens"], rows)]
    fitting = [one["way"] for one in found if one["fits"]]
    if fitting:
        lines.append(f"The most precise that fits into {gib(memory)} GiB: {fitting[0]}.")
    else:
        lines.append(
            f"None of them fits into {gib(memory)} GiB: use fewer tokens or images, or keep layers elsewhere "
            "(device_map='auto')."
        )
    if not found[0]["in_context"]:
        lines.append(
            "But prompt and answer are longer than the model has positions for: use less text or fewer images."
        )
    return "\n".join(lines)
