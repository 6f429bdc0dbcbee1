# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What this package has to know about the supported transformers releases, 4.57 to 5.x.

Part 1: names that a release may not have. The few public classes that the model cannot do without are imported by name. All
else goes through `optional`, with a fallback, or through `needed`, inside the feature that uses it. So a release that moves a
name costs that feature, not the model. docs/compatibility.md lists the names. Part 2: what each release has in its own form.
"""

import contextlib
import copy
import functools
import importlib
import inspect
import logging
import re
import sys

import torch
import transformers
from torch import nn
from transformers import AutoModel, DynamicCache, ProcessorMixin
from transformers.modeling_outputs import BaseModelOutputWithPast


# The minor releases that the test suites and `make compat` have run on: the oldest, the newest, and all between.
OLDEST_TESTED = (4, 57)
NEWEST_TESTED = (5, 24)
TESTED_RELEASES = " to ".join(".".join(map(str, minor)) for minor in (OLDEST_TESTED, NEWEST_TESTED))

VERSION = tuple(int(number) for number in re.findall(r"\d+", transformers.__version__)[:2])
TRANSFORMERS_5 = VERSION >= (5,)


# --- part 1: names that a release may not have, and their fallbacks ---------------------------------------------------


def optional(module: str, name: str, default=None):
    """`name` of `module`, or `default` where the installed release has no such thing."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError):
        return default


def needed(feature: str, module: str, name: str):
    """`name` of `module`; an ImportError that names the `feature` where the installed release has no such thing."""
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"{feature}: this needs {module}.{name}, which transformers {transformers.__version__} does not have. Everything "
            f"else works. Take a release from {TESTED_RELEASES}, on which saisa_hf was tested, or a newer saisa_hf."
        ) from error


def in_several_processes() -> bool:
    """Whether weights may be spread over processes, which then have to call modules equally often."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


@functools.cache
def warn_once(message: str) -> None:
    """Logs a warning, in each process the first time."""
    logging.getLogger(__name__).warning(message)


def findable(name: str) -> None:
    """Makes the module `name` an attribute of its package, as imports do and transformers, loading a checkpoint's code, does
    not: where `datasets` does not find a class so, it cannot hash its objects."""
    package, _, leaf = name.rpartition(".")
    if package in sys.modules and name in sys.modules:
        setattr(sys.modules[package], leaf, sys.modules[name])


def model_class_of(config):
    """The class that `AutoModel` makes of `config`; None where the installed release does not say."""
    mapping = getattr(AutoModel, "_model_mapping", None)
    return None if mapping is None else mapping[type(config)]


# Where `transformers serve` (5.6 and later) finds how to load a model and that it takes images, as `auto_map` does not say.
SERVED = optional("transformers.models.auto.modeling_auto", "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", {})
SERVED["saisa"] = "SaisaForConditionalGeneration"


class init:
    """5.x's `transformers.initialization`, which leaves alone what was loaded; 4.x asks only for weights that were not."""

    zeros_ = staticmethod(optional("transformers.initialization", "zeros_", nn.init.zeros_))
    normal_ = staticmethod(optional("transformers.initialization", "normal_", nn.init.normal_))
    copy_ = staticmethod(optional("transformers.initialization", "copy_", torch.no_grad()(torch.Tensor.copy_)))


# the activations that encoders, language models and projectors mostly use, by their names in configs
PLAIN_ACTIVATIONS = {name: getattr(nn.functional, name) for name in ("gelu", "relu", "sigmoid", "silu", "tanh")}
for _name in ("gelu_new", "gelu_pytorch_tanh"):
    PLAIN_ACTIVATIONS[_name] = functools.partial(nn.functional.gelu, approximate="tanh")
PLAIN_ACTIVATIONS["swish"] = nn.functional.silu


class PlainAttention(dict):
    """PyTorch's fused attention, called as attention implementations are; all others are transformers' own."""

    def __missing__(self, name):
        return needed(f"attn_implementation={name!r}", "transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS")[name]


