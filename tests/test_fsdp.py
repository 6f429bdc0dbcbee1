"""Two processes that share the model's weights (FSDP2, gloo) learn what one process does."""

import re
import runpy
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
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", WORKER]
    run = subprocess.run(launch, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert losses(run.stdout) == pytest.approx(alone, rel=1e-4)
