# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""From texts and pictures to what SAISA's forward takes: token ids with a placeholder per visual token, and pixels."""

import json
import math
import os
import re
import tempfile
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch
from transformers import BatchFeature

from .checkpoint_saisa import PROCESSOR_AUTO_MAP, write_code_files
from .compat_saisa import (
    CallArguments,
    ImageTextProcessorMixin,
    call_arguments,
    needed,
    pillow_image_processor,
    portable_image_processor_config,
    portable_tokenizer_config,
    sorted_arguments,
)
from .images_saisa import check_size, load_image, pad_to_square
from .vision_saisa import check_choice, reduced_length


if TYPE_CHECKING:  # 4.57's loader of remote code takes along only the files that this one names
    from .attention_saisa import Visibility  # noqa: F401
    from .configuration_saisa import SaisaConfig  # noqa: F401
    from .embedding_space_saisa import ThroughEveryLayer  # noqa: F401
    from .hardware_saisa import check_device_map  # noqa: F401
    from .head_saisa import chunked_cross_entropy  # noqa: F401
    from .language_models_saisa import language_model_family  # noqa: F401
    from .modeling_saisa import SaisaModel  # noqa: F401
    from .token_layout_saisa import TokenLayout  # noqa: F401
    from .visual_states_saisa import SaisaVisualStates  # noqa: F401


def add_image_token(tokenizer, image_token: str = "<image>") -> int:
    """Makes `image_token` one token of `tokenizer`, in place, and returns its id.

    It is a special token (decoding with `skip_special_tokens` drops it) that leaves the text and the spaces around it as
    they are. A tokenizer that has the token keeps it. The id may be the old vocabulary size: the model's embeddings have
    to have that many rows.
    """
    token_class = needed("Adding an image token", "transformers", "AddedToken")
    token = token_class(image_token, normalized=False, lstrip=False, rstrip=False, special=True)
    tokenizer.add_tokens([token], special_tokens=True)
    return tokenizer.convert_tokens_to_ids(image_token)


def prepare_padding(tokenizer) -> None:
    """Makes `tokenizer`, in place, pad on the left with a token that it has, and forget where it came from."""
    tokenizer.name_or_path = ""
    tokenizer.padding_side = tokenizer.init_kwargs["padding_side"] = "left"  # the latter is what is saved
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token


def begins_with_bos(tokenizer, text: str) -> bool:
    """Whether a rendered conversation brings the BOS token, so that the tokenizer must not add another."""
    return tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)


class BatchWithVisualStates(BatchFeature):
    """A `BatchFeature` with `visual_states`: left alone where lists become tensors, moved and cast along with the tensors."""

    def convert_to_tensors(self, *args, **kwargs):
        """See `BatchFeature.convert_to_tensors`."""
        states = self.data.pop("visual_states")
        super().convert_to_tensors(*args, **kwargs)
        self.data["visual_states"] = states
        return self

    def to(self, *args, **kwargs):
        """See `BatchFeature.to`."""
        super().to(*args, **kwargs)
        self.data["visual_states"] = self.data["visual_states"].to(*args, **kwargs)
        return self


