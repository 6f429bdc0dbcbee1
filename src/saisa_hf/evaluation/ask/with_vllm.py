# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Questions answered by vLLM, in this process."""

import importlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

from ...answering import Answer, Question
from ...answering.kept_images import opened
from ...answering.questions import render, text_of
from ...common.extras import needs
from ...processing_saisa import SaisaProcessor, Video, begins_with_bos
from ...serving.vllm.prompts import with_a_token_each
from ...serving.with_vllm import problem_of


class VllmAnswerer:
    """Answers questions as `answering.Answerer` does, with vLLM.

    Args:
        checkpoint: a folder, or a hub id.
        dtype: to compute in; `"auto"`: as the checkpoint is stored.
        device: `"auto"`, or the kind of device that this vLLM runs on.
        at_once: questions that vLLM is given at once, their images decoded; it makes batches of its own.
        images: the most of one question.
        chat_template, system: as `Answerer` takes them.
        sampling: arguments of vLLM's `SamplingParams`, `max_tokens` and `temperature` for instance.
        options: further arguments of `vllm.LLM`.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: this vLLM cannot run the checkpoint, or not on that device.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        dtype: str,
        device: str,
        at_once: int,
        images: int,
        chat_template: str | None,
        system: str | None,
        sampling: dict[str, Any],
        options: dict[str, Any],
    ):
        vllm: Any = needs("vllm", "--backend vllm", extra="vllm")
        if problem := problem_of(checkpoint):
            raise ValueError(f"--backend vllm: {problem}.")
        self._refusals = (ValueError, importlib.import_module("vllm.exceptions").VLLMValidationError)
        own = importlib.import_module("vllm.platforms").current_platform.device_type
        if device not in ("auto", own):
            raise ValueError(f"--device {device}: this vLLM runs on {own!r}. Or answer with --backend transformers.")
        self.processor = SaisaProcessor.from_pretrained(checkpoint)
        self.at_once, self.images, self.chat_template, self.system = at_once, images, chat_template, system
        self._sampling = vllm.SamplingParams(detokenize=False, **sampling)
        options = {"dtype": dtype, "limit_mm_per_prompt": {"image": images}, **options}
        try:
            self.llm = vllm.LLM(checkpoint, **options)
        except TypeError as error:  # a name that vLLM does not know
            raise ValueError(f"--vllm-options: {error}") from error

    def answer(self, questions: Iterable[Question], as_they_come: bool = False) -> Iterator[Answer]:
        """The answers, in the order of the questions in any case; so many as `at_once` are read ahead."""
        iterator = iter(questions)
        while chunk := list(itertools.islice(iterator, self.at_once)):
            answers = {}
            prompts = {}
            for place, question in enumerate(chunk):
                try:
                    prompts[place] = self._prompt(question)
                except ValueError as error:
                    answers[place] = Answer(question.key, finish="error", error=str(error))
            answers.update(self._answers(chunk, prompts))
            yield from (answers[place] for place in range(len(chunk)))

    def _prompt(self, question: Question) -> dict[str, Any]:
        """What vLLM takes. Raises ValueError if the question cannot be asked."""
        if len(question.images) > self.images:
            raise ValueError(f"{len(question.images)} images: vLLM was started for {self.images}, see --max-images.")
        if any(isinstance(image, Video) for image in question.images):
            raise ValueError("A question is about a video, which vLLM does not read: ask transformers.")
        text = render(question, self.processor, self.chat_template, self.system)
        images = [opened(image) for image in question.images]
        bos = {"add_special_tokens": False} if begins_with_bos(self.processor.tokenizer, text) else {}
        prompt: dict[str, Any] = {"prompt_token_ids": with_a_token_each(self.processor, text, **bos)["input_ids"][0]}
        return {**prompt, "multi_modal_data": {"image": images}} if images else prompt

    def _answers(self, chunk: list[Question], prompts: dict[int, dict[str, Any]]) -> dict[int, Answer]:
        """Answers by place; a question that vLLM refuses, for its length for instance, leaves the others alone."""
        if not prompts:
            return {}
        try:
            outputs = self.llm.generate(list(prompts.values()), self._sampling, use_tqdm=False)
        except self._refusals as error:
            if len(prompts) == 1:
                (place,) = prompts
                return {place: Answer(chunk[place].key, finish="error", error=str(error))}
            found = {}
            for place, prompt in prompts.items():
                found.update(self._answers(chunk, {place: prompt}))
            return found
        answers = {}
        for place, output in zip(prompts, outputs):
            said = output.outputs[0]
            finish = "length" if said.finish_reason == "length" else "stop"
            # decoded as the other backend does: vLLM leaves out half a character at the end
            text = text_of(self.processor.tokenizer, said.token_ids)
            answers[place] = Answer(chunk[place].key, text.strip(), len(said.token_ids), finish)
        return answers
