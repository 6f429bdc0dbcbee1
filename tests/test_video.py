"""Videos in prompts: frames as images whose tokens are pooled, from the processor to the answer."""

import io
import json
import queue

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import IMAGE_TOKEN, tiny_model
from torch.nn import functional as F
from training_parts import processor_for
from transformers import BatchFeature, CLIPImageProcessor, CLIPVisionConfig
from video_parts import pictures, write_video

from saisa_hf import SaisaProcessor, SaisaVisualStates
from saisa_hf.bench.measure import peak_memory
from saisa_hf.chat import Conversation
from saisa_hf.chat.templates import chat_template
from saisa_hf.cli import main
from saisa_hf.common.videos import encoding_progress
from saisa_hf.demo.run import CHECKPOINT
from saisa_hf.processing_saisa import Video
from saisa_hf.vision_saisa import pooled


SIDE = 12  # 3 x 3 tokens, and 2 x 2 of a frame
TOKENS, POOLED = 9, 4


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("videos") / "film.mp4", count=40, rate=20)


def make_processor(**options):
    size = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessor(size=size, crop_size=size)
    options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1} | options
    tokenizer = processor_for().tokenizer
    return SaisaProcessor(images, tokenizer, chat_template=chat_template("vicuna"), **options)


def make_model(**options):
    vision = CLIPVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2, image_size=SIDE, patch_size=4,
        projection_dim=16,
    )  # fmt: skip
    return tiny_model(vision=vision, **{"vision_seq_length": TOKENS} | options)


def runs(ids):
    """Lengths of the runs of placeholders."""
    marks = "".join("v" if i == IMAGE_TOKEN else " " for i in ids)
    return [len(run) for run in marks.split()]


def frames(count=5):
    return [Image.fromarray(one) for one in pictures(count)]


# --- the processor ----------------------------------------------------------------------------------------------------


def test_a_video_is_its_frames_in_a_row(film):
    processor, still = make_processor(), frames(1)[0]
    out = processor(
        text=["a<image>b<video>c", "<video>d<image>", "e"], images=[still, still], videos=[frames(3), str(film)],
        num_frames=5, padding=True, return_tensors="pt",
    )  # fmt: skip
    assert [runs(row) for row in out["input_ids"].tolist()] == [[9, 12], [20, 9], []]
    assert out["frame_pooling"].tolist() == [1, 2, 2, 2, 2, 2, 2, 2, 2, 1]
    assert out["pixel_values"].shape == (10, 3, SIDE, SIDE)
    alone = processor(images=[still, *frames(3)], return_tensors="pt")["pixel_values"]
    assert torch.equal(out["pixel_values"][:4], alone)
    nothing = processor(text="e", videos=[])
    assert "frame_pooling" not in nothing and nothing == processor(text="e")


def test_what_may_be_a_video_and_a_list_of_them(film):
    processor, few, array = make_processor(), frames(2), np.stack(pictures(2))
    expected = processor(text="<video>", videos=few, return_tensors="pt")
    for one in (array, torch.from_numpy(array).movedim(-1, 1), [few], [[few]], [Video(few)], [array], array[None]):
        out = processor(text="<video>", videos=one, return_tensors="pt")
        assert torch.equal(out["pixel_values"], expected["pixel_values"])
    both = processor(text=["<video>", "<video>"], videos=[[str(film)], [few]], num_frames=3)
    assert [runs(row) for row in both["input_ids"]] == [[12], [8]]
    pixels = processor(videos=few, return_tensors="pt")
    assert torch.equal(pixels["pixel_values"], expected["pixel_values"]) and "input_ids" not in pixels


