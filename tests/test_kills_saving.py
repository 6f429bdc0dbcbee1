# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Saving that is killed: the folder loads as it was or as it should be, or says that saving was interrupted; the same call
then succeeds and nothing is left behind. `build --from-llava` and `upgrade`: the folder is as it was or as it should be."""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
from apart import succeeds
from killing import take_locks_of_its_own
from test_convert_faults import names, small_disk, state
from test_from_llava import PROMPTS, draw, make_llava, make_processor
from test_upgrade import DEMO, current_code, generation, old_checkpoint

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration, SaisaProcessor, saving_saisa
from saisa_hf.checkpoints.from_llava import Fit, from_llava
from saisa_hf.checkpoints.upgrade import upgrade
from saisa_hf.common import destination
from saisa_hf.common.destination import Destination
from saisa_hf.saving_saisa import HIDDEN, UNFINISHED


EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}
MOMENTS = 20
PARTS = {"max_shard_size": "600KB"}


def in_a_process(run) -> tuple[int, int]:
    """Starts `run` in a process of its own; returns its number and a pipe that says "begun" and, in the end, "done"."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        take_locks_of_its_own()
        os.write(writer, b"begun ")
        try:
            said = run()
            os.write(writer, f"done {said}".encode())
        finally:
            os._exit(0)
    os.close(writer)
    return child, reader


def killed_at_step(run, folder: Path, step: int) -> int | None:
    """Runs `run` in a process that kills itself at the `step`th operation on files in or beside `folder`. Returns None if it
    did, else how many there were."""

    def counted():
        taken, prefix = 0, str(folder.parent)

        def hook(event, arguments):
            nonlocal taken
            if event in EVENTS and str(arguments[0]).startswith(prefix):
                taken += 1
                if taken == step:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)
        run()
        return taken

    child, pipe = in_a_process(counted)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(pipe) as said:
        words = said.read().split()
    assert "done" in words or status == -signal.SIGKILL, "the call failed"
    return int(words[-1]) if "done" in words else None


def killed_after(run, seconds: float) -> None:
    """Runs `run` in a process that is killed after so many seconds, unless it has ended by then."""
    child, pipe = in_a_process(run)
    os.read(pipe, 6)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(pipe)


def duration(run) -> float:
    start = time.perf_counter()
    child, pipe = in_a_process(run)
    os.waitpid(child, 0)
    os.close(pipe)
    return time.perf_counter() - start


# --- what is saved ----------------------------------------------------------------------------------------------------


def models() -> tuple:
    """Two of different sizes."""
    config = SaisaConfig.from_pretrained(DEMO)
    made = []
    for seed, width in enumerate((96, 160)):
        torch.manual_seed(seed)
        text = config.text_config.to_dict() | {"intermediate_size": width, "num_hidden_layers": 2 + seed}
        model = SaisaForConditionalGeneration(SaisaConfig.from_dict(config.to_dict() | {"text_config": text}))
        model.generation_config.max_new_tokens = 5 + seed
        made.append(model.float().eval())
    return tuple(made)


def of_model(model) -> tuple:
    settings = (model.config.text_config.intermediate_size, model.generation_config.max_new_tokens)
    return *settings, {name: value.numpy().tobytes() for name, value in model.state_dict().items()}


def load_model(folder: Path):
    return SaisaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


def processors() -> tuple:
    """Two that differ in every file."""
    old, new = (SaisaProcessor.from_pretrained(DEMO) for _ in range(2))
    old.tokenizer.add_tokens(["<old>"])
    new.tokenizer.add_tokens(["<new>", "<newer>"])
    new.tokenizer.model_max_length, new.image_processor.image_mean = 77, [0.25] * 3
    old.chat_template = {"default": "old {{ messages }}", "other": "old"}
    new.chat_template, new.tokenize_whole = "new {{ messages }}", True
    return old, new


def of_processor(processor) -> tuple:
    tokenizer, mean = processor.tokenizer, list(processor.image_processor.image_mean)
    template, whole = processor.chat_template, processor.tokenize_whole
    return tokenizer.get_vocab(), tokenizer.model_max_length, mean, template, whole


