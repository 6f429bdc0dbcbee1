# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What is measured: for each kind of work a call per model, and its FLOPs.

All models get the same text and features. Where the encoder is not part of the work, a stand-in returns its states for
SAISA, LLaVA and members of the family, which otherwise run their own forward pass from pixels; the Flamingo takes features. A
prefill computes the logits of the last position only, as `generate` does.
"""

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from inspect import signature
from itertools import accumulate

import torch
from transformers import IdeficsForVisionText2Text

from ..common.extras import needs
from ..compat_saisa import CACHE
from ..configuration_saisa import SaisaConfig
from ..costs.encoder import clip_products
from ..costs.flops import Step, encoder_flops, step_flops, training_flops
from ..costs.products import products
from ..costs.traffic import traffic
from ..training.stages import LORA_TARGETS, SHARED_PROJECTOR
from .models import GivenFeatures, Models, draw_text, visual_tokens
from .names import MEMBER_MODELS, NARROW, WITHOUT_IMAGE
from .roof import Work


RANK = 64  # of the adapters
# without this argument, it computes the logits of all positions
IDEFICS_KEEPS_LOGITS = "logits_to_keep" in signature(IdeficsForVisionText2Text.forward).parameters


@dataclass(frozen=True)
class Case:
    """One point of a measurement.

    Attributes:
        work: one of `WORKS` (see `names.py`).
        batch: samples.
        text, visual: tokens of each sample. With `"mixed"`, every second one has no visual tokens.
        trained: with `"train"`, one of `TRAINED`.
        tokens: with `"decode"`, how many each call decodes.
    """

    work: str
    batch: int = 1
    text: int = 64
    visual: int = 576
    trained: str | None = None
    tokens: int = 8

    @property
    def name(self) -> str:
        """Its description in a few words."""
        what = self.work if self.trained is None else f"{self.work} {self.trained}"
        without = "" if self.seeing == self.batch else f" ({self.batch - self.seeing} without an image)"
        return f"{what}, batch {self.batch}{without}, {self.text} + {self.visual} tokens"

    @property
    def seeing(self) -> int:
        """Samples that have visual tokens."""
        return -(-self.batch // 2) if self.work == "mixed" else self.batch


@dataclass
class Task:
    """The work of a case by one model.

    Attributes:
        call: does it once.
        uncached: the same without keeping keys and values, if it makes any: all that it holds are activations.
        flops: of a call, by `saisa_hf.costs.flops`.
        passes: what its forward passes multiply and move; empty in training.
        held: bytes of the tensors besides the model that it needs between calls.
        cache: makes the cache behind the prompt, if the work has one.
    """

    call: Callable
    flops: int
    uncached: Callable | None = None
    held: Callable[[], int] = field(default=lambda: 0)
    cache: Callable | None = None
    passes: list[Work] = field(default_factory=list)


class Inputs:
    """Random text, features and images for a case. A prompt is one text token, the image, and the rest of the text; one
    without an image is padded on the left."""

    def __init__(self, case: Case, args: argparse.Namespace):
        place = {"device": args.device, "dtype": getattr(torch, args.dtype)}
        placeholders = torch.full((case.batch, case.visual), args.vocab_size - 1)
        text_ids = torch.tensor([draw_text(case.text, args) for _ in range(case.batch)])
        self.text_ids = text_ids.to(args.device)
        self.ids = torch.cat([text_ids[:, :1], placeholders, text_ids[:, 1:]], dim=1).to(args.device)
        self.mask = None
        if case.work == "mixed":
            if case.batch == 1:
                raise ValueError("--work mixed: every second sample has no image; expected --batch 2 or more, got 1.")
            self.mask = torch.ones_like(self.ids)
            self.mask[1::2, : case.visual] = 0
            self.ids[1::2] = torch.cat([torch.zeros_like(placeholders), text_ids], dim=1)[1::2].to(args.device)
        self.encoder = GivenFeatures(torch.randn(case.seeing, 1 + case.visual, args.vision_width, **place))
        self.nothing = torch.zeros(case.seeing, 3, 1, 1, **place)
        self.image_mask = torch.ones(case.batch, case.text, 1, dtype=torch.long, device=args.device)
        self.pixels = None
        if case.work == "first-token":
            if case.visual % visual_tokens(args):
                raise ValueError(
                    f"visual={case.visual}: from pixels, expected a multiple of the {visual_tokens(args)} visual tokens of "
                    "an image. Change the number, or --image-size."
                )
            images = case.batch * (case.visual // visual_tokens(args))
            self.pixels = torch.randn(images, 3, args.image_size, args.image_size, **place)

    def tokens(self, name: str) -> torch.Tensor:
        """Token ids, with placeholders for the models that have images in the text."""
        return self.ids if _reads_placeholders(name) else self.text_ids

    def labels(self, name: str) -> torch.Tensor:
        """The same with -100 up to the end of the image."""
        labels = self.tokens(name).clone()
        labels[:, : self.ids.shape[1] - self.text_ids.shape[1] + 1 if _reads_placeholders(name) else 1] = -100
        return labels

    def features(self, name: str) -> dict:
        """The arguments of a model's forward pass for the images, encoded by `encoder`."""
        if name == WITHOUT_IMAGE:
            return {}
        if name == "flamingo":
            return {
                "image_encoder_embeddings": self.encoder.states[:, None, 1:],
                "image_attention_mask": self.image_mask,
            }
        mask = {} if self.mask is None else {"attention_mask": self.mask}
        return {"pixel_values": self.nothing, **mask}

    def images(self, name: str) -> dict:
        """The same for the images as pixels."""
        if name == WITHOUT_IMAGE or self.pixels is None:
            return {}
        if name == "flamingo":
            pixels = self.pixels.unflatten(0, (len(self.ids), -1))
            return {"pixel_values": pixels, "image_attention_mask": self.image_mask.expand(-1, -1, pixels.shape[1])}
        return {"pixel_values": self.pixels}


