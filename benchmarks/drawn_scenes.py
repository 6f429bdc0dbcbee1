# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Samples made of drawings: a picture, a caption and questions, each with the one short answer that is right.

    single   one large drawing            name, category, colour, presence
    scene    two to five drawings         count, position, relation, presence, colour, category
    sign     up to three words, a number  reading, count, colour
    chart    three or four bars           chart

    train    drawings by the artists of training of the things that are known, in the phrasings of training
    valid    the same, in phrasings that training never has
    artist   the known things by the artist that is held out, and signs in a font that is held out; phrasings as in valid
    unseen   things, words of signs and names of bars that training never has, by the artists of training; as in valid

Training never says of a drawing that it is an unseen thing, though "bus", "taxi" and "door" are words on its signs. So in the
split unseen a model must know the names from elsewhere. Categories, colours, counts and positions it can learn here, and
questions refer to things by their category where they can ("Where is the animal?").

Letters are in matplotlib's fonts. Other releases of it, of Pillow or of NumPy may give other samples for a number.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from drawings import ARTISTS, HELD_OUT, Thing, is_unseen, listed
from drawn_words import COUNTED, LABELS, NUMBERS, OVERLAPS, WORDS, phrasings
from PIL import Image, ImageDraw, ImageFont


SPLITS = ("train", "valid", "artist", "unseen")
SIZE = 224  # pixels, of a picture
TURNS = 4
ATTEMPTS = 12  # at a question of one kind, before another kind is asked
KINDS = ("name", "category", "colour", "count", "position", "relation", "presence", "reading", "chart")
SHARES = {"single": 0.4, "scene": 0.44, "sign": 0.08, "chart": 0.08}
WORLD = ("animal", "fruit", "vegetable", "food", "vehicle", "tool", "clothing", "instrument")
ASKED = {
    "single": {"name": 0.36, "category": 0.26, "colour": 0.2, "presence": 0.18},
    "scene": {"count": 0.27, "position": 0.27, "relation": 0.24, "presence": 0.1, "colour": 0.07, "category": 0.05},
    "sign": {"reading": 0.68, "count": 0.16, "colour": 0.16},
    "chart": {"chart": 1.0},
}
ROWS = {2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
COLUMNS = {2: ("left", "right"), 3: ("left", "middle", "right")}
SIDES = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (-1, 0), "below": (1, 0)}
PAINTS = {
    "red": (208, 48, 44),
    "orange": (242, 140, 30),
    "yellow": (250, 214, 50),
    "green": (60, 150, 70),
    "blue": (50, 100, 205),
}
PAINTS |= {
    "purple": (128, 70, 170),
    "pink": (245, 150, 190),
    "brown": (125, 80, 45),
    "grey": (140, 140, 140),
    "black": (30, 30, 30),
}
FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Oblique", "DejaVuSerif-Bold")
HELD_OUT_FONTS = ("STIXGeneral", "STIXGeneralBol")


@dataclass(frozen=True)
class Turn:
    """A question of one of `KINDS` and its answer."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Placed:
    """A drawing in a picture: whose, in which row and column of how many, and its box (left, top, right, bottom), pixels."""

    thing: Thing
    artist: str
    row: int
    column: int
    grid: int
    box: tuple[int, int, int, int]

    @property
    def place(self) -> str:
        row, column = ROWS[self.grid][self.row], COLUMNS[self.grid][self.column]
        return "middle" if row == column else f"{row} {column}"

    @property
    def colour(self) -> str | None:
        return self.thing.colours[self.artist]


@dataclass(frozen=True)
class Sign:
    """What a picture's sign says, and its colour."""

    text: str
    colour: str


@dataclass(frozen=True)
class Bar:
    """A bar of a chart; its height in pixels."""

    name: str
    colour: str
    height: int


