# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The SAISA model (Yuan et al., arXiv 2502.02458), top to bottom as the paper has it.

Each decoder layer of a language model has a projector of its own that maps the vision encoder's features into the input
space of that layer's self-attention. There they are keys and values only (NAAViT, No Attention Among Visual Tokens):
visual tokens are never queries, never pass a feed-forward network and never attend to each other.

Shape suffixes:
    B batch                                  D hidden size of the language model
    S sequence in input order, text and      N query heads
      visual placeholders                    K key/value heads
    T text tokens of the sample that has     H head size
      most of them, padding left out         C width of the vision encoder's features
    V visual tokens of the whole batch       L keys in view: those in the cache and the new ones
An input without pictures is not moved: there, T is S.
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import nn
from transformers import AutoModel, DynamicCache, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast

from .adapters_saisa import named_by, tells_samples_apart
from .attention_saisa import HIDDEN_KEY, Runs, Visibility, hide_marked_keys, is_flash
from .compat_saisa import (
    ACT2FN,
    ALL_ATTENTION_FUNCTIONS,
    CACHE,
    EitherCacheName,
    ForeignNames,
    GradientCheckpointingLayer,
    cached_key_range,
    can_return_tuple,
    causal_mask,
    decoding_masks,
    encoder_names_of_all_releases,
    get_logger,
    has_empty_places,
    is_paged,
    is_quantized,
    load_options,
    makes_causal_masks,
    one_cache,
    readable_tp_plan,
    tied_weights,
    update_cache,
)
from .configuration_saisa import SaisaConfig
from .devices_saisa import (
    Luggage,
    check_device_map,
    check_tensor_parallelism,
    execution_device,
    gathered,
    own_part,
    wants_tensor_parallelism,
)
from .encoders_saisa import has_choice_of_attention
from .hub_saisa import push_model_to_hub
from .language_models_saisa import initialize, language_model_family
from .loss_saisa import IGNORED, chunked_cross_entropy
from .model_card_saisa import write_model_card
from .parts_saisa import assemble
from .quantization_saisa import check_backend, settle, with_precise_modules
from .token_layout_saisa import TokenLayout, real_tokens
from .visual_reduction_saisa import (
    SaisaVisualResampler,
    class_attention,
    grid_of,
    most_attended,
    pooled,
    reduced_length,
    unshuffled,
)
from .visual_states_saisa import SaisaVisualStates, VisualStore, weights_fingerprint


if TYPE_CHECKING:  # transformers carries along the files that a checkpoint's module names, so that it saves whole again
    from .images_saisa import load_image  # noqa: F401
    from .processing_saisa import SaisaProcessor  # noqa: F401

logger = get_logger(__name__)

# the arguments that pictures come in
PICTURES = ("pixel_values", "pixel_attention_mask", "spatial_shapes", "visual_states")
# The encoders whose parameters transformers keeps below `vision_model` up to 5.5 and no longer from 5.6 on. Here they are
# there on every release, so that a checkpoint has one layout; one that was saved without is read by this renaming.
NESTED_ENCODERS = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
VISION_MODEL_NAMES = {
    r"vision_tower\.(?=embeddings\.(?:class_embedding|patch_embedding\.|position_embedding\.)|encoder\.layers\."
    r"|pre_layrnorm\.|post_layernorm\.|head\.)": "vision_tower.vision_model."
}
# The names in checkpoints of `LlavaForConditionalGeneration`, whichever release saved them, but for the encoder's.
LLAVA_NAMES = {
    r"^(?:model\.)?multi_modal_projector\.": "model.visual_projector.",
    r"^(?:model\.)?language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?language_model\.(?:model\.)?": "model.language_model.",
}


