# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`model.compile_prefill`: one graph for each bucket of lengths, which computes what the model does without it."""

import copy
import pickle
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from flash_standin import flash_attention
from graph_parts import compiling, graphs
from tile_parts import draw, next_processor, our_processor, tiled_saisa
from tiny_models import BOS, TEXT_CONFIGS, prompts_from_rows, random_prompts, tiny_model
from transformers import StaticCache

from saisa_hf.chat import Conversation
from saisa_hf.common.prefill import COARSE, FINE, Bucket, CompiledPrefill, bucketed, rounded
from saisa_hf.compat_saisa import CACHE
from saisa_hf.demo.run import CHECKPOINT, load
from saisa_hf.images_saisa import load_image


SCENE = load_image(Path(__file__).parent.parent / "docs" / "images" / "scene.png")
UNLIKE = [[BOS, 5, 6, 7], [BOS, "image", 8, 9], ["image", 12, 13, "image", 14], [BOS, 8, "image", 9, 10, 11]]
LATER = [[20, 21, 22], [23, "image", 24], [25, 26], ["image", 27]]
MODELS = {
    "llama": {},
    "images in one layer": {"text": "qwen3", "visual_layers": [1]},
    "two rotary embeddings": {"text": "gemma3"},
    "softcap": {"text": "gemma2"},
    "one projector": {"text": "granite", "projector_sharing": "shared"},
    "leading text skips attention": {"text": "phi3", "leading_text_skips_attention": True},
    "folded": {"text": "qwen2", "projector_hidden_size": 8},
    "LLaVA": {"alignment": "embedding_space"},
    "between": {"alignment": "embedding_space", "visual_attention": "none", "visual_feed_forward": [True, False]},
}
# whose caches have windows, or hold text alone
READ_AS_BEFORE = [("two rotary embeddings", "static"), ("softcap", "static"), ("images in one layer", "dynamic")]
CACHES = {"static": lambda model: static(model), "dynamic": lambda model: model.new_cache()}


def built(name, layers=2):
    """A model that has seen an image: at its first call, an encoder of transformers 5 is prepared."""
    settings = {"text": "llama", **MODELS[name]}
    text = TEXT_CONFIGS[settings.pop("text")]()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:layers]
    model = tiny_model(text, seed=3, **settings)
    if name == "folded":
        model.fold_projectors()
    with torch.no_grad():
        model(**prompts_from_rows([[BOS, "image", 5]]).prompt)
    return model


@contextmanager
def compiled(model, **options):
    model.compile_prefill(**{"backend": "eager", **options})
    yield model.compiled_prefill
    model.compiled_prefill = None


def static(model, places=96):
    return StaticCache(config=model.config, max_cache_len=places)


def turns(model, cache, side, logits_to_keep):
    """Logits of two turns, both padded on `side`, and the cache."""
    first, then = (prompts_from_rows(rows, side, seed) for seed, rows in enumerate((UNLIKE, LATER)))
    mask = torch.cat([first.attention_mask, then.attention_mask], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, first.input_ids.shape[1] :]
    options = {CACHE: cache, "use_cache": True, "logits_to_keep": logits_to_keep}
    with torch.no_grad():
        made = [model(**first.inputs, **options)]
        further = {"input_ids": then.input_ids, "attention_mask": mask, "position_ids": positions}
        made.append(model(**further, pixel_values=then.pixel_values, **options))
    return [one.logits for one in made], made[-1][CACHE]


