# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""A kept beginning: questions that continue it get the answers of whole prompts, in any batch, order and thread, and it is
never copied nor changed. It belongs to the weights that read it, and every prompt is checked to begin with it."""

import copy
import threading
from functools import partial

import pytest
import safetensors.torch
import torch
from flash_standin import flash_attention
from test_chat import COUNT, THREE, demo, picture, tiny_processor
from test_text_only_layers import TOLERANCE, assert_same
from test_text_only_layers import generated as generated_of
from tiny_models import BOS, IMAGE_TOKEN, PAD, prompts_from_rows, tiny_model
from transformers import DynamicCache, StoppingCriteria

from saisa_hf import SaisaBeginning, attention_saisa
from saisa_hf.answering import Answerer, Question
from saisa_hf.chat import Conversation
from saisa_hf.compat_saisa import CACHE


BEGINNING = [BOS, 5, "image", 6, "image", 7]
QUESTIONS = [[8, 9, 10], [11], [12, 13, 14, 15, 16]]
ALIKE = [[8, 9, 10], [11, 4, 4], [12, 13, 14]]
generated = partial(generated_of, max_new_tokens=5)
EMBEDDING_SPACE = {"alignment": "embedding_space"}
MODELS = {
    "llama": ("llama", {}),
    "shared": ("llama_biases", {"projector_sharing": "shared"}),
    "partial": ("qwen3", {"visual_layers": [0, 2]}),
    "vica": ("llama_biases", {"visual_layers": [1], "leading_text_skips_attention": True}),
    "llava": ("llama", EMBEDDING_SPACE),
    "naavit": ("qwen3", {**EMBEDDING_SPACE, "visual_attention": "none"}),
    "shortv": (
        "llama",
        {**EMBEDDING_SPACE, "visual_attention": ["none", "full", "none"], "visual_feed_forward": [True, True, False]},
    ),
}


def prompts_of(questions=QUESTIONS, side="left", beginning=BEGINNING):
    """Whole prompts, all about the same images."""
    prompts = prompts_from_rows([beginning + question for question in questions], side)
    if prompts.pixel_values is not None:
        images = prompts.images[0]
        prompts.pixel_values = prompts.pixel_values[:images].repeat(len(questions), 1, 1, 1)
    return prompts


def kept(model, beginning=BEGINNING, questions=QUESTIONS):
    one, whole = prompts_from_rows([beginning]), prompts_of(questions, beginning=beginning)
    pixels = None if whole.pixel_values is None else whole.pixel_values[: beginning.count("image")]
    return model.keep(one.input_ids, pixel_values=pixels)


@pytest.fixture
def apart(monkeypatch):
    """How often attention took the two parts apart."""
    calls, attend = [], attention_saisa.Apart.attend
    monkeypatch.setattr(attention_saisa.Apart, "attend", lambda *args: [calls.append(1), attend(*args)][1])
    return calls


# --- the answers of whole prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_whole_prompts(name, attention, apart):
    text, options = MODELS[name]
    model = tiny_model(text, attn_implementation=attention, **options)
    beginning, expected = kept(model), generated(model, prompts_of().prompt)
    assert len(beginning) == 12 and beginning.nbytes > 0
    assert_same(generated(model, prompts_of().prompt, beginning), expected)
    right, length = prompts_of(side="right"), prompts_of().input_ids.shape[1]
    found = generated(model, right.prompt, beginning)
    assert torch.equal(found.sequences[:, length:], expected.sequences[:, length:])
    assert torch.equal(found.sequences[:, :length], right.input_ids)
    assert (len(apart) == 2 * 5 * 3) == (attention == "sdpa") and (not apart) == (attention == "eager")
    text_alone = {name: x for name, x in prompts_of().prompt.items() if name != "pixel_values"}
    assert_same(generated(model, text_alone, beginning), expected)  # the images need not be given again
    one = prompts_of(QUESTIONS[:1])
    assert_same(generated(model, {"input_ids": one.input_ids}, beginning), generated(model, one.prompt))


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 0},
        {"num_beams": 3},
        {"do_sample": True, "num_return_sequences": 2, "top_k": 0},
        {"num_beams": 2, "num_return_sequences": 2, "length_penalty": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["shared", "partial"])
def test_sampling_and_beams(name, options):
    text, settings = MODELS[name]
    model, prompts = tiny_model(text, **settings), prompts_of().prompt
    found, expected = generated(model, prompts, kept(model), **options), generated(model, prompts, **options)
    assert torch.equal(found.sequences, expected.sequences)


def test_assisted_decoding_is_refused():
    model, prompts = tiny_model("llama"), prompts_of(QUESTIONS[:1]).prompt
    config = copy.deepcopy(model.generation_config)
    config.prompt_lookup_num_tokens = 3
    for options in ({"assistant_model": model}, {"prompt_lookup_num_tokens": 3}, {"generation_config": config}):
        with pytest.raises(ValueError, match="asks for assisted decoding, which reads whole prompts: leave out"):
            generated(model, prompts, kept(model), **options)


@pytest.mark.parametrize("text", ["mistral_window", "qwen2_window", "gemma2", "gemma3"])
def test_windows_are_right_where_prompts_are_of_one_length_and_refused_elsewhere(text):
    model = tiny_model(text)
    beginning, prompts = kept(model), prompts_of(ALIKE).prompt
    found, expected = generated(model, prompts, beginning), generated(model, prompts)
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(found.scores), torch.stack(expected.scores), rtol=1e-5, atol=3e-5)
    with pytest.raises(ValueError, match=r"unlike lengths .* sliding window of 6: .* one at a time"):
        generated(model, prompts_of().prompt, beginning)


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_other_implementations_of_attention(attention):
    with flash_attention(), torch.compiler.set_stance("force_eager"):
        model, prompts = tiny_model("qwen3", attn_implementation=attention), prompts_of(ALIKE[:2]).prompt
        found, expected = (generated(model, prompts, cache, max_new_tokens=2) for cache in (kept(model), None))
    assert_same(found, expected)


@pytest.mark.parametrize("name", ["llama", "partial", "llava"])
def test_a_beginning_of_text_alone_and_images_behind_it(name):
    text, settings = MODELS[name]
    model, start = tiny_model(text, **settings), [BOS, 4, 5, 6]
    beginning = kept(model, start)
    texts = prompts_of(beginning=start).prompt
    assert_same(generated(model, texts, beginning), generated(model, texts))
    images = prompts_from_rows([[*start, "image", 8, 9], [*start, 7, "image", 3, "image", 2], [*start, 1]]).prompt
    assert_same(generated(model, images, beginning), generated(model, images))


def test_images_in_front_and_behind():
    model, prompts = tiny_model("qwen3"), prompts_of([[8, "image", 9], [11, 12]])
    prompts.pixel_values = prompts.pixel_values[:5]  # two, one behind; the same two
    prompts.pixel_values[3:5] = prompts.pixel_values[:2]
    beginning, expected = (
        model.keep(prompts_from_rows([BEGINNING]).input_ids, pixel_values=prompts.pixel_values[:2]),
        None,
    )
    expected = generated(model, prompts.prompt)
    assert_same(generated(model, prompts.prompt, beginning), expected)
    own = {**prompts.prompt, "pixel_values": prompts.pixel_values[2:3]}  # those behind alone
    assert_same(generated(model, own, beginning), expected)


@pytest.mark.parametrize("name", ["llama", "partial"])
@pytest.mark.parametrize("store", ["keys_values", "features"])
def test_visual_states_instead_of_pixels(name, store):
    text, settings = MODELS[name]
    model, prompts = tiny_model(text, **settings), prompts_of()
    states = model.get_visual_states(prompts.pixel_values[:2], store)
    beginning = model.keep(prompts_from_rows([BEGINNING]).input_ids, visual_states=states)
    given = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
    expected = generated(model, prompts.prompt)
    assert_same(generated(model, {**given, "visual_states": states.expand(3)}, beginning), expected)
    again = model.get_visual_states(prompts.pixel_values, store)  # equal but for rounding, computed in another batch
    assert_same(generated(model, {**given, "visual_states": again}, beginning), expected)
    assert_same(generated(model, prompts.prompt, beginning), expected)  # cannot be compared, and are the same


@pytest.mark.parametrize("name", MODELS)
def test_logits_of_what_stands_behind(name):
    text, settings = MODELS[name]
    model, prompts = tiny_model(text, **settings), prompts_of()
    beginning = kept(model)
    with torch.no_grad():
        expected = model(**prompts.inputs).logits
        ids, mask = beginning.arranged(prompts.input_ids, prompts.attention_mask)
        positions = (mask.cumsum(-1) - 1)[:, len(beginning) :]
        for cache in ("past_key_values", "cache"):
            arguments = {"attention_mask": mask, "position_ids": positions, cache: beginning}
            outputs = model(ids[:, len(beginning) :], **arguments)
            for row, question in enumerate(QUESTIONS):
                found = outputs.logits[row, -len(question) :]
                torch.testing.assert_close(found, expected[row, -len(question) :], **TOLERANCE)
        assert outputs.cache is outputs.past_key_values and outputs.cache.get_seq_length() == ids.shape[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype, apart):
    model = tiny_model("llama_biases", dtype=dtype)
    prompts = prompts_of().to(dtype)
    one = prompts_from_rows([BEGINNING]).input_ids
    beginning = model.keep(one, pixel_values=prompts.pixel_values[:2])
    found, expected = generated(model, prompts.prompt, beginning), generated(model, prompts.prompt)
    tolerance = {"rtol": 0.05, "atol": 0.15} if dtype == torch.bfloat16 else {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(found.scores[0], expected.scores[0], **tolerance)
    assert apart


# --- never copied, never changed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shared", "partial", "llava"])
def test_sixteen_questions_hold_it_once(name):
    text, settings = MODELS[name]
    model, questions = tiny_model(text, **settings), [[8, 9, 3 + index] for index in range(16)]
    beginning = kept(model)
    before = [x.clone() for pair in beginning.keys_values for x in pair]
    found = generated(model, prompts_of(questions).prompt, beginning)
    for layer, (keys, values) in zip(getattr(found, CACHE).layers, beginning.keys_values):
        assert (layer.shared[0].data_ptr(), layer.shared[1].data_ptr()) == (keys.data_ptr(), values.data_ptr())
        assert layer.keys.shape[::2] == (16, 3 + 4)  # the last token has not been through the model
    assert all(map(torch.equal, before, (x for pair in beginning.keys_values for x in pair)))
    assert copy.deepcopy(beginning) is beginning


class Stops(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        raise KeyboardInterrupt


def test_an_interrupted_answer_leaves_it_as_it_was():
    model, prompts = tiny_model("llama"), prompts_of().prompt
    beginning, expected = kept(model), generated(model, prompts)
    with pytest.raises(KeyboardInterrupt):
        generated(model, prompts, beginning, stopping_criteria=[Stops()])
    assert_same(generated(model, prompts, beginning), expected)


def test_threads_continue_it_at_the_same_time():
    model = tiny_model("qwen3", visual_layers=[0, 2])
    beginning, found = kept(model), {}
    prompts = [prompts_of([question, [3, index]]).prompt for index, question in enumerate(QUESTIONS)]
    expected = [model.generate(**one, max_new_tokens=12, do_sample=False) for one in prompts]

    def ask(index):
        found[index] = model.generate(**prompts[index], max_new_tokens=12, do_sample=False, **{CACHE: beginning})

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[index], expected[index]) for index in range(3))


@pytest.mark.parametrize("name", ["llama", "partial", "llava"])
@pytest.mark.parametrize("left", [14, 12, 9, 4])
def test_a_cache_behind_it_can_be_cropped_anywhere(name, left):
    text, settings = MODELS[name]
    model, whole = tiny_model(text, **settings), prompts_of(QUESTIONS[:1])
    with torch.no_grad():
        cache = model(whole.input_ids[:, 12:], **{CACHE: kept(model)})[CACHE]
        plain = model(**whole.prompt, **{CACHE: model.new_cache()})[CACHE]
        for one in (cache, plain):
            one.crop(left - 15)
            assert [one.get_seq_length(index) for index in range(3)] == [left] * 3
        more = torch.tensor([[20, 21]])
        found, expected = (model(more, **{CACHE: one}).logits for one in (cache, plain))
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_a_cache_behind_it_can_be_reset():
    model, ids = tiny_model("qwen3", visual_layers=[0, 2]), torch.tensor([[BOS, 8, 9]])
    cache = model(torch.tensor([[8, 9]]), **{CACHE: kept(model)})[CACHE]
    cache.reset()
    torch.testing.assert_close(model(ids, **{CACHE: cache}).logits, model(ids).logits, **TOLERANCE)


# --- checked ----------------------------------------------------------------------------------------------------------


def test_prompts_have_to_begin_with_it():
    model = tiny_model("llama")
    beginning, prompts = kept(model), prompts_of()
    ids = prompts.input_ids.clone()
    ids[2, 1] = 17
    with pytest.raises(ValueError, match=r"Prompt 2 does not begin .* 12 tokens: token 1 is 17, of the beginning 5\."):
        model.generate(ids, attention_mask=prompts.attention_mask, **{CACHE: beginning})
    with pytest.raises(ValueError, match=r"Prompt 0 is 12 tokens, the beginning 12: .* at least one token behind"):
        model.generate(prompts_from_rows([BEGINNING]).input_ids, **{CACHE: beginning})
    with pytest.raises(ValueError, match=r"Prompt 0 is 3 tokens, the beginning 12"):
        model.generate(torch.tensor([[BOS, 5, IMAGE_TOKEN]]), **{CACHE: beginning})
    with pytest.raises(ValueError, match=r"attention_mask is \(3, 5\), input_ids \(3, 17\): .* whole prompts"):
        model.generate(prompts.input_ids, attention_mask=prompts.attention_mask[:, 12:], **{CACHE: beginning})
    embeds = model.get_input_embeddings()(prompts.input_ids)
    for arguments in ({}, {"inputs_embeds": embeds}, {"input_ids": ids, "position_ids": prompts.position_ids}):
        with pytest.raises(ValueError, match=r"input_ids of whole prompts.* Leave out position_ids and inputs_embeds"):
            model.generate(**arguments, **{CACHE: beginning})


def test_another_image_is_noticed():
    model, prompts = tiny_model("llama"), prompts_of(QUESTIONS[:2])
    pixels = prompts.pixel_values.clone()
    pixels[3, 0, 0, 0] += 1
    beginning = model.keep(prompts_from_rows([BEGINNING]).input_ids, pixel_values=pixels[:2])
    assert len(generated(model, prompts.prompt, beginning).sequences) == 2
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask, "pixel_values": pixels}
    with pytest.raises(ValueError, match="Image 1 of prompt 1 is not the one in the beginning"):
        generated(model, inputs, beginning)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_same_image_in_the_dtype_of_the_model_is_the_same(dtype):
    model, prompts = tiny_model("llama", dtype=dtype), prompts_of(QUESTIONS[:1])
    beginning = kept(model, questions=QUESTIONS[:1])  # of pixels in float32, as processors make them
    found = [generated(model, one.prompt, beginning) for one in (prompts, prompts.to(dtype))]
    assert torch.equal(found[0].sequences, found[1].sequences)
    prompts.pixel_values[1, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="Image 1 of prompt 0"):
        generated(model, prompts.to(dtype).prompt, beginning)


def test_what_is_kept_is_one_prompt():
    model, prompts = tiny_model("llama"), prompts_of()
    with pytest.raises(ValueError, match=r"input_ids is \(3, 17\): expected \(1, P\)"):
        model.keep(**prompts.prompt)
    with pytest.raises(ValueError, match="holds no token"):
        model.keep(torch.zeros(1, 3, dtype=torch.long), attention_mask=torch.zeros(1, 3))
    with pytest.raises(TypeError, match=r"keep\(\) got 'pixels': expected input_ids, attention_mask and images"):
        model.keep(prompts.input_ids[:1], pixels=prompts.pixel_values)
    padded = model.keep(torch.tensor([[PAD, BOS, 4, PAD]]), attention_mask=torch.tensor([[0, 1, 1, 0]]))
    assert padded.tokens.tolist() == [BOS, 4]


def test_vica_keeps_the_first_image_with_the_text_in_front_of_it():
    text, settings = MODELS["vica"]
    model, prompts = tiny_model(text, **settings), prompts_from_rows([[BOS, 4, "image", 8]]).prompt
    with pytest.raises(ValueError, match=r"leading_text_skips_attention: .* Keep the first image"):
        generated(model, prompts, model.keep(torch.tensor([[BOS, 4]])))


@pytest.mark.parametrize("part", ["embed_tokens", "mlp.up_proj", "q_proj", "norm", "visual_projector", "vision_tower"])
def test_other_weights_are_refused(part):
    model, prompts = tiny_model("llama"), prompts_of().prompt
    beginning = kept(model)
    weight = next(p for name, p in model.model.named_parameters() if part in name)
    held = weight.detach().clone()
    weight.data[..., 0] += 1
    with pytest.raises(ValueError, match=r"read with other weights or settings \(fingerprint .* model\.keep"):
        generated(model, prompts, beginning)
    weight.data.copy_(held)
    generated(model, prompts, beginning, max_new_tokens=1)
    model.lm_head.weight.data += 1  # what is kept does not depend on it
    generated(model, prompts, beginning, max_new_tokens=1)


def test_of_a_large_language_model_a_sample_is_looked_at(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr("saisa_hf.hardware_saisa.SAMPLED_FROM", 0)
    beginning = kept(model)
    beginning.check(model.model)
    model.language_model.layers[1].mlp.down_proj.weight.data.mul_(2)
    with pytest.raises(ValueError, match="other weights"):
        beginning.check(model.model)


def test_settings_that_keys_depend_on_count():
    beginning = kept(tiny_model("llama"))
    scaled = tiny_model("linear_scaling")
    with pytest.raises(ValueError, match="other weights or settings"):
        beginning.check(scaled.model)
    other = copy.deepcopy(tiny_model("llama"))
    beginning.check(other.model)
    other.config.text_config.rms_norm_eps = 0.5
    with pytest.raises(ValueError, match="other weights or settings"):
        beginning.check(other.model)


def test_a_cast_serves_the_cast_model():
    model = tiny_model("llama")
    beginning = kept(model)
    model.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"is torch\.float32, the model torch\.bfloat16: cast it with beginning\.to"):
        beginning.check(model.model)
    cast = beginning.to(torch.bfloat16)
    cast.check(model.model)
    assert cast.nbytes * 2 == beginning.nbytes and "12 tokens, 2 images, torch.bfloat16" in repr(cast)
    with pytest.raises(ValueError, match="is on meta, the model's layers on cpu"):
        cast.to("meta").check(model.model)


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["shared", "partial", "llava"])
def test_what_is_saved_is_what_is_loaded(name, tmp_path):
    text, settings = MODELS[name]
    model, prompts = tiny_model(text, **settings), prompts_of().prompt
    beginning = kept(model)
    beginning.save(tmp_path / "beginning")
    loaded = SaisaBeginning.load(tmp_path / "beginning")
    assert torch.equal(loaded.tokens, beginning.tokens) and loaded.marks == beginning.marks
    assert_same(generated(tiny_model(text, **settings), prompts, loaded), generated(model, prompts))
    with pytest.raises(ValueError, match="other weights"):
        generated(tiny_model(text, seed=1, **settings), prompts, loaded)
    assert [path.name for path in tmp_path.iterdir()] == ["beginning"]


def test_damaged_files_are_named(tmp_path):
    beginning, path = kept(tiny_model("qwen3", visual_layers=[0, 2])), tmp_path / "beginning"
    beginning.save(path)
    with safetensors.safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118

    def refused(message, changed=(), **described):
        safetensors.torch.save_file({**tensors, **dict(changed)}, path, metadata | described)
        with pytest.raises(ValueError, match=f"beginning.*{message}"):
            SaisaBeginning.load(path)

    refused("holds no beginning", format="saisa visual states 1")
    for name, values in {"layers": ["0", "x", "[3]"], "images": ["3", '[["a"]]'], "image_token_id": ['"a"']}.items():
        for value in values:
            refused("no usable description", **{name: value})
    refused("lacks 'keys.3'", layers="4")
    refused("holds an unexpected 'keys.2'", layers="2")
    refused("which is no SHA-256 digest", fingerprint="abc")
    refused("tokens of I32", {"tokens": tensors["tokens"].int()})
    refused("(keys|values).1 of F32", {"keys.1": tensors["keys.1"][:, :, :3].contiguous()})
    refused("(keys|values).2 of F", {"keys.2": tensors["keys.2"].half()})
    short = {f"{name}.1": tensors[f"{name}.1"][:, :, :3].contiguous() for name in ("keys", "values")}
    refused("keys.1 is of 3 tokens, of 12", short)
    refused("keys.0 holds NaN or infinity", {"keys.0": tensors["keys.0"] * float("nan")})
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"is no safetensors file .* Expected a file that SaisaBeginning\.save"):
        SaisaBeginning.load(path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        SaisaBeginning.load(tmp_path / "other")


# --- conversations and many questions ---------------------------------------------------------------------------------


def passes_of(model):
    """Tokens of each forward pass."""
    seen = []
    model.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    return seen


def test_conversations_that_begin_alike_read_the_image_once():
    model, processor = copy.deepcopy(demo()[0]), demo()[1]
    asked = {"max_new_tokens": 8, "do_sample": False}
    scene, other = "docs/images/scene.png", picture(3)
    first = Conversation(model, processor, **asked)
    expected = ["".join(Conversation(model, processor, **asked).ask(question, [scene])) for question in (COUNT, THREE)]
    strange = "".join(Conversation(model, processor, **asked).ask(COUNT, [other]))
    beginning, passes = first.keep([scene]), passes_of(model)
    second = Conversation(model, processor, beginning=beginning, **asked)
    assert ["".join(first.ask(COUNT, [scene])), "".join(second.ask(THREE, [scene]))] == expected
    first.clear()
    assert "".join(first.ask(THREE, [scene])) == expected[1]
    assert max(passes) < 16 < len(beginning)
    second.clear()
    assert "".join(second.ask(COUNT, [other])) == strange  # another image is read as it is
    assert max(passes) > len(beginning)
    text = Conversation(model, processor, beginning=beginning, **asked)
    plain = Conversation(model, processor, **asked)
    assert "".join(text.ask(THREE)) == "".join(plain.ask(THREE))


def test_a_beginning_of_a_system_message_alone():
    model, processor = tiny_model(seed=3), tiny_processor()
    asked = {"max_new_tokens": 6, "do_sample": False, "system": "a bad cab"}
    expected = "".join(Conversation(model, processor, **asked).ask("ace of bees"))
    conversation = Conversation(model, processor, **asked)
    assert conversation.keep().marks == ()
    assert "".join(conversation.ask("ace of bees")) == expected


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("alignment", ["input_space", "embedding_space"])
def test_questions_that_fill_a_batch_about_an_image_continue_one_beginning(
    tmp_path, monkeypatch, batch_size, alignment
):
    model, processor = tiny_model(seed=3, alignment=alignment, projector_sharing="shared"), tiny_processor()
    words = ["abc", "de", "fgh dea", "a", "bad cab", "ace of bees"]
    paths = [str(tmp_path / f"{index}.png") for index in range(2)]
    for index, path in enumerate(paths):
        picture(index).save(path)
    asked = [Question(f"{one} {other}", [path]) for one in words[:3] for other in words[:2] for path in paths]
    asked += [Question("cab <image>\nab", [paths[0]]), Question("abc"), Question("abc", [picture(9)])]
    how = {"max_new_tokens": 4, "system": "abc", "batch_size": batch_size}
    plain = Answerer(model, processor, visual_states=False, **how)
    expected = [answer.text for answer in plain.answer(asked)]
    likely = list(plain.loglikelihood((one, "ab") for one in asked))
    read, keep = [], model.keep
    monkeypatch.setattr(model, "keep", lambda ids, **images: [read.append(1), keep(ids, **images)][1])
    answerer = Answerer(model, processor, **how)
    assert [answer.text for answer in answerer.answer(asked)] == expected
    found = list(answerer.loglikelihood((one, "ab") for one in asked))
    assert [one.log_probability for one in found] == pytest.approx([one.log_probability for one in likely], abs=1e-5)
    assert [(one.tokens, one.is_greedy) for one in found] == [(one.tokens, one.is_greedy) for one in likely]
    assert answerer._beginning is None  # nothing stays
    assert len(read) == 2 * 2  # each image, for the answers and for the likelihoods


def test_a_window_keeps_the_engine_from_beginnings():
    model, processor = tiny_model("mistral_window", seed=3), tiny_processor()
    asked = [Question(words, [picture(0)]) for words in ("abc", "de", "fgh dea", "a")]
    shared = picture(0)
    asked = [Question(one.prompt, [shared]) for one in asked]
    plain = Answerer(model, processor, visual_states=False, max_new_tokens=6, batch_size=2)
    found = Answerer(model, processor, max_new_tokens=6, batch_size=2)
    assert [one.text for one in found.answer(asked)] == [one.text for one in plain.answer(asked)]


def test_any_other_cache_is_taken_as_ever():
    model, prompts = tiny_model("llama"), prompts_of().prompt
    assert_same(generated(model, prompts, DynamicCache()), generated(model, prompts))