def _reads_placeholders(name: str) -> bool:
    return name not in ("flamingo", WITHOUT_IMAGE)


def model_of(models: Models, name: str) -> torch.nn.Module:
    """The model called `name` in `MODELS`, `MEMBER_MODELS` or `NARROW`."""
    if name in NARROW:
        return models.narrow[name]
    if name in MEMBER_MODELS:
        return models.members[MEMBER_MODELS[name]]
    return models.bare if name == WITHOUT_IMAGE else getattr(models, name)


@contextmanager
def tasks(
    models: Models, names: list[str], case: Case, args: argparse.Namespace, cross_every: int = 4
) -> Iterator[dict[str, Task]]:
    """The work of `case` by each of the models `names`, to be done inside. Afterwards the models are as before, except for
    weights that training has changed."""
    inputs = Inputs(case, args)
    step = Step(case.text, case.visual, batch=case.batch, seeing=case.seeing)
    if case.work == "train":
        with _training(models, names, case) as trained:
            yield {name: _training_task(trained[name], name, models, inputs, case, cross_every) for name in names}
        return
    make = {"prefill": _prefill, "mixed": _prefill, "first-token": _first_token, "decode": _decode}
    make |= {"second-question": _second_question, "kept-beginning": _kept_beginning}
    with torch.no_grad():
        made = {name: make[case.work](models, name, inputs, case) for name in names}
        for name, task in made.items():
            steps, images = _steps(models, name, step, inputs, case), _images(name, inputs)
            task.flops = _flops(models, name, steps, images, cross_every)
            task.passes = _passes(models, name, steps, images, case, args, cross_every)
        yield made


def counted_as(models: Models, name: str) -> tuple[SaisaConfig, str]:
    """The configuration and the architecture by which `saisa_hf.costs.flops` counts the model called `name`."""
    is_ours = name in MEMBER_MODELS or name in NARROW
    return (model_of(models, name).config, "saisa") if is_ours else (models.saisa.config, name)


def _steps(models, name, step, inputs, case) -> list[Step]:
    """The forward passes of the language model in a call of any work except training."""
    steps = [step]
    if name == "flamingo":
        if not IDEFICS_KEEPS_LOGITS:
            step = replace(step, logits=None)
        # from pixels, it also attends to the class tokens
        images = 0 if inputs.pixels is None else len(inputs.pixels) // case.batch
        steps = [replace(step, visual=step.visual + images)]
    if case.work == "second-question" and _keeps_states(models, name):
        steps = [replace(step, visual=0, cached_visual=step.visual)]
    if case.work == "kept-beginning" and name != WITHOUT_IMAGE:
        steps = [replace(step, text=step.text - 1, visual=0, cached_text=1, cached_visual=step.visual)]
    if case.work == "decode":
        steps = list(accumulate(range(case.tokens), lambda behind, _: behind.next_token(), initial=step))[1:]
    return steps


def _images(name, inputs) -> int:
    """How many images the encoder reads in a call."""
    return 0 if inputs.pixels is None or name == WITHOUT_IMAGE else len(inputs.pixels)


def _flops(models, name, steps, images, cross_every) -> int:
    config, architecture = counted_as(models, name)
    total = images * encoder_flops(config) if images else 0
    return total + sum(sum(step_flops(config, architecture, one, cross_every).values()) for one in steps)


def _passes(models, name, steps, images, case, args, cross_every) -> list[Work]:
    """What each of the forward passes multiplies and moves; the encoder belongs to the first."""
    config, architecture = counted_as(models, name)
    itemsize = getattr(torch, args.dtype).itemsize
    placed = case.visual if case.work == "second-question" and _keeps_states(models, name) else 0
    passes = []
    for one in steps:
        multiplied = list(products(config, architecture, one, cross_every, config.fold_projectors))
        if images and not passes:
            multiplied += clip_products(config, images)
        passes.append(Work.of(multiplied, traffic(config, architecture, one, cross_every, placed), itemsize))
    return passes


def _keeps_states(models: Models, name: str) -> bool:
    """Whether a second question finds keys and values of the image, which the first has left."""
    config, architecture = counted_as(models, name)
    return architecture == "saisa" and not config.in_embedding_space


