"""Embedding space: LLaVA, NAAViT in it, and what lies between are what transformers' LLaVA and a plain computation say."""

import json
import shutil

import pytest
import torch
from dense_reference import _feed_forward, _linear, _rms_norm, _rotate, _window, inverse_frequencies
from implementations import IMPLEMENTATIONS, runnable
from safetensors.torch import load_file, save_file
from test_flops import counted_and_formula
from test_throughput import labelled
from test_training import BRIGHT, DARK, collate, trainer_for
from tiny_models import (
    BOS,
    IMAGE_TOKEN,
    PAD,
    ROWS,
    TEXT_CONFIGS,
    VISION_CONFIGS,
    prompts_from_rows,
    random_prompts,
    randomize,
    tiny_config,
    tiny_model,
    vision_features,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    StaticCache,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration, SaisaModel
from saisa_hf.checkpoints.model_card import flops as card_flops
from saisa_hf.checkpoints.model_card import model_card
from saisa_hf.cli import main
from saisa_hf.costs.flops import Step, step_flops, training_flops
from saisa_hf.training.throughput import StepFlops


LAYERS = 3
GREEDY = {"max_new_tokens": 6, "do_sample": False}
LLAVA = {"visual_attention": "full"}
PILOT = {"visual_attention": "none"}
FROZEN = {"visual_attention": "none", "visual_feed_forward": False}
MIXED = {"visual_attention": ["none", "full", "none"], "visual_feed_forward": [True, False, False]}
FAMILY = {"llava": LLAVA, "pilot": PILOT, "frozen": FROZEN, "mixed": MIXED}
every_member = pytest.mark.parametrize("switches", FAMILY.values(), ids=FAMILY)


def member(switches, text="mistral", **options):
    return tiny_model(text, alignment="embedding_space", **switches, **options)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# --- LLaVA ------------------------------------------------------------------------------------------------------------


def make_llava(text="llama", vision="clip", **settings):
    """A random LLaVA of transformers whose generation never stops early."""
    config = LlavaConfig(
        text_config=TEXT_CONFIGS[text](), vision_config=VISION_CONFIGS[vision](), image_token_index=IMAGE_TOKEN,
        image_seq_length=4, **settings,
    )  # fmt: skip
    llava = randomize(LlavaForConditionalGeneration(config), gain=1.0).eval()
    llava.generation_config.pad_token_id, llava.generation_config.eos_token_id = PAD, None
    return llava


def loaded(llava, folder, **options):
    llava.save_pretrained(folder)
    model, info = SaisaForConditionalGeneration.from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def our_name(name):
    """What a parameter of transformers' LLaVA in memory is called here."""
    name = name.replace("multi_modal_projector", "visual_projector")
    flat = "vision_tower." in name and "vision_model." not in name
    return name.replace("vision_tower.", "vision_tower.vision_model.") if flat else name


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("llama", {}),
        ("mistral_window", {"vision_feature_layer": [-2, -1], "multimodal_projector_bias": False}),
        ("qwen2", {"vision_feature_select_strategy": "full", "projector_hidden_act": "relu", "image_seq_length": 5}),
    ],
    ids=["llama", "windows and two states", "tied head and class token"],
)
def test_a_llava_folder_gives_the_llavas_logits_text_loss_and_gradients(text, settings, tmp_path):
    tokens = settings.pop("image_seq_length", 4)
    llava = make_llava(text, **settings)
    model = loaded(llava, tmp_path)
    assert model.config.tie_word_embeddings == (text == "qwen2")
    for side in ("left", "right"):
        prompts = random_prompts(seed=2, side=side, seq_length=tokens)
        real = prompts.attention_mask.bool()
        labels = prompts.input_ids.masked_fill(~real, -100)
        for each in (llava, model):
            each.zero_grad()
        theirs = llava(**prompts.inputs, labels=labels, output_hidden_states=True)
        ours = model(**prompts.inputs, labels=labels, output_hidden_states=True)
        close(ours.logits[real], theirs.logits[real])
        for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True):
            close(a[real], b[real])
        close(ours.loss, theirs.loss)
        theirs.loss.backward()
        ours.loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        wanted = {our_name(name): p.grad for name, p in llava.named_parameters() if p.grad is not None}
        assert found.keys() == wanted.keys() and any("vision_tower" in name for name in found)
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
        close(model(**prompts.inputs, labels=labels, skip_logits=True).loss, theirs.loss)
    # beams over one picture a row: with several, transformers' LLaVA mixes them up
    one_each = prompts_from_rows([[BOS, 5, "image", 6], ["image", 7, 8]], seq_length=tokens)
    for prompts, options in ((random_prompts(seed=2, seq_length=tokens), {}), (one_each, {"num_beams": 3})):
        expected = llava.generate(**prompts.prompt, **GREEDY, **options, suppress_tokens=[IMAGE_TOKEN])
        assert torch.equal(model.generate(**prompts.prompt, **GREEDY, **options), expected)


