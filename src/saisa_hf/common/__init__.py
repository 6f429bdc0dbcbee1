# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What several rooms need: things given by name, the place of a result, tables, plots, optional packages."""
