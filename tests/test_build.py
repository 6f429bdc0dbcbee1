"""`from_parts` and `saisa build`: a language model and an encoder as they are, with new projectors between them."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from remote_families import run
from safetensors.torch import load_file, save_file
from test_remote_code import OTHER_PYTHON
from test_text_only import eager_without_sdpa, text_prompts
from tiny_models import (
    IMAGE_TOKEN,
    OTHER_VISION_CONFIGS,
    TEXT_CONFIGS,
    VISION_CONFIGS,
    VOCAB_SIZE,
    prompts_from_rows,
    randomize,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    ConvNextConfig,
    Dinov2WithRegistersConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    TimmWrapperConfig,
)
from transformers.utils.chat_template_utils import render_jinja_template

import saisa_hf.checkpoints.build as build_module
from saisa_hf import SaisaForConditionalGeneration
from saisa_hf.chat.templates import chat_template, with_pictures
from saisa_hf.checkpoints.build import build, prepare_tokenizer
from saisa_hf.checkpoints.names import checkpoint_state_dict
from saisa_hf.cli import main
from saisa_hf.language_models_saisa import FAMILIES


NEW_FAMILIES = ["gemma2", "gemma3", "granite", "mixtral", "olmo2", "phi3", "qwen3_moe", "smollm3"]
FAMILY_NAMES = ["llama", "mistral_window", "qwen2", "qwen3", *NEW_FAMILIES]


def language_model(name="qwen3", dtype=torch.float32):
    implementation = eager_without_sdpa(name)
    model = AutoModelForCausalLM.from_config(TEXT_CONFIGS[name](), attn_implementation=implementation)
    return randomize(model, seed=1).to(dtype).eval()


def encoder(name="clip"):
    return randomize(AutoModel.from_config((VISION_CONFIGS | OTHER_VISION_CONFIGS)[name]()), seed=2).eval()


def from_parts(text="qwen3", vision="clip", **arguments):
    parts = language_model(text), encoder(vision)
    return SaisaForConditionalGeneration.from_parts(*parts, **arguments), *parts


# --- from_parts -------------------------------------------------------------------------------------------------------


def test_there_is_a_case_for_every_family():
    assert {TEXT_CONFIGS[name]().model_type for name in FAMILY_NAMES} == set(FAMILIES)


@pytest.mark.parametrize("text", FAMILY_NAMES)
def test_on_text_alone_it_is_its_language_model_and_stays_so_when_saved(text, tmp_path):
    model, theirs, tower = from_parts(text)
    mine = model.language_model.state_dict()
    for name, weight in checkpoint_state_dict(theirs.model).items():
        assert torch.equal(mine[name][: len(weight)], weight), name
        assert len(mine[name]) == len(weight) + (name == "embed_tokens.weight")
    assert torch.equal(model.lm_head.weight[:-1], theirs.lm_head.weight)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == model.config.tie_word_embeddings
    assert sum(p.double().sum() for p in model.vision_tower.parameters()) == sum(
        p.double().sum() for p in tower.parameters()
    )
    model.save_pretrained(tmp_path)
    again, info = SaisaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))

    prompts = text_prompts()
    inputs = {"input_ids": prompts.input_ids, "attention_mask": prompts.attention_mask}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        logits, written = theirs(**inputs).logits, theirs.generate(**inputs, **options)
        for one in (model, again):
            assert (one(**inputs).logits[prompts.text][:, :VOCAB_SIZE] - logits[prompts.text]).abs().max() < 1e-5
            assert torch.equal(one.generate(**inputs, **options), written)

    pictures = prompts_from_rows([[1, 5, "image", 6, 7]])
    pictures.input_ids[pictures.input_ids == IMAGE_TOKEN] = VOCAB_SIZE
    with torch.no_grad():
        one, other = (model(**pictures.inputs | {"pixel_values": x * pictures.pixel_values}).logits for x in (1, -1))
        # not to the last bit: products of few rows, as experts have, round by where their tensors lie in memory
        assert torch.allclose(again(**pictures.inputs).logits, one, rtol=0, atol=1e-5)
    same = torch.isclose(one, other, atol=1e-5).all(-1)  # the text in front of the picture, and the empty visual rows
    assert same[:, :-2].all() and not same[:, -2:].any()


def test_an_image_token_that_the_language_model_has_a_row_for_adds_none():
    model, theirs, _ = from_parts("llama", image_token_id=IMAGE_TOKEN)
    assert model.config.text_config.vocab_size == VOCAB_SIZE and model.generation_config.suppress_tokens is None
    assert torch.equal(model.lm_head.weight, theirs.lm_head.weight)


@pytest.mark.parametrize("text", ["llama", "qwen2"])
def test_a_new_image_token_is_never_the_likeliest_and_never_written(text):
    model, *_ = from_parts(text, image_token_id=VOCAB_SIZE + 2)
    assert model.config.text_config.vocab_size == VOCAB_SIZE + 3
    assert model.generation_config.suppress_tokens == [VOCAB_SIZE, VOCAB_SIZE + 1, VOCAB_SIZE + 2]
    with torch.no_grad():
        logits = model(text_prompts().input_ids).logits
    assert logits.argmax(-1).max() < VOCAB_SIZE
    torch.testing.assert_close(logits[..., -1], logits[..., :VOCAB_SIZE].mean(-1), atol=1e-5, rtol=0)


def test_the_generation_config_is_the_language_models():
    theirs = language_model()
    theirs.generation_config.update(temperature=0.3, do_sample=True, eos_token_id=[5, 7], suppress_tokens=[9])
    model = SaisaForConditionalGeneration.from_parts(theirs, encoder())
    taken = model.generation_config
    assert (taken.temperature, taken.do_sample, taken.eos_token_id) == (0.3, True, [5, 7])
    assert taken.suppress_tokens == [9, VOCAB_SIZE] and theirs.generation_config.suppress_tokens == [9]


@pytest.mark.parametrize("dtype, stored", [(None, torch.bfloat16), ("float16", torch.float16)])
def test_all_of_it_has_the_dtype_of_the_language_model_or_the_one_given(dtype, stored):
    tower = encoder()
    model = SaisaForConditionalGeneration.from_parts(language_model(dtype=torch.bfloat16), tower, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {stored}
    assert {p.dtype for p in tower.parameters()} == {torch.float32}, "the part itself was changed"


def test_projectors_start_as_llavas_do():
    """LLaVA's code leaves PyTorch's own rule: weights and biases uniform in +-1 / sqrt(inputs)."""
    torch.manual_seed(0)
    model, *_ = from_parts("llama", projector_hidden_size=900)
    layers = [layer.visual_projector for layer in model.language_model.layers]
    for linear, inputs in [(layers[0].linear_1, 24), (layers[0].linear_2, 900)]:
        for x in (linear.weight.detach(), linear.bias.detach()):
            bound = 1 / math.sqrt(inputs)
            assert 0.9 * bound < x.abs().max() <= bound
            if x.numel() > 500:
                assert x.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
    assert not torch.equal(layers[0].linear_1.weight, layers[1].linear_1.weight)


@pytest.mark.parametrize("sharing", ["per_layer", "shared"])
def test_settings_of_the_config_are_passed_on(sharing):
    model, *_ = from_parts("llama", vision_feature_layer=[-2, -1], visual_layers=[0, 2], projector_sharing=sharing)
    names = {name.split(".linear")[0] for name in model.state_dict() if "visual_projector" in name}
    layers = {f"model.language_model.layers.{layer}.visual_projector" for layer in (0, 2)}
    assert names == (layers if sharing == "per_layer" else {"model.visual_projector"})
    assert model.config.vision_feature_size == 48


def test_the_parts_may_be_folders_and_the_encoder_may_bring_a_text_tower(tmp_path):
    theirs, whole = language_model("phi3", torch.bfloat16), whole_clip()
    theirs.save_pretrained(tmp_path / "lm"), whole.save_pretrained(tmp_path / "clip")
    model = SaisaForConditionalGeneration.from_parts(tmp_path / "lm", str(tmp_path / "clip"))
    assert torch.equal(model.lm_head.weight[:-1], theirs.lm_head.weight) and model.dtype == torch.bfloat16
    theirs = {
        name.removeprefix("vision_model."): x for name, x in whole.state_dict().items() if "vision_model." in name
    }
    mine = model.vision_tower.state_dict()
    assert len(mine) == len(theirs)
    for name, weight in theirs.items():
        assert torch.equal(mine[f"vision_model.{name}"], weight.bfloat16()), name


def test_the_parts_keep_their_attention_implementations():
    text = AutoModelForCausalLM.from_config(TEXT_CONFIGS["gemma2"](), attn_implementation="eager")
    tower = AutoModel.from_config(VISION_CONFIGS["clip"](), attn_implementation="eager")
    model = SaisaForConditionalGeneration.from_parts(text, tower)
    assert model.config.text_config._attn_implementation == "eager"
    assert model.vision_tower.config._attn_implementation == "eager"


def test_training_reaches_every_part():
    model, *_ = from_parts("gemma3")
    prompts = prompts_from_rows([[1, 5, "image", 6, 7]])
    prompts.input_ids[prompts.input_ids == IMAGE_TOKEN] = VOCAB_SIZE
    labels = prompts.input_ids.masked_fill(prompts.input_ids == VOCAB_SIZE, -100)
    model.train()(**prompts.inputs, labels=labels).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None and "vision_tower" not in name}
    assert not without and model.language_model.layers[0].visual_projector.linear_1.weight.grad.any()


@pytest.mark.slow
def test_every_family_loads_by_remote_code_in_the_other_major_release(tmp_path):
    """Or in this one, where no other is at hand. There its class builds from parts as well."""
    prompts = text_prompts()
    inputs = {"ids": prompts.input_ids, "mask": prompts.attention_mask}
    inputs |= {"prompt": torch.tensor([[1, 5, *[VOCAB_SIZE] * 4, 6, 7]]), "pixels": torch.randn(1, 3, 8, 8)}
    renamed = ["dinov2", "registers", "vit"]  # encoders whose modules have other names in 5.x
    for name in [*NEW_FAMILIES, *renamed]:
        model, *_ = from_parts("qwen3", name) if name in renamed else from_parts(name)
        if name == "gemma2":
            model.set_attn_implementation({"text_config": "eager"})
        model.save_pretrained(tmp_path / name)
        save_file({**inputs, **run(model, inputs)}, tmp_path / f"{name}.safetensors")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PYTHON"))}
    environment = inherited | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [OTHER_PYTHON or sys.executable, str(Path(__file__).with_name("remote_families.py")), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.split() == sorted([*NEW_FAMILIES, *renamed])


def headless():
    return LlamaModel(TEXT_CONFIGS["llama"]())


def foreign():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))


@pytest.mark.parametrize(
    "text, vision, arguments, message",
    [
        (headless, encoder, {}, r"text_model is a LlamaModel, which has no head"),
        (foreign, encoder, {}, r"text_model is a gpt2, which is not supported"),
        (language_model, lambda: whole_clip(), {}, r"vision_model is a CLIPModel.*pass its vision tower"),
        (language_model, encoder, {"text_config": {}}, r"text_config is the parts' own"),
        (language_model, encoder, {"dtype": "int8"}, r"dtype='int8'.*floating"),
        (language_model, encoder, {"vision_feature_layer": 9}, r"vision_feature_layer=9"),
        (language_model, lambda: "/no/such/folder", {}, r"/no/such/folder"),
    ],
)
def test_parts_that_do_not_fit_are_refused(text, vision, arguments, message):
    with pytest.raises((ValueError, OSError), match=message):
        SaisaForConditionalGeneration.from_parts(text(), vision(), **arguments)


# --- saisa build ------------------------------------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{{- bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI_3 = (
    "{% for message in messages %}{% if message['role'] == 'user' and message['content'] %}"
    "{{ '<|user|>\n' + message['content'] + '<|end|>\n' }}{% elif message['role'] == 'assistant' %}"
    "{{ '<|assistant|>\n' + message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
# takes parts, and has words of its own for a picture
PARTS = (
    "{% for message in messages %}{{ message.role + ': ' }}{% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ '<start_of_image>' if part.type == 'image' else part.text }}"
    "{% endfor %}{% endif %}{{ '\n' }}{% endfor %}"
)
TEMPLATES = {"chatml": CHATML, "llama 3": LLAMA_3, "gemma": GEMMA, "phi 3": PHI_3, "parts": PARTS}


def rendered(template, messages, **kwargs):
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    return render_jinja_template(conversations=[messages], chat_template=template, **special, **kwargs)[0][0]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("image_token", ["<image>", "<|image_pad|>", '<"a\'b">'])
def test_a_text_models_template_takes_pictures_and_says_the_same_about_text(name, image_token):
    own, adapted = TEMPLATES[name], with_pictures(TEMPLATES[name], image_token)

    def conversation(question):
        answer = {"role": "assistant", "content": "A dog."}
        return [{"role": "user", "content": question}, answer, {"role": "user", "content": "And now?"}]

    for prompt in (True, False):
        for question in ("Hello", f"{image_token}\nWhat?"):
            wanted = rendered(own, conversation(question), add_generation_prompt=prompt)
            assert rendered(adapted, conversation(question), add_generation_prompt=prompt) == wanted
        parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
        assert rendered(adapted, conversation(parts), add_generation_prompt=prompt) == wanted
    several = [{"type": "text", "text": "this"}, {"type": "image"}, {"type": "image"}, {"type": "text", "text": "that"}]
    assert f"this\n{image_token}\n{image_token}\nthat" in rendered(adapted, conversation(several))


def test_the_named_templates_write_another_image_token_too():
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}]
    for name in ("vicuna", "llama_3", "chatml", "plain"):
        plain, other = (rendered(chat_template(name, token), question) for token in ("<image>", "<|image_pad|>"))
        assert other == plain.replace("<image>", "<|image_pad|>") != plain


def whole_clip():
    vision = VISION_CONFIGS["clip"]().to_dict()
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text |= {"vocab_size": 30, "bos_token_id": 1, "eos_token_id": 2}
    whole = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=16))
    randomize(whole.vision_model, seed=2)
    return whole


def tokenizer(*more, template=CHATML, words=VOCAB_SIZE - 5):
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *[f"word{n}" for n in range(words - 4)]]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=list(more),
    )  # fmt: skip
    fast.chat_template = template
    return fast


def image_processor(side=8):
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def parts_on_disk(folder, text="qwen3", vision=None, side=8, **options):
    language_model(text).save_pretrained(folder / "lm")
    tokenizer(**options).save_pretrained(folder / "lm")
    (vision or encoder()).save_pretrained(folder / "vision")
    image_processor(side).save_pretrained(folder / "vision")
    return folder / "lm", folder / "vision"


def quietly(*arguments, **options):
    return build(*arguments, log=lambda line: None, **options)


def ask(folder, content):
    processor = AutoProcessor.from_pretrained(folder)
    model = SaisaForConditionalGeneration.from_pretrained(folder)
    picture = {"type": "image", "image": Image.effect_noise((30, 20), 50).convert("RGB")}
    chat = [{"role": "user", "content": [picture, {"type": "text", "text": content}]}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    return model, processor, inputs, model.generate(**inputs, max_new_tokens=3, do_sample=False)


def test_the_command_builds_a_checkpoint_that_answers(tmp_path, capsys):
    lm, vision = parts_on_disk(tmp_path, vision=whole_clip())
    options = ["--vision-feature-layer", "-2", "-1", "--visual-layers", "1", "2", "--dtype", "bfloat16"]
    assert main(["build", str(lm), str(vision), str(tmp_path / "out"), *options]) == 0
    assert "'<image>' takes 4 visual tokens" in capsys.readouterr().out
    model, processor, inputs, written = ask(tmp_path / "out", "word1 word2")
    assert model.config.visual_layers == [1, 2] and model.config.vision_feature_layer == [-2, -1]
    assert processor.tokenizer.padding_side == "left" and processor.tokenizer.pad_token == "<unk>"
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 4
    assert written.shape[1] == inputs["input_ids"].shape[1] + 3
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {torch.bfloat16}
    assert {"README.md", "modeling_saisa.py", "generation_config.json", "chat_template.jinja"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lm", "out", "vision"]


@pytest.mark.parametrize("own", [*build_module.KNOWN_IMAGE_TOKENS, "<picture>"])
def test_a_tokenizer_that_has_an_image_token_keeps_it(own):
    made = tokenizer()
    made.add_tokens([own], special_tokens=True)
    size = len(made)
    assert prepare_tokenizer(made, own if own == "<picture>" else None) == own
    assert len(made) == size


def test_an_image_token_of_its_own_needs_no_row_and_stands_in_the_template(tmp_path):
    lm, vision = parts_on_disk(tmp_path)
    own = tokenizer()
    own.add_tokens(["<|image_pad|>"], special_tokens=True)
    own.save_pretrained(lm)
    quietly(lm, vision, tmp_path / "out")
    model, processor, inputs, _ = ask(tmp_path / "out", "word1")
    assert processor.image_token == "<|image_pad|>" and model.config.text_config.vocab_size == VOCAB_SIZE
    assert (inputs["input_ids"] == own.convert_tokens_to_ids("<|image_pad|>")).sum() == 4


def test_without_a_template_of_its_own_a_tokenizer_gets_the_plain_one_or_the_one_named(tmp_path):
    lm, vision = parts_on_disk(tmp_path, template=None)
    for chosen, words in [(None, "<image>\nword1\n"), ("vicuna", "USER: <image>\nword1 ASSISTANT:")]:
        quietly(lm, vision, tmp_path / "out", chat_template=chosen, overwrite=True)
        chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "word1"}]}]
        processor = AutoProcessor.from_pretrained(tmp_path / "out")
        assert processor.apply_chat_template(chat, add_generation_prompt=True).endswith(words)
    file = tmp_path / "own.jinja"
    file.write_text(PHI_3)
    quietly(lm, vision, tmp_path / "out", chat_template=str(file), overwrite=True)
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert (
        processor.apply_chat_template(chat, add_generation_prompt=True)
        == "<|user|>\n<image>\nword1<|end|>\n<|assistant|>\n"
    )


def test_visual_tokens_are_counted_on_what_the_image_processor_makes(tmp_path):
    """DINOv2's checkpoints say 518 pixels and come with a processor that makes 224."""
    lm, vision = parts_on_disk(tmp_path, vision=encoder("dinov2"), side=16)
    quietly(lm, vision, tmp_path / "out")
    model, _, inputs, _ = ask(tmp_path / "out", "word1")
    assert VISION_CONFIGS["dinov2"]().image_size == 8 and model.config.image_seq_length == 16
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == 16


