"""The journal of a long run: what was written is there after any kill, once and in order; other runs are refused."""

import errno
import json
import multiprocessing
import random
import time

import pytest

from saisa_hf.common import journal as module
from saisa_hf.common.identity import of_data, of_model
from saisa_hf.common.journal import SETTINGS, Journal, Writer, check_request, remove, result_of


FORKS = multiprocessing.get_context("fork")  # nothing but the standard library runs in them


def asked(**settings):
    return {"model": {"path": "m", "contents": "a"}, "data": [], "settings": {"prompt": "?", **settings}}


def answer(index):
    return {"answer": f"é\ud800 {index}" * (index % 5), "score": index / 7}


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "answers.jsonl.journal"


def test_lines_come_back_in_order_whoever_wrote_them(folder):
    with Journal(folder, asked()) as first, Journal(folder, asked(), part=3) as other:
        first.write([(4, answer(4)), (0, answer(0))])
        other.write([(3, answer(3)), (1, answer(1))])
        first.write([(2, answer(2))])
        assert len(first) == 3 and 4 in first and 1 not in first and -1 not in first and 99 not in first
        assert list(first.lines()) == [(index, answer(index)) for index in range(5)]
    with Journal(folder, asked()) as again:
        assert len(again) == 5 and 3 in again
        again.write([(5, None)])
        assert list(again.lines())[-1] == (5, None)
        again.remove()
    assert not folder.exists()


@pytest.mark.parametrize(
    "damage", [b'[7, {"answer": "tor', b"[7, 1]", b"\0" * 500, b"\xff\n", b"{}\n", b"[-1, 1]\n", b"[[" * 9**6]
)
def test_what_is_not_whole_is_cut_off(damage, folder):
    with Journal(folder, asked()) as journal:
        journal.write([(index, answer(index)) for index in range(3)])
    path = folder / "part-0000.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + damage)
    with Journal(folder, asked()) as journal:
        assert path.read_bytes() == whole
        journal.write([(7, "later")])
        assert [index for index, _ in journal.lines()] == [0, 1, 2, 7]


def test_an_index_that_two_processes_finished_is_there_once(folder):
    with Journal(folder, asked()) as first, Journal(folder, asked(), part=1) as second:
        second.write([(0, "second"), (1, "second")])
        first.write([(0, "first")])
    with Journal(folder, asked()) as again:
        assert len(again) == 2 and list(again.lines()) == [(0, "first"), (1, "second")]


def test_a_run_that_was_asked_for_something_else_is_refused(folder, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text("1")
    with Journal(folder, asked() | {"data": [of_data(str(file))]}) as journal:
        journal.write([(0, 1)])
    assert check_request(folder, asked() | {"data": [of_data(str(file))]})
    file.write_text("22")
    for request, named in [
        (asked(prompt="!"), r"data.*questions\.jsonl.*prompt was '\?', is '!'"),
        (asked() | {"data": [of_data(str(file))]}, r"the contents of data .*questions.jsonl' have changed"),
    ]:
        with pytest.raises(ValueError, match=named):
            Journal(folder, request)
    (folder / SETTINGS).write_text("{")
    with pytest.raises(ValueError, match=f"{SETTINGS} is damaged.*Delete the folder"):
        Journal(folder, asked())
    remove(folder)
    assert not check_request(folder, asked())


def test_a_model_is_its_weights_and_settings(tmp_path):
    path = str(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_text("1")
        before = of_model(path)
        (tmp_path / name).write_text("2")
        assert of_model(path) != before
    before = of_model(path)
    for name in ("README.md", "trainer_state.json"):  # what does not describe it
        (tmp_path / name).write_text("1")
    assert of_model(path) == before


def test_lines_wait_for_the_disk_no_longer_than_said(folder, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    with Journal(folder, asked()) as journal, Writer(journal) as writer:
        for index in range(64):
            assert len(journal) == 0
            writer.add(index, answer(index))
        assert len(journal) == 64
        now[0] = 1.9
        writer.add(64, answer(64))
        assert len(journal) == 64
        now[0] = 2.1
        writer.add(65, answer(65))
        assert len(journal) == 66
        writer.add(66, answer(66))
    assert len(journal) == 67


def test_one_writer_at_a_time(folder, monkeypatch):
    monkeypatch.setattr(module, "LOCK_WAIT", 0.1)
    with Journal(folder, asked()):
        with pytest.raises(OSError, match="Another run writes to"):
            Journal(folder, asked())
        with Journal(folder, asked(), part=1):
            pass
    with Journal(folder, asked()):
        pass


def test_a_full_disk_leaves_whole_lines(folder, monkeypatch):
    with Journal(folder, asked()) as journal:
        journal.write([(0, 1)])
        before = (folder / "part-0000.jsonl").read_bytes()

        def full(handle):
            raise OSError(errno.ENOSPC, "No space left on device")

        with (
            monkeypatch.context() as patched,
            pytest.raises(OSError, match=r"No space left.*1 finished lines.*goes on"),
        ):
            patched.setattr(module.os, "fsync", full)
            journal.write([(1, 2), (2, 3)])
        assert (folder / "part-0000.jsonl").read_bytes() == before and len(journal) == 1
        journal.write([(1, 2)])
        assert list(journal.lines()) == [(0, 1), (1, 2)]


def test_a_result_appears_whole(folder, tmp_path):
    path = tmp_path / "answers.jsonl"
    with Journal(folder, asked()) as journal:
        with pytest.raises(ZeroDivisionError), journal.result(path) as partial:
            partial.write_text("half")
            raise ZeroDivisionError
        assert not path.exists()
        with journal.result(path) as partial:
            partial.write_text("whole")
        assert path.read_text() == "whole"
        journal.remove()
    assert [left.name for left in tmp_path.iterdir()] == ["answers.jsonl"]


def test_killed_when_its_result_was_in_place_a_run_is_known_to_be_finished(folder, monkeypatch):
    class Killed(BaseException):
        pass

    with Journal(folder, asked()) as journal:
        journal.write([(0, 1)])
        assert result_of(folder) is None
        with monkeypatch.context() as patched, pytest.raises(Killed):
            patched.setattr(module, "remove", lambda folder: (_ for _ in ()).throw(Killed))
            journal.remove(failed=3)
    assert check_request(folder, asked()) and result_of(folder) == {"failed": 3}


def write_all(folder, part, processes, count):
    """Writes the lines of its share that are missing, in no order, by threes."""
    with Journal(folder, asked(), part) as journal:
        missing = [index for index in range(part, count, processes) if index not in journal]
        random.Random(1).shuffle(missing)
        for start in range(0, len(missing), 3):
            journal.write([(index, answer(index)) for index in missing[start : start + 3]])
            time.sleep(0.0005)


def test_killed_again_and_again_nothing_is_lost_or_there_twice(folder):
    count, generator, killed = 6000, random.Random(0), 0
    for _ in range(10):
        running = [FORKS.Process(target=write_all, args=(folder, part, 2, count)) for part in range(2)]
        for process in running:
            process.start()
        time.sleep(generator.uniform(0.01, 0.08))
        for process in running:
            process.kill()
            process.join()
            killed += process.exitcode == -9
    before = [path.read_bytes() for path in sorted(folder.glob("part-*"))]
    write_all(folder, 0, 1, count)  # one process goes on where two were
    assert killed >= 5 and any(before)
    with Journal(folder, asked()) as journal:
        assert list(journal.lines()) == [(index, answer(index)) for index in range(count)]
    written = [json.loads(line)[0] for path in folder.glob("part-*") for line in path.read_bytes().splitlines()]
    assert len(written) == len(set(written)) == count
