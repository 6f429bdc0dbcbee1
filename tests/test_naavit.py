"""NAAViT on transformers' own LLaVA, and the layer contribution of its visual tokens."""

import copy
import json
import re

import pytest
import torch
from test_embedding_space import make_llava
from test_from_llava import draw, make_processor
from test_from_llava import make_llava as llava_for_pictures
from tiny_models import BOS, IMAGE_TOKEN, ROWS, prompts_from_rows, random_prompts, tiny_model
from transformers import LlamaForCausalLM

import saisa_hf
from saisa_hf import SaisaForConditionalGeneration, apply_naavit
from saisa_hf.cli import main
from saisa_hf.inspection.redundancy import KINDS, contributions, redundancy, show


LAYERS = 3
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def hooks_of(model):
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


def switches(layers, visual_feed_forward):
    """The settings of the family for what `apply_naavit` is asked for."""
    chosen = range(LAYERS) if layers is None else layers
    attention = ["none" if layer in chosen else "full" for layer in range(LAYERS)]
    return {
        "visual_attention": attention,
        "visual_feed_forward": [visual_feed_forward or layer not in chosen for layer in range(LAYERS)],
    }


@pytest.mark.parametrize("text", ["llama_biases", "mistral", "qwen2"])
@pytest.mark.parametrize(
    ("layers", "visual_feed_forward"), [(None, True), (None, False), ([1], True), ([0, 2], False)], ids=str
)
@torch.no_grad()
def test_it_makes_a_llava_the_family_member_with_the_same_weights_and_back(text, layers, visual_feed_forward, tmp_path):
    llava = make_llava(text)
    llava.save_pretrained(tmp_path)
    wanted = switches(layers, visual_feed_forward)
    model = SaisaForConditionalGeneration.from_pretrained(tmp_path, **wanted).eval()
    cases = [random_prompts(seed=4, side=side) for side in ("left", "right")]
    before = [llava(**prompts.inputs).logits for prompts in cases]
    hooks = hooks_of(llava)  # transformers 5 hangs in some of its own at the first pass
    with apply_naavit(llava, layers, visual_feed_forward):
        for prompts, untouched in zip(cases, before, strict=True):
            real = prompts.attention_mask.bool()
            changed = llava(**prompts.inputs).logits
            torch.testing.assert_close(changed[real], model(**prompts.inputs).logits[real], rtol=0, atol=1e-5)
            assert not torch.allclose(changed[real], untouched[real], atol=1e-2)
        prompts = cases[0]
        answer = llava.generate(**prompts.prompt, **GREEDY, suppress_tokens=[IMAGE_TOKEN])
        assert torch.equal(answer, model.generate(**prompts.prompt, **GREEDY))
        embedded = prompts.inputs | {"inputs_embeds": llava.get_input_embeddings()(prompts.input_ids)}
        del embedded["input_ids"]
        assert torch.equal(llava(**embedded).logits, llava(**prompts.inputs).logits)
    for prompts, untouched in zip(cases, before, strict=True):
        assert torch.equal(llava(**prompts.inputs).logits, untouched)
    assert hooks_of(llava) == hooks


def test_a_decoder_that_is_called_by_itself_has_no_visual_tokens_left_from_before():
    llava, prompts = make_llava("llama").train(), prompts_from_rows(ROWS)
    words = llava.get_input_embeddings()(torch.tensor([[BOS, 5, 6]])).detach()
    before = llava.model.language_model(inputs_embeds=words).last_hidden_state
    with apply_naavit(llava):
        llava(**prompts.inputs, use_cache=False)  # with gradients, for which checkpointing may run the layers again
        assert torch.equal(llava.model.language_model(inputs_embeds=words).last_hidden_state, before)


