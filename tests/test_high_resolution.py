"""Images in tiles: what transformers' LLaVA-NeXT and LLaVA-OneVision make of an image, and the same in SAISA."""

import copy
import json
import re

import pytest
import torch
import transformers
from test_build import parts_on_disk
from tile_parts import (
    EXTREMES,
    IMAGE,
    MAKERS,
    NEXT,
    ONEVISION,
    SIDE,
    TOKENIZER,
    TOKENS,
    VISIONS,
    close,
    draw,
    next_processor,
    onevision_processor,
    our_processor,
    random_sizes,
    text_config,
    tiled_saisa,
    tiles_processor,
)
from tiny_models import tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration, SaisaProcessor, SaisaVisualStates
from saisa_hf.bench import measure
from saisa_hf.chat.conversation import Conversation
from saisa_hf.cli import main
from saisa_hf.inspection.attention_maps import attend
from saisa_hf.tiles_saisa import NEWLINE, visual_input
from saisa_hf.training.encoding import ConversationEncoder, SaisaCollator


both = pytest.mark.parametrize("kind", MAKERS)
SIZES = [(24, 24), (30, 10), (7, 40), (13, 12), (40, 2), (50, 37)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A LLaVA-NeXT and a LLaVA-OneVision with their processors, as folders."""
    made = {}
    for kind, (make, _) in MAKERS.items():
        made[kind] = tmp_path_factory.mktemp(kind)
        make().save_pretrained(made[kind])
    return made


# 4.57 takes an image of one row, or of three, for one whose channels come first, unless it is told
TOLD = {} if transformers.__version__ >= "5" else {"input_data_format": "channels_last"}


def same_inputs(ours, theirs, sizes, seed=0):
    for number, size in enumerate(sizes):
        image, text = draw(seed + number, size), "what <image> is this ?"
        wanted = theirs(images=image, text=text, return_tensors="pt", **TOLD)
        found = ours(images=image, text=text, return_tensors="pt")
        for name in ("input_ids", "attention_mask", "pixel_values", "image_sizes"):
            assert torch.equal(found[name], wanted[name]), (size, name)


@both
def test_placeholders_and_pixels_are_transformers_own(kind):
    theirs = MAKERS[kind][1]()
    ours = our_processor(theirs)
    same_inputs(ours, theirs, [*EXTREMES, *random_sizes(14)])
    told = ours._get_num_multimodal_tokens(image_sizes=EXTREMES)["num_image_tokens"]
    for size, count in zip(EXTREMES, told):
        ids = ours(images=draw(0, size), text="<image> ?")["input_ids"][0]
        assert ids.count(IMAGE) == count


REAL = {  # side, pinpoints and aspect ratio of the published models
    "next": (336, [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]], None),
    "onevision": (384, [[384 * a, 384 * b] for a in range(1, 7) for b in range(1, 7)], "anyres_max_9"),
}


@both
def test_numbers_of_placeholders_are_transformers_own_at_the_sizes_of_published_models(kind):
    theirs, (side, pinpoints, aspect) = MAKERS[kind][1](), REAL[kind]
    grid = side // 14
    theirs.image_processor = copy.copy(theirs.image_processor)
    theirs.image_processor.image_grid_pinpoints, theirs.patch_size = pinpoints, 14
    theirs.num_image_tokens, theirs.vision_aspect_ratio = grid * grid, aspect
    owner = tiled_saisa().config
    owner.image_grid_pinpoints, owner.vision_aspect_ratio = pinpoints, aspect
    for size in [*random_sizes(600), *((49 * a, 49 * b) for a in range(1, 15) for b in range(1, 15))]:
        expected = theirs._get_number_of_features(*size, side, side) - (kind == "next")  # the class token
        found = visual_input(owner, size, None, grid * grid, (grid, grid), (side, side))
        assert found.length == expected, size


@pytest.mark.slow
@both
def test_placeholders_and_pixels_are_transformers_own_on_500_sizes(kind):
    theirs = MAKERS[kind][1]()
    same_inputs(our_processor(theirs), theirs, random_sizes(500, seed=1))


def test_one_of_several_images_has_no_tiles_in_onevision():
    theirs = onevision_processor()
    ours = our_processor(theirs)
    images, texts = [draw(i, size) for i, size in enumerate(SIZES[:3])], ["<image> and <image> ?", "what <image> ?"]
    for given in (images, [images[:2], images[2:]]):
        wanted = theirs(images=given, text=texts, padding=True, return_tensors="pt")
        found = ours(images=given, text=texts, padding=True, return_tensors="pt")
        for name in ("input_ids", "attention_mask", "pixel_values", "image_sizes"):
            assert torch.equal(found[name], wanted[name]), name
    assert found["num_tiles"].tolist()[:2] == [1, 1] and found["num_tiles"][2] > 1
    parts = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "what is this ?"}]
    chat = [[{"role": "user", "content": parts}], [{"role": "user", "content": parts[1:]}]]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    assert torch.equal(ours.apply_chat_template(chat, images=images, **options)["num_tiles"], found["num_tiles"])


# not OneVision with CLIP, whose class token transformers' OneVision takes for a patch
@pytest.mark.parametrize(("kind", "vision"), [("next", "clip"), ("next", "siglip"), ("onevision", "siglip")])
def test_features_are_transformers_own(kind, vision, tmp_path):
    llava = MAKERS[kind][0](vision)
    llava.save_pretrained(tmp_path)
    model = SaisaForConditionalGeneration.from_pretrained(tmp_path)
    inputs = our_processor(MAKERS[kind][1]())(
        images=[draw(i, size) for i, size in enumerate(SIZES)], return_tensors="pt"
    )
    given = {"pixel_values": inputs["pixel_values"], "image_sizes": inputs["image_sizes"]}
    with torch.no_grad():
        theirs = llava.model.get_image_features(**given)
        theirs = getattr(theirs, "pooler_output", theirs)
        for arguments in (given, {**given, "num_tiles": inputs["num_tiles"]}):
            for a, b in zip(model.get_image_features(**arguments).pooler_output, theirs, strict=True):
                close(a, b)
        # in input space, the encoder's own are put together by transformers' own function
        saisa = tiled_saisa(vision, image_grid_pinpoints=llava.config.image_grid_pinpoints,
                            vision_aspect_ratio=model.config.vision_aspect_ratio)  # fmt: skip
        pictures = [x[:n] for x, n in zip(given["pixel_values"], inputs["num_tiles"])]
        plain = [saisa.get_image_features(x).pooler_output for x in pictures]
        strategy = (
            {"vision_feature_select_strategy": "full"} if kind == "next" else {"vision_aspect_ratio": "anyres_max_4"}
        )
        newline = torch.full((plain[0].shape[-1],), NEWLINE)
        wanted, _ = llava.model.pack_image_features(plain, given["image_sizes"], image_newline=newline, **strategy)
        for a, b in zip(saisa.get_image_features(**given).pooler_output, wanted, strict=True):
            close(a, b)


@both
def test_images_of_the_most_extreme_shapes_have_as_many_features_as_placeholders(kind):
    model, processor = made(kind)
    for size in EXTREMES:
        inputs = processor(images=draw(0, size), text="<image> ?", return_tensors="pt")
        (features,) = model.get_image_features(inputs["pixel_values"], image_sizes=inputs["image_sizes"]).pooler_output
        assert len(features) == int((inputs["input_ids"] == IMAGE).sum()), size
    # scaled down to no row at all
    settings = {"image_grid_pinpoints": [[SIDE, 20 * SIDE]], "vision_aspect_ratio": "anyres_max_1"}
    one = visual_input(tiled_saisa("siglip", **settings).config, (1, 4000), None, TOKENS, (3, 3), (SIDE, SIDE))
    assert one.shape[0] == 0 and len(one.joined(torch.zeros(21, TOKENS, 4), torch.ones(4))) == one.length == TOKENS


@both
def test_a_folder_gives_transformers_logits_text_loss_and_gradients(kind, folders):
    make, processor = MAKERS[kind]
    llava, theirs = type(make()).from_pretrained(folders[kind]), processor()
    model, info = SaisaForConditionalGeneration.from_pretrained(folders[kind], output_loading_info=True)
    assert not any(info.values()) and model.config.image_grid_pinpoints == llava.config.image_grid_pinpoints
    llava.generation_config, ours = model.generation_config, our_processor(theirs)
    images = [draw(i, size) for i, size in enumerate(SIZES)]
    texts = ["what <image> and <image> is this ?", "<image> <image> two", "what is in <image> <image> ?"]
    given = [images[:2], images[2:4], images[4:]] if kind == "onevision" else images
    for side in ("left", "right"):
        options = {"padding": True, "padding_side": side, "return_tensors": "pt"}
        inputs, own = theirs(images=given, text=texts, **options), ours(images=given, text=texts, **options)
        inputs.pop("token_type_ids", None)
        real = inputs["attention_mask"].bool()
        labels = inputs["input_ids"].masked_fill(~real | (inputs["input_ids"] == IMAGE), -100)
        expected = llava(**inputs, labels=labels)
        for name in ("input_ids", "pixel_values"):
            assert torch.equal(own[name], inputs[name])
        found = model(**own, labels=labels)
        close(found.logits[real], expected.logits[real])
        close(found.loss, expected.loss)
        if side == "left":
            greedy = {"max_new_tokens": 6, "do_sample": False}
            text = llava.generate(**inputs, **greedy, suppress_tokens=[IMAGE])
            assert torch.equal(model.generate(**own, **greedy), text)
            assert torch.equal(model.generate(**own, **greedy, num_beams=2)[:, : text.shape[1] - 6], own["input_ids"])
    expected.loss.backward()
    found.loss.backward()
    newline = model.model.visual_projector.image_newline
    torch.testing.assert_close(newline.grad, llava.model.image_newline.grad, rtol=1e-3, atol=1e-5)
    assert newline.grad.abs().max() > 0


# --- in input space ---------------------------------------------------------------------------------------------------

TEXTS = ["what <image> and <image> is this ?", "two", "<image> what is in <image> <image> ?", "what is <image> ?"]
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def a_batch(processor, side="left"):
    """A batch of texts with two, no, three and one image."""
    images = [draw(i, size) for i, size in enumerate(SIZES)]
    return processor(images=images, text=TEXTS, padding=True, padding_side=side, return_tensors="pt")


def rows_alone(batch):
    """Each row of a batch as a batch of its own, without its padding."""
    first = 0
    for ids, mask, text in zip(batch["input_ids"], batch["attention_mask"], TEXTS):
        last = first + text.count("<image>")
        names = ("pixel_values", "image_sizes", "num_tiles") if last > first else ()
        images = {name: batch[name][first:last] for name in names if name in batch}
        yield {"input_ids": ids[mask.bool()][None], **images}
        first = last


def as_next(**settings):
    return our_processor(next_processor(), **settings)


POOLED = {"visual_token_reduction": "avg_pool"}
AS_ONEVISION = {"image_grid_pinpoints": ONEVISION, "vision_aspect_ratio": "anyres_max_4", "vision": "siglip"}
WAYS = {
    "next": ({}, as_next),
    "shared": ({"projector_sharing": "shared"}, as_next),
    "some layers": ({"visual_layers": [0, 2]}, as_next),
    "pooled": (POOLED, lambda: as_next(tokens=4, **POOLED)),
    "onevision": (AS_ONEVISION, lambda: our_processor(onevision_processor())),
    "tiles": ({"image_grid_pinpoints": None}, tiles_processor),
    "embedding space": ({"alignment": "embedding_space", "visual_attention": "full"}, as_next),
}
each_way = pytest.mark.parametrize("way", WAYS)


def made(way):
    settings, processor = WAYS[way]
    return tiled_saisa(**settings), processor()


@each_way
def test_rows_of_a_batch_are_as_alone_with_states_in_place_of_pixels_too(way, tmp_path):
    model, processor = made(way)
    with torch.no_grad():
        for side in ("left", "right"):
            batch = a_batch(processor, side)
            logits, real = model(**batch).logits, batch["attention_mask"].bool()
            for row, mask, own in zip(rows_alone(batch), real, logits):
                close(model(**row).logits[0], own[mask])
        batch = a_batch(processor)
        images = {name: batch[name] for name in batch if name not in ("input_ids", "attention_mask", "token_type_ids")}
        text = {name: batch[name] for name in ("input_ids", "attention_mask")}
        expected = model.generate(**batch, **GREEDY)
        for store in ("features", None):
            states = model.get_visual_states(**images, store=store)
            states.save(tmp_path / "states")
            for one in (states, SaisaVisualStates.load(tmp_path / "states")):
                close(model(**text, visual_states=one).logits[real], model(**batch).logits[real])
            joined = SaisaVisualStates.cat([states[3:], states[:3]])[[3, 4, 5, 0, 1, 2]]
            assert torch.equal(model.generate(**text, visual_states=joined, **GREEDY), expected)
            again = processor(
                visual_states=states[[4, 4]],
                text=["<image> ? two", "what <image> ?"],
                return_tensors="pt",
                padding=True,
            )
            pixels = processor(
                images=[draw(4, SIZES[4])] * 2,
                text=["<image> ? two", "what <image> ?"],
                return_tensors="pt",
                padding=True,
            )
            assert torch.equal(again["input_ids"], pixels["input_ids"])
            close(model(**again).logits, model(**pixels).logits)


def test_states_of_other_tiles_are_refused():
    """Weights may be the same; what decides nothing about visual states is not compared."""
    made = [tiled_saisa(**settings) for settings in (
        {}, {"images_at_once": 3}, {"leading_text_skips_attention": True}, {"image_grid_pinpoints": ONEVISION},
        {"vision_aspect_ratio": "anyres_max_4"}, {"image_grid_pinpoints": None},
    )]  # fmt: skip
    for store in ("features", "keys_values"):
        prints = [model.model.visual_fingerprint(store) for model in made]
        assert prints[0] == prints[1] == prints[2] and len({*prints}) == 4
    states = made[0].get_visual_states(torch.zeros(1, 3, SIDE, SIDE))
    with pytest.raises(ValueError, match="computed with other weights or settings than this model's"):
        made[3].model.check_visual_states(states)


@each_way
def test_every_cache_and_beams_give_the_same_text(way):
    model, processor = made(way)
    batch = a_batch(processor)
    expected = model.generate(**batch, **GREEDY)
    for cache in ("static", "dynamic", None):
        options = {"use_cache": False} if cache is None else {"cache_implementation": cache}
        assert torch.equal(model.generate(**batch, **GREEDY, **options), expected), cache
    beams = model.generate(**batch, **GREEDY, num_beams=2)
    for row, own, mask in zip(rows_alone(batch), beams, batch["attention_mask"]):
        assert torch.equal(model.generate(**row, **GREEDY, num_beams=2)[0], own[int((mask == 0).sum()) :])
    first, images = processor(images=draw(0, SIZES[0]), text="what <image> ?", return_tensors="pt"), [draw(1, SIZES[1])]
    said = model.generate(**first, **GREEDY, return_dict_in_generate=True)
    more = processor(images=[draw(0, SIZES[0]), *images], text="what <image> ? <image> two ?", return_tensors="pt")
    turn = processor(images=images, text="<image> two ?", return_tensors="pt", add_special_tokens=False)
    ids = torch.cat([said.sequences, turn["input_ids"]], dim=1)
    mask = torch.ones_like(ids)
    alone = {name: more[name] for name in more if name not in ("input_ids", "attention_mask", "token_type_ids")}
    expected = model.generate(input_ids=ids, attention_mask=mask, **alone, **GREEDY)
    found = model.generate(input_ids=ids, attention_mask=mask, **alone, past_key_values=said.past_key_values, **GREEDY)
    assert torch.equal(found, expected)


@each_way
def test_newlines_learn_and_checkpointed_gradients_are_those_without(way):
    model, processor = made(way)
    batch = a_batch(processor, "right")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    found = []
    for checkpointed in (False, True):
        model.train().zero_grad()
        if checkpointed:
            model.gradient_checkpointing_enable()
        loss = model(**batch).loss
        loss.backward()
        close(model(**batch, skip_logits=True).loss, loss)
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        close(found[1][name], gradient)
    newlines = [gradient for name, gradient in found[0].items() if name.endswith("visual_projector.image_newline")]
    several = model.config.projector_sharing == "per_layer"
    assert len(newlines) == (0 if way == "tiles" else len(model.config.visual_layers or range(3)) if several else 1)
    assert all(gradient.abs().max() > 0 for gradient in newlines)
    # a batch of text brings gradients of zero to all that learns from images
    text = processor(text="what is this ?", return_tensors="pt")
    for names in (("pixel_values", "image_sizes", "num_tiles"), ("pixel_values",)):
        model.zero_grad()
        images = {name: batch[name][:0] for name in names if name in batch}
        model(**text, **images, labels=text["input_ids"]).loss.backward()
        for name, p in model.named_parameters():
            if "visual_projector" in name:
                assert p.grad is not None and not p.grad.any(), name


def test_training_takes_images_of_unlike_numbers_of_tiles():
    model, processor = made("next")
    samples = []
    for number, size in enumerate([(24, 24), (7, 40), None, (13, 12)]):
        asked = [{"type": "text", "text": "what is this ?"}]
        images = [] if size is None else [draw(number, size)]
        content = [{"type": "image"} for _ in images] + asked
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "two"}]
        samples.append({"messages": messages, "images": images})
    collate = SaisaCollator(ConversationEncoder(processor))
    batch = collate(samples)
    assert batch["pixel_values"].shape[:2] == (3, 5) and batch["num_tiles"].tolist() == [5, 4, 3]
    loss = model(**batch).loss
    ones = [collate([sample]) for sample in samples]
    counts = [int((one["labels"] != -100).sum()) for one in ones]
    alone = sum(model(**one).loss * count for one, count in zip(ones, counts)) / sum(counts)
    close(loss, alone)
    assert ones[2]["pixel_values"].shape[::2] == (0, 3, SIDE) and len(ones[2]["num_tiles"]) == 0
    packed = SaisaCollator(ConversationEncoder(processor), packing=True)(samples)
    close(model(**packed).loss, loss)


def test_images_of_a_sample_are_read_as_those_of_a_prompt():
    """One of several has no tiles in LLaVA-OneVision, in training as in a chat."""
    processor = our_processor(onevision_processor())
    for count in (1, 2):
        images, parts = [draw(i, SIZES[i]) for i in range(count)], [{"type": "image"}] * count
        chat = [{"role": "user", "content": [*parts, {"type": "text", "text": "what is this ?"}]}]
        answer = [{"role": "assistant", "content": "two"}]
        learned = ConversationEncoder(processor)({"messages": chat + answer, "images": images})
        options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
        asked = processor.apply_chat_template(chat, images=images, **options)
        assert torch.equal(learned["pixel_values"], asked["pixel_values"])
        assert learned["input_ids"].count(IMAGE) == int((asked["input_ids"] == IMAGE).sum())


def test_a_chat_goes_on_with_an_image_of_more_tiles_from_what_is_cached():
    model, processor = made("next")
    read, forward = [], model.model.language_model.forward
    model.model.language_model.forward = lambda *a, **k: (read.append(k["input_ids"].shape[1]), forward(*a, **k))[1]
    chat = Conversation(model, processor, max_new_tokens=3)
    said = []
    for number, size in enumerate([(13, 12), (24, 24)]):
        read.clear()
        "".join(chat.ask("what is this ?", [draw(number, size)]))
        said.append(read[0])
    ids = chat.inputs(chat.messages)["input_ids"]
    assert said[1] < ids.shape[1] - said[0] + 8  # what the second turn brought, not the whole conversation
    fresh = Conversation(model, processor, max_new_tokens=3)
    fresh.messages = chat.messages[:2]
    "".join(fresh.ask("what is this ?", [draw(1, (24, 24))]))
    assert fresh.messages == chat.messages


def test_a_chat_reads_an_image_again_that_has_lost_its_tiles():
    """A second image takes the tiles of the first away in LLaVA-OneVision; whole images are the same."""
    model, processor = made("onevision")
    read, forward = [], model.model.language_model.forward
    model.model.language_model.forward = lambda *a, **k: (read.append(k["input_ids"].shape[1]), forward(*a, **k))[1]
    chat = Conversation(model, processor, max_new_tokens=3)
    "".join(chat.ask("what is this ?", [draw(0, (24, 24))]))
    first = int((chat.inputs(chat.messages)["input_ids"] == IMAGE).sum())
    read.clear()
    asked = [*chat.messages, chat.question("what is this ?", [draw(1, (24, 24))])]
    ids = chat.inputs(asked)["input_ids"]
    "".join(chat.ask("what is this ?", [draw(1, (24, 24))]))
    assert int((ids == IMAGE).sum()) == 2 * (TOKENS + 1) < first and read[0] == ids.shape[1]


def test_the_whole_image_alone_may_be_asked_for_at_loading(tmp_path):
    tiled_saisa().save_pretrained(tmp_path)
    model = SaisaForConditionalGeneration.from_pretrained(tmp_path, image_grid_pinpoints=None)
    assert model.config.image_grid_pinpoints is None
    pixels = torch.randn(2, 3, SIDE, SIDE)
    plain = tiled_saisa().get_image_features(pixels).pooler_output
    assert plain.shape[1] == TOKENS and torch.equal(model.get_image_features(pixels).pooler_output, plain)
    with pytest.raises(ValueError, match=r"lacks .*image_newline"):
        tiled_saisa(image_grid_pinpoints=None).save_pretrained(tmp_path / "plain")
        SaisaForConditionalGeneration.from_pretrained(tmp_path / "plain", image_grid_pinpoints=NEXT)


REFUSED = {
    "no list": ({"image_grid_pinpoints": 12}, "image_grid_pinpoints=12: expected a list"),
    "empty": ({"image_grid_pinpoints": []}, "expected a list of [height, width], at least one"),
    "no pairs": ({"image_grid_pinpoints": [[12, 24], [12]]}, "expected a list of [height, width]"),
    "no numbers": ({"image_grid_pinpoints": [["a", 24]]}, "image_grid_pinpoints='a': expected a whole number"),
    "no multiple": ({"image_grid_pinpoints": [[12, 30]]}, "image_grid_pinpoints has [12, 30]: expected multiples of 12 x 12"),
    "too many tiles": ({"image_grid_pinpoints": [[1200, 1200]]}, "image_grid_pinpoints (tiles)=10000: expected a whole"),
    "aspect alone": ({"image_grid_pinpoints": None, "vision_aspect_ratio": "anyres_max_9"}, "goes with image_grid_pinpoints"),
    "no aspect": ({"vision_aspect_ratio": "anyres"}, "vision_aspect_ratio='anyres': expected 'anyres_max_9'"),
    "aspect 0": ({"vision_aspect_ratio": "anyres_max_0"}, "vision_aspect_ratio='anyres_max_0': expected"),
    "class token": ({"vision_feature_select_strategy": "full"}, "choose 'default', as clip_vision_model has 1"),
    "no grid": ({"visual_token_reduction": "resampler", "reduced_visual_tokens": 4}, "choose 'avg_pool', 'pixel_unshuffle'"),
    "own shape": ({"vision": "siglip2"}, "siglip2_vision_model reads images in their own shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_do_not_fit_are_named(case):
    settings, message = REFUSED[case]
    settings = {"image_grid_pinpoints": NEXT, **settings}
    vision = tiny_config(vision=settings.pop("vision")).vision_config if "vision" in settings else VISIONS["clip"]()
    if vision.model_type == "siglip2_vision_model":
        settings["image_grid_pinpoints"] = [[224, 448]]
    with pytest.raises(ValueError, match=re.escape(message)):
        SaisaConfig(vision, text_config(), IMAGE, **settings)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_sizes": None, "num_tiles": None}, "expected image_sizes with it"),
        ({"image_sizes": None}, "num_tiles is given without image_sizes"),
        ({"num_tiles": torch.tensor([2, 4])}, "An image is read as 2 pictures of 12 x 12: expected 1 or 5 by its size"),
        ({"image_sizes": torch.tensor([[24, 24]]), "num_tiles": None}, "pixel_values is (2, 5, 3, 12, 12): expected"),
        ({"pixel_values": torch.zeros(2, 3, 3, SIDE, SIDE)}, "pixel_values is (2, 3, 3, 12, 12): expected pictures of"),
        ({"pixel_values": torch.zeros(2, 3, SIDE, SIDE)}, "pixel_values is (2, 3, 12, 12): expected (images, tiles, "),
    ],
)  # fmt: skip
def test_inputs_that_do_not_fit_are_named(change, message):
    model, processor = made("next")
    inputs = dict(processor(images=[draw(0, (24, 24)), draw(1, (7, 40))], return_tensors="pt"))
    with pytest.raises(ValueError, match=re.escape(message)):
        model.get_image_features(**inputs | change)


def test_attention_maps_are_refused_as_tiles_have_no_one_grid():
    model, processor = made("next")
    with pytest.raises(ValueError, match="The images are read in tiles, which have no one grid over the image"):
        attend(model, processor, [draw(0, (24, 24))], "what is this ?")


def test_in_bfloat16_a_newline_is_one():
    model, processor = made("next")
    batch, half = a_batch(processor), made("next")[0].to(torch.bfloat16)
    images = {name: batch[name] for name in ("pixel_values", "image_sizes", "num_tiles")}
    text, real = {name: batch[name] for name in ("input_ids", "attention_mask")}, batch["attention_mask"].bool()
    with torch.no_grad():
        found, wanted = half(**batch).logits[real], model(**batch).logits[real]
        assert torch.equal(half(**text, visual_states=half.get_visual_states(**images)).logits[real], found)
    assert (found - wanted).abs().max() < 0.03 * wanted.abs().max()


def test_the_processor_refuses_what_the_model_cannot_know():
    with pytest.raises(ValueError, match="image_grid_pinpoints cannot be chosen in a call"):
        as_next()(images=draw(0, (24, 24)), images_kwargs={"image_grid_pinpoints": [[12, 24]]})
    with pytest.raises(ValueError, match="vision_aspect_ratio='wide': expected"):
        SaisaProcessor(next_processor().image_processor, TOKENIZER, vision_aspect_ratio="wide")


# --- the command line -------------------------------------------------------------------------------------------------


def test_saisa_build_makes_a_model_that_reads_tiles(tmp_path, capsys):
    parts, target = parts_on_disk(tmp_path), tmp_path / "out"
    assert main(["build", *map(str, parts), str(target), "--tiles", "1x2", "2x2"]) == 0, capsys.readouterr().err
    model, processor = SaisaForConditionalGeneration.from_pretrained(target), SaisaProcessor.from_pretrained(target)
    side = model.config.vision_config.image_size
    assert model.config.image_grid_pinpoints == [[side, 2 * side], [2 * side, 2 * side]]
    assert processor.image_processor.image_mean == SaisaProcessor.from_pretrained(target).image_processor.image_mean
    inputs = processor(images=draw(0, (2 * side, 2 * side)), text="<image> word1", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 5, 3, side, side)
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    assert main(["check", str(target)]) == 0, capsys.readouterr().out
    settings = target / "preprocessor_config.json"
    whole = json.loads(settings.read_text())
    settings.write_text(json.dumps({**whole, "image_grid_pinpoints": [[side, side]]}))
    assert main(["check", str(target)]) == 1
    assert f"its image_grid_pinpoints is [[{side}, {side}]], expected [[{side}, " in capsys.readouterr().out
    for model_settings in (["--tiles", "1x"], ["--tiles", "0x2"]):
        with pytest.raises(SystemExit):
            main(["build", *map(str, parts), str(tmp_path / "other"), *model_settings])


def test_saisa_flops_counts_the_tiles_of_an_image_as_pytorch_does(tmp_path, capsys):
    model, processor = made("next")
    model.set_attn_implementation("eager")
    model.save_pretrained(tmp_path)
    for size in ((24, 24), (7, 40)):
        inputs = processor(images=draw(0, size), text="<image> ?", return_tensors="pt")
        tokens = inputs["input_ids"].shape[1]
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            counted = measure.flops(lambda given=inputs: model(**given, use_cache=True, logits_to_keep=1))
        visual = int((inputs["input_ids"] == IMAGE).sum())
        sizes = ["--image-size", *map(str, size), "--text", str(tokens - visual), "--json"]
        assert main(["flops", str(tmp_path), *sizes]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["visual"] == visual
        assert sum(found["saisa"]["prompt"].values()) == pytest.approx(counted, rel=0.01)
    assert main(["flops", str(tmp_path)]) == 0
    assert "51 tokens per image, read in 5 pictures" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["flops", str(tmp_path), "--visual", "3", "--image-size", "2", "2"])
    assert main(["flops", "vicuna-7b", "--image-size", "2", "2"]) == 2
    assert "no image_grid_pinpoints" in capsys.readouterr().err
