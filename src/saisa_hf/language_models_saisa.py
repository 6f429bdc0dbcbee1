# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The supported language models: one class per family, which says how its decoder differs from Llama's.

`modeling_saisa.py` has the decoder that they share. A decoder layer adds to its input the output of self-attention, and then
that of the feed-forward network; each of the two may have a norm in front and one behind. Visual features enter where the
text enters self-attention: behind the norm in front of it, or, in a family without one, as they leave the projector.
"""

from operator import attrgetter
from typing import NamedTuple

import torch
from torch import nn

from .compat_saisa import ACT2FN, RotaryByLayerType, init, needed


FAMILIES: dict[str, type["LanguageModelFamily"]] = {}  # by `model_type`, in the order in which they are defined here


class LayerNorms(NamedTuple):
    """The names of a decoder layer's norms; None where there is none."""

    before_attention: str | None = None
    after_attention: str | None = None
    before_feed_forward: str | None = None
    after_feed_forward: str | None = None


class LanguageModelFamily:
    """What Llama is, and the default of all others. `config` is the language model's. A family's class here is named as
    transformers' classes of the family begin."""

    norms = LayerNorms(before_attention="input_layernorm", before_feed_forward="post_attention_layernorm")
    head_norm: str | None = None  # "head" or "width" (all heads together): what queries and keys are normalised over
    windows: str | None = None  # layers with a sliding window: "everywhere" (where the config names one) or "by layer"
    qkv_bias = output_bias = property(attrgetter("config.attention_bias"))
    fused_projection = False  # whether queries, keys and values come from one matrix, `qkv_proj`
    softcap: float | None = None  # the bound of the scores; sdpa, which 4.57 runs all the same, knows none
    residual_multiplier = 1.0
    feed_forward_name = "mlp"
    compiles = True  # whether a step of decoding is one graph to `torch.compile`
    only: dict = {}  # fields of the config and the one value that is supported, where transformers knows others

    def __init_subclass__(cls, model_type: str):
        FAMILIES[model_type] = cls

    def __init__(self, config):
        self.config = config

    def part(self, name: str):
        """transformers' class `name` of this family."""
        folder = self.config.model_type.removesuffix("_text")
        module = f"transformers.models.{folder}.modeling_{folder}"
        return needed(f"Language models of type {self.config.model_type}", module, type(self).__name__ + name)

    def norm(self, size: int) -> nn.Module:
        return self.part("RMSNorm")(size, eps=self.config.rms_norm_eps)

    def embedding(self) -> nn.Embedding:
        config = self.config
        return nn.Embedding(config.vocab_size, config.hidden_size, getattr(config, "pad_token_id", None))

    def rotary_embedding(self) -> nn.Module:
        """A module that maps `(x, position_ids, attention_type)` to the cosines and sines of the rotation."""
        return RotaryByLayerType(self.part("RotaryEmbedding"), self.config)

    def feed_forward(self, layer_idx: int) -> nn.Module:
        return self.part("MLP")(self.config)

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def scaling(self) -> float:
        """What scores are multiplied by."""
        return self.head_dim**-0.5

    @property
    def attention_types(self) -> tuple[str, ...]:
        """For each decoder layer `"full_attention"` or `"sliding_attention"`."""
        if self.windows == "by layer":
            return tuple(self.config.layer_types)
        has_window = self.windows == "everywhere" and self.config.sliding_window is not None
        return ("sliding_attention" if has_window else "full_attention",) * self.config.num_hidden_layers

    @property
    def supports_sdpa(self) -> bool:
        """Whether transformers runs the family with it; where not, eager attention takes its place."""
        return self.part("PreTrainedModel")._supports_sdpa

    def window(self, layer_idx: int) -> int | None:
        """How many positions a layer looks back, its own included; None: all."""
        return self.config.sliding_window if self.attention_types[layer_idx] == "sliding_attention" else None

    def rotates(self, layer_idx: int) -> bool:
        """Whether a layer's queries and keys are rotated by their positions."""
        return True

    def scaled_input(self, x: torch.Tensor) -> torch.Tensor:
        """What the first layer gets of embeddings `x`."""
        return x

    def scaled_logits(self, x: torch.Tensor) -> torch.Tensor:
        """What the head's output `x` becomes."""
        return x

    def tensor_parallel_plan(self) -> dict[str, str]:
        """How `tp_plan="auto"` shards the layers, by module. The outputs of a pair of linear maps are exchanged once, as sums
        behind the second; attention that needs all heads at once has them gathered."""
        whole = self.fused_projection or self.head_norm == "width"
        first, second = ("colwise_gather_output", "rowwise_split_input") if whole else ("colwise", "rowwise")
        into = ["qkv_proj"] if self.fused_projection else ["q_proj", "k_proj", "v_proj"]
        plan = {f"layers.*.self_attn.{name}": first for name in into}
        plan |= {"layers.*.self_attn.o_proj": second} | self.feed_forward_plan()
        return plan | {"layers.*.visual_projector.linear_1": "colwise", "layers.*.visual_projector.linear_2": "rowwise"}

    def feed_forward_plan(self) -> dict[str, str]:
        return self.gated_plan("mlp")

    @staticmethod
    def gated_plan(network: str, into=("gate_proj", "up_proj"), out="down_proj") -> dict[str, str]:
        """The plan of feed-forward networks of that name."""
        return {f"layers.*.{network}.{name}": "colwise" for name in into} | {f"layers.*.{network}.{out}": "rowwise"}


