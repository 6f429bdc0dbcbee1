# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The demo's images and questions: held-out handwriting stays held out, and every question has one right answer."""

import re
from collections import Counter

import numpy as np
import pytest


pytest.importorskip("sklearn", reason="the demo's images need scikit-learn: pip install scikit-learn")

import torch
from PIL import Image

from saisa_hf.demo import scenes
from saisa_hf.demo.contact_sheet import contact_sheet, terminal_images
from saisa_hf.demo.language import CHAT_TEMPLATE, IMAGE, Conversation, make_tokenizer


GRID_NAMES = [
    *("top left", "top center", "top right"),
    *("middle left", "middle center", "middle right"),
    *("bottom left", "bottom center", "bottom right"),
]


def random_scenes(split, count, seed=3):
    return [scenes.make_scene(split, np.random.default_rng([seed, index])) for index in range(count)]


def right_answers(text, scene):
    """All answers that `scene` makes true, worked out from the words of the question alone."""
    things = [(glyph.digit, glyph.ink, GRID_NAMES[glyph.cell]) for glyph in scene.glyphs]
    text = text.lower()
    digit = next(map(int, re.findall(r"\d", text)), None)
    ink = next((ink for ink in scenes.INKS if re.search(rf"\b{ink}\b", text)), None)
    place = next((place for place in GRID_NAMES if place in text), None)
    if text.startswith("how many"):
        return {str(sum(ink in (None, thing[1]) for thing in things))}
    if text.startswith("is there"):
        return {"yes" if any(thing[0] == digit for thing in things) else "no"}
    if text.startswith("where") or "which place" in text:
        return {thing[2] for thing in things if thing[0] == digit}
    if "colo" in text:
        return {thing[1] for thing in things if thing[0] == digit}
    if place is not None:
        return {str(thing[0]) for thing in things if thing[2] == place}
    return {str(thing[0]) for thing in things if thing[1] == ink}


def test_scans_of_the_test_split_never_appear_in_training_scenes():
    used = {
        split: {glyph.scan for scene in random_scenes(split, 600) for glyph in scene.glyphs}
        for split in ("train", "test")
    }
    assert len(used["train"]) > 1000 and len(used["test"]) > 350
    assert not used["train"] & used["test"]
    assert not set(scenes.scan_indices("train")) & set(scenes.scan_indices("test"))
    pixels = scenes.load_scans()[0].reshape(len(scenes.load_scans()[0]), -1)
    train, test = ({row.tobytes() for row in pixels[scenes.scan_indices(split)]} for split in ("train", "test"))
    assert not train & test


def test_the_split_falls_between_two_sheets_of_handwriting():
    labels = "".join(map(str, scenes.load_scans()[1]))
    sheet = "0123456789" * 3 + "0955650"
    starts = [match.start() for match in re.finditer(sheet, labels)]
    assert scenes.FIRST_TEST_SCAN in starts
    assert Counter(labels[scenes.FIRST_TEST_SCAN :]).keys() == set("0123456789")


def test_scenes_and_questions_are_a_function_of_the_seed():
    first, again, other = (scenes.held_out_questions(40, seed) for seed in (5, 5, 6))
    assert first == again
    assert all(a[0] != b[0] for a, b in zip(first, other))
    assert all(np.array_equal(scenes.draw(a[0]), scenes.draw(b[0])) for a, b in zip(first, again))


def test_every_question_has_exactly_one_right_answer():
    rng, asked = np.random.default_rng(0), Counter()
    for scene in random_scenes("train", 400):
        for kind in scenes.KINDS:
            question = scenes.ask(scene, kind, rng)
            if question is not None:
                assert right_answers(question.text, scene) == {question.answer}, (question, scene)
                asked[kind] += 1
    assert min(asked[kind] for kind in scenes.KINDS) > 300


def test_an_ambiguous_scene_is_not_asked_about():
    glyph = scenes.Glyph(cell=0, digit=7, ink="red", rgb=(200, 30, 30), scan=1500, variant=0)
    twice = scenes.Scene("test", (glyph, scenes.Glyph(4, 7, "red", (210, 30, 30), 1500, 1)), (250, 250, 250))
    rng = np.random.default_rng(0)
    for kind in ("digit of a colour", "colour of a digit", "place of a digit"):
        assert scenes.ask(twice, kind, rng) is None
    assert scenes.ask(twice, "how many digits", rng).answer == "2"
    with pytest.raises(ValueError, match="kind must be one of"):
        scenes.ask(twice, "weather", rng)