def test_a_prompt_may_end_with_a_picture_and_the_label_behind_it_counts_as_in_llava(tmp_path):
    llava = make_llava()
    model = loaded(llava, tmp_path)
    prompts = prompts_from_rows([[BOS, 5, "image"]])
    expected = llava.generate(**prompts.prompt, **GREEDY, suppress_tokens=[IMAGE_TOKEN])
    assert torch.equal(model.generate(**prompts.prompt, **GREEDY), expected)
    prompts = prompts_from_rows([[BOS, "image", 7, 8]])
    behind = prompts.input_ids.masked_fill(prompts.input_ids != 7, -100)
    theirs = llava(**prompts.inputs, labels=behind).loss
    close(model(**prompts.inputs, labels=behind).loss, theirs)
    close(model(**prompts.inputs, labels=behind, skip_logits=True).loss, theirs)
    expected = -model(**prompts.inputs).logits[0, 4].log_softmax(-1)[7]  # from the picture's last token
    close(theirs, expected)


def layouts(llava):
    """The tensors under the names of 4.57's files, of 5.x's models, and of the encoder without a level in between."""
    named = {our_name(name).replace("visual_proj", "multi_modal_proj"): x for name, x in llava.state_dict().items()}
    yield named
    yield {name.replace("vision_tower.vision_model.", "vision_tower."): x for name, x in named.items()}
    old = {name.replace("model.language_model.", "language_model.model."): x for name, x in named.items()}
    old = {name.replace("lm_head.", "language_model.lm_head."): x for name, x in old.items()}
    yield {name.removeprefix("model."): x for name, x in old.items()}
    yield {
        name.removeprefix("model.").replace("language_model.model.", "language_model."): x for name, x in old.items()
    }


def test_every_layout_of_a_llavas_names_loads_into_both_classes(tmp_path):
    llava, prompts = make_llava(), random_prompts(seed=1)
    expected = loaded(llava, tmp_path)(**prompts.inputs)
    for number, tensors in enumerate(layouts(llava)):
        folder = shutil.copytree(tmp_path, tmp_path / str(number), ignore=lambda *_: {"0", "1", "2", "3"})
        save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
        model, info = SaisaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(model(**prompts.inputs).logits, expected.logits)
        hidden = SaisaModel.from_pretrained(folder)(**prompts.inputs).last_hidden_state
        assert torch.equal(model.lm_head(hidden), expected.logits)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[next(name for name in tensors if "multi_modal_projector.linear_1" in name)]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 of the model's tensors: model\.visual_projector\.linear_1"):
        SaisaForConditionalGeneration.from_pretrained(tmp_path)


def test_a_llavas_settings_are_taken_over_and_switches_may_be_given_by_name(tmp_path):
    llava, prompts = make_llava(), random_prompts()
    model = loaded(llava, tmp_path)
    config = model.config
    assert (config.alignment, config.visual_attention, config.visual_feed_forward) == ("embedding_space", "full", True)
    assert (config.image_token_id, config.image_seq_length, config.projector_sharing) == (IMAGE_TOKEN, 4, "shared")
    for switches in (PILOT, FROZEN, MIXED):
        other = SaisaForConditionalGeneration.from_pretrained(tmp_path, **switches)
        assert all(getattr(other.config, name) == value for name, value in switches.items())
        assert not torch.allclose(other(**prompts.inputs).logits, model(**prompts.inputs).logits, atol=1e-2)
        other.save_pretrained(tmp_path / "again")
        again = AutoModelForImageTextToText.from_pretrained(tmp_path / "again")
        assert torch.equal(again(**prompts.inputs).logits, other(**prompts.inputs).logits)
    with pytest.raises(ValueError, match="visual_attention='some': expected one of 'full', 'none'"):
        SaisaForConditionalGeneration.from_pretrained(tmp_path, visual_attention="some")
    config = json.loads((tmp_path / "config.json").read_text())
    for part, other, message in (
        ("vision_config", VISION_CONFIGS["siglip"](), "drops the first token of siglip_vision_model.*needs 'full'"),
        ("text_config", TEXT_CONFIGS["granite"](), "granite.*without what that does to logits"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {part: other.to_dict()}))
        with pytest.raises(ValueError, match=message):
            SaisaForConditionalGeneration.from_pretrained(tmp_path)


