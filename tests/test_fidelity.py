# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What the processor of a converted checkpoint makes of prompts, images and conversations is what the authors' code makes
of them. That code is written down here a second time, from its description and with other tools: sentencepiece and a slow
tokenizer for the ids, Pillow and NumPy for the pixels, string formats for the conversations."""

import importlib.metadata
import json
import random
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from test_convert import REFERENCE, authors_checkpoint
from transformers import AutoProcessor, PreTrainedTokenizerFast

from saisa_hf.checkpoints.convert import convert
from saisa_hf.compat_saisa import pillow_image_processor


FIXTURES = json.loads((REFERENCE / "tokenizer" / "prompts.json").read_text())
IMAGE, PER_IMAGE = -200, 16
SLOW_EXISTS = transformers.__version__ < "5"
# what prompts are composed of: images; spaces and newlines, leading and doubled; words; scripts; what looks like a token
PIECES = ["<image>"] * 8 + [
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "\u00a0",
    "\u3000",
    "\u200b",
    "\ufeff",
    "\u2581",
    "\0",
]
PIECES += ["USER:", " ASSISTANT:", "what is", " in the image?", "123", "'s", ".", "a" * 40, "x\ny", " The"]
PIECES += ["日本語", " 中文", "Привет", " مرحبا", "नमस्ते", "e\u0301", "é", "ﬁ", "\U0001d518", "🙂", " 👩‍👩‍👧", "🇩🇪"]
PIECES += ["<", ">", "<imag", "image>", "<Image>", "</image>", "[INST]", "<0x0A>", "\\n", "{}"]
CHOSEN = [
    "<image>",
    " <image>",
    "<image> ",
    "<image> What is it?",
    "<image>\nWhat is it?",
    "<image><image>",
    "<image><image>\nCompare them.",
    "<image> <image>",
    "<image>\n<image>\nCompare them.",
    "What is it?\n<image>",
    "What is it? <image>",
    "  Two spaces <image>  and two more",
    "\n<image>\n",
    "描述一下<image>这张图片",
    "🙂<image>🙃 <image> 👩‍👩‍👧",
    "",
    " ",
]


def random_prompts(count, specials, seed=0):
    """`count` prompts composed of the pieces above and `specials`, always the same ones."""
    draw = random.Random(seed)
    pieces = [*PIECES, *specials]
    return CHOSEN + ["".join(draw.choice(pieces) for _ in range(draw.randint(1, 9))) for _ in range(count)]


def authors_ids(tokenize, bos, prompt):
    """The authors' tokenization: each stretch between images by itself, as a text with a BOS, of which the first stays."""
    ids = []
    for number, chunk in enumerate(prompt.split("<image>")):
        chunk_ids = list(tokenize(chunk))
        ids += [IMAGE] * (number > 0) + chunk_ids[number > 0 and chunk_ids[:1] == [bos] :]
    return ids


def ids_of(processor, prompt):
    """The processor's ids, each run of placeholders written as the authors write an image."""
    pictures = [Image.new("RGB", (4, 4))] * prompt.count("<image>")
    ids, found = processor(text=prompt, images=pictures or None)["input_ids"][0], []
    while ids:
        if ids[0] == processor.image_token_id:
            assert ids[:PER_IMAGE] == [processor.image_token_id] * PER_IMAGE
        found.append(IMAGE if ids[0] == processor.image_token_id else ids[0])
        ids = ids[PER_IMAGE if ids[0] == processor.image_token_id else 1 :]
    return found


def assert_the_authors_ids(processor, tokenize, prompts):
    bos, differing = processor.tokenizer.bos_token_id, {}
    for prompt in prompts:
        got, want = ids_of(processor, prompt), authors_ids(tokenize, bos, prompt)
        if got != want:
            differing[prompt] = (got, want)
    shortest = sorted(differing.items(), key=lambda item: len(item[0]))[:5]
    assert not differing, f"{len(differing)} of {len(prompts)} prompts differ, for example {shortest}"


# --- a converted checkpoint with a tokenizer of sentencepiece, as Vicuna's is -----------------------------------------


def sentencepiece_model():
    sentencepiece = pytest.importorskip("sentencepiece")
    return sentencepiece.SentencePieceProcessor(model_file=str(REFERENCE / "tokenizer" / "tokenizer.model"))


