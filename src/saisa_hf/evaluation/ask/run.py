# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""A model asked about each row of an input: answers go into a journal as they come, then into a table."""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...common.identity import of_data, of_model, of_template
from ...common.journal import SETTINGS, Journal, Writer, check_request, result_of
from ...common.journal import remove as remove_journal
from ...common.progress import Progress
from ...common.sources import check_local
from ..processes import Processes
from ..running import load_answerer, without_trace
from .questions import Columns, check_columns, merged, question_of
from .rows import Rows, open_rows
from .tables import check_output, write_table


if TYPE_CHECKING:
    from ...answering import Answer, Question

BACKENDS = ("auto", "transformers", "vllm")
MOST_IMAGES = 16  # of a row that has several, for vLLM, which makes room for them
AHEAD = 4  # batches that vLLM is given at once


@dataclasses.dataclass(frozen=True)
class Asking:
    """How rows are asked about.

    Args:
        prompt: what is asked about all of them; None: each row has its own.
        columns: where a table has what.
        images: folder that paths in a table are relative to; empty: the table's own.
        allow_urls: whether images may be at addresses, within the limits of `ImageLimits`.
        system: a system message.
        chat_template: name of a packaged template, or a .jinja file; empty: the checkpoint's own.
        max_new_tokens: the longest answer.
        temperature, top_p, seed: of sampling; 0: greedy.
        strict: stop at the first row that cannot be asked.
        backend: `"transformers"`, `"vllm"`, or `"auto"`: vLLM where it is installed and can run the checkpoint.
        vllm_options: further arguments of `vllm.LLM`.
        max_images: of a row, for vLLM; None: 1, or 16 if rows have lists of images.
        batch_size: questions that are asked at once.
        dtype, device, device_map, attn_implementation: see `load_model`.
    """

    prompt: str | None = None
    columns: Columns = dataclasses.field(default_factory=Columns)
    images: str = ""
    allow_urls: bool = False
    system: str | None = None
    chat_template: str = ""
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    strict: bool = False
    backend: str = "auto"
    vllm_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_images: int | None = None
    batch_size: int = 16
    dtype: str = "auto"
    device: str = "auto"
    device_map: str | None = None
    attn_implementation: str | None = None


# what may change while a run goes on: answers stay the same, but for rounding
FREE = {"strict", "vllm_options", "max_images", "batch_size", "device", "device_map", "attn_implementation"}


def ask(
    model: str,
    source: str,
    output: str,
    asking: Asking,
    *,
    overwrite: bool = False,
    log: Callable[[str], None] = print,
) -> tuple[int, int]:
    """Asks `model` about each row of `source` and writes the table `output`, in the order of the rows, when all are answered.
    Until then what is answered lies in the folder `output`.journal, and the same call goes on from there.

    Args:
        model: folder, or hub id, of a SAISA checkpoint.
        source: see `open_rows`.
        output: a file that ends in .jsonl, .csv or .parquet.
        overwrite: replace `output`, and give up the beginning of another run.

    Returns:
        How many rows were answered, and how many have an error instead.

    Raises:
        OSError: something is missing or cannot be read or written, or `output` exists.
        ValueError: something is not as expected, or the journal is that of another run; with `strict`, for the first row
            that cannot be asked.
        ImportError: an optional package is missing.
    """
    path = Path(output).expanduser()
    check_output(str(path))
    journal = path.with_name(f"{path.name}.journal")
    check_local("MODEL", model)
    given = os.path.expanduser(source)
    if path.exists() and os.path.exists(given) and os.path.samefile(path, given):
        raise ValueError(f"--output {output} is INPUT itself: choose another file.")
    rows = open_rows(source, asking.images, asking.columns.media, leave_out=[path, journal])
    if asking.prompt is None and list(rows.columns) == [asking.columns.image] and rows.schema is None:
        raise ValueError(f"{source} has no prompts: ask the same about all images with --prompt.")
    if asking.prompt is not None and not asking.prompt.strip():
        raise ValueError("--prompt is empty: expected a text.")
    check_columns(rows, asking.columns, asking.prompt)
    from ...common.loading import check_saisa  # with torch, which takes seconds

    model = check_saisa("MODEL", model)
    processes = Processes(asking.device)
    asking = dataclasses.replace(asking, backend=_backend(asking, model, processes.count), device=processes.device)
    log = log if processes.first else lambda line: None
    request = _request(model, rows, asking)
    if processes.first:
        _sweep(path, journal, request, overwrite)
    processes.wait()
    finished = _look(path, journal, request, overwrite)
    processes.wait()  # all have looked before one removes or writes anything
    if finished is not None:
        if processes.first:
            remove_journal(journal)
        return _told(path, rows.count, finished["failed"], log)
    with Journal(journal, request, processes.index) as found:
        processes.wait()  # all know what is there before one adds to it
        with without_trace(found, processes):
            _ask(model, rows, asking, found, processes, log)
        processes.wait()
        failed = sum("error" in line for _, line in found.lines())
        processes.wait()
        if processes.first:
            _finish(path, rows, asking, found, failed)
    processes.wait()  # a launcher stops the others when one ends with a status that is not 0
    return _told(path, rows.count, failed, log)


