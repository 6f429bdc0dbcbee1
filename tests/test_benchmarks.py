# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks run at tiny sizes and print all that they promise; what they count is what the paper's arithmetic says.
Nothing here asserts a time."""

import importlib
import json
import math
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from saisa_hf import apply_naavit
from saisa_hf.demo import scenes
from saisa_hf.demo.run import ask_model, load


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import ablations
import anyres
import cache_memory
import convert_memory
import evaluation
import learning
import relations
import told_pictures
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
    bare, layers, hidden = flops["language model, no image"], TINY["layers"], TINY["hidden_size"]
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


# --- learning ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def few_scans(monkeypatch):
    """Scenes drawn from one copy of each scan, which are made in a moment."""
    monkeypatch.setitem(scenes.VARIANTS, "train", 1)
    scenes.sprites.cache_clear()
    yield
    scenes.sprites.cache_clear()


def answer_by_looking(scene, text: str) -> str:
    """The answer to a question of `relations` from a map of the picture, or "unclear"."""
    cells = {divmod(glyph.cell, 3): glyph for glyph in scene.glyphs}
    if text == "Do two digits agree?":
        return "yes" if max(Counter(glyph.digit for glyph in cells.values()).values()) > 1 else "no"
    side, ink = re.search(r"(left|right) of the (\w+) one", text).groups()
    [(row, column)] = [cell for cell, glyph in cells.items() if glyph.ink == ink]
    other = cells[row, column + (1 if side == "right" else -1)].digit
    if text.startswith("Which"):
        return str(other)
    own = cells[row, column].digit
    return "unclear" if own == other else ("yes" if other > own else "no")


def test_questions_about_relations_have_the_right_answer_which_no_guess_has():
    asked = relations.held_out_questions(1500, 0)
    assert all(question.answer == answer_by_looking(scene, question.text) for scene, question in asked)
    assert {scene.split for scene, _ in asked} == {"test"}
    for kind in ("larger", "agree"):
        for count in (4, 5, 6):
            answers = [q.answer for scene, q in asked if q.kind == kind and len(scene.glyphs) == count]
            assert len(answers) > 100 and 0.4 < answers.count("yes") / len(answers) < 0.6
    digits = Counter(question.answer for _, question in asked if question.kind == "neighbour")
    assert len(digits) == 10 and max(digits.values()) < 0.2 * 500
    # one of both digits tells 78%
    known = {own: Counter() for own in range(10)}
    for scene, question in asked:
        if question.kind == "larger":
            ink = question.text.split()[-3]
            [own] = [glyph.digit for glyph in scene.glyphs if glyph.ink == ink]
            known[own][question.answer] += 1
    assert 0.74 < sum(max(counts.values()) for counts in known.values()) / 500 < 0.83


def test_the_turns_of_a_training_sequence_are_right_too_and_all_words_are_known():
    tokenizer = learning.make_processor().tokenizer
    for index in range(200):
        rng = np.random.default_rng(index)
        scene = relations.make_scene("train", rng)
        turns = relations.turns(scene, rng)
        assert all(turn.answer == answer_by_looking(scene, turn.text) for turn in turns)
        assert 1 <= len({turn.text for turn in turns}) == len(turns) <= relations.MOST_TURNS
        text = " ".join([relations.LIST, relations.list_all(scene), *(turn.text for turn in turns)])
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids
    entries = dict(entry.split(" ", 1) for entry in relations.list_all(scene).split(", "))
    assert list(entries) == list(scenes.INKS)
    for side, ink, _, other in relations.pairs(scene):
        assert entries[ink].split()[side == "right of"] == str(other)


def test_training_data_depend_on_the_seed_and_the_step_alone(few_scans):
    conversation, collate = (
        learning.Conversation(learning.make_processor().tokenizer, 36),
        learning.demo.TurnCollator(0),
    )

    def batch(seed, step):
        return learning.Mixture(conversation, collate, seed, 100).batch(step)[0]["pixel_values"]

    first = batch(0, 60)
    assert torch.equal(first, batch(0, 60))
    assert not torch.equal(first, batch(1, 60)) and not torch.equal(first, batch(0, 61))


def test_the_spread_of_seeds_is_shown_where_there_are_several():
    assert learning.spread([0.1, 0.3]) == "20.0% (10.0 to 30.0)" and learning.spread([0.1]) == "10.0%"


@torch.no_grad()
def test_an_answer_counts_as_right_exactly_if_greedy_decoding_gives_it():
    model, processor = load()
    conversation = learning.Conversation(processor.tokenizer, 36)
    examination = learning.Examination(conversation, learning.demo.TurnCollator(0), 140, size=50)
    answers = ask_model(model, processor, examination.asked["questions"])
    expected = [answer == question.answer for answer, (_, question) in zip(answers, examination.asked["questions"])]
    assert examination.right(model, "questions") == expected and 0 < sum(expected) < 140
    scores = examination.scores(model)["questions"]
    assert learning.mean(scores.values()) == pytest.approx(sum(expected) / 140, abs=1e-4)


def test_models_to_compare_start_from_the_same_weights():
    models = learning.make_models(learning.make_processor(), 3)
    llava = models["LLaVA"]
    visual = {}
    for name, model in models.items():
        for own, theirs in zip(model.get_input_embeddings().parameters(), llava.get_input_embeddings().parameters()):
            assert torch.equal(own, theirs)
        assert torch.equal(model.lm_head.weight, llava.lm_head.weight)
        tower = llava.model.vision_tower.state_dict().values()
        assert all(map(torch.equal, model.model.vision_tower.state_dict().values(), tower))
        words = torch.tensor([[1, 7, 8, 9]])
        assert torch.equal(model(input_ids=words).logits, llava(input_ids=words).logits)
        if name != "LLaVA":
            parts = {id(x): x for part, x in model.named_modules() if part.endswith("visual_projector")}
            visual[name] = len(parts)
            for part in parts.values():
                expected = llava.model.multi_modal_projector.state_dict()
                assert all(torch.equal(value, expected[key]) for key, value in part.state_dict().items())
    assert visual == {"SAISA": 4, "SAISA, one projector": 1, "SAISA, layers 1 and 3": 2}
    storage = [model.lm_head.weight.data_ptr() for model in models.values()]
    assert len(set(storage)) == len(storage), "what one learns, another would know"


def test_flops_of_a_training_step_are_those_of_its_matrix_products(few_scans):
    """Backward costs twice forward, but for the first matrix of a projector: the features below it are not trained."""
    processor = learning.make_processor()
    conversation, collate = learning.Conversation(processor.tokenizer, 36), learning.demo.TurnCollator(0)
    mixture = learning.Mixture(conversation, collate, 0, 100)
    item = mixture.item(0, {"questions": 1})
    batch = collate([item, item])
    whole = batch["input_ids"].shape[1]
    text, visual, width, inner, words, rows = whole - 36, 36, 128, 352, len(processor.tokenizer), 2
    per_token = 4 * width**2 + 3 * width * inner
    projector = 2 * visual * (6 * 2 * width**2 - 2 * width**2)
    for name, model in learning.make_models(processor, 0).items():
        found = learning.cost(model, [[batch]])
        if name == "LLaVA":
            forward = 4 * (2 * whole * per_token + 4 * whole**2 * width) + 2 * whole * width * words
            expected = 3 * forward * rows + projector
        else:
            forward = 4 * (2 * text * per_token + 4 * text**2 * width) + 2 * whole * width * words
            layers = len(model.config.visual_layers or range(4))
            forward += layers * 2 * visual * 2 * width**2
            forward += layers * 4 * text * visual * width
            once = 1 if name == "SAISA, one projector" else layers
            expected = 3 * forward * rows + once * projector
        assert found["flops"][0] - found["encoder_flops"] == pytest.approx(expected, rel=0.01), name


@pytest.mark.slow
def test_a_comparison_that_is_killed_goes_on_as_if_nothing_had_happened(few_scans, tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "BATCH", 2)
    monkeypatch.setattr(learning, "COUNTED_BATCHES", 1)
    page = tmp_path / "page.md"
    page.write_text(
        "a\n<!-- summary: start -->\nold\n<!-- summary: end -->\n<!-- kinds: start -->\n<!-- kinds: end -->\nz"
    )
    options = ["--steps=2", "--every=1", "--questions=10", "--final-questions=10", "--seeds=0"]
    whole = learning.main([f"--json={tmp_path / 'whole.json'}", *options])
    step, calls = learning.training_step, []

    def interrupted(*args):
        calls.append(None)
        if len(calls) == 7:  # two of four models have taken their second step
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(learning, "training_step", interrupted)
    path = tmp_path / "parts.json"
    with pytest.raises(KeyboardInterrupt):
        learning.main([f"--json={path}", *options])
    learning.main([f"--json={path}", *options])
    assert len(calls) == 7 + 4 and not list(tmp_path.glob("*.training"))
    cell, expected = (json.loads(file.read_text())["cells"]["seed 0"] for file in (path, tmp_path / "whole.json"))
    assert cell["steps"] == [0, 1, 2] and expected == whole["cells"]["seed 0"]
    for name, curve in cell["models"].items():
        assert curve["loss"] == expected["models"][name]["loss"] and curve["loss"][1] > 0
        assert curve["scores"] == expected["models"][name]["scores"]
        assert 0 == curve["seconds"][0] < curve["seconds"][1] < curve["seconds"][2]

    monkeypatch.setattr(learning, "training_step", None)
    shown = [f"--tables={page}", f"--plot={tmp_path / 'a.png'}", f"--example={tmp_path / 'b.png'}", "--until=0"]
    learning.main([f"--json={path}", *options, *shown])
    text = page.read_text()
    assert text.startswith("a\n") and text.endswith("\nz") and "old" not in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert [line[0] for line in lines if line[0] in learning.MODELS] == list(learning.MODELS)
    assert {line[0] for line in lines} > {*scenes.KINDS, *relations.KINDS}
    assert lines[2][3] == "100%" and int(lines[3][3][:-1]) < 100
    assert Image.open(tmp_path / "a.png").size[0] > 1000 < Image.open(tmp_path / "b.png").size[0]
    with pytest.raises(ValueError, match="choose another --json"):
        learning.main([f"--json={path}", *options, "--questions=20"])


# --- the study --------------------------------------------------------------------------------------------------------

on_5 = pytest.mark.skipif(transformers.__version__ < "5", reason="the same on every release: runs under 5.x")


def study(part, *options):
    """What the study is told, for a moment's work."""
    args = ablations.arguments([f"--json={part}", "--questions=10", "--final-questions=10", *options])
    args.deadline = math.inf
    return args


