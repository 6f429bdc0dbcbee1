"""Malformed processor files: each is refused with a ValueError that names the setting, or makes the right placeholders."""

import json
import random

import pytest
from malformed import VALUES, malformed, wrong_among
from PIL import Image
from test_processing import make_processor

from saisa_hf import SaisaProcessor


SETTINGS = {"image_seq_length": 4, "image_token": "<image>", "num_additional_image_tokens": 1, "pad_to_square": False}
SETTINGS |= {"patch_size": 14, "reduced_visual_tokens": None, "tokenize_whole": True, "chat_template": "{{ messages }}"}
SETTINGS |= {"vision_feature_select_strategy": "default", "visual_token_reduction": None}


def processor_cases(seed: int, number: int, folder):
    """(name, call, the field): a processor from a folder whose `processor_config.json` has one malformed setting."""
    make_processor(image_seq_length=4).save_pretrained(folder)
    file = folder / "processor_config.json"
    right = json.loads(file.read_text()) | {name: value for name, value in SETTINGS.items() if name != "chat_template"}
    image = Image.new("RGB", (30, 20))

    def case(field, kind):
        def call():
            given = malformed(right | {field: SETTINGS[field]}, (field,), kind)
            if field == "chat_template":  # which has a file of its own
                processor = make_processor(image_seq_length=4, chat_template=given.get(field))
            else:
                file.write_text(json.dumps(given))
                processor = SaisaProcessor.from_pretrained(folder)
            batch = processor(text="a <image> b".replace("<image>", processor.image_token), images=image)
            count = batch["input_ids"][0].count(processor.image_token_id)
            if processor.image_seq_length is not None:
                assert count == processor.image_seq_length
            elif (
                processor.visual_token_reduction is None
            ):  # the picture is resized to 4 patches by the reference's settings
                others = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
                side = batch["pixel_values"][0].shape[-1] // processor.patch_size
                assert count == side**2 + max(others, 0)

        return f"{field} {kind}", call, (field,)

    every = [(field, kind) for field in SETTINGS for kind in VALUES]
    return [case(*one) for one in random.Random(seed).sample(every, number)]


def test_a_few_malformed_processor_files(tmp_path):
    wrong, right, refused = wrong_among(processor_cases(0, 30, tmp_path))
    assert not wrong and right + refused == 30 and refused > 5


@pytest.mark.slow
def test_malformed_processor_files(tmp_path):
    wrong, right, refused = wrong_among(processor_cases(1, 200, tmp_path))
    assert not wrong and right + refused == 200 and refused > 50
