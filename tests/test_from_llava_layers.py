# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""A SAISA made from a LLaVA in which only some layers see the image: those that are given, or those that need it most."""

import itertools
import json

import pytest
import torch
from test_from_llava import PROMPTS, TOKENS, draw, make_llava, make_processor, text_config
from test_from_llava import make_bench as bench_of_clip
from test_from_llava_tiles import make_bench as bench_with_tiles

from saisa_hf import SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.checkpoints import from_llava
from saisa_hf.checkpoints.from_llava import (
    REPORT,
    Fit,
    Teacher,
    Workbench,
    agreement,
    answered,
    choose_layers,
    choosing,
    fit_projectors,
    processor_from_llava,
    saisa_from_llava,
)
from saisa_hf.checkpoints.from_llava.choosing import (
    batches_of,
    divergences_without,
    left_by_round,
    nested,
    seeing,
)
from saisa_hf.checkpoints.from_llava.states import VisualStates
from saisa_hf.cli import build, main, make_parser


DEPTH, DEAF = 5, (0, 2, 3)  # layers, and those of them in which attention gives nothing
SETTINGS = {"pictures": 30, "held_out": 6, "choose_on": 6, "steps": 0, "answer_tokens": 4}


def make_deep(deaf=DEAF, text="llama", **settings):
    """A random LLaVA whose layers in `deaf` have no use for the image."""
    llava = make_llava(text_config(text, num_hidden_layers=DEPTH, **settings))
    for layer in deaf:
        llava.model.language_model.layers[layer].self_attn.o_proj.weight.data.zero_()
    return llava


@pytest.fixture(scope="module")
def pictures():
    return [draw(number) for number in range(30)]


@pytest.fixture(scope="module")
def source(pictures, tmp_path_factory):
    """A LLaVA and pictures as folders."""
    folder = tmp_path_factory.mktemp("source")
    make_deep().save_pretrained(folder / "llava")
    make_processor().save_pretrained(folder / "llava")
    (folder / "photos").mkdir()
    for number, picture in enumerate(pictures):
        picture.save(folder / "photos" / f"{number:02}.png")
    (folder / "prompts.txt").write_text("list the digits.")
    return folder


def fitted(llava, pictures, folder, **settings):
    bench = bench_of_clip(llava, pictures, folder, Fit(**SETTINGS | settings))
    teacher = Teacher(bench.model)
    fit_projectors(bench, teacher)
    return bench, teacher


def best_by_trying(bench, teacher, rows, number):
    """The least divergence of all sets of so many layers, and the set."""
    found = []
    for layers in itertools.combinations(range(DEPTH), number):
        with seeing(bench.model, layers):
            found.append((agreement(bench, teacher, rows)["kl"], list(layers)))
    return min(found)


def test_elimination_finds_what_trying_all_sets_finds(pictures, tmp_path):
    bench, teacher = fitted(make_deep(), pictures, tmp_path, visual_layers="auto:2")
    splits = [bench.held_out, bench.choosing, bench.fitted]
    assert [image for split in splits for image in split] == list(range(30)) and list(map(len, splits)) == [6, 6, 18]
    order = choose_layers(bench, teacher)
    assert order[:3] == [3, 2, 0] and sorted(order) == list(range(DEPTH))
    rows = answered(bench, teacher, bench.choosing, "choosing-answers.json")
    for number in range(1, DEPTH + 1):
        kl, layers = best_by_trying(bench, teacher, rows, number)
        with seeing(bench.model, nested(order, number)):
            own = agreement(bench, teacher, rows)["kl"]
        assert own == pytest.approx(kl, rel=1e-4), (number, layers, order)
        assert number > 2 or nested(order, number) == layers
    assert all(layer.sees_image and layer.self_attn.sees_image for layer in bench.model.language_model.layers)
    with seeing(bench.model, []):
        assert agreement(bench, teacher, rows)["kl"] > 4 * own  # the image matters
    rounds = json.loads((tmp_path / "layers.json").read_text())
    assert [layer for one in rounds for layer in one["hidden"]] == order[:-1]
    assert list(map(len, (one["kl"] for one in rounds))) == [5, 4, 3, 2]


