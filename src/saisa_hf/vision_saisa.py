# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""From pixels to the features that the projectors read: the vision encoder, and ways to have fewer visual tokens.

The config of an encoder in `CLASS_TOKENS` says how many states it has, how wide, and of how many tokens. Any other that
`AutoModel` builds is run on an image on the meta device. `visual_token_reduction` names four ways to have fewer tokens:

- `"avg_pool"`: the mean of each 2 x 2 patches;
- `"pixel_unshuffle"`: the features of each 2 x 2 patches side by side, four times as wide (InternVL, Idefics 3);
- `"resampler"`: learned queries that attend to the features (Flamingo, Qwen-VL), trained with the projectors;
- `"class_attention"`: the patches that the class token attends to most in the layer of the features (FasterVLM, VisionZip).

Shape suffixes: I images, V visual tokens of an image before and R after the reduction, C width of the features.
"""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .compat_saisa import can_return_tuple, in_several_processes, model_class_of


# encoder -> how many tokens stand in front of its patch tokens
CLASS_TOKENS = {"clip_vision_model": 1, "siglip_vision_model": 0, "siglip2_vision_model": 0, "dinov2": 1, "convnext": 0}
# encoders with parameters below `vision_model` in transformers up to 5.5; here always, so that checkpoints have one layout
NESTED_ENCODERS = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model")
OF_CELLS = ("avg_pool", "pixel_unshuffle")  # one token for 2 x 2
OF_A_NUMBER = ("resampler", "class_attention")  # as many as `reduced_visual_tokens` says
REDUCTIONS = OF_CELLS + OF_A_NUMBER
# encoders with a class token in front, blocks that normalise first, and no rotation of queries and keys
CLASS_ATTENTION_ENCODERS = ("clip_vision_model", "dinov2", "dinov2_with_registers", "vit")
ROWS_AT_ONCE = 2**13  # visual tokens that are projected at a time, where no gradient needs them all
MOST_TOKENS = 2**20  # visual tokens per image: placeholders are lists and tensors of that length


def shown(value) -> str:
    """What messages say of a value, whatever its length."""
    if isinstance(value, int) and abs(value) >= 10**60:
        return f"an int of {value.bit_length()} bits"
    return f"{value[:50] if isinstance(value, list) else value!r:.300}"


def check_value(name: str, value, rule) -> None:
    """Raises ValueError unless `rule` allows it: (least, most), of whole numbers if ints; a list of choices; or a type."""
    if isinstance(rule, tuple):
        kinds, words = (int, "whole number") if isinstance(rule[0], int) else ((int, float), "number")
        fits = isinstance(value, kinds) and not isinstance(value, bool) and rule[0] <= value <= rule[1]
        expected = f"a {words} from {rule[0]} to {rule[1]}"
    elif isinstance(rule, list):
        fits = any(type(value) is type(one) and value == one for one in rule)  # 1 is no True
        expected = f"one of {', '.join(map(repr, rule))}"
    else:
        fits, expected = isinstance(value, rule), f"a {rule.__name__}"
    if not fits:
        raise ValueError(f"{name}={shown(value)}: expected {expected}.")


# --- vision encoders --------------------------------------------------------------------------------------------------


class EncoderStates(NamedTuple):
    """Of each state in an encoder's `hidden_states`, for images of the size that its config names."""

    widths: tuple[int, ...]  # channels
    tokens: tuple[int, ...]  # class and register tokens included; of a feature map, height times width
    prefix: int  # how many tokens stand in front of the patches


def encoder_states(config) -> EncoderStates:
    """What an encoder that is not in `CLASS_TOKENS` yields. Raises ValueError if it cannot be built or yields no states of an
    image, ImportError if it needs another package (timm)."""
    settings = {key: value for key, value in config.to_dict().items() if "attn_implementation" not in key}
    return _asked(type(config), json.dumps(settings, sort_keys=True, default=str))


