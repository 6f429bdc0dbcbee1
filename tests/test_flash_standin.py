# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The stand-in for flash attention's kernels: transformers' own models, through transformers' own code around the kernels,
compute with it what they compute with plain attention."""

import sys

import pytest
import torch
from flash_standin import attend, flash_attention
from tiny_models import TEXT_CONFIGS, VOCAB_SIZE
from transformers import AutoModelForCausalLM, DynamicCache, modeling_flash_attention_utils, modeling_utils


@pytest.fixture
def flash_calls():
    """Flash attention by the stand-in, and the list of its kernel calls."""
    with flash_attention() as calls:
        yield calls


LAYERS = 3


@pytest.fixture(params=["llama", "mistral_window"])
def language_model(request):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(TEXT_CONFIGS[request.param](), attn_implementation="eager").eval()


def _with_both(model, compute):
    results = []
    for implementation in ("eager", "flash_attention_2"):
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results.append(compute())
    return results


def _tokens(rows, length):
    return torch.randint(1, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(1))


def test_language_models_compute_the_same_with_the_stand_in(language_model, flash_calls):
    tokens = _tokens(2, 13)
    eager, flash = _with_both(language_model, lambda: language_model(tokens).logits)
    torch.testing.assert_close(flash, eager, rtol=0, atol=2e-5)
    assert [call.function for call in flash_calls] == ["flash_attn_func"] * LAYERS
    window = (5, 5) if language_model.config.model_type == "mistral" else (-1, -1)
    assert all(call.arguments["causal"] and call.arguments["window_size"] == window for call in flash_calls)


def test_left_padding_is_cut_away_before_the_stand_in(language_model, flash_calls):
    tokens, mask = _tokens(3, 13), torch.ones(3, 13, dtype=torch.long)
    mask[0, :4] = mask[1, :10] = 0
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    eager, flash = _with_both(language_model, lambda: language_model(**inputs).logits)
    torch.testing.assert_close(flash[mask.bool()], eager[mask.bool()], rtol=0, atol=2e-5)
    assert [call.function for call in flash_calls] == ["flash_attn_varlen_func"] * LAYERS
    assert all(call.arguments["cu_seqlens_k"] == [0, 9, 12, 25] for call in flash_calls)


def test_a_cache_is_read_by_the_stand_in(language_model, flash_calls):
    tokens = _tokens(2, 13)

    def in_three_pieces():
        cache, logits = DynamicCache(config=language_model.config), []
        for piece in tokens.split([8, 4, 1], 1):  # the second one: more than one query, fewer than there are keys
            logits.append(language_model(piece, past_key_values=cache, use_cache=True).logits)
        return torch.cat(logits, 1)

    eager, flash = _with_both(language_model, in_three_pieces)
    torch.testing.assert_close(flash, eager, rtol=0, atol=2e-5)
    assert [call.query[1] for call in flash_calls] == [8] * LAYERS + [4] * LAYERS + [1] * LAYERS


@pytest.mark.parametrize("beams", [1, 2])
def test_the_stand_in_generates_the_same_tokens(language_model, flash_calls, beams):
    tokens, mask = _tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options = {"max_new_tokens": 9, "do_sample": False, "num_beams": beams}
    eager, flash = _with_both(language_model, lambda: language_model.generate(tokens, attention_mask=mask, **options))
    assert flash.tolist() == eager.tolist()
    assert len(flash_calls) == 9 * LAYERS


def test_gradients_pass_through_the_stand_in(language_model, flash_calls):
    tokens, mask = _tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    gradients = []
    for implementation in ("eager", "flash_attention_2"):
        language_model.set_attn_implementation(implementation)
        language_model.zero_grad()
        language_model(tokens, attention_mask=mask).logits[mask.bool()].square().mean().backward()
        gradients.append({name: weight.grad.clone() for name, weight in language_model.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=0, atol=2e-5)


def test_the_stand_in_aligns_bottom_right_and_gives_zeros_to_queries_without_keys():
    q, k, v = (torch.randn(length, 2, 8) for length in (5, 3, 3))
    options = {"dropout_p": 0.0, "softmax_scale": None, "softcap": 0.0}
    out = attend(q, k, v, **options, causal=True, window_size=(-1, -1))
    assert out[:2].eq(0).all()
    torch.testing.assert_close(out[2], v[0])
    torch.testing.assert_close(attend(q, k, v, **options, causal=True, window_size=(0, 0))[2:], v)
    everything = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)))
    torch.testing.assert_close(
        attend(q, k, v, **options, causal=False, window_size=(-1, -1)), everything.transpose(0, 1)
    )


def test_the_stand_in_leaves_transformers_as_it_was(language_model):
    def state():
        return sys.modules.get("flash_attn"), dict(vars(modeling_flash_attention_utils)), dict(vars(modeling_utils))

    before = state()
    with flash_attention():
        language_model.set_attn_implementation("flash_attention_2")
        language_model(_tokens(1, 3))
        assert state() != before
    assert state() == before
