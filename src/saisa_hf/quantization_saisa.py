# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Quantized weights: which modules keep their precision, and what transformers' backends do not take care of."""

import copy
import importlib.metadata
import importlib.util

import torch
from torch import nn
from torch.torch_version import TorchVersion

from .compat_saisa import needed


# By measurement (docs/hardware.md): a byte saved in one of these costs more than a byte saved in a decoder layer.
KEPT_PRECISE = ("vision_tower", "visual_resampler", "visual_projector", "lm_head")
# in the two forms that transformers' releases look for: names and patterns
KEPT_NAMES = [name for part in KEPT_PRECISE for name in (part, rf".*\.{part}")]
# what quantization configs call the modules to leave alone, and what they hold where nothing was said (HQQ: the head)
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
    too old. transformers 4.57 says no more than that a version number was not found."""
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


# --- bitsandbytes' 4-bit weights on a CPU -----------------------------------------------------------------------------


def settle(model: nn.Module) -> None:
    """What a model with 4-bit weights of bitsandbytes (0.50) needs to run and to be saved on a CPU.

    There its first step without gradients rearranges the weights, which fails for rows and columns that are no multiples of
    its blocks: such layers go without. And `state_dict` puts them back with scales in the wrong order.
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
            weight = module.weight
            functional = _functional()
            state, scales = weight.quant_state, stored_scales(weight)
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
        hook = getattr(module, "_hf_hook", None)
        hooks = getattr(hook, "hooks", (hook,))
        maps = [one.weights_map for one in hooks if getattr(one, "weights_map", None) is not None]
        return [maps[0][name]] if maps else None
    if getattr(weight, "quant_state", None) is not None:
        return [_codes(weight), stored_scales(weight).to(torch.bfloat16)]
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


def stored_scales(weight: torch.Tensor) -> torch.Tensor:
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
    """bitsandbytes' functions. An import statement anywhere in this file would have transformers ask everyone who loads a
    checkpoint by its code for that package."""
    return importlib.import_module("bitsandbytes.functional")


def _is_4_bit(module: nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None and hasattr(module, "in_features")


def _is_rearranged(weight: torch.Tensor) -> bool:
    return getattr(weight.quant_state, "packing_format_for_cpu", False)
