# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The remote-code round trip on every minor release of transformers that this project supports (`make compat`).

A base environment holds PyTorch and everything that does not depend on the release. A folder per release, filled by `pip
install --target`, holds transformers and those of its requirements that the base lacks or has in another version. Both are
kept in `.compat/` and reused. `tests/roundtrip.py` does the work, in one process per release, with the base's interpreter,
the folder on PYTHONPATH and, except for step 1, saisa_hf not importable:

1. The oldest and the newest release save the same models and processors with the package.
2. Every release loads what either saved, compares it with what the saver computed, saves it and loads it again.
3. The oldest and the newest release load what each of the others saved.

Prints a Markdown table, and writes it between two markers in the files given by `--write`. Exits with 1 if a cell of the
table is not "equal"; prints the reasons, and keeps the output of the processes in `.compat/run/`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import venv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from saisa_hf.compat_saisa import OLDEST_TESTED


ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / ".compat"
RUN = WORK / "run"
# copies, so that all processes of a run see the same code even if files are edited meanwhile
ROUND_TRIP = RUN / "roundtrip.py"
CODE = RUN / "src" / "saisa_hf"
BASE = ["torch", "numpy", "pillow", "jinja2", "psutil", "pyyaml", "regex", "requests", "httpx", "typer", "tqdm"]
BASE += ["filelock", "fsspec", "packaging", "safetensors", "hf-xet", "sentencepiece", "protobuf"]
START, END = "<!-- compat: start -->", "<!-- compat: end -->"


def pip(python: Path, *arguments: str) -> str:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def base_python() -> Path:
    """The interpreter of the base environment, which is created if missing."""
    python = WORK / "base" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    complete = WORK / "base" / "complete"
    if not complete.exists():
        venv.create(WORK / "base", with_pip=True, clear=True)
        pip(python, "install", "--quiet", "-c", str(ROOT / "constraints" / "base.txt"), *BASE)
        # it requires huggingface_hub, which comes with each release
        pip(python, "install", "--quiet", "--no-deps", "accelerate")
        complete.touch()
    return python


def minor_releases(python: Path) -> list[str]:
    """Minor releases of transformers from `OLDEST_TESTED` to the newest, oldest first: "4.57", "5.0", ..."""
    listed = re.search(r"Available versions: (.*)", pip(python, "index", "versions", "transformers"))[1]
    minors = sorted({tuple(map(int, version.split(".")[:2])) for version in listed.split(", ")})
    return [f"{major}.{minor}" for major, minor in minors if (major, minor) >= OLDEST_TESTED]


def install(python: Path, minor: str) -> str:
    """Fills the folder of a minor release with its newest patch that was not yanked; returns that version."""
    folder, version = WORK / minor, WORK / minor / "version"
    if not version.exists():
        shutil.rmtree(folder, ignore_errors=True)
        # --target alone ignores the base and would install all requirements again
        report = WORK / f"{minor}.json"
        pip(python, "install", "--quiet", "--dry-run", "--report", str(report), f"transformers=={minor}.*")
        found = {
            item["metadata"]["name"]: item["metadata"]["version"] for item in json.loads(report.read_text())["install"]
        }
        report.unlink()
        pins = [f"{name}=={number}" for name, number in found.items()]
        pip(python, "install", "--quiet", "--no-deps", "--no-compile", "--target", str(folder), *pins)
        version.write_text(found["transformers"])
    return version.read_text()


def round_trip(python: Path, minor: str, name: str, *arguments: str, package=False) -> None:
    """Runs `tests/roundtrip.py` in a process outside the repository, with its own caches."""
    home = RUN / "home" / name
    home.mkdir(parents=True)
    path = [str(WORK / minor)] + [str(CODE.parent)] * package
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "PYTHONDONTWRITEBYTECODE": "",
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    with open(RUN / f"{name}.log", "w") as log:
        command = [str(python), str(ROUND_TRIP), *arguments]
        subprocess.run(command, env=environment, cwd=home, stdout=log, stderr=subprocess.STDOUT, timeout=1200)


def check(python: Path, minor: str, name: str, checkpoints: list[Path], resave: Path | None = None) -> dict:
    """{checkpoint: error message or None} of one release; if the process dies, all checkpoints fail."""
    if not checkpoints:
        return {}
    results = RUN / f"{name}.json"
    arguments = ["check", *map(str, checkpoints), "--code", str(CODE), "--results", str(results)]
    arguments += ["--resave", str(resave)] if resave else []
    try:
        round_trip(python, minor, name, *arguments)
        return {Path(path): error for path, error in json.loads(results.read_text()).items()}
    except (OSError, subprocess.TimeoutExpired) as error:
        return dict.fromkeys(checkpoints, f"the process did not finish: {error}; see {RUN / name}.log")


