"""Weights in 8 and 4 bits by transformers' own switch: what is quantized, what is kept, and that it saves, loads, travels,
trains and answers as other weights do."""

import copy
import importlib.metadata
import importlib.util
from pathlib import Path

import pytest
import torch
from apart import alone, succeeds
from hub_standin import HubStandIn
from tiny_models import ROWS, TEXT_CONFIGS, prompts_from_rows, random_prompts, tiny_model
from transformers import AutoModel, AutoModelForImageTextToText, BitsAndBytesConfig

from saisa_hf import AutoModelForVision2Seq, SaisaForConditionalGeneration, SaisaVisualStates
from saisa_hf.compat_saisa import TRANSFORMERS_5
from saisa_hf.hardware_saisa import KEPT_PRECISE, put_back


HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None
needs_bitsandbytes = pytest.mark.skipif(not HAS_BITSANDBYTES, reason="needs bitsandbytes")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="needs torchao")

KINDS = {
    "8 bits": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "bfloat16"},
    "nf4 twice": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}
# relative errors of these random weights, which are no worse than a trained model's
ERRORS = {"8 bits": 0.05, "nf4": 0.5, "fp4": 0.6, "nf4 twice": 0.5}


def text_config(aligned: bool):
    """A Qwen 3, with matrices of whole blocks, which bitsandbytes rearranges for a CPU, or not."""
    config = TEXT_CONFIGS["qwen3"]()
    if aligned:
        config.hidden_size, config.intermediate_size, config.head_dim = 64, 128, 16
    return config


@pytest.fixture(scope="module", params=[True, False], ids=["whole blocks", "odd sizes"])
def stored(request, tmp_path_factory):
    """(the model, a folder that holds it)."""
    folder = tmp_path_factory.mktemp("model")
    return save(folder, request.param), folder


def save(folder, aligned):
    model = tiny_model(text_config(aligned))
    model.save_pretrained(folder)
    return model


def load(folder, kind=None, auto=AutoModelForImageTextToText, dtype=torch.float32, **changes):
    options = {} if kind is None else {"quantization_config": BitsAndBytesConfig(**KINDS[kind] | changes)}
    return auto.from_pretrained(folder, dtype=dtype, **options).eval()


@torch.no_grad()
def logits(model, prompts):
    return model(**prompts.inputs).logits[prompts.text]


def quantized_modules(model):
    return {name for name, module in model.named_modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")}


def decoder_maps(model):
    """The names of the decoder layers' own linear maps."""
    maps = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear and ".layers." in name]
    return {name for name in maps if name.startswith("model.language_model.") and "visual_projector" not in name}


def rearranged(model):
    states = [getattr(p, "quant_state", None) for p in model.parameters()]
    return any(getattr(state, "packing_format_for_cpu", False) for state in states)


@needs_bitsandbytes
@pytest.mark.parametrize("auto", [AutoModelForImageTextToText, AutoModelForVision2Seq, AutoModel])
@pytest.mark.parametrize("kind", ["8 bits", "nf4"])
def test_every_auto_class_quantizes_the_decoder_layers_and_leaves_the_rest(stored, auto, kind):
    model = load(stored[1], kind, auto)
    prefix = "" if auto is AutoModel else "model."
    assert quantized_modules(model) == {prefix + name.removeprefix("model.") for name in decoder_maps(stored[0])}
    kept = {name: p for name, p in model.named_parameters() if any(part in name for part in KEPT_PRECISE)}
    assert len(quantized_modules(model)) == 3 * 7
    original = stored[0].model if auto is AutoModel else stored[0]
    assert kept and all(torch.equal(p, original.get_parameter(name)) for name, p in kept.items())


@needs_bitsandbytes
def test_modules_named_by_the_caller_take_the_place_of_the_default(stored):
    model = load(stored[1], "nf4", llm_int8_skip_modules=["lm_head"])
    parts = {name.split(".")[1] for name in quantized_modules(model)}
    assert parts == {"vision_tower", "language_model"}
    assert any("visual_projector" in name for name in quantized_modules(model))
    assert logits(model, random_prompts(0)).isfinite().all()


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_rounded_weights(stored, kind):
    """The rounded weights as bitsandbytes reads them back, in plain linear maps."""
    from bitsandbytes import functional

    model, prompts = load(stored[1], kind), random_prompts(1)
    rounded = copy.deepcopy(stored[0])
    for name in quantized_modules(model):
        weight = model.get_submodule(name).weight
        if kind == "8 bits":
            values = weight.data.float() * weight.SCB[:, None] / 127
        else:
            values = functional.dequantize_4bit(weight.data, weight.quant_state)
        rounded.get_submodule(name).weight.data = values.float().view_as(rounded.get_submodule(name).weight)
    found, wanted, exact = (logits(one, prompts) for one in (model, rounded, stored[0]))
    assert (found - exact).norm() < ERRORS[kind] * exact.norm()
    assert (found - wanted).norm() < 0.2 * (found - exact).norm() or (found - wanted).norm() < 0.03 * exact.norm()


