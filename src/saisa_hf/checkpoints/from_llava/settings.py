# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""How projectors are fitted: `Fit`, and the prompts along whose answers the result is measured."""

import os
import re
from dataclasses import dataclass
from pathlib import Path


PROMPTS = (
    "Describe this image in detail.",
    "What is shown in this picture?",
    "List the objects in the image with their colours and places.",
    "What text can be read in the image?",
)
SPACES = ("hidden", "scaled", "norm", "keys_values")
STARTS = ("previous", "llava")


@dataclass(frozen=True)
class Fit:
    """How projectors are fitted.

    Attributes:
        pictures: the largest number of images to use, held-out ones included.
        held_out: how many of these are not fitted on; errors and agreement are measured on them.
        steps: steps of AdamW for each layer; 0 keeps the closed-form solution of `linear_2`.
        rate: the highest learning rate of its cosine schedule, times the square root of the projector's inner width: 0.064
            gives 0.001 at a width of 4096, as in LLaVA's first training stage, and 0.006 at 128.
        batch_tokens: approximate number of visual tokens in one step.
        ridge: the penalty of the closed form, relative to the mean square of the inner activations.
        space: where descent measures the error: in the `"hidden"` states as they are, in the states `"scaled"` to a mean
            square of 1 each, behind the layer's input `"norm"`, or in its `"keys_values"`.
        start: what a layer's `linear_1` starts from: the `"previous"` layer's, or `"llava"`'s own.
        projector_hidden_size: inner width of the projectors; None: LLaVA's.
        distill_steps: steps of distillation of the next-token distributions, after the fit.
        distill_rate: its highest learning rate.
        distill_batch: images with prompt and answer in one of its steps.
        answer_tokens: the longest answer of the LLaVA to a prompt.
        visual_layers: the decoder layers that see the image, or `"auto:8"`: the eight that need it most, found by elimination
            (see `choose_layers`). None: all.
        choose_on: how many images layers are chosen on; they are neither fitted nor measured on.
        tiles: read images in tiles, as a LLaVA-NeXT or LLaVA-OneVision does. False: the whole image alone.
        seed: of the order of images and of everything that is drawn at random.
    """

    pictures: int = 2000
    held_out: int = 64
    steps: int = 500
    rate: float = 0.064
    batch_tokens: int = 2304
    ridge: float = 1e-5
    space: str = "scaled"
    start: str = "previous"
    projector_hidden_size: int | None = None
    distill_steps: int = 0
    distill_rate: float = 1e-4
    distill_batch: int = 8
    answer_tokens: int = 64
    visual_layers: list[int] | str | None = None
    choose_on: int = 16
    tiles: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("pictures", "held_out", "batch_tokens", "distill_batch", "answer_tokens", "choose_on"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number.")
        for name in ("steps", "distill_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or a positive number.")
        for name, allowed in (("space", SPACES), ("start", STARTS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(repr, allowed))}.")
        layers = self.visual_layers
        if layers is not None and not isinstance(layers, str):
            object.__setattr__(self, "visual_layers", list(layers))  # as in the JSON that a resumed run compares
        elif layers is not None and not re.fullmatch(r"auto:0*[1-9]\d{0,3}", layers):
            raise ValueError(
                f"visual_layers={layers!r:.80}: expected a list of layers, or 'auto:8' with another number."
            )

    @property
    def layers_to_choose(self) -> int:
        """How many layers are to be found by elimination; 0: none."""
        return int(self.visual_layers.removeprefix("auto:")) if isinstance(self.visual_layers, str) else 0

    @property
    def given_layers(self) -> list[int] | None:
        """The layers that see the image from the start; None: all."""
        return None if isinstance(self.visual_layers, str) else self.visual_layers


def read_prompts(file: str | os.PathLike) -> list[str]:
    """The prompts in a text file, one per line.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no prompts.
    """
    lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {file} holds no prompts: expected one per line.")
    return prompts
