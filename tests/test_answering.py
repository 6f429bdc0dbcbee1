"""The engine that answers many questions: whoever is asked together, whatever is kept, the answers are those of each question
asked alone; likelihoods are those of a plain forward pass."""

import io
import itertools
import threading
import warnings

import pytest
import tile_parts
import torch
from test_chat import Count, picture, tiny_processor
from test_processing import Meeting
from tiny_models import tiny_model
from tokenizers import models

from saisa_hf.answering import Answerer, Likelihood, Question
from saisa_hf.answering.kept_images import KeptImages
from saisa_hf.chat.templates import chat_template
from saisa_hf.processing_saisa import Video


WORDS = ["abc", "de", "fgh dea", "a", "bad cab", "ace of bees"]


def tiny():
    return tiny_model(seed=3), tiny_processor()


def questions(tmp_path, count=40):
    """Of all kinds: without an image, with one that others are about too, with one of its own, with two in the text."""
    shared = [str(tmp_path / f"{index}.png") for index in range(4)]
    for index, path in enumerate(shared):
        picture(index).save(path)
    made = []
    for index in range(count):
        words, kind = f"{WORDS[index % 6]} {WORDS[index % 5]}" * (1 + index % 3), index % 5
        if kind == 0:
            made.append(Question(words, key=index))
        elif kind == 1:
            made.append(Question(words, [picture(100 + index)], index))
        elif kind == 2:
            made.append(Question(f"<image>\n{words}<image>\nab", [shared[index % 4], picture(200 + index)], index))
        else:
            made.append(Question(words, [shared[index % 4]], index))
    return made


def alone(model, processor, question, **options):
    """The answer of `generate` to one question."""
    text = question.prompt if "<image>" in question.prompt else "<image>\n" * len(question.images) + question.prompt
    how = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    images = list(question.images) or None
    inputs = processor.apply_chat_template([{"role": "user", "content": text}], images=images, **how)
    ids = model.generate(**inputs, do_sample=False, **options)[0, inputs["input_ids"].shape[1] :]
    return processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size, states", [(1, True), (8, True), (32, True), (8, False)])
def test_answers_depend_on_nothing_but_the_question(tmp_path, batch_size, states):
    model, processor = tiny()
    asked = questions(tmp_path)
    answerer = Answerer(model, processor, batch_size=batch_size, visual_states=states, max_new_tokens=6)
    answers = list(answerer.answer(asked))
    assert [answer.key for answer in answers] == list(range(len(asked)))
    assert [answer.text for answer in answers] == [alone(model, processor, one, max_new_tokens=6) for one in asked]
    assert {(answer.error, answer.finish, answer.tokens) for answer in answers} == {(None, "length", 6)}


@pytest.mark.parametrize("alignment", ["input_space", "embedding_space"])
def test_an_image_is_encoded_once_however_many_questions_it_has(tmp_path, alignment):
    model, processor = tiny_model(seed=3, alignment=alignment, projector_sharing="shared"), tiny_processor()
    paths = [str(tmp_path / f"{index}.png") for index in range(3)]
    for index, path in enumerate(paths):
        picture(index).save(path)
    asked = [Question(WORDS[index % 6], [path]) for index in range(10) for path in paths]
    passes = Count(model)
    with_states = [answer.text for answer in Answerer(model, processor, max_new_tokens=4).answer(asked)]
    assert sum(passes.pictures) == 3
    plain = Answerer(model, processor, max_new_tokens=4, visual_states=False)
    assert [answer.text for answer in plain.answer(asked)] == with_states
    assert sum(passes.pictures) == 33


def test_kept_states_stay_within_their_memory(tmp_path):
    model, processor = tiny()
    asked = questions(tmp_path, 100)
    wanted = [answer.text for answer in Answerer(model, processor, max_new_tokens=3).answer(asked)]
    one = model.get_visual_states(**processor(images=picture(0), return_tensors="pt")).nbytes
    answerer, most = Answerer(model, processor, max_new_tokens=3, batch_size=4, state_bytes=5 * one), 0
    answers, states = [], answerer._kept._states
    for answer in answerer.answer(asked):
        answers.append(answer.text)
        kept = {x.untyped_storage() for _, one in states.values() for x in one.stored.tensors().values()}
        most = max(most, answerer._kept.nbytes, sum(storage.nbytes() for storage in kept))
    assert answers == wanted
    assert one <= most <= 5 * one
    assert answerer._kept.nbytes == 0