@needs_bitsandbytes
@pytest.mark.parametrize("used", [False, True], ids=["saved at once", "saved after use"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_model_saves_and_loads_as_it_is(stored, kind, used, tmp_path):
    model, prompts = load(stored[1], kind), prompts_from_rows(ROWS)
    if used:
        before = logits(model, prompts)
    model.save_pretrained(tmp_path)
    after = logits(model, prompts)
    if used:
        assert torch.equal(before, after)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    assert quantized_modules(loaded) == quantized_modules(model) and loaded.dtype == torch.float32
    assert torch.equal(logits(loaded, prompts), after)
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(loaded.generate(**prompts.prompt, **greedy), model.generate(**prompts.prompt, **greedy))


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "nf4 twice"])
def test_asking_a_used_model_for_its_weights_leaves_it_as_it_is(stored, kind):
    """bitsandbytes rearranges 4-bit weights at the first step on some CPUs; its own way back loses the order of scales."""
    model, prompts = load(stored[1], kind), random_prompts(2)
    fresh = {name: x.clone() for name, x in model.state_dict().items()}
    first = logits(model, prompts)
    was_rearranged = rearranged(model)
    state = model.state_dict()
    assert not rearranged(model) and state.keys() == fresh.keys()
    weights = [name for name in fresh if name.endswith("_proj.weight")]
    assert weights and all(torch.equal(state[name], fresh[name]) for name in weights)
    for name in (name for name in fresh if name.endswith(".weight.absmax") and kind == "nf4"):
        torch.testing.assert_close(state[name], fresh[name], rtol=2**-8, atol=0)
    assert torch.equal(logits(model, prompts), first) and rearranged(model) == was_rearranged
    put_back(model)
    with torch.enable_grad():  # the path of training, which takes weights in their stored order
        trained = model(**prompts.inputs).logits[prompts.text].detach()
    assert (trained - first).norm() < 0.05 * first.norm()


PUSH = """
import sys, torch
tests, folder, repo, file = sys.argv[1:]
sys.path.insert(0, tests)
from test_quantization import load, logits, random_prompts
model = load(folder, "nf4 twice")
torch.save(logits(model, random_prompts(0)), file)
model.push_to_hub(repo)
"""
PULL = """
import sys, torch
from transformers import AutoModelForImageTextToText
repo, file, inputs = sys.argv[1:]
inputs, text, wanted = torch.load(inputs), None, torch.load(file)
model = AutoModelForImageTextToText.from_pretrained(repo, trust_remote_code=True).eval()
assert "saisa_hf" not in sys.modules and "transformers_modules" in type(model).__module__
text = inputs.pop("text")
with torch.no_grad():
    assert torch.equal(model(**inputs).logits[text], wanted)
"""


@needs_bitsandbytes
def test_a_pushed_quantized_checkpoint_is_pulled_by_remote_code(tmp_path):
    model = save(tmp_path / "model", aligned=True)
    prompts = random_prompts(0)
    torch.save(prompts.inputs | {"text": prompts.text}, tmp_path / "inputs")
    tests = Path(__file__).parent
    with HubStandIn() as hub:
        for script, arguments, path in (
            (PUSH, [tests, tmp_path / "model", "someone/small", tmp_path / "logits"], tests.parent / "src"),
            (PULL, ["someone/small", tmp_path / "logits", tmp_path / "inputs"], tmp_path),
        ):
            environment = alone(tmp_path, **hub.environment(tmp_path / "home"), PYTHONPATH=str(path))
            succeeds(script, *arguments, environment=environment, cwd=tmp_path)
    card = hub.files("someone/small")["README.md"].decode()
    assert f"{sum(p.numel() for p in model.model.vision_tower.parameters()):,}" in card


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["8 bits", "nf4 twice"])
def test_adapters_train_on_a_quantized_model_and_load_again(stored, kind, tmp_path):
    peft = pytest.importorskip("peft")
    from saisa_hf.training.stages import add_lora

    prompts = random_prompts(3)
    labels = prompts.input_ids.masked_fill(~prompts.text, -100)
    adapted = add_lora(load(stored[1], kind), rank=4, alpha=8).train()
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert any("visual_projector" in name for name, p in adapted.named_parameters() if p.requires_grad)
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
    for _ in range(4):
        loss = adapted(**prompts.inputs, labels=labels, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    found = logits(adapted.eval(), prompts)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(stored[1], kind), tmp_path).eval()
    torch.testing.assert_close(logits(again, prompts), found, rtol=1e-4, atol=1e-4)