def test_text_alone_is_left_as_it_is_and_gradients_under_checkpointing_are_those_without():
    llava, prompts = make_llava("llama").train(), prompts_from_rows(ROWS)
    text = torch.tensor([[BOS, 5, IMAGE_TOKEN, 6]])  # without a picture its token is a word
    before = llava(input_ids=text).logits
    handle, grads = apply_naavit(llava), []
    assert torch.equal(llava(input_ids=text).logits, before)
    for checkpointing in (False, True):
        if checkpointing:
            llava.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        llava.zero_grad()
        llava(**prompts.inputs, labels=prompts.input_ids, use_cache=False).loss.backward()
        grads.append({name: p.grad.clone() for name, p in llava.named_parameters() if p.grad is not None})
    handle.remove()
    assert grads[0].keys() == grads[1].keys()
    for name, gradient in grads[0].items():
        torch.testing.assert_close(grads[1][name], gradient, rtol=0, atol=1e-6, msg=name)


@torch.no_grad()
def test_of_a_llava_next_all_visual_tokens_tiles_and_newlines_keep_their_hidden_state():
    llava, processor = llava_for_pictures(next_=True), make_processor(next_=True)
    inputs = processor(images=draw(0, (60, 40)), text="<image>\nwhich digit is this?", return_tensors="pt")
    visual = inputs["input_ids"] == llava.config.image_token_id
    states = []
    with apply_naavit(llava, visual_feed_forward=False):
        decoder = llava.model.language_model
        hooks = [
            layer.register_forward_hook(lambda module, args, output: states.append((args, output)))
            for layer in decoder.layers
        ]
        llava(**inputs)
        for hook in hooks:
            hook.remove()
    assert visual.sum() > 32 and len(states) == len(decoder.layers)
    for (entering, *_), leaving in states:
        leaving = leaving[0] if isinstance(leaving, tuple) else leaving
        assert torch.equal(entering[visual], leaving[visual])
        assert (entering[~visual] != leaving[~visual]).any(-1).all()


@pytest.mark.parametrize(
    ("make", "arguments", "message"),
    [
        (tiny_model, {}, r"model is a SaisaForConditionalGeneration \(model_type='saisa'\): expected a Llava"),
        (lambda: LlamaForCausalLM(make_llava().config.text_config), {}, r"LlamaForCausalLM \(model_type='llama'\)"),
        (make_llava, {"layers": [3]}, r"layers=\[3\]: expected distinct decoder layers between 0 and 2"),
        (make_llava, {"layers": [1, 1]}, r"layers=\[1, 1\]"),
        (lambda: make_llava("mixtral"), {}, "language model of this llava is a mixtral: expected.*mlp"),
    ],
)
def test_what_does_not_fit_is_refused(make, arguments, message):
    model = make()
    if model.config.model_type == "llava" and model.config.text_config.model_type == "mixtral":
        for layer in model.model.language_model.layers:  # in 4.57 as it is
            layer.some_moe = layer._modules.pop("mlp", None)
    hooks = hooks_of(model)
    with pytest.raises(ValueError, match=message):
        apply_naavit(model, **arguments)
    assert hooks_of(model) == hooks


# --- layer contributions ----------------------------------------------------------------------------------------------


@torch.no_grad()
def test_contributions_are_the_divergences_from_the_family_members_distributions(tmp_path):
    llava, prompts = make_llava("mistral"), prompts_from_rows([[BOS, "image", 5, 6], [BOS, 7, "image", 8]])
    llava.save_pretrained(tmp_path)
    expected = llava(**prompts.inputs).logits[:, -1].double().softmax(-1)
    found = contributions(llava, prompts.inputs)
    assert found.shape == (LAYERS, 3)
    for layer in range(LAYERS):
        none, fed = switches([layer], False).values()
        for kind, changed in enumerate(
            (
                {"visual_attention": none},
                {"visual_feed_forward": fed},
                {"visual_attention": none, "visual_feed_forward": fed},
            )
        ):
            model = SaisaForConditionalGeneration.from_pretrained(tmp_path, **changed).eval()
            moved = model(**prompts.inputs).logits[:, -1].double().softmax(-1)
            divergence = (expected * (expected / moved).log()).sum(-1).mean()
            assert found[layer, kind].item() == pytest.approx(divergence.item(), rel=1e-2, abs=1e-9)
    # behind the last layer no visual token is read; in front of it all are
    assert (found[-1] == 0).all() and (found[:-1] > 1e-6).all()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("redundancy")
    llava_for_pictures().save_pretrained(folder / "llava")
    make_processor().save_pretrained(folder / "llava")
    (folder / "pictures").mkdir()
    for number in range(3):
        draw(number).save(folder / "pictures" / f"{number}.png")
    return folder