# --- every member of the family, against a plain computation ----------------------------------------------------------


def plainly(model, ids, features):
    """Logits (S, vocabulary) and hidden states of one sequence in float64: all rows attend under a dense mask and pass the
    feed-forward network, and what a layer withholds from visual tokens is struck out."""
    config, w = model.config, {name: x.detach().double() for name, x in model.state_dict().items()}
    text, visual_S, lm = config.text_config.to_dict(), ids == IMAGE_TOKEN, "model.language_model."
    length, heads, eps = len(ids), text["num_attention_heads"], text["rms_norm_eps"]
    frequencies, amplitude = inverse_frequencies(text, length)
    x = w[lm + "embed_tokens.weight"][ids]
    inner = torch.nn.functional.gelu(_linear(w, "model.visual_projector.linear_1", features.double()))
    x[visual_S] = _linear(w, "model.visual_projector.linear_2", inner)
    states = [x]

    def of_layer(value, layer):
        return value[layer] if isinstance(value, list) else value

    for layer in range(LAYERS):
        p = f"{lm}layers.{layer}."
        normed = _rms_norm(x, w[p + "input_layernorm.weight"], eps)
        q, k, v = (_linear(w, f"{p}self_attn.{name}_proj", normed).unflatten(-1, (-1, 8)) for name in "qkv")
        q, k = (torch.stack([_rotate(row, i, frequencies, amplitude) for i, row in enumerate(rows)]) for rows in (q, k))
        k, v = (rows.repeat_interleave(heads // rows.shape[1], dim=1) for rows in (k, v))
        distance = torch.arange(length)[:, None] - torch.arange(length)
        hidden = (distance < 0) | (distance >= _window(text, layer))
        scores = torch.einsum("qnh,knh->nqk", q, k) / 8**0.5
        mixed = torch.einsum("nqk,knh->qnh", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)
        attended = _linear(w, p + "self_attn.o_proj", mixed.flatten(1))
        if of_layer(config.visual_attention, layer) == "none":
            attended[visual_S] = 0
        x = x + attended
        fed = _feed_forward(w, p, _rms_norm(x, w[p + "post_attention_layernorm.weight"], eps), text)
        if not of_layer(config.visual_feed_forward, layer):
            fed[visual_S] = 0
        x = x + fed
        states.append(x)
    states[-1] = _rms_norm(x, w[lm + "norm.weight"], eps)
    return states[-1] @ w["lm_head.weight"].T, states


@every_member
@pytest.mark.parametrize("text", ["mistral", "mistral_window", "llama_biases"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_every_member_of_the_family_is_the_plain_computation(switches, text, side):
    model = member(switches, text)
    prompts = random_prompts(seed=5, side=side)
    outputs = model(**prompts.inputs, output_hidden_states=True)
    for b in range(len(prompts.input_ids)):
        row, real = prompts.row(b), prompts.attention_mask[b].bool()
        features = torch.zeros(0, 24)
        if row.pixel_values is not None:
            features = vision_features(model, row.pixel_values).flatten(0, 1)
        logits, states = plainly(model, row.input_ids[0], features)
        close(outputs.logits[b][real].double(), logits, 2e-5)
        for ours, plain in zip(outputs.hidden_states, states, strict=True):
            close(ours[b][real].double(), plain, 2e-5)


@torch.no_grad()
def test_attention_implementations_agree_and_eager_shows_its_probabilities():
    prompts = [prompts_from_rows(ROWS), prompts_from_rows([ROWS[2], ROWS[2]]), prompts_from_rows(ROWS, side="right")]
    with runnable():
        models = {name: member(MIXED, attn_implementation=name) for name in IMPLEMENTATIONS}
        for each in prompts:
            real = each.attention_mask.bool()
            expected = models["eager"](**each.inputs, output_attentions=True)
            for model in models.values():
                close(model(**each.inputs).logits[real], expected.logits[real], 2e-5)
            attend = [model.config.visual_tokens_attend(layer) for layer in range(LAYERS)]
            for probabilities, queries in zip(expected.attentions, attend, strict=True):
                mass = probabilities.sum(-1).transpose(1, 2)
                close(mass[each.text], torch.ones_like(mass[each.text]))
                close(mass[each.visual], torch.full_like(mass[each.visual], float(queries)))


def rows_that_count(model, prompts, sample, place):
    """For each hidden state of a visual token, which visual tokens' features it depends on: bool (states, V)."""
    caught = []

    def catch(_, arguments):
        caught.append(arguments[0].detach().requires_grad_())
        return (caught[0],)

    handle = model.model.visual_projector.register_forward_pre_hook(catch)
    states = model(**prompts.inputs, output_hidden_states=True).hidden_states
    handle.remove()
    position = prompts.visual[sample].nonzero()[place, 0]
    direction = torch.randn(states[0].shape[-1], generator=torch.Generator().manual_seed(0))
    gradients = [torch.autograd.grad(x[sample, position] @ direction, caught, retain_graph=True)[0] for x in states]
    return torch.stack([(gradient != 0).any(-1) for gradient in gradients])


@pytest.mark.parametrize("switches", [PILOT, FROZEN, LLAVA, MIXED], ids=str)
def test_without_visual_attention_no_visual_token_depends_on_another_at_any_layer(switches):
    model, prompts = member(switches), prompts_from_rows([[BOS, 5, "image", 6, "image", 7]])
    depends = rows_that_count(model, prompts, 0, 6)  # the third token of the second picture
    own = torch.zeros(8, dtype=torch.bool).index_fill_(0, torch.tensor([6]), True)
    before = torch.arange(8) <= 6
    attended = False
    for layer, row in enumerate(depends):
        assert torch.equal(row, before if attended else own), layer
        attended = attended or (layer < LAYERS and model.config.visual_tokens_attend(layer))
    assert attended == (switches not in (PILOT, FROZEN))


# --- generation and caches --------------------------------------------------------------------------------------------


@every_member
@torch.no_grad()
def test_cached_and_uncached_logits_agree_in_any_cache_and_batch(switches):
    model, prompts = member(switches), random_prompts(seed=7, tail=3)
    whole = model(**prompts.inputs).logits
    for cache in (None, StaticCache(config=model.config.text_config, max_cache_len=64)):
        first = {name: value[:, :-3] for name, value in prompts.inputs.items() if name in ("input_ids", "position_ids")}
        outputs = model(
            **first, attention_mask=prompts.attention_mask[:, :-3], pixel_values=prompts.pixel_values,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        real = prompts.attention_mask[:, :-3].bool()
        close(outputs.logits[real], whole[:, :-3][real])
        for place in range(prompts.input_ids.shape[1] - 3, prompts.input_ids.shape[1]):
            outputs = model(
                prompts.input_ids[:, place : place + 1], attention_mask=prompts.attention_mask[:, : place + 1],
                position_ids=prompts.position_ids[:, place : place + 1], past_key_values=outputs.past_key_values,
                use_cache=True,
            )  # fmt: skip
            close(outputs.logits[:, 0], whole[:, place])


@every_member
@torch.no_grad()
def test_greedy_text_is_the_argmax_without_a_cache_whatever_the_batch_and_the_cache(switches):
    model, prompts = member(switches), random_prompts(seed=3)
    together = model.generate(**prompts.prompt, **GREEDY)
    static = model.generate(**prompts.prompt, **GREEDY, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, together)
    beams = model.generate(**prompts.prompt, **GREEDY, num_beams=2)
    for b in range(len(together)):
        row = prompts.row(b)
        ids = row.input_ids
        for _ in range(GREEDY["max_new_tokens"]):
            logits = model(ids, row.pixel_values, use_cache=False).logits[:, -1]
            logits[:, IMAGE_TOKEN] = -torch.inf if row.pixel_values is not None else logits[:, IMAGE_TOKEN]
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
        answer = ids[0, row.input_ids.shape[1] :]
        assert torch.equal(together[b, prompts.input_ids.shape[1] :], answer)
        alone = model.generate(**row.prompt, **GREEDY, num_beams=2)
        assert torch.equal(beams[b, prompts.input_ids.shape[1] :], alone[0, row.input_ids.shape[1] :])


@every_member
@torch.no_grad()
def test_a_picture_may_come_in_a_later_turn_on_a_filled_cache(switches):
    model, prompts = member(switches), prompts_from_rows([[BOS, 5, "image", 6, 7, "image", 8]])
    whole = model(**prompts.inputs).logits
    first = model(prompts.input_ids[:, :8], prompts.pixel_values[:1], use_cache=True)
    later = model(prompts.input_ids[:, 8:], prompts.pixel_values[1:], past_key_values=first.past_key_values)
    close(torch.cat([first.logits, later.logits], dim=1), whole)


def test_a_picture_of_one_token_may_be_all_that_is_new():
    reduced = {"visual_token_reduction": "resampler", "reduced_visual_tokens": 1, "vision_seq_length": None}
    model = tiny_model(alignment="embedding_space", visual_attention="full", **reduced)
    ids, pixels = torch.tensor([[BOS, 5, 6, IMAGE_TOKEN]]), torch.randn(1, 3, 8, 8)
    options = {"pixel_values": pixels, "max_new_tokens": 5, "do_sample": False}
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :3], past_key_values=cache)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options))


@every_member
@torch.no_grad()
def test_visual_states_hold_features_and_stand_for_their_pictures_anywhere(switches, tmp_path):
    model, prompts = member(switches), prompts_from_rows([[BOS, "image", 8, "image"], [BOS, 9, 5, "image", "image"]])
    pictures = prompts.pixel_values[:2]
    states = model.get_visual_states(pictures)
    assert states.store == "features"
    inputs = {name: value for name, value in prompts.inputs.items() if name != "pixel_values"}
    for order in ([0, 1, 1, 0], [0, 1, 0, 1]):
        expected = model(**inputs, pixel_values=pictures[order]).logits
        close(model(**inputs, visual_states=states[order]).logits, expected)
    same = prompts_from_rows([[BOS, "image", 8], [9, "image", 7]])  # one picture, behind unlike words
    given = {name: value for name, value in same.inputs.items() if name != "pixel_values"}
    expected = model(**given, pixel_values=pictures[[0, 0]]).logits
    close(model(**given, visual_states=states[[0, 0]]).logits, expected)
    with pytest.raises(ValueError, match=r"store='keys_values' do not go with alignment='embedding_space'.*'features'"):
        model.get_visual_states(pictures, store="keys_values")
    saisa = tiny_model("mistral", projector_sharing="shared")
    with pytest.raises(ValueError, match="do not go with alignment='embedding_space'"):
        model(**inputs, visual_states=saisa.get_visual_states(pictures)[[0, 1, 1, 0]])


# --- training ---------------------------------------------------------------------------------------------------------


@every_member
def test_checkpointed_gradients_are_those_without(switches):
    model = member(switches).train()
    batch = labelled()
    grads = []
    for kind in (None, False, True):
        model.zero_grad()
        if kind is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": kind})
        model(**batch, use_cache=False).loss.backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert "model.visual_projector.linear_1.weight" in grads[0]
    for other in grads[1:]:
        assert other.keys() == grads[0].keys()
        for name, gradient in grads[0].items():
            close(other[name], gradient, 1e-6)


def test_a_batch_of_text_alone_gives_the_projector_gradients_of_zero():
    model, text = member(PILOT).train(), {"input_ids": torch.tensor([[BOS, 5, 6]]), "labels": torch.tensor([[5, 6, 7]])}
    expected = model(**text).loss
    loss = model(**text, pixel_values=torch.zeros(0, 3, 8, 8)).loss
    loss.backward()
    assert torch.equal(loss, expected)
    assert all(torch.count_nonzero(p.grad) == 0 for p in model.model.visual_projector.parameters())


def test_the_trainer_teaches_it_the_answer_about_a_picture(tmp_path):
    trainer = trainer_for(member(MIXED), tmp_path)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.1 < 0.5 < before
    batch = collate([True, False])
    asked = {name: batch[name][:, :-1] for name in ("input_ids", "attention_mask")}
    ids = trainer.model.generate(**asked, pixel_values=batch["pixel_values"], max_new_tokens=1, do_sample=False)
    assert ids[:, -1].tolist() == [BRIGHT, DARK]


# --- checkpoints, devices, costs --------------------------------------------------------------------------------------


@every_member
@torch.no_grad()
def test_a_checkpoint_brings_its_code_and_loads_the_same_model_again(switches, tmp_path):
    model, prompts = member(switches), random_prompts()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "embedding_space_saisa.py").exists()
    remote = get_class_from_dynamic_module("modeling_saisa.SaisaForConditionalGeneration", tmp_path)
    again = remote.from_pretrained(tmp_path)
    layer = again.language_model.layers[0]
    assert type(layer).__module__.startswith("transformers_modules") and type(layer).__name__ == "EmbeddingSpaceLayer"
    assert torch.equal(again(**prompts.inputs).logits, model(**prompts.inputs).logits)
    assert SaisaConfig.from_pretrained(tmp_path).to_dict() == model.config.to_dict()
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "embedding_space_saisa.py").read_text() == (
        tmp_path / "embedding_space_saisa.py"
    ).read_text()


