# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Where encoded images and videos come from (addresses, files, base64 text), read within limits of time, size and reach."""

import base64
import contextlib
import functools
import io
import ipaddress
import math
import os
import queue
import socket
import ssl
import sys
import threading
import urllib.request
import zlib
from dataclasses import dataclass, fields
from http.client import HTTPConnection, HTTPSConnection
from urllib.parse import quote, unquote, unquote_to_bytes, urlsplit

from PIL import Image, UnidentifiedImageError

from .compat_saisa import optional


SERVER = "transformers.cli.serving.server"  # imported by processes that serve a model over HTTP, and only by them


@dataclass(frozen=True)
class ImageLimits:
    """What reading an image or a video may take. A process has the defaults, or what the environment variables say:
    SAISA_IMAGE_TIMEOUT, ..._MAX_BYTES, ..._MAX_PIXELS, ..._MAX_VIDEO_FRAMES and so on. Where a model is served over HTTP,
    local files are off by default, and a call can only tighten the limits: its arguments may be a stranger's.

    Args:
        timeout: seconds until an http(s) address has been read, redirects included.
        max_image_bytes: of an encoded image or video in a file, in base64, or from an address (after decompression).
        max_image_pixels: of a decoded image or frame; never more than `PIL.Image.MAX_IMAGE_PIXELS`.
        allow_private_urls: whether an address may lead to this machine or into a private network.
        allow_local_files: whether a string may be a path.
        max_video_frames: that are taken of a video.
        max_video_pixels: of all frames that have to be decoded for these; half a minute of work or more."""

    timeout: float = 20.0
    max_image_bytes: float = 2**28
    max_image_pixels: float = math.inf
    allow_private_urls: bool = False
    allow_local_files: bool = True
    max_video_frames: float = 1024
    max_video_pixels: float = 2**36

    @classmethod
    def of_process(cls, **asked) -> "ImageLimits":
        """This process's limits, with what a call `asked` for. Raises ValueError for values of wrong types."""
        limits, is_served = {}, SERVER in sys.modules
        for field in fields(cls):
            name, default = field.name, not is_served if field.name == "allow_local_files" else field.default
            variable = "SAISA_IMAGE_" + name.replace("image_", "").upper()
            value = _checked(variable, os.environ.get(variable) or default, field.type)
            wanted = _checked(name, value if asked.get(name) is None else asked[name], field.type)
            limits[name] = min(value, wanted) if is_served else wanted
        return cls(**asked | limits)

    def check_bytes(self, count: float) -> None:
        if count > self.max_image_bytes:
            raise ValueError(f"it has more than max_image_bytes={self.max_image_bytes:.0f} bytes")


LIMITS = tuple(field.name for field in fields(ImageLimits))


def _checked(name: str, value, kind):
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        number = float({"true": 1, "false": 0}.get(str(value).lower(), value) if kind is bool else value)
        if number in (0, 1) if kind is bool else number > 0 and value is not True:
            return kind(number)
    raise ValueError(f"{name} is {value!r:.80}. Expected {'True or False' if kind is bool else 'a positive number'}.")


def open_binary(source, limits: ImageLimits):
    """A context with the encoded image in `source` as a binary file: a path, an http(s) address, a data URI, base64 text,
    bytes, or an open file, which stays open."""
    if isinstance(source, str):
        if source[:8].lower().startswith(("http://", "https://")):
            return read_url(source, limits)
        if source[:5].lower() == "data:":
            head, _, data = source.partition(",")
            if not head.lower().endswith(";base64"):
                return io.BytesIO(unquote_to_bytes(data))
            if found := from_base64(unquote(data), limits):
                return found
            raise ValueError("what follows 'base64,' is no image in base64")
        if (not limits.allow_local_files or not os.path.exists(source)) and (found := from_base64(source, limits)):
            return found
    if isinstance(source, bytes):
        return io.BytesIO(source)
    if hasattr(source, "read"):
        return contextlib.nullcontext(source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"expected a PIL image, an array, a tensor, a path or a URL, got {type(source).__name__}")
    if not limits.allow_local_files:
        raise ValueError("it is no address, data URI or base64 text, and local files are off (allow_local_files)")
    if os.path.exists(source) and not os.path.isfile(source):  # to open a pipe waits, and to read a device never ends
        raise ValueError("it is no file, but a folder, named pipe, socket or device")
    limits.check_bytes(os.path.getsize(source))
    return open(source, "rb")


def from_base64(text: str, limits: ImageLimits | None = None) -> io.BytesIO | None:
    """The image file that `text` encodes in base64, or None. A short text may be a path, so it has to encode an image."""
    (limits or ImageLimits.of_process()).check_bytes(len(text) * 0.73)  # 0.75, but for line breaks
    try:
        content = io.BytesIO(base64.b64decode("".join(text.split()), validate=True))
        if len(text) < 1000:
            Image.open(content, formats=formats())
    except (ValueError, UnidentifiedImageError):
        return None
    return content


@functools.lru_cache(1)
def formats() -> list[str]:
    """Pillow's names of the formats that are read: of pictures, and of those that say how large they are before they are
    decoded. Formats that start programs, PostScript above all, are not among them."""
    Image.init()
    wanted = "PNG JPEG MPO WEBP GIF BMP DIB TIFF PPM JPEG2000 AVIF HEIF PCX QOI SGI TGA"
    return [name for name in wanted.split() if name in Image.OPEN]


