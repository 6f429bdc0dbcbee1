# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""How far a long run has come, on stderr: one line that changes on a terminal, elsewhere a line now and then."""

import shutil
import sys
import time
from typing import TextIO


OF_A_TERMINAL, ELSEWHERE = 0.5, 30.0  # seconds between two lines


class Progress:
    """Counts what is done of a run. A context manager: what it has shown last stays at the end.

    Args:
        total: how many there are to do.
        what: what they are, in the plural.
        others: what else is counted, in the plural; empty: nothing.
        stream: where it is shown; None: stderr.
    """

    def __init__(self, total: int, what: str = "questions", others: str = "", stream: TextIO | None = None):
        self.total, self.what, self.others = total, what, others
        self.stream = sys.stderr if stream is None else stream
        self.done = self.done_others = 0
        self._begun = self._shown = time.monotonic()
        self._terminal = self.stream.isatty()

    def add(self, count: int = 1, others: int = 0) -> None:
        """So many more are done."""
        self.done, self.done_others = self.done + count, self.done_others + others
        if time.monotonic() - self._shown >= (OF_A_TERMINAL if self._terminal else ELSEWHERE):
            self._show()

    def text(self) -> str:
        """What there is to say."""
        seconds = max(time.monotonic() - self._begun, 1e-9)
        parts = [f"{self.done} of {self.total} {self.what}", f"{self.done / seconds:.2f} a second"]
        if self.others:
            parts.append(f"{self.done_others / seconds:.2f} {self.others} a second")
        left = (self.total - self.done) * seconds / self.done if self.done else None
        parts.append(f"{_clock(seconds)} so far" if self.done == self.total else f"{_clock(left)} left")
        return ", ".join(parts)

    def _show(self) -> None:
        self._shown = time.monotonic()
        width = shutil.get_terminal_size().columns - 1  # a longer line would go on in the next one, and stay
        self.stream.write(f"\r{self.text()[:width]}\x1b[K" if self._terminal else f"{self.text()}\n")
        self.stream.flush()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self._terminal:
            self._show()
            self.stream.write("\n")
        elif self._shown > self._begun and error[0] is None:
            self._show()


def _clock(seconds: float | None) -> str:
    """A time in hours, minutes and seconds; "?": it is not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
