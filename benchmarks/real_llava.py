# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""From LLaVA to SAISA at a depth of 30 layers: the LLaVA that `real_weights.py` trained becomes a SAISA by fitting its
projectors, without any training of the language model, and stands beside the SAISA that was trained for as long.

    python benchmarks/real_llava.py --work FOLDER --study benchmarks/real_weights.json --json benchmarks/real_llava.json

FOLDER is that of `real_weights.py`. Each way to fit is a piece of its own; what is in the file already is not computed again,
and one that was interrupted goes on.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from real_training import StoredFeatures, perplexity, right
from real_weights import EXAMS, Study, digits
from safetensors.torch import load_file

from saisa_hf import SaisaForConditionalGeneration
from saisa_hf.bench import measure
from saisa_hf.checkpoints.from_llava import Fit, from_llava
from saisa_hf.vision_saisa import as_vision_tower


PROMPTS = ("What is shown here?", "How many things are there?", "What is in the top left?", "Describe the picture.")
WAYS = {  # name -> what is not as in `FIT`
    "all layers": {},
    "all layers, distilled": {"distill_steps": 100},
    "a quarter of the width": {"projector_hidden_size": 144},
    "eight layers": {"visual_layers": "auto:8", "choose_on": 8},
}
FIT = {"study": {"pictures": 1064, "held_out": 64, "steps": 200, "answer_tokens": 24}}
FIT["smoke"] = {"pictures": 12, "held_out": 4, "steps": 1, "answer_tokens": 4}


def llava_of(study: Study) -> Path:
    """The trained LLaVA as a checkpoint with its encoder."""
    folder = study.work / "llava"
    if not folder.is_dir():
        model = study.model("llava", 0)
        trained = load_file(study.work / "trained-llava.safetensors")
        found = model.load_state_dict(trained, strict=False)
        missing = [key for key in found.missing_keys if "vision_tower" not in key and key != "lm_head.weight"]
        if missing or found.unexpected_keys:
            raise ValueError(f"trained-llava.safetensors is not a LLaVA's: {[*missing, *found.unexpected_keys][:3]}")
        model.model.vision_tower = as_vision_tower(study.encoder)
        part = folder.with_name("llava.part")
        model.save_pretrained(part)
        study.processor.save_pretrained(part)
        part.rename(folder)
    return folder


def pictures_of(study: Study, count: int) -> Path:
    """A folder of scenes of training, which are the images to fit on."""
    folder = study.work / "pictures"
    folder.mkdir(exist_ok=True)
    for number in range(count):
        if not (file := folder / f"{number:05}.png").exists():
            study.scene("train", number).picture.save(file)
    return folder


def examined(study: Study, model: SaisaForConditionalGeneration) -> dict:
    """Which answers are right, and the perplexity of text."""
    model.model.vision_tower = StoredFeatures()
    found = {exam: digits(right(model, study.samples(exam))) for exam in EXAMS}
    return found | {"perplexity": perplexity(model, study.passages())}


def way(study: Study, source: Path, name: str, sizes: str) -> dict:
    """One way to fit: what `saisa build --from-llava` reports, and how the result does."""
    fit = Fit(**FIT[sizes] | WAYS[name])
    destination = study.work / f"from-llava-{name.replace(' ', '-').replace(',', '').replace(':', '-')}"
    work = destination.with_name(f"{destination.name}.work")
    images = pictures_of(study, fit.pictures)
    report = from_llava(source, images, destination, fit=fit, prompts=PROMPTS, work_folder=work, overwrite=True)
    found = {key: report[key] for key in ("agreement", "visual_layers", "seconds", "pictures")}
    found |= {key: report[key] for key in ("least", "by_number") if key in report}
    found["errors"] = report["layers"]
    return found | examined(study, SaisaForConditionalGeneration.from_pretrained(destination, dtype=torch.float32))


def main(argv=None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", metavar="FOLDER", type=Path, required=True, help="that of real_weights.py")
    parser.add_argument("--study", metavar="PATH", type=Path, required=True, help="the results of real_weights.py")
    parser.add_argument("--json", metavar="PATH", type=Path, required=True, help="all results")
    parser.add_argument("--sizes", choices=FIT, default="study", help="(default: %(default)s)")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="(default: all)")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's (default: %(default)s)")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    study = Study(args.work, args.study, args.sizes, math.inf)
    result = (
        json.loads(args.json.read_text(encoding="utf-8"))
        if args.json.exists()
        else {"settings": FIT[args.sizes], "ways": {}}
    )
    source = llava_of(study)
    if "llava" not in result:  # as it is written, in bfloat16
        result["llava"] = examined(study, SaisaForConditionalGeneration.from_pretrained(source, dtype=torch.float32))
    for name in args.ways:
        if name not in result["ways"]:
            result["ways"][name] = way(study, source, name, args.sizes)
            measure.write_json(str(args.json), result)
    return result


if __name__ == "__main__":
    main()