@dataclass
class SaisaModelOutputWithPast(EitherCacheName, BaseModelOutputWithPast):
    """
    Output of `SaisaModel`. All of it is aligned with `input_ids`; rows at visual positions and, beside
    pictures, at padding are zero; in embedding space those at visual positions are not.

    Attributes:
        last_hidden_state: (B, S, D), after the final norm.
        past_key_values, or cache: the cache, with keys and values of text and visual tokens in input order. It has both names
            on every release; transformers 5.24 and later know it as `cache`.
        hidden_states: tuple of (B, S, D), the input of each layer and the last hidden state.
        attentions: tuple of (B, N, S, L), each layer's attention probabilities.
        image_hidden_states: (V, C), the encoder's features of all visual tokens in input order.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class SaisaCausalLMOutputWithPast(EitherCacheName, CausalLMOutputWithPast):
    """
    Output of `SaisaForConditionalGeneration`; the fields are those of `SaisaModelOutputWithPast`, and

    Attributes:
        loss: scalar, float32. Next-token cross-entropy over the labels whose predecessor is a text token; in embedding space
            over all labels.
        logits: (B, S, vocabulary), or the rows that `logits_to_keep` asks for. Zero at visual positions, but in embedding
            space.
    """

    image_hidden_states: torch.Tensor | None = None


@dataclass
class SaisaImageFeatures(BaseModelOutputWithPooling):
    """
    Output of `get_image_features`: the encoder's, with the features as `pooler_output`, and

    Attributes:
        kept_tokens: (pictures, visual tokens), which of the patches the features are of, where
            `visual_token_reduction="class_attention"` chose among them.
    """

    kept_tokens: torch.Tensor | None = None


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
    """Cosines and sines of the rotary embedding, (B, T, H) each for the text tokens and (V, H) each for the visual ones."""

    text: tuple[torch.Tensor, torch.Tensor]
    visual: tuple[torch.Tensor, torch.Tensor] | None


class NaavitAttention(nn.Module):
    """Self-attention in which visual tokens are keys and values only (NAAViT; paper, section 3.1)."""

    def __init__(self, config: SaisaConfig, layer_idx: int):
        super().__init__()
        text = config.text_config
        family = language_model_family(text)
        self.config = text  # `set_attn_implementation` writes into it
        self.layer_idx = layer_idx
        self.sees_image = config.sees_image(layer_idx)
        self.head_dim = family.head_dim
        self.num_key_value_groups = text.num_attention_heads // text.num_key_value_heads
        self.scaling, self.softcap = family.scaling, family.softcap
        self.window = family.window(layer_idx)
        self.rotates = family.rotates(layer_idx)
        self.attention_dropout = text.attention_dropout
        self.is_causal = True
        self.watcher: Callable | None = None  # is shown this module, the queries and the keys of a pass
        self.rotate_half = family.rotate_half
        self.eager_attention = family.eager_attention

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

    @property
    def implementation(self) -> str:
        """The name of the attention implementation. Keys that are hidden one by one need a mask tensor."""
        chosen = self.config._attn_implementation
        if self.sees_image or chosen in ("eager", "sdpa"):
            return chosen
        return "sdpa" if self.softcap is None else "eager"

    def keys_and_values(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs (..., D) of visual tokens -> their keys before rotation and their values, (..., K, H)."""
        if hasattr(self, "qkv_proj"):
            _, key, value = self.qkv_proj(x).split(self.sizes, dim=-1)
        else:
            key, value = self.k_proj(x), self.v_proj(x)
        return self._heads(key, "k_norm"), self._heads(value)

    def with_all_heads(self, keys_values: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """`keys_and_values` of this process with those of the others that share the layer (tensor parallelism)."""
        missing = keys_values[0].shape[1] < self.config.num_key_value_heads
        return tuple(gathered(x, self.k_proj.weight, dim=1) for x in keys_values) if missing else keys_values

    def _queries_keys_values(self, x_BTD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Input rows (B, T, D) of text tokens -> (B, T, N, H), (B, T, K, H), (B, T, K, H)."""
        if hasattr(self, "qkv_proj"):
            query_BTX, key_BTX, value_BTX = self.qkv_proj(x_BTD).split(self.sizes, dim=-1)
        else:
            query_BTX, key_BTX, value_BTX = self.q_proj(x_BTD), self.k_proj(x_BTD), self.v_proj(x_BTD)
        return self._heads(query_BTX, "q_norm"), self._heads(key_BTX, "k_norm"), self._heads(value_BTX)

    def forward(
        self,
        text_BTD: torch.Tensor,
        visual: tuple[torch.Tensor, torch.Tensor] | None,
        layout: TokenLayout,
        rotation: Rotation,
        attention_mask,
        cache,
        slots: torch.Tensor,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            text_BTD: normalised hidden states of the text tokens.
            visual: `keys_and_values` of the visual tokens; None if this layer gets none.
            attention_mask: what the attention implementation takes (see `attention_saisa.py`); None is plain causal
                attention.
            slots: (S,) places of the new tokens in the cache.
            kwargs: handed on to the attention function.

        Returns:
            (B, T, D) outputs of the text tokens, and (B, N, T, L) probabilities where the implementation has them.
        """
        query_BTNH, key_BTKH, value_BTKH = self._queries_keys_values(text_BTD)
        query_BTNH, key_BTKH = (self._rotated(x, *rotation.text) for x in (query_BTNH, key_BTKH))
        key_VKH = value_VKH = visual_rotation = None
        if visual is not None:
            if visual[0].shape[1] > key_BTKH.shape[2]:  # of all processes that share the layer
                visual = tuple(own_part(x_VKH, self.k_proj.weight, dim=1) for x_VKH in visual)
            key_VKH, value_VKH = (layout.placed(x_VKH) for x_VKH in visual)
            cos_VH = rotation.visual[0]
            if self.rotates and cos_VH.shape[-1] == self.head_dim and cos_VH.dtype == key_VKH.dtype:
                visual_rotation = rotation.visual  # the layout does it in fewer passes over memory
            else:
                key_VKH = self._rotated(key_VKH, *rotation.visual)
        query_BNTH = query_BTNH.transpose(1, 2)
        key_BKSH = layout.keys(key_BTKH, key_VKH, visual_rotation)
        value_BKSH = layout.keys(value_BTKH, value_VKH)
        if self.watcher is not None:
            self.watcher(self, query_BNTH, key_BKSH)
        if not self.sees_image and layout.visual_BS is not None:
            hidden_B1S1 = layout.visual_BS[:, None, :, None].to(key_BKSH.device)
            key_BKSH = key_BKSH.masked_fill(hidden_B1S1, HIDDEN_KEY)

        if cache is not None:
            key_BKSH, value_BKSH = update_cache(cache, key_BKSH, value_BKSH, self.layer_idx, slots, kwargs)
        if not self.sees_image and not is_paged(cache) and (cache is not None or layout.visual_BS is not None):
            attention_mask = hide_marked_keys(attention_mask, key_BKSH, query_BNTH)

        options = {"dropout": self.attention_dropout if self.training else 0.0, "scaling": self.scaling, **kwargs}
        if self.softcap is not None:
            options["softcap"] = self.softcap
        inputs = (self, query_BNTH, key_BKSH, value_BKSH)
        if isinstance(attention_mask, Runs):
            output_BTNH, probabilities_BNTL = attention_mask.attend(self.implementation, *inputs, **options), None
        # a chunk of visual tokens alone has no query, which fused kernels do not expect
        elif self.implementation == "eager" or query_BNTH.shape[2] == 0:
            output_BTNH, probabilities_BNTL = self.eager_attention(*inputs, attention_mask, **options)
        else:
            if is_flash(self.implementation):
                options["sliding_window"] = self.window
            attention = ALL_ATTENTION_FUNCTIONS[self.implementation]
            output_BTNH, probabilities_BNTL = attention(*inputs, attention_mask, **options)
        return self.o_proj(output_BTNH.flatten(2).contiguous()), probabilities_BNTL

    def _heads(self, x: torch.Tensor, norm: str | None = None) -> torch.Tensor:
        """(..., X) -> (..., heads, H), past the norm over each head or over all of them that some families have."""
        if norm is not None and self.head_norm == "width":
            x = getattr(self, norm)(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        return getattr(self, norm)(x) if norm is not None and self.head_norm == "head" else x

    def _rotated(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """(..., heads, H) by cosines and sines (..., H), as the language model does it, to the last bit. As much of each head
        is rotated as the cosines are for."""
        if not self.rotates:
            return x
        size, dtype = cos.shape[-1], x.dtype
        if size < x.shape[-1]:
            return torch.cat([self._rotated(x[..., :size], cos, sin), x[..., size:]], dim=-1)
        return (x * cos[..., None, :] + self.rotate_half(x) * sin[..., None, :]).to(dtype)


def _checkpoints_reentrantly(layer: GradientCheckpointingLayer) -> bool:
    """Whether a layer's hidden states are computed again in backward by the older of PyTorch's two ways (4.57's default),
    which yields no gradients at all where none of the layer's inputs has one."""
    if not (layer.gradient_checkpointing and layer.training):
        return False
    return getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True)


class SaisaDecoderLayer(GradientCheckpointingLayer):
    """A decoder layer of the language model, with a visual projector in front of its self-attention."""

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

    def visual_keys_and_values(
        self, features: torch.Tensor, layout: TokenLayout | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features, (V, C) of the encoder or (V, D) where all layers share the projector, to keys before rotation and values,
        (V, K, H) each. They depend on nothing else. Where a hook of one of the modules wants to know which sample a row
        belongs to, as adapters that differ between samples do, `layout` says so."""
        norm = getattr(self, next(filter(None, self.norms)))
        features = features.to(self.device)

        def keys_and_values(features):
            visual = self.visual_projector(features) if hasattr(self, "visual_projector") else features
            return self.self_attn.keys_and_values(
                self._normed(self.norms.before_attention, visual.to(norm.weight.dtype))
            )

        if layout is None or layout.visual_BS is None or not tells_samples_apart(self.visual_modules().values()):
            return keys_and_values(features)
        return tuple(map(layout.visual, keys_and_values(layout.in_input_order(features))))

    @property
    def device(self) -> torch.device:
        """Where the layer computes."""
        return execution_device(getattr(self, next(filter(None, self.norms))))

    def visual_modules(self) -> dict[str, nn.Module]:
        """The modules on whose weights `visual_keys_and_values` depends."""
        modules = {name: getattr(self, name, None) for name in ("visual_projector", self.norms.before_attention or "")}
        modules |= {name: getattr(self.self_attn, name, None) for name in ("k_proj", "v_proj", "qkv_proj", "k_norm")}
        return {name: module for name, module in modules.items() if module is not None}

    @property
    def mask_kind(self) -> tuple:
        """Layers of one kind have the same attention mask."""
        return self.attention_type, self.sees_image

    def _normed(self, name: str | None, x: torch.Tensor) -> torch.Tensor:
        return x if name is None else getattr(self, name)(x)

    def _added(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + (y if self.residual_multiplier == 1 else y * self.residual_multiplier)

    def forward(
        self, text_BTD: torch.Tensor, visual=None, layout: TokenLayout | None = None, **attention_arguments
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            text_BTD: hidden states of the text tokens.
            visual: features as in `visual_keys_and_values`, or what that returns, or None.

        Returns:
            (B, T, D) hidden states and (B, N, T, L) attention probabilities or None.
        """
        nothing = None
        if visual is None or not self.sees_image:
            visual = None
        elif isinstance(visual, tuple):
            visual = tuple(x_VKH.to(text_BTD.device) for x_VKH in visual)
        else:
            visual = self.visual_keys_and_values(visual, layout)
            if not len(visual[0]):  # a sum of no numbers is zero, as is its gradient (see `SaisaModel._no_features`)
                nothing, visual = visual[0].sum() + visual[1].sum(), None
        text_BTD, probabilities_BNTL = self._attended(text_BTD, visual, nothing, layout=layout, **attention_arguments)
        return self._fed(text_BTD), probabilities_BNTL

    def _attended(self, text_BTD: torch.Tensor, visual, nothing=None, **attention_arguments):
        """Hidden states past self-attention, and its probabilities."""
        normed_BTD = self._normed(self.norms.before_attention, text_BTD)
        attended_BTD, probabilities_BNTL = self.self_attn(normed_BTD, visual, **attention_arguments)
        attended_BTD = attended_BTD if nothing is None else attended_BTD + nothing
        return self._added(text_BTD, self._normed(self.norms.after_attention, attended_BTD)), probabilities_BNTL

    def _fed(self, x_BTD: torch.Tensor) -> torch.Tensor:
        """Hidden states past the feed-forward network."""
        fed_BTD = getattr(self, self.feed_forward_name)(self._normed(self.norms.before_feed_forward, x_BTD))
        return self._added(x_BTD, self._normed(self.norms.after_feed_forward, fed_BTD))


class SaisaPreTrainedModel(ForeignNames, PreTrainedModel):
    """What every SAISA class shares: what transformers may do with it, and how it is saved and loaded."""

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
        super().__init__(config, *args, **kwargs)
        if getattr(config, "in_embedding_space", False):
            self._no_split_modules = ["EmbeddingSpaceLayer"]  # FSDP insists on finding every class that is named

    def save_pretrained(
        self, save_directory, is_main_process=True, state_dict=None, *args, push_to_hub=False, **kwargs
    ):
        """transformers' own. The config brings the code files, so that `trust_remote_code=True` loads the folder anywhere.

        Tensors have the names that they have in the model, which are the same on every transformers release; an encoder whose
        modules transformers 5 has renamed keeps their older names, which all releases read.
        """
        names = ("repo_id", "commit_message", "commit_description", "private", "create_pr", "revision", "tags")
        hub_arguments = {name: kwargs.pop(name) for name in names if name in kwargs}
        pushed = None if state_dict is None else dict(state_dict)  # 5.x empties the one that it is given
        with encoder_names_of_all_releases(self) as options:
            super().save_pretrained(save_directory, is_main_process, state_dict, *args, **{**kwargs, **options})
        if push_to_hub and is_main_process:
            shared = {name: kwargs[name] for name in ("token", "max_shard_size", "variant") if name in kwargs}
            shared |= {"repo_id": Path(save_directory).resolve().name, "state_dict": pushed, **hub_arguments}
            self.push_to_hub(**shared)

    def push_to_hub(self, repo_id, **kwargs):
        """Uploads weights, config, code files and a model card; arguments as in `PreTrainedModel.push_to_hub`."""
        return push_model_to_hub(self, write_model_card, repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """transformers' own, which does not leave single tensors of the base model at their random initial values, and whose
        `quantization_config` leaves alone what `KEPT_PRECISE` names, unless it names modules itself. A checkpoint of a
        `LlavaForConditionalGeneration` is loaded as that model, in embedding space.

        Raises:
            ValueError: tensors of the encoder, the projectors, the language model or the head are not in the checkpoint.
            ValueError: `device_map` splits a decoder layer, or `tp_plan` has more shards than heads to share out.
            ImportError: the checkpoint or `quantization_config` needs bitsandbytes, which is missing or too old.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        encoder_type, quantization, is_llava = _told_by_config(pretrained_model_name_or_path, kwargs)
        kwargs["key_mapping"] = {**_other_names(encoder_type, is_llava), **(kwargs.get("key_mapping") or {})}
        check_device_map(kwargs.get("device_map"))
        if wants_tensor_parallelism(kwargs):
            check_tensor_parallelism(_config(pretrained_model_name_or_path, kwargs).text_config, kwargs)
        check_backend(quantization or kwargs.get("quantization_config"))
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = with_precise_modules(kwargs["quantization_config"])
        kwargs |= load_options(bool(quantization or kwargs.get("quantization_config")), kwargs)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        settle(model)
        if pretrained_model_name_or_path is not None:
            parts = ["vision_tower.", "visual_projector.", "visual_resampler.", "language_model."]
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
        if isinstance(attn_implementation, str) and vision is not None and not has_choice_of_attention(vision):
            attn_implementation = {"": attn_implementation, "text_config": attn_implementation}
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        text = self.config.get_text_config()
        if text._attn_implementation == "sdpa" and not language_model_family(text).supports_sdpa:
            text._attn_implementation = "eager"

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        initialize(module)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would look for its own names in this file's text

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # the weights are initialised by transformers' own rules, which it does not trust foreign code to follow

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Nothing to do: the config's `auto_map` is complete as it stands."""


def _other_names(encoder_type: str, of_llava: bool) -> dict[str, str]:
    """Patterns of the names that tensors have in checkpoints of other layouts, and what they become."""
    level = "vision_model." if encoder_type in NESTED_ENCODERS else ""
    if of_llava:
        return {rf"^(?:model\.)?vision_tower\.(?:{level})?": f"model.vision_tower.{level}"} | LLAVA_NAMES
    return VISION_MODEL_NAMES if level else {}


def _told_by_config(checkpoint, kwargs: dict) -> tuple[str, dict | None, bool]:
    """The `model_type` of the encoder of `checkpoint`, its quantization, and whether its tensors have a LLaVA's names, given
    the arguments of `from_pretrained`."""
    config, found = kwargs.get("config"), {}
    given = hasattr(config, "vision_config")
    if not given or (config.in_embedding_space and checkpoint is not None):
        try:
            source = checkpoint if given else config or checkpoint
            found, _ = PretrainedConfig.get_config_dict(source, **_of_the_hub(kwargs))
        except OSError:
            if not given:
                raise
    is_llava = found.get("model_type") == "llava"
    if given:
        return config.vision_config.model_type, getattr(config, "quantization_config", None), is_llava
    encoder_type = (found.get("vision_config") or {}).get("model_type", "clip_vision_model")
    return encoder_type, found.get("quantization_config"), is_llava


def _config(checkpoint, kwargs: dict) -> SaisaConfig:
    config = kwargs.get("config")
    if hasattr(config, "text_config"):
        return config
    return SaisaConfig.from_pretrained(config or checkpoint, **_of_the_hub(kwargs))


def _of_the_hub(kwargs: dict) -> dict:
    """Those of the arguments of `from_pretrained` that say how to read a file."""
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    return {name: kwargs[name] for name in names if name in kwargs}


class SaisaLanguageModel(SaisaPreTrainedModel):
    """The decoder: an ordinary language model whose layers also read the features of the vision encoder."""

    layer_class = SaisaDecoderLayer

    def __init__(self, config: SaisaConfig):
        # over the text config, so that `attn_implementation={"text_config": ...}` reaches it
        super().__init__(config.text_config)
        text = config.text_config
        self.family = language_model_family(text)
        if self.config._attn_implementation == "sdpa" and not self.family.supports_sdpa:
            self.config._attn_implementation = "eager"
        self.embed_tokens = self.family.embedding()
        self.layers = nn.ModuleList(self.layer_class(config, index) for index in range(text.num_hidden_layers))
        self.norm = self.family.norm(text.hidden_size)
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
        """As `SaisaModel.forward`, with the visual positions in `layout` and, in `visual`, features of the visual tokens
        (see `SaisaDecoderLayer.visual_keys_and_values`) or for each layer what that makes of them. `kwargs` go to the
        attention functions."""
        layout = TokenLayout(None) if layout is None else layout
        cache = one_cache(past_key_values, cache)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if (
            (use_cache or cache is not None)
            and self.gradient_checkpointing
            and self.training
            and torch.is_grad_enabled()
        ):
            # the layers run again in backward, and would write into it a second time
            logger.warning_once("A cache is incompatible with gradient checkpointing: `use_cache` is set to False.")
            use_cache, cache = False, None
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if is_quantized(cache) and not all(layer.sees_image for layer in self.layers):
            raise ValueError(
                "visual_layers leaves out some layers, which need to find their hidden keys in the cache as they put them "
                "there: a quantized cache changes them. Use a dynamic or static cache."
            )

        batch_size, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        if inputs_embeds is None:
            text_BTD = self.embed_tokens(layout.text(input_ids))
        else:
            text_BTD = layout.text(inputs_embeds)
        text_BTD = self.family.scaled_input(text_BTD)
        slots = cache_position
        if slots is None:
            past = cache.get_seq_length() if cache is not None and not is_paged(cache) else 0
            slots = torch.arange(length, device=text_BTD.device) + past
        documents = None
        if position_ids is None:
            position_ids = slots[None]
        elif attention_mask is None and cache is None:
            starts = torch.diff(position_ids, prepend=position_ids[:, :1] - 1) != 1
            documents = starts.cumsum(-1).expand(batch_size, -1)
        masks = self._attention_masks(layout, text_BTD, slots, attention_mask, cache, position_ids, documents)
        kinds = self.family.attention_types
        if self.rotary_emb.differs:
            rotations = {kind: self._rotation(layout, text_BTD, position_ids, kind) for kind in set(kinds)}
        else:
            rotations = dict.fromkeys(kinds, self._rotation(layout, text_BTD, position_ids, kinds[0]))

        if output_attentions and self.config._attn_implementation != "eager":
            logger.warning_once(
                f"`output_attentions=True` returns none with attn_implementation={self.config._attn_implementation!r}: load "
                "the model with attn_implementation='eager'."
            )
        wanted = {"hidden_states": output_hidden_states, "attentions": output_attentions}
        kwargs |= {"cache": cache, "slots": slots}
        outputs = self._through_layers(text_BTD, visual, layout, rotations, masks, wanted, **kwargs)
        return BaseModelOutputWithPast(**{CACHE: cache if use_cache else None}, **outputs)

    def _through_layers(self, text_BTD, visual, layout, rotations, masks, wanted: dict[str, bool], **kwargs) -> dict:
        """`last_hidden_state` (B, S, D), and where `wanted`, `hidden_states` and `attentions`."""
        hidden_states, attentions = [], []
        luggage = Luggage(None if isinstance(visual, tuple) else visual, rotations, masks)
        if _checkpoints_reentrantly(self.layers[0]) and torch.is_grad_enabled() and not text_BTD.requires_grad:
            # else the projectors, which are inside the layers, would not learn
            text_BTD = text_BTD.detach().requires_grad_()
        for index, layer in enumerate(self.layers):
            if wanted["hidden_states"]:
                hidden_states.append(layout.align(text_BTD))
            features, rotations, masks = luggage.at(layer.device)
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
        return self._collected(layout.align(self.norm(text_BTD)), hidden_states, attentions, wanted)

    def _collected(self, last_hidden_state, hidden_states: list, attentions: list, wanted: dict[str, bool]) -> dict:
        return {
            "last_hidden_state": last_hidden_state,
            "hidden_states": (*hidden_states, last_hidden_state) if wanted["hidden_states"] else None,
            "attentions": tuple(attentions) or None,
        }

    def _attention_masks(self, layout, text_BTD, *arguments) -> dict:
        """What the attention implementations take as masks, by kind of layer."""
        masks = {}
        for index, layer in enumerate(self.layers):
            if layer.mask_kind not in masks:
                masks[layer.mask_kind] = self._attention_mask(index, layer, layout, text_BTD, *arguments)
        return masks

    def _attention_mask(self, index, layer, layout, text_BTD, slots, attention_mask, cache, position_ids, documents):
        given = attention_mask.get(layer.attention_type) if isinstance(attention_mask, dict) else attention_mask
        if is_paged(cache):
            return given
        implementation = layer.self_attn.implementation
        key_range = cached_key_range(cache, index, slots)
        visibility = Visibility(layout, slots, key_range, layer.self_attn.window, given, documents)
        if isinstance(given, torch.Tensor) and given.ndim == 4:
            return layout.query_rows(given)
        if layout.visual_BS is not None:
            return visibility.for_implementation(implementation, text_BTD.dtype)
        if implementation == "eager" != self.config._attn_implementation:
            return visibility.for_implementation("eager", text_BTD.dtype)
        if implementation != self.config._attn_implementation:
            return visibility.mask()
        unfilled = has_empty_places(cache) and (is_flash(implementation) or implementation == "flex_attention")
        packed = is_flash(implementation) and documents is not None and bool(documents.any())
        if unfilled or packed or not makes_causal_masks(layer.attention_type):
            # transformers does not tell them which places of the cache are filled, or where a packed sample ends
            visibility.layout = TokenLayout(torch.zeros(text_BTD.shape[:2], dtype=torch.bool, device=slots.device))
            return visibility.for_implementation(implementation, text_BTD.dtype)
        if isinstance(attention_mask, dict):
            return given
        return causal_mask(layer.attention_type, self.config, text_BTD, given, slots, cache, position_ids)

    def _rotation(self, layout, text_BTD, position_ids, attention_type) -> Rotation:
        cos_sin = self.rotary_emb(text_BTD, position_ids, attention_type)
        if layout.visual_BS is None:
            return Rotation(cos_sin, None)
        cos_sin = [x_BSH.expand(layout.batch_size, -1, -1) for x_BSH in cos_sin]
        return Rotation(tuple(map(layout.text, cos_sin)), tuple(map(layout.visual, cos_sin)))


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
    choice = {} if has_choice_of_attention(config) else {"attn_implementation": "eager"}
    return as_vision_tower(AutoModel.from_config(config, **choice))


def as_vision_tower(encoder: PreTrainedModel) -> nn.Module:
    """`encoder` with the parameter names of transformers up to 5.5."""
    if encoder.config.model_type in NESTED_ENCODERS and not hasattr(encoder, "vision_model"):
        return NestedEncoder(encoder)
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
        if config.visual_token_reduction == "resampler":
            self.visual_resampler = SaisaVisualResampler(config)
        language_model_class = SaisaLanguageModel
        if config.in_embedding_space:  # not at the top: it builds on this file
            from .embedding_space_saisa import EmbeddingSpaceLanguageModel as language_model_class
        self.language_model = language_model_class(config)
        self.post_init()
        if config.projector_sharing == "shared":
            plan = {"visual_projector.linear_1": "colwise", "visual_projector.linear_2": "rowwise"}
            self._tp_plan |= readable_tp_plan(plan)

    def get_input_embeddings(self):
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value):
        self.language_model.embed_tokens = value

    def get_decoder(self):
        return self.language_model

    def set_decoder(self, decoder):
        self.language_model = decoder

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> SaisaImageFeatures:
        """
        The encoder's features of a batch of pictures, before any projector.

        Args:
            pixel_values: (pictures, channels, height, width), any floating dtype.
            kwargs: handed on to the encoder.

        Returns:
            the encoder's output, whose `pooler_output` is (pictures, visual tokens per picture, C): the states of
            `vision_feature_layer`, without class token where `vision_feature_select_strategy` is `"default"`,
            feature maps flattened row by row, as many as `visual_token_reduction` leaves. A list of (visual tokens, C) where
            pictures differ in size (SigLIP 2).
        """
        self._check_features_asked_for(kwargs)
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
        dtype = next(p.dtype for p in self.vision_tower.parameters() if p.is_floating_point())
        # gradient checkpointing of 5.x asks for gradients of all embeddings, a frozen encoder's too
        learns = pixel_values.requires_grad or any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            outputs = self.vision_tower(pixel_values=pixel_values.to(dtype), return_dict=True, **kwargs)
        states = [outputs.hidden_states[layer] for layer in self.config.vision_feature_layers]
        grid = states[0].shape[2:] if states[0].ndim == 4 else None
        states = [state.flatten(2).transpose(1, 2) if state.ndim == 4 else state for state in states]
        features, kept = torch.cat([state[:, self.config.dropped_vision_tokens :] for state in states], dim=-1), None
        if grids is not None:
            grids = [(int(h), int(w)) for h, w in grids]
            features = [picture[: h * w] for picture, (h, w) in zip(features, grids)]
            if self.config.visual_token_reduction is not None:
                features = [self._reduced(x[None], grid)[0] for x, grid in zip(features, grids)]
            if len({len(picture) for picture in features}) == 1:
                features = torch.stack(features)
        elif self.config.visual_token_reduction == "class_attention":
            attention = class_attention(self.vision_tower, self.config, outputs.hidden_states)
            kept = most_attended(attention, self.config.reduced_visual_tokens, features)
            features = features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
        elif self.config.visual_token_reduction is not None:
            features = self._reduced(features, grid or grid_of(features.shape[1], *pixel_values.shape[-2:]))
        return SaisaImageFeatures(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=features,
            hidden_states=outputs.hidden_states,
            attentions=outputs.get("attentions"),  # a convolutional encoder has none
            kept_tokens=kept,
        )

    def _check_features_asked_for(self, kwargs: dict):
        """Takes transformers' arguments for other features out of `kwargs`: the projectors are made for those of the config.

        Raises:
            ValueError: they ask for others.
        """
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            asked, own = kwargs.pop(name, None), getattr(self.config, name)
            if asked is not None and asked != own:
                raise ValueError(
                    f"{name}={asked!r}, but the projectors are made for {own!r}, as the config says. Load a model with "
                    f"from_pretrained(..., {name}={asked!r}) to get others."
                )

    def _reduced(self, features: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Features (pictures, tokens in front, width) of patches in `grid` -> (pictures, visual tokens, C)."""
        kind = self.config.visual_token_reduction
        if kind == "resampler":
            return self.visual_resampler(features)
        return (pooled if kind == "avg_pool" else unshuffled)(features, tuple(grid))

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
        visual_states: SaisaVisualStates | None = None,
        cache=None,
        **kwargs,
    ) -> SaisaModelOutputWithPast:
        """
        Args:
            input_ids: (B, S). `config.image_token_id` stands once for each visual token.
            pixel_values: (pictures, channels, height, width), the pictures in the order of their placeholders, row by
                row. None: all tokens are text. No pictures, (0, channels, height, width), is the same, but that in training
                the projectors get gradients, of zero, which processes that train together wait for.
            attention_mask: (B, past + S), 1 for tokens and 0 for padding; or a prepared (B, 1, S, L) mask, or a dict
                of such masks by attention type, as `generate` makes them.
            position_ids: (B, S), counted over text and visual tokens. None counts from the first cached token.
            past_key_values, cache: any transformers `Cache`, under one of its two names.
            inputs_embeds: (B, S, D) in place of `input_ids`; visual positions are where the image token's embedding is.
            use_cache: whether to return the cache. None: as the language model's config says.
            output_attentions, output_hidden_states: whether to return these. None: as the config says.
            pixel_attention_mask, spatial_shapes: (pictures, patches) and (pictures, 2), what SigLIP 2's image processor
                makes beside `pixel_values` (pictures, patches, patch size) for pictures of unlike shapes.
            visual_states: what `get_visual_states` made of the pictures, in place of `pixel_values` and in the same order.
            kwargs: handed on to the attention functions; those that the encoder's `forward` names, to the encoder too.

        Raises:
            ValueError: neither or both of `input_ids` and `inputs_embeds`; both `pixel_values` and `visual_states`;
                two caches; numbers of placeholders and visual tokens that differ; `visual_states` of another model or dtype.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Expected exactly one of input_ids and inputs_embeds.")
        self._check_features_asked_for(kwargs)
        cache_position = kwargs.pop("cache_position", None)
        cache = one_cache(past_key_values, cache)
        encoder_arguments = _given(pixel_attention_mask=pixel_attention_mask, spatial_shapes=spatial_shapes)
        if pixel_values is not None and kwargs:
            encoder_arguments |= named_by(self.vision_tower, kwargs)
        # in embedding space visual tokens are tokens like others, and so is padding, as in a LLaVA
        real_BS = (
            None
            if self.config.in_embedding_space
            else real_tokens(attention_mask, (input_ids if inputs_embeds is None else inputs_embeds).shape[1])
        )

        layout, visual, features = TokenLayout(None), None, None
        if pixel_values is not None and visual_states is not None:
            raise ValueError(
                "Expected pixel_values or visual_states, got both: the states stand in place of the pictures."
            )
        if visual_states is not None:
            self.check_visual_states(visual_states)
            if visual_states.store == "features":
                visual_states = visual_states.compact()  # what is not asked for is not to be projected
            visual_BS = self.get_placeholder_mask(input_ids, inputs_embeds)
            # what becomes of a visual token may depend on the sample that it stands in
            spread = self.config.in_embedding_space or (
                visual_states.store == "features" and self.tells_samples_apart()
            )
            rows = visual_states.rows() if len(visual_states) else None
            places = (None, None) if spread or not len(visual_states) else (rows, position_ids)
            found = self._layout(visual_BS, *places, real_BS, visual_states=visual_states.lengths)
            if len(visual_states):
                layout, stored = found, visual_states.stored.features
                stored = stored[rows] if spread and rows is not None else stored
                visual = self._for_layers(stored, visual_states.stored.keys_values, layout)
        elif pixel_values is not None:
            visual_BS = self.get_placeholder_mask(input_ids, inputs_embeds)
            pictures = []
            if len(pixel_values):
                # the encoder's other states are let go of
                pictures = list(
                    self.get_image_features(pixel_values, return_dict=True, **encoder_arguments).pooler_output
                )
            found = self._layout(visual_BS, None, None, real_BS, pixel_values=[len(picture) for picture in pictures])
            if pictures:
                layout, features = found, torch.cat(pictures)
                visual = self._for_layers(features, layout=layout)
            elif self.training and torch.is_grad_enabled():
                visual = self._for_layers(self._no_features(pixel_values=pixel_values, **encoder_arguments))
        elif input_ids is not None and input_ids.shape[1] > 1 and not torch.compiler.is_compiling():
            self._warn_if_pictures_are_missing(input_ids)

        outputs = self.language_model(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            layout=layout,
            visual=visual,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            use_cache=use_cache,
            output_attentions=self.config.output_attentions if output_attentions is None else output_attentions,
            output_hidden_states=(
                self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
            ),
            cache_position=cache_position,
            **kwargs,
        )
        return SaisaModelOutputWithPast(**outputs, image_hidden_states=features)

    def _for_layers(self, features: torch.Tensor | None, keys_values=None, layout: TokenLayout | None = None):
        """What the language model takes as `visual`: the encoder's features, past the projector if all layers share one; or,
        where they are at hand, each layer's keys and values."""
        if keys_values is not None:
            return keys_values
        features = features.to(self.get_input_embeddings().weight.dtype)
        if self.config.projector_sharing != "shared":
            return features
        if layout is None or not tells_samples_apart([self.visual_projector]):
            return self.visual_projector(features)
        return layout.visual(self.visual_projector(layout.in_input_order(features)))

    def tells_samples_apart(self) -> bool:
        """Whether a hook of a module on the visual path wants to know which sample a row belongs to."""
        modules = [module for layer in self.language_model.layers for module in layer.visual_modules().values()]
        return tells_samples_apart([*modules, *([self.visual_projector] if hasattr(self, "visual_projector") else [])])

    def _no_features(self, **no_pictures) -> torch.Tensor:
        """Features (0, C) of no pictures, through which gradients of zero reach the projectors: processes that share weights
        or gradients wait for one another, also where one has no picture. An encoder that takes part in that, since it is
        trained or its weights are spread over the processes (DeepSpeed ZeRO-3), encodes a blank picture."""
        if not any(p.requires_grad or hasattr(p, "ds_id") for p in self.vision_tower.parameters()):
            none = no_pictures["pixel_values"].new_zeros(0, self.config.vision_feature_size)
            if hasattr(self, "visual_resampler"):  # attention kernels want a picture
                none = self.visual_resampler(none.new_zeros(1, 1, none.shape[-1]))[0, :0]
            return none
        blank = {name: value.new_ones(1, *value.shape[1:]) for name, value in no_pictures.items()}
        return torch.cat(list(self.get_image_features(**blank, return_dict=True).pooler_output))[:0]

    def unshare_projectors(self):
        """Copies the projector that all layers share into every layer that sees the picture: the step from the paper's first
        training stage to its second. What the model computes stays the same; `config.projector_sharing` is `"per_layer"`
        from here on. An optimizer that was made before does not know the copies.

        Raises:
            ValueError: the projectors are not shared, or the model is in embedding space.
        """
        if self.config.in_embedding_space:
            raise ValueError(
                "unshare_projectors: alignment is 'embedding_space', where there is one projector for good."
            )
        if self.config.projector_sharing != "shared":
            raise ValueError(
                f"unshare_projectors: config.projector_sharing is {self.config.projector_sharing!r}, expected 'shared'. "
                "Each layer has a projector of its own already."
            )
        for layer in self.language_model.layers:
            if layer.sees_image:
                device = next(layer.self_attn.parameters()).device
                layer.visual_projector = copy.deepcopy(self.visual_projector).to(device)
        del self.visual_projector
        self.config.projector_sharing = "per_layer"

    @torch.no_grad()
    def get_visual_states(self, pixel_values: torch.Tensor, store: str | None = None, **kwargs) -> SaisaVisualStates:
        """
        What the decoder layers make of a batch of pictures, to be used with any number of prompts and anywhere in them
        as `visual_states`. It is computed without gradients.

        Args:
            pixel_values: (pictures, channels, height, width), any floating dtype.
            store: `"keys_values"` for the keys before rotation and the values of each layer that sees the picture,
                2 * V * h_kv numbers a layer, or `"features"` for the encoder's features alone, V * C numbers, which are
                projected at each use. None: `"keys_values"`; in embedding space `"features"`, as visual tokens have hidden
                states there, which depend on their surroundings or, at the least, are wanted at the end.
            kwargs: handed on to the encoder.

        Returns:
            `SaisaVisualStates` of as many images, in the language model's dtype.

        Raises:
            ValueError: `store` is neither of the two, or `"keys_values"` in embedding space; `pixel_values` is no batch of
                pictures.
        """
        if store is None:
            store = "features" if self.config.in_embedding_space else "keys_values"
        self._check_store(store)
        if store not in ("keys_values", "features"):
            raise ValueError(f"store={store!r}: expected 'keys_values' or 'features'.")
        pictures = self.get_image_features(pixel_values, return_dict=True, **kwargs).pooler_output
        lengths = [len(picture) for picture in pictures]
        dtype = self.get_input_embeddings().weight.dtype
        features, keys_values = torch.cat(list(pictures)).to(dtype), None
        if store == "keys_values":
            visual, features = self._for_layers(features), None
            keys_values = tuple(
                layer.self_attn.with_all_heads(layer.visual_keys_and_values(visual)) if layer.sees_image else None
                for layer in self.language_model.layers
            )
        stored = VisualStore(lengths, features, keys_values, self.visual_fingerprint(store))
        return SaisaVisualStates(stored.map(lambda x: x.to(dtype)))  # under autocast, products have another one

    def _check_store(self, store: str):
        if store == "keys_values" and self.config.in_embedding_space:
            raise ValueError(
                "visual states of store='keys_values' do not go with alignment='embedding_space': visual tokens have hidden "
                "states of their own there. Use store='features'."
            )

    def visual_fingerprint(self, store: str) -> str:
        """A digest of the weights and settings on which visual states that `store` `"keys_values"` or `"features"` depend.

        Weights are compared as bfloat16, so that a model has one fingerprint in float32 and in bfloat16.
        """
        parts = {"vision_tower": self.vision_tower}
        settings = [self.config.vision_feature_layers, self.config.vision_feature_select_strategy]
        if self.config.visual_token_reduction is not None:
            settings += [self.config.visual_token_reduction, self.config.reduced_visual_tokens]
        if hasattr(self, "visual_resampler"):
            parts["visual_resampler"] = self.visual_resampler
        if store == "keys_values":
            config = self.config
            settings += [config.projector_hidden_act, config.text_config.rms_norm_eps, config.visual_layers]
            if config.projector_sharing == "shared":
                parts["visual_projector"] = self.visual_projector
            for index, layer in enumerate(self.language_model.layers):
                if layer.sees_image:
                    parts.update({f"{index}.{name}": module for name, module in layer.visual_modules().items()})
        return weights_fingerprint(self, store, parts, settings)

    def check_visual_states(self, states: SaisaVisualStates):
        """Raises ValueError, or TypeError, if `states` are not what this model's `get_visual_states` makes."""
        if not isinstance(states, SaisaVisualStates):
            raise TypeError(
                f"visual_states is a {type(states).__name__}: expected the SaisaVisualStates that model.get_visual_states "
                f"returns."
            )
        again = "Compute them with this model: model.get_visual_states(pixel_values)."
        self._check_store(states.store)
        layers, token_shape = self.language_model.layers, (self.config.vision_feature_size,)
        if states.store == "keys_values":
            if states.num_layers != len(layers):
                raise ValueError(f"visual_states has {states.num_layers} layers, the model {len(layers)}. {again}")
            token_shape = (self.config.text_config.num_key_value_heads, layers[0].self_attn.head_dim)
        if states.token_shape != token_shape:
            raise ValueError(
                f"visual_states has {states.token_shape} numbers a token, the model {token_shape}. {again}"
            )
        dtype = self.get_input_embeddings().weight.dtype
        if states.dtype != dtype:
            raise ValueError(
                f"visual_states is {states.dtype}, the model {dtype}: cast them with visual_states.to({dtype})."
            )
        fingerprint = self.visual_fingerprint(states.store)
        if states.fingerprint != fingerprint:
            raise ValueError(
                f"visual_states was computed with other weights than this model's (fingerprint {states.fingerprint[:12]}, "
                f"here {fingerprint[:12]}). {again}"
            )

    @torch.compiler.disable  # shapes depend on token ids here and nowhere else: around it, compiled graphs are whole
    def _layout(self, visual_BS: torch.Tensor, *places, **lengths_by_name: list[int]) -> TokenLayout:
        """The layout of an input with these visual positions, which the pictures in the arguments named have to fill."""
        for name, lengths in lengths_by_name.items():
            self.check_visual_tokens(name, lengths, int(visual_BS.sum()))
        return TokenLayout(visual_BS, *places)

    def check_visual_tokens(self, name: str, lengths: list[int], placeholders: int):
        """Raises ValueError if pictures of `lengths` visual tokens, the argument `name`, do not fill `placeholders`."""
        if sum(lengths) != placeholders:
            raise ValueError(
                f"{name} holds {len(lengths)} pictures with {sum(lengths)} visual tokens in all, but the input has "
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


class SaisaHead(nn.Linear):
    """The language model's head. A loss whose logits exist for some rows at a time (see `loss_saisa.py`) is made in one call
    of this module: processes that share its weights gather them for each call, but have unlike numbers of rows."""

    def forward(self, hidden_BTD: torch.Tensor, loss: Callable | None = None) -> torch.Tensor:
        """Logits (B, T, vocabulary), or what `loss` makes of the hidden rows and the map from some of them to logits."""
        return super().forward(hidden_BTD) if loss is None else loss(hidden_BTD, super().forward)


class SuppressImageToken:
    """A logits processor: the image token is never written."""

    def __init__(self, image_token_id: int):
        self.image_token_id = image_token_id

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[..., self.image_token_id] = -float("inf")
        return scores


class SaisaForConditionalGeneration(SaisaPreTrainedModel, GenerationMixin):
    """`SaisaModel` with the language model's head: answers questions about pictures, and trains to.

    Args:
        config: a `SaisaConfig`.
    """

    _tied_weights_keys = tied_weights("lm_head.weight", "model.language_model.embed_tokens.weight")

    def __init__(self, config: SaisaConfig):
        super().__init__(config)
        self.model = SaisaModel(config)
        self.lm_head = SaisaHead(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self._can_compile_fullgraph = self.language_model.family.compiles
        self.post_init()
        if not config.tie_word_embeddings:  # else it is the embedding, of which every process looks up whole rows
            self._tp_plan |= readable_tp_plan({"lm_head": "colwise_gather_output"})

    @classmethod
    def from_parts(cls, text_model, vision_model, *, image_token_id=None, dtype=None, **arguments):
        """
        An untrained model from a language model and a vision encoder. On text alone it is that language model; its
        projectors are new: each linear map's weights and biases are uniform in +-1 / sqrt(inputs), as LLaVA's code makes
        them.

        Args:
            text_model: folder or hub id of a language model of a supported family, or a model of transformers with its
                head. The tensors of a model are shared, not copied.
            vision_model: folder or hub id of a vision encoder, also of a CLIP or SigLIP with a text tower, or an encoder of
                transformers, which becomes the vision tower itself.
            image_token_id: the image token's index. If embedding and head have no such row, they get rows up to it, the mean
                of the old ones, which `generation_config.suppress_tokens` keeps out of answers. None: the first new row.
            dtype: of all weights; None is the language model's.
            arguments: of `SaisaConfig`: `vision_feature_layer`, `visual_layers`, `projector_hidden_size` ...

        Returns:
            the model in eval mode, with the language model's generation config.

        Raises:
            ValueError: a part is of no supported kind, is quantized, lacks tensors, or does not fit the arguments.
            OSError: a folder or repository cannot be read.
        """

        def make_model(config, encoder):
            with torch.device("meta"):
                model = cls(config)
            model.model.vision_tower = as_vision_tower(encoder)
            model.language_model.rotary_emb = model.language_model.family.rotary_embedding()
            return model

        arguments |= {"image_token_id": image_token_id, "dtype": dtype}
        return assemble(make_model, SaisaVisualProjector, cls.config_class, text_model, vision_model, **arguments)

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

    def get_decoder(self):
        return self.model.get_decoder()

    def set_decoder(self, decoder):
        self.model.set_decoder(decoder)

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, new_embeddings):
        self.lm_head = new_embeddings

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> SaisaImageFeatures:
        """See `SaisaModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    def get_visual_states(self, pixel_values: torch.Tensor, store: str | None = None, **kwargs) -> SaisaVisualStates:
        """See `SaisaModel.get_visual_states`."""
        return self.model.get_visual_states(pixel_values, store, **kwargs)

    def unshare_projectors(self):
        """See `SaisaModel.unshare_projectors`."""
        self.model.unshare_projectors()

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
        visual_states: SaisaVisualStates | None = None,
        skip_logits: bool = False,
        cache=None,
        **kwargs,
    ) -> SaisaCausalLMOutputWithPast:
        """
        Arguments as in `SaisaModel.forward`, and

        Args:
            labels: (B, S), -100 is ignored. A label counts only if the position before it is a text position: a visual
                token has no output to predict from, and beside images neither has padding. In embedding space all count.
                Placeholders should be -100: `Trainer` divides by the number of labels that are not, and the text token in
                front of a picture would learn to predict them.
            logits_to_keep: 0 for the logits of all positions, n for the last n, or a 1-D tensor of positions.
            skip_logits: with `labels`, return the loss alone. Logits are then made for the labelled rows only, some at a
                time, and again in backward: training needs no memory for (B, S, vocabulary).
            kwargs: of the loss: `num_items_in_batch`, `ignore_index` in place of -100, and `shift_labels`, (B, S), which are
                at the position that predicts them. (A `model.loss_function` of one's own gets rows of text alone, (B, T), and
                as `shift_labels` what they are to predict.) All others are handed on, to it and as in `SaisaModel.forward`.

        Raises:
            ValueError: see `SaisaModel.forward`; or `labels` are not as many as the input tokens.
        """
        names = ("num_items_in_batch", "ignore_index", "shift_labels")
        loss_arguments = {name: kwargs.pop(name) for name in names if name in kwargs}
        ignored = loss_arguments.get("ignore_index", IGNORED)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(past_key_values, cache),
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            visual_states=visual_states,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        layout = TokenLayout(None)
        pictures = pixel_values if visual_states is None else visual_states
        if pictures is not None and len(pictures) and not self.config.in_embedding_space:
            visual_BS = self.model.get_placeholder_mask(input_ids, inputs_embeds)
            real_BS = real_tokens(attention_mask, visual_BS.shape[1])
            layout = self.model._layout(visual_BS[:, kept], None, None, None if real_BS is None else real_BS[:, kept])
        hidden_BTD = layout.text(outputs.last_hidden_state[:, kept])
        vocab_size = self.config.text_config.vocab_size

        logits, loss, targets_BT = None, None, None
        if labels is not None:
            targets_BS = loss_arguments.pop("shift_labels", None)
            for name, given in (("labels", labels), ("shift_labels", targets_BS)):
                expected = tuple(outputs.last_hidden_state.shape[:2])
                if given is not None and tuple(given.shape) != expected:
                    raise ValueError(f"{name} is {tuple(given.shape)}: expected {expected}, one for each input token.")
            if targets_BS is None:
                targets_BS = nn.functional.pad(labels, (0, 1), value=ignored)[:, 1:]
            targets_BT = layout.text(targets_BS[:, kept]).contiguous()
            if layout.visual_BS is not None:
                targets_BT = targets_BT.masked_fill(~layout.is_text_BT.to(targets_BT.device), ignored)
        if skip_logits and targets_BT is not None:
            targets_BT = targets_BT.masked_fill(targets_BT == ignored, IGNORED)
            loss = self._loss(hidden_BTD, targets_BT, loss_arguments.get("num_items_in_batch"))
        else:
            logits_BTX = self.language_model.family.scaled_logits(self.lm_head(hidden_BTD))
            logits = layout.align(logits_BTX)
            if targets_BT is not None:
                loss_arguments |= {**kwargs, "shift_labels": targets_BT}
                loss = self.loss_function(logits=logits_BTX, labels=labels, vocab_size=vocab_size, **loss_arguments)
        return SaisaCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            **{CACHE: outputs.get(CACHE)},
        )

    def _loss(self, hidden_BTD: torch.Tensor, targets_BT: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        """The loss by logits that exist for some rows at a time."""

        def loss(hidden_BTD, head):
            def logits(hidden_ND):
                return self.language_model.family.scaled_logits(head(hidden_ND))

            vocab_size = self.config.text_config.vocab_size
            return chunked_cross_entropy(hidden_BTD, targets_BT, logits, vocab_size, num_items_in_batch)

        # whoever has put another head in its place, adapters for instance, has not told it of losses
        return self.lm_head(hidden_BTD, loss) if isinstance(self.lm_head, SaisaHead) else loss(hidden_BTD, self.lm_head)

    create_masks_for_generate = staticmethod(decoding_masks)

    def generate(self, inputs=None, generation_config=None, logits_processor=None, *args, **kwargs):
        """transformers' own, with two differences about pictures. It never answers with the image token, which stands for
        visual tokens alone, and it reads the prompt at once: `prefill_chunk_size` is for text.
        """
        cache = one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None))
        if cache is not None:
            kwargs[CACHE] = cache
        pixel_values, visual_states = kwargs.get("pixel_values"), kwargs.get("visual_states")
        _check_one_of(pixel_values, visual_states)
        given = next((x for x in (inputs, *map(kwargs.get, ("input_ids", "inputs_embeds"))) if x is not None), None)
        has_pictures = pixel_values is not None or visual_states is not None
        if not has_pictures and given is not None and not given.is_floating_point():  # they may be in the cache
            has_pictures = bool((given == self.config.image_token_id).any())
        if has_pictures and given is None:
            raise ValueError(
                "Expected input_ids, or inputs_embeds, with placeholders for the pictures: got pictures alone."
            )
        if has_pictures:
            logits_processor = [*(logits_processor or []), SuppressImageToken(self.config.image_token_id)]
            kwargs["prefill_chunk_size"] = None
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
        visual_states=None,
        cache=None,
        **kwargs,
    ):
        """transformers' own, and the pictures whose placeholders are among the tokens that are not in the cache yet.

        Raises:
            ValueError: the last token of a prompt is visual, so that nothing can be predicted from it (but in embedding
                space).
        """
        cache = one_cache(past_key_values, cache)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            **{CACHE: cache},
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            **kwargs,
        )
        pictures = _given(
            pixel_values=pixel_values,
            pixel_attention_mask=pixel_attention_mask,
            spatial_shapes=spatial_shapes,
            visual_states=visual_states,
        )
        if pixel_values is None and visual_states is None:
            return model_inputs
        new_ids, new_embeds = model_inputs.get("input_ids"), model_inputs.get("inputs_embeds")
        length = (new_ids if new_embeds is None else new_embeds).shape[1]
        if length == 1 and cache is not None and input_ids.shape[1] > 1:
            # in embedding space a prompt may end in a picture, which may be of one token
            is_picture = self.config.in_embedding_space and (input_ids[:, -1] == self.config.image_token_id).any()
            if not is_picture:
                return model_inputs  # a decoding step
        visual_BS = self.model.get_placeholder_mask(new_ids, new_embeds)
        if not visual_BS.any():
            return model_inputs
        real_BS = torch.ones_like(visual_BS)
        if attention_mask is not None and attention_mask.ndim == 2:
            real_BS = attention_mask[:, -length:].bool().to(visual_BS.device)  # transformers may have moved the ids
        last_B1 = (real_BS * torch.arange(1, length + 1, device=real_BS.device)).argmax(1, keepdim=True)
        if visual_BS.gather(1, last_B1).any() and not self.config.in_embedding_space:
            raise ValueError(
                "The last token of a prompt is a visual token, and visual tokens predict nothing. Put a text token, a "
                "newline for instance, behind the image."
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
        """transformers' own, but each row's pictures stay together, as rows may have different numbers of them."""
        pictures = _given(**{name: model_kwargs.pop(name, None) for name in PICTURES})
        if pictures and expand_size > 1:
            placeholders_BS = self.model.get_placeholder_mask(input_ids, model_kwargs.get("inputs_embeds"))
            cache = one_cache(model_kwargs.get("past_key_values"), model_kwargs.get("cache"))
            cached = 0 if cache is None else int(cache.get_seq_length())
            new_B, all_B = (mask_BS.sum(1).tolist() for mask_BS in (placeholders_BS[:, cached:], placeholders_BS))
            tokens = self._visual_tokens(pictures, sum(new_B), sum(all_B))
            if sum(tokens) != sum(all_B):  # then they are those of the new turn
                name = "visual_states" if "visual_states" in pictures else "pixel_values"
                self.model.check_visual_tokens(name, tokens, sum(new_B))
            rows = _pictures_by_row(all_B if sum(tokens) == sum(all_B) else new_B, tokens)
            order = [picture for row in rows for _ in range(expand_size) for picture in row]
            if "pixel_values" in pictures and order:  # a picture is encoded once for all sequences of its row
                pictures = {"visual_states": self.model.get_visual_states(**pictures)}
            pictures = {name: value[order] for name, value in pictures.items()}
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        return input_ids, {**model_kwargs, **pictures}

    def generate_batch(self, inputs, *args, **kwargs):
        """transformers' own continuous batching, which is for text: it has no place for pictures.

        Raises:
            ValueError: a prompt holds the image token.
        """
        for index, ids in enumerate(inputs):
            if self.config.image_token_id in torch.as_tensor(ids).flatten().tolist():
                raise ValueError(
                    f"inputs[{index}] holds the image token ({self.config.image_token_id}), but generate_batch carries no "
                    "images. Use generate for prompts with images."
                )
        return super().generate_batch(inputs, *args, **kwargs)

    def _get_candidate_generator(self, *args, **kwargs):
        """transformers' own; a draft model that takes no pictures is not handed them."""
        draft, given = kwargs.get("assistant_model"), kwargs.get("model_kwargs")
        if draft is not None and given is not None:
            known = inspect.signature(draft.forward).parameters
            kwargs["model_kwargs"] = {name: x for name, x in given.items() if name in known or name not in PICTURES}
        return super()._get_candidate_generator(*args, **kwargs)

    def _visual_tokens(self, pictures: dict, *placeholders: int) -> list[int]:
        """How many visual tokens each picture has. Where the encoder does not tell, the numbers of placeholders do that they
        may be meant for."""
        if "visual_states" in pictures:
            return pictures["visual_states"].lengths
        if "spatial_shapes" in pictures:
            kind, count = self.config.visual_token_reduction, self.config.reduced_visual_tokens
            grids = pictures["spatial_shapes"].tolist()
            return [reduced_length(kind, count, rows * columns, (rows, columns)) for rows, columns in grids]
        pixel_values = pictures["pixel_values"]
        count, size = len(pixel_values), tuple(getattr(pixel_values, "shape", ())[2:])
        each = self.config.visual_tokens_of(*size) if len(size) == 2 else None
        if each is not None:
            return [each] * count
        each = self.config.image_seq_length
        if count and count * each not in placeholders and placeholders[-1] % count == 0:
            each = placeholders[-1] // count
        return [each] * count


def _check_one_of(pixel_values, visual_states):
    if pixel_values is not None and visual_states is not None:
        raise ValueError("Expected pixel_values or visual_states, got both: the states stand in place of the pictures.")


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
