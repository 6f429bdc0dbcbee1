"""`saisa fit` against what real loads and a real generation hold in memory."""

import importlib.util
import json

import pytest
import torch
import transformers
from tiny_models import randomize
from transformers import BitsAndBytesConfig

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration
from saisa_hf.bench.measure import peak_memory
from saisa_hf.cli import main
from saisa_hf.costs.family import MEMBERS
from saisa_hf.costs.memory import WAYS, bytes_of, fit, use_bytes, weight_bytes


pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="the same on every release: runs under 5.x")


SIZES = {"hidden_size": 256, "intermediate_size": 640, "num_hidden_layers": 4, "num_attention_heads": 4}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
OPTIONS = dict(zip(WAYS, (None, None, {"load_in_8bit": True}, NF4, NF4 | {"bnb_4bit_use_double_quant": True})))


@pytest.fixture(scope="module")
def config():
    text = {"model_type": "llama", "vocab_size": 2000, "num_key_value_heads": 2, "eos_token_id": None, **SIZES}
    vision = {"model_type": "clip_vision_model", "image_size": 224, "patch_size": 14, **SIZES}
    return SaisaConfig(text_config=text, vision_config=vision, image_token_id=1999)


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    randomize(SaisaForConditionalGeneration(config)).save_pretrained(folder)
    return folder


def load(folder, way):
    quantization = OPTIONS[way] and BitsAndBytesConfig(**OPTIONS[way])
    given = {} if quantization is None else {"quantization_config": quantization}
    return SaisaForConditionalGeneration.from_pretrained(folder, dtype=WAYS[way][0], **given).eval()


@pytest.mark.parametrize("way", WAYS)
def test_weights_take_what_was_told(config, folder, way):
    if OPTIONS[way] is not None and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("needs bitsandbytes")
    held = [x for x in load(folder, way).state_dict().values() if isinstance(x, torch.Tensor)]
    assert weight_bytes(config, way) == pytest.approx(sum(x.numel() * x.element_size() for x in held), rel=0.01)


@pytest.mark.parametrize(("text", "images"), [(600, 0), (40, 4), (600, 2)])
def test_a_generation_takes_what_was_told(config, folder, text, images):
    model = load(folder, "float32")
    ids = torch.randint(3, 1900, (1, text))
    ids = torch.cat([ids[:, :1], torch.full((1, images * config.image_seq_length), 1999), ids[:, 1:]], 1)
    given = {"input_ids": ids} | ({"pixel_values": torch.randn(images, 3, 224, 224)} if images else {})
    peak = peak_memory(lambda: model.generate(**given, max_new_tokens=4, do_sample=False), "cpu")
    told = use_bytes(config, "float32", text, images, generated=4)
    weights = weight_bytes(config, "float32")
    assert weights + sum(told.values()) == pytest.approx(weights + peak, rel=0.1)


def test_the_encoder_works_on_all_patches_however_few_tokens_are_left(config):
    few = SaisaConfig.from_dict(config.to_dict(), visual_token_reduction="resampler", reduced_visual_tokens=4)
    assert few.image_seq_length == 4 < config.image_seq_length
    whole, reduced = (use_bytes(one, "float32", 10, 8) for one in (config, few))
    assert sum(whole.values()) >= reduced["work"] + reduced["cache"] >= 0.5 * sum(whole.values())


def test_what_fits_by_the_largest_numbers_fits_and_no_more(config):
    memory = weight_bytes(config, "bfloat16") + 2**23
    one = next(one for one in fit(config, memory, text=100, images=1, generated=8) if one["way"] == "bfloat16")
    assert one["fits"] and one["largest_text"] > 100 and one["largest_images"] > 1

    def need(text, images):
        return one["weights"] + sum(use_bytes(config, "bfloat16", text, images, 8).values())

    assert need(one["largest_text"], 1) <= memory < need(one["largest_text"] + 1, 1)
    assert need(100, one["largest_images"]) <= memory < need(100, one["largest_images"] + 1)


def test_the_command_names_the_most_precise_way(capsys):
    assert main(["fit", "vicuna-7b", "--gpu-memory", "8GiB"]) == 0
    assert "The most precise that fits into 7.50 GiB: 4-bit (nf4)." in capsys.readouterr().out
    assert main(["fit", "vicuna-7b", "--gpu-memory", "4GB", "--json"]) == 0
    assert not any(one["fits"] for one in json.loads(capsys.readouterr().out))
    for text, longer in ((4096 - 576 - 8, False), (4096 - 576 - 7, True)):
        assert main(["fit", "vicuna-7b", "--gpu-memory", "80GB", "--text", str(text), "--generate", "8"]) == 0
        assert ("longer than the model has positions for" in capsys.readouterr().out) is longer
    assert main(["fit", "vicuna-7b", "--gpu-memory", "4GB"]) == 0
    assert "None of them fits into" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text", ["", "8 apples", "GiB", "1.2.3GB", "-1GB", "8", "8.5", "8I", "9" * 400 + "GB", "nanGB"]
)
def test_a_size_that_is_none_is_refused(text, capsys):
    assert main(["fit", "vicuna-7b", f"--gpu-memory={text}"]) == 2
    assert "expected a number with a unit, such as 8GiB" in capsys.readouterr().err


def test_sizes_are_read_with_decimal_and_binary_units():
    assert [bytes_of(x) for x in ("8GiB", "8 gb", "0.5k", "12b", "0")] == [2**33, 8 * 10**9, 500, 12, 0]


def test_a_memory_of_which_nothing_is_left_is_refused(capsys):
    assert main(["fit", "vicuna-7b", "--gpu-memory", "8MB"]) == 2
    assert "--gpu-memory 8MB: nothing is left of it beside --reserve 512MiB" in capsys.readouterr().err
    assert main(["fit", "vicuna-7b", "--gpu-memory", "8GB", "--reserve", "1"]) == 2
    assert "--reserve '1' is not a size of memory" in capsys.readouterr().err


def test_a_member_of_the_family_fits_by_its_own_cache(capsys):
    found = {}
    for name in MEMBERS:
        arguments = ["fit", "vicuna-7b", "--gpu-memory", "80GiB", "--text", "64", "--member", name]
        assert main([*arguments, "--json"]) == 0
        found[name] = json.loads(capsys.readouterr().out)[0]["cache"]
        assert main(arguments) == 0
        cells = next(line for line in capsys.readouterr().out.splitlines() if "float32" in line).split("|")
        assert float(cells[3]) == round(found[name] / 2**30, 2)
    seen = found.pop("vica")
    assert len(set(found.values())) == 1 and found["llava"] > 1.9 * seen
