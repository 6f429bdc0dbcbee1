# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa convert`: a checkpoint in the layout of the SAISA authors' code becomes one that `from_pretrained` loads.

Tensors are streamed (`weight_files.py`), so that the need for memory does not grow with the model. Everything is written
into a hidden folder beside the destination, loaded back and compared, and put in place in one step at the very end: a
conversion that dies at any moment leaves the destination as it was.
"""

import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from tqdm import tqdm
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig, LlamaConfig

from ..chat.templates import chat_template as chat_template_source
from ..chat.templates import chat_template_names
from ..common.destination import (
    check_destination,
    check_hub,
    check_outside,
    check_space,
    new_folder,
    size_in_bytes,
    upload,
)
from ..configuration_saisa import SaisaConfig
from ..modeling_saisa import SaisaForConditionalGeneration
from ..processing_saisa import SaisaProcessor, add_image_token, prepare_padding
from .model_card import licence_in_card, write_model_card
from .weight_files import (
    DTYPES,
    STORED_DTYPES,
    Source,
    WeightFiles,
    check_safetensors,
    read_json,
    write_safetensors,
)


IMAGE_TOKEN = "<image>"
SHARED_PROJECTOR = ("drop", "keep", "use")
SHARED_PROJECTOR_FILE = "shared_projector.safetensors"

_TEXT_MODELS = {"llava_llama": "llama", "llava": "llama", "llama": "llama", "llava_mistral": "mistral"}
_REQUIRED_TEXT_KEYS = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TEXT_KEYS = (
    *_REQUIRED_TEXT_KEYS,
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "initializer_range", "use_cache"),
    *("rope_theta", "rope_scaling", "rope_parameters", "max_position_embeddings", "sliding_window"),
    *("attention_bias", "attention_dropout", "mlp_bias", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")

_TOWER_PREFIX = "model.vision_tower.vision_tower."
_RENAMES = (  # source name -> name in a SAISA checkpoint
    (r"model\.layers\.(\d+)\.mm_projector\.0\.", r"model.language_model.layers.\1.visual_projector.linear_1."),
    (r"model\.layers\.(\d+)\.mm_projector\.2\.", r"model.language_model.layers.\1.visual_projector.linear_2."),
    (r"model\.(embed_tokens|layers|norm)\.", r"model.language_model.\1."),
    (r"lm_head\.", r"lm_head."),
    (r"model\.mm_projector\.0\.", r"model.visual_projector.linear_1."),
    (r"model\.mm_projector\.2\.", r"model.visual_projector.linear_2."),
)
_SHARED = re.compile(r"model\.mm_projector\.[02]\.(weight|bias)")  # of the first training stage, unused after it
_BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq|.*\.position_ids")  # which old releases stored


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    vision_tower: str | os.PathLike | None = None,
    shared_projector: str = "drop",
    chat_template: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
    progress: bool | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """Convert the authors' checkpoint `source` into the folder `destination`: weights, configuration, code files,
    model card and, where the source has a tokenizer, the processor with its chat template.

    Args:
        source: folder, or hub id, with `config.json` and weights in safetensors or `.bin` files, sharded or not.
        destination: folder to make. An existing one must be empty, or `overwrite` must be True.
        vision_tower: folder or hub id of the vision encoder; None takes `mm_vision_tower` of the source's config (a
            folder relative to the source, or a hub id). Weights of the tower that the source itself holds go first.
        shared_projector: what becomes of the one projector of the first training stage. "drop": nothing. "keep": it is
            stored beside the model, in `shared_projector.safetensors`, under the names that it has in a model with
            `projector_sharing="shared"`. "use": the source is a checkpoint of that stage, without projectors of the
            layers' own, and becomes such a model.
        chat_template: "vicuna", "llama_3", "chatml", "plain", or the path of a .jinja file; None decides by the
            tokenizer: "llama_3" where its BOS token is `<|begin_of_text|>`, else "vicuna".
        dtype: "float32", "float16" or "bfloat16"; None keeps the dtype of the source's embedding.
        max_shard_size: most bytes in a weight file, as a number or like "5GB" (10^9 bytes).
        push_to_hub: repository, "user/name", to upload the result to as well; made if need be.
        private: whether the repository is private, where it is made; None leaves that to the hub.
        progress: whether a bar on stderr shows bytes and the time left; None: where stderr is a terminal.
        log: called with one line of text per step.

    Returns:
        The destination's path.

    Raises:
        ValueError: something in the source is not as expected; the message names the file and the tensor or key.
        OSError: a file or repository is missing or cannot be read or written.
    """
    destination = Path(destination).expanduser().resolve()
    max_bytes = size_in_bytes(max_shard_size)
    for name, value, allowed in (
        ("dtype", dtype, (None, *DTYPES)),
        ("shared_projector", shared_projector, SHARED_PROJECTOR),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(filter(None, allowed))}.")
    check_destination(destination, overwrite)
    if push_to_hub is not None:
        check_hub(push_to_hub)
    folder = _local_folder(source, "SRC")
    check_outside(destination, folder, "SRC ")

    settings = read_json(folder / "config.json")
    weights = WeightFiles(folder)
    own_tower = any(name.startswith(_TOWER_PREFIX) for name in weights.shapes)
    tower_folder = _tower_folder(vision_tower, settings, folder, with_weights=not own_tower)
    check_outside(destination, tower_folder, "the vision tower ")
    tower = weights if own_tower else WeightFiles(tower_folder)

    tokenizer = _tokenizer(folder)
    old_rows = settings.get("vocab_size")
    image_token_id = old_rows if tokenizer is None else tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    sharing = "shared" if shared_projector == "use" else "per_layer"
    config = _config(settings, folder / "config.json", _vision_config(tower_folder), image_token_id, sharing)
    sources = _match(config, weights, tower, own_tower, old_rows)
    beside = _shared_projector(config, weights) if shared_projector == "keep" else {}
    stored = DTYPES[dtype] if dtype else weights.dtypes["model.embed_tokens.weight"]
    for part in (config, config.text_config, config.vision_config):
        part.dtype = stored
    processor = None if tokenizer is None else _processor(config, settings, tokenizer, tower_folder, chat_template)
    generation_config = _generation_config(folder, config, processor, chat_template, old_rows)

    files = _weight_shards(sources, stored, max_bytes) | ({SHARED_PROJECTOR_FILE: beside} if beside else {})
    size = sum(source.nbytes(stored) for part in files.values() for source in part.values())
    with new_folder(destination, overwrite, log) as partial:
        check_space(destination.parent, size)
        _write_weights(partial, files, stored, [weights] if own_tower else [weights, tower], size, progress, log)
        config.save_pretrained(partial)
        generation_config.save_pretrained(partial)
        if processor is not None:
            processor.save_pretrained(partial)
        base_model = None if Path(source).expanduser().is_dir() else str(source)
        card = {
            "repo_id": push_to_hub or destination.name,
            "base_model": base_model,
            "license": licence_in_card(folder / "README.md"),
        }
        write_model_card(partial, config, **card)
    if processor is None:
        log(
            f"note: {folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)}): converted the model alone, no processor."
        )
    log(f"wrote {destination}")
    if push_to_hub is not None:
        upload(destination, push_to_hub, private, log)
    return destination


def _local_folder(source: str | os.PathLike, role: str, with_weights: bool = True) -> Path:
    """`source` where it is a folder, else the local snapshot of the hub repository of that name."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", str(source)):
        raise FileNotFoundError(f"{role} {source!r} is not a folder (nor does it look like a hub id, 'user/name').")
    small = ["*.json", "*.txt", "README.md", "tokenizer.model"]
    try:
        found = Path(snapshot_download(str(source), allow_patterns=small + ["*.safetensors"] * with_weights))
        if with_weights and not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(str(source), allow_patterns=[*small, "*.bin"]))
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"{role} {source!r} is not a folder here and cannot be had from the hub: {reason}"
        ) from error
    return found


