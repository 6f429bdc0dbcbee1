# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the hardware asks for beside the model: several devices in one process (accelerate's device maps), several processes
(tensor parallelism), and quantized weights; and a digest of weights wherever they are kept."""

import copy
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re

import torch
from torch import distributed, nn
from torch.torch_version import TorchVersion

from .compat_saisa import needed


# --- several devices --------------------------------------------------------------------------------------------------

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
    """Where `module`, which has a weight, computes; accelerate may bring the weight there only then."""
    hook = getattr(module, "_hf_hook", None)
    if module.weight.is_meta and hook is not None:
        return next(one.execution_device for one in _hooks(hook) if hasattr(one, "execution_device"))
    return module.weight.device


def _hooks(hook) -> tuple:
    return getattr(hook, "hooks", (hook,))


class Luggage:
    """Tensors that all decoder layers read, copied to each device once.

    Args:
        contents: tensors, in dicts and tuples; anything else stays as it is.
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


def with_all_heads(keys_values: tuple[torch.Tensor, torch.Tensor], attention) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's keys and values (V, K, H) with the heads of all processes that share it."""
    if keys_values[0].shape[1] == attention.config.num_key_value_heads:
        return keys_values
    return tuple(gathered(x_VKH, attention.k_proj.weight, dim=1) for x_VKH in keys_values)


