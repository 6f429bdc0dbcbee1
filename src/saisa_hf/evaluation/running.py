# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the runs of `saisa eval` and `saisa ask` have in common: the model that answers, and how a run that fails ends."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..common.journal import Journal
from .processes import Processes


if TYPE_CHECKING:
    from ..answering import Answerer


def load_answerer(model: str, chat_template: str, loading: dict[str, Any], asking: dict[str, Any]) -> "Answerer":
    """A model that answers questions.

    Args:
        model: folder, or hub id, of a SAISA checkpoint.
        chat_template: name of a packaged template, or a .jinja file; empty: the checkpoint's own.
        loading: arguments of `load_model`.
        asking: arguments of `Answerer`.
    """
    from ..answering import Answerer
    from ..common.loading import load_model, quiet_transformers
    from ..training.encoding import template_source

    with quiet_transformers(progress=False):
        loaded, processor = load_model(model, **loading)
        return Answerer(loaded, processor, chat_template=template_source(chat_template, processor), **asking)


@contextmanager
def without_trace(journal: Journal, processes: Processes) -> Iterator[None]:
    """A run that ends inside with an error before its first answer leaves no beginning that other settings would disagree
    with."""
    try:
        yield
    except BaseException:
        if processes.count == 1 and not len(journal):
            journal.remove()
        raise
