"""What only a GPU can show: the fused kernels themselves, compiled decoding, pictures kept in half precision on the device.

`pytest -m gpu` runs these; without CUDA they are skipped.
"""

import importlib.util

import pytest
import torch
from tiny_models import BOS, TEXT_CONFIGS, prompts_from_rows, random_prompts, tiny_model
from transformers import BitsAndBytesConfig

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration, SaisaVisualStates, attention_saisa
from saisa_hf.costs.memory import use_bytes, weight_bytes


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


@pytest.mark.parametrize("options", [{"load_in_8bit": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}])
def test_quantized_weights_compute_on_the_device_what_they_do_on_a_cpu(options, tmp_path):
    pytest.importorskip("bitsandbytes")
    model, prompts = tiny_model("qwen3"), random_prompts(5)
    model.save_pretrained(tmp_path)
    found = []
    for device in ("cpu", "cuda"):
        config = BitsAndBytesConfig(**options)
        model = SaisaForConditionalGeneration.from_pretrained(
            tmp_path, quantization_config=config, dtype=torch.float32, device_map={"": device}
        )
        inputs = {name: x.to(device) for name, x in prompts.inputs.items()}
        with torch.no_grad():
            found.append(model(**inputs).logits.cpu()[prompts.text])
    assert (found[0] - found[1]).norm() < 0.02 * found[0].norm()


def test_layers_that_wait_in_memory_compute_on_the_device_what_they_do_there(tmp_path):
    model, prompts = tiny_model("qwen3"), random_prompts(6)
    model.save_pretrained(tmp_path)
    half = sum(p.numel() * p.element_size() for p in model.parameters()) // 2
    spread = SaisaForConditionalGeneration.from_pretrained(
        tmp_path, dtype=torch.float32, device_map="auto", max_memory={0: half, "cpu": "1GB"}
    )
    assert {0, "cpu"} <= set(spread.hf_device_map.values())
    inputs = {name: x.cuda() for name, x in prompts.inputs.items()}
    with torch.no_grad():
        found = spread(**inputs).logits.cpu()
        torch.testing.assert_close(
            found[prompts.text], model(**prompts.inputs).logits[prompts.text], rtol=1e-3, atol=1e-3
        )


def test_a_generation_takes_the_memory_that_saisa_fit_tells():
    config = SaisaConfig(
        text_config={"model_type": "llama", "vocab_size": 32000, "num_hidden_layers": 8, "hidden_size": 2048,
                     "intermediate_size": 5632, "num_attention_heads": 16, "eos_token_id": None},
        image_token_id=31999,
    )  # fmt: skip
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = SaisaForConditionalGeneration(config).to(torch.bfloat16).cuda().eval()
    ids = torch.randint(3, 31000, (1, 512))
    ids = torch.cat([ids[:, :1], torch.full((1, 2 * config.image_seq_length), 31999), ids[:, 1:]], 1).cuda()
    pixels = torch.randn(2, 3, 336, 336, device="cuda", dtype=torch.bfloat16)
    model.generate(input_ids=ids, pixel_values=pixels, max_new_tokens=16, do_sample=False)
    peak = torch.cuda.max_memory_allocated() - before
    told = weight_bytes(config, "bfloat16") + sum(use_bytes(config, "bfloat16", 512, 2, 16).values())
    assert told == pytest.approx(peak, rel=0.1)
