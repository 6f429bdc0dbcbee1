# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""How the study on real weights trains and examines a member of the family, in pieces that can be interrupted.

All members start from one language model and one frozen encoder, whose features are computed once: `Encoded` holds them
with the token ids of all samples, and in a model that trains, `StoredFeatures` stands in the encoder's place.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from digit_models import keep
from PIL import Image
from torch import nn
from transformers import EfficientNetModel
from transformers.modeling_outputs import BaseModelOutput

from saisa_hf import SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.checkpoints.gguf import gguf_file, gguf_model
from saisa_hf.costs.family import member_settings
from saisa_hf.head_saisa import IGNORED
from saisa_hf.training.encoding import ConversationEncoder, SaisaCollator


SIDE = 7  # of the encoder's last feature map, at 224 px
FEATURES = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full", "image_seq_length": SIDE * SIDE}
WARM_UP, CLIP, SAVE_EVERY = 0.05, 1.0, 300  # share of the steps, gradient norm, seconds
NEAR = 16  # batches, in which samples of a length come together
SYSTEM = {"role": "system", "content": "Answer briefly."}
IMAGE = "<image>"
PARTS = ("input_ids", "labels", "pixel_values")


class StoredFeatures(nn.Module):
    """In the encoder's place: its features, (I, C, rows, columns), which come as pixel values."""

    def __init__(self):
        super().__init__()
        self.dtype_of = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=pixel_values, hidden_states=(pixel_values,))


class Talk(NamedTuple):
    """A conversation about an image, or about none, and the kind of its first question."""

    messages: list[dict]
    picture: Image.Image | None = None
    kind: str = "text"

    @classmethod
    def of(cls, turns: Sequence[tuple[str, str]], picture: Image.Image | None = None, kind: str = "text") -> "Talk":
        """Questions and answers, with the image in front of the first."""
        messages = [SYSTEM]
        for number, (question, answer) in enumerate(turns):
            asked = f"{IMAGE}\n{question}" if picture is not None and not number else question
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        return cls(messages, picture, kind)


@dataclass
class Encoded:
    """Conversations as token ids and labels, with the features of their images, (1, C, rows, columns) in bfloat16."""

    samples: list[dict]
    kinds: list[str]

    def save(self, path: Path) -> None:
        keep({"samples": self.samples, "kinds": self.kinds}, path)

    @classmethod
    def load(cls, path: Path) -> "Encoded":
        return cls(**torch.load(path, weights_only=True))


@torch.no_grad()
def encoded(
    talks: Sequence[Talk], processor: SaisaProcessor, encoder: EfficientNetModel, template: str | None = None
) -> Encoded:
    """Conversations as a model takes them, by the chat template `template`, or the processor's own."""
    encode, made = ConversationEncoder(processor, chat_template=template), []
    for start in range(0, len(talks), 32):
        batch = []
        for talk in talks[start : start + 32]:
            item = encode({"messages": talk.messages, "images": [] if talk.picture is None else [talk.picture]})
            batch.append({name: value for name, value in item.items() if name in PARTS})
        pixels = [item["pixel_values"] for item in batch if "pixel_values" in item]
        if pixels:
            features = iter(encoder(torch.cat(pixels), output_hidden_states=True).hidden_states[-1].bfloat16())
            for item in batch:
                if "pixel_values" in item:
                    item["pixel_values"] = next(features)[None].clone()
        made += batch
    return Encoded(made, [talk.kind for talk in talks])


def new_member(
    name: str, language_model: str | os.PathLike, encoder: EfficientNetModel, seed: int, image_token_id: int
):
    """The untrained member `name` over the language model, with `StoredFeatures` for an encoder.

    Its projectors are those that `seed` draws; SAISA's are all alike, since its first stage trains one for all layers.
    """
    text = gguf_model(gguf_file(language_model))
    settings = member_settings(name, text.config.num_hidden_layers)
    torch.manual_seed(seed)
    model = SaisaForConditionalGeneration.from_parts(
        text, encoder, image_token_id=image_token_id, **FEATURES, **settings
    )
    model.model.vision_tower = StoredFeatures()
    model.set_attn_implementation("eager")  # at these lengths a tenth faster on CPUs, for the backward pass
    return model


def batches(lengths: Sequence[int], size: int, steps: int, seed: int) -> list[list[int]]:
    """Indices of the samples of each step: all of them once in random order, then again in another, those of a batch of about
    the same length."""
    generator, order = torch.Generator().manual_seed(seed), []
    while len(order) < size * steps:
        order += torch.randperm(len(lengths), generator=generator).tolist()
    near, found = size * NEAR, []
    for start in range(0, size * steps, near):
        part = sorted(order[start : min(start + near, size * steps)], key=lambda index: lengths[index])
        groups = [part[first : first + size] for first in range(0, len(part), size)]
        found += [groups[place] for place in torch.randperm(len(groups), generator=generator)]
    return found


