"""`saisa eval`: the questions are those of the benchmarks' files, asked with LLaVA-1.5's words; what servers take is what
LLaVA's scripts write; scores are those of the answers; bad files end in one clear line."""

import io
import json
import shutil
import subprocess
import sys
import zipfile
from xml.etree import ElementTree

import benchmark_files
import pytest
from benchmark_files import LETTER, OF_LLAVA, SHORT, WRITERS, write

from saisa_hf.answering import Answer
from saisa_hf.cli import main
from saisa_hf.common.progress import Progress
from saisa_hf.demo import CHECKPOINT
from saisa_hf.evaluation import run as module
from saisa_hf.evaluation.benchmarks import benchmark_names
from saisa_hf.evaluation.plan import make_plan
from saisa_hf.evaluation.run import evaluate


def plan_of(benchmark, metric=None, annotations=None, images=None, limit=None, seed=None, **files):
    return make_plan(str(CHECKPOINT), benchmark, files["questions"], annotations, images, metric, limit, seed, None)


class Parrot:
    """Answers as it was told to, by question."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def answer(self, questions, as_they_come):
        for question in questions:
            self.asked.append(question)
            yield Answer(question.key, self.answers[question.key % len(self.answers)], 2)


@pytest.fixture
def parrot(monkeypatch):
    """A function that lets `evaluate` get these answers."""

    def teach(*answers):
        bird = Parrot(answers)
        monkeypatch.setattr(module, "_answerer", lambda *_: bird)
        return bird

    return teach


# --- what is asked ----------------------------------------------------------------------------------------------------

PROMPTS = {
    "vqav2": [f"What is this photo taken looking through?\n{SHORT}", f"Is it raining?\n{SHORT}"],
    "gqa": [f"Is it overcast?\n{SHORT}", f"Who is wearing the dress?\n{SHORT}"],
    "vizwiz": [
        f"{question}\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"
        for question in ("Can you tell me what this medicine is?", "What is this?")
    ],
    "scienceqa": [
        "Context: N/A\nQuestion: Which of these states is farthest north?\nOptions: (A) West Virginia (B) Louisiana\n"
        f"{LETTER}",
        f"Context: Look.\nQuestion: What does the map show?\nOptions: (A) a (B) b (C) c\n{LETTER}",
    ],
    "textvqa": [f"What is the brand of this camera?\n{SHORT}", f"What does the small text say?\n{SHORT}"],
    "pope": [f"Is there a {thing} in the image?\n{SHORT}" for thing in ("snowboard", "car")] * 3,
    "mme": [f"Is a {thing} shown in the picture?\n{SHORT}" for thing in ("c++ code", "python code")] * 2,
    "seed-bench": [f"How many {things}?\nA. One\nB. Two\nC. Three\nD. Four\n{LETTER}" for things in ("towels", "dogs")],
    "mm-vet": ["What is x in the equation?", "Which room is next?"],
    "llava-bench": ["What is the name of this famous sight?", "Describe it in detail."],
}


@pytest.mark.parametrize("benchmark", PROMPTS)
def test_questions_are_asked_in_the_words_of_llava(benchmark, tmp_path):
    plan = plan_of(benchmark, **WRITERS[benchmark](tmp_path))
    assert [item.prompt for item in plan.items] == PROMPTS[benchmark]
    assert (plan.metric is None) == (benchmark in ("mm-vet", "llava-bench"))
    long = benchmark in ("scienceqa", "mm-vet", "llava-bench")
    assert plan.max_new_tokens == (1024 if long else 128)


@pytest.mark.parametrize("benchmark", sorted(OF_LLAVA.keys() - {"textvqa"}))  # whose questions say more
def test_question_files_of_llava_ask_the_same_about_the_same(benchmark, tmp_path):
    official = plan_of(benchmark, **WRITERS[benchmark](tmp_path))
    questions, annotations, images = (name and tmp_path / name for name in OF_LLAVA[benchmark])
    given = plan_of(benchmark, questions=questions, annotations=annotations, images=images)

    def seen(plan):
        labels = plan.metric.needs if plan.metric else ()
        rows = [(i.prompt, [str(x) for x in i.images], [i.fields[name] for name in labels]) for i in plan.items]
        return sorted(rows, key=repr) if benchmark == "mme" else rows

    assert [row[0] for row in seen(given)] == [row[0] for row in seen(official)]
    names = [[image.rpartition("/")[2] for image in row[1]] for row in seen(given)]
    assert names == [[image.rpartition("/")[2] for image in row[1]] for row in seen(official)]
    if benchmark != "scienceqa":
        assert [row[2] for row in seen(given)] == [row[2] for row in seen(official)]


def test_llavas_questions_of_textvqa_have_what_is_written_in_the_image(tmp_path):
    files = benchmark_files.textvqa(tmp_path)
    plan = plan_of(
        "textvqa", questions=tmp_path / "llava.jsonl", annotations=files["questions"], images=files["images"]
    )
    assert plan.items[0].prompt.split("\n")[1] == "Reference OCR token: DAKOTA, DIGITAL"
    assert [len(item.fields["answers"]) for item in plan.items] == [10, 10]
    assert plan.items[1].fields["answers"][0] == "copenhagen"
    assert [item.fields["question_id"] for item in plan.items] == ["003a8ae2ef43b901"] * 2


def test_mmbench_is_asked_in_all_rotations(tmp_path):
    plan = plan_of("mmbench", **benchmark_files.mmbench(tmp_path))
    first, *_ = plan.items
    assert first.prompt == f"What is it?\nA. dry\nB. wet\nC. hot\nD. cold\n{LETTER}"
    turned = [(item.id, item.fields["choices"]["A"], item.fields["answer"]) for item in plan.items]
    assert turned == [
        (241, "dry", "B"), (1000241, "wet", "A"), (2000241, "hot", "D"), (3000241, "cold", "C"), (252, "1", "A"),
    ]  # fmt: skip
    # "None" is no option, as for LLaVA's script
    assert plan.items[-1].prompt == f'A hint.\nWhich is "it"?\nA. 1\n{LETTER}'
    chinese = plan_of("mmbench-cn", **benchmark_files.mmbench(tmp_path))
    assert chinese.items[0].prompt.endswith("\nD. cold\n请直接回答选项字母。")
    given = plan_of("mmbench", **benchmark_files.mmbench(tmp_path, rotated=True))
    assert [item.id for item in given.items] == [241, 252, 1000241]
    assert given.items[2].images == given.items[0].images and given.items[2].fields["answer"] == "A"


def test_limits_take_whole_groups(tmp_path):
    files = benchmark_files.mme(tmp_path)
    assert len(plan_of("mme", limit=1, **files).items) == 2
    asked = [
        [item.id for item in plan_of("pope", limit=3, seed=seed, **WRITERS["pope"](tmp_path)).items]
        for seed in range(4)
    ]
    assert all(len(one) == 3 for one in asked) and len(set(map(tuple, asked))) > 1
    assert asked[0] == [item.id for item in plan_of("pope", limit=3, seed=0, **WRITERS["pope"](tmp_path)).items]
    assert len(plan_of("pope", limit=99, **WRITERS["pope"](tmp_path)).items) == 6


def test_the_help_names_all_benchmarks():
    from saisa_hf.cli.eval import HELP

    words = HELP.replace(",", " ").replace(":", " ").split()
    assert all(name in words for name in benchmark_names())


# --- what is written --------------------------------------------------------------------------------------------------


def result(output):
    lines = [json.loads(line) for line in (output / "answers.jsonl").read_text().splitlines()]
    return json.loads((output / "summary.json").read_text()), lines


ANSWERS = {  # (answers, score)
    "vqav2": (["A net.", "Yes"], 50.0),
    "gqa": (["No.", "man"], 50.0),
    "vizwiz": (["Night time", "Unanswerable"], 100.0),
    "scienceqa": (["A", "A"], 50.0),
    "textvqa": (["Dakota", "nothing"], 50.0),
    "pope": (["Yes", "No"], 100.0),
    "mme": (["No", "No", "No", "Yes"], 50.0 + 0 + 200.0),
    "mmbench": (["B", "A", "D", "C", "B"], 50.0),
    "seed-bench": (["A", "B"], 50.0),
    "jsonl": (["0", "none", "two"], 100 * 2 / 3),
}


@pytest.mark.parametrize("benchmark", ANSWERS)
def test_answers_are_scored_and_shown(benchmark, tmp_path, parrot, capsys):
    answers, score = ANSWERS[benchmark]
    bird = parrot(*answers)
    files = WRITERS[benchmark](tmp_path / "files")
    options = [f"--{name}={value}" for name, value in files.items()]
    command = ["eval", str(CHECKPOINT), benchmark, *options, f"--output={tmp_path / 'out'}"]
    assert main(command) == 0
    summary, lines = result(tmp_path / "out")
    assert summary["score"]["score"] == pytest.approx(score)
    assert summary["questions"] == len(lines) == len(bird.asked)
    assert [line["text"] for line in lines] == [answers[index % len(answers)] for index in range(len(lines))]
    assert all({"question_id", "prompt", "text", "model_id", "score", "read"} <= set(line) for line in lines)
    said = capsys.readouterr().out
    assert f"{summary['score']['score']:.2f}" in said
    assert main(command) == 0  # it is finished: nothing is asked again
    assert capsys.readouterr().out == said and len(bird.asked) == len(lines)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"summary.json", *summary["files"]}


def test_questions_about_an_image_are_asked_one_after_the_other(tmp_path, parrot):
    bird = parrot("0", "1", "2", "3", "4", "5")
    images = ["a.png", "b.png", None, "a.png", None, "b.png"]
    for name in filter(None, images):
        write(tmp_path / name, None)
    rows = [{"image": name, "question": "Which?", "answers": str(index)} for index, name in enumerate(images)]
    write(tmp_path / "mine.jsonl", rows)
    how = {"questions": tmp_path / "mine.jsonl", "metric": "exact_match"}
    assert evaluate(str(CHECKPOINT), "jsonl", **how, output=tmp_path / "out")["score"]["score"] == 100
    assert [question.key for question in bird.asked] == [0, 3, 1, 5, 2, 4] and bird.asked[-1].images == ()
    assert [line["text"] for line in result(tmp_path / "out")[1]] == ["0", "1", "2", "3", "4", "5"]


def test_what_a_server_scores_has_no_score_but_the_file_to_upload(tmp_path, parrot, capsys):
    files = benchmark_files.vqav2(tmp_path / "v")
    parrot("A net, it's.", "Yes")
    files = {"questions": tmp_path / "v/test.json", "images": tmp_path / "v/test2015"}
    summary = evaluate(str(CHECKPOINT), "vqav2", **files, output=tmp_path / "a")
    assert summary["score"] is None and "upload.json" in summary["note"] and "eval.ai" in summary["note"]
    assert "none" in capsys.readouterr().out
    uploaded = json.loads((tmp_path / "a/upload.json").read_text())
    assert uploaded == [{"question_id": 458752000, "answer": "net it 's"}, {"question_id": 42000, "answer": "yes"}]
    # LLaVA's script: all questions of test2015, with empty answers to those that were not asked
    whole = {**files, "annotations": tmp_path / "v/whole_test.json"}
    evaluate(str(CHECKPOINT), "vqav2", **whole, output=tmp_path / "b")
    uploaded += [{"question_id": 7000, "answer": ""}]
    assert json.loads((tmp_path / "b/upload.json").read_text()) == uploaded


def test_uploads_are_those_of_llavas_scripts(tmp_path, parrot):
    def upload(benchmark, name, *answers, **files):
        parrot(*answers)
        files = files or WRITERS[benchmark](tmp_path / benchmark)
        evaluate(str(CHECKPOINT), benchmark, **files, output=tmp_path / f"out-{benchmark}", log=lambda _: None)
        return (tmp_path / f"out-{benchmark}" / name).read_bytes()

    found = json.loads(upload("gqa", "predictions.json", "No.", "A Man.."))
    assert found == [
        {"questionId": "201307251", "prediction": "no"},
        {"questionId": "201640614", "prediction": "a man"},
    ]
    files = benchmark_files.vizwiz(tmp_path / "vizwiz")
    files["questions"] = tmp_path / "vizwiz/test.json"
    found = json.loads(upload("vizwiz", "upload.json", "Two, please?", "Unanswerable", **files))
    assert found == [
        {"image": "VizWiz_val_00000000.jpg", "answer": "2 please"},
        {"image": "VizWiz_val_00000001.jpg", "answer": "unanswerable"},
    ]
    found = upload("seed-bench", "upload.jsonl", "A", "C").decode()
    assert [json.loads(line) for line in found.splitlines()] == [
        {"question_id": "101669", "prediction": "A"},
        {"question_id": "101670", "prediction": "C"},
    ]
    assert json.loads(upload("mm-vet", "mm-vet.json", "x is 1", "é")) == {"v1_0": "x is 1", "v1_1": "é"}


def cells(content):
    """The rows of a spreadsheet."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        sheet = ElementTree.fromstring(archive.read("xl/worksheets/sheet1.xml"))
        assert all(ElementTree.fromstring(archive.read(name)) is not None for name in archive.namelist())
    rows = sheet.iter("{http://schemas.openxmlformats.org/spreadsheetml/2006/main}row")
    return [["".join(cell.itertext()) for cell in row] for row in rows]


