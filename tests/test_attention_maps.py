"""`attend`: its weights are those of eager attention, the words' own, and lie over the right part of the picture."""

import base64
import dataclasses
import html.parser
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_chat import SCENE, demo, rendered, tiny_processor
from test_package import modules_after
from tiny_models import BOS, IMAGE_TOKEN, VISION_CONFIGS, prompts_from_rows, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitImageProcessor, CLIPImageProcessor, ConvNextImageProcessor, SiglipImageProcessor

import saisa_hf
from saisa_hf import SaisaProcessor, attend
from saisa_hf.cli import main
from saisa_hf.demo.run import CHECKPOINT
from saisa_hf.inspection import attention_maps
from saisa_hf.inspection.attention_maps import AttentionMaps, PictureMaps, grouped_words, seen_part, visual_attention
from saisa_hf.inspection.attention_pages import contact_sheet, overlay, page


sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import attention_maps as benchmark


ROOT = Path(__file__).parent.parent
ROW = [BOS, 5, "image", 6, 7, "image", "image", 8, 9, 10]


def test_the_name_is_there_and_costs_nothing_until_it_is_asked_for():
    assert saisa_hf.attend is attention_maps.attend
    assert "saisa_hf.inspection.attention_maps" not in modules_after("import saisa_hf")
    with pytest.raises(AttributeError, match="no attribute 'attends'"):
        saisa_hf.attends  # noqa: B018


# --- weights ----------------------------------------------------------------------------------------------------------


def both_ways(text, row=ROW, **settings):
    """Weights (layers, Q, V) of all text positions by `visual_attention` over sdpa, and by eager attention's outputs."""
    prompts = prompts_from_rows([row])
    visual = prompts.visual[0]
    positions = (~visual).nonzero().squeeze(1).tolist()
    inputs = {"input_ids": prompts.input_ids, "pixel_values": prompts.pixel_values}
    # transformers 4.57 leaves the softcap out of sdpa, Gemma 2's own model included
    model = tiny_model(text, attn_implementation="eager" if text == "gemma2" else "sdpa", **settings)
    found = visual_attention(model, inputs, positions)
    with torch.no_grad():
        eager = tiny_model(text, attn_implementation="eager", **settings)
        expected = eager(**inputs, output_attentions=True).attentions
    return found, torch.stack([x[0].float().mean(0)[positions][:, visual] for x in expected])


# softcap and windows: gemma2; grouped heads: all but llama; windows in part: qwen2, gemma3; no rotation: smollm3
@pytest.mark.parametrize(
    "text", ["llama", "qwen3", "mistral_window", "qwen2_window", "gemma2", "gemma3", "phi3", "granite", "smollm3"]
)
def test_weights_are_those_of_eager_attention(text):
    found, expected = both_ways(text)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found.dtype == torch.float32 and found.shape == (3, 7, 12)
    assert found[:, :2].max() == 0 and found[:, 2:].sum(-1).max() > 0.1  # text in front of a picture does not see it


def test_a_layer_that_does_not_see_pictures_gives_them_no_weight():
    found, expected = both_ways("qwen3", visual_layers=[0, 2])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found[1].abs().max() == 0 and found[0].max() > 0 and found[2].max() > 0


@pytest.mark.parametrize("attention", ["full", "none", ["full", "none", "full"]])
def test_where_visual_tokens_travel_through_the_layers_the_texts_weights_are_found(attention):
    found, expected = both_ways("qwen3", alignment="embedding_space", visual_attention=attention)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert found[:, 2:].sum(-1).max() > 0.1


def test_of_a_model_in_bfloat16_the_softmax_is_in_float32():
    found, expected = both_ways("qwen3", dtype=torch.bfloat16)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)
    assert found.dtype == torch.float32
    assert (found != found.bfloat16()).float().mean() > 0.5  # as eager's output is rounded