def plain_sdpa(module, query_BNTH, key_BKLH, value_BKLH, attention_mask, dropout=0.0, scaling=None, **kwargs):
    """(B, T, N, H), and None in place of probabilities."""
    is_causal = attention_mask is None and query_BNTH.shape[2] > 1 and kwargs.get("is_causal", True)
    grouped = query_BNTH.shape[1] != key_BKLH.shape[1]
    output_BNTH = nn.functional.scaled_dot_product_attention(
        query_BNTH, key_BKLH, value_BKLH, attention_mask, dropout, is_causal, scale=scaling, enable_gqa=grouped
    )
    return output_BNTH.transpose(1, 2), None


class PlainCheckpointing(nn.Module):
    """A layer that is computed again in the backward pass where `gradient_checkpointing` asks for that."""

    gradient_checkpointing = False

    def __call__(self, *args, **kwargs):
        if not (self.gradient_checkpointing and self.training):
            return super().__call__(*args, **kwargs)
        return self._gradient_checkpointing_func(functools.partial(super().__call__, **kwargs), *args)


def differentiable(x: torch.Tensor, layer) -> torch.Tensor:
    """`x`, the input of `layer`, with a gradient of its own where the layer is computed again in backward by the older of
    PyTorch's two ways (4.57's default), which yields none for the layer's weights where no input has one."""
    checkpoints = layer.gradient_checkpointing and layer.training and torch.is_grad_enabled()
    if not checkpoints or x.requires_grad:
        return x
    reentrant = getattr(layer._gradient_checkpointing_func, "keywords", {}).get("use_reentrant", True)
    return x.detach().requires_grad_() if reentrant else x


def plain_can_return_tuple(forward):
    """A `forward` that returns a tuple where `return_dict=False`, as an argument or in the config, says so."""

    @functools.wraps(forward)
    def wrapper(self, *args, return_dict=None, **kwargs):
        output = forward(self, *args, **kwargs)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict or isinstance(output, tuple) else output.to_tuple()

    return wrapper


ACT2FN = optional("transformers.activations", "ACT2FN", PLAIN_ACTIVATIONS)
ALL_ATTENTION_FUNCTIONS = optional(
    "transformers.modeling_utils", "ALL_ATTENTION_FUNCTIONS", PlainAttention(sdpa=plain_sdpa)
)
GradientCheckpointingLayer = optional("transformers.modeling_layers", "GradientCheckpointingLayer", PlainCheckpointing)
can_return_tuple = optional("transformers.utils", "can_return_tuple", plain_can_return_tuple)
ProcessingKwargs = optional("transformers.processing_utils", "ProcessingKwargs")
Unpack = optional("transformers.processing_utils", "Unpack")
# the annotation by which serving engines find out what a processor takes
CallArguments = None if None in (ProcessingKwargs, Unpack) else Unpack[ProcessingKwargs]

# the names that both majors have
PLAIN_ARGUMENTS = {
    "text_kwargs": "add_special_tokens is_split_into_words max_length pad_to_multiple_of padding padding_side "
    "return_attention_mask return_length return_mm_token_type_ids return_offsets_mapping return_overflowing_tokens "
    "return_special_tokens_mask return_token_type_ids stride text_pair text_pair_target text_target truncation verbose",
    "images_kwargs": "crop_size data_format device disable_grouping do_center_crop do_convert_rgb do_normalize do_pad "
    "do_rescale do_resize image_mean image_std input_data_format pad_size resample rescale_factor size",
}


def call_arguments(part: str) -> set[str]:
    """The names of a processor's arguments that belong to its `"text_kwargs"` or its `"images_kwargs"`."""
    if ProcessingKwargs is None:
        return set(PLAIN_ARGUMENTS[part].split())
    return set(ProcessingKwargs.__annotations__[part].__annotations__)


def sorted_arguments(processor, kwargs: dict, **options) -> dict[str, dict]:
    """A processor's arguments as `"text_kwargs"` and `"images_kwargs"`, with the defaults of either."""
    merge = getattr(processor, "_merge_kwargs", None)
    if merge is not None and ProcessingKwargs is not None:
        return merge(ProcessingKwargs, **options, **kwargs)
    flat = {name: value for name, value in kwargs.items() if not name.endswith("_kwargs")}
    flat |= kwargs.get("common_kwargs", {})
    of_text = PLAIN_ARGUMENTS["text_kwargs"].split()
    text = {name: value for name, value in flat.items() if name in (*of_text, "return_tensors")}
    images = {name: value for name, value in flat.items() if name not in of_text}
    parts = {"text_kwargs": text, "images_kwargs": images}
    return {part: arguments | kwargs.get(part, {}) for part, arguments in parts.items()}