@pytest.mark.parametrize("switches", [None, *FAMILY.values()], ids=["saisa", *FAMILY])
def test_layers_that_must_not_be_split_are_those_that_are_there(switches):
    """accelerate's FSDP refuses a model that names a class which it has not."""
    model = tiny_model() if switches is None else member(switches)
    names = {type(module).__name__ for module in model.modules()}
    own = {name for name in model._no_split_modules if "DecoderLayer" in name or "EmbeddingSpace" in name}
    assert own == {"SaisaDecoderLayer" if switches is None else "EmbeddingSpaceLayer"} and own <= names


@every_member
@pytest.mark.parametrize("text", ["qwen3", "phi3"])
def test_it_costs_what_pytorch_counts(switches, text):
    counted, formula = counted_and_formula(member(switches, text, attn_implementation="eager"))
    assert formula == pytest.approx(counted, rel=0.01)


@every_member
@pytest.mark.parametrize("trained", ["full", "projectors"])
def test_a_training_step_costs_what_pytorch_counts(switches, trained):
    model = member(switches, attn_implementation="eager").train().requires_grad_(False)
    (model if trained == "full" else model.model.visual_projector).requires_grad_(True)
    model.vision_tower.requires_grad_(False)
    prompts = prompts_from_rows([[BOS, "image", 5, 6, "image", 7, 8]] * 2)
    batch = {**prompts.inputs, "labels": prompts.input_ids}
    with FlopCounterMode(display=False) as counter:
        model(**batch, skip_logits=True, use_cache=False).loss.backward()
    with FlopCounterMode(display=False) as encoder:
        model.get_image_features(prompts.pixel_values)
    flops = StepFlops(model)
    assert flops(flops.counts(batch)) == pytest.approx(counter.get_total_flops(), rel=0.02)
    expected = counter.get_total_flops() - encoder.get_total_flops()
    step = Step(5, 8, batch=2, logits=12)  # the last position has nothing to predict
    assert training_flops(model.config, "saisa", step, trained) == pytest.approx(expected, rel=0.01)


