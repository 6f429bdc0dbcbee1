"""SaisaConfig: what it refuses, and that it survives JSON on and between both transformers majors."""

import json
import math

import pytest
from hostile import bounded
from tiny_models import TEXT_CONFIGS, VISION_CONFIGS, tiny_config
from transformers import AutoConfig, AutoModel, CLIPVisionConfig, LlamaConfig, Qwen3Config, ViTConfig, ViTModel

from saisa_hf import SaisaConfig, SaisaModel
from saisa_hf.compat_saisa import TRANSFORMERS_5, portable_config_dict, readable_config_dict
from saisa_hf.vision_saisa import grid_of


LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


CONVNEXT = {"model_type": "convnext", "num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "image_size": 32}


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"vision_feature_select_strategy": "cls"}, ["vision_feature_select_strategy='cls'", "'default', 'full'"]),
        ({"projector_sharing": "none"}, ["projector_sharing='none'", "'per_layer', 'shared'"]),
        ({"vision_feature_layer": 25}, ["vision_feature_layer=25", "-25 to 24"]),
        ({"vision_feature_layer": [-2, -26]}, ["vision_feature_layer=[-2, -26]", "-25 to 24"]),
        ({"vision_feature_layer": []}, ["vision_feature_layer=[]"]),
        ({"visual_layers": [0, 32]}, ["visual_layers=[0, 32]", "between 0 and 31"]),
        ({"visual_layers": [3, 3]}, ["visual_layers=[3, 3]", "distinct"]),
        ({"visual_layers": []}, ["visual_layers=[]", "at least one"]),
        ({"image_token_id": 32064}, ["image_token_id=32064", "[0, 32064)"]),
        ({"image_token_id": -1}, ["image_token_id=-1", "[0, 32064)"]),
        ({"vision_feature_layer": None}, ["vision_feature_layer=None", "-25 to 24"]),
        ({"vision_feature_layer": "-2"}, ["vision_feature_layer='-2'", "-25 to 24"]),
        ({"vision_feature_layer": True}, ["vision_feature_layer=True"]),
        ({"visual_layers": 1}, ["visual_layers=1", "a list"]),
        ({"projector_hidden_act": "bogus"}, ["projector_hidden_act='bogus'", "'gelu'"]),
        ({"projector_bias": "no"}, ["projector_bias='no'", "True, False"]),
        ({"vision_config": CONVNEXT, "vision_feature_layer": 7}, ["vision_feature_layer=7", "-3 to 2"]),
        ({"vision_config": CONVNEXT, "vision_feature_layer": []}, ["vision_feature_layer=[]"]),
        ({"vision_config": CONVNEXT, "vision_feature_layer": [-2, -1]}, ["vision_feature_layer=[-2, -1]", "one stage"]),
        ({"vision_config": {"image_size": [336, 336]}}, ["vision_config.image_size=[336, 336]", "a whole number"]),
        ({"image_seq_length": 0}, ["image_seq_length=0", "from 1 to 1048576"]),
        ({"image_seq_length": -3}, ["image_seq_length=-3"]),
        ({"projector_hidden_size": 0}, ["projector_hidden_size=0", "from 1 to"]),
        ({"text_config": {"model_type": "gpt2"}}, ["text_config.model_type='gpt2'", "'llama'", "'qwen3'"]),
        ({"vision_config": {"model_type": "vlt"}}, ["vision_config.model_type='vlt'", "'clip_vision_model'"]),
        ({"vision_config": LlamaConfig(num_hidden_layers=1)}, ["vision_config.model_type='llama'", "dinov2"]),
        ({"text_config": {"model_type": "phi3", "resid_pdrop": 0.1}}, ["text_config.resid_pdrop=0.1", "expected 0.0"]),
        ({"text_config": "llama"}, ["text_config is a str"]),
        ({"text_config": {"num_key_value_heads": 3}}, ["text_config.num_key_value_heads=3", "num_attention_heads=32"]),
        ({"text_config": {"num_key_value_heads": 0}}, ["text_config.num_key_value_heads=0", "from 1 to"]),
        ({"text_config": {"num_hidden_layers": 0}}, ["text_config.num_hidden_layers=0", "from 1 to 1000"]),
        ({"text_config": {"num_hidden_layers": 10**9}}, ["text_config.num_hidden_layers=1000000000", "from 1 to 1000"]),
        ({"text_config": {"intermediate_size": -1}}, ["text_config.intermediate_size=-1"]),
        ({"text_config": {"rms_norm_eps": math.nan}}, ["text_config.rms_norm_eps=nan", "a number from 1e-30"]),
        ({"text_config": {"hidden_act": "abc"}}, ["text_config.hidden_act='abc'", "'silu'"]),
        ({"text_config": {"hidden_size": 10**400}}, ["text_config.hidden_size=an int of 1329 bits"]),
        ({"text_config": {"attention_bias": "false"}}, ["text_config.attention_bias='false'", "True, False"]),
        ({"text_config": {"head_dim": 7}}, ["head_dim=7", "even" if TRANSFORMERS_5 else "wider than a head (7)"]),
        ({"text_config": {"rope_theta": 0}}, ["text_config.rope_theta=0"]),
        ({"text_config": {"rope_scaling": {"type": "linear", "factor": 0}}}, ["text_config.rope_scaling.factor=0"]),
        ({"text_config": {"dtype": "abc"}}, ["text_config.dtype='abc'", "AttributeError"]),
        ({"text_config": {"model_type": "mixtral", "num_experts_per_tok": 9}}, ["num_experts_per_tok=9", "8"]),
        ({"text_config": {"model_type": "gemma2", "sliding_window": None}}, ["text_config.sliding_window=None"]),
        ({"vision_config": {"patch_size": 0}}, ["vision_config.patch_size=0"]),
        ({"vision_config": {"patch_size": -14}}, ["vision_config.patch_size=-14"]),
        ({"vision_config": {"image_size": 28, "patch_size": 32}}, ["vision_config.patch_size=32", "image_size=28"]),
        ({"vision_config": {"hidden_size": 0}}, ["vision_config.hidden_size=0"]),
        ({"vision_config": {"num_attention_heads": 5}}, ["num_attention_heads", "5"]),
        ({"vision_config": {"image_size": 240000, "patch_size": 14}}, ["image_size", "293848164", "1048576"]),
        ({"vision_config": {"model_type": "swin", "window_size": "abc"}}, ["window_size='abc'"]),
        ({"tie_word_embeddings": 1}, ["tie_word_embeddings=1", "True, False"]),
        ({"id2label": 5}, ["id2label=5"]),
        ({"visual_layers": range(10**9)}, ["visual_layers=range(0, 1000000000)", "between 0 and 31"]),
        ({"visual_layers": [0] * 10**7}, ["visual_layers=[0, 0", "between 0 and 31"]),
    ],
    ids=str,
)
def test_a_wrong_field_is_named_with_its_value_and_what_is_allowed(wrong, words):
    with pytest.raises(ValueError) as refused:
        SaisaConfig(**wrong)
    for word in words:
        assert word in str(refused.value)


