# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`TrainingArguments` of a run, under the names that the installed transformers has for them."""

import os
import sys

from ..compat_saisa import needed
from .options import TrainingOptions


def arguments_for(options: TrainingOptions, accumulation: int):
    """The `TrainingArguments` that `options` mean, with `accumulation` batches per step.

    Sets the precision of this process for `accelerate` as well: `options.dtype` alone decides on it.
    """
    # `accelerate launch` sets it from its own config, and in 4.57 it is what an earlier run had
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if options.dtype == "bfloat16" else "no"
    return training_arguments(
        warmup_ratio=options.warmup_ratio,
        checkpointing={"use_reentrant": options.use_reentrant} if options.gradient_checkpointing else None,
        output_dir=options.output,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        per_device_train_batch_size=options.per_device_batch_size,
        gradient_accumulation_steps=accumulation,
        bf16=options.dtype == "bfloat16",
        optim=options.optimizer,
        use_cpu=options.device == "cpu",
        seed=options.seed,
        dataloader_num_workers=options.workers,
        save_strategy="steps" if options.save_steps else "no",
        save_steps=options.save_steps or 500,
        save_total_limit=_kept(options),
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,
        report_to=options.report_to,
        disable_tqdm=not sys.stderr.isatty(),
        remove_unused_columns=False,
        # a batch without images does not use the projectors; the older checkpointing does not support that
        ddp_find_unused_parameters=not (options.gradient_checkpointing and options.use_reentrant),
        label_names=["labels"],
        accelerator_config={"dispatch_batches": False},  # a batch may have more or fewer images than rows
        **_evaluation(options),
    )


def _kept(options: TrainingOptions) -> int | None:
    """How many checkpoints are kept. The newest is needed to resume, also where the best is another one."""
    return max(options.save_total_limit, 2 * options.evaluation_matters) if options.save_total_limit else None


def _evaluation(options: TrainingOptions) -> dict:
    """The arguments of evaluation, if there is any."""
    if not options.eval_data:
        return {}
    given = {"eval_strategy": "steps", "eval_steps": options.eval_steps}
    given["per_device_eval_batch_size"] = options.per_device_batch_size
    if options.evaluation_matters:
        given["metric_for_best_model"] = options.metric_for_best_model
        given["greater_is_better"] = options.metric_for_best_model != "loss"
        given["load_best_model_at_end"] = options.load_best_model_at_end
    return given


def training_arguments(warmup_ratio: float, checkpointing: dict | None, **arguments):
    """`TrainingArguments` that mean the same on every release.

    5.x has one name for shares and numbers of steps, a new one for checkpointing, and turns the cache off in the config that
    checkpoints are saved with, which is prevented here.

    Args:
        warmup_ratio: share of the steps in which the learning rate rises.
        checkpointing: arguments of gradient checkpointing; None: none.
        arguments: all others, under the names that every release has.
    """
    TrainingArguments = needed("Training", "transformers", "TrainingArguments")
    fields = TrainingArguments.__dataclass_fields__
    if checkpointing is not None:
        name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
        arguments |= {name: True, f"{name}_kwargs": checkpointing}
    share = "warmup_steps" if fields["warmup_steps"].type in (float, "float") else "warmup_ratio"
    arguments[share] = warmup_ratio
    if "use_cache" in fields:
        arguments["use_cache"] = True
    return TrainingArguments(**arguments)
