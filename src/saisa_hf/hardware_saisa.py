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
from torch.utils._pytree import tree_map_only

from .compat_saisa import needed


DECODER_LAYER = re.compile(r"((?:model\.)?language_model\.layers\.\d+)\.")


def check_device_map(device_map) -> None:
    """Raises ValueError if a dict splits a decoder layer: its projector feeds its attention; its inputs are moved once."""
    names = device_map if isinstance(device_map, dict) else ()
    for layer in dict.fromkeys(found[1] for found in map(DECODER_LAYER.match, names) if found):
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
    elsewhere = _of_hooks(module, "execution_device") if module.weight.is_meta else None
    return module.weight.device if elsewhere is None else elsewhere


def _of_hooks(module: nn.Module | None, name: str):
    """`name` of the first of accelerate's hooks on `module` that has one, or None."""
    hook = getattr(module, "_hf_hook", None)
    values = (getattr(one, name, None) for one in getattr(hook, "hooks", (hook,)))
    return next((value for value in values if value is not None), None)


class PerDevice:
    """Tensors in tuples and dicts that all decoder layers read, copied to each device once; anything else stays as it is."""

    def __init__(self, *contents):
        self._contents, self._copies = contents, {}

    def on(self, device):
        if device not in self._copies:
            self._copies[device] = tree_map_only(Tensor, lambda x: x.to(device), self._contents)
        return self._copies[device]


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
    first = distributed.get_rank(_processes(attention)) * heads
    return tuple(x_VKH[:, first : first + heads] for x_VKH in keys_values)


def _processes(attention: nn.Module):
    """Those that share the layer; some releases of transformers keep a plain tensor, shared by all."""
    mesh = getattr(attention.k_proj.weight, "device_mesh", None)
    return None if mesh is None else mesh.get_group()


# By measurement (docs/hardware.md): a byte saved in one of these costs more than a byte saved in a decoder layer.
KEPT_PRECISE = ("vision_tower", "visual_resampler", "visual_projector", "lm_head")
# what quantization configs call the modules to leave alone, and what that is by default (HQQ: the head)
SKIP_ARGUMENTS = {"llm_int8_skip_modules": None, "modules_to_not_convert": None, "skip_modules": ["lm_head"]}
MINIMUM_BITSANDBYTES = "0.46.1"  # the first that transformers 5 takes, and that computes on a CPU


def with_precise_modules(quantization_config):
    """`quantization_config`, an object or a dict, as an object that names the modules to leave alone: itself where it does
    already, else a copy with `KEPT_PRECISE`, as names and as patterns: some releases of transformers look for the latter."""
    if isinstance(quantization_config, dict):
        kinds = needed("A quantization_config that is a dict", "transformers.quantizers", "AutoQuantizationConfig")
        quantization_config = kinds.from_dict(quantization_config)
    for name, unsaid in SKIP_ARGUMENTS.items():
        if hasattr(quantization_config, name) and getattr(quantization_config, name) in (None, unsaid):
            quantization_config = copy.copy(quantization_config)
            setattr(quantization_config, name, [form for part in KEPT_PRECISE for form in (part, rf".*\.{part}")])
    return quantization_config


def check_backend(quantization_config) -> None:
    """Raises ImportError if a config, dict or None asks for a bitsandbytes that is not there: transformers 4.57 is vague."""
    is_dict = isinstance(quantization_config, dict)
    method = quantization_config.get("quant_method") if is_dict else getattr(quantization_config, "quant_method", None)
    if method != "bitsandbytes":
        return
    found = importlib.metadata.version("bitsandbytes") if importlib.util.find_spec("bitsandbytes") else None
    if found is None or TorchVersion(found) < MINIMUM_BITSANDBYTES:
        wanted = "bitsandbytes, which is not installed" if found is None else f"a newer bitsandbytes than {found}"
        raise ImportError(f'This quantization needs {wanted}: pip install -U "bitsandbytes>={MINIMUM_BITSANDBYTES}"')


def settle(model: nn.Module) -> None:
    """Lets 4-bit weights of bitsandbytes (0.50) run and be saved on a CPU. There the first step without gradients rearranges
    them, which fails for rows and columns that do not fill its blocks, and `state_dict` returns scales in the wrong order."""
    for module in (found := _4_bit_modules(model)):
        if module.out_features % 32 or module.in_features % module.weight.quant_state.blocksize:
            module.support_avx512bf16_for_cpu = False
    if found:
        model.register_state_dict_pre_hook(put_back)


