# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""A LLaVA that is a SAISA in embedding space, with any vision encoder, becomes a SAISA as transformers' LLaVAs do."""

import json
from types import SimpleNamespace

import pytest
import torch
from tile_parts import NEXT, close, next_processor, our_processor, random_sizes, tiled_saisa
from tile_parts import draw as draw_tiles
from tiny_models import _TEXT, randomize
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    ConvNextConfig,
    EfficientNetConfig,
    LlamaConfig,
    Qwen3Config,
)

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.checkpoints.build import make_processor
from saisa_hf.checkpoints.from_llava import (
    REPORT,
    Fit,
    Teacher,
    Workbench,
    answered,
    load_llava,
    processor_from_llava,
    saisa_from_llava,
)
from saisa_hf.cli import main
from saisa_hf.demo.language import CHAT_TEMPLATE, make_tokenizer


SIDE, LAYERS = 32, 3
TOKENIZER = make_tokenizer()
IMAGE = TOKENIZER.convert_tokens_to_ids("<image>")
LLAVA = {"alignment": "embedding_space", "visual_attention": "full"}
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": SIDE,
          "patch_size": 8, "projection_dim": 16}  # fmt: skip
VISIONS = {
    "clip": lambda: CLIPVisionConfig(**VISION),
    "convnext": lambda: ConvNextConfig(
        num_stages=2, patch_size=4, hidden_sizes=[8, 12], depths=[1, 1], image_size=SIDE
    ),
    "efficientnet": lambda: EfficientNetConfig(
        image_size=SIDE, width_coefficient=0.25, depth_coefficient=0.1, hidden_dim=320, kernel_sizes=[3, 3], strides=[1, 2],
        in_channels=[32, 16], out_channels=[16, 24], depthwise_padding=[], num_block_repeats=[1, 1], expand_ratios=[1, 6],
    ),
}  # fmt: skip
KINDS = {
    "clip": ("clip", {"vision_feature_layer": [-2, -1], "projector_hidden_size": 20}),
    "convnext": ("convnext", {"vision_feature_layer": -1, "visual_attention": ["full"] * LAYERS}),
    "efficientnet": ("efficientnet", {"vision_feature_layer": -1, "visual_feed_forward": [True] * LAYERS}),
    "unshuffled": ("efficientnet", {"vision_feature_layer": -1, "visual_token_reduction": "pixel_unshuffle"}),
    "resampled": ("clip", {"visual_token_reduction": "resampler", "reduced_visual_tokens": 3}),
}


def make_llava(kind, text=LlamaConfig, **settings):
    """A random LLaVA of this package, and its processor."""
    vision, more = KINDS[kind]
    text = text(**_TEXT | {"vocab_size": len(TOKENIZER), "num_hidden_layers": LAYERS, "eos_token_id": 2})
    config = SaisaConfig(VISIONS[vision](), text, IMAGE, **LLAVA | more | settings)
    model = randomize(SaisaForConditionalGeneration(config), gain=0.7)
    model.generation_config.eos_token_id = 2
    if vision == "efficientnet":  # what a layer's batch norm has seen
        for name, buffer in model.named_buffers():
            if name.endswith("running_var"):
                buffer.fill_(0.3)
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, image_mean=[0.1, 0.2, 0.3]
    )
    return model, make_processor(model.eval(), image_processor, TOKENIZER, "<image>", CHAT_TEMPLATE)


def draw(number):
    return draw_tiles(number, (SIDE, SIDE))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_model_and_teacher_are_the_llava(kind):
    llava, theirs = make_llava(kind, Qwen3Config if kind == "convnext" else LlamaConfig)
    llava.train()
    model = saisa_from_llava(llava)
    assert not any(module.training for module in model.modules())
    llava.eval()
    foreign = SimpleNamespace(**vars(theirs))  # as of a checkpoint's own code, whose classes are others
    for processor in (theirs, foreign):
        assert processor_from_llava(processor, model.config) is processor
    stored = {name for name in llava.state_dict() if "visual_projector" not in name}
    shared = dict(model.state_dict().items())
    assert all(shared[name].data_ptr() == llava.state_dict()[name].data_ptr() for name in stored)
    assert {name for name in shared if "visual_projector" not in name} == stored
    for layer in model.language_model.layers:
        for name, tensor in llava.model.visual_projector.state_dict().items():
            assert torch.equal(layer.visual_projector.state_dict()[name], tensor)
    assert not model.config.in_embedding_space and model.config.projector_sharing == "per_layer"
    for name in ("vision_feature_layer", "visual_token_reduction", "projector_hidden_size", "image_seq_length"):
        assert getattr(model.config, name) == getattr(llava.config, name), name

    words = torch.randint(5, 60, (2, 30), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(input_ids=words).logits, llava(input_ids=words).logits)
    inputs = theirs(images=[draw(0), draw(1)], text=["USER: <image>\nwhat is the 7?"] * 2, return_tensors="pt")
    expected = llava(**inputs, output_hidden_states=True)
    features = model.get_image_features(inputs["pixel_values"]).pooler_output
    teacher = Teacher.of(model, llava)
    assert expected.logits.std() > 0.1
    close(teacher.logits(inputs["input_ids"], features, 8), expected.logits[:, -8:])
    states = teacher.embeds(inputs["input_ids"], features)
    for index in range(LAYERS):
        close(states, expected.hidden_states[index])
        states = teacher.advance(index, states)
    blank = theirs(images=[draw(2), draw(3)], text=["USER: <image>\nwhat is the 7?"] * 2, return_tensors="pt")
    assert (expected.logits - llava(**blank).logits).abs().max() > 1e-3  # the images matter


