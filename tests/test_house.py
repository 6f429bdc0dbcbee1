# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The sizes that the code keeps to, so that a stranger can read it, counted by `scripts/house.py`."""

import importlib.util
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "saisa_hf"


@pytest.fixture(scope="module")
def house():
    spec = importlib.util.spec_from_file_location("house", ROOT / "scripts" / "house.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_model_is_one_short_file_of_short_functions(house):
    model = PACKAGE / "modeling_saisa.py"
    assert house.lines(model) <= 600 and house.longest_function(model)[0] <= 60


def test_what_travels_with_a_checkpoint_is_little(house):
    travelling = list(PACKAGE.glob("*_saisa.py"))
    assert len(travelling) <= 17 and sum(map(house.lines, travelling)) <= 6324


def test_no_file_of_a_room_is_long(house):
    long = {path.name: house.lines(path) for path in house.python_files(PACKAGE) if house.lines(path) > 400}
    assert all(name.endswith("_saisa.py") for name in long), long


def test_no_modules_import_each_other(house, tmp_path):
    assert house.circles(PACKAGE) == []
    for name, text in {
        "one": "from . import two",
        "two": "def f():\n    from .three import x",
        "three": "import pack.one",
    }.items():
        (tmp_path / "pack").mkdir(exist_ok=True)
        (tmp_path / "pack" / f"{name}.py").write_text(text)
    assert house.circles(tmp_path / "pack") == [["pack.one", "pack.three", "pack.two"]]


def test_the_readme_is_short(house):
    assert house.lines(ROOT / "README.md") <= 150
