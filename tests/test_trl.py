# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""TRL's trainers take model and processor as they are, and with images they compute what the model itself computes."""

import functools
from itertools import pairwise

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_models import IMAGE_TOKEN, tiny_model
from training_parts import character_tokenizer, picture, processor_for
from transformers import Siglip2ImageProcessor

from saisa_hf import SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.chat.templates import chat_template


datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")
peft = pytest.importorskip("peft")

NEEDS_RECENT = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"), reason="TRL needs transformers 5.18 for assistant_only_loss"
)
TURNS = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
# two unlike samples, with two images and one
PICTURES = [[picture(20), picture(90)], [picture(70)]]
MESSAGES = [("A?", "Yes."), ("What is this, then?", "No", "And?", "Three.")]


def turns(*said, first="user"):
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[i % 2], "content": words} for i, words in enumerate(said)]


def data_set(rows):
    """Rows of conversations, texts and labels, with the pictures of each row."""
    kinds = {list: TURNS, str: datasets.Value("string"), bool: datasets.Value("bool")}
    features = {name: kinds[type(value)] for name, value in rows[0].items()}
    rows = [row | {"images": images} for row, images in zip(rows, [*PICTURES, *PICTURES], strict=False)]
    features["images"] = datasets.Sequence(datasets.Image())
    return datasets.Dataset.from_list(rows, features=datasets.Features(features))


def trainer_of(name, folder, rows, model=None, template="chatml", given=None, **options):
    """One of TRL's trainers for three steps with two samples each; `given` are further arguments of the trainer."""
    options = {
        "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no",
        "report_to": [], "use_cpu": True, "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True, "seed": 3,
    } | options  # fmt: skip
    if name in ("SFT", "DPO", "KTO"):
        options.setdefault("max_length", None)
    return getattr(trl, f"{name}Trainer")(
        model=tiny_model() if model is None else model,
        args=getattr(trl, f"{name}Config")(str(folder), **options),
        train_dataset=data_set(rows),
        **{"processing_class": processor_for(template)} | (given or {}),
    )


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


def positions_of(answers, ids, tokenizer):
    """bool (S,): where the `answers` stand in a row, in this order, found as text: here a character is a token."""
    places = [i for i, token in enumerate(ids.tolist()) if token != IMAGE_TOKEN]
    tokens = tokenizer.convert_ids_to_tokens(ids[places])
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(token))
    said, at = torch.zeros(len(ids), dtype=torch.bool), 0
    for answer in answers:
        at = "".join(tokens).index(answer, at)
        inside = [at <= a and b <= at + len(answer) for a, b in pairwise(ends)]
        said[[place for place, of_answer in zip(places, inside) if of_answer]] = True
        at += len(answer)
    return said


SFT = {
    "messages": ([{"messages": turns(*said)} for said in MESSAGES], {}, None),
    "assistant": (
        [{"messages": turns(*said)} for said in MESSAGES],
        {"assistant_only_loss": True},
        [["Yes.<|im_end|>"], ["No<|im_end|>", "Three.<|im_end|>"]],
    ),
    "completion": (
        [{"prompt": turns(*said[:-1]), "completion": turns(said[-1], first="assistant")} for said in MESSAGES],
        {},
        [["Yes.<|im_end|>\n"], ["Three.<|im_end|>\n"]],
    ),
    "prompt_and_completion": (
        [{"prompt": turns(*said[:-1]), "completion": turns(said[-1], first="assistant")} for said in MESSAGES],
        {"completion_only_loss": False},
        None,
    ),
    "text": ([{"text": "A<image>b <image>"}, {"text": "Which one?<image>\nThis"}], {}, None),
}


