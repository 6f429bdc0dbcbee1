# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The SAISA model (Yuan et al., arXiv 2502.02458, section 3), bottom up: projector, attention, layer, decoder, model, head.

Each decoder layer of a language model has a projector of its own that maps the vision encoder's features into the input
space of that layer's self-attention. There they are keys and values only (NAAViT, No Attention Among Visual Tokens): visual
tokens are never queries, never pass a feed-forward network and never attend to each other. A text token sees the text and the
images in front of it.

    pixel_values --vision tower--> features (V, C) --each layer's projector, norm, k_proj, v_proj--> keys, values (V, K, H)
    input_ids (B, S) --TokenLayout.text--> (B, T) --embedding--> hidden states (B, T, D) --layers, norm, head--> logits

`TokenLayout` moves rows between an input (B, S), its text (B, T) and its visual tokens (V): `text` and `visual` take rows
out, `keys` joins both in input order, `align` puts text rows back with zeros between. `TokenLayout(None)` is that of an input
without images: nothing moves, T is S. In embedding space (`config.alignment`) the model is a LLaVA, or between the two.

Shape suffixes:
    B batch                                  D hidden size of the language model
    S sequence in input order, text and      N query heads
      visual placeholders                    K key/value heads
    T text tokens of the sample that has     H head size
      most of them, padding left out         C width of the vision encoder's features
    V visual tokens of the whole batch       L keys in view: those in the cache and the new ones
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .attention_saisa import OfTextAlone, attend, attention_masks, behind, cache_of_pass, hide_marked_keys, mark_hidden
from .checkpoint_saisa import BuiltFromParts, SaisaCheckpoint, UnsharesProjectors
from .compat_saisa import (
    ACT2FN,
    CACHE,
    EitherCacheName,
    ForeignNames,
    GradientCheckpointingLayer,
    can_return_tuple,
    differentiable,
    findable,
    one_cache,
    readable_tp_plan,
    tied_weights,
    update_cache,
    warn_once,
)
from .configuration_saisa import SaisaConfig
from .embedding_space_saisa import ThroughEveryLayer, VisualTokensAmongWords
from .hardware_saisa import PerDevice, execution_device, with_own_heads
from .head_saisa import IGNORED, LOSS_ARGUMENTS, AnswersAboutImages, SaisaHead, targets_of
from .language_models_saisa import choose_attention, language_model_family
from .tiles_saisa import NEWLINE, EncodesTiles
from .token_layout_saisa import Rotation, TokenLayout, rotations_of, tells_samples_apart
from .vision_saisa import SaisaVisualResampler, build_vision_tower, in_pieces
from .visual_states_saisa import SaisaVisualStates, UsesVisualStates


if TYPE_CHECKING:  # not used here: transformers 4.57 copies those files of a checkpoint that each entry file names
    from .image_sources_saisa import ImageLimits  # noqa: F401
    from .images_saisa import load_image  # noqa: F401
    from .processing_saisa import SaisaProcessor  # noqa: F401
    from .saving_saisa import saved_together  # noqa: F401

findable(__name__)


@dataclass
class SaisaModelOutputWithPast(EitherCacheName, BaseModelOutputWithPast):
    """Output of `SaisaModel`, aligned with `input_ids`. In a batch with images, rows at visual positions and padding are zero
    (except in embedding space).

    Attributes:
        last_hidden_state: (B, S, D), after the final norm.
        past_key_values, cache: two names of the cache, with keys and values of text and visual tokens in input order.
        hidden_states: tuple of (B, S, D), the input of each layer and the last hidden state.
        attentions: tuple of (B, N, S, L), each layer's attention probabilities.
        image_hidden_states: (V, C), the encoder's features, unprojected; None without `pixel_values`.
    """

    image_hidden_states: Tensor | None = None


@dataclass
class SaisaCausalLMOutputWithPast(EitherCacheName, CausalLMOutputWithPast):
    """Output of `SaisaForConditionalGeneration`; the fields are those of `SaisaModelOutputWithPast`, and

    Attributes:
        loss: float32 scalar, next-token cross-entropy over labels that follow a text token; in embedding space, over all.
        logits: (B, S, vocabulary), or the rows of `logits_to_keep`; zero at visual positions, except in embedding space.
    """

    image_hidden_states: Tensor | None = None


