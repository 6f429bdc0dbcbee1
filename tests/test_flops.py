# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa flops`: its formulas are what PyTorch counts while models run, its parameters and bytes are those of real models."""

import argparse
import copy
import json
import re
from pathlib import Path

import pytest
import torch
from tiny_models import OTHER_VISION_CONFIGS, TEXT_MODELS, VISION_MODELS, prompts_from_rows, tiny_config, tiny_model
from transformers import LlavaConfig, LlavaForConditionalGeneration

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration
from saisa_hf.bench import measure
from saisa_hf.bench.models import build
from saisa_hf.bench.names import MEMBER_MODELS, NARROW, UNPADDED
from saisa_hf.bench.options import add_arguments
from saisa_hf.bench.run import prepared
from saisa_hf.bench.work import Case, model_of, tasks
from saisa_hf.checkpoints.model_card import flops as card_flops
from saisa_hf.cli import main
from saisa_hf.costs.family import MEMBERS, member, member_settings
from saisa_hf.costs.flops import (
    ARCHITECTURES,
    Step,
    account,
    activation_bytes,
    cache_bytes,
    encoder_flops,
    parameters,
    read_config,
    step_flops,
    training_flops,
)
from saisa_hf.costs.presets import LANGUAGE_MODELS
from saisa_hf.vision_saisa import image_size


SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 44, "layers": 4, "heads": 4, "kv_heads": 4}
SIZES |= {"vision_width": 24, "vision_layers": 2, "image_size": 42, "attn_implementation": "eager"}
ROWS = [[1, "image", 5, 6, 7, 8, 9, "image", 10, 11]] * 2  # 8 text tokens, 2 pictures
TEXT = 8


def arguments(**sizes) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return prepared(parser.parse_args([f"--{name.replace('_', '-')}={x}" for name, x in (SIZES | sizes).items()]))


@pytest.fixture(scope="module")
def models():
    """A SAISA, a LLaVA, a Flamingo and a language model of one size."""
    args = arguments()
    return build(args, flamingo_every=2), args


@pytest.fixture(scope="module")
def family():
    """The members of the family, at a depth at which no two are the same, and those with narrow projectors."""
    args = arguments(layers=8, projector_hidden_size=8)
    return build(args, members=MEMBERS, narrow=NARROW), args


