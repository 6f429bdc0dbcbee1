"""Data sets become what the model reads, with labels on what the assistant says and nowhere else."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from training_parts import TOKENS, character_tokenizer, conversation, picture, processor_for

from saisa_hf.chat.templates import chat_template_names, with_pictures
from saisa_hf.cli import main
from saisa_hf.processing_saisa import Video
from saisa_hf.training import (
    BadSample,
    ConversationDataset,
    ConversationEncoder,
    SaisaCollator,
    Source,
    TrainingOptions,
    open_source,
    read_sample,
)
from saisa_hf.training.check import check
from saisa_hf.training.sampler import GroupedSampler
from saisa_hf.training.samples import open_images


# Where a reader of the text finds the answers; nothing here knows the templates' source.
ANSWERS = {
    "vicuna": r"ASSISTANT:( .*?</s>)",
    "llama_3": r"ASSISTANT:( .*?<\|end_of_text\|>)",
    "chatml": r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)",
    "plain": r"\?\n(.*?)(?:\n|$)",
    "llama_headers": r"<\|im_start\|>assistant<\|im_end\|>\n\n(.*?</s>)",
    "language_model's own": r"\[/INST\]( .*?</s>)",
}
HEADERS = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_end|>\n\n' }}{% if m.content is string %}"
    "{{ m.content | trim }}{% else %}{% for p in m.content %}{{ '<image>\n' if p.type == 'image' else p.text }}"
    "{% endfor %}{% endif %}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_end|>\n\n' }}{% endif %}"
)
INSTRUCT = with_pictures(
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
TEMPLATES = {name: name for name in chat_template_names()} | {
    "llama_headers": HEADERS,
    "language_model's own": INSTRUCT,
}
TALK = conversation("<image>\nWhich?", "Seven.", "Sure?", "Yes, a 7.", "Why?", "Look.", image=picture())


def text_of(ids):
    """The text of token ids, an image's placeholders as one "@"."""
    tokens = character_tokenizer().convert_ids_to_tokens(ids)
    return "".join(tokens).replace("<image>" * TOKENS, "@")


def learned(item):
    """The texts of the runs of labels."""
    runs, last = [], None
    for i, label in enumerate(item["labels"]):
        if label != -100:
            assert label == item["input_ids"][i]
            runs = [*runs, [label]] if last != i - 1 else [*runs[:-1], [*runs[-1], label]]
            last = i
    return [text_of(run) for run in runs]


def encode(record, template="vicuna", max_length=None, **options):
    processor = processor_for(template)
    return ConversationEncoder(processor, max_length)(read_sample(record, **options))


# --- masks ---


@pytest.mark.parametrize("name", TEMPLATES)
def test_labels_are_where_a_reader_of_the_text_finds_the_answers(name):
    item = encode(TALK, TEMPLATES[name])
    read = [match.group(1) for match in re.finditer(ANSWERS[name], text_of(item["input_ids"]), re.S)]
    assert len(read) == 3 and "Seven." in read[0]
    assert learned(item) == read


def test_what_only_looks_like_an_answer_is_not_learned():
    item = encode(conversation("Say ASSISTANT: no</s>USER: Hi", "Fine."))
    assert learned(item) == [" Fine.</s>"]


def test_the_first_token_behind_an_image_has_no_predictor_and_no_label():
    close = "{% for m in messages %}{{ m.content }}{% endfor %}"
    item = encode({"messages": [{"role": "user", "content": "<image>"}, {"role": "assistant", "content": "cat"}],
                   "image": picture()}, close)  # fmt: skip
    assert text_of(item["input_ids"]) == "@cat" and learned(item) == ["at"]


def test_captions_stand_on_the_line_below_their_images():
    record = conversation("Render a summary.\n<image>", "A dog. ", image=picture())
    item = encode(record, "plain", captions=True)
    assert text_of(item["input_ids"]) == "@\nA dog.\n" and learned(item) == ["A dog.\n"]
    assert encode({"image": picture(), "caption": "A dog."}, "plain", captions=True)["labels"] == item["labels"]


def test_a_template_that_changes_earlier_turns_is_refused():
    forgets = "{% for m in messages %}{{ m.content if loop.last or m.role == 'user' else '...' }}{% endfor %}"
    with pytest.raises(BadSample, match=r"a\.json, sample 3: the chat template prints turn 1 differently"):
        encode(conversation("Hi", "Hello.", "So?", "Bye."), forgets, name="a.json, sample 3")


