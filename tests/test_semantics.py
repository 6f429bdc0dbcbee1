"""What SAISA computes: properties over random models and random ragged batches, most of them against a dense float64
computation that shares no code with the package."""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
import transformers
from dense_reference import dense_saisa, inverse_frequencies
from tiny_models import (
    BATCHABLE_TEXT_MODELS,
    BOS,
    IMAGE_TOKEN,
    TEXT_MODELS,
    prompts_from_rows,
    random_prompts,
    tiny_model,
    vision_features,
)
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.cache_utils import Cache, QuantizedCache


SIDES = ["left", "right"]
SOME_TEXT_MODELS = ["llama", "mistral_window", "qwen2_window", "qwen3"]
PROJECTORS = {
    "shared": {"projector_sharing": "shared"},
    "two of three layers": {"visual_layers": [0, 2]},
    "one layer, shared": {"visual_layers": [1], "projector_sharing": "shared"},
    "two feature layers": {"vision_feature_layer": [1, -2]},
    "class token kept": {"vision_feature_select_strategy": "full", "vision_seq_length": 5},
    "narrow": {"projector_hidden_size": 20},
    "no bias": {"projector_bias": False},
}


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def logits(model, prompts, **kwargs):
    with torch.no_grad():
        return model(**prompts.inputs, **kwargs).logits


def in_float64(model):
    """Compute in float64 throughout: transformers' norms and rotary embeddings round to float32 in any model."""

    def norm(module):
        gemma = text_config["model_type"].startswith("gemma")

        def forward(x):
            weight = 1 + module.weight if gemma else module.weight
            return weight * x * torch.rsqrt((x * x).mean(-1, keepdim=True) + text_config["rms_norm_eps"])

        return forward

    def rotary(x, position_ids, attention_type):
        windowed = attention_type == "sliding_attention" and text_config["model_type"] == "gemma3_text"
        frequencies, factor = inverse_frequencies(text_config, int(position_ids.max()) + 1, windowed)
        angles = position_ids[..., None].double() * torch.cat([frequencies, frequencies])
        return angles.cos() * factor, angles.sin() * factor

    text_config = model.config.text_config.to_dict()
    for module in model.model.language_model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = norm(module)
    model.model.language_model.rotary_emb.forward = rotary
    return model.double()


def assert_equals_the_dense_computation(model, prompts, tolerance, attentions=False):
    with torch.no_grad():
        out = model(**prompts.inputs, output_hidden_states=True, output_attentions=attentions)
    weights = model.state_dict()
    features = vision_features(model, prompts.pixel_values)
    assert features.shape[1] == prompts.visual.sum() / len(features)
    first = 0
    for b, images in enumerate(prompts.images):
        real = prompts.attention_mask[b].bool()
        mine = features[first : first + images].flatten(0, 1)
        first += images
        # a dynamically scaled rotary embedding adapts to the longest sequence of the batch
        longest = int(prompts.position_ids.max()) + 1
        expected = dense_saisa(weights, model.config, prompts.input_ids[b][real], mine, rope_length=longest)
        close(out.logits[b][real], expected.logits, tolerance)
        assert len(out.hidden_states) == len(expected.hidden_states)
        for got, wanted in zip(out.hidden_states, expected.hidden_states, strict=True):
            close(got[b][real], wanted, tolerance)
        if attentions:
            for got, wanted in zip(out.attentions, expected.attentions, strict=True):
                close(got[b][:, real][:, :, real], wanted, tolerance)
                assert not got[b][:, real][:, :, ~real].any(), "padding is attended to"
    return out


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("text", TEXT_MODELS)
def test_a_batch_equals_the_dense_computation_in_float64(text, side):
    for seed in range(2):
        model = in_float64(tiny_model(text, seed=seed))
        eager = model.config.text_config._attn_implementation == "eager"  # which rounds probabilities to float32
        prompts = random_prompts(seed, side).to(torch.float64)
        assert_equals_the_dense_computation(model, prompts, 1e-5 if eager else 1e-9)


@pytest.mark.parametrize("text", TEXT_MODELS)
def test_a_batch_equals_the_dense_computation_in_float32(text):
    for seed, side in enumerate(SIDES):
        assert_equals_the_dense_computation(tiny_model(text, seed=seed), random_prompts(seed, side), 2e-5)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("projector", PROJECTORS)
