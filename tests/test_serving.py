"""`saisa serve`: what strangers send costs a bounded amount, is refused with a reason, and holds nobody else up."""

import asyncio
import base64
import contextlib
import http.client
import http.server
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import transformers
from hostile import JSON_VALUES
from packaging.version import Version
from PIL import Image
from test_image_sources import Hostile, encoded, gif, hostile_server

from saisa_hf.cli import main
from saisa_hf.demo.run import CHECKPOINT
from saisa_hf.serving.guard import Guard


SCENE = Path(__file__).parent.parent / "docs" / "images" / "scene.png"
OLD = Version(transformers.__version__) < Version("5.6")
served = pytest.mark.skipif(OLD, reason="transformers serve loads classes of its own alone before 5.6")


# --- the guard --------------------------------------------------------------------------------------------------------


def asked(guard, method="POST", path="/v1/responses", chunks=(b"{}",), headers=()):
    """(status, body) of a request to an ASGI application."""
    sent, left = [], list(chunks)

    async def receive():
        if not left:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": left.pop(0), "more_body": bool(left)}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(guard(scope, receive, send))
    return sent[0]["status"], b"".join(message.get("body", b"") for message in sent)


async def echo(scope, receive, send):
    body = (await receive())["body"] if scope["method"] == "POST" else b"none"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


def test_the_guard_hands_on_what_is_as_expected_and_refuses_the_rest(monkeypatch):
    guard = Guard(echo, max_request_bytes=10, max_requests=1)
    assert asked(guard, chunks=(b"12", b"345")) == (200, b"12345")
    assert asked(guard, "GET", "/health") == (200, b"none")
    for method, path in (("POST", "/load_model"), ("POST", "/reset"), ("GET", "/docs"), ("GET", "/v1/responses")):
        status, body = asked(guard, method, path)
        assert status == 404 and f"There is no {method} {path}" in json.loads(body)["error"]["message"]
    for headers, chunks in (((b"content-length", b"11"), (b"",)), ((b"a", b"b"), (b"123456", b"78901"))):
        status, body = asked(guard, chunks=chunks, headers=[headers])
        assert status == 413 and "max_request_bytes=10" in json.loads(body)["error"]["message"]
    closed = []

    async def close(message):
        closed.append(message["type"])

    asyncio.run(guard({"type": "websocket", "path": "/v1/realtime"}, None, close))
    assert closed == ["websocket.close"]
    monkeypatch.setattr("saisa_hf.serving.guard.SECONDS_FOR_A_BODY", 0.1)
    assert asked(guard, chunks=())[0] == 408
    guard.at_work = 1
    assert asked(guard)[0] == 503 and asked(guard, "GET", "/health")[0] == 200


