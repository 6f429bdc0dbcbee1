"""Run by `accelerate launch` on processes without GPUs: `saisa train` on each of the given configs, one after the other.

accelerate knows FSDP and DeepSpeed on accelerators alone. Here it takes a CPU for one, over gloo. Each process writes what it
saw to `seen-RANK.json` in the folder of the run.
"""

import importlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
import transformers
from accelerate import DistributedType, PartialState
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from saisa_hf.cli import main
from saisa_hf.head_saisa import chunked_cross_entropy
from saisa_hf.training import SaisaTrainer


def cpu_as_accelerator(state, *_, **__):
    return "gloo", DistributedType.MULTI_GPU


def cpu(state):
    state.device = torch.device("cpu")


PartialState._prepare_backend, PartialState.set_device = cpu_as_accelerator, cpu
transformers.training_args.is_torch_bf16_gpu_available = lambda: True
if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # which would be compiled first
# logits of three rows at a time: processes have unlike numbers of parts
chunked_cross_entropy.__defaults__ = (None, 3 * 97)

rank, seen, stop_at = int(os.environ["RANK"]), {}, None


class Stopper(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if rank == 1 and stop_at == state.global_step:
            os.kill(os.getpid(), signal.SIGTERM)


init, step, train = SaisaTrainer.__init__, SaisaTrainer.training_step, SaisaTrainer.train


def watched_init(self, *args, **kwargs):
    init(self, *args, **kwargs, callbacks=[Stopper()])


def watched_step(self, model, inputs, *args, **kwargs):
    seen["pictures"].append(len(inputs["pixel_values"]))
    return step(self, model, inputs, *args, **kwargs)


def watched_train(self, resume_from_checkpoint=None, **kwargs):
    seen["resumed"] = int(resume_from_checkpoint.rsplit("-", 1)[1]) if resume_from_checkpoint else 0
    result = train(self, resume_from_checkpoint=resume_from_checkpoint, **kwargs)
    weights = dict(self.model.named_parameters())
    own = {name: p.to_local() if hasattr(p, "to_local") else getattr(p, "ds_tensor", p) for name, p in weights.items()}
    seen["own"] = {name: p.numel() for name, p in own.items()}
    seen["whole"] = {name: getattr(p, "ds_numel", p.numel()) for name, p in weights.items()}
    seen["trained"] = sorted({str(p.dtype) for p in weights.values() if p.requires_grad})
    seen["units"] = sorted({type(m).__name__ for m in self.model.modules() if hasattr(m, "unshard")})
    seen["rates"] = [[group["lr"], sum(p.numel() for p in group["params"])] for group in self.optimizer.param_groups]
    return result


SaisaTrainer.__init__, SaisaTrainer.training_step, SaisaTrainer.train = watched_init, watched_step, watched_train

for config in sys.argv[1:]:
    options = json.loads(Path(config).read_text())
    stop_at = options.pop("stop_at", None)
    Path(config + f".{rank}").write_text(json.dumps(options))
    seen.clear()
    unset_hf_deepspeed_config()  # as in a process of its own
    seen["pictures"] = []
    try:
        seen["status"] = main(["train", config + f".{rank}"])
    except SystemExit as ended:
        seen["status"] = ended.code
    (Path(options["output"]) / f"seen-{rank}.json").write_text(json.dumps(seen))
    if seen["status"] not in (0, 143):
        sys.exit(seen["status"])
