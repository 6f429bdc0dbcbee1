# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""How much arithmetic a training step does, and how much a device can do.

It counts the matrix products of forward and backward, a multiply-add as two operations, and again what backward recomputes
(gradient checkpointing, the loss). A weight that is not trained has no product for its gradient, and neither has an input
before everything that is trained. Attention scores count for all pairs of queries and keys, masked or not.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from ..attention_saisa import implementation_of
from ..costs.flops import encoder_flops


# the FLOPs of a batch are linear in these: text tokens (with padding), visual tokens, learned tokens, images, and pairs of
# queries and keys, in layers where only text has queries and in layers where visual tokens have them, too
COUNTS = ("text", "visual", "learned", "images", "pairs", "all_pairs")
# bfloat16 TFLOP/s of matrix products without sparsity, by a part of the device's name; the first match counts
PEAK_TFLOPS = {
    "B200": 2250, "H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "A40": 150, "A10G": 70,
    "L40S": 362, "L40": 181, "L4": 121, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def peak_tflops(device: torch.device) -> float:
    """Peak bfloat16 TFLOP/s of `device`, 0 if not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return float(next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0))


class StepFlops:
    """FLOPs of training a SAISA on a batch, in this process.

    Args:
        model: a `SaisaForConditionalGeneration`, or a `peft.PeftModel` of one, with `requires_grad` and checkpointing as in
            training. Weights may be spread over processes, or in 4 bits.
    """

    def __init__(self, model: nn.Module):
        model = model.get_base_model() if hasattr(model, "get_base_model") else model
        base, config = model.model, model.config
        self.image_token_id = config.image_token_id
        self.visual_tokens_predict = config.in_embedding_space
        self._each = dict.fromkeys(COUNTS, 0.0)
        encoder_learns = _learns(base.vision_tower)
        again = 1 if base.language_model.gradient_checkpointing else 0
        self._each["images"] = encoder_flops(config) * ((3 + again) if encoder_learns else 1)

        features_learn, layers = encoder_learns, base.language_model.layers
        if config.visual_token_reduction == "resampler":
            self._add_resampler(base.visual_resampler, config, encoder_learns)
            features_learn = encoder_learns or _learns(base.visual_resampler)
        if config.projector_sharing == "shared":
            self._add_projector(base.visual_projector, features_learn, 0)
            features_learn = features_learn or _learns(base.visual_projector)
        embedding = base.language_model.embed_tokens
        asked = any(
            getattr(hook, "__name__", "") == "make_inputs_require_grads" for hook in embedding._forward_hooks.values()
        )
        text_learns = _learns(embedding) or asked
        for layer in layers:
            text_learns, features_learn = self._add_layer(layer, text_learns, features_learn, again)
        for _, size, learns in _products(model.lm_head):  # computed again in backward
            self._each["learned"] += 2 * size * (2 + text_learns + learns)

    def counts(self, inputs: dict) -> torch.Tensor:
        """`COUNTS` of a batch of the model's inputs, float64 on its device."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        tiles = inputs.get("num_tiles")  # of images that are read as several pictures
        images = torch.tensor(len(inputs.get("pixel_values", ())), device=ids.device) if tiles is None else tiles.sum()
        visual = (ids == self.image_token_id).sum()
        text_BS, text = ids != self.image_token_id, ids.numel() - visual
        predicts_BS = text_BS | self.visual_tokens_predict
        if images and not self.visual_tokens_predict:  # as many columns as the sample with most text has
            if inputs.get("attention_mask") is not None:
                text_BS = predicts_BS = text_BS & inputs["attention_mask"].bool()
            text = len(ids) * text_BS.sum(1).max()
        learned = ((labels[:, 1:] != -100) & predicts_BS[:, :-1]).sum()
        pairs = [text_BS.sum(1).max() * ids.numel(), torch.tensor(ids.shape[1] * ids.numel(), device=ids.device)]
        return torch.stack([text, visual, learned, images, *pairs]).double()

    def __call__(self, counts: torch.Tensor) -> float:
        """FLOPs of `counts`, those of one batch or a sum over batches."""
        return sum(count * self._each[name] for name, count in zip(COUNTS, counts.tolist()))

    def _add_resampler(self, resampler: nn.Module, config, encoder_learns: bool) -> None:
        """Its queries, computed once for all images, are left out."""
        count, tokens, learns = config.reduced_visual_tokens, config.encoder_tokens_per_image, _learns(resampler)
        inputs_learn = {"o": learns or encoder_learns, "k": encoder_learns or _learns(resampler.feature_norm)}
        for name, size, trained in _products(resampler):
            rows = {"k": tokens, "v": tokens, "o": count}.get(name[0], 0)
            gets = inputs_learn["o" if name[0] == "o" else "k"]
            self._each["images"] += 2 * rows * size * (1 + (gets or "lora_B" in name) + trained)
        scores = 4 * count * tokens * config.vision_feature_size
        self._each["images"] += scores * (1 + 2 * (learns or encoder_learns))

    def _add_projector(self, projector: nn.Module, features_learn: bool, again: int) -> None:
        learns = features_learn
        for part in (projector.linear_1, projector.linear_2):
            for name, size, trained in _products(part):
                self._each["visual"] += 2 * size * (1 + again + (learns or "lora_B" in name) + trained)
            learns = learns or _learns(part)

    def _add_layer(self, layer: nn.Module, text_learns: bool, features_learn: bool, again: int) -> tuple[bool, bool]:
        """Adds a decoder layer. Its inputs, of text and of visual tokens, do or do not need a gradient; returns whether its
        outputs do."""
        attend, fed = (getattr(layer, name, False) for name in ("visual_tokens_attend", "visual_tokens_are_fed"))
        if attend:  # text and visual tokens are one tensor
            text_learns = features_learn = text_learns or features_learn
        attention, norms = layer.self_attn, layer.norms
        norm_learns, norm_behind_learns, middle_norm_learns = (
            name is not None and _learns(getattr(layer, name)) for name in norms[:3]
        )
        projector = getattr(layer, "visual_projector", None)
        visual_learns = norm_learns or features_learn or (projector is not None and _learns(projector))
        into_queries = text_learns or norm_learns
        inner = [part for name, part in attention.named_children() if name != "o_proj"]
        attended_learns = into_queries or (layer.sees_image and visual_learns) or any(map(_learns, inner))
        middle_learns = attended_learns or _learns(attention.o_proj) or norm_behind_learns or middle_norm_learns
        feed_forward = getattr(layer, layer.feed_forward_name)
        output_learns = text_learns or middle_learns or _learns(feed_forward)
        again = again if output_learns else 0

        if projector is not None:
            self._add_projector(projector, features_learn, again)
        for name, size, trained in _products(attention):
            gets = attended_learns if name.startswith("o_proj") else into_queries
            for rows in ("text", "visual")[: 1 + attend]:
                self._each[rows] += 2 * size * (1 + again + (gets or "lora_B" in name) + trained)
            if layer.sees_image and not attend and name.startswith(("k_proj", "v_proj", "qkv_proj")):
                self._each["visual"] += 2 * size * (1 + again + (visual_learns or "lora_B" in name) + trained)
        # in backward: two products for each product; a fused kernel computes the first one again
        queries_learn = into_queries or any(_learns(part) for part in inner if part not in _of_keys(attention))
        backward = (1.5 + 0.5 * queries_learn if implementation_of(attention) == "eager" else 2.5) * attended_learns
        heads = attention.config.num_attention_heads * attention.head_dim
        self._each["all_pairs" if attend else "pairs"] += 2 * 2 * heads * (1 + again + backward)

        text = attention.config
        products = list(_products(feed_forward))
        for name, size, trained in products:
            # the newer checkpointing stops when it has everything that backward needs
            last = name == products[-1][0] and norms.after_feed_forward is None and "experts" not in name
            made_again = 0 if last and not _reentrant(layer) else again
            if "experts" in name:
                size *= text.num_experts_per_tok / getattr(text, "num_local_experts", getattr(text, "num_experts", 0))
            for rows in ("text", "visual")[: 1 + fed]:
                self._each[rows] += 2 * size * (1 + made_again + (middle_learns or "lora_B" in name) + trained)
        return output_learns, output_learns if fed else features_learn or (attend and middle_learns)


def _learns(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def _of_keys(attention: nn.Module) -> list[nn.Module]:
    """The modules that compute keys and values, of an attention with separate maps."""
    return [getattr(attention, name) for name in ("k_proj", "v_proj", "k_norm") if hasattr(attention, name)]


def _reentrant(layer: nn.Module) -> bool:
    """Whether `layer` has the older kind of checkpointing."""
    how = getattr(layer, "_gradient_checkpointing_func", None)
    return isinstance(how, partial) and bool(how.keywords.get("use_reentrant", False))


def _products(module: nn.Module) -> Iterator[tuple[str, float, bool]]:
    """For each weight matrix its name, how many of its numbers a token is multiplied with, and whether it is trained."""
    for name, p in module.named_parameters():
        if getattr(p, "quant_state", None) is not None:
            shape = p.quant_state.shape
        else:
            shape = getattr(p, "ds_shape", p.shape)
        if len(shape) < 2:
            continue
        yield name, float(torch.Size(shape).numel()), p.requires_grad
