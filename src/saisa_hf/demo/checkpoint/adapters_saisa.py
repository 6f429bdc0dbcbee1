# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What others add to a model's modules from outside, adapters above all, and what the model does for them."""

import inspect
from collections.abc import Iterable

from torch import nn


def tells_samples_apart(modules: Iterable[nn.Module]) -> bool:
    """Whether a hook adds arguments to a call of one of `modules`, as PEFT does with `adapter_names` and the offsets of
    activated LoRA: these are one for each sample, so that the module's input has to be (B, S, ...)."""
    return any(one._forward_pre_hooks_with_kwargs for module in modules for one in module.modules())


def named_by(module: nn.Module, arguments: dict) -> dict:
    """Those of `arguments` that `module.forward` has a parameter for."""
    forward = getattr(module, "vision_model", module).forward
    return {name: arguments[name] for name in inspect.signature(forward).parameters if name in arguments}
