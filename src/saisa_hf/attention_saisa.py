# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""NAAViT's attention in the forms that transformers' attention implementations take.

A text query at position p sees the keys at positions <= p, text and visual alike. There are three ways to say so:

- a mask tensor (B, 1, T, L), boolean for `sdpa` and additive for `eager`;
- a block mask, the same rule as a function of indices, for `flex_attention`;
- runs. A run is a stretch of text between images. The run that covers positions [a, b) attends to the keys [0, b) with a
  plain causal mask aligned to the bottom right, as a chunk of a prefill does. So every fused kernel applies and no mask
  exists: `flash_attention_2` and its kin, and `sdpa` where a mask would be large.

Shape suffixes as in `modeling_saisa.py`; R rows of a query or key tensor in a given order.
"""

from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import DynamicCache

from .compat_saisa import (
    ALL_ATTENTION_FUNCTIONS,
    CROP_REMOVES,
    DynamicLayer,
    cached_key_range,
    causal_mask,
    is_paged,
    makes_causal_masks,
    warn_once,
)
from .hardware_saisa import PerDevice
from .token_layout_saisa import TokenLayout, segments_of


# All components of a key that stands where a decoder layer does not see the image. It marks its place as hidden, in any cache
# that gives back the keys it got. No text token has such a key: this is the smallest normal float16.
HIDDEN_KEY = 2.0**-14

# From this many elements on (64 MiB of booleans) `sdpa` does without a mask tensor where it can.
LARGE_MASK = 2**26


@dataclass
class Visibility:
    """Which keys the text queries see, and the forms in which attention implementations want to know it."""

    layout: TokenLayout
    slots: Tensor  # (S,) places of the new tokens in the cache, counted from the first token ever seen
    key_range: tuple[int, int]  # (length, offset) of the keys in the cache
    window: int | None = None  # sliding window in positions
    attention_mask: Tensor | None = None  # (B, past + S), 0 at padding
    document_BS: Tensor | None = None  # which of several packed samples a position belongs to

    def for_implementation(self, implementation: str, dtype: torch.dtype) -> "Tensor | BlockMask | Runs":
        """What the attention implementation of that name takes as its mask, for queries of `dtype`."""
        if implementation == "eager":
            visible = self.mask()
            return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
        if implementation == "flex_attention":
            return self.block_mask()
        is_large = self.layout.query_position_BT.numel() * self.key_range[0] >= LARGE_MASK
        plain = implementation == "sdpa" and is_large and self.window is None and self.equal_in_all_samples()
        return Runs(self) if plain or "flash" in implementation else self.mask()

    def mask(self) -> Tensor:
        """bool (B or 1, 1, T, L), True is visible."""
        length, offset = self.key_range
        key_L, real_BL = torch.arange(length, device=self.slots.device) + offset, self.real_keys()
        query_BT, document_BT = self._queries()
        same_BTL = None if document_BT is None else document_BT[:, :, None] == self.document_BS[:, None, :]
        return self._sees(query_BT[:, :, None], key_L, None if real_BL is None else real_BL[:, None], same_BTL)[:, None]

    def block_mask(self) -> BlockMask:
        """The same as a function of indices, with the blocks that are empty."""
        length, offset = self.key_range
        real_BL, document_BS, (query_BT, document_BT) = self.real_keys(), self.document_BS, self._queries()

        def visible(b, _head, t, k):
            real = None if real_BL is None else real_BL[b, k]
            same = None if document_BS is None else document_BT[b, t] == document_BS[b, k]
            return self._sees(query_BT[b, t], k + offset, real, same)

        return create_block_mask(visible, len(query_BT), None, query_BT.shape[1], length, device=self.slots.device)

    def _sees(self, query, key, is_real, same_document) -> Tensor:
        """Whether queries at the places `query` see the keys at `key`. Every query sees itself, so that no row is empty."""
        seen = key <= query
        if self.window is not None:
            seen = seen & (key > query - self.window)
        for condition in (is_real, same_document):
            seen = seen if condition is None else seen & condition
        return seen | (key == query)

    def equal_in_all_samples(self) -> bool:
        """Whether every sample has its images at the same positions and nothing to skip."""
        if self.layout.segments is None or self.document_BS is not None:
            return False
        return self.attention_mask is None or bool(self.attention_mask.all())

    def real_keys(self) -> Tensor | None:
        """bool (B, L), False at padding; None without padding mask. A static cache has more places than that knows of."""
        if self.attention_mask is None:
            return None
        length, offset = self.key_range
        mask = self.attention_mask.to(self.slots.device, torch.bool)
        return nn.functional.pad(mask, (0, max(0, offset + length - mask.shape[1])))[:, offset : offset + length]

    def _queries(self) -> tuple[Tensor, Tensor | None]:
        """(B or 1, T) places of the queries, and (B, T) packed samples that they belong to, or None."""
        query_BT = self.slots[None] if self.layout.visual_BS is None else self.slots[self.layout.query_position_BT]
        return query_BT, None if self.document_BS is None else self.layout.text(self.document_BS)


class Runs:
    """Plain causal attention of each run, without padding or other packed samples. A window is left to the kernel."""

    def __init__(self, visibility: Visibility):
        self.window = visibility.window
        self.are_slices = visibility.equal_in_all_samples()
        self.runs = PerDevice(*(_runs_as_slices if self.are_slices else _runs_as_rows)(visibility))

    def attend(self, implementation, module, query_BNTH, key_BKLH, value_BKLH, **options) -> Tensor:
        """(B, T, N, H): attention of all queries by `implementation`, zeros for those at padding."""
        kernel = partial(self._kernel, implementation, module, **options)
        runs = self.runs.on(query_BNTH.device)
        if self.are_slices:
            parts = ((query_BNTH[:, :, t], key_BKLH[:, :, k], value_BKLH[:, :, k]) for t, k in runs)
            return torch.cat([kernel(*part) for part in parts], dim=1)
        query_RNH, key_RKH, value_RKH = (x.transpose(1, 2).flatten(0, 1) for x in (query_BNTH, key_BKLH, value_BKLH))
        output_RNH = torch.zeros_like(query_RNH)
        for queries, keys, lengths in runs:
            selected = (query_RNH[queries], key_RKH[keys], value_RKH[keys])
            run_RNH = kernel(*(x_RNH[None].transpose(1, 2) for x_RNH in selected), **lengths)[0]
            output_RNH = output_RNH.index_copy(0, queries, run_RNH)
        return output_RNH.view(query_BNTH.transpose(1, 2).shape)

    def _kernel(self, implementation, module, query_BNTH, key_BKLH, value_BKLH, **options):
        """(B, T, N, H): causal attention aligned to the bottom right."""
        mask, queries = None, query_BNTH.shape[2]
        if implementation == "sdpa":
            options["is_causal"] = False
            mask = causal_lower_right(queries, key_BKLH.shape[2]) if queries > 1 else None
        else:
            options |= {"is_causal": True, "sliding_window": self.window}
        return ALL_ATTENTION_FUNCTIONS[implementation](module, query_BNTH, key_BKLH, value_BKLH, mask, **options)[0]


def _runs_as_slices(visibility: Visibility):
    """Yields for each run its slices of T and of L, which all samples share."""
    first = int(visibility.slots[0]) - visibility.key_range[1]
    for visual, start, end, row in visibility.layout.segments:
        if not visual:
            yield slice(row, row + end - start), slice(0, first + end)


def _runs_as_rows(visibility: Visibility):
    """Yields for the first run of all samples, then for the second of all that have one, and so on: its rows (R,) of the
    flattened (B * T) queries, those of the flattened (B * L) keys, and how many of them each sample has, as arguments of
    transformers' flash attentions."""
    layout, (length, offset) = visibility.layout, visibility.key_range
    visual_BS, slot_S = layout.visual_BS.cpu(), visibility.slots.cpu() - offset
    key_L, real_BL = torch.arange(length), visibility.real_keys()
    real_BL = torch.ones(len(visual_BS), length, dtype=torch.bool) if real_BL is None else real_BL.cpu()
    # packed samples follow each other without a cache, so that places of keys are positions
    documents_BS = [None] * len(visual_BS) if visibility.document_BS is None else visibility.document_BS.cpu()
    by_sample = [[] for _ in visual_BS]
    for b, (visual_S, document_S) in enumerate(zip(visual_BS, documents_BS)):
        for visual, start, end, _ in segments_of(visual_S, document_S):
            position_R = torch.arange(start, end)[real_BL[b, slot_S[start:end]]]
            if visual or not len(position_R):
                continue
            seen_L = real_BL[b] & (key_L <= slot_S[end - 1])
            if document_S is not None:
                seen_L = seen_L & (document_S == document_S[start])
            query_R = b * layout.longest + layout.column_BS[b, position_R]
            by_sample[b].append((query_R, b * length + seen_L.nonzero().squeeze(1)))
    for runs in zip_longest(*by_sample):
        queries, keys = zip(*filter(None, runs))
        arguments = {}
        for name, rows in (("q", queries), ("k", keys)):
            lengths = torch.tensor([0, *map(len, rows)], dtype=torch.int32)
            arguments[f"cu_seq_lens_{name}"] = lengths.cumsum(0, dtype=torch.int32)
            arguments[f"max_length_{name}"] = int(lengths.max())
        yield torch.cat(queries), torch.cat(keys), arguments


