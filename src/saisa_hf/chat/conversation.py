# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""A conversation with a model: its keys and values stay in the cache from turn to turn."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from transformers import BatchFeature, DynamicCache, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from ..common.beginnings import SaisaBeginning, marks_of
from ..common.videos import encoding_progress, read_video
from ..compat_saisa import CACHE
from ..head_saisa import IMAGES
from ..images_saisa import load_image


if TYPE_CHECKING:
    from ..modeling_saisa import SaisaForConditionalGeneration
    from ..processing_saisa import SaisaProcessor


class Conversation:
    """A chat whose keys and values stay in the cache, so that each turn costs only its own tokens.

    Each turn renders the whole conversation with the processor's chat template. The part of the cache that agrees with it is
    kept, the rest is dropped: the model always reads exactly what the processor makes of `messages`.

    Args:
        model: a `SaisaForConditionalGeneration`.
        processor: its `SaisaProcessor`, with a chat template.
        system: the system message, if the template has one.
        progress: whether to show on stderr how far the encoding of many images and frames is.
        beginning: what `keep` of this or another conversation returned. A conversation that begins like it reads it no more.
        generation: arguments of `generate` for every answer: one sequence, without beam search. `max_new_tokens` is 512 if
            left out.

    Attributes:
        messages: the turns so far, as `apply_chat_template` takes them. They may be changed between turns.
        finish_reason: how the last answer ended: `"stop"` (the model closed it), `"length"` (`max_new_tokens`), or
            `"interrupted"`.
    """

    _cached_ids: list[int]
    _cached_marks: list[tuple[str, int]]  # of its images

    def __init__(
        self,
        model: SaisaForConditionalGeneration,
        processor: SaisaProcessor,
        system: str | None = None,
        progress: bool = False,
        beginning: SaisaBeginning | None = None,
        **generation: Any,
    ):
        self.model = model
        self.beginning = beginning
        self.progress = progress
        self.processor = processor
        self.system = system
        self.generation = {"max_new_tokens": 512, **generation}
        self._interrupt = _Interrupt()
        self._answering = threading.Lock()
        self.clear()

    def clear(self) -> None:
        """Forgets all turns; the system message stays."""
        self.messages = self._opening()
        self.finish_reason: str | None = None
        self._forget_cache()

    def keep(self, images: Iterable = (), videos: Iterable = ()) -> SaisaBeginning:
        """Reads what stands in front of a first question about `images` and `videos`: the system message and these. They are
        read once for this conversation, after each `clear` too, and for others that get them as their `beginning`.

        Raises:
            ValueError, ImportError: see `ask`.
        """
        images, videos = list(images), list(videos)
        inputs, other = (self.inputs([*self._opening(), self.question(text, images, videos)]) for text in "ab")
        ids = inputs["input_ids"][0].tolist()
        count = _in_common(ids, other["input_ids"][0].tolist())
        token = self.model.config.image_token_id
        # behind an image, which is a token by itself: what words begin with depends on how they go on
        count = max((place + 1 for place in range(count) if ids[place] == token), default=count)
        given = {name: inputs[name] for name in IMAGES if name in inputs}
        self.beginning = self.model.keep(inputs["input_ids"][:, :count], **given)
        return self.beginning

    @property
    def cached_tokens(self) -> int:
        """Tokens in the cache, text and visual."""
        return len(self._cached_ids)

    def stop(self) -> None:
        """Ends the answer in progress after its current token. For another thread, or a signal handler."""
        self._interrupt.asked = True

    def ask(self, text: str = "", images: Iterable = (), videos: Iterable = ()) -> Iterator[str]:
        """Asks a question and yields the answer piece by piece, as its tokens come.

        An answer that is not read to its end (`stop`, closing the iterator, an exception in between) ends there, and its
        beginning becomes part of the conversation. An error in the question or in the model leaves the conversation
        unchanged.

        Args:
            text: the question; may be empty if there are images or videos.
            images: images that come before the text, as `load_image` takes them.
            videos: videos that come behind them, as `video_frames` takes them. Each is decoded once.

        Raises:
            ValueError: nothing to ask, an unreadable image or video, or an image token in the text.
            ImportError: a video has to be decoded, and PyAV is not installed.
            RuntimeError: the answer to another question is still being read.
        """
        if not self._answering.acquire(blocking=False):
            raise RuntimeError("An answer is still being read: read its iterator to the end, or close it.")
        try:
            yield from self._answer([*self.messages, self.question(text, images, videos)])
        finally:
            self._answering.release()

    def question(self, text: str, images: Iterable = (), videos: Iterable = ()) -> dict:
        """The message that asks `text` about `images` and `videos`, as `apply_chat_template` takes it; the conversation is
        not changed.

        Raises:
            ValueError, ImportError: see `ask`.
        """
        loaded = [load_image(image, f"image {index}") for index, image in enumerate(images)]
        films = [read_video(self.processor, video, f"video {index}") for index, video in enumerate(videos)]
        if not text and not loaded and not films:
            raise ValueError("Nothing to ask: `text` is empty and there are no `images` or `videos`.")
        if self.processor.image_token in text:
            raise ValueError(
                f"The text contains {self.processor.image_token!r}, which stands for an image. Leave it out: images are "
                "given beside the text, and come before it."
            )
        return _message("user", text, loaded, films)

    def inputs(self, messages: list[dict]) -> BatchFeature:
        """What the model reads of `messages`, on its device, up to where the answer begins."""
        return self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)

    def _answer(self, messages: list[dict]) -> Iterator[str]:
        inputs = self.inputs(messages)
        prompt = inputs["input_ids"][0].tolist()
        marks = marks_of(inputs, self.model)
        cache = self._take_cache(prompt, marks)
        self._interrupt, tokens, outcome = _Interrupt(), queue.SimpleQueue(), []
        # in another thread, so that the reader of the answer can stop it between two tokens
        arguments = (inputs, cache, self._interrupt, tokens, outcome)
        thread = threading.Thread(target=self._generate, args=arguments)
        thread.start()

        answer, shown = [], 0
        try:
            while (token := tokens.get()) is not None:
                answer.append(token)
                text = self._decode(answer)
                if len(text) > shown and not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character's bytes
                    piece, shown = text[shown:], len(text)
                    yield piece
        finally:
            self._interrupt.asked = True
            thread.join()
            (result,) = outcome
            if isinstance(result, torch.Tensor):
                answer = result[0, len(prompt) :].tolist()
                text = self._decode(answer)
                self.messages = [*messages, _message("assistant", text.rstrip())]
                self.finish_reason = self._reason(answer)
                self._cache, self._cached_marks = cache, marks
                # the last token has not been through the model
                self._cached_ids = result[0, : cache.get_seq_length()].tolist()
        if not isinstance(result, torch.Tensor):
            raise result
        if len(text) > shown:
            yield text[shown:]

    def _generate(
        self,
        inputs: BatchFeature,
        cache: DynamicCache,
        interrupt: _Interrupt,
        tokens: queue.SimpleQueue,
        outcome: list,
    ) -> None:
        """Puts the answer's tokens and a final None into `tokens`, all ids (1, S) or an exception into `outcome`."""
        generation = dict(self.generation)
        stopping = [*(generation.pop("stopping_criteria", None) or []), interrupt]
        if "stop_strings" in generation:
            generation.setdefault("tokenizer", self.processor.tokenizer)
        try:
            tiles = inputs.get("num_tiles")
            total = len(inputs.get("pixel_values", ())) if tiles is None else int(tiles.sum())
            with encoding_progress(self.model, total, self.progress):
                ids = self.model.generate(
                    **inputs,
                    **{CACHE: cache},
                    streamer=_TokenStreamer(tokens),
                    stopping_criteria=stopping,
                    return_dict_in_generate=False,
                    **generation,
                )
            outcome.append(ids)
        except BaseException as error:
            outcome.append(error)
        finally:
            tokens.put(None)

    def _reason(self, answer: list[int]) -> str:
        ends = self.generation.get("eos_token_id", self.model.generation_config.eos_token_id)
        if answer[-1] in (ends if isinstance(ends, list) else [ends]):
            return "stop"
        if len(answer) >= self.generation["max_new_tokens"]:
            return "length"
        return "interrupted" if self._interrupt.fired else "stop"

    def _decode(self, ids: list[int]) -> str:
        decoded = self.processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return decoded.lstrip()  # templates put the space in front of an answer themselves

    def _opening(self) -> list[dict]:
        return [] if self.system is None else [_message("system", self.system)]

    def _forget_cache(self) -> None:
        # all layers keep all keys, even with a sliding window: only such a cache can be cropped anywhere
        self._cache = self.model.new_cache()
        self._cached_ids, self._cached_marks = [], []

    def _take_cache(self, prompt: list[int], marks: list[tuple[str, int]]) -> DynamicCache:
        """The cache, or one behind the beginning, cropped to what it has in common with `prompt`, whose last token has to be
        computed in any case. The conversation is left with an empty one, because an answer that fails may leave the cache in
        any state."""
        cache, cached_ids, cached_marks = self._cache, self._cached_ids, self._cached_marks
        self._forget_cache()
        kept = _kept(cached_ids, prompt, cached_marks, marks)
        if self.beginning is not None:
            tokens = self.beginning.tokens.tolist()
            begun = _kept(tokens, prompt, self.beginning.marks, marks)
            if begun > kept:
                cache, cached_ids, kept = self.model.new_cache(self.beginning), tokens, begun
        if kept == 0:
            return self.model.new_cache()
        if kept < len(cached_ids):
            cache.crop(kept - len(cached_ids))  # negative: what a positive number means differs between releases
        return cache


