# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The matrix products of a forward pass, one by one, from the configuration alone: of a SAISA, of a LLaVA and of a Flamingo
with the same language model and encoder. `flops.py` adds them up.

The SAISA is the model of the configuration, even if that is in embedding space (see `embedding_space_saisa.py`).

Letters: t text and v visual tokens of a sample, h hidden size, q and k widths of all query and of all key heads, m inner
width of the feed-forward network, c width of the encoder's features, p inner width of the projectors.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..configuration_saisa import SaisaConfig
from ..language_models_saisa import LanguageModelFamily, language_model_family


PARTS = ("encoder", "projectors", "attention projections", "attention scores", "feed-forward", "head")
ARCHITECTURES = ("saisa", "llava", "flamingo", "language_model")


@dataclass(frozen=True)
class Step:
    """The tokens of one forward pass.

    Attributes:
        text, visual: new tokens of each sample.
        cached_text, cached_visual: tokens that are in the cache already.
        batch: samples.
        logits: rows of each sample that the head is applied to; None: all that have an output.
        seeing: samples that have the new visual tokens; None: all. The others are padded to the same length. Not for NAAViT
            and ShortV, in whose layers padding takes the place of text.
    """

    text: int
    visual: int
    cached_text: int = 0
    cached_visual: int = 0
    batch: int = 1
    logits: int | None = 1
    seeing: int | None = None

    def next_token(self) -> "Step":
        """The step that decodes one more token after this one."""
        text, visual = self.cached_text + self.text, self.cached_visual + self.visual
        return replace(self, text=1, visual=0, cached_text=text, cached_visual=visual)


@dataclass(frozen=True)
class Pairs:
    """The queries and keys of an attention.

    Attributes:
        samples, queries, keys: each sample has so many queries and keys.
        heads, key_heads, size: heads of the queries, heads of the keys, width of a head.
        cached: of the keys, those that are in the cache already.
        causal: whether a query sees no key behind it. The last key is that of the last query.
    """

    samples: int
    queries: int
    keys: int
    heads: int
    key_heads: int
    size: int
    cached: int = 0
    causal: bool = True

    @property
    def flops(self) -> int:
        """Of the products with keys and with values, of all pairs."""
        return 4 * self.samples * self.heads * self.size * self.queries * self.keys

    @property
    def visible_flops(self) -> int:
        """The same of the pairs in which the query sees the key."""
        hidden = self.queries * (self.queries - 1) // 2 if self.causal else 0
        return self.flops - 4 * self.samples * self.heads * self.size * hidden


@dataclass(frozen=True)
class Product:
    """Matrix products of one kind in the forward pass.

    Attributes:
        part: one of `PARTS`.
        flops: two per multiply-add.
        sizes: (rows, inputs, outputs) of a product with a weight; None for queries with keys and probabilities with values.
        layer: of the decoder; None outside.
        of: what is multiplied: the `"features"` that projectors read, `"visual"` tokens on the way from a projector, the
            `"text"` that enters a layer, what is `"attended"`, that is behind its attention, or `"normed"`, in a resampler.
        pairs: queries and keys that are multiplied without a weight, in a decoder.
    """

    part: str
    flops: int
    sizes: tuple[int, int, int] | None = None
    layer: int | None = None
    of: str = "text"
    pairs: Pairs | None = None


