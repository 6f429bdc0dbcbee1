# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What lmms-eval calls when it looks for models, whatever it is asked to do then: nothing heavy is imported here."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """What makes `--model saisa` known to lmms-eval: the classes for tasks of chat messages, and for those of plain texts."""
    from lmms_eval.models.registry_v2 import ModelManifest

    module = f"{__package__}.lmms"
    return ModelManifest("saisa", simple_class_path=f"{module}.SaisaSimple", chat_class_path=f"{module}.SaisaChat")
