"""Checkpoints carry their code: they load, run and save where saisa_hf is not importable, across transformers releases.

`roundtrip.py` is what the child processes run; it holds the comparisons. `scripts/compat.py` runs it on every release.
"""

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import apart
import pytest
import torch
import transformers
from apart import alone, run_apart
from hub_standin import HubStandIn
from roundtrip import AUTO_MAP, TOLERANCE, VARIANTS, RoundTripError, build, require_package_absent, run
from safetensors.torch import load_file, save_file

import saisa_hf
from saisa_hf import AutoModelForVision2Seq, SaisaForConditionalGeneration


ROUND_TRIP = Path(__file__).with_name("roundtrip.py")
CODE = Path(saisa_hf.__file__).parent
OTHER_PYTHON = os.environ.get("SAISA_OTHER_PYTHON")


def child(home, *arguments, python=sys.executable, **variables):
    """Runs `roundtrip.py` away from the repository, with caches of its own in the new folder `home`."""
    home.mkdir()
    return run_apart(ROUND_TRIP, *arguments, environment=alone(home, **variables), cwd=home, python=python)


def succeeds(*arguments, **options):
    done = child(*arguments, **options)
    assert done.returncode == 0, done.stderr[-6000:]


def checkpoints(folder):
    return [folder / variant for variant in VARIANTS]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of the checkpoints that this environment's package saves."""
    folder = tmp_path_factory.mktemp("saved")
    succeeds(folder / "home", "save", folder, PYTHONPATH=str(CODE.parent))
    return folder


def edited(source, folder, edit):
    """A copy of a checkpoint whose tensors `edit` makes from {name: tensor}."""
    shutil.copytree(source, folder)
    tensors = edit(load_file(folder / "model.safetensors"))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def without(*prefixes):
    return lambda tensors: {name: t for name, t in tensors.items() if not name.startswith(prefixes)}


def with_flat_tower_names(tensors):
    """The names that transformers 5.6 and later give CLIP's and SigLIP's parameters."""
    return {name.replace("vision_tower.vision_model.", "vision_tower."): t for name, t in tensors.items()}


TOWER = "model.vision_tower."
PROJECTOR = "model.language_model.layers.0.visual_projector."
INCOMPLETE = {
    "no-vision-tower": (TOWER, "vision_tower.vision_model.embeddings.patch_embedding.weight"),
    "one-tensor-short": (TOWER + "vision_model.encoder.layers.1.mlp.fc2.bias", "layers.1.mlp.fc2.bias"),
    "no-projector": (PROJECTOR, "layers.0.visual_projector.linear_1.weight"),
    "no-projector-bias": (PROJECTOR + "linear_2.bias", "layers.0.visual_projector.linear_2.bias"),
    "no-language-model-norm": ("model.language_model.norm.", "language_model.norm.weight"),
}


# --- in one environment -----------------------------------------------------------------------------------------------


def test_remote_code_equals_the_package_and_saves_what_it_loaded(saved, tmp_path):
    arguments = ["check", *checkpoints(saved), "--code", CODE, "--resave", tmp_path / "again", "--without-package"]
    succeeds(tmp_path / "home", *arguments)


def test_the_loading_process_would_notice_the_package():
    with pytest.raises(RoundTripError, match="importable"):
        require_package_absent()


def test_a_checkpoint_from_the_hub_saves_code_of_its_own(saved, tmp_path):
    """transformers writes "repository--module.Class" into the `auto_map` of what it downloads."""
    source = saved / "llama-clip"
    with HubStandIn() as hub:
        hub.create("someone/tiny")
        hub.commit("someone/tiny", {path.name: path.read_bytes() for path in source.iterdir()})
        variables = hub.environment(tmp_path / "home")
        arguments = ["load", "someone/tiny", "--save", tmp_path, "--without-package"]
        succeeds(tmp_path / "home", *arguments, **variables)
    assert sorted(path.name for path in source.glob("*_saisa.py")) == sorted(
        path.name for path in CODE.glob("*_saisa.py")
    )
    for path in [*source.glob("*_saisa.py"), source / "model.safetensors"]:
        assert filecmp.cmp(path, tmp_path / "tiny" / path.name, shallow=False), path.name
    assert json.loads((tmp_path / "tiny" / "config.json").read_text())["auto_map"] == AUTO_MAP
    for path in (tmp_path / "tiny").glob("*.json"):
        assert "--" not in json.dumps(json.loads(path.read_text()).get("auto_map")), path.name


