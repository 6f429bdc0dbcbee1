# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa train`: from options to a trained model."""

import contextlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import set_seed
from transformers.trainer import TRAINER_STATE_NAME

from ..modeling_saisa import SaisaDecoderLayer, SaisaForConditionalGeneration
from ..processing_saisa import SaisaProcessor
from .arguments import arguments_for
from .curve import loss_curve
from .dataset import ConversationDataset, StreamedConversations
from .encoding import ConversationEncoder, SaisaCollator, template_source
from .held_out import ask_held_out, held_out_samples
from .inputs import finished_already
from .options import ADAPTED, TrainingOptions
from .record import PARTIAL, RECORD, begin, checkpoints, finish, has_record, held, put_in_place
from .samples import BadSample
from .sources import Source, open_source
from .stages import add_lora, freeze_all_but, in_4_bits
from .trainer import SaisaTrainer, StopOnSignal
from .validation import Validation, WhenEvaluated


def train(options: TrainingOptions, log: Callable[[str], None] = print) -> Path:
    """Trains as `options` say, from the newest checkpoint in `options.output` if there is one, and saves the trained model,
    with processor and code, to that folder. With adapters (`lora`, `qlora`) it saves the merged model, and the adapters alone
    to the folder `adapter` in it. A run that is finished already is left as it is.

    Returns:
        The folder.

    Raises:
        ValueError: an option, the data or the model is not as expected; the folder has another run; a loss is not finite.
        OSError, ImportError: something cannot be read, or is not installed.
        SystemExit: the run was stopped by SIGTERM (status 143); it can be resumed.
    """
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ and options.device == "auto":
        raise ValueError(
            f"There are {torch.cuda.device_count()} GPUs: use them all with `torchrun --nproc-per-node "
            f"{torch.cuda.device_count()} -m saisa_hf train ...`, or one with CUDA_VISIBLE_DEVICES=0."
        )
    accumulation = options.accumulation(int(os.environ.get("WORLD_SIZE", "1")))
    if (told := finished_already(options)) is not None:
        if os.environ.get("RANK", "0") == "0":
            log(told)
        return Path(options.output)
    set_seed(options.seed)
    sources = open_sources(options)
    processor = SaisaProcessor.from_pretrained(options.model)
    dataset, collate = training_data(options, processor, sources)
    if options.questions:
        for _ in held_out_samples(options, processor):  # errors in them are to be found before the training
            pass
    validation = Validation(options, processor, dataset.encode) if options.eval_data else None
    if options.chat_template:  # the trained model's own from now on
        processor.chat_template = template_source(options.chat_template, processor)
    model = load_model(options)
    trainer = _trainer(model, processor, dataset, collate, accumulation, options, validation)
    main = trainer.is_world_process_zero()
    trainer.accelerator.wait_for_everyone()  # all have looked at the output as it was
    with held(options.output) if main else contextlib.nullcontext():
        _train_and_save(trainer, options, processor, log)
    if main and options.questions:
        ask_held_out(_trained_model(trainer, options), processor, options, log)
    return Path(options.output)


def _train_and_save(
    trainer: SaisaTrainer, options: TrainingOptions, processor: SaisaProcessor, log: Callable[[str], None]
) -> None:
    """The run itself, from what the output has to what it shall have.

    Raises:
        SystemExit: see `train`.
    """
    main, dataset = trainer.is_world_process_zero(), trainer.train_dataset
    unknown = not has_record(options.output)
    if main:
        begin(options)
    trainer.accelerator.wait_for_everyone()
    newest = checkpoints(options.output)[-1:]
    if main:
        _announce(trainer, newest, unknown, log)
    stopped = _run(trainer, newest)
    if main and dataset.skipped:
        log(f"left out {dataset.skipped} bad samples")
    if stopped:
        if main:
            same = "the same command without overwrite" if options.overwrite else "the same command"
            log(f"stopped by SIGTERM after step {trainer.state.global_step}; {same} resumes the run")
        raise SystemExit(143)
    _save(trainer, options, processor)
    if main:
        finish(options, trainer.state.global_step)
        best = trainer.state.best_model_checkpoint if options.load_best_model_at_end else None
        what = (
            f", the model of {Path(best).name} ({options.metric_for_best_model} {trainer.state.best_metric:.6g})"
            if best
            else ""
        )
        log(f"wrote {options.output}{what}")


