# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""ViCA as a setting of this model, against what its authors' code computed (fixtures/vica, see README.md there)."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_convert import fixture_weights, write_weights
from tiny_models import BOS, prompts_from_rows, tiny_config, tiny_model
from transformers import CLIPVisionConfig, CLIPVisionModel

from saisa_hf import SaisaForConditionalGeneration
from saisa_hf.checkpoints.convert import convert
from saisa_hf.cli import main
from saisa_hf.compat_saisa import CACHE
from saisa_hf.costs.presets import VICA_LAYERS


FIXTURE = Path(__file__).parent / "fixtures" / "vica"
REFERENCE = Path(__file__).parent / "fixtures" / "reference"
VISUAL_TOKENS, IMAGE = 576, -200
PROMPTS = {
    "image": [[1, 17, 28, 39, IMAGE, 50, 61, 72, 83]],
    "image_first": [[IMAGE, 50, 61, 72]],
    "padded": [[1, 17, 28, 39, IMAGE, 50, 61, 72], [1, 44, IMAGE, 91, 13, 25]],
}


def read(name):
    return json.loads((FIXTURE / name).read_text())


def tensors():
    """Those of a checkpoint in their layout, the encoder's beside."""
    config, own = read("config.json"), {}
    h, m, vocabulary, c = (config[x] for x in ("hidden_size", "intermediate_size", "vocab_size", "mm_hidden_size"))
    shapes = {
        "model.embed_tokens.weight": (vocabulary, h),
        "model.norm.weight": (h,),
        "lm_head.weight": (vocabulary, h),
    }
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{x}_proj.weight": (h, h) for x in "qkvo"}
        shapes |= {f"{layer}.mlp.{x}_proj.weight": (h, m) if x == "down" else (m, h) for x in ("gate", "up", "down")}
        shapes |= {f"{layer}.{x}_layernorm.weight": (h,) for x in ("input", "post_attention")}
    for number, columns in ((0, c), (2, h)):
        shapes |= {f"model.mm_projector.{number}.weight": (h, columns), f"model.mm_projector.{number}.bias": (h,)}
    own = {name: torch.from_numpy(fixture_weights.weight(name, shape)) for name, shape in shapes.items()}
    tower = {}
    for name, x in CLIPVisionModel(CLIPVisionConfig.from_dict(read("vision_config.json"))).named_parameters():
        name = "vision_model." + name.removeprefix("vision_model.")
        tower[name] = torch.from_numpy(fixture_weights.weight(f"vision_tower.{name}", tuple(x.shape)))
    return own, tower


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vica")
    (folder / "vision").mkdir()
    own, tower = tensors()
    write_weights(folder, own)
    write_weights(folder / "vision", tower)
    shutil.copyfile(FIXTURE / "config.json", folder / "config.json")
    shutil.copyfile(FIXTURE / "vision_config.json", folder / "vision" / "config.json")
    shutil.copyfile(REFERENCE / "mha" / "preprocessor_config.json", folder / "vision" / "preprocessor_config.json")
    return folder


@pytest.fixture(scope="module")
def converted(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "vica"
    convert(source, folder, visual_layers=[0, 2], log=lambda line: None)
    return folder


@cache
def expected():
    return load_file(FIXTURE / "expected.safetensors")


def inputs_of(name, image_token):
    """Padded prompts as this package takes them."""
    rows = [[y for x in row for y in ([image_token] * VISUAL_TOKENS if x == IMAGE else [x])] for row in PROMPTS[name]]
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    pixels = [torch.from_numpy(fixture_weights.uniform(f"pixels.{i}", (3, 336, 336))) for i in range(len(rows))]
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.stack(pixels)}


