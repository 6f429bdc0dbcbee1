"""Files of visual states that are damaged in every way that came to mind: each gives what it holds, or one ValueError that
names the file."""

import json
import os
import random
import struct

import pytest
import torch
from hostile import unclear
from tiny_models import BOS, IMAGE_TOKEN, tiny_model

from saisa_hf import SaisaVisualStates


DEEP, LONG = "[" * 100_000, "9" * 5_000
VALUES = [
    "", " ", "null", "true", "false", "0", "-1", "1", "2", "3", "4", "5", "1.0", "NaN", "Infinity", "-Infinity", "1e400",
    "10000000", "100000000", str(2**31), str(2**63), str(2**64), LONG, f"[{LONG}]", "-" + LONG, "[]", "[[]]", "{}", "[0]",
    "[1]", "[-1]", "[3]", "[4]", "[4, 4]", "[4, 4, 4]", "[4, 4, -4]", "[12]", "[0, 12]", "[4.0, 4, 4]", "[true, 4, 4]",
    '["4", 4, 4]', "[null]", "[4, 4, 10000000000]", "[100000000]", "[0, 1, 2]", "[0, 1, 3]", "[2, 1, 0]", "[0, 0, 0, 0]",
    '"abc"', "abc", "[4, 4", "4, 4]", "[" + "0, " * 20_000 + "0]", DEEP, '{"a":' * 100_000, "\x00", "\ud7ff", "0" * 64,
    "f" * 64, "F" * 64, "g" * 64, "0" * 63, "saisa visual states 2", "saisa visual states 1 ", "SAISA VISUAL STATES 1",
    "../../etc/passwd",
]  # fmt: skip
NUMBERS = (
    "F32",
    "F16",
    "BF16",
    "F64",
    "I32",
    "I64",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E8M0",
    "F4",
    "C64",
    "XX",
    "",
    None,
    7,
)


def pictures(n):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama", visual_layers=[0, 2])


@pytest.fixture(scope="module")
def files(model, tmp_path_factory):
    """Header and data of a file with three images in two of three layers, of one with features, and of one without the list
    of layers, as an earlier `save` wrote it."""
    folder, found = tmp_path_factory.mktemp("whole"), {}
    for store in ("keys_values", "features"):
        model.get_visual_states(pictures(3), store).save(folder / store)
        found[store] = parsed((folder / store).read_bytes())
    header, data = found["keys_values"]
    metadata = {name: x for name, x in header["__metadata__"].items() if name != "image_layers"}
    return found | {"earlier": ({**header, "__metadata__": metadata}, data)}


def parsed(content):
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def written(header, data):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def of_metadata(header, data):
    for name, before in header["__metadata__"].items():
        others = {key: x for key, x in header["__metadata__"].items() if key != name}
        yield f"without {name}", written({**header, "__metadata__": others}, data)
        for index, value in enumerate(VALUES):
            if value != before:
                yield f"{name} {index}", written({**header, "__metadata__": {**others, name: value}}, data)
        for value in (None, 1, [], {"a": "b"}):
            yield f"{name} is {value}", written({**header, "__metadata__": {**others, name: value}}, data)


def of_tensors(header, data):
    names = [name for name in header if name != "__metadata__"]
    for name in names:
        own, others = header[name], {key: x for key, x in header.items() if key != name}
        start, stop = own["data_offsets"]
        last = stop == len(data)
        yield f"without {name}", written(others, data[:start] if last else data)
        for other in ("keys.1", "values.9", "keys.00", "keys.-1", "keys.9" * 50, "keys", "features", "", "keys.\u0660"):
            yield f"{name} as {other[:9]}", written({**others, other: own}, data)
        for number in NUMBERS:
            yield f"{name} of {number}", written({**others, name: {**own, "dtype": number}}, data)
        for shape in (
            [],
            [12],
            [0, 4, 8],
            [4, 12, 8],
            [12, 32],
            [12, 4, 8, 1],
            [6, 8, 8],
            [-12, 4, 8],
            [2**63, 4],
            [1] * 300 + own["shape"],
        ):
            yield f"{name} in {shape[:4]}", written({**others, name: {**own, "shape": shape}}, data)
        for offsets in ([0, 0], [start, stop + 4], [stop, start], [-4, stop], [start + 1, stop + 1], [2**63, 2**64]):
            yield f"{name} at {offsets}", written({**others, name: {**own, "data_offsets": offsets}}, data)
        for number in (float("nan"), float("inf"), -float("inf")):
            at = random.Random(name).randrange(start, stop, 4)
            yield f"{name} with {number}", written(header, data[:at] + struct.pack("<f", number) + data[at + 4 :])
    extra = {"dtype": "F32", "shape": [12, 4, 8], "data_offsets": [len(data), len(data) + 12 * 4 * 8 * 4]}
    for name in ("keys.1", "keys.3", "values.0 ", "biases.0", "features", "keys.99999999999999999999"):
        if name not in header:
            yield f"and {name}", written({**header, name: extra}, data + bytes(12 * 4 * 8 * 4))
    empty = {
        f"keys.{index}": {"dtype": "F32", "shape": [0, 4, 8], "data_offsets": [len(data)] * 2}
        for index in range(20_000)
    }
    yield "and many empty ones", written({**empty, **header}, data)


