# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Where a model looks while it answers: the attention of each word of an answer to each part of the images.

NAAViT makes this a well-defined question. A visual token is only a key and a value: it is never mixed with others on its way
through the layers, so attention to it is attention to its part of the image, in every layer.

The probabilities are computed beside the model's own attention, from the queries and keys that enter it, for the positions
asked for, a few heads at a time. This works with any attention implementation, and none becomes slower.
"""

from __future__ import annotations

import contextlib
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import PIL.Image
import torch
from transformers import PreTrainedTokenizerBase

from ..chat.conversation import Conversation
from ..vision_saisa import OF_CELLS, grid_of


if TYPE_CHECKING:
    from ..modeling_saisa import SaisaForConditionalGeneration
    from ..processing_saisa import SaisaProcessor


SCORES_AT_ONCE = 2**22  # 16 MiB in float32
WITHOUT_SPACES = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]")  # scripts in which each token counts as a word


@dataclass(frozen=True)
class PictureMaps:
    """The attention to one image.

    Attributes:
        picture: the image: PIL, RGB, upright.
        box: (left, top, right, bottom) of what the grid of visual tokens covers, in pixels of `picture`: less than the whole
            image if the processor crops, more if it pads.
        weights: float32 (layers, words, rows, columns), attention probabilities averaged over heads and over the tokens of
            the word. What is missing from a sum of one went to text and to other images. Zero in layers that do not see
            images.
    """

    picture: PIL.Image.Image
    box: tuple[float, float, float, float]
    weights: np.ndarray


@dataclass(frozen=True)
class AttentionMaps:
    """What `attend` returns.

    Attributes:
        question, answer: what was asked, and the greedy answer.
        words: of the answer.
        positions: for each word the positions at which its tokens were predicted: for a token at position p that is p - 1.
            These are the queries whose attention is averaged.
        seeing: the decoder layers that see images.
        pictures: the attention to each image.
    """

    question: str
    answer: str
    words: list[str]
    positions: list[list[int]]
    seeing: list[int]
    pictures: list[PictureMaps]

    def mean(self, picture: int = 0) -> np.ndarray:
        """float32 (words, rows, columns): the mean over the layers that see images."""
        return self.pictures[picture].weights[self.seeing].mean(0)

    def to_dict(self) -> dict:
        """Everything but the images themselves, as JSON takes it."""
        shown = {name: getattr(self, name) for name in ("question", "answer", "words", "positions", "seeing")}
        shown["pictures"] = [
            {
                "size": list(found.picture.size),
                "box": [round(edge, 3) for edge in found.box],
                "weights": found.weights.astype(float).round(6).tolist(),
                "mean": self.mean(index).astype(float).round(6).tolist(),
            }
            for index, found in enumerate(self.pictures)
        ]
        return shown


@torch.no_grad()
def attend(
    model: SaisaForConditionalGeneration,
    processor: SaisaProcessor,
    images: Any,
    question: str,
    *,
    system: str | None = None,
    max_new_tokens: int = 64,
) -> AttentionMaps:
    """Answers a question by greedy decoding and reports where each word of the answer comes from.

    Args:
        model: a `SaisaForConditionalGeneration` in eval mode, of any dtype and attention implementation.
        processor: its `SaisaProcessor`, with a chat template.
        images: one image or a list of them, as `load_image` takes them; they come before the question.
        question: without image tokens.
        system: the system message, if the template has one.
        max_new_tokens: the longest answer.

    Raises:
        ValueError: the model is not a SAISA; there is no image, or one that cannot be read; the question contains an image
            token; the visual tokens have no places in an image; or the answer has no words.
    """
    images = list(images) if isinstance(images, (list, tuple)) else [images]
    _check(model, images)
    conversation = Conversation(model, processor, system)
    message = conversation.question(question, images)
    inputs = conversation.inputs([*conversation.messages, message])
    if "num_tiles" in inputs:
        alone = "load the model with image_grid_pinpoints=None, and a processor whose images have no tiles"
        raise ValueError(f"The images are read in tiles, which have no one grid over the image: {alone}.")
    prompt = inputs["input_ids"].shape[1]
    ids = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    new_ids = ids[0, prompt:].tolist()
    words = grouped_words(processor.tokenizer, new_ids)
    answer = processor.tokenizer.decode(new_ids, skip_special_tokens=True).strip()
    if not words:
        raise ValueError(f"The answer {answer!r} has no words whose attention could be shown. Ask another question.")
    positions = [[prompt + token - 1 for token in tokens] for _, tokens in words]

    given = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    weights_LWV = _attention_of_words(model, ids, given, positions)
    shown = [part["image"] for part in message["content"] if part["type"] == "image"]
    maps = _maps_by_image(model, processor, shown, weights_LWV, given["pixel_values"])
    seeing = [index for index in range(len(weights_LWV)) if model.config.sees_image(index)]
    return AttentionMaps(question, answer, [text for text, _ in words], positions, seeing, maps)


def _check(model: Any, images: list) -> None:
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind != "saisa" or not hasattr(model, "generate"):
        raise ValueError(f"model is a {kind} ({type(model).__name__}): expected a SaisaForConditionalGeneration.")
    if not images or any(image is None for image in images):
        raise ValueError("images is empty: pass the image that the question is about.")
    if model.config.visual_token_reduction == "resampler":
        raise ValueError(
            "visual_token_reduction is 'resampler': its visual tokens are learned queries, each of which reads the whole "
            "image, so they have no places in it that could be shown."
        )


def _attention_of_words(
    model: SaisaForConditionalGeneration, ids: torch.Tensor, given: dict, positions: list[list[int]]
) -> torch.Tensor:
    """(layers, words, V): attention probabilities averaged over heads and over the positions of each word."""
    wanted = sorted({position for word in positions for position in word})
    # nothing behind the last of these positions has an effect on them
    weights_LQV = visual_attention(model, {"input_ids": ids[:, : wanted[-1] + 1], **given}, wanted)
    rows = [[wanted.index(position) for position in word] for word in positions]
    return torch.stack([weights_LQV[:, row].mean(1) for row in rows], dim=1)


def _maps_by_image(
    model: SaisaForConditionalGeneration,
    processor: SaisaProcessor,
    images: list[PIL.Image.Image],
    weights_LWV: torch.Tensor,
    pixel_values: torch.Tensor,
) -> list[PictureMaps]:
    """The attention to all visual tokens as a grid over each image."""
    places = [_places(model, processor, image) for image in images]
    if sum(place.tokens for place in places) != weights_LWV.shape[-1]:
        raise ValueError(
            f"The prompt has {weights_LWV.shape[-1]} visual tokens, but the images have "
            f"{sum(place.tokens for place in places)} places: the tokens are not a grid over the image."
        )
    kept: Any = [None] * len(images)
    if model.config.visual_token_reduction == "class_attention":
        features: Any = model.get_image_features(pixel_values, return_dict=True)
        kept = features.kept_tokens.cpu()
    maps = []
    for image, place, cells, weights in zip(images, places, kept, weights_LWV.split([p.tokens for p in places], -1)):
        rows, columns = place.grid
        weights = weights[..., place.outside :]
        if cells is not None:  # a patch that was not kept has no weight
            weights = weights.new_zeros(*weights.shape[:2], rows * columns).index_copy(-1, cells, weights)
        maps.append(PictureMaps(image, place.box, weights.unflatten(-1, (rows, columns)).numpy()))
    return maps


def grouped_words(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[tuple[str, list[int]]]:
    """The words of an answer, each with the indices into `ids` of its tokens.

    A word begins where the decoded text has white space, or with each token of a script that is written without spaces.
    Special tokens, and tokens of only white space or punctuation, belong to no word; punctuation is shown with the word that
    it adjoins.
    """
    words: list[tuple[str, list[int]]] = []
    before, held, begins = "", [], True
    for index in range(len(ids)):
        text = tokenizer.decode(ids[: index + 1], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        piece = text[len(before) :]
        held.append(index)
        if piece.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character's bytes
            continue
        before, tokens, held = text, held, []
        shown = piece.strip()
        if shown:
            if begins or piece[0].isspace() or WITHOUT_SPACES.match(shown):
                words.append(("", []))
            said, own = words[-1]
            punctuation = all(unicodedata.category(letter).startswith("P") for letter in shown)
            words[-1] = (said + shown, own if punctuation else own + tokens)
            begins = False
        begins = begins or piece[-1:].isspace()
    return [(text, tokens) for text, tokens in words if tokens]


# --- probabilities ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def visual_attention(model: SaisaForConditionalGeneration, inputs: dict, positions: Sequence[int]) -> torch.Tensor:
    """Attention probabilities of some text positions to all visual tokens, averaged over heads.

    Args:
        model: a `SaisaForConditionalGeneration`.
        inputs: what `forward` takes, of one sample without padding, with its images and no cache.
        positions: Q positions of text tokens in input order.

    Returns:
        float32 (layers, Q, V) on the CPU. The softmax is over everything that a position sees, in float32, from queries and
        keys in the model's dtype. Zero in layers that do not see images.

    Raises:
        ValueError: there is more than one sample, a position is not a text token's, or the model's code is older than this.
    """
    ids = inputs["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"inputs has {len(ids)} samples: expected one.")
    visual_S = (ids[0] == model.config.image_token_id).cpu()
    for position in positions:
        if not 0 <= position < len(visual_S) or visual_S[position]:
            raise ValueError(
                f"positions has {position}, which is not the position of a text token: expected positions in "
                f"[0, {len(visual_S)}) that hold no visual token."
            )
    recorder = _Recorder(visual_S, torch.tensor(list(positions), dtype=torch.long))
    layers = model.language_model.layers
    with _watched([layer.self_attn for layer in layers if layer.sees_image], recorder):
        model.model(**inputs, use_cache=False)
    if any(layer.sees_image and index not in recorder.weights for index, layer in enumerate(layers)):
        raise ValueError(
            "The model's attention does not expose its queries and keys: it was loaded with the code of an older checkpoint. "
            "Load it with saisa_hf.SaisaForConditionalGeneration.from_pretrained."
        )
    nothing = torch.zeros(len(positions), int(visual_S.sum()))
    return torch.stack([recorder.weights.get(index, nothing) for index in range(len(layers))])


@contextlib.contextmanager
def _watched(attentions: list, watcher: Callable) -> Iterator[None]:
    """Shows `watcher` the queries and keys of these attention modules."""
    try:
        for attention in attentions:
            attention.watcher = watcher
        yield
    finally:
        for attention in attentions:
            attention.watcher = None


class _Recorder:
    """Collects, by layer, the probabilities of some queries over the visual keys.

    Args:
        visual_S: bool (S,), where the visual tokens are.
        positions: (Q,) of the queries.
    """

    def __init__(self, visual_S: torch.Tensor, positions: torch.Tensor):
        self.visual_S, self.positions = visual_S, positions
        self.text_rows = (~visual_S).cumsum(0)[positions] - 1
        self.weights: dict[int, torch.Tensor] = {}

    def __call__(self, attention: Any, query_BNTH: torch.Tensor, key_BKSH: torch.Tensor) -> None:
        device = query_BNTH.device
        # only text tokens are queries, unless visual tokens attend as text does
        rows = self.positions if query_BNTH.shape[2] == len(self.visual_S) else self.text_rows
        query_NQH, key_KSH = query_BNTH[0, :, rows.to(device)].float(), key_BKSH[0]
        heads, length = len(query_NQH), key_KSH.shape[1]
        position_Q1, key_S = self.positions[:, None].to(device), torch.arange(length, device=device)
        hidden_QS = key_S > position_Q1
        if attention.window is not None:
            hidden_QS |= key_S <= position_Q1 - attention.window
        visual = self.visual_S.nonzero().squeeze(1).to(device)
        total_QV = torch.zeros(len(self.positions), len(visual), device=device)
        group = heads // len(key_KSH)
        at_once = max(1, SCORES_AT_ONCE // (group * length))
        for head, key_SH in enumerate(key_KSH):
            own_GQH = query_NQH[head * group : (head + 1) * group]
            for first in range(0, len(self.positions), at_once):
                part = slice(first, first + at_once)
                scores_GQS = own_GQH[:, part] @ key_SH.float().T * attention.scaling
                if attention.softcap is not None:
                    scores_GQS = torch.tanh(scores_GQS / attention.softcap) * attention.softcap
                weights_GQS = scores_GQS.masked_fill(hidden_QS[part], float("-inf")).softmax(-1)
                total_QV[part] += weights_GQS[..., visual].sum(0)
        self.weights[attention.layer_idx] = (total_QV / heads).cpu()


# --- places -----------------------------------------------------------------------------------------------------------


class _Places(NamedTuple):
    """Where the visual tokens of an image are: how many there are, how many at the front are not a part of the image, (rows,
    columns) of the grid, and what it covers of the image."""

    tokens: int
    outside: int
    grid: tuple[int, int]
    box: tuple[float, float, float, float]


def _places(model: SaisaForConditionalGeneration, processor: SaisaProcessor, image: PIL.Image.Image) -> _Places:
    config = model.config
    kind = config.visual_token_reduction
    patch: Any = getattr(config.vision_config, "patch_size", None)
    (height, width), patches, (left, top, right, bottom) = seen_part(processor, image.size)
    outside = config.kept_prefix_tokens
    tokens = processor._get_num_multimodal_tokens([image.size[::-1]]).num_image_tokens[0]
    if patches is None and isinstance(patch, int):
        patches = height // patch, width // patch
    cell = 2 if kind in OF_CELLS else 1  # patches along the side of what one visual token stands for
    grid: Any = tuple(-(-count // cell) for count in patches or ())
    if kind != "class_attention" and (not grid or grid[0] * grid[1] != tokens - outside):
        grid = grid_of(tokens - outside, height, width)  # of feature maps
    else:  # pixels that do not fill a patch are not seen, and a cell at an odd edge reaches beyond it
        side = cell * patch
        right = left + (right - left) * grid[1] * side / width
        bottom = top + (bottom - top) * grid[0] * side / height
    return _Places(tokens, outside, grid, (left, top, right, bottom))


def seen_part(
    processor: SaisaProcessor, size: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int] | None, tuple[float, float, float, float]]:
    """The part of an image that the processor shows the encoder.

    It is measured, so it is right for any image processor that resizes, crops and pads: an image whose colours are
    coordinates is processed. The second time its colours are spread over the part that is seen.

    Args:
        size: (width, height) of the image.

    Returns:
        (height, width) of the processed image; (rows, columns) of its patches if the processor makes patches (SigLIP 2),
        else None; and (left, top, right, bottom) of what it shows, in pixels of the image.
    """
    edges = np.array([[0.0, size[0]], [0.0, size[1]]])
    for _ in range(2):
        steps = [(np.arange(n) + 0.5 - low) / (high - low) for n, (low, high) in zip(size, edges)]
        x, y = (np.rint(np.clip(step, 0, 1) * 255).astype(np.uint8) for step in steps)
        colours = np.stack(np.broadcast_arrays(x[None], y[:, None], np.uint8(255)), axis=-1)
        probe = PIL.Image.fromarray(np.ascontiguousarray(colours))
        shown, patches = _processed(processor, probe)
        inside = shown[..., 2] > 254  # padding has another blue
        for axis in (0, 1):
            count = inside.sum(axis)
            profile = np.where(inside, shown[..., axis], 0).sum(axis) / np.maximum(count, 1)
            sound = (count > 0) & (profile > 4) & (profile < 251)  # resizing distorts a ramp at its ends
            if sound.sum() > 1 and np.ptp(profile[sound]) > 2:
                slope, offset = np.polyfit(np.flatnonzero(sound) + 0.5, profile[sound] / 255, 1)
                low, high = edges[axis]
                edges[axis] = low + (high - low) * np.array([offset, offset + slope * len(profile)])
    (left, right), (top, bottom) = edges.tolist()
    return shown.shape[:2], patches, (left, top, right, bottom)


def _processed(processor: SaisaProcessor, image: PIL.Image.Image) -> tuple[np.ndarray, tuple[int, int] | None]:
    """The processed image (H, W, 3) with values from 0 to 255, and the grid of its patches if it comes in patches."""
    outputs = processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="pt")
    pixels = outputs["pixel_values"][0].float().numpy()
    if "spatial_shapes" not in outputs:
        return pixels.transpose(1, 2, 0), None
    rows, columns = map(int, outputs["spatial_shapes"][0])
    side = round((pixels.shape[-1] / 3) ** 0.5)
    pixels = pixels[: rows * columns].reshape(rows, columns, side, side, 3).transpose(0, 2, 1, 3, 4)
    return pixels.reshape(rows * side, columns * side, 3), (rows, columns)
