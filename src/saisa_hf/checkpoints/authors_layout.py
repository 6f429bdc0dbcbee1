# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The layout of the SAISA authors' checkpoints, which is LLaVA-1.5's and ViCA's: their configuration as a `SaisaConfig`,
and for each tensor of a SAISA checkpoint the one of theirs that it comes from."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..configuration_saisa import SaisaConfig
from ..costs.presets import VICA_LAYERS
from ..modeling_saisa import SaisaForConditionalGeneration
from .weight_files import DTYPES, STORED_DTYPES, WeightFiles
from .weight_writing import Source


TOWER_PREFIX = "model.vision_tower.vision_tower."  # of the vision encoder's tensors, in a checkpoint that holds it

_TEXT_MODELS = {"llava_llama": "llama", "llava": "llama", "llama": "llama", "llava_mistral": "mistral"}
_REQUIRED_TEXT_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TEXT_KEYS = (
    *_REQUIRED_TEXT_KEYS,
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "initializer_range", "use_cache"),
    *("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings", "sliding_window"),
    *("attention_bias", "attention_dropout", "mlp_bias", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
_VICA_7B_WIDTH = 4096  # by which their code knows the model whose text in front of the image has no attention
_STRATEGIES = {"patch": "default", "cls_patch": "full"}

_OUR_TOWER = "model.vision_tower."
_RENAMES = (  # the authors' name -> the name in a SAISA checkpoint
    (r"model\.layers\.(\d+)\.mm_projector\.0\.", r"model.language_model.layers.\1.visual_projector.linear_1."),
    (r"model\.layers\.(\d+)\.mm_projector\.2\.", r"model.language_model.layers.\1.visual_projector.linear_2."),
    (r"model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"lm_head\.", r"lm_head."),
    (r"model\.mm_projector\.0\.", r"model.visual_projector.linear_1."),
    (r"model\.mm_projector\.2\.", r"model.visual_projector.linear_2."),
)
_SHARED = re.compile(r"model\.mm_projector\.[02]\.(weight|bias)")  # of the first training stage, unused after it
_BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq|.*\.position_ids")  # stored by old releases


def vica_settings(layers: str | list[int], settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `SaisaConfig` for a ViCA, whose checkpoints are LLaVA-1.5's.

    Args:
        layers: a name in `VICA_LAYERS`, or the layers that see the image.
        settings: the object in its config.json.

    Raises:
        ValueError: there is no such name.
    """
    if isinstance(layers, str) and layers not in VICA_LAYERS:
        raise ValueError(f"visual_layers={layers!r}: expected {', '.join(VICA_LAYERS)}, or a list of layers.")
    is_7b = layers == "vica-7b" if isinstance(layers, str) else settings.get("hidden_size") == _VICA_7B_WIDTH
    return {
        "projector_sharing": "shared",
        "visual_layers": VICA_LAYERS[layers] if isinstance(layers, str) else layers,
        "leading_text_skips_attention": is_7b,
    }


# --- configuration ----------------------------------------------------------------------------------------------------


def saisa_config(
    settings: dict[str, Any], file: Path, vision_config: Any, image_token_id: int, visual: dict[str, Any]
) -> SaisaConfig:
    """The configuration of the SAISA that the authors' `settings` describe.

    Args:
        settings: the object in their config.json.
        file: where it was read from, for error messages.
        vision_config: of the vision encoder, as `SaisaConfig` takes it.
        image_token_id: the vocabulary is extended to it.
        visual: `projector_sharing`, and other arguments of `SaisaConfig`.

    Raises:
        ValueError: a setting is missing or not supported.
    """

    def expect(key: str, allowed: tuple, default: Any = None) -> Any:
        value = settings.get(key, default)
        if value not in allowed:
            raise ValueError(f"{file}: {key}={value!r} is not supported, expected {' or '.join(map(repr, allowed))}.")
        return value

    missing = [key for key in _REQUIRED_TEXT_KEYS if not isinstance(settings.get(key), int)]
    if missing:
        raise ValueError(f"{file}: {missing[0]}={settings.get(missing[0])!r}, expected an integer.")
    expect("mm_projector_type", ("mlp2x_gelu",), "mlp2x_gelu")
    expect("image_aspect_ratio", ("pad", "square", None))
    for flag in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        expect(flag, (False, None))
    strategy = _STRATEGIES[expect("mm_vision_select_feature", tuple(_STRATEGIES), "patch")]
    text_config = {key: settings[key] for key in _TEXT_KEYS if key in settings}
    text_config["model_type"] = _TEXT_MODELS[expect("model_type", tuple(_TEXT_MODELS))]
    text_config["vocab_size"] = max(text_config["vocab_size"], image_token_id + 1)
    if (text_config.get("pad_token_id") or 0) < 0:  # some Llama configs write -1 for none
        text_config["pad_token_id"] = None
    config = SaisaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=image_token_id,
        vision_feature_layer=settings.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=strategy,
        **visual,
        tie_word_embeddings=settings.get("tie_word_embeddings", False),
    )
    config.architectures = [SaisaForConditionalGeneration.__name__]
    return config


# --- tensors ----------------------------------------------------------------------------------------------------------


def tensor_sources(
    config: SaisaConfig,
    expected: dict[str, tuple[int, ...]],
    weights: WeightFiles,
    tower: WeightFiles,
    own_tower: bool,
    old_rows: int,
) -> dict[str, Source]:
    """Name in a SAISA checkpoint of `config` -> source, in the order in which the source files hold them.

    Args:
        expected: see `saved_shapes`.
        weights: the authors' checkpoint.
        tower: where the vision encoder's weights are; `weights` if `own_tower`.
        old_rows: rows of the embedding and the head in `weights`; in `config` there may be more.

    Raises:
        ValueError: a tensor is missing, unknown, or of another shape or dtype than expected.
    """
    sources: dict[str, Source] = {}
    for name, target in _model_names(config, weights, expected):
        sources[target] = _source(weights, name, target, expected, old_rows)
    for name, target in _tower_names(tower, own_tower, expected):
        sources[target] = _source(tower, name, target, expected, old_rows)
    missing = [target for target in expected if target not in sources]
    if missing:
        raise _missing_tensor(missing, weights, tower)
    return sources


def saved_shapes(config: SaisaConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor in a checkpoint of `config`, under the names that it is saved with."""
    with torch.device("meta"):
        model = SaisaForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _model_names(config: SaisaConfig, weights: WeightFiles, expected: dict) -> Iterator[tuple[str, str]]:
    """The authors' name and ours of each tensor in `weights` that the model has, the vision encoder left out."""
    shared = config.projector_sharing == "shared"
    for name in weights.shapes:
        if _BUFFERS.fullmatch(name) or (_SHARED.fullmatch(name) and not shared) or name.startswith(TOWER_PREFIX):
            continue
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for pattern, replacement in _RENAMES:
            target, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                break
        else:
            raise ValueError(f"{weights.files[name]}: tensor {name} is unknown.")
        if shared and ".visual_projector." in target and target not in expected:
            raise ValueError(
                f"{weights.files[name]}: tensor {name} is a projector of a single layer: this is not a checkpoint of the "
                f"first stage or of ViCA. Leave out --shared-projector use and --visual-layers."
            )
        yield name, target


def _tower_names(tower: WeightFiles, own_tower: bool, expected: dict) -> Iterator[tuple[str, str]]:
    """The name in `tower` and ours of each tensor of the vision encoder."""
    ours = [name.removeprefix(_OUR_TOWER) for name in expected if name.startswith(_OUR_TOWER)]
    nested = all(name.startswith("vision_model.") for name in ours)
    prefix = TOWER_PREFIX if own_tower else ""
    names = {name: name.removeprefix(prefix) for name in tower.shapes if name.startswith(prefix)}
    if nested and not any(below.startswith("vision_model.") for below in names.values()):
        names = {name: f"vision_model.{below}" for name, below in names.items()}
    for name, below in names.items():
        # a whole CLIP or SigLIP checkpoint also holds its text tower and heads
        text_side = not own_tower and nested and not below.startswith("vision_model.")
        if not text_side and not _BUFFERS.fullmatch(name):
            yield name, f"{_OUR_TOWER}{below}"


def _source(weights: WeightFiles, name: str, target: str, expected: dict, old_rows: int) -> Source:
    """The tensor `name` of `weights` as the source of `target`, whose shape is in `expected`."""
    file = weights.files[name]
    if target not in expected:
        raise ValueError(f"{file}: tensor {name} is unknown; a SAISA model has no {target}.")
    want, rows = expected[target], None
    if target in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
        want, rows = (old_rows, *want[1:]), want[0]
    if weights.dtypes[name] not in STORED_DTYPES:
        raise ValueError(
            f"{file}: tensor {name} is {weights.dtypes[name]}, expected one of {', '.join(DTYPES)}. "
            f"Quantized checkpoints cannot be converted."
        )
    if weights.shapes[name] != want:
        raise ValueError(
            f"{file}: tensor {name} has shape {weights.shapes[name]}, expected {want} by the configuration."
        )
    return Source(weights, name, rows)


def _missing_tensor(missing: list[str], weights: WeightFiles, tower: WeightFiles) -> ValueError:
    first, hint = missing[0], ""
    layers_own = ".layers." in first and ".visual_projector." in first
    if layers_own and any(map(_SHARED.fullmatch, weights.shapes)):
        hint = (
            " Only a shared projector is there: is this a LLaVA checkpoint? One of SAISA's first training stage is "
            "converted with --shared-projector use, one of ViCA with --visual-layers."
        )
    listing = (tower if first.startswith(_OUR_TOWER) else weights).listing
    more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
    return ValueError(f"{listing}: tensor {_authors_name(first)} is missing{more}.{hint}")


def _authors_name(target: str) -> str:
    """The authors' name of the tensor that is called `target` in a SAISA checkpoint."""
    name = re.sub(r"visual_projector\.linear_([12])", lambda m: f"mm_projector.{2 * int(m[1]) - 2}", target)
    if name.startswith(_OUR_TOWER):
        return name.replace(_OUR_TOWER, TOWER_PREFIX)
    return name.replace("model.language_model.", "model.")


def shared_projector_sources(config: SaisaConfig, weights: WeightFiles) -> dict[str, Source]:
    """Name -> source of the projector of the first training stage, which is there beside those of the layers.

    Raises:
        ValueError: it is missing, or of another shape or dtype than expected.
    """
    width, hidden = config.vision_feature_size, config.text_config.hidden_size
    sources = {}
    for number, columns in ((0, width), (2, hidden)):
        for part, want in (("weight", (hidden, columns)), ("bias", (hidden,))):
            name = f"model.mm_projector.{number}.{part}"
            if name not in weights.shapes:
                raise ValueError(f"{weights.listing}: tensor {name} is missing. Leave out --shared-projector keep.")
            if weights.shapes[name] != want or weights.dtypes[name] not in STORED_DTYPES:
                raise ValueError(
                    f"{weights.files[name]}: tensor {name} has shape {weights.shapes[name]} and dtype "
                    f"{weights.dtypes[name]}, expected {want} and one of {', '.join(DTYPES)}."
                )
            sources[f"model.visual_projector.linear_{number // 2 + 1}.{part}"] = Source(weights, name)
    return sources