class Case:
    """`new` saved into a folder that holds `old`, with an older release's code if `code`; nothing if it is None."""

    def __init__(self, old, new, load, aspects, code=False, **options):
        self.old, self.new, self.load, self.aspects, self.code, self.options = old, new, load, aspects, code, options

    def prepare(self, folder: Path) -> Path:
        folder.mkdir()
        (folder / "notes.txt").write_text("mine")
        (folder / "my_saisa.py").write_text("mine = True\n")
        if self.old is not None:
            self.old.save_pretrained(folder, **self.options)
        if self.code:
            for path in folder.glob("*_saisa.py"):
                if path.name != "my_saisa.py":
                    path.write_text("# Copyright 2026 The saisa_hf authors.\nOLD_COMPAT = True\n")
            (folder / "former_saisa.py").write_text("# Copyright 2026 The saisa_hf authors.\nOLD_COMPAT = True\n")
        return folder

    def save(self, folder: Path) -> None:
        self.new.save_pretrained(folder, **self.options)

    def found(self, folder: Path) -> str:
        """What the folder loads as: "old", "new", or "refused". AssertionError if it is anything else."""
        assert (folder / "notes.txt").read_text() == "mine" and (folder / "my_saisa.py").read_text() == "mine = True\n"
        try:
            loaded = self.load(folder)
        except ValueError as error:
            assert str(error).startswith(f"Saving into {folder.resolve()} has not finished."), error
            return "refused"
        except OSError:  # nothing is there yet
            assert self.old is None and not list(folder.glob("*config.json"))
            return "refused"
        code = {path.name: path.read_bytes() for path in folder.glob("*_saisa.py") if path.name != "my_saisa.py"}
        for kind, one in (("old", self.old), ("new", self.new)):
            if one is not None and self.aspects(loaded) == self.aspects(one):
                is_old = all(b"OLD_COMPAT" in text for text in code.values())
                assert is_old if self.code and kind == "old" else code == current_code(), "code of another release"
                return kind
        raise AssertionError("a mixture")

    def complete(self, folder: Path) -> None:
        """Saves again: that is what there is then, and nothing else."""
        self.save(folder)
        assert self.found(folder) == "new"
        present = names(folder)
        assert not [name for name in present if name.startswith(".") or UNFINISHED in name]
        assert not {"former_saisa.py"}.intersection(present)
        index = folder / "model.safetensors.index.json"
        if index.exists():
            wanted = set(json.loads(index.read_text())["weight_map"].values())
            assert wanted == {name for name in present if name.endswith(".safetensors")}


CASES = ["model", "model and its code", "model in a new folder"]
CASES += ["processor", "processor and its code", "processor in a new folder"]


@pytest.fixture(scope="module")
def cases():
    old, new = models()
    before, after = processors()
    model = {"load": load_model, "aspects": of_model, **PARTS}
    processor = {"load": SaisaProcessor.from_pretrained, "aspects": of_processor}
    found = [Case(old, new, **model), Case(old, new, code=True, **model), Case(None, new, **model)]
    found += [Case(before, after, **processor), Case(before, after, code=True, **processor)]
    return dict(zip(CASES, [*found, Case(None, after, **processor)], strict=True))


def killed(case: Case, tmp_path: Path, points, kill) -> list[str]:
    """What a folder is after each of `kill(save, folder, point)`. It is then completed."""
    template, found = case.prepare(tmp_path / "template"), []
    for point in points:
        folder = Path(shutil.copytree(template, tmp_path / f"at-{point}"))
        kill(lambda folder=folder: case.save(folder), folder, point)
        found.append(case.found(folder))
        case.complete(folder)
        shutil.rmtree(folder)
    return found


def steps_of(case: Case, tmp_path: Path) -> int:
    folder = case.prepare(tmp_path / "whole")
    steps = killed_at_step(lambda: case.save(folder), folder, 0)
    assert case.found(folder) == "new" and steps > 50
    return steps


