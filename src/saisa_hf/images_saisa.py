# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Images of any kind (PIL images, arrays, tensors, files, URLs) as upright 8-bit RGB images."""

import base64
import io
import os

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from .compat_saisa import read_url


class ImageError(ValueError):
    """A ValueError whose message names the image."""


def load_image(image, name: str = "the image", data_format: str | None = None, timeout: float | None = None):
    """Returns `image` as a PIL image: RGB, upright, on white where it is transparent. Raises ImageError if it cannot be read,
    is empty, exceeds `PIL.Image.MAX_IMAGE_PIXELS`, or has a wrong shape or wrong values.

    Args:
        image: a PIL image; a path, an http(s) URL, a data URI, base64 text, raw bytes or an open binary file; or an array
            or tensor (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4, of type uint8, uint16 (scaled to 8 bits), bool, or
            any other with values in [0, 1], [0, 255] or [0, 65535].
        name: what error messages call it.
        data_format: `"channels_first"` or `"channels_last"`, for arrays whose shape is ambiguous.
        timeout: seconds to wait for an http(s) URL."""
    if isinstance(image, Tensor):
        image = (image.float() if image.is_floating_point() else image).detach().cpu().numpy()
        return _from_array(image, name, data_format, ambiguous="channels_first")
    if isinstance(image, np.ndarray):
        return _from_array(image, name, data_format)
    try:
        if isinstance(image, Image.Image):
            return _upright_rgb(image, name)
        with Image.open(_open_binary(image, timeout)) as opened:
            return _upright_rgb(opened, name)
    except ImageError:
        raise
    except Exception as error:  # Pillow's plug-ins and HTTP clients raise all kinds, struct.error for instance
        raise ImageError(f"{name} cannot be read: {type(error).__name__}: {error}") from error


def _open_binary(source, timeout: float | None):
    """`source` (path, URL, data URI, base64 text, bytes, open file) as something that Image.open takes."""
    if isinstance(source, str):
        if source.startswith(("http://", "https://")):
            source = read_url(source, timeout)
        elif source.startswith("data:"):
            source = base64.b64decode(source.partition(",")[2])
        elif not os.path.exists(source):
            source = from_base64(source) or source
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, (str, os.PathLike)) or hasattr(source, "read"):
        return source
    raise TypeError(f"expected a PIL image, an array, a tensor, a path or a URL, got {type(source).__name__}")


def from_base64(text: str) -> io.BytesIO | None:
    """The image file that `text` encodes in base64, or None. A short text may be a path, so it has to encode an image."""
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
        if len(text) < 1000:
            Image.open(io.BytesIO(content))
    except (ValueError, UnidentifiedImageError):
        return None
    return io.BytesIO(content)


def _upright_rgb(image, name: str):
    check_size(*image.size, name)
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        return _from_array(np.asarray(image), name)
    if image.mode in ("La", "RGBa"):  # premultiplied alpha: Pillow converts these to few other modes
        image = image.convert(image.mode.upper())
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def check_size(width: int, height: int, name: str) -> None:
    """Raises ImageError if an image is empty or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`."""
    if width < 1 or height < 1:
        raise ImageError(f"{name} is empty: {width} x {height} pixels.")
    if (limit := Image.MAX_IMAGE_PIXELS) is not None and width * height > limit:
        raise ImageError(f"{name}: {width} x {height} pixels. Shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS={limit}.")


def _from_array(array: np.ndarray, name: str, data_format: str | None = None, ambiguous: str = "channels_last"):
    """An array as an upright RGB image; `ambiguous` says where the channels are if they could be at either end."""
    if array.ndim == 3:
        first, last = (array.shape[end] in (1, 3, 4) for end in (0, -1))
        data_format = data_format or (ambiguous if first == last else "channels_first" if first else "channels_last")
        array = np.moveaxis(array, 0, -1) if data_format == "channels_first" else array
    if array.ndim < 2 or array.shape[2:] not in [(), (1,), (3,), (4,)]:
        raise ImageError(f"{name} has shape {array.shape}. Expected (H, W), (H, W, C) or (C, H, W), C of 1, 3 or 4.")
    check_size(array.shape[1], array.shape[0], name)
    array = _to_8_bits(array[..., 0] if array.shape[2:] == (1,) else array, name)
    return _upright_rgb(Image.fromarray(array), name)


def _to_8_bits(array: np.ndarray, name: str) -> np.ndarray:
    """`array` as uint8. Where the type does not say what white is, it is the smallest of 1, 255 and 65535 that covers the
    values (1 for fractions only). Fractions may overshoot by a hundredth, as they do after interpolation."""
    if array.dtype == np.uint8:
        return array
    values, low, high = array.astype(np.float64), float(array.min()), float(array.max())
    if not ((-0.01 if high <= 1.01 else 0) <= low and high <= 65535):  # also if either is NaN
        raise ImageError(f"{name} has values {low:g} to {high:g}. Expected 0 to 1, 255 or 65535: unnormalized values.")
    white = 65535 if np.issubdtype(array.dtype, np.uint16) or high > 255 else 255 if high > 1.01 else 1
    return np.round(np.clip(values * (255 / white), 0, 255)).astype(np.uint8)


def pad_to_square(image, color: tuple[int, int, int], name: str):
    """`image` (PIL, RGB) in the middle of a square of `color`; LLaVA's `image_aspect_ratio: "pad"`."""
    side = max(image.size)
    check_size(side, side, f"{name} padded to a square")
    square = Image.new("RGB", (side, side), color)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square
