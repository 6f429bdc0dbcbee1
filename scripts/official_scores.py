# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the benchmarks' own scripts make of some hundred made-up answers each, for `tests/test_scoring.py` to compare with.

  python scripts/official_scores.py --repositories CLONES --write tests/fixtures/official_scores.json

CLONES is a folder with clones (bare ones will do) of the repositories in `SOURCES`, each in a folder OWNER+NAME or
OWNER+NAME/repo.
Needs numpy, pandas, scikit-learn and tqdm, and runs the scripts as they are: those in Python 2 with `print` made a function.
"""

import argparse
import ast
import contextlib
import io
import json
import pickle
import random
import re
import subprocess
import sys
import tempfile
import types
import zipfile
from pathlib import Path


SOURCES = {
    "vqa": ("GT-Vision-Lab/VQA", "HEAD"),
    "llava": ("haotian-liu/LLaVA", "HEAD"),
    "vizwiz": ("TRI-ML/vlm-evaluation", "HEAD"),
    "gqa": ("PKU-YuanGroup/Video-LLaVA", "HEAD"),
    "mme": ("BradyFU/Awesome-Multimodal-Large-Language-Models", "Evaluation"),
    "vlmevalkit": ("open-compass/VLMEvalKit", "HEAD"),
    "lmms_eval": ("EvolvingLMMs-Lab/lmms-eval", "HEAD"),
}
USED: dict[str, dict] = {}


class Clones:
    """The files of the official repositories."""

    def __init__(self, folder: Path):
        self.folder = folder

    def read(self, source: str, path: str) -> bytes:
        name, revision = SOURCES[source]
        clone = self.folder / name.replace("/", "+")
        clone = clone / "repo" if (clone / "repo").is_dir() else clone
        git = ["git", "-C", str(clone)]
        commit = subprocess.run(
            [*git, "rev-parse", revision], capture_output=True, text=True, check=True
        ).stdout.strip()
        USED.setdefault(source, {"repository": name, "commit": commit, "files": []})["files"].append(path)
        return subprocess.run([*git, "show", f"{revision}:{path}"], capture_output=True, check=True).stdout

    def module(self, source: str, path: str, **changes: str) -> dict:
        """The names that a script defines, after replacing text in it."""
        text = self.read(source, path).decode()
        for old, new in changes.items():
            text = text.replace(old, new)
        names = {"__name__": "official"}
        exec(compile(text, path, "exec"), names)
        return names

    def run(self, source: str, path: str, *arguments: str) -> str:
        """What a script prints."""
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "script.py"
            script.write_bytes(self.read(source, path))
            ran = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
            if ran.returncode:
                raise RuntimeError(f"{path} fails: {ran.stderr}")
            return ran.stdout


# --- made-up answers ---

WORDS = [
    "yes", "no", "dog", "cat", "red", "blue", "two", "2", "ten", "10", "none", "zero", "left", "right", "umbrella", "frisbee",
    "tennis", "skateboard", "unanswerable", "stop",
]  # fmt: skip
ODD = [
    "", " ", "Yes", "YES.", "yes, no", "no\nway", "tab\there", "The dog", "a an the", "An apple a day", "Two dogs",
    "2 dogs", "TEN", "1,000", "1000", "1,000 dogs; cats!", "1, 2", "1,2,3", "3.5", ".5", "5.", "$5.00", "5%", "U.S.A.",
    "USA", "a.b." * 20, "...", "x." * 40, "e.g. this", "it's", "its", "dont", "don't", "Dont", "couldnt've",
    "couldn'tve", "somebody'd", "somebodyd", "hed've", "oclock 5", "5 o'clock", "whos", "who's", "Who's?",
    "what's that?", "weve", "arent", "yall'd've", "'twas", "twas", "Im", "im", "t-shirt", "t - shirt", "t shirt",
    "red/white", "red / white", "(A)", "[x] {y}", "\"quoted\"", "“quoted”", "x_y", "a@b.c", "`tick`", "<s>yes</s>",
    "back\\slash", "a = b + c", "naïve café", "NAÏVE CAFÉ", "ΣΊΣΥΦΟΣ", "İstanbul", "straße", "日本語", "日本語。",
    "🙂", "½", "٣", "\u00a0nbsp\u00a0", "line1\r\nline2", "left, right", "yes-no", "The", "the", "none of the above",
    "eleven", "zero point", "It is a red umbrella. It is raining.", "The answer is two.", "no, it isn't", "\ttwo\n",
]  # fmt: skip


def varied(random: random.Random, text: str) -> str:
    """`text` as another annotator may write it."""
    ways = [
        str,
        str,
        str,
        str.upper,
        str.title,
        lambda t: f"the {t}",
        lambda t: f"{t}.",
        lambda t: f" {t} ",
        lambda t: f"{t}, ",
    ]
    ways += [
        lambda t: t.replace("'", ""),
        lambda t: t.replace(" ", "-"),
        lambda t: f"{t}?",
        lambda t: t.replace("1", "one"),
    ]
    return random.choice(ways)(text)


def annotated(count: int = 300) -> tuple[list[dict], list[str]]:
    """Questions with ten annotators, and answers."""
    rng = random.Random(1)
    questions, answers = [], []
    for index in range(count):
        answer = (ODD + WORDS)[index % (len(ODD) + len(WORDS))] if index < 200 else " ".join(rng.sample(ODD + WORDS, 2))
        own = rng.choice((0, 1, 2, 2, 3, 4, 5, 10))
        given = [varied(rng, answer) for _ in range(own)] + [rng.choice(WORDS + ODD) for _ in range(10 - own)]
        if index % 7 == 0:  # all the same, which the VQA evaluation compares as they are
            given = [varied(rng, answer)] * 10
        rng.shuffle(given)
        kinds = {
            "answer_type": rng.choice(("yes/no", "number", "other")),
            "question_type": rng.choice(("is the", "how many", "what")),
        }
        questions.append({"answers": given, "answerable": rng.randrange(2), **kinds})
        answers.append(varied(rng, answer))
    return questions, answers


def quietly(function, *arguments):
    """What `function` returns, and what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        returned = function(*arguments)
    return returned, out.getvalue()


