# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""SaisaConfig: what a SAISA model is made of, and whether the pieces fit together."""

import contextlib
import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import AutoConfig, PretrainedConfig

from .checkpoint_saisa import AUTO_MAP, LLAVAS, from_package, write_code_files
from .compat_saisa import ACT2FN, comparable_config_dict, findable, optional, portable_config_dict, readable_config_dict
from .language_models_saisa import FAMILIES, language_model_family
from .saving_saisa import UNFINISHED, saved_together
from .tiles_saisa import check_tiles
from .vision_saisa import (
    CLASS_TOKENS,
    MOST_TOKENS,
    check_reduction,
    check_value,
    encoder_states,
    grid_of,
    image_size,
    reduced_length,
    shown,
)


if TYPE_CHECKING:  # not used here: transformers 4.57 copies those files of a checkpoint that each entry file names
    from .attention_saisa import Visibility  # noqa: F401
    from .embedding_space_saisa import ThroughEveryLayer  # noqa: F401
    from .hardware_saisa import check_device_map  # noqa: F401
    from .head_saisa import chunked_cross_entropy  # noqa: F401
    from .image_sources_saisa import ImageLimits  # noqa: F401
    from .images_saisa import load_image  # noqa: F401
    from .modeling_saisa import SaisaModel  # noqa: F401
    from .processing_saisa import SaisaProcessor  # noqa: F401
    from .token_layout_saisa import TokenLayout  # noqa: F401
    from .visual_states_saisa import SaisaVisualStates  # noqa: F401

findable(__name__)

# CLIP ViT-L/14 at 336 px, the paper's encoder
DEFAULT_VISION_CONFIG = {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "projection_dim": 768}
DEFAULT_VISION_CONFIG |= {"hidden_size": 1024, "intermediate_size": 4096}
DEFAULT_VISION_CONFIG |= {"num_hidden_layers": 24, "num_attention_heads": 16}
DEFAULT_TEXT_CONFIG = {"model_type": "llama", "vocab_size": 32064}
REDUCTION_SETTINGS = ("visual_token_reduction", "reduced_visual_tokens")
CHECKED_SETTINGS = ("alignment", "visual_attention", "visual_feed_forward", *REDUCTION_SETTINGS)
CHECKED_SETTINGS += ("image_grid_pinpoints", "vision_aspect_ratio", "fold_projectors")

MOST_LAYERS, LARGEST_HEAD = 1000, 2**16  # a check of a config makes lists, and tables for heads, of that length
SIZES, COUNTS, ANY_COUNT, BOOL = (1, 2**31 - 1), (1, MOST_LAYERS), (0, MOST_LAYERS), [True, False]
# What the fields of language models, of encoders and of SaisaConfig itself have to be (see `wanted`).
FIELDS = (
    ("hidden_size intermediate_size moe_intermediate_size vocab_size max_position_embeddings hidden_sizes", SIZES),
    ("num_channels patch_size image_size num_patches images_at_once original_max_position_embeddings", SIZES),
    ("num_hidden_layers num_attention_heads num_key_value_heads num_experts_per_tok depths num_stages", COUNTS),
    ("decoder_sparse_step", COUNTS),
    ("num_experts num_local_experts no_rope_layers mlp_only_layers num_register_tokens", ANY_COUNT),
    ("rms_norm_eps layer_norm_eps rope_theta rope_local_base_freq query_pre_attn_scalar mlp_ratio", (1e-30, 1e15)),
    ("logits_scaling factor low_freq_factor high_freq_factor beta_fast beta_slow", (1e-30, 1e15)),
    ("short_factor long_factor", (1e-30, 1e15)),
    ("attention_dropout attention_probs_dropout_prob hidden_dropout_prob drop_path_rate embd_pdrop", (0.0, 1.0)),
    ("resid_pdrop initializer_range partial_rotary_factor", (0.0, 1.0)),
    ("layer_scale_init_value initializer_factor", (0.0, 1e6)),
    ("embedding_multiplier attention_multiplier residual_multiplier layerscale_value", (-1e6, 1e6)),
    ("attention_bias mlp_bias qkv_bias norm_topk_prob use_sliding_window use_swiglu_ffn", BOOL),
    ("tie_word_embeddings projector_bias leading_text_skips_attention fold_projectors", BOOL),
    ("hidden_act hidden_activation", list(ACT2FN) if "quick_gelu" in ACT2FN else str),  # not in a stand-in's list
    ("projector_hidden_act", list(ACT2FN)),
    ("full_attention sliding_attention", dict),
    ("pruned_heads", [{}]),
    ("vision_feature_select_strategy", ["default", "full"]),
    ("projector_sharing", ["per_layer", "shared"]),
    ("alignment", ["input_space", "embedding_space"]),
)
OPTIONAL_FIELDS = (
    ("head_dim", (1, LARGEST_HEAD)),
    ("sliding_window projector_hidden_size", SIZES),
    ("attn_logit_softcapping final_logit_softcapping attention_factor", (1e-30, 1e15)),
    ("pad_token_id bos_token_id eos_token_id", (1 - 2**31, 2**31 - 1)),
    ("image_seq_length", (1, MOST_TOKENS)),
    ("layer_types", ["full_attention", "sliding_attention"]),
    ("rope_parameters rope_scaling", dict),
)
OPTIONAL = {name for names, _ in OPTIONAL_FIELDS for name in names.split()}
RULES = {name: rule for names, rule in FIELDS + OPTIONAL_FIELDS for name in names.split()}
LISTS = ("layer_types", "mlp_only_layers", "no_rope_layers", "short_factor", "long_factor", "hidden_sizes", "depths")
MAY_BE_LISTS = (*LISTS, "eos_token_id", "image_size", "patch_size")


