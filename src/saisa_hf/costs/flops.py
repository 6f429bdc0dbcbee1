# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a prompt costs, from the configuration alone: floating-point operations, parameters, cache and activations of a SAISA,
of a LLaVA and of a Flamingo with the same language model and encoder. What counts as the SAISA is the model of the
configuration, also where that is in embedding space (see `embedding_space_saisa.py`).

Counted are matrix products, a multiply-add as two, as PyTorch's `FlopCounterMode` counts them: all query-key pairs, whether
masked or not, no norms, activations, rotations and lookups. For a language model without grouped queries these are the
formulas of the paper (arXiv 2502.02458, section 3.3), which leaves out the encoder, the head and LLaVA's projector.

Letters: t text and v visual tokens of a sample, h hidden size, q and k widths of all query and of all key heads, m inner
width of the feed-forward network, c width of the encoder's features, p inner width of the projectors.
"""

import json
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, reduce

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

from ..common.tables import table
from ..configuration_saisa import SaisaConfig
from ..language_models_saisa import language_model_family
from ..vision_saisa import has_choice_of_attention, image_size
from .presets import CLIP_336, LANGUAGE_MODELS


NOTES = """\
A multiply-add is two FLOPs; all pairs of queries and keys count, masked or not; the head is applied to the last position.
(1) as the paper counts: SAISA's projectors are in, the encoder, the head and LLaVA's own projector are not
(2) the Flamingo makes keys and values of the picture anew for each token, as transformers' Idefics does
(3) forward and backward, without the encoder; logits at all positions that have an output\
"""
PARTS = ("encoder", "projectors", "attention projections", "attention scores", "feed-forward", "head")
ARCHITECTURES = ("saisa", "llava", "flamingo", "language_model")


@dataclass(frozen=True)
class Step:
    """What one forward pass is about.

    Attributes:
        text, visual: new tokens of each sample.
        cached_text, cached_visual: those that are in the cache already.
        batch: samples.
        logits: rows of each sample that the head is applied to; None: all that have an output.
    """

    text: int
    visual: int
    cached_text: int = 0
    cached_visual: int = 0
    batch: int = 1
    logits: int | None = 1

    def next_token(self) -> "Step":
        """The step that decodes one token behind this one."""
        text, visual = self.cached_text + self.text, self.cached_visual + self.visual
        return replace(self, text=1, visual=0, cached_text=text, cached_visual=visual)


@dataclass(frozen=True)
class Product:
    """Matrix products of one kind in the forward pass.

    Attributes:
        part: one of `PARTS`.
        flops: two per multiply-add.
        sizes: (rows, inputs, outputs) of a product with a weight; None for queries with keys and probabilities with values.
        layer: of the decoder; None outside.
        of: what is multiplied: the `"features"` that projectors read, `"visual"` tokens on the way from a projector, the
            `"text"` that enters a layer, what is `"attended"`, behind its attention, or what is `"normed"` in a resampler.
    """

    part: str
    flops: int
    sizes: tuple[int, int, int] | None = None
    layer: int | None = None
    of: str = "text"


def step_flops(config, architecture: str, step: Step, cross_every: int = 4) -> dict[str, int]:
    """FLOPs of one forward pass by part; of the encoder, a resampler behind it alone.

    Args:
        config: a `SaisaConfig`.
        architecture: one of `ARCHITECTURES`; `"language_model"` reads the text alone.
        cross_every: the Flamingo's gated cross-attention stands in front of each so many layers.

    Raises:
        ValueError: there is no such architecture.
    """
    counts = dict.fromkeys(PARTS, 0)
    for product in _products(config, architecture, step, cross_every):
        counts[product.part] += product.flops
    return counts


def training_flops(
    config, architecture: str, step: Step, trained: str = "full", rank: int = 64, cross_every: int = 4
) -> int:
    """FLOPs of a training step: forward and backward pass, the encoder left out but for a resampler behind it, without
    gradient checkpointing.

    A product with a weight costs as much again for the gradient of its input, where something below is trained, and for
    that of the weight, where it is trained. SAISA's loss makes its logits again in backward.

    Args:
        config, architecture, step, cross_every: as for `step_flops`; `step.logits` are a sample's rows that
            get logits.
        trained: `"full"` (all but the encoder), `"projectors"` and resampler, or `"lora"`: adapters on every linear map of
            decoder, projectors and resampler.
        rank: of the adapters.

    Raises:
        ValueError: `trained` is none of these, or asks for something that a Flamingo or a language model has not.
    """
    if trained not in ("full", "projectors", "lora") or (trained != "full" and architecture not in ("saisa", "llava")):
        raise ValueError(f"trained={trained!r}: expected 'full', or for SAISA and LLaVA 'projectors' or 'lora'.")
    full, adapted = trained == "full", trained == "lora"
    resampled = config.visual_token_reduction == "resampler"
    family = language_model_family(config.text_config)
    first = next(layer for layer in range(config.text_config.num_hidden_layers) if config.sees_image(layer))
    total = 0
    for product in _products(config, architecture, step, cross_every):
        layer = product.layer
        # whether what enters the layer, its queries and its keys depend on anything that is trained
        entering = full or architecture == "llava" or layer is None or layer > (0 if adapted else first)
        entering = entering or (architecture == "saisa" and config.visual_tokens_attend(layer))
        queries = entering or adapted
        keys = queries or layer == first
        if product.sizes is None:
            total += product.flops + product.flops // 2 * (queries + 3 * keys)
            continue
        inputs = {"features": resampled, "visual": True, "text": entering, "attended": keys, "normed": not adapted}
        needs_input = inputs[product.of]
        has_weight = full or (trained == "projectors" and product.part in ("projectors", "encoder"))
        again = architecture == "saisa" and product.part == "head"
        total += product.flops * (1 + needs_input + has_weight + again)
        routed = product.part == "feed-forward" and _gates(family, layer) > 0
        if adapted and product.part != "head" and not routed:
            rows, inputs, outputs = product.sizes
            total += 2 * rows * rank * (inputs * (2 + needs_input) + outputs * 3) * (outputs > 0)
    return total


def _products(config, architecture: str, step: Step, cross_every: int) -> Iterator[Product]:
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r}: expected one of {', '.join(map(repr, ARCHITECTURES))}.")
    text, family, batch = config.text_config, language_model_family(config.text_config), step.batch
    h = text.hidden_size
    q, k = (heads * family.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    c, p = config.vision_feature_size, config.projector_hidden_size or h
    visual = 0 if architecture == "language_model" else step.visual
    seen = 0 if architecture == "language_model" else step.visual + step.cached_visual

    def linear(part, rows, inputs, outputs, layer=None, of="text"):
        return Product(part, 2 * batch * rows * inputs * outputs, (batch * rows, inputs, outputs), layer, of)

    def projector(inner, layer=None):
        yield linear("projectors", visual, c, inner, layer, "features")
        yield linear("projectors", visual, inner, h, layer, "visual")

    def attention(queries, keys, layer):
        return Product("attention scores", 4 * batch * q * queries * keys, layer=layer)

    def feed_forward(rows, inner, layer):
        for inputs, outputs in ((h, inner), (h, inner), (inner, h)):
            yield linear("feed-forward", rows, inputs, outputs, layer, "attended")

    if visual and config.visual_token_reduction == "resampler":
        yield from resampler_products(config, batch * -(-visual // config.reduced_visual_tokens))
    if architecture == "llava":
        yield from projector(h)
    if architecture == "saisa" and config.projector_sharing == "shared":
        yield from projector(p)
    for layer, inner in enumerate(family.feed_forward_sizes()):
        attend, fed = _visual_rows(config, architecture, layer)
        rows, fed_rows = step.text + visual * attend, step.text + visual * fed
        if architecture == "flamingo" and layer % cross_every == 0:
            yield linear("attention projections", step.text, h, q, layer)
            for _ in ("keys", "values"):  # transformers' Idefics keeps none of the picture: each step makes them again
                yield linear("attention projections", seen, c, k, layer, "features")
            yield attention(step.text, seen, layer)
            yield linear("attention projections", step.text, q, h, layer, "attended")
            yield from feed_forward(step.text, text.intermediate_size, layer)
        if architecture == "saisa" and config.sees_image(layer) and not attend:
            if config.projector_sharing == "per_layer":
                yield from projector(p, layer)
            # from one matrix for queries, keys and values come queries as well, which nothing uses
            for outputs in (q, k, k) if family.fused_projection else (k, k):
                yield linear("attention projections", visual, h, outputs, layer, "visual")
        for outputs in (q, k, k):
            yield linear("attention projections", rows, h, outputs, layer)
        new = step.text + (0 if architecture == "flamingo" else visual)
        yield attention(rows, new + _cached(family, architecture, layer, step), layer)
        yield linear("attention projections", rows, q, h, layer, "attended")
        yield from feed_forward(fed_rows, inner, layer)
        yield linear("feed-forward", fed_rows, h, _gates(family, layer), layer, "attended")
    rows = step.text + visual * _has_visual_outputs(config, architecture)
    yield linear("head", rows if step.logits is None else step.logits, h, text.vocab_size)


def _has_visual_outputs(config, architecture: str) -> bool:
    """Whether visual tokens have hidden states."""
    return architecture == "llava" or (architecture == "saisa" and config.in_embedding_space)


def _visual_rows(config, architecture: str, layer: int) -> tuple[bool, bool]:
    """Whether visual tokens are queries in a layer, and whether they pass its feed-forward network."""
    if architecture == "saisa":
        return config.visual_tokens_attend(layer), config.visual_tokens_are_fed(layer)
    return architecture == "llava", architecture == "llava"


def resampler_products(config, pictures: int) -> Iterator[Product]:
    """Those of a resampler's forward pass, whose queries are made once for all pictures."""
    count, tokens, c = config.reduced_visual_tokens, config.encoder_tokens_per_image, config.vision_feature_size
    for rows, of in ((count, "normed"), (pictures * tokens, "normed"), (pictures * tokens, "normed")):
        yield Product("encoder", 2 * rows * c * c, (rows, c, c), of=of)
    yield Product("encoder", 4 * pictures * count * tokens * c)
    yield Product("encoder", 2 * pictures * count * c * c, (pictures * count, c, c), of="visual")