def _trainer(
    model: torch.nn.Module,
    processor: SaisaProcessor,
    dataset: ConversationDataset | StreamedConversations,
    collate: SaisaCollator,
    accumulation: int,
    options: TrainingOptions,
    validation: Validation | None = None,
) -> SaisaTrainer:
    """The `Trainer` of a run; checkpointing and compiling are prepared in `model`."""
    arguments = arguments_for(options, accumulation)
    lengths = None
    if options.group_by_length and isinstance(dataset, ConversationDataset):
        lengths = dataset.lengths(model.config.image_seq_length)
    if options.gradient_checkpointing and options.use_reentrant:
        model.enable_input_require_grads()  # else no input of a layer has a gradient, and no output gets one
    if options.torch_compile:
        compile_layers(model, options.compile_backend)
    trainer = SaisaTrainer(
        model=model,
        args=arguments,
        data_collator=collate,
        train_dataset=dataset,
        processing_class=processor,
        projector_learning_rate=options.projector_learning_rate or None,
        lengths=lengths,
        sample_name=dataset.name,
        peak_tflops=options.peak_tflops,
        eval_dataset=validation.dataset if validation else None,
        eval_scores=validation.scores if validation else None,
    )
    if validation:
        metric, patience = options.metric_for_best_model, options.early_stopping_patience
        trainer.add_callback(WhenEvaluated(metric, metric != "loss", patience))
    return trainer


def _announce(trainer: SaisaTrainer, newest: list[Path], unknown: bool, log: Callable[[str], None]) -> None:
    model, dataset = trainer.model, trainer.train_dataset
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    size = f"{len(dataset)} samples" if isinstance(dataset, ConversationDataset) else "a stream of samples"
    log(f"training {trained:,} of {whole:,} parameters on {size}")
    if trainer.eval_dataset is not None:
        log(f"evaluating on {len(trainer.eval_dataset)} samples every {trainer.args.eval_steps} steps")
    if newest:
        doubt = f"; nothing tells whether its settings were the same, as it has no {RECORD}" if unknown else ""
        log(f"resuming from {newest[0]}{doubt}")


def _run(trainer: SaisaTrainer, newest: list[Path]) -> bool:
    """Trains, from the checkpoint `newest` if there is one. Returns whether SIGTERM stopped it."""
    with StopOnSignal() as stop:
        trainer.add_callback(stop)
        try:
            trainer.train(resume_from_checkpoint=str(newest[0]) if newest else None)
        except BadSample as error:  # a worker's comes with its whole traceback
            raise BadSample(str(error).rsplit("BadSample: ", 1)[-1].strip()) from error
    return stop.stopped


def load_model(options: TrainingOptions) -> torch.nn.Module:
    """The model that `options` start from, with all parameters frozen that they do not train: a
    `SaisaForConditionalGeneration`, or a `peft.PeftModel` of one."""
    dtype = getattr(torch, options.dtype)
    given = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    if options.train == "qlora":
        given["quantization_config"] = in_4_bits(dtype)
    model = SaisaForConditionalGeneration.from_pretrained(options.model, dtype=dtype, **given)
    prepared = prepare_model(model, options)
    for parameter in prepared.parameters():
        if parameter.requires_grad:  # bfloat16 would lose small steps
            parameter.data = parameter.data.float()
    return prepared


def compile_layers(model: torch.nn.Module, backend: str = "inductor") -> None:
    """Compiles the decoder layers of `model`, in place, for inputs of any shape. They are alike, so that one compilation
    serves all; the code around them depends on where the images are, which no graph can hold."""
    for module in model.modules():
        if isinstance(module, SaisaDecoderLayer):
            module.compile(backend=backend, dynamic=True)


