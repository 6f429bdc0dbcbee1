# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The roof: how little time a machine's own rates allow for a forward pass, from the shapes that it multiplies and the bytes
that it moves. `rates.py` measures the rates; here is the arithmetic."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod

from ..costs.products import Pairs, Product
from ..costs.traffic import Traffic


BOUNDS = ("weights", "flops", "bytes")  # what a part of the time waits for
KEYS_AT_ONCE = 64  # numbers of keys that a single query sees are measured in such steps

Sizes = tuple[int, int, int]


@dataclass
class Rates:
    """What a machine was seen to do in one dtype.

    Attributes:
        products: FLOPs per second by (rows, inputs, outputs).
        attention: the same by `measured_as` of queries and keys, of visible pairs.
        tensors: bytes per second by the bytes of a tensor that is read or written again and again.
        memory: bytes per second of more than the caches hold.
        peak: the most FLOPs per second of any product.
        cache: bytes of the last cache in front of the memory.
    """

    products: dict[Sizes, float]
    attention: dict[Pairs, float]
    tensors: dict[int, float]
    memory: float
    peak: float
    cache: int


@dataclass
class Work:
    """What one forward pass multiplies and moves.

    Attributes:
        products: how often each (rows, inputs, outputs) is multiplied, each time with weights of its own.
        attention: how often each number of queries and keys.
        tensors: bytes that are read and written of tensors, by the bytes of a tensor.
        itemsize: bytes of a number.
    """

    products: Counter[Sizes]
    attention: Counter[Pairs]
    tensors: Counter[int]
    itemsize: int

    @classmethod
    def of(cls, products: Iterable[Product], traffic: Iterable[Traffic], itemsize: int) -> "Work":
        """The work of these parts."""
        work = cls(Counter(), Counter(), Counter(), itemsize)
        for product in products:
            if product.flops and product.sizes is not None:
                work.products[product.sizes] += 1
            elif product.flops and product.pairs is not None:
                work.attention[product.pairs] += 1
        for one in traffic:
            size = one.rows * one.width * itemsize
            work.tensors[size] += one.times * size
        return work

    @property
    def weight_bytes(self) -> int:
        """Of all weights."""
        return sum(times * inputs * outputs for (_, inputs, outputs), times in self.products.items()) * self.itemsize

    def cached_bytes(self, pairs: Pairs) -> int:
        """Of the keys and values that an attention finds in the cache."""
        return 2 * pairs.samples * pairs.cached * pairs.key_heads * pairs.size * self.itemsize

    def from_memory(self, cache: int) -> float:
        """The least share of weights and of cached keys and values that has to come from memory, as the cache cannot hold it
        from one pass to the next."""
        cached = sum(times * self.cached_bytes(pairs) for pairs, times in self.attention.items())
        return max(0.0, 1 - cache / max(self.weight_bytes + cached, 1))


def measured_as(pairs: Pairs) -> Pairs:
    """The queries and keys that are measured for `pairs`. While a model decodes, keys grow by one per token: some numbers of
    them stand for all."""
    keys = -(-pairs.keys // KEYS_AT_ONCE) * KEYS_AT_ONCE if pairs.queries == 1 else pairs.keys
    return replace(pairs, keys=keys, cached=0)


def bound_of(sizes: Sizes, itemsize: int, rates: Rates, from_memory: float = 1.0) -> str:
    """What a product waits for: its `"weights"`, if they take longer from memory than its `"flops"` at the machine's peak."""
    _, inputs, outputs = sizes
    by_weights = from_memory * inputs * outputs * itemsize / rates.memory
    return "weights" if by_weights > 2 * prod(sizes) / rates.peak else "flops"


def seconds(work: Work, rates: Rates) -> dict[str, float]:
    """The roof of `work` in seconds, split into products bound by their weights, products bound by FLOPs, and bytes that are
    moved beside them."""
    found = dict.fromkeys(BOUNDS, 0.0)
    share = work.from_memory(rates.cache)
    for sizes, times in work.products.items():
        rows, inputs, outputs = sizes
        moved = share * inputs * outputs * work.itemsize
        moved += sum(max(0, rows * width * work.itemsize - rates.cache) for width in (inputs, outputs))
        took = max(2 * prod(sizes) / rates.products[sizes], moved / rates.memory)
        found[bound_of(sizes, work.itemsize, rates, share)] += times * took
    for pairs, times in work.attention.items():
        by_flops = pairs.visible_flops / rates.attention[measured_as(pairs)]
        by_bytes = share * work.cached_bytes(pairs) / rates.memory
        found["flops" if by_flops >= by_bytes else "bytes"] += times * max(by_flops, by_bytes)
    found["bytes"] += sum(moved / rates.tensors[size] for size, moved in work.tensors.items())
    return found


def roof(passes: Iterable[Work], rates: Rates) -> dict[str, float]:
    """`seconds` of several forward passes together, with their sum as `"seconds"`."""
    found = Counter(dict.fromkeys(BOUNDS, 0.0))
    for work in passes:
        found.update(seconds(work, rates))
    return {"seconds": sum(found.values()), **found}
