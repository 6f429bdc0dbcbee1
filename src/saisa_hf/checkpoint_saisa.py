# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints: the code that travels beside the weights, the names of tensors in files, and loading and saving."""

import copy
import importlib
import os
import shutil
import tempfile
from pathlib import Path

import torch
from transformers import PretrainedConfig

from .compat_saisa import encoder_names_of_all_releases, load_options
from .hardware_saisa import check_backend, check_device_map, check_tensor_parallelism, settle, with_precise_modules
from .language_models_saisa import choose_attention, initialize
from .vision_saisa import NESTED_ENCODERS, has_choice_of_attention


# The same in every checkpoint, whichever release saved it: 5.x has no AutoModelForVision2Seq, but 4.57 looks for it, and
# `transformers serve` loads by AutoModelForMultimodalLM, which 4.57 does not have.
AUTO_MAP = {
    "AutoConfig": "configuration_saisa.SaisaConfig",
    "AutoModel": "modeling_saisa.SaisaModel",
    "AutoModelForImageTextToText": "modeling_saisa.SaisaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_saisa.SaisaForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_saisa.SaisaForConditionalGeneration",
    "AutoProcessor": "processing_saisa.SaisaProcessor",
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}

# encoders that transformers 5.6 and later save without the level `vision_model`
VISION_MODEL_NAMES = {
    r"vision_tower\.(?=embeddings\.(?:class_embedding|patch_embedding\.|position_embedding\.)|encoder\.layers\."
    r"|pre_layrnorm\.|post_layernorm\.|head\.)": "vision_tower.vision_model."
}


# --- code -------------------------------------------------------------------------------------------------------------


def code_files() -> list[Path]:
    """The modules that a checkpoint carries: this file and its siblings whose names end in `_saisa.py`."""
    return sorted(Path(__file__).parent.glob("*_saisa.py"))


def write_code_files(save_directory) -> None:
    """Copies `code_files()` into the folder `save_directory`, which is made if need be.

    Each file is written under a temporary name and renamed, so that a reader never meets half a module.
    """
    target = Path(save_directory)
    target.mkdir(parents=True, exist_ok=True)
    for source in code_files():
        destination = target / source.name
        if destination.exists() and destination.samefile(source):
            continue
        handle, temporary = tempfile.mkstemp(dir=target, prefix=f".{source.name}.")
        os.close(handle)
        try:
            shutil.copyfile(source, temporary)
            os.chmod(temporary, 0o644)
            os.replace(temporary, destination)
        except BaseException:
            os.unlink(temporary)
            raise