@dataclass(frozen=True)
class Sample:
    """A picture, RGB and `SIZE` pixels wide and high, with a caption and `TURNS` questions. `layout` is what is in it."""

    type: str
    picture: Image.Image
    caption: str
    turns: list[Turn]
    layout: tuple[Placed | Sign | Bar, ...] = field(repr=False)


def make(split: str, index: int, things: list[Thing], seed: int = 0, known: frozenset[str] | None = None) -> Sample:
    """The sample of a number in a split. The same arguments give the same sample. `known` are the names that training has, if
    it is not to have all that it may; unseen things are then of their categories.

    Raises:
        ValueError: no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"split {split!r}, expected one of {', '.join(SPLITS)}")
    rng = np.random.default_rng([SPLITS.index(split), index, seed])
    maker = Maker(split, rng, pool(split, tuple(things), known))
    return maker.make(str(rng.choice(list(SHARES), p=list(SHARES.values()))))


@lru_cache
def pool(split: str, things: tuple[Thing, ...], known: frozenset[str] | None = None) -> list[Thing]:
    """The things of a split."""
    unseen = is_unseen(things)
    if known is not None:
        categories = {thing.category for thing in things if thing.name in known}
        things = tuple(x for x in things if x.name in known or (unseen[x.name] and x.category in categories))
    return [thing for thing in things if unseen[thing.name] == (split == "unseen")]


def small_world(things: list[Thing], each: int = 10) -> frozenset[str]:
    """Names of one word in the categories `WORLD`, at most so many of each, chosen by a hash: few enough to be learned from
    some thousand questions."""
    unseen, chosen = is_unseen(things), []
    for category in WORLD:
        names = [x.name for x in things if x.category == category and x.name.isalpha() and not unseen[x.name]]
        chosen += sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())[:each]
    return frozenset(chosen)


def artists(split: str) -> list[str]:
    """The artists of a split."""
    return [HELD_OUT] if split == "artist" else [artist for artist in ARTISTS if artist != HELD_OUT]


@lru_cache
def words(split: str, text: str) -> list[str]:
    """The words of a text that a split has: each seventh is unseen."""
    return [word for place, word in enumerate(sorted(text.split())) if (place % 7 == 3) == (split == "unseen")]


def alike(name: str, other: str) -> bool:
    """Whether one could be taken for the other."""
    return other == name or other in listed()[1].get(name, ()) or name in other.split() or other in name.split()


@lru_cache(maxsize=4096)
def drawing(path: Path, size: int) -> Image.Image:
    """A drawing at a size that is kept in memory, cut to what is not transparent."""
    picture = Image.open(path).convert("RGBA")
    picture = picture.crop(picture.getchannel("A").getbbox())
    scale = size / max(picture.size)
    return picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)


@lru_cache
def font(name: str, size: int):
    """A font of matplotlib's. No other takes its place: a split would have a font that another keeps for itself."""
    found = find_spec("matplotlib")
    if found is None or found.origin is None:
        raise ImportError("Drawing letters needs matplotlib's fonts: pip install matplotlib")
    return ImageFont.truetype(Path(found.origin).parent / "mpl-data/fonts/ttf" / f"{name}.ttf", size)


