"""What `serving.py` runs inside the workers of vLLM, which import it: a clock around the model, the size of the cache."""

import time

import torch


def add_clock(model) -> None:
    """In a worker: from here on `model.seconds` has the times of passes, from projectors to hidden states."""
    model.seconds = []

    def count(module) -> None:
        started = []
        module.register_forward_pre_hook(lambda *_: started.append(now()))
        module.register_forward_hook(lambda *_: model.seconds.append(now() - started.pop()))

    count(model)
    if hasattr(model, "multi_modal_projector"):  # LLaVA's runs behind its encoder, SAISA's in the pass
        count(model.multi_modal_projector)


def now() -> float:
    """In a worker: seconds, when a GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def read_clock(model) -> float:
    """In a worker: the seconds since the last reading."""
    seconds, model.seconds = sum(model.seconds), []
    return seconds


def cache_bytes(model) -> int:
    """In a worker: bytes of keys and values of all layers."""
    caches = [layer.self_attn.attn.kv_cache for layer in model.language_model.model.layers]
    return sum(cache.numel() * cache.element_size() for cache in caches)
