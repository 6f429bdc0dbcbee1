# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""A LLaVA becomes a SAISA: everything but the projectors is its own, the projectors reproduce its visual states, and what is
made of pictures, on disk or in memory, stays bounded and survives interruptions."""

import copy
import importlib
import json
import os
import shutil
import signal
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import _TEXT, randomize
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    SiglipVisionConfig,
)

from saisa_hf import SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.checkpoints import from_llava
from saisa_hf.checkpoints.from_llava import (
    Fit,
    LayerFit,
    Teacher,
    Workbench,
    agreement,
    answered,
    distill,
    fit_projectors,
    processor_from_llava,
    saisa_from_llava,
)
from saisa_hf.cli import main, make_parser
from saisa_hf.demo import scenes
from saisa_hf.demo.language import CHAT_TEMPLATE, make_tokenizer
from saisa_hf.processing_saisa import add_image_token


SIDE, PATCH, LAYERS = 24, 6, 3
TOKENS = (SIDE // PATCH) ** 2
TOKENIZER = make_tokenizer()
PROMPTS = ["describe the picture.", "list the digits."]
QUICK = Fit(pictures=120, held_out=20, steps=100, batch_tokens=128, answer_tokens=4)
_VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
           "image_size": SIDE, "patch_size": PATCH}  # fmt: skip
TEXTS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def text_config(name="llama", **kwargs):
    sizes = {"vocab_size": len(TOKENIZER), "num_hidden_layers": LAYERS, "eos_token_id": 2}
    return TEXTS[name](**_TEXT | sizes | kwargs)


def make_llava(text=None, vision=None, next_=False, **kwargs):
    """A random LLaVA (or LLaVA-NeXT) whose every part matters."""
    kwargs = {"image_token_index": TOKENIZER.convert_tokens_to_ids("<image>"), "image_seq_length": TOKENS, **kwargs}
    config_class, model_class = LlavaConfig, LlavaForConditionalGeneration
    if next_:
        config_class, model_class = LlavaNextConfig, LlavaNextForConditionalGeneration
        kwargs["image_grid_pinpoints"] = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    vision = vision or CLIPVisionConfig(**_VISION, projection_dim=16)
    model = model_class(config_class(vision_config=vision, text_config=text or text_config(), **kwargs))
    # gentle attention: what a layer adds to a token depends on others, but does not drown it
    return randomize(model, gain=0.7).eval()


def make_processor(next_=False, tokenizer=TOKENIZER):
    image = {"crop_size": {"height": SIDE, "width": SIDE}, "size": {"shortest_edge": SIDE}}
    options = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    if next_:
        pinpoints = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
        image_processor = LlavaNextImageProcessor(**image, image_grid_pinpoints=pinpoints)
        return LlavaNextProcessor(image_processor, tokenizer, chat_template=CHAT_TEMPLATE, **options)
    return LlavaProcessor(CLIPImageProcessor(**image), tokenizer, chat_template=CHAT_TEMPLATE, **options)


def draw(number, size=(SIDE, SIDE)):
    """A picture of few colours, so that there is something to learn."""
    small = np.random.default_rng(number).integers(0, 255, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BILINEAR)


@pytest.fixture(scope="module")
def llava():
    return make_llava()


@pytest.fixture(scope="module")
def pictures():
    return [draw(number) for number in range(QUICK.pictures)]


def make_bench(llava, pictures, folder, fit=QUICK, log=lambda line: None, processor=None):
    model = saisa_from_llava(llava, fit.projector_hidden_size)
    processor = processor or processor_from_llava(make_processor(), model.config)
    return Workbench(model, processor, pictures, folder, fit, PROMPTS, log=log)


@pytest.fixture(scope="module")
def checkpoint(llava, pictures, tmp_path_factory):
    """A LLaVA and pictures as folders."""
    folder = tmp_path_factory.mktemp("source")
    llava.save_pretrained(folder / "llava")
    make_processor().save_pretrained(folder / "llava")
    (folder / "pictures" / "more").mkdir(parents=True)
    for number, picture in enumerate(pictures[:20]):
        picture.save(folder / "pictures" / ("more" if number % 2 else "") / f"{number}.png")
    (folder / "pictures" / "broken.jpg").write_text("no picture")
    (folder / "pictures" / "notes.txt").write_text("no picture either")
    return folder


# --- what is copied ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("vision", ["clip", "siglip"])
@torch.no_grad()
def test_model_and_teacher_are_the_llava(text, vision):
    tied, siglip = text == "qwen2", vision == "siglip"
    encoder = SiglipVisionConfig(**_VISION, vision_use_head=False) if siglip else None
    options = {"vision_feature_select_strategy": "full"} if siglip else {"vision_feature_layer": [-2, -1]}
    llava = make_llava(text_config(text, tie_word_embeddings=tied), encoder, **options)
    model = saisa_from_llava(llava)
    ours = {tensor.data_ptr() for name, tensor in model.state_dict().items() if "visual_projector" not in name}
    theirs = {tensor.data_ptr() for name, tensor in llava.state_dict().items() if "multi_modal_projector" not in name}
    assert ours == theirs  # shared, and so equal to the last bit
    for layer in model.language_model.layers:
        for name, tensor in llava.model.multi_modal_projector.state_dict().items():
            assert torch.equal(layer.visual_projector.state_dict()[name], tensor)
    assert not [name for name, tensor in model.named_parameters() if tensor.is_meta]
    assert model.config.vision_feature_layer == llava.config.vision_feature_layer

    ids = torch.randint(5, 60, (2, 30), generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(input_ids=ids).logits, llava(input_ids=ids).logits)
    ids[:, 3 : 3 + TOKENS] = model.config.image_token_id
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    expected = llava(input_ids=ids, pixel_values=pixels, output_hidden_states=True)
    features = model.get_image_features(pixels).pooler_output
    teacher = Teacher(model)
    torch.testing.assert_close(teacher.logits(ids, features, 12), expected.logits[:, -12:], atol=1e-5, rtol=1e-5)
    states = teacher.embeds(ids, features)
    for index in range(LAYERS):
        torch.testing.assert_close(states, expected.hidden_states[index], atol=1e-5, rtol=1e-5)
        states = teacher.advance(index, states)


def test_the_first_layer_sees_exactly_what_llava_puts_there(llava, pictures, tmp_path):
    bench = make_bench(llava, pictures[:12], tmp_path)
    report = fit_projectors(bench, Teacher(bench.model))
    assert report[0]["fitted"] == {"norm": 0, "keys": 0, "values": 0}


@pytest.mark.parametrize("legacy", [True, False])
def test_the_processor_makes_llavas_ids_and_pixels(llava, legacy):
    folder = Path(__file__).parent / "fixtures" / "reference" / "tokenizer"
    tokenizer = AutoTokenizer.from_pretrained(folder, legacy=legacy, config=LlamaConfig())
    add_image_token(tokenizer)
    tokenizer.pad_token = tokenizer.unk_token
    for theirs in (make_processor(tokenizer=tokenizer), make_processor()):
        ours = processor_from_llava(theirs, saisa_from_llava(llava).config)
        texts = ["USER: <image>\nwhat? ASSISTANT:", "a<image> <image>b </s>USER: x", " <image> c\n\n", "no picture"]
        images = [draw(number, (30, 50 + number)) for number in range(4)]
        for options in ({}, {"padding": True, "return_tensors": "pt"}):
            a = theirs(images=images, text=texts, **options)
            b = ours(images=images, text=texts, **options)
            for name in ("input_ids", "attention_mask"):
                assert np.array_equal(a[name], b[name]) if options else list(a[name]) == list(b[name])
            assert all(np.array_equal(x, y) for x, y in zip(a["pixel_values"], b["pixel_values"], strict=True))
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "where is the 7?"}]}]
        chat += [{"role": "assistant", "content": "top left"}]
        assert ours.apply_chat_template(chat) == theirs.apply_chat_template(chat, tokenize=False)


def test_offsets_point_into_the_text_as_given(llava):
    processor = processor_from_llava(make_processor(), saisa_from_llava(llava).config)
    text = "USER: <image>\nwhere is the 7?"
    batch = processor(images=draw(0), text=text, return_offsets_mapping=True)
    said = [text[a:b] for a, b in batch["offset_mapping"][0][1:]]
    assert said == ["USER", ":", *["<image>"] * TOKENS, "\n", "where", "is", "the", "7", "?"]


# --- the fit ----------------------------------------------------------------------------------------------------------


def test_fitting_brings_states_and_answers_nearer_and_distilling_more(llava, pictures, tmp_path):
    bench = make_bench(llava, pictures, tmp_path, Fit(**vars(QUICK) | {"distill_steps": 40, "distill_rate": 1e-3}))
    teacher = Teacher(bench.model)
    others = {n: t.clone() for n, t in bench.model.state_dict().items() if "visual_projector" not in n}
    rows = answered(bench, teacher, bench.held_out, "held-out.json")
    copied = agreement(bench, teacher, rows)
    for row in fit_projectors(bench, teacher)[1:]:
        for place in ("norm", "keys", "values"):
            assert row["fitted"][place] < row["copied"][place] / 2
    fitted = agreement(bench, teacher, rows)
    assert fitted["kl"] < copied["kl"] / 4 and fitted["top1"] >= copied["top1"]
    assert fitted["tokens"] == sum(len(row["answer"]) for row in rows)
    losses = distill(bench, teacher)
    assert np.mean(losses[-10:]) < np.mean(losses[:10])
    for name, tensor in others.items():
        assert torch.equal(tensor, bench.model.state_dict()[name]), name
    assert not any(parameter.requires_grad for parameter in bench.model.parameters())


@torch.no_grad()
def test_the_agreement_is_that_of_the_two_models_logits(llava, pictures, tmp_path):
    bench = make_bench(llava, pictures[:20], tmp_path)
    teacher = Teacher(bench.model)
    rows = answered(bench, teacher, bench.held_out, "answers.json")
    kl, same = [], []
    for row in rows:
        asked = bench.ids(row["prompt"], row["picture"])
        ids = torch.tensor([asked + row["answer"]])
        inputs = {"input_ids": ids, **bench.images([row["picture"]])}
        theirs, ours = (model(**inputs).logits[0].double().log_softmax(-1) for model in (llava, bench.model))
        first = len(asked) - 1
        kl += (theirs.exp() * (theirs - ours)).sum(-1)[first:-1].tolist()
        same += (theirs.argmax(-1) == ours.argmax(-1))[first:-1].tolist()
        # the answer is the LLaVA's own
        assert theirs.argmax(-1)[first:-1].tolist() == row["answer"]
    found = agreement(bench, teacher, rows)
    assert found["kl"] == pytest.approx(np.mean(kl), rel=1e-3) and found["top1"] == pytest.approx(np.mean(same))


def test_a_closed_form_solution_is_the_least_squares_solution(llava, pictures, tmp_path):
    bench = make_bench(llava, pictures, tmp_path, Fit(**vars(QUICK) | {"steps": 0, "ridge": 1e-9, "space": "hidden"}))
    teacher = Teacher(bench.model)
    fit_projectors(bench, teacher)
    with torch.no_grad():
        prefix = bench.model.get_input_embeddings()(torch.tensor([bench.prefix]))
        features = bench.features.unflatten(0, (-1, TOKENS))
        visual = teacher.projector(features)
        states = teacher.advance(0, torch.cat([prefix.expand(len(visual), -1, -1), visual], dim=1))[
            :, prefix.shape[1] :
        ]
        projector = teacher.projector
        inner = projector.act(projector.linear_1(features[bench.fitted.start :])).flatten(0, 1)
        inner = torch.cat([inner, torch.ones_like(inner[:, :1])], dim=1)
        solution = torch.linalg.lstsq(inner, states[bench.fitted.start :].flatten(0, 1)).solution
        found = bench.model.language_model.layers[1].visual_projector.linear_2
    torch.testing.assert_close(
        inner @ torch.cat([found.weight.T, found.bias[None]]), inner @ solution, atol=2e-3, rtol=0
    )


@pytest.mark.parametrize("width", [16, 80])
def test_projectors_may_be_narrower_or_wider(llava, pictures, tmp_path, width):
    fit = Fit(**vars(QUICK) | {"projector_hidden_size": width})
    bench = make_bench(llava, pictures, tmp_path, fit)
    model, plain = bench.model, saisa_from_llava(llava)
    assert model.config.projector_hidden_size == width
    with torch.no_grad():
        same = torch.allclose(
            model.language_model.layers[0].visual_projector(bench.features),
            plain.language_model.layers[0].visual_projector(bench.features),
            atol=1e-5,
        )
    assert same == (width > 32)
    report = fit_projectors(bench, Teacher(model, llava.model.multi_modal_projector))
    first = report[0]["fitted"]["norm"]
    assert first < 1e-9 if width > 32 else 0 < first < report[0]["copied"]["norm"]
    assert all(row["fitted"]["keys"] < row["copied"]["keys"] / 2 for row in report[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_in_half_precision_is_fitted_in_float32(pictures, tmp_path, monkeypatch, dtype):
    bench = make_bench(make_llava().to(dtype), pictures, tmp_path)
    seen, descend = [], LayerFit.descend
    monkeypatch.setattr(
        LayerFit, "descend", lambda self, p, *a: (seen.append({x.dtype for x in p.parameters()}), descend(self, p, *a))
    )
    report = fit_projectors(bench, Teacher(bench.model))
    assert seen == [{torch.float32}] * (LAYERS - 1)
    assert {x.dtype for x in bench.model.parameters()} == {dtype}
    assert all(row["fitted"]["values"] < row["copied"]["values"] / 2 for row in report[1:])


def test_one_projector_is_trained_and_two_layers_states_are_kept_at_a_time(llava, pictures, tmp_path, monkeypatch):
    bench = make_bench(llava, pictures, tmp_path)
    trained, kept = [], []
    load_rows = LayerFit.rows

    def rows(self, chosen):
        live = [p for p in bench.model.parameters() if p.requires_grad]
        trained.append(len(live))
        kept.append(len(list(tmp_path.glob("states*"))))
        return load_rows(self, chosen)

    monkeypatch.setattr(LayerFit, "rows", rows)
    advance = Teacher.advance
    monkeypatch.setattr(
        Teacher, "advance", lambda *a: (kept.append(len(list(tmp_path.glob("states*")))), advance(*a))[1]
    )
    fit_projectors(bench, Teacher(bench.model))
    assert max(trained) == 0  # the one that is trained is a copy in float32, outside of the model
    assert max(kept) == 2 and not list(tmp_path.glob("states*"))


# --- interruptions ----------------------------------------------------------------------------------------------------


class Stop(BaseException):
    pass


def killed(run):
    """Runs `run` in a process of its own, which has to end by SIGKILL."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("where", ["get_image_features", "answers", "advance", "descend", "killed"])
