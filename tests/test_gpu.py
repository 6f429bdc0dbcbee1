"""What only a GPU can show: the fused kernels themselves, compiled decoding, pictures kept in half precision on the device.

`pytest -m gpu` runs these; without CUDA they are skipped.
"""

import importlib.util

import pytest
import torch
from tiny_models import BOS, TEXT_CONFIGS, prompts_from_rows, random_prompts, tiny_model

from saisa_hf import SaisaVisualStates, attention_saisa


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

IMPLEMENTATIONS = ["sdpa", "flex_attention"] + ["flash_attention_2"] * (
    importlib.util.find_spec("flash_attn") is not None
)


@pytest.fixture
def model():
    """Four heads of 16 numbers, which every kernel takes, over two of keys."""
    config = TEXT_CONFIGS["qwen3"]()
    config.head_dim = 16
    return tiny_model(config, dtype=torch.bfloat16).cuda()


def on_device(prompts):
    prompts = prompts.to(torch.bfloat16)
    return {name: value.cuda() for name, value in prompts.prompt.items() if value is not None}


@torch.no_grad()
def spread(model, inputs, rows, implementation):
    """Largest difference of a logit to eager attention."""
    model.set_attn_implementation({"text_config": "eager"})
    expected = model(**inputs).logits[rows]
    model.set_attn_implementation({"text_config": implementation})
    return (model(**inputs).logits[rows] - expected).abs().max().item()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_fused_kernels_compute_what_eager_attention_does(model, implementation, side):
    prompts = random_prompts(0, side)
    assert spread(model, on_device(prompts), prompts.text.cuda(), implementation) < 0.1


def test_sdpa_by_runs_computes_what_a_mask_does(model, monkeypatch):
    prompts = prompts_from_rows([[BOS, 5, "image", 6, 7, "image", 8, 9, 10]])
    rows = prompts.text.cuda()
    monkeypatch.setattr(attention_saisa, "LARGE_MASK", 0)
    monkeypatch.setattr(attention_saisa.Visibility, "mask", None)
    with torch.no_grad():
        model.set_attn_implementation({"text_config": "sdpa"})
        by_runs = model(**on_device(prompts)).logits[rows]
        monkeypatch.undo()
        assert (by_runs - model(**on_device(prompts)).logits[rows]).abs().max() < 0.1


@pytest.mark.parametrize(
    "implementation", ["sdpa", "flex_attention"]
)  # in flash's half precision greedy text is not stable
def test_a_compiled_static_cache_generates_what_a_dynamic_one_does(model, implementation):
    model.float()
    model.set_attn_implementation({"text_config": "sdpa"})
    inputs = on_device(random_prompts(1)) | {"max_new_tokens": 12, "do_sample": False}
    inputs["pixel_values"] = inputs["pixel_values"].float()
    expected = model.generate(**inputs)
    model.set_attn_implementation({"text_config": implementation})
    assert torch.equal(model.generate(**inputs, cache_implementation="static"), expected)


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_an_offloaded_cache_generates_what_one_on_the_device_does(model, cache):
    model.float()
    inputs = on_device(random_prompts(2)) | {"max_new_tokens": 12, "do_sample": False}
    inputs["pixel_values"] = inputs["pixel_values"].float()
    assert torch.equal(model.generate(**inputs, cache_implementation=cache), model.generate(**inputs))


def test_flex_attention_has_the_gradients_of_eager_attention(model):
    prompts, gradients = random_prompts(3, "right"), []
    model.float().train()
    inputs = on_device(prompts)
    inputs["pixel_values"] = inputs["pixel_values"].float()
    labels = inputs["input_ids"].masked_fill(~prompts.text.cuda(), -100)
    for implementation in ("eager", "flex_attention"):
        model.set_attn_implementation({"text_config": implementation})
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-2, atol=1e-4)


def test_visual_states_live_on_the_device(model, tmp_path):
    prompts = random_prompts(4)
    inputs = on_device(prompts)
    states = model.get_visual_states(inputs["pixel_values"])
    assert states.device.type == "cuda" and states.dtype == torch.bfloat16
    states.save(tmp_path / "states")
    without = {name: value for name, value in inputs.items() if name != "pixel_values"}
    with torch.no_grad():
        expected = model(**inputs).logits
        for given in (states, SaisaVisualStates.load(tmp_path / "states", device="cuda"), states.to("cpu")):
            torch.testing.assert_close(model(**without, visual_states=given).logits, expected, rtol=0, atol=0.05)
