"""Where images come from: addresses, files and base64 text, within limits of time, size and reach."""

import base64
import contextlib
import gzip
import http.server
import io
import os
import socket
import socketserver
import sys
import threading
import time
import types
import zlib

import numpy as np
import pytest
import torch
from hostile import bounded
from PIL import Image

from saisa_hf.image_sources_saisa import SERVER, ImageLimits, formats, is_public
from saisa_hf.images_saisa import ImageError, load_image


def encoded(image=None, kind="PNG", **options):
    file = io.BytesIO()
    (Image.new("RGB", (5, 4), "red") if image is None else image).save(file, kind, **options)
    return file.getvalue()


PNG = encoded()
BOMB = b"".join(packed.compress(bytes(2**20)) for packed in [zlib.compressobj(9, wbits=31)] for _ in range(400))


class Hostile(http.server.BaseHTTPRequestHandler):
    """A server whose paths say how it behaves."""

    protocol_version = "HTTP/1.1"
    seen = []

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.seen.append((self.path, dict(self.headers)))
        name, _, rest = self.path.lstrip("/").partition("?")
        with contextlib.suppress(OSError):
            getattr(self, name.partition(".")[0])(rest)

    def answer(self, body, status=200, **headers):
        self.send_response(status)
        for key, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def image(self, rest):
        self.answer(PNG)

    def gzipped(self, rest):
        self.answer(gzip.compress(PNG), Content_Encoding="gzip")

    def bomb(self, rest):
        self.answer(BOMB, Content_Encoding="gzip")

    def behind(self, rest):
        """A small image, and much behind its end."""
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip")
        self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(gzip.compress(PNG))
        for _ in range(400):
            self.wfile.write(bytes(2**20))

    def brotli(self, rest):
        self.answer(PNG, Content_Encoding="br")

    def large(self, rest):
        self.send_response(200)
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(400):
            self.wfile.write(bytes(2**20))

    def announced(self, rest):
        self.answer(PNG, Content_Length=400 * 2**20)

    def hop(self, rest):
        self.answer(b"", 302, Location=rest or "/image")

    def loop(self, rest):
        self.answer(b"", 302, Location=f"/loop?{len(rest) * 'x'}x")

    def missing(self, rest):
        self.answer(b"no", 404)

    def silent(self, rest):
        time.sleep(60)

    def drip_headers(self, rest):
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        self.drip(rest, head=b"")

    def drip(self, rest, head=b"HTTP/1.1 200 OK\r\n\r\n"):
        self.wfile.write(head)
        for _ in range(1000):
            self.wfile.write(b"a")
            time.sleep(0.05)


