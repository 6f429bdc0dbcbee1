# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Whether what a run reads is there, and whether it writes to another place: known before anything is loaded."""

import os
from pathlib import Path

from ..common.sources import check_local
from .options import TrainingOptions
from .record import FINISHED, has_record, look
from .sources import check_source


def finished_already(options: TrainingOptions) -> str | None:
    """Looks at all that a run reads, and at its output. Changes nothing.

    Returns:
        What to say if the result is there already; else None.

    Raises:
        ValueError, OSError: see `check_inputs`, `check_output` and `look`.
    """
    check_inputs(options)
    check_output(options)
    if look(options) != FINISHED:
        return None
    known = "" if has_record(options.output) else ", as far as can be told without a record of its settings"
    return (
        f"{options.output} has the result of this run already{known}. To train it further, start from it (model: "
        f"{options.output}) with another output; to train again from the start, use another output or overwrite."
    )


def check_inputs(options: TrainingOptions) -> None:
    """Looks for everything that a run reads: the data first, then the model.

    Raises:
        FileNotFoundError: a path is not there; what looks like one is not looked up on the hub.
        ValueError: a data file is not of a known format.
    """
    for path in options.data:
        check_source("data", path)
    for path in options.eval_data:
        check_source("eval_data", path)
    if options.questions:
        check_source("questions", options.questions)
    if options.images and not os.path.isdir(options.images):
        raise FileNotFoundError(f"images {options.images!r} is not a folder.")
    if options.chat_template.endswith(".jinja") and not os.path.isfile(options.chat_template):
        raise FileNotFoundError(f"chat_template {options.chat_template!r} is not a file.")
    check_local("model", options.model)


def check_output(options: TrainingOptions) -> None:
    """Whether the output is a place of its own.

    Raises:
        FileExistsError: it is a file.
        ValueError: it is the folder of the model or of data, is inside of one of them, or contains something that the run
            reads, by whatever path.
    """
    output = Path(os.path.realpath(options.output))
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output {options.output!r} is a file: expected a folder.")
    read = [("model", options.model), *(("data", path) for path in options.data)]
    read += [("eval_data", path) for path in options.eval_data]
    read += [("images", options.images), ("questions", options.questions), ("chat_template", options.chat_template)]
    for name, path in read:
        if not path or not os.path.exists(path):
            continue  # of the hub, or packaged
        place, what = Path(os.path.realpath(path)), f"output {options.output!r}"
        if _within(place, output) and _within(output, place):
            raise ValueError(
                f"{what} is the same folder as {name} {path!r}, which would be overwritten: choose another."
            )
        if _within(place, output):
            raise ValueError(f"{what} contains {name} {path!r}, which could be overwritten: choose another.")
        if name in ("model", "data", "eval_data") and place.is_dir() and _within(output, place):
            raise ValueError(f"{what} is inside {name} {path!r}, and would change it: choose another.")


def _within(inner: Path, outer: Path) -> bool:
    """Whether `inner` is `outer` or inside of it. File systems may have several names for a folder."""
    return outer.exists() and any(path.exists() and path.samefile(outer) for path in (inner, *inner.parents))
