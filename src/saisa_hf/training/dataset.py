# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Data sets of encoded samples for `Trainer`, with random access or streamed."""

import bisect
import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from ..common.shown import shown
from ..common.sources import first_line
from .samples import IMAGE, BadSample, is_image, is_video, open_images, read_sample
from .sources import Source, unreadable


logger = logging.getLogger(__name__)


def record_at(source: Source, index: int) -> Any:
    """Record `index` of a source.

    Raises:
        BadSample: it cannot be read; `datasets` decodes while it reads.
    """
    try:
        return source.records[index]
    except Exception as error:  # of `datasets`, PyArrow or the user's own sequence
        raise BadSample(
            f"{source.name}, sample {index} cannot be read: {type(error).__name__}: {first_line(error)}"
        ) from error


def records_of(source: Source) -> Iterator:
    """The records of a streamed source.

    Raises:
        OSError, ValueError: they cannot be read, or not to the end.
    """
    count = 0
    try:
        for record in source.records:
            count += 1
            yield record
    except Exception as error:
        raise unreadable(f"{source.name} cannot be read beyond its first {count} samples", error) from error


class _Reader:
    """What both kinds of data set share: encoding of records, and a count of bad samples over all processes.

    Args:
        sources: `Source`s, or sequences of records (lists, `datasets.Dataset`s).
        encode: a `ConversationEncoder`.
        image_token: the processor's.
        captions: see `read_sample`.
        bad_samples: `"fail"` raises `BadSample`; `"skip"` logs it and uses the next sample instead.
    """

    def __init__(
        self,
        sources: Iterable,
        encode: Callable[[dict], dict],
        *,
        image_token: str = IMAGE,
        captions: bool = False,
        bad_samples: str = "fail",
    ):
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

    def encoded(self, source: Source, index: int, record: Any) -> dict:
        """Sample `index` of `source`, which is `record` there.

        Raises:
            BadSample: see `read_sample`, `open_images` and `ConversationEncoder`.
        """
        name = f"{source.name}, sample {index}"
        if isinstance(record, dict) and record.get("id") is not None:
            name += f" (id {shown(record['id'])})"
        sample = read_sample(record, name, folder=source.folder, image_token=self.image_token, captions=self.captions)
        return self.encode(open_images(sample))

    def _skip(self, error: BadSample) -> None:
        self._skipped += 1
        logger.warning("left out: %s", error)


class ConversationDataset(_Reader, Dataset):
    """Samples of one or several sources, encoded when they are accessed.

    Args:
        sources, encode, options: of `_Reader`.

    Raises:
        ValueError: the sources are empty.
    """

    def __init__(self, sources: Iterable, encode: Callable[[dict], dict], **options: Any):
        super().__init__(sources, encode, **options)
        self._ends = list(accumulate(len(source.records) for source in self.sources))
        if not self._ends or self._ends[-1] == 0:
            raise ValueError("The data set is empty: expected at least one sample.")

    def __len__(self) -> int:
        return self._ends[-1]

    def _place(self, index: int) -> tuple[Source, int]:
        number = bisect.bisect_right(self._ends, index)
        return self.sources[number], index - (self._ends[number - 1] if number else 0)

    def name(self, index: int) -> str:
        """The name of sample `index` in error messages."""
        source, place = self._place(index)
        return f"{source.name}, sample {place}"

    def sample(self, index: int) -> dict:
        """Sample `index`, whatever `bad_samples` says."""
        source, place = self._place(index)
        return {**self.encoded(source, place, record_at(source, place)), "sample_index": index}

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

    def lengths(self, tokens_per_image: int) -> list[tuple[int, bool]]:
        """For each sample an estimate of its tokens, in which a video counts as eight images, and whether it has images or
        videos. None is read."""
        found: list[tuple[int, bool]] = []
        for source in self.sources:
            records = source.records
            if hasattr(records, "column_names"):  # of `datasets`, which would decode the images
                images = [name for name in ("image", "images", "video", "videos") if name in records.column_names]
                texts = records.remove_columns(images)
                found += [_estimate(record, tokens_per_image, bool(images)) for record in texts]
            else:
                found += [_estimate(record, tokens_per_image, False) for record in records]
        return found


def _estimate(record: Any, tokens_per_image: int, has_images: bool) -> tuple[int, bool]:
    text, images = 0, int(has_images)
    if isinstance(record, dict):
        own = record.get("images", record.get("image"))
        images = max(images, len(own) if isinstance(own, (list, tuple)) else int(own is not None))
        films = record.get("videos", record.get("video"))
        images += 8 * (len(films) if isinstance(films, (list, tuple)) else int(films is not None))
        for turn in _first(record, (list, tuple), "conversations", "messages") or [record]:
            keys = ("caption", "text") if turn is record else ("value", "content")
            content = _first(turn, (str, list, tuple), *keys) if isinstance(turn, dict) else turn
            if isinstance(content, (list, tuple)):
                parts = [part for part in content if isinstance(part, dict)]
                images = max(images, sum(is_image(part) + 8 * is_video(part) for part in parts))
                content = " ".join(part["text"] for part in parts if isinstance(part.get("text"), str))
            text += len(content) if isinstance(content, str) else 0
    return text // 4 + images * tokens_per_image, images > 0


def _first(record: dict, kinds: tuple[type, ...], *keys: str) -> Any:
    """The first value of `keys` that is one of `kinds` and not empty, or None."""
    return next((record[key] for key in keys if isinstance(record.get(key), kinds) and len(record[key])), None)


class StreamedConversations(_Reader, IterableDataset):
    """As `ConversationDataset`, over streamed sources, which are read from start to end, over and over.

    With several workers each takes every n-th record; of a streamed `datasets.IterableDataset` it takes the files (shards)
    that `datasets` assigns to it.
    """

    def name(self, index: int) -> str:
        """The name of record `index` of the stream in error messages."""
        return f"{', '.join(source.name for source in self.sources)}, sample {index} of the stream"

    def __iter__(self) -> Iterator[dict]:
        worker = get_worker_info()
        every, own = (worker.num_workers, worker.id) if worker is not None else (1, 0)
        index, in_vain = -1, 0  # passes in a row without a good sample for this worker
        while in_vain < every:
            before, good = index, 0
            for source in self.sources:
                sharded = hasattr(source.records, "n_shards") or hasattr(source.records, "num_shards")
                for record in records_of(source):
                    index += 1
                    if index % every != own and not sharded:
                        continue
                    try:
                        sample = self.encoded(source, index, record)
                    except BadSample as error:
                        if self.bad_samples == "fail":
                            raise
                        self._skip(error)
                        continue
                    good += 1
                    yield {**sample, "sample_index": index}
            if index == before and own:
                return  # this worker has no shard
            in_vain = 0 if good else in_vain + 1
        raise BadSample("None of the stream's samples can be used.")
