# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Answers for many images: a folder or a table in, a table with the answers out."""