# --- what the decoder asks for ----------------------------------------------------------------------------------------


def implementation_of(attention) -> str:
    """The name of a layer's attention implementation. Keys that are hidden one by one need a mask tensor."""
    chosen = attention.config._attn_implementation
    if attention.sees_image or chosen in ("eager", "sdpa"):
        return chosen
    return "sdpa" if attention.softcap is None else "eager"


def attend(attention, query_BNTH, key_BKLH, value_BKLH, mask, options: dict):
    """(B, T, N, H) and, where the implementation has them, (B, N, T, L) probabilities."""
    implementation = implementation_of(attention)
    if attention.softcap is not None:
        options["softcap"] = attention.softcap
    inputs = (attention, query_BNTH, key_BKLH, value_BKLH)
    if isinstance(mask, Runs):
        return mask.attend(implementation, *inputs, **options), None
    if isinstance(mask, Apart):
        return mask.attend(*inputs, options["scaling"]), None
    # a chunk of visual tokens alone has no query, which fused kernels do not expect
    if implementation == "eager" or query_BNTH.shape[2] == 0:
        return eager_attention(*inputs, mask, **options)
    if "flash" in implementation:
        options["sliding_window"] = attention.window
    return ALL_ATTENTION_FUNCTIONS[implementation](*inputs, mask, **options)


