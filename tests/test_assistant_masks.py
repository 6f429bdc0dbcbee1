# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`return_assistant_tokens_mask` marks what the assistant says, behind images as well, in every template that is shipped."""

import random

import pytest
import torch
from PIL import Image
from tiny_models import IMAGE_TOKEN
from training_parts import TOKENS, picture, processor_for
from transformers.utils.chat_template_utils import render_jinja_template

from saisa_hf import SaisaProcessor
from saisa_hf.chat.templates import chat_template, chat_template_names, with_pictures
from saisa_hf.demo.run import CHECKPOINT


ENDS = {"chatml": "<|im_end|>", "llama_3": "<|end_of_text|>", "plain": "", "vicuna": "</s>"}
# the demo's template as it reads without marks
UNMARKED_DEMO = (
    "{{ bos_token }}{% for message in messages %}{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>\\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}"
    "{{ ' ' if message['role'] == 'user' else eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def conversations(seed, words):
    """Two random conversations, whose contents are strings or parts, with images in any place; and what is answered."""
    rng, chats, answers, images = random.Random(seed), [], [], []

    def say(n):
        return " ".join(rng.choice(words) for _ in range(n))

    for _ in range(2):
        chat, said = [], []
        for turn in range(rng.randint(1, 3)):
            parts = [{"type": "text", "text": say(rng.randint(1, 3))} for _ in range(rng.randint(1, 2))]
            for _ in range(rng.randint(turn == 0, 2)):
                images.append(picture(rng.randrange(200)))
                parts.insert(rng.randint(0, len(parts)), {"type": "image", "image": images[-1]})
            chat.append({"role": "user", "content": say(2) if rng.random() < 0.2 else parts})
            said.append(say(rng.randint(1, 4)))
            content = said[-1] if rng.random() < 0.5 else [{"type": "text", "text": said[-1]}]
            chat.append({"role": "assistant", "content": content})
        chats.append(chat)
        answers.append(said)
    return chats, answers


def marked(processor, chats, **options):
    return processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt", padding=True,
        **options,
    )  # fmt: skip


def runs(ids, mask):
    """The ids of each run of marked tokens."""
    found, before = [], 0
    for i, on in zip(ids.tolist(), mask.tolist(), strict=True):
        if on and not before:
            found.append([])
        if on:
            found[-1].append(i)
        before = on
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", chat_template_names())
@pytest.mark.parametrize("seed", range(4))
def test_answers_are_marked_at_the_positions_of_their_tokens(name, side, seed):
    processor = processor_for(name)
    chats, answers = conversations(seed, ["Yes", "no", "a cat", "1, 2"])
    batch = marked(processor, chats, padding_side=side)
    ids, mask = batch["input_ids"], batch["assistant_masks"]
    assert mask.shape == ids.shape and (ids == IMAGE_TOKEN).sum() == TOKENS * len(batch["pixel_values"])
    assert not (mask.bool() & ((ids == IMAGE_TOKEN) | (batch["attention_mask"] == 0))).any()
    begins = batch["attention_mask"].argmax(1).tolist()
    for row, marks, chat, said, begin in zip(ids, mask, chats, answers, begins):
        spoken = [processor.tokenizer.decode(run) for run in runs(row, marks)]
        assert spoken == [answer + ENDS[name] for answer in said]
        # each turn begins where the conversation up to there ends
        for turn, run in enumerate(runs(row, marks)):
            until = processor.apply_chat_template(chat[: 2 * turn + 2], tokenize=True)[0]
            until = until if name != "chatml" else until[:-1]  # without the newline
            assert row[begin : begin + len(until)].tolist() == list(until)
            assert until[len(until) - len(run) :] == run
            assert marks[begin + len(until) - len(run) : begin + len(until)].all()


@pytest.fixture(scope="module")
def demo():
    return SaisaProcessor.from_pretrained(CHECKPOINT)


@pytest.mark.parametrize("seed", range(4))
def test_the_demo_marks_its_answers_and_renders_what_it_rendered(demo, seed):
    chats, answers = conversations(seed, ["yes", "no", "red", "2", "red , green"])
    batch = marked(demo, chats)
    tokenizer = demo.tokenizer
    for row, marks, said in zip(batch["input_ids"], batch["assistant_masks"], answers):
        assert runs(row, marks) == [tokenizer(one + "</s>", add_special_tokens=False)["input_ids"] for one in said]
    chats += [[{"role": "system", "content": "yes"}, *chats[0][:1]], chats[0][:3]]
    for options in ({}, {"add_generation_prompt": True}):
        variables = dict(conversations=chats, bos_token="<s>", eos_token="</s>", **options)
        assert (
            demo.apply_chat_template(chats, **options)
            == (render_jinja_template(chat_template=UNMARKED_DEMO, **variables)[0])
        )


def test_a_template_without_marks_says_so():
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    foreign = with_pictures("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}")
    processor = processor_for(foreign)
    assert processor.apply_chat_template(chat) == "user: aassistant: b"
    with pytest.raises(ValueError, match=r"return_assistant_tokens_mask=True: .*{% generation %}.*chat.templates"):
        marked(processor, [chat])
    assert marked(processor, [chat], chat_template=chat_template("plain"))["assistant_masks"].sum() == 1
    for spelled in ("{%- generation -%}", "{%generation%}", "{% generation -%}"):
        # 4.57 does not see a span with nothing in front of it
        template = ".{% for m in messages %}" + spelled + "{{ m.content }}{% endgeneration %}{% endfor %}"
        assert marked(processor, [chat], chat_template=template)["assistant_masks"].sum() == 2


def test_images_are_those_of_the_conversation(demo):
    red, blue = (Image.new("RGB", (48, 48), color) for color in ("red", "blue"))
    chat = [{"role": "user", "content": [{"type": "image", "image": red}, {"type": "image", "image": blue}]}]
    chat += [{"role": "assistant", "content": "red"}]
    batch = marked(demo, chat)
    assert torch.equal(batch["pixel_values"], demo(images=[red, blue], return_tensors="pt")["pixel_values"])
    assert int(batch["assistant_masks"].sum()) == 2
