# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`datasets` recognises a processor that comes from a checkpoint's code, so that what `map` made with it is found again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from saisa_hf.demo.run import CHECKPOINT


datasets = pytest.importorskip("datasets")
WORKER = Path(__file__).with_name("datasets_worker.py")


def test_a_remote_processor_has_one_hash_and_maps_once(tmp_path):
    rows = [{"text": "<image> what ?", "image": Image.new("RGB", (48, 48))}]
    features = datasets.Features(text=datasets.Value("string"), image=datasets.Image())
    datasets.Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "rows")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    found, times = [], []
    for seed in ("1", "2"):
        environment = inherited | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": seed}
        command = [sys.executable, str(WORKER), str(CHECKPOINT), str(tmp_path / "rows")]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr[-6000:]
        found.append(json.loads(done.stdout.strip().splitlines()[-1]))
        times.append(Path(found[-1]["file"]).stat().st_mtime_ns)
    first, second = found
    assert first == second and times[0] == times[1]
    assert first["new"] == first["used"] != first["changed"]
    assert first["placeholders"] == 36
