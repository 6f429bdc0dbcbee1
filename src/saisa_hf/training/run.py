# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa train` and `saisa data check`: from options to a trained model, and to what it would be trained on."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import set_seed

from ..modeling_saisa import SaisaDecoderLayer, SaisaForConditionalGeneration
from ..processing_saisa import SaisaProcessor
from .arguments import training_arguments
from .curve import loss_curve
from .encoding import ConversationEncoder, SaisaCollator, template_source
from .options import TrainingOptions
from .samples import (
    BadSample,
    ConversationDataset,
    StreamedConversations,
    open_pictures,
    open_source,
    read_sample,
    words,
)
from .stages import ADAPTED, add_lora, freeze_all_but, in_4_bits
from .trainer import SaisaTrainer, StopOnSignal, checkpoints


logger = logging.getLogger(__name__)

ASKED_AT_ONCE = 16


def train(options: TrainingOptions, log: Callable[[str], None] = print) -> Path:
    """Trains as `options` say, from the newest checkpoint in `options.output` if there is one, and saves the trained model,
    with processor and code, to that folder. With adapters (`lora`, `qlora`) it is the merged model; the adapters alone go to
    the folder `adapter` in it.

    Returns:
        The folder.

    Raises:
        ValueError: an option, the data or the model is not as expected; a loss is not finite.
        OSError, ImportError: something cannot be read, or is not installed.
        SystemExit: the run was told to stop by SIGTERM (status 143); it can be resumed.
    """
    if torch.cuda.device_count() > 1 and "WORLD_SIZE" not in os.environ and options.device == "auto":
        raise ValueError(
            f"There are {torch.cuda.device_count()} GPUs: use them all by `torchrun --nproc-per-node "
            f"{torch.cuda.device_count()} -m saisa_hf train ...`, or one by CUDA_VISIBLE_DEVICES=0."
        )
    accumulation = options.accumulation(int(os.environ.get("WORLD_SIZE", "1")))
    set_seed(options.seed)
    processor = SaisaProcessor.from_pretrained(options.model)
    dataset, collate = training_data(options, processor)
    if options.questions:
        for _ in _held_out(options, processor):  # what is wrong with them is not to be found after the training
            pass
    if options.chat_template:  # the trained model speaks it
        processor.chat_template = template_source(options.chat_template, processor)
    model = load_model(options)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    # `accelerate launch` sets it by its own config, and 4.57 leaves what an earlier run had: here `dtype` alone decides
    os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16" if options.dtype == "bfloat16" else "no"
    arguments = training_arguments(
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
        save_total_limit=options.save_total_limit or None,
        logging_steps=options.logging_steps,
        logging_nan_inf_filter=False,
        report_to=options.report_to,
        disable_tqdm=not sys.stderr.isatty(),
        remove_unused_columns=False,
        # a batch without pictures has no use for the projectors; the older checkpointing cannot do with such
        ddp_find_unused_parameters=not (options.gradient_checkpointing and options.use_reentrant),
        label_names=["labels"],
        accelerator_config={"dispatch_batches": False},  # a batch has other numbers of pictures than of rows
    )
    lengths = None
    if options.group_by_length and not options.streaming:
        lengths = dataset.lengths(model.config.image_seq_length)
    if options.gradient_checkpointing and options.use_reentrant:
        model.enable_input_require_grads()  # else nothing that goes into a layer has a gradient, and none comes out
    if options.torch_compile:
        compile_layers(model, options.compile_backend)
    newest = checkpoints(options.output)[-1:] if options.resume else []
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
    )
    main = trainer.is_world_process_zero()
    if main:
        size = "a stream of samples" if options.streaming else f"{len(dataset)} samples"
        log(f"training {trained:,} of {whole:,} parameters on {size}")
        if newest:
            log(f"going on from {newest[0]}")
    with StopOnSignal() as stop:
        trainer.add_callback(stop)
        try:
            trainer.train(resume_from_checkpoint=str(newest[0]) if newest else None)
        except BadSample as error:  # a worker's comes with its whole traceback
            raise BadSample(str(error).rsplit("BadSample: ", 1)[-1].strip()) from error
    if main and dataset.skipped:
        log(f"left out {dataset.skipped} bad samples")
    if stop.stopped:
        if main:
            log(f"stopped by SIGTERM after step {trainer.state.global_step}; the same command goes on from there")
        raise SystemExit(143)
    trainer.save_state()
    _save(trainer, options, processor)
    if main:
        loss_curve(trainer.state.log_history, Path(options.output) / "loss.png")
        log(f"wrote {options.output}")
        if options.questions:
            _ask_held_out(_trained_model(trainer, options), processor, options, log)
    return Path(options.output)


