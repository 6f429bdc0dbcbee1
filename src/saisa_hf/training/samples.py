# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Training data in the forms in which people have it, read as conversations with pictures."""

import bisect
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..images_saisa import from_base64, load_image


logger = logging.getLogger(__name__)

IMAGE = "<image>"  # LLaVA's mark of a picture
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PICTURE_KEYS = ("image", "path", "url", "image_url", "base64")


class BadSample(ValueError):
    """A sample that cannot be trained on; the message names it and says why."""


def read_sample(
    record: dict, name: str = "sample", *, folder: str = "", image_token: str = IMAGE, captions: bool = False
) -> dict:
    """A record of a data set as a conversation.

    Args:
        record: one of
            LLaVA's `{"image": path or list of them, "conversations": [{"from": "human", "value": "<image>\\n..."}, ...]}`,
            in which the picture of a turn that has one comes first, as LLaVA's code has it;
            `{"messages": [{"role": ..., "content": text or parts}, ...]}` with pictures in the parts, or under `image` or
            `images` in the order of the parts and image tokens that bring none;
            `{"image": ..., "caption" or "text": ...}`.
            Pictures are what `load_image` takes, or the dicts of `datasets`. Keys that are None do not count.
        name: what error messages call it.
        folder: what paths are relative to.
        image_token: what stands for a picture in the result; `<image>` in records becomes it.
        captions: keep the first picture and the first answer alone. A newline stands between them, and one behind.

    Returns:
        `{"name": str, "messages": [...], "images": [...]}`: messages whose image tokens and bare image parts stand for the
        pictures of `images`, in order and not yet read.

    Raises:
        BadSample: there is no conversation, no answer, or another number of pictures than of places for them.
    """
    if not isinstance(record, dict):
        raise BadSample(f"{name}: expected a mapping, got a {type(record).__name__}.")
    record = {key: value for key, value in record.items() if value is not None}
    spares = record.get("images", record.get("image", []))
    spares = list(spares) if isinstance(spares, (list, tuple)) else [spares]
    caption = record.get("caption", record.get("text"))
    turns = record.get("conversations", record.get("messages", []))
    if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, dict) for turn in turns):
        raise BadSample(f"{name}: its turns are {turns!r:.100}: expected a list of mappings.")
    if "conversations" in record:
        messages = [_llava_turn(turn, name, image_token) for turn in turns]
    elif "messages" in record:
        messages = [dict(message) for message in turns]
    elif isinstance(caption, str):
        messages = [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": caption}]
    else:
        raise BadSample(
            f"{name}: expected one of the keys 'conversations', 'messages', and 'caption' or 'text' beside a picture, got "
            f"{', '.join(map(repr, record)) or 'none'}."
        )
    places = []
    for message in messages:
        if message.get("role") not in ROLES.values():
            raise BadSample(f"{name}: role {message.get('role')!r}: expected one of 'system', 'user', 'assistant'.")
        message["content"] = _content(message.get("content"), name, image_token, places)
    if not any(message["role"] == "assistant" and words(message["content"]).strip() for message in messages):
        raise BadSample(f"{name}: no turn of the assistant has text, so there is nothing to learn.")
    images = [*spares]
    if len(spares) != places.count(None):
        raise BadSample(
            f"{name}: {len(spares)} pictures for {places.count(None)} {IMAGE} in its text. Expected as many of the one as of "
            "the other."
        )
    spare = iter(spares)
    images = [_resolved(next(spare) if place is None else place, folder) for place in places]
    if captions:
        if not images:
            raise BadSample(f"{name}: captions need a picture, and this sample has none.")
        said = next(words(m["content"]) for m in messages if m["role"] == "assistant" and words(m["content"]).strip())
        messages = [{"role": "user", "content": image_token}, {"role": "assistant", "content": said.strip() + "\n"}]
        images = images[:1]
    return {"name": name, "messages": messages, "images": images}


def _llava_turn(turn, name: str, image_token: str) -> dict:
    if not isinstance(turn.get("value"), str) or turn.get("from") not in ROLES:
        raise BadSample(f"{name}: expected turns {{'from': 'human' or 'gpt', 'value': text}}, got {turn!r:.200}.")
    text = turn["value"]
    if text.count(IMAGE) == 1:
        rest = text.replace(IMAGE, "").strip()
        text = f"{IMAGE}\n{rest}" if rest else IMAGE
    return {"role": ROLES[turn["from"]], "content": text}


def _content(content, name: str, image_token: str, places: list):
    """`content` with `image_token` for pictures; what fills its places, None for a spare, is added to `places`."""
    if isinstance(content, str):
        content = content.replace(IMAGE, image_token)
        places += [None] * content.count(image_token)
        return content
    if not isinstance(content, (list, tuple)):
        raise BadSample(f"{name}: a turn's content is {content!r:.100}: expected text, or a list of parts.")
    parts = []
    for part in content:
        if isinstance(part, dict) and part.get("type") in ("image", "image_url"):
            own = next((part[key] for key in PICTURE_KEYS if part.get(key) is not None), None)
            places.append(own["url"] if isinstance(own, dict) and "url" in own else own)
            parts.append({"type": "image"})
        elif isinstance(part, str) or (isinstance(part, dict) and isinstance(part.get("text"), str)):
            text = (part if isinstance(part, str) else part["text"]).replace(IMAGE, image_token)
            places += [None] * text.count(image_token)
            parts.append({"type": "text", "text": text})
        else:
            raise BadSample(f"{name}: part {part!r:.100} of a turn: expected type 'text' or 'image'.")
    return parts


def words(content) -> str:
    """The text of a turn, without its pictures."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _resolved(picture, folder: str):
    if isinstance(picture, dict):  # as `datasets` has them where it does not decode
        picture = picture["bytes"] if picture.get("bytes") is not None else picture.get("path")
    if not isinstance(picture, str) or "://" in picture or picture.startswith("data:"):
        return picture
    path = os.path.join(folder, picture)
    return picture if not os.path.exists(path) and from_base64(picture) is not None else path


def open_pictures(sample: dict) -> dict:
    """`sample`, as `read_sample` makes it, with its pictures as PIL images of mode RGB.

    Raises:
        BadSample: a picture is missing or broken.
    """
    opened = []
    for index, picture in enumerate(sample["images"]):
        what = f" ({picture})" if isinstance(picture, (str, os.PathLike)) and len(str(picture)) < 300 else ""
        try:
            opened.append(load_image(picture, f"{sample['name']}: picture {index}{what}"))
        except ValueError as error:
            raise BadSample(str(error)) from error
    return {**sample, "images": opened}


@dataclass
class Source:
    """Records, what to call them, and the folder of their pictures."""

    records: Sequence | Iterable
    name: str = "data"
    folder: str = ""


def open_source(path: str, *, images: str = "", split: str = "train", streaming: bool = False) -> Source:
    """A file (.json, .jsonl, .parquet), a folder of pictures with metadata, or a data set of the hub.

    Args:
        path: file, folder or hub id. Files of JSON are read here, all else by `datasets`.
        images: folder that paths of pictures are relative to; empty: the file's own.
        split: of a folder or hub data set.
        streaming: read records as they are asked for; not for files of JSON.

    Raises:
        ValueError: the file is not what its name says, or is empty.
        ImportError: `datasets` is not installed.
        OSError: it cannot be read.
    """
    folder = images or (os.path.dirname(path) if os.path.isfile(path) else path if os.path.isdir(path) else "")
    suffix = Path(path).suffix.lower()
    if suffix in (".json", ".jsonl"):
        if streaming:
            raise ValueError(f"streaming=True: {path} is read as a whole. Stream Parquet files or hub data sets.")
        records = _json_records(Path(path))
    else:
        try:
            import datasets
        except ImportError as error:
            raise ImportError(f"reading {path} needs datasets: pip install saisa-hf[datasets]") from error
        if suffix == ".parquet":
            where = {"path": "parquet", "data_files": path, "split": "train"}
        elif os.path.isdir(path):
            where = {"path": "imagefolder", "data_dir": path, "split": split}
        else:
            where = {"path": path, "split": split}
        records = _undecoded(datasets.load_dataset(**where, streaming=streaming))
    if not streaming and len(records) == 0:
        raise ValueError(f"{path} has no samples.")
    return Source(records, path, folder)


def _undecoded(records):
    """A data set of `datasets` whose columns of pictures give files and bytes: a broken one is then met sample by sample."""
    from datasets import Image

    for name, feature in (records.features or {}).items():
        inner = getattr(feature, "feature", None)
        if isinstance(feature, Image):
            records = records.cast_column(name, Image(decode=False))
        elif isinstance(inner, Image):
            records = records.cast_column(name, type(feature)(Image(decode=False)))
    return records


def _json_records(path: Path) -> list:
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix.lower() == ".json":
            records = json.loads(text)
            if not isinstance(records, list):
                raise ValueError(f"{path}: expected a list of samples, got a {type(records).__name__}.")
            return records
        lines = text.split("\n")  # not at all that Unicode calls a line break: JSON may hold it
        return [json.loads(line) for line in lines if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON{'' if path.suffix == '.json' else ', line by line'}: {error}") from error


class _Reader:
    """What the two kinds of data set share: records to encoded samples, and a count of the bad ones over all processes."""

    def __init__(self, sources, encode: Callable, image_token, captions, bad_samples):
        if bad_samples not in ("fail", "skip"):
            raise ValueError(f"bad_samples={bad_samples!r}: expected 'fail' or 'skip'.")
        self.sources = [source if isinstance(source, Source) else Source(source) for source in sources]
        self.encode, self.image_token = encode, image_token
        self.captions, self.bad_samples = captions, bad_samples
        self._skipped = torch.zeros((), dtype=torch.int64).share_memory_()

    @property
    def skipped(self) -> int:
        """How many times a bad sample was left out so far."""
        return int(self._skipped)

    def encoded(self, source: Source, index: int, read: Callable) -> dict:
        """Sample `index` of `source`, whose record `read()` returns.

        Raises:
            BadSample: see `read_sample`, `open_pictures` and `ConversationEncoder`.
        """
        name = f"{source.name}, sample {index}"
        try:
            record = read()
        except (OSError, ValueError) as error:  # `datasets` decodes pictures while it reads
            raise BadSample(f"{name} cannot be read: {type(error).__name__}: {error}") from error
        if isinstance(record, dict) and record.get("id") is not None:
            name += f" (id {record['id']})"
        options = {"folder": source.folder, "image_token": self.image_token, "captions": self.captions}
        return self.encode(open_pictures(read_sample(record, name, **options)))

    def _skip(self, error: BadSample) -> None:
        self._skipped += 1
        logger.warning("left out: %s", error)


class ConversationDataset(Dataset, _Reader):
    """Samples of one or several sources, encoded as they are asked for.

    Args:
        sources: `Source`s, or sequences of records (lists, `datasets.Dataset`s).
        encode: a `ConversationEncoder`.
        image_token: the processor's.
        captions: see `read_sample`.
        bad_samples: `"fail"` raises `BadSample`; `"skip"` logs it and gives the next sample in its place.
    """

    def __init__(self, sources, encode, *, image_token: str = IMAGE, captions=False, bad_samples: str = "fail"):
        _Reader.__init__(self, sources, encode, image_token, captions, bad_samples)
        self._ends = list(accumulate(len(source.records) for source in self.sources))
        if not self._ends or self._ends[-1] == 0:
            raise ValueError("The data set is empty: expected at least one sample.")

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, index: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self._ends, index)
        return self.sources[number], index - (self._ends[number - 1] if number else 0)

    def name(self, index: int) -> str:
        """What error messages call sample `index`."""
        source, place = self._place(index)
        return f"{source.name}, sample {place}"

    def sample(self, index: int) -> dict:
        """Sample `index`, whatever `bad_samples` says."""
        source, place = self._place(index)
        return {**self.encoded(source, place, lambda: source.records[place]), "sample_index": index}

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0 to {len(self) - 1}, got {index}")
        for step in range(len(self)):
            try:
                return self.sample((index + step) % len(self))
            except BadSample as error:
                if self.bad_samples == "fail":
                    raise
                self._skip(error)
                last = error
        raise BadSample(f"None of the {len(self)} samples can be used; the last of them: {last}")

    def lengths(self, tokens_per_picture: int) -> list[tuple[int, bool]]:
        """For each sample about how many tokens it has, and whether a picture is among them. No picture is read."""
        found = []
        for source in self.sources:
            records = source.records
            if hasattr(records, "column_names"):  # of `datasets`, which would decode the pictures
                pictures = [name for name in ("image", "images") if name in records.column_names]
                texts = records.remove_columns(pictures)
                found += [_estimate(record, tokens_per_picture, bool(pictures)) for record in texts]
            else:
                found += [_estimate(record, tokens_per_picture, False) for record in records]
        return found


def _estimate(record, tokens_per_picture: int, has_pictures: bool) -> tuple[int, bool]:
    text, pictures = 0, int(has_pictures)
    if isinstance(record, dict):
        own = record.get("images", record.get("image"))
        pictures = max(pictures, len(own) if isinstance(own, (list, tuple)) else int(own is not None))
        turns = record.get("conversations") or record.get("messages") or [record.get("caption") or record.get("text")]
        for turn in turns if isinstance(turns, (list, tuple)) else []:
            content = (turn.get("value") or turn.get("content")) if isinstance(turn, dict) else turn
            if isinstance(content, (list, tuple)):
                inside = sum(isinstance(part, dict) and str(part.get("type")).startswith("image") for part in content)
                pictures = max(pictures, inside)
                content = " ".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
            text += len(content) if isinstance(content, str) else 0
    return text // 4 + pictures * tokens_per_picture, pictures > 0


class StreamedConversations(IterableDataset, _Reader):
    """As `ConversationDataset`, over sources that are read from front to back (streamed data sets), over and over.

    With several workers each takes every n-th record, or, of a streamed `datasets.IterableDataset`, the files (shards) that
    `datasets` gives it.
    """

    def __init__(self, sources, encode, *, image_token: str = IMAGE, captions=False, bad_samples: str = "fail"):
        _Reader.__init__(self, sources, encode, image_token, captions, bad_samples)

    def name(self, index: int) -> str:
        """What error messages call the sample that is record `index` of the stream."""
        return f"{', '.join(source.name for source in self.sources)}, sample {index} of the stream"

    def __iter__(self):
        worker = get_worker_info()
        every, own = (worker.num_workers, worker.id) if worker is not None else (1, 0)
        index, in_vain = -1, 0  # passes in a row that had no good sample for this worker
        while in_vain < every:
            before, good = index, 0
            for source in self.sources:
                shared_out = hasattr(source.records, "n_shards") or hasattr(source.records, "num_shards")
                for record in source.records:
                    index += 1
                    if index % every != own and not shared_out:
                        continue
                    try:
                        sample = self.encoded(source, index, lambda record=record: record)
                    except BadSample as error:
                        if self.bad_samples == "fail":
                            raise
                        self._skip(error)
                        continue
                    good += 1
                    yield {**sample, "sample_index": index}
            if index == before and own:
                return  # nothing was shared out to this worker
            in_vain = 0 if good else in_vain + 1
        raise BadSample("None of the stream's samples can be used.")
