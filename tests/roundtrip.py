"""What a process does in a round trip through a checkpoint folder: one saves, others load by remote code and compare.

    python roundtrip.py save FOLDER                     writes the checkpoints of `VARIANTS`; needs saisa_hf
    python roundtrip.py check CHECKPOINT... --code DIR  loads each with `trust_remote_code=True`, where saisa_hf is not
                                                        importable, and compares with what the saver computed
    python roundtrip.py load SOURCE... --save DIR       loads each likewise, from a folder or the hub, and saves it

`--code` is the folder of the package's modules, read as files. `check --resave DIR` saves what was loaded and checks that
too. `--results FILE` receives {checkpoint: error message or null} as JSON. `--without-package` makes saisa_hf
unimportable where it is installed. Every transformers release that the project supports runs this file.
"""

import argparse
import filecmp
import importlib
import json
import sys
import traceback
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoProcessor


TOLERANCE = 1e-5
INPUTS = ("input_ids", "attention_mask", "pixel_values", "image_sizes", "num_tiles")
NEW_TOKENS = 8
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "<image>", "\n", "?", "what", "is", "in", "this", "picture", "and", "that"]
WORDS += ["one", "a", "cat", "or", "dog"]
PROMPTS = ["<image> \n what is in this picture ?", "this picture <image> and that one <image> is a cat or a dog ?"]
CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
CHAT = [{"role": "that", "content": "<image> what is this ?"}, {"role": "one", "content": "a cat"}]

