# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The questions of each benchmark, from its official files or the question files of LLaVA's eval.zip, as LLaVA-1.5 asks them.

A function reads `Files` and returns `Item`s. The fields of an item are those of the official files, as `scoring` takes them.
Raises ValueError, which names file, entry and field, where something is not as expected.
"""

import base64
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..scoring.choices import LETTERS
from .files import Entry, Files, Item, annotated, read_entries, read_tsv, read_value, unique


SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
LETTER_CN = "请直接回答选项字母。"
UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
YES_OR_NO = " Please answer yes or no."  # MME's questions end so, LLaVA's do not
CIRCULAR = 1_000_000  # MMBench's rotated questions have the index of the first plus a multiple of this


def of_llava(entries: list[Entry]) -> bool:
    """Whether these are questions of LLaVA's: their text is the whole prompt."""
    return "text" in entries[0] and "question_id" in entries[0] and "label" not in entries[0]


def llava_item(entry: Entry, files: Files, fields: dict[str, Any] | None = None, **more: Any) -> Item:
    """The item of a question of LLaVA's."""
    known = {"category": entry.values["category"]} if "category" in entry else {}
    image = (files.image(entry.text("image")),)
    return Item(entry.id("question_id"), entry.text("text"), image, {**known, **(fields or {})}, **more)


def with_options(question: str, options: dict[str, str], request: str) -> str:
    """A question, its options by letter, and what is asked for, each on a line."""
    return "\n".join([question, *(f"{letter}. {option}" for letter, option in options.items()), request])


def vqav2(files: Files) -> list[Item]:
    entries = read_entries(files.questions, inside=["questions"])
    labels = {}
    if files.annotations is not None:
        given = read_entries(files.annotations, inside=["annotations", "questions"])
        if "answers" in given[0]:
            labels = annotated(given, (entry.id("question_id") for entry in entries), files.annotations)
    names = ("answers", "answer_type", "question_type")
    split = "" if of_llava(entries) else str(read_value(files.questions, "data_subtype") or "")
    folder = "test2015" if split.startswith("test") else split
    items = []
    for entry in entries:
        label = labels.get(str(entry.id("question_id")))
        fields = {name: label.values[name] for name in names if name in label} if label else {}
        if of_llava(entries):
            items.append(llava_item(entry, files, fields))
        else:
            if not folder:
                raise ValueError(
                    f"{files.questions} has no 'data_subtype', which names the images: expected val2014 or the like."
                )
            image = f"COCO_{folder}_{entry.get('image_id', int):012d}.jpg"
            items.append(_short(entry.id("question_id"), entry, files.image(image), fields))
    return unique(items, files.questions)


def gqa(files: Files) -> list[Item]:
    entries = read_entries(files.questions)
    if of_llava(entries):
        labels = _by_name(files, [entry.id("question_id") for entry in entries])
        return unique((llava_item(e, files, labels.get(str(e.id("question_id")))) for e in entries), files.questions)
    items = (
        _short(entry.key, entry, files.image(f"{entry.id('imageId')}.jpg"), {"id": entry.key, **entry.values})
        for entry in entries
    )
    return unique(items, files.questions)


def vizwiz(files: Files) -> list[Item]:
    entries = read_entries(files.questions)
    ids = [entry.text("image") for entry in entries]
    labels: dict[str, Entry] = {}
    if files.annotations is not None:
        labels = annotated(read_entries(files.annotations), ids, files.annotations, "image")
    items = []
    for entry, image in zip(entries, ids):
        source = labels.get(image, entry)
        fields = {name: source.values[name] for name in ("answers", "answer_type", "answerable") if name in source}
        if of_llava(entries):
            items.append(llava_item(entry, files, fields))
        else:
            prompt = f"{entry.text('question')}\n{UNANSWERABLE}\n{SHORT}"
            items.append(Item(image, prompt, (files.image(image),), fields))
    return unique(items, files.questions)


