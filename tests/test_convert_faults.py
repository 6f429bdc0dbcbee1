# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa convert` when things go wrong: killed at any moment, disk full, files cut short or changed. The destination is whole
each time, as it was or as it should be, and the same command succeeds when the cause is gone."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess

import pytest
import torch
from apart import succeeds
from hostile import bounded
from test_convert import (
    authors_checkpoint,
    language_tensors,
    narrow_parts,
    old_words_tokenizer,
    tower_tensors,
    write_weights,
)

from saisa_hf.checkpoints.convert import convert


QUIET = {"log": lambda line: None}
SHARDS = {"max_shard_size": "200KB"}


def state(folder):
    """Relative path -> digest of everything in a folder; None where there is none."""
    if not folder.exists():
        return None
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def old_result(destination):
    """A folder where the result goes, with something in it that must not get lost."""
    (destination / "sub").mkdir(parents=True)
    (destination / "model.safetensors").write_bytes(os.urandom(1000))
    (destination / "sub" / "notes.txt").write_text("mine")
    return state(destination)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint in three files, with a tokenizer and a narrower encoder: half a megabyte, for conversions by the dozen."""
    tensors, vision_config = narrow_parts()
    folder = tmp_path_factory.mktemp("source") / "source"
    authors_checkpoint(folder, False, "bin", 3, tensors, old_words_tokenizer(), mm_hidden_size=32)
    (folder / "vision" / "pytorch_model.bin").unlink()
    (folder / "vision" / "config.json").write_text(json.dumps(vision_config))
    return folder


@pytest.fixture(scope="module")
def complete(source, tmp_path_factory):
    """The state of a destination after an undisturbed conversion."""
    return state(convert(source, tmp_path_factory.mktemp("complete") / "dst", **SHARDS, **QUIET))


# --- killed -----------------------------------------------------------------------------------------------------------

# Each job is a process that converts and, where it is told to, kills itself with signal 9 at a step in the file system, which
# is opening a file to write or to flush it, making, renaming or removing one: step n, counted from the last if negative, or
# the step at a fraction of the way. It prints how many steps it took, or nothing where it was killed.
JOBS = """
import json, os, resource, signal, sys
from pathlib import Path
from saisa_hf.checkpoints.convert import convert

source, jobs = sys.argv[1], json.loads(sys.argv[2])
steps = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree"}
whole = 0

def run(job):
    folder, taken, kill_at = Path(job["destination"]).parent, 0, job.get("kill_at", 0)
    kill_at = int(kill_at * whole) if 0 < kill_at < 1 else whole + 1 + kill_at if kill_at < 0 else kill_at
    def step(event, arguments):
        nonlocal taken
        if event in steps and str(arguments[0]).startswith(str(folder)):
            taken += 1
            if taken == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(step)
    if "file_size" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_size"],) * 2)
    try:
        convert(source, job["destination"], max_shard_size="200KB", overwrite=True, log=lambda line: None)
        return {"steps": taken}
    except OSError as error:
        return {"error": str(error)}

for job in jobs:
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.write(writer, json.dumps(run(job)).encode())
        os._exit(0)
    os.close(writer)
    _, status = os.wait()
    said = json.loads(os.read(reader, 100000) or "{}")
    whole = said.get("steps", whole)
    print(json.dumps({**said, "signal": os.WTERMSIG(status)}), flush=True)
