# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The limits of `saisa serve`, kept in vLLM's server: it reads images with `LimitedImages`, behind a `RequestGuard`.

vLLM makes both by name, in whichever of its processes answers HTTP, so that what they keep to is in the environment.
"""

import asyncio
import contextvars
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

from vllm.multimodal.media import MediaConnector

from ...image_sources_saisa import ImageLimits, read_url
from ...images_saisa import ImageError, load_image
from ..guard import Guard


MAX_REQUEST_BYTES, MAX_REQUESTS = "SAISA_SERVE_MAX_REQUEST_BYTES", "SAISA_SERVE_MAX_REQUESTS"
FETCHING = ThreadPoolExecutor(32, "image from an address")  # they wait most of the time
DECODING = ThreadPoolExecutor(2, "images of a request")
AT_ONCE = 4  # addresses of a request; the others' turns come while these are slow
SHARED = 4  # the images of a request may have so many times the pixels of the largest image


class Spent:
    """What a request has had of what its images may have together."""

    def __init__(self) -> None:
        self.bytes = self.pixels = 0
        self.turns, self.lock = asyncio.Semaphore(AT_ONCE), threading.Lock()

    def add_bytes(self, count: int) -> None:
        """Raises ImageError if the images at addresses have more bytes than a request may have."""
        self.bytes += count
        most = int(os.environ.get(MAX_REQUEST_BYTES, 2**62))
        if self.bytes > most:
            raise ImageError(f"the images at its addresses have more than max_request_bytes={most} bytes.")

    def add_pixels(self, width: int, height: int, name: str) -> None:
        """Raises ImageError if the images have more pixels than those of a request may have."""
        most = SHARED * ImageLimits.of_process().max_image_pixels
        with self.lock:
            self.pixels += width * height
            if self.pixels > most:
                raise ImageError(f"{name}: the images of the request have more than {most:.0f} pixels together.")


SPENT: contextvars.ContextVar[Spent] = contextvars.ContextVar("SPENT")  # of the request that a task works for


class RequestGuard(Guard):
    """A `Guard` as vLLM's `--middleware` makes one. It counts requests per process that answers HTTP."""

    def __init__(self, app):
        super().__init__(app, int(os.environ[MAX_REQUEST_BYTES]), int(os.environ[MAX_REQUESTS]))

    async def __call__(self, scope, receive, send) -> None:
        SPENT.set(Spent())
        await super().__call__(scope, receive, send)


class LimitedImages(MediaConnector):
    """Reads a request's images within `ImageLimits`, as `SaisaProcessor` would. Nothing else is read."""

    async def fetch_image_async(self, image_url, *, image_mode="RGB"):
        loop, spent, source = asyncio.get_running_loop(), self._spent(), image_url
        if self._is_address(image_url):
            async with spent.turns:
                source = await loop.run_in_executor(FETCHING, self._fetched, image_url)
            spent.add_bytes(len(source))
        return await loop.run_in_executor(DECODING, self._decoded, source, image_url, spent)

    def fetch_image(self, image_url, *, image_mode="RGB"):
        source = self._fetched(image_url) if self._is_address(image_url) else image_url
        return self._decoded(source, image_url, self._spent())

    def load_from_url(self, url, media_io, *, fetch_timeout=None):
        raise ValueError("The model takes texts and images.")

    async def load_from_url_async(self, url, media_io, *, fetch_timeout=None):
        self.load_from_url(url, media_io)

    def _spent(self) -> Spent:
        spent = SPENT.get(None)
        if spent is None:  # outside of a `RequestGuard`
            SPENT.set(spent := Spent())
        return spent

    def _is_address(self, url: str) -> bool:
        return url[:8].lower().startswith(("http://", "https://"))

    def _fetched(self, url: str) -> bytes:
        try:
            host = urlsplit(url).hostname
            if self.allowed_media_domains and host not in self.allowed_media_domains:
                raise ValueError(f"its host {host!r:.80} is none of {self.allowed_media_domains}")
            return read_url(url, ImageLimits.of_process()).getvalue()
        except Exception as error:
            what = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
            raise ImageError(f"{_name(url)} cannot be read: {what:.300}") from error

    def _decoded(self, source: str | bytes, url: str, spent: Spent):
        # without the encoded bytes beside it, vLLM knows an image by its pixels
        return load_image(source, _name(url), check=spent.add_pixels)


def _name(url: str) -> str:
    return f"image ({url[:120]})"
