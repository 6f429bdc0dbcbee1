# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""New checkpoints from other models' weights (build, convert, from_llava), and new code for old checkpoints (upgrade)."""
