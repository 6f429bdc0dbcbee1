# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The demo's language: a tokenizer of some sixty words, a chat template, and the configuration of a small Llama."""

from __future__ import annotations

import re
from functools import lru_cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import LlamaConfig, PreTrainedTokenizerFast

from .scenes import INKS, LISTS, NOTHING, PLACES, QUESTIONS


IMAGE, PAD, BOS, EOS, UNKNOWN = "<image>", "<pad>", "<s>", "</s>", "<unk>"

# Words, single digits, punctuation and line breaks; spaces only separate.
PIECES = r"[a-z]+|[0-9]|\n|[^\sa-z0-9]"

CHAT_TEMPLATE = (
    "{% macro words(content) %}"
    "{% if content is string %}{{ content }}"
    "{% else %}"
    "{% for part in content %}"
    "{{ '<image>\\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}"
    "{% endif %}"
    "{% endmacro %}"
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ words(message['content']) }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ words(message['content']) }}{{ ' ' if message['role'] == 'user' else eos_token }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def vocabulary() -> list[str]:
    """Every word of the demo's questions and answers, special tokens first."""
    digits = "0123456789"
    texts = ["user: assistant: yes no \n", digits, " ".join(INKS), " ".join(PLACES), NOTHING, *LISTS.values(), ", . ?"]
    texts += [re.sub(r"{\w+}", "", text) for wordings in QUESTIONS.values() for text in wordings]
    splitter = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    words = [piece for text in texts for piece, _ in splitter.pre_tokenize_str(text.lower())]
    return list(dict.fromkeys([PAD, BOS, EOS, UNKNOWN, IMAGE, *words]))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer that ignores case and spells "yes" as one token; built from the vocabulary, not trained."""
    words = {word: index for index, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(PIECES), behavior="removed", invert=True)
    # Joins words with spaces, but for one before a comma.
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, words[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def text_config(vocab_size: int) -> LlamaConfig:
    """About 0.8 million parameters: four layers of width 128."""
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        # With the usual 0.02 a network of width 128 stays on its first plateau.
        initializer_range=0.06,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )


class Conversation:
    """Token ids of an image and the questions and answers about it, as `CHAT_TEMPLATE` would write them."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, n_image_tokens: int):
        self.tokenizer = tokenizer
        self.image = [tokenizer.convert_tokens_to_ids(IMAGE)] * n_image_tokens
        self.encode = lru_cache(maxsize=4096)(lambda text: tokenizer.encode(text, add_special_tokens=False))

    def ids_and_labels(self, turns: list[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Ids of bos, image and turns, and the labels: the ids of the answers and their ends, -100 elsewhere."""
        ids, labels = [self.tokenizer.bos_token_id], [-100]
        for index, (question, answer) in enumerate(turns):
            asked = self.encode("USER:") + (self.image + self.encode("\n") if index == 0 else [])
            asked = asked + self.encode(question) + self.encode("ASSISTANT:")
            answered = [*self.encode(answer), self.tokenizer.eos_token_id]
            ids += asked + answered
            labels += [-100] * len(asked) + answered
        return ids, labels
