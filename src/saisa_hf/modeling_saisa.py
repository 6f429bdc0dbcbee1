# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The SAISA model (Yuan et al., arXiv 2502.02458), top to bottom as the paper has it.

Each decoder layer of a language model has a projector of its own that maps the vision encoder's features into the input
space of that layer's self-attention. There they are keys and values only (NAAViT, No Attention Among Visual Tokens):
visual tokens are never queries, never pass a feed-forward network and never attend to each other.

Shape suffixes:
    B batch                                  D hidden size of the language model
    S sequence in input order, text and      N query heads
      visual placeholders                    K key/value heads
    P text tokens of the whole batch, packed H head size
    T text tokens of the longest sample      C width of the vision encoder's features
    V visual tokens of the whole batch       L keys in view: those in the cache and the new ones
An input without pictures is not packed: there, P stands for the two axes (B, S), and T is S.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from transformers import AutoModel
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, QuantizedCache
from transformers.generation import GenerationMixin, LogitsProcessorList, SuppressTokensLogitsProcessor
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import can_return_tuple, logging

from .compat_saisa import cached_key_range, causal_mask, decoding_masks, save_options, tied_weights, update_cache
from .configuration_saisa import SaisaConfig
from .hub_saisa import push_model_to_hub
from .language_models_saisa import language_model_family
from .model_card_saisa import write_model_card


if TYPE_CHECKING:  # transformers carries along the files that a checkpoint's module names, so that it saves whole again
    from .pictures_saisa import load_picture  # noqa: F401
    from .processing_saisa import SaisaProcessor  # noqa: F401

logger = logging.get_logger(__name__)

# A key that stands where a decoder layer does not see the picture. It marks its place in the cache as hidden, in any cache
# that gives back the keys it got. No text token has it: all of its components are the smallest normal float16.
HIDDEN_KEY = 2.0**-14

# The encoders whose parameters transformers keeps below `vision_model` up to 5.5 and no longer from 5.6 on. Here they are
# there on every release, so that a checkpoint has one layout; one that was saved without is read by this renaming.
NESTED_ENCODERS = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
VISION_MODEL_NAMES = {
    r"vision_tower\.(?=embeddings\.(?:class_embedding|patch_embedding\.|position_embedding\.)|encoder\.layers\."
    r"|pre_layrnorm\.|post_layernorm\.|head\.)": "vision_tower.vision_model."
}


@dataclass
class SaisaModelOutputWithPast(BaseModelOutputWithPast):
    """
    Output of `SaisaModel`. All of it is aligned with `input_ids`; rows at visual positions are zero.

    Attributes:
        last_hidden_state: (B, S, D), after the final norm.
        past_key_values: the cache, with keys and values of text and visual tokens in input order.
        hidden_states: tuple of (B, S, D), the input of each layer and the last hidden state.
        attentions: tuple of (B, N, S, L), each layer's attention probabilities.
        image_hidden_states: (V, C), the encoder's features of all visual tokens in input order.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class SaisaCausalLMOutputWithPast(ModelOutput):
    """
    Output of `SaisaForConditionalGeneration`; the fields are those of `SaisaModelOutputWithPast`, and

    Attributes:
        loss: scalar, float32. Next-token cross-entropy over the labels whose predecessor is a text token.
        logits: (B, S, vocabulary), or the rows that `logits_to_keep` asks for. Zero at visual positions.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: object | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