def test_what_cannot_be_served_is_one_line(capsys, monkeypatch):
    for name in list(os.environ):
        if name.startswith("SAISA_IMAGE"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    assert main(["serve", "./no/such/folder"]) == 1
    assert "CHECKPOINT './no/such/folder' is not a folder" in capsys.readouterr().err
    assert main(["serve", os.path.dirname(__file__)]) == 1
    assert "config.json is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["serve", str(CHECKPOINT), "--port", "65536"])
    assert "expected a port from 1 to 65535" in capsys.readouterr().err
    if OLD:
        assert main(["serve", str(CHECKPOINT)]) == 1
        assert "needs transformers 5.6 or later" in capsys.readouterr().err
    else:
        assert main(["serve", str(CHECKPOINT), "--url-timeout", "0"]) == 2
        assert "SAISA_IMAGE_TIMEOUT is '0.0'. Expected a positive number" in capsys.readouterr().err


# --- a server ---------------------------------------------------------------------------------------------------------


class Server:
    """A process of `saisa serve` for the shipped checkpoint."""

    def __init__(self, folder, *options):
        for needed in ("fastapi", "openai", "uvicorn"):
            pytest.importorskip(needed)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "saisa_hf", "serve", str(CHECKPOINT), "--port", str(self.port), *options]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("SAISA_IMAGE")}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
        self.log = folder / "log"
        with open(self.log, "wb") as log:
            command += ["--device", "cpu"]
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder)
        end = time.monotonic() + 200
        while self.health() is None:
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def health(self):
        """Seconds until /health was answered; None if it was not."""
        start = time.monotonic()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=30) as response:
                assert json.load(response) == {"status": "ok"}
        except OSError:
            return None
        return time.monotonic() - start

    def post(self, body, path="/v1/chat/completions", timeout=120):
        """(status, body) of the answer, and how long it took."""
        data, start = body if isinstance(body, bytes) else json.dumps(body).encode(), time.monotonic()
        url, headers = f"http://127.0.0.1:{self.port}{path}", {"Content-Type": "application/json"}
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout) as response:
                answer = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            answer = error.code, error.read().decode()
        return *answer, time.monotonic() - start

    def ask(self, *images, question="how many digits are there?", parts=(), **options):
        parts = [{"type": "image_url", "image_url": {"url": url}} for url in images] + list(parts)
        content = [*parts, {"type": "text", "text": question}]
        return self.post(
            {"messages": [{"role": "user", "content": content}], "max_tokens": 8, "temperature": 0, **options}
        )

    def peak(self):
        """The most memory that the process has had, in megabytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) // 1024


@contextlib.contextmanager
def running(folder, *options):
    server = Server(folder, *options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with running(tmp_path_factory.mktemp("serving"), "--allow-private-urls", "--url-timeout", "3") as server:
        yield server


@pytest.fixture(scope="module")
def address():
    with hostile_server() as address:
        yield address


def uri(data, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


PALETTE = Image.new("P", (9000, 9000))
PALETTE.putpalette([0, 0, 0, 255, 255, 255])
SOUND = {"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}
FILM = {"type": "video_url", "video_url": {"url": "http://127.0.0.1/a.mp4"}}


def hostile_requests(address, folder):
    """{what: (arguments of `Server.ask`, what the error says)}."""
    os.mkfifo(folder / "pipe")
    images = {
        "drip": (f"{address}/drip", "longer than timeout=3 seconds"),
        "drip_headers": (f"{address}/drip_headers", "longer than timeout=3 seconds"),
        "silent": (f"{address}/silent", "longer than timeout=3 seconds"),
        "large": (f"{address}/large", "max_image_bytes=20971520"),
        "gzip bomb": (f"{address}/bomb", "max_image_bytes=20971520"),
        "loop": (f"{address}/loop", "cannot be read"),
        "missing": (f"{address}/missing", "404"),
        "text": (f"{address}/hop?ftp://127.0.0.1/", "ftp"),
        "pipe": (str(folder / "pipe"), "local files are off"),
        "passwords": ("/etc/passwd", "local files are off"),
        "file": ("file:///etc/passwd", "local files are off"),
        "an image here": (str(SCENE), "local files are off"),
        "palette bomb": (uri(encoded(PALETTE, transparency=0)), "9000 x 9000 pixels"),
        "gif bomb": (uri(gif((60000, 60000), (60000, 60000)), "gif"), "60000 x 60000|exceeds limit"),
        "broken base64": ("data:image/png;base64,%%%", "no image in base64"),
        "no image": (uri(b"no image" * 1000), "in none of the formats"),
        "postscript": (
            uri(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n" + b" " * 999),
            "in none of the formats",
        ),
    }
    requests = {name: ({"images": [url]}, message) for name, (url, message) in images.items()}
    requests["streamed"] = ({"images": ["/etc/passwd"], "stream": True}, "local files are off")
    requests["sound"] = ({"parts": [SOUND]}, "text and images")
    requests["film"] = ({"parts": [FILM]}, "text and images")
    requests["no address"] = ({"parts": [{"type": "image_url"}]}, "image_url")
    requests["number"] = ({"parts": [5]}, "malformed")
    requests["many"] = ({"images": [uri(encoded())] * 17}, "max_images=16")
    requests["loosened"] = (
        {"images": ["/a"], "chat_template_kwargs": {"allow_local_files": True}},
        "chat_template_kwargs",
    )
    requests["smuggled"] = ({"chat_template_kwargs": {"images": "/etc/passwd"}}, "chat_template_kwargs has images")
    for part in ("text_kwargs", "images_kwargs", "common_kwargs"):
        options = {part: {"padding": "max_length", "max_length": 10**9}}
        requests[part] = ({"chat_template_kwargs": options}, f"chat_template_kwargs has {part}")
    requests["masks"] = (
        {"chat_template_kwargs": {"return_assistant_tokens_mask": True}},
        "chat_template_kwargs has ret",
    )
    requests["list"] = ({"chat_template_kwargs": ["a"]}, "chat_template_kwargs is")
    for stop in (["a"] * 5, "", ["a" * 201], [], 7):
        requests[f"stop {stop!r:.9}"] = ({"stop": stop}, "stop is .*Expected a string, or a list of up to 4")
    requests["template"] = ({"chat_template_kwargs": {"chat_template": "{{ 7 }}"}}, "chat_template_kwargs has")
    requests["long answer"] = ({"max_tokens": 10**9}, "context of 512")
    requests["long question"] = ({"question": "how " * 10**6}, "context of 512")
    requests["heat"] = ({"temperature": "hot"}, "hot")
    return requests


def sent(server, arguments):
    arguments = dict(arguments)
    return server.ask(*arguments.pop("images", ()), **arguments)


@served
def test_hostile_requests_are_refused_with_a_reason_and_others_are_answered_meanwhile(server, address, tmp_path):
    status, answer, _ = server.ask(uri(SCENE.read_bytes()))
    assert status == 200 and json.loads(answer)["choices"][0]["message"]["content"].strip() == "5"
    before, requests = server.peak(), hostile_requests(address, tmp_path)
    with ThreadPoolExecutor(len(requests)) as pool:
        futures = {name: pool.submit(sent, server, arguments) for name, (arguments, _) in requests.items()}
        latencies, answered = [], 0
        while not all(future.done() for future in futures.values()):
            latencies.append(server.health())
            status, answer, _ = server.ask(uri(SCENE.read_bytes()))
            answered += status == 200 and json.loads(answer)["choices"][0]["message"]["content"].strip() == "5"
        results = {name: future.result() for name, future in futures.items()}
    wrong = {}
    for name, (status, text, seconds) in results.items():
        message = json.loads(text)["error"]["message"]
        if status != 400 or not re.search(requests[name][1], message) or seconds > 40:
            wrong[name] = (status, message, seconds)
    assert not wrong
    assert answered == len(latencies) >= 2, (answered, len(latencies))
    assert None not in latencies and max(latencies) < 10, latencies
    assert server.peak() - before < 500, (server.peak(), before)
    assert "Traceback" not in server.log.read_text(encoding="utf-8", errors="replace")


@served
def test_an_address_is_read_and_the_answer_streamed_or_not(server, address, monkeypatch):
    monkeypatch.setattr(Hostile, "image", lambda self, rest: self.answer(SCENE.read_bytes()))
    for path in ("image", "hop"):
        status, answer, _ = server.ask(f"{address}/{path}")
        assert status == 200 and json.loads(answer)["choices"][0]["message"]["content"].strip() == "5"
    status, answer, _ = server.ask(f"{address}/image", stream=True)
    assert status == 200 and '"content":"5"' in answer.replace(" ", "")
    part = {"type": "input_image", "image_url": f"{address}/image"}
    content = [part, {"type": "input_text", "text": "how many digits are there?"}]
    body = {"input": [{"role": "user", "content": content}], "stream": False, "temperature": 0}
    status, answer, _ = server.post(body, "/v1/responses")
    assert status == 200 and json.loads(answer)["output"][0]["content"][0]["text"].strip() == "5"


@served
def test_the_images_of_a_request_are_bounded_together(server, address, monkeypatch):
    now, most, lock = [0], [0], threading.Lock()

    def image(self, rest):
        with lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        time.sleep(0.2)
        with lock:
            now[0] -= 1
        self.answer(bytes(3 * 2**20))

    monkeypatch.setattr(Hostile, "image", image)
    status, text, _ = server.ask(*[f"{address}/image"] * 12)
    assert status == 400 and "at its addresses have more than max_request_bytes=33554432" in text
    assert 1 < most[0] <= 4
    status, text, _ = server.ask(f"{address}/image")
    assert status == 400 and "in none of the formats" in text


@served
def test_a_body_that_is_too_large_is_not_read(server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", str(400 * 2**20))
    connection.endheaders(b"{")
    response = connection.getresponse()
    assert response.status == 413 and "max_request_bytes=33554432" in json.load(response)["error"]["message"]
    for body in (b"[1]", b'{"messages"', b"[" * 100_000, b'{"a": ' + b"9" * 10_000 + b"}"):
        status, answer, _ = server.post(body)
        assert 400 <= status < 500 and json.loads(answer)["error"]["type"] == "invalid_request_error"
    for path in ("/load_model", "/reset", "/v1/completions", "/v1/audio/transcriptions", "/v1/systemone"):
        assert server.post({"model": "gpt2"}, path)[0] == 404


@pytest.mark.slow
@served
def test_private_addresses_are_refused_and_a_flood_of_slow_ones_leaves_others_alone(address, tmp_path):
    with running(tmp_path, "--url-timeout", "5", "--max-requests", "100") as server:
        for url in (
            f"{address}/image",
            "http://169.254.169.254/latest/meta-data",
            "http://localhost/",
            "http://[::1]/",
        ):
            status, text, _ = server.ask(url)
            assert status == 400 and "no public address" in json.loads(text)["error"]["message"]
    with running(tmp_path, "--url-timeout", "5", "--allow-private-urls", "--allow-local-files") as server:
        before = server.peak()
        (tmp_path / "big").write_bytes(b"")
        os.truncate(tmp_path / "big", 10**12)
        os.mkfifo(tmp_path / "pipe")
        local = {"pipe": "no file, but", "big": "max_image_bytes", ".": "no file, but", "home/none": "No such file"}
        for name, message in local.items():
            status, text, _ = server.ask(str(tmp_path / name))
            assert status == 400 and message in json.loads(text)["error"]["message"]
        assert server.ask(str(SCENE))[0] == 200
        bomb = uri(encoded(Image.new("P", (4400, 4400)), transparency=0))
        with ThreadPoolExecutor(60) as pool:
            slow = [pool.submit(server.ask, f"{address}/drip") for _ in range(24)]
            large = [pool.submit(server.ask, *[bomb] * 4) for _ in range(5)]
            latencies = [server.health() for _ in range(20)]
            questions = [server.ask()[0] for _ in range(5)]
            assert {future.result()[0] for future in slow} == {400}
            assert {future.result()[0] for future in large} <= {200, 400}
        assert questions == [200] * 5 and None not in latencies and max(latencies) < 10
        assert server.peak() - before < 1500, (server.peak(), before)


@pytest.mark.slow
@served
def test_requests_at_random_never_end_in_a_server_error(server):
    """300 requests, each a valid one with something replaced."""
    chance = random.Random(0)
    values = [*JSON_VALUES, ["a"] * 9]
    values += [{"type": "image_url", "image_url": {"url": "data:,"}}, {"type": "text"}, "{{ 1/0 }}", {"url": {}}]

    def mutated(value, depth=0):
        if chance.random() < 0.15 + 0.1 * depth:
            return chance.choice(values)
        if isinstance(value, dict):
            changed = {key: mutated(one, depth + 1) if chance.random() < 0.5 else one for key, one in value.items()}
            if chance.random() < 0.1 and changed:
                del changed[chance.choice(sorted(changed))]
            return changed
        return [mutated(one, depth + 1) for one in value] if isinstance(value, list) else value

    picture = {"type": "image_url", "image_url": {"url": uri(encoded())}}
    wrong = {}
    for number in range(300):
        chat = [{"role": "user", "content": [picture, {"type": "text", "text": "how many digits are there?"}]}]
        chat += [{"role": "assistant", "content": "5"}, {"role": "user", "content": "is there a 3?"}]
        body = {
            "messages": chat,
            "max_tokens": 2,
            "temperature": 0,
            "top_p": 1,
            "seed": 1,
            "stop": None,
            "stream": False,
        }
        path = "/v1/chat/completions"
        if number % 3 == 0:
            body, path = {"input": chat, "max_output_tokens": 2, "stream": False, "instructions": "a"}, "/v1/responses"
        body = mutated(body) or {}
        status, text, seconds = server.post(body, path)
        if status >= 500 or seconds > 30 or (status >= 400 and not json.loads(text)["error"]["message"]):
            wrong[json.dumps(body)[:500]] = (status, text[:300], seconds)
    assert not wrong, json.dumps(wrong, indent=1)