AUTO_MAP = {
    "AutoConfig": "configuration_saisa.SaisaConfig",
    "AutoModel": "modeling_saisa.SaisaModel",
    "AutoModelForCausalLM": "modeling_saisa.SaisaForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_saisa.SaisaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_saisa.SaisaForConditionalGeneration",
    "AutoModelForPreTraining": "modeling_saisa.SaisaForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_saisa.SaisaForConditionalGeneration",
    "AutoProcessor": "processing_saisa.SaisaProcessor",
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TEXT = {
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
TILES = [[8, 16], [16, 8], [16, 16], [8, 24]]
# name -> SaisaConfig's arguments, the image processor's class and arguments, SaisaProcessor's arguments, and the rotary
# settings as 5.x writes them
VARIANTS = {
    "llama-clip": {
        "config": {
            "text_config": TEXT | {"model_type": "llama", "rope_theta": 500000.0, "rope_scaling": LLAMA3},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "tie_word_embeddings": False,
        },
        "image_processor": (
            "CLIPImageProcessor",
            {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}},
        ),
        "processor": {"vision_feature_select_strategy": "default", "num_additional_image_tokens": 1},
        "rope": LLAMA3 | {"rope_theta": 500000.0},
    },
    "qwen3-siglip": {
        "config": {
            "text_config": TEXT
            | {"model_type": "qwen3", "head_dim": 12, "rope_theta": 1000000.0, "tie_word_embeddings": True}
            | {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
            "vision_config": VISION | {"model_type": "siglip_vision_model"},
            "tie_word_embeddings": True,
            "vision_feature_layer": [-2, -1],
            "vision_feature_select_strategy": "full",
            "visual_layers": [0, 2],
        },
        "image_processor": ("SiglipImageProcessor", {"size": {"height": 8, "width": 8}}),
        "processor": {"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0},
        "rope": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "tiles": {
        "config": {
            "text_config": TEXT | {"model_type": "llama", "max_position_embeddings": 512},
            "vision_config": VISION | {"model_type": "siglip_vision_model"},
            "tie_word_embeddings": False,
            "vision_feature_select_strategy": "full",
            "image_grid_pinpoints": TILES,
            "vision_aspect_ratio": "anyres_max_2",
        },
        "image_processor": (
            "LlavaOnevisionImageProcessor",
            {"size": {"height": 8, "width": 8}, "image_grid_pinpoints": TILES},
        ),
        "processor": {"vision_feature_select_strategy": "full", "vision_aspect_ratio": "anyres_max_2"},
        "rope": {"rope_type": "default", "rope_theta": 10000.0},
    },
}


class RoundTripError(AssertionError):
    """Something in a checkpoint, or what came out of it, is not what the saver had."""


def require(condition, message):
    if not condition:
        raise RoundTripError(message)


# --- both sides -------------------------------------------------------------------------------------------------------


def pictures():
    generator = np.random.default_rng(0)
    sizes = [(20, 13), (9, 16), (8, 8)]
    return [Image.fromarray(generator.integers(0, 256, (height, width, 3), np.uint8)) for height, width in sizes]


def run(model, processor):
    """(tensors, strings) that a model and a processor yield: equal numbers mean an equal checkpoint."""
    inputs = processor(images=pictures(), text=PROMPTS, padding=True, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    with torch.no_grad():
        output = model(**inputs, labels=labels)
        sequences = {
            "greedy": model.generate(**inputs, **options),
            "beams": model.generate(**inputs, **options, num_beams=3),
            "static_cache": model.generate(**inputs, **options, cache_implementation="static"),
        }
    tensors = {name: inputs[name] for name in INPUTS if name in inputs}
    tensors |= {"logits": output.logits, "loss": output.loss}
    tensors |= {name: tokens[:, length:] for name, tokens in sequences.items()}
    require(torch.equal(tensors["greedy"], tensors["static_cache"]), "a static cache generates other tokens")
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}  # safetensors writes nothing else
    chat = processor.apply_chat_template(CHAT, tokenize=False)
    return tensors, {"chat": chat, "decoded": processor.batch_decode(inputs["input_ids"])}


def parameter_names(variant):
    """The names in a checkpoint's weights file, without the vision tower's: a contract with every pushed checkpoint."""
    config = VARIANTS[variant]["config"]
    text, layers = config["text_config"], config["text_config"]["num_hidden_layers"]
    names = ["model.language_model.embed_tokens.weight", "model.language_model.norm.weight"]
    names += [] if config["tie_word_embeddings"] else ["lm_head.weight"]
    for index in range(layers):
        layer = f"model.language_model.layers.{index}"
        names += [f"{layer}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")]
        names += [f"{layer}.self_attn.{x}_proj.weight" for x in "qkvo"]
        names += [f"{layer}.self_attn.{x}_norm.weight" for x in "qk" if text["model_type"] == "qwen3"]
        names += [f"{layer}.mlp.{x}_proj.weight" for x in ("gate", "up", "down")]
        if index in config.get("visual_layers", range(layers)):
            names += [f"{layer}.visual_projector.linear_{n}.{x}" for n in (1, 2) for x in ("weight", "bias")]
            names += [f"{layer}.visual_projector.image_newline"] if "image_grid_pinpoints" in config else []
    return set(names)


# --- the saving side --------------------------------------------------------------------------------------------------


def build(variant):
    """(model, processor) of a variant. Random weights are the same on every release: drawn in the order of names."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from saisa_hf import SaisaConfig, SaisaForConditionalGeneration, SaisaProcessor

    made = VARIANTS[variant]
    config = SaisaConfig(**json.loads(json.dumps(made["config"])), image_token_id=WORDS.index("<image>"))
    model = SaisaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            bound = 1.0 if parameter.dim() < 2 else 2.0 * parameter[0].numel() ** -0.5
            parameter.uniform_(-bound, bound, generator=generator)
    # a model that emits its own placeholder asks for a picture that is not there
    model.generation_config.suppress_tokens = [config.image_token_id]
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = None

    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words,
        padding_side="left",
        **{f"{name}_token": token for name, token in zip(("pad", "bos", "eos", "unk"), WORDS)},
        additional_special_tokens=["<image>"],
    )
    image_processor, arguments = made["image_processor"]
    processor = SaisaProcessor(
        getattr(transformers, image_processor)(**arguments),
        tokenizer,
        patch_size=VISION["patch_size"],
        chat_template=CHAT_TEMPLATE,
        **made["processor"],
    )
    return model, processor


def save(folder):
    for variant in VARIANTS:
        model, processor = build(variant)
        tensors, strings = run(model, processor)
        checkpoint = Path(folder) / variant
        model.save_pretrained(checkpoint)
        processor.save_pretrained(checkpoint)
        expected = checkpoint.parent / "expected"
        expected.mkdir(exist_ok=True)
        save_file(tensors, expected / f"{variant}.safetensors")
        (expected / f"{variant}.json").write_text(json.dumps(strings))


# --- the loading side -------------------------------------------------------------------------------------------------


class PackageBlocker:
    """A finder that refuses saisa_hf, for environments in which it is installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "saisa_hf":
            raise ModuleNotFoundError(f"No module named {name!r} (blocked by {__file__})", name=name)


def require_package_absent():
    try:
        importlib.import_module("saisa_hf")
    except ModuleNotFoundError:
        return
    raise RoundTripError("saisa_hf is importable here, so nothing would be known about remote code")


def check_files(checkpoint, variant, code, processor=True):
    """What lies in the folder, without loading it: code files, `auto_map`, rotary settings, parameter names."""
    sources = sorted(path.name for path in Path(code).glob("*_saisa.py"))
    differing = [name for name in sources if not (checkpoint / name).is_file()]
    differing += [n for n in sources if n not in differing and not filecmp.cmp(Path(code) / n, checkpoint / n, False)]
    require(sources and not differing, f"code files absent or not the package's own: {differing}")

    for path in sorted(checkpoint.glob("*.json")):
        found = json.loads(path.read_text()).get("auto_map")
        wanted = AUTO_MAP if path.name == "config.json" else {"AutoProcessor": AUTO_MAP["AutoProcessor"]}
        if found is not None or path.name in ("config.json", "processor_config.json"):
            require(found == wanted, f"auto_map of {path.name} is {found}, expected {wanted}")
    require(not processor or (checkpoint / "processor_config.json").is_file(), "there is no processor_config.json")

    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    rope = VARIANTS[variant]["rope"]
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    scaling = None if scaling["rope_type"] == "default" else scaling
    forms = {name: text.get(name) for name in ("rope_theta", "rope_scaling", "rope_parameters")}
    wanted = {"rope_theta": rope["rope_theta"], "rope_scaling": scaling, "rope_parameters": rope}
    require(forms == wanted, f"text_config has {forms}, expected {wanted}: 4.x reads the first two, 5.x the last")

    weights = load_file(checkpoint / "model.safetensors")
    tower = {name for name in weights if name.startswith("model.vision_tower.vision_model.")}
    difference = (set(weights) - tower) ^ parameter_names(variant)
    require(tower and not difference, f"parameter names that differ from the contract: {sorted(difference)}")
    return weights


def check_model(model, info, weights):
    """The model holds the tensors of the file, all of them and no other."""
    wrong = {name: sorted(info[name]) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[name]}
    require(not wrong, f"loading info: {wrong}")
    state = model.state_dict()
    tied = {"lm_head.weight"} if "lm_head.weight" not in weights else set()
    require(
        set(state) - tied == set(weights), f"names in the model and in the file: {sorted(set(state) ^ set(weights))}"
    )
    changed = sorted(name for name, tensor in weights.items() if not torch.equal(state[name], tensor))
    require(not changed, f"tensors that are not those of the file: {changed}")
    if tied:
        require(model.lm_head.weight is model.get_input_embeddings().weight, "lm_head does not share the embedding")


def check_rope(config, variant):
    text = config.text_config
    rope = getattr(text, "rope_parameters", None) or {
        "rope_type": "default",
        **(getattr(text, "rope_scaling", None) or {}),
        "rope_theta": text.rope_theta,
    }
    require(dict(rope) == VARIANTS[variant]["rope"], f"rotary settings in memory: {rope}")


def check_outputs(model, processor, expected):
    tensors, strings = run(model, processor)
    wanted = load_file(expected.with_suffix(".safetensors"))
    for name, tensor in wanted.items():
        require(tensors[name].shape == tensor.shape, f"{name}: {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}")
        error = (tensors[name].double() - tensor.double()).abs().max().item()
        require(error <= (TOLERANCE if tensor.is_floating_point() else 0), f"{name} is off by {error:.3g}")
    wanted = json.loads(expected.with_suffix(".json").read_text())
    require(strings == wanted, f"strings: {strings}, expected {wanted}")
    return tensors


def check(checkpoint, code, resave=None):
    """Loads `checkpoint` (`.../VARIANT`) through every Auto class that the installed transformers has."""
    variant = checkpoint.name
    expected = checkpoint.parent / "expected" / variant
    weights = check_files(checkpoint, variant, code)
    options = {"trust_remote_code": True, "output_loading_info": True}

    model, info = AutoModelForImageTextToText.from_pretrained(checkpoint, **options)
    require(type(model).__module__.startswith("transformers_modules."), f"{type(model)} is not remote code")
    check_model(model, info, weights)
    check_rope(model.config, variant)
    if resave is not None:
        # before the processor is loaded: the model alone has to know all of the code files
        resave = Path(resave) / variant
        model.save_pretrained(resave)
        check_files(resave, variant, code, processor=False)
    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    require(type(processor).__module__.startswith("transformers_modules."), f"{type(processor)} is not remote code")
    tensors = check_outputs(model, processor, expected)

    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)
    require(config.auto_map == AUTO_MAP, f"auto_map in memory: {config.auto_map}")
    check_rope(config, variant)
    if hasattr(transformers, "AutoModelForVision2Seq"):
        check_model(*transformers.AutoModelForVision2Seq.from_pretrained(checkpoint, **options), weights)
    base, info = AutoModel.from_pretrained(checkpoint, **options)
    require(not info["missing_keys"] and set(info["unexpected_keys"]) <= {"lm_head.weight"}, f"AutoModel: {info}")
    inputs = {name: tensors[name] for name in INPUTS if name in tensors}
    with torch.no_grad():
        logits = model.lm_head(base.eval()(**inputs).last_hidden_state)
    require(torch.allclose(logits, tensors["logits"], rtol=0, atol=TOLERANCE), "AutoModel: other hidden states")

    if resave is not None:
        processor.save_pretrained(resave)
        weights = check_files(resave, variant, code)
        model, info = AutoModelForImageTextToText.from_pretrained(resave, **options)
        check_model(model, info, weights)
        check_rope(model.config, variant)
        check_outputs(model, AutoProcessor.from_pretrained(resave, trust_remote_code=True), expected)
        # for whoever reads it next
        (resave.parent / "expected").mkdir(exist_ok=True)
        for suffix in (".safetensors", ".json"):
            target = resave.parent / "expected" / f"{variant}{suffix}"
            target.write_bytes(expected.with_suffix(suffix).read_bytes())


def load(source, folder):
    """Saves in `folder` what the model and the processor of `source` are by remote code."""
    model = AutoModelForImageTextToText.from_pretrained(source, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(source, trust_remote_code=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("save").add_argument("folder", type=Path)
    checking, loading = commands.add_parser("check"), commands.add_parser("load")
    checking.add_argument("sources", nargs="+", metavar="CHECKPOINT")
    checking.add_argument("--code", type=Path, required=True)
    checking.add_argument("--resave", type=Path, help="folder; each checkpoint's goes to a folder of its parent's name")
    loading.add_argument("sources", nargs="+", metavar="SOURCE")
    loading.add_argument("--save", type=Path, required=True, help="folder; each source's goes to a folder of its name")
    for command in (checking, loading):
        command.add_argument("--results", type=Path)
        command.add_argument("--without-package", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.command == "save":
        return save(arguments.folder)
    if arguments.without_package:
        sys.meta_path.insert(0, PackageBlocker)
    require_package_absent()
    results = {}
    for source in arguments.sources:
        path = Path(source)
        try:
            if arguments.command == "check":
                check(path, arguments.code, arguments.resave and arguments.resave / path.parent.name)
            else:
                load(source, arguments.save / path.name)
            results[source] = None
        except Exception as error:
            traceback.print_exc()
            results[source] = f"{type(error).__name__}: {error}"
    if arguments.results:
        arguments.results.write_text(json.dumps(results))
    return int(any(results.values()))


if __name__ == "__main__":
    sys.exit(main())
