"""transformers' own ways of asking: `pipeline("image-text-to-text")`, streamers, stopping strings. All of them answer as
`generate` does."""

import functools
import http.server
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_chat import demo, picture, piped, tiny_processor
from tiny_models import tiny_model
from transformers import TextIteratorStreamer, TextStreamer, pipeline

from saisa_hf.demo.run import CHECKPOINT


IMAGES = Path(__file__).parent.parent / "docs" / "images"
SCENE = str(IMAGES / "scene.png")
QUESTIONS = ["how many digits are there?", "is there a 3?", "what colour is the 9?"]
ASK = {"max_new_tokens": 8, "return_full_text": False}


@pytest.fixture
def address():
    """http://... of docs/images."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=IMAGES)) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@functools.cache
def asked():
    """The pipeline of the shipped checkpoint: by path, with the code that it carries."""
    return pipeline("image-text-to-text", model=str(CHECKPOINT), trust_remote_code=True, dtype=torch.float32)


def chat(question, *pictures):
    parts = [{"type": "image", **where} for where in pictures]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def generated(messages):
    """What the package's own classes answer."""
    model, processor = demo()
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template(messages, add_generation_prompt=True, **options)
    ids = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def texts(outputs):
    rows = [row for output in outputs for row in (output if isinstance(output, list) else [output])]
    return [row["generated_text"].strip() for row in rows]


def test_a_picture_may_be_a_path_an_address_or_an_image(address, monkeypatch):
    monkeypatch.setenv("SAISA_IMAGE_ALLOW_PRIVATE_URLS", "1")
    wanted = [generated(chat(question, {"path": SCENE})) for question in QUESTIONS]
    assert wanted == ["5", "no", "orange"]
    for where in ({"path": SCENE}, {"url": f"{address}/scene.png"}, {"image": Image.open(SCENE)}, {"url": SCENE}):
        assert texts(asked()(text=chat(question, where), **ASK)[0] for question in QUESTIONS) == wanted


@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_chats_of_a_batch_may_have_unlike_numbers_of_pictures(batch_size):
    one, other = {"path": SCENE}, {"image": Image.open(SCENE).rotate(90)}
    chats = [
        chat(QUESTIONS[0], one),
        chat(QUESTIONS[1], other),
        chat(QUESTIONS[2], one, other),
        chat(QUESTIONS[0], one),
    ]
    chats += [chat(QUESTIONS[1])] * (batch_size == 1)  # pipelines put no rows without pictures beside rows with some
    assert texts(asked()(text=chats, batch_size=batch_size, **ASK)) == [generated(messages) for messages in chats]


def test_texts_and_pictures_may_be_given_apart(address):
    prompts = [f"USER: <image>\n{question} ASSISTANT:" for question in QUESTIONS]
    wanted = [generated(chat(question, {"path": SCENE})) for question in QUESTIONS]
    pictures = [SCENE, Image.open(SCENE), f"{address}/scene.png"]
    assert texts(asked()(images=pictures, text=prompts, **ASK)) == wanted
    assert texts(asked()(images=pictures, text=prompts, batch_size=3, **ASK)) == wanted
    assert texts(asked()(images=SCENE, text=prompts[0], **ASK)) == wanted[:1]


def test_an_answer_joins_the_chat_and_the_chat_goes_on():
    messages = asked()(text=chat(QUESTIONS[0], {"path": SCENE}), max_new_tokens=8)[0]["generated_text"]
    assert messages[-1]["role"] == "assistant" and messages[-1]["content"].strip() == "5"
    messages += chat(QUESTIONS[1])
    assert texts([asked()(text=messages, **ASK)]) == [generated(messages)]


def test_the_terminal_chat_takes_addresses_too(address, monkeypatch, capsys):
    assert "SAISA_IMAGE_ALLOW_PRIVATE_URLS=1" in piped(monkeypatch, capsys, f"/image {address}/scene.png\n")[2]
    monkeypatch.setenv("SAISA_IMAGE_ALLOW_PRIVATE_URLS", "1")
    lines = f"{QUESTIONS[0]}\n/clear\n/image {address}/scene.png\n{QUESTIONS[2]}\n"
    assert piped(monkeypatch, capsys, lines, "--image", f"{address}/scene.png") == (0, "5\norange\n", "")
    status, out, err = piped(monkeypatch, capsys, f"/image {address}/nowhere.png\n")
    assert (status, out, err.count("\n")) == (1, "", 1) and "nowhere.png' cannot be read" in err and "404" in err


# --- streamers and stopping strings -----------------------------------------------------------------------------------


def tiny(*rows):
    """(model, processor, inputs): a random model that never ends by itself, and rows of (text, pictures)."""
    model, processor = tiny_model(seed=3), tiny_processor()
    pictures = [picture(i) for i in range(sum(count for _, count in rows))]
    prompts = ["<image>\n" * count + text for text, count in rows]
    inputs = processor(images=pictures or None, text=prompts, padding=True, padding_side="left", return_tensors="pt")
    return model, processor, inputs


def answers(processor, inputs, ids):
    return processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_streamer_prints_and_yields_the_answer(capsys):
    model, processor, inputs = tiny(("abc", 2))
    tokenizer = processor.tokenizer
    (whole,) = answers(processor, inputs, model.generate(**inputs, max_new_tokens=12))
    model.generate(**inputs, max_new_tokens=12, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == whole + "\n"
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    thread = threading.Thread(target=model.generate, kwargs={**inputs, "max_new_tokens": 12, "streamer": streamer})
    thread.start()
    assert "".join(streamer) == whole
    thread.join()
    printed = pipeline("image-text-to-text", model=model, processor=processor)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    printed(images=picture(0), text="<image>\nabc", generate_kwargs={"max_new_tokens": 12, "streamer": streamer})
    assert len(capsys.readouterr().out) > 12


def test_each_row_stops_at_its_first_stopping_string():
    model, processor, inputs = tiny(("abc", 2), ("de", 0), ("fgh", 1))
    options = {"max_new_tokens": 24, "eos_token_id": 2}  # transformers fills up rows that have ended where there is one
    whole = answers(processor, inputs, model.generate(**inputs, **options))
    stops = [whole[0][4:7], whole[1][9:12]]
    ids = model.generate(**inputs, **options, stop_strings=stops, tokenizer=processor.tokenizer)
    wanted = [min([text[: text.find(stop) + 3] for stop in stops if stop in text] + [text], key=len) for text in whole]
    assert answers(processor, inputs, ids) == wanted
    assert len(wanted[0]) == 7 and len(wanted[1]) <= 12 and wanted[2] == whole[2]
    handed = model.generate(
        **inputs, **options, stop_strings=stops, tokenizer=processor
    )  # as `transformers serve` does
    assert torch.equal(ids, handed)
