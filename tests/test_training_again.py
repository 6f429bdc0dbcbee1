"""`saisa train` given again, or given an output that is not its own: a finished run stays as it is, another run or model is
not touched."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from training_parts import conversation, distance, losses, processor_for, run_options, write_start

from saisa_hf.cli import main
from saisa_hf.training import TrainingOptions, train
from saisa_hf.training.inputs import check_output
from saisa_hf.training.record import RECORD, UNFINISHED, begin, differences, finish, held, look, request
from saisa_hf.training.trainer import checkpoints


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def finished(start, tmp_path_factory):
    """Two of the three steps of a pass over the data."""
    return train(options(start, tmp_path_factory.mktemp("finished") / "run"), log=lambda _: None)


@pytest.fixture
def output(finished, tmp_path):
    """A copy of the finished run."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def options(start, output, **changes):
    return TrainingOptions(**run_options(start, output, **{"max_steps": 2, "save_steps": 1} | changes))


def contents(folder):
    """All that is in a folder, with the times of the last change."""
    return {
        str(path.relative_to(folder)): path.read_bytes() + str(path.stat().st_mtime_ns).encode()
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def told(options):
    said = []
    assert train(options, log=said.append) == Path(options.output)
    return said


# --- finished ---


def test_a_finished_run_says_so_and_changes_nothing(start, output):
    before = contents(output)
    (said,) = told(options(start, output))
    assert str(output) in said and "has the result of this run already." in said and "overwrite" in said
    free = {"logging_steps": 7, "workers": 1, "save_steps": 5, "per_device_batch_size": 2, "bad_samples": "skip"}
    assert told(options(start, output, **free)) == [said]
    assert contents(output) == before


def test_the_command_says_so_before_it_loads_anything(start, output, tmp_path, capsys, monkeypatch):
    config = tmp_path / "c.yaml"
    config.write_text(json.dumps(vars(options(start, output))))
    monkeypatch.setattr("saisa_hf.training.run.train", lambda options: pytest.fail("training"))
    assert main(["train", str(config)]) == 0
    assert "has the result of this run already" in capsys.readouterr().out
    code = f"import sys; from saisa_hf.cli import main; assert main(['train', {str(config)!r}]) == 0; "
    code += "assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=120)


def test_a_finished_run_of_an_older_release_is_known_by_its_steps(start, output):
    (output / RECORD).unlink()
    before = contents(output)
    (said,) = told(options(start, output))
    assert "without a record of its settings" in said
    with pytest.raises(ValueError, match="max_steps was 2, is 3"):
        train(options(start, output, max_steps=3), log=lambda _: None)
    assert contents(output) == before


def test_copies_of_model_and_data_are_the_same_request(start, output, tmp_path):
    shutil.copytree(start, tmp_path / "start")
    assert look(options(tmp_path / "start", output)) == "finished"


# --- something else is asked for ---


def with_other_data(start, tmp_path):
    records = [*json.loads((start / "q.json").read_text()), conversation("D?", "X.")]
    (tmp_path / "other.json").write_text(json.dumps(records))
    return {"data": str(tmp_path / "other.json"), "images": str(start)}


def with_another_model(start, tmp_path):
    shutil.copytree(start / "model", tmp_path / "model")
    with open(tmp_path / "model" / "model.safetensors", "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"\1" * 8)
    return {"model": str(tmp_path / "model")}


OTHER = {
    "model": (with_another_model, r"model was '\S+/start\d+/model', is '\S+/model'"),
    "data": (with_other_data, r"data was '\S+/q.json', is '\S+/other.json'"),
    "learning rate": (lambda *_: {"learning_rate": 2e-2}, "learning_rate was 0.01, is 0.02"),
    "more steps": (lambda *_: {"max_steps": 6}, "max_steps was 2, is 6"),
    "epochs": (lambda *_: {"max_steps": 0, "epochs": 2}, "epochs was 'not given', is 2.0.*max_steps was 2, is 0"),
    "seed": (lambda *_: {"seed": 3}, "seed was 0, is 3"),
    "stage": (
        lambda *_: {"train": "projectors", "unshare_projectors": False},
        "train was 'projectors.language_model', is 'projectors'; unshare_projectors was True, is False",
    ),
    "adapters": (lambda *_: {"train": "lora"}, "train was 'projectors.language_model', is 'lora'"),
}


@pytest.mark.parametrize("what", OTHER)
@pytest.mark.parametrize("state", ["result", "checkpoints"])
def test_another_request_is_refused_and_what_differs_is_named(what, state, start, output, tmp_path):
    change, message = OTHER[what]
    if state == "checkpoints":
        (output / "config.json").unlink()
        record = json.loads((output / RECORD).read_text())
        (output / RECORD).write_text(json.dumps(record | {"finished": False}))
        assert look(options(start, output)) == UNFINISHED
    before = contents(output)
    with pytest.raises(
        ValueError, match=f"has.* {state} of a run with other settings: .*{message}.*overwrite"
    ) as error:
        train(options(start, output, **change(start, tmp_path)), log=lambda _: None)
    assert ("start from it (model: " in str(error.value)) == (state == "result")
    assert contents(output) == before


def test_data_that_changed_in_place_are_other_data(start, output, tmp_path):
    shutil.copytree(start, tmp_path / "start")
    text = (tmp_path / "start" / "q.json").read_text()
    (tmp_path / "start" / "q.json").write_text(text.replace("Z.", "W."))
    shutil.rmtree(output)
    begin_and_stop(options(start, output))
    record = json.loads((output / RECORD).read_text())
    record["data"][0]["path"] = str(tmp_path / "start" / "q.json")
    (output / RECORD).write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"the contents of data '\S+/start/q.json' have changed"):
        look(options(tmp_path / "start", output))


def begin_and_stop(given):
    """An output with a checkpoint of a run that has begun."""
    with held(given.output):
        begin(given)
    (Path(given.output) / "checkpoint-1").mkdir()


def test_a_run_without_a_checkpoint_has_nothing_to_lose(start, tmp_path):
    given = options(start, tmp_path / "run")
    with held(given.output):
        begin(given)
    assert look(options(start, tmp_path / "run", learning_rate=1.0)) == "new"


def test_more_or_fewer_data_files_differ(start, tmp_path):
    given = options(start, tmp_path / "run")
    begin_and_stop(given)
    with pytest.raises(ValueError, match=r"data was '(\S+/q.json)', is '\1', '\1'"):
        look(options(start, given.output, data=[str(start / "q.json")] * 2))


def test_of_streams_workers_and_batches_decide_the_order(start, tmp_path):
    def asked(**changes):
        return request(options(start, tmp_path / "run", **changes))

    fewer = {"workers": 1, "per_device_batch_size": 1}
    assert differences(asked(), asked(**fewer)) == []
    found = differences(asked(streaming=True), asked(streaming=True, **fewer))
    assert sorted(line.split()[0] for line in found) == ["per_device_batch_size", "workers"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"finished": 1}', '{"finished": true, "settings": {}}', "[" * 9999]
)
def test_a_damaged_record_is_named(text, start, output):
    (output / RECORD).write_text(text)
    with pytest.raises(ValueError, match=rf"{RECORD} is damaged.*overwrite"):
        look(options(start, output))


