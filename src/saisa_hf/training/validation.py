# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Validation during training: the data, the answers that a metric scores, and when it ends a run."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from accelerate.utils import gather_object
from torch.utils.data import Subset
from transformers import TrainerCallback

from ..answering import Answerer, Question
from ..processing_saisa import SaisaProcessor
from ..scoring import get_metric
from .dataset import ConversationDataset, record_at
from .encoding import template_source
from .options import TrainingOptions
from .samples import BadSample, open_images, read_sample, words
from .sources import open_source


if TYPE_CHECKING:
    from .trainer import SaisaTrainer


def validation_samples(
    options: TrainingOptions, processor: SaisaProcessor, encode: Callable[[dict], dict]
) -> ConversationDataset:
    """The samples of `options.eval_data`, encoded as those of the training are.

    Raises:
        ValueError: a source is empty, or is not of a known format.
        OSError: it cannot be read.
    """
    sources = [open_source(path, images=options.images, split=options.eval_split) for path in options.eval_data]
    how = {"image_token": processor.image_token, "captions": options.captions, "bad_samples": options.bad_samples}
    return ConversationDataset(sources, encode, **how)


class Validation:
    """The validation data of a run. All of it is read once, so that errors are found before the training.

    Args:
        options: with `eval_data`.
        processor: the model's.
        encode: the `ConversationEncoder` of the training data.

    Attributes:
        dataset: encoded samples, by length.
        questions: what is asked if there is an `eval_metric`: the turns before the last, of the first `eval_questions`
            samples.
        asked: for each question the fields that the metric needs: those of the record, and the last turn as `answers`,
            `answer` and `label` where the record has none.

    Raises:
        BadSample: a sample cannot be used, and bad samples are not skipped; or none can be used.
        ValueError: a source is empty, or a question has not what the metric needs.
    """

    def __init__(self, options: TrainingOptions, processor: SaisaProcessor, encode: Callable[[dict], dict]):
        self.options, self.processor = options, processor
        dataset = validation_samples(options, processor, encode)
        good = [index for index, _ in self._usable(range(len(dataset)), dataset.sample)]
        lengths = dataset.lengths(processor.image_seq_length or 0)
        self.dataset = Subset(dataset, sorted(good, key=lengths.__getitem__))
        self.questions: list[Question] = []
        self.asked: list[dict[str, Any]] = []
        if options.eval_metric:
            self.metric = get_metric(options.eval_metric)
            places = [(source, index) for source in dataset.sources for index in range(len(source.records))]
            usable = itertools.islice(self._usable(places, self._question), options.eval_questions)
            for (source, index), (question, fields) in usable:
                self.metric.check(fields, f"{source.name}, sample {index}")
                self.questions.append(question)
                self.asked.append(fields)
            self._score([""] * len(self.asked))  # what belongs together has to be there

    def _usable(self, places: Iterable, read: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
        """Those of `places` that can be read, with what `read` makes of them."""
        found = False
        for place in places:
            try:
                value = read(place)
            except BadSample:
                if self.options.bad_samples == "fail":
                    raise
                continue
            found = True
            yield place, value
        if not found:
            raise BadSample(f"eval_data ({', '.join(self.options.eval_data)}) has no sample that can be used.")

    def _question(self, place: tuple[Any, int]) -> tuple[Question, dict[str, Any]]:
        """A question, whose images are not read yet, and the fields that the metric reads."""
        source, index = place
        name, record = f"{source.name}, sample {index}", record_at(source, index)
        how = {"image_token": self.processor.image_token, "captions": self.options.captions}
        sample = read_sample(record, name, folder=source.folder, **how)
        open_images(sample)
        messages = sample["messages"]
        if [message["role"] for message in messages[-2:]] != ["user", "assistant"]:
            raise BadSample(f"{name}: expected a question and its answer as the last two turns, for eval_metric.")
        wanted = words(messages[-1]["content"]).strip()
        own = {key: record[key] for key in (*self.metric.needs, *self.metric.uses) if record.get(key) is not None}
        fields = {"answers": [wanted], "answer": wanted, "label": wanted, **own}
        return Question(messages[:-1], sample["images"]), fields

    def _score(self, answers: list[str]) -> float:
        results = [self.metric.question(fields, answer) for fields, answer in zip(self.asked, answers)]
        return float(self.metric.summary(self.asked, results)["score"])

    def scores(self, trainer: "SaisaTrainer") -> dict[str, float]:
        """The metric of the model's greedy answers, by its name; empty without a metric. All processes call it, and get the
        same: they share the questions, or all ask all if they share the weights, for which they have to keep in step."""
        if not self.questions:
            return {}
        arguments, shared = trainer.args, trainer.weights_are_shared
        every, own = (1, 0) if shared else (arguments.world_size, arguments.process_index)
        model = trainer.accelerator.unwrap_model(trainer.model)
        model = model.get_base_model() if hasattr(model, "get_base_model") else model  # of PEFT, with its adapters
        engine = Answerer(
            model,
            self.processor,
            batch_size=arguments.per_device_eval_batch_size,
            visual_states=not shared,  # they are made outside of `forward`, in which the weights are gathered
            chat_template=template_source(self.options.chat_template, self.processor, self.options.captions),
            strict=True,
        )
        with trainer.compute_loss_context_manager():
            answers = [answer.text for answer in engine.answer(self.questions[own::every])]
        if every > 1:
            parts = gather_object([answers])
            answers = [parts[index % every][index // every] for index in range(len(self.questions))]
        return {self.options.eval_metric: self._score(answers)}


class WhenEvaluated(TrainerCallback):
    """Evaluates after the last step as well, as the newest transformers does, and ends a run early.

    transformers' own `EarlyStoppingCallback` counts, and a run that is resumed would count anew. This one looks at the
    evaluations that the run has reported.

    Args:
        metric: the name of what is compared.
        greater_is_better: or smaller.
        patience: the run ends after so many evaluations without a better value; 0: never.
    """

    def __init__(self, metric: str, greater_is_better: bool, patience: int):
        self.name, self.sign, self.patience = f"eval_{metric}", 1 if greater_is_better else -1, patience

    def on_train_begin(self, args, state, control, **kwargs):
        """Ends a run that is resumed where it was about to end."""
        self._end_if_patience_is_over(state, control)

    def on_step_end(self, args, state, control, **kwargs):
        """Evaluates after the last step."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args, state, control, **kwargs):
        """Ends a run that has not become better."""
        self._end_if_patience_is_over(state, control)

    def _end_if_patience_is_over(self, state, control):
        values = [self.sign * entry[self.name] for entry in state.log_history if self.name in entry]
        if self.patience and values and len(values) - 1 - values.index(max(values)) >= self.patience:
            control.should_training_stop = True
