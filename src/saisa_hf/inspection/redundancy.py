# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa redundancy`: how much each decoder layer of a LLaVA contributes through its visual tokens.

For each layer, visual tokens stop attending, skip the feed-forward network, or both, in that layer alone. What is measured is
how far the distribution of the token after the prompt moves: KL(unchanged || changed), in nats, the mean over images. With
both, this is the layer contribution of visual tokens in ShortV (arXiv 2504.00502), which freezes them in the layers where it
is smallest.
"""

import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import ProcessorMixin

from ..common.plots import drawing
from ..common.tables import table
from ..images_saisa import load_image
from ..processing_saisa import begins_with_bos
from .naavit import NaavitHandle


PROMPT = "Describe this image in detail."
KINDS = ("attention", "feed_forward", "both")
HEADINGS = ("no attention", "no feed-forward", "neither")


@torch.no_grad()
def contributions(model: nn.Module, inputs: dict) -> torch.Tensor:
    """What each layer contributes through its visual tokens, for one batch.

    Args:
        model: what `apply_naavit` takes, in eval mode.
        inputs: a batch as `model` takes it, without padding on the right: the last position is measured.

    Returns:
        (layers, 3) float64, in nats, for each layer and each of `KINDS`: the batch's mean divergence when that layer's visual
        tokens get nothing from attention, from the feed-forward network, or from both.

    Raises:
        ValueError: see `NaavitHandle`.
    """

    def distribution() -> torch.Tensor:
        return model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1].double().log_softmax(-1)

    NaavitHandle(model, [], []).remove()  # so that another kind of model is refused before it runs
    expected = distribution()
    rows = []
    for layer in range(len(getattr(model, "model", model).language_model.layers)):
        row = []
        for kind in KINDS:
            chosen = {part: [layer] if kind in (part, "both") else [] for part in KINDS[:2]}
            with NaavitHandle(model, **chosen):
                found = distribution()
            row.append((expected.exp() * (expected - found)).sum(-1).mean())
        rows.append(torch.stack(row))
    return torch.stack(rows).cpu()


def redundancy(
    model: nn.Module,
    processor: ProcessorMixin,
    pictures: list,
    prompt: str = PROMPT,
    log: Callable[[str], None] = lambda line: None,
) -> dict:
    """Measures `contributions` on images, one at a time.

    Args:
        model, processor: a LLaVA or LLaVA-NeXT of transformers.
        pictures: images, as `load_image` takes them, paths for instance.
        prompt: what is asked about each. The processor's chat template is put around it or, if there is none,
            `USER: <image>\\n... ASSISTANT:`. A prompt that contains the image token is not changed.
        log: called with one line of text per image.

    Returns:
        `layers`: for each `{"layer", "attention", "feed_forward", "both"}`, in nats; `least`: the layers by `both`, the
        smallest first; `pictures`: the number of images; `prompt`: the whole text.

    Raises:
        ValueError: another kind of model; an image that cannot be read; no images.
    """
    if not pictures:
        raise ValueError("pictures is empty: expected at least one.")
    text, total = _whole_prompt(processor, prompt), torch.zeros(())
    options = {"add_special_tokens": False} if begins_with_bos(processor.tokenizer, text) else {}
    for number, image in enumerate(pictures, start=1):
        inputs = processor(images=load_image(image, str(image)), text=text, return_tensors="pt", **options)
        total = total + contributions(model, inputs.to(model.device, model.dtype))
        log(f"{number} of {len(pictures)} images")
    rows = (total / len(pictures)).tolist()
    layers = [{"layer": layer, **dict(zip(KINDS, row))} for layer, row in enumerate(rows)]
    least = [row["layer"] for row in sorted(layers, key=lambda row: row["both"])]
    return {"layers": layers, "least": least, "pictures": len(pictures), "prompt": text}


def _whole_prompt(processor: ProcessorMixin, prompt: str) -> str:
    if processor.image_token in prompt:
        return prompt
    if processor.chat_template is None:
        return f"USER: {processor.image_token}\n{prompt} ASSISTANT:"
    content = [{"type": "image"}, {"type": "text", "text": prompt}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def show(found: dict) -> str:
    """`redundancy`'s result as a table."""
    rows = [[str(row["layer"]), *(f"{row[kind]:.3e}" for kind in KINDS)] for row in found["layers"]]
    return (
        f"divergence of the next token's distribution in nats, mean over {found['pictures']} images, when a layer's visual "
        f"tokens get\n\n{table(['layer', *HEADINGS], rows)}\n\nleast first, by the last column: "
        f"{', '.join(map(str, found['least']))}"
    )


def plot(found: dict, path: str | os.PathLike) -> None:
    """Plots `redundancy`'s result, on a logarithmic scale, into the file `path`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = drawing()
    figure, axes = pyplot.subplots(figsize=(8, 4))
    for kind, heading in zip(KINDS, HEADINGS):
        # a layer that changes nothing, the last one for instance, has no place on the scale
        heights = [row[kind] if row[kind] > 0 else float("nan") for row in found["layers"]]
        axes.plot([row["layer"] for row in found["layers"]], heights, marker="o", label=f"{heading} for visual tokens")
    axes.set(xlabel="decoder layer", ylabel="KL divergence (nats)", yscale="log")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(Path(path), dpi=120)
    pyplot.close(figure)
