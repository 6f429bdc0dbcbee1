# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""SaisaConfig: what a SAISA model is made of, and whether the pieces fit together."""

from pathlib import Path
from typing import TYPE_CHECKING

from transformers import AutoConfig, PretrainedConfig

from .compat_saisa import (
    ACT2FN,
    comparable_config_dict,
    config_from_dict,
    known_model_types,
    name_for_serving,
    portable_config_dict,
    readable_config_dict,
)
from .encoders_saisa import CLASS_TOKENS, EncoderStates, encoder_states, picture_size
from .hub_saisa import AUTO_MAP, write_code_files
from .language_models_saisa import FAMILIES, LanguageModelFamily, language_model_family
from .visual_reduction_saisa import check_reduction, grid_of, reduced_length


if TYPE_CHECKING:  # transformers carries along the files that a checkpoint's module names, so that it saves whole again
    from .adapters_saisa import named_by  # noqa: F401
    from .attention_saisa import Visibility  # noqa: F401
    from .devices_saisa import check_device_map  # noqa: F401
    from .embedding_space_saisa import EmbeddingSpaceLayer  # noqa: F401
    from .images_saisa import load_image  # noqa: F401
    from .loss_saisa import chunked_cross_entropy  # noqa: F401
    from .model_card_saisa import model_card  # noqa: F401
    from .modeling_saisa import SaisaModel  # noqa: F401
    from .parts_saisa import assemble  # noqa: F401
    from .processing_saisa import SaisaProcessor  # noqa: F401
    from .quantization_saisa import settle  # noqa: F401
    from .token_layout_saisa import TokenLayout  # noqa: F401
    from .visual_states_saisa import SaisaVisualStates  # noqa: F401