def _finish(path: Path, rows: Rows, asking: Asking, found: Journal, failed: int) -> None:
    """Writes the table, and removes the journal."""
    if os.path.isfile(rows.identity["path"]) and of_data(rows.identity["path"]) != rows.identity:
        raise ValueError(f"{rows.name} has changed since the run began: its answers would stand beside other rows.")
    columns = [*rows.columns, asking.columns.answer, asking.columns.error]
    schema = rows.schema and [field for field in rows.schema if field.name not in asking.columns.media]
    with found.result(path) as partial:
        write_table(partial, lambda: merged(rows, asking.columns, found.lines()), columns, schema)
    found.remove(failed=failed)


def _told(path: Path, count: int, failed: int, log: Callable[[str], None]) -> tuple[int, int]:
    log(f"wrote {path}: {count - failed} of {count} answered" + (f", {failed} with an error" if failed else ""))
    return count - failed, failed


def _request(model: str, rows: Rows, asking: Asking) -> dict[str, Any]:
    settings = {name: value for name, value in dataclasses.asdict(asking).items() if name not in FREE}
    if asking.images:
        settings["images"] = os.path.abspath(os.path.expanduser(asking.images))
    settings["chat_template"] = of_template(asking.chat_template)
    return {"model": of_model(model), "data": [rows.identity], "settings": settings}


def _sweep(path: Path, journal: Path, request: dict[str, Any], overwrite: bool) -> None:
    """Removes the beginning of another run with `overwrite`, and the last that was left of a run which was killed when its
    result was in place."""
    try:
        check_request(journal, request)
    except ValueError:
        if overwrite:
            remove_journal(journal)
    if path.exists() and not (journal / SETTINGS).exists():
        remove_journal(journal)


def _look(path: Path, journal: Path, request: dict[str, Any], overwrite: bool) -> dict[str, int] | None:
    """What is known of the result if this very run was killed when it was in place. Changes nothing.

    Raises:
        OSError, ValueError: there is a result, or the beginning of another run, that is not to be replaced.
    """
    if check_request(journal, request):
        return result_of(journal) if path.exists() else None
    if path.exists() and not overwrite:
        raise FileExistsError(f"--output {path} exists: choose another file, or replace it with --overwrite.")
    return None


# --- asking ---


def _ask(
    model: str, rows: Rows, asking: Asking, journal: Journal, processes: Processes, log: Callable[[str], None]
) -> None:
    """Asks about those of this process's rows that are missing in the journal."""
    if 0 < len(journal) < rows.count:
        log(f"{len(journal)} of {rows.count} rows are answered already")
    mine = processes.share(range(rows.count))
    missing = sum(index not in journal for index in mine)
    writer = Writer(journal)
    if missing:
        answerer = _answerer(model, asking, rows)
        with processes.progress(missing, "rows") as progress, writer:
            for answer, images in _answers(answerer, _questions(rows, asking, journal, mine, writer, progress)):
                if answer.error is not None and asking.strict:
                    raise ValueError(f"row {answer.key + 1} of {rows.name}: {answer.error}")
                writer.add(answer.key, {"answer": answer.text} if answer.error is None else {"error": answer.error})
                progress.add(1, images)