def test_it_is_computed_a_few_scores_at_a_time(monkeypatch):
    class Largest(TorchDispatchMode):
        """The most numbers that a softmax made."""

        most = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            output = function(*args, **(kwargs or {}))
            if "_softmax" in str(function):
                self.most = max(self.most, output.numel())
            return output

    monkeypatch.setattr(attention_maps, "SCORES_AT_ONCE", 100)
    found, expected = both_ways("llama")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    model, prompts = tiny_model("llama"), prompts_from_rows([[BOS, "image", *range(5, 80)]])
    with Largest() as largest:
        visual_attention(model, {"input_ids": prompts.input_ids, "pixel_values": prompts.pixel_values}, range(5, 80))
    assert largest.most <= 100 < 80 * 80


def test_the_model_is_left_as_it_was_even_by_an_error():
    model, prompts = tiny_model("llama"), prompts_from_rows([ROW])
    inputs = {"input_ids": prompts.input_ids, "pixel_values": prompts.pixel_values}
    with pytest.raises(ValueError, match="placeholders"):
        visual_attention(model, {**inputs, "pixel_values": prompts.pixel_values[:1]}, [0])
    visual_attention(model, inputs, [0])
    assert all(layer.self_attn.watcher is None for layer in model.language_model.layers)


@pytest.mark.parametrize("position", [2, -1, 99])
def test_a_position_that_is_no_text_tokens_is_named(position):
    prompts = prompts_from_rows([ROW])
    with pytest.raises(ValueError, match=f"positions has {position}"):
        visual_attention(tiny_model("llama"), {"input_ids": prompts.input_ids}, [position])


# --- words ------------------------------------------------------------------------------------------------------------