def _model(folder):
    return SaisaForConditionalGeneration.from_pretrained(folder)


@pytest.mark.parametrize(
    "load",
    [
        _model,
        AutoModelForVision2Seq.from_pretrained,
        transformers.AutoModelForImageTextToText.from_pretrained,
        transformers.AutoModel.from_pretrained,
        transformers.AutoConfig.from_pretrained,
        transformers.AutoProcessor.from_pretrained,
    ],
    ids=["class", "Vision2Seq", "ImageTextToText", "Model", "Config", "Processor"],
)
def test_whatever_the_package_saves_carries_all_code_files_and_names(saved, tmp_path, load):
    thing = load(saved / "llama-clip")
    assert type(thing).__module__.startswith("saisa_hf.")
    thing.save_pretrained(tmp_path)
    for path in CODE.glob("*_saisa.py"):
        assert filecmp.cmp(path, tmp_path / path.name, shallow=False), path.name
    if (tmp_path / "config.json").exists():
        assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP
    else:
        named = json.loads((tmp_path / "processor_config.json").read_text())["auto_map"]
        assert named == {"AutoProcessor": AUTO_MAP["AutoProcessor"]}


ALONE = """
import importlib.abc, sys
class NoPackage(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "saisa_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, NoPackage())
import transformers
auto_class, source, target = sys.argv[1:]
getattr(transformers, auto_class).from_pretrained(source, trust_remote_code=True).save_pretrained(target)
"""


@pytest.mark.parametrize("auto_class", ["AutoConfig", "AutoModel", "AutoProcessor"])
def test_what_remote_code_loads_alone_saves_whole(saved, tmp_path, auto_class):
    """A process that has loaded nothing else has no file in its cache but those that transformers carried along."""
    (tmp_path / "home").mkdir()
    arguments = (auto_class, saved / "llama-clip", tmp_path / "again")
    apart.succeeds(ALONE, *arguments, environment=alone(tmp_path / "home"), cwd=tmp_path)
    for path in CODE.glob("*_saisa.py"):
        assert filecmp.cmp(path, tmp_path / "again" / path.name, shallow=False), path.name


def test_the_code_files_need_no_other_module_of_the_package(tmp_path):
    """Nor anything but PyTorch, transformers and what these bring along."""
    allowed = {"torch", "transformers", "safetensors", "huggingface_hub", "numpy", "PIL", *sys.stdlib_module_names}
    from transformers.dynamic_module_utils import get_imports, get_relative_imports

    carried = {path.stem for path in CODE.glob("*_saisa.py")}
    for path in CODE.glob("*_saisa.py"):
        assert set(get_relative_imports(path)) <= carried, path.name
        assert set(get_imports(path)) <= allowed, path.name


# --- names and completeness of the tensors ----------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_vision_tensors_load_under_the_names_of_either_release(saved, tmp_path, variant):
    flat = edited(saved / variant, tmp_path / "flat", with_flat_tower_names)
    assert any(name.startswith("model.vision_tower.embeddings") for name in load_file(flat / "model.safetensors"))
    model, info = SaisaForConditionalGeneration.from_pretrained(flat, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wanted = load_file(saved / variant / "model.safetensors")
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in wanted.items())
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == wanted.keys()


@pytest.mark.parametrize("case", INCOMPLETE)
def test_an_incomplete_checkpoint_is_refused_by_name(saved, tmp_path, case):
    prefix, named = INCOMPLETE[case]
    folder = edited(saved / "llama-clip", tmp_path / case, without(prefix))
    for auto_class in (SaisaForConditionalGeneration, AutoModelForVision2Seq, transformers.AutoModel):
        with pytest.raises(ValueError, match="lacks") as error:
            auto_class.from_pretrained(folder)
        assert named in str(error.value)


