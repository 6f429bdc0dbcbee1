# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Layers that do not see the image hold text alone in caches that the model makes. In a `DynamicCache` that the user brings
along they find visual tokens marked as hidden: that other path is what everything here is compared with."""

import copy

import pytest
import torch
from flash_standin import flash_attention
from test_chat import picture, tiny_processor
from tiny_models import BOS, IMAGE_TOKEN, PAD, prompts_from_rows, tiny_model
from transformers import DynamicCache

from saisa_hf.attention_saisa import TextLayer, hold_text_alone
from saisa_hf.chat.conversation import Conversation
from saisa_hf.compat_saisa import CACHE, CROP_REMOVES


UNLIKE = [[BOS, 5, 6, 7], [BOS, 8, "image", 9, 10, 11], [BOS, "image", 12, "image", 14], ["image", 13, 9, 9, 8, 7, 6]]
ALIKE = [[BOS, 5, "image", 6, 7, "image", 8], [BOS, 9, "image", 10, 11, "image", 12]]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def model_of(layers=(1,), text="qwen3", attention="sdpa", **options):
    return tiny_model(text, attn_implementation=attention, visual_layers=list(layers), **options)


def generated(model, prompts, cache=None, **options):
    """What greedy decoding, or the way that `options` ask for, writes, with its scores."""
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": PAD, **options}
    given = {} if cache is None else {CACHE: cache}
    torch.manual_seed(0)
    return model.generate(**prompts, **given, **options, return_dict_in_generate=True, output_scores=True)


def assert_same(found, expected):
    assert torch.equal(found.sequences, expected.sequences)
    for x, y in zip(found.scores, expected.scores):
        torch.testing.assert_close(x, y, **TOLERANCE)


def kinds_of(cache):
    return [type(layer) is TextLayer for layer in cache.layers]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", [UNLIKE, ALIKE], ids=["unlike", "alike"])
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flash_attention_2"])
def test_generation_is_that_with_a_marked_cache(attention, rows, side):
    with flash_attention():
        model = model_of(attention=attention)
        prompts = prompts_from_rows(rows, side).prompt
        found, marked = generated(model, prompts), generated(model, prompts, DynamicCache())
    assert_same(found, marked)
    assert kinds_of(getattr(found, CACHE)) == [True, False, True] and not any(kinds_of(getattr(marked, CACHE)))


def test_flex_attention_is_left_to_layers_that_see_the_image():
    prompts = prompts_from_rows(UNLIKE[:2]).prompt
    with torch.compiler.set_stance("force_eager"), torch.no_grad():
        model = model_of(attention="flex_attention")
        found, expected = (model(**prompts, **given).logits for given in ({}, {CACHE: DynamicCache()}))
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("options", [
    {"num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "num_return_sequences": 3},
    {"repetition_penalty": 1.3, "output_hidden_states": True},
    {"use_cache": True, "max_new_tokens": 1},
], ids=str)  # fmt: skip
def test_other_ways_of_generating(options):
    model, prompts = model_of(), prompts_from_rows(UNLIKE).prompt
    assert_same(generated(model, prompts, **options), generated(model, prompts, DynamicCache(), **options))


def test_assisted_decoding_and_prompt_lookup_crop_the_cache():
    model, draft = model_of(), model_of((0, 2), seed=1)
    prompts = prompts_from_rows([[BOS, 5, "image", 6, 7, 6, 7, 6, 7]]).prompt
    plain = generated(model, prompts, DynamicCache(), max_new_tokens=12)
    for options in ({"assistant_model": draft}, {"prompt_lookup_num_tokens": 3, "eos_token_id": PAD}):
        found = generated(model, prompts, max_new_tokens=12, **options)
        assert torch.equal(found.sequences, plain.sequences)
        assert kinds_of(getattr(found, CACHE)) == [True, False, True]


def test_visual_states_and_several_questions_about_one_image():
    model, prompts = model_of(), prompts_from_rows(UNLIKE)
    states = model.get_visual_states(prompts.pixel_values)
    text = {name: x for name, x in prompts.prompt.items() if name != "pixel_values"}
    assert_same(generated(model, {**text, "visual_states": states}), generated(model, prompts.prompt, DynamicCache()))


@pytest.mark.parametrize("layers", [(0,), (1,), (0, 2)], ids=str)
def test_such_a_layer_holds_as_many_tokens_as_the_longest_text(layers):
    model, prompts = model_of(layers), prompts_from_rows(UNLIKE)
    cache = model(**prompts.prompt, use_cache=True)[CACHE]
    tokens, text = prompts.input_ids.shape[1], max(sum(x != "image" for x in row) for row in UNLIKE)
    assert [layer.keys.shape[2] for layer in cache.layers] == [tokens if i in layers else text for i in range(3)]
    assert [cache.get_seq_length(i) for i in range(3)] == [tokens] * 3
    seen = {"attention_mask": torch.cat([prompts.attention_mask, torch.ones(4, 1, dtype=torch.long)], 1)}
    model(torch.full((4, 1), 9), **seen, **{CACHE: cache})
    assert [layer.keys.shape[2] for layer in cache.layers] == [
        tokens + 1 if i in layers else text + 1 for i in range(3)
    ]


@pytest.mark.parametrize("text", ["mistral_window", "qwen2_window", "gemma3"])
def test_windows_are_counted_in_places_of_the_input(text):
    model, prompts = model_of(text=text), prompts_from_rows(UNLIKE).prompt
    found = generated(model, prompts, max_new_tokens=9)
    assert_same(found, generated(model, prompts, DynamicCache(config=model.config.text_config), max_new_tokens=9))
    windows = [layer.self_attn.window for layer in model.language_model.layers]
    kinds, own = [i != 1 and windows[i] is None for i in range(3)], DynamicCache()  # as a conversation has it
    assert kinds_of(getattr(found, CACHE)) == kinds
    assert kinds_of(hold_text_alone(own, model.language_model.layers)) == kinds
    assert_same(generated(model, prompts, own, max_new_tokens=9), found)
    with torch.no_grad():  # and where there is no cache at all, as in training
        one, other = (model(**prompts, use_cache=use).logits for use in (False, True))
    torch.testing.assert_close(one, other, **TOLERANCE)


def test_static_and_offloaded_caches_keep_marked_keys():
    model, prompts = model_of(), prompts_from_rows(UNLIKE).prompt
    found = generated(model, prompts, cache_implementation="static", disable_compile=True)
    assert not any(kinds_of(getattr(found, CACHE)))
    assert_same(found, generated(model, prompts))
    offloaded = DynamicCache()
    offloaded.offloading = True  # as transformers makes it on an accelerator
    assert not any(kinds_of(hold_text_alone(offloaded, model.language_model.layers)))


# --- conversations ----------------------------------------------------------------------------------------------------


def passes(turns, side):
    """Arguments of forward passes over batches of rows, one behind the other, padded each for itself."""
    masks, found = [], []
    for rows in turns:
        prompts = prompts_from_rows(rows, side)
        masks.append(prompts.attention_mask)
        mask = torch.cat(masks, 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -prompts.input_ids.shape[1] :]
        found.append({**prompts.prompt, "attention_mask": mask, "position_ids": positions})
    return found


TURNS = {
    "images first": [
        [[BOS, 5, 6, "image"], [BOS, "image", "image", 12], [BOS, 20, 21, 22]],
        [[7, 8, 9], [13, 14, 15], [23, "image", 24]],
        [["image"], [16], [25]],
        [[10, 11], [17, "image"], [26, 27]],
    ],
    "text first, of unlike length": [
        [[BOS, 5, 6], [BOS, 7], [BOS, 8, 9, 10]],
        [[5, "image", 6], ["image", 7, 8, 9], [5, 6]],
        [[11, 12, 13], [14], [15, 16]],
        [[17], [18], [19]],
    ],
}


@pytest.mark.parametrize("turns", TURNS)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_later_turns_with_and_without_images(attention, side, turns):
    model, own, marked = model_of((1,), attention=attention), None, DynamicCache()
    for piece in passes(TURNS[turns], side):
        with torch.no_grad():
            found = model(**piece, use_cache=True, **({} if own is None else {CACHE: own}))
            expected = model(**piece, use_cache=True, **{CACHE: marked})
        own, length = found[CACHE], piece["input_ids"].shape[1]
        real = piece["attention_mask"][:, -length:].bool() & (piece["input_ids"] != IMAGE_TOKEN)
        torch.testing.assert_close(found.logits[real], expected.logits[real], **TOLERANCE)
    assert kinds_of(own) == [True, False, True]


def test_a_conversation_is_that_with_a_marked_cache(monkeypatch):
    model, said = model_of(text="llama"), []
    for hold in (hold_text_alone, lambda cache, layers: cache):
        monkeypatch.setattr("saisa_hf.head_saisa.hold_text_alone", hold)
        chat = Conversation(model, tiny_processor(), max_new_tokens=4, do_sample=False)
        for number, text in enumerate(["abc", "de", "fgh"]):
            "".join(chat.ask(text, [picture(number)] * (number != 1)))
        said.append([message["content"] for message in chat.messages if message["role"] == "assistant"])
        assert kinds_of(chat._cache) == [hold is hold_text_alone, False, hold is hold_text_alone]
    assert said[0] == said[1] and len(said[0]) == 3


@pytest.mark.parametrize("kept", [1, 3, 6, 9, 12, -1, -4], ids=str)
def test_a_cache_is_cropped_to_places_of_the_input(kept):
    model, prompts = model_of(), prompts_from_rows(UNLIKE)
    with torch.no_grad():
        own, marked = (
            model(**prompts.prompt, use_cache=True, **given)[CACHE] for given in ({}, {CACHE: DynamicCache()})
        )
        length = own.get_seq_length()
        kept = min(kept if kept > 0 else length + kept, length)
        for cache in (own, marked):
            cache.crop(kept - length if CROP_REMOVES else kept)
        assert [own.get_seq_length(i) for i in range(3)] == [kept] * 3
        mask = torch.cat([prompts.attention_mask[:, :kept], torch.ones(4, 3, dtype=torch.long)], 1)
        more = {"input_ids": torch.tensor([[5, 6, 7]] * 4), "attention_mask": mask, "use_cache": True}
        found, expected = (model(**more, **{CACHE: cache}).logits for cache in (own, marked))
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_cropping_everything_and_resetting_leave_an_empty_cache():
    model, prompts = model_of(), prompts_from_rows(ALIKE)
    with torch.no_grad():
        expected = model(**prompts.prompt, use_cache=True)
        for emptied in (lambda cache: cache.crop(-cache.get_seq_length()), lambda cache: cache.layers[0].reset()):
            cache = copy.deepcopy(expected[CACHE])
            emptied(cache)
            assert cache.get_seq_length() == 0 and (cache.layers[0].keys is None or not cache.layers[0].keys.numel())
            if cache.get_seq_length(1) == 0:
                again = model(**prompts.prompt, use_cache=True, **{CACHE: cache})
                torch.testing.assert_close(again.logits, expected.logits, **TOLERANCE)


@pytest.mark.parametrize("change", [
    lambda cache: cache.reorder_cache(torch.tensor([3, 3, 0, 1])),
    lambda cache: cache.batch_repeat_interleave(2),
    lambda cache: cache.batch_select_indices(torch.tensor([2, 1])),
], ids=["reorder", "repeat", "select"])  # fmt: skip
def test_rows_are_chosen_as_in_any_cache(change):
    model, prompts = model_of(), prompts_from_rows(UNLIKE)
    with torch.no_grad():
        caches = [model(**prompts.prompt, use_cache=True, **given)[CACHE] for given in ({}, {CACHE: DynamicCache()})]
        masks = DynamicCache()  # carries the attention mask through the same change
        masks.update(
            prompts.attention_mask[:, None, :, None].float(), prompts.attention_mask[:, None, :, None].float(), 0
        )
        for cache in (*caches, masks):
            change(cache)
        mask = masks.layers[0].keys[:, 0, :, 0].long()
        mask = torch.cat([mask, torch.ones(len(mask), 2, dtype=torch.long)], 1)
        more = {"input_ids": torch.tensor([[5, 6]] * len(mask)), "attention_mask": mask}
        found, expected = (model(**more, **{CACHE: cache}).logits for cache in caches)
    torch.testing.assert_close(found, expected, **TOLERANCE)


# --- passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [UNLIKE, ALIKE], ids=["unlike", "alike"])
def test_probabilities_and_hidden_states_are_in_input_order(rows):
    model, prompts = model_of(attention="eager"), prompts_from_rows(rows)
    asked = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        found, expected = (model(**prompts.prompt, **asked, **given) for given in ({}, {CACHE: DynamicCache()}))
    real = prompts.attention_mask.bool() & (prompts.input_ids != IMAGE_TOKEN)
    for x, y in zip(found.attentions, expected.attentions):
        torch.testing.assert_close(x.transpose(1, 2)[real], y.transpose(1, 2)[real], **TOLERANCE)
    for x, y in zip(found.hidden_states, expected.hidden_states):
        torch.testing.assert_close(x[real], y[real], **TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_prepared_mask_is_read_at_the_places_of_the_text(attention):
    model, prompts = model_of(attention=attention), prompts_from_rows(UNLIKE)
    length = prompts.input_ids.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool).tril() & prompts.attention_mask[:, None].bool()
    visible = (visible | torch.eye(length, dtype=torch.bool))[:, None]
    floats = torch.zeros_like(visible, dtype=torch.float32).masked_fill(~visible, torch.finfo(torch.float32).min)
    inputs = {**prompts.prompt, "position_ids": prompts.position_ids}
    with torch.no_grad():
        expected = model(**inputs).logits
        found = model(**{**inputs, "attention_mask": floats if attention == "eager" else visible}).logits
    real = prompts.attention_mask.bool() & (prompts.input_ids != IMAGE_TOKEN)
    torch.testing.assert_close(found[real], expected[real], **TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_samples_do_not_see_each_other(attention):
    model, rows = model_of(attention=attention), [UNLIKE[1], UNLIKE[0], UNLIKE[2]]
    whole = prompts_from_rows([[x for row in rows for x in row]])
    lengths = [prompts_from_rows([row]).input_ids.shape[1] for row in rows]
    positions = torch.tensor([[place for length in lengths for place in range(length)]])
    with torch.no_grad():
        packed = model(whole.input_ids, whole.pixel_values, position_ids=positions, use_cache=False).logits[0]
        images = iter(whole.pixel_values.split([row.count("image") for row in rows]))
        for row, own in zip(rows, packed.split(lengths)):
            ids, pixels = prompts_from_rows([row]).input_ids, next(images)
            alone = model(ids, pixels if len(pixels) else None, use_cache=False).logits[0]
            torch.testing.assert_close(own, alone, **TOLERANCE)


def test_gradients_are_those_of_a_marked_cache():
    model, prompts = model_of(), prompts_from_rows(UNLIKE)
    labels = prompts.input_ids.masked_fill((prompts.attention_mask == 0) | (prompts.input_ids == IMAGE_TOKEN), -100)
    found = {}
    for given in ({}, {CACHE: DynamicCache()}):
        model.zero_grad()
        model(**prompts.prompt, labels=labels, **given).loss.backward()
        for name, x in model.named_parameters():
            if x.grad is not None:
                found.setdefault(name, []).append(x.grad.clone())
    assert any("layers.1.visual_projector" in name for name in found)
    for pair in found.values():
        torch.testing.assert_close(*pair, **TOLERANCE)


def test_a_compiled_model_computes_the_same():
    model, prompts = model_of(), prompts_from_rows(ALIKE)
    compiled = torch.compile(model, backend="eager", dynamic=True)
    with torch.no_grad():
        found, expected = (made(**prompts.prompt, use_cache=True) for made in (compiled, model))
        torch.testing.assert_close(found.logits, expected.logits, **TOLERANCE)
        more = torch.tensor([[5], [6]])
        found, expected = (made(more, **{CACHE: x[CACHE]}) for made, x in ((compiled, found), (model, expected)))
    torch.testing.assert_close(found.logits, expected.logits, **TOLERANCE)
