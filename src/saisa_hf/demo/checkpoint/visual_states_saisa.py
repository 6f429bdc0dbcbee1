# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""SaisaVisualStates: pictures as the decoder layers see them, computed once and used with any number of prompts.

The keys (before rotation) and values of a picture are functions of the picture alone: they depend neither on the text nor
on where in it the picture stands.

Shape suffixes: V visual tokens of all stored pictures, K key/value heads, H head size, C width of the encoder's features.
"""

import hashlib
import json
import operator
import os
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .quantization_saisa import stored_tensors


FORMAT = "saisa visual states 1"


@dataclass(frozen=True)
class VisualStore:
    """The tensors behind one or several `SaisaVisualStates`.

    Attributes:
        lengths: visual tokens of each picture.
        features: (V, C) of the encoder, or None.
        keys_values: for each decoder layer the keys before rotation and the values, (V, K, H) each, or None for a layer that
            does not see the picture; None where `features` are stored instead.
        fingerprint: digest of the weights that they were computed with.

    In memory keys and values lie head by head, as in a cache, so that they go there in long stretches.
    """

    lengths: list[int]
    features: torch.Tensor | None
    keys_values: tuple[tuple[torch.Tensor, torch.Tensor] | None, ...] | None
    fingerprint: str

    def __post_init__(self):
        if self.keys_values is not None:
            by_head = tuple(None if pair is None else tuple(map(_head_by_head, pair)) for pair in self.keys_values)
            object.__setattr__(self, "keys_values", by_head)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name: `features`, or `keys.{layer}` and `values.{layer}`."""
        if self.features is not None:
            return {"features": self.features}
        pairs = [(index, pair) for index, pair in enumerate(self.keys_values) if pair is not None]
        return {f"{name}.{index}": x for index, pair in pairs for name, x in zip(("keys", "values"), pair)}

    def bounds(self) -> list[tuple[int, int]]:
        """First row and end of each picture."""
        return list(pairwise(accumulate(self.lengths, initial=0)))

    def map(self, function, lengths: list[int] | None = None) -> "VisualStore":
        """The same with `function` applied to each tensor."""
        keys_values = self.keys_values
        if keys_values is not None:
            keys_values = tuple(None if pair is None else tuple(map(function, pair)) for pair in keys_values)
        features = None if self.features is None else function(self.features)
        return VisualStore(self.lengths if lengths is None else lengths, features, keys_values, self.fingerprint)


