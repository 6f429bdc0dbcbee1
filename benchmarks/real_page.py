# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the study on real weights found, as tables of a page and as plots: from its JSON file alone.

python benchmarks/real_page.py benchmarks/real_weights.json PAGE.md IMAGES --llava benchmarks/real_llava.json
"""

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean

import numpy as np
from drawn_scenes import SHARES, Sample

from saisa_hf.common.plots import drawing
from saisa_hf.common.tables import fill_blocks, table


MEMBERS = ("llava", "naavit", "shortv", "saisa", "saisa-shared", "vica")
COLOURS = dict(zip(MEMBERS, ("#444444", "#8e44ad", "#b7950b", "#c0392b", "#d98880", "#1e8449")))
KINDS = ("name", "category", "colour", "count", "position", "relation", "presence", "reading", "chart")
USUAL = "most frequent answer"
FREE = ("noto", "fluent")  # artists whose drawings are under the Apache and the MIT licence
EXAMS = {"artist": "known things, an artist never seen", "unseen": "things, words and names never seen"}


def members(result: dict) -> list[str]:
    """Those that have been trained with at least one seed."""
    return [name for name in MEMBERS if result["runs"].get(name)]


def hits(result: dict, name: str, exam: str, kind: str | None = None) -> np.ndarray:
    """(seeds, questions) 0 or 1: which answers are right, of all questions or of a kind. What things are called that training
    never names is left out of all."""
    runs = [result["chance"]] if name == USUAL else result["runs"][name].values()
    return np.stack([hits_of(run, result, exam, kind) for run in runs])


def hits_of(run: dict, result: dict, exam: str, kind: str | None = None) -> np.ndarray:
    """(questions,) the same for one run."""
    found, kinds = np.array([int(one) for one in run[exam]]), np.array(result["asked"][exam])
    return found[kinds == kind if kind else (kinds != "name") | (exam != "unseen")]


def share(values: Sequence[float]) -> str:
    """A mean in per cent; with several seeds also the lowest and the highest."""
    if len(values) == 1:
        return f"{100 * values[0]:.1f}"
    return f"{100 * mean(values):.1f} ({100 * min(values):.1f} to {100 * max(values):.1f})"


def difference(result: dict, name: str, exam: str, base: str = "llava") -> str:
    """How many points more are right than of `base`, question by question, over the seeds that both have, and its standard
    error; "" if there are none."""
    seeds = [seed for seed in result["runs"].get(name, {}) if seed in result["runs"].get(base, {})]
    if not seeds or name == base:
        return ""
    return paired(
        *(np.mean([hits_of(result["runs"][who][s], result, exam) for s in seeds], axis=0) for who in (name, base))
    )


def paired(one: np.ndarray, other: np.ndarray) -> str:
    """The mean difference of right answers in points, question by question, and its standard error."""
    points = 100 * (one - other)
    return f"{points.mean():+.1f} ± {points.std(ddof=1) / len(points) ** 0.5:.1f}"


def state(result: dict) -> str:
    """How far the study is, and what the language model was before it."""
    seeds = {name: len(result["runs"][name]) for name in members(result)}
    done = ", ".join(f"{name} {count}" for name, count in seeds.items())
    missing = [name for name in MEMBERS if name not in seeds]
    text = f"Seeds that are trained: {done}." + (f" Not yet trained: {', '.join(missing)}." if missing else "")
    return f"{text} Perplexity of the text before any training: {result['before']['perplexity']:.2f}."


def summary(result: dict) -> str:
    """The members: what they get right and what they cost."""
    header = [
        "",
        "new artist, %",
        "minus llava",
        "new things, %",
        "minus llava",
        "perplexity of text",
        "prompt, GFLOPs",
    ]
    header += ["of llava's", "prompt, ms", "cache, KiB", "projectors, million"]
    rows = []
    for name in members(result):
        costs, base = result["costs"][name], result["costs"]["llava"]
        row = [name]
        for exam in EXAMS:
            row += [share(hits(result, name, exam).mean(1)), difference(result, name, exam)]
        row += [f"{mean(run['perplexity'] for run in result['runs'][name].values()):.2f}"]
        row += [f"{costs['prompt_flops'] / 1e9:.1f}", f"{costs['prompt_flops'] / base['prompt_flops']:.2f}"]
        row += [f"{1e3 * result['times'][name]['prompt']:.0f}", f"{costs['cache_bytes'] / 2**10:,.0f}"]
        rows.append([*row, f"{costs['projectors'] / 1e6:.2f}"])
    return table(header, rows)


def by_kind(result: dict, exam: str) -> str:
    """Right answers by kind of question, per cent."""
    names, rows = [USUAL, *members(result)], []
    for kind in kinds_of(result, exam):
        rows.append([kind, str(result["asked"][exam].count(kind))])
        rows[-1] += [share(hits(result, name, exam, kind).mean(1)) for name in names]
    return table(["", "questions", *names], rows)


def kinds_of(result: dict, exam: str) -> list[str]:
    """The kinds of question that an exam has."""
    return [kind for kind in KINDS if kind in result["asked"][exam]]


def search(result: dict) -> str:
    """The loss on held-out phrasings after a short second stage, by learning rate; the rate that was taken is in bold."""
    rates, rows = [f"{rate:g}" for rate in result["settings"]["rates"]], []
    for name in MEMBERS:
        found = result.get("search", {}).get(name, {})
        if len(found) == len(rates):
            best = min((rate for rate in rates if found[rate] is not None), key=found.get)
            cells = ["diverged" if found[rate] is None else f"{found[rate]:.3f}" for rate in rates]
            rows.append([name, *(f"**{cell}**" if rate == best else cell for rate, cell in zip(rates, cells))])
    return table(["", *rates], rows)


def by_rate(result: dict) -> str:
    """The runs at the learning rate that the search found for LLaVA, and at those it found for others: members at their own
    rate, controls at that of another."""
    header = ["", "rate", "new artist, %", "minus llava", "new things, %", "minus llava", "perplexity of text"]
    at: dict[float, dict[str, str]] = {}  # rate -> member -> run
    for run, seeds in result["runs"].items():
        rate = next(iter(seeds.values()))["rate"]
        at.setdefault(rate, {})[run.partition("-at-")[0]] = run
    rows = []
    for rate in sorted(at):
        for name in (name for name in MEMBERS if name in at[rate]):
            run, runs = at[rate][name], result["runs"][at[rate][name]].values()
            rows.append([name, f"{rate:g}"])
            for exam in EXAMS:
                rows[-1] += [share(hits(result, run, exam).mean(1))]
                rows[-1] += [difference(result, run, exam, at[rate].get("llava", run))]
            rows[-1] += [f"{mean(each['perplexity'] for each in runs):.2f}"]
    return table(header, rows)


def fitted(result: dict, llava: dict) -> str:
    """The results of `real_llava.py`: SAISAs whose projectors were fitted to the trained LLaVA, beside it and the SAISA that
    was trained."""
    header = [
        "",
        "layers that see",
        "KL from LLaVA",
        "same top token, %",
        "new artist, %",
        "new things, %",
        "perplexity of text",
    ]
    rows = [["LLaVA, trained", "", "", "", *scores(llava["llava"], result)]]
    for name, found in llava["ways"].items():
        best, layers = list(found["agreement"].values())[-1], found["visual_layers"]
        seeing = "all" if layers is None else ", ".join(map(str, layers))
        row = [f"SAISA, fitted: {name}", seeing, f"{best['kl']:.3f}", f"{100 * best['top1']:.1f}"]
        rows.append([*row, *scores(found, result)])
    if trained := result["runs"].get("saisa", {}).get("0"):
        rows.append(["SAISA, trained", "all", "", "", *scores(trained, result)])
    return table(header, rows)


def scores(run: dict, result: dict) -> list[str]:
    """A run's right answers in both exams, per cent, and its perplexity of text."""
    return [*(f"{100 * hits_of(run, result, exam).mean():.1f}" for exam in EXAMS), f"{run['perplexity']:.2f}"]