def course_of(model, processor):
    args = study("none")
    return ablations.Course(processor, args, args.steps, args.every, model.config.image_seq_length)


@on_5
def test_models_of_the_study_differ_in_what_they_are_called_after_and_in_nothing_else(monkeypatch):
    monkeypatch.setattr(ablations, "QUESTIONS_COUNTED", 2)
    processor = ablations.make_processor()
    speaker = told_pictures.new_language_model(processor, ablations.DEPTH, 7)
    torch.manual_seed(2)
    llava = ablations.new_llava(processor, ablations.DEPTH).eval()
    llava.model.language_model.load_state_dict(speaker.model.state_dict())
    llava.lm_head.load_state_dict(speaker.lm_head.state_dict())
    flops, words = {}, torch.tensor([[1, 7, 8, 9]])
    for name in ablations.MODELS:
        model = ablations.make_model(processor, name, 2, speaker.state_dict()).eval()
        course = course_of(model, processor)
        torch.testing.assert_close(model(input_ids=words).logits, llava(input_ids=words).logits, rtol=0, atol=1e-5)
        tower = llava.model.vision_tower.state_dict().values()
        assert all(map(torch.equal, model.model.vision_tower.state_dict().values(), tower))
        batch = {key: x for key, x in course.counted()[0].items() if key != "labels"}
        assert (batch["input_ids"] == model.config.image_token_id).sum() == (
            9 if " 9 " in name or "2 x 2" in name else 36
        )
        if name == "LLaVA":
            torch.testing.assert_close(model(**batch).logits, llava(**batch).logits, rtol=0, atol=1e-5)
        before = model(**batch).logits
        ablations.enter(model, name, ablations.WHOLE)
        assert torch.equal(model(**batch).logits, before)
        flops[name] = ablations.question_flops(model, course)
    order = ["LLaVA", "NAAViT alone", "SAISA", "SAISA, every second layer", "SAISA, 2 x 2 averages"]
    assert [flops[name] for name in order] == sorted((flops[name] for name in order), reverse=True)
    assert flops["SAISA, one projector"] == flops["NAAViT, no visual feed-forward"]
    assert flops["SAISA, first half of the layers"] == flops["SAISA, last half"] == flops["SAISA, middle half"]