def llama_ids(text):
    """Llama's legacy tokenization: special tokens are found first, all that is between them is a text of its own."""
    model, specials = sentencepiece_model(), {"<unk>": 0, "<s>": 1, "</s>": 2}
    parts = re.split("(" + "|".join(specials) + ")", text)
    return [1] + [i for part in parts for i in ([specials[part]] if part in specials else model.encode(part))]


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory):
    """A converted checkpoint whose tokenizer is the fixture's."""
    pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("vicuna")
    source = authors_checkpoint(folder / "source")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(REFERENCE / "tokenizer" / name, source / name)
    return convert(source, folder / "converted", log=lambda line: None)


NO_SLOW = pytest.mark.skipif(not SLOW_EXISTS, reason="transformers 5 has no slow Llama tokenizer")


@pytest.fixture(scope="module", params=["fast", pytest.param("slow", marks=NO_SLOW)])
def vicuna_processor(vicuna, request):
    options = {"use_fast": request.param == "fast"} if SLOW_EXISTS else {}
    processor = AutoProcessor.from_pretrained(vicuna, trust_remote_code=True, **options)
    assert processor.tokenizer.is_fast is (request.param == "fast")
    return processor


def test_the_authors_own_prompts_have_the_authors_own_ids(vicuna_processor):
    for fixture in FIXTURES:
        assert ids_of(vicuna_processor, fixture["prompt"]) == fixture["input_ids"], fixture["name"]
        assert authors_ids(llama_ids, 1, fixture["prompt"]) == fixture["input_ids"], fixture["name"]


def test_hundreds_of_prompts_have_the_ids_of_the_authors_tokenization(vicuna_processor):
    assert_the_authors_ids(vicuna_processor, llama_ids, random_prompts(700, ["</s>", "<s>", "</s>USER:", "<unk> "]))


@NO_SLOW
def test_the_yardstick_is_the_class_that_the_authors_use():
    slow = transformers.LlamaTokenizer.from_pretrained(REFERENCE / "tokenizer")
    for prompt in random_prompts(700, ["</s>", "<s>", "</s>USER:", "<unk> "]):
        for chunk in prompt.split("<image>"):
            assert slow(chunk).input_ids == llama_ids(chunk), repr(chunk)


def test_a_batch_has_the_ids_of_its_prompts(vicuna_processor):
    prompts = [prompt for prompt in CHOSEN if prompt.strip()]
    pictures = [Image.new("RGB", (4, 4))] * sum(prompt.count("<image>") for prompt in prompts)
    batch = vicuna_processor(text=prompts, images=pictures, padding=True)
    for prompt, ids, mask in zip(prompts, batch["input_ids"], batch["attention_mask"], strict=True):
        alone = vicuna_processor(text=prompt, images=pictures[: prompt.count("<image>")] or None)["input_ids"][0]
        assert [i for i, real in zip(ids, mask, strict=True) if real] == alone, prompt


# --- and with a byte-level BPE tokenizer, as Llama 3's is -------------------------------------------------------------

# how Llama 3 cuts a text before it merges bytes
LLAMA_3_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
LLAMA_3_WORDS += r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def llama_3_tokenizer():
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>", "<|reserved_special_token_0|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([fixture["prompt"] for fixture in FIXTURES] + PIECES, trainer)
    tokenizer.add_special_tokens(specials)
    start = tokenizer.token_to_id(specials[0])
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(
                single=f"{specials[0]} $A",
                pair=f"{specials[0]} $A {specials[0]}:1 $B:1",
                special_tokens=[(specials[0], start)],
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=specials[0],
        eos_token=specials[2],
        clean_up_tokenization_spaces=True,
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="module")
def llama_3(tmp_path_factory):
    """A converted checkpoint whose tokenizer is of Llama 3's kind."""
    folder, tokenizer = tmp_path_factory.mktemp("llama_3"), llama_3_tokenizer()
    eot = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    source = authors_checkpoint(folder / "source", tokenizer=tokenizer, eos_token_id=eot)
    return convert(source, folder / "converted", log=lambda line: None)


