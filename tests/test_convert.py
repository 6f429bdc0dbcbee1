# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa convert` against what the authors' code computed on one of its own checkpoints (fixtures/reference/mha)."""

import importlib.util
import json
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedTokenizerFast

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.checkpoints import weight_writing
from saisa_hf.checkpoints.convert import convert


REFERENCE = Path(__file__).parent / "fixtures" / "reference"
IMAGE = -200  # how the authors' code writes an image into a prompt
VISUAL_TOKENS = 16

spec = importlib.util.spec_from_file_location("fixture_weights", REFERENCE / "fixture_weights.py")
fixture_weights = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fixture_weights)


def read(name):
    return json.loads((REFERENCE / "mha" / name).read_text())


@cache
def language_tensors():
    shapes = read("checkpoint_shapes.json")
    return {name: torch.from_numpy(fixture_weights.weight(name, tuple(shape))) for name, shape in shapes.items()}


@cache
def tower_tensors():
    shapes = read("vision_shapes.json")
    values = {name: fixture_weights.weight(f"vision_tower.{name}", tuple(shape)) for name, shape in shapes.items()}
    return {name: torch.from_numpy(value) for name, value in values.items()}


def narrow_parts():
    """(tensors with a narrower encoder, its config): small enough for conversions by the dozen."""
    narrow, wide = {"hidden_size": 32, "intermediate_size": 64}, read("vision_config.json")
    sizes = {wide[key]: narrow[key] for key in narrow}
    towers = {f"model.vision_tower.vision_tower.{name}": value for name, value in tower_tensors().items()}
    tensors = {
        name: value[tuple(slice(sizes.get(size, size)) for size in value.shape)].clone()
        for name, value in (language_tensors() | towers).items()
    }
    return tensors, wide | narrow


