# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The questions of each benchmark, from its official files or the question files of LLaVA's eval.zip, as LLaVA-1.5 asks them.

A function reads `Files` and returns `Item`s. The fields of an item are those of the official files, as `scoring` takes them.
Raises ValueError, which names file, entry and field, where something is not as expected.
"""

import base64
from typing import Any

from ..common.shown import shown
from ..scoring.choices import LETTERS
from .files import Entry, Files, Item, annotated, read_entries, read_tsv, read_value, unique
from .prompts import LETTER, LETTER_CN, SHORT, UNANSWERABLE, llava_item, of_llava, short_item, with_options


CIRCULAR = 1_000_000  # MMBench's rotated questions have the index of the first plus a multiple of this


def vqav2(files: Files) -> list[Item]:
    entries = read_entries(files.questions, inside=["questions"])
    labels = {}
    if files.annotations is not None:
        given = read_entries(files.annotations, inside=["annotations", "questions"])
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
            items.append(short_item(entry.id("question_id"), entry, files.image(image), fields))
    return unique(items, files.questions)


def gqa(files: Files) -> list[Item]:
    entries = read_entries(files.questions)
    if not of_llava(entries):
        images = [files.image(f"{entry.id('imageId')}.jpg") for entry in entries]
        items = [short_item(entry.key, entry, image, _gqa_fields(entry)) for entry, image in zip(entries, images)]
        return unique(items, files.questions)
    labels: dict[str, Entry] = {}
    if files.annotations is not None:
        wanted = [entry.id("question_id") for entry in entries]
        labels = annotated(read_entries(files.annotations), wanted, files.annotations, "")
    items = []
    for entry in entries:
        label = labels.get(str(entry.id("question_id")))
        items.append(llava_item(entry, files, None if label is None else _gqa_fields(label)))
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
        items = []
        for entry in entries:
            image = (files.image(f"{entry.text('image_id')}.jpg"),)
            prompt = f"{entry.text('question').capitalize()}\n{SHORT}"
            items.append(Item(entry.id("question_id"), prompt, image, entry.values))
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


def _gqa_fields(entry: Entry) -> dict[str, Any]:
    """What the metric takes of a question of GQA, by which it also splits the score."""
    wanted = {"types": dict, "semantic": list, "entailed": list, "question": str, "answer": str}
    fields: dict[str, Any] = {name: entry.get(name, kind) for name, kind in wanted.items() if name in entry}
    fields |= {"id": entry.key, "isBalanced": entry.values.get("isBalanced") is not False}
    types, steps = fields.get("types", {}), fields.get("semantic", [])
    named = all(isinstance(types.get(name), str) for name in ("structural", "semantic", "detailed"))
    stepped = all(isinstance(step, dict) and "operation" in step and "argument" in step for step in steps)
    if "types" in fields and not named:
        raise ValueError(
            f"{entry.where}: types={shown(types)}: expected texts 'structural', 'semantic' and 'detailed'."
        )
    if not stepped:
        raise ValueError(f"{entry.where}: semantic={shown(steps)}: expected steps with 'operation' and 'argument'.")
    return fields


def _problem(entry: Entry) -> str:
    """A problem of ScienceQA as LLaVA asks it ("CQM-A")."""
    choices = " ".join(f"({letter}) {choice}" for letter, choice in zip(LETTERS, entry.texts("choices")))
    context = str(entry.values.get("hint") or "").strip() or "N/A"
    whole = f"Context: {context}\nQuestion: {entry.text('question')}\nOptions: {choices}\n"
    return whole.replace("  ", " ").strip()


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