def textvqa(files: Files) -> list[Item]:
    entries = read_entries(files.questions, inside=["data"])
    if not of_llava(entries):
        items = [
            _short(entry.id("question_id"), entry, files.image(f"{entry.text('image_id')}.jpg"), entry.values)
            for entry in entries
        ]
        return unique(items, files.questions)
    # LLaVA's have the image's id as theirs, which several questions share
    labels: dict[tuple[str, str], Entry] = {}
    if files.annotations is not None:
        given = read_entries(files.annotations, inside=["data"])
        labels = {(entry.text("image_id"), entry.text("question").lower()): entry for entry in given}
    items = []
    for index, entry in enumerate(entries):
        lines = [line for line in entry.text("text").split("\n") if not line.startswith("Reference OCR token:")]
        key = (str(entry.id("question_id")), lines[0].lower())
        fields: dict[str, Any] = {"question_id": entry.id("question_id")}
        if labels and key not in labels:
            raise ValueError(
                f"{files.annotations} has no question {lines[0]!r:.80} about the image {key[0]!r:.80}, which {entry.where} "
                "asks: do they belong to the same split?"
            )
        if labels:
            fields["answers"] = labels[key].values.get("answers")
        image = (files.image(entry.text("image")),)
        items.append(Item(index, entry.text("text"), image, fields))
    return unique(items, files.questions)


def scienceqa(files: Files) -> list[Item]:
    """Those questions that have an image."""
    if files.questions.name == "problems.json":
        problems = {entry.key: entry for entry in read_entries(files.questions)}
        splits = files.questions.parent / "pid_splits.json"
        if not splits.is_file():
            raise FileNotFoundError(f"{splits} is not there: it says which of the problems are the test split.")
        ids = read_value(splits, "test")
        if not isinstance(ids, list) or not all(isinstance(one, str) and one in problems for one in ids):
            raise ValueError(f"{splits}: 'test' is not a list of problems in {files.questions}.")
        chosen = [problems[one] for one in ids if "image" in problems[one]]
        prompts = [_problem(entry) for entry in chosen]
    else:
        given = read_entries(files.questions)
        problems = {}
        if files.annotations is not None:
            wanted = [entry.id("id") for entry in given]
            problems = annotated(read_entries(files.annotations), wanted, files.annotations, "")
        chosen, prompts = [], []
        for entry in (entry for entry in given if "image" in entry):
            turns = entry.get("conversations", list)
            said = turns[0].get("value") if turns and isinstance(turns[0], dict) else None
            if not isinstance(said, str):
                raise ValueError(f"{entry.where}: its first turn has no text under 'value'.")
            chosen.append(problems.get(str(entry.id("id")), entry))
            prompts.append(said.replace("<image>", "").strip())
            if chosen[-1] is not entry:
                chosen[-1] = Entry(
                    chosen[-1].where, {**chosen[-1].values, "image": entry.text("image")}, str(entry.id("id"))
                )
    items = []
    for entry, prompt in zip(chosen, prompts):
        own = str(entry.values.get("id", entry.key))
        name = entry.text("image")
        image = name if "/" in name else f"{own}/{name}"
        fields = {name: entry.values[name] for name in ("choices", "answer", "subject", "grade") if name in entry}
        items.append(Item(own, f"{prompt}\n{LETTER}", (files.image(image),), {**fields, "image": image}))
    return unique(items, files.questions)


def pope(files: Files) -> list[Item]:
    parts = sorted(files.questions.glob("coco_pope_*.json*")) if files.questions.is_dir() else [files.questions]
    if not parts:
        raise FileNotFoundError(f"{files.questions} has no file coco_pope_random.json, _popular or _adversarial.")
    entries = [(path, entry) for path in parts for entry in read_entries(path)]
    if of_llava([entry for _, entry in entries]):
        return _pope_of_llava([entry for _, entry in entries], files)
    items = []
    for path, entry in entries:
        category = path.stem.removeprefix("coco_pope_")
        fields = {"label": entry.values.get("label"), "category": category}
        prompt = f"{entry.text('text')}\n{SHORT}"
        items.append(Item(f"{category}/{entry.id('question_id')}", prompt, (files.image(entry.text("image")),), fields))
    return unique(items, files.questions)


def mme(files: Files) -> list[Item]:
    if not files.questions.is_dir():
        return _mme_of_llava(files)
    items = []
    for task, image, asked in _mme_folder(files.questions):
        for number, (question, answer) in enumerate(asked):
            fields = {"answer": answer, "category": task, "image": image.name}
            prompt = f"{question.replace(YES_OR_NO, '').strip()}\n{SHORT}"
            items.append(Item(f"{task}/{image.name}/{number}", prompt, (str(image),), fields, f"{task}/{image.name}"))
    return unique(items, files.questions)


