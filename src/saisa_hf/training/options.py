# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The options of a training run: the keys of its YAML file, which are also the options of `saisa train`."""

import argparse
import dataclasses
import difflib
import math
import os
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..common.arguments import MOST_STARTED
from ..common.shown import shown
from ..scoring import Metric, get_metric


TRAINED = {
    "projectors": "only the visual projectors, and a resampler before them (the paper's first stage)",
    "projectors+language_model": "all but the vision encoder (the paper's second stage)",
    "all": "every parameter, also the vision encoder's",
    "lora": "low-rank adapters of the decoder layers' linear maps, with the projectors",
    "qlora": "the same, with the language model's weights kept in 4 bits",
}
ADAPTED = ("lora", "qlora")

POSITIVE = ["batch_size", "per_device_batch_size", "lora_rank", "lora_alpha", "learning_rate"]
POSITIVE += ["logging_steps", "questions_limit", "eval_questions"]
NOT_NEGATIVE = ["max_length", "max_steps", "workers", "save_steps", "save_total_limit", "projector_learning_rate"]
NOT_NEGATIVE += ["peak_tflops", "weight_decay", "max_grad_norm", "seed", "eval_steps", "early_stopping_patience"]
OF_VALIDATION = ["eval_steps", "eval_metric", "load_best_model_at_end", "metric_for_best_model"]
OF_VALIDATION += ["early_stopping_patience"]  # options that need eval_data
SHARES = ("warmup_ratio", "lora_dropout")
AT_MOST = {"workers": MOST_STARTED, "seed": 2**32 - 1}
PATHS = ("model", "output", "images", "questions", "chat_template")


def _option(default, text: str, choices: tuple[str, ...] | None = None):
    return field(default=default, metadata=_described(text, choices))


def _described(text: str, choices: tuple[str, ...] | None = None) -> dict:
    return {"help": text, "choices": choices}


