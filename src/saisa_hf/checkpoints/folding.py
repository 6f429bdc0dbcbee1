# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Projectors folded into the maps behind them: `SaisaModel.fold_projectors`.

On visual rows a decoder layer computes keys and values as W norm(linear_2(x)) + b, where x are the I inner numbers of the
projector and W is [k_proj; v_proj]. Without its division, the norm is linear as well. So W diag(gain) linear_2 is one matrix
of 2 h_kv rows and I columns, and the division is by the root of a quadratic form of x, the mean square of linear_2(x).

The form is computed as |R x|^2, where R, I x I, comes from a QR decomposition of linear_2 / sqrt(D). Directions of x to
which linear_2 hardly answers make the difference: there x^T G x, with G = R^T R, is a small difference of large numbers.
Rounded to bfloat16, it is off by a multiple of itself where |R x|^2 is off by some per cent (docs/folding.md).

The bias of linear_2 and the learned newline of a model that reads tiles are columns of both matrices. They are derived, and
never saved: buffers that go where the model goes, made again when weights change.

Shape suffixes: V visual tokens, C width of the encoder's features, P columns (`SaisaConfig.folded_width`).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat_saisa import warn_once
from ..hardware_saisa import weights_fingerprint


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """See `SaisaModel.fold_projectors`; `model` is one."""
    layers = [layer for layer in model.language_model.layers if layer.sees_image]
    shared = getattr(model, "visual_projector", None)
    width, eps = model.config.folded_width, model.config.text_config.rms_norm_eps
    made = [_folded(layer.visual_projector if shared is None else shared, layer, width, eps) for layer in layers]
    digest = _digest(model)
    for layer, folded in zip(layers, made):
        layer.folded = folded
    model.folded = Folding(digest)


class Folding:
    """That a model is folded, and from which weights."""

    def __init__(self, digest: str):
        self.digest = digest

    def follow(self, model: nn.Module) -> None:
        """Folds again if weights have changed; where that cannot be, undoes it, with a line in the log. Weights that learn
        are not looked at: they run themselves."""
        if may_run(model) and self.digest != _digest(model):
            try:
                fold(model)
            except ValueError as error:
                model.unfold_projectors()
                warn_once(f"{error} Nothing is folded any more.")

    def projector_of(self, model: nn.Module):
        """What maps features to rows for the layers of a `model` whose layers share a projector."""
        if not may_run(model):
            return model.visual_projector
        first = next(layer for layer in model.language_model.layers if layer.sees_image)
        return partial(first.folded.rows, model.visual_projector)


def may_run(owner) -> bool:
    """Whether nothing watches the modules that the folded weights of a layer or a model stand for, and nothing in them
    learns."""
    parts = [part for module in owner.visual_modules().values() for part in module.modules()]
    learns = torch.is_grad_enabled() and any(p.requires_grad for part in parts for p in part.parameters(recurse=False))
    return not learns and not any(part._forward_hooks or part._forward_pre_hooks for part in parts)


class FoldedProjector(nn.Module):
    """A layer's folded weights.

    Args:
        eps: of the norm.
        factor: (P or fewer, P), R above; None: there is no norm.
        weight: (2 h_kv, P).
        bias: (2 h_kv,), that of `k_proj` and `v_proj`, or None.
    """

    factor: Tensor | None
    weight: Tensor
    bias: Tensor | None

    def __init__(self, eps: float, factor: Tensor | None, weight: Tensor, bias: Tensor | None):
        super().__init__()
        self.eps = eps
        for name, x in (("factor", factor), ("weight", weight), ("bias", bias)):
            self.register_buffer(name, x, persistent=False)

    def rows_for(self, layer, features: Tensor) -> Tensor | None:
        """What this takes of a layer's features: rows (V, P); None where the layer's modules are to run themselves."""
        if hasattr(layer, "visual_projector"):
            return self.rows(layer.visual_projector, features) if may_run(layer) else None
        return features if features.shape[-1] == self.weight.shape[1] else None  # else from the shared projector itself

    def rows(self, projector: nn.Module, features_VC: Tensor) -> Tensor:
        """(V, C) -> (V, P): inner numbers of `projector` and those of bias and newline, over the root that the norm divides
        by, which is computed in float32."""
        last = self.weight.shape[1] - 1
        newline_P = F.pad(features_VC.new_ones(1), (last, 0))
        x_VP = projector(features_VC, partial(_with_one, columns=last + 1), newline_P)
        if self.factor is not None:
            root = F.linear(x_VP.to(self.factor.dtype), self.factor)
            square_V1 = root.to(torch.promote_types(root.dtype, torch.float32)).square().sum(-1, keepdim=True)
            x_VP = x_VP * torch.rsqrt(square_V1 + self.eps)
        return x_VP.to(self.weight.dtype)

    def forward(self, x_VP: Tensor) -> Tensor:
        """(V, P) -> (V, 2 h_kv): keys and values of all heads."""
        return F.linear(x_VP, self.weight, self.bias)


