# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The LLaVA's visual states, layer by layer: on disk at the input of one layer, and of the next while they are computed."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from .teacher import Teacher
from .work_folder import Workbench, rows_on_disk


class VisualStates:
    """The hidden states of the LLaVA's visual tokens at the input of one decoder layer at a time, of all images.

    They are in the work folder, under the layer's number, row by row like the features. In a causal LLaVA they depend on
    nothing but the image and the text in front of it, whose own states are kept in memory.
    """

    def __init__(self, bench: Workbench, teacher: Teacher):
        config = bench.model.config
        self.bench, self.teacher = bench, teacher
        self.shape = (len(bench.features), config.text_config.hidden_size)
        self.at_once = max(1, bench.fit.batch_tokens // max(bench.lengths))  # images
        prefix = torch.tensor([bench.prefix], dtype=torch.long, device=bench.device)
        self._prefix = bench.model.get_input_embeddings()(prefix)  # (1, S, D)
        self._layer = -1  # at whose input the states are; -1: not begun
        self._states = torch.empty(0)

    def at(self, index: int) -> torch.Tensor:
        """(R, D) on disk: the states at the input of layer `index`, not in front of where they are already."""
        if self._layer < 0:
            self._begin(index)
        while self._layer < index:
            self._advance()
        return self._states

    def remove(self) -> None:
        """Deletes the files."""
        self._states = torch.empty(0)
        for file in self.bench.folder.glob("states-*.bin"):
            file.unlink()

    def _begin(self, index: int) -> None:
        """Takes the states nearest to layer `index` that an earlier run left, or those at layer 0, which it computes."""
        found = [number for number in range(index, -1, -1) if self._file(number).exists()]
        self._layer = found[0] if found else 0
        if not found:
            target = self._new_file()
            for images in self._batches():
                visual = self.teacher.projector(self.bench.rows(self.bench.seen, images))
                target[self.bench.span(images)] = visual.to(target.dtype).cpu()
            del target
            self._finish_file(0)
        for number in range(self._layer):
            self._advance_prefix(number)
        self._open()

    def _advance(self) -> None:
        """Moves the states to the input of the next layer."""
        target = self._new_file()
        front = self._prefix.shape[1]
        for images in self._batches():
            each = self.bench.rows(self._states, images).split([self.bench.lengths[image] for image in images])
            visual = pad_sequence(list(each), batch_first=True)  # what stands behind an image changes nothing in it
            whole = torch.cat([self._prefix.expand(len(visual), -1, -1), visual], dim=1)
            states = self.teacher.advance(self._layer, whole)[:, front:]
            target[self.bench.span(images)] = torch.cat([own[: len(x)] for own, x in zip(states, each)]).cpu()
        self._advance_prefix(self._layer)
        del target
        self._states = torch.empty(0)  # closes the file
        self._finish_file(self._layer + 1)
        self._file(self._layer).unlink(missing_ok=True)
        self._layer += 1
        self._open()

    def _batches(self) -> Iterator[range]:
        count = len(self.bench.lengths)
        return (range(first, min(first + self.at_once, count)) for first in range(0, count, self.at_once))

    def _advance_prefix(self, layer: int) -> None:
        if self._prefix.shape[1]:
            self._prefix = self.teacher.advance(layer, self._prefix)

    def _file(self, layer: int) -> Path:
        return self.bench.folder / f"states-{layer}.bin"

    def _new_file(self) -> torch.Tensor:
        return rows_on_disk(self.bench.folder / "states.part", self.shape, self._prefix.dtype, create=True)

    def _finish_file(self, layer: int) -> None:
        os.replace(self.bench.folder / "states.part", self._file(layer))

    def _open(self) -> None:
        self._states = rows_on_disk(self._file(self._layer), self.shape, self._prefix.dtype)
