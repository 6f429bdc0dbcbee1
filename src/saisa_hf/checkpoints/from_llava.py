# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa build --from-llava`: a trained LLaVA becomes a SAISA, without any training on text.

Language model and vision encoder are the LLaVA's own. In a causal LLaVA the hidden states of visual tokens depend on nothing
but the picture and what always stands in front of it. So layer i's projector can be fitted, by regression on the encoder's
features of any pictures, to the states that LLaVA's visual tokens have at the input of layer i. Layer 0 is LLaVA's projector.

A SAISA that is run on embeddings, without a picture, is its language model. With projected features among the embeddings of
the words that is the LLaVA itself: here one set of weights serves as teacher and student.

Shapes: n pictures, V visual tokens of each, C width of the encoder's features, D hidden size, I inner width of a projector,
R rows (tokens) of a batch, S tokens of a prompt with its picture and its answer, X vocabulary.
"""

import copy
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, CLIPImageProcessor

from ..common.destination import check_destination, check_hub, check_outside, new_folder, size_in_bytes, upload
from ..configuration_saisa import SaisaConfig
from ..images_saisa import load_image
from ..language_models_saisa import LanguageModelFamily, checkpoint_state_dict
from ..modeling_saisa import SaisaForConditionalGeneration
from ..processing_saisa import SaisaProcessor
from ..vision_saisa import CLASS_TOKENS, NESTED_ENCODERS, NestedEncoder
from .model_card import write_model_card


PROMPTS = (
    "Describe this image in detail.",
    "What is shown in this picture?",
    "List the objects in the image with their colours and places.",
    "What text can be read in the image?",
)
REPORT = "from_llava.json"
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")


@dataclass(frozen=True)
class Fit:
    """How projectors are fitted.

    Attributes:
        pictures: most pictures to use of those that are there, held-out ones included.
        held_out: of these, how many are kept from fitting; errors and agreement are measured on them.
        steps: steps of AdamW for each layer; 0 leaves the closed-form solution of `linear_2`.
        rate: its highest learning rate, of a cosine schedule, times the square root of the projector's inner width: 0.064
            makes 0.001 at a width of 4096, as in LLaVA's first training stage, and 0.006 at 128.
        batch_tokens: about how many visual tokens are in one step.
        ridge: the closed form's penalty, relative to the mean square of the inner activations.
        space: where the error counts in descent: in the `"hidden"` states as they are, in these `"scaled"` to a mean square
            of 1 each, behind the layer's input `"norm"`, or in its `"keys_values"`.
        start: from what a layer's `linear_1` starts: the `"previous"` layer's, or `"llava"`'s own.
        projector_hidden_size: inner width of the projectors; None: LLaVA's.
        distill_steps: steps of distillation of the next-token distributions, after the fit.
        distill_rate: its highest learning rate.
        distill_batch: pictures with prompt and answer in one of its steps.
        answer_tokens: longest answer of the LLaVA to a generic prompt.
        seed: of the order of pictures and of all that is drawn.
    """

    pictures: int = 2000
    held_out: int = 64
    steps: int = 500
    rate: float = 0.064
    batch_tokens: int = 2304
    ridge: float = 1e-5
    space: str = "scaled"
    start: str = "previous"
    projector_hidden_size: int | None = None
    distill_steps: int = 0
    distill_rate: float = 1e-4
    distill_batch: int = 8
    answer_tokens: int = 64
    seed: int = 0

    def __post_init__(self):
        for name in ("pictures", "held_out", "batch_tokens", "distill_batch", "answer_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a positive number.")
        for name in ("steps", "distill_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)}: expected 0 or a positive number.")
        for name, allowed in (("space", ("hidden", "scaled", "norm", "keys_values")), ("start", ("previous", "llava"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: expected one of {', '.join(map(repr, allowed))}.")


# --- the model --------------------------------------------------------------------------------------------------------


def saisa_from_llava(llava, projector_hidden_size: int | None = None, seed: int = 0) -> SaisaForConditionalGeneration:
    """The SAISA of a LLaVA, with LLaVA's projector copied into every layer. It shares all other weights with the LLaVA: no
    memory is taken but for the projectors.

    Args:
        llava: a `LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration`, all on one device.
        projector_hidden_size: inner width of the projectors. Where it is larger than LLaVA's, what they compute stays the
            same; where it is smaller, they are LLaVA's with inner units left out.
        seed: of the inner units that are added or left out.

    Raises:
        ValueError: not a LLaVA, or one of a language model or encoder that SAISA does not support.
    """
    theirs = llava.config
    if theirs.model_type not in ("llava", "llava_next"):
        raise ValueError(
            f"model_type={theirs.model_type!r}: expected a LLaVA, 'llava' or 'llava_next' (LlavaForConditionalGeneration, "
            f"LlavaNextForConditionalGeneration)."
        )
    encoder = theirs.vision_config.model_type
    if theirs.vision_feature_select_strategy == "default" and CLASS_TOKENS.get(encoder) == 0:
        raise ValueError(
            f"vision_feature_select_strategy='default' drops the first token of {encoder}, which is a patch and no class "
            f"token; SAISA cannot do that. A LLaVA of this encoder needs 'full'."
        )
    projector, head = llava.model.multi_modal_projector, llava.lm_head
    embedding = llava.get_input_embeddings()
    inner, dtype, device = projector.linear_1.out_features, embedding.weight.dtype, embedding.weight.device
    width = None if projector_hidden_size in (None, inner) else projector_hidden_size
    config = SaisaConfig(
        vision_config=copy.deepcopy(theirs.vision_config),
        text_config=copy.deepcopy(theirs.text_config),
        image_token_id=theirs.image_token_index,
        vision_feature_layer=theirs.vision_feature_layer,
        vision_feature_select_strategy=theirs.vision_feature_select_strategy,
        projector_hidden_act=theirs.projector_hidden_act,
        projector_bias=projector.linear_1.bias is not None,
        projector_hidden_size=width,
        tie_word_embeddings=head.weight is embedding.weight,
    )
    config.architectures = [SaisaForConditionalGeneration.__name__]
    for part in (config, config.text_config, config.vision_config):
        part.dtype = dtype
    with torch.device("meta"):
        model = SaisaForConditionalGeneration(config).eval()
    family = model.language_model.family
    as_they_are = type(family).scaled_input is LanguageModelFamily.scaled_input
    if family.norms.before_attention is None or not as_they_are or hasattr(model.get_input_embeddings(), "scale"):
        raise ValueError(
            f"text_config.model_type={theirs.text_config.model_type!r} cannot be the start: projectors are fitted to hidden "
            "states with a norm behind them and no multiplier in front of them."
        )
    tower, decoder = llava.model.vision_tower, llava.model.language_model
    nested = hasattr(tower, "vision_model") or encoder not in NESTED_ENCODERS
    model.model.vision_tower = tower if nested else NestedEncoder(tower)
    keys = model.model.language_model.load_state_dict(checkpoint_state_dict(decoder), strict=False, assign=True)
    missing = [key for key in keys.missing_keys if ".visual_projector." not in key]
    if missing or keys.unexpected_keys:
        raise ValueError(
            f"the language model of this {theirs.model_type} ({theirs.text_config.model_type}) is not SAISA's: missing "
            f"{missing[:3]}, unexpected {keys.unexpected_keys[:3]}."
        )
    own = model.model.language_model
    own.rotary_emb = own.family.rotary_embedding().to(device)
    model.lm_head.weight = embedding.weight if config.tie_word_embeddings else head.weight
    weights = _widened(projector, width or inner, seed)
    for layer in model.model.language_model.layers:
        layer.visual_projector = layer.visual_projector.to_empty(device=device).to(dtype)
        layer.visual_projector.load_state_dict(weights)
    model.generation_config = copy.deepcopy(llava.generation_config)
    return model.requires_grad_(False)


def _widened(projector: nn.Module, width: int, seed: int) -> dict[str, torch.Tensor]:
    """The state dict of `projector` with `width` inner units: more of them, which count for nothing yet, or fewer."""
    weights = {name: tensor.detach() for name, tensor in projector.state_dict().items()}
    inner = projector.linear_1.out_features
    if width == inner:
        return weights
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(inner, generator=generator)[:width] if width < inner else torch.arange(inner)
    more = max(width - inner, 0)
    # a new unit is an old one with noise of its own size: alive, and unlike all others
    copied = torch.randint(inner, (more,), generator=generator)
    for name in ("linear_1.weight", "linear_1.bias"):
        if name in weights:
            old = weights[name]
            noise = torch.randn((more, *old.shape[1:]), generator=generator).to(old) * old.float().std().to(old)
            weights[name] = torch.cat([old[chosen.to(old.device)], old[copied.to(old.device)] + noise])
    last = weights["linear_2.weight"]
    weights["linear_2.weight"] = torch.cat([last[:, chosen.to(last.device)], last.new_zeros(len(last), more)], dim=1)
    return weights


def processor_from_llava(llava_processor, config: SaisaConfig) -> SaisaProcessor:
    """A `SaisaProcessor` with a LLaVA processor's tokenizer, image processor and chat template, which makes the same ids and
    pixels of the same prompt. Of a LLaVA-NeXT's pictures it makes the base image alone: the whole picture, scaled to the
    encoder's size."""
    image_processor = llava_processor.image_processor
    if hasattr(image_processor, "image_grid_pinpoints"):
        side = config.vision_config.image_size
        keep = ("image_mean", "image_std", "rescale_factor", "resample", "do_rescale", "do_normalize", "do_convert_rgb")
        image_processor = CLIPImageProcessor(
            size={"height": side, "width": side},
            do_center_crop=False,
            **{name: getattr(image_processor, name) for name in keep if hasattr(image_processor, name)},
        )
    encoder = config.vision_config
    return SaisaProcessor(
        image_processor,
        llava_processor.tokenizer,
        patch_size=encoder.patch_size,
        vision_feature_select_strategy=config.vision_feature_select_strategy,
        num_additional_image_tokens=config.vision_prefix_tokens,
        image_token=llava_processor.image_token,
        image_seq_length=config.image_seq_length,
        chat_template=llava_processor.chat_template,
        tokenize_whole=True,
    )