def cell(outcomes: list) -> str:
    return "equal" if outcomes and not any(outcomes) else "**differs**"


def table(versions: dict, savers: list, rows: dict) -> str:
    head = ["transformers", *(f"saved by {versions[saver]}" for saver in savers)]
    head += [f"saved again, read by {versions[saver]}" for saver in savers]
    lines = [head, ["---"] * len(head), *([versions[minor], *map(cell, cells)] for minor, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_table(path: Path, text: str) -> None:
    """Replaces the text between the two markers in `path`."""
    content = path.read_text(encoding="utf-8")
    if START not in content or END not in content:
        raise SystemExit(f"{path} has no markers for the table: it needs the lines {START!r} and {END!r}")
    before, after = content.split(START)[0], content.split(END)[1]
    path.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--releases", help="minor releases to run, as in 4.57,5.0; all of them by default")
    parser.add_argument("--jobs", type=int, default=2, help="processes to run in parallel (default: 2)")
    parser.add_argument("--write", type=Path, nargs="+", default=[], help="Markdown files to write the table into")
    arguments = parser.parse_args()

    started = time.monotonic()
    WORK.mkdir(exist_ok=True)
    python = base_python()
    minors = minor_releases(python)
    if arguments.releases:
        wanted = arguments.releases.split(",")
        if unknown := [minor for minor in wanted if minor not in minors]:
            raise SystemExit(f"--releases {arguments.releases}: {unknown} not found among {', '.join(minors)}")
        minors = [minor for minor in minors if minor in wanted]
    savers = sorted({minors[0], minors[-1]}, key=minors.index)

    shutil.rmtree(RUN, ignore_errors=True)
    shutil.copytree(ROOT / "src", RUN / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copy(ROOT / "tests" / "roundtrip.py", ROUND_TRIP)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        versions = dict(zip(minors, pool.map(lambda minor: install(python, minor), minors)))
        print(f"{len(minors)} releases installed after {time.monotonic() - started:.0f} s", flush=True)

        list(
            pool.map(lambda m: round_trip(python, m, f"save-{m}", "save", str(RUN / "saved" / m), package=True), savers)
        )
        saved = {saver: sorted(p.parent for p in (RUN / "saved" / saver).glob("*/config.json")) for saver in savers}
        for saver in savers:
            if not saved[saver]:
                raise SystemExit(
                    f"transformers {versions[saver]} saved nothing:\n{(RUN / f'save-{saver}.log').read_text()}"
                )
        checkpoints = [path for saver in savers for path in saved[saver]]

        def first(minor):
            return check(python, minor, f"load-{minor}", checkpoints, RUN / "again" / minor)

        loaded = {}
        for minor, outcome in zip(minors, pool.map(first, minors)):
            loaded[minor] = outcome
            print(f"{versions[minor]:>8}: {sum(not error for error in outcome.values())} of {len(outcome)}", flush=True)

        again = sorted(path.parent for path in (RUN / "again").glob("*/*/*/config.json"))
        outcomes = list(pool.map(lambda m: check(python, m, f"again-{m}", again), savers))

    rows, failures = {}, []
    for minor in minors:
        cells = [[loaded[minor][path] for path in saved[saver]] for saver in savers]
        again_paths = [RUN / "again" / minor / path.parent.name / path.name for path in checkpoints]
        # a checkpoint that could not be saved again cannot be read either
        cells += [[outcome.get(path, "was not saved") for path in again_paths] for outcome in outcomes]
        rows[minor] = cells
        failures += [f"{versions[minor]} loads {path.relative_to(RUN)}: {e}" for path, e in loaded[minor].items() if e]
    for saver, outcome in zip(savers, outcomes):
        failures += [f"{versions[saver]} loads {path.relative_to(RUN)}: {e}" for path, e in outcome.items() if e]

    text = table(versions, savers, rows)
    print(text)
    for failure in failures:
        print(failure, file=sys.stderr)
    for path in arguments.write:
        write_table(path, text)
    print(f"{time.monotonic() - started:.0f} s")
    return int(any(any(cell) for cells in rows.values() for cell in cells))


if __name__ == "__main__":
    sys.exit(main())
