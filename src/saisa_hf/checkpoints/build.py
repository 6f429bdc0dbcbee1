# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa build`: a language model and a vision encoder become an untrained SAISA checkpoint, ready for the first training
stage: weights, processor with image token and chat template, configuration, code files and model card.

As with `saisa convert`, everything is written into a hidden folder beside the destination, read back and compared, and put in
place at the very end.
"""

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaNextImageProcessor,
    PreTrainedTokenizerBase,
)

from ..chat.templates import chat_template as named_chat_template
from ..chat.templates import read_chat_template, with_pictures
from ..common.destination import Destination, size_in_bytes
from ..common.sources import check_local, reading
from ..modeling_saisa import SaisaForConditionalGeneration
from ..processing_saisa import SaisaProcessor, add_image_token
from ..vision_saisa import image_size
from .gguf import gguf_file, gguf_tokenizer, is_gguf
from .model_card import licence_in_card, write_model_card
from .names import as_saved
from .padding import prepare_padding
from .weight_files import DTYPES


# image tokens that some language models' tokenizers have already, because a vision-language model shares them
KNOWN_IMAGE_TOKENS = ("<image>", "<|image_pad|>", "<image_soft_token>", "<|image|>", "<IMG_CONTEXT>", "[IMG]")


def build(
    language_model: str | os.PathLike,
    vision_model: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    image_token: str | None = None,
    chat_template: str | None = None,
    dtype: str | None = None,
    pad_to_square: bool = False,
    tiles: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
    log: Callable[[str], None] = print,
    **settings: Any,
) -> Path:
    """Builds an untrained SAISA from parts into the folder `destination`.

    Args:
        language_model: folder or hub id of a language model with its tokenizer; or a folder with one GGUF file, or that file
            (see `gguf`).
        vision_model: folder or hub id of a vision encoder with its image processor; CLIP and SigLIP may bring a text tower.
        destination: folder to make. An existing one must be empty, or `overwrite` must be True.
        image_token: the text that stands for an image. None: the one that the tokenizer has (`KNOWN_IMAGE_TOKENS`), else
            `<image>`, which is added.
        chat_template: "vicuna", "llama_3", "chatml", "plain", or the path of a .jinja file that reads contents as strings.
            None: the tokenizer's own, made to accept images; "plain" if it has none.
        dtype: "float32", "float16" or "bfloat16"; None keeps the language model's.
        pad_to_square: whether the processor first pads images to squares with the mean colour, as LLaVA-1.5 does.
        tiles: grids of tiles, (rows, columns) each, that images are read in beside the whole, as LLaVA-NeXT does; None: the
            whole alone.
        seed: of the projectors' weights.
        max_shard_size: the largest size of a weight file, as a number of bytes or like "5GB".
        overwrite: whether `destination` may be replaced.
        push_to_hub: a repository, "user/name", to upload the result to as well; made if needed.
        private: whether the repository is private, if it is made; None leaves that to the hub.
        log: called with one line of text per step.
        settings: of `SaisaConfig`: `vision_feature_layer`, `visual_layers`, `projector_sharing` ...

    Returns:
        The destination's path.

    Raises:
        ValueError: a part is not supported, or the parts or arguments do not fit.
        OSError: a file or repository is missing or cannot be read or written.
    """
    language_model, vision_model = _source(language_model, "LANGUAGE_MODEL"), _source(vision_model, "VISION_MODEL")
    max_shard_size = size_in_bytes(max_shard_size)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}.")
    place = Destination(destination, overwrite, push_to_hub, private, log)
    for part in (language_model, vision_model):
        if os.path.exists(part):
            place.check_outside(Path(part))

    if (file := gguf_file(language_model)) is not None:
        tokenizer = gguf_tokenizer(file)
    else:
        with reading(language_model, "the tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(language_model)
    image_token = prepare_tokenizer(tokenizer, image_token)
    template = _chat_template(chat_template, tokenizer, image_token)
    with reading(vision_model, "the image processor"):
        image_processor = _image_processor(vision_model)
        if tiles:
            config = AutoConfig.from_pretrained(vision_model)
            height, width = image_size(getattr(config, "vision_config", config))
            settings["image_grid_pinpoints"] = [[rows * height, columns * width] for rows, columns in tiles]
            image_processor = _with_tiles(image_processor, settings["image_grid_pinpoints"], height)

    log(f"reading {language_model} and {vision_model}")
    torch.manual_seed(seed)
    model = SaisaForConditionalGeneration.from_parts(
        language_model,
        vision_model,
        image_token_id=tokenizer.convert_tokens_to_ids(image_token),
        dtype=None if dtype is None else DTYPES[dtype],
        **settings,
    )
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    processor = make_processor(model, image_processor, tokenizer, image_token, template, pad_to_square)

    with place.new_folder() as partial:
        log("writing")
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        processor.save_pretrained(partial)
        count = _compare(partial, model)
        repositories = [str(part) for part in (language_model, vision_model) if not os.path.exists(part)]
        write_model_card(
            partial,
            model.config,
            repo_id=place.repo_id,
            base_model=repositories or None,
            license=licence_in_card(Path(language_model) / "README.md"),
        )
    log(f"checked {count} tensors; {image_token!r} takes {model.config.image_seq_length} visual tokens")
    place.publish()
    return place.path


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, image_token: str | None = None) -> str:
    """Prepares a language model's tokenizer, in place, for images: with an image token, a padding token, and padding on the
    left.

    Args:
        image_token: see `build`.

    Returns:
        The image token.
    """
    prepare_padding(tokenizer)
    vocabulary = tokenizer.get_vocab()
    if image_token is None:
        own = (getattr(tokenizer, "image_token", None), *KNOWN_IMAGE_TOKENS)
        image_token = str(next((token for token in own if token in vocabulary), "<image>"))
    if image_token not in vocabulary:
        add_image_token(tokenizer, image_token)
    return image_token


def make_processor(
    model: SaisaForConditionalGeneration,
    image_processor: Any,
    tokenizer: PreTrainedTokenizerBase,
    image_token: str,
    template: str | dict[str, str] | None,
    pad_to_square: bool = False,
) -> SaisaProcessor:
    """The processor of `model`. `config.image_seq_length` of both becomes the number of tokens that the encoder makes from an
    image prepared by `image_processor`.

    Raises:
        ValueError: the encoder does not accept such an image.
    """
    config = model.config
    processor = SaisaProcessor(
        image_processor,
        tokenizer,
        patch_size=_square(getattr(config.vision_config, "patch_size", None)),
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        # a processor with the strategy "default" takes one away, however many the encoder drops
        num_additional_image_tokens=config.kept_prefix_tokens + (config.dropped_vision_tokens > 0),
        image_token=image_token,
        image_seq_length=config.image_seq_length,
        chat_template=template,
        pad_to_square=pad_to_square,
        visual_token_reduction=config.visual_token_reduction,
        reduced_visual_tokens=config.reduced_visual_tokens,
    )
    image = PIL.Image.new("RGB", (640, 480), (128, 128, 128))
    inputs = processor(images=[image], return_tensors="pt")
    inputs = {name: value.to(model.vision_tower.device) for name, value in inputs.items()}
    try:
        with torch.no_grad():
            outputs = model.get_image_features(**inputs, return_dict=True)
    except (RuntimeError, ValueError, IndexError) as error:
        raise ValueError(
            f"The encoder does not accept images of shape {tuple(inputs['pixel_values'].shape)}, which its image processor "
            f"makes: {error}"
        ) from error
    if (
        "num_tiles" not in inputs and "spatial_shapes" not in inputs
    ):  # every image has as many tokens, whatever its shape
        config.image_seq_length = processor.image_seq_length = len(outputs.pooler_output[0])
        # for when another reduction is chosen at loading: without `image_seq_length`, the processor counts patches
        height, width = inputs["pixel_values"].shape[-2:]
        state = outputs.hidden_states[config.vision_feature_layers[0]]
        patches = math.prod(state.shape[2:]) if state.ndim == 4 else state.shape[1] - config.vision_prefix_tokens
        side = round(math.sqrt(height * width / patches))
        processor.patch_size = side if (height // side) * (width // side) == patches else None
    return processor


def _chat_template(chosen: str | None, tokenizer: PreTrainedTokenizerBase, image_token: str) -> str | dict[str, str]:
    own = tokenizer.chat_template
    tokenizer.chat_template = None  # the processor's is the one that counts
    if chosen is None and own:
        if isinstance(own, dict):
            return {name: with_pictures(template, image_token) for name, template in own.items()}
        return with_pictures(own, image_token)
    if chosen is None or not chosen.endswith(".jinja"):
        return named_chat_template(chosen or "plain", image_token)
    return with_pictures(read_chat_template(chosen), image_token)


def _image_processor(vision_model: str) -> Any:
    """The encoder's own. For timm, whose own needs torchvision, CLIP's with the same sizes, mean and deviation."""
    config = AutoConfig.from_pretrained(vision_model)
    if config.model_type != "timm_wrapper":
        return AutoImageProcessor.from_pretrained(vision_model)
    seen = config.pretrained_cfg
    side = seen.get("input_size", (3, 224, 224))[-1]
    filters = {"bilinear": PIL.Image.Resampling.BILINEAR, "nearest": PIL.Image.Resampling.NEAREST}
    return CLIPImageProcessor(
        size={"shortest_edge": int(side / seen.get("crop_pct", 0.875))},
        crop_size={"height": side, "width": side},
        resample=filters.get(seen.get("interpolation"), PIL.Image.Resampling.BICUBIC),
        image_mean=list(seen.get("mean", (0.485, 0.456, 0.406))),
        image_std=list(seen.get("std", (0.229, 0.224, 0.225))),
    )


def _with_tiles(image_processor: Any, pinpoints: list[list[int]], side: int) -> LlavaNextImageProcessor:
    """LLaVA-NeXT's image processor with the settings of an encoder's own."""
    return LlavaNextImageProcessor(
        size={"height": side, "width": side},
        crop_size={"height": side, "width": side},
        image_grid_pinpoints=pinpoints,
        **colour_settings(image_processor),
    )


def colour_settings(image_processor: Any) -> dict[str, Any]:
    """Those settings of an image processor that do not depend on the sizes of images."""
    names = ("image_mean", "image_std", "rescale_factor", "resample", "do_rescale", "do_normalize", "do_convert_rgb")
    return {name: getattr(image_processor, name) for name in names if hasattr(image_processor, name)}


def _compare(folder: Path, model: SaisaForConditionalGeneration) -> int:
    """Reads the weight files in `folder` back; returns how many tensors they hold."""
    wanted, count = as_saved(model), 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as written:
            for name in written.keys():  # noqa: SIM118, it is not a dict
                count += 1
                if not torch.equal(written.get_tensor(name), wanted[name].cpu()):
                    raise OSError(f"{file}: {name} read back differs from the model: is the disk sound?")
    return count


def _source(part: str | os.PathLike, role: str) -> str:
    """The absolute path of a folder or GGUF file, or the hub id as it is."""
    folder = check_local(role, part, files=role == "LANGUAGE_MODEL" and is_gguf(part))
    return str(part) if folder is None else str(folder.absolute())


def _square(size: Any) -> int | None:
    """The side of a patch; None if there are no patches, or if they are not square."""
    sides = set(size) if isinstance(size, (list, tuple)) else {size}
    return sides.pop() if len(sides) == 1 else None
