# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What each ingredient contributes: the models between LLaVA and SAISA, SAISA in some of the layers, and SAISA with fewer
visual tokens, for three seeds. Reports accuracy on questions about single visual tokens and about relations between them,
against the cost of a question.

    python benchmarks/ablations.py --json result.json --plot result.png --tables page.md

The language model of a seed is trained first, on images described in words (`told_pictures.py`). All models of the seed start
from it and train on the same batches, in the paper's two stages: a projector alone, then everything but the encoder. In the
second stage SAISA starts from a copy of the projector in each layer.

Each model of each seed is a cell; cells of the first seed come first. Cells train in parallel (`--workers`). A folder beside
the JSON file keeps finished cells and the training states of the others; an interrupted run resumes from there. `--until 0`
trains nothing and shows the results so far.
"""

import argparse
import copy
import json
import os
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context, parent_process
from pathlib import Path

import learning
import told_pictures
import torch
from digit_models import RATE, adamw, keep, new_llava, training_step
from learning import DEPTH, EXERCISES, MEASURES, TASKS, Examination, Mixture, average, mean, spread

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration
from saisa_hf.bench import measure
from saisa_hf.checkpoints.from_llava import saisa_from_llava
from saisa_hf.common.plots import drawing
from saisa_hf.common.tables import fill_blocks, table
from saisa_hf.demo import train as demo
from saisa_hf.demo.language import Conversation
from saisa_hf.vision_saisa import SaisaVisualResampler


EMBEDDING_SPACE = {"alignment": "embedding_space"}
REFERENCE, TOLD = "LLaVA", "language model, image in words"
MODELS = {  # changes to the configuration of a SAISA
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
LONGER = 3  # factor on the steps
AGAIN = {f"{name}, longer": name for name in (REFERENCE, "NAAViT alone", "SAISA", "SAISA, 2 x 2 averages")}
MODELS |= {label: MODELS[name] for label, name in AGAIN.items()}

# Two models that are the same function of the same parameters: frozen visual tokens reach each layer as one projector made
# them. Trained alike, they differ by rounding alone, and by what becomes of it.
TWINS = ("NAAViT, no visual feed-forward", "SAISA, one projector")


def frozen(layers) -> dict:
    """Settings of a LLaVA whose visual tokens neither attend nor pass the feed-forward network in `layers`."""
    layers = set(layers)
    return {
        "visual_attention": ["none" if layer in layers else "full" for layer in range(DEPTH)],
        "visual_feed_forward": [layer not in layers for layer in range(DEPTH)],
    }


SWITCHES = {  # changes to the trained LLaVA, without further training
    "NAAViT": {"visual_attention": "none"},
    "NAAViT, no visual feed-forward": frozen(range(DEPTH)),
    # nothing reads visual tokens after the last layer
    **{f"the same in layer {layer} alone": frozen([layer]) for layer in range(DEPTH - 1)},
}
QUESTIONS_COUNTED = 20  # to count FLOPs on

# The paper's two stages: share of the training, mix of sequences, and peak learning rate.
PROJECTOR, WHOLE = range(2)
STAGES = ((0.2, EXERCISES), (0.8, learning.STAGES[1][1]))
RATES = (3e-3, 5e-4)
LANGUAGE_EXAMINATIONS = 9  # per language model; each one also saves the training state


# --- models -----------------------------------------------------------------------------------------------------------


def make_processor():
    processor = learning.make_processor()
    told_pictures.add_words(processor.tokenizer)
    return processor


def make_model(processor, name: str, seed: int, language_model: dict | None = None) -> SaisaForConditionalGeneration:
    """The untrained model called `name`, with one projector. All models of a seed have the same encoder and language model,
    and the same projector unless their features are wider.

    Args:
        language_model: tensors of the trained `LlamaForCausalLM`; None leaves them random.
    """
    torch.manual_seed(seed)
    llava = new_llava(processor, DEPTH)
    if language_model is not None:
        own = {key.removeprefix("model."): x for key, x in language_model.items() if key.startswith("model.")}
        llava.model.language_model.load_state_dict(own)
        llava.lm_head.load_state_dict({"weight": language_model["lm_head.weight"]})
    start = saisa_from_llava(copy.deepcopy(llava))
    settings = {**start.config.to_dict(), "image_seq_length": None, **MODELS[name], "projector_sharing": "shared"}
    model = SaisaForConditionalGeneration(SaisaConfig.from_dict(settings))
    weights = {key: tensor for key, tensor in start.state_dict().items() if "visual_projector." not in key}
    model.load_state_dict(weights, strict=False)
    if hasattr(model.model, "visual_resampler"):
        model.model.visual_resampler = SaisaVisualResampler(model.config)  # as `saisa build` makes it
    own, given = model.model.visual_projector.state_dict(), llava.model.multi_modal_projector.state_dict()
    fitting = {key: tensor for key, tensor in given.items() if own[key].shape == tensor.shape}
    model.model.visual_projector.load_state_dict(own | fitting)
    return model.train()


def enter(model: SaisaForConditionalGeneration, name: str, stage: int) -> torch.optim.AdamW:
    """Prepares the model called `name` for a stage of training; returns the optimizer."""
    model.requires_grad_(stage == WHOLE)
    model.model.vision_tower.requires_grad_(False)
    if stage == PROJECTOR:
        model.model.visual_projector.requires_grad_(True)
        if hasattr(model.model, "visual_resampler"):
            model.model.visual_resampler.requires_grad_(True)
    elif model.config.alignment == "input_space" and "projector_sharing" not in MODELS[name]:
        model.unshare_projectors()
    return adamw(model)


def switched(model, changes: dict) -> SaisaForConditionalGeneration:
    """A model with the same weights and changed settings."""
    other = SaisaForConditionalGeneration(SaisaConfig.from_dict(model.config.to_dict() | changes))
    other.load_state_dict(model.state_dict())
    return other


class Course:
    """Training data and examinations, the same for all models but for the number of placeholders.

    Args:
        steps: total training steps.
        every: steps between measurements.
        told: describe images in words, for language models.
    """

    def __init__(self, processor, args, steps: int, every: int, visual_tokens: int, told: bool = False):
        conversation = Conversation(processor.tokenizer, visual_tokens)
        if told:
            teller = told_pictures.Teller(processor.tokenizer)
            self.collate, self.show = teller.collate, teller.told
        else:
            self.collate, self.show = demo.TurnCollator(processor.tokenizer.pad_token_id), learning.drawn
        self.often = Examination(conversation, self.collate, args.questions, show=self.show)
        self.final = Examination(conversation, self.collate, args.final_questions, show=self.show)
        self.conversation, self.steps, self.every = conversation, steps, every
        self.stages, self.stream = (learning.STAGES, 5) if told else (STAGES, 4)

    def mixture(self, seed: int) -> Mixture:
        return Mixture(self.conversation, self.collate, seed, self.steps, self.stages, self.show, self.stream)

    def counted(self) -> list[dict]:
        """Questions to count FLOPs on, one per batch."""
        return Examination(self.conversation, self.collate, QUESTIONS_COUNTED, 1, self.show).batches["relations"]


@torch.no_grad()
def question_flops(model, course: Course) -> int:
    """Average FLOPs of reading a question about an image, without the encoder."""
    model = copy.deepcopy(model).eval()
    model.set_attn_implementation("eager")  # plain matrix products, which the FLOP counter counts on every device
    total = 0
    counted = course.counted()
    for batch in counted:
        given = {name: tensor for name, tensor in batch.items() if name != "labels"}
        total += measure.flops(lambda given=given: model(**given, use_cache=False, logits_to_keep=1))
        total -= measure.flops(lambda pixels=batch["pixel_values"]: model.vision_tower(pixels))
    return total // len(counted)


# --- training ---------------------------------------------------------------------------------------------------------


def folder(args) -> Path:
    """The folder of everything that has been trained."""
    return Path(f"{args.json}.cells")


def cell_path(args, name: str, seed: int) -> Path:
    words = "".join(letter if letter.isalnum() else "-" for letter in name)
    return folder(args) / f"{words}.seed-{seed}.json"


def done(args, name: str, seed: int) -> dict | None:
    """A finished cell, read from disk; None if it is not finished."""
    path = cell_path(args, name, seed)
    return json.loads(path.read_text()) if path.exists() else None


def orphaned() -> bool:
    """Whether the parent process was killed."""
    parent = parent_process()
    return parent is not None and not parent.is_alive()


def train(model, course: Course, args, seed: int, enter, rates, kept: Path) -> dict | None:
    """Trains `model` in place, resuming from its state on disk, to the end or to `args.deadline` (seconds since the epoch).

    Args:
        enter: called with the index of each stage when it begins; returns the optimizer.
        rates: the peak learning rate of each stage.
        kept: the file of the state.

    Returns:
        dict: the measured steps, with seconds, loss and scores at each; None if training has not reached the end.
    """
    data, optimizer = course.mixture(seed), None
    starts = [start for start, _, _ in data.stages]
    state = {"step": 0, "seconds": 0.0, "loss": 0.0}
    state["record"] = {"steps": [], "seconds": [], "loss": [], "scores": []}
    if kept.exists():
        loaded = torch.load(kept, weights_only=True)
        state = {key: loaded[key] for key in state}
        for stage, start in enumerate(starts):
            if start < state["step"]:
                optimizer = enter(stage)
        model.load_state_dict(loaded["model"])
        if optimizer is not None:
            optimizer.load_state_dict(loaded["optimizer"])
    record = state["record"]

    def keep_state():
        moments = None if optimizer is None else optimizer.state_dict()
        keep(state | {"model": model.state_dict(), "optimizer": moments}, kept)

    while True:
        step = state["step"]
        if (step % course.every == 0 or step == course.steps) and step not in record["steps"]:
            since = step - (record["steps"] or [0])[-1]
            record["steps"].append(step)
            record["seconds"].append(round(state["seconds"], 2))
            record["loss"].append(round(state["loss"] / since, 4) if since else None)
            record["scores"].append((course.final if step == course.steps else course.often).scores(model))
            state["loss"] = 0.0
            keep_state()
        if step == course.steps:
            return record
        if time.time() > args.deadline or orphaned():
            keep_state()
            return None
        stage = data.stage(step)
        if step == starts[stage]:
            optimizer = enter(stage)
        batch, part = data.batch(step)
        start = time.process_time()
        state["loss"] += training_step(model, optimizer, batch, part, rates[stage])
        state["seconds"] += time.process_time() - start
        state["step"] += 1


def language_path(args, seed: int) -> Path:
    """The file of a seed's language model: its tensors and scores."""
    return folder(args) / f"language-model.seed-{seed}.pt"