def test_answers_are_balanced():
    asked = scenes.held_out_questions(2100, seed=8)
    assert Counter(question.kind for _, question in asked) == dict.fromkeys(scenes.KINDS, 300)
    answers = {kind: Counter(q.answer for _, q in asked if q.kind == kind) for kind in scenes.KINDS}
    assert 0.42 < answers["is it there"]["yes"] / 300 < 0.58
    for kind in ("digit at a place", "digit of a colour", "colour of a digit", "place of a digit", "how many digits"):
        assert max(answers[kind].values()) < 2.5 * 300 / len(answers[kind])
    assert set(answers["how many digits"]) == set("234567")
    assert max(answers["how many of a colour"].values()) < 0.6 * 300


def test_ink_lies_in_the_named_cell_in_the_named_colour():
    named = total = 0
    for scene in random_scenes("test", 100):
        picture = scenes.draw(scene).astype(int)
        assert picture.shape == (72, 72, 3)
        for cell in range(9):
            row, column = 24 * (cell // 3), 24 * (cell % 3)
            difference = np.abs(picture[row : row + 24, column : column + 24] - np.array(scene.paper)).sum(-1)
            glyph = scene.at(cell)
            if glyph is None:
                assert difference.max() == 0
                continue
            y, x = np.unravel_index(difference.argmax(), difference.shape)
            darkest = picture[row + y, column + x]
            assert np.abs(darkest - np.array(glyph.rgb)).max() < 40
            distances = {ink: np.linalg.norm(darkest - np.array(rgb)) for ink, rgb in scenes.INKS.items()}
            named += min(distances, key=distances.get) == glyph.ink
            total += 1
    assert named / total > 0.98


def test_what_is_drawn_reads_as_the_named_digit():
    """Nearest neighbour among the raw scans, by the ink inside its bounding box."""

    def boxed(coverage):
        rows, columns = np.where(coverage.max(1) > 0.25)[0], np.where(coverage.max(0) > 0.25)[0]
        box = Image.fromarray((255 * coverage[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]).astype(np.uint8))
        return np.asarray(box.resize((8, 8), Image.Resampling.BILINEAR), dtype=float).ravel() / 255

    images, labels = scenes.load_scans()
    known = np.stack([boxed(image / 255) for image in images])
    right = total = 0
    for scene in random_scenes("test", 60):
        picture, paper = scenes.draw(scene).astype(float), np.array(scene.paper, dtype=float)
        for glyph in scene.glyphs:
            row, column = 24 * (glyph.cell // 3), 24 * (glyph.cell % 3)
            cell = picture[row : row + 24, column : column + 24]
            coverage = ((paper - cell) @ (paper - glyph.rgb)) / ((paper - glyph.rgb) @ (paper - glyph.rgb))
            nearest = np.linalg.norm(known - boxed(np.clip(coverage, 0, 1)), axis=1).argmin()
            right += labels[nearest] == glyph.digit
            total += 1
    assert right / total > 0.9


def test_no_digit_is_cut_off_by_its_cell():
    edge = np.ones((24, 24), dtype=bool)
    edge[1:-1, 1:-1] = False
    coverage = scenes.sprites("test").astype(float)
    assert coverage[..., edge].sum() < 0.002 * coverage.sum()


def test_lists_name_everything_there_is_once():
    for scene in random_scenes("test", 30):
        things = [(str(glyph.digit), glyph.ink, GRID_NAMES[glyph.cell]) for glyph in scene.glyphs]
        places = "|".join(GRID_NAMES)
        by_place = re.findall(rf"({places}) (\w+) (\d)", scenes.list_all(scene, "places"))
        assert [(digit, ink, place) for place, ink, digit in by_place] == things
        listed = []
        for part in scenes.list_all(scene, "digits").split(", "):
            listed += [(part[0], *found) for found in re.findall(rf"(\w+) ({places})", part[2:])]
        assert sorted(listed) == sorted(things)
        listed = []
        for part in scenes.list_all(scene, "inks").split(", "):
            ink, rest = part.split(" ", 1)
            listed += [(digit, ink, place) for digit, place in re.findall(rf"(\d) ({places})", rest)]
        assert sorted(listed) == sorted(things)
        counts = dict(part.split(" ") for part in scenes.list_all(scene, "counts").split(", "))
        expected = Counter(ink for _, ink, _ in things) + Counter(digits=len(things))
        assert {name: int(count) for name, count in counts.items() if count != "0"} == dict(expected)


def test_the_tokenizer_knows_every_word_of_the_demo():
    tokenizer, rng = make_tokenizer(), np.random.default_rng(0)
    for scene in random_scenes("train", 60):
        texts = [*scenes.LISTS.values(), *(scenes.list_all(scene, by) for by in scenes.LISTS)]
        texts += [part for kind in scenes.KINDS if (q := scenes.ask(scene, kind, rng)) for part in (q.text, q.answer)]
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in ids, text
            assert tokenizer.decode(ids) == text.lower()


def test_training_sequences_are_what_the_chat_template_writes():
    tokenizer = make_tokenizer()
    turns = [("Where is the 7?", "top left"), ("How many digits are there?", "3")]
    ids, labels = Conversation(tokenizer, 36).ids_and_labels(turns)
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": turns[0][0]}]},
        {"role": "assistant", "content": turns[0][1]},
        {"role": "user", "content": turns[1][0]},
        {"role": "assistant", "content": [{"type": "text", "text": turns[1][1]}]},
    ]
    text = tokenizer.apply_chat_template(chat, chat_template=CHAT_TEMPLATE, tokenize=False).replace(IMAGE, IMAGE * 36)
    assert ids == tokenizer(text, add_special_tokens=False).input_ids
    counted = [token for token in labels if token != -100]
    assert tokenizer.convert_ids_to_tokens(counted) == ["top", "left", "</s>", "3", "</s>"]
    assert all(label in (-100, token) for token, label in zip(ids, labels))
    prompt = tokenizer.apply_chat_template(
        chat[:1], chat_template=CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    ).replace(IMAGE, IMAGE * 36)
    start = labels.index(counted[0])
    assert tokenizer(prompt, add_special_tokens=False).input_ids == ids[:start]


def test_contact_sheet_and_terminal_show_the_images():
    asked = scenes.held_out_questions(6, seed=1)
    shown = [(scenes.draw(scene), question, question.answer) for scene, question in asked]
    right = contact_sheet(shown, "six")
    wrong = contact_sheet([(picture, question, "never") for picture, question, _ in shown], "six")
    assert right.size == wrong.size and right.width > 4 * 72 * 2
    assert np.asarray(right)[..., 1].astype(int).mean() != np.asarray(wrong)[..., 1].astype(int).mean()
    text = terminal_images([picture for picture, _, _ in shown], width=80)
    assert text.count("\n") == 11 and text.count("\u2580") == 3 * 24 * 12


def test_training_sees_the_pixels_and_ids_that_the_processor_makes():
    from saisa_hf.demo.encoder import pixels
    from saisa_hf.demo.train import TurnCollator, TurnDataset, make_processor

    processor = make_processor()
    dataset = TurnDataset(Conversation(processor.tokenizer, 36), "test", size=6, seed=4, list_share=0.3)
    items = [dataset[index] for index in range(6)]
    batch = TurnCollator(processor.tokenizer.pad_token_id)(items)
    pictures = np.stack([item["picture"] for item in items])
    made = processor(
        images=[Image.fromarray(p) for p in pictures], text=["<image>\nWhere is the 7?"] * 6, return_tensors="pt"
    )
    torch.testing.assert_close(made["pixel_values"], batch["pixel_values"], atol=1e-6, rtol=0)
    assert torch.equal(pixels(pictures), batch["pixel_values"])
    assert (made["input_ids"] == processor.image_token_id).sum(1).tolist() == [36] * 6
    assert (batch["input_ids"] == processor.image_token_id).sum(1).tolist() == [36] * 6
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()


def test_the_shipped_checkpoint_answers_questions_about_unseen_images(tmp_path, capsys):
    from saisa_hf.demo.run import run_demo

    scores = run_demo(questions=140, seed=7, output=tmp_path / "sheet.png")
    assert sum(right for right, _ in scores.values()) >= 0.88 * 140
    assert all(count == 20 for _, count in scores.values())
    assert Image.open(tmp_path / "sheet.png").width > 500
    assert "exact match" in capsys.readouterr().out
