# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""How well a SAISA agrees with its LLaVA, along the LLaVA's own answers."""

import json
from collections.abc import Iterator
from typing import Protocol

import torch

from .reporting import show_progress
from .work_folder import Workbench, write_json


ROWS_AT_ONCE = 16


class Asked(Protocol):
    """Whose answers and logits are compared with: see `Teacher`."""

    def answers(self, input_ids: torch.Tensor, features: torch.Tensor, tokens: int) -> list[list[int]]: ...

    def logits(self, input_ids: torch.Tensor, features: torch.Tensor, keep: int) -> torch.Tensor: ...


def answered(bench: Workbench, teacher: Asked, pictures: range, name: str) -> list[dict]:
    """For each image of `pictures` one of the prompts, in turn, and the LLaVA's greedy answer to it:
    `{"picture", "prompt", "answer": ids}`. Kept in the work folder as `name`."""
    path = bench.folder / name
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    done = {row["picture"] for row in rows}
    for prompt in range(len(bench.prompts)):
        asked = [image for image in pictures[prompt :: len(bench.prompts)] if image not in done]
        asking = [{"prompt": prompt, "picture": image} for image in asked]
        for questions in batches_of_one_prompt(asking, bench, ROWS_AT_ONCE):
            batch = [row["picture"] for row in questions]
            inputs = torch.tensor([bench.ids(prompt, image) for image in batch], device=bench.device)
            answers = teacher.answers(inputs, bench.rows(bench.seen, batch), bench.fit.answer_tokens)
            rows += [{"picture": image, "prompt": prompt, "answer": answer} for image, answer in zip(batch, answers)]
            write_json(path, rows)
            last = len(rows) == len(pictures)
            show_progress(bench.log, f"answered {len(rows)} of {len(pictures)} prompts", last)
    wanted = set(pictures)
    return [row for row in rows if row["picture"] in wanted]


@torch.no_grad()
def agreement(bench: Workbench, teacher: Asked, rows: list[dict]) -> dict:
    """How well the model's next-token distributions agree with the LLaVA's along the answers in `rows` (see `answered`).

    Returns:
        `kl`, the mean of KL(LLaVA || SAISA) in nats; `top1`, the share of tokens for which both have the same most likely
        one; and `tokens`, their number.
    """
    divergences, same = [], []
    for batch in batches_of_one_prompt(rows, bench, ROWS_AT_ONCE):
        ours, theirs = both_logits(bench, teacher, batch)
        divergences.append(divergence(ours, theirs).cpu())
        same.append((ours.argmax(-1) == theirs.argmax(-1)).cpu())
    kl, top1 = torch.cat(divergences).mean(), torch.cat(same).float().mean()
    return {"kl": float(kl), "top1": float(top1), "tokens": sum(map(len, same))}


def divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """KL(theirs || ours) of next-token distributions, from logits (R, X) -> (R,), in nats."""
    ours, theirs = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1)


def both_logits(bench: Workbench, teacher: Asked, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (R, X) of SAISA and LLaVA for the tokens of the LLaVA's own answers, `rows` being a batch of one prompt."""
    ids, keep, counts = teacher_forced(bench, rows)
    images = [row["picture"] for row in rows]
    theirs = teacher.logits(ids, bench.rows(bench.seen, images), keep)[:, :-1][counts]
    ours = bench.model(input_ids=ids, **bench.images(images), logits_to_keep=keep, use_cache=False)
    return ours.logits[:, :-1][counts], theirs


def teacher_forced(bench: Workbench, rows: list[dict]) -> tuple[torch.Tensor, int, torch.Tensor]:
    """`rows` of one prompt as a batch: ids (n, S), how many positions to keep, and bool (n, keep - 1), whether the next token
    belongs to an answer."""
    longest = max(len(row["answer"]) for row in rows)
    prompts = [bench.ids(row["prompt"], row["picture"]) for row in rows]
    ids = [ids + row["answer"] + [ids[0]] * (longest - len(row["answer"])) for ids, row in zip(prompts, rows)]
    counts = torch.tensor([[place < len(row["answer"]) for place in range(longest)] for row in rows])
    return torch.tensor(ids, device=bench.device), longest + 1, counts.to(bench.device)


def batches_of_one_prompt(rows: list[dict], bench: Workbench, size: int) -> Iterator[list[dict]]:
    """`rows` in batches of at most `size`, each of which has one prompt and images of one number of visual tokens."""
    kinds = [(row["prompt"], bench.lengths[row["picture"]]) for row in rows]
    for kind in sorted(set(kinds)):
        same = [row for row, own in zip(rows, kinds) if own == kind]
        for first in range(0, len(same), size):
            yield same[first : first + size]
