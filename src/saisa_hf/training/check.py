# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa data check`: what a model would be trained on, token by token."""

from collections.abc import Callable, Iterator

from ..processing_saisa import SaisaProcessor
from .dataset import ConversationDataset, StreamedConversations, records_of
from .inputs import check_inputs
from .options import TrainingOptions
from .run import open_sources, training_data
from .samples import BadSample
from .validation import validation_samples


def check(
    options: TrainingOptions, samples: int = 2, limit: int = 0, log: Callable[[str], None] = print
) -> tuple[int, int]:
    """Encodes the data as training would, validation data as well, prints the first `samples` samples token by token, and a
    summary.

    Args:
        limit: samples to check, of each stream if they are streamed; 0: all, or the first 1000 of each stream.

    Returns:
        (samples checked, bad ones among them).
    """
    check_inputs(options)
    sources = open_sources(options)
    processor = SaisaProcessor.from_pretrained(options.model)
    dataset, _ = training_data(options, processor, sources)
    datasets: list[ConversationDataset | StreamedConversations] = [dataset]
    if options.eval_data:
        datasets.append(validation_samples(options, processor, dataset.encode))
    bad: list[BadSample] = []
    lengths: list[int] = []
    learned = images = cut = 0
    found = ((one, sample) for one in datasets for sample in _each(one, limit))
    for number, (one, sample) in enumerate(found):
        if isinstance(sample, BadSample):
            bad.append(sample)
            if len(bad) <= 20:
                log(f"bad: {sample}")
            continue
        if number < samples:
            for line in describe(sample, processor, one.name(sample["sample_index"])):
                log(line)
        lengths.append(len(sample["input_ids"]))
        learned += sum(label != -100 for label in sample["labels"])
        images += len(sample.get("pixel_values", ()))
        cut += sample["cut"] > 0
    if lengths:
        log(
            f"{len(lengths)} samples with {images} images: {min(lengths)} to {max(lengths)} tokens, "
            f"{sum(lengths) / len(lengths):.1f} on average, {learned} tokens learned, {cut} samples cut"
        )
    log(f"{len(bad)} bad samples")
    return len(lengths) + len(bad), len(bad)


def _each(dataset: ConversationDataset | StreamedConversations, limit: int) -> Iterator[dict | BadSample]:
    """The samples of `dataset`; instead of a bad one its `BadSample`."""
    if isinstance(dataset, StreamedConversations):
        for source in dataset.sources:
            for index, record in zip(range(limit or 1000), records_of(source)):
                try:
                    yield {**dataset.encoded(source, index, record), "sample_index": index}
                except BadSample as error:
                    yield error
        return
    for index in range(min(limit or len(dataset), len(dataset))):
        try:
            yield dataset.sample(index)
        except BadSample as error:
            yield error


def describe(sample: dict, processor: SaisaProcessor, name: str = "sample") -> list[str]:
    """Lines that show an encoded sample token by token: position, id, whether it is learned, text."""
    ids, labels = sample["input_ids"], sample["labels"]
    learned = sum(label != -100 for label in labels)
    lines = [f"{name}: {len(ids)} tokens, {len(sample.get('pixel_values', ()))} images, {learned} tokens learned"]
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
