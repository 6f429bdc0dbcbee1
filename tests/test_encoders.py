"""Every vision encoder in front of the language model: which features SAISA takes, and that it runs end to end."""

import pytest
import torch
from tiny_models import VISION_CONFIGS, prompts_from_rows, randomize, tiny_config, tiny_model
from transformers import AutoModel, TimmWrapperConfig
from transformers.utils import is_timm_available

from saisa_hf import SaisaForConditionalGeneration


# (encoder, select strategy, placeholders per image): the class token is dropped by "default" where there is one
CASES = [
    ("clip", "default", 4),
    ("clip", "full", 5),
    ("siglip", "default", 4),
    ("siglip", "full", 4),
    ("siglip2", "full", 4),
    ("dinov2", "default", 4),
    ("dinov2", "full", 5),
    ("convnext", "full", 16),
]
SIZES = {"convnext": 16}
NESTED = ("clip", "siglip", "siglip2")
WITH_CLASS_TOKEN = ("clip", "dinov2")


def build(vision, strategy="full", seq_length=4, **kwargs):
    options = {"vision_feature_select_strategy": strategy, "vision_seq_length": seq_length} | kwargs
    return tiny_model("llama", vision, **options)


def prompts_for(vision, seq_length):
    rows = [[1, 5, "image", 6, 7], [1, "image", 8, "image", 9]]
    return prompts_from_rows(rows, seq_length=seq_length, image_size=SIZES.get(vision, 8))


def own_encoder(vision, model):
    """transformers' own encoder, built from its configuration, its weights copied into the model's vision tower.

    Under `vision_tower`, names are those that transformers gives them up to 5.5, whichever release runs."""
    encoder = randomize(AutoModel.from_config(VISION_CONFIGS[vision]()), seed=5).eval()
    weights = encoder.state_dict()
    if vision in NESTED:
        weights = {f"vision_model.{name.removeprefix('vision_model.')}": value for name, value in weights.items()}
    model.load_state_dict(model.state_dict() | {f"model.vision_tower.{name}": w for name, w in weights.items()})
    return encoder


def encoder_states(vision, model, pixel_values):
    """`hidden_states` of transformers' own encoder with the model's weights."""
    encoder, inputs = own_encoder(vision, model), {"pixel_values": pixel_values}
    if vision == "siglip2":
        inputs = patchified(pixel_values)
    with torch.no_grad():
        return encoder(**inputs, output_hidden_states=True).hidden_states


