# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""NAAViT on a LLaVA of transformers, as it is loaded and without retraining: to measure what its visual tokens do.

The model's code is not changed. Hooks set to zero what a decoder layer's attention, and its feed-forward network, add to the
hidden states of visual tokens, so that these pass through unchanged. Everything is still computed, so this saves no time: the
model that does not compute it is `SaisaForConditionalGeneration` in embedding space.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


LLAVAS = ("llava", "llava_next")


class NaavitHandle:
    """What `apply_naavit` does to a model, until `remove()` or the end of a `with` block.

    Args:
        model: a LLaVA or LLaVA-NeXT of transformers, with its head or without.
        attention, feed_forward: the decoder layers in which visual tokens get nothing from attention, or nothing from the
            feed-forward network.

    Raises:
        ValueError: another kind of model; a layer that does not exist, or is named twice.
    """

    def __init__(self, model: nn.Module, attention: Iterable[int], feed_forward: Iterable[int]):
        config, base = model.config, getattr(model, "model", model)
        decoder = getattr(base, "language_model", None)
        if config.model_type not in LLAVAS or decoder is None:
            raise ValueError(
                f"model is a {type(model).__name__} (model_type={config.model_type!r}): expected a "
                "LlavaForConditionalGeneration or LlavaNextForConditionalGeneration."
            )
        decoder_layers = getattr(decoder, "layers", ())
        if not decoder_layers or not all(
            hasattr(layer, "self_attn") and hasattr(layer, "mlp") for layer in decoder_layers
        ):
            raise ValueError(
                f"the language model of this {config.model_type} is a {config.text_config.model_type}: expected decoder "
                "layers with a self_attn and an mlp, as Llama, Mistral and Qwen2 have them."
            )
        self.attention, self.feed_forward = (_checked(x, len(decoder_layers)) for x in (attention, feed_forward))
        self._image_token_id, self._embedding = config.image_token_id, decoder.get_input_embeddings()
        self._signature = inspect.signature(base.forward)
        self._visual_BS: torch.Tensor | None = None
        self._within = False
        self._hooks: list[Any] = [
            base.register_forward_pre_hook(self._find_visual_tokens, with_kwargs=True),
            base.register_forward_hook(self._forget_visual_tokens, always_call=True),
            decoder.register_forward_pre_hook(self._enter_decoder),
        ]
        for name, chosen in (("self_attn", self.attention), ("mlp", self.feed_forward)):
            for layer in chosen:
                self._hooks.append(getattr(decoder_layers[layer], name).register_forward_hook(self._strike_out))

    def remove(self) -> None:
        """Restores the model."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> "NaavitHandle":
        return self

    def __exit__(self, *_: Any) -> None:
        self.remove()

    def _find_visual_tokens(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.get("kwargs", {})}
        self._visual_BS, self._within = None, True
        if given.get("pixel_values") is None and (given.get("mm_encoder_outputs") or {}).get("image") is None:
            return
        if given.get("input_ids") is not None:
            self._visual_BS = given["input_ids"] == self._image_token_id
        elif given.get("inputs_embeds") is not None:
            embeds = given["inputs_embeds"]
            token = torch.tensor(self._image_token_id, device=self._embedding.weight.device)
            self._visual_BS = (embeds == self._embedding(token).to(embeds)).all(-1)

    def _enter_decoder(self, module: nn.Module, args: tuple) -> None:
        if not self._within:  # called by itself: its tokens are not those of the last pass
            self._visual_BS = None

    def _forget_visual_tokens(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._within = False
        if not torch.is_grad_enabled():  # gradient checkpointing runs the layers again after the forward pass
            self._visual_BS = None

    def _strike_out(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if self._visual_BS is None:
            return None
        y_BSD = output[0] if isinstance(output, tuple) else output
        y_BSD = y_BSD.masked_fill(self._visual_BS[..., None].to(y_BSD.device), 0)
        return (y_BSD, *output[1:]) if isinstance(output, tuple) else y_BSD


def apply_naavit(
    model: nn.Module, layers: Iterable[int] | None = None, visual_feed_forward: bool = True
) -> NaavitHandle:
    """Turns a loaded LLaVA of transformers into the pilot experiment of the SAISA paper (arXiv 2502.02458), in place and
    without retraining: in the given layers visual tokens are keys and values only.

    This is for measuring and saves no time: what is set to zero is computed first. The same model that does not compute it is
    `SaisaForConditionalGeneration.from_pretrained(FOLDER, visual_attention="none")`.

    Args:
        model: a `LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration` whose language model has layers like
            Llama's (Mistral, Qwen2 ...). It runs as before: batches, padding, generation with a cache.
        layers: decoder layers, counted from 0; None: all.
        visual_feed_forward: whether visual tokens pass through the feed-forward networks of these layers. Otherwise they
            leave a layer as they entered it, as in ShortV (arXiv 2504.00502).

    Returns:
        A handle: `handle.remove()`, or the end of `with apply_naavit(...):`, restores the model.

    Raises:
        ValueError: another kind of model; a layer that does not exist, or is named twice.
    """
    if layers is None:
        decoder = getattr(getattr(model, "model", model), "language_model", None)
        layers = range(len(getattr(decoder, "layers", ())))
    layers = list(layers)
    return NaavitHandle(model, layers, [] if visual_feed_forward else layers)


def _checked(layers: Iterable[int], count: int) -> list[int]:
    layers = list(layers)
    whole = all(isinstance(layer, int) and not isinstance(layer, bool) and 0 <= layer < count for layer in layers)
    if not whole or len(set(layers)) != len(layers):
        raise ValueError(f"layers={layers!r}: expected distinct decoder layers between 0 and {count - 1}.")
    return layers
