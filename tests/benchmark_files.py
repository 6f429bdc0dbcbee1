"""A few questions of each benchmark, written like its official files and like the question files of LLaVA: what the tests of
`saisa eval` share."""

import base64
import io
import json
from pathlib import Path

from PIL import Image


SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def png(seed):
    """An image of one colour, in bytes."""
    content = io.BytesIO()
    Image.new("RGB", (8, 8), (seed * 37 % 256, seed * 91 % 256, 60)).save(content, "PNG")
    return content.getvalue()


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".png", ".jpg"):
        path.write_bytes(png(len(list(path.parent.iterdir()))))
    elif path.suffix == ".jsonl" or path.name.startswith("coco_pope"):
        path.write_text("".join(json.dumps(line) + "\n" for line in content))
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def ten(answer, other="other"):
    """Seven annotators say one thing, three another."""
    return [{"answer": answer if index < 7 else other, "answer_id": index + 1} for index in range(10)]


def vqav2(folder):
    asked = [
        (458752000, 458752, "What is this photo taken looking through?", "net"),
        (42000, 42, "Is it raining?", "no"),
    ]
    questions = [{"image_id": image, "question": text, "question_id": own} for own, image, text, _ in asked]
    labels = [
        {
            "question_id": own,
            "answers": ten(answer),
            "answer_type": "other",
            "question_type": "what is",
            "image_id": image,
        }
        for own, image, _, answer in asked
    ]
    for _, image, *_ in asked:
        write(folder / f"val2014/COCO_val2014_{image:012}.jpg", None)
        write(folder / f"test2015/COCO_test2015_{image:012}.jpg", None)
    write(folder / "questions.json", {"data_subtype": "val2014", "questions": questions})
    write(folder / "annotations.json", {"data_subtype": "val2014", "annotations": labels})
    write(folder / "test.json", {"data_subtype": "test-dev2015", "questions": questions})
    more = [*questions, {"image_id": 7, "question": "Why?", "question_id": 7000}]
    write(folder / "whole_test.json", {"data_subtype": "test2015", "questions": more})
    of_llava = [
        {
            "question_id": own,
            "image": f"COCO_val2014_{image:012}.jpg",
            "text": f"{text}\n{SHORT}",
            "category": "default",
        }
        for own, image, text, _ in asked
    ]
    write(folder / "llava.jsonl", of_llava)
    return {
        "questions": folder / "questions.json",
        "annotations": folder / "annotations.json",
        "images": folder / "val2014",
    }


def gqa(folder):
    types = {"structural": "query", "semantic": "rel", "detailed": "relS"}
    common = {"semantic": [], "isBalanced": True, "types": types}
    questions = {
        "201307251": {"imageId": "n161313", "question": "Is it overcast?", "answer": "no", **common},
        "201640614": {"imageId": "n235859", "question": "Who is wearing the dress?", "answer": "woman", **common},
    }
    for one in questions.values():
        write(folder / f"images/{one['imageId']}.jpg", None)
    write(folder / "questions.json", questions)
    of_llava = [
        {
            "question_id": own,
            "image": f"{one['imageId']}.jpg",
            "text": f"{one['question']}\n{SHORT}",
            "category": "default",
        }
        for own, one in questions.items()
    ]
    write(folder / "llava.jsonl", of_llava)
    return {"questions": folder / "questions.json", "images": folder / "images"}


def vizwiz(folder):
    names = ["VizWiz_val_00000000.jpg", "VizWiz_val_00000001.jpg"]
    rows = [
        {"image": names[0], "question": "Can you tell me what this medicine is?", "answers": ten("night time")},
        {"image": names[1], "question": "What is this?", "answers": ten("unanswerable")},
    ]
    for index, row in enumerate(rows):
        row |= {"answer_type": "other", "answerable": 1 - index}
        write(folder / f"val/{names[index]}", None)
    write(folder / "val.json", rows)
    write(folder / "test.json", [{key: row[key] for key in ("image", "question")} for row in rows])
    hint = "When the provided information is insufficient, respond with 'Unanswerable'."
    of_llava = [
        {"question_id": row["image"], "image": row["image"], "text": f"{row['question']}\n{hint}\n{SHORT}"}
        for row in rows
    ]
    write(folder / "llava.jsonl", of_llava)
    return {"questions": folder / "val.json", "images": folder / "val"}


