# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa build --from-llava`: a trained LLaVA becomes a SAISA, without any training on text.

Language model and vision encoder are the LLaVA's own. In a causal LLaVA the hidden states of visual tokens depend on nothing
but the image and the text in front of it. So layer i's projector can be fitted, by regression on the encoder's features of
any images, to the states that LLaVA's visual tokens have at the input of layer i. Layer 0 gets LLaVA's projector.

    run.py          the whole way, top to bottom
    settings.py     how projectors are fitted
    places.py       images, work folder, destination; also of `saisa compress`
    reading.py      LLaVA checkpoints, folders of images
    model.py        the SAISA of a LLaVA before anything is fitted
    teacher.py      the LLaVA's logits, answers and states
    work_folder.py  features and prompts, on disk
    states.py       the LLaVA's visual states, layer by layer
    fitting.py      each layer's projector: closed form, then descent
    agreement.py    how near the SAISA is to the LLaVA
    choosing.py     which layers need to see the image
    distilling.py   the projectors learn from the LLaVA's answers
    descent.py      the optimiser of both
    reporting.py    progress and report as text

Shapes: n images, V visual tokens of one, C width of the encoder's features, D hidden size, I inner width of a projector,
R rows (tokens) of a batch or of all images, S tokens of a prompt with its image and its answer, X vocabulary.
"""

from .agreement import agreement, answered
from .choosing import choose_layers
from .distilling import distill
from .fitting import LayerFit, fit_projectors
from .model import processor_from_llava, saisa_from_llava
from .reading import load_llava, picture_files
from .reporting import report_text
from .run import REPORT, from_llava
from .settings import PROMPTS, Fit, read_prompts
from .teacher import Teacher
from .work_folder import Workbench


__all__ = [
    "PROMPTS",
    "REPORT",
    "Fit",
    "LayerFit",
    "Teacher",
    "Workbench",
    "agreement",
    "answered",
    "choose_layers",
    "distill",
    "fit_projectors",
    "from_llava",
    "load_llava",
    "picture_files",
    "processor_from_llava",
    "read_prompts",
    "report_text",
    "saisa_from_llava",
]
