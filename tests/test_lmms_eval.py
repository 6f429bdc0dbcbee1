"""lmms-eval itself, on a task from a local file, end to end on a CPU: what it counts is what the engine answers.

`make test-lmms` runs these; they are skipped where lmms-eval is not installed."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


if not list(importlib.metadata.distributions(name="lmms_eval")):  # `test_lmms.py` puts a stand-in in its place
    pytest.skip("lmms-eval is not installed", allow_module_level=True)

from saisa_hf.answering import Answerer, Question
from saisa_hf.common.loading import load_model
from saisa_hf.demo import CHECKPOINT
from saisa_hf.demo.scenes import KINDS, ask, draw, held_out_questions
from saisa_hf.evaluation.run import evaluate


FIXTURES = Path(__file__).parent / "fixtures" / "lmms"
# the class for any model takes AutoModel for all of transformers' models, LLaVA's too, which makes none that generates
GENERIC = """
import saisa_hf, transformers
transformers.AutoModel.register(saisa_hf.SaisaConfig, saisa_hf.SaisaForConditionalGeneration, exist_ok=True)
from lmms_eval.__main__ import cli_evaluate
cli_evaluate()
"""


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with the tasks, and 40 questions about 20 images."""
    folder = tmp_path_factory.mktemp("task")
    for path in FIXTURES.iterdir():
        shutil.copy(path, folder)
    lines = []
    for index, (scene, first) in enumerate(held_out_questions(20, seed=1)):
        Image.fromarray(draw(scene)).save(folder / f"{index}.png")
        asked = [ask(scene, kind, np.random.default_rng(index)) for kind in KINDS]
        second = next(question for question in asked if question is not None and question.text != first.text)
        for question in (first, second):
            choices = sorted({question.answer, "0", "5", "red"})
            line = {
                "question": question.text,
                "answers": [question.answer],
                "image": f"{index}.png",
                "choices": choices,
            }
            lines.append(json.dumps(line) + "\n")
    (folder / "digits.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture(scope="module")
def documents(task):
    return [json.loads(line) for line in (task / "digits.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def engine():
    return Answerer(*load_model(str(CHECKPOINT), "float32", "cpu", None), batch_size=8, max_new_tokens=8)


@pytest.fixture(scope="module")
def wanted(documents, engine, task):
    """The engine's answers."""
    asked = [Question(document["question"], [str(task / document["image"])]) for document in documents]
    return [answer.text for answer in engine.answer(asked)]


def run(folder, name, output, *options, model="saisa", arguments="dtype=float32", start=("-m", "lmms_eval")):
    """(score, responses by document) of task `name`."""
    command = [sys.executable, *start, "--model", model, "--model_args", f"pretrained={CHECKPOINT},{arguments}"]
    command += [
        "--include_path",
        ".",
        "--tasks",
        name,
        "--device",
        "cpu",
        "--output_path",
        str(output),
        "--log_samples",
    ]
    places = {"HF_HOME": str(output / "hf"), "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, *options], cwd=folder, env={**os.environ, **places}, capture_output=True, text=True, timeout=600
    )
    results = sorted(output.rglob("*_results.json"))
    assert results, done.stdout[-3000:] + done.stderr[-3000:]
    (samples,) = output.rglob(f"*_samples_{name}.jsonl")
    lines = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda line: line["doc_id"])
    (score,) = [
        value
        for key, value in json.loads(results[0].read_text())["results"][name].items()
        if key in ("exact_match,none", "acc,none")
    ]
    return score, [line["filtered_resps"] for line in lines]


@pytest.mark.parametrize(
    ("start", "options"),
    [
        (("-m", "lmms_eval"), ("--batch_size", "8")),
        (("-m", "lmms_eval"), ("--batch_size", "1", "--force_simple")),
        (("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "lmms_eval"), ("--batch_size", "8")),
    ],
    ids=["chat", "simple", "two processes"],
)
def test_answers_and_score_are_the_engines(start, options, task, documents, wanted, tmp_path):
    score, found = run(task, "saisa_digits", tmp_path, *options, start=start)
    assert [text if isinstance(text, str) else text[0] for text in found] == wanted
    right = [answer in document["answers"] for answer, document in zip(wanted, documents)]
    assert score == pytest.approx(np.mean(right)) and np.mean(right) > 0.9


def test_answers_and_score_are_those_of_saisa_eval_on_the_same_file(task, wanted, tmp_path):
    how = {"questions": task / "digits.jsonl", "metric": "exact_match", "dtype": "float32", "device": "cpu"}
    found = evaluate(str(CHECKPOINT), "jsonl", output=tmp_path / "own", log=lambda report: None, **how)
    lines = [json.loads(line) for line in (tmp_path / "own" / "answers.jsonl").read_text().splitlines()]
    score, said = run(task, "saisa_digits", tmp_path / "theirs", "--batch_size", "8")
    assert [line["text"] for line in lines] == [text if isinstance(text, str) else text[0] for text in said] == wanted
    assert found["score"]["score"] == pytest.approx(100 * score)


def test_the_likeliest_choice_is_the_engines(task, documents, engine, tmp_path):
    score, _ = run(task, "saisa_digits_choice", tmp_path, "--batch_size", "8", "--force_simple")
    right = []
    for document in documents:
        question = Question(document["question"], [str(task / document["image"])])
        found = list(engine.loglikelihood([(question, choice) for choice in document["choices"]]))
        best = max(range(len(found)), key=lambda index: found[index].log_probability / found[index].tokens)
        right.append(document["choices"][best] in document["answers"])
    assert score == pytest.approx(np.mean(right)) and np.mean(right) > 0.9


def test_the_class_for_any_model_gets_on_with_the_processor(task, documents, wanted, tmp_path):
    """It passes `videos=[]` and `audios=[]`, and computes in bfloat16."""
    how = {"model": "huggingface", "arguments": "device_map=cpu", "start": ("-c", GENERIC)}
    score, found = run(task, "saisa_digits", tmp_path, "--batch_size", "8", **how)
    same = np.mean([text == answer for text, answer in zip(found, wanted)])
    assert score > 0.9 and same > 0.9
