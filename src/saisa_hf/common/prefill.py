# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Prompts read in one graph of `torch.compile`, made once for each bucket of lengths: `model.compile_prefill`.

Where text and images stand depends on the tokens. So it is found out in front of the graph, and enters it as tensors, padded
to the lengths of a bucket: more columns in front of the text, more rows behind the visual tokens, more positions behind the
input, each of which repeats the last one. The graph holds projectors, decoder layers, norm and head, and writes keys and
values into the cache. The vision encoder is not part of it: its shapes depend on the images alone.

Shape suffixes as in `modeling_saisa.py`; M places that a cache has, X numbers in any axes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..attention_saisa import empty_cache
from ..compat_saisa import CACHE, DynamicLayer, in_several_processes, initialize, one_cache, optional, warn_once
from ..head_saisa import IMAGES
from ..modeling_saisa import SaisaCausalLMOutputWithPast
from ..token_layout_saisa import TokenLayout, real_tokens
from ..visual_states_saisa import GivenImages


StaticLayer = optional("transformers.cache_utils", "StaticLayer")

# arguments of `forward` that a compiled prefill knows; with any other, the call is an ordinary one
KNOWN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "past_key_values", "cache", "use_cache"}
KNOWN |= {"logits_to_keep", "cache_position", "return_dict", *IMAGES}
# in a process: PyTorch's own limits are for code that nobody meant to be compiled so often
LIMITS = {"recompile_limit": 1024, "accumulated_recompile_limit": 1024}
LEFT = "compile_prefill: there are prompts that are read as if without it, as {}."
ONE_AT_A_TIME = threading.Lock()  # what PyTorch's limits are is the process's state, and so are CUDA graphs
FINE, COARSE = (8, 16), (2, 32)  # how many lengths there are in an octave, and the least


class Bucket(NamedTuple):
    """What prompts that share a graph have in common."""

    rows: int  # B
    text: int  # T, columns of text
    visual: int  # V, rows of visual tokens
    length: int  # S, positions
    keys: int  # L, keys in view
    places: int  # M; 0 without a cache


class CompiledPrefill:
    """What `SaisaForConditionalGeneration.compile_prefill` makes. A model calls it in front of its `forward`.

    Args:
        text_lengths, visual_lengths: the lengths of buckets; None for the default ones.
        options: of `torch.compile`.

    Attributes:
        buckets: of the prompts so far, each once. One bucket has several graphs where prompts differ in more than lengths:
            images as pixels or as keys and values that are kept, `inputs_embeds`, all logits or the last.

    Raises:
        ValueError: lengths are not positive integers.
    """

    def __init__(
        self, text_lengths: Iterable[int] | None = None, visual_lengths: Iterable[int] | None = None, **options: Any
    ):
        self.text_lengths = _checked("text_lengths", text_lengths)
        self.visual_lengths = _checked("visual_lengths", visual_lengths)
        self.options = {"fullgraph": True, "dynamic": False, **options}
        self.buckets: dict[Bucket, None] = {}
        self._run: Any = torch.compile(_logits, **self.options)

    def __reduce__(self) -> tuple:  # a copy of the model makes graphs of its own
        return partial(CompiledPrefill, self.text_lengths, self.visual_lengths, **self.options), ()

    def __call__(self, model: Any, arguments: Mapping[str, Any]) -> SaisaCausalLMOutputWithPast | None:
        """The output of `model.forward(**arguments)`; None, and nothing done, where that has to run itself.

        Raises:
            ValueError: see `SaisaModel.forward`.
        """
        given = {name: x for name, x in arguments.items() if x is not None and x is not False}
        if arguments.get("return_dict") is False or not _is_prefill(model, given):
            return None
        decoder, use_cache = model.language_model, arguments.get("use_cache")
        use_cache = decoder.config.use_cache if use_cache is None else use_cache
        cache = one_cache(given.get("past_key_values"), given.get("cache"))
        if cache is None and use_cache:
            cache = empty_cache(decoder)
        reason = _hindrance(model, cache)
        if reason is not None:
            warn_once(LEFT.format(reason))
            return None
        prompt = Prompt(model, given, cache)
        bucket = prompt.bucket(self.text_lengths, self.visual_lengths)
        if bucket is None:
            warn_once(LEFT.format("one is longer than the longest bucket, or than the cache"))
            return None
        images = prompt.encoded_images()
        keys_values = _places(model, cache, bucket)
        with ONE_AT_A_TIME, torch._dynamo.config.patch(LIMITS):
            torch.compiler.cudagraph_mark_step_begin()
            logits = self._run(model, *prompt.padded(images, bucket), *keys_values, bucket.keys)
            logits = logits[:, : prompt.length].clone()  # a CUDA graph writes the next ones to the same place
        _fill(cache, keys_values, prompt.past, prompt.length)
        self.buckets[bucket] = None
        return SaisaCausalLMOutputWithPast(
            logits=logits,
            image_hidden_states=images and images.features,
            **{CACHE: cache if use_cache else None},
        )


