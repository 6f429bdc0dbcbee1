"""Small videos that the tests make with PyAV, and what PyAV itself decodes of them."""

from fractions import Fraction

import numpy as np
import pytest


av = pytest.importorskip("av", reason="PyAV is not installed: pip install av")

NTSC = Fraction(30000, 1001)
CODECS = {".mp4": "libx264", ".webm": "libvpx-vp9", ".mkv": "libx264", ".avi": "mpeg4", ".ts": "mpeg2video"}


def pictures(count, size=(64, 48)):
    """`count` RGB images of (width, height), each unlike the others and unlike itself when turned."""
    y, x = np.mgrid[: size[1], : size[0]]
    made = []
    for i in range(count):
        image = np.stack([x * 2 + i, np.full_like(x, i * 5 % 256), y * 3], -1).astype(np.uint8)
        image[: size[1] // 4, : size[0] // 4] = (255, 255 - i % 256, i % 256)
        made.append(image)
    return made


def write_video(path, count=40, rate=NTSC, times=None, size=(64, 48), codec=None, sound=False, **options):
    """A video of `pictures` at `path`, with a key frame every 12 frames. `times`: when each is shown, in hundredths of a
    second, in place of a steady rate."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec or CODECS[path.suffix], rate=rate, options={"g": "12", **options})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        audio = container.add_stream("aac" if path.suffix == ".mp4" else "libopus", rate=48000) if sound else None
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 100)
        for index, picture in enumerate(pictures(count, size)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 100)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if audio is not None:
            write_sound(container, audio, seconds=float(count / rate))
    return path


def write_growing(path, sizes, count=20):
    """A video whose frames are of each of `sizes` in turn; its header has the first."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = *sizes[0], "yuv420p"
        for turn, size in enumerate(sizes):
            codec = av.CodecContext.create("mpeg2video", "w")
            codec.width, codec.height, codec.pix_fmt = *size, "yuv420p"
            codec.framerate, codec.time_base = 25, Fraction(1, 25)
            for index, picture in enumerate([*pictures(count, size), None]):
                frame = None if picture is None else av.VideoFrame.from_ndarray(picture, format="rgb24")
                if frame is not None:
                    frame.pts, frame.time_base = turn * count + index, Fraction(1, 25)
                for packet in codec.encode(frame):
                    packet.stream = stream
                    container.mux(packet)
    return path


def write_sound(container, stream, seconds):
    """A hum."""
    stream.layout = "mono"
    for start in range(0, int(seconds * 48000), 960):
        wave = np.sin(np.arange(start, start + 960) / 40).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 48000, start, Fraction(1, 48000)
        container.mux(stream.encode(frame))
    container.mux(stream.encode())


def decoded(path):
    """All frames of a video, one after the other, as PyAV decodes them, and the seconds at which they are shown."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        first = frames[0].time
        return [frame.to_ndarray(format="rgb24") for frame in frames], [frame.time - first for frame in frames]


def turned(path, quarter_turns):
    """Writes into the header of an mp4 that it is shown turned clockwise; the frames stay as they are."""
    data = path.read_bytes()
    at = data.index(b"tkhd") + 4 + 40  # version and flags, times, track, duration, layer, volume: then the matrix
    cos, sin = {0: (1, 0), 1: (0, 1), 2: (-1, 0), 3: (0, -1)}[quarter_turns]
    matrix = [cos, sin, 0, -sin, cos, 0, 0, 0, 2**14]
    fixed = b"".join((int(x * 65536) if x != 2**14 else 2**30).to_bytes(4, "big", signed=True) for x in matrix)
    path.write_bytes(data[:at] + fixed + data[at + 36 :])
    return path
