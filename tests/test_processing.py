"""SaisaProcessor: images of every kind, the authors' tokenization, placeholders, and folders that load elsewhere."""

import functools
import http.server
import io
import json
import pickle
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    AddedToken,
    BitImageProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    PreTrainedTokenizerFast,
    SiglipImageProcessor,
    ViTImageProcessor,
)

from saisa_hf.chat.templates import chat_template
from saisa_hf.compat_saisa import pillow_image_processor
from saisa_hf.images_saisa import load_image
from saisa_hf.processing_saisa import SaisaProcessor, add_image_token
from saisa_hf.tiles_saisa import processed_images
from saisa_hf.visual_states_saisa import SaisaVisualStates, VisualStore


REFERENCE = Path(__file__).parent / "fixtures" / "reference"
PROMPTS = json.loads((REFERENCE / "tokenizer" / "prompts.json").read_text())
PICTURES = ("0_97x41", "2_56x56")
N_VISUAL = 16  # 56 pixels, patches of 14


def clip_processor(**kwargs):
    return CLIPImageProcessor.from_dict(
        json.loads((REFERENCE / "mha" / "preprocessor_config.json").read_text()) | kwargs
    )


def llama_tokenizer(use_fast=True, legacy=True):
    """The fixture's sentencepiece model as a Llama tokenizer; slow exists in transformers 4 only."""
    pytest.importorskip("sentencepiece")
    name = "LlamaTokenizerFast" if use_fast else "LlamaTokenizer"
    tokenizer = getattr(transformers, name).from_pretrained(REFERENCE / "tokenizer", legacy=legacy)
    add_image_token(tokenizer)
    tokenizer.pad_token = "<unk>"
    return tokenizer


@functools.cache
def _bpe_json():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<bos>", "<eos>", "<pad>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["USER: what is in the image ASSISTANT: a digit"] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return tokenizer.to_str()


def bpe_tokenizer():
    from tokenizers import Tokenizer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_bpe_json()), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )
    add_image_token(tokenizer)
    return tokenizer


def make_processor(tokenizer=None, image_processor=None, **kwargs):
    options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return SaisaProcessor(image_processor or clip_processor(), tokenizer or bpe_tokenizer(), **options | kwargs)


def open_picture(name=PICTURES[0]):
    return Image.open(REFERENCE / "images" / f"{name}.png")


def gradient(size=(12, 10)):
    """An image, RGB, whose pixels all differ."""
    y, x = np.mgrid[: size[1], : size[0]]
    return Image.fromarray(np.stack([x * 20, y * 20, x + y], -1).astype(np.uint8))


def collapsed(ids, image_token_id, n=N_VISUAL):
    """`ids` with -200 for each run of `n` placeholders, as the authors write an image."""
    ids, i = list(ids), 0
    while i < len(ids):
        if ids[i] == image_token_id:
            assert ids[i : i + n] == [image_token_id] * n
            ids[i : i + n] = [-200]
        i += 1
    return ids


# --- placeholders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({}, 16),
        ({"vision_feature_select_strategy": "full"}, 17),
        ({"vision_feature_select_strategy": "full", "num_additional_image_tokens": 0}, 16),
        ({"patch_size": 28}, 4),
        ({"image_seq_length": 5}, 5),
        ({"image_seq_length": 5, "patch_size": None}, 5),
    ],
)
def test_an_image_token_becomes_as_many_placeholders_as_the_encoder_has_tokens(kwargs, expected):
    processor = make_processor(**kwargs)
    ids = processor(images=open_picture(), text="what <image> is")["input_ids"][0]
    assert ids.count(processor.image_token_id) == expected
    assert processor._get_num_multimodal_tokens(image_sizes=[(30, 40)])["num_image_tokens"] == [expected]


def test_the_count_agrees_with_llava():
    llava = transformers.LlavaProcessor(
        pillow_image_processor(clip_processor()),
        bpe_tokenizer(),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    ours = make_processor()
    text = "what <image>is in <image> the image"
    arguments = {"images": [open_picture(), open_picture(PICTURES[1])], "text": text, "return_tensors": "pt"}
    expected, got = llava(**arguments), ours(**arguments)
    assert got["input_ids"].tolist() == expected["input_ids"].tolist()
    assert got["attention_mask"].tolist() == expected["attention_mask"].tolist()
    assert torch.equal(got["pixel_values"], expected["pixel_values"])


def test_the_count_follows_the_pixels_of_this_call():
    processor = make_processor()
    size = {"crop_size": {"height": 28, "width": 42}, "size": {"shortest_edge": 42}}
    out = processor(images=open_picture(), text="<image> a", images_kwargs=size, return_tensors="pt")
    assert out["pixel_values"].shape == (1, 3, 28, 42)
    assert (out["input_ids"] == processor.image_token_id).sum() == 6


def test_an_image_processor_that_does_not_crop_works():
    processor = make_processor(
        image_processor=SiglipImageProcessor(size={"height": 32, "width": 48}),
        patch_size=16,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
    )
    out = processor(images=open_picture(), text="<image>a")
    assert out["input_ids"][0].count(processor.image_token_id) == 6


def test_without_patch_size_and_image_seq_length_the_error_names_both():
    with pytest.raises(ValueError, match=r"patch_size.*image_seq_length"):
        make_processor(patch_size=None)(images=open_picture(), text="<image> a")


# --- padding to a square ----------------------------------------------------------------------------------------------


def test_images_padded_to_a_square_equal_the_authors_pixels():
    expected = load_file(REFERENCE / "images" / "pad_expected.safetensors")
    out = make_processor(pad_to_square=True)(images=[open_picture(n) for n in PICTURES], return_tensors="pt")
    for pixels, name in zip(out["pixel_values"], PICTURES):
        torch.testing.assert_close(pixels, expected[name], rtol=0, atol=1e-5)


def test_padding_matters_and_is_saved(tmp_path):
    padded = make_processor(pad_to_square=True)
    plain = make_processor()
    wide = open_picture()
    different = padded(images=wide, return_tensors="pt")["pixel_values"]
    assert not torch.equal(different, plain(images=wide, return_tensors="pt")["pixel_values"])
    padded.save_pretrained(tmp_path)
    loaded = SaisaProcessor.from_pretrained(tmp_path)
    assert torch.equal(loaded(images=wide, return_tensors="pt")["pixel_values"], different)


# --- the authors' tokenization ----------------------------------------------------------------------------------------

SLOW = pytest.param(False, id="slow", marks=pytest.mark.skipif(transformers.__version__ >= "5", reason="4.x only"))


@pytest.mark.parametrize("prompt", PROMPTS, ids=lambda prompt: prompt["name"])
@pytest.mark.parametrize("use_fast", [pytest.param(True, id="fast"), SLOW])
def test_ids_equal_the_authors(prompt, use_fast):
    processor = make_processor(llama_tokenizer(use_fast))
    pictures = [open_picture()] * prompt["prompt"].count("<image>")
    ids = processor(text=prompt["prompt"], images=pictures)["input_ids"][0]
    assert collapsed(ids, processor.image_token_id) == prompt["input_ids"]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("use_fast", [pytest.param(True, id="fast"), SLOW])
@pytest.mark.parametrize(
    "text",
    [
        "<image>\nWhat?",
        "<image><image>\nboth",
        "<image> <image>  two spaces",
        " a space first <image>",
        "héllo 日本語 <image> 🙂🙃 Привет",
        "tab\t<image>\t\n\nx  y ",
    ],
)
def test_the_pieces_around_images_are_tokenized_as_sentencepiece_does_it(text, use_fast, legacy):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(REFERENCE / "tokenizer" / "tokenizer.model"))
    expected = [1]
    for i, piece in enumerate(text.split("<image>")):
        expected += [-200] * (i > 0) + model.encode(piece)
    processor = make_processor(llama_tokenizer(use_fast, legacy))
    ids = processor(text=text, images=[open_picture()] * text.count("<image>"))["input_ids"][0]
    assert collapsed(ids, processor.image_token_id) == expected


