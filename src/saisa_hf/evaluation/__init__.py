# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Benchmarks from their official files, and the score of a model on them."""
