# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The demo's vision encoder: a small CLIP vision transformer that learns to see before any language is involved.

Trained from scratch inside a whole vision-language model, a vision transformer hardly learns: the questions say too little
about the image. Here each of its visual tokens learns what its cell holds, and then the encoder is frozen, as in SAISA.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import CLIPVisionConfig

from ..modeling_saisa import SaisaForConditionalGeneration
from .scenes import CELL, GRID, INKS, SIZE, draw, make_scene


PATCH = 12
N_DIGITS = 10

# Cell of every visual token, in the order of the tokens.
TOKEN_CELLS = torch.tensor(
    [
        row // (CELL // PATCH) * GRID + column // (CELL // PATCH)
        for row in range(SIZE // PATCH)
        for column in range(SIZE // PATCH)
    ]
)


def vision_config() -> CLIPVisionConfig:
    """About 0.7 million parameters: 36 visual tokens of width 128, four layers."""
    return CLIPVisionConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_act="gelu",
        # The usual 0.02 leaves a network of width 128 almost silent at the start.
        initializer_range=0.08,
    )


def pixels(images: np.ndarray) -> torch.Tensor:
    """Images uint8 (B, H, W, 3) as float32 (B, 3, H, W) in -1 to 1: what the demo's image processor computes."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1.0


class CellDataset(Dataset):
    """Images with what each cell holds: {"picture": uint8 (72, 72, 3), "digits": int64 (9,), "inks": int64 (9,)}, where
    an empty cell is digit 10 and ink 6. Item i is a function of (split, seed, i) alone."""

    def __init__(self, split: str, size: int, seed: int):
        self.split, self.size, self.seed = split, size, seed

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < self.size:
            raise IndexError(f"index must be in 0 to {self.size - 1}, got {index}")
        rng = np.random.default_rng([self.seed, index])
        scene = make_scene(self.split, rng, n_digits=int(rng.integers(4, 10)))
        digits, inks = np.full(GRID * GRID, N_DIGITS), np.full(GRID * GRID, len(INKS))
        for glyph in scene.glyphs:
            digits[glyph.cell], inks[glyph.cell] = glyph.digit, list(INKS).index(glyph.ink)
        return {"picture": draw(scene), "digits": digits, "inks": inks}


def collate_cells(items: list[dict[str, np.ndarray]]) -> dict[str, torch.Tensor]:
    """Items of `CellDataset` as a batch for `CellReader`."""
    return {
        "pixel_values": pixels(np.stack([item["picture"] for item in items])),
        "digits": torch.from_numpy(np.stack([item["digits"] for item in items])),
        "inks": torch.from_numpy(np.stack([item["inks"] for item in items])),
    }


class CellReader(nn.Module):
    """A SAISA model's encoder under three linear probes that read digit, ink and cell from every visual token. The probes
    are thrown away after training; they make the features hold what SAISA's projectors need."""

    def __init__(self, model: SaisaForConditionalGeneration):
        super().__init__()
        self.model = model
        width = model.config.vision_feature_size
        self.digit = nn.Linear(width, N_DIGITS + 1)
        self.ink = nn.Linear(width, len(INKS) + 1)
        self.cell = nn.Linear(width, GRID * GRID)

    def forward(self, pixel_values: torch.Tensor, digits: torch.Tensor, inks: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images float32 (B, 3, 72, 72), digits and inks int64 (B, 9). Returns the loss and, per visual token, whether both
        digit and ink are read correctly, bool (B, 36)."""
        hidden = self.model.get_image_features(pixel_values).pooler_output
        cells = TOKEN_CELLS.to(hidden.device)
        digits, inks = digits[:, cells], inks[:, cells]
        digit_logits, ink_logits, cell_logits = self.digit(hidden), self.ink(hidden), self.cell(hidden)
        loss = nn.functional.cross_entropy(digit_logits.flatten(0, 1), digits.flatten())
        loss = loss + nn.functional.cross_entropy(ink_logits.flatten(0, 1), inks.flatten())
        loss = loss + nn.functional.cross_entropy(cell_logits.flatten(0, 1), cells.repeat(len(hidden)))
        right = (digit_logits.argmax(-1) == digits) & (ink_logits.argmax(-1) == inks)
        return {"loss": loss, "right": right}


@torch.no_grad()
def cells_read(reader: CellReader, split: str, n_images: int = 300, seed: int = 9) -> float:
    """Fraction of the occupied cells of fresh images whose digit and ink each visual token reads correctly, averaged."""
    reader.eval()
    dataset = CellDataset(split, n_images, seed)
    batch = collate_cells([dataset[index] for index in range(n_images)])
    device = next(reader.parameters()).device
    right = reader(**{name: value.to(device) for name, value in batch.items()})["right"]
    occupied = (batch["digits"] < N_DIGITS)[:, TOKEN_CELLS].to(device)
    return right[occupied].float().mean().item()
