# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What vLLM calls when it loads its plug-ins. Nothing heavy is imported here: every process of vLLM does this."""

import logging
import os
import re


ARCHITECTURE = "SaisaForConditionalGeneration"
CONNECTOR = "saisa"  # the value of VLLM_MEDIA_CONNECTOR with which images are read within limits
OLDEST, NEWEST = (0, 32), (0, 32)  # the minor releases of vLLM that this was tested with

logger = logging.getLogger(__name__)


def register() -> None:
    """Makes SAISA's architecture, its tokenization and its checks known to vLLM. May be called any number of times.

    With a vLLM that was not tested, other models are served as ever, and a SAISA checkpoint is refused with an error that
    names both versions: vLLM's internals, which the attention metadata are made of, change with every minor release.
    """
    import vllm

    problem = problem_with(vllm.__version__)
    if problem is None:
        _register()
    else:
        _refuse(problem)


def problem_with(version: str) -> str | None:
    """What is to be said about a vLLM of that version; None where it is one of the tested releases."""
    minor = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if OLDEST <= minor <= NEWEST:
        return None
    from ..._version import __version__ as own

    tested = " to ".join(f"{major}.{minor}" for major, minor in sorted({OLDEST, NEWEST}))
    return (
        f"saisa_hf {own} serves SAISA models in vLLM {tested}, but vLLM {version} is installed: install "
        f"'vllm=={tested.split()[-1]}.*', or a saisa_hf that knows vLLM {version}."
    )


def _register() -> None:
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    import saisa_hf  # noqa: F401  (puts SAISA into transformers' Auto classes)

    from .refusals import SaisaChecks

    if "saisa" in RENDERER_REGISTRY.renderers:
        return
    ModelRegistry.register_model(ARCHITECTURE, f"{__package__}.model:{ARCHITECTURE}")
    MODELS_CONFIG_MAP[ARCHITECTURE] = SaisaChecks
    RENDERER_REGISTRY.register("saisa", f"{__package__}.renderer", "SaisaRenderer")
    TokenizerRegistry.register("saisa", "vllm.tokenizers.hf", "CachedHfTokenizer")
    if os.environ.get("VLLM_MEDIA_CONNECTOR") == CONNECTOR:
        _limit_images()


def _limit_images() -> None:
    """Lets vLLM read images with this package's code, within the limits that `saisa serve` has by default."""
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY

    from ..run import put_limits
    from .limits import LimitedImages

    put_limits({})
    MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)(LimitedImages)


def _refuse(problem: str) -> None:
    """Makes vLLM raise `problem` when it reads the config of a SAISA checkpoint, and not before."""
    from ...configuration_saisa import SaisaConfig

    class RefusedConfig(SaisaConfig):
        def __init__(self, *args, **kwargs):
            raise RuntimeError(problem)

        @classmethod
        def from_dict(cls, *args, **kwargs):
            raise RuntimeError(problem)

        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            raise RuntimeError(problem)

    try:
        from vllm.transformers_utils.config import _CONFIG_REGISTRY

        _CONFIG_REGISTRY["saisa"] = RefusedConfig
    except Exception:  # a release without that table: then the log is all there is
        logger.warning(problem)
