"""SAISA and LLaVA in vLLM: the same language model, encoder and requests, by turns, in one run.

    python benchmarks/serving.py                              # two cores: a quarter of an hour
    python benchmarks/serving.py --layers 4 --width 512 --requests 8 --alone 3    # a quick look

It needs the environment of `make test-vllm`, and a machine that does nothing else. Both models have random weights; LLaVA is
vLLM's own. Times are medians of rounds that take turns, and what counts is their ratio, beside that of the FLOPs. A prefill
is the time in the model itself, from projectors to hidden states; the time to the first token has all in front of it too:
image processor, encoder, scheduler.
"""

import argparse
import json
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path


os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions of serving_clock.py run in the workers
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
import transformers
import vllm_parts as parts
from PIL import Image
from safetensors.torch import load_file, save_file
from serving_clock import add_clock, cache_bytes, read_clock

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.costs.flops import Step, step_flops


CONCURRENCY = (1, 8, 32)
BLOCK = 64  # tokens in a block of the cache
QUESTION = "\n"  # between image and words
# vLLM's LLaVA imports the image processor of another model, which needs torchvision; there is none for this PyTorch. What it
# imports is made up in every process: a LLaVA with CLIP does not call it.
STAND_IN = """
import importlib.abc, importlib.machinery, sys, types
NAME = "transformers.models.pixtral.image_processing_pixtral"
class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path=None, target=None):
        return importlib.machinery.ModuleSpec(NAME, self) if name == NAME else None
    def exec_module(self, module):
        module._num_image_tokens = module.get_resize_output_image_size = None
sys.meta_path.insert(0, Finder())
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--image-size", type=int, default=336)
    parser.add_argument("--words", type=int, default=48, help="of a question")
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--alone", type=int, default=8, help="images that are asked about one at a time, in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(STAND_IN)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        exec(STAND_IN, {})
        engines = {name: make(Path(folder) / name, args) for name, make in {"SAISA": saisa, "LLaVA": llava}.items()}
        results = measured(engines, args)
    results["FLOPs of a prefill: first question"] = flops(args, cached=0)
    results["FLOPs of a prefill: second question"] = flops(args, cached=parts_in_full_blocks(args))
    results["settings"] = {key: value for key, value in vars(args).items() if key != "output"} | {"vllm": version()}
    show(results)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


def flops(args, cached: int) -> dict[str, float]:
    """Of a prompt with one image whose first `cached` tokens are in the cache, by the formulas of `saisa_hf.costs`, whose
    rows are those that the engines feed. The encoder is left out."""
    words, text, vision, _ = configs(args)
    config = SaisaConfig(vision_config=vision, text_config=text, image_token_id=words.convert_tokens_to_ids("<image>"))
    begin, visual = len(words("")["input_ids"]), config.image_seq_length
    prompt = len(words(QUESTION + " ".join(parts.WORDS[i % len(parts.WORDS)] for i in range(args.words)))["input_ids"])
    cached_text = min(cached, begin) + max(0, cached - begin - visual)
    cached_visual = cached - cached_text
    step = Step(prompt - cached_text, visual - cached_visual, cached_text=cached_text, cached_visual=cached_visual)
    return {name: float(sum(step_flops(config, name.lower(), step).values())) for name in ("SAISA", "LLaVA")}


def parts_in_full_blocks(args) -> int:
    """Tokens of a prompt that a second question about its image finds in the cache: those of full blocks."""
    words, _, vision, _ = configs(args)
    shared = len(words(QUESTION)["input_ids"]) + (vision.image_size // vision.patch_size) ** 2
    return shared // BLOCK * BLOCK


def version() -> str:
    import vllm

    return vllm.__version__


# --- the models -------------------------------------------------------------------------------------------------------


def configs(args):
    """(tokenizer, language model, encoder, image processor), the same for both."""
    words, size = parts.tokenizer(), args.image_size
    text = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=args.width, intermediate_size=args.width * 11 // 4 // 32 * 32,
        num_hidden_layers=args.layers, num_attention_heads=args.width // 64, num_key_value_heads=args.width // 64,
        max_position_embeddings=4096, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=size,
        patch_size=14,
    )
    square = {"height": size, "width": size}
    return words, text, vision, transformers.CLIPImageProcessor(do_center_crop=False, size=square)


def saisa(folder: Path, args):
    words, text, vision, images = configs(args)
    token = words.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = SaisaConfig(vision_config=vision, text_config=text, image_token_id=token)
    SaisaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    arguments = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    SaisaProcessor(images, words, **arguments).save_pretrained(folder)
    return engine(folder, args)


def llava(folder: Path, args):
    words, text, vision, images = configs(args)
    token = words.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=token)
    transformers.LlavaForConditionalGeneration(config).to(torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")  # vLLM reads the names of CLIP's tensors before transformers 5.6
    tensors = {re.sub(r"(vision_tower\.)(?!vision_model)", r"\1vision_model.", name): x for name, x in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    arguments = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    transformers.LlavaProcessor(images, words, **arguments).save_pretrained(folder)
    return engine(folder, args)


def engine(folder: Path, args):
    from vllm import LLM

    room = {"gpu_memory_utilization": 0.4} if torch.cuda.is_available() else {}  # two engines share the GPU
    llm = LLM(
        str(folder), dtype="bfloat16", enforce_eager=True, max_model_len=2048, max_num_seqs=32, block_size=BLOCK,
        max_num_batched_tokens=4096, limit_mm_per_prompt={"image": 1}, seed=0, **room,
    )  # fmt: skip
    llm.apply_model(add_clock)
    return llm


# --- what is measured -------------------------------------------------------------------------------------------------


def requests_of(first: int, count: int, args, question: int = 0) -> list[dict]:
    """Requests, each about an image of its own; the same images with another question."""
    made = []
    for index in range(first, first + count):
        low = np.random.RandomState(index).rand(8, 8, 3) * 255
        image = Image.fromarray(low.astype("uint8")).resize((args.image_size, args.image_size))
        words = np.random.RandomState(1000 * question + index).choice(parts.WORDS, args.words)
        made.append({"prompt": "<image>" + QUESTION + " ".join(words), "multi_modal_data": {"image": image}})
    return made


def timed(llm, requests: list[dict], new_tokens: int) -> float:
    """Seconds until all are answered."""
    from vllm import SamplingParams

    started = time.perf_counter()
    llm.generate(requests, SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True), use_tqdm=False)
    return time.perf_counter() - started


def measured(engines: dict, args) -> dict:
    """Medians over rounds in which the engines take turns, request by request where they are asked one at a time."""
    found: dict[str, dict[str, list[float]]] = {}

    def note(key: str, name: str, value: float, counts: bool) -> None:
        found.setdefault(key, {}).setdefault(name, []).extend([value] if counts else [])

    for number in range(args.rounds + 1):  # the first is to warm up
        first, counts = 1 + 10_000 * number, number > 0
        for llm in engines.values():
            llm.reset_prefix_cache()
        for index in range(first, first + args.alone):
            for question, ordinal in enumerate(("first", "second")):
                for name, llm in engines.items():
                    read(llm, read_clock)
                    seconds = timed(llm, requests_of(index, 1, args, question), 1)
                    note(f"prefill, {ordinal} question (ms)", name, 1e3 * read(llm, read_clock), counts)
                    note(f"time to first token, {ordinal} question (ms)", name, 1e3 * seconds, counts)
        for at_once in CONCURRENCY:
            first += 1000
            requests = requests_of(first, args.requests, args)
            for name, llm in engines.items():
                batches = [requests[i : i + at_once] for i in range(0, len(requests), at_once)]
                seconds = sum(timed(llm, batch, args.answer) for batch in batches)
                note(f"requests per second, {at_once} at once", name, len(requests) / seconds, counts)
    for name, llm in engines.items():
        tokens = llm.llm_engine.vllm_config.cache_config.num_gpu_blocks * BLOCK
        note("cache (bytes per token, visual or not)", name, read(llm, cache_bytes) / tokens, True)
    return {key: {name: statistics.median(x) for name, x in by_name.items()} for key, by_name in found.items()}


def read(llm, function):
    return llm.apply_model(function)[0]


def show(results: dict) -> None:
    print("| | SAISA | LLaVA | SAISA / LLaVA |\n|---|---|---|---|")
    for key, values in results.items():
        if key != "settings":
            ours, theirs = values["SAISA"], values["LLaVA"]
            print(f"| {key} | {ours:.3g} | {theirs:.3g} | {ours / theirs:.2f} |")


if __name__ == "__main__":
    main()
