# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The README.md that a SAISA checkpoint carries, and the arithmetic its tables rest on.

Everything is computed from the configuration: parameters are counted on the meta device, FLOPs follow the formulas of
the paper (arXiv 2502.02458).
"""

import re
from pathlib import Path

import torch

from ..compat_saisa import needed
from ..configuration_saisa import SaisaConfig
from ..costs.images import image_of
from ..costs.products import feed_forward_sizes
from ..language_models_saisa import language_model_family
from ..modeling_saisa import SaisaForConditionalGeneration


TEXT_TOKENS = 64
PARTS = ("vision tower", "projectors", "language model", "head")

CITATION = """\
@article{yuan2025saisa,
  title   = {SAISA: Towards Multimodal Large Language Models with Both Training and Inference Efficiency},
  author  = {Yuan, Qianhao and Liu, Yanjiang and Lu, Yaojie and Lin, Hongyu and He, Ben and Han, Xianpei and Sun, Le},
  journal = {arXiv preprint arXiv:2502.02458},
  year    = {2025}
}"""


def flops(config, text_tokens: int, visual_tokens: int) -> dict[str, float]:
    """FLOPs of one prefill in the language model, by the paper's formulas; a multiply-accumulate counts as 2.

    With h hidden, m intermediate (of the experts that a token passes, where there are some), t text, v visual, c encoder
    width, p projector width, q and k the widths of all query and all key heads (both h in the paper), per decoder layer:

        "saisa": 2t(2q + 2k + 3m)h + 4vhk + 4t(t + v)q + 2v(cp + ph)
        "llava": 2(t + v)(2q + 2k + 3m)h + 4(t + v)^2 q

    Layers outside `config.visual_layers` have v = 0, and a shared projector runs once instead of in every layer. In embedding
    space "saisa" is the model of `config`: LLaVA's terms in layers where visual tokens attend or are fed, SAISA's where not.
    The vision tower, the embedding, the head and LLaVA's own projector are left out, as in the paper.
    """
    text, t, v = config.text_config, text_tokens, visual_tokens
    family = language_model_family(text)
    h, layers = text.hidden_size, text.num_hidden_layers
    m = sum(feed_forward_sizes(family)) / layers
    q, k = (heads * family.head_dim for heads in (text.num_attention_heads, text.num_key_value_heads))
    c, p = config.vision_feature_size, config.projector_hidden_size or h
    weights = (2 * q + 2 * k + 3 * m) * h
    llava = layers * (2 * (t + v) * weights + 4 * (t + v) ** 2 * q)
    if config.in_embedding_space:
        saisa = 2 * v * (c * p + p * h)
        for layer in range(layers):
            rows = t + v * config.visual_tokens_attend(layer)
            fed = t + v * config.visual_tokens_are_fed(layer)
            saisa += 4 * rows * h * q + 4 * (t + v) * h * k + 4 * rows * (t + v) * q + 6 * fed * m * h
        return {"saisa": float(saisa), "llava": float(llava)}
    seeing = layers if config.visual_layers is None else len(config.visual_layers)
    projections = 1 if config.projector_sharing == "shared" else seeing
    saisa = (
        layers * (2 * t * weights + 4 * t * t * q)
        + seeing * (4 * v * h * k + 4 * t * v * q)
        + projections * 2 * v * (c * p + p * h)
    )
    return {"saisa": float(saisa), "llava": float(llava)}


def parameter_counts(config) -> dict[str, int]:
    """Parameters per part: "vision tower", "projectors", "language model", "head" (0 where it is tied), "total".

    Counted on a model without memory, so quantized or sharded weights do not change the numbers.
    """
    plain = config.to_dict()
    for key in ("quantization_config", "attn_implementation", "_attn_implementation"):
        plain.pop(key, None)
    with torch.device("meta"):
        model = SaisaForConditionalGeneration(SaisaConfig.from_dict(plain))
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        if "visual_projector." in name or "visual_resampler." in name:
            part = "projectors"
        elif "vision_tower." in name:
            part = "vision tower"
        else:
            part = "head" if name.startswith("lm_head.") else "language model"
        counts[part] += parameter.numel()
    return counts | {"total": sum(counts.values())}


def model_card(
    model_or_config,
    repo_id: str | None = None,
    base_model: str | list[str] | None = None,
    license: str | None = None,
    tags: list[str] | None = None,
) -> str:
    """The text of README.md for a model or its `SaisaConfig`.

    Args:
        repo_id: "user/name" on the hub, or a folder; None leaves a placeholder in the usage lines.
        base_model: hub id(s) of what the weights were made from, for the card's metadata.
        license: the hub's identifier of the weights' licence ("llama2", "apache-2.0"); None says that it is not stated.
        tags: further tags for the metadata.
    """
    config = getattr(model_or_config, "config", model_or_config)
    card_data = needed("Model cards", "huggingface_hub", "ModelCardData")
    metadata = card_data(
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=list(
            dict.fromkeys(["saisa", "vision-language", "multimodal", config.text_config.model_type, *(tags or [])])
        ),
        license=license,
        base_model=base_model,
    ).to_yaml()
    return "\n".join(
        (
            f"---\n{metadata}\n---\n",
            f"# {repo_id.rstrip('/').split('/')[-1] if repo_id else 'SAISA'}\n",
            _architecture(config),
            usage_section(repo_id or "user/name"),
            _parameter_table(config),
            flop_section(config),
            _licence(license),
            f"## Citation\n\n```bibtex\n{CITATION}\n```\n",
        )
    )


def write_model_card(folder, model_or_config, **kwargs) -> Path:
    """Writes `model_card(model_or_config, **kwargs)` to folder/README.md, unless there is one: a card that somebody
    wrote by hand is kept. Returns the path."""
    path = Path(folder) / "README.md"
    if not path.exists():
        path.write_text(model_card(model_or_config, **kwargs), encoding="utf-8")
    return path


def licence_in_card(path) -> str | None:
    """The `license` in the front matter of the README.md at `path`; None where there is no such file or key."""
    path = Path(path)
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    front_matter = re.match(r"---\r?\n(.*?)\r?\n---", text, re.S)
    found = re.search(r"^license:[ \t]*([\w.+-]+)[ \t\r]*$", front_matter.group(1), re.M) if front_matter else None
    return found.group(1) if found else None


def _architecture(config) -> str:
    text, vision = config.text_config, config.vision_config
    shared, layers = config.projector_sharing == "shared", config.visual_layers
    where = "every layer" if layers is None else f"layers {', '.join(map(str, layers))}"
    how = "one projector that the layers share" if shared else "a projector of the layer's own"
    what = f"""\
