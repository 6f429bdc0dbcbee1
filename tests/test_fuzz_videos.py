"""Malformed videos in great number: frames within the limits, or an error that names the video."""

import random

import numpy as np
import pytest
from hostile import JSON_VALUES, unclear
from PIL import Image
from test_video import make_processor
from video_parts import pictures, write_video

from saisa_hf.common.videos import video_frames
from saisa_hf.images_saisa import ImageError


INTEGERS = (0, 1, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """Small videos of the usual formats, as bytes."""
    folder = tmp_path_factory.mktemp("good")
    made = {suffix: write_video(folder / f"a{suffix}", count=20) for suffix in (".mp4", ".webm", ".mkv", ".avi")}
    made[".ts"] = write_video(folder / "a.ts", count=20, rate=25)
    stills = [Image.fromarray(one) for one in pictures(4, (16, 12))]
    stills[0].save(folder / "a.gif", save_all=True, append_images=stills[1:])
    return {suffix: path.read_bytes() for suffix, path in {**made, ".gif": folder / "a.gif"}.items()}


def damaged(data, chance):
    """`data` with one to four changes, most of them near either end, where headers and indices are."""
    data = bytearray(data)
    for _ in range(chance.randrange(1, 5)):
        size = len(data)
        near = min(chance.choice((64, 600, size)), size)
        at = chance.choice((chance.randrange(near), size - 1 - chance.randrange(near)))
        kind = chance.randrange(6)
        if kind == 0:
            data[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            order = chance.choice(("big", "little"))
            data[at : at + 4] = chance.choice(INTEGERS).to_bytes(4, order)
        elif kind == 2:
            data[at : at + chance.randrange(1, 40)] = b""
        elif kind == 3:
            data[at:at] = data[at : at + chance.randrange(1, 40)]
        elif kind == 4:
            data[at : at + 20] = bytes(20)
        elif chance.random() < 0.3:
            del data[at:]
        if not data:
            return b"\0"
    return bytes(data)


def read(data):
    frames = video_frames(data, num_frames=3, max_image_pixels=10**6)
    seconds, images = next(frames), list(frames)
    assert 1 <= len(images) == len(seconds) <= 3
    assert all(image.mode == "RGB" and image.width * image.height <= 10**6 for image in images)


def all_wrong(good, count, seed):
    chance = random.Random(seed)
    cases = []
    for number in range(count):
        suffix = chance.choice(sorted(good))
        data = damaged(good[suffix], chance)
        cases.append((f"{number} {suffix}", lambda data=data: read(data)))
    names = lambda case, error: "the video" in str(error)  # noqa: E731
    wrong, right, refused = unclear(cases, (ImageError,), names, seconds=20, megabytes=800)
    assert not wrong, wrong
    return right, refused


def test_damaged_files(good):
    right, refused = all_wrong(good, 60, seed=0)
    assert right > 5 and refused > 5


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 4))
def test_many_damaged_files(good, seed):
    right, refused = all_wrong(good, 800, seed)
    assert right > 100 and refused > 100


def test_what_is_no_video_is_named():
    processor = make_processor()
    values = [
        *JSON_VALUES,
        b"",
        b"a",
        object(),
        {1},
        range(3),
        iter([]),
        lambda: 1,
        np.zeros(0),
        np.zeros((0, 2, 2, 3)),
    ]
    values += [
        np.zeros((1, 2, 0, 3)),
        np.zeros((2, 2, 2, 7)),
        np.full((1, 2, 2, 3), np.nan),
        np.zeros((1, 2, 2, 2, 3, 3)),
    ]
    values += [[Image.new("RGB", (3, 2)), "a"], [Image.new("RGB", (3, 2)), None], Image.new("RGB", (3, 2)), [[5]], "\0"]
    calls = [(repr(one)[:80], lambda one=one: processor(text="<video>", videos=one)) for one in values]
    chats = [[{"role": "user", "content": [{"type": "video", "video": one}]}] for one in values]
    calls += [
        (
            f"chat {one[0]['content'][0]['video']!r:.80}",
            lambda one=one: processor.apply_chat_template(one, tokenize=True),
        )
        for one in chats
    ]
    opaque = ("object is not", "has no attribute", "not subscriptable", "not supported between")
    names = lambda case, error: len(str(error)) > 10 and not any(words in str(error) for words in opaque)  # noqa: E731
    wrong, _, refused = unclear(calls, (ValueError, ImageError), names)
    assert not wrong, wrong
    assert refused > 40
