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

from ..common.loading import found, load_model, quiet_transformers, read_image
from ..common.videos import Film, read_video
from .conversation import Conversation


COMMANDS = """\
/image PATH ...   shows images (files or http(s) addresses) with the next question
/video PATH ...   shows videos, likewise
/clear            forgets the conversation and its images
/help             shows this
/exit             leaves, as Ctrl-D does
An empty line sends what waits without a question. Ctrl-C stops an answer; the conversation keeps its beginning."""


def chat(
    checkpoint: str,
    images: Iterable[str] = (),
    videos: Iterable[str] = (),
    num_frames: int | None = None,
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
        images, videos: paths or addresses of images and videos that come with the first question.
        num_frames: taken of each video; None: as the checkpoint says.
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
    videos = [path for path in videos if found(path, "video")]  # before the model is loaded
    sampling: dict[str, Any] = {} if temperature is None else {"do_sample": False}
    if temperature:
        sampling = {"do_sample": True, "temperature": temperature}
    with quiet_transformers(progress=interactive):
        model, processor = load_model(checkpoint, dtype, device, attn_implementation)
        if num_frames is not None:
            processor.video_settings = {**(processor.video_settings or {}), "num_frames": num_frames, "fps": None}
        options = {"progress": interactive, "max_new_tokens": max_new_tokens, **sampling}
        conversation = Conversation(model, processor, system, **options)
        terminal = Terminal(conversation, interactive)
        size = sum(parameter.numel() for parameter in model.parameters())
        precision = str(model.dtype).removeprefix("torch.")
        terminal.say(f"{checkpoint}: {size / 1e6:,.1f} million parameters, {precision}, {model.device}\n\n{COMMANDS}\n")
        terminal.show(waiting)
        terminal.show_videos(videos)
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
        self.films: list[Film] = []
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
            if line or self.waiting or self.films:
                self.answer(line)
        elif command[0] == "/image":
            self.show([read_image(path) for path in _paths(line, "/image", "an image")])
        elif command[0] == "/video":
            self.show_videos(_paths(line, "/video", "a video"))
        elif command[0] == "/clear":
            self.conversation.clear()
            self.waiting, self.films = [], []
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

    def show_videos(self, paths: Iterable[str]) -> None:
        """Reads videos, and keeps their frames for the next question.

        Raises:
            OSError: one cannot be read.
        """
        for path in paths:
            film = self._read(path)
            self.films.append(film)
            self.say(f"({path}, {len(film.images)} frames, goes with the next question)")

    def _read(self, path: str) -> Film:
        try:
            name, processor = f"video {path!r}", self.conversation.processor
            return read_video(processor, found(path, "video"), name, progress=self.interactive, timeout=60)
        except ValueError as error:
            raise OSError(str(error)) from error

    def answer(self, question: str) -> None:
        """Prints the answer to `question` about the waiting images and videos, until it ends or Ctrl-C ends it."""
        with self._stopped_by_ctrl_c():
            for piece in self.conversation.ask(question, self.waiting, self.films):
                print(piece, end="", flush=True)
        print(flush=True)
        self.waiting, self.films = [], []
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


def _paths(line: str, command: str, what: str) -> list[str]:
    """The paths after a command. A single one that exists may contain spaces without being quoted."""
    text = line.removeprefix(command).strip()
    paths = [text] if os.path.isfile(os.path.expanduser(text)) else shlex.split(text)
    if not paths:
        raise ValueError(f"{command} needs the path or address of {what}.")
    return paths
