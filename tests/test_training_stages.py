"""The step between the paper's two stages, what a stage trains, and the loss that makes logits for labelled rows alone."""

import os

import pytest
import torch
from tiny_models import IMAGE_TOKEN, PAD, random_prompts, tiny_config, tiny_model
from torch import nn
from transformers import AutoModelForImageTextToText

from saisa_hf import SaisaForConditionalGeneration
from saisa_hf.head_saisa import chunked_cross_entropy
from saisa_hf.training import freeze_all_but


# --- from a shared projector to one for each layer ---


@pytest.mark.parametrize("arguments", [{}, {"visual_layers": [0, 2]}], ids=str)
@pytest.mark.parametrize("text", ["llama", "olmo2"])
def test_unshared_projectors_compute_what_the_shared_one_did_to_the_last_bit(text, arguments):
    model, prompts = tiny_model(text, projector_sharing="shared", **arguments), random_prompts()
    before = model(**prompts.inputs).logits
    model.unshare_projectors()
    assert torch.equal(model(**prompts.inputs).logits, before)
    owners = {name.split(".visual_projector")[0] for name, _ in model.named_parameters() if "visual_projector" in name}
    assert owners == {f"model.language_model.layers.{i}" for i in arguments.get("visual_layers", range(3))}


def test_unshared_projectors_are_copies_that_learn_apart():
    model = tiny_model(projector_sharing="shared")
    model.unshare_projectors()
    first, second = (layer.visual_projector.linear_1.weight for layer in model.language_model.layers[:2])
    assert first.data_ptr() != second.data_ptr()
    assert set(model.state_dict()) == set(tiny_model().state_dict())


def test_an_unshared_model_is_saved_and_loaded_as_one_with_a_projector_per_layer(tmp_path):
    model, prompts = tiny_model(projector_sharing="shared"), random_prompts()
    model.unshare_projectors()
    model.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.config.projector_sharing == "per_layer"
    assert torch.equal(again(**prompts.inputs).logits, model(**prompts.inputs).logits)


def test_projectors_are_unshared_once():
    with pytest.raises(ValueError, match="'per_layer', expected 'shared'"):
        tiny_model().unshare_projectors()


def test_a_model_on_the_meta_device_is_unshared_too():
    with torch.device("meta"):
        model = SaisaForConditionalGeneration(tiny_config(projector_sharing="shared"))
    model.unshare_projectors()
    assert all(p.is_meta for p in model.parameters())


# --- what is trained ---


@pytest.mark.parametrize("sharing", ["shared", "per_layer"])
def test_each_choice_trains_what_its_name_says(sharing):
    model = tiny_model(projector_sharing=sharing)
    names = {name for name, _ in model.named_parameters()}
    projectors = {name for name in names if "visual_projector." in name}
    encoder = {name for name in names if name.startswith("model.vision_tower.")}
    expected = {"projectors": projectors, "projectors+language_model": names - encoder, "all": names}
    for choice, wanted in expected.items():
        assert set(freeze_all_but(model, choice)) == wanted
        assert {name for name, p in model.named_parameters() if p.requires_grad} == wanted
    with pytest.raises(ValueError, match="'projector': expected 'projectors'"):
        freeze_all_but(model, "projector")


# --- the loss ---


def labelled(prompts):
    """Labels on two thirds of the text tokens, in no order."""
    labels = prompts.input_ids.masked_fill((prompts.input_ids == IMAGE_TOKEN) | (prompts.input_ids == PAD), -100)
    return labels.masked_fill(torch.rand(labels.shape, generator=torch.Generator().manual_seed(0)) < 0.33, -100)


def gradients(model, **arguments):
    model.zero_grad()
    outputs = model(**arguments)
    outputs.loss.backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("count", [None, 11, torch.tensor(11)], ids=str)
@pytest.mark.parametrize("text", ["llama", "qwen2", "gemma2", "granite"])
def test_loss_and_gradients_without_logits_equal_those_with(text, count, monkeypatch):
    monkeypatch.setattr(chunked_cross_entropy, "__defaults__", (None, 97 * 3))
    model, prompts = tiny_model(text), random_prompts()
    batch = {**prompts.inputs, "labels": labelled(prompts)} | ({} if count is None else {"num_items_in_batch": count})
    plain, wanted = gradients(model, **batch)
    lean, found = gradients(model, **batch, skip_logits=True)
    assert lean.logits is None and plain.logits is not None
    assert abs(lean.loss - plain.loss) < 1e-6 * abs(plain.loss)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        # sums in another order: what they round off adds up on the way back through the model
        assert (found[name] - gradient).abs().max() <= 3e-6 * max(1.0, gradient.abs().max()), name


