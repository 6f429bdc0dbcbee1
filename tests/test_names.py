# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The names of transformers that checkpoints' code uses: which they are, and that most of them can go without harm."""

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from apart import alone, succeeds
from PIL import Image

from saisa_hf import compat_saisa
from saisa_hf.compat_saisa import NEWEST_TESTED, OLDEST_TESTED, needed, optional
from saisa_hf.demo.run import CHECKPOINT
from saisa_hf.demo.scenes import draw, held_out_questions


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from transformers_names import CODE, END, START, counts, names, removable  # noqa: E402


LIST = Path(__file__).parent / "fixtures" / "transformers_names.txt"
PAGE = ROOT / "docs" / "compatibility.md"
FOUND = names(CODE)
REMOVABLE = removable(FOUND)


def test_a_new_name_is_added_on_purpose():
    assert list(FOUND) == LIST.read_text(encoding="utf-8").split("\n")[:-1], (
        "The files that travel with checkpoints use other names of transformers. If that is meant: "
        "python scripts/transformers_names.py --list > tests/fixtures/transformers_names.txt"
    )
    table = PAGE.read_text(encoding="utf-8").split(START)[1].split(END)[0]
    assert set(re.findall(r"^\| `([^`]+)`", table, re.M)) == set(FOUND)
    now = counts(FOUND)
    assert f"| now | {now['all']} | {now['core']} | {now['private']} |" in table


def test_the_page_names_the_releases_that_were_tested():
    oldest, newest = (".".join(map(str, minor)) for minor in (OLDEST_TESTED, NEWEST_TESTED))
    assert f"Tested: transformers {oldest} to {newest}, every minor release." in PAGE.read_text(encoding="utf-8")
    pins = [(ROOT / "constraints" / f"transformers-{major}.txt").read_text() for major in (4, 5)]
    assert f"transformers=={oldest}." in pins[0] and f"transformers=={newest}." in pins[1]


def test_names_that_are_missing_are_replaced_or_named():
    assert optional("transformers", "NoSuchThing", 5) == 5 and optional("transformers.nowhere", "x") is None
    for module in ("transformers", "transformers.nowhere"):
        with pytest.raises(ImportError, match=rf"^A feature: this needs {module}\.NoSuchThing, which transformers \d"):
            needed("A feature", module, "NoSuchThing")


IMPORTED = """
import contextlib, importlib, sys
import saisa_hf
from saisa_hf import compat_saisa
for version in sys.argv[1:]:
    compat_saisa.transformers.__version__ = version
    compat_saisa.VERSION = tuple(map(int, version.split(".")[:2]))
    with contextlib.suppress(ValueError):  # the classes are registered already
        importlib.reload(saisa_hf)
"""


def test_a_newer_release_than_all_that_were_tested_is_named_in_one_line():
    versions = [f"{NEWEST_TESTED[0]}.{NEWEST_TESTED[1] + more}.0" for more in (0, 1)]
    environment = {key: value for key, value in os.environ.items() if key != "TRANSFORMERS_VERBOSITY"}
    done = succeeds(IMPORTED, *versions, environment=environment, cwd=ROOT)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "saisa_hf was tested with" in line]
    assert len(lines) == 1 and f"; {versions[1]} is newer" in lines[0]


# --- drills -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drills(tmp_path_factory):
    """{drill: error or None}: each name taken away in turn, all of them at once, and "additions"."""
    folder = tmp_path_factory.mktemp("drills")
    shutil.copytree(CHECKPOINT, folder / "checkpoint")
    ((scene, question),) = held_out_questions(1, seed=1)
    Image.fromarray(draw(scene)).save(folder / "picture.png")
    arguments = (folder / "results.json", folder / "checkpoint", "additions", *REMOVABLE, "+".join(REMOVABLE))
    succeeds(Path(__file__).with_name("names_worker.py"), *arguments, environment=alone(folder / "home"), cwd=folder)
    results = json.loads((folder / "results.json").read_text())
    assert results["text"].strip() == question.answer
    return results["drills"]


@pytest.mark.parametrize("name", [*REMOVABLE, "+".join(REMOVABLE)], ids=[*REMOVABLE, "all at once"])
def test_without_a_name_the_model_loads_answers_and_saves_and_a_feature_names_it(drills, name):
    assert drills[name] is None, drills[name]


def test_further_arguments_and_fields_change_nothing(drills):
    assert drills["additions"] is None, drills["additions"]


def test_substitutes_compute_what_transformers_does():
    x = torch.randn(2, 3, 8)
    for name, activation in compat_saisa.PLAIN_ACTIVATIONS.items():
        torch.testing.assert_close(activation(x), compat_saisa.ACT2FN[name](x))
