# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Which parameters a stage of training changes."""

import importlib.util

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from ..common.extras import needs


# names of the modules that get adapters; the regular expression has to match the whole name
LORA_TARGETS = r".*language_model\.layers\.\d+\.(self_attn\.\w+_proj|mlp\.\w+_proj|visual_projector\.linear_\d)"
SHARED_PROJECTOR = r"model\.visual_projector\.linear_\d|model\.visual_resampler\.\w_proj"


def is_projector(name: str) -> bool:
    """Whether `name` is a parameter of a visual projector, or of the resampler before them."""
    return "visual_projector." in name or "visual_resampler." in name


def freeze_all_but(model: nn.Module, trained: str) -> list[str]:
    """Sets `requires_grad` of all parameters of `model`, in place.

    Args:
        model: a `SaisaForConditionalGeneration`.
        trained: `"projectors"`, `"projectors+language_model"` or `"all"`.

    Returns:
        The names of the parameters that will be trained.

    Raises:
        ValueError: `trained` is another string.
    """
    if trained not in ("projectors", "projectors+language_model", "all"):
        raise ValueError(f"trained={trained!r}: expected 'projectors', 'projectors+language_model' or 'all'.")
    names = []
    for name, parameter in model.named_parameters():
        chosen = trained == "all" or is_projector(name)
        if trained == "projectors+language_model":
            chosen = "vision_tower." not in name
        parameter.requires_grad_(chosen)
        if chosen:
            names.append(name)
    return names


def add_lora(model: nn.Module, rank: int = 64, alpha: float = 128, dropout: float = 0.0) -> nn.Module:
    """`model` with PEFT's low-rank adapters on the decoder layers and the projectors; nothing else will be trained.

    Args:
        model: a `SaisaForConditionalGeneration`.
        rank: of the adapters.
        alpha: their product is multiplied by alpha / rank.
        dropout: before them.

    Returns:
        A `peft.PeftModel`.

    Raises:
        ImportError: PEFT is not installed.
    """
    peft = needs("peft", "training adapters", extra="lora")
    targets = f"({LORA_TARGETS}|{SHARED_PROJECTOR})"
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
    return peft.get_peft_model(model, config)


def in_4_bits(dtype: torch.dtype) -> BitsAndBytesConfig:
    """The `quantization_config` of QLoRA: bitsandbytes' 4-bit normal floats for the language model's linear maps.
    `from_pretrained` leaves encoder, projectors and head alone.

    Args:
        dtype: of the computation.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError("train='qlora' needs bitsandbytes: pip install bitsandbytes peft")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )
