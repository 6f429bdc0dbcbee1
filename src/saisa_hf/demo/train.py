# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Trains the demo's checkpoint from scratch, on two CPU cores, in three stages, each with transformers' `Trainer`.

1. *Encoder.* The vision transformer learns what is in each cell of an image (`encoder.py`) and is frozen.
2. *Lists.* The rest learns to list everything in an image, by place, by digit, by ink, and in numbers. With questions alone
   SAISA stays on a plateau for long: each is about one thing only, and no layer learns where to look.
3. *Questions.* Several per image in one sequence, one image and then turns, loss on the answers. A tenth of the sequences
   are still lists.

Every image is drawn from the training scans and from a seed, and no image is seen twice.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import CLIPImageProcessor, GenerationConfig, Trainer, TrainingArguments, set_seed

from ..configuration_saisa import SaisaConfig
from ..modeling_saisa import SaisaForConditionalGeneration
from ..processing_saisa import SaisaProcessor
from .asking import ask_model, by_kind, table
from .encoder import PATCH, CellDataset, CellReader, cells_read, collate_cells, pixels, vision_config
from .language import CHAT_TEMPLATE, IMAGE, Conversation, make_tokenizer, text_config
from .scenes import KINDS, LISTS, SIZE, Scene, ask, draw, held_out_questions, list_all, make_scene


logger = logging.getLogger(__name__)


# The seven turns of a training sequence are chosen from these. Places are learned last: they are asked twice as often.
TURNS = (*KINDS, "digit at a place", "place of a digit")


@dataclass(frozen=True)
class Recipe:
    """Lengths and rates of the three stages. The shipped checkpoint was trained with the defaults."""

    seed: int = 0
    encoder_steps: int = 2000
    encoder_batch: int = 64
    encoder_rate: float = 1e-3
    list_steps: int = 600
    question_steps: int = 1200
    batch: int = 64
    rate: float = 1.5e-3
    questions: int = 500


class TurnDataset(Dataset):
    """An image and turns about it as token ids: {"picture": uint8 (72, 72, 3), "ids": list, "labels": list}.

    `list_share` of the items are one list of everything, the others up to seven questions in random order. Item i is a
    function of (split, seed, i) alone.
    """

    def __init__(self, conversation: Conversation, split: str, size: int, seed: int, list_share: float):
        self.conversation, self.split, self.size, self.seed = conversation, split, size, seed
        self.list_share = list_share

    def __len__(self) -> int:
        return self.size

    def turns(self, scene: Scene, rng: np.random.Generator) -> list[tuple[str, str]]:
        """Random questions about a scene and their answers, or a list of it."""
        if rng.random() < self.list_share:
            by = tuple(LISTS)[rng.integers(len(LISTS))]
            return [(LISTS[by], list_all(scene, by))]
        asked = [ask(scene, TURNS[turn], rng) for turn in rng.permutation(len(TURNS))[: len(KINDS)]]
        return [(question.text, question.answer) for question in asked if question is not None]

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.size:
            raise IndexError(f"index must be in 0 to {self.size - 1}, got {index}")
        rng = np.random.default_rng([self.seed, index])
        scene = make_scene(self.split, rng)
        ids, labels = self.conversation.ids_and_labels(self.turns(scene, rng))
        return {"picture": draw(scene), "ids": ids, "labels": labels}


class TurnCollator:
    """Items of `TurnDataset` as a batch for the model, padded on the right."""

    def __init__(self, pad_token_id: int):
        self.pad_token_id = pad_token_id

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        pixel_values = pixels(np.stack([item["picture"] for item in items]))
        return padded_turns(items, self.pad_token_id) | {"pixel_values": pixel_values}


def padded_turns(items: list[dict], pad_token_id: int) -> dict[str, torch.Tensor]:
    """The ids and labels of items as a batch, padded on the right."""
    length = max(len(item["ids"]) for item in items)

    def padded(rows, value):
        return torch.tensor([list(row) + [value] * (length - len(row)) for row in rows])

    return {
        "input_ids": padded((item["ids"] for item in items), pad_token_id),
        "labels": padded((item["labels"] for item in items), -100),
        "attention_mask": padded(([1] * len(item["ids"]) for item in items), 0),
    }


def fit(
    name: str,
    model: torch.nn.Module,
    dataset: Dataset,
    collate: Callable[[list], dict],
    *,
    steps: int,
    batch_size: int,
    rate: float,
    seed: int,
) -> float:
    """Trains `model` for `steps` steps with `Trainer` (AdamW, cosine schedule) and returns the minutes it took."""
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch_size,
            learning_rate=rate,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, steps // 20),
            weight_decay=0.05,
            max_grad_norm=1.0,
            logging_steps=max(1, steps // 20),
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
        )
        start = time.perf_counter()
        Trainer(model=model, args=arguments, train_dataset=dataset, data_collator=collate).train()
    minutes = (time.perf_counter() - start) / 60
    print(f"stage {name}: {steps} steps of {batch_size} in {minutes:.1f} minutes", flush=True)
    return minutes


