# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""A `LlavaForConditionalGeneration` as the same model here, in embedding space: its config, and the names of its tensors."""

from ..language_models_saisa import FAMILIES, LanguageModelFamily
from ..vision_saisa import CLASS_TOKENS


def config_of_llava(llava: dict) -> dict:
    """`llava`, the config.json of a `LlavaForConditionalGeneration`, as that of a SAISA in embedding space.

    Raises:
        ValueError: it is a LLaVA that has no like here.
    """
    encoder = (llava.get("vision_config") or {}).get("model_type", "clip_vision_model")
    if llava.get("vision_feature_select_strategy", "default") == "default" and CLASS_TOKENS.get(encoder) == 0:
        raise ValueError(
            f"vision_feature_select_strategy='default' of this LLaVA drops the first token of {encoder}, which is a patch "
            "and no class token: that is not supported. A LLaVA of this encoder needs 'full'."
        )
    text_config = {"model_type": "llama", **(llava.get("text_config") or {})}
    family = FAMILIES.get(text_config["model_type"], LanguageModelFamily)
    if family.scaled_logits is not LanguageModelFamily.scaled_logits:
        raise ValueError(
            f"text_config.model_type={text_config['model_type']!r}: transformers' LLaVA uses this language model without "
            "what that does to logits, which is not supported."
        )
    return {key: value for key, value in llava.items() if key != "multimodal_projector_bias"} | {
        "model_type": "saisa",
        "architectures": ["SaisaForConditionalGeneration"],
        "text_config": text_config,
        "projector_bias": llava.get("multimodal_projector_bias", True),
        "alignment": "embedding_space",
        "visual_attention": "full",
        # 4.57 goes by the text config, 5.x by either
        "tie_word_embeddings": llava.get("tie_word_embeddings") or None,
    }


def tensor_names(level: str) -> dict[str, str]:
    """Patterns of the names in a LLaVA's checkpoint, whichever release saved it, and what they become.

    Args:
        level: what stands between `vision_tower.` and the encoder's own names, `"vision_model."` or nothing.
    """
    return {
        rf"^(?:model\.)?vision_tower\.(?:{level})?": f"model.vision_tower.{level}",
        r"^(?:model\.)?multi_modal_projector\.": "model.visual_projector.",
        r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
        r"^(?:model\.)?language_model\.(?:model\.)?": "model.language_model.",
    }