"""


def run_jobs(source, jobs):
    done = succeeds(JOBS, source, json.dumps(jobs), environment=os.environ | {"OMP_NUM_THREADS": "1"}, cwd=source)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_conversion_killed_at_any_step_leaves_all_or_nothing_and_can_be_run_again(tmp_path, source, complete):
    before, jobs, points = {}, [], [None, 1, 0.15, 0.3, 0.5, 0.8, -2, -1]  # the destination changes at the last steps
    for was_there in (False, True):
        for number, point in enumerate(points):
            destination = tmp_path / f"{was_there}_{number}" / "dst"
            destination.parent.mkdir()
            before[destination] = old_result(destination) if was_there else None
            jobs.append({"destination": str(destination)} | ({"kill_at": point} if point else {}))
    done = run_jobs(source, jobs)
    middle = 0
    for destination, job, ended in zip(before, jobs, done, strict=True):
        assert ended["signal"] == (9 if "kill_at" in job else 0)
        early = 0 < job.get("kill_at", 0) <= 0.8 or job.get("kill_at") == 1
        allowed = (
            [before[destination]] if early else [before[destination], complete] if "kill_at" in job else [complete]
        )
        assert state(destination) in allowed, f"half a result after {job}"
        middle += any(path.suffix == ".safetensors" for path in destination.parent.glob(".dst.*.partial/dst/*"))
        convert(source, destination, overwrite=True, **SHARDS, **QUIET)
        assert state(destination) == complete
        assert names(destination.parent) == ["dst"], f"something is left of {job}"
    assert middle >= 6  # weights had been written and were not in place


def test_what_a_living_conversion_has_written_is_left_alone(tmp_path, source):
    theirs = tmp_path / ".dst.abcd.partial"
    theirs.mkdir()
    (theirs / "model.safetensors").write_text("half")
    handle = os.open(theirs, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    convert(source, tmp_path / "dst", **QUIET)
    assert names(tmp_path) == [".dst.abcd.partial", "dst"] and (theirs / "model.safetensors").exists()
    os.close(handle)
    lines = []
    convert(source, tmp_path / "dst", overwrite=True, log=lines.append)
    assert names(tmp_path) == ["dst"] and any(str(theirs) in line for line in lines)


def test_what_appears_in_the_destination_meanwhile_is_not_overwritten(tmp_path, source):
    def appear(line):
        if line.startswith("checked"):
            old_result(tmp_path / "dst")

    with pytest.raises(OSError, match="not empty"):
        convert(source, tmp_path / "dst", log=appear)
    assert (tmp_path / "dst" / "sub" / "notes.txt").read_text() == "mine" and names(tmp_path) == ["dst"]


def test_where_folders_cannot_be_swapped_the_old_one_is_moved_aside_and_back(tmp_path, source, complete, monkeypatch):
    monkeypatch.setattr("saisa_hf.common.destination._exchange", lambda first, second: False)
    before, rename = old_result(tmp_path / "dst"), os.rename

    def fail(old, new):
        if ".partial" in str(old):
            raise OSError("no")
        rename(old, new)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no"):
        patch.setattr(os, "rename", fail)
        convert(source, tmp_path / "dst", overwrite=True, **SHARDS, **QUIET)
    assert state(tmp_path / "dst") == before and names(tmp_path) == ["dst"]
    convert(source, tmp_path / "dst", overwrite=True, **SHARDS, **QUIET)
    assert state(tmp_path / "dst") == complete and names(tmp_path) == ["dst"]


# --- disk full --------------------------------------------------------------------------------------------------------


def test_a_limit_on_the_size_of_files_is_told_by_file_and_tensor_and_changes_nothing(tmp_path, source):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    before = old_result(tmp_path / "b" / "dst")
    limits = {"a": 30_000, "b": 100}  # within a tensor, and within the header
    jobs = [{"destination": str(tmp_path / name / "dst"), "file_size": limit} for name, limit in limits.items()]
    within_tensor, within_header = (done["error"] for done in run_jobs(source, jobs))
    assert re.search(r"/model-\d+-of-\d+\.safetensors: model\.\S+ cannot be written: File too large", within_tensor)
    assert "model-00001-of-" in within_header and "its header cannot be written" in within_header
    assert names(tmp_path / "a") == [] and names(tmp_path / "b") == ["dst"] and state(tmp_path / "b" / "dst") == before


@contextlib.contextmanager
def small_disk(folder, size):
    """`folder` as a file system of `size`, in memory."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this user may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tmp_path, source):
    lines = []
    with small_disk(tmp_path / "disk", "8m") as disk:
        with pytest.raises(OSError, match=r"disk: the result takes 0\.\d+ GB, but 0\.01 GB of the disk are free"):
            convert(source, disk / "dst", log=lines.append)
        assert names(disk) == [] and not lines