def _tower_folder(vision_tower, settings: dict, folder: Path, with_weights: bool) -> Path:
    if vision_tower is not None:
        return _local_folder(vision_tower, "--vision-tower", with_weights)
    named = settings.get("mm_vision_tower")
    if not named:
        raise ValueError(f"{folder / 'config.json'} names no mm_vision_tower: give the encoder with --vision-tower.")
    if (folder / named).is_dir():
        return folder / named
    if not with_weights and (folder / "vision_config.json").is_file():
        return folder
    try:
        return _local_folder(named, "mm_vision_tower", with_weights)
    except OSError as error:
        raise FileNotFoundError(f"{error} Give a copy of the encoder with --vision-tower PATH.") from error


def _vision_config(tower_folder: Path):
    own = tower_folder / "vision_config.json"
    if own.is_file():
        return read_json(own)
    read_json(tower_folder / "config.json")
    config = AutoConfig.from_pretrained(tower_folder)
    return getattr(config, "vision_config", config)  # CLIP and SigLIP checkpoints hold a text tower too


def _config(settings: dict, file: Path, vision_config, image_token_id: int | None, sharing: str) -> SaisaConfig:
    def expect(key, allowed, default=None):
        value = settings.get(key, default)
        if value not in allowed:
            raise ValueError(f"{file}: {key}={value!r} is not supported, expected {' or '.join(map(repr, allowed))}.")
        return value

    missing = [key for key in _REQUIRED_TEXT_KEYS if not isinstance(settings.get(key), int)]
    if missing:
        raise ValueError(f"{file}: {missing[0]}={settings.get(missing[0])!r}, expected an integer.")
    expect("mm_projector_type", ("mlp2x_gelu",), "mlp2x_gelu")
    expect("image_aspect_ratio", ("pad", "square", None))
    for flag in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        expect(flag, (False, None))
    strategies = {"patch": "default", "cls_patch": "full"}
    strategy = strategies[expect("mm_vision_select_feature", tuple(strategies), "patch")]
    text_config = {key: settings[key] for key in _TEXT_KEYS if key in settings}
    text_config["model_type"] = _TEXT_MODELS[expect("model_type", tuple(_TEXT_MODELS))]
    text_config["vocab_size"] = max(text_config["vocab_size"], image_token_id + 1)
    if (text_config.get("pad_token_id") or 0) < 0:  # some Llama configs say "none" as -1
        text_config["pad_token_id"] = None
    config = SaisaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=image_token_id,
        vision_feature_layer=settings.get("mm_vision_select_layer", -2),
        vision_feature_select_strategy=strategy,
        projector_sharing=sharing,
        tie_word_embeddings=settings.get("tie_word_embeddings", False),
    )
    config.architectures = [SaisaForConditionalGeneration.__name__]
    return config