@pytest.mark.parametrize("name", ["model and its code", "processor and its code"])
def test_killed_at_a_step_a_folder_is_whole_or_refused(name, cases, tmp_path):
    steps = steps_of(cases[name], tmp_path)
    points = [steps // 3, *(steps - n for n in (65, 40, 30, 20, 10, 3, 0))]
    found = killed(cases[name], tmp_path, points, killed_at_step)
    assert sorted(found, key=["old", "refused", "new"].index) == found and set(found) == {"old", "refused", "new"}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_at_each_step_a_folder_is_whole_or_refused(name, cases, tmp_path):
    steps = steps_of(cases[name], tmp_path)
    first = steps // 2 if "new folder" not in name else 1  # what is before writes into the hidden folder alone
    found = killed(cases[name], tmp_path, [*range(1, first, 5), *range(first, steps + 1)], killed_at_step)
    assert sorted(found, key=["old", "refused", "new"].index) == found
    assert found.count("refused") >= 5 and found[-1] == "new" and (found[0] == "old" or "new folder" in name)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_killed_at_random_moments_a_folder_is_whole_or_refused(name, cases, tmp_path):
    case, chance = cases[name], random.Random(17)
    seconds = min(duration(lambda n=n: case.save(tmp_path / f"timed-{n}")) for n in range(3))
    moments = [round(chance.uniform(0, 1.1) * seconds, 4) for _ in range(MOMENTS)]
    found = killed(case, tmp_path, moments, lambda save, folder, point: killed_after(save, point))
    assert set(found) <= ({"old", "refused", "new"} if case.old else {"refused", "new"})


def test_two_processes_that_save_into_one_folder_leave_one_of_the_two(cases, tmp_path):
    case = cases["model and its code"]
    folder = case.prepare(tmp_path / "folder")
    children = [
        in_a_process(lambda one=one: [one.save_pretrained(folder, **PARTS) for _ in range(4)])
        for one in (case.old, case.new)
    ]
    for child, pipe in children:
        os.waitpid(child, 0)
        with os.fdopen(pipe) as said:
            assert "done" in said.read()
    loaded = of_model(load_model(folder))
    assert loaded in (of_model(case.old), of_model(case.new))
    assert not [name for name in names(folder) if name.startswith(".") or UNFINISHED in name]


def test_files_take_their_places_when_no_other_process_holds_the_folder(cases, tmp_path):
    case, stack = cases["model"], contextlib.ExitStack()
    with saving_saisa.saved_together(tmp_path / "folder") as new:
        case.new.save_pretrained(new)
        assert stack.enter_context(saving_saisa.locked(tmp_path / "folder"))
        began = time.monotonic()
        threading.Timer(0.5, stack.close).start()
    assert time.monotonic() - began >= 0.5 and names(tmp_path / "folder")


# --- a folder whose saving was interrupted ----------------------------------------------------------------------------

LOADERS = ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoProcessor", "AutoTokenizer")
WITHOUT_PACKAGE = """
import json, sys

class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name == "saisa_hf" or name.startswith("saisa_hf."):
            raise ModuleNotFoundError("saisa_hf is not installed here")

sys.meta_path.insert(0, NoPackage())
import transformers

def said(name, folder):
    try:
        getattr(transformers, name).from_pretrained(folder, trust_remote_code=True)
        return "loaded"
    except Exception as error:
        return f"{type(error).__name__}: {error}"

print(json.dumps([[said(name, folder) for name in sys.argv[1].split()] for folder in sys.argv[2:]]))
"""


def interrupted(monkeypatch, save) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(saving_saisa, "_put_in_place", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        save()


@pytest.fixture
def unfinished(cases, tmp_path, monkeypatch):
    """A folder in which saving of a model, and one in which that of a processor, was interrupted; old code in both."""
    folders = []
    for name in ("model and its code", "processor and its code"):
        folder = cases[name].prepare(tmp_path / name.split()[0])
        interrupted(monkeypatch, lambda name=name, folder=folder: cases[name].save(folder))
        assert list(folder.glob(f"{HIDDEN}*"))
        folders.append(folder)
    return folders


def test_an_interrupted_folder_says_what_to_do(unfinished):
    folder, other = unfinished
    for name in ("AutoConfig", "AutoModel", "AutoModelForImageTextToText"):
        with pytest.raises(
            ValueError, match=f"Saving into {folder} has not finished.*: save again, or finish it with `saisa"
        ):
            getattr(transformers, name).from_pretrained(folder)
    with pytest.raises(ValueError, match=f"Saving into {other} has not finished"):
        transformers.AutoProcessor.from_pretrained(other)


def test_an_interrupted_folder_says_what_to_do_without_the_package(unfinished, tmp_path):
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    done = succeeds(WITHOUT_PACKAGE, " ".join(LOADERS), *unfinished, environment=environment, cwd=tmp_path)
    model, processor = json.loads(done.stdout.splitlines()[-1])
    for folder, said in [(unfinished[0], said) for said in model[:3]] + [
        (unfinished[1], said) for said in processor[3:]
    ]:
        assert said.startswith(f"ValueError: Saving into {folder} has not finished."), (model, processor)


def test_an_interrupted_folder_is_refused_by_the_classes_of_its_parts(unfinished, cases):
    processor = cases["processor"].new
    for part in (processor.tokenizer, processor.image_processor):
        with pytest.raises(ValueError, match=f"Saving into {unfinished[1]} has not finished"):
            type(part).from_pretrained(unfinished[1])


def test_an_interrupted_folder_is_refused_though_a_config_is_given(unfinished, cases):
    with pytest.raises(ValueError, match="has not finished"):
        SaisaForConditionalGeneration.from_pretrained(unfinished[0], config=cases["model"].new.config)
    with pytest.raises(ValueError, match="has not finished"):
        SaisaForConditionalGeneration.from_pretrained(unfinished[0].parent, subfolder=unfinished[0].name)
    with pytest.raises(ValueError, match="has not finished"):
        upgrade(unfinished[0], check=True)


def test_a_model_is_refused_while_its_processor_brings_other_code(cases, tmp_path, monkeypatch):
    folder = cases["model and its code"].prepare(tmp_path / "folder")
    interrupted(monkeypatch, lambda: cases["processor"].new.save_pretrained(folder))
    with pytest.raises(ValueError, match=f"Saving into {folder} has not finished"):
        transformers.AutoConfig.from_pretrained(folder)
    saving_saisa.finish_saving(folder)
    assert cases["model"].found(folder) == "old" and cases["processor"].found(folder) == "new"


def test_upgrade_finishes_what_was_interrupted(unfinished, cases):
    for folder, name in zip(unfinished, ("model and its code", "processor and its code"), strict=True):
        lines = []
        assert upgrade(folder, log=lines.append) and "that was interrupted" in lines[0]
        (folder / "my_saisa.py").write_text("mine = True\n")  # `upgrade` removes what has such a name
        assert cases[name].found(folder) == "new" and not list(folder.glob(".*"))


def test_upgrade_says_when_the_new_files_are_gone(unfinished):
    """As after `cp -r folder/* elsewhere`, which leaves hidden folders out."""
    for folder in unfinished:
        for hidden in folder.glob(f"{HIDDEN}*"):
            shutil.rmtree(hidden)
        before = state(folder)
        with pytest.raises(
            FileNotFoundError, match=f"{folder}: saving into it was interrupted, .* are gone. Save again"
        ):
            upgrade(folder, log=str)
        assert state(folder) == before


def test_whoever_saves_next_finishes_what_was_interrupted(unfinished, cases):
    folder = unfinished[0]
    cases["processor"].new.save_pretrained(folder)  # the processor beside the model
    assert cases["model and its code"].found(folder) == "new" and not list(folder.glob(".*"))
    assert cases["processor"].found(folder) == "new"


def test_what_another_process_leaves_meanwhile_is_finished_first(cases, tmp_path, monkeypatch):
    folder = cases["model"].prepare(tmp_path / "folder")
    with saving_saisa.saved_together(folder) as new:
        cases["model"].new.save_pretrained(new, **PARTS)
        interrupted(monkeypatch, lambda: cases["model"].old.save_pretrained(folder, variant="fp16"))
    assert cases["model"].found(folder) == "new" and not list(folder.glob(".*"))
    fp16 = SaisaForConditionalGeneration.from_pretrained(folder, config=cases["model"].old.config, variant="fp16")
    assert of_model(fp16)[-1] == of_model(cases["model"].old)[-1]


def test_a_good_copy_put_over_an_interrupted_folder_stays(unfinished, cases, tmp_path):
    folder, case = unfinished[0], cases["model"]
    good = case.prepare(tmp_path / "good")
    shutil.copytree(good, folder, dirs_exist_ok=True)
    cases["processor"].new.save_pretrained(folder)
    assert case.found(folder) == "old" and not [name for name in names(folder) if name.startswith(".")]


def test_a_journal_of_somebody_else_reaches_no_file_outside(tmp_path, cases):
    folder, treasure = cases["model"].prepare(tmp_path / "folder"), tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "gold.safetensors").write_text("gold")
    for away in ("../treasure", str(treasure), ".saving./../../treasure", ""):
        journal = {UNFINISHED: "no", "folder": away, "files": ["../treasure/model.safetensors", "config.json"]}
        (folder / "config.json").write_text(json.dumps(journal))
        cases["model"].complete(folder)
    assert names(treasure) == ["gold.safetensors"]
    for broken in ({}, {"folder": 3}, {"folder": ".saving.x"}, {"folder": ".saving.x", "files": 3}):
        (folder / "config.json").write_text(json.dumps({UNFINISHED: "no"} | broken))
        cases["model"].complete(folder)


# --- saving that is not killed ----------------------------------------------------------------------------------------


def test_what_an_earlier_save_left_is_never_loaded_in_place_of_the_new(tmp_path):
    old, new = models()
    folder = tmp_path / "folder"
    ways = [{}, PARTS, {"variant": "fp16"}, PARTS | {"variant": "fp16"}]
    for one, way in zip((old, new) * 4, [*ways, *reversed(ways)], strict=True):
        one.save_pretrained(folder, **way)
        variant = {"variant": way["variant"]} if "variant" in way else {}
        assert of_model(
            SaisaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, **variant)
        ) == of_model(one)
    weights = {name for name in names(folder) if name.endswith(".safetensors")}
    assert weights == {"model.safetensors"} | {name for name in weights if "fp16" in name}


