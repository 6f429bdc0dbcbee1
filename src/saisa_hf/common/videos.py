# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Videos of any kind as frames, and frames as what a model reads: each is an image, whose visual tokens are pooled."""

import contextlib
import copy
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..image_sources_saisa import LIMITS, ImageLimits, open_binary
from ..images_saisa import ImageError, load_image
from ..processing_saisa import SAMPLING, VIDEO, Video, is_video
from ..tiles_saisa import padded, sizes_of
from ..vision_saisa import check_value, frame_lengths, shown
from .video_files import decoded_frames, sampled


if TYPE_CHECKING:
    from ..processing_saisa import SaisaProcessor


# What a processor does with videos, unless its `video_settings` or the `videos_kwargs` of a call say otherwise.
SETTINGS: dict[str, Any] = {
    "num_frames": 32,  # taken of a video that has more, evenly spread
    "fps": None,  # in place of `num_frames`: frames taken for each second
    "do_sample_frames": True,  # False: all frames
    "pool": 2,  # n x n visual tokens of a frame become one
    "timestamps": False,  # whether a text such as "<1.5 seconds>" stands in front of each frame
}
RULES = {"num_frames": (1, 2**20), "fps": (1e-6, 1e6), "do_sample_frames": [True, False], "pool": (1, 100)}
RULES["timestamps"] = [True, False]
FRAMES_AT_ONCE = 32  # that exist as images at a time


@dataclass(frozen=True)
class Film:
    """A video that has been read: the frames that are taken of it, and when they are shown."""

    images: list[Image.Image]
    seconds: list[float | None]


def read_video(
    processor: "SaisaProcessor", video: Any, name: str = "the video", progress: bool = False, **limits: Any
) -> Film:
    """Reads the frames of a video that `processor` would take, so that it need not be decoded again.

    Args:
        video, name, limits: as for `video_frames`.
        progress: whether to show on stderr how far it is.

    Raises:
        ValueError, ImportError: see `video_frames`.
    """
    if isinstance(video, Film):
        return video
    frames = video_frames(video, name, **sampling_of(settings_of(processor, {})), **limits)
    seconds = next(frames)
    with bar("decoding frames", len(seconds), progress) as shown:
        images = []
        for frame in frames:
            images.append(frame)
            shown.update()
    return Film(images, seconds)


def bar(what: str, total: int, progress: bool) -> tqdm:
    """A progress bar on stderr, which goes when it is done; for few frames there is none."""
    return tqdm(total=total, desc=what, unit="", leave=False, file=sys.stderr, disable=not progress or total <= 8)


@contextlib.contextmanager
def encoding_progress(model: torch.nn.Module, total: int, progress: bool) -> Iterator[None]:
    """Shows on stderr how many of `total` images and frames `model` has encoded, from when it begins to until its decoder
    reads them: an answer that is printed meanwhile has its line for itself. They are encoded in turns of `images_at_once`."""
    if not progress or total <= model.config.images_at_once:
        yield
        return
    shown: list[tqdm] = []

    def begin(module: Any, args: Any) -> None:
        if not shown:
            shown.append(bar("encoding images", total, progress))

    def advance(module: Any, args: Any, kwargs: dict, output: Any) -> None:
        shown[0].update(len(kwargs["pixel_values"]))

    def end(*_: Any) -> None:
        for one in shown:
            one.close()

    hooks = [
        model.vision_tower.register_forward_pre_hook(begin),
        model.vision_tower.register_forward_hook(advance, with_kwargs=True),
        model.language_model.register_forward_pre_hook(end),
    ]
    try:
        yield
    finally:
        end()
        for hook in hooks:
            hook.remove()


