# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa compress`: narrower projectors that make the keys and values of the old ones."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tile_parts import draw, next_processor, our_processor, tiled_saisa

import saisa_hf
from saisa_hf import SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.checkpoints.compress import REPORT, Original, compress
from saisa_hf.checkpoints.from_llava import Fit
from saisa_hf.cli import main


DEMO = Path(saisa_hf.__file__).parent / "demo" / "checkpoint"
QUICK = Fit(pictures=30, held_out=6, steps=8, batch_tokens=720, answer_tokens=4)
PROMPTS = ["list all digits."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images that the demo's model has features of."""
    folder, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for number in range(QUICK.pictures):
        small = generator.integers(0, 255, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(small).resize((48, 48), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
    return folder


def kept_but_for_projectors(found, source):
    """Whether all other weights are those of the source."""
    own, old = found.state_dict(), source.state_dict()
    assert own.keys() == old.keys()
    return all(torch.equal(own[name], old[name]) for name in own if "visual_projector.linear" not in name)


def test_a_command_makes_the_demos_projectors_narrow(folder, tmp_path, capsys):
    command = [
        "compress",
        str(DEMO),
        str(tmp_path / "narrow"),
        "--images",
        str(folder),
        "--projector-hidden-size",
        "48",
    ]
    command += ["--pictures", "30", "--held-out", "6", "--steps", "4", "--dtype", "float32"]
    assert main(command) == 0
    assert "KL from original" in capsys.readouterr().out
    report = json.loads((tmp_path / "narrow" / REPORT).read_text())
    model = SaisaForConditionalGeneration.from_pretrained(tmp_path / "narrow", fold_projectors=True).eval()
    source = SaisaForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32).eval()
    assert model.config.projector_hidden_size == 48 == report["projector_hidden_size"]
    assert model.language_model.layers[3].visual_projector.linear_1.out_features == 48
    assert kept_but_for_projectors(model, source)
    assert [row["layer"] for row in report["layers"]] == [0, 1, 2, 3]
    assert report["agreement"]["fitted"]["kl"] < 0.5 and report["agreement"]["fitted"]["tokens"] > 0
    # errors are those of keys and values on the held-out images, folded or not
    processor = SaisaProcessor.from_pretrained(tmp_path / "narrow")
    images = sorted(path.name for path in folder.iterdir())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).tolist()
    held_out = [Image.open(folder / images[index]) for index in order[:6]]
    with torch.no_grad():
        pixels = processor(images=held_out, return_tensors="pt")["pixel_values"]
        ours, theirs = (one.get_visual_states(pixels).stored.keys_values for one in (model, source))
    for row, found, right in zip(report["layers"], ours, theirs):
        for place, a, b in zip(("keys", "values"), found, right):
            error = float((a - b).square().sum() / b.square().sum())
            assert row["fitted"][place] == pytest.approx(error, rel=0.01)
            assert error < 0.3
    assert not list(tmp_path.glob(".narrow*"))  # the work folder is gone


def test_the_narrowest_width_that_meets_an_error_is_found_and_a_run_resumes(folder, tmp_path):
    said, how = [], {"fit": QUICK, "prompts": PROMPTS, "work_folder": tmp_path / "work"}
    at_32 = compress(str(DEMO), folder, tmp_path / "32", projector_hidden_size=32, log=said.append, **how)
    worst = max((row["fitted"]["keys"] + row["fitted"]["values"]) / 2 for row in at_32["layers"])
    report = compress(str(DEMO), folder, tmp_path / "found", error=worst, log=said.append, **how)
    assert report["projector_hidden_size"] <= 32
    assert all((row["fitted"]["keys"] + row["fitted"]["values"]) / 2 <= worst for row in report["layers"])
    assert any("resuming from" in line for line in said)
    if report["projector_hidden_size"] == 32:  # its layers were not fitted again
        assert report["layers"] == at_32["layers"]
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"no width meets it \(8: "):
        compress(str(DEMO), folder, tmp_path / "none", error=1e-9, log=said.append, **how)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_shared_projector_of_a_model_that_reads_tiles(tmp_path):
    source = tiled_saisa(projector_sharing="shared", visual_layers=[0, 2], projector_hidden_size=48)
    source.save_pretrained(tmp_path / "source")
    processor = our_processor(next_processor())
    processor.save_pretrained(tmp_path / "source")
    images = [draw(number, (24, 12) if number % 2 else (12, 12)) for number in range(16)]
    fit = replace(QUICK, pictures=16, held_out=4)
    report = compress(
        str(tmp_path / "source"),
        images,
        tmp_path / "narrow",
        projector_hidden_size=16,
        fit=fit,
        prompts=PROMPTS,
        log=str,
    )
    assert [row["layer"] for row in report["layers"]] == [0, 2]
    model = SaisaForConditionalGeneration.from_pretrained(tmp_path / "narrow")
    assert kept_but_for_projectors_and_newline(model, source)
    assert model.model.visual_projector.linear_2.in_features == 16
    model.fold_projectors()
    inputs = processor(images=images[1], text="<image>Which?", return_tensors="pt")
    with torch.no_grad():
        assert model(**inputs).logits.isfinite().all()


def kept_but_for_projectors_and_newline(found, source):
    own, old = found.state_dict(), source.state_dict()
    return own.keys() == old.keys() and all(torch.equal(own[n], old[n]) for n in own if "visual_projector" not in n)


def test_what_cannot_be_compressed_is_refused(folder, tmp_path, capsys):
    for settings, message in (
        ({"projector_hidden_size": 128}, "projector_hidden_size=128: expected less than the model's own, 128"),
        ({"projector_hidden_size": 16, "error": 0.1}, "one of projector_hidden_size and error"),
        ({}, "one of projector_hidden_size and error"),
        ({"error": -1.0}, "error=-1.0: expected a positive number"),
    ):
        with pytest.raises(ValueError, match=message):
            compress(str(DEMO), folder, tmp_path / "out", fit=QUICK, **settings)
    source = tiled_saisa()
    source.config.alignment = "embedding_space"
    with pytest.raises(ValueError, match=r"embedding_space.*--from-llava"):
        Original(source)
    command = ["compress", str(DEMO), str(tmp_path / "out"), "--images", str(tmp_path / "missing")]
    assert main([*command, "--error", "0.1"]) == 1
    assert "missing" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
