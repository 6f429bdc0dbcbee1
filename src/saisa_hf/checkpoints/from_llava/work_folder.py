# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The work folder: features, states and finished layers are kept on disk, so that memory stays bounded and an interrupted run
resumes where it stopped."""

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from safetensors.torch import save_file

from ...configuration_saisa import SaisaConfig
from ...images_saisa import load_image
from ...modeling_saisa import SaisaForConditionalGeneration
from ...processing_saisa import SaisaProcessor
from ...vision_saisa import image_size
from .reporting import show_progress
from .settings import Fit


IMAGES_AT_ONCE = 16  # that the encoder reads


class Workbench:
    """The images with their features, in the work folder, and the ids of the prompts: what fitting works on.

    Args:
        model: a SAISA made by `saisa_from_llava`.
        processor: its processor.
        pictures: images, as `load_image` takes them, paths for instance.
        folder: the work folder; it is made if needed. Whatever an interrupted run with the same settings left there is not
            computed again.
        fit: settings.
        prompts: questions or requests that suit any image.
        prompt_format: the text around a prompt, with `<image>` and `{prompt}` in it; None: the processor's chat template.
        log: called with one line of text per step.
        embed: for a LLaVA that scales tiles down behind its projector, what it makes of images (see `Teacher.of`).

    Attributes:
        lengths: visual tokens of each image. `held_out`, `choosing` and `fitted` are the ranges of images to measure, to
            choose layers and to fit on.
        features: (R, C), those of all images, on disk. `seen`: what the teacher's projector reads in their place, if other.
        prompts: the prompts' ids, each with one image token. `prefix` are the ids in front of it, the same in all.
        skipped: why images could not be read, one line each.

    Raises:
        ValueError: too few images can be read; prompts differ in front of the image; the folder belongs to other settings.
        OSError: not enough space on the disk.
    """

    def __init__(
        self,
        model: SaisaForConditionalGeneration,
        processor: SaisaProcessor,
        pictures: Sequence[Any],
        folder: str | os.PathLike,
        fit: Fit,
        prompts: Sequence[str],
        prompt_format: str | None = None,
        log: Callable[[str], None] = print,
        embed: Callable[..., list[torch.Tensor]] | None = None,
    ):
        self.model, self.processor, self.fit, self.log, self.embed = model, processor, fit, log, embed
        self.folder, self.device = Path(folder), model.get_input_embeddings().weight.device
        order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(fit.seed)).tolist()
        self.pictures = [pictures[index] for index in order]
        self.prompts = [_prompt_ids(processor, prompt, prompt_format, model.config) for prompt in prompts]
        image_token = model.config.image_token_id
        prefixes = {tuple(ids[: ids.index(image_token)]) for ids in self.prompts}
        if len(prefixes) > 1:
            raise ValueError(
                "the text in front of the image differs from prompt to prompt, and so do the LLaVA's visual states. "
                "Give a --prompt-format in which {prompt} comes after <image>."
            )
        self.prefix = prefixes.pop()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._check_settings(prompts, prompt_format)
        self._encode()
        # held-out images come first, so that they are the same whatever `fit.pictures` is
        count = len(self.kept)
        self.held_out = range(min(fit.held_out, max(count // 2, 1)))
        held_out, chosen_on = len(self.held_out), 0
        if fit.layers_to_choose:
            chosen_on = min(fit.choose_on, max((count - held_out) // 2, 1))
        self.choosing = range(held_out, held_out + chosen_on)
        self.fitted = range(self.choosing.stop, count)
        self._warn_of_few_images()

    def _warn_of_few_images(self) -> None:
        rows = sum(self.lengths[image] for image in self.fitted)
        inner = self.model.config.projector_hidden_size or self.model.config.text_config.hidden_size
        if rows < 10 * inner:
            enough = math.ceil(10 * inner * len(self.fitted) / max(rows, 1))
            self.log(
                f"warning: {len(self.fitted)} images have {rows} visual tokens, few for a projector {inner} wide: expect "
                f"larger errors on other images. {enough} images or more would be better."
            )

    def _check_settings(self, prompts: Sequence[str], prompt_format: str | None) -> None:
        """Writes the settings into the folder, or compares them with those that are there."""
        settings = {name: value for name, value in asdict(self.fit).items() if not name.startswith("distill_")}
        if self.fit.layers_to_choose:
            settings["visual_layers"] = "auto"  # one fit and one order serve any number
        else:
            del settings["choose_on"]
        settings |= {
            "prompts": list(prompts),
            "prompt_format": prompt_format,
            "dtype": str(self.model.get_input_embeddings().weight.dtype),
            "pictures_in_order": sha256("\n".join(map(_identity, self.pictures)).encode()).hexdigest(),
            "weights": _weights_digest(self.model),
        }
        path = self.folder / "settings.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            differ = [name for name, value in settings.items() if found.get(name) != value]
            if differ:
                raise ValueError(
                    f"{self.folder} was left by a run with other settings ({', '.join(differ)}). Remove it, or choose "
                    f"another --work-folder."
                )
            self.log(f"resuming from {self.folder}")
        else:
            others = [file.name for file in self.folder.iterdir()]
            if others:
                raise FileExistsError(
                    f"{self.folder} is not empty, and not the work folder of an earlier run: it holds {others[0]}."
                )
            write_json(path, settings)

    def _encode(self) -> None:
        """Writes the encoder's features of the images that can be read, of `fit.pictures` at most."""
        config, dtype = self.model.config, self.model.get_input_embeddings().weight.dtype
        most = min(len(self.pictures), self.fit.pictures)
        widths = {"features": config.vision_feature_size}
        if self.embed is not None:
            widths["seen"] = config.text_config.hidden_size
        record = self.folder / "pictures.json"
        if not record.exists():
            self._check_room(most * config.image_seq_length, widths)  # at least so many rows
            lengths, kept, skipped = self._write_features(most, list(widths))
            uses = ["to fit on", *(["to choose layers on"] if self.fit.layers_to_choose else []), "to measure on"]
            if len(kept) < len(uses):
                shutil.rmtree(self.folder)
                reason = f"; the first that cannot be read: {skipped[0]}" if skipped else ""
                raise ValueError(
                    f"{len(kept)} of the images can be read, and at least {len(uses)} are needed: "
                    f"{', '.join(f'one {use}' for use in uses)}{reason}"
                )
            self._check_room(sum(lengths), {})
            write_json(record, {"kept": kept, "skipped": skipped, "lengths": lengths})
        found = json.loads(record.read_text(encoding="utf-8"))
        self.kept, self.skipped, self.lengths = found["kept"], found["skipped"], found["lengths"]
        self._first = [0, *itertools.accumulate(self.lengths)]  # row of each image
        if self.skipped:
            named = "; ".join(self.skipped[:5]) + ("; ..." if len(self.skipped) > 5 else "")
            self.log(f"warning: skipped {len(self.skipped)} images that cannot be read: {named}")
        on_disk = {
            name: rows_on_disk(self._rows_file(name), (sum(self.lengths), n), dtype) for name, n in widths.items()
        }
        self.features = on_disk["features"]
        self.seen = on_disk.get("seen", self.features)

    def _write_features(self, most: int, names: list[str]) -> tuple[list[int], list[int], list[str]]:
        """Writes the files of `names`; returns how many rows each image has, the indices of the images that are in them, and
        why others are not."""
        lengths: list[int] = []
        kept: list[int] = []
        skipped: list[str] = []
        reading, dtype = iter(range(len(self.pictures))), self.model.get_input_embeddings().weight.dtype
        with ExitStack() as stack:
            streams = {name: stack.enter_context(self._rows_file(name).open("wb")) for name in names}
            while len(kept) < most:
                batch = self._read(reading, min(most - len(kept), IMAGES_AT_ONCE), skipped)
                if not batch:
                    break
                images = self._images([image for _, image in batch])
                with torch.no_grad():
                    made = {"features": list(self.model.get_image_features(**images).pooler_output)}
                    if self.embed is not None:
                        made["seen"] = self.embed(**images)
                for name, stream in streams.items():
                    rows = torch.cat(made[name]).to(dtype).cpu().contiguous()
                    stream.write(rows.view(torch.uint8).numpy().data)
                lengths += map(len, made["features"])
                kept += [index for index, _ in batch]
                show_progress(self.log, f"encoded {len(kept)} of {most} images", len(kept) == most)
        return lengths, kept, skipped

    def _rows_file(self, name: str) -> Path:
        return self.folder / f"{name}.bin"

    def _read(self, reading: Iterator[int], count: int, skipped: list[str]) -> list[tuple[int, PIL.Image.Image]]:
        """The next `count` images that can be read, with their indices."""
        batch = []
        for index in reading:
            try:
                batch.append((index, load_image(self.pictures[index], str(self.pictures[index]))))
            except (ValueError, OSError) as error:
                skipped.append(" ".join(str(error).split()))
            if len(batch) == count:
                break
        return batch

    def _check_room(self, rows: int, widths: dict[str, int]) -> None:
        """Raises OSError if there is no room for so many rows of `widths`, and of the states of two layers."""
        dtype, size = self.model.get_input_embeddings().weight.dtype, self.model.config.text_config.hidden_size
        needed = rows * dtype.itemsize * (sum(widths.values()) + 2 * size)
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"{self.folder} needs {needed / 1e9:.1f} GB for features and states, and {free / 1e9:.1f} GB are free. Use "
                f"fewer images (--pictures) or another --work-folder."
            )

    def _images(self, images: list[PIL.Image.Image]) -> dict[str, torch.Tensor]:
        return {name: x.to(self.device) for name, x in self.processor(images=images, return_tensors="pt").items()}

    def images(self, images: Sequence[int]) -> dict[str, torch.Tensor]:
        """The pixel values of images, and what else the model takes of them."""
        return self._images([self.pictures[self.kept[image]] for image in images])

    def ids(self, prompt: int, image: int) -> list[int]:
        """The ids of a prompt about an image, with a placeholder for each of its visual tokens."""
        ids, token = self.prompts[prompt], self.model.config.image_token_id
        place = ids.index(token)
        return [*ids[:place], *[token] * self.lengths[image], *ids[place + 1 :]]

    def rows(self, stored: torch.Tensor, images: Sequence[int]) -> torch.Tensor:
        """Those of images in `stored` (R, .), on the model's device."""
        return torch.cat([stored[self._first[image] : self._first[image + 1]] for image in images]).to(self.device)

    def span(self, images: range) -> slice:
        """The rows of a range of images."""
        return slice(self._first[images.start], self._first[images.stop])