class Llama(LanguageModelFamily, model_type="llama"):
    """The defaults."""


class Mistral(LanguageModelFamily, model_type="mistral"):
    windows = "everywhere"
    qkv_bias = output_bias = False


class Qwen2(LanguageModelFamily, model_type="qwen2"):
    windows = "by layer"
    qkv_bias, output_bias = True, False


class Qwen3(LanguageModelFamily, model_type="qwen3"):
    windows = "by layer"
    head_norm = "head"


class Gemma2(LanguageModelFamily, model_type="gemma2"):
    """Norms on both sides, scaled embeddings, bounded scores and logits."""

    windows = "by layer"
    norms = LayerNorms(
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    )
    softcap = property(attrgetter("config.attn_logit_softcapping"))
    only = {"use_bidirectional_attention": False}

    def embedding(self):
        size, width, padding = self.config.vocab_size, self.config.hidden_size, self.config.pad_token_id
        return ScaledEmbedding(size, width, padding, scale=width**0.5)

    @property
    def scaling(self):
        return self.config.query_pre_attn_scalar**-0.5

    def scaled_logits(self, x):
        bound = self.config.final_logit_softcapping
        return x if bound is None else torch.tanh(x / bound) * bound


class Gemma3(Gemma2, model_type="gemma3_text"):
    """Its layers with a window have a rotary embedding of their own; queries and keys are normalised, scores unbounded."""

    head_norm = "head"
    softcap = None


class Phi3(LanguageModelFamily, model_type="phi3"):
    """Fused projections, and a rotation of part of each head."""

    windows = "everywhere"
    fused_projection = True
    qkv_bias = output_bias = False
    only = {"resid_pdrop": 0.0}

    def feed_forward_plan(self):
        return {"layers.*.mlp.gate_up_proj": "colwise_gather_output", "layers.*.mlp.down_proj": "rowwise_split_input"}


class Olmo2(LanguageModelFamily, model_type="olmo2"):
    """Norms behind attention and feed-forward network alone; queries and keys are normalised across heads."""

    norms = LayerNorms(after_attention="post_attention_layernorm", after_feed_forward="post_feedforward_layernorm")
    head_norm = "width"


class Granite(LanguageModelFamily, model_type="granite"):
    """A multiplier on everything."""

    scaling = property(attrgetter("config.attention_multiplier"))
    residual_multiplier = property(attrgetter("config.residual_multiplier"))

    def scaled_input(self, x):
        return x * self.config.embedding_multiplier

    def scaled_logits(self, x):
        return x / self.config.logits_scaling


class SmolLM3(LanguageModelFamily, model_type="smollm3"):
    """Some layers know no positions."""

    windows = "by layer"

    def rotates(self, layer_idx):
        return bool(self.config.no_rope_layers[layer_idx])


