"""Answers of a vLLM engine that is spread over two processes, beside transformers: run by `test_vllm_families.py`."""

import os
import sys


if __name__ == "__main__":
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_LOGGING_LEVEL": "ERROR"}
    import vllm_parts as parts
    from vllm import LLM, SamplingParams

    folder, text = sys.argv[1:]
    checkpoint = parts.make_checkpoint(folder, text)
    cases = parts.answer(parts.random_cases(12), checkpoint, 8)
    engine = LLM(
        checkpoint,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        limit_mm_per_prompt={"image": 4},
        max_num_seqs=8,
        block_size=32,
        max_num_batched_tokens=48,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    )
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=0)
    outputs = engine.generate([case.request for case in cases], sampling, use_tqdm=False)
    print("COMPARISON", parts.compare(cases, outputs), flush=True)
