# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What looks like a path is checked as one, and never looked up on the hub."""

import pytest

from saisa_hf.common.sources import check_local, local_folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "data.json").write_text("[]")
    return tmp_path


@pytest.mark.parametrize("name", ["gpt2", "user/name", "user/name-1.5", "User_1/na.me", "Qwen/Qwen3-0.6B", "-/x"])
def test_hub_ids_are_left_to_the_hub(here, name):
    assert check_local("MODEL", name) is None and check_local("data", name, files=True) is None


@pytest.mark.parametrize(
    "name",
    [
        *(
            "./missing",
            "../missing",
            ".",
            "/no/such/folder",
            "~/no/such/folder",
            "a/b/c",
            "a/b/",
            "a\\b",
            "C:\\models\\x",
        ),
        *("", " ", "out/modle", "missing.json", "data/train.jsonl", "user/train.PARQUET", "user/model.safetensors"),
        *("out/", "a b", "/"),
        *("https://host/user/name", "hf://user/name", "name\0", "n" * 5000 + "/x/y", ".hidden"),
    ],
)
def test_what_looks_like_a_path_is_one(here, name):
    if name in (".", "out/", "/"):
        assert check_local("MODEL", name).is_dir()
        return
    for files in (False, True):
        with pytest.raises(FileNotFoundError, match="MODEL ") as error:
            check_local("MODEL", name, files)
        assert repr(name) in str(error.value) and ("folder" in str(error.value))


def test_folders_and_files_that_are_there(here, monkeypatch):
    monkeypatch.setenv("HOME", str(here))
    assert check_local("MODEL", "out/model").name == "model"
    assert local_folder(here / "out", "MODEL") == here / "out"
    assert check_local("MODEL", "~/out") == here / "out"
    assert check_local("data", "data.json", files=True).read_text() == "[]"
    with pytest.raises(FileNotFoundError, match=r"MODEL 'data.json' is a file: expected a folder, or a hub id"):
        check_local("MODEL", "data.json")


def test_a_folder_of_that_name_is_named(here):
    with pytest.raises(FileNotFoundError, match="the folder 'out' is here, and has no 'modle'"):
        check_local("MODEL", "out/modle")


@pytest.mark.parametrize("kind", ["models", "datasets"])
def test_a_repository_that_was_downloaded_is_meant_beside_a_folder_of_its_owners_name(here, monkeypatch, kind):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(here / "cache"))
    (here / "cache" / f"{kind}--out--modle").mkdir(parents=True)
    assert check_local("MODEL", "out/modle") is None
