# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Language models in GGUF files become a SAISA: weights, tokenizer, special tokens and answers are those in the file."""

import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from test_build import ask, encoder, image_processor, quietly
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from saisa_hf import SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.checkpoints.gguf import gguf_model, gguf_tokenizer
from saisa_hf.cli import main


SPECIAL = ["<unk>", "<|im_start|>", "<|im_end|>"]
SIZES = {"block_count": 2, "embedding_length": 32, "feed_forward_length": 64}
HEADS, KV_HEADS = 4, 2
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_gguf(path, seed=0, tied=True, adds_bos=None, without=()):
    """A Llama of two layers, its matrices quantized to 8 bits, with a tokenizer of bytes; `without` some tensors."""
    rng = np.random.default_rng(seed)
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet()), "ab", "abc"]
    width, inner, layers = SIZES["embedding_length"], SIZES["feed_forward_length"], SIZES["block_count"]
    writer = gguf.GGUFWriter(str(path), "llama")
    for name, value in SIZES.items():
        getattr(writer, f"add_{name}")(value)
    writer.add_context_length(128)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(width // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (len(tokens) - len(SPECIAL))
    )
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    if adds_bos is not None:
        writer.add_add_bos_token(adds_bos)
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    if not tied:
        shapes["output"] = (len(tokens), width)
    for layer in range(layers):
        shapes |= {f"blk.{layer}.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
        shapes |= {f"blk.{layer}.{name}": (width, width) for name in ("attn_q", "attn_output")}
        shapes |= {f"blk.{layer}.{name}": (width * KV_HEADS // HEADS, width) for name in ("attn_k", "attn_v")}
        shapes |= {f"blk.{layer}.{name}": (inner, width) for name in ("ffn_gate", "ffn_up")}
        shapes[f"blk.{layer}.ffn_down"] = (width, inner)
    for name, shape in shapes.items():
        if name in without:
            continue
        values = rng.normal(size=shape).astype(np.float32) * 0.5
        kind = gguf.GGMLQuantizationType.Q8_0 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    (folder / "lm").mkdir()
    write_gguf(folder / "lm" / "tiny.Q8_0.gguf")
    encoder().save_pretrained(folder / "vision")
    image_processor(8).save_pretrained(folder / "vision")
    return folder / "lm", folder / "vision"


@pytest.fixture(scope="module")
def built(parts, tmp_path_factory):
    return quietly(*parts, tmp_path_factory.mktemp("built") / "saisa")


def test_on_text_alone_it_is_the_language_model_of_the_file(parts, built):
    theirs = AutoModelForCausalLM.from_pretrained(parts[0], gguf_file="tiny.Q8_0.gguf").eval()
    model = SaisaForConditionalGeneration.from_pretrained(built)
    ids = torch.tensor([[1, 40, 41, 42, 2, 50], [1, 9, 8, 7, 6, 5]])
    assert torch.equal(model(input_ids=ids).logits[..., : len(theirs.lm_head.weight)], theirs(input_ids=ids).logits)
    greedy = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, **greedy), theirs.generate(ids, **greedy))
    assert "quantization_config" not in model.config.text_config.to_dict() and not getattr(model, "is_quantized", False)


def test_tokens_and_special_tokens_are_those_of_the_file(parts, built):
    tokenizer = SaisaProcessor.from_pretrained(built).tokenizer
    theirs = AutoTokenizer.from_pretrained(parts[0], gguf_file="tiny.Q8_0.gguf")
    text = "<|im_start|>user\nabc déjà 123<|im_end|>\n"
    assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )


def test_it_answers_about_an_image_in_its_own_chat_form(built):
    model, processor, inputs, written = ask(built, "abc")
    text = processor.tokenizer.decode(inputs["input_ids"][0])
    assert text.startswith("<|im_start|>user\n<image>") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert written.shape[1] == inputs["input_ids"].shape[1] + 3
    assert model.generation_config.eos_token_id == 2


def test_the_file_itself_may_be_named_and_another_dtype(parts, tmp_path):
    file = parts[0] / "tiny.Q8_0.gguf"
    assert main(["build", str(file), str(parts[1]), str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    model = SaisaForConditionalGeneration.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == torch.bfloat16
    wanted = gguf_model(file, torch.bfloat16).state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(model.language_model.layers[0].mlp.up_proj.weight, wanted)


def test_what_cannot_be_meant_is_refused(parts, tmp_path, monkeypatch):
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(parts[0] / "tiny.Q8_0.gguf", tmp_path / name)
    with pytest.raises(ValueError, match=r"2 GGUF files, a\.gguf, b\.gguf: expected one, or the path of one"):
        quietly(tmp_path, parts[1], tmp_path / "out")
    (tmp_path / "b.gguf").unlink()
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + b"\1" * 40)
    with pytest.raises(ValueError, match=r"^/.*/a\.gguf(: | is )"):
        quietly(tmp_path, parts[1], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"missing\.gguf"):
        quietly(tmp_path / "missing.gguf", parts[1], tmp_path / "out")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"reading tiny\.Q8_0\.gguf needs gguf: pip install gguf"):
        gguf_tokenizer(parts[0] / "tiny.Q8_0.gguf")
    assert not (tmp_path / "out").exists()


