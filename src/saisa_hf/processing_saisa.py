# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""From texts and images to what SAISA's forward takes: token ids with a placeholder for each visual token, and pixels."""

import json
import math
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch
from torch import Tensor
from transformers import BatchFeature

from .checkpoint_saisa import PROCESSOR_AUTO_MAP, from_package, write_code_files
from .compat_saisa import (
    CallArguments,
    ImageTextProcessorMixin,
    call_arguments,
    findable,
    needed,
    pillow_image_processor,
    portable_image_processor_config,
    portable_tokenizer_config,
    sorted_arguments,
)
from .head_saisa import IGNORED
from .image_sources_saisa import LIMITS
from .images_saisa import check_size, load_image, pad_to_square, resized
from .saving_saisa import PROCESSOR_ENTRIES, check_finished, saved_together
from .tiles_saisa import most_tiles, processed_images, sizes_of, visual_inputs
from .vision_saisa import MOST_TOKENS, check_choice, check_value, reduced_length, shown


if TYPE_CHECKING:  # not used here: transformers 4.57 copies those files of a checkpoint that each entry file names
    from .attention_saisa import Visibility  # noqa: F401
    from .configuration_saisa import SaisaConfig  # noqa: F401
    from .embedding_space_saisa import ThroughEveryLayer  # noqa: F401
    from .hardware_saisa import check_device_map  # noqa: F401
    from .language_models_saisa import language_model_family  # noqa: F401
    from .modeling_saisa import SaisaModel  # noqa: F401
    from .token_layout_saisa import TokenLayout  # noqa: F401
    from .visual_states_saisa import SaisaVisualStates  # noqa: F401

findable(__name__)

SETTINGS = ("image_seq_length", "image_token", "num_additional_image_tokens", "pad_to_square", "patch_size")
SETTINGS += ("reduced_visual_tokens", "tokenize_whole", "vision_aspect_ratio", "vision_feature_select_strategy")
SETTINGS += ("visual_token_reduction",)
# image processors of transformers that resize by `size` and `resample` alone, and that before anything else
RESIZES_FIRST = ("BitImageProcessor", "CLIPImageProcessor", "SiglipImageProcessor", "ViTImageProcessor")
VIDEO = "<video>"  # stands for a video in texts of a call that has any
SAMPLING = ("num_frames", "fps", "do_sample_frames")
SOURCES = ("image", "video", "url", "path", "base64")  # keys of parts of a chat, under which their data are
# keys of what might vanish in silence
MEDIA = ("audio", "audios", "audio_url", "input_audio", "video", "videos", "video_url", "image", "image_url", "file")
UNSUPPORTED = ("text_pair", "text_target", "text_pair_target", "return_overflowing_tokens", "is_split_into_words")


@dataclass(frozen=True)
class Video:
    """A video among the images of a prompt: a file, as images are, or its frames as an array or a list."""

    source: object = None
    is_video = True  # of a checkpoint's own code and of the package, whose classes are not the same


def is_video(one) -> bool:
    """Whether one of the images of a prompt is a `Video`."""
    return getattr(one, "is_video", False) is True


def add_image_token(tokenizer, image_token: str = "<image>") -> int:
    """Makes `image_token` a special token of `tokenizer` that leaves spaces alone. Returns its id, which may be a new one."""
    token_class = needed("Adding an image token", "transformers", "AddedToken")
    token = token_class(image_token, normalized=False, lstrip=False, rstrip=False, special=True)
    tokenizer.add_tokens([token], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(image_token)


def begins_with_bos(tokenizer, text: str) -> bool:
    """Whether a rendered conversation brings its own BOS token, so that the tokenizer must not add another."""
    return tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)


class SaisaBatch(BatchFeature):
    """A `BatchFeature` in which `labels` ask visual tokens for nothing: they predict nothing (outside embedding space), but a
    loss that is computed outside the model, as TRL's is, counts every label. What is put in as `labels`, in the shape of
    `input_ids`, is copied with -100 at placeholders and at the tokens behind them."""

    image_token_id: int | None = None  # None: labels stay as they are

    def __getstate__(self):
        return dict(vars(self))

    def __setstate__(self, state):
        self.__dict__.update(state)

    def __setitem__(self, key, value):
        if key == "labels" and self.image_token_id is not None and "input_ids" in self.data:
            value = labels_of_text(value, self.data["input_ids"], self.image_token_id)
        self.data[key] = value


class BatchWithVisualStates(SaisaBatch):
    """A batch with `visual_states`, which are no lists to make tensors of, but move and cast with the tensors."""

    def convert_to_tensors(self, *args, **kwargs):
        states = self.data.pop("visual_states")
        super().convert_to_tensors(*args, **kwargs)
        self.data["visual_states"] = states
        return self

    def to(self, *args, **kwargs):
        self.data["visual_states"] = self.data["visual_states"].to(*args, **kwargs)
        return super().to(*args, **kwargs)


