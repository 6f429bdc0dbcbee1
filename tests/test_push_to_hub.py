# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""push_to_hub and back: through HTTP, between processes, the second without this package (hub_standin.py is the hub)."""

import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from apart import succeeds
from hub_standin import HubStandIn
from test_convert import authors_checkpoint, tower_tensors, write_weights
from tiny_models import tiny_model

from saisa_hf import SaisaForConditionalGeneration


TESTS = Path(__file__).parent
REPO = "someone/tiny-saisa"

# Each script is a process of its own. Its arguments: this folder, the repository, the file for the logits.
START = """
import sys
tests, repo, logits_file = sys.argv[1:]
"""

PUSH = (
    START
    + """
sys.path.insert(0, tests)
import torch
from PIL import Image
from test_convert import old_words_tokenizer
from tiny_models import randomize
from transformers import CLIPImageProcessor
from saisa_hf import SaisaConfig, SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.chat.templates import chat_template

tokenizer = old_words_tokenizer(40)
tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
tokenizer.pad_token = "</s>"
images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
processor = SaisaProcessor(images, tokenizer, image_seq_length=4, chat_template=chat_template("plain"))
small = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
text = {"model_type": "llama", "vocab_size": 41, "rope_theta": 500000.0, "eos_token_id": 2, **small}
vision = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **small}
model = randomize(SaisaForConditionalGeneration(SaisaConfig(vision, text, image_token_id=40))).eval()
model.generation_config.suppress_tokens = [40]
model.push_to_hub(repo)
processor.push_to_hub(repo)
picture = Image.frombytes("RGB", (8, 8), bytes(range(192)))
inputs = processor(text="<s> word7 <image> word8 word9", images=picture, return_tensors="pt")
torch.save(model(**inputs).logits, logits_file)
"""
)

LOAD = (
    START
    + """
class NoPackage:
    def find_spec(self, name, path=None, target=None):
        if name == "saisa_hf" or name.startswith("saisa_hf."):
            raise ModuleNotFoundError("saisa_hf is not installed here")

sys.meta_path.insert(0, NoPackage())
import torch
import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

assert AutoConfig.from_pretrained(repo, trust_remote_code=True).text_config.vocab_size == 41
processor = AutoProcessor.from_pretrained(repo, trust_remote_code=True)
picture = Image.frombytes("RGB", (8, 8), bytes(range(192)))
inputs = processor(text="<s> word7 <image> word8 word9", images=picture, return_tensors="pt")
classes = [AutoModelForImageTextToText, *filter(None, [getattr(transformers, "AutoModelForVision2Seq", None)])]
for auto in classes:
    model = auto.from_pretrained(repo, trust_remote_code=True).eval()
    assert type(model).__name__ == "SaisaForConditionalGeneration"
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, torch.load(logits_file), atol=0, rtol=0)
assert 40 not in model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1]:]
assert not [name for name in sys.modules if name.split(".")[0] == "saisa_hf"]
"""
)

PUSH_AGAIN = (
    START
    + """
from saisa_hf import SaisaForConditionalGeneration
SaisaForConditionalGeneration.from_pretrained(repo).push_to_hub(repo)
"""
)

SAVE_AND_PUSH = (
    START
    + """
from saisa_hf import SaisaForConditionalGeneration, SaisaProcessor
model = SaisaForConditionalGeneration.from_pretrained(repo)
processor = SaisaProcessor.from_pretrained(repo)
model.config.save_pretrained("config", push_to_hub=True, repo_id="someone/config")
model.add_model_tags(["own"])
state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
model.save_pretrained("model", state_dict=state, push_to_hub=True, repo_id="someone/model", tags="said")
processor.save_pretrained("processor", push_to_hub=True, repo_id="someone/processor")
"""
)

CONVERT = (
    START
    + """
from saisa_hf.cli import main
sys.exit(main(["convert", repo, "ours"]))
"""
)

CONVERT_AND_PUSH = (
    START
    + """
from saisa_hf.cli import main
for number, more in enumerate([["--private"], ["--max-shard-size", "20MB"], ["--dtype", "bfloat16"]]):
    assert main(["convert", repo, f"ours-{number}", "--push-to-hub", f"someone/converted-{number // 2}", *more]) == 0
"""
)

CONVERT_WITHOUT_A_TOKEN = (
    START
    + """
from saisa_hf.cli import main
assert main(["convert", repo, "ours", "--push-to-hub", "someone/converted"]) == 1
assert main(["convert", repo, "ours", "--push-to-hub", "some one/con/verted"]) == 2
"""
)