def sampling_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of `video_frames` that say which frames are taken."""
    return {name: settings[name] if settings["do_sample_frames"] else None for name in ("num_frames", "fps")}


def settings_of(processor: "SaisaProcessor", of_call: dict) -> dict[str, Any]:
    """`SETTINGS` with what the processor and a call have in their place; a number of frames and a rate exclude each other.

    Raises:
        ValueError: there is no such setting, or not with that value.
    """
    found = dict(SETTINGS)
    for where, given in (("video_settings", processor.video_settings or {}), ("videos_kwargs", of_call)):
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if name not in SETTINGS:
                raise ValueError(f"{where} has {name}={shown(value)}. Expected {', '.join(SETTINGS)}.")
            check_value(f"{where}: {name}", value, RULES[name])
        if "num_frames" in given and "fps" in given:
            raise ValueError(f"{where} has both num_frames={given['num_frames']} and fps={given['fps']}. Give one.")
        if {*given} & {*SAMPLING}:
            found |= {"num_frames": None, "fps": None, "do_sample_frames": True}
            if given.get("do_sample_frames") and not {"num_frames", "fps"} & {*given}:
                found["num_frames"] = SETTINGS["num_frames"]
        found |= given
    return found


def listed(videos: Any) -> list[Video]:
    """No video, one, or a list of them, perhaps a list for each text, as one list."""
    if isinstance(videos, (list, tuple)) or getattr(videos, "ndim", 0) == 5:
        first = next(iter(videos), None)
        if isinstance(first, Image.Image) or getattr(first, "ndim", 0) in (2, 3):  # frames of one video
            return [Video(videos)]
        return [video for one in videos for video in listed(one)]
    return [] if videos is None else [videos if is_video(videos) else Video(videos)]


def in_order(processor: "SaisaProcessor", images: list, films: list[Video], texts: list[str] | None) -> list:
    """Images and videos as one list, in the order in which `texts` have their marks. `images` may hold `Video`s, for image
    tokens.

    Raises:
        ValueError: they are not one for each mark.
    """
    if texts is None:
        return [*images, *films]
    token = processor.image_token
    marks = [mark for text in texts for mark in re.findall(f"{re.escape(token)}|{VIDEO}", text)]
    if not films:  # those among the images stand for whatever marks there are
        films, marks = [], [token] * len(marks)
    for name, given, mark in (("images", images, token), ("videos", films, VIDEO)):
        if len(given) != marks.count(mark):
            fix = "Pass one for each: one flat list, or one list per text."
            raise ValueError(f"`{name}`: {len(given) or 'none'} for {marks.count(mark)} {mark!r} in `text`. {fix}")
    of_mark = {token: iter(images), VIDEO: iter(films)}
    return [next(of_mark[mark]) for mark in marks]


def read_in_order(
    processor: "SaisaProcessor", visuals: list, groups: list[int] | None, of_call: dict, images_kwargs: dict
) -> tuple[dict, list[list[int]]]:
    """The image processor's output for images and for the frames of videos, all in order, with `frame_pooling`; and for each
    image and video the tokens that stand for it. Frames are decoded some at a time.

    Raises:
        ValueError: a video or an image cannot be read, or exceeds a limit; a setting is wrong.
        ImportError: PyAV is needed and not installed.
    """
    settings, images_kwargs = settings_of(processor, of_call), dict(images_kwargs)
    return_tensors = images_kwargs.pop("return_tensors", None)
    limits = {name: images_kwargs[name] for name in LIMITS if name in images_kwargs}
    sampling, of_frames = sampling_of(settings), _without_tiles(processor)
    images = [one for one in visuals if not is_video(one)]
    image_rows = iter(_rows(processor._pixels(images, groups, **images_kwargs)) if images else ())
    rows: list[dict] = []  # of each image and frame
    words: list[list[list[int]]] = []  # of each image and video, in front of each of its frames
    for number, one in enumerate(visuals):
        if is_video(one):
            name = f"video {number} of {len(visuals)}"
            frames = video_frames(one.source, name, **sampling, **limits)
            words.append([_timestamp(processor, seconds, name, settings) for seconds in next(frames)])
            while some := list(itertools.islice(frames, FRAMES_AT_ONCE)):
                rows += [_first_picture(row) for row in _rows(of_frames._pixels(some, **images_kwargs))]
        else:
            rows.append(next(image_rows))
            words.append([[]])
    poolings = [settings["pool"] if is_video(one) else 1 for one, own in zip(visuals, words) for _ in own]
    pixels = _joined(rows) | {"frame_pooling": poolings}
    counts = iter(placeholders(processor, pixels))
    image_token = [processor.image_token_id]
    units = [[token for text in own for token in (*text, *image_token * next(counts))] for own in words]
    if return_tensors:
        arrays = {name: x for name, x in pixels.items() if np.ndim(x[0])}
        pixels |= {name: (torch if isinstance(x[0], Tensor) else np).stack(x) for name, x in arrays.items()}
    return pixels, units


def _without_tiles(processor: "SaisaProcessor") -> "SaisaProcessor":
    """The same, with as few tiles of an image as it can make, of which a frame has none."""
    settings: dict[str, Any] = {}
    if processor.image_grid_pinpoints is not None:  # the whole image comes first, whatever they are
        settings["image_grid_pinpoints"] = [min(processor.image_grid_pinpoints, key=np.prod)]
    if getattr(processor.image_processor, "crop_to_patches", False):
        settings["crop_to_patches"] = False
    if settings:
        processor = copy.copy(processor)
        processor.image_processor = copy.copy(processor.image_processor)
        for name, value in settings.items():
            setattr(processor.image_processor, name, value)
    return processor


def _rows(pixels: dict) -> list[dict]:
    """An image processor's output, image by image."""
    return [{name: x[index] for name, x in pixels.items()} for index in range(len(pixels["pixel_values"]))]