class SaisaVisualProjector(nn.Module):
    """Two-layer MLP from the encoder's features into the input space of self-attention (paper, section 3.2); the layer's
    input norm follows, as it does for text. With `image_grid_pinpoints`, rows for newlines become a learned one."""

    def __init__(self, config: SaisaConfig):
        super().__init__()
        size = config.text_config.hidden_size
        inner_size = config.projector_hidden_size or size
        self.linear_1 = nn.Linear(config.vision_feature_size, inner_size, bias=config.projector_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(inner_size, size, bias=config.projector_bias)
        has_newlines = config.image_grid_pinpoints is not None
        self.image_newline = nn.Parameter(torch.randn(size) * size**-0.5) if has_newlines else None

    def forward(self, features_VC: Tensor, last=None, newline: Tensor | None = None) -> Tensor:
        """(V, C) -> (V, D), in the projector's own dtype; weights that are quantized to integers accept any. `last` and
        `newline` take the places of `linear_2` and of the learned row."""
        last, dtype = self.linear_2 if last is None else last, self.linear_1.weight.dtype
        features_VC = features_VC.to(dtype) if dtype.is_floating_point else features_VC
        if self.image_newline is None:
            return last(self.act(self.linear_1(features_VC)))
        is_newline_V1 = (features_VC == NEWLINE).all(-1, keepdim=True)
        projected_VD = last(self.act(self.linear_1(features_VC.masked_fill(is_newline_V1, 0))))
        newline = (self.image_newline if newline is None else newline).to(projected_VD.dtype)
        return torch.where(is_newline_V1, newline, projected_VD)


class NaavitAttention(nn.Module):
    """Self-attention in which visual tokens are keys and values only (NAAViT; paper, section 3.1)."""

    def __init__(self, config: SaisaConfig, layer_idx: int):
        super().__init__()
        text = config.text_config
        family = language_model_family(text)
        self.config = text  # `set_attn_implementation` writes into it
        self.layer_idx = layer_idx
        self.sees_image = config.sees_image(layer_idx)
        self.leading_text_skips = config.leading_text_skips_attention
        self.head_dim = family.head_dim
        self.num_key_value_groups = text.num_attention_heads // text.num_key_value_heads
        self.scaling, self.softcap = family.scaling, family.softcap
        self.window = family.window(layer_idx)
        self.rotates = family.rotates(layer_idx)
        self.attention_dropout = text.attention_dropout
        self.is_causal = True
        self.watcher = None  # if set, called with this module, the queries and the new keys

        query_size = text.num_attention_heads * self.head_dim
        key_size = text.num_key_value_heads * self.head_dim
        self.sizes = [query_size, key_size, key_size]
        if family.fused_projection:
            self.qkv_proj = nn.Linear(text.hidden_size, sum(self.sizes), bias=family.qkv_bias)
        else:
            self.q_proj = nn.Linear(text.hidden_size, query_size, bias=family.qkv_bias)
            self.k_proj = nn.Linear(text.hidden_size, key_size, bias=family.qkv_bias)
            self.v_proj = nn.Linear(text.hidden_size, key_size, bias=family.qkv_bias)
        self.o_proj = nn.Linear(query_size, text.hidden_size, bias=family.output_bias)
        self.head_norm = family.head_norm
        if self.head_norm is not None:
            whole = self.head_norm == "width"
            self.q_norm = family.norm(query_size if whole else self.head_dim)
            self.k_norm = family.norm(key_size if whole else self.head_dim)

    def forward(
        self,
        text_BTD: Tensor,
        visual: tuple[Tensor, Tensor] | None,
        layout: TokenLayout,
        rotation: Rotation,
        attention_mask,
        cache,
        slots: Tensor,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, T, D) outputs of the text tokens, and (B, N, T, L) probabilities where the attention implementation has them.

        Args:
            text_BTD: normalised hidden states of the text tokens.
            visual: `keys_and_values` of the visual tokens; None if this layer gets none.
            attention_mask: what the attention implementation takes, or `OfTextAlone` (see `attention_masks`); None only where
                T is S or one.
            slots: (S,) places of the new tokens in the cache.
            kwargs: handed on to the attention function.
        """
        query_BTNH, key_BTKH, value_BTKH = self.queries_keys_values(text_BTD)
        query_BNTH = rotation.of_text(query_BTNH, self).transpose(1, 2)
        key_BTKH = rotation.of_text(key_BTKH, self)
        of_text = attention_mask if isinstance(attention_mask, OfTextAlone) else None
        if of_text is not None:
            key_BKLH, value_BKLH = of_text.keys_values(self.layer_idx, key_BTKH, value_BTKH, cache)
            attention_mask = of_text.mask
        else:
            key_VKH = value_VKH = None
            if visual is not None:
                visual = with_own_heads(visual, self, heads=key_BTKH.shape[2])  # tensor parallelism
                key_VKH, value_VKH = map(layout.placed, visual)
            key_VKH, remaining = rotation.of_visual(key_VKH, self)
            key_BKSH, value_BKSH = layout.keys(key_BTKH, key_VKH, remaining), layout.keys(value_BTKH, value_VKH)
            if self.watcher is not None:
                self.watcher(self, query_BNTH, key_BKSH)
            # later passes do not know which cached tokens are visual: a layer that must not see them marks their keys
            key_BKLH, value_BKLH = key_BKSH if self.sees_image else mark_hidden(key_BKSH, layout), value_BKSH
            if cache is not None:
                key_BKLH, value_BKLH = update_cache(cache, key_BKLH, value_BKLH, self.layer_idx, slots, kwargs)
            if not self.sees_image:
                attention_mask = hide_marked_keys(attention_mask, key_BKLH, query_BNTH, layout, cache)

        options = {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling, **kwargs}
        output_BTNH, probabilities_BNTL = attend(self, query_BNTH, key_BKLH, value_BKLH, attention_mask, options)
        if of_text is not None and probabilities_BNTL is not None:
            probabilities_BNTL = of_text.in_input_order(probabilities_BNTL)
        output_BTD = self.o_proj(output_BTNH.flatten(2).contiguous())
        if self.leading_text_skips and layout.visual_BS is not None:
            skips_BT1 = layout.leading_text(slots)[..., None].to(output_BTD.device)
            output_BTD = output_BTD.masked_fill(skips_BT1, 0)
            if probabilities_BNTL is not None:
                probabilities_BNTL = probabilities_BNTL.masked_fill(skips_BT1[:, None], 0)
        return output_BTD, probabilities_BNTL

    def queries_keys_values(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input rows (B, T, D) of text tokens -> (B, T, N, H), (B, T, K, H), (B, T, K, H), before rotation."""
        if hasattr(self, "qkv_proj"):
            query_BTX, key_BTX, value_BTX = self.qkv_proj(x_BTD).split(self.sizes, dim=-1)
        else:
            query_BTX, key_BTX, value_BTX = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        return self._heads(query_BTX, "q_norm"), self._heads(key_BTX, "k_norm"), self._heads(value_BTX)

    def keys_and_values(self, x: Tensor, project=None) -> tuple[Tensor, Tensor]:
        """Input rows (..., D) of visual tokens -> their keys before rotation and their values, (..., K, H). `project` makes
        both of other rows."""
        if project is not None:
            key, value = project(x).chunk(2, dim=-1)
        elif hasattr(self, "qkv_proj"):
            _, key, value = self.qkv_proj(x).split(self.sizes, dim=-1)
        else:
            key, value = self.k_proj(x), self.v_proj(x)
        return self._heads(key, "k_norm"), self._heads(value)

    def _heads(self, x: Tensor, norm: str | None = None) -> Tensor:
        """(..., heads * H) -> (..., heads, H). Some families normalise all heads together ("width"), some each head."""
        if norm is not None and self.head_norm == "width":
            x = getattr(self, norm)(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        return getattr(self, norm)(x) if norm is not None and self.head_norm == "head" else x


class SaisaDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer of the language model; `visual_keys_and_values` is what SAISA adds to it."""

    def __init__(self, config: SaisaConfig, layer_idx: int):
        super().__init__()
        text = config.text_config
        family = language_model_family(text)
        self.attention_type = family.attention_types[layer_idx]
        self.sees_image = config.sees_image(layer_idx)
        self.norms, self.feed_forward_name = family.norms, family.feed_forward_name
        if self.norms.before_attention is not None:
            self.add_module(self.norms.before_attention, family.norm(text.hidden_size))
        self.self_attn = NaavitAttention(config, layer_idx)
        if self.sees_image and config.projector_sharing == "per_layer":
            self.visual_projector = SaisaVisualProjector(config)
        for name in filter(None, self.norms[1:]):
            self.add_module(name, family.norm(text.hidden_size))
        self.add_module(self.feed_forward_name, family.feed_forward(layer_idx))
        self.residual_multiplier = family.residual_multiplier
        self.folded = None  # see `SaisaModel.fold_projectors`

    def forward(self, text_BTD: Tensor, visual, layout: TokenLayout, **attention_arguments):
        """(B, T, D) hidden states and (B, N, T, L) attention probabilities or None. `visual` are features as in
        `visual_keys_and_values`, or what that returns, or None."""
        if isinstance(visual, tuple):
            visual = tuple(x_VKH.to(text_BTD.device) for x_VKH in visual)
        elif visual is not None:
            visual = self.visual_keys_and_values(visual, layout) if self.sees_image else None
        text_BTD, probabilities_BNTL = self.attended(text_BTD, visual, layout=layout, **attention_arguments)
        return self.fed(text_BTD), probabilities_BNTL

    def visual_keys_and_values(self, features: Tensor, layout: TokenLayout | None = None) -> tuple[Tensor, Tensor]:
        """Keys before rotation and values, (V, K, H) each, of features: (V, C) of the encoder, or (V, D) where layers share a
        projector. They depend on image and weights alone. `layout` is for adapters that differ between samples: their
        modules get (B, S, ...)."""

        def of(features):
            if self.folded is not None and (rows := self.folded.rows_for(self, features)) is not None:
                return self.self_attn.keys_and_values(rows, self.folded)
            visual = self.visual_projector(features) if hasattr(self, "visual_projector") else features
            normed = self._normed(self.norms.before_attention, visual.to(self._first_norm.weight.dtype))
            return self.self_attn.keys_and_values(normed)

        features = features.to(self.device)
        if layout is None or layout.visual_BS is None or not tells_samples_apart(self.visual_modules().values()):
            return in_pieces(of, features)
        return tuple(map(layout.visual, of(layout.in_input_order(features))))

    def attended(self, text_BTD: Tensor, visual, **attention_arguments):
        """Hidden states past self-attention, and its probabilities."""
        normed_BTD = self._normed(self.norms.before_attention, text_BTD)
        attended_BTD, probabilities_BNTL = self.self_attn(normed_BTD, visual, **attention_arguments)
        return self._added(text_BTD, self._normed(self.norms.after_attention, attended_BTD)), probabilities_BNTL

    def fed(self, x_BTD: Tensor) -> Tensor:
        """Hidden states past the feed-forward network."""
        fed_BTD = getattr(self, self.feed_forward_name)(self._normed(self.norms.before_feed_forward, x_BTD))
        return self._added(x_BTD, self._normed(self.norms.after_feed_forward, fed_BTD))

    def visual_modules(self) -> dict[str, nn.Module]:
        """The modules on whose weights `visual_keys_and_values` depends."""
        modules = {name: getattr(self, name, None) for name in ("visual_projector", self.norms.before_attention or "")}
        modules |= {name: getattr(self.self_attn, name, None) for name in ("k_proj", "v_proj", "qkv_proj", "k_norm")}
        return {name: module for name, module in modules.items() if module is not None}

    def queries_of(self, layout: TokenLayout, text_BTD: Tensor) -> tuple[TokenLayout, Tensor]:
        """The tokens that attend in this layer, whose mask `attention_masks` makes: those of text."""
        return layout, text_BTD

    @property
    def mask_kind(self) -> tuple:
        """Layers of one kind have the same attention mask."""
        return self.attention_type, self.sees_image

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return execution_device(self._first_norm)

    @property
    def _first_norm(self) -> nn.Module:
        return getattr(self, next(filter(None, self.norms)))

    def _normed(self, name: str | None, x: Tensor) -> Tensor:
        return x if name is None else getattr(self, name)(x)

    def _added(self, x: Tensor, y: Tensor) -> Tensor:
        return x + (y if self.residual_multiplier == 1 else y * self.residual_multiplier)


class SaisaPreTrainedModel(SaisaCheckpoint, ForeignNames, PreTrainedModel):
    """What every SAISA class shares: what transformers may do with it, and (`SaisaCheckpoint`) how it is loaded and saved."""

    config_class = SaisaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SaisaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def __init__(self, config, *args, **kwargs):
        if isinstance(config, SaisaConfig):
            config.check()  # again: fields may have been changed
        super().__init__(config, *args, **kwargs)


class SaisaLanguageModel(SaisaPreTrainedModel):
    """The decoder: an ordinary language model whose layers also read the features of the vision encoder."""

    layer_class = SaisaDecoderLayer

    def __init__(self, config: SaisaConfig):
        # over the text config alone, so that `attn_implementation={"text_config": ...}` reaches it
        super().__init__(config.text_config)
        self.family = language_model_family(self.config)
        choose_attention(self.config)
        self.embed_tokens = self.family.embedding()
        self.layers = nn.ModuleList(self.layer_class(config, index) for index in range(self.config.num_hidden_layers))
        self.norm = self.family.norm(self.config.hidden_size)
        self.rotary_emb = self.family.rotary_embedding()
        self.gradient_checkpointing = False
        self.post_init()
        self._tp_plan = readable_tp_plan(self.family.tensor_parallel_plan())

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        inputs_embeds=None,
        layout: TokenLayout | None = None,
        visual=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        output_attentions=False,
        output_hidden_states=False,
        cache_position=None,
        cache=None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """As `SaisaModel.forward`, with the visual positions in `layout` and, in `visual`, what `visual_keys_and_values` of a
        layer takes, or for each layer what it returns. `kwargs` go to the attention functions."""
        layout = TokenLayout(None) if layout is None else layout
        inputs = input_ids if inputs_embeds is None else inputs_embeds
        text_BTX = layout.text(inputs)
        text_BTD = self.family.scaled_input(self.embed_tokens(text_BTX) if inputs_embeds is None else text_BTX)
        cache, length = one_cache(past_key_values, cache), inputs.shape[1]
        use_cache, cache, slots = cache_of_pass(self, use_cache, cache, cache_position, length, text_BTD.device)
        masks = attention_masks(self, layout, text_BTD, slots, attention_mask, cache, position_ids)
        rotations = rotations_of(self, layout, text_BTD, slots[None] if position_ids is None else position_ids)
        if output_attentions and (name := self.config._attn_implementation) != "eager":
            warn_once(f"`output_attentions=True` needs attn_implementation='eager': {name!r} returns none.")
        wanted = {"hidden_states": output_hidden_states, "attentions": output_attentions}
        kwargs |= {"cache": cache, "slots": slots}
        last, before, attentions = self.through_layers(text_BTD, visual, layout, rotations, masks, wanted, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=last,
            hidden_states=(*before, last) if output_hidden_states else None,
            attentions=tuple(attentions) or None,
            **{CACHE: cache if use_cache else None},
        )

    def through_layers(self, text_BTD, visual, layout, rotations, masks, wanted: dict[str, bool], **kwargs):
        """The last hidden state (B, S, D), and where `wanted`, what enters each layer, and its attention probabilities."""
        hidden_states, attentions = [], []
        text_BTD = differentiable(text_BTD, self.layers[0])
        per_device = PerDevice(None if isinstance(visual, tuple) else visual, rotations, masks)
        for index, layer in enumerate(self.layers):
            if wanted["hidden_states"]:
                hidden_states.append(layout.align(text_BTD))
            features, rotations, masks = per_device.on(layer.device)
            text_BTD, probabilities_BNTL = layer(
                text_BTD,
                visual[index] if isinstance(visual, tuple) else features,
                layout=layout,
                rotation=rotations[layer.attention_type],
                attention_mask=masks[layer.mask_kind],
                **kwargs,
            )
            if wanted["attentions"] and probabilities_BNTL is not None:
                attentions.append(layout.align_queries(probabilities_BNTL))
        return layout.align(self.norm(text_BTD)), hidden_states, attentions


class EmbeddingSpaceLayer(VisualTokensAmongWords, SaisaDecoderLayer):
    """A decoder layer of a LLaVA: visual tokens pass it as well (see `embedding_space_saisa.py`)."""


class EmbeddingSpaceLanguageModel(ThroughEveryLayer, SaisaLanguageModel):
    """The decoder of a LLaVA."""

    layer_class = EmbeddingSpaceLayer
    _no_split_modules = ["EmbeddingSpaceLayer"]


class SaisaModel(EncodesTiles, UsesVisualStates, UnsharesProjectors, SaisaPreTrainedModel):
    """Vision encoder and language model of a `SaisaConfig`, without a head."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: SaisaConfig):
        super().__init__(config)
        self.vision_tower = build_vision_tower(config.vision_config)
        if config.projector_sharing == "shared":
            self.visual_projector = SaisaVisualProjector(config)
        if config.visual_token_reduction == "resampler":
            self.visual_resampler = SaisaVisualResampler(config)
        self.language_model = (EmbeddingSpaceLanguageModel if config.in_embedding_space else SaisaLanguageModel)(config)
        self.post_init()
        if config.projector_sharing == "shared":
            plan = {"visual_projector.linear_1": "colwise", "visual_projector.linear_2": "rowwise"}
            self._tp_plan |= readable_tp_plan(plan)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        image_sizes: Tensor | None = None,
        num_tiles: Tensor | None = None,
        frame_pooling: Tensor | None = None,
        visual_states: SaisaVisualStates | None = None,
        cache=None,
        **kwargs,
    ) -> SaisaModelOutputWithPast:
        """
        Args:
            input_ids: (B, S). `config.image_token_id` stands once for each visual token.
            pixel_values: (images, channels, height, width), in the order of their placeholders, row by row. None: all tokens
                are text; an empty batch is the same, but in training the projectors then get gradients of zero, so that
                processes that train together do not hang.
            attention_mask: (B, past + S), 0 at padding; or (B, 1, S, L), or a dict of such by attention type, as `generate`
                makes them.
            position_ids: (B, S), counted over text and visual tokens. None: they continue after the cached tokens.
            past_key_values, cache: any transformers `Cache`, under one of its two names; or a `SaisaBeginning`.
            inputs_embeds: (B, S, D) in place of `input_ids`; visual positions are where the image token's embedding is.
            use_cache, output_attentions, output_hidden_states: whether to return these. None: as the config says.
            pixel_attention_mask, spatial_shapes: (images, patches) and (images, 2), from SigLIP 2's image processor, with
                `pixel_values` (images, patches, patch size).
            image_sizes, num_tiles, frame_pooling: (images, 2), (images,) and (images,), of images that are read in tiles and
                of frames of videos (see `get_image_features`).
            visual_states: what `get_visual_states` made of the images, in place of `pixel_values` and in the same order.
            kwargs: handed on to the attention functions; those that the encoder's `forward` names, to the encoder too.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`; both `pixel_values` and `visual_states`; two
                caches; other numbers of placeholders than of visual tokens; `visual_states` of another model or dtype.
        """
        rows = inputs_embeds if input_ids is None else input_ids
        if (input_ids is None) == (inputs_embeds is None) or not len(rows):
            raise ValueError("Expected exactly one of input_ids and inputs_embeds, and at least one row of it.")
        self.check_features_asked_for(kwargs)
        sizes = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        sizes |= {"image_sizes": image_sizes, "num_tiles": num_tiles, "frame_pooling": frame_pooling}
        images = self.given_images(pixel_values, visual_states, sizes, kwargs)
        text = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        text |= {"attention_mask": attention_mask, "position_ids": position_ids}
        layout = self.layout_without_images(input_ids) if images is None else self.layout_of(images, **text)
        visual = None if images is None else self.read_by_layers(images, layout)
        asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        asked = {name: getattr(self.config, name) if value is None else value for name, value in asked.items()}
        asked |= {"cache": behind(one_cache(past_key_values, cache), self), "use_cache": use_cache}
        outputs = self.language_model(**text, layout=layout, visual=visual, return_dict=True, **asked, **kwargs)
        return SaisaModelOutputWithPast(**outputs, image_hidden_states=images and images.features)


class SaisaForConditionalGeneration(AnswersAboutImages, BuiltFromParts, SaisaPreTrainedModel, GenerationMixin):
    """The model of a `SaisaConfig` with the language model's head: it answers questions about images, and is trained to."""

    _tied_weights_keys = tied_weights("lm_head.weight", "model.language_model.embed_tokens.weight")

    def __init__(self, config: SaisaConfig):
        super().__init__(config)
        self.model = SaisaModel(config)
        self.lm_head = SaisaHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self._can_compile_fullgraph = self.language_model.family.compiles
        self.post_init()
        if not config.tie_word_embeddings:  # a tied head stays whole: the embedding looks up whole rows
            self._tp_plan |= readable_tp_plan({"lm_head": "colwise_gather_output"})

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Tensor | None = None,
        image_sizes: Tensor | None = None,
        num_tiles: Tensor | None = None,
        frame_pooling: Tensor | None = None,
        visual_states: SaisaVisualStates | None = None,
        skip_logits: bool = False,
        cache=None,
        **kwargs,
    ) -> SaisaCausalLMOutputWithPast:
        """
        Arguments as in `SaisaModel.forward`, and

        Args:
            labels: (B, S), -100 is ignored. A label counts only if it follows a text token: a visual token has no output to
                predict from, nor has padding in a batch with images. (In embedding space all count.) Placeholders should be
                -100: the text token in front of an image would learn to predict them, and `Trainer` would count them. Where
                no label counts, the loss and all gradients are zero, with `skip_logits` and without.
            logits_to_keep: 0 for the logits of all positions, n for the last n, or a 1-D tensor of positions.
            skip_logits: with `labels`, return the loss alone: logits of labelled rows are made some at a time, twice.
            kwargs: for the loss `num_items_in_batch`, `ignore_index` in place of -100, and `shift_labels` (B, S), each at the
                position that predicts it. Others go to `SaisaModel.forward` and to `loss_function`, which gets text rows
                alone: logits (B, T, vocabulary) and `shift_labels` (B, T).

        Raises:
            ValueError: see `SaisaModel.forward`; or `labels` are not as many as the input tokens.
        """
        loss_arguments = {name: kwargs.pop(name) for name in LOSS_ARGUMENTS if name in kwargs}
        text = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, "attention_mask": attention_mask}
        images = {"pixel_values": pixel_values, "visual_states": visual_states}
        asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        asked |= {"use_cache": use_cache, "cache": one_cache(past_key_values, cache), "position_ids": position_ids}
        sizes = {"pixel_attention_mask": pixel_attention_mask, "spatial_shapes": spatial_shapes}
        sizes |= {"image_sizes": image_sizes, "num_tiles": num_tiles, "frame_pooling": frame_pooling}
        outputs = self.model(**text, **images, **sizes, **asked, return_dict=True, **kwargs)

        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        has_images = any(x is not None and len(x) for x in images.values()) and not self.config.in_embedding_space
        layout = self.model.layout_of_outputs(kept, **text) if has_images else TokenLayout(None)
        hidden_BTD = layout.text(outputs.last_hidden_state[:, kept])
        ignored, shift_labels = loss_arguments.get("ignore_index", IGNORED), loss_arguments.pop("shift_labels", None)
        targets_BS = targets_of(labels, shift_labels, outputs.last_hidden_state.shape[:2], ignored)
        targets_BT = None if targets_BS is None else layout.targets(targets_BS[:, kept], ignored)
        logits_BTX, loss = self.logits_and_loss(hidden_BTD, targets_BT, skip_logits, labels, loss_arguments, kwargs)
        logits = None if logits_BTX is None else layout.align(logits_BTX)
        others = {name: outputs.get(name) for name in ("hidden_states", "attentions", "image_hidden_states", CACHE)}
        return SaisaCausalLMOutputWithPast(loss=loss, logits=logits, **others)