def train_language_model(args, seed: int) -> None:
    """Trains the language model of a seed on images described in words, unless it exists."""
    torch.set_num_threads(1)
    path = language_path(args, seed)
    if path.exists() or time.time() > args.deadline:
        return
    processor = make_processor()
    model = told_pictures.new_language_model(processor, DEPTH, seed)
    steps = args.language_steps
    every = -(-steps // LANGUAGE_EXAMINATIONS)
    course = Course(processor, args, steps, every, told_pictures.VISUAL_TOKENS, told=True)
    optimizer, kept = adamw(model), path.with_suffix(".training")
    rates = [RATE] * len(course.stages)
    record = train(model, course, args, seed, lambda stage: optimizer, rates, kept)
    if record is not None:
        keep({"scores": record["scores"][-1], "model": model.state_dict()}, path)
        kept.unlink()


def train_cell(args, name: str, seed: int) -> None:
    """Trains a model, if the language model of its seed exists and the cell is not finished."""
    torch.set_num_threads(1)
    path, language_model = cell_path(args, name, seed), language_path(args, seed)
    if path.exists() or not language_model.exists() or time.time() > args.deadline:
        return
    processor = make_processor()
    model = make_model(processor, name, seed, torch.load(language_model, weights_only=True)["model"])
    times, kept = LONGER if name in AGAIN else 1, path.with_suffix(".training")
    course = Course(processor, args, times * args.steps, times * args.every, model.config.image_seq_length)
    record = train(model, course, args, seed, lambda stage: enter(model, name, stage), RATES, kept)
    if record is None:
        return
    cell = {"visual_tokens": model.config.image_seq_length, "question_flops": question_flops(model, course)}
    cell |= {"trained": sum(p.numel() for p in model.parameters() if p.requires_grad), "chance": course.final.chance()}
    if name == REFERENCE:
        others = {label: switched(model, changes) for label, changes in SWITCHES.items()}
        cell["switched"] = {label: course.final.scores(other) for label, other in others.items()}
    measure.write_json(path, cell | record)
    kept.unlink()


def work(what, *given) -> None:
    """Calls one of the two functions above, in a worker process."""
    what(*given)
    if orphaned():
        os._exit(1)  # or it would wait for more work forever


# --- tables and plots -------------------------------------------------------------------------------------------------


def by_model(result: dict) -> dict[str, list[dict]]:
    """The finished cells, by model."""
    found = {name: [cell for cell in result["cells"] if cell["model"] == name] for name in MODELS}
    return {name: cells for name, cells in found.items() if cells}


def compared(result: dict) -> dict[str, list[dict]]:
    """The finished cells of the models that all have the same number of steps."""
    return {name: cells for name, cells in by_model(result).items() if name not in AGAIN}


def spreads(examined: list[dict]) -> list[str]:
    """Mean and range of several examinations, for each measure."""
    return [spread([average(scores, measured) for scores in examined]) for measured in MEASURES]


def last(cells: list[dict]) -> list[dict]:
    """The scores at the end of training."""
    return [cell["scores"][-1] for cell in cells]


def chance(cells: list[dict], measured: str) -> float:
    """The score of always giving the most frequent answer."""
    return average(cells[0]["chance"], measured)


def summary(result: dict) -> str:
    """The Markdown table of costs and accuracies."""
    rows, models = [], compared(result)
    base = models[REFERENCE][0]["question_flops"] if REFERENCE in models else None
    for name, cells in models.items():
        one = cells[0]
        row = [name, str(one["visual_tokens"]), f"{one['trained']:,}", f"{one['question_flops'] / 1e6:.1f}"]
        row += ["" if base is None else f"{one['question_flops'] / base:.0%}"]
        row += [f"{mean(cell['seconds'][-1] for cell in cells):.0f}", str(len(cells))]
        rows.append(row + spreads(last(cells)))
    header = ["model", "visual tokens", "trained parameters", "MFLOPs per question", "vs. LLaVA", "CPU s", "seeds"]
    told = list(result["language_models"].values())
    rows.append([TOLD, *[""] * (len(header) - 2), str(len(told)), *spreads(told)])
    return table([*header, *MEASURES], rows)


def by_kind(result: dict) -> str:
    """The Markdown table of accuracies by kind of question, averaged over seeds."""
    models = compared(result)
    chances = next(iter(models.values()))[0]["chance"]
    kinds = [(task, kind) for task in TASKS for kind in chances[task]]
    rows = [["most frequent answer", *(f"{chances[task][kind]:.0%}" for task, kind in kinds)]]
    for name, cells in models.items():
        rows.append([name, *(f"{mean(scores[task][kind] for scores in last(cells)):.0%}" for task, kind in kinds)])
    return table(["model", *(kind for _, kind in kinds)], rows)


def after_training(result: dict) -> str:
    """The Markdown table of the trained LLaVA with each switch; empty without a trained LLaVA."""
    cells = by_model(result).get(REFERENCE, [])
    rows = {REFERENCE: last(cells)} if cells else {}
    rows |= {label: [cell["switched"][label] for cell in cells] for label in SWITCHES if cells}
    return table(["", *MEASURES], [[label, *spreads(examined)] for label, examined in rows.items()])


def twins(result: dict) -> str:
    """The Markdown table of the two models that differ by rounding alone, by seed."""
    models, rows = by_model(result), []
    for cell in sorted((cell for name in TWINS for cell in models.get(name, [])), key=lambda cell: cell["seed"]):
        rows.append([f"seed {cell['seed']}, {cell['model']}", *spreads(last([cell]))])
    return table(["", *MEASURES], rows)


def longer(result: dict) -> str:
    """The Markdown table of models before and after longer training."""
    models, rows = by_model(result), []
    for label, name in AGAIN.items():
        after = models.get(label, [])
        seeds = {cell["seed"] for cell in after}
        before = [cell for cell in models.get(name, []) if cell["seed"] in seeds]
        for cells in filter(None, (before, after)):
            rows.append([name, str(cells[0]["steps"][-1]), str(len(cells)), *spreads(last(cells))])
    return table(["", "steps", "seeds", *MEASURES], rows)


def apart(values: list[float], gap: float) -> list[float]:
    """Ascending values, moved to be at least `gap` apart with the least sum of squares (isotonic regression)."""
    groups = []  # of values that touch: their common place without the gaps, and their number
    for number, value in enumerate(values):
        groups.append((value - number * gap, 1))
        while len(groups) > 1 and groups[-2][0] > groups[-1][0]:
            (high, many), (low, few) = groups[-2:]
            groups[-2:] = [((high * many + low * few) / (many + few), many + few)]
    places = [place for place, count in groups for _ in range(count)]
    return [place + number * gap for number, place in enumerate(places)]


def plot(result: dict, path: str) -> None:
    """Plots accuracy against the FLOPs of a question: each seed, their mean and, hollow, the mean after longer training.
    Models with about the same FLOPs are drawn side by side."""
    pyplot = drawing()
    models = sorted(compared(result).items(), key=lambda model: model[1][0]["question_flops"])
    after = {AGAIN[label]: cells for label, cells in by_model(result).items() if label in AGAIN}
    places = apart([cells[0]["question_flops"] / 1e6 for _, cells in models], gap=1.2)
    figure, axes = pyplot.subplots(len(MEASURES), figsize=(12, 10), sharex=True, layout="constrained")
    colours = pyplot.get_cmap("tab20").colors
    handles = {}
    for axis, measured in zip(axes, MEASURES):
        for (name, cells), place in zip(models, places):
            number = list(MODELS).index(name)
            found = [100 * average(scores, measured) for scores in last(cells)]
            look, point = {"color": colours[number]}, (place, mean(found))
            axis.plot([place, place], [min(found), max(found)], linewidth=1, **look)
            axis.plot([place] * len(found), found, ".", markersize=4, **look)
            mark = {"marker": "o" if "SAISA" in name else "s", "markersize": 7, "linestyle": "", **look}
            handles[number] = axis.plot(*point, **mark)[0]
            if name in after:
                later = mean(average(scores, measured) for scores in last(after[name]))
                axis.plot(place, 100 * later, markerfacecolor="none", **mark)
            axis.annotate(str(number + 1), point, textcoords="offset points", xytext=(5, 5), fontsize=8)
        axis.axhline(100 * chance(models[0][1], measured), color="#999999", linestyle=":", linewidth=1)
        told = mean(average(scores, measured) for scores in result["language_models"].values())
        axis.axhline(100 * told, color="#999999", linestyle="--", linewidth=1)
        axis.set(title=measured, ylabel="exactly right, %")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("MFLOPs per question, without the encoder")
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
    learning.add_options(parser, steps=800, every=200)
    parser.add_argument(
        "--language-steps", type=int, default=9000, help="training steps of a language model, on words alone"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        help="models to train in parallel, one thread each; 0: one at a time, in this process",
    )
    return learning.parsed(parser, argv)


def settings_of(args) -> dict:
    """The settings that the results depend on."""
    own = {"stages": [list(stage) for stage in STAGES], "rate": list(RATES), "longer": LONGER}
    language = {"stages": [list(stage) for stage in learning.STAGES], "rate": RATE, "steps": args.language_steps}
    return learning.settings_of(args) | own | {"language_model": language}


class AtOnce(Executor):
    """An executor that runs each job at once, in this process."""

    def submit(self, what, /, *given) -> Future:
        job = Future()
        job.set_result(what(*given))
        return job


def train_all(args, result: dict) -> None:
    """Trains the cells that `result` lacks and adds them, here and in the JSON file."""
    there = {(cell["model"], cell["seed"]) for cell in result["cells"]}
    todo = [(name, seed) for seed, name in product(args.seeds, args.models) if (name, seed) not in there]
    with ProcessPoolExecutor(args.workers, get_context("spawn")) if args.workers else AtOnce() as workers:
        speakers = {seed: workers.submit(work, train_language_model, args, seed) for seed in args.seeds}
        jobs = {}
        for seed, speaker in speakers.items():
            speaker.result()
            if language_path(args, seed).exists():
                kept = torch.load(language_path(args, seed), weights_only=True)
                result["language_models"][f"seed {seed}"] = kept["scores"]
            jobs |= {cell: workers.submit(work, train_cell, args, *cell) for cell in todo if cell[1] == seed}
        for (name, seed), job in jobs.items():
            job.result()
            cell = done(args, name, seed)
            if cell is not None:
                result["cells"].append({"model": name, "seed": seed} | cell)
                measure.write_json(args.json, result)
                print(summary(result), flush=True)


def main(argv=None) -> dict:
    args = arguments(argv)
    args.deadline = time.time() + 60 * args.until
    settings = settings_of(args)
    result = learning.result_so_far(args, settings)
    if args.until > 0:
        folder(args).mkdir(parents=True, exist_ok=True)
        result = result or {"machine": measure.machine("cpu"), "settings": settings, "language_models": {}, "cells": []}
        measure.write_json(args.json, result)
        train_all(args, result)
    if result.get("cells"):
        if args.plot:
            plot(result, args.plot)
        if args.tables:
            blocks = {"summary": summary(result), "kinds": by_kind(result)}
            blocks |= {"switched": after_training(result), "twins": twins(result), "longer": longer(result)}
            fill_blocks(args.tables, blocks)
        print(summary(result))
    return result


if __name__ == "__main__":
    main()