@pytest.mark.parametrize("use_fast", [pytest.param(True, id="fast"), SLOW])
def test_what_follows_the_end_of_a_turn_begins_like_a_text(use_fast):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = sentencepiece.SentencePieceProcessor(model_file=str(REFERENCE / "tokenizer" / "tokenizer.model"))
    ids = make_processor(llama_tokenizer(use_fast))(text="ASSISTANT: Yes</s>USER: And</s> so")["input_ids"][0]
    assert ids == [1, *model.encode("ASSISTANT: Yes"), 2, *model.encode("USER: And"), 2, *model.encode(" so")]


def test_the_image_token_leaves_the_text_around_it_alone_and_is_added_once():
    tokenizer = bpe_tokenizer()
    size = len(tokenizer)
    assert add_image_token(tokenizer) == tokenizer.convert_tokens_to_ids("<image>") == size - 1
    assert len(tokenizer) == size
    assert tokenizer.decode(tokenizer("a <image> b")["input_ids"], skip_special_tokens=True) == "a  b"


def test_a_tokenizer_without_the_image_token_is_refused_with_the_way_out():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe_tokenizer().backend_tokenizer)
    with pytest.raises(ValueError, match=r"<picture>.*add_tokens"):
        make_processor(tokenizer, image_token="<picture>")


def test_another_image_token_can_be_named():
    tokenizer = bpe_tokenizer()
    token_id = add_image_token(tokenizer, "<picture>")
    processor = make_processor(tokenizer, image_token="<picture>")
    assert processor.image_token_id == token_id
    ids = processor(images=open_picture(), text="<picture> a <image>")["input_ids"][0]
    assert ids.count(token_id) == N_VISUAL and ids.count(tokenizer.convert_tokens_to_ids("<image>")) == 1


# --- batches ----------------------------------------------------------------------------------------------------------


def test_flat_and_nested_images_give_the_same_batch_in_placeholder_order():
    processor = make_processor()
    a, b = open_picture(), open_picture(PICTURES[1])
    texts = ["what <image> is <image> in", "no picture", "<image> the"]
    arguments = {"text": texts, "padding": True, "return_tensors": "pt"}
    nested = processor(images=[[a, b], [], [a]], **arguments)
    flat = processor(images=[a, b, a], **arguments)
    assert nested["pixel_values"].shape == (3, 3, 56, 56)
    alone = [processor(images=p, return_tensors="pt")["pixel_values"][0] for p in (a, b, a)]
    assert torch.equal(nested["pixel_values"], torch.stack(alone))
    for key in nested:
        assert torch.equal(nested[key], flat[key])
    assert (nested["input_ids"] == processor.image_token_id).sum(1).tolist() == [2 * N_VISUAL, 0, N_VISUAL]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_follows_the_tokenizer(side):
    tokenizer = bpe_tokenizer()
    tokenizer.padding_side = side
    processor = make_processor(tokenizer)
    texts = ["what is in the image", "a"]
    for options in ({"padding": True}, {"padding": "max_length", "max_length": 40}, {"padding": "longest"}):
        options = {**options, "pad_to_multiple_of": 8, "return_tensors": "pt"}
        expected, got = tokenizer(texts, **options), processor(text=texts, **options)
        assert set(got) == {"input_ids", "attention_mask"}
        for key in got:
            assert torch.equal(got[key], expected[key])
    other = processor(text=texts, padding=True, padding_side="left" if side == "right" else "right")
    assert other["attention_mask"][1] == processor(text=texts, padding=True)["attention_mask"][1][::-1]