@pytest.mark.parametrize("vision", ["convnext", "dinov2", "dinov2_with_registers", "clip"])
@pytest.mark.parametrize("built", [None, "avg_pool"])
def test_another_reduction_at_loading_leaves_model_and_processor_of_one_mind(vision, built, tmp_path):
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    made = {
        "convnext": lambda: AutoModel.from_config(ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])),
        "dinov2_with_registers": lambda: AutoModel.from_config(Dinov2WithRegistersConfig(**sizes)),
    }
    side = {"convnext": 64, "clip": 8}.get(vision, 16)
    lm, vision = parts_on_disk(tmp_path, vision=made.get(vision, lambda: encoder(vision))(), side=side)
    quietly(lm, vision, tmp_path / "out", visual_token_reduction=built)
    other = {"visual_token_reduction": None if built else "avg_pool", "reduced_visual_tokens": None}
    for changes in ({}, other):
        model = SaisaForConditionalGeneration.from_pretrained(tmp_path / "out", **changes)
        processor = AutoProcessor.from_pretrained(tmp_path / "out", **changes)
        inputs = processor(images=Image.new("RGB", (9, 9)), text="<image> word1", return_tensors="pt")
        model(**inputs)  # refuses placeholders of another number


@pytest.mark.parametrize("size", ["100000", "20kB", "0.1MB", 30_000])
def test_weight_files_are_as_large_as_asked_for_at_most(size, tmp_path):
    lm, vision = parts_on_disk(tmp_path)
    quietly(lm, vision, tmp_path / "out", max_shard_size=size)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1


