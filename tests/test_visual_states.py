"""Visual states: pictures encoded once stand for their pixels in any prompt, belong to one model's weights, and survive the
disk."""

import copy
import os

import pytest
import safetensors.torch
import torch
from implementations import IMPLEMENTATIONS, runnable
from tiny_models import BOS, PAD, TEXT_CONFIGS, VOCAB_SIZE, prompts_from_rows, random_prompts, tiny_model

from saisa_hf import SaisaForConditionalGeneration, SaisaVisualStates, token_layout_saisa


STORES = ["keys_values", "features"]
MODELS = {
    "llama": {},
    "qwen3": {},
    "mistral_window": {},
    "qwen2_window": {"visual_layers": [0, 2]},
    "llama_biases": {"projector_sharing": "shared"},
    "yarn_scaling": {"vision": "siglip"},
    "llama3_scaling": {"vision": "dinov2", "vision_feature_layer": [-2, -1]},
}


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.fixture
def states(model):
    """Of five pictures."""
    return model.get_visual_states(pictures(5))


def pictures(n, seed=0):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def without_pixels(arguments):
    return {name: value for name, value in arguments.items() if name != "pixel_values"}


# --- in place of pixels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("text", MODELS)
def test_logits_are_those_from_pixels(text, store, side):
    model, prompts = tiny_model(text, **MODELS[text]), random_prompts(1, side)
    states = model.get_visual_states(prompts.pixel_values, store)
    assert len(states) == sum(prompts.images) and states.store == store
    with torch.no_grad():
        expected = model(**prompts.inputs).logits
        close(model(**without_pixels(prompts.inputs), visual_states=states).logits, expected)
        embeds = {"inputs_embeds": model.get_input_embeddings()(prompts.input_ids), "input_ids": None}
        close(model(**{**without_pixels(prompts.inputs), **embeds}, visual_states=states).logits, expected)
        close(model.model(**without_pixels(prompts.inputs), visual_states=states)[0], model.model(**prompts.inputs)[0])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("store", STORES)
def test_generation_is_that_from_pixels(store, implementation):
    model, prompts = tiny_model("qwen3", attn_implementation="sdpa"), random_prompts(2)
    settings = [
        {"do_sample": False},
        {"do_sample": False, "cache_implementation": "static"},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"prompt_lookup_num_tokens": 2, "do_sample": False, "eos_token_id": PAD},  # 4.57 wants one there
    ]
    for options in settings:
        one = prompts.row(2) if "prompt_lookup_num_tokens" in options else prompts
        expected = model.generate(**one.prompt, max_new_tokens=6, **options)
        states = model.get_visual_states(one.pixel_values, store)
        with runnable():
            model.set_attn_implementation({"text_config": implementation})
            again = model.generate(**without_pixels(one.prompt), visual_states=states, max_new_tokens=6, **options)
            model.set_attn_implementation({"text_config": "sdpa"})
        assert torch.equal(again, expected), options


@pytest.mark.parametrize("pictures", ["all", "new"])
def test_a_conversation_goes_on_with_states(pictures):
    """A picture of a later turn, with the states of the whole conversation or of that turn alone."""
    model = tiny_model("llama")
    first, second = [BOS, 5, "image", 6], [7, "image", "image", 8, 9]
    whole = prompts_from_rows([first + second])
    states = model.get_visual_states(whole.pixel_values)
    stop = len(prompts_from_rows([first]).input_ids[0])
    with torch.no_grad():
        cache = model(input_ids=whole.input_ids[:, :stop], visual_states=states[:1], use_cache=True).past_key_values
    given = states if pictures == "all" else states[1:]
    options = {"max_new_tokens": 6, "do_sample": False}
    answer = model.generate(
        whole.input_ids, attention_mask=whole.attention_mask, past_key_values=cache, visual_states=given, **options
    )
    assert torch.equal(answer, model.generate(**whole.prompt, **options))


def test_one_picture_serves_prompts_in_which_it_stands_at_different_places(model):
    rows = [[BOS, "image", 5], [6, 7, 8, "image", 9], [BOS, 10, 11], [12, "image", 13, 14, "image", 15]]
    prompts, one = prompts_from_rows(rows), pictures(1)
    states = model.get_visual_states(one)
    with torch.no_grad():
        expected = model(**{**prompts.inputs, "pixel_values": one.expand(4, -1, -1, -1)}).logits
        close(model(**without_pixels(prompts.inputs), visual_states=states.expand(4)).logits, expected)


