"""Two processes that share the model's weights (FSDP2, gloo) learn what one process does."""

import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path

import pytest


WORKER = str(Path(__file__).parent / "fsdp_worker.py")


def losses(printed):
    return [float(loss) for loss in re.findall(r"loss (\S+)", printed)]


def test_decoder_layers_with_their_projectors_are_sharded_and_learn_the_same(capsys):
    runpy.run_path(WORKER)
    alone = losses(capsys.readouterr().out)
    assert len(alone) == 3 and alone[2] < 0.9 * alone[0]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    runs = [
        subprocess.Popen(
            [sys.executable, WORKER],
            env={**os.environ, **meet, "RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    (printed, errors), (_, more) = (run.communicate(timeout=300) for run in runs)
    assert [run.returncode for run in runs] == [0, 0], errors + more
    assert losses(printed) == pytest.approx(alone, rel=1e-4)
