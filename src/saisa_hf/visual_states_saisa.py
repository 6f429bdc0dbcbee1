# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Images as the decoder layers see them, computed once for any number of prompts, and where images enter a forward pass.

The keys (before rotation) and values of an image depend neither on the text nor on where in it the image stands.

Shape suffixes: V visual tokens of all stored images, K key/value heads, H head size, C width of the encoder's features.
"""

import contextlib
import inspect
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .checkpoint_saisa import from_package
from .compat_saisa import warn_once
from .hardware_saisa import weights_fingerprint, with_all_heads
from .saving_saisa import hidden_folder, sweep
from .token_layout_saisa import TokenLayout, real_tokens, tells_samples_apart
from .vision_saisa import in_pieces


FORMAT = "saisa visual states 1"
FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")  # as safetensors calls them


@dataclass(frozen=True)
class VisualStore:
    """The tensors behind one or several `SaisaVisualStates`; keys and values lie head by head in memory, as in a cache."""

    lengths: list[int]  # visual tokens of each image
    features: Tensor | None  # (V, C) of the encoder
    # in place of features, for each decoder layer the keys before rotation and the values, (V, K, H) each, if it sees images
    keys_values: tuple[tuple[Tensor, Tensor] | None, ...] | None
    fingerprint: str  # digest of the weights that they were computed with

    def __post_init__(self):
        by_head = self._of_each_layer(lambda x: x.transpose(0, 1).contiguous().transpose(0, 1))
        object.__setattr__(self, "keys_values", by_head)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by name: `features`, or `keys.{layer}` and `values.{layer}`."""
        if self.features is not None:
            return {"features": self.features}
        names = ("keys", "values")
        return {f"{name}.{i}": x for i, pair in enumerate(self.keys_values) for name, x in zip(names, pair or ())}

    def map(self, function, lengths: list[int] | None = None) -> "VisualStore":
        """The same with `function` applied to each tensor."""
        features = None if self.features is None else function(self.features)
        lengths = self.lengths if lengths is None else lengths
        return VisualStore(lengths, features, self._of_each_layer(function), self.fingerprint)

    def _of_each_layer(self, function):
        return self.keys_values and tuple(pair and tuple(map(function, pair)) for pair in self.keys_values)


