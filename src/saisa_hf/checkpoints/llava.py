# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""LLaVA, LLaVA-NeXT and LLaVA-OneVision as the same models here, in embedding space: configs, and names of tensors."""

import copy

from transformers import CONFIG_MAPPING

from ..language_models_saisa import FAMILIES, LanguageModelFamily
from ..vision_saisa import CLASS_TOKENS


def config_of_llava(llava: dict) -> dict:
    """`llava`, the config.json of a LLaVA, LLaVA-NeXT or LLaVA-OneVision, as that of a SAISA in embedding space.

    Raises:
        ValueError: it is a LLaVA that has no like here.
    """
    if llava["model_type"] != "llava":
        llava = _complete(llava)
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


def _complete(llava: dict) -> dict:
    """`llava` with what LLaVA-NeXT's or LLaVA-OneVision's configs leave out because it is the default."""
    whole = CONFIG_MAPPING[llava["model_type"]](**copy.deepcopy(llava))
    names = ["image_token_index", "vision_feature_layer", "vision_feature_select_strategy", "projector_hidden_act"]
    names += ["image_grid_pinpoints", "vision_aspect_ratio"]
    found = {name: getattr(whole, name) for name in names if hasattr(whole, name)}
    found["image_grid_pinpoints"] = [list(pair) for pair in found["image_grid_pinpoints"]]
    for part in ("vision_config", "text_config"):
        own = llava.get(part) or getattr(whole, part).to_dict()
        found[part] = {**own, "model_type": getattr(whole, part).model_type}
    left_out = ("image_seq_length", "video_token_index", "use_image_newline_parameter")
    return {name: value for name, value in llava.items() if name not in left_out} | found


def tensor_names(level: str) -> dict[str, str]:
    """Patterns of the names in a LLaVA's checkpoint, whichever release saved it, and what they become.

    Args:
        level: what stands between `vision_tower.` and the encoder's own names, `"vision_model."` or nothing.
    """
    return {
        rf"^(?:model\.)?vision_tower\.(?:{level})?": f"model.vision_tower.{level}",
        r"^(?:model\.)?multi_modal_projector\.": "model.visual_projector.",
        r"^(?:model\.)?image_newline$": "model.visual_projector.image_newline",
        r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
        r"^(?:model\.)?language_model\.(?:model\.)?": "model.language_model.",
    }
