# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa check`: a sound checkpoint has no problems, and each kind of damage is named; what `from_pretrained` says of damaged
weights."""

import json
import shutil

import pytest
import torch
from apart import alone, succeeds
from safetensors.torch import load_file, save_file
from test_fuzz_weights import DAMAGE, INDEX, NORM, SINGLE, saved  # noqa: F401, a fixture
from tiny_models import TEXT_CONFIGS, VISION_CONFIGS, tiny_model

from saisa_hf import SaisaForConditionalGeneration
from saisa_hf.checkpoint_saisa import write_code_files
from saisa_hf.checkpoints.check import check, problems
from saisa_hf.cli import main
from saisa_hf.demo import CHECKPOINT


def said(folder):
    """The problems of a checkpoint, a line each."""
    return [f"{one.part}: {one.text}" for one in check(folder, log=lambda line: None) if one.kind == "problem"]


@pytest.fixture
def demo(tmp_path):
    return shutil.copytree(CHECKPOINT, tmp_path / "demo")


def change(file, **entries):
    content = json.loads(file.read_text()) | entries
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not ...}))


def change_weights(folder, change):
    tensors = load_file(folder / SINGLE)
    change(tensors)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def test_the_shipped_checkpoint_is_sound(capsys):
    assert main(["check", str(CHECKPOINT)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        ["ok", f"{part}:"] for part in ("config", "weights", "generation", "processor", "code")
    ]
    assert main(["check", str(CHECKPOINT), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["sound"] and {one["kind"] for one in found["findings"]} == {"ok"}


@pytest.mark.parametrize("text", TEXT_CONFIGS)
def test_checkpoints_of_every_language_model_are_sound(tmp_path, text):
    tiny_model(text).save_pretrained(tmp_path)
    assert said(tmp_path) == []


@pytest.mark.parametrize("vision", VISION_CONFIGS)
def test_checkpoints_of_every_encoder_are_sound(tmp_path, vision):
    tiny_model("llama", vision).save_pretrained(tmp_path, max_shard_size="20KB")
    assert said(tmp_path) == []


LAYER = "model.language_model.layers.1.visual_projector.linear_1.weight"


@pytest.mark.parametrize(
    "change, wanted",
    [
        (lambda w: w[LAYER].__setitem__((0, 3), torch.nan), [f"{SINGLE}: tensor {LAYER} has 1 NaN and 0 infinite numbers"]),
        (lambda w: w[LAYER].__setitem__(0, torch.inf), [f"tensor {LAYER} has 0 NaN and", "infinite numbers among"]),
        (lambda w: w.pop(LAYER), [f"{SINGLE}: tensor {LAYER} is missing"]),
        (lambda w: w.update({LAYER: w[LAYER][:-1].clone()}), [f"tensor {LAYER} has shape (", "by config.json"]),
        (lambda w: w.update({LAYER: w[LAYER].int()}), [f"tensor {LAYER} is I32, expected floating-point numbers"]),
        (lambda w: w.update({"model.other": w.pop(LAYER)}), ["tensor model.other is unknown", f"tensor {LAYER} is missing"]),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_tensor_is_named_with_its_file(demo, change, wanted):
    change_weights(demo, change)
    found = "\n".join(said(demo))
    assert all(part in found for part in wanted), found


def test_dtypes_that_differ_are_a_note_and_no_problem(demo):
    change_weights(demo, lambda tensors: tensors.update({LAYER: tensors[LAYER].float()}))
    found = check(demo, log=lambda line: None)
    assert not problems(found)
    assert any(one.kind == "note" and "125 float16, 1 float32" in one.text for one in found)


@pytest.mark.parametrize(
    "file, entries, wanted",
    [
        ("config.json", {"model_type": "llava"}, "config: {demo}/config.json: model_type='llava', expected 'saisa'"),
        ("config.json", {"image_token_id": 5}, "processor: its image token '<image>' is 4, expected image_token_id=5"),
        (
            "processor_config.json",
            {"image_seq_length": 30},
            "an image becomes 30 times '<image>', expected image_seq_length",
        ),
        ("config.json", {"vision_feature_layer": 99}, "config: {demo}/config.json: vision_feature_layer=99"),
        (
            "generation_config.json",
            {"eos_token_id": 10**6},
            "generation_config.json: eos_token_id has 1000000, expected",
        ),
        ("generation_config.json", {"suppress_tokens": [3, -5]}, "suppress_tokens has -5, expected an index below"),
        ("processor_config.json", {"image_token": "<picture>"}, "processor: "),
        ("tokenizer_config.json", {"chat_template": "{% if %}"}, ""),
    ],
)
def test_what_is_wrong_with_the_settings_is_named(demo, file, entries, wanted):
    change(demo / file, **entries)
    found = "\n".join(said(demo))
    assert wanted.format(demo=demo) in found, found


def test_a_chat_template_that_loses_the_image_or_cannot_be_rendered(demo):
    (demo / "chat_template.jinja").write_text("{{ messages[0]['content'][-1]['text'] }}")
    assert any("its chat template makes" in one and "one of them is lost" in one for one in said(demo))
    (demo / "chat_template.jinja").write_text("{% if %}")
    assert any("its chat template cannot be rendered" in one for one in said(demo))


def test_code_files_that_are_missing_are_a_problem_and_other_ones_a_note(demo):
    for name in ("attention_saisa.py", "modeling_saisa.py"):
        (demo / name).unlink()
    (demo / "attention_saisa.py").write_text("# older\n")
    found = check(demo, log=lambda line: None)
    assert any("modeling_saisa.py missing" in one.text and one.kind == "problem" for one in found)
    assert any("attention_saisa.py not as this release" in one.text and one.kind == "note" for one in found)


def test_visual_states_in_the_folder_are_read_too(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path)
    states = model.get_visual_states(pixel_values=torch.randn(2, 3, 8, 8))
    states.save(tmp_path / "states.safetensors")
    assert any(one.part == "states" and one.kind == "ok" for one in check(tmp_path, log=lambda line: None))
    content = (tmp_path / "states.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[:100])
    assert [one for one in said(tmp_path) if one.startswith("states: ") and "cut.safetensors cannot be read" in one]
    tensors = load_file(tmp_path / "states.safetensors")
    first = sorted(tensors)[0]
    metadata = {"format": "saisa visual states 1", "fingerprint": "?"}
    save_file(
        {name: x for name, x in tensors.items() if name != first}, tmp_path / "states.safetensors", metadata=metadata
    )
    assert any(one.startswith("states: ") and "states.safetensors" in one for one in said(tmp_path))


def test_a_folder_that_is_not_there_or_no_checkpoint(tmp_path, capsys):
    assert main(["check", str(tmp_path / "none")]) == 1
    assert "is not a folder" in capsys.readouterr().err
    assert main(["check", "user/name"]) == 1
    assert "`hf download` a repository first" in capsys.readouterr().err
    assert main(["check", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert f"problem  config: {tmp_path}/config.json is missing" in out and "holds no weights" in out


def test_every_damage_of_weights_is_a_problem(saved, tmp_path):  # noqa: F811
    """Not of values within the weights, which nothing but a checksum could tell, nor of what every release reads."""
    sound, folder = [], tmp_path / "copy"
    for kind, cases in DAMAGE.items():
        for name, damage in [*cases.items()][::3]:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(saved / kind, folder)
            damage(folder)
            try:
                SaisaForConditionalGeneration.from_pretrained(folder)
            except (ValueError, OSError):
                if not said(folder):
                    sound.append(f"{kind}: {name}")
    assert not sound


def test_an_error_that_is_not_of_the_weights_is_left_as_it_is(saved, monkeypatch):  # noqa: F811
    def full(*_, **__):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        SaisaForConditionalGeneration.from_pretrained(saved / "one")


def test_weights_of_another_size_name_the_tensor_on_the_way_of_remote_code_too(saved, tmp_path):  # noqa: F811
    from transformers import AutoModelForImageTextToText

    folder = shutil.copytree(saved / "many", tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] += 2
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=r"model-.*\.safetensors: tensor model\..*mlp.* expected floats .* by config\.json"
    ):
        AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    (folder / INDEX).write_text("{")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is no index"):
        AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)


def test_a_variant_and_a_subfolder_are_looked_into(tmp_path):
    tiny_model().save_pretrained(tmp_path / "sub", variant="fp16")
    (tmp_path / "sub" / "model.fp16.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"sub/model\.fp16\.safetensors cannot be read"):
        SaisaForConditionalGeneration.from_pretrained(tmp_path, subfolder="sub", variant="fp16")


@pytest.mark.parametrize(
    "kind, damage, file",
    [
        ("one", "cut at 0.5", SINGLE),
        ("many", "cut at 0.5", "model-00006-of-00006.safetensors"),
        ("many", "index cut", INDEX),
        ("many", "weight_map number", INDEX),
        ("many", "shard 5", INDEX),
    ],
)
def test_without_the_package_the_file_is_named_all_the_same(saved, tmp_path, monkeypatch, kind, damage, file):  # noqa: F811
    def missing(*_):
        raise ImportError

    monkeypatch.setattr("saisa_hf.checkpoint_saisa.from_package", missing)
    folder = shutil.copytree(saved / kind, tmp_path / "copy")
    DAMAGE[kind][damage](folder)
    with pytest.raises(ValueError, match=rf"{file} cannot be read: .*Download or copy it again"):
        SaisaForConditionalGeneration.from_pretrained(folder)


SUBFOLDER = """
import sys
from transformers import AutoModelForImageTextToText
try:
    how = {"subfolder": "second", "trust_remote_code": True}
    model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], **how)
    print(type(model).__module__)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_checkpoint_in_a_subfolder_loads_with_the_code_at_the_top(saved, tmp_path):  # noqa: F811
    """Without this package: transformers looks for code at the top alone."""
    repository = tmp_path / "repository"
    shutil.copytree(saved / "one", repository / "second")

    def load():
        return succeeds(SUBFOLDER, repository, environment=alone(tmp_path / "home"), cwd=tmp_path).stdout

    assert "does not appear to have a file named configuration_saisa.py" in load()
    write_code_files(repository)
    assert load().startswith("transformers_modules.")
    (repository / "second" / SINGLE).write_bytes(b"")
    assert "second/model.safetensors cannot be read" in load()