def test_a_tokenizer_of_the_kind_of_llama_3_gives_the_authors_ids(llama_3):
    plain, processor = llama_3_tokenizer(), AutoProcessor.from_pretrained(llama_3, trust_remote_code=True)
    specials = [
        "<|end_of_text|>",
        "<|end_of_text|>USER:",
        "<|eot_id|>",
        "<|begin_of_text|>",
        "<|reserved_special_token_0|>",
    ]
    assert_the_authors_ids(processor, lambda text: plain(text).input_ids, random_prompts(700, specials))


def test_a_turn_of_the_template_ends_the_generation(llama_3):
    """Their llama_3 conversation closes turns with <|end_of_text|>, whatever stop token the language model has."""
    tokenizer = llama_3_tokenizer()
    stops = json.loads((llama_3 / "generation_config.json").read_text())["eos_token_id"]
    assert stops == tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|end_of_text|>"])


# --- conversations ----------------------------------------------------------------------------------------------------

DEFAULT_SYSTEM = "A chat between a curious user and an artificial intelligence assistant. "
DEFAULT_SYSTEM += "The assistant gives helpful, detailed, and polite answers to the user's questions."


def conversation(turns, end, system=DEFAULT_SYSTEM):
    """A conversation as their `SeparatorStyle.TWO` prints it: the system text and a space; a user's turn ends in a space, an
    assistant's in `end`; a turn without words is the role and a colon, where the answer goes."""
    text = system + " "
    for role, words in turns:
        text += f"{role}: {words}{' ' if role == 'USER' else end}" if words is not None else f"{role}:"
    return text


def picture_part():
    return {"type": "image", "image": Image.new("RGB", (4, 4))}


