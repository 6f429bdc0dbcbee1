# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Fitting projectors to a LLaVA's visual states: one layer after the other, in closed form and then by descent."""

import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from ...tiles_saisa import NEWLINE
from .descent import Descent
from .model import projectors_of
from .reporting import layer_line, show_progress
from .states import VisualStates
from .teacher import Teacher
from .work_folder import Workbench, write_json, write_tensors


@torch.no_grad()
def fit_projectors(bench: Workbench, teacher: Teacher) -> list[dict]:
    """Fits the projector of each layer of `bench.model` that has one, in place and in order. Returns for each such layer its
    errors on held-out images, with LLaVA's projector `copied` and with its own `fitted`.

    One layer's projector is fitted at a time, in float32. Each finished layer is kept in the work folder.
    """
    folder, projectors = bench.folder, projectors_of(bench.model)
    copied = copy.deepcopy(next(iter(projectors.values())))  # what every layer starts with: LLaVA's projector
    # nearly so where the LLaVA scales tiles down behind it
    exact = copied.linear_1.out_features >= teacher.projector_width
    states, report, source = VisualStates(bench, teacher), [], copied
    for index, own in projectors.items():

        def fit(index=index, source=source, own=own) -> dict[str, dict]:
            work = LayerFit(bench, index, states.at(index))  # let go before the states of the next layer are computed
            return {"copied": work.errors(copied)} | work.fitted(own, source, bool(index) or not exact)

        report.append(kept_layer(folder, index, own, fit))
        source = own if bench.fit.start == "previous" else copied
        bench.log(layer_line(report[-1], bench.model.config.text_config.num_hidden_layers))
    states.remove()
    return report


def kept_layer(folder: Path, index: int, projector: nn.Module, fit: Callable[[], dict]) -> dict:
    """What `fit()` returns, which fits `projector`, the one of layer `index`, in place: done once, and kept in `folder`."""
    done, record = folder / f"projector-{index}.safetensors", folder / f"layer-{index}.json"
    if not record.exists():
        start = time.perf_counter()
        errors = fit()
        write_tensors(done, projector.state_dict())
        write_json(record, {"layer": index, **errors, "seconds": round(time.perf_counter() - start, 2)})
    projector.load_state_dict(load_file(done))
    return json.loads(record.read_text(encoding="utf-8"))


