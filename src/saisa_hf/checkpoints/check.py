# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa check`: everything in a checkpoint's folder, read and compared. Nothing in it is run, and nothing is changed."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import PIL.Image
import torch
from safetensors import SafetensorError, safe_open
from transformers import GenerationConfig

from ..common.sources import check_local, first_line, read_json, reading
from ..configuration_saisa import SaisaConfig
from ..modeling_saisa import SaisaForConditionalGeneration, SaisaModel
from ..processing_saisa import SaisaProcessor
from ..visual_states_saisa import FORMAT, SaisaVisualStates
from .names import as_saved
from .upgrade import plan_upgrade
from .weight_files import DTYPES, STORED_DTYPES, WeightFiles, check_layers, listed_files, tensors_of


MOST = 20  # findings of one kind that are listed one by one
PROBE = "What is in the image?"
FLOATS = ("F", "BF")


@dataclass
class Finding:
    """One line of the result: `kind` is "ok", "note" (it works, and may not be what was meant) or "problem"."""

    kind: str
    part: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind:<8} {self.part}: {self.text}"


def check(folder: str | os.PathLike, log: Callable[[str], None] = print) -> list[Finding]:
    """Reads a checkpoint and says what is wrong with it: configuration, weights (files, names, shapes, dtypes, and each
    number in them), generation config, processor with chat template, code files, files of visual states.

    Args:
        folder: of the checkpoint; of a repository on the hub, what `hf download` made of it.
        log: called with one line per finding, as they come.

    Returns:
        The findings; the checkpoint is sound if none has the kind "problem".

    Raises:
        FileNotFoundError: there is no such folder.
    """
    path = None if Path(folder).is_file() else check_local("FOLDER", folder)
    if path is None:
        raise FileNotFoundError(f"FOLDER {os.fspath(folder)!r} is not a folder here: `hf download` a repository first.")
    found = []
    for finding in _findings(path):
        found.append(finding)
        log(str(finding))
    return found


def as_json(found: list[Finding]) -> dict:
    """The findings as JSON holds them, and whether the checkpoint is sound."""
    return {"sound": not problems(found), "findings": [asdict(finding) for finding in found]}


def problems(found: list[Finding]) -> int:
    """How many of the findings are problems."""
    return sum(finding.kind == "problem" for finding in found)


def _findings(folder: Path) -> Iterator[Finding]:
    config = None
    try:
        config = _config(folder)
        text, vision = config.text_config, config.vision_config
        yield Finding("ok", "config", f"{text.model_type}, {text.num_hidden_layers} layers; {vision.model_type}")
    except Exception as error:  # of every part: what transformers raises for such files is of any kind
        yield _problem("config", folder / "config.json", error)
    for part, look in (
        ("weights", lambda: _weights(folder, config)),
        ("generation", lambda: _generation(folder, config)),
        ("processor", lambda: _processor(folder, config)),
        ("code", lambda: _code(folder)),
        ("states", lambda: _states(folder, config)),
    ):
        try:
            yield from (Finding(kind, part, said) for kind, said in look())
        except Exception as error:
            yield _problem(part, folder, error)


def _problem(part: str, path: Path, error: Exception) -> Finding:
    said = first_line(error)
    named = path.name in said or str(path) in said
    kind = "" if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: "
    return Finding("problem", part, f"{'' if named else f'{path}: '}{kind}{said}")


def _config(folder: Path) -> SaisaConfig:
    settings = read_json(folder / "config.json")
    if settings.get("model_type") != "saisa":
        raise ValueError(f"{folder / 'config.json'}: model_type={settings.get('model_type')!r}, expected 'saisa'.")
    return SaisaConfig.from_pretrained(folder)


# --- weights ----------------------------------------------------------------------------------------------------------


