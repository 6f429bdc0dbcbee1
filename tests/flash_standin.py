# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""A stand-in for the package `flash_attn` (FlashAttention 2) that runs on a CPU, for tests.

Only the kernels are replaced. What transformers does around them (choosing the function, unpadding, flattening,
windows, casts) is its own code, unchanged, so a model tested with the stand-in makes the calls it would make on a GPU.

Where the real kernels leave the result undefined (queries that no sequence covers, a too small `max_seqlen`), the
stand-in raises; where they refuse, it raises too, with one exception: float32 and float64 are accepted here.

Shape letters: B batch, T queries, S keys, H query heads, G key-value heads, D head width, N sequences packed into one.
"""

import importlib.machinery
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from transformers import modeling_flash_attention_utils, modeling_utils


@dataclass
class FlashCall:
    """One kernel call: the kernel's name, the shapes of its queries and keys, every other argument (tensors as lists)."""

    function: str
    query: tuple[int, ...]
    key: tuple[int, ...]
    arguments: dict


def attend(q, k, v, dropout_p, softmax_scale, causal, window_size, softcap):
    """One sequence: q (T, H, D), k and v (S, G, D) -> (T, H, D). A query that sees no key gives zeros.

    Query t stands at key position t + S - T (aligned bottom right, as in flash_attn >= 2.1) and sees the `left` keys
    before it and the `right` keys after it, itself included; -1 is no limit, and `causal` sets `right` to 0.
    """
    (queries, heads, width), (keys, groups, _) = q.shape, k.shape
    scale = width**-0.5 if softmax_scale is None else softmax_scale
    wide = torch.promote_types(q.dtype, torch.float32)
    query, key, value = (x.to(wide).transpose(0, 1) for x in (q, k, v))
    key, value = (x.repeat_interleave(heads // groups, 0) for x in (key, value))
    scores = query @ key.mT * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    left, right = window_size[0], 0 if causal else window_size[1]
    position = torch.arange(queries, device=q.device)[:, None] + keys - queries
    distance = torch.arange(keys, device=q.device) - position
    visible = torch.ones_like(distance, dtype=torch.bool)
    if left >= 0:
        visible &= distance >= -left
    if right >= 0:
        visible &= distance <= right
    weights = scores.masked_fill(~visible, torch.finfo(wide).min).softmax(-1) * visible
    return (F.dropout(weights, dropout_p) @ value).transpose(0, 1).to(q.dtype)


def _refuse_what_the_kernels_refuse(q, k, v, alibi_slopes, return_attn_probs):
    assert k.shape == v.shape and q.dtype == k.dtype == v.dtype, (q.dtype, k.shape, k.dtype, v.shape, v.dtype)
    assert q.shape[-1] == k.shape[-1] <= 256 and q.shape[-2] % k.shape[-2] == 0, (q.shape, k.shape)
    assert alibi_slopes is None and not return_attn_probs, "the stand-in does neither"


# The signatures are the package's, as of 2.8: transformers reads from them which arguments it may pass.
def _kernels(calls: list[FlashCall]):
    def flash_attn_func(
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        _refuse_what_the_kernels_refuse(q, k, v, alibi_slopes, return_attn_probs)
        assert q.ndim == k.ndim == 4 and len(q) == len(k), (q.shape, k.shape)
        options = {
            "dropout_p": dropout_p,
            "softmax_scale": softmax_scale,
            "causal": causal,
            "window_size": tuple(window_size),
            "softcap": softcap,
        }
        calls.append(FlashCall("flash_attn_func", tuple(q.shape), tuple(k.shape), options))
        return torch.stack([attend(*row, **options) for row in zip(q, k, v)])

    def flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        _refuse_what_the_kernels_refuse(q, k, v, alibi_slopes, return_attn_probs)
        assert q.ndim == k.ndim == 3 and block_table is None, (q.shape, k.shape)
        for name, offsets, longest, rows in (
            ("q", cu_seqlens_q, max_seqlen_q, len(q)),
            ("k", cu_seqlens_k, max_seqlen_k, len(k)),
        ):
            assert offsets.dtype == torch.int32 and offsets.ndim == 1 and offsets.is_contiguous(), (name, offsets)
            assert offsets[0] == 0 and (offsets.diff() >= 0).all() and offsets[-1] <= rows, (name, offsets, rows)
            assert offsets.diff().max() <= longest, (name, offsets, longest)
        assert len(cu_seqlens_q) == len(cu_seqlens_k), (cu_seqlens_q, cu_seqlens_k)
        assert cu_seqlens_q[-1] == len(q), f"queries from {cu_seqlens_q[-1]} to {len(q)} are in no sequence"
        options = {
            "dropout_p": dropout_p,
            "softmax_scale": softmax_scale,
            "causal": causal,
            "window_size": tuple(window_size),
            "softcap": softcap,
        }
        from_q, from_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        lengths = {
            "cu_seqlens_q": from_q,
            "cu_seqlens_k": from_k,
            "max_seqlen_q": int(max_seqlen_q),
            "max_seqlen_k": int(max_seqlen_k),
        }
        calls.append(FlashCall("flash_attn_varlen_func", tuple(q.shape), tuple(k.shape), lengths | options))
        return torch.cat(
            [
                attend(q[q0:q1], k[k0:k1], v[k0:k1], **options)
                for q0, q1, k0, k1 in zip(from_q, from_q[1:], from_k, from_k[1:])
            ]
        )

    return flash_attn_func, flash_attn_varlen_func


def index_first_axis(rows, indices):
    """rows (R, ...), indices (N,) -> (N, ...)."""
    return rows[indices]


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """hidden_states (B, T, ...), attention_mask (B, T) -> the rows with mask 1 (N, ...), their indices among the B * T,
    the offsets of the sequences (B + 1,) in int32, the longest one's length, the lengths (B,)."""
    assert unused_mask is None, "the stand-in does not do unused_mask"
    lengths = attention_mask.sum(-1, dtype=torch.int32)
    indices = attention_mask.flatten().nonzero().flatten()
    offsets = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, offsets, int(lengths.max()), lengths


def pad_input(hidden_states, indices, batch, seqlen):
    """hidden_states (N, ...), indices (N,) among the B * T -> (B, T, ...) with zeros elsewhere."""
    padded = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return padded.index_put((indices,), hidden_states).unflatten(0, (batch, seqlen))


def _module(name: str, **names) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
    vars(module).update(names)
    return module


@contextmanager
def flash_attention() -> Iterator[list[FlashCall]]:
    """Make `attn_implementation="flash_attention_2"` work on a CPU without the package, for any model.

    Yields the list of kernel calls, which grows as they are made (`calls.clear()` starts afresh). transformers' checks
    run, but find the package, and a CPU among the devices that it supports; a model class without
    `_supports_flash_attn` is refused as ever. Models that were switched to flash attention inside fail outside.
    """
    calls: list[FlashCall] = []
    flash_attn_func, flash_attn_varlen_func = _kernels(calls)
    package = _module(
        "flash_attn",
        __path__=[],
        flash_attn_func=flash_attn_func,
        flash_attn_varlen_func=flash_attn_varlen_func,
        flash_attn_with_kvcache=None,  # for transformers' continuous batching only, which can do without
    )
    padding = _module(
        "flash_attn.bert_padding", index_first_axis=index_first_axis, pad_input=pad_input, unpad_input=unpad_input
    )

    def yes(*args, **kwargs):
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", package)
        patch.setitem(sys.modules, "flash_attn.bert_padding", padding)
        utils = modeling_flash_attention_utils
        patch.setattr(utils, "is_flash_attn_2_available", yes)
        if hasattr(utils, "FLASH_ATTENTION_COMPATIBILITY_MATRIX"):  # 5.x
            matrix = utils.FLASH_ATTENTION_COMPATIBILITY_MATRIX
            here = {"general_availability_check": yes, "supported_devices": ((yes, "cpu"),)}
            patch.setitem(matrix, 2, matrix[2] | here)
        else:  # asks for CUDA or, of all others, an MLU in its last check
            patch.setattr(modeling_utils, "is_flash_attn_2_available", yes)
            patch.setattr(modeling_utils, "is_torch_mlu_available", yes)
        # What transformers has imported so far, which it keeps in globals, is forgotten now and remembered afterwards.
        for name in vars(utils).copy():
            if name == "_loaded_implementation" or (name.startswith("_") and name.endswith("_fn")):
                patch.setattr(utils, name, None)
        yield calls