def test_every_kind_of_projector_equals_the_dense_computation(projector, attn_implementation):
    options = PROJECTORS[projector]
    model = tiny_model("mistral", attn_implementation=attn_implementation, **options)
    prompts = random_prompts(3, seq_length=options.get("vision_seq_length", 4))
    assert_equals_the_dense_computation(model, prompts, 2e-5, attentions=attn_implementation == "eager")


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("text", SOME_TEXT_MODELS)
def test_attentions_and_hidden_states_are_aligned_with_input_ids_and_zero_at_visual_rows(text, side):
    model = tiny_model(text, attn_implementation="eager")
    prompts = random_prompts(4, side)
    out = assert_equals_the_dense_computation(model, prompts, 2e-5, attentions=True)
    B, S = prompts.input_ids.shape
    visual = prompts.visual
    for h in out.hidden_states:
        assert h.shape == (B, S, 32) and not h[visual].any() and h[prompts.text].any(-1).all()
    for a in out.attentions:
        assert a.shape[:1] + a.shape[2:] == (B, S, S) and not a.transpose(1, 2)[visual].any()
    assert out.logits.shape == (B, S, 97) and not out.logits[visual].any()
    with torch.no_grad():
        last = model.model(**prompts.inputs).last_hidden_state
    assert torch.equal(last, out.hidden_states[-1])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("text", BATCHABLE_TEXT_MODELS)
def test_a_row_of_a_batch_equals_itself_alone(text, side):
    model = tiny_model(text)
    prompts = random_prompts(5, side, rows=5)
    batch = logits(model, prompts)
    for b in range(5):
        close(batch[b][prompts.attention_mask[b].bool()], logits(model, prompts.row(b))[0])


@pytest.mark.parametrize("text", SOME_TEXT_MODELS)
def test_positions_are_counted_in_the_sequence_when_none_are_given(text):
    """Rotary embeddings are relative, so a padded row counted from its padding is the same row."""
    model = tiny_model(text)
    for side in SIDES:
        prompts = random_prompts(6, side)
        with torch.no_grad():
            counted = model(**prompts.prompt).logits
        close(counted[prompts.text], logits(model, prompts)[prompts.text])


def test_permuting_a_batch_permutes_the_outputs():
    model = tiny_model("llama3_scaling")
    prompts = random_prompts(7, rows=5)
    order = [3, 0, 4, 2, 1]
    rows = prompts.pixel_values.split(prompts.images)
    permuted = random_prompts(7, rows=5)
    permuted.input_ids, permuted.attention_mask = prompts.input_ids[order], prompts.attention_mask[order]
    permuted.position_ids, permuted.pixel_values = prompts.position_ids[order], torch.cat([rows[b] for b in order])
    close(logits(model, permuted)[permuted.text], logits(model, prompts)[order][permuted.text])


@pytest.mark.parametrize("text", SOME_TEXT_MODELS)
def test_text_in_front_of_an_image_does_not_see_it(text):
    model = tiny_model(text)
    prompts = prompts_from_rows([[BOS, 5, "image", 6, 7, "image", 8, 9], [BOS, "image", 5, "image", 6]])
    before = logits(model, prompts)
    prompts.pixel_values = prompts.pixel_values.clone()
    prompts.pixel_values[[1, 3]] += 1.0
    after = logits(model, prompts)
    last_image = torch.stack([ids.eq(IMAGE_TOKEN).nonzero()[-4] for ids in prompts.input_ids])
    in_front = torch.arange(prompts.input_ids.shape[1]) < last_image
    assert torch.equal(before[in_front & prompts.text], after[in_front & prompts.text])
    changed = (before != after).any(-1)
    assert changed[~in_front & prompts.text].all()


