# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What has to work on any release of transformers, in a minute: `make test-newest` runs it on the newest there is."""

import importlib.util
import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from PIL import Image
from transformers import Trainer, TrainingArguments

from saisa_hf import SaisaForConditionalGeneration
from saisa_hf.demo.run import CHECKPOINT, ask_model, load
from saisa_hf.demo.scenes import draw, held_out_questions


ASKED = held_out_questions(4, seed=1)
ANSWERS = [question.answer for _, question in ASKED]
CACHES = ["dynamic", "static", "offloaded", "offloaded_static", "quantized"]


@pytest.fixture(scope="module")
def model_and_processor():
    return load(CHECKPOINT)


def batch_of(processor):
    texts = [f"USER: <image>\n{question.text} ASSISTANT:" for _, question in ASKED]
    pictures = [Image.fromarray(draw(scene)) for scene, _ in ASKED]
    return processor(text=texts, images=pictures, padding=True, return_tensors="pt")


REMOTE = """
import importlib.abc, sys
class NoPackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "saisa_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoPackage())
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
checkpoint, picture, question, again = sys.argv[1:]
for _ in range(2):
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True).eval()
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    batch = processor(text=f"USER: <image>\\n{question} ASSISTANT:", images=Image.open(picture), return_tensors="pt")
    ids = model.generate(**batch, max_new_tokens=8, do_sample=False)
    print("ANSWER", processor.batch_decode(ids[:, batch["input_ids"].shape[1]:], skip_special_tokens=True)[0].strip())
    model.save_pretrained(again)
    processor.save_pretrained(again)
    checkpoint = again
"""


def test_remote_code_answers_saves_and_loads_what_it_saved(tmp_path):
    scene, question = ASKED[0]
    Image.fromarray(draw(scene)).save(tmp_path / "picture.png")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    arguments = [str(CHECKPOINT), str(tmp_path / "picture.png"), question.text, str(tmp_path / "again")]
    command = [sys.executable, "-c", REMOTE, *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert [x for x in done.stdout.splitlines() if x.startswith("ANSWER")] == [f"ANSWER {question.answer}"] * 2


def test_a_batch_computes_what_its_rows_do(model_and_processor):
    model, processor = model_and_processor
    batch = batch_of(processor)
    with torch.no_grad():
        logits = model(**batch).logits
        for row in range(len(ASKED)):
            real = batch["attention_mask"][row].bool()
            alone = model(input_ids=batch["input_ids"][row][real][None], pixel_values=batch["pixel_values"][[row]])
            torch.testing.assert_close(logits[row][real][-1], alone.logits[0, -1], rtol=0, atol=1e-4)
    assert ask_model(model, processor, ASKED) == ANSWERS


class Stream(nullcontext):
    """A stream of CUDA's where there is none: offloaded caches ask for them by name."""

    def wait_stream(self, stream):
        pass


@pytest.mark.parametrize("kind", CACHES)
def test_every_kind_of_cache_gives_the_answers(model_and_processor, kind, monkeypatch):
    if "offloaded" in kind and not torch.cuda.is_available():
        monkeypatch.setattr(torch, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: Stream())
    if kind == "quantized" and not any(map(importlib.util.find_spec, ("optimum", "hqq"))):
        pytest.skip("no backend for quantized caches is installed")
    model, processor = model_and_processor
    batch = batch_of(processor)
    options = {} if kind == "dynamic" else {"cache_implementation": kind, "disable_compile": True}
    ids = model.generate(**batch, max_new_tokens=8, do_sample=False, **options)
    answers = processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert [answer.strip() for answer in answers] == ANSWERS


def rows_for_training(processor):
    batch = batch_of(processor)
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == processor.image_token_id, -100)
    return [{**{name: x[row] for name, x in batch.items()}, "labels": labels[row]} for row in range(len(ASKED))]


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "LoRA"])
def test_a_step_of_training_learns_saves_and_loads(tmp_path, lora):
    model, processor = load(CHECKPOINT)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    if lora:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj", "linear_1"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=4, learning_rate=1e-3, report_to=[], use_cpu=True,
        save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows_for_training(processor)).train()
    batch = batch_of(processor)
    with torch.no_grad():
        wanted = model.eval()(**batch).logits
    model.save_pretrained(tmp_path / "saved")
    if lora:
        loaded = peft.PeftModel.from_pretrained(load(CHECKPOINT)[0], tmp_path / "saved")
    else:
        assert any(not torch.equal(before[name], x) for name, x in model.state_dict().items())
        loaded = SaisaForConditionalGeneration.from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(**batch).logits, wanted, rtol=0, atol=1e-5)
