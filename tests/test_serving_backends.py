"""`saisa serve`: which server is chosen, what it is told, and what it refuses. No server is started."""

import argparse
import importlib.metadata
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest

from saisa_hf.cli import main
from saisa_hf.demo.run import CHECKPOINT
from saisa_hf.serving import with_vllm
from saisa_hf.serving.run import ServeOptions


REFUSED = "SAISA in vLLM does not support visual_layers=[1]: no kernels."


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", {name: os.environ[name] for name in os.environ if "SAISA_IMAGE" not in name})


@pytest.fixture
def started(monkeypatch):
    """What the two servers were started with: (backend, command line of vLLM or options)."""
    seen = []
    monkeypatch.setattr(sys, "argv", ["saisa"])
    stand_in = SimpleNamespace(start=lambda options: seen.append(("transformers", options)))
    monkeypatch.setitem(sys.modules, "saisa_hf.serving.with_transformers", stand_in)
    main_of_vllm = ModuleType("vllm.entrypoints.cli.main")
    main_of_vllm.main = lambda: seen.append(("vllm", sys.argv[1:]))
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.cli.main", main_of_vllm)
    return seen


@pytest.fixture
def vllm(monkeypatch):
    """Puts a vLLM of a version beside this package, which runs on a device and refuses what it is told to."""

    def install(version="0.32.1", device="cuda", refused=None):
        def check_checkpoint(config):
            if refused:
                raise ValueError(refused)

        platform = SimpleNamespace(device_type=device, is_unspecified=lambda: device == "")
        own = importlib.metadata.version

        def found(name):
            if name != "vllm":
                return own(name)
            if version is None:
                raise importlib.metadata.PackageNotFoundError(name)
            return version

        monkeypatch.setattr(importlib.metadata, "version", found)
        monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm") if version else None)
        monkeypatch.setitem(sys.modules, "vllm.platforms", SimpleNamespace(current_platform=platform))
        refusals = SimpleNamespace(check_checkpoint=check_checkpoint)
        monkeypatch.setitem(sys.modules, "saisa_hf.serving.vllm.refusals", refusals)

    return install


@pytest.mark.parametrize(
    ("version", "device", "refused", "backend", "why"),
    [
        ("0.32.0", "cuda", None, "vllm", "vLLM 0.32.0 is installed"),
        (None, "cuda", None, "transformers", "vLLM is not installed"),
        ("0.31.2", "cuda", None, "transformers", "but vLLM 0.31.2 is installed"),
        ("0.33.0", "cuda", None, "transformers", "but vLLM 0.33.0 is installed"),
        ("0.32.0", "", None, "transformers", "finds no device that it was built for"),
        ("0.32.0", "cuda", REFUSED, "transformers", REFUSED[:-1]),
    ],
)
def test_vllm_is_chosen_where_it_can_serve(started, vllm, capsys, version, device, refused, backend, why):
    vllm(version, device, refused)
    assert main(["serve", str(CHECKPOINT)]) == 0
    line = capsys.readouterr().out
    assert f"is served by {backend}, because " in line and why in line and line.count("\n") == 1
    assert [name for name, _ in started] == [backend]


def test_transformers_is_chosen_where_vllm_cannot_be_imported(started, vllm, capsys, monkeypatch):
    vllm()
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    assert main(["serve", str(CHECKPOINT)]) == 0
    assert "vLLM 0.32.1 cannot be imported" in capsys.readouterr().out and started[0][0] == "transformers"


def test_the_backend_that_was_asked_for_is_taken(started, vllm, capsys):
    vllm()
    assert main(["serve", str(CHECKPOINT), "--backend", "transformers", "--device", "cpu"]) == 0
    assert started[0][0] == "transformers" and started[0][1].device == "cpu"
    vllm("0.31.0")
    assert main(["serve", str(CHECKPOINT), "--backend", "vllm"]) == 2
    assert "serves SAISA models in vLLM 0.32, but vLLM 0.31.0 is installed" in capsys.readouterr().err
    vllm(None)
    assert main(["serve", str(CHECKPOINT), "--backend", "vllm"]) == 1
    assert "--backend vllm needs vllm: pip install vllm (or the extra [vllm]" in capsys.readouterr().err