@pytest.mark.parametrize("positions", ["the same", "shifted in one row"])
@pytest.mark.parametrize("images", [1, 2])
def test_equal_layouts_share_the_rows_of_their_pictures(model, images, positions):
    rows = [[BOS, *["image"] * images, 5, 6, "image", 7], [BOS, *["image"] * images, 8, 9, "image", 10]]
    prompts, some = prompts_from_rows(rows), pictures(images + 1)
    states = model.get_visual_states(some)
    position_ids = prompts.position_ids.clone()
    position_ids[1] += 3 * (positions != "the same")
    inputs = {**prompts.inputs, "position_ids": position_ids}
    with torch.no_grad():
        expected = model(**{**inputs, "pixel_values": some.repeat(2, 1, 1, 1)}).logits
        close(model(**without_pixels(inputs), visual_states=states.expand(2)).logits, expected)
        # and rows of unlike pictures in the same places do not
        order = list(range(images + 1)) + list(reversed(range(images + 1)))
        expected = model(**{**inputs, "pixel_values": some[order]}).logits
        close(model(**without_pixels(inputs), visual_states=states[order]).logits, expected)


@pytest.mark.parametrize("cached_bytes", [1, 2**19])
@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_keys_written_in_place_are_those_that_are_joined(text, cached_bytes, monkeypatch):
    """With gradients they are joined; without, on a CPU, written a few heads at a time."""
    monkeypatch.setattr(token_layout_saisa, "CACHED_BYTES", cached_bytes)
    model = tiny_model(text)
    prompts = prompts_from_rows([[BOS, "image", 4, 5, "image", "image", 6], [BOS, "image", 7, 8, "image", "image", 9]])
    own = {"input_ids": prompts.input_ids, "pixel_values": prompts.pixel_values}
    shared = {"input_ids": prompts.input_ids, "visual_states": model.get_visual_states(pictures(3)).expand(2)}
    for arguments in (own, shared):
        joined = model(**arguments)
        with torch.no_grad():
            written = model(**arguments)
        assert joined.logits.requires_grad and torch.equal(written.logits, joined.logits)
        for before, after in zip(joined.past_key_values.layers, written.past_key_values.layers):
            assert torch.equal(before.keys, after.keys) and torch.equal(before.values, after.values)


def test_pictures_of_unlike_sizes():
    model = tiny_model("llama", vision="siglip2")
    shapes = torch.tensor([[2, 2], [1, 3], [1, 1]])
    mask = (torch.arange(4) < shapes.prod(-1)[:, None]).long()
    patches = torch.randn(3, 4, 4 * 4 * 3, generator=torch.Generator().manual_seed(0))
    encoder = {"pixel_attention_mask": mask, "spatial_shapes": shapes}
    states = model.get_visual_states(patches, **encoder)
    assert states.lengths == [4, 3, 1] and states[[2, 1]].lengths == [1, 3]
    image = model.config.image_token_id
    ids = torch.tensor([[BOS, *[image] * 4, 5, *[image] * 3, 6, image, 7]])
    with torch.no_grad():
        close(model(ids, visual_states=states).logits, model(ids, pixel_values=patches, **encoder).logits)
        moved = torch.tensor([[BOS, image, 5, *[image] * 4, 6, *[image] * 3, 7]])
        order = torch.tensor([2, 0, 1])
        expected = model(moved, patches[order], pixel_attention_mask=mask[order], spatial_shapes=shapes[order]).logits
        close(model(moved, visual_states=states[order]).logits, expected)