def test_a_checkpoint_without_its_head_is_refused(saved, tmp_path):
    folder = edited(saved / "llama-clip", tmp_path / "headless", without("lm_head."))
    with pytest.raises(ValueError, match=r"lacks 1 of the model's tensors: lm_head\.weight"):
        SaisaForConditionalGeneration.from_pretrained(folder)


def test_a_checkpoint_of_foreign_names_is_refused(saved, tmp_path):
    folder = edited(
        saved / "llama-clip", tmp_path / "foreign", lambda tensors: {f"x.{k}": v for k, v in tensors.items()}
    )
    with pytest.raises(ValueError, match="lacks"):
        SaisaForConditionalGeneration.from_pretrained(folder)


def test_a_base_model_without_a_head_is_no_incomplete_checkpoint(saved, tmp_path):
    folder = edited(saved / "llama-clip", tmp_path / "headless", without("lm_head."))
    assert transformers.AutoModel.from_pretrained(folder) is not None


def test_remote_code_reads_either_names_and_refuses_incomplete_checkpoints(saved, tmp_path):
    complete = [edited(path, tmp_path / f"flat-{path.name}", with_flat_tower_names) for path in checkpoints(saved)]
    incomplete = {
        str(edited(saved / "llama-clip", tmp_path / case, without(prefix))): named
        for case, (prefix, named) in INCOMPLETE.items()
    }
    results = tmp_path / "results.json"
    arguments = ["load", *complete, *incomplete, "--save", tmp_path / "out", "--results", results, "--without-package"]
    assert child(tmp_path / "home", *arguments).returncode == 1
    errors = json.loads(results.read_text())
    for path, original in zip(complete, checkpoints(saved)):
        assert errors[str(path)] is None
        wanted, found = (
            load_file(original / "model.safetensors"),
            load_file(tmp_path / "out" / path.name / "model.safetensors"),
        )
        assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    for path, named in incomplete.items():
        assert errors[path].startswith("ValueError") and named in errors[path]


# --- across environments ----------------------------------------------------------------------------------------------

needs_other = pytest.mark.skipif(
    not OTHER_PYTHON, reason="SAISA_OTHER_PYTHON names no interpreter whose transformers is of the other major release"
)


@pytest.fixture(scope="module")
def saved_by_other(tmp_path_factory):
    command = [OTHER_PYTHON, "-c", "from importlib.metadata import version; print(version('transformers'))"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert version.split(".")[0] != transformers.__version__.split(".")[0], f"SAISA_OTHER_PYTHON has {version}"
    folder = tmp_path_factory.mktemp("saved-by-other")
    succeeds(folder / "home", "save", folder, python=OTHER_PYTHON, PYTHONPATH=str(CODE.parent))
    return folder


@needs_other
@pytest.mark.parametrize("saver", ["this", pytest.param("other", marks=pytest.mark.slow)])
def test_a_checkpoint_survives_a_journey_through_both_major_releases(saved, saved_by_other, tmp_path, saver):
    """Loaded by either; saved again by either; each of these loaded by the other."""
    first = checkpoints(saved if saver == "this" else saved_by_other)
    for name, python in {"this": sys.executable, "other": OTHER_PYTHON}.items():
        common = ["--code", CODE, "--without-package", "--resave", tmp_path / f"by-{name}"]
        succeeds(tmp_path / f"home-{name}", "check", *first, *common, python=python)
    for name, python in {"this": OTHER_PYTHON, "other": sys.executable}.items():
        second = checkpoints(tmp_path / f"by-{name}" / first[0].parent.name)
        succeeds(tmp_path / f"home-again-{name}", "check", *second, "--code", CODE, "--without-package", python=python)


@needs_other
@pytest.mark.parametrize("variant", VARIANTS)
def test_both_major_releases_compute_the_same(saved_by_other, variant):
    tensors, strings = run(*build(variant))
    other = load_file(saved_by_other / "expected" / f"{variant}.safetensors")
    for name, tensor in other.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=0, atol=TOLERANCE if tensor.is_floating_point() else 0)
    assert strings == json.loads((saved_by_other / "expected" / f"{variant}.json").read_text())
