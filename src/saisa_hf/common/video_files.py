# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Videos in files of the usual formats, decoded by PyAV, that is by FFmpeg's libraries, within limits."""

import contextlib
import io
import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from PIL import Image

from ..image_sources_saisa import ImageLimits
from ..images_saisa import check_size
from .extras import needs


Check = Callable[[int, int, str], None]

# FFmpeg's names of the formats that are read
VIDEO_FORMATS = ("mov", "mp4", "matroska", "webm", "avi", "mpegts", "mpeg", "ogg", "flv", "asf", "gif")
INDEXED = {"mov", "matroska"}  # those that find a key frame exactly
MOST_PACKETS = 2**20  # about ten hours at 30 frames a second
TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}


def sampled(
    total: int, num_frames: int | None, fps: float | None, rate: float | None, within: ImageLimits
) -> list[int]:
    """Which of a video's `total` frames are taken, evenly spread as by transformers' video processors: `num_frames`, or `fps`
    for each second of a video of `rate` frames a second; at most all of them.

    Raises:
        ValueError: they are none or too many, or the rate is needed and unknown.
    """
    if num_frames is None and fps is not None:
        if not rate:
            raise ValueError(f"fps={fps:g} needs the video's own rate, which is unknown: give num_frames")
        num_frames = max(1, int(min(total, total / rate * fps)))
    count = total if num_frames is None else min(num_frames, total)
    if not 0 < count <= within.max_video_frames:
        most = f"1 to max_video_frames={within.max_video_frames:.0f}"
        raise ValueError(f"{count} of its {total} frames are asked for, not {most}: change num_frames or fps")
    return [i * total // count for i in range(count)]


def decoded_frames(
    file: BinaryIO, name: str, num_frames: int | None, fps: float | None, check: Check | None, within: ImageLimits
) -> Iterator:
    """What `video_frames` yields of an encoded video: the seconds of the frames that are taken, then these frames.

    The file is read through once, so that it is known what has to be decoded, and that this is within the limits. Between
    frames that are far apart, decoding begins anew at a key frame.

    Raises:
        ValueError: it is no video, is damaged, or exceeds a limit.
        ImportError: PyAV is not installed.
    """
    av = needs("av", f"{name}: reading a video file", extra="video")
    file = file if file.seekable() else io.BytesIO(file.read())
    limit = min(within.max_image_pixels, Image.MAX_IMAGE_PIXELS or math.inf, 2**31 - 1)
    # other formats open further files and addresses, which they name
    options = {"format_whitelist": ",".join(VIDEO_FORMATS)}
    # of a frame, before memory is taken for it; coded sizes are somewhat larger than those that are shown
    of_codec = {"max_pixels": str(int(4 * limit + 2**20))}

    def check_sides(width: int, height: int) -> None:
        check_size(width, height, name, within.max_image_pixels)
        if check is not None:
            check(width, height, name)

    with _opened(av, file, options) as (container, stream):
        if not stream.width or not stream.height:
            raise ValueError(f"it has no size, or one of more than max_image_pixels={limit:.0f}")
        check_sides(stream.width, stream.height)
        index = _index(container, stream)
        unit, pixels = float(stream.time_base), stream.width * stream.height
    taken = sampled(len(index.shown), num_frames, fps, index.rate, within)
    plan, decoded = index.plan(taken)
    if decoded * pixels > within.max_video_pixels:
        work = f"{decoded} frames of {pixels} pixels"
        raise ValueError(f"{work} have to be decoded, more than max_video_pixels={within.max_video_pixels:.0f}")
    yield [(index.shown[place] - index.shown[0]) * unit for place, _ in plan]
    file.seek(0)
    with _opened(av, file, options) as (container, stream):
        stream.codec_context.options, spent = of_codec, 0.0

        def decode() -> Iterator:
            nonlocal spent
            for one in _of_sizes_within(av, container.decode(stream), limit):
                spent += one.width * one.height
                if spent > within.max_video_pixels:  # frames may be larger than the first, which the stream has told of
                    most = f"max_video_pixels={within.max_video_pixels:.0f}"
                    raise ValueError(f"{spent:.0f} pixels have been decoded, more than {most}")
                yield one

        frames = decode()
        passed = 0
        for place, key in plan:
            time = index.shown[place]
            if key is not None:
                container.seek(key, stream=stream)
                frames = decode()
            if index.tells_times:
                frame = next((one for one in frames if one.pts is not None and one.pts >= time), None)
            else:
                frame, passed = next(itertools.islice(frames, place - passed, None), None), place + 1
            if frame is None:
                raise ValueError(f"it is damaged: no frame at {(time - index.shown[0]) * unit:.2f} s")
            check_sides(frame.width, frame.height)
            image, turn = frame.to_image(), TURNS.get(round(frame.rotation) % 360)
            yield image if turn is None else image.transpose(turn)


def _of_sizes_within(av, frames: Iterator, limit: float) -> Iterator:
    """`frames`, with an error in words where the decoder refuses the size of one."""
    try:
        yield from frames
    except av.error.ArgumentError as error:
        raise ValueError(f"it is damaged, or has frames of more than max_image_pixels={limit:.0f}") from error


@contextlib.contextmanager
def _opened(av, file, options: dict[str, str]):
    """The container in `file` and its video stream."""
    try:
        container = av.open(file, options=options, metadata_errors="replace")
    except (av.error.InvalidDataError, av.error.ArgumentError):  # the latter: of a format that is not listed
        raise ValueError(
            f"it is no video of a format that is read ({', '.join(VIDEO_FORMATS)}), or is damaged"
        ) from None
    with container:
        streams = [one for one in container.streams.video if not one.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            raise ValueError("it has no video stream, or is incomplete")
        yield container, streams[0]


@dataclass
class _Index:
    """What a stream says of its frames, without decoding them."""

    shown: list[int]  # when a frame is shown, in units of the stream's time base, in order
    keys: dict[int, int]  # when a key frame is shown -> where to seek it
    rate: float | None  # frames a second
    tells_times: bool  # of the frames that come; else they are counted

    def plan(self, places: list[int]) -> tuple[list[tuple[int, int | None]], int]:
        """(place, where to seek before decoding goes on to it) for each of `places` in `shown`; and how many frames are
        decoded in all."""
        starts, position, decoded, plan = sorted(self.keys), 0, 0, []
        for place in places:
            start = starts[max(bisect_right(starts, self.shown[place]) - 1, 0)]
            begin = bisect_left(self.shown, start)
            jumps = begin > position  # which is the place of the frame that would be decoded next
            plan.append((place, self.keys[start] if jumps else None))
            decoded += place + 1 - (begin if jumps else position)
            position = place + 1
        return plan, decoded


def _index(container, stream) -> _Index:
    """Reads a container through. Raises ValueError if it is shorter than it says."""
    shown, keys, end, count = set(), {}, 0.0, 0
    for packet in container.demux():
        if packet.pts is not None:
            end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream is not stream or not packet.size:
            continue
        count += 1
        if count > MOST_PACKETS:
            raise ValueError(f"it has more than {MOST_PACKETS} frames")
        if packet.pts is not None and not packet.is_discard:
            shown.add(packet.pts)
            if packet.is_keyframe:
                keys[packet.pts] = packet.pts if packet.dts is None else packet.dts
    expected = ((container.start_time or 0) + (container.duration or 0)) / 1e6
    if count < stream.frames or end < 0.9 * expected - 0.1:
        seen = f"{count} of {stream.frames} frames" if stream.frames else f"{count} frames"
        raise ValueError(f"it is incomplete: {seen}, {end:.2f} of {expected:.2f} seconds")
    if not shown:
        raise ValueError("it has no frames, or none that says when it is shown")
    first = min(shown)
    is_indexed = bool(INDEXED & {*container.format.name.split(",")})
    if not is_indexed or min(keys, default=first + 1) > first:
        keys = {first: first}  # decoding begins at the first frame, and goes on
    rate = stream.average_rate or (len(shown) / end if end else None)
    return _Index(sorted(shown), keys, rate and float(rate), is_indexed)
