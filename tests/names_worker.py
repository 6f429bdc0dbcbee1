# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The drills of `test_names.py`, in a process that has no saisa_hf: names of transformers are taken away, arguments and
output fields are added, and the shipped checkpoint, loaded by its own code, has to answer as before.

Usage: names_worker.py RESULTS CHECKPOINT DRILL..., where a drill is a name, several joined by "+", or "additions". Each runs
in a process that is forked off, so that all share the import of PyTorch and transformers. RESULTS becomes {drill: error or
None}.
"""

import dataclasses
import importlib
import importlib.abc
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path

import torch
from safetensors.torch import load_file


TEXT = "USER: <image>\nWhich digit is in the bottom left? ASSISTANT:"


class NoPackage(importlib.abc.MetaPathFinder):
    """Keeps saisa_hf out of reach."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "saisa_hf":
            raise ModuleNotFoundError(name)


# --- taking names away ------------------------------------------------------------------------------------------------


def is_ours(frame) -> bool:
    return frame.f_globals.get("__name__", "").endswith("_saisa")


def hide(name: str) -> None:
    """Makes transformers a release without `name` for the code files of checkpoints; for its own modules it stays there."""
    path, _, attribute = name.rpartition(".")
    try:
        owner, place = importlib.import_module(path), None
    except ImportError:
        module, _, class_name = path.rpartition(".")
        try:
            place = importlib.import_module(module)
            owner = getattr(place, class_name)
        except (ImportError, AttributeError):
            return  # this release does not have it anyway
    base = type(owner)

    def refuse(wanted):
        if wanted == attribute and is_ours(sys._getframe(2)):
            raise AttributeError(f"{path} has no {attribute}: it is hidden")

    class Hiding(base):
        def __getattribute__(self, wanted):
            refuse(wanted)
            return super().__getattribute__(wanted)

        def __getattr__(self, wanted):  # where lazy modules find what they have not imported yet
            refuse(wanted)
            if hasattr(base, "__getattr__"):
                return super().__getattr__(wanted)
            raise AttributeError(f"{path} has no attribute {wanted!r}")

    if place is None:
        owner.__class__ = Hiding
    else:  # a class, of which code files get one that hides
        setattr(place, class_name, Hiding(class_name, (owner,), {"__module__": owner.__module__}))


# --- what a model has to do -------------------------------------------------------------------------------------------


def load(checkpoint):
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True).eval()
    return model, transformers.AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)


def inputs(processor, checkpoint):
    from PIL import Image

    picture = Image.open(Path(checkpoint).parent / "picture.png")
    return processor(text=[TEXT], images=picture, return_tensors="pt")


def answer(model, processor, batch, **options) -> str:
    ids = model.generate(**batch, max_new_tokens=8, do_sample=False, **options)
    return processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)[0]


def in_order(checkpoint, loads_again: bool = True) -> dict:
    """What the model computes: logits, and texts on two kinds of cache; and what it saves, which is what was loaded."""
    model, processor = load(checkpoint)
    batch = inputs(processor, checkpoint)
    with torch.no_grad():
        logits = model(**batch).logits
    static = answer(model, processor, batch, cache_implementation="static", disable_compile=True)
    text_only = processor(text=["USER: one two ASSISTANT:"], return_tensors="pt")
    with torch.no_grad():
        plain = model(**text_only).logits
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        files = sorted(path.name for path in Path(folder).iterdir())
        stored, saved = (load_file(Path(place, "model.safetensors")) for place in (checkpoint, folder))
        assert stored.keys() == saved.keys() and all(torch.equal(saved[name], x) for name, x in stored.items())
        if loads_again:
            state, again = model.state_dict(), load(folder)[0].state_dict()
            assert state.keys() == again.keys() and all(torch.equal(state[name], x) for name, x in again.items())
    return {
        "text": answer(model, processor, batch),
        "static": static,
        "logits": logits.tolist(),
        "plain": plain.tolist(),
        "files": files,
        "ids": batch["input_ids"].tolist(),
        "pixels": float(batch["pixel_values"].double().sum()),
    }


def compare(wanted: dict, found: dict) -> None:
    for key, value in wanted.items():
        if key in ("logits", "plain"):
            torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(value), rtol=0, atol=1e-4)
        else:
            assert found[key] == value, f"{key}: {found[key]} for {value}"


# --- what loses its name says so --------------------------------------------------------------------------------------


def sibling(model, name: str):
    """The code file `name` that came with `model`."""
    return importlib.import_module(f"{type(model).__module__.rpartition('.')[0]}.{name}_saisa")