def products(
    config: SaisaConfig, architecture: str, step: Step, cross_every: int, folded: bool = False
) -> Iterator[Product]:
    """The matrix products of one forward pass, one by one (see `step_flops`), of a SAISA whose projectors are `folded` or
    not."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture={architecture!r}: expected one of {', '.join(map(repr, ARCHITECTURES))}.")
    text, family, batch = config.text_config, language_model_family(config.text_config), step.batch
    h = text.hidden_size
    q, k = (heads * family.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    c, p = config.vision_feature_size, config.projector_hidden_size or h
    visual = 0 if architecture == "language_model" else step.visual
    seen = 0 if architecture == "language_model" else step.visual + step.cached_visual
    seeing = batch if step.seeing is None else step.seeing

    def linear(part: str, rows: int, inputs: int, outputs: int, layer: int | None = None, of: str = "text") -> Product:
        rows *= seeing if of in ("features", "visual") else batch
        return Product(part, 2 * rows * inputs * outputs, (rows, inputs, outputs), layer, of)

    def projector(inner: int, layer: int | None = None, folded: bool = False) -> Iterator[Product]:
        yield linear("projectors", visual, c, inner, layer, "features")
        if not folded:
            yield linear("projectors", visual, inner, h, layer, "visual")
        elif family.norms.before_attention is not None:
            yield linear("projectors", visual, config.folded_width, config.folded_width, layer, "visual")

    def attention(queries: int, new: int, layer: int, cached: int = 0, causal: bool = True) -> Product:
        heads = (text.num_attention_heads, text.num_key_value_heads, family.head_dim)
        pairs = Pairs(batch, queries, new + cached, *heads, cached, causal)
        return Product("attention scores", pairs.flops, pairs=pairs, layer=layer)

    def feed_forward(rows: int, inner: int, layer: int) -> Iterator[Product]:
        for inputs, outputs in ((h, inner), (h, inner), (inner, h)):
            yield linear("feed-forward", rows, inputs, outputs, layer, "attended")

    if visual and config.visual_token_reduction == "resampler":
        yield from resampler_products(config, seeing * -(-visual // config.reduced_visual_tokens))
    if architecture == "llava":
        yield from projector(h)
    if architecture == "saisa" and config.projector_sharing == "shared":
        yield from projector(p, folded=folded)
    for layer, inner in enumerate(feed_forward_sizes(family)):
        attend, fed = visual_rows(config, architecture, layer)
        rows, fed_rows = step.text + visual * attend, step.text + visual * fed
        if architecture == "flamingo" and layer % cross_every == 0:
            yield linear("attention projections", step.text, h, q, layer)
            for _ in ("keys", "values"):  # transformers' Idefics computes those of the image again in each step
                yield linear("attention projections", seen, c, k, layer, "features")
            yield attention(step.text, seen, layer, causal=False)
            yield linear("attention projections", step.text, q, h, layer, "attended")
            yield from feed_forward(step.text, text.intermediate_size, layer)
        if architecture == "saisa" and config.sees_image(layer) and not attend:
            if config.projector_sharing == "per_layer":
                yield from projector(p, layer, folded)
            if folded:
                yield linear("attention projections", visual, config.folded_width, 2 * k, layer, "visual")
            else:  # one matrix for queries, keys and values computes queries as well, which nothing uses
                for outputs in (q, k, k) if family.fused_projection else (k, k):
                    yield linear("attention projections", visual, h, outputs, layer, "visual")
        for outputs in (q, k, k):
            yield linear("attention projections", rows, h, outputs, layer)
        new = step.text + visual * keeps_visual(config, architecture, layer)
        yield attention(rows, new, layer, cached_tokens(config, architecture, layer, step))
        yield linear("attention projections", rows, q, h, layer, "attended")
        yield from feed_forward(fed_rows, inner, layer)
        yield linear("feed-forward", fed_rows, h, experts(family, layer), layer, "attended")
    rows = step.text + visual * has_visual_outputs(config, architecture)
    yield linear("head", rows if step.logits is None else step.logits, h, text.vocab_size)


def resampler_products(config: SaisaConfig, images: int) -> Iterator[Product]:
    """Those of a resampler's forward pass. Its queries are computed once for all images."""
    count, tokens, c = config.reduced_visual_tokens, config.encoder_tokens_per_image, config.vision_feature_size
    for rows, of in ((count, "normed"), (images * tokens, "normed"), (images * tokens, "normed")):
        yield Product("encoder", 2 * rows * c * c, (rows, c, c), of=of)
    yield Product("encoder", 4 * images * count * tokens * c)
    yield Product("encoder", 2 * images * count * c * c, (images * count, c, c), of="visual")


def has_visual_outputs(config: SaisaConfig, architecture: str) -> bool:
    """Whether visual tokens have hidden states."""
    return architecture == "llava" or (architecture == "saisa" and config.in_embedding_space)


def visual_rows(config: SaisaConfig, architecture: str, layer: int) -> tuple[bool, bool]:
    """Whether visual tokens are queries in a layer, and whether they pass through its feed-forward network."""
    if architecture == "saisa":
        return config.visual_tokens_attend(layer), config.visual_tokens_are_fed(layer)
    return architecture == "llava", architecture == "llava"


def keeps_visual(config: SaisaConfig, architecture: str, layer: int) -> bool:
    """Whether a layer has places for visual tokens among its keys, and in the model's own caches: in a SAISA layers that see
    the image, and those with a sliding window, which is counted in places of the input."""
    window = language_model_family(config.text_config).window(layer)
    return architecture == "llava" or (architecture == "saisa" and (config.sees_image(layer) or window is not None))


def cached_tokens(config: SaisaConfig, architecture: str, layer: int, step: Step) -> int:
    """Tokens of a sample that a layer finds in the cache: with a sliding window of n, at most n - 1."""
    tokens = step.cached_text + step.cached_visual * keeps_visual(config, architecture, layer)
    window = language_model_family(config.text_config).window(layer)
    return tokens if window is None else min(tokens, window - 1)


def experts(family: LanguageModelFamily, layer: int) -> int:
    """How many experts a token of the layer chooses among; 0 if there is one feed-forward network."""
    if hasattr(family, "is_sparse"):
        return family.config.num_experts if family.is_sparse(layer) else 0
    return getattr(family.config, "num_local_experts", 0)


def feed_forward_sizes(family: LanguageModelFamily) -> list[int]:
    """Inner width of each layer's feed-forward network that a token passes: of all its experts together, if it has some."""
    config = family.config
    width = config.intermediate_size
    sparse = getattr(config, "moe_intermediate_size", width) * getattr(config, "num_experts_per_tok", 1)
    return [sparse if experts(family, layer) else width for layer in range(config.num_hidden_layers)]
