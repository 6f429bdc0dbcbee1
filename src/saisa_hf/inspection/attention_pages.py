# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Showing attention maps: a contact sheet, a self-contained page for the browser, and `saisa attend`."""

import base64
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from PIL import Image, ImageDraw, ImageFont

from ..common.destination import check_file, write_file
from ..common.loading import load_model, quiet_transformers, read_image
from ..common.tables import table
from .attention_maps import AttentionMaps, PictureMaps, attend


PANEL, COLUMNS, GAP, BELOW = 176, 6, 14, 20
PAGE, DARK, GREY = (238, 240, 244), (28, 32, 40), (112, 118, 130)
WEAK, STRONG, OPAQUE = (255, 214, 10), (214, 20, 20), 0.75
LARGEST = 1024  # pixels of the longer side of an image in the page


# --- contact sheet ----------------------------------------------------------------------------------------------------


def contact_sheet(maps: AttentionMaps, layers: Sequence[int] = ()) -> PIL.Image.Image:
    """The image once for each word, with the word's attention over it, six words in a row. Below that the same for each of
    `layers`.

    The heat of a panel is relative to the largest weight in it; the number below it is the share of the word's attention that
    goes to that image at all. The part of an image that the model is not shown is pale.

    Raises:
        ValueError: there is no such layer.
    """
    count = len(maps.pictures[0].weights)
    for layer in layers:
        if not 0 <= layer < count:
            raise ValueError(f"layers has {layer}: the model has layers 0 to {count - 1}.")
    label = 60 if layers or len(maps.pictures) > 1 else 0
    columns = min(COLUMNS, len(maps.words))
    blocks = [range(first, min(first + COLUMNS, len(maps.words))) for first in range(0, len(maps.words), COLUMNS)]
    sizes = [_fitted(found.picture.size, PANEL) for found in maps.pictures]
    block_height = 26 + sum((height + BELOW) * (1 + len(layers)) for _, height in sizes)
    width = max(GAP + label + columns * (PANEL + GAP), 420)
    sheet = Image.new("RGB", (width, 62 + block_height * len(blocks) + GAP), PAGE)
    _write(sheet, (GAP, 20), _shortened(maps.question, width, 15), 15, GREY)
    _write(sheet, (GAP, 44), _shortened(maps.answer, width, 19), 19)
    for number, block in enumerate(blocks):
        _draw_block(sheet, maps, layers, block, left=GAP + label, top=62 + number * block_height)
    return sheet


