# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Fewer visual tokens: what may stand between the vision encoder's features and the projectors.

Visual tokens cost a SAISA keys and values in each layer; there are four ways here to have fewer of them:

- `"avg_pool"`: the mean of each 2 x 2 patches;
- `"pixel_unshuffle"`: the features of each 2 x 2 patches side by side, four times as wide (InternVL, Idefics 3);
- `"resampler"`: learned queries that attend to the features (Flamingo, Qwen-VL), a module trained with the projectors;
- `"class_attention"`: the patches that the encoder's class token attends to most, in the layer that the features are taken
  from (FasterVLM, VisionZip).

Shape suffixes: I pictures, V visual tokens of a picture before and R behind the reduction, C width of the features.
"""

import math

import torch
from torch import nn


OF_CELLS = ("avg_pool", "pixel_unshuffle")  # one token for 2 x 2
OF_A_NUMBER = ("resampler", "class_attention")  # as many as `reduced_visual_tokens` says
REDUCTIONS = OF_CELLS + OF_A_NUMBER
# encoders with a class token in front, blocks that normalise first, and no rotation of queries and keys
CLASS_ATTENTION_ENCODERS = ("clip_vision_model", "dinov2", "dinov2_with_registers", "vit")


def check_reduction(config) -> None:
    """Raises ValueError if `visual_token_reduction` and `reduced_visual_tokens` do not fit the rest of a `SaisaConfig`."""
    kind, count, vision = config.visual_token_reduction, config.reduced_visual_tokens, config.vision_config.model_type
    check_choice(kind, count, config.image_seq_length)
    kept = config.kept_prefix_tokens
    if kind not in (None, "resampler") and kept:
        raise ValueError(
            f"visual_token_reduction={kind!r} is for a grid of patches, but vision_feature_select_strategy='full' hands on "
            f"{kept} tokens of {vision} that are no patches: choose 'default'."
        )
    if kind != "class_attention":
        return
    if vision not in CLASS_ATTENTION_ENCODERS:
        raise ValueError(
            f"visual_token_reduction='class_attention' needs the attention of a class token, which {vision} has not, or has "
            f"in another form: expected an encoder among {', '.join(CLASS_ATTENTION_ENCODERS)}, or another reduction."
        )
    states = config.vision_config.num_hidden_layers + 1
    layers = config.vision_feature_layers
    if len(layers) != 1 or layers[0] % states == 0:
        raise ValueError(
            f"visual_token_reduction='class_attention' ranks patches by the attention of one layer of the encoder, but "
            f"vision_feature_layer={config.vision_feature_layer!r}: choose one layer, and not the embeddings (0)."
        )
    patches = config.encoder_tokens_per_image
    if count > patches:
        raise ValueError(
            f"reduced_visual_tokens={count}, but {vision} makes {patches} of a picture: keep as many or fewer."
        )


def check_choice(kind, count, image_seq_length=None) -> None:
    """Raises ValueError if there is no such reduction, or not with that number, or `image_seq_length` contradicts it."""
    if kind is not None and kind not in REDUCTIONS:
        raise ValueError(
            f"visual_token_reduction={kind!r} is not supported: expected None or one of {', '.join(map(repr, REDUCTIONS))}."
        )
    if kind in OF_A_NUMBER and not (isinstance(count, int) and not isinstance(count, bool) and count > 0):
        raise ValueError(
            f"reduced_visual_tokens={count!r}: visual_token_reduction={kind!r} needs the number of visual tokens that a "
            "picture is to have."
        )
    if kind in OF_A_NUMBER and image_seq_length not in (None, count):
        raise ValueError(
            f"image_seq_length={image_seq_length!r}, but reduced_visual_tokens={count} says how many visual tokens a picture "
            "has: leave image_seq_length out."
        )
    if kind not in OF_A_NUMBER and count is not None:
        raise ValueError(
            f"reduced_visual_tokens={count!r} goes with visual_token_reduction='resampler' or 'class_attention', not with "
            f"{kind!r}: leave it out."
        )


def reduced_length(kind: str | None, count: int | None, tokens: int, grid: tuple[int, int]) -> int:
    """Visual tokens of a picture whose `tokens` lie in `grid`, (rows, columns). Odd rows and columns are rounded up."""
    if kind in OF_A_NUMBER:
        return count
    return math.ceil(grid[0] / 2) * math.ceil(grid[1] / 2) if kind in OF_CELLS else tokens


def grid_of(tokens: int, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of `tokens` in a grid over a picture of `height` x `width` whose cells are nearest to squares."""
    divisors = [rows for rows in range(1, tokens + 1) if tokens % rows == 0]
    rows = min(divisors, key=lambda rows: abs(math.log(rows * rows / tokens * width / height)))
    return rows, tokens // rows