def test_text_arguments_mean_what_they_mean_to_the_tokenizer():
    tokenizer, text = bpe_tokenizer(), "what is in the image"
    processor = make_processor(tokenizer)
    options = {"return_offsets_mapping": True, "return_length": True, "return_special_tokens_mask": True}
    expected, got = tokenizer([text], **options), processor(text=text, text_kwargs=dict(options))
    assert got["offset_mapping"] == expected["offset_mapping"]
    assert got["length"] == [len(expected["input_ids"][0])]
    assert got["special_tokens_mask"] == expected["special_tokens_mask"]
    assert processor(text=text, add_special_tokens=False)["input_ids"] == [expected["input_ids"][0][1:]]
    assert "attention_mask" not in processor(text=text, return_attention_mask=False)
    for max_length, side in [(3, "left"), (4, "right")]:
        tokenizer.truncation_side = side
        options = {"truncation": True, "max_length": max_length}
        assert processor(text=text, **options)["input_ids"] == tokenizer([text], **options)["input_ids"]
        assert processor(text=text, text_kwargs=options)["input_ids"] == tokenizer([text], **options)["input_ids"]
    options = {"return_token_type_ids": True, "padding": True, "padding_side": "left"}
    expected, got = (call(text=[text, "a"], **options) for call in (tokenizer, processor))
    assert dict(got) == dict(expected) and "token_type_ids" in got
    assert tokenizer.model_max_length > 1e9
    options = {"padding": "max_length", "pad_to_multiple_of": 8}
    assert processor(text=[text, "a"], **options)["input_ids"] == tokenizer([text, "a"], **options)["input_ids"]
    assert processor(text=text, max_length=4)["input_ids"] == tokenizer([text], max_length=4)["input_ids"]
    with pytest.raises(ValueError, match="text_pair"):
        processor(text=text, text_pair="another")


def test_offsets_of_placeholders_are_those_of_their_image_token():
    processor = make_processor()
    text = "is <image> in"
    out = processor(text=text, images=open_picture(), return_offsets_mapping=True, return_mm_token_type_ids=True)
    for token_id, (start, end), kind in zip(
        out["input_ids"][0], out["offset_mapping"][0], out["mm_token_type_ids"][0], strict=True
    ):
        assert (token_id == processor.image_token_id) == (text[start:end] == "<image>") == (kind == 1)


@pytest.mark.parametrize("side", ["left", "right"])
def test_truncation_never_cuts_an_image(side):
    tokenizer = bpe_tokenizer()
    tokenizer.truncation_side = side
    processor = make_processor(tokenizer)
    text = "is in the image <image>" if side == "right" else "<image> is in the image"
    full = processor(text=["a", text], images=open_picture())["input_ids"][1]
    with pytest.raises(ValueError, match=r"max_length=12.*image of text 1.*Set max_length to (\d+)"):
        processor(text=["a", text], images=open_picture(), truncation=True, max_length=12)
    longer = f"{text} the image" if side == "right" else f"the image {text}"
    cut = processor(text=longer, images=open_picture(), truncation=True, max_length=len(full))["input_ids"][0]
    assert len(cut) == len(full) and cut.count(processor.image_token_id) == N_VISUAL


def test_text_alone_has_no_pixels_and_images_alone_no_ids():
    processor = make_processor()
    assert set(processor(text="a")) == {"input_ids", "attention_mask"}
    assert set(processor(images=open_picture())) == {"pixel_values"}
    assert processor(text=["a"], images=[])["input_ids"] == processor(text="a")["input_ids"]
    assert processor.model_input_names == ["input_ids", "attention_mask", "pixel_values"]
    with pytest.raises(ValueError, match="at least one"):
        processor()


@pytest.mark.parametrize(
    ("images", "text", "message"),
    [
        (2, "<image> a", r"`images`: 2 for \[1\] '<image>'"),
        (0, ["a", "<image>"], r"`images`: none for \[0, 1\] '<image>'"),
        (1, "no token", r"`images`: 1 for \[0\] '<image>'"),
        ([[1], []], ["<image>", "<image>"], r"\[1, 0\] for \[1, 1\] '<image>'"),
        ([[1], [1]], "<image><image>", r"\[1, 1\] for \[2\] '<image>'.*one list per text"),
    ],
)
def test_images_and_image_tokens_have_to_match(images, text, message):
    if isinstance(images, int):
        images = [gradient()] * images or None
    else:
        images = [[gradient()] * len(group) for group in images]
    with pytest.raises(ValueError, match=message):
        make_processor()(images=images, text=text)


def test_other_texts_are_refused():
    for text in ([["a", "b"]], 3):
        with pytest.raises(ValueError, match="`text` is"):
            make_processor()(text=text)


@pytest.mark.parametrize("name", ["videos", "image", "audio", "audios"])
def test_media_that_is_not_read_is_refused_and_none_of_it_is_none(name):
    processor = make_processor(chat_template=chat_template("plain"))
    plain = processor(text="a b")
    for nothing in (None, [], ()):
        assert processor(text="a b", **{name: nothing}) == plain
    chat = [{"role": "user", "content": "a b"}]
    assert processor.apply_chat_template(chat, tokenize=True, **{name: []}) == plain["input_ids"]
    refused = "`videos`: 1 for 0 '<video>'" if name == "videos" else f"the call has {name}=.*not read"
    for something in ([0], "a.mp4", np.zeros(3)):
        with pytest.raises(ValueError, match=refused):
            processor(text="a b", **{name: something})
        with pytest.raises(ValueError, match=refused):
            processor.apply_chat_template(chat, tokenize=True, **{name: something})


# --- visual states ----------------------------------------------------------------------------------------------------


def visual_states(*lengths):
    """Images of `lengths` visual tokens."""
    return SaisaVisualStates(VisualStore(list(lengths), torch.randn(sum(lengths), 4), None, "weights"))


def test_visual_states_give_the_batch_of_their_images_without_pixels():
    processor, states = make_processor(), visual_states(N_VISUAL, N_VISUAL)
    texts = ["what <image> is", "no picture", "<image> the"]
    options = {"text": texts, "padding": True, "return_tensors": "pt", "return_mm_token_type_ids": True}
    expected = processor(images=[open_picture()] * 2, **options)
    got = processor(visual_states=states, **options)
    assert got.pop("visual_states") is states
    del expected["pixel_values"]
    assert set(got) == set(expected)
    for key in expected:
        assert torch.equal(got[key], expected[key])


def test_each_image_token_becomes_as_many_placeholders_as_its_visual_states_have_tokens():
    processor = make_processor(patch_size=None)
    got = processor(text=["<image>a<image>", "b", "<image>c"], visual_states=visual_states(3, 5, 2))["input_ids"]
    bare = [processor.tokenizer(text)["input_ids"] for text in ("", "a", "b", "c")]
    (start, a, b, c), image = [bare[0], *(ids[1:] for ids in bare[1:])], [processor.image_token_id]
    assert got == [start + image * 3 + a + image * 5, start + b, start + image * 2 + c]
    once = processor(text=["<image>a", "<image>b"], visual_states=visual_states(3).expand(2))["input_ids"]
    assert [row.count(*image) for row in once] == [3, 3]


