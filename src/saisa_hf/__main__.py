# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`python -m saisa_hf`: the same as the console script `saisa`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
