# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The quick suite on the newest releases of transformers, huggingface_hub, peft and trl (`make test-newest`).

Installs them unpinned into their own environment, `.venv/newest`, which later runs update; prints their versions; and runs
`tests/test_newest.py`. PyTorch is pinned as in all environments. pip's own settings decide where packages come from. Exits
with 1 if the registry does not answer or a test fails.
"""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / ".venv" / "newest"
PYTHON = HOME / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
FOLLOWED = ["transformers", "huggingface_hub", "peft", "trl", "accelerate"]
TOOLS = ["pytest", "pytest-timeout", "jinja2"]
VERSIONS = "import importlib.metadata as m; print(*(f'{x} {m.version(x)}' for x in %r), sep='\\n')"


def pip(*arguments: str) -> subprocess.CompletedProcess:
    command = [str(PYTHON), "-m", "pip", "--disable-pip-version-check", *arguments]
    return subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main() -> int:
    if not PYTHON.exists():
        venv.create(HOME, with_pip=True)
    # without an answer from the registry, pip would accept the installed versions as the newest
    asked = pip("index", "versions", "transformers")
    if asked.returncode or "Available versions" not in asked.stdout:
        print(f"The package registry does not list the releases of transformers:\n{asked.stdout}", file=sys.stderr)
        return 1
    upgrade = ["--upgrade", "--upgrade-strategy", "eager", "-c", "constraints/base.txt"]
    installed = pip("install", "--quiet", *upgrade, *FOLLOWED, *TOOLS, "-e", ".[demo]")
    if installed.returncode:
        print(f"The newest releases could not be installed:\n{installed.stdout}", file=sys.stderr)
        return 1
    print(subprocess.check_output([str(PYTHON), "-c", VERSIONS % [*FOLLOWED, "torch"]], text=True), end="", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.call([str(PYTHON), "-m", "pytest", "tests/test_newest.py"], cwd=ROOT, env=environment)


if __name__ == "__main__":
    sys.exit(main())
