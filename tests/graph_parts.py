"""Shared by the tests of what `torch.compile` makes: compiled decoding steps on a CPU, and how many graphs there are."""

from contextlib import contextmanager

import torch
from transformers import CompileConfig


def compiling(backend):
    """Compiles decoding steps on a CPU too, each as one graph."""
    config = CompileConfig(fullgraph=True, backend=backend, mode="default")
    config._compile_all_devices = True
    return config


@contextmanager
def graphs():
    """A function that says how many graphs were compiled since the beginning; a graph break is an error."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    assert not counters["graph_break"]
    torch._dynamo.reset()