def test_a_disk_that_fills_up_is_told_by_file_and_tensor_and_changes_nothing(tmp_path, source, complete):
    with small_disk(tmp_path / "disk", "60m") as disk:
        before = old_result(disk / "dst")

        def fill(line):
            if line.startswith("writing model-00002"):  # somebody else fills the disk while the second file is begun
                with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as stream:
                    while stream.write(bytes(2**20)) == 2**20:
                        pass
                os.truncate(disk / "filler", (disk / "filler").stat().st_size - 2**15)  # enough for a header

        with pytest.raises(
            OSError, match=r"model-00002-of-\d+\.safetensors: model\.\S+ cannot be written: No space left"
        ):
            convert(source, disk / "dst", overwrite=True, log=fill, **SHARDS)
        assert names(disk) == ["dst", "filler"] and state(disk / "dst") == before
        (disk / "filler").unlink()
        convert(source, disk / "dst", overwrite=True, **SHARDS, **QUIET)
        assert state(disk / "dst") == complete and names(disk) == ["dst"]


# --- damaged sources --------------------------------------------------------------------------------------------------


def refused(tmp_path, source, message, error=OSError, **options):
    """Whether the conversion is refused with `message`, and leaves a destination that was there as it was."""
    before = old_result(tmp_path / "dst")
    with pytest.raises(error, match=message):
        convert(source, tmp_path / "dst", overwrite=True, **options, **QUIET)
    assert state(tmp_path / "dst") == before
    assert [name for name in names(tmp_path) if name.startswith(".")] == []
    shutil.rmtree(tmp_path / "dst")


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("keep", [0, 3, 1000, 0.5, -1])
def test_a_file_cut_short_anywhere_is_named(tmp_path, form, keep):
    folder = authors_checkpoint(tmp_path / "source", form=form, shards=3)
    shard = sorted(folder.glob("*-00002-of-00003.*"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[: int(len(content) * keep) if keep == 0.5 else keep])
    refused(tmp_path, folder, rf"{shard.name} cannot be read: .*truncated")


def test_a_legacy_pickle_cut_short_is_named(tmp_path):
    folder = authors_checkpoint(tmp_path / "source", form="bin")
    file = folder / "pytorch_model.bin"
    tensors = torch.load(file, weights_only=True)
    torch.save(tensors, file, _use_new_zipfile_serialization=False)
    convert(folder, tmp_path / "converted", **QUIET)
    file.write_bytes(file.read_bytes()[:-1000])
    refused(tmp_path, folder, r"pytorch_model\.bin cannot be read: .*truncated")


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.2.mm_projector.2.bias", "model.norm.weight"]
)
def test_a_bit_that_flipped_in_a_bin_file_is_noticed_and_the_tensor_named(tmp_path, name):
    folder = authors_checkpoint(tmp_path / "source", form="bin")
    file, value = folder / "pytorch_model.bin", language_tensors()[name]
    content = bytearray(file.read_bytes())
    content[content.index(value.numpy().tobytes()) + value.nbytes // 2] ^= 4
    file.write_bytes(content)
    refused(tmp_path, folder, rf"pytorch_model\.bin: tensor {name} is corrupt, its checksum differs")


def test_a_bit_that_flipped_in_the_encoders_file_is_noticed(tmp_path):
    folder = authors_checkpoint(tmp_path / "source", tower_inside=False, form="bin")
    file, name = folder / "vision" / "pytorch_model.bin", "vision_model.post_layernorm.weight"
    content = bytearray(file.read_bytes())
    content[content.index(tower_tensors()[name].numpy().tobytes())] ^= 4
    file.write_bytes(content)
    refused(tmp_path, folder, rf"vision/pytorch_model\.bin: tensor {name} is corrupt")


def test_bin_files_without_checksums_are_taken(tmp_path):
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("this release of torch always writes checksums")
    torch.serialization.set_crc32_options(False)
    try:
        folder = authors_checkpoint(tmp_path / "source", form="bin")
    finally:
        torch.serialization.set_crc32_options(True)
    convert(folder, tmp_path / "dst", **QUIET)


def change_name(header):
    header["model.norm.weighs"] = header.pop("model.norm.weight")


def change_shape(header):
    header["model.norm.weight"]["shape"] = [32, 2]


def change_size(header):
    header["model.norm.weight"]["shape"] = [63]


def change_place(header):
    header["model.norm.weight"]["data_offsets"] = [0, 256]


def change_dtype(header):
    header["model.norm.weight"] |= {"dtype": "I32"}


@pytest.mark.parametrize(
    "change, error, message",
    [
        (change_name, ValueError, r"model\.safetensors: tensor model\.norm\.weighs is unknown"),
        (
            change_shape,
            ValueError,
            r"model\.safetensors: tensor model\.norm\.weight has shape \(32, 2\), expected \(64,\)",
        ),
        (change_size, OSError, r"model\.safetensors cannot be read: .*truncated or not a weight file"),
        (change_place, OSError, r"model\.safetensors cannot be read"),
        (change_dtype, ValueError, r"model\.safetensors: tensor model\.norm\.weight is I32, expected one of float32"),
    ],
)
def test_a_header_that_rotted_is_told_by_file_and_tensor(tmp_path, change, error, message):
    folder = authors_checkpoint(tmp_path / "source")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    change(header)
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + content[8 + length :])
    refused(tmp_path, folder, message, error)


