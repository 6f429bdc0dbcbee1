"""What others hang into a model (hooks, adapters, noise, draft models, serving loops) meets the axes that it expects.

Results with images are compared with transformers' LLaVA of the same weights, in embedding space, and with one row at a time.
"""

import inspect

import pytest
import torch
import transformers
from test_embedding_space import close, loaded, make_llava, our_name
from test_training import trainer_for
from tiny_models import BOS, IMAGE_TOKEN, PAD, TEXT_CONFIGS, VOCAB_SIZE, prompts_from_rows, randomize, tiny_model

from saisa_hf.compat_saisa import CACHE, TRANSFORMERS_5


peft = pytest.importorskip("peft")

# unlike numbers of images and of words, and images in front of, between and behind words
ROWS = [[BOS, "image", 5, 6], [BOS, 7, 8, 9, 10, 11], ["image", 12, "image", 13, 14, 15], [BOS, 16, "image", 17]]
INVOCATION = [20, 21]
INVOKED = [[BOS, "image", 5, *INVOCATION, 6, 7], [BOS, 8, *INVOCATION, 9], [BOS, "image", 10, 11]]


def text_columns(prompts):
    return int((~prompts.visual & prompts.attention_mask.bool()).sum(1).max())


def hook_layers(decoder, hook):
    """Adds `hook`, a function of hidden states, to the output of every decoder layer, be it a tensor or a tuple."""

    def on_output(_module, _args, output):
        return (hook(output[0]), *output[1:]) if isinstance(output, tuple) else hook(output)

    for layer in decoder.layers:
        layer.register_forward_hook(on_output)


def of_each_row(model, rows, **arguments):
    """Logits of each row of `rows` alone; `arguments` have a list of values, one for each row."""
    found, pixel_values, first = [], prompts_from_rows(rows).pixel_values, 0
    for index, row in enumerate(rows):
        own = {name: [values[index]] for name, values in arguments.items()}
        inputs = prompts_from_rows([row]).inputs
        if images := row.count("image"):
            inputs["pixel_values"] = pixel_values[first : first + images]
        first += images
        with torch.no_grad():
            found.append(model(**inputs, **own).logits[0])
    return found


def close_in_each_row(logits, prompts, expected):
    for row, real, alone in zip(logits, prompts.attention_mask.bool(), expected, strict=True):
        close(row[real], alone)


# --- hidden states ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_no_row_of_padding_passes_a_weight(side):
    model = tiny_model("llama")
    rows = [[BOS, "image", 5, 6], [BOS, 7, 8]]
    prompts, seen = prompts_from_rows(rows, side=side), []
    for name in ("mlp", "self_attn.q_proj", "self_attn.o_proj"):
        module = model.language_model.layers[0].get_submodule(name)
        module.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[:-1]))
    model.lm_head.register_forward_hook(lambda _module, args, _output: seen.append(args[0].shape[:-1]))
    with torch.no_grad():
        model(**prompts.inputs)
    assert set(seen) == {(2, 3)} and len(seen) == 4  # six text tokens, of two rows


@pytest.mark.parametrize("side", ["left", "right"])
def test_hidden_states_have_the_last_text_token_of_each_sample_in_the_last_column(side):
    model = tiny_model("llama")
    prompts, seen = prompts_from_rows(ROWS, side=side), []
    hook_layers(model.language_model, lambda x: seen.append(x) or x)
    with torch.no_grad():
        outputs = model(**prompts.inputs, output_hidden_states=True)
    assert {x.shape for x in seen} == {(len(ROWS), text_columns(prompts), model.config.text_config.hidden_size)}
    text_BS = ~prompts.visual & prompts.attention_mask.bool()
    for layer, x_BTD in enumerate(seen[:-1]):
        for b, text_S in enumerate(text_BS):
            aligned = outputs.hidden_states[layer + 1][b, text_S]
            assert torch.equal(x_BTD[b, -len(aligned) :], aligned)


@pytest.mark.parametrize("side", ["left", "right"])
def test_steering_the_last_token_of_a_batch_is_steering_each_row(side):
    model = tiny_model("llama")
    torch.manual_seed(0)
    vector = torch.randn(model.config.text_config.hidden_size)

    def steered(x):
        x = x.clone()
        x[:, -1, :] += vector
        return x

    plain = of_each_row(model, ROWS)
    hook_layers(model.language_model, steered)
    alone = of_each_row(model, ROWS)
    assert all((a - b).abs().max() > 0.1 for a, b in zip(alone, plain))
    prompts = prompts_from_rows(ROWS, side=side)
    with torch.no_grad():
        close_in_each_row(model(**prompts.inputs).logits, prompts, alone)


