# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The work folder: features, states and finished layers are kept on disk, so that memory stays bounded and an interrupted run
resumes where it stopped."""

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
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

    Attributes:
        features: (n, V, C), on disk. `held_out` and `fitted` are the ranges of its rows that are measured and fitted on.
        prompts: the prompts' ids, each with one image. `prefix` are the ids in front of the image, the same in all.
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
    ):
        self.model, self.processor, self.fit, self.log = model, processor, fit, log
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
        self.fitted = range(len(self.held_out), count)
        self._warn_of_few_images()

    def _warn_of_few_images(self) -> None:
        rows = len(self.fitted) * self.features.shape[1]
        inner = self.model.model.language_model.layers[0].visual_projector.linear_1.out_features
        if rows < 10 * inner:
            enough = math.ceil(10 * inner / self.features.shape[1])
            self.log(
                f"warning: {len(self.fitted)} images have {rows} visual tokens, few for a projector {inner} wide: expect "
                f"larger errors on other images. {enough} images or more would be better."
            )

    def _check_settings(self, prompts: Sequence[str], prompt_format: str | None) -> None:
        """Writes the settings into the folder, or compares them with those that are there."""
        settings = {name: value for name, value in asdict(self.fit).items() if not name.startswith("distill_")}
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
        shape = (config.image_seq_length, config.vision_feature_size)
        path, record = self.folder / "features.bin", self.folder / "pictures.json"
        if not record.exists():
            state_bytes = math.prod((most, shape[0], config.text_config.hidden_size, dtype.itemsize))
            self._check_room(math.prod((most, *shape, dtype.itemsize)) + 2 * state_bytes)
            kept, skipped = self._write_features(rows_on_disk(path, (most, *shape), dtype, create=True))
            if len(kept) < 2:
                shutil.rmtree(self.folder)
                reason = f"; the first that cannot be read: {skipped[0]}" if skipped else ""
                raise ValueError(
                    f"{len(kept)} of the images can be read, and at least 2 are needed: one to fit on, one to measure "
                    f"on{reason}"
                )
            write_json(record, {"kept": kept, "skipped": skipped})
        found = json.loads(record.read_text(encoding="utf-8"))
        self.kept, self.skipped = found["kept"], found["skipped"]
        if self.skipped:
            named = "; ".join(self.skipped[:5]) + ("; ..." if len(self.skipped) > 5 else "")
            self.log(f"warning: skipped {len(self.skipped)} images that cannot be read: {named}")
        self.features = rows_on_disk(path, (len(self.kept), *shape), dtype)

    def _write_features(self, features: torch.Tensor) -> tuple[list[int], list[str]]:
        """Fills `features`; returns the indices of the images that are in it, and why others are not."""
        kept: list[int] = []
        skipped: list[str] = []
        reading = iter(range(len(self.pictures)))
        while len(kept) < len(features):
            batch = self._read(reading, min(len(features) - len(kept), IMAGES_AT_ONCE), skipped)
            if not batch:
                break
            with torch.no_grad():
                encoded = self.model.get_image_features(self._pixels([image for _, image in batch])).pooler_output
            features[len(kept) : len(kept) + len(batch)] = encoded.to(features.dtype).cpu()
            kept += [index for index, _ in batch]
            last = len(kept) == len(features)
            show_progress(self.log, f"encoded {len(kept)} of {len(features)} images", last)
        return kept, skipped

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

    def _check_room(self, needed: int) -> None:
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise OSError(
                f"{self.folder} needs {needed / 1e9:.1f} GB for features and states, and {free / 1e9:.1f} GB are free. Use "
                f"fewer images (--pictures) or another --work-folder."
            )

    def _pixels(self, images: list[PIL.Image.Image]) -> torch.Tensor:
        return self.processor(images=images, return_tensors="pt")["pixel_values"].to(self.device)

    def pixels(self, rows: Sequence[int]) -> torch.Tensor:
        """The pixel values of the images with these rows in `features`."""
        return self._pixels([self.pictures[self.kept[row]] for row in rows])

    def features_of(self, rows: Sequence[int]) -> torch.Tensor:
        """(n, V, C) on the model's device."""
        return self.features[list(rows)].to(self.device)


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
    blank = torch.zeros(config.vision_config.image_size, config.vision_config.image_size, 3, dtype=torch.uint8).numpy()
    if prompt_format is not None:
        if prompt_format.count(processor.image_token) != 1 or "{prompt}" not in prompt_format:
            raise ValueError(f"--prompt-format {prompt_format!r}: expected one {processor.image_token} and {{prompt}}.")
        return list(processor(images=blank, text=prompt_format.replace("{prompt}", prompt))["input_ids"][0])
    if processor.chat_template is None:
        raise ValueError(
            "this LLaVA has no chat template: give the text around a prompt, for instance --prompt-format "
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
