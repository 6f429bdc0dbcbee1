# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The SAISA of a LLaVA before anything is fitted: LLaVA's own parts, with its projector copied into every layer."""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import CLIPImageProcessor, PretrainedConfig, PreTrainedModel, ProcessorMixin

from ...checkpoint_saisa import LLAVAS
from ...configuration_saisa import SaisaConfig
from ...language_models_saisa import LanguageModelFamily
from ...modeling_saisa import SaisaForConditionalGeneration
from ...processing_saisa import SaisaProcessor
from ...vision_saisa import CLASS_TOKENS, NESTED_ENCODERS, NestedEncoder, image_size, shown
from ..build import colour_settings
from ..names import checkpoint_state_dict


def saisa_from_llava(
    llava: PreTrainedModel,
    projector_hidden_size: int | None = None,
    seed: int = 0,
    tiles: bool = True,
    visual_layers: Sequence[int] | None = None,
) -> SaisaForConditionalGeneration:
    """The SAISA of a LLaVA, with LLaVA's projector copied into every layer. All other weights are shared with the LLaVA:
    only the projectors take memory. It is in eval mode, and so are the parts that they share.

    Args:
        llava: a LLaVA, LLaVA-NeXT or LLaVA-OneVision of transformers, or a `SaisaForConditionalGeneration` that is a LLaVA:
            `alignment="embedding_space"`, `visual_attention="full"`, `visual_feed_forward=True`. All on one device.
        projector_hidden_size: inner width of the projectors. If it is larger than LLaVA's, they compute the same as before;
            if it is smaller, they are LLaVA's with inner units left out.
        seed: of the inner units that are added or left out.
        tiles: read images in tiles where the LLaVA does; False: the whole image alone.
        visual_layers: the decoder layers that see the image and have projectors; None: all.

    Raises:
        ValueError: not a LLaVA, or one whose language model or encoder SAISA does not support; no such layers.
    """
    theirs = llava.config
    check_is_llava(theirs)
    encoder = theirs.vision_config.model_type
    of_transformers = theirs.model_type in LLAVAS
    if of_transformers and theirs.vision_feature_select_strategy == "default" and CLASS_TOKENS.get(encoder) == 0:
        raise ValueError(
            f"vision_feature_select_strategy='default' drops the first token of {encoder}, which is a patch, not a class "
            f"token; SAISA cannot do that. A LLaVA with this encoder needs 'full'."
        )
    with torch.device("meta"):
        model = SaisaForConditionalGeneration(_config(llava, projector_hidden_size, tiles, visual_layers))
    family = model.language_model.family
    as_they_are = type(family).scaled_input is LanguageModelFamily.scaled_input
    if family.norms.before_attention is None or not as_they_are or hasattr(model.get_input_embeddings(), "scale"):
        raise ValueError(
            f"text_config.model_type={theirs.text_config.model_type!r} is not supported here: projectors are fitted to "
            "hidden states that a norm follows and that no multiplier scales."
        )
    _share_weights(model, llava)
    _copy_projector(model, llava, seed)
    model.generation_config = copy.deepcopy(llava.generation_config)
    return model.eval().requires_grad_(False)


def check_is_llava(config: PretrainedConfig) -> None:
    """Raises ValueError if `config` is neither that of a LLaVA of transformers nor of a SAISA that is a LLaVA."""
    if config.model_type in LLAVAS:
        return
    if config.model_type != SaisaConfig.model_type:
        raise ValueError(
            f"model_type={config.model_type!r}: expected a LLaVA, one of {', '.join(LLAVAS)} (LlavaForConditionalGeneration, "
            f"LlavaNextForConditionalGeneration ...), or a saisa with alignment='embedding_space'."
        )
    layers = range(config.text_config.num_hidden_layers)
    if not all(config.visual_tokens_attend(layer) and config.visual_tokens_are_fed(layer) for layer in layers):
        names = ("alignment", "visual_attention", "visual_feed_forward")
        raise ValueError(
            f"{', '.join(f'{name}={shown(getattr(config, name))}' for name in names)}: expected a LLaVA, alignment="
            "'embedding_space' with visual_attention='full' and visual_feed_forward=True in every layer."
        )


def projector_of(llava: PreTrainedModel) -> nn.Module:
    """The LLaVA's projector, with `linear_1` and `linear_2`."""
    return llava.model.multi_modal_projector if llava.config.model_type in LLAVAS else llava.model.visual_projector


def newline_of(llava: PreTrainedModel) -> torch.Tensor:
    """(D,) what stands at the end of a row of a LLaVA that reads tiles."""
    owner = llava.model if llava.config.model_type in LLAVAS else llava.model.visual_projector
    return owner.image_newline.detach()


def projectors_of(model: SaisaForConditionalGeneration) -> dict[int, nn.Module]:
    """The projectors of the layers that see the image, by layer, in ascending order."""
    layers = enumerate(model.model.language_model.layers)
    return {index: layer.visual_projector for index, layer in layers if hasattr(layer, "visual_projector")}


def _config(
    llava: PreTrainedModel, projector_hidden_size: int | None, tiles: bool, visual_layers: Sequence[int] | None
) -> SaisaConfig:
    theirs, embedding = llava.config, llava.get_input_embeddings().weight
    width = projector_hidden_size or projector_of(llava).linear_1.out_features
    config = copy.deepcopy(theirs) if theirs.model_type not in LLAVAS else _config_of_transformers(llava)
    config.alignment, config.projector_sharing = "input_space", "per_layer"
    config.visual_attention, config.visual_feed_forward = "none", True
    config.visual_layers = None if visual_layers is None else list(visual_layers)
    config.projector_hidden_size = None if width == config.text_config.hidden_size else width
    if not tiles:
        config.image_grid_pinpoints = config.vision_aspect_ratio = None
    config.architectures = [SaisaForConditionalGeneration.__name__]
    for part in (config, config.text_config, config.vision_config):
        part.dtype = embedding.dtype
    config.check()
    return config