def of_bytes(header, data, seed):
    content, generator = written(header, data), random.Random(seed)
    size = len(content) - len(data)
    for index in range(60):
        at = generator.randrange(size)
        yield f"byte {at}, {index}", content[:at] + bytes([generator.randrange(256)]) + content[at + 1 :]
    for index in range(30):
        at = generator.randrange(8, size)
        yield f"without byte {at}, {index}", content[:at] + content[at + generator.randrange(1, 5) :]
    for at in (
        0,
        1,
        7,
        8,
        9,
        size - 1,
        size,
        size + 1,
        len(content) - 1,
        *(generator.randrange(len(content)) for _ in range(12)),
    ):
        yield f"cut at {at}", content[:at]
    for more in (b"\0", b"{}", content):
        yield f"longer by {len(more)}", content + more
    for length in (0, 1, size - 9, size - 7, 2**31, 2**62, 2**64 - 1):
        yield f"header of {length}", struct.pack("<Q", length) + content[8:]
    yield "zeros", bytes(5000)
    yield "a pickle", b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
    yield "text", b"a picture of a cat\n" * 50


def damaged(files):
    for seed, (kind, (header, data)) in enumerate(files.items()):
        for damage in (of_metadata, of_tensors, lambda *given, seed=seed: of_bytes(*given, seed)):
            for name, content in damage(header, data):
                yield f"{kind}: {name}", content


def calls(model, path, every=1):
    """Loads and uses each, if a model would: what comes out is whole, and finite."""

    def call(content):
        path.write_bytes(content)
        states = SaisaVisualStates.load(path)
        assert sum(states.stored.lengths) == {len(x) for x in states.stored.tensors().values()}.pop()
        ids = torch.tensor([[BOS, *[IMAGE_TOKEN] * sum(states.lengths), 5]])
        if ids.shape[1] > 200:
            return
        try:
            with torch.no_grad():
                assert model(ids, visual_states=states).logits.isfinite().all()
        except ValueError as error:
            if "visual_states" not in str(error):
                raise AssertionError(str(error)) from error

    def of(content):
        return lambda: call(content)

    return lambda cases: ((name, of(content)) for name, content in cases[::every])


@pytest.mark.parametrize("every", [29, pytest.param(1, marks=pytest.mark.slow)])
def test_a_damaged_file_is_refused_by_its_name_or_holds_what_it_says(model, files, tmp_path, every):
    cases, path = list(damaged(files)), tmp_path / "album.states"
    assert len(cases) > 1000
    names = lambda case, error: str(path) in str(error) and len(str(error)) < 1000  # noqa: E731
    wrong, right, refused = unclear(calls(model, path, every)(cases), names=names, seconds=20)
    assert not wrong, f"{len(wrong)} of {len(cases)}: {wrong}"
    assert refused > 10 * right


def test_the_whole_ones_are_read(model, files, tmp_path):
    for kind, (header, data) in files.items():
        (tmp_path / kind).write_bytes(written(header, data))
        states = SaisaVisualStates.load(tmp_path / kind)
        expected = model.get_visual_states(pictures(3), states.store)
        assert states.num_layers == expected.num_layers and states.lengths == expected.lengths
        for name, x in expected.stored.tensors().items():
            assert torch.equal(states.stored.tensors()[name], x)


def test_what_is_no_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    for name, kind in (("pipe", ValueError), ("", ValueError), ("nowhere", FileNotFoundError)):
        with pytest.raises(kind, match=str(tmp_path / name)):
            SaisaVisualStates.load(tmp_path / name)
    for path in ("/dev/zero", "/dev/null"):
        with pytest.raises(ValueError, match=path):
            SaisaVisualStates.load(path)
    with pytest.raises((FileNotFoundError, OSError), match="round"):
        SaisaVisualStates.load(tmp_path / "round")
