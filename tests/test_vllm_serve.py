"""`vllm serve` with the openai client: what users of the server meet. The server is started once."""

import base64
import importlib.util
import io
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest


pytest.importorskip("vllm")
openai = pytest.importorskip("openai")

import vllm_parts as parts  # noqa: E402

from saisa_hf import SaisaProcessor  # noqa: E402


pytestmark = pytest.mark.skipif(not importlib.util.find_spec("vllm.entrypoints.cli"), reason="this vLLM has no server")
NEW_TOKENS, NAME = 6, "saisa-tiny"
OPTIONS = (
    "--dtype float32 --max-model-len 256 --enforce-eager --max-num-seqs 8 --block-size 32 --max-num-batched-tokens 64"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return parts.make_checkpoint(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def client(checkpoint, tmp_path_factory):
    command = [str(Path(sys.executable).parent / "vllm"), "serve", checkpoint, "--served-model-name", NAME]
    command += ["--host", "127.0.0.1", "--limit-mm-per-prompt", '{"image": 4}', *OPTIONS.split()]
    log = tmp_path_factory.mktemp("log") / "server.txt"
    with parts.served(lambda port: [*command, "--port", str(port)], dict(os.environ), log) as port:
        yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=300)


def image_part(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}


def chat(*texts_and_images):
    content = [one if isinstance(one, str) else image_part(one) for one in texts_and_images]
    parts_of_it = [{"type": "text", "text": one} if isinstance(one, str) else one for one in content]
    return [{"role": "user", "content": parts_of_it}]


def expected_answer(checkpoint, *texts_and_images):
    """What this package says, as text."""
    processor = SaisaProcessor.from_pretrained(checkpoint)
    images = [one for one in texts_and_images if not isinstance(one, str)]
    content = [{"type": "text", "text": one} if isinstance(one, str) else {"type": "image"} for one in texts_and_images]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    case = parts.answer([parts.Case(text, images)], checkpoint, NEW_TOKENS)[0]
    text = processor.tokenizer.decode(case.ids, skip_special_tokens=True)
    return whole_characters(text), len(case.prompt_ids)


def whole_characters(text):
    """Without half a character at the end, which vLLM holds back."""
    return text.rstrip("\ufffd")


def ask(client, messages, **options):
    options = {"temperature": 0, "max_tokens": NEW_TOKENS, "extra_body": {"ignore_eos": True}} | options
    return client.chat.completions.create(model=NAME, messages=messages, **options)


@pytest.mark.parametrize("images", [0, 1, 2])
def test_chats_answer_as_transformers(client, checkpoint, images):
    given = [*parts.pictures(images), "what is red"]
    text, prompt_tokens = expected_answer(checkpoint, *given)
    found = ask(client, chat(*given))
    assert whole_characters(found.choices[0].message.content) == text and found.usage.prompt_tokens == prompt_tokens


def test_a_stream_has_the_same_answer(client, checkpoint):
    given = [*parts.pictures(1), "how many circles"]
    stream = ask(client, chat(*given), stream=True)
    found = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert whole_characters(found) == expected_answer(checkpoint, *given)[0]


def test_parallel_requests_answer_as_alone(client, checkpoint):
    images = parts.pictures(4)
    kinds = [("what is red",), (images[0], "what is blue"), (images[1], images[2], "left"), (images[3], "right of a")]
    expected = [expected_answer(checkpoint, *kind)[0] for kind in kinds]
    with ThreadPoolExecutor(64) as pool:
        found = list(pool.map(lambda i: ask(client, chat(*kinds[i % 4])).choices[0].message.content, range(64)))
    assert list(map(whole_characters, found)) == expected * 16


def test_the_server_goes_on_when_a_stream_is_given_up(client):
    stream = ask(client, chat(*parts.pictures(1), "what"), stream=True, max_tokens=200)
    next(iter(stream))
    stream.close()
    assert ask(client, chat("what is red")).choices[0].finish_reason == "length"


def broken():
    url = "data:image/png;base64," + base64.b64encode(b"no image at all").decode()
    return [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "a"}]}
    ]


@pytest.mark.parametrize(
    ("messages", "options", "message"),
    [
        (broken(), {}, "image"),
        (chat(" ".join(["red"] * 300)), {}, "256"),
        (chat("what is <image> red"), {}, "image tokens"),
        (chat("what"), {"extra_body": {"prompt_logprobs": 1}}, "prompt_logprobs=1"),
    ],
)
def test_what_cannot_be_answered_is_a_bad_request(client, messages, options, message):
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, messages, **options)
    assert ask(client, chat("what is red")).choices[0].message.content is not None
