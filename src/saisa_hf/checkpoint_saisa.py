# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints: the code that travels beside the weights, the names of tensors in files, and loading and saving."""

import copy
import importlib
import inspect
import json
import shutil
from contextlib import nullcontext, suppress
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PretrainedConfig

from .compat_saisa import encoder_names_of_all_releases, warn_once
from .hardware_saisa import check_backend, check_device_map, check_tensor_parallelism, settle, with_precise_modules
from .language_models_saisa import choose_attention, initialize
from .saving_saisa import check_finished, saved_together
from .vision_saisa import NESTED_ENCODERS, has_choice_of_attention


# Whichever release saves it: 4.57 looks for AutoModelForVision2Seq, `transformers serve` for AutoModelForMultimodalLM,
# pipeline("text-generation"), which knows transformers' own classes by their names, for AutoModelForCausalLM.
CHAT_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
CHAT_CLASSES += ("AutoModelForPreTraining", "AutoModelForVision2Seq")
PROCESSOR_AUTO_MAP = {"AutoProcessor": "processing_saisa.SaisaProcessor"}
AUTO_MAP = {"AutoConfig": "configuration_saisa.SaisaConfig", "AutoModel": "modeling_saisa.SaisaModel"}
AUTO_MAP |= dict.fromkeys(CHAT_CLASSES, "modeling_saisa.SaisaForConditionalGeneration") | PROCESSOR_AUTO_MAP
# of transformers, read as the same models in embedding space
LLAVAS = ("llava", "llava_next", "llava_onevision")
# of `from_pretrained`, how to read a file; of `save_pretrained`, what is for `push_to_hub` alone
FILE_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
HUB_ARGUMENTS = ("repo_id", "commit_message", "commit_description", "private", "create_pr", "revision", "tags")
# encoders that transformers 5.6 and later save without the level `vision_model`
VISION_MODEL_NAMES = {
    r"vision_tower\.(?=embeddings\.(?:class_embedding|patch_embedding\.|position_embedding\.)|encoder\.layers\."
    r"|pre_layrnorm\.|post_layernorm\.|head\.)": "vision_tower.vision_model."
}


def code_files() -> list[Path]:
    """The modules that a checkpoint carries: this file and its siblings whose names end in `_saisa.py`."""
    return sorted(Path(__file__).parent.glob("*_saisa.py"))


def write_code_files(save_directory) -> None:
    """Copies `code_files()` into a folder."""
    for source in code_files():
        shutil.copyfile(source, Path(save_directory, source.name))


