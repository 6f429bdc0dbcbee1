# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa upgrade`: new code beside old weights, in folders that load at every moment, and on a hub of its own."""

import importlib.machinery
import importlib.util
import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from apart import succeeds
from hub_standin import HubStandIn

import saisa_hf
from saisa_hf import SaisaConfig
from saisa_hf.checkpoint_saisa import AUTO_MAP, PROCESSOR_AUTO_MAP, code_files
from saisa_hf.checkpoints import upgrade
from saisa_hf.checkpoints.auto_map import with_auto_map
from saisa_hf.checkpoints.model_card import flop_section, model_card, usage_section
from saisa_hf.cli import main


DEMO = Path(saisa_hf.__file__).parent / "demo" / "checkpoint"
REPO = "someone/old-saisa"

# Code of an older release in little. Its modules have the names of today's, and another content: a folder in which both are
# mixed cannot be imported. Like today's, those that auto_map names import all others: of a local folder transformers 4.57
# copies these alone.
OLD_CODE = {
    "old_helpers_saisa.py": "HELPS = True\n",
    "compat_saisa.py": "from .old_helpers_saisa import HELPS\n\nOLD_COMPAT = HELPS\n",
    "configuration_saisa.py": """\
from transformers import PretrainedConfig

from .compat_saisa import OLD_COMPAT
from .old_helpers_saisa import HELPS


class SaisaConfig(PretrainedConfig):
    model_type = "saisa"
    generation = "old" if OLD_COMPAT else None
""",
    "modeling_saisa.py": """\
from .compat_saisa import OLD_COMPAT
from .configuration_saisa import SaisaConfig
from .old_helpers_saisa import HELPS


class SaisaModel:
    config_class = SaisaConfig if OLD_COMPAT else None


class SaisaForConditionalGeneration(SaisaModel):
    pass
""",
    "processing_saisa.py": """\
from .compat_saisa import OLD_COMPAT
from .old_helpers_saisa import HELPS


class SaisaProcessor:
    generation = OLD_COMPAT and HELPS
""",
}

LOAD = """
import sys

class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name == "saisa_hf" or name.startswith("saisa_hf."):
            raise ModuleNotFoundError("saisa_hf is not installed here")

sys.meta_path.insert(0, NoPackage())
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

for folder in sys.argv[1:]:
    kind, path = folder.split("=")
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    assert (getattr(config, "generation", "new") == "old") == (kind == "old"), folder
    if kind == "new":
        model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
        assert type(processor).__name__ == "SaisaProcessor"
        model.save_pretrained(path + "-saved")
"""


class Killed(BaseException):
    pass


def old_checkpoint(folder: Path) -> Path:
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for name, source in OLD_CODE.items():
        (folder / name).write_text(source)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def current_code() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in code_files()}


def not_code(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if not name.endswith(".py")}


numbers = itertools.count()


def generation(folder: Path) -> str:
    """By which generation's code `folder` loads, going by its auto_map as transformers does; ImportError if by none."""
    package = f"upgraded_{next(numbers)}"
    spec = importlib.machinery.ModuleSpec(package, None, is_package=True)
    spec.submodule_search_locations = [str(folder)]
    sys.modules[package] = importlib.util.module_from_spec(spec)
    importlib.invalidate_caches()
    found = {file: set() for file in ("config.json", "processor_config.json")}
    try:
        for file, kinds in found.items():
            for reference in set(json.loads((folder / file).read_text())["auto_map"].values()):
                module, name = reference.split(".")
                module = importlib.import_module(f"{package}.{module}")
                assert hasattr(module, name)
                kinds.add("old" if hasattr(module, "OLD_COMPAT") else "new")
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == package]:
            del sys.modules[name]
    assert all(len(kinds) == 1 for kinds in found.values()), found
    return found["config.json"].pop()


def stop_at(monkeypatch, number: int):
    """Lets the process die at the `number`th file that would be put in place or removed."""
    left = iter([*[True] * number, False])

    def dying(function):
        def run(*arguments, **options):
            if not next(left, False):
                raise Killed
            return function(*arguments, **options)

        return run

    monkeypatch.setattr(os, "replace", dying(os.replace))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))