def prepare_model(model: SaisaForConditionalGeneration, options: TrainingOptions) -> torch.nn.Module:
    """`model`, changed in place as `options` say: projectors unshared, parameters frozen, adapters added.

    Raises:
        ValueError: the projectors should be unshared, but are not shared.
    """
    if options.unshare_projectors:
        model.unshare_projectors()
    if options.train in ADAPTED:
        return add_lora(model, options.lora_rank, options.lora_alpha, options.lora_dropout)
    freeze_all_but(model, options.train)
    return model


def open_sources(options: TrainingOptions) -> list[Source]:
    """The data that `options` name, without anything of the model; streams are shuffled."""
    sources = [
        open_source(path, images=options.images, split=options.split, streaming=options.streaming)
        for path in options.data
    ]
    if options.streaming:
        for source in sources:
            source.records = source.records.shuffle(seed=options.seed, buffer_size=1000)
    return sources


def training_data(
    options: TrainingOptions, processor: SaisaProcessor, sources: list[Source] | None = None
) -> tuple[ConversationDataset | StreamedConversations, SaisaCollator]:
    """The data set that `options` name, and a collator for it.

    Args:
        sources: of `open_sources`, if they are open already.
    """
    template = template_source(options.chat_template, processor, options.captions)
    encode = ConversationEncoder(processor, options.max_length or None, template)
    sources = open_sources(options) if sources is None else sources
    dataset_class = StreamedConversations if options.streaming else ConversationDataset
    dataset = dataset_class(
        sources,
        encode,
        image_token=processor.image_token,
        captions=options.captions,
        bad_samples=options.bad_samples,
    )
    return dataset, SaisaCollator(encode, packing=options.packing)


def _save(trainer: SaisaTrainer, options: TrainingOptions, processor: SaisaProcessor) -> None:
    """Puts the result into the output, when it is complete."""
    partial = Path(options.output) / PARTIAL
    staged = partial / "result"
    if trainer.args.should_save:
        shutil.rmtree(partial, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    _save_model(trainer, staged, options, processor)
    trainer.accelerator.wait_for_everyone()
    if trainer.args.should_save:
        trainer.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        loss_curve(trainer.state.log_history, staged / "loss.png")
        put_in_place(staged, Path(options.output))
        shutil.rmtree(partial)
    trainer.accelerator.wait_for_everyone()


def _save_model(trainer: SaisaTrainer, folder: Path, options: TrainingOptions, processor: SaisaProcessor) -> None:
    if options.train not in ADAPTED:
        trainer.save_model(str(folder))
        return
    adapter = str(folder / "adapter")
    trainer.save_model(adapter)
    if not trainer.args.should_save:
        return
    trained = trainer.accelerator.unwrap_model(trainer.model)
    # merged with the weights as they were before they became 4 bits, or were spread over the processes
    if options.train == "qlora" or trainer.weights_are_shared:
        from peft import PeftModel

        trained = _reloaded(options.model, options, trainer)
        if options.unshare_projectors:
            trained.unshare_projectors()
        trained = PeftModel.from_pretrained(trained, adapter).to(trainer.args.device)
    merged = trained.merge_and_unload()
    merged.save_pretrained(str(folder))
    processor.save_pretrained(str(folder))


def _reloaded(checkpoint: str, options: TrainingOptions, trainer: SaisaTrainer) -> SaisaForConditionalGeneration:
    """The model in `checkpoint`, in this process only."""
    if trainer.is_deepspeed_enabled:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # else ZeRO-3 spreads it over processes that do not load it
    return SaisaForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, options.dtype))


def _trained_model(trainer: SaisaTrainer, options: TrainingOptions) -> SaisaForConditionalGeneration:
    """The model that was trained and saved, for the main process only."""
    if options.train in ADAPTED or trainer.weights_are_shared:
        return _reloaded(options.output, options, trainer).to(trainer.args.device)
    return trainer.accelerator.unwrap_model(trainer.model)
