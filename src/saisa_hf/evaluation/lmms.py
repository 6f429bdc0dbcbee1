# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""SAISA as a model of lmms-eval: `lmms-eval --model saisa --model_args pretrained=...`. Needs lmms-eval to be imported."""

import hashlib
import logging
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import PIL.Image
import torch
from accelerate import Accelerator
from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from tqdm import tqdm

from ..answering import Answerer, Question
from ..common.loading import load_model
from ..common.shown import shown
from ..images_saisa import load_image
from ..processing_saisa import Video


logger = logging.getLogger(__name__)

NEW_TOKENS = 1024  # where neither the task nor the model's arguments say how long an answer may be
# what a task may say of generation, beside `until`; anything else is for other models, and is left out with a warning
GENERATION = {"max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams"}
GENERATION |= {"repetition_penalty", "length_penalty", "no_repeat_ngram_size"}


class _Saisa(lmms):
    """A SAISA checkpoint that answers lmms-eval's requests, in batches, each image encoded once for all that is asked about
    it. With several processes, each answers its share on a device of its own.

    Args:
        pretrained: folder, or hub id, of a checkpoint.
        device: `"cuda"`, `"cuda:1"`, `"cpu"` ...; None or `"auto"`: the fastest available. With several processes, each of
            which gets one, the kind of device.
        dtype: to compute in; `"auto"`: as the checkpoint is stored.
        batch_size: requests that are answered at once.
        max_batch_size: not used: lmms-eval gives it to every model.
        attn_implementation: as `from_pretrained` takes it.
        system_prompt: a system message in front of each conversation, or a file with it.
        visual_states: whether an image that is asked about more than once is encoded once.
        max_new_tokens: of an answer, where the task does not say.

    Raises:
        OSError: no such folder or repository.
        ValueError: it is not a SAISA, or an argument is not as expected.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        attn_implementation: str | None = None,
        system_prompt: str | None = None,
        visual_states: bool = True,
        max_new_tokens: int = NEW_TOKENS,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size!r:.40}: expected a positive number of requests.")
        self.accelerator = Accelerator()
        self._rank, self._world_size = self.accelerator.process_index, self.accelerator.num_processes
        device = str(device or "auto")
        if self._world_size > 1:
            kind = self.accelerator.device.type if device == "auto" else device.partition(":")[0]
            device = f"cuda:{self.accelerator.local_process_index}" if kind == "cuda" else kind
        self._model, self.processor = load_model(str(pretrained), dtype, device, attn_implementation)
        self.batch_size_per_gpu = int(batch_size)
        self.system_prompt = self._resolve_system_prompt(system_prompt.replace("\\n", "\n")) if system_prompt else None
        self._answerer = Answerer(
            self._model,
            self.processor,
            batch_size=self.batch_size_per_gpu,
            visual_states=visual_states,
            strict=True,
            max_new_tokens=max_new_tokens,
        )
        # by what they show, as long as somebody holds them: a data set makes a new object each time it is asked for one
        self._images: weakref.WeakValueDictionary[bytes, PIL.Image.Image] = weakref.WeakValueDictionary()

    @property
    def model(self) -> torch.nn.Module:
        return self._model

    @property
    def config(self) -> Any:
        return self._model.config

    @property
    def tokenizer(self) -> Any:
        return self.processor.tokenizer

    @property
    def device(self) -> torch.device:
        return self._model.device

    @property
    def batch_size(self) -> int:
        return self.batch_size_per_gpu

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """The answers, in the order of the requests; those with the same generation arguments are asked together."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(sorted(self._generation_of(request).items(), key=repr)), []).append(index)
        results: list[Any] = [None] * len(requests)
        with self._progress(len(requests)) as progress:
            for indices in groups.values():
                given = self._generation_of(requests[indices[0]])
                options, stops = _generation(given)
                questions = (self._question(requests[index].args, key=index) for index in indices)
                for answer in self._answerer.answer(questions, **options, stop_strings=stops or None):
                    request = requests[answer.key]
                    results[answer.key] = GenerationResult(answer.text, TokenCounts(output_tokens=answer.tokens))
                    self.cache_hook.add_partial("generate_until", (request.args[0], given), answer.text)
                    progress.update()
        return results

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Pairs of the mean negative log-likelihood of a continuation's tokens, which is what lmms-eval's own models return
        and its tasks choose the smallest of, and whether greedy decoding gives that continuation. They come as the `text` of
        `GenerationResult`, since the evaluator turns bare pairs into strings."""

        def asked() -> Iterator[tuple[Question, str]]:
            for index, request in enumerate(requests):
                context, target, visuals, *of_document = (
                    request.args if len(request.args) > 2 else (*request.args, None)
                )
                continuation = target if isinstance(target, str) else str(target(self._document(*of_document)))
                images = visuals(self._document(*of_document)) if visuals is not None else ()
                yield self._simple(context, images, key=index), continuation

        results = []
        with self._progress(len(requests)) as progress:
            for found in self._answerer.loglikelihood(asked()):
                pair = (-found.log_probability / max(1, found.tokens), found.is_greedy)
                results.append(GenerationResult(pair))
                progress.update()
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError(
            "saisa: tasks of several rounds are not supported, only generate_until and loglikelihood."
        )

    def _generation_of(self, request: Instance) -> dict[str, Any]:
        raise NotImplementedError

    def _question(self, arguments: tuple, key: int) -> Question:
        raise NotImplementedError

    def _document(self, number: int, task: str, split: str) -> Any:
        return self.task_dict[task][split][number]

    def _simple(self, context: str, visuals: Iterable | None, key: int) -> Question:
        """A question of a text and visuals, which come first unless `<image>` in the text says where they are."""
        message = {"role": "user", "content": [{"type": "text", "text": context}]}
        content = [{"type": _kind(one), "url": one} for one in _flat(visuals)]
        return self._conversation([{**message, "content": [*content, *message["content"]]}], key)

    def _conversation(self, messages: list[dict], key: int) -> Question:
        """A question of chat messages in lmms-eval's form."""
        token, images, turns = self.processor.image_token, [], []
        for message in messages:
            content = message["content"]
            content = [{"type": "text", "text": content}] if isinstance(content, str) else content
            own = [self._visual(part) for part in content if part["type"] in ("image", "video")]
            named = sum(part["text"].count(token) for part in content if part["type"] == "text")
            parts = [{"type": "image"} if part["type"] in ("image", "video") else dict(part) for part in content]
            if own and named == len(own):  # the text says where they are
                parts = [part for part in parts if part["type"] != "image"]
            turns.append({"role": message["role"], "content": parts})
            images += own
        if self.system_prompt:
            turns = self._apply_system_prompt(turns, self.system_prompt)
        return Question(turns, images, key)

    def _visual(self, part: dict) -> PIL.Image.Image | Video:
        return self._image(part["url"]) if part["type"] == "image" else Video(part["url"])

    def _image(self, image: Any) -> PIL.Image.Image:
        """An image as the one object that stands for all images with the same pixels."""
        image = load_image(image, f"image {shown(image)}")
        name = hashlib.sha256(repr(image.size).encode() + image.tobytes()).digest()
        return self._images.setdefault(name, image)

    def _progress(self, total: int) -> tqdm:
        return tqdm(total=total, disable=self.rank != 0, desc="Model Responding")