def from_package(feature: str, module: str, name: str):
    """`name` of `saisa_hf.module`, which does not travel with checkpoints: an ImportError where it is not installed."""
    try:
        return getattr(importlib.import_module(f"saisa_hf.{module}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "saisa_hf":
            raise
        raise ImportError(f"{feature} needs the package saisa_hf, which no checkpoint carries: install it.") from error


class SaisaCheckpoint:
    """The part of `SaisaPreTrainedModel` that loads and saves, and that answers what transformers asks meanwhile."""

    def save_pretrained(self, save_directory, is_main_process=True, state_dict=None, *args, **kwargs):
        """transformers' own; the config brings the code files, and all come into the folder together (`saving_saisa.py`).
        Tensors have their names in the model, on every release; where transformers 5 has renamed an encoder's modules, the
        older names, which all releases read."""
        push_to_hub = kwargs.pop("push_to_hub", False)
        hub = {name: kwargs.pop(name) for name in HUB_ARGUMENTS if name in kwargs}
        pushed = None if state_dict is None else dict(state_dict)  # 5.x empties the one that it is given
        in_parts = kwargs.get("distributed_checkpoint", False)  # each process writes its own, with others' of no use
        together = nullcontext(save_directory) if in_parts else saved_together(save_directory, is_main_process)
        with encoder_names_of_all_releases(self) as options, together as folder:
            super().save_pretrained(folder, is_main_process, state_dict, *args, **{**kwargs, **options})
        wait = getattr(self, "barrier_after_gathered_checkpoint_save", None)  # before, the files were not in place yet
        if wait is not None:
            wait(getattr(self.config, "distributed_config", None))
        if push_to_hub and is_main_process:
            shared = {name: kwargs[name] for name in ("token", "max_shard_size", "variant") if name in kwargs}
            self.push_to_hub(**{"repo_id": Path(save_directory).resolve().name, "state_dict": pushed, **shared, **hub})

    def push_to_hub(self, repo_id, **kwargs):
        """Uploads weights, config, code files and a model card in one commit that leaves no stale weights behind. Arguments
        as in `PreTrainedModel.push_to_hub`, whose own upload takes the place of this one without the package saisa_hf."""
        try:
            push = from_package("The model card", "checkpoints.push", "push_model_to_hub")
        except ImportError:
            if any(kwargs.get(name) is not None for name in ("state_dict", "variant")):
                raise  # transformers' own does not take them
            known = inspect.signature(super().push_to_hub).parameters
            return super().push_to_hub(repo_id, **{name: value for name, value in kwargs.items() if name in known})
        return push(self, repo_id, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """transformers' own, but all tensors of the base model have to be there, and `quantization_config` leaves alone what
        `KEPT_PRECISE` names, unless it names modules itself. A `LlavaForConditionalGeneration` is read, in embedding space.

        Raises:
            ValueError: the checkpoint lacks tensors, a weight file is damaged or does not fit config.json (OSError where that
                is what transformers raises), `device_map` splits a layer, or `tp_plan` has more shards than heads.
            ImportError: the checkpoint or `quantization_config` needs bitsandbytes, which is missing or too old.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        check_finished(pretrained_model_name_or_path, ("config.json",), kwargs.get("subfolder"))
        config, files = kwargs.get("config"), {name: kwargs[name] for name in FILE_ARGUMENTS if name in kwargs}
        names, quantization = _described(pretrained_model_name_or_path, config, files)
        kwargs["key_mapping"] = {**names, **(kwargs.get("key_mapping") or {})}
        check_device_map(kwargs.get("device_map"))
        if any(kwargs.get(name) is not None for name in ("tp_plan", "tp_size", "distributed_config")):
            if not hasattr(config, "text_config"):
                config = cls.config_class.from_pretrained(config or pretrained_model_name_or_path, **files)
            check_tensor_parallelism(config.text_config, kwargs)
        if quantization := quantization or kwargs.get("quantization_config"):
            check_backend(quantization)
            if not kwargs.keys() & {"dtype", "torch_dtype"}:
                kwargs["dtype"] = "auto"  # 4.57 would take float16
        if kwargs.get("quantization_config") is not None:
            kwargs["quantization_config"] = with_precise_modules(kwargs["quantization_config"])
        kwargs["output_loading_info"] = True
        read = (cls, pretrained_model_name_or_path, config, files, kwargs)
        try:
            model, info = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        except Exception as error:
            if (fault := _fault_of_weights(*read)) is None:
                raise
            raise (OSError if isinstance(error, OSError) else ValueError)(fault) from error
        if info["missing_keys"] and (fault := _fault_of_weights(*read)) is not None:
            raise ValueError(fault)
        settle(model)
        _check_complete(model, info, pretrained_model_name_or_path)
        if getattr(model.config, "fold_projectors", False):
            try:
                model.fold_projectors()
            except ImportError as error:
                warn_once(f"{error} Until then nothing is folded.")
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

    # transformers would look for its own names in the text of the model's file
    _can_set_attn_implementation = classmethod(lambda cls: True)
    # the weights are initialised by transformers' own rules, which it does not trust foreign code to follow
    is_custom_code = classmethod(lambda cls: False)

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Nothing to do: the config's `auto_map` is complete as it stands."""


class UnsharesProjectors:
    def unshare_projectors(self):
        """Copies the projector that all layers share into every layer that sees the image, for the paper's second training
        stage. The model computes the same. An optimizer that was made before does not know the copies. Raises ValueError if
        the projectors are not shared, or the model is in embedding space."""
        space, mode = self.config.alignment, self.config.projector_sharing
        if (space, mode) != ("input_space", "shared"):
            problem = f"alignment is {space!r}, projector_sharing {mode!r}, expected 'shared' in input space"
            raise ValueError(f"unshare_projectors: {problem}. Load a checkpoint of the first stage.")
        self.unfold_projectors()
        seeing = [layer for layer in self.language_model.layers if layer.sees_image]
        for layer in seeing:
            layer.visual_projector = copy.deepcopy(self.visual_projector).to(next(layer.self_attn.parameters()).device)
        del self.visual_projector
        self.config.projector_sharing = "per_layer"


class BuiltFromParts:
    @classmethod
    def from_parts(cls, text_model, vision_model, *, image_token_id=None, dtype=None, **arguments):
        """An untrained model in eval mode: the language model on text alone, with new projectors. Needs the package saisa_hf.

        Args:
            text_model, vision_model: folder or hub id, or a model of transformers; the language model with its head.
            image_token_id: the image token's index; None: the first that the vocabulary lacks.
            dtype: of all weights; None: the language model's.
            arguments: of `SaisaConfig`: `vision_feature_layer`, `visual_layers`, `projector_hidden_size` ...
        """
        assemble = from_package("from_parts", "checkpoints.parts", "assemble")
        return assemble(cls, text_model, vision_model, image_token_id=image_token_id, dtype=dtype, **arguments)


def _check_complete(model, info: dict, checkpoint) -> None:
    """Raises ValueError if tensors of the model's own parts were not in the checkpoint."""
    head = () if model.config.architectures == ["SaisaModel"] else ("lm_head.",)
    parts = ("vision_tower.", "visual_projector.", "visual_resampler.", "language_model.", *head)
    wanted = {key for key in model.state_dict() if any(part in key for part in parts)}
    missing = sorted(wanted.intersection(info["missing_keys"]))
    # transformers' own tests write a checkpoint without any weights as a file with one foreign tensor
    without_weights = len(missing) == len(wanted) and len(info["unexpected_keys"]) <= 1
    if missing and not without_weights and checkpoint is not None:
        listed = ", ".join(missing[:20] + (["..."] if len(missing) > 20 else []))
        lacking = f"{checkpoint} lacks {len(missing)} of the model's tensors: {listed}"
        raise ValueError(f"{lacking}. Save the whole model, or convert its vision tower too: `saisa convert`.")


def _fault_of_weights(cls, checkpoint, config, files: dict, given: dict) -> str | None:
    """What is wrong with the weight files that `from_pretrained` reads; None if nothing is found. The package looks into
    tensors as well."""
    with suppress(ImportError):
        find = from_package("Looking into weights", "checkpoints.weight_faults", "fault_of_weights")
        return find(cls, checkpoint, config, files, given)
    for file in sorted(Path(checkpoint or "", files.get("subfolder") or "").glob("model*.safetensors*")):
        try:  # what transformers does with it
            index = json.loads(file.read_bytes()) if file.suffix == ".json" else None
            sorted({*index["weight_map"].values(), *index["metadata"]} if index else safe_open(file, "pt").keys())
        except Exception as error:
            return f"{file} cannot be read: {type(error).__name__}: {error}. Download or copy it again."
    return None


def _described(checkpoint, config, files: dict) -> tuple[dict[str, str], dict | None]:
    """What tensors in `checkpoint` that have other names than in the model become, by patterns, and how it is quantized."""
    found, given = {}, hasattr(config, "vision_config")
    if not given or (config.in_embedding_space and checkpoint is not None):
        with suppress(OSError) if given else nullcontext():
            found, _ = PretrainedConfig.get_config_dict(checkpoint if given else config or checkpoint, **files)
    if given:
        own = {"model_type": config.vision_config.model_type}
        found = {**found, "vision_config": own, "quantization_config": getattr(config, "quantization_config", None)}
    encoder_type = (found.get("vision_config") or {}).get("model_type", "clip_vision_model")
    level = "vision_model." if encoder_type in NESTED_ENCODERS else ""
    names = VISION_MODEL_NAMES if level else {}
    if found.get("model_type") in LLAVAS:
        names = from_package("Reading a LLaVA", "checkpoints.llava", "tensor_names")(level)
    return names, found.get("quantization_config")