# --- one function for each set of questions ---


def vqa_set(clones: Clones) -> dict:
    questions, answers = annotated()
    numbered = {
        index: {**q, "answers": [{"answer": a, "answer_id": i} for i, a in enumerate(q["answers"])]}
        for index, q in enumerate(questions)
    }
    text = clones.read("vqa", "PythonEvaluationTools/vqaEvaluation/vqaEval.py").decode()
    names: dict = {}
    exec(compile(re.sub(r"print (\".*\")", r"print(\1)", text), "vqaEval.py", "exec"), names)
    copied = json.loads(
        json.dumps(numbered), object_hook=lambda d: {int(k) if k.isdigit() else k: v for k, v in d.items()}
    )
    given = types.SimpleNamespace(qa=copied, getQuesIds=lambda: list(copied))
    evaluation = names["VQAEval"](
        given, types.SimpleNamespace(qa={i: {"answer": a} for i, a in enumerate(answers)}), n=10
    )
    quietly(evaluation.evaluate)
    by = {"answer_type": evaluation.accuracy["perAnswerType"], "question_type": evaluation.accuracy["perQuestionType"]}
    official = {
        "vqa_accuracy": {
            "scores": [evaluation.evalQA[i] for i in numbered],
            "score": evaluation.accuracy["overall"],
            "by": by,
        }
    }

    m4c = clones.module("llava", "llava/eval/m4c_evaluator.py")
    evaluator = m4c["TextVQAAccuracyEvaluator"]()
    pairs = [{"pred_answer": a, "gt_answers": q["answers"]} for q, a in zip(questions, answers)]
    with contextlib.redirect_stderr(io.StringIO()):
        scores = [evaluator.eval_pred_list([pair]) for pair in pairs]
        overall = evaluator.eval_pred_list(pairs)
    read = [evaluator.answer_processor(a) for a in answers]
    official["textvqa_accuracy"] = {"scores": [100 * score for score in scores], "score": 100 * overall, "read": read}

    vizwiz = clones.module("vizwiz", "vlm_eval/util/evaluation/vizwiz/eval.py")
    truth = {
        str(i): {"answers": [{"answer": a} for a in q["answers"]], "answerable": q["answerable"]}
        for i, q in enumerate(questions)
    }
    evaluation = vizwiz["VQAEval"](truth, {str(i): {"answer": a} for i, a in enumerate(answers)}, n=10)
    quietly(evaluation.evaluate)
    quietly(evaluation.evaluate_unanswerability)
    read = [
        evaluation.processDigitArticle(evaluation.processPunctuation(re.sub("[\n\t]", " ", a).strip())) for a in answers
    ]
    official["vizwiz_accuracy"] = {
        "scores": [evaluation.evalQA[str(i)] for i in range(len(answers))],
        "score": evaluation.accuracy["overall"],
        # this copy of the script has grave accents for typographic apostrophes
        "read": [text.replace("`", "\N{RIGHT SINGLE QUOTATION MARK}") for text in read],
        "unanswerable_f1": evaluation.unanswerability["f1_score"],
        "unanswerable_average_precision": evaluation.unanswerability["average_precision"],
    }
    return {"questions": questions, "answers": answers, "official": official}


