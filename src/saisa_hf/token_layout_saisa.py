# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""TokenLayout: which positions of an input are text and which are visual, and every move between the two.

Shape suffixes as in `modeling_saisa.py`; R rows of a query or key tensor in a given order.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn


# Keys are rotated so many bytes at a time on a CPU: they stay in a core's own cache from the first pass to the last.
CACHED_BYTES = 2**19


def segments_of(visual_S: torch.Tensor) -> list[tuple[bool, int, int]]:
    """The stretches [start, end) of text and of visual tokens that `visual_S`, a bool tensor (S,) on the CPU, consists of, as
    (visual, start, end)."""
    length = len(visual_S)
    cuts = (torch.nonzero(visual_S[1:] != visual_S[:-1]).squeeze(1) + 1).tolist()
    bounds = [0, *cuts, length]
    return [(bool(visual_S[start]), start, end) for start, end in pairwise(bounds) if end > start]


def all_equal(x_BS: torch.Tensor) -> bool:
    """Whether all samples are the same."""
    return bool((x_BS == x_BS[:1]).all())


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """The rotary embedding of (..., H) by cosines and sines (..., H), into `out` if given: what language models do, in fewer
    passes over memory. With many visual tokens these are what a prefill waits for."""
    half = x.shape[-1] // 2
    out = x * cos if out is None else torch.mul(x, cos, out=out)
    out[..., :half].addcmul_(x[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:])
    return out


