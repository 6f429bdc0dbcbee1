# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""transformers' `Trainer`, with what training a SAISA needs in addition."""

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import EvalLoopOutput

from ..head_saisa import IGNORED
from .record import PARTIAL, checkpoints, discard
from .sampler import GroupedSampler, ShuffledSampler
from .stages import is_projector
from .throughput import StepFlops
from .throughput import peak_tflops as known_peak_tflops


class NonFiniteLoss(ValueError):
    """A loss that is infinite or NaN; the message names the samples of the batch."""


class SaisaTrainer(Trainer):
    """A `Trainer` that also

    - computes logits for labelled rows only;
    - stops at the first loss that is not finite, before it reaches the weights, and names the samples;
    - reports tokens (with padding) and images per second, arithmetic (see `throughput.py`) and memory;
    - orders the samples as a function of seed and epoch;
    - evaluates the loss as training counts it: the mean of all labelled tokens, whatever the batches and the number of
      processes (without `compute_metrics`, on data of known length), and leaves random numbers as they were;
    - writes each checkpoint under another name and renames it when it is complete, so that a killed run leaves no incomplete
      one;
    - saves whole models, also where processes share the weights (FSDP, DeepSpeed ZeRO-3).

    Args:
        projector_learning_rate: largest learning rate of the visual projectors; None: as for the others.
        lengths: for `GroupedSampler`; None: no grouping.
        sample_name: name in error messages for a sample's index.
        peak_tflops: peak TFLOP/s of a device; 0: its bfloat16 peak, if the device is known.
        eval_scores: further metrics of an evaluation, by name, without the prefix `eval_`; called with the trainer in every
            process.
        kwargs: of `Trainer`. Batches may have the `sample_index` of `SaisaCollator`.
    """

    def __init__(
        self,
        *args,
        projector_learning_rate: float | None = None,
        lengths: list[tuple[int, bool]] | None = None,
        sample_name: Callable[[int], str] | None = None,
        peak_tflops: float = 0.0,
        eval_scores: "Callable[[SaisaTrainer], dict[str, float]] | None" = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self.projector_learning_rate, self.lengths = projector_learning_rate, lengths
        self.sample_name = sample_name or "sample {}".format
        self.peak_tflops = peak_tflops or known_peak_tflops(self.args.device)
        self.eval_scores = eval_scores
        self._saving = False
        self._flops: StepFlops | None = None
        self._counts: torch.Tensor | None = None
        self._seen, self._since = {"tokens": 0, "pictures": 0}, time.perf_counter()
        self.add_callback(StepsOfArguments)

    # --- steps ---

    def training_step(self, model, inputs, num_items_in_batch=None, **kwargs):
        """As in transformers, on a batch whose loss has to be finite."""
        self._seen["tokens"] += inputs["input_ids"].numel()
        self._seen["pictures"] += len(inputs.get("pixel_values", ()))
        if self._flops is None:
            self._flops = StepFlops(self.accelerator.unwrap_model(model, keep_torch_compile=False))
        counts = self._flops.counts(inputs)
        self._counts = counts if self._counts is None else self._counts.to(counts.device) + counts
        return super().training_step(model, inputs, num_items_in_batch, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None, **kwargs):
        """As in transformers, but in training without logits, and with an error if the loss is not finite."""
        inputs = dict(inputs)
        indices = inputs.pop("sample_index", None)
        inputs["use_cache"] = False
        if return_outputs:
            return super().compute_loss(model, inputs, True, num_items_in_batch=num_items_in_batch, **kwargs)
        inputs["skip_logits"] = True
        loss = super().compute_loss(model, inputs, num_items_in_batch=num_items_in_batch, **kwargs)
        if not torch.isfinite(loss):
            names = [] if indices is None else [self.sample_name(index) for index in indices.tolist()]
            raise NonFiniteLoss(
                f"The loss of step {self.state.global_step + 1} is {loss.item()}. Its samples: "
                f"{'; '.join(names) or 'not known'}. The weights are as they were before this step. A lower learning rate, "
                "a lower max_grad_norm, or training without these samples may help."
            )
        return loss

    def log(self, logs, *args, **kwargs):
        """As in transformers, with what was done per second since the last report: tokens and images of this process, times
        the number of processes; TFLOPs of this process, and their share of its device's peak, if known; and this process's
        largest memory so far in GiB (CUDA memory if there is a GPU)."""
        if "loss" in logs:
            now = time.perf_counter()
            rate = 1 / max(now - self._since, 1e-9)
            each = self.args.world_size * rate
            logs = {**logs, **{f"{what}_per_second": round(count * each, 1) for what, count in self._seen.items()}}
            if self._flops is not None and self._counts is not None:
                tflops = self._flops(self._counts) * rate / 1e12
                logs["tflops_per_second"] = float(f"{tflops:.4g}")
                if self.peak_tflops:
                    logs["flop_utilisation"] = float(f"{tflops / self.peak_tflops:.4g}")
            logs["memory_gib"] = round(_peak_memory() / 2**30, 3)
            self._seen, self._since, self._counts = dict.fromkeys(self._seen, 0), now, None
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        """As in transformers, with separate groups for the projectors if they have their own learning rate."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if made and self.projector_learning_rate is not None:
            model = args[0] if args else kwargs.get("model") or self.model
            projectors = {id(p) for name, p in model.named_parameters() if is_projector(name)}
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in projectors]
                if not own:
                    continue
                group["params"] = [p for p in group["params"] if id(p) not in projectors]
                optimizer.add_param_group({**group, "params": own, "lr": self.projector_learning_rate})
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer

    # --- data ---

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in transformers, but nothing more when all steps are done, or the run is to end: one that is resumed from its
        last checkpoint would do one step too many."""
        if 0 < self.state.max_steps <= self.state.global_step or self.control.should_training_stop:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or not hasattr(dataset, "__len__"):
            return None
        arguments = {"seed": self.args.seed, "epoch": lambda: int((self.state.epoch or 0) + 1e-6)}
        if self.lengths is None:
            return ShuffledSampler(len(dataset), **arguments)
        step = self._train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return GroupedSampler(self.lengths, step, **arguments)

    # --- evaluation ---

    def evaluate(self, *args, **kwargs):
        """As in transformers, but it leaves random numbers as they were, and its time is not that of training."""
        start = time.perf_counter()
        with _random_numbers_kept():
            metrics = super().evaluate(*args, **kwargs)
        self._since += time.perf_counter() - start
        return metrics

    def get_eval_dataloader(self, eval_dataset=None):
        """This process's batches: every n-th of all, and as many as the others have. What makes up the number is the first
        batch, which does not count again."""
        chosen = self.eval_dataset if eval_dataset is None else eval_dataset
        chosen = self.eval_dataset[chosen] if isinstance(chosen, str) else chosen
        if self.compute_metrics is not None or not (hasattr(chosen, "__len__") and hasattr(chosen, "__getitem__")):
            return super().get_eval_dataloader(eval_dataset)
        size, every = self.args.eval_batch_size, self.args.world_size
        batches = [list(range(i, min(i + size, len(chosen)))) for i in range(0, len(chosen), size)]
        own = batches[self.args.process_index :: every]
        loader = DataLoader(
            chosen,
            batch_sampler=own + batches[:1] * (-(-len(batches) // every) - len(own)),
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and self.args.device.type != "cpu",
            generator=torch.Generator(),  # else the workers' seed would be one of the training's random numbers
        )
        loader.own_batches = len(own)
        return loader

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        """The mean loss of all labelled tokens, over all processes, and `eval_scores`."""
        if not hasattr(dataloader, "own_batches"):
            return super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        self.model.eval()
        total = torch.zeros(2, dtype=torch.float64)  # of losses, and how many they are
        for number, batch in enumerate(dataloader):
            batch = self._prepare_inputs({name: value for name, value in batch.items() if name != "sample_index"})
            with torch.no_grad(), self.compute_loss_context_manager():
                loss = self.model(**{**batch, "use_cache": False}, skip_logits=True, num_items_in_batch=1).loss
            if number < dataloader.own_batches:
                total += torch.tensor([loss.item(), (batch["labels"] != IGNORED).sum().item()], dtype=torch.float64)
        if self.args.world_size > 1:
            total = total.to(self.args.device)
            torch.distributed.all_reduce(total)
        found = {"loss": (total[0] / total[1]).item(), **(self.eval_scores(self) if self.eval_scores else {})}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        return EvalLoopOutput(None, None, metrics, len(dataloader.dataset))

    def _determine_best_metric(self, metrics, trial):
        """As in transformers, but the best to be loaded in the end is one of those that are saved."""
        step = self.state.global_step
        saved = step % self.state.save_steps == 0 or step >= self.state.max_steps
        return (saved or not self.args.load_best_model_at_end) and super()._determine_best_metric(metrics, trial)

    # --- several processes ---

    def create_accelerator_and_postprocess(self):
        """As in transformers. FSDP2 in bfloat16 also sums gradients in float32, and leaves the loss in float32."""
        super().create_accelerator_and_postprocess()
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and getattr(plugin, "fsdp_version", 1) == 2 and plugin.mixed_precision_policy is not None:
            exact = {"reduce_dtype": torch.float32, "output_dtype": None}
            plugin.mixed_precision_policy = dataclasses.replace(plugin.mixed_precision_policy, **exact)

    @property
    def weights_are_shared(self) -> bool:
        """Whether no process has all weights (FSDP, DeepSpeed ZeRO-3)."""
        deepspeed = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return self.is_fsdp_enabled or (deepspeed is not None and deepspeed.zero_stage == 3)

    # --- checkpoints ---

    def save_model(self, output_dir=None, _internal_call=False):
        """As in transformers, which under FSDP saves no model if the training state is kept in shards."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is None or "FULL_STATE_DICT" in str(plugin.state_dict_type):
            return super().save_model(output_dir, _internal_call)
        state_dict = self.accelerator.get_state_dict(
            self.model
        )  # complete in the main process only, but all have to call it
        if self.args.should_save:
            self._save(output_dir, state_dict=state_dict)

    def _get_output_dir(self, trial):
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL) if self._saving else folder

    def _save_checkpoint(self, model, trial):
        folder = Path(super()._get_output_dir(trial))
        partial, name = folder / PARTIAL, f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._saving = False
        if self.state.best_model_checkpoint == str(partial / name):
            self.state.best_model_checkpoint = str(folder / name)
            if self.args.should_save:
                self.state.save_to_json(str(partial / name / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            shutil.rmtree(folder / name, ignore_errors=True)
            os.replace(partial / name, folder / name)
            shutil.rmtree(partial)
            for old in self._superfluous(checkpoints(folder)):
                discard(old)
        self.accelerator.wait_for_everyone()

    def _superfluous(self, found: list[Path]) -> list[Path]:
        """Those beyond `save_total_limit`, oldest first. As in transformers, the newest stays, and the best if it is to be
        loaded in the end."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        best = Path(best).name if best and self.args.load_best_model_at_end else None
        return [path for path in found[:-1] if path.name != best][: max(len(found) - limit, 0) if limit else 0]


@contextlib.contextmanager
def _random_numbers_kept() -> Iterator[None]:
    """Whatever random numbers the block draws, those after it are the same."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _peak_memory() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class StepsOfArguments(TrainerCallback):
    """A run that is resumed reports, evaluates and saves as its arguments say, not as those of its checkpoint did."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Takes the steps from `args`."""
        state.compute_steps(args, state.max_steps)


class StopOnSignal(TrainerCallback):
    """SIGTERM to any of the processes ends the run after the current step, with a checkpoint. `stopped` says whether it
    did."""

    def __init__(self):
        self.stopped = False

    def __enter__(self):
        def stop(*_):
            self.stopped = True

        self._handles = threading.current_thread() is threading.main_thread()  # only there it is allowed
        if self._handles:
            self._before = signal.signal(signal.SIGTERM, stop)
        return self

    def __exit__(self, *_):
        if self._handles:
            signal.signal(signal.SIGTERM, self._before)

    def on_step_end(self, args, state, control, **kwargs):
        """Asks for a checkpoint and for the end, if there was a signal."""
        if args.world_size > 1:  # all have to stop at the same step, or they wait for each other
            anywhere = torch.tensor(float(self.stopped), device=args.device)
            torch.distributed.all_reduce(anywhere)
            self.stopped = bool(anywhere > 0)
        if self.stopped:
            control.should_save = control.should_training_stop = True
        return control