# --- part 2: differences between releases: configs --------------------------------------------------------------------


def readable_config_dict(config: dict) -> dict:
    """`config`, a sub-config written by any release, with the rotary settings in the form that the installed one reads: 5.x
    has a dict `rope_parameters`. Each ignores the other's form in silence, so that a theta of 500000 turns into 10000."""
    rope = config.get("rope_parameters")
    if rope is None:
        return dict(config)
    former = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
    config = {name: value for name, value in config.items() if name not in former}
    if not TRANSFORMERS_5:
        del config["rope_parameters"]
        config |= {name: value for name, value in _rope_of_4(rope, config).items() if value is not None}
    return config


def portable_config_dict(config: dict) -> dict:
    """`config`, a sub-config as the installed release writes it, with the names of 4.57 and of 5.x: both read it alike."""
    config = dict(config)
    if "_name_or_path" in config:
        config["_name_or_path"] = ""  # where a part came from on the machine that saved it
    if config.get("model_type") == "qwen3_moe" and "num_local_experts" in config:
        config["num_experts"] = config["num_local_experts"]
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and ("rope_theta" in rope or "full_attention" in rope):
        config |= _rope_of_4(rope, config)
    elif rope is None and config.get("rope_theta") is not None:
        config["rope_parameters"] = _rope_of_5(config)
    return config


def comparable_config_dict(config: dict) -> dict:
    """`config`, a sub-config as the installed release writes it, equal to what that release reads back from config.json: 4.57
    keeps the rotary settings that it does not use, 5.x does not, or beside its own."""
    if TRANSFORMERS_5:
        return {name: value for name, value in config.items() if name != "partial_rotary_factor"}
    return portable_config_dict(config)


def _rope_of_4(rope: dict, config: dict) -> dict:
    """The rotary settings of 4.x for `rope`, those of 5.x; Gemma 3 has two sets of them."""
    found = {}
    if "full_attention" in rope:
        found["rope_local_base_freq"] = (rope.get("sliding_attention") or {}).get("rope_theta", 10000.0)
        rope = rope["full_attention"]
    scaling = {"rope_theta": 10000.0, **rope}
    found |= {key: scaling.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in scaling}
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
    if config.get("rope_local_base_freq") is None:
        return rope
    local = {"rope_theta": config["rope_local_base_freq"], "rope_type": "default"}
    return {"full_attention": rope, "sliding_attention": local}


# --- caches, masks, models, processors ----------------------------------------------------------------------------------


def _parameters(function) -> dict:
    """{parameter: default} of a function; of None, which stands for a missing one, nothing."""
    return {} if function is None else {x.name: x.default for x in inspect.signature(function).parameters.values()}


# what the installed release calls a cache, in outputs and in arguments: 5.24 renamed it
CACHE = "past_key_values" if "past_key_values" in BaseModelOutputWithPast.__dataclass_fields__ else "cache"
# what an empty layer of a cache is; without it, `Cache.update` makes a copy
DynamicLayer = optional("transformers.cache_utils", "DynamicLayer")

CROP_REMOVES = "tokens_to_remove" in _parameters(getattr(DynamicLayer, "crop", None))  # else it is told what stays
_UPDATE_TAKES_CACHE_POSITION = "cache_kwargs" in _parameters(DynamicCache.update)
_LAYERS_ARE_MADE_FROM_VALUES_TOO = "value_states" in _parameters(getattr(DynamicLayer, "lazy_initialization", None))
_MASK_SIZES_TAKE_CACHE_POSITION = "cache_position" in _parameters(DynamicCache.get_mask_sizes)


class EitherCacheName:
    """A part of output classes: the cache is there under both of its names, which are `past_key_values` up to 5.23."""

    if CACHE == "past_key_values":

        @property
        def cache(self):
            return self.past_key_values

        def __getitem__(self, key):
            return super().__getitem__(CACHE if key == "cache" else key)


