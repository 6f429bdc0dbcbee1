"""The runs of text in a step of a serving engine, beside the mask that they stand for. These need no vLLM."""

import random

import pytest
import torch

from saisa_hf.serving.vllm.runs import runs_of


def random_step(seed):
    """(query_start, seq_lens, visual, for each row its request and position) of requests in any phase."""
    chooser = random.Random(seed)
    starts, seq_lens, visual, rows = [0], [], [], []
    for request in range(chooser.randint(1, 5)):
        cached, length = chooser.choice([0, 0, chooser.randint(1, 40)]), chooser.choice([1, 1, chooser.randint(1, 30)])
        likely = chooser.choice([0.0, 0.3, 0.5, 1.0])
        kind = chooser.random() < likely
        for position in range(cached, cached + length):
            kind = kind if chooser.random() < 0.7 else chooser.random() < likely
            visual.append(kind)
            rows.append((request, position))
        starts.append(len(rows))
        seq_lens.append(cached + length)
    return torch.tensor(starts), torch.tensor(seq_lens), torch.tensor(visual), rows


@pytest.mark.parametrize("seed", range(60))
def test_runs_see_what_the_mask_shows(seed):
    starts, seq_lens, visual, rows = random_step(seed)
    runs = runs_of(starts, seq_lens, visual)
    assert runs.text_rows.tolist() == [n for n in range(len(rows)) if not visual[n]]
    seen = {}  # text row -> (request, how many of its tokens are in view)
    for r, request in enumerate(runs.request.tolist()):
        first, end = runs.query_start[r].item(), runs.query_start[r + 1].item()
        for query, row in enumerate(runs.text_rows[first:end].tolist()):
            # causal attention aligned to the bottom right
            seen[row] = request, int(runs.seq_lens[r]) - (end - first - 1 - query)
    assert seen == {n: (request, position + 1) for n, (request, position) in enumerate(rows) if not visual[n]}


@pytest.mark.parametrize("seed", range(20))
def test_a_run_ends_at_each_image_and_nowhere_else(seed):
    starts, seq_lens, visual, rows = random_step(seed)
    expected = sum(
        not visual[n] and (n == 0 or bool(visual[n - 1]) or rows[n - 1][0] != rows[n][0]) for n in range(len(rows))
    )
    assert len(runs_of(starts, seq_lens, visual)) == expected


def test_decoding_requests_are_runs_of_one_row():
    runs = runs_of(torch.tensor([0, 1, 2, 3]), torch.tensor([7, 12, 5]), torch.zeros(3, dtype=torch.bool))
    assert runs.query_start.tolist() == [0, 1, 2, 3] and runs.seq_lens.tolist() == [7, 12, 5]
    assert runs.request.tolist() == [0, 1, 2] and runs.longest == 1


def test_a_step_of_visual_rows_alone_has_no_run():
    runs = runs_of(torch.tensor([0, 4]), torch.tensor([9]), torch.ones(4, dtype=torch.bool))
    assert len(runs) == 0 and runs.query_start.tolist() == [0]


def test_padding_behind_the_rows_and_requests_without_rows_are_left_out():
    visual = torch.tensor([False, True, False, True, True])
    runs = runs_of(torch.tensor([0, 3, 3]), torch.tensor([3, 0, 9]), visual)
    assert runs.text_rows.tolist() == [0, 2] and runs.request.tolist() == [0, 0] and runs.seq_lens.tolist() == [1, 3]


@pytest.mark.parametrize("most", [1, 2, 3, None])
def test_parts_are_the_same_runs_in_the_same_order(most):
    starts, seq_lens, visual, _ = random_step(3)
    runs = runs_of(starts, seq_lens, visual)
    parts = runs.parts(most)
    assert all(len(part) <= (most or len(runs)) for part in parts)
    assert torch.cat([part.text_rows for part in parts]).equal(runs.text_rows)
    assert torch.cat([part.seq_lens for part in parts]).equal(runs.seq_lens)
    assert torch.cat([part.request for part in parts]).equal(runs.request)
    assert torch.cat([part.query_start.diff() for part in parts]).equal(runs.query_start.diff())
    assert all(part.query_start[0] == 0 and part.query_start[-1] == len(part.text_rows) for part in parts)


def test_marks_that_do_not_fit_the_rows_are_an_error():
    with pytest.raises(ValueError, match=r"3 rows .* with 2 marks"):
        runs_of(torch.tensor([0, 3]), torch.tensor([3]), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="no more rows than tokens"):
        runs_of(torch.tensor([0, 3]), torch.tensor([2]), torch.zeros(3, dtype=torch.bool))
