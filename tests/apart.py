# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Programs in processes of their own, forked from one that has imported PyTorch and other libraries: to import these takes a
process four times as long as transformers alone."""

import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path


# What transformers imports, but nothing that reads variables such as HF_HOME while it is imported, as huggingface_hub does.
HEAVY = ["torch._dynamo", "torch.distributed.tensor", "torch.distributed.fsdp", "scipy.optimize", "sklearn.metrics"]
HEAVY += ["torchao.quantization", "bitsandbytes", "PIL.Image"]


def alone(home, **variables: str) -> dict[str, str]:
    """An environment without the hub's variables and Python's, with caches in the folder `home` and no hub."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    return inherited | {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | variables


def run_apart(
    program: str | Path, *words, environment: dict[str, str], cwd, python: str = sys.executable, timeout: float = 500
) -> subprocess.CompletedProcess:
    """`subprocess.run` of a Python program, the path of a script or source text, with its outputs as text. The process is a
    fork, unless `python` is another interpreter than this one."""
    if python != sys.executable:
        command = [python, *([] if isinstance(program, Path) else ["-c"]), *map(str, (program, *words))]
        return subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, timeout=timeout)
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder, name) for name in ("stdout", "stderr")]
        job = {"program": str(program), "is_script": isinstance(program, Path), "words": [str(word) for word in words]}
        job |= {"environment": environment, "cwd": str(cwd), "outputs": [str(path) for path in outputs]}
        server = _server()
        server.stdin.write(json.dumps(job) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], timeout)[0]:
            os.killpg(server.pid, signal.SIGKILL)
            _server.cache_clear()
            raise subprocess.TimeoutExpired(str(program), timeout, *(path.read_text() for path in outputs))
        return subprocess.CompletedProcess(
            str(program), int(server.stdout.readline()), *(path.read_text() for path in outputs)
        )


def succeeds(program: str | Path, *words, **options) -> subprocess.CompletedProcess:
    """As `run_apart`, of a program that has to end with 0."""
    done = run_apart(program, *words, **options)
    assert done.returncode == 0, done.stderr[-6000:]
    return done


@functools.cache
def _server() -> subprocess.Popen:
    """The process to fork from, which ends when this one does. It has none of this one's PYTHONPATH."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    return subprocess.Popen([sys.executable, __file__], env=environment, start_new_session=True, **pipes)


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    for name in HEAVY:
        with contextlib.suppress(Exception):  # not every environment has all of them
            importlib.import_module(name)
    gc.freeze()  # forks need not look through all of it whenever they collect garbage
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            return _become(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers, flush=True)


def _become(program: str, is_script: bool, words: list[str], environment: dict, cwd: str, outputs: list[str]) -> None:
    """Runs the program as if this process, a fork, had been started for it."""
    for descriptor, path in enumerate((os.devnull, *outputs)):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    named = [place for place in environment.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:1] = [str(Path(program).parent) if is_script else "", *named]
    sys.argv = [program if is_script else "-c", *words]
    if is_script:
        runpy.run_path(program, run_name="__main__")
    else:
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(program, "<string>", "exec"), main.__dict__)


if __name__ == "__main__":
    _serve()
