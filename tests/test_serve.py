"""`transformers serve` answers OpenAI-style requests about pictures, for a saved checkpoint with the code it carries."""

import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from test_asking import QUESTIONS, SCENE, chat, generated

from saisa_hf import SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.demo.run import CHECKPOINT


if Version(transformers.__version__) < Version("5.6"):
    pytest.skip("transformers serve loads classes of its own alone before 5.6", allow_module_level=True)
for needed in ("fastapi", "openai", "uvicorn"):
    pytest.importorskip(needed)

ROOT = Path(__file__).parent.parent
DATA = "data:image/png;base64," + base64.b64encode(Path(SCENE).read_bytes()).decode()
PICTURE = {"type": "image_url", "image_url": {"url": DATA}}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(address, name of the model) of a server whose process does not import this package."""
    folder = tmp_path_factory.mktemp("serve")
    checkpoint = folder / "checkpoint"
    SaisaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).save_pretrained(checkpoint)
    SaisaProcessor.from_pretrained(CHECKPOINT).save_pretrained(checkpoint)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(checkpoint), "--trust-remote-code"]
    command += ["--device", "cpu", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    address = f"http://127.0.0.1:{port}"
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
    try:
        wait_for(f"{address}/health", process, folder / "log")
        yield address, str(checkpoint)
    finally:
        process.kill()
        process.wait()


def wait_for(address, process, log, seconds=120):
    end = time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        try:
            return urllib.request.urlopen(address, timeout=5).read()
        except OSError:
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-3000:])


def requested(server, messages, **body):
    address, model = server
    body = {"model": model, "messages": messages, **body}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), headers)
    return urllib.request.urlopen(request, timeout=60)


def answered(server, content, **body):
    with requested(server, [{"role": "user", "content": content}], **body) as response:
        return json.load(response)


def asked(question, *pictures):
    return [*pictures, {"type": "text", "text": question}]


def test_an_http_request_with_a_picture_gets_what_generate_answers(server):
    for question in QUESTIONS:
        answer = answered(server, asked(question, PICTURE), temperature=0)
        assert answer["choices"][0]["message"]["content"].strip() == generated(chat(question, {"path": SCENE}))
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["prompt_tokens"] > 36


def test_requests_may_have_several_pictures_or_none(server):
    for count in (0, 2):
        answer = answered(server, asked(QUESTIONS[0], *[PICTURE] * count), max_tokens=8)
        wanted = generated(chat(QUESTIONS[0], *[{"path": SCENE}] * count))
        assert answer["choices"][0]["message"]["content"].strip() == wanted


def test_the_documented_client_gets_the_answer(server, capsys, monkeypatch):
    address, model = server
    (code,) = re.findall(r"^```py\n(.*?)^```", (ROOT / "docs" / "chat.md").read_text(encoding="utf-8"), re.M | re.S)
    assert "http://localhost:8000" in code and "src/saisa_hf/demo/checkpoint" in code
    monkeypatch.chdir(ROOT)
    exec(code.replace("http://localhost:8000", address).replace("src/saisa_hf/demo/checkpoint", model), {})
    assert capsys.readouterr().out.strip() == "5"


def test_the_answer_to_a_chat_of_two_turns_is_streamed(server):
    turns = [
        {"role": "user", "content": asked(QUESTIONS[0], PICTURE)},
        {"role": "assistant", "content": "5"},
        {"role": "user", "content": QUESTIONS[2]},
    ]
    with requested(server, turns, stream=True, max_tokens=8) as response:
        events = [line.decode() for line in response if line.strip()]
    assert all(event.startswith("data: ") for event in events)
    chunks = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
    wanted = generated([*chat(QUESTIONS[0], {"path": SCENE}), turns[1], *chat(QUESTIONS[2])])
    assert "".join(chunk["delta"].get("content", "") for chunk in chunks).strip() == wanted
    assert chunks[-1]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "options", [{}, {"chat_template_kwargs": {"allow_local_files": True, "allow_private_urls": True}}]
)
@pytest.mark.parametrize("url", [SCENE, "/etc/passwd", "http://127.0.0.1:1/a.png"])
def test_a_request_reaches_neither_files_nor_private_addresses(server, url, options):
    with pytest.raises(urllib.error.HTTPError):
        answered(server, asked(QUESTIONS[0], {"type": "image_url", "image_url": {"url": url}}), **options)


def test_the_request_names_the_model_as_the_command_did(server):
    with pytest.raises(urllib.error.HTTPError, match="400"):
        answered(server, asked(QUESTIONS[0], PICTURE), model="another")