def _identity(image: Any) -> str:
    """What an image is recognised by when a run resumes: path and size of a file, an address, or the pixels."""
    if isinstance(image, (str, os.PathLike)):
        return f"{image} {os.path.getsize(image) if os.path.isfile(image) else ''}"
    try:
        loaded = load_image(image)
    except ValueError:  # it will be skipped
        return "unreadable"
    return f"{loaded.size} {sha256(loaded.tobytes()).hexdigest()}"


def _weights_digest(model: torch.nn.Module) -> str:
    digest = sha256()
    for tensor in model.state_dict().values():  # a sample of each
        few = tensor.flatten()[:: max(1, tensor.numel() // 64)]
        digest.update(few.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _prompt_ids(processor: SaisaProcessor, prompt: str, prompt_format: str | None, config: SaisaConfig) -> list[int]:
    """The ids of a prompt about an image, which has one token in them."""
    ids, token = _expanded_ids(processor, prompt, prompt_format, config), config.image_token_id
    first = ids.index(token)
    return [id_ for place, id_ in enumerate(ids) if id_ != token or place == first]


def _expanded_ids(processor: SaisaProcessor, prompt: str, prompt_format: str | None, config: SaisaConfig) -> list[int]:
    blank = torch.zeros(*image_size(config.vision_config), 3, dtype=torch.uint8).numpy()
    if prompt_format is not None:
        if prompt_format.count(processor.image_token) != 1 or "{prompt}" not in prompt_format:
            raise ValueError(f"--prompt-format {prompt_format!r}: expected one {processor.image_token} and {{prompt}}.")
        return list(processor(images=blank, text=prompt_format.replace("{prompt}", prompt))["input_ids"][0])
    if processor.chat_template is None:
        raise ValueError(
            "this model has no chat template: give the text around a prompt, for instance --prompt-format "
            '"USER: <image>\\n{prompt} ASSISTANT:".'
        )
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
    inputs = processor.apply_chat_template(
        chat, images=blank, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(inputs["input_ids"][0])


# --- files ------------------------------------------------------------------------------------------------------------


def rows_on_disk(path: Path, shape: tuple[int, ...], dtype: torch.dtype, create: bool = False) -> torch.Tensor:
    """A tensor whose memory is the file `path`: it is read and written page by page, not held in memory."""
    size = math.prod(shape)
    if create:
        with path.open("wb") as stream:
            stream.truncate(size * dtype.itemsize)
            if hasattr(os, "posix_fallocate"):  # here a full disk is an error; when a mapped page is written, a crash
                os.posix_fallocate(stream.fileno(), 0, size * dtype.itemsize)
    return torch.from_file(str(path), shared=create, size=size, dtype=dtype).view(shape)


def write_json(path: Path, content: Any) -> None:
    """Writes a JSON file in one step: it is complete or not there."""
    partial = path.with_name(f"{path.name}.part")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Writes a safetensors file in one step."""
    partial = path.with_name(f"{path.name}.part")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial)
    os.replace(partial, path)