def test_code_of_former_names_goes_and_other_peoples_stays(cases, tmp_path):
    folder = cases["model and its code"].prepare(tmp_path / "folder")
    (folder / "upgrade_12345678_modeling_saisa.py").write_text("# Copyright 2026 The saisa_hf authors.\n")
    cases["model and its code"].save(folder)
    others = {"my_saisa.py", "upgrade_12345678_modeling_saisa.py"}
    assert {path.name for path in folder.glob("*_saisa.py")} == set(current_code()) | others


def test_links_to_the_same_code_stay(cases, tmp_path):
    """As those of this package's own checkpoint."""
    folder = cases["model"].prepare(tmp_path / "folder")
    for path in folder.glob("*_saisa.py"):
        if path.name != "my_saisa.py":
            path.unlink()
            path.symlink_to((DEMO / path.name).resolve())
    cases["model"].complete(folder)
    assert all(path.is_symlink() for path in folder.glob("*_saisa.py") if path.name != "my_saisa.py")


def test_what_a_killed_process_left_goes_and_what_a_living_one_writes_stays(cases, tmp_path):
    case = cases["model"]
    folder = case.prepare(tmp_path / "folder")
    dead, living = folder / f"{HIDDEN}dead", folder / f"{HIDDEN}live"
    for path in (dead, living):
        path.mkdir()
        (path / "model.safetensors").write_bytes(b"half")
    with saving_saisa.locked(living) as held:
        assert held
        case.save(folder)
    assert not dead.exists() and (living / "model.safetensors").read_bytes() == b"half"
    case.complete(folder)


