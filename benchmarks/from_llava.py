# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""How well fitting projectors turns a trained LLaVA into a SAISA, at tiny size on the demo's digit scenes. Reports accuracy,
agreement of next-token distributions and errors by layer, against depth, number of images and width, beside a SAISA trained
on the same data for the same time.

    python benchmarks/from_llava.py --json result.json --plot result.png --tables docs/from_llava.md

Cells are computed in order of importance and written one by one; cells that are already in the file are not computed again.
LLaVAs are trained on new images with the demo's encoder and kept in a folder.
"""

import argparse
import copy
import json
import math
import tempfile
import time
from itertools import product
from pathlib import Path

import numpy as np
import torch
from digit_models import BATCH, VISUAL_TOKENS, keep, new_llava, optimizer_of, training_step
from PIL import Image
from transformers import LlavaForConditionalGeneration

from saisa_hf.bench import measure
from saisa_hf.checkpoints.from_llava import (
    Fit,
    LayerFit,
    Teacher,
    Workbench,
    agreement,
    answered,
    distill,
    fit_projectors,
    saisa_from_llava,
)
from saisa_hf.common.plots import drawing
from saisa_hf.common.tables import fill_blocks, table
from saisa_hf.demo import train as demo
from saisa_hf.demo.language import Conversation
from saisa_hf.demo.run import ask_model
from saisa_hf.demo.scenes import LISTS, draw, held_out_questions, make_scene


STAGES = ((450, 1.0), (900, 0.1), (700, 0.2))  # steps, and the share of sequences that are lists
SHORT, LONG = 1350, 2050  # steps of the first two stages, and of all three
PROMPTS = (*LISTS.values(), "How many digits are there?")
PICTURES_SEED, QUESTIONS_SEED = 77, 1

DEPTHS, SEEDS = (4, 8, 16), (0, 1, 2)
PICTURES, WIDTHS = (100, 300, 1000, 3000, 10000), (32, 64, 128, 256, 512)
SPACES = ("hidden", "norm", "keys_values")
DEFAULT = {"depth": 4, "seed": 0, "steps": SHORT, "pictures": 1000, "width": 128, "space": Fit().space}
TRAINING = ("seed", "depth", "steps")


# --- models -----------------------------------------------------------------------------------------------------------


def train(model, tokenizer, seed: int, steps: int, seconds: float | None = None, kept: Path | None = None) -> dict:
    """Trains everything but the encoder in place, through the first stages of `STAGES` that add up to `steps`, on a stream of
    new images that depends on `seed` alone. With `seconds`, each stage lasts until its share of that CPU time is spent. With
    `kept`, the state is saved to that file at intervals, and an interrupted training resumes from it."""
    conversation, collate = Conversation(tokenizer, VISUAL_TOKENS), demo.TurnCollator(tokenizer.pad_token_id)
    optimizer = optimizer_of(model)
    stage, step, total, earlier = 0, 0, 0, 0.0
    if kept is not None and kept.exists():
        state = torch.load(kept, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        stage, step, total, earlier = (state[name] for name in ("stage", "step", "total", "seconds"))
    model.train()
    start = time.process_time()
    stages = STAGES[: 2 if steps == SHORT else 3]
    for number in range(stage, len(stages)):
        stage_steps, lists = stages[number]
        share = stage_steps / steps
        pictures = demo.TurnDataset(conversation, "train", 10**9, seed * 10 + 2 + number, lists)
        begun = time.process_time()
        while True:
            done = step / stage_steps if seconds is None else (time.process_time() - begun) / (seconds * share)
            if done >= 1:
                break
            batch = collate([pictures[index] for index in range(step * BATCH, (step + 1) * BATCH)])
            loss = training_step(model, optimizer, batch, done)
            step, total = step + 1, total + 1
            spent = earlier + time.process_time() - start
            if total % 50 == 0:
                print(f"stage {number}, step {step}: loss {loss:.3f}, {spent:.0f} s", flush=True)
                if kept is not None:
                    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                    keep(state | {"stage": number, "step": step, "total": total, "seconds": spent}, kept)
        step = 0
    model.eval()
    seconds = earlier + time.process_time() - start
    return {"steps": total, "pictures": total * BATCH, "processor_seconds": round(seconds, 1)}


def pretrained_llava(args, seed: int, depth: int, steps: int) -> tuple[LlavaForConditionalGeneration, dict]:
    """The LLaVA of a seed, a depth and a number of steps, and the record of its training. Trains it if it is not in the
    folder."""
    folder = Path(args.models) / f"llava-seed-{seed}-depth-{depth}-steps-{steps}"
    if not (folder / "training.json").exists():
        Path(args.models).mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        processor, kept = demo.make_processor(), folder.with_suffix(".training")
        model = new_llava(processor, depth)
        record = train(model, processor.tokenizer, seed, steps, kept=kept)
        model.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(record))
        kept.unlink(missing_ok=True)
    model = LlavaForConditionalGeneration.from_pretrained(folder).eval()
    return model, json.loads((folder / "training.json").read_text())


# --- cells ------------------------------------------------------------------------------------------------------------


def accuracy(model, processor, args) -> float:
    """The share of exact matches of greedy answers to new questions about held-out handwriting."""
    asked = held_out_questions(args.questions, QUESTIONS_SEED)
    answers = ask_model(model, processor, asked)
    return sum(answer == question.answer for answer, (_, question) in zip(answers, asked)) / len(asked)


def unlabelled(count: int) -> list[Image.Image]:
    """Images of scenes without labels; a larger `count` adds to the same first images."""
    scenes = (make_scene("train", np.random.default_rng([PICTURES_SEED, index])) for index in range(count))
    return [Image.fromarray(draw(scene)) for scene in scenes]


def llava_cell(args, seed, depth, steps) -> dict:
    processor = demo.make_processor()
    model, record = pretrained_llava(args, seed, depth, steps)
    return {**record, "accuracy": accuracy(model, processor, args)}


def fit_cell(args, seed, depth, steps, pictures, width, space) -> dict:
    """The LLaVA as a SAISA, with its projector copied, fitted and, for the default settings, distilled."""
    processor = demo.make_processor()
    llava, _ = pretrained_llava(args, seed, depth, steps)
    model = saisa_from_llava(llava, width)
    teacher = Teacher(model, llava.model.multi_modal_projector)
    main = all(DEFAULT[name] == value for name, value in (("pictures", pictures), ("width", width), ("space", space)))
    fit = Fit(
        pictures=pictures + args.held_out,
        held_out=args.held_out,
        answer_tokens=args.answer_tokens,
        steps=args.fit_steps,
        projector_hidden_size=width,
        space=space,
        distill_steps=args.distill_steps,
        distill_batch=16,
        seed=seed,
    )
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(
            model, processor, unlabelled(pictures + args.held_out), folder, fit, PROMPTS, log=lambda line: None
        )
        rows = answered(bench, teacher, bench.held_out, "held-out.json")

        def measured(stage, seconds):
            result[stage] = {**agreement(bench, teacher, rows), "processor_seconds": round(seconds, 1)}
            if main:
                result[stage]["accuracy"] = accuracy(model, processor, args)

        measured("copied", 0)
        start = time.process_time()
        result["layers"] = fit_projectors(bench, teacher)
        measured("fitted", time.process_time() - start)
        if main:
            start = time.process_time()
            distill(bench, teacher)
            measured("distilled", time.process_time() - start)
    return result


@torch.no_grad()
def neighbours_cell(args, seed, depth, steps) -> dict:
    """Errors by layer of projectors that also see the eight patches around their own, which SAISA's do not. Shows how much of
    the missing information is nearby."""
    llava, _ = pretrained_llava(args, seed, depth, steps)
    model = saisa_from_llava(llava)
    teacher, count = Teacher(model), DEFAULT["pictures"] + args.held_out
    fit = Fit(pictures=count, held_out=args.held_out, steps=args.fit_steps, seed=seed)
    rows, start = [], time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        bench = Workbench(model, demo.make_processor(), unlabelled(count), folder, fit, PROMPTS, log=lambda line: None)
        side = math.isqrt(VISUAL_TOKENS)
        features_nCV = bench.features.unflatten(0, (-1, VISUAL_TOKENS)).transpose(1, 2)
        maps = features_nCV.unflatten(2, (side, side))
        around = torch.nn.functional.unfold(maps, kernel_size=3, padding=1).transpose(
            1, 2
        )  # (n, V, 9 C), channel by channel
        bench.features = around.flatten(0, 1).contiguous()
        projector = copy.deepcopy(teacher.projector)
        own = torch.zeros(projector.linear_1.out_features, projector.linear_1.in_features, 9)
        own[..., 4] = projector.linear_1.weight
        projector.linear_1.weight = torch.nn.Parameter(own.flatten(1), requires_grad=False)
        ids = torch.tensor([bench.prefix])
        visual, prefix = teacher.projector(features_nCV.transpose(1, 2)), model.get_input_embeddings()(ids)
        whole = torch.cat([prefix.expand(count, -1, -1), visual], dim=1)
        for index in range(depth):
            work = LayerFit(bench, index, whole[:, prefix.shape[1] :].flatten(0, 1))
            if index:
                work.fit_projector(projector)
            rows.append({"layer": index, "fitted": work.errors(projector)})
            whole = torch.cat([teacher.advance(index, part) for part in whole.split(64)])
    return {"layers": rows, "processor_seconds": round(time.process_time() - start, 1)}


def trained_cell(args, seed, depth, steps) -> dict:
    """A SAISA trained from scratch on the stream of images that the LLaVA was trained on, for as much CPU time as the LLaVA
    and its fit took."""
    processor = demo.make_processor()
    _, record = pretrained_llava(args, seed, depth, steps)
    torch.manual_seed(seed)
    model = saisa_from_llava(new_llava(processor, depth)).requires_grad_(True)
    found = args.cells.get(name_of("fit", DEFAULT | {"seed": seed, "depth": depth, "steps": steps}), {}).get(
        "fitted", {}
    )
    seconds = record["processor_seconds"] + found.get("processor_seconds", 0)
    trained = train(model, processor.tokenizer, seed, steps, seconds)
    return {**trained, "accuracy": accuracy(model, processor, args)}


def plan(args) -> list[tuple[str, dict]]:
    """The cells to compute, in order of importance."""
    first = args.seeds[0]
    cells = [(kind, {"seed": first, "steps": steps}) for steps in (LONG, SHORT) for kind in ("llava", "fit")]
    cells += [("fit", {"seed": first, "steps": LONG, "pictures": pictures}) for pictures in args.pictures]
    cells += [("fit", {"seed": first, "steps": LONG, "width": width}) for width in args.widths]
    cells += [("fit", {"seed": first, "steps": LONG, "space": space}) for space in args.spaces]
    cells += [("neighbours", {"seed": first, "steps": LONG})]
    cells += [(kind, {"seed": seed}) for seed in args.seeds for kind in ("llava", "fit")]
    cells += [("trained", {"seed": first})]
    cells += [(kind, {"seed": first, "depth": depth}) for depth in args.depths for kind in ("llava", "fit")]
    cells += [("trained", {"seed": seed}) for seed in args.seeds]
    cells += [
        (kind, {"depth": depth, "seed": seed})
        for depth, seed, kind in product(args.depths, args.seeds, ("llava", "fit"))
    ]
    return [(kind, DEFAULT | given) for kind, given in cells]


def name_of(kind: str, cell: dict) -> str:
    used = (*TRAINING, "pictures", "width") if kind == "fit" else TRAINING
    used += ("space",) * (kind == "fit" and cell["space"] != DEFAULT["space"])
    return " ".join([kind, *(f"{name}={cell[name]}" for name in used)])


# --- tables and plots -------------------------------------------------------------------------------------------------


def show(cells: dict) -> str:
    """The table of all computed cells."""
    header = ["cell", "stage", "accuracy", "KL", "same top token", "CPU s", "error of keys and values by layer"]
    rows = []
    for name, cell in cells.items():
        for stage in ("copied", "fitted", "distilled") if name.startswith("fit") else ("",):
            part = cell if not stage else cell.get(stage)
            if part is None:
                continue
            numbers = [f"{part['accuracy']:.1%}" if "accuracy" in part else ""]
            numbers += [f"{part['kl']:.4f}" if "kl" in part else "", f"{part['top1']:.2%}" if "top1" in part else ""]
            shown = "fitted" if name.startswith("neighbours") else stage
            errors = [_error(row, shown) for row in cell["layers"]] if shown in ("copied", "fitted") else []
            numbers += [f"{part['processor_seconds']:.0f}", " ".join(f"{error:.1%}" for error in errors)]
            rows.append([name, stage, *numbers])
    return table(header, rows)


def results_table(cells: dict) -> str:
    """The Markdown table of accuracy and agreement, for each LLaVA and the SAISAs made from it."""
    header = ["LLaVA", "model", "accuracy", "KL", "same top token", "error by layer, %"]
    rows = []
    for steps, depth, seed in product((LONG, SHORT), DEPTHS, SEEDS):
        run = DEFAULT | {"steps": steps, "depth": depth, "seed": seed}
        llava, fit, own = (cells.get(name_of(kind, run)) for kind in ("llava", "fit", "trained"))
        if llava is None or fit is None:
            continue
        rows.append([f"{depth} layers, {steps} steps, seed {seed}", "LLaVA", f"{llava['accuracy']:.1%}", "", "", ""])
        for stage, label in (("copied", "copied"), ("fitted", "fitted"), ("distilled", "fitted and distilled")):
            part, errors = fit[stage], "" if stage == "distilled" else _errors(fit, stage)
            numbers = [f"{part['accuracy']:.1%}", f"{part['kl']:.4f}", f"{part['top1']:.2%}", errors]
            rows.append(["", f"SAISA, {label}", *numbers])
        if own is not None:
            rows.append(["", "SAISA, trained from scratch", f"{own['accuracy']:.1%}", "", "", ""])
    return table(header, rows)


def sweep_table(cells: dict) -> str:
    """The Markdown table of fits of one LLaVA with one setting changed at a time."""
    header = ["", "KL, copied", "KL, fitted", "same top token", "error by layer, %", "seconds"]
    spaces = {
        "hidden": "unscaled states",
        "norm": "the norm's output",
        "keys_values": "keys and values",
    }
    changes = [({"pictures": pictures}, f"{pictures:,} images") for pictures in PICTURES]
    changes += [({"width": width}, f"width {width}") for width in WIDTHS if width != DEFAULT["width"]]
    changes += [({"space": space}, f"error of {label}") for space, label in spaces.items()]
    rows = []
    for change, label in changes:
        cell = cells.get(name_of("fit", DEFAULT | {"steps": LONG} | change))
        if cell is not None:
            copied, fitted = cell["copied"], cell["fitted"]
            label = (
                f"**{label}, width {DEFAULT['width']}, scaled states**" if change.items() <= DEFAULT.items() else label
            )
            numbers = [f"{copied['kl']:.4f}", f"{fitted['kl']:.4f}", f"{fitted['top1']:.2%}"]
            rows.append([label, *numbers, _errors(cell, "fitted"), f"{fitted['processor_seconds']:.0f}"])
    cell = cells.get(name_of("neighbours", DEFAULT | {"steps": LONG}))
    if cell is not None:
        numbers = [_errors(cell, "fitted"), f"{cell['processor_seconds']:.0f}"]
        rows.append(["projectors that also see eight neighbours", "", "", "", *numbers])
    return table(header, rows)


def _errors(cell: dict, stage: str) -> str:
    return " ".join(f"{100 * _error(row, stage):.1f}" for row in cell["layers"])


def _error(row: dict, stage: str) -> float:
    return (row[stage]["keys"] + row[stage]["values"]) / 2


def plot(cells: dict, path: str):
    """Four panels: accuracy by seed, error by layer and depth, KL by number of images, KL by width. Missing cells are left
    out."""
    pyplot = drawing()
    fits = {name: cell for name, cell in cells.items() if name.startswith("fit")}

    def cell_of(**given):
        return fits.get(name_of("fit", DEFAULT | given))

    figure, axes = pyplot.subplots(1, 4, figsize=(17, 3.8), constrained_layout=True)
    stages = {"copied": "#c0392b", "fitted": "#2471a3", "distilled": "#1e8449"}
    runs = [{"seed": seed, "steps": steps} for steps, seed in product((SHORT, LONG), SEEDS)]
    runs = [run for run in runs if cell_of(**run)]
    bars = {"LLaVA": [cells[name_of("llava", DEFAULT | run)]["accuracy"] for run in runs]}
    bars |= {stage: [cell_of(**run)[stage]["accuracy"] for run in runs] for stage in stages}
    own = [cells.get(name_of("trained", DEFAULT | run), {}).get("accuracy", math.nan) for run in runs]
    bars |= {} if all(map(math.isnan, own)) else {"SAISA, trained": own}
    for number, ((label, values), colour) in enumerate(zip(bars.items(), ["#7f8c8d", *stages.values(), "#b7950b"])):
        places = [place + 0.16 * (number - 2) for place in range(len(runs))]
        axes[0].bar(places, [100 * value for value in values], 0.15, label=label, color=colour)
    lowest = min(value for values in bars.values() for value in values if not math.isnan(value))
    bottom = max(0, math.floor(20 * lowest - 1) * 5)
    axes[0].set(title=f"accuracy, {DEFAULT['depth']} layers", ylabel="%", ylim=(bottom, 100), xticks=range(len(runs)))
    axes[0].set_xticklabels([f"seed {run['seed']}\n{run['steps']} steps" for run in runs], fontsize=8)
    axes[0].legend(fontsize=7, loc="upper center", ncols=3)
    for depth, marker in zip(DEPTHS, "os^"):
        if cell := cell_of(depth=depth) or cell_of(depth=depth, steps=LONG):
            for stage in ("copied", "fitted"):
                errors = [100 * _error(row, stage) for row in cell["layers"][1:]]
                label = f"{depth} layers, {stage}"
                axes[1].plot(range(1, depth), errors, f"{marker}-", color=stages[stage], label=label, markersize=4)
    axes[1].set(title="relative error of keys and values", xlabel="layer", ylabel="%")
    if axes[1].lines:
        axes[1].set_yscale("log")
        axes[1].xaxis.get_major_locator().set_params(integer=True)
        axes[1].legend(fontsize=7)
    for axis, name, values in ((axes[2], "pictures", PICTURES), (axes[3], "width", WIDTHS)):
        known = [value for value in values if cell_of(steps=LONG, **{name: value})]
        if not known:
            continue
        for stage in ("copied", "fitted"):
            kl = [cell_of(steps=LONG, **{name: value})[stage]["kl"] for value in known]
            axis.plot(known, kl, "o-", color=stages[stage], label=stage)
        title = "images" if name == "pictures" else "inner width of the projectors"
        axis.set(title="KL from LLaVA", xlabel=title, ylabel="nats per token", xscale="log", yscale="log")
        axis.set_xticks(known, [str(value) for value in known])
        axis.minorticks_off()
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--json", metavar="PATH", required=True, help="all results; cells already there are not computed again"
    )
    parser.add_argument("--plot", metavar="PATH", help="draw the results into this image file")
    parser.add_argument("--tables", metavar="PATH", help="update the marked tables of this Markdown page")
    parser.add_argument("--models", metavar="DIR", default="llavas", help="folder of trained LLaVAs")
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--pictures", type=int, nargs="*", default=PICTURES)
    parser.add_argument("--widths", type=int, nargs="*", default=WIDTHS)
    parser.add_argument(
        "--spaces", nargs="*", default=SPACES, help="spaces to take the fitting error in, beside the default"
    )
    parser.add_argument("--fit-steps", type=int, default=Fit().steps, help="steps to fit one layer")
    parser.add_argument("--distill-steps", type=int, default=100)
    parser.add_argument("--held-out", type=int, default=100, help="images to measure on")
    parser.add_argument(
        "--answer-tokens", type=int, default=64, help="maximum length of the answers along which agreement is measured"
    )
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch")
    parser.add_argument(
        "--until", type=float, default=math.inf, metavar="MINUTES", help="start no cell after this many"
    )
    return parser.parse_args(argv)


def main(argv=None) -> dict:
    args, start = arguments(argv), time.monotonic()
    torch.set_num_threads(args.threads)
    path = Path(args.json)
    result = json.loads(path.read_text()) if path.exists() else {"machine": measure.machine("cpu"), "cells": {}}
    args.cells = result["cells"]
    makers = {"llava": llava_cell, "fit": fit_cell, "trained": trained_cell, "neighbours": neighbours_cell}
    for kind, cell in plan(args):
        name = name_of(kind, cell)
        if name in args.cells:
            continue
        if time.monotonic() - start > 60 * args.until:
            break
        print(name, flush=True)
        given = cell if kind == "fit" else {key: cell[key] for key in TRAINING}
        args.cells[name] = makers[kind](args, **given)
        measure.write_json(path, result)
        print(show({name: args.cells[name]}), flush=True)
    print(show(args.cells))
    if args.plot:
        plot(args.cells, args.plot)
    if args.tables:
        fill_blocks(args.tables, {"results": results_table(args.cells), "sweep": sweep_table(args.cells)})
    return result


if __name__ == "__main__":
    main()
