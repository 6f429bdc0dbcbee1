# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a model costs before it is made, from its configuration: FLOPs (`flops.py`) and memory (`memory.py`)."""