def test_kept_states_stay_within_their_memory_from_the_first_on():
    model, processor = tiny()
    asked = [Question(words, [picture]) for picture in map(picture, range(10)) for words in WORDS[:2]]
    one = model.get_visual_states(**processor(images=picture(0), return_tensors="pt")).nbytes
    answerer, passes = Answerer(model, processor, max_new_tokens=1, batch_size=16, state_bytes=4 * one), Count(model)
    most = max(answerer._kept.nbytes for _ in answerer.answer(asked, as_they_come=True))
    assert most == 4 * one and sum(passes.pictures) == 10
    answers = answerer.answer(asked)
    next(answers)
    assert answerer._kept.nbytes
    answers.close()  # as when an error ends it
    assert answerer._kept.nbytes == 0


def test_kept_images_are_opened_in_threads_and_each_unreadable_one_is_named(tmp_path, monkeypatch):
    (model, processor), barrier, content = tiny(), threading.Barrier(2), io.BytesIO()
    picture(1).save(content, "PNG")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    images = {
        "a": Meeting(content.getvalue(), barrier),
        "b": Meeting(content.getvalue(), barrier),
        "c": b"none",
        "d": b"no",
    }
    kept = KeptImages(model, processor, 2**30, at_once=3)
    kept.encode(images)
    assert set(kept.errors) == {"c", "d"} and all("cannot be read" in error for error in kept.errors.values())
    inputs = processor(images=[picture(1)] * 2, return_tensors="pt")
    expected = model.get_visual_states(**inputs).stored.keys_values
    for found, own in zip(kept.of(["a", "b"]).stored.keys_values, expected):
        assert all(torch.equal(x, y) for x, y in zip(found, own))


def test_questions_are_read_when_they_are_needed():
    model, processor = tiny()
    read = itertools.count()
    asked = (Question(WORDS[next(read) % 6]) for _ in range(10**9))
    answers = Answerer(model, processor, batch_size=8, max_new_tokens=1).answer(asked)
    next(answers)
    assert next(read) == 64


def test_answers_may_come_batch_by_batch(tmp_path):
    model, processor = tiny()
    asked = questions(tmp_path)
    asked[7] = Question("abc", [str(tmp_path / "not-there.png")], 7)
    answerer = Answerer(model, processor, batch_size=4, max_new_tokens=3)
    passes = Count(model)
    answers = answerer.answer(asked, as_they_come=True)
    first = [next(answers) for _ in range(4)]
    assert len(passes.text) == 3  # one batch
    found = {answer.key: answer for answer in [*first, *answers]}
    assert found == {answer.key: answer for answer in answerer.answer(asked)} and len(found) == len(asked)


def test_what_cannot_be_asked_has_an_error_and_the_others_their_answers(tmp_path):
    model, processor = tiny()
    asked = questions(tmp_path)
    whole = [answer.text for answer in Answerer(model, processor, max_new_tokens=3).answer(asked)]
    (tmp_path / "text.png").write_text("no image")
    bad = {
        4: (Question("abc", [str(tmp_path / "not-there.png")]), "not-there.png"),
        5: (Question("abc", [str(tmp_path / "not-there.png")]), "not-there.png"),  # twice: by way of visual states
        9: (Question("abc", [str(tmp_path / "text.png")]), "text.png' cannot be read"),
        20: (Question("<image> and <image>", [picture(0)]), "1 images for 2 '<image>'"),
        23: (Question([{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}]), "hold a video"),
        21: (Question([{"role": "judge", "content": "abc"}]), "judge"),
        22: (Question("abc", [3.5]), "the image"),
    }
    asked = [bad[index][0] if index in bad else one for index, one in enumerate(asked)]
    for states in (True, False):
        answerer = Answerer(model, processor, max_new_tokens=3, visual_states=states)
        for index, answer in enumerate(answerer.answer(asked)):
            if index in bad:
                assert bad[index][1] in answer.error and answer.finish == "error" and answer.text == ""
            else:
                assert answer.error is None and answer.text == whole[index]
    strict = Answerer(model, processor, max_new_tokens=3, strict=True)
    with pytest.raises(ValueError, match=r"not-there\.png"):
        list(strict.answer(asked))