def one_cache(past_key_values, cache):
    """The cache, which may be passed under either of its names; a ValueError where there are two."""
    if past_key_values is None or cache is None or past_key_values is cache:
        return cache if past_key_values is None else past_key_values
    raise ValueError("Expected past_key_values or cache, got both: they are two names of one argument.")


def is_paged(cache) -> bool:
    """Whether this is the cache of continuous batching, which knows nothing of lengths: masks and places come with it."""
    return cache is not None and not hasattr(cache, "get_mask_sizes")


def cached_key_range(cache, layer_idx, slots) -> tuple[int, int]:
    """(length, offset) of the keys that `layer_idx` will attend to once the tokens at `slots` (S,) are in the cache."""
    if cache is None:
        return slots.shape[0], 0
    return cache.get_mask_sizes(slots if _MASK_SIZES_TAKE_CACHE_POSITION else slots.shape[0], layer_idx)


def initialize(layer, key_BKSH, value_BKSH) -> None:
    """Makes a layer of a cache ready for keys and values like these."""
    layer.lazy_initialization(key_BKSH, *([value_BKSH] if _LAYERS_ARE_MADE_FROM_VALUES_TOO else []))


def update_cache(cache, key_BKSH, value_BKSH, layer_idx, slots, attention_arguments: dict):
    """Appends keys and values to the cache and returns all of those to attend to. A paged cache changes the arguments of the
    attention function; up to 5.23 that function itself asks the cache."""
    if is_paged(cache):
        if "kwargs" in _parameters(cache.update):
            return cache.update(key_BKSH, value_BKSH, layer_idx, kwargs=attention_arguments)
        attention_arguments["cache"] = cache
        return key_BKSH, value_BKSH
    layers = getattr(cache, "layers", ())
    layer = layers[layer_idx] if layer_idx < len(layers) else None
    if type(layer) is DynamicLayer and not layer.is_initialized and not cache.offloading:
        # what `update` does to an empty layer, without a copy of what already lies as in a cache: images make it large
        key_BKSH, value_BKSH = key_BKSH.contiguous(), value_BKSH.contiguous()
        initialize(layer, key_BKSH, value_BKSH)
        layer.keys, layer.values = key_BKSH, value_BKSH
        return key_BKSH, value_BKSH
    position = [{"cache_position": slots}] if _UPDATE_TAKES_CACHE_POSITION else []
    return cache.update(key_BKSH, value_BKSH, layer_idx, *position)


# Where one of these is missing, the model's own masks, or the padding mask, take its place.
CAUSAL_MASKS = {
    "full_attention": optional("transformers.masking_utils", "create_causal_mask"),
    "sliding_attention": optional("transformers.masking_utils", "create_sliding_window_causal_mask"),
}
create_masks_for_generate = optional("transformers.masking_utils", "create_masks_for_generate")

_MASK_ARGUMENTS = _parameters(CAUSAL_MASKS["full_attention"])
if _MASK_ARGUMENTS.get("cache_position") is not inspect.Parameter.empty:
    _MASK_ARGUMENTS.pop("cache_position", None)  # releases that can do without it warn of it


def makes_causal_masks(attention_type: str) -> bool:
    """Whether the installed transformers has the function that `causal_mask` asks for this kind of layer."""
    return None not in (CAUSAL_MASKS["full_attention"], CAUSAL_MASKS[attention_type])


def causal_mask(attention_type, config, inputs_embeds, attention_mask, slots, cache, position_ids):
    """The mask that transformers' own decoders use for layers of that type: a tensor, or None where the attention needs none.
    `inputs_embeds` (B, S, D) is there for its shape, dtype and device; `attention_mask` is (B, past + S), or None; `slots`
    (S,) are the places of the new tokens in the cache, counted from the first token ever seen."""
    cache_name = "past_key_values" if "past_key_values" in _MASK_ARGUMENTS else "cache"
    embeds_name = "inputs_embeds" if "inputs_embeds" in _MASK_ARGUMENTS else "input_embeds"
    arguments = {"config": config, "attention_mask": attention_mask, "position_ids": position_ids}
    arguments |= {embeds_name: inputs_embeds, cache_name: cache}
    arguments |= {"cache_position": slots} if "cache_position" in _MASK_ARGUMENTS else {}
    return CAUSAL_MASKS[attention_type](**arguments)