class SaisaVisualStates:
    """Pictures as the decoder layers see them. `model.get_visual_states(pixel_values)` makes them, `forward` and `generate`
    take them as `visual_states` in place of `pixel_values`, the pictures in the order of their placeholders, row by row.

    A sequence of pictures: `len(states)` of them; `states[i]`, `states[a:b]` and `states[[2, 0, 0]]` select without a copy.
    Nothing in it changes once it is made. It takes part in no gradient.

    Args:
        stored: the tensors.
        order: which of the stored pictures it consists of, in which order. None: all of them.
    """

    def __init__(self, stored: VisualStore, order: Iterable[int] | None = None):
        self.stored = stored
        self.order = tuple(range(len(stored.lengths))) if order is None else tuple(order)

    # --- what they are ---

    @property
    def store(self) -> str:
        """`"keys_values"` or `"features"`."""
        return "features" if self.stored.features is not None else "keys_values"

    @property
    def lengths(self) -> list[int]:
        """Visual tokens of each picture, which is how many placeholders it takes."""
        return [self.stored.lengths[picture] for picture in self.order]

    @property
    def num_layers(self) -> int | None:
        """Decoder layers of the model that they belong to; None for `"features"`, which know nothing of them."""
        return None if self.stored.keys_values is None else len(self.stored.keys_values)

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Shape of what is kept of a visual token: (K, H) of keys or of values in each layer, or (C,) of features."""
        return tuple(self._any_tensor().shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of the tensors: the language model's, unless `to` has changed it."""
        return self._any_tensor().dtype

    @property
    def device(self) -> torch.device:
        """Where they are; on several devices, where the first layer's are."""
        return self._any_tensor().device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors that these pictures keep in memory, each counted once."""
        return sum(x.numel() * x.element_size() for x in self.stored.tensors().values())

    @property
    def fingerprint(self) -> str:
        """Digest of the weights that they were computed with."""
        return self.stored.fingerprint

    def __len__(self) -> int:
        return len(self.order)

    def __repr__(self) -> str:
        return (
            f"SaisaVisualStates({len(self)} images, {sum(self.lengths)} visual tokens, store={self.store!r}, "
            f"{self.dtype}, {self.device}, {self.nbytes / 2**20:.1f} MiB)"
        )

    # --- selecting and joining ---

    def __getitem__(self, index: "int | slice | Sequence[int] | torch.Tensor") -> "SaisaVisualStates":
        """
        Args:
            index: an integer (one picture), a slice, or a sequence or 1-D tensor of integers, in which pictures may repeat.

        Raises:
            IndexError: there is no such picture.
            TypeError: the index is none of these.
        """
        if isinstance(index, slice):
            return SaisaVisualStates(self.stored, self.order[index])
        if isinstance(index, torch.Tensor):
            index = index.tolist()
        indices = index if isinstance(index, Iterable) and not isinstance(index, str) else [index]
        if any(isinstance(i, bool) for i in indices):
            raise TypeError(f"{index!r} holds booleans: expected the indices of pictures.")
        try:
            return SaisaVisualStates(self.stored, [self.order[operator.index(i)] for i in indices])
        except IndexError:
            raise IndexError(f"{index!r} is out of range: there are {len(self)} pictures.") from None

    def expand(self, n: int) -> "SaisaVisualStates":
        """These pictures for each of `n` prompts, without a copy.

        Raises:
            ValueError: `n` is no positive integer.
        """
        if not isinstance(n, int) or isinstance(n, bool) or n < 1:
            raise ValueError(f"n={n!r}: expected the number of prompts, a positive integer.")
        return SaisaVisualStates(self.stored, self.order * n)

    @staticmethod
    def cat(states: "Sequence[SaisaVisualStates]") -> "SaisaVisualStates":
        """The pictures of several, one after the other. Their tensors are copied, each picture once.

        Raises:
            ValueError: `states` is empty, or they do not belong to the same model, differ in what they store, or in dtype.
        """
        states = list(states)
        if not states:
            raise ValueError("states is empty: expected at least one SaisaVisualStates.")
        for name in ("store", "fingerprint", "dtype"):
            values = {str(getattr(one, name)) for one in states}
            if len(values) > 1:
                raise ValueError(f"states differ in {name} ({', '.join(sorted(values))}): they cannot be joined.")
        if all(one.stored is states[0].stored for one in states):
            return SaisaVisualStates(states[0].stored, [picture for one in states for picture in one.order])
        parts = [one.compact() for one in states]
        order, first = [], 0
        for part in parts:
            order += [first + picture for picture in part.order]
            first += len(part.stored.lengths)
        lengths = [length for part in parts for length in part.stored.lengths]
        tensors = [iter(part.stored.tensors().values()) for part in parts]

        def join(x):
            return torch.cat([next(own).to(x.device) for own in tensors])

        return SaisaVisualStates(parts[0].stored.map(join, lengths), order)

    def to(self, *args, **kwargs) -> "SaisaVisualStates":
        """Moves and casts, with the arguments of `torch.Tensor.to`; each picture once."""
        compact = self.compact()
        return SaisaVisualStates(compact.stored.map(lambda x: x.to(*args, **kwargs)), compact.order)

    def __deepcopy__(self, memo):
        return self  # nothing in it changes; assisted decoding copies a model's arguments

    # --- on disk ---

    def save(self, path: str | os.PathLike) -> None:
        """Writes a safetensors file, each picture once. An interrupted write leaves what was there before."""
        path, compact = Path(path), self.compact()
        metadata = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "lengths": json.dumps(compact.stored.lengths),
            "order": json.dumps(compact.order),
            "layers": json.dumps(self.num_layers),
        }
        # a view would write all of what it is a view of
        tensors = {name: x.contiguous().cpu() for name, x in compact.stored.tensors().items()}
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            save_file(tensors, Path(folder) / path.name, metadata=metadata)
            os.replace(Path(folder) / path.name, path)

    @staticmethod
    def load(path: str | os.PathLike, device: str | torch.device = "cpu") -> "SaisaVisualStates":
        """Reads what `save` has written. Whether it belongs to a model shows when that is given it.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is something else, or damaged.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"{path}: no such file. Expected one that SaisaVisualStates.save has written.")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                tensors = dict(zip(file.keys(), map(file.get_tensor, file.keys())))
        except SafetensorError as error:
            raise ValueError(
                f"{path} is no safetensors file ({error}). Expected one of SaisaVisualStates.save."
            ) from None
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} holds no visual states: expected a file that SaisaVisualStates.save has written.")
        layers, keys_values = json.loads(metadata["layers"]), None
        if layers is not None:
            pairs = [(tensors.get(f"keys.{index}"), tensors.get(f"values.{index}")) for index in range(layers)]
            keys_values = tuple(None if key is None else (key, value) for key, value in pairs)
        lengths = json.loads(metadata["lengths"])
        stored = VisualStore(lengths, tensors.get("features"), keys_values, metadata["fingerprint"])
        return SaisaVisualStates(stored, json.loads(metadata["order"]))

    # --- for the model ---

    def rows(self) -> torch.Tensor | None:
        """(visual tokens,) rows of the stored tensors in the order of the placeholders; None: all of them as they are."""
        if self.order == tuple(range(len(self.stored.lengths))):
            return None
        bounds = self.stored.bounds()
        return torch.cat([torch.arange(*bounds[picture]) for picture in self.order])

    def _any_tensor(self) -> torch.Tensor:
        return next(iter(self.stored.tensors().values()))

    def compact(self) -> "SaisaVisualStates":
        """The same pictures without stored ones that are not among them."""
        used = list(dict.fromkeys(self.order))
        if used == list(range(len(self.stored.lengths))):
            return self
        all_bounds = self.stored.bounds()
        bounds = [all_bounds[picture] for picture in used]
        stored = self.stored.map(
            lambda x: torch.cat([x[first:end] for first, end in bounds]) if bounds else x[:0],
            [self.stored.lengths[picture] for picture in used],
        )
        return SaisaVisualStates(stored, [used.index(picture) for picture in self.order])


