# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""matplotlib, if it is installed."""

from pathlib import Path
from types import ModuleType

from .destination import check_file
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


def check_plot(path: str | Path) -> None:
    """Finds out whether a plot can be written into the file `path`: before the work that it is to show.

    Raises:
        OSError: the file cannot be written.
        ValueError: its ending is not that of a format of matplotlib.
        ImportError: matplotlib is not installed.
    """
    check_file(Path(path))
    pyplot, ending = drawing(), Path(path).suffix.removeprefix(".").lower()
    known = pyplot.figure().canvas.get_supported_filetypes()
    pyplot.close()
    if ending and ending not in known:
        raise ValueError(f"--plot {path}: expected a file that ends in .png, .svg or .pdf, got .{ending}.")
