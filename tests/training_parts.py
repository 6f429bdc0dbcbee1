"""A tokenizer whose tokens are characters, pictures, conversations about them, and runs that train on these: what the tests
of training share."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_models import tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, CLIPImageProcessor, PreTrainedTokenizerFast, TrainerCallback

from saisa_hf import SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.chat.templates import chat_template
from saisa_hf.processing_saisa import add_image_token
from saisa_hf.training import SaisaTrainer


SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end_of_text|>"]
SIDE, TOKENS = 8, 4  # of a picture: pixels, and visual tokens


def character_tokenizer():
    """Each printable character is a token, and so is each of `SPECIAL` and `<image>`."""
    letters = ["\n", *(chr(c) for c in range(32, 127) if chr(c) not in "~`{}^\\")]  # 97 tokens with <image>, the last
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *letters])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [AddedToken(token, normalized=False) for token in SPECIAL[3:]]}
    )
    add_image_token(tokenizer)
    return tokenizer


def processor_for(template="vicuna", tokenizer=None, **options):
    """A processor of pictures of four visual tokens. `template`: a packaged name, or Jinja source."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, do_center_crop=True
    )
    source = template if "{" in template else chat_template(template)
    tokenizer = character_tokenizer() if tokenizer is None else tokenizer
    return SaisaProcessor(image_processor, tokenizer, image_seq_length=TOKENS, chat_template=source, **options)


def picture(value=0):
    """A grey picture, which is not a square."""
    return Image.fromarray(np.full((SIDE, SIDE + 4, 3), value, dtype=np.uint8))


def conversation(*turns, image=None):
    """A record in LLaVA's form: questions and answers in turn."""
    said = [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]
    return {"conversations": said} | ({} if image is None else {"image": image})


def write_start(folder):
    """Puts a tiny untrained model of one projector, twelve samples and their pictures into `folder`."""
    tiny_model(projector_sharing="shared").save_pretrained(folder / "model")
    processor_for().save_pretrained(folder / "model")
    for i in range(12):
        picture(20 * i).save(folder / f"{i}.png")
    records = [
        conversation("<image>\nA?", "Yes." * (1 + i % 3), "B?", "No.", image=f"{i}.png") if i % 4 else
        conversation("C?", "Z." if i == 8 else "Y.")
        for i in range(12)
    ]  # fmt: skip
    (folder / "q.json").write_text(json.dumps(records))
    return folder


def run_options(start, output, **changes):
    """Options of a short run from the folder `start`, as `write_start` makes it."""
    given = {
        "model": str(start / "model"), "data": str(start / "q.json"), "output": str(output), "batch_size": 4,
        "per_device_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "save_steps": 2, "save_total_limit": 0,
        "logging_steps": 1, "workers": 0, "device": "cpu", "unshare_projectors": True,
    }  # fmt: skip
    return given | changes


# Adam divides by the size of gradients, so that it makes large differences of rounding where they are almost zero
PLAIN = {"optimizer": "sgd", "learning_rate": 0.05, "save_steps": 0}


def reports(folder, *what):
    """What a run reported of each of `what`, step by step."""
    history = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: tuple(entry[name] for name in what) for entry in history if "loss" in entry}


def losses(folder):
    """The losses of a run by their steps."""
    return {step: loss for step, (loss,) in reports(folder, "loss").items()}


def distance(one, other):
    """The largest difference of a weight of the models in two folders."""
    one, other = (SaisaForConditionalGeneration.from_pretrained(path).state_dict() for path in (one, other))
    assert one.keys() == other.keys()
    return max(torch.dist(one[name].float(), other[name].float(), torch.inf).item() for name in one)


def stop_after(steps, monkeypatch):
    """From here on a run is told to stop, by a signal, in the step that follows so many."""

    class Stopper(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == steps:
                os.kill(os.getpid(), signal.SIGTERM)

    init = SaisaTrainer.__init__

    def with_stopper(self, *args, **kwargs):
        init(self, *args, **kwargs, callbacks=[Stopper()])

    monkeypatch.setattr(SaisaTrainer, "__init__", with_stopper)
