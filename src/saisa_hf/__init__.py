# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""SAISA vision-language models for Hugging Face transformers.

Importing the package registers its config, models and processor with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .compat_saisa import AUTO_CLASSES, AutoModelForVision2Seq
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
]

AutoConfig.register("saisa", SaisaConfig)
AutoModel.register(SaisaConfig, SaisaModel)
AutoProcessor.register(SaisaConfig, SaisaProcessor)
for auto_class in AUTO_CLASSES:
    auto_class.register(SaisaConfig, SaisaForConditionalGeneration)
