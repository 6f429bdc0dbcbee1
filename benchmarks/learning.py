# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Does a SAISA learn as well as a LLaVA, at a lower cost? Trains small models of both kinds from scratch on images of
handwritten digits, with the same encoder, initial weights and batches. Reports accuracy on held-out handwriting against
steps, FLOPs and seconds, on the demo's questions and on questions that relate visual tokens to each other (`relations.py`).

    python benchmarks/learning.py --json result.json --plot result.png --tables page.md

The models of a seed take turns at each step, so that other load on the machine affects all of them alike. Each measurement
writes the results so far and the training state beside them; an interrupted run resumes from there. `--until 0` trains
nothing and shows the results so far.
"""

import argparse
import copy
import json
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import relations
import torch
from digit_models import RATE, VISUAL_TOKENS, keep, new_llava, optimizer_of, training_step

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration
from saisa_hf.bench import measure
from saisa_hf.checkpoints.from_llava import saisa_from_llava
from saisa_hf.common.plots import drawing
from saisa_hf.common.tables import fill_blocks, table
from saisa_hf.demo import scenes
from saisa_hf.demo import train as demo
from saisa_hf.demo.language import Conversation


DEPTH, BATCH = 4, 16
EXERCISES = {"lists": 0.6, "neighbours": 0.4}
# The stages: share of the training, each with its own schedule, and the mix of sequences.
STAGES = ((0.375, EXERCISES), (0.625, {"lists": 0.06, "neighbours": 0.04, "questions": 0.4, "relations": 0.5}))
REFERENCE = "LLaVA"
MODELS = {  # changes to the configuration of a SAISA; None: a LLaVA
    REFERENCE: None,
    "SAISA": {},
    "SAISA, one projector": {"projector_sharing": "shared"},
    "SAISA, layers 1 and 3": {"visual_layers": [1, 3]},
}
COLOURS = ("#444444", "#c0392b", "#2471a3", "#1e8449")
TASKS = {"questions": scenes, "relations": relations}
TITLES = {"questions": "the demo's questions", "relations": "relations between visual tokens"}
MEASURES = {  # averages over: task and kinds of question
    "the demo's questions": ("questions", scenes.KINDS),
    "neighbour": ("relations", ("neighbour",)),
    "larger, agree": ("relations", ("larger", "agree")),
}
QUESTIONS_SEED = 1
COUNTED_BATCHES = 10  # per stage, to count FLOPs on


# --- data -------------------------------------------------------------------------------------------------------------


def drawn(scene: scenes.Scene) -> dict:
    """A scene as an image, for models with an encoder."""
    return {"picture": scenes.draw(scene)}


class Mixture:
    """Training sequences of one image and turns about it, mixed as `stages` says: the demo's lists and questions, and those
    of `relations`. The batch of a step depends on (seed, step) alone.

    Args:
        stages: share of the training, and mix of sequences, of each stage.
        show: turns a scene into part of an item.
        stream: different streams give independent sequences.
    """

    def __init__(self, conversation: Conversation, collate, seed: int, steps: int, stages=STAGES, show=drawn, stream=4):
        self.conversation, self.collate, self.show, self.key = conversation, collate, show, (seed, stream)
        shares = {"lists": 1.0, "questions": 0.0}
        self.demo = {name: demo.TurnDataset(conversation, "train", 1, seed, share) for name, share in shares.items()}
        ends = [round(steps * sum(part for part, _ in stages[: number + 1])) for number in range(len(stages))]
        self.stages = list(zip([0, *ends], ends, (shares for _, shares in stages)))

    def stage(self, step: int) -> int:
        """The index of the stage that contains a step."""
        return next(number for number, (_, end, _) in enumerate(self.stages) if step < end)

    def batch(self, step: int) -> tuple[dict[str, torch.Tensor], float]:
        """The batch of a step, and the fraction of its stage that is done."""
        start, end, shares = self.stages[self.stage(step)]
        items = [self.item(index, shares) for index in range(step * BATCH, (step + 1) * BATCH)]
        return self.collate(items), (step - start) / (end - start)

    def item(self, index: int, shares: dict[str, float]) -> dict:
        seed, stream = self.key
        rng = np.random.default_rng([seed, index, stream])
        task = rng.choice(list(shares), p=list(shares.values()))
        scene = (scenes if task in self.demo else relations).make_scene("train", rng)
        if task in self.demo:
            turns = self.demo[task].turns(scene, rng)
        elif task == "neighbours":
            turns = [(relations.LIST, relations.list_all(scene))]
        else:
            turns = [(question.text, question.answer) for question in relations.turns(scene, rng)]
        ids, labels = self.conversation.ids_and_labels(turns)
        return self.show(scene) | {"ids": ids, "labels": labels}


class Examination:
    """Questions about held-out handwriting, one per image, `count` per task. `show` is as in `Mixture`."""

    def __init__(self, conversation: Conversation, collate, count: int, size: int = 100, show=drawn):
        self.asked = {task: module.held_out_questions(count, QUESTIONS_SEED) for task, module in TASKS.items()}
        self.batches = {task: [] for task in TASKS}
        for task, asked in self.asked.items():
            for start in range(0, count, size):
                items = []
                for scene, question in asked[start : start + size]:
                    ids, labels = conversation.ids_and_labels([(question.text, question.answer)])
                    items.append(show(scene) | {"ids": ids, "labels": labels})
                self.batches[task].append(collate(items))

    @torch.no_grad()
    def right(self, model, task: str) -> list[bool]:
        """For each question, whether greedy decoding gives exactly the right answer: whether each of its tokens, and the
        end token, is the most likely one given those before it."""
        found = []
        for batch in self.batches[task]:
            labels = batch["labels"][:, 1:]
            given = {name: tensor for name, tensor in batch.items() if name != "labels"}
            likely = model(**given, use_cache=False).logits[:, :-1].argmax(-1)
            found += ((likely == labels) | (labels == -100)).all(dim=1).tolist()
        return found

    def scores(self, model) -> dict[str, dict[str, float]]:
        """The share of exactly right answers, by task and kind of question."""
        model.eval()
        result = {}
        for task, asked in self.asked.items():
            kinds = [question.kind for _, question in asked]
            hits = Counter(kind for kind, right in zip(kinds, self.right(model, task)) if right)
            result[task] = {kind: round(hits[kind] / count, 4) for kind, count in Counter(kinds).items()}
        model.train()
        return result

    def chance(self) -> dict[str, dict[str, float]]:
        """The score of always giving the most frequent answer, by task and kind of question."""
        result = {}
        for task, asked in self.asked.items():
            answers = {}
            for _, question in asked:
                answers.setdefault(question.kind, []).append(question.answer)
            best = {kind: max(Counter(given).values()) / len(given) for kind, given in answers.items()}
            result[task] = {kind: round(value, 4) for kind, value in best.items()}
        return result


# --- models -----------------------------------------------------------------------------------------------------------


def make_processor():
    processor = demo.make_processor()
    relations.add_words(processor.tokenizer)
    return processor


def make_models(processor, seed: int) -> dict[str, torch.nn.Module]:
    """The models to compare. All start from the LLaVA's weights; each projector is a copy of the LLaVA's."""
    torch.manual_seed(seed)
    llava = new_llava(processor, DEPTH)
    start, models = saisa_from_llava(copy.deepcopy(llava)), {}
    weights = {name: tensor for name, tensor in start.state_dict().items() if "visual_projector." not in name}
    for name, changes in MODELS.items():
        if changes is None:
            models[name] = llava
        else:
            model = SaisaForConditionalGeneration(SaisaConfig.from_dict({**start.config.to_dict(), **changes}))
            model.load_state_dict(weights, strict=False)
            for part, module in model.named_modules():
                if part.endswith("visual_projector"):
                    module.load_state_dict(llava.model.multi_modal_projector.state_dict())
            models[name] = model
    return {name: model.train() for name, model in models.items()}


def cost(model, stages: list[list[dict]]) -> dict:
    """FLOPs of a training step, forward and backward, averaged over the batches of each stage; those of the frozen encoder;
    and the number of trained parameters."""
    optimizer_of(model)
    model.set_attn_implementation("eager")  # plain matrix products, which the FLOP counter counts on every device

    def steps(batches):
        for batch in batches:
            model(**batch).loss.backward()

    pixel_values = stages[0][0]["pixel_values"]
    return {
        "flops": [measure.flops(lambda batches=batches: steps(batches)) / len(batches) for batches in stages],
        "encoder_flops": measure.flops(lambda: model.model.vision_tower(pixel_values)),
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
    }


# --- training ---------------------------------------------------------------------------------------------------------


class Class:
    """What all seeds share: vocabulary, examinations, and the cost of a step."""

    def __init__(self, args):
        self.processor = make_processor()
        self.conversation = Conversation(self.processor.tokenizer, VISUAL_TOKENS)
        self.collate = demo.TurnCollator(self.processor.tokenizer.pad_token_id)
        self.often = Examination(self.conversation, self.collate, args.questions)
        self.final = Examination(self.conversation, self.collate, args.final_questions)

    def mixture(self, seed: int, steps: int) -> Mixture:
        return Mixture(self.conversation, self.collate, seed, steps)

    def costs(self) -> dict[str, dict]:
        data = self.mixture(0, COUNTED_BATCHES * 100)
        counted = [[data.batch(start + step)[0] for step in range(COUNTED_BATCHES)] for start, _, _ in data.stages]
        return {name: cost(model, counted) for name, model in make_models(self.processor, 0).items()}


def train_cell(args, shared: Class, seed: int, save) -> None:
    """Trains all models of a seed, resuming from the state on disk. Calls `save` with the results so far after each
    measurement."""
    data, models = shared.mixture(seed, args.steps), make_models(shared.processor, seed)
    optimizers = {name: optimizer_of(model) for name, model in models.items()}
    kept = Path(f"{args.json}.seed-{seed}.training")
    state = {"step": 0, "seconds": dict.fromkeys(models, 0.0), "losses": dict.fromkeys(models, 0.0)}
    state["cell"] = {"steps": [], "models": {name: {"seconds": [], "loss": [], "scores": []} for name in models}}
    if kept.exists():
        loaded = torch.load(kept, weights_only=True)
        state = {name: loaded[name] for name in state}
        for name, model in models.items():
            model.load_state_dict(loaded["models"][name])
            optimizers[name].load_state_dict(loaded["optimizers"][name])
    cell, names = state["cell"], list(models)

    def keep_state():
        weights = {name: model.state_dict() for name, model in models.items()}
        moments = {name: optimizer.state_dict() for name, optimizer in optimizers.items()}
        keep(state | {"models": weights, "optimizers": moments}, kept)

    while True:
        step = state["step"]
        if step % args.every == 0 and step not in cell["steps"]:
            examination = shared.final if step == args.steps else shared.often
            cell["steps"].append(step)
            for name, model in models.items():
                curve = cell["models"][name]
                curve["seconds"].append(round(state["seconds"][name], 2))
                curve["loss"].append(round(state["losses"][name] / args.every, 4) if step else None)
                curve["scores"].append(examination.scores(model))
                state["losses"][name] = 0.0
            keep_state()
            save(cell)
            print(f"seed {seed}, step {step}\n{show_cell(cell)}", flush=True)
        if step == args.steps:
            kept.unlink()
            return
        if time.monotonic() > args.deadline:
            keep_state()
            return
        batch, done = data.batch(step)
        turn = step % len(names)
        for name in names[turn:] + names[:turn]:  # no model is always the first
            start = time.process_time()
            state["losses"][name] += training_step(models[name], optimizers[name], batch, done)
            state["seconds"][name] += time.process_time() - start
        state["step"] += 1


# --- tables and plots -------------------------------------------------------------------------------------------------


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def spread(values: list[float]) -> str:
    """The mean, with minimum and maximum if there are several values."""
    low, high = (f"{100 * value:.1f}" for value in (min(values), max(values)))
    return f"{mean(values):.1%}" + (f" ({low} to {high})" if len(values) > 1 else "")


def show_cell(cell: dict) -> str:
    """The last measurement of a seed."""
    rows = []
    for name, curve in cell["models"].items():
        last = curve["scores"][-1]
        row = [name, f"{curve['seconds'][-1]:.0f}", f"{curve['loss'][-1] or math.nan:.3f}"]
        row += [f"{mean(last[task].values()):.1%}" for task in TASKS]
        rows.append([*row, " ".join(f"{100 * value:.0f}" for task in TASKS for value in last[task].values())])
    return table(["", "CPU s", "loss", *TASKS, "by kind, %"], rows)


def complete(result: dict) -> dict[str, dict]:
    """The seeds whose training is complete."""
    return {name: cell for name, cell in result["cells"].items() if cell["steps"][-1] == result["settings"]["steps"]}


def shown(result: dict) -> tuple[list[dict], list[int]]:
    """The complete seeds, or all seeds if none is complete; and the steps at which all of them were measured."""
    cells = list((complete(result) or result["cells"]).values())
    return cells, min((cell["steps"] for cell in cells), key=len)


def average(scores: dict[str, dict[str, float]], measured: str) -> float:
    task, kinds = MEASURES[measured]
    return mean(scores[task][kind] for kind in kinds)


def flops_until(result: dict, name: str, step: int) -> float:
    """FLOPs of a model's training up to a step."""
    total, start = 0.0, 0
    for (part, _), flops in zip(result["settings"]["stages"], result["cost"][name]["flops"]):
        length = round(part * result["settings"]["steps"])
        total += flops * min(max(step - start, 0), length)
        start += length
    return total


