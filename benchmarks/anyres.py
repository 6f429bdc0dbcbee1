# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What tiles are worth, and whether they survive the way from a LLaVA-NeXT to a SAISA: digits that are too small in the whole
image, at the size that the encoder takes, are read in its tiles. Trains a tiny LLaVA-NeXT on such images, and reports the
accuracy of it, of its base image alone, and of the SAISA fitted from it, with the agreement of next-token distributions.
Then time, memory and FLOPs of one image in tiles, beside transformers' LLaVA-NeXT of the same language model.

    python benchmarks/anyres.py --json benchmarks/anyres.json --tables docs/high_resolution.md

What is in the file already is not computed again; the LLaVA-NeXT is kept in a folder, and its training resumes.
"""

import argparse
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from digit_models import adamw, keep, new_llava, training_step
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
)

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.answering import Answerer
from saisa_hf.answering import Question as Asked
from saisa_hf.bench import measure
from saisa_hf.checkpoints.from_llava import (
    Fit,
    Teacher,
    Workbench,
    agreement,
    answered,
    distill,
    fit_projectors,
    processor_from_llava,
    saisa_from_llava,
)
from saisa_hf.common.tables import fill_blocks, table
from saisa_hf.demo import CHECKPOINT
from saisa_hf.demo.encoder import PATCH
from saisa_hf.demo.language import CHAT_TEMPLATE, IMAGE, Conversation, make_tokenizer
from saisa_hf.demo.scenes import INKS, LISTS, NOTHING, SIZE, draw, make_scene
from saisa_hf.demo.train import padded_turns


# rows and columns of tiles -> the names of the tiles' places
SHAPES = {
    (1, 2): ("middle left", "middle right"),
    (2, 1): ("top center", "bottom center"),
    (2, 2): ("top left", "top right", "bottom left", "bottom right"),
}
PINPOINTS = [[SIZE * rows, SIZE * columns] for rows, columns in SHAPES]
BATCH, RATE, LIST_SHARE = 16, 1e-3, 0.2  # of the training time, lists alone come first
PROMPTS = (LISTS["inks"], LISTS["digits"])
STAGES = ("copied", "fitted", "distilled")


# --- images and questions ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TiledScene:
    """An image of `shape` tiles, each with one digit somewhere in it: (place, digit, ink) of each, all different."""

    shape: tuple[int, int]
    digits: tuple[tuple[str, str, str], ...]
    image: Image.Image


def make_tiled_scene(split: str, rng: np.random.Generator) -> TiledScene:
    """A random scene of handwriting of `split`."""
    shape = tuple(SHAPES)[rng.integers(len(SHAPES))]
    found: list = []
    while len(found) < shape[0] * shape[1]:
        scene = make_scene(split, rng, n_digits=1)
        (glyph,) = scene.glyphs
        if all(glyph.digit != other.glyphs[0].digit and glyph.ink != other.glyphs[0].ink for other in found):
            found.append(dataclasses.replace(scene, paper=found[0].paper if found else scene.paper))
    tiles = np.stack([draw(scene) for scene in found]).reshape(*shape, SIZE, SIZE, 3)
    whole = tiles.transpose(0, 2, 1, 3, 4).reshape(shape[0] * SIZE, shape[1] * SIZE, 3)
    glyphs = [scene.glyphs[0] for scene in found]
    digits = tuple((place, str(g.digit), g.ink) for place, g in zip(SHAPES[shape], glyphs))
    return TiledScene(shape, digits, Image.fromarray(whole))


def questions(scene: TiledScene) -> list[tuple[str, str]]:
    """All questions about a scene, with their answers."""
    asked = [(f"Which digit is in the {place}?", digit) for place, digit, _ in scene.digits]
    asked += [(f"Which digit is {ink}?", digit) for _, digit, ink in scene.digits]
    return asked + [(f"What colour is the {digit}?", ink) for _, digit, ink in scene.digits]


def lists(scene: TiledScene) -> list[tuple[str, str]]:
    """Exercises that make the model look up everything."""
    by_ink, by_digit = ({row[key]: row[other] for row in scene.digits} for key, other in ((2, 1), (1, 2)))
    inks = ", ".join(f"{ink} {by_ink.get(ink, NOTHING)}" for ink in INKS)
    digits = ", ".join(f"{digit} {by_digit.get(digit, NOTHING)}" for digit in "0123456789")
    return [(LISTS["inks"], inks), (LISTS["digits"], digits)]


def held_out(count: int) -> list[tuple[TiledScene, tuple[str, str]]]:
    """`count` fresh scenes of held-out handwriting with one question each."""
    asked = []
    for index in range(count):
        rng = np.random.default_rng([5, index])
        scene = make_tiled_scene("test", rng)
        own = questions(scene)
        asked.append((scene, own[rng.integers(len(own))]))
    return asked


# --- models -----------------------------------------------------------------------------------------------------------


def make_processor() -> SaisaProcessor:
    """transformers' image processor of LLaVA-NeXT at the demo's size, and the demo's tokenizer."""
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    settings = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return SaisaProcessor(
        image_processor, make_tokenizer(), chat_template=CHAT_TEMPLATE, tokenize_whole=True, **settings
    )