def same_weights(one, other):
    return all(torch.equal(x, y) for x, y in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def test_the_file_is_read_whatever_has_its_name_or_lies_beside_it(parts, tmp_path, monkeypatch):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    file, same_name = Path(shutil.copy(parts[0] / "tiny.Q8_0.gguf", tmp_path)), theirs / "tiny.Q8_0.gguf"
    wanted, tokenizer = gguf_model(file), gguf_tokenizer(file)
    write_gguf(same_name, seed=1)
    assert not same_weights(gguf_model(same_name), wanted)
    monkeypatch.chdir(theirs)  # where transformers would find a file of that name first
    assert same_weights(gguf_model(file), wanted)
    other = gguf_tokenizer(same_name)
    other.chat_template = "of another tokenizer"
    other.add_tokens(["another"])
    other.save_pretrained(tmp_path)
    found = gguf_tokenizer(file)
    assert len(found) == len(tokenizer) and found.chat_template == TEMPLATE
    assert same_weights(gguf_model(Path("tiny.Q8_0.gguf")), gguf_model(same_name))


@pytest.mark.parametrize("adds_bos", [True, False])
def test_the_head_and_the_first_token_are_as_the_file_says(parts, tmp_path, adds_bos):
    file = write_gguf(tmp_path / "UNTIED.GGUF", tied=False, adds_bos=adds_bos)
    model, tokenizer = gguf_model(file), gguf_tokenizer(file)
    assert not model.config.tie_word_embeddings and not torch.equal(
        model.lm_head.weight, model.model.embed_tokens.weight
    )
    assert tokenizer("abc")["input_ids"][:-1] == [1] * adds_bos
    if adds_bos:
        return
    for number, source in enumerate((file, tmp_path)):  # the ending may be in capitals
        built = quietly(source, parts[1], tmp_path / f"out-{number}")
        saisa = SaisaForConditionalGeneration.from_pretrained(built)
        assert torch.equal(saisa.lm_head.weight[: len(model.lm_head.weight)], model.lm_head.weight)
        assert SaisaProcessor.from_pretrained(built).tokenizer("abc")["input_ids"] == tokenizer("abc")["input_ids"]


def test_a_file_that_lacks_tensors_is_never_filled_with_random_ones(parts, tmp_path):
    file = write_gguf(tmp_path / "half.gguf", without=("blk.1.ffn_up", "blk.0.attn_q"))
    with pytest.raises(
        ValueError, match=r"half\.gguf lacks 2 of the tensors of a llama: model\.layers\.0\.self_attn\.q"
    ):
        quietly(file, parts[1], tmp_path / "out")
    (tmp_path / "split").mkdir()
    for number in (1, 2):
        part = Path(shutil.copy(parts[0] / "tiny.Q8_0.gguf", tmp_path / f"split/m-0000{number}-of-00002.gguf"))
    for source in (part, part.parent):
        with pytest.raises(ValueError, match=r"-of-00002\.gguf is one part of several.*llama-gguf-split --merge"):
            quietly(source, parts[1], tmp_path / "out")
    for given in (None, b"x", tmp_path / "no.gguf"):
        message = (
            "text_model is a (NoneType|bytes): expected" if not isinstance(given, Path) else r"no\.gguf is missing"
        )
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            SaisaForConditionalGeneration.from_parts(given, parts[1])
    with pytest.raises(FileNotFoundError, match=r"VISION_MODEL .*half\.gguf' is a file: expected a folder"):
        quietly(parts[0], file, tmp_path / "out")


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads_bit_for_bit(tmp_path):
    """The trained model of 30 layers, from its package."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    import real_parts

    language_model, vision = real_parts.install(tmp_path)
    (file,) = language_model.glob("*.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(language_model, gguf_file=file.name).eval()
    built = quietly(
        language_model, vision, tmp_path / "saisa", vision_feature_layer=-1, vision_feature_select_strategy="full"
    )
    model = SaisaForConditionalGeneration.from_pretrained(built)
    processor = SaisaProcessor.from_pretrained(built)
    chat = [{"role": "user", "content": [{"type": "text", "text": "What is the capital of France?"}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = inputs["input_ids"]
    with torch.no_grad():
        logits = model(**inputs).logits
    assert torch.equal(logits[..., :49152], theirs(input_ids=ids).logits)
    written = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    assert torch.equal(written, theirs.generate(ids, max_new_tokens=24, do_sample=False))
    assert "Paris" in processor.decode(written[0, ids.shape[1] :])
