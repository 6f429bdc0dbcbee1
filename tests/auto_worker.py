# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Prints, as JSON, what transformers' Auto classes and pipelines make of a checkpoint: `auto_worker.py FOLDER PICTURE BY`,
where BY is "package" or "remote_code"."""

import json
import sys

import transformers
from PIL import Image
from transformers import AutoConfig, AutoModelForPreTraining, AutoTokenizer, pipeline


if __name__ == "__main__":
    folder, picture, by = sys.argv[1:]
    if by == "package":
        import saisa_hf  # noqa: F401
    else:
        sys.modules["saisa_hf"] = None
    transformers.logging.set_verbosity_error()
    trust = {"trust_remote_code": by == "remote_code"}
    config = AutoConfig.from_pretrained(folder, **trust)
    model = AutoModelForPreTraining.from_pretrained(folder, **trust)
    found = {"AutoModelForPreTraining": type(model).__name__}
    found["from_config"] = type(AutoModelForPreTraining.from_config(config, **trust)).__name__

    options = {"max_new_tokens": 4, "do_sample": False}
    write = pipeline("text-generation", folder, **trust)
    found["model of text-generation"] = type(write.model).__name__
    found["text-generation"] = sorted(write("Hello", **options)[0])
    chat = write([{"role": "user", "content": "Hello"}], **options)[0]["generated_text"]
    found["chat"] = [turn["role"] for turn in chat]
    tokenizer = AutoTokenizer.from_pretrained(folder, **trust)
    given = pipeline("text-generation", model, tokenizer=tokenizer)("Hello", **options)[0]["generated_text"]
    whole = write("Hello", **options)[0]["generated_text"]
    found["a model that is given says the same"] = given == whole and whole.startswith("Hello")

    see = pipeline("image-text-to-text", folder, **trust)
    found["model of image-text-to-text"] = type(see.model).__name__
    image = Image.open(picture)
    content = [{"type": "image", "image": image}, {"type": "text", "text": "Hi"}]
    asked = see(text=[{"role": "user", "content": content}], generate_kwargs=options)[0]["generated_text"]
    found["question"] = [turn["role"] for turn in asked]
    plain = see(images=image, text="<image>\nHi", generate_kwargs=options)[0]
    found["image-text-to-text"] = [sorted(plain), plain["input_text"]]
    print(json.dumps(found))
