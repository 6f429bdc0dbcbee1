"""Without images, SAISA is its language model to the last bit, and reads that model's own checkpoint key for key."""

import pytest
import torch
import transformers
from tiny_models import (
    IMAGE_TOKEN,
    PAD,
    TEXT_CONFIGS,
    TEXT_MODELS,
    VOCAB_SIZE,
    Prompts,
    randomize,
    tiny_model,
)
from transformers import AutoModelForCausalLM

from saisa_hf.checkpoints.names import checkpoint_state_dict


SIDES = ["left", "right"]


def pair(text, attn_implementation="sdpa", dtype=torch.float32, **kwargs):
    """(SAISA model, transformers' own language model) with the same weights, copied by key."""
    their_implementation = eager_without_sdpa(text, attn_implementation)
    theirs = AutoModelForCausalLM.from_config(TEXT_CONFIGS[text](), attn_implementation=their_implementation)
    theirs = randomize(theirs, seed=1).to(dtype).eval()
    ours = tiny_model(text, attn_implementation=attn_implementation, dtype=dtype, **kwargs)
    ours.model.language_model.load_state_dict(checkpoint_state_dict(theirs.model), strict=False)
    if not ours.config.tie_word_embeddings:
        ours.lm_head.load_state_dict(theirs.lm_head.state_dict())
    for setting in ("pad_token_id", "eos_token_id"):
        setattr(theirs.generation_config, setting, getattr(ours.generation_config, setting))
    return ours, theirs


def text_prompts(seed=0, side="left", length=14, rows=3):
    """Random text prompts of differing lengths, padded on `side`; the longest fills the batch."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, IMAGE_TOKEN, (rows, length), generator=generator)
    mask = torch.ones_like(ids)
    for b in range(1, rows):
        pads = slice(0, 3 * b) if side == "left" else slice(length - 3 * b, None)
        mask[b, pads] = 0
    ids = ids.masked_fill(mask == 0, PAD)
    return Prompts(ids, mask, (mask.cumsum(-1) - 1).clamp(min=0), None, [0] * rows)


def named(prompts, *names):
    return {name: getattr(prompts, name) for name in names}


def assert_same(ours, theirs, name, tolerance=0):
    a, b = getattr(ours, name), getattr(theirs, name)
    a, b = ((a,), (b,)) if isinstance(b, torch.Tensor) else (a, b)
    assert len(a) == len(b)
    for x, y in zip(a, b):
        assert x.shape == y.shape and (x - y).abs().max() <= tolerance, f"{name}: {(x - y).abs().max()}"


def tolerance(text):
    """transformers 5 adds up the experts of a token in another order."""
    return 1e-5 if text in ("qwen3_moe", "mixtral") and not transformers.__version__.startswith("4.") else 0


def eager_without_sdpa(text, attn_implementation="sdpa"):
    """What transformers runs where `attn_implementation` is asked for: Gemma 2's scores are bounded, which sdpa cannot."""
    unsupported = text == "gemma2" and not transformers.Gemma2PreTrainedModel._supports_sdpa
    return "eager" if attn_implementation == "sdpa" and unsupported else attn_implementation


@pytest.mark.parametrize("text", TEXT_MODELS)
def test_a_language_model_checkpoint_loads_key_for_key(text):
    theirs = AutoModelForCausalLM.from_config(TEXT_CONFIGS[text]())
    ours = tiny_model(text)
    found = ours.model.language_model.load_state_dict(checkpoint_state_dict(theirs.model), strict=False)
    assert not found.unexpected_keys
    assert found.missing_keys and all(".visual_projector." in key for key in found.missing_keys)
    mine = ours.model.language_model.state_dict()
    for name, weight in checkpoint_state_dict(theirs.model).items():
        assert mine[name].shape == weight.shape


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("text", TEXT_MODELS)
def test_forward_is_the_language_models_to_the_last_bit(text, attn_implementation):
    ours, theirs = pair(text, attn_implementation)
    names = ["logits", "hidden_states", *(["attentions"] if attn_implementation == "eager" else [])]
    wanted = {"output_hidden_states": True, "output_attentions": attn_implementation == "eager"}
    for side in SIDES:
        prompts = text_prompts(side=side)
        labels = prompts.input_ids.masked_fill(prompts.attention_mask == 0, -100)
        for given in (
            ["input_ids"],
            ["input_ids", "attention_mask"],
            ["input_ids", "attention_mask", "position_ids"],
            ["input_ids", "position_ids"],
        ):
            inputs = named(prompts, *given) | {"labels": labels}
            with torch.no_grad():
                a, b = ours(**inputs, **wanted), theirs(**inputs, **wanted)
            for name in [*names, "loss"]:
                assert_same(a, b, name, tolerance(text))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "text", ["llama3_scaling", "mistral_window", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "olmo2", "granite"]
)
def test_half_precision_is_the_language_models_to_the_last_bit(text, dtype):
    ours, theirs = pair(text, dtype=dtype)
    prompts = text_prompts(1)
    with torch.no_grad():
        for inputs in (named(prompts, "input_ids", "attention_mask"), named(prompts, "input_ids")):
            assert_same(ours(**inputs), theirs(**inputs), "logits")