# --- starting over ---


def test_overwrite_starts_over(start, output, finished):
    (output / "model-00002-of-00002.safetensors").write_bytes(b"of an older run")
    given = options(start, output, max_steps=3, overwrite=True)
    assert not any("resuming" in line for line in told(given))
    assert [path.name for path in checkpoints(output)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert len(losses(output)) == 3 and distance(output, finished) > 0
    assert {path.name for path in output.iterdir()} - {"checkpoint-3"} == {path.name for path in finished.iterdir()}


def test_resume_false_does_not_mix_two_runs(start, output):
    with pytest.raises(ValueError, match=r"resume=False: .* has a run already. .*overwrite"):
        train(options(start, output, resume=False), log=lambda _: None)


def test_a_model_of_unknown_origin_is_not_replaced(start, tmp_path):
    processor_for().save_pretrained(tmp_path / "mine")
    shutil.copy(start / "model" / "config.json", tmp_path / "mine")
    before = contents(tmp_path / "mine")
    with pytest.raises(ValueError, match="mine' has a model already, which this run would replace"):
        train(options(start, tmp_path / "mine"), log=lambda _: None)
    assert contents(tmp_path / "mine") == before


def test_an_unfinished_run_of_an_older_release_resumes_with_a_warning(start, output, finished):
    for name in (RECORD, "config.json", "trainer_state.json"):
        (output / name).unlink()
    shutil.rmtree(output / "checkpoint-2")
    (line,) = (line for line in told(options(start, output)) if "resuming" in line)
    assert re.search(rf"checkpoint-1; nothing tells whether its settings were the same, as it has no {RECORD}", line)
    assert distance(output, finished) == 0 and look(options(start, output)) == "finished"


def test_a_run_with_its_last_checkpoint_only_takes_no_step_more(start, output, finished):
    """Killed between its last checkpoint and its result, in the middle of a pass over the data."""
    record = json.loads((output / RECORD).read_text())
    (output / RECORD).write_text(json.dumps(record | {"finished": False}))
    (output / "config.json").unlink()
    (output / ".partial" / "result").mkdir(parents=True)
    told(options(start, output))
    assert losses(output) == losses(finished) and distance(output, finished) == 0
    assert {path.name for path in output.iterdir()} == {path.name for path in finished.iterdir()}
    assert json.loads((output / RECORD).read_text())["steps"] == 2


def test_two_runs_do_not_write_to_one_folder(start, tmp_path, monkeypatch):
    monkeypatch.setattr("saisa_hf.training.record.LOCK_WAIT", 0)
    with held(tmp_path / "run"), pytest.raises(OSError, match="Another run writes to"):
        train(options(start, tmp_path / "run"), log=lambda _: None)


def test_a_record_says_what_was_asked_when_the_run_began(start, tmp_path):
    given = options(start, tmp_path / "run")
    begin_and_stop(given)
    record = json.loads((tmp_path / "run" / RECORD).read_text())
    finish(options(start, tmp_path / "run", learning_rate=3.0), steps=2)
    now = json.loads((tmp_path / "run" / RECORD).read_text())
    assert now == record | {"finished": True, "steps": 2} and record["settings"]["learning_rate"] == 1e-2


# --- the place ---


@pytest.mark.parametrize("how", ["same", "relative", "symlink", "inside", "containing", "with overwrite"])
def test_an_output_at_the_model_is_refused_before_any_work(how, start, tmp_path, monkeypatch):
    shutil.copytree(start, tmp_path / "start")
    model = tmp_path / "start" / "model"
    before = contents(tmp_path)
    os.symlink(model, tmp_path / "link")
    monkeypatch.chdir(tmp_path)
    place = {"relative": "start/../start/model", "symlink": "link", "inside": model / "run", "containing": "start"}
    given = options(tmp_path / "start", place.get(how, model), overwrite=how == "with overwrite")
    message = {"inside": "is inside model", "containing": "contains model"}.get(how, "is the same folder as model")
    monkeypatch.setattr("saisa_hf.training.run.load_model", lambda _: pytest.fail("loaded"))
    with pytest.raises(ValueError, match=message):
        train(given, log=lambda _: None)
    assert contents(tmp_path) == before


def test_an_output_with_data_in_it_or_in_data_is_refused(start, tmp_path):
    shutil.copy(start / "q.json", tmp_path)
    inside = {"data": str(tmp_path / "q.json")}
    with pytest.raises(ValueError, match=r"output '\S+' contains data '\S+q.json'"):
        check_output(options(start, tmp_path, **inside))
    with pytest.raises(ValueError, match=r"contains questions"):
        check_output(options(start, tmp_path, questions=str(tmp_path / "q.json")))
    with pytest.raises(ValueError, match=r"is inside data"):
        check_output(options(start, tmp_path / "run", data=str(tmp_path)))
    with pytest.raises(FileExistsError, match="is a file"):
        check_output(options(start, tmp_path / "q.json"))
    check_output(options(start, tmp_path / "run", **inside))  # beside the data is fine


MISSING = {
    "data": {"data": "digits/questions.json", "model": "no/model"},
    "images": {"images": "nowhere"},
    "chat_template": {"chat_template": "none.jinja"},
    "questions": {"questions": "none.json"},
    "model": {"model": "./nowhere"},
}


@pytest.mark.parametrize("name", MISSING)
@pytest.mark.parametrize("command", [["train"], ["data", "check"]], ids=" ".join)
def test_what_is_missing_is_named_at_once_and_data_first(name, command, start, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(json.dumps(run_options(start, tmp_path / "run", **MISSING[name])))
    for module in ("saisa_hf.training.run", "saisa_hf.training.check"):
        monkeypatch.setitem(sys.modules, module, None)  # to import it is an error
    assert main([*command, "c.yaml"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"saisa: error: {name} '") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("workers", [257, 1_000_000, 10**400])
def test_so_many_workers_are_refused(workers, start, tmp_path):
    with pytest.raises(ValueError, match=r"workers=.*: expected at most 256|expected a whole number"):
        options(start, tmp_path / "run", workers=workers)


def test_so_many_threads_are_refused(capsys):
    for number in ("257", "1000000", "9" * 5000):
        with pytest.raises(SystemExit):
            main(["bench", "--threads", number])
        assert "expected a whole number from 1 to 256" in capsys.readouterr().err