def run(hub, home, script, repo=REPO, logits_file="", without=()):
    """Runs Python code in a process that knows no hub but `hub`, in the folder `home`; returns what it printed. `without`
    names variables of the environment that it lacks."""
    environment = os.environ | hub.environment(home) | {"OMP_NUM_THREADS": "1", "TRANSFORMERS_OFFLINE": "0"}
    environment = {name: value for name, value in environment.items() if name not in without}
    done = succeeds(script, TESTS, repo, logits_file, environment=environment, cwd=home)
    return done.stdout + done.stderr * bool(without)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """(hub, path of the logits before the push): a hub to which one process has pushed a model and its processor."""
    home = tmp_path_factory.mktemp("pusher")
    with HubStandIn() as hub:
        run(hub, home, PUSH, logits_file=home / "logits.pt")
        yield hub, home / "logits.pt"


def test_what_was_pushed_loads_in_a_process_without_the_package_and_gives_the_same_logits(pushed, tmp_path):
    hub, logits_file = pushed
    run(hub, tmp_path, LOAD, logits_file=logits_file)


def test_the_repository_holds_the_code_and_names_it_for_every_auto_class(pushed):
    files = pushed[0].files(REPO)
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert set(auto_map) >= {"AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForVision2Seq"}
    for reference in auto_map.values():
        module, name = reference.split(".")
        assert re.search(rf"^class {name}\b", files[f"{module}.py"].decode(), re.M), reference
    package = {path.name: path.read_bytes() for path in (TESTS.parent / "src" / "saisa_hf").glob("*_saisa.py")}
    assert {name: content for name, content in files.items() if name.endswith(".py")} == package
    for name, content in package.items():
        for sibling in re.findall(r"^\s*from \.(\w+) import", content.decode(), re.M):
            assert f"{sibling}.py" in files, f"{name} imports {sibling}, which was not pushed"


def test_the_repository_has_a_card_that_describes_this_model(pushed):
    card = pushed[0].files(REPO)["README.md"].decode()
    _, metadata, text = card.split("---\n", 2)
    metadata = yaml.safe_load(metadata)
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "image-text-to-text"
    assert "saisa" in metadata["tags"]
    assert f'from_pretrained("{REPO}", trust_remote_code=True)' in text
    assert "2502.02458" in text and "(4.57" not in text
    # hidden 24, encoder 24: two layers of two 24 x 24 maps with biases
    assert f"| projectors | {2 * 2 * (24 * 24 + 24):,} |" in text


def test_the_snippet_in_the_card_runs(pushed, tmp_path):
    from PIL import Image

    hub, _ = pushed
    Image.new("RGB", (20, 9), "red").save(tmp_path / "photo.jpg")
    blocks = re.findall(r"```python\n(.*?)```", hub.files(REPO)["README.md"].decode(), re.S)
    assert blocks and run(hub, tmp_path, "\n".join(blocks)).strip()


def test_a_card_that_somebody_wrote_survives_the_next_push(pushed, tmp_path):
    hub, _ = pushed
    own = "---\nlicense: mit\n---\n# My model\nwritten by hand\n"
    files = hub.files(REPO)
    repo = "someone/with-own-card"
    hub.create(repo)
    hub.commit(repo, files | {"README.md": own.encode()})
    run(hub, tmp_path, PUSH_AGAIN, repo)
    assert len(hub.repositories[repo]) == 3
    card = hub.files(repo)["README.md"].decode()
    assert "written by hand" in card and "license: mit" in card and "Cost of a prompt" not in card


def test_saving_with_push_to_hub_uploads_what_it_saves(pushed, tmp_path):
    hub, _ = pushed
    hub.create("someone/model")
    hub.commit("someone/model", {"model-00001-of-00002.safetensors": b"old", "adapter_model.safetensors": b"other"})
    run(hub, tmp_path, SAVE_AND_PUSH)
    code = {path.name for path in (TESTS.parent / "src" / "saisa_hf").glob("*_saisa.py")}
    wanted = {
        "config": {"config.json"},
        "model": {"config.json", "model.safetensors", "generation_config.json"},
        "processor": {"processor_config.json", "preprocessor_config.json", "tokenizer_config.json"},
    }
    for name, files in wanted.items():
        saved = {path.name for path in (tmp_path / name).iterdir()}
        assert files | code <= saved, name
        assert saved <= set(hub.files(f"someone/{name}")), name
    files = hub.files("someone/model")
    assert files["model.safetensors"] == (tmp_path / "model" / "model.safetensors").read_bytes()
    assert "model-00001-of-00002.safetensors" not in files and "adapter_model.safetensors" in files
    assert {"- own", "- said"} <= set(files["README.md"].decode().splitlines())


