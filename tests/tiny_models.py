"""Tiny random models and random prompts that the tests share: nothing here is trained or downloaded.

Shape letters: B batch, S sequence in input order, V visual tokens of one image, C encoder width.
"""

from dataclasses import dataclass, field

import torch
from transformers import (
    CLIPVisionConfig,
    ConvNextConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GraniteConfig,
    IJepaConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    ResNetConfig,
    Siglip2VisionConfig,
    SiglipVisionConfig,
    SmolLM3Config,
    SwinConfig,
    ViTConfig,
)

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration


torch.set_num_threads(1)

VOCAB_SIZE, PAD, BOS, IMAGE_TOKEN = 97, 0, 1, 96
# for `prompts_from_rows`: a row with no, one and several pictures
ROWS = [[BOS, 5, 6, 7], [BOS, "image", 8, 9], [BOS, 5, "image", 6, "image", 7, 8]]

_TEXT = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rope_theta": 100.0,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}

TEXT_CONFIGS = {
    "llama": lambda: LlamaConfig(**_TEXT | {"num_key_value_heads": 4}),
    "llama_biases": lambda: LlamaConfig(**_TEXT, attention_bias=True, mlp_bias=True, rms_norm_eps=0.1),
    "llama3_scaling": lambda: LlamaConfig(**_TEXT, rope_scaling=dict(_LLAMA3)),
    "linear_scaling": lambda: LlamaConfig(**_TEXT, rope_scaling={"rope_type": "linear", "factor": 3.0}),
    "yarn_scaling": lambda: LlamaConfig(**_TEXT, rope_scaling=dict(_YARN)),
    "dynamic_scaling": lambda: LlamaConfig(
        **_TEXT | {"max_position_embeddings": 8}, rope_scaling={"rope_type": "dynamic", "factor": 2.0}
    ),
    "mistral": lambda: MistralConfig(**_TEXT, sliding_window=None),
    "mistral_window": lambda: MistralConfig(**_TEXT, sliding_window=6),
    "qwen2": lambda: Qwen2Config(**_TEXT, tie_word_embeddings=True),
    "qwen2_window": lambda: Qwen2Config(**_TEXT, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": lambda: Qwen3Config(**_TEXT, head_dim=12),
    "qwen3_window": lambda: Qwen3Config(
        **_TEXT, head_dim=6, attention_bias=True, use_sliding_window=True, sliding_window=5, max_window_layers=2
    ),
    "gemma2": lambda: Gemma2Config(
        **_TEXT, head_dim=12, query_pre_attn_scalar=40, sliding_window=6,
        attn_logit_softcapping=2.0, final_logit_softcapping=3.0,
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **_TEXT, head_dim=12, query_pre_attn_scalar=5, sliding_window=6, rope_local_base_freq=30.0,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "phi3": lambda: Phi3Config(**_TEXT, partial_rotary_factor=0.5),
    "olmo2": lambda: Olmo2Config(**_TEXT),
    "granite": lambda: GraniteConfig(
        **_TEXT, embedding_multiplier=3.0, residual_multiplier=0.7, attention_multiplier=0.3, logits_scaling=2.0
    ),
    "smollm3": lambda: SmolLM3Config(**_TEXT, no_rope_layers=[1, 0, 1], attention_bias=True),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **_TEXT, head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=20, mlp_only_layers=[1],
        norm_topk_prob=True,
    ),
    "mixtral": lambda: MixtralConfig(**_TEXT, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
}  # fmt: skip
TEXT_MODELS = list(TEXT_CONFIGS)
# A stretched rotary embedding depends on the longest sequence of the whole batch, so rows are not independent there.
BATCHABLE_TEXT_MODELS = [name for name in TEXT_MODELS if name != "dynamic_scaling"]

_VISION = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}
VISION_CONFIGS = {
    "clip": lambda: CLIPVisionConfig(**_VISION, projection_dim=16),
    "siglip": lambda: SiglipVisionConfig(**_VISION),
    "siglip2": lambda: Siglip2VisionConfig(**{k: v for k, v in _VISION.items() if k != "image_size"}, num_patches=4),
    "dinov2": lambda: Dinov2Config(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=8, patch_size=4
    ),
    "convnext": lambda: ConvNextConfig(
        num_stages=3, patch_size=2, hidden_sizes=[8, 12, 16], depths=[1, 2, 1], image_size=16
    ),
}
VISION_MODELS = list(VISION_CONFIGS)
# Encoders that SAISA knows by nothing but what they yield
OTHER_VISION_CONFIGS = {
    "vit": lambda: ViTConfig(**_VISION),
    "registers": lambda: Dinov2WithRegistersConfig(
        hidden_size=24, num_hidden_layers=3, num_attention_heads=2, mlp_ratio=2, image_size=8, patch_size=4,
        num_register_tokens=3,
    ),
    "ijepa": lambda: IJepaConfig(**_VISION),
    "swin": lambda: SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[1, 1, 1], num_heads=[1, 1, 1], window_size=2
    ),
    "resnet": lambda: ResNetConfig(embedding_size=8, hidden_sizes=[8, 12, 16, 20], depths=[1, 1, 1, 1]),
}  # fmt: skip


