"""`saisa ask` killed at any moment: the table is not there, or whole; the same command then ends with the table of a run that
nothing stopped, to the last byte, and nothing is left behind."""

import json
import random
import shutil

import numpy as np
import pytest
from killing import FORKS, run_command, run_forked
from PIL import Image

from saisa_hf.common import journal
from saisa_hf.demo import CHECKPOINT


FORKS.set_forkserver_preload(["saisa_hf.evaluation.ask.run", "saisa_hf.cli", "saisa_hf.answering", "pyarrow.parquet"])
ROWS = 80


def work(table, output, calls, last):
    """Runs `saisa ask`; kills the process at call number `last` of those that write to the disk. Counts them in `calls`."""
    journal.WRITTEN_AT_ONCE = 16
    how = ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", "6", "--batch-size", "4"]
    command = ["ask", str(CHECKPOINT), table, "--output", output, "--backend", "transformers", *how]
    run_command(command, calls, last, ["fsync", "replace", "unlink"])


class Runs:
    """Runs with the same output."""

    def __init__(self, table, folder, ending="jsonl"):
        self.table, self.folder, self.output = table, folder, folder / f"out.{ending}"
        folder.mkdir()

    def run(self, after=None, last=0):
        """Returns (status, seconds, calls); kills the run `after` so many seconds, or at its call number `last`."""
        return run_forked(work, str(self.table), str(self.output), after=after, last=last, limit=300)

    def finished(self):
        """How many rows a kill has left in the journal."""
        parts = self.folder.glob("out.*.journal/part-*")
        return sum(path.read_bytes().count(b"\n") for path in parts)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Questions about images, one of which is missing."""
    folder = tmp_path_factory.mktemp("table")
    for seed in range(4):
        pixels = np.random.default_rng(seed).integers(0, 256, (48, 48, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{seed}.png")
    rows = [{"image": f"{index % 5}.png", "prompt": f"which digit is {index}?"} for index in range(ROWS)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "in.jsonl"


@pytest.fixture(scope="module")
def whole(table, tmp_path_factory):
    """The table of a run that nothing stopped; its seconds; its calls."""
    runs = Runs(table, tmp_path_factory.mktemp("whole") / "runs")
    runs.run(last=1)  # the server starts with the first
    shutil.rmtree(runs.folder / "out.jsonl.journal")
    status, seconds, calls = runs.run()
    assert status == 4 and calls > 5
    return runs.output.read_bytes(), seconds, calls


def kill_and_rerun(table, whole, folder, moments=(), calls=()):
    """Returns how many runs were killed, and how many of those left rows to go on from."""
    content, seconds, _ = whole
    killed = begun = 0
    for index, (fraction, last) in enumerate([*((moment, 0) for moment in moments), *((0, last) for last in calls)]):
        runs = Runs(table, folder / str(index))
        status, *_ = runs.run(last=last) if last else runs.run(after=fraction * seconds)
        killed += status == -9
        begun += 0 < runs.finished() < ROWS
        assert not runs.output.exists() or runs.output.read_bytes() == content
        if status == -9 and (left := [path.name for path in runs.folder.iterdir()]) != ["out.jsonl"]:
            assert runs.run()[0] == 4, left
        assert runs.output.read_bytes() == content
        assert [path.name for path in runs.folder.iterdir()] == ["out.jsonl"]
        shutil.rmtree(runs.folder)
    return killed, begun


def test_killed_in_the_middle_it_ends_as_if_it_was_not(table, whole, tmp_path):
    assert kill_and_rerun(table, whole, tmp_path, calls=[3]) == (1, 1)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_as_if_it_was_not(table, whole, tmp_path):
    generator = random.Random(0)
    killed, begun = kill_and_rerun(table, whole, tmp_path, moments=[generator.random() for _ in range(14)])
    assert killed >= 10 and begun >= 1


@pytest.mark.slow
def test_killed_at_any_write_it_ends_as_if_it_was_not(table, whole, tmp_path):
    killed, _ = kill_and_rerun(table, whole, tmp_path, calls=range(1, whole[2] + 1))
    assert killed == whole[2]


@pytest.mark.slow
def test_killed_again_and_again_it_still_ends(table, whole, tmp_path):
    runs, generator = Runs(table, tmp_path / "runs"), random.Random(1)
    for _ in range(10):
        if not runs.output.exists():
            runs.run(after=generator.random() * whole[1])
    if [path.name for path in runs.folder.iterdir()] != ["out.jsonl"]:
        assert runs.run()[0] == 4
    assert runs.output.read_bytes() == whole[0]
    assert [path.name for path in runs.folder.iterdir()] == ["out.jsonl"]
