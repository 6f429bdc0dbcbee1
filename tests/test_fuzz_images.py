"""Malformed images, chats and prompts in great number: the right result, or an error that names the image or the part."""

import base64
import contextlib
import io
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from hostile import JSON_VALUES, unclear
from PIL import Image
from test_chat import tiny_processor
from test_image_sources import gif

from saisa_hf.chat.templates import chat_template
from saisa_hf.compat_saisa import optional
from saisa_hf.images_saisa import ImageError, load_image


KINDS = [
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "TGA",
    "PCX",
    "SGI",
    "JPEG2000",
    "AVIF",
    "DIB",
    "ICO",
    "QOI",
]


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def samples():
    """Small valid images of all formats and modes: (name, bytes)."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 17, 4), dtype=np.uint8)
    for kind in KINDS:
        for mode in ("1", "L", "P", "LA", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "PA", "La"):
            image = (
                Image.fromarray(noise).convert(mode) if mode not in ("I;16", "PA", "La") else Image.new(mode, (17, 24))
            )
            exif = Image.Exif()
            exif[0x0112] = 6
            for options in (
                {},
                {"exif": exif},
                {"transparency": 1},
                {"compression": "tiff_lzw"},
                {"progressive": True},
            ):
                with contextlib.suppress(OSError, ValueError, KeyError, TypeError, struct.error, AttributeError):
                    yield f"{kind} {mode} {list(options)}", encoded(image, kind, **options)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth=8, color=2, data=b"", interlace=0, *chunks):
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlace))
    body = b"".join(chunks) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + head + body


def tiff(*entries, data=b""):
    """A TIFF of one directory with (tag, type, count, value) entries."""
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<I", 8) + struct.pack("<H", len(entries)) + packed + b"\0\0\0\0" + data


def crafted():
    """Headers that promise too much or contradict themselves: (name, bytes)."""
    big = 2**31 - 1
    for width, height in ((0, 0), (0, 5), (1, 80_000_000), (80_000_000, 1), (big, big), (9000, 9000), (65535, 1300)):
        for depth, color in ((8, 2), (1, 0), (16, 6), (8, 3), (3, 9)):
            for interlace in (0, 1):
                yield (
                    f"png {width} {height} {depth} {color} {interlace}",
                    png(width, height, depth, color, bytes(99), interlace),
                )
    for kind in (b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"tRNS", b"PLTE", b"acTL", b"fcTL", b"gAMA", b"sPLT", b"IDAT"):
        for data in (b"", b"a\0\0" + zlib.compress(bytes(10**7)), bytes(300), b"\xff" * 7):
            yield f"chunk {kind} {len(data)}", png(5, 4, 8, 2, bytes(64), 0, chunk(kind, data))
    for screen in ((0, 0), (1, 1), (65535, 65535), (9400, 9400), (65535, 1)):
        for frame in ((0, 0), (1, 1), (65535, 65535), (3, 9000)):
            yield f"gif {screen} {frame}", gif(screen, frame)
    for width, height in ((0, 1), (9000, 9000), (2**31, 1), (60000, 60000), (1, 5_000_000)):
        for compression in (1, 2, 3, 5, 7, 8, 32773, 34712, 50000, 99):
            for tile in (None, 16, 60000, 2**31):
                shape = [
                    (256, 4, 1, width),
                    (257, 4, 1, height),
                    (258, 3, 1, 8),
                    (259, 3, 1, compression),
                    (262, 3, 1, 1),
                ]
                strips = [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, 50)]
                tiles = [(277, 3, 1, 1), (322, 4, 1, tile), (323, 4, 1, tile), (324, 4, 1, 8), (325, 4, 1, 50)]
                name = f"tiff {width} {height} {compression} {tile}"
                yield name, tiff(*shape, *(strips if tile is None else tiles), data=bytes(99))
    for size in (9000, 60000, 2**31 - 1):
        for bits in (1, 8, 24, 32):
            head = struct.pack("<IiiHHIIiiII", 40, size, -size, 1, bits, 0, 0, 1, 1, 0, 0)
            yield f"bmp {size} {bits}", b"BM" + struct.pack("<IHHI", 99, 0, 0, 54) + head + bytes(50)
        yield f"ppm {size}", b"P6 %d %d 255\n" % (size, size) + bytes(99)
        yield f"ppm text {size}", b"P1\n%d %d\n" % (size, size) + b"1" * 99
        yield (
            f"tga {size}",
            struct.pack("<BBBHHBHHHHBB", 0, 0, 10, 0, 0, 0, 0, 0, size % 65536, size % 65536, 24, 0) + bytes(99),
        )
        webp = b"VP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + struct.pack("<I", size % 2**24)[:3] * 2
        yield f"webp {size}", b"RIFF" + struct.pack("<I", 4 + len(webp)) + b"WEBP" + webp
        lossless = b"VP8L" + struct.pack("<I", 20) + b"\x2f\xff\xff\xff\x0f" + bytes(15)
        yield f"webp lossless {size}", b"RIFF" + struct.pack("<I", 4 + len(lossless)) + b"WEBP" + lossless
        yield f"sgi {size}", struct.pack(">HBBHHHH", 474, 1, 1, 3, size % 65536, size % 65536, 3) + bytes(600)
        yield f"qoi {size}", b"qoif" + struct.pack(">IIBB", size, size, 4, 0) + bytes(99)
        yield f"pcx {size}", struct.pack("<BBBBHHHH", 10, 5, 1, 8, 0, 0, size % 65536, size % 65536) + bytes(200)
    for text in (
        b"%!PS-Adobe-3.0",
        b"%PDF-1.7",
        b"<svg/>",
        b"\x7fELF",
        b"PK\3\4",
        b"\0" * 99,
        b"",
        b"GIF89a",
        b"\xff\xd8\xff",
    ):
        yield f"starts like {text!r}", text + bytes(30)


def mutated(data, chance):
    data = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 8))):
        place = chance.randrange(min(len(data), chance.choice((30, 200, 10**9))))
        kind = chance.randrange(5)
        if kind == 0:
            data[place] = chance.randrange(256)
        elif kind == 1:
            data[place : place + 4] = chance.choice((b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\0\0\xff\xff"))
        elif kind == 2:
            del data[place : place + chance.randrange(1, 40)]
        elif kind == 3:
            data[place:place] = data[: chance.randrange(60)]
        else:
            del data[max(place, 1) :]
        if not data:
            return b""
    return bytes(data)


def loaded(source):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image = load_image(source, "the picture")
    assert image.mode == "RGB" and min(image.size) > 0 and image.width * image.height <= Image.MAX_IMAGE_PIXELS


def named(case, error):
    """Whether an error says which image it is about, briefly, and that it is no lack of memory."""
    return "the picture" in str(error) and len(str(error)) < 600 and "MemoryError" not in str(error)


def all_wrong(inputs, megabytes=800):
    cases = ((name, lambda source=source: loaded(source)) for name, source in inputs)
    wrong, right, refused = unclear(cases, (ImageError,), named, seconds=20, megabytes=megabytes)
    assert not wrong, wrong
    return right, refused


def test_a_few_images_that_are_malformed():
    chance = random.Random(1)
    valid = list(samples())
    some = [chance.choice(valid) for _ in range(60)]
    right, refused = all_wrong([(f"{i} {name}", mutated(data, chance)) for i, (name, data) in enumerate(some)])
    assert right + refused == 60 and refused > 10


def test_headers_that_promise_too_much():
    right, refused = all_wrong(crafted())
    assert right + refused > 300 and refused > 250


@pytest.mark.slow
def test_images_that_are_valid_are_read_and_mutations_of_them_are_read_or_named():
    chance, valid = random.Random(2), list(samples())
    right, _ = all_wrong((name, data) for name, data in valid if not name.startswith("ICO"))
    assert right > 100
    many = [(f"{i} {name}", mutated(data, chance)) for i in range(12) for name, data in valid]
    right, refused = all_wrong(many)
    assert right + refused == len(many) > 1500 and right > 100 and refused > 500


@pytest.mark.slow
def test_texts_that_may_be_images_are_read_or_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chance, pieces = (
        random.Random(3),
        ["data:", "image/png", ";base64", ",", "AAAA", "=", "%", "/", "..", "http", "://", "é"],
    )
    pieces += [
        "file:",
        "\0",
        " ",
        "\n",
        "[::1]",
        "localhost",
        ":",
        "99999",
        "@",
        "#",
        "?",
        "~",
        "\ud800",
        "x" * 300,
        "\\",
        "A" * 1200,
    ]
    text = base64.b64encode(encoded(Image.new("RGB", (3, 2)), "PNG")).decode()
    texts = ["".join(chance.choices(pieces, k=chance.randrange(7))) for _ in range(500)]
    texts += [mutated(text.encode(), chance).decode("latin-1") for _ in range(200)]
    texts += ["data:image/png;base64," + mutated(text.encode(), chance).decode("latin-1") for _ in range(200)]
    right, refused = all_wrong([(f"{i} {one!r:.60}", one) for i, one in enumerate(texts)])
    assert right + refused == 900 and refused > 500


@pytest.mark.slow
def test_arrays_of_any_shape_and_type_are_read_or_named():
    chance, inputs = random.Random(4), []
    types = [
        "u1",
        "u2",
        "u4",
        "u8",
        "i1",
        "i2",
        "i4",
        "i8",
        "f2",
        "f4",
        "f8",
        "?",
        "O",
        "c8",
        "U3",
        "S3",
        "M8[s]",
        "V4",
    ]
    for number in range(600):
        shape = tuple(chance.choice((0, 1, 2, 3, 4, 5, 7, 30)) for _ in range(chance.randrange(6)))
        kind = chance.choice(types)
        array = np.zeros(shape, kind)
        if array.size and kind[0] in "uif" and chance.random() < 0.7:
            with np.errstate(all="ignore"):
                array.flat[0] = chance.choice(
                    (0, 1, 100, 127, np.nan if kind[0] == "f" else 1, np.inf if kind[0] == "f" else 2)
                )
        if chance.random() < 0.3 and kind in ("u1", "i8", "f4", "f8", "?", "i4"):
            array = torch.from_numpy(array)
        inputs.append((f"{number} {kind} {shape}", array))
    inputs += [
        (repr(type(one)), one)
        for one in (5, 1.5, object(), {}, {1}, iter([]), lambda: 1, b"", bytearray(5), range(3), ...)
    ]
    right, refused = all_wrong(inputs)
    assert right > 30 and refused > 300


# --- chats and prompts ------------------------------------------------------------------------------------------------


VALUES = [*JSON_VALUES, b"a", ("a",), object()]
VALUES += [
    {"type": "text"},
    {"type": "image"},
    {"type": "audio", "url": "a"},
    {"type": "image_url"},
    "{{ 1/0 }}",
    {"type": 5},
]
VALUES += [
    {"type": "image", "image": 5},
    {"type": "image", "path": "no/such"},
    {"type": "video", "text": "a"},
    Image.new("RGB", (3, 2)),
]


def changed(value, chance, depth=0):
    if chance.random() < 0.02 + 0.03 * depth:
        return chance.choice(VALUES)
    if isinstance(value, dict):
        value = {key: changed(one, chance, depth + 1) if chance.random() < 0.6 else one for key, one in value.items()}
        if value and chance.random() < 0.06:
            del value[chance.choice(sorted(value))]
        if chance.random() < 0.05:
            value[chance.choice(("type", "role", "url", "text", "image_url"))] = chance.choice(VALUES)
        return value
    if isinstance(value, list):
        return [changed(one, chance, depth + 1) for one in value if chance.random() < 0.95]
    return value


def chats(count, seed):
    """(name, a call that renders and tokenizes a malformed chat and checks what it gets)."""
    from jinja2 import TemplateError

    chance, processor = random.Random(seed), tiny_processor()
    template = chat_template("vicuna")
    picture = Image.new("RGB", (9, 7), "red")
    for number in range(count):
        parts = [{"type": "image", "image": picture}, {"type": "text", "text": "a <b>"}, "c"]
        chat = [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]
        chat += [{"role": "assistant", "content": "b"}, {"role": "user", "content": [{"type": "text", "text": "d"}]}]
        chat = changed([chat, chat] if number % 3 == 0 else chat, chance)
        options = {"add_generation_prompt": chance.random() < 0.5, "tokenize": True, "return_dict": True}
        if chance.random() < 0.3:
            options[chance.choice(("images", "return_tensors", "padding"))] = chance.choice(
                ([picture], "pt", True, None)
            )

        def call(chat=chat, options=options):
            try:
                found = processor.apply_chat_template(chat, chat_template=template, **options)
            except TemplateError as error:  # of roles, by the template
                raise ValueError(str(error)) from error
            rows = found["input_ids"]
            rows = rows.tolist() if hasattr(rows, "tolist") else rows
            images = sum(row.count(processor.image_token_id) for row in rows)
            assert images == len(found.get("pixel_values", ())) * 4

        yield f"{number}: {chat!r:.1500} {options}", call


def prompts(count, seed):
    """(name, a call of the processor with malformed texts, images and options)."""
    chance, processor = random.Random(seed), tiny_processor()
    picture = Image.new("RGB", (9, 7), "red")
    texts = [
        "a",
        "<image>a",
        "",
        "<image>",
        "<image><image>b",
        ["a"],
        ["<image>a", "b"],
        [],
        [""],
        [[]],
        None,
        5,
        ["a", 5],
        {"a": 1},
    ]
    texts += [("a",), "\ud800", ["\udfff<image>"], b"a", "<ima" + "ge>", "a\0b", "😀<image>\n\u2581 "]
    images = [
        None,
        picture,
        [picture],
        [[picture], []],
        [],
        [[]],
        5,
        "no/such",
        [None],
        [[None]],
        {"a": picture},
        np.zeros((3, 5, 5, 3)),
    ]
    images += [
        torch.zeros(1, 3, 5, 5),
        np.zeros((2, 5, 5), np.uint8),
        [picture, 5],
        [picture] * 3,
        (picture,),
        iter([picture]),
        object(),
    ]
    options = {
        "padding": [True, "longest", "max_length", "most", 5],
        "truncation": [True, "x"],
        "max_length": [0, 1, 5, 50, -1, "a"],
    }
    options |= {"return_tensors": ["pt", "np", "tf?", 5], "padding_side": ["left", "up"], "add_special_tokens": [False]}
    options |= {
        "return_offsets_mapping": [True],
        "text_pair": ["a"],
        "images_kwargs": [{}, {"do_resize": False}],
        "timeout": [0, "x", 5],
    }
    options |= {
        "pad_to_multiple_of": [8, 0],
        "videos": ["a"],
        "audio": [5],
        "allow_private_urls": [True, "x"],
        "text_kwargs": [{}],
    }
    for number in range(count):
        given = {"text": chance.choice(texts), "images": chance.choice(images)}
        for name in chance.sample(sorted(options), chance.randrange(3)):
            given[name] = chance.choice(options[name])
        yield f"{number}: {given!r:.500}", lambda given=given: processor(**given)


def clear(case, error):
    opaque = ("object is not", "has no attribute", "not subscriptable", "not supported between", "unexpected keyword")
    return len(str(error)) > 10 and not any(words in str(error) for words in opaque)


# what transformers 5 says of arguments of wrong types: it names them
CLEAR = (ValueError, ImageError, optional("huggingface_hub.errors", "StrictDataclassFieldValidationError", ValueError))


def test_a_few_malformed_chats_and_prompts():
    for cases in (chats(60, 1), prompts(60, 1)):
        wrong, right, refused = unclear(cases, CLEAR, clear)
        assert not wrong, wrong
        assert right > 5 and refused > 10


@pytest.mark.slow
@pytest.mark.parametrize("make", [chats, prompts])
def test_malformed_chats_and_prompts_are_answered_or_named(make):
    wrong, right, refused = unclear(make(700, 2), CLEAR, clear)
    assert not wrong, wrong
    assert right > 50 and refused > 200
