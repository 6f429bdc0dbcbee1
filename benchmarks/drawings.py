# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of some six hundred things, each drawn by four artists, from packages of npm. None is in this repository.

    python benchmarks/drawings.py FOLDER        installs them, 160 MB to load, 33 MB on disk

    artist     drawn how                              licence of the pictures
    noto       shaded, Google's Noto Emoji            Apache 2.0
    openmoji   black outlines, flat, OpenMoji         CC BY-SA 4.0
    fluent     rendered in 3D, Microsoft's Fluent     MIT
    twemoji    flat, without outlines, Twemoji        CC BY 4.0

The names and categories in `drawings.txt` are this project's. Twemoji is held out: its manner is none of the other three's
(no outline, no shading), while its things have the same shapes, so what is tested is a new hand and not a harder picture.
"""

import argparse
import base64
import colorsys
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image
from svg_drawing import draw_svg


HELD_OUT = "twemoji"
UNSEEN = 0.15  # of the things of each category
SIZE = 200  # pixels, of the pictures that are drawn from SVG
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey")
COVERED = 0.6  # of a picture's opaque pixels, by the colour that one would name
HUES = {
    "red": (345, 371),
    "orange": (18, 37),
    "yellow": (44, 63),
    "green": (68, 165),
    "blue": (187, 245),
    "purple": (255, 290),
}
HUES |= {"pink": (300, 340)}  # degrees; what lies between two of them could be called either
LIST = Path(__file__).with_suffix(".txt")
DONE = "things.json"


@dataclass(frozen=True)
class Package:
    """A package of npm: its name, version and checksum, and where its pictures are."""

    name: str
    version: str
    sha512: str  # base64, as npm writes it
    pictures: str
    suffix: str
    notice: str


PACKAGES = {
    "noto": Package(
        "emoji-datasource-google",
        "16.0.0",
        "ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        "package/img/google/64/",
        ".png",
        "Noto Emoji, copyright Google, Apache License 2.0",
    ),
    "openmoji": Package(
        "openmoji",
        "17.0.0",
        "EBnYrNGdcdw+OSXmENeNE1yBNRu6tOraTmoOyUbJkTmvT/+XETp8RZLSJFzD3lrPc5N9CzsyPnRTk0Vp4UaI9w==",
        "package/color/svg/",
        ".svg",
        "OpenMoji, the open-source emoji and icon project, CC BY-SA 4.0",
    ),
    "fluent": Package(
        "@lobehub/fluent-emoji-3d",
        "1.1.0",
        "Wlq2lVStTnr8BDpIJ0pEnTKO4LuDxxqTEhTvRtD1DLRF0me7ogeRQjKoehDHXuVJ2Qaecgl5wRBv60lUAG3h7g==",
        "package/assets/",
        ".webp",
        "Fluent Emoji, copyright Microsoft, MIT licence",
    ),
    "twemoji": Package(
        "emoji-datasource-twitter",
        "16.0.0",
        "7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        "package/img/twitter/64/",
        ".png",
        "Twemoji, copyright Twitter and contributors, CC BY 4.0",
    ),
}
ARTISTS = tuple(PACKAGES)


@dataclass(frozen=True)
class Thing:
    """Something that all artists drew.

    Attributes:
        code: its code point, in hexadecimal.
        name: what one calls it, in lower case; no two things share one.
        article: "a" or "an"; "" before a name that takes none, "grapes".
        plural: what one calls several; None: no scene shows several.
        category: what a child would call its kind, "animal"; None if nobody would.
        colours: artist -> the one of `COLOURS` that this artist's picture has nearly everywhere; None if one cannot say.
        files: artist -> picture, a PNG with transparency.
    """

    code: str
    name: str
    article: str
    plural: str | None
    category: str | None
    colours: dict[str, str | None]
    files: dict[str, Path]

    def __hash__(self) -> int:
        return hash(self.code)

    @property
    def one(self) -> str:
        """The name with its article."""
        return f"{self.article} {self.name}".strip()

    @property
    def verb(self) -> str:
        return "are" if not self.article and self.name.endswith("s") else "is"


@lru_cache
def listed() -> tuple[tuple[tuple[str, str, str, str], ...], dict[str, frozenset[str]]]:
    """What `drawings.txt` holds: (code, name, its mark, category) of each thing, and name -> the names of the
    things that it could be taken for."""
    things, alike = [], defaultdict(set)
    for line in LIST.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") or not line:
            continue
        kind, _, rest = line.partition(": ")
        if kind == "alike":
            for group in rest.split("; "):
                names = group.split(", ")
                for name in names:
                    alike[name].update(other for other in names if other != name)
        else:
            for entry in rest.split(", "):
                code, _, name = entry.partition(" ")
                bare = name.rstrip("*~")
                things.append((code, bare, name[len(bare) :], kind))
    return tuple(things), {name: frozenset(others) for name, others in alike.items()}


def plural(name: str) -> str:
    """Several of what has a regular plural."""
    if name.endswith("man"):
        return name[:-2] + "en"
    if name.endswith(("s", "x", "ch", "sh", "potato", "tomato", "mango", "volcano")):
        return name + "es"
    if name.endswith("y") and name[-2] not in "aeiou":
        return name[:-1] + "ies"
    return name + "s"


def install(folder: str | os.PathLike) -> None:
    """Makes `folder` with every artist's picture of every listed thing. Does nothing if it is there.

    Raises:
        FileExistsError: the folder is there and is not one that this function made from today's list.
        OSError: npm is missing or cannot load a package.
        ValueError: a package is not the one whose checksum stands above.
    """
    folder = Path(folder).expanduser().absolute()
    wanted = {
        "list": hashlib.sha256(LIST.read_bytes()).hexdigest(),
        "packages": {a: p.sha512 for a, p in PACKAGES.items()},
    }
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        made = json.loads((folder / DONE).read_text()) if (folder / DONE).is_file() else {}
        if {name: made.get(name) for name in wanted} != wanted:
            raise FileExistsError(f"{folder} does not hold these drawings: remove it, or name another folder.")
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as work:
        made = Path(work) / "made"
        for artist, package in PACKAGES.items():
            unpack(loaded(package, Path(work)), artist, package, made / artist)
        colours = {
            code: {artist: colour_of(made / artist / f"{code}.png") for artist in ARTISTS} for code, *_ in listed()[0]
        }
        (made / DONE).write_text(json.dumps(wanted | {"colours": colours}))
        (made / "LICENCES.txt").write_text("".join(f"{a}: {p.notice} (npm {p.name})\n" for a, p in PACKAGES.items()))
        if folder.is_dir():
            folder.rmdir()  # empty
        os.rename(made, folder)


def loaded(package: Package, folder: Path) -> Path:
    """Loads a package with npm, from the registry that the user has set up, and compares its checksum."""
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError("The drawings come from packages of npm, which is not installed: install Node.js.")
    name = f"{package.name}@{package.version}"
    command = [npm, "pack", name, "--silent", "--ignore-scripts", "--pack-destination", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    if done.returncode:
        reason = next((line for line in (done.stderr + done.stdout).splitlines() if line.strip()), "no reason given")
        raise OSError(f"npm could not load {name}: {reason}. Check the network and npm's registry setting.")
    path = folder / done.stdout.strip().splitlines()[-1]
    found = base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise ValueError(
            f"{name} has the checksum sha512-{found}, expected sha512-{package.sha512}: nothing was unpacked."
        )
    return path


def unpack(path: Path, artist: str, package: Package, folder: Path) -> None:
    """Writes an artist's pictures of the listed things as PNG files, {code}.png."""
    folder.mkdir(parents=True)
    wanted = {code for code, *_ in listed()[0]}
    with tarfile.open(path) as archive:
        for member in archive:
            place, _, name = member.name.rpartition("/")
            code = name.removesuffix(package.suffix).lower().removesuffix("-fe0f")
            if f"{place}/" != package.pictures or code not in wanted or not member.isfile():
                continue
            content = archive.extractfile(member).read()
            if package.suffix == ".svg":
                picture = draw_svg(content.decode(), SIZE)
            else:
                picture = Image.open(io.BytesIO(content)).convert("RGBA")
                picture.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
            picture.save(folder / f"{code}.png")
            wanted.discard(code)
    if wanted:
        raise ValueError(f"{package.name}@{package.version} has no picture of {', '.join(sorted(wanted))}.")


