"""What the package promises as a whole: its public names, its registration, that importing it is light, and what is
distributed."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import transformers
import yaml
from apart import alone, succeeds
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

import saisa_hf
from saisa_hf.checkpoint_saisa import AUTO_MAP, code_files
from saisa_hf.demo.run import CHECKPOINT


ROOT = Path(__file__).parent.parent


def modules_after(*statements: str) -> list[set[str]]:
    """What a new process has imported after each of the statements."""
    program = "import sys; " + "; ".join(f"{statement}; print(*sys.modules)" for statement in statements)
    output = subprocess.check_output([sys.executable, "-c", program], text=True)
    return [set(line.split()) for line in output.splitlines()[-len(statements) :]]


PARAMETERS = 1_674_368


def parameters_of(checkpoint: Path, cache: Path) -> int:
    """How many parameters the model has that `checkpoint` loads as by the code that it carries."""
    program = (
        "import sys; sys.modules['saisa_hf'] = None; from transformers import AutoModelForImageTextToText as Auto; "
        "model = Auto.from_pretrained(sys.argv[1], trust_remote_code=True); "
        "print(sum(p.numel() for p in model.parameters()))"
    )
    return int(succeeds(program, checkpoint, environment=alone(cache), cwd=ROOT).stdout.splitlines()[-1])


def third_party(modules: set[str]) -> set[str]:
    return {name for name in modules if name.split(".")[0] not in {"saisa_hf", *sys.stdlib_module_names}}


def test_importing_the_package_imports_no_other():
    before, after = modules_after("pass", "import saisa_hf")
    assert not third_party(after - before)


def test_the_model_imports_the_classes_it_builds_on_and_little_else():
    building_blocks = (
        "from transformers import AutoModel, AutoConfig, AutoProcessor, AutoModelForImageTextToText, BatchFeature; "
        "from transformers import GenerationMixin, activations; "
        "import transformers.processing_utils, transformers.masking_utils, "
        "transformers.modeling_layers, PIL.ImageOps, huggingface_hub.repocard_data, torch.nn.attention.bias"
    )
    model = "from saisa_hf import SaisaForConditionalGeneration, SaisaProcessor"
    before, after = modules_after(building_blocks, model)
    assert "saisa_hf.modeling_saisa" in after and not third_party(after - before)


def test_public_names_are_there_on_both_majors():
    for name in set(saisa_hf.__all__) - {"__version__"}:
        assert getattr(saisa_hf, name).__name__ == name
    if hasattr(transformers, "AutoModelForVision2Seq"):
        assert saisa_hf.AutoModelForVision2Seq is transformers.AutoModelForVision2Seq


@pytest.mark.parametrize("auto_class", [AutoModelForImageTextToText, saisa_hf.AutoModelForVision2Seq])
def test_the_auto_classes_find_the_registered_model(auto_class):
    model = auto_class.from_pretrained(CHECKPOINT)
    assert type(model) is saisa_hf.SaisaForConditionalGeneration
    assert type(AutoConfig.from_pretrained(CHECKPOINT)) is saisa_hf.SaisaConfig
    assert type(AutoModel.from_pretrained(CHECKPOINT)) is saisa_hf.SaisaModel


def test_the_shipped_checkpoint_carries_the_code_of_this_package():
    names = {path.name for path in code_files()}
    assert {reference.split(".")[0] + ".py" for reference in AUTO_MAP.values()} <= names
    assert {path.name for path in CHECKPOINT.glob("*.py")} == names
    for path in code_files():
        assert (CHECKPOINT / path.name).read_text() == path.read_text()


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git says which files there are")
def test_there_is_one_copy_of_the_code():
    for path in CHECKPOINT.glob("*.py"):
        assert os.readlink(path) == f"../../{path.name}"


def test_all_who_name_the_version_name_the_same():
    version = saisa_hf.__version__
    assert importlib.metadata.version("saisa-hf") == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))["version"] == version
    assert f"## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_workflow_runs_what_has_to_pass_before_a_change_lands():
    steps = re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci" / "run").read_text(encoding="utf-8"), re.M)
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    assert jobs["vllm"]["steps"][-1]["run"] == "make test-vllm PYTHON=python"
    assert [*jobs["make"]["strategy"]["matrix"]["target"], "test-vllm"] == steps


def test_the_navigation_of_the_site_names_every_page():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("\nnav:\n")[1]
    named = set(re.findall(r"^ +- (?:\w+: )?([\w/]+\.md)", navigation, re.M))
    in_docs = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert named == in_docs | {"index.md", "contributing.md", "changelog.md"}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git says which files there are")
def test_the_distributions_hold_what_the_repository_does(tmp_path):
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    files = {name for name in tracked if (ROOT / name).is_file()}
    copy, made = tmp_path / "repository", tmp_path / "dist"
    for name in files:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(made), str(copy)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    with tarfile.open(next(made.glob("*.tar.gz"))) as archive:
        in_archive = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path / "sdist", filter="data")
    assert files <= in_archive
    with zipfile.ZipFile(next(made.glob("*.whl"))) as wheel:
        in_wheel = {name for name in wheel.namelist() if ".dist-info/" not in name}
        wheel.extractall(tmp_path / "wheel")
    assert in_wheel == {name.removeprefix("src/") for name in files if name.startswith("src/")}

    (unpacked,) = (tmp_path / "sdist").iterdir()
    for number, package in enumerate(
        (copy / "src" / "saisa_hf", unpacked / "src" / "saisa_hf", tmp_path / "wheel" / "saisa_hf")
    ):
        assert parameters_of(package / "demo" / "checkpoint", tmp_path / f"modules-{number}") == PARAMETERS, package
