"""`saisa train`: options are checked, the shipped configs are the paper's, and a run loses nothing, however it ends."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from apart import run_apart
from PIL import Image
from tiny_models import IMAGE_TOKEN
from training_parts import (
    PLAIN,
    distance,
    losses,
    picture,
    processor_for,
    reports,
    run_options,
    stop_after,
    write_start,
)
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Trainer,
    TrainingArguments,
)

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration
from saisa_hf.checkpoint_saisa import code_files
from saisa_hf.cli import main, make_parser
from saisa_hf.demo import scenes
from saisa_hf.training import BadSample, NonFiniteLoss, TrainingOptions, load_options, train
from saisa_hf.training.curve import loss_curve
from saisa_hf.training.run import load_model, prepare_model, training_data
from saisa_hf.training.trainer import SaisaTrainer, checkpoints


CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
ROOT = Path(__file__).parent.parent


# --- options ---

NEEDED = {"model": "m", "data": "d.json", "output": "o"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"learning_rat": 1}, "'learning_rat' is not an option: did you mean 'learning_rate'"),
        ({"zzz": 1}, "'zzz' is not an option: see saisa train --help"),
        ({"learning_rate": "fast"}, "learning_rate='fast': expected a number"),
        ({"batch_size": 2.5}, "batch_size=2.5: expected a whole number"),
        ({"batch_size": 0}, "batch_size=0: expected a positive"),
        ({"captions": "maybe"}, "captions='maybe': expected true or false"),
        ({"train": "projector"}, "train='projector': expected one of projectors, "),
        ({"data": []}, "data is not given"),
        ({"streaming": True}, "give max_steps"),
        ({"warmup_ratio": 1}, "warmup_ratio=1.0: expected a share"),
        ({"lora_dropout": 2.0}, "lora_dropout=2.0: expected a share"),
        ({"lora_alpha": -3}, "lora_alpha=-3.0: expected a positive"),
        ({"weight_decay": -1}, "weight_decay=-1.0: expected a number that is not negative"),
        ({"max_grad_norm": -1}, "max_grad_norm=-1.0: expected a number that is not negative"),
        ({"seed": -1}, "seed=-1: expected a number that is not negative"),
    ],
)
def test_wrong_options_are_named_with_what_is_right(given, message, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps(NEEDED | given))
    with pytest.raises(ValueError, match=re.escape(message)):
        load_options(path)


def test_the_command_line_comes_before_the_file_and_knows_every_option(tmp_path, monkeypatch, capsys):
    path = tmp_path / "c.yaml"
    path.write_text("model: m\ndata: d.json\noutput: o\nlearning_rate: 1e-3\ncaptions: true\n")
    monkeypatch.chdir(tmp_path)
    for name in ("a.json", "b.json"):
        (tmp_path / name).write_text("[]")
    seen = []
    monkeypatch.setattr("saisa_hf.training.run.train", seen.append)
    command = ["train", str(path), "--learning-rate", "2e-5", "--data", "a.json", "b.json", "--captions", "false"]
    assert main([*command, "--resume"]) == 0
    assert seen == [TrainingOptions(**NEEDED | {"learning_rate": 2e-5, "data": ["a.json", "b.json"], "resume": True})]
    assert main(["train", str(path), "--learning-rte", "1"]) == 2
    assert "did you mean '--learning-rate'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    told = capsys.readouterr().out
    assert all("--" + name.replace("_", "-") in told for name in TrainingOptions.__dataclass_fields__)


def test_a_batch_has_to_divide_among_the_devices():
    options = TrainingOptions(**NEEDED, batch_size=128, per_device_batch_size=4)
    assert options.accumulation(8) == 4
    with pytest.raises(ValueError, match="batch_size=128 is not a multiple of 12"):
        options.accumulation(3)


# --- the shipped configs ---

ARCHITECTURES = {
    "lmsys/vicuna-7b-v1.5": lambda: LlamaConfig(vocab_size=32001),
    "meta-llama/Meta-Llama-3-8B": lambda: LlamaConfig(
        vocab_size=128257, intermediate_size=14336, num_key_value_heads=8
    ),
    "mistralai/Mistral-7B-v0.1": lambda: MistralConfig(vocab_size=32001),
    "Qwen/Qwen2.5-7B-Instruct": lambda: Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4,
    ),
}  # fmt: skip
PAPER = {"vicuna_7b": (20_979_712, 671_350_784)}


def test_there_is_a_config_for_each_stage_of_each_language_model():
    names = ("llama3_8b", "mistral_7b", "qwen2_5_7b", "tiny", "vicuna_7b")
    assert [path.stem for path in CONFIGS] == [f"{name}_stage{stage}" for name in names for stage in (1, 2)]


@pytest.mark.parametrize(
    "name", [path.stem[:-7] for path in CONFIGS if path.stem.endswith("1") and "tiny" not in path.stem]
)
def test_the_shipped_configs_are_the_papers_recipe(name):
    first, second = (load_options(ROOT / "configs" / f"{name}_stage{stage}.yaml") for stage in (1, 2))
    assert (first.learning_rate, first.batch_size, first.train, first.captions) == (1e-3, 256, "projectors", True)
    assert (second.learning_rate, second.batch_size) == (2e-5, 128)
    assert second.train == "projectors+language_model" and second.unshare_projectors and second.model == first.output
    for options in (first, second):
        assert (options.epochs, options.warmup_ratio, options.weight_decay) == (1, 0.03, 0)
        assert (options.lr_scheduler, options.max_length, options.dtype) == ("cosine", 2048, "bfloat16")
        assert options.accumulation(1) and options.accumulation(8)

    comment = (ROOT / "configs" / f"{name}_stage1.yaml").read_text().split("First: saisa ")[1].split("\nmodel:")[0]
    command = make_parser().parse_args(comment.replace("\\\n#", " ").split())
    assert command.paths[1:] == ["openai/clip-vit-large-patch14-336", f"./{first.model}"]
    assert (command.projector_sharing, command.pad_to_square) == ("shared", True)

    text = ARCHITECTURES[command.paths[0]]()
    config = SaisaConfig(text_config=text, image_token_id=text.vocab_size - 1, projector_sharing="shared")
    with torch.device("meta"):
        model = SaisaForConditionalGeneration(config)
    width, layers = text.hidden_size, text.num_hidden_layers
    projector = (1024 + 1) * width + (width + 1) * width
    counts = []
    for options in (first, second):
        prepare_model(model, options)
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    encoder = sum(p.numel() for p in model.vision_tower.parameters())
    assert counts == [projector, sum(p.numel() for p in model.parameters()) - encoder]
    projectors = sum(p.numel() for n, p in model.named_parameters() if "visual_projector" in n)
    assert projectors == layers * projector
    assert (counts[0], projectors) == PAPER.get(name, (counts[0], projectors))


# --- the digits ---


@pytest.fixture
def few_sprites(monkeypatch):
    """One distorted copy of each scan: to make them all takes many seconds."""
    pytest.importorskip("sklearn")
    scenes.sprites.cache_clear()
    monkeypatch.setattr(scenes, "VARIANTS", {"train": 1, "test": 1})
    yield
    scenes.sprites.cache_clear()


def test_the_tiny_configs_train_both_stages_and_ask_at_the_end(few_sprites, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "digits", "digits", "--pictures", "8"]) == 0
    samples = json.loads((tmp_path / "digits" / "questions.json").read_text())
    assert len(samples) == 8 and all((tmp_path / "digits" / sample["image"]).is_file() for sample in samples)
    short = ["--max-steps", "2", "--batch-size", "4", "--per-device-batch-size", "4"]
    for stage in (1, 2):
        config = str(ROOT / "configs" / f"tiny_stage{stage}.yaml")
        assert main(["train", config, *short, "--questions-limit", "4"]) == 0
        if stage == 1:
            assert main(["data", "check", str(ROOT / "configs" / "tiny_stage2.yaml")]) == 0
    assert re.search(r"\d of 4 held-out questions answered", capsys.readouterr().out)
    assert main(["data", "digits", "digits"]) == 2  # a folder that exists is left alone


# --- runs ---


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A folder with a tiny untrained model of one projector, and twelve samples."""
    assert processor_for().image_token_id == IMAGE_TOKEN
    return write_start(tmp_path_factory.mktemp("start"))


