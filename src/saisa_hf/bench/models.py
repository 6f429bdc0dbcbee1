# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Random models of a given size, and random prompts and images for them: SAISA, its bare language model, a LLaVA, a
Flamingo (transformers' Idefics), and the members of the family that SAISA belongs to."""

import argparse
import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers import (
    CLIPVisionConfig,
    IdeficsConfig,
    IdeficsForVisionText2Text,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from .. import SaisaConfig, SaisaForConditionalGeneration
from ..costs.family import member
from .names import MEMBER_MODELS, NARROW, PATCH_SIZE


@dataclass
class Models:
    """Random models with the same language model and encoder: a SAISA, its language model alone, a LLaVA, and, if asked
    for, a Flamingo, which has as many key heads as heads, members of the family by name, and by their keys in `NARROW` models
    with narrow projectors; the last two are settings of this package's own class."""

    saisa: SaisaForConditionalGeneration
    bare: LlamaForCausalLM
    llava: LlavaForConditionalGeneration
    flamingo: IdeficsForVisionText2Text | None = None
    members: dict[str, SaisaForConditionalGeneration] = field(default_factory=dict)
    narrow: dict[str, SaisaForConditionalGeneration] = field(default_factory=dict)

    @property
    def ours(self) -> list[SaisaForConditionalGeneration]:
        """All of this package's class."""
        return [self.saisa, *self.members.values(), *self.narrow.values()]

    def set_attention(self, implementation: str) -> None:
        """Lets all models attend by `implementation`."""
        # LLaVA is made of parts of the first two
        for model in (*self.ours, self.bare, self.flamingo):
            if model is not None:
                model.set_attn_implementation(implementation)

    @contextmanager
    def countable(self, implementation: str) -> Iterator[None]:
        """Inside, attention is made of matrix products, which the FLOP counter knows on every device."""
        self.set_attention("eager")
        yield
        self.set_attention(implementation)

    @contextmanager
    def encoded_by(self, encoder: nn.Module) -> Iterator[None]:
        """Inside, all models but the Flamingo use `encoder` instead of their own."""
        models = [model.model for model in (*self.ours, self.llava)]
        towers = [model.vision_tower for model in models]
        for model in models:
            model.vision_tower = encoder
        try:
            yield
        finally:
            for model, tower in zip(models, towers):
                model.vision_tower = tower


class GivenFeatures(nn.Module):
    """An encoder that returns given states, whatever the image.

    Args:
        states: (images, 1 + visual tokens, C), the class token first.
    """

    def __init__(self, states: torch.Tensor):
        super().__init__()
        self.like = nn.Parameter(states.new_empty(0), requires_grad=False)  # models ask an encoder for its dtype
        self.states = states

    def forward(self, pixel_values=None, **_):
        return BaseModelOutputWithPooling(last_hidden_state=self.states, hidden_states=(self.states, self.states))


def build(
    args: argparse.Namespace,
    flamingo_every: int | None = None,
    members: Iterable[str] = (),
    narrow: Iterable[str] = (),
) -> Models:
    """Random models that share all weights but the projectors. Weights are large enough to keep activations from vanishing,
    so that answers depend on the image. They need gradients, as those of models that are loaded do: of a frozen head, PyTorch
    makes one product for each sample.

    Members have no weights of their own: SAISA has a projector for each layer, the others have LLaVA's. Narrow projectors are
    new.

    Args:
        args: of `add_size_options` and `with_sizes`; may have `projector_sharing` as well, and for `narrow` has
            `projector_hidden_size`.
        flamingo_every: a Flamingo with gated cross-attention before every so many layers; None: no Flamingo. Where several
            heads share keys, which Idefics does not support, its decoder layers have weights of their own.
        members: of the family, by name (`MEMBERS`), at the depth of the others.
        narrow: keys of `NARROW`, of SAISA and of `members`.

    Raises:
        ValueError: the number of layers is not a multiple of `flamingo_every`, as Idefics requires; or projectors are not
            narrow enough to be folded.
    """
    if flamingo_every is not None and args.layers % flamingo_every:
        divisors = [number for number in range(1, args.layers + 1) if args.layers % number == 0]
        raise ValueError(
            f"--cross-every {flamingo_every}: with --layers {args.layers} expected {' or '.join(map(str, divisors))}; or "
            "leave the Flamingo out, with --models."
        )
    text, vision = _configs(args)
    parts = {"vision_config": vision, "text_config": text, "image_seq_length": visual_tokens(args)}
    torch.manual_seed(args.seed)
    # a cast would also round the rotary frequencies
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            sharing = getattr(args, "projector_sharing", "per_layer")
            config = SaisaConfig(**copy.deepcopy(parts), image_token_id=args.vocab_size - 1, projector_sharing=sharing)
            saisa = SaisaForConditionalGeneration(config).eval()
            llava_config = LlavaConfig(**copy.deepcopy(parts), image_token_index=args.vocab_size - 1)
            llava_projector = LlavaMultiModalProjector(llava_config)
            flamingo = None if flamingo_every is None else _flamingo(text, vision, flamingo_every)
        with torch.device("meta"):
            bare, llava = LlamaForCausalLM(text).eval(), LlavaForConditionalGeneration(llava_config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    weights = saisa.language_model.state_dict().items()
    bare.model.load_state_dict({name: x for name, x in weights if "visual_projector" not in name}, assign=True)
    bare.model.rotary_emb = saisa.language_model.rotary_emb.rotary_emb
    bare.lm_head = saisa.lm_head
    llava.model.language_model, llava.model.vision_tower = bare.model, saisa.vision_tower
    llava.model.multi_modal_projector, llava.lm_head = llava_projector, saisa.lm_head
    if flamingo is not None:
        flamingo.lm_head.weight = saisa.lm_head.weight
        flamingo.model.embed_tokens.weight = saisa.language_model.embed_tokens.weight
        if args.kv_heads == args.heads:
            flamingo.model.layers.load_state_dict(bare.model.layers.state_dict(), assign=True)
    models = Models(saisa, bare, llava, flamingo)
    models.members = {name: _member(name, models) for name in members}
    for key in narrow:
        models.narrow[key] = _narrow(key, models, args)
    models.set_attention(args.attn_implementation)
    for model in models.narrow.values():
        if model.config.fold_projectors:
            model.fold_projectors()
    return models


def _member(name: str, models: Models) -> SaisaForConditionalGeneration:
    """The member `name`, made of the tensors of the others."""
    own = _with_weights_of(models.saisa, member(models.saisa.config, name))
    if own.config.projector_sharing == "shared":
        own.model.visual_projector.load_state_dict(models.llava.model.multi_modal_projector.state_dict(), assign=True)
    return own


def _narrow(key: str, models: Models, args: argparse.Namespace) -> SaisaForConditionalGeneration:
    """The model `key` of `NARROW`, with projectors of its own, or if there is one, those of its unfolded twin."""
    name, kind = NARROW[key]
    wide = models.members[MEMBER_MODELS[name]] if name in MEMBER_MODELS else models.saisa
    settings = {"projector_hidden_size": args.projector_hidden_size, "fold_projectors": kind == "folded"}
    own = _with_weights_of(models.saisa, SaisaConfig.from_dict(wide.config.to_dict() | settings))
    twin = models.narrow.get(f"{name}-narrow")
    for place, projector in own.model.named_modules():
        if place.endswith("visual_projector"):
            if twin is not None:
                projector.load_state_dict(twin.model.get_submodule(place).state_dict(), assign=True)
                continue
            projector.to_empty(device=args.device).to(getattr(torch, args.dtype))
            for parameter in projector.parameters():
                nn.init.normal_(parameter, std=own.config.text_config.initializer_range)
    return own


def _with_weights_of(saisa: SaisaForConditionalGeneration, config: SaisaConfig) -> SaisaForConditionalGeneration:
    """A model of `config` made of the tensors of `saisa`. Projectors of other sizes, and shared ones, are on meta."""
    with torch.device("meta"):
        own = SaisaForConditionalGeneration(config).eval()
    decoder, weights = own.language_model, saisa.language_model.state_dict()
    like = {key: weights[key] for key, x in decoder.state_dict().items() if x.shape == weights[key].shape}
    decoder.load_state_dict(like, assign=True, strict=False)
    decoder.rotary_emb = saisa.language_model.rotary_emb
    own.model.vision_tower, own.lm_head = saisa.vision_tower, saisa.lm_head
    return own


def _configs(args: argparse.Namespace) -> tuple[LlamaConfig, CLIPVisionConfig]:
    """The language model and the encoder that all models share."""
    text = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=4096,
        initializer_range=args.hidden_size**-0.5,
        pad_token_id=0,
        eos_token_id=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=args.vision_width,
        intermediate_size=4 * args.vision_width,
        num_hidden_layers=args.vision_layers,
        num_attention_heads=max(args.vision_width // 64, 1),
        image_size=args.image_size,
        patch_size=PATCH_SIZE,
    )
    return text, vision


def _flamingo(text: LlamaConfig, vision: CLIPVisionConfig, every: int) -> IdeficsForVisionText2Text:
    vision_names = ("image_size", "intermediate_size", "patch_size", "num_hidden_layers", "num_attention_heads")
    text_names = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
    text_names += ["max_position_embeddings", "initializer_range", "pad_token_id", "eos_token_id"]
    config = IdeficsConfig(
        **{name: getattr(text, name) for name in text_names},
        vision_config={name: getattr(vision, name) for name in vision_names} | {"embed_dim": vision.hidden_size},
        cross_layer_interval=every,
        # closed gates would leave the image out
        alpha_initializer="ones",
        freeze_text_layers=False,
        freeze_vision_layers=False,
        tie_word_embeddings=False,
    )
    return IdeficsForVisionText2Text(config).eval()


def visual_tokens(args: argparse.Namespace) -> int:
    """Visual tokens of an image."""
    return (args.image_size // PATCH_SIZE) ** 2


def prompt(text: list[int], place: int, args: argparse.Namespace) -> torch.Tensor:
    """(1, S) token ids: `text` with the image before its token number `place`."""
    ids = [*text[:place], *[args.vocab_size - 1] * visual_tokens(args), *text[place:]]
    return torch.tensor([ids], device=args.device)


def draw_text(length: int, args: argparse.Namespace) -> list[int]:
    """Random token ids, without special tokens and image tokens."""
    return torch.randint(3, args.vocab_size - 1, (length,)).tolist()


def draw_image(args: argparse.Namespace) -> torch.Tensor:
    """(1, 3, H, W) random pixel values."""
    size = args.image_size
    return torch.randn(1, 3, size, size, device=args.device, dtype=getattr(torch, args.dtype))