def test_settings_say_which_frames_and_how_many_tokens_of_each(film):
    processor = make_processor()
    counts = {"num_frames": 7, "fps": 4, "do_sample_frames": False}
    for (name, value), count in zip(counts.items(), (7, 8, 40)):
        for given in ({name: value}, {"videos_kwargs": {name: value}}):
            ids = processor(text="<video>", videos=str(film), **given)["input_ids"][0]
            assert runs(ids) == [count * POOLED]
        ids = make_processor(video_settings={name: value})(text="<video>", videos=str(film))["input_ids"][0]
        assert runs(ids) == [count * POOLED]
    assert runs(processor(text="<video>", videos=str(film))["input_ids"][0]) == [32 * POOLED]
    whole = processor(text="<video>", videos=str(film), videos_kwargs={"pool": 1, "num_frames": 2})
    assert runs(whole["input_ids"][0]) == [2 * TOKENS]
    third = processor(text="<video>", videos=str(film), videos_kwargs={"pool": 3, "num_frames": 2})
    assert runs(third["input_ids"][0]) == [2]


def test_times_stand_in_front_of_frames_where_they_are_asked_for(film):
    processor = make_processor(video_settings={"timestamps": True, "num_frames": 2})
    ids = processor(text="a<video>b", videos=str(film), add_special_tokens=False)["input_ids"][0]
    spelled = processor.tokenizer.decode(ids).replace("<image>" * POOLED, "[]")
    assert spelled == "a<0.0 seconds>[]<1.0 seconds>[]b"
    with pytest.raises(ValueError, match="video 0 of 1 is given as frames, whose times are not known"):
        processor(text="<video>", videos=frames())


def test_wrong_numbers_and_settings_are_named(film):
    processor, film = make_processor(), str(film)
    wrong = [
        ({"text": "<video>", "videos": [film, film]}, "`videos`: 2 for 1 '<video>'"),
        ({"text": "<video><video>", "videos": film}, "`videos`: 1 for 2 '<video>'"),
        ({"text": "<video><image>", "videos": film}, "`images`: none for 1 '<image>'"),
        ({"text": "<video>", "videos": film, "num_frames": 0}, "videos_kwargs: num_frames=0: expected a whole number"),
        ({"text": "<video>", "videos": film, "fps": "2"}, "videos_kwargs: fps='2'"),
        ({"text": "<video>", "videos": film, "fps": 2, "num_frames": 2}, "both num_frames=2 and fps=2"),
        (
            {"text": "<video>", "videos": film, "videos_kwargs": {"size": 3}},
            "videos_kwargs has size=3. Expected num_frames",
        ),
        ({"text": "<video>", "videos": "no/such.mp4"}, "video 0 of 1 cannot be read: .*No such file"),
        ({"text": "<video>", "videos": 5}, "video 0 of 1 cannot be read: TypeError"),
        ({"text": "<video>", "videos": film, "visual_states": 5}, "were both given"),
        ({"text": "<video>", "videos": [film] * 2, "videos_kwargs": None}, "`videos`: 2 for 1 '<video>'"),
    ]
    for arguments, message in wrong:
        with pytest.raises(ValueError, match=message):
            processor(**arguments)
    with pytest.raises(ValueError, match="video_settings has colour='red'"):
        make_processor(video_settings={"colour": "red"})(text="<video>", videos=film)
    with pytest.raises(ValueError, match="pool=2 of video_settings needs a grid of patches"):
        make_processor(vision_feature_select_strategy="full")(text="<video>", videos=film)


def test_settings_are_saved_where_there_are_any(tmp_path):
    plain, own = make_processor(), make_processor(video_settings={"num_frames": 5, "timestamps": True})
    plain.save_pretrained(tmp_path / "plain")
    own.save_pretrained(tmp_path / "own")
    assert "video_settings" not in json.loads((tmp_path / "plain" / "processor_config.json").read_text())
    assert SaisaProcessor.from_pretrained(tmp_path / "plain").video_settings is None
    assert SaisaProcessor.from_pretrained(tmp_path / "own").video_settings == own.video_settings


