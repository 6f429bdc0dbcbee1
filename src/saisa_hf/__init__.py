# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""SAISA vision-language models for Hugging Face transformers.

Importing the package registers its config, models and processor with transformers' Auto classes.
"""

import importlib

from transformers import AutoConfig, AutoModel, AutoProcessor

from .compat_saisa import AUTO_CLASSES, AutoModelForVision2Seq, warn_if_untested
from .configuration_saisa import SaisaConfig
from .modeling_saisa import SaisaForConditionalGeneration, SaisaModel
from .naavit import apply_naavit
from .processing_saisa import SaisaProcessor
from .visual_states_saisa import SaisaVisualStates


__version__ = "0.1.0"
__all__ = [
    "AutoModelForVision2Seq",
    "SaisaConfig",
    "SaisaForConditionalGeneration",
    "SaisaModel",
    "SaisaProcessor",
    "SaisaVisualStates",
    "apply_naavit",
    "attend",
]

warn_if_untested()
AutoConfig.register("saisa", SaisaConfig)
AutoModel.register(SaisaConfig, SaisaModel)
AutoProcessor.register(SaisaConfig, SaisaProcessor)
for auto_class in AUTO_CLASSES:
    auto_class.register(SaisaConfig, SaisaForConditionalGeneration)

LAZY = {"attend": "attention_maps"}  # imported when asked for, from these modules


def __getattr__(name: str):
    if name not in LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{LAZY[name]}", __name__), name)