def user(*parts):
    return {"role": "user", "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


CONVERSATIONS = {
    "one turn": ([user("Hi")], [("USER", "Hi"), ("ASSISTANT", None)]),
    "a picture": ([user(picture_part(), "What is it?")], [("USER", "<image>\nWhat is it?"), ("ASSISTANT", None)]),
    "pictures in two of four turns": (
        [
            user(picture_part(), "What is it?"),
            {"role": "assistant", "content": "A dog."},
            user("Sure?"),
            {"role": "assistant", "content": "Yes, 100%."},
            user(picture_part(), picture_part(), "And these two?\nIn one line."),
            {"role": "assistant", "content": "日本語 🙂"},
            user("Thanks "),
        ],
        [
            ("USER", "<image>\nWhat is it?"),
            ("ASSISTANT", "A dog."),
            ("USER", "Sure?"),
            ("ASSISTANT", "Yes, 100%."),
            ("USER", "<image>\n<image>\nAnd these two?\nIn one line."),
            ("ASSISTANT", "日本語 🙂"),
            ("USER", "Thanks "),
            ("ASSISTANT", None),
        ],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("system", [None, "Answer in one word."])
@pytest.mark.parametrize("checkpoint, end", [("vicuna", "</s>"), ("llama_3", "<|end_of_text|>")])
def test_conversations_are_printed_and_tokenized_as_theirs(checkpoint, end, system, name, request):
    processor = AutoProcessor.from_pretrained(request.getfixturevalue(checkpoint), trust_remote_code=True)
    messages, turns = CONVERSATIONS[name]
    messages = [{"role": "system", "content": system}] * (system is not None) + messages
    expected = conversation(turns, end, system or DEFAULT_SYSTEM)
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == expected
    # without the place for the answer, and closed by an answer
    assert processor.apply_chat_template(messages) == expected.removesuffix("ASSISTANT:")
    answered = [*messages, {"role": "assistant", "content": "Fine."}]
    assert processor.apply_chat_template(answered) == f"{expected} Fine.{end}"
    batch = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    ids = [i for i in batch["input_ids"][0] if i != processor.image_token_id]
    plain = llama_ids if checkpoint == "vicuna" else lambda text: llama_3_tokenizer()(text).input_ids
    assert ids == [i for i in authors_ids(plain, processor.tokenizer.bos_token_id, expected) if i != IMAGE]
    assert len(batch.get("pixel_values", [])) == expected.count("<image>")


# --- images -----------------------------------------------------------------------------------------------------------


def authors_pixels(picture, pad=True, size=56):
    """Theirs: RGB, padded to a square of the mean colour, then CLIP's shortest edge, crop, scale and normalization."""
    mean = np.array([0.48145466, 0.4578275, 0.40821073])
    deviation = np.array([0.26862954, 0.26130258, 0.27577711])
    picture = picture.convert("RGB")
    width, height = picture.size
    if pad and width != height:
        side = max(width, height)
        square = Image.new("RGB", (side, side), tuple(int(255 * channel) for channel in mean))
        square.paste(picture, ((side - width) // 2, (side - height) // 2))
        picture, width, height = square, side, side
    short = min(width, height)
    width, height = (size, int(size * height / short)) if width == short else (int(size * width / short), size)
    values = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    top, left = (height - size) // 2, (width - size) // 2
    values = values[top : top + size, left : left + size] / 255
    return torch.from_numpy(((values - mean) / deviation).transpose(2, 0, 1)).float()


def noise(width, height, mode="RGB", seed=0):
    values = np.random.default_rng(seed).integers(
        0, 256, (height, width, len(Image.new(mode, (1, 1)).getbands())), np.uint8
    )
    return Image.fromarray(values.squeeze(-1) if values.shape[-1] == 1 else values, mode)


def opaque(picture):
    picture.putalpha(255)
    return picture


PICTURES = {
    "wide": lambda: noise(97, 41),
    "tall": lambda: noise(41, 97),
    "square": lambda: noise(56, 56),
    "large": lambda: noise(640, 427),
    "very wide": lambda: noise(300, 3),
    "very tall": lambda: noise(3, 300),
    "off by one": lambda: noise(57, 56),
    "one pixel": lambda: noise(1, 1),
    "one pixel high": lambda: noise(9, 1),
    "two by three": lambda: noise(2, 3),
    "palette": lambda: noise(60, 31).quantize(17),
    "grey": lambda: noise(50, 80, "L"),
    "bilevel": lambda: noise(50, 80, "L").convert("1"),
    "opaque with an alpha channel": lambda: opaque(noise(70, 33)),
    "CMYK": lambda: noise(64, 33).convert("CMYK"),
}


def torchvision_version():
    try:
        return importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return None


@pytest.fixture(scope="module")
def unpadded(vicuna, tmp_path_factory):
    """The same checkpoint, of a model that was trained on images as they are."""
    folder = tmp_path_factory.mktemp("unpadded") / "checkpoint"
    shutil.copytree(vicuna, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(config | {"pad_to_square": False}))
    return folder


@pytest.mark.parametrize("backend", [None, "torchvision"])
@pytest.mark.parametrize("pad", [True, False], ids=["padded", "as_it_is"])
def test_images_become_the_authors_pixels(vicuna, unpadded, pad, backend):
    if backend == "torchvision" and torchvision_version() is None:
        pytest.skip("torchvision is not installed")
    processor = AutoProcessor.from_pretrained(vicuna if pad else unpadded, trust_remote_code=True)
    if backend == "torchvision":  # what 4.57 takes when asked to, and 5.x whenever it can
        torchvision_class = getattr(transformers, "CLIPImageProcessorFast", None) or transformers.CLIPImageProcessor
        processor.image_processor = torchvision_class.from_dict(processor.image_processor.to_dict())
        assert type(pillow_image_processor(processor.image_processor)) is not type(processor.image_processor)
    for name, make in PICTURES.items():
        got = processor(images=make(), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(
            got, authors_pixels(make(), pad), rtol=0, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_the_fixtures_pixels_and_the_yardstick_agree(vicuna):
    processor = AutoProcessor.from_pretrained(vicuna, trust_remote_code=True)
    for name, expected in load_file(REFERENCE / "images" / "pad_expected.safetensors").items():
        picture = Image.open(REFERENCE / "images" / f"{name}.png")
        torch.testing.assert_close(authors_pixels(picture), expected, rtol=0, atol=1e-5)
        got = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def test_where_an_image_has_holes_theirs_shows_what_is_behind_them_and_ours_white(vicuna):
    """The one deliberate difference: `convert("RGB")` drops transparency, so that colours appear which nobody sees."""
    processor = AutoProcessor.from_pretrained(vicuna, trust_remote_code=True)
    picture = noise(40, 40)
    holes = picture.copy()
    holes.putalpha(0)
    white = authors_pixels(Image.new("RGB", (40, 40), "white"))
    torch.testing.assert_close(
        processor(images=holes, return_tensors="pt")["pixel_values"][0], white, rtol=0, atol=1e-5
    )
    torch.testing.assert_close(authors_pixels(holes), authors_pixels(picture))