@on_5
def test_the_study_trains_a_projector_first_and_then_all_but_the_encoder():
    processor = ablations.make_processor()
    projectors = {"SAISA": 4, "SAISA, last half": 2, "SAISA, one projector": 1, "LLaVA": 1, "SAISA, 9 resampled": 4}
    for name, count in projectors.items():
        model = ablations.make_model(processor, name, 0)
        optimizer = ablations.enter(model, name, ablations.PROJECTOR)
        trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        resampler = {key for key, _ in model.named_parameters() if "visual_resampler" in key}
        names = {f"model.visual_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")}
        assert trained == names | resampler and bool(resampler) == ("resampled" in name)
        assert len(optimizer.param_groups[0]["params"]) == len(trained)
        optimizer = ablations.enter(model, name, ablations.WHOLE)
        parameters = dict(model.named_parameters())
        assert len({key for key in parameters if key.endswith("visual_projector.linear_1.weight")}) == count
        frozen = {key for key, parameter in parameters.items() if not parameter.requires_grad}
        assert frozen == {key for key in parameters if "vision_tower" in key}
        assert len(optimizer.param_groups[0]["params"]) == len(parameters) - len(frozen)


@on_5
def test_what_is_told_of_a_picture_stands_where_its_visual_tokens_stand():
    processor = ablations.make_processor()
    tokenizer = processor.tokenizer
    teller, conversation = told_pictures.Teller(tokenizer), learning.Conversation(tokenizer, 36)
    scene = relations.make_scene("test", np.random.default_rng(3))
    ids, labels = conversation.ids_and_labels([("Where is the 7?", "top left")])
    item = teller.told(scene) | {"ids": ids, "labels": labels}
    batch = teller.collate([item, item | {"ids": ids[:-1], "labels": labels[:-1]}])
    words = tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
    first = ids.index(processor.image_token_id)
    for place, word in enumerate(words[first : first + 36]):
        row, column = divmod(place, 6)
        glyph = scene.at(3 * (row // 2) + column // 2)
        assert word == ("nothing" if glyph is None else f"{glyph.digit}{glyph.ink}")
    assert len(set(words[first : first + 36])) == len(scene.glyphs) + 1
    assert batch["input_ids"][0].tolist()[first + 36 :] == ids[first + 36 :] and batch["labels"][0].tolist() == labels
    assert batch["attention_mask"].tolist() == [[1] * len(ids), [1] * (len(ids) - 1) + [0]]


@pytest.fixture
def speaking(few_scans, tmp_path, monkeypatch):
    """What the study is told where the language model of seed 0 is there."""
    monkeypatch.setattr(learning, "BATCH", 2)
    args = study(tmp_path / "whole", "--steps=3", "--every=1", "--language-steps=2")
    ablations.cell_path(args, "SAISA", 0).parent.mkdir()
    ablations.train_language_model(args, 0)
    return args


@on_5
def test_a_cell_of_the_study_that_is_killed_goes_on_as_if_nothing_had_happened(speaking, tmp_path, monkeypatch):
    name = "SAISA, 9 resampled"
    ablations.train_cell(speaking, name, 0)
    whole, step, calls = ablations.done(speaking, name, 0), ablations.training_step, []

    def interrupted(*given):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(*given)

    ablations.cell_path(speaking, name, 0).unlink()
    monkeypatch.setattr(ablations, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ablations.train_cell(speaking, name, 0)
    assert ablations.done(speaking, name, 0) is None
    ablations.train_cell(speaking, name, 0)
    parts = ablations.done(speaking, name, 0)
    assert len(calls) == 4 and not list(tmp_path.rglob("*.training"))
    assert whole["steps"] == parts["steps"] == [0, 1, 2, 3] and parts["loss"][1] > 0
    assert all(parts[key] == whole[key] for key in whole if key not in ("seconds", "saisa_hf"))


@on_5
def test_a_language_model_of_the_study_that_is_killed_goes_on_as_if_nothing_had_happened(speaking, monkeypatch):
    path, step, calls = ablations.language_path(speaking, 0), ablations.training_step, []
    whole = torch.load(path, weights_only=True)

    def late(*given):
        calls.append(None)
        speaking.deadline = 0.0
        return step(*given)

    path.unlink()
    monkeypatch.setattr(ablations, "training_step", late)
    ablations.train_language_model(speaking, 0)
    assert len(calls) == 1 and not path.exists()
    ablations.train_cell(speaking, "SAISA", 0)  # which has nothing to start from
    assert ablations.done(speaking, "SAISA", 0) is None
    speaking.deadline = math.inf
    ablations.train_language_model(speaking, 0)
    parts = torch.load(path, weights_only=True)
    assert len(calls) == 2 and parts["scores"] == whole["scores"]
    assert all(torch.equal(parts["model"][key], tensor) for key, tensor in whole["model"].items())
    random = told_pictures.new_language_model(ablations.make_processor(), ablations.DEPTH, 0).state_dict()
    assert not torch.equal(random["lm_head.weight"], whole["model"]["lm_head.weight"])


@on_5
def test_models_of_the_study_start_from_the_language_model_of_their_seed(speaking, monkeypatch):
    found = []
    monkeypatch.setattr(ablations, "train", lambda model, *given: found.append(model))
    ablations.train_cell(speaking, "SAISA", 0)
    speaker = torch.load(ablations.language_path(speaking, 0), weights_only=True)["model"]
    own = found[0].state_dict()
    shared = {key for key in own if key.startswith("model.language_model.")}
    assert len(shared) == len(speaker) - 1 and torch.equal(own["lm_head.weight"], speaker["lm_head.weight"])
    for key in shared:
        assert torch.equal(own[key], speaker[key.replace("language_model.", "")])


@on_5
def test_the_twins_of_the_study_have_one_loss_and_the_same_gradients(few_scans):
    processor, found = ablations.make_processor(), []
    for name in ablations.TWINS:
        model = ablations.make_model(processor, name, 1)
        ablations.enter(model, name, ablations.WHOLE)
        batch, _ = course_of(model, processor).mixture(1).batch(400)
        loss = model(**batch).loss
        loss.backward()
        found.append((loss, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}))
    (loss, gradients), (same, others) = found
    torch.testing.assert_close(loss, same, rtol=1e-6, atol=0)
    assert gradients.keys() == others.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(others[key], gradient, rtol=0, atol=1e-5 * gradient.abs().max().item())


@on_5
def test_the_llava_of_the_study_is_switched_as_naavit_switches_transformers_own():
    processor = ablations.make_processor()
    torch.manual_seed(2)
    llava = ablations.new_llava(processor, ablations.DEPTH).eval()
    model = ablations.make_model(processor, "LLaVA", 2)
    batch = {key: x for key, x in course_of(model, processor).counted()[0].items() if key != "labels"}
    frozen = {"NAAViT": {}, "NAAViT, no visual feed-forward": {"visual_feed_forward": False}}
    frozen |= {f"the same in layer {n} alone": {"layers": [n], "visual_feed_forward": False} for n in range(3)}
    assert list(frozen) == list(ablations.SWITCHES)
    found = [llava(**batch).logits]
    for label, changes in ablations.SWITCHES.items():
        with apply_naavit(llava, **frozen[label]):
            found.append(llava(**batch).logits)
        logits = ablations.switched(model, changes).eval()(**batch).logits
        torch.testing.assert_close(logits[:, -1], found[-1][:, -1], rtol=0, atol=1e-5)
    assert torch.pdist(torch.stack(found)[:, 0, -1]).min() > 1e-4


@on_5
def test_the_table_by_kind_holds_the_means_of_the_seeds():
    def cell(seed, model, **scores):
        chance = {"questions": {"place": 0.1}, "relations": {"larger": 0.5}}
        scores = {"questions": {"place": scores["place"]}, "relations": {"larger": scores["larger"]}}
        return {"model": model, "seed": seed, "chance": chance, "scores": [{}, scores]}

    cells = [cell(0, "SAISA", place=0.2, larger=0.5), cell(1, "SAISA", place=0.4, larger=0.9)]
    cells.append(cell(0, "LLaVA", place=1.0, larger=0.0))
    shown = [line.split("|")[1:-1] for line in ablations.by_kind({"cells": cells}).splitlines()]
    assert [[value.strip() for value in line] for line in (shown[0], *shown[2:])] == [
        ["model", "place", "larger"],
        ["most frequent answer", "10%", "50%"],
        ["LLaVA", "100%", "0%"],
        ["SAISA", "30%", "70%"],
    ]


@on_5
def test_marks_of_a_plot_are_moved_no_further_than_makes_them_legible():
    assert ablations.apart([1, 4, 9], gap=2) == [1, 4, 9]
    assert ablations.apart([5, 5, 5, 20], gap=2) == [3, 5, 7, 20]
    assert ablations.apart([0, 3, 3, 4], gap=2) == pytest.approx([0 - 0.5, 1.5, 3.5, 5.5])


BLOCKS = ("summary", "kinds", "switched", "twins", "longer")
SMOKE = ["--steps=2", "--every=2", "--language-steps=2", "--questions=10", "--final-questions=10", "--seeds=0"]


def page_with_blocks(path):
    path.write_text("".join(f"<!-- {block}: start -->\nold\n<!-- {block}: end -->\n" for block in BLOCKS))
    return path


def cells_of(page):
    lines = [line.split("|")[1:-1] for line in page.read_text().splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line] for line in lines]


@on_5
def test_the_whole_study_at_a_size_that_only_shows_that_it_works(few_scans, tmp_path, monkeypatch):
    monkeypatch.setattr(learning, "BATCH", 2)
    monkeypatch.setattr(ablations, "QUESTIONS_COUNTED", 2)
    page, picture, numbers = page_with_blocks(tmp_path / "page.md"), tmp_path / "plot.png", tmp_path / "result.json"
    options = [*SMOKE, f"--json={numbers}", "--workers=0", f"--tables={page}", f"--plot={picture}"]
    result = ablations.main(options)
    names, lines = [name for name in ablations.MODELS if name not in ablations.AGAIN], cells_of(page)
    assert [cell["model"] for cell in result["cells"]] == list(ablations.MODELS)
    assert [line[0] for line in lines[2:15]] == names and len(names) == 13
    assert lines[15][0] == ablations.TOLD and lines[15][-3].endswith("%")
    assert [line[0] for line in lines[18:32]] == ["most frequent answer", *names]
    assert [line[0] for line in lines[34:40]] == ["LLaVA", *ablations.SWITCHES]
    assert [line[0] for line in lines[42:44]] == [f"seed 0, {name}" for name in ablations.TWINS]
    again = [[name, steps, "1"] for name in ablations.AGAIN.values() for steps in ("2", "6")]
    assert [line[:3] for line in lines[46:]] == again
    assert lines[2][1] == "36" and lines[2][4] == "100%" and lines[13][1] == "9" and int(lines[13][4][:-1]) < 50
    assert Image.open(picture).size[0] > 1000
    trained = {cell["model"]: cell["trained"] for cell in result["cells"]}
    assert trained["SAISA"] - trained["SAISA, one projector"] == 3 * 2 * (128 * 128 + 128)
    with pytest.raises(ValueError, match="choose another --json"):
        ablations.main([*options, "--language-steps=3"])


@on_5
@pytest.mark.slow
def test_the_study_trains_side_by_side_what_it_trains_one_by_one(tmp_path):
    found = []
    for workers in (0, 2):
        options = [*SMOKE, f"--json={tmp_path / str(workers)}", f"--workers={workers}"]
        result = ablations.main([*options, "--models", "LLaVA", "SAISA, 2 x 2 unshuffled"])
        found.append([{key: cell[key] for key in cell if key != "seconds"} for cell in result["cells"]])
        found.append(result["language_models"])
    assert len(found[0]) == 2 and found[:2] == found[2:]


@on_5
@pytest.mark.slow
def test_nobody_trains_on_where_the_study_is_killed(tmp_path):
    options = ["--steps=5000", "--every=5000", "--language-steps=5000", "--questions=10", "--final-questions=10"]
    command = [sys.executable, ablations.__file__, *options, f"--json={tmp_path / 'result.json'}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as study:
        patience = time.monotonic() + 400
        try:
            while len(list(tmp_path.rglob("*.training"))) < 2:
                assert study.poll() is None and time.monotonic() < patience
                time.sleep(0.2)
        finally:
            study.kill()
        study.communicate(timeout=60)  # its pipe is open until the last worker ends


@pytest.mark.parametrize(
    "script, tables, options",
    [
        ("ablations", 5, ["--until=0"]),
        ("from_llava", 2, ["--until=0"]),
        ("learning", 2, ["--until=0"]),
        ("hardware", 1, []),
        ("cache_memory", 1, []),
    ],
)
def test_the_tables_of_a_page_are_those_of_the_numbers_beside_the_script(script, tables, options, tmp_path):
    """Both are in the repository; nothing is computed here."""
    root = Path(__file__).parent.parent
    page, numbers = tmp_path / "page.md", tmp_path / "numbers.json"
    written = (root / "docs" / {"cache_memory": "family.md"}.get(script, f"{script}.md")).read_text()
    page.write_text(re.sub(r"\d", "0", written))
    numbers.write_text((root / "benchmarks" / f"{script}.json").read_text())
    importlib.import_module(script).main([f"--json={numbers}", f"--tables={page}", *options])
    blocks = [re.findall(r"<!-- (\S+): start -->\n(.*?)<!--", text, re.S) for text in (written, page.read_text())]
    blocks = [
        [block for block in found if block[0] != "family"] for found in blocks
    ]  # `scripts/performance.py` fills it
    assert blocks[0] == blocks[1] and len(blocks[0]) == tables


# --- many questions about each image ----------------------------------------------------------------------------------


def test_questions_a_second_stand_beside_the_flops_that_they_take(tmp_path, capsys):
    path = tmp_path / "result.json"
    args = [*OPTIONS, "--images=2", "--questions=3", "--batch-size=1", "--vocab-size=400"]
    found = evaluation.main([*args, f"--json={path}"])
    assert found["equal_answers"] == 6 and json.loads(path.read_text())["rows"] == found["rows"]
    assert [row["name"] for row in found["rows"]] == [evaluation.WITH, evaluation.WITHOUT, evaluation.LLAVA]
    assert "6 of 6 answers" in capsys.readouterr().out
    args = evaluation.arguments(args)
    models, asked = evaluation.build(args), evaluation.questions_of(args)
    processor, expected = evaluation.processor_of(args), evaluation.flops(models.saisa.config, args)
    for model in (models.saisa, models.llava):
        model.generation_config.eos_token_id = None
    for row, model in zip(found["rows"], (models.saisa, models.saisa, models.llava)):
        states = row["name"] == evaluation.WITH
        answerer = evaluation.Answerer(
            model, processor, batch_size=1, visual_states=states, max_new_tokens=args.new_tokens
        )
        with models.countable("sdpa"):
            counted = measure.flops(lambda answerer=answerer: list(answerer.answer(asked)))
        assert counted == pytest.approx(args.images * expected[row["name"]], rel=0.02)
        assert row["flops_per_question"] == expected[row["name"]] / args.questions


def test_the_cache_has_the_bytes_that_the_formula_says(capsys):
    cache_memory.main(["--visual", "64", "--steps", "2", "--width", "32"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert [row["seeing_layers"] for row in rows] == [32, 8, 2]
    for row in rows:
        places = 0 if row["seeing_layers"] == 32 else 8 * row["text_tokens"]  # of the text, once for all layers
        assert row["text alone"]["cache_bytes"] == row["formula_bytes"] + places
        assert row["marked"]["cache_bytes"] == rows[0]["formula_bytes"]


def test_what_a_video_costs(tmp_path, capsys):
    import video

    page = tmp_path / "page.md"
    page.write_text("<!-- video-costs: start -->\n<!-- video-costs: end -->\n")
    sizes = ["--frames", "3", "6", "--grid", "5", "--width", "64", "--layers", "2", "--repeats", "1"]
    video.main([*sizes, f"--json={tmp_path / 'video.json'}", f"--tables={page}"])
    result = json.loads((tmp_path / "video.json").read_text())
    few, many = result["cells"].values()
    of_encoder, one = many["flops"]["encoder"], 2 * 64 * 64
    assert of_encoder == 2 * few["flops"]["encoder"]
    # behind the encoder: projectors of two matrices and two products for keys and values of 9 tokens a frame, in each layer
    grown = {kind: many["flops"][kind] - few["flops"][kind] - of_encoder // 2 for kind in ("saisa", "llava")}
    projected = 2 * 3 * 9 * (2 * 96 * 64 + one + 2 * one)
    scores = 2 * 2 * 3 * 9 * video.TEXT * 2 * 64
    # transformers 4 multiplies positions by frequencies in a matrix product, one of few FLOPs
    assert grown["saisa"] == pytest.approx(projected + scores, rel=1e-3)
    assert grown["llava"] > 2 * grown["saisa"]
    assert video.costs_table(result) in page.read_text() and "LLaVA-OneVision" in capsys.readouterr().out


def test_the_page_about_video_has_the_committed_numbers():
    import video

    root = Path(__file__).parent.parent
    result = json.loads((root / "benchmarks" / "video.json").read_text())
    assert video.costs_table(result) in (root / "docs" / "video.md").read_text()


def test_images_of_tiles_have_the_digits_that_their_questions_ask_for(few_scans):
    for index in range(12):
        scene = anyres.make_tiled_scene("train", np.random.default_rng([3, index]))
        places, digits, inks = zip(*scene.digits)
        rows, columns = scene.shape
        assert scene.image.size == (columns * scenes.SIZE, rows * scenes.SIZE) and places == anyres.SHAPES[scene.shape]
        assert len(set(digits)) == len(set(inks)) == rows * columns
        for text, answer in anyres.questions(scene):
            asked = {"place": places, "ink": inks, "digit": digits}
            found = [
                i for values in asked.values() for i, value in enumerate(values) if f" {value}" in text.rstrip("?")
            ]
            assert len(found) == 1 and answer in (digits[found[0]], inks[found[0]])
        pixels = np.asarray(scene.image).astype(int)
        for number, ink in enumerate(inks):  # the tile holds the ink, the others do not
            row, column = divmod(number, columns)
            tile = pixels[row * scenes.SIZE :, column * scenes.SIZE :][: scenes.SIZE, : scenes.SIZE]
            darkest = tile.reshape(-1, 3)[tile.sum(-1).argmin()]
            nearest = min(scenes.INKS, key=lambda name: np.abs(np.array(scenes.INKS[name]) - darkest).sum())
            assert nearest == ink


@pytest.mark.slow
def test_the_benchmark_of_tiles_fills_its_tables_and_computes_nothing_twice(few_scans, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- {name}: start -->\n<!-- {name}: end -->\n" for name in ("results", "costs")))
    sizes = ["--steps", "2", "--pictures", "8", "--held-out", "4", "--fit-steps", "2", "--distill-steps", "1"]
    sizes += ["--questions", "6", "--width", "64", "--repeats", "1", "--models", str(tmp_path / "models")]
    result = anyres.main(["--json", str(tmp_path / "r.json"), "--tables", str(page), *sizes])
    assert list(result["cells"]) == ["llava", "base image alone", "copied", "fitted", "distilled"]
    assert result["costs"]["flops"]["saisa"] < result["costs"]["flops"]["llava"]
    shown = page.read_text()
    assert shown.count("SAISA") == 4 and "GFLOPs without the encoder" in shown
    again = anyres.main(["--json", str(tmp_path / "r.json"), *sizes])
    assert all(again[name] == json.loads(json.dumps(result[name])) for name in ("cells", "costs"))


def test_the_page_about_high_resolution_has_the_committed_numbers():
    root = Path(__file__).parent.parent
    result = json.loads((root / "benchmarks" / "anyres.json").read_text())
    page = (root / "docs" / "high_resolution.md").read_text()
    assert anyres.results_table(result["cells"]) in page and anyres.costs_table(result["costs"]) in page
