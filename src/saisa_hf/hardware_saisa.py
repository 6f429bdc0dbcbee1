# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What hardware asks for besides the model: several devices in one process (accelerate's device maps), several processes
(tensor parallelism), and quantized weights; and a digest of weights wherever they are kept."""

import copy
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re

import torch
from torch import Tensor, distributed, nn
from torch.torch_version import TorchVersion

from .compat_saisa import needed


# --- several devices --------------------------------------------------------------------------------------------------

DECODER_LAYER = re.compile(r"((?:model\.)?language_model\.layers\.\d+)\.")


def check_device_map(device_map) -> None:
    """Raises ValueError if `device_map`, a dict, puts parts of one decoder layer on different devices: a layer's projector
    feeds its attention, and a layer's inputs are moved once."""
    if not isinstance(device_map, dict):
        return
    for layer in dict.fromkeys(found[1] for found in map(DECODER_LAYER.match, device_map) if found):
        above = [name for name in device_map if name == "" or f"{layer}.".startswith(f"{name}.")]
        below = [name for name in device_map if name.startswith(f"{layer}.")]
        devices = {name: str(device_map[name]) for name in [*sorted(above, key=len)[-1:], *below]}
        if len(set(devices.values())) > 1:
            parts = ", ".join(f"{name or 'the rest'} on {device}" for name, device in devices.items())
            raise ValueError(
                f"device_map splits the decoder layer {layer} ({parts}): a layer and its projector stay on one device. Give "
                f"one entry, {layer!r}, in place of those below it, or device_map='auto'."
            )


def execution_device(module: nn.Module) -> torch.device:
    """Where `module`, which has a weight, computes; accelerate may bring the weight there only then."""
    if module.weight.is_meta and (hooks := _hooks(module)):
        return next(hook.execution_device for hook in hooks if hasattr(hook, "execution_device"))
    return module.weight.device


def _hooks(module: nn.Module) -> tuple:
    """accelerate's hooks on `module`."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else getattr(hook, "hooks", (hook,))


class Luggage:
    """Tensors in tuples and dicts that all decoder layers read, copied to each device once; anything else stays as it is."""

    def __init__(self, *contents):
        self._contents, self._copies = contents, {}

    def at(self, device):
        """The contents on `device`."""
        if device not in self._copies:
            self._copies[device] = _moved(self._contents, device)
        return self._copies[device]


def _moved(x, device):
    if isinstance(x, dict):
        return {key: _moved(value, device) for key, value in x.items()}
    if isinstance(x, tuple):
        moved = [_moved(value, device) for value in x]
        return type(x)(*moved) if hasattr(x, "_fields") else tuple(moved)
    return x.to(device) if isinstance(x, Tensor) else x


# --- several processes ------------------------------------------------------------------------------------------------


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


def with_all_heads(keys_values: tuple[Tensor, Tensor], attention: nn.Module) -> tuple[Tensor, Tensor]:
    """A layer's keys and values (V, K, H) with the heads of all processes that share it."""
    if keys_values[0].shape[1] == attention.config.num_key_value_heads:
        return keys_values
    group, own_2VKH = _processes(attention), torch.stack(keys_values).contiguous()
    parts = [torch.empty_like(own_2VKH) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, own_2VKH, group=group)
    return tuple(torch.cat(parts, dim=2))


def with_own_heads(keys_values, attention: nn.Module, heads: int) -> tuple[Tensor, Tensor]:
    """The inverse of `with_all_heads`: the `heads` key heads that this process computes."""
    if keys_values[0].shape[1] == heads:
        return keys_values
    group = _processes(attention)
    shares, own = distributed.get_world_size(group), distributed.get_rank(group)
    return tuple(x_VKH.chunk(shares, dim=1)[own] for x_VKH in keys_values)


def _processes(attention: nn.Module):
    """Those that share the layer; some releases of transformers keep a plain tensor, shared by all."""
    mesh = getattr(attention.k_proj.weight, "device_mesh", None)
    return None if mesh is None else mesh.get_group()


# --- quantized weights ------------------------------------------------------------------------------------------------

