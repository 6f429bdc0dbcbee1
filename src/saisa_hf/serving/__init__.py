# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint behind HTTP, in OpenAI's format, for clients that nobody vouches for."""