class SaisaVisualStates:
    """Images as the decoder layers see them: `model.get_visual_states(pixel_values)` makes them, `forward` and `generate`
    take them as `visual_states` in place of `pixel_values`. A sequence of `len(states)` images in the order of placeholders:
    `states[i]`, `states[a:b]` and `states[[2, 0, 0]]` select without a copy. It never changes, and has no gradient.

    Args:
        stored: the tensors.
        order: which of the stored images it consists of, in which order. None: all of them.

    Attributes:
        store: `"keys_values"` or `"features"`.
        lengths: visual tokens of each image, which is how many placeholders it takes.
        num_layers: decoder layers of their model; None for `"features"`.
        token_shape: of what is kept of a visual token: (K, H) of keys or of values in each layer, or (C,) of features.
        dtype, device: of the tensors; on several devices, of the first layer's.
        nbytes: bytes of all tensors that these images keep in memory, each counted once.
        fingerprint: digest of the weights that they were computed with.
    """

    def __init__(self, stored: VisualStore, order: Iterable[int] | None = None):
        tensors = list(stored.tensors().values())
        first = tensors[0] if tensors else torch.empty(0)  # without a layer that sees images there are none
        self.stored = stored
        self.order = tuple(range(len(stored.lengths)) if order is None else order)
        self.store = "features" if stored.features is not None else "keys_values"
        self.lengths = [stored.lengths[image] for image in self.order]
        self.num_layers = None if stored.keys_values is None else len(stored.keys_values)
        self.token_shape, self.dtype, self.device = tuple(first.shape[1:]), first.dtype, first.device
        self.nbytes = sum(x.nbytes for x in tensors)
        self.fingerprint = stored.fingerprint

    def __len__(self) -> int:
        return len(self.order)

    def __repr__(self) -> str:
        images, size = f"{len(self)} images, {sum(self.lengths)} visual tokens", f"{self.nbytes / 2**20:.1f} MiB"
        return f"SaisaVisualStates({images}, store={self.store!r}, {self.dtype}, {self.device}, {size})"

    def __getitem__(self, index: int | slice | Sequence[int] | Tensor) -> "SaisaVisualStates":
        """An integer selects one image; a slice, or a sequence or 1-D tensor of integers, several, which may repeat. Raises
        IndexError where there is no such image, TypeError for another kind of index."""
        if isinstance(index, slice):
            return SaisaVisualStates(self.stored, self.order[index])
        if isinstance(index, Tensor):
            index = index.tolist()
        indices = index if isinstance(index, Iterable) and not isinstance(index, str) else [index]
        if any(isinstance(i, bool) for i in indices):
            raise TypeError(f"{index!r} holds booleans: expected the indices of images.")
        try:
            return SaisaVisualStates(self.stored, [self.order[operator.index(i)] for i in indices])
        except IndexError:
            raise IndexError(f"{index!r} is out of range: there are {len(self)} images.") from None

    def expand(self, n: int) -> "SaisaVisualStates":
        """These images for each of `n` prompts, without a copy. Raises ValueError unless `n` is a positive integer."""
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"n={n!r}: expected the number of prompts, a positive integer.")
        return SaisaVisualStates(self.stored, self.order * n)

    @staticmethod
    def cat(states: "Sequence[SaisaVisualStates]") -> "SaisaVisualStates":
        """The images of several, one after the other; tensors are copied, each image once. Raises ValueError if there are
        none, or they differ in model, store or dtype."""
        states = list(states)
        if not states:
            raise ValueError("states is empty: expected at least one SaisaVisualStates.")
        for name in ("store", "fingerprint", "dtype"):
            values = {str(getattr(one, name)) for one in states}
            if len(values) > 1:
                raise ValueError(f"states differ in {name} ({', '.join(sorted(values))}): they cannot be joined.")
        if all(one.stored is states[0].stored for one in states):
            return SaisaVisualStates(states[0].stored, [image for one in states for image in one.order])
        parts, lengths, order = [one.compact() for one in states], [], []
        for part in parts:
            order += [len(lengths) + image for image in part.order]
            lengths += part.stored.lengths
        tensors = [iter(part.stored.tensors().values()) for part in parts]
        joined = parts[0].stored.map(lambda x: torch.cat([next(own).to(x.device) for own in tensors]), lengths)
        return SaisaVisualStates(joined, order)

    def to(self, *args, **kwargs) -> "SaisaVisualStates":
        """Moves and casts, with the arguments of `torch.Tensor.to`; each image once."""
        compact = self.compact()
        return SaisaVisualStates(compact.stored.map(lambda x: x.to(*args, **kwargs)), compact.order)

    def __deepcopy__(self, memo):
        return self  # nothing in it changes; assisted decoding copies a model's arguments

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file, each image once. An interrupted write leaves what was there before, and what a killed
        one left beside it goes with the next. Raises ValueError if a number is NaN or infinite."""
        compact = self.compact()
        # a view would write all of what it is a view of
        tensors = {name: x.contiguous().cpu() for name, x in compact.stored.tensors().items()}
        described = {"layers": self.num_layers, "lengths": compact.stored.lengths, "order": compact.order}
        if self.store == "keys_values":
            described["image_layers"] = [i for i, pair in enumerate(compact.stored.keys_values) if pair is not None]
        metadata = {name: json.dumps(value) for name, value in described.items()}
        metadata |= {"format": FORMAT, "fingerprint": self.fingerprint}
        write_tensors(path, tensors, metadata)

    @staticmethod
    def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> "SaisaVisualStates":
        """Reads what `save` has written. Raises FileNotFoundError, or ValueError if the file is something else or damaged."""
        (lengths, order, layers, fingerprint), tensors = read_tensors(path, device, _described, "SaisaVisualStates")
        pairs = [(tensors.get(f"keys.{index}"), tensors.get(f"values.{index}")) for index in range(layers or 0)]
        keys_values = None if layers is None else tuple(None if pair[0] is None else pair for pair in pairs)
        return SaisaVisualStates(VisualStore(lengths, tensors.get("features"), keys_values, fingerprint), order)

    def rows(self) -> Tensor | None:
        """(visual tokens,) rows of the stored tensors in the order of the placeholders; None: all of them as they are."""
        if self.order == tuple(range(len(self.stored.lengths))):
            return None
        rows = torch.arange(sum(self.stored.lengths)).split(self.stored.lengths)
        return torch.cat([rows[image] for image in self.order])

    def compact(self) -> "SaisaVisualStates":
        """The same images without stored ones that are not among them."""
        used, lengths = list(dict.fromkeys(self.order)), self.stored.lengths
        if used == list(range(len(lengths))):
            return self

        def select(x: Tensor) -> Tensor:
            images = x.split(lengths)
            return torch.cat([images[image] for image in used]) if used else x[:0]

        stored = self.stored.map(select, [lengths[image] for image in used])
        return SaisaVisualStates(stored, [used.index(image) for image in self.order])


def write_tensors(path: str | os.PathLike, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file in one step. Raises ValueError if a number is NaN or infinite."""
    _check_finite(path, tensors)
    path = Path(path)
    hidden = (path.parent, f".{path.name}.", ".partial")
    sweep(*hidden)
    with hidden_folder(*hidden) as folder:
        (part := folder / path.name).touch()
        mode = part.stat().st_mode
        save_file(tensors, part, metadata=metadata)
        part.chmod(mode)  # safetensors lets nobody else read it
        os.replace(part, path)


