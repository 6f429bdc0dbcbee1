"""Visual states: pictures encoded once stand for their pixels in any prompt, belong to one model's weights, and survive the
disk."""

import copy
import os
import signal

import pytest
import safetensors.torch
import torch
import torch.nn.utils.prune as prune
from implementations import IMPLEMENTATIONS, runnable
from tiny_models import (
    BOS,
    OTHER_VISION_CONFIGS,
    PAD,
    TEXT_CONFIGS,
    VOCAB_SIZE,
    prompts_from_rows,
    random_prompts,
    tiny_model,
)

from saisa_hf import (
    SaisaForConditionalGeneration,
    SaisaVisualStates,
    hardware_saisa,
    saving_saisa,
    token_layout_saisa,
    visual_states_saisa,
)


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


def test_a_file_without_an_images_layer_is_refused(tmp_path):
    """Of a model with a layer that sees no image: its file says so, and one from before that did can lack whole layers."""
    model, path = tiny_model("llama", visual_layers=[0, 2]), tmp_path / "states"
    model.get_visual_states(pictures(2)).save(path)
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    earlier = {name: x for name, x in metadata.items() if name != "image_layers"}
    for name in tensors:
        others = {key: x for key, x in tensors.items() if key != name}
        for given in (metadata, earlier):
            safetensors.torch.save_file(others, path, given)
            with pytest.raises(ValueError, match=f"{path} lacks '{name}'"):
                SaisaVisualStates.load(path)
    whole = {name: x for name, x in tensors.items() if "0" in name}
    safetensors.torch.save_file(whole, path, earlier)
    lacking = SaisaVisualStates.load(path)
    assert lacking.stored.keys_values[2] is None
    with pytest.raises(ValueError, match=r"or not those that see images.*get_visual_states"):
        model.model.check_visual_states(lacking)
    safetensors.torch.save_file(whole, path, metadata)
    with pytest.raises(ValueError, match=r"lacks 'keys\.2'"):
        SaisaVisualStates.load(path)


