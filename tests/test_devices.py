"""A model that is spread over devices, or lies on the disk until it is used, computes what it does in one place."""

import os
from pathlib import Path

import accelerate
import pytest
import torch
from apart import succeeds
from tiny_models import ROWS, prompts_from_rows, tiny_model
from torch.utils import backend_registration
from transformers import AutoModelForImageTextToText

from saisa_hf import SaisaForConditionalGeneration
from saisa_hf.compat_saisa import TRANSFORMERS_5


MODELS = {
    "a projector per layer": {"text": "qwen3"},
    "one projector": {"text": "llama", "projector_sharing": "shared"},
    "tied head": {"text": "qwen2"},
    "a resampler": {"text": "llama", "visual_token_reduction": "resampler", "reduced_visual_tokens": 4},
    "no norm in front": {"text": "olmo2", "visual_layers": [0, 2]},
    "embedding space": {
        "text": "qwen3",
        "alignment": "embedding_space",
        "projector_sharing": "shared",
        "visual_attention": ["full", "none", "none"],
        "visual_feed_forward": [True, True, False],
    },
}
GREEDY = {"max_new_tokens": 4, "do_sample": False}
OFF_AND_ON = {
    "model.vision_tower": "disk",
    "model.visual_projector": "disk",
    "model.visual_resampler": "disk",
    "model.language_model.embed_tokens": "cpu",
    "model.language_model.layers.0": "cpu",
    "model.language_model.layers.1": "disk",
    "model.language_model.layers.2": "disk",
    "model.language_model.norm": "cpu",
    "model.language_model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture(scope="module", params=MODELS)
def stored(request, tmp_path_factory):
    """(the model, a folder that holds it)."""
    folder = tmp_path_factory.mktemp("model")
    tiny_model(**MODELS[request.param]).save_pretrained(folder)
    return load(folder), folder


def load(folder, **options):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, **options).eval()


@torch.no_grad()
def check_equal(model, reference):
    prompts = prompts_from_rows(ROWS)
    inputs = prompts.inputs
    expected = reference(**inputs).logits
    assert torch.equal(model(**inputs).logits, expected)
    assert torch.equal(model.generate(**prompts.prompt, **GREEDY), reference.generate(**prompts.prompt, **GREEDY))
    pictures = inputs.pop("pixel_values")
    states, wanted = model.get_visual_states(pictures), reference.get_visual_states(pictures)
    assert states.fingerprint == wanted.fingerprint
    for given in (states, wanted, model.get_visual_states(pictures, store="features")):
        assert torch.equal(model(**inputs, visual_states=given).logits, expected)


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential", "by hand"])
def test_a_model_that_lies_partly_on_the_disk_computes_what_one_in_memory_does(stored, device_map, tmp_path):
    reference, folder = stored
    absent = {
        f"model.{name}" for name in ("visual_projector", "visual_resampler") if not hasattr(reference.model, name)
    }
    by_hand = {name: device for name, device in OFF_AND_ON.items() if name not in absent}
    options = {"device_map": by_hand if device_map == "by hand" else device_map, "offload_folder": tmp_path}
    check_equal(load(folder, **options), reference)


def test_what_does_not_fit_into_memory_goes_to_the_disk_layer_by_layer(stored, tmp_path):
    reference, folder = stored
    if not TRANSFORMERS_5 and reference.config.tie_word_embeddings:
        pytest.skip("transformers 4.57 does not find a tied head on the disk")
    model = load(folder, device_map="auto", max_memory={"cpu": "60KB"}, offload_folder=tmp_path)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert sum(p.is_meta for p in model.parameters()) > 20
    names = {name for name in model.hf_device_map if "language_model.layers." in name}
    assert all(name.rsplit(".", 1)[1].isdigit() for name in names)
    check_equal(model, reference)


def test_weights_that_wait_in_memory_compute_the_same(stored):
    model = load(stored[1])
    accelerate.cpu_offload(model, "cpu")
    assert all(p.is_meta for p in model.parameters())
    check_equal(model, stored[0])


def test_fingerprints_of_weights_elsewhere_tell_models_apart(stored, tmp_path):
    if stored[0].config.in_embedding_space:
        pytest.skip("its visual states depend on no decoder layer")
    other = load(stored[1], device_map=None)
    with torch.no_grad():
        other.model.language_model.layers[2].visual_modules()["v_proj"].weight[1, 2] += 1
    expected = other.model.visual_fingerprint("keys_values")
    accelerate.disk_offload(other, tmp_path, "cpu")
    states = other.get_visual_states(prompts_from_rows(ROWS).pixel_values)
    assert states.fingerprint == expected != stored[0].model.visual_fingerprint("keys_values")
    with pytest.raises(ValueError, match="other weights"):
        stored[0].model.check_visual_states(states)


def test_weights_that_are_nowhere_have_no_fingerprint():
    with torch.device("meta"):
        model = SaisaForConditionalGeneration(tiny_model().config)
    with pytest.raises(ValueError, match="on the meta device, and no hook of accelerate tells where"):
        model.model.visual_fingerprint("keys_values")


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"), reason="needs PyTorch 2.10"
)
def test_on_two_devices_it_computes_what_it_does_on_one_and_features_travel_once():
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests.parent / "src"), str(tests)])}
    assert succeeds(tests / "devices_worker.py", environment=environment, cwd=tests).stdout.endswith("equal\n")


@pytest.mark.parametrize(
    "device_map",
    [
        {"": "cpu", "model.language_model.layers.1.mlp": "disk"},
        {"model.language_model.layers.1.self_attn": 0, "model.language_model.layers.1.visual_projector": 1},
        {"model.language_model.layers": 0, "model.language_model.layers.1.visual_projector.linear_2": "cuda:1"},
    ],
)
def test_a_map_that_splits_a_decoder_layer_is_refused_with_the_layer_and_the_remedy(stored, device_map):
    remedy = (
        r"splits the decoder layer model\.language_model\.layers\.1 .*one entry, 'model\.language_model\.layers\.1'"
    )
    with pytest.raises(ValueError, match=remedy):
        load(stored[1], device_map=device_map)
    below = {"": "cpu", "model.language_model.layers.1.self_attn": "cpu", "model.vision_tower.vision_model": "cpu"}
    assert load(stored[1], device_map=below).device.type == "cpu"