def _head_by_head(x_VKH: torch.Tensor) -> torch.Tensor:
    """The same tensor with the memory order (K, V, H); no copy if it has that."""
    return x_VKH.transpose(0, 1).contiguous().transpose(0, 1)


def weights_fingerprint(owner: torch.nn.Module, name: str, parts: dict[str, torch.nn.Module], settings: list) -> str:
    """A digest of all parameters of `parts` and of `settings`, remembered on `owner` under `name` until one of them changes.

    Floating-point weights are compared as bfloat16, so that a cast of a model keeps the digest. Weights that accelerate keeps
    elsewhere are read once.

    Raises:
        ValueError: a weight is on the meta device, and nothing tells where its values are.
    """
    # names are made for the digest alone: this is asked at every use; the encoder's differ between transformers releases
    found = []
    for module in parts.values():
        _collect_parameters(module, found)
    state = [_identity(p) for p in found if p is not None]
    remembered = owner.__dict__.setdefault("_weights_fingerprints", {})
    if name in remembered and remembered[name][0] == (state, settings):
        return remembered[name][1]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for part, module in parts.items():
        pieces = []
        for prefix, child in module.named_modules(prefix=part):
            for key, p in child._parameters.items():
                if p is None:
                    continue
                tensors = stored_tensors(child, key)
                if tensors is None:
                    raise ValueError(
                        f"{prefix}.{key} is on the meta device, and no hook of accelerate tells where its values are: visual "
                        "states cannot be told from those of another model. Load the weights with from_pretrained."
                    )
                shape = getattr(getattr(p, "quant_state", None), "shape", p.shape)
                shown = part if part == "vision_tower" else f"{prefix}.{key}"
                pieces.append(f"{shown} {tuple(shape)} ".encode() + b"".join(map(_sums, tensors)))
        for piece in sorted(pieces) if part == "vision_tower" else pieces:
            digest.update(piece)
    remembered[name] = ((state, settings), digest.hexdigest())
    return digest.hexdigest()


def _identity(p: torch.Tensor) -> tuple:
    """What changes when a parameter gets other values; nothing does for one that is kept elsewhere, of which there is a new
    stand-in at each use."""
    if p.is_meta:
        return ()
    has_storage = not hasattr(p, "__tensor_flatten__")
    return id(p), p.data_ptr() if has_storage else 0, 0 if p.is_inference() else p._version


def _collect_parameters(module: torch.nn.Module, found: list):
    found += module._parameters.values()
    for child in module._modules.values():
        if child is not None:
            _collect_parameters(child, found)


def _sums(p: torch.Tensor) -> bytes:
    """Sums of the bits of `p` along the rows and along the columns of a table: quick on any device, and every bit counts."""
    flat = p.detach().flatten()
    flat = flat.to(torch.bfloat16).view(torch.int16) if flat.is_floating_point() else flat.view(torch.uint8)
    table = torch.nn.functional.pad(flat, (0, -flat.numel() % 1024)).view(-1, 1024)
    sums = [table.sum(0, dtype=torch.int64), table.sum(1, dtype=torch.int64)]
    return b"".join(s.cpu().numpy().tobytes() for s in sums)
