# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""transformers' Auto classes of models that answer about images with text, as far as the installed release has them."""

from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForPreTraining

from .compat_saisa import optional


AutoModelForVision2Seq = optional("transformers", "AutoModelForVision2Seq")
if AutoModelForVision2Seq is None:

    class AutoModelForVision2Seq(AutoModelForImageTextToText):
        """transformers 4's Auto class, which 5.x no longer has. It finds what `AutoModelForImageTextToText` finds."""


AUTO_CLASSES = {AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForPreTraining, AutoModelForVision2Seq}
AUTO_CLASSES |= {optional("transformers", "AutoModelForMultimodalLM", AutoModelForImageTextToText)}