def read_tensors(path: str | os.PathLike, device: str | torch.device, described: Callable, kind: str) -> tuple:
    """What `described` makes of metadata, dtypes and shapes of a file of `kind`, and its tensors. `described` raises
    ValueError, which says what is wrong. Raises that with the file's name, FileNotFoundError, or ValueError."""
    expected = f"Expected a file that {kind}.save has written."
    if not Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file. {expected}")
    if not Path(path).is_file():
        raise ValueError(f"{path} is a folder or a device. {expected}")
    device = torch.empty(0, device=device).device  # so that an error about it is not one about the file
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            slices = {name: file.get_slice(name) for name in list(file.keys())}
            found = {name: (x.get_dtype(), tuple(x.get_shape())) for name, x in slices.items()}
            about = described(file.metadata() or {}, found)
            tensors = {name: file.get_tensor(name) for name in found}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}). {expected}") from None
    except ValueError as error:
        raise ValueError(f"{path} {error}. {expected}") from None
    _check_finite(path, tensors)
    return about, tensors


def _described(metadata: dict[str, str], found: dict[str, tuple]) -> tuple:
    """Lengths, order, number of layers (None: features) and fingerprint of a file that holds tensors of these dtypes and
    shapes. Raises ValueError, which says what the file holds, if one does not go with another."""
    if metadata.get("format") != FORMAT:
        raise ValueError("holds no visual states")
    lengths = _integers("lengths", metadata.get("lengths"), 1, 2**31)
    order = _integers("order", metadata.get("order"), 0, len(lengths) - 1)
    layers, names, axes = None, {"features"}, 2
    if metadata.get("layers") != "null":
        (layers,), axes = _integers("layers", f"[{metadata.get('layers')}]", 1, 2**12), 3
        seen = [i for i in range(layers) if f"keys.{i}" in found or f"values.{i}" in found]  # where it does not say
        seen = _integers("image_layers", metadata.get("image_layers", json.dumps(seen)), 0, layers - 1)
        names = {f"{kind}.{i}" for i in seen for kind in ("keys", "values")}
    for name in sorted(names ^ set(found)):
        raise ValueError(f"{'lacks' if name in names else 'holds an unexpected'} {name!r:.80}")
    for name, (dtype, shape) in found.items():
        unlike = (dtype, shape) != next(iter(found.values()))  # the first
        if unlike or dtype not in FLOATS or len(shape) != axes or shape[0] != sum(lengths) or 0 in shape[1:]:
            expected = f"expected floats for {sum(lengths)} visual tokens, in {axes} axes, alike in all layers"
            raise ValueError(f"holds {name} of {dtype}, {shape!s:.80}: {expected}")
    if not re.fullmatch("[0-9a-f]{64}", metadata.get("fingerprint", "")):
        raise ValueError(f"holds the fingerprint {metadata.get('fingerprint')!r:.80}, which is no SHA-256 digest")
    return lengths, order, layers, metadata["fingerprint"]


def _integers(name: str, written: str | None, least: int, most: int) -> list[int]:
    with contextlib.suppress(ValueError, RecursionError):
        values = json.loads(written or "")
        if isinstance(values, list) and all(type(x) is int and least <= x <= most for x in values):
            return values
    raise ValueError(f"holds {name}={written!r:.80}: expected integers from {least} to {most}")