class Pieces:
    """A tokenizer whose ids are indices into byte strings; those of None are special."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def decode(self, ids, **_):
        return b"".join(self.pieces[i] or b"" for i in ids).decode(errors="replace")


@pytest.mark.parametrize(
    "pieces, words",
    [
        ([b"top", b" left", b" ", b"7", None], [("top", [0]), ("left", [1]), ("7", [3])]),
        ([b" El", b"ev", b"en", b",", b" twelve", b"."], [("Eleven,", [0, 1, 2]), ("twelve.", [4])]),
        ([b"na", "ï".encode()[:1], "ï".encode()[1:], b"ve"], [("naïve", [0, 1, 2, 3])]),
        (["一".encode(), "只".encode(), "猫".encode()], [("一", [0]), ("只", [1]), ("猫", [2])]),
        ([b"a", b" -", b" b", b"\n", b"c"], [("a", [0]), ("b", [2]), ("c", [4])]),
        ([None, b"...", None], []),
    ],
)
def test_tokens_are_grouped_to_the_words_of_the_text(pieces, words):
    assert grouped_words(Pieces(*pieces), list(range(len(pieces)))) == words


def test_an_answer_of_the_demo_is_attended_to_word_by_word():
    model, processor = demo()
    maps = attend(model, processor, SCENE, "Describe the picture.", max_new_tokens=3)
    assert maps.words == maps.answer.split() and maps.words[:2] == ["top", "left"] and maps.seeing == [0, 1, 2, 3]
    assert maps.pictures[0].weights.shape == (4, len(maps.words), 6, 6)
    # the same by hand: the prompt, the answer, and the row of each position in front of an answer's token
    content = [{"type": "image", "image": SCENE}, {"type": "text", "text": maps.question}]
    inputs = rendered(processor, [{"role": "user", "content": content}])
    ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    first = inputs["input_ids"].shape[1] - 1
    assert maps.positions == [[first + index] for index in range(len(maps.words))]
    pixels = {"pixel_values": inputs["pixel_values"]}
    weights = visual_attention(model, {"input_ids": ids, **pixels}, [row for (row,) in maps.positions])
    np.testing.assert_allclose(maps.pictures[0].weights.reshape(4, -1, 36), weights.numpy(), atol=1e-6)
    np.testing.assert_allclose(maps.mean(), weights.mean(0).reshape(-1, 6, 6).numpy(), atol=1e-6)


def test_a_word_of_several_tokens_has_the_mean_of_their_weights():
    model, processor = tiny_model("llama", visual_layers=[1, 2]), tiny_processor()
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    maps = attend(model, processor, pictures, "abc", max_new_tokens=12)
    assert max(map(len, maps.positions)) > 1 and maps.seeing == [1, 2] and len(maps.pictures) == 2
    content = [*({"type": "image", "image": picture} for picture in pictures), {"type": "text", "text": "abc"}]
    inputs = rendered(processor, [{"role": "user", "content": content}])
    ids = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    eager = tiny_model("llama", visual_layers=[1, 2], attn_implementation="eager")
    with torch.no_grad():
        rows = eager(ids, inputs["pixel_values"], output_attentions=True).attentions
    places = (ids[0] == IMAGE_TOKEN).nonzero().squeeze(1)
    for index, found in enumerate(maps.pictures):
        for word, positions in enumerate(maps.positions):
            expected = torch.stack([x[0].mean(0)[positions][:, places[4 * index : 4 * index + 4]] for x in rows]).mean(
                1
            )
            np.testing.assert_allclose(found.weights[:, word].reshape(3, 4), expected.numpy(), atol=1e-5)
    np.testing.assert_allclose(maps.mean(1), maps.pictures[1].weights[1:].mean(0))


def test_the_class_token_is_no_place_in_the_picture():
    processor = tiny_processor()
    processor.vision_feature_select_strategy = "full"
    model = tiny_model("llama", vision_feature_select_strategy="full", vision_seq_length=5)
    maps = attend(model, processor, Image.new("RGB", (8, 8)), "abc", max_new_tokens=8)
    assert maps.pictures[0].weights.shape[2:] == (2, 2)
    content = [{"type": "image", "image": Image.new("RGB", (8, 8))}, {"type": "text", "text": "abc"}]
    inputs = rendered(processor, [{"role": "user", "content": content}])
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    all_five = visual_attention(model, {"input_ids": ids, "pixel_values": inputs["pixel_values"]}, maps.positions[0])
    np.testing.assert_allclose(maps.pictures[0].weights[:, 0].reshape(3, 4), all_five.mean(1)[:, 1:], atol=1e-6)


# --- places -----------------------------------------------------------------------------------------------------------


def processor_of(image_processor, **options):
    made = SaisaProcessor.__new__(SaisaProcessor)
    made.__dict__.update(tiny_processor().__dict__ | options, image_processor=image_processor)
    return made


SQUARE = {"height": 56, "width": 56}
CROP = CLIPImageProcessor(size={"shortest_edge": 56}, crop_size=SQUARE)


@pytest.mark.parametrize(
    "image_processor, options, size, expected",
    [
        (CROP, {}, (100, 60), (20, 0, 80, 60)),
        (CROP, {}, (60, 100), (0, 20, 60, 80)),
        (CROP, {"pad_to_square": True}, (100, 60), (0, -20, 100, 80)),
        (CROP, {}, (2000, 40), (980, 0, 1020, 40)),
        (SiglipImageProcessor(size=SQUARE), {}, (100, 60), (0, 0, 100, 60)),
        (BitImageProcessor(size={"shortest_edge": 64}, crop_size=SQUARE), {}, (128, 256), (8, 72, 120, 184)),
        (ConvNextImageProcessor(size={"shortest_edge": 56}, crop_pct=0.875), {}, (640, 640), (40, 40, 600, 600)),
        (CLIPImageProcessor(do_resize=False, crop_size=SQUARE), {}, (40, 56), (-8, 0, 48, 56)),
    ],
)
def test_what_the_encoder_is_shown_of_a_picture_is_found_out(image_processor, options, size, expected):
    shape, patches, box = seen_part(processor_of(image_processor, **options), size)
    assert shape == (56, 56) and patches is None
    np.testing.assert_allclose(box, expected, atol=0.02 * (expected[2] - expected[0]))


def test_patches_of_a_picture_that_is_not_square_are_a_grid_of_its_shape():
    from transformers import Siglip2ImageProcessor

    processor = processor_of(Siglip2ImageProcessor(patch_size=4, max_num_patches=32))
    shape, (rows, columns), box = seen_part(processor, (160, 80))
    assert (rows, columns) == (4, 8) and shape == (16, 32)
    np.testing.assert_allclose(box, (0, 0, 160, 80), atol=2)
    model = tiny_model("llama", "siglip2", vision_feature_select_strategy="full")
    maps = attend(model, processor, Image.new("RGB", (160, 80)), "abc", max_new_tokens=8)
    assert maps.pictures[0].weights.shape[2:] == (4, 8)


def test_a_rest_that_makes_no_patch_is_not_in_the_box():
    processor = processor_of(CLIPImageProcessor(size={"shortest_edge": 10}, crop_size={"height": 10, "width": 10}))
    encoder = VISION_CONFIGS["clip"]()
    encoder.image_size = 10
    maps = attend(tiny_model("llama", encoder), processor, Image.new("RGB", (100, 100)), "abc", max_new_tokens=8)
    np.testing.assert_allclose(maps.pictures[0].box, (0, 0, 80, 80), atol=2)


@pytest.mark.parametrize(
    "tokens, height, width, grid",
    [(36, 72, 72, (6, 6)), (15, 31, 47, (3, 5)), (12, 64, 48, (4, 3)), (7, 10, 10, (1, 7))],
)
def test_a_number_of_tokens_is_a_grid_of_nearly_square_cells(tokens, height, width, grid):
    assert attention_maps.grid_of(tokens, height, width) in (grid, grid[::-1] if tokens == 7 else grid)


@pytest.mark.parametrize("size, box", [((100, 60), (20, 0, 80, 60)), ((100, 60), (0, -20, 100, 80))])
def test_heat_lies_where_the_token_is(size, box):
    weights = np.zeros((4, 4), dtype=np.float32)
    weights[1, 2] = 1
    found = PictureMaps(Image.new("RGB", size, "white"), box, weights[None, None])
    plain, hot = (np.asarray(overlay(found, w, size), dtype=float) for w in (0 * weights, weights))
    y, x = np.unravel_index(np.abs(hot - plain).sum(-1).argmax(), hot.shape[:2])
    across, down = (box[2] - box[0]) / 4, (box[3] - box[1]) / 4
    assert box[0] + 2 * across <= x <= box[0] + 3 * across and box[1] + down <= y <= box[1] + 2 * down
    outside = [plain[30, 5], plain[30, 95]] if box[0] else []
    assert all(pixel.max() < 255 for pixel in outside) and plain[30, 50].min() == 255  # what is not seen is veiled


# --- sheet and page ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def maps():
    rng = np.random.default_rng(0)
    weights = rng.random((3, 8, 2, 4)).astype(np.float32) / 10
    picture = Image.fromarray(rng.integers(0, 256, (50, 100, 3), np.uint8))
    other = PictureMaps(picture.resize((40, 40)), (0, 0, 40, 40), weights[..., :2] / 2)
    words = ["<b>", "</script>", "two", "three", "four", "five", "six", "\u732b"]
    found = [PictureMaps(picture, (0.0, 0.0, 100.0, 50.0), weights), other]
    return AttentionMaps("what?", " ".join(words), words, [[index] for index in range(8)], [0, 2], found)


def test_the_sheet_has_a_panel_for_each_word_and_picture_and_a_row_for_each_layer(maps):
    plain, whole = contact_sheet(maps), contact_sheet(maps, range(3))
    assert whole.height > 3 * (plain.height - 100)
    assert plain.height > 2 * (88 + 176)  # two blocks of words, two pictures
    one = dataclasses.replace(maps, pictures=maps.pictures[:1])
    # at the left it says what picture and layer a row is of, where there are several
    assert contact_sheet(one).width < contact_sheet(one, range(3)).width == plain.width == whole.width
    with pytest.raises(ValueError, match=r"layers has 3: the model has layers 0 to 2"):
        contact_sheet(maps, [3])


class Page(html.parser.HTMLParser):
    """The attributes and the scripts of a page."""

    def __init__(self, text):
        super().__init__()
        self.attributes, self.scripts, self.inside = [], [], False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        self.inside = tag == "script"

    def handle_endtag(self, tag):
        self.inside = False

    def handle_data(self, data):
        if self.inside:
            self.scripts.append(data)


def test_the_page_needs_nothing_but_itself(maps):
    text = page(maps)
    read = Page(text)
    assert len(read.scripts) == 2
    assert not re.search(r"https?:|//|@import|url\(|fetch|XMLHttp", text.replace(read.scripts[0], ""))
    assert not [value for name, value in read.attributes if name in ("src", "href", "action")]
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'") in (
        read.attributes
    )
    assert len(text) < 60_000


def test_the_page_holds_pictures_and_weights(maps):
    data = json.loads(Page(page(maps)).scripts[0])
    assert data["words"] == maps.words and data["layers"] == ["mean", "layer 0", "layer 1", "layer 2"]
    for index, (shown, found) in enumerate(zip(data["pictures"], maps.pictures)):
        assert shown["picture"].startswith("data:image/png;base64,") and shown["place"] == [0, 0, 1, 1]
        stored = np.frombuffer(base64.b64decode(shown["bytes"]), np.uint8).reshape(4, 8, *shown["grid"])
        weights = np.concatenate([maps.mean(index)[None], found.weights])
        np.testing.assert_allclose(stored / 255 * weights.max((2, 3), keepdims=True), weights, atol=0.1 / 255)
        np.testing.assert_allclose(shown["shares"], weights.sum((2, 3)), atol=1e-4)


BROWSER = """
const elements = {}, make = name => ({ name, style: {}, children: [], value: "0", appendChild(x) { this.children.push(x);
  return x; }, getContext() { return { createImageData: (w, h) => ({ data: new Uint8ClampedArray(4 * w * h) }),
  putImageData: image => drawn.push(Array.from(image.data)) }; } });