@pytest.mark.parametrize("kind", ["llama", "window", "tiles"])
def test_a_layers_divergence_is_that_of_the_model_without_it(kind, pictures, tmp_path):
    if kind == "tiles":
        _, teacher, bench = bench_with_tiles("next", tmp_path, choose_on=6, visual_layers="auto:1")
    else:
        text, settings = ("llama", {}) if kind == "llama" else ("mistral", {"sliding_window": 6})
        bench, teacher = fitted(make_deep((), text, **settings), pictures, tmp_path, visual_layers="auto:1")
    rows = answered(bench, teacher, bench.choosing, "choosing-answers.json")
    for left in ([1, 2, 4], [3], list(range(DEPTH))) if kind != "tiles" else ([0, 2], [0, 1, 2]):
        found = divergences_without(bench, batches_of(bench, teacher, rows), left)
        for layer in left:
            with seeing(bench.model, [other for other in left if other != layer]):
                assert found[layer] == pytest.approx(agreement(bench, teacher, rows)["kl"], rel=1e-4, abs=1e-7)


def test_many_layers_go_at_once_and_no_size_of_the_report_is_passed_over():
    assert choosing.sizes_of(32, 8) == [1, 2, 4, 8, 16, 32] and choosing.sizes_of(5, 3) == [1, 2, 3, 4, 5]
    assert left_by_round(32, 20) == [32, 24, 20, *range(16, 0, -1)]
    assert sum(left_by_round(32, 8)[:-1]) == 32 + 24 + 18 + sum(range(2, 17)) == 209
    assert sum(left_by_round(4, 1)[:-1]) == 9


class Stop(BaseException):
    pass


def test_an_interrupted_choice_goes_on(source, tmp_path, monkeypatch):
    arguments = (source / "llava", source / "photos")
    options = {"fit": Fit(**SETTINGS, visual_layers="auto:2", distill_steps=1), "prompts": PROMPTS}
    options["log"] = lambda line: None
    calls = []

    def counted(*given):
        calls.append(given[-1])
        if len(calls) == 3:
            raise Stop
        return divergences_without(*given)

    monkeypatch.setattr(choosing, "divergences_without", counted)
    with pytest.raises(Stop):
        from_llava.from_llava(*arguments, tmp_path / "a", **options)
    report = from_llava.from_llava(*arguments, tmp_path / "a", **options)
    assert list(map(len, calls)) == [5, 4, 3, 3, 2]
    whole = from_llava.from_llava(*arguments, tmp_path / "b", **options)
    same = ("agreement", "least", "by_number", "visual_layers", "pictures")
    assert all(report[name] == whole[name] for name in same)
    a, b = (SaisaForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in b)


def test_one_work_folder_serves_any_number(source, tmp_path, monkeypatch):
    def made(visual_layers, target):
        options = {"prompts": PROMPTS, "work_folder": tmp_path / "work", "log": lambda line: None}
        fit = Fit(**SETTINGS, visual_layers=visual_layers)
        return from_llava.from_llava(source / "llava", source / "photos", tmp_path / target, fit=fit, **options)

    two = made("auto:2", "two")
    monkeypatch.setattr(choosing, "divergences_without", None)  # no layer is measured again
    three = made("auto:3", "three")
    assert three["least"] == two["least"] and three["layers"] == two["layers"]
    assert three["visual_layers"] == nested(two["least"], 3) != two["visual_layers"]
    model = SaisaForConditionalGeneration.from_pretrained(tmp_path / "three")
    seeing_layers = [index for index, layer in enumerate(model.language_model.layers) if layer.sees_image]
    assert seeing_layers == model.config.visual_layers == three["visual_layers"]
    with pytest.raises(ValueError, match=r"run with other settings \(visual_layers, weights\)"):
        made([0, 1], "given")


def test_rounds_that_differ_have_files_of_their_own():
    for one, other in itertools.product(range(1, 33), repeat=2):
        same_file = choosing.file_of_rounds(32, one) == choosing.file_of_rounds(32, other)
        assert not same_file or left_by_round(32, one) == left_by_round(32, other), (one, other)
    assert choosing.file_of_rounds(32, 8) == choosing.file_of_rounds(32, 32) != choosing.file_of_rounds(32, 20)


