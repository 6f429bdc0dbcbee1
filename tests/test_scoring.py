# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Scores: equal to those of the benchmarks' own scripts, answer by answer (see tests/fixtures/official_scores.md)."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from saisa_hf.scoring import get_metric, m4c_answer, metric_names
from saisa_hf.scoring.texts import edits


OFFICIAL = json.loads((Path(__file__).parent / "fixtures" / "official_scores.json").read_text())["sets"]
ABOUT = {"abs": 1e-8}  # the VQA evaluation was asked for ten decimals


def scored(name: str, of: str | None = None):
    """For a metric: its results, its summary, and what is official."""
    one = OFFICIAL[of or name]
    metric = get_metric(name)
    questions, answers = zip(*one["asked"])
    results = [metric.question(question, answer) for question, answer in zip(questions, answers)]
    assert json.loads(json.dumps(results)) == results  # of JSON's types
    return results, metric.summary(questions, results), one["official"][name]


def hundred_times(results) -> list[float]:
    return [100 * result["score"] for result in results]


def scores(part: dict) -> dict:
    return {value: told["score"] for value, told in part.items()}


@pytest.mark.parametrize("name", ["vqa_accuracy", "textvqa_accuracy", "vizwiz_accuracy"])
def test_agreement_with_annotators_is_the_official_one(name):
    results, summary, official = scored(name, "vqa")
    assert len(results) == 300 and len({result["score"] for result in results}) > 5
    assert hundred_times(results) == pytest.approx(official["scores"], **ABOUT)
    assert summary["score"] == pytest.approx(official["score"], **ABOUT)
    if "read" in official:
        assert [result["read"] for result in results] == official["read"]
    for field, parts in official.get("by", {}).items():
        assert scores(summary["by"][field]) == pytest.approx(parts, **ABOUT)
    for key in ("unanswerable_f1", "unanswerable_average_precision"):
        assert summary.get(key) == pytest.approx(official.get(key), **ABOUT)


def test_gqa_is_the_official_one():
    results, summary, official = scored("gqa")
    assert [result["read"] for result in results] == official["read"]
    printed = {"accuracy": "score"} | {name: name for name in ("consistency", "validity", "plausibility")}
    for theirs, ours in printed.items():
        assert round(summary[ours], 2) == official[theirs]
    assert {kind: round(part["score"], 2) for kind, part in summary["by"]["answers"].items()} == {
        kind: official[kind] for kind in ("binary", "open")
    }
    for kind, parts in official["parts"].items():
        assert {
            value: [round(part["score"], 2), part["questions"]] for value, part in summary["by"][kind].items()
        } == parts


def test_pope_is_the_official_one():
    results, summary, official = scored("pope")
    assert [result["read"] for result in results] == official["read"]
    for split, wanted in official["by"].items():
        part = summary["by"]["category"][split]
        assert {key: part[key] for key in wanted} == pytest.approx(wanted, **ABOUT)
        assert part["questions"] == 100
    assert summary["score"] == pytest.approx(sum(part["f1"] for part in official["by"].values()) / 3)


def test_mme_is_the_official_one():
    results, summary, official = scored("mme")
    assert [result["read"] for result in results] == official["read"]
    assert scores(summary["by"]["category"]) == pytest.approx(official["tasks"])
    sums = [official["perception"], official["cognition"]]
    assert [summary["perception"], summary["cognition"], summary["score"]] == pytest.approx([*sums, sum(sums)])


def test_scienceqa_is_the_official_one():
    results, summary, official = scored("scienceqa")
    read = ["ABCDE".index(result["read"]) if result["read"] else -1 for result in results]
    assert read == official["read"]
    assert sum(result["score"] for result in results) == official["correct"]
    assert summary["score"] == pytest.approx(official["score"])
    assert round(summary["image_score"], 2) == official["image_score"] and 0 < summary["image_questions"] < 300


def test_seed_bench_is_the_official_one():
    _, summary, official = scored("seed_bench")
    assert round(summary["score"], 2) == official["score"]
    for field in ("data_type", "question_type_id"):
        assert {kind: round(part["score"], 2) for kind, part in summary["by"][field].items()} == official[field]


def test_mmbench_is_the_official_one():
    results, summary, official = scored("mmbench")
    assert [result["read"] for result in results] == official["read"]
    assert summary["questions"] == len(official["hits"]) < summary["asked"] == len(results)
    assert summary["score"] * summary["questions"] == pytest.approx(100 * sum(official["hits"].values()))
    assert summary["score"] == pytest.approx(official["score"])
    for field, parts in official["by"].items():
        assert scores(summary["by"][field]) == pytest.approx(parts)


def test_options_are_read_as_officially_with_up_to_six_of_them():
    results, _, official = scored("multiple_choice", "choice")
    assert [result["read"] for result in results] == official["read"]
    assert len({result["read"] for result in results}) == 8  # A to F, Z and none


@pytest.mark.parametrize("name", ["anls", "relaxed_accuracy"])
def test_comparison_of_texts_is_the_official_one(name):
    results, summary, official = scored(name, "texts")
    assert hundred_times(results) == pytest.approx(official["scores"], **ABOUT)
    assert summary["score"] == pytest.approx(official["score"]) and 10 < summary["score"] < 90


