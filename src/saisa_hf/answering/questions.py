# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What is asked, what is answered, and how a question becomes a prompt."""

import hashlib
import os
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..processing_saisa import SaisaProcessor, Video


@dataclass(frozen=True)
class Question:
    """A question about images, or about none.

    Args:
        prompt: the words of a user, in front of which the images come unless the processor's image token says where they
            are; or chat messages as `apply_chat_template` takes them, the last of them the user's, whose image parts and
            image tokens stand for `images` in this order.
        images: what `load_image` takes, or `Video`s. They are opened when their turn comes.
        key: anything, which the answer has too.
    """

    prompt: str | Sequence[dict]
    images: Sequence = ()
    key: Any = None


@dataclass(frozen=True)
class Answer:
    """An answer, or why there is none.

    Attributes:
        key: the question's.
        text: the answer without special tokens and without white space around it; empty if there is an `error`.
        tokens: how many the model generated, the closing one included.
        finish: `"stop"` (the model closed it, or a stop string came), `"length"` (`max_new_tokens`) or `"error"`.
        error: why the question could not be asked; None if it was.
    """

    key: Any
    text: str = ""
    tokens: int = 0
    finish: str = "stop"
    error: str | None = None


@dataclass(frozen=True)
class Likelihood:
    """How likely a model finds a given answer.

    Attributes:
        key: the question's.
        log_probability: natural logarithm, summed over the answer's tokens.
        is_greedy: whether greedy decoding would give exactly these tokens.
        tokens: how many they are.
        error: why the question could not be asked; None if it was.
    """

    key: Any
    log_probability: float = float("-inf")
    is_greedy: bool = False
    tokens: int = 0
    error: str | None = None


@dataclass
class Prompt:
    """A question on its way through the model."""

    question: Question
    text: str
    continuation: str | None = None  # of which the likelihood is asked
    images: list[Hashable] = field(default_factory=list)  # their names, see `image_name`
    error: str | None = None
    shares: bool = False  # whether it is asked beside others about the same images, on one beginning


def render(question: Question, processor: SaisaProcessor, chat_template: str | None, system: str | None) -> str:
    """The text that the model reads, up to where the answer begins.

    Raises:
        ValueError: image tokens and images differ in number, or the template refuses the conversation.
    """
    token, count = processor.image_token, len(question.images)
    if isinstance(question.prompt, str):
        content: str | list[dict] = question.prompt
        if token not in question.prompt:
            content = [*({"type": "image"} for _ in range(count)), {"type": "text", "text": question.prompt}]
        messages = [{"role": "user", "content": content}]
    else:
        messages = list(question.prompt)
    if system is not None:
        messages = [{"role": "system", "content": system}, *messages]
    contents = [message.get("content") for message in messages if isinstance(message, dict)]
    parts = [part for content in contents if isinstance(content, (list, tuple)) for part in content]
    if any(isinstance(part, dict) and part.get("type") in ("video", "video_url") for part in parts):
        raise ValueError("The messages hold a video. Put an image part there, and a `Video` among the images.")
    try:
        options = {"chat_template": chat_template, "add_generation_prompt": True, "tokenize": False}
        text = processor.apply_chat_template(messages, **options)
    except ValueError:
        raise
    except Exception as error:  # of Jinja, and of templates that expect other values
        whose = getattr(processor.tokenizer, "name_or_path", "") or "the processor"
        raise ValueError(f"The chat template of {whose} fails: {type(error).__name__}: {error}") from error
    if text.count(token) != count:
        raise ValueError(f"{count} images for {text.count(token)} {token!r} in the prompt: expected one for each.")
    return text


def text_of(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """What the tokens of an answer say, without special ones."""
    return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def image_name(image: Any) -> Hashable:
    """What is the same for the same image: paths and bytes by value, objects by identity."""
    if isinstance(image, Video):
        return "video", image_name(image.source)
    if isinstance(image, (str, os.PathLike)):
        return os.fspath(image)
    if isinstance(image, (bytes, bytearray)):
        return hashlib.sha256(image).digest()
    return id(image)