def test_answers_end_at_stop_strings_and_at_the_closing_token():
    model, processor = tiny()
    asked = [Question(words, [picture(index)], index) for index, words in enumerate(WORDS)]
    # transformers fills up rows that have ended only where there is a closing token
    options = {"max_new_tokens": 24, "eos_token_id": 2}
    whole = [answer.text for answer in Answerer(model, processor, **options).answer(asked)]
    stop = whole[0][5:8]
    answers = list(Answerer(model, processor, stop_strings=[stop], **options).answer(asked))
    assert answers[0].text == whole[0].partition(stop)[0].strip() and answers[0].finish == "stop"
    assert [answer.text for answer in answers] == [text.partition(stop)[0].strip() for text in whole]
    single = Answerer(model, processor, stop_strings=[stop], batch_size=1, **options)
    assert list(single.answer(asked)) == answers and answers[0].tokens < 24
    token = model.generate(**processor(text="USER: abc ASSISTANT:", return_tensors="pt"), max_new_tokens=3)[0, -1]
    closing = Answerer(model, processor, chat_template=chat_template("vicuna"), system="", max_new_tokens=9)
    (answer,) = closing.answer([Question("abc")], eos_token_id=[int(token)])
    assert answer.finish == "stop" and answer.tokens <= 3
    seen = []
    watch = {"stopping_criteria": [lambda ids, _, **more: seen.append(ids) or torch.zeros(len(ids), dtype=torch.bool)]}
    list(Answerer(model, processor, batch_size=1, **options, **watch).answer(asked[:1]))
    ends = {"eos_token_id": int(seen[-1][0, -20])}
    both = [list(Answerer(model, processor, batch_size=size, **options | ends).answer(asked)) for size in (1, 8)]
    assert both[0] == both[1] and len({answer.tokens for answer in both[0]}) > 1


def test_a_tokenizer_needs_no_pad_token(tmp_path):
    model, processor = tiny()
    asked = questions(tmp_path, 10)
    wanted = list(Answerer(model, processor, max_new_tokens=3).answer(asked))
    processor.tokenizer.pad_token = None
    assert list(Answerer(model, processor, max_new_tokens=3).answer(asked)) == wanted
    assert processor.tokenizer.pad_token is None


