# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The order of the samples: at random, but with batches whose samples are alike."""

from collections.abc import Callable

import torch
from torch.utils.data import Sampler


class GroupedSampler(Sampler[int]):
    """Random batches of samples that are alike in length and in having pictures or none, so that little is padding.

    Samples are shuffled, parted by whether they have pictures, and cut into heaps of `heap` batches; each heap is sorted by
    length, and the batches are shuffled. What is left of the two parts makes the last batch, and the one batch before it
    that may be of both kinds. The order depends on `seed` and on the epoch alone.

    Args:
        lengths: for each sample its length and whether it has pictures; only their order matters.
        batch_size: samples of a step, over all devices and accumulated batches.
        seed: of the order.
        epoch: returns the number of the pass over the data that begins.
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

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())

        def shuffled(values: list) -> list:
            return [values[i] for i in torch.randperm(len(values), generator=generator).tolist()]

        size, batches, rest = self.batch_size, [], []
        order = shuffled(list(range(len(self.lengths))))
        for has_pictures in (True, False):
            part = [index for index in order if self.lengths[index][1] == has_pictures]
            whole = len(part) // size * size
            rest += part[whole:]
            for start in range(0, whole, size * self.heap):
                heap = sorted(part[start : min(start + size * self.heap, whole)], key=lambda i: self.lengths[i][0])
                batches += [heap[i : i + size] for i in range(0, len(heap), size)]
        batches = shuffled(batches)
        yield from (index for batch in batches for index in batch)
        yield from rest


class ShuffledSampler(Sampler[int]):
    """All of `count` samples at random; the order depends on `seed` and on the epoch alone."""

    def __init__(self, count: int, seed: int = 0, epoch: Callable[[], int] = lambda: 0):
        self.count, self.seed, self.epoch = count, seed, epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch())
        yield from torch.randperm(self.count, generator=generator).tolist()