def test_on_simple_file_systems_saving_works_and_only_what_is_old_goes(cases, tmp_path, monkeypatch):
    """Without locks, and without writing to a file that is there."""

    def no_locks(*_):
        raise OSError("Function not implemented")

    def once(path, mode="r", *arguments, opened=Path.open, **options):
        assert "+" not in mode
        return opened(path, mode, *arguments, **options)

    monkeypatch.setattr(saving_saisa, "flock", no_locks)
    monkeypatch.setattr(Path, "open", once)
    case = cases["model"]
    folder = case.prepare(tmp_path / "folder")
    young, old = folder / f"{HIDDEN}young", folder / f"{HIDDEN}old"
    for path, age in ((young, 3600), (old, 100_000)):
        path.mkdir()
        os.utime(path, (time.time() - age,) * 2)
    case.save(folder)
    assert case.found(folder) == "new" and young.exists() and not old.exists()


def test_a_save_that_fails_changes_nothing_and_says_that_there_is_no_room(tmp_path):
    old, new = models()
    with small_disk(tmp_path / "disk", "8m") as disk:
        old.save_pretrained(disk / "folder")
        before = state(disk / "folder")
        with pytest.raises(OSError, match=r"Saving into \S+folder failed: .*New files need room beside the old ones"):
            new.save_pretrained(disk / "folder")
        assert state(disk / "folder") == before


def test_a_file_is_no_folder_to_save_into(cases, tmp_path):
    (tmp_path / "file").write_text("")
    for one in (cases["model"].new, cases["model"].new.config, cases["processor"].new):
        with pytest.raises(ValueError, match=r"save_directory '\S+file' is a file. Expected a folder."):
            one.save_pretrained(tmp_path / "file")