def test_a_batch_moves_and_casts_its_visual_states():
    batch = make_processor()(text="<image>a", visual_states=visual_states(3), return_tensors="pt")
    assert batch.to(torch.float16) is batch
    assert (batch["visual_states"].dtype, batch["input_ids"].dtype) == (torch.float16, torch.int64)
    batch = pickle.loads(pickle.dumps(batch)).to("meta", non_blocking=True)
    assert batch["visual_states"].device == batch["input_ids"].device == torch.device("meta")
    assert batch["visual_states"].lengths == [3]


def test_a_chat_takes_visual_states_for_its_bare_image_parts():
    processor, states = make_processor(chat_template=chat_template("vicuna")), visual_states(N_VISUAL, N_VISUAL)
    bare, text = {"type": "image"}, {"type": "text", "text": "what is in"}
    chats = [
        [{"role": "user", "content": [bare, text]}, {"role": "assistant", "content": "a digit"}],
        [{"role": "user", "content": "<image>the image"}, {"role": "assistant", "content": "in"}],
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    options["return_assistant_tokens_mask"] = True
    expected = processor.apply_chat_template(chats, images=[open_picture()] * 2, **options)
    got = processor.apply_chat_template(chats, visual_states=states, **options)
    assert got["visual_states"] is states and "pixel_values" not in got
    for key in ("input_ids", "attention_mask", "assistant_masks"):
        assert torch.equal(got[key], expected[key])
    del options["return_assistant_tokens_mask"]
    nested = processor.apply_chat_template(chats, processor_kwargs={"visual_states": states}, **options)
    assert nested["visual_states"] is states
    own = [{"role": "user", "content": [{**bare, "image": open_picture()}, text]}]
    with pytest.raises(ValueError, match="`visual_states` both bring images"):
        processor.apply_chat_template(own, visual_states=visual_states(N_VISUAL), **options)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"text": ["<image>a", "<image>b"]},
            r"`visual_states`: 1 for \[1, 1\] '<image>'.*expand\(n\).*states\[\[\.\.\.\]\]",
        ),
        ({"text": "a"}, r"`visual_states`: 1 for \[0\] '<image>'"),
        ({"text": "<image>", "images": gradient()}, r"`images` and `visual_states`.*Pass one"),
        ({}, r"`visual_states` was given without `text`"),
        ({"text": "<image>", "visual_states": [visual_states(3)]}, r"is \[.*SaisaVisualStates.*cat"),
    ],
)
def test_visual_states_and_image_tokens_have_to_match(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_processor()(**{"visual_states": visual_states(3), **arguments})


# --- images -----------------------------------------------------------------------------------------------------------


def pixels_of(picture, **kwargs):
    return np.asarray(load_image(picture, **kwargs)).astype(int)


def test_the_same_image_arrives_in_every_container(tmp_path):
    picture = gradient()
    array, path = np.asarray(picture), tmp_path / "picture.png"
    picture.save(path)
    tensor = torch.from_numpy(array.copy())
    containers = [
        picture,
        array,
        array.transpose(2, 0, 1),
        array / 255,
        array.astype(np.float32),
        array.astype(np.int64),
    ]
    containers += [tensor, tensor.permute(2, 0, 1), tensor.permute(2, 0, 1) / 255, (tensor / 255).double()]
    containers += [path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes())]
    for container in containers:
        assert np.array_equal(pixels_of(container), array)
    with open(path, "rb") as file:
        assert np.array_equal(pixels_of(file), array)


def test_images_come_from_addresses_and_data_uris(tmp_path):
    import base64

    gradient().save(tmp_path / "picture.png")
    data = base64.b64encode((tmp_path / "picture.png").read_bytes()).decode()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path)
    handler.log_message = lambda *arguments: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        lines = base64.encodebytes((tmp_path / "picture.png").read_bytes()).decode()
        for source in (f"{address}/picture.png", f"data:image/png;base64,{data}", data, lines):
            assert np.array_equal(pixels_of(source, allow_private_urls=True), np.asarray(gradient()))
        with pytest.raises(ValueError, match=r"image 1 of 2.*missing\.png.*404"):
            make_processor()(images=[gradient(), f"{address}/missing.png"], allow_private_urls=True)
        server.shutdown()
    dot = "R0lGODlhAQABAPAAAP///wAAACwAAAAAAQABAAACAkQBADs="  # shorter than many a path
    assert np.array_equal(pixels_of(dot), np.full((1, 1, 3), 255))
    with pytest.raises(ValueError, match="FileNotFoundError"):  # of a path whose letters all are base64's, too
        pixels_of("pictures/image")