def make_processor() -> SaisaProcessor:
    """The demo's processor: no resampling (images come in their own size), pixels in -1 to 1, 36 image tokens."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return SaisaProcessor(
        image_processor,
        make_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(processor: SaisaProcessor) -> SaisaForConditionalGeneration:
    """The demo's SAISA with random weights. It uses the encoder's last state, which is the one trained on the cells."""
    tokenizer = processor.tokenizer
    text = text_config(len(tokenizer))
    config = SaisaConfig(
        vision_config=vision_config(),
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        initializer_range=text.initializer_range,
    )
    model = SaisaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def train_encoder(model: SaisaForConditionalGeneration, recipe: Recipe) -> float:
    """Stage 1: trains the model's encoder in place, then freezes it. Returns the minutes it took."""
    set_seed(recipe.seed)
    reader = CellReader(model)
    dataset = CellDataset("train", recipe.encoder_steps * recipe.encoder_batch, seed=recipe.seed * 10 + 1)
    minutes = fit(
        "encoder",
        reader,
        dataset,
        collate_cells,
        steps=recipe.encoder_steps,
        batch_size=recipe.encoder_batch,
        rate=recipe.encoder_rate,
        seed=recipe.seed,
    )
    seen, unseen = cells_read(reader, "train"), cells_read(reader, "test")
    print(f"encoder reads {seen:.1%} of the cells in the training hands, {unseen:.1%} in held-out hands", flush=True)
    model.model.vision_tower.requires_grad_(False)
    return minutes


def train_language(model: SaisaForConditionalGeneration, tokenizer, recipe: Recipe) -> dict[str, float]:
    """Stages 2 and 3: trains all but the encoder in place. Returns the minutes of each stage."""
    conversation = Conversation(tokenizer, model.config.image_seq_length)
    minutes = {}
    stages = [("lists", recipe.list_steps, 1.0), ("questions", recipe.question_steps, 0.1)]
    for number, (name, steps, list_share) in enumerate(stages, start=2):
        set_seed(recipe.seed)
        minutes[name] = fit(
            name,
            model,
            TurnDataset(conversation, "train", steps * recipe.batch, recipe.seed * 10 + number, list_share),
            TurnCollator(tokenizer.pad_token_id),
            steps=steps,
            batch_size=recipe.batch,
            rate=recipe.rate,
            seed=recipe.seed,
        )
    return minutes


def save(
    model: SaisaForConditionalGeneration, processor: SaisaProcessor, output: Path, record: dict | None = None
) -> None:
    """Writes model (float16), processor and the training record to the folder `output`, or leaves it as it was: everything
    is first written beside it, then renamed."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as scratch:
        fresh = Path(scratch) / "new"
        model.half().save_pretrained(fresh)
        processor.save_pretrained(fresh)
        if record is not None:
            (fresh / "training.json").write_text(json.dumps(record, indent=2) + "\n")
        fresh.chmod(0o755)
        for file in fresh.iterdir():
            file.chmod(0o644)
        if output.exists():
            output.rename(Path(scratch) / "old")
        fresh.rename(output)


def train(output: Path, recipe: Recipe) -> float:
    """Trains from scratch, saves to `output`, prints and returns the exact-match accuracy on held-out questions."""
    set_seed(recipe.seed)
    processor = make_processor()
    model = make_model(processor)
    minutes = {"encoder": train_encoder(model, recipe), **train_language(model, processor.tokenizer, recipe)}
    # transformers 5's Trainer turns the cache off in the config, which is saved
    model.config.use_cache = True
    # the accuracy is that of the saved model, which is float16
    model = model.half().float().eval()
    asked = held_out_questions(recipe.questions, seed=recipe.seed)
    answers = ask_model(model, processor, asked)
    scores = by_kind(asked, answers)
    print(table(scores))
    right = sum(hits for hits, _ in scores.values())
    record = {
        "recipe": asdict(recipe),
        "minutes": {name: round(value, 1) for name, value in minutes.items()},
        "right": {kind: list(score) for kind, score in scores.items()},
    }
    save(model, processor, output, record)
    print(f"{sum(minutes.values()):.1f} minutes of training; saved to {output}", flush=True)
    return right / len(asked)


def main(argv: list[str] | None = None) -> int:
    """`python -m saisa_hf.demo.train`: as `saisa demo --train`, with other seeds or fewer steps."""
    parser = argparse.ArgumentParser(prog="python -m saisa_hf.demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint (replaced if it exists)")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, scenes and questions (default: 0)")
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the steps of every stage (default: 1)")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO)
    default = Recipe()
    recipe = Recipe(
        seed=arguments.seed,
        encoder_steps=max(1, round(default.encoder_steps * arguments.scale)),
        list_steps=max(1, round(default.list_steps * arguments.scale)),
        question_steps=max(1, round(default.question_steps * arguments.scale)),
    )
    train(arguments.output, recipe)
    return 0


if __name__ == "__main__":
    sys.exit(main())