GQA_TYPES = [
    (s, m) for s in ("query", "verify", "logical", "choose", "compare") for m in ("obj", "attr", "rel", "cat", "global")
]


def gqa_set(clones: Clones, count: int = 300) -> dict:
    rng = random.Random(2)
    words = [*WORDS, "t-shirt", "cell phone", "naïve", ""]
    wrong = [
        "Yes",
        "YES.",
        "no..",
        "a dog",
        "red.",
        "Red",
        "left ",
        " left",
        ".",
        "yes, no",
        "no\n",
        "İ",
        "It is a dog.",
    ]
    steps = [
        ("select", "dog (12)"),
        ("exist", "?"),
        ("query", "name"),
        ("choose name", "x"),
        ("relate", "on,o (3)"),
        ("verify color", "red"),
    ]
    questions, answers = [], []
    for index in range(count):
        structural, semantic = rng.choice(GQA_TYPES)
        answer = rng.choice(words)
        questions.append(
            {
                "id": str(index),
                "question": " ".join(rng.choices(words, k=rng.randint(1, 9))),
                "answer": answer,
                "isBalanced": rng.random() < 0.8,
                "types": {
                    "structural": structural,
                    "semantic": semantic,
                    "detailed": rng.choice(("existC", "twoCommon")),
                },
                "groups": {"global": rng.choice((None, "color", "animal"))},
                "semantic": [dict(zip(("operation", "argument"), rng.choice(steps))) for _ in range(rng.randint(1, 5))],
                "entailed": [str(rng.randrange(count)) for _ in range(rng.randrange(4))],
                "valid": rng.sample(words, 5),
                "plausible": rng.sample(words, 3),
            }
        )
        answers.append(rng.choice((answer, answer, answer.title(), f"{answer}.", rng.choice(wrong), rng.choice(words))))
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        (at / "q.json").write_text(json.dumps({q["id"]: q for q in questions}))
        (at / "c.json").write_text(json.dumps({q["id"]: {k: q[k] for k in ("valid", "plausible")} for q in questions}))
        lines = [json.dumps({"question_id": q["id"], "text": a}) for q, a in zip(questions, answers)]
        (at / "answers.jsonl").write_text("\n".join(lines))
        clones.run("llava", "scripts/convert_gqa_for_eval.py", "--src", f"{at}/answers.jsonl", "--dst", f"{at}/p.json")
        read = [line["prediction"] for line in json.loads((at / "p.json").read_text())]
        options = [
            "--questions",
            f"{at}/q.json",
            "--choices",
            f"{at}/c.json",
            "--predictions",
            f"{at}/p.json",
            "--consistency",
        ]
        told = clones.run("gqa", "videollava/eval/eval_gqa.py", *options)
    single = {k.lower(): float(v) for k, v in re.findall(r"^(\w+): ([\d.]+)", told, re.M)}
    parts: dict[str, dict] = {}
    for line in told.splitlines():
        if title := re.fullmatch(r"Accuracy / (\w+) \w+:", line):
            part = parts.setdefault(title[1], {})
        elif row := re.fullmatch(r"  (.+): ([\d.]+)% \((\d+) questions\)", line):
            part[row[1].lower()] = [float(row[2]), int(row[3])]
    return {"questions": questions, "answers": answers, "official": {"gqa": {"read": read, **single, "parts": parts}}}


