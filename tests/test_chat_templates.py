"""The packaged chat templates print what LLaVA's conversations print, to the letter."""

import json
from pathlib import Path

import pytest
from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from saisa_hf.chat.templates import chat_template, chat_template_names


PROMPTS = json.loads((Path(__file__).parent / "fixtures" / "reference" / "tokenizer" / "prompts.json").read_text())
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
IMAGE = {"type": "image"}


def text(words):
    return {"type": "text", "text": words}


def render(name, messages, **kwargs):
    prompts, _ = render_jinja_template(conversations=[messages], chat_template=chat_template(name), **kwargs)
    return prompts[0]


def spoken(name, messages):
    """What the assistant says in a rendered conversation, by the spans that `{% generation %}` marks."""
    prompts, spans = render_jinja_template(
        conversations=[messages], chat_template=chat_template(name), return_assistant_tokens_mask=True
    )
    return [prompts[0][start:end] for start, end in spans[0]]


def user(*parts):
    return {"role": "user", "content": parts[0] if isinstance(parts[0], str) else list(parts)}


def assistant(words):
    return {"role": "assistant", "content": words}


def test_there_are_four_templates_and_others_are_refused_by_name():
    assert chat_template_names() == ["chatml", "llama_3", "plain", "vicuna"]
    with pytest.raises(ValueError, match=r"'vicuna_v0'.*chatml, llama_3, plain, vicuna"):
        chat_template("vicuna_v0")


@pytest.mark.parametrize(
    ("name", "fixture", "message"),
    [
        ("vicuna", "vicuna_one_image", user(IMAGE, text("What is in this image?"))),
        ("vicuna", "vicuna_one_image", user("<image>\nWhat is in this image?")),
        ("llama_3", "llama_3_one_image", user(IMAGE, text("What is in this image?"))),
        ("vicuna", "vicuna_text_only", user("Which of these options is correct?")),
        ("vicuna", "vicuna_text_only", user(text("Which of these options is correct?"))),
    ],
)
def test_prompts_equal_the_authors(name, fixture, message):
    expected = next(prompt["prompt"] for prompt in PROMPTS if prompt["name"] == fixture)
    assert render(name, [message], add_generation_prompt=True) == expected


@pytest.mark.parametrize(("name", "end"), [("vicuna", "</s>"), ("llama_3", "<|end_of_text|>")])
def test_turns_are_joined_as_llava_joins_them(name, end):
    messages = [user(IMAGE, text("What?")), assistant("A dog."), user("And now?"), assistant([text("A cat.")])]
    first = f"{SYSTEM} USER: <image>\nWhat? ASSISTANT: A dog.{end}"
    assert render(name, messages[:2]) == first
    assert render(name, messages[:3], add_generation_prompt=True) == f"{first}USER: And now? ASSISTANT:"
    assert render(name, messages) == f"{first}USER: And now? ASSISTANT: A cat.{end}"


@pytest.mark.parametrize("name", ["vicuna", "llama_3"])
def test_a_system_message_takes_the_place_of_the_default(name):
    for content in ("Be brief.", [text("Be brief.")]):
        messages = [{"role": "system", "content": content}, user("Hi")]
        assert render(name, messages, add_generation_prompt=True) == "Be brief. USER: Hi ASSISTANT:"
    assert render(name, [{"role": "system", "content": ""}, user("Hi")]) == "USER: Hi "


@pytest.mark.parametrize("name", ["vicuna", "llama_3"])
def test_unknown_roles_are_refused(name):
    for messages in ([{"role": "tool", "content": "a"}], [user("a"), {"role": "system", "content": "late"}]):
        with pytest.raises(TemplateError, match="role"):
            render(name, messages)


def test_chatml():
    messages = [{"role": "system", "content": "Be brief."}, user(IMAGE, text("What?")), assistant("A dog.")]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
        "<|im_start|>assistant\nA dog.<|im_end|>\n"
    )
    assert render("chatml", messages) == expected
    assert render("chatml", messages[1:2], add_generation_prompt=True) == (
        "<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_plain_puts_a_caption_on_the_line_below_its_picture():
    assert render("plain", [user(IMAGE), assistant("A dog.")]) == "<image>\nA dog."
    assert render("plain", [user(IMAGE, text("A dog."))]) == "<image>\nA dog."
    assert render("plain", [user(IMAGE)], add_generation_prompt=True) == "<image>\n"  # a picture cannot end a prompt


@pytest.mark.parametrize("name", ["vicuna", "llama_3", "chatml", "plain"])
def test_pictures_stand_on_lines_of_their_own_in_the_order_given(name):
    message = user(text("One "), text("text"), IMAGE, IMAGE, text("below both"), IMAGE)
    assert "One text\n<image>\n<image>\nbelow both\n<image>" in render(name, [message])


@pytest.mark.parametrize(
    ("name", "end"), [("vicuna", "</s>"), ("llama_3", "<|end_of_text|>"), ("chatml", "<|im_end|>"), ("plain", "")]
)
def test_the_answers_are_marked_for_training_with_what_ends_them(name, end):
    messages = [user("Hi"), assistant("Hello."), user("So?"), assistant("Bye.")]
    assert spoken(name, messages) == [f"Hello.{end}", f"Bye.{end}"]


@pytest.mark.parametrize("name", ["vicuna", "llama_3", "chatml", "plain"])
def test_an_answer_can_be_continued(name):
    prompt = render(name, [user("Hi"), assistant("The dog is")], continue_final_message=True)
    assert prompt.endswith("The dog is")
