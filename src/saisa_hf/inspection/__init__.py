# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Looking inside a model: attention maps, redundant layers, and what NAAViT does to a LLaVA."""