@dataclass
class TrainingOptions:
    """The options of a run. Paths are relative to the working directory.

    Raises:
        ValueError: a value is of the wrong kind, is not among the choices, or does not fit another.
    """

    # --- what is trained ---
    model: str = _option("", "checkpoint to start from: folder or hub id of a SAISA model with its processor")
    output: str = _option("", "folder for checkpoints and, at the end, for the trained model")
    train: str = _option("projectors+language_model", "which parameters", choices=tuple(TRAINED))
    unshare_projectors: bool = _option(
        False, "copy a shared projector into every layer first: from stage one to stage two"
    )
    lora_rank: int = _option(64, "rank of the adapters of lora and qlora")
    lora_alpha: float = _option(128.0, "the adapters' output is multiplied by alpha / rank")
    lora_dropout: float = _option(0.0, "dropout before the adapters")
    dtype: str = _option(
        "float32",
        "of frozen weights and of all computation; trained weights are kept in float32",
        choices=("float32", "bfloat16"),
    )
    attn_implementation: str = _option(
        "", "sdpa, eager, flex_attention, flash_attention_2 (empty: transformers' choice)"
    )

    # --- data ---
    data: list[str] = field(
        default_factory=list,
        metadata=_described("files (.json, .jsonl, .parquet), folders of images with metadata, hub data sets"),
    )
    images: str = _option("", "folder that image paths are relative to (empty: the data file's)")
    split: str = _option("train", "split of a folder or hub data set")
    streaming: bool = _option(False, "read a hub data set during training; needs max_steps")
    captions: bool = _option(False, "train on image, newline and caption: each sample's first image and first answer")
    chat_template: str = _option(
        "", "vicuna, llama_3, chatml, plain, or a .jinja file (empty: the processor's own; with captions, plain)"
    )
    max_length: int = _option(2048, "longer samples are cut at the end, never inside an image; 0: no limit")
    bad_samples: str = _option(
        "fail", "skip: use the next sample instead of one that cannot be used", choices=("fail", "skip")
    )
    group_by_length: bool = _option(True, "batches of samples of similar length, all with images or all without")
    packing: bool = _option(
        False, "put the samples of a device's batch into one row, without padding; they do not see each other"
    )
    workers: int = _option(4, "processes that read and prepare samples, at most 256; 0: the training process itself")

    # --- validation ---
    eval_data: list[str] = field(
        default_factory=list,
        metadata=_described("validation data, in the formats of data: its loss during the training"),
    )
    eval_split: str = _option("validation", "split of a folder or hub data set")
    eval_steps: int = _option(0, "steps between evaluations (0: save_steps)")
    eval_metric: str = _option(
        "", "score greedy answers in place of the last turns as well: exact_match, vqa_accuracy, anls ..."
    )
    eval_questions: int = _option(200, "ask at most this many of eval_data's questions for eval_metric")
    load_best_model_at_end: bool = _option(False, "the result is the best checkpoint, which is kept, not the last one")
    metric_for_best_model: str = _option("", "what is best: loss, or eval_metric's name (empty: eval_metric if given)")
    early_stopping_patience: int = _option(
        0, "end the run after so many evaluations without a better metric_for_best_model (0: never)"
    )

    # --- optimisation ---
    learning_rate: float = _option(2e-5, "largest learning rate")
    projector_learning_rate: float = _option(0.0, "largest learning rate of the projectors (0: the same)")
    lr_scheduler: str = _option("cosine", "any schedule of transformers: cosine, linear, constant_with_warmup ...")
    warmup_ratio: float = _option(0.03, "share of the steps during which the learning rate rises")
    weight_decay: float = _option(0.0, "of AdamW, for matrices")
    max_grad_norm: float = _option(1.0, "gradients are scaled down to this norm")
    epochs: float = _option(1.0, "passes over the data")
    max_steps: int = _option(0, "steps, instead of epochs (0: use epochs)")
    batch_size: int = _option(128, "samples per step, over all devices and accumulated batches")
    per_device_batch_size: int = _option(4, "samples that a device processes at once")
    gradient_checkpointing: bool = _option(False, "recompute hidden states in backward: less memory, more time")
    use_reentrant: bool = _option(False, "use PyTorch's older kind of gradient checkpointing")
    optimizer: str = _option("adamw_torch", "any optimizer of transformers")
    torch_compile: bool = _option(False, "compile the decoder layers: some slow steps, then faster ones")
    compile_backend: str = _option("inductor", "backend of torch_compile")
    seed: int = _option(0, "seed of the order of the samples, and of adapters")

    # --- checkpoints and reports ---
    save_steps: int = _option(500, "steps between checkpoints (0: only at the end)")
    save_total_limit: int = _option(2, "checkpoints to keep (0: all)")
    resume: bool = _option(True, "resume from the newest checkpoint in output, if there is one")
    overwrite: bool = _option(False, "start over, and delete the run that output has")
    logging_steps: int = _option(10, "steps between reports")
    report_to: list[str] = field(
        default_factory=list, metadata=_described("tensorboard, wandb ...: any tracker of transformers")
    )
    peak_tflops: float = _option(
        0.0, "peak TFLOP/s of a device, for flop_utilisation (0: its bfloat16 peak, if the device is known)"
    )
    questions: str = _option("", "data file of held-out conversations to ask at the end: the last turn is the answer")
    questions_limit: int = _option(200, "use at most this many of them")
    device: str = _option("auto", "auto, or cpu", choices=("auto", "cpu"))

    def __post_init__(self):
        kinds = typing.get_type_hints(type(self))
        for option in dataclasses.fields(self):
            value = _checked(option.name, getattr(self, option.name), kinds[option.name])
            choices = option.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{option.name}={shown(value)}: expected one of {', '.join(choices)}.")
            setattr(self, option.name, value)
        for name in ("model", "output", "data"):
            if not getattr(self, name):
                raise ValueError(f"{name} is not given: expected {_help(name)}.")
        for names, fits, wanted in (
            (POSITIVE, lambda value: value > 0, "a positive number"),
            (NOT_NEGATIVE, lambda value: value >= 0, "a number that is not negative"),
            (SHARES, lambda value: 0 <= value < 1, "a share, from 0 to less than 1"),
        ):
            for name in names:
                if not fits(getattr(self, name)):
                    raise ValueError(f"{name}={getattr(self, name)}: expected {wanted}.")
        for name, most in AT_MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name}={getattr(self, name):.10g}: expected at most {most}.")
        for name in PATHS:
            setattr(self, name, os.path.expanduser(getattr(self, name)))
        self.data = [os.path.expanduser(path) for path in self.data]
        self.eval_data = [os.path.expanduser(path) for path in self.eval_data]
        self._check_validation()
        if self.max_steps == 0 and (self.streaming or self.epochs <= 0):
            raise ValueError(
                f"max_steps=0 with streaming={self.streaming} and epochs={self.epochs}: give max_steps, since the length of "
                "a stream is not known, or a positive number of epochs."
            )

    def _check_validation(self) -> None:
        if not self.eval_data:
            for name in OF_VALIDATION:
                if getattr(self, name):
                    raise ValueError(f"{name}={shown(getattr(self, name))} without eval_data: give validation data.")
            return
        self.eval_steps = self.eval_steps or self.save_steps
        if not self.eval_steps:
            raise ValueError(
                "eval_data with eval_steps=0 and save_steps=0: give eval_steps, the steps between evaluations."
            )
        if self.eval_metric:
            try:
                metric = get_metric(self.eval_metric)
            except ValueError as error:
                raise ValueError(f"eval_metric: {error}") from None
            if metric.answer != Metric.answer:
                raise ValueError(f"eval_metric={self.eval_metric!r} scores {metric.answer}: expected one of texts.")
        self.metric_for_best_model = self.metric_for_best_model or self.eval_metric or "loss"
        if self.metric_for_best_model not in ("loss", self.eval_metric):
            known = " or ".join(repr(name) for name in ("loss", self.eval_metric) if name)
            raise ValueError(f"metric_for_best_model={shown(self.metric_for_best_model)}: expected {known}.")
        if self.load_best_model_at_end and (not self.save_steps or self.save_steps % self.eval_steps):
            raise ValueError(
                f"load_best_model_at_end with save_steps={self.save_steps}: expected a multiple of eval_steps="
                f"{self.eval_steps}, so that what is saved has been evaluated."
            )

    @property
    def evaluation_matters(self) -> bool:
        """Whether the result of a run depends on its evaluations."""
        ends = self.load_best_model_at_end or self.early_stopping_patience > 0
        return bool(self.eval_data) and (ends or self.lr_scheduler == "reduce_lr_on_plateau")

    def accumulation(self, world_size: int) -> int:
        """Batches per step on each of `world_size` devices.

        Raises:
            ValueError: batch_size is not a multiple of what the devices process at once.
        """
        at_once = self.per_device_batch_size * world_size
        if self.batch_size % at_once:
            raise ValueError(
                f"batch_size={self.batch_size} is not a multiple of {at_once}, which is per_device_batch_size="
                f"{self.per_device_batch_size} times {world_size} devices."
            )
        return self.batch_size // at_once