class SaisaProcessor(ImageTextProcessorMixin):
    """An image processor and a tokenizer in one, with `LlavaProcessor`'s arguments and their meaning there.

    Args:
        image_processor: any image processor of transformers that makes one (C, H, W) array per picture.
        tokenizer: any tokenizer of transformers that knows `image_token`; see `add_image_token`.
        patch_size: pixels along the side of the vision encoder's patches (CLIP ViT-L/14: 14).
        vision_feature_select_strategy: `"default"` drops the class token where there is one, `"full"` keeps it.
        num_additional_image_tokens: tokens of the encoder that are no patches (CLIP: 1, its class token; SigLIP: 0).
        image_token: stands for one picture in texts.
        image_seq_length: placeholders per picture, for encoders whose count is not (size / patch)^2. Where given, the
            three arguments about patches are not used.
        chat_template: Jinja source, or a dict of several by name.
        pad_to_square: pad pictures to squares of the image processor's mean colour first, as LLaVA-1.5's checkpoints ask
            for with `image_aspect_ratio: "pad"`.
        tokenize_whole: tokenize each text in one go, image tokens included, as `LlavaProcessor` does; not in pieces.
        visual_token_reduction, reduced_visual_tokens: as in the model's `SaisaConfig`.

    Raises:
        ValueError: the tokenizer does not know `image_token`, or an argument has an unknown value.
    """

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
    ):
        if vision_feature_select_strategy not in (None, "default", "full"):
            raise ValueError(
                f"vision_feature_select_strategy is {vision_feature_select_strategy!r}. Expected 'default' or 'full'."
            )
        for key, value in {"patch_size": patch_size, "image_seq_length": image_seq_length}.items():
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{key} is {value!r}. Expected a positive int, or None.")
        check_choice(visual_token_reduction, reduced_visual_tokens, image_seq_length)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        self.patch_size = patch_size
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.num_additional_image_tokens = num_additional_image_tokens
        self.image_token = getattr(tokenizer, "image_token", None) or image_token
        self.image_seq_length = image_seq_length
        self.pad_to_square = pad_to_square
        self.tokenize_whole = tokenize_whole
        self.visual_token_reduction = visual_token_reduction
        self.reduced_visual_tokens = reduced_visual_tokens
        if self.image_token not in tokenizer.get_vocab():
            raise ValueError(
                f"The tokenizer does not know image_token {self.image_token!r}. Add it first: "
                f"`saisa_hf.processing_saisa.add_image_token(tokenizer)`, which is tokenizer.add_tokens([AddedToken("
                f"{self.image_token!r}, special=True, normalized=False)], special_tokens=True), or name the token it has."
            )
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)

    @property
    def model_input_names(self) -> list[str]:
        """What this processor makes for the model."""
        return ["input_ids", "attention_mask", "pixel_values"]

    # --- call ---

    def __call__(self, images=None, text=None, *, visual_states=None, **kwargs: CallArguments) -> BatchFeature:
        """Prepares texts, pictures or both.

        Texts are tokenized in pieces, the stretches between pictures, each as if it stood alone. This is how the authors
        trained: with sentencepiece models, the text behind a picture begins with a space of its own. (`tokenize_whole` is
        for models that were trained otherwise.)

        Args:
            images: one picture, a list of them in the order of the texts' image tokens, or a list of such lists, one per
                text. Pictures are what `load_image` takes.
            text: a text or a list of them. Each `image_token` in them stands for one picture.
            visual_states: in place of `images`, what the model's `get_visual_states` made of them: `SaisaVisualStates` of as
                many pictures as the texts have image tokens, in their order.
            kwargs: as for a tokenizer (`padding`, `truncation`, `max_length`, `padding_side`, `pad_to_multiple_of`,
                `add_special_tokens`, `return_attention_mask`, `return_offsets_mapping`, `return_length`,
                `return_special_tokens_mask`, `return_token_type_ids`), as for the image processor, `return_tensors`, and
                `return_mm_token_type_ids`; flat, or in dicts `text_kwargs` and `images_kwargs`. Offsets count in the text
                as given; a placeholder's are those of its image token.

        Returns:
            `input_ids` and `attention_mask` (B, S) where there is text, `pixel_values` (pictures, C, H, W) in the order of
            the image tokens where there are pictures, `visual_states` as given: all that the model's forward and generate
            need.

        Raises:
            ValueError: a picture is unreadable, too large or empty, pictures and image tokens do not match, truncation
                would cut into a picture's placeholders, or an argument is not supported.
        """
        if text is None and visual_states is not None:
            raise ValueError(
                "`visual_states` was given without `text`. Pass the text whose image tokens it stands for."
            )
        if images is None and text is None:
            raise ValueError("Both `images` and `text` are None. Pass at least one of them.")
        if images is not None and visual_states is not None:
            raise ValueError(
                "`images` and `visual_states` were both given for the same image tokens. Pass one of them."
            )
        if any(kwargs.pop(name, None) is not None for name in ("audio", "videos")):
            raise ValueError("SAISA takes texts and pictures: `audio` and `videos` have to be None.")
        wants_types = kwargs.pop("return_mm_token_type_ids", False)
        if "text_kwargs" in kwargs:
            kwargs["text_kwargs"] = dict(kwargs["text_kwargs"])
            wants_types = kwargs["text_kwargs"].pop("return_mm_token_type_ids", wants_types)
        if "images_kwargs" in kwargs:
            kwargs["images_kwargs"] = dict(kwargs["images_kwargs"])
        explicit = {**kwargs, **kwargs.get("text_kwargs", {})}  # 4.57 takes what it merges out of the dicts
        merged = sorted_arguments(self, kwargs, tokenizer_init_kwargs=self.tokenizer.init_kwargs)
        text_kwargs, images_kwargs = merged["text_kwargs"], merged["images_kwargs"]
        text_kwargs.pop("return_mm_token_type_ids", None)
        asked = {"max_length", "truncation", "padding"} & explicit.keys()
        if not asked and text_kwargs.get("padding") != "max_length":
            text_kwargs.pop("max_length", None)  # what tokenizer.json was saved with is not a wish of this call
        return_tensors = text_kwargs.pop("return_tensors", None) or images_kwargs.get("return_tensors")

        texts = [text] if isinstance(text, str) else text
        if texts is not None and not (isinstance(texts, (list, tuple)) and all(isinstance(t, str) for t in texts)):
            raise ValueError(f"`text` has to be a string or a list of strings, got {_describe(text)}.")
        for index, one in enumerate(texts or ()):
            if not one.isascii() and (half := re.search("[\ud800-\udfff]", one)):
                raise ValueError(
                    f"text {index} has half a character in it, {half[0]!r} at {half.start()}: a lone surrogate."
                )
        outputs, counts = {}, []
        if visual_states is not None:
            outputs, counts = {"visual_states": visual_states}, _lengths(visual_states, texts, self.image_token)
        elif pictures := _flat_pictures(images, texts, self.image_token):
            outputs = self._pixels(pictures, images_kwargs)
            counts = self._counts(outputs) if texts is not None else []
        if texts is not None:
            rows = self._tokenize(list(texts), counts, text_kwargs)
            if wants_types:
                is_visual = [[int(i == self.image_token_id) for i in ids] for ids in rows["input_ids"]]
                rows["mm_token_type_ids"] = is_visual
            outputs = {**rows, **outputs}
        batch_class = BatchFeature if visual_states is None else BatchWithVisualStates
        return batch_class(outputs, tensor_type=return_tensors)

    def _pixels(self, pictures: list, kwargs: dict) -> dict:
        """The image processor's output for `pictures`."""
        kwargs = dict(kwargs)
        data_format, timeout = kwargs.pop("input_data_format", None), kwargs.pop("timeout", None)
        loaded = [
            load_image(picture, f"picture {i} of {len(pictures)}{_source(picture)}", data_format, timeout)
            for i, picture in enumerate(pictures)
        ]
        rescale = kwargs.get("do_rescale")
        rescale = getattr(self.image_processor, "do_rescale", True) if rescale is None else rescale
        if not rescale and all(_is_fraction_array(picture) for picture in pictures):
            kwargs["do_rescale"] = True  # it was said of arrays in [0, 1], which are 8-bit pictures by now
        mean = kwargs.get("image_mean") or getattr(self.image_processor, "image_mean", None)
        if self.pad_to_square and mean is None:
            raise ValueError("pad_to_square needs the mean colour, but the image processor has no `image_mean`.")
        for i, picture in enumerate(loaded):
            name = f"picture {i} of {len(pictures)}"
            if self.pad_to_square:
                check_size(max(picture.size), max(picture.size), f"{name} padded to a square")
                color = tuple(int(channel * 255) for channel in np.broadcast_to(mean, 3))
                loaded[i] = pad_to_square(picture, color)
            else:
                check_size(*self._resized(picture.size, kwargs), f"{name} resized")
        image_processor = self.image_processor
        if kwargs.get("device") is None:
            image_processor = pillow_image_processor(image_processor)
            kwargs.pop("disable_grouping", None)
        if not type(image_processor).__name__.endswith("Fast"):  # 4.57's torchvision processors would take it amiss
            kwargs["input_data_format"] = "channels_last"
        return dict(image_processor(loaded, **kwargs))

    def _counts(self, processed: dict) -> list[int]:
        """The number of placeholders that each picture of the image processor's output takes."""
        if "spatial_shapes" in processed:  # SigLIP 2 in native aspect ratio: rows and columns of patches, by picture
            return [
                self._reduced(rows * columns, (rows, columns))
                for rows, columns in map(_pair, processed["spatial_shapes"])
            ]
        pixel_values = processed["pixel_values"]
        if self.image_seq_length is not None:
            return [self.image_seq_length] * len(pixel_values)
        shapes = [np.shape(p) for p in pixel_values]
        # told by the shape: some releases' image processors overlook `data_format`
        return [self._placeholders(*(shape[:2] if shape[0] != 3 == shape[-1] else shape[-2:])) for shape in shapes]

    def _resized(self, size: tuple[int, int], kwargs: dict) -> tuple[int, int]:
        """(width, height) after resizing by the shortest edge, which makes a thin picture very long."""
        edge = kwargs.get("size") or getattr(self.image_processor, "size", None)
        if edge is not None and not isinstance(edge, int):
            edge = None if edge.get("longest_edge") else edge.get("shortest_edge")
        if not edge or not kwargs.get("do_resize", getattr(self.image_processor, "do_resize", False)):
            return size
        scale = edge / min(size)
        return math.ceil(size[0] * scale), math.ceil(size[1] * scale)

    def _placeholders(self, height: int, width: int) -> int:
        """The number of visual tokens of a picture of `height` x `width` processed pixels."""
        if self.patch_size is None:
            raise ValueError(
                "Neither `patch_size` nor `image_seq_length` is set: the processor cannot tell how many "
                "tokens a picture takes. Set one of them."
            )
        rows, columns = height // self.patch_size, width // self.patch_size
        count = rows * columns + self.num_additional_image_tokens
        if self.vision_feature_select_strategy == "default" and self.num_additional_image_tokens > 0:
            count -= 1  # the class token, where the encoder has one
        if count < 1:
            raise ValueError(
                f"A processed picture of {height} x {width} pixels has {count} visual tokens: check patch_size="
                f"{self.patch_size}, num_additional_image_tokens={self.num_additional_image_tokens} and "
                f"vision_feature_select_strategy={self.vision_feature_select_strategy!r}."
            )
        return self._reduced(count, (rows, columns))

    def _reduced(self, tokens: int, grid: tuple[int, int]) -> int:
        return reduced_length(self.visual_token_reduction, self.reduced_visual_tokens, tokens, grid)

    def _get_num_multimodal_tokens(self, image_sizes=None, **kwargs):
        """Placeholders per picture for pictures of (height, width) `image_sizes`, as serving engines ask for them."""
        data_class = needed("Numbers of placeholders, told by sizes", "transformers.processing_utils", "MultiModalData")
        if image_sizes is None:
            return data_class()
        images_kwargs = sorted_arguments(self, kwargs)["images_kwargs"]
        counts = {
            size: self._counts(self._pixels([PIL.Image.new("RGB", size[::-1])], images_kwargs))[0]
            for size in {(int(height), int(width)) for height, width in image_sizes}
        }
        counts = [counts[int(height), int(width)] for height, width in image_sizes]
        return data_class(num_image_tokens=counts, num_image_patches=[1] * len(counts))

    # --- text ---

    def _tokenize(self, texts: list[str], counts: list[int], kwargs: dict) -> dict[str, list[list]]:
        """Token ids and what belongs to them, one row per text, with `counts` placeholders for the texts' pictures."""
        unsupported = (
            "text_pair",
            "text_target",
            "text_pair_target",
            "return_overflowing_tokens",
            "is_split_into_words",
        )
        for key in unsupported:
            if kwargs.get(key):
                raise ValueError(f"{key}={kwargs[key]!r} is not supported: texts are tokenized around their pictures.")
        prefix, suffix = self._special_ids() if kwargs.get("add_special_tokens", True) else ([], [])
        wants_offsets = bool(kwargs.get("return_offsets_mapping"))
        rows = {"input_ids": [], "attention_mask": []}
        rows.update({"special_tokens_mask": []} if kwargs.get("return_special_tokens_mask") else {})
        rows.update({"offset_mapping": []} if wants_offsets else {})
        rows.update({"token_type_ids": []} if kwargs.get("return_token_type_ids") else {})
        counts = iter(counts)
        for index, (ids, offsets, blocks) in enumerate(self._pieces(texts, counts, wants_offsets)):
            ids, offsets = self._truncate(index, ids, offsets, blocks, len(prefix) + len(suffix), kwargs)
            rows["input_ids"].append([*prefix, *ids, *suffix])
            rows["attention_mask"].append([1] * len(rows["input_ids"][-1]))
            if "special_tokens_mask" in rows:
                rows["special_tokens_mask"].append([1] * len(prefix) + [0] * len(ids) + [1] * len(suffix))
            if wants_offsets:
                rows["offset_mapping"].append([(0, 0)] * len(prefix) + offsets + [(0, 0)] * len(suffix))
            if "token_type_ids" in rows:
                rows["token_type_ids"].append([0] * len(rows["input_ids"][-1]))
        self._pad(rows, kwargs)
        if kwargs.get("return_length"):
            rows["length"] = [len(ids) for ids in rows["input_ids"]]
        if kwargs.get("return_attention_mask") is False:
            del rows["attention_mask"]
        return rows

    def _special_ids(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts in front of a text and behind it."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a")["input_ids"]
        start = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
        return full[:start], full[start + len(bare) :]

    def _pieces(self, texts: list[str], counts, wants_offsets: bool):
        """Yields (ids, offsets, blocks) per text; blocks are the [start, end) of each picture's placeholders in ids.

        Llama's sentencepiece model puts a space in front of every text, also of one that begins with a space (or with
        U+2581, which stands for one in its vocabulary). The `tokenizers` form of it does not, in transformers 5 always and
        in 4 with `legacy=False`. Where that is so, such pieces get a second space. With `legacy=True` the same goes for what
        follows a special token.
        """
        encode = self.tokenizer
        options = {"return_offsets_mapping": True} if wants_offsets else {}
        options |= {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        if self.tokenize_whole:
            encoded = encode(texts, **options) if texts else {"input_ids": []}
            for number, whole in enumerate(encoded["input_ids"]):
                repeats = [next(counts) if i == self.image_token_id else 1 for i in whole]
                ends = list(accumulate(repeats))
                blocks = [(end - n, end) for i, n, end in zip(whole, repeats, ends) if i == self.image_token_id]
                pairs = encoded["offset_mapping"][number] if wants_offsets else []
                yield (
                    [i for i, n in zip(whole, repeats) for _ in range(n)],
                    [tuple(pair) for pair, n in zip(pairs, repeats) for _ in range(n)],
                    blocks,
                )
            return
        legacy = getattr(encode, "legacy", None)
        swallows = legacy is not None and encode(" a", add_special_tokens=False) == encode(
            "a", add_special_tokens=False
        )
        specials = {self.image_token}
        if swallows and legacy:
            specials |= {t.content for t in encode.added_tokens_decoder.values() if not (t.lstrip or t.rstrip)}
        splitter = re.compile("|".join(re.escape(token) for token in sorted(specials, key=len, reverse=True)))

        plan, strings = [], []  # per text: (start, end) of a special token, or (start, index into strings, extra space)
        for text in texts:
            steps, last = [], 0
            for start, end in [*(match.span() for match in splitter.finditer(text)), (len(text), len(text))]:
                piece = text[last:start]
                if piece:
                    extra = int(swallows and piece[0] in " \u2581")
                    steps.append((last, len(strings), extra))
                    strings.append(" " * extra + piece)
                if end > start:
                    steps.append((start, end))
                last = end
            plan.append(steps)
        encoded = encode(strings, **options) if strings else {}
        for text, steps in zip(texts, plan):
            ids, offsets, blocks = [], [], []
            for step in steps:
                if len(step) == 3:
                    start, number, extra = step
                    ids += encoded["input_ids"][number]
                    if wants_offsets:
                        pairs = encoded["offset_mapping"][number]
                        offsets += [(start + max(a - extra, 0), start + max(b - extra, 0)) for a, b in pairs]
                    continue
                token = text[step[0] : step[1]]
                repeat = next(counts) if token == self.image_token else 1
                if token == self.image_token:
                    blocks.append((len(ids), len(ids) + repeat))
                ids += [encode.convert_tokens_to_ids(token)] * repeat
                offsets += [step] * repeat
            yield ids, offsets, blocks

    def _truncate(self, index: int, ids: list, offsets: list, blocks: list, n_special: int, kwargs: dict):
        """`ids` and `offsets` cut to what `truncation` and `max_length` leave; never inside a picture."""
        truncation, limit = kwargs.get("truncation"), kwargs.get("max_length")
        if truncation is None and limit is not None and not kwargs.get("padding"):
            truncation = True  # as tokenizers do it
        if not truncation or truncation == "do_not_truncate":
            return ids, offsets
        if limit is None:
            limit = self.tokenizer.model_max_length
        keep = max(int(min(limit, 1e9)) - n_special, 0)
        if len(ids) <= keep:
            return ids, offsets
        left = self.tokenizer.truncation_side == "left"
        start, end = (len(ids) - keep, len(ids)) if left else (0, keep)
        for number, (first, last) in enumerate(blocks):
            if first < start or last > end:
                needed = (len(ids) - first if left else last) + n_special
                raise ValueError(
                    f"Truncation to max_length={limit} cuts into the {last - first} placeholders of picture {number} of "
                    f"text {index}, which has {len(ids) + n_special} tokens. Set max_length to {needed} or more, or "
                    "truncation=False, or shorten the text."
                )
        return ids[start:end], offsets[start:end]

    def _pad(self, rows: dict, kwargs: dict) -> None:
        """Pads `rows` in place, as `padding`, `max_length`, `padding_side` and `pad_to_multiple_of` ask for."""
        padding, multiple = kwargs.get("padding") or False, kwargs.get("pad_to_multiple_of")
        if padding is False or padding == "do_not_pad" or not rows["input_ids"]:
            return
        if padding not in (True, "longest", "max_length"):
            raise ValueError(f"padding is {padding!r}. Expected True, False, 'longest', 'max_length' or 'do_not_pad'.")
        length = max(map(len, rows["input_ids"]))
        if padding == "max_length":
            limit = kwargs.get("max_length") or self.tokenizer.model_max_length
            if limit > 1e9:  # as tokenizers do it where there is no limit
                return
            length = max(length, limit)
        length = math.ceil(length / multiple) * multiple if multiple else length
        side = kwargs.get("padding_side") or self.tokenizer.padding_side
        if side not in ("left", "right"):
            raise ValueError(f"padding_side is {side!r}. Expected 'left' or 'right'.")
        missing = [length - len(ids) for ids in rows["input_ids"]]
        if any(missing) and self.tokenizer.pad_token_id is None:
            raise ValueError(
                "Padding needs a pad token and the tokenizer has none. Set one, tokenizer.pad_token = tokenizer.eos_token "
                "for instance."
            )
        fills = {"input_ids": self.tokenizer.pad_token_id, "special_tokens_mask": 1, "offset_mapping": (0, 0)}
        for key, values in rows.items():
            for i, n in enumerate(missing):
                fill = [fills.get(key, 0)] * n
                values[i] = fill + values[i] if side == "left" else values[i] + fill

    # --- chat ---

    def apply_chat_template(self, conversation, chat_template=None, images=None, visual_states=None, **kwargs):
        """Renders conversations and, with `tokenize=True`, prepares text and pictures for the model.

        Args:
            conversation: a list of messages, or a list of such lists. A message's content is a string or a list of parts:
                `{"type": "text", "text": ...}` and `{"type": "image", ...}` with the picture under `"image"`, `"url"`,
                `"path"` or `"base64"`; `"image_url"` parts work too.
            chat_template: Jinja source, or the name of one of the processor's templates; the default one if None.
            images: pictures for what the conversations name without bringing one: image tokens in strings and bare
                `{"type": "image"}` parts, in their order.
            visual_states: in place of `images`, see `__call__`; the conversations then bring no pictures of their own.
            kwargs: `tokenize`, `return_dict`, `add_generation_prompt`, `continue_final_message`,
                `return_assistant_tokens_mask` (fast tokenizers; gives `assistant_masks`), `tools`, `documents`,
                `return_tensors`, arguments of the call (flat or in `processor_kwargs`), and variables of the template.

        Returns:
            The text (a list of them for a list of conversations); with `tokenize=True` its `input_ids`; with
            `return_dict=True` as well, all that calling the processor gives.
        """
        processor_kwargs = {**(kwargs.pop("processor_kwargs", None) or {})}
        images = processor_kwargs.pop("images", images)
        visual_states = processor_kwargs.pop("visual_states", visual_states)
        kwargs.pop("load_audio_from_video", None)
        if kwargs.pop("sanitize_control_tokens", False):
            raise ValueError("sanitize_control_tokens=True is not supported.")
        call_keys = {"return_tensors", "text_kwargs", "images_kwargs", "common_kwargs", "return_mm_token_type_ids"}
        for part in ("text_kwargs", "images_kwargs"):
            call_keys |= call_arguments(part)
        processor_kwargs.update({key: kwargs.pop(key) for key in list(kwargs) if key in call_keys})
        if processor_kwargs.get("return_tensors") == "auto":
            del processor_kwargs["return_tensors"]
        tokenize, return_dict = kwargs.pop("tokenize", False), kwargs.pop("return_dict", False)
        wants_mask = kwargs.get("return_assistant_tokens_mask", False)
        if kwargs.get("continue_final_message") and (kwargs.get("add_generation_prompt") or wants_mask):
            raise ValueError(
                "continue_final_message=True goes neither with add_generation_prompt nor with return_assistant_tokens_mask."
            )
        if wants_mask and not self.tokenizer.is_fast:
            raise ValueError("return_assistant_tokens_mask=True needs a fast tokenizer: a slow one tells no offsets.")

        is_batch = bool(conversation) and not isinstance(conversation[0], dict)
        conversations = [_readable_messages(messages) for messages in (conversation if is_batch else [conversation])]
        render = needed("Chat templates", "transformers.utils.chat_template_utils", "render_jinja_template")
        prompts, spans = render(
            conversations=conversations,
            chat_template=self._template(chat_template),
            **{**self.tokenizer.special_tokens_map, **kwargs},
        )
        if not tokenize:
            return prompts if is_batch else prompts[0]
        found = self._conversation_pictures(conversations)
        if visual_states is None:
            images = _with_spares(found, images, self.image_token) or None
        elif any(picture is not None for picture in found):
            raise ValueError(
                "The conversation brings pictures, but `visual_states` was given for all of them. Leave the data out of the "
                'image parts, {"type": "image"}, or leave out `visual_states`.'
            )
        if begins_with_bos(self.tokenizer, prompts[0]):
            processor_kwargs.setdefault("add_special_tokens", False)
        return_tensors = processor_kwargs.get("return_tensors")
        if wants_mask:
            processor_kwargs.update(return_offsets_mapping=True)
        outputs = self(text=prompts, images=images, visual_states=visual_states, **processor_kwargs)
        if wants_mask:
            offsets = outputs.pop("offset_mapping")
            offsets = offsets.tolist() if hasattr(offsets, "tolist") else offsets
            outputs["assistant_masks"] = [
                [int(any(a < end and b > start for start, end in said)) for a, b in row]
                for row, said in zip(offsets, spans)
            ]
            outputs.convert_to_tensors(tensor_type=return_tensors)
        return outputs if return_dict else outputs["input_ids"]

    def _template(self, chosen: str | None) -> str:
        """The Jinja source that `chosen` (source, name or None) stands for."""
        templates = self.chat_template
        if isinstance(templates, dict):
            if chosen is None and "default" not in templates:
                raise ValueError(
                    f"No chat template is named 'default': pass chat_template=, one of {sorted(templates)}."
                )
            return templates.get(chosen or "default", chosen)
        if chosen is None and templates is None:
            raise ValueError(
                "This processor has no chat template. Give it one, "
                'processor.chat_template = saisa_hf.chat_templates.chat_template("vicuna") for instance.'
            )
        return chosen or templates

    def _conversation_pictures(self, conversations: list) -> list:
        """What `conversations` name in the order of their image tokens: a picture, or None where they bring none."""
        pictures = []
        for message in (message for messages in conversations for message in messages):
            content = message.get("content") or []
            for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
                if part.get("type") == "image":
                    given = [part[key] for key in ("image", "url", "path", "base64") if part.get(key) is not None]
                    pictures.append(given[0] if given else None)
                else:
                    pictures += [None] * str(part.get("text") or "").count(self.image_token)
        return pictures

    # --- files ---

    @classmethod
    def from_args_and_dict(cls, args, processor_dict, **kwargs):
        """transformers' own; where `kwargs` ask for another reduction, the number of placeholders follows."""
        settings = ("visual_token_reduction", "reduced_visual_tokens")
        if any(kwargs[name] != processor_dict.get(name) for name in settings if name in kwargs):
            processor_dict = {**processor_dict, "image_seq_length": None}
        return super().from_args_and_dict(args, processor_dict, **kwargs)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor"):
        """Does nothing: `save_pretrained` writes what `AutoProcessor` needs to find this class."""

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> list[str]:
        """Writes a folder from which transformers 4.57 and 5.x load the same processor, with or without this package.

        Each file is written under another name and renamed: a reader never meets half a file.

        Args:
            save_directory: the folder; made if need be.
            push_to_hub: whether to upload to the hub as well, to `repo_id` (default: the folder's name).
            kwargs: arguments of `push_to_hub`; with transformers 4 also `save_jinja_files=False`, which writes the chat
                template into `chat_template.json`.

        Returns:
            The paths of the files, `processor_config.json` first, the code that loads them left out.
        """
        target = Path(save_directory)
        if target.is_file():
            raise ValueError(f"save_directory {str(target)!r} is a file. Expected a folder.")
        target.mkdir(parents=True, exist_ok=True)
        written = []
        with tempfile.TemporaryDirectory(dir=target, prefix=".processor.") as folder:
            partial = Path(folder)
            super().save_pretrained(
                str(partial), **{key: kwargs[key] for key in ("save_jinja_files",) if key in kwargs}
            )
            self.image_processor.save_pretrained(str(partial))
            vocabulary = getattr(self.tokenizer, "vocab_file", None)
            if vocabulary and str(vocabulary).endswith(".model") and os.path.isfile(vocabulary):
                (partial / "tokenizer.model").write_bytes(Path(vocabulary).read_bytes())
            prefix, suffix = self._special_ids()
            bos, eos = self.tokenizer.bos_token_id in prefix, self.tokenizer.eos_token_id in suffix
            _rewrite_json(
                partial / "tokenizer_config.json", lambda c: portable_tokenizer_config(c, self.tokenizer, bos, eos)
            )
            _rewrite_json(partial / "preprocessor_config.json", portable_image_processor_config)
            _rewrite_json(partial / "processor_config.json", lambda _: self._config())
            files = [path for path in partial.rglob("*") if path.is_file()]
            for source in sorted(files, key=lambda path: (path.name != "processor_config.json", path)):
                destination = target / source.relative_to(partial)
                destination.parent.mkdir(exist_ok=True)
                os.replace(source, destination)
                written.append(str(destination))
        write_code_files(target)
        if push_to_hub:
            hub = ("commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")
            self.push_to_hub(
                kwargs.get("repo_id") or target.resolve().name, **{key: kwargs[key] for key in hub if key in kwargs}
            )
        return written

    def _config(self) -> dict:
        """processor_config.json; the parts are in files of their own, which every release reads."""
        names = ("image_seq_length", "image_token", "num_additional_image_tokens", "pad_to_square", "patch_size")
        names += ("reduced_visual_tokens", "tokenize_whole", "vision_feature_select_strategy", "visual_token_reduction")
        return {
            "auto_map": dict(PROCESSOR_AUTO_MAP),
            "processor_class": "SaisaProcessor",
            **{name: getattr(self, name) for name in names},
        }


def _rewrite_json(path: Path, change) -> None:
    config = change(json.loads(path.read_text(encoding="utf-8")) if path.exists() else {})
    path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _describe(value) -> str:
    if isinstance(value, (list, tuple)):
        return f"a {type(value).__name__} of {sorted({type(item).__name__ for item in value})}"
    return type(value).__name__


def _pair(shape) -> tuple[int, int]:
    rows, columns = shape
    return int(rows), int(columns)


def _source(picture) -> str:
    """Where a picture comes from, for error messages."""
    if isinstance(picture, (str, os.PathLike)):
        name = str(picture)
        return f" ({name if len(name) <= 120 else name[:60] + '...'})"
    return ""


def _is_fraction_array(picture) -> bool:
    if isinstance(picture, torch.Tensor):
        return picture.is_floating_point()
    return isinstance(picture, np.ndarray) and picture.dtype.kind == "f"


def _flat_pictures(images, texts, image_token: str) -> list:
    """`images` as one list in the order of the image tokens of `texts`, whose numbers have to match."""
    needed = None if texts is None else [text.count(image_token) for text in texts]
    if images is None:
        if needed and any(needed):
            index = next(i for i, n in enumerate(needed) if n)
            raise ValueError(
                f"text {index} has {needed[index]} {image_token!r}, but no `images` were given. Pass as many pictures."
            )
        return []
    groups = _picture_list(images)
    if any(isinstance(group, (list, tuple)) for group in groups):
        groups = [[] if group is None else _picture_list(group) for group in groups]
        if needed is not None and len(groups) != len(needed):
            raise ValueError(
                f"`images` is a list of {len(groups)} lists, but there are {len(needed)} texts. Pass one list per text, "
                "or one flat list."
            )
        for index, (group, number) in enumerate(zip(groups, needed or [])):
            if len(group) != number:
                raise ValueError(f"text {index} has {number} {image_token!r}, but {len(group)} pictures in `images`.")
        groups = [picture for group in groups for picture in group]
    elif needed is not None and sum(needed) != len(groups):
        raise ValueError(
            f"`images` has {len(groups)} pictures, but the texts have {sum(needed)} {image_token!r}: {needed}, text by text."
        )
    return groups


def _lengths(visual_states, texts: list[str], image_token: str) -> list[int]:
    """The visual tokens of each picture in `visual_states`, which has to hold as many as `texts` have image tokens."""
    if not hasattr(visual_states, "lengths"):
        raise ValueError(
            f"`visual_states` is {_describe(visual_states)}. Expected one SaisaVisualStates for the whole batch: "
            "model.get_visual_states makes them, SaisaVisualStates.cat([...]) joins several."
        )
    needed = [text.count(image_token) for text in texts]
    if sum(needed) != len(visual_states):
        raise ValueError(
            f"`visual_states` has {len(visual_states)} pictures, but the texts have {sum(needed)} {image_token!r}: {needed}, "
            "text by text. Pass `states.expand(n)` for the same pictures in n texts, or choose with `states[[...]]`."
        )
    return list(visual_states.lengths)


def _with_spares(pictures: list, images, image_token: str) -> list:
    """`pictures` with `images`, one or a list of them or of lists, in the order of the places that hold None."""
    groups = [] if images is None else list(images) if isinstance(images, (list, tuple)) else [images]
    spare = [picture for group in groups for picture in (group if isinstance(group, (list, tuple)) else [group])]
    needed = sum(picture is None for picture in pictures)
    if needed != len(spare):
        raise ValueError(
            f"The conversation names {needed} pictures without bringing them ({image_token!r} in strings, image parts "
            f"without data), but `images` has {len(spare)}."
        )
    spares = iter(spare)
    return [next(spares) if picture is None else picture for picture in pictures]


def _picture_list(images) -> list:
    """One picture, a list of them or a 4-D array as a list."""
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4:
        return list(images)
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _readable_messages(messages: list) -> list[dict]:
    """Copies of `messages` without empty keys, with OpenAI's `image_url` parts as image parts."""
    readable = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None}
        if isinstance(message.get("content"), (list, tuple)):
            parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in message["content"]]
            for i, part in enumerate(parts):
                if part.get("type") == "image_url":
                    address = part["image_url"]
                    parts[i] = {"type": "image", "url": address["url"] if isinstance(address, dict) else address}
            message["content"] = parts
        readable.append(message)
    return readable
