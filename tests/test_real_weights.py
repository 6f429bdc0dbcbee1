# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The study on real weights: its pieces on tiny random parts, what it counts as right, and the numbers of its page."""

import itertools
import json
import math
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_drawn_scenes import things  # noqa: F401, a fixture
from test_gguf import write_gguf
from transformers import CLIPImageProcessor, EfficientNetConfig, EfficientNetModel


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import real_llava
import real_page
import real_parts
import real_training
import real_weights


ROOT = Path(__file__).parent.parent
MEMBERS = ["saisa", "llava", "vica"]
CONTROL = "llava-at-saisas-rate"


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """A language model of two layers, and an EfficientNet as narrow as can be."""
    folder = tmp_path_factory.mktemp("parts")
    (folder / "lm").mkdir()
    write_gguf(folder / "lm" / "tiny.gguf")
    torch.manual_seed(0)
    config = EfficientNetConfig(width_coefficient=0.1, depth_coefficient=0.1, image_size=224, hidden_dim=128)
    EfficientNetModel(config).save_pretrained(folder / "vision")
    side = {"height": 224, "width": 224}
    CLIPImageProcessor(size=side, crop_size=side).save_pretrained(folder / "vision")
    return folder / "lm", folder / "vision"


@pytest.fixture(scope="module")
def study(parts, things, tmp_path_factory):  # noqa: F811
    """A whole run at the sizes of the smoke run, and how to repeat it."""
    folder = tmp_path_factory.mktemp("study")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_weights, "install", lambda _: parts)
        patch.setattr(real_weights.drawings, "install", lambda _: None)
        patch.setattr(real_weights.drawings, "read", lambda _: things)
        patch.setattr(real_weights, "PASSAGE", 16)
        patch.setattr(real_weights, "CHANCE", 40)
        patch.setattr(real_weights, "ANSWER", 4)
        patch.setattr(real_weights, "is_whole", lambda ids, tokenizer: True)
        options = ["--work", str(folder / "work"), "--json", str(folder / "result.json"), "--sizes", "smoke"]
        options += ["--threads", "1", "--seeds", "0"]

        def run(*others):
            return real_weights.main([*options, *others])

        run("--members", *MEMBERS, CONTROL)
        yield SimpleNamespace(run=run, folder=folder, result=run("--costs"))


def test_every_member_is_trained_in_both_stages_and_examined(study):
    result = study.result
    assert list(result["runs"]) == [*MEMBERS, CONTROL]
    assert result["runs"]["saisa"]["0"]["first_losses"] != result["runs"]["llava"]["0"]["first_losses"]
    for name in MEMBERS:
        run = result["runs"][name]["0"]
        losses = {float(rate): loss for rate, loss in result["search"][name].items()}
        assert set(losses) == set(real_weights.RATES) and run["rate"] == min(losses, key=losses.get)
        assert run["perplexity"] > 1 and math.isfinite(run["losses"][-1])
        for exam in real_weights.EXAMS:
            assert len(run[exam]) == len(result["asked"][exam]) == len(result["chance"][exam]) == 8
            assert set(run[exam]) <= set("01")
    left = {path.name for path in (study.folder / "work").glob("*.pt")}
    assert left == {"captions.pt", "conversations.pt", "valid.pt", "artist.pt", "unseen.pt"}, "states are removed"


def test_a_control_is_a_member_at_the_rate_of_another(study, monkeypatch):
    runs = study.result["runs"]
    assert runs[CONTROL]["0"]["rate"] == runs["saisa"]["0"]["rate"]
    assert runs[CONTROL]["0"]["first_losses"] == runs["llava"]["0"]["first_losses"]
    assert CONTROL not in study.result["search"]
    whole, built = real_weights.Study(study.folder / "work", study.folder / "result.json", "smoke", math.inf), []
    stage = SimpleNamespace(run=lambda deadline: False)
    monkeypatch.setattr(whole, "stage", lambda model, data, sizes, rate, *_: built.append((model, rate)) or stage)
    assert not whole.run("saisa-at-llavas-rate", 0)
    [(model, rate)] = built
    assert rate == runs["llava"]["0"]["rate"] and model.config.projector_sharing == "per_layer"


