# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Auto classes and pipelines take a SAISA checkpoint where they take a LLaVA, with the package and without it."""

import json
from pathlib import Path

import pytest
from apart import alone, succeeds
from PIL import Image
from tiny_models import TEXT_CONFIGS, VISION_CONFIGS, tiny_model
from training_parts import processor_for
from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

import saisa_hf


WORKER = Path(__file__).with_name("auto_worker.py")
CODE = Path(saisa_hf.__file__).parent.parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A LLaVA, a SAISA model and a picture. The tokenizer makes no `token_type_ids`, which 4.57's LLaVA cannot take."""
    folder = tmp_path_factory.mktemp("models")
    processor = processor_for()
    tiny_model("llama").save_pretrained(folder / "saisa")
    processor.save_pretrained(folder / "saisa")
    config = LlavaConfig(
        vision_config=VISION_CONFIGS["clip"](), text_config=TEXT_CONFIGS["llama"](), image_token_index=96
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder / "llava")
    settings = {"patch_size": 4, "num_additional_image_tokens": 1, "vision_feature_select_strategy": "default"}
    llava = LlavaProcessor(
        processor.image_processor, processor.tokenizer, chat_template=processor.chat_template, **settings
    )
    llava.save_pretrained(folder / "llava")
    for name in ("saisa", "llava"):
        file = folder / name / "tokenizer_config.json"
        inputs = {"model_input_names": ["input_ids", "attention_mask"]}
        file.write_text(json.dumps(json.loads(file.read_text()) | inputs))
    Image.new("RGB", (8, 12), "red").save(folder / "picture.png")
    return folder


@pytest.fixture(scope="module")
def llava(folders):
    """What is found about the LLaVA, which has no code of its own."""
    return answers(folders, folders, "llava", "package")


def answers(folders, home, model, by):
    """What `auto_worker.py` finds about a model, in a process in which the package is known or not."""
    environment = alone(home, **({"PYTHONPATH": str(CODE)} if by == "package" else {}))
    done = succeeds(WORKER, folders / model, folders / "picture.png", by, environment=environment, cwd=home)
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("by", ["package", "remote_code"])
def test_auto_classes_and_pipelines_do_as_with_llava(folders, llava, by, tmp_path):
    saisa = answers(folders, tmp_path, "saisa", by)
    assert llava.keys() == saisa.keys()
    for name, found in llava.items():
        expected = found.replace("Llava", "Saisa") if isinstance(found, str) else found
        assert saisa[name] == expected, name
    assert saisa["AutoModelForPreTraining"] == saisa["from_config"] == "SaisaForConditionalGeneration"
    assert saisa["text-generation"] == ["generated_text"]
