# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The same tests for `LlavaProcessor`, the reference of `run.py --llava`. Its own test file needs files from the hub."""

import unittest

from transformers import LlavaProcessor

from ...test_processing_common import ProcessorTesterMixin
from .test_processing_saisa import LocalProcessor


class LlavaProcessorTest(LocalProcessor, ProcessorTesterMixin, unittest.TestCase):
    processor_class = LlavaProcessor
