# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Prompts of requests as the ids that `SaisaProcessor` makes of them: texts are tokenized around their images, not whole."""

import copy
import os

from vllm.renderers.hf import HfRenderer
from vllm.transformers_utils.processor import cached_processor_from_config

from ...processing_saisa import SaisaProcessor, begins_with_bos
from .prompts import with_a_token_each
from .refusals import check_names, check_prompt
from .registration import CONNECTOR


class SaisaRenderer(HfRenderer):
    """vLLM's renderer for Hugging Face tokenizers, with the tokenization of `SaisaProcessor`."""

    def __init__(self, config, tokenizer):
        super().__init__(config, tokenizer)
        self._image_token_id = config.model_config.hf_config.image_token_id
        self._processor: SaisaProcessor | None = None
        if self.tokenizer is not None:
            # a copy, so that the tokenizer is the one whose calls vLLM spreads over threads
            self._processor = copy.copy(cached_processor_from_config(config.model_config, SaisaProcessor))
            self._processor.tokenizer = self.tokenizer

    def _tokenize_prompt(self, prompt, params):
        options = params.get_encode_kwargs()
        if params.truncate_prompt_tokens is None:  # too long a prompt is for vLLM to refuse
            options["truncation"] = False
        want_offsets = self._wants_offsets(prompt, params)
        rows = self._rows(prompt["prompt"], return_offsets_mapping=want_offsets, **options)
        offsets = rows["offset_mapping"][0] if want_offsets else None
        return self._build_tokens_prompt(rows["input_ids"][0], prompt, offset_mapping=offsets)

    def _rows(self, text: str, **options) -> dict:
        """What `SaisaProcessor` makes of a text, with one token for each image."""
        assert self._processor is not None  # there is no text without a tokenizer
        return with_a_token_each(self._processor, text, **options)

    def render_messages(self, messages, params):
        conversation, prompt = super().render_messages(messages, params)
        return conversation, self._with_bos(prompt)

    async def render_messages_async(self, messages, params):
        conversation, prompt = await super().render_messages_async(messages, params)
        return conversation, self._with_bos(prompt)

    def _with_bos(self, prompt):
        """A rendered conversation with the special tokens that `SaisaProcessor.apply_chat_template` adds to one which does
        not bring its own; vLLM takes templates to be complete."""
        if os.environ.get("VLLM_MEDIA_CONNECTOR") == CONNECTOR:  # it is a server for strangers
            check_names(prompt.get("multi_modal_uuids"))
        text = prompt.get("prompt")
        if self._processor is None or "prompt_token_ids" in prompt or not isinstance(text, str):
            return prompt
        if not begins_with_bos(self.tokenizer, text):
            prompt["prompt_token_ids"] = self._rows(text)["input_ids"][0]
        return prompt

    def _process_tokens(self, prompt, **kwargs):
        return self._checked(super()._process_tokens(prompt, **kwargs))

    async def _process_tokens_async(self, prompt, **kwargs):
        return self._checked(await super()._process_tokens_async(prompt, **kwargs))

    def _checked(self, engine_input):
        images = engine_input.get("mm_placeholders", {}).get("image", ())
        check_prompt(engine_input["prompt_token_ids"], self._image_token_id, sum(one.length for one in images))
        return engine_input
