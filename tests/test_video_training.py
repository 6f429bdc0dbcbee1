"""Training on texts, single images, several images and videos in one run, which resumes to the last bit."""

import dataclasses
import json

import pytest
from training_parts import conversation, distance, losses, run_options, stop_after, write_start
from video_parts import write_video

from saisa_hf.training import TrainingOptions, train
from saisa_hf.training.check import check
from saisa_hf.training.trainer import checkpoints


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """`write_start` with records of all kinds."""
    folder = write_start(tmp_path_factory.mktemp("start"))
    for number in range(2):
        write_video(folder / f"{number}.mp4", count=10 + 5 * number, rate=10, size=(32, 24))
    records = json.loads((folder / "q.json").read_text())
    records[1:3] = [
        {**conversation("<video>\nA?", "Yes.", "B?", "No."), "video": "0.mp4"},
        {**conversation("<image>\nA <video> and <image>?", "Yes.", image=["1.png", "2.png"]), "videos": ["1.mp4"]},
    ]
    records[5] = conversation("<image><image><image>\nA?", "No.", image=["5.png", "6.png", "5.png"])
    (folder / "q.json").write_text(json.dumps(records))
    settings = json.loads((folder / "model" / "processor_config.json").read_text())
    settings["video_settings"] = {"num_frames": 3, "timestamps": True}
    (folder / "model" / "processor_config.json").write_text(json.dumps(settings))
    return folder


def options(start, output, **changes):
    given = {"max_steps": 4, "unshare_projectors": False, **changes}
    return TrainingOptions(**run_options(start, output, **given))


def test_a_run_on_everything_resumes_to_the_last_bit(start, tmp_path, monkeypatch):
    whole = train(options(start, tmp_path / "whole", save_steps=0), log=lambda _: None)

    stop_after(1, monkeypatch)
    given = options(start, tmp_path / "run", save_steps=0)
    with pytest.raises(SystemExit):
        train(given, log=lambda _: None)
    assert [path.name for path in checkpoints(given.output)] == ["checkpoint-2"]
    monkeypatch.undo()
    train(dataclasses.replace(given), log=lambda _: None)
    assert losses(given.output) == losses(whole) and len(losses(whole)) == 4
    assert distance(given.output, whole) == 0


def test_the_data_check_counts_frames(start):
    said = []
    assert check(options(start, start / "out"), samples=2, log=said.append) == (12, 0)
    assert any("3 images" in line for line in said) and any("12 samples with 17 images" in line for line in said), said