def put_back(model: nn.Module, *_) -> None:
    """Puts 4-bit weights back into stored order, in place; scales keep the rounding to bfloat16 they are used with."""
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
    """Codes and scales (float32) of a 4-bit weight in stored order, to which its `state`, but for the scales, is changed."""
    # an import statement would make transformers ask everyone who loads a checkpoint by its code for bitsandbytes
    functional = importlib.import_module("bitsandbytes.functional")
    if getattr(state, "packing_format_for_cpu", False):
        scales = state.absmax.T.reshape(-1).float()
        return functional._convert_weight_packed_for_cpu_inverse(weight.data, state)[0], scales
    if state.nested:
        return weight.data, functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    return weight.data, state.absmax.flatten().float()


@torch.compiler.disable
def weights_fingerprint(owner: nn.Module, name: str, parts: dict[str, nn.Module], settings: list) -> str:
    """A digest of all that `parts` compute with and of `settings`, remembered on `owner` under `name` for its last states.
    Floating-point weights count as bfloat16, so that a cast keeps it. Raises ValueError if values are nowhere to be found."""
    weights = [one for part, module in parts.items() for one in _weights(module, part)]
    state = (name, json.dumps(settings), *_state(weights))
    remembered = owner.__dict__.setdefault("_weights_fingerprints", {})
    for oldest in list(remembered)[:-8]:
        remembered.pop(oldest, None)
    if (digest := remembered.get(state)) is None:
        digest = hashlib.sha256(json.dumps(settings).encode() + b"".join(_pieces(weights))).hexdigest()
        remembered[state] = digest
    return digest


def _weights(module: nn.Module, name: str, only: list[str] | None = None) -> list[tuple]:
    """What `module` computes with, as (name, owner, tensor or setting): parameters, floating-point buffers that are saved,
    active adapters; of a container, `only` what has these names. By hand: each use asks, and iterators are slow."""
    found, children = [], module._modules
    wrapped = children.get("base_layer", children.get("original_module"))
    if wrapped is not None and hasattr(module, "active_adapters"):  # one of PEFT's layers
        return _weights(wrapped, name) + _adapters(module, wrapped, name)
    for key in children.get("parametrizations", ()):
        found.append((f"{name}.{key}", None, getattr(module, key)))
    for key, x in (*module._parameters.items(), *module._buffers.items()):
        counts = x is not None and (key in module._parameters or x.is_floating_point())
        if counts and key not in module._non_persistent_buffers_set and (only is None or key in only):
            found.append((f"{name}.{key}", module, x))
    for key, child in children.items():
        if child is not None and key != "parametrizations" and (only is None or key in only):
            found += _weights(child, f"{name}.{key}")
    return found


def _adapters(layer: nn.Module, wrapped: nn.Module, name: str) -> list[tuple]:
    """What `layer` adds to `wrapped`: what it holds by the names of active adapters. Merged ones are in the weights of
    `wrapped`, and are taken out of them at the next call if they are disabled."""
    off, merged = layer.disable_adapters, bool(getattr(layer, "merged_adapters", ()))
    active = [] if off or merged else list(layer.active_adapters)
    found = [(name, None, f"{active} {off and merged}")] if active or (off and merged) else []
    for key, held in vars(layer).items():
        of_active = [held.get(adapter) for adapter in active] if isinstance(held, dict) and key[0] != "_" else []
        found += [(f"{name}.{key}", None, str(one)) for one in of_active if isinstance(one, (int, float, str))]
    for key, child in layer._modules.items():
        found += () if child is wrapped else _weights(child, f"{name}.{key}", active)
    return found


ROW, SAMPLE = 61 * 32, 32  # words of 64 bits; rows begin in any column of a weight
SAMPLED_FROM = 2**26  # bytes


