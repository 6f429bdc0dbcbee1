# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversations as token ids and labels: what the model reads, and which tokens it learns to predict."""

import copy
from bisect import bisect_right
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jinja2.exceptions import TemplateError
from PIL import Image
from torch.nn import functional as F

from ..chat.templates import chat_template as packaged_template
from ..chat.templates import chat_template_names
from ..common.videos import placeholders
from ..head_saisa import IGNORED
from ..processing_saisa import SaisaProcessor, begins_with_bos
from .samples import BadSample


class ConversationEncoder:
    """Encodes a conversation for the model's forward, with labels on the assistant's turns.

    The chat template itself shows which text is the assistant's: for each turn, what it prints after the conversation so far
    and the prompt for an answer. This works for any template that prints the beginning of a conversation as the beginning
    of the whole. White space after a turn's closing special token is not learned.

    Labels are -100 outside the assistant's turns, on placeholders, and on the token after an image, which has no text token
    before it: SAISA's visual tokens predict nothing.

    Args:
        processor: a `SaisaProcessor` with a fast tokenizer.
        max_length: longer samples are cut at the end; an image that does not fit entirely is left out, with what follows.
            None: no limit.
        chat_template: Jinja source instead of the processor's own.

    Raises:
        ValueError: the tokenizer is a slow one, or there is no chat template.
    """

    def __init__(self, processor: SaisaProcessor, max_length: int | None = None, chat_template: str | None = None):
        if not getattr(processor.tokenizer, "is_fast", False):
            raise ValueError(
                f"The tokenizer is a {type(processor.tokenizer).__name__}, which does not report the positions of its "
                "tokens in the text: expected a fast one."
            )
        self.processor = copy.copy(processor)
        if chat_template is not None:
            self.processor.chat_template = chat_template
        self.processor._template(None)
        self.max_length = max_length
        special = processor.tokenizer.added_tokens_decoder.values()
        self._special = tuple({*processor.tokenizer.all_special_tokens, *(t.content for t in special if t.special)})

    def render(self, messages: list[dict], **options) -> str:
        """The output of the chat template."""
        return self.processor.apply_chat_template(messages, tokenize=False, **options)

    def answers(self, messages: list[dict], name: str = "sample") -> tuple[str, list[tuple[int, int]]]:
        """The text of a conversation, and [start, end) of each of the assistant's turns in it, in order.

        Raises:
            BadSample: the template refuses the conversation, or does not print it turn by turn.
        """
        try:
            whole, spans = self.render(messages), []
            for index, message in enumerate(messages):
                if message["role"] != "assistant":
                    continue
                asked = self.render(messages[:index], add_generation_prompt=True)
                answered = self.render(messages[: index + 1])
                if not (whole.startswith(asked) and whole.startswith(answered) and len(asked) <= len(answered)):
                    raise BadSample(
                        f"{name}: the chat template prints turn {index} differently when it is the last one "
                        f"({answered[-60:]!r}, after the prompt {asked[-60:]!r}) than in the whole conversation, so it does "
                        "not show what the assistant says. Use a template that adds to its output turn by turn "
                        "(chat_template=...)."
                    )
                closed = answered.rstrip()
                end = len(closed) if closed.endswith(self._special) and len(closed) > len(asked) else len(answered)
                spans.append((len(asked), end))
        except BadSample:
            raise
        except TemplateError as error:
            raise BadSample(f"{name}: the chat template refuses the conversation: {error}") from error
        except Exception as error:  # of a template that expects other values than a sample has
            what = f"{type(error).__name__}: {error}"
            raise BadSample(f"{name}: the chat template fails at the conversation: {what}") from error
        return whole, spans

    def __call__(self, sample: dict) -> dict:
        """
        Args:
            sample: `{"messages": [...], "images": [...]}`, as of `open_images`; `"name"` is for error messages.

        Returns:
            `input_ids` and `labels` (lists); `pixel_values` (images, C, H, W) and the image processor's other outputs, if
            there are images; and `cut`, the number of tokens that did not fit.

        Raises:
            BadSample: the processor or the template cannot use it, or no label is left.
        """
        name, images = sample.get("name", "sample"), sample.get("images")
        text, spans = self.answers(sample["messages"], name)
        options = {"add_special_tokens": False} if begins_with_bos(self.processor.tokenizer, text) else {}
        try:
            given = [images] if images else None  # as those of one text: one of several may have no tiles
            encoded = dict(self.processor(text=[text], images=given, return_offsets_mapping=True, **options))
        except ValueError as error:
            raise BadSample(f"{name}: {error}") from error
        ids, offsets = encoded.pop("input_ids")[0], encoded.pop("offset_mapping")[0]
        encoded.pop("attention_mask", None)
        visual = [token == self.processor.image_token_id for token in ids]
        labels = [IGNORED] * len(ids)
        for i in range(1, len(ids)):
            said = any(offsets[i][0] < end and offsets[i][1] > start for start, end in spans)
            if said and not visual[i] and not visual[i - 1]:
                labels[i] = ids[i]
        end = len(ids) if self.max_length is None else min(len(ids), self.max_length)
        if end < len(ids) and offsets[end] in {place for place, is_visual in zip(offsets, visual) if is_visual}:
            while end > 0 and offsets[end - 1] == offsets[self.max_length]:
                end -= 1  # what stands for an image or a video shares its place in the text
        if not any(label != IGNORED for label in labels[:end]):
            why = "no answer has a token" if end == len(ids) else f"max_length={self.max_length} cuts off all answers"
            raise BadSample(f"{name}: {why}, so there is nothing to learn ({len(ids)} tokens).")
        left = list(accumulate(placeholders(self.processor, encoded) if any(visual) else ()))
        n_images = bisect_right(left, sum(visual[:end]))
        pixels = {key: torch.as_tensor(np.asarray(value)) for key, value in encoded.items()} if n_images else {}
        pixels = {key: value[:n_images] for key, value in pixels.items()}
        return {"input_ids": ids[:end], "labels": labels[:end], **pixels, "cut": len(ids) - end}


