# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The names of tensors in the checkpoints that a model writes."""

import torch

from ..compat_saisa import encoder_names_of_all_releases, needed


def as_saved(model) -> dict[str, torch.Tensor]:
    """The tensors of `model` under the names that they are saved under."""
    with encoder_names_of_all_releases(model) as options:
        if not options.get("save_original_format"):
            return model.state_dict()
        feature = f"The names in checkpoints of an encoder of type {model.config.vision_config.model_type}"
        revert_weight_conversion = needed(feature, "transformers.core_model_loading", "revert_weight_conversion")
        return revert_weight_conversion(model, model.state_dict())
