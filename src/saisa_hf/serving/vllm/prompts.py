# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Prompts as vLLM takes them: it puts in as many tokens for an image as the image has visual tokens."""

from typing import Any

from ...processing_saisa import SaisaProcessor


def with_a_token_each(processor: SaisaProcessor, text: str, **options: Any) -> dict[str, Any]:
    """What `processor` makes of a text, in rows of one, with one token for each image. `options` are the tokenizer's."""
    units = processor._units([1] * text.count(processor.image_token))
    return processor._tokenize([text], units, {processor.image_token}, {"return_mm_token_type_ids": False, **options})