def labels_of_text(labels, input_ids, image_token_id: int):
    """A copy of `labels`, tensor, array or lists in the shape of `input_ids`, with -100 where a visual token is the label
    or would have to predict it. `labels` of another shape, or that have it already, are returned as they are."""
    if isinstance(labels, list) and labels and np.isscalar(labels[0]):
        return labels_of_text(np.asarray(labels), input_ids, image_token_id).tolist()
    if isinstance(labels, list):
        rows = zip(labels, input_ids) if len(labels) == len(input_ids) else ()
        return [labels_of_text(*row, image_token_id) for row in rows] or labels
    try:
        visual = torch.as_tensor(input_ids) == image_token_id
    except (TypeError, ValueError):  # rows of several lengths
        return labels
    if not isinstance(labels, (np.ndarray, Tensor)) or labels.shape != visual.shape:
        return labels
    asked = visual.clone()
    asked[..., 1:] |= visual[..., :-1]
    asked = asked.to(labels.device) if isinstance(labels, Tensor) else asked.numpy(force=True)
    if not (asked & (labels != IGNORED)).any():
        return labels
    labels = labels + 0
    labels[asked] = IGNORED
    return labels


class SaisaProcessor(ImageTextProcessorMixin):
    """An image processor and a tokenizer of transformers in one, with the arguments of `LlavaProcessor`.

    Args:
        patch_size, num_additional_image_tokens: of the vision encoder; CLIP ViT-L/14 has 14 pixels and 1 token of no patch.
        vision_feature_select_strategy: `"default"` drops the class token if there is one, `"full"` keeps it.
        image_token: stands for one image in texts. The tokenizer has to know it, see `add_image_token`.
        image_seq_length: placeholders per image, in place of what the three arguments about patches say.
        chat_template: Jinja source, or a dict of several by name.
        pad_to_square: pad images to squares of the mean colour first; LLaVA-1.5's `image_aspect_ratio: "pad"`.
        tokenize_whole: tokenize texts whole, as `LlavaProcessor` does, not each stretch between images as the authors did.
        visual_token_reduction, reduced_visual_tokens, vision_aspect_ratio: as in the model's `SaisaConfig`.
        video_settings: in place of `saisa_hf.common.videos.SETTINGS`, for frames of videos.

    With LLaVA-NeXT's or LLaVA-OneVision's image processor, images are read in tiles too, and with one that has
    `crop_to_patches=True` (`GotOcr2ImageProcessor`): `pixel_values` are (images, tiles, C, H, W) then."""

    model_input_names = ["input_ids", "attention_mask", "pixel_values"]

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        patch_size=None,
        vision_feature_select_strategy=None,
        num_additional_image_tokens=0,
        image_token="<image>",
        image_seq_length=None,
        chat_template=None,
        pad_to_square=False,
        tokenize_whole=False,
        visual_token_reduction=None,
        reduced_visual_tokens=None,
        vision_aspect_ratio=None,
        video_settings=None,
    ):
        for name, value, rule in (
            ("vision_feature_select_strategy", vision_feature_select_strategy, ["default", "full", None]),
            ("patch_size", 1 if patch_size is None else patch_size, (1, MOST_TOKENS)),
            ("image_seq_length", 1 if image_seq_length is None else image_seq_length, (1, MOST_TOKENS)),
            ("num_additional_image_tokens", num_additional_image_tokens, (0, MOST_TOKENS)),
            ("image_token", image_token or None, str),
            ("chat_template", {} if chat_template is None or isinstance(chat_template, str) else chat_template, dict),
            ("pad_to_square", pad_to_square, [True, False]),
            ("tokenize_whole", tokenize_whole, [True, False]),
            ("video_settings", {} if video_settings is None else video_settings, dict),
        ):
            check_value(name, value, rule)
        check_choice(visual_token_reduction, reduced_visual_tokens, image_seq_length)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.patch_size, self.image_seq_length = patch_size, image_seq_length
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.num_additional_image_tokens = num_additional_image_tokens
        self.image_token = getattr(tokenizer, "image_token", None) or image_token
        self.pad_to_square, self.tokenize_whole = pad_to_square, tokenize_whole
        self.visual_token_reduction, self.reduced_visual_tokens = visual_token_reduction, reduced_visual_tokens
        self.vision_aspect_ratio = vision_aspect_ratio and f"anyres_max_{most_tiles(vision_aspect_ratio)}"
        self.video_settings = video_settings
        if not hasattr(tokenizer, "get_vocab"):
            raise ValueError(f"tokenizer is {shown(tokenizer)}. Expected a tokenizer of transformers.")
        if self.image_token not in tokenizer.get_vocab():
            adding = f"tokenizer.add_tokens({self.image_token!r}, special_tokens=True)"
            raise ValueError(f"The tokenizer lacks image_token {self.image_token!r}. Name another, or call {adding}.")
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    def __call__(self, images=None, text=None, *, visual_states=None, **kwargs: CallArguments) -> BatchFeature:
        """`input_ids` and `attention_mask` (B, S) of texts; `pixel_values` (images, C, H, W) or `visual_states` of images; of
        images in tiles `pixel_values` (images, tiles, C, H, W), `num_tiles` (images,) and `image_sizes` (images, 2).
        Raises ValueError if an image is unreadable, too large, empty or not one per image token, if truncation would cut into
        an image's placeholders, or if an argument is not supported.

        Args:
            images: what `load_image` takes: one image, a list in the order of the texts' image tokens, or a list per text.
            text: a text or a list of them. Each `image_token` in them stands for one image, each `<video>` for a video.
            visual_states: in place of `images`, the `SaisaVisualStates` that the model's `get_visual_states` made of them.
            kwargs: `videos`, as `images`, with `num_frames`, `fps` or `do_sample_frames` of transformers' video processors;
                arguments of a tokenizer's and an image processor's call, flat or in `text_kwargs` and `images_kwargs`;
                `timeout`, `allow_private_urls` and other limits of `ImageLimits`; `return_mm_token_type_ids`. Offsets
                refer to the text as given; a placeholder has those of its image token."""
        media, videos = {name: kwargs.pop(name, None) for name in MEDIA}, []
        if unread_media(media, ("videos",)):
            videos = from_package("Reading videos", "common.videos", "listed")(media.pop("videos"))
        _refuse_media(media, "the call")
        of_videos = {name: kwargs.pop(name) for name in SAMPLING if name in kwargs}
        of_videos |= kwargs.pop("videos_kwargs", None) or {}
        texts = _checked_texts(images, text, visual_states, videos)
        text_kwargs, images_kwargs, return_tensors = self._sorted_arguments(kwargs)
        visuals, groups = self._flat_images(images, visual_states, texts, videos)
        marks = {self.image_token, *([VIDEO] if any(map(is_video, visuals)) else [])}
        if visual_states is not None:
            rows = self._tokenize(texts, self._units(visual_states.lengths), marks, text_kwargs)
            batch = BatchWithVisualStates({**rows, "visual_states": visual_states}, tensor_type=return_tensors)
        else:
            if VIDEO in marks:
                read = from_package("Reading videos", "common.videos", "read_in_order")
                pixels, units = read(self, visuals, groups, of_videos, images_kwargs)
            else:
                pixels = self._pixels(visuals, groups, **images_kwargs) if visuals else {}
                units = self._units(self._counts(pixels)) if texts and visuals else []
            rows = {} if texts is None else self._tokenize(texts, units, marks, text_kwargs)
            if return_tensors and not all(rows.get("input_ids", ())):
                raise ValueError(f"text {rows['input_ids'].index([])} has no tokens. A model needs at least one.")
            batch = SaisaBatch({**rows, **pixels}, tensor_type=return_tensors)
        batch.image_token_id = self.image_token_id
        return batch

    def _units(self, counts: list[int]) -> list[list[int]]:
        """The tokens that stand for each of several images."""
        return [[self.image_token_id] * count for count in counts]

    def _sorted_arguments(self, kwargs: dict) -> tuple[dict, dict, str | None]:
        """(arguments for the texts, for the images, `return_tensors`)."""
        kwargs |= {part: dict(kwargs[part]) for part in ("text_kwargs", "images_kwargs") if part in kwargs}
        limits = {name: kwargs.pop(name) for name in LIMITS if name in kwargs}
        marks_visual = kwargs.pop("return_mm_token_type_ids", False)
        marks_visual = kwargs.get("text_kwargs", {}).pop("return_mm_token_type_ids", marks_visual)
        asked = {*kwargs, *kwargs.get("text_kwargs", ())}  # in front of the merging: 4.57's empties the dicts
        merged = sorted_arguments(self, kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs)
        text_kwargs, images_kwargs = merged["text_kwargs"], {**merged["images_kwargs"], **limits}
        if not asked & {"max_length", "truncation", "padding"} and text_kwargs.get("padding") != "max_length":
            text_kwargs.pop("max_length", None)  # this call did not ask for it: it was saved in tokenizer.json
        text_kwargs["return_mm_token_type_ids"] = marks_visual
        return_tensors = text_kwargs.pop("return_tensors", None) or images_kwargs.get("return_tensors")
        return text_kwargs, images_kwargs, return_tensors

    def _flat_images(self, images, visual_states, texts: list[str] | None, videos) -> tuple[list, list[int] | None]:
        """Images and videos as one list, and how many images each list has, if they came as lists. Raises ValueError unless
        they, or the visual states, are one per token."""
        name, fix, flat = "images", "Pass one image for each: one flat list, or one list per text.", _image_list(images)
        found, groups = len(flat), None
        if visual_states is not None:
            if not hasattr(visual_states, "lengths"):
                raise ValueError(f"`visual_states` is {visual_states!r:.80}. Pass one SaisaVisualStates, see its cat.")
            fix = "Pass `states.expand(n)` for the same images in n texts, or choose some with `states[[...]]`."
            name, found = "visual_states", len(visual_states)
        elif any(isinstance(group, (list, tuple)) for group in flat):
            lists = [_image_list(group) for group in flat]
            flat, found = [image for group in lists for image in group], [len(group) for group in lists]
            groups = [sum(not is_video(image) for image in group) for group in lists]
        if videos or any(map(is_video, flat)):
            return from_package("Reading videos", "common.videos", "in_order")(self, flat, videos, texts), groups
        tokens = [text.count(self.image_token) for text in texts or ()]
        if texts is not None and found not in (tokens, sum(tokens)):
            raise ValueError(f"`{name}`: {found or 'none'} for {tokens} {self.image_token!r} in `text`. {fix}")
        return flat, groups

    def _pixels(self, images: list, groups: list[int] | None = None, *, input_data_format=None, **kwargs) -> dict:
        """The image processor's output for `images`, which came as lists of so many as `groups` says."""
        limits = {name: kwargs.pop(name) for name in LIMITS if name in kwargs}
        settings: dict = {"do_rescale": True, "do_resize": False, "image_mean": None, "resample": None, "size": None}
        settings = {name: getattr(self.image_processor, name, default) for name, default in settings.items()}
        settings |= {name: value for name, value in kwargs.items() if value is not None}
        edge = settings["size"] if settings["do_resize"] else None  # the shortest: a thin image becomes very long
        if self.image_grid_pinpoints is not None:
            edge = None  # whatever its shape, the image and its tiles become squares
            if kwargs.get("image_grid_pinpoints", self.image_grid_pinpoints) != self.image_grid_pinpoints:
                raise ValueError("image_grid_pinpoints cannot be chosen in a call: the model has to know them too.")
        if edge is not None and not isinstance(edge, int):
            edge = None if edge.get("longest_edge") else edge.get("shortest_edge")

        def check(width: int, height: int, name: str) -> None:  # of the image as it will be; nothing is decoded yet
            if self.pad_to_square:
                check_size(max(width, height), max(width, height), f"{name} padded to a square")
            elif edge:
                scale = edge / min(width, height)
                check_size(math.ceil(width * scale), math.ceil(height * scale), f"{name} resized")

        if self.pad_to_square and settings["image_mean"] is None:
            raise ValueError("pad_to_square needs the mean colour, but the image processor has no `image_mean`.")
        image_processor, resample, size = self.image_processor, settings["resample"], {}
        if kwargs.get("device") is None:
            image_processor = pillow_image_processor(image_processor)
            kwargs.pop("disable_grouping", None)
            kind = type(image_processor)
            if kind.__module__.startswith("transformers.") and kind.__name__.removesuffix("Pil") in RESIZES_FIRST:
                size = dict(settings["size"]) if settings["do_resize"] and hasattr(settings["size"], "get") else {}
        resizes = set(size) in ({"shortest_edge"}, {"height", "width"}) and isinstance(resample, int)

        def ready(index: int):
            source = f" ({images[index]!s:.120})" if isinstance(images[index], (str, Path)) else ""
            name = f"image {index} of {len(images)}{source}"
            image = load_image(images[index], name, input_data_format, check, **limits)
            if self.pad_to_square:
                image = pad_to_square(image, tuple(int(x * 255) for x in np.broadcast_to(settings["image_mean"], 3)))
            return resized(image, size, resample) if resizes else image

        are_distinct = len({*map(id, images)}) == len(images) > 1  # no image can be opened by two threads at once
        with ThreadPoolExecutor(threads := torch.get_num_threads() if are_distinct else 1) as pool:
            loaded = list((pool.map if threads > 1 else map)(ready, range(len(images))))
        dtypes = [getattr(one, "dtype", None) for one in images]
        fractions = all(getattr(d, "kind", "") == "f" or getattr(d, "is_floating_point", False) for d in dtypes)
        if fractions and not settings["do_rescale"]:
            kwargs["do_rescale"] = True  # False was meant for arrays in [0, 1], which are 8-bit images by now
        kwargs |= {"do_resize": False} if resizes else {}
        if not type(image_processor).__name__.endswith("Fast"):  # 4.57's torchvision processors do not take it
            kwargs["input_data_format"] = "channels_last"
        return processed_images(image_processor, loaded, groups, **kwargs)

    @property
    def image_grid_pinpoints(self) -> list | None:
        """The image processor's: the resolutions of tiles, as in the model's `SaisaConfig`."""
        return getattr(self.image_processor, "image_grid_pinpoints", None)

    def _counts(self, processed: dict) -> list[int]:
        """The number of placeholders for each image in the image processor's output."""
        if "num_tiles" in processed:
            pixels = processed["pixel_values"]
            tokens, side = self._counts({"pixel_values": pixels[0][:1]})[0], np.shape(pixels[0])[-2:]
            tiles = (processed.get(name) for name in ("image_sizes", "num_tiles", "frame_pooling"))
            return [one.length for one in visual_inputs(self, tokens, side, *tiles)]
        strategy, others = self.vision_feature_select_strategy, self.num_additional_image_tokens
        patch = self.patch_size
        if "spatial_shapes" in processed:  # SigLIP 2 in native aspect ratio: each image's rows and columns of patches
            grids, others = [(int(rows), int(columns)) for rows, columns in processed["spatial_shapes"]], 0
        elif self.image_seq_length is not None:
            return [self.image_seq_length] * len(processed["pixel_values"])
        elif patch is None:
            raise ValueError("Both `patch_size` and `image_seq_length` are None: set one, for the tokens per image.")
        else:
            grids = [(height // patch, width // patch) for height, width in sizes_of(processed["pixel_values"])]
            others -= strategy == "default" and others > 0  # the class token
        counts = [rows * columns + others for rows, columns in grids]
        if min(counts, default=1) < 1:
            settings = {name: getattr(self, name) for name in SETTINGS}
            raise ValueError(f"Images of {grids} patches have {counts} tokens. Check the settings: {settings}.")
        reduction = self.visual_token_reduction, self.reduced_visual_tokens
        return [reduced_length(*reduction, *image) for image in zip(counts, grids)]

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """Placeholders per image for images of (height, width) `image_sizes`, as serving engines ask for them."""
        data_class = needed("Numbers of placeholders, told by sizes", "transformers.processing_utils", "MultiModalData")
        if image_sizes is None:
            return data_class()
        images_kwargs = sorted_arguments(self, kwargs)["images_kwargs"]
        sizes = [(int(height), int(width)) for height, width in image_sizes]
        blank = {size: self._pixels([PIL.Image.new("RGB", size[::-1])], **images_kwargs) for size in set(sizes)}
        counts = [self._counts(blank[size])[0] for size in sizes]
        return data_class(num_image_tokens=counts, num_image_patches=[1] * len(counts))

    def _tokenize(
        self, texts: list[str], units: list[list[int]], marks: set[str], kwargs: dict
    ) -> dict[str, list[list]]:
        """Token ids and what goes with them, one row per text, with `units` of tokens for the `marks` in the texts."""
        if refused := {key: kwargs[key] for key in UNSUPPORTED if kwargs.get(key)}:
            raise ValueError(f"{refused} is not supported: texts are tokenized around their images. Leave it out.")
        for name in ("max_length", "pad_to_multiple_of"):
            if (value := kwargs.get(name)) is not None and (not hasattr(value, "__index__") or value < 0):
                raise ValueError(f"{name} is {value!r:.80}. Expected a number of tokens.")
        specials = self._special_ids() if kwargs.get("add_special_tokens", True) else ([], [])
        prefix, suffix = ([(i, (0, 0)) for i in ids] for ids in specials)
        n_special, wants_offsets = len(prefix + suffix), bool(kwargs.get("return_offsets_mapping"))
        whole = enumerate(self._tokens(texts, iter(units), marks, wants_offsets))
        found = [self._truncated(tokens, index, n_special, **kwargs) for index, tokens in whole]
        rows = {"input_ids": [[i for i, _ in prefix + tokens + suffix] for tokens in found]}
        if kwargs.get("return_attention_mask") is not False:
            rows["attention_mask"] = [[1] * len(ids) for ids in rows["input_ids"]]
        if kwargs.get("return_special_tokens_mask"):
            rows["special_tokens_mask"] = [[1] * len(prefix) + [0] * len(one) + [1] * len(suffix) for one in found]
        if wants_offsets:
            rows["offset_mapping"] = [[offsets for _, offsets in prefix + tokens + suffix] for tokens in found]
        if kwargs.get("return_token_type_ids"):
            rows["token_type_ids"] = [[0] * len(ids) for ids in rows["input_ids"]]
        self._pad(rows, kwargs)
        if kwargs.get("return_length"):
            rows["length"] = [len(ids) for ids in rows["input_ids"]]
        if kwargs["return_mm_token_type_ids"]:
            rows["mm_token_type_ids"] = [[int(i == self.image_token_id) for i in ids] for ids in rows["input_ids"]]
        return rows

    def _special_ids(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts in front of a text and behind it."""
        full, bare = (self.tokenizer("a", add_special_tokens=added)["input_ids"] for added in (True, False))
        start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        return full[:start], full[start + len(bare) :]

    def _splitter(self, marks: set[str]):
        """(function that splits a text into pieces, at times empty, and special tokens by turns; `swallows`). Llama's
        sentencepiece model puts a space in front of every text, even of one that begins with a space or U+2581. Its fast form
        `swallows` it: in transformers 5 always, in 4 with `legacy=False`; with `legacy=True` behind specials as well."""
        if self.tokenize_whole:
            return (re.compile(f"({VIDEO})").split if VIDEO in marks else lambda text: [text]), False
        legacy, specials = getattr(self.tokenizer, "legacy", None), {*marks}
        spaced, bare = (self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (" a", "a"))
        swallows = legacy is not None and spaced == bare
        if swallows and legacy:
            tokens = self.tokenizer.added_tokens_decoder.values()
            specials |= {token.content for token in tokens if not (token.lstrip or token.rstrip)}
        longest_first = sorted(map(re.escape, specials), key=len, reverse=True)
        return re.compile(f"({'|'.join(longest_first)})").split, swallows

    def _tokens(self, texts: list[str], units, marks: set[str], wants_offsets: bool):
        """Yields each text's tokens as (id, offsets); in place of each of the `marks`, the next of `units`."""
        split, swallows = self._splitter(marks)
        parts = [split(text) for text in texts]
        pieces = [piece for row in parts for piece in row[::2] if piece]
        extra = [int(swallows and piece[0] in " \u2581") for piece in pieces]  # spaces to put in front
        options = {"return_offsets_mapping": True} if wants_offsets else {}  # slow tokenizers do not take it
        options |= {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        strings = [" " * n + piece for n, piece in zip(extra, pieces)]
        encoded = self.tokenizer(strings, **options) if strings else {"input_ids": []}
        pairs = encoded.get("offset_mapping") or [[(0, 0)] * len(ids) for ids in encoded["input_ids"]]
        encoded = zip(encoded["input_ids"], pairs, extra)
        for row in parts:
            tokens, start = [], 0
            for number, part in enumerate(row):
                if number % 2:
                    ids = next(units) if part in marks else [self.tokenizer.convert_tokens_to_ids(part)]
                    tokens += [(i, (start, start + len(part))) for i in ids]
                elif part:
                    ids, pairs, n = next(encoded)
                    for i, (a, b) in zip(ids, pairs):
                        is_image = self.tokenize_whole and i == self.image_token_id
                        place = start + max(a - n, 0), start + max(b - n, 0)
                        tokens += [(one, place) for one in (next(units) if is_image else [i])]
                start += len(part)
            yield tokens

    def _truncated(self, tokens, index: int, n_special: int, truncation=None, max_length=None, padding=False, **_):
        """The `tokens` of text `index`, cut to what `truncation` and `max_length` allow; never inside an image."""
        if truncation is None:
            truncation = max_length is not None and not padding  # as tokenizers do
        limit = self.tokenizer.model_max_length if max_length is None else max_length
        excess = len(tokens) - max(int(min(limit, 1e9)) - n_special, 0)
        if not truncation or truncation == "do_not_truncate" or excess <= 0:
            return tokens
        left = self.tokenizer.truncation_side == "left"
        inwards = tokens if left else tokens[::-1]
        text_tokens = next((n for n, (i, _) in enumerate(inwards) if i == self.image_token_id), len(tokens))
        if excess > text_tokens:
            cut = f"the {'first' if left else 'last'} image of text {index} ({len(tokens) + n_special} tokens)"
            fix = f"Set max_length to {len(tokens) - text_tokens + n_special} or more, or truncation=False."
            raise ValueError(f"Truncation to max_length={limit} cuts into {cut}. {fix}")
        return tokens[excess:] if left else tokens[:-excess]

    def _pad(self, rows: dict, kwargs: dict) -> None:
        """Pads `rows` in place, as `padding`, `max_length`, `padding_side` and `pad_to_multiple_of` say."""
        padding, multiple = kwargs.get("padding") or "do_not_pad", kwargs.get("pad_to_multiple_of") or 1
        if padding not in (True, "longest", "max_length", "do_not_pad"):
            raise ValueError(f"padding is {padding!r}. Expected True, False, 'longest', 'max_length' or 'do_not_pad'.")
        limit = kwargs.get("max_length") or self.tokenizer.model_max_length if padding == "max_length" else 0
        if padding == "do_not_pad" or limit > 1e9 or not rows["input_ids"]:  # no limit, no padding: as tokenizers do
            return
        side = kwargs.get("padding_side") or self.tokenizer.padding_side
        if side not in ("left", "right"):
            raise ValueError(f"padding_side is {side!r}. Expected 'left' or 'right'.")
        length = math.ceil(max(limit, *map(len, rows["input_ids"])) / multiple) * multiple
        missing = [length - len(ids) for ids in rows["input_ids"]]
        if any(missing) and self.tokenizer.pad_token_id is None:
            raise ValueError("The tokenizer has no pad token. Set one: tokenizer.pad_token = tokenizer.eos_token.")
        fills = {"input_ids": self.tokenizer.pad_token_id, "special_tokens_mask": 1, "offset_mapping": (0, 0)}
        for key, values in rows.items():
            added = [[fills.get(key, 0)] * n for n in missing]
            rows[key] = [fill + row if side == "left" else row + fill for row, fill in zip(values, added)]

    def apply_chat_template(self, conversation, chat_template=None, images=None, visual_states=None, **kwargs):
        """Renders conversations: to text, with `tokenize=True` to `input_ids`, with `return_dict=True` too to a whole batch.

        Args:
            conversation: messages, or a list of such lists. Content is a string or parts: `{"type": "text", "text": ...}`,
                `{"type": "image", ...}` with the image as `"image"`, `"url"`, `"path"` or `"base64"`, or `"image_url"` parts.
            chat_template: Jinja source, or the name of one of the processor's templates.
            images, visual_states: one of them, as in `__call__`, for image tokens in strings and image parts without data.
            kwargs: `return_assistant_tokens_mask` (makes `assistant_masks`; fast tokenizers only); arguments of `__call__`,
                flat or in `processor_kwargs`; `add_generation_prompt`, `continue_final_message`; the template's variables."""
        call = pop_call_arguments(kwargs)
        images, visual_states = call.pop("images", images), call.pop("visual_states", visual_states)
        tokenize, return_dict = kwargs.pop("tokenize", False), kwargs.pop("return_dict", False)
        wants_masks = kwargs.get("return_assistant_tokens_mask", False)
        if kwargs.get("continue_final_message") and (kwargs.get("add_generation_prompt") or wants_masks):
            raise ValueError("continue_final_message excludes add_generation_prompt and return_assistant_tokens_mask.")
        if wants_masks and not self.tokenizer.is_fast:
            raise ValueError("return_assistant_tokens_mask=True needs a fast tokenizer: slow ones give no offsets.")
        is_batch = isinstance(conversation, (list, tuple)) and not isinstance((*conversation, {})[0], dict)
        template = self._template(chat_template)
        conversations = [_readable(chat, template) for chat in (conversation if is_batch else [conversation])]
        render = needed("Chat templates", "transformers.utils.chat_template_utils", "render_jinja_template")
        if wants_masks and not re.search(r"{%[-+]?\s*generation\b", template):
            fix = "Put {% generation %} and {% endgeneration %} around them, or pass one of saisa_hf.chat.templates."
            raise ValueError(f"return_assistant_tokens_mask=True: chat_template marks no words of the assistant. {fix}")
        variables = {"chat_template": template, **self.tokenizer.special_tokens_map, **kwargs}
        prompts, spans = render(conversations=conversations, **variables)
        if not tokenize:
            return prompts if is_batch else prompts[0]
        images = self._chat_images(conversations, images, visual_states)
        if visual_states is None and images:  # each chat has its own: one of several may have no tiles
            mark = re.escape(self.image_token) + (f"|{VIDEO}" if any(map(is_video, images)) else "")
            counts, rest = [len(re.findall(mark, prompt)) for prompt in prompts], iter(images)
            if sum(counts) == len(images):
                images = [[next(rest) for _ in range(count)] for count in counts]
        if begins_with_bos(self.tokenizer, prompts[0]):
            call.setdefault("add_special_tokens", False)
        if wants_masks:
            call["return_offsets_mapping"] = True
        outputs = self(text=prompts, images=images, visual_states=visual_states, **call)
        if wants_masks:
            offsets = outputs.pop("offset_mapping")
            rows = zip(offsets.tolist() if hasattr(offsets, "tolist") else offsets, spans)
            masks = [[int(any(a < end and b > start for start, end in said)) for a, b in row] for row, said in rows]
            outputs["assistant_masks"] = masks
            outputs.convert_to_tensors(tensor_type=call.get("return_tensors"))
        return outputs if return_dict else outputs["input_ids"]

    def _template(self, chosen: str | None) -> str:
        """The Jinja source that `chosen` (source, name or None) stands for."""
        templates = self.chat_template
        template = templates.get(chosen or "default", chosen) if isinstance(templates, dict) else chosen or templates
        if template is None:
            raise ValueError(f"No default chat_template: {list(templates or ())}. Pass one of saisa_hf.chat.templates.")
        return template

    def _chat_images(self, conversations: list[list[dict]], images, visual_states) -> list | None:
        """The images and videos of `conversations`, in order, `images` in place of those without data; None if there are
        none."""
        found = []  # None where there is no data
        for content in (message.get("content") or [] for messages in conversations for message in messages):
            for part in [{"text": content}] if isinstance(content, str) else content:
                if part.get("type") in ("image", "video"):
                    found.append(next((part[key] for key in SOURCES if part.get(key) is not None), None))
                else:
                    found += [None] * str(part.get("text") or "").count(self.image_token)
        if visual_states is not None:
            if any(image is not None for image in found):
                raise ValueError("The conversation and `visual_states` both bring images. Leave out the parts' data.")
            return images
        groups = [] if images is None else images if isinstance(images, (list, tuple)) else [images]
        spares = [image for group in groups for image in (group if isinstance(group, (list, tuple)) else [group])]
        missing = sum(image is None for image in found)
        if missing != len(spares):
            raise ValueError(f"Images without data in the chat: {missing}. Pass as many `images`, not {len(spares)}.")
        remaining = iter(spares)
        return [next(remaining) if image is None else image for image in found] or None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """transformers' own. Raises ValueError if saving into the folder was interrupted."""
        check_finished(pretrained_model_name_or_path, PROCESSOR_ENTRIES, kwargs.get("subfolder"))
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def from_args_and_dict(cls, args, processor_dict, **kwargs):
        """transformers' own; if `kwargs` ask for another reduction, the number of placeholders follows."""
        settings = ("visual_token_reduction", "reduced_visual_tokens")
        if any(kwargs[name] != processor_dict.get(name) for name in settings if name in kwargs):
            processor_dict = {**processor_dict, "image_seq_length": None}
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor"):
        """Does nothing: `save_pretrained` writes what `AutoProcessor` needs to find this class."""

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Writes a folder from which transformers 4.57 and 5.x load the same processor, with or without this package; all
        files come into it together. Returns them, `processor_config.json` first, without the code. `kwargs`: `repo_id`
        (default: the folder's name) and others of `push_to_hub`; `save_jinja_files`, for transformers 4."""
        target = Path(save_directory)
        with saved_together(target) as new:
            tokenizer = self.tokenizer
            super().save_pretrained(new, **{key: kwargs[key] for key in ("save_jinja_files",) if key in kwargs})
            self.image_processor.save_pretrained(new)
            vocabulary = str(getattr(tokenizer, "vocab_file", None))
            if vocabulary.endswith(".model") and Path(vocabulary).is_file():
                (new / "tokenizer.model").write_bytes(Path(vocabulary).read_bytes())
            prefix, suffix = self._special_ids()
            ends = tokenizer.bos_token_id in prefix, tokenizer.eos_token_id in suffix
            _rewrite_json(new / "tokenizer_config.json", lambda old: portable_tokenizer_config(old, tokenizer, *ends))
            _rewrite_json(new / "preprocessor_config.json", portable_image_processor_config)
            settings = {name: getattr(self, name) for name in SETTINGS}
            settings |= {} if self.video_settings is None else {"video_settings": self.video_settings}
            settings |= {"auto_map": PROCESSOR_AUTO_MAP, "processor_class": "SaisaProcessor"}
            _rewrite_json(new / "processor_config.json", lambda old: settings)
            files = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
            write_code_files(new)
        if push_to_hub:
            hub = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
            options = {key: kwargs[key] for key in hub if key in kwargs}
            self.push_to_hub(kwargs.get("repo_id") or target.resolve().name, **options)
        files.sort(key=lambda path: (path.name != "processor_config.json", path))
        return [str(target / path) for path in files]


def _rewrite_json(path: Path, change) -> None:
    config = change(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def unread_media(given: dict, keys: tuple[str, ...] = MEDIA) -> str | None:
    """The first of `keys` that is `given`. Data sets and generic callers bring None and empty lists for what is not there."""
    values = ((key, given.get(key)) for key in keys)
    return next((k for k, x in values if x is not None and not (hasattr(x, "__len__") and len(x) == 0)), None)


def _refuse_media(given: dict, name: str, keys: tuple[str, ...] = MEDIA) -> None:
    """Raises ValueError if one of `keys` is `given`, as it would vanish."""
    if key := unread_media(given, keys):
        raise ValueError(f"{name} has {key}={given[key]!r:.80}, which is not read: SAISA takes text, images, videos.")


def _checked_texts(images, text, visual_states, videos) -> list[str] | None:
    """The texts of a call as a list, None if it has none; raises ValueError if its inputs do not fit together."""
    if text is None and visual_states is not None:
        raise ValueError("`visual_states` was given without `text`. Pass the text whose image tokens it stands for.")
    if images is None and text is None and not videos:
        raise ValueError("Both `images` and `text` are None. Pass at least one of them.")
    if (images is not None or videos) and visual_states is not None:
        raise ValueError("`images` and `visual_states` were both given for the same image tokens. Pass one of them.")
    if text is None:
        return None
    texts = [text] if isinstance(text, str) else text
    if not (isinstance(texts, (list, tuple)) and texts and all(isinstance(one, str) for one in texts)):
        raise ValueError(f"`text` is {text!r:.80}. Expected a string or a list of strings, at least one.")
    for index, one in enumerate(texts):
        if not one.isascii() and (half := re.search("[\ud800-\udfff]", one)):
            raise ValueError(f"text {index} has half a character, {half[0]!r} at {half.start()}: a lone surrogate.")
    return list(texts)


def _image_list(images) -> list:
    """No image, one, a list of them or a 4-D array as a list."""
    many = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
    return list(images) if many else [] if images is None else [images]


def pop_call_arguments(kwargs: dict) -> dict:
    """Takes the arguments of the call out of those of `apply_chat_template`."""
    call = dict(kwargs.pop("processor_kwargs", None) or {})
    kwargs.pop("load_audio_from_video", None)
    if kwargs.pop("sanitize_control_tokens", False):
        raise ValueError("sanitize_control_tokens=True is not supported.")
    names = {"return_tensors", "text_kwargs", "images_kwargs", "videos_kwargs", "common_kwargs", *SAMPLING, *MEDIA}
    names |= call_arguments("text_kwargs") | call_arguments("images_kwargs") | {"return_mm_token_type_ids"}
    call |= {name: kwargs.pop(name) for name in list(kwargs) if name in names}
    if call.get("return_tensors") == "auto":
        del call["return_tensors"]
    return call


def _readable(chat, template: str) -> list[dict]:
    """A copy of `chat` without empty keys, whose parts are dicts. Raises ValueError naming what the model would not see."""
    if not isinstance(chat, (list, tuple)) or not chat:
        raise ValueError(f"{chat!r:.80} is no chat. Expected a list of messages, or a list of such lists.")
    messages = []
    for i, message in enumerate(chat):
        content = message.get("content") if isinstance(message, dict) and isinstance(message.get("role"), str) else 0
        if isinstance(content, (list, tuple)):
            content = [_part(part, template, f"part {n} of message {i}") for n, part in enumerate(content)]
        elif content is not None and not isinstance(content, str):
            what = "a dict with 'role', a string, and 'content', a string or a list of parts"
            raise ValueError(f"message {i} is {message!r:.80}. Expected {what}.")
        _refuse_media(message, f"message {i}")
        messages.append({key: value for key, value in {**message, "content": content}.items() if value is not None})
    return messages


def _part(part, template: str, name: str) -> dict:
    """A part of a message as a dict of type `"text"` or `"image"`, or of another that the chat `template` knows. A video has
    a `Video` for its data, and is an image to a template that knows no videos."""
    part = {"type": "text", "text": part} if isinstance(part, str) else part
    kind = part.get("type", "text") if isinstance(part, dict) else None
    media = "image" if kind in ("image", "image_url") else "video" if kind in ("video", "video_url") else None
    is_other = media is None and re.search("audio|video|file", str(kind)) is not None
    if isinstance(part, dict) and not is_other:
        _refuse_media(part, name, tuple(key for key in MEDIA if key not in (media, f"{media}_url")))
    if kind == f"{media}_url":
        url = part.get(kind)
        part = {"type": media, "url": url.get("url") if isinstance(url, dict) else url or ""}
    if media is not None:
        wrong = [key for key in ("url", "path", "base64") if not isinstance(part.get(key), (str, Path, type(None)))]
        if wrong or (kind == f"{media}_url" and not part["url"]):
            raise ValueError(f"{name}, of type {media!r}, has no address as a string, but {part!r:.120}.")
        source = next((part[key] for key in SOURCES if part.get(key) is not None), None)
        if media == "video" and source is None:
            raise ValueError(f"{name}, a video, has no data. Put it under 'video', 'url', 'path' or 'base64'.")
        if media == "video":
            part = {"type": media if re.search("[\"']video[\"']", template) else "image", "video": Video(source)}
        return part
    is_known = kind != "text" and f"'{kind}'" in template  # which has 'text' for the text of a part, too
    if is_other or not isinstance(part, dict) or not (isinstance(part.get("text"), str) or is_known):
        forms = "a string, or a dict whose 'type' is 'text', 'image', 'image_url', 'video' or 'video_url'"
        raise ValueError(f"{name} is {part!r:.80}. SAISA takes text, images and videos. Expected {forms}.")
    return part