def eager_attention(attention, query_BNTH, key_BKLH, value_BKLH, mask, scaling, dropout=0.0, softcap=None, **kwargs):
    """(B, T, N, H), and (B, N, T, L) probabilities: attention as it is written down, and as transformers' models have it."""
    groups = attention.num_key_value_groups
    if groups > 1:
        key_BKLH, value_BKLH = (x.repeat_interleave(groups, dim=1) for x in (key_BKLH, value_BKLH))
    scores_BNTL = query_BNTH @ key_BKLH.mT * scaling
    if softcap is not None:
        scores_BNTL = softcap * torch.tanh(scores_BNTL / softcap)
    if mask is not None:
        scores_BNTL = scores_BNTL + mask[..., : scores_BNTL.shape[-1]]
    probabilities_BNTL = scores_BNTL.softmax(-1, dtype=torch.float32).to(query_BNTH.dtype)
    probabilities_BNTL = nn.functional.dropout(probabilities_BNTL, dropout, attention.training)
    return (probabilities_BNTL @ value_BKLH).transpose(1, 2), probabilities_BNTL


def empty_cache(decoder):
    """What a pass of `decoder` fills that returns a cache and got none."""
    return hold_text_alone(DynamicCache(config=decoder.config), decoder.layers)


def cache_of_pass(decoder, use_cache: bool | None, cache, slots, length: int, device):
    """Whether to return a cache, the one that a forward pass of `decoder` writes into, and the places (S,) in it of `length`
    new tokens. A ValueError if some layers do not see the image, and the cache does not give back the keys that it got."""
    use_cache = decoder.config.use_cache if use_cache is None else use_cache
    checkpointing = decoder.gradient_checkpointing and decoder.training and torch.is_grad_enabled()
    if checkpointing and (use_cache or cache is not None):
        # the layers run again in backward, and would write into it a second time
        warn_once("A cache is incompatible with gradient checkpointing: `use_cache` is set to False.")
        use_cache, cache = False, None
    if use_cache and cache is None:
        cache = empty_cache(decoder)
    is_quantized = any("Quantized" in kind.__name__ for kind in type(cache).__mro__)
    if is_quantized and not all(layer.sees_image for layer in decoder.layers):
        raise ValueError(
            "visual_layers leaves out some layers, which need to find their hidden keys in the cache as they put them "
            "there: a quantized cache changes them. Use a dynamic or static cache."
        )
    if slots is None:
        past = cache.get_seq_length() if cache is not None and not is_paged(cache) else 0
        slots = torch.arange(length, device=device) + past
    return use_cache, cache, slots


