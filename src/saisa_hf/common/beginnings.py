# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What stands in front of questions, read once: system text, images, all of it, as keys and values that any number of
questions continue without a copy.

Shape suffixes: B batch, S sequence of whole prompts, P tokens of the beginning, L those of them that a layer keeps (all, or
text alone where it does not see images), K key/value heads, H head size.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..compat_saisa import CACHE, portable_config_dict
from ..hardware_saisa import weights_fingerprint
from ..head_saisa import IMAGES, images_by_row
from ..visual_states_saisa import FLOATS, read_tensors, write_tensors


FORMAT = "saisa beginning 1"
ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")


class SaisaBeginning:
    """What stands in front of questions, as a model has read it: `model.keep(...)` makes it, and `generate` and `forward`
    take it where they take a cache, `past_key_values` or `cache`. It never changes: any number of questions, in any number of
    threads, continue it at the same time, each in a cache of its own that holds what stands behind it.

    Args:
        tokens: int64 (P,).
        keys_values: of each decoder layer the keys and values, (1, K, L, H) each.
        image_token_id: the placeholder among `tokens`.
        marks: of each image, what it was given as and a number that tells it from others.
        fingerprint: digest of the weights that read it.

    Attributes:
        tokens: int64 (P,), on the CPU.
        dtype, device: of keys and values; on several devices, of the first layer's.
        nbytes: bytes of all keys and values.
        fingerprint: digest of the weights that read it.
    """

    def __init__(
        self,
        tokens: Tensor,
        keys_values: Sequence[tuple[Tensor, Tensor]],
        image_token_id: int,
        marks: Sequence[tuple[str, int]],
        fingerprint: str,
    ):
        self.tokens, self.keys_values = tokens.cpu(), tuple(keys_values)
        self.image_token_id, self.marks, self.fingerprint = image_token_id, tuple(marks), fingerprint
        self.text_places = (self.tokens != image_token_id).nonzero()[:, 0]
        first = self.keys_values[0][0]
        self.dtype, self.device = first.dtype, first.device
        self.nbytes = sum(x.nbytes for pair in self.keys_values for x in pair)

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        size = f"{self.nbytes / 2**20:.1f} MiB"
        return f"SaisaBeginning({len(self)} tokens, {len(self.marks)} images, {self.dtype}, {self.device}, {size})"

    def __deepcopy__(self, memo: dict) -> SaisaBeginning:
        return self  # nothing in it changes, so that `copy.deepcopy`, as for other caches, costs nothing

    def to(self, *args: Any, **kwargs: Any) -> SaisaBeginning:
        """Moves and casts, with the arguments of `torch.Tensor.to`."""
        moved = [(keys.to(*args, **kwargs), values.to(*args, **kwargs)) for keys, values in self.keys_values]
        return SaisaBeginning(self.tokens, moved, self.image_token_id, self.marks, self.fingerprint)

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file; an interrupted write leaves what was there before. Raises ValueError if a number is NaN
        or infinite."""
        tensors = {"tokens": self.tokens}
        for index, pair in enumerate(self.keys_values):
            named = zip(("keys", "values"), pair)
            tensors |= {f"{name}.{index}": x.contiguous().cpu() for name, x in named}
        described = {"layers": len(self.keys_values), "image_token_id": self.image_token_id, "images": self.marks}
        metadata = {name: json.dumps(value) for name, value in described.items()}
        write_tensors(path, tensors, metadata | {"format": FORMAT, "fingerprint": self.fingerprint})

    @staticmethod
    def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> SaisaBeginning:
        """Reads what `save` has written. Raises FileNotFoundError, or ValueError if the file is something else or damaged."""
        (layers, token, marks, fingerprint), tensors = read_tensors(path, device, _described, "SaisaBeginning")
        tokens, pairs = tensors["tokens"], [(tensors[f"keys.{i}"], tensors[f"values.{i}"]) for i in range(layers)]
        beginning = SaisaBeginning(tokens, pairs, token, marks, fingerprint)
        for index, (keys, _) in enumerate(pairs):
            if keys.shape[2] not in (len(tokens), len(beginning.text_places)):
                problem = f"keys.{index} is of {keys.shape[2]} tokens, of {len(tokens)}"
                raise ValueError(f"{path}: {problem}. Expected a file that SaisaBeginning.save has written.")
        return beginning

    def check(self, model: Any) -> None:
        """Raises ValueError unless this `SaisaModel` computes with the weights that read the beginning, in its dtype, where
        its keys and values are."""
        layers, again = model.language_model.layers, "Read it with this model: model.keep(...)."
        dtype, devices = model.get_input_embeddings().weight.dtype, [layer.device for layer in layers]
        own = fingerprint_of(model)
        if len(layers) != len(self.keys_values) or self.fingerprint != own:
            weights = f"fingerprint {self.fingerprint[:12]}, here {own[:12]}"
            raise ValueError(f"The beginning was read with other weights or settings ({weights}). {again}")
        if self.dtype != dtype:
            raise ValueError(f"The beginning is {self.dtype}, the model {dtype}: cast it with beginning.to({dtype}).")
        if [keys.device for keys, _ in self.keys_values] != devices:
            raise ValueError(f"The beginning is on {self.device}, the model's layers on {devices[0]}: {again}")

    def arranged(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Whole prompts (B, S) that begin with these tokens and are padded on either side, and their mask -> both with all
        padding right behind the beginning. Without a mask, no token is padding.

        Raises:
            ValueError: a prompt does not begin with these tokens, or nothing stands behind them; the mask has another shape.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.to(input_ids.device)
        if mask.shape != input_ids.shape:
            shapes = f"attention_mask is {tuple(mask.shape)}, input_ids {tuple(input_ids.shape)}"
            raise ValueError(f"{shapes}: with a beginning, expected both of whole prompts, the beginning included.")
        real, own, count = mask.bool(), self.tokens.to(input_ids.device), len(self)
        padding = input_ids[~real][:1]
        ids = input_ids.new_full(input_ids.shape, int(padding) if len(padding) else 0)
        seen = torch.zeros_like(mask)
        for row, real_S in enumerate(real):
            prompt = input_ids[row, real_S]
            differs = (prompt[:count] != own[: len(prompt)]).nonzero()
            if len(differs):
                at = int(differs[0])
                found = f"token {at} is {int(prompt[at])}, of the beginning {int(own[at])}"
                raise ValueError(
                    f"Prompt {row} does not begin with the beginning's {count} tokens: {found}. Expected the whole prompt, "
                    "made as the beginning was; where words would be tokenized together, end that behind an image."
                )
            if len(prompt) <= count:
                problem = f"Prompt {row} is {len(prompt)} tokens, the beginning {count}"
                raise ValueError(f"{problem}: expected the whole prompt, with at least one token behind the beginning.")
            ids[row, :count], seen[row, :count] = own, 1
            start = ids.shape[1] - (len(prompt) - count)
            ids[row, start:], seen[row, start:] = prompt[count:], 1
        return ids, seen

    def generate(self, model: Any, inputs: Tensor | None, *args: Any, **kwargs: Any) -> Any:
        """What `model.generate` returns for whole prompts that begin with these tokens; see there, and `arranged`.

        Raises:
            ValueError: see `arranged` and `check`; no `input_ids`, or `position_ids`; an image is not the one that was kept;
                assisted decoding, which transformers 5 does not do behind a filled cache; prompts of unlike lengths that,
                with their answers, are longer than a sliding window.
        """
        given, config = kwargs.pop("input_ids", None) if inputs is None else inputs, args[0] if args else None
        config = config or kwargs.get("generation_config") or model.generation_config
        for name in ASSISTED:
            if kwargs.get(name, getattr(config, name, None)) is not None:
                raise ValueError(
                    f"{name} asks for assisted decoding, which reads whole prompts: leave out the beginning."
                )
        further = [name for name in ("inputs_embeds", "position_ids") if kwargs.get(name) is not None]
        if given is None or given.is_floating_point() or further:
            raise ValueError(
                f"A beginning goes with input_ids of whole prompts, by which it is checked, got "
                f"{' and '.join(further) or 'none'}. Leave out position_ids and inputs_embeds."
            )
        ids, kwargs["attention_mask"] = self.arranged(given, kwargs.get("attention_mask"))
        if not kwargs["attention_mask"].all():
            _check_windows(model, ids.shape[1], config, kwargs)
        self._check_images(model, ids, {name: kwargs[name] for name in IMAGES if kwargs.get(name) is not None})
        made = model.generate(ids, *args, **kwargs, **{CACHE: model.new_cache(self)})
        sequences = made if isinstance(made, Tensor) else made.sequences
        sequences[:, : ids.shape[1]] = given.repeat_interleave(len(sequences) // len(given), 0).to(sequences.device)
        return made

    def _check_images(self, model: Any, ids: Tensor, images: dict[str, Any]) -> None:
        """Raises ValueError if the first images of a prompt are not those of the beginning, whose placeholders are alike."""
        all_BS = model.model.get_placeholder_mask(ids)
        new_BS = all_BS[:, len(self) :]
        if model.config.leading_text_skips_attention and new_BS.any() and not self.marks:
            raise ValueError(
                "leading_text_skips_attention: text in front of the first image is read in another way, and the beginning "
                "has none. Keep the first image with it."
            )
        all_B, new_B = all_BS.sum(1).tolist(), new_BS.sum(1).tolist()
        tokens = model._visual_tokens(images, sum(new_B), sum(all_B)) if images and self.marks else []
        if not tokens or sum(tokens) != sum(all_B):  # they are those behind the beginning, if there are any
            return
        marks = marks_of(images, model)
        for row, own in enumerate(images_by_row(all_B, tokens)):
            for index, (kept, image) in enumerate(zip(self.marks, own)):
                if kept[0] == marks[image][0] and kept != marks[image]:
                    raise ValueError(
                        f"Image {index} of prompt {row} is not the one in the beginning. Keep a beginning with that image, "
                        "or leave out those that are kept."
                    )


def _check_windows(model: Any, length: int, config: Any, options: Mapping[str, Any]) -> None:
    """Raises ValueError if a sliding window, counted in places, would count the padding behind a beginning."""
    new, most = (options.get(name, getattr(config, name, None)) for name in ("max_new_tokens", "max_length"))
    most = length + new if new else max(most or 0, length + 20)
    windows = [layer.self_attn.window for layer in model.language_model.layers if layer.self_attn.window is not None]
    if windows and min(windows) < most:
        raise ValueError(
            f"The prompts have unlike lengths and may grow to {most} tokens, more than the sliding window of {min(windows)}: "
            "their padding, behind the beginning, would count in it. Ask prompts of one length, or one at a time."
        )


@torch.no_grad()
def keep(model: Any, input_ids: Tensor, attention_mask: Tensor | None, images: Mapping[str, Any]) -> SaisaBeginning:
    """What `SaisaForConditionalGeneration.keep` returns."""
    unknown = sorted(set(images) - set(IMAGES))
    if unknown:
        raise TypeError(
            f"keep() got {unknown[0]!r}: expected input_ids, attention_mask and images ({', '.join(IMAGES)})."
        )
    if input_ids.ndim != 2 or len(input_ids) != 1:
        raise ValueError(f"input_ids is {tuple(input_ids.shape)}: expected (1, P), the beginning of all questions.")
    ids = input_ids if attention_mask is None else input_ids[:, attention_mask[0].bool()]
    if not ids.shape[1]:
        raise ValueError("input_ids holds no token: expected the beginning of all questions.")
    given = {name: x for name, x in images.items() if x is not None}
    cache = model.new_cache()
    model.model(input_ids=ids, use_cache=True, **{CACHE: cache}, **given)
    keys_values = [(layer.keys, layer.values) for layer in cache.layers]
    marks = marks_of(given, model)
    return SaisaBeginning(ids[0], keys_values, model.config.image_token_id, marks, fingerprint_of(model.model))


def marks_of(images: Mapping[str, Any], model: Any) -> list[tuple[str, int]]:
    """For each of the images in arguments of `forward` what it is given as, and a number that tells it from others. It is one
    of pixels in the model's dtype, and padding does not change it. Visual states are not told apart: those of one image,
    computed beside others, differ by rounding."""
    if "visual_states" in images:
        return [("visual_states", 0)] * len(images["visual_states"])
    dtype = model.get_input_embeddings().weight.dtype
    return [(f"pixel_values {dtype}", _number_of(image.to(dtype))) for image in images.get("pixel_values", ())]


def _number_of(x: Tensor) -> int:
    bits = x.detach().flatten().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]).long()
    return int((bits * (2 * torch.arange(len(bits), device=bits.device) + 1)).sum())


def fingerprint_of(model: Any) -> str:
    """A digest of the weights and settings of a `SaisaModel` that keys and values depend on."""
    config, decoder = model.config, model.language_model
    settings = [
        model.visual_fingerprint("features"),
        config.alignment,
        config.visual_layers,
        config.projector_hidden_act,
    ]
    settings += [config.visual_attention, config.visual_feed_forward, config.leading_text_skips_attention]
    settings += [config.text_config.rms_norm_eps]
    text = portable_config_dict(config.text_config.to_dict())  # how it rotates
    scaling = sorted(
        (name, x) for name, x in (text.get("rope_scaling") or {}).items() if x != "default" and name != "type"
    )
    settings += [text.get("rope_theta"), text.get("rope_local_base_freq"), text.get("partial_rotary_factor"), scaling]
    parts = {"language_model": decoder}
    if hasattr(model, "visual_projector"):
        parts["visual_projector"] = model.visual_projector
    return weights_fingerprint(model, "beginning", parts, settings)


def _described(metadata: Mapping[str, str], found: Mapping[str, tuple]) -> tuple:
    """Number of layers, image token, marks and fingerprint of a file that holds tensors of these dtypes and shapes."""
    if metadata.get("format") != FORMAT:
        raise ValueError("holds no beginning")
    try:
        layers, token, images = (json.loads(metadata.get(name, "")) for name in ("layers", "image_token_id", "images"))
        marks = [(str(name), int(number)) for name, number in images]
        if type(layers) is not int or type(token) is not int or not 0 < layers <= 2**12:
            raise ValueError
    except (ValueError, TypeError, RecursionError):
        raise ValueError("holds no usable description of layers, image_token_id and images") from None
    names = {"tokens"} | {f"{kind}.{index}" for index in range(layers) for kind in ("keys", "values")}
    for name in sorted(names ^ set(found)):
        raise ValueError(f"{'lacks' if name in names else 'holds an unexpected'} {name!r:.80}")
    tokens, (first, like) = found["tokens"], found["keys.0"]
    if tokens[0] != "I64" or len(tokens[1]) != 1 or not tokens[1][0]:
        raise ValueError(f"holds tokens of {tokens[0]}, {tokens[1]!s:.80}: expected int64 (P,)")
    for name, (dtype, shape) in found.items():
        alike = len(shape) == len(like) == 4 and shape[::3] == like[::3] and shape[1] == like[1] and shape[0] == 1
        pair = name == "tokens" or found[name.replace("values", "keys")][1] == shape
        if name != "tokens" and (dtype != first or dtype not in FLOATS or not alike or not pair or 0 in shape[1::2]):
            raise ValueError(
                f"holds {name} of {dtype}, {shape!s:.80}: expected floats (1, K, L, H), alike in all layers"
            )
    if not re.fullmatch("[0-9a-f]{64}", metadata.get("fingerprint", "")):
        raise ValueError(f"holds the fingerprint {metadata.get('fingerprint')!r:.80}, which is no SHA-256 digest")
    return layers, token, marks, metadata["fingerprint"]
