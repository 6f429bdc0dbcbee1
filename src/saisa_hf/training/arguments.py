# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`TrainingArguments` under the names that the installed transformers has for them."""

from ..compat_saisa import needed


def training_arguments(warmup_ratio: float, checkpointing: dict | None, **arguments):
    """`TrainingArguments` that mean the same on every release.

    5.x has one name for shares and numbers of steps, a new one for checkpointing, and turns the cache off in the config that
    checkpoints are saved with, which is prevented here.

    Args:
        warmup_ratio: share of the steps in which the learning rate rises.
        checkpointing: arguments of gradient checkpointing; None: none.
        arguments: all others, under the names that every release has.
    """
    TrainingArguments = needed("Training", "transformers", "TrainingArguments")
    fields = TrainingArguments.__dataclass_fields__
    if checkpointing is not None:
        name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
        arguments |= {name: True, f"{name}_kwargs": checkpointing}
    share = "warmup_steps" if fields["warmup_steps"].type in (float, "float") else "warmup_ratio"
    arguments[share] = warmup_ratio
    if "use_cache" in fields:
        arguments["use_cache"] = True
    return TrainingArguments(**arguments)
