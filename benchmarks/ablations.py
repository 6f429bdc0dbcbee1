# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What each ingredient contributes: every model between LLaVA and SAISA, SAISA in some of the layers, and SAISA with fewer
visual tokens, trained from nothing on the same batches as in `learning.py`, three seeds. Accuracy on questions about single
visual tokens and about relations between them, against what a question costs.

    python benchmarks/ablations.py --json result.json --plot result.png --tables page.md

Each model of each seed is a cell of its own, the first seed's first. Cells are trained side by side (`--workers`) and kept in
a folder beside the JSON file with the state of those that are not at their end: a run that ended early goes on from there.
`--reuse benchmarks/learning.json` takes over what that script trains alike, to the last bit. `--until 0` computes nothing and
shows what there is.
"""

import argparse
import copy
import json
import os
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context, parent_process
from pathlib import Path

import learning
import torch
from digit_models import keep, new_llava, optimizer_of, training_step
from learning import DEPTH, MEASURES, TASKS, Examination, Mixture, average, make_processor, mean, spread

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration
from saisa_hf.bench import measure
from saisa_hf.demo import train as demo
from saisa_hf.demo.language import Conversation
from saisa_hf.from_llava import saisa_from_llava
from saisa_hf.plots import drawing
from saisa_hf.tables import fill_blocks, table
from saisa_hf.visual_reduction_saisa import SaisaVisualResampler


EMBEDDING_SPACE = {"alignment": "embedding_space"}
REFERENCE = "LLaVA"
MODELS = {  # what differs in the configuration of a SAISA
    REFERENCE: EMBEDDING_SPACE | {"visual_attention": "full"},
    "NAAViT alone": EMBEDDING_SPACE,
    "NAAViT, no visual feed-forward": EMBEDDING_SPACE | {"visual_feed_forward": False},
    "SAISA, one projector": {"projector_sharing": "shared"},
    "SAISA": {},
    "SAISA, first half of the layers": {"visual_layers": range(DEPTH // 2)},
    "SAISA, middle half": {"visual_layers": range(DEPTH // 4, DEPTH // 4 + DEPTH // 2)},
    "SAISA, last half": {"visual_layers": range(DEPTH // 2, DEPTH)},
    "SAISA, every second layer": {"visual_layers": range(1, DEPTH, 2)},
    "SAISA, 2 x 2 averages": {"visual_token_reduction": "avg_pool"},
    "SAISA, 2 x 2 unshuffled": {"visual_token_reduction": "pixel_unshuffle"},
    "SAISA, 9 resampled": {"visual_token_reduction": "resampler", "reduced_visual_tokens": 9},
    "SAISA, 9 by class attention": {"visual_token_reduction": "class_attention", "reduced_visual_tokens": 9},
}


# Two that are one function of the same parameters: what is frozen arrives in each layer as one projector made it. Trained
# alike, they differ by rounding alone, and by what becomes of that.
TWINS = ("NAAViT, no visual feed-forward", "SAISA, one projector")


def frozen(layers) -> dict:
    """Settings of a LLaVA in which visual tokens neither attend nor pass the feed-forward network in these layers."""
    layers = set(layers)
    return {
        "visual_attention": ["none" if layer in layers else "full" for layer in range(DEPTH)],
        "visual_feed_forward": [layer not in layers for layer in range(DEPTH)],
    }


SWITCHES = {  # what is done to the trained LLaVA, which is not trained again
    "NAAViT": {"visual_attention": "none"},
    "NAAViT, no visual feed-forward": frozen(range(DEPTH)),
    # nothing reads visual tokens behind the last layer
    **{f"the same in layer {layer} alone": frozen([layer]) for layer in range(DEPTH - 1)},
}
QUESTIONS_COUNTED = 20  # whose FLOPs are counted


# --- models -----------------------------------------------------------------------------------------------------------


def make_model(processor, name: str, seed: int) -> SaisaForConditionalGeneration:
    """The model called `name`. All models of a seed have the same encoder and language model, and each projector is a copy of
    one and the same, but where features are wider."""
    torch.manual_seed(seed)
    llava = new_llava(processor, DEPTH)
    start = saisa_from_llava(copy.deepcopy(llava))
    settings = {**start.config.to_dict(), "image_seq_length": None, **MODELS[name]}
    model = SaisaForConditionalGeneration(SaisaConfig.from_dict(settings))
    weights = {name: tensor for name, tensor in start.state_dict().items() if "visual_projector." not in name}
    model.load_state_dict(weights, strict=False)
    if hasattr(model.model, "visual_resampler"):
        model.model.visual_resampler = SaisaVisualResampler(model.config)  # as `saisa build` makes it
    projector = llava.model.multi_modal_projector.state_dict()
    for part, module in model.named_modules():
        if part.endswith("visual_projector"):
            own = module.state_dict()
            fitting = {name: tensor for name, tensor in projector.items() if own[name].shape == tensor.shape}
            module.load_state_dict(own | fitting)
    return model.train()


def switched(model, changes: dict) -> SaisaForConditionalGeneration:
    """A model of the same weights and other settings."""
    other = SaisaForConditionalGeneration(SaisaConfig.from_dict(model.config.to_dict() | changes))
    other.load_state_dict(model.state_dict())
    return other


class Course:
    """What a model is taught and asked: pictures and words are the same for all, placeholders as many as it has visual
    tokens."""

    def __init__(self, processor, args, visual_tokens: int):
        conversation = Conversation(processor.tokenizer, visual_tokens)
        collate = demo.TurnCollator(processor.tokenizer.pad_token_id)
        self.often = Examination(conversation, collate, args.questions)
        self.final = Examination(conversation, collate, args.final_questions)
        self.asked = Examination(conversation, collate, QUESTIONS_COUNTED, size=1).batches["relations"]
        self.mixture = lambda seed: Mixture(conversation, collate, seed, args.steps)


@torch.no_grad()
def question_flops(model, course: Course) -> int:
    """FLOPs of reading a question about a picture, without the encoder, in the mean."""
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation("eager")  # matrix products, which the FLOP counter knows on every device
    total = 0
    for batch in course.asked:
        given = {name: tensor for name, tensor in batch.items() if name != "labels"}
        total += measure.flops(lambda given=given: model(**given, use_cache=False, logits_to_keep=1))
        total -= measure.flops(lambda pixels=batch["pixel_values"]: model.vision_tower(pixels))
    return total // len(course.asked)


# --- training ---------------------------------------------------------------------------------------------------------


def cell_path(args, name: str, seed: int) -> Path:
    words = "".join(letter if letter.isalnum() else "-" for letter in name)
    return Path(f"{args.json}.cells", f"{words}.seed-{seed}.json")


def done(args, name: str, seed: int) -> dict | None:
    """A cell that is trained to the end, as it is on disk."""
    path = cell_path(args, name, seed)
    return json.loads(path.read_text()) if path.exists() else None


def from_learning(args, name: str, seed: int) -> dict | None:
    """What the numbers of `learning.py` in the file `args.reuse` say of a model that is trained alike there."""
    if args.reuse is None:
        return None
    other, steps = json.loads(Path(args.reuse).read_text()), range(0, args.steps + 1, args.every)
    written = json.dumps(MODELS[name], default=list)  # some have a range where others have a list
    alike = [label for label, changes in learning.MODELS.items() if json.dumps(changes, default=list) == written]
    cell = other["cells"].get(f"seed {seed}", {"steps": []})
    same_course = other["settings"] | {"every": args.every} == learning.settings_of(args)
    if not alike or not same_course or not set(steps) <= set(cell["steps"]):
        return None
    curve, places = cell["models"][alike[0]], [cell["steps"].index(step) for step in steps]
    return {"steps": list(steps), "reused": True} | {
        key: [curve[key][place] for place in places] for key in ("seconds", "scores")
    }


def orphaned() -> bool:
    """Whether who asked for this was killed."""
    parent = parent_process()
    return parent is not None and not parent.is_alive()


def work(*cell) -> None:
    """`train_cell` in a process of its own."""
    train_cell(*cell)
    if orphaned():
        os._exit(1)  # else it would wait for more to do, for good


def train_cell(args, name: str, seed: int) -> None:
    """Trains a model, from where its state on disk ends, until its end or `args.deadline`, seconds since the epoch."""
    torch.set_num_threads(1)
    if done(args, name, seed) is not None or time.time() > args.deadline:
        return
    processor = make_processor()
    model = make_model(processor, name, seed)
    course, optimizer = Course(processor, args, model.config.image_seq_length), optimizer_of(model)
    path, data = cell_path(args, name, seed), course.mixture(seed)
    kept = path.with_suffix(".training")
    cell = {"visual_tokens": model.config.image_seq_length, "question_flops": question_flops(model, course)}
    cell |= {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad), "chance": course.final.chance()}
    if taken := from_learning(args, name, seed):
        measure.write_json(path, cell | taken)
        return
    state = {
        "step": 0,
        "seconds": 0.0,
        "loss": 0.0,
        "cell": cell | {"steps": [], "seconds": [], "loss": [], "scores": []},
    }
    if kept.exists():
        loaded = torch.load(kept, weights_only=True)
        state = {key: loaded[key] for key in state}
        model.load_state_dict(loaded["model"])
        optimizer.load_state_dict(loaded["optimizer"])
    cell = state["cell"]

    def keep_state():
        keep(state | {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, kept)

    while True:
        step = state["step"]
        if step % args.every == 0 and step not in cell["steps"]:
            cell["steps"].append(step)
            cell["seconds"].append(round(state["seconds"], 2))
            cell["loss"].append(round(state["loss"] / args.every, 4) if step else None)
            cell["scores"].append((course.final if step == args.steps else course.often).scores(model))
            state["loss"] = 0.0
            keep_state()
        if step == args.steps:
            if name == REFERENCE:
                others = {label: switched(model, changes) for label, changes in SWITCHES.items()}
                cell["switched"] = {label: course.final.scores(other) for label, other in others.items()}
            measure.write_json(path, cell)
            kept.unlink(missing_ok=True)
            return
        if time.time() > args.deadline or orphaned():
            keep_state()
            return
        batch, part = data.batch(step)
        start = time.process_time()
        state["loss"] += training_step(model, optimizer, batch, part)
        state["seconds"] += time.process_time() - start
        state["step"] += 1


# --- what is shown ----------------------------------------------------------------------------------------------------


def by_model(result: dict) -> dict[str, list[dict]]:
    """The cells that are at their end, by model."""
    found = {name: [] for name in MODELS}
    for one in result["cells"]:
        found[one["model"]].append(one)
    return {name: cells for name, cells in found.items() if cells}


def chance(cells: list[dict], measured: str) -> float:
    """What the answer that is always the same gets."""
    return average(cells[0]["chance"], measured)


def summary(result: dict) -> str:
    """The Markdown table of costs and accuracies."""
    rows, models = [], by_model(result)
    base = models[REFERENCE][0]["question_flops"] if REFERENCE in models else None
    for name, cells in models.items():
        one = cells[0]
        row = [name, str(one["visual_tokens"]), f"{one['trained']:,}", f"{one['question_flops'] / 1e6:.1f}"]
        row += ["" if base is None else f"{one['question_flops'] / base:.0%}"]
        seconds = [cell["seconds"][-1] for cell in cells if "reused" not in cell]
        row += [f"{mean(seconds):.0f}" if seconds else "", str(len(cells))]
        rows.append(row + [spread([average(cell["scores"][-1], measured) for cell in cells]) for measured in MEASURES])
    header = ["model", "visual tokens", "trained parameters", "MFLOPs a question", "of LLaVA's", "processor s", "seeds"]
    return table([*header, *MEASURES], rows)


def by_kind(result: dict) -> str:
    """The Markdown table of accuracies by kind of question, the mean of the seeds."""
    models = by_model(result)
    chances = next(iter(models.values()))[0]["chance"]
    kinds = [(task, kind) for task in TASKS for kind in chances[task]]
    rows = [["the same answer always", *(f"{chances[task][kind]:.0%}" for task, kind in kinds)]]
    for name, cells in models.items():
        rows.append([name, *(f"{mean(cell['scores'][-1][task][kind] for cell in cells):.0%}" for task, kind in kinds)])
    return table(["model", *(kind for _, kind in kinds)], rows)


def after_training(result: dict) -> str:
    """The Markdown table of what switches do to the trained LLaVA, empty without one."""
    cells = by_model(result).get(REFERENCE, [])
    rows = {REFERENCE: [cell["scores"][-1] for cell in cells]} if cells else {}
    rows |= {label: [cell["switched"][label] for cell in cells] for label in SWITCHES if cells}
    shown = {label: [spread([average(one, of) for one in scores]) for of in MEASURES] for label, scores in rows.items()}
    return table(["", *MEASURES], [[label, *row] for label, row in shown.items()])


def twins(result: dict) -> str:
    """The Markdown table of two models that are the same but for rounding, seed by seed."""
    models, rows = by_model(result), []
    for cell in sorted((cell for name in TWINS for cell in models.get(name, [])), key=lambda cell: cell["seed"]):
        scores = [f"{average(cell['scores'][-1], measured):.1%}" for measured in MEASURES]
        rows.append([f"seed {cell['seed']}, {cell['model']}", *scores])
    return table(["", *MEASURES], rows)


def apart(values: list[float], gap: float) -> list[float]:
    """Ascending values, moved until they are `gap` apart, by the least sum of squares (isotonic regression)."""
    groups = []  # of values that touch: the place of their middle without the gaps, and how many they are
    for number, value in enumerate(values):
        groups.append((value - number * gap, 1))
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            (high, many), (low, few) = groups[-2:]
            groups[-2:] = [((high * many + low * few) / (many + few), many + few)]
    places = [place for place, count in groups for _ in range(count)]
    return [place + number * gap for number, place in enumerate(places)]


def plot(result: dict, path: str) -> None:
    """Accuracy against the FLOPs of a question: each seed, and their mean. Models of about the same FLOPs stand side
    by side."""
    pyplot = drawing()
    models = sorted(by_model(result).items(), key=lambda model: model[1][0]["question_flops"])
    places = apart([cells[0]["question_flops"] / 1e6 for _, cells in models], gap=1.2)
    figure, axes = pyplot.subplots(len(MEASURES), figsize=(12, 10), sharex=True, layout="constrained")
    colours = pyplot.get_cmap("tab20").colors
    handles = {}
    for axis, measured in zip(axes, MEASURES):
        for (name, cells), place in zip(models, places):
            number = list(MODELS).index(name)
            found = [100 * average(cell["scores"][-1], measured) for cell in cells]
            look, point = {"color": colours[number]}, (place, mean(found))
            axis.plot([place, place], [min(found), max(found)], linewidth=1, **look)
            axis.plot([place] * len(found), found, ".", markersize=4, **look)
            handles[number] = axis.plot(*point, "o" if "SAISA" in name else "s", markersize=7, **look)[0]
            axis.annotate(str(number + 1), point, textcoords="offset points", xytext=(5, 5), fontsize=8)
        axis.axhline(100 * chance(models[0][1], measured), color="#999999", linestyle=":", linewidth=1)
        axis.set(title=measured, ylabel="exactly right, %")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("MFLOPs of a question, without the encoder")
    labels = [f"{number + 1} {list(MODELS)[number]}" for number in sorted(handles)]
    marks = [handles[number] for number in sorted(handles)]
    figure.legend(marks, labels, loc="outside right center", fontsize=9, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


# --- command line -----------------------------------------------------------------------------------------------------


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    learning.add_options(parser, every=400)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    reuse = "numbers of learning.py: what was trained alike there is taken from there, but for its seconds"
    parser.add_argument("--reuse", metavar="PATH", help=reuse)
    parser.add_argument("--workers", type=int, default=2, help="cells that are trained at once, one thread each")
    return learning.parsed(parser, argv)


def main(argv=None) -> dict:
    args = arguments(argv)
    args.deadline = time.time() + 60 * args.until
    settings, result = learning.settings_and_result(args)
    if args.until > 0:
        cell_path(args, "", 0).parent.mkdir(parents=True, exist_ok=True)
        result = result or {"machine": measure.machine("cpu"), "settings": settings, "cells": []}
        measure.write_json(args.json, result)
        there = {(cell["model"], cell["seed"]) for cell in result["cells"]}
        todo = [(name, seed) for seed, name in product(args.seeds, args.models) if (name, seed) not in there]
        with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn")) as workers:
            for (name, seed), job in [(cell, workers.submit(work, args, *cell)) for cell in todo]:
                job.result()
                cell = done(args, name, seed)
                if cell is not None:
                    result["cells"].append({"model": name, "seed": seed} | cell)
                    measure.write_json(args.json, result)
                    print(summary(result), flush=True)
    if result.get("cells"):
        if args.plot:
            plot(result, args.plot)
        if args.tables:
            blocks = {"summary": summary(result), "kinds": by_kind(result)}
            blocks |= {"switched": after_training(result), "twins": twins(result)}
            fill_blocks(args.tables, blocks)
        print(summary(result))
    return result


if __name__ == "__main__":
    main()