def test_decoding_is_greedy_whatever_the_checkpoint_suggests():
    model, processor = tiny()
    asked = [Question(words, [picture(index)]) for index, words in enumerate(WORDS)]
    wanted = list(Answerer(model, processor, max_new_tokens=12).answer(asked))
    suggested = {"do_sample": True, "temperature": 3.0, "top_p": 0.9, "top_k": 7, "repetition_penalty": 5.0}
    for name, value in suggested.items():
        setattr(model.generation_config, name, value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(Answerer(model, processor, max_new_tokens=12).answer(asked)) == wanted


def plain_likelihood(model, processor, question, text):
    """(sum of log-probabilities, whether greedy, tokens) of one sample in one forward pass over all positions."""
    messages = [{"role": "user", "content": question.prompt}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    images = list(question.images) or None
    whole = processor(text=f"{prompt} {text}", images=images, return_tensors="pt")
    first = processor(text=prompt, images=images, return_tensors="pt")["input_ids"].shape[1]
    with torch.no_grad():
        logs = model(**whole).logits[0, first - 1 : -1].double().log_softmax(-1)
    targets = whole["input_ids"][0, first:]
    return float(logs.gather(1, targets[:, None]).sum()), bool((logs.argmax(-1) == targets).all()), len(targets)


@pytest.mark.parametrize("batch_size, states", [(1, True), (16, True), (16, False)])
def test_likelihoods_are_those_of_a_plain_forward_pass(batch_size, states):
    model, processor = tiny()
    shared = picture(7)
    asked = [Question(f"<image>\n{words}", [shared]) for words in WORDS] + [Question(words) for words in WORDS]
    answerer = Answerer(model, processor, batch_size=batch_size, visual_states=states, max_new_tokens=4)
    pairs = [(question, text) for question in asked for text in ("a", "bad", "deaf ace")]
    results = list(answerer.loglikelihood(pairs))
    for (question, text), found in zip(pairs, results):
        total, greedy, tokens = plain_likelihood(model, processor, question, text)
        assert found.log_probability == pytest.approx(total, abs=2e-4)
        assert (found.is_greedy, found.tokens, found.error) == (greedy, tokens, None)


@pytest.mark.parametrize("image", [False, True])
def test_a_token_that_prompt_and_answer_share_is_the_answers(image):
    model, processor = tiny()
    names = {{"ag": " a"}.get(name, name): place for name, place in processor.tokenizer.get_vocab().items()}
    del names[processor.image_token]
    processor.tokenizer.backend_tokenizer.model = models.BPE(names, [(" ", "a"), ("b", "e")], unk_token="<pad>")
    answerer = Answerer(model, processor, chat_template="{% for m in messages %}{{ m.content }}{% endfor %} ")
    images = [picture(0)] * image
    prompt = "<image>b" * image + "b"
    pairs = [(Question([{"role": "user", "content": prompt}], images), text) for text in ("abe", "be")]
    assert [found.tokens for found in answerer.loglikelihood(pairs)] == [2, 1]
    (found, _) = answerer.loglikelihood(pairs)
    whole = processor(text=f"{prompt} abe", images=images or None, return_tensors="pt")
    assert whole["input_ids"][0, -2:].tolist() == [names[" a"], names["be"]]
    with torch.no_grad():
        logs = model(**whole).logits[0, -3:-1].double().log_softmax(-1)
    wanted = logs.gather(1, whole["input_ids"][0, -2:, None]).sum()
    assert found.log_probability == pytest.approx(float(wanted), abs=2e-4)


def test_what_has_no_likelihood_has_an_error():
    model, processor = tiny()
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    answerer = Answerer(model, processor, chat_template=template)
    pairs = [(Question("ab", key=1), ""), (Question("ab<image>", [picture(0)], 2), "a"), (Question("ab", key=3), "a")]
    results = list(answerer.loglikelihood(pairs))
    assert [result.key for result in results] == [1, 2, 3]
    assert all("empty, or follows an image" in result.error for result in results[:2])
    assert results[0] == Likelihood(1, error=results[0].error) and results[2].error is None


def test_the_answer_of_greedy_decoding_is_the_greedy_one():
    model, processor = tiny()
    template = "{% for m in messages %}{{ m.content }}{% endfor %} "
    answerer = Answerer(model, processor, chat_template=template, max_new_tokens=1)
    asked = [Question(words) for words in WORDS]
    said = [answer.text for answer in answerer.answer(asked)]
    pairs = [(question, text) for question, text in zip(asked, said) if text]
    assert pairs and all(result.is_greedy for result in answerer.loglikelihood(pairs))


def test_a_batch_has_at_least_one_question():
    with pytest.raises(ValueError, match="batch_size=0"):
        Answerer(*tiny(), batch_size=0)


# --- other inputs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size, states", [(1, True), (8, True), (8, False)])
@pytest.mark.parametrize("kind", ["next", "onevision"])  # the latter reads several images of a prompt without tiles
def test_images_in_tiles_are_answered_alike(kind, batch_size, states):
    if kind == "next":
        model, processor = tile_parts.tiled_saisa(), tile_parts.our_processor(tile_parts.next_processor())
    else:
        settings = {"image_grid_pinpoints": tile_parts.ONEVISION, "vision_aspect_ratio": "anyres_max_4"}
        model = tile_parts.tiled_saisa("siglip", **settings)
        processor = tile_parts.our_processor(tile_parts.onevision_processor())
    drawn = [tile_parts.draw(index, size) for index, size in enumerate([(12, 40), (30, 12), (24, 24), (5, 5)])]
    asked = [Question("is there a 3?", [drawn[index % 4]]) for index in range(8)] + [Question("where?", drawn[:2])]
    answers = Answerer(model, processor, batch_size=batch_size, visual_states=states, max_new_tokens=4).answer(asked)
    assert [answer.text for answer in answers] == [alone(model, processor, one, max_new_tokens=4) for one in asked]


def test_videos_are_answered_beside_images(tmp_path):
    pytest.importorskip("av")
    from test_video import make_model, make_processor
    from video_parts import write_video

    film = write_video(tmp_path / "film.mp4", count=20, rate=20)
    (tmp_path / "not.mp4").write_bytes(b"nothing")
    model, processor = make_model(), make_processor()
    asked = [Question(words, [Video(str(film))]) for words in WORDS[:2]] + [Question("abc", [picture(0)])] * 2
    answers = list(
        Answerer(model, processor, max_new_tokens=3).answer(
            [*asked, Question("abc", [Video(str(tmp_path / "not.mp4"))])]
        )
    )
    assert [answer.text for answer in answers[:4]] == [alone(model, processor, one, max_new_tokens=3) for one in asked]
    assert "video" in answers[4].error
