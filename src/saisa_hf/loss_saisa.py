# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Next-token cross-entropy without a tensor of all logits: they exist for some labelled rows at a time.

A vocabulary is ten to a hundred times as wide as the hidden states. In training, logits of all positions are the largest
tensor there is, most of them for positions that no label asks for. Here backward makes them again.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


IGNORED = -100
LOGITS_AT_ONCE = 2**25  # 128 MiB in float32; each chunk is one such tensor, its copy in float32 and its gradient


def chunked_cross_entropy(
    hidden_PD: torch.Tensor,
    targets_P: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    vocab_size: int,
    num_items_in_batch: torch.Tensor | int | None = None,
    logits_at_once: int = LOGITS_AT_ONCE,
) -> torch.Tensor:
    """The loss of transformers' causal language models, as a float32 scalar.

    Args:
        hidden_PD: rows that predict, leading axes of any number.
        targets_P: what each should predict; -100 is ignored, and the head is not applied to these rows.
        head: hidden rows (n, D) -> logits (n, vocab_size). Its weights get their gradients.
        vocab_size: width of the logits.
        num_items_in_batch: what the sum is divided by; None is the number of targets.
        logits_at_once: most logits, rows times `vocab_size`, that exist at a time.
    """
    hidden_PD, targets_P = hidden_PD.flatten(0, -2), targets_P.flatten().to(hidden_PD.device)
    rows = (targets_P != IGNORED).nonzero().flatten()
    hidden_RD, targets_R = hidden_PD.index_select(0, rows), targets_P.index_select(0, rows)

    def chunk_loss(hidden_ND, targets_N):
        return nn.functional.cross_entropy(head(hidden_ND).float(), targets_N, reduction="sum")

    size = max(1, logits_at_once // vocab_size)
    # nothing to learn from is a loss of zero, which still reaches the weights: processes that train together expect it
    total = 0.0 if len(rows) else head(hidden_PD[:1]).float().sum() * 0.0
    for part_ND, part_N in zip(hidden_RD.split(size), targets_R.split(size)):
        if torch.is_grad_enabled():
            total = total + checkpoint(chunk_loss, part_ND, part_N, use_reentrant=False)
        else:
            total = total + chunk_loss(part_ND, part_N)
    count = len(rows) if num_items_in_batch is None else num_items_in_batch
    if isinstance(count, torch.Tensor):
        return total / count.to(total.device).clamp(min=1)
    return total.float() / max(count, 1)