def _prefill(models, name, inputs, case) -> Task:
    model, ids = model_of(models, name), inputs.tokens(name)

    def call(use_cache=True):
        with models.encoded_by(inputs.encoder):
            return model(input_ids=ids, use_cache=use_cache, logits_to_keep=1, **inputs.features(name))

    return Task(call, 0, lambda: call(use_cache=False), cache=lambda: call()[CACHE])


def _first_token(models, name, inputs, case) -> Task:
    model, ids = model_of(models, name), inputs.tokens(name)

    def call():
        outputs = model(input_ids=ids, use_cache=True, logits_to_keep=1, **inputs.images(name))
        return outputs.logits[:, -1].argmax(-1)

    return Task(call, 0, cache=_prefill(models, name, inputs, case).cache)


def _second_question(models, name, inputs, case) -> Task:
    if not _keeps_states(models, name):
        return _prefill(models, name, inputs, case)
    model = model_of(models, name)
    with models.encoded_by(inputs.encoder):
        states = model.get_visual_states(inputs.nothing)

    def call():
        with models.encoded_by(inputs.encoder):  # the states are checked to be of this encoder
            return model(input_ids=inputs.ids, visual_states=states, use_cache=True, logits_to_keep=1)

    return Task(call, 0, held=lambda: states.nbytes, cache=lambda: call()[CACHE])


def _kept_beginning(models, name, inputs, case) -> Task:
    if name == WITHOUT_IMAGE:
        return _prefill(models, name, inputs, case)
    model, begun = model_of(models, name), 1 + case.visual
    encoder = GivenFeatures(inputs.encoder.states[:1])  # of one image, that all questions are about
    with models.encoded_by(encoder):
        beginning = model.keep(inputs.ids[:1, :begun], pixel_values=inputs.nothing[:1])

    def call():
        with models.encoded_by(encoder):  # the beginning is checked to be of this encoder
            return model(input_ids=inputs.ids[:, begun:], use_cache=True, logits_to_keep=1, **{CACHE: beginning})

    return Task(call, 0, held=lambda: beginning.nbytes, cache=lambda: call()[CACHE])


def _decode(models, name, inputs, case) -> Task:
    model, cache = model_of(models, name), _prefill(models, name, inputs, case).call()[CACHE]
    token = inputs.text_ids[:, -1:]
    images = inputs.features(name) if name == "flamingo" else {}
    if images:
        images["image_attention_mask"] = inputs.image_mask[:, :1]

    def call():
        for _ in range(case.tokens):
            model(input_ids=token, use_cache=True, logits_to_keep=1, **{CACHE: cache}, **images)
        cache.crop(-case.tokens)

    return Task(call, 0, cache=lambda: cache)


@contextmanager
def _training(models: Models, names: list[str], case: Case) -> Iterator[dict]:
    """The models in training mode; only what is to be trained needs gradients."""
    trained = {name: model_of(models, name) for name in names}
    for model in trained.values():
        model.requires_grad_(False)
    try:
        if case.trained == "lora":
            trained = {name: _with_adapters(model) for name, model in trained.items()}
        for model in trained.values():
            model.train()
            if case.trained != "lora":
                for parameter, p in model.named_parameters():
                    projector = "visual_projector" in parameter or "multi_modal_projector" in parameter
                    encoder = "vision_tower" in parameter or "vision_model" in parameter
                    p.requires_grad_(projector if case.trained == "projectors" else not encoder)
        yield trained
    finally:
        for name in names:
            if case.trained == "lora":
                trained[name] = trained[name].unload()
            model_of(models, name).requires_grad_(True).eval()


def _with_adapters(model):
    peft = needs("peft", "training adapters", extra="lora")
    targets = rf"({LORA_TARGETS}|{SHARED_PROJECTOR}|.*multi_modal_projector\.linear_\d)"
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=targets)
    return peft.get_peft_model(model, config)


def _training_task(model, name, models, inputs, case, cross_every) -> Task:
    config, architecture = counted_as(models, name)
    weights = [p for p in model.parameters() if p.requires_grad]
    device = inputs.ids.device.type
    optimizer = torch.optim.AdamW(weights, lr=1e-5, fused=True)  # as in `Trainer`
    ids, labels = inputs.tokens(name), inputs.labels(name)
    options = {"skip_logits": True} if architecture == "saisa" else {}  # as in `saisa train`
    dtype = inputs.nothing.dtype
    precision = nullcontext() if dtype == torch.float32 else torch.autocast(device, dtype)

    def call():
        with models.encoded_by(inputs.encoder), precision:
            loss = model(input_ids=ids, labels=labels, use_cache=False, **inputs.features(name), **options).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def held():
        states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
        return sum(x.numel() * x.element_size() for x in (*model.parameters(), *states))

    # the token before the image predicts nothing, and of the image only the last one does, where it has an output
    rows = case.text - 2 + config.in_embedding_space if architecture == "saisa" else None
    step = Step(case.text, case.visual, batch=case.batch, logits=rows)
    return Task(call, training_flops(config, architecture, step, case.trained, RANK, cross_every), held=held)