def mmbench(files: Files, request: str = LETTER) -> list[Item]:
    """All rotations of the options of each question: those of the file, or made here if it has none."""
    rows = read_tsv(files.questions)
    for row in rows:
        if not row.text("index").isdecimal() or len(row.text("index")) > 15:
            raise ValueError(f"{row.where}: index={row.values['index']!r:.40}: expected a whole number.")
    images = _encoded_images(rows)
    rotated = any(int(row.text("index")) >= CIRCULAR for row in rows)
    items = []
    for row in rows:
        options: list[str] = []
        for letter in "ABCD":
            if letter not in row:
                break
            options.append(row.text(letter))
        if not options:
            raise ValueError(f"{row.where} has no option A.")
        question = f"{row.text('hint')}\n{row.text('question')}" if "hint" in row else row.text("question")
        for turn in range(1 if rotated else len(options)):
            by_letter = dict(zip(LETTERS, options[turn:] + options[:turn]))
            index = int(row.text("index")) + turn * CIRCULAR
            fields: dict[str, Any] = {"index": index, "choices": by_letter}
            fields |= {name: row.values[name] for name in ("category", "l2-category", "split") if name in row}
            if "answer" in row:
                place = LETTERS.find(row.text("answer"))
                if row.text("answer") not in LETTERS[: len(options)]:
                    raise ValueError(
                        f"{row.where}: answer={row.values['answer']!r:.40}: expected the letter of an option."
                    )
                fields["answer"] = LETTERS[(place - turn) % len(options)]
            prompt = with_options(question, by_letter, request)
            items.append(Item(index, prompt, (images[row.text("index")],), fields, index % CIRCULAR))
    return unique(items, files.questions)


def mmbench_cn(files: Files) -> list[Item]:
    return mmbench(files, LETTER_CN)


def seed_bench(files: Files) -> list[Item]:
    """Those questions that are about an image, not about a video."""
    entries = read_entries(files.questions, inside=["questions"])
    names = ("answer", "question_type_id", "data_type")
    if of_llava(entries):
        labels: dict[str, Entry] = {}
        if files.annotations is not None:
            given = read_entries(files.annotations, inside=["questions"])
            labels = annotated(given, (entry.id("question_id") for entry in entries), files.annotations)
        items = []
        for entry in entries:
            label = labels.get(str(entry.id("question_id")))
            fields = {name: label.values[name] for name in names if name in label} if label else {}
            if fields.get("data_type", "image") == "image" and "video" not in entry.text("image").split("/")[0]:
                items.append(llava_item(entry, files, fields))
        return unique(items, files.questions)
    items = []
    for entry in entries:
        if entry.values.get("data_type", "image") == "image":
            options = {letter: entry.text(f"choice_{letter.lower()}") for letter in "ABCD"}
            fields = {name: entry.values[name] for name in names if name in entry}
            prompt = with_options(entry.text("question"), options, LETTER)
            items.append(Item(entry.id("question_id"), prompt, (files.image(str(entry.id("data_id"))),), fields))
    return unique(items, files.questions)


def mm_vet(files: Files) -> list[Item]:
    entries = read_entries(files.questions)
    if of_llava(entries):
        return unique((llava_item(entry, files) for entry in entries), files.questions)
    named = (Item(e.key, e.text("question"), (files.image(e.text("imagename")),)) for e in entries)
    return unique(named, files.questions)


def llava_bench(files: Files) -> list[Item]:
    entries = read_entries(files.questions)
    return unique((llava_item(entry, files) for entry in entries), files.questions)


# --- parts ---


def _short(own: str | int, entry: Entry, image: str, fields: dict[str, Any]) -> Item:
    """A question to be answered shortly."""
    return Item(own, f"{entry.text('question')}\n{SHORT}", (image,), fields)


def _by_name(files: Files, ids: list[Any]) -> dict[str, dict[str, Any]]:
    """The annotations of a file that is a mapping, by name."""
    if files.annotations is None:
        return {}
    found = annotated(read_entries(files.annotations), ids, files.annotations, "")
    return {name: {"id": name, **entry.values} for name, entry in found.items()}


def _problem(entry: Entry) -> str:
    """A problem of ScienceQA as LLaVA asks it ("CQM-A")."""
    choices = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, entry.texts("choices")))
    context = str(entry.values.get("hint") or "").strip() or "N/A"
    whole = f"Context: {context}\nQuestion: {entry.text('question')}\nOptions: {choices}\n"
    return whole.replace("  ", " ").strip()


