"""A process that has no saisa_hf: loads checkpoints by remote code and compares with what the saver computed.

    python remote_families.py FOLDER      for each FOLDER/name.safetensors, the checkpoint FOLDER/name

Every transformers release that the project supports runs this file.
"""

import sys
from pathlib import Path

import torch
from roundtrip import PackageBlocker, require_package_absent
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText


def run(model, inputs):
    """Logits on a padded batch of text and on a prompt with a picture, and greedy continuations of both."""
    text = {"input_ids": inputs["ids"], "attention_mask": inputs["mask"]}
    picture = {"input_ids": inputs["prompt"], "pixel_values": inputs["pixels"]}
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        found = {"text logits": model(**text).logits, "picture logits": model(**picture).logits}
        for name, given in (("text", text), ("picture", picture)):
            found[name] = model.generate(**given, **options)
    return {name: x.contiguous() for name, x in found.items()}


def main(folder):
    sys.meta_path.insert(0, PackageBlocker)
    require_package_absent()
    for file in sorted(Path(folder).glob("*.safetensors")):
        expected = load_file(file)
        # transformers 4.57 would run Gemma 2 without the bound on its scores
        choice = {"text_config": "eager"} if file.stem == "gemma2" else {}
        model, info = AutoModelForImageTextToText.from_pretrained(
            file.with_suffix(""), trust_remote_code=True, output_loading_info=True, attn_implementation=choice
        )
        wrong = {key: sorted(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]}
        assert not wrong, (file.stem, wrong)
        for name, x in run(model, {key: expected.pop(key) for key in ("ids", "mask", "prompt", "pixels")}).items():
            error = (x.double() - expected[name].double()).abs().max().item()
            assert error <= (1e-5 if x.is_floating_point() else 0), (file.stem, name, error)
        print(file.stem)
    builds_from_parts(model)


def builds_from_parts(model):
    """The class of `model`, remote code, makes another of a new language model and an encoder of the same configs."""
    theirs = AutoModelForCausalLM.from_config(model.config.text_config).eval()
    made = type(model).from_parts(theirs, AutoModel.from_config(model.config.vision_config), image_token_id=5)
    ids = torch.tensor([[1, 7, 9, 4]])
    with torch.no_grad():
        assert torch.equal(made(ids).logits, theirs(ids).logits)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