class SaisaCollator:
    """Samples as a batch for the model, padded on the right, or one after the other.

    Args:
        encode: a `ConversationEncoder`, for samples that are not encoded yet; None if all are.
        pad_token_id: what `input_ids` are padded with.
        packing: put all samples into one row, without padding. The positions of each start at 0, which tells the model
            that they do not see each other.
    """

    def __init__(
        self, encode: ConversationEncoder | None = None, pad_token_id: int | None = None, packing: bool = False
    ):
        if pad_token_id is None and encode is not None:
            tokenizer = encode.processor.tokenizer
            pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        self.encode, self.pad_token_id, self.packing = encode, pad_token_id or 0, packing
        self.no_images: dict[str, torch.Tensor] = {}

    def __call__(self, samples: list[dict]) -> dict[str, Any]:
        """`input_ids`, `labels` and `attention_mask` (B, S), the images of all samples in order, and `sample_index` (B,) if
        samples have one. With `packing`: `input_ids`, `labels`, `position_ids` (1, S).

        Batches of text alone have `pixel_values` (0, ...) if there is an `encode`. With it the projectors get gradients, of
        zero: processes that train together have to have the same gradients."""
        items = [self._encoded(sample) for sample in samples]
        if any("frame_pooling" in item for item in items):
            items = [_with_pooling(item) if "pixel_values" in item else item for item in items]
        batch = self._packed(items) if self.packing else self._padded(items)
        images = {key for item in items for key in item} - {"input_ids", "labels", "cut", "sample_index"}
        batch |= {key: joined([item[key] for item in items if key in item]) for key in sorted(images)}
        if not images and self.encode is not None:
            batch |= self._no_images(self.encode.processor)
        if all("sample_index" in item for item in items):
            batch["sample_index"] = torch.tensor([item["sample_index"] for item in items])
        return batch

    def _encoded(self, sample: dict) -> dict:
        if "input_ids" in sample:
            return sample
        if self.encode is None:
            raise ValueError("Samples that are not encoded need a SaisaCollator(encode=...).")
        return self.encode(sample)

    def _no_images(self, processor: SaisaProcessor) -> dict[str, torch.Tensor]:
        """The processor's output for zero images."""
        if not self.no_images:
            encoded = processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")
            self.no_images = {key: torch.as_tensor(value)[:0] for key, value in encoded.items()}
        return self.no_images

    def _packed(self, items: list[dict]) -> dict[str, Any]:
        """Encoded samples in one row. The first token of a sample has no label: nothing before it predicts it."""
        return {
            "input_ids": torch.tensor([[token for item in items for token in item["input_ids"]]]),
            "labels": torch.tensor([[label for item in items for label in (IGNORED, *item["labels"][1:])]]),
            "position_ids": torch.tensor([[place for item in items for place in range(len(item["input_ids"]))]]),
            "use_cache": False,  # with a cache, the row would be one sequence
        }

    def _padded(self, items: list[dict]) -> dict[str, torch.Tensor]:
        """Encoded samples, one per row."""
        length = max(len(item["input_ids"]) for item in items)

        def padded(rows, value):
            return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])

        return {
            "input_ids": padded((item["input_ids"] for item in items), self.pad_token_id),
            "attention_mask": padded(([1] * len(item["input_ids"]) for item in items), 0),
            "labels": padded((item["labels"] for item in items), IGNORED),
        }


def _with_pooling(item: dict) -> dict:
    """An encoded sample as it has to be in a batch with frames of videos: images are not pooled."""
    return {"frame_pooling": torch.ones(len(item["pixel_values"]), dtype=torch.long), **item}


def joined(images: list[torch.Tensor]) -> torch.Tensor:
    """Tensors of images, one after the other; those of images in tiles, of unlike numbers, are padded with zeros."""
    if images[0].ndim == 5:
        most = max(x.shape[1] for x in images)
        images = [F.pad(x, (0, 0) * 3 + (0, most - x.shape[1])) for x in images]
    return torch.cat(images)


def template_source(name: str, processor: SaisaProcessor, captions: bool = False) -> str | None:
    """Jinja source for `chat_template` of the options: the name of a packaged template, the path of a .jinja file, or empty:
    the processor's own (None), or `plain` for captions.

    Raises:
        ValueError: it is neither.
        OSError: the file cannot be read.
    """
    name = name or ("plain" if captions else "")
    if not name:
        return None
    if name.endswith(".jinja"):
        with open(name, encoding="utf-8") as file:
            return file.read()
    if name not in chat_template_names():
        raise ValueError(
            f"chat_template={name!r}: expected {', '.join(chat_template_names())}, or the path of a .jinja file."
        )
    return packaged_template(name, processor.image_token)
