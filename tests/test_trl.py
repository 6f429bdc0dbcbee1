"""TRL's `SFTTrainer` takes model and processor as they are."""

import pytest
from tiny_models import tiny_model
from training_parts import picture, processor_for


datasets = pytest.importorskip("datasets")
trl = pytest.importorskip("trl")


def test_sft_trainer_learns_from_conversations_with_pictures(tmp_path):
    turns = [{"role": "user", "content": "A?"}, {"role": "assistant", "content": "Yes."}]
    turn = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = datasets.Features(messages=[turn], images=datasets.Sequence(datasets.Image()))
    rows = [{"messages": turns, "images": [picture(20 * i)]} for i in range(8)]
    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1, max_length=None,
        save_strategy="no", report_to=[], use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = trl.SFTTrainer(
        model=tiny_model(),
        args=arguments,
        train_dataset=datasets.Dataset.from_list(rows, features=features),
        processing_class=processor_for("chatml"),
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
