# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Records of training data, in the usual formats, read as conversations with images and videos."""

import os
import re
from typing import Any

from ..common.shown import printable, shown
from ..image_sources_saisa import from_base64
from ..images_saisa import load_image
from ..processing_saisa import VIDEO, Video, unread_media


IMAGE = "<image>"  # LLaVA's placeholder of an image
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE_KEYS = ("image", "path", "url", "image_url", "base64")
VIDEO_KEYS = ("video", "path", "url", "video_url", "base64")


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
            A video is under `video`, several are under `videos`, for `<video>`, or for `<image>` in a record without images.
            Images are what `load_image` takes, or the dicts of `datasets`. Keys that are None are ignored.
        name: what error messages call it.
        folder: what paths are relative to.
        image_token: placeholder of an image in the result; replaces `<image>` of the record.
        captions: keep only the first image and the first answer, each followed by a newline.

    Returns:
        `{"name": str, "messages": [...], "images": [...]}`: image tokens and image parts of the messages stand for
        `images`, in this order, in which a `Video` is a video. None of them is read yet.

    Raises:
        BadSample: there is no conversation, no answer, or a wrong number of images.
    """
    if not isinstance(record, dict):
        raise BadSample(f"{name}: expected a mapping, got a {type(record).__name__}.")
    record = {key: value for key, value in record.items() if value is not None}
    _refuse_media(record, name)
    spares, films = (_listed(record.get(f"{kind}s", record.get(kind))) for kind in ("image", "video"))
    messages, places = _messages(record, name, image_token)
    if not any(message["role"] == "assistant" and words(message["content"]).strip() for message in messages):
        raise BadSample(f"{name}: no turn of the assistant has text, so there is nothing to learn.")
    is_film = [isinstance(place, Video) for place in places]
    if films and not spares and not any(film and place.source is None for film, place in zip(is_film, places)):
        places = [Video() if place is None else place for place in places]
    wanted = sum(place is None for place in places)  # an array is equal to nothing
    if len(spares) != wanted:
        given = "1 image" if len(spares) == 1 else f"{len(spares)} images"
        raise BadSample(f"{name}: {given} for {wanted} {IMAGE} in its text. Expected the same number of both.")
    wanted = sum(isinstance(place, Video) and place.source is None for place in places)
    if len(films) != wanted:
        given = "1 video" if len(films) == 1 else f"{len(films)} videos"
        raise BadSample(f"{name}: {given} for {wanted} {VIDEO} in its text. Expected the same number of both.")
    spare, film = iter(spares), iter(films)
    images = []
    for place in places:
        if isinstance(place, Video):
            images.append(Video(resolved(next(film) if place.source is None else place.source, folder)))
        else:
            images.append(resolved(next(spare) if place is None else place, folder))
    if captions:
        if not images:
            raise BadSample(f"{name}: captions need an image, and this sample has none.")
        said = next(words(m["content"]) for m in messages if m["role"] == "assistant" and words(m["content"]).strip())
        messages = [{"role": "user", "content": image_token}, {"role": "assistant", "content": said.strip() + "\n"}]
        images = images[:1]
    return {"name": name, "messages": messages, "images": images}


def _listed(value: Any) -> list:
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _messages(record: dict, name: str, image_token: str) -> tuple[list[dict], list]:
    """The turns of a record, with `image_token` for images and videos; and for each of these the image or `Video`, or None or
    `Video()` if it is one of those beside the turns."""
    caption = record.get("caption", record.get("text"))
    turns = record.get("conversations", record.get("messages", []))
    if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, dict) for turn in turns):
        raise BadSample(f"{name}: its turns are {shown(turns)}: expected a list of mappings.")
    tokens = [IMAGE, image_token, *([VIDEO] if "video" in record or "videos" in record else [])]
    if "conversations" in record:
        messages = [_llava_turn(turn, name, VIDEO in tokens) for turn in turns]
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
    marks = re.compile("|".join(map(re.escape, tokens)))
    for message in messages:
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES.values():
            raise BadSample(f"{name}: role {shown(role)}: expected one of 'system', 'user', 'assistant'.")
        message["content"] = _content(message.get("content"), name, image_token, places, marks)
    return messages, places


def _llava_turn(turn: dict, name: str, has_videos: bool) -> dict:
    text, speaker = turn.get("value"), turn.get("from")
    if not isinstance(text, str) or not isinstance(speaker, str) or speaker not in ROLES:
        raise BadSample(f"{name}: expected turns {{'from': 'human' or 'gpt', 'value': text}}, got {shown(turn)}.")
    found = re.findall(f"{IMAGE}|{VIDEO}", text)
    if len(found) == 1 and (found[0] == IMAGE or has_videos):
        rest = text.replace(found[0], "").strip()
        text = f"{found[0]}\n{rest}" if rest else found[0]
    return {"role": ROLES[speaker], "content": text}


def _content(content: Any, name: str, image_token: str, places: list, marks: re.Pattern) -> str | list[dict]:
    """`content` with `image_token` for all `marks` of images and videos. For each of these, `places` gets the image or the
    `Video`; None or `Video()` if it is one of the record's."""
    if isinstance(content, str):
        places += [Video() if mark == VIDEO else None for mark in marks.findall(content)]
        return marks.sub(lambda _: image_token, content)
    if not isinstance(content, (list, tuple)):
        raise BadSample(f"{name}: a turn's content is {shown(content)}: expected text, or a list of parts.")
    parts = []
    for part in content:
        if isinstance(part, dict) and (is_image(part) or is_video(part)):
            keys = IMAGE_KEYS if is_image(part) else VIDEO_KEYS
            own = next((part[key] for key in keys if part.get(key) is not None), None)
            own = own["url"] if isinstance(own, dict) and "url" in own else own
            places.append(own if is_image(part) else Video(own))
            parts.append({"type": "image"})
        elif isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str)):
            if isinstance(part, dict):
                _refuse_media(part, f"{name}: part {shown(part)} of a turn", ("video", "videos"))
            text = part if isinstance(part, str) else part["text"]
            places += [Video() if mark == VIDEO else None for mark in marks.findall(text)]
            parts.append({"type": "text", "text": marks.sub(lambda _: image_token, text)})
        else:
            raise BadSample(f"{name}: part {shown(part)} of a turn: expected type 'text', 'image' or 'video'.")
    return parts


def _refuse_media(given: dict, name: str, others: tuple[str, ...] = ()) -> None:
    if key := unread_media(given, ("audio", "audios", *others)):
        raise BadSample(f"{name}: {key} {shown(given[key])} is not read: expected text, images and videos.")


def is_image(part: dict) -> bool:
    """Whether a part of a turn is an image."""
    kind = part.get("type")
    return isinstance(kind, str) and kind in ("image", "image_url")


def is_video(part: dict) -> bool:
    """Whether a part of a turn is a video."""
    kind = part.get("type")
    return isinstance(kind, str) and kind in ("video", "video_url")


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
    """A sample of `read_sample` with its images as PIL images of mode RGB. Videos stay as they are: their frames are decoded
    when the processor takes them.

    Raises:
        BadSample: an image is missing or broken.
    """
    opened: list = []
    for index, image in enumerate(sample["images"]):
        if isinstance(image, Video):
            opened.append(image)
            continue
        what = f" ({image})" if isinstance(image, (str, os.PathLike)) and len(str(image)) < 300 else ""
        try:
            opened.append(load_image(image, f"{sample['name']}: image {index}{what}"))
        except ValueError as error:
            raise BadSample(str(error)) from error
    return {**sample, "images": opened}