def _match(config, weights: WeightFiles, tower: WeightFiles, own_tower: bool, old_rows: int) -> dict[str, Source]:
    """Target name -> source, in the order in which the source files hold them; every tensor accounted for."""
    expected = _saved_shapes(config)
    sources: dict[str, Source] = {}

    def take(source: WeightFiles, name: str, target: str):
        if target not in expected:
            raise ValueError(f"{source.files[name]}: tensor {name} is unknown; a SAISA model has no {target}.")
        want, rows = expected[target], None
        if target in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            want, rows = (old_rows, *want[1:]), want[0]
        if source.dtypes[name] not in STORED_DTYPES:
            raise ValueError(
                f"{source.files[name]}: tensor {name} is {source.dtypes[name]}, expected one of {', '.join(DTYPES)}. "
                f"Quantized checkpoints cannot be converted."
            )
        if source.shapes[name] != want:
            raise ValueError(
                f"{source.files[name]}: tensor {name} has shape {source.shapes[name]}, expected {want} by the "
                f"configuration."
            )
        sources[target] = Source(source, name, rows)

    shared = config.projector_sharing == "shared"
    for name in weights.shapes:
        if _BUFFERS.fullmatch(name) or (_SHARED.fullmatch(name) and not shared) or name.startswith(_TOWER_PREFIX):
            continue
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for pattern, replacement in _RENAMES:
            target, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                break
        else:
            raise ValueError(f"{weights.files[name]}: tensor {name} is unknown.")
        if shared and ".visual_projector." in target and target not in expected:
            raise ValueError(
                f"{weights.files[name]}: tensor {name} is a projector of one layer's own: this is no checkpoint of the "
                f"first stage. Leave out --shared-projector use."
            )
        take(weights, name, target)

    towers_own = {
        name.removeprefix("model.vision_tower.") for name in expected if name.startswith("model.vision_tower.")
    }
    nested = all(name.startswith("vision_model.") for name in towers_own)
    prefix = _TOWER_PREFIX if own_tower else ""
    names = {name: name.removeprefix(prefix) for name in tower.shapes if name.startswith(prefix)}
    if nested and not any(below.startswith("vision_model.") for below in names.values()):
        names = {name: f"vision_model.{below}" for name, below in names.items()}
    for name, below in names.items():
        # a whole CLIP or SigLIP checkpoint also holds its text tower and heads
        text_side = not own_tower and nested and not below.startswith("vision_model.")
        if not text_side and not _BUFFERS.fullmatch(name):
            take(tower, name, f"model.vision_tower.{below}")

    missing = [name for name in expected if name not in sources]
    if missing:
        in_tower = missing[0].startswith("model.vision_tower.")
        hint = ""
        if (
            ".layers." in missing[0]
            and ".visual_projector." in missing[0]
            and any(map(_SHARED.fullmatch, weights.shapes))
        ):
            hint = (
                " Only a shared projector is there: is this a LLaVA checkpoint? One of SAISA's first training stage is "
                "converted with --shared-projector use."
            )
        raise ValueError(
            f"{(tower if in_tower else weights).listing}: tensor {_source_name(missing[0])} is missing"
            f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}.{hint}"
        )
    return sources