def decoding_masks(config, attention_mask, **kwargs):
    """`create_masks_for_generate` for decoding steps; for a prompt the padding mask as it is. For caches of a fixed size
    `generate` makes (B, 1, S, L) masks in advance: a prompt, of which text alone is a query, needs none of that size."""
    config = config.get_text_config()
    embeds = kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else kwargs["input_embeds"]
    # for flash attention transformers would cut the padding mask to the places of the cache, whichever tokens these hold
    is_flash = "flash" in (config._attn_implementation or "")
    if create_masks_for_generate is None or embeds.shape[1] > 1 or is_flash:
        return attention_mask
    # a mask tensor for flex attention, too: not every release passes on a block mask, which would age with the cache
    if config._attn_implementation == "flex_attention":
        config = copy.copy(config)
        config._attn_implementation_internal = "eager"
    masks = create_masks_for_generate(config=config, attention_mask=attention_mask, **kwargs)
    none_made = masks is None or (isinstance(masks, dict) and None in masks.values())
    return attention_mask if none_made else masks  # left padding counts where transformers sees no need for a mask, too


class RotaryByLayerType(nn.Module):
    """A rotary embedding that is told the kind of layer as well, whether it `differs` by that or not. Gemma 3 has one for
    each kind, in one module on 5.x and in two of them on 4.57."""

    def __init__(self, rotary_class, config):
        super().__init__()
        self.rotary_emb = rotary_class(config=config)
        self.takes_layer_type = "layer_type" in _parameters(rotary_class.forward)
        if not self.takes_layer_type and getattr(config, "rope_local_base_freq", None) is not None:
            config = copy.deepcopy(config)
            config.rope_theta, config.rope_scaling = config.rope_local_base_freq, {"rope_type": "default"}
            self.rotary_emb_local = rotary_class(config=config)
        self.differs = self.takes_layer_type or hasattr(self, "rotary_emb_local")

    def forward(self, x, position_ids, attention_type: str):
        """Cosines and sines, (B or 1, S, H) each or fewer than H where part of a head is rotated."""
        if self.takes_layer_type:
            return self.rotary_emb(x, position_ids, attention_type)
        is_local = attention_type == "sliding_attention" and hasattr(self, "rotary_emb_local")
        return (self.rotary_emb_local if is_local else self.rotary_emb)(x, position_ids)


def tied_weights(target: str, source: str):
    """`_tied_weights_keys` for a parameter `target` that shares `source`."""
    return {target: source} if TRANSFORMERS_5 else [target]


def readable_tp_plan(plan: dict[str, str]) -> dict[str, str]:
    """`plan`, {module: style}, as the installed release reads it: two styles had other names in 4.57 and 5.0."""
    styles = optional("transformers.integrations.tensor_parallel", "ALL_PARALLEL_STYLES")
    if styles is None:  # then there is no tensor parallelism, see `check_tensor_parallelism`
        return plan
    if not TRANSFORMERS_5:
        digits = re.compile(r"\d+")  # so `linear_1` and `linear_2` are one: both are split by columns, and gathered
        plan = {digits.sub("*", x): "colwise_rep" if digits.search(x) else style for x, style in plan.items()}
    names = {"colwise_gather_output": "colwise_rep", "rowwise_split_input": "rowwise_rep"}
    return {x: style if style in styles else names.get(style, style) for x, style in plan.items()}


class ForeignNames:
    """A part of models that read checkpoints of LLaVAs, whose tensors have other names than their own."""

    if not TRANSFORMERS_5:

        def _get_key_renaming_mapping(self, checkpoint_keys, key_mapping=None, of_head=False, of_base=False):
            # 4.57 looks for the base model's prefix before it renames, and would add one to what has been renamed already
            if any("multi_modal_projector." in key for key in checkpoint_keys):
                of_head, of_base = not hasattr(self, self.base_model_prefix), False
            return super()._get_key_renaming_mapping(checkpoint_keys, key_mapping, of_head, of_base)