def from_package(feature: str, module: str, name: str):
    """`name` of `saisa_hf.module`, which does not travel with checkpoints.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        return getattr(importlib.import_module(f"saisa_hf.{module}"), name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "saisa_hf":
            raise
        raise ImportError(
            f"{feature} is not among the code that travels with a checkpoint: install the package saisa_hf for it."
        ) from error


# --- loading and saving -----------------------------------------------------------------------------------------------


class SaisaCheckpoint:
    """The part of `SaisaPreTrainedModel` that loads and saves, and that answers what transformers asks meanwhile."""

    def save_pretrained(
        self, save_directory, is_main_process=True, state_dict=None, *args, push_to_hub=False, **kwargs
    ):
        """transformers' own. The config brings the code files, so that `trust_remote_code=True` loads the folder anywhere.

        Tensors have the names that they have in the model, which are the same on every transformers release; an encoder whose
        modules transformers 5 has renamed keeps their older names, which all releases read.
        """
        names = ("repo_id", "commit_message", "commit_description", "private", "create_pr", "revision", "tags")
        hub_arguments = {name: kwargs.pop(name) for name in names if name in kwargs}
        pushed = None if state_dict is None else dict(state_dict)  # 5.x empties the one that it is given
        with encoder_names_of_all_releases(self) as options:
            super().save_pretrained(save_directory, is_main_process, state_dict, *args, **{**kwargs, **options})
        if push_to_hub and is_main_process:
            shared = {name: kwargs[name] for name in ("token", "max_shard_size", "variant") if name in kwargs}
            shared |= {"repo_id": Path(save_directory).resolve().name, "state_dict": pushed, **hub_arguments}
            self.push_to_hub(**shared)

    def push_to_hub(self, repo_id, **kwargs):
        """Uploads weights, config, code files and a model card, in one commit that leaves no stale weights behind; arguments
        as in `PreTrainedModel.push_to_hub`, whose own upload takes the place of all this where saisa_hf is not installed."""
        try:
            push = from_package("The model card", "checkpoints.push", "push_model_to_hub")
        except ImportError:
            return super().push_to_hub(repo_id, **kwargs)
        return push(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """transformers' own, which does not leave single tensors of the base model at their random initial values, and whose
        `quantization_config` leaves alone what `KEPT_PRECISE` names, unless it names modules itself. A checkpoint of a
        `LlavaForConditionalGeneration` is loaded as that model, in embedding space.

        Raises:
            ValueError: tensors of the encoder, the projectors, the language model or the head are not in the checkpoint;
                `device_map` splits a decoder layer; or `tp_plan` has more shards than heads to share out.
            ImportError: the checkpoint or `quantization_config` needs bitsandbytes, which is missing or too old.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        encoder_type, quantization, is_llava = _described(pretrained_model_name_or_path, kwargs)
        kwargs["key_mapping"] = {**_other_names(encoder_type, is_llava), **(kwargs.get("key_mapping") or {})}
        check_device_map(kwargs.get("device_map"))
        if any(kwargs.get(name) is not None for name in ("tp_plan", "tp_size", "distributed_config")):
            config = kwargs.get("config")
            if not hasattr(config, "text_config"):
                config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **_of_files(kwargs))
            check_tensor_parallelism(config.text_config, kwargs)
        check_backend(quantization or kwargs.get("quantization_config"))
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = with_precise_modules(kwargs["quantization_config"])
        kwargs |= load_options(bool(quantization or kwargs.get("quantization_config")), kwargs)
        model, info = super().from_pretrained(pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs)
        settle(model)
        if pretrained_model_name_or_path is not None:
            _check_complete(model, info, pretrained_model_name_or_path)
        return (model, info) if wants_info else model

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]  # PreTrainedModel's
        if getattr(config, "in_embedding_space", False):
            self._no_split_modules = ["EmbeddingSpaceLayer"]  # FSDP insists on finding every class that is named

    def get_decoder(self):
        return getattr(self.base_model, "language_model", self.base_model)

    def set_decoder(self, decoder):
        self.base_model.language_model = decoder

    def get_input_embeddings(self):
        return self.get_decoder().embed_tokens

    def set_input_embeddings(self, value):
        self.get_decoder().embed_tokens = value

    def set_attn_implementation(self, attn_implementation, *args, **kwargs):
        """transformers' own; a convolutional encoder, which has no attention, is left out of what is meant for all."""
        vision = getattr(self.config, "vision_config", None)
        if isinstance(attn_implementation, str) and vision is not None and not has_choice_of_attention(vision):
            attn_implementation = {"": attn_implementation, "text_config": attn_implementation}
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        choose_attention(self.config.get_text_config())

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        initialize(module)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # transformers would look for its own names in the text of the model's file

    @classmethod
    def is_custom_code(cls) -> bool:
        return False  # the weights are initialised by transformers' own rules, which it does not trust foreign code to follow

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Nothing to do: the config's `auto_map` is complete as it stands."""


class UnsharesProjectors:
    """The part of `SaisaModel` that makes a checkpoint of the paper's first training stage one of its second."""

    def unshare_projectors(self):
        """Copies the projector that all layers share into every layer that sees the image: the step from the paper's first
        training stage to its second. What the model computes stays the same; `config.projector_sharing` is `"per_layer"`
        from here on. An optimizer that was made before does not know the copies.

        Raises:
            ValueError: the projectors are not shared, or the model is in embedding space.
        """
        if self.config.in_embedding_space:
            raise ValueError("unshare_projectors: alignment is 'embedding_space', where one projector serves for good.")
        if self.config.projector_sharing != "shared":
            raise ValueError(
                f"unshare_projectors: config.projector_sharing is {self.config.projector_sharing!r}, expected 'shared'. "
                "Each layer has a projector of its own already."
            )
        for layer in self.language_model.layers:
            if layer.sees_image:
                device = next(layer.self_attn.parameters()).device
                layer.visual_projector = copy.deepcopy(self.visual_projector).to(device)
        del self.visual_projector
        self.config.projector_sharing = "per_layer"