def check_two_turns(name, kind, side, logits_to_keep):
    model = built(name)
    expected, cache = turns(model, CACHES[kind](model), side, logits_to_keep)
    with graphs() as so_far, compiled(model) as prefill:
        found, filled = turns(model, CACHES[kind](model), side, logits_to_keep)
        assert len(prefill.buckets) == so_far() == 2
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1, other.abs().max().item()))
    length = int(cache.get_seq_length())
    assert length == int(filled.get_seq_length())
    for one, other in zip(filled.layers, cache.layers, strict=True):
        assert one.keys.shape == other.keys.shape
        for x, y in ((one.keys, other.keys), (one.values, other.values)):
            torch.testing.assert_close(x[:, :, :length], y[:, :, :length], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case",
    [
        ("llama", "static", "left", 1),
        ("images in one layer", "static", "right", 0),
        ("two rotary embeddings", "dynamic", "left", 1),
        ("LLaVA", "dynamic", "right", 0),
    ],
)
def test_two_turns_of_a_batch_give_the_logits_and_the_cache_that_they_give_without(case):
    """Rows with and without images, padded on either side, on top of a filled cache too."""
    check_two_turns(*case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in MODELS for kind in CACHES if (name, kind) not in READ_AS_BEFORE]
)
def test_two_turns_in_every_kind_of_model(name, kind):
    for side, keep in (("left", 0), ("right", 1)):
        check_two_turns(name, kind, side, keep)


def conversation(number):
    """Prompts of unlike lengths, with one to four images, and what is said then."""
    text = list(range(3, 3 + 7 * number))
    return [BOS, *["image"] * (1 + number % 4), 5, *text], [20 + number, *text[: 2 * number], 7]


def answers(model, number, places=192):
    """What is generated in two turns of a conversation on one static cache."""
    first, then = (prompts_from_rows([row], seed=number) for row in conversation(number))
    options = {CACHE: static(model, places), "max_new_tokens": 4, "do_sample": False}
    ids = model.generate(**first.prompt, **options)
    both = torch.cat([ids, then.input_ids], 1)
    return model.generate(both, attention_mask=torch.ones_like(both), **options)


def test_ten_conversations_of_unlike_length_have_no_break_and_one_graph_for_each_bucket():
    model = built("llama")
    written = [answers(model, number) for number in range(10)]
    with graphs() as so_far, compiled(model) as prefill:
        for number, expected in enumerate(written):
            assert torch.equal(answers(model, number), expected), number
            assert so_far() == len(prefill.buckets)
        buckets = list(prefill.buckets)
        answers(model, 3)
        assert so_far() == len(buckets) == len(prefill.buckets) < 20
    assert {bucket.text for bucket in buckets} == {32, 48, 64, 96} and {b.visual for b in buckets} == {0, 16}


def test_lengths_of_buckets_are_the_users_choice():
    model = built("llama")
    expected = [answers(model, number) for number in (1, 4, 7)]
    with graphs() as so_far, compiled(model, text_lengths=[64], visual_lengths=(16, 8)) as prefill:
        for number, ids in zip((1, 4, 7), expected):
            assert torch.equal(answers(model, number), ids)
        assert {bucket.text for bucket in prefill.buckets} == {64} and so_far() == len(prefill.buckets)
        assert {bucket.visual for bucket in prefill.buckets} == {0, 8, 16}
        assert torch.equal(answers(model, 9), answers(model, 9))  # longer than any
        assert so_far() == len(prefill.buckets)


def test_encoder_prefill_and_decoding_are_one_graph_each():
    """`generate` compiles decoding by itself; conversations of one bucket share all three graphs."""
    model = built("llama")
    options = {"cache_implementation": "static", "max_length": 64, "do_sample": False}
    prompts = [prompts_from_rows([[BOS, "image", *range(5, 5 + n)]], seed=n).prompt for n in (3, 7, 12)]
    expected = [model.generate(**prompt, **options) for prompt in prompts]
    with graphs() as so_far, compiled(model) as prefill:
        model.vision_tower.compile(backend="eager", fullgraph=True)
        for prompt, ids in zip(prompts, expected):
            assert torch.equal(model.generate(**prompt, **options, compile_config=compiling("eager")), ids)
        assert len(prefill.buckets) == 1 and so_far() == 3


