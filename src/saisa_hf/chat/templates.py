# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The chat templates of the package, for `SaisaProcessor(..., chat_template=chat_template("vicuna"))`, and what makes a
language model's own template accept images."""

import json
import os
from pathlib import Path


_FOLDER = Path(__file__).parent

# In front of a template that reads contents as strings: lists of parts become strings, an image on a line of its own.
_PARTS_AS_STRINGS = """\
{%- macro saisa_words(content) -%}
    {%- for part in content -%}
        {%- if not loop.first and (part.type == 'image' or loop.previtem.type == 'image') -%}{{- '\\n' -}}{%- endif -%}
        {%- if part.type == 'image' -%}{{- IMAGE_TOKEN -}}{%- else -%}{{- part.text -}}{%- endif -%}
    {%- endfor -%}
{%- endmacro -%}
{%- set saisa = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- if message.content is defined and message.content is iterable and message.content is not string -%}
        {%- set saisa.messages = saisa.messages + [dict(message, content=saisa_words(message.content))] -%}
    {%- else -%}
        {%- set saisa.messages = saisa.messages + [message] -%}
    {%- endif -%}
{%- endfor -%}
{%- set messages = saisa.messages -%}
"""


def chat_template_names() -> list[str]:
    """The names that `chat_template` takes, in alphabetical order."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def chat_template(name: str, image_token: str = "<image>") -> str:
    """The Jinja source of a template.

    Args:
        name: `"vicuna"` (Vicuna v1, as LLaVA-1.5 and saisa-vicuna speak it), `"llama_3"` (saisa-llama3: the same words,
            turns closed by `<|end_of_text|>`), `"chatml"`, or `"plain"` (contents joined by newlines, for captioning).
        image_token: what it writes for an image.

    Raises:
        ValueError: there is no such template.
    """
    if name not in chat_template_names():
        raise ValueError(f"There is no chat template {name!r}. Known names: {', '.join(chat_template_names())}.")
    source = (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return source if image_token == "<image>" else source.replace("'<image>'", _quoted(image_token))


def read_chat_template(file: str | os.PathLike) -> str:
    """The Jinja source in the file of `--chat-template`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"--chat-template {file}: there is no such file.")
    return path.read_text(encoding="utf-8")


def with_pictures(template: str, image_token: str = "<image>") -> str:
    """`template`, the Jinja source of a language model's chat template, for conversations with images.

    Contents that are lists of parts reach `template` as strings in which `image_token` stands for an image, on a line of its
    own as in the templates of this package. Contents that are strings reach it unchanged.
    """
    return _PARTS_AS_STRINGS.replace("IMAGE_TOKEN", _quoted(image_token)) + template


def _quoted(text: str) -> str:
    """`text` as a Jinja string."""
    return json.dumps(text, ensure_ascii=False)