def test_mmbench_is_uploaded_as_a_spreadsheet(tmp_path, parrot):
    parrot("A & <C>\x07", "D\ud800", "B")
    files = benchmark_files.mmbench(tmp_path, rotated=True)
    evaluate(str(CHECKPOINT), "mmbench", **files, output=tmp_path / "out", log=lambda _: None)
    header, *rows = cells((tmp_path / "out/upload.xlsx").read_bytes())
    # as LLaVA's script makes it
    assert header == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert rows[0] == ["241", "What is it?", "dry", "wet", "hot", "cold", "A & <C>", "B", "dev"]
    assert rows[1] == ["252", 'Which is "it"?', "1", "", "", "", "D?", "A", "dev"]
    assert rows[2] == ["1000241", "What is it?", "wet", "hot", "cold", "dry", "B", "A", "dev"]


# --- a run ------------------------------------------------------------------------------------------------------------


def digits(folder, count, images=None):
    """The demo's questions in a file; `images`: about so many images in turn."""
    from saisa_hf.demo.dataset import write_questions

    write_questions(folder, count, log=lambda _: None)
    return folder / "questions.jsonl"


def asked(questions, output, *options, status=0):
    command = ["eval", str(CHECKPOINT), "jsonl", f"--questions={questions}", "--metric=exact_match", "--dtype=float32"]
    assert main([*command, f"--output={output}", *options]) == status