def _first_picture(row: dict) -> dict:
    """What an image processor made of a frame, without tiles."""
    return {**row, "pixel_values": row["pixel_values"][:1], "num_tiles": 1} if "num_tiles" in row else row


def _joined(rows: list[dict]) -> dict[str, list]:
    """An image processor's output for all images and frames, each with as many tiles as that with most of them has."""
    if "num_tiles" in rows[0]:
        most = max(row["num_tiles"] for row in rows)
        rows = [row | {"pixel_values": padded(row["pixel_values"][: row["num_tiles"]], most)} for row in rows]
    return {name: [row[name] for row in rows] for name in rows[0]}


def placeholders(processor: "SaisaProcessor", pixels: dict) -> list[int]:
    """Placeholders of each image and frame in a processor's output.

    Raises:
        ValueError: frames are to be pooled, and their tokens are no grid.
    """
    counts, kind = processor._counts(pixels), processor.visual_token_reduction
    if "frame_pooling" not in pixels:
        return counts
    most = max(pixels["frame_pooling"])
    keeps = processor.vision_feature_select_strategy == "full" and processor.num_additional_image_tokens
    if most > 1 and kind is None and keeps:
        kept = "vision_feature_select_strategy='full' keeps a class token in front of it"
        raise ValueError(f"pool={most} of video_settings needs a grid of patches, but {kept}. Set pool to 1.")
    if "num_tiles" in pixels:
        return counts
    sizes = sizes_of(pixels["pixel_values"])
    return frame_lengths(kind, counts, pixels["frame_pooling"], sizes, pixels.get("spatial_shapes"))


def _timestamp(processor: "SaisaProcessor", seconds: float | None, name: str, settings: dict) -> list[int]:
    """The tokens in front of a frame."""
    if not settings["timestamps"]:
        return []
    if seconds is None:
        raise ValueError(
            f"{name} is given as frames, whose times are not known: give a file, or set timestamps to False."
        )
    return processor.tokenizer(f"<{seconds:.1f} seconds>", add_special_tokens=False)["input_ids"]


def video_frames(
    video: Any,
    name: str = "the video",
    num_frames: int | None = None,
    fps: float | None = None,
    check: Callable[[int, int, str], None] | None = None,
    **limits: Any,
) -> Iterator:
    """Yields first the seconds of the frames that `sampled` takes of a video, as a list, with None where they are unknown;
    then these frames one by one, as upright RGB PIL images.

    Args:
        video: a video file, in all the ways in which `load_image` takes images; or frames, as a list of what `load_image`
            takes, or as an array or tensor (frames, ...) of such; or a `Film`, all of it.
        name: what error messages call it.
        num_frames, fps: which frames are taken, see `sampled`. None: all.
        check, limits: as for `load_image`.

    Raises:
        ImageError: it cannot be read, is damaged, or exceeds a limit.
        ImportError: it is a file, and PyAV is not installed.
    """
    within = ImageLimits.of_process(**limits)
    if isinstance(video, Film):
        yield video.seconds
        yield from video.images
        return
    with _named(name):
        if isinstance(video, Image.Image) or getattr(video, "ndim", 4) != 4:
            raise ValueError("it is an image, and a video has an axis of frames: pass it as an image")
        if isinstance(video, (list, tuple)) or hasattr(video, "ndim"):
            taken = sampled(len(video), num_frames, fps, None, within)
            yield [None] * len(taken)
            for index in taken:
                yield load_image(video[index], f"{name}, frame {index}", None, check, **limits)
            return
        with open_binary(video, within) as file:
            yield from decoded_frames(file, name, num_frames, fps, check, within)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Makes an ImageError that names the video of whatever is raised; a package that is missing is another matter."""
    try:
        yield
    except (ImageError, ImportError):
        raise
    except Exception as error:  # FFmpeg and HTTP clients raise all kinds
        kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
        raise ImageError(f"{name} cannot be read: {kind}{error!s:.300}") from error
