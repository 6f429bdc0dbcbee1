# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmarks by name: which files they take, how they are asked, scored and submitted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import official, uploads, yes_no
from .files import Files, Item


SHORT_ANSWER, LONG_ANSWER = 128, 1024  # new tokens, as LLaVA's scripts allow


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Attributes:
        title: its name as its authors write it.
        read: its questions from its files.
        metric: by which `scoring` scores it; empty: nobody but a judge does.
        max_new_tokens: of an answer.
        upload: what a server or judge takes.
        file: the name of that.
        receiver: who takes it.
        whole_split: whether `--annotations` may be questions too, those of the whole split, which the upload has to have.
        labels: what `--annotations` is, where the right answers are not with the questions.
    """

    title: str
    read: Callable[[Files], list[Item]]
    metric: str = ""
    max_new_tokens: int = SHORT_ANSWER
    upload: Callable[[Sequence[Item], Sequence[str], Files], bytes] | None = None
    file: str = ""
    receiver: str = ""
    labels: str = ""
    whole_split: bool = False


EVALAI = "the evaluation server at eval.ai"
PART = "coco_pope_random.json, coco_pope_popular.json and coco_pope_adversarial.json"

BENCHMARKS = {
    "vqav2": Benchmark(
        "VQAv2", official.vqav2, "vqa_accuracy", SHORT_ANSWER, uploads.vqav2, "upload.json", EVALAI,
        "v2_mscoco_val2014_annotations.json", whole_split=True,
    ),
    "gqa": Benchmark(
        "GQA", official.gqa, "gqa", SHORT_ANSWER, uploads.gqa, "predictions.json", "GQA's eval.py",
        "testdev_balanced_questions.json",
    ),
    "vizwiz": Benchmark(
        "VizWiz", official.vizwiz, "vizwiz_accuracy", SHORT_ANSWER, uploads.vizwiz, "upload.json", EVALAI, "val.json"
    ),
    "scienceqa": Benchmark(
        "ScienceQA-IMG", official.scienceqa, "scienceqa", LONG_ANSWER, labels="problems.json"
    ),
    "textvqa": Benchmark("TextVQA", official.textvqa, "textvqa_accuracy", labels="TextVQA_0.5.1_val.json"),
    "pope": Benchmark("POPE", yes_no.pope, "pope", labels=f"the folder with {PART}"),
    "mme": Benchmark("MME", yes_no.mme, "mme", labels="the folder MME_Benchmark_release_version"),
    "mmbench": Benchmark(
        "MMBench", official.mmbench, "mmbench", LONG_ANSWER, uploads.mmbench, "upload.xlsx", "MMBench's server"
    ),
    "mmbench-cn": Benchmark(
        "MMBench-CN", official.mmbench_cn, "mmbench", LONG_ANSWER, uploads.mmbench, "upload.xlsx", "MMBench's server"
    ),
    "seed-bench": Benchmark(
        "SEED-Bench, images", official.seed_bench, "seed_bench", SHORT_ANSWER, uploads.seed_bench, "upload.jsonl",
        "the leaderboard of SEED-Bench", "SEED-Bench.json",
    ),
    "mm-vet": Benchmark(
        "MM-Vet", official.mm_vet, "", LONG_ANSWER, uploads.mm_vet, "mm-vet.json", "the judge of MM-Vet"
    ),
    "llava-bench": Benchmark("LLaVA-Bench (in the wild)", official.llava_bench, "", LONG_ANSWER),
}  # fmt: skip
OWN = "jsonl"  # questions of one's own


def benchmark_names() -> list[str]:
    """The names that `saisa eval` takes."""
    return [*BENCHMARKS, OWN]