def test_an_interrupted_run_goes_on_and_ends_as_if_uninterrupted(checkpoint, tmp_path, monkeypatch, where):
    kill = where == "killed"
    where = "solve" if kill else where
    owner = {"get_image_features": SaisaForConditionalGeneration, "descend": LayerFit, "solve": LayerFit}.get(
        where, Teacher
    )
    fit = Fit(pictures=20, held_out=4, steps=8, batch_tokens=64, answer_tokens=3)
    options = {"fit": fit, "prompts": PROMPTS, "log": lambda line: None}
    original, calls = getattr(owner, where), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2 and kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(calls) == 2:
            raise Stop
        return original(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, where, interrupted)
        run = partial(from_llava.from_llava, checkpoint / "llava", checkpoint / "pictures", tmp_path / "a", **options)
        if kill:
            killed(run)
        else:
            with pytest.raises(Stop):
                run()
    assert not (tmp_path / "a").exists() and (tmp_path / ".a.work").exists()
    report = from_llava.from_llava(checkpoint / "llava", checkpoint / "pictures", tmp_path / "a", **options)
    whole = from_llava.from_llava(checkpoint / "llava", checkpoint / "pictures", tmp_path / "b", **options)
    assert [x.name for x in tmp_path.iterdir()] in (["a", "b"], ["b", "a"])
    assert report["agreement"] == whole["agreement"]
    a, b = (SaisaForConditionalGeneration.from_pretrained(tmp_path / name).state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_a_work_folder_of_other_settings_is_refused(llava, pictures, tmp_path):
    make_bench(llava, pictures[:8], tmp_path / "work")
    lines = []
    make_bench(llava, pictures[:8], tmp_path / "work", log=lines.append)
    assert "resuming" in lines[0]
    with pytest.raises(ValueError, match=r"other settings \(steps\)"):
        make_bench(llava, pictures[:8], tmp_path / "work", Fit(**vars(QUICK) | {"steps": 7}))
    with pytest.raises(ValueError, match=r"other settings \(.*weights\)"):
        make_bench(randomize(make_llava(), seed=5), pictures[:8], tmp_path / "work")
    other = copy.deepcopy(llava)
    other.get_parameter("model.language_model.layers.1.mlp.up_proj.weight").data *= 1.5
    with pytest.raises(ValueError, match=r"other settings \(.*weights\)"):
        make_bench(other, pictures[:8], tmp_path / "work")
    for others in (pictures[8:16], pictures[7::-1]):
        with pytest.raises(ValueError, match=r"other settings \(pictures_in_order\)"):
            make_bench(llava, others, tmp_path / "work")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(FileExistsError, match=r"letter\.txt"):
        make_bench(llava, pictures[:8], tmp_path / "mine")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_command_writes_a_model_a_processor_and_a_report(checkpoint, tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    argv = ["build", "--from-llava", checkpoint / "llava", "--images", checkpoint / "pictures", tmp_path / "out"]
    argv += ["--prompts", tmp_path / "prompts.txt", "--steps", 5, "--held-out", 4, "--distill", 2, "--device", "cpu"]
    assert main([str(word) for word in argv]) == 0
    text = capsys.readouterr().out
    for line in ("skipped 1 images that cannot be read", "broken.jpg", "fitted on 16 images, measured on 4 others",
                 "layer 3 of 3: error of norm", "KL from LLaVA", "distilled", "wrote "):  # fmt: skip
        assert line in text, line
    report = json.loads((tmp_path / "out" / from_llava.REPORT).read_text())
    assert set(report["agreement"]) == {"copied", "fitted", "distilled"}
    assert [row["layer"] for row in report["layers"]] == [0, 1, 2]
    assert report["pictures"]["fitted"] == 16 and len(report["pictures"]["skipped"]) == 1
    assert report["settings"]["steps"] == 5 and report["prompts"] == PROMPTS

    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    processor = SaisaProcessor.from_pretrained(tmp_path / "out")
    theirs = LlavaForConditionalGeneration.from_pretrained(checkpoint / "llava").eval()
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "where is the 7?"}]}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = processor(images=draw(99), text=text, return_tensors="pt")
    expected = LlavaProcessor.from_pretrained(checkpoint / "llava")(images=draw(99), text=text, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    with torch.no_grad():
        words = {"input_ids": torch.tensor([[1, 5, 6, 7]])}
        assert torch.equal(model(**words).logits, theirs(**words).logits)
        assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]