def _checked(name: str, lengths: Iterable[int] | None) -> list[int] | None:
    if lengths is None:
        return None
    found = list(lengths) if isinstance(lengths, Iterable) and not isinstance(lengths, str) else []
    if not found or any(type(length) is not int or length < 1 for length in found):
        raise ValueError(f"{name}={lengths!r}: expected positive integers, (64, 128, 256) for instance, or None.")
    return sorted(found)


def rounded(length: int, in_octave: int, least: int) -> int:
    """The first number that is not below `length`, of those from `least` on of which there are `in_octave` from one power of
    two to the next. No tokens stay none."""
    if length == 0:
        return 0
    length = max(length, least)
    step = max(1, 2 ** ((length - 1).bit_length() - 1) // in_octave)
    return -(-length // step) * step


def bucketed(length: int, lengths: Sequence[int] | None, in_octave: int, least: int) -> int | None:
    """The first of `lengths`, which ascend, that is not below `length`, or None; without them, as `rounded`."""
    if length == 0 or lengths is None:
        return rounded(length, in_octave, least)
    return next((one for one in lengths if one >= length), None)


def _is_prefill(model: Any, given: Mapping[str, Any]) -> bool:
    """Whether a call with these arguments of `forward` reads a prompt and wants logits alone."""
    config, inputs = model.config, [x for x in map(given.get, ("input_ids", "inputs_embeds")) if x is not None]
    images = [given[name] for name in ("pixel_values", "visual_states") if name in given]
    wants_more = config.output_attentions or config.output_hidden_states or not config.return_dict
    if torch.is_grad_enabled() or wants_more or len(inputs) != 1 or len(images) > 1 or not set(given) <= KNOWN:
        return False
    mask, kept = given.get("attention_mask"), given.get("logits_to_keep", 0)
    has_mask_of_padding = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    # who wants several of the last logits checks drafts, a few at a time, of which each number would have a graph
    is_prompt = isinstance(kept, int) and kept in (0, 1) and len(inputs[0]) > 0 and inputs[0].shape[1] > 1
    return is_prompt and has_mask_of_padding


def _hindrance(model: Any, cache: Any) -> str | None:
    """Why prompts of this model, with such a cache, cannot be read in one graph; None if they can."""
    decoder, rotary = model.language_model, model.language_model.rotary_emb.rotary_emb
    implementation = decoder.config._attn_implementation
    kinds = getattr(rotary, "rope_type", "default")
    kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
    # the encoder runs in front of the graph, and in transformers 5 has hooks of its own
    parts = (decoder, getattr(model.model, "visual_projector", None), model.lm_head)
    modules = [model, model.model, *(one for part in parts if part is not None for one in part.modules())]
    if not decoder.family.compiles:
        return f"language models of type {decoder.config.model_type} choose experts row by row"
    if implementation not in ("eager", "sdpa"):
        return f"attn_implementation={implementation!r}, expected 'sdpa' or 'eager'"
    if kinds & {"dynamic", "longrope"}:
        return f"the rotary embedding ({', '.join(sorted(kinds))}) depends on the length"
    if any(one._forward_hooks or one._forward_pre_hooks or hasattr(one, "_hf_hook") for one in modules):
        return "a module has hooks, which a graph may leave out"
    if any(getattr(one, "watcher", None) is not None for one in modules):
        return "attention is being watched"
    if getattr(model, "hf_quantizer", None) is not None or in_several_processes():
        return "weights are quantized, or shared out to processes"
    if torch.is_autocast_enabled(decoder.layers[0].device.type):
        return "autocast is on"
    if cache is None:
        return None
    layers = getattr(cache, "layers", ())
    held = {type(layer) for layer in layers}
    if len(layers) != len(decoder.layers) or len(held) > 1 or not held <= {StaticLayer, DynamicLayer}:
        names = sorted({type(cache).__name__, *(kind.__name__ for kind in held)})
        return f"the cache ({', '.join(names)}) is none with a place for every token in all layers"
    return "the cache is offloaded" if getattr(cache, "offloading", False) else None


class PaddedLayout(TokenLayout):
    """The layout of an input in the lengths of a bucket. Positions behind the input repeat its last one."""

    def __init__(self, visual_BS: Tensor, real_BS: Tensor, bucket: Bucket):
        length = visual_BS.shape[1]
        more = (0, bucket.length - length)
        super().__init__(pad(visual_BS, more), real_BS=pad(real_BS, more), columns=bucket.text)
        self.visual_BS: Tensor
        for x_BS in (self.visual_BS, self._key_source.view(self.shape)):
            x_BS[:, length:] = x_BS[:, length - 1 : length]
        self._visual_positions = pad(self._visual_positions, (0, bucket.visual - len(self._visual_positions)))


class Prompt:
    """A prompt, from arguments of `forward` to those of a graph.

    Attributes:
        past, length: tokens in the cache, and new ones with padding.
    """

    def __init__(self, model: Any, given: Mapping[str, Any], cache: Any):
        self.model, self.given, self.cache = model.model, given, cache
        self.inputs_BSX = given["input_ids"] if "input_ids" in given else given["inputs_embeds"]
        (self.rows, self.length), device = self.inputs_BSX.shape[:2], self.inputs_BSX.device
        past = 0 if cache is None or "cache_position" in given else int(cache.get_seq_length())
        self.slots: Tensor = given.get("cache_position", torch.arange(self.length, device=device) + past)
        self.past = int(self.slots[0])
        self.text = {name: given.get(name) for name in ("input_ids", "inputs_embeds")}
        self.visual_BS = torch.zeros(self.rows, self.length, dtype=torch.bool, device=device)
        images = [given[name] for name in ("pixel_values", "visual_states") if name in given]
        self.has_images = any(map(len, images))
        if images:
            self.visual_BS = self.model.get_placeholder_mask(**self.text)
        # in embedding space padding is read like text, as in a LLaVA
        mask = None if self.model.config.in_embedding_space else given.get("attention_mask")
        real_BS = real_tokens(mask, self.length)
        self.real_BS = torch.ones_like(self.visual_BS) if real_BS is None else real_BS.to(device)

    def bucket(self, text_lengths: Sequence[int] | None, visual_lengths: Sequence[int] | None) -> Bucket | None:
        """That of the prompt; None if there is none that is large enough."""
        visual_B = self.visual_BS.sum(1).tolist()
        text = bucketed(max(1, int((self.real_BS & ~self.visual_BS).sum(1).max())), text_lengths, *COARSE)
        # in embedding space a layer tells by visual tokens which queries its mask is for: there are rows without any, too
        some = 1 if self.model.config.in_embedding_space else 0
        visual = bucketed(max(some, sum(visual_B)), visual_lengths, *FINE)
        if text is None or visual is None:
            return None
        length = text + rounded(max(visual_B), *FINE)
        length = rounded(self.length, *FINE) if self.length > length else length
        keys = places = rounded(self.past, *COARSE) + length
        if self.cache is None:
            places = 0
        elif type(self.cache.layers[0]) is StaticLayer:
            places = self.cache.layers[0].max_cache_len
            keys = places if self.past else min(keys, places)
        return None if keys < self.past + self.length else Bucket(self.rows, text, visual, length, keys, places)

    def encoded_images(self) -> GivenImages | None:
        """The images, in front of the graph. Raises ValueError if they do not fill their placeholders."""
        sizes = {name: x for name, x in self.given.items() if name in IMAGES}
        images = self.model.given_images(sizes.pop("pixel_values", None), sizes.pop("visual_states", None), sizes, {})
        if images is None:
            self.model.layout_without_images(self.text["input_ids"])
        else:
            self.model.before_pass(images, self.visual_BS)
        return images

    def padded(self, images: GivenImages | None, bucket: Bucket) -> tuple:
        """Arguments of `_logits`, up to where the cache's begin."""
        device, more = self.inputs_BSX.device, bucket.length - self.length
        positions = self.given.get("position_ids", self.slots[None])
        mask = self.given.get("attention_mask")
        mask = torch.ones(self.rows, self.past + self.length) if mask is None else mask
        mask_BL = _plain(pad(mask.to(device, torch.bool), (0, bucket.keys))[:, : bucket.keys])
        inputs_BSX = _longer(self.inputs_BSX, 1, more)
        positions_BS = _plain(_longer(positions, 1, more).expand(self.rows, -1))
        layout = PaddedLayout(self.visual_BS, self.real_BS, bucket)
        last = torch.tensor([self.length - 1], device=device) if self.given.get("logits_to_keep") else None
        visual = self._visual(images, bucket.visual) if bucket.visual else None
        return inputs_BSX, visual, layout, _longer(self.slots, 0, more), positions_BS, mask_BL, last

    def _visual(self, images: GivenImages | None, rows: int) -> Tensor | tuple:
        """Features (V, C) or, for each layer that sees images, keys and values (V, K, H), with more rows behind them."""
        if images is None or not self.has_images:
            config, like = self.model.config, self.model.get_input_embeddings().weight
            width = config.text_config.hidden_size if config.features_are_projected else config.vision_feature_size
            return like.new_zeros(rows, width)

        def of(x_VX: Tensor) -> Tensor:
            x_VX = x_VX if images.rows is None else x_VX[images.rows.to(x_VX.device)]
            x_XVX = x_VX.movedim(0, -2)  # head by head in memory, as they are stored
            return _plain(pad(x_XVX, (0, 0, 0, rows - len(x_VX)))).movedim(-2, 0)

        read: Any = images.features if images.stored is None else images.stored
        return tuple(pair and tuple(map(of, pair)) for pair in read) if isinstance(read, tuple) else of(read)


def _longer(x: Tensor, axis: int, more: int) -> Tensor:
    """`x` with its last entry along `axis` so many times more."""
    last = x.narrow(axis, x.shape[axis] - 1, 1)
    return torch.cat([x, last.expand(*x.shape[:axis], more, *x.shape[axis + 1 :])], axis)


def _plain(x: Tensor) -> Tensor:
    """`x` with the strides that its shape alone says, along axes of one entry too: a graph is for certain strides."""
    return x.contiguous().flatten().view(x.shape)


class GraphCache:
    """A cache in a graph.

    Args:
        keys, values: of each layer, (B, K, M, H).
        slots: (S,) the places of new tokens, which may repeat with the same contents.
        length: of the keys in view.
    """

    is_compileable = True

    def __init__(self, keys: list[Tensor], values: list[Tensor], slots: Tensor, length: int):
        self.keys, self.values, self.slots, self.length = keys, values, slots, length

    def get_mask_sizes(self, *_: Any) -> tuple[int, int]:
        return self.length, 0

    def update(self, key_BKSH: Tensor, value_BKSH: Tensor, layer_idx: int, *_: Any) -> tuple[Tensor, Tensor]:
        key_BKMH, value_BKMH = self.keys[layer_idx], self.values[layer_idx]
        key_BKMH.index_copy_(2, self.slots, key_BKSH)
        value_BKMH.index_copy_(2, self.slots, value_BKSH)
        return key_BKMH[:, :, : self.length], value_BKMH[:, :, : self.length]


def _places(model: Any, cache: Any, bucket: Bucket) -> tuple[list[Tensor], list[Tensor]]:
    """Of each layer keys and values (B, K, M, H): those of a static cache, or those of a dynamic one with places behind
    them."""
    keys, values, dtype = [], [], model.get_input_embeddings().weight.dtype
    for layer, held in zip(model.language_model.layers, () if cache is None else cache.layers):
        attention = layer.self_attn
        heads, size = attention.sizes[1] // attention.head_dim, attention.head_dim
        empty = torch.zeros(bucket.rows, heads, 0, size, dtype=dtype, device=layer.device)
        if not held.is_initialized:
            initialize(held, empty, empty)
        for places, x in ((keys, held.keys), (values, held.values)):
            if type(held) is DynamicLayer:
                cached, x = x, x.new_zeros(bucket.rows, heads, bucket.places, size)
                if cached.numel():
                    x[:, :, : cached.shape[2]] = cached
            places.append(x)
    return keys, values


def _fill(cache: Any, keys_values: tuple[list[Tensor], list[Tensor]], past: int, length: int) -> None:
    """Tells the cache of its new tokens, whose keys and values are in their places."""
    for held, keys, values in zip(() if cache is None else cache.layers, *keys_values):
        if type(held) is DynamicLayer:
            held.keys, held.values = keys[:, :, : past + length], values[:, :, : past + length]
        elif hasattr(held, "cumulative_length"):  # else transformers counts the keys that are not zero
            held.cumulative_length.add_(length)


def _logits(
    model: Any,
    inputs_BSX: Tensor,
    visual: Tensor | tuple | None,
    layout: PaddedLayout,
    slots: Tensor,
    positions_BS: Tensor,
    mask_BL: Tensor,
    last: Tensor | None,
    keys: list[Tensor],
    values: list[Tensor],
    length: int,
) -> Tensor:
    """The graph: logits at the position `last`, (1,), or at all, as `forward` returns them."""
    if isinstance(visual, Tensor):
        visual = model.model.for_layers(visual, layout)
    decoder = model.language_model
    hidden_BSD = decoder(
        **{"input_ids" if inputs_BSX.ndim == 2 else "inputs_embeds": inputs_BSX},
        layout=layout,
        visual=visual,
        attention_mask=mask_BL,
        position_ids=positions_BS,
        cache=GraphCache(keys, values, slots, length) if keys else None,
        cache_position=slots,
        use_cache=False,
        return_dict=True,
    ).last_hidden_state
    if last is None and not model.config.in_embedding_space:
        return layout.align(decoder.family.scaled_logits(model.lm_head(layout.text(hidden_BSD))))
    hidden_BSD = hidden_BSD if last is None else hidden_BSD.index_select(1, last)
    return decoder.family.scaled_logits(model.lm_head(hidden_BSD))