def options(start, output, **changes):
    return TrainingOptions(**run_options(start, output, **changes))


@pytest.fixture(autouse=True, scope="module")
def own_precision():
    """4.57's `TrainingArguments(bf16=True)`, of a test in another file, leaves a variable that makes all later runs of the
    process compute in bfloat16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
        yield


@pytest.fixture(scope="module")
def whole_run(start, tmp_path_factory):
    """A run that nothing stopped."""
    return train(options(start, tmp_path_factory.mktemp("whole") / "run"), log=lambda _: None)


@pytest.fixture(scope="module")
def plain_run(start, tmp_path_factory):
    """A run of plain gradient descent, which rounding leaves what it is."""
    return train(options(start, tmp_path_factory.mktemp("plain") / "run", **PLAIN), log=lambda _: None)


def assert_equal_losses(folder, other):
    found, expected = losses(folder), losses(other)
    assert found == {step: pytest.approx(loss, rel=1e-4) for step, loss in expected.items()}
    assert len(expected) == 6 and expected[6] < 0.9 * expected[1]  # there is something to differ in


def test_every_checkpoint_is_a_whole_model_for_the_auto_classes(whole_run):
    assert [path.name for path in checkpoints(whole_run)] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert not list(whole_run.glob(".*"))
    for folder in (whole_run / "checkpoint-2", whole_run):
        assert {path.name for path in code_files()} <= {path.name for path in folder.iterdir()}
        model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
        batch = processor(text=["USER: <image>\nA? ASSISTANT:"], images=[picture()], return_tensors="pt")
        assert model.config.projector_sharing == "per_layer"
        assert model.config.text_config.use_cache and getattr(model.config, "use_cache", True)
        assert model.generate(**batch, max_new_tokens=2).shape[1] == batch["input_ids"].shape[1] + 2


def test_the_losses_are_drawn(whole_run, tmp_path):
    assert Image.open(whole_run / "loss.png").size == (960, 540)
    history = [{"step": step, "loss": 4.0 - step} for step in range(1, 4)] + [{"eval_loss": 1}]
    assert loss_curve(history, tmp_path / "a.png") and not loss_curve(history[:1], tmp_path / "b.png")
    blue = np.argwhere((np.asarray(Image.open(tmp_path / "a.png")) == (30, 90, 200)).all(-1))
    rows, columns = blue[blue[:, 1].argsort()].T
    assert (np.diff(rows[::50]) >= -2).all() and rows[-1] - rows[0] > 200  # falls from left to right
    assert columns.min() <= 72 and columns.max() >= 938


KILLED = """
import os, signal, sys
from saisa_hf.training import SaisaTrainer, load_options, train