# By measurement (docs/hardware.md): a byte saved in one of these costs more than a byte saved in a decoder layer.
KEPT_PRECISE = ("vision_tower", "visual_resampler", "visual_projector", "lm_head")
# in the two forms that transformers' releases look for: names and patterns
KEPT_NAMES = [name for part in KEPT_PRECISE for name in (part, rf".*\.{part}")]
# what quantization configs call the modules to leave alone, and what that is by default (HQQ: the head)
SKIP_ARGUMENTS = {"llm_int8_skip_modules": None, "modules_to_not_convert": None, "skip_modules": ["lm_head"]}
MINIMUM_BITSANDBYTES = "0.46.1"  # the first that transformers 5 takes, and that computes on a CPU


def with_precise_modules(quantization_config):
    """`quantization_config`, an object or a dict, as an object that names the modules to leave alone: itself where it does
    already, else a copy with `KEPT_PRECISE`."""
    if isinstance(quantization_config, dict):
        kinds = needed("A quantization_config that is a dict", "transformers.quantizers", "AutoQuantizationConfig")
        quantization_config = kinds.from_dict(quantization_config)
    for name, unsaid in SKIP_ARGUMENTS.items():
        if hasattr(quantization_config, name) and getattr(quantization_config, name) in (None, unsaid):
            quantization_config = copy.copy(quantization_config)
            setattr(quantization_config, name, list(KEPT_NAMES))
    return quantization_config


def check_backend(quantization_config) -> None:
    """Raises ImportError if `quantization_config`, an object, a dict or None, asks for bitsandbytes and that is missing or
    too old: transformers 4.57 says no more than that a version number was not found."""
    is_dict = isinstance(quantization_config, dict)
    method = quantization_config.get("quant_method") if is_dict else getattr(quantization_config, "quant_method", None)
    if method != "bitsandbytes":
        return
    found = importlib.metadata.version("bitsandbytes") if importlib.util.find_spec("bitsandbytes") else None
    if found is None or TorchVersion(found) < MINIMUM_BITSANDBYTES:
        wanted = "bitsandbytes, which is not installed" if found is None else f"a newer bitsandbytes than {found}"
        raise ImportError(
            f'The quantization of this model needs {wanted}: pip install -U "bitsandbytes>={MINIMUM_BITSANDBYTES}"'
        )


def settle(model: nn.Module) -> None:
    """What a model with 4-bit weights of bitsandbytes (0.50) needs to run and to be saved on a CPU. Its first step without
    gradients rearranges the weights there, which fails for rows and columns that are not multiples of its blocks: such layers
    go without. And `state_dict` puts them back with scales in the wrong order."""
    found = _4_bit_modules(model)
    for module in found:
        if module.out_features % 32 or module.in_features % module.weight.quant_state.blocksize:
            module.support_avx512bf16_for_cpu = False
    if found:
        model.register_state_dict_pre_hook(put_back)


def put_back(model: nn.Module, *_) -> None:
    """Puts 4-bit weights back into the order in which they are stored, in place. Codes are what they were; scales keep the
    rounding to bfloat16 that they got when they were rearranged, which is how the model computes."""
    for weight in (module.weight for module in _4_bit_modules(model)):
        state = weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            offset = state.offset
            weight.data, state.absmax = _codes_and_scales(weight, state)
            if state.nested:
                blockwise = importlib.import_module("bitsandbytes.functional").quantize_blockwise
                state.absmax, state.state2 = blockwise(state.absmax - offset, blocksize=256)
                state.offset = offset


def _4_bit_modules(model: nn.Module) -> list[nn.Module]:
    linear = [module for module in model.modules() if hasattr(module, "in_features")]
    return [module for module in linear if getattr(getattr(module, "weight", None), "quant_state", None) is not None]


def _codes_and_scales(weight: Tensor, state) -> tuple[Tensor, Tensor]:
    """The codes of a 4-bit weight and the scales of its blocks (float32) in the order in which they are stored. `state`, the
    weight's `quant_state` or a copy, is changed to that order, but for the scales."""
    # an import statement would make transformers ask everyone who loads a checkpoint by its code for bitsandbytes
    functional = importlib.import_module("bitsandbytes.functional")
    if getattr(state, "packing_format_for_cpu", False):
        scales = state.absmax.T.reshape(-1).float()
        return functional._convert_weight_packed_for_cpu_inverse(weight.data, state)[0], scales
    if state.nested:
        return weight.data, functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    return weight.data, state.absmax.flatten().float()


