"""What the vLLM plug-in refuses by the settings of an engine, and the ids that its renderer makes. No engine is started."""

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest


pytest.importorskip("vllm")
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

import vllm_parts as parts
from vllm import SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.renderers.params import ChatParams, TokenizeParams
from vllm.renderers.registry import renderer_from_config

from saisa_hf import SaisaProcessor
from saisa_hf.processing_saisa import add_image_token
from saisa_hf.serving.vllm import registration
from saisa_hf.serving.vllm.processor import _one_per_image
from saisa_hf.serving.vllm.refusals import SaisaChecks


REFERENCE = Path(__file__).parent / "fixtures" / "reference"
OPTIONS = {"dtype": "float32", "max_model_len": 256, "enforce_eager": True, "limit_mm_per_prompt": {"image": 4}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return parts.make_checkpoint(tmp_path_factory.mktemp("llama"))


def engine_config(checkpoint, **options):
    return EngineArgs(model=checkpoint, **OPTIONS | options).create_engine_config()


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"leading_text_skips_attention": True}, r"leading_text_skips_attention=True: .*all text attend"),
        ({"visual_layers": [0, 2]}, r"visual_layers=\[0, 2\]: .*cannot hide visual ones.*transformers serve"),
        ({"alignment": "embedding_space"}, 'alignment="embedding_space"'),
        ({"image_grid_pinpoints": [[32, 64], [64, 32]]}, "image_grid_pinpoints, images in tiles: .*transformers serve"),
    ],
)
def test_models_that_no_paged_kernel_runs_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        engine_config(parts.make_checkpoint(tmp_path, **settings))


def test_visual_layers_that_name_all_layers_are_taken(tmp_path):
    assert (
        engine_config(parts.make_checkpoint(tmp_path, visual_layers=[2, 0, 1])).model_config.tokenizer_mode == "saisa"
    )


def test_language_models_without_a_decoder_of_vllm_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'olmo2': vLLM has no decoder of its own .*olmo2, smollm3"):
        engine_config(parts.make_checkpoint(tmp_path, "olmo2"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 100.0}},
            "'dynamic'.*longest possible",
        ),
    ],
)
def test_rotations_that_depend_on_the_sequence_are_refused(checkpoint, tmp_path, change, message):
    shutil.copytree(checkpoint, tmp_path / "changed")
    path = tmp_path / "changed" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"] |= change
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        engine_config(str(tmp_path / "changed"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"enable_lora": True}, "LoRA adapters: merge the adapter"),
        (
            {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}},
            "speculative decoding",
        ),
        ({"pipeline_parallel_size": 2}, "pipeline_parallel_size=2"),
        (
            {"kv_transfer_config": {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}},
            r"KV connector \(kv_transfer_config\)",
        ),
        ({"quantization": "bitsandbytes"}, "quantization='bitsandbytes'"),
        ({"quantization": "experts_int8"}, "quantization='experts_int8'"),
        ({"mm_encoder_only": True}, "mm_encoder_only=True"),
        ({"cpu_offload_gb": 1}, "offloading of weights"),
        ({"runner": "pooling"}, "runner='pooling'"),
        ({"enable_prompt_embeds": True}, "enable_prompt_embeds=True"),
        ({"enable_mm_embeds": True}, "enable_mm_embeds=True"),
        ({"kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill=True"),
    ],
)
def test_settings_that_do_not_go_with_visual_keys_are_refused(checkpoint, options, message):
    with pytest.raises((ValueError, NotImplementedError), match=message):
        engine_config(checkpoint, **options)


@pytest.mark.parametrize("runner", ["0", "1"])
def test_both_model_runners_refuse_log_probabilities_of_prompts(checkpoint, monkeypatch, runner):
    from vllm.v1.sample.logits_processor import validate_logits_processors_parameters
    from vllm.v1.worker.gpu.sample.logits_processor import build_custom_logits_processors_params_validator

    config = engine_config(checkpoint)
    config.model_config.logits_processors = None
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)  # without Triton vLLM makes no such config
    SaisaChecks.verify_and_update_config(config)
    assert config.use_v2_model_runner == (runner == "1")
    if config.use_v2_model_runner:
        validate = build_custom_logits_processors_params_validator(config.model_config.logits_processors)
    else:
        validate = partial(validate_logits_processors_parameters, config.model_config.logits_processors)
    validate(SamplingParams(logprobs=2))
    with pytest.raises((ValueError, VLLMValidationError), match="prompt_logprobs=2"):
        validate(SamplingParams(prompt_logprobs=2))


def test_a_vllm_that_was_not_tested_is_named_with_the_versions_that_were():
    assert registration.problem_with("0.32.0") is None and registration.problem_with("0.32.1+cpu") is None
    for version in ("0.31.4", "0.33.0", "1.0.0"):
        problem = registration.problem_with(version)
        assert version in problem and "0.32" in problem


def test_an_untested_vllm_refuses_when_it_reads_a_saisa_checkpoint(checkpoint):
    code = (
        "import sys, vllm; vllm.__version__ = '0.99.0'\n"
        "from saisa_hf.serving.vllm import registration; registration.register()\n"
        "from vllm.transformers_utils.config import get_config; get_config(sys.argv[1], trust_remote_code=False)"
    )
    done = subprocess.run([sys.executable, "-c", code, checkpoint], capture_output=True, text=True, timeout=600)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and last.startswith("RuntimeError: saisa_hf") and "0.32" in last and "0.99.0" in last