def test_the_demo_is_answered_alike_in_batches_of_any_size(tmp_path):
    questions = digits(tmp_path / "digits", 63)
    for size in (1, 8, 32):
        asked(questions, tmp_path / str(size), f"--batch-size={size}")
    asked(questions, tmp_path / "plain", "--no-visual-states")
    whole = [(tmp_path / name / "answers.jsonl").read_bytes() for name in ("1", "8", "32", "plain")]
    assert len(set(whole)) == 1
    assert result(tmp_path / "1")[0]["score"]["score"] > 95


@pytest.mark.slow
def test_the_demo_has_the_score_of_make_demo_in_one_process_and_in_two(tmp_path):
    questions = digits(tmp_path / "digits", 500)
    asked(questions, tmp_path / "one")
    summary, lines = result(tmp_path / "one")
    assert summary["score"]["score"] == 99.0 and sum(line["score"] for line in lines) == 495
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launcher += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    launcher += ["-m", "saisa_hf", "eval"]
    options = ["--questions", questions, "--metric=exact_match", "--dtype=float32", "--output", tmp_path / "two"]
    command = [sys.executable, "-m", *launcher, CHECKPOINT, "jsonl", *options, "--device=cpu", "--batch-size=8"]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    for name in ("answers.jsonl", "summary.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert ended.stdout.count("99.00") == 1


def test_answers_that_are_cut_off_are_counted(tmp_path, capsys):
    questions = digits(tmp_path / "digits", 4)
    asked(questions, tmp_path / "out", "--max-new-tokens=1")
    summary, lines = result(tmp_path / "out")
    assert summary["cut_off"] == sum(line["finish"] == "length" for line in lines) > 0
    assert f"{summary['cut_off']} answers were cut off at --max-new-tokens" in capsys.readouterr().out


def test_a_run_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    questions = digits(tmp_path / "digits", 40)
    asked(questions, tmp_path / "whole")
    said = module._said

    def interrupted(answerer, items, indices):
        for number, line in enumerate(said(answerer, items, indices)):
            if number == 17:
                raise KeyboardInterrupt
            yield line

    monkeypatch.setattr(module, "_said", interrupted)
    asked(questions, tmp_path / "out", status=130)
    assert not (tmp_path / "out/summary.json").exists()
    seen = []
    monkeypatch.setattr(
        module, "_said", lambda answerer, items, indices: said(answerer, items, seen.extend(indices) or indices)
    )
    capsys.readouterr()
    asked(questions, tmp_path / "out", "--limit=7", status=2)
    assert "limit was None, is 7" in capsys.readouterr().err
    asked(questions, tmp_path / "out")
    assert len(seen) == len(set(seen)) == 40 - 17
    for name in ("answers.jsonl", "summary.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_finished_run_is_not_taken_for_another(tmp_path, parrot, capsys):
    questions = digits(tmp_path / "digits", 3)
    parrot("1")
    asked(questions, tmp_path / "out")
    asked(questions, tmp_path / "out", "--chat-template=plain", status=2)
    assert "chat_template was '', is 'plain'" in capsys.readouterr().err
    asked(questions, tmp_path / "out", "--max-new-tokens=3", status=2)
    assert "max_new_tokens was 128, is 3" in capsys.readouterr().err
    template = write(tmp_path / "own.jinja", "a")
    asked(questions, tmp_path / "own", f"--chat-template={template}")
    template.write_text("b")
    asked(questions, tmp_path / "own", f"--chat-template={template}", status=2)
    assert "chat_template was 'contents" in capsys.readouterr().err
    questions.write_text(questions.read_text() + "\n")
    asked(questions, tmp_path / "out", status=2)
    assert "the contents of data" in capsys.readouterr().err
    asked(questions, tmp_path / "out", "--overwrite")
    (tmp_path / "out/summary.json").write_text("{}")
    asked(questions, tmp_path / "out", status=2)
    assert "summary.json is not that of a run of saisa eval" in capsys.readouterr().err
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/me.jpg").touch()
    asked(questions, tmp_path / "photos", status=1)
    assert "has other files, me.jpg for instance" in capsys.readouterr().err


def test_nothing_but_a_run_is_overwritten(tmp_path, parrot, capsys):
    parrot("yes")
    files = benchmark_files.mm_vet(tmp_path / "v")  # whose questions are called as the file for its judge
    before = {path: path.read_bytes() for path in (tmp_path / "v").glob("*.*")}
    command = [
        "eval",
        str(CHECKPOINT),
        "mm-vet",
        *(f"--{name}={value}" for name, value in files.items()),
        "--overwrite",
    ]
    assert main([*command, f"--output={tmp_path / 'v'}"]) == 1
    assert "has other files" in capsys.readouterr().err
    assert before and {path: path.read_bytes() for path in (tmp_path / "v").glob("*.*")} == before
    for _ in range(2):
        assert main([*command, f"--output={tmp_path / 'out'}"]) == 0
    (tmp_path / "out/answers.jsonl").unlink()
    assert main([*command, f"--output={tmp_path / 'out'}"]) == 0
    assert len(result(tmp_path / "out")[1]) == 2


def test_a_run_that_answered_nothing_leaves_no_trace(tmp_path, capsys):
    questions = digits(tmp_path / "digits", 2)
    model = shutil.copytree(CHECKPOINT, tmp_path / "model")
    (model / "chat_template.jinja").unlink()
    files = [f"--questions={questions}", "--metric=exact_match", f"--output={tmp_path / 'out'}"]
    assert main(["eval", str(model), "jsonl", *files]) == 2
    assert "has no chat template: name one with --chat-template" in capsys.readouterr().err
    assert list((tmp_path / "out").iterdir()) == []
    assert main(["eval", str(model), "jsonl", *files, "--chat-template=vicuna"]) == 0


def test_choices_by_letter_and_by_likelihood(tmp_path):
    questions = digits(tmp_path / "digits", 60)
    lines = [json.loads(line) for line in questions.read_text().splitlines()]
    chosen = [line for line in lines if line["category"] == "how many digits"]
    for index, line in enumerate(chosen):
        line["choices"] = [str(number) for number in range(2, 8)]
        line["answer"] = (line["answers"][0], int(line["answers"][0]) - 2, "ABCDEF"[int(line["answers"][0]) - 2])[
            index % 3
        ]
    path = write(tmp_path / "digits/choices.jsonl", chosen)
    how = {"questions": path, "dtype": "float32", "log": lambda _: None}
    found = evaluate(str(CHECKPOINT), "jsonl", metric="multiple_choice_likelihood", output=tmp_path / "a", **how)
    assert found["score"]["score"] == 100
    for line in result(tmp_path / "a")[1]:
        values = line["log_likelihoods"]
        assert len(values) == 6 and line["text"] == str(2 + values.index(max(values)))
    plan = plan_of("jsonl", metric="multiple_choice", questions=path)
    assert plan.items[0].prompt == chosen[0]["question"] + "\nA. 2\nB. 3\nC. 4\nD. 5\nE. 6\nF. 7\n" + LETTER


# --- what is not as it should be --------------------------------------------------------------------------------------


def spoilt(folder, benchmark="jsonl"):
    return WRITERS[benchmark](folder)


@pytest.mark.parametrize(
    "benchmark, spoil, status, said",
    [
        ("jsonl", lambda f: (f / "1.png").unlink(), 1, "question 1 is about the image"),
        ("jsonl", lambda f: (f / "questions.jsonl").unlink(), 1, "--questions"),
        ("jsonl", lambda f: (f / "questions.jsonl").write_text(""), 2, "questions.jsonl is empty"),
        ("jsonl", lambda f: (f / "questions.jsonl").write_bytes(b'{"a": "\xff"}'), 2, "line 1: byte 0xff"),
        ("jsonl", lambda f: (f / "questions.jsonl").write_text('{"image": "1.png"}'), 2, "has no 'question'"),
        ("jsonl", lambda f: (f / "questions.jsonl").write_text('{"question": "a"}'), 2, "has no 'answers'"),
        ("jsonl", lambda f: (f / "questions.jsonl").write_text("[1]"), 2, "expected a mapping"),
        ("jsonl", lambda f: (f / "questions.jsonl").write_text('{"question": "a", "image": 3}'), 2, "image=3"),
        ("jsonl", lambda f: (f / "1.png").write_text("text"), 2, "question 1 cannot be asked"),
        ("vqav2", lambda f: write(f / "annotations.json", [{"question_id": 1, "answers": []}]), 2, "same split"),
        ("vqav2", lambda f: write(f / "questions.json", [{"image_id": 1, "question": "a"}]), 2, "'question_id'"),
        ("gqa", lambda f: write(f / "questions.json", {}), 2, "is empty"),
        ("gqa", lambda f: write(f / "questions.json", [1]), 2, "entry 0: expected a mapping"),
        ("mme", lambda f: next(f.glob("*/*/0020.txt")).write_text("a question\n"), 2, "0020.txt, line 1"),
        ("mme", lambda f: next(f.glob("*/*/0020.png")).unlink(), 1, "has no image 0020.jpg or .png"),
        ("mmbench", lambda f: (f / "mmbench_dev.tsv").write_text(f"index\timage\n1\t{'A' * 80}\n"), 2, "has no option A"),
        ("mmbench", lambda f: (f / "mmbench_dev.tsv").write_text("index\tA\n1\ta\n"), 2, "has no 'image'"),
        ("mmbench", lambda f: (f / "mmbench_dev.tsv").write_text("index\n1\t2\n"), 2, "line 2: 2 columns"),
        ("scienceqa", lambda f: (f / "pid_splits.json").unlink(), 1, "pid_splits.json is not there"),
        ("pope", lambda f: write(f / "coco/coco_pope_random.json", [{"a": 1}]), 2, "has no 'text'"),
    ],
)  # fmt: skip
def test_bad_files_end_in_one_clear_line(benchmark, spoil, status, said, tmp_path, capsys):
    files = WRITERS[benchmark](tmp_path)
    spoil(tmp_path)
    options = [f"--{name}={value}" for name, value in files.items()]
    assert main(["eval", str(CHECKPOINT), benchmark, *options, f"--output={tmp_path / 'out'}"]) == status
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith("saisa: error")]
    assert len(err) == 1 and said in err[0]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["vqa"], "benchmark 'vqa' is not known"),
        (["jsonl"], "needs --metric"),
        (["jsonl", "--metric=accuracy"], "metric 'accuracy' is not known"),
        (["pope", "--metric=anls"], "--metric anls is for questions of your own"),
    ],
)
def test_what_is_not_known_is_named(arguments, said, tmp_path, capsys):
    files = [f"--questions={tmp_path}", f"--output={tmp_path / 'out'}"]
    assert main(["eval", str(CHECKPOINT), *arguments, *files]) == 2
    assert said in capsys.readouterr().err