@contextlib.contextmanager
def hostile_server():
    """The address of a server on this machine that answers as `Hostile` does."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def address():
    with hostile_server() as address:
        yield address


def read(url, **options):
    return load_image(url, **{"allow_private_urls": True, "timeout": 20, **options})


@pytest.mark.parametrize("path", ["image", "gzipped", "hop", "hop?/hop", "image.png?a=ü b&c=%20"])
def test_an_address_is_read(address, path):
    assert read(f"{address}/{path}").size == (5, 4)
    assert Hostile.seen[-1][1]["User-Agent"] == "saisa_hf"


def test_a_name_and_a_password_in_an_address_are_for_its_host_alone(address):
    assert read(f"{address.replace('//', '//me:p%40ss@')}/hop").size == (5, 4)
    (_, first), (_, second) = Hostile.seen[-2:]
    assert first["Authorization"] == f"Basic {base64.b64encode(b'me:p@ss').decode()}"
    assert "Authorization" not in second and first["Host"] == address.removeprefix("http://")


@pytest.mark.parametrize("path", ["silent", "drip", "drip_headers"])
def test_a_slow_address_ends_in_time_however_it_is_slow(address, path):
    start = time.monotonic()
    with pytest.raises(ImageError, match=r"^the image cannot be read: it took longer than timeout=0.5 seconds$"):
        read(f"{address}/{path}", timeout=0.5)
    assert time.monotonic() - start < 20
    time.sleep(1)
    assert "image from an address" not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("path", ["large", "announced", "bomb"])
def test_a_body_is_read_up_to_the_limit_counted_after_decompression(address, path):
    with bounded(30, 100), pytest.raises(ImageError, match=r"more than max_image_bytes=1048576 bytes"):
        read(f"{address}/{path}", max_image_bytes=2**20)


def test_what_comes_behind_a_compressed_image_is_not_kept(address):
    with bounded(30, 50):
        assert read(f"{address}/behind").size == (5, 4)


def test_the_default_limit_of_bytes_holds_without_being_asked_for(address):
    with bounded(60, 400), pytest.raises(ImageError, match=r"more than max_image_bytes=268435456 bytes"):
        read(f"{address}/bomb")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing", "404"),
        ("loop", "30[0-9]|redirect"),
        ("brotli", "Content-Encoding 'br'"),
        ("hop?ftp://127.0.0.1/x.png", "ftp"),
        ("hop?file:///etc/passwd", "file"),
        ("hop?data:image/png;base64,AAAA", "data"),
    ],
)
def test_other_ends_of_a_request_are_named(address, path, message):
    with pytest.raises(ImageError, match=message):
        read(f"{address}/{path}")
    assert len(Hostile.seen) < 100


PRIVATE = ["127.0.0.1", "localhost", "0.0.0.0", "2130706433", "0x7f.1", "017700000001", "127.1", "[::1]", "[::]"]
PRIVATE += [
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "10.0.0.1",
    "172.16.3.4",
    "192.168.1.1",
    "169.254.169.254",
    "[fe80::1]",
]
PRIVATE += ["127.0.0.%31", "localhos%74", "public@127.0.0.1", "8.8.8.8%40127.0.0.1", "127.0.0.1%00.test"]
PRIVATE += [
    "[fd00::1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "224.0.0.1",
    "255.255.255.255",
    "100.64.0.1",
    "[ff02::1]",
    "[fec0::1]",
]


@pytest.mark.parametrize("host", PRIVATE)
def test_an_address_that_is_not_public_is_refused_unless_asked_for(host, monkeypatch):
    tried = []
    monkeypatch.setattr(socket, "create_connection", lambda *arguments: tried.append(arguments))
    with pytest.raises(ImageError) as caught:
        load_image(f"http://{host}/x.png")
    said = "no public address. If that is meant: allow_private_urls=True" in str(caught.value)
    assert not tried and (said or "%" in host or ":" in host)  # or it is no host that could be looked up


def test_public_addresses_pass():
    for address in ("8.8.8.8", "2606:4700:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"):
        assert is_public(address), address


def test_a_redirect_into_the_private_network_is_refused(address, monkeypatch):
    """`public.test` stands for a public host here: its look-up is faked, and so is what is public."""
    from saisa_hf import image_sources_saisa as sources

    port, real = int(address.rpartition(":")[2]), socket.getaddrinfo
    monkeypatch.setattr(sources, "is_public", lambda ip: ip == "127.0.0.1")
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *a, **k: real("127.0.0.1" if host == "public.test" else host, *a, **k)
    )
    assert load_image(f"http://public.test:{port}/image").size == (5, 4)
    with pytest.raises(ImageError, match=r"'10\.1\.2\.3' is 10\.1\.2\.3, which is no public address"):
        load_image(f"http://public.test:{port}/hop?http://10.1.2.3/x")


def test_a_name_is_looked_up_once_and_what_was_found_is_connected_to(address, monkeypatch):
    """DNS that answers differently the second time wins nothing."""
    from saisa_hf import image_sources_saisa as sources

    port, asked, real = int(address.rpartition(":")[2]), [], socket.getaddrinfo

    def rebinding(host, *arguments, **options):
        if host == "rebinding.test":
            asked.append(host)
            host = "127.0.0.1" if len(asked) == 1 else "127.0.0.2"
        return real(host, *arguments, **options)

    monkeypatch.setattr(sources, "is_public", lambda ip: True)
    monkeypatch.setattr(socket, "getaddrinfo", rebinding)
    connected = []
    create = socket.create_connection
    monkeypatch.setattr(socket, "create_connection", lambda to, *rest: connected.append(to) or create(to, *rest))
    assert load_image(f"http://rebinding.test:{port}/image").size == (5, 4)
    assert asked == ["rebinding.test"] and connected == [("127.0.0.1", port)]


def test_a_proxy_of_the_environment_is_used(address, monkeypatch):
    class Proxy(http.server.BaseHTTPRequestHandler):
        asked = []

        def log_message(self, *arguments):
            pass

        def do_GET(self):
            self.asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PNG)

        def do_CONNECT(self):
            self.asked.append(self.path)
            self.send_error(403, "not here")

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Proxy) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        for scheme in ("http", "https"):
            monkeypatch.setenv(f"{scheme}_proxy", f"http://127.0.0.1:{proxy.server_address[1]}")
        monkeypatch.setenv("no_proxy", "")
        assert load_image("http://images.test/a.png").size == (5, 4)
        with pytest.raises(ImageError, match="403"):
            load_image("https://images.test/a.png")
        with pytest.raises(ImageError, match="no public address"):
            load_image("http://10.0.0.1/a.png")
        proxy.shutdown()
    assert Proxy.asked == ["http://images.test/a.png", "images.test:443"]


@pytest.mark.parametrize(
    "url",
    ["http://", "http:///x", "https://[::1", "http://a:99999/", "http://a b/", "HTTP://\x00/", "http://" + "a" * 300],
)
def test_malformed_addresses_are_named(url):
    with bounded(20), pytest.raises(ImageError, match="the image cannot be read"):
        load_image(url, timeout=10)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_limits_come_from_the_environment_and_from_the_call(monkeypatch):
    assert ImageLimits.of_process() == ImageLimits()
    monkeypatch.setenv("SAISA_IMAGE_TIMEOUT", "3")
    monkeypatch.setenv("SAISA_IMAGE_MAX_BYTES", "1e6")
    monkeypatch.setenv("SAISA_IMAGE_MAX_PIXELS", "1000")
    monkeypatch.setenv("SAISA_IMAGE_ALLOW_PRIVATE_URLS", "1")
    monkeypatch.setenv("SAISA_IMAGE_ALLOW_LOCAL_FILES", "0")
    assert ImageLimits.of_process() == ImageLimits(3, 1e6, 1000, True, False)
    assert ImageLimits.of_process(timeout=60, allow_local_files=True) == ImageLimits(60, 1e6, 1000, True, True)
    with pytest.raises(ImageError, match="local files are off"):
        load_image("/etc/passwd")
    with pytest.raises(ImageError, match=r"100 x 100 pixels\. Shrink it, or raise max_image_pixels=1000"):
        load_image(Image.new("RGB", (100, 100)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout is 0. Expected a positive number"),
        ({"timeout": "soon"}, "timeout is 'soon'"),
        ({"timeout": True}, "timeout is True"),
        ({"max_image_bytes": float("nan")}, "max_image_bytes is nan"),
        ({"max_image_pixels": [1]}, r"max_image_pixels is \[1\]"),
        ({"allow_private_urls": 2}, "allow_private_urls is 2. Expected True or False"),
    ],
)
def test_limits_that_are_none_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        load_image(Image.new("RGB", (2, 2)), **options)


def test_an_unknown_limit_is_refused(monkeypatch):
    with pytest.raises(TypeError, match="max_pixels"):
        load_image(Image.new("RGB", (2, 2)), max_pixels=3)
    monkeypatch.setenv("SAISA_IMAGE_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="SAISA_IMAGE_TIMEOUT is 'soon'"):
        load_image(Image.new("RGB", (2, 2)))


def test_in_a_process_that_serves_local_files_are_off_and_calls_tighten_only(monkeypatch, tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    monkeypatch.setitem(sys.modules, SERVER, types.ModuleType(SERVER))
    for path in (str(tmp_path / "a.png"), tmp_path / "a.png", "/etc/passwd", "no/such/file", "file:///etc/passwd"):
        with pytest.raises(ImageError, match=r"local files are off \(allow_local_files\)"):
            load_image(path, allow_local_files=True)
    with pytest.raises(ImageError, match="no public address"):
        load_image("http://127.0.0.1:1/a.png", allow_private_urls=True)
    assert ImageLimits.of_process(timeout=1e9, max_image_bytes=10).timeout == ImageLimits.timeout
    assert ImageLimits.of_process(timeout=1e9, max_image_bytes=10).max_image_bytes == 10
    assert load_image(base64.b64encode(PNG).decode()).size == (5, 4)
    monkeypatch.setenv("SAISA_IMAGE_ALLOW_LOCAL_FILES", "true")
    assert load_image(tmp_path / "a.png").size == (5, 4)


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_is_no_regular_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "socket"))
    for path in (tmp_path / "pipe", str(tmp_path / "pipe"), tmp_path, "/dev/zero", tmp_path / "socket"):
        with bounded(5), pytest.raises(ImageError, match=r"no file, but a folder, named pipe, socket or device|Errno"):
            load_image(path)
    listening.close()


def test_files_and_texts_have_a_limit_of_bytes(tmp_path):
    with open(tmp_path / "sparse.png", "wb") as file:
        file.truncate(10**12)
    with bounded(10, 100), pytest.raises(ImageError, match="max_image_bytes=268435456"):
        load_image(tmp_path / "sparse.png")
    text = "A" * 500_000_000
    for source in (text, "data:image/png;base64," + text):
        with bounded(20, 600), pytest.raises(ImageError, match="max_image_bytes=268435456") as caught:
            load_image(source)
        assert len(str(caught.value)) < 500
    (tmp_path / "a.png").write_bytes(PNG)
    with pytest.raises(ImageError, match="max_image_bytes=10 bytes"):
        load_image(tmp_path / "a.png", max_image_bytes=10)


@pytest.mark.parametrize(
    "source", ["data:image/png;base64,%%%", "data:image/png;base64,AAAA", "data:,", "data:", "data:image/png;base64,A"]
)
def test_broken_data_uris_are_named(source):
    with pytest.raises(ImageError, match="the image cannot be read"):
        load_image(source)


def test_data_uris_may_have_line_breaks_and_percent_signs():
    text = base64.encodebytes(PNG).decode()
    for data in (text, text.replace("\n", "%0A").replace("+", "%2B")):
        assert load_image("data:image/png;charset=utf-8;base64," + data).size == (5, 4)


def test_postscript_starts_no_program(tmp_path):
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n")
    with pytest.raises(ImageError, match="in none of the formats PNG, JPEG"):
        load_image(tmp_path / "a.eps")
    assert not {"EPS", "WMF", "PDF", "MPEG", "GRIB", "HDF5"} & set(formats()) and {"PNG", "JPEG", "WEBP"} <= set(
        formats()
    )


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "PCX", "SGI", "DIB", "JPEG2000"]
)
def test_pictures_of_many_formats_are_read(kind):
    assert load_image(encoded(Image.new("RGB", (16, 16), "red"), kind)).size == (16, 16)


# --- sizes ------------------------------------------------------------------------------------------------------------


def gif(screen, frame):
    """35 bytes: one frame on a screen, with next to no data."""
    return (
        b"GIF89a" + b"".join(n.to_bytes(2, "little") for n in screen) + b"\x80\x00\x00" + b"\x00\x00\x00\xff\xff\xff"
        b"\x21\xf9\x04\x01\x00\x00\x00\x00\x2c\x00\x00\x00\x00"
        + b"".join(n.to_bytes(2, "little") for n in frame)
        + b"\x00\x02\x02\x44\x01\x00\x3b"
    )


@pytest.mark.parametrize(
    ("screen", "frame"), [((60000, 60000), (1, 1)), ((1, 1), (60000, 60000)), ((65535, 3), (3, 65535))]
)
def test_a_gif_is_measured_before_it_is_decoded(screen, frame):
    with bounded(5, 50), pytest.raises(ImageError, match=r"pixels"):
        load_image(gif(screen, frame))


def test_a_palette_with_transparency_takes_the_memory_of_two_images():
    image = Image.new("P", (9000, 9000))
    image.putpalette([0, 0, 0, 255, 255, 255])
    bomb = encoded(image, transparency=0)
    assert len(bomb) < 200_000
    with bounded(60, 600):  # 81 MB and 324 MB
        assert load_image(bomb).getpixel((0, 0)) == (255, 255, 255)
    with bounded(5, 50), pytest.raises(ImageError, match=r"9000 x 9000 pixels.*max_image_pixels=20000000"):
        load_image(bomb, max_image_pixels=20e6)


def test_thin_images_are_refused_before_they_are_decoded():
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 80_000_000, 8, 0, 0, 0, 0))
    bomb = head + chunk(b"IDAT", zlib.compress(bytes(160_000_000), 1)) + chunk(b"IEND", b"")
    with bounded(2, 50), pytest.raises(ImageError, match=r"1 x 80000000 pixels"):
        load_image(bomb)
    assert load_image(Image.new("RGB", (1, 1_000_000))).size == (1, 1_000_000)


def test_text_chunks_that_unpack_to_much_are_refused():
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packed = zlib.compress(bytes(500_000_000), 9)
    for kind, data in ((b"zTXt", b"a\0\0" + packed), (b"iTXt", b"a\0\1\0\0\0" + packed), (b"iCCP", b"a\0\0" + packed)):
        with bounded(10, 50), contextlib.suppress(ImageError):
            load_image(PNG[:33] + chunk(kind, data) + PNG[33:])


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "PCX", "SGI", "JPEG2000", "AVIF"]
)
def test_in_every_format_the_size_is_known_before_anything_is_decoded(kind):
    data = encoded(Image.new("RGB", (3000, 3000)), kind)
    with bounded(5, 100), pytest.raises(ImageError, match=r"3000 x 3000 pixels"):
        load_image(data, max_image_pixels=5e6)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.empty((0, 5, 3)), "empty"),
        (np.empty((5, 5, 0)), "shape"),
        (np.empty(()), "shape"),
        (np.empty((5, 5), object), "dtype object"),
        (np.empty((5, 5), complex), "dtype complex"),
        (np.array([["a"]]), "dtype <U1"),
        (np.full((5, 5), np.nan), "values nan"),
        (np.full((5, 5), np.inf), "values inf"),
        (np.broadcast_to(np.uint8(0), (100_000, 100_000)), "pixels"),
        (np.zeros((3, 3), "datetime64[s]"), "dtype datetime64"),
        (torch.empty((3, 5, 5), device="meta"), "NotImplementedError|meta"),
        (torch.zeros((3, 5, 5), dtype=torch.complex64), "dtype complex"),
        (torch.zeros((3, 5, 5)).to_sparse(), "cannot be read"),
    ],
)
def test_arrays_that_are_no_images_are_named(array, message):
    with bounded(5, 100), pytest.raises(ImageError, match=message):
        load_image(array)


def test_large_arrays_are_scaled_in_strips(tmp_path):
    values = np.memmap(tmp_path / "values", np.uint16, "w+", shape=(8000, 8000))
    values[:2], values[2:4] = 65535, 257
    with bounded(30, 450):  # 64 MB and 256 MB
        image = load_image(values)
    assert [image.getpixel((0, row)) for row in (0, 2, 4)] == [(255,) * 3, (1,) * 3, (0,) * 3]


def test_threads_load_images_as_one_does():
    images = [encoded(Image.fromarray(np.full((7, 9, 3), i, np.uint8))) for i in range(64)]
    found = [None] * 64

    def work(start):
        for i in range(start, 64, 8):
            found[i] = load_image(images[i]).getpixel((0, 0))[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == list(range(64))
