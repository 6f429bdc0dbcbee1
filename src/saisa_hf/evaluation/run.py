# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""A model asked the questions of a benchmark: answers go into a journal as they come, then into a file, with their score."""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .._version import __version__
from ..common.identity import differences
from ..common.journal import SETTINGS, Journal, Writer
from ..common.journal import remove as remove_journal
from .benchmarks import BENCHMARKS
from .files import Item
from .own import LIKELIHOOD
from .plan import Plan, make_plan
from .processes import Processes
from .report import answer_lines, scored, summary_of, summary_table
from .running import load_answerer, without_trace


ANSWERS, SUMMARY, JOURNAL = "answers.jsonl", "summary.json", ".journal"


def evaluate(
    model: str,
    benchmark: str,
    *,
    questions: str | os.PathLike,
    output: str | os.PathLike,
    annotations: str | os.PathLike | None = None,
    images: str | os.PathLike | None = None,
    metric: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    max_new_tokens: int | None = None,
    chat_template: str = "",
    batch_size: int = 16,
    visual_states: bool = True,
    dtype: str = "auto",
    device: str = "auto",
    device_map: str | None = None,
    attn_implementation: str | None = None,
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Asks `model` the questions of a benchmark and writes `answers.jsonl`, `summary.json` and what a server takes into the
    folder `output`. A run that was interrupted goes on from where it was; one that is finished is only shown.

    Args:
        model: folder, or hub id, of a SAISA checkpoint.
        benchmark: one of `benchmark_names()`.
        questions, annotations, images: the benchmark's files, see the documentation.
        metric: for questions of one's own, one of `scoring.metric_names()`.
        limit: ask only so many: the first, or with `seed` some drawn at random. Questions that are scored together count as
            one.
        max_new_tokens: of an answer; None: as LLaVA's scripts have it.
        chat_template: name of a packaged template, or a .jinja file; empty: the checkpoint's own.
        batch_size: questions that are asked at once; answers do not depend on it.
        visual_states: whether images with several questions are encoded once.
        dtype, device, attn_implementation: see `load_model`.
        device_map: in place of `device`, how the model is laid out over several.
        overwrite: delete a run that is in `output`.
        log: called with the report.

    Returns:
        What `summary.json` has.

    Raises:
        OSError: a file is missing or cannot be read or written.
        ValueError: a file is not as expected, an image cannot be read, or `output` has another run.
    """
    depends = {"chat_template": chat_template, "dtype": dtype}
    plan = make_plan(model, benchmark, questions, annotations, images, metric, limit, seed, max_new_tokens, **depends)
    folder, processes = Path(output).expanduser(), Processes(device)
    if processes.count > 1 and device_map is not None:
        raise ValueError(f"device_map={device_map!r} is for one process: each of several has a device of its own.")
    if overwrite and processes.first:
        _discard(folder)
    processes.wait()
    if not _is_finished(folder, plan):
        loading = {"dtype": dtype, "device": processes.device, "device_map": device_map}
        loading["attn_implementation"] = attn_implementation
        asking = {"batch_size": batch_size, "visual_states": visual_states, "max_new_tokens": plan.max_new_tokens}
        with Journal(folder / JOURNAL, plan.request, processes.index) as journal:
            mine = processes.share([index for index in _by_image(plan.items) if index not in journal])
            processes.wait()  # all have looked what is left before one writes
            if mine:
                with without_trace(journal, processes):
                    answerer = _answerer(plan.model, chat_template, loading, asking)
                    _ask(answerer, plan, mine, journal, processes)
            processes.wait()
            if processes.first:
                _finish(journal, folder, plan)
        processes.wait()
    if processes.first:
        remove_journal(folder / JOURNAL)
    summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    if processes.first:
        log(summary_table(summary))
    return summary


# --- what is there already ---


def _is_finished(folder: Path, plan: Plan) -> bool:
    """Whether `folder` has the result of the run that is asked for.

    Raises:
        ValueError: it has that of another run.
        OSError: it has other files.
    """
    summary = _summary(folder)
    if summary is None:
        allowed = {JOURNAL, *_own_files(folder)}
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
        if strange := [name for name in names if name not in allowed]:
            raise FileExistsError(
                f"--output {folder} has other files, {strange[0]} for instance: choose another folder."
            )
        return False
    if differing := differences(summary["request"], json.loads(json.dumps(plan.request))):
        raise ValueError(
            f"--output {folder} has the result of a run with other settings: {'; '.join(differing)}. Choose another folder, "
            "or delete that run with --overwrite."
        )
    return True


def _summary(folder: Path) -> dict[str, Any] | None:
    """The summary of the finished run that `folder` has; None: it has none.

    Raises:
        ValueError: a file of this name is something else, or damaged.
    """
    path = folder / SUMMARY
    if not path.is_file():
        return None
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        differences(summary["request"], summary["request"])  # it has all that is compared
        complete = all(isinstance(name, str) for name in summary["files"])
    except (ValueError, LookupError, TypeError, RecursionError):
        complete = False
    if not complete:
        raise ValueError(f"{path} is not that of a run of saisa eval, or is damaged: choose another --output.")
    return summary


def _own_files(folder: Path) -> set[str]:
    """The names of the files that the run in `folder` may have written; empty: there is no run. Files of others may have such
    names, the questions of MM-Vet for instance."""
    results = {ANSWERS, *(benchmark.file for benchmark in BENCHMARKS.values() if benchmark.file)}
    summary = _summary(folder)
    if summary is not None:
        return results.intersection(summary["files"])
    return results if (folder / JOURNAL / SETTINGS).is_file() else set()


def _discard(folder: Path) -> None:
    """Deletes the run that `folder` has, the summary last: a kill leaves what can be discarded again."""
    for name in (*_own_files(folder), SUMMARY):
        with suppress(FileNotFoundError):
            (folder / name).unlink()
    remove_journal(folder / JOURNAL)


# --- asking ---


def _by_image(items: Sequence[Item]) -> list[int]:
    """The places of the questions, those about the same image one after the other: it is encoded once, also where, as in
    POPE's three splits, they are far apart."""
    first: dict[str | bytes | int, int] = {}
    return sorted(range(len(items)), key=lambda index: first.setdefault((*items[index].images, index)[0], index))


def _answerer(model: str, chat_template: str, loading: dict[str, Any], asking: dict[str, Any]) -> Any:
    answerer = load_answerer(model, chat_template, loading, asking)
    if answerer.chat_template is None and not answerer.processor.chat_template:
        raise ValueError(f"{model} has no chat template: name one with --chat-template, vicuna for instance.")
    return answerer


def _ask(answerer: Any, plan: Plan, indices: Sequence[int], journal: Journal, processes: Processes) -> None:
    """Asks those of the plan's questions; their answers are in the journal when it returns."""
    by_likelihood = plan.metric is not None and plan.metric.name == LIKELIHOOD
    answers = (_chosen if by_likelihood else _said)(answerer, plan.items, indices)
    seen: set[str | bytes] = set()
    with processes.progress(len(indices), "questions") as progress, Writer(journal) as writer:
        for index, line in answers:
            images = {image for image in plan.items[index].images if image not in seen}
            seen |= images
            writer.add(index, line)
            progress.add(1, len(images))


def _said(answerer: Any, items: list[Item], indices: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Answers to questions."""
    from ..answering import Question

    questions = (Question(items[index].prompt, items[index].images, index) for index in indices)
    for answer in answerer.answer(questions, as_they_come=True):
        _check(answer.error, items[answer.key])
        yield answer.key, {"text": answer.text, "tokens": answer.tokens, "finish": answer.finish}


def _chosen(answerer: Any, items: list[Item], indices: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
    """The likeliest of each question's choices, and the likelihoods of all."""
    from ..answering import Question

    asked = (
        (Question(items[index].prompt, items[index].images, index), choice)
        for index in indices
        for choice in items[index].choices
    )
    values: list[float] = []
    for found in answerer.loglikelihood(asked):
        _check(found.error, items[found.key])
        values.append(found.log_probability)
        choices = items[found.key].choices
        if len(values) == len(choices):
            yield found.key, {"text": choices[values.index(max(values))], "log_likelihoods": values}
            values = []


def _check(error: str | None, item: Item) -> None:
    if error is not None:
        raise ValueError(f"question {item.id!r:.80} cannot be asked: {error}")


# --- the result ---


def _finish(journal: Journal, folder: Path, plan: Plan) -> None:
    """Writes what there is to write, the summary last."""
    lines = [line for _, line in journal.lines()]
    results = scored(plan.items, lines, plan.metric)
    about = {"benchmark": plan.name, "title": plan.benchmark.title, "model": plan.model}
    summary = summary_of(plan.items, lines, results, plan.metric, about)
    if plan.metric is None:
        summary["note"] = plan.note()
    files = {ANSWERS: _json_lines(answer_lines(plan.items, lines, results, plan.model))}
    if plan.benchmark.upload is not None:
        files[plan.benchmark.file] = plan.benchmark.upload(plan.items, [line["text"] for line in lines], plan.files)
    summary |= {"files": list(files), "request": plan.request, "version": __version__}
    files[SUMMARY] = (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode("utf-8", "replace")
    for name, content in files.items():
        with journal.result(folder / name) as path:
            path.write_bytes(content)


def _json_lines(lines: Iterable[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode("utf-8", "replace")
