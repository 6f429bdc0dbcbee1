# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Published language models and the paper's encoder, by name, for counting and for benchmarks: sizes, no weights."""

# as in the config.json of each release; what is left out is the default of transformers
LANGUAGE_MODELS = {
    "vicuna-7b": {  # v1.5, of Llama 2
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    },
    "vicuna-13b": {  # v1.5
        "model_type": "llama", "vocab_size": 32000, "hidden_size": 5120, "intermediate_size": 13824,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
    },
    "llama3-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 8192, "rope_theta": 500000.0, "rms_norm_eps": 1e-5,
    },
    "mistral-7b": {  # v0.2, without a sliding window
        "model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-5, "sliding_window": None,
    },
    "qwen2.5-7b": {
        "model_type": "qwen2", "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944,
        "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4,
        "max_position_embeddings": 32768, "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
    },
}  # fmt: skip

CLIP_336 = {  # CLIP ViT-L/14 at 336 px
    "model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 768,
    "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 336, "patch_size": 14,
}  # fmt: skip

MEMBERS = ("llava", "naavit", "shortv", "saisa", "saisa-shared", "vica")  # of the family (docs/family.md)
# the layers that see the image in the published ViCAs (arXiv 2602.07574); none of their checkpoints names them
VICA_LAYERS = {
    "vica-7b": [0, 1, 7, 8, 9, 10, 11, 14],
    "vica-13b": [0, 6, 8, 9, 10, 13, 14, 16],
    "vica-2.7b": [0, 1, 14, 15, 18, 19, 21, 22, 23],
}