@contextmanager
def one_visual_feature_changed(model, image, token):
    """Adds to the encoder feature that becomes visual token `token` of image `image`."""

    def change(module, args, kwargs, output):
        states = list(output.hidden_states)
        states[-2] = states[-2].clone()
        states[-2][image, token + 1] += 1.0  # behind the class token
        output.hidden_states = tuple(states)
        return output

    handle = model.model.vision_tower.register_forward_hook(change, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def test_visual_tokens_do_not_see_each_other():
    """Where the window of every text token has passed a visual token, nothing moves with it, although visual tokens
    between the two are near enough to both to have carried it along."""
    model = tiny_model("mistral_window")
    prompts = prompts_from_rows([[BOS, 3, "image", "image", 4, 5]])  # positions 2-5, 6-9; text at 10, 11; window 6
    before = logits(model, prompts)
    for token in range(4):
        with one_visual_feature_changed(model, 0, token):
            after = logits(model, prompts)
        moved = (before != after).any(-1)[0]
        assert not moved[:10].any()
        assert bool(moved[10]) == (token == 3)  # position 10 sees positions 5 to 10
        assert bool(moved[11]) == (token == 3)  # it sees positions 6 to 11, and position 10 tells it


def test_changing_one_visual_token_changes_nothing_in_front_of_it():
    model = tiny_model("qwen3")
    prompts = prompts_from_rows([[BOS, 3, "image", 4, "image", 5], [BOS, "image", 6]])
    before = logits(model, prompts)
    for image, row, start in [(0, 0, 6), (1, 0, 11), (2, 1, 11)]:
        for token in (0, 3):
            with one_visual_feature_changed(model, image, token):
                moved = (before != logits(model, prompts)).any(-1)
            behind = torch.zeros_like(moved)
            behind[row, start:] = True
            assert torch.equal(moved, behind & prompts.text)


CACHED = [(text, {}) for text in BATCHABLE_TEXT_MODELS] + [
    (text, options) for text in ("qwen3", "qwen2_window") for options in ({"visual_layers": [1]}, PROJECTORS["shared"])
]


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("text, options", CACHED)
def test_logits_with_a_cache_equal_logits_without(text, options, attn_implementation):
    model = tiny_model(text, attn_implementation=attn_implementation, **options)
    prompts = random_prompts(8, tail=4)
    whole, S = logits(model, prompts), prompts.input_ids.shape[1]
    with torch.no_grad():
        out = model(**prompts.inputs, use_cache=True)
        close(out.logits, whole)
        cut = S - 4
        pieces = [model(**_columns(prompts, 0, cut), use_cache=True)]
        for s in range(cut, S):
            inputs = _columns(prompts, s, s + 1, pixel_values=None)
            pieces.append(model(**inputs, past_key_values=pieces[-1].past_key_values, use_cache=True))
            assert pieces[-1].past_key_values.get_seq_length() == s + 1
    close(torch.cat([p.logits for p in pieces], 1)[prompts.text], whole[prompts.text])


def _columns(prompts, start, stop, **changes):
    """Arguments of a forward pass over columns [start, stop), everything in front of them being in the cache."""
    return {
        "input_ids": prompts.input_ids[:, start:stop],
        "attention_mask": prompts.attention_mask[:, :stop],
        "position_ids": prompts.position_ids[:, start:stop],
        "pixel_values": prompts.pixel_values,
    } | changes


@pytest.mark.parametrize("text, options", CACHED)
def test_an_image_may_arrive_on_top_of_a_filled_cache(text, options):
    model = tiny_model(text, **options)
    first = [[BOS, 3, "image", 4, 5], [BOS, 7], [BOS, "image", "image", 8, 9]]
    second = [[10, "image", 11], ["image", 12, 13], [14, 15, 16, 17, 18, 19]]
    third = [["image", 20], [21, 22, 23, 24, 25], ["image", 26]]
    turns = [first, second, third]
    whole = prompts_from_rows([a + b + c for a, b, c in zip(*turns)])
    per_row = list(whole.pixel_values.split(whole.images))
    expected, cache, stop, pieces = logits(model, whole), None, whole.input_ids.shape[1] - 11, []
    start = 0
    for turn, width in zip(turns, [stop, 6, 5]):
        images = [row.count("image") for row in turn]
        pixels = torch.cat([p[:n] for p, n in zip(per_row, images)])
        per_row = [p[n:] for p, n in zip(per_row, images)]
        with torch.no_grad():
            inputs = _columns(whole, start, start + width, pixel_values=pixels)
            out = model(**inputs, past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, start + width
        pieces.append(out.logits)
    assert start == whole.input_ids.shape[1]
    close(torch.cat(pieces, 1)[whole.text], expected[whole.text])


def test_a_cropped_cache_continues_where_it_was_cut():
    model = tiny_model("llama3_scaling")
    prompts = prompts_from_rows([[BOS, 3, "image", 4, 5, "image", 6, 7], [BOS, "image", 8, 9, 10, "image", 11]])
    with torch.no_grad():
        out = model(**prompts.inputs, use_cache=True)
        out.past_key_values.crop(-6)
        inputs = _columns(prompts, 8, 14, pixel_values=prompts.pixel_values[[1, 3]])
        again = model(**inputs, past_key_values=out.past_key_values)
    close(again.logits[prompts.text[:, 8:]], out.logits[:, 8:][prompts.text[:, 8:]])


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("text", SOME_TEXT_MODELS)
def test_a_prepared_mask_does_what_the_padding_mask_does(text, attn_implementation):
    """(B, 1, S, S) masks, boolean for sdpa and additive for both, one or by the kind of attention."""
    model = tiny_model(text, attn_implementation=attn_implementation)
    prompts = random_prompts(22)
    expected = logits(model, prompts)[prompts.text]
    S = prompts.input_ids.shape[1]
    distance = torch.arange(S)[:, None] - torch.arange(S)
    visible = prompts.attention_mask.bool()[:, None, None] & (distance >= 0) | (distance == 0)
    window = getattr(model.config.text_config, "sliding_window", None) or S
    masks = {"full_attention": visible, "sliding_attention": visible & (distance < window) | (distance == 0)}
    additive = {
        kind: torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) for kind, mask in masks.items()
    }
    for prepared in [additive] if attn_implementation == "eager" else [masks, additive]:
        if text != "qwen2_window":  # all layers attend alike
            prepared = prepared["sliding_attention" if text == "mistral_window" else "full_attention"]
        with torch.no_grad():
            close(model(**prompts.inputs | {"attention_mask": prepared}).logits[prompts.text], expected)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("text", SOME_TEXT_MODELS)
def test_samples_packed_into_one_row_do_not_see_each_other(text, attn_implementation):
    """As transformers' own models take them: positions that start again, and no attention mask."""
    model = tiny_model(text, attn_implementation=attn_implementation)
    prompts = prompts_from_rows([[BOS, 3, "image", 4, 5, "image", 6], [BOS, "image", "image", 7, 8, 9]])
    rows = [prompts.row(0), prompts.row(1)]
    packed = {
        "input_ids": torch.cat([row.input_ids for row in rows], 1),
        "position_ids": torch.cat([row.position_ids for row in rows], 1),
        "pixel_values": prompts.pixel_values,
    }
    with torch.no_grad():
        together = model(**packed, use_cache=False).logits
    close(together, torch.cat([logits(model, row) for row in rows], 1))


@pytest.mark.parametrize("side", SIDES)
def test_the_loss_counts_a_label_only_behind_text(side):
    model = tiny_model("qwen2")
    for seed in range(3):
        prompts = random_prompts(seed, side)
        labels = prompts.input_ids.masked_fill(~prompts.attention_mask.bool(), -100)
        labels[torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < 0.3] = -100
        labels[prompts.position_ids == 0] = -100  # with padding on the left, nothing real is in front of it
        with torch.no_grad():
            out = model(**prompts.inputs, labels=labels)
            scaled = model(**prompts.inputs, labels=labels, num_items_in_batch=torch.tensor(7))
        losses = [
            -out.logits[b, s - 1].double().log_softmax(-1)[labels[b, s]]
            for b in range(labels.shape[0])
            for s in range(1, labels.shape[1])
            if labels[b, s] != -100 and prompts.input_ids[b, s - 1] != IMAGE_TOKEN
        ]
        assert len(losses) > 5
        close(out.loss, torch.stack(losses).mean())
        close(scaled.loss, torch.stack(losses).sum() / 7)


def test_the_loss_reaches_every_projector_and_no_label_behind_an_image():
    model = tiny_model("llama")
    prompts = prompts_from_rows([[BOS, 3, "image", 4, 5]])
    labels = torch.full_like(prompts.input_ids, -100)
    labels[0, -1] = 5
    model(**prompts.inputs, labels=labels).loss.backward()
    for layer in model.model.language_model.layers:
        assert all(p.grad.abs().sum() > 0 for n, p in layer.visual_projector.named_parameters())
    labels[0, -2] = 4  # behind the image: no predictor
    close(
        model(**prompts.inputs, labels=labels).loss, F.cross_entropy(logits(model, prompts)[0, -2:-1], labels[0, -1:])
    )


@pytest.mark.parametrize("images", [True, False], ids=["images", "text"])
@pytest.mark.parametrize("kept", [0, 1, 3])
def test_the_head_is_one_product_for_all_samples_and_is_not_copied(images, kept):
    """Of a frozen head and a slice (B, 1, D) of (B, T, D) PyTorch makes a product for each sample, and in bfloat16 a copy."""
    model, calls = tiny_model(dtype=torch.bfloat16).requires_grad_(False), []
    prompts = prompts_from_rows([[3, "image", 4, 5], [4, "image", 3, 5]] if images else [[3, 4, 5, 6], [4, 3, 6, 5]])
    head = {model.config.text_config.vocab_size, model.config.text_config.hidden_size}

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if any(head <= set(x.shape) for x in args if isinstance(x, torch.Tensor)):
                calls.append(function.overloadpacket.__name__)
            return function(*args, **kwargs or {})

    with torch.no_grad(), Products():
        model(**prompts.inputs, logits_to_keep=kept)
    assert calls == ["embedding", "t", "mm"]


def test_logits_to_keep_selects_columns():
    model = tiny_model("qwen3")
    prompts = random_prompts(9, "right")
    whole = logits(model, prompts)
    for keep in (1, 3, whole.shape[1]):
        kept = logits(model, prompts, logits_to_keep=keep)
        assert kept.shape == whole[:, -keep:].shape
        close(kept, whole[:, -keep:])
    columns = torch.tensor([0, 2, 3, whole.shape[1] - 1])
    kept = logits(model, prompts, logits_to_keep=columns)
    assert kept.shape == whole[:, columns].shape
    close(kept, whole[:, columns])
    assert not kept[prompts.visual[:, columns]].any()


def test_inputs_embeds_with_pixels_equal_input_ids():
    model = tiny_model("mistral")
    prompts = random_prompts(10)
    embeds = {"input_ids": None, "inputs_embeds": model.get_input_embeddings()(prompts.input_ids).detach()}
    with torch.no_grad():
        close(model(**prompts.inputs | embeds).logits, logits(model, prompts))
    greedy = {"do_sample": False, "max_new_tokens": 4}
    written = model.generate(**prompts.prompt, **greedy)[:, prompts.input_ids.shape[1] :]
    assert torch.equal(model.generate(**prompts.prompt | embeds, **greedy), written)


@pytest.mark.parametrize("side", SIDES)
def test_a_prompt_that_ends_in_an_image_is_refused_with_the_fix(side):
    model = tiny_model()
    prompts = prompts_from_rows([[BOS, 3, 4, 5, 6, 7, 8, 9, 10], [BOS, 3, "image"]], side)
    with pytest.raises(ValueError, match="text token"):
        model.generate(**prompts.prompt, max_new_tokens=2)


@pytest.mark.parametrize("images", [1, 3])
def test_a_wrong_number_of_images_is_refused(images):
    model = tiny_model()
    prompts = prompts_from_rows([[BOS, "image", 3, "image", 4]])
    prompts.pixel_values = torch.randn(images, 3, 8, 8)
    with pytest.raises(ValueError, match="pixel_values"):
        logits(model, prompts)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("text", TEXT_MODELS)
def test_eager_equals_sdpa(text, side):
    if text == "gemma2" and transformers.Gemma2PreTrainedModel._supports_sdpa:
        pytest.skip("this release of transformers runs Gemma 2 with sdpa, without the bound on its scores")
    prompts = random_prompts(11, side)
    eager, sdpa = (logits(tiny_model(text, attn_implementation=a), prompts) for a in ("eager", "sdpa"))
    close(eager[prompts.text], sdpa[prompts.text])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("sharing", ["per_layer", "shared"])
def test_gradient_checkpointing_changes_no_gradient(sharing, reentrant):
    prompts = random_prompts(12, "right")
    labels = prompts.input_ids.masked_fill(~prompts.text, -100)
    results = []
    for checkpointing in (False, True):
        model = tiny_model("qwen2_window", projector_sharing=sharing).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = model(**prompts.inputs, labels=labels).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters() if "language_model" in n}))
    (loss, grads), (loss_again, grads_again) = results
    close(loss_again, loss)
    assert all(g is not None for g in grads.values())
    for name, grad in grads.items():
        close(grads_again[name], grad)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("sharing", ["per_layer", "shared"])
