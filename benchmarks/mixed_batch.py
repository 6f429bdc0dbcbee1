# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a batch of rows with and without images costs: rows through the feed-forward networks, FLOPs and time.

Half of the rows have an image of 576 visual tokens and 64 text tokens, the others 64 text tokens alone. The same batch with
an image in every row is measured in alternation. `--other FOLDER` also measures another checkout of this package, in its own
process and in alternation with this one. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPVisionConfig, LlamaConfig

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration


HERE = Path(__file__).resolve()
TEXT, VISUAL, IMAGE = 64, 576, 999


def make_model() -> SaisaForConditionalGeneration:
    torch.manual_seed(0)
    text = LlamaConfig(
        vocab_size=1000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8
    )
    vision = CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=336, patch_size=14
    )
    config = SaisaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE, projector_hidden_size=128)
    return SaisaForConditionalGeneration(config).eval()


def batch(images: list[bool], side: str) -> dict[str, torch.Tensor]:
    """Rows of 64 text tokens, with an image before their second half where `images` is true."""
    generator, rows = torch.Generator().manual_seed(0), []
    for has_image in images:
        ids = torch.randint(0, IMAGE, (TEXT,), generator=generator)
        rows.append(torch.cat([ids[:32], torch.full((VISUAL * has_image,), IMAGE), ids[32:]]))
    length = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length, dtype=torch.long)
    for row, own_ids, own_mask in zip(rows, ids, mask):
        place = slice(length - len(row), None) if side == "left" else slice(len(row))
        own_ids[place], own_mask[place] = row, 1
    pixel_values = torch.randn(sum(images), 3, 336, 336, generator=generator)
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixel_values}


def measured(rounds: int) -> dict[str, dict[str, float]]:
    model, found = make_model(), {}
    batches = {
        "images in all 4 rows": batch([True] * 4, "left"),
        "images in 2 of 4 rows, left padding": batch([True, False] * 2, "left"),
        "images in 2 of 4 rows, right padding": batch([True, False] * 2, "right"),
    }
    with torch.no_grad():
        for name, inputs in batches.items():
            states = model.get_visual_states(inputs.pop("pixel_values"), "features")  # the encoder is not the subject
            inputs["visual_states"], rows = states, []
            handle = model.language_model.layers[0].mlp.register_forward_hook(
                lambda _module, args, _output, rows=rows: rows.append(args[0].shape[:-1].numel())
            )
            with FlopCounterMode(display=False) as counter:
                model(**inputs, use_cache=False)
            handle.remove()
            found[name] = {"rows": rows[0], "gflops": counter.get_total_flops() / 1e9, "times": []}
        for _ in range(rounds):
            for name, inputs in batches.items():
                start = time.perf_counter()
                model(**inputs, use_cache=False)
                found[name]["times"].append(time.perf_counter() - start)
    return {name: {**one, "ms": 1000 * statistics.median(one.pop("times"))} for name, one in found.items()}


def of_checkout(folder: Path, rounds: int) -> dict:
    command = [sys.executable, str(HERE), "--json", "--rounds", str(rounds)]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="timed passes of each batch (default: 9)")
    parser.add_argument(
        "--other", type=Path, help="another checkout of this repository, measured in alternation with this one"
    )
    parser.add_argument("--json", action="store_true", help="print this checkout's figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.json:
        print(json.dumps(measured(arguments.rounds)))
        return
    checkouts = {"this": HERE.parents[1]} | ({"other": arguments.other.resolve()} if arguments.other else {})
    found = {name: [] for name in checkouts}
    for _ in range(3):
        for name, folder in checkouts.items():
            found[name].append(of_checkout(folder, arguments.rounds))
    print("| checkout | batch | feed-forward rows | GFLOPs | ms |\n|---|---|---:|---:|---:|")
    for name, runs in found.items():
        for kind, one in runs[0].items():
            ms = statistics.median(run[kind]["ms"] for run in runs)
            print(f"| {name} | {kind} | {one['rows']:.0f} | {one['gflops']:.2f} | {ms:.0f} |")


if __name__ == "__main__":
    main()
