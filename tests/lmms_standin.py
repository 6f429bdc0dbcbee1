# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the plug-in for lmms-eval uses of its API, for tests where it is not installed. `test_lmms.py` compares the signatures
with the real ones where it is."""

import sys
import types
from dataclasses import dataclass, field
from typing import Any


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None


@dataclass
class GenerationResult:
    text: str
    token_counts: TokenCounts | None = None


@dataclass
class Instance:
    request_type: str
    arguments: tuple
    idx: int
    metadata: dict = field(default_factory=dict)
    resps: list = field(default_factory=list)

    @property
    def args(self):
        return self.arguments


class CacheHook:
    def __init__(self, cachinglm=None) -> None:
        self.added = []

    def add_partial(self, attr, req, res) -> None:
        self.added.append((attr, req, res))


class lmms:
    is_simple = True

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.cache_hook = CacheHook(None)
        self.task_dict = {}

    @staticmethod
    def _resolve_system_prompt(value: str) -> str:
        return value

    def _apply_system_prompt(self, messages: list, system_prompt: str) -> list:
        return [{"role": "system", "content": [{"type": "text", "text": system_prompt}]}, *messages]

    @property
    def rank(self):
        return self._rank

    @property
    def world_size(self):
        return self._world_size

    def loglikelihood(self, requests):
        raise NotImplementedError

    def generate_until(self, requests):
        raise NotImplementedError

    def generate_until_multi_round(self, requests):
        raise NotImplementedError


@dataclass(frozen=True)
class ModelManifest:
    model_id: str
    simple_class_path: Any = None
    chat_class_path: Any = None
    aliases: tuple = ()


MODULES = {
    "lmms_eval.api.instance": (TokenCounts, GenerationResult, Instance),
    "lmms_eval.api.model": (lmms, CacheHook),
    "lmms_eval.models.registry_v2": (ModelManifest,),
}


def install() -> None:
    """Puts the stand-in where `import lmms_eval` finds it."""
    for name in ("lmms_eval", "lmms_eval.api", "lmms_eval.models"):
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = []
    for name, members in MODULES.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update({member.__name__: member for member in members})