A vision-language model of the SAISA architecture: Self-Attention Input Space Alignment, \
[arXiv 2502.02458](https://arxiv.org/abs/2502.02458).

Visual tokens enter {where} of the decoder through {how}, as keys and values of its self-attention. They issue no \
queries, pass no feed-forward network and do not attend to one another."""
    if config.in_embedding_space:
        count = text.num_hidden_layers
        attend, fed = (
            sum(map(does, range(count))) for does in (config.visual_tokens_attend, config.visual_tokens_are_fed)
        )
        what = f"""\
A vision-language model between LLaVA and SAISA ([arXiv 2502.02458](https://arxiv.org/abs/2502.02458)).

Visual tokens enter in front of the first layer, through one projector. They attend to the tokens in front of them in \
{attend} and pass the feed-forward network in {fed} of the {count} decoder layers; in all layers they are keys and values."""
    reduction = config.visual_token_reduction
    fewer = "" if reduction is None else f", of {config.encoder_tokens_per_image} by {reduction}"
    tiles = ""
    if config.image_grid_pinpoints is not None:
        tiles = f" for the whole image, up to {image_of(config).length} with its tiles"
    return f"""\
{what}

| | |
|---|---|
| Language model | {text.model_type}, {text.num_hidden_layers} layers, hidden size {text.hidden_size}, \
vocabulary {text.vocab_size} |
| Vision encoder | {vision.model_type}, hidden state {config.vision_feature_layer}, feature selection \
"{config.vision_feature_select_strategy}" |
| Visual tokens per image | {config.image_seq_length}{tiles}, width {config.vision_feature_size}{fewer} |
| Projectors | {config.projector_sharing}, activation {config.projector_hidden_act} |
"""


def usage_section(repo_id: str) -> str:
    """How to load the model, for the card of `repo_id`."""
    return f"""\
## Usage

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("{repo_id}", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("{repo_id}", trust_remote_code=True)
```

The model's code comes with the checkpoint; transformers 4.57 or later runs it. From here on it is any \
image-text-to-text model:

```python
content = [{{"type": "image", "path": "photo.jpg"}}, {{"type": "text", "text": "What is in this picture?"}}]
inputs = processor.apply_chat_template([{{"role": "user", "content": content}}], add_generation_prompt=True,
                                       tokenize=True, return_dict=True, return_tensors="pt").to(model.device, model.dtype)
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=64), skip_special_tokens=True)[0])
```
"""


def _parameter_table(config) -> str:
    rows = "\n".join(f"| {part} | {count:,} |" for part, count in parameter_counts(config).items())
    return f"## Parameters\n\n| part | parameters |\n|---|---:|\n{rows}\n"


def flop_section(config) -> str:
    """The table of FLOPs, beside a LLaVA's."""
    visual = config.image_seq_length
    cost = flops(config, TEXT_TOKENS, visual)
    saved = 1 - cost["saisa"] / cost["llava"]
    own = "this model" if config.in_embedding_space else "SAISA"
    return f"""\
## Cost of a prompt

FLOPs of the language model for {TEXT_TOKENS} text tokens and one image of {visual} visual tokens, by the formulas of \
the paper, against a LLaVA (visual tokens in the embedding space) with the same language model:

| architecture | TFLOPs |
|---|---:|
| LLaVA | {cost["llava"] / 1e12:#.3g} |
| {own} | {cost["saisa"] / 1e12:#.3g} ({abs(saved):.0%} {"less" if saved >= 0 else "more"}) |
"""


def _licence(license: str | None) -> str:
    weights = f"`{license}`" if license else "not stated here: they inherit the terms of the models they were made from"
    return f"## Licence\n\nWeights: {weights}. The code files in this repository are Apache-2.0.\n"