YES_NO = [
    "Yes", "No", "yes", "no", "No.", "Yes.", "no,", "No,", "NO", "YES", "nope", "Not at all", "not", "I do not know",
    "There is no dog.", "Yes, there is a dog.", "Yes. No.", "No. Yes.", "yes, no", "no,way", "", " ", ".", ".no",
    "It's not.", "The answer is no", "know", "unknown", "y", "n", "Yes!", "No!", " yes", "  no", "yesno", "noyes",
    "No way, not ever", "naïve no", "\N{FULLWIDTH LATIN CAPITAL LETTER N}o", "はい", "Yes - no",
    "no-one", "Sí", "…no", "a no", "N0", "not.", "Well. not", "Both yes and no", "neither",
]  # fmt: skip


def pope_set(clones: Clones) -> dict:
    rng = random.Random(3)
    questions = [
        {"category": category, "label": rng.choice(("yes", "no"))}
        for category in ("random", "popular", "adversarial")
        for _ in range(100)
    ]
    answers = [rng.choice([*YES_NO, "yes\nno", "no\nyes", "No\n"]) for _ in questions]
    evaluate = clones.module("llava", "llava/eval/eval_pope.py")["eval_pope"]
    official: dict = {"read": [], "by": {}}
    for category in ("random", "popular", "adversarial"):
        own = [(q, {"text": a}) for q, a in zip(questions, answers) if q["category"] == category]
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            file.write("\n".join(json.dumps(q) for q, _ in own))
            file.flush()
            _, told = quietly(evaluate, [a for _, a in own], file.name)
        official["read"] += [a["text"] for _, a in own]
        counts = dict(zip(("tp", "fp", "tn", "fn"), map(int, told.splitlines()[1].split())))
        ratios = {
            k.lower().replace(" score", "").replace(" ", "_"): 100 * float(v)
            for k, v in re.findall(r"^([A-Z][\w ]+): (\S+)", told, re.M)
        }
        official["by"][category] = counts | ratios
    return {"questions": questions, "answers": answers, "official": {"pope": official}}


def mme_set(clones: Clones) -> dict:
    rng = random.Random(4)
    archive = zipfile.ZipFile(io.BytesIO(clones.read("mme", "tools/eval_tool.zip")))
    names: dict = {"__name__": "official"}
    exec(compile(archive.read("eval_tool/calculation.py").decode(), "calculation.py", "exec"), names)
    calculation = names["calculate_metrics"]()
    questions, answers = [], []
    for task in [task for tasks in names["eval_type_dict"].values() for task in tasks]:
        for image in range(12):
            for answer in ("Yes", "No"):
                questions.append({"category": task, "image": f"{image}.jpg", "answer": answer})
                answers.append(
                    rng.choice([answer, answer, answer, f"{answer}.", f"{answer}, it is", *rng.sample(YES_NO, 2)])
                )
    with tempfile.TemporaryDirectory() as folder:
        for task in {q["category"] for q in questions}:
            own = [(q, a) for q, a in zip(questions, answers) if q["category"] == task]
            rows = ["\t".join((q["image"], "Is it? Please answer yes or no.", q["answer"], a)) for q, a in own]
            (Path(folder) / f"{task}.txt").write_text("\n".join(rows) + "\n")
        _, told = quietly(calculation.process_result, folder)
    tasks = {name: float(score) for name, score in re.findall(r"^\t (\w+)  score: (\S+)", told, re.M)}
    perception, cognition = map(float, re.findall(r"total score: (\S+)", told))
    read = [calculation.parse_pred_ans(answer.lower()) for answer in answers]
    official = {"read": read, "perception": perception, "cognition": cognition, "tasks": tasks}
    return {"questions": questions, "answers": answers, "official": {"mme": official}}