def new_llava_next(processor: SaisaProcessor, depth: int) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT of the demo's encoder and, so that an hour of training is enough, of its language model, which knows its
    words and has answered questions about images of one tile."""
    plain = new_llava(processor, depth)
    demo = SaisaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32)
    words = {name: x for name, x in demo.language_model.state_dict().items() if "visual_projector" not in name}
    plain.model.language_model.load_state_dict(words)
    plain.lm_head.load_state_dict(demo.lm_head.state_dict())
    plain.model.multi_modal_projector.load_state_dict(demo.language_model.layers[0].visual_projector.state_dict())
    config = {**plain.config.to_dict(), "image_grid_pinpoints": PINPOINTS}
    model = LlavaNextForConditionalGeneration(LlavaNextConfig.from_dict(config))
    model.load_state_dict(plain.state_dict(), strict=False)
    return model


def batches(processor: SaisaProcessor, seed: int, step: int, only_lists: bool) -> dict[str, torch.Tensor]:
    """A training batch, as transformers' LLaVA-NeXT takes it: a function of (seed, step) alone."""
    scenes, items = [], []
    for index in range(BATCH):
        rng = np.random.default_rng([seed, step, index])
        scene = make_tiled_scene("train", rng)
        turns = lists(scene) if only_lists or rng.random() < 0.2 else questions(scene)
        scenes.append((scene, [turns[i] for i in rng.permutation(len(turns))[:8]]))
    images = processor(images=[scene.image for scene, _ in scenes], return_tensors="pt")
    counts = processor._counts(images)
    for (_, turns), count in zip(scenes, counts):
        ids, labels = Conversation(processor.tokenizer, count).ids_and_labels(turns)
        items.append({"ids": ids, "labels": labels})
    images = {name: images[name] for name in ("pixel_values", "image_sizes")}
    return padded_turns(items, processor.tokenizer.pad_token_id) | images


def train(model, processor: SaisaProcessor, seed: int, steps: int, kept: Path) -> dict:
    """Trains everything but the encoder in place. The state is kept at intervals; an interrupted training resumes."""
    model.model.vision_tower.requires_grad_(False)
    optimizer, first, earlier = adamw(model), 0, 0.0
    if kept.exists():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, earlier = state["step"], state["seconds"]
    start = time.process_time()
    model.train()
    for step in range(first, steps):
        only_lists = step < LIST_SHARE * steps
        loss = training_step(model, optimizer, batches(processor, seed, step, only_lists), step / steps, RATE)
        if step % 25 == 24:
            spent = earlier + time.process_time() - start
            print(f"step {step + 1} of {steps}: loss {loss:.3f}, {spent:.0f} s", flush=True)
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            keep({**state, "seconds": spent}, kept)
    model.eval()
    return {"steps": steps, "processor_seconds": round(earlier + time.process_time() - start, 1)}


def trained(args) -> tuple[Path, dict]:
    """The folder of the LLaVA-NeXT, and the record of its training. Trains it if it is not there."""
    folder = Path(args.models) / f"llava-next-depth-{args.depth}-steps-{args.steps}"
    if not (folder / "training.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        processor, kept = make_processor(), folder.with_suffix(".training")
        model = new_llava_next(processor, args.depth)
        record = train(model, processor, 0, args.steps, kept)
        model.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(record))
        kept.unlink(missing_ok=True)
    return folder, json.loads((folder / "training.json").read_text())


# --- accuracy ---------------------------------------------------------------------------------------------------------