@pytest.mark.parametrize("aspect", [None, "anyres_max_2"])
@torch.no_grad()
def test_the_teacher_is_the_llava_with_its_tiles(aspect, tmp_path):
    llava, theirs = tiled_saisa(**LLAVA, vision_aspect_ratio=aspect), our_processor(next_processor())
    theirs.vision_aspect_ratio = aspect
    model = saisa_from_llava(llava)
    teacher = Teacher.of(model, llava)
    pictures = [draw_tiles(number, size) for number, size in enumerate(random_sizes(8, most=60))]
    fit, options = Fit(answer_tokens=4, held_out=4), {"log": lambda line: None, "embed": teacher.embed}
    bench = Workbench(model, theirs, pictures, tmp_path, fit, ["list the digits."], **options)
    assert len(set(bench.lengths)) > 2
    for row in answered(bench, teacher, range(8), "answers.json"):
        ids = torch.tensor([bench.ids(row["prompt"], row["picture"]) + row["answer"]])
        expected = llava(input_ids=ids, **bench.images([row["picture"]])).logits[:, -5:]
        close(teacher.logits(ids, bench.rows(bench.seen, [row["picture"]]), 5), expected)
    # and without them
    whole = saisa_from_llava(llava, tiles=False)
    alone = processor_from_llava(theirs, whole.config)
    assert theirs.image_grid_pinpoints == NEXT and alone.image_grid_pinpoints is None
    inputs = alone(images=pictures[:2], text=["<image> ?"] * 2, return_tensors="pt")
    assert inputs["pixel_values"].ndim == 4 and whole(**inputs).logits.isfinite().all()


def test_the_command_makes_a_saisa_of_it(tmp_path, capsys):
    llava, theirs = make_llava("efficientnet")
    llava.save_pretrained(tmp_path / "llava")
    theirs.save_pretrained(tmp_path / "llava")
    (tmp_path / "photos").mkdir()
    for number in range(60):
        draw(number).save(tmp_path / "photos" / f"{number}.png")
    argv = ["build", "--from-llava", tmp_path / "llava", "--images", tmp_path / "photos", tmp_path / "out"]
    argv += ["--steps", 40, "--held-out", 8, "--distill", 2, "--device", "cpu"]
    assert main([str(word) for word in argv]) == 0
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert set(report["agreement"]) == {"copied", "fitted", "distilled"}
    assert report["agreement"]["fitted"]["kl"] < report["agreement"]["copied"]["kl"] / 2
    assert report["layers"][0]["fitted"] == {"norm": 0, "keys": 0, "values": 0}
    for row in report["layers"][1:]:
        assert row["fitted"]["keys"] < row["copied"]["keys"] / 2
    ours = SaisaProcessor.from_pretrained(tmp_path / "out")
    before, after = (SaisaProcessor.from_pretrained(tmp_path / name).to_dict() for name in ("llava", "out"))
    assert before == after and not ours.tokenize_whole
    model = SaisaForConditionalGeneration.from_pretrained(tmp_path / "out").eval()
    inputs = ours(images=draw(99), text="USER: <image>\nwhat is the 7?", return_tensors="pt")
    with torch.no_grad():
        words = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
        assert torch.equal(model(**words).logits, llava(**words).logits)
        assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    loaded, processor = load_llava(tmp_path / "llava")
    assert isinstance(processor, SaisaProcessor) and not loaded.training

    for name, other in (
        ("naavit", {"visual_attention": ["full", "none", "full"]}),
        ("unfed", {"visual_feed_forward": False}),
        ("saisa", {"alignment": "input_space", "visual_attention": "none"}),
    ):
        model, _ = make_llava("clip", **other)
        with pytest.raises(ValueError, match=r"expected a LLaVA, alignment='embedding_space'"):
            saisa_from_llava(model)
        model.config.save_pretrained(tmp_path / name)
        argv = ["build", "--from-llava", tmp_path / name, "--images", tmp_path / "photos", tmp_path / "no"]
        assert main([str(word) for word in argv]) == 2
        said = " ".join(capsys.readouterr().err.split())
        changed, value = next(iter(other.items()))
        assert f"'{tmp_path / name}' has " in said and f"{changed}={value}" in said.replace(f"'{value}'", str(value))
