# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The loss of a run as an image."""

import math
from pathlib import Path

from PIL import Image, ImageDraw


WIDTH, HEIGHT, LEFT, BOTTOM, MARGIN = 960, 540, 70, 40, 20
INK, PALE, LINE, VALIDATION = (40, 40, 44), (225, 225, 228), (30, 90, 200), (200, 90, 30)


def loss_curve(history: list[dict], path: str | Path) -> bool:
    """Writes the losses of `history`, a `Trainer`'s `log_history`, against their steps to `path` as PNG: of training
    in blue, of validation in orange.

    Returns:
        Whether there were at least two finite losses; if not, nothing is written.
    """
    points, validated = (
        [(e["step"], e[name]) for e in history if {"step", name} <= e.keys() and math.isfinite(e[name])]
        for name in ("loss", "eval_loss")
    )
    if len(points) < 2:
        return False
    steps, losses = zip(*points, *validated)
    first, last, top = min(steps), max(steps), max(losses) or 1.0

    def place(step: float, loss: float) -> tuple[float, float]:
        x = LEFT + (step - first) / max(last - first, 1) * (WIDTH - LEFT - MARGIN)
        return x, MARGIN + (1 - loss / top) * (HEIGHT - BOTTOM - MARGIN)

    image = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw = ImageDraw.Draw(image)
    for quarter in range(5):
        loss, step = top * quarter / 4, first + (last - first) * quarter / 4
        (x, _), (_, y) = place(step, 0), place(first, loss)
        draw.line([(LEFT, y), (WIDTH - MARGIN, y)], fill=PALE)
        draw.text((8, y - 6), f"{loss:.3g}", fill=INK)
        draw.text((x - 10, HEIGHT - BOTTOM + 12), f"{step:.0f}", fill=INK)
    draw.line([place(*point) for point in points], fill=LINE, width=2)
    if len(validated) > 1:
        draw.line([place(*point) for point in validated], fill=VALIDATION, width=2)
    for point in validated:
        x, y = place(*point)
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=VALIDATION)
    draw.text((LEFT, 4), "loss by step", fill=INK)
    image.save(path)
    return True
