"""`saisa ask`: what comes out is what the engine answers, row by row, whatever the tables are; bad input is named."""

import base64
import csv
import errno
import io
import json
import os
import subprocess
import sys

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from saisa_hf.answering import Answerer, Question
from saisa_hf.answering.questions import render
from saisa_hf.cli import main
from saisa_hf.common.loading import load_model
from saisa_hf.demo import CHECKPOINT
from saisa_hf.evaluation.ask.rows import open_rows
from saisa_hf.processing_saisa import Video


PROMPTS = [
    "how many digits are there?",
    "what is the largest digit?",
    "which digit is red?",
    "how many digits are green?",
]
COUNT = 8


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 48, 3), np.uint8))


def encoded(seed):
    file = io.BytesIO()
    picture(seed).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def loaded():
    return load_model(str(CHECKPOINT), "float32", "cpu", None)


@pytest.fixture(scope="module")
def wanted(loaded):
    """The engine's answers to question i, `PROMPTS[i % 4]` about picture i // 2."""
    asked = [Question(PROMPTS[index % 4], [picture(index // 2)]) for index in range(COUNT)]
    return [answer.text for answer in Answerer(*loaded, max_new_tokens=6).answer(asked)]


@pytest.fixture(autouse=True)
def one_model(loaded, monkeypatch):
    """The checkpoint is loaded once."""
    monkeypatch.setattr("saisa_hf.common.loading.load_model", lambda *arguments, **options: loaded)


@pytest.fixture
def photos(tmp_path):
    """A folder with the pictures, and paths of those of the questions, relative to the folder above."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    for seed in range(COUNT // 2):
        picture(seed).save(folder / ("more" if seed % 2 else ".") / f"{seed}.png")
    return [f"photos/{'more/' if index // 2 % 2 else ''}{index // 2}.png" for index in range(COUNT)]


def write(path, rows, schema=None):
    """A table of rows by the ending of its name."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path)
    return path


def read(path):
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    return parquet.read_table(path).to_pylist()


def ask(source, output, *options, status=0):
    how = ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", "6", "--backend", "transformers"]
    assert main(["ask", str(CHECKPOINT), str(source), "--output", str(output), *how, *options]) == status
    return read(output) if status in (0, 4) else None


def rows_of(photos):
    return [
        {"id": index, "image": path, "prompt": PROMPTS[index % 4], "note": f'é,\n"{index}"', "share": index / 4}
        for index, path in enumerate(photos)
    ]


@pytest.mark.parametrize("source", ["in.jsonl", "in.json", "in.csv", "in.parquet"])
@pytest.mark.parametrize("output", ["out.jsonl", "out.csv", "out.parquet"])
def test_answers_are_the_engines_and_other_columns_stay(source, output, photos, wanted, tmp_path):
    rows = rows_of(photos)
    found = ask(write(tmp_path / source, rows), tmp_path / output, "--batch-size", "3")
    assert [row.pop("answer") for row in found] == wanted
    assert {row.pop("error") for row in found} == {"" if output == "out.csv" else None}
    typed = source != "in.csv" and output != "out.csv"
    assert found == (rows if typed else [{name: str(value) for name, value in row.items()} for row in rows])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["photos", source, output])


def test_one_prompt_for_a_folder_a_pattern_and_a_table(photos, loaded, tmp_path):
    asked = [Question("hello", [picture(seed)]) for seed in (0, 2, 1, 3)]
    wanted = [answer.text for answer in Answerer(*loaded, max_new_tokens=6).answer(asked)]
    found = ask(tmp_path / "photos", tmp_path / "a.jsonl", "--prompt", "hello")
    assert [row["image"].rpartition("/")[2] for row in found] == ["0.png", "2.png", "1.png", "3.png"]
    assert [row["answer"] for row in found] == wanted and list(found[0]) == ["image", "answer", "error"]
    found = ask(tmp_path / "photos" / "[0-2].png", tmp_path / "b.jsonl", "--prompt", "hello")
    assert [row["answer"] for row in found] == wanted[:2]
    table = write(tmp_path / "in.csv", [{"image": path} for path in (photos[0], photos[4])])
    assert [row["answer"] for row in ask(table, tmp_path / "c.csv", "--prompt", "hello")] == wanted[:2]


def test_images_of_every_kind(photos, wanted, tmp_path):
    feature = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    images = [{"bytes": encoded(index // 2), "path": None} for index in range(COUNT)]
    images[1] = {"bytes": None, "path": photos[1]}
    images[2]["path"] = "of_the_data_set.png"
    rows = [{"pic": image, "ask": PROMPTS[index % 4], "id": index} for index, image in enumerate(images)]
    schema = pyarrow.schema([("pic", feature), ("ask", pyarrow.string()), ("id", pyarrow.int16())])
    names = ("--image-column", "pic", "--prompt-column", "ask")
    table = write(tmp_path / "in.parquet", rows, schema)
    found = ask(table, tmp_path / "out.parquet", *names)
    assert [row["answer"] for row in found] == wanted and [row["id"] for row in found] == list(range(COUNT))
    assert [row["pic"] for row in found][:4] == [None, photos[1], "of_the_data_set.png", None]
    kinds = parquet.read_schema(tmp_path / "out.parquet")
    assert [str(kinds.field(name).type) for name in ("pic", "id", "answer")] == ["string", "int16", "string"]

    text = base64.b64encode(encoded(0)).decode()
    rows = [{"image": text}, {"image": f"data:image/png;base64,{text}"}, {"image": [photos[0]]}]
    table = write(tmp_path / "in.jsonl", rows)
    assert {row["answer"] for row in ask(table, tmp_path / "out.jsonl", "--prompt", PROMPTS[0])} == {wanted[0]}
    binary = write(tmp_path / "b.parquet", [{"image": encoded(0)}])
    (row,) = ask(binary, tmp_path / "b.jsonl", "--prompt", PROMPTS[0])
    assert row == {"image": None, "answer": wanted[0], "error": None}


def test_videos_in_a_column_of_their_own(photos, loaded, tmp_path, capsys):
    pytest.importorskip("av")
    from video_parts import write_video

    film = str(write_video(tmp_path / "film.mp4", count=8, size=(48, 48)))
    asked = [
        Question("hello", [Video(film)]),
        Question("hello", [picture(0), Video(film)]),
        Question("hi", [picture(0)]),
    ]
    wanted = [answer.text for answer in Answerer(*loaded, max_new_tokens=6).answer(asked)]
    rows = [{"film": "film.mp4", "prompt": "hello"}, {"image": photos[0], "film": ["film.mp4"], "prompt": "hello"}]
    rows += [{"image": photos[0], "prompt": "hi"}, {"film": "no.mp4", "prompt": "hi"}, {"prompt": "hi"}]
    found = ask(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", "--video-column", "film", status=4)
    assert [row["answer"] for row in found] == [*wanted, None, None]
    assert "No such file" in found[3]["error"] and "'film' is None: there is no video" in found[4]["error"]
    ask(tmp_path / "in.jsonl", tmp_path / "a.jsonl", "--video-column", "clip", status=2)
    assert "no 'clip': name that of the videos" in capsys.readouterr().err
    feature = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema([("film", feature), ("prompt", pyarrow.string())])
    with open(film, "rb") as file:
        films = [{"bytes": file.read(), "path": "of_the_data_set.mp4"}, {"bytes": None, "path": "film.mp4"}]
    table = write(tmp_path / "in.parquet", [{"film": one, "prompt": "hello"} for one in films], schema)
    found = ask(table, tmp_path / "out.parquet", "--video-column", "film")
    assert [row["film"] for row in found] == ["of_the_data_set.mp4", "film.mp4"]
    assert [row["answer"] for row in found] == wanted[:1] * 2


@pytest.mark.parametrize("source", ["in.jsonl", "in.csv", "in.parquet"])
def test_several_images_in_a_row_and_a_folder_of_images(source, photos, loaded, tmp_path):
    asked = [Question(PROMPTS[0], [picture(0), picture(1)]), Question(PROMPTS[1], [picture(2)])]
    wanted = [answer.text for answer in Answerer(*loaded, max_new_tokens=6).answer(asked)]
    lists = [["0.png", "more/1.png"], ["2.png"]]
    rows = [
        {"image": json.dumps(names) if source == "in.csv" else names, "prompt": PROMPTS[index]}
        for index, names in enumerate(lists)
    ]
    table = write(tmp_path / source, rows)
    found = ask(table, tmp_path / "out.parquet", "--images", str(tmp_path / "photos"))
    assert [row["answer"] for row in found] == wanted
    assert [row["image"] for row in found] == [row["image"] for row in rows]


def test_a_row_that_cannot_be_asked_is_a_line_with_its_error(photos, wanted, tmp_path, capsys):
    rows = rows_of(photos)
    (tmp_path / "broken.png").write_bytes(encoded(0)[:60])
    wrong = {
        1: ({"image": "photos/none.png"}, "none.png"),
        2: ({"image": "broken.png"}, "broken.png"),
        3: ({"image": None}, "'image' is None"),
        4: ({"prompt": None}, "'prompt' is None"),
        5: ({"image": "https://example.org/a.png"}, "--allow-urls"),
        6: ({"prompt": "<image> and <image>"}, "1 images for 2"),
        7: ({"image": {"bytes": 3}}, "'image' is 3"),
    }
    for index, (changes, _) in wrong.items():
        rows[index] |= changes
    table = write(tmp_path / "in.jsonl", rows)
    found = ask(table, tmp_path / "out.jsonl", status=4)
    assert found[0]["answer"] == wanted[0] and found[0]["error"] is None and len(found) == COUNT
    for index, (_, said) in wrong.items():
        assert found[index]["answer"] is None and said in found[index]["error"], found[index]
    assert "1 of 8 answered, 7 with an error" in capsys.readouterr().out
    ask(table, tmp_path / "strict.jsonl", "--strict", status=2)
    assert not (tmp_path / "strict.jsonl").exists()


class Stopped(BaseException):
    """As a kill, but in this process."""


def stopping(after, asked):
    """The engine's `answer`, which stops after so many answers and notes what it is asked."""
    answer = Answerer.answer

    def stopped(self, questions, **options):
        def noted():
            for question in questions:
                asked.append(question.key)
                yield question

        for number, found in enumerate(answer(self, noted(), **options)):
            if number == after:
                raise Stopped
            yield found

    return stopped


def test_a_run_goes_on_where_it_was(photos, wanted, tmp_path, monkeypatch, capsys):
    rows = rows_of(photos)
    rows[0]["image"] = "none.png"
    table, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Answerer, "answer", stopping(3, []))
        ask(table, output)
    assert not output.exists() and (tmp_path / "out.jsonl.journal").is_dir()
    with (tmp_path / "out.jsonl.journal" / "part-0000.jsonl").open("ab") as file:
        file.write(b'[6, {"answer": "to')  # what a kill leaves
    # the same command with other settings is refused, and changes nothing
    assert main(["ask", str(CHECKPOINT), str(table), "--output", str(output), "--max-new-tokens", "7"]) == 2
    assert "max_new_tokens was 6, is 7" in capsys.readouterr().err
    asked = []
    with monkeypatch.context() as patched:
        patched.setattr(Answerer, "answer", stopping(None, asked))
        found = ask(table, output, "--batch-size", "2", status=4)
    assert len(asked) == 5 and [row["answer"] for row in found] == [None, *wanted[1:]]
    assert "3 of 8 rows are answered already" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("out*")] == ["out.jsonl"]


def test_what_is_there_is_not_replaced_unasked(photos, wanted, tmp_path, monkeypatch, capsys):
    table, output = write(tmp_path / "in.jsonl", rows_of(photos)), tmp_path / "out.jsonl"
    output.write_text("mine")
    assert main(["ask", str(CHECKPOINT), str(table), "--output", str(output)]) == 1
    assert "exists" in capsys.readouterr().err and output.read_text() == "mine"
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Answerer, "answer", stopping(3, []))
        ask(table, output, "--overwrite", "--system", "be brief")
    assert output.read_text() == "mine"
    assert [row["answer"] for row in ask(table, output, "--overwrite")] == wanted
    # other rows in the same file are another run
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Answerer, "answer", stopping(3, []))
        ask(table, tmp_path / "b.jsonl")
    write(table, rows_of(photos)[:5])
    assert main(["ask", str(CHECKPOINT), str(table), "--output", str(tmp_path / "b.jsonl")]) == 2
    assert "the contents of data" in capsys.readouterr().err


def test_a_full_disk_ends_the_run_and_what_was_answered_counts(photos, wanted, tmp_path, monkeypatch, capsys):
    table, output = write(tmp_path / "in.jsonl", rows_of(photos)), tmp_path / "out.jsonl"
    monkeypatch.setattr("saisa_hf.common.journal.WRITTEN_AT_ONCE", 2)
    calls, sync = [], os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        ask(table, output, status=1)
    said = capsys.readouterr().err
    assert "No space left on device" in said and "4 finished lines" in said and said.count("\n") == 1
    assert [row["answer"] for row in ask(table, output)] == wanted
    assert "4 of 8 rows are answered already" in capsys.readouterr().out


def test_a_run_that_answers_nothing_leaves_nothing(photos, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("device 'cpu' cannot be used")

    monkeypatch.setattr("saisa_hf.common.loading.load_model", fail)
    ask(write(tmp_path / "in.jsonl", rows_of(photos)), tmp_path / "out.jsonl", status=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "photos"]


LINE = b'{"image": "a.png", "prompt": "b"}\n'
BAD = {
    "nothing.jsonl": (None, 1, "neither a file nor a folder"),
    "none*.png": (None, 1, "has no files"),
    "empty/": (None, 1, "has no images"),
    "a.txt": (b"a", 2, "expected a folder, a pattern, or a file whose name ends in .jsonl, .json, .csv, .parquet"),
    "empty.jsonl": (b"", 2, "no rows"),
    "blank.jsonl": (b"\n \n", 2, "no rows"),
    "empty.json": (b"", 2, "is empty"),
    "empty.csv": (b"", 2, "is empty"),
    "header.csv": (b"image,prompt\n", 2, "no rows"),
    "empty.parquet": (b"", 2, "cannot be read"),
    "broken.parquet": (b"PAR1 and no more PAR1", 2, "cannot be read"),
    "latin.jsonl": (LINE + b'{"image": "\xe9"}\n', 2, "line 2: byte 0xe9"),
    "latin.csv": (b"image,prompt\na,b\n\xe9,c\n", 2, "line 3: byte 0xe9"),
    "utf16.jsonl": (LINE.decode().encode("utf-16"), 2, "UTF-16"),
    "utf16.csv": ("image,prompt\na,b\n".encode("utf-16"), 2, "UTF-16"),
    "no.jsonl": (LINE + b"{\n", 2, "line 2: not JSON"),
    "list.jsonl": (LINE + b"[]\n", 2, "line 2: expected a mapping"),
    "deep.jsonl": (LINE + b"[" * 100_000 + b"\n", 2, "line 2: lists or mappings are nested too deeply"),
    "ragged.csv": (b"image,prompt\na,b\na,b,c\n", 2, "line 3: 3 cells"),
    "twice.csv": (b"image,image\na,b\n", 2, "several columns 'image'"),
    "quote.csv": (b'image,prompt\n"a"b,c\n', 2, "line 2: not CSV"),
    "column.jsonl": (
        b'{"picture": "a", "prompt": "b"}\n',
        2,
        "no 'image': name that of the images with --image-column",
    ),
    "prompt.csv": (b"image,question\na,b\n", 2, "no 'prompt': ask the same of all with --prompt"),
    "answer.csv": (b"image,prompt,answer\na,b,c\n", 2, "another 'answer'. Choose one with --answer-column"),
    "error.csv": (b"image,prompt,error\na,b,c\n", 2, "another 'error'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_clear_error(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    content, status, said = BAD[name]
    if name.endswith("/"):
        os.mkdir(name)
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["ask", str(CHECKPOINT), name, "--output", "out.jsonl"]) == status
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and name.rstrip("/") in error
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("output", "status", "said"),
    [
        ("out.xlsx", 2, "ends in .jsonl, .csv, .parquet"),
        ("out", 2, "ends in"),
        ("nowhere/out.jsonl", 1, "nowhere is not a folder"),
        ("folder.jsonl", 1, "is a folder"),
        ("in.jsonl", 2, "is INPUT itself"),
    ],
)
def test_an_output_that_cannot_be_is_refused_at_once(output, status, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_bytes(LINE)
    (tmp_path / "folder.jsonl").mkdir()
    assert main(["ask", str(CHECKPOINT), "in.jsonl", "--output", output]) == status
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--prompt", " "], "--prompt is empty"),
        (["--images", "nowhere"], "--images 'nowhere' is not a folder"),
        (["--answer-column", "error"], "both 'error'"),
        (["--backend", "transformers", "--max-images", "2"], "--max-images is for --backend vllm"),
        (["--backend", "vllm", "--device-map", "auto"], "--device-map is for --backend transformers"),
        (["--backend", "vllm"], "needs vllm"),
        (["--chat-template", "none"], "chat_template='none'"),
    ],
)
def test_options_that_do_not_fit_are_named(options, said, tmp_path, monkeypatch, capsys):
    if options == ["--backend", "vllm"]:
        monkeypatch.setitem(sys.modules, "vllm", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_bytes(LINE)
    assert main(["ask", str(CHECKPOINT), "in.jsonl", "--output", "out.jsonl", *options]) in (1, 2)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl"]


def test_images_at_addresses_are_read_where_that_is_asked_for(tmp_path, loaded, capsys):
    table = write(tmp_path / "in.jsonl", [{"image": "http://127.0.0.1:9/a.png"}])
    (row,) = ask(table, tmp_path / "out.jsonl", "--prompt", "hello", "--allow-urls", status=4)
    assert "no public address" in row["error"]  # the limits of ImageLimits hold


def test_odd_values_come_out_as_what_a_table_can_hold(photos, wanted, tmp_path):
    values = [10**30, "\ud800", {"a": [1]}, [], True, None, "", 1.5]
    rows = [{**row, "odd": value} for row, value in zip(rows_of(photos), values)]
    del rows[0]["note"]
    table = write(tmp_path / "in.jsonl", rows)
    assert [row["odd"] for row in ask(table, tmp_path / "out.jsonl")] == values
    texts = [str(10**30), "\\ud800", '{"a": [1]}', "[]", "true", "", "", "1.5"]
    assert [row["odd"] for row in ask(table, tmp_path / "out.csv")] == texts
    found = ask(table, tmp_path / "out.parquet")
    assert [row["odd"] for row in found] == [*texts[:5], None, *texts[6:]] and found[0]["note"] is None
    assert [row["answer"] for row in found] == wanted


def test_line_breaks_of_all_kinds_stay_in_their_cell(photos, tmp_path):
    notes = ["a\rb", "a\nb", "a\r\nb", "\r", 'a,"b"', " a", "", "é"]
    rows = [{**row, "note": note} for row, note in zip(rows_of(photos), notes)]
    found = ask(write(tmp_path / "in.jsonl", rows), tmp_path / "out.csv")
    assert [row["note"] for row in found] == notes
    assert (tmp_path / "out.csv").read_bytes().startswith(b"id,image,prompt,note,share,answer,error\n0,")


def test_output_of_a_run_is_left_out_of_a_pattern(photos, tmp_path):
    assert ask(f"{tmp_path}/*.jsonl", tmp_path / "out.jsonl", "--prompt", "a", status=1) is None
    (tmp_path / "out.jsonl").write_text("old")
    picture(0).save(tmp_path / "a.png")
    rows = open_rows(f"{tmp_path}/*.*", leave_out=[tmp_path / "out.jsonl"])
    assert [row["image"] for row in rows.read(True)] == [f"{tmp_path}/a.png"]


def test_a_run_goes_on_where_its_output_is_among_its_images(photos, tmp_path, monkeypatch):
    source, output = f"{tmp_path}/photos/**", tmp_path / "photos" / "out.jsonl"
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Answerer, "answer", stopping(2, []))
        ask(source, output, "--prompt", "hello")
    assert (tmp_path / "photos" / "out.jsonl.journal").is_dir()
    assert len(ask(source, output, "--prompt", "hello")) == COUNT // 2
    assert len(ask(source, output, "--prompt", "hello", "--overwrite")) == COUNT // 2


def test_sampling_is_that_of_its_seed(photos, wanted, tmp_path):
    table = write(tmp_path / "in.jsonl", rows_of(photos))
    said = [
        [row["answer"] for row in ask(table, tmp_path / f"{name}.jsonl", "--temperature", "3", "--seed", seed)]
        for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    ]
    assert said[0] == said[1] != said[2] and wanted not in said


def test_a_system_message_comes_first(photos, tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr("saisa_hf.answering.engine.render", lambda *a: read.append(render(*a)) or read[-1])
    table = write(tmp_path / "in.jsonl", rows_of(photos)[:1])
    ask(table, tmp_path / "out.jsonl", "--system", "Be brief.", "--chat-template", "chatml")
    assert read == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nhow many digits are there?<|im_end|>\n"
        "<|im_start|>assistant\n"
    ]


def test_a_template_in_a_file_is_its_contents(photos, tmp_path, monkeypatch, capsys):
    table, template = write(tmp_path / "in.jsonl", rows_of(photos)), tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}{% endfor %}"
    )
    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(Answerer, "answer", stopping(2, []))
        ask(table, tmp_path / "out.jsonl", "--chat-template", str(template))
    template.write_text(template.read_text() + ":")
    ask(table, tmp_path / "out.jsonl", "--chat-template", str(template), status=2)
    assert "chat_template was 'contents" in capsys.readouterr().err


def test_a_table_that_changes_meanwhile_has_no_result(photos, tmp_path, monkeypatch, capsys):
    table, answer = write(tmp_path / "in.jsonl", rows_of(photos)), Answerer.answer

    def changing(self, questions, **options):
        yield from answer(self, questions, **options)
        write(table, rows_of(photos)[::-1])

    monkeypatch.setattr(Answerer, "answer", changing)
    ask(table, tmp_path / "out.jsonl", status=2)
    assert "in.jsonl has changed since the run began" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


TWO = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "saisa_hf"]


