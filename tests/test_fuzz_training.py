"""Malformed training data and options in great number: each is read right, or refused with an error that names file and
sample, or option; within bounds of time and memory."""

import copy
import json
import logging
import os
import random
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import unclear
from training_parts import TOKENS, conversation, picture, processor_for

from saisa_hf.training import (
    BadSample,
    ConversationDataset,
    ConversationEncoder,
    SaisaCollator,
    Source,
    StreamedConversations,
    TrainingOptions,
    load_options,
    open_source,
)
from saisa_hf.training.check import describe


def deep(levels, kind=list):
    value = "x"
    for _ in range(levels):
        value = [value] if kind is list else {"type": value}
    return value


class Odd:
    """What another library may put into a record."""

    def __repr__(self):
        raise RuntimeError("no text")


VALUES = [
    None, True, False, 0, -1, 1.5, float("nan"), float("inf"), 10**5000, "", " ", "\ud800", "\0", "a\0b", "x" * 100_000,
    b"bytes",
    [], {}, [[]], [None], ["human"], {"a": 1}, (), ("human", "gpt"), {1, 2}, deep(900), deep(900, dict), deep(50_000),
    Odd(), np.arange(3), np.float32(1), torch.ones(2), range(3), "human", "assistant", "<image>", "<image>" * 50, "</s>",
    "{{ 1 }}",
    "{% raise %}", "data:image/png;base64,AAAA", "QUJD", "..", "/", "/dev/zero", "/etc/passwd", "a.png", "../a.png", ".",
    "fifo",
    "folder", "text.png", "empty.png", "x" * 5000 + ".png", "file:///etc/passwd", "C:\\a.png", "ftp://a/b.png", {"url": 5},
    {"url": None}, {"bytes": "x"}, {"bytes": [1]}, {"bytes": b""}, {"path": 5},
    {"path": None, "bytes": None}, {"type": "image"}, {"type": "text"}, {"type": "text", "text": None}, {"type": ["image"]},
    {"type": "audio", "audio": "a.wav"},
    [{"type": "image"}], [{"type": "image", "image": {"url": ["a"]}}], [{"type": "image_url"}],
    [{"type": "text", "text": "<image>"}],
]  # fmt: skip


def goods(folder):
    """A good record of each form, with an image each but for the last."""
    image = str(folder / "a.png")
    parts = [{"type": "image", "path": image}, {"type": "text", "text": "A?"}]
    ask, answer = {"role": "user", "content": parts}, {"role": "assistant", "content": "B."}
    return [
        {"id": "7", **conversation("<image>\nA?", "B.", "C?", "D.", image=image)},
        {"messages": [ask, answer]},
        {"messages": [{"role": "system", "content": "S."}, {"role": "user", "content": "<image>A?"}, answer],
         "images": [image]},
        {"image": image, "caption": "B."},
        conversation("A?", "B."),
    ]  # fmt: skip


def places(value, path=()):
    """The paths of all values inside of `value`."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from places(inner, (*path, key))


def changed(record, path, value):
    """A copy of `record` with `value` at `path`; ... removes what is there."""
    if not path:
        return value
    record = copy.deepcopy(record)
    inner = record
    for key in path[:-1]:
        inner = inner[key]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return record


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, and what has the name of one."""
    folder = tmp_path_factory.mktemp("images")
    picture(90).save(folder / "a.png")
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo")
    return folder


@pytest.fixture(scope="module")
def encoder():
    return ConversationEncoder(processor_for(), max_length=2000)


@pytest.fixture(autouse=True)
def few_words():
    """Without the warnings about what is left out."""
    logger = logging.getLogger("saisa_hf.training.dataset")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(before)


def check_item(item, encoder):
    """An encoded sample is one that a batch can be made of, with something to learn."""
    ids, labels = item["input_ids"], item["labels"]
    visual = sum(token == encoder.processor.image_token_id for token in ids)
    assert len(ids) == len(labels) <= 2000 and visual == TOKENS * len(item.get("pixel_values", ()))
    assert any(label != -100 for label in labels) and all(label in (-100, token) for token, label in zip(ids, labels))
    assert SaisaCollator(encoder)([item])["input_ids"].shape == (1, len(ids))
    "\n".join(describe(item, encoder.processor)).encode()


def record_cases(folder, encoder, count, seed=0):
    """Records with a value replaced or removed, alone and before a good one."""
    generator, records = random.Random(seed), goods(folder)
    chosen = []
    for record in records:
        chosen += [
            (record, path, value) for path in places(record) for value in (*VALUES, ...) if path or value is not ...
        ]
    for index, (record, path, value) in enumerate(generator.sample(chosen, min(count, len(chosen)))):
        wrong = changed(record, path, value)

        def call(wrong=wrong, good=record):
            strict = ConversationDataset([Source([wrong], "q.json", str(folder))], encoder)
            assert len(strict.lengths(TOKENS)) == 1
            lenient = ConversationDataset([Source([wrong, good], "q.json", str(folder))], encoder, bad_samples="skip")
            check_item(lenient[0], encoder)
            assert lenient[0]["sample_index"] == (1 if lenient.skipped else 0)
            stream = StreamedConversations([Source([wrong, good], "q.json", str(folder))], encoder, bad_samples="skip")
            check_item(next(iter(stream)), encoder)
            check_item(strict[0], encoder)

        kind = type(value).__name__ if value is not ... else "removed"
        yield f"{index}: {kind} at {path} of {list(record)}", call


