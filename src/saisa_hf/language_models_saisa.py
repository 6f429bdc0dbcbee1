# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The supported language models: one class per family, which says how its decoder differs from Llama's.

`modeling_saisa.py` has the decoder that they share. A decoder layer adds to its input the output of self-attention, and then
that of the feed-forward network; each of the two may have a norm in front and one behind. Visual features enter where the
text enters self-attention: behind the norm in front of it, or, in a family without one, as they leave the projector.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from .compat_saisa import ACT2FN, RotaryByLayerType, init, part_of_language_model


class LayerNorms(NamedTuple):
    """The names of a decoder layer's norms; None where there is none."""

    before_attention: str | None = None
    after_attention: str | None = None
    before_feed_forward: str | None = None
    after_feed_forward: str | None = None


def gated_plan(network: str, gate: str, up: str, down: str) -> dict[str, str]:
    """The tensor parallel plan of the feed-forward network of that name in a decoder layer."""
    styles = {gate: "colwise", up: "colwise", down: "rowwise"}
    return {f"layers.*.{network}.{name}": style for name, style in styles.items()}


class LanguageModelFamily:
    """Llama, and the default of all others. `config` is the language model's."""

    prefix = "Llama"  # what transformers' classes of the family begin with
    norms = LayerNorms(before_attention="input_layernorm", before_feed_forward="post_attention_layernorm")
    head_norm: str | None = None  # "head" or "width" (all heads together): what queries and keys are normalised over
    fused_projection = False  # whether queries, keys and values come from one matrix, `qkv_proj`
    feed_forward_name = "mlp"
    compiles = True  # whether a step of decoding is one graph to `torch.compile`
    only: dict = {}  # fields of the config and the one value that is supported, where transformers knows others
    residual_multiplier = 1.0

    def __init__(self, config):
        self.config = config

    def part(self, name: str):
        """transformers' class `name` of this family, or its function."""
        return part_of_language_model(self.config.model_type, name if name.islower() else self.prefix + name)

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
    def rotate_half(self) -> Callable:
        """The rotation by a quarter turn."""
        return self.part("rotate_half")

    @property
    def eager_attention(self) -> Callable:
        """Attention in plain matrix products, which also returns the probabilities."""
        return self.part("eager_attention_forward")

    @property
    def head_dim(self) -> int:
        return getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads

    @property
    def qkv_bias(self) -> bool:
        return self.config.attention_bias

    output_bias = qkv_bias

    @property
    def scaling(self) -> float:
        """What scores are multiplied by."""
        return self.head_dim**-0.5

    @property
    def softcap(self) -> float | None:
        """The bound of the scores where the implementation knows one; sdpa, which 4.57 runs all the same, does not."""
        return None

    @property
    def attention_types(self) -> tuple[str, ...]:
        """For each decoder layer `"full_attention"` or `"sliding_attention"`."""
        return ("full_attention",) * self.config.num_hidden_layers

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
        return gated_plan("mlp", "gate_proj", "up_proj", "down_proj")

    def checkpoint_name(self, name: str) -> str:
        """The name in checkpoints of what transformers calls `name`."""
        return name

    def feed_forward_sizes(self) -> list[int]:
        """Inner width of each layer's feed-forward network that a token passes."""
        return [self.config.intermediate_size] * self.config.num_hidden_layers


class WindowEverywhere(LanguageModelFamily):
    """All layers have the window that the config names, or none has."""

    @property
    def attention_types(self):
        kind = "full_attention" if self.config.sliding_window is None else "sliding_attention"
        return (kind,) * self.config.num_hidden_layers


class WindowByLayer(LanguageModelFamily):
    """The config says of each layer whether it has the window."""

    @property
    def attention_types(self):
        return tuple(self.config.layer_types)


class Mistral(WindowEverywhere):
    prefix = "Mistral"
    qkv_bias = output_bias = False


class Qwen2(WindowByLayer):
    prefix = "Qwen2"
    qkv_bias, output_bias = True, False


class Qwen3(WindowByLayer):
    prefix = "Qwen3"
    head_norm = "head"


class Gemma2(WindowByLayer):
    """Norms on both sides, scaled embeddings, bounded scores and logits."""

    prefix = "Gemma2"
    norms = LayerNorms(
        "input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"
    )
    only = {"use_bidirectional_attention": False}

    def embedding(self):
        size, width, padding = self.config.vocab_size, self.config.hidden_size, self.config.pad_token_id
        return ScaledEmbedding(size, width, padding, scale=width**0.5)

    @property
    def scaling(self):
        return self.config.query_pre_attn_scalar**-0.5

    @property
    def softcap(self):
        return self.config.attn_logit_softcapping

    def scaled_logits(self, x):
        bound = self.config.final_logit_softcapping
        return x if bound is None else torch.tanh(x / bound) * bound


