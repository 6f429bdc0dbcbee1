# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The engine behind `saisa eval`, `saisa ask`, held-out questions and other programs that ask a model many questions."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from ..compat_saisa import CACHE
from ..processing_saisa import Video, begins_with_bos
from .kept_images import KeptImages, opened
from .questions import Answer, Likelihood, Prompt, Question, image_name, render, text_of
from .stops import StopTexts


if TYPE_CHECKING:
    from transformers import BatchFeature

    from ..common.beginnings import SaisaBeginning
    from ..modeling_saisa import SaisaForConditionalGeneration
    from ..processing_saisa import SaisaProcessor

R = TypeVar("R")

LEAST_WINDOW = 64  # questions read ahead, to find those about the same image and of the same length
# greedy decoding, whatever sampling a checkpoint suggests
GREEDY = {
    "do_sample": False,
    "num_beams": 1,
    "repetition_penalty": 1.0,
    **dict.fromkeys(("temperature", "top_p", "top_k")),
}


class Answerer:
    """Answers many questions by greedy decoding, in batches.

    Questions are read ahead in windows of eight batches, at least 64 questions. In a window they are sorted by length, and an
    image that several of them are about is opened and encoded once, into visual states that are kept for all of them. Where
    questions about the same images fill a batch, these and what stands in front of them are read once, and all continue it
    (`SaisaBeginning`). Which questions are asked together changes answers by no more than rounding.

    Args:
        model: a `SaisaForConditionalGeneration`, on any device or devices. It is put into eval mode.
        processor: its `SaisaProcessor`.
        batch_size: questions that are asked at once.
        visual_states: whether images that are asked about more than once are encoded once. Without, each question brings its
            pixels.
        state_bytes: memory for visual states that are kept; those of one question's images are kept in any case.
        chat_template: Jinja source, or the name of one of the processor's templates. None: the processor's own.
        system: a system message in front of each conversation.
        strict: raise ValueError where a question cannot be asked, instead of an answer with an `error`.
        generation: arguments of `generate` for every answer, `max_new_tokens` (64 if left out) and `stop_strings` for
            instance; it is greedy unless they say otherwise.
    """

    def __init__(
        self,
        model: SaisaForConditionalGeneration,
        processor: SaisaProcessor,
        *,
        batch_size: int = 16,
        visual_states: bool = True,
        state_bytes: int = 2**31,
        chat_template: str | None = None,
        system: str | None = None,
        strict: bool = False,
        **generation: Any,
    ):
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size={batch_size!r}: expected a positive number of questions.")
        self.model, self.processor, self.batch_size = model, processor, batch_size
        self.visual_states, self.chat_template, self.system = visual_states, chat_template, system
        self.strict = strict
        self.generation = {"max_new_tokens": 64, **generation}
        self._kept = KeptImages(model, processor, state_bytes, batch_size)
        self._beginning: tuple[list[Hashable], SaisaBeginning] | None = None  # with the names of its images

    def answer(self, questions: Iterable[Question], as_they_come: bool = False, **generation: Any) -> Iterator[Answer]:
        """The answers, in the order of the questions, a window at a time; no question is read before it is needed.

        Args:
            as_they_come: yield the answers of a batch when it is done, so that their order is any within a window: for those
                who write them down, with keys to put them in order.
            generation: as in the constructor, for these questions.

        Raises:
            ValueError: with `strict`, for the first question that cannot be asked.
        """
        options = {**GREEDY, **self.generation, **generation}
        prompts = (self._prompt(question) for question in questions)
        return self._run(
            prompts, lambda batch, inputs: self._generate(batch, inputs, options), _no_answer, as_they_come
        )

    def loglikelihood(self, asked: Iterable[tuple[Question, str]]) -> Iterator[Likelihood]:
        """How likely the given answers are, each for its question, in their order.

        Args:
            asked: questions, each with the text of an answer. A space is put in front of it if neither it begins nor the
                prompt ends with white space.

        Raises:
            ValueError: with `strict`, for the first question that cannot be asked.
        """
        prompts = (self._prompt(question, text) for question, text in asked)
        return self._run(prompts, self._score, _no_likelihood)

    # --- windows and batches ---

    def _prompt(self, question: Question, continuation: str | None = None) -> Prompt:
        images = [image_name(image) for image in question.images]
        try:
            text = render(question, self.processor, self.chat_template, self.system)
        except ValueError as error:
            return Prompt(question, "", continuation, images, str(error))
        if continuation is not None:
            if not continuation or text.endswith(self.processor.image_token):
                problem = "the answer whose likelihood is asked is empty, or follows an image, which predicts nothing"
                return Prompt(question, text, continuation, images, problem)
            if not continuation[0].isspace() and not text[-1:].isspace():
                continuation = f" {continuation}"
        return Prompt(question, text, continuation, images)

    def _run(self, *how: Any) -> Iterator[Any]:
        try:
            yield from self._windows(*how)
        finally:
            self._kept.clear()
            self._beginning = None

    def _windows(
        self,
        prompts: Iterator[Prompt],
        ask: Callable[[list[Prompt], Mapping[str, Any]], list[R]],
        failed: Callable[..., R],
        as_they_come: bool = False,
    ) -> Iterator[R]:
        self.model.eval()
        size = max(LEAST_WINDOW, 8 * self.batch_size)
        while window := list(itertools.islice(prompts, size)):
            results: dict[int, R] = {}
            for batch in self._batches([prompt for prompt in window if prompt.error is None]):
                asked, inputs = self._inputs(batch)
                if asked:
                    with torch.no_grad():
                        results.update(zip(map(id, asked), ask(asked, self._behind_beginning(asked, inputs))))
                if as_they_come:
                    yield from (results.pop(id(prompt)) for prompt in asked)
            for prompt in window:
                if prompt.error is not None and self.strict:
                    raise ValueError(prompt.error)
                if prompt.error is not None:
                    yield failed(prompt.question.key, error=prompt.error)
                elif not as_they_come:
                    yield results.pop(id(prompt))

    def _batches(self, window: list[Prompt]) -> Iterator[list[Prompt]]:
        """The window in batches of about the same length, those that bring pixels first. Visual states that a batch needs are
        there when it is yielded."""
        counts = Counter(name for prompt in window for name in prompt.images)
        repeated = {name for name, count in counts.items() if count > 1 or name in self._kept}
        kept = [prompt for prompt in window if self.visual_states and self._may_be_kept(prompt)]
        several = [prompt for prompt in kept if repeated.intersection(prompt.images)]
        several_ids = set(map(id, several))
        yield from self._by_length(prompt for prompt in window if id(prompt) not in several_ids)
        while several:
            images: dict[Hashable, Any] = {}
            room = self._kept.room()
            taken = 0
            for prompt in several:
                own = dict(zip(prompt.images, prompt.question.images))
                if taken and len(images.keys() | own.keys()) > room:
                    break
                images.update(own)
                taken += 1
            self._kept.encode(images)
            for prompt in several[:taken]:
                prompt.error = next((self._kept.errors[n] for n in prompt.images if n in self._kept.errors), None)
            asked = [prompt for prompt in several[:taken] if prompt.error is None]
            for group in self._about_the_same(asked):
                yield from self._by_length(group)
            yield from self._by_length(prompt for prompt in asked if not prompt.shares)
            several = several[taken:]

    def _about_the_same(self, prompts: list[Prompt]) -> list[list[Prompt]]:
        """Those of `prompts` that fill batches about the same images, behind the same text."""
        # a window is counted in places, where padding behind a beginning would count
        if any(layer.self_attn.window is not None for layer in self.model.language_model.layers):
            return []
        alike: dict[tuple, list[Prompt]] = {}
        for prompt in prompts:
            front = prompt.text.rpartition(self.processor.image_token)[0]
            alike.setdefault((front, *prompt.images), []).append(prompt)
        groups = [group for group in alike.values() if len(group) >= max(2, self.batch_size)]
        for prompt in itertools.chain(*groups):
            prompt.shares = True
        return groups

    def _may_be_kept(self, prompt: Prompt) -> bool:
        """Whether the images of a prompt are what they are in other prompts."""
        # LLaVA-OneVision reads several images of a prompt without tiles, and one with
        counts = "batch_num_images" in getattr(self.processor.image_processor, "model_input_names", ())
        is_film = any(isinstance(one, Video) for one in prompt.question.images)
        return not is_film and not (counts and len(prompt.images) > 1)

    def _by_length(self, prompts: Iterable[Prompt]) -> Iterator[list[Prompt]]:
        by_length = sorted(prompts, key=lambda prompt: (len(prompt.images), len(prompt.text)), reverse=True)
        for start in range(0, len(by_length), self.batch_size):
            yield by_length[start : start + self.batch_size]

    def _inputs(self, batch: list[Prompt]) -> tuple[list[Prompt], BatchFeature]:
        """Those of `batch` that can be asked, and what the model takes; the others get an error."""
        images: dict[str, Any] = {}
        names = [name for prompt in batch for name in prompt.images]
        if names and all(self._may_be_kept(prompt) for prompt in batch) and all(name in self._kept for name in names):
            images["visual_states"] = self._kept.of(names)
        elif names:
            images["images"] = []
            for prompt in batch:
                try:
                    images["images"].append([opened(image) for image in prompt.question.images])
                except ValueError as error:
                    prompt.error = str(error)
            if any(prompt.error for prompt in batch):
                return self._inputs([prompt for prompt in batch if prompt.error is None])
        texts = [prompt.text + (prompt.continuation or "") for prompt in batch]
        if not texts:
            return [], None
        bos = {"add_special_tokens": False} if begins_with_bos(self.processor.tokenizer, texts[0]) else {}
        padding = {"padding": True, "padding_side": "left"} if len(texts) > 1 else {}
        try:
            with _pad_token(self.processor.tokenizer):
                inputs = self.processor(text=texts, **images, **padding, **bos, return_tensors="pt")
        except ValueError as error:
            if len(batch) == 1:
                batch[0].error = str(error)
                return [], None
            good = [prompt for prompt in batch if self._inputs([prompt])[0]]
            if len(good) == len(batch):
                raise
            return self._inputs(good)
        return batch, inputs.to(self.model.device)

    def _behind_beginning(self, batch: list[Prompt], inputs: BatchFeature) -> Mapping[str, Any]:
        """`inputs`, or for questions about the same images a beginning in place of these, if the prompts begin alike."""
        if not all(prompt.shares for prompt in batch) or "visual_states" not in inputs:
            return inputs
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        rows = [row[real.bool()] for row, real in zip(ids, mask)]
        end = int((rows[0] == self.model.config.image_token_id).nonzero()[-1]) + 1  # behind the last image
        own = rows[0][:end]
        if not all(torch.equal(row[:end], own) for row in rows) or any(len(row) <= end for row in rows):
            return inputs
        images, kept = batch[0].images, self._beginning
        if kept is None or kept[0] != images or not torch.equal(kept[1].tokens, own.cpu()):
            self._beginning = None  # so that there is one of them at a time
            states = inputs["visual_states"][: len(images)]
            self._beginning = kept = images, self.model.keep(own[None], visual_states=states)
        return {"input_ids": ids, "attention_mask": mask, CACHE: kept[1]}

    # --- what the model is asked for ---

    def _generate(self, batch: list[Prompt], inputs: Mapping[str, Any], options: dict[str, Any]) -> list[Answer]:
        tokenizer, length = self.processor.tokenizer, inputs["input_ids"].shape[1]
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        options = {"pad_token_id": pad, **options}
        texts = options.pop("stop_strings", None) or []
        stop = StopTexts(tokenizer, [texts] if isinstance(texts, str) else list(texts), length) if texts else None
        if stop is not None:
            options["stopping_criteria"] = [*(options.get("stopping_criteria") or ()), stop]
        ids = self.model.generate(**inputs, **options)[:, length:]
        ends = options.get("eos_token_id", self.model.generation_config.eos_token_id)
        ends = set() if ends is None else set(ends) if isinstance(ends, (list, tuple)) else {ends}
        answers = []
        for prompt, row in zip(batch, ids.tolist()):
            end = next((index for index, token in enumerate(row) if token in ends), None)
            row = row if end is None else row[: end + 1]
            text = text_of(tokenizer, row)
            place = None if stop is None else stop.place_in(text)
            if stop is not None and place is not None:
                row = row[: stop.length_of(row)]  # other rows of the batch were longer
            finish = "stop" if end is not None or place is not None else "length"
            text = text[:place]
            answers.append(Answer(prompt.question.key, text.strip(), len(row), finish))
        return answers

    def _score(self, batch: list[Prompt], inputs: Mapping[str, Any]) -> list[Likelihood]:
        counts = [self._own_tokens(prompt) for prompt in batch]
        kept = max(1, *counts) + 1
        inputs, begun = dict(inputs), 0
        if (beginning := inputs.get(CACHE)) is not None:
            ids, inputs["attention_mask"] = beginning.arranged(inputs["input_ids"], inputs["attention_mask"])
            inputs["input_ids"], begun = ids[:, len(beginning) :], len(beginning)
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)[:, begun:]
        logits = self.model(**inputs, position_ids=positions, logits_to_keep=kept, use_cache=False).logits
        targets = inputs["input_ids"][:, -(kept - 1) :].to(logits.device)
        return [_likelihood(*row) for row in zip(batch, counts, logits[:, -kept:-1], targets)]

    def _own_tokens(self, prompt: Prompt) -> int:
        """How many tokens at the end of a prompt are the continuation's; one that both share is."""
        tail = prompt.text.rpartition(self.processor.image_token)[2]
        both = (tail, tail + (prompt.continuation or ""))
        before, whole = self.processor.tokenizer(list(both), add_special_tokens=False)["input_ids"]
        pairs = enumerate(zip(before, whole))
        return len(whole) - next((i for i, (one, other) in pairs if one != other), min(len(before), len(whole)))


@contextlib.contextmanager
def _pad_token(tokenizer: Any) -> Iterator[None]:
    """A tokenizer without a pad token, as Llama 3's, has one inside. Padding is masked: any token will do."""
    without = tokenizer.pad_token_id is None
    if without:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    try:
        yield
    finally:
        if without:
            tokenizer.pad_token = None


def _likelihood(prompt: Prompt, count: int, logits_TX: Tensor, targets_T: Tensor) -> Likelihood:
    logits_TX, targets_T = logits_TX[len(logits_TX) - count :].float(), targets_T[len(targets_T) - count :]
    logs_T = torch.log_softmax(logits_TX, -1).gather(1, targets_T[:, None])[:, 0]
    greedy = bool((logits_TX.argmax(-1) == targets_T).all())
    return Likelihood(prompt.question.key, math.fsum(logs_T.tolist()), greedy, count)


def _no_answer(key: Any, error: str | None) -> Answer:
    return Answer(key, finish="error", error=error)


def _no_likelihood(key: Any, error: str | None) -> Likelihood:
    return Likelihood(key, error=error)
