# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What several rooms need: where a result is written, tables, plots, and things given by name."""