@pytest.mark.parametrize("store", ["keys_values", "features"])
def test_under_autocast_a_model_takes_its_own_states(model, store):
    prompts = random_prompts(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        states = model.get_visual_states(prompts.pixel_values, store=store)
        model(prompts.input_ids, attention_mask=prompts.attention_mask, visual_states=states)
        beams = model.generate(
            prompts.input_ids, attention_mask=prompts.attention_mask, pixel_values=prompts.pixel_values, num_beams=2,
            max_new_tokens=3,
        )  # fmt: skip
    assert states.dtype == torch.float32 and beams.shape[1] == prompts.input_ids.shape[1] + 3


def test_of_an_album_of_features_the_pictures_that_are_asked_for_are_projected(model, monkeypatch):
    prompt, projected = prompts_from_rows([[BOS, "image", 5, 6]]), []
    projector = model.model.language_model.layers[0].visual_projector
    hook = projector.register_forward_hook(lambda module, given, result: projected.append(len(given[0])))
    album = model.get_visual_states(torch.randn(9, 3, 8, 8), store="features")
    with torch.no_grad():
        logits = model(prompt.input_ids, visual_states=album[[4]]).logits
        assert torch.equal(model(prompt.input_ids, visual_states=album[[4]].to("cpu")).logits, logits)
    hook.remove()
    assert projected == [len(album.stored.features) // 9] * 2


def test_nothing_visual_is_computed_again(model):
    prompts = random_prompts(3)
    states = {store: model.get_visual_states(prompts.pixel_values, store) for store in STORES}
    rows = {}
    layer = model.model.language_model.layers[1]

    def rows_of(x):
        return len(x) if x.ndim == 4 else x.shape[:-1].numel()

    watched = {
        "encoder": model.model.vision_tower,
        "projector": layer.visual_projector,
        "keys": layer.self_attn.k_proj,
        "values": layer.self_attn.v_proj,
    }
    for name, module in watched.items():
        module.register_forward_hook(
            lambda _module, args, kwargs, _output, name=name: rows.update(
                {name: rows.get(name, 0) + rows_of(args[0] if args else kwargs["pixel_values"])}
            ),
            with_kwargs=True,
        )
    text_B = (~prompts.visual & prompts.attention_mask.bool()).sum(1)
    text, visual = len(text_B) * int(text_B.max()), int(prompts.visual.sum())
    for store, expected in {
        "keys_values": {"keys": text, "values": text},
        "features": {"projector": visual, "keys": text + visual, "values": text + visual},
    }.items():
        rows.clear()
        model(**without_pixels(prompts.inputs), visual_states=states[store])
        assert rows == expected


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True, "num_return_sequences": 4}])
def test_many_answers_look_at_each_picture_once(model, options):
    prompts, seen = prompts_from_rows([[BOS, "image", 5, "image", 6], [BOS, 7, 8], [BOS, "image", 9]]), []
    model.model.vision_tower.register_forward_pre_hook(
        lambda _module, _, inputs: seen.append(len(inputs["pixel_values"])), with_kwargs=True
    )
    model.generate(**prompts.prompt, max_new_tokens=4, **options)
    assert seen == [3]


def test_an_answer_never_contains_the_placeholder(model):
    with torch.no_grad():
        model.lm_head.weight[model.config.image_token_id] = 100.0
    prompts = prompts_from_rows([[BOS, "image", 5]])
    states = model.get_visual_states(prompts.pixel_values)
    ids = model.generate(**without_pixels(prompts.prompt), visual_states=states, max_new_tokens=5, do_sample=False)
    assert not (ids[:, prompts.input_ids.shape[1] :] == model.config.image_token_id).any()


def test_text_alone_goes_with_no_states_or_none_of_them(model, states):
    ids = torch.tensor([[BOS, 5, 6]])
    with torch.no_grad():
        assert torch.equal(model(ids, visual_states=states[:0]).logits, model(ids).logits)


# --- what they hold ---------------------------------------------------------------------------------------------------


def test_memory_is_that_of_keys_and_values_or_of_features(model):
    config, visual = model.config, 5 * 4
    text = config.text_config
    h_kv = text.num_key_value_heads * text.hidden_size // text.num_attention_heads
    assert model.get_visual_states(pictures(5)).nbytes == 2 * visual * h_kv * text.num_hidden_layers * 4
    features = model.get_visual_states(pictures(5), "features")
    assert features.nbytes == visual * config.vision_feature_size * 4
    in_two_layers = tiny_model("llama", visual_layers=[0, 2])
    assert in_two_layers.get_visual_states(pictures(5)).nbytes == 2 * visual * h_kv * 2 * 4


