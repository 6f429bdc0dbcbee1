# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a machine can do at the shapes that occur, measured without a model: matrix products, attention, and moves of bytes.

Each is the best of short runs, which take turns so that other load does not hit all runs of one. Inputs and outputs are the
same tensors in every run, as hot as a model's can be. Weights are as cold as the model's: a run goes through as many copies
as the model has weights, up to several times the cache.
"""

import math
import os
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path

import torch
from torch.nn.functional import scaled_dot_product_attention

from ..costs.products import Pairs
from .measure import wait
from .roof import Rates, Sizes, Work, bound_of, measured_as


CACHES = 4  # weights go through so many times the cache
ROUNDS = 5
RUN_SECONDS = 0.02  # of a run, at least
MOST_CALLS = 1000  # in a run
LARGEST_SCORES = 2**30  # bytes; beyond these, plain products are not tried for attention
UNKNOWN_CACHE = 64 * 2**20
LARGE = {"cuda": 8192}  # rows, inputs and outputs of a product that runs at the peak
LARGE_ON_CPU = 1024
ALIGNED = 4096  # bytes, where a copy of a weight begins
CPUS = Path("/sys/devices/system/cpu")


def cache_size(device: str) -> int:
    """Bytes of the last caches in front of the memory, of all cores that this process may use; on a GPU the L2 cache."""
    if torch.device(device).type == "cuda":
        return getattr(torch.cuda.get_device_properties(device), "L2_cache_size", UNKNOWN_CACHE)
    found: dict[tuple[int, str], int] = {}
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    for folder in (folder for core in cores for folder in CPUS.glob(f"cpu{core}/cache/index*")):
        try:
            level, shared, size = ((folder / name).read_text().strip() for name in ("level", "shared_cpu_list", "size"))
            found[int(level), shared] = int(size.rstrip("KM")) * {"K": 2**10, "M": 2**20}[size[-1]]
        except (OSError, ValueError, KeyError):
            continue
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last) or UNKNOWN_CACHE


class Meter:
    """Measures `Rates` for the forward passes `passes`, each time that `measure` is called; `rates` are the best so far.

    Args:
        clock: returns seconds.
    """

    def __init__(self, passes: Iterable[Work], device: str, dtype: torch.dtype, clock: Callable[[], float]):
        self.passes, self.device, self.dtype, self.clock = list(passes), device, dtype, clock
        self.itemsize, self.cache = dtype.itemsize, cache_size(device)
        large = LARGE.get(torch.device(device).type, LARGE_ON_CPU)
        self.reference: Sizes = (large, large, large)
        self.products = sorted({self.reference, *(sizes for work in self.passes for sizes in work.products)})
        self.attention = list(dict.fromkeys(measured_as(pairs) for work in self.passes for pairs in work.attention))
        self.tensors = sorted({size for work in self.passes for size in work.tensors})
        # what the model with the least weights goes through before it needs one of them again
        self.streamed = min(CACHES * self.cache, *(work.weight_bytes for work in self.passes))
        self.best: dict[tuple, float] = {}

    def measure(self, rounds: int = ROUNDS) -> None:
        """Runs everything `rounds` times, after a call to warm up."""
        with torch.inference_mode():
            calls = self._calls()
            numbers = {}
            for key, call in calls.items():
                call()
                numbers[key] = min(math.ceil(RUN_SECONDS / self._timed(call, 1)), MOST_CALLS)
            for _ in range(rounds):
                for key, call in calls.items():
                    took = self._timed(call, numbers[key])
                    self.best[key] = min(took, self.best.get(key, math.inf))

    @property
    def rates(self) -> Rates:
        """The best that was seen."""
        best = self.best
        products = {sizes: 2 * math.prod(sizes) / best["product", sizes] for sizes in self.products}
        attention = {}
        for pairs in self.attention:
            kinds = {"plain": pairs.flops, "fused": pairs.visible_flops if _is_square(pairs) else pairs.flops}
            found = [flops / best[kind, pairs] for kind, flops in kinds.items() if (kind, pairs) in best]
            attention[pairs] = max(found)
        moved = {
            size: max(2 * size / best["copy", size], size / best["read", size])
            for size in (*self.tensors, self._beyond_cache)
        }
        # products that stream their weights may be the best readers
        cold = max(0.0, 1 - self.cache / self.streamed) if self.streamed else 0.0
        read = [cold * i * o * self.itemsize / best["product", (r, i, o)] for r, i, o in self.products]
        memory = max(moved.pop(self._beyond_cache), *read)
        return Rates(products, attention, moved, memory, max(products.values()), self.cache)

    def described(self) -> dict:
        """`rates` for a JSON file."""
        rates, share = self.rates, min(work.from_memory(self.cache) for work in self.passes)
        return {
            "cache_bytes": self.cache,
            "memory_bytes_per_second": rates.memory,
            "peak_flops_per_second": rates.peak,
            "products": [
                {"sizes": list(sizes), "flops_per_second": rate, "bound": bound_of(sizes, self.itemsize, rates, share)}
                for sizes, rate in rates.products.items()
            ],
            "attention": [vars(pairs) | {"flops_per_second": rate} for pairs, rate in rates.attention.items()],
            "tensors": [{"bytes": size, "bytes_per_second": rate} for size, rate in rates.tensors.items()],
        }

    @property
    def _beyond_cache(self) -> int:
        return CACHES * self.cache

    def _timed(self, call: Callable, number: int) -> float:
        wait(self.device)
        start = self.clock()
        for _ in range(number):
            call()
        wait(self.device)
        return max(self.clock() - start, 1e-9) / number

    def _calls(self) -> dict[tuple, Callable]:
        """What is measured, by kind and shape."""
        largest = max([r * max(i, o) for r, i, o in self.products])
        largest = max([largest, *(self._numbers(pairs) for pairs in self.attention)])
        largest = max([largest, *(size // self.itemsize for size in self.tensors)])
        weights = self._filled(max(self.streamed // self.itemsize, *(i * o for _, i, o in self.products)) + ALIGNED)
        inputs, outputs = self._filled(largest), self._filled(largest)
        calls: dict[tuple, Callable] = {}
        for sizes in self.products:
            calls["product", sizes] = self._product(sizes, weights, inputs, outputs)
        for pairs in self.attention:
            calls |= self._attention(pairs, inputs, outputs)
        for size in self.tensors:
            calls |= _moves(size, inputs, outputs, self.itemsize)
        source, target = self._filled(2 * self._beyond_cache // self.itemsize).chunk(2)
        return calls | _moves(self._beyond_cache, source, target, self.itemsize)

    def _filled(self, numbers: int) -> torch.Tensor:
        """So many random numbers; none is so small that a core would slow down."""
        some = torch.rand(min(numbers, 2**20), device=self.device, dtype=self.dtype) + 0.5
        return some.repeat(-(-numbers // len(some)))[:numbers]

    def _numbers(self, pairs: Pairs) -> int:
        """Queries, keys and values as an attention function takes them, one after the other."""
        return pairs.samples * pairs.heads * pairs.size * (pairs.queries + 2 * pairs.keys)

    def _product(self, sizes: Sizes, weights, inputs, outputs) -> Callable:
        rows, width, out_width = sizes
        step = -(-width * out_width * self.itemsize // ALIGNED) * ALIGNED // self.itemsize
        places = max(1, self.streamed // self.itemsize // step)
        copies = [weights[at * step :][: width * out_width].view(out_width, width).T for at in range(places)]
        x, out = inputs[: rows * width].view(rows, width), outputs[: rows * out_width].view(rows, out_width)
        turn = cycle(copies)
        return lambda: torch.mm(x, next(turn), out=out)

    def _attention(self, pairs: Pairs, inputs, outputs) -> dict[tuple, Callable]:
        """Attention as two products without anything between them, and fused."""
        b, h, k, d = pairs.samples, pairs.heads, pairs.key_heads, pairs.size
        shapes = [(b, h, pairs.queries, d), (b, h, pairs.keys, d), (b, h, pairs.keys, d)]
        parts = inputs[: self._numbers(pairs)].split([math.prod(shape) for shape in shapes])
        query, key, value = (part.view(shape) for part, shape in zip(parts, shapes))
        causal = _is_square(pairs)
        calls: dict[tuple, Callable] = {
            ("fused", pairs): lambda: scaled_dot_product_attention(query, key, value, is_causal=causal)
        }
        scores = b * h * pairs.queries * pairs.keys
        if scores * self.itemsize <= LARGEST_SCORES:
            grouped = query.reshape(b * k, -1, d)
            keys, values = (x[:, :k].reshape(b * k, -1, d) for x in (key, value))
            probabilities = query.new_empty(b * k, grouped.shape[1], pairs.keys)
            out = outputs[: grouped.numel()].view_as(grouped)

            def plain():
                torch.bmm(grouped, keys.mT, out=probabilities)
                torch.bmm(probabilities, values, out=out)

            calls["plain", pairs] = plain
        return calls


def _is_square(pairs: Pairs) -> bool:
    """Whether fused attention is told that it is causal, and may leave out what is hidden."""
    return pairs.causal and 1 < pairs.queries == pairs.keys


def _moves(size: int, source, target, itemsize: int) -> dict[tuple, Callable]:
    """A copy and a read of a tensor of so many bytes."""
    source, target = source[: size // itemsize], target[: size // itemsize]
    return {("copy", size): lambda: target.copy_(source), ("read", size): lambda: source.sum()}