def _weights(folder: Path, config: SaisaConfig | None) -> Iterator[tuple[str, str]]:
    listing, files, index = listed_files(folder)
    held: dict[Path, dict] = {}
    for file in files:
        try:
            held[file] = tensors_of(file).described()
        except (OSError, ValueError) as error:
            yield "problem", str(error)
    complete = len(held) == len(files)
    if config is not None and held:
        check_layers(config, sum(map(len, held.values())), folder / "config.json")
    expected = {} if config is None or not held else _expected(config)
    places: dict[str, Path] = {}
    dtypes: Counter = Counter()
    faults = 0
    for file, described in held.items():
        for name, (shape, dtype) in described.items():
            dtypes[str(dtype).removeprefix("torch.")] += 1
            for said in _tensor(file, name, shape, dtype, expected, places, index):
                faults += 1
                yield from _listed(faults, said)
            places[name] = file
    lost = [f"{file}: tensor {name} is missing, which {listing.name} says is there." for name, file in index.items()
            if name not in places and file in held]  # fmt: skip
    lost += [
        f"{listing}: tensor {name} is missing." for name in expected if complete and name not in {**places, **index}
    ]
    for number, said in enumerate(lost, 1):
        yield from _listed(number, said)
    numbers = ", ".join(f"{count} {name}" for name, count in dtypes.most_common())
    if len([name for name in dtypes if name.upper().startswith(("F", "BF"))]) > 1:
        yield "note", f"tensors of several dtypes: {numbers}."
    odd = [name for name in dtypes if name not in (*DTYPES, *STORED_DTYPES.values())]
    if getattr(config, "quantization_config", None) is None and odd:
        yield "note", f"tensors of dtype {', '.join(odd)}, expected {', '.join(DTYPES)}: NaN is not looked for in them."
    if getattr(config, "quantization_config", None) is not None:
        yield "note", "the weights are quantized: their names, shapes and numbers are not compared."
    elif complete and index | places:
        bad = 0
        for said in _not_finite(folder):
            bad += 1
            yield from _listed(bad, said)
        faults += bad
    if complete and not faults and not lost:
        size = sum(file.stat().st_size for file in files)
        count = f"{len(files)} file{'s' if len(files) > 1 else ''}"
        yield "ok", f"{sum(dtypes.values())} tensors in {count}, {size / 1e9:.2f} GB: {numbers}"


def _listed(number: int, said: str) -> Iterator[tuple[str, str]]:
    """The finding, if it is one of the first of its kind."""
    if number <= MOST:
        yield "problem", said
    elif number == MOST + 1:
        yield "problem", "there are more like these."