def scienceqa(folder):
    problem = {
        "question": "Which  of these states is farthest north?", "choices": ["West Virginia", "Louisiana"], "answer": 0,
        "hint": "", "image": "image.png", "subject": "social science", "grade": "grade2", "lecture": "", "solution": "",
    }  # fmt: skip
    other = {**problem, "question": "What does the map show?", "choices": ["a", "b", "c"], "answer": 2, "hint": "Look."}
    problems = {"4": problem, "5": other, "6": {**problem, "image": None}}
    for own in "45":
        write(folder / f"test/{own}/image.png", None)
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"train": ["6"], "test": ["4", "5", "6"]})
    texts = {
        "4": "Context: N/A\nQuestion: Which of these states is farthest north?\nOptions: (A) West Virginia (B) Louisiana",
        "5": "Context: Look.\nQuestion: What does the map show?\nOptions: (A) a (B) b (C) c",
    }
    turns = {
        own: [{"from": "human", "value": f"{text}\n<image>"}, {"from": "gpt", "value": "A"}]
        for own, text in texts.items()
    }
    of_llava = [{"id": own, "image": f"{own}/image.png", "conversations": turns[own]} for own in turns]
    of_llava.append({"id": "6", "conversations": [{"from": "human", "value": "no image"}]})
    write(folder / "llava_test_CQM-A.json", of_llava)
    return {"questions": folder / "problems.json", "images": folder / "test"}


def textvqa(folder):
    rows = [
        {"question_id": 34602, "image_id": "003a8ae2ef43b901", "question": "what is the brand of this camera?"},
        {"question_id": 34603, "image_id": "003a8ae2ef43b901", "question": "what does the small text say?"},
    ]
    answers = [[*["dakota"] * 8, "clos culombu", "nous les gosses"], ["copenhagen"] * 10]
    data = [{**row, "answers": given} for row, given in zip(rows, answers)]
    write(folder / "train_images/003a8ae2ef43b901.jpg", None)
    write(folder / "TextVQA_0.5.1_val.json", {"data": data})
    of_llava = [
        {
            "question_id": row["image_id"], "image": f"{row['image_id']}.jpg", "category": "default",
            "text": f"{row['question'].capitalize()}\nReference OCR token: DAKOTA, DIGITAL\n{SHORT}",
        }
        for row in rows
    ]  # fmt: skip
    write(folder / "llava.jsonl", of_llava)
    return {"questions": folder / "TextVQA_0.5.1_val.json", "images": folder / "train_images"}


def pope(folder):
    of_llava = []
    for number, category in enumerate(("adversarial", "popular", "random")):
        lines = []
        for index, thing in enumerate(("snowboard", "car")):
            image = f"COCO_val2014_{310196 + number:012}.jpg"
            text, label = f"Is there a {thing} in the image?", ("yes", "no")[index]
            lines.append({"question_id": index + 1, "image": image, "text": text, "label": label})
            own = {"question_id": len(of_llava), "image": image, "text": f"{text}\n{SHORT}", "category": category}
            of_llava.append(own)
        write(folder / f"val2014/{lines[0]['image']}", None)
        write(folder / f"coco/coco_pope_{category}.json", lines)
    write(folder / "llava.jsonl", of_llava)
    return {"questions": folder / "coco", "images": folder / "val2014"}


def mme(folder):
    of_llava, root = [], folder / "MME_Benchmark_release_version"
    for task, image in (("code_reasoning", "0020.png"), ("artwork", "0.jpg")):
        parts = ("", "") if task == "code_reasoning" else ("images", "questions_answers_YN")
        write(root / task / parts[0] / image, None)
        questions = [f"Is a {thing} shown in the picture?" for thing in ("c++ code", "python code")]
        ends = [" Please answer yes or no.\tNo", "  Please answer yes or no.\tYes"]  # there are such with two spaces
        text = "\n".join(question + end for question, end in zip(questions, ends)) + "\n"
        write(root / task / parts[1] / f"{Path(image).stem}.txt", text)
        named = f"{task}/{image}", "/".join(filter(None, (task, parts[0], image)))
        of_llava += [
            {"question_id": named[0], "image": named[1], "text": f"{question}\n{SHORT}", "category": task}
            for question in questions
        ]
    write(folder / "llava_mme.jsonl", of_llava)
    return {"questions": root}


def mmbench(folder, rotated=False):
    images = [base64.b64encode(png(seed)).decode() for seed in (1, 2)]
    columns = [
        "index",
        "question",
        "hint",
        *"ABCD",
        "answer",
        "category",
        "image",
        "source",
        "l2-category",
        "comment",
        "split",
    ]
    rows = [
        ["241", "What is it?", "nan", "dry", "wet", "hot", "cold", "B", "social", images[0], "s", "l", "nan", "dev"],
        ["252", 'Which is "it"?', "A hint.", "1", "None", "", "", "A", "physics", images[1], "s", "m", "", "dev"],
    ]
    if rotated:
        rows.append(
            ["1000241", rows[0][1], "nan", "wet", "hot", "cold", "dry", "A", "social", "241", "s", "l", "", "dev"]
        )
    quoted = [
        ['"' + cell.replace('"', '""') + '"' if '"' in cell else cell for cell in row] for row in [columns, *rows]
    ]
    write(folder / "mmbench_dev.tsv", "\n".join("\t".join(row) for row in quoted) + "\n")
    return {"questions": folder / "mmbench_dev.tsv"}