@pytest.mark.parametrize("template", ["vicuna", "a template that knows videos"])
def test_videos_in_chats(film, template):
    knows = (
        "{% for m in messages %}{% for p in m.content %}{% if p.type == 'video' %}<video>\n"
        "{% elif p.type == 'image' %}<image>\n{% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
    )
    processor = make_processor()
    processor.chat_template = processor.chat_template if template == "vicuna" else knows
    path, still = str(film), frames(1)[0]
    question = {"type": "text", "text": "what?"}
    expected = None
    for video in (
        {"type": "video", "video": path},
        {"type": "video", "path": path},
        {"type": "video", "url": path},
        {"type": "video_url", "video_url": {"url": path}},
        {"type": "video_url", "video_url": path},
    ):
        chat = [{"role": "user", "content": [{"type": "image", "image": still}, video, question]}]
        out = processor.apply_chat_template(chat, tokenize=True, return_dict=True, return_tensors="pt", num_frames=3)
        assert runs(out["input_ids"][0].tolist()) == [9, 12] and out["frame_pooling"].tolist() == [1, 2, 2, 2]
        expected = out if expected is None else expected
        assert torch.equal(out["pixel_values"], expected["pixel_values"])
    by_frames = [{"role": "user", "content": [{"type": "video", "video": frames(3)}, question]}]
    assert runs(processor.apply_chat_template(by_frames, tokenize=True)[0]) == [12]


# --- the model --------------------------------------------------------------------------------------------------------


def prompt(processor, text="<video>what?", **given):
    return processor(text=text, padding=True, padding_side="left", return_tensors="pt", **given)