def read(folder: str | os.PathLike) -> list[Thing]:
    """The things in a folder that `install` made, in the order of the list.

    Raises:
        FileNotFoundError: `install` has not made it.
    """
    folder = Path(folder).expanduser()
    if not (folder / DONE).is_file():
        raise FileNotFoundError(f"{folder} has no drawings: run python benchmarks/drawings.py {folder}")
    things, colours = [], json.loads((folder / DONE).read_text())["colours"]
    for code, name, mark, category in listed()[0]:
        vowel = name == "hourglass" or (name[0] in "aeiou" and name != "unicorn")
        article = "" if mark == "~" else "an" if vowel else "a"
        files = {artist: folder / artist / f"{code}.png" for artist in ARTISTS}
        several, kind = None if mark else plural(name), None if category == "other" else category
        things.append(Thing(code, name, article, several, kind, colours[code], files))
    return things


def is_unseen(things: Iterable[Thing]) -> dict[str, bool]:
    """name -> whether a thing is kept from training: `UNSEEN` of each category, chosen by a hash of the names among those
    that are no part of another name."""
    parts = Counter(word for thing in things for word in set(thing.name.split())) + Counter(COLOURS)
    by_category = defaultdict(list)
    for thing in things:
        by_category[thing.category].append(thing.name)
    unseen = {}
    for names in by_category.values():
        free = [name for name in names if parts[name] < 2]
        free.sort(key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        chosen = set(free[: round(UNSEEN * len(names))])
        unseen |= {name: name in chosen for name in names}
    return unseen


def named_colour(red: int, green: int, blue: int) -> str | None:
    """The one of `COLOURS` that a colour would be called; None if people would not agree."""
    red, green, blue = red / 255, green / 255, blue / 255
    hue, light, _ = colorsys.rgb_to_hls(red, green, blue)
    hue, value, strength = hue * 360, max(red, green, blue), max(red, green, blue) - min(red, green, blue)
    if light < 0.16 or (light < 0.3 and strength < 0.1):
        return "black"
    if strength < 0.1:
        return "white" if light > 0.9 else "grey" if 0.35 < light < 0.8 else None
    if strength < 0.25 or (light < 0.25 and value < 0.35):
        return None
    if 8 < hue < 42 and value < 0.84:
        return "brown" if value < 0.76 else None
    if 40 < hue <= 44 and light > 0.6:
        return "yellow"  # FFCC4D, but not F1B31C, which is amber
    name = next((name for name, (start, end) in HUES.items() if start <= hue < end or start <= hue + 360 < end), None)
    return ("pink" if light > 0.76 else None) if name == "red" and light > 0.68 else name


def colour_of(path: Path) -> str | None:
    """The colour that covers `COVERED` of a picture's opaque pixels, three times as many as any other; None if none does.
    Black that covers less than a third is taken for outlines and not counted."""
    picture = np.asarray(Image.open(path).convert("RGBA").resize((48, 48), Image.Resampling.BOX))
    opaque = picture[picture[..., 3] > 200][:, :3]
    counts = Counter(named_colour(*pixel) for pixel in opaque.tolist())
    if counts["black"] * 3 < len(opaque):
        del counts["black"]
    total = sum(counts.values())
    (name, most), *others = [*counts.most_common(2), (None, 0)]
    return name if most >= COVERED * total and most >= 3 * others[0][1] else None


def main(given=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(given).folder
    try:
        install(folder)
    except (OSError, ValueError) as error:
        raise SystemExit(f"drawings: {error}") from None
    things = read(folder)
    print(f"{len(things)} things by {len(ARTISTS)} artists in {folder}.")


if __name__ == "__main__":
    main()