def load_model(options: TrainingOptions):
    """The model that `options` start from, with the parameters frozen that they do not train: a
    `SaisaForConditionalGeneration`, or a `peft.PeftModel` of one."""
    dtype = getattr(torch, options.dtype)
    given = {"attn_implementation": options.attn_implementation} if options.attn_implementation else {}
    if options.train == "qlora":
        given["quantization_config"] = in_4_bits(dtype)
    model = SaisaForConditionalGeneration.from_pretrained(options.model, dtype=dtype, **given)
    prepared = prepare_model(model, options)
    for parameter in prepared.parameters():
        if parameter.requires_grad:  # small steps are lost in bfloat16
            parameter.data = parameter.data.float()
    return prepared


def compile_layers(model: torch.nn.Module, backend: str = "inductor") -> None:
    """Lets torch.compile have the decoder layers of `model`, in place, for inputs of any shape. They are alike, so that it
    compiles one; what is outside them looks at where the pictures are, which no graph can hold."""
    for module in model.modules():
        if isinstance(module, SaisaDecoderLayer):
            module.compile(backend=backend, dynamic=True)


def prepare_model(model: SaisaForConditionalGeneration, options: TrainingOptions):
    """`model`, changed in place as `options` say: projectors unshared, parameters frozen, adapters added.

    Raises:
        ValueError: the projectors are to be unshared, but are not shared.
    """
    if options.unshare_projectors:
        model.unshare_projectors()
    if options.train in ADAPTED:
        return add_lora(model, options.lora_rank, options.lora_alpha, options.lora_dropout)
    freeze_all_but(model, options.train)
    return model


def training_data(options: TrainingOptions, processor: SaisaProcessor):
    """The data set that `options` name, and a collator for it."""
    template = template_source(options.chat_template, processor, options.captions)
    encode = ConversationEncoder(processor, options.max_length or None, template)
    how = {"images": options.images, "split": options.split, "streaming": options.streaming}
    sources = [open_source(path, **how) for path in options.data]
    if options.streaming:
        for source in sources:
            source.records = source.records.shuffle(seed=options.seed, buffer_size=1000)
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
    if options.train not in ADAPTED:
        trainer.save_model(options.output)
        return
    adapter = os.path.join(options.output, "adapter")
    trainer.save_model(adapter)
    if not trainer.args.should_save:
        return
    trained = trainer.accelerator.unwrap_model(trainer.model)
    # into the weights as they were before they became 4 bits, or were spread over the processes
    if options.train == "qlora" or trainer.weights_are_shared:
        from peft import PeftModel

        trained = _reloaded(options.model, options, trainer)
        if options.unshare_projectors:
            trained.unshare_projectors()
        trained = PeftModel.from_pretrained(trained, adapter).to(trainer.args.device)
    merged = trained.merge_and_unload()
    merged.save_pretrained(options.output)
    processor.save_pretrained(options.output)


def _reloaded(checkpoint: str, options: TrainingOptions, trainer: SaisaTrainer) -> SaisaForConditionalGeneration:
    """The model in `checkpoint`, in this process alone."""
    if trainer.is_deepspeed_enabled:
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()  # by which ZeRO-3 would spread it over processes that do not take part
    return SaisaForConditionalGeneration.from_pretrained(checkpoint, dtype=getattr(torch, options.dtype))


def _trained_model(trainer: SaisaTrainer, options: TrainingOptions) -> SaisaForConditionalGeneration:
    """The model that was trained and saved, for the main process alone."""
    if options.train in ADAPTED or trainer.weights_are_shared:
        return _reloaded(options.output, options, trainer).to(trainer.args.device)
    return trainer.accelerator.unwrap_model(trainer.model)


