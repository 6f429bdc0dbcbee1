# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""An untrained SAISA from a language model and a vision encoder that exist: `SaisaForConditionalGeneration.from_parts`.

The parts' tensors are taken over, not copied, so that memory holds each of them once. What is new is made here: the
projectors, and rows of embedding and head for an image token that the language model has none for.
"""

import copy
import os

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from ..common.sources import reading
from ..compat_saisa import model_class_of, needed
from ..language_models_saisa import FAMILIES
from ..modeling_saisa import SaisaVisualProjector
from ..vision_saisa import SaisaVisualResampler, as_vision_tower
from .gguf import gguf_file, gguf_model
from .names import checkpoint_state_dict
from .weight_files import check_whole


EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"


def assemble(model_class, text_model, vision_model, **arguments):
    """The body of `SaisaForConditionalGeneration.from_parts`.

    The model is untrained. On text alone it is the language model; its projectors are new: each linear map's weights and
    biases are uniform in +-1 / sqrt(inputs), as LLaVA's code makes them.

    Args:
        model_class: the class that `from_parts` was called on.
        text_model: folder or hub id of a language model of a supported family, a GGUF file or a folder with one (see
            `gguf`), or a model of transformers with its head. The tensors of a model are shared, not copied.
        vision_model: folder or hub id of a vision encoder, also of a CLIP or SigLIP with a text tower, or an encoder of
            transformers, which becomes the vision tower itself.
        arguments: of `SaisaConfig` (`vision_feature_layer`, `visual_layers`, `projector_hidden_size` ...), and
            image_token_id: the image token's index. If embedding and head have no such row, they get rows up to it, the
                mean of the old ones, which `generation_config.suppress_tokens` keeps out of answers. None: the first new row.
            dtype: of all weights. None: the language model's.

    Returns:
        the model in eval mode, with the language model's generation config.

    Raises:
        ValueError: a part is of no supported kind, is quantized, lacks tensors, or does not fit the arguments.
        OSError: a folder or repository cannot be read.
    """
    image_token_id, dtype = arguments.pop("image_token_id", None), _dtype(arguments.pop("dtype", None))
    for name in ("text_config", "vision_config", "tie_word_embeddings"):
        if name in arguments:
            raise ValueError(f"{name} is the parts' own: leave it out, or change the part.")
    text_model = _language_model(text_model, dtype)
    if getattr(text_model, "hf_quantizer", None) is not None:
        raise ValueError("text_model is quantized: load it as it was published, and quantize what is built.")
    decoder, head = text_model.get_decoder(), text_model.get_output_embeddings()
    if decoder.config.model_type not in FAMILIES:
        raise ValueError(
            f"text_model is a {decoder.config.model_type}, which is not supported: expected one of {', '.join(FAMILIES)}."
        )
    dtype = decoder.get_input_embeddings().weight.dtype if dtype is None else dtype
    weights = {name: _cast(x, dtype) for name, x in checkpoint_state_dict(decoder).items()}
    encoder = _encoder(vision_model, dtype)
    implementations = [part.config._attn_implementation for part in (decoder, encoder)]

    old_rows = weights[EMBEDDING].shape[0]
    text_config = copy.deepcopy(decoder.config)
    tied = head is None or head.weight is decoder.get_input_embeddings().weight
    if head is None and not getattr(text_config, "tie_word_embeddings", False):
        raise ValueError(
            f"text_model is a {type(text_model).__name__}, which has no head: expected one with, "
            "AutoModelForCausalLM.from_pretrained(...) for instance."
        )
    if getattr(head, "bias", None) is not None:
        raise ValueError(f"text_model is a {type(text_model).__name__} whose head has a bias: that is not supported.")
    if image_token_id is None:
        image_token_id = old_rows
    text_config.vocab_size = max(old_rows, image_token_id + 1)
    config = model_class.config_class(
        text_config=text_config,
        vision_config=encoder.config,
        image_token_id=image_token_id,
        tie_word_embeddings=tied,
        **arguments,
    )
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype

    with torch.device("meta"):
        model = model_class(config)
    model.model.vision_tower = as_vision_tower(encoder)
    model.language_model.rotary_emb = model.language_model.family.rotary_embedding()
    model.language_model.rotary_emb.to(weights[EMBEDDING].device)
    # the parts keep the attention that they were loaded with, which a new model would choose anew
    for part, implementation in zip((config.text_config, config.vision_config), implementations):
        if implementation is not None:
            part._attn_implementation = implementation
    with torch.no_grad():
        weights[EMBEDDING] = _with_rows(weights[EMBEDDING], text_config.vocab_size)
        found = model.language_model.load_state_dict(weights, strict=False, assign=True)
        if not tied:
            head_weight = _with_rows(_cast(head.weight, dtype), text_config.vocab_size)
            model.lm_head.load_state_dict({"weight": head_weight}, assign=True)
    wrong = [name for name in found.missing_keys if "visual_projector." not in name] + found.unexpected_keys
    if wrong:
        raise ValueError(
            f"text_model has not the tensors of a {text_config.model_type}: {', '.join(sorted(wrong)[:8])} "
            f"{'and others ' if len(wrong) > 8 else ''}are missing or unknown. If it carries adapters, merge them first."
        )
    _fill_projectors(model, dtype)
    model.tie_weights()
    empty = [name for name, x in model.state_dict().items() if x.is_meta]
    if empty:
        raise ValueError(f"text_model lacks {', '.join(empty[:8])}.")
    _take_over_generation_config(model, text_model, range(old_rows, text_config.vocab_size))
    return model.eval()


def _language_model(text_model, dtype) -> PreTrainedModel:
    if isinstance(text_model, PreTrainedModel):
        return text_model
    if not isinstance(text_model, (str, os.PathLike)):
        raise ValueError(
            f"text_model is a {type(text_model).__name__}: expected a model of transformers, path or hub id."
        )
    if (file := gguf_file(text_model)) is not None:
        return gguf_model(file, dtype)
    auto_class = needed("from_parts with a language model by its path", "transformers", "AutoModelForCausalLM")
    with reading(text_model):
        model, found = auto_class.from_pretrained(
            text_model, dtype="auto" if dtype is None else dtype, output_loading_info=True
        )
    check_whole(text_model, model.config.model_type, found)
    return model


def _encoder(vision_model, dtype) -> PreTrainedModel:
    """The encoder in `dtype`; of a model of two towers (CLIP, SigLIP) on disk the vision tower."""
    if isinstance(vision_model, PreTrainedModel):
        if hasattr(vision_model.config, "vision_config"):
            raise ValueError(
                f"vision_model is a {type(vision_model).__name__}, which is more than a vision encoder: pass its vision "
                "tower, or the path or hub id, of which that is read alone."
            )
        kept = {p.dtype for p in vision_model.parameters() if p.is_floating_point()} <= {dtype}
        return vision_model if kept else copy.deepcopy(vision_model).to(dtype)
    with reading(vision_model):
        config = AutoConfig.from_pretrained(vision_model)
    config = getattr(config, "vision_config", config)
    encoder_class = model_class_of(config) or needed(
        "from_parts with a vision encoder by its path", "transformers.AutoModel", "_model_mapping"
    )
    with reading(vision_model):
        encoder, found = encoder_class.from_pretrained(
            vision_model, config=config, dtype=dtype, output_loading_info=True
        )
    check_whole(vision_model, config.model_type, found, " Expected a checkpoint of a vision encoder.")
    return encoder


def _dtype(dtype) -> torch.dtype | None:
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if found is not None and isinstance(found, torch.dtype) and found.is_floating_point:
        return found
    if dtype is not None:
        raise ValueError(f"dtype={dtype!r}: expected a floating dtype, or None for the language model's own.")
    return None


def _cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _with_rows(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """`weight` (old rows, D) with further rows at the end. As a head row, the mean of all rows gives the mean of all
    logits, which is never the largest."""
    new = rows - weight.shape[0]
    if not new:
        return weight
    total = sum(part.double().sum(0) for part in weight.split(4096))
    return torch.cat([weight, (total / weight.shape[0]).to(weight.dtype).expand(new, -1)])


def _fill_projectors(model, dtype):
    """Gives each projector, and the resampler, the weights of a new one, made in float32, where its decoder layer is."""
    base = model.model
    for owner in (base, *base.language_model.layers):
        if hasattr(owner, "visual_projector"):
            weight = base.language_model.embed_tokens.weight if owner is base else next(owner.self_attn.parameters())
            owner.visual_projector = SaisaVisualProjector(model.config).to(weight.device, dtype)
    if hasattr(base, "visual_resampler"):
        device = base.language_model.embed_tokens.weight.device
        base.visual_resampler = SaisaVisualResampler(model.config).to(device, dtype)


def _take_over_generation_config(model: nn.Module, text_model, new_tokens: range):
    """The language model's own; tokens that it did not have are never written."""
    if getattr(text_model, "generation_config", None) is None:
        return
    model.generation_config = copy.deepcopy(text_model.generation_config)
    never = sorted({*(model.generation_config.suppress_tokens or []), *new_tokens})
    model.generation_config.suppress_tokens = never or None
