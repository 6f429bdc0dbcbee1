"""A thousand requests in one engine of vLLM: no answer that differs from its twin alone, and no growth of memory."""

import random

import pytest


pytest.importorskip("vllm")

import psutil
import vllm_parts as parts
from vllm import SamplingParams
from vllm_engine import Engine, assert_equal, greedy


@pytest.mark.slow
def test_a_thousand_requests(tmp_path):
    chooser, process = random.Random(0), psutil.Process()
    checkpoint = parts.make_checkpoint(tmp_path)
    cases = parts.answer(parts.random_cases(40), checkpoint, 8)
    engine, sizes = Engine(checkpoint, max_num_seqs=8, max_num_batched_tokens=60), []
    try:
        for _ in range(10):
            chosen = chooser.choices(cases, k=100)
            others = [SamplingParams(temperature=1.0, n=2, max_tokens=chooser.randint(1, 12)) for _ in chosen]
            kinds = [greedy(8) if chooser.random() < 0.7 else other for other in others]
            outputs = engine.answers(chosen, kinds)
            compared = [n for n, kind in enumerate(kinds) if kind.temperature == 0]
            assert_equal([chosen[n] for n in compared], [outputs[n] for n in compared])
            sizes.append(process.memory_info().rss / 2**20)
        assert sizes[-1] - sizes[3] < 20, sizes
        assert engine.model._pending is None and not engine.scheduler.running
    finally:
        engine.close()
