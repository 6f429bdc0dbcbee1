"""Video files: which frames are taken, that they are those of a plain decoder, and what cannot be read."""

import base64
import io
import struct

import numpy as np
import pytest
import transformers
from PIL import Image
from video_parts import CODECS, NTSC, av, decoded, pictures, turned, write_growing, write_sound, write_video

from saisa_hf.common.videos import video_frames
from saisa_hf.image_sources_saisa import ImageLimits
from saisa_hf.images_saisa import ImageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="module")
def film(folder):
    """An mp4 of 40 frames in which frames refer to later ones."""
    return write_video(folder / "film.mp4", bf="3")


def read(video, **options):
    """(seconds, arrays) of `video_frames`."""
    frames = video_frames(video, **options)
    return next(frames), [np.asarray(frame) for frame in frames]


def equal(one, other):
    return len(one) == len(other) and all(map(np.array_equal, one, other))


# --- which frames -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", CODECS)
@pytest.mark.parametrize("options", [{}, {"num_frames": 7}, {"num_frames": 1}, {"num_frames": 999}, {"fps": 8.0}])
def test_frames_are_those_of_a_plain_decoder(folder, suffix, options):
    path = folder / f"plain{suffix}"
    if not path.exists():
        write_video(path, **{} if suffix == ".ts" else {"rate": NTSC})
    every, times = decoded(path)
    seconds, frames = read(str(path), **options)
    count = min({"fps": int(40 / float(NTSC) * 8)}.get(next(iter(options), ""), options.get("num_frames", 40)), 40)
    taken = [i * 40 // count for i in range(count)]
    assert equal(frames, [every[i] for i in taken])
    assert seconds == pytest.approx([times[i] for i in taken], abs=2e-3)


@pytest.mark.skipif(int(transformers.__version__[0]) < 5, reason="4.57 rounds the step between frames down")
def test_sampling_is_that_of_transformers_video_processors():
    from transformers.video_utils import VideoMetadata, default_sample_indices_fn

    from saisa_hf.common.video_files import sampled

    for total in (1, 7, 40, 301):
        for options in ({"num_frames": 1}, {"num_frames": 5}, {"num_frames": 32}, {"fps": 1.5}, {"fps": 29.97}, {}):
            if options.get("num_frames", 0) > total:
                continue  # an error there; here all frames
            expected = default_sample_indices_fn(VideoMetadata(total, fps=29.97), **options).tolist()
            asked = {"num_frames": None, "fps": None, **options}
            assert sampled(total, **asked, rate=29.97, within=ImageLimits()) == expected


def test_frames_that_do_not_say_when_they_are_shown_are_counted(folder):
    path = write_video(folder / "ahead.avi", codec="libx264", bf="3")
    every, _ = decoded(path)
    assert equal(read(path, num_frames=7)[1], [every[i * 40 // 7] for i in range(7)])


def test_a_rate_that_varies_keeps_its_times(folder):
    times = [0, 3, 4, 20, 21, 50, 120, 121, 122, 300]
    path = write_video(folder / "varies.mkv", count=10, times=times)
    every, _ = decoded(path)
    seconds, frames = read(path, num_frames=5)
    assert equal(frames, every[::2]) and seconds == pytest.approx([0, 0.04, 0.21, 1.2, 1.22], abs=2e-3)


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_a_video_that_is_held_upright_is_read_upright(folder, quarter_turns):
    path = turned(write_video(folder / f"turned{quarter_turns}.mp4", count=3), quarter_turns)
    every, _ = decoded(path)
    assert equal(read(path)[1], [np.rot90(frame, -quarter_turns) for frame in every])


def test_every_source_of_an_image_is_one_of_a_video(film):
    expected, data = read(film, num_frames=3), film.read_bytes()
    text = base64.b64encode(data).decode()
    for source in (str(film), data, io.BytesIO(data), text, f"data:video/mp4;base64,{text}"):
        seconds, frames = read(source, num_frames=3)
        assert seconds == expected[0] and equal(frames, expected[1])


def test_frames_may_be_images_already():
    every = pictures(10)
    for video in (every, [Image.fromarray(one) for one in every], np.stack(every)):
        seconds, frames = read(video, num_frames=4)
        assert seconds == [None] * 4 and equal(frames, [every[i] for i in (0, 2, 5, 7)])
    with pytest.raises(ImageError, match="fps=2 needs the video's own rate"):
        read(every, fps=2)


def test_few_frames_of_many_are_not_all_decoded(folder, monkeypatch):
    path = write_video(folder / "long.mp4", count=300, size=(32, 32))
    limits = {"max_video_pixels": 3 * 12 * 32 * 32}  # at most a group of frames for each of three
    seconds, frames = read(path, num_frames=3, **limits)
    every, times = decoded(path)
    assert equal(frames, [every[i] for i in (0, 100, 200)]) and seconds == pytest.approx(
        [times[i] for i in (0, 100, 200)]
    )
    with pytest.raises(ImageError, match="frames of 1024 pixels have to be decoded, more than max_video_pixels=36864"):
        read(path, num_frames=30, **limits)


# --- what cannot be read ----------------------------------------------------------------------------------------------


def cut(path, share):
    data = path.read_bytes()
    return data[: int(len(data) * share)]


def test_a_truncated_file_is_named_as_one(folder, film):
    with pytest.raises(ImageError, match=r"it has no video stream, or is incomplete|it is no video of a format"):
        read(cut(film, 0.7))  # its index is at the end
    early = write_video(folder / "early.mkv", count=120, rate=30)
    with pytest.raises(ImageError, match=r"the video cannot be read: it is (incomplete|damaged)"):
        read(cut(early, 0.5))
    streamed = folder / "streamed.mp4"
    with av.open(str(film)) as source, av.open(str(streamed), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                container.mux(packet)
    assert equal(read(streamed)[1], read(film)[1])
    with pytest.raises(ImageError, match=r"it is incomplete: .* of 40 frames"):
        read(cut(streamed, 0.8))


def test_damage_in_the_middle_is_an_error_or_the_decoders_best(film):
    data = bytearray(film.read_bytes())
    start = data.index(b"mdat") + 200
    data[start : start + 3000] = bytes(3000)
    try:
        assert len(read(bytes(data))[1]) == 40
    except ImageError as error:
        assert "the video cannot be read" in str(error)


def test_files_without_a_video(folder):
    with av.open(str(folder / "sound.m4a"), "w", format="mp4") as container:
        write_sound(container, container.add_stream("aac", rate=48000), 0.2)
    with pytest.raises(ImageError, match="it has no video stream"):
        read(folder / "sound.m4a")
    with pytest.raises(ImageError, match="it is no video of a format"):
        read(b"")
    with pytest.raises(ImageError, match="it is no video of a format"):
        read(b"#EXTM3U\n#EXTINF:9,\nfile:///etc/passwd\n")
    with pytest.raises(ImageError, match="No such file"):
        read(folder / "none.mp4")
    with pytest.raises(ImageError, match="0 of its 0 frames are asked for"):
        read([])


def test_a_still_image_is_no_video(folder):
    image = Image.fromarray(pictures(1)[0])
    image.save(folder / "still.png")
    for still in (image, np.asarray(image)):
        with pytest.raises(ImageError, match="it is an image"):
            read(still)
    with pytest.raises(ImageError, match="it is no video of a format"):
        read(folder / "still.png")


def test_a_video_without_frames(folder):
    with av.open(str(folder / "none.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
    with pytest.raises(ImageError, match="cannot be read: "):
        read(folder / "none.mp4")


def test_huge_sizes_in_the_header_are_refused_before_decoding(film):
    file = io.BytesIO()
    Image.new("P", (16, 16)).save(file, "GIF", save_all=True, append_images=[Image.new("P", (16, 16), 5)])
    huge = file.getvalue()[:6] + struct.pack("<HH", 65535, 65535) + file.getvalue()[10:]
    with pytest.raises(ImageError, match="it has no size, or one of more than max_image_pixels="):
        read(huge)
    with pytest.raises(ImageError, match=r"the video: 64 x 48 pixels\. Shrink it, or raise max_image_pixels=3000"):
        read(film, max_image_pixels=3000)


@pytest.mark.parametrize("suffix", [".ts", ".mkv"])
def test_frames_that_grow_on_the_way_count_as_they_are(folder, suffix):
    path, sizes = folder / f"grows{suffix}", [(32, 32), (256, 192)]
    frames = read(write_growing(path, sizes), num_frames=4)[1]
    assert [frame.shape[1::-1] for frame in frames] == [size for size in sizes for _ in range(2)]
    with pytest.raises(ImageError, match=r"\d+ pixels have been decoded, more than max_video_pixels=40960"):
        read(path, num_frames=4, max_video_pixels=40 * 32 * 32)  # what the header promises


def test_a_frame_that_is_never_taken_has_no_size_of_its_own_either(folder):
    small, huge = (32, 32), (2048, 1200)
    path = write_growing(folder / "bump.mkv", [small, huge, small, small], count=5)
    assert len(read(path, num_frames=2)[1]) == 2  # 0 and 10 of 20
    with pytest.raises(ImageError, match="it is damaged, or has frames of more than max_image_pixels=2000"):
        read(path, num_frames=2, max_image_pixels=2000)


def test_limits_hold_for_videos(film, monkeypatch):
    with pytest.raises(ImageError, match="more than max_image_bytes=100 bytes"):
        read(film, max_image_bytes=100)
    with pytest.raises(ImageError, match="40 of its 40 frames are asked for, not 1 to max_video_frames=5"):
        read(film, max_video_frames=5)
    monkeypatch.setenv("SAISA_IMAGE_MAX_VIDEO_FRAMES", "6")
    with pytest.raises(ImageError, match="max_video_frames=6"):
        read(film, num_frames=7)
    with pytest.raises(ImageError, match="local files are off"):
        read(str(film), allow_local_files=False)
    with pytest.raises(ImageError, match=r"127\.0\.0\.1, which is no public address"):
        read("http://127.0.0.1:1/film.mp4")


def test_without_pyav_the_error_says_what_to_install(film, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ImportError, match=r"reading a video file needs av: pip install av \(or the extra \[video\]"):
        read(film)
