# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Damaged checkpoints of the authors' layout in great number: each is converted, or ends in one error that names the file.
The destination is whole, and nothing is left beside it."""

import json
import random
import shutil

import pytest
from hostile import refused_clearly
from test_convert import authors_checkpoint, narrow_parts, old_words_tokenizer
from test_fuzz_weights import HTML, MAKE, NO_JSON, NO_MAPS, NO_SHARDS, cut, flip, place, replaced, write

from saisa_hf import SaisaForConditionalGeneration
from saisa_hf.checkpoints.convert import convert


CONFIG, TOWER, PIXELS = "config.json", "vision/config.json", "vision/preprocessor_config.json"
TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
INDEX, BIN_INDEX = "model.safetensors.index.json", "pytorch_model.bin.index.json"
STRANGE = (None, True, -1, 0, 1.5, 10**9, 10**400, "", "x", [], ["a"], {}, {"a": 1}, "\0", float("nan"))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A narrow checkpoint with a tokenizer, in one file, in three, and in three pickles: a quarter of a megabyte each."""
    tensors, vision_config = narrow_parts()
    folder = tmp_path_factory.mktemp("sources")
    for name, form, shards in (("one", "safetensors", 1), ("many", "safetensors", 3), ("pickles", "bin", 3)):
        source = authors_checkpoint(
            folder / name,
            False,
            form,
            shards,
            tensors,
            old_words_tokenizer(),
            mm_hidden_size=32,
            mm_vision_tower="vision",
        )
        for weights in (source / "vision").glob("*model*"):
            weights.unlink()
        (source / "vision" / "config.json").write_text(json.dumps(vision_config))
        (source / GENERATION).write_text(json.dumps({"eos_token_id": 2, "do_sample": True, "temperature": 0.5}))
    return folder


def change(file, **entries):
    """Entries of a JSON file become others; those that are `...` are taken out."""

    def damage(folder):
        content = json.loads((folder / file).read_text()) | entries
        (folder / file).write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return damage


def strange(file, seed):
    """Some entries of a JSON file, anywhere in it, become something strange."""

    def damage(folder):
        chance, content = random.Random(f"{file} {seed}"), json.loads((folder / file).read_text())
        for _ in range(chance.choice((1, 1, 2))):
            part = content
            while True:
                key = chance.choice(list(part) if isinstance(part, dict) else range(len(part)))
                inner = part[key]
                if isinstance(inner, (dict, list)) and inner and len(inner) < 50 and chance.random() < 0.8:
                    part = inner
                    continue
                part[key] = chance.choice(STRANGE)
                break
        (folder / file).write_text(json.dumps(content))

    return damage


KEYS = [
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
]
KEYS += ["mm_vision_tower", "mm_vision_select_layer", "mm_projector_type", "rms_norm_eps", "rope_theta", "rope_scaling"]
KEYS += ["hidden_act", "model_type", "tie_word_embeddings", "pad_token_id", "max_position_embeddings", "torch_dtype"]
DAMAGE = {
    "one": {
        **{f"{key}={value!r:.20}": change(CONFIG, **{key: value}) for key in KEYS for value in STRANGE[1::3]},
        **{f"no {key}": change(CONFIG, **{key: ...}) for key in KEYS},
        **{f"{file} strange {n}": strange(file, n) for file in (CONFIG, TOWER, PIXELS, GENERATION) for n in range(8)},
        **{f"{file} strange {n}": strange(file, n) for file in (TOKENIZER, TOKENIZER_CONFIG) for n in range(8)},
        **{
            f"{file} {name}": write(content, file)
            for file in (CONFIG, TOWER, PIXELS, GENERATION, TOKENIZER, TOKENIZER_CONFIG)
            for name, content in [*NO_JSON.items()][::2]
        },
        **{f"{file} {name}": replaced(MAKE[name], file) for file in (CONFIG, TOWER, PIXELS) for name in ("folder", "itself")},
        **{f"weights {name}": replaced(make, "model.safetensors") for name, make in MAKE.items()},
        **{f"weights flipped {seed}": flip(seed, 0, 3000, "model.safetensors") for seed in range(10)},
        "tower layers": change(TOWER, num_hidden_layers=10**9),
        "tower size": change(TOWER, image_size=240000),
        "a tower that is the source": change(CONFIG, mm_vision_tower="."),
        "a tower far away": change(CONFIG, mm_vision_tower="../../.."),
    },
    "many": {
        **{f"weight_map {name}": change(INDEX, weight_map=value) for name, value in NO_MAPS.items()},
        **{f"shard {shard!r:.20}": place(shard, "model.norm.weight") for shard in NO_SHARDS},
        **{f"index {name}": write(content, INDEX) for name, content in NO_JSON.items()},
        **{f"cut at {part}": cut(part) for part in (0, 8, 100, 0.5, -1)},
        **{name: replaced(make) for name, make in MAKE.items()},
    },
    "pickles": {
        **{f"shard {shard!r:.20}": place(shard, "model.norm.weight", BIN_INDEX) for shard in NO_SHARDS[:8]},
        **{f"cut at {part}": cut(part) for part in (0, 100, 0.5, -1)},
        **{name: replaced(make) for name, make in MAKE.items()},
        **{f"bytes flipped {seed}": flip(seed, 0, 4000) for seed in range(10)},
        "a page": write(HTML),
    },
}  # fmt: skip
CASES = [(kind, name) for kind, cases in DAMAGE.items() for name in cases]


def converting(sources, folder, cases):
    """(name, call) for each case: the call damages a copy of a source and converts it."""

    def run(kind, name):
        for path in folder.iterdir():
            shutil.rmtree(path)
        source = folder / "source"
        shutil.copytree(sources / kind, source)
        DAMAGE[kind][name](source)
        try:
            convert(source, folder / "dst", log=lambda line: None, progress=False)
        except (ValueError, OSError):
            assert [path.name for path in folder.iterdir()] == ["source"], "something is left"
            raise
        SaisaForConditionalGeneration.from_pretrained(folder / "dst")

    for kind, name in cases:
        yield f"{kind}: {name}", lambda kind=kind, name=name: run(kind, name)


def named(case, error):
    """Whether an error names a file of the source."""
    said = str(error)
    files = ("source/", ".safetensors", ".bin", "mm_vision_tower", "tokenizer")
    return any(file in said for file in files) and len(said) < 3000


def check(sources, folder, cases):
    clear = (ValueError, OSError, FileNotFoundError)
    return refused_clearly(cases, converting(sources, folder, cases), clear=clear, names=named, seconds=20)


def test_some_damaged_sources_are_converted_or_end_in_an_error_that_names_the_file(sources, tmp_path):
    assert check(sources, tmp_path, CASES[::12]) > 10


@pytest.mark.slow
@pytest.mark.parametrize("part", range(3))
def test_damaged_sources_are_converted_or_end_in_an_error_that_names_the_file(sources, tmp_path, part):
    assert len(CASES) >= 200
    assert check(sources, tmp_path, CASES[part::3]) > 50
