# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The names of tensors in checkpoints: in those that a model writes, and in a language model's."""

import re

import torch

from ..compat_saisa import encoder_names_of_all_releases, needed


# what Mixtral's checkpoints have in place of transformers' names in memory
MIXTRAL = {".mlp.": ".block_sparse_moe.", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def as_saved(model) -> dict[str, torch.Tensor]:
    """The tensors of `model` under the names that they are saved under."""
    with encoder_names_of_all_releases(model) as options:
        if not options.get("save_original_format"):
            return model.state_dict()
        feature = f"The names in checkpoints of an encoder of type {model.config.vision_config.model_type}"
        revert_weight_conversion = needed(feature, "transformers.core_model_loading", "revert_weight_conversion")
        return revert_weight_conversion(model, model.state_dict())


def checkpoint_state_dict(decoder) -> dict[str, torch.Tensor]:
    """The tensors of `decoder`, transformers' model without its head, under their names in checkpoints and in a SAISA.
    transformers 5 joins the experts of a layer in memory: they are copied."""
    weights = {}
    for name, x in decoder.state_dict().items():
        joined = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if joined is None:
            weights[name] = x
            continue
        for expert, of_expert in enumerate(x):
            kinds = joined[2].replace("gate_up", "gate_proj up").split()
            for kind, part in zip(kinds, of_expert.chunk(len(kinds))):
                weights[f"{joined[1]}.{expert}.{kind}.weight"] = part.clone()
    if decoder.config.model_type != "mixtral":
        return weights
    for old, new in MIXTRAL.items():
        weights = {name.replace(old, new): x for name, x in weights.items()}
    return weights
