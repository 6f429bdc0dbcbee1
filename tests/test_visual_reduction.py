"""Fewer visual tokens: each reduction is what it says, all downstream follows, and it is trained, saved and counted."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_build import encoder, language_model, parts_on_disk
from test_chat import tiny_processor
from test_flops import counted_and_formula
from tiny_models import (
    IMAGE_TOKEN,
    OTHER_VISION_CONFIGS,
    VISION_CONFIGS,
    prompts_from_rows,
    tiny_config,
    tiny_model,
    vision_features,
)
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    ConvNextImageProcessor,
    Siglip2ImageProcessor,
)

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration, SaisaProcessor, attend
from saisa_hf.cli import main
from saisa_hf.common.tables import table
from saisa_hf.costs.flops import Step, account, training_flops
from saisa_hf.training import add_lora, freeze_all_but
from saisa_hf.training.throughput import StepFlops
from saisa_hf.vision_saisa import REDUCTIONS, class_attention


# the encoder's 5 x 5 or 4 x 4 patches, and what is left of them
KINDS = {
    "avg_pool": ({}, 9, 4),
    "pixel_unshuffle": ({}, 9, 4),
    "resampler": ({"reduced_visual_tokens": 7}, 7, 7),
    "class_attention": ({"reduced_visual_tokens": 7}, 7, 7),
}
ROWS = [[1, 5, 6], [1, "image", 8, 9], [1, 5, "image", 6, "image", 7, 8]]


def vision(name="clip", size=20):
    config = (VISION_CONFIGS | OTHER_VISION_CONFIGS)[name]()
    config.image_size = size
    return config


def settings_of(kind):
    return {"visual_token_reduction": kind, **KINDS[kind][0]}


def model_with(kind, size=20, name="clip", **settings):
    return tiny_model("qwen3", vision(name, size), vision_seq_length=None, **settings_of(kind) | settings)


def prompts_for(model, size=20, rows=ROWS, **options):
    return prompts_from_rows(rows, image_size=size, seq_length=model.config.image_seq_length, **options)


@torch.no_grad()
def features_before_and_behind(model, size):
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    return vision_features(model, pixels), model.get_image_features(pixels, return_dict=True).pooler_output, pixels


# --- what they compute ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [4, 5])
def test_cells_of_two_by_two_are_averaged_or_put_side_by_side(side):
    """By hand, cell by cell; at an odd edge the mean is of what there is, and zeros stand beside it."""
    for kind in ("avg_pool", "pixel_unshuffle"):
        model = model_with(kind, size=4 * side)
        before, behind, _ = features_before_and_behind(model, 4 * side)
        assert behind.shape == (2, 9 if side == 5 else 4, 96 if kind == "pixel_unshuffle" else 24)
        assert model.config.vision_feature_size == behind.shape[-1]
        token = 0
        for row in range(0, side, 2):
            for column in range(0, side, 2):
                cell = [(row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)]
                there = [before[:, y * side + x] if y < side > x else None for y, x in cell]
                if kind == "avg_pool":
                    expected = torch.stack([x for x in there if x is not None]).mean(0)
                else:
                    expected = torch.cat([torch.zeros(2, 24) if x is None else x for x in there], dim=-1)
                torch.testing.assert_close(behind[:, token], expected)
                token += 1


@pytest.mark.parametrize("name", ["clip", "dinov2", "registers", "vit"])
@pytest.mark.parametrize("layer", [-2, -1, 1])
def test_the_patches_kept_are_those_that_eager_attention_says(name, layer):
    model = model_with("class_attention", name=name, vision_feature_layer=layer)
    tower, prefix = model.vision_tower, model.config.vision_prefix_tokens
    assert tower.config._attn_implementation == "sdpa"
    _, behind, pixels = features_before_and_behind(model, 20)
    with torch.no_grad():
        states = tower(pixels, output_hidden_states=True).hidden_states
        found = class_attention(tower, model.config, states)
        model.set_attn_implementation("eager")
        attentions = tower(pixels, output_attentions=True).attentions
    # state i is what layer i - 1 makes; -1 is the last of both
    expected = attentions[layer if layer < 0 else layer - 1][:, :, 0].mean(1)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    patches = states[layer][:, prefix:]
    for picture in range(2):
        best = sorted(expected[picture, prefix:].topk(7).indices.tolist())
        assert best != list(range(7))
        assert torch.equal(behind[picture], patches[picture, best])


def test_a_resampler_is_cross_attention_with_a_residual():
    model = model_with("resampler", vision_feature_layer=[-2, -1])
    before, behind, _ = features_before_and_behind(model, 20)
    part = model.model.visual_resampler.double()
    with torch.no_grad():
        normed = part.feature_norm(before.double())
        queries = part.q_proj(part.query_norm(part.queries.weight)).view(7, 2, 24)
        keys, values = (projection(normed).view(2, 25, 2, 24) for projection in (part.k_proj, part.v_proj))
        weights = (torch.einsum("rnh,ivnh->inrv", queries, keys) / 24**0.5).softmax(-1)
        read = torch.einsum("inrv,ivnh->irnh", weights, values).flatten(2)
        expected = part.queries.weight + part.o_proj(read)
    torch.testing.assert_close(behind.double(), expected, atol=1e-5, rtol=1e-5)


# --- everything downstream follows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REDUCTIONS)
@pytest.mark.parametrize("size, number", [(20, 1), (16, 2)])
def test_placeholders_and_features_are_as_many(kind, size, number):
    expected, model = KINDS[kind][number], model_with(kind, size=size)
    tokenizer = tiny_processor().tokenizer
    pictures = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    processor = SaisaProcessor(pictures, tokenizer, 4, "default", 1, **settings_of(kind))
    inputs = processor(images=[Image.new("RGB", (30, 40))] * 2, text="<image>ab<image>c", return_tensors="pt")
    assert model.config.image_seq_length == expected
    assert int((inputs["input_ids"] == IMAGE_TOKEN).sum()) == 2 * expected
    assert model.get_visual_states(inputs["pixel_values"]).lengths == [expected] * 2
    assert model(**inputs).logits.isfinite().all()


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_batches_beams_states_and_saved_models_agree(kind, tmp_path):
    model = model_with(kind)
    prompts = prompts_for(model)
    with torch.no_grad():
        logits = model(**prompts.inputs).logits
        for row in (1, 2):
            alone = model(**prompts.row(row).inputs).logits[0]
            torch.testing.assert_close(logits[row][prompts.attention_mask[row].bool()], alone, atol=2e-5, rtol=0)
        changed = model(**prompts.inputs | {"pixel_values": prompts.pixel_values.flip(0)}).logits
        assert not torch.isclose(logits[1:, -1], changed[1:, -1]).all()
        states = model.get_visual_states(prompts.pixel_values)
        given = {name: value for name, value in prompts.inputs.items() if name != "pixel_values"}
        torch.testing.assert_close(model(**given, visual_states=states).logits, logits, atol=1e-5, rtol=0)
    options = {"max_new_tokens": 4, "do_sample": False}
    written = model.generate(**prompts.prompt, num_beams=3, **options)
    model.save_pretrained(tmp_path)
    for code in (False, True):
        again = AutoModelForImageTextToText.from_pretrained(tmp_path, trust_remote_code=code)
        assert again.config.visual_token_reduction == kind
        with torch.no_grad():
            assert torch.equal(again(**prompts.inputs).logits, logits)
        assert torch.equal(again.generate(**prompts.prompt, num_beams=3, **options), written)
    if kind == "resampler":
        with torch.no_grad():
            model.model.visual_resampler.queries.weight += 1
        with pytest.raises(ValueError, match="other weights"):
            model(**given, visual_states=states)
    assert any("visual_resampler" in name for name in model.state_dict()) == (kind == "resampler")


@pytest.mark.parametrize("kind", ["avg_pool", "pixel_unshuffle", "resampler"])
def test_pictures_of_any_shape_are_reduced_one_by_one(kind):
    processor = tiny_processor()
    made = {"visual_token_reduction": kind, **KINDS[kind][0]}
    pictures = Siglip2ImageProcessor(patch_size=4, max_num_patches=16)
    processor = SaisaProcessor(pictures, processor.tokenizer, 4, "full", 0, **made)
    model = tiny_model("llama", "siglip2", vision_seq_length=None, vision_feature_select_strategy="full", **made)
    sizes = [(40, 40), (20, 80), (80, 20)]  # 4 x 4, 8 x 2 and 2 x 8 patches
    noise = [Image.effect_noise(size, 80).convert("RGB") for size in sizes]
    inputs = processor(images=noise, text="<image>a<image>b<image>c", return_tensors="pt")
    alone = [processor(images=[picture], return_tensors="pt") for picture in noise]
    with torch.no_grad():
        together = model.get_image_features(
            **{name: x for name, x in inputs.items() if name not in ("input_ids", "attention_mask")}
        ).pooler_output
        for mine, one in zip(together, alone):
            torch.testing.assert_close(mine, model.get_image_features(**one).pooler_output[0], atol=1e-5, rtol=0)
    lengths = [len(picture) for picture in together]
    assert int((inputs["input_ids"] == IMAGE_TOKEN).sum()) == sum(lengths)
    assert set(lengths) == {7 if kind == "resampler" else 4}
    assert model.generate(**inputs, max_new_tokens=3, num_beams=2).shape[1] == inputs["input_ids"].shape[1] + 3


def test_feature_maps_are_pooled_as_the_maps_they_are():
    model = tiny_model("llama", "convnext", vision_seq_length=None, visual_token_reduction="avg_pool")
    assert model.config.image_seq_length == 4  # of 4 x 4
    pictures = ConvNextImageProcessor(size={"shortest_edge": 16}, crop_pct=1.0)
    processor = SaisaProcessor(pictures, tiny_processor().tokenizer, image_seq_length=4)
    inputs = processor(images=Image.effect_noise((20, 20), 80).convert("RGB"), text="<image>ab", return_tensors="pt")
    with torch.no_grad():
        state = model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
        found = model.get_image_features(inputs["pixel_values"]).pooler_output
        expected = state.unflatten(2, (2, 2)).unflatten(4, (2, 2)).mean((3, 5)).flatten(2).transpose(1, 2)
        torch.testing.assert_close(found, expected)
        assert model(**inputs).logits.isfinite().all()


# --- training ---------------------------------------------------------------------------------------------------------


def batch_for(model):
    prompts = prompts_for(model)
    return {**prompts.inputs, "labels": prompts.input_ids.masked_fill(~prompts.text, -100)}


@pytest.mark.parametrize("sharing", ["shared", "per_layer"])
def test_the_first_stage_trains_the_resampler_with_the_projectors(sharing):
    model = model_with("resampler", projector_sharing=sharing).train()
    names = freeze_all_but(model, "projectors")
    assert {name.split(".")[1] for name in names if "language_model" not in name} >= {"visual_resampler"}
    assert all("visual_projector" in name or "visual_resampler" in name for name in names)
    batch, losses = batch_for(model), []
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        if not losses:
            assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "visual_resampler" in name
                       and not name.endswith("k_proj.bias"))  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1


def test_a_batch_of_text_gives_the_resampler_gradients_of_zero():
    model = model_with("resampler").train()
    freeze_all_but(model, "projectors+language_model")
    batch = batch_for(model)
    text = {name: batch[name][:1] for name in ("input_ids", "labels", "attention_mask")}
    model(**text, pixel_values=batch["pixel_values"][:0]).loss.backward()
    found = [p.grad for name, p in model.named_parameters() if "visual_resampler" in name]
    assert len(found) == 13 and all(grad is not None and torch.count_nonzero(grad) == 0 for grad in found)


def test_adapters_go_on_the_resampler_too():
    pytest.importorskip("peft")
    adapted = {name for name, _ in add_lora(model_with("resampler"), 2).named_parameters() if "lora_A" in name}
    assert sum("visual_resampler" in name for name in adapted) == 4


# --- models from parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_a_model_from_parts_has_new_and_finite_weights(kind):
    counted = {"reduced_visual_tokens": 3} if KINDS[kind][0] else {}
    arguments = {"visual_token_reduction": kind, **counted}
    models = [SaisaForConditionalGeneration.from_parts(language_model(), encoder(), **arguments) for _ in range(2)]
    assert all(p.isfinite().all() and not p.is_meta for p in models[0].parameters())
    prompts = prompts_from_rows([[1, "image", 4, 5]], seq_length=models[0].config.image_seq_length)
    ids = prompts.input_ids.masked_fill(prompts.visual, models[0].config.image_token_id)
    assert models[0](ids, prompts.pixel_values).logits.isfinite().all()
    new = [name for name, p in models[0].named_parameters() if not torch.equal(p, models[1].get_parameter(name))]
    assert all("visual_projector" in name or "visual_resampler" in name for name in new)
    assert any("visual_resampler.k_proj.weight" in name for name in new) == (kind == "resampler")


@pytest.mark.parametrize("attention", ["full", "none"])
@pytest.mark.parametrize("kind", REDUCTIONS)
def test_visual_tokens_that_travel_through_the_layers_may_be_fewer_as_well(kind, attention):
    model = model_with(kind, alignment="embedding_space", visual_attention=attention)
    prompts = prompts_for(model)
    with torch.no_grad():
        logits = model(**prompts.inputs).logits
        states = model.get_visual_states(prompts.pixel_values)
        given = {name: value for name, value in prompts.inputs.items() if name != "pixel_values"}
        torch.testing.assert_close(model(**given, visual_states=states).logits, logits, atol=1e-5, rtol=0)
        alone = model(**prompts.row(2).inputs).logits[0]
    torch.testing.assert_close(logits[2][prompts.attention_mask[2].bool()], alone, atol=2e-5, rtol=0)


def test_visual_states_of_another_reduction_are_refused_though_all_weights_are_the_same():
    averaged, first = model_with("avg_pool"), model_with("class_attention", reduced_visual_tokens=1)
    first.load_state_dict(averaged.state_dict())
    for store in ("features", "keys_values"):
        assert averaged.model.visual_fingerprint(store) != first.model.visual_fingerprint(store)


def test_a_checkpoint_without_its_resampler_is_refused(tmp_path):
    model = model_with("resampler")
    kept = {name: x for name, x in model.state_dict().items() if "visual_resampler.k_proj" not in name}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(ValueError, match=r"lacks 2 of the model's tensors: model\.visual_resampler\.k_proj"):
        SaisaForConditionalGeneration.from_pretrained(tmp_path)


def test_another_reduction_asked_for_at_loading_is_checked_and_counted(tmp_path):
    model = tiny_model("qwen3", vision(size=20), vision_seq_length=None)
    model.save_pretrained(tmp_path)
    for kind in ("avg_pool", "class_attention"):
        again = SaisaForConditionalGeneration.from_pretrained(tmp_path, **settings_of(kind))
        assert again.config.image_seq_length == KINDS[kind][1] < model.config.image_seq_length
    with pytest.raises(ValueError, match="'avgpool' is not supported"):
        SaisaForConditionalGeneration.from_pretrained(tmp_path, visual_token_reduction="avgpool")
    with pytest.raises(ValueError, match="lacks"):
        SaisaForConditionalGeneration.from_pretrained(tmp_path, **settings_of("resampler"))


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_saisa_build_writes_model_and_processor_that_fit(kind, tmp_path, capsys):
    parts, counted = parts_on_disk(tmp_path), ["--reduced-visual-tokens", "2"] if KINDS[kind][0] else []
    command = ["build", *map(str, parts), str(tmp_path / "out"), "--visual-token-reduction", kind, *counted]
    assert main(command) == 0, capsys.readouterr().err
    model = SaisaForConditionalGeneration.from_pretrained(tmp_path / "out")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    tokens = 2 if counted else 1  # of 2 x 2 patches
    assert (processor.visual_token_reduction, processor.image_seq_length) == (kind, tokens)
    assert model.config.image_seq_length == tokens
    inputs = processor(images=Image.new("RGB", (9, 9)), text="<image> word1", return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2
    whole = {"visual_token_reduction": None, "reduced_visual_tokens": None}
    patches = AutoProcessor.from_pretrained(tmp_path / "out", **whole)(
        images=Image.new("RGB", (9, 9)), text="<image> word1", return_tensors="pt"
    )
    assert (patches["input_ids"] == model.config.image_token_id).sum() == model.config.encoder_tokens_per_image > tokens


# --- cost -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ["shared", "per_layer"])
@pytest.mark.parametrize("kind", REDUCTIONS)
def test_a_prompt_costs_what_pytorch_counts(kind, sharing):
    model = model_with(kind, projector_sharing=sharing, attn_implementation="eager")
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch does not count the fused one of a CPU
        counted, formula = counted_and_formula(model)
    assert formula == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("trained", ["projectors", "projectors+language_model", "lora"])
@pytest.mark.parametrize("kind", REDUCTIONS)
def test_a_training_step_costs_what_pytorch_counts(kind, trained):
    model = model_with(kind, attn_implementation="eager").train()
    if trained == "lora":
        pytest.importorskip("peft")
        model = add_lora(model, 4)
    else:
        freeze_all_but(model, trained)
    prompts = prompts_from_rows([[1, "image", 5, 6, 7, 8]] * 2, image_size=20, seq_length=model.config.image_seq_length)
    batch = {**prompts.inputs, "labels": prompts.input_ids.masked_fill(~prompts.text, -100)}
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(**batch, skip_logits=True, use_cache=False).loss.backward()
    step = StepFlops(model)
    assert step(step.counts(batch)) == pytest.approx(counter.get_total_flops(), rel=0.02)
    named = {"projectors": "projectors", "lora": "lora"}.get(trained, "full")
    with FlopCounterMode(display=False) as encoding, torch.no_grad():
        model.vision_tower(prompts.pixel_values)
    visual = model.config.image_seq_length
    formula = training_flops(model.config, "saisa", Step(5, visual, batch=2, logits=3), named, rank=4)
    tower = encoding.get_total_flops()
    if kind == "class_attention":
        tower += 2 * (2 * 27 * 24 * 24 + 2 * 26 * 24)
    assert formula + tower == pytest.approx(counter.get_total_flops(), rel=0.01)


def test_saisa_flops_counts_a_preset_with_a_reduction(capsys):
    found = {}
    for kind in ("none", *REDUCTIONS):
        counted = ["--reduced-visual-tokens", "64"] if kind in ("resampler", "class_attention") else []
        options = [] if kind == "none" else ["--visual-token-reduction", kind, *counted]
        assert main(["flops", "vicuna-7b", "--json", *options]) == 0
        found[kind] = json.loads(capsys.readouterr().out)
    assert [found[kind]["visual"] for kind in found] == [576, 144, 144, 64, 64]
    whole, pooled = (found[kind]["saisa"]["prompt"] for kind in ("none", "avg_pool"))
    assert pooled["projectors"] * 4 == whole["projectors"] and pooled["encoder"] == whole["encoder"]
    extra = found["resampler"]["saisa"]["prompt"]["encoder"] - whole["encoder"]
    assert extra == 2 * 1024**2 * (64 + 576 + 576 + 64) + 4 * 64 * 576 * 1024
    assert found["resampler"]["llava"]["prompt"]["encoder"] - whole["encoder"] == extra
    added = found["resampler"]["saisa"]["parameters"]["encoder"] - found["none"]["saisa"]["parameters"]["encoder"]
    assert added == 4 * (1024**2 + 1024) + 64 * 1024 + 4 * 1024
    config = tiny_config("llama", vision(), None, **settings_of("class_attention"))
    assert account(config, Step(4, 14))["saisa"]["prompt"]["encoder"] > 0


def costs(capsys):
    """The table of the page, from what `saisa flops` says; and the encoder's TFLOPs."""
    rows, encoder = [], 0
    choices = [("none", None), ("avg_pool", None), ("pixel_unshuffle", None)]
    choices += [(kind, n) for kind in ("resampler", "class_attention") for n in (64, 144)]
    for kind, count in choices:
        options = [] if kind == "none" else ["--visual-token-reduction", kind]
        options += [] if count is None else ["--reduced-visual-tokens", str(count)]
        assert main(["flops", "vicuna-7b", "--json", *options]) == 0
        found = json.loads(capsys.readouterr().out)
        saisa, llava = found["saisa"], found["llava"]
        encoder = encoder or saisa["prompt"]["encoder"]
        numbers = [saisa["prompt"]["encoder"] - encoder, saisa["language_model"], llava["language_model"]]
        name = kind if count is None else f"{kind}, n = {count}"
        rows.append([name, str(found["visual"]), *(f"{number / 1e12:.3f}" for number in numbers)])
        rows[-1] += [f"{saisa['cache_bytes'] / 2**20:.0f}", f"{saisa['parameters']['projectors'] / 1e6:.0f}"]
    head = ["", "visual tokens", "TFLOPs of the reduction", "SAISA's language model", "LLaVA's", "MiB of cache"]
    return table([*head, "million parameters in projectors"], rows), f"{encoder / 1e12:.2f}"


