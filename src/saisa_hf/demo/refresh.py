# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Saves the shipped checkpoint again with the code files, the config and the processor of the installed package. The weights
stay as they are. Run it, as `python -m saisa_hf.demo.refresh`, after a change to a file that travels with checkpoints."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from ..modeling_saisa import SaisaForConditionalGeneration
from ..processing_saisa import SaisaProcessor
from . import CHECKPOINT
from .train import save


def refresh(checkpoint: str | Path = CHECKPOINT) -> None:
    """Reads the checkpoint with the package's own classes and saves it to the same folder."""
    checkpoint = Path(checkpoint)
    model = SaisaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float16)
    processor = SaisaProcessor.from_pretrained(checkpoint)
    record = checkpoint / "training.json"
    save(model, processor, checkpoint, json.loads(record.read_text()) if record.exists() else None)


def main(argv: list[str] | None = None) -> int:
    """`python -m saisa_hf.demo.refresh`."""
    parser = argparse.ArgumentParser(prog="python -m saisa_hf.demo.refresh", description=__doc__.split(". ")[0] + ".")
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder (default: the shipped checkpoint)")
    refresh(parser.parse_args(argv).checkpoint)
    return 0


if __name__ == "__main__":
    sys.exit(main())
