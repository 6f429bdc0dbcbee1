"""Whether vLLM answers as this package does under transformers: random prompts with images, in every mode of scheduling.

    python benchmarks/vllm_equality.py                                        # the table of docs/serving.md
    python benchmarks/vllm_equality.py --text qwen3 --vision siglip2 --prompts 40 --modes whole,chunk17
    python benchmarks/vllm_equality.py --rows                                 # rows through the feed-forward networks

It needs the environment of `make test-vllm`. A tie is an answer that goes another way where the two best logits are closer
than the tolerance (float32: 1e-4).
"""

import argparse
import gc
import json
import os
import sys
import tempfile
import time
from pathlib import Path


os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # so that hooks reach the model
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
import vllm_parts as parts


MODES = {
    "whole": {"enable_prefix_caching": False},
    "mixed": {"enable_prefix_caching": False, "max_num_seqs": 3, "max_num_batched_tokens": 100},
    "chunk64": {"enable_prefix_caching": False, "max_num_batched_tokens": 64},
    "chunk17": {"enable_prefix_caching": False, "max_num_batched_tokens": 17},
    "chunk8": {"enable_prefix_caching": False, "max_num_batched_tokens": 8},
    "prefix": {"enable_prefix_caching": True, "passes": 2},
    "compiled": {"enable_prefix_caching": False, "enforce_eager": False, "max_num_batched_tokens": 64},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--text", default="llama", help="one of vllm_parts.TEXT_CONFIGS, or several with commas")
    parser.add_argument("--vision", default="clip", help="one encoder, or several with commas")
    parser.add_argument("--settings", default="{}", help="further fields of SaisaConfig, as JSON; or a list of such")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--new-tokens", type=int, default=12)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rows", action="store_true", help="count rows through feed-forward networks, step by step")
    args = parser.parse_args()
    settings = json.loads(args.settings)
    print("| language model | encoder | settings | mode | greedy answers equal | ties | log-probability error |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for text in args.text.split(","):
        for vision in args.vision.split(","):
            for one in settings if isinstance(settings, list) else [settings]:
                try:
                    compare_all(text, vision, one, args)
                except Exception as error:
                    print(
                        f"| {text} | {vision} | {json.dumps(one)} | {type(error).__name__}: {error!s:.300} |",
                        flush=True,
                    )


def compare_all(text: str, vision: str, settings: dict, args) -> None:
    """Prints a row of the table for each mode."""
    dtype = getattr(torch, args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = parts.make_checkpoint(folder, text, vision, **settings)
        cases = parts.answer(parts.random_cases(args.prompts), checkpoint, args.new_tokens, dtype)
        for mode in args.modes.split(","):
            for comparison, cached in answers(checkpoint, cases, mode, args):
                c = comparison
                extra = f" ({cached} tokens cached)" if cached else ""
                row = [
                    text,
                    vision,
                    json.dumps(settings),
                    args.dtype + " " + mode + extra,
                    f"{c.equal} of {c.count}",
                    c.ties,
                ]
                print("| " + " | ".join(map(str, [*row, f"{c.error:.1e}"])) + " |", flush=True)
                if c.different:
                    print(f"DIFFERENT: {c.different}", flush=True)


def answers(checkpoint: str, cases, mode: str, args):
    """Yields for each pass over the prompts how the engine's answers compare, and how many tokens were cached."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    options = {"max_num_seqs": 8, "max_num_batched_tokens": 2048, "enforce_eager": True, "block_size": 32} | MODES[mode]
    passes = options.pop("passes", 1)
    started = time.perf_counter()
    engine = LLM(checkpoint, dtype=args.dtype, max_model_len=512, limit_mm_per_prompt={"image": 4}, **options)
    counted = count_rows(engine) if args.rows else None
    sampling = SamplingParams(temperature=0, max_tokens=args.new_tokens, ignore_eos=True, logprobs=0)
    for _ in range(passes):
        outputs = engine.generate([case.request for case in cases], sampling, use_tqdm=False)
        tolerance = 1e-4 if args.dtype == "float32" else 0.1
        yield parts.compare(cases, outputs, tolerance), sum(one.num_cached_tokens or 0 for one in outputs)
    if counted is not None:
        text = sum(len(case.prompt_ids) - case.prompt_ids.count(parts_image(cases)) for case in cases)
        print(f"ROWS {mode}: {sum(counted)} through each network in {len(counted)} steps; {text} text rows in prompts")
    print(f"{mode}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    del engine
    gc.collect()
    cleanup_dist_env_and_memory()


def parts_image(cases) -> int:
    return parts.tokenizer().convert_tokens_to_ids("<image>")


def count_rows(engine) -> list[int]:
    """A list that gets the number of rows of every pass through the first layer's feed-forward network."""
    model = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    counted: list[int] = []
    network = model.language_model.model.layers[0].mlp
    network.register_forward_hook(lambda module, inputs, output: counted.append(len(output)))
    return counted


if __name__ == "__main__":
    main()