def attention_masks(decoder, layout, text_BTD, slots, attention_mask, cache, position_ids) -> dict:
    """What the layers' attention implementations take as masks, by kind of layer. Without a mask and a cache, a packed sample
    begins wherever `position_ids` do not go up by one."""
    masks, documents, prepared = {}, None, isinstance(attention_mask, dict)
    if position_ids is None:
        position_ids = slots[None]
    elif attention_mask is None and cache is None:
        starts = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1
        documents = starts.cumsum(-1).expand(len(text_BTD), -1)
        if decoder.layers[0].self_attn.leading_text_skips and layout.visual_BS is not None and starts[:, 1:].any():
            raise ValueError("position_ids pack several samples: leading_text_skips_attention needs them in a batch.")
    for index, layer in enumerate(decoder.layers):
        if layer.mask_kind not in masks:
            given = attention_mask.get(layer.attention_type) if prepared else attention_mask
            own_layout, queries = layer.queries_of(layout, text_BTD)
            key_range = (0, 0) if is_paged(cache) else cached_key_range(cache, index, slots)
            visibility = Visibility(own_layout, slots, key_range, layer.self_attn.window, given, documents)
            mask = partial(_mask, decoder.config, layer, visibility, queries, cache, position_ids, prepared)
            if holds_text_alone(layer, index, cache):
                made = _of_text_alone(layer.self_attn, visibility, queries, _held(cache, index), mask)
                masks[layer.mask_kind] = made._replace(mask=_apart(layer.self_attn, made.mask, queries, cache))
            else:
                masks[layer.mask_kind] = _apart(layer.self_attn, mask(), queries, cache)
        if getattr(held := _held(cache, index), "shared", None) is not None:
            mask = masks[layer.mask_kind]
            held.apart = isinstance(getattr(mask, "mask", mask), Apart)  # of text alone, it is in there
    return masks


def _mask(config, layer, visibility: Visibility, text_BTD, cache, position_ids, prepared: bool):
    """The mask of one kind of layer: as transformers makes it for an input without images, else by `visibility`."""
    given, documents, layout = visibility.attention_mask, visibility.document_BS, visibility.layout
    implementation, usual = implementation_of(layer.self_attn), config._attn_implementation
    if is_paged(cache):
        return given
    if isinstance(given, Tensor) and given.ndim == 4:
        return layout.query_rows(given)
    if layout.visual_BS is not None or implementation == "eager" != usual:
        return visibility.for_implementation(implementation, text_BTD.dtype)
    if implementation != usual:
        return visibility.mask()
    has_empty_places = cache is not None and cache.is_compileable  # caches of a fixed size hand out all of their places
    unfilled = has_empty_places and ("flash" in implementation or implementation == "flex_attention")
    packed = "flash" in implementation and documents is not None and bool(documents.any())
    if unfilled or packed or not makes_causal_masks(layer.attention_type):
        # transformers' masks do not say which places of the cache are filled, or where a packed sample ends
        no_image_BS = torch.zeros(text_BTD.shape[:2], dtype=torch.bool, device=visibility.slots.device)
        visibility.layout = TokenLayout(no_image_BS)
        return visibility.for_implementation(implementation, text_BTD.dtype)
    if prepared:
        return given
    return causal_mask(layer.attention_type, config, text_BTD, given, visibility.slots, cache, position_ids)


# --- layers that do not see the image ---------------------------------------------------------------------------------


def _cropped(length: int, tokens: int) -> int:
    """What `crop(tokens)` leaves of `length` tokens; what a positive number means, the installed release says."""
    return tokens if tokens > 0 or not (tokens or CROP_REMOVES) else length + tokens