def names_sample(case, error):
    text = str(error)
    text.encode()  # can be printed
    return bool(re.match(r"q\.json, sample 0\b", text)) and len(text) < 1500 and "\n" not in text.strip()[:100]


def test_some_malformed_records_are_read_right_or_named(folder, encoder):
    wrong, right, refused = unclear(record_cases(folder, encoder, 150), (BadSample,), names_sample)
    assert not wrong
    assert right > 10 and refused > 50


@pytest.mark.slow
def test_malformed_records_are_read_right_or_named(folder, encoder):
    wrong, right, refused = unclear(record_cases(folder, encoder, 2500, seed=1), (BadSample,), names_sample)
    assert not wrong, len(wrong)
    assert right > 200 and refused > 1000


# --- files ---

BYTES = [
    b"\0",
    b"\xff",
    b"\xc3",
    b"\xed\xa0\x80",
    b"{",
    b"}",
    b"[",
    b"]",
    b'"',
    b",",
    b"\\",
    b"\\u12",
    b"\r",
    b"\n",
    b"9" * 5000,
]
BYTES += [
    b"-",
    b"NaN",
    b"Infinity",
    b"null",
    b"1e999",
    b"[" * 200_000,
    b'{"a":' * 100_000,
    b"\xe2\x80\xa8",
    b"\xef\xbb\xbf",
    b"/*",
]


def whole_files(good):
    """Contents by name: (of .json, of .jsonl; whether they are right)."""
    text = json.dumps(good)
    lines = "\n".join(map(json.dumps, good))
    cases = {"good": (text, lines, True), "empty": ("", "", False), "blank": (" \n\t", "\n \n", False)}
    for encoding in ("utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7", "cp037"):
        right = encoding in ("utf-8-sig", "utf-7")
        cases[encoding] = (text.encode(encoding), lines.encode(encoding), right)
    cases["latin-1"] = tuple(part.replace("B.", "\xe9").encode("latin-1") for part in (text, lines))
    cases["latin-1"] += (False,)
    cases["CRLF"] = (text.replace(", ", ",\r\n"), lines.replace("\n", "\r\n") + "\r\n", True)
    for name, value in {
        "one object": "{}", "null": "null", "number": "5", "text": '"a"', "true": "true", "no samples": "[]", "lists": "[[]]",
        "huge number": "[" + "9" * 5000 + "]", "deep": "[" * 100_000, "deep and closed": "[" * 100_000 + "]" * 100_000,

        "deep, read": "[" * 500 + "]" * 500, "comment": "// a\n[]", "trailing comma": "[1,]", "two values": "[] []",
        "YAML": "- a: b",
    }.items():  # fmt: skip
        cases[name] = (value, value, False)
    cases["a line that is broken"] = (lines, lines + '\n{"a": ', False)
    cases["the other format"] = (lines, text, False)
    return cases


def file_cases(folder, encoder, count, seed=0):
    good, generator = goods(folder), random.Random(seed)
    files = []
    for name, (whole, lines, right) in whole_files(good).items():
        for suffix, content in ((".json", whole), (".jsonl", lines)):
            files.append((name, suffix, content if isinstance(content, bytes) else content.encode(), right))
    for number in range(count):
        suffix = (".json", ".jsonl")[number % 2]
        content = (json.dumps(good) if number % 2 == 0 else "\n".join(map(json.dumps, good))).encode()
        start, length = generator.randrange(len(content)), generator.choice((0, 1, 5, len(content)))
        content = content[:start] + generator.choice(BYTES) + content[start + length :]
        files.append((f"change {number}", suffix, content, None))
    for index, (name, suffix, content, right) in enumerate(files):

        def call(path=folder / f"{index}-data{suffix}", content=content, right=right):
            path.write_bytes(content)
            source = open_source(str(path))
            dataset = ConversationDataset([source], encoder)
            samples = [check_item(dataset[i], encoder) for i in range(len(dataset))]
            assert right is not False and (right is None or len(samples) == len(good))

        yield f"{index}: {name}{suffix}", call


def names_file(case, error):
    text, number = str(error), case.partition(":")[0]
    text.encode()
    return re.search(rf"/{number}-data\.jsonl?(, | |:)", text) is not None and len(text) < 1500 and "\n" not in text


def test_some_damaged_files_are_read_right_or_named(folder, encoder):
    wrong, right, refused = unclear(file_cases(folder, encoder, 40), (ValueError, BadSample), names_file)
    assert not wrong
    assert right > 5 and refused > 40


@pytest.mark.slow
def test_damaged_files_are_read_right_or_named(folder, encoder):
    wrong, right, refused = unclear(file_cases(folder, encoder, 1000, seed=1), (ValueError, BadSample), names_file)
    assert not wrong, len(wrong)
    assert right > 20 and refused > 500