def test_gradient_checkpointing_reaches_the_projectors_of_a_model_that_is_frozen_otherwise(sharing, reentrant):
    prompts, found = random_prompts(12, "right"), []
    labels = prompts.input_ids.masked_fill(~prompts.text, -100)
    for checkpointing in (False, True):
        model = tiny_model("qwen2_window", projector_sharing=sharing).train().requires_grad_(False)
        learning = {name: p.requires_grad_() for name, p in model.named_parameters() if "visual_projector" in name}
        if checkpointing:
            model.gradient_checkpointing_enable(None if reentrant is None else {"use_reentrant": reentrant})
        model(**prompts.inputs, labels=labels).loss.backward()
        found.append({name: p.grad for name, p in learning.items()})
    assert all(grad is not None for grad in found[0].values())
    for name, grad in found[0].items():
        close(found[1][name], grad)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_another_index_may_be_ignored(skip_logits):
    prompts = random_prompts(12, "right")
    labels = prompts.input_ids.masked_fill(~prompts.text, -100)
    labels[:, -2:] = 7
    model = tiny_model("qwen3")
    wanted = model(**prompts.inputs, labels=labels.masked_fill(labels == 7, -100)).loss
    other = labels.masked_fill(labels == -100, 7)
    close(model(**prompts.inputs, labels=other, ignore_index=7, skip_logits=skip_logits).loss, wanted)


