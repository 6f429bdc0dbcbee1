# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Many questions about images, answered in batches."""

from .engine import Answerer
from .questions import Answer, Likelihood, Question


__all__ = ["Answer", "Answerer", "Likelihood", "Question"]