def test_the_code_is_brought_up_and_every_other_byte_stays(tmp_path, capsys):
    folder = old_checkpoint(tmp_path / "old")
    before = contents(folder)
    untouched = {name: (folder / name).stat() for name in not_code(before)}
    assert main(["upgrade", str(folder)]) == 0
    after = contents(folder)
    assert not_code(after) == not_code(before)
    assert {name: content for name, content in after.items() if name.endswith(".py")} == current_code()
    for name, stat in untouched.items():  # the very same files
        found = (folder / name).stat()
        assert (found.st_ino, found.st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns), name
    out = capsys.readouterr().out
    assert (
        "modeling_saisa.py: brought up" in out and "old_helpers_saisa.py: removed" in out and "config.json" not in out
    )
    assert main(["upgrade", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder} is up to date\n" and contents(folder) == after


def test_check_tells_and_changes_nothing(tmp_path, capsys):
    folder = old_checkpoint(tmp_path / "old")
    before = contents(folder)
    assert main(["upgrade", str(folder), "--check"]) == 1
    assert contents(folder) == before
    out = capsys.readouterr().out
    assert "modeling_saisa.py: would be brought up" in out and "old_helpers_saisa.py: would be removed" in out
    assert main(["upgrade", str(folder)]) == 0
    assert main(["upgrade", str(folder), "--check"]) == 0


def test_killed_anywhere_it_loads_and_the_next_run_completes_it(tmp_path, monkeypatch):
    whole = old_checkpoint(tmp_path / "whole")
    before = contents(whole)
    upgrade.upgrade(whole, log=str)
    wanted = contents(whole)
    code = len(code_files())
    seen = []
    # the first and the last of each step, and some in the midst of it
    for number in [0, 1, code - 1, code, code + 1, code + 2, code + 3, 2 * code - 1, 2 * code, 2 * code + 1, 2 * code + 2,
                   2 * code + 3, 2 * code + 4, 2 * code + 9]:  # fmt: skip
        folder = tmp_path / f"killed-{number}"
        folder.mkdir()
        for name, content in before.items():
            (folder / name).write_bytes(content)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_at(patch, number)
            upgrade.upgrade(folder, log=str)
        seen.append(generation(folder))
        left = contents(folder)
        assert {name: left[name] for name in not_code(before) if name not in upgrade.JSON_FILES} == {
            name: content for name, content in not_code(before).items() if name not in upgrade.JSON_FILES
        }
        assert upgrade.upgrade(folder, check=True, log=str)
        upgrade.upgrade(folder, log=str)
        assert contents(folder) == wanted, number
    assert seen == sorted(seen, reverse=True) and set(seen) == {"old", "new"}


def test_a_folder_killed_midway_and_one_upgraded_load_in_transformers(tmp_path, monkeypatch):
    code = len(code_files())
    folders = []
    for number, kind in ((5, "old"), (code + 4, "new"), (2 * code + 3, "new")):
        folder = old_checkpoint(tmp_path / f"killed{number}")
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_at(patch, number)
            upgrade.upgrade(folder, log=str)
        folders.append(f"{kind}={folder}")
    folder = old_checkpoint(tmp_path / "upgraded")
    upgrade.upgrade(folder, log=str)
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    succeeds(LOAD, *folders, f"new={folder}", environment=environment, cwd=tmp_path)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('{"b": 1.0e5, "auto_map": {"x": 1}, "a": NaN}', '{"b": 1.0e5, "auto_map": {"AutoX": "y.Z"}, "a": NaN}'),
        ('{"b": {"auto_map": 1},  "a": 2 }', '{"auto_map": {"AutoX": "y.Z"}, "b": {"auto_map": 1},  "a": 2 }'),
        (
            '{\n    "ä": "auto_map",\n    "auto_map": {\n        "x": 1\n    },\n    "a": []\n}\n',
            '{\n    "ä": "auto_map",\n    "auto_map": {\n        "AutoX": "y.Z"\n    },\n    "a": []\n}\n',
        ),
        ('{\n\t"a": "\\u00e4"\n}', '{\n\t"auto_map": {\n\t\t"AutoX": "y.Z"\n\t},\n\t"a": "\\u00e4"\n}'),
    ],
)
def test_json_changes_in_auto_map_alone(before, after, newline):
    before, after = before.replace("\n", newline), after.replace("\n", newline)
    assert with_auto_map(before.encode(), {"AutoX": "y.Z"}) == after.encode()


