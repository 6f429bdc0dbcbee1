# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa convert`: a checkpoint in the layout of the SAISA authors' code becomes one that `from_pretrained` loads.

Tensors are streamed, so that memory does not grow with the model. Everything is written into a hidden folder beside the
destination, read back and compared, and put in place in one step at the very end: a conversion that dies at any moment leaves
the destination as it was.

What the authors' settings and tensors mean is in `authors_layout.py`; weights are read by `weight_files.py` and written by
`weight_writing.py`.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    PreTrainedTokenizerBase,
)

from ..chat.templates import chat_template as named_chat_template
from ..chat.templates import chat_template_names, read_chat_template
from ..common.destination import Destination, size_in_bytes
from ..common.sources import first_line, local_folder, read_json, reading
from ..configuration_saisa import SaisaConfig
from ..processing_saisa import SaisaProcessor, add_image_token
from .authors_layout import (
    TOWER_PREFIX,
    saisa_config,
    saved_shapes,
    shared_projector_sources,
    tensor_sources,
    vica_settings,
)
from .model_card import licence_in_card, write_model_card
from .padding import prepare_padding
from .weight_files import DTYPES, WeightFiles, check_layers
from .weight_writing import weight_shards, write_weights


IMAGE_TOKEN = "<image>"
SHARED_PROJECTOR = ("drop", "keep", "use")
SHARED_PROJECTOR_FILE = "shared_projector.safetensors"

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    vision_tower: str | os.PathLike | None = None,
    shared_projector: str = "drop",
    visual_layers: str | list[int] | None = None,
    chat_template: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
    progress: bool | None = None,
    log: Callable[[str], None] = print,
) -> Path:
    """Converts the authors' checkpoint `source` into the folder `destination`: weights, configuration, code files, model card
    and, if the source has a tokenizer, the processor with its chat template.

    Args:
        source: folder or hub id, with `config.json` and weights in safetensors or `.bin` files, sharded or not.
        destination: folder to make. An existing one must be empty, or `overwrite` must be True.
        vision_tower: folder or hub id of the vision encoder; None takes `mm_vision_tower` of the source's config (a
            folder relative to the source, or a hub id). If the source itself holds weights of the encoder, these are used.
        shared_projector: what becomes of the one projector of the first training stage. "drop": nothing. "keep": it is
            stored beside the model, in `shared_projector.safetensors`, under the names that it has in a model with
            `projector_sharing="shared"`. "use": the source is a checkpoint of that stage, whose layers have no projectors of
            their own, and becomes such a model.
        visual_layers: the source is a ViCA, a LLaVA-1.5 of which only these decoder layers see the image: "vica-7b",
            "vica-13b", "vica-2.7b" for the published ones, or a list. Text in front of the image skips attention in
            "vica-7b", and with a list where the hidden size is 4096, as in its authors' code.
        chat_template: "vicuna", "llama_3", "chatml", "plain", or the path of a .jinja file; None decides by the
            tokenizer: "llama_3" if its BOS token is `<|begin_of_text|>`, else "vicuna".
        dtype: "float32", "float16" or "bfloat16"; None keeps the dtype of the source's embedding.
        max_shard_size: the largest size of a weight file, as a number of bytes or like "5GB" (10^9 bytes).
        overwrite: whether `destination` may be replaced.
        push_to_hub: a repository, "user/name", to upload the result to as well; made if needed.
        private: whether the repository is private, if it is made; None leaves that to the hub.
        progress: whether a bar on stderr shows bytes and the time left; None: if stderr is a terminal.
        log: called with one line of text per step.

    Returns:
        The destination's path.

    Raises:
        ValueError: something in the source is not as expected; the message names the file and the tensor or key.
        OSError: a file or repository is missing or cannot be read or written.
    """
    max_bytes = size_in_bytes(max_shard_size)
    _check_choices(dtype, shared_projector)
    if visual_layers is not None and shared_projector == "keep":
        raise ValueError("shared_projector='keep' does not go with visual_layers: a ViCA has no other projector.")
    place = Destination(destination, overwrite, push_to_hub, private, log)
    folder = _folder(source, "SRC")
    place.check_outside(folder, "SRC ")

    settings = read_json(folder / "config.json")
    weights = WeightFiles(folder)
    own_tower = any(name.startswith(TOWER_PREFIX) for name in weights.shapes)
    tower_folder = _tower_folder(vision_tower, settings, folder, with_weights=not own_tower)
    place.check_outside(tower_folder, "the vision tower ")
    tower = weights if own_tower else WeightFiles(tower_folder)

    tokenizer = _tokenizer(folder)
    old_rows: Any = settings.get("vocab_size")  # checked by `saisa_config`
    image_token_id = old_rows if tokenizer is None else tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    visual = {"projector_sharing": "shared" if shared_projector == "use" else "per_layer"}
    if visual_layers is not None:
        visual = vica_settings(visual_layers, settings)
    vision_config = _vision_config(tower_folder, len(tower.shapes))
    check_layers(settings, len(weights.shapes), folder / "config.json")
    with reading(folder / "config.json"):
        config = saisa_config(settings, folder / "config.json", vision_config, image_token_id, visual)
        shapes = saved_shapes(config)
    sources = tensor_sources(config, shapes, weights, tower, own_tower, old_rows)
    beside = shared_projector_sources(config, weights) if shared_projector == "keep" else {}
    stored: Any = DTYPES[dtype] if dtype else weights.dtypes["model.embed_tokens.weight"]
    for part in (config, config.text_config, config.vision_config):
        part.dtype = stored
    processor = None if tokenizer is None else _processor(config, settings, tokenizer, tower_folder, chat_template)
    generation_config = _generation_config(folder, config, processor, chat_template, old_rows)

    files = weight_shards(sources, stored, max_bytes) | ({SHARED_PROJECTOR_FILE: beside} if beside else {})
    size = sum(source.nbytes(stored) for content in files.values() for source in content.values())
    with place.new_folder() as partial:
        place.check_space(size)
        write_weights(partial, files, stored, [weights] if own_tower else [weights, tower], size, progress, log)
        config.save_pretrained(partial)
        generation_config.save_pretrained(partial)
        if processor is not None:
            processor.save_pretrained(partial)
        base_model = None if Path(source).expanduser().is_dir() else str(source)
        licence = licence_in_card(folder / "README.md")
        write_model_card(partial, config, repo_id=place.repo_id, base_model=base_model, license=licence)
    if processor is None:
        log(
            f"note: {folder} has no tokenizer ({', '.join(_TOKENIZER_FILES)}): converted the model without a processor."
        )
    place.publish()
    return place.path