def test_defaults_of_the_command_are_those_of_the_settings():
    given = vars(make_parser().parse_args(["build", "--from-llava", "a", "b"]))
    for name in ("pictures", "held_out", "steps", "projector_hidden_size", "seed", "visual_layers", "choose_on"):
        assert given[name] == getattr(Fit(), name), name
    assert given["distill"] == Fit().distill_steps


def test_of_llava_next_the_base_image_alone_is_used_if_asked_for(tmp_path):
    llava, theirs = make_llava(next_=True), make_processor(next_=True)
    model = saisa_from_llava(llava, tiles=False)
    ours = processor_from_llava(theirs, model.config)
    images = [draw(number, (SIDE + 7 * number, 40)) for number in range(3)]
    tiles = theirs(images=images, text=["<image>\nlist the digits."] * 3, padding=True, return_tensors="pt")
    pixels = ours(images=images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, tiles["pixel_values"][:, 0], atol=1e-6, rtol=0)

    # the states of a base image are the same with the tiles behind it
    with torch.no_grad():
        whole = theirs(images=images[1], text="USER: <image>\nlist the digits.", return_tensors="pt")
        states = llava(**whole, output_hidden_states=True).hidden_states
        ids, teacher = whole["input_ids"][:, : 3 + TOKENS], Teacher(model)
        assert (ids == model.config.image_token_id).sum() == TOKENS
        mine = teacher.embeds(ids, model.get_image_features(pixels[1:2]).pooler_output)
        for index in range(LAYERS):
            torch.testing.assert_close(mine, states[index][:, : ids.shape[1]], atol=1e-5, rtol=1e-5)
            mine = teacher.advance(index, mine)
    ours.save_pretrained(tmp_path)
    again = SaisaProcessor.from_pretrained(tmp_path)(images=images, return_tensors="pt")["pixel_values"]
    assert torch.equal(again, pixels)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, status, message",
    [
        ({"--from-llava": "{tmp}/llama"}, 2, "is a 'llama': expected one of llava, llava_next, llava_onevision"),
        ({"--from-llava": "{tmp}/nowhere"}, 1, "nowhere"),
        ({"--images": "{tmp}/nowhere"}, 1, "--images '{tmp}/nowhere' is not a folder"),
        ({"--images": "{tmp}/empty"}, 1, "holds no images (.png, "),
        (
            {"--images": "{tmp}/broken"},
            2,
            "0 of the images can be read, and at least 2 are needed: one to fit on, one to measure on; the first that cannot",
        ),
        ({"--images": "{tmp}/one"}, 2, "1 of the images can be read, and at least 2 are needed"),
        ({"DST": "{tmp}/one"}, 1, "one exists"),
        ({"--device": "nonsense"}, 2, "device 'nonsense' cannot be used"),
        ({"--prompt-format": "USER: {{prompt}}"}, 2, "expected one <image> and {{prompt}}"),
        ({"--prompt-format": "{{prompt}} <image>"}, 2, "differs from prompt to prompt"),
        ({"--prompts": "{tmp}/none.txt"}, 2, "holds no prompts"),
    ],
)
def test_bad_input_is_named(checkpoint, tmp_path, capsys, change, status, message):
    LlamaConfig().save_pretrained(tmp_path / "llama")
    for name in ("empty", "broken", "one"):
        (tmp_path / name).mkdir()
    (tmp_path / "broken" / "a.png").write_text("no picture")
    draw(0).save(tmp_path / "one" / "a.png")
    (tmp_path / "none.txt").write_text("\n")
    words = {"--from-llava": str(checkpoint / "llava"), "--images": str(checkpoint / "pictures"), "--device": "cpu"}
    words |= {"DST": str(tmp_path / "out")} | {key: value.format(tmp=tmp_path) for key, value in change.items()}
    destination = words.pop("DST")
    assert main(["build", destination, *(word for pair in words.items() for word in pair)]) == status
    assert message.format(tmp=tmp_path) in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists() and not (tmp_path / ".out.work").exists()


