# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Does the word that names a digit attend to that digit? The demo's checkpoint answers questions about images with held-out
handwriting, and the attention of its one-word answers is summed over the nine cells of the image.

    python benchmarks/attention_maps.py --json result.json --tables page.md --picture sheet.png

The answer to each question is the digit in a known cell: the digit at a place, or the digit of a colour. Results that are
already in the JSON file, with the same settings, are not computed again.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import transformers
from PIL import Image

from saisa_hf import attend
from saisa_hf.common.tables import fill_blocks, table
from saisa_hf.demo.run import load
from saisa_hf.demo.scenes import GRID, PLACES, Question, Scene, draw, make_scene, questions_in_turn
from saisa_hf.inspection.attention_pages import contact_sheet


KINDS = ("digit at a place", "digit of a colour")
SHOWN = "Describe the picture."  # the question of the contact sheet


def questions(count: int, seed: int) -> list[tuple[Scene, Question]]:
    """`count` test scenes with one question each, alternating between the two kinds."""
    return questions_in_turn(KINDS, count, (seed, 5))


def asked_cell(scene: Scene, question: Question) -> int:
    """The cell of the digit that a question is about."""
    if question.kind == KINDS[0]:
        return next(cell for cell, place in enumerate(PLACES) if f" {place}?" in question.text)
    return next(glyph.cell for glyph in scene.glyphs if f" {glyph.ink}?" in question.text)


def by_cell(weights: np.ndarray) -> np.ndarray:
    """Weights (..., rows, columns) of visual tokens, summed over the cells of the image, (..., 9)."""
    *axes, rows, columns = weights.shape
    parts = weights.reshape(*axes, GRID, rows // GRID, GRID, columns // GRID)
    return parts.sum((-3, -1)).reshape(*axes, GRID * GRID)


def measure(model, processor, scene: Scene, question: Question) -> dict:
    """The measurements of one question. `mass`, `first` and `on_picture` are lists: the mean over layers, then each layer."""
    maps = attend(model, processor, Image.fromarray(draw(scene)), question.text, max_new_tokens=8)
    cells = by_cell(np.concatenate([maps.mean()[None], maps.pictures[0].weights])[:, 0])  # of the first word
    cell = asked_cell(scene, question)
    return {
        "kind": question.kind,
        "right": maps.answer == question.answer,
        "digits": len(scene.glyphs),
        "mass": (cells[:, cell] / cells.sum(-1)).astype(float).round(4).tolist(),
        "first": (cells.argmax(-1) == cell).tolist(),
        "on_picture": cells.sum(-1).astype(float).round(4).tolist(),
    }


def tables(result: dict) -> dict[str, str]:
    """The page's tables: by layer, and by kind of question and right or wrong answer."""
    measured = result["measured"]
    names = ["mean of the layers", *(f"layer {layer}" for layer in range(len(measured[0]["mass"]) - 1))]

    def part(rows, name, layer):
        return float(np.mean([row[name][layer] for row in rows]))

    layers = [
        [
            name,
            f"{part(measured, 'mass', index):.1%}",
            f"{part(measured, 'first', index):.1%}",
            f"{part(measured, 'on_picture', index):.1%}",
        ]
        for index, name in enumerate(names)
    ]
    occupied = float(np.mean([1 / row["digits"] for row in measured]))
    layers.append(["chance, any cell", f"{1 / GRID**2:.1%}", f"{1 / GRID**2:.1%}", ""])
    layers.append(["chance, a cell with a digit", f"{occupied:.1%}", f"{occupied:.1%}", ""])
    groups = {
        **{kind: [row for row in measured if row["kind"] == kind] for kind in KINDS},
        "right answers": [row for row in measured if row["right"]],
        "wrong answers": [row for row in measured if not row["right"]],
    }
    kinds = [
        [name, str(len(rows)), f"{part(rows, 'mass', 0):.1%}", f"{part(rows, 'first', 0):.1%}"]
        for name, rows in groups.items()
        if rows
    ]
    head = ["", "mass in the right cell", "right cell has the most", "attention on the image"]
    return {
        "layers": table(head, layers),
        "kinds": table(["mean of the layers", "questions", *head[1:3]], kinds),
    }


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--pictures", type=int, default=200, help="images, with one question each (default: 200)")
    parser.add_argument("--seed", type=int, default=1, help="seed of scenes and questions (default: 1)")
    parser.add_argument("--json", type=Path, help="write all results here, or read them if the file exists")
    parser.add_argument("--tables", type=Path, metavar="PAGE", help="update the marked tables of this Markdown page")
    parser.add_argument("--picture", type=Path, help="write a contact sheet of the first scene here")
    args = parser.parse_args(argv)
    settings = {"pictures": args.pictures, "seed": args.seed}
    result = json.loads(args.json.read_text()) if args.json and args.json.exists() else None
    if result is None or result["settings"] != settings:
        model, processor = load()
        measured = [measure(model, processor, *asked) for asked in questions(args.pictures, args.seed)]
        result = {"settings": settings, "transformers": transformers.__version__, "measured": measured}
        if args.json:
            rows = ",\n".join(f"  {json.dumps(row)}" for row in measured)
            head = json.dumps({name: result[name] for name in ("settings", "transformers")})
            args.json.write_text(f'{head[:-1]}, "measured": [\n{rows}\n]}}\n')
    blocks = tables(result)
    print("\n\n".join(blocks.values()))
    if args.tables:
        fill_blocks(args.tables, blocks)
    if args.picture:
        model, processor = load()
        scene = make_scene("test", np.random.default_rng(args.seed), n_digits=3)
        contact_sheet(attend(model, processor, Image.fromarray(draw(scene)), SHOWN)).save(args.picture)
    return result


if __name__ == "__main__":
    main()