def _expected(config: SaisaConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor in a checkpoint of `config`; nothing if the weights are quantized."""
    if getattr(config, "quantization_config", None) is not None:
        return {}
    model_class = SaisaModel if config.architectures == ["SaisaModel"] else SaisaForConditionalGeneration
    with torch.device("meta"):
        model = model_class(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in as_saved(model).items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    return shapes


def _tensor(file, name, shape, dtype, expected: dict, places: dict, index: dict) -> Iterator[str]:
    """What is wrong with a tensor, from what its file says about it."""
    if name in places:
        yield f"{file}: tensor {name} is in {places[name].name} as well."
    elif index and name not in index:
        yield f"{file}: tensor {name} is there, which the index does not name."
    if not expected:
        return
    if name not in expected:
        if name != "lm_head.weight":  # tied, and stored by some releases
            yield f"{file}: tensor {name} is unknown: the model of config.json has none of that name."
        return
    if tuple(shape) != expected[name]:
        yield f"{file}: tensor {name} has shape {tuple(shape)}, expected {expected[name]} by config.json."
    if not (dtype.is_floating_point if isinstance(dtype, torch.dtype) else dtype.startswith(FLOATS)):
        yield f"{file}: tensor {name} is {str(dtype).removeprefix('torch.')}, expected floating-point numbers."


def _not_finite(folder: Path) -> Iterator[str]:
    """A line for each tensor that has NaN or infinite numbers."""
    weights = WeightFiles(folder)
    for name, dtype in weights.dtypes.items():
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            continue
        nan = infinite = 0
        for piece in weights.rows(name):
            if not bool(torch.isfinite(piece).all()):
                nan += int(piece.isnan().sum())
                infinite += int(piece.isinf().sum())
        if nan or infinite:
            count = torch.Size(weights.shapes[name]).numel()
            yield f"{weights.files[name]}: tensor {name} has {nan} NaN and {infinite} infinite numbers among {count}."
    weights.close()


# --- what lies beside them --------------------------------------------------------------------------------------------


def _generation(folder: Path, config: SaisaConfig | None) -> Iterator[tuple[str, str]]:
    file = folder / "generation_config.json"
    if not file.exists():
        yield "note", f"{file.name} is missing: answers end as config.json says."
        return
    settings = read_json(file)
    GenerationConfig.from_pretrained(folder).validate()
    rows = None if config is None else config.text_config.vocab_size
    sound = True
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens"):
        given = settings.get(name)
        for token in given if isinstance(given, list) else [given]:
            known = isinstance(token, int) and token >= 0 and (rows is None or token < rows)
            if token is not None and not known:
                sound = False
                yield "problem", f"{file}: {name} has {token!r:.80}, expected an index below vocab_size={rows}."
    if sound:
        stops = settings.get("eos_token_id")
        yield (
            ("note", "no eos_token_id: answers end at their longest.") if stops is None else ("ok", f"ends at {stops}")
        )


def _processor(folder: Path, config: SaisaConfig | None) -> Iterator[tuple[str, str]]:
    if not any((folder / f"{name}.json").exists() for name in ("processor_config", "preprocessor_config", "tokenizer")):
        yield "note", "there is none: AutoProcessor cannot read this folder."
        return
    with reading(folder):
        processor = SaisaProcessor.from_pretrained(folder)
    token, tokenizer, sound = processor.image_token, processor.tokenizer, True
    index = tokenizer.convert_tokens_to_ids(token)
    for said in [] if config is None else _unlike(processor, config, index):
        sound = False
        yield "problem", said
    image = PIL.Image.new("RGB", (64, 48), "white")
    probe = processor(images=image, text=token, return_tensors="pt")
    count = int((probe["input_ids"] == index).sum())
    # an encoder that takes images of any size has another number of tokens for each
    if config is not None and count != config.image_seq_length and probe["pixel_values"].ndim == 4:
        own = config.visual_tokens_of(*probe["pixel_values"].shape[-2:])
        sound = count == own
        expected = f"expected image_seq_length={config.image_seq_length} of config.json"
        yield "note" if sound else "problem", f"an image becomes {count} times {token!r}, {expected}."
    if not processor.chat_template:
        yield "note", "it has no chat template."
    else:
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROBE}]}]
        try:
            said = processor.apply_chat_template(chat, images=[image], add_generation_prompt=True)
            if said.count(token) != 1 or PROBE not in said:
                sound = False
                yield (
                    "problem",
                    f"its chat template makes {said!r:.200} of an image and {PROBE!r}: one of them is lost.",
                )
        except Exception as error:
            sound = False
            yield "problem", f"its chat template cannot be rendered: {first_line(error)}"
    if tokenizer.pad_token_id is None:
        yield "note", "its tokenizer has no padding token: one prompt at a time."
    if sound:
        yield "ok", f"{token!r} is {index}, {count} times per image; {len(tokenizer)} tokens"


def _unlike(processor: SaisaProcessor, config: SaisaConfig, index: int) -> Iterator[str]:
    """What the processor and the configuration do not agree on."""
    if index != config.image_token_id:
        expected = f"image_token_id={config.image_token_id} of config.json"
        yield f"its image token {processor.image_token!r} is {index}, expected {expected}."
    own = processor.image_grid_pinpoints and [list(pair) for pair in processor.image_grid_pinpoints]
    for name, found in (("image_grid_pinpoints", own), ("vision_aspect_ratio", processor.vision_aspect_ratio)):
        if found != getattr(config, name):
            yield f"its {name} is {found!r:.200}, expected {getattr(config, name)!r:.200} of config.json."
    rows, tokens = config.text_config.vocab_size, max(processor.tokenizer.get_vocab().values()) + 1
    if tokens > rows:
        yield f"its tokenizer has indices up to {tokens - 1}, the model has vocab_size={rows}."


def _code(folder: Path) -> Iterator[tuple[str, str]]:
    plan = plan_upgrade(folder, str(folder))
    missing = sorted(name for name in plan.writes if name.endswith("_saisa.py") and not (folder / name).is_file())
    stale = sorted(name for name in plan.writes if name not in missing) + plan.removes
    mend = f"`saisa upgrade {folder}` brings it up to date"
    if missing:
        yield "problem", f"{', '.join(missing)} missing: trust_remote_code=True cannot load it. {mend}."
    if stale:
        yield "note", f"{', '.join(stale)} not as this release writes it: older, or changed. {mend}."
    if not missing and not stale:
        yield "ok", "as this release writes it"


def _states(folder: Path, config: SaisaConfig | None) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.rglob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                ours = (opened.metadata() or {}).get("format") == FORMAT
        except (OSError, SafetensorError) as error:
            if not file.name.startswith("model"):  # the weights have been read
                yield "problem", f"{file} cannot be read: {first_line(error)}"
            continue
        if not ours:
            continue
        try:
            with reading(file):
                states = SaisaVisualStates.load(file)
        except (OSError, ValueError) as error:
            yield "problem", first_line(error)
            continue
        layers, wanted = states.num_layers, None if config is None else config.text_config.num_hidden_layers
        if layers is not None and wanted is not None and layers != wanted:
            yield "problem", f"{file} has states of {layers} layers, the model has {wanted}."
        else:
            yield "ok", f"{file.relative_to(folder)}: {states!r}"
