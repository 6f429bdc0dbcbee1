# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa demo`: loads the demo's checkpoint, asks it fresh questions about pictures it has never seen, shows them and scores
them."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor

from .contact_sheet import contact_sheet, terminal_pictures
from .scenes import KINDS, Question, Scene, draw, held_out_questions


CHECKPOINT = Path(__file__).parent / "checkpoint"
SHOWN = 12


def load(checkpoint: str | Path = CHECKPOINT, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    """Model and processor of a checkpoint, loaded as anybody would load it: with the code the checkpoint carries."""
    from saisa_hf import AutoModelForVision2Seq

    checkpoint = str(checkpoint)
    if not (Path(checkpoint) / "config.json").is_file():
        raise FileNotFoundError(
            f"checkpoint must be a folder with a config.json, got {checkpoint!r}; train one with "
            "`saisa demo --train DIR` and name it with --checkpoint DIR"
        )
    model = AutoModelForVision2Seq.from_pretrained(checkpoint, trust_remote_code=True, dtype=dtype)
    return model.to(device).eval(), AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True)


def ask_model(model, processor, asked: list[tuple[Scene, Question]], batch_size: int = 50) -> list[str]:
    """The model's answers, by greedy decoding, to one question per scene; batches are padded on the left."""
    answers = []
    for start in range(0, len(asked), batch_size):
        chats = []
        for scene, question in asked[start : start + batch_size]:
            picture = {"type": "image", "image": Image.fromarray(draw(scene))}
            chats.append([{"role": "user", "content": [picture, {"type": "text", "text": question.text}]}])
        batch = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", padding=True
        ).to(model.device, dtype=model.dtype)
        ids = model.generate(**batch, max_new_tokens=8, do_sample=False)
        answers += processor.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]


def by_kind(asked: list[tuple[Scene, Question]], answers: list[str]) -> dict[str, tuple[int, int]]:
    """(exact matches, questions) of every kind of question."""
    scores = dict.fromkeys(KINDS, (0, 0))
    for (_, question), answer in zip(asked, answers):
        hits, count = scores[question.kind]
        scores[question.kind] = (hits + (answer == question.answer), count + 1)
    return scores


def table(scores: dict[str, tuple[int, int]]) -> str:
    """The scores as lines of text, with a total."""
    rows = [*scores.items(), ("all", (sum(hits for hits, _ in scores.values()), sum(n for _, n in scores.values())))]
    lines = [f"{'question':<22}{'asked':>7}{'right':>7}{'exact match':>13}"]
    lines += [f"{kind:<22}{n:>7}{hits:>7}{hits / n if n else 0:>13.1%}" for kind, (hits, n) in rows]
    return "\n".join(lines)


def run_demo(
    checkpoint: str | Path = CHECKPOINT,
    questions: int = 500,
    seed: int = 1,
    output: str | Path | None = "saisa-demo.png",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> dict[str, tuple[int, int]]:
    """Runs the demo and returns the scores by kind of question.

    `questions` fresh scenes of held-out handwriting are drawn from `seed`, one question each; the first twelve are shown
    in the terminal and on a contact sheet, which is written to `output` as PNG (None: not written).
    """
    if questions < 1:
        raise ValueError(f"questions must be at least 1, got {questions}")
    model, processor = load(checkpoint, dtype, device)
    size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"{type(model).__name__} with {size:.1f} million parameters from {checkpoint}\n")
    asked = held_out_questions(questions, seed)
    start = time.perf_counter()
    answers = ask_model(model, processor, asked)
    seconds = time.perf_counter() - start
    shown = [(draw(scene), question, answer) for (scene, question), answer in zip(asked[:SHOWN], answers)]
    if sys.stdout.isatty():
        print(terminal_pictures([picture for picture, _, _ in shown]), end="\n\n")
    for number, (_, question, answer) in enumerate(shown, start=1):
        verdict = "right" if answer == question.answer else f"WRONG, it is {question.answer}"
        print(f"{number:>3}  {question.text:<42} {answer:<15} {verdict}")
    scores = by_kind(asked, answers)
    print(f"\n{table(scores)}\n\n{questions} questions about unseen pictures in {seconds:.1f} seconds")
    if output is not None:
        right = sum(hits for hits, _ in scores.values())
        title = f"{right} of {questions} fresh questions answered exactly ({right / questions:.1%})"
        contact_sheet(shown, title).save(output)
        print(f"pictures, questions and answers: {output}")
    return scores


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="saisa demo",
        description="Asks a small SAISA questions about pictures of handwritten digits that it has never seen, shows "
        "picture, question and answer, and prints the exact-match accuracy by kind of question.",
    )
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder (default: the shipped checkpoint)")
    parser.add_argument("--questions", type=int, default=500, help="how many to ask (default: 500)")
    parser.add_argument("--seed", type=int, default=1, help="seed of pictures and questions (default: 1)")
    parser.add_argument(
        "--output", type=Path, default=Path("saisa-demo.png"), help="contact sheet (default: saisa-demo.png)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, mps ... (default: cpu)")
    parser.add_argument(
        "--train", type=Path, metavar="DIR", help="train a checkpoint from nothing instead, and save it to DIR"
    )
    arguments = parser.parse_args(argv)
    if arguments.train is not None:
        from .train import main as train

        return train(["--output", str(arguments.train)])
    run_demo(
        arguments.checkpoint,
        arguments.questions,
        arguments.seed,
        arguments.output,
        getattr(torch, arguments.dtype),
        arguments.device,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