def _check_choices(dtype: str | None, shared_projector: str) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}.")
    if shared_projector not in SHARED_PROJECTOR:
        raise ValueError(f"shared_projector={shared_projector!r}: expected one of {', '.join(SHARED_PROJECTOR)}.")


# --- what is read -----------------------------------------------------------------------------------------------------


def _folder(source: str | os.PathLike, role: str, with_weights: bool = True) -> Path:
    """The folder `source`, or the local snapshot of the repository of that name."""
    folder = local_folder(source, role)
    if folder is not None:
        return folder
    small = ["*.json", "*.txt", "README.md", "tokenizer.model"]
    try:
        found = Path(snapshot_download(str(source), allow_patterns=small + ["*.safetensors"] * with_weights))
        if with_weights and not any(found.glob("*.safetensors")):
            found = Path(snapshot_download(str(source), allow_patterns=[*small, "*.bin"]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{role} {source!r} is not a folder here and cannot be downloaded from the hub: {first_line(error)}"
        ) from error
    return found


def _tower_folder(
    vision_tower: str | os.PathLike | None, settings: dict[str, Any], folder: Path, with_weights: bool
) -> Path:
    """The folder of the vision encoder, which `folder`, the source, may be itself."""
    if vision_tower is not None:
        return _folder(vision_tower, "--vision-tower", with_weights)
    named = settings.get("mm_vision_tower")
    if not named:
        raise ValueError(f"{folder / 'config.json'} names no mm_vision_tower: give the encoder with --vision-tower.")
    if not isinstance(named, str):
        raise ValueError(f"{folder / 'config.json'}: mm_vision_tower={named!r:.80}, expected a folder or a hub id.")
    if (folder / named).is_dir():
        return folder / named
    if not with_weights and (folder / "vision_config.json").is_file():
        return folder
    try:
        return _folder(named, "mm_vision_tower", with_weights)
    except OSError as error:
        raise FileNotFoundError(f"{error} Give a copy of the encoder with --vision-tower PATH.") from error


def _vision_config(tower_folder: Path, tensors: int) -> Any:
    """The configuration of the encoder, of which there are so many tensors."""
    file = tower_folder / "vision_config.json"
    if file.is_file():
        config = read_json(file)
    else:
        file = tower_folder / "config.json"
        check_layers(read_json(file), tensors, file)
        with reading(file):
            config = AutoConfig.from_pretrained(tower_folder)
        config = getattr(config, "vision_config", config)  # CLIP and SigLIP checkpoints hold a text tower too
    check_layers(config, tensors, file)
    return config


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """The source's tokenizer with an image token, or None if the source has no tokenizer."""
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        return None
    # the class is in tokenizer_config.json; without a config, transformers stumbles over the model_type in config.json
    with reading(folder, "the tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, config=LlamaConfig())
        prepare_padding(tokenizer)
        add_image_token(tokenizer, IMAGE_TOKEN)
    return tokenizer


# --- processor and generation -----------------------------------------------------------------------------------------


def _template_name(chosen: str | None, tokenizer: PreTrainedTokenizerBase) -> str:
    return chosen or ("llama_3" if tokenizer.bos_token == "<|begin_of_text|>" else "vicuna")


def _processor(
    config: SaisaConfig,
    settings: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    tower_folder: Path,
    chat_template: str | None,
) -> SaisaProcessor:
    if not (tower_folder / "preprocessor_config.json").is_file():
        raise FileNotFoundError(
            f"{tower_folder / 'preprocessor_config.json'} is missing: it says how images are prepared for the encoder."
        )
    template = _template_name(chat_template, tokenizer)
    with reading(tower_folder / "preprocessor_config.json"):
        image_processor = AutoImageProcessor.from_pretrained(tower_folder)
    return SaisaProcessor(
        image_processor,
        tokenizer,
        patch_size=config.vision_config.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=config.vision_prefix_tokens,
        image_seq_length=config.image_seq_length,
        image_token=IMAGE_TOKEN,
        chat_template=(read_chat_template if template.endswith(".jinja") else named_chat_template)(template),
        pad_to_square=settings.get("image_aspect_ratio") == "pad",
    )


def _generation_config(
    folder: Path,
    config: SaisaConfig,
    processor: SaisaProcessor | None,
    chat_template: str | None,
    old_rows: int,
) -> GenerationConfig:
    """Stop tokens and sampling as in the source, plus the token that closes a turn in the chat template; tokens that the
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


def _turn_end(processor: SaisaProcessor, template_name: str) -> int | None:
    """The token with which one of the package's templates closes an answer, if it is a single token."""
    if template_name not in chat_template_names():
        return None
    said = processor.apply_chat_template([{"role": "assistant", "content": "\0"}])
    return processor.tokenizer.get_vocab().get(said.partition("\0")[2].strip())