def test_other_features_than_the_projectors_are_made_for_are_refused():
    model, prompts = tiny_model("qwen3"), random_prompts(12)
    asked = {"vision_feature_layer": model.config.vision_feature_layer, "vision_feature_select_strategy": "default"}
    assert torch.equal(model(**prompts.inputs, **asked).logits, model(**prompts.inputs).logits)
    model.get_image_features(prompts.pixel_values, **asked)
    for wrong in ({"vision_feature_layer": 0}, {"vision_feature_select_strategy": "full"}):
        message = f"{next(iter(wrong))}=.*, but the projectors are made for"
        with pytest.raises(ValueError, match=message):
            model(**prompts.inputs, **wrong)
        with pytest.raises(ValueError, match=message):
            model.get_image_features(prompts.pixel_values, **wrong)


def test_the_decoder_is_found_under_its_usual_name():
    model, ids = tiny_model("qwen3"), torch.tensor([[1, 5, 6]])
    assert model.get_decoder() is model.model.get_decoder() is model.language_model
    with torch.no_grad():
        last, *_ = model.get_decoder()(input_ids=ids, use_cache=False, return_dict=False)
        close(last, model.model(input_ids=ids).last_hidden_state)
    with pytest.raises(ValueError, match="got images alone"):
        model.generate(pixel_values=torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("skip_logits", [False, True])
@pytest.mark.parametrize("pictures", [False, True])
def test_labels_have_to_be_as_many_as_the_input_tokens(pictures, skip_logits):
    prompts = random_prompts(12, "right")
    rows, length = prompts.input_ids.shape
    inputs = prompts.inputs if pictures else {"input_ids": prompts.input_ids.clamp(max=5)}
    model = tiny_model("qwen3")
    for shape in ((rows, length + 5), (rows, length - 5), (rows + 1, length), (1, length), (length,)):
        labels = torch.full(shape, 1)
        with pytest.raises(ValueError, match=rf"labels is \({shape[0]}.*: expected \({rows}, {length}\)"):
            model(**inputs, labels=labels, skip_logits=skip_logits)
        with pytest.raises(ValueError, match="shift_labels is"):
            model(**inputs, labels=prompts.input_ids, shift_labels=labels, skip_logits=skip_logits)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype, attn_implementation):
    prompts = random_prompts(13)
    full = logits(tiny_model("qwen3"), prompts)[prompts.text]
    model = tiny_model("qwen3", dtype=dtype, attn_implementation=attn_implementation)
    half = logits(model, prompts.to(dtype))
    assert half.dtype == dtype and not half[prompts.visual].any()
    half = half[prompts.text].float()
    assert (half - full).norm() / full.norm() < (0.05 if dtype == torch.bfloat16 else 0.01)
    assert model.generate(**prompts.to(dtype).prompt, max_new_tokens=2, do_sample=False).shape[0] == 4