@pytest.mark.parametrize("case", sorted({".".join(name.split(".")[:3]) for name in expected()}))
def test_the_authors_code_computed_the_same(converted, case):
    kind, _, prompt = case.split(".")
    skips = kind == "7b"
    model = SaisaForConditionalGeneration.from_pretrained(converted, leading_text_skips_attention=skips).eval()
    assert model.config.visual_layers == [0, 2] and model.config.projector_sharing == "shared"
    token, theirs = model.config.image_token_id, expected()
    inputs = inputs_of(prompt, token)
    with torch.no_grad():
        logits = model(**inputs).logits
    is_text = inputs["attention_mask"].bool() & (inputs["input_ids"] != token)
    for b, own in enumerate(is_text):
        torch.testing.assert_close(logits[b, own][:, :300], theirs[f"{case}.{b}.logits"], atol=1e-5, rtol=0)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = model.generate(**inputs, **options, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(found.sequences[:, -8:], theirs[f"{case}.generated"])
    scores = torch.stack(found.scores, 1)[..., :300]
    torch.testing.assert_close(scores, theirs[f"{case}.scores"], atol=1e-5, rtol=0)
    texts = max(sum(x != IMAGE for x in row) for row in PROMPTS[prompt])
    held = [layer.keys.shape[2] for layer in getattr(found, CACHE).layers]
    assert held == [inputs["input_ids"].shape[1] + 7 if i in (0, 2) else texts + 7 for i in range(4)]


def test_the_named_layers_are_the_published_ones(source, tmp_path, capsys):
    assert list(map(len, VICA_LAYERS.values())) == [8, 8, 9]
    assert main(["convert", str(source), str(tmp_path / "a"), "--visual-layers", "0,2", "--no-progress"]) == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["visual_layers"] == [0, 2] and not config.get("leading_text_skips_attention", False)
    for given, named in (
        ("vica-7b", "visual_layers=[0, 1, 7, 8, 9, 10, 11, 14]"),  # of more layers than this model has
        ("vica-1b", "visual_layers='vica-1b': expected vica-7b, vica-13b, vica-2.7b"),
        ("0,9", "visual_layers=[0, 9]"),
        ("0,,2", "visual_layers='0,,2'"),
    ):
        assert main(["convert", str(source), str(tmp_path / "b"), "--visual-layers", given]) != 0
        assert named in capsys.readouterr().err and not (tmp_path / "b").exists()
    assert main(["convert", str(source), str(tmp_path / "b")]) != 0
    assert "one of ViCA with --visual-layers" in capsys.readouterr().err
    with pytest.raises(ValueError, match="shared_projector='keep'"):
        convert(source, tmp_path / "b", shared_projector="keep", visual_layers=[0])


def test_the_width_says_whether_leading_text_skips_attention_as_in_their_code():
    from saisa_hf.checkpoints.authors_layout import vica_settings

    assert vica_settings([0, 1], {"hidden_size": 4096})["leading_text_skips_attention"]
    assert not vica_settings([0, 1], {"hidden_size": 5120})["leading_text_skips_attention"]
    assert vica_settings("vica-7b", {})["leading_text_skips_attention"]
    assert not vica_settings("vica-2.7b", {})["leading_text_skips_attention"]


# --- text in front of the image without attention, anywhere ----------------------------------------------------------------

ROWS = [[BOS, 5, 6, 7], [BOS, 8, "image", 9, 10, 11], ["image", 12, "image", 14], [BOS, 13, 9, "image", 7, 6]]


@pytest.mark.parametrize("text", ["llama", "olmo2", "gemma2"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_leading_text_skips_attention_in_batches_of_unlike_prompts(text, side):
    model = tiny_model(text, attn_implementation="eager", visual_layers=[1], leading_text_skips_attention=True)
    prompts, seen = prompts_from_rows(ROWS, side), {}
    for i, layer in enumerate(model.language_model.layers):
        layer.self_attn.register_forward_hook(lambda _module, _args, output, i=i: seen.update({i: output[0]}))
    with torch.no_grad():
        together = model(**prompts.prompt, output_attentions=True)
        for b, leading in enumerate((0, 2, 0, 3)):
            row = prompts.row(b)
            alone = model(**row.prompt)
            real = prompts.attention_mask[b].bool()
            torch.testing.assert_close(together.logits[b, real], alone.logits[0], atol=1e-5, rtol=1e-5)
            for i in range(3):
                zero = (seen[i][0] == 0).all(-1)
                assert zero.sum() == leading and zero[:leading].all()
                rows = together.attentions[i][b][:, real]
                assert (rows[:, :leading] == 0).all() and (rows[:, -1] != 0).any()


def test_a_conversation_that_begins_with_text_attends_until_an_image_comes_with_a_first_turn():
    model = tiny_model("llama", leading_text_skips_attention=True)
    plain = tiny_model("llama")
    text = prompts_from_rows([[BOS, 5, 6, 7]])
    with torch.no_grad():
        ours, usual = model(**text.prompt, use_cache=True), plain(**text.prompt, use_cache=True)
        assert torch.equal(ours.logits, usual.logits)
        turn = prompts_from_rows([[8, "image", 9, 10]])
        mask = torch.ones(1, 11, dtype=torch.long)
        more = {"input_ids": turn.input_ids, "pixel_values": turn.pixel_values, "attention_mask": mask}
        assert torch.equal(model(**more, **{CACHE: ours[CACHE]}).logits, plain(**more, **{CACHE: usual[CACHE]}).logits)


def test_wrong_settings_are_named():
    for value in (None, "yes", 1):
        with pytest.raises(ValueError, match="leading_text_skips_attention"):
            tiny_config("llama", leading_text_skips_attention=value)
    with pytest.raises(ValueError, match="leading_text_skips_attention=True: in embedding space"):
        tiny_config("llama", alignment="embedding_space", leading_text_skips_attention=True)
    model, prompts = tiny_model("llama", leading_text_skips_attention=True), prompts_from_rows([[5, "image", 6, 7, 5]])
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 1]])
    with pytest.raises(ValueError, match="position_ids pack several samples"):
        model(prompts.input_ids, prompts.pixel_values, position_ids=positions, use_cache=False)
