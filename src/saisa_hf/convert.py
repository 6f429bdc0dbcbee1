# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa convert`: a checkpoint in the layout of the SAISA authors' code becomes one that `from_pretrained` loads.

Tensors are streamed: one source file is open at a time and one tensor is in memory, so that the need for memory does
not grow with the model. Everything is written into a hidden folder beside the destination, read back and compared, and
renamed into place at the very end.
"""

import json
import os
import re
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, GenerationConfig, LlamaConfig

from .chat_templates import chat_template as chat_template_source
from .configuration_saisa import SaisaConfig
from .model_card_saisa import licence_in_card, write_model_card
from .modeling_saisa import SaisaForConditionalGeneration
from .processing_saisa import SaisaProcessor, add_image_token


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
IMAGE_TOKEN = "<image>"

_STORED_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
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
)
# The projector of the first training stage, which inference does not use, and buffers that old releases stored.
_LEFT_OVER = re.compile(r"model\.mm_projector\.[02]\.(weight|bias)|.*\.rotary_emb\.inv_freq|.*\.position_ids")


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    vision_tower: str | os.PathLike | None = None,
    chat_template: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> Path:
    """Convert the authors' checkpoint `source` into the folder `destination`: weights, configuration, code files,
    model card and, where the source has a tokenizer, the processor with its chat template.

    Args:
        source: folder, or hub id, with `config.json` and weights in safetensors or `.bin` files, sharded or not.
        destination: folder to make. An existing one must be empty, or `overwrite` must be True.
        vision_tower: folder or hub id of the vision encoder; None takes `mm_vision_tower` of the source's config (a
            folder relative to the source, or a hub id). Weights of the tower that the source itself holds go first.
        chat_template: "vicuna", "llama_3", "chatml", "plain", or the path of a .jinja file; None decides by the
            tokenizer: "llama_3" where its BOS token is `<|begin_of_text|>`, else "vicuna".
        dtype: "float32", "float16" or "bfloat16"; None keeps the dtype of the source's embedding.
        max_shard_size: most bytes in a weight file, as a number or like "5GB" (10^9 bytes).
        log: called with one line of text per step.

    Returns:
        The destination's path.

    Raises:
        ValueError: something in the source is not as expected; the message names the file and the tensor or key.
        OSError: a file or repository is missing or cannot be read or written.
    """
    destination = Path(destination).expanduser().absolute()
    max_bytes = _size_in_bytes(max_shard_size)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}.")
    _check_destination(destination, overwrite)
    folder = _local_folder(source, "SRC")
    if destination == folder.absolute() or destination in folder.absolute().parents:
        raise ValueError(f"DST {destination} contains SRC {folder}: choose another DST.")

    settings = _read_json(folder / "config.json")
    weights = _Weights(folder)
    own_tower = any(name.startswith(_TOWER_PREFIX) for name in weights.shapes)
    tower_folder = _tower_folder(vision_tower, settings, folder, with_weights=not own_tower)
    tower = weights if own_tower else _Weights(tower_folder)

    tokenizer = _tokenizer(folder)
    old_rows = settings.get("vocab_size")
    image_token_id = old_rows if tokenizer is None else tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    config = _config(settings, folder / "config.json", _vision_config(tower_folder), image_token_id)
    sources = _match(config, weights, tower, own_tower, old_rows)
    stored = DTYPES[dtype] if dtype else weights.dtypes["model.embed_tokens.weight"]
    if stored not in _STORED_DTYPES:
        raise ValueError(
            f"{weights.files['model.embed_tokens.weight']}: model.embed_tokens.weight is {stored}; expected one of "
            f"{', '.join(DTYPES)}. Quantized checkpoints cannot be converted."
        )
    for part in (config, config.text_config, config.vision_config):
        part.dtype = stored
    processor = None if tokenizer is None else _processor(config, settings, tokenizer, tower_folder, chat_template)

    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".partial", dir=destination.parent))
    try:
        partial.chmod(0o755)
        _write_weights(partial, sources, stored, max_bytes, log)
        config.save_pretrained(partial)
        _generation_config(folder, config, tokenizer, old_rows).save_pretrained(partial)
        if processor is not None:
            processor.save_pretrained(partial)
        base_model = None if Path(source).expanduser().is_dir() else str(source)
        card = {
            "repo_id": destination.name,
            "base_model": base_model,
            "license": licence_in_card(folder / "README.md"),
        }
        write_model_card(partial, config, **card)
        _replace(destination, partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if processor is None:
        log(
            f"note: {folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)}): converted the model alone, no processor."
        )
    log(f"wrote {destination}")
    return destination


class _Source:
    """Where one tensor of the result comes from, and how many rows it gets in the end."""

    def __init__(self, weights: "_Weights", name: str, rows: int | None = None):
        self.weights, self.name = weights, name
        old = weights.shapes[name]
        self.shape = old if rows is None else (rows, *old[1:])

    def read(self, dtype: torch.dtype) -> torch.Tensor:
        tensor = self.weights.read(self.name)
        if new_rows := self.shape[0] - tensor.shape[0] if self.shape else 0:
            # As a head row, the mean of all rows gives the mean of all logits, which is never the largest.
            total = sum(rows.double().sum(0) for rows in tensor.split(4096))
            tensor = torch.cat([tensor, (total / tensor.shape[0]).to(tensor.dtype).expand(new_rows, -1)])
        cast = tensor.to(dtype)
        if cast.dtype != tensor.dtype and bool(cast.isinf().any()) and not bool(tensor.isinf().any()):
            raise ValueError(
                f"{self.weights.files[self.name]}: {self.name} has values too large for {dtype}; "
                f"convert with --dtype bfloat16 or --dtype float32."
            )
        return cast.contiguous()


class _Weights:
    """The tensors in a folder's weight files, of which one at a time is open.

    `files`, `shapes` and `dtypes` map tensor names, in file order, to the file, the shape and the dtype.
    """

    def __init__(self, folder: Path):
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._open: tuple[Path, object] | None = None
        weight_files, index = _weight_files(folder)
        for file in weight_files:
            for name, shape, dtype in self._inspect(file):
                self.files[name], self.shapes[name], self.dtypes[name] = file, shape, dtype
        for name, file in index.items():
            if self.files.get(name) != file:
                raise ValueError(f"{file}: tensor {name} is missing, which the index beside it says is there.")

    def read(self, name: str) -> torch.Tensor:
        file = self.files[name]
        try:
            handle = self._handle(file)
            return handle.get_tensor(name) if file.suffix == ".safetensors" else handle[name]
        except SafetensorError as error:
            raise OSError(f"{file}: tensor {name} cannot be read: {error}") from error

    def _inspect(self, file: Path) -> Iterator[tuple[str, tuple[int, ...], torch.dtype]]:
        handle = self._handle(file)
        if file.suffix == ".safetensors":
            stored = {name: torch_dtype for torch_dtype, name in _STORED_DTYPES.items()}
            for name in handle.keys():  # noqa: SIM118, it is no dict
                part = handle.get_slice(name)
                yield name, tuple(part.get_shape()), stored.get(part.get_dtype(), part.get_dtype())
            return
        for name, tensor in handle.items():
            if not isinstance(tensor, torch.Tensor):
                raise ValueError(f"{file}: {name} is a {type(tensor).__name__}, expected a tensor.")
            yield name, tuple(tensor.shape), tensor.dtype

    def _handle(self, file: Path):
        if self._open is None or self._open[0] != file:
            self._open = None
            self._open = (file, _open_weight_file(file))
        return self._open[1]


def _open_weight_file(file: Path):
    try:
        if file.suffix == ".safetensors":
            return safe_open(file, framework="pt")
        with file.open("rb") as stream:  # torch.save wrote zip files from 1.6 on; only those can be mapped
            is_zip = stream.read(4) == b"PK\x03\x04"
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(
            f"{file} cannot be read: {reason} It is truncated or not a weight file; download or copy it again."
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected a state dict.")
    return content


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, Path]]:
    """The folder's weight files, and what its index says (tensor name -> file; empty where there is no index)."""
    for single in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{single}.index.json"
        if index.is_file():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ValueError(f"{index}: weight_map={weight_map!r}, expected a map of tensor names to files.")
            files = sorted({folder / name for name in weight_map.values()})
            for file in files:
                if not file.is_file():
                    raise FileNotFoundError(f"{file} is missing, which {index.name} names. Download or copy it.")
            return files, {name: folder / file for name, file in weight_map.items()}
        if (folder / single).is_file():
            return [folder / single], {}
    raise FileNotFoundError(
        f"{folder} holds no weights: expected model.safetensors or pytorch_model.bin, or either's index and shards."
    )


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
        return _read_json(own)
    _read_json(tower_folder / "config.json")
    config = AutoConfig.from_pretrained(tower_folder)
    return getattr(config, "vision_config", config)  # CLIP and SigLIP checkpoints hold a text tower too


