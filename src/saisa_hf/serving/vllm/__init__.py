# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""SAISA in vLLM: visual tokens are keys and values in the paged cache and nothing else.

vLLM finds `registration.register` by the entry point `vllm.general_plugins`. The decoder is vLLM's own, unmodified. In front
of it, keys and values of a step's visual tokens are computed for all layers and written into the cache (`visual.py`); then
the text rows alone pass the decoder, each run of text as a sequence of its own (`runs.py`, `metadata.py`).
"""
