# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""From pixels to keys and values in vLLM's paged cache: the encoder of `saisa_hf`, and projectors that vLLM can shard.

Shape suffixes: V visual tokens of a step, C width of the encoder's features, D hidden size, K key/value heads of this
process, H head size.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

from ...compat_saisa import ACT2FN
from ...vision_saisa import EncodesImages, NestedEncoder, SaisaVisualResampler, build_vision_tower


class VisualEncoder(EncodesImages, nn.Module):
    """The part of `SaisaModel` that makes features of images. Every process has all of it."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        # transformers builds it in the dtype that its config names, vLLM may run in another
        dtype = torch.get_default_dtype()
        self.vision_tower = build_vision_tower(config.vision_config).to(dtype)
        if config.visual_token_reduction == "resampler":
            self.visual_resampler = SaisaVisualResampler(config).to(dtype)

    def load_tower(self, tensors: dict[str, Tensor]) -> list[str]:
        """Loads the encoder from tensors named as in checkpoints, which transformers may have renamed since. Returns the
        names of its parameters. Raises ValueError if some are missing."""
        nested = isinstance(self.vision_tower, NestedEncoder)
        encoder = self.vision_tower.vision_model if nested else self.vision_tower
        own = {name.removeprefix("vision_model.") if nested else name: x for name, x in tensors.items()}
        loaded, info = type(encoder).from_pretrained(
            None, config=encoder.config, state_dict=own, dtype=torch.get_default_dtype(), output_loading_info=True
        )
        if missing := sorted(info["missing_keys"]):
            raise ValueError(
                f"The checkpoint lacks tensors of the vision tower: {', '.join(missing[:3])}, {len(missing)} in all."
            )
        encoder.load_state_dict(loaded.state_dict())
        return [name for name, _ in self.vision_tower.named_parameters()]

    def features(self, pixel_values, **sizes) -> tuple[Tensor, ...]:
        """(V, C) for each image. `pixel_values` is one tensor, or a list of them where images differ in size."""
        images = [pixel_values] if isinstance(pixel_values, Tensor) else [x[None] for x in pixel_values]
        found = []
        for i, batch in enumerate(images):
            own = {name: x if len(images) == 1 else x[i : i + 1] for name, x in sizes.items()}
            found += self.get_image_features(batch, return_dict=True, **own).pooler_output
        return tuple(found)


class Projector(nn.Module):
    """`SaisaVisualProjector` in layers of vLLM: the inner width is spread over the processes of tensor parallelism."""

    def __init__(self, config, quant_config, prefix: str):
        super().__init__()
        size = config.text_config.hidden_size
        inner_size = config.projector_hidden_size or size
        options = {"bias": config.projector_bias, "quant_config": quant_config}
        self.linear_1 = ColumnParallelLinear(
            config.vision_feature_size, inner_size, prefix=f"{prefix}.linear_1", **options
        )
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = RowParallelLinear(inner_size, size, prefix=f"{prefix}.linear_2", **options)

    def forward(self, features_VC: Tensor) -> Tensor:
        """(V, C) -> (V, D)."""
        return self.linear_2(self.act(self.linear_1(features_VC)[0]))[0]


class LayerKeysAndValues:
    """What a decoder layer of vLLM makes of visual rows: keys and values in its cache, and nothing else.

    Args:
        layer: a layer with `input_layernorm` and `self_attn`, as vLLM's classes of all families in `refusals.DECODERS` have.
    """

    def __init__(self, layer: nn.Module):
        self.norm, self.attention = layer.input_layernorm, layer.self_attn
        self.cached = self.attention.attn
        self._copy: tuple[Tensor, Tensor | None] | None = None

    def copy_weights(self) -> None:
        """Keeps the key and value rows of the projection: on a CPU vLLM packs the matrix and drops it after loading."""
        weight, bias = _weights(self.attention.qkv_proj)
        size = self.attention.q_size
        if weight is None or not weight.numel():
            return
        self._copy = weight[size:].detach().clone(), None if bias is None else bias[size:].detach().clone()

    def write(self, visual_VD: Tensor, positions_V: Tensor, slots_V: Tensor) -> None:
        """Puts keys and values of projected visual tokens into the paged cache, at `slots_V`."""
        key, value = self._keys_and_values(self.norm(visual_VD))
        cached = self.cached
        key_VKH = key.reshape(-1, cached.num_kv_heads, cached.head_size)
        value_VKH = value.reshape(-1, cached.num_kv_heads, cached.head_size_v)
        if (norm := getattr(self.attention, "k_norm", None)) is not None:
            key_VKH = norm(key_VKH)
        if (rotary := getattr(self.attention, "rotary_emb", None)) is not None:
            rotated, _ = rotary(positions_V, key_VKH.flatten(1).contiguous(), None)
            key_VKH = rotated.view_as(key_VKH)
        cached.impl.do_kv_cache_update(cached, key_VKH, value_VKH, cached.kv_cache, slots_V)

    def _keys_and_values(self, normed_VD: Tensor) -> tuple[Tensor, Tensor]:
        attention, projection = self.attention, self.attention.qkv_proj
        sizes = [attention.kv_size, attention.kv_size]
        if self._copy is not None:
            return F.linear(normed_VD, *self._copy).split(sizes, dim=-1)
        weight, bias = _weights(projection)
        if weight is not None and weight.dtype == normed_VD.dtype and len(weight) == attention.q_size + sum(sizes):
            bias = None if bias is None else bias[attention.q_size :]
            return F.linear(normed_VD, weight[attention.q_size :], bias).split(sizes, dim=-1)
        return projection(normed_VD)[0].split([attention.q_size, *sizes], dim=-1)[1:]  # quantized: it is one matrix


def _weights(projection) -> tuple[Tensor | None, Tensor | None]:
    return getattr(projection, "weight", None), getattr(projection, "bias", None)


class VisualCacheWriter(nn.Module):
    """The projectors of all layers, and what the layers make of their outputs.

    Args:
        layers: the decoder layers of vLLM's model.
        config: the `SaisaConfig`.
    """

    def __init__(self, layers, config, quant_config, prefix: str):
        super().__init__()
        count = 1 if config.projector_sharing == "shared" else len(layers)
        self.projectors = nn.ModuleList(
            Projector(config, quant_config, f"{prefix}.projectors.{i}") for i in range(count)
        )
        self.shared = config.projector_sharing == "shared"
        self.keys_and_values = [LayerKeysAndValues(layer) for layer in layers]

    def copy_weights(self) -> None:
        """See `LayerKeysAndValues.copy_weights`."""
        for one in self.keys_and_values:
            one.copy_weights()

    def write(self, features_VC: Tensor, positions_V: Tensor, slots_of: dict[str, Tensor]) -> None:
        """Puts the keys and values of visual tokens into the cache of every layer.

        Args:
            features_VC: the encoder's features.
            positions_V: positions of the tokens in their sequences.
            slots_of: (V,) places in the cache, by the name of the attention layer.
        """
        features_VC = features_VC.to(self.keys_and_values[0].norm.weight.dtype)
        shared_VD = self.projectors[0](features_VC) if self.shared else None
        for i, layer in enumerate(self.keys_and_values):
            visual_VD = self.projectors[i](features_VC) if shared_VD is None else shared_VD
            layer.write(visual_VD, positions_V, slots_of[layer.cached.layer_name])
