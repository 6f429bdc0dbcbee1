# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""A model on several devices: what accelerate's device maps may look like, and where a module computes."""

import re

import torch
from torch import nn


DECODER_LAYER = re.compile(r"((?:model\.)?language_model\.layers\.\d+)\.")


def check_device_map(device_map) -> None:
    """Raises ValueError if `device_map`, a dict, puts parts of one decoder layer on different devices: a layer's projector
    feeds its attention, and a layer's inputs are moved once."""
    if not isinstance(device_map, dict):
        return
    of_layer = {}
    for name in device_map:
        found = DECODER_LAYER.match(name)
        if found:
            of_layer.setdefault(found[1], []).append(name)
    for layer, names in of_layer.items():
        above = [name for name in device_map if name == "" or f"{layer}.".startswith(f"{name}.")]
        devices = {name: str(device_map[name]) for name in [*sorted(above, key=len)[-1:], *names]}
        if len(set(devices.values())) > 1:
            parts = ", ".join(f"{name or 'the rest'} on {device}" for name, device in devices.items())
            raise ValueError(
                f"device_map splits the decoder layer {layer} ({parts}): a layer and its projector stay on one device. Give "
                f"one entry, {layer!r}, in place of those below it, or device_map='auto'."
            )


def execution_device(module: nn.Module) -> torch.device:
    """Where `module`, which has a weight, computes: also if accelerate brings the weight there only then."""
    hook = getattr(module, "_hf_hook", None)
    if module.weight.is_meta and hook is not None:
        return next(one.execution_device for one in getattr(hook, "hooks", (hook,)) if hasattr(one, "execution_device"))
    return module.weight.device


class Luggage:
    """Tensors that all decoder layers read, copied to each device once.

    Args:
        contents: tensors, in dicts and tuples; what else there is stays as it is.
    """

    def __init__(self, *contents):
        self._contents, self._copies = contents, {}

    def at(self, device):
        """`contents` on `device`."""
        if device not in self._copies:
            self._copies[device] = _moved(self._contents, device)
        return self._copies[device]


def _moved(x, device):
    if isinstance(x, torch.Tensor):
        return x.to(device)
    if isinstance(x, dict):
        return {key: _moved(value, device) for key, value in x.items()}
    if isinstance(x, tuple):
        moved = [_moved(value, device) for value in x]
        return type(x)(*moved) if hasattr(x, "_fields") else tuple(moved)
    return x
