# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Distilling: the projectors learn the LLaVA's next-token distributions along its own answers."""

import torch

from .agreement import answered, batches_of_one_prompt, both_logits, divergence
from .descent import Descent
from .model import projectors_of
from .reporting import show_progress
from .teacher import Teacher
from .work_folder import Workbench


def distill(bench: Workbench, teacher: Teacher) -> list[float]:
    """Trains the projectors alone, in place, on the divergence from the LLaVA along its answers about the fitted images.
    Returns the divergence at each step. The projectors are in float32 meanwhile."""
    fit = bench.fit
    wanted = bench.fitted[: fit.distill_steps * fit.distill_batch]
    rows = answered(bench, teacher, wanted, "answers.json")
    projectors = list(projectors_of(bench.model).values())
    dtype = projectors[0].linear_1.weight.dtype
    parameters = [parameter for projector in projectors for parameter in projector.float().parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    descent = Descent(parameters, fit.distill_rate, fit.distill_steps, max_norm=1.0)
    generator = torch.Generator().manual_seed(fit.seed)
    batches: list[list[dict]] = []
    losses: list[float] = []
    for step in range(fit.distill_steps):
        if not batches:
            made = list(batches_of_one_prompt(_shuffled(rows, generator), bench, fit.distill_batch))
            batches = _shuffled(made, generator)
        losses.append(descent.step(divergence(*both_logits(bench, teacher, batches.pop())).mean()))
        last = step + 1 == fit.distill_steps
        line = f"distillation: step {step + 1} of {fit.distill_steps}, divergence {losses[-1]:.4f}"
        show_progress(bench.log, line, last)
    for projector in projectors:
        projector.to(dtype).requires_grad_(False)
    return losses


def _shuffled(items: list, generator: torch.Generator) -> list:
    return [items[place] for place in torch.randperm(len(items), generator=generator).tolist()]