class Gemma3(Gemma2):
    """Its layers with a window have a rotary embedding of their own; queries and keys are normalised, scores unbounded."""

    prefix = "Gemma3"
    head_norm = "head"
    softcap = None


class Phi3(WindowEverywhere):
    """Fused projections, and a rotation of part of each head."""

    prefix = "Phi3"
    fused_projection = True
    qkv_bias = output_bias = False
    only = {"resid_pdrop": 0.0}

    def feed_forward_plan(self):
        return {"layers.*.mlp.gate_up_proj": "colwise_gather_output", "layers.*.mlp.down_proj": "rowwise_split_input"}


class Olmo2(LanguageModelFamily):
    """Norms behind attention and feed-forward network alone; queries and keys are normalised across heads."""

    prefix = "Olmo2"
    norms = LayerNorms(after_attention="post_attention_layernorm", after_feed_forward="post_feedforward_layernorm")
    head_norm = "width"


class Granite(LanguageModelFamily):
    """A multiplier on everything."""

    prefix = "Granite"

    @property
    def scaling(self):
        return self.config.attention_multiplier

    @property
    def residual_multiplier(self):
        return self.config.residual_multiplier

    def scaled_input(self, x):
        return x * self.config.embedding_multiplier

    def scaled_logits(self, x):
        return x / self.config.logits_scaling


class SmolLM3(WindowByLayer):
    """Some layers know no positions."""

    prefix = "SmolLM3"

    def rotates(self, layer_idx):
        return bool(self.config.no_rope_layers[layer_idx])


class Qwen3Moe(WindowEverywhere):
    """Experts in place of the feed-forward network of most layers."""

    prefix = "Qwen3Moe"
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
        return plan | gated_plan("mlp.experts.*", "gate_proj", "up_proj", "down_proj")

    def feed_forward_sizes(self):
        config = self.config
        sparse = config.moe_intermediate_size * config.num_experts_per_tok
        return [sparse if self.is_sparse(i) else config.intermediate_size for i in range(config.num_hidden_layers)]


class Mixtral(WindowEverywhere):
    """Experts in place of every feed-forward network."""

    prefix = "Mixtral"
    qkv_bias = output_bias = False
    feed_forward_name = "block_sparse_moe"
    compiles = False
    only = {"output_router_logits": False, "router_jitter_noise": 0.0}

    def feed_forward(self, layer_idx):
        experts = [MixtralExpert(self.config) for _ in range(self.config.num_local_experts)]
        return Experts(self.config, experts, normalised=True)

    def feed_forward_plan(self):
        return gated_plan("block_sparse_moe.experts.*", "w1", "w3", "w2")

    def checkpoint_name(self, name):
        name = name.replace(".mlp.", ".block_sparse_moe.")
        for theirs, ours in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
            name = name.replace(theirs, ours)
        return name

    def feed_forward_sizes(self):
        return [width * self.config.num_experts_per_tok for width in super().feed_forward_sizes()]


FAMILIES: dict[str, type[LanguageModelFamily]] = {
    "llama": LanguageModelFamily,
    "mistral": Mistral,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
    "gemma2": Gemma2,
    "gemma3_text": Gemma3,
    "phi3": Phi3,
    "olmo2": Olmo2,
    "granite": Granite,
    "smollm3": SmolLM3,
    "qwen3_moe": Qwen3Moe,
    "mixtral": Mixtral,
}


def language_model_family(config) -> LanguageModelFamily:
    """What is particular about the decoder of `config`, which has a `model_type` of `FAMILIES`: `SaisaConfig` checks that."""
    return FAMILIES[config.model_type](config)


def choose_attention(config) -> None:
    """Puts eager attention in the place of sdpa in the config of a language model that transformers does not run with it."""
    if config._attn_implementation == "sdpa" and not language_model_family(config).supports_sdpa:
        config._attn_implementation = "eager"


def checkpoint_state_dict(decoder) -> dict[str, torch.Tensor]:
    """The tensors of `decoder`, transformers' model without its head, under their names in checkpoints and here. transformers
    5 joins the experts of a layer in memory: they are copied."""
    weights = {}
    for name, x in decoder.state_dict().items():
        joined = re.fullmatch(r"(.*\.experts)\.(gate_up_proj|down_proj)", name)
        if joined is None:
            weights[name] = x
            continue
        for expert, of_expert in enumerate(x):
            kinds = joined[2].replace("gate_up", "gate_proj up").split()
            for kind, part in zip(kinds, of_expert.chunk(len(kinds))):
                weights[f"{joined[1]}.{expert}.{kind}.weight"] = part.clone()
    family = language_model_family(decoder.config)
    return {family.checkpoint_name(name): x for name, x in weights.items()}


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
