# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a conversion needs: generates a large checkpoint in the layout of the SAISA authors' code, converts it in its own
process, and prints that process's peak memory as reported by the operating system, the time, and whether every tensor equals
the generated one (regenerated from its name, not read from the source).

  python benchmarks/convert_memory.py --gigabytes 6 --folder /somewhere/with/twenty/gigabytes

Peak memory must be below twice the largest weight file of the source plus 1 GB. Sizes are those of Vicuna-7B, with as many
layers as `--gigabytes` requires, and of CLIP ViT-L/14-336. All files are deleted at the end.
"""

import argparse
import json
import os
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np


TEXT = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32}
VISION = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
VISION |= {"image_size": 336, "patch_size": 14, "projection_dim": 768, "model_type": "clip_vision_model"}
STORED = {"float16": "F16", "bfloat16": "BF16"}


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The 16-bit patterns of a tensor, derived from its name: values between -2 and 2 in float16 and in bfloat16."""
    count = int(np.prod(shape))
    raw = np.random.SFC64(zlib.crc32(name.encode())).random_raw(-(-count // 4)).view(np.uint16)[:count]
    return (raw & np.uint16(0xBFFF)).reshape(shape)


def tensors(text: dict, vision: dict) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(the authors' name, this package's name, shape) of every tensor that a conversion carries over."""
    hidden, middle, width = text["hidden_size"], text["intermediate_size"], vision["hidden_size"]
    yield "model.embed_tokens.weight", "model.language_model.embed_tokens.weight", (text["vocab_size"], hidden)
    for i in range(text["num_hidden_layers"]):
        theirs, ours = f"model.layers.{i}.", f"model.language_model.layers.{i}."
        parts = {f"self_attn.{x}_proj.weight": (hidden, hidden) for x in "qkvo"}
        parts |= {"mlp.gate_proj.weight": (middle, hidden), "mlp.up_proj.weight": (middle, hidden)}
        parts |= {"mlp.down_proj.weight": (hidden, middle)}
        parts |= {"input_layernorm.weight": (hidden,), "post_attention_layernorm.weight": (hidden,)}
        for name, shape in parts.items():
            yield theirs + name, ours + name, shape
        for number, (linear, columns) in {0: ("linear_1", width), 2: ("linear_2", hidden)}.items():
            for name, shape in {"weight": (hidden, columns), "bias": (hidden,)}.items():
                yield f"{theirs}mm_projector.{number}.{name}", f"{ours}visual_projector.{linear}.{name}", shape
    yield "model.norm.weight", "model.language_model.norm.weight", (hidden,)
    yield "lm_head.weight", "lm_head.weight", (text["vocab_size"], hidden)
    side, patch, inner = vision["image_size"] // vision["patch_size"], vision["patch_size"], vision["intermediate_size"]
    parts = {"embeddings.class_embedding": (width,), "embeddings.patch_embedding.weight": (width, 3, patch, patch)}
    parts |= {"embeddings.position_embedding.weight": (side * side + 1, width)}
    norms = ["pre_layrnorm", "post_layernorm"]
    for i in range(vision["num_hidden_layers"]):
        layer = f"encoder.layers.{i}."
        for x in ("q_proj", "k_proj", "v_proj", "out_proj"):
            parts |= {f"{layer}self_attn.{x}.weight": (width, width), f"{layer}self_attn.{x}.bias": (width,)}
        parts |= {f"{layer}mlp.fc1.weight": (inner, width), f"{layer}mlp.fc1.bias": (inner,)}
        parts |= {f"{layer}mlp.fc2.weight": (width, inner), f"{layer}mlp.fc2.bias": (width,)}
        norms += [f"{layer}layer_norm1", f"{layer}layer_norm2"]
    parts |= {f"{norm}.{x}": (width,) for norm in norms for x in ("weight", "bias")}
    for name, shape in parts.items():
        yield f"model.vision_tower.vision_tower.vision_model.{name}", f"model.vision_tower.vision_model.{name}", shape


def settings(gigabytes: float) -> tuple[dict, dict]:
    """config.json and the encoder's, for a checkpoint of at least `gigabytes` (10^9 bytes)."""
    text = {"model_type": "llava_llama", "mm_vision_tower": "vision", "image_aspect_ratio": "pad", **TEXT}
    layers = 1
    while size({**text, "num_hidden_layers": layers}) < gigabytes * 1e9:
        layers += 1
    return {**text, "num_hidden_layers": layers}, dict(VISION)


def size(text: dict) -> int:
    return sum(2 * int(np.prod(shape)) for _, _, shape in tensors(text, VISION))


def generate(folder: Path, form: str, dtype: str, text: dict, vision: dict, shard_bytes: float) -> None:
    """Writes the checkpoint with one tensor (safetensors) or one shard (.bin) in memory at a time."""
    (folder / "vision").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(text))
    (folder / "vision" / "config.json").write_text(json.dumps(vision))
    shards, room = [[]], shard_bytes
    for name, _, shape in tensors(text, vision):
        nbytes = 2 * int(np.prod(shape))
        if nbytes > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append((name, shape))
        room -= nbytes
    single = "model.safetensors" if form == "safetensors" else "pytorch_model.bin"
    stem, suffix = single.rsplit(".", 1)
    weight_map = {}
    for n, shard in enumerate(shards, 1):
        file = f"{stem}-{n:05}-of-{len(shards):05}.{suffix}"
        weight_map |= dict.fromkeys([name for name, _ in shard], file)
        (write_safetensors if form == "safetensors" else write_pickle)(folder / file, shard, dtype)
    (folder / f"{single}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def write_safetensors(file: Path, shard: list, dtype: str) -> None:
    header, end = {}, 0
    for name, shape in shard:
        start, end = end, end + 2 * int(np.prod(shape))
        header[name] = {"dtype": STORED[dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for name, shape in shard:
            values(name, shape).tofile(stream)


def write_pickle(file: Path, shard: list, dtype: str) -> None:
    import torch

    torch.save({name: torch.from_numpy(values(name, s)).view(getattr(torch, dtype)) for name, s in shard}, file)


def run_conversion(source: Path, destination: Path, dtype: str | None) -> dict:
    """Converts in this process, which has done nothing else, and returns its time and memory."""
    import resource

    anonymous, done = [0], threading.Event()

    def watch():  # the peak of memory not mapped from files; the kernel keeps the other two peaks itself
        while not done.wait(0.02):
            anonymous[0] = max(anonymous[0], status("RssAnon"))

    threading.Thread(target=watch, daemon=True).start()
    from saisa_hf.checkpoints.convert import convert

    before, start = status("VmHWM"), time.perf_counter()
    convert(source, destination, dtype=dtype, log=lambda line: None, progress=False)
    seconds = time.perf_counter() - start
    done.set()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": seconds, "maxrss": peak, "hwm": status("VmHWM"), "anon": anonymous[0], "imports": before}


def status(key: str) -> int:
    """Bytes of an entry of /proc/self/status; 0 if there is none."""
    path = Path("/proc/self/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)


def compare(destination: Path, text: dict, vision: dict, dtype: str, stored: str) -> dict:
    """How many tensors of the result equal the generated ones, and how many others there are."""
    import torch
    from safetensors import safe_open

    index = destination / "model.safetensors.index.json"
    single = destination / "model.safetensors"
    if index.exists():
        weight_map = json.loads(index.read_text())["weight_map"]
    else:
        with safe_open(single, "pt") as written:
            weight_map = dict.fromkeys(written.keys(), single.name)
    equal = rows = 0
    for theirs, ours, shape in tensors(text, vision):
        with safe_open(destination / weight_map.pop(ours), "pt") as written:
            got = written.get_tensor(ours)
        want = torch.from_numpy(values(theirs, shape)).view(getattr(torch, dtype))
        if len(got) == text["vocab_size"] + 1:  # the image token's row
            mean = sum(part.double().sum(0) for part in want.split(1000)) / len(want)
            rows += int(torch.equal(got[-1], mean.to(want.dtype).to(got.dtype)))
            got = got[:-1]
        want = want.to(getattr(torch, stored))
        equal += int(got.dtype == want.dtype and torch.equal(got, want))
    return {
        "equal": equal,
        "tensors": sum(1 for _ in tensors(text, vision)),
        "new_rows": rows,
        "others": len(weight_map),
    }


def measured(options, form: str, folder: Path) -> dict:
    """One line of the table. Generation, conversion and comparison each run in their own process."""
    source, destination = folder / "source", folder / "converted"
    text, vision = settings(options.gigabytes)
    stored = options.store or options.dtype

    def child(call: str) -> dict:
        program = f"import json, convert_memory as b; from pathlib import Path; print(json.dumps({call}))"
        path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        out = subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, check=True, stdout=subprocess.PIPE
        ).stdout
        return json.loads(out.splitlines()[-1])

    a, b = f"Path({str(source)!r})", f"Path({str(destination)!r})"
    child(f"b.generate({a}, {form!r}, {options.dtype!r}, {text}, {vision}, {options.shard_gigabytes * 1e9})")
    files = [path.stat().st_size for path in source.iterdir() if path.suffix in (".bin", ".safetensors")]
    result = {"form": form, "dtype": options.dtype, "stored": stored, "bytes": sum(files), "largest": max(files)}
    result |= child(f"b.run_conversion({a}, {b}, {options.store!r})")
    return result | child(f"b.compare({b}, {text}, {vision}, {options.dtype!r}, {stored!r})")


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=6.0, help="minimum size of the checkpoint")
    parser.add_argument("--shard-gigabytes", type=float, default=2.0, help="largest weight file of the source")
    parser.add_argument(
        "--form", choices=("bin", "safetensors"), action="append", help="format of the source (default: both)"
    )
    parser.add_argument("--dtype", choices=tuple(STORED), default="float16", help="dtype of the source")
    parser.add_argument(
        "--store", choices=("float16", "bfloat16", "float32"), help="dtype of the result (default: the source's)"
    )
    parser.add_argument("--folder", help="working folder (default: the system's temporary folder)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> list[dict]:
    options = arguments(argv)
    print(
        "| source | largest file | result | peak memory (ru_maxrss) | VmHWM | without files | bound | time | MB/s | equal |"
    )
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|---:|")
    results = []
    for form in options.form or ("safetensors", "bin"):
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="convert-") as folder:
            r = measured(options, form, Path(folder))
        bound = 2 * r["largest"] + 1e9
        print(
            f"| {r['bytes'] / 1e9:.2f} GB, {form}, {r['dtype']} | {r['largest'] / 1e9:.2f} GB | {r['stored']} "
            f"| {r['maxrss'] / 1e9:.2f} GB | {r['hwm'] / 1e9:.2f} GB | {r['anon'] / 1e9:.2f} GB | {bound / 1e9:.2f} GB "
            f"| {r['seconds']:.0f} s | {r['bytes'] / r['seconds'] / 1e6:.0f} "
            f"| {r['equal']} of {r['tensors']} tensors, {r['new_rows']} new rows |",
            flush=True,
        )
        ok = r["equal"] == r["tensors"] and r["new_rows"] == 2 and not r["others"] and r["maxrss"] < bound
        results.append(r | {"bound": bound, "holds": ok})
    return results


if __name__ == "__main__":
    sys.exit(0 if all(result["holds"] for result in main()) else 1)