# --- a digest of weights, wherever they are ---------------------------------------------------------------------------


def weights_fingerprint(owner: nn.Module, name: str, parts: dict[str, nn.Module], settings: list) -> str:
    """A digest of all parameters of `parts` and of `settings`, remembered on `owner` under `name` until one of them changes.

    Floating-point weights are compared as bfloat16, so that a cast of a model keeps the digest. Weights that accelerate keeps
    elsewhere are read once. Raises ValueError if nothing tells where the values of one on the meta device are.
    """
    state = ([one for module in parts.values() for one in _identities(module)], settings)
    remembered = owner.__dict__.setdefault("_weights_fingerprints", {})
    if name not in remembered or remembered[name][0] != state:
        digest = hashlib.sha256(json.dumps(settings).encode())
        for part, module in parts.items():
            digest.update(b"".join(_pieces(part, module)))
        remembered[name] = (state, digest.hexdigest())
    return remembered[name][1]


def _identities(module: nn.Module) -> list[tuple]:
    """What changes when parameters get other values; one that is kept elsewhere has a new stand-in at each use. By hand:
    every use of visual states asks, and a module's own iterators take five times as long."""
    found = []
    for p in module._parameters.values():
        if p is not None and not p.is_meta:
            address = 0 if hasattr(p, "__tensor_flatten__") else p.data_ptr()
            found.append((id(p), address, 0 if p.is_inference() else p._version))
    for child in module._modules.values():
        found += () if child is None else _identities(child)
    return found


def _pieces(part: str, module: nn.Module) -> list[bytes]:
    """What goes into the digest of each parameter. An encoder's names, and with them the order, differ between transformers
    releases: there neither counts."""
    found, is_encoder = [], part == "vision_tower"
    for prefix, child in module.named_modules(prefix=part):
        for key, p in child._parameters.items():
            if p is not None:
                name = f"{prefix}.{key}"
                shape = getattr(getattr(p, "quant_state", None), "shape", p.shape)
                sums = b"".join(map(_sums, _stored_tensors(p, child, key, name)))
                found.append(f"{part if is_encoder else name} {tuple(shape)} ".encode() + sums)
    return sorted(found) if is_encoder else found


def _stored_tensors(p: Tensor, module: nn.Module | None = None, key: str = "", name: str = "") -> list[Tensor]:
    """What a parameter consists of, wherever it is kept, in an order that rearranging does not change."""
    if p.is_meta:  # accelerate keeps it in memory or on disk until it is used
        for hook in _hooks(module):
            if getattr(hook, "weights_map", None) is not None:
                return [hook.weights_map[key]]
        raise ValueError(
            f"{name} is on the meta device, and no hook of accelerate tells where its values are: visual states cannot be "
            "told from those of another model. Load the weights with from_pretrained."
        )
    if getattr(p, "quant_state", None) is not None:
        codes, scales = _codes_and_scales(p, copy.copy(p.quant_state))
        return [codes.flatten().view(torch.uint8), scales.to(torch.bfloat16)]
    scales = getattr(p, "SCB", None)
    if scales is None:  # 8-bit weights of bitsandbytes hand them over at their first step
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if p.dtype == torch.int8 and scales is not None:
        return [p.data, scales]
    if hasattr(p, "full_tensor"):  # sharded over processes, all of which ask
        return [p.full_tensor()]
    parts = p.__tensor_flatten__()[0] if hasattr(p, "__tensor_flatten__") else ()
    return [tensor for part in parts for tensor in _stored_tensors(getattr(p, part))] if parts else [p]


def _sums(p: Tensor) -> bytes:
    """Sums of the bits of `p` along the rows and along the columns of a table: quick on any device, and every bit counts."""
    flat = p.detach().flatten()
    flat = flat.to(torch.bfloat16).view(torch.int16) if flat.is_floating_point() else flat.view(torch.uint8)
    table = nn.functional.pad(flat, (0, -flat.numel() % 1024)).view(-1, 1024)
    return b"".join(table.sum(dim, dtype=torch.int64).cpu().numpy().tobytes() for dim in (0, 1))
