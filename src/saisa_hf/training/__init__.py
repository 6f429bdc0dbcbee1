# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Training: data as conversations, what is learned of them, and transformers' `Trainer` with the paper's stages."""

from .encoding import ConversationEncoder, SaisaCollator
from .options import TrainingOptions, load_options
from .run import train
from .samples import BadSample, ConversationDataset, Source, StreamedConversations, open_source, read_sample
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