def _cached(family, architecture: str, layer: int, step: Step) -> int:
    """Tokens of a sample that a layer finds in the cache: behind a sliding window of n, n - 1 at most."""
    tokens = step.cached_text + (step.cached_visual if architecture in ("saisa", "llava") else 0)
    window = family.window(layer)
    return tokens if window is None else min(tokens, window - 1)


def _gates(family, layer: int) -> int:
    """How many experts a token of the layer chooses among; 0 where there is one feed-forward network."""
    if hasattr(family, "is_sparse"):
        return family.config.num_experts if family.is_sparse(layer) else 0
    return getattr(family.config, "num_local_experts", 0)


def cache_bytes(config, architecture: str, step: Step, itemsize: int) -> int:
    """Bytes of the keys and values in the cache behind `step`. All layers of a SAISA keep places for visual tokens, whether
    or not they see them; a Flamingo's cross-attention keeps nothing."""
    family, behind = language_model_family(config.text_config), step.next_token()
    tokens = sum(_cached(family, architecture, layer, behind) for layer in range(config.text_config.num_hidden_layers))
    return 2 * step.batch * tokens * config.text_config.num_key_value_heads * family.head_dim * itemsize


def activation_bytes(config, architecture: str, step: Step, itemsize: int) -> int:
    """About the most bytes that a prefill without a cache and with fused attention holds at once, beyond weights and
    features: a model of what the layers' tensors need (docs/flops.md says how good it is).

    Rows of the hidden states are held as embeddings, as the layer's input, behind its attention and behind a norm. On top of
    that comes the largest of three: the feed-forward network (two inner rows and their product), the queries, keys and
    values of attention, or, in a SAISA, a layer's visual tokens in the norm, which computes in float32.
    """
    text, family = config.text_config, language_model_family(config.text_config)
    h, c, size = text.hidden_size, config.vision_feature_size, family.head_dim
    q, k = (heads * size for heads in (text.num_attention_heads, text.num_key_value_heads))
    inner = max(family.feed_forward_sizes())
    t, v = step.text, 0 if architecture == "language_model" else step.visual
    layers = [_visual_rows(config, architecture, layer) for layer in range(text.num_hidden_layers)]
    attend, fed = map(any, zip(*layers))
    travel = _has_visual_outputs(config, architecture)
    held = 4 * (t + v * travel) * h + 2 * (t + (v if architecture in ("saisa", "llava") else 0)) * size
    feed_forward, attention, norm = 3 * (t + v * fed) * inner, (t + v * attend) * (3 * q + 2 * k), 0
    if travel:
        held += v * h
    if architecture == "flamingo":
        attention += 2 * v * k
    if architecture == "saisa" and not attend:
        held += 0 if travel else 2 * v * c
        feed_forward += 2 * v * k  # a layer keeps its visual keys and values until its end
        attention += 2 * v * k + 2 * (t + v) * k  # and joins them with the text's
        norm = v * h * (3 if itemsize == 4 else 1 + 8 // itemsize)
    return step.batch * itemsize * (held + max(feed_forward, attention, norm))


def parameters(config, architecture: str, cross_every: int = 4) -> dict[str, int]:
    """Parameters by part: those of SAISA are counted on a model without memory; a LLaVA has one projector in place of these,
    and a Flamingo gated cross-attention (with a feed-forward network, two norms and two gates) in front of each
    `cross_every` layers. A tied head has none."""
    text, family = config.text_config, language_model_family(config.text_config)
    counts = dict(_saisa_parameters(json.dumps(config.to_dict(), sort_keys=True, default=str)))
    if architecture == "saisa":
        return counts
    h, c, bias = text.hidden_size, config.vision_feature_size, config.projector_bias
    counts["projectors"] = c * h + h * h + 2 * h * bias if architecture == "llava" else 0
    if architecture == "flamingo":
        blocks = -(-text.num_hidden_layers // cross_every)
        q, k = (heads * family.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
        counts["attention"] += blocks * (2 * h * q + 2 * c * k)
        counts["feed-forward"] += blocks * 3 * h * text.intermediate_size
        counts["norms"] += blocks * (2 * h + 2)
    if architecture == "language_model":
        counts["encoder"] = 0
    return counts


@lru_cache(maxsize=8)
def _saisa_parameters(settings: str) -> tuple[tuple[str, int], ...]:
    from ..modeling_saisa import SaisaForConditionalGeneration

    plain = {key: value for key, value in json.loads(settings).items() if key != "quantization_config"}
    with torch.device("meta"):
        model = SaisaForConditionalGeneration(SaisaConfig.from_dict(plain))
    names = {"vision_tower.": "encoder", "visual_resampler.": "encoder"}
    names |= {"visual_projector.": "projectors", "self_attn.": "attention"}
    names |= {".mlp.": "feed-forward", "moe.": "feed-forward", "embed_tokens.": "embedding", "lm_head.": "head"}
    counts = dict.fromkeys(("encoder", "projectors", "embedding", "attention", "feed-forward", "norms", "head"), 0)
    for name, p in model.named_parameters():
        part = next((part for piece, part in names.items() if piece in name), "norms")
        counts[part] += p.numel()
    return tuple(counts.items())


def encoder_flops(config) -> int:
    """FLOPs of the vision encoder for one picture, counted on a model without memory, and of the choice among its patches by
    the attention of the class token. A picture is as large as the visual tokens say, and as the encoder is made for where
    they do not tell because they are reduced."""
    settings = json.dumps(config.vision_config.to_dict(), sort_keys=True, default=str)
    flops = _encoder_flops(settings, _image_size(config))
    if config.visual_token_reduction == "class_attention":  # one query, all keys, and their scores
        c, tokens = config.vision_config.hidden_size, config.encoder_tokens_per_image + config.dropped_vision_tokens
        flops += 2 * (1 + tokens) * c * c + 2 * tokens * c
    return flops


def _image_size(config) -> tuple[int, int]:
    """(height, width) of processed pictures. An encoder may be given others than its configuration names: DINOv2, whose
    positions are interpolated, gets 224 x 224 pixels from its image processor, and is configured for 518 x 518."""
    vision, (height, width) = config.vision_config, image_size(config.vision_config)
    kept, patch = config.kept_prefix_tokens, getattr(vision, "patch_size", None)
    if config.visual_token_reduction is None and isinstance(patch, int):
        of_patches = (height // patch) * (width // patch) + kept == config.encoder_tokens_per_image
        side = math.isqrt(config.image_seq_length - kept)
        if of_patches and side**2 + kept == config.image_seq_length != config.encoder_tokens_per_image:
            return side * patch, side * patch
    return height, width


@lru_cache(maxsize=8)
def _encoder_flops(settings: str, size: tuple[int, int]) -> int:
    config = CONFIG_MAPPING[json.loads(settings)["model_type"]].from_dict(json.loads(settings))
    arguments = {"attn_implementation": "eager"} if has_choice_of_attention(config) else {}
    channels = getattr(config, "num_channels", 3)
    with torch.device("meta"):
        encoder = AutoModel.from_config(config, **arguments).eval()
        dtype = next(encoder.parameters()).dtype
        inputs = {"pixel_values": torch.empty(1, channels, *size, dtype=dtype)}
        if config.model_type == "siglip2_vision_model":  # takes patches, and their number each way as values
            patches, side = config.num_patches, math.isqrt(config.num_patches)
            inputs["pixel_values"] = torch.empty(1, patches, channels * config.patch_size**2, dtype=dtype)
            inputs["pixel_attention_mask"] = None
            inputs["spatial_shapes"] = torch.tensor([[side, side]], device="cpu")
        with FlopCounterMode(display=False) as counter:
            encoder(**inputs)
    return counter.get_total_flops()


# --- a model's name, and the command line -----------------------------------------------------------------------------


def read_config(model: str) -> SaisaConfig:
    """The sizes of `model` as a SAISA's: a preset (`LANGUAGE_MODELS`), or the folder or hub id of a SAISA, of a LLaVA, or of
    a language model, which gets the paper's encoder.

    Raises:
        ValueError: it is a model of another kind.
        OSError: there is no such folder or repository.
    """
    if model in LANGUAGE_MODELS:
        return _with_encoder(dict(LANGUAGE_MODELS[model]), dict(CLIP_336))
    try:
        config = AutoConfig.from_pretrained(model)
    except OSError as error:
        raise OSError(
            f"{model!r} is no preset ({', '.join(LANGUAGE_MODELS)}), and no folder or hub id with a config.json: {error}"
        ) from error
    if isinstance(config, SaisaConfig):
        return config
    if hasattr(config, "vision_config") and hasattr(config, "text_config"):
        names = ("vision_feature_layer", "vision_feature_select_strategy")
        settings = {name: getattr(config, name) for name in names if hasattr(config, name)}
        settings["projector_bias"] = getattr(config, "multimodal_projector_bias", True)
        return _with_encoder(config.text_config, config.vision_config, **settings)
    return _with_encoder(config, dict(CLIP_336))


def _with_encoder(text_config, vision_config, **settings) -> SaisaConfig:
    # any token will do: nothing is counted by it
    return SaisaConfig(text_config=text_config, vision_config=vision_config, image_token_id=0, **settings)


def account(
    config, step: Step, itemsize: int = 2, generated: int = 0, cross_every: int = 4, trained: str = "full"
) -> dict:
    """All that `saisa flops` prints, by architecture.

    Args:
        config: a `SaisaConfig`.
        step: the prompt.
        itemsize: bytes of a number.
        generated: tokens to generate. The prompt's pass yields the first, and each of the others takes a pass.
        cross_every: see `step_flops`.
        trained: what a training step trains, see `training_flops`.

    Returns:
        for `"saisa"`, `"llava"` and `"flamingo"`: `prompt` (FLOPs by part), `language_model` (FLOPs as the paper counts
        them), `next_token`, `generated` (of all passes behind the prompt) and `training` (FLOPs), `parameters` (by part),
        `cache_bytes` (behind the last pass) and `activation_bytes`. The encoder takes as many whole pictures as the visual
        tokens fill.
    """
    pictures = step.batch * -(-step.visual // config.image_seq_length)
    found = {}
    for name in ARCHITECTURES[:3]:
        prompt = step_flops(config, name, step, cross_every)
        counted = {part: flops for part, flops in prompt.items() if part not in ("encoder", "head")}
        if name == "llava":
            counted.pop("projectors")
        last, decoded = step, []
        for _ in range(generated - 1):  # the first token comes out of the prompt's pass
            last = last.next_token()
            decoded.append(sum(step_flops(config, name, last, cross_every).values()))
        rows = step.text + step.visual * _has_visual_outputs(config, name)
        training = None
        if trained == "full" or name != "flamingo":
            learned = replace(step, logits=rows)
            training = training_flops(config, name, learned, trained, cross_every=cross_every)
        found[name] = {
            "prompt": prompt | {"encoder": prompt["encoder"] + pictures * encoder_flops(config)},
            "language_model": sum(counted.values()),
            "next_token": sum(step_flops(config, name, step.next_token(), cross_every).values()),
            "generated": sum(decoded),
            "training": training,
            "parameters": parameters(config, name, cross_every),
            "cache_bytes": cache_bytes(config, name, last, itemsize),
            "activation_bytes": activation_bytes(config, name, step, itemsize),
        }
    return found


def show(found: dict, generated: int = 0, cross_every: int = 4, trained: str = "full", own: str = "SAISA") -> str:
    """`account`'s result as tables, ratios last. `own` is what the model of the configuration is called."""
    names = {"saisa": own, "llava": "LLaVA", "flamingo": f"Flamingo, every {cross_every} layers"}

    def each(*keys):
        return [reduce(operator.getitem, keys, found[name]) for name in names]

    def row(what, values, unit, form=".2f"):
        return [what, *("" if value is None else f"{value / unit:{form}}" for value in values)]

    sums = [sum(parts.values()) for parts in each("prompt")]
    unit, letter = (1e12, "T") if max(sums) >= 1e11 else (1e9, "G") if max(sums) >= 1e8 else (1e6, "M")
    prompt = [row(part, each("prompt", part), unit) for part in PARTS]
    prompt += [row("all", sums, unit), row("language model (1)", each("language_model"), unit)]
    less = [1 - value / found["llava"]["language_model"] for value in each("language_model")]
    prompt.append(["against LLaVA", *(f"{abs(x):.0%} {'less' if x > 0 else 'more'}" if x else "" for x in less)])
    later = [row("next token (2)", each("next_token"), 1e9)]
    if generated:
        later.append(row(f"generating {generated} tokens, behind the prompt (2)", each("generated"), 1e9))
    later.append(row(f"training step, {trained} (3)", each("training"), 1e9))
    weights = [row(part, each("parameters", part), 1e6, ",.2f") for part in found["saisa"]["parameters"]]
    weights.append(row("all", [sum(parts.values()) for parts in each("parameters")], 1e6, ",.2f"))
    kept = [row("keys and values in the cache", each("cache_bytes"), 2**20, ",.2f")]
    kept.append(row("activations of the prompt, about", each("activation_bytes"), 2**20, ",.2f"))
    heads = (f"{letter}FLOPs of the prompt", "GFLOPs", "million parameters", "MiB")
    tables = [table([head, *names.values()], rows) for head, rows in zip(heads, (prompt, later, weights, kept))]
    return "\n\n".join([*tables, NOTES])