def test_exif_orientation_is_applied(tmp_path):
    picture = gradient()
    for orientation, turn in ((3, Image.Transpose.ROTATE_180), (6, Image.Transpose.ROTATE_270)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture.save(tmp_path / "turned.png", exif=exif)
        expected = np.asarray(picture.transpose(turn))
        assert np.array_equal(pixels_of(tmp_path / "turned.png"), expected)
        with Image.open(tmp_path / "turned.png") as opened:
            assert np.array_equal(pixels_of(opened), expected)


def test_transparency_shows_white():
    rgba = Image.new("RGBA", (3, 1), (0, 0, 0, 0))
    rgba.putpixel((1, 0), (10, 20, 30, 255))
    rgba.putpixel((2, 0), (0, 0, 0, 128))
    expected = [[255] * 3, [10, 20, 30], [127] * 3]
    assert pixels_of(rgba)[0].tolist() == expected
    assert pixels_of(np.asarray(rgba))[0].tolist() == expected
    assert (
        pixels_of(torch.from_numpy(np.array(rgba)).permute(2, 0, 1), data_format="channels_first")[0].tolist()
        == expected
    )
    grey = Image.new("LA", (2, 1), (0, 0))
    grey.putpixel((1, 0), (40, 255))
    assert pixels_of(grey)[0].tolist() == [[255] * 3, [40] * 3]


def test_a_transparent_palette_entry_shows_white(tmp_path):
    palette = Image.new("P", (2, 1))
    palette.putpalette([200, 0, 0, 0, 200, 0])
    palette.putpixel((1, 0), 1)
    assert pixels_of(palette)[0].tolist() == [[200, 0, 0], [0, 200, 0]]
    palette.save(tmp_path / "palette.png", transparency=0)
    assert pixels_of(tmp_path / "palette.png")[0].tolist() == [[255] * 3, [0, 200, 0]]


def test_grey_bilevel_and_cmyk_images_become_rgb():
    for mode, value, expected in [("L", 77, [77] * 3), ("1", 1, [255] * 3), ("CMYK", (0, 255, 255, 0), [255, 0, 0])]:
        assert pixels_of(Image.new(mode, (2, 2), value))[0, 0].tolist() == expected
    assert pixels_of(np.full((2, 2), 77, np.uint8))[0, 0].tolist() == [77] * 3
    assert pixels_of(np.ones((2, 2), bool))[0, 0].tolist() == [255] * 3


@pytest.mark.parametrize("kind", ["I;16", "I;16B", "I", "F", "uint16", "int32", "png", "tensor"])
def test_16_bit_images_are_scaled_not_clipped(kind, tmp_path):
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    if kind == "png":
        picture = tmp_path / "deep.png"
        Image.fromarray(values).save(picture)
    elif kind in ("uint16", "int32"):
        picture = values.astype(kind)
    elif kind == "tensor":
        picture = torch.from_numpy(values.astype(np.int32))[None]
    elif kind == "I;16B":
        picture = Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes())
    else:
        picture = Image.fromarray(values if kind == "I;16" else values.astype(np.int32 if kind == "I" else np.float32))
        assert picture.mode == kind
    assert pixels_of(picture)[0, :, 0].tolist() == [0, 1, 128, 255]


def test_a_dark_16_bit_image_stays_dark():
    assert pixels_of(np.full((2, 2), 200, np.uint16)).max() == 1


def test_data_format_settles_what_a_shape_leaves_open():
    array = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
    assert np.array_equal(pixels_of(array), array)
    assert np.array_equal(pixels_of(torch.from_numpy(array)), array.transpose(1, 2, 0))
    assert np.array_equal(pixels_of(array, data_format="channels_first"), array.transpose(1, 2, 0))


RESIZING = {
    "clip": (CLIPImageProcessor, {"size": {"shortest_edge": 40}, "crop_size": {"height": 40, "width": 40}}),
    "clip, uncropped": (CLIPImageProcessor, {"size": {"shortest_edge": 31}, "do_center_crop": False}),
    "clip, stretched": (
        CLIPImageProcessor,
        {"size": {"height": 30, "width": 47}, "crop_size": {"height": 28, "width": 28}},
    ),
    "siglip": (SiglipImageProcessor, {"size": {"height": 33, "width": 48}}),
    "bit": (BitImageProcessor, {"size": {"shortest_edge": 44}, "crop_size": {"height": 40, "width": 40}}),
    "vit": (ViTImageProcessor, {"size": {"height": 40, "width": 40}, "resample": 3}),
}
SIZES = [(97, 41), (41, 97), (640, 479), (40, 40), (7, 5), (333, 334), (1201, 64)]


@pytest.mark.parametrize("name", RESIZING)
def test_images_are_resized_as_the_image_processor_would_but_before_it_copies_them(name, monkeypatch):
    kind, settings = RESIZING[name]
    own, seen = pillow_image_processor(kind(**settings)), []
    processor = make_processor(image_processor=kind(**settings), image_seq_length=4)

    def spy(image_processor, images, *args, **kwargs):
        seen.extend(image.size for image in images)
        return processed_images(image_processor, images, *args, **kwargs)

    monkeypatch.setattr("saisa_hf.processing_saisa.processed_images", spy)
    rng = np.random.default_rng(0)
    for size in SIZES:
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        for options in ({}, {"resample": 0}, {"size": {"height": 35, "width": 42}}):
            expected = np.asarray(own([image], **options)["pixel_values"][0])
            assert np.array_equal(processor(images=image, **options)["pixel_values"][0], expected)
    edge = settings["size"].get("shortest_edge")
    assert len(seen) == 3 * len(SIZES) and all(35 in size or edge in (None, min(size)) for size in seen)


def test_other_image_processors_resize_images_themselves():
    """ConvNeXt's goes by `crop_pct`, too; a class of one's own, or a call without resizing, may do anything."""

    class Own(type(pillow_image_processor(clip_processor()))):
        pass

    image, kept = gradient((60, 50)), {"do_resize": False, "do_center_crop": False}
    for own, options in (
        (ConvNextImageProcessor(size={"shortest_edge": 40}, crop_pct=0.8), {}),
        (Own(size={"shortest_edge": 40}), {}),
        (clip_processor(), kept),
    ):
        processor = make_processor(image_processor=own, image_seq_length=4)
        expected = pillow_image_processor(own)([image], **options)["pixel_values"][0]
        assert np.array_equal(processor(images=image, **options)["pixel_values"][0], expected)


class Meeting(io.BytesIO):
    """A file that is read when as many threads as the barrier waits for want to read one like it."""

    def __init__(self, content, barrier):
        super().__init__(content)
        self.barrier = barrier

    def read(self, *args):
        barrier, self.barrier = self.barrier, None
        if barrier is not None:
            barrier.wait(timeout=60)
        return super().read(*args)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_images_are_prepared_by_as_many_threads_as_pytorch_has(two_threads):
    content, barrier = (REFERENCE / "images" / f"{PICTURES[0]}.png").read_bytes(), threading.Barrier(2)
    processor, names = make_processor(), [f"{PICTURES[0]}.png", f"{PICTURES[1]}.png"]
    together = processor(images=[Meeting(content, barrier), Meeting(content, barrier)])["pixel_values"]
    paths = [REFERENCE / "images" / name for name in names] * 8
    pixels = processor(images=paths)["pixel_values"]
    each = [processor(images=path)["pixel_values"][0] for path in paths[:2]]
    assert np.array_equal(together, [each[0]] * 2) and np.array_equal(pixels, each * 8)


