# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Random models of a given size, and random prompts and pictures for them: SAISA, its bare language model, and a LLaVA."""

import argparse
import copy
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration


_VICUNA = {"vocab_size": 32000, "text_tokens": 64, "vision_width": 1024, "vision_layers": 24, "image_size": 336}
PRESETS = {
    "small": _VICUNA | {"hidden_size": 1024, "intermediate_size": 2752, "layers": 8, "heads": 16},
    "vicuna-7b": _VICUNA | {"hidden_size": 4096, "intermediate_size": 11008, "layers": 32, "heads": 32},
}
PATCH_SIZE = 14


def add_size_options(parser: argparse.ArgumentParser):
    parser.add_argument("--preset", choices=PRESETS, default="small", help="sizes; the next options change single ones")
    for name in PRESETS["small"]:
        values = ", ".join(f"{preset}: {sizes[name]}" for preset, sizes in PRESETS.items())
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=int, metavar="N", default=argparse.SUPPRESS, help=values)
    parser.add_argument("--kv-heads", type=int, metavar="N", help="key/value heads; None: as many as heads")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ...")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of all weights")
    parser.add_argument("--attn-implementation", default="sdpa", help="eager, sdpa, flex_attention, ...")
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts")


def with_sizes(args: argparse.Namespace) -> argparse.Namespace:
    """`args` with what the preset says where no option did."""
    for name, value in PRESETS[args.preset].items():
        setattr(args, name, getattr(args, name, value))
    args.kv_heads = args.kv_heads or args.heads
    return args


@dataclass
class Models:
    """A SAISA, its language model by itself, and a LLaVA of the same language model and encoder."""

    saisa: SaisaForConditionalGeneration
    bare: LlamaForCausalLM
    llava: LlavaForConditionalGeneration

    def set_attention(self, implementation: str):
        for model in (self.saisa, self.bare):  # LLaVA consists of their parts
            model.set_attn_implementation(implementation)

    @contextmanager
    def countable(self, implementation: str):
        """Within, attention consists of matrix products, which the FLOP counter knows on every device."""
        self.set_attention("eager")
        yield
        self.set_attention(implementation)


def build(args) -> Models:
    """Random models that share their weights, but for the projectors. Weights are as large as keeps activations from
    vanishing, so that answers depend on the picture."""
    text = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=4096,
        initializer_range=args.hidden_size**-0.5,
        pad_token_id=0,
        eos_token_id=None,
    )
    vision = CLIPVisionConfig(
        hidden_size=args.vision_width,
        intermediate_size=4 * args.vision_width,
        num_hidden_layers=args.vision_layers,
        num_attention_heads=max(args.vision_width // 64, 1),
        image_size=args.image_size,
        patch_size=PATCH_SIZE,
    )
    parts = {"vision_config": vision, "text_config": text, "image_seq_length": visual_tokens(args)}
    torch.manual_seed(args.seed)
    # rather than a cast, which would round the rotary frequencies too
    torch.set_default_dtype(getattr(torch, args.dtype))
    try:
        with torch.device(args.device):
            config = SaisaConfig(**copy.deepcopy(parts), image_token_id=args.vocab_size - 1)
            saisa = SaisaForConditionalGeneration(config).eval()
            llava_config = LlavaConfig(**copy.deepcopy(parts), image_token_index=args.vocab_size - 1)
            llava_projector = LlavaMultiModalProjector(llava_config)
        with torch.device("meta"):
            bare, llava = LlamaForCausalLM(text).eval(), LlavaForConditionalGeneration(llava_config).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    weights = saisa.language_model.state_dict().items()
    bare.model.load_state_dict({name: x for name, x in weights if "visual_projector" not in name}, assign=True)
    bare.model.rotary_emb = saisa.language_model.rotary_emb.rotary_emb
    bare.lm_head = saisa.lm_head
    llava.model.language_model, llava.model.vision_tower = bare.model, saisa.vision_tower
    llava.model.multi_modal_projector, llava.lm_head = llava_projector, saisa.lm_head
    models = Models(saisa, bare, llava)
    models.set_attention(args.attn_implementation)
    return models


def visual_tokens(args) -> int:
    return (args.image_size // PATCH_SIZE) ** 2


def prompt(text: list[int], place: int, args) -> torch.Tensor:
    """(1, S) token ids: `text` with the picture in front of its token number `place`."""
    ids = [*text[:place], *[args.vocab_size - 1] * visual_tokens(args), *text[place:]]
    return torch.tensor([ids], device=args.device)


def draw_text(length: int, args) -> list[int]:
    return torch.randint(3, args.vocab_size - 1, (length,)).tolist()


def draw_picture(args) -> torch.Tensor:
    size = args.image_size
    return torch.randn(1, 3, size, size, device=args.device, dtype=getattr(torch, args.dtype))