def scienceqa_set(clones: Clones, count: int = 300) -> dict:
    rng = random.Random(5)
    questions, answers = [], []
    for index in range(count):
        choices = rng.sample(WORDS, rng.randint(2, 5))
        right = rng.randrange(len(choices))
        questions.append({"choices": choices, "answer": right, "image": f"{index}.png" if rng.random() < 0.5 else None})
        one, other = "ABCDE"[right], rng.choice("ABCDEFZ")
        ways = [
            one, other, f"{one}.", f"{one}. ", f"{one}. {choices[right]}", f"{other}. {choices[0]}", f"({one})",
            one.lower(), "", " ", f" {one}", f"The answer is {one}.", f"The answer is {one}",
            f"The answer is {one}. The answer is {other}.", f"The answer is {one}{other}", f"The answer is {one}\n",
            f"the answer is {one}.", f"The answer is ({one}).", f"Answer: {one}", choices[right], f"{one}\n",
            f"Because. The answer is {one}. Done.", f"{one}.x", "日本語", f"{one} ", f"{one}, {other}", "FAILED",
        ]  # fmt: skip
        answers.append(rng.choice(ways))
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        problems = {str(i): {"choices": q["choices"], "answer": q["answer"]} for i, q in enumerate(questions)}
        (at / "problems.json").write_text(json.dumps(problems))
        (at / "pid_splits.json").write_text(json.dumps({"test": list(problems)}))
        prompts = ["<image>\nq" if q["image"] else "q" for q in questions]
        lines = [
            json.dumps({"question_id": str(i), "text": a, "prompt": p})
            for i, (a, p) in enumerate(zip(answers, prompts))
        ]
        (at / "answers.jsonl").write_text("\n".join(lines))
        files = [f"{at}/{name}.json" for name in ("output", "result")]
        options = [
            "--base-dir",
            folder,
            "--result-file",
            f"{at}/answers.jsonl",
            "--output-file",
            files[0],
            "--output-result",
            files[1],
        ]
        told = clones.run("llava", "llava/eval/eval_science_qa.py", *options)
        result = json.loads(Path(files[1]).read_text())
    _, correct, image = re.search(r"Total: (\d+), Correct: (\d+), .*IMG-Accuracy: ([\d.]+)%", told).groups()
    official = {
        "read": [result["results"][str(i)] for i in range(count)],
        "score": result["acc"],
        "correct": int(correct),
        "image_score": float(image),
    }
    return {"questions": questions, "answers": answers, "official": {"scienceqa": official}}


def seed_bench_set(clones: Clones, count: int = 300) -> dict:
    rng = random.Random(6)
    kinds = [rng.randint(1, 6) for _ in range(count)]
    questions = [
        {"answer": rng.choice("ABCD"), "question_type_id": kind, "data_type": "video" if kind > 4 else "image"}
        for kind in kinds
    ]
    answers = [
        rng.choice((q["answer"], q["answer"], f"{q['answer']}.", "A", "B", "", "c", "A\n", f"({q['answer']})"))
        for q in questions
    ]
    with tempfile.TemporaryDirectory() as folder:
        at = Path(folder)
        types_ = {f"type {i}": i for i in range(1, 7)}
        listed = [{**q, "question_id": str(i)} for i, q in enumerate(questions)]
        (at / "q.json").write_text(json.dumps({"questions": listed, "question_type": types_}))
        (at / "a.jsonl").write_text("\n".join(json.dumps({"question_id": i, "text": a}) for i, a in enumerate(answers)))
        options = [
            "--annotation-file",
            f"{at}/q.json",
            "--result-file",
            f"{at}/a.jsonl",
            "--result-upload-file",
            f"{at}/out",
        ]
        told = clones.run("llava", "scripts/convert_seed_for_submission.py", *options)
    found = {name: float(value) for name, value in re.findall(r"^([\w ]+): ([\d.]+)%", told, re.M)}
    official = {
        "score": found["Total accuracy"],
        "data_type": {kind: found[f"{kind} accuracy"] for kind in ("image", "video")},
        "question_type_id": {str(i): found[f"type {i}"] for i in range(1, 7)},
    }
    return {"questions": questions, "answers": answers, "official": {"seed_bench": official}}