def _source_name(target: str) -> str:
    """The authors' name of the tensor that is called `target` in a SAISA checkpoint."""
    name = re.sub(r"visual_projector\.linear_([12])", lambda m: f"mm_projector.{2 * int(m[1]) - 2}", target)
    if name.startswith("model.vision_tower."):
        return name.replace("model.vision_tower.", _TOWER_PREFIX)
    return name.replace("model.language_model.", "model.")


def _saved_shapes(config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor in a checkpoint of `config`, in the names under which it is saved."""
    with torch.device("meta"):
        model = SaisaForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _shared_projector(config: SaisaConfig, weights: WeightFiles) -> dict[str, Source]:
    """Target name -> source of the projector of the first training stage, beside the projectors of the layers."""
    width, hidden = config.vision_feature_size, config.text_config.hidden_size
    sources = {}
    for number, columns in ((0, width), (2, hidden)):
        for part, want in (("weight", (hidden, columns)), ("bias", (hidden,))):
            name = f"model.mm_projector.{number}.{part}"
            if name not in weights.shapes:
                raise ValueError(f"{weights.listing}: tensor {name} is missing. Leave out --shared-projector keep.")
            if weights.shapes[name] != want or weights.dtypes[name] not in STORED_DTYPES:
                raise ValueError(
                    f"{weights.files[name]}: tensor {name} has shape {weights.shapes[name]} and dtype "
                    f"{weights.dtypes[name]}, expected {want} and one of {', '.join(DTYPES)}."
                )
            sources[f"model.visual_projector.linear_{number // 2 + 1}.{part}"] = Source(weights, name)
    return sources


# --- writing ----------------------------------------------------------------------------------------------------------


def _weight_shards(sources: dict[str, Source], dtype: torch.dtype, max_bytes: int) -> dict[str, dict[str, Source]]:
    """File name -> what goes into it, at most `max_bytes` (or one tensor) each."""
    shards: list[dict[str, Source]] = [{}]
    room = max_bytes
    for name, source in sources.items():
        size = source.nbytes(dtype)
        if size > room and shards[-1]:
            shards.append({})
            room = max_bytes
        shards[-1][name] = source
        room -= size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{n:05}-of-{len(shards):05}.safetensors": shard for n, shard in enumerate(shards, 1)}


def _write_weights(
    folder: Path,
    files: dict[str, dict[str, Source]],
    dtype: torch.dtype,
    read_from: list[WeightFiles],
    size: int,
    progress: bool | None,
    log: Callable[[str], None],
) -> None:
    """Writes the weight files and their index, each loaded back and compared before the next is begun. Source files that
    carry checksums are compared with them first."""
    summed = [(weights, file) for weights in read_from for file in weights.checksummed()]
    total = 2 * size + sum(file.stat().st_size for _, file in summed)
    hidden = None if progress is None else not progress  # None: shown on a terminal alone
    with tqdm(total=total, unit="B", unit_scale=True, disable=hidden, file=sys.stderr, smoothing=0.1) as bar:

        def say(line: str):
            bar.clear()
            log(line)
            bar.refresh()

        for weights, file in summed:
            bar.set_description(f"verifying {file.name}")
            weights.verify(file, bar.update)
        for file, sources in files.items():
            say(f"writing {file} ({len(sources)} tensors)")
            bar.set_description(f"writing {file}")
            digests = write_safetensors(folder / file, sources, dtype, bar.update)
            for weights in read_from:
                weights.close()
            bar.set_description(f"checking {file}")
            check_safetensors(folder / file, sources, dtype, digests, bar.update)
        bar.update(total - bar.n)  # what lies around the tensors of the files with checksums
    models = {file: sources for file, sources in files.items() if file != SHARED_PROJECTOR_FILE}
    if len(models) > 1:
        weight_map = {name: file for file, sources in models.items() for name in sources}
        nbytes = sum(source.nbytes(dtype) for sources in models.values() for source in sources.values())
        index = {"metadata": {"total_size": nbytes}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    log(f"checked {sum(map(len, files.values()))} tensors ({size / 1e9:.2f} GB) against their source")


# --- processor and generation -----------------------------------------------------------------------------------------


def _tokenizer(folder: Path):
    """The source's tokenizer with a token for the image, or None where the source has no tokenizer."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    # the class is in tokenizer_config.json; without a config, transformers stumbles over the model_type in config.json
    tokenizer = AutoTokenizer.from_pretrained(folder, config=LlamaConfig())
    prepare_padding(tokenizer)
    add_image_token(tokenizer, IMAGE_TOKEN)
    return tokenizer


def _template_name(chosen: str | None, tokenizer) -> str:
    return chosen or ("llama_3" if tokenizer.bos_token == "<|begin_of_text|>" else "vicuna")


def _chat_template(name: str) -> str:
    if not name.endswith(".jinja"):
        return chat_template_source(name)
    if not Path(name).is_file():
        raise FileNotFoundError(f"--chat-template {name}: there is no such file.")
    return Path(name).read_text(encoding="utf-8")


def _processor(config: SaisaConfig, settings: dict, tokenizer, tower_folder: Path, chat_template: str | None):
    if not (tower_folder / "preprocessor_config.json").is_file():
        raise FileNotFoundError(
            f"{tower_folder / 'preprocessor_config.json'} is missing: how pictures are prepared for the vision encoder."
        )
    return SaisaProcessor(
        AutoImageProcessor.from_pretrained(tower_folder),
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=config.vision_prefix_tokens,
        image_seq_length=config.image_seq_length,
        image_token=IMAGE_TOKEN,
        chat_template=_chat_template(_template_name(chat_template, tokenizer)),
        pad_to_square=settings.get("image_aspect_ratio") == "pad",
    )


def _generation_config(folder: Path, config: SaisaConfig, processor, chat_template, old_rows: int) -> GenerationConfig:
    """Stop tokens and sampling as in the source, and what closes a turn in the chat template; the tokens that the
    source's vocabulary lacks are never generated."""
    text, file = config.text_config, folder / "generation_config.json"
    given = read_json(file) if file.is_file() else {}
    keep = ["bos_token_id", "eos_token_id", "pad_token_id"]
    if given.get("do_sample"):
        keep += ["do_sample", "temperature", "top_k", "top_p"]
    values = {key: getattr(text, key, None) for key in keep} | {key: given[key] for key in keep if key in given}
    if processor is not None:
        values["pad_token_id"] = processor.tokenizer.pad_token_id
        stops = values["eos_token_id"] if isinstance(values["eos_token_id"], list) else [values["eos_token_id"]]
        closing = _turn_end(processor, _template_name(chat_template, processor.tokenizer))
        if closing is not None and closing not in stops:
            values["eos_token_id"] = [*(stop for stop in stops if stop is not None), closing]
    new = {config.image_token_id, *range(old_rows, text.vocab_size)}
    return GenerationConfig(
        **{key: value for key, value in values.items() if value is not None}, suppress_tokens=sorted(new)
    )


def _turn_end(processor, template_name: str) -> int | None:
    """The token with which the packaged template closes an answer, where it is one."""
    if template_name not in chat_template_names():
        return None
    said = processor.apply_chat_template([{"role": "assistant", "content": "\0"}])
    return processor.tokenizer.get_vocab().get(said.partition("\0")[2].strip())
