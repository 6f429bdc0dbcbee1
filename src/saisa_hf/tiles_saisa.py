# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What one visual input becomes that the encoder reads as several pictures of its own size: which tokens, and in which order.

Where `image_grid_pinpoints` lists resolutions, an image is read LLaVA-NeXT's way ("AnyRes"): the whole image first, then the
tiles of the image at the best of these resolutions. The tokens of the tiles are put together as one grid, what stands for
padding falls away, and a newline follows each row. With `vision_aspect_ratio="anyres_max_9"` a grid of many more tokens than
9 tiles have is scaled down, LLaVA-OneVision's way. InternVL's tiles with a thumbnail are one picture after the other. A
frame of a video is one picture, of whose grid of tokens n x n become one.

The newline is learned behind the projectors, which features have not passed yet: a row of `NEWLINE` holds its place.

Shape suffixes: P pictures of an image, V visual tokens, C width of the features.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .compat_saisa import can_return_tuple, needed
from .vision_saisa import (
    OF_A_NUMBER,
    EncodesImages,
    SaisaImageFeatures,
    check_value,
    frame_length,
    grid_of,
    grids_of,
    image_size,
    pooled,
    shown,
    stacked,
)


NEWLINE = -256.0  # in all channels, as no encoder has it; every floating dtype can hold it
MOST_TILES = 1000  # of one image


class VisualInput(NamedTuple):
    """What the features of the pictures of one image, or of a frame of a video, become."""

    pictures: int  # that the encoder reads
    tokens: int  # visual tokens of each
    has_newlines: bool = False  # behind each row of tiles, or behind an image without tiles
    tiles: tuple[int, int] = (0, 0)  # rows and columns of tiles, which come after the whole image
    grid: tuple[int, int] = (0, 0)  # rows and columns of the tokens of each
    padding: tuple[int, int] = (0, 0)  # rows and columns of tokens on either side that stand for nothing
    shape: tuple[int, int] = (0, 0)  # rows and columns that become visual tokens of the tiles
    pooling: int = 1  # of a frame: n x n tokens become one

    @property
    def length(self) -> int:
        """The number of visual tokens."""
        if self.pooling > 1:
            return frame_length(self.grid, self.pooling)
        if not self.has_newlines:
            return self.pictures * self.tokens
        return self.tokens + (1 if self.pictures == 1 else self.shape[0] * (self.shape[1] + 1))

    def joined(self, features_PVC: Tensor, newline_C: Tensor) -> Tensor:
        """(P, tokens of each, C) -> (V, C), with the row `newline_C` for each newline."""
        if self.pooling > 1:
            return pooled(features_PVC, self.grid, self.pooling)[0]
        if not self.has_newlines:
            return features_PVC.flatten(0, 1)
        if self.pictures == 1:
            return torch.cat([features_PVC[0], newline_C[None]])
        maps = features_PVC[1:].unflatten(0, self.tiles).unflatten(2, self.grid).transpose(1, 2)
        whole = maps.flatten(0, 1).flatten(1, 2)  # (rows, columns, C)
        cut = [slice(n, size - n) for n, size in zip(self.padding, whole.shape)]
        whole = whole[cut[0], cut[1]]
        if whole.shape[:2] != self.shape and 0 not in self.shape:
            whole = F.interpolate(whole.permute(2, 0, 1)[None], self.shape, mode="bilinear")[0].permute(1, 2, 0)
        whole = whole[: self.shape[0], : self.shape[1]]
        lines = torch.cat([whole, newline_C.expand(len(whole), 1, -1)], dim=1)
        return torch.cat([features_PVC[0], lines.flatten(0, 1)])