def test_processes_that_do_not_write_leave_nothing_and_wait_for_no_disk(cases, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: pytest.fail("of files that go"))
    cases["model"].new.save_pretrained(tmp_path / "folder", is_main_process=False)
    assert names(tmp_path / "folder") == []


# --- destinations where folders cannot be swapped, `upgrade` and `build --from-llava` ---------------------------------


def make(path: Path) -> None:
    """What a command does, in little."""
    with Destination(path, overwrite=True, log=str).new_folder() as new:
        (new / "new.txt").write_text("new")
        (new / "more.txt").write_text("new")


def test_where_folders_cannot_be_swapped_a_killed_run_loses_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(destination, "_exchange", lambda first, second: False)
    (tmp_path / "whole").mkdir()
    make(tmp_path / "whole" / "dst")
    new = state(tmp_path / "whole" / "dst")
    steps = killed_at_step(lambda: make(tmp_path / "whole" / "dst"), tmp_path / "whole" / "dst", 0)
    missing = 0
    for step in range(1, steps + 1):
        place = tmp_path / str(step) / "dst"
        place.mkdir(parents=True)
        (place / "old.txt").write_text("old")
        old = state(place)
        assert killed_at_step(lambda place=place: make(place), place, step) is None
        missing += not place.exists()
        with contextlib.suppress(FileExistsError):  # whoever names it next gets it back
            Destination(place, log=str)
        assert state(place) in (old, new)
        make(place)
        assert state(place) == new and names(place.parent) == ["dst"], step
    assert missing >= 1


def test_what_has_such_a_name_and_is_somebody_elses_stays(tmp_path):
    theirs = tmp_path / ".dst.abcdefgh.old"
    theirs.mkdir()
    (theirs / "letter.txt").write_text("dear")
    (tmp_path / ".dst.ijklmnop.old").write_text("a file")
    make(tmp_path / "dst")
    assert (theirs / "letter.txt").exists() and (tmp_path / ".dst.ijklmnop.old").exists()


@pytest.mark.slow
def test_an_upgrade_killed_at_random_moments_is_completed_by_the_next(tmp_path):
    whole, chance, found = old_checkpoint(tmp_path / "whole"), random.Random(5), []
    before = state(whole)
    seconds = duration(lambda: upgrade(whole, log=str))
    after = state(whole)
    for number in range(MOMENTS):
        folder = old_checkpoint(tmp_path / f"killed-{number}")
        assert state(folder) == before
        killed_after(lambda folder=folder: upgrade(folder, log=str), chance.uniform(0, 1.1) * seconds)
        found.append(generation(folder))
        upgrade(folder, log=str)
        assert state(folder) == after
    assert set(found) <= {"old", "new"}


@pytest.mark.slow
def test_a_llava_that_is_made_a_saisa_and_killed_at_random_moments_goes_on(tmp_path):
    make_llava().save_pretrained(tmp_path / "llava")
    make_processor().save_pretrained(tmp_path / "llava")
    (tmp_path / "pictures").mkdir()
    for number in range(12):
        draw(number).save(tmp_path / "pictures" / f"{number}.png")
    fit = Fit(pictures=12, held_out=4, steps=8, batch_tokens=64, answer_tokens=3)
    options = {"fit": fit, "prompts": PROMPTS, "log": lambda line: None, "overwrite": True, **PARTS}

    def run(place):
        from_llava(tmp_path / "llava", tmp_path / "pictures", place, **options)

    def result(place):
        """All but the seconds that it took."""
        return {name: digest for name, digest in state(place).items() if name != "from_llava.json"}

    (tmp_path / "whole").mkdir()
    seconds = duration(lambda: run(tmp_path / "whole" / "dst"))
    wanted, chance, found = result(tmp_path / "whole" / "dst"), random.Random(11), []
    for number in range(MOMENTS):
        place = tmp_path / f"killed-{number}" / "dst"
        place.mkdir(parents=True)
        (place / "old.txt").write_text("old")
        killed_after(lambda place=place: run(place), chance.uniform(0.05, 1.05) * seconds)
        found.append("old" if names(place) == ["old.txt"] else "new" if result(place) == wanted else "a mixture")
        run(place)
        assert result(place) == wanted and names(place.parent) == ["dst"], number
    assert set(found) <= {"old", "new"}