def summary(result: dict) -> str:
    """The Markdown table of costs and accuracies at the last step shown."""
    cells, steps = shown(result)
    last, step = len(steps) - 1, steps[-1]
    base = flops_until(result, REFERENCE, step)
    header = ["model", "trained parameters", "TFLOPs", "vs. LLaVA", "CPU s", "vs. LLaVA"]
    rows = []
    for name in MODELS:
        flops, seconds = flops_until(result, name, step), [cell["models"][name]["seconds"][last] for cell in cells]
        ratios = [own / cell["models"][REFERENCE]["seconds"][last] for own, cell in zip(seconds, cells)]
        row = [name, f"{result['cost'][name]['trained']:,}", f"{flops / 1e12:.1f}", f"{flops / base:.0%}"]
        row += [f"{mean(seconds):.0f}", f"{mean(ratios):.0%}"]
        for measured in MEASURES:
            row.append(spread([average(cell["models"][name]["scores"][last], measured) for cell in cells]))
        rows.append(row)
    return table([*header, *MEASURES], rows)


def by_kind(result: dict) -> str:
    """The Markdown table of accuracies at the last step shown, by kind of question."""
    cells, steps = shown(result)
    last, rows = len(steps) - 1, []
    for task in TASKS:
        for kind, chance in result["chance"][task].items():
            row = [kind, f"{chance:.0%}"]
            for name in MODELS:
                row.append(spread([cell["models"][name]["scores"][last][task][kind] for cell in cells]))
            rows.append(row)
    return table(["question", "most frequent answer", *MODELS], rows)


