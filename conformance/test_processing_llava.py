"""The same for `LlavaProcessor`, the yardstick of `run.py --llava`: its own test takes its parts from the hub."""

import unittest

from transformers import LlavaProcessor

from ...test_processing_common import ProcessorTesterMixin
from .test_processing_saisa import LocalProcessor


class LlavaProcessorTest(LocalProcessor, ProcessorTesterMixin, unittest.TestCase):
    processor_class = LlavaProcessor
