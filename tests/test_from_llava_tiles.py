# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""A LLaVA-NeXT and a LLaVA-OneVision become SAISAs that read their tiles."""

import copy
import json

import pytest
import torch
from tile_parts import (
    CHAT_TEMPLATE,
    MAKERS,
    TOKENIZER,
    close,
    draw,
    our_processor,
    random_sizes,
)

from saisa_hf import SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.checkpoints.from_llava import Fit, Teacher, Workbench, answered, processor_from_llava, saisa_from_llava
from saisa_hf.checkpoints.from_llava.fitting import LayerFit
from saisa_hf.checkpoints.from_llava.states import VisualStates
from saisa_hf.cli import main
from saisa_hf.tiles_saisa import NEWLINE


QUICK = Fit(pictures=40, held_out=10, steps=80, batch_tokens=128, answer_tokens=4)
both = pytest.mark.parametrize("kind", MAKERS)
PICTURES = [draw(number, size) for number, size in enumerate(random_sizes(QUICK.pictures, most=60))]


def make_bench(kind, folder, pictures=PICTURES, **settings):
    llava, theirs = (make() for make in MAKERS[kind])
    model = saisa_from_llava(llava, tiles=settings.get("tiles", True))
    processor, teacher = processor_from_llava(theirs, model.config), Teacher.of(model, llava)
    fit = Fit(**vars(QUICK) | settings)
    options = {"log": lambda line: None, "embed": teacher.embed}
    return llava, teacher, Workbench(model, processor, pictures, folder, fit, ["list the digits.", "what?"], **options)


@both
@torch.no_grad()
def test_the_teacher_is_the_llava_with_its_tiles_in_every_layer(kind, tmp_path):
    llava, teacher, bench = make_bench(kind, tmp_path, PICTURES[:12])
    states = VisualStates(bench, teacher)
    found = [states.at(index).clone() for index in range(3)]
    rows = answered(bench, teacher, range(len(bench.kept)), "answers.json")
    assert len(set(bench.lengths)) > 4
    for row in rows:
        image = row["picture"]
        asked = bench.ids(row["prompt"], image)
        images = bench.images([image])
        images.pop("num_tiles")
        ids = torch.tensor([asked + row["answer"]])
        expected = llava(input_ids=ids, **images, output_hidden_states=True)
        close(teacher.logits(ids, bench.rows(bench.seen, [image]), 5), expected.logits[:, -5:])
        visual = ids[0] == bench.model.config.image_token_id
        for index, each in enumerate(found):
            close(bench.rows(each, [image]), expected.hidden_states[index][0, visual])


@torch.no_grad()
def test_the_closed_form_of_a_newline_is_the_mean_of_its_targets_and_nothing_else_depends_on_it(tmp_path):
    _, teacher, bench = make_bench("next", tmp_path, PICTURES[:12])
    found, states = [], VisualStates(bench, teacher).at(1).clone()
    is_newline = (bench.features == NEWLINE).all(-1)
    for other in (states, states + 5.0 * is_newline[:, None]):
        work, projector = (
            LayerFit(bench, 1, other),
            copy.deepcopy(bench.model.language_model.layers[1].visual_projector),
        )
        work.solve(projector)
        features, own = work.rows(bench.fitted)
        targets = work.targets(own[(features == NEWLINE).all(-1)])
        close(projector.image_newline, targets.mean(0))
        found.append(projector)
    assert not torch.equal(found[0].image_newline, found[1].image_newline)
    assert torch.equal(found[0].linear_2.weight, found[1].linear_2.weight)


@both
def test_the_command_fits_projectors_and_newlines_to_tiles(kind, tmp_path, capsys):
    make, processor = MAKERS[kind]
    source, photos, target = (tmp_path / name for name in ("llava", "photos", "saisa"))
    make().save_pretrained(source)
    theirs = processor()
    if kind == "next":
        theirs.save_pretrained(source)
    else:  # without torchvision, transformers cannot make the whole processor, nor save it
        TOKENIZER.save_pretrained(source)
        theirs.image_processor.save_pretrained(source)
        settings = {"processor_class": "LlavaOnevisionProcessor", "image_token": "<image>", "num_image_tokens": 9}
        (source / "processor_config.json").write_text(json.dumps(settings))
        (source / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    photos.mkdir()
    for number, picture in enumerate(PICTURES):
        picture.save(photos / f"{number:02}.png")
    sizes = ["--pictures", "40", "--held-out", "10", "--steps", "60"]
    assert main(["build", "--from-llava", str(source), "--images", str(photos), str(target), *sizes]) == 0
    report = json.loads((target / "from_llava.json").read_text())
    assert report["agreement"]["fitted"]["kl"] < report["agreement"]["copied"]["kl"] / 1.5
    for row in report["layers"][1:]:
        assert row["fitted"]["keys"] < row["copied"]["keys"] and row["fitted"]["values"] < row["copied"]["values"]
    assert report["visual_tokens"] > 10
    model, ours = SaisaForConditionalGeneration.from_pretrained(target), SaisaProcessor.from_pretrained(target)
    newlines = [layer.visual_projector.image_newline for layer in model.language_model.layers]
    assert torch.equal(newlines[0], make().model.image_newline) and not torch.equal(newlines[1], newlines[0])
    wanted = our_processor(theirs)(images=PICTURES[0], text="<image> ?", return_tensors="pt")
    found = ours(images=PICTURES[0], text="<image> ?", return_tensors="pt")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert model.generate(**found, max_new_tokens=2).shape[1] > found["input_ids"].shape[1]
    # without them, as many tokens as the encoder makes of the whole image
    small = ["--pictures", "4", "--held-out", "2", "--steps", "1"]
    options = [str(tmp_path / "base"), *small, "--no-tiles"]
    assert main(["build", "--from-llava", str(source), "--images", str(photos), *options]) == 0
    assert "tiles are not used" in capsys.readouterr().out
    base = SaisaForConditionalGeneration.from_pretrained(tmp_path / "base")
    alone = SaisaProcessor.from_pretrained(tmp_path / "base")(images=PICTURES[0], text="<image> ?", return_tensors="pt")
    assert base.config.image_grid_pinpoints is None and alone["pixel_values"].ndim == 4
    base(**alone)
