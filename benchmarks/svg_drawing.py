# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Draws SVG files that consist of plain shapes, as OpenMoji's do: filled and stroked paths, circles, ellipses, rectangles,
lines and polygons in one colour each, with transforms. Corners are round. No gradients, text, masks or styles.
"""

import math
import re
import xml.etree.ElementTree as ElementTree
from itertools import pairwise

import numpy as np
from PIL import Image, ImageColor, ImageDraw


FINER = 4  # pixels are drawn this many times finer and averaged
INHERITED = ("fill", "stroke", "stroke-width", "stroke-linecap", "opacity", "fill-opacity", "stroke-opacity", "display")
NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?")
ARGUMENTS = {"M": 2, "L": 2, "H": 1, "V": 1, "C": 6, "S": 4, "Q": 4, "T": 2, "A": 7, "Z": 0}


def draw_svg(text: str, size: int) -> Image.Image:
    """The picture of an SVG document as RGBA, `size` pixels wide and high.

    Raises:
        ValueError: a path has a letter that SVG does not know.
    """
    root = ElementTree.fromstring(text)
    left, top, width, height = numbers(root.get("viewBox", "0 0 72 72"))
    scale = size * FINER / max(width, height)
    canvas = Image.new("RGBA", (size * FINER, size * FINER), (0, 0, 0, 0))
    matrix = np.array([[scale, 0, -left * scale], [0, scale, -top * scale], [0, 0, 1]])
    _draw(root, canvas, matrix, {})
    return canvas.resize((size, size), Image.Resampling.LANCZOS)


def numbers(text: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(text)]


def _draw(element, canvas: Image.Image, matrix: np.ndarray, style: dict) -> None:
    style = style | {name: element.get(name) for name in INHERITED if element.get(name) is not None}
    if style.get("display") == "none":
        return
    matrix = matrix @ _transform(element.get("transform", ""))
    lines = [(_moved(points, matrix), closed) for points, closed in _outlines(element)]
    if lines:
        mask = Image.new("L", canvas.size)
        if style.get("fill", "black") != "none" and not element.tag.endswith(("}line", "}defs")):
            _paint(canvas, _filled(lines, canvas.size), style.get("fill", "black"), style, "fill-opacity")
        if style.get("stroke", "none") != "none":
            width = float(style.get("stroke-width", 1)) * math.sqrt(abs(np.linalg.det(matrix[:2, :2])))
            _stroke(ImageDraw.Draw(mask), lines, width, style.get("stroke-linecap") == "round")
            _paint(canvas, mask, style["stroke"], style, "stroke-opacity")
    for child in element:
        if not child.tag.endswith(("}defs", "}clipPath")):
            _draw(child, canvas, matrix, style)


def _paint(canvas: Image.Image, mask: Image.Image, colour: str, style: dict, name: str) -> None:
    opacity = float(style.get("opacity", 1)) * float(style.get(name, 1))
    red, green, blue = ImageColor.getrgb(colour)[:3]
    box = mask.getbbox()
    if box is None:
        return
    mask = mask.crop(box)
    if opacity < 1:
        mask = mask.point(lambda value: round(value * opacity))
    layer = Image.new("RGBA", mask.size, (red, green, blue, 0))
    layer.putalpha(mask)
    canvas.alpha_composite(layer, box[:2])


def _filled(lines: list, size: tuple[int, int]) -> Image.Image:
    """A mask of what outlines enclose, by the rule of non-zero winding."""
    winding = None
    for points, _ in lines:
        if len(points) < 3:
            continue
        mask = Image.new("L", size)
        ImageDraw.Draw(mask).polygon([tuple(point) for point in points], fill=255)
        if len(lines) == 1:
            return mask
        x, y = points[:, 0], points[:, 1]
        sign = 1 if np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) > 0 else -1
        turned = sign * (np.asarray(mask) > 0).astype(np.int8)
        winding = turned if winding is None else winding + turned
    if winding is None:
        return Image.new("L", size)
    return Image.fromarray(np.where(winding != 0, 255, 0).astype(np.uint8))


def _stroke(draw: ImageDraw.ImageDraw, lines: list, width: float, round_ends: bool) -> None:
    half = width / 2
    for points, closed in lines:
        if closed:
            points = np.concatenate([points, points[:1]])
        for start, end in pairwise(points):
            along = end - start
            length = math.hypot(*along)
            if length > 0:
                aside = np.array([-along[1], along[0]]) * half / length
                draw.polygon(
                    [tuple(corner) for corner in (start + aside, end + aside, end - aside, start - aside)], 255
                )
        for x, y in points if closed or round_ends else points[1:-1]:
            draw.ellipse((x - half, y - half, x + half, y + half), 255)


def _moved(points: list, matrix: np.ndarray) -> np.ndarray:
    return np.asarray(points, float) @ matrix[:2, :2].T + matrix[:2, 2]


def _transform(text: str) -> np.ndarray:
    matrix = np.eye(3)
    for name, arguments in re.findall(r"(\w+)\s*\(([^)]*)\)", text):
        given, step = numbers(arguments), np.eye(3)
        if name == "matrix":
            step[:2] = np.array(given).reshape(3, 2).T
        elif name == "translate":
            step[:2, 2] = given[0], given[1] if len(given) > 1 else 0
        elif name == "scale":
            step[0, 0], step[1, 1] = given[0], given[-1]
        elif name == "rotate":
            turn = math.radians(given[0])
            step[:2, :2] = [[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]
            if len(given) == 3:
                centre = np.array(given[1:])
                step[:2, 2] = centre - step[:2, :2] @ centre
        matrix = matrix @ step
    return matrix


def _outlines(element) -> list[tuple[list, bool]]:
    """(points, whether it is closed) of each line that an element consists of; none for a group."""
    kind = element.tag.rpartition("}")[2]
    value = lambda name, default=0.0: float(NUMBER.match(element.get(name) or str(default)).group())  # noqa: E731
    if kind == "path":
        return _path(element.get("d", ""))
    if kind in ("circle", "ellipse"):
        across, up = (value("r"), value("r")) if kind == "circle" else (value("rx"), value("ry"))
        turns = np.linspace(0, 2 * math.pi, 64, endpoint=False)
        return [([(value("cx") + across * math.cos(a), value("cy") + up * math.sin(a)) for a in turns], True)]
    if kind == "rect":
        x, y, width, height = (value(name) for name in ("x", "y", "width", "height"))
        rx = min(value("rx", value("ry")), width / 2)
        ry = min(value("ry", rx), height / 2)
        corners = [(width - rx, ry, -0.5), (width - rx, height - ry, 0), (rx, height - ry, 0.5), (rx, ry, 1)]
        points = []
        for centre_x, centre_y, turn in corners:
            for angle in np.linspace(turn, turn + 0.5, 9 if rx else 1) * math.pi:
                points.append((x + centre_x + rx * math.cos(angle), y + centre_y + ry * math.sin(angle)))
        return [(points, True)]
    if kind == "line":
        return [([(value("x1"), value("y1")), (value("x2"), value("y2"))], False)]
    if kind in ("polyline", "polygon"):
        given = numbers(element.get("points", ""))
        return [(list(zip(given[::2], given[1::2])), kind == "polygon")] if given else []
    return []


def _steps(text: str):
    """(letter, arguments) of each step of a path; the flags of arcs may stand without spaces."""
    place, letter = 0, None
    while match := re.compile(r"[\s,]*").match(text, place):
        place = match.end()
        if place >= len(text):
            return
        if text[place].isalpha():
            letter, place = text[place], place + 1
            if letter.upper() not in ARGUMENTS:
                raise ValueError(f"path with {letter!r}, expected one of {', '.join(ARGUMENTS)}: {text[:60]}")
        arguments = []
        for index in range(ARGUMENTS[letter.upper()]):
            place = re.compile(r"[\s,]*").match(text, place).end()
            flag = letter.upper() == "A" and index in (3, 4)
            match = (re.compile("[01]") if flag else NUMBER).match(text, place)
            arguments.append(float(match.group()))
            place = match.end()
        yield letter, arguments
        letter = {"M": "L", "m": "l"}.get(letter, letter)


def _path(text: str) -> list[tuple[list, bool]]:
    lines, here, start, control, before = [], np.zeros(2), np.zeros(2), None, ""
    for letter, given in _steps(text):
        kind, origin = letter.upper(), here if letter.islower() else np.zeros(2)
        if kind == "Z":
            if lines:
                lines[-1] = (lines[-1][0], True)
            here, before = start, kind
            continue
        if kind in "HV":
            end = here.copy()
            end["HV".index(kind)] = origin["HV".index(kind)] + given[0]
        else:
            end = origin + given[-2:]
        if kind == "M":
            lines.append(([end], False))
            start = end
        elif before == "Z":
            lines.append(([here], False))
        points = [origin + given[index : index + 2] for index in range(0, len(given) - 2, 2)] if kind in "CSQ" else []
        if kind in "ST":
            smooth = control is not None and before in ("CS" if kind == "S" else "QT")
            points.insert(0, 2 * here - control if smooth else here)
        if points:
            control = points[-1]
            lines[-1][0].extend(_curve([here, *points, end]))
        elif kind == "A":
            lines[-1][0].extend(_arc(here, end, *given[:5]))
        elif kind != "M":
            lines[-1][0].append(end)
        here, before = end, kind
    return lines


def _curve(points: list, pieces: int = 12) -> list:
    """Points along a Bezier curve, without its first."""
    share = np.linspace(0, 1, pieces + 1)[1:, None]
    points = [np.broadcast_to(point, (pieces, 2)) for point in points]
    while len(points) > 1:
        points = [first + (second - first) * share for first, second in pairwise(points)]
    return list(points[0])


def _arc(start, end, rx: float, ry: float, turned: float, large: float, sweep: float) -> list:
    """Points along an elliptical arc, without its first, as the appendix of the SVG standard computes it."""
    rx, ry = abs(rx), abs(ry)
    if not rx or not ry or np.allclose(start, end):
        return [end]
    angle = math.radians(turned)
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    x, y = turn @ (start - end) / 2
    grow = math.sqrt(max(1, (x / rx) ** 2 + (y / ry) ** 2))
    rx, ry = rx * grow, ry * grow
    rest = max(0, (rx * ry) ** 2 - (rx * y) ** 2 - (ry * x) ** 2) / ((rx * y) ** 2 + (ry * x) ** 2)
    centre = math.sqrt(rest) * (-1 if large == sweep else 1) * np.array([rx * y / ry, -ry * x / rx])
    first = math.atan2((y - centre[1]) / ry, (x - centre[0]) / rx)
    swept = math.atan2((-y - centre[1]) / ry, (-x - centre[0]) / rx) - first
    if sweep and swept < 0:
        swept += 2 * math.pi
    elif not sweep and swept > 0:
        swept -= 2 * math.pi
    angles = first + swept * np.linspace(0, 1, max(4, int(abs(swept) * 8)) + 1)[1:]
    flat = centre + np.stack([rx * np.cos(angles), ry * np.sin(angles)], 1)
    return list(flat @ turn + (start + end) / 2)
