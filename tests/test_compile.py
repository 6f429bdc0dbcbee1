# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Compiled forward passes over prompts with pictures: where the graph breaks, and how often it is made again."""

import pytest
import torch
import transformers
from tiny_models import BOS, IMAGE_TOKEN, prompts_from_rows, tiny_model


pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="the same on every release: runs under 5.x")


def prompt(samples, length):
    """As many samples with a picture and `length` text tokens each."""
    return prompts_from_rows([[BOS, 5, "image", *range(6, 4 + length)] for _ in range(samples)], seed=length).prompt


def warm(model):
    """At the first call of an encoder transformers 5 does, under a lock, what no graph can hold."""
    with torch.no_grad():
        model(**prompt(1, 5))
    return model


@pytest.fixture
def graphs():
    """Sizes of the graphs compiled so far, and a backend for `torch.compile` that runs them as they are."""
    torch._dynamo.reset()
    sizes = []

    def backend(graph, inputs):
        sizes.append(len(graph.graph.nodes))
        return graph.forward

    yield sizes, backend
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "uneven",
    [
        pytest.param(False, id="pictures at the same places"),
        pytest.param(True, id="pictures anywhere", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_prefill_has_one_graph_for_all_layers(graphs, uneven):
    """Where text and pictures stand is found out between two graphs: in the model, and once more in front of the head."""
    sizes, backend = graphs
    model = warm(tiny_model().eval())
    compiled = torch.compile(model, backend=backend)
    made = []
    for samples, length in ((2, 8), (2, 11), (2, 14), (2, 9)):
        inputs = {**prompt(samples, length), "use_cache": False}
        if uneven:
            inputs["input_ids"][1] = inputs["input_ids"][1].roll(1)
        with torch.no_grad():
            assert torch.allclose(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5)
        made.append(len(sizes))
    encoder, decoder, *rest = sizes[:3]
    assert made[0] == 3 and decoder > 2 * encoder and max(rest) < encoder
    assert made[1] > made[0] and made[1:] == [made[1]] * 3, (
        "the second length makes them again for any length, the third not"
    )


def test_a_compiled_training_step_has_the_gradients_of_the_plain_one(graphs):
    sizes, backend = graphs
    model = warm(tiny_model()).train()
    compiled = torch.compile(model, backend=backend)
    inputs = prompt(2, 9)
    inputs["labels"] = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE_TOKEN, -100)
    inputs["labels"][:, 6] = -100

    def gradients(run):
        model.zero_grad()
        run(**inputs, use_cache=False, skip_logits=True).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    plain = gradients(model)
    for name, gradient in gradients(compiled).items():
        assert torch.allclose(gradient, plain[name], atol=1e-6), name
    encoder, decoder, *rest = sizes  # the rest: in front of the head, and the loss of the rows that have labels
    assert decoder > 2 * encoder and max(rest) < encoder / 4
