"""`Conversation`: turns on a filled cache equal the conversation fed at once; and `saisa chat`, piped and on a terminal."""

import functools
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import IMAGE_TOKEN, tiny_model
from tokenizers import Tokenizer, decoders, models
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from saisa_hf import SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.chat.conversation import Conversation
from saisa_hf.chat.templates import chat_template
from saisa_hf.cli import main
from saisa_hf.demo.run import CHECKPOINT
from saisa_hf.processing_saisa import add_image_token


ROOT = Path(__file__).parent.parent
SCENE = str(ROOT / "docs" / "images" / "scene.png")
COUNT, THREE = "how many digits are there?", "is there a 3?"


@functools.cache
def demo():
    model = SaisaForConditionalGeneration.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    return model, SaisaProcessor.from_pretrained(CHECKPOINT)


def tiny_processor():
    """Letters, and pairs of them: what a random model says is hardly ever what the tokenizer makes of its text."""
    letters = [chr(c) for c in range(32, 127) if chr(c) not in "#$%&*+@[]^`{|}~;=_\\\"'/<>()0123456789"] + ["\n"]
    pairs = [a + b for a in "abcde" for b in "abcdefg"]
    names = ["<pad>", "<bos>", "</s>", *letters, *pairs][:IMAGE_TOKEN]
    pairs = [pair for pair in pairs if pair in names]
    bpe = models.BPE(
        {name: i for i, name in enumerate(names)}, [(pair[0], pair[1]) for pair in pairs], unk_token="<pad>"
    )
    backend = Tokenizer(bpe)
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    assert add_image_token(tokenizer) == IMAGE_TOKEN
    pictures = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return SaisaProcessor(pictures, tokenizer, 4, "default", 1, chat_template=chat_template("vicuna"))


class Count:
    """What goes through a model: rows of text at its embedding, pictures at its encoder, one list entry per pass."""

    def __init__(self, model):
        self.text, self.pictures = [], []
        model.get_input_embeddings().register_forward_hook(lambda _, ids, __: self.text.append(ids[0].numel()))
        model.model.vision_tower.register_forward_pre_hook(
            lambda _, __, inputs: self.pictures.append(len(inputs["pixel_values"])), with_kwargs=True
        )


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8 + seed, 3), np.uint8))


def rendered(processor, messages):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    return processor.apply_chat_template(messages, add_generation_prompt=True, **options)


def answered_at_once(model, processor, messages, **generation):
    """The answer to `messages`, all of it in one prompt and without a cache from before: (ids, text)."""
    inputs = rendered(processor, messages)
    ids = model.generate(**inputs, **generation)[0, inputs["input_ids"].shape[1] :]
    return ids.tolist(), processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


TURNS = [("abc", 1), ("de, fg?", 0), ("", 2), ("cab bed", 0), ("gab", 1)]


@pytest.mark.parametrize("text_model", ["llama", "mistral_window", "qwen3_window"])
def test_turn_by_turn_equals_the_conversation_fed_at_once(text_model):
    model, processor = tiny_model(text_model), tiny_processor()
    conversation = Conversation(model, processor, system="Be brief.", max_new_tokens=9)
    count, said_otherwise = Count(model), 0
    for number, (text, pictures) in enumerate(TURNS):
        cached = conversation._cached_ids
        asked = [*conversation.messages]
        pieces = list(conversation.ask(text, [picture(number + i) for i in range(pictures)]))
        asked.append(conversation.messages[-2])
        prompt = rendered(processor, asked)["input_ids"][0].tolist()
        common = next((i for i, (old, new) in enumerate(zip(cached, prompt)) if old != new), len(cached))
        new = prompt[common:]
        assert count.text[0] == len(new) - new.count(IMAGE_TOKEN)
        assert count.text[1:] == [1] * 8 and count.pictures == [pictures] * bool(pictures)
        assert 4 * pictures == new.count(IMAGE_TOKEN)
        said_otherwise += common < len(cached)
        ids, at_once = answered_at_once(model, processor, asked, max_new_tokens=9)
        assert conversation._cached_ids == prompt + ids[:-1]
        assert "".join(pieces).strip() == at_once == conversation.messages[-1]["content"][0]["text"]
        assert conversation.finish_reason == "length"
        count.text.clear(), count.pictures.clear()
    assert said_otherwise >= 2  # the cache had to be cropped: tokens that the model chose read otherwise as text


def test_the_demo_answers_with_every_picture_encoded_once():
    model, processor = demo()
    conversation, count = Conversation(model, processor), Count(model)
    assert "".join(conversation.ask(COUNT, [SCENE])) == "5"
    assert count.pictures == [1] and conversation.finish_reason == "stop"
    first = count.text[0]
    second = "".join(conversation.ask(THREE))
    assert second == answered_at_once(model, processor, conversation.messages[:3], max_new_tokens=8)[1] == "no"
    assert count.pictures == [1, 1] and count.text[2] < first  # the second is the one fed at once
    assert conversation.cached_tokens > 36