def test_timms_encoders_get_an_image_processor_that_needs_no_torchvision(tmp_path):
    pytest.importorskip("timm", reason="timm is not installed: pip install timm, which brings torchvision")
    seen = {"input_size": [3, 64, 64], "crop_pct": 0.8, "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}
    vision = TimmWrapperConfig(
        architecture="convnext_atto", num_labels=2, pretrained_cfg=seen | {"interpolation": "bicubic"}
    )
    lm, vision = parts_on_disk(tmp_path, vision=AutoModel.from_config(vision))
    (vision / "preprocessor_config.json").unlink()
    quietly(lm, vision, tmp_path / "out")
    model, processor, inputs, _ = ask(tmp_path / "out", "word1")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == model.config.image_seq_length == 16
    made = processor.image_processor
    assert (list(made.image_mean), list(made.image_std), made.size["shortest_edge"]) == (
        [0.1, 0.2, 0.3],
        [0.5, 0.6, 0.7],
        80,
    )


def test_an_encoder_that_refuses_its_processors_pictures_is_reported_and_nothing_is_left(tmp_path):
    lm, vision = parts_on_disk(tmp_path, side=12)
    with pytest.raises(ValueError, match=r"does not accept images of shape \(1, 3, 12, 12\)"):
        quietly(lm, vision, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lm", "vision"]


def test_a_part_whose_json_file_holds_no_object_is_one_line_that_names_it(tmp_path, capsys):
    parts = parts_on_disk(tmp_path)
    files = {
        "lm": ("config", "generation_config", "tokenizer_config", "tokenizer"),
        "vision": ("config", "preprocessor_config"),
    }
    for folder, names in files.items():
        for name in names:
            file = tmp_path / folder / f"{name}.json"
            whole = file.read_bytes()
            for content in ("null", "[]"):
                file.write_text(content)
                assert main(["build", *map(str, parts), str(tmp_path / "out")]) == 2, (name, content)
                kind = "NoneType" if content == "null" else "list"
                assert f"{file} holds a {kind}, expected an object." in capsys.readouterr().err
            file.write_bytes(whole)


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_language_model_that_lacks_tensors_is_never_filled_with_random_ones(tmp_path, lost):
    lm, vision = parts_on_disk(tmp_path)
    weights = load_file(lm / "model.safetensors")
    del weights[lost]
    save_file(weights, lm / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"lm lacks 1 of the tensors of a qwen3: {re.escape(lost)}"):
        quietly(lm, vision, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_leaves_what_was_there(tmp_path, monkeypatch):
    lm, vision = parts_on_disk(tmp_path)
    quietly(lm, vision, tmp_path / "out", seed=1)
    before = load_file(tmp_path / "out" / "model.safetensors")
    with pytest.raises(OSError, match=r"not empty.*--overwrite"):
        quietly(lm, vision, tmp_path / "out")

    def full_disk(*arguments, **options):
        raise OSError("No space left on device")

    monkeypatch.setattr(build_module, "write_model_card", full_disk)
    with pytest.raises(OSError, match="No space"):
        quietly(lm, vision, tmp_path / "out", seed=2, overwrite=True)
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(after[name], x) for name, x in before.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lm", "out", "vision"]
    with pytest.raises(ValueError, match="contains"):
        quietly(lm, vision, tmp_path, overwrite=True)


def test_the_result_is_uploaded_on_request(tmp_path, monkeypatch):
    class Hub:
        uploaded = {}

        def whoami(self):
            return {"name": "someone"}

        def create_repo(self, repository, private, exist_ok):
            return SimpleNamespace(repo_id=f"{repository}, private: {private}")

        def file_exists(self, repo_id, name):
            return False

        def upload_folder(self, repo_id, folder_path, **options):
            self.uploaded[repo_id] = {path.name for path in Path(folder_path).iterdir()}
            return SimpleNamespace(commit_url="https://hub/commit")

    monkeypatch.setattr("saisa_hf.common.destination.HfApi", Hub)
    quietly(*parts_on_disk(tmp_path), tmp_path / "out", push_to_hub="someone/tiny", private=True)
    assert Hub.uploaded == {"someone/tiny, private: True": {path.name for path in (tmp_path / "out").iterdir()}}


def test_the_seed_decides_on_the_projectors_alone(tmp_path):
    lm, vision = parts_on_disk(tmp_path)
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        quietly(lm, vision, tmp_path / name, seed=seed)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert {name for name in a if not torch.equal(a[name], c[name])} == {n for n in a if "visual_projector" in n}


@pytest.mark.parametrize(
    "paths, status, message",
    [
        (["lm", "vision"], 2, "expected LANGUAGE_MODEL VISION_MODEL DST"),
        (["./missing", "vision", "out"], 1, "LANGUAGE_MODEL './missing' is not a folder"),
    ],
)
def test_a_wrong_command_line_is_explained(tmp_path, capsys, monkeypatch, paths, status, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vision").mkdir()
    try:
        found = main(["build", *paths])
    except SystemExit as exit_:
        found = exit_.code
    assert found == status and message in capsys.readouterr().err


def test_the_model_card_names_the_licence_of_the_language_model(tmp_path):
    lm, vision = parts_on_disk(tmp_path)
    (lm / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    quietly(lm, vision, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: apache-2.0" in card and "qwen3" in card
    assert "base_model" not in card and str(tmp_path) not in card
    assert str(tmp_path) not in json.dumps(json.loads((tmp_path / "out" / "config.json").read_text()))