def run(source, target, *words):
    argv = ["build", "--from-llava", source / "llava", "--images", source / "photos", "--device", "cpu"]
    argv += ["--prompts", source / "prompts.txt"]
    return main([str(word) for word in (*argv, "--steps", 0, "--held-out", 6, *words, target)])


def test_the_command_chooses_layers_and_reports_all_numbers(source, tmp_path, capsys):
    assert (
        run(source, tmp_path / "out", "--distill", 1, "--choose-on", 4, "--pictures", 18, "--visual-layers", "auto:3")
        == 0
    )
    text = capsys.readouterr().out
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    for line in ("fitted on 8 images, layers chosen on 4 others, measured on 6 others", "each set part of the next",
                 "choosing layers: 4 of 5 left, hidden 3", "\nchosen ", "\ndistilled "):  # fmt: skip
        assert line in text, line
    assert report["pictures"] == {"fitted": 8, "held_out": 6, "skipped": [], "chosen_on": 4}
    by_number, order = report["by_number"], report["least"]
    assert [row["number"] for row in by_number] == [1, 2, 3, 4, 5] and order[:2] == [3, 2]
    for row, next_ in itertools.pairwise(by_number):
        assert set(row["layers"]) < set(next_["layers"]) and len(row["layers"]) == row["number"]
        assert row["tokens"] == next_["tokens"]
    stages = report["agreement"]
    assert list(stages) == ["copied", "fitted", "chosen", "distilled"]
    assert by_number[-1]["kl"] == pytest.approx(stages["fitted"]["kl"]) and by_number[0]["kl"] > by_number[-1]["kl"]
    assert by_number[2]["kl"] == stages["chosen"]["kl"] and by_number[1]["kl"] == pytest.approx(stages["fitted"]["kl"])
    assert report["visual_layers"] == [0, 1, 4] and len(report["layers"]) == DEPTH

    model, loading = SaisaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert model.config.visual_layers == [0, 1, 4] and not any(loading.values())
    assert [hasattr(layer, "visual_projector") for layer in model.language_model.layers] == [1, 1, 0, 0, 1]
    inputs = SaisaProcessor.from_pretrained(tmp_path / "out")(
        images=draw(99), text="<image> what?", return_tensors="pt"
    )
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


@pytest.mark.parametrize("given", [["1,3"], ["3,", "1"]])
def test_given_layers_alone_are_fitted(source, tmp_path, given, capsys):
    work = tmp_path / "work"
    assert run(source, tmp_path / "out", "--work-folder", work, "--visual-layers", *given) == 0
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert [row["layer"] for row in report["layers"]] == [1, 3] and sorted(report["visual_layers"]) == [1, 3]
    assert sorted(path.name for path in work.glob("layer-*")) == ["layer-1.json", "layer-3.json"]
    assert "by_number" not in report and list(report["agreement"]) == ["copied", "fitted"]
    model = SaisaForConditionalGeneration.from_pretrained(tmp_path / "out")
    projectors = [hasattr(layer, "visual_projector") for layer in model.language_model.layers]
    assert projectors == [False, True, False, True, False] and "layer 4 of 5: error" in capsys.readouterr().out