def accuracy(model, processor: SaisaProcessor, count: int) -> dict[str, float]:
    """The share of exact matches of greedy answers about held-out handwriting: of all, and of those that are digits."""
    asked = held_out(count)
    answerer = Answerer(model, processor, batch_size=25, max_new_tokens=4, strict=True)
    answers = [a.text for a in answerer.answer(Asked(text, [scene.image]) for scene, (text, _) in asked)]
    right = [(answer == wanted, wanted.isdigit()) for answer, (_, (_, wanted)) in zip(answers, asked)]
    digits = [is_right for is_right, is_digit in right if is_digit]
    return {"accuracy": sum(r for r, _ in right) / len(right), "digits": sum(digits) / len(digits)}


def unlabelled(count: int) -> list[Image.Image]:
    return [make_tiled_scene("train", np.random.default_rng([77, index])).image for index in range(count)]


def llava_cells(args) -> Iterator[tuple[str, dict]]:
    """The LLaVA-NeXT with its tiles, and its base image alone."""
    folder, record = trained(args)
    for name, settings in (("llava", {}), ("base image alone", {"image_grid_pinpoints": None})):
        model = SaisaForConditionalGeneration.from_pretrained(folder, **settings).eval()
        processor = processor_from_llava(make_processor(), model.config)
        tokens = [len(processor(images=im, text=IMAGE)["input_ids"][0]) - 1 for im in unlabelled(40)]
        found = {**accuracy(model, processor, args.questions), "visual_tokens": float(np.mean(tokens))}
        yield name, {**record, **found}


def fit_cells(args) -> Iterator[tuple[str, dict]]:
    """The SAISA of it, with LLaVA's projector and newline copied into every layer, then fitted, then distilled."""
    llava = LlavaNextForConditionalGeneration.from_pretrained(trained(args)[0]).eval()
    model = saisa_from_llava(llava)
    processor, teacher = processor_from_llava(make_processor(), model.config), Teacher.of(model, llava)
    fit = Fit(
        pictures=args.pictures + args.held_out,
        held_out=args.held_out,
        steps=args.fit_steps,
        distill_steps=args.distill_steps,
        answer_tokens=32,
    )
    with tempfile.TemporaryDirectory() as folder:
        images = unlabelled(fit.pictures)
        bench = Workbench(model, processor, images, folder, fit, PROMPTS, log=lambda line: None, embed=teacher.embed)
        rows = answered(bench, teacher, bench.held_out, "held-out.json")
        layers, start = [], time.process_time()
        for stage in STAGES:
            if stage == "fitted":
                layers = fit_projectors(bench, teacher)
            elif stage == "distilled":
                distill(bench, teacher)
            seconds = round(time.process_time() - start, 1)
            found = {**agreement(bench, teacher, rows), **accuracy(model, processor, args.questions)}
            yield stage, {**found, "processor_seconds": seconds, **({"layers": layers} if stage == "fitted" else {})}
            start = time.process_time()


# --- costs ------------------------------------------------------------------------------------------------------------