def test_pooling_is_that_of_llava_onevision():
    from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

    class Stand:  # what the method reads of a model
        config = type("Config", (), {"vision_config": type("V", (), {"image_size": 28, "patch_size": 4})})

    features = torch.randn(3, 49, 6)
    expected = LlavaOnevisionModel.apply_pooling(Stand, features)
    assert torch.equal(pooled(features, (7, 7), 2), expected)
    even = torch.randn(2, 4 * 6, 5)
    maps = even.transpose(1, 2).unflatten(-1, (4, 6))
    mean = F.avg_pool2d(maps, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(pooled(even, (4, 6), 2), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("reduction", [None, "avg_pool", "pixel_unshuffle", "resampler", "class_attention"])
def test_frames_are_pooled_and_images_are_not(reduction):
    number = {"reduced_visual_tokens": 3} if reduction in ("resampler", "class_attention") else {}
    options = {"visual_token_reduction": reduction, **number}
    model = make_model(**options | {"vision_seq_length": None})
    processor = make_processor(**options)
    batch = prompt(processor, ["a<image>b<video>c", "<video>d"], images=frames(1), videos=[frames(2), frames(3)])
    assert batch["frame_pooling"].tolist() == [1, 2, 2, 2, 2, 2]
    with torch.no_grad():
        features = model.get_image_features(batch["pixel_values"], return_dict=True).pooler_output
        own = model(**batch)
    side = {None: 3, "avg_pool": 2, "pixel_unshuffle": 2}.get(reduction)
    small = features if side is None else pooled(features, (side, side), 2)
    expected = torch.cat([features[0], *small[1:]])
    torch.testing.assert_close(own.image_hidden_states, expected, rtol=0, atol=1e-6)
    # the same features as visual states
    states = model.get_visual_states(batch["pixel_values"], frame_pooling=batch["frame_pooling"])
    assert sum(states.lengths) == len(expected)
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(model(**text, visual_states=states).logits, own.logits, rtol=0, atol=1e-5)


def test_a_batch_of_unlike_videos_is_each_of_them_alone(film):
    model, processor = make_model(), make_processor()
    texts = ["<video>a", "b", "c<image><video>d<video>e"]
    given = {"images": frames(1), "videos": [str(film), frames(2), frames(4)], "num_frames": 3}
    together = prompt(processor, texts, **given)
    answers = model.generate(**together, max_new_tokens=5, do_sample=False)[:, -5:]
    alone = [
        prompt(processor, texts[0], videos=str(film), num_frames=3),
        prompt(processor, texts[1]),
        prompt(processor, texts[2], images=frames(1), videos=[frames(2), frames(4)], num_frames=3),
    ]
    for row, one in zip(answers, alone):
        assert row.tolist() == model.generate(**one, max_new_tokens=5, do_sample=False)[0, -5:].tolist()
    beams = model.generate(**together, max_new_tokens=4, num_beams=3, num_return_sequences=2, do_sample=False)
    for index, one in enumerate(alone):
        again = model.generate(**one, max_new_tokens=4, num_beams=3, num_return_sequences=2, do_sample=False)
        assert beams[2 * index : 2 * index + 2, -4:].tolist() == again[:, -4:].tolist()


@pytest.mark.parametrize("kind", ["LlavaNextImageProcessor", "LlavaOnevisionImageProcessor", "GotOcr2ImageProcessor"])
def test_frames_beside_images_in_tiles(kind):
    import transformers

    from saisa_hf.compat_saisa import pillow_image_processor

    pinpoints, side = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]], {"height": SIDE, "width": SIDE}
    of_kind = {
        "LlavaNextImageProcessor": {
            "size": {"shortest_edge": SIDE},
            "crop_size": side,
            "image_grid_pinpoints": pinpoints,
        },
        "LlavaOnevisionImageProcessor": {"size": side, "image_grid_pinpoints": pinpoints},
        "GotOcr2ImageProcessor": {"size": side, "crop_to_patches": True, "max_patches": 3},
    }[kind]
    images = pillow_image_processor(getattr(transformers, kind)(**of_kind))
    tiles = {} if kind[0] == "G" else {"image_grid_pinpoints": pinpoints}
    model, processor = make_model(**tiles), make_processor()
    processor.image_processor = images
    still, wide = Image.fromarray(pictures(1, (96, 40))[0]), [Image.fromarray(one) for one in pictures(3, (96, 40))]
    both = prompt(processor, ["<image>a<video>b", "<image>c"], images=[still, still], videos=[wide])
    own = model(**both).logits
    one, other = prompt(processor, "<image>c", images=[still]), prompt(processor, "<video>b", videos=[wide])
    assert runs(other["input_ids"][0].tolist()) == [3 * POOLED]  # no newlines, no tiles
    length = one["input_ids"].shape[1]
    torch.testing.assert_close(own[1, -length:], model(**one).logits[0], rtol=0, atol=1e-5)
    states = model.get_visual_states(
        **{name: x for name, x in both.items() if name not in ("input_ids", "attention_mask")}
    )
    assert states.lengths[1:4] == [POOLED] * 3 and states.lengths[0] == states.lengths[4] > TOKENS
    alone = model.get_visual_states(
        **{name: x for name, x in other.items() if name not in ("input_ids", "attention_mask")}
    )
    whole = prompt(make_processor(), videos=[wide])
    torch.testing.assert_close(other["pixel_values"][:, 0], whole["pixel_values"])
    for name, x in states[1:4].compact().stored.tensors().items():
        torch.testing.assert_close(x, alone.stored.tensors()[name], rtol=0, atol=1e-5)
    model.generate(**both, max_new_tokens=2, num_beams=2)


def test_one_image_beside_a_video_has_tiles_and_one_of_several_has_none():
    import transformers

    from saisa_hf.compat_saisa import pillow_image_processor

    pinpoints, side = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE]], {"height": SIDE, "width": SIDE}
    images = transformers.LlavaOnevisionImageProcessor(size=side, image_grid_pinpoints=pinpoints)
    processor = make_processor()
    processor.image_processor = pillow_image_processor(images)
    knows = "{% for m in messages %}{% for p in m.content %}<{{ p.type }}>{% endfor %} what?{% endfor %}"
    wide = [Image.fromarray(one) for one in pictures(3, (96, 40))]
    video, still = {"type": "video", "video": wide}, {"type": "image", "image": wide[0]}
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    for template in (None, knows):
        for parts, tiles in (([still, video], [3, 1, 1, 1]), ([video, still, still], [1, 1, 1, 1, 1])):
            out = processor.apply_chat_template([{"role": "user", "content": parts}], chat_template=template, **options)
            assert out["num_tiles"].tolist() == tiles
    both = prompt(processor, ["<video>a<image>", "<image>b<image>"], images=[wide[:1], wide[:2]], videos=[wide])
    assert both["num_tiles"].tolist() == [1, 1, 1, 3, 1, 1]


