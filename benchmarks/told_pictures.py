# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The digit scenes in words: in place of each visual token, a word names what is in its cell. A language model pretrained on
these descriptions knows its language before it sees an image, as the language models behind vision-language models do.

    <image> <image> <image> ...        7red 7red nothing ...
"""

import torch
from digit_models import VISUAL_TOKENS, new_llava
from transformers import LlamaForCausalLM

from saisa_hf.demo.language import IMAGE
from saisa_hf.demo.scenes import GRID, INKS, NOTHING, Scene
from saisa_hf.demo.train import padded_turns


SIDE = round(VISUAL_TOKENS**0.5)  # of the grid of visual tokens
WORDS = tuple(f"{digit}{ink}" for digit in range(10) for ink in INKS)


def add_words(tokenizer) -> None:
    """Adds a word for each digit in each ink to the demo's tokenizer."""
    tokenizer.add_tokens(list(WORDS))


class Teller:
    """Turns a scene into part of an item, and items into a batch for a language model, padded on the right."""

    def __init__(self, tokenizer):
        self.words, self.pad = tokenizer.get_vocab(), tokenizer.pad_token_id

    def told(self, scene: Scene) -> dict:
        """The ids of the `VISUAL_TOKENS` words that describe a scene, in the order of visual tokens."""
        per_cell, ids = SIDE // GRID, []
        for row in range(SIDE):
            for column in range(SIDE):
                glyph = scene.at(row // per_cell * GRID + column // per_cell)
                ids.append(self.words[NOTHING if glyph is None else f"{glyph.digit}{glyph.ink}"])
        return {"told": ids}

    def collate(self, items: list[dict]) -> dict[str, torch.Tensor]:
        batch = padded_turns(items, self.pad)
        ids = batch["input_ids"]
        ids[ids == self.words[IMAGE]] = torch.tensor([word for item in items for word in item["told"]])
        return batch


def new_language_model(processor, depth: int, seed: int) -> LlamaForCausalLM:
    """The randomly initialized language model of `new_llava`, on its own."""
    torch.manual_seed(seed)
    llava = new_llava(processor, depth)
    model = LlamaForCausalLM(llava.config.text_config)
    model.model.load_state_dict(llava.model.language_model.state_dict())
    model.lm_head.load_state_dict(llava.lm_head.state_dict())
    return model.train()