const drawn = [];
const document = { createElement: make, getElementById: id => elements[id] ??= make(id) };
elements.data = { textContent: process.argv[2] };
const script = process.argv[1];
new Function("document", "atob", script)(document, atob);
elements.word.value = "7"; elements.layer.value = "3"; elements.layer.oninput();
elements.words.children[2].onclick();
console.log(JSON.stringify({ drawn, said: elements.said.textContent, depth: elements.depth.textContent,
  on: elements.words.children.map(x => x.className), max: [elements.word.max, elements.layer.max] }));
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_pages_script_draws_the_chosen_word_and_layer(maps):
    data, script = Page(page(maps)).scripts
    run = subprocess.run(["node", "-e", BROWSER, script, data], capture_output=True, text=True, check=True)
    shown = json.loads(run.stdout)
    assert shown["max"] == [7, 3] and shown["depth"] == "layer 2" and shown["said"] == "two"
    assert shown["on"].index("on") == 2 and shown["on"].count("on") == 1
    assert len(shown["drawn"]) == 6  # two pictures: at first, layer and word moved, a word clicked
    for image, weights in (
        (0, maps.mean()[0]),
        (2, maps.pictures[0].weights[2, 7]),
        (4, maps.pictures[0].weights[2, 2]),
    ):
        alpha = np.array(shown["drawn"][image]).reshape(2, 4, 4)[..., 3]
        np.testing.assert_allclose(alpha, 191 * weights / weights.max(), atol=1)