def patchified(pixel_values, patch=4, pad_to=0):
    """Pictures of one size as SigLIP 2 takes them: the patches row by row, in each the pixels row by row, then channels."""
    n, _, height, width = pixel_values.shape
    patches = torch.stack(
        [
            pixel_values[:, :, y : y + patch, x : x + patch].permute(0, 2, 3, 1).flatten(1)
            for y in range(0, height, patch)
            for x in range(0, width, patch)
        ],
        1,
    )
    padding = max(pad_to - patches.shape[1], 0)
    mask = torch.ones(n, patches.shape[1], dtype=torch.long)
    return {
        "pixel_values": torch.nn.functional.pad(patches, (0, 0, 0, padding)),
        "pixel_attention_mask": torch.nn.functional.pad(mask, (0, padding)),
        "spatial_shapes": torch.tensor([[height // patch, width // patch]] * n),
    }


def as_tokens(state, vision, strategy):
    """(n_images, V, C): feature maps (n_images, C, height, width) are read row by row."""
    if state.dim() == 4:
        height, width = state.shape[2:]
        return torch.stack([state[:, :, y, x] for y in range(height) for x in range(width)], 1)
    return state[:, 1:] if strategy == "default" and vision in WITH_CLASS_TOKEN else state


@pytest.mark.parametrize("vision, strategy, seq_length", CASES)
@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_features_are_the_encoders_own_hidden_states(vision, strategy, seq_length, layer):
    if vision == "convnext":
        seq_length = {-2: 16, -1: 4, 1: 64}[layer]
    model = build(vision, strategy, seq_length, vision_feature_layer=layer)
    pixel_values = prompts_for(vision, seq_length).pixel_values
    states = encoder_states(vision, model, pixel_values)
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values, return_dict=True).pooler_output
    expected = as_tokens(states[layer], vision, strategy)
    assert expected.shape[1] == seq_length
    torch.testing.assert_close(features, expected)


@pytest.mark.parametrize("vision, strategy, seq_length", [case for case in CASES if case[0] != "convnext"])
def test_several_feature_layers_are_concatenated(vision, strategy, seq_length):
    model = build(vision, strategy, seq_length, vision_feature_layer=[-2, 1, -1])
    pixel_values = prompts_for(vision, seq_length).pixel_values
    states = encoder_states(vision, model, pixel_values)
    with torch.no_grad():
        features = model.model.get_image_features(pixel_values, return_dict=True).pooler_output
    torch.testing.assert_close(features, torch.cat([as_tokens(states[i], vision, strategy) for i in (-2, 1, -1)], -1))
    prompts = prompts_for(vision, seq_length)
    with torch.no_grad():
        assert model(**prompts.inputs).logits.isfinite().all()


@pytest.mark.parametrize("vision, strategy, seq_length", CASES)
def test_every_encoder_runs_generates_and_survives_saving(vision, strategy, seq_length, tmp_path):
    model = build(vision, strategy, seq_length)
    prompts = prompts_for(vision, seq_length)
    with torch.no_grad():
        logits = model(**prompts.inputs).logits
        changed = prompts_for(vision, seq_length)
        changed.pixel_values = -changed.pixel_values
        assert not torch.equal(model(**changed.inputs).logits, logits)
    written = model.generate(**prompts.prompt, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path)
    again, info = SaisaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    with torch.no_grad():
        assert torch.equal(again(**prompts.inputs).logits, logits)
    assert torch.equal(again.generate(**prompts.prompt, max_new_tokens=4, do_sample=False), written)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_siglip2_takes_pictures_of_any_shape(num_beams):
    """Its processor hands over patches, padded to the largest picture; each picture has as many visual tokens as patches."""
    model = build("siglip2")
    encoder = own_encoder("siglip2", model)
    generator = torch.Generator().manual_seed(0)
    pictures = [torch.randn(1, 3, h, w, generator=generator) for h, w in [(8, 8), (4, 12), (8, 4)]]
    alone = [patchified(p) for p in pictures]
    padded = [patchified(p, pad_to=4) for p in pictures]
    together = {name: torch.cat([p[name] for p in padded]) for name in padded[0]}
    with torch.no_grad():
        features = model.model.get_image_features(**together, return_dict=True).pooler_output
        for mine, inputs in zip(features, alone):
            torch.testing.assert_close(mine, encoder(**inputs, output_hidden_states=True).hidden_states[-2][0])

    image = model.config.image_token_id
    rows = [[1, 5, *[image] * 4, 6, *[image] * 3, 7], [1, 4, 3, 8, *[image] * 2, 9, 2, 5, 6, 7]]
    ids = torch.tensor(rows)
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | together
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": num_beams}
    written = model.generate(**prompt, **options)
    for b, own in enumerate([[0, 1], [2]]):
        row = {name: value[own] for name, value in together.items()}
        row |= {"input_ids": ids[b : b + 1], "attention_mask": torch.ones(1, ids.shape[1], dtype=torch.long)}
        assert torch.equal(model.generate(**row, **options)[0], written[b])


def test_a_convolutional_encoder_is_left_out_of_the_choice_of_attention(tmp_path):
    model = build("convnext", "full", 16)
    model.save_pretrained(tmp_path)
    for implementation in ("eager", "sdpa"):
        again = SaisaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation=implementation)
        model.set_attn_implementation(implementation)
        for changed in (model, again):
            assert changed.config.text_config._attn_implementation == implementation
            assert changed.config.vision_config._attn_implementation == "eager"


# --- encoders that are asked what they yield --------------------------------------------------------------------------

# encoder, its state, size of its pictures, tokens in front of the patches, visual tokens without them, width
ASKED = [
    ("vit", -2, 8, 1, 4, 24),
    ("registers", -2, 8, 4, 4, 24),  # a class token and three registers
    ("ijepa", 1, 8, 0, 4, 24),
    ("swin", -2, 16, 0, 4, 32),
    ("resnet", -2, 224, 0, 196, 16),
]


def runs_end_to_end(model, image_size, tmp_path):
    """Pictures matter, and what is saved is what is loaded."""
    prompts = prompts_from_rows(
        [[1, 5, "image", 6, 7], [1, "image", 8, 2]], seq_length=model.config.image_seq_length, image_size=image_size
    )
    with torch.no_grad():
        logits = model(**prompts.inputs).logits
        changed = model(**prompts.inputs | {"pixel_values": -prompts.pixel_values}).logits
    assert not torch.isclose(logits[:, -2:], changed[:, -2:]).all(-1).any()
    model.save_pretrained(tmp_path)
    again, info = SaisaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert again.config.image_seq_length == model.config.image_seq_length
    with torch.no_grad():
        assert torch.equal(again(**prompts.inputs).logits, logits)


@pytest.mark.parametrize("vision, layer, size, prefix, tokens, width", ASKED)
def test_an_encoder_is_asked_what_it_yields(vision, layer, size, prefix, tokens, width, tmp_path):
    config = tiny_config("llama", vision, vision_seq_length=None, vision_feature_layer=layer)
    assert (config.vision_prefix_tokens, config.image_seq_length, config.vision_feature_size) == (prefix, tokens, width)
    whole = tiny_config(
        "llama", vision, None, vision_feature_layer=layer, vision_feature_select_strategy="full"
    )  # fmt: skip
    assert whole.image_seq_length == tokens + prefix
    model = tiny_model("llama", vision, vision_seq_length=None, vision_feature_layer=layer)
    pixel_values = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.get_image_features(pixel_values, return_dict=True).pooler_output
        state = model.vision_tower(pixel_values, output_hidden_states=True).hidden_states[layer]
    assert features.shape == (2, tokens, width)
    assert torch.equal(features, as_tokens(state, vision, "full")[:, prefix:])
    runs_end_to_end(model, size, tmp_path)


def test_states_of_unlike_sizes_cannot_be_put_side_by_side():
    with pytest.raises(ValueError, match=r"these states differ in size"):
        tiny_config("llama", "swin", vision_feature_layer=[0, -1])


TIMM = [
    ("convnext_atto", None, 64, 16, 160),  # OpenCLIP's ConvNeXt towers are of this kind
    ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}, 32, 4, 192),
]


@pytest.mark.parametrize("architecture, arguments, size, tokens, width", TIMM)
def test_timms_encoders_run_through_transformers_wrapper(architecture, arguments, size, tokens, width, tmp_path):
    pytest.importorskip("timm", reason="timm is not installed: pip install timm, which brings torchvision")
    vision = TimmWrapperConfig(
        architecture=architecture, model_args=arguments, num_labels=2, pretrained_cfg={"input_size": [3, size, size]}
    )
    model = tiny_model("llama", vision, vision_seq_length=None)
    assert (model.config.image_seq_length, model.config.vision_feature_size) == (tokens, width)
    pixel_values = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = model.get_image_features(pixel_values, return_dict=True).pooler_output
        state = model.vision_tower.timm_model.forward_intermediates(pixel_values)[1][-2]
    assert torch.equal(features, as_tokens(state, "timm", "full"))
    runs_end_to_end(model, size, tmp_path)


def test_without_timm_the_extra_is_named():
    if is_timm_available():
        pytest.skip("timm is installed here")
    with pytest.raises(ImportError, match=r"pip install timm"):
        tiny_config("llama", TimmWrapperConfig(architecture="convnext_atto", num_labels=2), None)
