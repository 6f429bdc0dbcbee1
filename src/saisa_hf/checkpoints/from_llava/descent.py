# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Gradient descent as fitting and distilling use it."""

import math
from collections.abc import Iterable

import torch
from torch import nn


class Descent:
    """AdamW without weight decay, at a rate that warms up and then follows a cosine down to zero.

    Args:
        parameters: to train.
        rate: the highest learning rate.
        steps: of the whole schedule.
        max_norm: to which the norm of the gradient is clipped; None: not at all.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], rate: float, steps: int, max_norm: float | None = None):
        self.parameters, self.max_norm = list(parameters), max_norm
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: _cosine(step, steps))

    def step(self, loss: torch.Tensor) -> float:
        """One step down the gradient of `loss`. Returns the loss."""
        loss.backward()
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.max_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def _cosine(step: int, steps: int, warm_up: float = 0.05) -> float:
    done = step / max(steps, 1)
    return min(1.0, (done + 1 / max(steps, 1)) / warm_up) * 0.5 * (1 + math.cos(math.pi * done))