class BuiltFromParts:
    """The part of `SaisaForConditionalGeneration` that makes an untrained model."""

    @classmethod
    def from_parts(cls, text_model, vision_model, *, image_token_id=None, dtype=None, **arguments):
        """
        An untrained model from a language model and a vision encoder. On text alone it is that language model; its
        projectors are new: each linear map's weights and biases are uniform in +-1 / sqrt(inputs), as LLaVA's code makes
        them. The package saisa_hf has to be installed.

        Args:
            text_model: folder or hub id of a language model of a supported family, or a model of transformers with its
                head. The tensors of a model are shared, not copied.
            vision_model: folder or hub id of a vision encoder, also of a CLIP or SigLIP with a text tower, or an encoder of
                transformers, which becomes the vision tower itself.
            image_token_id: the image token's index. If embedding and head have no such row, they get rows up to it, the mean
                of the old ones, which `generation_config.suppress_tokens` keeps out of answers. None: the first new row.
            dtype: of all weights; None is the language model's.
            arguments: of `SaisaConfig`: `vision_feature_layer`, `visual_layers`, `projector_hidden_size` ...

        Returns:
            the model in eval mode, with the language model's generation config.

        Raises:
            ImportError: saisa_hf is not installed.
            ValueError: a part is of no supported kind, is quantized, lacks tensors, or does not fit the arguments.
            OSError: a folder or repository cannot be read.
        """
        assemble = from_package("from_parts", "checkpoints.parts", "assemble")
        return assemble(cls, text_model, vision_model, image_token_id=image_token_id, dtype=dtype, **arguments)


def _check_complete(model, info: dict, checkpoint) -> None:
    """Raises ValueError if tensors of the model's own parts were not in the checkpoint."""
    parts = ["vision_tower.", "visual_projector.", "visual_resampler.", "language_model."]
    if model.config.architectures != ["SaisaModel"]:  # which has no head to lack
        parts.append("lm_head.")
    wanted = {key for key in model.state_dict() if any(part in key for part in parts)}
    missing = sorted(wanted & set(info["missing_keys"]))
    # transformers' own tests write a checkpoint without any weights as a file with one foreign tensor
    without_weights = set(missing) == wanted and len(info["unexpected_keys"]) <= 1
    if missing and not without_weights:
        raise ValueError(
            f"{checkpoint}: the checkpoint lacks {len(missing)} tensors of the model: {', '.join(missing[:20])}"
            f"{', ...' if len(missing) > 20 else ''}. They would be left at random values. Save the whole model again, or "
            "convert the checkpoint with its vision tower (`saisa convert`)."
        )


def _other_names(encoder_type: str, of_llava: bool) -> dict[str, str]:
    """Patterns of the names that tensors have in checkpoints of other layouts, and what they become."""
    level = "vision_model." if encoder_type in NESTED_ENCODERS else ""
    if of_llava:
        return from_package("Reading a LLaVA", "checkpoints.llava", "tensor_names")(level)
    return VISION_MODEL_NAMES if level else {}


def _described(checkpoint, kwargs: dict) -> tuple[str, dict | None, bool]:
    """The `model_type` of the encoder of `checkpoint`, its quantization, and whether its tensors have a LLaVA's names, given
    the arguments of `from_pretrained`."""
    config, found = kwargs.get("config"), {}
    given = hasattr(config, "vision_config")
    if not given or (config.in_embedding_space and checkpoint is not None):
        try:
            source = checkpoint if given else config or checkpoint
            found, _ = PretrainedConfig.get_config_dict(source, **_of_files(kwargs))
        except OSError:
            if not given:
                raise
    is_llava = found.get("model_type") == "llava"
    if given:
        return config.vision_config.model_type, getattr(config, "quantization_config", None), is_llava
    encoder_type = (found.get("vision_config") or {}).get("model_type", "clip_vision_model")
    return encoder_type, found.get("quantization_config"), is_llava


def _of_files(kwargs: dict) -> dict:
    """Those of the arguments of `from_pretrained` that say how to read a file."""
    names = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
    return {name: kwargs[name] for name in names if name in kwargs}