@contextlib.contextmanager
def encoder_names_of_all_releases(model):
    """Within, `save_pretrained(**options)` writes tensors under the names that every release reads; yields these options.
    They are the names in the model, or the former ones in an encoder that 5.x has renamed (DINOv2, ViT, Swin ...)."""
    encoder, conversions = getattr(model.config, "vision_config", None), []
    # those named alike on every release, apart from what the model handles itself; before 5.6 none was renamed
    unchanged = ("clip_vision_model", "siglip_vision_model", "siglip2_vision_model", "convnext")
    if VERSION >= (5, 6) and encoder is not None and encoder.model_type not in unchanged:
        feature = f"Saving a model with an encoder of type {encoder.model_type}"
        mapping = needed(feature, "transformers.conversion_mapping", "get_model_conversion_mapping")
        found = mapping(model, add_legacy=False)
        conversions = [one for one in found if str(getattr(one, "scope_prefix", "")).endswith("vision_tower")]
    loaded_with = getattr(model, "_weight_conversions", None)
    model._weight_conversions = conversions or loaded_with
    try:
        yield {"save_original_format": bool(conversions)} if TRANSFORMERS_5 else {}
    finally:
        model._weight_conversions = loaded_with


class ImageTextProcessorMixin(ProcessorMixin):
    """A processor of an image processor and a tokenizer, of any class: 5.x reads that off the signature of `__init__`."""

    if not hasattr(ProcessorMixin, "get_attributes"):
        attributes = ["image_processor", "tokenizer"]
        image_processor_class, tokenizer_class = "AutoImageProcessor", "AutoTokenizer"


def pillow_image_processor(image_processor):
    """`image_processor`, or the one with the same settings that works with Pillow where it works with torchvision: of a
    thousand resized values one to six are off by one from Pillow's, with which CLIP and its descendants were trained. The two
    are called `XFast` and `X` up to the first releases of 5, then `X` and `XPil`."""
    kind = type(image_processor)
    if not kind.__module__.startswith("transformers.models."):
        return image_processor
    plain = kind.__name__.removesuffix("Fast")
    for name in (f"{plain}Pil", plain):
        if name == kind.__name__:
            break
        sibling = optional("transformers", name)
        if sibling is not None and not getattr(sibling, "is_dummy", False):
            return sibling.from_dict(image_processor.to_dict())
    return image_processor


def portable_tokenizer_config(config: dict, tokenizer, adds_bos: bool, adds_eos: bool) -> dict:
    """`config`, a tokenizer_config.json as the installed release writes it, in a form that 4.57 and 5.x read alike: 5.x has a
    backend class that 4.57 does not know, renamed the extra special tokens (4.57 stops at the new form), and leaves out what
    makes a Llama tokenizer (read back, `legacy` turns into False and text behind `</s>` changes)."""
    config = {key: config[key] for key in config if key not in ("backend", "is_local", "local_files_only")}
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra, extra_name = config.pop("extra_special_tokens", None), "extra_special_tokens"
    if isinstance(extra, list):
        named = [config.get(key) for key in ("bos_token", "eos_token", "unk_token", "pad_token")]
        extra, extra_name = [token for token in extra if token not in named], "additional_special_tokens"
    if extra:
        config[extra_name] = extra
    if "model_specific_special_tokens" in config:
        config["extra_special_tokens"] = config.pop("model_specific_special_tokens")
    decoder = {str(index): token.__getstate__() for index, token in tokenizer.added_tokens_decoder.items()}
    left_out = {"added_tokens_decoder": decoder}
    if config.get("tokenizer_class") != "PreTrainedTokenizerFast":
        llama = {"legacy": getattr(tokenizer, "legacy", None), "add_bos_token": adds_bos, "add_eos_token": adds_eos}
        left_out |= {name: value for name, value in llama.items() if hasattr(tokenizer, name)}
    return left_out | config


def portable_image_processor_config(config: dict) -> dict:
    """`config`, a preprocessor_config.json, under the class name that every release knows (5.x has ...Pil variants)."""
    return config | {"image_processor_type": config["image_processor_type"].removesuffix("Pil")}
