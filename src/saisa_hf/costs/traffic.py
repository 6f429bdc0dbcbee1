# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a forward pass moves through memory beside the operands of its matrix products, from the configuration alone.

Each operation counts as one pass over its tensors, fused with its neighbours where nothing but elementwise arithmetic lies
between: a norm reads and writes its rows; a residual adds to rows that the next norm reads anyway, so that it reads one
tensor and writes one; an activation reads two inner rows and writes their product; queries are read and written by their
rotation, keys and values on their way into the cache. Nothing else counts: no mask, no softmax, no copy that a model could
do without. Letters as in `products.py`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ..configuration_saisa import SaisaConfig
from ..language_models_saisa import language_model_family
from .products import Step, feed_forward_sizes, has_visual_outputs, keeps_visual, visual_rows


@dataclass(frozen=True)
class Traffic:
    """A tensor of (rows, width) that is read or written so many times.

    Attributes:
        part: `"embedding"`, `"norms"`, `"residuals"`, `"activations"`, `"rotation"` or `"cache"`.
    """

    part: str
    rows: int
    width: int
    times: int


def traffic(config: SaisaConfig, architecture: str, step: Step, cross_every: int, placed: int = 0) -> Iterator[Traffic]:
    """The traffic of one forward pass, tensor by tensor. The encoder's is not counted.

    Args:
        config, architecture, step, cross_every: as for `step_flops`.
        placed: visual tokens of a sample whose kept keys and values go into the cache in this pass.
    """
    text, family = config.text_config, language_model_family(config.text_config)
    h = text.hidden_size
    q, k = (heads * family.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    visual = 0 if architecture == "language_model" else step.visual
    travels = has_visual_outputs(config, architecture)
    seeing = step.batch if step.seeing is None else step.seeing

    def moved(part: str, rows: int, width: int, times: int = 2, samples: int = step.batch) -> Iterator[Traffic]:
        if rows:
            yield Traffic(part, samples * rows, width, times)

    yield from moved("embedding", step.text + visual * travels, h)
    if architecture == "llava" or (architecture == "saisa" and config.projector_sharing == "shared"):
        inner = h if architecture == "llava" else config.projector_hidden_size or h
        yield from moved("activations", visual, inner, samples=seeing)
    for layer, inner in enumerate(feed_forward_sizes(family)):
        attend, fed = visual_rows(config, architecture, layer)
        rows, fed_rows = step.text + visual * attend, step.text + visual * fed
        sees = architecture == "saisa" and config.sees_image(layer)
        if sees and not attend and config.projector_sharing == "per_layer":
            yield from moved("activations", visual, config.projector_hidden_size or h, samples=seeing)
        if architecture == "flamingo" and layer % cross_every == 0:
            for _ in ("attention", "feed-forward"):
                yield from moved("norms", step.text, h)
                yield from moved("residuals", step.text, h)
            yield from moved("activations", step.text, text.intermediate_size, 3)
        norms = family.norms
        if norms.before_attention:
            yield from moved("norms", rows, h)
            normed = config.folded_width if config.fold_projectors else h
            yield from moved("norms", visual * (sees and not attend), normed, samples=seeing)
        yield from moved("rotation", rows, q)
        kept = step.text + (visual + placed) * keeps_visual(config, architecture, layer)
        yield from moved("cache", kept, k, 4)
        for name, normed in (
            (norms.after_attention, rows),
            (norms.before_feed_forward, fed_rows),
            (norms.after_feed_forward, fed_rows),
        ):
            yield from moved("norms", normed * bool(name), h)
        yield from moved("residuals", rows, h)
        yield from moved("residuals", fed_rows, h)
        yield from moved("activations", fed_rows, inner, 3)
    yield from moved("norms", step.text + visual * travels, h)
