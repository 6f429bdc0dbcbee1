"""The shipped checkpoint answers as the README says, because it looks at the image; and its training runs."""

import json

import pytest
from PIL import Image

from saisa_hf.cli import main
from saisa_hf.demo import CHECKPOINT
from saisa_hf.demo.asking import ask_model, load
from saisa_hf.demo.run import run_demo
from saisa_hf.demo.scenes import KINDS, held_out_questions
from saisa_hf.demo.train import main as train


def test_the_demo_answers_500_fresh_questions(tmp_path, capsys):
    scores = run_demo(output=tmp_path / "sheet.png")
    right, asked = (sum(column) for column in zip(*scores.values()))
    assert asked == 500 and right >= 450
    assert set(scores) == set(KINDS)
    for kind, (hits, count) in scores.items():
        assert count >= 70 and hits >= 0.8 * count, kind
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size[0] > 800
    assert f"{right / asked:.1%}" in capsys.readouterr().out


def test_with_the_images_of_other_questions_it_fails():
    model, processor = load(CHECKPOINT)
    asked = held_out_questions(140, seed=4)
    scenes = [scene for scene, _ in asked]
    swapped = [(scene, question) for scene, (_, question) in zip(scenes[7:] + scenes[:7], asked)]
    answers = ask_model(model, processor, swapped)
    assert sum(answer == question.answer for answer, (_, question) in zip(answers, swapped)) < 70


def test_the_training_command_writes_a_checkpoint_that_the_demo_loads(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train(["--output", "mine", "--scale", "0.001"]) == 0
    assert {path.name for path in (tmp_path / "mine").iterdir()} >= {path.name for path in CHECKPOINT.iterdir()}
    record = json.loads((tmp_path / "mine" / "training.json").read_text())
    assert record["recipe"]["encoder_steps"] == 2 and set(record["right"]) == set(KINDS)
    assert main(["demo", "--checkpoint", "mine", "--questions", "7", "--output", "sheet.png"]) == 0
    assert "7 questions about unseen images" in capsys.readouterr().out


def test_a_checkpoint_that_is_not_there_is_named(capsys):
    assert main(["demo", "--checkpoint", "nowhere"]) == 1
    assert "nowhere" in capsys.readouterr().err
    with pytest.raises(ValueError, match="questions"):
        run_demo(questions=0, output=None)
