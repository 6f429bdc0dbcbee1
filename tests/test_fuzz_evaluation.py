"""Malformed files of benchmarks: each gives questions that can be asked, scored and submitted, or an error that names the
file or the question."""

import copy
import json
import random

import pytest
from benchmark_files import OF_LLAVA, WRITERS
from hostile import JSON_VALUES, refused_clearly

from saisa_hf.demo import CHECKPOINT
from saisa_hf.evaluation.plan import make_plan
from saisa_hf.evaluation.report import answer_lines, scored, summary_of, summary_table


TEXTS = (".json", ".jsonl", ".tsv", ".txt")
ANSWERS = ["A", "yes", "", "\ud800", "The answer is B.", "x" * 2000, "1,000.5 it's"]


def ask(benchmark, files):
    """All that `saisa eval` does with the files, beside asking."""
    files = {"annotations": None, "images": None, "metric": None, **files}
    plan = make_plan(str(CHECKPOINT), benchmark, limit=None, seed=None, max_new_tokens=None, **files)
    assert plan.items and all(isinstance(item.prompt, str) and isinstance(item.id, (str, int)) for item in plan.items)
    lines = [{"text": ANSWERS[index % len(ANSWERS)], "finish": "stop"} for index in range(len(plan.items))]
    if plan.items[0].choices:
        lines = [{**line, "log_likelihoods": [-1.0] * len(item.choices)} for line, item in zip(lines, plan.items)]
    results = scored(plan.items, lines, plan.metric)
    summary = summary_of(plan.items, lines, results, plan.metric, {"title": plan.benchmark.title, "note": plan.note()})
    assert summary_table(summary)
    json.dumps([*answer_lines(plan.items, lines, results, "m"), summary, plan.request])
    if plan.benchmark.upload is not None:
        assert plan.benchmark.upload(plan.items, [line["text"] for line in lines], plan.files)


def places(value, path=()):
    """All places in a JSON value."""
    yield path
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in pairs:
        yield from places(one, (*path, key))


def changed(value, path, change):
    """A copy of `value` with what is at `path` changed; `change` gets the container and the key."""
    value = copy.deepcopy([value])
    container, key = value, 0
    for step in path:
        container, key = container[key], step
    change(container, key)
    return value[0] if value else None


def parsed(text):
    """What a file holds, and how it is written again."""
    try:
        return json.loads(text), json.dumps
    except ValueError:
        try:
            return [json.loads(line) for line in text.splitlines()], lambda v: "".join(
                json.dumps(line) + "\n" for line in (v if isinstance(v, list) else [v])
            )
        except ValueError:
            return None, None


def spoilt(content, generator):
    """Damaged contents of a text file, in bytes, and how they were damaged."""
    text = content.decode()
    value, written = parsed(text)
    kind = generator.choice(["value", "value", "value", "remove", "twice", "cut", "byte", "column"])
    if value is not None and kind in ("value", "remove", "twice"):
        path = generator.choice(list(places(value)))
        if kind == "value":
            new = generator.choice(JSON_VALUES)
            return written(changed(value, path, lambda c, k: c.__setitem__(k, new))).encode(), f"{path} = {new!r}"
        if kind == "remove":
            return written(changed(value, path, lambda c, k: c.pop(k))).encode(), f"without {path}"
        twice = lambda c, k: c.insert(k, copy.deepcopy(c[k])) if isinstance(c, list) else c.update({"new": c[k]})  # noqa: E731
        return written(changed(value, path, twice)).encode(), f"twice {path}"
    if kind == "column" or (kind == "value" and "\t" in text):
        rows = [line.split("\t") for line in text.split("\n")]
        row = generator.choice([row for row in rows if len(row) > 1] or rows)
        column = generator.randrange(len(row))
        new = generator.choice(["", "nan", "-1", "\t", '"', "A", "\0", "9" * 30, "é", "\n"])
        row[column] = new
        return "\n".join("\t".join(row) for row in rows).encode(), f"column {column} = {new!r}"
    place = generator.randrange(len(content) or 1)
    if kind == "cut":
        return content[:place], f"cut at {place}"
    new = generator.randrange(256)
    return content[:place] + bytes([new]) + content[place + 1 :], f"byte {place} = {new}"


def cases(folder, benchmark, count, seed):
    """Pairs of a name and a call that reads the files with one of them damaged."""
    generator = random.Random(f"{benchmark} {seed}")
    official = WRITERS[benchmark](folder)
    ways = [official]
    if benchmark in OF_LLAVA:
        names = dict(zip(("questions", "annotations", "images"), OF_LLAVA[benchmark]))
        ways.append({role: None if name is None else folder / name for role, name in names.items()})
    if benchmark == "jsonl":
        text = official["questions"].read_text()
        lines = [{**json.loads(line), "choices": ["1", "2", "no"], "answer": 1} for line in text.splitlines()]
        official["questions"].write_text("".join(json.dumps(line) + "\n" for line in lines))
        metrics = (
            "exact_match",
            "vqa_accuracy",
            "anls",
            "relaxed_accuracy",
            "multiple_choice",
            "multiple_choice_likelihood",
        )
        ways = [{**official, "metric": metric} for metric in metrics]
    made = []
    for number in range(count):
        files = generator.choice(ways)
        given = [path for role, path in files.items() if role in ("questions", "annotations") and path is not None]
        found = sorted({path for one in given for path in ([one] if one.is_file() else one.rglob("*"))})
        path = generator.choice([path for path in found if path.suffix in TEXTS])
        before = path.read_bytes()
        after, how = spoilt(before, generator)

        def call(path=path, before=before, after=after, files=files):
            path.write_bytes(after)
            try:
                ask(benchmark, files)
            finally:
                path.write_bytes(before)

        made.append((f"{benchmark} {number}: {path.name} {how:.80}", call))
    return made


def names_it(case, error):
    """Whether the message names a file or a question, and is one that a reader can read."""
    text = str(error)
    return len(text) < 2000 and ("question" in text or any(ending in text for ending in (*TEXTS, ".tsv")))


def check(folder, count, seed=0):
    refused = 0
    for benchmark in WRITERS:
        (folder / benchmark).mkdir()
        made = cases(folder / benchmark, benchmark, count, seed)
        clear = (ValueError, FileNotFoundError, NotADirectoryError)
        refused += refused_clearly(made, made, clear=clear, names=names_it)
    return refused


def test_some_damaged_files_are_read_or_refused(tmp_path):
    assert check(tmp_path, 12) > 40


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_damaged_files_are_read_or_refused(tmp_path, seed):
    assert check(tmp_path, 250, seed) > 1000