class LayerFit:
    """Fits one layer's projector, in float32, to states at that layer's input.

    Args:
        bench: images and features.
        index: of the layer.
        states: (R, D), the LLaVA's visual states at its input, on disk.
    """

    def __init__(self, bench: Workbench, index: int, states: torch.Tensor):
        self.bench, self.fit, self.index, self.states = bench, bench.fit, index, states
        self.space = Space(bench.model.model.language_model.layers[index])
        self.per_step = max(1, round(self.fit.batch_tokens * len(bench.lengths) / len(states)))  # images

    def rows(self, images: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (R, C) and states (R, D) of some images, in float32 on the model's device."""
        features, states = (self.bench.rows(part, images).float() for part in (self.bench.features, self.states))
        return features, states

    def batches(self, images: range) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All of `images`, batch by batch."""
        for first in range(images.start, images.stop, self.per_step):
            yield self.rows(range(first, min(first + self.per_step, images.stop)))

    def fitted(self, projector: nn.Module, source: nn.Module, fit: bool = True) -> dict[str, dict]:
        """Gives `projector` the weights of `source`, fitted if `fit`, and returns its errors as `{"fitted": ...}`."""
        precise = copy.deepcopy(source).float()
        if fit:
            self.fit_projector(precise)
        projector.load_state_dict(precise.state_dict())
        return {"fitted": self.errors(projector)}

    def fit_projector(self, projector: nn.Module) -> None:
        """`solve`, then `descend`. If descent makes the error on fitted images larger, it is tried again at a quarter of the
        rate, and at a sixteenth; if neither helps, the closed form stays."""
        self.solve(projector)
        some = self.bench.fitted[: max(1, 16 * self.per_step)]
        solved, best = copy.deepcopy(projector.state_dict()), self.errors(projector, some)
        for slower in (1, 4, 16) if self.fit.steps else ():
            self.descend(projector, slower)
            errors = self.errors(projector, some)
            if errors["keys"] + errors["values"] <= best["keys"] + best["values"]:
                return
            projector.load_state_dict(solved)
            self.bench.log(f"layer {self.index + 1}: descent at 1/{slower} of the rate did not help and is undone")

    def solve(self, projector: nn.Module) -> None:
        """Sets `linear_2` to the best linear map of the inner activations, in closed form. Its targets are the states scaled
        to a mean square of 1: the norm behind it does the same. The solution does not depend on the linear map behind the
        norm, so it serves keys and values as well. A newline is the mean of its targets."""
        last = projector.linear_2
        size = last.in_features + (last.bias is not None)
        gram = torch.zeros(size, size, device=self.bench.device)
        right = torch.zeros(size, last.out_features, device=self.bench.device)
        newline, count = torch.zeros(last.out_features + 1, device=self.bench.device), 0
        for features, states in self.batches(self.bench.fitted):
            if projector.image_newline is not None:
                is_newline = (features == NEWLINE).all(-1)
                newline[:-1] += self.targets(states[is_newline]).sum(0)
                newline[-1] += is_newline.sum()
                features, states = features[~is_newline], states[~is_newline]
            inner = projector.act(projector.linear_1(features))
            if last.bias is not None:
                inner = torch.cat([inner, torch.ones_like(inner[:, :1])], dim=1)
            gram += inner.T @ inner
            right += inner.T @ self.targets(states)
            count += len(inner)
        gram, right = gram.cpu().double() / count, right.cpu().double() / count
        gram.diagonal().add_(self.fit.ridge * gram.diagonal().mean())
        solution = torch.linalg.solve(gram, right).to(last.weight)
        last.weight.copy_(solution[: last.in_features].T)
        if last.bias is not None:
            last.bias.copy_(solution[-1])
        if newline[-1]:
            projector.image_newline.copy_(newline[:-1] / newline[-1])

    def targets(self, states_RD: torch.Tensor) -> torch.Tensor:
        """What the projector is to put out; only the direction counts, unless `space` is `"hidden"` or no norm follows."""
        if self.fit.space == "hidden" or isinstance(self.space.norm, nn.Identity):
            return states_RD
        return states_RD * states_RD.square().mean(1, keepdim=True).add(1e-6).rsqrt()

    def descend(self, projector: nn.Module, slower: int = 1) -> None:
        """`fit.steps` steps of AdamW on both linear maps, at 1/`slower` of the rate."""
        fit, fitted = self.fit, self.bench.fitted
        generator = torch.Generator().manual_seed(fit.seed * 1000 + self.index)
        projector.requires_grad_(True)
        rate = fit.rate / slower / math.sqrt(projector.linear_1.out_features)
        descent = Descent(projector.parameters(), rate, fit.steps)
        for step in range(fit.steps):
            chosen = torch.randint(fitted.start, fitted.stop, (self.per_step,), generator=generator)
            features, states = self.rows(chosen.tolist())
            with torch.enable_grad():
                loss = self.space.loss(fit.space, projector(features), self.targets(states))
            line = f"layer {self.index + 1}: step {step + 1} of {fit.steps}, {descent.step(loss):.4f}"
            show_progress(self.bench.log, line, last=False)
        projector.requires_grad_(False)

    @torch.no_grad()
    def errors(self, projector: nn.Module, images: range | None = None) -> dict[str, float]:
        """Relative squared errors of the layer's input from images (None: the held-out ones), by place (see
        `Space.views`)."""
        sums: dict[str, tuple[float, float]] = {}
        for features, states in self.batches(self.bench.held_out if images is None else images):
            ours, theirs = self.space.views(projector(features).float()), self.space.views(states)
            for name, target in theirs.items():
                wrong, whole = sums.get(name, (0.0, 0.0))
                wrong += float((ours[name] - target).square().sum())
                sums[name] = wrong, whole + float(target.square().sum())
        return {name: wrong / whole for name, (wrong, whole) in sums.items()}


class Space:
    """Where a decoder layer's visual input counts: behind its norm, if it has one there, as keys before rotation, and as
    values. In float32."""

    def __init__(self, layer):
        name = layer.norms.before_attention
        self.norm = nn.Identity() if name is None else copy.deepcopy(getattr(layer, name)).float()
        self.attention = copy.copy(layer.self_attn)
        parts = ("k_proj", "v_proj", "qkv_proj", "k_norm")
        own = layer.self_attn._modules
        self.attention._modules = {name: copy.deepcopy(own[name]).float() for name in parts if name in own}

    def views(self, rows_RD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows at the layer's input -> the same rows in each of the three places, (R, .)."""
        normed = self.norm(rows_RD)
        keys, values = (part.flatten(1) for part in self.attention.keys_and_values(normed))
        return {"norm": normed, "keys": keys, "values": values}

    def loss(self, space: str, ours_RD: torch.Tensor, theirs_RD: torch.Tensor) -> torch.Tensor:
        """The relative squared error in `space` (see `Fit`)."""
        if space in ("hidden", "scaled"):
            return _relative_error(ours_RD, theirs_RD)
        if space == "norm":
            return _relative_error(self.norm(ours_RD), self.norm(theirs_RD))
        ours, theirs = self.views(ours_RD), self.views(theirs_RD)
        return (_relative_error(ours["keys"], theirs["keys"]) + _relative_error(ours["values"], theirs["values"])) / 2


def _relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return (ours - theirs).square().sum() / theirs.square().sum()
