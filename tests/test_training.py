"""transformers' Trainer sees an ordinary model: it trains, freezes, saves and evaluates as any other."""

import pytest
import torch
from tiny_models import BOS, prompts_from_rows, tiny_model
from transformers import AutoModelForImageTextToText, Trainer, TrainingArguments

from saisa_hf.checkpoint_saisa import code_files


# whether the one image in front is bright decides the answer
QUESTION, BRIGHT, DARK = [5, 6], 7, 8


def collate(samples):
    prompts = prompts_from_rows([[BOS, "image", *QUESTION, BRIGHT if bright else DARK] for bright in samples])
    signs = torch.tensor([1.0 if bright else -1.0 for bright in samples])
    prompts.pixel_values = signs[:, None, None, None].expand(-1, 3, 8, 8).contiguous()
    labels = prompts.input_ids.clone()
    labels[:, :-1] = -100
    return {**prompts.inputs, "labels": labels}


def trainer_for(model, folder, **arguments):
    arguments = {
        "max_steps": 40,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 10,
        "save_strategy": "no",
        **arguments,
    }
    arguments = TrainingArguments(
        str(folder), remove_unused_columns=False, report_to=[], use_cpu=True, disable_tqdm=True, seed=0, **arguments
    )
    samples = [True, False] * 8
    return Trainer(model, arguments, data_collator=collate, train_dataset=samples, eval_dataset=samples)


@pytest.mark.parametrize("text", ["llama", "qwen3"])
@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_the_answer_about_an_image_is_learnt(text, options, tmp_path):
    trainer = trainer_for(tiny_model(text), tmp_path, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    assert after < 0.1 < 0.5 < before
    batch = collate([True, False, False])
    asked = {name: batch[name][:, :-1] for name in ("input_ids", "attention_mask")}
    ids = trainer.model.generate(**asked, pixel_values=batch["pixel_values"], max_new_tokens=1, do_sample=False)
    assert ids[:, -1].tolist() == [BRIGHT, DARK, DARK]


def test_what_is_frozen_stays_as_it_was(tmp_path):
    model = tiny_model("llama", projector_sharing="shared")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("visual_projector" in name)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer_for(model, tmp_path, max_steps=3).train()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == ("visual_projector" not in name), name


def test_a_checkpoint_of_the_trainer_is_a_whole_model(tmp_path):
    model = tiny_model("mistral")
    trainer_for(model, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert {path.name for path in code_files()} <= {path.name for path in checkpoint.iterdir()}
    again = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_losses_over_accumulated_batches_count_every_token_once(tmp_path):
    def first_loss(**sizes):
        trainer = trainer_for(tiny_model(), tmp_path, max_steps=1, logging_steps=1, **sizes)
        trainer.train()
        return trainer.state.log_history[0]["loss"]

    whole = first_loss(per_device_train_batch_size=8)
    parts = first_loss(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert parts == pytest.approx(whole, rel=1e-4)