class Teacher:
    """The LLaVA inside a SAISA that came from it: the same language model with projected features among its words.

    Args:
        model: a SAISA of `saisa_from_llava`.
        projector: the LLaVA's projector; None: a copy of layer 0's as it stands.
    """

    def __init__(self, model: SaisaForConditionalGeneration, projector: nn.Module | None = None):
        self.model = model
        own = model.model.language_model.layers[0].visual_projector
        self.projector = (copy.deepcopy(own) if projector is None else projector).requires_grad_(False)

    def embeds(self, input_ids: torch.Tensor, features_nVC: torch.Tensor) -> torch.Tensor:
        """(n, S) ids with one picture each, and its features -> (n, S, D)."""
        embeds = self.model.get_input_embeddings()(input_ids)
        visual = self.projector(features_nVC).to(embeds.dtype).flatten(0, 1)
        return embeds.masked_scatter((input_ids == self.model.config.image_token_id)[..., None], visual)

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor, features_nVC: torch.Tensor, keep: int) -> torch.Tensor:
        """(n, keep, X), the LLaVA's logits at the last `keep` positions of unpadded rows."""
        return self.model(
            inputs_embeds=self.embeds(input_ids, features_nVC), logits_to_keep=keep, use_cache=False
        ).logits

    @torch.no_grad()
    def answers(self, input_ids: torch.Tensor, features_nVC: torch.Tensor, tokens: int) -> list[list[int]]:
        """The LLaVA's greedy answers to `n` prompts of one length, `tokens` long at most, each with its end token."""
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
        embeds = self.embeds(input_ids, features_nVC)
        mask = torch.ones_like(input_ids)
        greedy = {"do_sample": False, "num_beams": 1, "temperature": None, "top_p": None, "top_k": None}
        pad = self.model.generation_config.pad_token_id
        pad = pad if pad is not None else ends[0] if ends else 0
        made = self.model.generate(
            inputs_embeds=embeds, attention_mask=mask, max_new_tokens=tokens, pad_token_id=pad, **greedy
        )
        rows = []
        for row in made.tolist():
            end = next((place for place, token in enumerate(row) if token in ends), len(row) - 1)
            rows.append(row[: end + 1])
        return rows

    def advance(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """Layer `index` alone: (n, S, D) hidden states at its input -> those at the next layer's."""
        decoder = self.model.model.language_model
        alone = copy.copy(decoder)
        layer = nn.ModuleList([decoder.layers[index]])
        alone._modules = {**decoder._modules, "layers": layer, "norm": nn.Identity()}
        return alone(inputs_embeds=states, use_cache=False).last_hidden_state


# --- what is kept on disk ---------------------------------------------------------------------------------------------


def _rows_on_disk(path: Path, shape: tuple[int, ...], dtype: torch.dtype, create: bool = False) -> torch.Tensor:
    """A tensor whose memory is the file `path`: read and written page by page, not held in memory."""
    size = math.prod(shape)
    if create:
        with path.open("wb") as stream:
            stream.truncate(size * dtype.itemsize)
            if hasattr(
                os, "posix_fallocate"
            ):  # a full disk is an error here, and a crash when a mapped page is written
                os.posix_fallocate(stream.fileno(), 0, size * dtype.itemsize)
    return torch.from_file(str(path), shared=create, size=size, dtype=dtype).view(shape)


def _write_json(path: Path, content) -> None:
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    partial = path.with_name(f"{path.name}.part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
    os.replace(partial, path)


def picture_files(folder: str | os.PathLike) -> list[Path]:
    """The pictures below `folder`, by suffix, in alphabetical order.

    Raises:
        FileNotFoundError: no such folder, or no picture in it.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {str(folder)!r} is not a folder.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not files:
        raise FileNotFoundError(f"--images {str(folder)!r} holds no pictures ({', '.join(SUFFIXES)}).")
    return files


def _identity(picture) -> str:
    """What a picture is known by when a run goes on: path and size of a file, an address, or the pixels."""
    if isinstance(picture, (str, os.PathLike)):
        return f"{picture} {os.path.getsize(picture) if os.path.isfile(picture) else ''}"
    try:
        loaded = load_image(picture)
    except ValueError:  # it will be skipped
        return "unreadable"
    return f"{loaded.size} {sha256(loaded.tobytes()).hexdigest()}"


class Workbench:
    """The pictures with their features, in the work folder, and the ids of the prompts: what fitting works on.

    Args:
        model: a SAISA of `saisa_from_llava`.
        processor: its processor.
        pictures: what `load_image` takes, paths for instance.
        folder: the work folder; it is made if need be. Whatever is found there was left by an interrupted run with the same
            settings and is not computed again.
        fit: settings.
        prompts: generic questions or requests, whatever the pictures show.
        prompt_format: the text around a prompt, with `<image>` and `{prompt}` in it; None: the processor's chat template.
        log: called with one line of text per step.

    Raises:
        ValueError: too few readable pictures; prompts that differ in front of the picture; a folder of other settings.
        OSError: not enough room on the disk.
    """

    def __init__(self, model, processor, pictures: Sequence, folder, fit: Fit, prompts, prompt_format=None, log=print):
        self.model, self.processor, self.fit, self.log = model, processor, fit, log
        self.folder, self.device = Path(folder), model.get_input_embeddings().weight.device
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(fit.seed)).tolist()
        self.pictures = [pictures[index] for index in order]
        self.prompts = [_prompt_ids(processor, prompt, prompt_format, model.config) for prompt in prompts]
        image_token = model.config.image_token_id
        prefixes = {tuple(ids[: ids.index(image_token)]) for ids in self.prompts}
        if len(prefixes) > 1:
            raise ValueError(
                "what stands in front of the picture differs from prompt to prompt, and the LLaVA's visual states with it. "
                "Give a --prompt-format in which {prompt} comes behind <image>."
            )
        self.prefix = prefixes.pop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_settings(prompts, prompt_format)
        self._encode()
        # what is held out comes first, so that it is the same whatever `fit.pictures` is
        count = len(self.kept)
        self.held_out = range(min(fit.held_out, max(count // 2, 1)))
        self.fitted = range(len(self.held_out), count)
        rows = len(self.fitted) * self.features.shape[1]
        inner = model.model.language_model.layers[0].visual_projector.linear_1.out_features
        if rows < 10 * inner:
            enough = math.ceil(10 * inner / self.features.shape[1])
            log(
                f"warning: {len(self.fitted)} pictures have {rows} visual tokens, few for a projector {inner} wide; expect "
                f"it to do worse on others. {enough} pictures or more would be better."
            )

    def _check_settings(self, prompts, prompt_format):
        settings = {name: value for name, value in asdict(self.fit).items() if not name.startswith("distill_")}
        weights = sha256()
        for tensor in self.model.state_dict().values():  # a sample of each
            few = tensor.flatten()[:: max(1, tensor.numel() // 64)]
            weights.update(few.double().cpu().numpy().tobytes())
        settings |= {
            "prompts": list(prompts),
            "prompt_format": prompt_format,
            "dtype": str(self.model.get_input_embeddings().weight.dtype),
            "pictures_in_order": sha256("\n".join(map(_identity, self.pictures)).encode()).hexdigest(),
            "weights": weights.hexdigest(),
        }
        path = self.folder / "settings.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            differ = [name for name, value in settings.items() if found.get(name) != value]
            if differ:
                raise ValueError(
                    f"{self.folder} was left by a run with another {', '.join(differ)}. Remove it, or choose another "
                    f"--work-folder."
                )
            self.log(f"going on with what is in {self.folder}")
        else:
            others = [file.name for file in self.folder.iterdir()]
            if others:
                raise FileExistsError(f"{self.folder} is not empty and no work folder of an earlier run: {others[0]}.")
            _write_json(path, settings)

    def _encode(self):
        """Writes the encoder's features of the pictures that can be read, `fit.pictures` at most."""
        config, dtype = self.model.config, self.model.get_input_embeddings().weight.dtype
        most = min(len(self.pictures), self.fit.pictures)
        shape = (config.image_seq_length, config.vision_feature_size)
        path, record = self.folder / "features.bin", self.folder / "pictures.json"
        if not record.exists():
            state_bytes = math.prod((most, shape[0], config.text_config.hidden_size, dtype.itemsize))
            self._check_room(math.prod((most, *shape, dtype.itemsize)) + 2 * state_bytes)
            features = _rows_on_disk(path, (most, *shape), dtype, create=True)
            kept, skipped, reading = [], [], iter(range(len(self.pictures)))
            while len(kept) < most:
                batch = self._read(reading, min(most - len(kept), 16), skipped)
                if not batch:
                    break
                pixels = self._pixels([picture for _, picture in batch])
                with torch.no_grad():
                    encoded = self.model.get_image_features(pixels).pooler_output
                features[len(kept) : len(kept) + len(batch)] = encoded.to(dtype).cpu()
                kept += [index for index, _ in batch]
                _show(self.log, f"encoded {len(kept)} of {most} pictures", last=len(kept) == most)
            del features
            if len(kept) < 2:
                shutil.rmtree(self.folder)
                reason = f"; the first that cannot be read: {skipped[0]}" if skipped else ""
                raise ValueError(
                    f"{len(kept)} readable pictures: at least 2 are needed, one to fit and one to measure{reason}"
                )
            _write_json(record, {"kept": kept, "skipped": skipped})
        found = json.loads(record.read_text(encoding="utf-8"))
        self.kept, self.skipped = found["kept"], found["skipped"]
        if self.skipped:
            named = "; ".join(self.skipped[:5]) + ("; ..." if len(self.skipped) > 5 else "")
            self.log(f"warning: skipped {len(self.skipped)} pictures that cannot be read: {named}")
        self.features = _rows_on_disk(path, (len(self.kept), *shape), dtype)

    def _read(self, reading: Iterator[int], count: int, skipped: list[str]) -> list:
        """The next `count` pictures that can be read, with their indices."""
        batch = []
        for index in reading:
            try:
                batch.append((index, load_image(self.pictures[index], str(self.pictures[index]))))
            except (ValueError, OSError) as error:
                skipped.append(" ".join(str(error).split()))
            if len(batch) == count:
                break
        return batch

    def _check_room(self, needed: int):
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"{self.folder} needs {needed / 1e9:.1f} GB for features and states, and {free / 1e9:.1f} GB are free. Use "
                f"fewer pictures (--pictures) or another --work-folder."
            )

    def _pixels(self, pictures: list) -> torch.Tensor:
        return self.processor(images=pictures, return_tensors="pt")["pixel_values"].to(self.device)

    def pixels(self, rows: Sequence[int]) -> torch.Tensor:
        """The pixel values of the pictures with these rows in `features`."""
        return self._pixels([self.pictures[self.kept[row]] for row in rows])

    def features_of(self, rows: Sequence[int]) -> torch.Tensor:
        """(n, V, C) on the model's device."""
        return self.features[list(rows)].to(self.device)


def _prompt_ids(processor, prompt: str, prompt_format: str | None, config: SaisaConfig) -> list[int]:
    blank = torch.zeros(config.vision_config.image_size, config.vision_config.image_size, 3, dtype=torch.uint8).numpy()
    if prompt_format is not None:
        if prompt_format.count(processor.image_token) != 1 or "{prompt}" not in prompt_format:
            raise ValueError(f"--prompt-format {prompt_format!r}: expected one {processor.image_token} and {{prompt}}.")
        return list(processor(images=blank, text=prompt_format.replace("{prompt}", prompt))["input_ids"][0])
    if processor.chat_template is None:
        raise ValueError(
            'this LLaVA has no chat template: say how it is asked, --prompt-format "USER: <image>\\n{prompt} ASSISTANT:" for '
            "instance."
        )
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    return list(
        processor.apply_chat_template(chat, images=blank, add_generation_prompt=True, tokenize=True, return_dict=True)[
            "input_ids"
        ][0]
    )


def _show(log, line: str, last: bool = True):
    """A line that the next one replaces, on a terminal; elsewhere only the last."""
    if log is print and sys.stderr.isatty():
        print(f"\r{line} ", end="\n" if last else "", file=sys.stderr, flush=True)
    elif last:
        log(line)


# --- the fit ----------------------------------------------------------------------------------------------------------


class Space:
    """Where a decoder layer's visual input counts: behind its norm, as keys before rotation, and as values. In float32."""

    def __init__(self, layer: nn.Module):
        self.norm = copy.deepcopy(getattr(layer, layer.norms.before_attention)).float()
        self.attention = copy.copy(layer.self_attn)
        parts = ("k_proj", "v_proj", "qkv_proj", "k_norm")
        own = layer.self_attn._modules
        self.attention._modules = {name: copy.deepcopy(own[name]).float() for name in parts if name in own}

    def views(self, rows_RD: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows at the layer's input -> the same in each of the three places, (R, .)."""
        normed = self.norm(rows_RD)
        keys, values = (part.flatten(1) for part in self.attention.keys_and_values(normed))
        return {"norm": normed, "keys": keys, "values": values}

    def loss(self, space: str, ours_RD: torch.Tensor, theirs_RD: torch.Tensor) -> torch.Tensor:
        """The relative squared error in `space` (see `Fit`)."""
        if space in ("hidden", "scaled"):
            return _relative_error(ours_RD, theirs_RD)
        if space == "norm":
            return _relative_error(self.norm(ours_RD), self.norm(theirs_RD))
        ours, theirs = self.views(ours_RD), self.views(theirs_RD)
        return sum(_relative_error(ours[name], theirs[name]) for name in ("keys", "values")) / 2


def _relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    return (ours - theirs).square().sum() / theirs.square().sum()


class LayerFit:
    """Fits one layer's projector, in float32, to states at that layer's input.

    Args:
        bench: pictures and features.
        index: of the layer.
        states: (n, V, D), the LLaVA's visual states at its input, on disk.
    """

    def __init__(self, bench: Workbench, index: int, states: torch.Tensor):
        self.bench, self.fit, self.index, self.states = bench, bench.fit, index, states
        self.space = Space(bench.model.model.language_model.layers[index])
        self.per_step = max(1, round(self.fit.batch_tokens / states.shape[1]))

    def rows(self, pictures) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (R, C) and states (R, D) of some pictures, in float32 on the model's device."""
        both = self.bench.features[pictures], self.states[pictures]
        return tuple(part.to(self.bench.device).float().flatten(0, 1) for part in both)

    def batches(self, pictures: range) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All of `pictures`, one batch after the other."""
        for first in range(pictures.start, pictures.stop, self.per_step):
            yield self.rows(slice(first, min(first + self.per_step, pictures.stop)))

    def fit_projector(self, projector: nn.Module):
        """`solve`, then `descend`. Where that has made matters worse on fitted pictures, once more at a quarter of the rate,
        and at a sixteenth; if that does not help either, the closed form stays."""
        self.solve(projector)
        some = self.bench.fitted[: max(1, 16 * self.per_step)]
        solved, best = copy.deepcopy(projector.state_dict()), self.errors(projector, some)
        for slower in (1, 4, 16) if self.fit.steps else ():
            self.descend(projector, slower)
            errors = self.errors(projector, some)
            if errors["keys"] + errors["values"] <= best["keys"] + best["values"]:
                return
            projector.load_state_dict(solved)
            self.bench.log(f"layer {self.index + 1}: descent at 1/{slower} of the rate has led nowhere and is undone")

    def solve(self, projector: nn.Module):
        """Sets `linear_2` to the best linear map of the inner activations, in closed form. Its targets are the states scaled
        to a mean square of 1: the norm behind it does the same. Whatever linear map follows the norm, the solution is the
        same, so this serves keys and values as well."""
        last = projector.linear_2
        size = last.in_features + (last.bias is not None)
        gram = torch.zeros(size, size, device=self.bench.device)
        right = torch.zeros(size, last.out_features, device=self.bench.device)
        count = 0
        for features, states in self.batches(self.bench.fitted):
            inner = projector.act(projector.linear_1(features))
            if last.bias is not None:
                inner = torch.cat([inner, torch.ones_like(inner[:, :1])], dim=1)
            gram += inner.T @ inner
            right += inner.T @ self.targets(states)
            count += len(inner)
        gram, right = gram.cpu().double() / count, right.cpu().double() / count
        gram.diagonal().add_(self.fit.ridge * gram.diagonal().mean())
        solution = torch.linalg.solve(gram, right).to(last.weight)
        last.weight.copy_(solution[: last.in_features].T)
        if last.bias is not None:
            last.bias.copy_(solution[-1])

    def targets(self, states_RD: torch.Tensor) -> torch.Tensor:
        """What the projector is to put out; only its direction counts, but where `space` is `"hidden"`."""
        if self.fit.space == "hidden":
            return states_RD
        return states_RD * states_RD.square().mean(1, keepdim=True).add(1e-6).rsqrt()

    def descend(self, projector: nn.Module, slower: int = 1):
        """`fit.steps` steps of AdamW on both linear maps, at 1/`slower` of the rate."""
        fit, fitted = self.fit, self.bench.fitted
        generator = torch.Generator().manual_seed(fit.seed * 1000 + self.index)
        projector.requires_grad_(True)
        rate = fit.rate / slower / math.sqrt(projector.linear_1.out_features)
        optimizer = torch.optim.AdamW(projector.parameters(), lr=rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, fit.steps))
        for step in range(fit.steps):
            chosen = torch.randint(fitted.start, fitted.stop, (self.per_step,), generator=generator)
            features, states = self.rows(chosen)
            with torch.enable_grad():
                loss = self.space.loss(fit.space, projector(features), self.targets(states))
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            line = f"layer {self.index + 1}: step {step + 1} of {fit.steps}, {float(loss.detach()):.4f}"
            _show(self.bench.log, line, last=False)
        projector.requires_grad_(False)

    @torch.no_grad()
    def errors(self, projector: nn.Module, pictures: range | None = None) -> dict[str, float]:
        """Relative squared errors of what the layer makes of pictures (None: the held-out ones), by place (see
        `Space.views`)."""
        sums = {}
        for features, states in self.batches(self.bench.held_out if pictures is None else pictures):
            ours, theirs = self.space.views(projector(features).float()), self.space.views(states)
            for name, target in theirs.items():
                wrong, all_of_it = sums.get(name, (0.0, 0.0))
                wrong += float((ours[name] - target).square().sum())
                sums[name] = wrong, all_of_it + float(target.square().sum())
        return {name: wrong / all_of_it for name, (wrong, all_of_it) in sums.items()}


def _cosine(step: int, steps: int, warm_up: float = 0.05) -> float:
    done = step / max(steps, 1)
    return min(1.0, (done + 1 / max(steps, 1)) / warm_up) * 0.5 * (1 + math.cos(math.pi * done))


@torch.no_grad()
def fit_projectors(bench: Workbench, teacher: Teacher) -> list[dict]:
    """Fits the projector of each layer of `bench.model`, in place and in order, and returns for each its errors on held-out
    pictures, with LLaVA's projector copied and fitted.

    One layer's projector is fitted at a time, in float32. The states of one layer are on disk, and those of the next while
    they are made. Each layer that is done is kept in the work folder.
    """
    model, folder, fit = bench.model, bench.folder, bench.fit
    layers = model.model.language_model.layers
    shape = (len(bench.kept), model.config.image_seq_length, model.config.text_config.hidden_size)
    llava_width = teacher.projector.linear_1.out_features
    exact = (model.config.projector_hidden_size or llava_width) >= llava_width
    copied = copy.deepcopy(layers[0].visual_projector)  # what every layer starts with: LLaVA's projector
    report = []
    prefix = _prefix_states(bench)
    states, at = None, -1
    for index, layer in enumerate(layers):
        done, record = folder / f"projector-{index}.safetensors", folder / f"layer-{index}.json"
        if not record.exists():
            start = time.perf_counter()
            prefix, states, at = _states_at(bench, teacher, prefix, states, at, index, shape)
            work = LayerFit(bench, index, states)
            before = work.errors(copied)
            source = copied if index == 0 or fit.start == "llava" else layers[index - 1].visual_projector
            projector = copy.deepcopy(source).float()
            if index or not exact:
                work.fit_projector(projector)
            layer.visual_projector.load_state_dict(projector.state_dict())
            after = work.errors(layer.visual_projector)
            _write_tensors(done, layer.visual_projector.state_dict())
            seconds = round(time.perf_counter() - start, 2)
            _write_json(record, {"layer": index, "copied": before, "fitted": after, "seconds": seconds})
        layer.visual_projector.load_state_dict(load_file(done))
        report.append(json.loads(record.read_text(encoding="utf-8")))
        bench.log(_layer_line(report[-1], len(layers)))
    del states
    for file in folder.glob("states-*.bin"):
        file.unlink()
    return report


def _layer_line(row: dict, layers: int) -> str:
    parts = [f"{name} {row['copied'][name]:.2%} -> {row['fitted'][name]:.2%}" for name in ("norm", "keys", "values")]
    return f"layer {row['layer'] + 1} of {layers}: error of {', '.join(parts)} ({row['seconds']:.0f} s)"


def _prefix_states(bench: Workbench) -> torch.Tensor:
    """(1, S, D), the embeddings of what is in front of every picture."""
    ids = torch.tensor([bench.prefix], dtype=torch.long, device=bench.device)
    return bench.model.get_input_embeddings()(ids)


def _states_at(bench, teacher, prefix, states, at, index, shape):
    """The states of prefix and pictures at the input of layer `index`, given those at layer `at` (-1: none at hand). The
    pictures' are on disk, under the layer's number."""
    folder, dtype = bench.folder, prefix.dtype
    per_step = max(1, bench.fit.batch_tokens // shape[1])
    if at < 0:  # begin, or go on from what an earlier run has left
        found = [number for number in range(index, -1, -1) if (folder / f"states-{number}.bin").exists()]
        at = found[0] if found else 0
        if not found:
            target = _rows_on_disk(folder / "states.part", shape, dtype, create=True)
            for first in range(0, shape[0], per_step):
                rows = range(first, min(first + per_step, shape[0]))
                target[rows.start : rows.stop] = teacher.projector(bench.features_of(rows)).to(dtype).cpu()
            os.replace(folder / "states.part", folder / "states-0.bin")
        for number in range(at):
            prefix = teacher.advance(number, prefix) if prefix.shape[1] else prefix
        states = _rows_on_disk(folder / f"states-{at}.bin", shape, dtype)
    while at < index:
        target = _rows_on_disk(folder / "states.part", shape, dtype, create=True)
        front = prefix.shape[1]
        for first in range(0, shape[0], per_step):
            visual = states[first : first + per_step].to(bench.device)
            whole = torch.cat([prefix.expand(len(visual), -1, -1), visual], dim=1)
            target[first : first + len(visual)] = teacher.advance(at, whole)[:, front:].cpu()
        prefix = teacher.advance(at, prefix) if front else prefix
        del states, target
        os.replace(folder / "states.part", folder / f"states-{at + 1}.bin")
        (folder / f"states-{at}.bin").unlink(missing_ok=True)
        at += 1
        states = _rows_on_disk(folder / f"states-{at}.bin", shape, dtype)
    return prefix, states, at


# --- agreement and distillation ---------------------------------------------------------------------------------------


def answered(bench: Workbench, teacher: Teacher, pictures: range, name: str) -> list[dict]:
    """One of the prompts and the LLaVA's greedy answer to it for each of `pictures`, the prompts in turn:
    `{"picture", "prompt", "answer": ids}`. Kept in the work folder as `name`."""
    path, per_batch = bench.folder / name, 16
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    done = {row["picture"] for row in rows}
    for prompt, ids in enumerate(bench.prompts):
        asked = [picture for picture in pictures[prompt :: len(bench.prompts)] if picture not in done]
        for first in range(0, len(asked), per_batch):
            batch = asked[first : first + per_batch]
            inputs = torch.tensor([ids] * len(batch), device=bench.device)
            answers = teacher.answers(inputs, bench.features_of(batch), bench.fit.answer_tokens)
            rows += [{"picture": p, "prompt": prompt, "answer": answer} for p, answer in zip(batch, answers)]
            _write_json(path, rows)
            _show(bench.log, f"LLaVA has answered {len(rows)} of {len(pictures)}", last=len(rows) == len(pictures))
    wanted = set(pictures)
    return [row for row in rows if row["picture"] in wanted]


def _teacher_forced(bench: Workbench, rows: list[dict]):
    """`rows` of one prompt as a batch: ids (n, S), how many positions to keep, and bool (n, keep - 1), where the next token
    is one of an answer."""
    longest = max(len(row["answer"]) for row in rows)
    prompt = bench.prompts[rows[0]["prompt"]]
    ids = [prompt + row["answer"] + [prompt[0]] * (longest - len(row["answer"])) for row in rows]
    counts = torch.tensor([[place < len(row["answer"]) for place in range(longest)] for row in rows])
    return torch.tensor(ids, device=bench.device), longest + 1, counts.to(bench.device)


def _divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """KL(theirs || ours) of next-token distributions, from logits (R, X) -> (R,), in nats."""
    ours, theirs = ours.float().log_softmax(-1), theirs.float().log_softmax(-1)
    return (theirs.exp() * (theirs - ours)).sum(-1)


def _both_logits(bench: Workbench, teacher: Teacher, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (R, X) of SAISA and LLaVA for the tokens of the LLaVA's own answers."""
    ids, keep, counts = _teacher_forced(bench, rows)
    pictures = [row["picture"] for row in rows]
    theirs = teacher.logits(ids, bench.features_of(pictures), keep)[:, :-1][counts]
    ours = bench.model(input_ids=ids, pixel_values=bench.pixels(pictures), logits_to_keep=keep, use_cache=False)
    return ours.logits[:, :-1][counts], theirs


def _batches_of_one_prompt(rows: list[dict], size: int) -> Iterator[list[dict]]:
    for prompt in sorted({row["prompt"] for row in rows}):
        same = [row for row in rows if row["prompt"] == prompt]
        for first in range(0, len(same), size):
            yield same[first : first + size]


@torch.no_grad()
def agreement(bench: Workbench, teacher: Teacher, rows: list[dict]) -> dict:
    """How well the model's next-token distributions agree with the LLaVA's along the LLaVA's own answers.

    Returns:
        `kl`, the mean of KL(LLaVA || SAISA) in nats; `top1`, the part of tokens on which both put the most weight; and
        `tokens`, their number.
    """
    divergences, same = [], []
    for batch in _batches_of_one_prompt(rows, 16):
        ours, theirs = _both_logits(bench, teacher, batch)
        divergences.append(_divergence(ours, theirs).cpu())
        same.append((ours.argmax(-1) == theirs.argmax(-1)).cpu())
    divergences, same = torch.cat(divergences), torch.cat(same)
    return {"kl": float(divergences.mean()), "top1": float(same.float().mean()), "tokens": len(same)}


def distill(bench: Workbench, teacher: Teacher) -> list[float]:
    """Trains the projectors alone, in place, on the divergence from the LLaVA along its answers about the fitted pictures.
    Returns the divergence at each step. The projectors are in float32 meanwhile."""
    model, fit = bench.model, bench.fit
    wanted = bench.fitted[: fit.distill_steps * fit.distill_batch]
    rows = answered(bench, teacher, wanted, "answers.json")
    projectors = [layer.visual_projector for layer in model.model.language_model.layers]
    dtype = projectors[0].linear_1.weight.dtype
    parameters = [parameter for projector in projectors for parameter in projector.float().parameters()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(parameters, lr=fit.distill_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step, fit.distill_steps))
    generator, batches, losses = torch.Generator().manual_seed(fit.seed), [], []
    for step in range(fit.distill_steps):
        if not batches:
            shuffled = [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]
            batches = list(_batches_of_one_prompt(shuffled, fit.distill_batch))
            batches = [batches[place] for place in torch.randperm(len(batches), generator=generator).tolist()]
        loss = _divergence(*_both_logits(bench, teacher, batches.pop())).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
        last = step + 1 == fit.distill_steps
        _show(bench.log, f"distillation: step {step + 1} of {fit.distill_steps}, divergence {losses[-1]:.4f}", last)
    for projector in projectors:
        projector.to(dtype).requires_grad_(False)
    return losses


# --- the command ------------------------------------------------------------------------------------------------------


def load_llava(source: str | os.PathLike, dtype: str | None = None, device: str = "cpu", named: str = "--from-llava"):
    """Model and processor of a LLaVA or LLaVA-NeXT checkpoint in transformers' layout. `named`: what errors call it.

    Raises:
        ValueError: a checkpoint of another kind.
        OSError: no such folder or repository.
    """
    config = AutoConfig.from_pretrained(source)
    if config.model_type not in ("llava", "llava_next"):
        raise ValueError(f"{named} {str(source)!r} is a {config.model_type!r}: expected a 'llava' or 'llava_next'.")
    processor = AutoProcessor.from_pretrained(source)
    if not hasattr(processor, "image_processor"):
        raise ValueError(f"{named} {str(source)!r} has no image processor: preprocessor_config.json is missing.")
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype or "auto", device_map=device)
    return model.eval(), processor


def from_llava(
    source: str | os.PathLike,
    images: str | os.PathLike | Sequence,
    destination: str | os.PathLike,
    *,
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
    """Makes a SAISA of a LLaVA (see above), writes model, processor and report into the folder `destination`, and returns
    the report.

    Args:
        source: folder, or hub id, of a `LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration`.
        images: a folder of pictures, or a list of what `load_image` takes. Nothing needs to be known about them.
        destination: folder to make. An existing one must be empty, or `overwrite` must be True.
        fit: settings.
        prompts: generic prompts, along whose answers agreement is measured and distilled.
        prompt_format: see `Workbench`.
        work_folder: where features, states and finished layers are kept, so that an interrupted run goes on; None: beside
            the destination, removed at the end.
        dtype: "float32", "float16" or "bfloat16"; None: as stored. Projectors are fitted in float32 in any case.
        device: where the model is.
        max_shard_size: most bytes in a weight file, as a number or like "5GB".
        push_to_hub: a repository, "user/name", to upload the result to as well; made if need be.
        private: whether the repository is private, where it is made; None leaves that to the hub.
        log: called with one line of text per step.

    Returns:
        `layers`: errors by layer (see `fit_projectors`); `agreement`: by stage, `copied`, `fitted` and, where asked for,
        `distilled` (see `agreement`); `pictures`, `settings` and `seconds`.

    Raises:
        ValueError, OSError: something is not as expected; the message says what.
    """
    fit, destination = fit or Fit(), Path(destination).expanduser().resolve()
    max_shard_size = size_in_bytes(max_shard_size)
    check_destination(destination, overwrite)
    if push_to_hub is not None:
        check_hub(push_to_hub)
    for part in (source, images, work_folder):
        if isinstance(part, (str, os.PathLike)) and (part is work_folder or Path(part).expanduser().is_dir()):
            check_outside(destination, Path(part).expanduser())
    pictures = picture_files(images) if isinstance(images, (str, os.PathLike)) else list(images)
    work = Path(work_folder).expanduser() if work_folder else destination.parent / f".{destination.name}.work"
    start = time.perf_counter()
    llava, llava_processor = load_llava(source, dtype, device)
    if llava.config.model_type == "llava_next":
        log(
            "note: of LLaVA-NeXT's pictures the base image alone is used, the whole picture at the encoder's size; no tiles"
        )
    model = saisa_from_llava(llava, fit.projector_hidden_size, fit.seed)
    processor = processor_from_llava(llava_processor, model.config)
    teacher = Teacher(model, llava.model.multi_modal_projector)
    del llava
    bench = Workbench(model, processor, pictures, work, fit, prompts, prompt_format, log)

    measured = answered(bench, teacher, bench.held_out, "held-out-answers.json")
    agreements, path = {}, work / "agreement.json"
    if path.exists():
        agreements = json.loads(path.read_text(encoding="utf-8"))
    if "copied" not in agreements:
        agreements["copied"] = agreement(bench, teacher, measured)
        _write_json(path, agreements)
    layers = fit_projectors(bench, teacher)
    agreements["fitted"] = agreement(bench, teacher, measured)
    if fit.distill_steps:
        distill(bench, teacher)
        agreements["distilled"] = agreement(bench, teacher, measured)

    report = {
        "source": str(source),
        "pictures": {"fitted": len(bench.fitted), "held_out": len(bench.held_out), "skipped": bench.skipped},
        "layers": layers,
        "agreement": agreements,
        "prompts": list(prompts),
        "settings": asdict(fit),
        "seconds": round(time.perf_counter() - start, 1),
    }
    with new_folder(destination, overwrite, log) as partial:
        model.save_pretrained(partial, max_shard_size=max_shard_size)
        processor.save_pretrained(partial)
        base_model = None if Path(source).expanduser().is_dir() else str(source)
        write_model_card(partial, model.config, repo_id=push_to_hub or destination.name, base_model=base_model)
        _write_json(partial / REPORT, report)
    if work_folder is None:
        shutil.rmtree(work, ignore_errors=True)
    log(report_text(report))
    log(f"wrote {destination}")
    if push_to_hub is not None:
        upload(destination, push_to_hub, private, log)
    return report


def report_text(report: dict) -> str:
    """The report as lines of text."""
    pictures, agreements = report["pictures"], report["agreement"]
    lines = [
        f"fitted on {pictures['fitted']} pictures, measured on {pictures['held_out']} others "
        f"({agreements['copied']['tokens']} tokens of the LLaVA's answers), {len(pictures['skipped'])} skipped",
        f"{'projectors':<12}{'KL from LLaVA':>15}{'same top token':>17}",
    ]
    lines += [f"{stage:<12}{row['kl']:>15.4f}{row['top1']:>17.1%}" for stage, row in agreements.items()]
    lines.append(f"{'layer':<12}{'copied':>15}{'fitted':>17}   relative error of keys and values")
    for row in report["layers"]:
        copied, fitted = ((row[stage]["keys"] + row[stage]["values"]) / 2 for stage in ("copied", "fitted"))
        lines.append(f"{row['layer']:<12}{copied:>15.2%}{fitted:>17.2%}")
    return "\n".join(lines)


def read_prompts(file: str | os.PathLike) -> list[str]:
    """The prompts in a text file, one a line."""
    lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"--prompts {file} holds no prompt: expected one a line.")
    return prompts
