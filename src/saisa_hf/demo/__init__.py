# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa demo`: a small SAISA that answers questions about images of handwritten digits, and how it was trained."""

from pathlib import Path


CHECKPOINT = Path(__file__).parent / "checkpoint"