@pytest.mark.parametrize("place, value", [(0, 0xFF), (7, 0x7F), (9, 0x00), (40, 0xC3)])
def test_a_byte_of_a_header_that_is_none_is_told_by_file(tmp_path, place, value):
    folder = authors_checkpoint(tmp_path / "source")
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[place] = value
    (folder / "model.safetensors").write_bytes(content)
    refused(tmp_path, folder, r"model\.safetensors cannot be read")


def test_an_index_that_names_what_its_files_do_not_hold_is_told_by_file_and_tensor(tmp_path):
    folder = authors_checkpoint(tmp_path / "source", shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.mlp.up_proj.weight"] = "model-00002-of-00002.safetensors"
    index.write_text(json.dumps(content))
    message = (
        r"model-00002-of-00002\.safetensors: tensor model\.layers\.9\.mlp\.up_proj\.weight is missing, which model"
    )
    refused(tmp_path, folder, message, ValueError)
    index.write_text(index.read_text()[:100])
    refused(tmp_path, folder, r"model\.safetensors\.index\.json is not valid JSON", ValueError)


def test_a_tensor_missing_from_the_encoder_is_told_by_its_file(tmp_path):
    folder = authors_checkpoint(tmp_path / "source", tower_inside=False)
    tensors = dict(tower_tensors())
    tensors.pop("vision_model.encoder.layers.1.mlp.fc1.bias")
    write_weights(folder / "vision", tensors)
    message = r"vision/model\.safetensors: tensor .*vision_model\.encoder\.layers\.1\.mlp\.fc1\.bias is missing"
    refused(tmp_path, folder, message, ValueError)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("where", ["", "vision"])
def test_no_pickle_runs_code_wherever_it_is(tmp_path, zipped, where):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    folder = authors_checkpoint(tmp_path / "source", tower_inside=False, form="bin")
    contents = {"model.norm.weight": Trap()}
    torch.save(contents, folder / where / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    refused(tmp_path, folder, rf"{where}/pytorch_model\.bin cannot be read")
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("file", ["config.json", "vision/config.json"])
def test_more_layers_than_the_weights_have_are_refused_before_a_model_is_made(tmp_path, file):
    folder = authors_checkpoint(tmp_path / "source", tower_inside=False)
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | {"num_hidden_layers": 10**9}))
    with bounded(seconds=20, megabytes=500):
        refused(
            tmp_path, folder, rf"{file}: num_hidden_layers=1000000000, but there are \d+ tensors in all", ValueError
        )
