# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Conversations with a model: in programs (`Conversation`) and in the terminal; and the chat templates of the package."""

from .conversation import Conversation


__all__ = ["Conversation"]
