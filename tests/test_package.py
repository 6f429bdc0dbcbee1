"""What the package promises as a whole: its public names, its registration, and that importing it is light."""

import subprocess
import sys

import pytest
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText

import saisa_hf
from saisa_hf.checkpoint_saisa import AUTO_MAP, code_files
from saisa_hf.demo.run import CHECKPOINT


def modules_after(statement: str) -> set[str]:
    program = f"{statement}; import sys; print(*sys.modules)"
    return set(subprocess.check_output([sys.executable, "-c", program], text=True).split())


def test_importing_the_package_imports_the_classes_it_builds_on_and_little_else():
    building_blocks = (
        "from transformers import AutoModel, AutoConfig, AutoProcessor, AutoModelForImageTextToText, BatchFeature; "
        "from transformers import GenerationMixin, activations; "
        "import transformers.processing_utils, transformers.masking_utils, "
        "transformers.modeling_layers, PIL.ImageOps, huggingface_hub.repocard_data, torch.nn.attention.bias"
    )
    more = modules_after("import saisa_hf") - modules_after(building_blocks)
    third_party = {name for name in more if name.split(".")[0] not in {"saisa_hf", *sys.stdlib_module_names}}
    assert not third_party


def test_public_names_are_there_on_both_majors():
    for name in saisa_hf.__all__:
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
        assert (CHECKPOINT / path.name).read_text() == path.read_text(), "run python -m saisa_hf.demo.refresh"
