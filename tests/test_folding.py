# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Folded projectors: the same model with less work, whatever becomes of its weights."""

import copy
import json
from functools import partial

import pytest
import torch
import transformers
from tile_parts import draw, next_processor, our_processor, tiled_saisa
from tiny_models import ROWS, TEXT_MODELS, prompts_from_rows, random_prompts, tiny_config, tiny_model
from torch import nn

from saisa_hf import SaisaForConditionalGeneration, SaisaModel
from saisa_hf.bench import measure
from saisa_hf.cli import main
from saisa_hf.costs.flops import Step, encoder_flops, step_flops, training_flops
from saisa_hf.costs.memory import fit, weight_bytes
from saisa_hf.costs.sizes import activation_bytes, folded_numbers
from saisa_hf.vision_saisa import image_size


INNER = 8  # a quarter of the hidden size
SHARINGS = ("per_layer", "shared")


def narrow(text="llama", **settings):
    return tiny_model(text, **{"projector_hidden_size": INNER, **settings})


def folded(model):
    model.fold_projectors()
    return model


def weights(model):
    """Layer 0's folded weights; None where its modules run themselves."""
    return model.language_model.layers[0].folded


@torch.no_grad()
def logits(model, prompts=None):
    return model(**(random_prompts(1) if prompts is None else prompts).inputs).logits


def same(a, b, tolerance=1e-5):
    """Within a part of the largest number."""
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(float(b.abs().max()), 1.0))


def runs_folded(model, prompts=None):
    """Whether layer 0 computes keys and values of images by folded weights."""
    called = []
    handle = weights(model).register_forward_hook(lambda *_: called.append(1))
    logits(model, prompts)
    handle.remove()
    return bool(called)


# --- the same numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXT_MODELS)
def test_every_language_model_computes_the_same(text):
    for sharing in SHARINGS:
        model = narrow(text, projector_sharing=sharing)
        for seed in range(2):  # no image, several, padding
            prompts = random_prompts(seed)
            plain = logits(model, prompts)
            same(logits(folded(model), prompts), plain)
            assert runs_folded(model, prompts)
            model.unfold_projectors()
            assert weights(model) is None and torch.equal(logits(model, prompts), plain)


@pytest.mark.parametrize(
    "settings",
    [
        {"projector_bias": False},
        {"projector_bias": False, "projector_sharing": "shared", "projector_hidden_size": 23},
        {"visual_layers": [1]},
        {"visual_layers": [0, 2], "projector_sharing": "shared", "leading_text_skips_attention": True},
        {"vision_feature_layer": [-2, -1], "projector_hidden_size": 5},
        {"visual_token_reduction": "resampler", "reduced_visual_tokens": 3, "vision_seq_length": 3},
        {"visual_token_reduction": "avg_pool", "vision_seq_length": 1},
        {"vision": "convnext", "vision_seq_length": 16, "projector_hidden_act": "relu"},
    ],
    ids=str,
)
def test_every_kind_of_projector_computes_the_same(settings):
    model = narrow("llama_biases", **settings)
    length = model.config.image_seq_length
    size = image_size(model.config.vision_config)[0]
    prompts = prompts_from_rows(ROWS, image_size=size, seq_length=length)
    plain = logits(model, prompts)
    same(logits(folded(model), prompts), plain)


@pytest.mark.parametrize("sharing", SHARINGS)
def test_images_in_tiles_have_their_newlines(sharing):
    model = tiled_saisa(projector_hidden_size=INNER, projector_sharing=sharing)
    inputs = our_processor(next_processor())(images=draw(1, (24, 12)), text="<image>Which?", return_tensors="pt")
    with torch.no_grad():
        plain = model(**inputs).logits
        same(folded(model)(**inputs).logits, plain)
        newlines = [layer.folded.weight[:, -1] for layer in model.language_model.layers]
    assert all(x.abs().max() > 0.01 for x in newlines)  # what was compared had some


ROUNDED = [
    (text, dtype) for text in ("llama_biases", "qwen3", "gemma2", "olmo2") for dtype in (torch.bfloat16, torch.float16)
]