@pytest.mark.slow
def test_two_processes_share_the_rows(photos, wanted, tmp_path):
    rows = rows_of(photos)
    rows[6]["image"] = "none.png"
    table, output = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    how = ["--dtype", "float32", "--device", "cpu", "--max-new-tokens", "6"]
    command = [*TWO, "ask", str(CHECKPOINT), str(table), "--output", str(output), *how]
    done = subprocess.run([*command, "--system", "be brief"], capture_output=True, text=True, timeout=600)
    assert output.exists() and "7 of 8 answered, 1 with an error" in done.stdout
    done = subprocess.run([*command, "--overwrite"], capture_output=True, text=True, timeout=600)
    assert done.stdout.count("7 of 8 answered") == 1, done.stderr
    found = read(output)
    assert [row["answer"] for row in found] == [*wanted[:6], None, wanted[7]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "photos"]
    refused = subprocess.run(
        [*command, "--overwrite", "--device-map", "auto"], capture_output=True, text=True, timeout=600
    )
    assert "--device-map is for one process" in refused.stderr


STREAMED = """
import sys
from saisa_hf.answering import Answer
from saisa_hf.evaluation.ask import run
class Echo:
    def answer(self, questions, **options):
        return (Answer(question.key, question.prompt[::-1]) for question in questions)
run._answerer = lambda *arguments: Echo()
run.ask(sys.argv[1], sys.argv[2], sys.argv[3], run.Asking(backend="transformers"))
print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_many_rows_take_no_more_memory_than_few(ending, tmp_path):
    peaks = []
    for count in (1000, 150_000):
        rows = ({"image": f"{index}.png", "prompt": f"prompt {index}", "note": "x" * 300} for index in range(count))
        table = write(tmp_path / f"{count}.{ending}", list(rows))
        output = tmp_path / f"out{count}.{ending}"
        command = [sys.executable, "-c", STREAMED, str(CHECKPOINT), str(table), str(output)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=True)
        peaks.append(int(done.stdout.split()[-1]) / 1024)
        found = read(output)
        assert len(found) == count and found[-1]["answer"] == f"prompt {count - 1}"[::-1]
    assert peaks[1] - peaks[0] < 40, peaks  # megabytes; the rows have more
