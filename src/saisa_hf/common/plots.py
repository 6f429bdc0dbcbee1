# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""matplotlib, where it is installed."""


def drawing(option: str = "--plot"):
    """`matplotlib.pyplot` that draws into files, without a screen.

    Args:
        option: what needs it, for the error.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"{option} needs matplotlib: pip install saisa-hf[plots]") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