def costs(args) -> dict:
    """One prompt of 64 text tokens and one square image of five pictures, of SAISA and of transformers' LLaVA-NeXT with the
    same sizes: CPU seconds and FLOPs of a forward pass, and the memory that it takes beyond the weights."""
    vision = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 2, "num_attention_heads": 3}
    vision |= {"image_size": 336, "patch_size": 14}
    text = {"vocab_size": 2000, "hidden_size": args.width, "intermediate_size": 11 * args.width // 4}
    text |= {"num_hidden_layers": 8, "num_attention_heads": args.width // 64, "num_key_value_heads": args.width // 64}
    text |= {"max_position_embeddings": 8192}
    pinpoints = [[336, 672], [672, 336], [672, 672]]
    shared = {"image_token_index": 1999, "image_grid_pinpoints": pinpoints}
    shared |= {"vision_config": CLIPVisionConfig(**vision, projection_dim=64), "text_config": LlamaConfig(**text)}
    llava = LlavaNextForConditionalGeneration(LlavaNextConfig(**shared)).eval()
    saisa = SaisaForConditionalGeneration(SaisaConfig(**shared)).eval()
    images = {"pixel_values": torch.randn(1, 5, 3, 336, 336), "image_sizes": torch.tensor([[672, 672]])}
    count = 576 + 48 * 49
    ids = torch.cat([torch.full((count,), 1999), torch.arange(64)])[None]
    inputs = {"input_ids": ids, **images, "logits_to_keep": 1}
    calls = {"saisa": lambda: saisa(**inputs), "llava": lambda: llava(**inputs)}
    calls |= {"encoder": lambda: saisa.get_image_features(**images)}
    with torch.no_grad():
        times = measure.interleaved(calls, args.repeats, "cpu", cpu_time=True)
        with sdpa_kernel(SDPBackend.MATH):  # PyTorch does not count the fused one of a CPU
            flops = {name: measure.flops(call) for name, call in calls.items()}
        memory = {name: measure.peak_memory(call, "cpu") for name, call in calls.items()}
    seconds = {name: measure.quartiles(values) for name, values in times.items()}
    return {"visual_tokens": count, "sizes": text, "seconds": seconds, "flops": flops, "memory": memory}


# --- tables -----------------------------------------------------------------------------------------------------------


def results_table(cells: dict) -> str:
    header = ["model", "visual tokens", "accuracy", "of digits", "KL", "same top token"]
    labels = {"llava": "LLaVA-NeXT", "base image alone": "the same, its base image alone"}
    labels |= {stage: f"SAISA, {stage}" for stage in STAGES} | {"distilled": "SAISA, fitted and distilled"}
    rows = []
    for name, label in labels.items():
        if (cell := cells.get(name)) is None:
            continue
        tokens = cells["base image alone" if name == "base image alone" else "llava"]["visual_tokens"]
        numbers = [f"{tokens:.0f}", f"{cell['accuracy']:.1%}", f"{cell['digits']:.1%}"]
        rows.append([label, *numbers, *([f"{cell['kl']:.5f}", f"{cell['top1']:.2%}"] if "kl" in cell else ["", ""])])
    return table(header, rows)


def costs_table(costs: dict) -> str:
    header = ["", "SAISA", "LLaVA-NeXT", "ratio"]
    rows = []
    encoder = {name: costs[name]["encoder"] for name in ("flops", "memory")}
    encoder["seconds"] = costs["seconds"]["encoder"][1]
    for label, name, unit, without in (
        ("GFLOPs", "flops", 1e9, False),
        ("GFLOPs without the encoder", "flops", 1e9, True),
        ("CPU seconds", "seconds", 1, False),
        ("CPU seconds without the encoder", "seconds", 1, True),
        ("memory beyond the weights, MiB", "memory", 2**20, False),
    ):
        values = [costs[name][kind][1] if name == "seconds" else costs[name][kind] for kind in ("saisa", "llava")]
        saisa, llava = (value - encoder[name] * without for value in values)
        digits = 2 if name == "seconds" else 0
        rows.append([label, f"{saisa / unit:,.{digits}f}", f"{llava / unit:,.{digits}f}", f"{saisa / llava:.2f}"])
    return table(header, rows)


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--json", metavar="PATH", required=True, help="all results; what is already there is not computed again")
    add("--tables", metavar="PATH", help="update the marked tables of this Markdown page")
    add("--models", metavar="DIR", default="llavas", help="folder of the trained LLaVA-NeXT")
    add("--depth", type=int, default=4, help="decoder layers")
    add("--steps", type=int, default=500, help="training steps")
    add("--pictures", type=int, default=600, help="images to fit on")
    add("--held-out", type=int, default=64, help="images to measure agreement on")
    add("--fit-steps", type=int, default=Fit().steps, help="steps to fit one layer")
    add("--distill-steps", type=int, default=60)
    add("--questions", type=int, default=400)
    add("--width", type=int, default=512, help="hidden size of the models whose costs are measured")
    add("--repeats", type=int, default=5, help="timed calls of each")
    add("--threads", type=int, default=1, help="threads of PyTorch")
    return parser.parse_args(argv)


def main(argv=None) -> dict:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    path = Path(args.json)
    result = json.loads(path.read_text()) if path.exists() else {"machine": measure.machine("cpu"), "cells": {}}
    for names, cells in ((("llava", "base image alone"), llava_cells), (STAGES, fit_cells)):
        if not result["cells"].keys() >= set(names):
            for name, cell in cells(args):
                result["cells"][name] = cell
                measure.write_json(path, result)
                print(name, {key: value for key, value in cell.items() if key != "layers"}, flush=True)
    if "costs" not in result:
        result["costs"] = costs(args)
        measure.write_json(path, result)
    print(results_table(result["cells"]), costs_table(result["costs"]), sep="\n\n")
    if args.tables:
        blocks = {"results": results_table(result["cells"]), "costs": costs_table(result["costs"])}
        fill_blocks(args.tables, blocks)
    return result


if __name__ == "__main__":
    main()