def image_size(config) -> tuple[int, int]:
    """(height, width) of the images that an encoder is made for."""
    size = getattr(config, "image_size", None) or (getattr(config, "pretrained_cfg", None) or {}).get("input_size")
    return _pair(size or 224)


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size[-2:])


def has_choice_of_attention(config) -> bool:
    """Whether the encoder of `config` has attention whose implementation can be chosen; a convolutional one has none."""
    if (model_class := model_class_of(config)) is None:
        return config.model_type not in ("convnext", "convnextv2", "regnet", "resnet")
    return bool(getattr(model_class, "_supports_sdpa", False))


@lru_cache(maxsize=32)
def _asked(config_class: type, settings: str) -> EncoderStates:
    config = config_class.from_dict(json.loads(settings))
    given, (height, width) = f"vision_config.model_type={config.model_type!r}", image_size(config)
    try:
        with torch.device("meta"), torch.no_grad():
            encoder = AutoModel.from_config(config).eval()
            pixel_values = torch.empty(1, getattr(config, "num_channels", 3), height, width, dtype=encoder.dtype)
            states = encoder(pixel_values=pixel_values, output_hidden_states=True, return_dict=True).hidden_states
    except ImportError as error:
        extra = ": pip install timm" if config.model_type == "timm_wrapper" else ""
        raise ImportError(f"{given} needs a package that is not installed{extra}. {error}") from error
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        settings = ", ".join(f"{name}={shown(value)}" for name, value in config.to_diff_dict().items())
        raise ValueError(
            f"{given} is not supported: expected an encoder that takes images of {height} x {width} pixels as "
            f"`pixel_values`, such as {', '.join(CLASS_TOKENS)} or vit ({type(error).__name__}: {reason}). Its "
            f"settings: {settings}."
        ) from error
    if not states or any(state.ndim not in (3, 4) for state in states):
        raise ValueError(f"{given} is not supported: it yields no hidden states of patches.")
    hidden_size = getattr(config, "hidden_size", None)
    if any(state.ndim == 4 and state.shape[-1] == hidden_size != state.shape[1] for state in states):
        raise ValueError(f"{given} is not supported: its feature maps have channels last.")
    tokens = tuple(state.shape[2:].numel() if state.ndim == 4 else state.shape[1] for state in states)
    prefix, patch = 0, getattr(config, "patch_size", None)
    if patch is not None and len(set(tokens)) == 1 and states[0].ndim == 3:  # beyond those of a grid of patches
        rows, columns = _pair(patch)
        prefix = max(tokens[0] - (height // rows) * (width // columns), 0)
    return EncoderStates(tuple(state.shape[1 if state.ndim == 4 else 2] for state in states), tokens, prefix)


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
    # transformers refuses any other choice for an encoder without attention
    choice = {} if has_choice_of_attention(config) else {"attn_implementation": "eager"}
    return as_vision_tower(AutoModel.from_config(config, **choice))


def as_vision_tower(encoder: PreTrainedModel) -> nn.Module:
    """`encoder` with the parameter names of transformers up to 5.5."""
    is_flat = encoder.config.model_type in NESTED_ENCODERS and not hasattr(encoder, "vision_model")
    return NestedEncoder(encoder) if is_flat else encoder


@dataclass
class SaisaImageFeatures(BaseModelOutputWithPooling):
    """Output of `get_image_features`: the encoder's, with the features as `pooler_output`."""

    kept_tokens: Tensor | None = None  # (images, visual tokens): the patches that "class_attention" keeps


class EncodesImages:
    """The part of `SaisaModel` that runs its `vision_tower`."""

    @can_return_tuple
    def get_image_features(self, pixel_values: Tensor, **kwargs) -> SaisaImageFeatures:
        """The encoder's features of images (I, channels, height, width; any floating dtype), before any projector.

        Returns what the encoder, which gets `kwargs`, returns, with features (I, R, C) as `pooler_output`: the states of
        `vision_feature_layer`, without class token where `vision_feature_select_strategy` is `"default"`, feature maps row by
        row, as many as `visual_token_reduction` leaves. A list of (R, C) where sizes differ. More images than
        `config.images_at_once` are encoded in turns, and have features alone."""
        self.check_features_asked_for(kwargs)
        count, at_once = len(pixel_values) if isinstance(pixel_values, Tensor) else 0, self.config.images_at_once
        if count <= at_once or in_several_processes():
            outputs = self._encoded(pixel_values, kwargs)
        else:
            by_image = {name: x for name, x in kwargs.items() if isinstance(x, Tensor) and len(x) == count}
            turns = [slice(start, start + at_once) for start in range(0, count, at_once)]
            each = [(pixel_values[turn], kwargs | {name: x[turn] for name, x in by_image.items()}) for turn in turns]
            parts = [(one.pooler_output, one.kept_tokens) for one in (self._encoded(*arguments) for arguments in each)]
            features = stacked([image for part, _ in parts for image in part])
            kept = None if parts[0][1] is None else torch.cat([part for _, part in parts])
            outputs = SaisaImageFeatures(pooler_output=features, kept_tokens=kept)
        return outputs

    def _encoded(self, pixel_values: Tensor, kwargs: dict) -> SaisaImageFeatures:
        """See `get_image_features`, of images and at once."""
        config, kept = self.config, None
        is_siglip2 = config.vision_config.model_type == "siglip2_vision_model"
        if not isinstance(pixel_values, Tensor) or pixel_values.ndim not in ((3, 4) if is_siglip2 else (4,)):
            seen = tuple(pixel_values.shape) if isinstance(pixel_values, Tensor) else type(pixel_values).__name__
            raise ValueError(f"pixel_values is {seen}: expected a tensor (images, channels, height, width).")
        if is_siglip2 and pixel_values.ndim == 4:
            pixel_values, kwargs = _patchify(pixel_values, config.vision_config.patch_size, kwargs)
        dtype = next(p.dtype for p in self.vision_tower.parameters() if p.is_floating_point())
        # gradient checkpointing of 5.x asks for gradients of all embeddings, a frozen encoder's too
        learns = pixel_values.requires_grad or any(p.requires_grad for p in self.vision_tower.parameters())
        kwargs |= {"output_hidden_states": True, "return_dict": True}
        with torch.set_grad_enabled(learns and torch.is_grad_enabled()):
            outputs = self.vision_tower(pixel_values=pixel_values.to(dtype), **kwargs)
        states = [outputs.hidden_states[layer] for layer in config.vision_feature_layers]
        grid = states[0].shape[2:] if states[0].ndim == 4 else None
        states = [state.flatten(2).transpose(1, 2) if state.ndim == 4 else state for state in states]
        features = torch.cat([state[:, config.dropped_vision_tokens :] for state in states], dim=-1)
        if is_siglip2:  # images of unlike shapes, padded
            grids = [(int(h), int(w)) for h, w in kwargs["spatial_shapes"]]
            features = [self._reduced(x[None, : h * w], (h, w))[0] for x, (h, w) in zip(features, grids)]
            features = stacked(features)
        elif config.visual_token_reduction == "class_attention":
            attention = class_attention(self.vision_tower, config, outputs.hidden_states)
            kept = most_attended(attention, config.reduced_visual_tokens, features.shape[1])
            features = features.gather(1, kept[..., None].expand(-1, -1, features.shape[-1]))
        elif config.visual_token_reduction is not None:
            features = self._reduced(features, grid or grid_of(features.shape[1], *pixel_values.shape[-2:]))
        others = {name: outputs.get(name) for name in ("last_hidden_state", "hidden_states", "attentions")}
        return SaisaImageFeatures(pooler_output=features, kept_tokens=kept, **others)

    def check_features_asked_for(self, kwargs: dict) -> None:
        """Takes a choice of features out of `kwargs`. Raises ValueError if the projectors are made for another."""
        for name in ("vision_feature_layer", "vision_feature_select_strategy"):
            asked, own = kwargs.pop(name, None), getattr(self.config, name)
            if asked is not None and asked != own:
                loading = f"load the model with from_pretrained(..., {name}={asked!r})"
                raise ValueError(f"{name}={asked!r}, but the projectors are made for {own!r}: {loading}.")

    def no_features(self, **no_images) -> Tensor:
        """Features (0, C) that bring gradients of zero to the projectors: processes that share weights or gradients wait for
        one without images. An encoder that is trained or spread over processes (DeepSpeed ZeRO-3) encodes a blank image."""
        is_needed = any(p.requires_grad or hasattr(p, "ds_id") for p in self.vision_tower.parameters())
        if is_needed or self.config.features_are_projected:
            blank = {name: value.new_ones(1, *value.shape[1:]) for name, value in no_images.items()}
            return torch.cat(list(self.get_image_features(**blank, return_dict=True).pooler_output))[:0]
        blank_11C = no_images["pixel_values"].new_zeros(1, 1, self.config.vision_feature_size)  # kernels want an image
        return (self.visual_resampler(blank_11C) if hasattr(self, "visual_resampler") else blank_11C)[0, :0]

    def _reduced(self, features_IVC: Tensor, grid: tuple[int, int]) -> Tensor:
        """(I, V, C) of patches in `grid` -> (I, R, C), or (I, R, 4 C) for 2 x 2 side by side, row by row. A mean at an odd
        edge is over the patches that there are; side by side, the others are zero."""
        kind, (rows, columns) = self.config.visual_token_reduction, grid
        if kind == "resampler":
            return self.visual_resampler(features_IVC)
        if kind == "avg_pool":
            maps = features_IVC.transpose(1, 2).unflatten(-1, (rows, columns))
            return F.avg_pool2d(maps, 2, ceil_mode=True, count_include_pad=False).flatten(2).transpose(1, 2)
        if kind == "pixel_unshuffle":
            maps = F.pad(features_IVC.unflatten(1, (rows, columns)), (0, 0, 0, columns % 2, 0, rows % 2))
            return maps.unfold(1, 2, 2).unfold(2, 2, 2).permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)
        return features_IVC


def _patchify(pixel_values, patch_size: int, kwargs: dict):
    """Images (n, channels, height, width) as SigLIP 2 takes them: (n, patches, patch * patch * channels)."""
    cells = pixel_values.unfold(2, patch_size, patch_size).unfold(3, patch_size, patch_size)
    patches = cells.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)  # what is left at an edge falls away
    shapes = torch.tensor([cells.shape[2:4]] * len(patches), device=patches.device)
    mask = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
    return patches, {**kwargs, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def in_pieces(function, rows_VX: Tensor):
    """`function` of rows: a tensor with as many, or a tuple of tensors (V, K, H), these head by head in memory. Of many rows
    it is computed some at a time, so that what lies between takes no memory for all; whole where gradients need that."""
    is_whole = torch.is_grad_enabled() or torch.compiler.is_compiling() or in_several_processes()
    if is_whole or len(rows_VX) <= ROWS_AT_ONCE:
        return function(rows_VX)
    results, start = None, 0
    for piece in rows_VX.split(ROWS_AT_ONCE):
        made = function(piece)
        parts = made if isinstance(made, tuple) else (made[:, None],)
        if results is None:
            results = [x.new_empty(x.shape[1], len(rows_VX), x.shape[2]).transpose(0, 1) for x in parts]
        for result, x in zip(results, parts):
            result[start : start + len(x)] = x
        start += len(piece)
    return tuple(results) if isinstance(made, tuple) else results[0][:, 0]


# --- fewer visual tokens ----------------------------------------------------------------------------------------------


def check_reduction(config) -> None:
    """Raises ValueError if `visual_token_reduction` and `reduced_visual_tokens` do not fit the rest of a `SaisaConfig`."""
    kind, count, vision = config.visual_token_reduction, config.reduced_visual_tokens, config.vision_config.model_type
    check_choice(kind, count, config.image_seq_length)
    given, by_class, kept = f"visual_token_reduction={kind!r}", kind == "class_attention", config.kept_prefix_tokens
    layer, layers = config.vision_feature_layer, config.vision_feature_layers
    if kept and kind not in (None, "resampler"):
        kept = f"vision_feature_select_strategy='full' keeps {kept} tokens of {vision} in front of it"
        problem = f"{given} needs a grid of patches, but {kept}: choose 'default'."
    elif by_class and vision not in CLASS_ATTENTION_ENCODERS:
        encoders = ", ".join(CLASS_ATTENTION_ENCODERS)
        problem = f"{given} needs a class token's attention, which {vision} has not: choose one of {encoders}."
    elif by_class and (len(layers) != 1 or layers[0] % (config.vision_config.num_hidden_layers + 1) == 0):
        problem = f"vision_feature_layer={layer!r}: {given} uses one; choose one layer, and not the embeddings (0)."
    elif by_class and count > (patches := config.encoder_tokens_per_image):
        problem = f"reduced_visual_tokens={count}, but {vision} makes {patches} of an image: keep as many or fewer."
    else:
        return
    raise ValueError(problem)


def check_choice(kind, count, image_seq_length=None) -> None:
    """Raises ValueError if there is no such reduction, or not with that number, or `image_seq_length` contradicts it."""
    given, given_count = f"visual_token_reduction={shown(kind)}", f"reduced_visual_tokens={shown(count)}"
    has_number = kind in OF_A_NUMBER
    if kind not in (None, *REDUCTIONS):
        problem = f"{given} is not supported: expected None or one of {', '.join(map(repr, REDUCTIONS))}."
    elif has_number and (type(count) is not int or not 0 < count <= MOST_TOKENS):
        problem = f"{given_count}: {given} needs the number of visual tokens per image, 1 to {MOST_TOKENS}."
    elif not has_number and count is not None:
        problem = f"{given_count} goes with 'resampler' or 'class_attention', not with {kind!r}: leave it out."
    elif has_number and image_seq_length not in (None, count):
        problem = f"image_seq_length={image_seq_length!r}, but {given_count} settles that: leave image_seq_length out."
    else:
        return
    raise ValueError(problem)


def grids_of(kind: str | None, lengths, sizes, spatial_shapes=None) -> list[tuple[int, int]]:
    """(rows, columns) of the visual tokens, `lengths` of them, that the reduction `kind` leaves of each of several images, of
    (height, width) in `sizes`."""
    if spatial_shapes is None:
        return [grid_of(length, *size) for length, size in zip(lengths, sizes)]
    side = 2 if kind in OF_CELLS else 1
    return [(math.ceil(int(h) / side), math.ceil(int(w) / side)) for h, w in spatial_shapes]


def frame_lengths(kind: str | None, lengths: list[int], poolings: list[int], sizes, spatial_shapes=None) -> list[int]:
    """Visual tokens of images behind `frame_pooling`, of which the reduction `kind` leaves `lengths`."""
    if kind in OF_A_NUMBER:
        return lengths
    grids = zip(lengths, grids_of(kind, lengths, sizes, spatial_shapes), poolings)
    return [tokens if n == 1 else frame_length(grid, n) for tokens, grid, n in grids]


def frame_length(grid: tuple[int, int], n: int) -> int:
    """Visual tokens of a frame, one for each n x n."""
    return math.ceil(grid[0] / n) * math.ceil(grid[1] / n)


def pooled(features_IVC: Tensor, grid: tuple[int, int], n: int) -> Tensor:
    """(I, V, C) in `grid` -> (I, R, C), one for each n x n; rows and columns are rounded up. As in LLaVA-OneVision and
    LLaVA-Video: bilinear interpolation, which of 2 x 2 of an even grid is the mean."""
    maps = features_IVC.transpose(1, 2).unflatten(-1, grid)
    size = [math.ceil(side / n) for side in grid]
    return F.interpolate(maps, size, mode="bilinear").flatten(2).transpose(1, 2)


def stacked(rows: list[Tensor]) -> Tensor | list[Tensor]:
    """One tensor, if `rows` are alike in shape."""
    return torch.stack(rows) if len({len(row) for row in rows}) == 1 else rows


def reduced_length(kind: str | None, count: int | None, tokens: int, grid: tuple[int, int]) -> int:
    """Visual tokens of an image whose `tokens` lie in `grid`, (rows, columns). Odd rows and columns are rounded up."""
    if kind in OF_A_NUMBER:
        return count
    return math.ceil(grid[0] / 2) * math.ceil(grid[1] / 2) if kind in OF_CELLS else tokens


def grid_of(tokens: int, height: int, width: int) -> tuple[int, int]:
    """(rows, columns) of `tokens` in a grid over an image of `height` x `width` whose cells are closest to squares."""
    small = [rows for rows in range(1, math.isqrt(tokens) + 1) if tokens % rows == 0]
    divisors = small + [tokens // rows for rows in reversed(small)]
    rows = min(divisors, key=lambda rows: abs(math.log(rows * rows / tokens * width / height)))
    return rows, tokens // rows


def class_attention(encoder: nn.Module, config, hidden_states: tuple[Tensor, ...]) -> Tensor:
    """Attention (I, tokens; float32) of an encoder's class token to each token, itself first, in the layer of the features,
    as a mean over heads. It alone is computed, from what enters the layer: the encoder keeps its attention implementation."""
    depth, heads = config.vision_config.num_hidden_layers, config.vision_config.num_attention_heads
    blocks = next(part for part in encoder.modules() if isinstance(part, nn.ModuleList) and len(part) == depth)
    index = config.vision_feature_layers[0] % len(hidden_states) - 1
    norm = next(part for part in blocks[index].children() if isinstance(part, nn.LayerNorm))
    parts = {name.rpartition(".")[-1]: part for name, part in blocks[index].named_modules()}
    project_query, project_key = parts.get("q_proj") or parts["query"], parts.get("k_proj") or parts["key"]
    with torch.no_grad():
        x_ITC = norm(hidden_states[index])
        projected = (project_query(x_ITC[:, :1]), project_key(x_ITC))
        query_IN1H, key_INTH = (x.unflatten(-1, (heads, -1)).transpose(1, 2).float() for x in projected)
        scores_IN1T = query_IN1H @ key_INTH.transpose(-1, -2) * query_IN1H.shape[-1] ** -0.5
        return scores_IN1T.softmax(-1).mean(1).squeeze(1)


def most_attended(attention_IT: Tensor, count: int, patches: int) -> Tensor:
    """(I, count): those of the last `patches` tokens with most of the attention (I, tokens), in their order."""
    if count > patches:
        raise ValueError(f"reduced_visual_tokens={count}, but the image has {patches} patches: keep as many or fewer.")
    return attention_IT[:, -patches:].topk(count, dim=1).indices.sort(dim=1).values


class SaisaVisualResampler(nn.Module):
    """Cross-attention from learned queries to an image's features, with the encoder's number of heads, and a residual."""

    def __init__(self, config):
        super().__init__()
        width, heads = config.vision_feature_size, getattr(config.vision_config, "num_attention_heads", 1)
        self.heads = heads if isinstance(heads, int) and width % heads == 0 else 1
        self.queries = nn.Embedding(config.reduced_visual_tokens, width)
        nn.init.normal_(self.queries.weight, std=0.02)
        self.query_norm, self.feature_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, features_IVC: Tensor) -> Tensor:
        """(I, V, C) -> (I, R, C), in its own dtype. Queries are called for: their weight may be elsewhere until then."""
        queries_RC = self.queries(torch.arange(self.queries.num_embeddings, device=features_IVC.device))
        normed_IVC = self.feature_norm(features_IVC.to(queries_RC.dtype))
        query_RC = self.q_proj(self.query_norm(queries_RC)).expand(len(features_IVC), -1, -1)
        projected = (query_RC, self.k_proj(normed_IVC), self.v_proj(normed_IVC))
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in projected)
        read_INRH = F.scaled_dot_product_attention(query, key, value)
        return queries_RC + self.o_proj(read_INRH.transpose(1, 2).flatten(2))
