# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa chat`: a conversation in the terminal, or on a pipe."""

import contextlib
import os
import re
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import PIL.Image

from ..common.loading import load_model, quiet_transformers, read_image
from .conversation import Conversation


COMMANDS = """\
/image PATH ...   shows images (files or http(s) addresses) with the next question
/clear            forgets the conversation and its images
/help             shows this
/exit             leaves, as Ctrl-D does
An empty line sends waiting images without a question. Ctrl-C stops an answer; the conversation keeps its beginning."""


def chat(
    checkpoint: str,
    images: Iterable[str] = (),
    dtype: str = "auto",
    device: str = "auto",
    attn_implementation: str | None = None,
    system: str | None = None,
    max_new_tokens: int = 512,
    temperature: float | None = None,
) -> int:
    """`saisa chat`: a conversation on stdin and stdout. Returns the exit status.

    Args:
        checkpoint: folder or hub id.
        images: paths or addresses of images that come with the first question.
        dtype: `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`: as the checkpoint is stored.
        device: as PyTorch names it, or `"auto"`: CUDA, else MPS, else the CPU.
        attn_implementation: as `from_pretrained` takes it.
        system: the system message, if the template has one.
        max_new_tokens: the longest answer.
        temperature: of sampling; 0 takes the most likely token, None leaves it to the checkpoint.

    Raises:
        OSError, ValueError: something cannot be used; the message names it in one line. If stdin or stdout is not a terminal,
            questions and commands raise these too.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    waiting = [read_image(path) for path in images]
    sampling: dict[str, Any] = {} if temperature is None else {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature}
    with quiet_transformers(progress=interactive):
        model, processor = load_model(checkpoint, dtype, device, attn_implementation)
        conversation = Conversation(model, processor, system, max_new_tokens=max_new_tokens, **sampling)
        terminal = Terminal(conversation, interactive)
        size = sum(parameter.numel() for parameter in model.parameters())
        precision = str(model.dtype).removeprefix("torch.")
        terminal.say(f"{checkpoint}: {size / 1e6:,.1f} million parameters, {precision}, {model.device}\n\n{COMMANDS}\n")
        terminal.show(waiting)
        return terminal.run()


class Terminal:
    """Reads questions and commands from stdin, and writes answers to stdout as they come.

    Args:
        conversation: a `Conversation`.
        interactive: whether both ends are a terminal. If not, only answers are written, and errors are raised.
    """

    def __init__(self, conversation: Conversation, interactive: bool):
        self.conversation = conversation
        self.interactive = interactive
        self.waiting: list[PIL.Image.Image] = []
        self.positions = conversation.model.config.text_config.max_position_embeddings

    def run(self) -> int:
        """Runs until /exit or the end of stdin. Returns the exit status."""
        if self.interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (arrow keys and history for input())
        while True:
            try:
                line = input("> " if self.interactive else "").strip()
            except EOFError:
                self.say("")
                return 0
            except KeyboardInterrupt:
                if not self.interactive:
                    raise
                self.say("\n(/exit or Ctrl-D leaves)")
                continue
            try:
                if line == "/exit":
                    return 0
                self.handle(line)
            except (OSError, ValueError, RuntimeError) as error:
                if not self.interactive:
                    raise
                self.say(f"error: {' '.join(str(error).split()) or type(error).__name__}")

    def handle(self, line: str) -> None:
        """One line of input: a command, or a question."""
        command = re.match(r"/[a-z]+(?=\s|$)", line)
        if command is None:
            if line or self.waiting:
                self.answer(line)
        elif command[0] == "/image":
            self.show([read_image(path) for path in _paths(line.removeprefix("/image").strip())])
        elif command[0] == "/clear":
            self.conversation.clear()
            self.waiting = []
            self.say("A new conversation.")
        elif command[0] == "/help":
            self.say(COMMANDS)
        else:
            raise ValueError(f"{command[0]} is not a command; /help lists them.")

    def show(self, images: list[tuple[PIL.Image.Image, str]]) -> None:
        """Keeps images, each with its name, for the next question."""
        self.waiting += [image for image, _ in images]
        for image, name in images:
            self.say(f"({name}, {image.width} x {image.height}, goes with the next question)")

    def answer(self, question: str) -> None:
        """Prints the answer to `question` about the waiting images, until it ends or Ctrl-C ends it."""
        with self._stopped_by_ctrl_c():
            for piece in self.conversation.ask(question, self.waiting):
                print(piece, end="", flush=True)
        print(flush=True)
        self.waiting = []
        if self.conversation.finish_reason == "interrupted":
            self.say("(stopped)")
        elif self.conversation.finish_reason == "length":
            self.say(f"(cut after {self.conversation.generation['max_new_tokens']} tokens: --max-new-tokens)")
        if self.conversation.cached_tokens > self.positions:
            self.say(f"(longer than the {self.positions} tokens that the model was made for: /clear starts again)")

    def say(self, text: str) -> None:
        """Prints what is not an answer, in a terminal only."""
        if self.interactive:
            print(text, flush=True)

    @contextlib.contextmanager
    def _stopped_by_ctrl_c(self) -> Iterator[None]:
        """In a terminal, the first Ctrl-C stops the answer; the second one does what it always does."""
        if not self.interactive:
            yield
            return
        previous = signal.getsignal(signal.SIGINT)

        def stop(signum: int, frame: Any) -> None:
            signal.signal(signal.SIGINT, previous)
            self.conversation.stop()

        signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)


def _paths(text: str) -> list[str]:
    """The paths after /image. A single one that exists may contain spaces without being quoted."""
    paths = [text] if os.path.isfile(os.path.expanduser(text)) else shlex.split(text)
    if not paths:
        raise ValueError("/image needs the path or address of an image.")
    return paths