def test_what_is_done_is_not_done_again_and_other_settings_are_refused(study, monkeypatch):
    before = (study.folder / "result.json").read_bytes()
    monkeypatch.setattr(real_weights, "new_member", None)
    study.run("--members", *MEMBERS, CONTROL)
    assert (study.folder / "result.json").read_bytes() == before
    with pytest.raises(ValueError, match=r"result\.json was made with .*: choose another --json"):
        study.run("--sizes", "study")


def test_costs_are_those_of_the_formulas_and_members_differ(study):
    costs, times = study.result["costs"], study.result["times"]
    assert set(costs) == set(times) == set(real_weights.ORDER)
    flops = {name: found["prompt_flops"] for name, found in costs.items()}
    assert flops["vica"] < flops["saisa-shared"] < flops["llava"] and flops["shortv"] < flops["naavit"] < flops["llava"]
    assert costs["saisa"]["projectors"] == 2 * costs["saisa-shared"]["projectors"]
    assert all(time > 0 for found in times.values() for time in found.values())


def test_the_page_is_made_of_the_results(study, tmp_path):
    page = tmp_path / "page.md"
    names = ("state", "summary", "search", "by_rate", "kinds_artist", "kinds_unseen")
    page.write_text("\n".join(f"<!-- {name}: start -->\n<!-- {name}: end -->" for name in names))
    real_page.main([str(study.folder / "result.json"), str(page), str(tmp_path)])
    rows = [line.split("|")[1].strip() for line in page.read_text().splitlines() if line.startswith("|")]
    found = [name for name in rows if name in (*real_page.MEMBERS, CONTROL)]
    assert found[:6] == ["llava", "saisa", "vica"] * 2 and set(found[6:]) == {"llava", "saisa", "vica"}
    assert (tmp_path / "real_weights.png").stat().st_size > 10_000
    study.run("--example", str(tmp_path / "samples.png"))
    assert (tmp_path / "samples.png").stat().st_size > 10_000


def test_the_page_counts_right_answers_and_compares_them_question_by_question():
    asked = {"artist": ["name", "count", "name", "count"], "unseen": ["name", "count", "count", "colour"]}
    runs = {
        "llava": {"0": {"artist": "1010", "unseen": "1000"}, "1": {"artist": "1000", "unseen": "0000"}},
        "saisa": {"0": {"artist": "1111", "unseen": "1110"}, "1": {"artist": "1100", "unseen": "0010"}},
    }
    result = {"asked": asked, "runs": runs, "chance": {"artist": "0101", "unseen": "0001"}}
    assert real_page.share(real_page.hits(result, "saisa", "artist").mean(1)) == "75.0 (50.0 to 100.0)"
    assert real_page.share(real_page.hits(result, "saisa", "unseen").mean(1)) == "50.0 (33.3 to 66.7)", "without names"
    # questions: 1 - 1, 1 - 0, 0.5 - 0.5, 0.5 - 0
    assert real_page.difference(result, "saisa", "artist") == "+37.5 ± 23.9"
    lines = real_page.by_kind(result, "artist").splitlines()[2:]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == [
        ["name", "2", "0.0", "75.0 (50.0 to 100.0)", "75.0 (50.0 to 100.0)"],
        ["count", "2", "100.0", "0.0 (0.0 to 0.0)", "75.0 (50.0 to 100.0)"],
    ]
    runs |= {
        "llava-at-saisas-rate": {"0": runs["llava"]["0"] | {"rate": 0.003, "perplexity": 50.0}},
        "saisa": {seed: run | {"rate": 0.003, "perplexity": 40.0 + int(seed)} for seed, run in runs["saisa"].items()},
    }
    runs["llava"] = {seed: run | {"rate": 0.001, "perplexity": 30.0} for seed, run in runs["llava"].items()}
    lines = real_page.by_rate(result).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[:4] for row in cells] == [
        ["llava", "0.001", "37.5 (25.0 to 50.0)", ""],
        ["llava", "0.003", "50.0", ""],
        ["saisa", "0.003", "75.0 (50.0 to 100.0)", "+50.0 ± 28.9"],  # of the seed that both have
    ]
    assert [row[-1] for row in cells] == ["30.00", "50.00", "40.50"]
    result["settings"], result["search"] = {"rates": [1e-4, 3e-4]}, {"llava": {"0.0001": 2.0, "0.0003": None}}
    assert "**2.000**" in real_page.search(result) and "diverged" in real_page.search(result)


