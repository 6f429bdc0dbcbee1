# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs transformers' shared test suite for models and processors on saisa_hf.

    python conformance/run.py REPOSITORY TAG [--llava] [pytest arguments]

Copies the tests of release TAG from REPOSITORY, a git clone of transformers (bare or not), puts this folder's test files
beside them, and runs these against the installed transformers and saisa_hf. No test downloads anything from the hub. With
`--llava` the same tests run for LLaVA, and the tests that pass there but not here are listed.

Exits with 1 if a test fails.
"""

import argparse
import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from xml.etree import ElementTree

import transformers
from PIL import Image


HERE = Path(__file__).resolve().parent
WORK = HERE.parent / ".compat" / "conformance"
OURS = ("test_modeling_saisa.py", "test_processing_saisa.py")
LLAVA = ("../llava/test_modeling_llava.py", "test_processing_llava.py")  # its own needs files from the hub


def prepare(repository: str, tag: str) -> Path:
    """Prepares and returns the folder with the tests of release `tag`, to run pytest in."""
    tree = WORK / tag
    if not (tree / "complete").exists():
        shutil.rmtree(tree, ignore_errors=True)
        command = ["git", "-C", repository, "archive", tag, "tests", "utils", "conftest.py", "pyproject.toml"]
        files = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        with tarfile.open(fileobj=io.BytesIO(files)) as archive:
            archive.extractall(tree)
        # the image of the chat tests, which use a local file of this name instead of the one on the hub
        Image.effect_noise((64, 48), 60).convert("RGB").save(tree / "coco_sample.png")
        (tree / "src").mkdir()
        (tree / "complete").touch()
    # the tests import the library from this path
    library = tree / "src" / "transformers"
    library.unlink(missing_ok=True)
    library.symlink_to(Path(transformers.__file__).parent)
    folder = tree / "tests" / "models" / "saisa"
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").touch()
    for source in HERE.glob("test_*.py"):
        shutil.copy(source, folder)
    return tree


def run(tree: Path, files: tuple[str, ...], report: Path, arguments: list[str]) -> int:
    """Runs pytest in `tree`, writes JUnit XML to `report`, and returns the exit status."""
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--timeout", "600", "--junitxml", str(report)]
    command += ["-p", "no:warnings", "-p", "no:cacheprovider", *arguments]
    command += [os.path.normpath(f"tests/models/saisa/{name}") for name in files]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "HF_HUB_OFFLINE": "1"}
    status = subprocess.run(command, cwd=tree, env=environment).returncode
    if not report.exists():
        raise SystemExit(f"pytest exited with status {status} before it wrote its report.")
    return status


def outcomes(report: Path) -> dict[str, tuple[str, str]]:
    """{"modeling: name" or "processing: name": ("passed", "skipped" or "failed", reason)} of the tests in JUnit XML."""
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kind = "modeling" if "modeling" in case.get("classname") else "processing"
        outcome = ("passed", "")
        for child in case:
            if child.tag in ("skipped", "failure", "error"):
                outcome = ("skipped" if child.tag == "skipped" else "failed", child.get("message", ""))
        found[f"{kind}: {case.get('name')}"] = outcome
    return found


def print_counts(name: str, found: dict[str, tuple[str, str]]) -> None:
    for kind in ("modeling", "processing"):
        seen = [outcome for test, (outcome, _) in found.items() if test.startswith(kind)]
        print(f"{name}, {kind}: " + ", ".join(f"{seen.count(it)} {it}" for it in ("passed", "failed", "skipped")))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", help="a git clone of transformers that has TAG")
    parser.add_argument("tag", help=f"the release whose tests to run; installed: v{transformers.__version__}")
    parser.add_argument("--llava", action="store_true", help="list the tests that pass for LLaVA but not for SAISA")
    options, arguments = parser.parse_known_args()

    tree = prepare(options.repository, options.tag)
    status = run(tree, OURS, tree / "saisa.xml", arguments)
    ours = outcomes(tree / "saisa.xml")
    if options.llava:
        # LLaVA's integration tests load models from the hub
        run(tree, LLAVA, tree / "llava.xml", ["-k", "not IntegrationTest", *arguments])
        theirs = outcomes(tree / "llava.xml")
        print_counts("LLaVA", theirs)
        for test, (outcome, _) in sorted(theirs.items()):
            here, reason = ours.get(test, ("missing", ""))
            if outcome == "passed" and here != "passed":
                print(f"  passes for LLaVA, {here} for SAISA: {test} ({reason})")
    print_counts("SAISA", ours)
    return status


if __name__ == "__main__":
    sys.exit(main())