class SaisaChat(_Saisa):
    """For tasks whose documents become chat messages, lmms-eval's default."""

    is_simple = False

    def _generation_of(self, request: Instance) -> dict[str, Any]:
        return request.args[2]

    def _question(self, arguments: tuple, key: int) -> Question:
        _, messages_of, _, *of_document = arguments
        return self._conversation(messages_of(self._document(*of_document)), key)


class SaisaSimple(_Saisa):
    """For tasks whose documents become a text and visuals: `--force_simple`, which tasks with likelihoods need."""

    is_simple = True

    def _generation_of(self, request: Instance) -> dict[str, Any]:
        return request.args[1]

    def _question(self, arguments: tuple, key: int) -> Question:
        context, _, visuals_of, *of_document = arguments
        return self._simple(context, visuals_of(self._document(*of_document)), key)


def _generation(given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A task's generation arguments as those of `generate`, and the texts at which an answer ends."""
    given = {name: value for name, value in given.items() if value is not None}
    stops = given.pop("until", [])
    stops = [stops] if isinstance(stops, str) else list(stops)
    if "max_gen_toks" in given:
        given.setdefault("max_new_tokens", given.pop("max_gen_toks"))
    others = sorted(given.keys() - GENERATION)
    if others:
        logger.warning(f"saisa: generation arguments that are not used: {', '.join(others)}")
    options = {name: value for name, value in given.items() if name in GENERATION}
    if not options.get("do_sample", options.get("temperature", 0) > 0) or options.get("temperature") == 0:
        options = {name: value for name, value in options.items() if name not in ("temperature", "top_p", "top_k")}
        options["do_sample"] = False
    else:
        options["do_sample"] = True
    return options, [stop for stop in stops if stop]


def _flat(visuals: Any) -> list:
    """Visuals as tasks give them: None, one, or lists of them in lists."""
    if visuals is None:
        return []
    return [one for part in visuals for one in _flat(part)] if isinstance(visuals, (list, tuple)) else [visuals]


def _kind(visual: Any) -> str:
    """What a visual is: in lmms-eval a path is a video's unless it ends like an image's, and audio is a mapping."""
    if isinstance(visual, str):
        image = visual.lower().endswith((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"))
        return "image" if image else "video"
    return "audio" if isinstance(visual, dict) and "array" in visual else "image"