def _config_of_transformers(llava: PreTrainedModel) -> SaisaConfig:
    theirs = llava.config
    return SaisaConfig(
        vision_config=copy.deepcopy(theirs.vision_config),
        text_config=copy.deepcopy(theirs.text_config),
        image_token_id=theirs.image_token_index,
        vision_feature_layer=theirs.vision_feature_layer,
        vision_feature_select_strategy=theirs.vision_feature_select_strategy,
        projector_hidden_act=theirs.projector_hidden_act,
        projector_bias=projector_of(llava).linear_1.bias is not None,
        tie_word_embeddings=llava.lm_head.weight is llava.get_input_embeddings().weight,
        image_grid_pinpoints=getattr(theirs, "image_grid_pinpoints", None),
        vision_aspect_ratio=getattr(theirs, "vision_aspect_ratio", None),
    )


def _share_weights(model: SaisaForConditionalGeneration, llava: PreTrainedModel) -> None:
    """Gives `model`, which has no memory yet, the encoder, language model and head of `llava`."""
    theirs, tower = llava.config, llava.model.vision_tower
    if theirs.model_type not in LLAVAS:
        model.model.vision_tower = tower
        if hasattr(llava.model, "visual_resampler"):
            model.model.visual_resampler = llava.model.visual_resampler
    else:
        nested = hasattr(tower, "vision_model") or theirs.vision_config.model_type not in NESTED_ENCODERS
        model.model.vision_tower = tower if nested else NestedEncoder(tower)
    decoder = model.model.language_model
    keys = decoder.load_state_dict(checkpoint_state_dict(llava.model.language_model), strict=False, assign=True)
    missing = [key for key in keys.missing_keys if ".visual_projector." not in key]
    if missing or keys.unexpected_keys:
        raise ValueError(
            f"the language model of this {theirs.model_type} ({theirs.text_config.model_type}) does not match SAISA's: "
            f"missing {missing[:3]}, unexpected {keys.unexpected_keys[:3]}."
        )
    embedding = llava.get_input_embeddings().weight
    decoder.rotary_emb = decoder.family.rotary_embedding().to(embedding.device)
    model.lm_head.weight = embedding if model.config.tie_word_embeddings else llava.lm_head.weight


def _copy_projector(model: SaisaForConditionalGeneration, llava: PreTrainedModel, seed: int) -> None:
    embedding, projector = model.get_input_embeddings().weight, projector_of(llava)
    width = model.config.projector_hidden_size or projector.linear_1.out_features
    weights = with_inner_units(projector, width, seed)
    if model.config.image_grid_pinpoints is not None:
        weights["image_newline"] = newline_of(llava)
    for index, empty in projectors_of(model).items():
        own = empty.to_empty(device=embedding.device).to(embedding.dtype)
        own.load_state_dict(weights)
        model.model.language_model.layers[index].visual_projector = own


def with_inner_units(projector: nn.Module, width: int, seed: int) -> dict[str, torch.Tensor]:
    """The state dict of `projector` with `width` inner units: with more of them, which have no effect yet, or with fewer."""
    weights = {name: tensor.detach() for name, tensor in projector.state_dict().items() if name.startswith("linear")}
    inner = projector.linear_1.out_features
    if width == inner:
        return weights
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(inner, generator=generator)[:width] if width < inner else torch.arange(inner)
    more = max(width - inner, 0)
    # a new unit is an old one plus noise of the same size: active, and unlike all others
    copied = torch.randint(inner, (more,), generator=generator)
    for name in ("linear_1.weight", "linear_1.bias"):
        if name in weights:
            old = weights[name]
            noise = torch.randn((more, *old.shape[1:]), generator=generator).to(old) * old.float().std().to(old)
            weights[name] = torch.cat([old[chosen.to(old.device)], old[copied.to(old.device)] + noise])
    last = weights["linear_2.weight"]
    weights["linear_2.weight"] = torch.cat([last[:, chosen.to(last.device)], last.new_zeros(len(last), more)], dim=1)
    return weights


def processor_from_llava(llava_processor: ProcessorMixin, config: SaisaConfig) -> SaisaProcessor:
    """A `SaisaProcessor` with the tokenizer, image processor and chat template of a LLaVA's processor. It makes the same ids
    and pixels from the same prompt; a `SaisaProcessor` is returned as it is. If `config` has no tiles, it makes of an image
    for LLaVA-NeXT the base image alone: the whole image, scaled to the encoder's size."""
    image_processor = llava_processor.image_processor
    no_tiles = hasattr(image_processor, "image_grid_pinpoints") and config.image_grid_pinpoints is None
    if no_tiles:
        height, width = image_size(config.vision_config)
        image_processor = CLIPImageProcessor(
            size={"height": height, "width": width},
            do_center_crop=False,
            **colour_settings(image_processor),
        )
    if hasattr(llava_processor, "tokenize_whole"):  # a SaisaProcessor, of this package or of a checkpoint's own code
        if no_tiles:
            llava_processor = copy.copy(llava_processor)
            llava_processor.image_processor, llava_processor.vision_aspect_ratio = image_processor, None
        return llava_processor
    return SaisaProcessor(
        image_processor,
        llava_processor.tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=config.vision_prefix_tokens,
        image_token=llava_processor.image_token,
        image_seq_length=config.image_seq_length,
        chat_template=llava_processor.chat_template,
        tokenize_whole=True,
        vision_aspect_ratio=config.vision_aspect_ratio,
    )
