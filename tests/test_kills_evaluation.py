"""`saisa eval` killed at any moment: the same command then ends with the files of a run that nothing stopped, byte for byte,
and nothing is left behind."""

import json
import random
import shutil

import pytest
from killing import FORKS, run_command, run_forked

from saisa_hf.answering import engine
from saisa_hf.common import journal
from saisa_hf.demo import CHECKPOINT
from saisa_hf.demo.dataset import write_questions


pytestmark = pytest.mark.slow

FORKS.set_forkserver_preload(
    ["saisa_hf.evaluation.run", "saisa_hf.answering", "saisa_hf.common.loading", "saisa_hf.cli"]
)


def work(questions, folder, calls, last):
    """Runs `saisa eval`; kills the process at call number `last` of those that write. Counts them in `calls`."""
    engine.LEAST_WINDOW, journal.WRITTEN_AT_ONCE = 8, 3
    asked = ["--questions", questions, "--metric", "exact_match", "--dtype", "float32"]
    options = ["--output", f"{folder}/out", "--batch-size", "1", "--device", "cpu"]
    run_command(["eval", str(CHECKPOINT), "jsonl", *asked, *options], calls, last, ["replace", "fsync", "unlink"])


def run(whole, folder, after=None, last=0):
    """Asks the questions of `whole`. Returns (status, seconds, calls that write); kills the run `after` so many seconds, or
    at such a call number `last`."""
    return run_forked(work, f"{whole}/digits/questions.jsonl", str(folder), after=after, last=last)


def contents(folder):
    """Everything below the folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped; its seconds; its calls that write."""
    folder = tmp_path_factory.mktemp("whole")
    write_questions(folder / "digits", 48, log=lambda _: None)
    run(folder, folder, last=1)  # the server starts with the first
    shutil.rmtree(folder / "out", ignore_errors=True)
    status, seconds, calls = run(folder, folder)
    assert status == 0 and calls > 16
    assert json.loads((folder / "out/summary.json").read_text())["score"]["score"] > 90
    return folder, seconds, calls


def kill_and_rerun(whole, folder, moments=(), calls=()):
    """Kills runs and runs them again. Returns (how many were killed, with how many answers they were left)."""
    whole, seconds, _ = whole
    killed, kept = 0, []
    for index, (fraction, last) in enumerate([*((moment, 0) for moment in moments), *((0, last) for last in calls)]):
        one = folder / str(index)
        one.mkdir()
        status, *_ = run(whole, one, last=last) if last else run(whole, one, after=fraction * seconds)
        killed += status == -9
        parts = list(one.glob("out/.journal/part-*.jsonl"))
        kept.append(sum(part.read_bytes().count(b"\n") for part in parts))
        if (one / "out/summary.json").exists():
            assert (one / "out/summary.json").read_bytes() == (whole / "out/summary.json").read_bytes()
        assert run(whole, one)[0] == 0
        assert contents(one / "out") == contents(whole / "out")
        shutil.rmtree(one)
    return killed, kept


def moments(count, seed=0):
    generator = random.Random(seed)
    return [generator.random() for _ in range(count)]


def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(whole, tmp_path):
    killed, kept = kill_and_rerun(whole, tmp_path, moments=moments(14))
    assert killed >= 7 and len(set(kept)) > 3


def test_a_run_killed_between_two_steps_of_its_writing_ends_as_one_that_was_not(whole, tmp_path):
    count = whole[2]
    chosen = sorted({*range(1, count + 1, -(-count // 8)), *range(count - 4, count + 1)})
    killed, _ = kill_and_rerun(whole, tmp_path, calls=chosen)
    assert killed == len(chosen) >= 10


def test_killed_again_and_again_it_still_ends(whole, tmp_path):
    for fraction in moments(10, seed=2):
        run(whole[0], tmp_path, after=fraction * whole[1])
    assert run(whole[0], tmp_path)[0] == 0
    assert contents(tmp_path / "out") == contents(whole[0] / "out")
