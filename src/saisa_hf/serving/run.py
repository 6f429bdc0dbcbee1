# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`serve`: the limits that hold for all requests, and the server that answers them."""

import dataclasses
import importlib
import os
from typing import Any

from ..common.loading import check_saisa


BACKENDS = {"vllm": ".with_vllm", "transformers": ".with_transformers"}  # name -> module with `start(options)`
# What a request may cost, where neither the command nor the environment says: (environment variable, value).
DEFAULTS = {
    "url_timeout": ("SAISA_IMAGE_TIMEOUT", 10),
    "max_image_bytes": ("SAISA_IMAGE_MAX_BYTES", 20 * 2**20),
    "max_image_pixels": ("SAISA_IMAGE_MAX_PIXELS", 20_000_000),
    "allow_private_urls": ("SAISA_IMAGE_ALLOW_PRIVATE_URLS", 0),
    "allow_local_files": ("SAISA_IMAGE_ALLOW_LOCAL_FILES", 0),
}


@dataclasses.dataclass(frozen=True)
class ServeOptions:
    """How a checkpoint is served.

    Args:
        checkpoint: a folder, or a hub id.
        host, port: where to listen.
        device, dtype, attn_implementation: as in `from_pretrained`.
        max_images: of a request.
        max_request_bytes: of a request's body, and of the images at its addresses together.
        max_requests: answered or waiting at the same time; further ones get status 503.
        further: options of `vllm serve`, for vLLM alone.
    """

    checkpoint: str
    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    dtype: str = "auto"
    attn_implementation: str | None = None
    max_images: int = 16
    max_request_bytes: int = 32 * 2**20
    max_requests: int = 64
    further: tuple[str, ...] = ()


def serve(
    options: ServeOptions,
    backend: str = "auto",
    *,
    url_timeout: float | None = None,
    max_image_bytes: int | None = None,
    max_image_pixels: int | None = None,
    allow_private_urls: bool | None = None,
    allow_local_files: bool | None = None,
) -> None:
    """Answers requests until the process is stopped, and says first what with.

    `backend` is "vllm", "transformers", or "auto": vLLM where it is installed and can serve the checkpoint. The limits of
    images, see `ImageLimits`, are put into this process's environment: they hold for all code that reads images here. What
    is None is as the environment says, or a default that suits a server.

    Raises:
        OSError: no such folder or repository.
        ValueError: it is not a SAISA, a limit is no positive number, or an option does not apply to the backend.
        ImportError: a package is missing, or transformers is too old.
    """
    options = dataclasses.replace(options, checkpoint=check_saisa("CHECKPOINT", options.checkpoint))
    backend, why = _chosen(backend, options.checkpoint)
    print(f"saisa: {options.checkpoint} is served by {backend}, because {why}.", flush=True)
    given = {
        "url_timeout": url_timeout,
        "max_image_bytes": max_image_bytes,
        "max_image_pixels": max_image_pixels,
        "allow_private_urls": allow_private_urls,
        "allow_local_files": allow_local_files,
    }
    put_limits(given)
    importlib.import_module(BACKENDS[backend], __package__).start(options)


def put_limits(given: dict[str, Any]) -> None:
    """Puts limits of images, names of `DEFAULTS`, into the environment; defaults where it says nothing."""
    for name, (variable, default) in DEFAULTS.items():
        if given.get(name) is not None:
            os.environ[variable] = str(given[name])
        else:
            os.environ.setdefault(variable, str(default))


def _chosen(backend: str, checkpoint: str) -> tuple[str, str]:
    """(the backend, why)."""
    if backend != "auto":
        return backend, "--backend says so"
    vllm = importlib.import_module(BACKENDS["vllm"], __package__)
    if problem := vllm.problem_of(checkpoint):
        return "transformers", problem
    return "vllm", f"vLLM {vllm.installed()} is installed"