@pytest.mark.parametrize("options", [{"projector_sharing": "shared"}, {"visual_layers": [1]}])
def test_the_projectors_do_not_touch_text(options):
    ours, theirs = pair("qwen3", **options)
    inputs = named(text_prompts(2), "input_ids", "attention_mask")
    with torch.no_grad():
        assert_same(ours(**inputs), theirs(**inputs), "logits")


@pytest.mark.parametrize("text", TEXT_MODELS)
def test_inputs_embeds_and_logits_to_keep_are_the_language_models(text):
    ours, theirs = pair(text)
    prompts = text_prompts(3)
    with torch.no_grad():
        for keep in (1, 4, torch.tensor([0, 5])):
            inputs = {"attention_mask": prompts.attention_mask, "logits_to_keep": keep}
            # Gemma 2 scales its embeddings in the embedding (here, and in transformers 5) or behind it (4.57)
            a, b = (m(inputs_embeds=m.get_input_embeddings()(prompts.input_ids), **inputs) for m in (ours, theirs))
            assert_same(a, b, "logits", tolerance(text))


def test_an_input_without_rows_is_named():
    model = tiny_model("llama")
    for given in ({"input_ids": torch.zeros(0, 4, dtype=torch.long)}, {"inputs_embeds": torch.zeros(0, 4, 32)}, {}):
        with pytest.raises(ValueError, match="at least one row"):
            model(**given)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("text", TEXT_MODELS)
def test_prefill_chunks_and_decoding_are_the_language_models_to_the_last_bit(text, attn_implementation):
    ours, theirs = pair(text, attn_implementation)
    prompts = text_prompts(4)
    caches = [None, None]
    for start, stop in [(0, 8), (8, 11), (11, 12), (12, 13), (13, 14)]:
        inputs = {"input_ids": prompts.input_ids[:, start:stop], "attention_mask": prompts.attention_mask[:, :stop]}
        if start != 12:  # both count positions themselves where none are given
            inputs["position_ids"] = prompts.position_ids[:, start:stop]
        with torch.no_grad():
            a, b = (m(**inputs, past_key_values=c, use_cache=True) for m, c in zip((ours, theirs), caches))
        assert_same(a, b, "logits", tolerance(text))
        caches = [a.past_key_values, b.past_key_values]
        assert caches[0].get_seq_length() == caches[1].get_seq_length() == stop


@pytest.mark.parametrize("text", TEXT_MODELS)
def test_generation_is_the_language_models(text):
    ours, theirs = pair(text)
    prompts = text_prompts(5)
    inputs = named(prompts, "input_ids", "attention_mask")
    ways = [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}]
    for way in ways if text in ("llama", "mistral_window", "qwen2_window", "qwen3") else ways[:1]:
        options = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        a, b = (m.generate(**inputs, **options | way) for m in (ours, theirs))
        assert_same(a, b, "sequences")
        assert_same(a, b, "logits", tolerance(text))
    torch.manual_seed(0)
    a = ours.generate(**inputs, do_sample=True, max_new_tokens=8)
    torch.manual_seed(0)
    assert torch.equal(a, theirs.generate(**inputs, do_sample=True, max_new_tokens=8))


@pytest.mark.parametrize("text", ["llama", "qwen3"])
def test_gradients_are_the_language_models(text):
    ours, theirs = pair(text)
    prompts = text_prompts(6, "right")
    labels = prompts.input_ids.masked_fill(prompts.attention_mask == 0, -100)
    inputs = named(prompts, "input_ids", "attention_mask") | {"labels": labels, "num_items_in_batch": torch.tensor(9)}
    a, b = ours(**inputs).loss, theirs(**inputs).loss
    assert torch.equal(a, b)
    a.backward(), b.backward()
    mine = dict(ours.model.language_model.named_parameters())
    for name, p in theirs.model.named_parameters():
        torch.testing.assert_close(mine[name].grad, p.grad)
    assert all(p.grad is None or not p.grad.any() for n, p in mine.items() if "visual_projector" in n)


def test_the_placeholder_is_an_ordinary_token_to_generation():
    """A model that writes its own placeholder goes on, as its language model does."""
    ours, theirs = pair("llama")
    inputs = named(text_prompts(7), "input_ids", "attention_mask")
    force = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": list(range(VOCAB_SIZE - 1))}
    assert torch.equal(ours.generate(**inputs, **force), theirs.generate(**inputs, **force))