def pooled(features_IVC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(I, V, C) -> (I, R, C): means of 2 x 2 features, at an odd edge of those that there are."""
    maps = features_IVC.transpose(1, 2).unflatten(-1, grid)
    maps = nn.functional.avg_pool2d(maps, 2, ceil_mode=True, count_include_pad=False)
    return maps.flatten(2).transpose(1, 2)


def unshuffled(features_IVC: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """(I, V, C) -> (I, R, 4 C): 2 x 2 features side by side, row by row; beyond an odd edge they are zero."""
    rows, columns = grid
    maps = features_IVC.unflatten(1, grid)
    maps = nn.functional.pad(maps, (0, 0, 0, columns % 2, 0, rows % 2))
    maps = maps.unflatten(2, (-1, 2)).unflatten(1, (-1, 2))  # (I, rows / 2, 2, columns / 2, 2, C)
    return maps.transpose(2, 3).flatten(3).flatten(1, 2)


def class_attention(encoder: nn.Module, config, hidden_states: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """How much the encoder's class token attends to each of its tokens in the layer that the features are taken from.

    Only this row is computed, from what enters the layer: the encoder keeps its attention implementation.

    Args:
        encoder: a vision tower of `CLASS_ATTENTION_ENCODERS`.
        config: the `SaisaConfig`.
        hidden_states: all states of the encoder, (I, tokens, C) each.

    Returns:
        float32 (I, tokens), probabilities averaged over heads, class token first.
    """
    blocks = next(
        part
        for part in encoder.modules()
        if isinstance(part, nn.ModuleList) and len(part) == config.vision_config.num_hidden_layers
    )
    index = config.vision_feature_layers[0] % len(hidden_states) - 1
    block = blocks[index]
    norm = next(part for part in block.children() if isinstance(part, nn.LayerNorm))
    projections = {name.rpartition(".")[-1]: part for name, part in block.named_modules()}
    query, key = (
        next(projections[name] for name in names if name in projections)
        for names in (("q_proj", "query"), ("k_proj", "key"))
    )
    with torch.no_grad():
        x_ITC = norm(hidden_states[index])
        heads = config.vision_config.num_attention_heads
        query_IN1H, key_INTH = (
            x.unflatten(-1, (heads, -1)).transpose(1, 2).float() for x in (query(x_ITC[:, :1]), key(x_ITC))
        )
        scores_IN1T = query_IN1H @ key_INTH.transpose(-1, -2) * query_IN1H.shape[-1] ** -0.5
        return scores_IN1T.softmax(-1).mean(1).squeeze(1)


def most_attended(attention_IT: torch.Tensor, count: int, features_IVC: torch.Tensor) -> torch.Tensor:
    """(I, count): the patches with the largest of the attention (I, tokens), whose last V are patches, in their order."""
    patches = features_IVC.shape[1]
    if count > patches:
        raise ValueError(
            f"reduced_visual_tokens={count}, but the picture has {patches} patches: keep as many or fewer."
        )
    return attention_IT[:, -patches:].topk(count, dim=1).indices.sort(dim=1).values


class SaisaVisualResampler(nn.Module):
    """Learned queries that attend to a picture's features: one layer of cross-attention with a residual around it.

    Args:
        config: a `SaisaConfig` with `visual_token_reduction="resampler"`. Heads are as many as the encoder has.
    """

    def __init__(self, config):
        super().__init__()
        width = config.vision_feature_size
        heads = getattr(config.vision_config, "num_attention_heads", 1)
        self.heads = heads if isinstance(heads, int) and width % heads == 0 else 1
        self.queries = nn.Embedding(config.reduced_visual_tokens, width)
        nn.init.normal_(self.queries.weight, std=0.02)
        self.query_norm = nn.LayerNorm(width)
        self.feature_norm = nn.LayerNorm(width)
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.o_proj = nn.Linear(width, width)

    def forward(self, features_IVC: torch.Tensor) -> torch.Tensor:
        """(I, V, C) -> (I, R, C), in its own dtype."""
        # by a call, since it may be elsewhere until then
        queries_RC = self.queries(torch.arange(self.queries.num_embeddings, device=features_IVC.device))
        normed_IVC = self.feature_norm(features_IVC.to(queries_RC.dtype))
        query_RC = self.q_proj(self.query_norm(queries_RC)).expand(len(features_IVC), -1, -1)
        heads = (query_RC, self.k_proj(normed_IVC), self.v_proj(normed_IVC))
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in heads)
        read_INRH = nn.functional.scaled_dot_product_attention(query, key, value)
        return queries_RC + self.o_proj(read_INRH.transpose(1, 2).flatten(2))
