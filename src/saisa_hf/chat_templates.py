# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The chat templates that come with the package, for `SaisaProcessor(..., chat_template=chat_template("vicuna"))`."""

from pathlib import Path


_FOLDER = Path(__file__).with_suffix("")


def chat_template_names() -> list[str]:
    """Names that `chat_template` takes, in alphabetical order."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def chat_template(name: str) -> str:
    """The Jinja source of a template.

    Args:
        name: `"vicuna"` (Vicuna v1, as LLaVA-1.5 and saisa-vicuna speak it), `"llama_3"` (saisa-llama3: the same words,
            turns closed by `<|end_of_text|>`), `"chatml"`, or `"plain"` (contents joined by newlines, for captioning).

    Raises:
        ValueError: there is no such template.
    """
    if name not in chat_template_names():
        raise ValueError(f"There is no chat template {name!r}. Known names: {', '.join(chat_template_names())}.")
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