@needs_bitsandbytes
@pytest.mark.parametrize("kind", KINDS)
def test_visual_states_of_a_quantized_model_are_known_to_it_alone(stored, kind, tmp_path):
    model, prompts = load(stored[1], kind), prompts_from_rows(ROWS)
    unused = model.model.visual_fingerprint("keys_values")
    states = model.get_visual_states(prompts.pixel_values)
    states.save(tmp_path / "states")
    without = {name: value for name, value in prompts.inputs.items() if name != "pixel_values"}
    with torch.no_grad():
        found = model(**without, visual_states=states).logits[prompts.text]
    torch.testing.assert_close(found, logits(model, prompts), rtol=1e-3, atol=1e-3)
    again = load(stored[1], kind)  # whose weights are in their stored order
    read = SaisaVisualStates.load(tmp_path / "states")
    assert unused == states.fingerprint == again.model.visual_fingerprint("keys_values")
    assert again(**without, visual_states=read).logits.isfinite().all()
    other = load(stored[1], "nf4" if kind == "8 bits" else "8 bits")
    for stranger in (stored[0], other):
        with pytest.raises(ValueError, match="other weights"):
            stranger(**without, visual_states=read)


@needs_bitsandbytes
def test_half_precision_and_a_compute_dtype_go_through_quantized_projectors(stored):
    model = load(stored[1], "fp4", dtype=torch.bfloat16, llm_int8_skip_modules=["lm_head"])
    prompts = prompts_from_rows(ROWS)
    found, exact = logits(model, prompts.to(torch.bfloat16)).float(), logits(stored[0], prompts)
    assert (found - exact).norm() < 0.8 * exact.norm()
    assert model.get_visual_states(prompts.pixel_values).dtype == torch.bfloat16


@needs_bitsandbytes
def test_a_missing_or_old_bitsandbytes_is_named_with_the_remedy(stored, monkeypatch, tmp_path):
    load(stored[1], "nf4").save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_8bit=True)
    version, spec = importlib.metadata.version, importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(importlib.metadata, "version", lambda name: "0.43.0" if name == "bitsandbytes" else version(name))
        with pytest.raises(ImportError, match=r"newer bitsandbytes than 0\.43\.0: pip install -U .bitsandbytes>="):
            SaisaForConditionalGeneration.from_pretrained(stored[1], quantization_config=config)
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name, *_: None if name == "bitsandbytes" else spec(name, *_))
        for folder, given in ((tmp_path, {}), (stored[1], {"quantization_config": config})):
            with pytest.raises(ImportError, match=r"not installed: pip install -U .bitsandbytes>="):
                SaisaForConditionalGeneration.from_pretrained(folder, **given)


@needs_torchao
@pytest.mark.parametrize(
    ("kind", "error"), [("Int8WeightOnlyConfig", 0.05), ("Int8DynamicActivationInt8WeightConfig", 0.1)]
)
def test_torchaos_8_bits_leave_the_same_modules_alone_and_load_again(stored, tmp_path, kind, error):
    import torchao.quantization
    from transformers import TorchAoConfig

    prompts, config = prompts_from_rows(ROWS), TorchAoConfig(getattr(torchao.quantization, kind)())
    model = AutoModelForImageTextToText.from_pretrained(stored[1], quantization_config=config, dtype=torch.float32)
    small = {name for name, p in model.named_parameters() if hasattr(p, "__tensor_flatten__")}
    assert small == {f"{name}.weight" for name in decoder_maps(stored[0])}
    found, exact = logits(model, prompts), logits(stored[0], prompts)
    assert 0 < (found - exact).norm() < error * exact.norm()
    states = model.get_visual_states(prompts.pixel_values)
    without = {name: value for name, value in prompts.inputs.items() if name != "pixel_values"}
    torch.testing.assert_close(model(**without, visual_states=states).logits[prompts.text], found, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="other weights"):
        stored[0](**without, visual_states=states)
    if not TRANSFORMERS_5:
        pytest.skip("transformers 4.57 does not save torchao's weights as safetensors")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, prompts), found)
    assert loaded.model.visual_fingerprint("keys_values") == states.fingerprint