def test_convert_takes_the_checkpoint_and_its_encoder_from_the_hub(tmp_path):
    source = authors_checkpoint(
        tmp_path / "source", tower_inside=False, form="bin", shards=2, mm_vision_tower="someone/clip"
    )
    (source / "README.md").write_text("---\nlicense: llama2\n---\n")
    shutil.move(source / "vision", tmp_path / "clip")
    (tmp_path / "clip" / "pytorch_model.bin").unlink()
    write_weights(tmp_path / "clip", tower_tensors())
    (tmp_path / "clip" / "tf_model.h5").write_text("not wanted")
    with HubStandIn() as hub:
        for repo, folder in {"someone/theirs": source, "someone/clip": tmp_path / "clip"}.items():
            hub.create(repo)
            hub.commit(repo, {path.name: path.read_bytes() for path in folder.iterdir()})
        run(hub, tmp_path, CONVERT, "someone/theirs")
        assert not [line for line in hub.requests if line.endswith("tf_model.h5")]
    model, info = SaisaForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()) and model.config.image_token_id == 600
    metadata = yaml.safe_load((tmp_path / "ours" / "README.md").read_text().split("---\n")[1])
    assert (metadata["base_model"], metadata["license"]) == ("someone/theirs", "llama2")


def test_convert_pushes_its_result_and_nothing_else_stays_in_the_repository(tmp_path):
    source = authors_checkpoint(tmp_path / "source")
    with HubStandIn() as hub:
        card = b"---\nlicense: mit\n---\nmy own words\n"
        hub.create("someone/converted-0")
        stale = {"model-00001-of-00002.safetensors": b"old", "pytorch_model.bin": b"old", "notes.txt": b"mine"}
        hub.commit("someone/converted-0", stale | {"README.md": card})
        out = run(hub, tmp_path, CONVERT_AND_PUSH, str(source))
        assert out.count("uploaded it to") == 3
        sharded, again = hub.files("someone/converted-0"), hub.files("someone/converted-1")
        commits = {name: len(hub.repositories[f"someone/{name}"]) for name in ("converted-0", "converted-1")}
    assert commits == {"converted-0": 4, "converted-1": 2}  # one commit for each upload
    local = {path.name: path.read_bytes() for path in (tmp_path / "ours-1").iterdir()}
    assert len([name for name in local if name.startswith("model-")]) > 1
    assert sharded == local | {"notes.txt": b"mine", "README.md": card}
    last = {path.name: path.read_bytes() for path in (tmp_path / "ours-2").iterdir()}
    assert again == last | {".gitattributes": again[".gitattributes"]}
    assert 'from_pretrained("someone/converted-1", trust_remote_code=True)' in last["README.md"].decode()


def test_convert_asks_the_hub_who_it_is_before_it_begins(tmp_path):
    source = authors_checkpoint(tmp_path / "source")
    with HubStandIn() as hub:
        said = run(hub, tmp_path, CONVERT_WITHOUT_A_TOKEN, str(source), without=["HF_TOKEN"])
        assert not [line for line in hub.requests if line.startswith(("POST", "PUT"))]
    assert (
        "saisa: error: --push-to-hub someone/converted: the hub does not accept the login" in said
        and "HF_TOKEN" in said
    )
    assert not (tmp_path / "ours").exists()


def test_without_the_package_transformers_own_upload_takes_its_place(tmp_path, monkeypatch):
    """Of a class that came with a checkpoint; what that upload does not take is not lost in silence."""
    pushed = []

    def push_to_hub(self, repo_id, *, commit_message=None, private=None, token=None, revision=None, tags=None):
        pushed.append((repo_id, private))

    def missing(*names):
        raise ImportError("this needs the package saisa_hf")

    monkeypatch.setattr("saisa_hf.checkpoint_saisa.from_package", missing)
    monkeypatch.setattr("transformers.PreTrainedModel.push_to_hub", push_to_hub)
    model = tiny_model()
    model.save_pretrained(tmp_path / "saved", push_to_hub=True, repo_id="me/saved", private=True)
    model.push_to_hub("me/other", max_shard_size="1GB")
    assert pushed == [("me/saved", True), ("me/other", None)]
    with pytest.raises(ImportError, match="needs the package"):
        model.push_to_hub("me/saved", state_dict=model.state_dict())


def test_without_a_network_or_a_login_the_error_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)

    def refuse(*_, **__):
        raise RuntimeError("401 Client Error\nInvalid username or password.")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    model = tiny_model()
    with pytest.raises(
        OSError, match="nothing was uploaded to me/saisa: 401 Client Error Log in with `hf auth login`"
    ) as error:
        model.push_to_hub("me/saisa")
    assert "`hf upload me/saisa FOLDER` later" in str(error.value)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id)
    )
    monkeypatch.setattr("huggingface_hub.HfApi.file_exists", lambda *_, **__: True)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", refuse)
    with pytest.raises(OSError, match="nothing was uploaded to me/saisa"):
        model.push_to_hub("me/saisa")
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="Repo id"):
        model.push_to_hub("me/saisa/other")
