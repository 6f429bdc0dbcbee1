"""`saisa train` killed at any moment: the output has the old result, the new one or a run to resume; the same command then
ends with the weights of a run that nothing stopped, to the last bit, and nothing is left behind."""

import json
import random
import shutil

import pytest
from killing import FORKS, run_command, run_forked
from safetensors.torch import load_file
from training_parts import run_options, write_start

from saisa_hf import SaisaForConditionalGeneration
from saisa_hf.training.record import RECORD
from saisa_hf.training.trainer import checkpoints


FORKS.set_forkserver_preload(["saisa_hf.training.run", "saisa_hf.cli", "training_parts", "datasets"])


def work(config, calls, last):
    """Runs `saisa train`; kills the process at call number `last` of those that rename something. Counts them in `calls`."""
    run_command(["train", config], calls, last, ["replace"])


class Runs:
    """Runs in one folder, with the same settings."""

    def __init__(self, start, folder, **changes):
        self.folder, self.output, self.temporary = folder, folder / "run", folder / "tmp"
        self.temporary.mkdir(parents=True)
        self.config = folder / "c.yaml"
        how = {"max_steps": 4, "save_steps": 1, "save_total_limit": 2}
        self.config.write_text(json.dumps(run_options(start, self.output, **how | changes)))

    def run(self, after=None, last=0):
        """Returns (status, seconds, renames); kills the run `after` so many seconds, or at its rename number `last`."""
        return run_forked(work, str(self.config), after=after, last=last)

    def weights(self):
        return (self.output / "model.safetensors").read_bytes()

    def names(self):
        """All names below the folder."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*"))


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """A run that nothing stopped; its seconds; its renames."""
    runs = Runs(start, tmp_path_factory.mktemp("whole"))
    runs.run(last=1)  # the server starts with the first
    assert runs.run()[0] == 0
    shutil.rmtree(runs.output)
    status, seconds, renames = runs.run()
    assert status == 0 and renames > 5
    return runs, seconds, renames


def check_what_is_there(runs, results):
    """The result is none, or one of `results`; each checkpoint is whole."""
    if (runs.output / "config.json").is_file():
        assert runs.weights() in results
        SaisaForConditionalGeneration.from_pretrained(runs.output)
    for checkpoint in checkpoints(runs.output):
        assert {"config.json", "optimizer.pt", "trainer_state.json"} <= {path.name for path in checkpoint.iterdir()}
        assert load_file(checkpoint / "model.safetensors") and (checkpoint / "optimizer.pt").stat().st_size
        json.loads((checkpoint / "trainer_state.json").read_text())
    if (runs.output / RECORD).is_file():
        json.loads((runs.output / RECORD).read_text())


def check_rerun(runs, whole):
    assert runs.run()[0] == 0
    assert runs.weights() == whole.weights()
    assert runs.names() == whole.names()


def kill_and_rerun(start, folder, whole, moments=(), renames=(), **changes):
    whole, seconds, _ = whole
    killed = 0
    for index, (fraction, last) in enumerate([*((moment, 0) for moment in moments), *((0, last) for last in renames)]):
        runs = Runs(start, folder / str(index), **changes)
        status, *_ = runs.run(last=last) if last else runs.run(after=fraction * seconds)
        killed += status == -9
        check_what_is_there(runs, [whole.weights()])
        check_rerun(runs, whole)
        shutil.rmtree(runs.folder)
    return killed


def moments(count, seed=0):
    generator = random.Random(seed)
    return [generator.random() for _ in range(count)]


def test_a_run_killed_at_two_moments_ends_as_one_that_was_not(start, whole, tmp_path):
    assert kill_and_rerun(start, tmp_path, whole, moments=[0.6], renames=[whole[2] - 3]) >= 1


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(start, whole, tmp_path):
    assert kill_and_rerun(start, tmp_path, whole, moments=moments(20)) >= 15


@pytest.mark.slow
def test_a_run_killed_between_two_steps_of_its_writing_ends_as_one_that_was_not(start, whole, tmp_path):
    count = whole[2]
    chosen = sorted({*range(1, count + 1, -(-count // 9)), *range(count - 2, count + 1)})
    assert kill_and_rerun(start, tmp_path, whole, renames=chosen) == len(chosen) >= 8


@pytest.mark.slow
def test_killed_over_an_old_run_it_leaves_the_old_result_or_the_new_one(start, whole, tmp_path):
    old = Runs(start, tmp_path / "old", learning_rate=2e-2)
    assert old.run()[0] == 0
    new, seconds, _ = whole
    results = [old.weights(), new.weights()]
    assert results[0] != results[1]
    for index, fraction in enumerate(moments(10, seed=1)):
        runs = Runs(start, tmp_path / str(index), overwrite=True)
        shutil.copytree(old.output, runs.output)
        runs.run(after=fraction * seconds)
        check_what_is_there(runs, results)
        check_rerun(runs, new)


@pytest.mark.slow
def test_killed_again_and_again_it_still_ends(start, whole, tmp_path):
    runs, (new, seconds, _) = Runs(start, tmp_path / "run"), whole
    for fraction in moments(10, seed=2):
        runs.run(after=fraction * seconds)
        check_what_is_there(runs, [new.weights()])
    check_rerun(runs, new)


@pytest.mark.slow
def test_killed_with_validation_it_still_ends_in_the_best_checkpoint(start, tmp_path):
    """Which is not the last one, and is kept beside it."""
    how = {"eval_data": str(start / "q.json"), "load_best_model_at_end": True, "early_stopping_patience": 2}
    how |= {"learning_rate": 1.0, "lr_scheduler": "constant", "warmup_ratio": 0, "max_steps": 6, "save_total_limit": 1}
    new = Runs(start, tmp_path / "whole", **how)
    new.run(last=1)
    assert new.run()[0] == 0
    kept = checkpoints(new.output)
    assert [path.name for path in kept] == ["checkpoint-1", "checkpoint-3"]  # and no further: patience is over
    assert new.weights() == (kept[0] / "model.safetensors").read_bytes()
    shutil.rmtree(new.output)
    status, seconds, count = new.run()
    assert status == 0
    chosen = range(count % 4 + 1, count + 1, -(-count // 4))
    assert kill_and_rerun(start, tmp_path, (new, seconds, count), (), chosen, **how) == len(chosen) >= 3
