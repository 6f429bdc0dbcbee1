# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Records of training data, in the usual formats, read as conversations with images."""

import os
from typing import Any

from ..common.shown import printable, shown
from ..image_sources_saisa import from_base64
from ..images_saisa import load_image
from ..processing_saisa import unread_media


IMAGE = "<image>"  # LLaVA's placeholder of an image
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_KEYS = ("image", "path", "url", "image_url", "base64")


class BadSample(ValueError):
    """A sample that cannot be used for training; the message names it and says why."""

    def __init__(self, message: str):
        message = printable(message)
        super().__init__(message if len(message) <= 1000 else f"{message[:500]} [...] {message[-400:]}")


def read_sample(
    record: dict, name: str = "sample", *, folder: str = "", image_token: str = IMAGE, captions: bool = False
) -> dict:
    """A record of a data set as a conversation.

    Args:
        record: one of
            LLaVA's `{"image": path or list of them, "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}`,
            in which a turn's only image comes first, as in LLaVA's code;
            `{"messages": [{"role": ..., "content": text or parts}, ...]}` with images in the parts, or under `image` or
            `images`, in the order of the parts without an image and the image tokens;
            `{"image": ..., "caption" or "text": ...}`.
            Images are what `load_image` takes, or the dicts of `datasets`. Keys that are None are ignored.
        name: what error messages call it.
        folder: what paths are relative to.
        image_token: placeholder of an image in the result; replaces `<image>` of the record.
        captions: keep only the first image and the first answer, each followed by a newline.

    Returns:
        `{"name": str, "messages": [...], "images": [...]}`: image tokens and image parts of the messages stand for
        `images`, in this order. The images are not read yet.

    Raises:
        BadSample: there is no conversation, no answer, or a wrong number of images.
    """
    if not isinstance(record, dict):
        raise BadSample(f"{name}: expected a mapping, got a {type(record).__name__}.")
    record = {key: value for key, value in record.items() if value is not None}
    _refuse_media(record, name)
    spares = record.get("images", record.get("image", []))
    spares = list(spares) if isinstance(spares, (list, tuple)) else [spares]
    messages, places = _messages(record, name, image_token)
    if not any(message["role"] == "assistant" and words(message["content"]).strip() for message in messages):
        raise BadSample(f"{name}: no turn of the assistant has text, so there is nothing to learn.")
    wanted = sum(place is None for place in places)  # an array is equal to nothing
    if len(spares) != wanted:
        given = "1 image" if len(spares) == 1 else f"{len(spares)} images"
        raise BadSample(f"{name}: {given} for {wanted} {IMAGE} in its text. Expected the same number of both.")
    spare = iter(spares)
    images = [resolved(next(spare) if place is None else place, folder) for place in places]
    if captions:
        if not images:
            raise BadSample(f"{name}: captions need an image, and this sample has none.")
        said = next(words(m["content"]) for m in messages if m["role"] == "assistant" and words(m["content"]).strip())
        messages = [{"role": "user", "content": image_token}, {"role": "assistant", "content": said.strip() + "\n"}]
        images = images[:1]
    return {"name": name, "messages": messages, "images": images}


def _messages(record: dict, name: str, image_token: str) -> tuple[list[dict], list]:
    """The turns of a record, with `image_token` for images; and for each of these the image, or None if it is one of those
    beside the turns."""
    caption = record.get("caption", record.get("text"))
    turns = record.get("conversations", record.get("messages", []))
    if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, dict) for turn in turns):
        raise BadSample(f"{name}: its turns are {shown(turns)}: expected a list of mappings.")
    if "conversations" in record:
        messages = [_llava_turn(turn, name, image_token) for turn in turns]
    elif "messages" in record:
        messages = [dict(message) for message in turns]
    elif isinstance(caption, str):
        messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": caption}]
    else:
        raise BadSample(
            f"{name}: expected one of the keys 'conversations', 'messages', and 'caption' or 'text' beside an image, got "
            f"{', '.join(shown(key) for key in list(record)[:20]) or 'none'}."
        )
    places: list = []
    for message in messages:
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES.values():
            raise BadSample(f"{name}: role {shown(role)}: expected one of 'system', 'user', 'assistant'.")
        message["content"] = _content(message.get("content"), name, image_token, places)
    return messages, places


def _llava_turn(turn: dict, name: str, image_token: str) -> dict:
    text, speaker = turn.get("value"), turn.get("from")
    if not isinstance(text, str) or not isinstance(speaker, str) or speaker not in ROLES:
        raise BadSample(f"{name}: expected turns {{'from': 'human' or 'gpt', 'value': text}}, got {shown(turn)}.")
    if text.count(IMAGE) == 1:
        rest = text.replace(IMAGE, "").strip()
        text = f"{IMAGE}\n{rest}" if rest else IMAGE
    return {"role": ROLES[speaker], "content": text}


def _content(content: Any, name: str, image_token: str, places: list) -> str | list[dict]:
    """`content` with `image_token` for images. For each of these, `places` gets the image, or None if it is one of the
    record's."""
    if isinstance(content, str):
        content = content.replace(IMAGE, image_token)
        places += [None] * content.count(image_token)
        return content
    if not isinstance(content, (list, tuple)):
        raise BadSample(f"{name}: a turn's content is {shown(content)}: expected text, or a list of parts.")
    parts = []
    for part in content:
        if isinstance(part, dict):
            _refuse_media(part, f"{name}: part {shown(part)} of a turn")
        if isinstance(part, dict) and is_image(part):
            own = next((part[key] for key in IMAGE_KEYS if part.get(key) is not None), None)
            places.append(own["url"] if isinstance(own, dict) and "url" in own else own)
            parts.append({"type": "image"})
        elif isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str)):
            text = (part if isinstance(part, str) else part["text"]).replace(IMAGE, image_token)
            places += [None] * text.count(image_token)
            parts.append({"type": "text", "text": text})
        else:
            raise BadSample(f"{name}: part {shown(part)} of a turn: expected type 'text' or 'image'.")
    return parts


def _refuse_media(given: dict, name: str) -> None:
    if key := unread_media(given, ("audio", "audios", "video", "videos")):
        raise BadSample(f"{name}: {key} {shown(given[key])} is not read: expected text and images.")


def is_image(part: dict) -> bool:
    """Whether a part of a turn is an image."""
    kind = part.get("type")
    return isinstance(kind, str) and kind in ("image", "image_url")


def words(content: str | list[dict]) -> str:
    """The text of a turn, without its images."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def resolved(image: Any, folder: str) -> Any:
    """`image`, or its path if it is the name of a file in `folder`; of a dict of `datasets`, what it holds."""
    if isinstance(image, dict):  # of `datasets` without decoding
        image = image["bytes"] if image.get("bytes") is not None else image.get("path")
    if not isinstance(image, str) or "://" in image or image.startswith("data:"):
        return image
    path = os.path.join(folder, image)
    return image if not os.path.exists(path) and from_base64(image) is not None else path


def open_images(sample: dict) -> dict:
    """A sample of `read_sample` with its images as PIL images of mode RGB.

    Raises:
        BadSample: an image is missing or broken.
    """
    opened = []
    for index, image in enumerate(sample["images"]):
        what = f" ({image})" if isinstance(image, (str, os.PathLike)) and len(str(image)) < 300 else ""
        try:
            opened.append(load_image(image, f"{sample['name']}: image {index}{what}"))
        except ValueError as error:
            raise BadSample(str(error)) from error
    return {**sample, "images": opened}