def test_costs_lie_where_they_should_and_the_command_and_the_card_tell_them(tmp_path, capsys):
    llava, pilot, frozen, mixed = (tiny_config("mistral", alignment="embedding_space", **x) for x in FAMILY.values())
    step = Step(64, 576)
    assert step_flops(llava, "saisa", step) == step_flops(llava, "llava", step)
    sums = [sum(step_flops(config, "saisa", step).values()) for config in (llava, pilot, frozen)]
    assert sums == sorted(sums, reverse=True)
    for config in (llava, pilot, frozen, mixed):
        cost = step_flops(config, "saisa", step)
        assert card_flops(config, 64, 576)["saisa"] == sum(cost.values()) - cost["head"]
    member(MIXED).save_pretrained(tmp_path)
    assert main(["flops", str(tmp_path)]) == 0
    assert "this model" in capsys.readouterr().out
    card = model_card(mixed)
    assert "attend to the tokens in front of them in 1 and pass the feed-forward network in 1 of the 3" in card


# --- what does not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alignment": "somewhere"}, "alignment='somewhere': expected one of 'input_space'"),
        ({"visual_attention": "full"}, "visual_attention='full': in input space.*alignment=\"embedding_space\""),
        ({"visual_feed_forward": False}, "visual_feed_forward=False: in input space"),
        ({"alignment": "embedding_space", "visual_attention": "half"}, "visual_attention='half': expected one of"),
        ({"alignment": "embedding_space", "visual_attention": ["full"] * 2}, "2 entries.*each of the 3 decoder layers"),
        ({"alignment": "embedding_space", "visual_feed_forward": [True, "no", 1]}, "visual_feed_forward='no'"),
        ({"alignment": "embedding_space", "visual_layers": [0, 1]}, r"visual_layers=\[0, 1\].*for layer in range\(3\)"),
        ({"alignment": "embedding_space", "projector_sharing": "each"}, "projector_sharing='each'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


def test_there_is_one_projector_for_good():
    model = member(PILOT)
    assert model.config.projector_sharing == "shared"
    assert [name for name, _ in model.named_modules() if name.endswith("visual_projector")] == [
        "model.visual_projector"
    ]
    with pytest.raises(ValueError, match="unshare_projectors: alignment is 'embedding_space'"):
        model.unshare_projectors()