def test_a_checkpoints_own_code_reads_videos_where_the_package_is(film, tmp_path):
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    make_processor(video_settings={"num_frames": 3}).save_pretrained(tmp_path)
    own = get_class_from_dynamic_module("processing_saisa.SaisaProcessor", str(tmp_path))
    processor = own.from_pretrained(tmp_path)
    assert not isinstance(processor, SaisaProcessor)
    chat = [{"role": "user", "content": [{"type": "video", "path": str(film)}, {"type": "text", "text": "what?"}]}]
    for out in (
        processor(text="<video>what?", videos=str(film)),
        processor.apply_chat_template(chat, tokenize=True, return_dict=True),
    ):
        assert runs(out["input_ids"][0]) == [3 * POOLED] and out["frame_pooling"] == [2, 2, 2]


def test_frame_pooling_has_to_fit():
    model, processor = make_model(), make_processor()
    batch = prompt(processor, videos=frames(3))
    for wrong in ([2, 2], [2, 2, 0], [2, 2, 2, 2]):
        with pytest.raises(ValueError, match=r"frame_pooling=.*: expected 3 positive numbers"):
            model(**{**batch, "frame_pooling": torch.tensor(wrong)})
    with pytest.raises(ValueError, match="placeholders"):
        model(**{**batch, "frame_pooling": torch.tensor([1, 2, 2])})
    full = make_model(vision_feature_select_strategy="full", vision_seq_length=None)
    with pytest.raises(
        ValueError, match="expected 3 positive numbers, all 1 with vision_feature_select_strategy='full'"
    ):
        full(**batch)
    whole = make_processor(vision_feature_select_strategy="full", video_settings={"pool": 1})
    batch = prompt(whole, videos=frames(3))  # what the processor's own error says to do
    assert runs(batch["input_ids"][0].tolist()) == [3 * (TOKENS + 1)] and full(**batch).logits.isfinite().all()


# --- long inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [{}, {"projector_sharing": "shared"}, {"alignment": "embedding_space"}])
def test_many_frames_are_encoded_and_projected_in_turns(kind, monkeypatch):
    model, processor = make_model(**kind), make_processor()
    batch = prompt(processor, "<image>a<video>b", images=frames(1), videos=frames(20))
    with torch.no_grad():
        whole = model(**batch)
    store = {"pixel_values": batch["pixel_values"], "frame_pooling": batch["frame_pooling"]}
    kept = model.get_visual_states(**store)
    model.config.images_at_once = 8
    monkeypatch.setattr("saisa_hf.vision_saisa.ROWS_AT_ONCE", 32)
    encoded, projector = [], next(m for name, m in model.named_modules() if name.endswith("visual_projector"))
    model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    projected = []
    projector.register_forward_pre_hook(lambda module, args: projected.append(len(args[0])))
    with torch.no_grad():
        turns = model(**batch)
    assert encoded == [8, 8, 5] and projected == [32, 32, 25]  # 9 + 20 * 4 = 89 visual tokens
    torch.testing.assert_close(turns.logits, whole.logits, rtol=0, atol=1e-5)
    states = model.get_visual_states(**store)
    assert encoded == [8, 8, 5] * 2 and states.lengths == kept.lengths and states.fingerprint == kept.fingerprint
    for name, x in states.stored.tensors().items():
        torch.testing.assert_close(x, kept.stored.tensors()[name], rtol=0, atol=1e-5)
    answers = model.generate(**batch, max_new_tokens=3, do_sample=False)
    model.config.images_at_once = 1000
    assert answers.tolist() == model.generate(**batch, max_new_tokens=3, do_sample=False).tolist()


