"""SAISA and LLaVA in vLLM: the same language model, encoder and requests, by turns, in one run.

    python benchmarks/serving.py                              # two cores: some minutes
    python benchmarks/serving.py --layers 4 --requests 8      # a quick look

It needs the environment of `make test-vllm`. Both models have random weights; LLaVA is vLLM's own. Times are medians of
passes that take turns, and what counts is their ratio.
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
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import torch
import transformers
import vllm_parts as parts
from PIL import Image
from safetensors.torch import load_file, save_file

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.costs.flops import Step, step_flops


CONCURRENCY = (1, 8, 32)
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
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--image-size", type=int, default=336)
    parser.add_argument("--words", type=int, default=48, help="of a question")
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "sitecustomize.py").write_text(STAND_IN)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, os.environ.get("PYTHONPATH")]))
        exec(STAND_IN, {})
        engines = {name: make(Path(folder) / name, args) for name, make in {"SAISA": saisa, "LLaVA": llava}.items()}
        results = measured(engines, args)
    results["FLOPs of a prefill, encoder left out"] = flops(args)
    results["settings"] = {key: str(value) for key, value in vars(args).items()} | {"vllm": version()}
    show(results)
    if args.output:
        args.output.write_text(json.dumps(results, indent=1) + "\n")


def flops(args) -> dict[str, float]:
    """Of a prompt with one image, by the formulas of `saisa_hf.costs`, whose rows are those that the engines feed."""
    words, text, vision, _ = configs(args)
    config = SaisaConfig(vision_config=vision, text_config=text, image_token_id=words.convert_tokens_to_ids("<image>"))
    prompt = words("\n" + " ".join(parts.WORDS[i % len(parts.WORDS)] for i in range(args.words)))
    step = Step(text=len(prompt["input_ids"]), visual=config.image_seq_length, logits=1)
    return {name: float(sum(step_flops(config, name.lower(), step).values())) for name in ("SAISA", "LLaVA")}


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

    return LLM(
        str(folder), dtype="bfloat16", enforce_eager=True, max_model_len=2048, max_num_seqs=32, block_size=64,
        max_num_batched_tokens=4096, limit_mm_per_prompt={"image": 1}, seed=0,
    )  # fmt: skip


# --- what is measured -------------------------------------------------------------------------------------------------


def requests_of(first: int, count: int, args, question: int = 0) -> list[dict]:
    """Requests, each about an image of its own; the same images with another question."""
    made = []
    for index in range(first, first + count):
        low = np.random.RandomState(index).rand(8, 8, 3) * 255
        image = Image.fromarray(low.astype("uint8")).resize((args.image_size, args.image_size))
        words = np.random.RandomState(1000 * question + index).choice(parts.WORDS, args.words)
        made.append({"prompt": "<image>\n" + " ".join(words), "multi_modal_data": {"image": image}})
    return made


def timed(llm, requests: list[dict], new_tokens: int) -> float:
    """Seconds until all are answered."""
    from vllm import SamplingParams

    started = time.perf_counter()
    llm.generate(requests, SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True), use_tqdm=False)
    return time.perf_counter() - started


def measured(engines: dict, args) -> dict:
    """Medians over passes in which the engines take turns."""
    found: dict[str, dict[str, list[float]]] = {}
    for number in range(args.passes + 1):  # the first is to warm up
        for name, llm in engines.items():
            llm.reset_prefix_cache()
            first, values = 1 + 10_000 * number, {}
            values["first question, one token (s)"] = timed(llm, requests_of(first, 1, args), 1)
            values["second question, one token (s)"] = timed(llm, requests_of(first, 1, args, question=1), 1)
            for at_once in CONCURRENCY:
                first += 1000
                requests = requests_of(first, args.requests, args)
                batches = [requests[i : i + at_once] for i in range(0, len(requests), at_once)]
                seconds = sum(timed(llm, batch, args.answer) for batch in batches)
                values[f"requests per second, {at_once} at once"] = len(requests) / seconds
            for key, value in values.items():
                found.setdefault(key, {}).setdefault(name, []).extend([value] if number else [])
    return {key: {name: statistics.median(x) for name, x in by_name.items()} for key, by_name in found.items()}


def show(results: dict) -> None:
    print("| | SAISA | LLaVA | SAISA / LLaVA |\n|---|---|---|---|")
    for key, values in results.items():
        if key != "settings":
            ours, theirs = values["SAISA"], values["LLaVA"]
            print(f"| {key} | {ours:.3g} | {theirs:.3g} | {ours / theirs:.2f} |")


if __name__ == "__main__":
    main()
