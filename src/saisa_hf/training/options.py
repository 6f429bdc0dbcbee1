# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a training run can be told: the keys of its YAML file, which are also the options of `saisa train`."""

import argparse
import dataclasses
import difflib
import math
import typing
from dataclasses import dataclass, field
from pathlib import Path

from .stages import TRAINED


def _option(default, text: str, choices=None):
    return field(default=default, metadata={"help": text, "choices": choices})


def _told(text: str) -> dict:
    return {"help": text, "choices": None}


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
    lora_alpha: float = _option(128.0, "adapters count alpha / rank times")
    lora_dropout: float = _option(0.0, "dropout in front of the adapters")
    dtype: str = _option(
        "float32",
        "frozen weights are kept in it and everything is computed in it; weights that are trained are kept in float32",
        choices=("float32", "bfloat16"),
    )
    attn_implementation: str = _option(
        "", "sdpa, eager, flex_attention, flash_attention_2 (empty: transformers' choice)"
    )

    # --- data ---
    data: list[str] = field(
        default_factory=list,
        metadata=_told("files (.json, .jsonl, .parquet), folders of pictures with metadata, hub data sets"),
    )
    images: str = _option("", "folder that picture paths are relative to (empty: that of the data file)")
    split: str = _option("train", "split of a folder or hub data set")
    streaming: bool = _option(False, "read a hub data set while training; needs max_steps")
    captions: bool = _option(
        False, "train on picture, newline and caption: each sample's first picture and first answer"
    )
    chat_template: str = _option(
        "", "vicuna, llama_3, chatml, plain, or a .jinja file (empty: the processor's own; with captions, plain)"
    )
    max_length: int = _option(2048, "longer samples are cut at the end, never inside a picture; 0: no limit")
    bad_samples: str = _option(
        "fail", "skip: the next sample takes the place of one that cannot be used", choices=("fail", "skip")
    )
    group_by_length: bool = _option(True, "batches of samples alike in length and in having pictures or none")
    packing: bool = _option(
        False, "put what a device takes at once into one row, without padding; samples do not see each other"
    )
    workers: int = _option(4, "processes that read and prepare samples; 0: the training process itself")

    # --- optimisation ---
    learning_rate: float = _option(2e-5, "largest learning rate")
    projector_learning_rate: float = _option(0.0, "the projectors' own (0: the same)")
    lr_scheduler: str = _option("cosine", "any schedule of transformers: cosine, linear, constant_with_warmup ...")
    warmup_ratio: float = _option(0.03, "share of the steps in which the learning rate rises")
    weight_decay: float = _option(0.0, "of AdamW, for matrices")
    max_grad_norm: float = _option(1.0, "gradients are scaled down to this norm")
    epochs: float = _option(1.0, "passes over the data")
    max_steps: int = _option(0, "steps, in place of epochs (0: by epochs)")
    batch_size: int = _option(128, "samples per step, over all devices and accumulated batches")
    per_device_batch_size: int = _option(4, "samples that a device takes at once")
    gradient_checkpointing: bool = _option(False, "compute hidden states again in backward: less memory, more time")
    use_reentrant: bool = _option(False, "PyTorch's older kind of gradient checkpointing")
    optimizer: str = _option("adamw_torch", "any optimizer of transformers")
    torch_compile: bool = _option(False, "compile the decoder layers: faster steps after some slow ones")
    compile_backend: str = _option("inductor", "of torch_compile")
    seed: int = _option(0, "of the order of the samples, and of adapters")

    # --- keeping and telling ---
    save_steps: int = _option(500, "steps between checkpoints (0: none but the last)")
    save_total_limit: int = _option(2, "checkpoints to keep (0: all)")
    resume: bool = _option(True, "go on from the newest checkpoint in output, if there is one")
    logging_steps: int = _option(10, "steps between reports")
    report_to: list[str] = field(
        default_factory=list, metadata=_told("tensorboard, wandb ...: whatever transformers reports to")
    )
    peak_tflops: float = _option(
        0.0, "TFLOP/s that a device could do, for flop_utilisation (0: bfloat16's, where the device is known)"
    )
    questions: str = _option("", "data file of held-out conversations to ask at the end: the last turn is the answer")
    questions_limit: int = _option(200, "how many of them")
    device: str = _option("auto", "auto, or cpu", choices=("auto", "cpu"))

    def __post_init__(self):
        kinds = typing.get_type_hints(type(self))
        for option in dataclasses.fields(self):
            value = _checked(option.name, getattr(self, option.name), kinds[option.name])
            choices = option.metadata["choices"]
            if choices and value not in choices:
                raise ValueError(f"{option.name}={value!r}: expected one of {', '.join(choices)}.")
            setattr(self, option.name, value)
        for name in ("model", "output", "data"):
            if not getattr(self, name):
                raise ValueError(f"{name} is not given: expected {_help(name)}.")
        for name in ("batch_size", "per_device_batch_size", "lora_rank", "logging_steps", "questions_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number.")
        for name in (
            "max_length",
            "max_steps",
            "workers",
            "save_steps",
            "save_total_limit",
            "projector_learning_rate",
            "peak_tflops",
            "weight_decay",
            "max_grad_norm",
            "seed",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number that is not negative.")
        for name in ("learning_rate", "lora_alpha"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number.")
        for name in ("warmup_ratio", "lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a share, from 0 to less than 1.")
        if self.max_steps == 0 and (self.streaming or self.epochs <= 0):
            raise ValueError(
                f"max_steps=0 with streaming={self.streaming} and epochs={self.epochs}: give max_steps, since a stream "
                "does not tell its length, or a positive number of epochs."
            )

    def accumulation(self, world_size: int) -> int:
        """Batches per step on each of `world_size` devices.

        Raises:
            ValueError: batch_size is no multiple of what the devices take at once.
        """
        at_once = self.per_device_batch_size * world_size
        if self.batch_size % at_once:
            raise ValueError(
                f"batch_size={self.batch_size} is no multiple of {at_once}, which is per_device_batch_size="
                f"{self.per_device_batch_size} times {world_size} devices."
            )
        return self.batch_size // at_once


def load_options(path: str | Path | None, overrides: dict | None = None) -> TrainingOptions:
    """The options of the YAML file at `path` (None: no file), those in `overrides` in place of the file's.

    Raises:
        ValueError: the file is no YAML mapping, or a key or value is not an option's.
        OSError: it cannot be read.
    """
    import yaml

    given = {}
    if path is not None:
        try:
            given = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except yaml.YAMLError as error:
            raise ValueError(f"{path} is no YAML: {error}") from error
        if not isinstance(given, dict):
            raise ValueError(f"{path}: expected lines `option: value`, got a {type(given).__name__}.")
    given = {**given, **(overrides or {})}
    known = {option.name for option in dataclasses.fields(TrainingOptions)}
    for key in given:
        if key not in known:
            raise ValueError(f"{path}: {key!r} is no option{_nearest(str(key), known)}.")
    return TrainingOptions(**given)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Gives `parser` an option for each field of `TrainingOptions`; those not given are absent from what it parses."""
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
    """What to say about `argument`, which is none of `add_arguments`'s."""
    names = {"--" + option.name.replace("_", "-") for option in dataclasses.fields(TrainingOptions)}
    return f"{argument!r} is no option{_nearest(argument.split('=')[0], names)}."


def _nearest(name: str, known) -> str:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f": did you mean {near[0]!r}?" if near else ": see saisa train --help"


def _help(name: str) -> str:
    return next(option.metadata["help"] for option in dataclasses.fields(TrainingOptions) if option.name == name)


def _checked(name: str, value, kind):
    """`value` as a `kind`: YAML reads 1e-3 as text, and the command line all there is."""
    if kind is bool:
        truth = {"true": True, "yes": True, "false": False, "no": False}.get(str(value).lower())
        if truth is not None:
            return truth
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
        except (TypeError, ValueError):
            number = None
        if number is not None and math.isfinite(number) and (kind is float or number == int(number)):
            return kind(number)
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(kind, "a list of texts")
    raise ValueError(f"{name}={value!r}: expected {wanted}.")