def test_a_field_that_was_changed_is_checked_when_a_model_is_made():
    config = tiny_config()
    config.text_config.num_key_value_heads = 3
    with pytest.raises(ValueError, match=r"text_config.num_key_value_heads=3: expected a divisor"):
        SaisaModel(config)
    config.text_config.num_key_value_heads, config.text_config.num_hidden_layers = 2, 1
    assert len(SaisaModel(config).language_model.layers) == 1


def test_a_file_is_checked_as_arguments_are(tmp_path):
    config = json.loads(tiny_config().to_json_string())
    config["text_config"]["num_key_value_heads"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    for read in (SaisaConfig.from_pretrained, AutoConfig.from_pretrained, SaisaModel.from_pretrained):
        with pytest.raises(ValueError, match=r"text_config.num_key_value_heads=3"):
            read(tmp_path)


@pytest.mark.parametrize("tokens", [1, 2, 12, 97, 576, 1369, 30030])
@pytest.mark.parametrize("size", [(1, 1), (336, 336), (200, 700), (1000, 10)])
def test_a_grid_is_that_of_the_squarest_cells(tokens, size):
    height, width = size
    divisors = [rows for rows in range(1, tokens + 1) if tokens % rows == 0]
    rows = min(divisors, key=lambda rows: abs(math.log(rows * rows / tokens * width / height)))
    assert grid_of(tokens, height, width) == (rows, tokens // rows)


def test_a_grid_of_very_many_tokens_is_found_at_once():
    with bounded(seconds=5, megabytes=50):
        assert grid_of(17142**2, 1, 1) == (17142, 17142)


@pytest.mark.parametrize("layer, tokens, width", [(0, 64, 8), (1, 64, 8), (-2, 64, 8), (-1, 16, 16)])
def test_the_state_of_convnext_decides_tokens_and_width(layer, tokens, width):
    config = SaisaConfig(vision_config=dict(CONVNEXT), vision_feature_layer=layer)
    assert (config.image_seq_length, config.vision_feature_size) == (tokens, width)


def test_tuples_and_ranges_are_lists_in_a_config():
    config = SaisaConfig(visual_layers=range(2, 5), vision_feature_layer=(-2, -1))
    assert config.visual_layers == [2, 3, 4] and config.vision_feature_layer == [-2, -1]


def test_defaults_are_the_papers():
    config = SaisaConfig()
    assert (config.text_config.model_type, config.text_config.hidden_size) == ("llama", 4096)
    assert (config.vision_config.hidden_size, config.image_seq_length, config.vision_feature_layer) == (1024, 576, -2)
    assert config.projector_sharing == "per_layer" and config.visual_layers is None
    assert config.image_token_index == config.image_token_id == 32000


@pytest.mark.parametrize("vision, tokens", [("clip", 4), ("siglip", 4), ("siglip2", 4), ("dinov2", 4)])
def test_visual_tokens_per_picture_are_computed(vision, tokens):
    vision_config = VISION_CONFIGS[vision]()
    per_strategy = {
        strategy: SaisaConfig(vision_config=vision_config, vision_feature_select_strategy=strategy).image_seq_length
        for strategy in ("default", "full")
    }
    class_token = 1 if vision in ("clip", "dinov2") else 0
    side = getattr(vision_config, "image_size", None)
    expected = (side // vision_config.patch_size) ** 2 if side else vision_config.num_patches
    assert per_strategy == {"default": expected, "full": expected + class_token}


@pytest.mark.parametrize("text", sorted(TEXT_CONFIGS))
@pytest.mark.parametrize("vision", sorted(VISION_CONFIGS))
def test_a_saved_config_reads_back_equal(text, vision, tmp_path):
    config = tiny_config(text, vision, vision_feature_layer=-1, vision_feature_select_strategy="full")
    config.save_pretrained(tmp_path)
    for again in (SaisaConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(again) is SaisaConfig
        left, right = again.to_dict(), config.to_dict()
        for values in (left, right):
            for part in (values, values["text_config"], values["vision_config"]):
                for where_from in ("transformers_version", "_name_or_path"):
                    part.pop(where_from, None)
        assert left == right


def test_the_file_has_the_rotary_settings_in_both_forms(tmp_path):
    config = SaisaConfig(text_config=LlamaConfig(vocab_size=32064, rope_theta=5e5, rope_scaling=dict(LLAMA_3)))
    config.save_pretrained(tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert text["rope_theta"] == 5e5 and text["rope_scaling"] == LLAMA_3
    assert text["rope_parameters"] == {"rope_theta": 5e5, **LLAMA_3}


@pytest.mark.parametrize("form", ["4.57", "5.x", "both"])
def test_rotary_settings_of_either_form_are_read(form):
    old = {"rope_theta": 5e5, "rope_scaling": dict(LLAMA_3)}
    new = {"rope_parameters": {"rope_theta": 5e5, **LLAMA_3}}
    given = {"4.57": old, "5.x": new, "both": {**old, **new}}[form]
    text = SaisaConfig(text_config={"model_type": "llama", "vocab_size": 32064, **given}).text_config
    if TRANSFORMERS_5:
        assert text.rope_parameters["rope_theta"] == 5e5 and text.rope_parameters["factor"] == 8.0
    else:
        assert text.rope_theta == 5e5 and text.rope_scaling["factor"] == 8.0


def test_the_forms_of_the_rotary_settings_turn_into_each_other():
    for scaling in (None, LLAMA_3, {"type": "linear", "factor": 2.0}):
        portable = portable_config_dict({"rope_theta": 7.0, "rope_scaling": scaling})
        new_only = portable_config_dict({"rope_parameters": portable["rope_parameters"]})
        assert new_only["rope_theta"] == 7.0
        kind = (scaling or {}).get("rope_type") or (scaling or {}).get("type") or "default"
        assert new_only["rope_parameters"]["rope_type"] == kind
        assert (new_only["rope_scaling"] or {}).get("factor") == (scaling or {}).get("factor")
        assert readable_config_dict(portable) == readable_config_dict(readable_config_dict(portable))


def test_the_alias_of_the_image_token_is_read_and_written_once(tmp_path):
    config = SaisaConfig(image_token_index=7)
    assert config.image_token_id == 7
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["image_token_id"] == 7 and "image_token_index" not in saved


def test_tied_embeddings_follow_the_language_model_unless_said_otherwise():
    tied = Qwen3Config(vocab_size=32064, tie_word_embeddings=True)
    assert SaisaConfig(text_config=tied).tie_word_embeddings is True
    config = SaisaConfig(text_config=tied.to_dict(), tie_word_embeddings=False)
    assert config.tie_word_embeddings is config.text_config.tie_word_embeddings is False


def test_sub_configs_may_be_objects_or_dicts():
    text, vision = (
        LlamaConfig(vocab_size=32064, hidden_size=64, num_attention_heads=4),
        CLIPVisionConfig(image_size=28, patch_size=14),
    )
    from_objects = SaisaConfig(vision_config=vision, text_config=text)
    from_dicts = SaisaConfig(vision_config=vision.to_dict(), text_config=text.to_dict())
    assert from_objects.to_dict() == from_dicts.to_dict()


def test_a_saved_config_has_all_code_files_and_auto_classes(tmp_path):
    SaisaConfig().save_pretrained(tmp_path)
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {
        *("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"),
        *("AutoModelForPreTraining", "AutoModelForVision2Seq", "AutoProcessor"),
    }
    for reference in auto_map.values():
        module, name = reference.split(".")
        assert f"class {name}(" in (tmp_path / f"{module}.py").read_text()


def test_an_encoder_that_is_registered_later_is_known():
    class LateConfig(ViTConfig):
        model_type = "late_vit"

    class LateModel(ViTModel):
        config_class = LateConfig

    AutoConfig.register("late_vit", LateConfig)
    AutoModel.register(LateConfig, LateModel)
    small = {
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "image_size": 32,
    }
    assert SaisaConfig(LateConfig(**small), {"vocab_size": 32064}).image_seq_length == 4
    assert SaisaConfig({"model_type": "late_vit", **small}).vision_feature_size == 8