def test_auto_map_of_an_older_release_and_of_other_peoples_code(tmp_path):
    folder = old_checkpoint(tmp_path / "old")
    own = {"AutoModelForSequenceClassification": "modeling_mine.Mine"}
    maps = {
        "config.json": {"AutoConfig": "configuration_saisa.SaisaConfig", "AutoModelOld": "old_helpers_saisa.Old"} | own,
        "processor_config.json": {"AutoProcessor": "someone/repo--processing_saisa.SaisaProcessor"},
        "tokenizer_config.json": {"AutoProcessor": "old_helpers_saisa.X", "AutoTokenizer": ["tokens.Mine", None]},
    }
    rest = {}
    for name, auto_map in maps.items():
        path = folder / name
        path.write_bytes(with_auto_map(path.read_bytes(), auto_map))
        rest[name] = {key: value for key, value in json.loads(path.read_text()).items() if key != "auto_map"}
    assert upgrade.upgrade(folder, log=str)
    found = {name: json.loads((folder / name).read_text()) for name in maps}
    assert found["config.json"].pop("auto_map") == AUTO_MAP | own
    assert found["processor_config.json"].pop("auto_map") == PROCESSOR_AUTO_MAP
    assert found["tokenizer_config.json"].pop("auto_map") == PROCESSOR_AUTO_MAP | {
        "AutoTokenizer": ["tokens.Mine", None]
    }
    assert found == rest
    assert "auto_map" not in json.loads((folder / "preprocessor_config.json").read_text())
    assert contents(folder)["config.json"].startswith(contents(DEMO)["config.json"].split(b'"auto_map"')[0])


def test_a_link_is_replaced_by_a_file_and_what_it_points_to_stays(tmp_path):
    folder = old_checkpoint(tmp_path / "old")
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for name in ("modeling_saisa.py", "old_helpers_saisa.py", "config.json", "model.safetensors"):
        (folder / name).rename(blobs / name)
        (folder / name).symlink_to(blobs / name)
    (folder / "head_saisa.py").symlink_to(blobs / "nowhere.py")
    before = contents(blobs)
    upgrade.upgrade(folder, log=str)
    assert contents(blobs) == before and not os.path.lexists(folder / "old_helpers_saisa.py")
    assert not (folder / "modeling_saisa.py").is_symlink() and not (folder / "head_saisa.py").is_symlink()
    assert (folder / "config.json").is_symlink() and (folder / "model.safetensors").is_symlink()
    assert {path.name: path.read_bytes() for path in folder.glob("*.py")} == current_code()