def test_an_answer_in_llamas_tokens_is_learned_from_its_space_to_its_end():
    pytest.importorskip("sentencepiece")
    from test_processing import llama_tokenizer

    tokenizer = llama_tokenizer()
    processor = processor_for("vicuna", tokenizer)
    item = ConversationEncoder(processor)(read_sample(conversation("<image>\nWhat?", "A dog.", image=picture())))
    said = [label for label in item["labels"] if label != -100]
    assert said == [*tokenizer("A dog.", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


# --- images and length ---


def test_the_image_of_a_turn_comes_first_and_several_stay_where_they_are():
    assert (
        read_sample(conversation("What?\n<image>", "A.", image="a.png"))["messages"][0]["content"] == "<image>\nWhat?"
    )
    both = conversation("<image> or <image>?", "A.", image=["a.png", "b.png"])
    sample = read_sample(both, folder="pictures")
    assert sample["messages"][0]["content"] == "<image> or <image>?"
    assert sample["images"] == ["pictures/a.png", "pictures/b.png"]


def test_images_in_parts_and_beside_the_messages_keep_their_order():
    parts = [{"type": "image", "path": "b.png"}, {"type": "text", "text": "or", "path": None}, {"type": "image"}]
    messages = [{"role": "user", "content": "<image>"}, {"role": "user", "content": parts}]
    record = {"messages": [*messages, {"role": "assistant", "content": "A."}], "images": ["a.png", "c.png"]}
    assert read_sample(record)["images"] == ["a.png", "b.png", "c.png"]


def test_a_long_sample_is_cut_at_the_end_and_never_inside_an_image():
    record = conversation("<image>\nA?", "Yes.", "<image>\nB?", "No.", image=[picture(1), picture(2)])
    whole = encode(record)
    second = [i for i, token in enumerate(whole["input_ids"]) if text_of([token]) == "<image>"][TOKENS]
    for limit in (second + 1, second + TOKENS - 1):
        item = encode(record, max_length=limit)
        assert item["input_ids"] == whole["input_ids"][:second] and item["cut"] == len(whole["input_ids"]) - second
        assert torch.equal(item["pixel_values"], whole["pixel_values"][:1])
    assert len(encode(record, max_length=second + TOKENS)["pixel_values"]) == 2
    with pytest.raises(BadSample, match="max_length=12 cuts off all answers"):
        encode(record, max_length=12)


def test_batches_hold_images_and_text_alone():
    processor = processor_for()
    collate = SaisaCollator(ConversationEncoder(processor))
    records = [TALK, conversation("Hi", "Hello."), conversation("<image>\nA?", "B.", image=picture(9))]
    batch = collate([read_sample(record) for record in records])
    rows = batch["attention_mask"].sum(1).tolist()
    assert batch["pixel_values"].shape[0] == 2 and batch["input_ids"].shape == batch["labels"].shape == (3, max(rows))
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"]):
        assert (ids[row:] == processor.tokenizer.pad_token_id).all() and (labels[row:] == -100).all()
    assert collate([read_sample(records[1])])["pixel_values"].shape == (0, *batch["pixel_values"].shape[1:])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("text", ["llama", "mistral_window", "qwen3"])
def test_samples_in_one_row_do_not_see_each_other(text, implementation):
    records = [
        TALK,
        conversation("Hi", "Hello, you."),
        conversation("<image>A?", "B.", "<image>\nC?", "D.", image=[picture(9)] * 2),
    ]
    model, encoder = tiny_model(text, attn_implementation=implementation), ConversationEncoder(processor_for())
    samples = [read_sample(record) for record in records]
    for part in (samples, samples[1:2] * 3):  # with images, and text alone
        found = []
        for packing in (False, True):
            batch = SaisaCollator(encoder, packing=packing)(part)
            model.zero_grad()
            loss = model(**batch).loss
            loss.backward()
            found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])))
        assert batch["input_ids"].shape == (1, sum(len(encoder(sample)["input_ids"]) for sample in part))
        (padded, gradients), (packed, same) = found
        assert packed == pytest.approx(padded, rel=1e-5)
        assert (gradients - same).abs().max() < 1e-4 * gradients.abs().max()


