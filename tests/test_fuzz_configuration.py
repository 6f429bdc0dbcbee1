"""Malformed configurations: each is refused with a ValueError that names the field, or makes a model with finite logits."""

import json
import math
import random

import pytest
import torch
from malformed import VALUES, malformed, wrong_among
from tiny_models import OTHER_VISION_CONFIGS, TEXT_CONFIGS, VISION_CONFIGS, tiny_config

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration
from saisa_hf.vision_saisa import image_size


PARTS = [(text, "clip") for text in TEXT_CONFIGS] + [
    ("llama", vision) for vision in (VISION_CONFIGS | OTHER_VISION_CONFIGS)
]
# metadata: nothing in this package reads these
UNREAD = ("architectures", "auto_map", "transformers_version", "_name_or_path", "torch_dtype", "dtype")


def as_dict(text: str, vision: str) -> dict:
    """A right configuration, as its file has it."""
    return json.loads(tiny_config(text, vision).to_json_string()) | {"image_seq_length": None}


def places(value, path: tuple = ()) -> list[tuple]:
    """The paths of all fields in nested dicts."""
    found = [path] if path and path[-1] not in UNREAD else []
    if isinstance(value, dict) and (not path or path[-1] not in UNREAD):
        found += [place for key, one in value.items() for place in places(one, (*path, key))]
    return found


def works(config: SaisaConfig, path: tuple) -> None:
    """Builds the model, if it is small, and runs it once on one image."""
    with torch.device("meta"):
        model = SaisaForConditionalGeneration(config)
    if sum(p.numel() for p in model.parameters()) > 10**6:
        return
    torch.manual_seed(0)
    model = SaisaForConditionalGeneration(config).eval()
    height, width = image_size(config.vision_config)
    if config.vision_config.model_type == "siglip2_vision_model":
        height = width = config.vision_config.patch_size * math.isqrt(config.vision_config.num_patches)
    pixel_values = torch.rand(1, getattr(config.vision_config, "num_channels", 3), height, width)
    with torch.no_grad():
        count = model.get_image_features(pixel_values).pooler_output.shape[1]
        assert count == config.image_seq_length or path == ("image_seq_length",), (count, config.image_seq_length)
        ids = torch.tensor([[1, 5, *[config.image_token_id] * count, 6, 7, 8]])
        logits = model(input_ids=ids, pixel_values=pixel_values).logits
    assert logits.shape == (*ids.shape, config.text_config.vocab_size)
    assert logits.isfinite().all(), "logits are not finite"


def case(text, vision, path, kind, folder=None):
    """(name, call, the field): the call makes a config of the malformed dict and uses it."""

    def call():
        given = malformed(as_dict(text, vision), path, kind)
        if folder is None:
            config = SaisaConfig(**given)
        else:
            (folder / "config.json").write_text(json.dumps(given))
            config = SaisaConfig.from_pretrained(folder)
        works(config, path)

    return f"{text} {vision} {'.'.join(path)} {kind}", call, path


def sample(seed: int, number: int, folder=None) -> list:
    draw, cases = random.Random(seed), {}
    while len(cases) < number:
        text, vision = draw.choice(PARTS)
        path = draw.choice(places(as_dict(text, vision)))
        one = case(text, vision, path, draw.choice(list(VALUES)), folder if len(cases) % 5 == 0 else None)
        cases[one[0]] = one
    return list(cases.values())


def test_a_right_configuration_works():
    for text, vision in PARTS:
        works(SaisaConfig(**as_dict(text, vision)), ())


def test_a_few_malformed_configurations(tmp_path):
    wrong, right, refused = wrong_among(sample(0, 30, tmp_path))
    assert not wrong and right + refused == 30 and min(right, refused) > 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_malformed_configurations(seed, tmp_path):
    wrong, right, refused = wrong_among(sample(seed, 120, tmp_path))
    assert not wrong and right + refused == 120 and min(right, refused) > 20
