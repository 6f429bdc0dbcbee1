# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Foreign weights in, new models out: build, convert, fit to a LLaVA, upgrade."""
