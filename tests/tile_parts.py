"""Tiny random LLaVA-NeXTs and LLaVA-OneVisions of transformers, and SAISAs that read tiles as they do."""

import numpy as np
import torch
from PIL import Image
from tiny_models import _TEXT, _VISION, PAD, randomize
from transformers import (
    CLIPVisionConfig,
    GotOcr2ImageProcessor,
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    Qwen2Config,
    SiglipVisionConfig,
)

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.demo.language import CHAT_TEMPLATE, make_tokenizer


SIDE, PATCH = 12, 4
GRID, TOKENS = SIDE // PATCH, (SIDE // PATCH) ** 2
TOKENIZER = make_tokenizer()
TOKENIZER.add_tokens(["<video>"], special_tokens=True)
TOKENIZER.padding_side = "left"
IMAGE = TOKENIZER.convert_tokens_to_ids("<image>")
NEXT = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [3 * SIDE, SIDE], [SIDE, 3 * SIDE]]
ONEVISION = [[SIDE * rows, SIDE * columns] for rows in range(1, 4) for columns in range(1, 4)]
EXTREMES = [(1, 4000), (4000, 1), (1, 1), (3, 400), (400, 3), (2, 2), (12, 24), (24, 24), (37, 41), (1, 3), (3, 1)]
VISIONS = {
    "clip": lambda: CLIPVisionConfig(**_VISION | {"image_size": SIDE}, projection_dim=16),
    "siglip": lambda: SiglipVisionConfig(**_VISION | {"image_size": SIDE}, vision_use_head=False),
}
TEXTS = {"llama": LlamaConfig, "qwen2": Qwen2Config}


def text_config(kind="llama"):
    sizes = {"vocab_size": len(TOKENIZER), "max_position_embeddings": 2048, "eos_token_id": None}
    return TEXTS[kind](**_TEXT | sizes)


def make_next(vision="clip", text="llama"):
    strategy = "default" if vision == "clip" else "full"
    config = LlavaNextConfig(
        vision_config=VISIONS[vision](), text_config=text_config(text), image_token_index=IMAGE,
        image_grid_pinpoints=NEXT, vision_feature_select_strategy=strategy, image_seq_length=TOKENS,
    )  # fmt: skip
    return _ready(LlavaNextForConditionalGeneration(config))


def make_onevision(vision="siglip", text="qwen2"):
    config = LlavaOnevisionConfig(
        vision_config=VISIONS[vision](), text_config=text_config(text), image_token_index=IMAGE,
        video_token_index=TOKENIZER.convert_tokens_to_ids("<video>"), image_grid_pinpoints=ONEVISION,
        vision_aspect_ratio="anyres_max_4",
    )  # fmt: skip
    return _ready(LlavaOnevisionForConditionalGeneration(config))


def _ready(llava, seed=0):
    llava = randomize(llava, seed, gain=1.0).eval()
    llava.generation_config.pad_token_id, llava.generation_config.eos_token_id = PAD, None
    return llava


def next_processor(vision="clip"):
    image_processor = LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=NEXT
    )
    has_class = vision == "clip"
    return LlavaNextProcessor(
        image_processor, TOKENIZER, patch_size=PATCH, num_additional_image_tokens=int(has_class),
        vision_feature_select_strategy="default" if has_class else "full", chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


class WithoutVideos(LlavaOnevisionProcessor):
    """transformers' own, which asks for a video processor even where torchvision, which those need, is missing."""

    def check_argument_for_proper_class(self, argument_name, argument):
        return type(argument)


def onevision_processor():
    image_processor = LlavaOnevisionImageProcessor(size={"height": SIDE, "width": SIDE}, image_grid_pinpoints=ONEVISION)
    return WithoutVideos(
        image_processor, TOKENIZER, num_image_tokens=TOKENS, vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_4", video_processor=None, chat_template=CHAT_TEMPLATE,
    )  # fmt: skip


def our_processor(theirs, tokens=TOKENS, **settings):
    """The `SaisaProcessor` with the parts of transformers' own."""
    return SaisaProcessor(
        theirs.image_processor, TOKENIZER, tokenize_whole=True, image_seq_length=tokens,
        vision_aspect_ratio=getattr(theirs, "vision_aspect_ratio", None), chat_template=CHAT_TEMPLATE, **settings,
    )  # fmt: skip


def tiles_processor(**settings):
    """InternVL's way: the grid of at most four tiles that has the image's shape, and a thumbnail."""
    image_processor = GotOcr2ImageProcessor(
        size={"height": SIDE, "width": SIDE}, crop_to_patches=True, max_patches=4, **settings
    )
    return SaisaProcessor(image_processor, TOKENIZER, image_seq_length=TOKENS, chat_template=CHAT_TEMPLATE)


def tiled_saisa(vision="clip", seed=0, **settings):
    """A random SAISA that reads tiles as `next_processor` makes them."""
    config = SaisaConfig(VISIONS[vision](), text_config(), IMAGE, **{"image_grid_pinpoints": NEXT, **settings})
    return _ready(SaisaForConditionalGeneration(config), seed)


def draw(number, size):
    """A picture of (height, width) pixels."""
    small = np.random.default_rng(number).integers(0, 255, (min(size[0], 3), min(size[1], 3), 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size[::-1], Image.Resampling.BILINEAR)


def random_sizes(count, seed=0, most=4000):
    """Sizes (height, width) of which most are long and thin."""
    exponents = np.random.default_rng(seed).uniform(0, np.log(most), (count, 2))
    return [tuple(round(x) for x in np.exp(pair)) for pair in exponents]


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


# of transformers: what makes a model, and what its processor
MAKERS = {"next": (make_next, next_processor), "onevision": (make_onevision, onevision_processor)}