def plot(result: dict, path: str) -> None:
    """Plots accuracy against steps, FLOPs and seconds: mean and range of the seeds shown."""
    pyplot = drawing()
    cells, steps = shown(result)
    points = len(steps)
    exercises = round(result["settings"]["stages"][0][0] * result["settings"]["steps"])
    figure, axes = pyplot.subplots(
        len(MEASURES), 3, figsize=(11, 8.5), sharey="row", sharex="col", layout="constrained"
    )
    for row, measured in zip(axes, MEASURES):
        for name, colour in zip(MODELS, COLOURS):
            curves = [cell["models"][name] for cell in cells]
            found = np.array([[average(scores, measured) for scores in curve["scores"][:points]] for curve in curves])
            seconds = np.mean([curve["seconds"][:points] for curve in curves], axis=0)
            spent = [flops_until(result, name, step) / 1e12 for step in steps]
            for axis, x in zip(row, (steps, spent, seconds)):
                axis.plot(x, 100 * found.mean(axis=0), "o-", color=colour, markersize=3, linewidth=1.6, label=name)
                low, high = 100 * found.min(axis=0), 100 * found.max(axis=0)
                axis.fill_between(x, low, high, color=colour, alpha=0.12, linewidth=0)
        chance = 100 * average(result["chance"], measured)
        for axis in row:
            axis.axhline(chance, color="#999999", linestyle=":", linewidth=1, label="most frequent answer")
            axis.grid(alpha=0.25)
            axis.spines[["top", "right"]].set_visible(False)
        row[0].axvspan(0, exercises, color="#000000", alpha=0.05, linewidth=0)
        row[0].set_ylabel(f"{measured}\nexactly right, %")
    for axis, label in zip(
        axes[-1], ("training steps (grey: exercises)", "training TFLOPs", "CPU seconds of training")
    ):
        axis.set_xlabel(label)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def plot_tasks(path: str, seed: int = 16, shown: int = 5) -> None:
    """Plots one held-out image of each task, with questions and answers."""
    pyplot = drawing("--example")
    figure, axes = pyplot.subplots(1, 2, figsize=(11, 3), layout="constrained")
    for axis, (task, module) in zip(axes, TASKS.items()):
        rng = np.random.default_rng(seed)
        scene = module.make_scene("test", rng)
        asked = [module.ask(scene, kind, rng) for kind in module.KINDS]
        asked = module.turns(scene, rng) if task == "relations" else [question for question in asked if question]
        lines = [f"{question.text}  {question.answer}" for question in asked[:shown]]
        axis.imshow(scenes.draw(scene), interpolation="bicubic")
        axis.text(scenes.SIZE + 4, scenes.SIZE / 2, "\n\n".join(lines), va="center", fontsize=10)
        axis.set_title(TITLES[task], loc="left", fontsize=11)
        axis.set_xlim(0, 2.2 * scenes.SIZE)
        axis.axis("off")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def add_options(parser: argparse.ArgumentParser, steps: int, every: int) -> None:
    """The options of every script that trains models on these tasks for a few seeds."""
    parser.add_argument(
        "--json", metavar="PATH", required=True, help="all results; training states to resume from are kept beside it"
    )
    parser.add_argument("--plot", metavar="PATH", help="draw the results into this image file")
    parser.add_argument("--tables", metavar="PATH", help="update the marked tables of this Markdown page")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2))
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--every", type=int, default=every, help="steps between measurements; must divide --steps")
    parser.add_argument("--questions", type=int, default=420, help="per task, at each measurement")
    parser.add_argument("--final-questions", type=int, default=2100, help="per task, at the end")
    parser.add_argument("--until", type=float, default=math.inf, metavar="MINUTES", help="stop after this many")