@pytest.mark.parametrize("alignment", ["input_space", "embedding_space"])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=NEEDS_RECENT if kind == "assistant" else ()) for kind in SFT]
)
def test_sft_has_the_loss_and_the_gradients_of_the_model(kind, alignment, tmp_path):
    rows, options, answers = SFT[kind]
    start = {"alignment": alignment, "projector_sharing": "shared"} if alignment == "embedding_space" else {}
    trainer = trainer_of("SFT", tmp_path, rows, tiny_model(**start), shuffle_dataset=False, **options)
    model, batch = trainer.model, trainer.data_collator(list(trainer.train_dataset))
    ids = batch["input_ids"]
    assert batch["pixel_values"].shape[0] == 3 and (ids == IMAGE_TOKEN).sum() == 12

    count = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
    loss = trainer.compute_loss(model, dict(batch), num_items_in_batch=count)
    found = gradients(model, loss)

    wanted = ids.masked_fill((batch["attention_mask"] == 0) | (ids == IMAGE_TOKEN), -100)
    if answers is not None:
        tokenizer = trainer.processing_class.tokenizer
        wanted[~torch.stack([positions_of(said, row, tokenizer) for said, row in zip(answers, ids)])] = -100
    behind = torch.nn.functional.pad(ids == IMAGE_TOKEN, (1, -1))
    wanted = wanted.masked_fill(behind, -100)
    # transformers 4.57 counts the first tokens as well, for all models
    assert count == (wanted[:, 1:] if Version(transformers.__version__).major > 4 else wanted).ne(-100).sum()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    own = model(**inputs, labels=wanted, num_items_in_batch=count).loss
    expected = gradients(model, own)
    torch.testing.assert_close(loss, own, rtol=1e-5, atol=1e-6)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_sft_of_adapters_has_the_loss_of_the_model(tmp_path):
    config = peft.LoraConfig(target_modules=r".*language_model.*\.(q|v)_proj", init_lora_weights=False)
    trainer = trainer_of("SFT", tmp_path, SFT["messages"][0], given={"peft_config": config})
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    torch.testing.assert_close(loss, trainer.model(**batch).loss, rtol=1e-5, atol=1e-6)


def test_sft_trainer_learns_from_conversations_with_pictures(tmp_path):
    trainer = trainer_of("SFT", tmp_path, SFT["messages"][0], max_steps=6)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]


