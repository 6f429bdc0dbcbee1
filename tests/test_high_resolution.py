"""Images in tiles: what transformers' LLaVA-NeXT and LLaVA-OneVision make of an image, and the same in SAISA."""

import pytest
import torch
import transformers
from tile_parts import (
    EXTREMES,
    IMAGE,
    ONEVISION,
    close,
    draw,
    make_next,
    make_onevision,
    next_processor,
    onevision_processor,
    our_processor,
    random_sizes,
    tiled_saisa,
    tiles_processor,
)

from saisa_hf import SaisaForConditionalGeneration, SaisaVisualStates
from saisa_hf.tiles_saisa import NEWLINE


MAKERS = {"next": (make_next, next_processor), "onevision": (make_onevision, onevision_processor)}
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


@both
@pytest.mark.parametrize("vision", ["clip", "siglip"])
def test_features_are_transformers_own(kind, vision, tmp_path):
    if (kind, vision) == ("onevision", "clip"):
        pytest.skip("it has a class token, which transformers' OneVision takes for a patch")
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
    model.zero_grad()
    images = {name: batch[name][:0] for name in ("pixel_values", "image_sizes", "num_tiles") if name in batch}
    text = processor(text="what is this ?", return_tensors="pt")
    model(**text, **images, labels=text["input_ids"]).loss.backward()
    for name, p in model.named_parameters():
        if "visual_projector" in name:
            assert p.grad is not None and not p.grad.any(), name
