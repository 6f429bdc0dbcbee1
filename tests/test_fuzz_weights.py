# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Damaged weight files in great number: each loads, or ends in one error that names the file, and the tensor where one is
known."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest
import torch
from hostile import refused_clearly
from tiny_models import tiny_model

from saisa_hf import SaisaForConditionalGeneration


NORM = "model.language_model.norm.weight"  # 32 float32 values
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The same model in one file, in several, and as PyTorch pickles, single and with an index."""
    folder = tmp_path_factory.mktemp("saved")
    model = tiny_model()
    model.save_pretrained(folder / "one")
    model.save_pretrained(folder / "many", max_shard_size="40KB")
    for name, shards in (("pickle", 1), ("pickles", 3)):
        shutil.copytree(folder / "one", folder / name)
        (folder / name / SINGLE).unlink()
        tensors = list(model.state_dict().items())
        files = {f"pytorch_model-{n}.bin": dict(tensors[n::shards]) for n in range(shards)}
        if shards == 1:
            files = {"pytorch_model.bin": dict(tensors)}
        else:
            index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
            (folder / name / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        for file, held in files.items():
            torch.save({key: value.clone() for key, value in held.items()}, folder / name / file)
    return folder


def change_header(change, file=SINGLE):
    def damage(folder):
        content = (folder / file).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        header = change(header) or header
        encoded = json.dumps(header).encode()
        (folder / file).write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])

    return damage


def change_tensor(**entries):
    return change_header(lambda header: header[NORM].update(entries))


def change_index(change, file=INDEX):
    def damage(folder):
        index = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(change(index) or index))

    return damage


def place(shard, tensor=NORM, file=INDEX):
    return change_index(lambda index: index["weight_map"].__setitem__(tensor, shard), file)


def second_shard(folder):
    return sorted([*folder.glob("model-*.safetensors"), *folder.glob("pytorch_model*.bin")])[-1]


def write(content, file=None):
    return lambda folder: (folder / file if file else second_shard(folder)).write_bytes(content)


def cut(part, file=None):
    def damage(folder):
        path = folder / file if file else second_shard(folder)
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * part) if isinstance(part, float) else part])

    return damage


def replaced(make, file=None):
    def damage(folder):
        path = folder / file if file else second_shard(folder)
        path.unlink()
        make(path)

    return damage


def flip(seed, first, last, file=None):
    """Some bytes of a file, between two places, become others."""

    def damage(folder):
        path, chance = folder / file if file else second_shard(folder), random.Random(seed)
        content = bytearray(path.read_bytes())
        for _ in range(chance.choice((1, 1, 3, 20))):
            content[chance.randrange(first, min(last, len(content)))] = chance.randrange(256)
        path.write_bytes(content)

    return damage


def swap_in_index(seed):
    """Entries of the index are exchanged, or become something else."""

    def damage(folder):
        chance = random.Random(seed)
        index = json.loads((folder / INDEX).read_text())
        names = list(index["weight_map"])
        for _ in range(chance.choice((1, 2, 5))):
            values = (
                *index["weight_map"].values(),
                None,
                5,
                True,
                [],
                {},
                "",
                "x",
                "../y.safetensors",
                "a\0b",
                "é" * 300,
            )
            index["weight_map"][chance.choice([*names, "other.weight"])] = chance.choice(values)
        (folder / INDEX).write_text(json.dumps(index))

    return damage


HTML, POINTER = (
    b"<!doctype html><title>404</title>" * 9,
    b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 9\n",
)
NO_JSON = {"cut": b'{"weight_map": {"a"', "empty": b"", "binary": b"\xff\xfe\x00", "deep": b"[" * 100000, "nan": b"NaN"}
NO_JSON |= {"digits": b'{"weight_map": ' + b"9" * 5000 + b"}", "page": HTML}
NO_MAPS = {"none": None, "number": 5, "list": [1], "text": "model.safetensors", "empty": {}, "nothing": ...}
NO_SHARDS = [
    "model-9.safetensors",
    "../one/model.safetensors",
    "/etc/passwd",
    "",
    ".",
    "..",
    5,
    1.5,
    None,
    True,
    ["a"],
    {"a": 1},
]
NO_SHARDS += ["config.json", "a\0b", "a/b.safetensors", "x" * 5000]
NO_SHAPES = ([16, 2], [33], [], [-32], [0], [2**62], "x", None, [32.5])
NO_PLACES = ([0, 128], [5], [128, 0], [-1, 127], "x", [0, 2**63])
FIRST = "model-00001-of-00006.safetensors"
MAKE = {"folder": Path.mkdir, "dangling link": lambda path: path.symlink_to("/no/where"), "missing": lambda path: None}
MAKE |= {
    "empty": Path.touch,
    "page": lambda path: path.write_bytes(HTML),
    "pointer": lambda path: path.write_bytes(POINTER),
}
MAKE |= {"itself": lambda path: path.symlink_to(path.name), "random": lambda path: path.write_bytes(os.urandom(3000))}

DAMAGE = {
    "one": {
        **{f"cut at {part}": cut(part, SINGLE) for part in (0, 1, 7, 8, 9, 100, 0.3, 0.5, 0.99, -1)},
        "appended": lambda folder: (folder / SINGLE).write_bytes((folder / SINGLE).read_bytes() + b"\0" * 9),
        **{f"shape {shape}": change_tensor(shape=shape) for shape in NO_SHAPES},
        **{f"shape {shape}, fitting": change_tensor(shape=shape) for shape in ([32, 1], [1, 32], [4, 8])},
        **{f"dtype {name}": change_tensor(dtype=name) for name in ("Q7", "", None, 5, "F16", "F64", "float32")},
        "dtype F8": change_tensor(dtype="F8_E4M3", shape=[128]),
        **{f"place {place}": change_tensor(data_offsets=place) for place in NO_PLACES},
        "no shape": change_header(lambda header: header[NORM].pop("shape")),
        "no entry": change_header(lambda header: header.__setitem__(NORM, None)),
        "lacking": change_header(lambda header: header.pop(NORM) and None),
        "renamed": change_header(lambda header: header.__setitem__("model.other", header.pop(NORM))),
        **{f"header {value!r}": change_header(lambda header, value=value: value) for value in ([1], "x", 5, True)},
        "metadata 5": change_header(lambda header: header.update(__metadata__=5)),
        **{f"{name}": replaced(make, SINGLE) for name, make in MAKE.items()},
        **{f"header flipped {seed}": flip(seed, 0, 3000, SINGLE) for seed in range(20)},
        **{f"bytes flipped {seed}": flip(seed, 0, 10**9, SINGLE) for seed in range(10)},
    },
    "many": {
        **{f"index {name}": write(content, INDEX) for name, content in NO_JSON.items()},
        **{f"index {value!r}": change_index(lambda index, value=value: value) for value in ([1], "x", 5, True)},
        **{
            f"weight_map {name}": change_index(
                lambda index, value=value: {"metadata": {}} if value is ... else {"weight_map": value}
            )
            for name, value in NO_MAPS.items()
        },
        **{f"shard {shard!r:.20}": place(shard) for shard in NO_SHARDS},
        "all in one": change_index(lambda index: {"weight_map": dict.fromkeys(index["weight_map"], FIRST)}),
        **{f"cut at {part}": cut(part) for part in (0, 8, 100, 0.5, -1)},
        **{f"{name}": replaced(make) for name, make in MAKE.items()},
        **{f"index {name}": replaced(make, INDEX) for name, make in MAKE.items()},
        **{f"index swapped {seed}": swap_in_index(seed) for seed in range(20)},
    },
    "pickle": {
        **{f"cut at {part}": cut(part) for part in (0, 1, 100, 0.5, -1)},
        **{f"{name}": replaced(make) for name, make in MAKE.items()},
        **{f"bytes flipped {seed}": flip(seed, 0, 4000) for seed in range(10)},
        "a list": replaced(lambda path: torch.save([1, 2], path)),
        "no tensors": replaced(lambda path: torch.save({"model.language_model.norm.weight": 5}, path)),
        "other shapes": replaced(lambda path: torch.save({NORM: torch.zeros(5)}, path)),
    },
    "pickles": {
        **{f"cut at {part}": cut(part) for part in (0, 100, 0.5)},
        **{f"shard {shard!r:.20}": place(shard, file="pytorch_model.bin.index.json") for shard in NO_SHARDS[:8]},
        **{f"{name}": replaced(make) for name, make in MAKE.items()},
    },
}  # fmt: skip
CASES = [(kind, name) for kind, cases in DAMAGE.items() for name in cases]


def loading(saved, tmp_path, cases):
    """(name, call) for each case: the call damages a copy of a saved model and loads it."""
    wanted = SaisaForConditionalGeneration.from_pretrained(saved / "one").state_dict()

    def load(kind, name):
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(saved / kind, folder)
        DAMAGE[kind][name](folder)
        found = SaisaForConditionalGeneration.from_pretrained(folder).state_dict()
        assert {name: x.shape for name, x in found.items()} == {name: x.shape for name, x in wanted.items()}
        if "flipped" not in name:  # nothing but a checksum could tell
            assert all(torch.equal(value, found[name]) for name, value in wanted.items()), "other values"

    for kind, name in cases:
        yield f"{kind}: {name}", lambda kind=kind, name=name: load(kind, name)


def named(case, error):
    """Whether an error about the copy names a weight file, or the tensors that the folder lacks."""
    said = str(error)
    files = (".safetensors", ".bin", ".index.json", "lacks ")
    return "/copy" in said and any(file in said for file in files) and len(said) < 2000


def check(saved, tmp_path, cases):
    return refused_clearly(cases, loading(saved, tmp_path, cases), clear=(ValueError, OSError), names=named)


def test_some_damaged_weights_load_or_end_in_an_error_that_names_the_file(saved, tmp_path):
    assert check(saved, tmp_path, CASES[::8]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_damaged_weights_load_or_end_in_an_error_that_names_the_file(saved, tmp_path, part):
    assert len(CASES) >= 150
    assert check(saved, tmp_path, CASES[part::2]) > 50