class Qwen3Moe(LanguageModelFamily, model_type="qwen3_moe"):
    """Experts in place of the feed-forward network of most layers."""

    windows = "everywhere"
    head_norm = "head"
    compiles = False
    only = {"output_router_logits": False}

    def is_sparse(self, layer_idx: int) -> bool:
        config = self.config
        listed = layer_idx in config.mlp_only_layers
        return not listed and config.num_experts > 0 and (layer_idx + 1) % config.decoder_sparse_step == 0

    def feed_forward(self, layer_idx):
        config, mlp = self.config, self.part("MLP")
        if not self.is_sparse(layer_idx):
            return mlp(config, intermediate_size=config.intermediate_size)
        experts = [mlp(config, intermediate_size=config.moe_intermediate_size) for _ in range(config.num_experts)]
        return Experts(config, experts, normalised=config.norm_topk_prob)

    def feed_forward_plan(self):
        plan = super().feed_forward_plan() if not all(map(self.is_sparse, range(self.config.num_hidden_layers))) else {}
        return plan | self.gated_plan("mlp.experts.*")


class Mixtral(LanguageModelFamily, model_type="mixtral"):
    """Experts in place of every feed-forward network."""

    windows = "everywhere"
    qkv_bias = output_bias = False
    feed_forward_name = "block_sparse_moe"
    compiles = False
    only = {"output_router_logits": False, "router_jitter_noise": 0.0}

    def feed_forward(self, layer_idx):
        experts = [MixtralExpert(self.config) for _ in range(self.config.num_local_experts)]
        return Experts(self.config, experts, normalised=True)

    def feed_forward_plan(self):
        return self.gated_plan("block_sparse_moe.experts.*", into=("w1", "w3"), out="w2")


def language_model_family(config) -> LanguageModelFamily:
    """What is particular about the decoder of `config`, which has a `model_type` of `FAMILIES`: `SaisaConfig` checks that."""
    return FAMILIES[config.model_type](config)


def choose_attention(config) -> None:
    """Puts eager attention in the place of sdpa in the config of a language model that transformers does not run with it."""
    if config._attn_implementation == "sdpa" and not language_model_family(config).supports_sdpa:
        config._attn_implementation = "eager"


def initialize(module: nn.Module) -> None:
    """Initialises the parts above that transformers' rules for new weights do not know."""
    name = type(module).__name__
    if name.startswith("Gemma") and "RMSNorm" in name:
        init.zeros_(module.weight)  # it stands for the deviation from one
    elif "RotaryEmbedding" in name and hasattr(module, "layer_types"):
        with torch.device("cpu"):
            new = dict(type(module)(module.config).named_buffers())
        for key, buffer in module.named_buffers():
            init.copy_(buffer, new[key])
    elif getattr(module, "image_newline", None) is not None:
        init.normal_(module.image_newline, std=len(module.image_newline) ** -0.5)


class ScaledEmbedding(nn.Embedding):
    """An embedding whose rows are handed out times `scale`, rounded to their dtype, as Gemma was trained."""

    def __init__(self, *args, scale: float):
        super().__init__(*args)
        self.scale = scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(input_ids) * torch.tensor(self.scale, dtype=self.weight.dtype, device="cpu")


class MixtralExpert(nn.Module):
    """A gated MLP under Mixtral's names."""

    def __init__(self, config):
        super().__init__()
        self.w1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.w2 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.w3 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class Experts(nn.Module):
    """A mixture of experts, modules (rows, D) -> (rows, D): each token passes those with the largest gates, whose weights add
    up to one if `normalised`. Every expert is a module of its own, as in checkpoints: so it is named, quantized and adapted
    alike on every release."""

    def __init__(self, config, experts: list[nn.Module], normalised: bool):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, len(experts), bias=False)
        self.experts = nn.ModuleList(experts)
        self.chosen, self.normalised = config.num_experts_per_tok, normalised

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., D) -> (..., D)."""
        x_RD = x.flatten(0, -2)
        precise = torch.promote_types(x.dtype, torch.float32)
        weight_RE, expert_RE = self.gate(x_RD).softmax(-1, dtype=precise).topk(self.chosen, dim=-1)
        if self.normalised:
            weight_RE = weight_RE / weight_RE.sum(-1, keepdim=True)
        output_RD = torch.zeros_like(x_RD)
        for expert in expert_RE.unique().tolist():
            place, rows = (expert == expert_RE.T).nonzero(as_tuple=True)
            y = self.experts[expert](x_RD[rows]) * weight_RE[rows, place, None].to(x_RD.dtype)
            output_RD.index_add_(0, rows, y)
        return output_RD.view_as(x)