@torch.no_grad()
def keys_values_and_logits(model, seed, dtype):
    """In float64; of inputs that are rounded to `dtype`."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(40, model.config.vision_feature_size, generator=generator).to(dtype).to(model.dtype)
    visual = model.model.for_layers(features)
    pairs = [layer.visual_keys_and_values(visual) for layer in model.language_model.layers]
    prompts = random_prompts(seed).to(dtype).to(model.dtype)
    return torch.stack([x.double() for pair in pairs for x in pair]), logits(model, prompts).double()


@pytest.mark.parametrize(("text", "dtype"), ROUNDED, ids=str)
def test_rounding_costs_no_more_than_it_does_unfolded(text, dtype):
    """Errors of keys and values of all layers, and of logits, against the same rounded weights in float64."""
    errors = torch.zeros(2, 2)  # folded or not; keys and values, logits
    for seed in range(6):
        model = narrow(text, seed=seed, projector_sharing=SHARINGS[seed % 2]).to(dtype)
        exact = keys_values_and_logits(copy.deepcopy(model).double(), seed, dtype)
        for row, one in enumerate((model, folded(copy.deepcopy(model)))):
            for column, (found, right) in enumerate(zip(keys_values_and_logits(one, seed, dtype), exact)):
                errors[row, column] += ((found - right).norm() / right.norm()) ** 2
    plain, after = errors.sqrt()
    assert (after < 1.5 * plain).all(), (after / plain).tolist()
    assert after[0] > 1e-5  # that is what rounding does


def test_the_mean_square_is_no_difference_of_large_numbers():
    """A quadratic form x^T G x would be: of inner numbers to which `linear_2` hardly answers, it is far off in bfloat16."""
    generator = torch.Generator().manual_seed(0)
    model = narrow("llama", projector_bias=False)
    layer = model.language_model.layers[0]
    projector, weight = layer.visual_projector, layer.visual_projector.linear_2.weight
    projector.linear_1, projector.act = nn.Linear(INNER, INNER, bias=False), nn.Identity()
    with torch.no_grad():
        nn.init.eye_(projector.linear_1.weight)
        mean = torch.rand(INNER, generator=generator) + 1
        weight.sub_(0.99 * torch.outer(weight @ mean, mean) / mean.square().sum())
        model = model.to(torch.bfloat16)
        x = (mean + 0.02 * torch.randn(200, INNER, generator=generator)).to(torch.bfloat16)
        exact = (x.double() @ weight.double().T).square().mean(-1)
        rows = folded(model) and layer.folded.rows(projector, x)[:, :INNER]
    found = (x.double().norm(dim=-1) / rows.double().norm(dim=-1)).square()
    form = (weight.double().T @ weight.double() / len(weight)).to(torch.bfloat16)
    quadratic = ((x @ form).float() * x.float()).sum(-1).double()
    assert ((found / exact - 1).abs() < 0.15).all(), (found / exact - 1).abs().max()
    assert ((quadratic / exact - 1).abs() > 0.5).any()


def test_visual_states_of_either_serve_both():
    prompts = prompts_from_rows(ROWS)
    text = {name: x for name, x in prompts.inputs.items() if name != "pixel_values"}
    for sharing in SHARINGS:
        model = narrow("qwen3", projector_sharing=sharing)
        with torch.no_grad():
            plain, states = logits(model, prompts), [model.get_visual_states(prompts.pixel_values)]
            states.append(folded(model).get_visual_states(prompts.pixel_values))
            states.append(model.get_visual_states(prompts.pixel_values, store="features"))
            assert states[0].fingerprint == states[1].fingerprint
            for keys, ours in zip(states[0].stored.keys_values, states[1].stored.keys_values):
                assert not torch.equal(keys[0], ours[0])
                same(ours[0], keys[0])
            for _ in range(2):
                for one in states:
                    same(model(**text, visual_states=one).logits, plain)
                model.unfold_projectors()


def test_answers_are_the_same():
    for sharing in SHARINGS:
        model, prompts = narrow("llama", projector_sharing=sharing), random_prompts(2)
        for how in ({}, {"num_beams": 2}, {"cache_implementation": "static"}):
            plain = model.generate(**prompts.prompt, max_new_tokens=6, do_sample=False, **how)
            assert torch.equal(
                folded(model).generate(**prompts.prompt, max_new_tokens=6, do_sample=False, **how), plain
            )
            model.unfold_projectors()


@pytest.mark.skipif(transformers.__version__ < "5", reason="the same on every release: runs under 5.x")
def test_folded_weights_are_part_of_a_graph():
    """A compiled prefill has as many as without: what looks whether weights have changed runs where the layout is found."""
    for sharing in SHARINGS:
        model = folded(narrow(projector_sharing=sharing))
        features, layer = torch.randn(5, model.config.vision_feature_size), model.language_model.layers[0]

        def keys_and_values(features, model=model, layer=layer):
            return layer.visual_keys_and_values(model.model.for_layers(features))

        torch._dynamo.reset()
        with torch.no_grad():
            plain = keys_and_values(features)
            compiled = torch.compile(keys_and_values, backend="eager", fullgraph=True)(features)
        for one, other in zip(compiled, plain):
            same(one, other)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__ < "5", reason="the same on every release: runs under 5.x")
@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_compiled_prefill_has_no_more_graphs(sharing):
    model, prompts, graphs = folded(narrow(projector_sharing=sharing)), prompts_from_rows([ROWS[2]] * 2), []
    plain = logits(model, prompts)  # the encoder does at its first call what no graph can hold

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        same(torch.compile(model, backend=backend)(**prompts.inputs, use_cache=False).logits, plain)
    torch._dynamo.reset()
    assert len(graphs) == 3  # as without (tests/test_compile.py)


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_is_saved_is_the_same_bit_for_bit(tmp_path):
    for sharing in SHARINGS:
        model = narrow(projector_sharing=sharing)
        model.save_pretrained(tmp_path / "plain", max_shard_size="40KB")
        names = list(model.state_dict())
        folded(model).save_pretrained(tmp_path / "folded", max_shard_size="40KB")
        files = sorted(path.name for path in (tmp_path / "plain").iterdir())
        assert files == sorted(path.name for path in (tmp_path / "folded").iterdir())
        for name in files:
            assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "folded" / name).read_bytes(), name
        assert list(model.state_dict()) == names
        assert folded_numbers(model.config) == 0


def test_models_are_folded_as_they_are_loaded(tmp_path):
    model, prompts = narrow("qwen3", visual_layers=[0, 2]), random_prompts(1)
    model.save_pretrained(tmp_path)
    plain = logits(model, prompts)
    asked = SaisaForConditionalGeneration.from_pretrained(tmp_path, fold_projectors=True)
    assert asked.config.fold_projectors and runs_folded(asked)
    same(logits(asked, prompts), plain)
    assert weights(SaisaForConditionalGeneration.from_pretrained(tmp_path)) is None
    asked.save_pretrained(tmp_path / "asked")  # the wish is in the config, the weights are what they were
    assert json.loads((tmp_path / "asked" / "config.json").read_text())["fold_projectors"] is True
    for cls in (SaisaForConditionalGeneration, SaisaModel):
        again = cls.from_pretrained(tmp_path / "asked")
        assert again.base_model.language_model.layers[0].folded is not None
        again = cls.from_pretrained(tmp_path / "asked", fold_projectors=False)
        assert again.base_model.language_model.layers[0].folded is None
    half = SaisaForConditionalGeneration.from_pretrained(tmp_path, fold_projectors=True, dtype=torch.bfloat16)
    assert weights(half).weight.dtype == torch.bfloat16 and runs_folded(half)


def test_without_the_package_a_checkpoint_loads_unfolded(tmp_path, monkeypatch):
    narrow(fold_projectors=True).save_pretrained(tmp_path)
    said = []
    monkeypatch.setattr("saisa_hf.checkpoint_saisa.warn_once", said.append)
    monkeypatch.setitem(__import__("sys").modules, "saisa_hf.checkpoints.folding", None)
    assert weights(SaisaForConditionalGeneration.from_pretrained(tmp_path)) is None
    assert len(said) == 1 and "needs the package saisa_hf" in said[0]


# --- weights that change ----------------------------------------------------------------------------------------------


def add(parameter):
    parameter.add_(0.1)


def write_one_number(parameter):
    parameter.data.view(-1)[3] += 0.5  # PyTorch counts no such writes


def put_another(parameter):
    parameter.data = parameter.data + 0.1


@pytest.mark.parametrize("change", [add, write_one_number, put_another])
@pytest.mark.parametrize(
    "name",
    ["linear_1.weight", "linear_2.weight", "linear_2.bias", "input_layernorm.weight", "k_proj.weight", "v_proj.bias"],
)
def test_no_answer_comes_from_weights_that_have_changed(name, change):
    for sharing in SHARINGS:
        model = folded(narrow("llama_biases", projector_sharing=sharing))
        same(logits(model), logits(copy.deepcopy(model)))
        parameter = next(p for key, p in model.named_parameters() if key.endswith(name))
        before = logits(model)
        with torch.no_grad():
            change(parameter)
        fresh = copy.deepcopy(model)
        fresh.unfold_projectors()
        assert not torch.allclose(logits(fresh), before, atol=1e-3)
        same(logits(model), logits(fresh))
        assert runs_folded(model)
        with torch.no_grad():
            states, right = (one.get_visual_states(random_prompts(1).pixel_values) for one in (model, fresh))
        same(states.stored.keys_values[0][1], right.stored.keys_values[0][1])


def test_other_weights_are_loaded_and_swapped():
    model, other = folded(narrow(seed=0)), narrow(seed=1)
    logits(model)
    model.load_state_dict(other.state_dict())
    same(logits(model), logits(other))
    model.language_model.layers[0] = copy.deepcopy(narrow(seed=2).language_model.layers[0])
    other.language_model.layers[0] = copy.deepcopy(model.language_model.layers[0])
    same(logits(model), logits(other))
    shared = folded(narrow(projector_sharing="shared"))
    plain = logits(shared)
    shared.unshare_projectors()
    assert weights(shared) is None
    same(logits(folded(shared)), plain)


def test_casts_and_copies_follow():
    model = folded(narrow("qwen3"))
    for dtype in (torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.float32):
        prompts = random_prompts(1).to(dtype)
        found = logits(model.to(dtype), prompts)
        assert weights(model).weight.dtype == dtype and runs_folded(model.to(dtype)) if dtype == torch.float32 else True
        fresh = copy.deepcopy(model)
        fresh.unfold_projectors()
        assert torch.equal(logits(folded(fresh), prompts), found), dtype  # nothing is left of the rounding before
    copied = copy.deepcopy(model)
    assert runs_folded(copied)
    with torch.no_grad():
        model.language_model.layers[0].self_attn.k_proj.weight.mul_(2)
    same(logits(copied), found.float())


@pytest.mark.parametrize("sharing", SHARINGS)
def test_training_goes_past_folded_weights(sharing):
    plain = narrow(projector_sharing=sharing).train()
    model, prompts = folded(copy.deepcopy(plain)), random_prompts(1)
    labels = prompts.input_ids.masked_fill(~prompts.text, -100)
    for mode in (True, False):  # in eval mode gradients are gradients as well
        for _ in range(2):
            for one in (plain, model):
                one.train(mode)
                one.zero_grad()
                one(**prompts.inputs, labels=labels).loss.backward()
            for (name, p), q in zip(plain.named_parameters(), model.parameters()):
                assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad), name
            for one in (plain, model):
                torch.optim.SGD(one.parameters(), lr=0.1).step()
        same(logits(model.eval(), prompts), logits(plain.eval(), prompts))
        assert runs_folded(model)


def test_what_learns_elsewhere_learns_through_folded_weights():
    gradients = []
    for model in (narrow(), folded(narrow())):
        model.requires_grad_(False)
        model.vision_tower.requires_grad_(True)
        model(**random_prompts(1).inputs).logits.square().mean().backward()
        gradients.append([p.grad for p in model.vision_tower.parameters() if p.grad is not None])
    assert gradients[0] and not all(map(torch.equal, *gradients))  # other products have made them
    for one, other in zip(*gradients):
        same(one, other)


def watch(seen):
    """A hook that counts, and changes what its module returns."""
    return lambda module, inputs, output: seen.append(1) or output * 1.1


def test_hooks_are_called():
    for sharing in SHARINGS:
        model = narrow(projector_sharing=sharing)
        layer, seen = model.language_model.layers[1], []
        projector = model.model.visual_projector if sharing == "shared" else layer.visual_projector
        for module in (projector.linear_2, layer.input_layernorm, layer.self_attn.v_proj):
            handle = module.register_forward_hook(watch(seen))
            plain = logits(model)
            calls, _ = len(seen), seen.clear()
            same(logits(folded(model)), plain)
            assert len(seen) == calls
            handle.remove()
            seen.clear()
            assert runs_folded(model)
            model.unfold_projectors()


def test_adapters_undo_it_in_words_and_are_folded_when_merged(monkeypatch):
    peft = pytest.importorskip("peft")
    said = []
    monkeypatch.setattr("saisa_hf.checkpoints.folding.warn_once", said.append)
    model = folded(narrow())
    before = logits(model)
    elsewhere = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    logits(elsewhere)
    assert weights(model) is not None and not said
    adapted = peft.get_peft_model(
        elsewhere.unload(), peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    )
    found = logits(adapted)
    assert weights(model) is None and len(said) == 1 and "not folded" not in said[0] and "layer 0" in said[0]
    assert not torch.allclose(found, before, atol=1e-3)
    with pytest.raises(ValueError, match="adapters merged"):
        model.fold_projectors()
    merged = adapted.merge_and_unload()
    same(logits(folded(merged)), found)
    # merged in between, unseen: the module is the old one, and the weight was written through `.data`
    model = folded(narrow())
    merged = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False)
    ).merge_and_unload()
    fresh = copy.deepcopy(merged)
    fresh.unfold_projectors()
    same(logits(merged), logits(fresh))


# --- what cannot be folded --------------------------------------------------------------------------------------------


def test_what_cannot_be_folded_is_refused():
    wide = "projector_hidden_size below 32"
    for settings in ({"projector_hidden_size": None}, {"projector_hidden_size": 32}, {"projector_hidden_size": 24}):
        with pytest.raises(ValueError, match=wide):
            tiny_model(**settings).fold_projectors()
        with pytest.raises(ValueError, match=wide):
            tiny_config(**settings, fold_projectors=True)
    with pytest.raises(ValueError, match="in input space"):
        narrow(alignment="embedding_space").fold_projectors()
    with pytest.raises(ValueError, match="fold_projectors='yes'"):
        tiny_config(projector_hidden_size=INNER, fold_projectors="yes")
    for spoil in (
        lambda attention: attention.k_proj.to("meta"),
        lambda attention: setattr(attention.k_proj, "weight", nn.Parameter(attention.k_proj.weight[:8].detach())),
        lambda attention: setattr(attention, "v_proj", nn.Sequential(attention.v_proj)),
        lambda attention: nn.utils.parametrizations.weight_norm(attention.v_proj),
    ):
        model = narrow()
        spoil(model.language_model.layers[2].self_attn)
        with pytest.raises(ValueError, match=r"layer 2 has a .*quantized, adapted, sharded or offloaded"):
            model.fold_projectors()
        assert weights(model) is None


def test_quantized_weights_are_refused(tmp_path):
    pytest.importorskip("bitsandbytes")
    model = narrow("llama")
    model.save_pretrained(tmp_path)
    quantized = transformers.BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(ValueError, match="layer 0 has a Linear8bitLt"):
        SaisaForConditionalGeneration.from_pretrained(tmp_path, quantization_config=quantized, fold_projectors=True)


# --- costs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["llama", "llama_biases", "qwen3", "gemma2", "phi3", "olmo2", "mixtral"])
def test_formulas_are_what_pytorch_counts(text):
    for settings in ({}, {"projector_sharing": "shared"}, {"visual_layers": [1], "projector_bias": False}):
        model = folded(narrow(text, attn_implementation="eager", **settings))
        prompts, config = prompts_from_rows([[1, "image", 5, 6, 7, 8, 9, "image", 10, 11]] * 2), model.config
        with torch.no_grad():
            counted = measure.flops(partial(model, **prompts.inputs, logits_to_keep=1, use_cache=True))
        plain = type(config).from_dict(config.to_dict())
        config.fold_projectors = True
        step = Step(8, 8, batch=2)
        formula = 4 * encoder_flops(config) + sum(step_flops(config, "saisa", step).values())
        assert formula == pytest.approx(counted, rel=0.001)  # 4.57 has products in its rotations
        assert formula < 4 * encoder_flops(config) + sum(step_flops(plain, "saisa", step).values())
        assert training_flops(config, "saisa", step) == training_flops(plain, "saisa", step)
        assert step_flops(config, "llava", step) == step_flops(plain, "llava", step)
        assert activation_bytes(config, "saisa", step, 2) <= activation_bytes(plain, "saisa", step, 2)
        buffers = {
            id(x): x.numel() for layer in model.language_model.layers if layer.folded for x in layer.folded.buffers()
        }
        assert folded_numbers(config) == sum(buffers.values())
        assert weight_bytes(config, "bfloat16") - weight_bytes(plain, "bfloat16") == 2 * sum(buffers.values())
        assert weight_bytes(config, "8-bit") == weight_bytes(plain, "8-bit")
        assert fit(config, 2**30, 8)[0]["weights"] == weight_bytes(config, "float32")


def test_the_command_counts_folded_projectors(capsys):
    sizes = ["flops", "vicuna-7b", "--text", "64", "--visual", "576", "--json"]

    def visual(*options):
        assert main([*sizes, *options]) == 0
        whole = json.loads(capsys.readouterr().out)["saisa"]
        assert main([*sizes[:5], "0", "--json"]) == 0
        text = json.loads(capsys.readouterr().out)["saisa"]["language_model"]
        scores = 32 * 4 * 64 * 576 * 4096
        return (whole["language_model"] - text - scores) / 1e12

    quarter = ("--projector-hidden-size", "1024")
    assert visual() == pytest.approx(2.01, abs=0.05)
    assert visual(*quarter, "--folded") == pytest.approx(0.39, abs=0.01)
    assert visual(*quarter) == pytest.approx(1.43, abs=0.05)
    assert main([*sizes, "--folded"]) == 2
    assert "projector_hidden_size below 4096" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*sizes, "--folded", *quarter, "--member", "vica"])
    assert "--family or --member" in capsys.readouterr().err