# --- what cannot be used ---


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "a", "answer": "b"}, "one of the keys 'conversations', 'messages'.*'question', 'answer'"),
        (conversation("<image>\nA?", "B."), "0 images for 1 <image>"),
        (conversation("A?", "B.", image="a.png"), "1 image for 0 <image>"),
        (conversation("<image>\nA?", "B.", image=["a.png", "b.png"]), "2 images for 1 <image>"),
        (conversation("A?", "  ", "B?", ""), "no turn of the assistant has text"),
        (conversation("A?"), "no turn of the assistant has text"),
        ({"conversations": [{"from": "robot", "value": "a"}]}, "'robot'"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "role 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "'audio'"),
        ({**conversation("A?", "B."), "audio": "a.wav"}, "audio 'a.wav' is not read"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "video": "a.mp4"}]}]}, "'a.mp4'"),
        ("a question", "expected a mapping, got a str"),
        ({"messages": [None]}, "its turns are .*None.*: expected a list of mappings"),
        ({"messages": "abc"}, "its turns are 'abc'"),
        ({"conversations": 5}, "its turns are 5"),
    ],
)
def test_bad_records_are_named_with_what_is_wrong(record, message):
    with pytest.raises(BadSample, match=f"q.json, sample 4: .*{message}"):
        read_sample(record, "q.json, sample 4")


def test_half_a_character_is_a_bad_sample():
    sample = read_sample(conversation("A?", "B\ud800."), "q.json, sample 4")
    with pytest.raises(BadSample, match=r"q.json, sample 4: text 0 has half a character, '\\ud800' at "):
        ConversationEncoder(processor_for())(sample)


def broken(folder):
    """Ten samples of which the fourth has a missing and the seventh a broken image."""
    picture().save(folder / "good.png")
    (folder / "broken.png").write_bytes(b"not a picture")
    names = {3: "missing.png", 6: "broken.png"}
    return [conversation("<image>\nA?", f"{i}.", image=names.get(i, "good.png")) for i in range(10)]


def test_a_missing_or_broken_image_is_fatal_or_counted_as_one_chooses(tmp_path, caplog):
    source = Source(broken(tmp_path), "q.json", str(tmp_path))
    encoder = ConversationEncoder(processor_for())
    strict = ConversationDataset([source], encoder)
    assert learned(strict[2]) == [" 2.</s>"]
    with pytest.raises(BadSample, match=r"q\.json, sample 3: image 0 \(.*missing\.png\) cannot be read"):
        strict[3]
    lenient = ConversationDataset([source], encoder, bad_samples="skip")
    assert [learned(lenient[i])[0][1] for i in range(10)] == list("0124457789")
    assert lenient.skipped == 2 and "sample 6" in caplog.text
    with pytest.raises(BadSample, match="None of the 1 samples"):
        ConversationDataset([Source(source.records[3:4])], encoder, bad_samples="skip")[0]


def test_bad_samples_are_counted_over_all_workers(tmp_path):
    dataset = ConversationDataset(
        [Source(broken(tmp_path), "q", str(tmp_path))], ConversationEncoder(processor_for()), bad_samples="skip"
    )
    loader = torch.utils.data.DataLoader(dataset, 5, collate_fn=SaisaCollator(pad_token_id=0), num_workers=2)
    assert [len(batch["pixel_values"]) for batch in loader] == [5, 5] and dataset.skipped == 2


def test_an_empty_data_set_is_refused(tmp_path):
    (tmp_path / "a.json").write_text("[]")
    with pytest.raises(ValueError, match=r"a\.json has no samples"):
        open_source(str(tmp_path / "a.json"))
    with pytest.raises(ValueError, match="empty"):
        ConversationDataset([[]], None)


# --- files ---


def test_json_and_json_lines_are_read_with_images_beside_them(tmp_path):
    records = broken(tmp_path)[:2]
    (tmp_path / "a.json").write_text(json.dumps(records))
    records[0]["note"] = "one\u2028line\u0085"
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    (tmp_path / "b.jsonl").write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    sources = [open_source(str(tmp_path / name)) for name in ("a.json", "b.jsonl")]
    dataset = ConversationDataset(sources, ConversationEncoder(processor_for()))
    assert [learned(dataset[i])[0] for i in range(4)] == [" 0.</s>", " 1.</s>"] * 2
    assert dataset.name(2).endswith("b.jsonl, sample 0")
    for name, text in (("c.json", "{"), ("d.json", "{}"), ("e.jsonl", "[]\n{")):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=name):
            open_source(str(tmp_path / name))