def _with_one(x_VI: Tensor, columns: int) -> Tensor:
    """(V, columns): inner numbers, a one for the bias, and zeros."""
    with_one = F.pad(x_VI, (0, 1), value=1.0)
    return F.pad(with_one, (0, columns - with_one.shape[-1]))


def _digest(model: nn.Module) -> str:
    """Of all that keys and values of images come from, past the encoder. It does not tell the dtype, which counts too."""
    parts = model.visual_modules()
    dtypes = {str(p.dtype) for part in parts.values() for p in part.parameters()}
    return weights_fingerprint(model, "folded", parts, sorted(dtypes))


def _folded(projector: nn.Module, layer, width: int, eps: float) -> FoldedProjector:
    """Made in float64, on the CPU where the device has none. Raises ValueError if weights are not there as they are."""
    attention, linear, device = layer.self_attn, projector.linear_2, layer.device
    maps = [attention.qkv_proj] if hasattr(attention, "qkv_proj") else [attention.k_proj, attention.v_proj]
    for module in (linear, *maps):
        _check_plain(module, attention.layer_idx)
    device = torch.device("cpu") if device.type == "mps" else device
    matrix_DP = torch.zeros(linear.out_features, width, dtype=torch.float64, device=device)
    matrix_DP[:, : linear.in_features] = linear.weight
    if linear.bias is not None:
        matrix_DP[:, linear.in_features] = linear.bias
    if projector.image_newline is not None:
        matrix_DP[:, -1] = projector.image_newline
    keys_values = slice(-2 * attention.sizes[1], None)  # behind the queries, where these are in the same matrix
    weight = torch.cat([part.weight for part in maps])[keys_values].to(matrix_DP)
    bias = None if maps[0].bias is None else torch.cat([part.bias for part in maps])[keys_values].clone()
    factor = None
    if layer.norms.before_attention is not None:
        norm = getattr(layer, layer.norms.before_attention)
        ones = torch.ones(len(matrix_DP), device=layer.device)
        # what it multiplies by, whatever its weight stands for; hooks are not to see this
        weight *= norm.forward(ones).to(matrix_DP) * (1 + eps) ** 0.5
        factor = torch.linalg.qr(matrix_DP * len(matrix_DP) ** -0.5, mode="r").R.to(maps[0].weight)
    return FoldedProjector(eps, factor, (weight @ matrix_DP).to(maps[0].weight), bias)


def _check_plain(module: nn.Module, layer_idx: int) -> None:
    weight: Any = getattr(module, "weight", None)
    is_plain = type(module) is nn.Linear and type(weight) is nn.Parameter and not weight.is_meta
    if is_plain and tuple(weight.shape) == (module.out_features, module.in_features):
        return
    kind = f"{type(module).__name__} over a {type(weight).__name__} of {getattr(weight, 'dtype', None)}"
    raise ValueError(
        f"fold_projectors: layer {layer_idx} has a {kind}, expected an ordinary nn.Linear: its weights are quantized, "
        "adapted, sharded or offloaded. Fold a model that is loaded whole, with its adapters merged."
    )
