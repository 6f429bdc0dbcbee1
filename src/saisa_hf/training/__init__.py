# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Training: data as conversations, which of their tokens are learned, and transformers' `Trainer` with the paper's stages.

The names below are imported when they are first used: the options of a run are needed without torch, by the command line.
"""

from typing import TYPE_CHECKING

from .._lazy import lazy_names


if TYPE_CHECKING:
    from .dataset import ConversationDataset, StreamedConversations
    from .encoding import ConversationEncoder, SaisaCollator
    from .options import TrainingOptions, load_options
    from .run import train
    from .samples import BadSample, read_sample
    from .sources import Source, open_source
    from .stages import add_lora, freeze_all_but
    from .trainer import NonFiniteLoss, SaisaTrainer

__all__ = [
    "BadSample",
    "ConversationDataset",
    "ConversationEncoder",
    "NonFiniteLoss",
    "SaisaCollator",
    "SaisaTrainer",
    "Source",
    "StreamedConversations",
    "TrainingOptions",
    "add_lora",
    "freeze_all_but",
    "load_options",
    "open_source",
    "read_sample",
    "train",
]

_MODULE_OF = {
    "BadSample": "samples",
    "ConversationDataset": "dataset",
    "ConversationEncoder": "encoding",
    "NonFiniteLoss": "trainer",
    "SaisaCollator": "encoding",
    "SaisaTrainer": "trainer",
    "Source": "sources",
    "StreamedConversations": "dataset",
    "TrainingOptions": "options",
    "add_lora": "stages",
    "freeze_all_but": "stages",
    "load_options": "options",
    "open_source": "sources",
    "read_sample": "samples",
    "train": "run",
}

__getattr__, __dir__ = lazy_names(__name__, _MODULE_OF)