def test_data_sets_of_datasets_parquet_files_folders_and_streams(tmp_path):
    datasets = pytest.importorskip("datasets")
    from saisa_hf.training import StreamedConversations

    folder = tmp_path / "folder"
    folder.mkdir()
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"{i}."}) for i in range(3)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    rows = [{"messages": [{"role": "user", "content": "<image>\nA?"}, {"role": "assistant", "content": f"{i}."}],
             "images": [picture(i)]} for i in range(3)]  # fmt: skip
    features = datasets.Features(
        messages=[{"role": datasets.Value("string"), "content": datasets.Value("string")}],
        images=datasets.Sequence(datasets.Image()),
    )
    table = datasets.Dataset.from_list(rows, features=features)
    table.to_parquet(str(tmp_path / "a.parquet"))
    encoder = ConversationEncoder(processor_for())
    for source in (table, open_source(str(tmp_path / "a.parquet")), open_source(str(folder))):
        dataset = ConversationDataset([source], encoder)
        assert [learned(dataset[i])[0].strip() for i in range(3)] == [f"{i}.</s>" for i in range(3)]
        assert [has for _, has in dataset.lengths(4)] == [True] * 3
    stream = open_source(str(tmp_path / "a.parquet"), streaming=True)
    for files, workers in ((1, 0), (1, 2), (1, 3), (4, 2), (4, 3)):
        paths = [str(tmp_path / f"{number}.parquet") for number in range(files)]
        for number, path in enumerate(paths):
            table.select(range(number % 2, 3)).to_parquet(path)
        many = datasets.load_dataset("parquet", data_files=paths, split="train", streaming=True)
        loader = torch.utils.data.DataLoader(StreamedConversations([many], encoder), None, num_workers=workers)
        drawn = {(learned(item)[0], item["sample_index"]) for item, _ in zip(loader, range(60))}
        assert {text for text, _ in drawn} == {" 0.</s>", " 1.</s>", " 2.</s>"}
    loader = torch.utils.data.DataLoader(StreamedConversations([[rows[0]]], encoder), None, num_workers=3)
    assert [learned(item)[0] for item, _ in zip(loader, range(5))] == [" 0.</s>"] * 5
    items = iter(StreamedConversations([stream], encoder))
    assert [learned(next(items))[0] for _ in range(4)] == [" 0.</s>", " 1.</s>", " 2.</s>", " 0.</s>"]


def test_images_in_base64_are_read_wherever_the_file_is(tmp_path):
    file = io.BytesIO()
    picture(2).save(file, "PNG")
    text = base64.b64encode(file.getvalue()).decode()
    in_parts, as_array = (
        [{"role": "user", "content": [{"type": "image", **image}]}, {"role": "assistant", "content": "2."}]
        for image in ({"base64": text}, {"image": np.asarray(picture(2))})
    )
    for record in (conversation("<image>\nA?", "2.", image=text), {"messages": in_parts}, {"messages": as_array}):
        (image,) = open_images(read_sample(record, folder=str(tmp_path)))["images"]
        assert np.array_equal(np.asarray(image), np.asarray(picture(2)))


# --- order ---


def test_grouped_batches_are_alike_and_every_sample_comes_once():
    generator = torch.Generator().manual_seed(0)
    lengths = [(int(n), bool(n % 3)) for n in torch.randint(5, 500, (333,), generator=generator)]
    epoch = [0]
    sampler = GroupedSampler(lengths, 8, epoch=lambda: epoch[0])
    order = list(sampler)
    assert sorted(order) == list(range(333)) and order == list(sampler)
    batches = [order[i : i + 8] for i in range(0, 333, 8)]
    mixed = [len({lengths[i][1] for i in batch}) > 1 for batch in batches]
    assert sum(mixed) <= 2 and not any(mixed[:-2])
    spread = sum(max(lengths[i][0] for i in b) - min(lengths[i][0] for i in b) for b in batches) / len(batches)
    assert spread < 150  # of 500; batches at random have about 400
    epoch[0] = 1
    assert list(sampler) != order


# --- saisa data check ---


def test_data_check_prints_every_token_with_its_mask_and_names_what_is_bad(tmp_path, capsys):
    processor_for().save_pretrained(tmp_path / "model")
    (tmp_path / "q.json").write_text(json.dumps(broken(tmp_path)))
    config = tmp_path / "c.yaml"
    config.write_text(f"model: {tmp_path}/model\ndata: {tmp_path}/q.json\noutput: {tmp_path}/out\n")
    assert main(["data", "check", str(config), "--samples", "1"]) == 2
    out, err = capsys.readouterr()
    shown = re.findall(r"^ *(\d+) +(\d+)  (learn|     )  '(.*?)'( x 4)?$", out, re.M)
    assert [token for _, _, mark, token, _ in shown if mark == "learn"] == [" ", "0", ".", "</s>"]
    assert [token for *_, token, many in shown if many] == ["<image>"]
    assert "8 samples with 8 images" in out and "sample 3" in out and "sample 6" in out
    assert "2 of 10 samples cannot be used" in err


