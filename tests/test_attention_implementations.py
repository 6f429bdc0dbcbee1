"""The four attention implementations compute the same, each in the form that it takes: a mask tensor, a block mask, or runs
of text over plain causal attention."""

import shutil

import pytest
import torch
from dense_reference import dense_saisa
from implementations import IMPLEMENTATIONS, runnable
from tiny_models import (
    BOS,
    TEXT_CONFIGS,
    prompts_from_rows,
    random_prompts,
    randomize,
    tiny_config,
    tiny_model,
    vision_features,
)
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import flex_attention
from transformers import DynamicCache, LlavaConfig, LlavaForConditionalGeneration, StaticCache
from transformers.integrations import flex_attention as flex_integration

from saisa_hf import attention_saisa


LAYERS = 3
TEXT = [
    "llama",
    "qwen3",
    "mistral_window",
    "qwen2_window",
]  # heads of their own and shared; windows nowhere, everywhere, in part
OTHERS = [name for name in IMPLEMENTATIONS if name != "sdpa"]


@pytest.fixture(autouse=True)
def flash_calls():
    with runnable() as calls:
        yield calls


@torch.no_grad()
def logits(model, prompts, **changes):
    return model(**{**prompts.inputs, **changes}).logits


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# --- all equal --------------------------------------------------------------------------------------------------------

PROMPTS = {
    "no picture": [[BOS, 5, 6, 7, 8, 9], [BOS, 9, 10]],
    "one picture": [[BOS, 5, 6, "image", 7, 8]],
    "pictures in front and next to each other": [["image", 5, "image", "image", 6, 7]],
    "the same layout twice": [[BOS, "image", 5, 6, "image", 7], [BOS, "image", 8, 9, "image", 10]],
    "unlike rows": [
        [BOS, 5, 6, 7],
        [BOS, 8, "image", 9, 10, 11],
        ["image", 12, 13, "image", "image", 14, 15],
        [BOS, "image", 16],
    ],
}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", PROMPTS)
@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_are_those_of_the_dense_computation(implementation, text, rows, side):
    if side == "right" and len(PROMPTS[rows]) == 1:
        pytest.skip("nothing to pad")
    model, prompts = tiny_model(text, attn_implementation=implementation), prompts_from_rows(PROMPTS[rows], side)
    computed = logits(model, prompts)
    for b in range(len(prompts.images)):
        row = prompts.row(b)
        features = vision_features(model, row.pixel_values).flatten(0, 1) if row.images[0] else None
        expected = dense_saisa(model.state_dict(), model.config, row.input_ids[0], features).logits
        close(computed[b][prompts.attention_mask[b].bool()].double(), expected)


@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("implementation", OTHERS)
def test_switching_on_a_living_model_changes_no_greedy_text(implementation, text):
    model, prompts = tiny_model(text, attn_implementation="sdpa"), random_prompts(3)
    expected = model.generate(**prompts.prompt, max_new_tokens=8, do_sample=False)
    model.set_attn_implementation(implementation)
    assert model.model.language_model.config._attn_implementation == implementation
    assert torch.equal(model.generate(**prompts.prompt, max_new_tokens=8, do_sample=False), expected)


def test_each_part_can_have_an_implementation_of_its_own(flash_calls):
    model, prompts = tiny_model("llama"), random_prompts(4)
    expected = logits(model, prompts)
    model.set_attn_implementation({"text_config": "flash_attention_2", "vision_config": "eager"})
    close(logits(model, prompts)[prompts.text], expected[prompts.text])
    assert flash_calls and all(call.query[-2:] == (4, 8) for call in flash_calls)  # the decoder's heads, no encoder's
    flash_calls.clear()
    model.set_attn_implementation("flash_attention_2")
    logits(model, prompts)
    assert any(call.query[-2:] == (2, 12) for call in flash_calls)  # and now the encoder's


