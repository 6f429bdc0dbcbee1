# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What can be measured, by name: kinds of work, models, clocks, sizes. Importing it imports no torch: the command line needs
these for its help."""

import time
from typing import Any

from ..costs.presets import CLIP_336, LANGUAGE_MODELS, MEMBERS


WORKS = {
    "prefill": "language model and projectors read a prompt whose images are already encoded",
    "mixed": "the same of a batch in which every second sample has no image",
    "first-token": "from pixels to the first token, with the encoder",
    "second-question": "a prompt about an image whose keys and values are kept",
    "kept-beginning": "the text behind an image that is in front of all questions and has been read",
    "decode": "one more token, after a prompt in the cache",
    "train": "forward, backward and AdamW step, on encoded images",
}
TRAINED = ("full", "projectors", "lora")  # all but the encoder, the projectors alone, adapters
MODELS = {"saisa": "SAISA", "llava": "LLaVA", "flamingo": "Flamingo", "language_model": "language model, text alone"}
WITHOUT_IMAGE = "language_model"
UNPADDED = (
    "flamingo",
    "member-naavit",
    "member-shortv",
)  # not in mixed batches: no padding, or more of it than is counted
# members of the family, all of this package's own class; the names without "member-" are those of `MODELS` too
MEMBER_MODELS = {f"member-{name}": name for name in MEMBERS}
REFERENCE = "member-llava"  # what members are compared with
LABELS = MODELS | {key: f"member {name}" for key, name in MEMBER_MODELS.items()}
# models whose layers map visual tokens themselves, and the same with narrow projectors, as they are and folded
ALIGNED = ("saisa", "member-saisa", "member-saisa-shared", "member-vica")
NARROW = {f"{name}-{kind}": (name, kind) for name in ALIGNED for kind in ("narrow", "folded")}
LABELS |= {key: f"{LABELS[name]}, {kind}" for key, (name, kind) in NARROW.items()}
CURVE = (64, 256, 576, 1024, 2048, 4096, 8192, 16384)  # visual tokens
CLOCKS = {"wall": time.perf_counter, "processor": time.process_time}


def is_member(key: str) -> bool:
    """Whether the model called `key` is a member of the family, with projectors of any width."""
    return NARROW.get(key, (key, ""))[0] in MEMBER_MODELS


def _sizes(name: str) -> dict[str, int]:
    vision: dict[str, Any] = CLIP_336
    text: dict[str, Any] = LANGUAGE_MODELS[name]
    return {
        "vocab_size": text["vocab_size"],
        "hidden_size": text["hidden_size"],
        "intermediate_size": text["intermediate_size"],
        "layers": text["num_hidden_layers"],
        "heads": text["num_attention_heads"],
        "kv_heads": text["num_key_value_heads"],
        "text_tokens": 64,
        "vision_width": vision["hidden_size"],
        "vision_layers": vision["num_hidden_layers"],
        "image_size": vision["image_size"],
    }


PRESETS = {name: _sizes(name) for name in ("vicuna-7b", "vicuna-13b", "llama3-8b")}
SMALL = {"hidden_size": 1024, "intermediate_size": 2752, "layers": 8, "heads": 16, "kv_heads": 16}
THIN = {"hidden_size": 512, "intermediate_size": 1376, "layers": 32, "heads": 8, "kv_heads": 8, "vision_layers": 2}
PRESETS = {"small": PRESETS["vicuna-7b"] | SMALL, "thin": PRESETS["vicuna-7b"] | THIN, **PRESETS}
PATCH_SIZE = CLIP_336["patch_size"]
