# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""SaisaConfig: what a SAISA model is made of, and whether the pieces fit together."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig, PretrainedConfig

from .checkpoint_saisa import AUTO_MAP, from_package, write_code_files
from .compat_saisa import ACT2FN, comparable_config_dict, findable, optional, portable_config_dict, readable_config_dict
from .language_models_saisa import FAMILIES, language_model_family
from .saving_saisa import UNFINISHED, saved_together
from .vision_saisa import CLASS_TOKENS, check_reduction, encoder_states, grid_of, image_size, reduced_length


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
        projector_sharing: `"per_layer"`: each decoder layer has a projector of its own (the SAISA model). `"shared"`: one
            serves all layers (the paper's pre-training stage, and always in embedding space).
        visual_layers: the decoder layers that see the image. `None`: all of them, as always in embedding space.
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
        if tie_word_embeddings is None:
            tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))

        super().__init__(**kwargs)
        # transformers 4.57 reads it off the text config, 5.x off the model's own
        self.tie_word_embeddings = self.text_config.tie_word_embeddings = tie_word_embeddings
        self.auto_map = dict(AUTO_MAP)  # a checkpoint names its own code files, wherever it was read from
        self._check()
        if image_seq_length is None:
            tokens = self.encoder_tokens_per_image
            grid = grid_of(tokens, *image_size(self.vision_config)) if visual_token_reduction else (1, tokens)
            self.image_seq_length = reduced_length(visual_token_reduction, reduced_visual_tokens, tokens, grid)

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

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """transformers' own; of a `LlavaForConditionalGeneration` it makes the config of the same model in embedding space.
        Raises ValueError if there is none."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if config_dict.get("model_type") == "llava":
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

    def _check(self):
        text = self.text_config
        _check_choice("vision_feature_select_strategy", self.vision_feature_select_strategy, ("default", "full"))
        _check_choice("projector_sharing", self.projector_sharing, ("per_layer", "shared"))
        _check_choice("projector_hidden_act", self.projector_hidden_act, tuple(ACT2FN))
        _check_choice("projector_bias", self.projector_bias, (True, False))
        if not _is_integer(self.image_token_id, 0, text.vocab_size):
            expected = f"an index in [0, {text.vocab_size}), or a larger text_config.vocab_size for a new token"
            raise ValueError(f"image_token_id={self.image_token_id!r}: expected {expected}.")
        for name, what in (("image_seq_length", "number of visual tokens"), ("projector_hidden_size", "width")):
            value = getattr(self, name)
            if value is not None and not _is_integer(value):
                raise ValueError(f"{name}={value!r}: expected a positive {what}, or None.")
        self._check_vision_feature_layer()
        check_reduction(self)
        for name, value in language_model_family(text).only.items():
            found = getattr(text, name, value)
            if found not in (value, None):
                raise ValueError(f"text_config.{name}={found!r} does not suit {text.model_type}: expected {value!r}.")
        self._check_alignment(text.num_hidden_layers)

    def _check_vision_feature_layer(self):
        vision, given = self.vision_config, self.vision_feature_layer
        sizes = self._strides() if vision.model_type in CLASS_TOKENS else encoder_states(vision).tokens
        layers, count = self.vision_feature_layers, len(sizes)
        if not _are_indices(layers, -count, count):
            states = f"{-count} to {count - 1}, a hidden state of {vision.model_type}"
            raise ValueError(f"vision_feature_layer={given!r}: expected an index from {states}, or a list of them.")
        if len({sizes[layer] for layer in layers}) > 1:
            raise ValueError(f"vision_feature_layer={given!r}: these states differ in size. Choose those of one stage.")

    def _check_alignment(self, count: int):
        _check_choice("alignment", self.alignment, ("input_space", "embedding_space"))
        for name, default, other in (("visual_attention", "none", "full"), ("visual_feed_forward", True, False)):
            value = getattr(self, name)
            if not self.in_embedding_space and value != default:
                raise ValueError(f'{name}={value!r}: in input space leave it out, or set alignment="embedding_space".')
            values = value if isinstance(value, list) else [value] * count
            if len(values) != count:
                expected = f"one value, or one for each of the {count} decoder layers"
                raise ValueError(f"{name} has {len(values)} entries: expected {expected}.")
            for one in values:
                _check_choice(name, one, (other, default))
        layers = self.visual_layers
        if layers is not None and self.in_embedding_space:
            instead = f'visual_attention=["none" if layer in LAYERS else "full" for layer in range({count})]'
            raise ValueError(f"visual_layers={layers!r}: all layers see the image in embedding space. Give {instead}.")
        if layers is not None and not (_are_indices(layers, 0, count) and len(set(layers)) == len(layers)):
            expected = f"a list of distinct layers between 0 and {count - 1}, at least one, or None for all of them"
            raise ValueError(f"visual_layers={layers!r}: expected {expected}.")


def _listed(value):
    """JSON knows no tuples, and ranges are handy: both become lists; everything else stays for `_check` to judge."""
    return list(value) if isinstance(value, (tuple, range)) else value


def _of_layer(value, layer_idx: int):
    return value[layer_idx] if isinstance(value, list) else value


def _is_integer(value, first: int = 1, end: float = math.inf) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and first <= value < end


def _are_indices(values, first: int, end: int) -> bool:
    """Whether this is a list of integers from `first` to before `end`, at least one."""
    return isinstance(values, list) and bool(values) and all(_is_integer(value, first, end) for value in values)


def _sub_config(field: str, value, default: dict, allowed: tuple[str, ...]):
    """The config object for `value` (None, dict or config). Its `model_type` has to be in `allowed`, unless that is empty."""
    value = default if value is None else value
    is_dict = isinstance(value, dict)
    if is_dict:
        value = readable_config_dict({"model_type": default["model_type"], **value})
    elif not isinstance(value, PretrainedConfig):
        raise ValueError(f"{field} is a {type(value).__name__}: expected a dict or a transformers config.")
    if allowed:
        _check_choice(f"{field}.model_type", value["model_type"] if is_dict else value.model_type, allowed)
    return AutoConfig.for_model(**value) if is_dict else value


def _check_choice(field: str, value, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{field}={value!r} is not supported: expected one of {', '.join(map(repr, allowed))}.")