GREEDY = {"do_sample": False, "max_new_tokens": 8}


@pytest.mark.parametrize("text", BATCHABLE_TEXT_MODELS)
def test_greedy_generation_of_a_batch_equals_each_row_alone(text):
    model = tiny_model(text)
    prompts = random_prompts(14)
    batch = model.generate(**prompts.prompt, **GREEDY)
    for b in range(4):
        row = prompts.row(b)
        alone = model.generate(**row.prompt, **GREEDY)
        assert torch.equal(batch[b][-8:], alone[0][-8:])


@pytest.mark.parametrize("text", SOME_TEXT_MODELS)
def test_greedy_generation_follows_the_dense_computation(text):
    model = tiny_model(text)
    prompts = random_prompts(15).row(1)
    written = model.generate(**prompts.prompt, **GREEDY)
    features = vision_features(model, prompts.pixel_values).flatten(0, 1)
    ids = written[0]
    dense = dense_saisa(model.state_dict(), model.config, ids, features).logits
    dense[:, IMAGE_TOKEN] = -torch.inf
    start = prompts.input_ids.shape[1]
    assert ids[start:].tolist() == dense[start - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("options", [{}, {"visual_layers": [0, 2]}])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("text", SOME_TEXT_MODELS)
def test_a_static_cache_generates_what_a_dynamic_one_does(text, attn_implementation, options):
    model = tiny_model(text, attn_implementation=attn_implementation, **options)
    prompts = random_prompts(16)
    dynamic = model.generate(**prompts.prompt, **GREEDY)
    assert torch.equal(model.generate(**prompts.prompt, **GREEDY, cache_implementation="static"), dynamic)
    assert torch.equal(model.generate(**prompts.prompt, **GREEDY, use_cache=False), dynamic)


def test_beam_search_scores_are_the_log_probabilities_of_its_sequences():
    model = tiny_model("mistral")
    prompts = random_prompts(17)
    options = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    out = model.generate(**prompts.prompt, **options, num_beams=4, num_return_sequences=2, length_penalty=0.0)
    greedy = model.generate(**prompts.prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(model.generate(**prompts.prompt, max_new_tokens=5, do_sample=False, num_beams=1), greedy)
    S = prompts.input_ids.shape[1]
    for b in range(4):
        row = prompts.row(b)
        for beam, score in zip(out.sequences[2 * b : 2 * b + 2], out.sequences_scores[2 * b : 2 * b + 2]):
            ids = torch.cat([row.input_ids[0], beam[S:]])[None]
            with torch.no_grad():
                whole = model(input_ids=ids, pixel_values=row.pixel_values).logits[0, -6:-1].log_softmax(-1)
            close(whole.gather(1, beam[S:, None]).sum(), score, 1e-4)


def test_sampling_with_a_seed_is_reproducible():
    model = tiny_model("qwen2")
    prompts = random_prompts(18)
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(model.generate(**prompts.prompt, do_sample=True, max_new_tokens=8))
    assert torch.equal(samples[0], samples[1]) and not torch.equal(samples[0], samples[2])


@pytest.mark.parametrize("pictures", ["all", "new"])
@pytest.mark.parametrize("text", SOME_TEXT_MODELS)
def test_a_conversation_goes_on_from_its_cache(text, pictures):
    """The second turn brings a picture for one row of the two; its pixels come alone or behind those of the first turn."""
    model = tiny_model(text)
    first = prompts_from_rows([[BOS, 3, "image", 4, 5], [BOS, 6, "image", 7]])
    out = model.generate(**first.prompt, **GREEDY, return_dict_in_generate=True)
    second = prompts_from_rows([[8, "image", 9], [10, 11, 12, 13, 14, 15]], seed=1)
    old, new = first.pixel_values, second.pixel_values
    prompt = {
        "input_ids": torch.cat([out.sequences, second.input_ids], 1),
        "attention_mask": torch.cat([first.attention_mask, torch.ones(2, 14, dtype=torch.long)], 1),
        "pixel_values": torch.stack([old[0], new[0], old[1]]),
    }
    fresh = model.generate(**prompt, **GREEDY)
    if pictures == "new":
        prompt["pixel_values"] = new
    assert torch.equal(model.generate(**prompt, **GREEDY, past_key_values=out.past_key_values), fresh)


def test_returning_several_sequences_keeps_each_rows_images():
    model = tiny_model("llama3_scaling")
    prompts = random_prompts(21)
    greedy = model.generate(**prompts.prompt, **GREEDY)
    copies = model.generate(**prompts.prompt, do_sample=True, top_k=1, max_new_tokens=8, num_return_sequences=3)
    assert torch.equal(copies, greedy.repeat_interleave(3, 0))


def test_guessing_tokens_from_the_prompt_changes_nothing():
    """Prompt lookup proposes what followed the last tokens in the prompt: here an image, then text."""
    model = tiny_model("mistral")
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        words = torch.randint(3, 7, (12,), generator=generator).tolist()
        row = [BOS, *words[:3], "image", *words[3:8], "image", *words[8:]]
        prompts = prompts_from_rows([row], seed=seed)
        options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": 2}
        # few words, so that what was seen comes again; the placeholder itself may be guessed
        options["suppress_tokens"] = [*range(3), *range(7, IMAGE_TOKEN)]
        guessed = model.generate(**prompts.prompt, **options, prompt_lookup_num_tokens=6)
        plain = model.generate(**prompts.prompt, **options)
        # with 4.57 the last guess may go beyond `max_new_tokens`, for any model
        assert torch.equal(guessed[:, : plain.shape[1]], plain)


def test_an_answer_about_an_image_never_contains_the_placeholder():
    """It stands for visual tokens alone; with it in the answer, the next turn would lack an image."""
    model = tiny_model("llama")
    prompts = random_prompts(23)
    with torch.no_grad():
        last = model.model(**prompts.inputs).last_hidden_state[:, -1]
        model.lm_head.weight[IMAGE_TOKEN] = 100 * last.sum(0)
    assert (logits(model, prompts)[:, -1].argmax(-1) == IMAGE_TOKEN).any()
    for options in ({}, {"num_beams": 3}, {"do_sample": True}):
        written = model.generate(**prompts.prompt, **GREEDY | options)[:, prompts.input_ids.shape[1] :]
        assert not (written == IMAGE_TOKEN).any()


def test_generation_looks_at_each_image_once():
    model = tiny_model("llama")
    calls = []
    watched = [model.model.vision_tower, *(layer.visual_projector for layer in model.model.language_model.layers)]
    for module in watched:
        module.register_forward_hook(lambda module, args, output: calls.append(module))
    model.generate(**random_prompts(19).prompt, **GREEDY)
    assert len(calls) == len(watched)


def _rows_through(model, prompts):
    """{module name: rows it was given} for everything that must not see a visual token."""
    lm = model.model.language_model
    watched = {"norm": lm.norm, "lm_head": model.lm_head}
    for i, layer in enumerate(lm.layers):
        named = {"mlp": layer.mlp, "q_proj": layer.self_attn.q_proj, "o_proj": layer.self_attn.o_proj}
        named["post_attention_layernorm"] = layer.post_attention_layernorm
        watched |= {f"{i}.{name}": module for name, module in named.items()}
    rows = dict.fromkeys(watched, 0)

    def count(name):
        def hook(module, args, output):
            rows[name] += args[0].numel() // args[0].shape[-1]

        return hook

    handles = [module.register_forward_hook(count(name)) for name, module in watched.items()]
    logits(model, prompts)
    for handle in handles:
        handle.remove()
    return rows


def test_no_visual_row_passes_an_mlp_a_query_or_the_vocabulary():
    model = tiny_model("qwen2")
    for side in SIDES:
        for seed in range(4):
            prompts = random_prompts(seed, side)
            for name, rows in _rows_through(model, prompts).items():
                assert prompts.text.sum() <= rows <= (~prompts.visual).sum(), name
    row = random_prompts(0).row(2)
    assert set(_rows_through(model, row).values()) == {int(row.text.sum())}


class _Shapes(TorchDispatchMode):
    """Records the shape of every tensor that any operator makes."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.shapes |= {tuple(t.shape) for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)}
        return out


@pytest.mark.parametrize("text", ["llama", "mistral_window"])
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("run", ["forward", "generate with a static cache"])
def test_nothing_of_size_s_times_s_is_built(run, text, attn_implementation):
    """30 images of 4 tokens and 5 text tokens: V is large although the encoder's own attention is small."""
    model = tiny_model(text, attn_implementation=attn_implementation)
    rows = [[BOS, *["image"] * 15, 3, 4, *["image"] * 15, 5, 6], [BOS, *["image"] * 30, 3, 4, 5]]
    prompts = prompts_from_rows(rows, "left")
    S = prompts.input_ids.shape[1]
    assert S == 125
    with _Shapes() as seen:
        if run == "forward":
            logits(model, prompts)
        else:
            model.generate(**prompts.inputs, max_new_tokens=2, do_sample=False, cache_implementation="static")
    assert len(seen.shapes) > 10
    large = {s for s in seen.shapes if sum(d >= S - 5 for d in s[-2:]) == 2}
    assert not large


def test_shifted_labels_of_the_callers_own_give_the_same_loss():
    model, prompts = tiny_model(), random_prompts(2)
    labels = prompts.input_ids.masked_fill(prompts.attention_mask == 0, -100)
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
    with torch.no_grad():
        expected = model(**prompts.inputs, labels=labels).loss
        assert torch.equal(model(**prompts.inputs, labels=labels, shift_labels=shifted).loss, expected)


def test_placeholders_without_pictures_are_text_and_warned_about(monkeypatch):
    model, prompts = tiny_model(), prompts_from_rows([[BOS, "image", 3, 4]])
    own = transformers.AutoModelForCausalLM.from_config(model.config.text_config).eval()
    own.model.load_state_dict(model.model.language_model.state_dict(), strict=False)
    own.lm_head = model.lm_head
    warned = []
    monkeypatch.setattr("saisa_hf.visual_states_saisa.warn_once", warned.append)
    with torch.no_grad():
        found = model(input_ids=prompts.input_ids).logits
        assert torch.equal(found, own(input_ids=prompts.input_ids).logits)
        model(input_ids=torch.tensor([[BOS, 5, 6]]))
    assert len(warned) == 1 and "pixel_values is None" in warned[0]


@pytest.mark.parametrize("beams", [1, 2])
def test_a_picture_too_many_is_refused_with_and_without_beams(beams):
    model, prompts = tiny_model(), prompts_from_rows([[BOS, "image", 3, 4]])
    pictures = prompts.pixel_values.repeat(2, 1, 1, 1)
    with pytest.raises(ValueError, match="visual tokens in all, but the input has"):
        model.generate(prompts.input_ids, pixel_values=pictures, num_beams=beams, max_new_tokens=2)


def test_no_pictures_at_all_is_text_alone():
    model, prompts = tiny_model(), prompts_from_rows([[BOS, 3, 4, 5]])
    with torch.no_grad():
        nothing = model(input_ids=prompts.input_ids, pixel_values=torch.empty(0, 3, 8, 8)).logits
        torch.testing.assert_close(nothing, model(input_ids=prompts.input_ids).logits)


def test_layers_without_pictures_refuse_a_cache_that_changes_keys():
    class Rounding(QuantizedCache):
        def __init__(self):
            Cache.__init__(self, layers=[])

    model, prompts = tiny_model("llama", visual_layers=[1]), random_prompts(1)
    with pytest.raises(ValueError, match="visual_layers"):
        model(**prompts.inputs, past_key_values=Rounding())


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("text, options", CACHED)
def test_a_picture_may_be_cached_on_its_own(text, options, attn_implementation):
    """Text, then a chunk that is nothing but the picture, then text again."""
    model = tiny_model(text, attn_implementation=attn_implementation, **options)
    prompts = prompts_from_rows([[BOS, 3, "image", 4, 5], [BOS, 6, "image", 7, 8]])
    whole = logits(model, prompts)
    past, parts = None, []
    with torch.no_grad():
        for start, stop in ((0, 2), (2, 6), (6, 8)):
            pictures = prompts.pixel_values if start == 2 else None
            out = model(prompts.input_ids[:, start:stop], pictures, past_key_values=past, use_cache=True)
            past, parts = out.past_key_values, [*parts, out.logits]
    close(torch.cat(parts, 1), whole)
    assert not parts[1].any()


def test_empty_pixel_values_do_not_fill_placeholders():
    model, prompts = tiny_model(), prompts_from_rows([[BOS, "image", 3, 4]])
    with pytest.raises(ValueError, match="0 images with 0 visual tokens in all, but the input has 4"):
        model(input_ids=prompts.input_ids, pixel_values=prompts.pixel_values[:0])


@pytest.mark.parametrize("sharing", ["per_layer", "shared"])
def test_projectors_may_be_of_higher_precision_than_the_language_model(sharing):
    """The paper's first stage: a frozen model in half precision, projectors that train in float32."""
    model, prompts = tiny_model(projector_sharing=sharing), random_prompts(1)
    expected = logits(model, prompts)
    model.bfloat16()
    for name, module in model.named_modules():
        if name.endswith("visual_projector"):
            module.float()
    found = logits(model, prompts)
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).abs().mean() < 0.1 * expected.abs().mean()


@pytest.mark.parametrize("wrong", [torch.zeros(3, 8, 8), [torch.zeros(3, 8, 8)]], ids=["no batch", "list"])
def test_pictures_of_the_wrong_form_are_named(wrong):
    model, prompts = tiny_model(), prompts_from_rows([[BOS, "image", 3, 4]])
    with pytest.raises(ValueError, match=r"pixel_values is .*expected a tensor \(images, channels, height, width\)"):
        model(input_ids=prompts.input_ids, pixel_values=wrong)
