# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The members of the family that this model is, by name, as its settings (docs/family.md)."""

from typing import Any

from ..configuration_saisa import SaisaConfig
from .presets import MEMBERS, VICA_LAYERS


__all__ = ["MEMBERS", "member", "member_settings"]

# the layers of LLaVA-1.5-7B in which ShortV freezes visual tokens (arXiv 2504.00502; github.com/icip-cas/ShortV)
SHORTV_LAYERS = [31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19]
SHORTV_DEPTH = 32
VICA_DEPTHS = {32: "vica-7b", 40: "vica-13b", 24: "vica-2.7b"}
_ALIGNED = ("projector_sharing", "projector_hidden_size", "visual_layers", "leading_text_skips_attention")
_ALIGNED += ("fold_projectors",)
_IN_EMBEDDING_SPACE = ("visual_attention", "visual_feed_forward")


def member_settings(name: str, layers: int) -> dict[str, Any]:
    """Arguments of `SaisaConfig` for the member `name` over a language model of so many layers. ShortV and ViCA have the
    layers that they were published with, at other depths those at the same fractions of the depth as in their 7B models.

    Raises:
        ValueError: there is no such member.
    """
    if name not in MEMBERS:
        raise ValueError(f"{name!r} is no member of the family: expected one of {', '.join(MEMBERS)}.")
    if name in ("llava", "naavit", "shortv"):
        frozen = _at_depth(SHORTV_LAYERS, SHORTV_DEPTH, layers) if name == "shortv" else []
        attends: Any = {"llava": "full", "naavit": "none"}.get(name)
        if name == "shortv":
            attends = ["none" if layer in frozen else "full" for layer in range(layers)]
        fed: Any = [layer not in frozen for layer in range(layers)] if name == "shortv" else True
        return {"alignment": "embedding_space", "visual_attention": attends, "visual_feed_forward": fed}
    if name == "saisa":
        return {"projector_sharing": "per_layer"}
    seeing = None
    if name == "vica":
        seeing = VICA_LAYERS.get(VICA_DEPTHS.get(layers, "")) or _at_depth(VICA_LAYERS["vica-7b"], 32, layers)
    skips = name == "vica" and VICA_DEPTHS.get(layers) == "vica-7b"
    return {"projector_sharing": "shared", "visual_layers": seeing, "leading_text_skips_attention": skips}


def member(config: SaisaConfig, name: str) -> SaisaConfig:
    """`config` as the member `name`, with the same encoder, language model, and what comes in front of the projectors."""
    kept = {key: value for key, value in config.to_dict().items() if key not in (*_ALIGNED, *_IN_EMBEDDING_SPACE)}
    kept.pop("alignment")
    return SaisaConfig.from_dict(kept | member_settings(name, config.text_config.num_hidden_layers))


def _at_depth(published: list[int], depth: int, layers: int) -> list[int]:
    """Layers at the same fractions of the depth."""
    return sorted({layer * layers // depth for layer in published})