@pytest.mark.parametrize("text", ["llama", "qwen2_window"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("attention", [None, "full", "none"], ids=lambda x: f"visual attention {x}")
@pytest.mark.parametrize("pictures", [True, False], ids=["pictures", "text alone"])
def test_packed_samples_do_not_see_each_other(implementation, text, attention, pictures):
    family = {} if attention is None else {"alignment": "embedding_space", "visual_attention": attention}
    model = tiny_model(text, attn_implementation=implementation, **family)
    rows = [[BOS, 3, "image", 4, 5, "image", 6], [BOS, 7], [BOS, "image", "image", 7, 8, 9]]
    prompts = prompts_from_rows(rows if pictures else [[x for x in row if x != "image"] for row in rows])
    rows = [prompts.row(b) for b in range(3)]
    packed = {
        "input_ids": torch.cat([row.input_ids for row in rows], 1),
        "position_ids": torch.cat([row.position_ids for row in rows], 1),
        "pixel_values": prompts.pixel_values,
    }
    with torch.no_grad():
        together = model(**packed, use_cache=False).logits
    close(together, torch.cat([logits(model, row, position_ids=None) for row in rows], 1))


@pytest.mark.parametrize("text", ["llama", "qwen2_window"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_layers_without_pictures_hide_them(implementation, text):
    model, prompts = tiny_model(text, attn_implementation=implementation, visual_layers=[1]), random_prompts(5, tail=3)
    computed = logits(model, prompts)
    row = prompts.row(2)
    features = vision_features(model, row.pixel_values).flatten(0, 1)
    expected = dense_saisa(model.state_dict(), model.config, row.input_ids[0], features).logits
    close(computed[2][prompts.attention_mask[2].bool()].double(), expected)
    length = prompts.input_ids.shape[1]
    with torch.no_grad():
        cache, pieces = DynamicCache(config=model.config.text_config), []
        for start, end in [(0, length - 3), (length - 3, length - 1), (length - 1, length)]:
            pieces.append(
                model(
                    input_ids=prompts.input_ids[:, start:end],
                    attention_mask=prompts.attention_mask[:, :end],
                    position_ids=prompts.position_ids[:, start:end],
                    pixel_values=prompts.pixel_values if start == 0 else None,
                    past_key_values=cache,
                ).logits
            )
    close(torch.cat(pieces, 1)[prompts.text], computed[prompts.text])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_static_cache_needs_no_padding_mask(implementation):
    """Places that nothing was written to are keys like others to a kernel that knows of no mask."""
    model = tiny_model("llama", attn_implementation=implementation)
    prompts = prompts_from_rows([[BOS, 5, "image", 6, 7, 8, 9], [BOS, 8, "image", 9, 10, 11, 12]])
    expected, length = logits(model, prompts), prompts.input_ids.shape[1]
    for cuts in ((2, 8), (6, 9), (7, 9)):
        cache, pieces, start = StaticCache(config=model.config.text_config, max_cache_len=20), [], 0
        for end in (*cuts, length):
            ids = prompts.input_ids[:, start:end]
            pixels = prompts.pixel_values if (ids == model.config.image_token_id).any() else None
            inputs = {"input_ids": ids, "pixel_values": pixels, "past_key_values": cache}
            with torch.no_grad():
                pieces.append(model(**inputs, cache_position=torch.arange(start, end)).logits)
            start = end
        close(torch.cat(pieces, 1), expected)


@pytest.mark.parametrize("rows", ["one picture", "unlike rows"])
def test_gradients_of_flash_attention_are_those_of_eager_attention(rows):
    prompts, gradients = prompts_from_rows(PROMPTS[rows], side="right"), []
    labels = prompts.input_ids.masked_fill(~prompts.text, -100)
    for implementation in ("eager", "flash_attention_2"):
        model = tiny_model("qwen3", attn_implementation=implementation).train()
        model(**prompts.inputs, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)


# --- the form of each -------------------------------------------------------------------------------------------------


def test_flash_attention_gets_each_run_of_text_over_the_keys_up_to_its_end(flash_calls):
    model = tiny_model("llama", attn_implementation="sdpa")
    model.set_attn_implementation({"text_config": "flash_attention_2"})
    logits(model, prompts_from_rows([[BOS, 5, "image", 6, 7, 8, "image", "image", 9]]), attention_mask=None)
    assert [(call.function, call.query[1], call.key[1]) for call in flash_calls] == LAYERS * [
        ("flash_attn_func", 2, 2),
        ("flash_attn_func", 3, 9),
        ("flash_attn_func", 1, 18),
    ]
    assert all(call.arguments["causal"] for call in flash_calls)


def test_flash_attention_gets_unlike_rows_packed_run_by_run(flash_calls):
    model = tiny_model("llama", attn_implementation="sdpa")
    model.set_attn_implementation({"text_config": "flash_attention_2"})
    prompts = prompts_from_rows([[BOS, 5, "image", 6, 7, 8], [BOS, 9], ["image", 10, 11]])
    logits(model, prompts)
    assert [(call.function, call.query[0], call.key[0]) for call in flash_calls] == LAYERS * [
        ("flash_attn_varlen_func", 2 + 2 + 2, 2 + 2 + 6),
        ("flash_attn_varlen_func", 3, 9),
    ]
    # every text token of the batch is a query once, and nothing else is
    assert sum(call.query[0] for call in flash_calls) == LAYERS * int(prompts.text.sum())
    assert flash_calls[0].arguments["cu_seqlens_q"] == [0, 2, 4, 6]
    assert flash_calls[0].arguments["cu_seqlens_k"] == [0, 2, 4, 10]


@pytest.mark.parametrize("rows", ["one picture", "the same layout twice"])
@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_sdpa_makes_no_mask_where_it_would_be_large(text, rows, monkeypatch):
    model, prompts = tiny_model(text, attn_implementation="sdpa"), prompts_from_rows(PROMPTS[rows])
    expected, biases = logits(model, prompts), []

    def lower_right(*size):
        biases.append(size)
        return causal_lower_right(*size)

    monkeypatch.setattr(attention_saisa, "LARGE_MASK", 0)
    monkeypatch.setattr(attention_saisa.Visibility, "mask", None)
    monkeypatch.setattr(attention_saisa, "causal_lower_right", lower_right)
    close(logits(model, prompts), expected)
    runs = {"one picture": [(3, 3), (2, 9)], "the same layout twice": [(2, 7)]}  # a query alone needs no bias
    assert biases == LAYERS * runs[rows]


@pytest.mark.parametrize("rows, text", [("unlike rows", "llama"), ("one picture", "mistral_window")])
def test_sdpa_keeps_its_mask_where_runs_are_not_plain(rows, text, monkeypatch):
    """Rows that differ, and windows, which sdpa has no argument for."""
    model, prompts = tiny_model(text, attn_implementation="sdpa"), prompts_from_rows(PROMPTS[rows])
    expected = logits(model, prompts)
    monkeypatch.setattr(attention_saisa, "LARGE_MASK", 0)
    monkeypatch.delattr(attention_saisa.Runs, "__init__")
    assert torch.equal(logits(model, prompts), expected)


@pytest.mark.parametrize("window", [None, 3, 6])
@pytest.mark.parametrize("length, offset", [(20, 0), (26, 0), (11, 9)])
def test_a_block_mask_is_the_mask_tensor(window, length, offset):
    prompts = random_prompts(6)
    new = prompts.input_ids.shape[1]
    if offset + length < new:
        length = new - offset
    slots = torch.arange(new) + max(0, offset + length - new)
    padding = torch.cat([torch.ones(len(prompts.images), int(slots[0])), prompts.attention_mask], 1).long()
    visibility = attention_saisa.Visibility(
        attention_saisa.TokenLayout(prompts.visual), slots, (length, offset), window, padding
    )
    block_mask, mask = visibility.block_mask(), visibility.mask()
    b, t, k = torch.meshgrid(*map(torch.arange, (mask.shape[0], *mask.shape[2:])), indexing="ij")
    assert torch.equal(block_mask.mask_mod(b, 0, t, k), mask[:, 0])


@pytest.mark.skipif(shutil.which("g++") is None, reason="PyTorch compiles for a CPU with a C++ compiler")
def test_a_block_mask_compiles(monkeypatch):
    model, prompts = tiny_model("llama", attn_implementation="sdpa"), random_prompts(1)
    expected, compiled = logits(model, prompts), torch.compile(flex_attention, fullgraph=True)

    def attend(query, key, value, training=False, **options):
        return compiled(query, key, value, **options)

    monkeypatch.setattr(flex_integration, "compile_friendly_flex_attention", attend)
    model.set_attn_implementation({"text_config": "flex_attention"})
    close(logits(model, prompts)[prompts.text], expected[prompts.text])


# --- half precision ---------------------------------------------------------------------------------------------------


def spread(model, batches, implementation):
    """How far `implementation` is from eager attention: root mean square of the difference, over that of the logits."""
    results = {}
    for name in ("eager", implementation):
        model.set_attn_implementation({"text_config": name})
        results[name] = torch.cat([logits(model, prompts)[prompts.text].float() for prompts in batches])
    difference, size = results["eager"] - results[implementation], results["eager"]
    return (difference.square().mean() / size.square().mean()).sqrt().item()


@pytest.mark.parametrize("implementation", [name for name in IMPLEMENTATIONS if name != "eager"])
def test_bfloat16_differs_between_implementations_no_more_than_llavas(implementation):
    """transformers' LLaVA over the same language model and encoder, with the same prompts."""
    config = tiny_config("qwen3")
    llava_config = LlavaConfig(
        vision_config=config.vision_config,
        text_config=TEXT_CONFIGS["qwen3"](),
        image_token_id=config.image_token_id,
        image_seq_length=config.image_seq_length,
    )
    llava = randomize(LlavaForConditionalGeneration(llava_config)).to(torch.bfloat16).eval()
    ours = tiny_model("qwen3", dtype=torch.bfloat16)
    batches = [random_prompts(seed).to(torch.bfloat16) for seed in range(8)]
    # two samples of the same rounding errors: about 1% of the logits
    assert 0 < spread(ours, batches, implementation) <= 1.05 * spread(llava, batches, implementation)
