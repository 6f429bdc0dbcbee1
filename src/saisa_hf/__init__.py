# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""SAISA vision-language models for Hugging Face transformers.

The model is in `modeling_saisa.py`. Importing the package imports neither torch nor transformers: its names are imported when
they are first used, and its classes join transformers' Auto classes when these are (see `_registration.py`).
"""

from typing import TYPE_CHECKING

from . import _moved, _registration
from ._lazy import lazy_names
from ._version import __version__ as __version__


if TYPE_CHECKING:
    from .auto_classes import AutoModelForVision2Seq
    from .common.beginnings import SaisaBeginning
    from .configuration_saisa import SaisaConfig
    from .inspection.attention_maps import attend
    from .inspection.naavit import apply_naavit
    from .modeling_saisa import SaisaForConditionalGeneration, SaisaModel
    from .processing_saisa import SaisaProcessor
    from .visual_states_saisa import SaisaVisualStates

__all__ = [
    "AutoModelForVision2Seq",
    "SaisaBeginning",
    "SaisaConfig",
    "SaisaForConditionalGeneration",
    "SaisaModel",
    "SaisaProcessor",
    "SaisaVisualStates",
    "apply_naavit",
    "attend",
]

_MODULE_OF = {
    "AutoModelForVision2Seq": "auto_classes",
    "SaisaBeginning": "common.beginnings",
    "SaisaConfig": "configuration_saisa",
    "SaisaForConditionalGeneration": "modeling_saisa",
    "SaisaModel": "modeling_saisa",
    "SaisaProcessor": "processing_saisa",
    "SaisaVisualStates": "visual_states_saisa",
    "apply_naavit": "inspection.naavit",
    "attend": "inspection.attention_maps",
}

_moved.install()
_registration.install()

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
