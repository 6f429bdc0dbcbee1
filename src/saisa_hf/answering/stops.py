# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Texts at which an answer ends."""

from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from .questions import text_of


class StopTexts(StoppingCriteria):
    """Ends each row of `generate` in which one of `texts` has come. It looks at what the tokens say when they are decoded,
    which any tokenizer does; transformers' own takes the vocabulary apart, and fails at some.

    Args:
        tokenizer: that decodes.
        texts: none of them empty.
        prompt: tokens in front of the answer.
    """

    def __init__(self, tokenizer: Any, texts: list[str], prompt: int):
        if empty := [text for text in texts if not isinstance(text, str) or not text]:
            raise ValueError(f"stop_strings has {empty[0]!r:.80}: expected texts that are not empty.")
        self.tokenizer, self.texts, self.prompt = tokenizer, texts, prompt
        # a token is a byte at least; those in front of the text's own settle how it begins
        self.tail = max(len(text.encode()) for text in texts) + 8

    def place_in(self, text: str) -> int | None:
        """Where the first of the texts begins in `text`; None if there is none."""
        return min((place for stop in self.texts if (place := text.find(stop)) >= 0), default=None)

    def length_of(self, row: list[int]) -> int:
        """How many of an answer's tokens there are until the first of the texts is whole; all of them if there is none."""
        return next((end for end in range(1, len(row)) if self._ended(row[max(0, end - self.tail) : end])), len(row))

    def _ended(self, tokens: list[int]) -> bool:
        text = text_of(self.tokenizer, tokens)
        return self.place_in(text) is not None

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Of token ids (B, S): which rows are at their end, bool (B,)."""
        tails = input_ids[:, max(self.prompt, input_ids.shape[1] - self.tail) :].tolist()
        return torch.tensor([self._ended(tail) for tail in tails], dtype=torch.bool, device=input_ids.device)
