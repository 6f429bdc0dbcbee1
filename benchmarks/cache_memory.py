# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Bytes of the cache, and time of a decoding step, where 32, 8 or 2 of 32 decoder layers see the image:

    python benchmarks/cache_memory.py --json benchmarks/cache_memory.json

Each model has random weights and is narrow, so that 16,384 visual tokens fit. "text alone" is a cache that the model makes:
layers that do not see the image hold text alone. "marked" is a `DynamicCache` that the user makes: it has places for visual
tokens in all layers. Both give the same logits, which is checked. Times are those of one thread on its processor.
"""

import argparse
import gc
import json
import platform
import statistics
import time
from pathlib import Path

import torch
import transformers
from transformers import DynamicCache

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration
from saisa_hf.bench.measure import cache_bytes as cache_bytes_of
from saisa_hf.common.tables import fill_blocks, table
from saisa_hf.compat_saisa import CACHE
from saisa_hf.costs.flops import Step, cache_bytes
from saisa_hf.visual_states_saisa import SaisaVisualStates


LAYERS, TEXT, IMAGE_TOKEN = 32, 64, 999
WAYS = ("text alone", "marked")
VISUAL_TOKENS = (576, 2880, 16384)
SEEING = {32: None, 8: [0, 1, 7, 8, 9, 10, 11, 14], 2: [0, 14]}  # eight: those of ViCA's 7B


def model_of(visual_layers, width: int, side: int) -> SaisaForConditionalGeneration:
    """Over images of `side` x `side` visual tokens."""
    torch.manual_seed(0)
    heads = width // 32
    config = SaisaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 4 * side, "patch_size": 4, "hidden_size": 32,
                       "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1},
        text_config={"model_type": "llama", "vocab_size": 1000, "hidden_size": width, "intermediate_size": 2 * width,
                     "num_hidden_layers": LAYERS, "num_attention_heads": heads, "num_key_value_heads": heads,
                     "max_position_embeddings": 32768},
        image_token_id=IMAGE_TOKEN, image_seq_length=side * side, vision_feature_layer=-1,
        projector_sharing="shared", projector_hidden_size=32, visual_layers=visual_layers,
    )  # fmt: skip
    return SaisaForConditionalGeneration(config).eval()


def nbytes(cache) -> int:
    """Of what the tensors of the cache keep in memory, places of text among them."""
    places = {id(x): x for layer in cache.layers if (x := getattr(layer, "place_BL", None)) is not None}
    return cache_bytes_of(cache) + sum(x.nbytes for x in places.values())


@torch.no_grad()
def measured(model, states: SaisaVisualStates, cache, steps: int) -> tuple[dict, torch.Tensor]:
    """Bytes of the cache behind the prompt, the median time of a decoding step (of the processor, and of the clock), and the
    logits of all steps."""
    visual = sum(states.lengths)
    ids = torch.tensor([[1] * (TEXT // 2) + [IMAGE_TOKEN] * visual + [2] * (TEXT - TEXT // 2)])
    output = model(
        ids, visual_states=states, use_cache=True, logits_to_keep=1, **({} if cache is None else {CACHE: cache})
    )
    cache, logits, times, clock = output[CACHE], [], [], []
    found = {"cache_bytes": nbytes(cache)}
    for step in range(steps):
        start, started = time.process_time(), time.perf_counter()
        output = model(torch.tensor([[3 + step]]), **{CACHE: cache})
        times.append(time.process_time() - start)
        clock.append(time.perf_counter() - started)
        logits.append(output.logits)
    found |= {"step_ms": 1e3 * statistics.median(times), "step_clock_ms": 1e3 * statistics.median(clock)}
    return found, torch.cat(logits)


def show(rows: list[dict]) -> str:
    """One line for each number of visual tokens and of layers that see them."""
    header = ["visual tokens", "layers that see them", "cache, MiB", "marked, MiB", "decoding step, ms", "marked, ms"]
    lines = [
        [
            f"{row['visual_tokens']:,}",
            f"{row['seeing_layers']} of {row['layers']}",
            *(f"{row[name]['cache_bytes'] / 2**20:,.1f}" for name in WAYS),
            *(f"{row[name]['step_ms']:.1f}" for name in WAYS),
        ]
        for row in rows
    ]
    return table(header, lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=128, help="hidden size (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=41, help="decoding steps, each timed (default: %(default)s)")
    parser.add_argument("--visual", type=int, nargs="+", default=list(VISUAL_TOKENS), help="visual tokens")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--tables", metavar="PATH", help="update the marked table of this Markdown page from --json")
    arguments = parser.parse_args(argv)
    if arguments.tables:
        fill_blocks(arguments.tables, {"cache_memory": show(json.loads(arguments.json.read_text())["rows"])})
        return
    torch.set_num_threads(1)
    rows = []
    for visual in arguments.visual:
        for seeing, layers in SEEING.items():
            rows.append(compared(visual, seeing, layers, arguments.width, arguments.steps))
            print(json.dumps(rows[-1]), flush=True)
    settings = {"width": arguments.width, "steps": arguments.steps, "threads": 1, "dtype": "float32"}
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"settings": settings, "versions": versions, "rows": rows}, indent=1) + "\n"
        )
    print(show(rows))


def compared(visual: int, seeing: int, layers: list[int] | None, width: int, steps: int) -> dict:
    """A row of the results: both caches, and the formula of `saisa flops`."""
    model = model_of(layers, width, 8)
    states = model.get_visual_states(torch.randn(1, 3, 32, 32))[[0] * -(-visual // 64)]  # images of 64 tokens each
    row, logits = {"visual_tokens": visual, "seeing_layers": seeing, "layers": LAYERS, "text_tokens": TEXT}, {}
    for name in WAYS:
        row[name], logits[name] = measured(model, states, None if name == "text alone" else DynamicCache(), steps)
        gc.collect()
    row["largest_difference"] = (logits["text alone"] - logits["marked"]).abs().max().item()
    assert row["largest_difference"] < 1e-5, row
    return row | {"formula_bytes": cache_bytes(model.config, "saisa", Step(TEXT, visual), 4)}


if __name__ == "__main__":
    main()
