# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs transformers' shared model, generation, config and pipeline tests on SAISA; see run.py."""

import tempfile
import unittest
from pathlib import Path

import torch
from parameterized import parameterized
from safetensors.torch import load_file, save_file
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES
from transformers.testing_utils import torch_device

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration, SaisaModel
from saisa_hf.token_layout_saisa import TokenLayout

from ...generation.test_utils import GenerationTesterMixin
from ...test_configuration_common import ConfigTester
from ...test_modeling_common import ModelTesterMixin, floats_tensor, ids_tensor
from ...test_pipeline_mixin import PipelineTesterMixin


# The tests look up here which classes have a loss.
MODEL_MAPPING_NAMES["saisa"] = "SaisaModel"
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["saisa"] = "SaisaForConditionalGeneration"

try:
    from transformers.exporters.exporter_dynamo import register_pytree_node
except ImportError:  # transformers has had exporters since 5.13
    pass
else:
    # an argument of the language model, which is exported on its own; the exporter only knows caches
    register_pytree_node(TokenLayout)


class SaisaModelTester:
    batch_size = 3
    num_channels = 3
    is_training = True
    pad_token_id = 1
    image_token_id = 0

    text_config = {
        "model_type": "llama",
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 37,
        "hidden_act": "gelu",
        "attention_dropout": 0.0,
        "max_position_embeddings": 512,
        "initializer_range": 0.02,
        "pad_token_id": 1,
        "bos_token_id": 2,
        "eos_token_id": 3,
    }
    vision_config = {
        "model_type": "clip_vision_model",
        "image_size": 8,
        "patch_size": 2,
        "num_channels": 3,
        "hidden_size": 32,
        "projection_dim": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
    }

    def __init__(self, parent):
        self.parent = parent
        self.num_hidden_layers = self.text_config["num_hidden_layers"]
        self.vocab_size = self.text_config["vocab_size"]
        self.hidden_size = self.text_config["hidden_size"]
        self.num_attention_heads = self.text_config["num_attention_heads"]
        self.image_size = self.vision_config["image_size"]
        self.num_image_tokens = (self.image_size // self.vision_config["patch_size"]) ** 2
        self.seq_length = 7 + self.num_image_tokens
        self.encoder_seq_length = self.seq_length

    def get_config(self, vision_feature_layer=-1):
        return SaisaConfig(
            text_config=dict(self.text_config),
            vision_config=dict(self.vision_config),
            image_token_id=self.image_token_id,
            vision_feature_layer=vision_feature_layer,
            vision_feature_select_strategy="default",
            image_seq_length=self.num_image_tokens,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        pixel_values = floats_tensor([self.batch_size, self.num_channels, self.image_size, self.image_size])
        input_ids = ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 4) + 4
        # one token (padding in the first row), the image, text
        input_ids[:, 1 : 1 + self.num_image_tokens] = self.image_token_id
        input_ids[0, 0] = self.pad_token_id
        attention_mask = input_ids.ne(self.pad_token_id).long().to(torch_device)
        return config, {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}


class SaisaForConditionalGenerationModelTest(
    ModelTesterMixin, GenerationTesterMixin, PipelineTesterMixin, unittest.TestCase
):
    all_model_classes = (SaisaModel, SaisaForConditionalGeneration)
    all_generative_model_classes = (SaisaForConditionalGeneration,)
    pipeline_model_mapping = {"image-text-to-text": SaisaForConditionalGeneration}
    _is_composite = True
    # as in LLaVA, the vision tower's last layer norm does not contribute to the selected features
    test_all_params_have_gradient = False
    test_pruning = False
    test_head_masking = False

    def setUp(self):
        self.model_tester = SaisaModelTester(self)
        common_properties = ["image_token_id", "image_token_index", "vision_feature_layer", "image_seq_length"]
        self.config_tester = ConfigTester(
            self, config_class=SaisaConfig, has_text_modality=False, common_properties=common_properties
        )

    @unittest.skip("the decoder's hidden states are text-only; the returned ones are a view aligned with input_ids")
    def test_retain_grad_hidden_states_attentions(self):
        pass

    def test_reverse_loading_mapping(self):
        # The mixin expects names in files to differ from those in the model. SAISA's are the same, and both layouts load.
        for model_class in self.all_model_classes:
            model = model_class(self.model_tester.get_config()).to(torch_device)
            expected = model.state_dict()
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                path = Path(folder) / "model.safetensors"
                tensors = load_file(path)
                self.assertEqual(set(tensors), set(expected))
                flat = {name.replace("vision_tower.vision_model.", "vision_tower."): x for name, x in tensors.items()}
                self.assertNotEqual(set(flat), set(tensors))
                save_file(flat, path, metadata={"format": "pt"})
                loaded = model_class.from_pretrained(folder).to(torch_device).state_dict()
            for name, x in expected.items():
                torch.testing.assert_close(loaded[name], x, rtol=0, atol=0)

    # --- tests that LLaVA's own file adds to the mixins ---

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_mismatching_num_image_tokens(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config).to(torch_device).eval()
            model(**inputs)
            fewer_images = {**inputs, "pixel_values": inputs["pixel_values"][-1:]}
            with self.assertRaises(ValueError):
                model(**fewer_images)
            one = {name: x[:1] for name, x in inputs.items()}
            doubled = {name: x if name == "pixel_values" else torch.cat([x, x]) for name, x in one.items()}
            with self.assertRaises(ValueError):
                model(**doubled)
            doubled["pixel_values"] = torch.cat([one["pixel_values"]] * 2)
            model(**doubled)

    @parameterized.expand([(-1,), ([-1],), ([-1, -2],)])
    def test_vision_feature_layers(self, vision_feature_layer):
        config = self.model_tester.get_config(vision_feature_layer)
        _, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        layers = 1 if isinstance(vision_feature_layer, int) else len(vision_feature_layer)
        for model_class in self.all_model_classes:
            model = model_class(config).to(torch_device).eval()
            for layer in model.language_model.layers:
                self.assertEqual(layer.visual_projector.linear_1.in_features, layers * config.vision_config.hidden_size)
            model(**inputs)
