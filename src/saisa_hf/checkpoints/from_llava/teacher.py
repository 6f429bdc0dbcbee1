# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The LLaVA as a teacher: its logits, its answers, and its hidden states layer by layer.

A SAISA that is given embeddings, without an image, is its language model. With projected features among the embeddings of
the words it is the LLaVA itself: one set of weights serves as teacher and student.
"""

import copy

import torch
from torch import nn

from ...modeling_saisa import SaisaForConditionalGeneration


class Teacher:
    """The LLaVA inside a SAISA that was made from it.

    Args:
        model: a SAISA made by `saisa_from_llava`.
        projector: the LLaVA's projector; None: a copy of layer 0's in its present state.
    """

    def __init__(self, model: SaisaForConditionalGeneration, projector: nn.Module | None = None):
        self.model = model
        own = model.model.language_model.layers[0].visual_projector
        self.projector = (copy.deepcopy(own) if projector is None else projector).requires_grad_(False)

    def embeds(self, input_ids: torch.Tensor, features_nVC: torch.Tensor) -> torch.Tensor:
        """(n, S) ids with one image each, and the images' features -> (n, S, D)."""
        embeds = self.model.get_input_embeddings()(input_ids)
        visual = self.projector(features_nVC).to(embeds.dtype).flatten(0, 1)
        return embeds.masked_scatter((input_ids == self.model.config.image_token_id)[..., None], visual)

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor, features_nVC: torch.Tensor, keep: int) -> torch.Tensor:
        """(n, keep, X), the LLaVA's logits at the last `keep` positions of rows without padding."""
        return self.model(
            inputs_embeds=self.embeds(input_ids, features_nVC), logits_to_keep=keep, use_cache=False
        ).logits

    @torch.no_grad()
    def answers(self, input_ids: torch.Tensor, features_nVC: torch.Tensor, tokens: int) -> list[list[int]]:
        """The LLaVA's greedy answers to `n` prompts of one length, of at most `tokens` tokens, each with its end token."""
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        embeds = self.embeds(input_ids, features_nVC)
        mask = torch.ones_like(input_ids)
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        pad = self.model.generation_config.pad_token_id
        pad = pad if pad is not None else ends[0] if ends else 0
        made = self.model.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=tokens, pad_token_id=pad, **greedy
        )
        rows = []
        for row in made.tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
            rows.append(row[: end + 1])
        return rows

    def advance(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """Runs layer `index` alone: (n, S, D) hidden states at its input -> those at the next layer's input."""
        decoder = self.model.model.language_model
        alone = copy.copy(decoder)
        layer = nn.ModuleList([decoder.layers[index]])
        alone._modules = {**decoder._modules, "layers": layer, "norm": nn.Identity()}
        return alone(inputs_embeds=states, use_cache=False).last_hidden_state
