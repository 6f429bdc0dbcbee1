# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa eval`: a model's score on a benchmark."""

import argparse

from ..common.arguments import positive, seed
from .options import Commands, add_answerer, add_command, add_model, given


HELP = """\
Asks a model the questions of a benchmark, from its official files, and scores the answers as its own script does:

  saisa eval ./saisa-vicuna pope --questions pope/coco --images coco/val2014 --output results/pope
  saisa eval ./saisa-vicuna jsonl --questions mine.jsonl --metric exact_match --output results/mine

BENCHMARK is vqav2, gqa, vizwiz, scienceqa, textvqa, pope, mme, mmbench, mmbench-cn, seed-bench, mm-vet, llava-bench, or
jsonl: questions of your own. Answers go to answers.jsonl in the output folder, the score to summary.json; where a server
or a judge scores, the file that it takes is written too. Given again, the command resumes an
interrupted run, and shows the score of a finished one.
`accelerate launch -m saisa_hf eval ...` shares the questions out among several GPUs.
"""


def add_to(commands: Commands) -> None:
    summary = "score a model on a benchmark, from the benchmark's files"
    command = add_command(commands, "eval", run, summary=summary, description=HELP)
    add_model(command)
    add = command.add_argument
    add("benchmark", metavar="BENCHMARK", help="name of a benchmark, or jsonl")
    add("--questions", metavar="PATH", required=True, help="its questions: a file, or the folder that holds them")
    add("--annotations", metavar="PATH", help="the right answers, where they are not with the questions")
    add("--images", metavar="FOLDER", help="its images (default: beside the questions)")
    add("--output", metavar="FOLDER", required=True, help="for answers and score")
    names = "exact_match, vqa_accuracy, anls, relaxed_accuracy, multiple_choice, multiple_choice_likelihood"
    add("--metric", metavar="NAME", help=f"for jsonl: {names}")
    add("--limit", metavar="N", type=positive, help="ask only so many questions, the first ones")
    add("--seed", metavar="N", type=seed, help="with --limit: draw them at random")
    tokens = "longest answer (default: as in LLaVA's scripts, 128 or 1024)"
    add("--max-new-tokens", metavar="N", type=positive, help=tokens)
    add_answerer(command)
    states = "encode an image anew for each question about it"
    add("--no-visual-states", dest="visual_states", action="store_false", help=states)
    add("--overwrite", action="store_true", help="delete the run that the output folder has")


def run(arguments: argparse.Namespace) -> int:
    from ..evaluation.run import evaluate

    options = given(arguments)
    evaluate(options.pop("model"), options.pop("benchmark"), **options)
    return 0
