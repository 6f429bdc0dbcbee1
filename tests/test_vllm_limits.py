"""`saisa serve --backend vllm`: the limits of `saisa serve` hold in vLLM's server. It is started once."""

import asyncio
import importlib.util
import json
import os
import sys
import urllib.error
import urllib.request

import pytest


pytest.importorskip("vllm")

import vllm_parts as parts
from test_image_sources import Hostile, hostile_server
from test_vllm_serve import chat, expected_answer, image_part, whole_characters

from saisa_hf.images_saisa import ImageError
from saisa_hf.serving.vllm import limits


pytestmark = pytest.mark.skipif(not importlib.util.find_spec("vllm.entrypoints.cli"), reason="this vLLM has no server")
OPTIONS = "--max-model-len 256 --enforce-eager --max-num-seqs 8 --block-size 32 --max-num-batched-tokens 64"
LIMITS = "--max-images 3 --max-image-pixels 5000 --max-image-bytes 100000 --max-request-bytes 300000 --url-timeout 2"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return parts.make_checkpoint(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def post(checkpoint, tmp_path_factory):
    """Sends a body to a path: (status, answer)."""

    def command(port):
        saisa = [sys.executable, "-m", "saisa_hf", "serve", checkpoint, "--port", str(port), "--dtype", "float32"]
        return [*saisa, *LIMITS.split(), "--backend", "vllm", "--", *OPTIONS.split()]

    def send(body, path="/v1/chat/completions"):
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    environment = {name: value for name, value in os.environ.items() if not name.startswith("SAISA_IMAGE")}
    log = tmp_path_factory.mktemp("log") / "server.txt"
    with parts.served(command, environment, log) as port:
        assert f"{checkpoint} is served by vllm, because --backend says so" in log.read_text()
        yield send


@pytest.fixture(scope="module")
def address():
    with hostile_server() as address:
        yield address


def asking(*parts_of_it, **options):
    parts_of_it = [{"type": "image_url", "image_url": {"url": p}} if isinstance(p, str) else p for p in parts_of_it]
    content = [*parts_of_it, {"type": "text", "text": "what is red"}]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 4, "temperature": 0, **options}


def test_requests_are_answered_as_by_transformers(post, checkpoint):
    given = [*parts.pictures(2), "what is red"]
    text, prompt_tokens = expected_answer(checkpoint, *given)
    status, answer = post({"messages": chat(*given), "max_tokens": 6, "temperature": 0, "ignore_eos": True})
    answer = json.loads(answer)
    assert status == 200 and answer["usage"]["prompt_tokens"] == prompt_tokens
    assert whole_characters(answer["choices"][0]["message"]["content"]) == text


def test_what_is_over_a_limit_is_refused(post, address):
    small, large = image_part(parts.Image.new("RGB", (9, 9))), image_part(parts.Image.new("RGB", (90, 90)))
    named = small | {"uuid": "someone's"}
    for body, message in (
        (asking(f"{address}/image"), "no public address"),
        (asking("http://localhost:1/"), "no public address"),
        (asking("http://[::ffff:127.0.0.1]/"), "no public address"),
        (asking("file:///etc/passwd"), "local files are off"),
        (asking("/etc/passwd"), "local files are off"),
        (asking("data:image/png;base64," + "A" * 150_000), "max_image_bytes=100000"),
        (asking(large), "max_image_pixels=5000"),
        (asking(*[small] * 4), "3"),
        (asking(named), "uuid of an image"),
        (asking({"type": "video_url", "video_url": {"url": f"{address}/image"}}), "video"),
        (asking({"type": "audio_url", "audio_url": {"url": f"{address}/image"}}), "audio"),
        (asking(small, mm_processor_kwargs={"max_image_pixels": 10**9}), "mm_processor_kwargs"),
        (asking(small, media_io_kwargs={"image": {"image_mode": None}}), "media_io_kwargs"),
        (asking(small, chat_template="{{ 1 }}"), "chat template"),
        (asking(small, n=17), "n must be at most 16"),
        (asking(small, prompt_logprobs=1), "prompt_logprobs=1"),
        (asking(small, stop=[""]), "stop"),
        (asking(small, {"type": "text", "text": "<image>"}), "image tokens"),
    ):
        status, answer = post(body)
        assert status in (400, 422) and message in answer, (body, status, answer)
    assert post(asking(small))[0] == 200  # although requests with this image were refused
    assert post(asking("data:," + "A" * 300_000))[0] == 413
    for path in ("/metrics", "/docs", "/v1/models/none", "/ping"):
        assert post(None, path)[0] == 404
    for path in ("/v1/completions", "/tokenize", "/invocations", "/inference/v1/generate"):
        assert post({}, path)[0] == 404
    assert not Hostile.seen


def test_images_at_addresses_are_read_within_limits(address, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ | {"SAISA_IMAGE_ALLOW_PRIVATE_URLS": "1"})

    async def read(*names, spent=None, **options):
        images = limits.LimitedImages(**options)
        limits.SPENT.set(spent or limits.Spent())
        return await asyncio.gather(*(images.fetch_image_async(f"{address}/{name}") for name in names))

    first, second = asyncio.run(read("image", "gzipped"))
    assert first.size == second.size == (5, 4) and first.mode == "RGB"
    with pytest.raises(ImageError, match="cannot be read: HTTPError"):
        asyncio.run(read("missing"))
    with pytest.raises(ImageError, match=r"its host '127\.0\.0\.1' is none of"):
        asyncio.run(read("image", allowed_media_domains=["example.com"]))
    os.environ["SAISA_SERVE_MAX_REQUEST_BYTES"] = "100"
    with pytest.raises(ImageError, match="more than max_request_bytes=100 bytes"):
        asyncio.run(read("image", "image"))
    os.environ |= {"SAISA_SERVE_MAX_REQUEST_BYTES": "1000", "SAISA_IMAGE_MAX_PIXELS": "80"}
    assert len(asyncio.run(read(*["image"] * 4))) == 4
    os.environ["SAISA_IMAGE_MAX_PIXELS"] = "1600"  # a row counts as 16 pixels
    spent = limits.Spent()
    spent.pixels = 4 * 1600 - 20
    assert asyncio.run(read("image", spent=spent))[0].size == (5, 4)
    with pytest.raises(ImageError, match="more than 6400 pixels together"):
        asyncio.run(read("image", spent=spent))


def test_nothing_but_images_is_read():
    images = limits.LimitedImages()
    for read in (images.fetch_audio, images.fetch_video):
        with pytest.raises(ValueError, match="texts and images"):
            read("data:,a")
    for read in (images.fetch_audio_async, images.fetch_video_async):
        with pytest.raises(ValueError, match="texts and images"):
            asyncio.run(read("data:,a"))
