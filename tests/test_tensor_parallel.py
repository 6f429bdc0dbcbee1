"""Two processes that share each layer (gloo) compute what one process does."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import ROWS, prompts_from_rows, tiny_model
from tp_worker import results

from saisa_hf import SaisaForConditionalGeneration


TESTS = Path(__file__).parent
MODELS = {
    "grouped": {"text": "qwen3"},
    "biases": {"text": "llama_biases"},
    "shared": {"text": "llama", "projector_sharing": "shared"},
    "embedding_space": {
        "text": "qwen3",
        "alignment": "embedding_space",
        "visual_attention": ["full", "none", "none"],
        "visual_feed_forward": [True, True, False],
    },
    "tied": {"text": "qwen2"},
    "some_layers": {"text": "gemma2", "visual_layers": [0, 2]},
    "fused": {"text": "phi3"},
    "wide_norms": {"text": "olmo2"},
    "experts": {"text": "mixtral"},
    "some_experts": {"text": "qwen3_moe"},
}


def torchrun(*arguments, processes=2):
    """What `torchrun` does: the exit status and stderr of each process."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meet = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(processes)}
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    runs = [
        subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env={**os.environ, **meet, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONPATH": path},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    errors = [run.communicate(timeout=500)[1] for run in runs]
    return [run.returncode for run in runs], errors


def to_be_sharded(model):
    """The weights of all linear maps of decoder layers but the gates of experts, of a shared projector, and of the head."""
    maps = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    left = ("vision_tower", ".gate.weight") + (("lm_head",) if model.config.tie_word_embeddings else ())
    return {name for name in maps if not any(part in name for part in left)}


def test_processes_that_share_the_layers_compute_what_one_does(tmp_path):
    for name, options in MODELS.items():
        tiny_model(**options).save_pretrained(tmp_path / name)
        model = SaisaForConditionalGeneration.from_pretrained(tmp_path / name, dtype=torch.float32).eval()
        torch.save({**results(model), "sharded": to_be_sharded(model)}, tmp_path / name / "expected.pt")
        model.get_visual_states(prompts_from_rows(ROWS).pixel_values).save(tmp_path / name / "states")
    statuses, errors = torchrun(TESTS / "tp_worker.py", tmp_path, *MODELS)
    assert statuses == [0, 0], "\n".join(error[-3000:] for error in errors)


@pytest.mark.parametrize("asked", [{"tp_plan": "auto", "tp_size": 4}, {"tp_plan": "auto"}])
def test_more_shards_than_key_value_heads_are_refused_with_the_numbers_that_go(tmp_path, asked, monkeypatch):
    tiny_model("qwen3").save_pretrained(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"over 4 processes.*num_key_value_heads=2 unevenly\. Start 1, 2 of them"):
        SaisaForConditionalGeneration.from_pretrained(tmp_path, **asked)
