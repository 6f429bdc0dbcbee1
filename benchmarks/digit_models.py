# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the training benchmarks share: small LLaVAs around the demo's encoder, a training step, and atomic saving."""

import math
import os
from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from saisa_hf import SaisaForConditionalGeneration
from saisa_hf.demo.encoder import PATCH, vision_config
from saisa_hf.demo.language import IMAGE, text_config
from saisa_hf.demo.run import CHECKPOINT
from saisa_hf.demo.scenes import SIZE


BATCH, RATE, WARM_UP = 32, 1.5e-3, 0.05
VISUAL_TOKENS = (SIZE // PATCH) ** 2


def new_llava(processor, depth: int) -> LlavaForConditionalGeneration:
    """A LLaVA with the demo's trained encoder and `depth` random decoder layers."""
    text = text_config(len(processor.tokenizer)).to_dict() | {"num_hidden_layers": depth, "layer_types": None}
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_index=processor.tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        torch.nn.init.normal_(linear.weight, std=model.config.text_config.initializer_range)
    tower = SaisaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).vision_tower
    own = model.model.vision_tower.state_dict()
    trained = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    model.model.vision_tower.load_state_dict({name: trained[name.removeprefix("vision_model.")] for name in own})
    return model


def optimizer_of(model) -> torch.optim.AdamW:
    """Freezes the vision encoder; returns AdamW over everything else."""
    model.model.vision_tower.requires_grad_(False)
    return adamw(model)


def adamw(model) -> torch.optim.AdamW:
    """AdamW over all parameters that are not frozen. Each step sets the learning rate."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=RATE, weight_decay=0.05)


def training_step(model, optimizer: torch.optim.Optimizer, batch: dict, done: float, rate: float = RATE) -> float:
    """One step at the point `done` (0 to 1) of a cosine schedule with warm-up and peak `rate`. Returns the loss."""
    rate = rate * min(1, (done + 1e-3) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * done))
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = model(**batch).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_([parameter for group in optimizer.param_groups for parameter in group["params"]], 1)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def keep(state: dict, path: str | Path) -> None:
    """Saves `state` to `path` atomically, replacing what is there."""
    torch.save(state, f"{path}.part")
    os.replace(f"{path}.part", path)