def by_number(llava: dict) -> str:
    """How well a SAISA agrees with the LLaVA when fewer layers see the image: the fits that chose them."""
    rows = []
    for found in llava["ways"].values():
        for row in found.get("by_number", ()):
            layers = "all" if row["number"] == len(found["least"]) else ", ".join(map(str, row["layers"]))
            rows.append([str(row["number"]), f"{row['kl']:.3f}", f"{100 * row['top1']:.1f}", layers])
    return table(["layers that see", "KL from LLaVA", "same top token, %", "which"], rows)


def draw(result: dict, folder: Path) -> None:
    """`real_weights.png`: accuracy over FLOPs, and by kind of question."""
    pyplot, names = drawing(), members(result)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.4), width_ratios=(1, 1.7), layout="constrained")
    for name in names:
        flops = result["costs"][name]["prompt_flops"] / 1e9
        by_exam = [100 * hits(result, name, exam).mean(1) for exam in EXAMS]
        for found, marker in zip(by_exam, "o^"):
            left.plot([flops] * len(found), found, marker, color=COLOURS[name], markersize=5, alpha=0.8)
        below = {"rotation": 90, "horizontalalignment": "center", "verticalalignment": "top"}
        left.annotate(name, (flops, np.min(by_exam)), (0, -6), textcoords="offset points", **below)
    left.margins(y=0.2)
    left.set_xlabel("GFLOPs of a prompt")
    left.set_ylabel("exactly right, %")
    left.set_title("circles: new artist, triangles: new things", fontsize=10)
    width, kinds = 0.8 / len(names), kinds_of(result, "artist")
    for place, name in enumerate(names):
        each = [100 * hits(result, name, "artist", kind).mean(1) for kind in kinds]
        at = np.arange(len(kinds)) + (place - (len(names) - 1) / 2) * width
        errors = [[x.mean() - x.min() for x in each], [x.max() - x.mean() for x in each]]
        right.bar(
            at, [x.mean() for x in each], width, yerr=errors, color=COLOURS[name], label=name, error_kw={"lw": 0.8}
        )
    usual = [100 * hits(result, USUAL, "artist", kind).mean() for kind in kinds]
    right.plot(np.arange(len(kinds)), usual, "_", color="#000000", markersize=24, label=USUAL)
    right.set_xticks(np.arange(len(kinds)), kinds)
    right.set_title("new artist, by kind of question", fontsize=10)
    right.margins(y=0.15)
    right.legend(fontsize=8, frameon=False, ncols=3)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(folder / "real_weights.png", dpi=110)
    pyplot.close(figure)


def draw_samples(samples: Iterable[Sample], path: Path) -> None:
    """The first sample of each type with its questions, of drawings under licences that ask for no more than a notice."""
    pyplot, found = drawing(), {}
    for sample in samples:
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
        axis.set_xlabel("\n".join(lines), fontsize=7, loc="left")
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def blocks(result: dict, llava: dict | None = None) -> dict[str, str]:
    """The page's marked tables; `llava` are the results of `real_llava.py`, if there are any."""
    found = {"state": state(result), "summary": summary(result), "search": search(result), "by_rate": by_rate(result)}
    found |= {f"kinds_{exam}": by_kind(result, exam) for exam in EXAMS}
    if llava is None:
        return found
    chosen = any("by_number" in way for way in llava["ways"].values())
    return found | {"fitted": fitted(result, llava)} | ({"by_number": by_number(llava)} if chosen else {})


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("page", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--llava", type=Path, metavar="PATH", help="the results of real_llava.py")
    args = parser.parse_args(argv)
    result = json.loads(args.json.read_text(encoding="utf-8"))
    fill_blocks(args.page, blocks(result, args.llava and json.loads(args.llava.read_text(encoding="utf-8"))))
    draw(result, args.images)


if __name__ == "__main__":
    main()
