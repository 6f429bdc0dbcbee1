# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What a prompt or a training step costs, from the configuration alone, in floating-point operations: of a SAISA, of a LLaVA
and of a Flamingo with the same language model and encoder. `account` puts parameters, cache and activations beside it.

Matrix products are counted, a multiply-add as two, as PyTorch's `FlopCounterMode` counts them: all query-key pairs, masked or
not, and no norms, activations, rotations and lookups. For a language model without grouped queries these are the formulas of
the paper (arXiv 2502.02458, section 3.3), which leaves out the encoder, the head and LLaVA's projector.
"""

import operator
from dataclasses import replace
from functools import reduce

from ..common.tables import table
from ..configuration_saisa import SaisaConfig
from ..language_models_saisa import language_model_family
from .configs import read_config
from .encoder import encoder_flops
from .products import ARCHITECTURES, PARTS, Step, experts, has_visual_outputs, products
from .sizes import activation_bytes, cache_bytes, parameters


__all__ = [
    "ARCHITECTURES",
    "PARTS",
    "Step",
    "account",
    "activation_bytes",
    "cache_bytes",
    "encoder_flops",
    "family_table",
    "parameters",
    "read_config",
    "show",
    "step_flops",
    "training_flops",
]

NOTES = """\
A multiply-add is two FLOPs; all pairs of queries and keys count, masked or not; the head is applied to the last position.
(1) as the paper counts: SAISA's projectors are in, the encoder, the head and LLaVA's own projector are not
(2) the Flamingo computes keys and values of the image again for each token, as transformers' Idefics does
(3) forward and backward, without the encoder; logits at all positions that have an output\
"""


def step_flops(config: SaisaConfig, architecture: str, step: Step, cross_every: int = 4) -> dict[str, int]:
    """FLOPs of one forward pass by part. Of the encoder only a resampler behind it is counted.

    Args:
        config: of the SAISA, from which the other architectures take their sizes. With `fold_projectors` it is folded.
        architecture: one of `ARCHITECTURES`; `"language_model"` reads the text alone.
        step: the tokens of the pass.
        cross_every: the Flamingo has gated cross-attention before every so many layers.

    Raises:
        ValueError: there is no such architecture.
    """
    counts = dict.fromkeys(PARTS, 0)
    for product in products(config, architecture, step, cross_every, config.fold_projectors):
        counts[product.part] += product.flops
    return counts


def training_flops(
    config: SaisaConfig, architecture: str, step: Step, trained: str = "full", rank: int = 64, cross_every: int = 4
) -> int:
    """FLOPs of a training step: forward and backward pass, without gradient checkpointing. Of the encoder only a resampler
    behind it is counted.

    A product with a weight costs as much again for the gradient of its input, if something below is trained, and for that
    of the weight, if the weight is trained. SAISA's loss computes its logits again in the backward pass.

    Args:
        config, architecture, step, cross_every: as for `step_flops`; `step.logits` are the rows of a sample that get logits.
        trained: `"full"` (all but the encoder), `"projectors"` (and the resampler), or `"lora"`: adapters on every linear map
            of decoder, projectors and resampler.
        rank: of the adapters.

    Raises:
        ValueError: `trained` is none of these, or asks for something that a Flamingo or a language model does not have.
    """
    if trained not in ("full", "projectors", "lora") or (trained != "full" and architecture not in ("saisa", "llava")):
        raise ValueError(f"trained={trained!r}: expected 'full', or for SAISA and LLaVA 'projectors' or 'lora'.")
    full, adapted = trained == "full", trained == "lora"
    resampled = config.visual_token_reduction == "resampler"
    family = language_model_family(config.text_config)
    first = next(layer for layer in range(config.text_config.num_hidden_layers) if config.sees_image(layer))
    total = 0
    for product in products(config, architecture, step, cross_every):
        layer = product.layer
        # whether what enters the layer, its queries and its keys depend on anything that is trained
        entering = full or architecture == "llava" or layer is None or layer > (0 if adapted else first)
        entering = entering or (architecture == "saisa" and layer is not None and config.visual_tokens_attend(layer))
        queries = entering or adapted
        keys = queries or layer == first
        if product.sizes is None:
            total += product.flops + product.flops // 2 * (queries + 3 * keys)
            continue
        depends = {"features": resampled, "visual": True, "text": entering, "attended": keys, "normed": not adapted}
        needs_input = depends[product.of]
        has_weight = full or (trained == "projectors" and product.part in ("projectors", "encoder"))
        again = architecture == "saisa" and product.part == "head"
        total += product.flops * (1 + needs_input + has_weight + again)
        routed = product.part == "feed-forward" and layer is not None and experts(family, layer) > 0
        if adapted and product.part != "head" and not routed:
            rows, inputs, outputs = product.sizes
            total += 2 * rows * rank * (inputs * (2 + needs_input) + outputs * 3) * (outputs > 0)
    return total


def account(
    config: SaisaConfig,
    step: Step,
    itemsize: int = 2,
    generated: int = 0,
    cross_every: int = 4,
    trained: str = "full",
    pictures: int | None = None,
) -> dict:
    """All that `saisa flops` prints, by architecture.

    Args:
        config: of the SAISA.
        step: the prompt.
        itemsize: bytes of a number.
        generated: tokens to generate. The prompt's pass yields the first; each of the others takes a pass of its own.
        cross_every: see `step_flops`.
        trained: what a training step trains, see `training_flops`.
        pictures: that the encoder reads for a sample, tiles too; None: as many whole images as the visual tokens fill.

    Returns:
        For `"saisa"`, `"llava"` and `"flamingo"`: `prompt` (FLOPs by part), `language_model` (FLOPs as the paper counts
        them), `next_token`, `generated` (of all passes after the prompt) and `training` (FLOPs), `parameters` (by part),
        `cache_bytes` (after the last pass) and `activation_bytes`.
    """
    images = step.batch * (-(-step.visual // config.image_seq_length) if pictures is None else pictures)
    found = {}
    for name in ARCHITECTURES[:3]:
        prompt = step_flops(config, name, step, cross_every)
        counted = {part: flops for part, flops in prompt.items() if part not in ("encoder", "head")}
        if name == "llava":
            counted.pop("projectors")
        last, decoded = step, []
        for _ in range(generated - 1):  # the first token comes out of the prompt's pass
            last = last.next_token()
            decoded.append(sum(step_flops(config, name, last, cross_every).values()))
        rows = step.text + step.visual * has_visual_outputs(config, name)
        training = None
        if trained == "full" or name != "flamingo":
            learned = replace(step, logits=rows)
            training = training_flops(config, name, learned, trained, cross_every=cross_every)
        found[name] = {
            "prompt": prompt | {"encoder": prompt["encoder"] + images * encoder_flops(config)},
            "language_model": sum(counted.values()),
            "next_token": sum(step_flops(config, name, step.next_token(), cross_every).values()),
            "generated": sum(decoded),
            "training": training,
            "parameters": parameters(config, name, cross_every),
            "cache_bytes": cache_bytes(config, name, last, itemsize),
            "activation_bytes": activation_bytes(config, name, step, itemsize),
        }
    return found


def family_table(rows: dict[str, dict]) -> str:
    """One line for each model of `rows`, what `account` says of each."""
    heads = ["", "language model, TFLOPs (1)", "next token, GFLOPs", "cache, MiB", "million parameters in projectors"]
    lines = [
        [
            name,
            f"{row['language_model'] / 1e12:.2f}",
            f"{row['next_token'] / 1e9:.2f}",
            f"{row['cache_bytes'] / 2**20:,.1f}",
            f"{row['parameters']['projectors'] / 1e6:,.1f}",
        ]
        for name, row in rows.items()
    ]
    return f"{table(heads, lines)}\n\n{NOTES}"


def show(found: dict, generated: int = 0, cross_every: int = 4, trained: str = "full", own: str = "SAISA") -> str:
    """`account`'s result as tables. `own` is what the model of the configuration is called."""
    names = {"saisa": own, "llava": "LLaVA", "flamingo": f"Flamingo, every {cross_every} layers"}

    def each(*keys: str) -> list:
        return [reduce(operator.getitem, keys, found[name]) for name in names]

    def row(what: str, values: list, unit: float, form: str = ".2f") -> list[str]:
        return [what, *("" if value is None else f"{value / unit:{form}}" for value in values)]

    sums = [sum(parts.values()) for parts in each("prompt")]
    unit, letter = (1e12, "T") if max(sums) >= 1e11 else (1e9, "G") if max(sums) >= 1e8 else (1e6, "M")
    prompt = [row(part, each("prompt", part), unit) for part in PARTS]
    prompt += [row("all", sums, unit), row("language model (1)", each("language_model"), unit)]
    less = [1 - value / found["llava"]["language_model"] for value in each("language_model")]
    prompt.append(["against LLaVA", *(f"{abs(x):.0%} {'less' if x > 0 else 'more'}" if x else "" for x in less)])
    later = [row("next token (2)", each("next_token"), 1e9)]
    if generated:
        later.append(row(f"generating {generated} tokens, behind the prompt (2)", each("generated"), 1e9))
    later.append(row(f"training step, {trained} (3)", each("training"), 1e9))
    weights = [row(part, each("parameters", part), 1e6, ",.2f") for part in found["saisa"]["parameters"]]
    weights.append(row("all", [sum(parts.values()) for parts in each("parameters")], 1e6, ",.2f"))
    kept = [row("keys and values in the cache", each("cache_bytes"), 2**20, ",.2f")]
    kept.append(row("activations of the prompt, about", each("activation_bytes"), 2**20, ",.2f"))
    heads = (f"{letter}FLOPs of the prompt", "GFLOPs", "million parameters", "MiB")
    tables = [table([head, *names.values()], rows) for head, rows in zip(heads, (prompt, later, weights, kept))]
    return "\n\n".join([*tables, NOTES])
