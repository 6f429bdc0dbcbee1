# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The LLaVA as a teacher: its logits, its answers, and its hidden states layer by layer.

A SAISA that is given embeddings, without an image, is its language model. With projected features among the embeddings of
the words it is the LLaVA itself: one set of weights serves as teacher and student.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...modeling_saisa import SaisaForConditionalGeneration, SaisaVisualProjector
from ...tiles_saisa import EncodesTiles
from .model import newline_of, projector_of, projectors_of


class Teacher:
    """The LLaVA inside a SAISA that was made from it.

    Args:
        model: a SAISA made by `saisa_from_llava`.
        projector: from features to the embeddings of the LLaVA's visual tokens; None: a copy of the first layer's that has
            one, in its present state.
        embed: for a LLaVA that scales tiles down behind its projector, what makes these embeddings of images; `projector`
            leaves them as they are then.
    """

    embed: "LlavaImages | None" = None

    def __init__(self, model: SaisaForConditionalGeneration, projector: nn.Module | None = None):
        self.model = model
        own = next(iter(projectors_of(model).values()))
        self.projector = (copy.deepcopy(own) if projector is None else projector).requires_grad_(False)

    @classmethod
    def of(cls, model: SaisaForConditionalGeneration, llava: PreTrainedModel) -> "Teacher":
        """The teacher of `model`, which was made from `llava` and has its weights."""
        images = LlavaImages(model, llava)
        if model.config.vision_aspect_ratio is None:
            return cls(model, images.visual_projector)
        teacher = cls(model, nn.Identity())
        teacher.embed = images
        return teacher

    @property
    def projector_width(self) -> int:
        """The inner width of the LLaVA's projector."""
        projector = self.projector if self.embed is None else self.embed.visual_projector
        return projector.linear_1.out_features

    def embeds(self, input_ids: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """(n, S) ids with one image each, and the rows that `projector` makes embeddings of, (..., C) -> (n, S, D)."""
        embeds = self.model.get_input_embeddings()(input_ids)
        visual = self.projector(features).to(embeds.dtype).flatten(0, -2)
        return embeds.masked_scatter((input_ids == self.model.config.image_token_id)[..., None], visual)

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor, features: torch.Tensor, keep: int) -> torch.Tensor:
        """(n, keep, X), the LLaVA's logits at the last `keep` positions of rows without padding."""
        return self.model(inputs_embeds=self.embeds(input_ids, features), logits_to_keep=keep, use_cache=False).logits

    @torch.no_grad()
    def answers(self, input_ids: torch.Tensor, features: torch.Tensor, tokens: int) -> list[list[int]]:
        """The LLaVA's greedy answers to `n` prompts of one length, of at most `tokens` tokens, each with its end token."""
        inputs = {"inputs_embeds": self.embeds(input_ids, features), "attention_mask": torch.ones_like(input_ids)}
        return greedy_answers(self.model, tokens, **inputs)

    def advance(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """Runs layer `index` alone: (n, S, D) hidden states at its input -> those at the next layer's input."""
        alone = part_of(self.model.model.language_model, index, index + 1, normed=False)
        return alone(inputs_embeds=states, use_cache=False).last_hidden_state


def greedy_answers(model: SaisaForConditionalGeneration, tokens: int, **inputs: Any) -> list[list[int]]:
    """What `model` answers to prompts of one length, at most `tokens` tokens each, up to the first that ends an answer."""
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    # an image token in an answer would stand for an image
    never = [*(model.generation_config.suppress_tokens or []), model.config.image_token_id]
    greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
    pad = model.generation_config.pad_token_id
    pad = pad if pad is not None else ends[0] if ends else 0
    made = model.generate(**inputs, max_new_tokens=tokens, pad_token_id=pad, suppress_tokens=never, **greedy)
    rows = []
    for row in made[:, inputs["input_ids"].shape[1] if "input_ids" in inputs else 0 :].tolist():
        end = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
        rows.append(row[: end + 1])
    return rows


def part_of(decoder: nn.Module, first: int, end: int, normed: bool) -> nn.Module:
    """The layers from `first` to before `end` as a decoder of their own, with the norm at the end or without."""
    part, norm = copy.copy(decoder), decoder.norm if normed else nn.Identity()
    part._modules = {**decoder._modules, "layers": nn.ModuleList(decoder.layers[first:end]), "norm": norm}
    return part


class LlavaImages(EncodesTiles, nn.Module):
    """Images as the LLaVA sees them: its encoder, which `model` has too, and its projector, with tiles put together."""

    def __init__(self, model: SaisaForConditionalGeneration, llava: PreTrainedModel):
        super().__init__()
        self.config: Any = copy.deepcopy(model.config)
        theirs = projector_of(llava)
        self.config.projector_hidden_size = theirs.linear_1.out_features
        self.config.alignment, self.config.projector_sharing = "embedding_space", "shared"
        self.vision_tower = model.vision_tower
        with torch.device("meta"):
            self.visual_projector = SaisaVisualProjector(self.config)
        self.visual_projector.linear_1, self.visual_projector.linear_2 = theirs.linear_1, theirs.linear_2
        if self.visual_projector.image_newline is not None:
            self.visual_projector.image_newline = nn.Parameter(newline_of(llava))
        self.requires_grad_(False)

    def forward(self, **images: torch.Tensor) -> list[torch.Tensor]:
        """The embeddings (V, D) of each image."""
        return list(self.get_image_features(**images, return_dict=True).pooler_output)