def test_they_take_part_in_no_gradient(model):
    states = model.train().get_visual_states(pictures(1).requires_grad_())
    assert not any(x.requires_grad for x in states.stored.tensors().values())
    prompts = prompts_from_rows([[BOS, "image", 5, 6]])
    model(**without_pixels(prompts.inputs), visual_states=states, labels=prompts.input_ids).loss.backward()
    assert model.model.language_model.layers[0].mlp.up_proj.weight.grad.abs().max() > 0
    assert model.model.language_model.layers[0].visual_projector.linear_1.weight.grad is None


# --- a sequence of pictures -------------------------------------------------------------------------------------------


def pictures_of(states):
    """What each picture consists of, as one list of tensors per picture."""
    rows = states.rows()
    tensors = states.stored.tensors().values()
    gathered = [x if rows is None else x[rows] for x in tensors]
    return list(zip(*(x.split(states.lengths) for x in gathered)))


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for one, other in zip(a, b) for x, y in zip(one, other))


@pytest.mark.parametrize(
    "index, expected",
    [
        (0, [0]),
        (-1, [4]),
        (slice(1, 3), [1, 2]),
        (slice(None, None, -1), [4, 3, 2, 1, 0]),
        ([2, 0, 0], [2, 0, 0]),
        (torch.tensor([3, 1]), [3, 1]),
        (torch.tensor(3), [3]),
        (range(2), [0, 1]),
        ([], []),
        ((-2,), [3]),
    ],
)
def test_selecting_selects_pictures(states, index, expected):
    chosen, all_of_them = states[index], pictures_of(states)
    assert len(chosen) == len(expected)
    if expected:
        assert same(pictures_of(chosen), [all_of_them[i] for i in expected])


def test_selections_of_selections_and_joins(states):
    all_of_them = pictures_of(states)
    assert same(pictures_of(states[[4, 2, 0]][1:].expand(2)), [all_of_them[i] for i in (2, 0, 2, 0)])
    joined = SaisaVisualStates.cat([states[[3]], states[[1, 1]].to(torch.float32), states[0]])
    assert same(pictures_of(joined), [all_of_them[i] for i in (3, 1, 1, 0)])
    assert same([picture for one in states for picture in pictures_of(one)], all_of_them)  # iteration ends


def test_expanding_and_selecting_copy_nothing(states):
    for derived in (states.expand(100), states[1:4], states[[2, 0, 0]], states[3], copy.deepcopy(states)):
        assert derived.stored is states.stored
    assert len(states.expand(100)) == 500
    assert SaisaVisualStates.cat([states[0], states[2].expand(3)]).stored is states.stored


def test_joining_of_different_encodings_keeps_each_picture_once(model, states):
    other = model.get_visual_states(pictures(2, seed=1))
    joined = SaisaVisualStates.cat([states[[1]].expand(10), other])
    assert len(joined) == 12 and len(joined.stored.lengths) == 3
    assert same(pictures_of(joined), pictures_of(states[1]) * 10 + pictures_of(other))


def test_moving_and_casting(states):
    half = states[[4, 4]].to(torch.bfloat16)
    assert half.dtype == torch.bfloat16 and states.dtype == torch.float32 and len(half) == 2
    assert (
        half.nbytes == states.nbytes / 5 / 2
    )  # the pictures that are not in it are gone, the one that is, is there once
    assert (
        states.to("meta").device.type == "meta" and states.to(device="cpu", dtype=torch.float64).dtype == torch.float64
    )
    close(pictures_of(half)[0][0].float(), pictures_of(states[4])[0][0], 0.05)


def test_a_cast_serves_the_cast_model(model):
    prompts = random_prompts(4)
    states = model.get_visual_states(prompts.pixel_values).to(torch.bfloat16)
    half = copy.deepcopy(model).to(torch.bfloat16)
    with torch.no_grad():
        ours = half(**without_pixels(prompts.inputs), visual_states=states).logits.float()
        exact = model(**prompts.inputs).logits
        plain = half(**prompts.to(torch.bfloat16).inputs).logits.float()
    assert (ours - exact).square().mean() <= 1.5 * (plain - exact).square().mean()


@pytest.mark.parametrize("index, error", [(5, IndexError), (-6, IndexError), ([0, 9], IndexError), ("0", TypeError)])
def test_a_wrong_index_is_named(states, index, error):
    with pytest.raises(error):
        states[index]


def test_booleans_and_floats_are_no_indices(states):
    for index in ([True, False], 1.0, torch.tensor([True] * 5), None):
        with pytest.raises(TypeError):
            states[index]