def test_the_page_sets_what_was_fitted_beside_what_was_trained():
    run = {"artist": "1100", "unseen": "1010", "perplexity": 40.0}
    result = {"asked": {"artist": ["count"] * 4, "unseen": ["name", *["count"] * 3]}, "runs": {"saisa": {"0": run}}}
    by_number = [
        {"number": 1, "layers": [2], "kl": 0.5, "top1": 0.25},
        {"number": 3, "layers": [0, 1, 2], "kl": 0.1, "top1": 1},
    ]
    agreement = {"copied": {"kl": 2.0, "top1": 0.1}, "fitted": {"kl": 0.25, "top1": 0.875}}
    way = {"agreement": agreement, "visual_layers": [2], "least": [0, 1, 2], "by_number": by_number}
    llava = {
        "llava": run | {"artist": "1111"},
        "ways": {"one layer": way | run, "all layers": way | run | {"visual_layers": None, "by_number": []}},
    }
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in real_page.fitted(result, llava).splitlines()[2:]
    ]
    assert cells == [
        ["LLaVA, trained", "", "", "", "100.0", "33.3", "40.00"],
        ["SAISA, fitted: one layer", "2", "0.250", "87.5", "50.0", "33.3", "40.00"],
        ["SAISA, fitted: all layers", "all", "0.250", "87.5", "50.0", "33.3", "40.00"],
        ["SAISA, trained", "all", "", "", "50.0", "33.3", "40.00"],
    ]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in real_page.by_number(llava).splitlines()[2:]]
    assert rows == [["1", "0.500", "25.0", "2"], ["3", "0.100", "100.0", "all"]]


def test_two_processes_write_one_file(tmp_path):
    one, other = (SimpleNamespace(work=tmp_path, path=tmp_path / "result.json", result={}) for _ in range(2))
    real_weights.Study.write(one, {"runs": {"saisa": {"0": {"rate": 1}}}, "search": {"saisa": {}}})
    real_weights.Study.write(other, {"runs": {"llava": {"0": {"rate": 3}}}})
    real_weights.Study.write(one, {"runs": {"saisa": {"1": {"rate": 2}}}})
    wanted = {"saisa": {"0": {"rate": 1}, "1": {"rate": 2}}, "llava": {"0": {"rate": 3}}}
    assert json.loads((tmp_path / "result.json").read_text())["runs"] == one.result["runs"] == wanted


def test_the_trained_llava_becomes_a_saisa_in_every_way(study, monkeypatch):
    monkeypatch.setitem(real_llava.WAYS, "eight layers", {"visual_layers": "auto:1", "choose_on": 2})
    options = ["--work", str(study.folder / "work"), "--study", str(study.folder / "result.json"), "--sizes", "smoke"]
    ways = ["all layers", "eight layers"]
    result = real_llava.main([*options, "--json", str(study.folder / "llava.json"), "--threads", "1", "--ways", *ways])
    assert list(result["ways"]) == ways
    for name, found in result["ways"].items():
        assert {"copied", "fitted"} <= set(found["agreement"]) and found["agreement"]["fitted"]["kl"] >= 0
        assert len(found["artist"]) == len(study.result["asked"]["artist"])
        # the language model is the LLaVA's, as it was written in bfloat16
        assert found["perplexity"] == pytest.approx(result["llava"]["perplexity"], rel=1e-3), name
    trained = study.result["runs"]["llava"]["0"]["perplexity"]
    assert result["llava"]["perplexity"] == pytest.approx(trained, rel=0.05)
    untrained = study.result["before"]["perplexity"]
    assert abs(result["llava"]["perplexity"] - trained) < 0.5 * abs(untrained - trained)
    assert len(result["ways"]["eight layers"]["visual_layers"]) == 1
    monkeypatch.setattr(real_llava, "way", None)
    assert (
        real_llava.main([*options, "--json", str(study.folder / "llava.json"), "--ways", *ways])["ways"]
        == result["ways"]
    )


