# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Values from outside in error messages."""

import reprlib
from typing import Any


class _Short(reprlib.Repr):
    """`repr` of anything, cut where it gets long or deep, without what cannot be printed."""

    def __init__(self):
        super().__init__()
        self.maxstring = self.maxother = self.maxlong = 100
        self.maxlevel, self.maxlist, self.maxdict = 3, 4, 4

    def __call__(self, value: Any) -> str:
        try:
            text = printable(self.repr(value))
        except Exception:  # a number of too many digits, or what another library's object raises
            return f"a {type(value).__name__}"
        return text if len(text) <= 200 else f"{text[:200]}..."


shown = _Short()


def printable(text: str) -> str:
    """`text` with escapes in place of halves of characters, which no file or terminal takes."""
    return text.encode("utf-8", "backslashreplace").decode()
