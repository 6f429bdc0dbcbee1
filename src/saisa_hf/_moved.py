# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Modules under the names that they had before each got its room: `saisa_hf.flops` is `saisa_hf.costs.flops`."""

import importlib
import importlib.abc
import importlib.util
import sys


MOVED = {
    "adapters_saisa": "token_layout_saisa",
    "attention_maps": "inspection.attention_maps",
    "attention_pages": "inspection.attention_pages",
    "build": "checkpoints.build",
    "chat_templates": "chat.templates",
    "convert": "checkpoints.convert",
    "destination": "common.destination",
    "devices_saisa": "hardware_saisa",
    "encoders_saisa": "vision_saisa",
    "fit": "costs.memory",
    "flops": "costs.flops",
    "from_llava": "checkpoints.from_llava",
    "hub_saisa": "checkpoint_saisa",
    "loss_saisa": "head_saisa",
    "model_card_saisa": "checkpoints.model_card",
    "naavit": "inspection.naavit",
    "parts_saisa": "checkpoints.parts",
    "pictures_saisa": "images_saisa",
    "plots": "common.plots",
    "presets": "costs.presets",
    "quantization_saisa": "hardware_saisa",
    "redundancy": "inspection.redundancy",
    "tables": "common.tables",
    "upgrade": "checkpoints.upgrade",
    "visual_reduction_saisa": "vision_saisa",
    "weight_files": "checkpoints.weight_files",
}
# module: former names of what it holds, and the names of today
RENAMED = {"images_saisa": {"load_picture": "load_image", "PictureError": "ImageError"}}


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module under its former name, and hands out the one that there is."""

    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.rpartition(".")
        if package != __package__ or name not in MOVED:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def exec_module(self, module):
        name = MOVED[module.__name__.rpartition(".")[2]]
        moved = sys.modules[module.__name__] = importlib.import_module(f".{name}", __package__)
        for former, current in RENAMED.get(name, {}).items():
            setattr(moved, former, getattr(moved, current))


def install() -> None:
    """Lets the former names be imported."""
    sys.meta_path.insert(0, _MovedModules())
