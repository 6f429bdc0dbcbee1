# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`vllm serve` in this process, with the limits of `saisa serve`.

vLLM would fetch images from any address and answer on many routes. Here it reads images with this package's code, behind this
package's guard (`vllm/limits.py`); options that would go around those are refused.
"""

import importlib
import importlib.metadata
import json
import os
import sys
from typing import Any

from ..common.extras import needs
from ..common.loading import reading
from ..configuration_saisa import SaisaConfig
from ..image_sources_saisa import ImageLimits
from .run import ServeOptions
from .vllm.registration import CONNECTOR, problem_with


# options of `vllm serve` that this command sets, or that would leave its limits out -> what to do
TAKEN = {
    "--host": "give it in front of --",
    "--port": "give it in front of --",
    "--dtype": "give it in front of --",
    "--model": "the checkpoint is CHECKPOINT",
    "--limit-mm-per-prompt": "--max-images, in front of --, sets it",
    "--allowed-local-media-path": "--allow-local-files, in front of --, is for all files",
    "--trust-request-mm-kwargs": "a request cannot change how images are read",
    "--config": "its options would not be checked; give them here",
    "--grpc": "this command's limits are those of an HTTP server",
    "--grpc-port": "this command's limits are those of an HTTP server",
    "--headless": "start processes without a server with `vllm serve`",
    "--omni": "that is another server",
}
MOST_ANSWERS = "16"  # to a request, its `n`


def installed() -> str | None:
    """The version of vLLM that is installed, or None."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None


def problem_of(checkpoint: str) -> str | None:
    """Why vLLM cannot serve a checkpoint here, or None if it can."""
    version = installed()
    if version is None:
        return "vLLM is not installed"
    if problem := problem_with(version):
        return problem.rstrip(".")
    try:
        if importlib.import_module("vllm.platforms").current_platform.is_unspecified():
            return f"vLLM {version} finds no device that it was built for"
        refusals = importlib.import_module(".vllm.refusals", __package__)
    except ImportError as error:
        return f"vLLM {version} cannot be imported ({error})"
    with reading(checkpoint):
        config = SaisaConfig.from_pretrained(checkpoint)
    try:
        refusals.check_checkpoint(config)
    except ValueError as error:
        return str(error).rstrip(".")
    return None


def start(options: ServeOptions) -> None:
    """Serves until the process is stopped."""
    needs("vllm", "saisa serve --backend vllm", extra="vllm")
    if problem := problem_of(options.checkpoint):
        raise ValueError(f"--backend vllm: {problem}.")
    command = arguments(options, importlib.import_module("vllm.platforms").current_platform.device_type)
    ImageLimits.of_process()  # a limit that is none is named now
    os.environ.update(environment(options))
    sys.argv = ["vllm", *command]  # which the processes that it starts read as well
    main: Any = importlib.import_module("vllm.entrypoints.cli.main").main
    main()


def environment(options: ServeOptions) -> dict[str, str]:
    """What vLLM, and `vllm/limits.py` in its processes, find in the environment."""
    if os.environ.get("VLLM_USE_RUST_FRONTEND", "0") not in ("", "0"):
        raise ValueError("VLLM_USE_RUST_FRONTEND is set, but that server keeps none of these limits: unset it.")
    return {
        "SAISA_SERVE_MAX_REQUEST_BYTES": str(options.max_request_bytes),
        "SAISA_SERVE_MAX_REQUESTS": str(options.max_requests),
        "VLLM_MEDIA_CONNECTOR": CONNECTOR,
        "VLLM_MAX_N_SEQUENCES": os.environ.get("VLLM_MAX_N_SEQUENCES") or MOST_ANSWERS,
    }


def arguments(options: ServeOptions, device: str) -> list[str]:
    """The command line of vLLM.

    Args:
        device: what this vLLM runs on.

    Raises:
        ValueError: an option does not apply to vLLM, or would leave a limit out.
    """
    if options.device not in ("auto", device):
        where = " Choose among several with CUDA_VISIBLE_DEVICES, or" if device == "cuda" else " Or"
        raise ValueError(
            f"--device {options.device}: this vLLM runs on {device!r}.{where} serve with --backend transformers."
        )
    if options.attn_implementation is not None:
        raise ValueError(
            f"--attn-implementation {options.attn_implementation} is transformers'. vLLM chooses by itself; behind -- its "
            "--attention-backend does. Or serve with --backend transformers."
        )
    for one in options.further:
        name = one.partition("=")[0].partition(".")[0].replace("_", "-")
        # argparse takes the beginning of a name for the whole
        taken = [taken for taken in TAKEN if len(name) > 2 and name.startswith("--") and taken.startswith(name)]
        if taken:
            raise ValueError(f"{one!r:.80} behind -- is not taken: {TAKEN[taken[0]]}.")
    return [
        *("serve", options.checkpoint, "--host", options.host, "--port", str(options.port), "--dtype", options.dtype),
        *("--limit-mm-per-prompt", json.dumps({"image": options.max_images})),
        *("--middleware", f"{__package__}.vllm.limits.RequestGuard"),
        *options.further,
    ]