class Grown:
    """A part of layers of a cache: what they hold may continue a `SaisaBeginning`."""

    keys: Tensor | None
    values: Tensor | None
    shared: tuple[Tensor, Tensor] | None = None  # of the beginning, (1, K, P, H) each: of all samples and caches
    apart = False  # whether attention takes these and what is behind them apart (see `Apart`)

    def grow(self, *new: Tensor) -> tuple[Tensor, ...]:
        """Keys and values with new ones behind them; those of a beginning are joined for this one layer, unless `apart`."""
        held = zip((self.keys, self.values), new)
        own = tuple(x.contiguous() if old is None else torch.cat([old, x], dim=2) for old, x in held)
        self.keys, self.values = own
        if self.shared is None or self.apart:
            return own
        return tuple(torch.cat([x.expand(len(y), -1, -1, -1), y], dim=2) for x, y in zip(self.shared, own))

    def cut(self, columns: int) -> None:
        """Drops keys and values behind so many columns."""
        begun, self.shared = self.shared, self.shared and tuple(x[:, :, :columns] for x in self.shared)
        own = columns if begun is None else max(columns - begun[0].shape[2], 0)
        if self.keys is not None:
            self.keys, self.values = self.keys[:, :, :own], self.values[:, :, :own]


class TextLayer(Grown, DynamicLayer or object):
    """What a cache has of a decoder layer that does not see the image: text alone, at the end of as many columns as the
    sample with most of it has. It counts all tokens."""

    length = 0  # of the input, visual tokens included
    place_BL: Tensor | None = None  # where in the input a column's text stands; -1: nowhere, in front of a shorter text
    is_text = True  # whether there are no visual tokens in the input

    def append(self, key_BKTH: Tensor, value_BKTH: Tensor, place_BL: Tensor, length: int, is_text: bool):
        """Keys and values of all text, (B, K, L, H) each."""
        self.place_BL, self.length, self.is_text, self.is_initialized = place_BL, length, is_text, True
        return self.grow(key_BKTH, value_BKTH)

    def get_seq_length(self) -> int:
        return self.length

    def reset(self) -> None:
        self.keys = self.values = self.place_BL = self.shared = None
        self.length, self.is_initialized, self.is_text = 0, False, True

    def crop(self, tokens: int) -> None:
        """To so many tokens of the input, or by so many where `tokens` is negative or the installed release says so."""
        length = _cropped(self.length, tokens)
        if self.place_BL is None or length >= self.length:
            return
        is_kept_BL = (self.place_BL >= 0) & (self.place_BL < length)
        columns = int((is_kept_BL.any(0).nonzero().flatten()[-1:] + 1).sum())  # up to the last that a sample keeps
        self.place_BL, self.length = self.place_BL.masked_fill(~is_kept_BL, -1)[:, :columns], length
        self.cut(columns)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda x: x[indices, ...])

    def _each(self, function) -> None:
        if self.place_BL is not None:
            self.keys, self.values, self.place_BL = map(function, (self.keys, self.values, self.place_BL))


def hold_text_alone(cache, layers):
    """`cache`, an empty one. A dynamic one will hold text alone for those decoder `layers` that do not see the image, but not
    for sliding windows, which are counted in places of the input and are short anyway."""
    if type(cache) is DynamicCache and DynamicLayer is not None and not cache.offloading:
        cache.layers += [DynamicLayer() for _ in layers[len(cache.layers) :]]
        for index, (held, layer) in enumerate(zip(cache.layers, layers)):
            if type(held) is DynamicLayer and not layer.sees_image and layer.self_attn.window is None:
                cache.layers[index] = TextLayer()
    return cache


def holds_text_alone(layer, index: int, cache) -> bool:
    """Whether a decoder layer finds text alone; else it finds visual tokens too, marked as hidden if it must not see them."""
    if cache is None:
        return not layer.sees_image and layer.self_attn.window is None
    return isinstance(_held(cache, index), TextLayer)


def _held(cache, index: int):
    """What a cache has of a decoder layer, or None."""
    return layers[index] if index < len(layers := getattr(cache, "layers", ())) else None