def _draw_block(
    sheet: PIL.Image.Image, maps: AttentionMaps, layers: Sequence[int], block: range, left: int, top: int
) -> None:
    """Draws the words of `block` beside each other, with their panels below."""
    columns = [left + place * (PANEL + GAP) for place in range(len(block))]
    for x, word in zip(columns, block):
        _write(sheet, (x + 2, top + 13), _shortened(maps.words[word], PANEL, 16), 16)
    y = top + 26
    for index, found in enumerate(maps.pictures):
        size = _fitted(found.picture.size, PANEL)
        if len(maps.pictures) > 1:
            _write(sheet, (GAP, y + 8), f"image {index + 1}", 13)
        kinds = ["mean" if layers else "", *(f"layer {layer}" for layer in layers)]
        for kind, weights in zip(kinds, [maps.mean(index), *(found.weights[layer] for layer in layers)]):
            if kind:
                _write(sheet, (GAP, y + size[1] // 2), kind, 13, GREY)
            for x, word in zip(columns, block):
                sheet.paste(overlay(found, weights[word], size), (x, y))
                _write(sheet, (x + 2, y + size[1] + 8), f"{weights[word].sum():.0%}", 11, GREY)
            y += size[1] + BELOW


def _write(
    sheet: PIL.Image.Image, place: tuple[int, int], text: str, size: int, colour: tuple[int, int, int] = DARK
) -> None:
    font = ImageFont.load_default(size)
    ImageDraw.Draw(sheet).text(place, text, fill=colour, font=font, anchor="lm")


def overlay(found: PictureMaps, weights: np.ndarray, size: tuple[int, int]) -> PIL.Image.Image:
    """The image at `size` (width, height) with `weights` (rows, columns) over it: from transparent over yellow to red."""
    scale = size[0] / found.picture.width, size[1] / found.picture.height
    left, top, right, bottom = (round(edge * scale[number % 2]) for number, edge in enumerate(found.box))
    covered = max(right - left, 1), max(bottom - top, 1)
    small = Image.fromarray((weights / max(weights.max(), 1e-12)).astype(np.float32))
    heat = _pasted(small.resize(covered, Image.Resampling.BILINEAR), (left, top), size)
    seen = _pasted(Image.new("F", covered, 1.0), (left, top), size)
    image = np.asarray(found.picture.resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    image = image + (1 - seen) * 0.65 * (np.array(PAGE, dtype=np.float32) - image)
    colour = np.array(WEAK) + heat * (np.array(STRONG, dtype=np.float32) - np.array(WEAK))
    mixed = image + OPAQUE * heat * (colour - image)
    return Image.fromarray(np.rint(np.clip(mixed, 0, 255)).astype(np.uint8))


def _pasted(part: PIL.Image.Image, corner: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """`part` on a field of zeros of `size`, (height, width, 1)."""
    field = Image.new("F", size, 0.0)
    field.paste(part, corner)
    return np.asarray(field)[..., None]


def _fitted(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) of an image of `size`, scaled so that its longer side is `side`."""
    scale = side / max(size)
    return max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)


def _shortened(text: str, width: int, font_size: int) -> str:
    font, text = ImageFont.load_default(font_size), " ".join(text.split())
    if font.getlength(text) <= width - 2 * GAP:
        return text
    while text and font.getlength(text + "...") > width - 2 * GAP:
        text = text[:-1]
    return text + "..."


# --- page -------------------------------------------------------------------------------------------------------------


def page(maps: AttentionMaps) -> str:
    """An HTML page that shows the maps by word and layer. It loads nothing: images and weights are in it.

    Weights are bytes relative to the largest of their map, with the shares of attention beside them.
    """
    shown = []
    for index, found in enumerate(maps.pictures):
        weights = np.concatenate([maps.mean(index)[None], found.weights])  # (1 + layers, words, rows, columns)
        most = np.maximum(weights.max((2, 3), keepdims=True), 1e-12)
        left, top, right, bottom = found.box
        width, height = found.picture.size
        shown.append(
            {
                "picture": _data_uri(found.picture),
                "place": [left / width, top / height, (right - left) / width, (bottom - top) / height],
                "grid": list(weights.shape[2:]),
                "bytes": base64.b64encode(np.rint(weights / most * 255).astype(np.uint8).tobytes()).decode(),
                "shares": weights.sum((2, 3)).astype(float).round(4).tolist(),
            }
        )
    layers = ["mean", *(f"layer {index}" for index in range(len(maps.pictures[0].weights)))]
    data = {"question": maps.question, "words": maps.words, "layers": layers, "pictures": shown}
    text = json.dumps(data).replace("<", "\\u003c")  # so that nothing in it ends the script
    return TEMPLATE.replace("DATA", text)


def _data_uri(image: PIL.Image.Image) -> str:
    small = image if max(image.size) <= LARGEST else image.resize(_fitted(image.size, LARGEST))
    form = "PNG" if max(small.size) <= 256 else "JPEG"
    file = io.BytesIO()
    small.save(file, form, quality=90)
    return f"data:image/{form.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


TEMPLATE = """\
<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
script-src 'unsafe-inline'">
<title>Attention maps</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em; color: #1c2028 }
label { display: flex; gap: 1em; align-items: center } input { flex: 1 } output { width: 9em }
#words span { padding: 0 .25em; border-radius: .25em; cursor: pointer } #words .on { background: #ffd60a }
#pictures { display: flex; flex-wrap: wrap; gap: 1em }
figure { margin: 0; flex: 1 1 20em; max-width: 32em } figure div { position: relative; overflow: hidden }
img { display: block; width: 100% } canvas { position: absolute }
</style>
<p id="question"></p>
<p id="words"></p>
<label>word <input id="word" type="range" min="0" value="0"><output id="said"></output></label>
<label>layer <input id="layer" type="range" min="0" value="0"><output id="depth"></output></label>
<div id="pictures"></div>
<script id="data" type="application/json">DATA</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const part = name => document.getElementById(name);
const word = part("word"), layer = part("layer");
const add = (parent, name) => parent.appendChild(document.createElement(name));
part("question").textContent = data.question;
word.max = data.words.length - 1;
layer.max = data.layers.length - 1;
const spans = data.words.map((text, index) => {
  const span = add(part("words"), "span");
  span.textContent = text;
  span.onclick = () => { word.value = index; show(); };
  return span;
});
const figures = data.pictures.map(found => {
  const figure = add(part("pictures"), "figure"), frame = add(figure, "div");
  add(frame, "img").src = found.picture;
  const canvas = add(frame, "canvas");
  [canvas.height, canvas.width] = found.grid;
  ["left", "top", "width", "height"].forEach((side, index) => canvas.style[side] = 100 * found.place[index] + "%");
  return { found, canvas, caption: add(figure, "figcaption"), bytes: atob(found.bytes) };
});
function show() {
  const w = +word.value, l = +layer.value;
  part("said").textContent = data.words[w];
  part("depth").textContent = data.layers[l];
  spans.forEach((span, index) => span.className = index === w ? "on" : "");
  for (const { found, canvas, caption, bytes } of figures) {
    const size = canvas.width * canvas.height, first = (l * data.words.length + w) * size;
    const context = canvas.getContext("2d"), image = context.createImageData(canvas.width, canvas.height);
    for (let cell = 0; cell < size; cell++) {
      const heat = bytes.charCodeAt(first + cell) / 255;
      image.data.set([255 - 41 * heat, 214 - 194 * heat, 10 + 10 * heat, 191 * heat], 4 * cell);
    }
    context.putImageData(image, 0, 0);
    caption.textContent = (100 * found.shares[l][w]).toFixed(1) + "% of the word's attention is on this image";
  }
}
word.oninput = layer.oninput = show;
show();
</script>
</html>
"""


# --- the command ------------------------------------------------------------------------------------------------------


def attend_and_draw(
    checkpoint: str,
    images: Sequence[str],
    question: str,
    output: str = "attention",
    layers: Sequence[int] | None = (),
    as_json: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    system: str | None = None,
    max_new_tokens: int = 64,
) -> int:
    """`saisa attend`: writes `output`.png and `output`.html, prints a table or all numbers as JSON, and returns 0.

    Args:
        checkpoint: folder or hub id.
        images: paths or addresses.
        question: about the images.
        output: path of the files without ending; an ending .png or .html is ignored.
        layers: decoder layers to draw one by one; None: all.
        as_json: whether all numbers are printed.
        dtype, device, system, max_new_tokens: see `saisa_hf.chat.terminal.chat`.

    Raises:
        OSError, ValueError: something cannot be used; the message names it in one line.
    """
    stem = Path(output).expanduser()
    stem = stem.with_suffix("") if stem.suffix in (".png", ".html") else stem
    files = [stem.with_name(stem.name + ending) for ending in (".png", ".html")]
    for file in files:
        check_file(file)
    loaded = [read_image(path)[0] for path in images]
    with quiet_transformers(progress=sys.stderr.isatty()):
        model, processor = load_model(checkpoint, dtype, device, None)
        maps = attend(model, processor, loaded, question, system=system, max_new_tokens=max_new_tokens)
    layers = range(len(maps.pictures[0].weights)) if layers is None else layers
    sheet = io.BytesIO()
    contact_sheet(maps, layers).save(sheet, "PNG")
    write_file(files[0], sheet.getvalue())
    write_file(files[1], page(maps).encode())
    if as_json:
        print(json.dumps(maps.to_dict()))
        return 0
    print(f"{maps.answer}\n\n{_summary(maps)}\n\nwrote {files[0]} and {files[1]}")
    return 0


def _summary(maps: AttentionMaps) -> str:
    """A table of the words: how much of their attention is on each image, and where most of it is."""
    head, columns = ["word"], [maps.words]
    for index in range(len(maps.pictures)):
        name = f" {index + 1}" if len(maps.pictures) > 1 else ""
        mean = maps.mean(index)
        head += [f"on image{name}", "most at row, column"]
        columns.append([f"{share:.1%}" for share in mean.sum((1, 2))])
        most = [divmod(int(weights.argmax()), weights.shape[1]) for weights in mean]
        rows, cells = mean.shape[1:]
        columns.append([f"{row + 1} of {rows}, {column + 1} of {cells}" for row, column in most])
    return table(head, [list(row) for row in zip(*columns)])