def test_data_check_looks_at_every_stream(tmp_path):
    datasets = pytest.importorskip("datasets")
    processor_for().save_pretrained(tmp_path / "model")
    for name, role in (("good", "assistant"), ("bad", "user")):
        turns = [{"role": "user", "content": "A?"}, {"role": role, "content": "B."}]
        datasets.Dataset.from_list([{"messages": turns}] * 3).to_parquet(str(tmp_path / f"{name}.parquet"))
    given = {"model": str(tmp_path / "model"), "output": "o", "streaming": True, "max_steps": 1}
    options = TrainingOptions(data=[str(tmp_path / f"{name}.parquet") for name in ("good", "bad")], **given)
    assert check(options, log=lambda line: None) == (6, 3)
    assert check(options, limit=2, log=lambda line: None) == (4, 2)


# --- videos ---


def test_videos_in_records_are_found_in_every_form(tmp_path):
    turns = [{"role": "user", "content": "<video>What?"}, {"role": "assistant", "content": "This."}]
    parts = [{"type": "video", "path": "a.mp4"}, {"type": "image", "path": "a.png"}, {"type": "text", "text": "A?"}]
    film, image = Video(str(tmp_path / "a.mp4")), str(tmp_path / "a.png")
    for record, images in (
        ({**conversation("<video>\nA?", "B."), "video": "a.mp4"}, [film]),
        ({**conversation("A?\n<image>", "B."), "video": "a.mp4"}, [film]),
        ({**conversation("A <video> B <image> C?", "B.", image="a.png"), "videos": ["a.mp4"]}, [film, image]),
        ({"messages": turns, "video": "a.mp4"}, [film]),
        ({"messages": [{"role": "user", "content": parts}, turns[1]]}, [film, image]),
        (conversation("What does <video> mean in HTML?", "A film."), []),
    ):
        sample = read_sample(record, "s", folder=str(tmp_path))
        assert sample["images"] == images
        text = "".join(
            message["content"] if isinstance(message["content"], str)
            else "".join("<image>" if part["type"] == "image" else part["text"] for part in message["content"])
            for message in sample["messages"]
        )  # fmt: skip
        assert text.count("<image>") == len(images)
    assert read_sample({**conversation("A <video>", "B."), "video": "a"}, "s")["messages"][0]["content"] == "<image>\nA"
    for record, message in (
        ({**conversation("A?", "B."), "video": "a.mp4"}, "1 video for 0 <video>"),
        ({**conversation("<video><video>", "B."), "video": "a.mp4"}, "1 video for 2 <video>"),
        ({**conversation("<video><image>", "B."), "video": "a.mp4"}, "0 images for 1 <image>"),
    ):
        with pytest.raises(BadSample, match=message):
            read_sample(record, "s")


def test_encoded_videos_are_batched_with_images_and_texts():
    films = [np.stack([np.asarray(picture(20 * i + j)) for i in range(3)]) for j in range(2)]
    records = [
        {**conversation("<video>\nA?", "B."), "video": films[0]},
        conversation("<image>\nA?", "B.", image=picture()),
        conversation("A?", "B."),
        {**conversation("<image><video>\nA?", "B.", image=picture(9)), "video": films[1]},
    ]
    encode = ConversationEncoder(processor_for())
    dataset = ConversationDataset([records], encode)
    batch = SaisaCollator(encode)([dataset[i] for i in range(4)])
    assert batch["frame_pooling"].tolist() == [2, 2, 2, 1, 1, 2, 2, 2] and len(batch["pixel_values"]) == 8
    counts = (batch["input_ids"] == encode.processor.image_token_id).sum(1).tolist()
    assert counts == [3, TOKENS, 0, TOKENS + 3]
    batch.pop("sample_index")
    model = tiny_model()
    together = model(**batch).loss
    alone = [SaisaCollator(encode)([dataset[i]]) for i in range(4)]
    total = [int((one["labels"] != -100).sum()) for one in alone]
    losses = [model(**{name: x for name, x in one.items() if name != "sample_index"}).loss for one in alone]
    assert together.item() == pytest.approx(
        sum(n * loss.item() for n, loss in zip(total, losses)) / sum(total), rel=1e-5
    )
    # a video that does not fit goes as a whole, and leaves the rows of what is in front of it
    record = conversation("<image>A?", "B.", "<video>C?", "D.", image=picture())
    sample = open_images(read_sample({**record, "video": films[0]}, "s"))
    ids = encode(sample)["input_ids"]
    visual = [i for i, token in enumerate(ids) if token == encode.processor.image_token_id]
    cut = ConversationEncoder(processor_for(), max_length=visual[-1])(sample)
    assert len(cut["input_ids"]) == visual[TOKENS] and len(cut["pixel_values"]) == 1 == len(cut["frame_pooling"])
