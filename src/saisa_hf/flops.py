# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a prompt costs, from the configuration alone: floating-point operations, parameters, cache and activations of a SAISA,
of a LLaVA and of a Flamingo with the same language model and encoder.

Counted are matrix products, a multiply-add as two, as PyTorch's `FlopCounterMode` counts them: all query-key pairs, whether
masked or not, no norms, activations, rotations and lookups. For a language model without grouped queries these are the
formulas of the paper (arXiv 2502.02458, section 3.3), which leaves out the encoder, the head and LLaVA's projector.

Letters: t text and v visual tokens of a sample, h hidden size, q and k widths of all query and of all key heads, m inner
width of the feed-forward network, c width of the encoder's features, p inner width of the projectors.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModel

from .encoders_saisa import has_choice_of_attention, picture_size
from .language_models_saisa import language_model_family


PARTS = ("encoder", "projectors", "attention projections", "attention scores", "feed-forward", "head")
ARCHITECTURES = ("saisa", "llava", "flamingo", "language_model")


@dataclass(frozen=True)
class Step:
    """What one forward pass is about.

    Attributes:
        text, visual: new tokens of each sample.
        cached_text, cached_visual: those that are in the cache already.
        batch: samples.
        logits: rows of each sample that the head is applied to; None: all that have an output.
    """

    text: int
    visual: int
    cached_text: int = 0
    cached_visual: int = 0
    batch: int = 1
    logits: int | None = 1

    def next_token(self) -> "Step":
        """The step that decodes one token behind this one."""
        text, visual = self.cached_text + self.text, self.cached_visual + self.visual
        return replace(self, text=1, visual=0, cached_text=text, cached_visual=visual)


@dataclass(frozen=True)
class Product:
    """Matrix products of one kind in the forward pass.

    Attributes:
        part: one of `PARTS`.
        flops: two per multiply-add.
        sizes: (rows, inputs, outputs) of a product with a weight; None for queries with keys and probabilities with values.
        layer: of the decoder; None outside.
        of: what is multiplied: `"features"` of the encoder, `"visual"` tokens on the way from a projector, what enters a layer
            as `"text"`, or the `"attended"` behind its attention.
    """

    part: str
    flops: int
    sizes: tuple[int, int, int] | None = None
    layer: int | None = None
    of: str = "text"


def step_flops(config, architecture: str, step: Step, cross_every: int = 4) -> dict[str, int]:
    """FLOPs of one forward pass by part, the encoder left out.

    Args:
        config: a `SaisaConfig`.
        architecture: one of `ARCHITECTURES`; `"language_model"` reads the text alone.
        cross_every: the Flamingo's gated cross-attention stands in front of each so many layers.

    Raises:
        ValueError: there is no such architecture.
    """
    counts = dict.fromkeys(PARTS, 0)
    for product in _products(config, architecture, step, cross_every):
        counts[product.part] += product.flops
    return counts


def training_flops(
    config, architecture: str, step: Step, trained: str = "full", rank: int = 64, cross_every: int = 4
) -> int:
    """FLOPs of a training step: forward and backward pass, the encoder left out, without gradient checkpointing.

    A product with a weight costs as much again for the gradient of its input, where something below is trained, and for
    that of the weight, where it is trained. SAISA's loss makes its logits again in backward.

    Args:
        config, architecture, step, cross_every: as for `step_flops`; `step.logits` are a sample's rows that
            get logits.
        trained: `"full"` (all but the encoder), `"projectors"`, or `"lora"`: adapters on every linear map of decoder and
            projectors.
        rank: of the adapters.

    Raises:
        ValueError: `trained` is none of these, or asks for something that a Flamingo or a language model has not.
    """
    if trained not in ("full", "projectors", "lora") or (trained != "full" and architecture not in ("saisa", "llava")):
        raise ValueError(f"trained={trained!r}: expected 'full', or for SAISA and LLaVA 'projectors' or 'lora'.")
    full, adapted = trained == "full", trained == "lora"
    family = language_model_family(config.text_config)
    first = next(layer for layer in range(config.text_config.num_hidden_layers) if config.sees_image(layer))
    total = 0
    for product in _products(config, architecture, step, cross_every):
        layer = product.layer
        # whether what enters the layer, its queries and its keys depend on anything that is trained
        entering = full or architecture == "llava" or layer is None or layer > (0 if adapted else first)
        queries = entering or adapted
        keys = queries or layer == first
        if product.sizes is None:
            total += product.flops + product.flops // 2 * (queries + 3 * keys)
            continue
        needs_input = {"features": False, "visual": True, "text": entering, "attended": keys}[product.of]
        has_weight = full or (trained == "projectors" and product.part == "projectors")
        again = architecture == "saisa" and product.part == "head"
        total += product.flops * (1 + needs_input + has_weight + again)
        routed = product.part == "feed-forward" and _gates(family, layer) > 0
        if adapted and product.part != "head" and not routed:
            rows, inputs, outputs = product.sizes
            total += 2 * rows * rank * (inputs * (2 + needs_input) + outputs * 3) * (outputs > 0)
    return total