def test_one_static_cache_stays_where_it_is_from_conversation_to_conversation():
    """CUDA graphs are for places in memory; logits are the caller's own."""
    model, cache = built("llama"), static(built("llama"), 48)
    prompts = [prompts_from_rows([[BOS, "image", *range(5, 5 + n)]], seed=n).prompt for n in (9, 3, 12)]
    places, kept = [], []
    with torch.no_grad(), graphs() as so_far:
        expected = [model(**prompt, logits_to_keep=1).logits for prompt in prompts]
        with compiled(model):
            for prompt in prompts:
                cache.reset()
                kept.append(model(**prompt, logits_to_keep=1, **{CACHE: cache}).logits)
                places.append([x.data_ptr() for layer in cache.layers for x in (layer.keys, layer.values)])
                assert int(cache.get_seq_length()) == prompt["input_ids"].shape[1]
        assert so_far() == 1 and places[0] == places[1] == places[2]
    for found, other in zip(kept, expected):
        torch.testing.assert_close(found, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("store", ["keys_values", "features"])
def test_visual_states_in_any_order(store):
    model, p = built("llama"), random_prompts(2)
    states = model.get_visual_states(p.pixel_values, store)
    order = torch.arange(len(states)).flip(0)
    ids = {"input_ids": p.input_ids, "attention_mask": p.attention_mask}
    with torch.no_grad(), graphs() as so_far:
        for given in (states, states[order], states[[0] * len(states)]):
            expected = model(**ids, visual_states=given).logits
            with compiled(model):
                torch.testing.assert_close(model(**ids, visual_states=given).logits, expected, rtol=1e-5, atol=1e-5)
        assert so_far() == 1


def test_embeddings_and_which_logits():
    """Where drafts are checked, and more logits than the last are wanted, the model runs itself."""
    model, p = built("llama"), random_prompts(3)
    embeds = model.get_input_embeddings()(p.input_ids)
    given = {"inputs_embeds": embeds, "attention_mask": p.attention_mask, "pixel_values": p.pixel_values}
    with torch.no_grad(), graphs() as so_far:
        for kept in (0, 1, 3, torch.tensor([-1, 2])):
            expected = model(**given, logits_to_keep=kept, use_cache=False)
            with compiled(model):
                found = model(**given, logits_to_keep=kept, use_cache=False)
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
            assert found.get(CACHE) is None and torch.equal(found.image_hidden_states, expected.image_hidden_states)
        assert so_far() == 2


@pytest.mark.parametrize("name", ["llama", "LLaVA"])
def test_text_alone(name):
    model, p = built(name), prompts_from_rows([[BOS, 5, 6, 7], [BOS, 8]])
    with torch.no_grad(), graphs() as so_far:
        expected = model(**p.inputs, logits_to_keep=1).logits
        with compiled(model):
            torch.testing.assert_close(model(**p.inputs, logits_to_keep=1).logits, expected, rtol=1e-5, atol=1e-5)
        assert so_far() == 1


def test_projectors_that_change_are_folded_again():
    model = built("folded")
    prompt = prompts_from_rows(UNLIKE).prompt
    with torch.no_grad(), graphs(), compiled(model):
        model(**prompt)
        model.language_model.layers[1].visual_projector.linear_2.weight.mul_(0.5)
        found = model(**prompt).logits
        model.compiled_prefill = None
        model.unfold_projectors()
        torch.testing.assert_close(found, model(**prompt).logits, rtol=1e-5, atol=1e-5)


# --- where the model reads prompts itself -----------------------------------------------------------------------------


def with_hook(model):
    model.language_model.layers[1].register_forward_hook(lambda module, inputs, output: (output[0] * 0, output[1]))


def with_watcher(model):
    model.language_model.layers[0].self_attn.watcher = lambda *arguments: None


REFUSED = {
    "hooks": ({}, with_hook, None),
    "watched": ({}, with_watcher, None),
    "experts": ({"text": "mixtral"}, None, None),
    "flash": ({}, lambda model: model.set_attn_implementation("flash_attention_2"), None),
    "stretched rotary embedding": ({"text": "dynamic_scaling"}, None, None),
    "caches with windows": ({"text": "mistral_window"}, None, static),
    "a cache of the model's own with windows": ({"text": "mistral_window"}, None, None),
    "caches of text alone": ({"visual_layers": [0]}, None, lambda model: model.new_cache()),
    "a beginning": ({}, None, lambda model: model.keep(torch.tensor([[BOS, 5]]))),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_graph_cannot_do_the_model_does_itself(case, monkeypatch):
    """With a line in the log."""
    settings, prepare, new_cache = REFUSED[case]
    said = []
    monkeypatch.setattr("saisa_hf.common.prefill.warn_once", said.append)
    model, p = tiny_model(**settings), prompts_from_rows(UNLIKE[1:2])

    def run():
        further = {} if new_cache is None else {CACHE: new_cache(model)}
        past = 2 if case == "a beginning" else 0
        mask = torch.ones(1, past + p.input_ids.shape[1], dtype=torch.long)
        return model(input_ids=p.input_ids, attention_mask=mask, pixel_values=p.pixel_values, **further).logits

    with torch.no_grad(), flash_attention(), graphs() as so_far:
        if prepare is not None:
            prepare(model)
        expected = run()
        with compiled(model) as prefill:
            assert torch.equal(run(), expected)
        assert so_far() == 0 and not prefill.buckets and len(said) == 1 and "read as if without" in said[0]


def test_drafts_are_checked_without_a_graph():
    model, prompt = built("llama"), prompts_from_rows([[BOS, "image", 5, 6, 5, 6, 5]]).prompt
    options = {"do_sample": False, "max_new_tokens": 8, "prompt_lookup_num_tokens": 3, "eos_token_id": 95}
    expected = model.generate(**prompt, **options)
    with graphs() as so_far, compiled(model):
        assert torch.equal(model.generate(**prompt, **options), expected) and so_far() <= 1


def test_training_losses_and_further_outputs_are_the_models_own():
    model, p = built("llama"), random_prompts(1)
    labels = p.input_ids.masked_fill(~p.text, -100)
    with graphs() as so_far, compiled(model):
        model(**p.inputs, labels=labels).loss.backward()
        with torch.no_grad():
            assert model(**p.inputs, labels=labels).loss is not None
            assert model(**p.inputs, output_hidden_states=True).hidden_states is not None
            assert isinstance(model(**p.inputs, return_dict=False), tuple)
            assert model(p.input_ids, p.pixel_values, p.attention_mask).logits is not None  # by place
        assert so_far() == 0


def test_an_image_too_few_is_the_same_error():
    model, p = built("llama"), random_prompts(1)
    with torch.no_grad(), compiled(model), pytest.raises(ValueError, match="but the input has"):
        model(input_ids=p.input_ids, pixel_values=p.pixel_values[1:])


# --- buckets ----------------------------------------------------------------------------------------------------------


def test_lengths_are_rounded_up_to_those_of_buckets():
    assert [rounded(n, *COARSE) for n in (0, 1, 32, 33, 49, 64, 65, 97, 1025)] == [0, 32, 32, 48, 64, 64, 96, 128, 1536]
    assert [rounded(n, *FINE) for n in (0, 1, 17, 576, 577, 729, 1152, 2880)] == [0, 16, 18, 576, 640, 768, 1152, 3072]
    assert [bucketed(n, [4, 9], 1, 1) for n in (0, 1, 4, 5, 10)] == [0, 4, 4, 9, None]
    for n in range(1, 5000):
        assert n <= rounded(n, *FINE) <= max(16, n * 9 / 8) and n <= rounded(n, *COARSE) <= max(32, n * 3 / 2)


@pytest.mark.parametrize("lengths", [[], [0], [-3], [4.0], [True], "64", 64, ["64"]])
def test_lengths_that_are_none(lengths):
    for name in ("text_lengths", "visual_lengths"):
        with pytest.raises(ValueError, match=f"{name}=.*expected positive integers"):
            tiny_model().compile_prefill(**{name: lengths})


def test_a_copy_of_the_model_has_graphs_of_its_own():
    model, p = tiny_model(), random_prompts(1)
    model.compile_prefill(backend="eager", text_lengths=[40])
    others = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    with torch.no_grad():
        expected = model(**p.inputs).logits
        for other in others:
            assert not other.compiled_prefill.buckets
            torch.testing.assert_close(other(**p.inputs).logits, expected)
            assert list(other.compiled_prefill.buckets) == list(model.compiled_prefill.buckets)
    assert isinstance(model.compiled_prefill, CompiledPrefill)
    assert model.compiled_prefill.buckets.keys() == {Bucket(4, 40, 24, 56, 56, 56)}
    assert "compiled_prefill" not in " ".join(model.state_dict())
    torch._dynamo.reset()


# --- other backends ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "images in one layer"])
def test_random_batches(name, side):
    """In few graphs: their lengths differ more than their buckets."""
    model = built(name)
    with torch.no_grad(), graphs() as so_far:
        for seed in range(40):
            p = random_prompts(seed, side)
            expected, cache = model(**p.inputs, use_cache=False).logits, static(model, 64)
            with compiled(model):
                found = model(**p.inputs, **{CACHE: cache}).logits
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert int(cache.get_seq_length()) == p.input_ids.shape[1]
        assert 0 < so_far() < 10


@pytest.mark.slow
def test_images_in_tiles():
    """Whose numbers of visual tokens differ, with learned newlines among them."""
    model = tiled_saisa()
    processor = our_processor(next_processor())
    inputs = [
        processor([draw(n, size) for n, size in enumerate(sizes)], "<image>" * len(sizes) + " hi", return_tensors="pt")
        for sizes in ([(24, 24)], [(30, 10)], [(7, 40)], [(13, 12), (40, 2)])
    ]
    with torch.no_grad(), graphs() as so_far:
        expected = [model(**given, logits_to_keep=1).logits for given in inputs]
        with compiled(model) as prefill:
            for given, logits in zip(inputs, expected):
                torch.testing.assert_close(model(**given, logits_to_keep=1).logits, logits, rtol=1e-5, atol=1e-5)
            assert so_far() == len(prefill.buckets) > 1


@pytest.mark.slow
def test_a_chat_reads_its_turns_in_graphs():
    model, processor = load(CHECKPOINT)

    def said():
        chat = Conversation(model, processor, do_sample=False, max_new_tokens=6)
        turns = (("how many digits are there?", [SCENE]), ("is there a 3?", []), ("and here?", [SCENE.rotate(90)]))
        return ["".join(chat.ask(text, images=images)) for text, images in turns]

    expected = said()
    with graphs() as so_far, compiled(model) as prefill:
        assert said() == expected and so_far() == len(prefill.buckets) == 3


@pytest.mark.slow
def test_inductor():
    model = built("llama")
    expected, _ = turns(model, static(model), "left", 1)
    written = answers(model, 3)
    with graphs() as so_far, compiled(model, backend="inductor") as prefill:
        found, _ = turns(model, static(model), "left", 1)
        for one, other in zip(found, expected):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        assert torch.equal(answers(model, 3), written)
        assert so_far() == len(prefill.buckets) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graphs_of_prefill_and_decoding():
    config = TEXT_CONFIGS["qwen3"]()
    config.head_dim = 16
    model = tiny_model(config).cuda()
    prompts = [prompts_from_rows([[BOS, "image", *range(5, 5 + n)]], seed=n).prompt for n in (3, 7, 12, 3, 7)]
    prompts = [{name: x.cuda() for name, x in prompt.items()} for prompt in prompts]
    options = {"max_new_tokens": 8, "do_sample": False}
    cache, found = static(model), []
    with torch.no_grad():
        logits = [model(**prompt, logits_to_keep=1).logits for prompt in prompts]
    written = [model.generate(**prompt, **options) for prompt in prompts]
    counters = torch._dynamo.utils.counters
    counters.clear()
    with compiled(model, backend="inductor", mode="reduce-overhead") as prefill:
        for prompt in prompts:
            cache.reset()
            with torch.no_grad():
                found.append(model(**prompt, logits_to_keep=1, **{CACHE: cache}).logits)
        for one, other in zip(found, logits):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        assert len(prefill.buckets) == 1 and not counters["inductor"]["cudagraph_skips"]
        for prompt, ids in zip(prompts, written):
            cache.reset()
            assert torch.equal(model.generate(**prompt, **options, **{CACHE: cache}), ids)