def _state(weights: list[tuple]) -> list:
    """What changes when `weights` do: identities and versions; and contents, as PyTorch counts no writes through `.data`, but
    of a large encoder on a CPU, or of a whole language model, only a sample, which costs less than a question."""
    found, groups = [], {}
    for name, module, x in weights:
        found.append((name, x) if isinstance(x, str) else name)
        if isinstance(x, str) or x.is_meta:  # one that is kept elsewhere has a new stand-in at each use
            continue
        if module is not None:
            found.append((id(x), 0 if x.is_inference() else x._version))
        if not hasattr(type(x), "full_tensor"):  # processes that share one out have to come to the same result
            as_it_is = type(x) in (Tensor, nn.Parameter) or getattr(x, "quant_state", None) is not None
            rows = 4 if name.startswith("language_model.") else int(x.is_cpu and name.startswith("vision_tower."))
            group = groups.setdefault((x.device, rows), [])
            group += [x] if as_it_is else _stored_tensors(x, module, name)
    for (device, rows), tensors in groups.items():
        is_sampled = rows and sum(x.nbytes for x in tensors) > SAMPLED_FROM
        found.append((str(device), _checksum(tensors, *((SAMPLE, rows * ROW) if is_sampled else (ROW, ROW)))))
    return found


def _checksum(tensors: list[Tensor], width: int, row: int = ROW) -> int:
    """A number that a change of any bit changes, in the first `width` words of each `row` and behind the last row."""
    sums = []
    for x in tensors:
        words = x.detach().contiguous().flatten()
        if words.nbytes % 8 or words.storage_offset() * words.itemsize % 8:
            words = nn.functional.pad(words.view(torch.uint8), (0, -words.nbytes % 8 or 8))
        words = words.view(torch.int64)
        if rows := words.numel() // row:
            sums.append(words.as_strided((rows, width), (row, 1)).sum(1))
            words = words[rows * row :]
        sums.append(words)
    total = torch.cat(sums)
    return int((total * (2 * torch.arange(len(total), device=total.device) + 1)).sum())


def _pieces(weights: list[tuple]) -> list[bytes]:
    """What the digest is made of. Names in encoders, and so their order, differ between transformers releases: none count."""
    encoder, others = [], []
    for name, module, x in weights:
        own, label = (encoder, "vision_tower") if name.startswith("vision_tower.") else (others, name)
        shape = () if isinstance(x, str) else getattr(getattr(x, "quant_state", None), "shape", x.shape)
        contents = [x.encode()] if isinstance(x, str) else map(_sums, _stored_tensors(x, module, name))
        own.append(f"{label} {tuple(shape)} ".encode() + b"".join(contents))
    return sorted(encoder) + others


def _stored_tensors(p: Tensor, module: nn.Module | None = None, name: str = "") -> list[Tensor]:
    """What a parameter consists of, wherever it is kept, in an order that rearranging does not change."""
    if p.is_meta and (weights := _of_hooks(module, "weights_map")) is not None:  # in memory or on disk until it is used
        return [weights[name.rpartition(".")[2]]]
    if p.is_meta:
        raise ValueError(
            f"{name} is on the meta device, and no hook of accelerate tells where its values are: visual states cannot be "
            "told from those of another model. Load the weights with from_pretrained."
        )
    if getattr(p, "quant_state", None) is not None:
        codes, scales = _codes_and_scales(p, copy.copy(p.quant_state))
        return [codes.flatten().view(torch.uint8), scales.to(torch.bfloat16)]
    holders = (p, getattr(module, "state", None))  # 8-bit weights of bitsandbytes hand scales over at their first step
    scales = [holder.SCB for holder in holders if getattr(holder, "SCB", None) is not None]
    if p.dtype == torch.int8 and scales:
        return [p.data, scales[0]]
    if hasattr(p, "full_tensor"):  # sharded over processes, all of which ask
        return [p.full_tensor()]
    parts = p.__tensor_flatten__()[0] if hasattr(p, "__tensor_flatten__") else ()
    return [tensor for part in parts for tensor in _stored_tensors(getattr(p, part))] if parts else [p]


def _sums(p: Tensor) -> bytes:
    """Sums of the bits of `p` along the rows and along the columns of a table: quick on any device, and every bit counts."""
    flat = p.detach().contiguous().flatten()
    flat = flat.to(torch.bfloat16).view(torch.int16) if flat.is_floating_point() else flat.view(torch.uint8)
    table = nn.functional.pad(flat, (0, -flat.numel() % 1024)).view(-1, 1024)
    return b"".join(table.sum(dim, dtype=torch.int64).cpu().numpy().tobytes() for dim in (0, 1))