def test_the_command_prints_the_mean_over_the_pictures_and_draws_it(folders, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    argv = ["redundancy", str(folders / "llava"), "--images", str(folders / "pictures"), "--pictures", "2"]
    argv += ["--device", "cpu", "--prompt", "is there a 3?"]
    assert main([*argv, "--json", "--plot", str(tmp_path / "layers.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (tmp_path / "layers.png").read_bytes().startswith(b"\x89PNG")
    assert found["pictures"] == 2 and "is there a 3?" in found["prompt"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert printed.strip() == show(found).strip()
    assert f"{found['layers'][0]['both']:.3e}" in printed
    llava, processor = llava_for_pictures(), make_processor()
    each = [redundancy(llava, processor, [draw(number)], "is there a 3?") for number in range(2)]
    for layer in found["layers"]:
        rows = [one["layers"][layer["layer"]] for one in each]
        for kind in ("attention", "feed_forward", "both"):
            assert layer[kind] == pytest.approx(sum(row[kind] for row in rows) / 2, rel=1e-4)
    assert found["least"] == sorted(range(len(found["layers"])), key=lambda i: found["layers"][i]["both"])


@pytest.mark.parametrize(
    ("model", "images", "message"),
    [
        ("llava", "llava", "holds no images"),
        ("llava", "nowhere", "is not a folder"),
        ("llava", "pictures --plot nowhere/layers.png", "nowhere is not a folder"),
        ("saisa", "pictures", "MODEL .* is a 'saisa': expected one of llava, llava_next\\."),
    ],
)
def test_the_command_says_what_is_wrong(folders, capsys, model, images, message):
    if model == "saisa":
        tiny_model().save_pretrained(folders / model)
        capsys.readouterr()
    images, *options = images.split()
    assert main(["redundancy", str(folders / model), "--images", str(folders / images), *options]) in (1, 2)
    error = capsys.readouterr().err
    assert error.startswith("saisa: error: ") and error.count("\n") == 1 and re.search(message, error)


def test_a_prompt_is_asked_by_the_chat_template_or_as_it_is_written():
    processor, llava = make_processor(), llava_for_pictures()
    asked = [redundancy(llava, processor, [draw(0)], prompt)["prompt"] for prompt in ("is it?", "is it? <image>")]
    assert asked[0] != asked[1] == "is it? <image>" and asked[0].count("<image>") == 1
    bare = copy.copy(processor)
    bare.chat_template = None
    assert redundancy(llava, bare, [draw(0)], "is it?")["prompt"] == "USER: <image>\nis it? ASSISTANT:"


def test_a_prompt_is_read_as_the_chat_template_reads_it():
    processor, llava = make_processor(), llava_for_pictures()
    processor.chat_template = "{{ bos_token }}" + processor.chat_template.replace("{{ bos_token }}", "")
    content = [{"type": "image", "image": draw(0)}, {"type": "text", "text": "is it?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True,
        return_tensors="pt",
    )  # fmt: skip
    assert (inputs["input_ids"] == processor.tokenizer.bos_token_id).sum() == 1
    found = redundancy(llava, processor, [draw(0)], "is it?")["layers"]
    both = contributions(llava, inputs)[:, KINDS.index("both")].tolist()
    assert [layer["both"] for layer in found] == pytest.approx(both, rel=1e-5)


def test_it_is_there_under_the_packages_name():
    assert saisa_hf.apply_naavit is apply_naavit