class Maker:
    """Makes one sample with a random generator."""

    def __init__(self, split: str, rng: np.random.Generator, things: list[Thing]):
        self.split, self.rng, self.things = split, rng, things

    def make(self, kind: str) -> Sample:
        layout, picture, caption = getattr(self, f"{kind}_picture")()
        turns: dict[tuple, Turn] = {}
        while len(turns) < TURNS:
            name = str(self.rng.choice(list(ASKED[kind]), p=list(ASKED[kind].values())))
            for _ in range(ATTEMPTS):
                about, turn = getattr(self, f"ask_{name}")(layout) or (None, None)
                if turn is not None and about not in turns and self.balanced(turn, turns.values()):
                    turns[about] = turn
                    break
        return Sample(kind, picture, caption, list(turns.values()), layout)

    def balanced(self, turn: Turn, others: Iterable[Turn]) -> bool:
        """Whether a sample's answers of a kind stay about as often Yes as No with one more turn."""
        sign = {"Yes": 1, "No": -1}
        before = sum(sign.get(other.answer, 0) for other in others if other.kind == turn.kind)
        return turn.answer not in sign or abs(before + sign[turn.answer]) <= 1

    # Small choices.

    def one_of(self, options):
        return options[int(self.rng.integers(len(options)))]

    def yes(self, share: float = 0.5) -> bool:
        return bool(self.rng.random() < share)

    def phrase(self, form: str, **given: str) -> str:
        text = self.one_of(phrasings(form, self.split != "train")).format(**given)
        return text[0].upper() + text[1:]

    def turn(self, kind: str, form: str, answer: str | bool, about=None, **given: str):
        answer = {True: "Yes", False: "No"}.get(answer, answer)
        return (kind, form, about), Turn(kind, self.phrase(form, **given), answer)

    def background(self, white: bool) -> tuple[int, int, int]:
        """White or a pale colour; a stronger one behind things that are white themselves."""
        if not white and self.yes(0.35):
            return (255, 255, 255)
        low = 150 if white else 205
        return tuple(int(value) for value in self.rng.integers(low, 225 if white else 256, 3))

    def paste(self, picture: Image.Image, thing: Thing, artist: str, size: int, centre: tuple[float, float]):
        """Draws a thing, turned round or not, within the picture. Returns its box."""
        small = size <= 96
        drawn = drawing(thing.files[artist], 96) if small else drawing.__wrapped__(thing.files[artist], size)
        if small and size < 96:
            drawn = drawn.resize([max(1, round(side * size / 96)) for side in drawn.size], Image.Resampling.LANCZOS)
        if self.yes():
            drawn = drawn.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        left, top = (
            int(min(max(middle - side / 2, 2), SIZE - 2 - side))
            for middle, side in zip(centre, drawn.size, strict=True)
        )
        picture.paste(drawn, (left, top), drawn)
        return (left, top, left + drawn.width, top + drawn.height)

    # Pictures: the layout, the picture, the caption.

    def single_picture(self):
        if self.yes(0.5):  # things come up by category too, so that no category is most of what one sees
            kind = self.one_of(sorted({thing.category or "" for thing in self.things}))
            thing = self.one_of([thing for thing in self.things if (thing.category or "") == kind])
        else:
            thing = self.one_of(self.things)
        artist = self.one_of(artists(self.split))
        picture = Image.new("RGB", (SIZE, SIZE), self.background(thing.colours[artist] == "white"))
        size = int(self.rng.integers(100, 205))
        room = (SIZE - size) / 2
        centre = tuple(SIZE / 2 + self.rng.uniform(-room, room, 2))
        placed = Placed(thing, artist, 0, 0, 1, self.paste(picture, thing, artist, size, centre))
        return (placed,), picture, sentence([thing.one])

    def scene_picture(self):
        grid = 2 if self.yes(0.55) else 3
        chosen = self.scene_things(int(self.rng.integers(2, 5 if grid == 2 else 6)))
        same = self.one_of(artists(self.split)) if self.yes() else None
        hands = [same or self.one_of(artists(self.split)) for _ in chosen]
        white = any(thing.colours[artist] == "white" for thing, artist in zip(chosen, hands))
        picture, cell = Image.new("RGB", (SIZE, SIZE), self.background(white)), SIZE / grid
        placed = []
        for place, thing, artist in zip(self.rng.permutation(grid * grid)[: len(chosen)], chosen, hands):
            row, column = divmod(int(place), grid)
            size = int(self.rng.integers(int(0.68 * cell), int(0.92 * cell)))
            room = (cell - size) / 2
            centre = [(at + 0.5) * cell + self.rng.uniform(-room, room) for at in (column, row)]
            placed.append(Placed(thing, artist, row, column, grid, self.paste(picture, thing, artist, size, centre)))
        placed.sort(key=lambda found: (found.row, found.column))
        counts = Counter(found.thing for found in placed)
        named = [thing.one if count == 1 else f"{NUMBERS[count]} {thing.plural}" for thing, count in counts.items()]
        return tuple(placed), picture, sentence(named)

    def scene_things(self, count: int) -> list[Thing]:
        """Some of one category, some of any; one that has a plural is often there several times. No two could be mixed up."""
        chosen: list[Thing] = []
        category = self.one_of(list(COUNTED)) if self.yes(0.75) else None
        for attempt in range(200):
            fitting = self.things
            if category and attempt < 40 and self.yes(0.7):
                fitting = [thing for thing in self.things if thing.category == category] or self.things
            thing = self.one_of(fitting)
            if any(alike(thing.name, other.name) for other in chosen):
                continue
            times = int(self.rng.integers(2, count + 1)) if thing.plural and not chosen and self.yes(0.45) else 1
            chosen += [thing] * times
            if len(chosen) >= count:
                return chosen
        raise ValueError(
            f"{len(self.things)} things in the split {self.split}, too few that differ for a scene of {count}"
        )

    def sign_picture(self):
        known = words(self.split, WORDS)
        if self.yes(0.25):
            text = str(int(self.rng.integers(10, 10 ** int(self.rng.integers(2, 5)))))
        else:
            count = int(self.rng.choice([1, 2, 3], p=[0.4, 0.35, 0.25]))
            text = " ".join(str(word) for word in self.rng.choice(known, count, replace=False))
            text = self.one_of([text.upper(), text.upper(), text.lower(), text.title()])
        name = self.one_of(HELD_OUT_FONTS if self.split == "artist" else FONTS)
        colour = self.one_of(list(PAINTS))
        picture = Image.new("RGB", (SIZE, SIZE), self.background(False))
        draw = ImageDraw.Draw(picture)
        lines = text.split()
        size = next(
            size for size in range(int(self.rng.integers(30, 62)), 0, -1) if fits(lines, font(name, size), size)
        )
        step, letters = size * 1.3, font(name, size)
        width = max(letters.getlength(line) for line in lines)
        half_width, half_height = width / 2 + 14, step * len(lines) / 2 + 10
        x, y = (SIZE / 2 + self.rng.uniform(-1, 1) * max(0, SIZE / 2 - half - 4) for half in (half_width, half_height))
        box = (x - half_width, y - half_height, x + half_width, y + half_height)
        ink = (255, 255, 255) if np.dot(PAINTS[colour], (0.3, 0.59, 0.11)) < 150 else (15, 15, 15)
        draw.rounded_rectangle(box, 8, PAINTS[colour], ink, 2)
        for place, line in enumerate(lines):
            draw.text((x, y + step * (place - (len(lines) - 1) / 2)), line, ink, letters, anchor="mm")
        return (Sign(text, colour),), picture, f"A sign that says {text}."

    def chart_picture(self):
        count = int(self.rng.integers(3, 5))
        names = [str(name) for name in self.rng.choice(words(self.split, LABELS), count, replace=False)]
        colours = [str(name) for name in self.rng.choice(list(PAINTS), count, replace=False)]
        heights = self.rng.permutation(np.linspace(self.rng.integers(18, 60), self.rng.integers(120, 160), count))
        heights = heights + self.rng.uniform(-5, 5, count)
        picture = Image.new("RGB", (SIZE, SIZE), (255, 255, 255) if self.yes() else (243, 243, 238))
        draw, step, base = ImageDraw.Draw(picture), (SIZE - 24) / count, SIZE - 36
        letters = font(
            self.one_of(HELD_OUT_FONTS[:1] if self.split == "artist" else FONTS[:2]), 17 if count == 3 else 15
        )
        bars = []
        for place, (name, colour, height) in enumerate(zip(names, colours, heights)):
            middle, half = 12 + step * (place + 0.5), step * 0.32
            draw.rectangle((middle - half, base - int(height), middle + half, base), PAINTS[colour])
            draw.text((middle, base + 16), name, (20, 20, 20), letters, anchor="mm")
            bars.append(Bar(name, colour, int(height)))
        draw.line((8, base, SIZE - 8, base), (20, 20, 20), 2)
        return tuple(bars), picture, f"A bar chart with {NUMBERS[count]} bars."

    # Questions: what is asked about and the turn; None where the layout allows none.

    def ask_name(self, layout):
        return self.turn("name", "name", layout[0].thing.name)

    def ask_category(self, layout):
        found = self.one_of(layout)
        if found.thing.category is None:
            return None
        if len(layout) == 1:
            return self.turn("category", "category", found.thing.category)
        return self.turn("category", "category at", found.thing.category, found.place, place=found.place)

    def ask_colour(self, layout):
        if isinstance(layout[0], Sign):
            return self.turn("colour", "sign colour", layout[0].colour)
        found = self.one_of(layout)
        colours = {other.colour for other in layout if other.thing == found.thing}
        called = self.called(layout, found, several=True)
        if len(colours) > 1 or found.colour is None or found.colour in called:
            return None
        if len(layout) == 1:
            return self.turn("colour", "colour of it", found.colour)
        several = sum(other.thing == found.thing for other in layout) > 1
        name, verb = (found.thing.plural, "are") if several else (called, found.thing.verb)
        return self.turn("colour", "colour", found.colour, found.thing.name, thing=name, verb=verb)

    def ask_count(self, layout):
        if isinstance(layout[0], Sign):
            count = len(layout[0].text.split())
            return None if layout[0].text.isdigit() else self.turn("count", "count", NUMBERS[count], things="words")
        found, draw = self.one_of(layout), self.rng.random()
        category = found.thing.category
        if draw < 0.2:
            return self.turn("count", "count", NUMBERS[len(layout)], "things", things="things")
        if draw < 0.6 and category in COUNTED and unmistakable(layout, category):
            count = sum(other.thing.category == category for other in layout)
            return self.turn("count", "count", NUMBERS[count], category, things=COUNTED[category])
        count = sum(other.thing == found.thing for other in layout)
        if found.thing.plural is None or (count == 1 and self.yes(0.7)):
            return None
        return self.turn("count", "count", NUMBERS[count], found.thing.name, things=found.thing.plural)

    def called(self, layout, found: Placed, several: bool = False) -> str | None:
        """What tells a thing of a scene from the others: its category where that is enough, or its name. None if there are
        several of it."""
        if not several and sum(other.thing == found.thing for other in layout) > 1:
            return None
        category = found.thing.category
        alone = category in COUNTED and unmistakable(layout, category)
        alone = alone and sum(other.thing.category == category for other in layout) == 1
        return category if alone and self.yes(0.8 if self.split == "unseen" else 0.25) else found.thing.name

    def ask_position(self, layout):
        found = self.one_of(layout)
        if self.yes(0.4):
            return self.turn("position", "what at", found.thing.name, ("at", found.place), place=found.place)
        name = self.called(layout, found)
        if name is None:
            return None
        verb = "is" if name == found.thing.category else found.thing.verb
        return self.turn("position", "where", found.place, found.thing.name, thing=name, verb=verb)

    def ask_relation(self, layout):
        found, side = self.one_of(layout), self.one_of(list(SIDES))
        name = self.called(layout, found)
        if name is None:
            return None
        ahead = [other for other in layout if beyond(other, found, side)]
        if self.yes(0.45):
            other = ahead[0] if len(ahead) == 1 else None
            if other is None or (other.column != found.column if SIDES[side][0] else other.row != found.row):
                return None
            return self.turn(
                "relation", "what beside", other.thing.name, (side, found.thing.name), side=side, thing=name
            )
        answer = self.yes()
        against = next(name for name, step in SIDES.items() if step == tuple(-part for part in SIDES[side]))
        fitting = [other for other in layout if beyond(other, found, side if answer else against)]
        other = self.one_of(fitting) if fitting else None
        subject = self.called(layout, other) if other else None
        if subject is None:
            return None
        verb = "is" if subject == other.thing.category else other.thing.verb
        about = (side, *sorted((other.thing.name, found.thing.name)))
        given = {"one": subject, "other": name, "side": side, "verb": verb, "Verb": verb.title()}
        return self.turn("relation", "is beside", answer, about, **given)

    def ask_presence(self, layout):
        answer, found = self.yes(), self.one_of(layout).thing
        if self.yes(0.3):
            category = found.category if answer else self.one_of(list(COUNTED))
            there = any(other.thing.category == category for other in layout)
            if category not in COUNTED or there != answer or not (there or unmistakable(layout, category)):
                return None
            one = f"{'an' if category[0] in 'aeiou' else 'a'} {category}"
            return self.turn("presence", "presence", answer, category, one=one)
        if answer:
            return self.turn("presence", "presence", True, found.name, one=found.one)
        hard = [thing for thing in self.things if thing.category == found.category] if self.yes(0.6) else self.things
        absent = self.one_of(hard)
        if any(alike(absent.name, other.thing.name) for other in layout):
            return None
        return self.turn("presence", "presence", False, absent.name, one=absent.one)

    def ask_reading(self, layout):
        text, draw = layout[0].text, self.rng.random()
        parts = text.split()
        if draw < 0.45:
            return self.turn("reading", "sign", text)
        if draw < 0.8 and len(parts) > 1:
            place = int(self.rng.integers(len(parts)))
            return self.turn("reading", "word", parts[place], place, nth=("first", "second", "third")[place])
        answer = self.yes()
        if not answer and text.isdigit():
            other = str(int(self.rng.integers(10 ** (len(text) - 1), 10 ** len(text))))
        elif not answer:
            place, other = int(self.rng.integers(len(parts))), self.one_of(words(self.split, WORDS))
            changed = other.upper() if text.isupper() else other.lower() if text.islower() else other.title()
            other = " ".join(changed if index == place else part for index, part in enumerate(parts))
        if not answer and other == text:
            return None
        said = text if answer else other
        return self.turn("reading", "says", answer, said, text=said)

    def ask_chart(self, layout):
        form = self.one_of(["which bar", "bar colour", "named bar", "taller", "count"])
        ordered = sorted(layout, key=lambda bar: bar.height)
        most = self.one_of(["tallest", "shortest"])
        if form in ("which bar", "bar colour"):
            bar = ordered[-1 if most == "tallest" else 0]
            return self.turn("chart", form, bar.name if form == "which bar" else bar.colour, most, most=most)
        if form == "count":
            return self.turn("chart", "count", NUMBERS[len(layout)], things="bars")
        first, second = (layout[place] for place in self.rng.choice(len(layout), 2, replace=False))
        if form == "named bar":
            return self.turn("chart", form, first.colour, first.name, name=first.name)
        about = tuple(sorted((first.name, second.name)))
        return self.turn("chart", form, first.height > second.height, about, one=first.name, other=second.name)


def sentence(named: list[str]) -> str:
    """A dog, a cat and two apples."""
    text = named[0] if len(named) == 1 else f"{', '.join(named[:-1])} and {named[-1]}"
    return f"{text[0].upper()}{text[1:]}."


def fits(lines: list[str], letters, size: int) -> bool:
    return max(letters.getlength(line) for line in lines) <= SIZE - 44 and 1.3 * size * len(lines) <= SIZE - 44


def beyond(one: Placed, other: Placed, side: str) -> bool:
    """Whether one drawing is on a side of another, in any row or column."""
    down, right = SIDES[side]
    return (one.row - other.row) * down + (one.column - other.column) * right > 0


def unmistakable(layout: Iterable[Placed], category: str) -> bool:
    """Whether everybody would agree which things of a scene belong to a category."""
    doubtful = OVERLAPS[category] | {None}
    return all(found.thing.category not in doubtful for found in layout)