def test_the_costs_on_the_page_are_those_that_saisa_flops_tells(capsys):
    page = (Path(__file__).parent.parent / "docs" / "token_reduction.md").read_text()
    expected, encoder = costs(capsys)
    assert f"<!-- costs: start -->\n{expected}\n<!-- costs: end -->" in page
    assert f"The encoder takes {encoder} TFLOPs" in page


# --- attention maps ---------------------------------------------------------------------------------------------------


def test_attention_maps_lie_in_the_grid_of_what_is_left():
    pictures = CLIPImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 20, "width": 20})
    tokenizer, template = tiny_processor().tokenizer, tiny_processor().chat_template
    picture = Image.effect_noise((100, 100), 90).convert("RGB")
    for kind, grid, edge in (
        ("avg_pool", (3, 3), 120),
        ("pixel_unshuffle", (3, 3), 120),
        ("class_attention", (5, 5), 100),
    ):
        made = settings_of(kind)
        processor = SaisaProcessor(pictures, tokenizer, 4, "default", 1, chat_template=template, **made)
        model = model_with(kind)
        found = attend(model, processor, picture, "abc", max_new_tokens=8).pictures[0]
        assert found.weights.shape[2:] == grid and abs(found.box[2] - edge) < 2
        if kind == "class_attention":
            pixels = processor(images=picture, return_tensors="pt")["pixel_values"]
            kept = model.get_image_features(pixels, return_dict=True).kept_tokens[0].tolist()
            there = found.weights.sum((0, 1)).flatten().nonzero()[0].tolist()
            assert there == kept and len(kept) == 7
    processor = SaisaProcessor(pictures, tokenizer, 4, "default", 1, chat_template=template, **settings_of("resampler"))
    with pytest.raises(ValueError, match="learned queries"):
        attend(model_with("resampler"), processor, picture, "abc", max_new_tokens=2)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, settings, message",
    [
        (
            "clip",
            {"visual_token_reduction": "max_pool"},
            "visual_token_reduction='max_pool' is not supported.*'avg_pool'",
        ),
        ("clip", {"visual_token_reduction": "resampler"}, "reduced_visual_tokens=None.*needs the number"),
        ("clip", {"visual_token_reduction": "resampler", "reduced_visual_tokens": 0}, "reduced_visual_tokens=0"),
        ("clip", {"visual_token_reduction": "avg_pool", "reduced_visual_tokens": 4}, "goes with .*not with 'avg_pool'"),
        (
            "clip",
            {"visual_token_reduction": "resampler", "reduced_visual_tokens": 3, "vision_seq_length": 4},
            "image_seq_length=4, but reduced_visual_tokens=3",
        ),
        ("clip", {"reduced_visual_tokens": 4}, "not with None: leave it out"),
        ("clip", {"visual_token_reduction": "avg_pool", "vision_feature_select_strategy": "full"}, "1 tokens of clip"),
        (
            "siglip",
            {"visual_token_reduction": "class_attention", "reduced_visual_tokens": 2},
            "siglip_vision_model has not",
        ),
        ("convnext", {"visual_token_reduction": "class_attention", "reduced_visual_tokens": 2}, "convnext has not"),
        (
            "clip",
            {"visual_token_reduction": "class_attention", "reduced_visual_tokens": 2, "vision_feature_layer": [-2, -1]},
            "choose one layer",
        ),
        (
            "clip",
            {"visual_token_reduction": "class_attention", "reduced_visual_tokens": 2, "vision_feature_layer": 0},
            "not the embeddings",
        ),
        ("clip", {"visual_token_reduction": "class_attention", "reduced_visual_tokens": 5}, "makes 4 of an image"),
    ],
)
def test_settings_that_do_not_fit_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("llama", name, **{"vision_seq_length": None} | settings)


def test_the_processor_refuses_what_the_config_refuses():
    made = tiny_processor()
    with pytest.raises(ValueError, match="visual_token_reduction='pool'"):
        SaisaProcessor(made.image_processor, made.tokenizer, 4, visual_token_reduction="pool")


def test_a_config_without_reduction_is_what_it_was():
    config = SaisaConfig()
    assert (
        config.visual_token_reduction is None and config.image_seq_length == 576 and config.vision_feature_size == 1024
    )
    assert tiny_model().get_image_features(torch.zeros(1, 3, 8, 8)).kept_tokens is None