DEFAULT_VISION_CONFIG = {  # CLIP ViT-L/14 at 336 px, the paper's encoder
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "projection_dim": 768,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
DEFAULT_TEXT_CONFIG = {"model_type": "llama", "vocab_size": 32064}
REDUCTION_SETTINGS = ("visual_token_reduction", "reduced_visual_tokens")
CHECKED_SETTINGS = ("alignment", "visual_attention", "visual_feed_forward", *REDUCTION_SETTINGS)


class SaisaConfig(PretrainedConfig):
    r"""
    Configuration of a SAISA model (Yuan et al., arXiv 2502.02458): a vision encoder, a language model, and the projectors
    that map the encoder's features into the input space of each decoder layer's self-attention.

    Args:
        vision_config (`dict` or `PretrainedConfig`, *optional*):
            The vision encoder: `clip_vision_model`, `siglip_vision_model`, `siglip2_vision_model`, `dinov2`, `convnext`,
            or another that `AutoModel` builds and that yields states of patches or feature maps for `pixel_values`
            (`vit`, `dinov3_vit`, `timm_wrapper` ...). A dict without `model_type` is CLIP's. Defaults to CLIP ViT-L/14 at
            336 px.
        text_config (`dict` or `PretrainedConfig`, *optional*):
            The language model: `llama`, `mistral`, `qwen2`, `qwen3`, `gemma2`, `gemma3_text`, `phi3`, `olmo2`, `granite`,
            `smollm3`, `qwen3_moe` or `mixtral`. A dict without `model_type` is Llama's. Defaults to Llama 7B with 32064
            vocabulary rows.
        image_token_id (`int`, *optional*, defaults to 32000):
            Vocabulary index of the placeholder that stands for one visual token. Also readable as `image_token_index`.
        image_seq_length (`int`, *optional*):
            Visual tokens per picture, behind `visual_token_reduction`. `None` computes it from the encoder's image and patch
            size.
        vision_feature_layer (`int` or `list[int]`, *optional*, defaults to -2):
            Index into the encoder's `hidden_states`. The states of several layers are concatenated on the last axis.
        vision_feature_select_strategy (`str`, *optional*, defaults to `"default"`):
            `"default"` drops the class token, where the encoder has one; `"full"` keeps it.
        projector_hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation between the projector's two linear maps.
        projector_bias (`bool`, *optional*, defaults to `True`):
            Whether these have biases.
        projector_hidden_size (`int`, *optional*):
            Width between them. `None` is the language model's hidden size.
        projector_sharing (`str`, *optional*, defaults to `"per_layer"`):
            `"per_layer"`: each decoder layer has a projector of its own (the SAISA model). `"shared"`: one projector
            serves all layers (the paper's pre-training stage).
        visual_layers (`list[int]`, *optional*):
            The decoder layers that see the picture. `None` is all of them.
        visual_token_reduction (`str`, *optional*):
            What makes fewer visual tokens of the encoder's features, in front of the projectors: `"avg_pool"` (the mean of
            2 x 2), `"pixel_unshuffle"` (2 x 2 side by side), `"resampler"` (learned queries), or `"class_attention"` (those
            that the encoder's class token attends to most). `None` is nothing.
        reduced_visual_tokens (`int`, *optional*):
            Visual tokens per picture behind `"resampler"` and `"class_attention"`.
        tie_word_embeddings (`bool`, *optional*):
            Whether the head shares the embedding's weights. `None` takes the language model's own setting.
        alignment (`str`, *optional*, defaults to `"input_space"`):
            `"input_space"`: projectors map the features into the input space of each layer's self-attention (SAISA).
            `"embedding_space"`: one projector puts visual tokens among the embeddings of the words, and their hidden states
            travel through the layers (LLaVA and what lies between the two, see `embedding_space_saisa.py`).
            `projector_sharing` is `"shared"` there, whether it says so or not, and `visual_layers` is `None`: what a layer
            does to visual tokens is said by the next two fields.
        visual_attention (`str` or `list[str]`, *optional*, defaults to `"none"`):
            In embedding space, for all decoder layers or for each in turn: `"full"`, visual tokens attend to all tokens in
            front of them (LLaVA), or `"none"`, they are keys and values only (NAAViT), and keep their hidden state.
        visual_feed_forward (`bool` or `list[bool]`, *optional*, defaults to `True`):
            In embedding space, for all decoder layers or for each in turn: whether visual tokens pass the feed-forward
            network.

    Raises:
        ValueError: a field that does not fit the others; the message names the field, its value and what is allowed.
    """

    model_type = "saisa"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    attribute_map = {"image_token_index": "image_token_id"}
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_hidden_states"]

    def __init__(
        self,
        vision_config=None,
        text_config=None,
        image_token_id=32000,
        image_seq_length=None,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        projector_hidden_act="gelu",
        projector_bias=True,
        projector_hidden_size=None,
        projector_sharing="per_layer",
        visual_layers=None,
        tie_word_embeddings=None,
        alignment="input_space",
        visual_attention="none",
        visual_feed_forward=True,
        visual_token_reduction=None,
        reduced_visual_tokens=None,
        **kwargs,
    ):
        self.vision_config = _sub_config("vision_config", vision_config, DEFAULT_VISION_CONFIG, None)
        self.text_config = _sub_config("text_config", text_config, DEFAULT_TEXT_CONFIG, tuple(FAMILIES))
        self.image_token_id = kwargs.pop("image_token_index", image_token_id)
        self.vision_feature_layer = _listed(vision_feature_layer)
        self.vision_feature_select_strategy = vision_feature_select_strategy
        self.image_seq_length = image_seq_length
        self.projector_hidden_act = projector_hidden_act
        self.projector_bias = projector_bias
        self.projector_hidden_size = projector_hidden_size
        if alignment == "embedding_space" and projector_sharing == "per_layer":
            projector_sharing = "shared"  # "per_layer" is the default, not a wish
        self.projector_sharing = projector_sharing
        self.visual_layers = _listed(visual_layers)
        self.alignment = alignment
        self.visual_attention = _listed(visual_attention)
        self.visual_feed_forward = _listed(visual_feed_forward)
        self.visual_token_reduction = visual_token_reduction
        self.reduced_visual_tokens = reduced_visual_tokens

        if tie_word_embeddings is None:
            tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        # transformers 4.57 reads it off the text config, 5.x off the model's own
        self.text_config.tie_word_embeddings = tie_word_embeddings
        kwargs["tie_word_embeddings"] = tie_word_embeddings

        kwargs.pop("auto_map", None)
        super().__init__(**kwargs)
        self.tie_word_embeddings = tie_word_embeddings
        # a checkpoint always names its own code files, wherever it was read from
        self.auto_map = dict(AUTO_MAP)
        self._check()
        if image_seq_length is None:
            self.image_seq_length = self._visual_tokens_per_image()

    @property
    def vision_feature_layers(self) -> list[int]:
        """`vision_feature_layer` as a list."""
        layers = self.vision_feature_layer
        return [layers] if isinstance(layers, int) else layers

    @property
    def vision_feature_size(self) -> int:
        """Width of the features that the projectors read: the selected layers' widths, added up; four times that where
        `visual_token_reduction` puts 2 x 2 of them side by side."""
        return self._encoder_width() * (4 if self.visual_token_reduction == "pixel_unshuffle" else 1)

    def _encoder_width(self) -> int:
        vision = self.vision_config
        if vision.model_type == "convnext":  # one width per stage; state 0 is the stem's, as wide as the first stage
            widths = [vision.hidden_sizes[0], *vision.hidden_sizes]
            return sum(widths[layer] for layer in self.vision_feature_layers)
        if vision.model_type not in CLASS_TOKENS:
            return sum(self._encoder_states().widths[layer] for layer in self.vision_feature_layers)
        return vision.hidden_size * len(self.vision_feature_layers)

    @property
    def vision_prefix_tokens(self) -> int:
        """How many tokens at the front of the encoder's states are no picture of a patch: class and register tokens."""
        known = CLASS_TOKENS.get(self.vision_config.model_type)
        return self._encoder_states().prefix if known is None else known

    @property
    def dropped_vision_tokens(self) -> int:
        """How many tokens at the front of the encoder's states are not handed on as visual tokens."""
        return self.vision_prefix_tokens if self.vision_feature_select_strategy == "default" else 0

    @property
    def kept_prefix_tokens(self) -> int:
        """How many tokens at the front of the visual tokens are no picture of a patch."""
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
        """transformers' own, with a `LlavaForConditionalGeneration`'s settings as those of the same model in embedding space.

        Raises:
            ValueError: it is a LLaVA that has no like here.
        """
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return (_of_llava(config_dict) if config_dict.get("model_type") == "llava" else config_dict), kwargs

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """transformers' own, which sets what `kwargs` name without a check; what makes another model of them is checked with
        the rest, and the number of visual tokens follows."""
        switches = {name: kwargs.pop(name) for name in CHECKED_SETTINGS if name in kwargs}
        if any(switches.get(name) != config_dict.get(name) for name in REDUCTION_SETTINGS if name in switches):
            switches["image_seq_length"] = None
        return super().from_dict({**config_dict, **switches}, **kwargs)

    def to_dict(self):
        """The configuration as a dict from which `SaisaConfig.from_dict` makes an equal one."""
        config_dict = super().to_dict()
        for name in ("vision_config", "text_config"):
            config_dict[name] = comparable_config_dict(config_dict[name])
        return config_dict

    def to_diff_dict(self):
        """What `config.json` holds. The sub-configs are complete and in a form that every supported transformers release
        reads alike: their defaults and the names of their rotary settings differ between releases."""
        diff, whole = super().to_diff_dict(), self.to_dict()
        for name in ("vision_config", "text_config"):
            diff[name] = portable_config_dict(whole[name])
        for name in ("auto_map", "tie_word_embeddings"):
            diff[name] = whole[name]
        return diff

    def save_pretrained(self, save_directory, push_to_hub=False, **kwargs):
        """Writes `config.json` and the code files that it names; with `push_to_hub=True` uploads them as well."""
        write_code_files(save_directory)
        super().save_pretrained(save_directory)
        if push_to_hub:
            self.push_to_hub(**{"repo_id": Path(save_directory).resolve().name, **kwargs})

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig"):
        """Nothing to do: `auto_map` is complete as it stands."""

    def _visual_tokens_per_image(self) -> int:
        kind, tokens = self.visual_token_reduction, self.encoder_tokens_per_image
        if kind is None:
            return tokens
        grid = grid_of(tokens, *picture_size(self.vision_config))
        return reduced_length(kind, self.reduced_visual_tokens, tokens, grid)

    def visual_tokens_of(self, height: int, width: int) -> int | None:
        """How many visual tokens a picture of so many processed pixels has; None where the encoder has to be asked."""
        if self.vision_config.model_type not in CLASS_TOKENS:
            return None
        rows, columns = height // self._pixels_per_feature, width // self._pixels_per_feature
        tokens = rows * columns + self.kept_prefix_tokens
        return reduced_length(self.visual_token_reduction, self.reduced_visual_tokens, tokens, (rows, columns))

    @property
    def encoder_tokens_per_image(self) -> int:
        """Tokens that the encoder hands on for a picture of the size it is made for, in front of `visual_token_reduction`.

        Raises:
            ValueError: its configuration names no size.
        """
        vision = self.vision_config
        if vision.model_type == "siglip2_vision_model":
            return vision.num_patches
        if vision.model_type not in CLASS_TOKENS:
            return self._encoder_states().tokens[self.vision_feature_layers[0]] - self.dropped_vision_tokens
        size = getattr(vision, "image_size", None)
        if not _is_count(size):
            raise ValueError(
                f"vision_config.image_size={size!r} is no number of pixels: image_seq_length cannot be computed from it. "
                f"Give image_seq_length, the number of visual tokens of a picture."
            )
        return (size // self._pixels_per_feature) ** 2 + self.kept_prefix_tokens

    @property
    def _pixels_per_feature(self) -> int:
        """The side of what a token of the encoders in `CLASS_TOKENS` stands for, in processed pixels."""
        if self.vision_config.model_type == "convnext":
            return self._convnext_strides()[self.vision_feature_layers[0]]
        return self.vision_config.patch_size

    def _encoder_states(self) -> EncoderStates:
        return encoder_states(self.vision_config)

    def _convnext_strides(self) -> list[int]:
        """Pixels per feature for each of ConvNeXt's states: the stem's, then those of the stages. The stem divides by
        `patch_size`, each stage after the first by two."""
        vision = self.vision_config
        return [vision.patch_size * 2 ** max(index - 1, 0) for index in range(len(vision.hidden_sizes) + 1)]

    def _check(self):
        text, vision = self.text_config, self.vision_config
        _check_choice("vision_feature_select_strategy", self.vision_feature_select_strategy, ("default", "full"))
        _check_choice("projector_sharing", self.projector_sharing, ("per_layer", "shared"))
        _check_choice("projector_hidden_act", self.projector_hidden_act, tuple(ACT2FN))
        _check_choice("projector_bias", self.projector_bias, (True, False))
        if not (_is_index(self.image_token_id) and 0 <= self.image_token_id < text.vocab_size):
            raise ValueError(
                f"image_token_id={self.image_token_id!r} is outside the vocabulary of text_config: expected an integer in "
                f"[0, {text.vocab_size}). Give the id of a token of its own, and enlarge text_config.vocab_size if it is new."
            )
        for name, what in (
            ("image_seq_length", "the number of visual tokens of a picture, or None to compute it"),
            ("projector_hidden_size", "a positive integer, or None for the language model's hidden size"),
        ):
            value = getattr(self, name)
            if value is not None and not _is_count(value):
                raise ValueError(f"{name}={value!r}: expected {what}.")
        if vision.model_type not in CLASS_TOKENS:
            states, sizes = len(self._encoder_states().tokens), self._encoder_states().tokens
        elif vision.model_type == "convnext":
            states, sizes = len(vision.hidden_sizes) + 1, self._convnext_strides()
        else:
            states, sizes = vision.num_hidden_layers + 1, None
        layers = self.vision_feature_layers if isinstance(self.vision_feature_layer, (int, list)) else []
        if not layers or not all(_is_index(layer) and -states <= layer < states for layer in layers):
            raise ValueError(
                f"vision_feature_layer={self.vision_feature_layer!r}: expected an index into the hidden states of "
                f"{vision.model_type}, or a list of them; with {states - 1} layers, {-states} to {states - 1} are allowed."
            )
        if sizes is not None and len({sizes[layer] for layer in layers}) > 1:
            raise ValueError(
                f"vision_feature_layer={self.vision_feature_layer!r}: these states of {vision.model_type} differ in size and "
                f"cannot be put side by side. Choose one stage."
            )
        check_reduction(self)
        for name, value in language_model_family(text).only.items():
            if getattr(text, name, value) not in (value, None):
                raise ValueError(
                    f"text_config.{name}={getattr(text, name)!r} is not supported for {text.model_type}: expected {value!r}."
                )
        self._check_family()
        if self.visual_layers is not None:
            count, layers = text.num_hidden_layers, self.visual_layers
            whole = isinstance(layers, list) and all(_is_index(layer) and 0 <= layer < count for layer in layers)
            if not whole or not layers or len(set(layers)) != len(layers):
                raise ValueError(
                    f"visual_layers={layers!r}: expected a list of distinct decoder layers between 0 and {count - 1}, at "
                    f"least one; None stands for all of them."
                )

    def _check_family(self):
        _check_choice("alignment", self.alignment, ("input_space", "embedding_space"))
        count = self.text_config.num_hidden_layers
        for name, default, allowed in (
            ("visual_attention", "none", ("full", "none")),
            ("visual_feed_forward", True, (True, False)),
        ):
            value = getattr(self, name)
            if not self.in_embedding_space and value != default:
                raise ValueError(
                    f"{name}={value!r}: in input space visual tokens are keys and values, no more. Leave it out, or set "
                    f'alignment="embedding_space".'
                )
            if isinstance(value, list) and len(value) != count:
                raise ValueError(
                    f"{name} has {len(value)} entries: expected one for each of the {count} decoder layers, or one value for "
                    "all of them."
                )
            for one in value if isinstance(value, list) else [value]:
                _check_choice(name, one, allowed)
        if self.in_embedding_space and self.visual_layers is not None:
            raise ValueError(
                f"visual_layers={self.visual_layers!r}: in embedding space all layers see the picture. What each does to its "
                "tokens is said by visual_attention and visual_feed_forward, which take a list of one value per layer: "
                f'visual_attention=["none" if layer in LAYERS else "full" for layer in range({count})].'
            )


name_for_serving(SaisaConfig.model_type, "SaisaForConditionalGeneration")


def _listed(value):
    """JSON knows no tuples, and ranges are handy: both become lists; everything else stays for `_check` to judge."""
    return list(value) if isinstance(value, (tuple, range)) else value


def _of_layer(value, layer_idx: int):
    return value[layer_idx] if isinstance(value, list) else value


def _of_llava(llava: dict) -> dict:
    """`llava`, the config.json of a `LlavaForConditionalGeneration`, as that of the same model in embedding space."""
    encoder = (llava.get("vision_config") or {}).get("model_type", "clip_vision_model")
    if llava.get("vision_feature_select_strategy", "default") == "default" and CLASS_TOKENS.get(encoder) == 0:
        raise ValueError(
            f"vision_feature_select_strategy='default' of this LLaVA drops the first token of {encoder}, which is a patch "
            "and no class token: that is not supported. A LLaVA of this encoder needs 'full'."
        )
    text_config = {"model_type": "llama", **(llava.get("text_config") or {})}
    family = FAMILIES.get(text_config["model_type"], LanguageModelFamily)
    if family.scaled_logits is not LanguageModelFamily.scaled_logits:
        raise ValueError(
            f"text_config.model_type={text_config['model_type']!r}: transformers' LLaVA uses this language model without "
            "what that does to logits, which is not supported."
        )
    return {key: value for key, value in llava.items() if key != "multimodal_projector_bias"} | {
        "model_type": SaisaConfig.model_type,
        "architectures": ["SaisaForConditionalGeneration"],
        "text_config": text_config,
        "projector_bias": llava.get("multimodal_projector_bias", True),
        "alignment": "embedding_space",
        "visual_attention": "full",
        # 4.57 goes by the text config, 5.x by either
        "tie_word_embeddings": llava.get("tie_word_embeddings") or None,
    }


def _is_index(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value) -> bool:
    return _is_index(value) and value > 0


def _sub_config(field, value, default, allowed):
    """The config object for `value` (None, dict or config), its `model_type` checked against `allowed`, where given."""
    allowed = known_model_types() if allowed is None else allowed
    if value is None:
        value = dict(default)
    if isinstance(value, dict):
        value = readable_config_dict({"model_type": default["model_type"], **value})
        if allowed:
            _check_choice(f"{field}.model_type", value["model_type"], allowed)
        return config_from_dict(value)
    if not isinstance(value, PretrainedConfig):
        raise ValueError(f"{field} is a {type(value).__name__}: expected a dict or a transformers config.")
    if allowed:
        _check_choice(f"{field}.model_type", value.model_type, allowed)
    return value


def _check_choice(field, value, allowed):
    if value not in allowed:
        raise ValueError(f"{field}={value!r} is not supported: expected one of {', '.join(map(repr, allowed))}.")
