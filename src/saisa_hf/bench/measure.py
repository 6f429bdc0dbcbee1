# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks share: the machine, times that can be compared, FLOPs, and peak memory."""

import ctypes
import gc
import json
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import quantiles
from typing import TypeVar

import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import saisa_hf

from .names import CLOCKS


T = TypeVar("T")


def machine(device: str) -> dict:
    """What the numbers depend on: processors, threads, other load, versions."""
    cpu = platform.processor()
    if Path("/proc/cpuinfo").exists():
        names = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
        cpu = names[0].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def describe(machine: dict) -> str:
    """`machine` in two lines."""
    processor = machine["gpu"] or f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores"
    load = "" if machine["load"] is None else f", load {machine['load']} at the start"
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "transformers"))
    return f"{processor}{load}\n{versions}"


MALLOC_TRIM_THRESHOLD, MALLOC_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h


def keep_memory() -> None:
    """Makes the C library keep freed memory for the rest of this process. By default it returns large pieces to the system,
    and a call waits until the system has cleared them again, page by page: the longer, the more a model holds.

    Raises:
        OSError: the C library is not glibc, the only one that can be told so.
    """
    if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
        raise OSError("--keep-memory: expected glibc as the C library. Leave the option out.")
    ctypes.CDLL(None).mallopt(MALLOC_TRIM_THRESHOLD, 2**31 - 1)
    ctypes.CDLL(None).mallopt(MALLOC_MMAP_THRESHOLD, 2**30)


def give_back() -> None:
    """Gives back what the C library, told to `keep_memory`, has kept so far."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def interleaved_by_clock(calls: dict[str, Callable], repeats: int, device: str) -> dict[str, dict[str, list[float]]]:
    """For each of `CLOCKS` the seconds of each call. All calls take turns, `repeats` times, so that other load on the machine
    affects them alike. What a call returns is freed outside its time. The first round is a warm-up and is not counted.

    `"processor"` is the time of all threads of this process; it says nothing about a GPU.
    """
    seconds: dict[str, dict[str, list[float]]] = {clock: {name: [] for name in calls} for clock in CLOCKS}
    for _ in progress(range(repeats + 1), "timing"):
        gc.collect()  # rather than during a call
        for name, call in calls.items():
            wait(device)
            start = {clock: now() for clock, now in CLOCKS.items()}
            result = call()
            wait(device)
            for clock, now in CLOCKS.items():
                seconds[clock][name].append(now() - start[clock])
            del result
    return {clock: {name: values[1:] for name, values in each.items()} for clock, each in seconds.items()}


def interleaved(
    calls: dict[str, Callable], repeats: int, device: str, cpu_time: bool = False
) -> dict[str, list[float]]:
    """`interleaved_by_clock` by one clock: wall time, or with `cpu_time` the processor time of this process."""
    return interleaved_by_clock(calls, repeats, device)["processor" if cpu_time else "wall"]


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    low, mid, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return low, mid, high


def flops(call: Callable) -> int:
    """Floating-point operations of the matrix products in `call`, counted while it runs; a multiply-add is two."""
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops()


PEAK_MEMORY = {
    "cuda": "PyTorch's CUDA allocator counts it",
    "cpu": "PyTorch's profiler records each allocation and release",
}


def peak_memory(call: Callable, device: str) -> int:
    """The most bytes that `call` holds at once, beyond what was there before (see `PEAK_MEMORY`)."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports its own start and stop
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak


def cache_bytes(cache) -> int:
    """Bytes of the keys and values that a transformers `Cache` holds."""
    held = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(x.numel() * x.element_size() for x in held if x is not None)


def progress(items: Iterable[T], what: str) -> Iterator[T]:
    """`items`, counted on the last line of a terminal."""
    items = list(items)
    for number, item in enumerate(items, start=1):
        if sys.stderr.isatty():
            print(
                f"\r{what} {number}/{len(items)} ", end="" if number < len(items) else "\n", file=sys.stderr, flush=True
            )
        yield item


def write_json(path: str | Path, result: dict) -> None:
    """Writes `result`, with the version of saisa_hf, to a file that is complete or does not exist."""
    part = Path(f"{path}.part")
    part.write_text(json.dumps({"saisa_hf": saisa_hf.__version__, **result}, indent=1) + "\n")
    part.replace(path)


def wait(device: str) -> None:
    """Until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