def killed(self, output_dir):
    if self.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return save(self, output_dir)

save, SaisaTrainer._save_rng_state = SaisaTrainer._save_rng_state, killed
train(load_options(sys.argv[1]))
"""


def test_a_run_killed_while_it_writes_a_checkpoint_goes_on_as_if_nothing_had_happened(start, whole_run, tmp_path):
    given = options(start, tmp_path / "run")
    (tmp_path / "c.yaml").write_text(json.dumps(vars(given)))
    ended = run_apart(KILLED, tmp_path / "c.yaml", environment=dict(os.environ), cwd=tmp_path)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert [path.name for path in checkpoints(given.output)] == ["checkpoint-2"]
    assert (tmp_path / "run" / ".partial" / "checkpoint-4").is_dir()
    said = []
    train(given, log=said.append)
    assert "checkpoint-2" in said[1]
    assert losses(given.output) == losses(whole_run) and len(losses(whole_run)) == 6
    assert distance(given.output, whole_run) == 0


def test_a_run_that_is_told_to_stop_saves_and_goes_on_later(start, whole_run, tmp_path, monkeypatch):
    given = options(start, tmp_path / "run", save_steps=5, save_total_limit=1)
    stop_after(2, monkeypatch)
    said = []
    with pytest.raises(SystemExit) as stopped:
        train(dataclasses.replace(given, overwrite=True), log=said.append)
    assert said[-1].endswith("after step 3; the same command without overwrite resumes the run")
    assert stopped.value.code == 143 and [path.name for path in checkpoints(given.output)] == ["checkpoint-3"]
    monkeypatch.undo()
    train(given, log=lambda _: None)
    assert losses(given.output) == losses(whole_run) and distance(given.output, whole_run) == 0
    assert [path.name for path in checkpoints(given.output)] == ["checkpoint-6"]


@pytest.mark.parametrize("trained", ["projectors", "projectors+language_model"])
def test_what_a_stage_does_not_train_is_the_same_to_the_last_bit(trained, start, tmp_path):
    changes = {"train": trained, "max_steps": 2, "save_steps": 0, "unshare_projectors": trained != "projectors"}
    folder = train(options(start, tmp_path / "run", **changes), log=lambda _: None)
    before = SaisaForConditionalGeneration.from_pretrained(start / "model")
    if changes["unshare_projectors"]:
        before.unshare_projectors()
    after = SaisaForConditionalGeneration.from_pretrained(folder).state_dict()
    assert before.state_dict().keys() == after.keys()
    for name, value in before.state_dict().items():
        learns = "visual_projector" in name if trained == "projectors" else "vision_tower" not in name
        assert torch.equal(value, after[name]) != learns, name


def test_accumulated_batches_equal_one_large_one(start, tmp_path):
    large, parts = (
        train(options(start, tmp_path / str(size), per_device_batch_size=size, group_by_length=False, **PLAIN), print)
        for size in (4, 1)
    )
    assert_equal_losses(parts, large)
    assert distance(parts, large) < 1e-4


@pytest.mark.parametrize("trained", ["projectors", "projectors+language_model"])
def test_gradient_checkpointing_of_both_kinds_changes_nothing(trained, start, tmp_path):
    def steps(name, **how):
        how |= {"train": trained, "unshare_projectors": trained != "projectors", "max_steps": 3, **PLAIN}
        folder = train(options(start, tmp_path / name, **how), log=lambda _: None)
        return list(chain(*reports(folder, "loss", "grad_norm").values()))

    plain = steps("plain")
    for reentrant in (False, True):
        found = steps(str(reentrant), gradient_checkpointing=True, use_reentrant=reentrant)
        assert found == pytest.approx(plain, rel=1e-4) and len(found) == 6


def test_a_run_makes_logits_for_labelled_rows_alone_and_tells_how_fast_it_is(start, tmp_path, monkeypatch):
    rows, labelled = [], []
    entropy, step = torch.nn.functional.cross_entropy, SaisaTrainer.training_step

    def watched_entropy(logits, *args, **kwargs):
        rows.append(len(logits))
        return entropy(logits, *args, **kwargs)

    def watched_step(self, model, inputs, *args, **kwargs):
        labelled.append(int((inputs["labels"] != -100).sum()))
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", watched_entropy)
    monkeypatch.setattr(SaisaTrainer, "training_step", watched_step)
    folder = train(options(start, tmp_path / "run", max_steps=2, save_steps=0), log=lambda _: None)
    assert rows == [count for count in labelled for _ in ("forward", "backward")]
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    assert all(history[0][f"{what}_per_second"] > 0 for what in ("tokens", "pictures")) and history[0]["memory_gib"] > 0


def test_tensorboard_gets_every_report(start, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    how = {"report_to": ["tensorboard"], "peak_tflops": 1e-3, "max_steps": 3, "save_steps": 0}
    folder = train(options(start, tmp_path / "run", **how), log=lambda _: None)
    where = [path.parent for root in (tmp_path / "events", folder) for path in root.rglob("events.out.tfevents.*")]
    events = EventAccumulator(str(where[0])).Reload()
    names = ("loss", "learning_rate", "tokens_per_second", "pictures_per_second", "tflops_per_second")
    for name in (*names, "flop_utilisation", "memory_gib"):
        written = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert written == {step: pytest.approx(value, rel=1e-5) for step, (value,) in reports(folder, name).items()}
        assert len(written) == 3
    speed, share = (events.Scalars(f"train/{name}")[-1].value for name in ("tflops_per_second", "flop_utilisation"))
    assert share == pytest.approx(speed / 1e-3, rel=1e-3) and speed > 0


def test_compiled_layers_learn_the_same_in_few_graphs(start, plain_run, tmp_path):
    """With batches of other shapes at every step, and one of text and images at unlike places."""
    torch._dynamo.utils.counters.clear()
    how = {"torch_compile": True, "compile_backend": "eager"} | PLAIN
    folder = train(options(start, tmp_path / "run", **how), log=lambda _: None)
    assert_equal_losses(folder, plain_run)
    assert not torch._dynamo.utils.counters["graph_break"]
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


def test_packed_samples_teach_what_padded_ones_do(start, plain_run, tmp_path):
    folder = train(options(start, tmp_path / "run", packing=True, **PLAIN), log=lambda _: None)
    assert_equal_losses(folder, plain_run)


def test_the_template_that_was_trained_is_saved_with_the_model(start, tmp_path):
    how = {"chat_template": "chatml", "max_steps": 1, "save_steps": 0}
    folder = train(options(start, tmp_path / "run", **how), log=lambda _: None)
    assert "<|im_start|>" in AutoProcessor.from_pretrained(folder, trust_remote_code=True).chat_template


def test_a_stream_is_trained_on(start, tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"image": str(start / f"{i}.png"), "text": "Yes."} for i in range(9)]
    features = datasets.Features(image=datasets.Image(), text=datasets.Value("string"))
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "a.parquet"))
    how = {"data": str(tmp_path / "a.parquet"), "streaming": True, "captions": True, "max_steps": 4, "save_steps": 0}
    assert len(losses(train(options(start, tmp_path / "run", **how), log=lambda _: None))) == 4


def test_projectors_have_their_own_learning_rate(start, tmp_path, monkeypatch):
    seen = []
    make = SaisaTrainer.create_optimizer

    def watched(self, *args, **kwargs):
        optimizer = make(self, *args, **kwargs)
        names = {id(p): name for name, p in self.model.named_parameters()}
        seen.extend((group["lr"], [names[id(p)] for p in group["params"]]) for group in optimizer.param_groups)
        return optimizer

    monkeypatch.setattr(SaisaTrainer, "create_optimizer", watched)
    train(options(start, tmp_path / "run", projector_learning_rate=3e-3, max_steps=1, save_steps=0), log=lambda _: None)
    rates = {name: rate for rate, names in seen for name in names}
    assert all(rate == (3e-3 if "visual_projector" in name else 1e-2) for name, rate in rates.items())
    assert len(rates) == sum(len(names) for _, names in seen) > 30


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(start, tmp_path):
    processor = processor_for()
    model = SaisaForConditionalGeneration.from_pretrained(start / "model")
    with torch.no_grad():
        model.get_input_embeddings().weight[processor.tokenizer.convert_tokens_to_ids("Z")] = math.nan
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with pytest.raises(NonFiniteLoss, match=r"q\.json, sample 8\b") as error:
        train(options(start, tmp_path / "run", model=str(tmp_path / "model"), max_steps=9), log=lambda _: None)
    assert len(re.findall("sample ", str(error.value))) == 4
    assert not (tmp_path / "run" / "config.json").exists()


def test_bad_samples_are_counted_at_the_end_and_held_out_questions_asked(start, tmp_path):
    records = json.loads((start / "q.json").read_text())
    records[1]["image"] = "missing.png"
    (tmp_path / "q.json").write_text(json.dumps(records))
    how = {"data": str(tmp_path / "q.json"), "images": str(start), "bad_samples": "skip", "questions_limit": 3}
    said = []
    train(
        options(start, tmp_path / "run", max_steps=3, save_steps=0, questions=str(start / "q.json"), **how), said.append
    )
    assert "left out 1 bad samples" in said
    assert re.search(r"of 3 held-out questions", said[-1])


def test_held_out_questions_may_be_in_parts_and_are_looked_at_before_the_training(start, tmp_path, monkeypatch):
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    records = [{"messages": turns, "image": "0.png"}, {"messages": [*turns, turns[0]], "images": ["0.png", "1.png"]}]
    (tmp_path / "q.json").write_text(json.dumps(records))
    given = options(
        start, tmp_path / "run", max_steps=1, save_steps=0, questions=str(tmp_path / "q.json"), images=str(start)
    )
    with pytest.raises(BadSample, match=r"q\.json, sample 1: expected a question and its answer as the last two turns"):
        train(given, log=lambda _: None)
    assert not (tmp_path / "run").exists()
    said = []
    monkeypatch.setattr("saisa_hf.training.held_out.ask", lambda model, processor, samples, _: ["yes."] * len(samples))
    train(dataclasses.replace(given, bad_samples="skip"), said.append)
    assert said[-2:] == [
        "  A?  yes.  (wanted: Yes.)",
        "1 of 1 held-out questions answered word for word (100.0%)",
    ]


@pytest.mark.parametrize("limit, kept", [(1, [2]), (2, [2, 6]), (3, [2, 5, 6])])
def test_the_best_checkpoint_is_kept_and_loaded_as_transformers_trainer_does(start, tmp_path, monkeypatch, limit, kept):
    folders, by_step = {}, [None, 5.0, 1.0, 3.0, 4.0, 3.5, 3.6]
    monkeypatch.setattr(Trainer, "evaluate", lambda self, *_, **__: {"eval_loss": by_step[self.state.global_step]})
    for name, trainer_class in (("ours", SaisaTrainer), ("theirs", Trainer)):
        given = options(start, tmp_path / name)
        dataset, collate = training_data(given, processor_for())
        arguments = TrainingArguments(
            str(tmp_path / name), eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1, max_steps=6,
            save_total_limit=limit, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=False,
            report_to=[], use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2, remove_unused_columns=False,
        )  # fmt: skip
        model = load_model(given)
        trainer = trainer_class(model, arguments, collate, dataset, dataset)
        trainer.train()
        best = tmp_path / name / "checkpoint-2"
        assert trainer.state.best_model_checkpoint == str(best)
        assert [path.name for path in checkpoints(tmp_path / name)] == [f"checkpoint-{step}" for step in kept]
        told = json.loads((tmp_path / name / f"checkpoint-{kept[-1]}" / "trainer_state.json").read_text())
        own = json.loads((best / "trainer_state.json").read_text())
        assert told["best_model_checkpoint"] == own["best_model_checkpoint"] == str(best)
        saved = SaisaForConditionalGeneration.from_pretrained(best).state_dict()
        assert all(torch.equal(tensor, saved[key]) for key, tensor in model.state_dict().items())
        folders[name] = sorted(path.name for path in (tmp_path / name).iterdir())
    assert folders["ours"] == folders["theirs"]


def test_a_workers_bad_sample_ends_the_run_with_one_sentence(start, tmp_path):
    records = json.loads((start / "q.json").read_text())
    records[1]["image"] = "missing.png"
    (tmp_path / "q.json").write_text(json.dumps(records))
    given = options(start, tmp_path / "run", data=str(tmp_path / "q.json"), images=str(start), workers=1)
    with pytest.raises(BadSample, match=r"^\S*q\.json, sample 1: image 0 \(.*missing\.png\) cannot be read: [^\n]*$"):
        train(given, log=lambda _: None)


def test_under_bfloat16_trained_weights_stay_in_float32(start, tmp_path):
    given = options(start, tmp_path / "run", dtype="bfloat16", train="projectors", max_steps=1, save_steps=0)
    dtypes = {(p.requires_grad, p.dtype) for p in load_model(given).parameters()}
    assert dtypes == {(True, torch.float32), (False, torch.bfloat16)}
    train(given, log=lambda _: None)
    assert math.isfinite(losses(given.output)[1])


def test_adapters_are_small_and_merge_into_a_whole_model(start, tmp_path):
    peft = pytest.importorskip("peft")
    given = options(start, tmp_path / "run", train="lora", lora_rank=2, max_steps=2, save_steps=0)
    model = load_model(given)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert any("visual_projector" in name for name in trained) and not any("vision_tower" in name for name in trained)
    train(given, log=lambda _: None)
    parts = options(start, tmp_path / "parts", train="lora", lora_rank=2, max_steps=2, save_steps=1)
    train(parts, log=lambda _: None)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-2")
    train(parts, log=lambda _: None)
    assert distance(parts.output, given.output) == 0
    merged = SaisaForConditionalGeneration.from_pretrained(given.output)
    base = SaisaForConditionalGeneration.from_pretrained(start / "model")
    base.unshare_projectors()
    assert merged.state_dict().keys() == base.state_dict().keys()
    adapted = peft.PeftModel.from_pretrained(base, Path(given.output) / "adapter")
    ids = torch.tensor([[1, 20, 30, 40]])
    assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-5)
    unadapted = SaisaForConditionalGeneration.from_pretrained(start / "model")
    assert not torch.allclose(adapted(ids).logits, unadapted(ids).logits, atol=1e-4)


def test_adapters_over_4_bits_learn_and_merge_into_the_weights_as_they_were(start, tmp_path):
    peft = pytest.importorskip("peft")
    bitsandbytes = pytest.importorskip("bitsandbytes")
    given = options(start, tmp_path / "run", train="qlora", lora_rank=2, save_steps=0)
    model = load_model(given)
    small = {name for name, module in model.named_modules() if isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert len(small) == 3 * 7 and all("self_attn" in name or "mlp" in name for name in small)
    train(given, log=lambda _: None)
    found = losses(given.output)
    assert found[6] < 0.9 * found[1]
    base = SaisaForConditionalGeneration.from_pretrained(start / "model")
    base.unshare_projectors()
    merged = SaisaForConditionalGeneration.from_pretrained(given.output)
    ids = torch.tensor([[1, 20, 30, 40]])
    before = base(ids).logits
    adapted = peft.PeftModel.from_pretrained(base, Path(given.output) / "adapter")
    assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-5)
    assert not torch.allclose(adapted(ids).logits, before, atol=1e-2)
