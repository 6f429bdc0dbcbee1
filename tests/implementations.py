"""The attention implementations, made to run on any machine: flash attention on a stand-in for its kernels, flex attention
without compiling it (one test in `test_attention_implementations.py` does compile it)."""

from contextlib import contextmanager
from unittest import mock

from flash_standin import flash_attention
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import masking_utils
from transformers.integrations import flex_attention as flex_integration


IMPLEMENTATIONS = ["eager", "sdpa", "flex_attention", "flash_attention_2"]


@contextmanager
def runnable():
    """Within it all implementations run here. Yields the list of flash attention's kernel calls."""

    def attend(query, key, value, training=False, **options):
        return flex_attention(query, key, value, **options)

    def blocks(*arguments, **options):
        return create_block_mask(*arguments, **{**options, "_compile": False})

    with (
        flash_attention() as calls,
        mock.patch.object(flex_integration, "compile_friendly_flex_attention", attend),
        mock.patch.object(masking_utils, "create_block_mask", blocks),
    ):
        yield calls
