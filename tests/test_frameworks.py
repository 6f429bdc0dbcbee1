# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What docs/frameworks.md says: expressions and registrations by which other frameworks find the parts of a model.

The registrations run with stand-ins for LLaMA-Factory and ms-swift, whose rules are written down here.
"""

import re
import sys
import types
from dataclasses import dataclass, field
from pathlib import Path

import peft
import pytest
from test_docs import blocks
from tiny_models import TEXT_MODELS, tiny_model
from training_parts import SIDE, TOKENS, picture, processor_for


PAGE = Path(__file__).parent.parent / "docs" / "frameworks.md"
LLAMA_FACTORY, SWIFT = blocks(PAGE, "py")
EXPRESSIONS = dict(re.findall(r'^([A-Z_]+) = r"(.*)"$', blocks(PAGE, "python")[0], re.M))
KINDS = [*({"text": name} for name in TEXT_MODELS), {"projector_sharing": "shared"}]
KINDS += [
    {"visual_token_reduction": "resampler", "reduced_visual_tokens": 2, "vision_seq_length": None},
    {"vision": "siglip"},
    {"vision": "dinov2"},
]
PARTS = ("vision_tower", "projectors", "language_model")


def part_of(model, name):
    """Which part of `model` a parameter belongs to, by the modules themselves."""
    modules = dict(model.named_modules())
    chain = [type(modules[".".join(name.split(".")[:n])]).__name__ for n in range(1, name.count(".") + 1)]
    if {"SaisaVisualProjector", "SaisaVisualResampler"} & set(chain):
        return "projectors"
    return "vision_tower" if any(modules[m] is model.model.vision_tower for m in prefixes(name)) else "language_model"


def prefixes(name):
    pieces = name.split(".")
    return [".".join(pieces[:n]) for n in range(1, len(pieces))]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(map(str, kind.values())))
def model(request):
    return tiny_model(**request.param)


def parts(model):
    found = {name: part_of(model, name) for name, _ in model.named_parameters()}
    assert set(found.values()) == set(PARTS)
    return found


def test_each_parameter_belongs_to_the_part_whose_expression_matches(model):
    for name, part in parts(model).items():
        assert [one for one in PARTS if re.fullmatch(EXPRESSIONS[one.upper()], name)] == [part], name


def test_adapters_reach_queries_and_values_of_the_language_model_alone(model):
    config = peft.LoraConfig(target_modules=EXPRESSIONS["ATTENTION_ADAPTERS"])
    adapted = peft.get_peft_model(model, config).targeted_module_names
    fused = hasattr(model.language_model.layers[0].self_attn, "qkv_proj")
    names = ("qkv_proj",) if fused else ("q_proj", "v_proj")
    layers = len(model.language_model.layers)
    assert sorted(adapted) == sorted(
        f"model.language_model.layers.{i}.self_attn.{n}" for i in range(layers) for n in names
    )


def stand_in(monkeypatch, **modules):
    for name, contents in modules.items():
        module = types.ModuleType(name.replace("__", "."))
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def llama_factory(monkeypatch):
    """What the snippet registers, by kind."""
    found = {}

    @dataclass
    class BasePlugin:
        image_token: str

        def _validate_input(self, *args): ...
        def _validate_messages(self, *args): ...
        def _regularize_images(self, images, **kwargs):
            return {"images": images}

    stand_in(
        monkeypatch,
        llamafactory={}, llamafactory__data={}, llamafactory__model={}, llamafactory__model__model_utils={},
        llamafactory__data__mm_plugin={
            "BasePlugin": BasePlugin,
            "register_mm_plugin": lambda name, plugin: found.update(plugin=plugin),
            "get_mm_plugin": lambda name, image_token: found["plugin"](image_token),
        },
        llamafactory__data__template={
            "StringFormatter": lambda slots: slots,
            "register_template": lambda **template: found.update(template=template),
        },
        llamafactory__model__model_utils__visual={
            "_register_composite_model": lambda model_type, **keys: found.update({model_type: keys}),
        },
    )  # fmt: skip
    module = types.ModuleType("llama_factory_snippet")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(LLAMA_FACTORY, "docs/frameworks.md", "exec"), vars(module))
    return found


def test_llama_factory_freezes_the_parts_that_are_named(model, llama_factory):
    keys = llama_factory["saisa"]
    chosen = {
        "vision_tower": keys["vision_model_keys"],
        "projectors": keys["projector_keys"],
        "language_model": keys["language_model_keys"],
    }
    for name, part in parts(model).items():  # get_forbidden_modules: substrings
        assert [one for one in PARTS if any(key in name for key in chosen[one])] == [part], name


def test_llama_factory_adapts_the_language_model_alone(model, llama_factory):
    forbidden = {"lm_head", *llama_factory["saisa"]["projector_keys"], *llama_factory["saisa"]["vision_model_keys"]}
    linear = {n for n, module in model.named_modules() if "Linear" in type(module).__name__}  # find_all_linear_modules
    targets = {n.split(".")[-1] for n in linear if not any(key in n for key in forbidden)}
    chosen = [n for n in linear if n.split(".")[-1] in targets and not any(key in n for key in forbidden)]
    assert chosen and all(re.fullmatch(EXPRESSIONS["LANGUAGE_MODEL"], n + ".weight") for n in chosen)


def test_llama_factory_makes_the_placeholders_of_the_processor(llama_factory):
    plugin, processor = llama_factory["template"]["mm_plugin"], processor_for()
    messages = [{"role": "user", "content": "<image>a<image>"}, {"role": "assistant", "content": "b"}]
    images = [picture(), picture(90)]
    made = plugin.process_messages(messages, images, [], [], processor)
    assert made[0]["content"] == "<image>" * TOKENS + "a" + "<image>" * TOKENS and made[1]["content"] == "b"
    assert messages[0]["content"] == "<image>a<image>"
    pixels = plugin._get_mm_inputs(images, [], [], processor)["pixel_values"]
    assert pixels.shape == (2, 3, SIDE, SIDE) and plugin._get_mm_inputs([], [], [], processor) == {}


@dataclass
class MultiModelKeys:
    arch_name: str
    language_model: list = field(default_factory=list)
    aligner: list = field(default_factory=list)
    vision_tower: list = field(default_factory=list)

    def __post_init__(self):
        self.vision_tower = [self.vision_tower] if isinstance(self.vision_tower, str) else self.vision_tower


@pytest.fixture
def arch(monkeypatch):
    found = []
    stand_in(
        monkeypatch, swift={}, swift__model={"MultiModelKeys": MultiModelKeys, "register_model_arch": found.append}
    )
    exec(compile(SWIFT, "docs/frameworks.md", "exec"), {})
    return found[0]


@pytest.mark.parametrize("llm", [True, False])
@pytest.mark.parametrize("vit", [True, False])
@pytest.mark.parametrize("aligner", [True, False])
def test_swift_trains_what_is_not_frozen(arch, llm, vit, aligner):
    for kind in ({}, {"projector_sharing": "shared"}):
        model = tiny_model(**kind)
        frozen = arch.language_model * llm + arch.vision_tower * vit + arch.aligner * aligner
        thawed = [] if aligner else arch.aligner
        for name, part in parts(model).items():  # freeze_parameters, then activate_parameters: prefixes
            trained = name.startswith(tuple(thawed)) or not name.startswith(tuple(frozen))
            wanted = {"vision_tower": not vit, "language_model": not llm, "projectors": not aligner}
            assert trained is wanted[part], name


def test_swift_adapts_projectors_only_when_asked(arch):
    model = tiny_model()
    linear = {n for n, module in model.named_modules() if "Linear" in type(module).__name__}
    inside = {n for n in linear if n.startswith("model.language_model.")}
    rejected = tuple(key for key in arch.aligner if key.startswith("model.language_model."))
    adapted = {n for n in inside if not n.startswith(rejected)}  # get_multimodal_target_regex: a lookahead
    assert inside - adapted == {n for n in linear if re.fullmatch(EXPRESSIONS["PROJECTORS"], n)}