def long_conversation(**generation):
    return Conversation(tiny_model(seed=3), tiny_processor(), max_new_tokens=40, **generation)


def equals_the_conversation_fed_at_once(conversation):
    conversation.generation["max_new_tokens"] = 6
    answer = "".join(conversation.ask("and now?", [picture(5)])).strip()
    return (
        answer
        == answered_at_once(conversation.model, conversation.processor, conversation.messages[:-1], max_new_tokens=6)[1]
    )


@pytest.mark.parametrize("way", ["stop", "close", "exception"])
def test_a_stopped_answer_stays_in_the_conversation_as_far_as_it_got(way):
    conversation, shown = long_conversation(), []
    answer = conversation.ask("abc", [picture(0)])
    for piece in answer:
        shown.append(piece)
        if len(shown) == 3:
            if way == "stop":
                conversation.stop()
            elif way == "close":
                answer.close()
            else:
                with pytest.raises(KeyboardInterrupt):
                    answer.throw(KeyboardInterrupt)
    whole = "".join(
        Conversation(conversation.model, conversation.processor, max_new_tokens=40).ask("abc", [picture(0)])
    )
    said = conversation.messages[-1]["content"][0]["text"]
    assert conversation.finish_reason == "interrupted"
    assert said.startswith("".join(shown).strip()) and whole.startswith(said) and len(said) < len(whole.strip())
    assert way != "stop" or "".join(shown).strip() == said
    assert equals_the_conversation_fed_at_once(conversation)


def test_an_error_leaves_the_conversation_as_it_was(monkeypatch):
    conversation = long_conversation()
    list(conversation.ask("abc", [picture(0)]))
    before = list(conversation.messages)
    with pytest.raises(ValueError, match="Nothing to ask"):
        next(conversation.ask(""))
    with pytest.raises(ValueError, match="contains '<image>'"):
        next(conversation.ask("what is <image>?"))
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        next(conversation.ask("a", ["nowhere.png"]))
    with monkeypatch.context() as patch, pytest.raises(MemoryError):  # half of the layers have filled their cache
        patch.setattr(conversation.model.model.language_model.layers[1].mlp, "forward", out_of_memory)
        next(conversation.ask("a"))
    answering = conversation.ask("abc")
    next(answering)
    with pytest.raises(RuntimeError, match="still being read"):
        next(conversation.ask("d"))
    answering.close()
    conversation.messages = before
    assert equals_the_conversation_fed_at_once(conversation)


def out_of_memory(*_):
    raise MemoryError


def test_a_question_may_be_asked_again():
    conversation = long_conversation()
    answer = list(conversation.ask("abc", [picture(0)]))
    conversation.messages = []
    assert list(conversation.ask("abc", [picture(0)])) == answer


@pytest.mark.parametrize("change", ["text", "picture", "turns"])
def test_messages_may_be_changed_between_turns(change):
    conversation = long_conversation()
    for seed in range(2):
        list(conversation.ask("abc", [picture(seed)]))
    if change == "text":
        conversation.messages[1]["content"][0]["text"] = "cab"
    elif change == "picture":
        conversation.messages[0]["content"][0] = {"type": "image", "url": SCENE}
    else:
        del conversation.messages[2:]
    assert equals_the_conversation_fed_at_once(conversation)


def test_clear_forgets_all_but_the_system_message():
    conversation = long_conversation(system="Be brief.")
    first = "".join(conversation.ask("abc"))
    list(conversation.ask("de", [picture(0)]))
    conversation.clear()
    assert [message["role"] for message in conversation.messages] == ["system"] and conversation.cached_tokens == 0
    assert "".join(conversation.ask("abc")) == first


def test_stop_strings_and_sampling_are_arguments_of_a_conversation():
    whole = "".join(long_conversation().ask("abc")).strip()
    ending = whole[5:7]
    conversation = long_conversation(stop_strings=[ending])
    assert "".join(conversation.ask("abc")).strip() == whole[: whole.index(ending) + 2]
    assert conversation.finish_reason == "stop"
    torch.manual_seed(0)
    sampled = {"".join(long_conversation(do_sample=True, temperature=2.0).ask("abc")) for _ in range(3)}
    assert len(sampled) == 3


# --- saisa chat -------------------------------------------------------------------------------------------------------