def load_options(path: str | Path | None, overrides: dict | None = None) -> TrainingOptions:
    """The options in the YAML file at `path` (None: no file); those in `overrides` replace the file's.

    Raises:
        ValueError: the file is not a YAML mapping, or a key or value is not one of an option.
        OSError: it cannot be read.
    """
    import yaml

    given: dict = {}
    if path is not None:
        try:
            given = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig")) or {}
        except (
            yaml.YAMLError,
            ValueError,
            RecursionError,
            AttributeError,
        ) as error:  # of numbers, dates, other encodings
            raise ValueError(f"{path} is not a YAML file: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"{path}: expected lines `option: value`, got a {type(given).__name__}.")
    given = {**given, **(overrides or {})}
    known = {option.name for option in dataclasses.fields(TrainingOptions)}
    for key in given:
        if key not in known:
            near = _nearest(key if isinstance(key, str) else shown(key), known)
            raise ValueError(f"{path}: {shown(key)} is not an option{near}")
    return TrainingOptions(**given)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives `parser` an option for each field of `TrainingOptions`; the result of parsing has only those that were given."""
    kinds = typing.get_type_hints(TrainingOptions)
    for option in dataclasses.fields(TrainingOptions):
        default = option.default if option.default_factory is dataclasses.MISSING else ""
        text = option.metadata["help"] + ("" if default == "" else f" (default: {default})")
        choices = option.metadata["choices"]
        parser.add_argument(
            "--" + option.name.replace("_", "-"),
            dest=option.name,
            default=argparse.SUPPRESS,
            choices=choices,
            nargs="+" if kinds[option.name] == list[str] else "?" if kinds[option.name] is bool else None,
            const=True if kinds[option.name] is bool else None,
            metavar=None if choices else {int: "N", float: "X", bool: "true|false"}.get(kinds[option.name], "TEXT"),
            help=text.replace("%", "%%"),
        )


def unknown_argument(argument: str) -> str:
    """The error message for `argument`, which is not one of `add_arguments`."""
    names = {"--" + option.name.replace("_", "-") for option in dataclasses.fields(TrainingOptions)}
    return f"{argument!r} is not an option{_nearest(argument.split('=')[0], names)}"


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {near[0]!r}?" if near else ": see saisa train --help."


def _help(name: str) -> str:
    return next(option.metadata["help"] for option in dataclasses.fields(TrainingOptions) if option.name == name)


def _checked(name: str, value, kind):
    """`value` as a `kind`: YAML reads 1e-3 as text, and the command line reads everything as text."""
    if kind is bool:
        words = {"true": True, "yes": True, "false": False, "no": False}
        if isinstance(value, (bool, str)) and str(value).lower() in words:
            return words[str(value).lower()]
    elif kind == list[str]:
        values = [value] if isinstance(value, str) else value
        if isinstance(values, (list, tuple)) and all(isinstance(part, str) for part in values):
            return list(values)
    elif kind is str:
        if isinstance(value, str):
            return value
        if value is None:
            return ""
    elif not isinstance(value, bool) and value is not None:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = None
        if number is not None and math.isfinite(number) and (kind is float or number == int(number)):
            return kind(number)
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(kind, "a list of texts")
    raise ValueError(f"{name}={shown(value)}: expected {wanted}.")