def test_one_image_given_twice_is_opened_by_one_thread(two_threads, monkeypatch):
    """Pillow reads a file when its pixels are asked for, and two threads must not do that at once."""
    threads = set()

    def watched(image, *args, **kwargs):
        threads.add(threading.get_ident())
        return load_image(image, *args, **kwargs)

    monkeypatch.setattr("saisa_hf.processing_saisa.load_image", watched)
    processor, image = make_processor(), open_picture()
    pixels = processor(images=[image] * 20)["pixel_values"]
    assert len(threads) == 1 and np.array_equal(pixels, [processor(images=open_picture())["pixel_values"][0]] * 20)


def test_of_several_unreadable_images_the_first_is_named(two_threads):
    images = [open_picture(), b"none", open_picture(), b"neither"]
    with pytest.raises(ValueError, match=r"^image 1 of 4 cannot be read"):
        make_processor()(images=images)


def test_an_image_three_pixels_high_is_not_taken_for_channels():
    processor = make_processor()
    thin = Image.new("RGB", (30, 3), (255, 0, 0))
    pixels = processor(images=thin, return_tensors="pt")["pixel_values"]
    whole = processor(images=Image.new("RGB", (30, 30), (255, 0, 0)), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(pixels, whole)


def test_fractions_with_do_rescale_false_are_the_same_image():
    processor, array = make_processor(), np.asarray(gradient())
    expected = processor(images=array, return_tensors="pt")["pixel_values"]
    got = processor(images=array / 255, do_rescale=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(got, expected)
    processor.image_processor.do_rescale = False
    assert torch.equal(processor(images=array / 255, return_tensors="pt")["pixel_values"], expected)


@pytest.mark.parametrize("data_format", ["channels_first", "channels_last"])
def test_placeholders_are_counted_wherever_the_channels_are(data_format):
    out = make_processor()(images=gradient(), text="<image>", images_kwargs={"data_format": data_format})
    assert out["input_ids"][0].count(make_processor().image_token_id) == N_VISUAL


def test_unreadable_images_are_named(tmp_path):
    (tmp_path / "text.png").write_text("no picture")
    Image.effect_noise((64, 64), 50).save(tmp_path / "whole.png")
    (tmp_path / "half.png").write_bytes((tmp_path / "whole.png").read_bytes()[:200])
    cases = [
        tmp_path / "text.png",
        tmp_path / "half.png",
        tmp_path / "missing.png",
        b"",
        Image.new("RGB", (0, 4)),
        None,
        3,
    ]
    cases += [
        np.zeros((2, 2, 5), np.uint8),
        np.zeros((4,)),
        np.full((2, 2), np.nan),
        np.full((2, 2), -1.0),
        np.zeros((0, 3, 3)),
    ]
    for broken in cases:
        with pytest.raises(ValueError, match="image 1 of 2"):
            make_processor()(images=[gradient(), broken])
    with pytest.raises(ValueError, match=r"half\.png"):
        make_processor()(images=[str(tmp_path / "half.png")])


def test_oversized_images_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    gradient((40, 40)).save(tmp_path / "large.png")
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match=r"image 0 of 1.*1600|image 0 of 1.*40 x 40 pixels"):
        make_processor()(images=tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # beyond twice the limit Pillow raises an error of its own
    with pytest.raises(ValueError, match="image 0 of 1"):
        make_processor()(images=tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert make_processor()(images=tmp_path / "large.png")["pixel_values"][0].shape == (3, 56, 56)


@pytest.mark.parametrize("pad", [False, True])
def test_a_thin_image_cannot_blow_up(pad):
    with pytest.raises(ValueError, match=rf"image 0 of 1 {'padded' if pad else 'resized'}.*MAX_IMAGE_PIXELS"):
        make_processor(pad_to_square=pad)(images=Image.new("RGB", (200_000, 1)))


# --- chat -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["image", "path", "image_url", "bare", "string"])
def test_a_chat_with_an_image_is_ready_for_the_model(source, tmp_path):
    open_picture().save(tmp_path / "picture.png")
    path, extra = str(tmp_path / "picture.png"), {}
    part = {
        "image": {"type": "image", "image": open_picture()},
        "path": {"type": "image", "path": path},
        "image_url": {"type": "image_url", "image_url": {"url": path}},
    }.get(source, {"type": "image"})
    content = [part, {"type": "text", "text": "What is in this image?"}]
    if source == "string":
        content = "<image>\nWhat is in this image?"
    if source in ("bare", "string"):
        extra = {"images": [open_picture()]}
    processor = make_processor(llama_tokenizer(), chat_template=chat_template("vicuna"))
    out = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        **extra,
    )
    assert set(out) == {"input_ids", "attention_mask", "pixel_values"}
    expected = next(prompt["input_ids"] for prompt in PROMPTS if prompt["name"] == "vicuna_one_image")
    assert collapsed(out["input_ids"][0].tolist(), processor.image_token_id) == expected
    assert torch.equal(out["pixel_values"], processor(images=open_picture(), return_tensors="pt")["pixel_values"])


def test_a_batch_of_chats_keeps_images_in_order():
    processor = make_processor(chat_template=chat_template("chatml"))
    a, b = open_picture(), open_picture(PICTURES[1])
    first = [{"role": "user", "content": [{"type": "text", "text": "no picture"}]}]
    second = [
        {"role": "user", "content": [{"type": "image", "image": b}, {"type": "text", "text": "a"}]},
        {"role": "assistant", "content": "digit"},
        {"role": "user", "content": [{"type": "text", "text": "and"}, {"type": "image", "image": a}]},
    ]
    out = processor.apply_chat_template(
        [first, second], tokenize=True, return_dict=True, return_tensors="pt", padding=True, add_generation_prompt=True
    )
    assert (out["input_ids"] == processor.image_token_id).sum(1).tolist() == [0, 2 * N_VISUAL]
    assert torch.equal(out["pixel_values"], processor(images=[b, a], return_tensors="pt")["pixel_values"])


def test_assistant_masks_cover_the_answers():
    processor = make_processor(chat_template=chat_template("vicuna"))
    messages = [
        {"role": "user", "content": [{"type": "image", "image": open_picture()}, {"type": "text", "text": "what"}]},
        {"role": "assistant", "content": "a digit"},
        {"role": "user", "content": "and"},
        {"role": "assistant", "content": "the image"},
    ]
    out = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    said = [i for i, mask in zip(out["input_ids"][0], out["assistant_masks"][0], strict=True) if mask]
    assert processor.decode(said) == " a digit</s> the image</s>"  # tokens bring their space along


def test_templates_are_found_by_name_and_missed_with_a_hint():
    processor = make_processor()
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(ValueError, match="chat_template"):
        processor.apply_chat_template(messages)
    assert processor.apply_chat_template(messages, chat_template=chat_template("plain")) == "a"
    processor.chat_template = {"default": chat_template("vicuna"), "short": chat_template("plain")}
    assert processor.apply_chat_template(messages, chat_template="short") == "a"
    assert processor.apply_chat_template(messages).endswith("USER: a ")
    with pytest.raises(ValueError, match="in the chat: 1"):
        processor.apply_chat_template([{"role": "user", "content": "<image>a"}], tokenize=True)


@pytest.mark.parametrize(
    ("part", "message"),
    [
        (
            {"type": "input_audio", "input_audio": {"data": "AAAA"}},
            r"part 1 of message 0 is .*input_audio.*text, images and videos",
        ),
        ({"type": "audio", "url": "a.wav"}, "part 1 of message 0 is"),
        ({"type": "video"}, "part 1 of message 0, a video, has no data"),
        ({"type": "video", "path": 5}, "part 1 of message 0, of type 'video', has no address"),
        ({"type": "video_url", "video_url": {}, "text": "a"}, "part 1 of message 0, of type 'video', has no address"),
        ({"type": "file", "file": {}}, "part 1 of message 0 is"),
        ({"audio": "a.wav"}, "part 1 of message 0 has audio='a.wav'"),
        ({"video": "a.mp4"}, "part 1 of message 0 has video='a.mp4'"),
        ({"image": "a.png"}, "part 1 of message 0 has image='a.png'"),
        ({"type": "text", "text": "a", "audio": "a.wav"}, "part 1 of message 0 has audio='a.wav'"),
        ({"type": "text", "text": "a", "image_url": {"url": "a"}}, "part 1 of message 0 has image_url="),
        ({"type": "image", "input_audio": {"data": "AAAA"}}, "part 1 of message 0 has input_audio="),
        ({"type": "hologram"}, "part 1 of message 0 is"),
        ({"type": ["image"]}, "part 1 of message 0 is"),
        ({}, "part 1 of message 0 is"),
        ({"type": "text"}, "part 1 of message 0 is"),
        ({"type": "text", "text": None}, "part 1 of message 0 is"),
        ({"type": "text", "text": 5}, "part 1 of message 0 is"),
        (None, "part 1 of message 0 is None"),
        (5, "part 1 of message 0 is 5"),
        ([], r"part 1 of message 0 is \[\]"),
        ({"type": "image_url"}, "part 1 of message 0, of type 'image', has no address"),
        ({"type": "image_url", "image_url": {}}, "part 1 of message 0, of type 'image', has no address"),
        ({"type": "image_url", "image_url": None}, "part 1 of message 0, of type 'image', has no address"),
        ({"type": "image_url", "image_url": {"url": 5}}, "part 1 of message 0, of type 'image', has no address"),
        ({"type": "image_url", "image_url": 5}, "part 1 of message 0, of type 'image', has no address"),
        ({"type": "image", "url": {"url": "a"}}, "part 1 of message 0, of type 'image', has no address"),
        ({"type": "image", "base64": 5}, "part 1 of message 0, of type 'image', has no address"),
    ],
)
@pytest.mark.parametrize("tokenize", [False, True])
def test_parts_that_would_vanish_are_named(part, message, tokenize):
    template = chat_template("vicuna").replace("part.text", "part['text']")  # as some have it
    processor = make_processor(chat_template=template)
    chat = [{"role": "user", "content": [{"type": "text", "text": "what"}, part]}]
    for conversation in (chat, [chat]):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(conversation, tokenize=tokenize)


def test_media_beside_a_messages_content_is_named_and_none_of_it_is_none():
    processor = make_processor(chat_template=chat_template("vicuna"))
    plain = [{"role": "user", "content": "what"}]
    assert processor.apply_chat_template([{**plain[0], "audio": None, "videos": []}]) == (
        processor.apply_chat_template(plain)
    )
    with pytest.raises(ValueError, match=r"message 0 has audio=.*not read"):
        processor.apply_chat_template([{**plain[0], "audio": {"id": "audio_7"}}])


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], r"^\[\] is no chat"),
        ([[]], r"^\[\] is no chat"),
        (None, "^None is no chat"),
        ("what", "^'what' is no chat"),
        ({"role": "user", "content": "a"}, "is no chat"),
        ([5], "^5 is no chat"),
        (["what"], "^'what' is no chat"),
        ([[{"role": "user", "content": "a"}], 5], "^5 is no chat"),
        ([{"role": "user", "content": "a"}, "b"], "^message 1 is 'b'"),
        ([{"content": "a"}], "^message 0 is .*'role'"),
        ([{"role": 5, "content": "a"}], "^message 0 is .*'role'"),
        ([{"role": "user", "content": 5}], "^message 0 is .*'content'"),
        ([{"role": "user", "content": {"type": "text", "text": "a"}}], "^message 0 is .*'content'"),
    ],
)
def test_what_is_no_chat_is_named(conversation, message):
    with pytest.raises(ValueError, match=message):
        make_processor(chat_template=chat_template("vicuna")).apply_chat_template(conversation)