class OfTextAlone(NamedTuple):
    """What layers that attend to text alone get in place of a mask."""

    mask: Tensor | None  # (B, 1, T, L); None: plain causal attention
    place_BL: Tensor  # as in `TextLayer`, with the new text, as are the others
    length: int
    is_text: bool

    def keys_values(self, index: int, key_BTKH: Tensor, value_BTKH: Tensor, cache) -> tuple[Tensor, Tensor]:
        """Keys and values of all text, (B, K, L, H)."""
        new = key_BTKH.transpose(1, 2), value_BTKH.transpose(1, 2)
        return new if cache is None else cache.layers[index].append(*new, *self[1:])

    def in_input_order(self, probabilities_BNTL: Tensor) -> Tensor:
        """The last axis by places of the input, zero where visual tokens are."""
        place_BNTL = self.place_BL.clamp(min=0)[:, None, None].expand_as(probabilities_BNTL)
        all_places = probabilities_BNTL.new_zeros(*probabilities_BNTL.shape[:3], self.length)
        return all_places.scatter_add(3, place_BNTL, probabilities_BNTL)


def _of_text_alone(attention, visibility: Visibility, text_BTD: Tensor, held, text_mask) -> OfTextAlone:
    """`held` is the `TextLayer` of the cache, or None; `text_mask()` is the mask where there are no images."""
    layout, given, slots = visibility.layout, visibility.attention_mask, visibility.slots
    place_BL = slots.expand(len(text_BTD), -1)
    if layout.visual_BS is not None:
        place_BL = slots[layout.query_position_BT].masked_fill(~layout.is_text_BT, -1)
    if held is not None and held.place_BL is not None:
        place_BL = torch.cat([held.place_BL.to(slots.device).expand(len(place_BL), -1), place_BL], 1)
    is_text = layout.visual_BS is None and (held is None or held.is_text)
    rest = (place_BL, visibility.key_range[0], is_text)
    if is_text:
        return OfTextAlone(text_mask(), *rest)
    eager = implementation_of(attention) == "eager"
    real_BL, place_in_mask_BL = place_BL >= 0, place_BL.clamp(min=0)
    if given is not None and given.ndim == 4:
        mask = layout.query_rows(given).expand(len(place_BL), -1, -1, -1)
        mask = mask.take_along_dim(place_in_mask_BL[:, None, None].to(mask.device), dim=3)
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        return OfTextAlone(mask.masked_fill(~real_BL[:, None, None].to(mask.device), hidden), *rest)
    if given is not None:
        real_BL = real_BL & given.to(slots.device, torch.bool).take_along_dim(place_in_mask_BL, 1)
    queries, keys, document_BS = text_BTD.shape[1], place_BL.shape[1], visibility.document_BS
    is_plain = document_BS is None and (queries == 1 or (queries == keys and not eager))
    if is_plain and not torch.compiler.is_compiling() and bool(real_BL.all()):
        return OfTextAlone(None, *rest)
    document_BT = None if document_BS is None else layout.text(document_BS)
    column_T = torch.arange(keys - queries, keys, device=slots.device)
    of_text = Visibility(TokenLayout(None), column_T, (keys, 0), None, real_BL, document_BT)
    return OfTextAlone(of_text.for_implementation("eager", text_BTD.dtype) if eager else of_text.mask(), *rest)


def mark_hidden(key_BKSH: Tensor, layout: TokenLayout) -> Tensor:
    """Keys with `HIDDEN_KEY` at visual positions."""
    if layout.visual_BS is None:
        return key_BKSH
    return key_BKSH.masked_fill(layout.visual_BS[:, None, :, None].to(key_BKSH.device), HIDDEN_KEY)


def hide_marked_keys(attention_mask, key_BKLH, query_BNTH, layout: TokenLayout, cache):
    """`attention_mask` without the keys that are marked as visual tokens which the layer does not see."""
    if is_paged(cache) or (cache is None and layout.visual_BS is None):
        return attention_mask
    if attention_mask is None and query_BNTH.shape[2] > 1:
        return None  # plain causal attention over text alone: nothing is in the cache yet
    marked_B11L = (key_BKLH[:, 0] == HIDDEN_KEY).all(-1)[:, None, None, :]
    if attention_mask is None:
        return ~marked_B11L
    attention_mask = attention_mask[..., : marked_B11L.shape[-1]]
    hidden = False if attention_mask.dtype == torch.bool else torch.finfo(attention_mask.dtype).min
    return attention_mask.masked_fill(marked_B11L, hidden)


