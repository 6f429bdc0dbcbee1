# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""How many pictures and visual tokens an image is, whose size decides where a model reads tiles."""

from ..configuration_saisa import SaisaConfig
from ..tiles_saisa import VisualInput, visual_input
from ..vision_saisa import grid_of, image_size


def image_of(config: SaisaConfig, size: tuple[int, int] | None = None) -> VisualInput:
    """What a model with `config` reads of an image of (height, width) pixels; None: of the one that has most visual tokens.

    Raises:
        ValueError: `size` is given, and the model reads all images alike.
    """
    if config.image_grid_pinpoints is None:
        if size is not None:
            raise ValueError(
                "--image-size: this model has no image_grid_pinpoints, all images have as many visual tokens."
            )
        return VisualInput(1, config.image_seq_length)
    side = image_size(config.vision_config)
    grid = grid_of(config.image_seq_length, *side)
    sizes = [size] if size is not None else [(height, width) for height, width in config.image_grid_pinpoints]
    found = [visual_input(config, one, None, config.image_seq_length, grid, side) for one in sizes]
    return max(found, key=lambda one: one.length)