@torch.no_grad()
def test_the_teacher_is_the_llava_whatever_layers_see(tmp_path):
    llava = make_deep(())
    model = saisa_from_llava(llava, visual_layers=(4, 1))
    assert model.config.visual_layers == [4, 1]
    teacher = Teacher(model)
    ids = torch.randint(5, 60, (2, 30), generator=torch.Generator().manual_seed(0))
    ids[:, 3 : 3 + TOKENS] = model.config.image_token_id
    pixels = torch.cat([make_processor().image_processor(draw(n), return_tensors="pt")["pixel_values"] for n in (0, 1)])
    features = model.get_image_features(pixels).pooler_output
    expected = llava(input_ids=ids, pixel_values=pixels).logits
    torch.testing.assert_close(teacher.logits(ids, features, 9), expected[:, -9:], atol=1e-5, rtol=1e-5)
    # with only the last layer, the states of all in front of it are computed all the same
    model = saisa_from_llava(llava, visual_layers=[4])
    teacher = Teacher(model)
    bench = Workbench(
        model, processor_from_llava(make_processor(), model.config), [draw(n) for n in range(9)], tmp_path,
        Fit(**SETTINGS, visual_layers=[4]), PROMPTS, log=lambda line: None,
    )  # fmt: skip
    (row,) = fit_projectors(bench, teacher)
    assert row["layer"] == 4 and row["fitted"]["keys"] < row["copied"]["keys"]
    ids = torch.tensor([bench.ids(0, 3)])
    expected = llava(input_ids=ids, **bench.images([3]), output_hidden_states=True).hidden_states[4]
    found = bench.rows(VisualStates(bench, teacher).at(4), [3])
    torch.testing.assert_close(found, expected[ids == model.config.image_token_id], atol=1e-5, rtol=1e-5)


def test_the_option_serves_both_ways_and_leaves_paths_alone():
    def parsed(*words):
        arguments = make_parser().parse_args(["build", *words])
        build._check(arguments)
        return arguments.paths, arguments.visual_layers

    parts, vica = ["llm", "vit", "out"], [0, 1, 7, 8, 9, 10, 11, 14]
    for given, layers in ((["0,2"], [0, 2]), (["0", "2"], [0, 2]), (["0 2"], [0, 2]), (["vica-7b"], vica)):
        assert parsed(*parts, "--visual-layers", *given) == (parts, layers)
        assert parsed("--visual-layers", *given, *parts) == (parts, layers)
        assert parsed("llm", "vit", "--visual-layers", *given, "out") == (parts, layers)
        assert parsed("--visual-layers", *given, "llm", "--seed", "1", "vit", "out") == (parts, layers)
    llava = ["--from-llava", "x", "--images", "y"]
    assert parsed(*llava, "--visual-layers", "auto:8", "out") == (["out"], "auto:8")
    assert parsed(*llava, "out", "--visual-layers", "auto:8") == (["out"], "auto:8")
    assert parsed(*parts) == (parts, None)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--visual-layers", "auto:9"], "visual_layers='auto:9': {source}/llava has 5 layers, choose at most 5."),
        (["--visual-layers", "auto:0"], "visual_layers='auto:0': expected a list of layers, or 'auto:8'"),
        (["--visual-layers", "auto:"], "visual_layers='auto:': expected a list of layers"),
        (["--visual-layers", "0,9"], "visual_layers=[0, 9]: expected a list of distinct layers between 0 and 4"),
        (["--visual-layers", "1", "1"], "visual_layers=[1, 1]: expected a list of distinct layers"),
        (["--visual-layers", "vica-7b"], "expected a list of distinct layers between 0 and 4"),
        (["--visual-layers", "0,,2"], "expected layers like 0,1,7, or auto:8, or vica-7b, vica-13b, vica-2.7b, got '0,,2'"),
        (["--choose-on", 3, "--visual-layers", "1"], "--choose-on only goes with --visual-layers auto:8"),
        (["--visual-layers", "most"], "or vica-7b, vica-13b, vica-2.7b, got 'most'"),
        (["--visual-layers", "auto:2", "--pictures", 2], "2 of the images can be read, and at least 3 are needed: one to "
         "fit on, one to choose layers on, one to measure on"),
    ],
)  # fmt: skip
def test_wrong_layers_are_refused(source, tmp_path, capsys, words, message):
    try:
        status = run(source, tmp_path / "out", *words)
    except SystemExit as error:
        status = error.code
    assert status == 2 and message.format(source=source) in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.work").exists()


def test_layers_are_not_chosen_for_a_model_from_parts(capsys):
    with pytest.raises(SystemExit):
        main(["build", "llm", "vit", "out", "--visual-layers", "auto:8"])
    assert "--visual-layers auto:8 only goes with --from-llava" in capsys.readouterr().err
    with pytest.raises(ValueError, match="choose_on=0"):
        Fit(choose_on=0)