def test_turns_have_what_comes_with_each_image():
    """The shapes of SigLIP 2's images; and which tokens a class token kept."""
    model, shapes = tiny_model(vision="siglip2"), torch.tensor([[2, 2], [1, 4], [4, 1], [1, 3], [2, 1]])
    mask = (torch.arange(4) < shapes.prod(1, keepdim=True)).long()
    images = {"pixel_values": torch.randn(5, 4, 48), "spatial_shapes": shapes, "pixel_attention_mask": mask}
    kept = make_model(visual_token_reduction="class_attention", reduced_visual_tokens=3, vision_seq_length=None)
    for one, given in ((model, images), (kept, {"pixel_values": torch.randn(5, 3, SIDE, SIDE)})):
        found = []
        for at_once in (5, 2):
            one.config.images_at_once = at_once
            with torch.no_grad():
                found.append(one.get_image_features(**given))
        whole, turns = found
        for a, b in zip(whole.pooler_output, turns.pooler_output, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        assert one is model or torch.equal(whole.kept_tokens, turns.kept_tokens)
    assert [len(x) for x in model.get_image_features(**images).pooler_output] == [4, 4, 4, 3, 2]


def test_pieces_and_the_whole_have_the_same_gradients():
    model, processor = make_model().train(), make_processor()
    batch = prompt(processor, videos=frames(7))
    gradients = []
    for at_once in (100, 3):
        model.config.images_at_once = at_once
        model.zero_grad()
        model(**batch, labels=batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN, -100)).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=1e-5)


def test_memory_beyond_what_is_kept_does_not_grow_with_the_video(monkeypatch):
    monkeypatch.setattr("saisa_hf.vision_saisa.ROWS_AT_ONCE", 64)
    model, beyond = make_model(images_at_once=8), []
    for count in (64, 256):
        pixels, pooling = torch.randn(count, 3, SIDE, SIDE), torch.full((count,), 2)
        with torch.no_grad():
            states = model.get_visual_states(pixels, frame_pooling=pooling)
            peak = peak_memory(lambda: model.get_visual_states(pixels, frame_pooling=pooling), "cpu")  # noqa: B023
        features = 4 * count * POOLED * model.config.vision_feature_size
        beyond.append(peak - states.nbytes - 2 * features)
    assert beyond[1] < 1.1 * beyond[0] and beyond[0] < states.nbytes / 2


@pytest.mark.parametrize("images", [64, 0])
def test_64_images_or_128_frames_in_one_prompt(images):
    model, processor = make_model(), make_processor()
    if images:
        batch = prompt(processor, "<image>" * images + "what?", images=frames(images))
    else:
        batch = prompt(processor, videos=frames(128), num_frames=128)
    assert runs(batch["input_ids"][0].tolist()) == [images * TOKENS or 128 * POOLED]
    answer = model.generate(**batch, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] == batch["input_ids"].shape[1] + 3


def test_a_second_question_about_a_video_costs_its_text(tmp_path, film):
    model, processor = make_model(), make_processor()
    batch = prompt(processor, "<video>what?", videos=str(film), num_frames=6)
    states = model.get_visual_states(batch["pixel_values"], frame_pooling=batch["frame_pooling"])
    states.save(tmp_path / "film.safetensors")
    states = SaisaVisualStates.load(tmp_path / "film.safetensors")
    assert states.lengths == [POOLED] * 6

    def refuse(*_):
        raise AssertionError("this was computed already")

    expected = model.generate(**prompt(processor, "<video>who?", videos=str(film), num_frames=6), max_new_tokens=4)
    model.vision_tower.register_forward_pre_hook(refuse)
    for layer in model.language_model.layers:
        layer.visual_projector.register_forward_pre_hook(refuse)
    second = prompt(processor, "<image>" * 6 + "who?", visual_states=states)
    assert model.generate(**second, max_new_tokens=4).tolist() == expected.tolist()


