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


def answers(printed):
    sums, ids = re.search(r"logits (.*) answers (.*)", printed).groups()
    return [float(x) for x in sums.split()], ids


def test_decoder_layers_with_their_projectors_are_sharded_learn_and_answer_the_same(capsys):
    runpy.run_path(WORKER)
    written = capsys.readouterr().out
    alone = losses(written)
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
    (sums, ids), (expected, expected_ids) = answers(printed), answers(written)
    assert ids == expected_ids and sums == pytest.approx(expected, rel=1e-3)