@pytest.mark.slow
def test_damaged_parquet_files_and_image_folders_are_named(folder, encoder, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    datasets.Dataset.from_list([{"image": str(folder / "a.png"), "caption": f"{i}."} for i in range(9)]).to_parquet(
        str(tmp_path / "good.parquet")
    )
    good, generator = (tmp_path / "good.parquet").read_bytes(), random.Random(0)

    def cases():
        for number in range(60):
            content, start = bytearray(good), generator.randrange(len(good))
            if number % 3:
                content[start : start + 8] = generator.randbytes(8)
            else:
                del content[start : start + generator.choice((1, 100, len(good)))]

            def call(path=tmp_path / f"{number}-data.parquet", content=bytes(content), streaming=number % 2 == 0):
                path.write_bytes(content)
                if streaming:
                    items = iter(StreamedConversations([open_source(str(path), streaming=True)], encoder))
                    for _ in range(9):
                        check_item(next(items), encoder)
                else:
                    dataset = ConversationDataset([open_source(str(path))], encoder)
                    for index in range(len(dataset)):
                        check_item(dataset[index], encoder)

            yield f"{number}: a parquet file", call
        for number, metadata in enumerate(("", "{", '{"file_name": "none.png", "text": "a"}', '{"text": "a"}', "\xff")):
            place = tmp_path / f"{100 + number}-data.folder"
            place.mkdir()
            picture().save(place / "0.png")
            (place / "metadata.jsonl").write_text(metadata, encoding="latin-1")
            yield (
                f"{100 + number}: a folder",
                lambda place=place: check_item(ConversationDataset([open_source(str(place))], encoder)[0], encoder),
            )

    def names(case, error):
        number, text = case.partition(":")[0], str(error)
        return re.search(rf"/{number}-data\.\w+(, | |:)", text) is not None and len(text) < 1500 and "\n" not in text

    wrong, _, refused = unclear(cases(), (ValueError, OSError, BadSample), names, seconds=60, megabytes=2000)
    assert not wrong, len(wrong)
    assert refused > 20


# --- options ---

GIVEN = {"model": "m", "data": "d.json", "output": "o"}
NUMBERS = [10**300, -(10**20), 2**63, "1e400", "nan", "1" * 5000]


def option_cases():
    for name in TrainingOptions.__dataclass_fields__:
        for index, value in enumerate([*VALUES, *NUMBERS]):

            def call(name=name, value=value):
                made = TrainingOptions(**GIVEN | {name: value})
                assert type(getattr(made, name)) in (bool, int, float, str, list)
                if name == "workers":
                    assert 0 <= made.workers <= 256

            yield f"{name} {index}", call


def names_option(case, error):
    text = str(error)
    text.encode()
    # epochs and max_steps are named together
    return re.match(rf"{case.split()[0]}\b|max_steps=0 with .*epochs=", text) is not None and len(text) < 500


def test_malformed_options_are_named(tmp_path):
    wrong, right, refused = unclear(option_cases(), (ValueError,), names_option)
    assert not wrong, len(wrong)
    assert right > 200 and refused > 1000


YAML = [
    b"", b"- a", b"a", b"{", b"\0", b"\xff\xfe", b"a: b: c", b"? [a]\n: b", b"1: 2", b"null: 1", b"? {a: b}\n: c",
    b"!!python/object:os.x {}",
    b"model: &a [*a]", b"a: &a [x]\nb: *c", b"seed: " + b"9" * 5000, b"seed: 0x" + b"f" * 5000, b"[" * 500,
    b"data: 2020-99-99",
    b"seed: 1:2:3", b"model: !!binary x", b"--- a\n--- b", b"\xef\xbb\xbfmodel: 5", "model: \xe9".encode("latin-1"),
    b"a: \t- b", b"%YAML 9",
    b"data: \n" + b"".join(b"  - &a%d [" % i + b"*a%d, " % (i - 1) * 9 * (i > 0) + b"x]\n" for i in range(12)),
    b"<<: 5", b"<<: [a]",
    b"model: \"\\ud800\"", b"model: \"\\x\"", b"seed: .nan", b"seed: .inf", b"workers: 1_000_000",
    b"split: 2001-12-14t21:59:43.10-05:00",
]  # fmt: skip


def test_malformed_yaml_is_named(tmp_path):
    def cases():
        for index, content in enumerate(YAML):
            path = tmp_path / f"{index}.yaml"
            path.write_bytes(content)
            yield str(path), lambda path=path: load_options(path, dict(GIVEN))
            yield f"{path} alone", lambda path=path: load_options(path)

    def names(case, error):
        text = str(error)
        text.encode()
        about = [case.split()[0], *(f"{name}" for name in TrainingOptions.__dataclass_fields__)]
        return any(text.startswith(name) for name in about) and len(text) < 1000

    wrong, right, refused = unclear(cases(), (ValueError,), names)
    assert not wrong, len(wrong)
    assert right and refused > len(YAML)
    assert load_options(Path(tmp_path / "0.yaml"), GIVEN).model == "m"