def _pope_of_llava(entries: list[Entry], files: Files) -> list[Item]:
    """LLaVA's questions: those of a category are in the order of the official file, which has the labels."""
    labels: dict[str, list[Entry]] = {}
    if files.annotations is not None:
        for path in sorted(files.annotations.glob("coco_pope_*.json*")) if files.annotations.is_dir() else []:
            labels[path.stem.removeprefix("coco_pope_")] = read_entries(path)
        if not labels:
            raise FileNotFoundError(f"{files.annotations} is not a folder with the files coco_pope_random.json ...")
    items = []
    for entry in entries:
        fields: dict[str, Any] = {}
        if labels:
            category = entry.text("category")
            label = next(iter(labels.get(category, [])), None)
            same = label and (label.values.get("image"), label.values.get("text")) == (
                entry.text("image"),
                entry.text("text").split("\n")[0],
            )
            if label is None or not same:
                raise ValueError(
                    f"{entry.where} is not the question at its place among those of coco_pope_{category}.json in "
                    f"{files.annotations}: do they belong together?"
                )
            labels[category].pop(0)
            fields["label"] = label.values.get("label")
        items.append(llava_item(entry, files, fields))
    return unique(items, files.questions)


def _mme_of_llava(files: Files) -> list[Item]:
    """LLaVA's questions; the official folder has the answers to them."""
    known: dict[tuple[str, str, str], str] = {}
    if files.annotations is not None:
        for task, image, asked in _mme_folder(files.annotations):
            known.update({(task, image.stem, _bare(question)): answer for question, answer in asked})
    items = []
    for index, entry in enumerate(read_entries(files.questions)):
        name, task, prompt = os.path.basename(entry.text("image")), entry.text("category"), entry.text("text")
        fields: dict[str, Any] = {"category": task, "image": name, "question_id": entry.id("question_id")}
        if known:
            fields["answer"] = known.get((task, Path(name).stem, _bare(prompt.removesuffix(SHORT))))
            if fields["answer"] is None:
                raise ValueError(
                    f"{files.annotations} has no answer to {entry.where}, about {name!r:.80} of {task!r:.40}."
                )
        items.append(Item(index, prompt, (files.image(entry.text("image")),), fields, f"{task}/{name}"))
    return unique(items, files.questions)


def _mme_folder(folder: Path) -> Iterable[tuple[str, Path, list[tuple[str, str]]]]:
    """(task, image, [(question, answer)]) of the official folder: in each task's folder, or in its folders `images` and
    `questions_answers_YN`, there is a text of the name of each image."""
    found = sorted(folder.glob("*/*.txt")) + sorted(folder.glob("*/questions_answers_YN/*.txt"))
    if not found:
        raise FileNotFoundError(f"{folder} is not a folder of tasks with images and texts, as MME has them.")
    for path in found:
        task = path.parent.parent if path.parent.name == "questions_answers_YN" else path.parent
        beside = path.parent if path.parent == task else task / "images"
        images = [beside / f"{path.stem}{ending}" for ending in (".jpg", ".png", ".jpeg")]
        image = next((image for image in images if image.is_file()), None)
        if image is None:
            raise FileNotFoundError(f"{path} has no image {path.stem}.jpg or .png in {beside}.")
        asked = []
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="strict").splitlines(), 1):
            if line.strip():
                question, tab, answer = line.partition("\t")
                if not tab or answer.strip() not in ("Yes", "No"):
                    raise ValueError(f"{path}, line {number}: expected a question, a tab, and Yes or No.")
                asked.append((question.strip(), answer.strip()))
        yield task.name, image, asked


def _encoded_images(rows: list[Entry]) -> dict[str, bytes]:
    """The image of each row of a table by the row's index. What is short is the index of another row, which has it."""
    encoded = {row.text("index"): row.text("image") for row in rows}
    images = {}
    for row in rows:
        text = encoded[row.text("index")]
        text = encoded.get(text, "") if len(text) < 64 else text
        try:
            images[row.text("index")] = base64.b64decode(text, validate=True)
        except ValueError:
            text = ""
        if len(text) < 64:
            raise ValueError(f"{row.where}: its image is neither base64 nor the index of a row that has one.")
    return images


def _bare(question: str) -> str:
    """A question of MME without what it is asked to be answered with."""
    return question.strip().removesuffix(YES_OR_NO.strip()).strip()