def _in_common(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    pairs = enumerate(zip(one, other))
    return next((index for index, (x, y) in pairs if x != y), min(len(one), len(other)))


def _kept(cached: list[int], prompt: list[int], cached_marks: Iterable, marks: Iterable) -> int:
    """How much of a cache with these tokens and images agrees with a prompt, apart from its last token; nothing if images at
    the beginning of both, as many as there are in the shorter one, differ: image tokens are alike whatever they stand for."""
    agree = all(old == new for old, new in zip(cached_marks, marks))
    return _in_common(cached, prompt[:-1]) if agree else 0


def _message(role: str, text: str, images: Iterable = (), films: Iterable = ()) -> dict:
    parts: list[dict] = [{"type": "image", "image": image} for image in images]
    parts += [{"type": "video", "video": film} for film in films]
    return {"role": role, "content": [*parts, {"type": "text", "text": text}] if text or not parts else parts}


class _TokenStreamer(BaseStreamer):
    """Puts the tokens that `generate` makes into a queue. The first thing that `generate` hands over is the prompt."""

    def __init__(self, tokens: queue.SimpleQueue):
        self.tokens, self.prompt_passed = tokens, False

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_passed:
            for token in value.flatten().tolist():
                self.tokens.put(token)
        self.prompt_passed = True

    def end(self) -> None:
        pass


class _Interrupt(StoppingCriteria):
    """Stops `generate` after the token that is being computed when `asked` is set."""

    def __init__(self):
        self.asked = self.fired = False

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.fired = self.asked
        return torch.full((input_ids.shape[0],), self.fired, dtype=torch.bool, device=input_ids.device)
