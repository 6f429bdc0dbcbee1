# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Images that several questions are about: opened and encoded once, and kept within a bound."""

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ..images_saisa import load_image
from ..processing_saisa import Video
from ..visual_states_saisa import SaisaVisualStates


def opened(image: Any) -> Any:
    """`image` as a PIL image; a `Video` as it is. Raises ValueError, which names it, if it cannot be read."""
    if isinstance(image, Video):
        return image
    return load_image(image, f"image {image!r:.300}" if isinstance(image, str) else "the image")


def _opened_or_error(image: Any) -> Any:
    try:
        return opened(image)
    except ValueError as error:
        return error


class KeptImages:
    """The visual states of images, the least recently used of them dropped when they take more memory than allowed.

    Args:
        model, processor: that they are of.
        most: bytes of states to keep.
        at_once: images that the encoder sees at a time.
    """

    def __init__(self, model: Any, processor: Any, most: int, at_once: int):
        self.model, self.processor, self.most, self.at_once = model, processor, most, at_once
        self.nbytes = self.largest = 0
        # by name; with the image, which holds on to the identity of its name
        self._states: OrderedDict[Hashable, tuple[Any, SaisaVisualStates]] = OrderedDict()
        self.errors: dict[Hashable, str] = {}

    def __contains__(self, name: Hashable) -> bool:
        return name in self._states

    def room(self) -> int:
        """How many images fit in, at least one; only one until it is known how much it takes."""
        return max(1, self.most // self.largest) if self.largest else 1

    def encode(self, images: Mapping[Hashable, Any]) -> None:
        """Takes in those of `images` that are not there yet. What cannot be read gets an entry in `errors`."""
        self.errors.clear()
        for name in images:
            if name in self._states:
                self._states.move_to_end(name)
        self._drop(images, self.largest * len(images.keys() - self._states.keys()))
        missing = [name for name in images if name not in self._states]
        for start in range(0, len(missing), self.at_once):
            names = missing[start : start + self.at_once]
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:  # Pillow lets other threads run while it decodes
                found = dict(zip(names, pool.map(_opened_or_error, [images[name] for name in names])))
            self.errors |= {name: str(one) for name, one in found.items() if isinstance(one, ValueError)}
            new = {name: one for name, one in found.items() if name not in self.errors}
            self._take({name: images[name] for name in new}, new)
        self._drop(images)

    def _drop(self, needed: Mapping[Hashable, Any], coming: int = 0) -> None:
        """Drops what is over the bound when `coming` more bytes are in, but nothing that is `needed`."""
        while self._states and self.nbytes + coming > self.most and next(iter(self._states)) not in needed:
            _, (_, states) = self._states.popitem(last=False)
            self.nbytes -= states.nbytes

    def _take(self, images: Mapping[Hashable, Any], pictures: Mapping[Hashable, Any]) -> None:
        if not pictures:
            return
        try:
            inputs = self.processor(images=list(pictures.values()), return_tensors="pt")
        except ValueError as error:
            if len(pictures) == 1:
                self.errors.update(dict.fromkeys(pictures, str(error)))
                return
            for name, picture in pictures.items():  # which one is it?
                self._take({name: images[name]}, {name: picture})
            return
        states = self.model.get_visual_states(**inputs.to(self.model.device))
        for index, name in enumerate(pictures):
            one = states[index].compact() if len(states) > 1 else states
            self._states[name] = (images[name], one)
            self.nbytes += one.nbytes
            self.largest = max(self.largest, one.nbytes)

    def of(self, names: Iterable[Hashable]) -> SaisaVisualStates:
        """The states of images that are there, one after the other; each is copied once."""
        names = list(names)
        distinct = list(dict.fromkeys(names))
        joined = SaisaVisualStates.cat([self._states[name][1] for name in distinct])
        return joined[torch.tensor([distinct.index(name) for name in names])]

    def clear(self) -> None:
        """Forgets all of them."""
        self._states.clear()
        self.nbytes = 0
