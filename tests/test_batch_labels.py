# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Labels that are put into a processor's batch ask visual tokens for nothing."""

import copy
import pickle

import numpy as np
import pytest
import torch
from tiny_models import IMAGE_TOKEN, tiny_model
from training_parts import picture, processor_for

from saisa_hf.processing_saisa import SaisaBatch


CONTAINERS = {
    "tensors": torch.tensor,
    "arrays": np.array,
    "lists": lambda rows: rows,
}


def rows_of(seed):
    """Random token ids with images in them, and random labels, some of which are -100."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(90, 97, (3, 11), generator=generator).tolist()
    labels = torch.randint(5, 96, (3, 11), generator=generator)
    return ids, labels.masked_fill(torch.rand(3, 11, generator=generator) < 0.2, -100).tolist()


def asked_of_text(ids, labels):
    """The labels again, by going through them one by one."""
    found = []
    for row, wanted in zip(ids, labels):
        visual = [i == IMAGE_TOKEN for i in row]
        found.append([-100 if visual[s] or (s and visual[s - 1]) else wanted[s] for s in range(len(row))])
    return found


def batch_of(ids):
    batch = SaisaBatch({"input_ids": ids})
    batch.image_token_id = IMAGE_TOKEN
    return batch


@pytest.mark.parametrize("kind", CONTAINERS)
@pytest.mark.parametrize("seed", range(5))
def test_labels_are_minus_100_at_placeholders_and_behind_them(kind, seed):
    ids, labels = rows_of(seed)
    batch, given = batch_of(CONTAINERS[kind](ids)), CONTAINERS[kind](copy.deepcopy(labels))
    batch["labels"] = given
    found = batch["labels"]
    assert type(found) is type(given)
    assert (found if kind == "lists" else found.tolist()) == asked_of_text(ids, labels) != labels
    assert (given if kind == "lists" else given.tolist()) == labels  # what was given is left alone
    again = batch["labels"] = batch["labels"]
    assert again is batch["labels"] or kind == "lists"


@pytest.mark.parametrize("of_ids", CONTAINERS)
def test_labels_of_another_container_than_the_ids(of_ids):
    ids, labels = rows_of(1)
    ragged = [ids[0][:4], ids[1], ids[2][:7]]
    for wrapped in (torch.tensor(labels), np.array(labels), labels):
        batch = batch_of(CONTAINERS[of_ids](ids))
        batch["labels"] = wrapped
        assert type(batch["labels"]) is type(wrapped)
        assert np.asarray(batch["labels"]).tolist() == asked_of_text(ids, labels)
    for kind in (torch.tensor, np.array, list):
        batch = batch_of(ragged if of_ids == "lists" else CONTAINERS[of_ids](ids))
        rows = [kind(labels[i][: len(batch["input_ids"][i])]) for i in range(3)]
        batch["labels"] = rows
        assert [type(row) for row in batch["labels"]] == [type(row) for row in rows]
        expected = asked_of_text(ragged if of_ids == "lists" else ids, labels)
        assert [list(map(int, row)) for row in batch["labels"]] == expected


@pytest.mark.parametrize("labels", [
    torch.tensor([1, 0, 1]), [1, 0, 1], ["cat", "dog", "cow"], None, torch.zeros(3, 11, 2), [[1], [2, 3], []], 7, [],
    np.zeros((3, 5)),
], ids=repr)  # fmt: skip
def test_labels_of_another_form_are_kept(labels):
    batch = batch_of(torch.tensor(rows_of(0)[0]))
    batch["labels"] = labels
    assert batch["labels"] is labels or batch["labels"] == labels


def test_the_batches_of_a_processor_do_so():
    processor = processor_for("chatml")
    text = ["a<image>b<image>", "<image>c"]
    batch = processor(images=[picture()] * 3, text=text, padding=True, return_tensors="pt")
    ids = batch["input_ids"]
    unpickled = pickle.loads(pickle.dumps(batch))
    for changed in (batch, copy.copy(batch), copy.deepcopy(batch), batch.to("cpu"), unpickled):
        changed.update(labels=ids.clone())
        assert changed["labels"].tolist() == asked_of_text(ids.tolist(), ids.tolist())
        assert changed.keys() == batch.keys() and vars(changed).keys() == vars(batch).keys()

    plain = processor(text="abc")
    plain["labels"] = plain["input_ids"]
    assert plain["labels"] == plain["input_ids"]
    pixels = processor(images=picture(), return_tensors="pt")
    pixels["labels"] = torch.tensor([3])
    assert pixels["labels"].tolist() == [3]

    chat = [
        {"role": "user", "content": [{"type": "image", "image": picture()}]},
        {"role": "assistant", "content": "Yes"},
    ]
    batch = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt")
    batch["labels"] = batch["input_ids"]
    assert batch["labels"].tolist() == asked_of_text(batch["input_ids"].tolist(), batch["input_ids"].tolist())


def test_a_batch_with_visual_states_does_so():
    processor, model = processor_for(), tiny_model()
    states = model.get_visual_states(processor(images=[picture()], return_tensors="pt")["pixel_values"])
    batch = processor(text="a<image>b", visual_states=states, return_tensors="pt")
    batch["labels"] = batch["input_ids"]
    assert batch["labels"].ne(-100).sum() == 1
    assert batch.to(torch.float32)["visual_states"].lengths == [4]
