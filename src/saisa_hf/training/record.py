# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the output folder of a run knows about it: what was asked for, and whether it is finished.

The file `training_run.json` is written when a run begins, and again when its result is complete. A run whose output has one
resumes only if the same is asked for; a finished run is left as it is.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..common.identity import PARTIAL, differences, of_data, of_model, of_template, read_record, write_record
from .options import ADAPTED, TrainingOptions


RECORD = "training_run.json"
NEW, UNFINISHED, FINISHED = "new", "unfinished", "finished"

# options that may change while a run goes on: the result stays the same, but for rounding
FREE = {"output", "resume", "overwrite", "save_steps", "save_total_limit", "logging_steps", "report_to", "peak_tflops"}
FREE |= {"questions", "questions_limit", "bad_samples", "workers", "device", "per_device_batch_size", "torch_compile"}
FREE |= {"compile_backend", "attn_implementation", "gradient_checkpointing", "use_reentrant"}
EVALUATION = {
    "eval_data",
    "eval_split",
    "eval_steps",
    "eval_metric",
    "eval_questions",
}  # free as long as nothing follows
ORDER_OF_STREAMS = {"workers", "per_device_batch_size"}  # each worker makes batches of its own share of the samples

LOCK_WAIT = 10  # seconds: the workers of a run that was killed live on for some seconds


# --- what is asked for ---


def request(options: TrainingOptions) -> dict[str, Any]:
    """What the result of a run depends on: `model` and `data` by path and contents, and the other options as `settings`."""
    free = FREE - ORDER_OF_STREAMS if options.streaming else FREE
    free = free if options.evaluation_matters else free | EVALUATION | {"metric_for_best_model"}
    settings = {key: value for key, value in dataclasses.asdict(options).items() if key not in free}
    model, data = settings.pop("model"), settings.pop("data")
    if "eval_data" in settings:
        settings["eval_data"] = [of_data(path)["contents"] or path for path in settings["eval_data"]]
    if options.max_steps:
        del settings["epochs"]
    if options.train not in ADAPTED:
        settings = {key: value for key, value in settings.items() if not key.startswith("lora_")}
    if options.images:
        settings["images"] = os.path.abspath(options.images)
    settings["chat_template"] = of_template(options.chat_template)
    return {"model": of_model(model), "data": [of_data(path) for path in data], "settings": settings}


# --- what the output has ---


def checkpoints(folder: str | Path) -> list[Path]:
    """The complete checkpoints in `folder`, oldest first."""
    found = [(re.fullmatch(r"checkpoint-(\d+)", path.name), path) for path in Path(folder).glob("checkpoint-*")]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


def look(options: TrainingOptions) -> str:
    """What `options.output` has of the run that is asked for. Changes nothing.

    Returns:
        NEW: nothing, or nothing that is worth keeping; UNFINISHED: checkpoints to resume from; FINISHED: the result.

    Raises:
        ValueError: it has another run, or a model that no run wrote.
    """
    output = Path(options.output)
    if options.overwrite or not output.is_dir():
        return NEW
    found, result = _read(output), (output / "config.json").is_file()
    finished = result and (_finished_without_record(output) if found is None else bool(found["finished"]))
    if not finished and not checkpoints(output):
        if result and found is None:
            raise ValueError(
                f"output {options.output!r} has a model already, which this run would replace: choose another folder, or "
                "replace it with overwrite."
            )
        return NEW
    if not options.resume:
        raise ValueError(
            f"resume=False: output {options.output!r} has a run already. Choose another folder, or delete that run with "
            "overwrite."
        )
    differing = _differing_steps(output, options) if found is None else differences(found, request(options))
    if differing:
        further = f" To train its result further, start from it (model: {options.output}) with another output."
        raise ValueError(
            f"output {options.output!r} has {'the result' if finished else 'checkpoints'} of a run with other settings: "
            f"{'; '.join(differing)}. Choose another folder, {'' if finished else 'resume it with its own settings, '}or "
            f"delete that run with overwrite.{further if finished else ''}"
        )
    return FINISHED if finished else UNFINISHED


def has_record(output: str | Path) -> bool:
    """Whether it is known what the run in `output` was asked for."""
    return Path(output, RECORD).is_file()


def _read(output: Path) -> dict[str, Any] | None:
    try:
        found = read_record(output / RECORD)
        if found is None or isinstance(found.get("finished"), bool):
            return found
        raise ValueError(f"{output / RECORD} is damaged: 'finished' is {found.get('finished')!r:.40}.")
    except ValueError as error:
        raise ValueError(f"{error} Choose another output, or delete that run with overwrite.") from error


def _state(output: Path) -> dict[str, Any]:
    """Transformers' record of a run, which it writes in the end; empty if there is none."""
    try:
        state = json.loads((output / "trainer_state.json").read_text(encoding="utf-8"))
        return {key: int(state[key]) for key in ("global_step", "max_steps")}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return {}


def _finished_without_record(output: Path) -> bool:
    state = _state(output)
    return bool(state) and state["global_step"] >= state["max_steps"] > 0


def _differing_steps(output: Path, options: TrainingOptions) -> list[str]:
    """All that can be compared without a record."""
    newest = checkpoints(output)[-1:]
    steps = (_state(output) or (_state(newest[0]) if newest else {})).get("max_steps", options.max_steps)
    return [f"max_steps was {steps}, is {options.max_steps}"] if options.max_steps not in (0, steps) else []


# --- the course of a run ---


@contextlib.contextmanager
def held(output: str | Path) -> Iterator[None]:
    """Keeps other runs from writing to `output`, which is made, while the block runs.

    Raises:
        OSError: another run does, or the folder cannot be made.
    """
    from ..saving_saisa import locked  # with PyTorch, which a run that is finished does not need

    Path(output).mkdir(parents=True, exist_ok=True)
    with locked(Path(output), LOCK_WAIT) as mine:
        if mine is False:
            raise BlockingIOError(f"Another run writes to {output}: wait for its end, or stop it.")
        yield


def begin(options: TrainingOptions) -> None:
    """Removes what dead runs left in the output, and with `overwrite` the run that it has, and records this one."""
    output = Path(options.output)
    if look(options) == NEW:  # last: a run that is half deleted is still the old one
        for old in checkpoints(output):
            discard(old)
    for left in output.glob(f"{PARTIAL}*"):
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    write_record(output / RECORD, {**request(options), "finished": False})


def finish(options: TrainingOptions, steps: int) -> None:
    """Records that the result of a run of `steps` steps is in its output."""
    output = Path(options.output)
    write_record(output / RECORD, {**(_read(output) or request(options)), "finished": True, "steps": steps})


def discard(folder: Path) -> None:
    """Deletes a checkpoint. It loses its name first: a half-deleted folder is not a checkpoint."""
    nameless = folder.parent / f"{PARTIAL}-{folder.name}"
    shutil.rmtree(nameless, ignore_errors=True)
    os.replace(folder, nameless)
    shutil.rmtree(nameless)


def put_in_place(staged: Path, output: Path) -> None:
    """Moves the finished result from the folder `staged` to `output`. Until the end `output` has no config.json, so that no
    mixture of an old and a new model can be loaded."""
    (output / "config.json").unlink(missing_ok=True)
    for old in output.glob("model*.safetensors*"):
        old.unlink()
    for path in sorted(staged.iterdir(), key=lambda path: (path.name == "config.json", path.name)):
        target = output / path.name
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(path, target)
