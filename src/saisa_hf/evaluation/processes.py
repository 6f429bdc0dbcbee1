# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The processes that `accelerate launch` starts: each answers its share of the questions."""

import datetime
import io
import os
from collections.abc import Sequence
from typing import Any

from ..common.progress import Progress


LONGEST_WAIT = datetime.timedelta(days=7)  # shares take unlike times; minutes are the default


class Processes:
    """This process among those that work together; one alone unless it was started by a launcher.

    Args:
        device: `"cpu"` keeps all of them on the CPU; with several processes everything else is one accelerator for each.

    Attributes:
        count: how many there are.
        index: which of them this is.
        device: what this one computes on.
    """

    def __init__(self, device: str):
        self.count, self.index, self.device, self._state = 1, 0, device, None
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            import torch
            from accelerate import PartialState

            without = device == "cpu" or not torch.accelerator.is_available()
            self._state = PartialState(cpu=without, timeout=LONGEST_WAIT)
            self.count, self.index = self._state.num_processes, self._state.process_index
            self.device = str(self._state.device)

    @property
    def first(self) -> bool:
        """Whether this is the one that writes results."""
        return self.index == 0

    def share(self, everything: Sequence[Any]) -> Sequence[Any]:
        """What this process does of `everything`: a stretch, so that questions about the same image stay together."""
        ends = [len(everything) * number // self.count for number in (self.index, self.index + 1)]
        return everything[slice(*ends)]

    def progress(self, total: int, what: str) -> Progress:
        """Shows how far this process is, and how many images it has seen, if it is the first."""
        what = what if self.count == 1 else f"{what} of process {self.index + 1} of {self.count}"
        return Progress(total, what, "images", None if self.first else io.StringIO())

    def wait(self) -> None:
        """Until all processes are here."""
        if self._state is not None:
            self._state.wait_for_everyone()