def test_parts_of_other_kinds_pass_where_there_is_something_to_say_about_them():
    processor = make_processor(chat_template=chat_template("vicuna"))
    parts = [
        "what",
        {"text": " is"},
        {"type": "input_text", "text": " in"},
        {"type": "image", "image": None, "text": None},
    ]
    prompt = processor.apply_chat_template([{"role": "user", "content": parts}, {"role": "assistant", "content": None}])
    assert "USER: what is in\n<image> ASSISTANT:" in prompt
    template = "{% for part in messages[0].content if part.type == 'thought' %}({{ part.thought }}){% endfor %}"
    chat = [{"role": "user", "content": [{"type": "thought", "thought": "a"}]}]
    assert processor.apply_chat_template(chat, chat_template=template) == "(a)"


def test_no_texts_and_texts_without_tokens_are_named():
    processor = make_processor()
    with pytest.raises(ValueError, match=r"`text` is \[\]. Expected a string or a list of strings, at least one"):
        processor(text=[])
    assert processor(text=["", "a"], add_special_tokens=False)["input_ids"][0] == []
    with pytest.raises(ValueError, match="text 1 has no tokens"):
        processor(text=["a", ""], add_special_tokens=False, return_tensors="pt")


def test_decoding_drops_placeholders():
    processor = make_processor()
    ids = processor(images=open_picture(), text="<image>a digit", return_tensors="pt")["input_ids"]
    assert processor.batch_decode(ids, skip_special_tokens=True) == ["a digit"]
    assert processor.decode(ids[0], skip_special_tokens=True) == "a digit"
    assert processor.post_process_image_text_to_text(ids) == ["a digit"]