def test_steering_is_as_on_transformers_llava(tmp_path):
    llava = make_llava()
    model = loaded(llava, tmp_path)
    vector = torch.linspace(-1, 1, llava.config.text_config.hidden_size)
    for decoder in (llava.model.language_model, model.language_model):
        hook_layers(decoder, lambda x: torch.cat([x[:, :-1], x[:, -1:] + vector], dim=1))
    prompts = prompts_from_rows(ROWS)
    with torch.no_grad():
        ours, theirs = model(**prompts.inputs).logits, llava(**prompts.inputs).logits
    close(ours[prompts.attention_mask.bool()], theirs[prompts.attention_mask.bool()])


# --- adapters ---------------------------------------------------------------------------------------------------------


def with_adapters(model, names=("a", "b"), weights=None, **settings):
    """`model` with a LoRA of random weights, or of those of another model, for each of `names`."""
    settings = {"r": 4, "target_modules": r".*language_model.*\.(q_proj|k_proj|v_proj|down_proj)", **settings}
    for name in names:
        if name == names[0]:
            model = peft.get_peft_model(model, peft.LoraConfig(**settings), adapter_name=name)
        else:
            model.add_adapter(name, peft.LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(torch.randn_like(p) * 0.3 if weights is None else weights[our_name(name)])
    return model.eval()


def adapter_weights(model):
    return {our_name(name): p for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("sharing", ["per_layer", "shared"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_adapters_that_differ_between_rows_are_those_of_each_row(sharing, side):
    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|down_proj)|.*visual_projector\.linear_[12]"
    model = with_adapters(tiny_model("llama", projector_sharing=sharing), target_modules=targets)
    names = ["a", "b", "__base__", "b"]
    alone = of_each_row(model, ROWS, adapter_names=names)
    others = of_each_row(model, ROWS, adapter_names=["b", "__base__", "a", "a"])
    assert all((a - b).abs().max() > 0.05 for a, b in zip(alone, others))
    prompts = prompts_from_rows(ROWS, side=side)
    with torch.no_grad():
        close_in_each_row(model(**prompts.inputs, adapter_names=names).logits, prompts, alone)


def test_one_row_with_an_adapter_by_name_is_the_model_with_that_adapter_active():
    model = with_adapters(tiny_model("llama"))
    inputs = prompts_from_rows(ROWS[:1]).inputs
    with torch.no_grad():
        by_name = model(**inputs, adapter_names=["b"]).logits
        model.set_adapter("b")
        close(by_name, model(**inputs).logits)


def test_adapters_apply_to_stored_features_row_by_row():
    model = with_adapters(tiny_model("llama"))
    rows, names = [[BOS, "image", 5, 6], [BOS, "image", 5, 6]], ["a", "b"]
    prompts = prompts_from_rows(rows)
    inputs = {name: x for name, x in prompts.inputs.items() if name != "pixel_values"}
    states = model.base_model.model.get_visual_states(prompts.pixel_values[:1], "features").expand(2)
    with torch.no_grad():
        found = model(**inputs, visual_states=states, adapter_names=names).logits
        pixels = prompts.pixel_values[:1].repeat(2, 1, 1, 1)
        close(found, model(**inputs, pixel_values=pixels, adapter_names=names).logits)
    assert (found[0] - found[1]).abs().max() > 0.05


def test_adapters_that_differ_between_rows_are_as_on_transformers_llava(tmp_path):
    llava = make_llava()
    model = loaded(llava, tmp_path)
    llava = with_adapters(llava)
    model = with_adapters(model, weights=adapter_weights(llava))
    prompts, names = prompts_from_rows(ROWS), ["a", "b", "__base__", "b"]
    real = prompts.attention_mask.bool()
    with torch.no_grad():
        ours, theirs = (each(**prompts.inputs, adapter_names=names).logits for each in (model, llava))
    close(ours[real], theirs[real])


def activated(model, weights=None):
    settings = {"task_type": "CAUSAL_LM", "alora_invocation_tokens": INVOCATION}
    return with_adapters(model, ["a"], weights, target_modules=r".*language_model.*\.[qkv]_proj", **settings)


def test_activated_lora_is_as_on_transformers_llava(tmp_path):
    llava = make_llava()
    model = loaded(llava, tmp_path)
    llava = activated(llava)
    model = activated(model, adapter_weights(llava))
    prompts = prompts_from_rows(INVOKED)
    real = prompts.attention_mask.bool()
    with torch.no_grad():
        ours, theirs = model(**prompts.inputs).logits, llava(**prompts.inputs).logits
        plain = model.base_model.model(**prompts.inputs).logits
    close(ours[real], theirs[real])
    assert (ours - plain)[real].abs().max() > 0.05


def test_activated_lora_leaves_all_tokens_in_front_of_the_invocation_alone():
    model = tiny_model("llama")
    prompts = prompts_from_rows(INVOKED)
    with torch.no_grad():
        plain = model(**prompts.inputs, use_cache=True)
    model = activated(model)
    with torch.no_grad():
        found = model(**prompts.inputs, use_cache=True)
    in_front = prompts.attention_mask.bool()
    for b, ids in enumerate(prompts.input_ids.tolist()):
        if INVOCATION[0] in ids:
            in_front[b, ids.index(INVOCATION[0]) :] = False
    close(found.logits[in_front], plain.logits[in_front])
    behind = prompts.attention_mask.bool() & ~in_front
    assert (found.logits - plain.logits)[behind].abs().max() > 0.05
    for ours, theirs in zip(found[CACHE].layers, plain[CACHE].layers):  # visual keys and values among them
        close(ours.keys.transpose(1, 2)[in_front], theirs.keys.transpose(1, 2)[in_front])
        assert not torch.equal(ours.keys.transpose(1, 2)[behind], theirs.keys.transpose(1, 2)[behind])


# --- noise ------------------------------------------------------------------------------------------------------------


def test_neftune_trains_on_images_and_draws_its_noise_for_text_tokens(tmp_path):
    model = tiny_model("llama")
    seen = []
    trainer = trainer_for(model, tmp_path, neftune_noise_alpha=5.0, max_steps=2)
    model.get_input_embeddings().register_forward_hook(lambda _module, _args, output: seen.append(output.shape))
    before = model.lm_head.weight.clone()
    trainer.train()
    assert all(len(shape) == 3 for shape in seen) and not torch.equal(before, model.lm_head.weight)


def test_neftune_adds_to_each_text_token_at_most_what_its_paper_says():
    # arXiv 2310.05914: uniform noise times alpha / sqrt(L d)
    if TRANSFORMERS_5:
        from transformers.integrations.neftune import neftune_post_forward_hook
    else:
        from transformers.trainer_utils import neftune_post_forward_hook

    model = tiny_model("llama").train()
    prompts, embedding = prompts_from_rows(ROWS), model.get_input_embeddings()
    clean = []
    embedding.register_forward_hook(lambda _module, _args, output: clean.append(output.detach().clone()))
    embedding.neftune_noise_alpha = 5.0
    embedding.register_forward_hook(neftune_post_forward_hook)
    noisy = []
    embedding.register_forward_hook(lambda _module, _args, output: noisy.append(output.detach().clone()))
    model(**prompts.inputs)
    bound = 5.0 / (text_columns(prompts) * embedding.embedding_dim) ** 0.5
    noise = (noisy[0] - clean[0]).abs()
    assert 0.9 * bound < noise.max() <= bound * 1.0001


# --- generation -------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    not TRANSFORMERS_5, reason="4.57's looks for the sizes of the language model at the top of the config"
)
def test_continuous_batching_writes_what_generate_writes():
    model = tiny_model("llama").eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = -1, PAD
    prompts = [[BOS, 5, 6, 7], [BOS, 8], [BOS, 9, 10, 11, 12, 13, 14]]
    options = transformers.GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=PAD)
    expected = [
        model.generate(torch.tensor([ids]), generation_config=options)[0, len(ids) :].tolist() for ids in prompts
    ]
    implementation = model.config._attn_implementation
    few = transformers.ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)  # else it takes most of the memory
    found = model.generate_batch(inputs=prompts, generation_config=options, continuous_batching_config=few)
    assert [found[key].generated_tokens for key in sorted(found, key=lambda key: int(key.split("_")[-1]))] == expected
    model.set_attn_implementation(implementation)


