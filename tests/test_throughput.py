"""The FLOPs of a training step, against PyTorch's own count of a real one; and what is not to be computed at all."""

import pytest
import torch
import transformers
from tiny_models import OTHER_VISION_CONFIGS, VISION_CONFIGS, random_prompts, tiny_config, tiny_model, vision_features
from torch.utils.flop_counter import FlopCounterMode

from saisa_hf.costs.flops import encoder_flops
from saisa_hf.training import add_lora, freeze_all_but
from saisa_hf.training.throughput import StepFlops, peak_tflops


pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="the same on every release: runs under 5.x")


def prepared(trained, checkpointing, text, **options):
    """A tiny model as it is trained. `checkpointing`: None, or whether the older kind."""
    model = tiny_model(text, attn_implementation="eager", **options).train()
    if trained == "lora":
        pytest.importorskip("peft")
        model = add_lora(model, 4)
    else:
        freeze_all_but(model, trained)
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        if checkpointing:
            model.enable_input_require_grads()
    return model


def labelled(**options):
    """A ragged batch, all of whose text is learned."""
    prompts = random_prompts(seed=1, **options)
    return {**prompts.inputs, "labels": prompts.input_ids.masked_fill(~prompts.text, -100)}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["all kept", "checkpointing", "older checkpointing"])
@pytest.mark.parametrize(
    ("trained", "text", "options"),
    [
        ("projectors", "llama", {"projector_sharing": "shared"}),
        ("projectors", "gemma2", {"visual_layers": [1, 2]}),
        ("projectors+language_model", "qwen2", {}),
        ("projectors+language_model", "mixtral", {}),
        ("lora", "phi3", {}),
    ],
    ids=str,
)
def test_a_steps_flops_are_those_that_pytorch_counts(trained, text, options, checkpointing):
    model, batch = prepared(trained, checkpointing, text, **options), labelled()
    flops = StepFlops(model)
    with FlopCounterMode(display=False) as counter:
        model(**batch, skip_logits=True, use_cache=False).loss.backward()
    assert flops(flops.counts(batch)) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_counts_add_up():
    flops, batch = StepFlops(prepared("projectors", None, "llama")), labelled()
    text = {name: batch[name][:1, -5:] for name in ("input_ids", "labels")}
    one, other = flops.counts(batch), flops.counts(text)
    assert flops(one + other) == pytest.approx(flops(one) + flops(other))
    assert other.tolist() == [5, 0, 4, 0, 25, 25]


@pytest.mark.parametrize("vision", [*VISION_CONFIGS, "swin"])
def test_a_pictures_flops_are_those_of_its_encoder(vision):
    config = tiny_config(vision=(VISION_CONFIGS | OTHER_VISION_CONFIGS)[vision]())
    side = getattr(config.vision_config, "image_size", 8)
    model = tiny_model(vision=config.vision_config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter:
        model.get_image_features(torch.zeros(1, 3, side, side))
    assert encoder_flops(config) == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_peaks_are_known_by_a_devices_name(monkeypatch):
    assert peak_tflops(torch.device("cpu")) == 0
    names = {
        "NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989,
        "NVIDIA L40S": 362, "NVIDIA L4": 121, "NVIDIA GeForce RTX 4090": 165, "Tesla T4": 0,
    }  # fmt: skip
    for name, peak in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_tflops(torch.device("cuda")) == peak, name


@pytest.mark.parametrize("checkpointing", [None, False])
def test_no_gradient_passes_a_frozen_encoder_but_one_reaches_pictures_that_ask(checkpointing):
    model, batch = prepared("projectors", checkpointing, "llama"), labelled()
    features = model.get_image_features(batch["pixel_values"]).pooler_output
    assert not features.requires_grad
    assert torch.allclose(features, vision_features(model, batch["pixel_values"]), atol=1e-6)
    pixels = batch["pixel_values"].clone().requires_grad_()
    model(**{**batch, "pixel_values": pixels}, skip_logits=True, use_cache=False).loss.backward()
    assert pixels.grad.abs().max() > 0


# --- batches of text alone ---


def gradients(model, **arguments):
    model.zero_grad(set_to_none=True)
    loss = model(**arguments, skip_logits=True, use_cache=False).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, False, True])
@pytest.mark.parametrize("options", [{}, {"projector_sharing": "shared"}, {"visual_layers": [1]}], ids=str)
def test_no_pictures_give_the_projectors_gradients_of_zero_and_change_nothing_else(options, checkpointing):
    model = prepared("projectors+language_model", checkpointing, "llama", **options)
    encoded = []
    model.vision_tower.register_forward_hook(lambda *_: encoded.append(True))
    batch = labelled()
    text = {name: batch[name][:1] for name in ("input_ids", "labels", "attention_mask")}
    loss, wanted = gradients(model, **text)
    found_loss, found = gradients(model, **text, pixel_values=batch["pixel_values"][:0])
    assert torch.equal(loss, found_loss) and not encoded
    projectors = {name for name, _ in model.named_parameters() if "visual_projector" in name}
    assert found.keys() - wanted.keys() == projectors and projectors
    assert all(torch.equal(found[name], gradient) for name, gradient in wanted.items())
    assert all(torch.count_nonzero(found[name]) == 0 for name in projectors)


@pytest.mark.parametrize("vision", [*VISION_CONFIGS, "swin"])
def test_no_pictures_give_a_trained_encoder_gradients_of_zero(vision):
    model = tiny_model(vision=vision).train()
    batch = labelled()
    text = {name: batch[name][:1] for name in ("input_ids", "labels", "attention_mask")}
    side = getattr(model.config.vision_config, "image_size", 8)
    none = {"pixel_values": torch.zeros(0, 3, side, side)}
    if vision == "siglip2":
        none = {"pixel_values": torch.zeros(0, 4, 48), "pixel_attention_mask": torch.zeros(0, 4, dtype=torch.long)}
        none["spatial_shapes"] = torch.zeros(0, 2, dtype=torch.long)
    loss, wanted = gradients(model, **text)
    found_loss, found = gradients(model, **text, **none)
    assert torch.equal(loss, found_loss)
    more = found.keys() - wanted.keys()
    assert any("vision_tower" in name for name in more) and any("visual_projector" in name for name in more)
    assert all(torch.count_nonzero(found[name]) == 0 for name in more)
    model.eval()
    assert torch.equal(model(**text, **none).logits, model(**text).logits)