def test_the_likeliest_option():
    metric = get_metric("multiple_choice_likelihood")
    questions = [
        {"choices": ["cat", "elephant"], "answer": 1},
        {"choices": {"A": "cat", "B": "elephant"}, "answer": "A"},
    ]
    results = [metric.question(question, [-3.0, -4.0]) for question in questions]
    assert results == [
        {"score": 0.0, "read": "A", "normalised": 1.0},
        {"score": 1.0, "read": "A", "normalised": 0.0},
    ]
    assert metric.summary(questions, results)["normalised"] == 50.0
    for answer in ([-3.0], "A", [-3.0, float("nan")], [-3.0, None]):
        with pytest.raises(ValueError, match="a list with the log-likelihood of each option"):
            metric.question(questions[0], answer)


def test_exact_match_ignores_case_and_white_space_around():
    metric = get_metric("exact_match")
    for answers, answer, score in (("Two", " two\n", 1), (["one", "two"], "TWO", 1), ([{"answer": "two"}], "two.", 0)):
        assert metric.question({"answers": answers}, answer)["score"] == score


def test_edit_distance():
    for one, other, wanted in (
        ("", "", 0),
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("ab", "ba", 2),
        ("日本", "日", 1),
    ):
        assert edits(one, other) == edits(other, one) == wanted


def test_consistency_and_categories_are_told_only_where_the_fields_are_there():
    questions = [{"answer": "yes"}, {"answer": "no"}]
    metric = get_metric("gqa")
    summary = metric.summary(questions, [metric.question(question, "Yes.") for question in questions])
    assert summary == {"metric": "gqa", "questions": 2, "score": 50.0, "unit": "%", "headline": "accuracy"}
    asked = [{"id": 1, "answer": "yes", "entailed": [2]}]
    assert "consistency" not in metric.summary(asked, [metric.question(asked[0], "yes")])


GOOD = {
    "exact_match": {"answers": "a"},
    "anls": {"answers": ["a"]},
    "relaxed_accuracy": {"answers": ["1"]},
    **{f"{of}_accuracy": {"answers": ["a"] * 10} for of in ("vqa", "vizwiz", "textvqa")},
    **{
        name: {"choices": ["a", "b"], "answer": 1}
        for name in ("multiple_choice", "multiple_choice_likelihood", "scienceqa")
    },
    "gqa": {"answer": "a"},
    "pope": {"label": "yes"},
    "mme": {"answer": "Yes", "category": "count", "image": "1.jpg"},
    "mmbench": {"choices": {"A": "a", "B": "b"}, "answer": "B", "index": 3},
    "seed_bench": {"answer": "B"},
}
BAD = [
    None,
    0,
    7,
    -1,
    True,
    "",
    "x",
    [],
    [""],
    [None],
    ["a"] * 3,
    [["a"] * 10],
    {},
    {"a": 1},
    {"A": None},
    {"AA": "x"},
    1.5,
]


@pytest.mark.parametrize("name", metric_names())
def test_a_question_that_cannot_be_scored_is_named(name):
    """Each field in turn is left out, or of a wrong kind: an error that names it, or a score from 0 to 1."""
    metric, good = get_metric(name), GOOD[name]
    metric.check(good)
    assert set(good) == set(metric.needs) and metric.source and set(metric.groups) <= set(metric.uses)
    likely = name == "multiple_choice_likelihood"
    refused = 0
    for field in good:
        with pytest.raises(ValueError, match=f"question 7 has no '{field}', which {name} needs"):
            metric.check({key: value for key, value in good.items() if key != field}, "question 7")
        for value in BAD:
            question = {**good, field: value}
            try:
                result = metric.question(question, [0.0, 1.0] if likely else "b")
            except ValueError as error:
                refused += 1
                assert f"{name} needs" in str(error) or f"an answer for {name} is" in str(error)
            else:
                assert 0 <= result["score"] <= 1
    assert refused >= 5
    for field in metric.uses:
        for value in [*BAD, {"structural": 1, "semantic": "x"}, [{"operation": "x"}], [1]]:
            question, answer = {**good, field: value}, [0.0, 1.0] if likely else "b"
            try:
                result = metric.question(question, answer)
            except ValueError as error:
                assert f"{field}=" in str(error) and f"{name} expects {metric.uses[field]}" in str(error)
            else:
                try:
                    assert 0 <= metric.summary([question], [result])["score"] <= 100
                except ValueError as error:
                    assert name == "mme" and "has 1 questions: expected two" in str(error)
    for answer in (None, 3, ["a"], b"a"):
        with pytest.raises(ValueError, match=f"an answer for {name} is a"):
            metric.question(good, answer)
    for results in ([], [{"score": 1.0}]):
        with pytest.raises(ValueError, match=f"{name}: {len(results)} results for 0 questions"):
            metric.summary([], results)


def test_mme_without_one_question_of_a_pair_is_an_error():
    metric = get_metric("mme")
    with pytest.raises(ValueError, match=r"image '1\.jpg' of count has 1 questions: expected two"):
        metric.summary([GOOD["mme"]], [metric.question(GOOD["mme"], "yes")])


def test_an_unknown_metric_is_an_error_that_lists_them():
    with pytest.raises(
        ValueError, match=r"metric 'vqa_acuracy' is not known. Did you mean 'vqa_accuracy'\? Known are: exact_match"
    ):
        get_metric("vqa_acuracy")
    for name in (None, 3, [], ""):
        with pytest.raises(ValueError, match=r"is not known\. Known are"):
            get_metric(name)


def test_what_llava_submits():
    assert m4c_answer("The dog's ball, 2 balls?") == "dog 's ball 2 balls"


def test_scoring_imports_neither_torch_nor_transformers():
    code = (
        "import sys, saisa_hf.scoring as s; s.get_metric('pope'); print({'torch', 'transformers'} & set(sys.modules))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "set()"
