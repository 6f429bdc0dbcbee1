# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Packages that only some features need: imported when they are used, and named when they are missing."""

import importlib
from types import ModuleType


def needs(module: str, feature: str, package: str | None = None, extra: str | None = None) -> ModuleType:
    """Imports `module`, which `feature` needs.

    Args:
        feature: what the error message says needs it, "--plot" for instance.
        package: what pip calls it; None: the same as the module.
        extra: the extra of this package that installs it.

    Raises:
        ImportError: it is not installed; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = package or module.partition(".")[0]
        of_extra = f" (or the extra [{extra}] of saisa_hf)" if extra else ""
        raise ImportError(f"{feature} needs {package}: pip install {package}{of_extra}") from error
