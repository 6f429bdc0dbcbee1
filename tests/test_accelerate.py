"""`accelerate launch` with the configs that ship: several processes learn what one does, and lose none of the weights."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DeepSpeedPlugin
from training_parts import PLAIN, distance, picture, reports, run_options, write_start
from transformers import AutoModelForImageTextToText, AutoProcessor

from saisa_hf.training import TrainingOptions, train
from saisa_hf.training.trainer import checkpoints


ROOT = Path(__file__).parent.parent
WORKER = Path(__file__).parent / "accelerate_worker.py"
CONFIGS = ROOT / "configs" / "accelerate"
HAS_PEFT = importlib.util.find_spec("peft") is not None
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None


@pytest.fixture(autouse=True, scope="module")
def own_precision():
    """A run sets the precision that accelerate computes in, for its process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_MIXED_PRECISION", "no")
        yield


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def alone(start, tmp_path_factory):
    """From options to the folder of what one process learns with them."""

    def run(**changes):
        given = run_options(start, tmp_path_factory.mktemp("alone") / "run", **PLAIN | changes)
        return train(TrainingOptions(**given), log=lambda _: None)

    return run


def launch(config, *command):
    """Runs `command` in two processes, and returns what they print."""
    launcher = ["accelerate.commands.launch", "--config_file", str(CONFIGS / f"{config}.yaml"), "--num_processes", "2"]
    ended = subprocess.run(
        [sys.executable, "-m", *launcher, "--main_process_port", "0", *map(str, command)],
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def launch_runs(config, folder, start, runs):
    """Trains with each of the options `runs`, by name, one after the other in the same two processes; one sample at a time
    and two in a row, so that sooner or later one process has a picture and the other none."""
    files = []
    for number, (name, changes) in enumerate(runs):
        given = run_options(start, folder / name, **PLAIN | {"per_device_batch_size": 1, "device": "auto"} | changes)
        files.append(folder / f"{number}.json")
        files[-1].write_text(json.dumps(given))
    launch(config, WORKER, *files)


def seen(folder):
    """What the two processes saw of a run (see `accelerate_worker.py`)."""
    return [json.loads((folder / f"seen-{rank}.json").read_text()) for rank in (0, 1)]


def assert_the_same(found, expected, steps=6):
    """The run in the folder `found` is the one in `expected`: losses, sizes of gradients, and weights at the end."""
    one, other = (reports(folder, "loss", "grad_norm") for folder in (found, expected))
    assert one == {step: pytest.approx(values, rel=1e-4) for step, values in other.items()} and len(one) == steps
    assert distance(found, expected) < 1e-5
    assert any(bool(mine) != bool(other) for mine, other in zip(*(rank["pictures"] for rank in seen(found))))


def assert_shared(ranks):
    """Every weight lies in parts on the two processes."""
    for name, whole in ranks[0]["whole"].items():
        parts = [rank["own"][name] for rank in ranks]
        assert whole <= sum(parts) <= whole + 1 and max(parts) <= max(0.6 * whole, 1), name


def assert_whole_model(folder):
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    assert model.config.architectures == ["SaisaForConditionalGeneration"]
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    batch = processor(text=["USER: <image>\nA? ASSISTANT:"], images=[picture()], return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=2).shape[1] == batch["input_ids"].shape[1] + 2


@pytest.fixture(scope="module")
def fsdp(start, tmp_path_factory):
    """A folder of runs under FSDP2: `plain`, which a signal to one process stopped after three steps and which then went on,
    `all`, `lora` and `bf16`."""
    folder = tmp_path_factory.mktemp("fsdp")
    bf16 = {"dtype": "bfloat16", "projector_learning_rate": 0.01, "lr_scheduler": "constant", "max_steps": 3}
    asked = {"questions": str(start / "q.json"), "questions_limit": 2}
    runs = [
        ("plain", {"stop_at": 2}),
        ("plain", {}),
        ("all", {"train": "all", "max_steps": 3, "gradient_checkpointing": True}),
        ("bf16", bf16 | asked),
    ]
    if HAS_PEFT:
        runs.append(("lora", {"train": "lora", "lora_rank": 2, "max_steps": 3}))
    launch_runs("fsdp2", folder, start, runs)
    return folder


def test_fsdp2_learns_what_one_process_does_also_past_a_signal(fsdp, alone):
    assert_the_same(fsdp / "plain", alone())
    ranks = seen(fsdp / "plain")
    assert_shared(ranks)
    assert [rank["resumed"] for rank in ranks] == [3, 3]
    assert {"FSDPSaisaDecoderLayer", "FSDPSaisaForConditionalGeneration"} <= set(ranks[0]["units"])
    assert not any("Projector" in unit for unit in ranks[0]["units"])


def test_checkpoints_of_fsdp2_are_whole_models_for_the_auto_classes(fsdp):
    assert [path.name for path in checkpoints(fsdp / "plain")] == ["checkpoint-3"]
    for folder in (fsdp / "plain", fsdp / "plain" / "checkpoint-3"):
        assert_whole_model(folder)


def test_a_trained_encoder_may_have_no_picture_on_one_process(fsdp, alone):
    changes = {"train": "all", "max_steps": 3, "gradient_checkpointing": True}
    assert_the_same(fsdp / "all", alone(**changes), steps=3)


@pytest.mark.skipif(not HAS_PEFT, reason="needs peft")
def test_adapters_learn_and_merge_under_fsdp2(fsdp, alone):
    assert_the_same(fsdp / "lora", alone(train="lora", lora_rank=2, max_steps=3), steps=3)


def test_fsdp2_in_bfloat16_keeps_what_is_trained_in_float32(fsdp, alone):
    changes = {"dtype": "bfloat16", "projector_learning_rate": 0.01, "lr_scheduler": "constant", "max_steps": 3}
    found, expected = (reports(path, "loss", "grad_norm") for path in (fsdp / "bf16", alone(**changes)))
    assert found == {step: pytest.approx(values, rel=0.02) for step, values in expected.items()}
    assert any(torch.tensor(loss).bfloat16().item() != loss for loss, _ in found.values())
    ranks = seen(fsdp / "bf16")
    assert ranks[0]["trained"] == ["torch.float32"]
    trained = {name: size for name, size in ranks[0]["whole"].items() if "vision_tower" not in name}
    projectors = sum(size for name, size in trained.items() if "visual_projector" in name)
    rates = {0.05: sum(trained.values()) - projectors, 0.01: projectors}
    assert {rate: sum(size for other, size in ranks[0]["rates"] if other == rate) for rate in rates} == rates


def test_two_processes_that_each_have_the_model_learn_what_one_does(start, alone, tmp_path):
    given = run_options(start, tmp_path / "run", per_device_batch_size=1, **PLAIN | {"save_steps": 3})
    (tmp_path / "c.yaml").write_text(json.dumps(given))
    printed = launch("ddp", "-m", "saisa_hf", "train", tmp_path / "c.yaml")
    assert printed.count("wrote ") == 1
    one, other = (reports(folder, "loss", "grad_norm") for folder in (given["output"], alone()))
    assert one == {step: pytest.approx(values, rel=1e-4) for step, values in other.items()} and len(one) == 6
    assert distance(given["output"], alone()) < 1e-5
    assert [path.name for path in checkpoints(given["output"])] == ["checkpoint-3", "checkpoint-6"]


@pytest.mark.skipif(not HAS_DEEPSPEED, reason="needs deepspeed, which is installed by hand")
@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_learns_what_one_process_does_also_past_a_signal(stage, start, alone, tmp_path):
    runs = [("plain", {"stop_at": 2}), ("plain", {})]
    if HAS_PEFT:
        runs.append(("lora", {"train": "lora", "lora_rank": 2, "max_steps": 3}))
    launch_runs(f"deepspeed_zero{stage}", tmp_path, start, runs)
    assert_the_same(tmp_path / "plain", alone())
    assert_whole_model(tmp_path / "plain" / "checkpoint-3")
    if stage == 3:
        assert_shared(seen(tmp_path / "plain"))
    if HAS_PEFT:
        assert_the_same(tmp_path / "lora", alone(train="lora", lora_rank=2, max_steps=3), steps=3)


# --- the configs that ship ---


@pytest.mark.parametrize("path", sorted(CONFIGS.iterdir()), ids=lambda path: path.stem)
def test_the_shipped_configs_have_no_key_that_accelerate_does_not_know(path):
    config = load_config_from_file(str(path))
    assert config.num_processes == 8
    known = vars(launch_command_parser().parse_args(["script.py"]))
    given = yaml.safe_load(path.read_text())
    names = {*given.get("fsdp_config", {}), *given.get("deepspeed_config", {})}
    assert names <= known.keys(), names - known.keys()
    if "fsdp_config" in given:
        assert given["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"] == "SaisaDecoderLayer"


@pytest.mark.parametrize("stage", [2, 3])
def test_the_shipped_deepspeed_configs_leave_everything_else_to_the_run(stage, monkeypatch):
    """As the launcher hands them on and accelerate's plugin reads them, which needs no deepspeed."""
    given = yaml.safe_load((CONFIGS / f"deepspeed_zero{stage}.yaml").read_text())["deepspeed_config"]
    for name, value in given.items():
        name = name.removeprefix("deepspeed_").replace("zero3_init_flag", "zero3_init")
        monkeypatch.setenv(f"ACCELERATE_DEEPSPEED_{name.upper()}", str(value).lower())
    for name in ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_GRADIENT_CLIPPING"):
        monkeypatch.delenv(name, raising=False)
    plugin = DeepSpeedPlugin()
    found, zero = plugin.deepspeed_config, plugin.deepspeed_config["zero_optimization"]
    left = "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"
    assert [found[name] for name in left] == ["auto"] * 4
    assert zero["stage"] == stage and plugin.zero3_init_flag is False
    assert zero["stage3_gather_16bit_weights_on_model_save"] is (stage == 3)
    assert zero["offload_optimizer"]["device"] == zero["offload_param"]["device"] == "none"