def test_a_destination_that_holds_what_is_read_is_refused(checkpoint, capsys):
    argv = ["build", "--from-llava", checkpoint / "llava", "--images", checkpoint / "pictures", "--overwrite"]
    before = sorted(path for path in checkpoint.rglob("*"))
    for destination in (checkpoint, checkpoint / "llava", checkpoint / "pictures"):
        assert main([*map(str, argv), str(destination)]) == 2 and "choose another DST" in capsys.readouterr().err
    out = str(checkpoint / "out")
    assert main([*map(str, argv), "--work-folder", f"{out}/work", out]) == 2
    assert "choose another DST" in capsys.readouterr().err
    assert sorted(path for path in checkpoint.rglob("*")) == before


def test_a_full_disk_is_an_error_before_anything_is_computed(llava, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"0\.0 GB for features and states, and 0\.0 GB are free"):
        make_bench(llava, pictures, tmp_path)


def test_models_that_saisa_cannot_be_are_refused():
    with pytest.raises(ValueError, match="drops the first token of siglip_vision_model"):
        saisa_from_llava(make_llava(vision=SiglipVisionConfig(**_VISION, vision_use_head=False)))
    sizes = {name: getattr(text_config(), name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    for kind in (Olmo2Config, Gemma2Config, GraniteConfig):
        text = kind(**sizes, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, pad_token_id=0)
        with pytest.raises(ValueError, match="is not supported here"):
            saisa_from_llava(make_llava(text))
    with pytest.raises(ValueError, match="expected a LLaVA"):
        saisa_from_llava(saisa_from_llava(make_llava()))
    for wrong in ({"pictures": 0}, {"steps": -1}, {"space": "elsewhere"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Fit(**wrong)


def test_too_few_pictures_for_the_width_are_warned_about(llava, pictures, tmp_path):
    lines = []
    make_bench(llava, pictures[:8], tmp_path, log=lines.append)
    assert any("few for a projector 32 wide" in line for line in lines)


def test_a_descent_that_leads_nowhere_is_undone(llava, pictures, tmp_path):
    lines, fit = [], Fit(**vars(QUICK) | {"rate": 1e4})
    bench = make_bench(llava, pictures, tmp_path, fit, lines.append)
    report = fit_projectors(bench, Teacher(bench.model))
    assert sum("did not help and is undone" in line for line in lines) == 3 * (LAYERS - 1)
    assert all(row["fitted"]["keys"] < row["copied"]["keys"] for row in report[1:])


# --- the benchmark ----------------------------------------------------------------------------------------------------


def test_the_benchmark_fills_its_tables_and_computes_nothing_twice(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    benchmark = importlib.import_module("from_llava")
    monkeypatch.setitem(scenes.VARIANTS, "train", 1)
    scenes.sprites.cache_clear()
    monkeypatch.setattr(benchmark, "STAGES", ((2, 1.0), (1, 0.1), (1, 0.2)))
    monkeypatch.setattr(benchmark, "SHORT", 3)
    monkeypatch.setattr(benchmark, "LONG", 4)
    monkeypatch.setattr(benchmark, "BATCH", 2)
    monkeypatch.setattr(benchmark, "DEFAULT", benchmark.DEFAULT | {"depth": 2, "steps": 3, "pictures": 12})
    argv = [
        "--json",
        tmp_path / "a.json",
        "--models",
        tmp_path / "models",
        "--seeds",
        0,
        "--depths",
        2,
        "--pictures",
        6,
    ]
    argv += ["--widths", 16, "--spaces", "norm", "--fit-steps", 2, "--distill-steps", 1, "--questions", 7]
    argv += ["--held-out", 5, "--answer-tokens", 3]
    argv = [str(word) for word in [*argv, "--plot", tmp_path / "a.png"]]
    try:
        cells = benchmark.main(argv)["cells"]
        for kind in ("llava_cell", "fit_cell", "neighbours_cell", "trained_cell"):
            monkeypatch.setattr(benchmark, kind, None)
        assert benchmark.main(argv)["cells"] == cells
    finally:
        scenes.sprites.cache_clear()
    assert [name.split()[0] for name in cells] == ["llava", "fit"] * 2 + ["fit"] * 3 + ["neighbours", "trained"]
    whole = cells["fit seed=0 depth=2 steps=3 pictures=12 width=128"]
    assert {"accuracy", "kl", "top1", "tokens"} <= whole["distilled"].keys() and len(whole["layers"]) == 2
    assert Image.open(tmp_path / "a.png").size[0] > 1000
    assert cells["trained seed=0 depth=2 steps=3"]["processor_seconds"] > 0