def test_annotations_of_other_questions_are_refused(tmp_path, capsys):
    files = benchmark_files.pope(tmp_path)
    lines = (tmp_path / "llava.jsonl").read_text().splitlines()
    (tmp_path / "llava.jsonl").write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(ValueError, match="line 1 is not the question at its place"):
        plan_of("pope", questions=tmp_path / "llava.jsonl", annotations=files["questions"], images=files["images"])
    benchmark_files.textvqa(tmp_path / "t")
    write(tmp_path / "t/other.json", {"data": [{"image_id": "a", "question": "b", "answers": []}]})
    named = {"questions": tmp_path / "t/llava.jsonl", "annotations": tmp_path / "t/other.json"}
    with pytest.raises(ValueError, match=r"other\.json has no question"):
        plan_of("textvqa", images=tmp_path / "t/train_images", **named)


def test_annotations_without_answers_are_refused(tmp_path):
    files = benchmark_files.vizwiz(tmp_path / "z")
    with pytest.raises(ValueError, match=r"test\.json has no 'answers'"):
        plan_of("vizwiz", **files, annotations=tmp_path / "z/test.json")
    files = benchmark_files.vqav2(tmp_path / "v")
    with pytest.raises(ValueError, match=r"other\.json has no annotation for 2 of 2 questions"):
        write(tmp_path / "v/other.json", {"questions": [{"question_id": 1, "question": "?", "image_id": 1}]})
        plan_of("vqav2", **{**files, "annotations": tmp_path / "v/other.json"})