def vlmevalkit(clones: Clones) -> tuple[dict, dict]:
    """Its `matching_util.py` and `multiple_choice.py`, without the rest of it."""
    stubs = {
        "vlmeval": {}, "vlmeval.smp.log": {"get_logger": __import__("logging").getLogger},
        "vlmeval.smp.vlm": {"build_option_str": str}, "vlmeval.dataset": {}, "vlmeval.utils": {"track_progress_rich": None},
        "vlmeval.smp": {
            "cn_string": None, "d2df": None, "get_logger": __import__("logging").getLogger, "timestr": lambda: "official",
            "istype": lambda value, kind: isinstance(int(value), kind), "get_pred_file_format": lambda: "pkl",
            "dump": lambda value, path: Path(path).write_bytes(pickle.dumps(value)),
            "load": lambda path: pickle.loads(Path(path).read_bytes()),
        },
    }  # fmt: skip
    for name, values in stubs.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(values)
    matching = clones.module("vlmevalkit", "vlmeval/utils/matching_util.py")
    vars(sys.modules["vlmeval.utils"]).update(
        can_infer=matching["can_infer"], can_infer_lego=matching["can_infer_lego"]
    )
    return matching, clones.module("vlmevalkit", "vlmeval/dataset/utils/multiple_choice.py")


def named(rng: random.Random, choices: dict[str, str], right: str) -> str:
    """An answer that names an option, or tries to."""
    other, text = rng.choice("ABCDZ"), choices[right]
    ways = [
        right, right, right, right, f"{right}.", f"({right})", f"{right}. {text}", f"Answer: {right}", text, text,
        text.upper(), f"It is {text}.", f"The answer is {right}",
        f"The correct answer is **{right}**. Here is why: A is wrong", f"answer is {right.lower()}", other,
        f"{right} or {other}", f"{right}, {right}", "", "Z", "none", right.lower(), f"[{right}]", f"{right}\n",
        f"A very long story about nothing {right}", f"{right} is what I would say after some thought about it",
        f"A dog, that is {right}", "Cannot determine the answer", "é", "日本語", "Failed to obtain answer via API",
        f"Failed to obtain answer via API {text}", f"{text} and nothing else " * 4, f"#{right}#", f"option{right}",
        " and ".join(choices.values()), f"I can't process this file. {right}", f"{right}!", f"{{{right}}}",
        f"答案是{right}", f"{right}\N{FULLWIDTH COLON}{text}",
    ]  # fmt: skip
    return rng.choice(ways)


def mmbench_set(clones: Clones, count: int = 120) -> dict:
    import pandas

    rng = random.Random(7)
    matching, circular = vlmevalkit(clones)
    questions, answers = [], []
    texts = [*WORDS, "a cat", "the red umbrella", "naïve", "İstanbul", "Straße", "15", "1", "None of these"]
    for index in range(count):
        options = rng.sample(texts, rng.randint(2, 4))
        right = options[rng.randrange(len(options))]
        sure = rng.random() < 0.6
        kinds = {
            "category": rng.choice(("ocr", "celebrity")),
            "l2-category": rng.choice(("logic_reasoning", "coarse_perception")),
        }
        for turn in range(len(options)):
            choices = dict(zip("ABCD", options))
            letter = next(key for key, value in choices.items() if value == right)
            questions.append({"index": index + turn * 1_000_000, "choices": choices, "answer": letter, **kinds})
            answers.append(
                rng.choice((letter, f"{letter}.", f"({letter})", right)) if sure else named(rng, choices, letter)
            )
            options = options[1:] + options[:1]
    questions[-1]["index"] = 3_500_000 + count  # a rotation without its first
    order = list(range(len(questions)))
    rng.shuffle(order)
    questions, answers = [questions[i] for i in order], [answers[i] for i in order]
    read = [matching["can_infer"](answer, dict(q["choices"])) or "" for q, answer in zip(questions, answers)]
    rows = [
        {**{k: v for k, v in q.items() if k != "choices"}, **q["choices"], "prediction": a}
        for q, a in zip(questions, answers)
    ]
    meta = pandas.DataFrame([{k: v for k, v in row.items() if k != "prediction"} for row in rows])
    data = pandas.DataFrame([{k: v for k, v in row.items() if k != "answer"} for row in rows])
    with tempfile.TemporaryDirectory() as folder:
        scored = circular["mcq_circular_eval"](None, data, meta, 1, f"{folder}/result.pkl", "MMBench")
    report = circular["report_acc"](scored)
    abbreviated = circular["MMB_abbrs"]
    by = {
        field: {kind: 100 * float(report[abbreviated.get(kind, kind)][0]) for kind in sorted(set(scored[field]))}
        for field in ("category", "l2-category")
    }
    hits = {str(i): int(hit) for i, hit in zip(scored["index"], scored["hit"])}
    official = {"read": read, "hits": hits, "score": 100 * float(report["Overall"][0]), "by": by}
    return {"questions": questions, "answers": answers, "official": {"mmbench": official}}