def with_own_heads(keys_values, attention, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The inverse of `with_all_heads`: the `heads` key heads that this process computes."""
    if keys_values[0].shape[1] == heads:
        return keys_values
    return tuple(own_part(x_VKH, attention.k_proj.weight, dim=1) for x_VKH in keys_values)


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


# --- quantized weights ------------------------------------------------------------------------------------------------

# By measurement (docs/hardware.md): a byte saved in one of these costs more than a byte saved in a decoder layer.
KEPT_PRECISE = ("vision_tower", "visual_resampler", "visual_projector", "lm_head")
# in the two forms that transformers' releases look for: names and patterns
KEPT_NAMES = [name for part in KEPT_PRECISE for name in (part, rf".*\.{part}")]
# what quantization configs call the modules to leave alone, and what that is by default (HQQ: the head)
SKIP_ARGUMENTS = {"llm_int8_skip_modules": None, "modules_to_not_convert": None, "skip_modules": ["lm_head"]}
# the first that transformers 5 takes, and that computes on a CPU
MINIMUM_BITSANDBYTES = "0.46.1"


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
    remedy = f'pip install -U "bitsandbytes>={MINIMUM_BITSANDBYTES}"'
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(f"The quantization of this model needs bitsandbytes, which is not installed: {remedy}")
    found = importlib.metadata.version("bitsandbytes")
    if TorchVersion(found) < MINIMUM_BITSANDBYTES:
        raise ImportError(f"The quantization of this model needs a newer bitsandbytes than {found}: {remedy}")


def settle(model: nn.Module) -> None:
    """What a model with 4-bit weights of bitsandbytes (0.50) needs to run and to be saved on a CPU.

    There its first step without gradients rearranges the weights, which fails for rows and columns that are not multiples
    of its blocks: such layers go without. And `state_dict` puts them back with scales in the wrong order.
    """
    found = [module for module in model.modules() if _is_4_bit(module)]
    for module in found:
        if module.out_features % 32 or module.in_features % module.weight.quant_state.blocksize:
            module.support_avx512bf16_for_cpu = False
    if found:
        model.register_state_dict_pre_hook(put_back)


def put_back(model: nn.Module, *_) -> None:
    """Puts 4-bit weights back into the order in which they are stored, in place. Codes are what they were; scales keep the
    rounding to bfloat16 that they got when they were rearranged, which is how the model computes."""
    for module in model.modules():
        if _is_4_bit(module) and _is_rearranged(module.weight):
            weight, functional = module.weight, _functional()
            state, scales = weight.quant_state, _stored_scales(weight)
            nested, offset = state.original_nested, state.offset
            weight.data, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
            state.absmax = scales
            if nested:
                state.absmax, state.state2 = functional.quantize_blockwise(scales - offset, blocksize=256)
                state.offset = offset
            weight.quant_state = state


def stored_tensors(module: nn.Module, name: str) -> list[torch.Tensor] | None:
    """The tensors that parameter `name` of `module` consists of, wherever they are kept and in an order that rearranging does
    not change; None if nothing tells where they are."""
    weight = module._parameters[name]
    if weight.is_meta:  # accelerate keeps it in memory or on disk until it is used
        hooks = _hooks(getattr(module, "_hf_hook", None))
        maps = [one.weights_map for one in hooks if getattr(one, "weights_map", None) is not None]
        return [maps[0][name]] if maps else None
    if getattr(weight, "quant_state", None) is not None:
        return [_codes(weight), _stored_scales(weight).to(torch.bfloat16)]
    scales = getattr(weight, "SCB", None)
    if scales is None:  # 8-bit weights of bitsandbytes hand them over at their first step
        scales = getattr(getattr(module, "state", None), "SCB", None)
    if weight.dtype == torch.int8 and scales is not None:
        return [weight.data, scales]
    return _inner_tensors(weight)


def _inner_tensors(weight: torch.Tensor) -> list[torch.Tensor]:
    if hasattr(weight, "full_tensor"):  # sharded over processes, all of which ask
        return [weight.full_tensor()]
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    return [tensor for name in weight.__tensor_flatten__()[0] for tensor in _inner_tensors(getattr(weight, name))]


def _stored_scales(weight: torch.Tensor) -> torch.Tensor:
    """float32, the scale of each block of a 4-bit weight in the order of the blocks."""
    state = weight.quant_state
    if _is_rearranged(weight):
        return state.absmax.T.reshape(-1).float()
    if state.nested:
        return _functional().dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    return state.absmax.flatten().float()


def _codes(weight: torch.Tensor) -> torch.Tensor:
    """The bytes of a 4-bit weight in the order in which they are stored."""
    if not _is_rearranged(weight):
        return weight.data.flatten().view(torch.uint8)
    state = copy.copy(weight.quant_state)
    state.original_nested = False  # the scales are not asked for
    codes, _ = _functional()._convert_weight_packed_for_cpu_inverse(weight.data, state)
    return codes.flatten().view(torch.uint8)


def _functional():
    """bitsandbytes' functions. An import statement anywhere in this file would make transformers ask everyone who loads a
    checkpoint by its code for that package."""
    return importlib.import_module("bitsandbytes.functional")


def _is_4_bit(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None and hasattr(module, "in_features")


def _is_rearranged(weight: torch.Tensor) -> bool:
    return getattr(weight.quant_state, "packing_format_for_cpu", False)


# --- a digest of weights, wherever they are ---------------------------------------------------------------------------


def weights_fingerprint(owner: torch.nn.Module, name: str, parts: dict[str, torch.nn.Module], settings: list) -> str:
    """A digest of all parameters of `parts` and of `settings`, remembered on `owner` under `name` until one of them changes.

    Floating-point weights are compared as bfloat16, so that a cast of a model keeps the digest. Weights that accelerate keeps
    elsewhere are read once.

    Raises:
        ValueError: a weight is on the meta device, and nothing tells where its values are.
    """
    # names are made for the digest alone: this is asked at every use; the encoder's differ between transformers releases
    found = []
    for module in parts.values():
        _collect_parameters(module, found)
    state = [_identity(p) for p in found if p is not None]
    remembered = owner.__dict__.setdefault("_weights_fingerprints", {})
    if name in remembered and remembered[name][0] == (state, settings):
        return remembered[name][1]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for part, module in parts.items():
        pieces = []
        for prefix, child in module.named_modules(prefix=part):
            for key, p in child._parameters.items():
                if p is None:
                    continue
                tensors = stored_tensors(child, key)
                if tensors is None:
                    raise ValueError(
                        f"{prefix}.{key} is on the meta device, and no hook of accelerate tells where its values are: visual "
                        "states cannot be told from those of another model. Load the weights with from_pretrained."
                    )
                shape = getattr(getattr(p, "quant_state", None), "shape", p.shape)
                shown = part if part == "vision_tower" else f"{prefix}.{key}"
                pieces.append(f"{shown} {tuple(shape)} ".encode() + b"".join(map(_sums, tensors)))
        for piece in sorted(pieces) if part == "vision_tower" else pieces:
            digest.update(piece)
    remembered[name] = ((state, settings), digest.hexdigest())
    return digest.hexdigest()


def _identity(p: torch.Tensor) -> tuple:
    """What changes when a parameter gets other values; nothing does for one that is kept elsewhere, of which there is a new
    stand-in at each use."""
    if p.is_meta:
        return ()
    has_storage = not hasattr(p, "__tensor_flatten__")
    return id(p), p.data_ptr() if has_storage else 0, 0 if p.is_inference() else p._version


def _collect_parameters(module: torch.nn.Module, found: list):
    found += module._parameters.values()
    for child in module._modules.values():
        if child is not None:
            _collect_parameters(child, found)


def _sums(p: torch.Tensor) -> bytes:
    """Sums of the bits of `p` along the rows and along the columns of a table: quick on any device, and every bit counts."""
    flat = p.detach().flatten()
    flat = flat.to(torch.bfloat16).view(torch.int16) if flat.is_floating_point() else flat.view(torch.uint8)
    table = torch.nn.functional.pad(flat, (0, -flat.numel() % 1024)).view(-1, 1024)
    sums = [table.sum(0, dtype=torch.int64), table.sum(1, dtype=torch.int64)]
    return b"".join(s.cpu().numpy().tobytes() for s in sums)
