# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Validation in `saisa train`: its loss is the training's, it changes nothing, and the best checkpoint is the result."""

import json
import random
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_accelerate import launch, launch_runs
from training_parts import PLAIN, conversation, distance, losses, run_options, stop_after, write_start

from saisa_hf import SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.answering import Answerer
from saisa_hf.answering.questions import render
from saisa_hf.scoring import get_metric
from saisa_hf.training import BadSample, TrainingOptions, train
from saisa_hf.training.check import check
from saisa_hf.training.record import RECORD, checkpoints
from saisa_hf.training.run import _trainer, load_model, training_data
from saisa_hf.training.validation import Validation


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(autouse=True, scope="module")
def own_precision():
    """A run sets the precision that accelerate computes in, for its process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        yield


def options(start, output, **changes):
    given = {"eval_data": str(start / "q.json"), "save_steps": 2} | changes
    return TrainingOptions(**run_options(start, output, **given))


def evaluations(folder):
    """What the run in `folder` reported of its evaluations, by step: all but times."""
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    timed = ("runtime", "second", "epoch")
    return {
        entry["step"]: {
            key: value for key, value in entry.items() if key.startswith("eval") and not any(t in key for t in timed)
        }
        for entry in history
        if "eval_loss" in entry
    }


# --- options ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"eval_data": [], "eval_steps": 5}, "eval_steps=5 without eval_data: give validation data"),
        ({"eval_data": [], "eval_metric": "anls"}, "eval_metric='anls' without eval_data"),
        ({"eval_data": [], "load_best_model_at_end": True}, "load_best_model_at_end=True without eval_data"),
        ({"eval_data": [], "early_stopping_patience": 2}, "early_stopping_patience=2 without eval_data"),
        ({"eval_data": [], "metric_for_best_model": "loss"}, "metric_for_best_model='loss' without eval_data"),
        ({"eval_metric": "exact_mach"}, "eval_metric: metric 'exact_mach' is not known. Did you mean 'exact_match'?"),
        ({"eval_metric": "multiple_choice_likelihood"}, "scores a list with the log-likelihood of each option"),
        ({"metric_for_best_model": "anls"}, "metric_for_best_model='anls': expected 'loss'."),
        (
            {"metric_for_best_model": "x", "eval_metric": "anls"},
            "metric_for_best_model='x': expected 'loss' or 'anls'.",
        ),
        ({"load_best_model_at_end": True, "eval_steps": 3}, "save_steps=2: expected a multiple of eval_steps=3"),
        ({"load_best_model_at_end": True, "save_steps": 0, "eval_steps": 3}, "save_steps=0: expected a multiple"),
        ({"save_steps": 0}, "eval_data with eval_steps=0 and save_steps=0: give eval_steps"),
        ({"eval_steps": -1}, "eval_steps=-1: expected a number that is not negative"),
        ({"eval_questions": 0}, "eval_questions=0: expected a positive number"),
    ],
)
def test_wrong_options_of_validation_are_named(given, message, start, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        options(start, tmp_path / "run", **given)


def test_validation_data_is_looked_for_before_anything_is_loaded(start, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"eval_data '.*none\.json'"):
        train(options(start, tmp_path / "run", eval_data=str(tmp_path / "none.json")))
    (tmp_path / "run").mkdir()
    shutil.copy(start / "q.json", tmp_path / "run" / "e.json")
    with pytest.raises(ValueError, match=r"output '.*' contains eval_data '.*e\.json', which could be overwritten"):
        train(options(start, tmp_path / "run", eval_data=str(tmp_path / "run" / "e.json")))


IMAGE = "<image>\n"
UNUSABLE = {
    "empty": ([], {}, ValueError, r"e\.json has no samples"),
    "no image": ([conversation(IMAGE + "A?", "B.", image="none.png")], {}, BadSample, r"e\.json, sample 0: image 0"),
    "no answer": ([conversation("A?")], {}, BadSample, "sample 0: no turn of the assistant has text"),
    "a last question": ([conversation("A?", "B.", "C?")], {"eval_metric": "anls"}, BadSample, "as the last two turns"),
    "no choices": (
        [conversation("A?", "B.")],
        {"eval_metric": "multiple_choice"},
        ValueError,
        "sample 0 has no 'choices'",
    ),
    "one of a pair": (
        [conversation(IMAGE + "A?", "Yes", image="1.png") | {"category": "count"}],
        {"eval_metric": "mme"},
        ValueError,
        r"mme: image '1\.png' of count has 1 questions: expected two",
    ),
    "none usable": (
        [conversation("A?")] * 2,
        {"bad_samples": "skip"},
        BadSample,
        "eval_data .* has no sample that can be used",
    ),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_validation_data_that_cannot_be_used_is_named_before_the_training(name, start, tmp_path, monkeypatch):
    records, changes, error, message = UNUSABLE[name]
    (tmp_path / "e.json").write_text(json.dumps(records))
    monkeypatch.setattr("saisa_hf.training.run.load_model", lambda _: pytest.fail("it was loaded"))
    with pytest.raises(error, match=message):
        train(options(start, tmp_path / "run", eval_data=str(tmp_path / "e.json"), images=str(start), **changes))


def test_a_check_of_the_data_names_what_validation_cannot_use(start, tmp_path):
    (tmp_path / "e.json").write_text(json.dumps([conversation("A?", "B."), conversation("A?")]))
    said = []
    found = check(options(start, tmp_path / "run", eval_data=str(tmp_path / "e.json")), samples=0, log=said.append)
    assert found == (14, 1) and "e.json, sample 1: no turn of the assistant has text" in said[0]


# --- the loss ---


def made_trainer(given):
    """The trainer of a run, and the validation."""
    processor = SaisaProcessor.from_pretrained(given.model)
    dataset, collate = training_data(given, processor)
    validation = Validation(given, processor, dataset.encode)
    return _trainer(load_model(given), processor, dataset, collate, 1, given, validation), validation


def test_the_loss_is_the_mean_of_all_learned_tokens_whatever_the_batches(start, tmp_path):
    for index in (1, 5):
        shutil.copy(start / f"{index}.png", tmp_path)
    records = json.loads((start / "q.json").read_text())
    broken = conversation(IMAGE + "A?", "B.", image="none.png")
    (tmp_path / "e.json").write_text(json.dumps([records[1], broken, records[0], records[5], records[4]]))
    found = []
    for size in (1, 2, 4):
        how = {"per_device_batch_size": size, "eval_data": str(tmp_path / "e.json"), "bad_samples": "skip"}
        trainer, validation = made_trainer(options(start, tmp_path / "run", **how))
        trainer.model.train()
        found.append(trainer.evaluate())
    assert len(validation.dataset) == 4
    total = count = 0
    with torch.no_grad():
        for sample in validation.dataset:
            batch = trainer.data_collator([sample])
            del batch["sample_index"]
            labels = batch.pop("labels")[0, 1:]
            logits = trainer.model.eval()(**batch).logits[0, :-1].double()
            total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
            count += (labels != -100).sum().item()
    assert [metrics["eval_loss"] for metrics in found] == pytest.approx([total / count] * 3, rel=1e-6)
    training = trainer.compute_loss(trainer.model, trainer.data_collator(list(validation.dataset)))
    assert training.item() == pytest.approx(total / count, rel=1e-6)


# --- it changes nothing ---


def test_random_numbers_of_an_evaluation_are_not_those_of_the_training(start, tmp_path):
    trainer, _ = made_trainer(options(start, tmp_path / "run", eval_data=str(start / "q.json")))

    def drawn(_=None):
        return {"drawn": [random.random(), np.random.rand(), torch.rand(1).item()]}

    trainer.eval_scores = drawn
    found = []
    for evaluate in (dict, trainer.evaluate):
        random.seed(1)
        np.random.seed(1)
        torch.manual_seed(1)
        metrics = evaluate()
        found.append(drawn())
    assert found[0] == found[1] and metrics["eval_drawn"] == found[0]["drawn"]


def test_questions_are_asked_with_the_template_of_the_training(start, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("saisa_hf.answering.engine.render", lambda *a: read.append(render(*a)) or read[-1])
    how = {"eval_data": str(start / "q.json"), "eval_metric": "exact_match", "chat_template": "chatml"}
    trainer, validation = made_trainer(options(start, tmp_path / "run", **how))
    validation.scores(trainer)
    assert len(read) == len(validation.questions) > 0
    assert all(text.endswith("<|im_end|>\n<|im_start|>assistant\n") for text in read)


@pytest.fixture(scope="module")
def with_and_without(start, tmp_path_factory):
    """The options of a run with dropout, with validation, and its output; and the output of the same without validation."""
    folder = tmp_path_factory.mktemp("runs")
    model = SaisaForConditionalGeneration.from_pretrained(start / "model")
    model.config.text_config.attention_dropout = 0.1
    model.save_pretrained(folder / "model")
    SaisaProcessor.from_pretrained(start / "model").save_pretrained(folder / "model")
    how = {"model": str(folder / "model")}
    given = options(start, folder / "with", eval_metric="anls", eval_questions=7, **how)
    train(given, log=lambda _: None)
    train(options(start, folder / "without", eval_data=[], **how), log=lambda _: None)
    return given, folder / "with", folder / "without"


def test_a_run_with_validation_learns_what_one_without_learns_to_the_last_bit(with_and_without):
    _, one, other = with_and_without
    assert distance(one, other) == 0 and losses(one) == losses(other)
    found = evaluations(one)
    assert list(found) == [2, 4, 6] and all(set(told) == {"eval_loss", "eval_anls"} for told in found.values())
    assert found[6]["eval_loss"] < 0.9 * found[2]["eval_loss"]
    orange = (np.asarray(Image.open(one / "loss.png")) == (200, 90, 30)).all(-1)
    assert orange.sum() > 500


def test_a_run_that_goes_on_reports_the_same_metrics(with_and_without, tmp_path, monkeypatch):
    given, whole, _ = with_and_without

    given = TrainingOptions(**vars(given) | {"output": str(tmp_path / "run")})
    stop_after(2, monkeypatch)
    with pytest.raises(SystemExit):
        train(given, log=lambda _: None)
    monkeypatch.undo()
    train(given, log=lambda _: None)
    assert evaluations(tmp_path / "run") == evaluations(whole)
    assert distance(tmp_path / "run", whole) == 0


def test_the_metric_is_that_of_the_model_that_is_saved(with_and_without):
    given, folder, _ = with_and_without
    processor = SaisaProcessor.from_pretrained(folder)
    dataset, _ = training_data(given, processor)
    validation = Validation(given, processor, dataset.encode)
    model = SaisaForConditionalGeneration.from_pretrained(folder)
    answers = [answer.text for answer in Answerer(model, processor).answer(validation.questions)]
    metric = get_metric("anls")
    assert validation.asked[0] == {"answers": ["Y."], "answer": "Y.", "label": "Y."} and len(answers) == 7
    results = [metric.question(fields, answer) for fields, answer in zip(validation.asked, answers)]
    score = metric.summary(validation.asked, results)["score"]
    assert score == pytest.approx(evaluations(folder)[6]["eval_anls"]) and score > 0


# --- the best, and early stopping ---


def scripted(monkeypatch, scores):
    """Has evaluations find these scores, by step."""
    found = {}

    def score(self, trainer):
        found[trainer.state.global_step] = scores[trainer.state.global_step]
        return {"anls": scores[trainer.state.global_step]}

    monkeypatch.setattr(Validation, "scores", score)
    return found


BEST = {"eval_metric": "anls", "load_best_model_at_end": True}


def test_the_best_checkpoint_is_kept_and_is_the_result(start, tmp_path, monkeypatch):
    """Also where a step that has no checkpoint was better."""
    scripted(monkeypatch, {1: 90.0, 2: 10.0, 3: 80.0, 4: 30.0, 5: 70.0, 6: 20.0})
    said = []
    folder = train(options(start, tmp_path / "run", eval_steps=1, save_total_limit=1, **BEST), log=said.append)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-4", "checkpoint-6"]
    assert said[-1] == f"wrote {folder}, the model of checkpoint-4 (anls 30)"
    assert distance(folder, folder / "checkpoint-4") == 0 < distance(folder, folder / "checkpoint-6")


def test_a_run_ends_early_at_the_same_step_however_often_it_is_resumed(start, tmp_path, monkeypatch):
    found = scripted(monkeypatch, {1: 10.0, 2: 10.0, 3: 10.0, 4: 99.0})
    given = options(start, tmp_path / "run", save_steps=1, early_stopping_patience=2, **BEST)
    folder = train(given, log=lambda _: None)
    assert list(found) == [1, 2, 3] and distance(folder, folder / "checkpoint-1") == 0
    said = []
    train(given, log=said.append)
    assert len(said) == 1 and "has the result of this run already" in said[0]
    for newest in ("checkpoint-3", "checkpoint-2"):  # as if it had been killed before it was finished
        record = json.loads((folder / RECORD).read_text())
        (folder / RECORD).write_text(json.dumps({**record, "finished": False}))
        (folder / "config.json").unlink()
        found.clear()
        train(given, log=said.append)
        assert list(found) == ([] if newest == "checkpoint-3" else [3])
        assert f"resuming from {folder / newest}" in said and distance(folder, folder / "checkpoint-1") == 0
        shutil.rmtree(folder / "checkpoint-3")


def test_the_last_step_is_evaluated_and_the_loss_may_decide(start, tmp_path):
    how = {"load_best_model_at_end": True, "max_steps": 3, "eval_steps": 2, "learning_rate": 1e-9}
    folder = train(options(start, tmp_path / "run", **how), log=lambda _: None)
    found = {step: told["eval_loss"] for step, told in evaluations(folder).items()}
    best = min(found, key=found.get)
    assert list(found) == [2, 3] and distance(folder, folder / f"checkpoint-{best}") == 0


def test_the_best_adapters_are_the_result(start, tmp_path):
    pytest.importorskip("peft")
    how = {"train": "lora", "lora_rank": 2, "max_steps": 2, "save_steps": 1, "load_best_model_at_end": True}
    how |= {"eval_metric": "anls", "eval_questions": 2, "metric_for_best_model": "loss"}
    folder = train(options(start, tmp_path / "run", **how), log=lambda _: None)
    found = {step: told["eval_loss"] for step, told in evaluations(folder).items()}
    files = [folder / "adapter", *(folder / f"checkpoint-{step}" for step in (1, 2))]
    weights = [load_file(path / "adapter_model.safetensors") for path in files]
    same = [all(torch.equal(weights[0][name], other[name]) for name in weights[0]) for other in weights[1:]]
    assert same == [found[1] < found[2], found[2] < found[1]]


def test_what_the_result_depends_on_may_not_change_when_a_run_goes_on(start, tmp_path):
    free = options(start, tmp_path / "run", max_steps=2, save_steps=1, save_total_limit=0)
    train(free, log=lambda _: None)
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    assert not any(key.startswith("eval") for key in record["settings"])
    shutil.copy(start / "q.json", tmp_path / "e.json")
    how = {"max_steps": 2, "save_steps": 1, "load_best_model_at_end": True}
    bound = options(start, tmp_path / "bound", **how)
    train(bound, log=lambda _: None)
    moved = {**how, "eval_data": str(tmp_path / "e.json"), "images": ""}
    said = []
    train(options(start, tmp_path / "bound", **moved), log=said.append)
    assert "has the result of this run already" in said[0]
    with pytest.raises(ValueError, match="early_stopping_patience was 0, is 3"):
        train(options(start, tmp_path / "bound", **how, early_stopping_patience=3))
    (tmp_path / "e.json").write_text(json.dumps([conversation("A?", "B.")]))
    with pytest.raises(ValueError, match="eval_data was "):
        train(options(start, tmp_path / "bound", **moved))


def test_a_run_that_goes_on_saves_and_evaluates_as_it_is_told_now(start, tmp_path, monkeypatch):
    given = options(start, tmp_path / "run", max_steps=2, eval_steps=2)
    train(given, log=lambda _: None)
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    settings = {**record["settings"], "max_steps": 5}
    (tmp_path / "run" / RECORD).write_text(json.dumps({**record, "settings": settings, "finished": False}))
    (tmp_path / "run" / "config.json").unlink()
    train(options(start, tmp_path / "run", max_steps=5, save_steps=1, eval_steps=1), log=lambda _: None)
    assert [path.name for path in checkpoints(tmp_path / "run")] == [f"checkpoint-{step}" for step in (2, 3, 4, 5)]
    assert list(evaluations(tmp_path / "run")) == [2, 3, 4, 5]


# --- several processes ---


@pytest.mark.slow
@pytest.mark.parametrize("config", ["ddp", "fsdp2"])
def test_two_processes_find_what_one_finds(config, with_and_without, start, tmp_path):
    """Of an odd number of samples and questions, with the best model as the result."""
    shutil.copytree(with_and_without[2], tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*", "train*"))
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    written["text_config"]["attention_dropout"] = 0.0  # else each process has its own
    (tmp_path / "model" / "config.json").write_text(json.dumps(written))
    records = json.loads((start / "q.json").read_text())[:11]
    (start / "odd.json").write_text(json.dumps(records))
    how = {"eval_data": str(start / "odd.json"), "eval_metric": "anls", "load_best_model_at_end": True}
    how |= {"metric_for_best_model": "loss", "model": str(tmp_path / "model"), "unshare_projectors": False}
    how |= PLAIN | {"save_steps": 3, "learning_rate": 0.2}
    alone = train(options(start, tmp_path / "alone", **how), log=lambda _: None)
    if config == "ddp":
        given = run_options(start, tmp_path / "run", **how | {"per_device_batch_size": 1})
        (tmp_path / "c.yaml").write_text(json.dumps(given))
        launch("ddp", "-m", "saisa_hf", "train", tmp_path / "c.yaml")
    else:
        launch_runs(config, tmp_path, start, [("run", how)])
    found, expected = evaluations(tmp_path / "run"), evaluations(alone)
    assert list(found) == list(expected) == [3, 6]
    for step, told in expected.items():
        assert found[step] == pytest.approx(told, rel=1e-4) and told["eval_anls"] > 0
    assert distance(tmp_path / "run", alone) < 1e-4