def choice_set(clones: Clones, count: int = 300) -> dict:
    rng = random.Random(8)
    matching, _ = vlmevalkit(clones)
    questions, answers = [], []
    for _ in range(count):
        choices = dict(zip("ABCDEF", rng.sample([*WORDS, *filter(str.strip, ODD)], rng.randint(2, 6))))
        right = rng.choice(list(choices))
        questions.append({"choices": choices, "answer": right})
        answers.append(named(rng, choices, right))
    read = [matching["can_infer"](answer, dict(q["choices"])) or "" for q, answer in zip(questions, answers)]
    return {"questions": questions, "answers": answers, "official": {"multiple_choice": {"read": read}}}


def texts_set(clones: Clones, count: int = 300) -> dict:
    tree = ast.parse(clones.read("lmms_eval", "lmms_eval/api/metrics.py"))
    tree.body = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name in ("anls", "levenshtein_distance")
    ]
    for node in tree.body:
        node.decorator_list = []
    names: dict = {}
    exec(compile(tree, "metrics.py", "exec"), names)
    near = clones.module("lmms_eval", "lmms_eval/tasks/chartqa/utils.py")["relaxed_correctness"]
    rng = random.Random(9)
    numbers = [
        "0",
        "0.0",
        "-0",
        "1",
        "100",
        "100%",
        "1.0",
        "95",
        "105",
        "105.1",
        "94.9",
        "1e2",
        "inf",
        "nan",
        "-5",
        "-5.2",
        "1,000",
        "$5",
        "5 %",
        "5%",
        "0.05",
        "%",
        "1_0",
        "٣",
        "",
    ]
    pool = [*numbers, *WORDS, *ODD]
    questions, answers = [], []
    for _ in range(count):
        right = [rng.choice(pool) for _ in range(rng.randint(1, 3))]
        text = list(varied(rng, right[0]))
        for _ in range(rng.randrange(4)):
            text[rng.randint(0, len(text)) : rng.randint(0, len(text))] = rng.choice(["", "x", " ", "1", "é"])
        numeric = right[0].replace("%", "").strip()
        answer = "".join(text)
        if rng.random() < 0.3 and re.fullmatch(r"-?\d+(\.\d+)?", numeric):
            answer = rng.choice(
                (f"{float(numeric) * rng.uniform(0.93, 1.07):.4g}", f"{float(numeric) * 1.05:.6g}", f"{numeric}%")
            )
        questions.append({"answers": right})
        answers.append(answer)
    scores = [100 * names["anls"](q["answers"], [a])["anls"] for q, a in zip(questions, answers)]
    relaxed = [100 * float(any(near(a, right) for right in q["answers"])) for q, a in zip(questions, answers)]
    official = {
        "anls": {"scores": scores, "score": sum(scores) / count},
        "relaxed_accuracy": {"scores": relaxed, "score": sum(relaxed) / count},
    }
    return {"questions": questions, "answers": answers, "official": official}


SETS = (vqa_set, gqa_set, pope_set, mme_set, scienceqa_set, seed_bench_set, mmbench_set, choice_set, texts_set)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repositories", type=Path, required=True, help="folder with the clones")
    parser.add_argument("--write", type=Path, required=True, help="file to write")
    arguments = parser.parse_args()
    clones = Clones(arguments.repositories)
    sets = {make.__name__.removesuffix("_set"): make(clones) for make in SETS}
    for source in USED.values():
        source["files"] = sorted(set(source["files"]))
    rows = []
    for name, one in sets.items():
        listed = ",\n".join(json.dumps(pair) for pair in zip(one["questions"], one["answers"]))
        rows.append(f'{json.dumps(name)}: {{\n"asked": [\n{listed}\n],\n"official": {json.dumps(one["official"])}\n}}')
    text = f'{{\n"sources": {json.dumps(USED, indent=1)},\n"sets": {{\n' + ",\n".join(rows) + "\n}\n}\n"
    json.loads(text)
    arguments.write.write_text(text)


if __name__ == "__main__":
    main()