def parsed(parser: argparse.ArgumentParser, argv) -> argparse.Namespace:
    args = parser.parse_args(argv)
    if args.steps % args.every:
        parser.error(f"--every {args.every} does not divide --steps {args.steps}")
    return args


def settings_of(args) -> dict:
    """The settings that the results depend on."""
    settings = {name: getattr(args, name) for name in ("steps", "every", "questions", "final_questions")}
    return settings | {"batch": BATCH, "rate": RATE, "depth": DEPTH, "stages": [list(stage) for stage in STAGES]}


def result_so_far(args, settings: dict) -> dict:
    """The results that are already in the file.

    Raises:
        ValueError: they were made with other settings.
    """
    path = Path(args.json)
    result = json.loads(path.read_text()) if path.exists() else {}
    if result and result["settings"] != settings:
        raise ValueError(f"{path} was made with {result['settings']}, not {settings}: choose another --json.")
    return result


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_options(parser, steps=2400, every=200)
    parser.add_argument("--example", metavar="PATH", help="draw an example of both tasks into this image file")
    return parsed(parser, argv)


def main(argv=None) -> dict:
    args = arguments(argv)
    args.deadline = time.monotonic() + 60 * args.until
    torch.set_num_threads(1)
    settings = settings_of(args)
    result = result_so_far(args, settings)
    if args.until > 0:
        shared = Class(args)
        if not result:
            result = {"machine": measure.machine("cpu"), "settings": settings, "chance": shared.final.chance()}
            result |= {"cost": shared.costs(), "cells": {}}
        for seed in args.seeds:
            if f"seed {seed}" in complete(result) or time.monotonic() > args.deadline:
                continue

            def save(cell, name=f"seed {seed}"):
                result["cells"][name] = cell
                measure.write_json(args.json, result)

            train_cell(args, shared, seed, save)
    if args.example:
        plot_tasks(args.example)
    if args.plot and result.get("cells"):
        plot(result, args.plot)
    if result.get("cells"):
        print(summary(result), by_kind(result), sep="\n\n")
        if args.tables:
            fill_blocks(args.tables, {"summary": summary(result), "kinds": by_kind(result)})
    return result


if __name__ == "__main__":
    main()