def _questions(
    rows: Rows, asking: Asking, journal: Journal, mine: Sequence[int], writer: Writer, progress: Progress
) -> Iterator[Question]:
    """The questions of those of the rows `mine` that are missing. A row that asks none is noted at once."""
    for index, row in enumerate(rows.read(True)):
        if index not in mine or index in journal:
            continue
        try:
            yield question_of(row, index, rows, asking.columns, asking.prompt, asking.allow_urls)
        except ValueError as error:
            if asking.strict:
                raise ValueError(f"row {index + 1} of {rows.name}: {error}") from error
            writer.add(index, {"error": str(error)})
            progress.add(1)


def _answers(answerer: Any, questions: Iterable[Question]) -> Iterator[tuple[Answer, int]]:
    """Answers as they come, each with the number of its images."""
    counts = {}

    def counted() -> Iterator[Question]:
        for question in questions:
            counts[question.key] = len(question.images)
            yield question

    for answer in answerer.answer(counted(), as_they_come=True):
        yield answer, counts.pop(answer.key)


def _backend(asking: Asking, model: str, processes: int) -> str:
    """What answers. Raises ValueError if an option is not for it."""
    if asking.backend not in BACKENDS:
        raise ValueError(f"--backend {asking.backend!r}: expected one of {', '.join(BACKENDS)}.")
    of_transformers = [name for name in ("device_map", "attn_implementation") if getattr(asking, name) is not None]
    of_transformers += ["video_column"] if asking.columns.video is not None else []
    of_vllm = [name for name in ("vllm_options", "max_images") if getattr(asking, name)]
    if asking.backend == "transformers" and of_vllm:
        raise ValueError(f"--{of_vllm[0].replace('_', '-')} is for --backend vllm.")
    if asking.backend == "vllm" and of_transformers:
        raise ValueError(f"--{of_transformers[0].replace('_', '-')} is for --backend transformers.")
    if processes > 1 and (asking.backend == "vllm" or asking.device_map is not None):
        option = "--backend vllm" if asking.backend == "vllm" else "--device-map"
        raise ValueError(f"{option} is for one process: each of several has a model and a device of its own.")
    if asking.backend != "auto":
        return asking.backend
    if of_transformers or processes > 1:
        return "transformers"
    with_vllm = importlib.import_module("...serving.with_vllm", __package__)
    installed = with_vllm.installed() is not None and with_vllm.problem_of(model) is None
    return "vllm" if installed else "transformers"


def _answerer(model: str, asking: Asking, rows: Rows) -> Any:
    greedy = asking.temperature == 0
    if asking.backend == "vllm":
        from ...common.loading import quiet_transformers
        from ...processing_saisa import SaisaProcessor
        from ...training.encoding import template_source
        from .with_vllm import VllmAnswerer

        sampling = {"temperature": asking.temperature, "max_tokens": asking.max_new_tokens, "top_p": asking.top_p}
        with quiet_transformers(progress=False):
            template = template_source(asking.chat_template, SaisaProcessor.from_pretrained(model))
            return VllmAnswerer(
                model,
                dtype=asking.dtype,
                device=asking.device,
                at_once=AHEAD * asking.batch_size,
                images=asking.max_images or (MOST_IMAGES if rows.several else 1),
                chat_template=template,
                system=asking.system,
                sampling=sampling if greedy else {**sampling, "seed": asking.seed},
                options=asking.vllm_options,
            )
    generation: dict[str, Any] = {"max_new_tokens": asking.max_new_tokens}
    if not greedy:
        import torch

        torch.manual_seed(asking.seed)
        generation |= {"do_sample": True, "temperature": asking.temperature, "top_p": asking.top_p}
    loading = {name: getattr(asking, name) for name in ("dtype", "device", "device_map", "attn_implementation")}
    how = {"batch_size": asking.batch_size, "system": asking.system, **generation}
    return load_answerer(model, asking.chat_template, loading, how)