# --- files ------------------------------------------------------------------------------------------------------------


def everything(processor):
    """What a processor does, to compare two of them."""
    texts = ["Describe <image> and the street sign.", "<image>\nhi</s> there", " text only 日本 🙂", "a</s>USER: b"]
    out = processor(text=texts, images=[open_picture()] * 2, padding=True, return_tensors="pt")
    chat = processor.apply_chat_template([{"role": "user", "content": "<image>\nhi"}], add_generation_prompt=True)
    return {**{key: value.tolist() for key, value in out.items()}, "chat": chat, "image": processor.image_token_id}


@pytest.mark.parametrize("make_tokenizer", [bpe_tokenizer, llama_tokenizer, lambda: llama_tokenizer(False)])
def test_a_saved_processor_does_the_same_when_loaded_and_saved_again(make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    processor = make_processor(tokenizer, chat_template=chat_template("vicuna"), pad_to_square=True)
    expected = everything(processor)
    written = processor.save_pretrained(tmp_path / "one")
    assert all(Path(path).is_file() for path in written)
    loaded = SaisaProcessor.from_pretrained(tmp_path / "one")
    assert everything(loaded) == expected
    loaded.save_pretrained(tmp_path / "two")
    assert everything(SaisaProcessor.from_pretrained(tmp_path / "two")) == expected
    if make_tokenizer is not bpe_tokenizer:
        original = (REFERENCE / "tokenizer" / "tokenizer.model").read_bytes()
        assert (tmp_path / "two" / "tokenizer.model").read_bytes() == original


def test_the_folder_has_what_every_release_reads(tmp_path):
    tokenizer = bpe_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    processor = make_processor(tokenizer, chat_template=chat_template("plain"), image_seq_length=16)
    SaisaProcessor.register_for_auto_class()
    processor.save_pretrained(tmp_path)
    config = {
        name: json.loads((tmp_path / f"{name}_config.json").read_text())
        for name in ("processor", "preprocessor", "tokenizer")
    }
    assert config["processor"]["auto_map"] == {"AutoProcessor": "processing_saisa.SaisaProcessor"}
    assert config["processor"]["processor_class"] == "SaisaProcessor"
    assert config["processor"]["image_seq_length"] == 16
    assert "image_processor" not in config["processor"]
    assert config["preprocessor"]["image_processor_type"] == "CLIPImageProcessor"
    assert "auto_map" not in config["preprocessor"] and "auto_map" not in config["tokenizer"]
    assert config["tokenizer"]["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not isinstance(config["tokenizer"].get("extra_special_tokens"), list)
    assert (tmp_path / "chat_template.jinja").read_text() == chat_template("plain")
    assert {"processing_saisa.py", "compat_saisa.py", "checkpoint_saisa.py"} <= {
        path.name for path in tmp_path.iterdir()
    }
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_several_templates_survive(tmp_path):
    templates = {"default": chat_template("vicuna"), "plain": chat_template("plain")}
    make_processor(chat_template=templates).save_pretrained(tmp_path)
    assert SaisaProcessor.from_pretrained(tmp_path).chat_template == templates


def test_push_to_hub_uploads_the_folder(tmp_path, monkeypatch):
    pushed = []

    def push(self, repo_id, **kwargs):
        self.save_pretrained(tmp_path / "pushed", max_shard_size="5GB")
        pushed.append((repo_id, kwargs, {path.name for path in (tmp_path / "pushed").iterdir()}))

    monkeypatch.setattr(SaisaProcessor, "push_to_hub", push)
    make_processor().save_pretrained(tmp_path / "name", push_to_hub=True, private=True)
    ((repo_id, kwargs, files),) = pushed
    assert (repo_id, kwargs) == ("name", {"private": True})
    assert {"processor_config.json", "preprocessor_config.json", "tokenizer.json", "processing_saisa.py"} <= files


def test_loading_takes_overrides_and_refuses_nonsense(tmp_path):
    make_processor().save_pretrained(tmp_path)
    assert SaisaProcessor.from_pretrained(tmp_path, image_seq_length=3).image_seq_length == 3
    for wrong in ({"patch_size": 0}, {"vision_feature_select_strategy": "cls"}, {"image_seq_length": -1}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            make_processor(**wrong)
    assert "SaisaProcessor" in repr(make_processor())


def test_an_image_token_that_swallowed_spaces_would_be_seen():
    """The flags of `add_image_token`, against a tokenizer that has the token in its files."""
    token = next(t for t in bpe_tokenizer().added_tokens_decoder.values() if t.content == "<image>")
    assert token == AddedToken("<image>", special=True, normalized=False, lstrip=False, rstrip=False)


def test_the_image_tokens_id_in_a_text_without_it_is_text():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", pad_token="<unk>")
    processor = make_processor(tokenizer, image_token="<unk>", image_seq_length=3)
    assert processor(text="a zzz b")["input_ids"] == [[1, 0, 2]]
    assert processor(text="a zzz <unk> b", images=gradient())["input_ids"] == [[1, 0, 0, 0, 0, 2]]
