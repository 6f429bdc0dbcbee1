# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The order of the samples: random, or random batches of similar samples."""

from collections.abc import Callable, Iterator

import torch
from torch.utils.data import Sampler


class GroupedSampler(Sampler[int]):
    """Random batches of samples of similar length, all with images or all without, so that there is little padding.

    Samples are shuffled, separated by whether they have images, and cut into heaps of `heap` batches; each heap is sorted by
    length, and the batches are shuffled. The rests of the two parts come last: only there a batch may be of both kinds. The
    order depends only on `seed` and the epoch.

    Args:
        lengths: for each sample its length and whether it has images; only the order of lengths matters.
        batch_size: samples of a step, over all devices and accumulated batches.
        seed: of the order.
        epoch: returns the number of the pass that begins.
        heap: batches that are sorted together.
    """

    def __init__(
        self,
        lengths: list[tuple[int, bool]],
        batch_size: int,
        seed: int = 0,
        epoch: Callable[[], int] = lambda: 0,
        heap: int = 50,
    ):
        self.lengths, self.batch_size, self.seed, self.epoch, self.heap = lengths, batch_size, seed, epoch, heap

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())

        def shuffled(values: list) -> list:
            return [values[i] for i in torch.randperm(len(values), generator=generator).tolist()]

        size, batches, rest = self.batch_size, [], []
        order = shuffled(list(range(len(self.lengths))))
        for has_images in (True, False):
            part = [index for index in order if self.lengths[index][1] == has_images]
            whole = len(part) // size * size
            rest += part[whole:]
            for start in range(0, whole, size * self.heap):
                heap = sorted(part[start : min(start + size * self.heap, whole)], key=lambda i: self.lengths[i][0])
                batches += [heap[i : i + size] for i in range(0, len(heap), size)]
        batches = shuffled(batches)
        yield from (index for batch in batches for index in batch)
        yield from rest


class ShuffledSampler(Sampler[int]):
    """All of `count` samples in random order, which depends only on `seed` and the epoch."""

    def __init__(self, count: int, seed: int = 0, epoch: Callable[[], int] = lambda: 0):
        self.count, self.seed, self.epoch = count, seed, epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        yield from torch.randperm(self.count, generator=generator).tolist()