def _config(settings: dict, file: Path, vision_config, image_token_id: int | None) -> SaisaConfig:
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
        tie_word_embeddings=settings.get("tie_word_embeddings", False),
    )
    config.architectures = [SaisaForConditionalGeneration.__name__]
    return config


def _match(config, weights: _Weights, tower: _Weights, own_tower: bool, old_rows: int) -> dict[str, _Source]:
    """Target name -> source, in the order in which the source files hold them; every tensor accounted for."""
    expected = _saved_shapes(config)
    sources: dict[str, _Source] = {}

    def take(source: _Weights, name: str, target: str):
        if target not in expected:
            raise ValueError(f"{source.files[name]}: tensor {name} is unknown; a SAISA model has no {target}.")
        want, rows = expected[target], None
        if target in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            want, rows = (old_rows, *want[1:]), want[0]
        if source.shapes[name] != want:
            raise ValueError(
                f"{source.files[name]}: tensor {name} has shape {source.shapes[name]}, expected {want} by the "
                f"configuration."
            )
        sources[target] = _Source(source, name, rows)

    for name in weights.shapes:
        if _LEFT_OVER.fullmatch(name) or name.startswith(_TOWER_PREFIX):
            continue
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        for pattern, replacement in _RENAMES:
            target, count = re.subn(f"^{pattern}", replacement, name)
            if count:
                break
        else:
            raise ValueError(f"{weights.files[name]}: tensor {name} is unknown.")
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
        if not text_side and not _LEFT_OVER.fullmatch(name):
            take(tower, name, f"model.vision_tower.{below}")

    missing = [name for name in expected if name not in sources]
    if missing:
        in_tower = missing[0].startswith("model.vision_tower.")
        where = next(iter((tower if in_tower else weights).files.values())).parent
        hint = ""
        if ".visual_projector." in missing[0] and any("mm_projector" in name for name in weights.shapes):
            hint = " Only a shared projector is there: is this a LLaVA checkpoint, or one of the pre-training stage?"
        raise ValueError(
            f"{where}: tensor {_source_name(missing[0])} is missing"
            f"{f' (and {len(missing) - 1} more)' if len(missing) > 1 else ''}.{hint}"
        )
    return sources