def test_models_are_taken_by_their_folders(tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    trainer = trainer_of("SFT", tmp_path / "out", SFT["messages"][0], str(tmp_path / "model"))
    assert type(trainer.model) is SaisaForConditionalGeneration


def preferences(name):
    said = [("A?", "Yes.", "No, never"), ("B??", "Maybe", "No"), ("C", "a", "b"), ("D?", "One", "Two or three")]
    if name == "DPO":
        return [{"prompt": turns(a), "chosen": turns(b, first="assistant"), "rejected": turns(c, first="assistant")}
                for a, b, c in said]  # fmt: skip
    if name == "KTO":
        return [{"prompt": turns(a), "completion": turns(b, first="assistant"), "label": i % 2 == 0}
                for i, (a, b, _) in enumerate(said)]  # fmt: skip
    return [{"prompt": turns(a)} for a, _, _ in said]


def watched(model):
    """Compares each call of TRL's head with the model's own logits, as they come. Returns their numbers of images."""
    inner, images = model.forward, []

    @functools.wraps(inner)
    def forward(*args, **kwargs):
        outputs = inner(*args, **kwargs)
        if kwargs.get("fused_lm_head"):
            labels = kwargs["labels"][:, 1:]
            inputs = {k: v for k, v in kwargs.items() if k not in ("fused_lm_head", "labels", "num_items_in_batch")}
            with torch.no_grad():
                logits = inner(*args, **inputs).logits[:, :-1].float()
            asked = labels != -100
            own = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * asked
            torch.testing.assert_close(outputs.log_probs.detach(), own, rtol=1e-4, atol=1e-5)
            assert asked.any() and not (asked & (kwargs["input_ids"][:, :-1] == IMAGE_TOKEN)).any()
            images.append(len(kwargs["pixel_values"]))
        return outputs

    model.forward = forward
    return images


@pytest.mark.parametrize("name", ["DPO", "KTO", "GRPO", "RLOO"])
def test_three_steps_with_images_ask_text_tokens_for_what_the_model_says(name, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    model = SaisaForConditionalGeneration.from_pretrained(
        tmp_path / "model"
    )  # reference models are read from its folder
    given, options = {}, {}
    if name in ("GRPO", "RLOO"):
        given["reward_funcs"] = lambda completions, **_: [
            float(ord(one[0]["content"][:1] or " ") % 7) for one in completions
        ]
        options = {"num_generations": 2, "max_completion_length": 5, "beta": 0.1}
    trainer = trainer_of(name, tmp_path / "out", preferences(name), model, given=given, **options)
    images, before = watched(trainer.model), {k: x.clone() for k, x in model.state_dict().items()}
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(steps) == 3 and all(torch.isfinite(torch.tensor(entry["grad_norm"])) for entry in steps)
    assert len(images) >= 3 and all(images)
    assert any(not torch.equal(x, before[k]) for k, x in model.state_dict().items() if "visual_projector" in k)


def log_probability(model, processor, prompt, answer, images):
    """Of `answer` behind `prompt`, from the logits of one row without padding."""
    whole = processor.apply_chat_template(
        [{"role": "user", "content": [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]},
         {"role": "assistant", "content": answer}], images=images, tokenize=True, return_dict=True, return_tensors="pt",
    )  # fmt: skip
    ids = whole["input_ids"]
    logits = model(**whole).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[0, :, 0]
    return logits[-(len(answer) + 2) :].sum()  # with what ends a turn: <|im_end|> and a newline


def test_dpo_has_the_loss_that_its_formula_gives(tmp_path):
    torch.manual_seed(5)
    reference = tiny_model()
    with torch.no_grad():
        for x in reference.parameters():
            x += 0.02 * torch.randn_like(x)
    rows = preferences("DPO")[:2]
    trainer = trainer_of("DPO", tmp_path, rows, given={"ref_model": reference}, beta=0.3)
    batch = trainer.data_collator(list(trainer.train_dataset))
    loss = trainer.compute_loss(trainer.model, dict(batch))

    model, losses = trainer.model, []
    for row, images in zip(rows, PICTURES):
        words = {name: row[name][0]["content"] for name in ("prompt", "chosen", "rejected")}
        ratio = {
            name: log_probability(model, trainer.processing_class, words["prompt"], words[name], images)
            - log_probability(reference, trainer.processing_class, words["prompt"], words[name], images).detach()
            for name in ("chosen", "rejected")
        }
        losses.append(-torch.nn.functional.logsigmoid(0.3 * (ratio["chosen"] - ratio["rejected"])))
    own = torch.stack(losses).mean()
    torch.testing.assert_close(loss, own, rtol=1e-4, atol=1e-5)
    found, expected = gradients(model, loss), gradients(model, own)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5)


def paired(name):
    """Rows that only `name` and the trainers of pairs take."""
    said = turns("Yes.", first="assistant"), turns("No", first="assistant")
    return [{"prompt": turns("A?"), "chosen": said[0], "rejected": said[1]}] * 2 if name == "KTO" else preferences(name)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("SFT", {"packing": True, "max_length": 64}, "Packing is not supported for vision"),
    ("SFT", {"padding_free": True}, "Padding-free training is yet not supported for vision"),
    ("DPO", {"precompute_ref_log_probs": True}, "not supported for vision"),
    ("KTO", {}, "not supported for vision"),
])  # fmt: skip
def test_what_trl_does_not_support_with_images_it_refuses(name, options, message, tmp_path):
    rows = SFT["messages"][0] if name == "SFT" else paired(name)
    with pytest.raises(ValueError, match=message):
        trainer_of(name, tmp_path, rows, given={} if name == "SFT" else {"ref_model": tiny_model()}, **options)


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
def test_trl_takes_the_sizes_of_siglip_2_for_tiles(name, tmp_path):
    image_processor = Siglip2ImageProcessor(patch_size=4, max_num_patches=4)
    processor = SaisaProcessor(image_processor, character_tokenizer(), chat_template=chat_template("chatml"))
    given = {"reward_funcs": lambda completions, **_: [1.0] * len(completions), "processing_class": processor}
    options = {"num_generations": 2, "max_completion_length": 5, "beta": 0.0}
    trainer = trainer_of(name, tmp_path, preferences(name), tiny_model(vision="siglip2"), given=given, **options)
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError), match="row"):
        trainer.train()
