"""Every language model, encoder and setting that the vLLM plug-in serves, beside transformers: an engine for each."""

import subprocess
import sys
from pathlib import Path

import pytest


pytest.importorskip("vllm")

import torch
import vllm_parts as parts
from vllm_engine import Engine, assert_equal, greedy

from saisa_hf.serving.vllm.refusals import DECODERS


NEW_TOKENS = 8
TEXTS = [name for name in parts.TEXT_CONFIGS if name != "olmo2"]
SETTINGS = [
    {"vision": "siglip"},
    {"vision": "siglip2"},
    {"vision": "dinov2"},
    {"vision": "convnext"},
    {"projector_sharing": "shared"},
    {"projector_hidden_size": 20, "projector_bias": False},
    {"visual_token_reduction": "avg_pool", "vision": "siglip2"},
    {"visual_token_reduction": "pixel_unshuffle"},
    {"visual_token_reduction": "resampler", "reduced_visual_tokens": 5},
    {"visual_token_reduction": "class_attention", "reduced_visual_tokens": 7},
]


def answers_are_equal(folder, options=None, dtype=torch.float32, prompts=12, **settings):
    checkpoint = parts.make_checkpoint(folder, **settings)
    cases = parts.answer(parts.random_cases(prompts, most_images=2), checkpoint, NEW_TOKENS, dtype)
    name = str(dtype).removeprefix("torch.")
    engine = Engine(checkpoint, **{"dtype": name, "max_num_batched_tokens": 40, **(options or {})})
    try:
        assert_equal(cases, engine.answers(cases, greedy(NEW_TOKENS)), 1e-4 if dtype == torch.float32 else 0.2)
    finally:
        engine.close()


def test_the_families_are_those_that_vllm_has_decoders_for():
    import transformers

    kinds = {getattr(transformers, parts.TEXT_CONFIGS[name][0]).model_type for name in TEXTS}
    assert kinds == set(DECODERS)


@pytest.mark.slow
@pytest.mark.parametrize("text", TEXTS)
def test_language_models(text, tmp_path):
    answers_are_equal(tmp_path, text=text)


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "-".join(map(str, settings.values())))
def test_encoders_projectors_and_reductions(settings, tmp_path):
    answers_are_equal(tmp_path, **settings)


@pytest.mark.slow
def test_bfloat16(tmp_path):
    answers_are_equal(tmp_path, dtype=torch.bfloat16)


@pytest.mark.slow
@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_compiled(text, tmp_path):
    answers_are_equal(tmp_path, {"enforce_eager": False}, text=text)


@pytest.mark.slow
def test_an_engine_without_images_has_no_encoder(tmp_path):
    checkpoint = parts.make_checkpoint(tmp_path)
    cases = parts.answer(parts.random_cases(5, most_images=0), checkpoint, NEW_TOKENS)
    engine = Engine(checkpoint, limit_mm_per_prompt={"image": 0}, counted=False)
    try:
        assert_equal(cases, engine.answers(cases, greedy(NEW_TOKENS)))
        assert not list(engine.model.encoder.parameters()) and not list(engine.model.visual.parameters())
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_tensor_parallelism_over_two_processes(text, tmp_path):
    worker = Path(__file__).parent / "vllm_tp_worker.py"
    done = subprocess.run([sys.executable, worker, tmp_path, text], capture_output=True, text=True, timeout=900)
    assert "COMPARISON 12/12 equal" in done.stdout, done.stderr[-3000:]