def test_code_that_a_link_takes_from_the_package_is_current(tmp_path):
    folder = tmp_path / "linked"
    shutil.copytree(DEMO, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    for path in code_files():
        (folder / path.name).symlink_to(path)
    assert not upgrade.upgrade(folder, log=str)


def test_of_the_card_what_this_package_wrote_is_brought_up(tmp_path, capsys):
    folder = old_checkpoint(tmp_path / "old")
    config = SaisaConfig.from_dict(json.loads((folder / "config.json").read_text()))
    card = model_card(config, repo_id="me/mine", license="llama2", tags=["own"])
    mine = card.replace("\n## Parameters", "\n## What I did\n\nA paragraph.\n\n## Parameters")
    wrong = re.sub(r"\| LLaVA \| [\d.]+ \|", "| LLaVA | 7.77e+03 |", mine)
    assert wrong != mine
    (folder / "README.md").write_text(wrong)
    assert main(["upgrade", str(folder)]) == 0
    assert (folder / "README.md").read_text() == mine
    assert "README.md: brought up" in capsys.readouterr().out


@pytest.mark.parametrize("card", [b"# Mine\n\n## Usage\n\nAsk me.\n", b"\xff\xfe not UTF-8", None])
def test_a_card_that_somebody_wrote_stays(tmp_path, capsys, card):
    folder = old_checkpoint(tmp_path / "old")
    if card is not None:
        (folder / "README.md").write_bytes(card)
    assert main(["upgrade", str(folder)]) == 0
    assert contents(folder).get("README.md") == card
    assert ("README.md is not changed" in capsys.readouterr().out) == (card is not None)


def test_a_usage_section_with_a_line_of_ones_own_stays(tmp_path):
    folder = old_checkpoint(tmp_path / "old")
    card = model_card(SaisaConfig.from_dict(json.loads((folder / "config.json").read_text())))
    card = card.replace("The model's code comes with", "Mind the gap. The model's code comes with")
    (folder / "README.md").write_text(card)
    upgrade.upgrade(folder, log=str)
    assert (folder / "README.md").read_text() == card


def test_the_cards_own_sections_are_known():
    """Where this fails, the card's text was changed: add the new digest to CARD_FORMS and keep the old ones."""
    assert upgrade.section_form(usage_section("me/mine")) in upgrade.CARD_FORMS["Usage"]
    for config in (SaisaConfig(), SaisaConfig(projector_hidden_size=9)):
        assert upgrade.section_form(flop_section(config)) in upgrade.CARD_FORMS["Cost of a prompt"]


def test_what_is_no_checkpoint_is_one_line_of_error(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(upgrade, "HfApi", None)  # nobody asks the hub
    (tmp_path / "empty").mkdir()
    for name, config in {"llama": '{"model_type": "llama"}', "broken": '{"model_type"', "list": "[]"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
    (tmp_path / "file").write_text("")
    for arguments, status, said in (
        (["empty"], 1, "has no config.json"),
        (["llama"], 2, "model_type 'llama': expected 'saisa'"),
        (["broken"], 2, "broken/config.json is not JSON"),
        (["list"], 2, "holds a list: expected a JSON object"),
        (["file"], 1, "'file' is a file"),
        (["./no/where", "--push-to-hub"], 1, "'./no/where' is not a folder"),
        (["~/where", "--check"], 1, "is not a folder"),
        (["~nobody-of-that-name/where", "--check"], 1, "is not a folder"),
        (["/no/where", "--check"], 1, "is not a folder"),
        (["a/b/c", "--check"], 1, "is not a folder"),
        (["name", "--check"], 1, "expected the folder of a checkpoint, or a repository 'user/name'"),
        (["someone/model"], 2, "pass --check to see what would change in it, or --push-to-hub"),
        (["llama", "--push-to-hub"], 2, "goes with a repository 'user/name', got the folder llama"),
    ):
        assert main(["upgrade", *arguments]) == status, arguments
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, arguments


UPGRADE = """
import json, sys
from saisa_hf.cli import main
for status, *arguments in json.loads(sys.argv[1]):
    assert main(["upgrade", *arguments]) == status, arguments
"""


def run(hub, home, *commands, without=()):
    """Runs `saisa upgrade` in a process that knows no hub but `hub`; each command begins with the status it has to have."""
    environment = os.environ | hub.environment(home) | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_OFFLINE": "0"}
    environment = {name: value for name, value in environment.items() if name not in without}
    done = succeeds(UPGRADE, json.dumps(commands), environment=environment, cwd=home)
    return done.stdout + done.stderr


def test_a_repository_gets_one_commit_and_its_weights_are_not_downloaded(tmp_path):
    files = contents(old_checkpoint(tmp_path / "old"))
    with HubStandIn() as hub:
        hub.create(REPO)
        hub.commit(REPO, files | {"sub/other_saisa.py": b"mine"})
        out = run(hub, tmp_path, (1, REPO, "--check"), (1, "someone/nobody", "--check"))
        assert "modeling_saisa.py: would be brought up" in out and "README.md: would be brought up" in out
        assert "someone/nobody is not a folder here and cannot be downloaded from the hub" in out
        out = run(hub, tmp_path, (1, REPO, "--push-to-hub"), without=["HF_TOKEN"])
        assert "the hub does not accept the login" in out
        assert not [line for line in hub.requests if line.startswith(("POST", "PUT"))]
        out = run(hub, tmp_path, (0, REPO, "--push-to-hub"), (0, REPO, "--check"), (0, REPO, "--push-to-hub"))
        assert out.count("uploaded it to") == 1 and out.count(f"{REPO} is up to date") == 2
        assert len(hub.repositories[REPO]) == 3
        after = dict(hub.files(REPO))
        card = after.pop("README.md").decode()
        assert not [line for line in hub.requests if "safetensors" in line or "tokenizer.json" in line]
    assert after == not_code(files) | current_code() | {"sub/other_saisa.py": b"mine"}
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in card
