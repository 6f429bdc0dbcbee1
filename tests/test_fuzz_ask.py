"""Malformed tables in great number for `saisa ask`: each comes out with an answer or an error in every row, or is refused by
an error that names the file; within bounds of time and memory. The model is left out; images and prompts are read."""

import base64
import csv
import io
import json
import os
import random

import numpy as np
import pyarrow
import pytest
from hostile import JSON_VALUES, refused_clearly
from PIL import Image
from pyarrow import parquet

from saisa_hf import SaisaProcessor
from saisa_hf.answering import Answer
from saisa_hf.answering.kept_images import opened
from saisa_hf.answering.questions import render
from saisa_hf.demo import CHECKPOINT
from saisa_hf.evaluation.ask import run as module


def image_bytes():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)).save(file, "PNG")
    return file.getvalue()


PNG = image_bytes()
TEXT = base64.b64encode(PNG).decode()
VALUES = [
    *JSON_VALUES, 10**400, -0.0, "a.png", ["a.png"], ["a.png", None], ["a.png", ["a.png"]], [3], [[]] * 3, "none.png",
    "text.png", "folder", "fifo", ".", "..", "/", "/dev/zero", "/etc/passwd", "~", "x" * 5000, "x" * 300 + ".png", TEXT,
    TEXT[:-7], f"data:image/png;base64,{TEXT}", "data:,", "data:image/png;base64,", "http://127.0.0.1/a.png",
    "HTTP://a", "file:///etc/passwd", "ftp://a/b", {"bytes": None, "path": None}, {"bytes": "x"}, {"path": 5},
    {"path": "a.png"}, {"path": "a.png", "bytes": ""}, {"bytes": [1]}, '["a.png"]', '["a.png"', "[]", '["a.png", 3]',
    "<image>", "<image><image>", "{{ 1 }}", "\u2028", "\r\n", '"', ",", "\N{GRINNING FACE}" * 10,
]  # fmt: skip
BYTES = [
    b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"{", b"}", b"[", b"]", b'"', b",", b"\\", b"\\u12", b"\r",
    b"\n", b"9" * 5000, b"NaN", b"PAR1", b"image",
]  # fmt: skip


class Reader:
    """In place of a model: reads what there is to read."""

    def __init__(self):
        self.processor = SaisaProcessor.from_pretrained(CHECKPOINT)

    def answer(self, questions, **options):
        for question in questions:
            try:
                text = render(question, self.processor, None, None)
                sizes = [opened(image).size for image in question.images]
                yield Answer(question.key, f"{len(text)} {sizes}")
            except ValueError as error:
                yield Answer(question.key, finish="error", error=str(error))


@pytest.fixture(scope="module")
def reader():
    return Reader()


@pytest.fixture(autouse=True)
def no_model(reader, monkeypatch):
    monkeypatch.setattr(module, "_answerer", lambda *arguments: reader)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, and what has the name of one."""
    folder = tmp_path_factory.mktemp("tables")
    (folder / "a.png").write_bytes(PNG)
    (folder / "text.png").write_text("no picture")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    return folder


def rows():
    return [{"image": "a.png", "prompt": f"what is {index}?", "id": index} for index in range(4)]


def table(rows, ending):
    """The rows as a file's content."""
    if ending == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows).encode()
    if ending == "json":
        return json.dumps(rows).encode()
    if ending == "csv":
        file = io.StringIO()
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
        return file.getvalue().encode("utf-8", "surrogatepass")
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    return parquet.read_table(path).to_pylist()


def ask(content, source, output):
    """Asks about a table; checks that each row of the result has an answer or an error. Returns the result."""
    source.write_bytes(content)
    output.unlink(missing_ok=True)
    asking = module.Asking(backend="transformers")
    answered, failed = module.ask(str(CHECKPOINT), str(source), str(output), asking, log=lambda line: None)
    found = read(output)
    assert len(found) == answered + failed and answered == sum(not row["error"] for row in found)
    for row in found:
        assert bool(row["answer"]) != bool(row["error"]), row
        assert len(row["error"] or "") < 1500
    assert not list(output.parent.glob("*.journal"))
    return found


def value_cases(folder, count, seed):
    """Tables with a value in the second row replaced or removed: the other rows are answered."""
    generator = random.Random(seed)
    places = [(name, value) for name in ("image", "prompt", "id", "more") for value in (*VALUES, ...)]
    places = [(*place, ending) for place in places for ending in ("jsonl", "json", "csv", "parquet")]
    for index, (name, value, ending) in enumerate(generator.sample(places, min(count, len(places)))):
        wrong = rows()
        wrong[1][name] = value
        if ending in ("csv", "parquet"):
            wrong[1][name] = "" if value is ... else value if ending == "csv" else json_text(value)
            wrong = [{**dict.fromkeys(wrong[1], ""), **row, "id": str(row["id"])} for row in wrong]
        elif value is ...:
            del wrong[1][name]

        def call(wrong=wrong, ending=ending, index=index):
            output = folder / f"out.{('jsonl', 'csv', 'parquet')[index % 3]}"
            found = ask(table(wrong, ending), folder / f"in.{ending}", output)
            assert len(found) == 4 and not any(found[place]["error"] for place in (0, 2, 3)), found

        yield f"{index}: {name} {value!r:.60} in .{ending}", call


def json_text(value):
    """A value as a column of texts in Parquet has it."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    try:
        return json.dumps(value)
    except ValueError:
        return "9" * 5000


def byte_cases(folder, count, seed):
    """Tables with bytes replaced, removed, added, repeated or cut off."""
    generator = random.Random(seed)
    for index in range(count):
        ending = generator.choice(("jsonl", "json", "csv", "parquet", "parquet"))
        content = bytearray(table(rows(), ending))
        for _ in range(generator.choice((1, 1, 2, 8))):
            place = generator.randrange(len(content) or 1)
            kind = generator.randrange(5)
            if kind == 0:
                content[place : place + 1] = bytes([generator.randrange(256)])
            elif kind == 1:
                del content[place : place + generator.choice((1, 3, 50))]
            elif kind == 2:
                content[place:place] = generator.choice(BYTES)
            elif kind == 3:
                content[place:place] = content[place : place + 40]
            else:
                del content[place:]

        def call(content=bytes(content), ending=ending, index=index):
            ask(content, folder / f"in.{ending}", folder / f"out.{('jsonl', 'csv', 'parquet')[index % 3]}")

        yield f"{index}: {ending} {bytes(content)[:80]!r}", call


def names_file(case, error):
    text = str(error)
    text.encode()  # can be printed
    return "in." in text and len(text) < 1500


CLEAR = {"clear": (ValueError, OSError, FileNotFoundError), "names": names_file, "megabytes": 1000}


def test_some_odd_values_leave_the_other_rows_alone(folder):
    cases = list(value_cases(folder, 60, seed=0))
    assert refused_clearly(cases, cases, **CLEAR) < 10


def test_some_malformed_tables_come_out_or_are_refused(folder):
    cases = list(byte_cases(folder, 60, seed=0))
    assert refused_clearly(cases, cases, **CLEAR) > 10


@pytest.mark.slow
def test_odd_values_leave_the_other_rows_alone(folder):
    cases = list(value_cases(folder, 10_000, seed=1))
    assert refused_clearly(cases, cases, **CLEAR) < len(cases) / 20


@pytest.mark.slow
def test_malformed_tables_come_out_or_are_refused(folder):
    cases = list(byte_cases(folder, 3000, seed=1))
    assert refused_clearly(cases, cases, **CLEAR) > 300