@torch.no_grad()
def ask(model, processor, samples: list[dict], chat_template: str | None = None, max_new_tokens: int = 64) -> list[str]:
    """What `model` says, greedily, in place of the last turn of each conversation.

    Args:
        samples: as `open_pictures` makes them.
        chat_template: Jinja source in place of the processor's own.
    """
    model.eval()
    answers = []
    for start in range(0, len(samples), ASKED_AT_ONCE):
        part = samples[start : start + ASKED_AT_ONCE]
        images = [image for sample in part for image in sample["images"]] or None
        batch = processor.apply_chat_template(
            [sample["messages"][:-1] for sample in part],
            chat_template=chat_template,
            images=images,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        ).to(model.device)
        ids = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
        answers += processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def _held_out(options: TrainingOptions, processor) -> Iterator[dict]:
    """The conversations of `options.questions`.

    Raises:
        BadSample: one cannot be used, and bad samples are not to be skipped; or none can.
    """
    source, good = open_source(options.questions, images=options.images), 0
    for index in range(min(options.questions_limit, len(source.records))):
        name = f"{source.name}, sample {index}"
        try:
            how = {"folder": source.folder, "image_token": processor.image_token}
            sample = open_pictures(read_sample(source.records[index], name, **how))
            if [message["role"] for message in sample["messages"][-2:]] != ["user", "assistant"]:
                raise BadSample(f"{name}: expected a question and its answer as the last two turns.")
        except BadSample:
            if options.bad_samples == "fail":
                raise
            continue
        good += 1
        yield sample
    if not good:
        raise BadSample(f"{source.name} has no held-out question that can be asked.")


def _ask_held_out(model, processor, options: TrainingOptions, log) -> None:
    samples = list(_held_out(options, processor))
    template = template_source(options.chat_template, processor)
    answers = ask(model, processor, samples, template)
    right = 0
    for index, (sample, answer) in enumerate(zip(samples, answers)):
        wanted, asked = (words(message["content"]).strip() for message in reversed(sample["messages"][-2:]))
        right += answer.lower() == wanted.lower()
        if index < 8:
            log(f"  {asked.replace(processor.image_token, '').strip()}  {answer}  (wanted: {wanted})")
    log(f"{right} of {len(samples)} held-out questions answered word for word ({right / len(samples):.1%})")


def check(
    options: TrainingOptions, samples: int = 2, limit: int = 0, log: Callable[[str], None] = print
) -> tuple[int, int]:
    """Encodes the data as training would, prints the first `samples` of it token by token, and a summary.

    Args:
        limit: samples to check, of each stream if they are streamed; 0 checks all, or the first 1000 of each stream.

    Returns:
        (samples checked, bad ones among them).
    """
    processor = SaisaProcessor.from_pretrained(options.model)
    dataset, _ = training_data(options, processor)
    bad, lengths, learned, pictures, cut = [], [], 0, 0, 0
    for number, sample in enumerate(_each(dataset, limit)):
        if isinstance(sample, BadSample):
            bad.append(sample)
            if len(bad) <= 20:
                log(f"bad: {sample}")
            continue
        if number < samples:
            for line in describe(sample, processor, dataset.name(sample["sample_index"])):
                log(line)
        lengths.append(len(sample["input_ids"]))
        learned += sum(label != -100 for label in sample["labels"])
        pictures += len(sample.get("pixel_values", ()))
        cut += sample["cut"] > 0
    if lengths:
        log(
            f"{len(lengths)} samples with {pictures} pictures: {min(lengths)} to {max(lengths)} tokens, "
            f"{sum(lengths) / len(lengths):.1f} on average, {learned} tokens learned, {cut} samples cut"
        )
    log(f"{len(bad)} bad samples")
    return len(lengths) + len(bad), len(bad)


def _each(dataset, limit: int):
    """The samples of `dataset`, and in the place of a bad one its `BadSample`."""
    if isinstance(dataset, StreamedConversations):
        for source in dataset.sources:
            for index, record in zip(range(limit or 1000), source.records):
                try:
                    yield {**dataset.encoded(source, index, lambda record=record: record), "sample_index": index}
                except BadSample as error:
                    yield error
        return
    for index in range(min(limit or len(dataset), len(dataset))):
        try:
            yield dataset.sample(index)
        except BadSample as error:
            yield error


def describe(sample: dict, processor, name: str = "sample") -> list[str]:
    """Lines that show an encoded sample token by token: its place, its id, whether it is learned, its text."""
    ids, labels = sample["input_ids"], sample["labels"]
    learned = sum(label != -100 for label in labels)
    lines = [f"{name}: {len(ids)} tokens, {len(sample.get('pixel_values', ()))} pictures, {learned} tokens learned"]
    start = 0
    while start < len(ids):
        end = start + 1
        while ids[start] == processor.image_token_id and end < len(ids) and ids[end] == ids[start]:
            end += 1
        token = processor.tokenizer.convert_ids_to_tokens(ids[start])
        many = f" x {end - start}" if end - start > 1 else ""
        mark = "learn" if labels[start] != -100 else "     "
        lines.append(f"{start:>6}  {ids[start]:>7}  {mark}  {token!r}{many}")
        start = end
    return lines