def write_weights(folder, tensors, form="safetensors", shards=1):
    single = "model.safetensors" if form == "safetensors" else "pytorch_model.bin"
    stem, suffix = single.rsplit(".", 1)
    names = list(tensors)
    weight_map = {}
    for n in range(shards):
        file = single if shards == 1 else f"{stem}-{n + 1:05}-of-{shards:05}.{suffix}"
        part = {name: tensors[name].contiguous() for name in names[n::shards]}
        save_file(part, folder / file) if form == "safetensors" else torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (folder / f"{single}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def authors_checkpoint(folder, tower_inside=True, form="safetensors", shards=1, tensors=None, tokenizer=None, **config):
    """A folder as the authors' code saves it; `config` overrides entries of config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(read("config.json") | config))
    tower = folder / "vision"
    tower.mkdir(exist_ok=True)
    shutil.copyfile(REFERENCE / "mha" / "vision_config.json", tower / "config.json")
    shutil.copyfile(REFERENCE / "mha" / "preprocessor_config.json", tower / "preprocessor_config.json")
    tensors = dict(language_tensors() if tensors is None else tensors)
    if tower_inside:
        tensors |= {f"model.vision_tower.vision_tower.{name}": value for name, value in tower_tensors().items()}
    else:
        write_weights(tower, tower_tensors(), form)
    write_weights(folder, tensors, form, shards)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def converted(source, destination, **options):
    """The converted model, everything of which was in the checkpoint."""
    convert(source, destination, log=lambda line: None, **options)
    model, info = SaisaForConditionalGeneration.from_pretrained(destination, output_loading_info=True)
    problems = {name: found for name, found in info.items() if found}
    assert not problems, problems
    return model.eval()


def old_words_tokenizer(words=600, bos="<s>"):
    """A word-level tokenizer with `words` entries, without an image token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {"<unk>": 0, bos: 1, "</s>": 2} | {f"word{n}": n for n in range(3, words)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token=bos, eos_token="</s>")


def expanded(prompt_ids, image_token_id):
    ids = [image_token_id if i == IMAGE else i for i in prompt_ids[0].tolist()]
    return torch.tensor([[j for i in ids for j in ([i] * VISUAL_TOKENS if i == image_token_id else [i])]])


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("tower_inside", [True, False], ids=["own_tower", "foreign_tower"])
def test_a_converted_checkpoint_computes_what_the_authors_code_computed(tmp_path, tower_inside, form, shards):
    source = authors_checkpoint(tmp_path / "source", tower_inside, form, shards)
    model = converted(source, tmp_path / "converted")
    assert model.config.text_config.vocab_size == 601
    expected = load_file(REFERENCE / "mha" / "expected.safetensors")
    ids = expanded(expected["prompt_ids"], model.config.image_token_id)
    inputs = {"input_ids": ids, "pixel_values": expected["pixel_values"], "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        logits = model(**inputs).logits[ids != model.config.image_token_id]
    torch.testing.assert_close(logits[:, :600], expected["text_logits"], atol=2e-5, rtol=0)
    written = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)[0, ids.shape[1] :]
    assert written.tolist() == expected["generated_ids"].flatten()[1:].tolist()


def test_the_token_made_for_the_image_is_never_generated(tmp_path):
    model = converted(authors_checkpoint(tmp_path / "source"), tmp_path / "converted")
    assert model.generation_config.suppress_tokens == [600] == [model.config.image_token_id]
    hidden = torch.randn(5000, 64)
    logits = model.lm_head(hidden)
    # Its row is the mean of the others', so its logit is the mean of theirs: below the largest even without suppression.
    torch.testing.assert_close(logits[:, 600], logits[:, :600].mean(1), atol=1e-4, rtol=0)
    assert bool((logits[:, 600] < logits[:, :600].max(1).values).all())


def test_every_tensor_arrives_bit_for_bit(tmp_path):
    source = authors_checkpoint(tmp_path / "source", shards=2)
    convert(source, tmp_path / "converted", log=lambda line: None)
    written = load_file(tmp_path / "converted" / "model.safetensors")
    layer = "model.language_model.layers.1"
    for ours, theirs in {
        f"{layer}.visual_projector.linear_1.weight": "model.layers.1.mm_projector.0.weight",
        f"{layer}.visual_projector.linear_2.bias": "model.layers.1.mm_projector.2.bias",
        f"{layer}.self_attn.o_proj.weight": "model.layers.1.self_attn.o_proj.weight",
        "model.language_model.norm.weight": "model.norm.weight",
    }.items():
        assert torch.equal(written.pop(ours), language_tensors()[theirs]), ours
    assert torch.equal(written["lm_head.weight"][:600], language_tensors()["lm_head.weight"])
    assert not [name for name in written if "mm_projector" in name or name.startswith("model.visual_projector")]


def test_weight_files_stay_below_the_size_asked_for(tmp_path):
    source = authors_checkpoint(tmp_path / "source")
    model = converted(source, tmp_path / "converted", max_shard_size="5MB")
    files = sorted((tmp_path / "converted").glob("model-*.safetensors"))
    assert len(files) > 5 and not (tmp_path / "converted" / "model.safetensors").exists()
    for file in files:
        with safe_open(file, "pt") as shard:
            names = list(shard.keys())
            assert sum(shard.get_tensor(name).nbytes for name in names) <= 5_000_000 or len(names) == 1
    index = json.loads((tmp_path / "converted" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype_is_stored_and_loaded(tmp_path, dtype):
    convert(authors_checkpoint(tmp_path / "source"), tmp_path / "converted", dtype=dtype, log=lambda line: None)
    written = load_file(tmp_path / "converted" / "model.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {getattr(torch, dtype)}
    model = SaisaForConditionalGeneration.from_pretrained(tmp_path / "converted", dtype="auto")
    assert model.dtype == getattr(torch, dtype)


def test_values_too_large_for_float16_are_not_turned_into_infinities(tmp_path):
    tensors = language_tensors() | {"model.norm.weight": torch.full((64,), 1e5)}
    source = authors_checkpoint(tmp_path / "source", tensors=tensors)
    with pytest.raises(ValueError, match=r"model\.safetensors: model\.norm\.weight has values too large .*bfloat16"):
        convert(source, tmp_path / "converted", dtype="float16", log=lambda line: None)


def text_only_error(model, reference):
    ids = torch.randint(3, 600, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return (model(ids).logits[..., :600] - reference.eval()(ids).logits).abs().max().item()


@pytest.mark.parametrize(
    "name, settings",
    [
        ("grouped_queries", {"num_key_value_heads": 2}),
        ("theta", {"rope_theta": 500000.0, "num_key_value_heads": 1}),
        ("scaling_in_the_old_spelling", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
        ("biases", {"attention_bias": True}),
        ("head_dim", {"head_dim": 8}),
        ("epsilon", {"rms_norm_eps": 0.3, "hidden_act": "gelu"}),
        ("tied", {"tie_word_embeddings": True}),
        ("window", {"model_type": "llava_mistral", "sliding_window": 5, "num_key_value_heads": 2}),
    ],
)
def test_each_setting_of_the_language_model_is_carried_over(tmp_path, name, settings):
    """On text alone, a SAISA model is its language model: transformers' own, made from the same settings."""
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys += ("num_key_value_heads", "max_position_embeddings", "rms_norm_eps")
    own = {key: read("config.json")[key] for key in keys} | settings
    mistral = own.pop("model_type", None) == "llava_mistral"
    if scaling := own.pop("rope_scaling", None):
        own["rope_scaling"] = {"rope_type": scaling["type"], "factor": scaling["factor"]}
    torch.manual_seed(1)
    reference = MistralForCausalLM(MistralConfig(**own)) if mistral else LlamaForCausalLM(LlamaConfig(**own))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(std=0.3)
    tensors = {key: value for key, value in reference.state_dict().items() if "rotary" not in key}
    if settings.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight")
    tensors |= {key: value for key, value in language_tensors().items() if "mm_projector" in key}
    tensors |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # as checkpoints of old releases have
    model = converted(authors_checkpoint(tmp_path / "s", tensors=tensors, **settings), tmp_path / "converted")
    assert text_only_error(model, reference) < 1e-4


def test_a_whole_clip_checkpoint_serves_as_the_vision_tower(tmp_path):
    source = authors_checkpoint(tmp_path / "source", tower_inside=False)
    tower = tmp_path / "clip"
    shutil.move(source / "vision", tower)
    vision_config = json.loads((tower / "config.json").read_text())
    text_side = {"text_model.embeddings.position_ids": torch.arange(4)[None], "logit_scale": torch.tensor(1.0)}
    text_side["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    (tower / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision_config}))
    write_weights(tower, tower_tensors() | text_side)
    model = converted(source, tmp_path / "converted", vision_tower=tower)
    got = model.state_dict()["model.vision_tower.vision_model.post_layernorm.weight"]
    assert torch.equal(got, tower_tensors()["vision_model.post_layernorm.weight"])


def test_a_tower_that_cannot_be_found_is_asked_for_by_name(tmp_path):
    source = authors_checkpoint(tmp_path / "source", tower_inside=False, mm_vision_tower="/their/disk/clip-vit")
    with pytest.raises(OSError, match=r"/their/disk/clip-vit.*--vision-tower"):
        convert(source, tmp_path / "converted", log=lambda line: None)


def test_a_tower_config_beside_the_checkpoint_serves_where_the_tower_is_inside_and_its_folder_is_gone(tmp_path):
    source = authors_checkpoint(tmp_path / "source")
    (source / "vision" / "config.json").rename(source / "vision_config.json")
    shutil.rmtree(source / "vision")
    assert converted(source, tmp_path / "converted").config.vision_config.hidden_size == 1024


def drop(name):
    return lambda tensors: tensors.pop(name)


def reshape(name):
    return lambda tensors: tensors.update({name: tensors[name][:-1]})


@pytest.mark.parametrize(
    "damage, message",
    [
        (drop("model.layers.2.mlp.up_proj.weight"),
         r"source/model\.safetensors: tensor model\.layers\.2\.mlp\.up_proj\.weight is missing"),
        (drop("model.layers.1.mm_projector.2.bias"),
         r"source/model\.safetensors: tensor model\.layers\.1\.mm_projector\.2\.bias is missing"),
        (reshape("model.layers.0.mm_projector.0.weight"), r"model\.safetensors: tensor model\.layers\.0\.mm_projector\.0"
         r"\.weight has shape \(63, 1024\), expected \(64, 1024\)"),
        (reshape("lm_head.weight"), r"tensor lm_head\.weight has shape \(599, 64\), expected \(600, 64\)"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), r"model\.safetensors: tensor extra is unknown"),
        (lambda tensors: tensors.update({"model.layers.3.input_layernorm.weight": torch.ones(64)}),
         r"model\.safetensors: tensor model\.layers\.3\.input_layernorm\.weight is unknown"),
        (lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers" in name and "mm_proj" in name],
         r"model\.layers\.0\.mm_projector\.0\.weight is missing.*LLaVA checkpoint"),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_refused_by_file_and_tensor_and_leaves_nothing_behind(tmp_path, damage, message):
    tensors = dict(language_tensors())
    damage(tensors)
    source = authors_checkpoint(tmp_path / "source", tensors=tensors)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "converted", log=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_quantized_tensors_are_refused_by_file_and_tensor(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    source = authors_checkpoint(
        tmp_path / "s", tensors=language_tensors() | {name: language_tensors()[name].to(torch.int8)}
    )
    with pytest.raises(
        ValueError, match=r"model\.safetensors: tensor model\.layers\.1\.mlp\.up_proj\.weight is I8.*Quant"
    ):
        convert(source, tmp_path / "converted", log=lambda line: None)


SHARED = {
    "model.visual_projector.linear_1.weight": "model.mm_projector.0.weight",
    "model.visual_projector.linear_1.bias": "model.mm_projector.0.bias",
    "model.visual_projector.linear_2.weight": "model.mm_projector.2.weight",
    "model.visual_projector.linear_2.bias": "model.mm_projector.2.bias",
}


def test_the_projector_of_the_first_stage_is_kept_on_demand_in_a_file_of_its_own(tmp_path):
    model = converted(authors_checkpoint(tmp_path / "source"), tmp_path / "converted", shared_projector="keep")
    kept = load_file(tmp_path / "converted" / "shared_projector.safetensors")
    assert kept.keys() == SHARED.keys()
    assert all(torch.equal(kept[ours], language_tensors()[theirs]) for ours, theirs in SHARED.items())
    assert not any(name in SHARED for name in model.state_dict())
    config = SaisaConfig.from_pretrained(tmp_path / "converted")
    config.projector_sharing = "shared"
    found = SaisaForConditionalGeneration(config).load_state_dict(kept, strict=False)
    assert not found.unexpected_keys and not [name for name in found.missing_keys if "projector" in name]


def stage_one_tensors():
    return {name: value for name, value in language_tensors().items() if not re.match(r"model\.layers.*mm_proj", name)}


def test_a_checkpoint_of_the_first_stage_becomes_a_model_with_one_projector(tmp_path):
    source = authors_checkpoint(tmp_path / "source", tensors=stage_one_tensors())
    model = converted(source, tmp_path / "converted", shared_projector="use")
    assert model.config.projector_sharing == "shared"
    assert all(torch.equal(model.state_dict()[ours], language_tensors()[theirs]) for ours, theirs in SHARED.items())
    # it computes what a checkpoint does whose layers all have copies of that projector, as the second stage begins
    copies = dict(stage_one_tensors())
    for name in SHARED.values():
        copies |= {name.replace("model.", f"model.layers.{i}."): language_tensors()[name].clone() for i in range(3)}
    copied = converted(authors_checkpoint(tmp_path / "copies", tensors=copies), tmp_path / "second_stage")
    expected = load_file(REFERENCE / "mha" / "expected.safetensors")
    ids = expanded(expected["prompt_ids"], model.config.image_token_id)
    with torch.no_grad():
        one, many = (m(ids, pixel_values=expected["pixel_values"]).logits for m in (model, copied))
    torch.testing.assert_close(one, many)


@pytest.mark.parametrize(
    "choice, tensors, message",
    [
        ("use", language_tensors, r"model\.safetensors: tensor model\.layers\.0\.mm_projector\.0\.\w+ is a projector of a "
         r"single layer.*Leave out --shared-projector use"),
        ("keep", lambda: {k: v for k, v in language_tensors().items() if k != "model.mm_projector.2.bias"},
         r"model\.safetensors: tensor model\.mm_projector\.2\.bias is missing"),
        ("keep", lambda: language_tensors() | {"model.mm_projector.0.weight": torch.ones(64, 3)},
         r"model\.safetensors: tensor model\.mm_projector\.0\.weight has shape \(64, 3\).*expected \(64, 1024\)"),
        ("drop", stage_one_tensors, r"--shared-projector use"),
        ("copy", language_tensors, r"shared_projector='copy': expected one of drop, keep, use"),
    ],
)  # fmt: skip
def test_a_shared_projector_that_does_not_fit_what_was_asked_is_refused(tmp_path, choice, tensors, message):
    source = authors_checkpoint(tmp_path / "source", tensors=tensors())
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "converted", shared_projector=choice, log=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_bar_shows_bytes_and_the_time_left_where_it_is_asked_for(tmp_path, capsys, form):
    source = authors_checkpoint(tmp_path / "source", form=form)
    convert(source, tmp_path / "silent")
    assert capsys.readouterr().err == ""  # stderr is no terminal here
    convert(source, tmp_path / "shown", progress=True)
    shown = capsys.readouterr()
    last = shown.err.replace("\r", "\n").strip().split("\n")[-1]
    read = sum(file.stat().st_size for file in source.glob("*.bin"))  # compared with its checksums first
    written = (tmp_path / "shown" / "model.safetensors").stat().st_size  # twice: written and loaded back
    total = re.search(r"100%.* ([\d.]+)M/([\d.]+)M \[\d\d:\d\d<00:00, +\S+B/s\]", last)
    assert total and total[1] == total[2] and abs(float(total[1]) * 1e6 - read - 2 * written) < 6e5  # shown in MB
    assert "checked" in shown.out and "%" not in shown.out


@pytest.mark.parametrize("form", ["safetensors", "bin"])
def test_a_truncated_or_missing_shard_is_named(tmp_path, form):
    source = authors_checkpoint(tmp_path / "source", form=form, shards=3)
    shard = sorted(source.glob("*-00002-of-00003.*"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OSError, match=rf"{shard.name} cannot be read.*truncated"):
        convert(source, tmp_path / "converted", log=lambda line: None)
    shard.unlink()
    with pytest.raises(OSError, match=rf"{shard.name} is missing"):
        convert(source, tmp_path / "converted", log=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_file_that_reads_back_otherwise_than_it_was_written_is_noticed(tmp_path, monkeypatch):
    def write_and_flip_a_bit(file, *arguments):
        digests = write(file, *arguments)
        content = bytearray(file.read_bytes())
        content[-1000] ^= 1
        file.write_bytes(content)
        return digests

    write = weight_writing.write_safetensors
    monkeypatch.setattr(weight_writing, "write_safetensors", write_and_flip_a_bit)
    with pytest.raises(OSError, match=r"model\.safetensors: .* differs from its source"):
        convert(authors_checkpoint(tmp_path / "source"), tmp_path / "converted", log=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    source = authors_checkpoint(tmp_path / "source", form="bin")
    torch.save({"model.norm.weight": Trap()}, source / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"pytorch_model\.bin cannot be read"):
        convert(source, tmp_path / "converted", log=lambda line: None)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"mm_projector_type": "linear"}, r"config\.json: mm_projector_type='linear' is not supported"),
        ({"model_type": "llava_mpt"}, r"config\.json: model_type='llava_mpt' is not supported"),
        ({"image_aspect_ratio": "anyres"}, r"image_aspect_ratio='anyres'"),
        ({"mm_use_im_start_end": True}, r"mm_use_im_start_end=True"),
        ({"hidden_size": None}, r"config\.json: hidden_size=None, expected an integer"),
        ({"mm_vision_select_layer": 7}, r"vision_feature_layer=7"),
    ],
)
def test_settings_that_would_change_the_model_are_refused(tmp_path, settings, message):
    source = authors_checkpoint(tmp_path / "source", **settings)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "converted", log=lambda line: None)


def test_an_existing_destination_is_kept_unless_it_may_be_overwritten(tmp_path):
    source, destination = authors_checkpoint(tmp_path / "source"), tmp_path / "converted"
    destination.mkdir()
    (destination / "notes.txt").write_text("mine")
    with pytest.raises(OSError, match=r"not empty.*--overwrite"):
        convert(source, destination, log=lambda line: None)
    (source / "config.json").rename(source / "away")
    with pytest.raises(OSError, match=r"config\.json is missing"):
        convert(source, destination, overwrite=True, log=lambda line: None)
    assert (destination / "notes.txt").read_text() == "mine"
    (source / "away").rename(source / "config.json")
    converted(source, destination, overwrite=True)
    assert not (destination / "notes.txt").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "source"]
    with pytest.raises(ValueError, match="contains SRC"):
        convert(source, source, overwrite=True, log=lambda line: None)
    with pytest.raises(ValueError, match="contains the vision tower"):
        convert(source, destination, vision_tower=destination, overwrite=True, log=lambda line: None)


def test_a_single_weight_file_comes_before_an_index_that_an_earlier_save_left(tmp_path):
    old, new = (authors_checkpoint(tmp_path / name, shards=shards) for name, shards in (("old", 3), ("new", 1)))
    weights = {name: tensor + 1 for name, tensor in load_file(new / "model.safetensors").items()}
    save_file(weights, old / "model.safetensors", metadata={"format": "pt"})
    save_file(weights, new / "model.safetensors", metadata={"format": "pt"})
    assert (old / "model.safetensors.index.json").exists()
    first, second = (converted(path, tmp_path / f"converted-{path.name}").state_dict() for path in (old, new))
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_without_a_tokenizer_the_model_alone_is_converted_and_the_terminal_says_so(tmp_path):
    lines = []
    convert(authors_checkpoint(tmp_path / "source"), tmp_path / "converted", log=lines.append)
    assert any("no tokenizer" in line and "without a processor" in line for line in lines)
    assert not (tmp_path / "converted" / "tokenizer_config.json").exists()
    assert {"README.md", "config.json", "generation_config.json", "modeling_saisa.py"} <= {
        path.name for path in (tmp_path / "converted").iterdir()
    }


@pytest.mark.parametrize("bos, turn_end", [("<s>", "</s>"), ("<|begin_of_text|>", "<|end_of_text|>")])
def test_the_tokenizer_decides_on_the_chat_template(tmp_path, bos, turn_end):
    source = authors_checkpoint(tmp_path / "source", tokenizer=old_words_tokenizer(bos=bos))
    convert(source, tmp_path / "converted", log=lambda line: None)
    processor = SaisaProcessor.from_pretrained(tmp_path / "converted")
    turns = [{"role": role, "content": [{"type": "text", "text": "word5"}]} for role in ("user", "assistant")]
    text = processor.apply_chat_template(turns)
    assert "USER: word5 ASSISTANT: word5" in text and text.rstrip().endswith(turn_end)
    convert(source, tmp_path / "plain", chat_template="plain", log=lambda line: None)
    assert "USER" not in SaisaProcessor.from_pretrained(tmp_path / "plain").apply_chat_template(turns)


@pytest.mark.parametrize("words, rows", [(600, 601), (590, 600), (603, 604)])
def test_the_image_gets_a_token_of_its_own_and_a_row_where_one_is_lacking(tmp_path, words, rows):
    source = authors_checkpoint(tmp_path / "source", tokenizer=old_words_tokenizer(words))
    model = converted(source, tmp_path / "converted")
    processor = SaisaProcessor.from_pretrained(tmp_path / "converted")
    assert model.config.image_token_id == words == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0] == rows
    assert model.generation_config.suppress_tokens == sorted({words, *range(600, rows)})


@pytest.mark.parametrize("aspect_ratio, pads", [("pad", True), (None, False)])
def test_image_and_text_go_through_the_converted_processor_into_the_model(tmp_path, aspect_ratio, pads):
    from PIL import Image

    source = authors_checkpoint(tmp_path / "s", tokenizer=old_words_tokenizer(), image_aspect_ratio=aspect_ratio)
    model = converted(source, tmp_path / "converted")
    processor = SaisaProcessor.from_pretrained(tmp_path / "converted")
    wide = Image.effect_noise((97, 41), 60).convert("RGB")
    inputs = processor(text="word7 <image> word8", images=wide, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == VISUAL_TOKENS
    background = tuple(int(255 * mean) for mean in processor.image_processor.image_mean)
    square = Image.new("RGB", (97, 97), background)
    square.paste(wide, (0, (97 - 41) // 2))
    by_hand = processor.image_processor(square, return_tensors="pt")["pixel_values"]
    assert torch.allclose(inputs["pixel_values"], by_hand, atol=0.02) is pads
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_prompts_of_a_converted_checkpoint_have_the_ids_that_the_authors_tokenization_gives(tmp_path):
    from PIL import Image

    pytest.importorskip("sentencepiece")
    source = authors_checkpoint(tmp_path / "source")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(REFERENCE / "tokenizer" / name, source / name)
    convert(source, tmp_path / "converted", log=lambda line: None)
    shutil.rmtree(source)
    processor = SaisaProcessor.from_pretrained(tmp_path / "converted")
    prompts = json.loads((REFERENCE / "tokenizer" / "prompts.json").read_text())
    for prompt in prompts:
        images = [Image.new("RGB", (56, 56))] * prompt["prompt"].count("<image>")
        ids = processor(text=prompt["prompt"], images=images or None, return_tensors="pt")["input_ids"]
        wanted = expanded(torch.tensor([prompt["input_ids"]]), processor.image_token_id)
        assert ids.tolist() == wanted.tolist(), prompt["name"]
    question = [{"type": "image"}, {"type": "text", "text": "What is in this image?"}]
    asked = processor.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
    assert asked == prompts[0]["prompt"]
