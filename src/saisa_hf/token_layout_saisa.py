# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Where text and images are in an input: the moves of rows between them, and the rotary embedding of their positions.

Shape suffixes as in `modeling_saisa.py`; R rows in a given order.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn


# Keys are rotated so many bytes at a time on a CPU: they stay in a core's own cache from the first pass to the last.
CACHED_BYTES = 2**19


def segments_of(visual_S: Tensor, document_S: Tensor | None = None) -> list[tuple[bool, int, int, int]]:
    """(visual, start, end, row) of the stretches [start, end) of text and of visual tokens in `visual_S`, bool (S,) on the
    CPU, cut where a packed sample ends as well. `row` counts the tokens of the same kind in front of a stretch."""
    changes_S = visual_S[1:] != visual_S[:-1]
    if document_S is not None:
        changes_S = changes_S | (document_S[1:] != document_S[:-1])
    cuts = [0, *(changes_S.nonzero().squeeze(1) + 1).tolist(), len(visual_S)]
    row_S = torch.where(visual_S, visual_S.cumsum(0), (~visual_S).cumsum(0)) - 1
    return [(bool(visual_S[start]), start, end, int(row_S[start])) for start, end in pairwise(cuts)]


def all_equal(x_BS: Tensor) -> bool:
    """Whether all samples are the same."""
    return bool((x_BS == x_BS[:1]).all())


def rotated(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor | None = None) -> Tensor:
    """The rotary embedding of (..., H) by cosines and sines (..., H), into `out` if given: what language models compute, in
    fewer passes over memory. With many visual tokens a prefill waits for these."""
    half = x.shape[-1] // 2
    out = x * cos if out is None else torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def real_tokens(attention_mask, length: int) -> Tensor | None:
    """bool (B, length), False at padding among the last `length` tokens; None if the mask is missing, or prepared (4-D)."""
    marks_padding = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
    return attention_mask[:, -length:].bool() if marks_padding else None


