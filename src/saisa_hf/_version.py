# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The version of the package, and nothing else: building reads it without importing anything."""

__version__ = "0.1.0"