def _products(config, architecture: str, step: Step, cross_every: int) -> Iterator[Product]:
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r}: expected one of {', '.join(map(repr, ARCHITECTURES))}.")
    text, family, batch = config.text_config, language_model_family(config.text_config), step.batch
    h = text.hidden_size
    q, k = (heads * family.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    c, p = config.vision_feature_size, config.projector_hidden_size or h
    visual = 0 if architecture == "language_model" else step.visual
    seen = 0 if architecture == "language_model" else step.visual + step.cached_visual

    def linear(part, rows, inputs, outputs, layer=None, of="text"):
        return Product(part, 2 * batch * rows * inputs * outputs, (batch * rows, inputs, outputs), layer, of)

    def projector(inner, layer=None):
        yield linear("projectors", visual, c, inner, layer, "features")
        yield linear("projectors", visual, inner, h, layer, "visual")

    def attention(queries, keys, layer):
        return Product("attention scores", 4 * batch * q * queries * keys, layer=layer)

    def feed_forward(rows, inner, layer):
        for inputs, outputs in ((h, inner), (h, inner), (inner, h)):
            yield linear("feed-forward", rows, inputs, outputs, layer, "attended")

    rows = step.text + (visual if architecture == "llava" else 0)
    keys = step.text + step.cached_text + (0 if architecture == "flamingo" else seen)
    if architecture == "llava":
        yield from projector(h)
    if architecture == "saisa" and config.projector_sharing == "shared":
        yield from projector(p)
    for layer, inner in enumerate(family.feed_forward_sizes()):
        if architecture == "flamingo" and layer % cross_every == 0:
            yield linear("attention projections", step.text, h, q, layer)
            for _ in ("keys", "values"):  # transformers' Idefics keeps none of the picture: each step makes them again
                yield linear("attention projections", seen, c, k, layer, "features")
            yield attention(step.text, seen, layer)
            yield linear("attention projections", step.text, q, h, layer, "attended")
            yield from feed_forward(step.text, text.intermediate_size, layer)
        if architecture == "saisa" and config.sees_image(layer):
            if config.projector_sharing == "per_layer":
                yield from projector(p, layer)
            for _ in ("keys", "values"):
                yield linear("attention projections", visual, h, k, layer, "visual")
        for outputs in (q, k, k):
            yield linear("attention projections", rows, h, outputs, layer)
        yield attention(rows, keys, layer)
        yield linear("attention projections", rows, q, h, layer, "attended")
        yield from feed_forward(rows, inner, layer)
        yield linear("feed-forward", rows, h, _gates(family, layer), layer, "attended")
    yield linear("head", rows if step.logits is None else step.logits, h, text.vocab_size)


def _gates(family, layer: int) -> int:
    """How many experts a token of the layer chooses among; 0 where there is one feed-forward network."""
    if hasattr(family, "is_sparse"):
        return family.config.num_experts if family.is_sparse(layer) else 0
    return getattr(family.config, "num_local_experts", 0)


def encoder_flops(config) -> int:
    """FLOPs of the vision encoder for one picture of the size it is made for, counted on a model without memory."""
    return _encoder_flops(json.dumps(config.vision_config.to_dict(), sort_keys=True, default=str))


@lru_cache(maxsize=8)
def _encoder_flops(settings: str) -> int:
    config = CONFIG_MAPPING[json.loads(settings)["model_type"]].from_dict(json.loads(settings))
    height, width = picture_size(config)
    arguments = {"attn_implementation": "eager"} if has_choice_of_attention(config) else {}
    with torch.device("meta"):
        encoder = AutoModel.from_config(config, **arguments).eval()
        pixel_values = torch.empty(1, getattr(config, "num_channels", 3), height, width)
        with FlopCounterMode(display=False) as counter:
            encoder(pixel_values=pixel_values.to(next(encoder.parameters()).dtype))
    return counter.get_total_flops()
