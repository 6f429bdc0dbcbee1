# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of any kind (PIL images, arrays, tensors, files, addresses) as upright RGB pictures of 8 bits."""

import base64
import binascii
import io
import os
from pathlib import Path

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch

from .compat_saisa import read_url


def load_picture(picture, name: str = "the picture", data_format: str | None = None, timeout: float | None = None):
    """`picture` as a PIL image of mode RGB, upright, on white where it is transparent.

    Args:
        picture: a PIL image; a path, an http(s) address, a data URI or base64 text, raw bytes or an open binary file; or
            an array or tensor (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4: uint8, uint16 (scaled to 8 bits), bool,
            or other numbers in [0, 1], in [0, 255] or in [0, 65535].
        name: what error messages call it.
        data_format: `"channels_first"` or `"channels_last"`, for arrays whose shape leaves it open.
        timeout: seconds to wait for an http(s) address.

    Raises:
        ValueError: it cannot be read, is empty, has values or a shape that are not a picture's, or has more pixels than
            `PIL.Image.MAX_IMAGE_PIXELS` (set that to another number, or to None, to move the limit).
    """
    if isinstance(picture, torch.Tensor):
        picture = picture.detach().cpu()
        picture = (picture.float() if picture.is_floating_point() else picture).numpy()
        data_format = data_format or _channel_side(picture.shape, prefer="channels_first")
    if isinstance(picture, np.ndarray):
        return _picture_from_array(picture, name, data_format or _channel_side(picture.shape, prefer="channels_last"))
    try:
        if not isinstance(picture, PIL.Image.Image):
            with PIL.Image.open(_open_binary(picture, timeout)) as opened:
                return load_picture(opened, name)
        check_size(*picture.size, name)
        picture = PIL.ImageOps.exif_transpose(picture)
        if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
            return _picture_from_array(np.asarray(picture), name, "channels_last")
        if picture.mode in ("La", "RGBa"):  # colours multiplied by alpha, with few conversions of their own
            picture = picture.convert(picture.mode.upper())
        if picture.mode in ("LA", "PA", "RGBA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = PIL.Image.alpha_composite(PIL.Image.new("RGBA", picture.size, "white"), picture)
        return picture.convert("RGB")
    except PictureError:
        raise
    except Exception as error:  # Pillow's plug-ins and HTTP clients raise whatever they meet, struct.error for instance
        raise PictureError(f"{name} cannot be read: {type(error).__name__}: {error}") from error


class PictureError(ValueError):
    """A ValueError whose message names its picture."""


def _open_binary(source, timeout):
    """`source` (path, address, data URI, base64 text, bytes, open file) as something that PIL.Image.open takes."""
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if isinstance(source, str):
        if source.startswith(("http://", "https://")):
            return io.BytesIO(read_url(source, timeout))
        if source.startswith("data:"):
            return io.BytesIO(base64.b64decode(source.partition(",")[2]))
        if not os.path.exists(source) and (decoded := from_base64(source)) is not None:
            return decoded
    if isinstance(source, (str, os.PathLike)):
        return Path(source)
    if hasattr(source, "read"):
        return source
    raise TypeError(f"expected a PIL image, an array, a tensor, a path or an address, got {type(source).__name__}")


def from_base64(text: str) -> io.BytesIO | None:
    """The picture file that `text` is in base64, with or without line breaks; None where it is a path, of a file that is not
    there: a short one can be valid base64 of something else."""
    try:
        content = base64.b64decode("".join(text.split()), validate=True)
        if len(text) < 1000:
            PIL.Image.open(io.BytesIO(content))
    except (binascii.Error, ValueError, PIL.UnidentifiedImageError):
        return None
    return io.BytesIO(content)


def check_size(width: int, height: int, name: str, why: str = "has") -> None:
    """Raises PictureError if a picture is empty or has more pixels than `PIL.Image.MAX_IMAGE_PIXELS`."""
    limit = PIL.Image.MAX_IMAGE_PIXELS
    if width < 1 or height < 1:
        raise PictureError(f"{name} is empty: {width} x {height} pixels.")
    if limit is not None and width * height > limit:
        raise PictureError(
            f"{name} {why} {width} x {height} pixels, more than the {limit} of PIL.Image.MAX_IMAGE_PIXELS. Make it "
            "smaller, or raise that limit if you trust where it comes from."
        )


def _channel_side(shape: tuple, prefer: str) -> str:
    """Where the channels of an array of `shape` are; `prefer` where both ends could be."""
    first, last = len(shape) == 3 and shape[0] in (1, 3, 4), len(shape) == 3 and shape[-1] in (1, 3, 4)
    if first != last:
        return "channels_first" if first else "channels_last"
    return prefer


def _picture_from_array(array: np.ndarray, name: str, data_format: str):
    """A PIL image of mode RGB from an array (H, W), (H, W, C) or (C, H, W)."""
    if array.ndim == 2:
        array = array[..., None]
    elif array.ndim == 3 and str(getattr(data_format, "value", data_format)) == "channels_first":
        array = np.moveaxis(array, 0, -1)
    if array.ndim != 3 or array.shape[-1] not in (1, 3, 4):
        raise PictureError(
            f"{name} is an array of shape {tuple(array.shape)}. Expected (H, W), (H, W, C) or (C, H, W) with C of 1, 3 or 4."
        )
    check_size(array.shape[1], array.shape[0], name)
    if array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif array.dtype.kind == "u" and array.dtype.itemsize == 2:
        array = np.round(array.astype(np.float32) / 257)
    elif array.dtype != np.uint8:
        array = _to_8_bits(array, name)
    array = np.ascontiguousarray(array.astype(np.uint8))
    if array.shape[-1] == 1:
        array = np.repeat(array, 3, axis=-1)
    picture = PIL.Image.fromarray(array)
    return load_picture(picture, name) if picture.mode == "RGBA" else picture


def _to_8_bits(array: np.ndarray, name: str) -> np.ndarray:
    """Numbers whose type does not tell what white is, rounded to 0 ... 255: white is the least of 1, 255 and 65535 that
    covers them (1 for fractions alone). Fractions may overshoot by a hundredth, as interpolation makes them do."""
    array = array.astype(np.float64)
    low, high = array.min(), array.max()
    slack = 0.01 if high <= 1.01 else 0.0
    if not (-slack <= low and high <= 65535):  # also where either is NaN
        raise PictureError(
            f"{name} has values from {low:g} to {high:g}. Expected them in [0, 1], [0, 255] or [0, 65535]: pass pictures "
            "as they are, the processor normalizes them."
        )
    scale = 255.0 if high <= 1.01 else 1.0 if high <= 255 else 1 / 257
    return np.round(np.clip(array * scale, 0, 255))


def pad_to_square(picture, color: tuple[int, int, int]):
    """`picture` (PIL, RGB) in the middle of a square of `color`; LLaVA's `image_aspect_ratio: "pad"`."""
    width, height = picture.size
    if width == height:
        return picture
    side = max(width, height)
    square = PIL.Image.new("RGB", (side, side), color)
    square.paste(picture, ((side - width) // 2, (side - height) // 2))
    return square
