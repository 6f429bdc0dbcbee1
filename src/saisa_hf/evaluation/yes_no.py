# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The questions of POPE and MME, which are answered with yes or no, as `official` has those of other benchmarks."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..training.sources import read_text
from .files import Entry, Files, Item, read_entries, unique
from .prompts import SHORT, llava_item, of_llava


YES_OR_NO = " Please answer yes or no."  # MME's questions end so, LLaVA's do not


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
        for number, line in enumerate(read_text(path).splitlines(), 1):
            if line.strip():
                question, tab, answer = line.partition("\t")
                if not tab or answer.strip() not in ("Yes", "No"):
                    raise ValueError(f"{path}, line {number}: expected a question, a tab, and Yes or No.")
                asked.append((question.strip(), answer.strip()))
        yield task.name, image, asked


def _bare(question: str) -> str:
    """A question of MME without what it is asked to be answered with."""
    return question.strip().removesuffix(YES_OR_NO.strip()).strip()
