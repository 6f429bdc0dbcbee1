# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""SAISA in transformers' Auto classes, without importing transformers for it.

After `import saisa_hf`, `AutoModelForImageTextToText.from_pretrained` has to know SAISA, and `saisa --help` must not wait for
torch. So registration waits for transformers: it happens right now if transformers is imported already, else at the end of
`import transformers`, through a hook in the import system. Its Auto classes cannot be reached any earlier than that.
"""

import importlib.abc
import importlib.util
import logging
import sys


def register() -> None:
    """Makes SAISA's classes known to the Auto classes, and logs a line if transformers is newer than what was tested."""
    from transformers import AutoConfig, AutoModel, AutoProcessor

    from .auto_classes import AUTO_CLASSES
    from .configuration_saisa import SaisaConfig
    from .modeling_saisa import SaisaForConditionalGeneration, SaisaModel
    from .processing_saisa import SaisaProcessor

    warn_if_untested()
    AutoConfig.register("saisa", SaisaConfig)
    AutoModel.register(SaisaConfig, SaisaModel)
    AutoProcessor.register(SaisaConfig, SaisaProcessor)
    for auto_class in AUTO_CLASSES:
        auto_class.register(SaisaConfig, SaisaForConditionalGeneration)


def warn_if_untested() -> None:
    """Logs a line where the installed transformers is newer than all that were tested."""
    from .compat_saisa import NEWEST_TESTED, TESTED_RELEASES, VERSION, transformers

    if VERSION > NEWEST_TESTED:
        logging.getLogger(__name__).warning(
            f"saisa_hf was tested with transformers {TESTED_RELEASES}; {transformers.__version__} is newer. If something "
            "fails, take one of those or a newer saisa_hf."
        )


def install() -> None:
    """Registers now, or as soon as transformers is there."""
    if "transformers" in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _UntilTransformers())


class _UntilTransformers(importlib.abc.MetaPathFinder):
    """Follows imports of transformers and of what `register` imports, and registers when the outermost ends: one of our
    files that brings transformers in is not complete before."""

    def __init__(self):
        self.depth = 0
        self.asking = None  # the module that the other finders are asked for

    def find_spec(self, fullname, path=None, target=None):
        ours = fullname.startswith(f"{__package__}.") and fullname.endswith(("_saisa", ".auto_classes"))
        if fullname == self.asking or not (ours or fullname == "transformers"):
            return None
        self.asking = fullname
        spec = importlib.util.find_spec(fullname)
        self.asking = None
        if spec is not None:
            spec.loader = _Followed(spec.loader, self)
        return spec

    def ended(self) -> None:
        if self.depth == 0 and "transformers" in sys.modules and self in sys.meta_path:
            sys.meta_path.remove(self)
            register()


class _Followed(importlib.abc.Loader):
    """A loader that tells the finder when it begins and when it is done."""

    def __init__(self, loader, finder):
        self.loader, self.finder = loader, finder

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = module.__loader__ = self.loader
        self.finder.depth += 1
        try:
            self.loader.exec_module(module)
        finally:
            self.finder.depth -= 1
        self.finder.ended()
