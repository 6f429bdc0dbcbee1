# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Which layers need to see the image: backward elimination, measured along the LLaVA's own answers.

All projectors are fitted, as a layer's does not depend on which other layers see. Then, round by round, each layer that still
sees is hidden alone, and those whose absence moves the next-token distributions least from the LLaVA's are hidden for good.
"""

import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from ...modeling_saisa import SaisaForConditionalGeneration
from ...token_layout_saisa import TokenLayout
from ...visual_states_saisa import GivenImages
from .agreement import answered, batches_of_one_prompt, divergence, teacher_forced
from .reporting import show_progress
from .teacher import Teacher, part_of
from .work_folder import Workbench, write_json


SIZES = (1, 2, 4, 8, 16)  # how many layers the report has, beside all of them and those that are asked for
ONE_BY_ONE = 16  # with so many layers left or fewer, one goes in a round; before, a quarter
ROWS_AT_ONCE = 4  # whose keys and values in all layers are in memory


class Batch(NamedTuple):
    """Some images, each with a prompt and the LLaVA's answer, as `teacher_forced` has them."""

    images: list[int]
    ids: torch.Tensor  # (n, S)
    keep: int
    counts: torch.Tensor  # bool (n, keep - 1)
    logits: torch.Tensor  # (R, X), the LLaVA's for the tokens of the answers


def sizes_of(layers: int, wanted: int) -> list[int]:
    """How many seeing layers the report has, in ascending order."""
    return sorted({size for size in (*SIZES, wanted) if size < layers} | {layers})


def removed_at_once(left: int, sizes: Collection[int]) -> int:
    """How many of the layers that are left go in a round, none of the `sizes` being passed over."""
    most = 1 if left <= ONE_BY_ONE else left // 4
    return min(most, left - max(size for size in sizes if size < left))


def left_by_round(layers: int, wanted: int) -> list[int]:
    """How many layers see the image before each round, and after the last."""
    sizes, left = sizes_of(layers, wanted), [layers]
    while left[-1] > 1:
        left.append(left[-1] - removed_at_once(left[-1], sizes))
    return left


def file_of_rounds(layers: int, wanted: int) -> str:
    """Where rounds are kept: in one file for all numbers that take the rounds of a single layer."""
    is_usual = left_by_round(layers, wanted) == left_by_round(layers, 1)
    return "layers.json" if is_usual else f"layers-{wanted}.json"


def nested(order: list[int], number: int) -> list[int]:
    """The layers that see when so many are left, in ascending order."""
    return sorted(order[-number:])


@torch.no_grad()
def choose_layers(bench: Workbench, teacher: Teacher) -> list[int]:
    """The layers of `bench.model` in the order in which they can do without the image: the last is needed most. Measured on
    `bench.choosing`; each finished round is kept in the work folder."""
    rows = answered(bench, teacher, bench.choosing, "choosing-answers.json")
    count = bench.model.config.text_config.num_hidden_layers
    path = bench.folder / file_of_rounds(count, bench.fit.layers_to_choose)
    rounds = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    order = [layer for one in rounds for layer in one["hidden"]]
    ahead = left_by_round(count, bench.fit.layers_to_choose)[len(rounds) + 1 :]
    batches = batches_of(bench, teacher, rows) if ahead else []
    for number in ahead:
        left = [layer for layer in range(count) if layer not in order]
        found = divergences_without(bench, batches, left)
        # of layers that make no difference the last goes first
        least = sorted(left, key=lambda layer: (found[layer], -layer))[: len(left) - number]
        rounds.append({"hidden": least, "kl": {str(layer): kl for layer, kl in found.items()}})
        order += least
        write_json(path, rounds)
        line = f"choosing layers: {number} of {count} left, hidden {', '.join(map(str, least))}"
        show_progress(bench.log, line)
    return order + [layer for layer in range(count) if layer not in order]


@torch.no_grad()
def batches_of(bench: Workbench, teacher: Teacher, rows: list[dict]) -> list[Batch]:
    """`rows` (see `answered`) in batches."""
    batches = []
    for rows_of_batch in batches_of_one_prompt(rows, bench, ROWS_AT_ONCE):
        ids, keep, counts = teacher_forced(bench, rows_of_batch)
        images = [row["picture"] for row in rows_of_batch]
        theirs = teacher.logits(ids, bench.rows(bench.seen, images), keep)[:, :-1][counts]
        batches.append(Batch(images, ids, keep, counts, theirs.cpu()))
    return batches


@torch.no_grad()
def divergences_without(bench: Workbench, batches: list[Batch], left: list[int]) -> dict[int, float]:
    """For each of the layers `left`, which see the image: the mean KL(LLaVA || SAISA) along the answers of `batches` when it
    does not see it either, in nats.

    Hiding a layer changes nothing in front of it. So the hidden states of the text pass all layers once, and those from each
    layer on a second time without it. Keys and values of visual tokens are computed once.
    """
    decoder, sums, tokens = bench.model.model.language_model, dict.fromkeys(left, 0.0), 0
    layers, count = decoder.layers, len(decoder.layers)
    for images, ids, keep, counts, logits in batches:
        theirs = logits.to(bench.device)
        given = GivenImages("features", [bench.lengths[image] for image in images])
        layout = bench.model.model.layout_of(given, ids, None, None, None)
        features, states = bench.rows(bench.features, images), bench.model.get_input_embeddings()(ids)
        visual = [layers[index].visual_keys_and_values(features) if index in left else None for index in range(count)]
        run = partial(_run, decoder, layout, visual)
        with seeing(bench.model, left):
            for index in range(left[-1] + 1):
                if index in left:
                    with seeing(bench.model, [layer for layer in left if layer != index]):
                        last = run(states, index, count)[:, -keep:-1][counts]
                    ours, _ = bench.model.logits_and_loss(last, None, False, None, {}, {})
                    sums[index] += float(divergence(ours, theirs).double().sum())
                states = run(states, index, index + 1)
        tokens += int(counts.sum())
    return {layer: total / tokens for layer, total in sums.items()}


def _run(
    decoder: nn.Module, layout: TokenLayout, visual: list, states: torch.Tensor, first: int, end: int
) -> torch.Tensor:
    """(B, S, D) hidden states in front of layer `first` -> those in front of layer `end`, or past the last norm."""
    part = part_of(decoder, first, end, normed=end == len(decoder.layers))
    outputs = part(inputs_embeds=states, layout=layout, visual=tuple(visual[first:end]), use_cache=False)
    return outputs.last_hidden_state


@contextmanager
def seeing(model: SaisaForConditionalGeneration, layers: Collection[int]) -> Iterator[None]:
    """Inside, only these layers see the image."""
    before = [layer.sees_image for layer in model.model.language_model.layers]
    _show(model, layers)
    try:
        yield
    finally:
        _show(model, [index for index, sees in enumerate(before) if sees])


def keep_layers(model: SaisaForConditionalGeneration, layers: Collection[int]) -> None:
    """From now on only these layers see the image; the others have no projectors."""
    _show(model, layers)
    model.config.visual_layers = sorted(layers)
    for index, layer in enumerate(model.model.language_model.layers):
        if index not in layers and hasattr(layer, "visual_projector"):
            del layer.visual_projector


def _show(model: SaisaForConditionalGeneration, layers: Collection[int]) -> None:
    for index, layer in enumerate(model.model.language_model.layers):
        layer.sees_image = layer.self_attn.sees_image = index in layers