@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_expand_wants_a_number_of_prompts(states, n):
    with pytest.raises(ValueError, match="n="):
        states.expand(n)


def test_states_that_do_not_belong_together_are_not_joined(model, states):
    for other, name in (
        (model.get_visual_states(pictures(1), "features"), "store"),
        (tiny_model("llama", seed=1).get_visual_states(pictures(1)), "fingerprint"),
        (states.to(torch.bfloat16), "dtype"),
    ):
        with pytest.raises(ValueError, match=name):
            SaisaVisualStates.cat([states, other])
    with pytest.raises(ValueError, match="empty"):
        SaisaVisualStates.cat([])


def test_their_representation_says_what_they_are(states):
    assert repr(states[:2]).startswith(
        "SaisaVisualStates(2 images, 8 visual tokens, store='keys_values', torch.float32, cpu"
    )


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, options", [("llama", {}), ("qwen3", {"visual_layers": [1]})])
@pytest.mark.parametrize("store", STORES)
def test_what_is_saved_is_what_is_loaded(tmp_path, text, options, store):
    model, prompts = tiny_model(text, **options), random_prompts(5)
    states = model.get_visual_states(torch.cat([pictures(2), prompts.pixel_values]), store)[2:]
    states.save(tmp_path / "states.safetensors")
    loaded = SaisaVisualStates.load(tmp_path / "states.safetensors")
    assert same(pictures_of(loaded), pictures_of(states))
    assert os.listdir(tmp_path) == ["states.safetensors"]
    with torch.no_grad():
        expected = model(**prompts.inputs).logits
        close(model(**without_pixels(prompts.inputs), visual_states=loaded).logits, expected)


def test_repeated_pictures_are_saved_once(states, tmp_path):
    states[[3]].expand(50).save(tmp_path / "one")
    assert len(SaisaVisualStates.load(tmp_path / "one")) == 50
    tensors = safetensors.torch.load_file(tmp_path / "one")
    assert sum(x.numel() * x.element_size() for x in tensors.values()) == states.nbytes / 5


