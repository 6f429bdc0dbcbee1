"""Run by `test_devices.py`: a model spread over two pretended devices computes what it does on one. In a process of its own,
since the pretended backend is there for good."""

import accelerate
import torch
from pretend_devices import pretended_devices
from tiny_models import ROWS, prompts_from_rows, tiny_model

from saisa_hf.hardware_saisa import DECODER_LAYER


ZERO, ONE = "pretended:0", "pretended:1"
BY_HAND = {
    "model.vision_tower": ONE,
    "model.visual_projector": ZERO,
    "model.language_model.embed_tokens": ZERO,
    "model.language_model.layers.0": ZERO,
    "model.language_model.layers.1": ONE,
    "model.language_model.layers.2": ZERO,
    "model.language_model.norm": ONE,
    "model.language_model.rotary_emb": ZERO,
}


def automatic(model, share):
    """accelerate's own map where the first device takes `share` of the weights."""
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    room = {0: int(weights * share), 1: weights * 2}
    whole = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    found = accelerate.infer_auto_device_map(model, room, no_split_module_classes=sorted(whole))
    assert set(found.values()) == {0, 1} and not any(DECODER_LAYER.match(name) for name in found), found
    return {name: f"pretended:{device}" for name, device in found.items()}


@torch.no_grad()
def check(text, spread, **options):
    model, prompts = tiny_model(text, attn_implementation="eager", **options), prompts_from_rows(ROWS)
    inputs, prompt, greedy = prompts.inputs, prompts.prompt, {"max_new_tokens": 4, "do_sample": False}
    logits, generated = model(**inputs).logits, model.generate(**prompt, **greedy)
    device_map = spread(model)
    with pretended_devices() as copies:
        accelerate.dispatch_model(model, device_map, main_device=ZERO)
        inputs, prompt = ({name: x.to(ZERO) for name, x in given.items()} for given in (inputs, prompt))
        copies.clear()
        found = model(**inputs).logits
        wide = [copy for copy in copies if copy[0] == (12, 24)]  # the encoder's features
        assert len(wide) <= len({(*copy[1:],) for copy in wide}) + 1, wide  # the last one is an output
        assert torch.equal(found.cpu(), logits)
        assert torch.equal(model.generate(**prompt, **greedy).cpu(), generated)
        states = model.get_visual_states(inputs.pop("pixel_values"))
        layers = model.language_model.layers
        where = [layer.device if layer.sees_image else None for layer in layers]
        assert [pair and pair[0].device for pair in states.stored.keys_values] == where
        assert torch.equal(model(**inputs, visual_states=states).logits.cpu(), logits)
        try:
            torch.ones(2, device=ZERO) + torch.ones(2, device=ONE)
        except RuntimeError as error:
            assert "different devices" in str(error)
        else:
            raise AssertionError("pretended devices refuse nothing")


def by_hand(model):
    shared = model.config.projector_sharing == "shared"
    devices = {name: device for name, device in BY_HAND.items() if shared or name != "model.visual_projector"}
    return devices | {"lm_head": ZERO if model.config.tie_word_embeddings else ONE}


if __name__ == "__main__":
    check("qwen3", by_hand)
    check("qwen3", by_hand, projector_sharing="shared")
    check("gemma2", by_hand, visual_layers=[0, 1])
    check("llama", by_hand, visual_layers=[0, 2])
    check("llama", lambda model: automatic(model, 0.4))
    check("llama", lambda model: automatic(model, 0.75))
    print("equal")
