# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Every difference between the supported transformers releases (4.57 to 5.x) that this package has to know."""

import contextlib
import copy
import importlib.util
import inspect
import re

import torch
import transformers
from torch import nn
from transformers import image_utils
from transformers.cache_utils import Cache, DynamicLayer
from transformers.masking_utils import (
    create_causal_mask,
    create_masks_for_generate,
    create_sliding_window_causal_mask,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto import modeling_auto
from transformers.processing_utils import ProcessorMixin


TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5


# --- configs ----------------------------------------------------------------------------------------------------------


def readable_config_dict(config: dict) -> dict:
    """`config`, a sub-config written by any release, with the rotary settings in the form the installed one reads.

    4.x has `rope_theta` and `rope_scaling`, 5.x one dict `rope_parameters`. Read by the other, either is ignored in
    silence, so that a theta of 500000 turns into 10000.
    """
    config = dict(config)
    rope = config.get("rope_parameters")
    if rope is None:
        return config
    for name in ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"):
        config.pop(name, None)
    if not TRANSFORMERS_5:
        del config["rope_parameters"]
        config |= {name: value for name, value in _rope_of_4(rope, config).items() if value is not None}
    return config


def portable_config_dict(config: dict) -> dict:
    """`config`, a sub-config as the installed release writes it, in a form that 4.57 and 5.x read alike: with the rotary
    settings of both."""
    config = dict(config)
    if "_name_or_path" in config:
        config["_name_or_path"] = ""  # where a part came from on the machine that saved it
    if config.get("model_type") == "qwen3_moe" and "num_local_experts" in config:
        config["num_experts"] = config["num_local_experts"]  # 5.x's name, and the one that 4.57 reads
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and ("rope_theta" in rope or "full_attention" in rope):
        config |= _rope_of_4(rope, config)
    elif rope is None and config.get("rope_theta") is not None:
        config["rope_parameters"] = _rope_of_5(config)
    return config


def _rope_of_4(rope: dict, config: dict) -> dict:
    """The rotary settings of 4.x for `rope`, those of 5.x; Gemma 3 has two sets of them."""
    found = {}
    if "full_attention" in rope:
        found["rope_local_base_freq"] = (rope.get("sliding_attention") or {}).get("rope_theta", 10000.0)
        rope = rope["full_attention"]
    found["rope_theta"] = rope.get("rope_theta", 10000.0)
    if "partial_rotary_factor" in rope:
        found["partial_rotary_factor"] = rope["partial_rotary_factor"]
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    if scaling.get("rope_type", "default") == "default":
        scaling = None
    elif config.get("model_type") == "phi3":  # it insists on these three
        scaling = {"type": "longrope", **{key: scaling[key] for key in ("short_factor", "long_factor")}}
    return {**found, "rope_scaling": scaling}


def _rope_of_5(config: dict) -> dict:
    """The rotary settings of 5.x for those of 4.x in `config`."""
    scaling = dict(config.get("rope_scaling") or {})
    scaling["rope_type"] = scaling.pop("type", None) or scaling.get("rope_type", "default")
    rope = {"rope_theta": config["rope_theta"], **scaling}
    if config.get("partial_rotary_factor") is not None:
        rope["partial_rotary_factor"] = config["partial_rotary_factor"]
    if config.get("rope_local_base_freq") is not None:
        local = {"rope_theta": config["rope_local_base_freq"], "rope_type": "default"}
        return {"full_attention": rope, "sliding_attention": local}
    return rope


def comparable_config_dict(config: dict) -> dict:
    """`config`, a sub-config as the installed release writes it, equal to what that release reads back from config.json:
    4.57 keeps the form of the rotary settings that it does not use, 5.x drops it, or keeps it beside its own."""
    if TRANSFORMERS_5:
        return {name: value for name, value in config.items() if name != "partial_rotary_factor"}
    return portable_config_dict(config)


# --- caches and masks -------------------------------------------------------------------------------------------------

# what the installed release calls a cache, in outputs and in arguments: 5.24 renamed it
CACHE = "past_key_values" if "past_key_values" in BaseModelOutputWithPast.__dataclass_fields__ else "cache"


class EitherCacheName:
    """A part of output classes: the cache is there under both of its names, which are `past_key_values` up to 5.23."""

    if CACHE == "past_key_values":

        @property
        def cache(self):
            return self.past_key_values

        def __getitem__(self, key):
            return super().__getitem__(CACHE if key == "cache" else key)


def one_cache(past_key_values, cache):
    """The cache, which may be handed in under either of its names.

    Raises:
        ValueError: there are two.
    """
    if past_key_values is None or cache is None or past_key_values is cache:
        return cache if past_key_values is None else past_key_values
    raise ValueError("Expected past_key_values or cache, got both: they are two names of one argument.")


def is_paged(cache) -> bool:
    """Whether this is the cache of continuous batching, which knows nothing of lengths: masks and places come with it."""
    return cache is not None and not hasattr(cache, "get_mask_sizes")


def is_quantized(cache) -> bool:
    """Whether a cache gives back other keys than it got."""
    return any("Quantized" in kind.__name__ for kind in type(cache).__mro__)


_CAUSAL_MASK_ARGUMENTS = inspect.signature(create_causal_mask).parameters
_CACHE_ARGUMENT = "past_key_values" if "past_key_values" in _CAUSAL_MASK_ARGUMENTS else "cache"
_EMBEDS_ARGUMENT = "inputs_embeds" if "inputs_embeds" in _CAUSAL_MASK_ARGUMENTS else "input_embeds"
_MASKS_TAKE_CACHE_POSITION = (
    "cache_position" in _CAUSAL_MASK_ARGUMENTS
    and _CAUSAL_MASK_ARGUMENTS["cache_position"].default is inspect.Parameter.empty
)
_UPDATE_TAKES_CACHE_POSITION = "cache_kwargs" in inspect.signature(Cache.update).parameters
_LAYERS_ARE_MADE_FROM_VALUES_TOO = "value_states" in inspect.signature(DynamicLayer.lazy_initialization).parameters
_MASK_SIZES_TAKE_CACHE_POSITION = "cache_position" in inspect.signature(Cache.get_mask_sizes).parameters


def causal_mask(attention_type, config, inputs_embeds, attention_mask, slots, cache, position_ids):
    """The mask that transformers' own decoders use: a tensor, or None where the attention needs none.

    Args:
        attention_type: `"full_attention"` or `"sliding_attention"`.
        config: the language model's config.
        inputs_embeds: (B, S, D), for its shape, dtype and device.
        attention_mask: (B, past + S), or None.
        slots: (S,) places of the new tokens in the cache, counted from the first token ever seen.
    """
    create = create_causal_mask if attention_type == "full_attention" else create_sliding_window_causal_mask
    arguments = {_EMBEDS_ARGUMENT: inputs_embeds, _CACHE_ARGUMENT: cache}
    if _MASKS_TAKE_CACHE_POSITION:
        arguments["cache_position"] = slots
    return create(
        config=config,
        attention_mask=attention_mask,
        position_ids=position_ids,
        **arguments,
    )


def cached_key_range(cache, layer_idx, slots) -> tuple[int, int]:
    """(length, offset) of the keys that `layer_idx` will attend to once the tokens at `slots` (S,) are in the cache."""
    if cache is None:
        return slots.shape[0], 0
    query = slots if _MASK_SIZES_TAKE_CACHE_POSITION else slots.shape[0]
    return cache.get_mask_sizes(query, layer_idx)


def update_cache(cache, key_BKSH, value_BKSH, layer_idx, slots, attention_arguments: dict):
    """Appends keys and values to the cache and returns all of those to attend to. A paged cache changes what the attention
    function is told; up to 5.23 it is that function which asks the cache."""
    if is_paged(cache):
        if "kwargs" in inspect.signature(cache.update).parameters:
            return cache.update(key_BKSH, value_BKSH, layer_idx, kwargs=attention_arguments)
        attention_arguments["cache"] = cache
        return key_BKSH, value_BKSH
    layers = getattr(cache, "layers", ())
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    if type(layer) is DynamicLayer and not layer.is_initialized and not cache.offloading:
        # what `update` does to an empty layer, but for a copy: behind a picture these are large
        layer.lazy_initialization(key_BKSH, *([value_BKSH] if _LAYERS_ARE_MADE_FROM_VALUES_TOO else []))
        layer.keys, layer.values = key_BKSH, value_BKSH
        return key_BKSH, value_BKSH
    if _UPDATE_TAKES_CACHE_POSITION:
        return cache.update(key_BKSH, value_BKSH, layer_idx, {"cache_position": slots})
    return cache.update(key_BKSH, value_BKSH, layer_idx)


def has_empty_places(cache) -> bool:
    """Whether a cache hands out all of its places, also those that nothing was written to: those of a fixed size do."""
    return cache is not None and cache.is_compileable


def decoding_masks(config, attention_mask, **kwargs):
    """`create_masks_for_generate` for decoding steps; for a prompt the padding mask as it is.

    For caches of a fixed size `generate` makes (B, 1, S, L) masks in advance. A prompt needs none of that size: only its
    text tokens are queries, and the model masks those. Flex attention gets a mask tensor as well: `generate` cannot hand
    over a block mask on every release, and one that is made here moves on with the cache before it is used.
    """
    config = config.get_text_config()
    # for flash attention transformers would cut the padding mask to the places of the cache, whichever tokens these hold
    if kwargs[_EMBEDS_ARGUMENT].shape[1] > 1 or "flash" in (config._attn_implementation or ""):
        return attention_mask
    if config._attn_implementation == "flex_attention":
        config = copy.copy(config)
        config._attn_implementation_internal = "eager"
    masks = create_masks_for_generate(config=config, attention_mask=attention_mask, **kwargs)
    none_made = masks is None or (isinstance(masks, dict) and None in masks.values())
    return attention_mask if none_made else masks  # left padding counts where transformers sees no need for a mask, too


# --- models -----------------------------------------------------------------------------------------------------------


def tied_weights(target: str, source: str):
    """`_tied_weights_keys` for a parameter `target` that shares `source`."""
    return {target: source} if TRANSFORMERS_5 else [target]


if importlib.util.find_spec("transformers.initialization"):
    from transformers import initialization as init  # leaves alone what was loaded
else:

    class init:
        """What 5.x calls `transformers.initialization`. 4.x asks for new weights only where none were loaded."""

        zeros_ = staticmethod(nn.init.zeros_)

        @staticmethod
        def copy_(tensor, other):
            with torch.no_grad():
                return tensor.copy_(other)


class RotaryByLayerType(nn.Module):
    """A rotary embedding that is asked for the kind of layer as well. Most have one for all; Gemma 3 has two: one module on
    5.x, two of them on 4.57.

    Args:
        rotary_class: transformers' class.
        config: the language model's.

    Attributes:
        differs: whether the kind of layer makes a difference.
    """

    def __init__(self, rotary_class, config):
        super().__init__()
        self.rotary_emb = rotary_class(config=config)
        self.takes_layer_type = "layer_type" in inspect.signature(rotary_class.forward).parameters
        if not self.takes_layer_type and getattr(config, "rope_local_base_freq", None) is not None:
            config = copy.deepcopy(config)
            config.rope_theta, config.rope_scaling = config.rope_local_base_freq, {"rope_type": "default"}
            self.rotary_emb_local = rotary_class(config=config)
        self.differs = self.takes_layer_type or hasattr(self, "rotary_emb_local")

    def forward(self, x, position_ids, attention_type: str):
        """Cosines and sines, (B or 1, S, H) each or fewer than H where part of a head is rotated."""
        if self.takes_layer_type:
            return self.rotary_emb(x, position_ids, attention_type)
        if attention_type == "sliding_attention" and hasattr(self, "rotary_emb_local"):
            return self.rotary_emb_local(x, position_ids)
        return self.rotary_emb(x, position_ids)


if TRANSFORMERS_5:

    class ForeignNames:
        """A part of models that read checkpoints of LLaVAs, under other names than their own."""

else:

    class ForeignNames:
        """A part of models that read checkpoints of LLaVAs, under other names than their own. 4.57 looks for the base
        model's prefix before it renames, and would put one in front of what has been renamed already."""

        def _get_key_renaming_mapping(self, checkpoint_keys, key_mapping=None, of_head=False, of_base=False):
            if any("multi_modal_projector." in key for key in checkpoint_keys):
                of_head, of_base = not hasattr(self, self.base_model_prefix), False
            return super()._get_key_renaming_mapping(checkpoint_keys, key_mapping, of_head, of_base)


def readable_tp_plan(plan: dict[str, str]) -> dict[str, str]:
    """`plan`, {module: style}, as the installed release reads it. Two styles had other names in 4.57 and 5.0. 4.57 reads any
    number in a name as a layer's, and does not tell `linear_1` from `linear_2`: both are shared out by columns there, and
    their products gathered."""
    from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES  # heavy

    if not TRANSFORMERS_5:
        digits = re.compile(r"\d+")
        plan = {digits.sub("*", x): "colwise_rep" if digits.search(x) else style for x, style in plan.items()}
    names = {"colwise_gather_output": "colwise_rep", "rowwise_split_input": "rowwise_rep"}
    return {x: style if style in ALL_PARALLEL_STYLES else names.get(style, style) for x, style in plan.items()}


def load_options(quantized: bool, given: dict) -> dict:
    """Arguments of `from_pretrained` beside those `given`: the dtype of the checkpoint for what is not quantized, which is
    5.x's default. 4.57 would take float16."""
    named = TRANSFORMERS_5 or "dtype" in given or "torch_dtype" in given
    return {"dtype": "auto"} if quantized and not named else {}


@contextlib.contextmanager
def encoder_names_of_all_releases(model):
    """Within, `save_pretrained(**options)` writes tensors under the names that every release reads; yields these options.

    They are the names in the model, but for the encoder's where 5.x has renamed its modules (DINOv2, ViT, Swin ...): it reads
    the old names as well as its own, and 4.57 the old ones alone.
    """
    conversions = _encoder_conversions(model) if TRANSFORMERS_5 else []
    if not conversions:
        yield {"save_original_format": False} if TRANSFORMERS_5 else {}
        return
    before = getattr(model, "_weight_conversions", None)  # what it was loaded with
    model._weight_conversions = conversions
    try:
        yield {"save_original_format": True}
    finally:
        model._weight_conversions = before


def _encoder_conversions(model) -> list:
    """5.x's conversions between the names in checkpoints and in memory of the module `vision_tower`."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping

        found = get_model_conversion_mapping(model, add_legacy=False)
    except (ImportError, TypeError):  # of the first releases, which had not renamed anything in an encoder yet
        return []
    return [one for one in found if str(getattr(one, "scope_prefix", "")).endswith("vision_tower")]


def as_saved(model) -> dict[str, torch.Tensor]:
    """The tensors of `model` under the names that they are saved under."""
    with encoder_names_of_all_releases(model) as options:
        if not options.get("save_original_format"):
            return model.state_dict()
        from transformers.core_model_loading import revert_weight_conversion

        return revert_weight_conversion(model, model.state_dict())


if hasattr(transformers, "AutoModelForVision2Seq"):
    AutoModelForVision2Seq = transformers.AutoModelForVision2Seq
else:

    class AutoModelForVision2Seq(transformers.AutoModelForImageTextToText):
        """transformers 4's auto class, which 5.x no longer has. It finds what `AutoModelForImageTextToText` finds."""


# the auto classes of models that answer about pictures with text
AUTO_CLASSES = {transformers.AutoModelForImageTextToText, AutoModelForVision2Seq}
if hasattr(transformers, "AutoModelForMultimodalLM"):
    AUTO_CLASSES.add(transformers.AutoModelForMultimodalLM)


def name_for_serving(model_type: str, class_name: str) -> None:
    """Puts a model into the table of names by which `transformers serve` (5.6 and later) finds out how to load it and that it
    takes pictures. `AutoModelForMultimodalLM.register` and a checkpoint's `auto_map` do not reach that table."""
    names = getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", None)
    if names is not None:
        names[model_type] = class_name


# --- training ---------------------------------------------------------------------------------------------------------


def training_arguments(warmup_ratio: float, checkpointing: dict | None, **arguments):
    """`TrainingArguments` whose warm-up is a share of the steps, which compute hidden states again in backward where
    `checkpointing` has arguments for that, and which leave the model's config as it is: 5.x has one name for shares and
    numbers of steps, a new one for checkpointing, and turns the cache off in the config that checkpoints are saved with."""
    from transformers import TrainingArguments

    fields = TrainingArguments.__dataclass_fields__
    if checkpointing is not None:
        name = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
        arguments |= {name: True, f"{name}_kwargs": checkpointing}
    if fields["warmup_steps"].type in (float, "float"):
        arguments["warmup_steps"] = warmup_ratio
    else:
        arguments["warmup_ratio"] = warmup_ratio
    if "use_cache" in fields:
        arguments["use_cache"] = True
    return TrainingArguments(**arguments)


# --- processors -------------------------------------------------------------------------------------------------------

if hasattr(ProcessorMixin, "get_attributes"):  # the names of the parts are read off the signature of __init__
    ImageTextProcessorMixin = ProcessorMixin
else:

    class ImageTextProcessorMixin(ProcessorMixin):
        """A processor of an image processor and a tokenizer, of any class."""

        attributes = ["image_processor", "tokenizer"]
        image_processor_class = "AutoImageProcessor"
        tokenizer_class = "AutoTokenizer"


def read_url(url: str, timeout: float | None = None) -> bytes:
    """What is at an http(s) address, fetched with the client that the installed transformers itself loads images with."""
    httpx = getattr(image_utils, "httpx", None)
    if httpx is None:
        response = image_utils.requests.get(url, timeout=timeout)
    else:
        response = httpx.get(url, timeout=timeout, follow_redirects=True)
    response.raise_for_status()
    return response.content


def pillow_image_processor(image_processor):
    """`image_processor`, or where torchvision works in it the one of the same settings that works with Pillow.

    Both resize in 8 bits, but of a thousand values of torchvision one to six are off by one from those of Pillow, by which
    CLIP and its descendants were trained. The names: `XFast` and `X` in 4.57 and the first releases of 5, `X` and `XPil`
    thereafter.
    """
    kind = type(image_processor)
    if not kind.__module__.startswith("transformers.models."):
        return image_processor
    plain = kind.__name__.removesuffix("Fast")
    for name in (f"{plain}Pil", plain):
        if name == kind.__name__:
            break
        sibling = getattr(transformers, name, None)
        if sibling is not None and not getattr(sibling, "is_dummy", False):
            return sibling.from_dict(image_processor.to_dict())
    return image_processor


def portable_tokenizer_config(config: dict, tokenizer, adds_bos: bool, adds_eos: bool) -> dict:
    """`config`, a tokenizer_config.json as the installed release writes it, in a form that 4.57 and 5.x read alike.

    5.x has a backend class that 4.57 does not know, renamed the extra special tokens (4.57 stops at the new form), and
    leaves out what makes a Llama tokenizer: read back, `legacy` turns into False and text behind `</s>` changes.
    """
    config = {key: config[key] for key in config if key not in ("backend", "is_local", "local_files_only")}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = config.pop("extra_special_tokens", None)
    if isinstance(extra, list):
        named = [config.get(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")]
        extra = [token for token in extra if token not in named]
        if extra:
            config["additional_special_tokens"] = extra
    elif extra:
        config["extra_special_tokens"] = extra
    if "model_specific_special_tokens" in config:
        config["extra_special_tokens"] = config.pop("model_specific_special_tokens")
    if config.get("tokenizer_class") != "PreTrainedTokenizerFast":
        if hasattr(tokenizer, "legacy"):
            config.setdefault("legacy", tokenizer.legacy)
        if hasattr(tokenizer, "add_bos_token"):
            config.setdefault("add_bos_token", adds_bos)
        if hasattr(tokenizer, "add_eos_token"):
            config.setdefault("add_eos_token", adds_eos)
    config.setdefault(
        "added_tokens_decoder",
        {
            str(index): {
                "content": token.content,
                **{flag: getattr(token, flag) for flag in ("lstrip", "normalized", "rstrip", "single_word", "special")},
            }
            for index, token in sorted(tokenizer.added_tokens_decoder.items())
        },
    )
    return config


def portable_image_processor_config(config: dict) -> dict:
    """`config`, a preprocessor_config.json, under the class name that every release knows (5.x has ...Pil variants)."""
    config = dict(config)
    config["image_processor_type"] = config["image_processor_type"].removesuffix("Pil")
    return config
