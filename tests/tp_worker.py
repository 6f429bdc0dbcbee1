"""Run by `test_tensor_parallel.py` in two processes: models that share their layers compute what one process did.

    python tp_worker.py FOLDER NAME...      with RANK, LOCAL_RANK, WORLD_SIZE and a meeting point in the environment

FOLDER/NAME holds a checkpoint and `expected.pt`, what one process computed.
"""

import sys
import warnings
from pathlib import Path

import torch
from tiny_models import ROWS, prompts_from_rows

from saisa_hf import SaisaForConditionalGeneration, SaisaVisualStates


GREEDY = {"max_new_tokens": 5, "do_sample": False}


@torch.no_grad()
def results(model, states=None):
    """Logits, an answer to a batch of rows with no, one and several pictures, and its visual states."""
    prompts = prompts_from_rows(ROWS)
    inputs = prompts.inputs
    logits, answer = model(**inputs).logits, model.generate(**prompts.prompt, **GREEDY)
    own = model.get_visual_states(inputs.pop("pixel_values"))
    by_states = [model(**inputs, visual_states=given).logits for given in (own, states) if given is not None]
    keys = [pair[0] for pair in own.stored.keys_values or () if pair is not None]
    return {"logits": logits, "answer": answer, "keys": keys, "by_states": by_states, "fingerprint": own.fingerprint}


def sharded(model):
    weights = [
        (name, p) for name, p in model.named_parameters() if name.endswith("weight") and hasattr(p, "placements")
    ]
    return {name for name, p in weights if p.placements[0].is_shard()}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name in sys.argv[2:]:
        folder = Path(sys.argv[1]) / name
        expected = torch.load(folder / "expected.pt")
        model = SaisaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, tp_plan="auto").eval()
        parts = sharded(model)
        assert parts == expected["sharded"], (name, parts ^ expected["sharded"])
        found = results(model, SaisaVisualStates.load(folder / "states"))
        for logits in (found["logits"], *found["by_states"]):
            assert (logits - expected["logits"]).abs().max() < 1e-4, name
        assert torch.equal(found["answer"], expected["answer"]), name
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(found["keys"], expected["keys"], strict=True)), name
        assert found["fingerprint"] == expected["fingerprint"], name
    torch.distributed.destroy_process_group()
