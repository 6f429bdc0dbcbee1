"""`saisa ask --backend vllm`: the table is that of the transformers backend.

`make test-vllm` runs these; they are skipped where vLLM is not installed."""

import json

import pytest


pytest.importorskip("vllm")

import vllm_engine  # noqa: F401  (sets the environment of an engine in this process)
import vllm_parts as parts

from saisa_hf.cli import main
from saisa_hf.evaluation.ask import with_vllm


OPTIONS = {
    "max_model_len": 256,
    "enforce_eager": True,
    "max_num_seqs": 8,
    "block_size": 32,
    "max_num_batched_tokens": 64,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return parts.make_checkpoint(tmp_path_factory.mktemp("asked"))


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Questions about one image or two, and some that cannot be asked."""
    folder = tmp_path_factory.mktemp("table")
    images = [f"{index}.png" for index in range(5)]
    for name, picture in zip(images, parts.pictures(5)):
        picture.save(folder / name)
    words = parts.WORDS
    rows = [
        {"image": images[index % 5], "prompt": " ".join(words[index : index + 2 + index % 4]), "id": index}
        for index in range(14)
    ]
    rows[3]["image"] = [images[0], images[3]]
    rows[5]["image"] = "none.png"
    rows[8]["prompt"] = " ".join(words * 20)  # longer than vLLM was started for
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "in.jsonl"


def ask(checkpoint, table, output, backend, *options):
    how = ["--dtype", "float32", "--max-new-tokens", "8", "--batch-size", "2", "--backend", backend, *options]
    status = main(["ask", str(checkpoint), str(table), "--output", str(output), *how])
    return status, [json.loads(line) for line in output.read_text().splitlines()]


def test_answers_are_those_of_the_transformers_backend(checkpoint, table, tmp_path, monkeypatch):
    status, wanted = ask(checkpoint, table, tmp_path / "transformers.jsonl", "transformers", "--device", "cpu")
    assert status == 4 and [row["id"] for row in wanted if row["error"]] == [5]
    made = []
    made_by = with_vllm.VllmAnswerer.__init__

    def noted(self, *arguments, **options):
        made_by(self, *arguments, **options)
        made.append(self)

    monkeypatch.setattr(with_vllm.VllmAnswerer, "__init__", noted)
    options = ("--vllm-options", json.dumps(OPTIONS))
    status, found = ask(checkpoint, table, tmp_path / "vllm.jsonl", "auto", *options)
    assert len(made) == 1 and status == 4
    assert [row["id"] for row in found if row["error"]] == [5, 8]
    assert "256" in found[8]["error"] and found[5] == wanted[5]
    right = [index for index in range(14) if index not in (5, 8)]
    assert [found[index] for index in right] == [wanted[index] for index in right]
    assert len({found[index]["answer"] for index in right}) > 3


def test_what_vllm_does_not_know_is_named(checkpoint, table, tmp_path, capsys):
    for options, said in (
        (("--vllm-options", '{"no_such": 1}'), "no_such"),
        (("--device", "mps"), "vLLM runs on 'cpu'"),
    ):
        command = ["ask", str(checkpoint), str(table), "--output", str(tmp_path / "out.jsonl"), "--backend", "vllm"]
        assert main([*command, *options]) == 2
        assert said in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
