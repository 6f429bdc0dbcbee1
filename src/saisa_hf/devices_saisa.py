# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""A model on several devices: what accelerate's device maps may look like, where a module computes, and what the processes of
tensor parallelism have each."""

import os
import re

import torch
from torch import distributed, nn

from .compat_saisa import needed


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


# --- tensor parallelism -----------------------------------------------------------------------------------------------


def wants_tensor_parallelism(arguments: dict) -> bool:
    """Whether `arguments` of `from_pretrained` ask for it: `tp_plan`, `tp_size` or, on 5.x, `distributed_config`."""
    return any(arguments.get(name) is not None for name in ("tp_plan", "tp_size", "distributed_config"))


def check_tensor_parallelism(text_config, arguments: dict) -> None:
    """Raises ValueError if the processes cannot have as many heads each, ImportError if transformers has no styles."""
    needed("Tensor parallelism", "transformers.integrations.tensor_parallel", "ALL_PARALLEL_STYLES")
    config = arguments.get("distributed_config")
    named = config.get("tp_size") if isinstance(config, dict) else getattr(config, "tp_size", None)
    shards = arguments.get("tp_size") or named or (int(os.environ.get("WORLD_SIZE", 1)) if config is None else 1)
    heads = text_config.num_key_value_heads
    if heads % shards:
        allowed = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
        raise ValueError(
            f"Tensor parallelism over {shards} processes: they would share out num_key_value_heads={heads} unevenly. Start "
            f"{allowed} of them (torchrun --nproc-per-node), or spread whole layers with device_map='auto' in one process."
        )


def gathered(x: torch.Tensor, weight: torch.Tensor, dim: int) -> torch.Tensor:
    """The parts `x` of all processes that share `weight`, joined along `dim`."""
    group = _group(weight)
    parts = [
        torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(distributed.get_world_size(group))
    ]
    distributed.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts, dim)


def own_part(x: torch.Tensor, weight: torch.Tensor, dim: int) -> torch.Tensor:
    """This process's part of `x`: the inverse of `gathered`."""
    group = _group(weight)
    return x.chunk(distributed.get_world_size(group), dim)[distributed.get_rank(group)]


def _group(weight: torch.Tensor):
    """The processes that share `weight`; some releases of transformers keep a plain tensor, shared by all."""
    mesh = getattr(weight, "device_mesh", None)
    return None if mesh is None else mesh.get_group()
