"""The image that serves with vLLM: what its Dockerfile must and must not say. It is not built here."""

import re
from pathlib import Path

import pytest

from saisa_hf.cli import make_parser
from saisa_hf.serving.vllm.registration import problem_with


ROOT = Path(__file__).parent.parent
FILE = ROOT / "containers" / "cuda.Dockerfile"


@pytest.fixture(scope="module")
def instructions():
    """(name, arguments) of each instruction, lines joined."""
    text = re.sub(r"^#.*\n", "", FILE.read_text(encoding="utf-8"), flags=re.M).replace("\\\n", " ")
    return [tuple(re.sub(r"\s+", " ", line).split(" ", 1)) for line in text.splitlines() if line.strip()]


def of(instructions, name):
    return [arguments for found, arguments in instructions if found == name]


def test_what_it_is_built_from_is_pinned(instructions):
    (base,) = of(instructions, "FROM")
    image, _, tag = base.rpartition(":")
    assert image == "vllm/vllm-openai" and re.fullmatch(r"v\d+\.\d+\.\d+", tag) and problem_with(tag) is None
    installed = [
        word
        for run in of(instructions, "RUN")
        for part in run.split("&&")
        if " install " in part
        for word in part.split()
    ]
    packages = [
        word.strip('"') for word in installed if not word.startswith("-") and word not in ("uv", "pip", "install")
    ]
    assert packages and all("==" in package or package == "/opt/saisa" for package in packages)
    assert not of(instructions, "ADD") and "latest" not in FILE.read_text(encoding="utf-8")


def test_what_is_copied_is_in_the_repository_and_not_ignored(instructions):
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = {source for copy in of(instructions, "COPY") for source in copy.split()[:-1]}
    assert copied and "*" in ignored and {line[1:] for line in ignored if line.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)


def test_it_runs_as_nobody_and_has_no_secrets(instructions):
    names = [name for name, _ in instructions]
    (user,) = of(instructions, "USER")
    assert (
        user.isdecimal()
        and int(user) > 1000
        and names.index("USER") > max(i for i, n in enumerate(names) if n == "RUN")
    )
    for given in (*of(instructions, "ENV"), *of(instructions, "ARG")):
        assert not re.search("TOKEN|SECRET|PASSWORD|KEY", given)


def test_it_starts_a_command_that_there_is(instructions):
    (entry,), (volume,) = of(instructions, "ENTRYPOINT"), of(instructions, "VOLUME")
    command = re.findall(r'"([^"]*)"', entry)
    arguments = make_parser().parse_args([*command[1:], "./checkpoint"])
    assert command[0] == "saisa" and (arguments.backend, arguments.host, arguments.port) == ("vllm", "0.0.0.0", 8000)
    assert re.findall(r'"([^"]*)"', volume)[0] in of(instructions, "ENV")[0]