def test_an_interrupted_save_leaves_the_file_that_was_there(states, tmp_path, monkeypatch):
    path = tmp_path / "states"
    states.save(path)
    before = path.read_bytes()

    def fail(_tensors, path, **_options):
        path.write_bytes(before[:100])
        raise OSError("no space left")

    monkeypatch.setattr("saisa_hf.visual_states_saisa.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        states[:1].save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["states"]


def test_files_that_hold_no_states_are_named(states, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        SaisaVisualStates.load(tmp_path / "nowhere")
    safetensors.torch.save_file({"features": torch.zeros(4, 24)}, tmp_path / "other")
    with pytest.raises(ValueError, match="holds no visual states"):
        SaisaVisualStates.load(tmp_path / "other")
    states.save(tmp_path / "cut")
    (tmp_path / "cut").write_bytes((tmp_path / "cut").read_bytes()[:-10])
    with pytest.raises(ValueError, match="no safetensors file"):
        SaisaVisualStates.load(tmp_path / "cut")


# --- the weights they belong to ---------------------------------------------------------------------------------------


def use(model, states, rows=(("image", 5),), **changes):
    prompts = prompts_from_rows([[BOS, *row] for row in rows])
    return model(**{**without_pixels(prompts.inputs), **changes}, visual_states=states)


def test_states_of_another_model_are_refused(states):
    with pytest.raises(ValueError, match=r"other weights than this model's.*get_visual_states"):
        use(tiny_model("llama", seed=1), states[0])


@pytest.mark.parametrize(
    "part", ["vision_tower", "layers.1.visual_projector", "layers.2.input_layernorm", "layers.0.self_attn.v_proj"]
)
def test_states_from_before_training_are_refused(model, part):
    states = model.get_visual_states(pictures(1))
    use(model, states)
    weight = next(p for name, p in model.named_parameters() if part in name)
    with torch.no_grad():
        weight.view(-1)[-1] += 1.0
    with pytest.raises(ValueError, match="other weights"):
        use(model, states)
    use(model, model.get_visual_states(pictures(1)))


def test_training_what_they_do_not_depend_on_keeps_them(model):
    states = model.get_visual_states(pictures(1))
    features = model.get_visual_states(pictures(1), "features")
    with torch.no_grad():
        model.model.language_model.layers[0].mlp.up_proj.weight += 1.0
        model.lm_head.weight += 1.0
    use(model, states)
    with torch.no_grad():
        model.model.language_model.layers[0].visual_projector.linear_1.weight += 1.0
    use(model, features)


@pytest.mark.parametrize("store", STORES)
def test_the_saved_and_loaded_model_takes_them(model, tmp_path, store):
    states = model.get_visual_states(pictures(1), store)
    model.save_pretrained(tmp_path)
    again = SaisaForConditionalGeneration.from_pretrained(tmp_path)
    close(use(again, states).logits, use(model, states).logits)


def test_states_of_the_wrong_kind_are_refused(model, states):
    shallow = TEXT_CONFIGS["llama"]()
    shallow.num_hidden_layers = 2
    for wrong, error, message in (
        (tiny_model(shallow).get_visual_states(pictures(1)), ValueError, "2 layers, the model 3"),
        (
            tiny_model("qwen3").get_visual_states(pictures(1)),
            ValueError,
            r"\(2, 12\) numbers a token, the model \(4, 8\)",
        ),
        (
            tiny_model("llama", vision_feature_layer=[-2, -1]).get_visual_states(pictures(1), "features"),
            ValueError,
            r"\(48,\) numbers a token, the model \(24,\)",
        ),
        (states[0].to(torch.bfloat16), ValueError, r"cast them with visual_states.to\(torch.float32\)"),
        (pictures(1), TypeError, "get_visual_states"),
    ):
        with pytest.raises(error, match=message):
            use(model, wrong)


@pytest.mark.parametrize("count", [1, 3])
def test_placeholders_and_states_have_to_match(model, states, count):
    rows = [["image", 5], ["image", 6]]
    with pytest.raises(
        ValueError, match=f"visual_states holds {count} images with {4 * count} visual tokens.*8 placeholders"
    ):
        use(model, states[:count], rows)
    prompts = prompts_from_rows([[BOS, *row] for row in rows])
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(ValueError, match="placeholders"):
            model.generate(**without_pixels(prompts.prompt), visual_states=states[:count], max_new_tokens=3, **options)


def test_pixels_and_states_together_are_refused(model, states):
    prompts = prompts_from_rows([[BOS, "image", 5]])
    with pytest.raises(ValueError, match="pixel_values or visual_states, got both"):
        model(**prompts.inputs, visual_states=states[:1])
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(ValueError, match="pixel_values or visual_states, got both"):
            model.generate(**prompts.prompt, visual_states=states[:1], max_new_tokens=3, **options)


def test_an_unknown_store_is_named(model):
    with pytest.raises(ValueError, match="store='keys'"):
        model.get_visual_states(pictures(1), "keys")


def test_a_prompt_that_ends_in_a_picture_is_refused(model, states):
    prompts = prompts_from_rows([[BOS, 5, "image"]])
    with pytest.raises(ValueError, match="visual tokens predict nothing"):
        model.generate(**without_pixels(prompts.prompt), visual_states=states[:1], max_new_tokens=2)


# --- many questions ---------------------------------------------------------------------------------------------------


def test_a_hundred_questions_about_one_picture(model):
    """Of any length, with the picture anywhere: in one batch and one by one, the answers from pixels."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(100):
        words = torch.randint(
            3, VOCAB_SIZE - 1, (int(torch.randint(2, 12, (), generator=generator)),), generator=generator
        )
        at = int(torch.randint(0, len(words), (), generator=generator))
        rows.append([BOS, *words[:at].tolist(), "image", *words[at:].tolist()])
    prompts, one = prompts_from_rows(rows), pictures(1)
    states, options = model.get_visual_states(one), {"max_new_tokens": 5, "do_sample": False}
    seen = []
    model.model.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    together = model.generate(**without_pixels(prompts.prompt), visual_states=states.expand(100), **options)[:, -5:]
    assert not seen
    for b in range(100):
        row = prompts.row(b)
        alone = model.generate(**without_pixels(row.prompt), visual_states=states, **options)[0, -5:]
        expected = model.generate(**{**row.prompt, "pixel_values": one}, **options)[0, -5:]
        assert torch.equal(alone, expected) and torch.equal(together[b], expected)
