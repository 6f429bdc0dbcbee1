# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the study on real weights found, as tables of a page and as plots: from its JSON file alone.

python benchmarks/real_page.py benchmarks/real_weights.json PAGE.md IMAGES
"""

import argparse
import json
from itertools import count
from pathlib import Path
from statistics import mean

import numpy as np
from drawings import Thing
from drawn_scenes import SHARES, make

from saisa_hf.common.plots import drawing
from saisa_hf.common.tables import fill_blocks, table


MEMBERS = ("llava", "naavit", "shortv", "saisa", "saisa-shared", "vica")
COLOURS = dict(zip(MEMBERS, ("#444444", "#8e44ad", "#b7950b", "#c0392b", "#d98880", "#1e8449")))
KINDS = ("name", "category", "colour", "count", "position", "relation", "presence", "reading", "chart", "all")
FREE = ("noto", "fluent")  # artists whose drawings are under the Apache and the MIT licence
EXAMS = {"artist": "known things, an artist never seen", "unseen": "things, words and names never seen"}


def members(result: dict) -> list[str]:
    """Those that have been trained with at least one seed."""
    return [name for name in MEMBERS if result["runs"].get(name)]


def of_seeds(result: dict, name: str, *keys: str) -> list[float]:
    """One number of each seed's run."""
    found = []
    for run in result["runs"][name].values():
        for key in keys:
            run = run[key]
        found.append(run)
    return found


def share(values: list[float]) -> str:
    """A mean in per cent; with several seeds also the lowest and the highest."""
    if len(values) == 1:
        return f"{100 * values[0]:.1f}"
    return f"{100 * mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def state(result: dict) -> str:
    """How far the study is, and what the language model was before it."""
    seeds = {name: len(result["runs"][name]) for name in members(result)}
    done = ", ".join(f"{name} {count}" for name, count in seeds.items())
    missing = [name for name in MEMBERS if name not in seeds]
    text = f"Seeds that are trained: {done}." + (f" Not yet trained: {', '.join(missing)}." if missing else "")
    return f"{text} Perplexity of the text before any training: {result['before']['perplexity']:.2f}."


def summary(result: dict) -> str:
    """The members: what they get right and what they cost."""
    header = ["", "seeds", "right, new artist, %", "right, new things, %", "perplexity of text", "prompt, GFLOPs"]
    header += ["of LLaVA's", "prompt, ms", "cache, KiB", "projectors, million", "training, s", "learning rate"]
    rows = []
    for name in members(result):
        costs, base = result["costs"][name], result["costs"]["llava"]
        runs = result["runs"][name].values()
        seconds = [run["seconds"] + run["first"]["seconds"] for run in runs]
        time = result.get("times", {}).get(name)
        row = [name, str(len(runs)), *(share(of_seeds(result, name, exam, "all")) for exam in EXAMS)]
        row += [f"{mean(of_seeds(result, name, 'perplexity')):.2f}", f"{costs['prompt_flops'] / 1e9:.1f}"]
        row += [f"{costs['prompt_flops'] / base['prompt_flops']:.2f}", f"{1e3 * time['prompt']:.0f}" if time else ""]
        row += [f"{costs['cache_bytes'] / 2**10:,.0f}", f"{costs['projectors'] / 1e6:.2f}", f"{mean(seconds):,.0f}"]
        rows.append([*row, f"{next(iter(runs))['rate']:g}"])
    return table(header, rows)


def by_kind(result: dict, exam: str) -> str:
    """Right answers by kind of question, per cent."""
    names = members(result)
    header = ["", "questions", "most frequent answer", *names]
    rows = []
    for kind in kinds_of(result, exam):
        chance = result["chance"][exam][kind]
        row = [kind, str(result["questions"][exam][kind]), f"{100 * chance:.1f}"]
        rows.append([*row, *(share(of_seeds(result, name, exam, kind)) for name in names)])
    return table(header, rows)


def kinds_of(result: dict, exam: str) -> list[str]:
    """The kinds of question that an exam has."""
    return [kind for kind in KINDS if kind in result["questions"][exam]]


def search(result: dict) -> str:
    """The loss on held-out phrasings after a short second stage, by learning rate."""
    rates = [f"{rate:g}" for rate in result["settings"]["rates"]]
    names = [name for name in MEMBERS if len(result["search"].get(name, {})) == len(rates)]
    return table(["", *rates], [[name, *(f"{result['search'][name][rate]:.3f}" for rate in rates)] for name in names])


def draw(result: dict, folder: Path) -> None:
    """`real_weights.png`: accuracy over FLOPs, and by kind of question."""
    pyplot = drawing()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.4), width_ratios=(1, 1.7), layout="constrained")
    for name in members(result):
        flops = result["costs"][name]["prompt_flops"] / 1e9
        for exam, marker in zip(EXAMS, "o^"):
            found = 100 * np.array(of_seeds(result, name, exam, "all"))
            left.plot([flops] * len(found), found, marker, color=COLOURS[name], markersize=5, alpha=0.8)
        left.annotate(
            name, (flops, 100 * max(of_seeds(result, name, "artist", "all"))), (3, 6), textcoords="offset points"
        )
    left.set_xlabel("GFLOPs of a prompt")
    left.set_ylabel("exactly right, %")
    left.set_title("circles: new artist, triangles: new things", fontsize=10)
    width = 0.8 / len(members(result))
    kinds = kinds_of(result, "artist")[:-1]
    for place, name in enumerate(members(result)):
        each = [100 * np.array(of_seeds(result, name, "artist", kind)) for kind in kinds]
        at = np.arange(len(kinds)) + (place - (len(members(result)) - 1) / 2) * width
        errors = [[x.mean() - x.min() for x in each], [x.max() - x.mean() for x in each]]
        right.bar(
            at, [x.mean() for x in each], width, yerr=errors, color=COLOURS[name], label=name, error_kw={"lw": 0.8}
        )
    chance = [100 * result["chance"]["artist"][kind] for kind in kinds]
    right.plot(np.arange(len(kinds)), chance, "_", color="#000000", markersize=24, label="most frequent answer")
    right.set_xticks(np.arange(len(kinds)), kinds)
    right.set_title("new artist, by kind of question", fontsize=10)
    right.legend(fontsize=8, frameon=False, ncols=2)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "real_weights.png", dpi=110)
    pyplot.close(figure)


def draw_samples(things: list[Thing], path: Path) -> None:
    """One sample of each type with its questions, with drawings under licences that ask for no more than a notice."""
    pyplot, found = drawing(), {}
    for number in count():
        sample = make("train", number, things)
        if all(getattr(one, "artist", FREE[0]) in FREE for one in sample.layout):
            found.setdefault(sample.type, sample)
        if len(found) == len(SHARES):
            break
    figure, axes = pyplot.subplots(1, len(found), figsize=(12, 4.4), layout="constrained")
    for axis, sample in zip(axes, found.values()):
        axis.imshow(sample.picture)
        axis.set_xticks([])
        axis.set_yticks([])
        lines = [sample.caption, *(f"{turn.question} {turn.answer}" for turn in sample.turns)]
        axis.set_xlabel("\n".join(lines), fontsize=8, loc="left")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def blocks(result: dict) -> dict[str, str]:
    """The page's marked tables."""
    found = {"state": state(result), "summary": summary(result), "search": search(result)}
    return found | {f"kinds_{exam}": by_kind(result, exam) for exam in EXAMS}


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("images", type=Path)
    args = parser.parse_args(argv)
    result = json.loads(args.json.read_text())
    fill_blocks(args.page, blocks(result))
    draw(result, args.images)


if __name__ == "__main__":
    main()