def seed_bench(folder):
    choices = {"choice_a": "One", "choice_b": "Two", "choice_c": "Three", "choice_d": "Four"}
    questions = [
        {"data_id": "1454426_2591111986", "data_type": "image", "question": "How many towels?", "answer": "A"},
        {"data_id": "1454427", "data_type": "image", "question": "How many dogs?", "answer": "C"},
        {"data_id": "v.mp4", "data_type": "video", "question": "What happens?", "answer": "B"},
    ]
    for index, question in enumerate(questions):
        question |= {"question_id": str(101669 + index), "question_type_id": 5, **choices}
        if question["data_type"] == "image":
            write(folder / "SEED-Bench-image" / f"{question['data_id']}.png", None).rename(
                folder / "SEED-Bench-image" / question["data_id"]
            )
    write(folder / "SEED-Bench.json", {"questions": questions, "question_type": {"Instances Counting": 5}})
    asked = [f"{q['question']}\nA. One\nB. Two\nC. Three\nD. Four\n{LETTER}" for q in questions]
    of_llava = [
        {"question_id": int(q["question_id"]), "image": f"SEED-Bench-{q['data_type']}/{q['data_id']}", "text": text}
        for q, text in zip(questions, asked)
    ]
    write(folder / "llava-seed-bench.jsonl", of_llava)
    return {"questions": folder / "SEED-Bench.json", "images": folder / "SEED-Bench-image"}


def mm_vet(folder):
    questions = {
        f"v1_{index}": {"imagename": f"v1_{index}.png", "question": text, "answer": "a", "capability": ["ocr"]}
        for index, text in enumerate(("What is x in the equation?", "Which room is next?"))
    }
    for one in questions.values():
        write(folder / "images" / one["imagename"], None)
    write(folder / "mm-vet.json", questions)
    of_llava = [
        {"question_id": index, "image": one["imagename"], "text": one["question"]}
        for index, one in enumerate(questions.values())
    ]
    write(folder / "llava-mm-vet.jsonl", of_llava)
    return {"questions": folder / "mm-vet.json", "images": folder / "images"}


def llava_bench(folder):
    lines = [
        {"question_id": index, "image": f"00{index}.jpg", "text": text, "category": "conv"}
        for index, text in enumerate(("What is the name of this famous sight?", "Describe it in detail."))
    ]
    for line in lines:
        write(folder / "images" / line["image"], None)
    write(folder / "questions.jsonl", lines)
    return {"questions": folder / "questions.jsonl", "images": folder / "images"}


def jsonl(folder):
    lines = [
        {"image": f"{index}.png", "question": f"how many digits are there? {index}", "answers": [str(index), "none"]}
        for index in range(3)
    ]
    for line in lines:
        write(folder / line["image"], None)
    write(folder / "questions.jsonl", lines)
    return {"questions": folder / "questions.jsonl", "metric": "exact_match"}


WRITERS = {
    "vqav2": vqav2, "gqa": gqa, "vizwiz": vizwiz, "scienceqa": scienceqa, "textvqa": textvqa, "pope": pope, "mme": mme,
    "mmbench": mmbench, "mmbench-cn": mmbench, "seed-bench": seed_bench, "mm-vet": mm_vet, "llava-bench": llava_bench,
    "jsonl": jsonl,
}  # fmt: skip


# the files of a benchmark where the questions are LLaVA's: questions, annotations, images
OF_LLAVA = {
    "vqav2": ("llava.jsonl", "annotations.json", "val2014"),
    "gqa": ("llava.jsonl", "questions.json", "images"),
    "vizwiz": ("llava.jsonl", "val.json", "val"),
    "scienceqa": ("llava_test_CQM-A.json", "problems.json", "test"),
    "textvqa": ("llava.jsonl", "TextVQA_0.5.1_val.json", "train_images"),
    "pope": ("llava.jsonl", "coco", "val2014"),
    "mme": ("llava_mme.jsonl", "MME_Benchmark_release_version", "MME_Benchmark_release_version"),
    "seed-bench": ("llava-seed-bench.jsonl", "SEED-Bench.json", "."),
    "mm-vet": ("llava-mm-vet.jsonl", None, "images"),
}