class SaisaConfig(PretrainedConfig):
    """Configuration of a SAISA model (Yuan et al., arXiv 2502.02458): a vision encoder, a language model, and the projectors
    that map the encoder's features into the input space of each decoder layer's self-attention.

    Args:
        vision_config: the vision encoder: `clip_vision_model`, `siglip_vision_model`, `siglip2_vision_model`, `dinov2`,
            `convnext`, or another that `AutoModel` builds and that yields states of patches or feature maps (`vit`,
            `dinov3_vit`, `timm_wrapper` ...). A dict without `model_type` is CLIP's. `None`: CLIP ViT-L/14 at 336 px.
        text_config: the language model: `llama`, `mistral`, `qwen2`, `qwen3`, `gemma2`, `gemma3_text`, `phi3`, `olmo2`,
            `granite`, `smollm3`, `qwen3_moe` or `mixtral`. A dict without `model_type` is Llama's. `None`: Llama 7B's.
        image_token_id: vocabulary index of the placeholder for one visual token. Also readable as `image_token_index`.
        image_seq_length: visual tokens per image, behind `visual_token_reduction`. `None`: computed from `vision_config`.
        vision_feature_layer: index into the encoder's `hidden_states`; several are concatenated on the last axis.
        vision_feature_select_strategy: `"default"` drops the class token, where the encoder has one; `"full"` keeps it.
        projector_hidden_act, projector_bias: activation between the projector's two linear maps; whether these have biases.
        projector_hidden_size: width between them. `None`: the language model's hidden size.
        fold_projectors: whether `from_pretrained` calls `SaisaModel.fold_projectors`, for narrow projectors.
        projector_sharing: `"per_layer"`: each decoder layer has a projector of its own (the SAISA model). `"shared"`: one
            serves all layers (the paper's pre-training stage, and always in embedding space).
        visual_layers: the decoder layers that see the image. `None`: all of them, as always in embedding space.
        leading_text_skips_attention: whether text in front of a prompt's first image passes the layers without attention, as
            in ViCA's 7B model (arXiv 2602.07574). Later text attends to it all the same.
        tie_word_embeddings: whether the head shares the embedding's weights. `None`: the language model's own setting.
        alignment: `"input_space"`: projectors map the features into the input space of each layer's self-attention (SAISA).
            `"embedding_space"`: one projector puts visual tokens among the word embeddings, and their hidden states travel
            through the layers (LLaVA and what lies between the two, see `embedding_space_saisa.py`).
        visual_attention: in embedding space, for all decoder layers or for each in turn: `"full"`, visual tokens attend to
            all tokens in front of them (LLaVA), or `"none"`, they are keys and values only (NAAViT).
        visual_feed_forward: in embedding space, likewise: whether visual tokens pass the feed-forward network.
        visual_token_reduction: what makes fewer visual tokens of the encoder's features, in front of the projectors:
            `"avg_pool"` (the mean of 2 x 2), `"pixel_unshuffle"` (2 x 2 side by side), `"resampler"` (learned queries), or
            `"class_attention"` (those that the encoder's class token attends to most). `None`: nothing.
        reduced_visual_tokens: visual tokens per image behind `"resampler"` and `"class_attention"`.
        image_grid_pinpoints: resolutions [height, width], multiples of the encoder's, at which tiles of an image are read
            beside the whole, as LLaVA-NeXT does (see `tiles_saisa.py`). `None`: the whole image alone.
        vision_aspect_ratio: with it, `"anyres_max_9"` scales tiles down to about so many, as LLaVA-OneVision does.
        images_at_once: images and video frames that the encoder reads at a time; more take turns, for less memory.

    Raises:
        ValueError: a field does not fit the others; the message names the field, its value and what is allowed.
    """

    model_type = "saisa"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    attribute_map = {"image_token_index": "image_token_id"}
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states"]

    def __init__(
        self,
        vision_config: dict | PretrainedConfig | None = None,
        text_config: dict | PretrainedConfig | None = None,
        image_token_id: int = 32000,
        image_seq_length: int | None = None,
        vision_feature_layer: int | list[int] = -2,
        vision_feature_select_strategy: str = "default",
        projector_hidden_act: str = "gelu",
        projector_bias: bool = True,
        projector_hidden_size: int | None = None,
        projector_sharing: str = "per_layer",
        visual_layers: list[int] | None = None,
        tie_word_embeddings: bool | None = None,
        alignment: str = "input_space",
        visual_attention: str | list[str] = "none",
        visual_feed_forward: bool | list[bool] = True,
        visual_token_reduction: str | None = None,
        reduced_visual_tokens: int | None = None,
        image_grid_pinpoints: list[list[int]] | None = None,
        vision_aspect_ratio: str | None = None,
        images_at_once: int = 32,
        leading_text_skips_attention: bool = False,
        fold_projectors: bool = False,
        **kwargs,
    ):
        known_types = tuple(optional("transformers", "CONFIG_MAPPING", ()))
        self.vision_config = _sub_config("vision_config", vision_config, DEFAULT_VISION_CONFIG, known_types)
        self.text_config = _sub_config("text_config", text_config, DEFAULT_TEXT_CONFIG, tuple(FAMILIES))
        self.image_token_id = kwargs.pop("image_token_index", image_token_id)
        self.image_seq_length = image_seq_length
        self.vision_feature_layer = _listed(vision_feature_layer)
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.projector_hidden_act, self.projector_bias = projector_hidden_act, projector_bias
        self.projector_hidden_size = projector_hidden_size
        if alignment == "embedding_space" and projector_sharing == "per_layer":
            projector_sharing = "shared"  # "per_layer" is the default, not a wish
        self.projector_sharing = projector_sharing
        self.alignment, self.visual_layers = alignment, _listed(visual_layers)
        self.visual_attention, self.visual_feed_forward = _listed(visual_attention), _listed(visual_feed_forward)
        self.visual_token_reduction, self.reduced_visual_tokens = visual_token_reduction, reduced_visual_tokens
        self.image_grid_pinpoints = _listed(image_grid_pinpoints)
        self.vision_aspect_ratio = vision_aspect_ratio
        self.images_at_once = images_at_once
        self.leading_text_skips_attention, self.fold_projectors = leading_text_skips_attention, fold_projectors
        if tie_word_embeddings is None:
            tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        _check_fields("", {"tie_word_embeddings": tie_word_embeddings})

        _made("", super().__init__, kwargs)
        # transformers 4.57 reads it off the text config, 5.x off the model's own
        self.tie_word_embeddings = self.text_config.tie_word_embeddings = tie_word_embeddings
        self.auto_map = dict(AUTO_MAP)  # a checkpoint names its own code files, wherever it was read from
        self.check()
        if image_seq_length is None:
            tokens = self.encoder_tokens_per_image
            grid = grid_of(tokens, *image_size(self.vision_config)) if visual_token_reduction else (1, tokens)
            self.image_seq_length = reduced_length(visual_token_reduction, reduced_visual_tokens, tokens, grid)
            what = "image_seq_length (of vision_config.image_size and patch_size)"
            check_value(what, self.image_seq_length, RULES["image_seq_length"])

    @property
    def vision_feature_layers(self) -> list[int]:
        """`vision_feature_layer` as a list."""
        return [self.vision_feature_layer] if isinstance(self.vision_feature_layer, int) else self.vision_feature_layer

    @property
    def vision_feature_size(self) -> int:
        """Width of what the projectors read: the selected states' widths, added up; fourfold for 2 x 2 side by side."""
        vision = self.vision_config
        if vision.model_type == "convnext":  # one width per stage; state 0 is the stem's, as wide as the first stage
            widths = [vision.hidden_sizes[0], *vision.hidden_sizes]
        elif vision.model_type in CLASS_TOKENS:
            widths = [vision.hidden_size] * (vision.num_hidden_layers + 1)
        else:
            widths = encoder_states(vision).widths
        side_by_side = 4 if self.visual_token_reduction == "pixel_unshuffle" else 1
        return side_by_side * sum(widths[layer] for layer in self.vision_feature_layers)

    @property
    def vision_prefix_tokens(self) -> int:
        """How many tokens at the front of the encoder's states do not stand for a patch: class and register tokens."""
        known = CLASS_TOKENS.get(self.vision_config.model_type)
        return encoder_states(self.vision_config).prefix if known is None else known

    @property
    def dropped_vision_tokens(self) -> int:
        """How many tokens at the front of the encoder's states are not handed on as visual tokens."""
        return self.vision_prefix_tokens if self.vision_feature_select_strategy == "default" else 0

    @property
    def kept_prefix_tokens(self) -> int:
        """How many tokens at the front of the visual tokens do not stand for a patch."""
        return self.vision_prefix_tokens - self.dropped_vision_tokens

    def sees_image(self, layer_idx: int) -> bool:
        """Whether decoder layer `layer_idx` has visual tokens among its keys and values."""
        return self.visual_layers is None or layer_idx in self.visual_layers

    @property
    def in_embedding_space(self) -> bool:
        """Whether visual tokens travel through the layers, with hidden states and outputs of their own."""
        return self.alignment == "embedding_space"

    def visual_tokens_attend(self, layer_idx: int) -> bool:
        """Whether visual tokens are queries in decoder layer `layer_idx`."""
        return self.in_embedding_space and _of_layer(self.visual_attention, layer_idx) == "full"

    def visual_tokens_are_fed(self, layer_idx: int) -> bool:
        """Whether visual tokens pass the feed-forward network of decoder layer `layer_idx`."""
        return self.in_embedding_space and _of_layer(self.visual_feed_forward, layer_idx)

    @property
    def folded_width(self) -> int:
        """Columns of folded projectors: `projector_hidden_size`, one for a bias, one for newlines, and up to a multiple of
        eight, as kernels like it. Raises ValueError where folding saves nothing."""
        size, space, inner = self.text_config.hidden_size, self.alignment, self.projector_hidden_size
        width = -(-((inner or size) + 1 + (self.image_grid_pinpoints is not None)) // 8) * 8
        if width >= size or self.in_embedding_space:
            fix = f"needs projector_hidden_size below {size}, in input space, to save anything"
            raise ValueError(f"fold_projectors {fix}: it is {inner}, in {space!r}.")
        return width

    @property
    def features_are_projected(self) -> bool:
        """Whether images leave `get_image_features` past the projector: tiles are put together behind it, as in LLaVAs."""
        return self.in_embedding_space and self.image_grid_pinpoints is not None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """transformers' own; of a LLaVA, LLaVA-NeXT or LLaVA-OneVision it makes the config of the same model in embedding
        space. Raises ValueError if there is none."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") in LLAVAS:
            config_dict = from_package("Reading a LLaVA", "checkpoints.llava", "config_of_llava")(config_dict)
        return config_dict, kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """transformers' own, which sets what `kwargs` name without a check. Here those that change the model are checked, and
        `image_seq_length` follows a change of the reduction."""
        if UNFINISHED in config_dict:
            raise ValueError(config_dict[UNFINISHED])
        switches = {name: kwargs.pop(name) for name in CHECKED_SETTINGS if name in kwargs}
        if any(switches.get(name) != config_dict.get(name) for name in REDUCTION_SETTINGS if name in switches):
            switches["image_seq_length"] = None
        return super().from_dict({**config_dict, **switches}, **kwargs)

    def to_dict(self):
        """The configuration as a dict from which `SaisaConfig.from_dict` makes an equal one."""
        config_dict = super().to_dict()
        return config_dict | {name: comparable_config_dict(config_dict[name]) for name in self.sub_configs}

    def to_diff_dict(self):
        """What `config.json` holds: the sub-configs complete, in a form that every supported release reads alike."""
        whole = self.to_dict()
        diff = super().to_diff_dict() | {name: portable_config_dict(whole[name]) for name in self.sub_configs}
        return diff | {name: whole[name] for name in ("auto_map", "tie_word_embeddings")}

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """Writes `config.json` and the code files that it names; with `push_to_hub=True` uploads them as well."""
        with saved_together(save_directory) as folder:
            write_code_files(folder)
            super().save_pretrained(folder)
        if push_to_hub:
            self.push_to_hub(**{"repo_id": Path(save_directory).resolve().name, **kwargs})

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Nothing to do: `auto_map` is complete as it stands."""

    def visual_tokens_of(self, height: int, width: int) -> int | None:
        """How many visual tokens an image of so many processed pixels has; None where the encoder has to be asked."""
        if self.vision_config.model_type not in CLASS_TOKENS:
            return None
        side = self._strides()[self.vision_feature_layers[0]]
        rows, columns = height // side, width // side
        tokens = rows * columns + self.kept_prefix_tokens
        return reduced_length(self.visual_token_reduction, self.reduced_visual_tokens, tokens, (rows, columns))

    @property
    def encoder_tokens_per_image(self) -> int:
        """Tokens that the encoder hands on for an image of the size it is made for, in front of `visual_token_reduction`.
        Raises ValueError if its configuration names no size."""
        vision = self.vision_config
        if vision.model_type == "siglip2_vision_model":
            return vision.num_patches
        if vision.model_type not in CLASS_TOKENS:
            return encoder_states(vision).tokens[self.vision_feature_layers[0]] - self.dropped_vision_tokens
        size = getattr(vision, "image_size", None)
        if not _is_integer(size):
            raise ValueError(f"vision_config.image_size={size!r} is not a number of pixels: give image_seq_length.")
        return (size // self._strides()[self.vision_feature_layers[0]]) ** 2 + self.kept_prefix_tokens

    def _strides(self) -> list[int]:
        """Pixels on the side of a token, for each of the `hidden_states` of an encoder in `CLASS_TOKENS`."""
        vision = self.vision_config
        if vision.model_type == "convnext":  # the stem divides by `patch_size`, each stage after the first by two
            return [vision.patch_size * 2 ** max(index - 1, 0) for index in range(len(vision.hidden_sizes) + 1)]
        return [vision.patch_size] * (vision.num_hidden_layers + 1)

    def check(self) -> None:
        """Raises ValueError if a field is wrong, or does not fit the others. A model that is made checks again, as fields may
        have changed."""
        text, names = self.text_config, ("vision_feature_select_strategy", "image_seq_length", "alignment")
        names += ("projector_hidden_act", "projector_bias", "projector_hidden_size", "projector_sharing")
        names += ("leading_text_skips_attention", "images_at_once", "fold_projectors")
        _check_fields("", {name: getattr(self, name) for name in names}, complete=True)
        _check_text(text)
        if not _is_integer(self.image_token_id, 0, text.vocab_size):
            expected = f"an index in [0, {text.vocab_size}), or a larger text_config.vocab_size for a new token"
            raise ValueError(f"image_token_id={shown(self.image_token_id)}: expected {expected}.")
        _check_vision(self.vision_config)
        self._check_vision_feature_layer()
        check_reduction(self)
        check_tiles(self)
        self._check_alignment(text.num_hidden_layers)
        _ = self.fold_projectors and self.folded_width

    def _check_vision_feature_layer(self):
        vision, given = self.vision_config, shown(self.vision_feature_layer)
        sizes = self._strides() if vision.model_type in CLASS_TOKENS else encoder_states(vision).tokens
        layers, count = self.vision_feature_layers, len(sizes)
        if not _are_indices(layers, -count, count):
            states = f"{-count} to {count - 1}, a hidden state of {vision.model_type}"
            raise ValueError(f"vision_feature_layer={given}: expected an index from {states}, or a list of them.")
        if len({sizes[layer] for layer in layers}) > 1:
            raise ValueError(f"vision_feature_layer={given}: these states differ in size. Choose those of one stage.")

    def _check_alignment(self, count: int):
        if self.leading_text_skips_attention and self.in_embedding_space:
            raise ValueError("leading_text_skips_attention=True: in embedding space text always attends, leave it out.")
        for name, default, other in (("visual_attention", "none", "full"), ("visual_feed_forward", True, False)):
            value = getattr(self, name)
            if not self.in_embedding_space and value != default:
                fix = 'in input space leave it out, or set alignment="embedding_space"'
                raise ValueError(f"{name}={shown(value)}: {fix}.")
            values = value if isinstance(value, list) else [value] * count
            if len(values) != count:
                expected = f"one value, or one for each of the {count} decoder layers"
                raise ValueError(f"{name} has {len(values)} entries: expected {expected}.")
            for one in values:
                check_value(name, one, [other, default])
        layers = self.visual_layers
        if layers is not None and self.in_embedding_space:
            instead = f'visual_attention=["none" if layer in LAYERS else "full" for layer in range({count})]'
            raise ValueError(
                f"visual_layers={shown(layers)}: all layers see the image in embedding space. Give {instead}."
            )
        if layers is not None and not (_are_indices(layers, 0, count) and len(set(layers)) == len(layers)):
            expected = f"a list of distinct layers between 0 and {count - 1}, at least one, or None for all of them"
            raise ValueError(f"visual_layers={shown(layers)}: expected {expected}.")


def _listed(value):
    """JSON knows no tuples, and ranges are handy: both become lists; everything else stays for `check` to judge."""
    return list(value) if isinstance(value, (tuple, range)) and len(value) <= MOST_LAYERS else value


def _of_layer(value, layer_idx: int):
    return value[layer_idx] if isinstance(value, list) else value


def _is_integer(value, first: int = 1, end: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and first <= value < end


def _are_indices(values, first: int, end: int) -> bool:
    """Whether this is a list of integers from `first` to before `end`, at least one."""
    is_list = isinstance(values, list) and 0 < len(values) <= MOST_LAYERS
    return is_list and all(_is_integer(value, first, end) for value in values)


def _sub_config(field: str, value, default: dict, allowed: tuple[str, ...]):
    """The config object for `value` (None, dict or config). Its `model_type` has to be in `allowed`, unless that is empty."""
    value = default if value is None else value
    is_dict = isinstance(value, dict)
    if is_dict:
        value = {"model_type": default["model_type"], **value}
    elif not isinstance(value, PretrainedConfig):
        raise ValueError(f"{field} is a {type(value).__name__}: expected a dict or a transformers config.")
    model_type = value["model_type"] if is_dict else value.model_type
    if allowed:
        check_value(f"{field}.model_type", model_type, list(allowed))
    if not is_dict:
        return value
    _check_fields(f"{field}.", value, any_lists=field == "vision_config" and model_type not in CLASS_TOKENS)
    return _made(f"{field}.", lambda **values: AutoConfig.for_model(**readable_config_dict(values)), value)


def _made(where: str, make, values: dict):
    """`make(**values)`, with a ValueError in place of what transformers raises that names the one of `values` to blame."""
    try:
        return make(**values)
    except ImportError:
        raise
    except Exception as error:
        reason, culprit = f"{type(error).__name__}: {' '.join(str(error).split())}", "it"
        for name in values:
            with contextlib.suppress(Exception):
                make(**{key: value for key, value in values.items() if key != name})
                culprit = f"{name}={shown(values[name])}"
                break
        raise ValueError(f"{where}{culprit}: transformers refuses it ({reason}).") from error


def _check_fields(where: str, values: dict, any_lists: bool = False, complete: bool = False) -> None:
    """Raises ValueError if one of `values` is not what `RULES` allow. None stands for a default, or where they are `complete`
    for nothing. Lists of what is allowed are right for some fields, or for all of them."""
    for name, value in values.items():
        if name not in RULES or (value is None and (name in OPTIONAL or not complete)):
            continue
        rule = RULES[name]
        if isinstance(value, (list, tuple)) and (any_lists or name in MAY_BE_LISTS):
            for index, entry in enumerate(value):
                check_value(f"{where}{name}[{index}]", entry, list if any_lists and isinstance(entry, list) else rule)
        else:
            check_value(f"{where}{name}", value, list if name in LISTS and not any_lists else rule)
        if rule is dict:
            _check_fields(f"{where}{name}.", value)


def _check_relations(where: str, config, relations: dict[str, tuple[bool, str]]) -> None:
    """Raises ValueError if a field of `config` does not fit the others: `relations` say whether, and what was expected."""
    for name, (fits, expected) in relations.items():
        if not fits:
            raise ValueError(f"{where}{name}={shown(getattr(config, name))}: expected {expected}.")


def _check_text(text) -> None:
    _check_fields("text_config.", vars(text), complete=True)
    family, layers, heads = language_model_family(text), text.num_hidden_layers, text.num_attention_heads
    pad, tokens, by_layer = getattr(text, "pad_token_id", None), text.vocab_size, f"one for each of {layers} layers"
    kinds = range(layers) if family.windows != "by layer" else text.layer_types or ()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    window = "a number (and use_sliding_window): it is in layer_types"
    relations = {
        "hidden_size": (family.head_dim <= LARGEST_HEAD, f"at most {LARGEST_HEAD} for each of {heads} heads"),
        "num_key_value_heads": (heads % text.num_key_value_heads == 0, f"a divisor of num_attention_heads={heads}"),
        "pad_token_id": (pad is None or -tokens <= pad < tokens, f"None, or less than vocab_size={tokens}"),
        "num_experts_per_tok": (
            not experts or text.num_experts_per_tok <= experts,
            f"at most num_experts (num_local_experts), {experts}",
        ),
        "layer_types": (len(kinds) >= layers, by_layer),
        "no_rope_layers": (len(getattr(text, "no_rope_layers", range(layers))) >= layers, by_layer),
        "sliding_window": ("sliding_attention" not in kinds or text.sliding_window, window),
    }
    for name, value in family.only.items():
        relations[name] = (getattr(text, name, None) in (value, None), f"{value!r} for {text.model_type}")
    _check_relations("text_config.", text, relations)
    _check_rotation(text, family)


def _check_rotation(text, family) -> None:
    """Raises ValueError if the rotary embedding cannot be computed, is not finite, or is wider than a head."""
    try:
        with torch.device("cpu"):
            rotary, x, positions = family.rotary_embedding(), torch.zeros(1), (0, text.max_position_embeddings)
            made = [rotary(x, torch.tensor([[p]]), kind) for kind in set(family.attention_types) for p in positions]
        if all(0 < x.shape[-1] <= family.head_dim and x.isfinite().all() for cos_sin in made for x in cos_sin):
            return
        reason = f"it is wider than a head ({family.head_dim}), or empty, or not finite"
    except ImportError:
        return  # a release without this part, as making the model says
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
    parts = ("rope", "rotary", "head", "hidden_size", "max_position")
    used = [f"{name}={shown(value)}" for name, value in vars(text).items() if any(part in name for part in parts)]
    raise ValueError(f"text_config makes no rotary embedding: {reason}. Check {', '.join(used)}.")


def _check_vision(vision) -> None:
    is_known = vision.model_type in CLASS_TOKENS  # any other is asked, see `encoder_states`
    fields = {name: value for name, value in vars(vision).items() if name != "layer_types"}
    _check_fields("vision_config.", fields, any_lists=not is_known, complete=is_known)
    if not is_known:
        return
    size, patches, relations = getattr(vision, "image_size", None), getattr(vision, "num_patches", 1), {}
    most, heads = size if isinstance(size, int) else MOST_TOKENS, getattr(vision, "num_attention_heads", 1)
    if vision.model_type == "convnext":
        for name in ("depths", "hidden_sizes"):
            relations[name] = (
                len(getattr(vision, name)) == vision.num_stages,
                f"num_stages={vision.num_stages} entries",
            )
    else:
        relations["hidden_size"] = (vision.hidden_size % heads == 0, f"a multiple of num_attention_heads={heads}")
    is_patch = _is_integer(vision.patch_size, 1, most + 1)
    is_one_size = vision.model_type in ("dinov2", "convnext") or not isinstance(size, (list, tuple))
    relations["patch_size"] = (is_patch, f"a whole number, at most image_size={shown(size)}")
    relations["image_size"] = (is_one_size, "a whole number")
    relations["num_patches"] = (math.isqrt(patches) ** 2 == patches, "the square of a whole number")
    _check_relations("vision_config.", vision, relations)
