# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""A demo on real input: handwritten digits in coloured ink, and a small SAISA that answers questions about them."""