# --- conversations ----------------------------------------------------------------------------------------------------


def test_a_video_in_a_conversation_is_decoded_and_encoded_once(film, monkeypatch):
    model, processor = make_model(), make_processor(video_settings={"timestamps": True, "num_frames": 4})
    conversation = Conversation(model, processor, max_new_tokens=3, do_sample=False)
    encoded = []
    model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: encoded.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    list(conversation.ask("what?", images=frames(1), videos=[str(film)]))
    monkeypatch.setattr("saisa_hf.common.videos.decoded_frames", None)
    assert encoded == [5] and runs(conversation.inputs(conversation.messages)["input_ids"][0].tolist()) == [
        9,
        4,
        4,
        4,
        4,
    ]
    list(conversation.ask("and?"))
    assert encoded == [5]
    said = conversation.messages[-1]
    conversation.clear()
    with pytest.raises(ValueError, match=r"video 0 cannot be read: .*No such file"):
        list(conversation.ask("what?", videos=["no.mp4"]))
    assert not conversation.messages and said["role"] == "assistant"


def test_saisa_chat_shows_videos(film, monkeypatch, capsys, tmp_path):
    def chat(lines, *arguments):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        status = main(["chat", str(CHECKPOINT), "--max-new-tokens", "3", "--temperature", "0", *arguments])
        return status, *capsys.readouterr()

    seen = []
    ask = Conversation.ask

    def noted(self, text, images, videos):
        seen.append([len(one.images) for one in videos])
        return ask(self, text, images, videos)

    monkeypatch.setattr(Conversation, "ask", noted)
    lines = f"how many digits are there?\n/clear\n/video {film} {film}\n\n"
    status, out, err = chat(lines, "--video", str(film), "--num-frames", "3")
    assert (status, len(out.splitlines()), err) == (0, 2, "") and seen == [[3], [3, 3]]
    (tmp_path / "text.mp4").write_text("no film")
    for given, message in (
        ("no.mp4", "There is no video 'no.mp4'"),
        (str(tmp_path / "text.mp4"), "it is no video of a format"),
    ):
        status, out, err = chat("a\n", "--video", given)
        assert (status, out, err.count("\n")) == (1, "", 1) and message in err


def test_progress_is_shown_where_it_takes_a_while(capsys):
    model = make_model(images_at_once=8)
    with encoding_progress(model, 20, progress=True):
        model.get_image_features(torch.zeros(20, 3, SIDE, SIDE))
    assert "encoding images" in capsys.readouterr().err
    with encoding_progress(model, 20, progress=False), encoding_progress(model, 8, progress=True):
        model.get_image_features(torch.zeros(8, 3, SIDE, SIDE))
    assert not capsys.readouterr().err and not model.vision_tower._forward_hooks


def test_progress_is_gone_when_the_answer_begins_and_counts_what_is_encoded(capsys, monkeypatch):
    model, told = make_model(images_at_once=8), []
    text = torch.tensor([[5, 6]])
    with encoding_progress(model, 20, progress=True):
        model(text)
        assert not capsys.readouterr().err  # a later turn, of text
        model.get_image_features(torch.zeros(20, 3, SIDE, SIDE))
        assert "/20 " in capsys.readouterr().err
        model(text)
        shown = capsys.readouterr().err
        assert shown.endswith("\r") and not shown.strip()
    assert not capsys.readouterr().err and not model.language_model._forward_pre_hooks
    monkeypatch.setattr("saisa_hf.chat.conversation.encoding_progress", lambda *given: told.append(given) or 1 / 0)
    tiles = BatchFeature({"pixel_values": torch.zeros(2, 5, 3, SIDE, SIDE), "num_tiles": torch.tensor([5, 1])})
    Conversation(model, make_processor())._generate(tiles, None, None, queue.SimpleQueue(), [])
    assert told[0][1] == 6