def a_stage(study, name, state):
    whole = real_weights.Study(study.folder / "work", study.folder / "result.json", "smoke", math.inf)
    model = whole.second_model(name, 0)
    return real_training.Stage(model, whole.samples("conversations"), 2, 5, 1e-3, 3, state)


def test_batches_have_each_sample_once_and_are_of_one_length():
    lengths = [(7 * number) % 101 for number in range(64)]
    found = real_training.batches(lengths, 4, 32, seed=1)
    for turn in (found[:16], found[16:]):
        assert sorted(index for batch in turn for index in batch) == list(range(64))
    assert found[:16] != found[16:]
    assert found == real_training.batches(lengths, 4, 32, seed=1) != real_training.batches(lengths, 4, 32, seed=2)
    spans = [max(lengths[one] for one in batch) - min(lengths[one] for one in batch) for batch in found]
    assert max(spans) < 12
    starts = [lengths[batch[0]] for batch in found[:16]]
    assert starts != sorted(starts), "short ones do not come first"


@pytest.mark.parametrize("name", ["saisa", "llava"])
def test_a_stage_that_is_interrupted_goes_on_to_the_last_bit(study, name, tmp_path, monkeypatch):
    whole = a_stage(study, name, tmp_path / "whole.pt")
    assert whole.run(math.inf) and len(set(whole.losses)) == 5
    first = a_stage(study, name, tmp_path / "part.pt")
    ticks = itertools.count()
    monkeypatch.setattr(real_training.time, "monotonic", lambda: next(ticks))
    assert not first.run(deadline=3) and 0 < first.step < 5
    second = a_stage(study, name, tmp_path / "part.pt")
    assert second.run(math.inf) and second.losses == whole.losses
    wanted = whole.model.state_dict()
    for key, tensor in second.model.state_dict().items():
        assert torch.equal(tensor, wanted[key]), key


def test_right_is_what_greedy_decoding_would_write(study):
    whole = real_weights.Study(study.folder / "work", study.folder / "result.json", "smoke", math.inf)
    model, end = whole.second_model("saisa", 0).eval(), whole.processor.tokenizer.eos_token_id
    data, samples = whole.samples("artist"), []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for sample in data.samples[:4]:
            start = next(place for place, label in enumerate(sample["labels"]) if label != -100)
            prompt = torch.tensor([sample["input_ids"][:start]])
            images = {"pixel_values": sample["pixel_values"].float()}
            ids = model.generate(prompt, **images, max_new_tokens=4, do_sample=False, eos_token_id=end)[0].tolist()
            labels = [-100] * start + ids[start:]
            samples += [{**sample, "input_ids": ids, "labels": labels}]
            wrong = [*ids[:-1], (ids[-1] + 1) % 200]
            samples += [{**sample, "input_ids": wrong, "labels": [-100] * start + wrong[start:]}]
    hits = real_training.right(model, real_training.Encoded(samples, ["name"] * 8), size=3)
    assert hits == [True, False] * 4