def test_without_answers_the_files_to_give_are_named(tmp_path):
    files = benchmark_files.pope(tmp_path)
    plan = plan_of("pope", questions=tmp_path / "llava.jsonl", images=files["images"])
    assert plan.metric is None and "coco_pope_random.json" in plan.note()


# --- how far it has come ----------------------------------------------------------------------------------------------


def test_progress_says_how_fast_and_how_long(monkeypatch):
    class Screen(io.StringIO):
        def isatty(self):
            return self.is_terminal

    monkeypatch.setenv("COLUMNS", "100")
    for terminal in (True, False):
        now = [0.0]
        monkeypatch.setattr("saisa_hf.common.progress.time.monotonic", lambda now=now: now[0])
        screen = Screen()
        screen.is_terminal = terminal
        with Progress(7200, "questions", "images", screen) as progress:
            for _ in range(100):
                now[0] += 1
                progress.add(2, 1)
        lines = screen.getvalue().split("\r" if terminal else "\n")
        last = "200 of 7200 questions, 2.00 a second, 1.00 images a second, 58:20 left"
        assert lines[-1 if terminal else -2].startswith(last)
        assert len(lines) == (102 if terminal else 5)
    assert "?" in Progress(3, stream=Screen() if not setattr(Screen, "is_terminal", False) else sys.stderr).text()
    monkeypatch.setenv("COLUMNS", "20")  # a longer line would go on in the next one
    Screen.is_terminal, screen = True, Screen()
    with Progress(7200, stream=screen):
        pass
    assert screen.getvalue() == "\r0 of 7200 questions\x1b[K\n"
