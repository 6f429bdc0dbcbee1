# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa compress`: a SAISA with narrower projectors, fitted to the keys and values that its own make of any images.

Of each projector as many inner units are kept, its second map is solved for in closed form, and both maps then descend on the
error of the layer's keys and values. Everything else is the model's own. How projectors are fitted, measured and kept in a
work folder is the same as for a LLaVA (`from_llava/`).
"""

import contextlib
import copy
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import nn

from ..common.loading import load_model
from ..modeling_saisa import SaisaForConditionalGeneration, SaisaVisualProjector
from ..visual_states_saisa import SaisaVisualStates, VisualStore
from .from_llava import PROMPTS, Fit, LayerFit, Workbench, agreement, answered, report_text
from .from_llava.fitting import kept_layer
from .from_llava.model import with_inner_units
from .from_llava.places import Places
from .from_llava.reporting import keys_values_error, layer_line
from .from_llava.teacher import greedy_answers


REPORT = "compress.json"
LADDER = (1 / 16, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4)  # widths that are tried, in hidden sizes


def compress(
    source: str,
    images: str | os.PathLike | Sequence,
    destination: str | os.PathLike,
    *,
    projector_hidden_size: int | None = None,
    error: float | None = None,
    fit: Fit | None = None,
    prompts: Sequence[str] = PROMPTS,
    prompt_format: str | None = None,
    work_folder: str | os.PathLike | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    push_to_hub: str | None = None,
    private: bool | None = None,
    log: Callable[[str], None] = print,
) -> dict:
    """Fits narrower projectors, writes model, processor and report into the folder `destination`, and returns the report.

    All arguments that are not named below are as for `from_llava`.

    Args:
        source: folder or hub id of a SAISA in input space, not quantized.
        projector_hidden_size: the inner width of the new projectors, below that of the old ones.
        error: in its place, the largest relative squared error of a layer's keys and values on held-out images: the width is
            the smallest in `LADDER` at which no layer has a larger one.
        fit: settings; None: those of `Fit`, in the space of keys and values.

    Returns:
        `projector_hidden_size`; `layers`: errors by layer, `fitted`; `agreement`: with the model of `source`, `fitted` (see
        `agreement`); `pictures`, `visual_tokens`, `settings` and `seconds`.

    Raises:
        ValueError, OSError: something is not as expected, or no width meets `error`; the message says what.
    """
    if (projector_hidden_size is None) == (error is None):
        raise ValueError("Expected one of projector_hidden_size and error.")
    if error is not None and not error > 0:
        raise ValueError(f"error={error}: expected a positive number, 0.02 for 2%.")
    fit = replace(fit or Fit(), space="keys_values")
    places = Places(
        source,
        images,
        destination,
        work_folder=work_folder,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        push_to_hub=push_to_hub,
        private=private,
        log=log,
    )
    start = time.perf_counter()
    model, processor = load_model(source, dtype or "auto", device, None)
    original = Original(model)
    widths = original.widths(projector_hidden_size)
    bench = Workbench(model, processor, places.files, places.work, fit, prompts, prompt_format, log)
    layers = _narrowest(bench, original, widths, error)
    measured = answered(bench, original, bench.held_out, "held-out-answers.json")
    report = {
        "source": str(source),
        "projector_hidden_size": model.config.projector_hidden_size,
        "error": error,
        "pictures": {"fitted": len(bench.fitted), "held_out": len(bench.held_out), "skipped": bench.skipped},
        "visual_tokens": round(len(bench.features) / len(bench.kept), 1),
        "layers": layers,
        "agreement": {"fitted": agreement(bench, original, measured)},
        "prompts": list(prompts),
        "settings": asdict(fit),
        "seconds": round(time.perf_counter() - start, 1),
    }
    places.write(bench, report, REPORT, report_text(report, "original"))
    return report


class Original:
    """The model as it was, as the teacher of the same model with other projectors. Raises ValueError if it has none that can
    be made narrower."""

    def __init__(self, model: SaisaForConditionalGeneration):
        config = model.config
        if config.in_embedding_space:
            raise ValueError(
                "alignment='embedding_space': expected a SAISA in input space. Try `saisa build --from-llava`."
            )
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("the model is quantized: compress it first, and quantize the result.")
        model.unfold_projectors()
        model.requires_grad_(False)
        seeing = [layer for layer in model.language_model.layers if layer.sees_image]
        self.model, self.layers = model, seeing
        self.owners: list[Any] = [model.model] if config.projector_sharing == "shared" else seeing
        self.projectors = [owner.visual_projector for owner in self.owners]
        self.width = config.projector_hidden_size or config.text_config.hidden_size

    def widths(self, asked: int | None) -> list[int]:
        """The one that is asked for, or those of the ladder."""
        if asked is not None and asked >= self.width:
            raise ValueError(f"projector_hidden_size={asked}: expected less than the model's own, {self.width}.")
        size = self.model.config.text_config.hidden_size
        found = [max(8, round(part * size / 8) * 8) for part in LADDER] if asked is None else [asked]
        return sorted({width for width in found if width < self.width})

    def narrow(self, width: int, seed: int) -> None:
        """Gives the model projectors of `width` inner units, some of the old ones'."""
        self.model.config.projector_hidden_size = width
        for owner, old in zip(self.owners, self.projectors):
            projector = SaisaVisualProjector(self.model.config).to(old.linear_2.weight)
            weights = old.state_dict() | with_inner_units(old, width, seed)
            projector.load_state_dict(weights)
            owner.visual_projector = projector.requires_grad_(False)

    @contextlib.contextmanager
    def at_work(self) -> Iterator[None]:
        """The model has its old projectors meanwhile."""
        new = [owner.visual_projector for owner in self.owners]
        for owner, projector in zip(self.owners, self.projectors):
            owner.visual_projector = projector
        try:
            yield
        finally:
            for owner, projector in zip(self.owners, new):
                owner.visual_projector = projector

    def images(self, count: int, features: torch.Tensor) -> SaisaVisualStates:
        """`count` images of one number of visual tokens, from their features (R, C)."""
        fingerprint = self.model.model.visual_fingerprint("features")
        return SaisaVisualStates(VisualStore([len(features) // count] * count, features, None, fingerprint))

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor, features: torch.Tensor, keep: int) -> torch.Tensor:
        """As `Teacher.logits`."""
        states = self.images(len(input_ids), features)
        with self.at_work():
            return self.model(input_ids, visual_states=states, logits_to_keep=keep, use_cache=False).logits

    @torch.no_grad()
    def answers(self, input_ids: torch.Tensor, features: torch.Tensor, tokens: int) -> list[list[int]]:
        """As `Teacher.answers`."""
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        with self.at_work():
            return greedy_answers(self.model, tokens, **inputs, visual_states=self.images(len(input_ids), features))


class OwnFit(LayerFit):
    """Fits a projector to what an old one, `wide`, makes of the same features."""

    def __init__(self, bench: Workbench, index: int, wide: nn.Module):
        super().__init__(bench, index, bench.features)
        self.wide = copy.deepcopy(wide).float()

    def rows(self, images: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.bench.rows(self.bench.features, images).float()
        return features, self.wide(features)


@torch.no_grad()
def _narrowest(bench: Workbench, original: Original, widths: list[int], error: float | None) -> list[dict]:
    """Errors by layer at the first of `widths` at which none is above `error`, which the model has then."""
    worst = {}
    for width in widths:
        layers = _fitted(bench, original, width, error)
        worst[width] = max(keys_values_error(row["fitted"]) for row in layers)
        if error is None or worst[width] <= error:
            return layers
        bench.log(f"projector_hidden_size {width}: an error of {worst[width]:.2%} is above {error:.2%}")
    tried = ", ".join(f"{width}: {found:.2%}" for width, found in worst.items()) or "none is narrower than the model's"
    raise ValueError(f"error={error}: no width meets it ({tried}). Allow more, or give more --steps or --images.")


def _fitted(bench: Workbench, original: Original, width: int, error: float | None) -> list[dict]:
    """Fits a projector of `width` for each that the model has. Errors of all layers, or up to one that is above `error`."""
    original.narrow(width, bench.fit.seed)
    folder = bench.folder / f"width-{width}"
    folder.mkdir(exist_ok=True)
    report, count = [], len(original.layers)
    for layer in original.layers:
        place = min(len(report), len(original.owners) - 1)
        index, projector, wide = (
            layer.self_attn.layer_idx,
            original.owners[place].visual_projector,
            original.projectors[place],
        )
        is_shared = len(report) > place  # it was fitted at an earlier layer

        def fit(index=index, projector=projector, wide=wide, is_shared=is_shared) -> dict[str, dict]:
            return OwnFit(bench, index, wide).fitted(projector, projector, not is_shared)

        report.append(kept_layer(folder, index, projector, fit))
        bench.log(layer_line(report[-1], count))
        if error is not None and keys_values_error(report[-1]["fitted"]) > error:
            break
    return report