# --- prompts ----------------------------------------------------------------------------------------------------------

TEXTS = [
    "what is in the image",
    " what",
    "<image>\nwhat is red",
    "<image> what is red",
    "what <image>  is <image><image>red",
    "a <image> \n b </s> c",
    "",
]


def rendered(renderer, text, images=0, **kwargs):
    return renderer._tokenize_prompt({"prompt": text}, TokenizeParams(max_total_tokens=None, **kwargs))[
        "prompt_token_ids"
    ]


@pytest.fixture(scope="module")
def renderer(checkpoint):
    return renderer_from_config(engine_config(checkpoint))


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("specials", [True, False])
def test_texts_become_the_ids_that_the_processor_makes(renderer, checkpoint, text, specials):
    processor = SaisaProcessor.from_pretrained(checkpoint)
    images = parts.pictures(text.count("<image>"))
    expected = processor(text=text, images=images or None, add_special_tokens=specials)["input_ids"][0]
    found = rendered(renderer, text, add_special_tokens=specials)
    token, each = processor.image_token_id, 16
    expanded = [one for i in found for one in [i] * (each if i == token else 1)]
    assert expanded == expected


def test_sentencepiece_texts_become_the_ids_that_the_processor_makes(checkpoint, tmp_path):
    """Llama's tokenizer puts a space in front of every stretch of text, as the authors' code has it."""
    pytest.importorskip("sentencepiece")
    from transformers import LlamaTokenizerFast

    shutil.copytree(checkpoint, tmp_path / "llama")
    tokenizer = LlamaTokenizerFast.from_pretrained(REFERENCE / "tokenizer")
    add_image_token(tokenizer)
    tokenizer.pad_token = "<unk>"
    old = SaisaProcessor.from_pretrained(checkpoint)
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    SaisaProcessor(old.image_processor, tokenizer, **settings).save_pretrained(tmp_path / "llama")
    path = tmp_path / "llama" / "config.json"
    config = json.loads(path.read_text())
    config["text_config"]["vocab_size"] = len(tokenizer)
    config["image_token_id"] = tokenizer.convert_tokens_to_ids("<image>")
    path.write_text(json.dumps(config))
    processor = SaisaProcessor.from_pretrained(tmp_path / "llama")
    renderer = renderer_from_config(engine_config(str(tmp_path / "llama")))
    differs = False
    for text in TEXTS:
        units, options = processor._units([1] * text.count("<image>")), {"return_mm_token_type_ids": False}
        expected = processor._tokenize([text], units, {"<image>"}, options)
        found = rendered(renderer, text)
        assert found == expected["input_ids"][0], text
        differs |= found != processor.tokenizer(text)["input_ids"]
    assert differs  # tokenized whole, some would be others


def test_a_chat_without_a_bos_of_its_own_gets_one(renderer, checkpoint):
    processor = SaisaProcessor.from_pretrained(checkpoint)
    chat = [{"role": "user", "content": "what is red"}]
    _, prompt = renderer.render_messages(
        chat, ChatParams(chat_template_kwargs={"add_generation_prompt": True, "tokenize": False})
    )
    expected = processor.apply_chat_template(chat, tokenize=True, add_generation_prompt=True)[0]
    assert prompt["prompt_token_ids"] == expected and expected[0] == renderer.tokenizer.bos_token_id


def ask(renderer, images, **extra):
    prompt = {"prompt_token_ids": rendered(renderer, "<image> is red"), "multi_modal_data": {"image": images}, **extra}
    return renderer._process_tokens(prompt)


def test_a_request_cannot_change_the_processor(renderer):
    assert len(ask(renderer, parts.pictures(1))["prompt_token_ids"]) > 16
    with pytest.raises(ValueError, match=r"mm_processor_kwargs in a request \(image_seq_length\)"):
        ask(renderer, parts.pictures(1), mm_processor_kwargs={"image_seq_length": 90})


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("processor_config.json", {"image_seq_length": 90}, "90 placeholders .* 16 visual tokens"),
        (
            "preprocessor_config.json",
            {"size": {"height": 40, "width": 40}},
            "40 x 40 pixels, but clip_vision_model takes 32",
        ),
    ],
)
def test_a_processor_that_does_not_fit_the_encoder_is_refused_by_request(checkpoint, tmp_path, name, change, message):
    """In the server, not in the engine, which would stop."""
    shutil.copytree(checkpoint, tmp_path / "changed")
    path = tmp_path / "changed" / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        ask(renderer_from_config(engine_config(str(tmp_path / "changed"))), parts.pictures(1))


def test_placeholders_are_taken_back_image_by_image():
    assert _one_per_image([1, 9, 9, 9, 9, 9, 5, 9], 9, [2, 3, 1]) == [1, 9, 9, 5, 9]
    with pytest.raises(ValueError, match="do not fill one after the other"):
        _one_per_image([1, 9, 5, 9, 9], 9, [2, 1])
