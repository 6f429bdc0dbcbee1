# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What quantization saves and costs: load time, resident memory against the estimate of `saisa fit`, and how far logits and
most likely next tokens are from those of float32, for a random model of 1.1 billion parameters on a CPU.

    python benchmarks/hardware.py --json result.json

Each variant runs in its own process. Prompts have zero, one and two images. Each is followed by the model's greedy
continuation in float32, and the next-token predictions are compared at each of its tokens. Memory is as reported by the
operating system (Linux).
"""

import argparse
import ctypes
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from convert_memory import status
from transformers import BitsAndBytesConfig

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration
from saisa_hf.bench import measure
from saisa_hf.common.tables import fill_blocks, table
from saisa_hf.costs.memory import use_bytes, weight_bytes


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
ALL_BUT_HEAD = {"llm_int8_skip_modules": ["lm_head"]}
VARIANTS = {
    "float32": None,
    "bfloat16": None,
    "8-bit": {"load_in_8bit": True},
    "nf4": NF4,
    "nf4, double quantization": NF4 | {"bnb_4bit_use_double_quant": True},
    "8-bit, encoder and projectors too": {"load_in_8bit": True} | ALL_BUT_HEAD,
    "nf4, encoder and projectors too": NF4 | ALL_BUT_HEAD,
    "nf4, double quantization, encoder and projectors too": NF4 | {"bnb_4bit_use_double_quant": True} | ALL_BUT_HEAD,
}
# their names in `saisa fit`
WAYS = {name: name for name in ("float32", "bfloat16", "8-bit")}
WAYS |= {"nf4": "4-bit (nf4)", "nf4, double quantization": "4-bit (nf4), double quantization"}
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 8}
IMAGE_TOKEN = 32000


def config(layers: int, image_size: int) -> SaisaConfig:
    text = {"model_type": "llama", "vocab_size": 32064, "num_hidden_layers": layers, "eos_token_id": None, **SIZES}
    vision = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 768}
    vision |= {"num_hidden_layers": 24, "num_attention_heads": 16, "image_size": image_size, "patch_size": 14}
    return SaisaConfig(text_config=text, vision_config=vision, image_token_id=IMAGE_TOKEN)


@torch.no_grad()
def write_model(folder: str, layers: int, image_size: int) -> None:
    """A random model whose matrices keep the scale of their input, in bfloat16."""
    torch.manual_seed(0)
    model = SaisaForConditionalGeneration(config(layers, image_size)).to(torch.bfloat16)
    for name, p in model.named_parameters():
        if p.dim() > 1 and "embed" not in name:
            p.normal_(std=p[0].numel() ** -0.5)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)


def prompts(model) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for pictures in (0, 1, 2):
        ids = torch.randint(3, IMAGE_TOKEN, (1, 24), generator=generator)
        image = torch.full((1, model.config.image_seq_length * pictures), IMAGE_TOKEN)
        one = {"input_ids": torch.cat([ids[:, :1], image, ids[:, 1:]], 1)}
        if pictures:
            side = model.config.vision_config.image_size
            one["pixel_values"] = torch.randn(pictures, 3, side, side, generator=generator)
        made.append(one)
    return made


def own_bytes() -> int:
    """Bytes of resident memory of this process not mapped from a file, after returning freed memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("RssAnon")


def bytes_in_files(model) -> int:
    """Bytes of weights that are in a memory-mapped file. The rest of the file, read to be quantized, stays in memory only
    until the system needs the space."""
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
    ranges = [[int(end, 16) for end in line[0].split("-")] for line in lines]
    own = [p for p in model.parameters() if any(start <= p.data_ptr() < end for start, end in ranges)]
    return sum(p.numel() * p.element_size() for p in own)


def most_own_bytes(work: Callable[[], object], interval: float = 0.005) -> int:
    """The largest `own_bytes` while `work` runs, sampled every `interval` seconds."""
    most, done = own_bytes(), threading.Event()

    def look():
        nonlocal most
        while not done.wait(interval):
            most = max(most, status("RssAnon"))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return most