def real_tokens(attention_mask, length: int) -> torch.Tensor | None:
    """bool (B, length), False where `attention_mask` tells that one of the last `length` tokens is padding; None where it
    does not tell: it is missing, or prepared for the attention function."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.ndim != 2:
        return None
    return attention_mask[:, -length:].bool()


class TokenLayout:
    """Which positions of an input are text and which are visual, and every move between the two.

    Made once per forward pass; nothing else in the model indexes. The text tokens of each sample stand in T columns, T being
    those of the sample that has most: padding is left out, and the last column is each sample's last text token. Columns in
    front of a shorter sample's text repeat its first token; nothing reads what becomes of them. Where all samples have their
    pictures at the same positions and no padding, as a single sample does, rows are joined without an index.

    Args:
        visual_BS: bool, True at visual positions. None: the input has no visual token, and nothing is moved.
        visual_rows: (V,) where the visual tokens find their rows among stored ones. None: one row for each, in order.
        position_ids: (B or 1, S) positions, or None where they count from 0 in every sample.
        real_BS: bool, False at padding. None: there is none.
    """

    def __init__(
        self,
        visual_BS: torch.Tensor | None,
        visual_rows: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        real_BS: torch.Tensor | None = None,
    ):
        self.visual_BS = visual_BS
        if visual_BS is None:
            return
        device = visual_BS.device
        visual_BS = visual_BS.cpu()
        text_BS = ~visual_BS if real_BS is None else ~visual_BS & real_BS.cpu()
        self.batch_size, self.length = visual_BS.shape
        lengths_B = text_BS.sum(1)
        self.longest = int(lengths_B.max())
        has_padding = bool((text_BS == visual_BS).any())
        self.segments = segments_of(visual_BS[0]) if all_equal(visual_BS) and not has_padding else None
        # the column of each text token; before the first one of a sample it is the one that this will have
        column_BS = (text_BS.cumsum(1) - 1).clamp(min=0) + (self.longest - lengths_B)[:, None]
        self.column_BS = column_BS.clamp(max=max(self.longest - 1, 0))
        # position of column (b, t) in its sample
        first_B1 = text_BS.int().argmax(1, keepdim=True)
        position_BT = first_B1.repeat(1, self.longest)
        sample_R, position_R = text_BS.nonzero(as_tuple=True)
        position_BT[sample_R, self.column_BS[sample_R, position_R]] = position_R
        self.query_position_BT = position_BT.to(device)
        self.is_text_BT = (torch.arange(self.longest) >= (self.longest - lengths_B)[:, None]).to(device)
        sample_B1 = torch.arange(self.batch_size)[:, None]
        self._text_positions = (sample_B1 * self.length + position_BT).flatten().to(device)
        self._visual_positions = visual_BS.flatten().nonzero().squeeze(1).to(device)
        self._visual_rows = None if visual_rows is None else visual_rows.to(device)
        # the same pictures at the same positions in every sample: their rows are kept once
        self.shared = (
            visual_rows is not None
            and self.segments is not None
            and all_equal(visual_rows.view(self.batch_size, -1))
            and (position_ids is None or all_equal(position_ids))
        )
        if self.shared:
            first_sample = visual_BS[:1].sum()
            self._visual_positions = self._visual_positions[:first_sample]
            self._visual_rows = self._visual_rows[:first_sample]
        self._stored_slice = None
        if visual_rows is not None and len(self._visual_rows):
            first, count = int(visual_rows[0]), len(self._visual_rows)
            if torch.equal(visual_rows[:count].cpu(), torch.arange(first, first + count)):
                self._stored_slice = slice(first, first + count)
        if self.segments is None:
            # where position (b, s) finds its row in [text rows, visual rows], and in [text rows, zeros]; padding has a
            # neighbour's keys, since static caches of 4.57 count the keys that are not zero
            rows = self.batch_size * self.longest
            text_row_BS = sample_B1 * self.longest + self.column_BS
            visual_row_BS = rows + visual_BS.flatten().cumsum(0).view_as(visual_BS) - 1
            self._key_source = torch.where(visual_BS, visual_row_BS, text_row_BS).flatten().to(device)
            self._aligned_source = torch.where(text_BS, text_row_BS, rows).flatten().to(device)

    def text(self, x_BSX: torch.Tensor) -> torch.Tensor:
        """(B, S, ...) -> (B, T, ...): the rows of the text positions."""
        if self.visual_BS is None:
            return x_BSX
        x_RX = x_BSX.flatten(0, 1).index_select(0, self._text_positions.to(x_BSX.device))
        return x_RX.unflatten(0, (self.batch_size, self.longest))

    def visual(self, x_BSX: torch.Tensor) -> torch.Tensor:
        """(B, S, ...) -> (V, ...): the rows of the visual positions; of the first sample alone where they are shared."""
        return x_BSX.flatten(0, 1).index_select(0, self._visual_positions.to(x_BSX.device))

    def in_input_order(self, x_VX: torch.Tensor) -> torch.Tensor:
        """(V, X) -> (B, S, X): visual rows at their positions, zeros elsewhere. The inverse of `visual`."""
        x_RX = x_VX.new_zeros(self.batch_size * self.length, x_VX.shape[-1])
        x_RX = x_RX.index_copy(0, self._visual_positions.to(x_VX.device), x_VX)
        return x_RX.view(self.batch_size, self.length, -1)

    def placed(self, stored_VX: torch.Tensor) -> torch.Tensor:
        """Stored rows -> (V, X), the rows of the visual tokens in input order; those of the first sample alone where they are
        shared."""
        if self.visual_BS is None or self._visual_rows is None:
            return stored_VX
        if self._stored_slice is not None:
            return stored_VX[self._stored_slice]
        return stored_VX.index_select(0, self._visual_rows.to(stored_VX.device))

    def keys(
        self,
        text_BTKH: torch.Tensor,
        visual_VKH: torch.Tensor | None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """(B, T, K, H) and (V, K, H) -> (B, K, S, H): keys or values of text and visual tokens in input order; padding has
        a neighbour's. `visual_VKH=None` leaves zeros. `rotation`: cosines and sines (V, H) by which the visual ones are still
        to be rotated.
        """
        if self.visual_BS is None:
            if visual_VKH is not None:  # of no images: a sum of no numbers is zero, as is its gradient
                text_BTKH = text_BTKH + visual_VKH.sum()
            return text_BTKH.transpose(1, 2)
        if visual_VKH is None:
            visual_VKH = text_BTKH.new_zeros(1, 1, 1).expand(len(self._visual_positions), *text_BTKH.shape[2:])
        cos_sin_V1H = () if rotation is None else tuple(x_VH[:, None] for x_VH in rotation)
        if self.segments is not None and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self._written(text_BTKH, visual_VKH, *cos_sin_V1H)
        if rotation is not None:
            visual_VKH = rotated(visual_VKH, *cos_sin_V1H)
        if self.segments is not None:
            visual_BKVH = self._visual_by_sample(visual_VKH).expand(self.batch_size, -1, -1, -1)
            return self._join(text_BTKH.transpose(1, 2), visual_BKVH, dim=2)
        rows = torch.cat([text_BTKH.flatten(0, 1), visual_VKH])
        rows = rows.index_select(0, self._key_source.to(rows.device))
        return rows.unflatten(0, (self.batch_size, self.length)).transpose(1, 2)

    def align(self, x_BTX: torch.Tensor) -> torch.Tensor:
        """(B, T, X) -> (B, S, X): text rows at their positions, zeros at visual positions and at padding."""
        if self.visual_BS is None:
            return x_BTX
        if self.segments is not None:
            zeros_11X = x_BTX.new_zeros(1, 1, x_BTX.shape[-1])
            zeros_BVX = zeros_11X.expand(self.batch_size, self.length - self.longest, -1)
            return self._join(x_BTX, zeros_BVX, dim=1)
        rows = torch.cat([x_BTX.flatten(0, 1), x_BTX.new_zeros(1, x_BTX.shape[-1])])
        return rows.index_select(0, self._aligned_source.to(rows.device)).view(self.batch_size, self.length, -1)

    def targets(self, targets_BS: torch.Tensor, ignored: int) -> torch.Tensor:
        """(B, S) -> (B, T): what the text tokens are to predict; `ignored` in columns that are none of a sample's."""
        targets_BT = self.text(targets_BS).contiguous()
        if self.visual_BS is None:
            return targets_BT
        return targets_BT.masked_fill(~self.is_text_BT.to(targets_BT.device), ignored)

    def joined(self, text_BTX: torch.Tensor, visual_VX: torch.Tensor) -> torch.Tensor:
        """(B, T, X) and (V, X) -> (B, S, X): rows of text and visual tokens in input order."""
        return self.keys(text_BTX[:, :, None], visual_VX[:, None])[:, 0]

    def query_rows(self, x_BNSX: torch.Tensor) -> torch.Tensor:
        """(B or 1, N, S, X) -> (B, N, T, X): the rows of the queries' positions."""
        if self.visual_BS is None:
            return x_BNSX
        index_B1T1 = self.query_position_BT[:, None, :, None].to(x_BNSX.device)
        return torch.take_along_dim(x_BNSX, index_B1T1, dim=2)

    def align_queries(self, x_BNTL: torch.Tensor) -> torch.Tensor:
        """(B, N, T, L) -> (B, N, S, L): attention rows at their queries' positions, zeros at visual positions."""
        if self.visual_BS is None:
            return x_BNTL
        batch_size, heads, _, keys = x_BNTL.shape
        aligned_BSX = self.align(x_BNTL.transpose(1, 2).flatten(2))
        return aligned_BSX.view(batch_size, self.length, heads, keys).transpose(1, 2)

    def _visual_by_sample(self, x_VKH: torch.Tensor) -> torch.Tensor:
        """(V, K, H) -> (B, K, visual tokens of a sample, H), or (1, ...) where all samples share them."""
        return x_VKH.unflatten(0, (1 if self.shared else self.batch_size, -1)).transpose(1, 2)

    def _written(self, text_BTKH, visual_VKH, *cos_sin_V1H) -> torch.Tensor:
        """As `keys`: each row is written to its place straight away, the rotated ones a few heads at a time on a CPU."""
        heads, head_size = text_BTKH.shape[2:]
        joined_BKSH = text_BTKH.new_empty(self.batch_size, heads, self.length, head_size)
        text_BKTH = text_BTKH.transpose(1, 2)
        visual_BKVH, *cos_sin_B1VH = map(self._visual_by_sample, (visual_VKH, *cos_sin_V1H))
        taken = {False: 0, True: 0}
        for is_visual, start, end in self.segments:
            part, place_BKSH = slice(taken[is_visual], taken[is_visual] + end - start), joined_BKSH[:, :, start:end]
            taken[is_visual] += end - start
            if not is_visual or not cos_sin_B1VH:
                place_BKSH.copy_((visual_BKVH if is_visual else text_BKTH)[:, :, part])
                continue
            cos, sin = (x_B1VH[:, :, part] for x_B1VH in cos_sin_B1VH)
            own_BKSH = place_BKSH[: len(cos)]
            at_once = heads
            if own_BKSH.device.type == "cpu":
                at_once = max(1, CACHED_BYTES // (own_BKSH[:, 0].numel() * own_BKSH.element_size()))
            for x, out in zip(visual_BKVH[:, :, part].split(at_once, 1), own_BKSH.split(at_once, 1)):
                rotated(x, cos, sin, out)
            if self.shared:
                place_BKSH[1:] = own_BKSH
        return joined_BKSH

    def _join(self, text: torch.Tensor, visual: torch.Tensor, dim: int) -> torch.Tensor:
        """Text and visual tokens of all samples along `dim`, stretch by stretch in input order."""
        taken, pieces = {False: 0, True: 0}, []
        for is_visual, start, end in self.segments:
            pieces.append((visual if is_visual else text).narrow(dim, taken[is_visual], end - start))
            taken[is_visual] += end - start
        return torch.cat(pieces, dim)


# --- positions --------------------------------------------------------------------------------------------------------


class Rotation(NamedTuple):
    """Cosines and sines of the rotary embedding: (B, T, H) each for the text tokens, (V, H) for the visual ones, and
    (B or 1, S, H) for all in input order."""

    text: tuple[torch.Tensor, torch.Tensor]
    visual: tuple[torch.Tensor, torch.Tensor] | None
    all: tuple[torch.Tensor, torch.Tensor]

    def of_text(self, x_BTNH: torch.Tensor, attention) -> torch.Tensor:
        """Queries or keys of text tokens in a layer's `attention`, rotated."""
        return _rotated_as_trained(x_BTNH, *self.text, attention.rotate_half) if attention.rotates else x_BTNH

    def of_visual(self, key_VKH: torch.Tensor | None, attention):
        """Keys of visual tokens, and the rotation that is left to `TokenLayout.keys`, which does an ordinary one in fewer
        passes over memory; any other is done here, and None is left."""
        if key_VKH is None or self.visual is None or not attention.rotates:
            return key_VKH, None
        cos_VH = self.visual[0]
        if cos_VH.shape[-1] == key_VKH.shape[-1] and cos_VH.dtype == key_VKH.dtype:
            return key_VKH, self.visual
        return _rotated_as_trained(key_VKH, *self.visual, attention.rotate_half), None

    def as_text(self) -> "Rotation":
        """Of an input in which visual tokens are tokens like all others."""
        return Rotation(self.all, None, self.all)


def rotations_of(
    decoder, layout: TokenLayout, text_BTD: torch.Tensor, position_ids: torch.Tensor
) -> dict[str, Rotation]:
    """For each kind of layer the rotation of the positions `position_ids` (B or 1, S), visual ones included."""

    def rotation(kind):
        cos_sin = decoder.rotary_emb(text_BTD, position_ids, kind)
        if layout.visual_BS is None:
            return Rotation(cos_sin, None, cos_sin)
        by_sample = [x_BSH.expand(layout.batch_size, -1, -1) for x_BSH in cos_sin]
        return Rotation(tuple(map(layout.text, by_sample)), tuple(map(layout.visual, by_sample)), cos_sin)

    kinds = decoder.family.attention_types
    if decoder.rotary_emb.differs:
        return {kind: rotation(kind) for kind in set(kinds)}
    return dict.fromkeys(kinds, rotation(kinds[0]))


def _rotated_as_trained(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rotate_half) -> torch.Tensor:
    """(..., heads, H) by cosines and sines (..., H), as the language model does it, to the last bit. As much of each head is
    rotated as the cosines are for."""
    size, dtype = cos.shape[-1], x.dtype
    if size < x.shape[-1]:
        return torch.cat([_rotated_as_trained(x[..., :size], cos, sin, rotate_half), x[..., size:]], dim=-1)
    return (x * cos[..., None, :] + rotate_half(x) * sin[..., None, :]).to(dtype)


def tells_samples_apart(modules: Iterable[nn.Module]) -> bool:
    """Whether a hook adds arguments to a call of one of `modules`, as PEFT does with `adapter_names` and the offsets of
    activated LoRA: these are one for each sample, so that the module's input has to be (B, S, ...)."""
    return any(one._forward_pre_hooks_with_kwargs for module in modules for one in module.modules())
