# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Prints, as JSON, how `datasets` names a checkpoint's processor and config, and the file to which it maps with them:
`datasets_worker.py CHECKPOINT DATA_SET`. The package is not known here."""

import json
import sys


if __name__ == "__main__":
    sys.modules["saisa_hf"] = None
    checkpoint, folder = sys.argv[1:]
    from datasets import load_from_disk
    from datasets.fingerprint import Hasher
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)
    config = AutoConfig.from_pretrained(checkpoint, trust_remote_code=True)

    def encoded(row):
        return dict(processor(text=row["text"], images=row["image"]))

    found = {"new": Hasher.hash(processor), "config": Hasher.hash(config)}
    processor(text=["<s> yes", "no"], padding=True, truncation=True, max_length=4)
    found["used"] = Hasher.hash(processor)
    processor.image_seq_length = 35
    found["changed"] = Hasher.hash(processor)
    processor.image_seq_length = 36
    mapped = load_from_disk(folder).map(encoded, remove_columns=["text", "image"])
    found["file"] = mapped.cache_files[0]["filename"]
    found["placeholders"] = mapped[0]["input_ids"][0].count(processor.image_token_id)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    found["model"] = bool(Hasher.hash(model))
    print(json.dumps(found))