@torch.no_grad()
def measure_variant(name: str, folder: str, exact: Path, tokens: int) -> dict:
    """Time and memory of the variant `name`, and its distance from the results that float32 wrote to the file `exact`."""
    quantization = VARIANTS[name]
    options = {} if quantization is None else {"quantization_config": BitsAndBytesConfig(**quantization)}
    torch.ones(8, 8) @ torch.ones(8, 8)
    before, start = own_bytes(), time.perf_counter()
    dtype = torch.float32 if name == "float32" else torch.bfloat16
    model = SaisaForConditionalGeneration.from_pretrained(folder, dtype=dtype, **options).eval()
    found = {"load_seconds": time.perf_counter() - start}
    if name == "float32":
        answers = [model.generate(**one, max_new_tokens=tokens, do_sample=False) for one in prompts(model)]
    else:
        answers, expected = torch.load(exact)
    errors, agreed, logits = [], [], []
    start = time.perf_counter()
    for number, (one, answer) in enumerate(zip(prompts(model), answers)):
        logits.append(model(**one | {"input_ids": answer[:, :-1]}, logits_to_keep=tokens).logits.float())
        if name != "float32":
            errors.append(float((logits[-1] - expected[number]).norm() / expected[number].norm()))
            agreed.append(float((logits[-1].argmax(-1) == answer[:, -tokens:]).float().mean()))
    found["forward_seconds"] = (time.perf_counter() - start) / len(answers)
    in_files = bytes_in_files(model)
    found["resident_bytes"] = own_bytes() - before + in_files
    if name == "float32":
        torch.save((answers, logits), exact)
    prompt = prompts(model)[-1]
    most = most_own_bytes(lambda: model.generate(**prompt, max_new_tokens=tokens, do_sample=False))
    found["generation_bytes"] = most - before + in_files
    if name in WAYS:
        text = int((prompt["input_ids"] != IMAGE_TOKEN).sum())
        found["told_resident_bytes"] = weight_bytes(model.config, WAYS[name])
        use = use_bytes(model.config, WAYS[name], text, len(prompt["pixel_values"]), tokens)
        found["told_generation_bytes"] = found["told_resident_bytes"] + sum(use.values())
    return found | {"relative_errors": errors, "greedy_agreement": agreed}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", help="write the results here")
    parser.add_argument("--tables", metavar="PATH", help="update the marked table of this Markdown page from --json")
    parser.add_argument("--layers", type=int, default=12, help="decoder layers (default: %(default)s)")
    parser.add_argument("--image-size", type=int, default=224, help="pixels (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=16, help="tokens to compare per prompt (default: %(default)s)")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.variant:
        result = measure_variant(args.variant, args.folder, Path(args.folder, "exact.pt"), args.tokens)
        print(json.dumps(result))
        return
    if args.tables:
        result = json.loads(Path(args.json).read_text(encoding="utf-8"))
        text = f"{measure.describe(result['machine'])}.".replace("\n", "; ")
        fill_blocks(args.tables, {"measured": f"{text}\n\n{show(result['variants'])}"})
        return
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder, args.layers, args.image_size)
        for name in measure.progress(VARIANTS, "variants"):
            command = [sys.executable, __file__, "--variant", name, "--folder", folder, "--tokens", str(args.tokens)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found[name] = json.loads(done.stdout.splitlines()[-1])
            if args.json:
                measure.write_json(
                    args.json, {"machine": measure.machine("cpu"), "sizes": vars(args), "variants": found}
                )
    print(show(found))


def show(variants: dict[str, dict]) -> str:
    """A row for each variant, with the estimates of `saisa fit` in brackets."""

    def gib(one, name):
        told = f" ({one[f'told_{name}'] / 2**30:.2f})" if f"told_{name}" in one else ""
        return f"{one[name] / 2**30:.2f}{told}"

    rows = [
        [
            name,
            f"{one['load_seconds']:.1f}",
            gib(one, "resident_bytes"),
            gib(one, "generation_bytes"),
            f"{max(one['relative_errors'], default=0):.3f}",
            f"{statistics.mean(one['greedy_agreement'] or [1]):.0%}",
        ]
        for name, one in variants.items()
    ]
    header = ["", "load, s", "resident, GiB", "peak in generation, GiB", "logit error", "same greedy tokens"]
    return table(header, rows)


if __name__ == "__main__":
    main()