def _source_name(target: str) -> str:
    """The authors' name of the tensor that is called `target` in a SAISA checkpoint."""
    name = re.sub(r"visual_projector\.linear_([12])", lambda m: f"mm_projector.{2 * int(m[1]) - 2}", target)
    return name.replace("model.language_model.", "model.").replace("model.vision_tower.", _TOWER_PREFIX)


def _saved_shapes(config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor in a checkpoint of `config`, in the names under which it is saved."""
    with torch.device("meta"):
        model = SaisaForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _write_weights(folder: Path, sources: dict[str, _Source], dtype: torch.dtype, max_bytes: int, log) -> None:
    """Writes the weight files (and their index) of `sources`, then reads them back and compares."""
    shards: list[list[str]] = [[]]
    room, total = max_bytes, 0
    for name, source in sources.items():
        size = dtype.itemsize * torch.Size(source.shape).numel()
        if size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room, total = room - size, total + size
    one = len(shards) == 1
    files = {
        "model.safetensors" if one else f"model-{n:05}-of-{len(shards):05}.safetensors": names
        for n, names in enumerate(shards, 1)
    }
    for file, names in files.items():
        log(f"writing {file} ({len(names)} tensors)")
        _write_safetensors(folder / file, {name: sources[name] for name in names}, dtype)
    if not one:
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    for file, names in files.items():
        with safe_open(folder / file, framework="pt") as written:
            if sorted(written.keys()) != sorted(names):
                raise OSError(f"{folder / file} does not hold the tensors that were written to it: is the disk sound?")
            for name in names:
                if not _same(written.get_tensor(name), sources[name].read(dtype)):
                    raise OSError(f"{folder / file}: {name} read back differs from its source: is the disk sound?")
    log(f"checked {len(sources)} tensors ({total / 1e9:.2f} GB) against their source")


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def _write_safetensors(file: Path, sources: dict[str, _Source], dtype: torch.dtype) -> None:
    """One tensor after the other, where `safetensors.save_file` would want them all in memory."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, source in sources.items():
        start, end = end, end + dtype.itemsize * torch.Size(source.shape).numel()
        header[name] = {"dtype": _STORED_DTYPES[dtype], "shape": list(source.shape), "data_offsets": [start, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(encoded)) + encoded)
        for source in sources.values():
            stream.write(_bytes(source.read(dtype)).numpy().data)


def _tokenizer(folder: Path):
    """The source's tokenizer with a token for the image, or None where the source has no tokenizer."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    # the class is in tokenizer_config.json; without a config, transformers stumbles over the model_type in config.json
    tokenizer = AutoTokenizer.from_pretrained(folder, config=LlamaConfig())
    tokenizer.name_or_path = ""
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    add_image_token(tokenizer, IMAGE_TOKEN)
    return tokenizer


def _chat_template(chosen: str | None, tokenizer) -> str:
    if chosen is None:
        chosen = "llama_3" if tokenizer.bos_token == "<|begin_of_text|>" else "vicuna"
    if not chosen.endswith(".jinja"):
        return chat_template_source(chosen)
    if not Path(chosen).is_file():
        raise FileNotFoundError(f"--chat-template {chosen}: there is no such file.")
    return Path(chosen).read_text(encoding="utf-8")


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
        chat_template=_chat_template(chat_template, tokenizer),
        pad_to_square=settings.get("image_aspect_ratio") == "pad",
    )


def _generation_config(folder: Path, config: SaisaConfig, tokenizer, old_rows: int) -> GenerationConfig:
    """Stop tokens and sampling as in the source; the tokens that the source's vocabulary lacks are never generated."""
    text, file = config.text_config, folder / "generation_config.json"
    given = _read_json(file) if file.is_file() else {}
    keep = ["bos_token_id", "eos_token_id", "pad_token_id"]
    if given.get("do_sample"):
        keep += ["do_sample", "temperature", "top_k", "top_p"]
    values = {key: getattr(text, key, None) for key in keep} | {key: given[key] for key in keep if key in given}
    if tokenizer is not None:
        values["pad_token_id"] = tokenizer.pad_token_id
    new = {config.image_token_id, *range(old_rows, text.vocab_size)}
    return GenerationConfig(
        **{key: value for key, value in values.items() if value is not None}, suppress_tokens=sorted(new)
    )


def _read_json(file: Path) -> dict:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, expected an object.")
    return content


def _size_in_bytes(size: int | str) -> int:
    match = re.fullmatch(r"(\d+)\s*([KMGT]?)B?", str(size).strip().upper())
    if not match or not int(match[1]):
        raise ValueError(f"max_shard_size={size!r}: expected a number of bytes, or one with a unit like '5GB'.")
    return int(match[1]) * 1000 ** " KMGT".index(match[2] or " ")


def _check_destination(destination: Path, overwrite: bool) -> None:
    if destination.exists() and not destination.is_dir():
        raise FileExistsError(f"DST {destination} is a file, expected a folder to make.")
    if destination.is_dir() and any(destination.iterdir()) and not overwrite:
        raise FileExistsError(f"DST {destination} exists and is not empty. Choose another, or pass --overwrite.")


def _replace(destination: Path, finished: Path) -> None:
    """Renames `finished` to `destination`; what was there before is removed only after that has worked."""
    if not destination.exists():
        os.rename(finished, destination)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", suffix=".old", dir=destination.parent))
    os.rename(destination, aside / destination.name)
    try:
        os.rename(finished, destination)
    except BaseException:
        os.rename(aside / destination.name, destination)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)