def _check_finite(path: str | os.PathLike, tensors: dict[str, Tensor]) -> None:
    for name, x in tensors.items():
        x = x.float() if x.itemsize == 1 else x
        if x.numel() and not torch.stack(x.aminmax()).isfinite().all():
            raise ValueError(f"{path}: {name} holds NaN or infinity. Compute it again.")


def check_one_of(pixel_values, visual_states) -> None:
    """Raises ValueError if both are given."""
    if pixel_values is not None and visual_states is not None:
        raise ValueError("Expected pixel_values or visual_states, got both: the states stand in place of the images.")


class GivenImages(NamedTuple):
    """The images of a forward pass, in the order of their placeholders."""

    name: str  # of the argument that they came in
    lengths: list[int]  # visual tokens of each
    features: Tensor | None = None  # (V, C) of the encoder, where it has just run
    stored: Tensor | tuple | None = None  # features, or keys and values, in place of these
    rows: Tensor | None = None  # (V,) where visual tokens find their rows in `stored`; None: one row for each, in order


class UsesVisualStates:
    """The part of `SaisaModel` that makes `SaisaVisualStates` and takes them, and that has projectors folded."""

    folded = None  # what knows of it (`checkpoints/folding.py`)

    def fold_projectors(self) -> None:
        """For projectors narrower than the hidden size: on visual rows, one matrix takes the place of `linear_2`, norm,
        `k_proj` and `v_proj` of a layer. The model computes the same with less work, and is saved as it was. Weights
        that change are folded again at the next image; while they learn, or hooks watch their modules, these run themselves.
        Needs the package saisa_hf.

        Raises:
            ValueError: it would save nothing, or weights are quantized, adapted, sharded or offloaded.
        """
        from_package("fold_projectors", "checkpoints.folding", "fold")(self)

    def unfold_projectors(self) -> None:
        """Undoes `fold_projectors`."""
        for owner in (self, *self.language_model.layers):
            owner.folded = None

    @torch.no_grad()
    def get_visual_states(self, pixel_values: Tensor, store: str | None = None, **kwargs) -> SaisaVisualStates:
        """What the decoder layers make of a batch of images, for any number of prompts and anywhere in them, without
        gradients, in the language model's dtype.

        Args:
            pixel_values: as in `get_image_features`.
            store: `"keys_values"`, those of each layer that sees images, 2 * V * h_kv numbers a layer, or `"features"`, the
                encoder's, V * C numbers, which are projected at each use. None: `"keys_values"`; in embedding space, where
                visual tokens have hidden states that depend on what stands around them, `"features"`.
            kwargs: `image_sizes`, `num_tiles`, `frame_pooling`, as there; others are handed on to the encoder.

        Raises:
            ValueError: `store` is neither, or `"keys_values"` in embedding space; `pixel_values` is not a batch of images.
        """
        store = self.checked_store(store)
        images = list(self.get_image_features(pixel_values, return_dict=True, **kwargs).pooler_output)
        dtype = self.get_input_embeddings().weight.dtype
        features, keys_values = torch.cat(images).to(dtype), None
        if store == "keys_values":
            if self.folded is not None:
                self.folded.follow(self)
            visual, features = self.for_layers(features), None
            keys_values = tuple(
                with_all_heads(layer.visual_keys_and_values(visual), layer.self_attn) if layer.sees_image else None
                for layer in self.language_model.layers
            )
        stored = VisualStore(list(map(len, images)), features, keys_values, self.visual_fingerprint(store))
        return SaisaVisualStates(stored.map(lambda x: x.to(dtype)))  # under autocast, products have another one

    def checked_store(self, store: str | None) -> str:
        """`store`, or what None stands for. Raises ValueError if there is no such store, or not for this model."""
        reasons = ["alignment='embedding_space'"] if self.config.in_embedding_space else []
        reasons += ["adapters that differ between samples"] if self.tells_samples_apart() else []
        store = store if store is not None else ("features" if reasons else "keys_values")
        if store not in ("keys_values", "features"):
            raise ValueError(f"store={store!r}: expected 'keys_values' or 'features'.")
        if store == "keys_values" and reasons:
            raise ValueError(f"store='keys_values' do not go with {reasons[0]}: use store='features'.")
        return store

    def visual_fingerprint(self, store: str) -> str:
        """A digest of the weights and settings that visual states of `store` depend on. Weights are compared as bfloat16, so
        that a model has one fingerprint in float32 and in bfloat16."""
        config, parts = self.config, {"vision_tower": self.vision_tower}
        settings = [config.vision_feature_layers, config.vision_feature_select_strategy]
        if config.visual_token_reduction is not None:
            settings += [config.visual_token_reduction, config.reduced_visual_tokens]
        if config.image_grid_pinpoints is not None:
            settings += [config.image_grid_pinpoints, config.vision_aspect_ratio]
        if hasattr(self, "visual_resampler"):
            parts["visual_resampler"] = self.visual_resampler
        if config.features_are_projected:
            parts["visual_projector"] = self.visual_projector
        if store == "keys_values":
            settings += [config.projector_hidden_act, config.text_config.rms_norm_eps, config.visual_layers]
            parts |= self.visual_modules()
        return weights_fingerprint(self, store, parts, settings)

    def visual_modules(self) -> dict[str, nn.Module]:
        """The modules between features and the keys and values of the layers."""
        parts = {"visual_projector": self.visual_projector} if hasattr(self, "visual_projector") else {}
        for index, layer in enumerate(self.language_model.layers):
            if layer.sees_image:
                parts |= {f"{index}.{name}": module for name, module in layer.visual_modules().items()}
        return parts

    def check_visual_states(self, states: SaisaVisualStates) -> None:
        """Raises ValueError, or TypeError, if `states` are not what this model's `get_visual_states` makes."""
        if not isinstance(states, SaisaVisualStates):
            raise TypeError(f"visual_states is a {type(states).__name__}: expected what get_visual_states returns.")
        self.checked_store(states.store)
        layers, dtype = self.language_model.layers, self.get_input_embeddings().weight.dtype
        config, again = self.config, "Compute them with this model: model.get_visual_states(pixel_values)."
        size = config.text_config.hidden_size if config.features_are_projected else config.vision_feature_size
        token_shape: tuple[int, ...] = (size,)
        if states.store == "keys_values":
            token_shape = (config.text_config.num_key_value_heads, layers[0].self_attn.head_dim)
        if states.num_layers and [bool(x) for x in states.stored.keys_values] != [layer.sees_image for layer in layers]:
            problem = f"has {states.num_layers} layers, the model {len(layers)}, or not those that see images. {again}"
        elif states.token_shape != token_shape:
            problem = f"has {states.token_shape} numbers a token, the model {token_shape}. {again}"
        elif states.dtype != dtype:
            problem = f"is {states.dtype}, the model {dtype}: cast them with visual_states.to({dtype})."
        elif states.fingerprint != (own := self.visual_fingerprint(states.store)):
            weights = f"fingerprint {states.fingerprint[:12]}, here {own[:12]}"
            problem = f"was computed with other weights or settings than this model's ({weights}). {again}"
        else:
            return
        raise ValueError(f"visual_states {problem}")

    def get_placeholder_mask(self, input_ids=None, inputs_embeds=None) -> Tensor:
        """bool (B, S), True where the row of `inputs_embeds` is the image token's, or where `input_ids` is, without them."""
        if inputs_embeds is None:
            return input_ids == self.config.image_token_id
        image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)
        return (inputs_embeds == self.get_input_embeddings()(image_token).to(inputs_embeds.dtype)).all(-1)

    def given_images(self, pixel_values, visual_states, encoder_arguments: dict, further: dict) -> GivenImages | None:
        """The images in `forward`'s arguments, encoded; `further` holds those that both encoder and decoder may know. Raises
        ValueError if `pixel_values` and `visual_states` are both given, or the states are another model's."""
        check_one_of(pixel_values, visual_states)
        if visual_states is not None:
            return self._given_states(visual_states)
        if pixel_values is None:
            return None
        arguments = {name: x for name, x in encoder_arguments.items() if x is not None} | {"pixel_values": pixel_values}
        if further:
            names = inspect.signature(getattr(self.vision_tower, "vision_model", self.vision_tower).forward).parameters
            arguments |= {name: further[name] for name in names if name in further}
        if len(pixel_values):
            features = list(self.get_image_features(return_dict=True, **arguments).pooler_output)
            return GivenImages("pixel_values", [len(image) for image in features], torch.cat(features))
        learns = self.training and torch.is_grad_enabled()
        return GivenImages("pixel_values", [], stored=self.no_features(**arguments) if learns else None)

    def _given_states(self, states: SaisaVisualStates) -> GivenImages:
        self.check_visual_states(states)
        if not len(states):
            return GivenImages("visual_states", [])
        keeps_features = states.store == "features"
        if keeps_features:
            states = states.compact()  # what is not asked for need not be projected
        rows, stored = states.rows(), states.stored.features if keeps_features else states.stored.keys_values
        # what becomes of a visual token may depend on the sample that it stands in
        if rows is not None and (self.config.in_embedding_space or (keeps_features and self.tells_samples_apart())):
            stored, rows = stored[rows], None
        return GivenImages("visual_states", states.lengths, stored=stored, rows=rows)

    def before_pass(self, images: GivenImages, visual_BS: Tensor) -> None:
        """Makes ready for a pass with `images` at visual positions. Raises ValueError if they do not fill them."""
        if self.folded is not None and not isinstance(images.stored, tuple):
            self.folded.follow(self)
        self.check_visual_tokens(images.name, images.lengths, int(visual_BS.sum()))

    @torch.compiler.disable  # shapes depend on token ids here and nowhere else: around it, compiled graphs are whole
    def layout_of(self, images: GivenImages, input_ids, inputs_embeds, attention_mask, position_ids) -> TokenLayout:
        """Where `images` are in an input. Raises ValueError if they do not fill its placeholders."""
        visual_BS = self.get_placeholder_mask(input_ids, inputs_embeds)
        self.before_pass(images, visual_BS)
        if not images.lengths:
            return TokenLayout(None)
        # in embedding space visual tokens are tokens like others, and so is padding, as in a LLaVA
        real_BS = None if self.config.in_embedding_space else real_tokens(attention_mask, visual_BS.shape[1])
        return TokenLayout(visual_BS, images.rows, position_ids, real_BS)

    @torch.compiler.disable
    def layout_of_outputs(self, kept, input_ids, inputs_embeds, attention_mask) -> TokenLayout:
        """Where images are in those outputs (B, S, ...) that the index `kept` leaves of the S of an input."""
        visual_BS = self.get_placeholder_mask(input_ids, inputs_embeds)
        real_BS = real_tokens(attention_mask, visual_BS.shape[1])
        return TokenLayout(visual_BS[:, kept], real_BS=None if real_BS is None else real_BS[:, kept])

    def layout_without_images(self, input_ids) -> TokenLayout:
        """That of text. Logs a line if `input_ids`, where given, have placeholders for an image."""
        if input_ids is not None and input_ids.shape[1] > 1 and not torch.compiler.is_compiling():
            placeholders = int((input_ids == self.config.image_token_id).sum())
            if placeholders >= max(self.config.image_seq_length, 2):
                warn_once(
                    f"input_ids has {placeholders} placeholders, but pixel_values is None: they are read as text."
                )
        return TokenLayout(None)

    def read_by_layers(self, images: GivenImages, layout: TokenLayout) -> Tensor | tuple | None:
        """What the decoder reads of `images`: features, or for each layer keys and values."""
        given = images.features if images.stored is None else images.stored
        return given if given is None or isinstance(given, tuple) else self.for_layers(given, layout)

    def for_layers(self, features: Tensor, layout: TokenLayout | None = None) -> Tensor:
        """What the decoder reads of features (V, C): these, or (V, D) past the projector if all layers share one."""
        features = features.to(self.get_input_embeddings().weight.dtype)
        if self.config.projector_sharing != "shared" or self.config.features_are_projected:
            return features
        projector = self.visual_projector if self.folded is None else self.folded.projector_of(self)
        if layout is None or layout.visual_BS is None or not tells_samples_apart([self.visual_projector]):
            return in_pieces(projector, features)
        return layout.visual(projector(layout.in_input_order(features)))

    def tells_samples_apart(self) -> bool:
        """Whether a hook of a module on the visual path wants to know which sample a row belongs to."""
        return tells_samples_apart(self.visual_modules().values())

    def check_visual_tokens(self, name: str, lengths: list[int], placeholders: int):
        """Raises ValueError if images of `lengths` visual tokens, the argument `name`, do not fill `placeholders`."""
        if sum(lengths) != placeholders:
            raise ValueError(
                f"{name} holds {len(lengths)} images with {sum(lengths)} visual tokens in all, but the input has "
                f"{placeholders} placeholders (image_token_id={self.config.image_token_id}). Expected as many placeholders "
                "as visual tokens: let the processor expand the prompt, and pass each image once."
            )