class TokenLayout:
    """Which positions of an input are text and which are visual, and every move between the two.

    Made once per forward pass; nothing else in the model indexes. Text tokens are packed: the P text tokens of all
    samples stand in one row after the other, so that samples with unlike numbers of pictures waste nothing.

    Args:
        visual_BS: bool, True at visual positions. None: the input has no visual token, and nothing is moved.
    """

    def __init__(self, visual_BS: torch.Tensor | None):
        self.visual_BS = visual_BS
        if visual_BS is None:
            return
        text_BS = ~visual_BS
        self.batch_size, self.length = visual_BS.shape
        device = visual_BS.device
        lengths_B = text_BS.sum(1)
        self.longest = int(lengths_B.max())
        text_rank_BS = text_BS.cumsum(1) - 1
        first_row_B = lengths_B.cumsum(0) - lengths_B
        packed_BS = first_row_B[:, None] + text_rank_BS
        # where position (b, s) finds its row in [text rows, visual rows], and in [text rows, one row of zeros]
        rows = int(lengths_B.sum())
        visual_rank_BS = visual_BS.flatten().cumsum(0).view_as(visual_BS) - 1
        self._key_source = torch.where(visual_BS, rows + visual_rank_BS, packed_BS).flatten()
        self._aligned_source = torch.where(visual_BS, rows, packed_BS).flatten()
        self._text_positions = text_BS.flatten().nonzero().squeeze(1)
        # where query (b, t) finds its packed row; samples with fewer text tokens are filled up with row 0
        rank_T = torch.arange(self.longest, device=device)
        real_BT = rank_T < lengths_B[:, None]
        self.evenly_long = bool(real_BT.all())
        self._query_source = torch.where(real_BT, first_row_B[:, None] + rank_T, 0).flatten()
        self._packed_queries = real_BT.flatten().nonzero().squeeze(1)
        # position of query (b, t) in its sample
        position_P = self._text_positions % self.length
        self.query_position_BT = position_P[self._query_source].view(self.batch_size, self.longest)

    def text(self, x_BS: torch.Tensor) -> torch.Tensor:
        """(B, S, ...) -> (P, ...): the rows of the text positions."""
        if self.visual_BS is None:
            return x_BS
        return x_BS.flatten(0, 1).index_select(0, self._text_positions.to(x_BS.device))

    def queries(self, x_PX: torch.Tensor) -> torch.Tensor:
        """(P, X) -> (B, T, X): text rows by sample."""
        if self.visual_BS is None:
            return x_PX
        if not self.evenly_long:
            x_PX = x_PX.index_select(0, self._query_source.to(x_PX.device))
        return x_PX.view(self.batch_size, self.longest, x_PX.shape[-1])

    def pack(self, x_BTX: torch.Tensor) -> torch.Tensor:
        """(B, T, X) -> (P, X): the inverse of `queries`."""
        if self.visual_BS is None:
            return x_BTX
        x_RX = x_BTX.flatten(0, 1)
        return x_RX if self.evenly_long else x_RX.index_select(0, self._packed_queries.to(x_RX.device))

    def keys(self, text_PX: torch.Tensor, visual_VX: torch.Tensor | None) -> torch.Tensor:
        """(P, X) and (V, X) -> (B, S, X): text and visual rows in input order. `visual_VX=None` leaves zeros."""
        if self.visual_BS is None:
            return text_PX
        if visual_VX is None:
            return self.align(text_PX)
        rows = torch.cat([text_PX, visual_VX])
        return rows.index_select(0, self._key_source.to(rows.device)).view(self.batch_size, self.length, -1)

    def align(self, x_PX: torch.Tensor) -> torch.Tensor:
        """(P, X) -> (B, S, X): text rows at their positions, zeros at visual positions."""
        if self.visual_BS is None:
            return x_PX
        rows = torch.cat([x_PX, x_PX.new_zeros(1, x_PX.shape[-1])])
        return rows.index_select(0, self._aligned_source.to(rows.device)).view(self.batch_size, self.length, -1)

    def query_rows(self, x_BNSX: torch.Tensor) -> torch.Tensor:
        """(B or 1, N, S, X) -> (B, N, T, X): the rows of the queries' positions."""
        if self.visual_BS is None:
            return x_BNSX
        index_B1T1 = self.query_position_BT[:, None, :, None].to(x_BNSX.device)
        return torch.take_along_dim(x_BNSX, index_B1T1, dim=2)

    def align_queries(self, x_BNTL: torch.Tensor) -> torch.Tensor:
        """(B, N, T, L) -> (B, N, S, L): attention rows at their queries' positions, zeros at visual positions."""
        if self.visual_BS is None:
            return x_BNTL
        batch_size, heads, _, keys = x_BNTL.shape
        rows_PX = self.pack(x_BNTL.transpose(1, 2).flatten(2))
        return self.align(rows_PX).view(batch_size, self.length, heads, keys).transpose(1, 2)


