# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""A trained LLaVA turned into a SAISA, at tiny size on the demo's digit scenes."""

import math
import time
from pathlib import Path

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from saisa_hf import SaisaForConditionalGeneration
from saisa_hf.demo import train as demo
from saisa_hf.demo.encoder import vision_config
from saisa_hf.demo.language import IMAGE, Conversation, text_config
from saisa_hf.demo.run import CHECKPOINT
from saisa_hf.demo.scenes import SIZE


BATCH, STEPS, RATE, WARM_UP, LISTS = 32, 1350, 1.5e-3, 0.05, 1 / 3
VISUAL_TOKENS = (SIZE // demo.PATCH) ** 2


def new_llava(processor, depth: int) -> LlavaForConditionalGeneration:
    """A LLaVA with random weights around the demo's trained encoder, `depth` decoder layers deep."""
    text = text_config(len(processor.tokenizer))
    text.num_hidden_layers = depth
    if getattr(text, "layer_types", None):
        text.layer_types = ["full_attention"] * depth
    config = LlavaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_index=processor.tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-1,
    )
    model = LlavaForConditionalGeneration(config)
    for linear in (model.model.multi_modal_projector.linear_1, model.model.multi_modal_projector.linear_2):
        torch.nn.init.normal_(linear.weight, std=text.initializer_range)
    tower = SaisaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).vision_tower
    own = model.model.vision_tower.state_dict()
    trained = {name.removeprefix("vision_model."): tensor for name, tensor in tower.state_dict().items()}
    model.model.vision_tower.load_state_dict({name: trained[name.removeprefix("vision_model.")] for name in own})
    return model


def train(model, tokenizer, seed: int, seconds: float | None = None) -> dict:
    """Trains all but the encoder in place, a third of the time on lists and then on questions, on a stream of fresh pictures
    that depends on `seed` alone; for `STEPS` steps, or for `seconds` of processor time."""
    conversation, collate = Conversation(tokenizer, VISUAL_TOKENS), demo.TurnCollator(tokenizer.pad_token_id)
    stages = [
        demo.TurnDataset(conversation, "train", 10**9, seed * 10 + number, share) for number, share in ((2, 1.0), (3, 0.1))
    ]
    model.model.vision_tower.requires_grad_(False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.05)
    model.train()
    taken, steps = [0, 0], 0
    start = time.process_time()
    while True:
        done = steps / STEPS if seconds is None else (time.process_time() - start) / seconds
        if done >= 1:
            break
        stage = int(done >= LISTS)
        first = taken[stage] * BATCH
        batch = collate([stages[stage][index] for index in range(first, first + BATCH)])
        # each stage warms up and cools down, as the demo's do
        local = done / LISTS if stage == 0 else (done - LISTS) / (1 - LISTS)
        rate = RATE * min(1, (local + 1e-3) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * local))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        taken[stage], steps = taken[stage] + 1, steps + 1
        if steps % 50 == 0:
            print(f"step {steps}: loss {loss.item():.3f}, {time.process_time() - start:.0f} s", flush=True)
    model.eval()
    return {"steps": steps, "pictures": steps * BATCH, "processor_seconds": time.process_time() - start}


def pretrained_llava(cache: Path, seed: int, depth: int) -> Path:
    """The folder of the LLaVA of a seed and depth, which is trained where it is not there yet."""
    folder = cache / f"llava-seed-{seed}-depth-{depth}"
    if not (folder / "training.json").exists():
        import json

        torch.manual_seed(seed)
        processor = demo.make_processor()
        model = new_llava(processor, depth)
        record = train(model, processor.tokenizer, seed)
        model.save_pretrained(folder)
        (folder / "training.json").write_text(json.dumps(record))
    return folder


if __name__ == "__main__":
    import sys

    torch.set_num_threads(1)
    for seed, depth in [(0, 4), (1, 4)]:
        pretrained_llava(Path(sys.argv[1]), seed, depth)
