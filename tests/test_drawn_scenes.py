# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The samples of drawings of `benchmarks/`: what the questions ask is what the picture shows, and no split has what another
keeps for itself. The drawings here are squares, each thing in a colour of its own."""

import base64
import hashlib
import io
import json
import re
import sys
import tarfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import drawings
import drawn_scenes
import drawn_words
from drawn_scenes import SPLITS, Placed, make
from svg_drawing import draw_svg


pytest.importorskip("matplotlib")  # for its fonts

COUNT = 120  # samples of each split
PLACES = {f"{row} {column}" for row in drawn_scenes.ROWS[3] for column in drawn_scenes.COLUMNS[3]} | {"middle"}


def paint(number):
    """A colour of its own for each thing; too dark to be a background."""
    return (number % 7 * 20, number // 7 % 10 * 14, number // 70 * 14)


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawings")
    named = drawings.listed()[0]
    for artist in drawings.ARTISTS:
        (folder / artist).mkdir()
        for number, (code, *_) in enumerate(named):
            Image.new("RGBA", (8, 8), (*paint(number), 255)).save(folder / artist / f"{code}.png", compress_level=0)
    colours = {
        code: dict.fromkeys(drawings.ARTISTS, (*drawings.COLOURS, None)[number % 12])
        for number, (code, *_) in enumerate(named)
    }
    (folder / drawings.DONE).write_text(json.dumps({"colours": colours}))
    return drawings.read(folder)


@pytest.fixture(scope="module")
def samples(things):
    return {split: [make(split, index, things) for index in range(COUNT)] for split in SPLITS}


def every_turn(samples, kind=None):
    return [(sample, turn) for sample in samples for turn in sample.turns if kind in (None, turn.kind)]


def test_a_sample_depends_on_its_split_number_and_seed_alone(things, samples):
    for split in SPLITS:
        again = make(split, 7, things)
        assert again.picture.tobytes() == samples[split][7].picture.tobytes()
        assert (again.caption, again.turns, again.layout) == tuple(
            getattr(samples[split][7], name) for name in ("caption", "turns", "layout")
        )
    pictures = {sample.picture.tobytes() for split in SPLITS for sample in samples[split]}
    assert len(pictures) == COUNT * len(SPLITS)
    assert make("train", 7, things, seed=1).picture.tobytes() not in pictures
    with pytest.raises(ValueError, match="'test', expected one of train"):
        make("test", 0, things)


def test_a_small_world_has_few_names_and_unseen_things_of_its_categories(things):
    known, unseen = drawn_scenes.small_world(things, each=3), drawings.is_unseen(things)
    assert len(known) == 3 * len(drawn_scenes.WORLD) and not any(unseen[name] for name in known)
    for split in SPLITS:
        samples = [make(split, index, things, known=known) for index in range(40)]
        placed = [found for sample in samples for found in sample.layout if isinstance(found, Placed)]
        assert {found.thing.name in known for found in placed} == {split != "unseen"}
        assert {found.thing.category for found in placed} <= set(drawn_scenes.WORLD)
        assert {unseen[found.thing.name] for found in placed} == {split == "unseen"}


def test_splits_keep_their_artists_things_words_and_phrasings(things, samples):
    unseen = drawings.is_unseen(things)
    assert 0.13 < sum(unseen.values()) / len(things) < 0.16
    for split in SPLITS:
        placed = [found for sample in samples[split] for found in sample.layout if isinstance(found, Placed)]
        assert {found.artist == drawings.HELD_OUT for found in placed} == {split == "artist"}
        assert {unseen[found.thing.name] for found in placed} == {split == "unseen"}
    drawn = [sample for sample in samples["train"] if sample.type in ("single", "scene")]
    text = " | ".join(f"{turn.question} {turn.answer}".lower() for _, turn in every_turn(drawn))
    assert not [name for name in unseen if unseen[name] and re.search(rf"\b{name}\b", text)]
    for text in (drawn_words.WORDS, drawn_words.LABELS):
        known, new = (set(drawn_scenes.words(split, text)) for split in ("train", "unseen"))
        assert known | new == set(text.split()) and not known & new and len(known) > 5 * len(new) > 30


def test_phrasings_of_evaluation_are_never_in_training(samples):
    blanks = {"verb": "(is|are)", "Verb": "(is|are)", "side": f"({'|'.join(drawn_scenes.SIDES)})"}
    patterns = {}
    for held_out in (False, True):
        texts = [text for form in drawn_words.PHRASES for text in drawn_words.phrasings(form, held_out)]
        texts = [re.sub(r"\\{(\w+)\\}", lambda blank: blanks.get(blank[1], ".+"), re.escape(text)) for text in texts]
        patterns[held_out] = re.compile("|".join(texts), re.IGNORECASE)
    for form in drawn_words.PHRASES:
        training, others = (drawn_words.phrasings(form, held_out) for held_out in (False, True))
        assert len(set(training)) >= 4 and len(others) in (1, 2) and not set(training) & set(others)
    for split in SPLITS:
        for _, turn in every_turn(samples[split]):
            assert patterns[split != "train"].fullmatch(turn.question), turn
            assert not patterns[split == "train"].fullmatch(turn.question), turn


def seen(sample, things):
    """(row, column) -> the thing that is there, from the pixels alone."""
    grid, found = sample.layout[0].grid, {}
    pixels = np.asarray(sample.picture).astype(int)
    inked = pixels.max(-1) < 150
    numbers = pixels[..., 0] // 20 + pixels[..., 1] // 14 * 7 + pixels[..., 2] // 14 * 70
    for row, rows in enumerate(np.array_split(np.arange(drawn_scenes.SIZE), grid)):
        for column, columns in enumerate(np.array_split(np.arange(drawn_scenes.SIZE), grid)):
            cell = np.ix_(rows, columns)
            inside = numbers[cell][inked[cell]]
            if len(inside) > 0.03 * len(rows) * len(columns):  # more than a line of pixels of a neighbour
                counts = np.bincount(inside)
                assert counts.max() > (0.4 if grid > 1 else 0.18) * len(rows) * len(columns)
                found[row, column] = things[counts.argmax()]
    return found


@pytest.fixture(scope="module")
def shown_in(things, samples):
    """What every sample of drawings shows, by its id."""
    drawn = [sample for split in SPLITS for sample in samples[split] if sample.type in ("single", "scene")]
    return {id(sample): seen(sample, things) for sample in drawn}


def cells(shown, name):
    """Where something of a name or a category is."""
    return [cell for cell, thing in shown.items() if name in (thing.name, thing.category)]


def spot(place, grid):
    if place == "middle":
        return 1, 1
    row, column = place.split()
    return drawn_scenes.ROWS[grid].index(row), drawn_scenes.COLUMNS[grid].index(column)


def test_answers_are_what_the_picture_shows(things, samples, shown_in):
    called = {name for thing in things for name in (thing.name, thing.plural, thing.category) if name}
    called |= {*drawn_words.COUNTED.values()} | PLACES
    longest_first = sorted(map(re.escape, called), key=len, reverse=True)  # where a name is part of another
    pattern = re.compile(rf"\b({'|'.join(longest_first)})\b")
    checked = dict.fromkeys(("count", "position", "relation", "presence", "category"), 0)
    scenes = [sample for split in SPLITS for sample in samples[split] if sample.type == "scene"]
    for sample, turn in every_turn(scenes):
        shown, grid = shown_in[id(sample)], sample.layout[0].grid
        assert {(found.row, found.column): found.thing for found in sample.layout} == shown
        if turn.kind not in checked:
            continue
        names, right = pattern.findall(turn.question.lower()), turn.answer
        checked[turn.kind] += 1
        if turn.kind == "count":
            of = names[0] if names else "things"
            fits = [
                of == "things" or of in (thing.plural, drawn_words.COUNTED.get(thing.category))
                for thing in shown.values()
            ]
            assert drawn_words.NUMBERS[sum(fits)] == right, turn
        elif turn.kind in ("position", "category") and right not in PLACES:
            thing = shown[spot(next(name for name in names if name in PLACES), grid)]
            assert right == (thing.name if turn.kind == "position" else thing.category), turn
        elif turn.kind == "position":
            assert cells(shown, names[-1]) == [spot(right, grid)], turn
        elif turn.kind == "presence":
            assert (right == "Yes") == bool(cells(shown, names[-1])), turn
        else:
            side = next(side for side in drawn_scenes.SIDES if side in turn.question)
            down, across = drawn_scenes.SIDES[side]
            (row, column), *others = cells(shown, names[-1])
            assert not others, turn
            ahead = [cell for cell in shown if (cell[0] - row) * down + (cell[1] - column) * across > 0]
            if right in ("Yes", "No"):
                (subject,) = cells(shown, names[0])
                assert (subject in ahead) == (right == "Yes"), turn
                assert subject[0] != row if down else subject[1] != column, turn
            else:
                assert [shown[cell].name for cell in ahead] == [right], turn
                assert ahead[0][1] == column if down else ahead[0][0] == row, turn
    assert min(checked.values()) > 20


def test_no_answer_of_a_kind_is_most_of_them(samples):
    """So that nothing is learned by always saying the same."""
    for kind in drawn_scenes.KINDS:
        counts = Counter(turn.answer for _, turn in every_turn([*samples["train"], *samples["valid"]], kind))
        if kind not in ("presence", "relation"):
            assert max(counts.values()) < 0.5 * counts.total(), kind
    answers = [turn.answer for _, turn in every_turn([*samples["train"], *samples["valid"]], "presence")]
    assert 0.42 < answers.count("Yes") / len(answers) < 0.58
    assert all(len(sample.turns) == drawn_scenes.TURNS for sample in samples["train"])


def test_names_kinds_and_colours_are_those_of_what_is_drawn(samples, shown_in):
    checked = dict.fromkeys(("name", "category", "colour"), 0)
    drawn = [sample for split in SPLITS for sample in samples[split] if sample.type in ("single", "scene")]
    for sample, turn in every_turn(drawn):
        if turn.kind not in checked or (turn.kind == "category" and sample.type == "scene"):
            continue
        shown, asked = shown_in[id(sample)], turn.question.lower()
        checked[turn.kind] += 1
        if turn.kind == "colour":
            meant = [
                found
                for found in sample.layout
                if sample.type == "single"
                or any(re.search(rf"\b{name}\b", asked) for name in (found.thing.name, found.thing.plural) if name)
            ]
            meant = meant or [
                found for found in sample.layout if f" {found.thing.category} " in f" {asked.strip('?.')} "
            ]
            assert meant and {shown[found.row, found.column] for found in meant} == {found.thing for found in meant}
            assert {found.thing.colours[found.artist] for found in meant} == {turn.answer}, turn
        else:
            (thing,) = shown.values()
            assert (
                turn.answer == getattr(thing, turn.kind) and sample.caption == f"{thing.one[0].upper()}{thing.one[1:]}."
            )
    assert min(checked.values()) > 20


def painted(sample, colour):
    """The pixels that have a paint."""
    return (np.asarray(sample.picture) == drawn_scenes.PAINTS[colour]).all(-1)


def test_signs_are_painted_and_read_as_their_layout_says(samples):
    places = {"first": 0, "second": 1, "third": 2}
    signs = [one for split in SPLITS for one in samples[split] if one.type == "sign"]
    for sample in signs:
        (sign,) = sample.layout
        inked = {colour: int(painted(sample, colour).sum()) for colour in drawn_scenes.PAINTS}
        assert inked[sign.colour] > 0.99 * sum(inked.values())  # letters' edges have all shades
        assert sample.caption == f"A sign that says {sign.text}."
    for sample, turn in every_turn(signs):
        (sign,) = sample.layout
        words = sign.text.split()
        if turn.kind == "colour":
            assert turn.answer == sign.colour
        elif turn.kind == "count":
            assert turn.answer == drawn_words.NUMBERS[len(words)]
        elif turn.answer in ("Yes", "No"):
            said = re.search(rf"(?<!\w){re.escape(sign.text)}(?!\w)", turn.question)
            assert (turn.answer == "Yes") == bool(said), turn
        else:
            place = next((place for nth, place in places.items() if f" {nth}" in turn.question), None)
            assert turn.answer == (sign.text if place is None else words[place]), turn


def test_bars_are_drawn_and_compared_as_their_layout_says(samples):
    forms = dict.fromkeys(("most", "named", "compared", "counted"), 0)
    charts = [one for split in SPLITS for one in samples[split] if one.type == "chart"]
    base = drawn_scenes.SIZE - 36
    for sample in charts:
        bars = [painted(sample, bar.colour)[: base - 1] for bar in sample.layout]  # without the names below the line
        tops, left = ([int(np.flatnonzero(bar.any(axis))[0]) for bar in bars] for axis in (1, 0))
        assert tops == [base - bar.height for bar in sample.layout] and left == sorted(left)
    for sample, turn in every_turn(charts):
        ordered = sorted(sample.layout, key=lambda bar: bar.height)
        assert all(low.height + 8 < high.height for low, high in pairwise(ordered))
        most = {"tallest": ordered[-1], "shortest": ordered[0]}
        asked = [bar for bar in sample.layout if re.search(rf"\b{bar.name}\b", turn.question)]
        asked.sort(key=lambda bar: re.search(rf"\b{bar.name}\b", turn.question).start())
        if extreme := next((most[word] for word in most if word in turn.question), None):
            forms["most"] += 1
            wants = "colour" if "colour" in turn.question.lower() else "name"
            assert turn.answer == getattr(extreme, wants), turn
        elif turn.answer in ("Yes", "No"):
            forms["compared"] += 1
            one, other = asked[::-1] if "shorter" in turn.question else asked
            assert (turn.answer == "Yes") == (one.height > other.height), turn
        elif asked:
            forms["named"] += 1
            assert turn.answer == asked[0].colour, turn
        else:
            forms["counted"] += 1
            assert turn.answer == drawn_words.NUMBERS[len(sample.layout)], turn
    assert min(forms.values()) > 5


def test_signs_of_the_held_out_artist_have_a_held_out_font(things, monkeypatch):
    used, fonts = {}, drawn_scenes.font
    for split in ("valid", "artist"):
        names = used.setdefault(split, set())
        monkeypatch.setattr(drawn_scenes, "font", lambda name, size, names=names: names.add(name) or fonts(name, size))
        for index in range(40):
            make(split, index, things)
    assert used["artist"] <= set(drawn_scenes.HELD_OUT_FONTS) and used["valid"] <= set(drawn_scenes.FONTS)
    assert min(map(len, used.values())) > 1


def test_texts_are_messages_for_training_and_held_out_ones():
    texts = drawn_words.text_turns()
    assert len(texts) == 60 and all(message for messages in texts for message in messages)
    assert not {texts[place][0] for place in range(drawn_words.TRAINING_TEXTS)} & {
        messages[0] for messages in texts[45:]
    }


def test_the_list_names_each_thing_once():
    named, alike = drawings.listed()
    names, codes = ([thing[place] for thing in named] for place in (1, 0))
    assert len(named) > 600 and len(set(names)) == len(set(codes)) == len(named)
    assert set(alike) <= set(names)


SVG = b"""<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg"><g transform="translate(36,36)">
    <circle r="20" fill="#c82828"/></g></svg>"""


def packed(package, path, codes):
    """A package as npm loads it, with a picture of each code."""
    with tarfile.open(path, "w:gz") as archive:
        for code in codes:
            content = SVG
            if package.suffix != ".svg":
                stream = io.BytesIO()
                Image.new("RGBA", (8, 8), (200, 40, 40, 255)).save(stream, "PNG")
                content = stream.getvalue()
            member = tarfile.TarInfo(
                f"{package.pictures}{code.upper() if package.suffix == '.svg' else code}{package.suffix}"
            )
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_installing_unpacks_what_is_listed_and_nothing_else(tmp_path, monkeypatch):
    """With packages made here in place of npm's."""
    listed = (("1f415", "dog", "", "animal"), ("1f347", "grapes", "~", "fruit"))
    monkeypatch.setattr(drawings, "listed", lambda: (listed, {}))
    monkeypatch.setattr(
        drawings, "loaded", lambda package, folder: packed(package, folder / "made.tgz", ["1f415", "1f347", "1f600"])
    )
    for _ in range(2):  # the second time it is there
        drawings.install(tmp_path / "here")
    dog, grapes = drawings.read(tmp_path / "here")
    assert (dog.one, dog.plural, dog.verb, grapes.one, grapes.plural, grapes.verb) == (
        "a dog",
        "dogs",
        "is",
        "grapes",
        None,
        "are",
    )
    assert set(dog.colours.values()) == {"red"}
    assert len(list((tmp_path / "here").glob("*/*.png"))) == 8 and [path.name for path in tmp_path.iterdir()] == [
        "here"
    ]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/mine").touch()
    with pytest.raises(FileExistsError, match="does not hold these drawings"):
        drawings.install(tmp_path / "other")
    monkeypatch.setattr(drawings, "listed", lambda: ((*listed, ("1f42f", "tiger", "", "animal")), {}))
    with pytest.raises(ValueError, match=r"emoji-datasource-google@16.0.0 has no picture of 1f42f"):
        drawings.install(tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_a_package_with_another_checksum_is_not_unpacked(tmp_path, monkeypatch):
    npm = tmp_path / "npm"
    npm.write_text('#!/bin/sh\necho changed > made.tgz\necho made.tgz\n[ "$(cat "$0.fails" 2>/dev/null)" = "" ]\n')
    npm.chmod(0o755)
    package = drawings.PACKAGES["noto"]
    monkeypatch.setattr(drawings.shutil, "which", lambda name: str(npm))
    found = base64.b64encode(hashlib.sha512(b"changed\n").digest()).decode()
    with pytest.raises(ValueError, match=re.escape(f"sha512-{found}, expected sha512-{package.sha512}")):
        drawings.loaded(package, tmp_path)
    (tmp_path / "npm.fails").write_text("1")
    with pytest.raises(OSError, match=r"npm could not load emoji-datasource-google@16.0.0"):
        drawings.loaded(package, tmp_path)
    monkeypatch.setattr(drawings.shutil, "which", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"install Node\.js"):
        drawings.loaded(package, tmp_path)


def test_colours_are_named_as_people_would():
    named = {
        "red": (221, 46, 68),
        "orange": (244, 144, 12),
        "yellow": (255, 204, 77),
        "green": (92, 145, 59),
        "blue": (59, 136, 195),
    }
    named |= {"purple": (146, 102, 204), "brown": (138, 75, 56), "black": (20, 20, 20), "white": (250, 250, 250)}
    named |= {"grey": (128, 128, 128), None: (241, 179, 28)}
    assert {name: drawings.named_colour(*rgb) for name, rgb in named.items()} == {name: name for name in named}


def test_svg_shapes_are_drawn_where_they_are():
    """A ring of two circles with a hole, a square by a relative path, an arc and a line."""
    text = """<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg"><path fill="#ff0000" d="M36 6a30 30 0 1 1-.01 0z
        M36 16a20 20 0 1 0 .01 0z"/><path fill="none" stroke="#0000ff" stroke-width="4" d="M30 36h12"/>
        <rect x="2" y="2" width="6" height="6" fill="#00ff00" transform="translate(60 60)"/></svg>"""
    pixels = np.asarray(draw_svg(text, 72))
    assert tuple(pixels[11, 36]) == (255, 0, 0, 255) and pixels[24, 36, 3] == 0
    assert pixels[36, 36].tolist()[:3] == [0, 0, 255] and pixels[65, 65].tolist()[:3] == [0, 255, 0]
    assert min(pixels[36, 36, 3], pixels[65, 65, 3]) > 240
    assert pixels[2, 2, 3] == pixels[65, 5, 3] == 0
    with pytest.raises(ValueError, match="path with 'X'"):
        draw_svg('<svg viewBox="0 0 9 9" xmlns="http://www.w3.org/2000/svg"><path d="M1 1X3"/></svg>', 9)