class SaisaVisualProjector(nn.Module):
    """Two-layer MLP from the encoder's features into the input space of self-attention (paper, section 3.2)."""

    def __init__(self, config: SaisaConfig):
        super().__init__()
        hidden_size = config.text_config.hidden_size
        inner_size = config.projector_hidden_size or hidden_size
        self.linear_1 = nn.Linear(config.vision_feature_size, inner_size, bias=config.projector_bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(inner_size, hidden_size, bias=config.projector_bias)

    def forward(self, features_VC: torch.Tensor) -> torch.Tensor:
        """(V, C) -> (V, D), in the projector's own dtype where that is a floating one (quantized weights take any)."""
        dtype = self.linear_1.weight.dtype
        features_VC = features_VC.to(dtype) if dtype.is_floating_point else features_VC
        return self.linear_2(self.act(self.linear_1(features_VC)))


class Rotation(NamedTuple):
    """Cosines and sines of the rotary embedding, each (B or 1, T, H) for the queries and (B or 1, S, H) for the keys."""

    queries: tuple[torch.Tensor, torch.Tensor]
    keys: tuple[torch.Tensor, torch.Tensor]


class NaavitAttention(nn.Module):
    """Self-attention in which visual tokens are keys and values only (NAAViT; paper, section 3.1)."""

    def __init__(self, config: SaisaConfig, layer_idx: int):
        super().__init__()
        text = config.text_config
        family = language_model_family(text)
        self.config = text  # `set_attn_implementation` writes into it
        self.layer_idx = layer_idx
        self.sees_image = config.sees_image(layer_idx)
        self.head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.num_key_value_groups = text.num_attention_heads // text.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = text.attention_dropout
        self.is_causal = True
        self.rotate_half = family.rotate_half
        self.eager_attention = family.eager_attention

        query_size = text.num_attention_heads * self.head_dim
        key_size = text.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(text.hidden_size, query_size, bias=family.qkv_bias)
        self.k_proj = nn.Linear(text.hidden_size, key_size, bias=family.qkv_bias)
        self.v_proj = nn.Linear(text.hidden_size, key_size, bias=family.qkv_bias)
        self.o_proj = nn.Linear(query_size, text.hidden_size, bias=family.output_bias)
        if family.qk_norm:
            self.q_norm = family.norm(self.head_dim, eps=text.rms_norm_eps)
            self.k_norm = family.norm(self.head_dim, eps=text.rms_norm_eps)

    def forward(
        self,
        text_PD: torch.Tensor,
        visual_VD: torch.Tensor | None,
        layout: TokenLayout,
        rotation: Rotation,
        attention_mask: torch.Tensor | None,
        past_key_values,
        slots: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            text_PD: normalised hidden states of the text tokens.
            visual_VD: normalised, projected features of the visual tokens; None if this layer gets none.
            attention_mask: (B, 1, T, L), boolean (True is visible) or additive; None is plain causal attention.
            slots: (S,) places of the new tokens in the cache.

        Returns:
            (P, D) outputs of the text tokens, and (B, N, T, L) probabilities where the implementation has them.
        """
        key_PX, value_PX = self.k_proj(text_PD), self.v_proj(text_PD)
        key_VX = value_VX = None
        if visual_VD is not None:
            key_VX, value_VX = self.k_proj(visual_VD), self.v_proj(visual_VD)

        query_BNTH = self._heads(layout.queries(self.q_proj(text_PD)), "q_norm")
        key_BKSH = self._heads(layout.keys(key_PX, key_VX), "k_norm")
        value_BKSH = self._heads(layout.keys(value_PX, value_VX))
        query_BNTH = self._rotate(query_BNTH, *rotation.queries)
        key_BKSH = self._rotate(key_BKSH, *rotation.keys)
        if not self.sees_image and layout.visual_BS is not None:
            hidden_B1S1 = layout.visual_BS[:, None, :, None].to(key_BKSH.device)
            key_BKSH = key_BKSH.masked_fill(hidden_B1S1, HIDDEN_KEY)

        has_past = past_key_values is not None
        if has_past:
            key_BKSH, value_BKSH = update_cache(past_key_values, key_BKSH, value_BKSH, self.layer_idx, slots)
        if not self.sees_image and (has_past or layout.visual_BS is not None):
            attention_mask = hide_marked_keys(attention_mask, key_BKSH, query_BNTH)

        attention = self.eager_attention
        # a chunk of visual tokens alone has no query, which fused kernels do not expect
        if self.config._attn_implementation != "eager" and query_BNTH.shape[2] > 0:
            attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        output_BTNH, probabilities_BNTL = attention(
            self,
            query_BNTH,
            key_BKSH,
            value_BKSH,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
        )
        output_BTX = output_BTNH.flatten(2).contiguous()
        return self.o_proj(layout.pack(output_BTX)), probabilities_BNTL

    def _heads(self, x_BSX: torch.Tensor, norm: str | None = None) -> torch.Tensor:
        x_BSNH = x_BSX.view(*x_BSX.shape[:2], x_BSX.shape[-1] // self.head_dim, self.head_dim)
        if norm is not None and hasattr(self, norm):
            x_BSNH = getattr(self, norm)(x_BSNH)
        return x_BSNH.transpose(1, 2)

    def _rotate(self, x_BNSH: torch.Tensor, cos_BSH: torch.Tensor, sin_BSH: torch.Tensor) -> torch.Tensor:
        return x_BNSH * cos_BSH[:, None] + self.rotate_half(x_BNSH) * sin_BSH[:, None]


def naavit_mask(layout, slots, key_range, window, attention_mask, document_BS):
    """Which keys each text query sees: those of its own position and earlier ones, text and visual alike.

    Args:
        slots: (S,) places of the new tokens in the cache.
        key_range: (length, offset) of the keys in the cache.
        window: sliding window in positions, or None.
        attention_mask: (B, past + S), 0 at padding, or None.
        document_BS: which of several packed samples a position belongs to, or None.

    Returns:
        bool (B, 1, T, L), True is visible. Every query sees itself, so that no row is empty.
    """
    length, offset = key_range
    query_BT1 = slots[layout.query_position_BT][:, :, None]
    key_L = torch.arange(length, device=slots.device) + offset
    visible_BTL = key_L <= query_BT1
    if window is not None:
        visible_BTL = visible_BTL & (key_L > query_BT1 - window)
    if attention_mask is not None:
        # a static cache has more places than the mask knows of
        real_BL = nn.functional.pad(
            attention_mask.to(slots.device, torch.bool), (0, max(0, offset + length - attention_mask.shape[1]))
        )
        visible_BTL = visible_BTL & real_BL[:, None, offset : offset + length]
    if document_BS is not None:
        document_BT = document_BS.gather(1, layout.query_position_BT)
        visible_BTL = visible_BTL & (document_BT[:, :, None] == document_BS[:, None, :])
    return (visible_BTL | (key_L == query_BT1))[:, None]


def hide_marked_keys(attention_mask, key_BKLH, query_BNTH):
    """`attention_mask` without the keys that are marked as visual tokens which the layer does not see."""
    if attention_mask is None and query_BNTH.shape[2] > 1:
        return None  # plain causal attention over text alone: nothing is in the cache yet
    marked_B11L = (key_BKLH[:, 0] == HIDDEN_KEY).all(-1)[:, None, None, :]
    if attention_mask is None:
        return ~marked_B11L
    attention_mask = attention_mask[..., : marked_B11L.shape[-1]]
    if attention_mask.dtype == torch.bool:
        return attention_mask & ~marked_B11L
    return attention_mask.masked_fill(marked_B11L, torch.finfo(attention_mask.dtype).min)


class SaisaDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer of the language model, with a visual projector in front of its self-attention."""

    def __init__(self, config: SaisaConfig, layer_idx: int):
        super().__init__()
        text = config.text_config
        family = language_model_family(text)
        self.attention_type = family.attention_types[layer_idx]
        self.sees_image = config.sees_image(layer_idx)
        self.input_layernorm = family.norm(text.hidden_size, eps=text.rms_norm_eps)
        self.self_attn = NaavitAttention(config, layer_idx)
        if self.sees_image and config.projector_sharing == "per_layer":
            self.visual_projector = SaisaVisualProjector(config)
        self.post_attention_layernorm = family.norm(text.hidden_size, eps=text.rms_norm_eps)
        self.mlp = family.feed_forward(text)

    def forward(
        self, text_PD: torch.Tensor, features: torch.Tensor | None, **attention_arguments
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            text_PD: hidden states of the text tokens.
            features: (V, C) of the encoder, or (V, D) already projected where all layers share the projector.

        Returns:
            (P, D) hidden states and (B, N, T, L) attention probabilities or None.
        """
        visual_VD = None
        if features is not None and self.sees_image:
            features = features.to(text_PD.device)
            visual_VD = self.visual_projector(features) if hasattr(self, "visual_projector") else features
            visual_VD = self.input_layernorm(visual_VD.to(text_PD.dtype))
        attended_PD, probabilities_BNTL = self.self_attn(
            self.input_layernorm(text_PD), visual_VD, **attention_arguments
        )
        text_PD = text_PD + attended_PD
        text_PD = text_PD + self.mlp(self.post_attention_layernorm(text_PD))
        return text_PD, probabilities_BNTL


class SaisaPreTrainedModel(PreTrainedModel):
    """What every SAISA class shares: what transformers may do with it, and how it is saved and loaded."""

    config_class = SaisaConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["SaisaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    def save_pretrained(self, save_directory, *args, push_to_hub=False, **kwargs):
        """transformers' own. The config brings the code files, so that `trust_remote_code=True` loads the folder anywhere.

        Tensors have the names that they have in the model, which are the same on every transformers release.
        """
        names = ("repo_id", "commit_message", "commit_description", "private", "create_pr", "revision", "tags")
        hub_arguments = {name: kwargs.pop(name) for name in names if name in kwargs}
        super().save_pretrained(save_directory, *args, **{**kwargs, **save_options()})
        if push_to_hub and (args[0] if args else kwargs.get("is_main_process", True)):
            shared = {name: kwargs[name] for name in ("token", "max_shard_size", "variant") if name in kwargs}
            self.push_to_hub(**{"repo_id": Path(save_directory).resolve().name, **hub_arguments, **shared})

    def push_to_hub(self, repo_id, **kwargs):
        """Uploads weights, config, code files and a model card; arguments as in `PreTrainedModel.push_to_hub`."""
        return push_model_to_hub(self, write_model_card, repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """transformers' own, which does not leave single tensors of the base model at their random initial values.

        Raises:
            ValueError: tensors of the encoder, the projectors, the language model or the head are not in the checkpoint.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        kwargs["key_mapping"] = {**VISION_MODEL_NAMES, **(kwargs.get("key_mapping") or {})}
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        if pretrained_model_name_or_path is not None:
            parts = ["vision_tower.", "visual_projector.", "language_model."]
            if model.config.architectures != ["SaisaModel"]:  # which has no head to lack
                parts.append("lm_head.")
            wanted = {key for key in model.state_dict() if any(part in key for part in parts)}
            missing = sorted(wanted & set(info["missing_keys"]))
            # transformers' own tests write a checkpoint without any weights as a file with one foreign tensor
            without_weights = set(missing) == wanted and len(info["unexpected_keys"]) <= 1
            if missing and not without_weights:
                raise ValueError(
                    f"{pretrained_model_name_or_path}: the checkpoint lacks {len(missing)} tensors of the model: "
                    f"{', '.join(missing[:20])}{', ...' if len(missing) > 20 else ''}. They would be left at random values. "
                    f"Save the whole model again, or convert the checkpoint with its vision tower (`saisa convert`)."
                )
        return (model, info) if wants_info else model

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        """transformers' own; a convolutional encoder, which has no attention, is left out of what is meant for all."""
        vision = getattr(self.config, "vision_config", None)
        if isinstance(attn_implementation, str) and getattr(vision, "model_type", None) == "convnext":
            attn_implementation = {"": attn_implementation, "text_config": attn_implementation}
        return super().set_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would look for its own names in this file's text

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # the weights are initialised by transformers' own rules, which it does not trust foreign code to follow

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Nothing to do: the config's `auto_map` is complete as it stands."""


class SaisaLanguageModel(SaisaPreTrainedModel):
    """The decoder: an ordinary language model whose layers also read the features of the vision encoder."""

    def __init__(self, config: SaisaConfig):
        # over the text config, so that `attn_implementation={"text_config": ...}` reaches it
        super().__init__(config.text_config)
        text = config.text_config
        family = language_model_family(text)
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size, getattr(text, "pad_token_id", None))
        self.layers = nn.ModuleList(SaisaDecoderLayer(config, index) for index in range(text.num_hidden_layers))
        self.norm = family.norm(text.hidden_size, eps=text.rms_norm_eps)
        self.rotary_emb = family.rotary_embedding(text)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids=None,
        inputs_embeds=None,
        layout: TokenLayout | None = None,
        features: torch.Tensor | None = None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        use_cache=None,
        output_attentions=False,
        output_hidden_states=False,
        cache_position=None,
    ) -> BaseModelOutputWithPast:
        """As `SaisaModel.forward`, with the visual positions in `layout` and the visual tokens' `features` (V, C or D)."""
        layout = TokenLayout(None) if layout is None else layout
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and self.gradient_checkpointing and self.training:
            logger.warning_once("`use_cache=True` is incompatible with gradient checkpointing: set to False.")
            use_cache = False
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if isinstance(past_key_values, QuantizedCache) and not all(layer.sees_image for layer in self.layers):
            raise ValueError(
                "visual_layers leaves out some layers, which need to find their hidden keys in the cache as they put them "
                "there: a quantized cache changes them. Use a dynamic or static cache."
            )

        batch_size, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        if inputs_embeds is None:
            text_PD = self.embed_tokens(layout.text(input_ids))
        else:
            text_PD = layout.text(inputs_embeds)
        slots = cache_position
        if slots is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            slots = torch.arange(length, device=text_PD.device) + past
        documents = None
        if position_ids is None:
            position_ids = slots[None]
        elif attention_mask is None and past_key_values is None:
            starts = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1
            documents = starts.cumsum(-1).expand(batch_size, -1)
        masks = self._attention_masks(layout, text_PD, slots, attention_mask, past_key_values, position_ids, documents)
        rotation = self._rotation(layout, text_PD, position_ids)

        if output_attentions and self.config._attn_implementation != "eager":
            logger.warning_once(
                f"`output_attentions=True` returns none with attn_implementation={self.config._attn_implementation!r}: load "
                "the model with attn_implementation='eager'."
            )
        hidden_states, attentions = [], []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(layout.align(text_PD))
            text_PD, probabilities_BNTL = layer(
                text_PD,
                features,
                layout=layout,
                rotation=rotation,
                attention_mask=masks[layer.attention_type],
                past_key_values=past_key_values,
                slots=slots,
            )
            if output_attentions and probabilities_BNTL is not None:
                attentions.append(layout.align_queries(probabilities_BNTL))
        last_hidden_state = layout.align(self.norm(text_PD))

        return BaseModelOutputWithPast(
            last_hidden_state=last_hidden_state,
            past_key_values=past_key_values if use_cache else None,
            hidden_states=(*hidden_states, last_hidden_state) if output_hidden_states else None,
            attentions=tuple(attentions) or None,
        )

    def _attention_masks(self, layout, text_PD, slots, attention_mask, past_key_values, position_ids, documents):
        """One mask for each attention type of the language model, in the form its implementation takes."""
        types = dict.fromkeys(layer.attention_type for layer in self.layers)
        given_by_type = attention_mask if isinstance(attention_mask, dict) else dict.fromkeys(types, attention_mask)
        if layout.visual_BS is None:
            if attention_mask is given_by_type:
                return {kind: attention_mask.get(kind) for kind in types}
            common = (self.config, text_PD, attention_mask, slots, past_key_values, position_ids)
            return {kind: causal_mask(kind, *common) for kind in types}
        masks = {}
        for kind in types:
            given = given_by_type.get(kind)
            if given is not None and given.ndim == 4:
                masks[kind] = layout.query_rows(given)
                continue
            first_of_kind = next(index for index, layer in enumerate(self.layers) if layer.attention_type == kind)
            masks[kind] = naavit_mask(
                layout,
                slots,
                key_range=cached_key_range(past_key_values, first_of_kind, slots),
                window=self.config.sliding_window if kind == "sliding_attention" else None,
                attention_mask=given,
                document_BS=documents,
            )
            if self.config._attn_implementation == "eager":
                masks[kind] = torch.zeros_like(masks[kind], dtype=text_PD.dtype).masked_fill(
                    ~masks[kind], torch.finfo(text_PD.dtype).min
                )
        return masks

    def _rotation(self, layout, text_PD, position_ids) -> Rotation:
        keys = self.rotary_emb(text_PD, position_ids)
        if layout.visual_BS is None:
            return Rotation(queries=keys, keys=keys)
        return Rotation(queries=tuple(layout.query_rows(x_BSH[:, None]).squeeze(1) for x_BSH in keys), keys=keys)


class NestedEncoder(nn.Module):
    """An encoder one level down, under the name `vision_model` (see `NESTED_ENCODERS`), which it looks like from outside."""

    def __init__(self, vision_model: PreTrainedModel):
        super().__init__()
        self.vision_model = vision_model

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") and not name.startswith("_supports"):
                raise  # transformers keeps its own records on a module, of this one too
            return getattr(super().__getattr__("vision_model"), name)

    def forward(self, *args, **kwargs):
        return self.vision_model(*args, **kwargs)


def build_vision_tower(config) -> nn.Module:
    """The encoder for `config`, with the parameter names of transformers up to 5.5."""
    # a convolutional encoder has no attention to choose: transformers refuses any choice but this
    choice = {"attn_implementation": "eager"} if config.model_type == "convnext" else {}
    encoder = AutoModel.from_config(config, **choice)
    if config.model_type in NESTED_ENCODERS and not hasattr(encoder, "vision_model"):
        encoder = NestedEncoder(encoder)
    return encoder


class SaisaModel(SaisaPreTrainedModel):
    """Vision encoder and language model, without a head.

    Args:
        config: a `SaisaConfig`.
    """

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: SaisaConfig):
        super().__init__(config)
        self.vision_tower = build_vision_tower(config.vision_config)
        if config.projector_sharing == "shared":
            self.visual_projector = SaisaVisualProjector(config)
        self.language_model = SaisaLanguageModel(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.embed_tokens = value

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        The encoder's features of a batch of pictures, before any projector.

        Args:
            pixel_values: (pictures, channels, height, width), any floating dtype.
            kwargs: handed on to the encoder.

        Returns:
            the encoder's output, whose `pooler_output` is (pictures, visual tokens per picture, C): the states of
            `vision_feature_layer`, without class token where `vision_feature_select_strategy` is `"default"`,
            feature maps flattened row by row. A list of (visual tokens, C) where pictures differ in size (SigLIP 2).
        """
        encoder_config = self.config.vision_config
        axes = (3, 4) if encoder_config.model_type == "siglip2_vision_model" else (4,)
        if not isinstance(pixel_values, torch.Tensor) or pixel_values.ndim not in axes:
            seen = tuple(pixel_values.shape) if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
            raise ValueError(f"pixel_values is {seen}: expected a tensor (pictures, channels, height, width).")
        kwargs["output_hidden_states"] = True
        grids = None
        if encoder_config.model_type == "siglip2_vision_model":
            if pixel_values.ndim == 4:
                pixel_values, kwargs = _patchify(pixel_values, encoder_config.patch_size, kwargs)
            grids = kwargs["spatial_shapes"]
        dtype = next(self.vision_tower.parameters()).dtype
        outputs = self.vision_tower(pixel_values.to(dtype), return_dict=True, **kwargs)
        states = [outputs.hidden_states[layer] for layer in self.config.vision_feature_layers]
        states = [state.flatten(2).transpose(1, 2) if state.ndim == 4 else state for state in states]
        features = torch.cat([state[:, self.config.dropped_vision_tokens :] for state in states], dim=-1)
        if grids is not None:
            features = [picture[: int(h) * int(w)] for picture, (h, w) in zip(features, grids)]
            if len({len(picture) for picture in features}) == 1:
                features = torch.stack(features)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=features,
            hidden_states=outputs.hidden_states,
            attentions=outputs.get("attentions"),  # a convolutional encoder has none
        )

    def get_placeholder_mask(self, input_ids=None, inputs_embeds=None) -> torch.Tensor:
        """bool (B, S), True where the row of `inputs_embeds` is the image token's, or where `input_ids` is, without them."""
        if inputs_embeds is None:
            return input_ids == self.config.image_token_id
        image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token).to(inputs_embeds.dtype)).all(-1)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        **kwargs,
    ) -> SaisaModelOutputWithPast:
        """
        Args:
            input_ids: (B, S). `config.image_token_id` stands once for each visual token.
            pixel_values: (pictures, channels, height, width), the pictures in the order of their placeholders, row by
                row. None: all tokens are text.
            attention_mask: (B, past + S), 1 for tokens and 0 for padding; or a prepared (B, 1, S, L) mask, or a dict
                of such masks by attention type, as `generate` makes them.
            position_ids: (B, S), counted over text and visual tokens. None counts from the first cached token.
            past_key_values: any transformers `Cache`.
            inputs_embeds: (B, S, D) in place of `input_ids`; visual positions are where the image token's embedding is.
            use_cache: whether to return the cache. None: as the language model's config says.
            output_attentions, output_hidden_states: whether to return these. None: as the config says.
            pixel_attention_mask, spatial_shapes: (pictures, patches) and (pictures, 2), what SigLIP 2's image processor
                makes beside `pixel_values` (pictures, patches, patch size) for pictures of unlike shapes.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`; numbers of placeholders and visual tokens
                that differ.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected exactly one of input_ids and inputs_embeds.")
        cache_position = kwargs.pop("cache_position", None)
        encoder_arguments = _given(pixel_attention_mask=pixel_attention_mask, spatial_shapes=spatial_shapes)

        layout, features = TokenLayout(None), None
        if pixel_values is not None and len(pixel_values) == 0:
            self.check_visual_tokens(0, 0, int(self.get_placeholder_mask(input_ids, inputs_embeds).sum()))
        elif pixel_values is not None:
            pictures = self.get_image_features(pixel_values, return_dict=True, **encoder_arguments).pooler_output
            features = torch.cat(list(pictures))
            visual_BS = self.get_placeholder_mask(input_ids, inputs_embeds)
            self.check_visual_tokens(len(features), len(pictures), int(visual_BS.sum()))
            layout = TokenLayout(visual_BS)
        elif input_ids is not None and input_ids.shape[1] > 1 and not torch.compiler.is_compiling():
            self._warn_if_pictures_are_missing(input_ids)

        projected = features
        if features is not None:
            dtype = self.get_input_embeddings().weight.dtype
            projected = features.to(dtype)
            if self.config.projector_sharing == "shared":
                projected = self.visual_projector(projected)
        outputs = self.language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            layout=layout,
            features=projected,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
            output_attentions=self.config.output_attentions if output_attentions is None else output_attentions,
            output_hidden_states=(
                self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
            cache_position=cache_position,
        )
        return SaisaModelOutputWithPast(**outputs, image_hidden_states=features)

    def check_visual_tokens(self, features: int, pictures: int, placeholders: int):
        """Raises ValueError if `pictures` pictures with `features` visual tokens in all do not fill `placeholders`."""
        if features != placeholders:
            raise ValueError(
                f"pixel_values holds {pictures} pictures with {features} visual tokens in all, but the input has "
                f"{placeholders} placeholders (image_token_id={self.config.image_token_id}). Expected as many placeholders "
                f"as visual tokens: let the processor expand the prompt, and pass each picture once."
            )

    def _warn_if_pictures_are_missing(self, input_ids):
        placeholders = int((input_ids == self.config.image_token_id).sum())
        if placeholders >= max(self.config.image_seq_length, 2):
            logger.warning_once(
                f"input_ids has {placeholders} placeholders (image_token_id={self.config.image_token_id}), but pixel_values "
                f"is None: they are read as text. Pass the pictures, or a prompt without them."
            )


def _patchify(pixel_values, patch_size: int, kwargs: dict):
    """Pictures (n, channels, height, width) as SigLIP 2 takes them: (n, patches, patch * patch * channels)."""
    n, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    patches = pixel_values[:, :, : rows * patch_size, : columns * patch_size]
    patches = patches.reshape(n, channels, rows, patch_size, columns, patch_size).permute(0, 2, 4, 3, 5, 1)
    patches = patches.reshape(n, rows * columns, patch_size * patch_size * channels)
    shapes = torch.tensor([[rows, columns]] * n, device=pixel_values.device)
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=pixel_values.device)
    return patches, {**kwargs, "pixel_attention_mask": mask, "spatial_shapes": shapes}


class SaisaForConditionalGeneration(SaisaPreTrainedModel, GenerationMixin):
    """`SaisaModel` with the language model's head: answers questions about pictures, and trains to.

    Args:
        config: a `SaisaConfig`.
    """

    _tied_weights_keys = tied_weights("lm_head.weight", "model.language_model.embed_tokens.weight")

    def __init__(self, config: SaisaConfig):
        super().__init__(config)
        self.model = SaisaModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value):
        self.model.set_input_embeddings(value)

    @property
    def vision_tower(self):
        return self.model.vision_tower

    @property
    def language_model(self):
        return self.model.language_model

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """See `SaisaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        pixel_attention_mask: torch.Tensor | None = None,
        spatial_shapes: torch.Tensor | None = None,
        **kwargs,
    ) -> SaisaCausalLMOutputWithPast:
        """
        Arguments as in `SaisaModel.forward`, and

        Args:
            labels: (B, S), -100 is ignored. A label counts only if the position before it is a text position: a visual
                token has no output to predict from. Placeholders should be -100: `Trainer` divides by the number of
                labels that are not, and the text token in front of a picture would learn to predict them.
            logits_to_keep: 0 for the logits of all positions, n for the last n, or a 1-D tensor of positions.
            kwargs: `num_items_in_batch` and what else the loss function takes.

        Raises:
            ValueError: see `SaisaModel.forward`.
        """
        loss_arguments = {name: kwargs.pop(name) for name in ("num_items_in_batch", "shift_labels") if name in kwargs}
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        visual_BS = None
        if pixel_values is not None:
            visual_BS = self.model.get_placeholder_mask(input_ids, inputs_embeds)[:, kept]
        layout = TokenLayout(visual_BS)
        logits_PX = self.lm_head(layout.text(outputs.last_hidden_state[:, kept]))

        loss = None
        if labels is not None:
            targets_BS = loss_arguments.pop("shift_labels", None)
            if targets_BS is None:
                targets_BS = nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
            loss_arguments["shift_labels"] = layout.text(targets_BS[:, kept]).contiguous()
            loss = self.loss_function(
                logits=logits_PX, labels=labels, vocab_size=self.config.text_config.vocab_size, **loss_arguments
            )
        return SaisaCausalLMOutputWithPast(
            loss=loss,
            logits=layout.align(logits_PX),
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
        )

    create_masks_for_generate = staticmethod(decoding_masks)

    def generate(self, inputs=None, generation_config=None, logits_processor=None, *args, **kwargs):
        """transformers' own. About pictures it never answers with the image token, which stands for visual tokens alone."""
        if kwargs.get("pixel_values") is not None:
            never = SuppressTokensLogitsProcessor([self.config.image_token_id], device=self.device)
            logits_processor = LogitsProcessorList([*(logits_processor or []), never])
        return super().generate(inputs, generation_config, logits_processor, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        past_key_values=None,
        attention_mask=None,
        inputs_embeds=None,
        pixel_values=None,
        pixel_attention_mask=None,
        spatial_shapes=None,
        **kwargs,
    ):
        """transformers' own, and the pictures whose placeholders are among the tokens that are not in the cache yet.

        Raises:
            ValueError: the last token of a prompt is visual, so that nothing can be predicted from it.
        """
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        if pixel_values is None:
            return model_inputs
        new_ids, new_embeds = model_inputs.get("input_ids"), model_inputs.get("inputs_embeds")
        length = (new_ids if new_embeds is None else new_embeds).shape[1]
        if length == 1 and past_key_values is not None and input_ids.shape[1] > 1:
            return model_inputs  # a decoding step
        visual_BS = self.model.get_placeholder_mask(new_ids, new_embeds)
        if not visual_BS.any():
            return model_inputs
        real_BS = torch.ones_like(visual_BS)
        if attention_mask is not None and attention_mask.ndim == 2:
            real_BS = attention_mask[:, -length:].bool()
        last_B1 = (real_BS * torch.arange(1, length + 1, device=real_BS.device)).argmax(1, keepdim=True)
        if visual_BS.gather(1, last_B1).any():
            raise ValueError(
                "The last token of a prompt is a visual token, and visual tokens predict nothing. Put a text token, a "
                "newline for instance, behind the image."
            )
        pictures = _given(
            pixel_values=pixel_values, pixel_attention_mask=pixel_attention_mask, spatial_shapes=spatial_shapes
        )
        new_B = visual_BS.sum(1).tolist()
        seen_B = new_B if new_embeds is not None else self.model.get_placeholder_mask(input_ids).sum(1).tolist()
        tokens = self._visual_tokens(pictures, sum(new_B), sum(seen_B))
        if sum(tokens) == sum(seen_B) != sum(new_B):  # the pictures of the whole conversation, of which some are cached
            wanted = []
            for row, new in zip(_pictures_by_row(seen_B, tokens), new_B):
                first = len(row)
                while new > 0 and first > 0:
                    first -= 1
                    new -= tokens[row[first]]
                wanted.extend(row[first:])
            pictures = {name: value[wanted] for name, value in pictures.items()}
        return {**model_inputs, **pictures}

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """transformers' own, but each row's pictures stay together: rows may have different numbers of them."""
        names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
        pictures = _given(**{name: model_kwargs.pop(name, None) for name in names})
        if pictures and expand_size > 1:
            placeholders_BS = self.model.get_placeholder_mask(input_ids, model_kwargs.get("inputs_embeds"))
            placeholders_B = placeholders_BS.sum(1).tolist()
            tokens = self._visual_tokens(pictures, sum(placeholders_B))
            if model_kwargs.get("past_key_values") is None:
                self.model.check_visual_tokens(sum(tokens), len(tokens), sum(placeholders_B))
            rows = _pictures_by_row(placeholders_B, tokens)
            order = [picture for row in rows for _ in range(expand_size) for picture in row]
            pictures = {name: value[order] for name, value in pictures.items()}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **pictures}

    def _visual_tokens(self, pictures: dict, *placeholders: int) -> list[int]:
        """How many visual tokens each picture has, given the numbers of placeholders that they may be meant for."""
        if "spatial_shapes" in pictures:
            return pictures["spatial_shapes"].prod(-1).tolist()
        count = len(pictures["pixel_values"])
        each = self.config.image_seq_length
        if count and count * each not in placeholders and placeholders[-1] % count == 0:
            each = placeholders[-1] // count
        return [each] * count


def _given(**arguments) -> dict:
    return {name: value for name, value in arguments.items() if value is not None}


def _pictures_by_row(placeholders_B: list[int], tokens: list[int]) -> list[list[int]]:
    """The indices of the pictures that belong to each row, whose placeholders take them up in order."""
    rows, picture = [], 0
    for placeholders in placeholders_B:
        row = []
        while placeholders > 0 and picture < len(tokens):
            row.append(picture)
            placeholders -= tokens[picture]
            picture += 1
        rows.append(row)
    return rows
