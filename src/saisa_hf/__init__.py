# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""SAISA vision-language models for Hugging Face transformers.

Importing the package registers its config and models with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

from .compat_saisa import AutoModelForVision2Seq
from .configuration_saisa import SaisaConfig
from .modeling_saisa import SaisaForConditionalGeneration, SaisaModel


__version__ = "0.1.0"
__all__ = [
    "AutoModelForVision2Seq",
    "SaisaConfig",
    "SaisaForConditionalGeneration",
    "SaisaModel",
]

AutoConfig.register("saisa", SaisaConfig)
AutoModel.register(SaisaConfig, SaisaModel)
for auto_class in {AutoModelForImageTextToText, AutoModelForVision2Seq}:
    auto_class.register(SaisaConfig, SaisaForConditionalGeneration)
