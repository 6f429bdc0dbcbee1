# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Images, questions and answers to look at: a contact sheet, and images in the terminal."""

from __future__ import annotations

import shutil

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .scenes import SIZE, Question


ZOOM = 3
COLUMNS = 4
GAP = 24
IMAGE_SIDE = SIZE * ZOOM
TEXT = 64
HEADER = 64

PAGE, CARD, DARK, GREY = (238, 240, 244), (255, 255, 255), (28, 32, 40), (112, 118, 130)
GREEN, RED = (24, 138, 72), (200, 38, 44)


def _tick(canvas: ImageDraw.ImageDraw, x: int, y: int, right: bool) -> None:
    """A tick or a cross in a box of 14 pixels: no font is sure to have them."""
    if right:
        canvas.line([(x, y + 7), (x + 5, y + 12), (x + 13, y + 2)], fill=GREEN, width=3, joint="curve")
    else:
        canvas.line([(x + 1, y + 2), (x + 12, y + 13)], fill=RED, width=3)
        canvas.line([(x + 12, y + 2), (x + 1, y + 13)], fill=RED, width=3)


def contact_sheet(shown: list[tuple[np.ndarray, Question, str]], title: str) -> Image.Image:
    """Images (uint8 (72, 72, 3)) with question and answer as cards, four in a row; a right answer is green, a wrong one red
    with the right one beside it."""
    rows = -(-len(shown) // COLUMNS)
    card_width, card_height = IMAGE_SIDE + 16, IMAGE_SIDE + 16 + TEXT
    columns = min(COLUMNS, len(shown))
    size = (GAP + columns * (card_width + GAP), HEADER + rows * (card_height + GAP))
    sheet = Image.new("RGB", size, PAGE)
    canvas = ImageDraw.Draw(sheet)
    canvas.text((GAP, HEADER // 2), title, fill=DARK, font=ImageFont.load_default(22), anchor="lm")
    for index, (image, question, answer) in enumerate(shown):
        row, column = divmod(index, COLUMNS)
        left, top = GAP + column * (card_width + GAP), HEADER + row * (card_height + GAP)
        canvas.rounded_rectangle((left, top, left + card_width, top + card_height), radius=10, fill=CARD)
        large = Image.fromarray(image).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)
        sheet.paste(large, (left + 8, top + 8))
        line = top + 8 + IMAGE_SIDE + 20
        canvas.text((left + 10, line), question.text, fill=GREY, font=ImageFont.load_default(14), anchor="lm")
        right = answer == question.answer
        _tick(canvas, left + 10, line + 18, right)
        bold = ImageFont.load_default(19)
        canvas.text((left + 32, line + 26), answer, fill=GREEN if right else RED, font=bold, anchor="lm")
        if not right:
            x = left + 42 + canvas.textlength(answer, font=bold)
            canvas.text((x, line + 27), f"({question.answer})", fill=GREY, font=ImageFont.load_default(14), anchor="lm")
    return sheet


def terminal_images(images: list[np.ndarray], width: int | None = None, side: int = 24) -> str:
    """As many images as fit in one row of a terminal `width` characters wide (None: this one), `side` pixels each, two
    pixels to a character, in 24-bit colour."""
    if width is None:
        width = shutil.get_terminal_size().columns
    fitting = images[: max(1, (width + 2) // (side + 2))]
    small = [np.asarray(Image.fromarray(p).resize((side, side), Image.Resampling.BOX)) for p in fitting]
    lines = []
    for y in range(0, side, 2):
        cells = []
        for image in small:
            pairs = zip(image[y].tolist(), image[y + 1].tolist())
            cells.append(
                "".join(f"\033[38;2;{a};{b};{c};48;2;{d};{e};{f}m\u2580" for (a, b, c), (d, e, f) in pairs) + "\033[0m"
            )
        lines.append("  ".join(cells))
    return "\n".join(lines)