def test_vllm_is_told_what_is_asked_for(started, vllm):
    vllm()
    given = (
        "--host 0.0.0.0 --port 81 --dtype bfloat16 --device cuda --max-images 3 --max-requests 5 --max-request-bytes 9"
    )
    assert main(["serve", str(CHECKPOINT), *given.split(), "--url-timeout", "2", "--", "-tp", "2", "--api-key=a"]) == 0
    ((_, command),) = started
    assert command[:2] == ["serve", str(CHECKPOINT)] and command[-3:] == ["-tp", "2", "--api-key=a"]
    pairs = dict(zip(command[2:-3:2], command[3:-3:2]))
    assert pairs == {
        "--host": "0.0.0.0",
        "--port": "81",
        "--dtype": "bfloat16",
        "--limit-mm-per-prompt": '{"image": 3}',
        "--middleware": "saisa_hf.serving.vllm.limits.RequestGuard",
    }
    expected = {
        "VLLM_MEDIA_CONNECTOR": "saisa",
        "VLLM_MAX_N_SEQUENCES": "16",
        "SAISA_SERVE_MAX_REQUESTS": "5",
        "SAISA_SERVE_MAX_REQUEST_BYTES": "9",
        "SAISA_IMAGE_TIMEOUT": "2.0",
        "SAISA_IMAGE_ALLOW_PRIVATE_URLS": "0",
        "SAISA_IMAGE_ALLOW_LOCAL_FILES": "0",
    }
    assert expected.items() <= os.environ.items()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu"], "--device cpu: this vLLM runs on 'cuda'. Choose among several with CUDA_VISIBLE_DEVICES"),
        (["--device", "cuda:1"], "--device cuda:1"),
        (["--attn-implementation", "sdpa"], "--attn-implementation sdpa is transformers'"),
        (["--url-timeout", "0"], "SAISA_IMAGE_TIMEOUT is '0.0'"),
        *[
            (["--", "--seed", "1", option], f"{option!r} behind -- is not taken")
            for option in (
                *with_vllm.TAKEN,
                "--port=1",
                "--limit_mm_per_prompt={}",
                "--limit-mm-per-prompt.image",
                "--grp",
                "--conf",
                "--trust-request-mm",
            )
        ],
    ],
)
def test_vllm_is_not_told_what_does_not_apply_or_leaves_limits_out(started, vllm, capsys, options, message):
    vllm()
    assert main(["serve", str(CHECKPOINT), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and not started


def test_a_server_without_the_limits_is_refused(started, vllm, capsys):
    vllm()
    os.environ["VLLM_USE_RUST_FRONTEND"] = "1"
    assert main(["serve", str(CHECKPOINT)]) == 2 and not started
    assert "VLLM_USE_RUST_FRONTEND is set" in capsys.readouterr().err


def test_transformers_takes_no_options_of_vllm(vllm, capsys):
    vllm(None)
    assert main(["serve", str(CHECKPOINT), "--", "-tp", "2"]) == 2
    assert "'-tp 2' behind -- is for vLLM, but the backend is transformers" in capsys.readouterr().err


def test_dashes_mean_to_other_commands_what_they_mean_to_argparse(monkeypatch):
    seen = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", lambda self, argv: seen.append(argv) or 1 / 0)
    for argv in (["chat", "--", "-odd-name"], ["serve", "a", "--", "-tp", "2"]):
        main(argv)
    assert seen == [["chat", "--", "-odd-name"], ["serve", "a"]]


def test_options_have_what_a_server_needs():
    options = ServeOptions("checkpoint")
    assert options.further == () and with_vllm.arguments(options, "cpu")[:2] == ["serve", "checkpoint"]
