# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Images of any kind (PIL images, arrays, tensors, files, URLs) as upright 8-bit RGB images."""

import math

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .image_sources_saisa import ImageLimits, formats, open_binary


class ImageError(ValueError):
    """A ValueError whose message names the image."""


def load_image(image, name: str = "the image", data_format: str | None = None, check=None, **limits):
    """Returns `image` as a PIL image: RGB, upright, on white where it is transparent. Raises ImageError if it cannot be read,
    is empty, exceeds a limit, or has a wrong shape or wrong values.

    Args:
        image: a PIL image; a path, an http(s) URL, a data URI, base64 text, raw bytes or an open binary file; or an array
            or tensor (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4, of type uint8, uint16 (scaled to 8 bits), bool, or
            any other with values in [0, 1], [0, 255] or [0, 65535].
        name: what error messages call it.
        data_format: `"channels_first"` or `"channels_last"`, for arrays whose shape is ambiguous.
        check: a further check, `check(width, height, name)`, of an image that is not decoded yet.
        limits: in place of the process's own: `timeout` and the others of `ImageLimits`."""
    within = ImageLimits.of_process(**limits)

    def check_sides(width: int, height: int) -> None:
        check_size(width, height, name, within.max_image_pixels)
        if check is not None:
            check(width, height, name)

    try:
        if isinstance(image, Tensor):
            image = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
            return _from_array(image, name, data_format, check_sides, ambiguous="channels_first")
        if isinstance(image, np.ndarray):
            return _from_array(image, name, data_format, check_sides)
        if isinstance(image, Image.Image):
            check_sides(*image.size)
            return _upright_rgb(image, name)
        with open_binary(image, within) as file, Image.open(file, formats=formats()) as opened:
            check_sides(*opened.size)
            return _upright_rgb(opened, name)
    except ImageError:
        raise
    except UnidentifiedImageError:
        raise ImageError(f"{name} cannot be read: it is in none of the formats {', '.join(formats())}.") from None
    except Exception as error:  # Pillow's plug-ins and HTTP clients raise all kinds, struct.error for instance
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ImageError(f"{name} cannot be read: {kind}{error!s:.300}") from error


def _upright_rgb(image, name: str):
    """A PIL image as an upright RGB one."""
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _from_array(np.asarray(image), name)
    if image.mode in ("La", "LA", "PA", "RGBa", "RGBA") or "transparency" in image.info:
        return _on_white(image)
    return image.convert("RGB")


def _on_white(image):
    """`image`, which may be transparent, on white; strip by strip, for a copy with four channels takes a lot of memory."""
    result, rows = Image.new("RGB", image.size), math.ceil(2**20 / image.width)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        if strip.mode in ("La", "RGBa"):  # premultiplied alpha: Pillow converts these to few other modes
            strip = strip.convert(strip.mode.upper())
        white = Image.new("RGBA", strip.size, "white")
        result.paste(Image.alpha_composite(white, strip.convert("RGBA")).convert("RGB"), (0, top))
    return result


def check_size(width: int, height: int, name: str, limit: float = math.inf) -> None:
    """Raises ImageError if an image is empty or has more pixels than `limit` or `PIL.Image.MAX_IMAGE_PIXELS`. Each row takes
    time of its own: a side counts as 16 pixels at least."""
    if width < 1 or height < 1:
        raise ImageError(f"{name} is empty: {width} x {height} pixels.")
    if Image.MAX_IMAGE_PIXELS is not None and limit > Image.MAX_IMAGE_PIXELS:
        limit, fix = Image.MAX_IMAGE_PIXELS, f"raise PIL.Image.MAX_IMAGE_PIXELS={Image.MAX_IMAGE_PIXELS}"
    else:
        fix = f"raise max_image_pixels={limit:.0f}"
    if max(width * height, 16 * width, 16 * height) > limit:
        raise ImageError(f"{name}: {width} x {height} pixels. Shrink it, or {fix}.")


def _from_array(array: np.ndarray, name: str, data_format=None, check_sides=None, ambiguous: str = "channels_last"):
    """An array as an upright RGB image; `ambiguous` says where the channels are if they could be at either end."""
    if array.ndim == 3:
        first, last = (array.shape[end] in (1, 3, 4) for end in (0, -1))
        data_format = data_format or (ambiguous if first == last else "channels_first" if first else "channels_last")
        array = np.moveaxis(array, 0, -1) if data_format == "channels_first" else array
    if array.ndim < 2 or array.shape[2:] not in [(), (1,), (3,), (4,)]:
        raise ImageError(f"{name} has shape {array.shape}. Expected (H, W), (H, W, C) or (C, H, W), C of 1, 3 or 4.")
    if array.dtype.kind not in "biuf":
        raise ImageError(f"{name} has dtype {array.dtype}. Expected numbers: uint8, uint16, bool or a float type.")
    if check_sides is not None:
        check_sides(array.shape[1], array.shape[0])
    array = _to_8_bits(array[..., 0] if array.shape[2:] == (1,) else array, name)
    image = Image.fromarray(np.ascontiguousarray(array))
    return _on_white(image) if image.mode == "RGBA" else image.convert("RGB")


def _to_8_bits(array: np.ndarray, name: str) -> np.ndarray:
    """`array` as uint8. Where the type does not say what white is, it is the smallest of 1, 255 and 65535 that covers the
    values (1 for fractions only). Fractions may overshoot by a hundredth, as they do after interpolation."""
    if array.dtype == np.uint8:
        return array
    low, high = float(array.min()), float(array.max())
    if not ((-0.01 if high <= 1.01 else 0) <= low and high <= 65535):  # also if either is NaN
        raise ImageError(f"{name} has values {low:g} to {high:g}. Expected 0 to 1, 255 or 65535: unnormalized values.")
    white = 65535 if np.issubdtype(array.dtype, np.uint16) or high > 255 else 255 if high > 1.01 else 1
    result, rows = np.empty(array.shape, np.uint8), math.ceil(2**20 / array[0].size)
    for top in range(0, len(array), rows):  # in strips: float64 has eight times the size
        values = array[top : top + rows].astype(np.float64)
        result[top : top + rows] = np.round(np.clip(values * (255 / white), 0, 255))
    return result


def pad_to_square(image, color: tuple[int, int, int]):
    """`image` (PIL, RGB) in the middle of a square of `color`; LLaVA's `image_aspect_ratio: "pad"`."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def resized(image, size: dict, resample: int):
    """`image` (PIL) as `RESIZES_FIRST` of the processor have it in `size`, without the four copies that they make of it."""
    if (edge := size.get("shortest_edge")) is None:
        return image.resize((size["width"], size["height"]), resample)
    return image.resize([int(edge * side / min(image.size)) for side in image.size], resample)