def tiles_of(size: tuple[int, int], pinpoints: list, side: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of tiles of `side` (height, width) at the best resolution for an image of `size`."""
    best = needed("AnyRes", "transformers.image_processing_utils", "select_best_resolution")(size, pinpoints)
    return best[0] // side[0], best[1] // side[1]


def visual_input(owner, size, pictures: int | None, tokens: int, grid, side, pooling: int = 1) -> VisualInput:
    """What an image becomes.

    Args:
        owner: has `image_grid_pinpoints` and `vision_aspect_ratio`: a config, or a processor.
        size: (height, width) of the image; None where there are no `image_grid_pinpoints`.
        pictures: that the encoder reads of it; None: as many as its size asks for.
        tokens, grid: visual tokens of each, and their rows and columns.
        side: (height, width) of each, in pixels.
        pooling: more than 1 of a frame, which is one picture without a newline.

    Raises:
        ValueError: an image of this size has another number of tiles.
    """
    pinpoints = owner.image_grid_pinpoints
    if pooling > 1 and owner.visual_token_reduction not in OF_A_NUMBER:
        return VisualInput(1, tokens, grid=grid, pooling=pooling)
    if pinpoints is None:
        return VisualInput(pictures, tokens)
    if pictures == 1:
        return VisualInput(1, tokens, True)
    tiles = tiles_of(size, pinpoints, side)
    expected = 1 + tiles[0] * tiles[1]
    if pictures not in (None, expected):
        expected = f"1 or {expected} by its size, {size[0]} x {size[1]}, and image_grid_pinpoints"
        raise ValueError(f"An image is read as {pictures} pictures of {side[0]} x {side[1]}: expected {expected}.")
    rows, columns = (n * each for n, each in zip(tiles, grid))
    above = beside = 0
    if size[1] / size[0] > columns / rows:
        above = (rows - int(round(size[0] * (columns / size[1]), 7))) // 2
    else:
        beside = (columns - int(round(size[1] * (rows / size[0]), 7))) // 2
    shape = rows - 2 * above, columns - 2 * beside
    if owner.vision_aspect_ratio is not None:
        ratio = math.sqrt(shape[0] * shape[1] / (most_tiles(owner.vision_aspect_ratio) * grid[0] * grid[1]))
        if ratio > 1.1:
            shape = int(shape[0] // ratio), int(shape[1] // ratio)
    return VisualInput(1 + tiles[0] * tiles[1], tokens, True, tiles, grid, (above, beside), shape)


def visual_inputs(owner, tokens: int, side, image_sizes, num_tiles, frame_pooling=None) -> list[VisualInput]:
    """`visual_input` of each of several images: `image_sizes` (images, 2), `num_tiles` and `frame_pooling` (images,), None,
    tensors, arrays or lists."""
    given = (x if hasattr(x, "tolist") or x is None else np.asarray(x) for x in (image_sizes, num_tiles, frame_pooling))
    sizes, counts, poolings = (x if x is None else x.tolist() for x in given)
    if counts is None and (sizes is None or owner.image_grid_pinpoints is None):
        names = "num_tiles" if owner.image_grid_pinpoints is None else "image_sizes"
        raise ValueError(f"pixel_values has tiles (images, tiles, channels, height, width): expected {names} with it.")
    if sizes is None and owner.image_grid_pinpoints is not None and max(counts, default=1) > 1:
        raise ValueError("num_tiles is given without image_sizes: expected (height, width) of each image too.")
    sizes, counts = [None] * len(counts) if sizes is None else sizes, [None] * len(sizes) if counts is None else counts
    grid, each = grid_of(tokens, *side), zip(sizes, counts, poolings or [1] * len(counts))
    return [visual_input(owner, tuple(size or ()), count, tokens, grid, side, n) for size, count, n in each]


def processed_images(image_processor, images: list, groups: list[int] | None, **kwargs) -> dict:
    """What an image processor of transformers makes of PIL `images`, which came as lists of so many as `groups` says. Where
    it makes several pictures of an image, `num_tiles` counts them, and `pixel_values` are image by image, padded with zeros
    to as many pictures as the one with most of them has."""
    pinpoints, in_lists = getattr(image_processor, "image_grid_pinpoints", None), images
    alone = [False] * len(images)
    if pinpoints is not None and "batch_num_images" in image_processor.model_input_names:  # one of several has no tiles
        rest, groups = iter(images), groups or [1] * len(images)
        in_lists = [[next(rest) for _ in range(count)] for count in groups]
        alone = [count > 1 for count in groups for _ in range(count)]
    processed = dict(image_processor(in_lists, **kwargs))
    processed.pop("batch_num_images", None)
    if pinpoints is not None:
        side = np.shape(processed["pixel_values"][0])[-2:]
        grids = [tiles_of(image.size[::-1], pinpoints, side) for image in images]
        processed["num_tiles"] = [1 if one else 1 + rows * columns for one, (rows, columns) in zip(alone, grids)]
    elif (counts := processed.pop("num_patches", None)) is not None:  # the pictures of all images follow one another
        pictures, counts = processed["pixel_values"], [int(count) for count in counts]
        stack, rest = (torch if isinstance(pictures[0], Tensor) else np).stack, iter(pictures)
        each = [padded(stack([next(rest) for _ in range(count)]), max(counts)) for count in counts]
        processed |= {"pixel_values": stack(each), "num_tiles": counts}
    return processed


def padded(tiles_PCHW, most: int):
    """The pictures of an image, array or tensor, with zeros behind them: `most` in all."""
    behind = most - len(tiles_PCHW)
    if isinstance(tiles_PCHW, Tensor):
        return F.pad(tiles_PCHW, (0, 0) * 3 + (0, behind))
    return np.pad(tiles_PCHW, [(0, behind), (0, 0), (0, 0), (0, 0)])


def sizes_of(pixel_values) -> list[tuple[int, int]]:
    """(height, width) of processed images. Some releases ignore `data_format`: channels are where the shape has a 3."""
    shapes = map(np.shape, pixel_values)
    return [shape[:2] if shape[0] != 3 == shape[-1] else shape[-2:] for shape in shapes]


class EncodesTiles(EncodesImages):
    """The part of `SaisaModel` that runs its `vision_tower` on images of one picture or of several."""

    @can_return_tuple
    def get_image_features(
        self, pixel_values: Tensor, image_sizes=None, num_tiles=None, frame_pooling=None, **kwargs
    ) -> SaisaImageFeatures:
        """The encoder's features of images, before any projector.

        Args:
            pixel_values: (images, channels, height, width), any floating dtype, one picture of each; or
                (images, tiles, channels, height, width), several, padded to as many as the image with most of them has.
            image_sizes: with tiles, (images, 2): height and width of the images as they were, for `image_grid_pinpoints`.
            num_tiles: with tiles, (images,): how many pictures are an image's. None: as many as its size asks for.
            frame_pooling: (images,): 1 of images, and of video frames 2, where 2 x 2 of a grid of features become one.
            kwargs: handed on to the encoder.

        Returns:
            What the encoder returns, with the features as `pooler_output`: (images, R, C), the states of
            `vision_feature_layer`, without class token where `vision_feature_select_strategy` is `"default"`, feature maps
            row by row, as many as `visual_token_reduction` leaves. A list of (R, C) where images may differ in number. A
            newline is a row of `NEWLINE`. With tiles in embedding space, rows (R, D) are past the projector."""
        config, inputs = self.config, None
        if frame_pooling is not None:
            self._check_frame_pooling(pixel_values, frame_pooling)
        if isinstance(pixel_values, Tensor) and pixel_values.ndim == 5:
            (images, most), side = pixel_values.shape[:2], tuple(pixel_values.shape[-2:])
            tokens = config.visual_tokens_of(*side) or config.image_seq_length
            inputs = visual_inputs(config, tokens, side, image_sizes, num_tiles, frame_pooling)
            if len(inputs) != images or any(not 0 < one.pictures <= most for one in inputs):
                expected = f"pictures of {len(inputs)} images, {[one.pictures for one in inputs]} of each"
                raise ValueError(f"pixel_values is {tuple(pixel_values.shape)}: expected {expected}, by image_sizes.")
            pixel_values = torch.cat([image[: one.pictures] for image, one in zip(pixel_values, inputs)])
        elif image_sizes is not None or num_tiles is not None:
            seen = tuple(getattr(pixel_values, "shape", ()))
            expected = "(images, tiles, channels, height, width) with image_sizes or num_tiles"
            raise ValueError(f"pixel_values is {seen}: expected {expected}.")
        outputs = super().get_image_features(pixel_values, return_dict=True, **kwargs)
        features = outputs.pooler_output
        newline = features[0].new_full(features[0].shape[-1:], NEWLINE)
        if config.features_are_projected:
            projected = self.visual_projector(torch.cat([features.flatten(0, 1), newline[None]]))
            features, newline = projected[:-1].unflatten(0, features.shape[:2]), projected[-1]
        if inputs is not None:
            each = features.split([one.pictures for one in inputs])
            features = [one.joined(x_PVC, newline) for one, x_PVC in zip(inputs, each)]
        elif frame_pooling is not None and config.visual_token_reduction not in OF_A_NUMBER and len(features):
            sizes, shapes = [pixel_values.shape[-2:]] * len(features), kwargs.get("spatial_shapes")
            grids = grids_of(config.visual_token_reduction, map(len, features), sizes, shapes)
            each = zip(features, grids, torch.as_tensor(frame_pooling).tolist())
            features = stacked([x if n == 1 else pooled(x[None], grid, n)[0] for x, grid, n in each])
        outputs.pooler_output = features
        return outputs

    def _check_frame_pooling(self, pixel_values: Tensor, frame_pooling) -> None:
        poolings, expected = torch.as_tensor(frame_pooling).tolist(), f"{len(pixel_values)} positive numbers"
        is_pooled = max(poolings, default=1) > 1 and self.config.visual_token_reduction not in OF_A_NUMBER
        no_grid = is_pooled and self.config.kept_prefix_tokens > 0
        if len(poolings) != len(pixel_values) or min(poolings, default=1) < 1 or no_grid:
            expected += ", all 1 with vision_feature_select_strategy='full'" if no_grid else ""
            raise ValueError(f"frame_pooling={shown(poolings)}: expected {expected}.")

    def no_features(self, **no_images) -> Tensor:
        if no_images["pixel_values"].ndim == 5:
            no_images = {"pixel_values": no_images["pixel_values"][:, 0]}
        return super().no_features(**no_images)


def most_tiles(vision_aspect_ratio: str) -> int:
    """The number in "anyres_max_9". Raises ValueError if it is none."""
    number = str(vision_aspect_ratio).removeprefix("anyres_max_")
    if not (number.isascii() and number.isdigit() and 0 < int(number[:9]) <= MOST_TILES):
        expected = "'anyres_max_9', with another number, or None"
        raise ValueError(f"vision_aspect_ratio={shown(vision_aspect_ratio)}: expected {expected}.")
    return int(number)


def check_tiles(config) -> None:
    """Raises ValueError if `image_grid_pinpoints` or `vision_aspect_ratio` do not fit the rest of a `SaisaConfig`."""
    pinpoints, aspect, vision = config.image_grid_pinpoints, config.vision_aspect_ratio, config.vision_config.model_type
    if pinpoints is None:
        if aspect is not None:
            raise ValueError(f"vision_aspect_ratio={shown(aspect)} goes with image_grid_pinpoints: give both or none.")
        return
    height, width = image_size(config.vision_config)
    check_value("image_grid_pinpoints", pinpoints, list)
    pairs = [pair for pair in pinpoints if isinstance(pair, (list, tuple)) and len(pair) == 2]
    if not 0 < len(pairs) == len(pinpoints) <= MOST_TILES:
        raise ValueError(f"image_grid_pinpoints={shown(pinpoints)}: expected a list of [height, width], at least one.")
    for pair in pairs:
        for pixels, side in zip(pair, (height, width)):
            check_value("image_grid_pinpoints", pixels, (1, side * MOST_TILES))
            if pixels % side:
                expected = f"multiples of {height} x {width}, the images that the encoder takes"
                raise ValueError(f"image_grid_pinpoints has {shown(list(pair))}: expected {expected}.")
        check_value("image_grid_pinpoints (tiles)", pair[0] // height * (pair[1] // width), (1, MOST_TILES))
    kind, kept = config.visual_token_reduction, config.kept_prefix_tokens
    if aspect is not None:
        most_tiles(aspect)
    if vision == "siglip2_vision_model":
        raise ValueError(f"image_grid_pinpoints: {vision} reads images in their own shape. Leave it out.")
    if kept or kind in ("resampler", "class_attention"):
        given = f"visual_token_reduction={kind!r}" if kind else "vision_feature_select_strategy='full'"
        fix = "choose 'avg_pool', 'pixel_unshuffle' or None" if kind else f"choose 'default', as {vision} has {kept}"
        raise ValueError(f"image_grid_pinpoints puts grids of tokens together, and {given} leaves none: {fix}.")
