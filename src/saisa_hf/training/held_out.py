# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Held-out questions: read before a training run, asked after it."""

from collections.abc import Callable, Iterator

from ..answering import Answerer, Question
from ..modeling_saisa import SaisaForConditionalGeneration
from ..processing_saisa import SaisaProcessor
from .dataset import record_at
from .encoding import template_source
from .options import TrainingOptions
from .samples import BadSample, open_images, read_sample, words
from .sources import open_source


def ask(
    model: SaisaForConditionalGeneration,
    processor: SaisaProcessor,
    samples: list[dict],
    chat_template: str | None = None,
    max_new_tokens: int = 64,
) -> list[str]:
    """The model's greedy answers in place of the last turn of each conversation.

    Args:
        samples: of `open_images`.
        chat_template: Jinja source instead of the processor's own.
    """
    # weights may lie on several processes, or change from one time to the next: no visual states of them
    answerer = Answerer(
        model, processor, chat_template=chat_template, max_new_tokens=max_new_tokens, visual_states=False, strict=True
    )
    questions = (Question(sample["messages"][:-1], sample["images"]) for sample in samples)
    return [answer.text for answer in answerer.answer(questions)]


def held_out_samples(options: TrainingOptions, processor: SaisaProcessor) -> Iterator[dict]:
    """The conversations of `options.questions`.

    Raises:
        BadSample: one cannot be used, and bad samples are not skipped; or none can be used.
    """
    source, good = open_source(options.questions, images=options.images), 0
    for index in range(min(options.questions_limit, len(source.records))):
        name = f"{source.name}, sample {index}"
        try:
            how = {"folder": source.folder, "image_token": processor.image_token}
            sample = open_images(read_sample(record_at(source, index), name, **how))
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


def ask_held_out(
    model: SaisaForConditionalGeneration,
    processor: SaisaProcessor,
    options: TrainingOptions,
    log: Callable[[str], None],
) -> None:
    """Asks the held-out questions and logs the first answers and the share of right ones."""
    samples = list(held_out_samples(options, processor))
    template = template_source(options.chat_template, processor)
    answers = ask(model, processor, samples, template)
    right = 0
    for index, (sample, answer) in enumerate(zip(samples, answers)):
        wanted, asked = (words(message["content"]).strip() for message in reversed(sample["messages"][-2:]))
        right += answer.lower() == wanted.lower()
        if index < 8:
            log(f"  {asked.replace(processor.image_token, '').strip()}  {answer}  (wanted: {wanted})")
    log(f"{right} of {len(samples)} held-out questions answered word for word ({right / len(samples):.1%})")
