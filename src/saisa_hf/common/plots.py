# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""matplotlib, if it is installed."""

from types import ModuleType

from .extras import needs


def drawing(option: str = "--plot") -> ModuleType:
    """`matplotlib.pyplot`, which draws into files, without a screen.

    Args:
        option: what needs it, for the error message.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = needs("matplotlib", option, extra="plots")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