# --- layers of a cache behind a beginning -----------------------------------------------------------------------------


class LayerBehind(Grown, DynamicLayer or object):
    """What a cache has of a decoder layer that sees the image, or has a window, behind a `SaisaBeginning`."""

    def update(self, key_BKTH: Tensor, value_BKTH: Tensor, *args, **kwargs) -> tuple[Tensor, ...]:
        return self.grow(key_BKTH, value_BKTH)

    def get_seq_length(self) -> int:
        return self.shared[0].shape[2] + (0 if self.keys is None else self.keys.shape[2])

    def crop(self, tokens: int) -> None:
        self.cut(_cropped(self.get_seq_length(), tokens))

    def reset(self) -> None:
        self.cut(0)
        self.keys = self.values = None


def behind(cache, model):
    """`cache`, or in place of a `SaisaBeginning` a new cache that continues it, without a copy of it. Raises ValueError if it
    is of another `SaisaModel` than `model`, or of other weights."""
    if not hasattr(beginning := cache, "keys_values"):
        return cache
    beginning.check(model)
    cache = hold_text_alone(DynamicCache(), model.language_model.layers)
    for index, shared in enumerate(beginning.keys_values):
        if isinstance(held := cache.layers[index], TextLayer):
            held.place_BL, held.length = beginning.text_places[None].to(shared[0].device), len(beginning)
            held.is_text = held.place_BL.shape[1] == held.length
        else:
            held = cache.layers[index] = LayerBehind()
        held.shared, held.is_initialized = shared, True
    return cache


class Apart:
    """In place of a mask: all queries see all of a beginning, whose keys stay where they are, once for all samples; `mask`
    (B, 1, T, L), or None, tells what they see behind it. Attention to both parts is joined by their sums of exponentials."""

    def __init__(self, mask: Tensor | None, layers: list):
        self.layers, self.bias = layers, None
        if mask is not None:
            self.bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)

    def attend(self, attention, query_BNTH, key_BKLH, value_BKLH, scaling: float) -> Tensor:
        """(B, T, N, H)."""
        # the kernel of `sdpa` on CPUs, which also returns the logarithm of the sums
        kernel = partial(torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, scale=scaling)
        groups = attention.num_key_value_groups
        query_KGBTH = query_BNTH.unflatten(1, (-1, groups)).permute(1, 2, 0, 3, 4)  # as if of one sample
        first = kernel(query_KGBTH.flatten(1, 3)[None], *self.layers[attention.layer_idx].shared)
        first_KGBTH, first_KGBT = (x[0].unflatten(1, query_KGBTH.shape[1:4]) for x in first)
        first_BNTH, first_BNT = (x.movedim(2, 0).flatten(1, 2) for x in (first_KGBTH, first_KGBT))
        if groups > 1:
            key_BKLH, value_BKLH = (x.repeat_interleave(groups, dim=1) for x in (key_BKLH, value_BKLH))
        bias = None if self.bias is None else self.bias.to(query_BNTH.dtype)
        second_BNTH, second_BNT = kernel(query_BNTH, key_BKLH, value_BKLH, attn_mask=bias)
        share_BNT1 = torch.sigmoid(first_BNT - second_BNT)[..., None]
        joined_BNTH = torch.lerp(second_BNTH.to(share_BNT1.dtype), first_BNTH.to(share_BNT1.dtype), share_BNT1)
        return joined_BNTH.to(query_BNTH.dtype).transpose(1, 2)


def _apart(attention, mask, queries_BTX: Tensor, cache):
    """`mask`, or `Apart` where a layer of the cache continues a beginning that is seen whole and there is a kernel for it."""
    held, queries = _held(cache, attention.layer_idx), queries_BTX.shape[1]
    columns = 0 if getattr(held, "shared", None) is None else held.shared[0].shape[2]
    is_plain = implementation_of(attention) == "sdpa" and attention.window is None and attention.softcap is None
    can_be = is_plain and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not columns or not queries or not can_be or not all(one.shared[0].is_cpu for one in cache.layers):
        return mask
    if mask is None:
        return Apart(None, cache.layers) if queries == 1 else mask
    sees_all = isinstance(mask, Tensor) and mask.dtype == torch.bool and bool(mask[..., :columns].all())
    return Apart(mask[..., columns:], cache.layers) if sees_all else mask