def test_the_head_meets_labelled_rows_alone_and_few_at_a_time():
    seen, head = [], nn.Linear(8, 50, bias=False)

    def watched(rows):
        seen.append(len(rows))
        return head(rows)

    hidden, targets = torch.randn(2, 20, 8, requires_grad=True), torch.full((2, 20), -100)
    targets[0, 3:10], targets[1, 5] = 4, 7
    chunked_cross_entropy(hidden, targets, watched, 50, logits_at_once=150).backward()
    assert seen == [3, 3, 2, 2, 3, 3]  # forward in order, and again in backward
    assert hidden.grad[0, 3:10].abs().min() > 0 and hidden.grad[0, 10:].abs().max() == 0


def test_nothing_to_learn_is_a_loss_of_zero_that_reaches_every_weight():
    head, hidden = nn.Linear(8, 50), torch.randn(4, 8, requires_grad=True)
    loss = chunked_cross_entropy(hidden, torch.full((4,), -100), head, 50)
    loss.backward()
    assert loss == 0 and head.weight.grad.abs().max() == 0 and hidden.grad.abs().max() == 0


@pytest.mark.parametrize("alignment", ["input_space", "embedding_space"])
@pytest.mark.parametrize("count", [None, 0, 7, torch.tensor(0), torch.tensor(7)], ids=str)
@pytest.mark.parametrize("skip_logits", [False, True])
def test_where_no_label_counts_the_loss_is_zero_and_so_is_every_gradient(skip_logits, count, alignment):
    model, prompts = tiny_model(alignment=alignment), random_prompts()
    arguments = {**prompts.inputs, "skip_logits": skip_logits} | (
        {} if count is None else {"num_items_in_batch": count}
    )
    _, reached = gradients(model, labels=labelled(prompts), **arguments)
    none = torch.full_like(prompts.input_ids, -100)
    model.zero_grad()
    outputs, found = gradients(model, labels=none, **arguments)
    assert outputs.loss == 0 and outputs.loss.dtype == torch.float32
    assert found.keys() == reached.keys() and not any(gradient.any() for gradient in found.values())


@pytest.mark.parametrize("skip_logits", [False, True])
def test_a_part_of_a_batch_without_labels_adds_nothing(skip_logits):
    model, prompts = tiny_model(), random_prompts()
    labels = labelled(prompts)
    arguments = {**prompts.inputs, "skip_logits": skip_logits, "num_items_in_batch": torch.tensor(5)}
    whole, wanted = gradients(model, labels=labels, **arguments)
    model.zero_grad()
    parts = [model(labels=x, **arguments).loss for x in (labels, torch.full_like(labels, -100))]
    sum(parts).backward()
    assert sum(parts) == whole.loss
    assert all(torch.equal(p.grad, wanted[name]) for name, p in model.named_parameters() if p.grad is not None)


def one_of_two_processes(rank: int, store: str, skip_logits: bool, folder: str):
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    model, prompts = tiny_model(), random_prompts()
    model.model.vision_tower.requires_grad_(False)
    labels = labelled(prompts) if rank == 0 else torch.full_like(prompts.input_ids, -100)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    for _ in range(2):  # the second pass finds out whether the first one met all parameters
        model.zero_grad()
        parallel(**prompts.inputs, labels=labels, skip_logits=skip_logits).loss.backward()
    torch.save({name: p.grad for name, p in model.named_parameters()}, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    os._exit(0)  # taking the process group apart can wait for a thread that waits for Python's lock


@pytest.mark.parametrize("skip_logits", [False, True])
def test_a_process_without_labels_keeps_step_with_the_others(skip_logits, tmp_path):
    arguments = (str(tmp_path / "store"), skip_logits, str(tmp_path))
    torch.multiprocessing.spawn(one_of_two_processes, arguments, nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    model, prompts = tiny_model(), random_prompts()
    _, wanted = gradients(model, **prompts.inputs, labels=labelled(prompts), skip_logits=skip_logits)
    for name, gradient in first.items():
        if "vision_tower" not in name:
            assert torch.equal(gradient, second[name])
            torch.testing.assert_close(gradient, wanted[name] / 2)  # the mean of the two processes


def test_without_labels_there_are_logits_whatever_is_asked():
    model, prompts = tiny_model(), random_prompts()
    assert torch.equal(model(**prompts.inputs, skip_logits=True).logits, model(**prompts.inputs).logits)
