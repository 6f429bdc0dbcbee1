# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks run at tiny sizes and print all that they promise; what they count is what the paper's arithmetic says.
Nothing here asserts a time."""

import json
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import convert_memory
import visual_states

from saisa_hf.bench import measure


TINY = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 44, "layers": 3, "heads": 4, "kv_heads": 2}
TINY |= {"text_tokens": 12, "vision_width": 24, "vision_layers": 2, "image_size": 42, "repeats": 2, "new_tokens": 2}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
TEXT, VISUAL, HEAD_SIZE = 12, 9, 8
SECOND = "SAISA, second, keys and values kept"


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """What the script prints, and what it writes."""
    path = tmp_path_factory.mktemp("benchmark") / "result.json"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr("builtins.print", lambda *texts, **_: lines.append(" ".join(map(str, texts))))
        visual_states.main([*OPTIONS, f"--json={path}"])
    return "\n".join(lines), json.loads(path.read_text())


def test_the_table_has_every_way_to_ask(printed):
    text, result = printed
    table = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("|")]
    assert [line[0].strip() for line in table[2:]] == [row["name"] for row in result["prefill"]]
    assert {len(line) for line in table} == {9} and len(table) == 2 + 8
    for row in result["prefill"]:
        assert len(row["seconds"]) == TINY["repeats"] and min(row["seconds"]) > 0
        assert row["flops"] > 0 and row["peak_bytes"] > 0
    assert {"cpu", "cores", "torch", "transformers"} <= set(result["machine"])
    assert result["settings"]["hidden_size"] == TINY["hidden_size"]


def test_100_answers_from_states_are_those_from_pixels(printed):
    text, result = printed
    questions = result["questions"]
    assert questions["asked"] == questions["equal"] == 100
    assert questions["others_differ"] > questions["others"] / 2 == 10
    assert "100 of 100 answers equal" in text


@torch.no_grad()
def test_the_demo_answers_real_questions_alike_from_states_and_from_pixels():
    result = visual_states.demo_questions(visual_states.arguments([*OPTIONS, "--questions=10"]))
    assert result["asked"] == result["equal"] == 10 and result["others"] == 2


def test_a_second_question_computes_the_language_model_and_attention_to_the_visual_keys_and_nothing_else(printed):
    flops = {row["name"]: row["flops"] for row in printed[1]["prefill"]}
    bare, layers, hidden = flops["language model, no picture"], TINY["layers"], TINY["hidden_size"]
    attention = layers * 4 * TEXT * VISUAL * TINY["heads"] * HEAD_SIZE
    angles = VISUAL * HEAD_SIZE  # of the rotary embedding, a matrix product in some releases of transformers
    assert flops[SECOND] - bare - attention in (0, angles)
    projectors = layers * 2 * VISUAL * (TINY["vision_width"] * hidden + hidden**2)
    keys_and_values = layers * 4 * VISUAL * hidden * TINY["kv_heads"] * HEAD_SIZE
    assert flops["SAISA, second, features kept"] == flops[SECOND] + projectors + keys_and_values
    assert flops["SAISA, first question"] == flops["SAISA, second, features kept"]
    assert flops["SAISA, making its states"] == projectors + keys_and_values


def test_what_is_kept_of_a_picture_is_what_the_formula_says(printed):
    kept = {row["name"]: row["kept_bytes"] for row in printed[1]["prefill"]}
    assert kept[SECOND] == printed[1]["kept_formula"]
    assert kept[SECOND] == 4 * 2 * VISUAL * TINY["kv_heads"] * HEAD_SIZE * TINY["layers"]
    assert kept["SAISA, second, features kept"] == 4 * VISUAL * TINY["vision_width"]
    assert kept["LLaVA, second, embeddings kept"] == 4 * VISUAL * TINY["hidden_size"]


@torch.no_grad()
def test_all_ways_to_ask_the_same_model_give_the_same_logits():
    args = visual_states.arguments(OPTIONS)
    first = {}
    for row in visual_states.ways_to_ask(visual_states.build(args), args):
        if row.first is not None and "states" not in row.name:
            logits = row.call().logits[:, -1]
            torch.testing.assert_close(logits, first.setdefault(row.first, logits), atol=2e-5, rtol=0)
    assert len(first) == 2


def test_peak_memory_is_the_most_that_is_held_at_once():
    def call():
        small = torch.zeros(1000)
        large = torch.zeros(50_000)
        del large
        return small + torch.zeros(20_000)[:1000]

    assert 4 * 51_000 <= measure.peak_memory(call, "cpu") < 4 * 52_000
    kept = torch.zeros(100_000)
    assert 4 * 100_000 <= measure.peak_memory(lambda: kept + 1, "cpu") < 4 * 101_000


def test_flops_are_two_per_multiply_and_add():
    assert measure.flops(lambda: torch.zeros(3, 5) @ torch.zeros(5, 7)) == 2 * 3 * 5 * 7


@pytest.mark.parametrize("form, stored", [("safetensors", "float16"), ("bin", "bfloat16")])
def test_the_benchmark_of_the_conversion_compares_every_tensor_with_what_it_made(tmp_path, form, stored):
    text = {"model_type": "llava_llama", "mm_vision_tower": "vision", "vocab_size": 97, "hidden_size": 32}
    text |= {"intermediate_size": 44, "num_attention_heads": 4, "num_hidden_layers": 3}
    vision = convert_memory.VISION | {
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "image_size": 42,
    }
    vision |= {"num_attention_heads": 2}
    convert_memory.generate(tmp_path / "source", form, stored, text, vision, 20_000)
    assert len(list((tmp_path / "source").glob("*-of-*"))) > 3
    measured = convert_memory.run_conversion(tmp_path / "source", tmp_path / "converted", None)
    assert measured["seconds"] > 0 and measured["maxrss"] > 0
    expected = {"equal": 42 + 39, "tensors": 42 + 39, "new_rows": 2, "others": 0}  # language model, encoder
    assert convert_memory.compare(tmp_path / "converted", text, vision, stored, stored) == expected
    file = tmp_path / "converted" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert convert_memory.compare(tmp_path / "converted", text, vision, stored, stored)["equal"] == 42 + 39 - 1