class TokenLayout:
    """Which positions of an input are text and which are visual, and every move between the two.

    Made once per forward pass; nothing else in the model indexes. The text tokens of each sample stand at the end of T
    columns, as many as the longest text has; padding is left out. Columns in front of a shorter text repeat its first token,
    and nothing reads what becomes of them. Where all samples have their images at the same positions and no padding, as a
    single sample does, rows are joined without an index.

    Args:
        visual_BS: bool, True at visual positions. None: the input has no visual token, and nothing is moved.
        visual_rows: (V,) where the visual tokens find their rows among stored ones. None: one row for each, in order.
        position_ids: (B or 1, S) positions, or None where they count from 0 in every sample.
        real_BS: bool, False at padding. None: there is none.
        columns: at least so many of them, and an index even where rows could be joined without: then all layouts of a shape
            are alike to a graph.
    """

    def __init__(self, visual_BS: Tensor | None, visual_rows=None, position_ids=None, real_BS=None, columns=0):
        self.visual_BS = visual_BS
        self._visual_rows: Tensor | slice = slice(None)
        if visual_BS is None:
            return
        device, visual_BS = visual_BS.device, visual_BS.cpu()
        text_BS = ~visual_BS if real_BS is None else ~visual_BS & real_BS.cpu()
        self.batch_size, self.length = self.shape = visual_BS.shape
        all_alike = all_equal(visual_BS) and bool((text_BS | visual_BS).all())
        self.segments = segments_of(visual_BS[0]) if all_alike and not columns else None
        self._place_text(text_BS, columns, device)
        self._place_visual(visual_BS, visual_rows, position_ids, device)
        if self.segments is None:
            # where position (b, s) finds its row in [text rows, visual rows], and in [text rows, zeros]; padding has a
            # neighbour's keys, since static caches of 4.57 count the keys that are not zero
            rows = self.batch_size * self.longest
            text_row_BS = torch.arange(self.batch_size)[:, None] * self.longest + self.column_BS
            visual_row_BS = rows + visual_BS.flatten().cumsum(0).view_as(visual_BS) - 1
            self._key_source = torch.where(visual_BS, visual_row_BS, text_row_BS).flatten().to(device)
            self._aligned_source = torch.where(text_BS, text_row_BS, rows).flatten().to(device)

    def _place_text(self, text_BS: Tensor, columns: int, device: torch.device) -> None:
        """The columns of the text tokens, and the positions of the columns."""
        lengths_B = text_BS.sum(1)
        self.longest = max(int(lengths_B.max()), columns)
        shift_B1 = (self.longest - lengths_B)[:, None]
        # before the first text token of a sample, the column that this will have
        column_BS = (text_BS.cumsum(1) - 1).clamp(min=0) + shift_B1
        self.column_BS = column_BS.clamp(max=max(self.longest - 1, 0))
        is_text_BT = torch.arange(self.longest) >= shift_B1
        position_BT = text_BS.int().argmax(1, keepdim=True).repeat(1, self.longest)
        position_BT[is_text_BT] = text_BS.nonzero()[:, 1]
        self.query_position_BT, self.is_text_BT = position_BT.to(device), is_text_BT.to(device)
        self._text_positions = (torch.arange(self.batch_size)[:, None] * self.length + position_BT).flatten().to(device)

    def _place_visual(self, visual_BS: Tensor, visual_rows, position_ids, device: torch.device) -> None:
        """The positions of the visual tokens and where their rows are stored: once, where all samples have the same."""
        self._visual_positions, self.shared = visual_BS.flatten().nonzero().squeeze(1).to(device), False
        if visual_rows is None:
            return
        if self.segments is not None and (position_ids is None or all_equal(position_ids)):
            self.shared = all_equal(visual_rows.view(self.batch_size, -1))
        if self.shared:
            visual_rows = visual_rows[: len(visual_rows) // self.batch_size]
            self._visual_positions = self._visual_positions[: len(visual_rows)]
        self._visual_rows = visual_rows.to(device)
        if len(visual_rows) and bool((visual_rows.diff() == 1).all()):  # then they need not be copied
            self._visual_rows = slice(int(visual_rows[0]), int(visual_rows[-1]) + 1)

    def text(self, x_BSX: Tensor) -> Tensor:
        """(B, S, ...) -> (B, T, ...): the rows of the text positions."""
        if self.visual_BS is None:
            return x_BSX
        x_RX = x_BSX.flatten(0, 1).index_select(0, self._text_positions.to(x_BSX.device))
        return x_RX.unflatten(0, (self.batch_size, self.longest))

    def leading_text(self, slots: Tensor) -> Tensor:
        """bool (B, T), the text in front of the first image of each sample that has one, if it begins at the first of the
        places `slots` (S,) in the cache."""
        first_B1 = self.visual_BS.to(slots.device).int().argmax(1, keepdim=True)  # 0 where there is none
        return (self.query_position_BT.to(slots.device) < first_B1) & (slots[:1] == 0)

    def visual(self, x_BSX: Tensor) -> Tensor:
        """(B, S, ...) -> (V, ...): the rows of the visual positions; of the first sample alone where they are shared."""
        return x_BSX.flatten(0, 1).index_select(0, self._visual_positions.to(x_BSX.device))

    def in_input_order(self, x_VX: Tensor) -> Tensor:
        """(V, X) -> (B, S, X): visual rows at their positions, zeros elsewhere. The inverse of `visual`."""
        x_RX = x_VX.new_zeros(self.batch_size * self.length, x_VX.shape[-1])
        return x_RX.index_copy(0, self._visual_positions.to(x_VX.device), x_VX).unflatten(0, self.shape)

    def placed(self, stored_VX: Tensor) -> Tensor:
        """Stored rows -> (V, X), those of the visual tokens in input order; the first sample's alone where shared."""
        rows = self._visual_rows
        return stored_VX[rows] if isinstance(rows, slice) else stored_VX.index_select(0, rows.to(stored_VX.device))

    def keys(self, text_BTKH: Tensor, visual_VKH: Tensor | None, rotation: tuple | None = None) -> Tensor:
        """(B, T, K, H) and (V, K, H) -> (B, K, S, H): keys or values in input order. Padding has a neighbour's; without
        `visual_VKH`, visual positions have zeros. `rotation`, a pair of (V, 1, H), is still to be applied to it."""
        if self.visual_BS is None:
            if visual_VKH is not None:  # of no images: a sum of no numbers is zero, as is its gradient
                text_BTKH = text_BTKH + visual_VKH.sum()
            return text_BTKH.transpose(1, 2)
        if visual_VKH is None:
            visual_VKH = text_BTKH.new_zeros(1, 1, 1).expand(len(self._visual_positions), *text_BTKH.shape[2:])
        in_place = self.segments is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if rotation is not None and not in_place:
            visual_VKH, rotation = rotated(visual_VKH, *rotation), None
        if self.segments is None:
            rows = torch.cat([text_BTKH.flatten(0, 1), visual_VKH])
            return rows.index_select(0, self._key_source.to(rows.device)).unflatten(0, self.shape).transpose(1, 2)
        by_sample = (1 if self.shared else self.batch_size, -1)
        visual_and_rotation = [x.unflatten(0, by_sample).transpose(1, 2) for x in (visual_VKH, *(rotation or ()))]
        text_BKTH = text_BTKH.transpose(1, 2)
        if in_place:
            return self._written(text_BKTH, *visual_and_rotation)
        visual_BKVH = visual_and_rotation[0].expand(self.batch_size, -1, -1, -1)
        parts = ((visual_BKVH if visual else text_BKTH, row, end - start) for visual, start, end, row in self.segments)
        return torch.cat([x.narrow(2, row, length) for x, row, length in parts], dim=2)

    def joined(self, text_BTX: Tensor, visual_VX: Tensor | None) -> Tensor:
        """(B, T, X) and (V, X) -> (B, S, X): rows of text and visual tokens in input order; without the latter, the text."""
        return text_BTX if visual_VX is None else self.keys(text_BTX[:, :, None], visual_VX[:, None])[:, 0]

    def align(self, x_BTX: Tensor) -> Tensor:
        """(B, T, X) -> (B, S, X): text rows at their positions, zeros at visual positions and at padding."""
        if self.visual_BS is None:
            return x_BTX
        if self.segments is not None:
            return self.keys(x_BTX[:, :, None], None)[:, 0]
        rows = torch.cat([x_BTX.flatten(0, 1), x_BTX.new_zeros(1, x_BTX.shape[-1])])
        return rows.index_select(0, self._aligned_source.to(rows.device)).unflatten(0, self.shape)

    def targets(self, targets_BS: Tensor, ignored: int) -> Tensor:
        """(B, S) -> (B, T): what the text tokens are to predict; `ignored` in columns that are none of a sample's."""
        if self.visual_BS is None:
            return targets_BS.contiguous()
        return self.text(targets_BS).masked_fill(~self.is_text_BT.to(targets_BS.device), ignored)

    def query_rows(self, x_BNSX: Tensor) -> Tensor:
        """(B or 1, N, S, X) -> (B, N, T, X): the rows of the queries' positions."""
        if self.visual_BS is None:
            return x_BNSX
        index_B1T1 = self.query_position_BT[:, None, :, None].to(x_BNSX.device)
        return torch.take_along_dim(x_BNSX, index_B1T1, dim=2)

    def align_queries(self, x_BNTL: Tensor) -> Tensor:
        """(B, N, T, L) -> (B, N, S, L): attention rows at their queries' positions, zeros at visual positions."""
        if self.visual_BS is None:
            return x_BNTL
        aligned_BSX = self.align(x_BNTL.transpose(1, 2).flatten(2))
        return aligned_BSX.unflatten(2, (-1, x_BNTL.shape[3])).transpose(1, 2)

    def _written(self, text_BKTH: Tensor, visual_BKVH: Tensor, *cos_sin_B1VH: Tensor) -> Tensor:
        """As `keys`: each row is written to its place straight away, the rotated ones a few heads at a time on a CPU."""
        batch_size, heads, _, head_size = text_BKTH.shape
        joined_BKSH = text_BKTH.new_empty(batch_size, heads, self.length, head_size)
        for visual, start, end, row in self.segments:
            place_BKSH, rows = joined_BKSH[:, :, start:end], slice(row, row + end - start)
            if not visual or not cos_sin_B1VH:
                place_BKSH.copy_((visual_BKVH if visual else text_BKTH)[:, :, rows])
                continue
            cos, sin = (x_B1VH[:, :, rows] for x_B1VH in cos_sin_B1VH)
            own_BKSH = place_BKSH[: len(cos)]  # of the first sample alone where the visual tokens are shared
            at_once = max(1, CACHED_BYTES // own_BKSH[:, 0].nbytes) if own_BKSH.is_cpu else heads
            for x, out in zip(visual_BKVH[:, :, rows].split(at_once, 1), own_BKSH.split(at_once, 1)):
                rotated(x, cos, sin, out)
            if self.shared:
                place_BKSH[1:] = own_BKSH
        return joined_BKSH


class Rotation(NamedTuple):
    """Cosines and sines: (B, T, 1, H) each for text tokens, (V, 1, H) for visual ones, (B or 1, S, 1, H) for all in order."""

    text: tuple[Tensor, Tensor]
    visual: tuple[Tensor, Tensor] | None
    all: tuple[Tensor, Tensor]

    def of_text(self, x_BTNH: Tensor, attention) -> Tensor:
        """Queries or keys of text tokens in a layer's `attention`, rotated."""
        return _rotated_as_trained(x_BTNH, *self.text) if attention.rotates else x_BTNH

    def of_visual(self, key_VKH: Tensor | None, attention) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """Keys of visual tokens, and the rotation that is left to `TokenLayout.keys`, which does an ordinary one in fewer
        passes over memory; any other is done here, and None is left."""
        if key_VKH is None or self.visual is None or not attention.rotates:
            return key_VKH, None
        if self.visual[0].shape[-1] == key_VKH.shape[-1] and self.visual[0].dtype == key_VKH.dtype:
            return key_VKH, self.visual
        return _rotated_as_trained(key_VKH, *self.visual), None

    def as_text(self) -> "Rotation":
        """Of an input in which visual tokens are tokens like all others."""
        return Rotation(self.all, None, self.all)


def rotations_of(decoder, layout: TokenLayout, text_BTD: Tensor, position_ids: Tensor) -> dict[str, Rotation]:
    """For each kind of layer the rotation of the positions `position_ids` (B or 1, S), visual ones included."""

    def rotation(kind):
        cos_sin = tuple(x_BSH[:, :, None] for x_BSH in decoder.rotary_emb(text_BTD, position_ids, kind))
        if layout.visual_BS is None:
            return Rotation(cos_sin, None, cos_sin)
        by_sample = [x_BS1H.expand(layout.batch_size, -1, -1, -1) for x_BS1H in cos_sin]
        return Rotation(tuple(map(layout.text, by_sample)), tuple(map(layout.visual, by_sample)), cos_sin)

    kinds = decoder.family.attention_types
    if decoder.rotary_emb.differs:
        return {kind: rotation(kind) for kind in set(kinds)}
    return dict.fromkeys(kinds, rotation(kinds[0]))


def _rotated_as_trained(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(..., heads, H) by cosines and sines (..., 1, H), as the language model does it, to the last bit. As much of each head
    is rotated as the cosines are for."""
    size = cos.shape[-1]
    if size < x.shape[-1]:
        return torch.cat([_rotated_as_trained(x[..., :size], cos, sin), x[..., size:]], dim=-1)
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def tells_samples_apart(modules: Iterable[nn.Module]) -> bool:
    """Whether a hook adds arguments to a call of one of `modules`, as PEFT does with `adapter_names` and the offsets of
    activated LoRA: these are one for each sample, so that the module's input has to be (B, S, ...)."""
    return any(one._forward_pre_hooks_with_kwargs for module in modules for one in module.modules())
