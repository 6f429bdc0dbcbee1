"""An engine of vLLM in this process, with what passes through its model counted."""

import gc
import os


os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}

import vllm_parts as parts
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory


def greedy(new_tokens):
    """Sampling parameters whose outputs `vllm_parts.compare` takes."""
    return SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=0)


def assert_equal(cases, outputs, tolerance=1e-4):
    """That outputs are the answers in `cases`."""
    comparison = parts.compare(cases, outputs, tolerance)
    assert not comparison.different and comparison.error < tolerance, str(comparison)


class Engine:
    """An engine, with what passes through its model counted."""

    def __init__(self, checkpoint, counted=True, **options):
        options = {
            "limit_mm_per_prompt": {"image": 4},
            "dtype": "float32",
            "max_num_seqs": 4,
            "max_num_batched_tokens": 48,
            "enforce_eager": True,
            "block_size": 32,
        } | options
        self.llm = LLM(checkpoint, max_model_len=256, seed=0, **options)
        worker = self.llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        self.runner, self.model = worker.model_runner, worker.model_runner.model
        self.scheduler = self.llm.llm_engine.engine_core.engine_core.scheduler
        self.fed, self.encoded, self.projected = [], [], []
        if not counted:
            return
        layer = self.model.language_model.model.layers[-1]
        network = layer.mlp if hasattr(layer, "mlp") else layer.block_sparse_moe
        network.register_forward_hook(lambda module, inputs, output: self.fed.append(len(output)))
        self.model.encoder.vision_tower.register_forward_hook(lambda *call: self.encoded.append(1))
        projector = self.model.visual.projectors[0]
        projector.register_forward_hook(lambda module, inputs, output: self.projected.append(len(output)))

    def answers(self, cases, sampling):
        for counted in (self.fed, self.encoded, self.projected):
            counted.clear()
        return self.llm.generate([case.request for case in cases], sampling, use_tqdm=False)

    def close(self):
        self.llm = self.runner = self.model = self.scheduler = None
        gc.collect()
        cleanup_dist_env_and_memory()
