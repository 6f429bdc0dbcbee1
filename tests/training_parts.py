"""A tokenizer whose tokens are characters, pictures, and conversations about them: what the tests of training share."""

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AddedToken, CLIPImageProcessor, PreTrainedTokenizerFast

from saisa_hf import SaisaProcessor
from saisa_hf.chat_templates import chat_template
from saisa_hf.processing_saisa import add_image_token


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