def piped(monkeypatch, capsys, lines, *arguments, model=CHECKPOINT):
    """(exit status, stdout, stderr) of `saisa chat` with `lines` on a stdin that is no terminal."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    capsys.readouterr()
    status = main(["chat", str(model), *arguments])
    streams = capsys.readouterr()
    return status, streams.out, streams.err


def test_a_pipe_gets_answers_and_nothing_else(monkeypatch, capsys):
    options = ("--image", SCENE, "--dtype", "float32", "--device", "cpu", "--attn-implementation", "eager")
    assert piped(monkeypatch, capsys, f"{COUNT}\n\n{THREE}", *options, "--temperature", "0") == (0, "5\nno\n", "")
    turns = f"{COUNT}\n/image {SCENE}\n{COUNT}\n/clear\n{COUNT}\n/image '{SCENE}' {SCENE}\n\n/exit\n{COUNT}\n"
    status, out, err = piped(monkeypatch, capsys, turns)
    assert (status, out.splitlines()[:3], len(out.splitlines()), err) == (0, ["0", "5", "0"], 4, "")


def test_the_first_error_in_a_pipe_is_one_line_and_the_exit_status(monkeypatch, capsys, tmp_path):
    def error(status, *arguments, lines=f"{COUNT}\n", model=CHECKPOINT):
        observed, out, err = piped(monkeypatch, capsys, lines, *arguments, model=model)
        assert (observed, out, err.count("\n")) == (status, "", 1)
        return err

    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    assert "There is no image 'nowhere.png'" in error(1, "--image", "nowhere.png")
    assert "text.png' cannot be read: it is in none of the formats PNG, " in error(
        1, "--image", str(tmp_path / "text.png")
    )
    assert "There is no image 'a b.png'" in error(1, lines=f"/image 'a b.png'\n{COUNT}\n")
    assert "/photo is not a command" in error(2, lines="/photo\n")
    assert "/image needs the path" in error(2, lines="/image\n")
    assert "MODEL './nowhere' is not a folder" in error(1, model="./nowhere")
    assert "model_type 'llava'" in error(2, model=tmp_path)
    assert "device 'cuda:99' cannot be used here, expected auto or cpu" in error(2, "--device", "cuda:99")
    assert "attn_implementation" in error(2, "--attn-implementation", "nonsense")


@pytest.mark.parametrize("option", [("--max-new-tokens", "0"), ("--temperature", "-1"), ("--temperature", "hot")])
def test_numbers_out_of_range_are_refused(capsys, option):
    with pytest.raises(SystemExit) as stopped:
        main(["chat", str(CHECKPOINT), *option])
    assert stopped.value.code == 2 and f"argument {option[0]}: expected" in capsys.readouterr().err


class Person:
    """Sits at a terminal with `saisa chat` running in it."""

    def __init__(self, *arguments):
        self.terminal, child = pty.openpty()
        environment = {**os.environ, "TERM": "dumb", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "saisa_hf", "chat", *arguments]
        files = dict.fromkeys(("stdin", "stdout", "stderr"), child)
        # a session of its own, whose terminal this is: Ctrl-C reaches it as it does a person's
        self.process = subprocess.Popen(
            command, env=environment, start_new_session=True, preexec_fn=_own_terminal, **files
        )
        os.close(child)

    def sees(self, pattern, seconds=120):
        """What has been written up to `pattern`."""
        text, end = "", time.monotonic() + seconds
        while not re.search(pattern, text):
            assert select.select([self.terminal], [], [], max(0, end - time.monotonic()))[0], (
                f"{pattern!r} not in {text!r}"
            )
            text += os.read(self.terminal, 4096).decode()
        return text.replace("\r\n", "\n")

    def types(self, text):
        os.write(self.terminal, text.encode())


def _own_terminal():
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # who runs the tests in the background has had it ignored


def test_a_person_asks_stops_an_answer_and_goes_on(tmp_path):
    endless = tmp_path / "endless"  # the same model, which no token stops
    shutil.copytree(CHECKPOINT, endless)
    config = json.loads((endless / "generation_config.json").read_text())
    (endless / "generation_config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    person = Person(str(endless), "--max-new-tokens", "100000", "--image", SCENE)
    try:
        assert f"({SCENE}, 72 x 72, goes with the next question)" in person.sees(r"\n> $")
        person.types(f"{COUNT}\n")
        person.sees(r"\n5 \w+")
        person.types("\x03")
        assert "(stopped)" in person.sees(r"\n> $")
        person.types("/image nowhere.png\n")
        assert "error: There is no image 'nowhere.png'." in person.sees(r"\n> $")
        person.types(f"{THREE}\n")
        person.sees(r"\nno \w+")
        person.types("\x03")
        assert "(stopped)" in person.sees(r"\n> $")
        person.types("half a quest")
        person.sees("half a quest$")
        for attempt in range(5):  # Python's readline may miss a signal, and a person presses again
            person.types("\x03")
            try:
                assert "(/exit or Ctrl-D leaves)" in person.sees(r"\n> $", seconds=10 if attempt < 4 else 60)
                break
            except AssertionError:
                assert attempt < 4
        person.types("\x04")
        assert person.process.wait(30) == 0
    finally:
        person.process.kill()
        os.close(person.terminal)
