# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Runs transformers' shared processor tests on `SaisaProcessor`; see run.py."""

import json
import shutil
import tempfile
import unittest
from unittest import mock

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from saisa_hf import SaisaProcessor
from saisa_hf.chat.templates import chat_template
from saisa_hf.processing_saisa import add_image_token

from ...test_processing_common import ProcessorTesterMixin


def byte_tokenizer():
    """A tokenizer with a token for each byte, and the image token."""
    words = ["<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=2048
    )
    add_image_token(tokenizer)
    return tokenizer


class LocalProcessor:
    """A processor whose parts are built here instead of loaded from the hub."""

    full_tmpdirname = None  # transformers 5 has a second, larger processor for some models

    @classmethod
    def setUpClass(cls):
        cls.tmpdirname = tempfile.mkdtemp()
        processor = cls.processor_class(CLIPImageProcessor(), byte_tokenizer(), **cls.prepare_processor_dict())
        processor.save_pretrained(cls.tmpdirname)
        cls.image_token = processor.image_token

    @classmethod
    def tearDownClass(cls):
        shutil.rmtree(cls.tmpdirname)

    @staticmethod
    def prepare_processor_dict():
        # 16 visual tokens per image of 224 pixels
        return {
            "patch_size": 56,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
            "chat_template": chat_template("vicuna"),
        }

    # --- tests that LlavaProcessor's own file adds to the mixin ---

    def test_get_num_vision_tokens(self):
        counts = self.get_processor()._get_num_multimodal_tokens(image_sizes=[(100, 100), (300, 100), (500, 30)])
        self.assertEqual(counts["num_image_tokens"], [16, 16, 16])
        self.assertEqual(counts["num_image_patches"], [1, 1, 1])

    def test_chat_template_is_saved(self):
        loaded = self.processor_class.from_pretrained(self.tmpdirname)
        self.assertNotIn("chat_template", json.loads(loaded.to_json_string()))
        self.assertEqual(loaded.chat_template, self.prepare_processor_dict()["chat_template"])

    def test_special_mm_token_truncation(self):
        processor = self.get_processor()
        inputs = {"text": self.prepare_text_inputs(2, "image"), "images": self.prepare_image_inputs(2)}
        processor(**inputs, return_tensors="pt", truncation=None, padding=True)
        with self.assertRaises(ValueError):
            processor(**inputs, return_tensors="pt", truncation=True, padding=True, max_length=5)


class SaisaProcessorTest(LocalProcessor, ProcessorTesterMixin, unittest.TestCase):
    processor_class = SaisaProcessor

    def test_processor_text_has_no_visual(self):
        # The mixin looks for videos in the signature. SaisaProcessor has them among its keywords.
        call = SaisaProcessor.__call__

        def without_videos(
            self, images: list | None = None, text: list | None = None, videos: list | None = None, **kwargs
        ):
            kwargs.pop("do_sample_frames", None)
            return call(self, images, text, **kwargs)

        with mock.patch.object(SaisaProcessor, "__call__", without_videos):
            super().test_processor_text_has_no_visual()
