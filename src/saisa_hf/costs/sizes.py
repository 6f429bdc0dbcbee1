# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""How large a model and what it keeps are, from the configuration alone: parameters, cache and activations."""

import json
from functools import lru_cache

import torch

from ..configuration_saisa import SaisaConfig
from ..language_models_saisa import language_model_family
from ..modeling_saisa import SaisaForConditionalGeneration
from .products import Step, cached_tokens, feed_forward_sizes, has_visual_outputs, visual_rows


def cache_bytes(config: SaisaConfig, architecture: str, step: Step, itemsize: int) -> int:
    """Bytes of the keys and values in the cache after `step`, one that the model makes. A Flamingo's cross-attention keeps
    nothing."""
    family, behind = language_model_family(config.text_config), step.next_token()
    tokens = sum(
        cached_tokens(config, architecture, layer, behind) for layer in range(config.text_config.num_hidden_layers)
    )
    return 2 * step.batch * tokens * config.text_config.num_key_value_heads * family.head_dim * itemsize


def activation_bytes(config: SaisaConfig, architecture: str, step: Step, itemsize: int) -> int:
    """Approximately the most bytes that a prefill without a cache and with fused attention holds at once, beside weights and
    features: an estimate from the tensors that a layer needs (docs/flops.md says how good it is).

    Rows of the hidden states are held as embeddings, as the layer's input, behind its attention and behind a norm. To these
    comes the largest of three: the feed-forward network (two inner rows and their product), the queries, keys and values of
    attention, or, in a SAISA, a layer's visual tokens in the norm, which computes in float32.
    """
    text, family = config.text_config, language_model_family(config.text_config)
    h, c, size = text.hidden_size, config.vision_feature_size, family.head_dim
    q, k = (heads * size for heads in (text.num_attention_heads, text.num_key_value_heads))
    inner = max(feed_forward_sizes(family))
    t, v = step.text, 0 if architecture == "language_model" else step.visual
    layers = [visual_rows(config, architecture, layer) for layer in range(text.num_hidden_layers)]
    attend, fed = map(any, zip(*layers))
    travel = has_visual_outputs(config, architecture)
    held = 4 * (t + v * travel) * h + 2 * (t + (v if architecture in ("saisa", "llava") else 0)) * size
    feed_forward, attention, norm = 3 * (t + v * fed) * inner, (t + v * attend) * (3 * q + 2 * k), 0
    if travel:
        held += v * h
    if architecture == "flamingo":
        attention += 2 * v * k
    if architecture == "saisa" and not attend:
        held += 0 if travel else 2 * v * c
        feed_forward += 2 * v * k  # a layer keeps its visual keys and values until its end
        attention += 2 * v * k + 2 * (t + v) * k  # and joins them with the text's
        normed = config.folded_width if config.fold_projectors else h
        norm = v * normed * (3 if itemsize == 4 else 1 + 8 // itemsize)
    return step.batch * itemsize * (held + max(feed_forward, attention, norm))


def folded_numbers(config: SaisaConfig) -> int:
    """How many numbers folded weights are, beside the parameters; 0 without `fold_projectors`."""
    if not config.fold_projectors:
        return 0
    text, family, width = config.text_config, language_model_family(config.text_config), config.folded_width
    k = text.num_key_value_heads * family.head_dim
    has_norm, has_bias = family.norms.before_attention is not None, family.qkv_bias
    seeing = sum(config.sees_image(layer) for layer in range(text.num_hidden_layers))
    return seeing * (2 * k * (width + has_bias) + width * width * has_norm)


def parameters(config: SaisaConfig, architecture: str, cross_every: int = 4) -> dict[str, int]:
    """Parameters by part. Those of SAISA are counted on a model without memory. A LLaVA has one projector instead of SAISA's;
    a Flamingo has gated cross-attention (with a feed-forward network, two norms and two gates) before every `cross_every`
    layers. A tied head has none."""
    text, family = config.text_config, language_model_family(config.text_config)
    counts = dict(_saisa_parameters(json.dumps(config.to_dict(), sort_keys=True, default=str)))
    if architecture == "saisa":
        return counts
    h, c, bias = text.hidden_size, config.vision_feature_size, config.projector_bias
    counts["projectors"] = c * h + h * h + 2 * h * bias if architecture == "llava" else 0
    if architecture == "flamingo":
        blocks = -(-text.num_hidden_layers // cross_every)
        q, k = (heads * family.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
        counts["attention"] += blocks * (2 * h * q + 2 * c * k)
        counts["feed-forward"] += blocks * 3 * h * text.intermediate_size
        counts["norms"] += blocks * (2 * h + 2)
    if architecture == "language_model":
        counts["encoder"] = 0
    return counts


@lru_cache(maxsize=8)
def _saisa_parameters(settings: str) -> tuple[tuple[str, int], ...]:
    plain = {key: value for key, value in json.loads(settings).items() if key != "quantization_config"}
    with torch.device("meta"):
        model = SaisaForConditionalGeneration(SaisaConfig.from_dict(plain))
    names = {"vision_tower.": "encoder", "visual_resampler.": "encoder"}
    names |= {"visual_projector.": "projectors", "self_attn.": "attention"}
    names |= {".mlp.": "feed-forward", "moe.": "feed-forward", "embed_tokens.": "embedding", "lm_head.": "head"}
    counts = dict.fromkeys(("encoder", "projectors", "embedding", "attention", "feed-forward", "norms", "head"), 0)
    for name, parameter in model.named_parameters():
        part = next((part for piece, part in names.items() if piece in name), "norms")
        counts[part] += parameter.numel()
    return tuple(counts.items())