def test_numbers_that_are_none_are_neither_saved_nor_loaded(states, tmp_path):
    states.save(tmp_path / "states")
    tensors = safetensors.torch.load_file(tmp_path / "states")
    with safetensors.safe_open(tmp_path / "states", "pt") as file:
        metadata = file.metadata()
    for number in (float("nan"), float("inf"), -float("inf")):
        broken = {**tensors, "values.1": tensors["values.1"].clone()}
        broken["values.1"][-1, -1, -1] = number
        safetensors.torch.save_file(broken, tmp_path / "broken", metadata)
        with pytest.raises(ValueError, match=r"broken: values\.1 .* NaN or infinity"):
            SaisaVisualStates.load(tmp_path / "broken")
    states = states[:1].to(torch.float64)
    states.stored.keys_values[0][0][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"new: keys\.0 .* NaN or infinity"):
        states.save(tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["broken", "states"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_other_dtypes_and_no_pictures_at_all_come_back(states, tmp_path, dtype):
    for some in (states, states[:0]):
        some.to(dtype).save(tmp_path / "states")
        again = SaisaVisualStates.load(tmp_path / "states")
        assert again.dtype == dtype and again.lengths == some.lengths and again.num_layers == 3


def test_what_a_killed_save_leaves_goes_with_the_next(states, tmp_path):
    (path := tmp_path / "states [1]").write_text("before")
    (tmp_path / ".other.host-1.0123abcd").touch()
    child = os.fork()
    if not child:

        def save_file(_tensors, part, **_options):
            part.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

        visual_states_saisa.save_file = save_file
        states.save(path)
    os.waitpid(child, 0)
    assert path.read_text() == "before" and len(os.listdir(tmp_path)) == 3
    with saving_saisa.hidden_folder(tmp_path, ".states [1].", ".partial") as living:  # of one that is still at work
        states.save(path)
        assert sorted(os.listdir(tmp_path)) == sorted([".other.host-1.0123abcd", living.name, path.name])
    assert len(SaisaVisualStates.load(path)) == 5


def test_its_permissions_are_those_of_any_new_file(states, tmp_path):
    before = os.umask(0o027)
    try:
        states.save(tmp_path / "states")
    finally:
        os.umask(before)
    assert (tmp_path / "states").stat().st_mode & 0o777 == 0o640


# --- the weights they belong to ---------------------------------------------------------------------------------------


def use(model, states, rows=(("image", 5),), **changes):
    prompts = prompts_from_rows([[BOS, *row] for row in rows])
    return model(**{**without_pixels(prompts.inputs), **changes}, visual_states=states)


def test_states_of_another_model_are_refused(states):
    with pytest.raises(ValueError, match=r"other weights or settings than this model's.*get_visual_states"):
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


def nudge(weight):
    weight.view(-1)[-1] += 1.0


CHANGES = {
    "through .data": lambda w, m: nudge(w.data),
    "another .data": lambda w, m: setattr(w, "data", w.data + 1),
    "rows that change places": lambda w, m: w.data.copy_(w.data.flip(0).clone()),
    "columns that change places": lambda w, m: w.data.copy_(w.data.flip(1).clone()),
    "other signs": lambda w, m: w.data.neg_(),
    "without gradients": torch.no_grad()(lambda w, m: nudge(w)),
    "copied in": torch.no_grad()(lambda w, m: w.copy_(w + 1)),
    "in inference mode": torch.inference_mode()(lambda w, m: nudge(w.data)),
    "through NumPy": lambda w, m: nudge(torch.from_numpy(w.detach().numpy())),
    "a state dict": lambda w, m: m.load_state_dict({name: x + 0.5 for name, x in m.state_dict().items()}),
    "an assigned one": lambda w, m: m.load_state_dict({k: x + 0.5 for k, x in m.state_dict().items()}, assign=True),
    "another parameter": lambda w, m: setattr(m, "weight", torch.nn.Parameter(w.detach() + 1)),
    "a parametrization": lambda w, m: torch.nn.utils.parametrize.register_parametrization(m, "weight", Doubled()),
    "pruning": lambda w, m: prune.l1_unstructured(m, "weight", 0.5),
    "weight norm": lambda w, m: torch.nn.utils.parametrizations.weight_norm(m).parametrizations.weight[0].register_buffer(
        "unused", torch.zeros(1)
    ) or m.parametrizations.weight.original0.data.mul_(2),
}  # fmt: skip


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("change", CHANGES)
def test_however_weights_change_states_from_before_are_refused(model, change, store):
    """Or give the same logits."""
    encoder = next(m for name, m in model.model.vision_tower.named_modules() if name.endswith("fc1"))
    for module in (
        encoder,
        model.model.language_model.layers[1].self_attn.k_proj,
        model.model.language_model.layers[2].visual_projector.linear_1,
    ):
        states = model.get_visual_states(pictures(1), store)
        with torch.no_grad():
            before = use(model, states).logits
            CHANGES[change](module.weight, module)
            again = model.get_visual_states(pictures(1), store)
            assert (use(model, again).logits - before).abs().max() > 1e-4
            if store == "keys_values" or module is encoder:
                with pytest.raises(ValueError, match="other weights"):
                    use(model, states)
                with pytest.raises(ValueError, match="other weights"):
                    model.generate(torch.tensor([[BOS, *[96] * 4, 5]]), visual_states=states, max_new_tokens=1)
            else:  # features do not depend on it, and are projected anew
                close(use(model, states).logits, use(model, again).logits)


def test_a_change_back_makes_states_valid_again_and_costs_no_second_digest(model, monkeypatch):
    states, weight = model.get_visual_states(pictures(1)), model.model.language_model.layers[0].self_attn.v_proj.weight
    weight.data += 1
    with pytest.raises(ValueError, match="other weights"):
        use(model, states)
    weight.data -= 1
    weight.data.copy_(weight.data.to(torch.bfloat16).float())
    use(model, model.get_visual_states(pictures(1)))
    monkeypatch.setattr(hardware_saisa, "_pieces", None)
    use(model, model.get_visual_states(pictures(1)))


def test_buffers_that_are_saved_count():
    """The running statistics of an encoder's batch norms."""
    model = tiny_model("llama", vision=OTHER_VISION_CONFIGS["resnet"]())
    shape = model.get_image_features(pixels := torch.randn(1, 3, 32, 32)).pooler_output
    states = model.get_visual_states(pixels, "features")
    norm = next(m for m in model.model.vision_tower.modules() if isinstance(m, torch.nn.BatchNorm2d))
    norm.running_mean.data += 1
    again = model.get_image_features(pixels).pooler_output
    assert not torch.equal(shape[0], again[0])
    with pytest.raises(ValueError, match="other weights"):
        model.model.check_visual_states(states)


def test_of_a_large_encoder_a_sample_is_looked_at(model, monkeypatch):
    """Whole rows of its weights, where these are long, and all of the decoder's."""
    monkeypatch.setattr(hardware_saisa, "SAMPLED_FROM", 1)
    model.model.vision_tower.wide = torch.nn.Linear(8192, 7)
    states = model.get_visual_states(pictures(1))
    weight = model.model.vision_tower.wide.weight.data
    before = weight.clone()
    for change in (slice(3, 4), (slice(None), slice(5, 6))):
        weight[change] += 1
        with pytest.raises(ValueError, match="other weights"):
            use(model, states)
        weight.copy_(before)
    weight.view(-1)[1000] += 1
    use(model, states)  # what the page about them warns of
    with torch.no_grad(), pytest.raises(ValueError, match="other weights"):
        model.model.vision_tower.wide.weight.view(-1)[1000] += 1  # which PyTorch counts
        use(model, states)
    states = model.get_visual_states(pictures(1))
    model.model.language_model.layers[0].self_attn.k_proj.weight.data[3, 5] += 1
    with pytest.raises(ValueError, match="other weights"):
        use(model, states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("size", [2, 3, 9, 8191])
def test_a_checksum_is_of_every_element(dtype, size):
    """Of tensors that fill no whole words, too, and of views that begin in the middle of one."""
    for x in (
        torch.ones(size, dtype=dtype),
        torch.ones(size + 1, dtype=dtype)[1:],
        torch.ones(size, 2, dtype=dtype)[:, 1],
    ):
        seen = {hardware_saisa._checksum([x], hardware_saisa.ROW)}
        for index in {0, size // 2, size - 1}:
            x[index] = 3
            seen.add(hardware_saisa._checksum([x], hardware_saisa.ROW))
            x[index] = 1
        assert len(seen) == 1 + len({0, size // 2, size - 1})


def test_a_parametrization_that_changes_and_weights_of_inference_mode(model):
    linear = model.model.vision_tower.extra = torch.nn.Linear(8, 8)
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", Doubled())
    states = model.get_visual_states(pictures(1))
    nudge(linear.parametrizations.weight.original.data)
    with pytest.raises(ValueError, match="other weights"):
        use(model, states)
    with torch.inference_mode():
        model = tiny_model("llama")
        use(model, model.get_visual_states(pictures(1)))


# --- adapters ---------------------------------------------------------------------------------------------------------

TARGETS = r".*language_model.*\.(k_proj|v_proj)|.*visual_projector\.linear_[12]|.*vision_tower.*(q_proj|fc1)"


def adapted(**settings):
    """A model with adapters a and b, of which a is active."""
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS} | settings
    model = peft.get_peft_model(tiny_model("llama"), peft.LoraConfig(**settings), adapter_name="a")
    model.add_adapter("b", peft.LoraConfig(**settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ("lora_" in name and "magnitude" not in name) or "modules_to_save" in name:
                p.copy_(torch.randn_like(p) * 0.3)
    return model.eval()


def of_layers(model, method, *arguments):
    for module in model.modules():
        if hasattr(module, "merged_adapters") and hasattr(module, method):
            getattr(module, method)(*arguments)


SETTINGS = {
    "as it was": lambda model: None,
    "another": lambda model: model.set_adapter("b"),
    "both": lambda model: model.base_model.set_adapter(["a", "b"]),
    "disabled": lambda model: of_layers(model, "enable_adapters", False),
    "scaled": lambda model: of_layers(model, "scale_layer", 0.5),
    "set to a scale": lambda model: of_layers(model, "set_scale", "a", 3.0),
    "merged": lambda model: model.merge_adapter(["a"]),
    "another merged": lambda model: model.merge_adapter(["b"]),
    "merged and disabled": lambda model: (model.merge_adapter(["a"]), of_layers(model, "enable_adapters", False)),
    "a mixture": lambda model: (
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "c", combination_type="linear"), model.set_adapter("c")
    ),
    "trained": lambda model: [p.data.add_(0.1) for name, p in model.named_parameters() if "lora_A.a" in name],
    "merged for good": lambda model: model.merge_and_unload(),
    "taken off": lambda model: model.unload(),
}  # fmt: skip


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["lora", "dora", "a copy of the projectors"])
def test_states_are_those_of_the_adapters_that_are_active(kind, setting):
    """Whatever is done to adapters: states are refused, or give the logits of new ones."""
    options = {"lora": {}, "dora": {"use_dora": True}}
    copies = {"target_modules": r".*self_attn\.[kv]_proj", "modules_to_save": ["linear_2"]}
    if (kind == "dora" and setting == "a mixture") or (kind not in options and setting in ("both", "a mixture")):
        pytest.skip("PEFT knows no such thing")
    model = adapted(**options.get(kind, copies))
    core = model.base_model.model
    with torch.no_grad():
        states = {"a": core.get_visual_states(pictures(1))}
        model.set_adapter("b")
        states["b"] = core.get_visual_states(pictures(1))
        with model.disable_adapter():
            states["none"] = core.get_visual_states(pictures(1))
        model.set_adapter("a")
        for _ in range(2):  # the second time with what was remembered
            use(core, states["a"])
        SETTINGS[setting](model)
        expected, accepted = None, set()
        for name, given in states.items():
            try:
                found = use(core, given).logits
                accepted.add(name)
            except ValueError as error:
                assert "other weights" in str(error)
                continue
            expected = use(core, core.get_visual_states(pictures(1))).logits
            close(found, expected)
    wanted = {"as it was": {"a"}, "another": {"b"}, "disabled": {"none"}, "taken off": {"none"}}
    if kind in options or setting != "taken off":  # which keeps PEFT's copies
        assert accepted == wanted.get(setting, set())


def test_merged_adapters_that_are_then_disabled_count():
    """They are taken out of the weights at the next call."""
    model = adapted()
    model.merge_adapter(["a"])
    core = model.base_model.model
    states = core.get_visual_states(pictures(1))
    of_layers(model, "enable_adapters", False)
    with pytest.raises(ValueError, match="other weights"):
        use(core, states)


def test_adapters_that_are_not_active_do_not_count():
    model = adapted()
    core = model.base_model.model
    states = core.get_visual_states(pictures(1))
    for name, p in model.named_parameters():
        p.data += 1.0 if ".b." in name else 0.0
    model.delete_adapter("b")
    use(core, states)


def test_adapters_that_transformers_adds(model):
    peft = pytest.importorskip("peft")
    plain = model.get_visual_states(pictures(1))
    config = peft.LoraConfig(target_modules=r".*self_attn\.[kv]_proj", init_lora_weights=False)
    try:
        model.add_adapter(config, "a")
    except ValueError as error:
        if "version of PEFT" not in str(error):
            raise
        pytest.skip(str(error))  # the newest transformers want the newest PEFT
    states = model.get_visual_states(pictures(1))
    for given, other, switch in ((states, plain, "disable_adapters"), (plain, states, "enable_adapters")):
        use(model, given)
        with pytest.raises(ValueError, match="other weights"):
            use(model, other)
        getattr(model, switch)()


def test_adapters_that_differ_between_samples_take_features():
    model = adapted(target_modules=r".*language_model.*\.[kv]_proj")
    core, rows = model.base_model.model, [["image", 5], ["image", 5]]
    states = core.get_visual_states(pictures(1)).expand(2)
    prompts = prompts_from_rows([[BOS, *row] for row in rows])
    given = without_pixels(prompts.inputs)
    with pytest.raises(ValueError, match="adapters that differ between samples: use store='features'"):
        model(**given, visual_states=states, adapter_names=["a", "b"])
    options = {"adapter_names": ["a", "b"], "max_new_tokens": 3, "do_sample": False}
    pixels = {"pixel_values": pictures(1).repeat(2, 1, 1, 1)}
    expected = model.generate(**{**prompts.prompt, **pixels}, **options)
    features = core.get_visual_states(pictures(1), "features").expand(2)
    assert torch.equal(model.generate(**without_pixels(prompts.prompt), visual_states=features, **options), expected)


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


def test_weights_without_a_number_have_a_fingerprint():
    empty = torch.nn.Module()
    empty.weight = torch.nn.Parameter(torch.empty(0))
    without = hardware_saisa.weights_fingerprint(torch.nn.Module(), "features", {"part": empty}, [])
    empty.weight = torch.nn.Parameter(torch.ones(1))
    assert without != hardware_saisa.weights_fingerprint(torch.nn.Module(), "features", {"part": empty}, [])