def other_encoder(model):
    """A small model whose encoder's modules 5.x has renamed."""
    vision = {"model_type": "dinov2", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    text = {**model.config.text_config.to_dict(), "num_hidden_layers": 1}
    return type(model)(type(model.config)(vision_config=vision, text_config=text, image_token_id=5))


def saved_dinov2(model, processor):
    with tempfile.TemporaryDirectory() as folder:
        other_encoder(model).save_pretrained(folder)


def unhidden_torchao(model, processor):
    type(model).from_pretrained(model.name_or_path, quantization_config={"quant_method": "torchao", "quant_type": "x"})


def flex_attention(model, processor):
    model.config.text_config._attn_implementation = "flex_attention"
    model(input_ids=torch.tensor([[5, 6, 7]]))


def checkpointing(model, processor):
    model.train().gradient_checkpointing_enable()
    ids = torch.tensor([[5, 6, 7, 8]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.lm_head.weight.grad is not None


def as_tuple(model, processor):
    assert isinstance(model(input_ids=torch.tensor([[5, 6, 7]]), return_dict=False), tuple)


def chat(model, processor):
    processor.apply_chat_template([{"role": "user", "content": "two"}], add_generation_prompt=True)


FEATURES = {  # name -> (what uses the feature, whether it fails there, on which major releases)
    "AddedToken": (lambda m, p: sibling(m, "processing").add_image_token(p.tokenizer), True, "45"),
    "ALL_PARALLEL_STYLES": (lambda m, p: type(m).from_pretrained(m.name_or_path, tp_plan="auto"), True, "45"),
    "MultiModalData": (lambda m, p: p._get_num_multimodal_tokens([(32, 32)]), True, "45"),
    "render_jinja_template": (chat, True, "45"),
    "AutoQuantizationConfig": (unhidden_torchao, True, "45"),
    "get_model_conversion_mapping": (saved_dinov2, True, "5"),
    "ALL_ATTENTION_FUNCTIONS": (flex_attention, True, "45"),
    "GradientCheckpointingLayer": (checkpointing, False, "45"),
    "can_return_tuple": (as_tuple, False, "45"),
    "ProcessingKwargs": (chat, False, "45"),
}


def feature_of(name: str, checkpoint) -> None:
    import transformers

    attribute = name.rpartition(".")[2]
    use, fails, majors = FEATURES.get(attribute, (None, False, ""))
    if use is None or transformers.__version__[0] not in majors:
        return
    model, processor = load(checkpoint)
    try:
        use(model, processor)
    except ImportError as error:
        assert fails, f"{attribute}: a substitute was expected, not {error}"
        assert f".{attribute}, which transformers {transformers.__version__} does not have" in str(error), str(error)
    else:
        assert not fails, f"{attribute}: its feature works without it"


# --- additions --------------------------------------------------------------------------------------------------------


def add_things(checkpoint) -> dict:
    """What the model computes where transformers' output classes have a further field, and `forward`,
    `prepare_inputs_for_generation` and the decoder layers are handed a further argument."""
    from transformers import modeling_outputs

    for name in ("BaseModelOutputWithPast", "CausalLMOutputWithPast", "BaseModelOutputWithPooling"):
        base = getattr(modeling_outputs, name)
        fields = [("novelty", object, dataclasses.field(default=None))]
        setattr(modeling_outputs, name, dataclasses.make_dataclass(name, fields, bases=(base,)))
    model, processor = load(checkpoint)
    batch = inputs(processor, checkpoint)
    prepare, layers = model.prepare_inputs_for_generation, model.model.language_model.layers
    seen = []
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "further_novelty": 1}), with_kwargs=True
        )

    def prepare_with_more(*args, **kwargs):
        prepared = prepare(*args, novelty=1, **kwargs)
        seen.append(prepared.get("novelty"))
        return prepared

    model.prepare_inputs_for_generation = prepare_with_more
    with torch.no_grad():
        outputs = model(**batch, novelty=1)
    assert outputs.novelty is None and "novelty" in {field.name for field in dataclasses.fields(outputs)}
    text = answer(model, processor, batch)
    assert seen, "prepare_inputs_for_generation was not called"
    return {"logits": outputs.logits.tolist(), "text": text}


# --- processes --------------------------------------------------------------------------------------------------------


def forked(work, path: Path):
    """Starts `work` in a process of its own, which leaves {"value": ...} or {"error": ...} in `path`."""
    pid = os.fork()
    if pid:
        return pid
    try:
        done = {"value": work()}
    except BaseException:
        done = {"error": traceback.format_exc()}
    path.write_text(json.dumps(done))
    os._exit(0)


def drill(name: str, checkpoint, wanted: dict) -> None:
    if name == "additions":
        found = add_things(checkpoint)
        compare({key: wanted[key] for key in found}, found)
        return
    for one in name.split("+"):
        hide(one)
    is_one = "+" not in name
    compare(wanted, in_order(checkpoint, loads_again=not is_one))  # the code that is saved is the code that has run
    if is_one:
        feature_of(name, checkpoint)


def main(results: str, checkpoint: str, *drills: str) -> None:
    sys.meta_path.insert(0, NoPackage())
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=Path(results).parent))

    def first():
        value = in_order(checkpoint)
        return {**value, "modules": [name for name in sys.modules if name.split(".")[0] == "transformers"]}

    os.waitpid(forked(first, folder / "first.json"), 0)
    done = json.loads((folder / "first.json").read_text())
    if "error" in done:
        raise SystemExit(done["error"])
    wanted = done["value"]
    for name in wanted.pop("modules"):
        importlib.import_module(name)  # transformers' own modules have all names; forks need not import them again
    running, outcomes, waiting = {}, {}, list(enumerate(drills))
    while waiting or running:
        while waiting and len(running) < 2:
            number, name = waiting.pop(0)
            path = folder / f"{number}.json"
            running[forked(lambda name=name: drill(name, checkpoint, wanted), path)] = (name, path)
        pid, _ = os.wait()
        name, path = running.pop(pid)
        outcomes[name] = json.loads(path.read_text()).get("error") if path.exists() else "the process died"
    Path(results).write_text(json.dumps({"text": wanted["text"], "drills": outcomes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