def test_continuous_batching_refuses_images():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"inputs\[1\] holds the image token .*Use generate"):
        model.generate_batch(inputs=[[BOS, 5], [BOS, IMAGE_TOKEN, 5]])


def test_a_draft_model_that_knows_no_images_drafts_for_prompts_with_images():
    model = tiny_model("llama").eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    draft = randomize(transformers.LlamaForCausalLM(TEXT_CONFIGS["llama"]())).eval()
    assert draft.config.vocab_size == VOCAB_SIZE
    steps = []
    draft.register_forward_hook(lambda *_: steps.append(1))
    prompts = prompts_from_rows([[BOS, "image", 5, 6]])
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(**prompts.prompt, **options)
    assert torch.equal(model.generate(**prompts.prompt, **options, assistant_model=draft), expected) and steps
    states = model.get_visual_states(prompts.pixel_values)
    inputs = {name: x for name, x in prompts.prompt.items() if name != "pixel_values"}
    assert torch.equal(model.generate(**inputs, **options, visual_states=states, assistant_model=draft), expected)


# --- arguments --------------------------------------------------------------------------------------------------------


def test_arguments_that_nobody_here_takes_reach_the_attention_function_of_every_layer(monkeypatch):
    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    sdpa, seen = functions["sdpa"], []

    def watching(module, *args, **kwargs):
        if "of_a_later_release" in kwargs:  # not in the encoder
            seen.append((module.layer_idx, kwargs.pop("of_a_later_release")))
        return sdpa(module, *args, **kwargs)

    monkeypatch.setitem(functions._global_mapping, "sdpa", watching)
    model = tiny_model("llama", attn_implementation="sdpa")
    layers = list(range(len(model.language_model.layers)))
    for rows in (ROWS, ROWS[:1], [[BOS, 5, 6]]):
        seen.clear()
        inputs = prompts_from_rows(rows).inputs
        model(**inputs, of_a_later_release=7)
        assert [index for index, value in seen if value == 7] == layers