def test_the_papers_example_costs_what_the_paper_says(capsys):
    assert main(["flops", "vicuna-7b", "--text", "64", "--visual", "576"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"language model \(1\) +\| +2\.86 \| +8\.50 \|", printed)
    assert re.search(r"against LLaVA +\| +66% less \|", printed)
    assert "64 text and 576 visual tokens" in printed


CASES = [
    Case("prefill", 1, 12, 9),
    Case("prefill", 3, 5, 31),
    Case("first-token", 2, 12, 18),
    Case("second-question", 2, 12, 9),
    Case("decode", 3, 12, 9, tokens=2),
    Case("train", 2, 12, 9, "full"),
    Case("train", 1, 5, 31, "projectors"),
    Case("train", 2, 12, 9, "lora"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_formulas_are_what_pytorch_counts_in_saisa_llava_and_flamingo(models, case):
    models, args = models
    names = list(ARCHITECTURES)
    if case.trained == "lora":
        pytest.importorskip("peft")
    if case.trained in ("projectors", "lora"):
        names = ["saisa", "llava"]
    with tasks(models, names, case, args, cross_every=2) as todo:
        for name, task in todo.items():
            assert task.flops == pytest.approx(measure.flops(task.call), rel=0.01), name


def test_a_llava_with_grouped_queries_costs_what_pytorch_counts():
    args = arguments(heads=8, kv_heads=2, hidden_size=48)
    models = build(args)
    for case in (Case("prefill", 2, 12, 9), Case("decode", 1, 12, 9), Case("train", 1, 12, 9, "full")):
        with tasks(models, ["saisa", "llava"], case, args) as todo:
            for name, task in todo.items():
                assert task.flops == pytest.approx(measure.flops(task.call), rel=0.01), (name, case.name)


def counted_and_formula(model) -> tuple[int, int]:
    """FLOPs of a prefill and a decoding step of a SAISA, by PyTorch and by formula."""
    prompts, config = prompts_from_rows(ROWS), model.config
    pictures = torch.randn(4, 3, *image_size(config.vision_config))
    if config.vision_config.model_type == "siglip2_vision_model":  # whose config names patches
        pictures = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        visual = model.get_image_features(pictures).pooler_output.shape[1]
        config.image_seq_length = visual
        prompts = prompts_from_rows(ROWS, seq_length=visual)
        outputs = []

        def prefill():
            outputs.append(model(prompts.input_ids, pictures, use_cache=True, logits_to_keep=1))

        def decode():
            model(prompts.input_ids[:, -1:], past_key_values=outputs[-1].past_key_values, use_cache=True)

        counted = measure.flops(prefill) + measure.flops(decode)
    step = Step(TEXT, 2 * visual, batch=2)
    formula = 4 * encoder_flops(config)
    formula += sum(sum(step_flops(config, "saisa", one).values()) for one in (step, step.next_token()))
    return counted, formula


@pytest.mark.parametrize("text", TEXT_MODELS)
def test_a_saisa_over_every_language_model_costs_what_pytorch_counts(text):
    counted, formula = counted_and_formula(tiny_model(text, attn_implementation="eager"))
    assert formula == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize(
    "settings",
    [
        {"visual_layers": [1]},
        {"projector_sharing": "shared", "projector_hidden_size": 20},
        {"vision_feature_layer": [-2, -1], "projector_hidden_size": 70},
    ],
    ids=str,
)
def test_every_kind_of_projector_costs_what_pytorch_counts(settings):
    counted, formula = counted_and_formula(tiny_model("qwen3", attn_implementation="eager", **settings))
    assert formula == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("vision", [*VISION_MODELS, *OTHER_VISION_CONFIGS])
def test_every_encoder_costs_what_pytorch_counts(vision):
    settings = {"vision_feature_select_strategy": "full"} if vision in ("swin", "resnet") else {}
    counted, formula = counted_and_formula(tiny_model("llama", vision, attn_implementation="eager", **settings))
    assert formula == pytest.approx(counted, rel=0.01)


def test_the_first_layers_of_a_training_that_starts_above_them_cost_no_backward_pass():
    config = tiny_config("llama", visual_layers=[2])
    step = Step(12, 4)
    late = training_flops(config, "saisa", step, "projectors")
    early = training_flops(tiny_config("llama", visual_layers=[0]), "saisa", step, "projectors")
    assert late < early < training_flops(config, "saisa", step, "full")
    model = tiny_model("llama", attn_implementation="eager", visual_layers=[2])
    prompts = prompts_from_rows([[1, "image", *range(3, 14)]])
    for name, p in model.named_parameters():
        p.requires_grad_("visual_projector" in name)
    labels = prompts.input_ids.masked_fill(prompts.visual, -100)
    pixels = torch.randn(1, 3, 8, 8)

    def call():
        features = model.get_image_features(pixels)
        model(prompts.input_ids, pixels, labels=labels, use_cache=False, skip_logits=True).loss.backward()
        return features

    with torch.no_grad():
        encoder = measure.flops(lambda: model.get_image_features(pixels))
    rows = step.text - 2  # what the first token and the one in front of the picture should predict is masked
    formula = training_flops(config, "saisa", Step(12, 4, logits=rows), "projectors")
    assert formula == pytest.approx(measure.flops(call) - 2 * encoder, rel=0.01)


def test_unknown_kinds_are_refused():
    config = tiny_config()
    with pytest.raises(ValueError, match="architecture='blip'"):
        step_flops(config, "blip", Step(1, 1))
    with pytest.raises(ValueError, match="trained='head'"):
        training_flops(config, "saisa", Step(1, 1), "head")
    with pytest.raises(ValueError, match="for SAISA and LLaVA"):
        training_flops(config, "flamingo", Step(1, 1), "lora")


def count(model) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameters_are_those_of_real_models(models):
    models, _ = models
    for name in ("saisa", "llava", "flamingo"):
        expected = count(model_of(models, name))
        assert sum(parameters(models.saisa.config, name, cross_every=2).values()) == expected, name
    bare = parameters(models.saisa.config, "language_model")
    assert sum(bare.values()) == count(models.bare) and bare["encoder"] == bare["projectors"] == 0


@pytest.mark.parametrize(
    "name, expected",
    [
        ("vicuna-7b", 6_738_415_616),
        ("vicuna-13b", 13_015_864_320),
        ("llama3-8b", 8_030_261_248),
        ("mistral-7b", 7_241_732_096),
        ("qwen2.5-7b", 7_615_616_512),
    ],
)
def test_presets_have_as_many_parameters_as_was_published(name, expected):
    config = read_config(name)
    assert sum(parameters(config, "language_model").values()) == expected
    assert parameters(config, "llava")["encoder"] == 303_507_456
    assert config.image_seq_length == 576


@pytest.mark.parametrize("layers", [None, [1]], ids=str)
@pytest.mark.parametrize("text", TEXT_MODELS)
def test_the_cache_has_as_many_bytes_as_a_real_one(text, layers):
    model = tiny_model(text, dtype=torch.bfloat16, visual_layers=layers)
    prompts = prompts_from_rows(ROWS).to(torch.bfloat16)
    with torch.no_grad():
        outputs = model(**prompts.inputs, use_cache=True)
        step = Step(TEXT, 8, batch=2)
        assert cache_bytes(model.config, "saisa", step, 2) == measure.cache_bytes(outputs.past_key_values)
        ids = prompts.input_ids[:, -1:]
        outputs = model(ids, past_key_values=outputs.past_key_values, use_cache=True)
    assert cache_bytes(model.config, "saisa", step.next_token(), 2) == measure.cache_bytes(outputs.past_key_values)


def test_the_caches_of_llava_and_flamingo_have_as_many_bytes_as_real_ones(models):
    models, args = models
    with tasks(models, list(ARCHITECTURES), Case("prefill", 2, 12, 9), args, 2) as todo:
        for name, task in todo.items():
            formula = cache_bytes(models.saisa.config, name, Step(12, 9, batch=2), 4)
            assert formula == measure.cache_bytes(task.call().past_key_values), name


@pytest.mark.parametrize("batch, text, visual", [(1, 32, 512), (2, 256, 256)])
def test_activations_are_about_what_real_models_hold(batch, text, visual):
    args = arguments(hidden_size=256, intermediate_size=688, vision_width=64, attn_implementation="sdpa")
    models = build(args, flamingo_every=2)
    with tasks(models, list(ARCHITECTURES), Case("prefill", batch, text, visual), args, 2) as todo:
        for name, task in todo.items():
            formula = activation_bytes(models.saisa.config, name, Step(text, visual, batch=batch), 4)
            task.uncached()
            assert formula == pytest.approx(measure.peak_memory(task.uncached, "cpu"), rel=0.15), name


@pytest.mark.parametrize("text", ["llama", "qwen3", "gemma2", "qwen3_moe"])
def test_the_model_card_says_the_same(text):
    config = tiny_config(text)
    card = card_flops(config, 30, 40)
    for name in ("saisa", "llava"):
        counted = account(config, Step(30, 40))[name]["language_model"]
        assert counted == pytest.approx(card[name], rel=0.01)


@pytest.mark.parametrize("kind", ["dinov2", "dinov2_with_registers"])
def test_the_encoder_is_counted_at_the_size_of_the_pictures_that_it_gets(kind):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}
    text = tiny_config("qwen3").text_config
    made, given = (
        SaisaConfig(vision_config={"model_type": kind, "image_size": side, **sizes}, text_config=text, image_token_id=3)
        for side in (16, 32)
    )
    given.image_seq_length = made.image_seq_length
    assert made.image_seq_length == 16 and encoder_flops(given) == encoder_flops(made)
    given.image_seq_length = 64
    assert encoder_flops(given) > 3 * encoder_flops(made)


def test_json_holds_all_that_is_printed(capsys):
    options = ["--images", "3", "--batch", "2", "--generate", "5", "--dtype", "float32", "--train", "lora", "--json"]
    assert main(["flops", "llama3-8b", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["visual"], found["batch"], found["generated"]) == (3 * 576, 2, 5)
    step = Step(64, 3 * 576, batch=2)
    config = read_config("llama3-8b")
    for name in ("saisa", "llava", "flamingo"):
        own = found[name]
        assert own["prompt"] == step_flops(config, name, step) | {"encoder": 6 * encoder_flops(config)}
        assert own["cache_bytes"] == 4 * 2 * 2 * 32 * 1024 * (68 + (0 if name == "flamingo" else 3 * 576))
        behind, passes = step, []
        for _ in range(4):  # the first of the five tokens comes out of the prompt
            behind = behind.next_token()
            passes.append(sum(step_flops(config, name, behind).values()))
        assert (own["next_token"], own["generated"]) == (passes[0], sum(passes))
    assert found["flamingo"]["training"] is None and found["llava"]["training"] > found["saisa"]["training"] > 0


def test_configs_of_llavas_and_of_language_models_are_read(tmp_path, capsys):
    saisa = tiny_config("qwen3")
    parts = {"text_config": copy.deepcopy(saisa.text_config), "vision_config": copy.deepcopy(saisa.vision_config)}
    LlavaConfig(**parts, vision_feature_layer=-1, image_token_index=96).save_pretrained(tmp_path / "llava")
    saisa.text_config.save_pretrained(tmp_path / "language")
    saisa.save_pretrained(tmp_path / "saisa")
    read = read_config(str(tmp_path / "llava"))
    assert isinstance(read, SaisaConfig) and read.vision_feature_layer == -1 and read.image_seq_length == 4
    with torch.device("meta"):
        llava = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(tmp_path / "llava"))
    llava.tie_weights()
    assert sum(parameters(read, "llava").values()) == count(llava)
    assert read_config(str(tmp_path / "language")).vision_config.hidden_size == 1024
    assert parameters(read_config(str(tmp_path / "saisa")), "saisa") == parameters(saisa, "saisa")
    assert main(["flops", str(tmp_path / "llava"), "--visual", "0"]) == 0
    assert "0 visual tokens" in capsys.readouterr().out


def test_what_cannot_be_read_is_one_line(tmp_path, capsys):
    assert main(["flops", str(tmp_path / "nowhere")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("saisa: error: ") and error.count("\n") == 1 and "vicuna-7b, vicuna-13b" in error
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert main(["flops", str(tmp_path)]) == 2
    assert "text_config.model_type='bert'" in capsys.readouterr().err


def test_presets_are_supported_language_models():
    assert set(LANGUAGE_MODELS) == {"vicuna-7b", "vicuna-13b", "llama3-8b", "mistral-7b", "qwen2.5-7b"}


# --- the family by name ------------------------------------------------------------------------------------------------


def test_every_member_of_the_family_is_counted_by_name(capsys):
    config = read_config("vicuna-7b")
    found = {}
    for name in MEMBERS:
        model = member(config, name)
        assert model.vision_config.to_dict() == config.vision_config.to_dict()
        counts = account(model, Step(64, 576))
        found[name] = counts["llava" if name == "llava" else "saisa"]
        if name == "llava":  # counted as a SAISA's embedding space, it costs the same, but for its projector
            parts = counts["saisa"]["prompt"]
            assert counts["saisa"]["language_model"] - parts["projectors"] == found[name]["language_model"]
    flops = {name: round(one["language_model"] / 1e12, 2) for name, one in found.items()}
    assert flops == {"llava": 8.5, "naavit": 7.1, "shortv": 4.72, "saisa": 2.86, "saisa-shared": 2.11, "vica": 1.17}
    assert found["vica"]["cache_bytes"] == 2 * 2 * 4096 * (32 * 64 + 8 * 576)
    assert main(["flops", "vicuna-7b", "--family", "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == set(MEMBERS)
    assert main(["flops", "vicuna-7b", "--family"]) == 0
    printed = capsys.readouterr().out
    assert all(
        line in (Path(__file__).parent.parent / "docs" / "family.md").read_text() for line in printed.split("\n")[:8]
    )
    for name, cache in (*((name, "320.00") for name in MEMBERS[:5]), ("vica", "104.00")):
        assert main(["flops", "vicuna-7b", "--member", name]) == 0
        printed = capsys.readouterr().out
        assert re.search(rf"keys and values in the cache +\| +{cache} \|", printed), name
    assert "86% less" in printed


@pytest.mark.parametrize("case", CASES[1:5] + CASES[6:], ids=lambda case: case.name)
def test_formulas_are_what_pytorch_counts_in_every_member(family, case):
    models, args = family
    if case.trained == "lora":
        pytest.importorskip("peft")
    with tasks(models, list(MEMBER_MODELS), case, args) as todo:
        for name, task in todo.items():
            assert task.flops == pytest.approx(measure.flops(task.call), rel=0.01), name


@pytest.mark.parametrize(
    "case", [CASES[1], *CASES[3:5], Case("mixed", 3, 12, 9), Case("kept-beginning", 2, 12, 9), CASES[5]], ids=str
)
def test_formulas_are_what_pytorch_counts_with_narrow_and_folded_projectors(family, case):
    models, args = family
    names = [name for name in NARROW if case.work != "train" or name.endswith("narrow")]
    if case.work == "mixed":
        names += [name for name in ("saisa", "llava", "language_model", *MEMBER_MODELS) if name not in UNPADDED]
    with tasks(models, names, case, args) as todo:
        for name, task in todo.items():
            assert task.flops == pytest.approx(measure.flops(task.call), rel=0.01), name


def test_what_the_benchmark_counts_of_a_member_is_what_the_command_counts(family):
    models, args = family
    with tasks(models, list(MEMBER_MODELS), Case("prefill", 2, 12, 9), args) as todo:
        for key, name in MEMBER_MODELS.items():
            found = account(member(models.saisa.config, name), Step(12, 9, batch=2), itemsize=4)
            found = found["llava" if name == "llava" else "saisa"]
            assert todo[key].flops == sum(found["prompt"].values()) - 2 * encoder_flops(models.saisa.config)
            assert measure.cache_bytes(todo[key].cache()) == found["cache_bytes"]


@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_is_a_model_at_any_depth(name):
    config = member(tiny_config("llama"), name)
    assert SaisaForConditionalGeneration(config).config.text_config.num_hidden_layers == 3
    assert member_settings(name, 40).get("visual_layers") in (None, [0, 6, 8, 9, 10, 13, 14, 16])
    with pytest.raises(ValueError, match="'flamingo' is no member of the family: expected one of llava, naavit"):
        member_settings("flamingo", 3)