def randomize(module, seed=0, gain=1.3):
    """Fill every parameter of `module` so that each one matters: matrices keep the scale of their input times `gain`,
    biases lie in [-0.3, 0.3], norm weights and layer scales in [0.5, 1.5]."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("bias"):
                low, high = -0.3, 0.3
            elif p.dim() == 1:
                low, high = 0.5, 1.5
            elif "embed" in name:
                low, high = -1.0, 1.0
            else:
                bound = gain * (3 / p[0].numel()) ** 0.5
                low, high = -bound, bound
            p.copy_(torch.rand(p.shape, generator=generator) * (high - low) + low)
    return module


def tiny_config(text="llama", vision="clip", vision_seq_length=4, **kwargs):
    """A `SaisaConfig` over one of `TEXT_CONFIGS` and one of `VISION_CONFIGS` (names, or configs)."""
    text_config = TEXT_CONFIGS[text]() if isinstance(text, str) else text
    vision_config = (VISION_CONFIGS | OTHER_VISION_CONFIGS)[vision]() if isinstance(vision, str) else vision
    kwargs = {"tie_word_embeddings": bool(getattr(text_config, "tie_word_embeddings", False))} | kwargs
    return SaisaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=IMAGE_TOKEN,
        image_seq_length=vision_seq_length,
        **kwargs,
    )


def tiny_model(text="llama", vision="clip", seed=0, attn_implementation=None, dtype=torch.float32, **kwargs):
    """A random `SaisaForConditionalGeneration` in eval mode whose generation never stops early."""
    config = tiny_config(text, vision, **kwargs)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    model = randomize(SaisaForConditionalGeneration(config), seed).to(dtype).eval()
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model


@dataclass
class Prompts:
    """A padded batch. `images[b]` is how many images row b has; `pixel_values` holds them row by row."""

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    position_ids: torch.Tensor
    pixel_values: torch.Tensor | None
    images: list[int] = field(default_factory=list)

    @property
    def inputs(self):
        """What `forward` takes."""
        named = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "pixel_values": self.pixel_values}
        return named | {"position_ids": self.position_ids}

    @property
    def prompt(self):
        """What `generate` takes: it makes the positions itself."""
        return {name: value for name, value in self.inputs.items() if name != "position_ids"}

    @property
    def visual(self):
        """(B, S) bool: the placeholders."""
        return self.input_ids == IMAGE_TOKEN

    @property
    def text(self):
        """(B, S) bool: the real text tokens."""
        return self.attention_mask.bool() & ~self.visual

    def row(self, b):
        """Row b alone and without its padding."""
        real = self.attention_mask[b].bool()
        ids = self.input_ids[b][real][None]
        first = sum(self.images[:b])
        pixels = self.pixel_values[first : first + self.images[b]] if self.images[b] else None
        return Prompts(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None], pixels, [self.images[b]])

    def to(self, dtype):
        """The same prompts with pixels of `dtype`."""
        pixels = None if self.pixel_values is None else self.pixel_values.to(dtype)
        return Prompts(self.input_ids, self.attention_mask, self.position_ids, pixels, self.images)


def prompts_from_rows(rows, side="left", seed=0, image_size=8, seq_length=4, channels=3):
    """Rows written as lists of text token ids and the string "image", made into `Prompts` padded on `side`."""
    image = [IMAGE_TOKEN] * seq_length
    ids = [[t for item in row for t in (image if item == "image" else [item])] for row in rows]
    images = [row.count("image") for row in rows]
    length = max(map(len, ids))
    pads = [[PAD] * (length - len(r)) for r in ids]
    left = side == "left"
    input_ids = torch.tensor([p + r if left else r + p for p, r in zip(pads, ids)])
    mask = torch.tensor(
        [[0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p) for p, r in zip(pads, ids)]
    )
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(sum(images), channels, image_size, image_size, generator=generator) if sum(images) else None
    return Prompts(input_ids, mask, positions, pixels, images)


def random_prompts(seed=0, side="left", rows=4, max_images=3, tail=0, **kwargs):
    """A ragged batch: row 0 has no image, row 1 two in a row behind BOS, the rest any number of images anywhere
    (in front of all text too). The last `tail` + 1 real tokens are text: a prompt needs the one."""
    generator = torch.Generator().manual_seed(1000 + seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=generator))

    def words(low, high):
        return [draw(3, IMAGE_TOKEN - 1) for _ in range(draw(low, high))]

    made = []
    for b in range(rows):
        if b == 0:
            row = [BOS, *words(2, 7)]
        elif b == 1:
            row = [BOS, "image", "image", *words(1, 5)]
        else:
            row = [BOS] if draw(0, 2) else []
            for _ in range(draw(1, max_images)):
                row += [*words(0, 4), "image"]
            row += words(1, 5)
        made.append(row + words(tail, tail))
    return prompts_from_rows(made, side, seed, **kwargs)


def vision_features(model, pixel_values):
    """(n_images, V, C): transformers' own encoder, its states chosen as the configuration says."""
    config = model.config
    layers = config.vision_feature_layer
    layers = layers if isinstance(layers, (list, tuple)) else [layers]
    with torch.no_grad():
        states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    chosen = torch.cat([states[layer] for layer in layers], dim=-1)
    return chosen[:, 1:] if config.vision_feature_select_strategy == "default" else chosen