# --- command ----------------------------------------------------------------------------------------------------------


def test_the_command_writes_sheet_and_page_and_says_where_the_words_look(tmp_path, capsys):
    question = "how many digits are there?"
    command = [
        "attend",
        str(CHECKPOINT),
        SCENE,
        SCENE,
        question,
        "--output",
        str(tmp_path / "look"),
        "--dtype",
        "float32",
    ]
    assert main([*command, "--layers", "all"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"\| word .*on image 1 .*on image 2 ", out) and re.search(r"\d of 6, \d of 6", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["look.html", "look.png"]
    with Image.open(tmp_path / "look.png") as sheet:
        assert sheet.height > 2 * 5 * 176
    assert question in (tmp_path / "look.html").read_text()
    assert main([*command[:2], *command[3:], "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert np.shape(shown["pictures"][0]["weights"]) == (4, len(shown["words"]), 6, 6)
    model, processor = demo()
    expected = attend(model, processor, SCENE, question)
    np.testing.assert_allclose(shown["pictures"][0]["mean"], expected.mean(), atol=2e-6)


@pytest.mark.parametrize(
    "arguments, status, message",
    [
        (["{checkpoint}", "no.png", "who?"], 1, "There is no image 'no.png'"),
        (["{tmp}/none", "{scene}", "who?"], 1, "is not a folder"),
        (["{tmp}/llama", "{scene}", "who?"], 2, "has model_type 'llama': expected 'saisa'"),
        (["{checkpoint}", "{scene}", "who?", "--output", "{tmp}/none/look"], 1, "none is not a folder"),
        (["{checkpoint}", "{scene}", "who?", "--output", "/proc/look"], 1, "/proc/look.png cannot be written"),
        (["{checkpoint}", "{scene}", "<image>?", "--output", "{tmp}/look"], 2, "contains '<image>'"),
        (["{checkpoint}", "{scene}", "how many digits?", "--layers", "9", "--output", "{tmp}/look"], 2, "layers has 9"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(tmp_path, capsys, arguments, status, message):
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text('{"model_type": "llama"}')
    names = {"checkpoint": CHECKPOINT, "tmp": tmp_path, "scene": SCENE}
    assert main(["attend", *(argument.format(**names) for argument in arguments)]) == status
    error = capsys.readouterr().err
    assert error.startswith("saisa: error: ") and error.count("\n") == 1 and message in error
    assert not list(tmp_path.glob("*look*"))


def test_a_picture_and_a_saisa_are_needed():
    model, processor = demo()
    with pytest.raises(ValueError, match="images is empty"):
        attend(model, processor, [], "who?")
    with pytest.raises(ValueError, match="expected a SaisaForConditionalGeneration"):
        attend(model.model, processor, SCENE, "who?")
    with pytest.raises(ValueError, match=r"model is a clip_vision_model"):
        attend(model.vision_tower, processor, SCENE, "who?")


# --- how often it is the right digit ----------------------------------------------------------------------------------


def test_the_cell_that_a_question_is_about_is_found_by_its_answer():
    asked = benchmark.questions(60, 0)
    assert {scene.split for scene, _ in asked} == {"test"} and {q.kind for _, q in asked} == set(benchmark.KINDS)
    for scene, question in asked:
        assert str(scene.at(benchmark.asked_cell(scene, question)).digit) == question.answer


def test_weights_are_added_up_by_cell():
    weights = np.zeros((2, 6, 6))
    weights[1, 2:4, 4:] = [[1, 2], [3, 4]]  # the middle right one
    assert benchmark.by_cell(weights).tolist() == [[0] * 9, [0, 0, 0, 0, 0, 10, 0, 0, 0]]


def test_the_words_that_name_digits_look_at_them_more_than_chance(tmp_path):
    result = benchmark.main(["--pictures=24", "--seed=3", f"--json={tmp_path / 'new.json'}"])
    assert np.mean([row["mass"][0] for row in result["measured"]]) > 2 / 9
    assert np.mean([row["first"][0] for row in result["measured"]]) > 0.5
    assert json.loads((tmp_path / "new.json").read_text()) == result


def test_the_figures_of_the_page_are_those_beside_the_script(tmp_path, monkeypatch):
    written, path = (ROOT / "docs" / "attention_maps.md").read_text(), tmp_path / "page.md"
    path.write_text(re.sub(r"\d", "0", written))
    monkeypatch.setattr(benchmark, "load", None)  # nothing is computed here
    result = benchmark.main([f"--json={ROOT / 'benchmarks' / 'attention_maps.json'}", f"--tables={path}"])
    blocks = [re.findall(r"<!-- (\S+): start -->\n(.*?)<!--", text, re.S) for text in (written, path.read_text())]
    assert blocks[0] == blocks[1] and len(blocks[0]) == 2
    assert len(result["measured"]) == 200
    first, mass = (np.mean([row[name][0] for row in result["measured"]]) for name in ("first", "mass"))
    assert f"{first:.1%}" in written.split("<!--")[0] and f"{mass:.1%}" in written.split("<!--")[0]
