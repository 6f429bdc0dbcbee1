# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""How a new checkpoint's tokenizer pads."""

from transformers import PreTrainedTokenizerBase


def prepare_padding(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes `tokenizer`, in place, pad on the left with a token that it has, and forget where it came from."""
    tokenizer.name_or_path = ""
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the latter is what is saved
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
