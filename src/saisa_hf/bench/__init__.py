# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa bench`: speed and memory of SAISA beside other ways to read images, on the same work in the same run."""
