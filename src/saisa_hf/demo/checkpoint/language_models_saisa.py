# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The supported language models: where each family's parts are in transformers, and how its attention differs.

A decoder layer is the same for all of them: norm, attention, residual, norm, feed-forward network, residual.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class LanguageModelFamily:
    """The parts that `modeling_saisa.py` assembles a decoder from.

    Attributes:
        norm: RMSNorm class, `norm(size, eps=...)`.
        feed_forward: gated MLP class, `feed_forward(config)`.
        rotary_embedding: class whose instances map `(x, position_ids)` to the cosines and sines of the rotation.
        rotate_half: the rotation by a quarter turn that these are applied with.
        eager_attention: attention in plain matrix products, which also returns the probabilities.
        qkv_bias, output_bias: whether the query, key and value projections and the output projection have biases.
        qk_norm: whether queries and keys pass an RMSNorm over the head before they are rotated.
        attention_types: for each decoder layer `"full_attention"` or `"sliding_attention"`.
    """

    norm: type
    feed_forward: type
    rotary_embedding: type
    rotate_half: Callable
    eager_attention: Callable
    qkv_bias: bool
    output_bias: bool
    qk_norm: bool
    attention_types: tuple[str, ...]


def language_model_family(config) -> LanguageModelFamily:
    """The parts for `config`, a `LlamaConfig`, `MistralConfig`, `Qwen2Config` or `Qwen3Config`.

    Raises:
        KeyError: another `model_type`. `SaisaConfig` has refused it before.
    """
    name = config.model_type
    module = importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    prefix = name.capitalize()
    qkv_bias, output_bias = {
        "llama": lambda: (config.attention_bias, config.attention_bias),
        "mistral": lambda: (False, False),
        "qwen2": lambda: (True, False),
        "qwen3": lambda: (config.attention_bias, config.attention_bias),
    }[name]()
    return LanguageModelFamily(
        norm=getattr(module, f"{prefix}RMSNorm"),
        feed_forward=getattr(module, f"{prefix}MLP"),
        rotary_embedding=getattr(module, f"{prefix}RotaryEmbedding"),
        rotate_half=module.rotate_half,
        eager_attention=module.eager_attention_forward,
        qkv_bias=qkv_bias,
        output_bias=output_bias,
        qk_norm=name == "qwen3",
        attention_types=_attention_types(config),
    )


def checkpoint_state_dict(decoder) -> dict:
    """The tensors of `decoder`, transformers' model without its head, under the names that they have in checkpoints."""
    return decoder.state_dict()


def _attention_types(config) -> tuple[str, ...]:
    if config.model_type in ("qwen2", "qwen3"):
        return tuple(config.layer_types)
    windowed = config.model_type == "mistral" and config.sliding_window is not None
    return ("sliding_attention" if windowed else "full_attention",) * config.num_hidden_layers
