# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a video costs: FLOPs, processor time and memory of a prompt with 16 to 128 frames, of SAISA and of transformers'
LLaVA-OneVision with the same language model and encoder. Both pool a frame's tokens 2 x 2. All weights are random. Calls take
turns, so that ratios are fair on a machine that others use; exponents are slopes of a straight line through the logarithms.

    python benchmarks/video.py --json benchmarks/video.json --tables docs/video.md
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration
from saisa_hf.bench import measure
from saisa_hf.common.tables import fill_blocks, table


PATCH, TEXT = 8, 64  # pixels; tokens of text behind the video
QUANTITIES = {"flops": ("GFLOPs", 1e9, 1), "seconds": ("processor seconds", 1, 2), "memory": ("MiB", 2**20, 0)}


def models(args: argparse.Namespace) -> tuple[SaisaForConditionalGeneration, LlavaOnevisionForConditionalGeneration]:
    """SAISA and LLaVA-OneVision of the same sizes, with random weights."""
    side = args.grid * PATCH
    vision = {"hidden_size": 96, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 3}
    text = {"vocab_size": 2000, "hidden_size": args.width, "intermediate_size": 11 * args.width // 4}
    text |= {"num_hidden_layers": args.layers, "num_attention_heads": args.width // 32}
    text |= {"num_key_value_heads": args.width // 32, "max_position_embeddings": 2**15}
    parts = {
        "vision_config": SiglipVisionConfig(**vision, image_size=side, patch_size=PATCH),
        "text_config": Qwen2Config(**text),
    }
    tokens = {"image_token_index": 1999, "video_token_index": 1998}
    onevision = LlavaOnevisionConfig(**parts, **tokens, vision_aspect_ratio="anyres_max_9")
    saisa = SaisaConfig(**parts, image_token_id=1999, vision_feature_layer=-1, vision_feature_select_strategy="full")
    return SaisaForConditionalGeneration(saisa).eval(), LlavaOnevisionForConditionalGeneration(onevision).eval()


def calls_of(args: argparse.Namespace, frames: int, saisa, llava) -> dict[str, Callable]:
    """The forward passes that are compared."""
    side = args.grid * PATCH
    pooled = (-(-args.grid // 2)) ** 2
    pixels, words = torch.randn(frames, 3, side, side), torch.arange(TEXT)

    def prompt(token: int, count: int) -> torch.Tensor:
        return torch.cat([torch.full((count,), token), words])[None]

    of_saisa = {"pixel_values": pixels, "frame_pooling": torch.full((frames,), 2)}
    ids = {"saisa": prompt(1999, frames * pooled), "llava": prompt(1998, frames * pooled + 1)}  # with a newline
    return {
        "saisa": lambda: saisa(ids["saisa"], **of_saisa, logits_to_keep=1),
        "llava": lambda: llava(ids["llava"], pixel_values_videos=pixels[None], logits_to_keep=1),
        "encoder": lambda: saisa.get_image_features(**of_saisa),
    }


@torch.no_grad()
def costs(args: argparse.Namespace) -> dict:
    """{frames: {"flops", "seconds", "memory": {"saisa", "llava", "encoder"}}}."""
    saisa, llava = models(args)
    found: dict = {}
    for frames in args.frames:
        calls = calls_of(args, frames, saisa, llava)
        times = measure.interleaved(calls, args.repeats, "cpu", cpu_time=True)
        found[str(frames)] = {
            "flops": counted(calls, saisa, llava),
            "seconds": {name: measure.quartiles(values)[1] for name, values in times.items()},
            "memory": {name: measure.peak_memory(call, "cpu") for name, call in calls.items()},
        }
    return found


def counted(calls: dict[str, Callable], *models) -> dict[str, int]:
    """FLOPs of each call. The counter sees no fused attention: that is written out for it."""
    for model in models:
        model.set_attn_implementation("eager")
    flops = {name: measure.flops(call) for name, call in calls.items()}
    for model in models:
        model.set_attn_implementation("sdpa")
    return flops


def beyond_encoder(cell: dict, quantity: str, kind: str) -> float:
    """What `kind` takes of a `quantity` without the encoder, which is the same in both; memory is that of all."""
    return cell[quantity][kind] - (0 if quantity == "memory" else cell[quantity]["encoder"])


def exponents(cells: dict) -> dict[str, dict[str, float]]:
    """How each quantity grows with the number of frames: the slope of its logarithm."""
    frames = np.log([int(count) for count in cells])
    return {
        quantity: {
            kind: float(np.polyfit(frames, np.log([beyond_encoder(c, quantity, kind) for c in cells.values()]), 1)[0])
            for kind in ("saisa", "llava")
        }
        for quantity in QUANTITIES
    }


def costs_table(result: dict) -> str:
    """One row for each number of frames and quantity, and the exponents."""
    rows = []
    for quantity, (label, unit, digits) in QUANTITIES.items():
        for frames, cell in result["cells"].items():
            saisa, llava = (beyond_encoder(cell, quantity, kind) for kind in ("saisa", "llava"))
            numbers = [f"{value / unit:,.{digits}f}" for value in (saisa, llava)]
            rows.append([label, frames, *numbers, f"{saisa / llava:.2f}"])
        slopes = result["exponents"][quantity]
        rows.append([f"{label}: exponent", "", f"{slopes['saisa']:.2f}", f"{slopes['llava']:.2f}", ""])
    return table(["", "frames", "SAISA", "LLaVA-OneVision", "ratio"], rows)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--grid", type=int, default=14, help="patches on a side of a frame")
    parser.add_argument("--width", type=int, default=256, help="of the language model")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the numbers go")
    parser.add_argument("--tables", type=Path, help="a page whose table is filled in")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    sizes = {name: value for name, value in vars(args).items() if name not in ("json", "tables")}
    result = {"machine": measure.machine("cpu"), "settings": sizes, "cells": costs(args)}
    result["exponents"] = exponents(result["cells"])
    if args.json:
        measure.write_json(args.json, result)
    print(measure.describe(result["machine"]), costs_table(result), sep="\n\n")
    if args.tables:
        fill_blocks(args.tables, {"video-costs": costs_table(result)})


if __name__ == "__main__":
    main()