class Stage:
    """One stage of training, which goes on where it was interrupted.

    Args:
        model: what is trained: its parameters that require gradients.
        data: the samples.
        size: of a batch.
        steps: in all.
        rate: the peak of the learning rate, after a warm-up and in front of a cosine.
        seed: of the order of the samples.
        state: the file of the state in between.
    """

    def __init__(self, model, data: Encoded, size: int, steps: int, rate: float, seed: int, state: Path):
        self.model, self.data, self.steps, self.rate, self.state = model, data, steps, rate, state
        self.batches = batches([len(sample["input_ids"]) for sample in data.samples], size, steps, seed)
        self.trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(self.trained.values(), lr=rate, weight_decay=0.0, fused=True)
        self.collate = SaisaCollator(pad_token_id=0)
        self.step, self.seconds, self.losses = 0, 0.0, []

    def run(self, deadline: float, log: Callable[[str], None] = print) -> bool:
        """Trains until the end, or until `deadline` (of `time.monotonic`); returns whether it is the end."""
        self._resume()
        self.model.train()
        saved = time.monotonic()
        while self.step < self.steps:
            if time.monotonic() > deadline:
                self._keep()
                return False
            start = time.perf_counter()
            self.losses.append(self._step(self.batches[self.step]))
            self.step += 1
            self.seconds += time.perf_counter() - start
            if self.step % 50 == 0:
                recent = sum(self.losses[-50:]) / 50
                log(f"{self.state.stem}: step {self.step} of {self.steps}, loss {recent:.3f}, {self.seconds:.0f} s")
            if time.monotonic() - saved > SAVE_EVERY or self.step == self.steps:
                self._keep()
                saved = time.monotonic()
        return True

    def forget(self) -> None:
        """Removes the state in between: what the training is for has been written down."""
        self.state.unlink(missing_ok=True)

    def _step(self, chosen: list[int]) -> float:
        done = (self.step + 1) / self.steps
        rate = self.rate * min(1.0, done / WARM_UP) * 0.5 * (1 + math.cos(math.pi * self.step / self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = self.collate([self.data.samples[index] for index in chosen])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained.values(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _keep(self) -> None:
        weights = {name: parameter.detach() for name, parameter in self.trained.items()}
        progress = {"step": self.step, "seconds": self.seconds, "losses": self.losses}
        keep({"weights": weights, "optimizer": self.optimizer.state_dict(), **progress}, self.state)

    def _resume(self) -> None:
        if not self.state.exists():
            return
        found = torch.load(self.state, weights_only=True)
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(found["weights"][name])
        self.optimizer.load_state_dict(found["optimizer"])
        self.step, self.seconds, self.losses = found["step"], found["seconds"], found["losses"]


@torch.no_grad()
def right(model, data: Encoded, size: int = 32) -> list[bool]:
    """For each question, whether greedy decoding gives exactly the right answer: whether each of its tokens, and the end
    token, is the most likely one given those before it."""
    model.eval()
    by_length = sorted(range(len(data.samples)), key=lambda index: len(data.samples[index]["input_ids"]))
    found, collate = {}, SaisaCollator(pad_token_id=0)
    for start in range(0, len(by_length), size):
        chosen = by_length[start : start + size]
        batch = collate([data.samples[index] for index in chosen])
        labels = batch.pop("labels")[:, 1:]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = model.model(**batch, use_cache=False).last_hidden_state[:, :-1]
            likely = torch.full_like(labels, IGNORED)
            likely[labels != IGNORED] = model.lm_head(hidden[labels != IGNORED]).argmax(-1)
        found.update(zip(chosen, (likely == labels).all(dim=1).tolist()))
    return [found[index] for index in range(len(data.samples))]


@torch.no_grad()
def loss_of(model, data: Encoded, size: int = 16) -> float:
    """The mean loss of answers, over batches."""
    model.eval()
    collate, losses = SaisaCollator(pad_token_id=0), []
    for start in range(0, len(data.samples), size):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(model(**collate(data.samples[start : start + size]), use_cache=False).loss.item())
    return sum(losses) / len(losses)


@torch.no_grad()
def perplexity(model, passages: Sequence[list[int]]) -> float:
    """Of the tokens of texts of one length, without an image, each given those before it."""
    model.eval()
    ids, total = torch.tensor(passages), 0.0
    for part in ids.split(8):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total += model(input_ids=part, labels=part, use_cache=False).loss.item() * len(part)
    return math.exp(total / len(ids))