def test_arguments_of_the_encoder_reach_it():
    model = tiny_model("llama", "clip")
    assert "interpolate_pos_encoding" in inspect.signature(model.vision_tower.vision_model.forward).parameters
    size = model.config.vision_config.image_size * 2
    tokens = model.config.image_seq_length * 4
    prompts = prompts_from_rows([[BOS, "image", 5]], seq_length=tokens)
    pixels = torch.randn(1, 3, size, size)
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask, "pixel_values": pixels}
    with torch.no_grad():
        found = model(**inputs, interpolate_pos_encoding=True).image_hidden_states
        expected = model.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output[0]
    assert torch.equal(found, expected)


def test_the_cache_has_either_name():
    model = tiny_model("llama")
    prompts = prompts_from_rows([[BOS, "image", 5, 6]])
    with torch.no_grad():
        first = model(**prompts.inputs, use_cache=True)
        assert first.cache is first.past_key_values is first["cache"] is first["past_key_values"]
        token, logits = torch.tensor([[7]]), []
        for name in ("cache", "past_key_values"):
            cache = model(**prompts.inputs, use_cache=True).cache
            for part, length in ((model, 1), (model.model, 2), (model.language_model, 3)):
                outputs = part(input_ids=token, use_cache=True, **{name: cache})
                assert outputs[CACHE].get_seq_length() == prompts.input_ids.shape[1] + length
                logits.append(outputs[0])
        assert all(torch.equal(a, b) for a, b in zip(logits[:3], logits[3:]))
        with pytest.raises(ValueError, match="past_key_values or cache, got both"):
            model(input_ids=token, cache=first.cache, past_key_values=transformers.DynamicCache())


def test_generate_takes_the_cache_under_either_name():
    model = tiny_model("llama").eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    prompts = prompts_from_rows([[BOS, "image", 5, 6]])
    written = []
    for name in ("cache", "past_key_values"):
        cache = transformers.DynamicCache(config=model.config.get_text_config())
        written.append(model.generate(**prompts.prompt, max_new_tokens=5, do_sample=False, **{name: cache}))
        assert cache.get_seq_length() == prompts.input_ids.shape[1] + 4
    assert torch.equal(*written)
