# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Which rows of a step of the engine are text, and the runs that they form. Plain PyTorch: no vLLM is needed here.

A step has rows of several requests, one request after the other, each a stretch of its prompt or one new token. A run is a
stretch of text rows of one request between images or between an image and an end. A text token sees all that is in front of
it, so that a run which ends at position b is, to an attention kernel, a sequence of its own: its queries are the last of
b + 1 keys, which lie in the blocks of its request.

Shape suffixes: N rows of the step, Q requests, T text rows, V visual rows, R runs.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Runs:
    """The runs of a step, all tensors on the CPU.

    Attributes:
        text_rows: (T,) int64, rows of text tokens, in order.
        request: (R,) int64, the request that each run belongs to.
        query_start: (R + 1,) int32, where in `text_rows` each run begins; the last is T.
        seq_lens: (R,) int32, how many tokens of its request are in view of a run's last token, that one included.
    """

    text_rows: Tensor
    request: Tensor
    query_start: Tensor
    seq_lens: Tensor

    def __len__(self) -> int:
        return len(self.request)

    @property
    def longest(self) -> int:
        """Rows of the longest run."""
        return int(self.query_start.diff().max())

    def parts(self, most: int | None) -> "list[Runs]":
        """The same in parts of at most `most` runs; None: in one. A later part of a request reads the keys of an earlier one,
        so they have to be run in this order."""
        if most is None or len(self) <= most:
            return [self]
        return [self._part(first, min(first + most, len(self))) for first in range(0, len(self), most)]

    def _part(self, first: int, end: int) -> "Runs":
        start = self.query_start[first : end + 1]
        rows = self.text_rows[int(start[0]) : int(start[-1])]
        return Runs(rows, self.request[first:end], start - start[0], self.seq_lens[first:end])


def runs_of(query_start: Tensor, seq_lens: Tensor, visual: Tensor) -> Runs:
    """The runs of a step.

    Args:
        query_start: (Q + 1,) where the rows of each request begin; the last is N. Requests without a row have none.
        seq_lens: (Q,) tokens of each request up to its last row, that one included. Further elements are padding.
        visual: (N,) bool, rows of visual tokens. Further elements are padding.

    Raises:
        ValueError: `visual` has fewer elements than there are rows, or a request has more rows than tokens.
    """
    query_start, seq_lens, visual = query_start.long().cpu(), seq_lens.long().cpu(), visual.bool().cpu()
    rows, lengths = int(query_start[-1]), query_start.diff()
    seq_lens = seq_lens[: len(lengths)]
    if len(visual) < rows or bool((lengths > seq_lens).any()):
        raise ValueError(
            f"The step has {rows} rows of lengths {lengths.tolist()}, with {len(visual)} marks of visual tokens and "
            f"sequences of {seq_lens.tolist()} tokens: expected a mark for each row, and no more rows than tokens."
        )
    request_N = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    seen_N = torch.arange(rows) + (seq_lens - query_start[1:])[request_N] + 1  # tokens up to each row's
    text_rows = (~visual[:rows]).nonzero().squeeze(1)
    if not len(text_rows):
        none = torch.zeros(0, dtype=torch.int32)
        return Runs(text_rows, text_rows, torch.zeros(1, dtype=torch.int32), none)
    request_T = request_N[text_rows]
    begins = torch.ones(len(text_rows), dtype=torch.bool)
    begins[1:] = (text_rows.diff() != 1) | (request_T.diff() != 0)
    start = begins.nonzero().squeeze(1)
    end = torch.cat([start[1:], torch.tensor([len(text_rows)])])
    query_start_R = torch.cat([start, end[-1:]]).int()
    return Runs(text_rows, request_T[start], query_start_R, seen_N[text_rows[end - 1]].int())