def test_lite0_is_an_efficientnet_without_gates():
    """The features do not depend on what the squeeze computes, since its gates are 1."""
    torch.manual_seed(0)
    config = EfficientNetConfig(width_coefficient=1.0, depth_coefficient=1.0, hidden_dim=1280, hidden_act="relu6")
    theirs = EfficientNetModel(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=(2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 1)
    names = {"embeddings.convolution": "_conv_stem", "embeddings.batchnorm": "_bn0"}
    names |= {"encoder.top_conv": "_conv_head", "encoder.top_bn": "_bn1"}
    inner = {"expand_conv": "_expand_conv", "expand_bn": "_bn0", "depthwise_conv": "_depthwise_conv"}
    inner |= {"depthwise_norm": "_bn1", "project_conv": "_project_conv", "project_bn": "_bn2"}
    weights = {"_fc.weight": torch.zeros(2, 2)}
    for name, tensor in theirs.state_dict().items():
        if ".squeeze_excite." in name:
            continue
        stem, _, last = name.rpartition(".")
        if stem in names:
            weights[f"{names[stem]}.{last}"] = tensor
        else:
            _, _, number, _, part = stem.split(".")
            weights[f"_blocks.{number}.{inner[part]}.{last}"] = tensor
    model = real_parts.lite0_of(weights)
    pixels = torch.randn(1, 3, 64, 64)
    for block in theirs.encoder.blocks:
        block.squeeze_excite = torch.nn.Identity()
    with torch.no_grad():
        wanted, found = theirs(pixels).last_hidden_state, model(pixels).last_hidden_state
    assert torch.equal(wanted, found) and found.abs().max() > 0


@pytest.mark.slow
def test_a_smoke_run_on_the_real_parts(tmp_path):
    """Downloads the packages; one seed, two members, a few samples."""
    options = ["--work", str(tmp_path / "work"), "--json", str(tmp_path / "result.json"), "--sizes", "smoke"]
    start = time.monotonic()
    result = real_weights.main([*options, "--seeds", "0", "--members", "saisa", "vica"])
    assert {name: list(runs) for name, runs in result["runs"].items()} == {"saisa": ["0"], "vica": ["0"]}
    assert 20 < result["before"]["perplexity"] < 40, "SmolLM2 on Python's reference"
    assert time.monotonic() - start < 3600


@pytest.fixture
def kept():
    """The results in the repository: of the study, and of what was fitted to its LLaVA."""
    return [json.loads((ROOT / "benchmarks" / f"{name}.json").read_text()) for name in ("real_weights", "real_llava")]


def one_line(path: str) -> str:
    """The text of a page, without its line breaks."""
    return re.sub(r"\s+", " ", (ROOT / path).read_text())


def test_the_numbers_in_the_repository_are_those_of_the_page(kept):
    page = (ROOT / "docs" / "real_weights.md").read_text()
    for name, text in real_page.blocks(*kept).items():
        assert f"<!-- {name}: start -->\n{text}\n<!-- {name}: end -->" in page, name


def test_the_differences_that_the_text_names_are_those_of_the_results(kept):
    result, llava = kept
    runs = result["runs"]
    found = {
        real_page.difference(result, one, exam, other)
        for one, other, exam in itertools.product(runs, runs, real_page.EXAMS)
    }
    fits = [llava["llava"], *llava["ways"].values()]
    of_their_seed = [*fits, *(seeds["0"] for seeds in runs.values())]
    for one, other, exam in itertools.product(of_their_seed, fits, real_page.EXAMS):
        found.add(real_page.paired(*(real_page.hits_of(run, result, exam) for run in (one, other))))
    named = set(re.findall(r"\d+\.\d ± \d+\.\d", one_line("docs/real_weights.md")))
    assert len(named) > 10 and named <= {difference.lstrip("+-") for difference in found}


def test_the_shares_that_the_texts_name_are_those_of_the_results(kept):
    result, text = kept[0], one_line("docs/real_weights.md")
    names = {name: 100 * real_page.hits(result, name, "artist", "name").mean() for name in real_page.MEMBERS}
    assert f"names ({names['saisa']:.0f}% against {names['llava']:.0f}%)" in text
    assert f"{names['saisa-shared']:.0f}% of the names to ViCA's {names['vica']:.0f}%" in text
    llava, saisa, vica = (
        [100 * real_page.hits(result, name, exam).mean() for exam in real_page.EXAMS]
        for name in ("llava", "saisa", "vica")
    )
    artist, unseen = (100 * one / other for one, other in zip(vica, llava))
    assert f"it is {artist:.0f}% on the new artist and {unseen:.0f}% on new things" in text
    for one, other in zip(saisa, llava):
        assert f"({one:.1f}% against {other:.1f}%)" in one_line("README.md")