def read_url(url: str, limits: ImageLimits) -> io.BytesIO:
    """What is at an http(s) address. Every host on the way, redirects included, is looked up once; the address found is
    checked, and connected to. A proxy that the environment names looks names up itself, and decides what it reaches."""
    fetching, answers = _Fetching(limits), queue.SimpleQueue()

    def fetch():  # in a thread of its own: no timeout of a socket ends what drips in byte by byte, or a slow look-up
        try:
            answers.put(fetching.read(url))
        except Exception as error:
            answers.put(error)
        for one in fetching.sockets:
            one.close()

    threading.Thread(target=fetch, name="image from an address", daemon=True).start()
    try:
        answer = answers.get(timeout=limits.timeout)
    except queue.Empty:
        fetching.is_over = True
        for one in fetching.sockets:
            with contextlib.suppress(OSError):  # it has ended at this moment
                one.shutdown(socket.SHUT_RDWR)
        raise ValueError(f"it took longer than timeout={limits.timeout:g} seconds") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


class _Fetching(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """One address on its way: urllib's redirects and proxies, on connections that are checked."""

    def __init__(self, limits: ImageLimits):
        super().__init__()
        self.limits, self.is_over, self.sockets = limits, False, []

    def read(self, url: str) -> io.BytesIO:
        parts = urlsplit(url)
        user, _, host = parts.netloc.rpartition("@")
        host = host if host.isascii() else host.encode("idna").decode()
        path, query = (quote(part, safe="/%:;=@!$&'()*+,~?[]|") for part in (parts.path, parts.query))
        request = urllib.request.Request(parts._replace(netloc=host, path=path, query=query, fragment="").geturl())
        if user:  # not for those that are redirected to
            basic = base64.b64encode(unquote_to_bytes(user)).decode()
            request.add_unredirected_header("Authorization", f"Basic {basic}")
        opener = urllib.request.OpenerDirector()  # of http(s) alone; the usual one reads file: and ftp: as well
        opener.addheaders = [("User-Agent", "saisa_hf")]
        others = "HTTPRedirectHandler ProxyHandler HTTPDefaultErrorHandler HTTPErrorProcessor UnknownHandler"
        for handler in (self, *(getattr(urllib.request, name)() for name in others.split())):
            opener.add_handler(handler)
        with opener.open(request, timeout=2 * self.limits.timeout) as response:
            encoding, content = response.headers.get("Content-Encoding", "identity").lower(), io.BytesIO()
            if encoding not in ("identity", "gzip", "x-gzip", "deflate"):
                raise ValueError(f"Content-Encoding {encoding!r:.40} was not asked for")
            unpack = zlib.decompressobj(47)  # 47: of gzip or of zlib
            self.limits.check_bytes(response.length or 0)
            while not unpack.eof and (chunk := response.read(2**16)):  # what comes behind the end would pile up
                most = int(self.limits.max_image_bytes) + 1 - content.tell()
                content.write(chunk if encoding == "identity" else unpack.decompress(chunk, most))
                self.limits.check_bytes(content.tell())
        content.seek(0)
        return content

    def http_open(self, request, kind=HTTPConnection, **options):  # type: ignore[override]
        def connection(host: str, **others):
            made = kind(host, **options, **others)
            made._create_connection = functools.partial(self.connected, request)
            return made

        return self.do_open(connection, request)

    def https_open(self, request):
        context, where = ssl.create_default_context(), optional("certifi", "where")
        if where is not None:  # not every system has certificates of its own
            context.load_verify_locations(where())
        return self.http_open(request, HTTPSConnection, context=context)

    def connected(self, request, address: tuple[str, int], timeout, *_) -> socket.socket:
        """A socket to `address`, which is a proxy's where `request` goes through one."""
        is_proxy = request.has_proxy() or request._tunnel_host is not None
        host = unquote(urlsplit(request.full_url).hostname) if is_proxy else address[0]
        try:
            found: list = [one[4][:2] for one in socket.getaddrinfo(host, address[1], type=socket.SOCK_STREAM)]
        except (OSError, UnicodeError):
            if not is_proxy:
                raise
            found = []
        private = [ip for ip, _ in found if not is_public(ip)]
        if private and not self.limits.allow_private_urls:
            fix = "If that is meant: allow_private_urls=True, or SAISA_IMAGE_ALLOW_PRIVATE_URLS=1 in the environment"
            raise ValueError(f"{host!r:.200} is {private[0]}, which is no public address. {fix}")
        error: OSError = TimeoutError()
        for one in [address] if is_proxy else found:
            try:
                made = socket.create_connection(one, timeout)
                self.sockets.append(made.dup())  # which ends this one, too, when it is shut down
                if not self.is_over:
                    return made
            except OSError as failure:
                error = failure
        raise error


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, and with an IPv6 address the IPv4 address that it may stand for."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and (ip.ipv4_mapped or int(ip) >> 32 == 0x64FF9B << 64):  # the latter: NAT64
        return is_public(str(ipaddress.IPv4Address(int(ip) % 2**32)))
    if ip.version == 6 and ip.sixtofour and not is_public(str(ip.sixtofour)):
        return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or getattr(ip, "is_site_local", False))
