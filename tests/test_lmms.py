"""The plug-in for lmms-eval: its answers are those of the engine. Where lmms-eval is not installed, on a stand-in of its API;
`test_lmms_eval.py` has the real thing."""

import importlib.util
import inspect
import subprocess
import sys

import lmms_standin
import numpy as np
import pytest
from PIL import Image

from saisa_hf.answering import Answerer, Question
from saisa_hf.demo import CHECKPOINT
from saisa_hf.evaluation.lmms_registration import manifest


INSTALLED = importlib.util.find_spec("lmms_eval") is not None
if not INSTALLED:
    lmms_standin.install()

from lmms_eval.api.instance import Instance  # noqa: E402

from saisa_hf.evaluation.lmms import SaisaChat, SaisaSimple, _generation  # noqa: E402


ASKED = ["how many digits are in the picture?", "what is the largest digit?", "which digit is red?"]


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (48, 48, 3), np.uint8))


# images are made anew each time a document is asked for them, as data sets make them
DOCUMENTS = [
    {"question": ASKED[0], "seeds": [0], "target": "3"},
    {"question": ASKED[1], "seeds": [0], "target": "4"},
    {"question": ASKED[2], "seeds": [1, 0], "target": "7"},
    {"question": "hello", "seeds": [], "target": "what"},
    {"question": ASKED[0], "seeds": [1], "target": "three of them"},
]


def visuals(document):
    return [picture(seed) for seed in document["seeds"]]


def messages(document):
    parts = [{"type": "image", "url": image} for image in visuals(document)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": document["question"]}]}]


def instance(kind, arguments, index):
    return Instance(kind, arguments, 0, {"task": "t", "doc_id": index, "repeats": 1})


def simple(generation, index):
    return instance("generate_until", (DOCUMENTS[index]["question"], generation, visuals, index, "t", "test"), index)


def chat(generation, index):
    return instance("generate_until", ("", messages, generation, index, "t", "test"), index)


def make(kind, **arguments):
    model = kind(pretrained=str(CHECKPOINT), device="cpu", dtype="float32", max_batch_size=None, **arguments)
    model.task_dict["t"] = {"test": DOCUMENTS}
    return model


@pytest.fixture(scope="module")
def models():
    return make(SaisaSimple, batch_size=2), make(SaisaChat, batch_size="3")


@pytest.fixture(scope="module")
def questions():
    return [Question(document["question"], visuals(document)) for document in DOCUMENTS]


@pytest.fixture(scope="module")
def engine(models):
    return Answerer(models[0].model, models[0].processor, batch_size=1, visual_states=False)


def test_answers_are_those_of_the_engine_in_order_whatever_each_is_asked_with(models, questions, engine):
    short, long = {"max_new_tokens": 2, "until": ["\n\n"]}, {"max_new_tokens": 6, "temperature": 0}
    given = [short, long, long, short, short]
    wanted = [
        next(iter(engine.answer([question], max_new_tokens=options["max_new_tokens"])))
        for question, options in zip(questions, given)
    ]
    assert len({answer.text for answer in wanted}) > 2
    for model, request in zip(models, (simple, chat)):
        found = model.generate_until([request(dict(options), index) for index, options in enumerate(given)])
        assert [(one.text, one.token_counts.output_tokens) for one in found] == [(a.text, a.tokens) for a in wanted]


def test_an_answer_ends_where_the_task_says(models, questions, engine):
    length = {"max_new_tokens": 8, "min_new_tokens": 8}
    (whole,) = engine.answer(questions[4:], **length)
    stop = whole.text[-3:-1]
    assert len(whole.text) > 4
    (found,) = models[0].generate_until([simple({**length, "until": [stop, ""]}, 4)])
    assert found.text == whole.text.partition(stop)[0].strip() != whole.text


def test_each_image_is_encoded_once_for_all_requests_about_it(models):
    for model, request in zip(models, (simple, chat)):
        encoded = []
        tower = model.model.model.vision_tower
        hook = tower.register_forward_hook(lambda *call, encoded=encoded: encoded.append(len(call[2][0])))
        model.generate_until([request({"max_new_tokens": 1}, index) for index in range(5)])
        hook.remove()
        assert sum(encoded) == 2


def test_likelihoods_are_losses_as_tasks_expect_them(models, questions, engine):
    requests = []
    for index, document in enumerate(DOCUMENTS):
        # as tasks of multiple choice give it, and as tasks of likelihood do
        target = f" {document['target']}" if index % 2 else lambda document: document["target"]
        arguments = (document["question"], target, visuals, index, "t", "test")
        requests.append(instance("loglikelihood", arguments, index))
    wanted = engine.loglikelihood(zip(questions, [document["target"] for document in DOCUMENTS]))
    found = [one.text for one in models[0].loglikelihood(requests)]
    for (loss, greedy), likelihood in zip(found, wanted):
        assert loss == pytest.approx(-likelihood.log_probability / likelihood.tokens, abs=1e-4) and loss > 0
        assert greedy == likelihood.is_greedy
    # the greedy answer is the likeliest
    (best,) = engine.answer(questions[:1], max_new_tokens=1)
    choices = [f" {text}" for text in dict.fromkeys([best.text, "0", "9", "red"])]
    arguments = [(ASKED[0], choice, visuals, 0, "t", "test") for choice in choices]
    losses = [one.text for one in models[0].loglikelihood([instance("loglikelihood", one, 0) for one in arguments])]
    assert np.argmin([loss for loss, _ in losses]) == 0 and losses[0][1]


def test_images_stand_where_a_text_says_and_a_system_message_comes_first(models):
    image = models[0].processor.image_token
    question = models[0]._simple(f"first {image} then {image}", [picture(0), [picture(1)]], key=0)
    assert [part["type"] for part in question.prompt[0]["content"]] == ["text"] and len(question.images) == 2
    assert question.images[0] is models[0]._simple("", [picture(0)], key=0).images[0]
    models[1].system_prompt = "be brief"
    try:
        question = models[1]._conversation(messages(DOCUMENTS[0]), key=0)
    finally:
        models[1].system_prompt = None
    assert question.prompt[0] == {"role": "system", "content": [{"type": "text", "text": "be brief"}]}
    assert [part["type"] for part in question.prompt[1]["content"]] == ["image", "text"]


@pytest.mark.parametrize(
    ("given", "options", "stops"),
    [
        (
            {"until": "\n", "temperature": 0, "top_p": None, "num_beams": 1},
            {"num_beams": 1, "do_sample": False},
            ["\n"],
        ),
        ({"temperature": 0.0, "top_p": 1.0, "do_sample": True}, {"do_sample": False}, []),
        ({"temperature": 0.7, "top_p": 0.9}, {"temperature": 0.7, "top_p": 0.9, "do_sample": True}, []),
        ({"temperature": 0.7, "do_sample": False}, {"do_sample": False}, []),
        ({"do_sample": True, "top_k": 5, "max_gen_toks": 7}, {"do_sample": True, "top_k": 5, "max_new_tokens": 7}, []),
    ],
)
def test_generation_arguments(given, options, stops):
    assert _generation(given) == (options, stops)


def test_what_is_for_other_models_is_left_out_and_named(caplog):
    assert _generation({"image_aspect_ratio": "original"}) == ({"do_sample": False}, [])
    assert "image_aspect_ratio" in caplog.text


def test_what_cannot_be_is_refused_by_name(models):
    with pytest.raises(ValueError, match="batch_size='auto'"):
        make(SaisaSimple, batch_size="auto")
    with pytest.raises(TypeError, match="batchsize"):
        make(SaisaSimple, batchsize=1)
    sound = {"array": np.zeros(9), "sampling_rate": 16000}
    for visual, message in (("clip.mp4", "video 0 of 1 cannot be read"), (sound, "text, images and videos")):
        arguments = ("?", {}, lambda document, visual=visual: [visual], 0, "t", "test")
        with pytest.raises(ValueError, match=message):
            models[0].generate_until([instance("generate_until", arguments, 0)])
    with pytest.raises(NotImplementedError, match="several rounds"):
        models[0].generate_until_multi_round([])


def test_the_registration_names_the_classes_and_loads_nothing_heavy():
    found = manifest()
    names = [path.rpartition(".")[2] for path in (found.simple_class_path, found.chat_class_path)]
    assert found.model_id == "saisa" and names == ["SaisaSimple", "SaisaChat"]
    assert SaisaSimple.is_simple and not SaisaChat.is_simple
    code = "import sys\nsys.path.insert(0, 'tests')\n"
    code += "" if INSTALLED else "import lmms_standin\nlmms_standin.install()\n"
    code += "from saisa_hf.evaluation.lmms_registration import manifest\nmanifest()\n"
    code += "assert not {'torch', 'transformers'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(not INSTALLED, reason="lmms-eval is not installed")
@pytest.mark.parametrize("module", lmms_standin.MODULES)
def test_the_stand_in_has_the_signatures_of_the_real_api(module):
    def shape(function):
        return [(p.name, p.kind, p.default) for p in inspect.signature(function).parameters.values()]

    real = importlib.import_module(module)
    for own in lmms_standin.MODULES[module]:
        other = getattr(real, own.__name__)
        if hasattr(own, "__dataclass_fields__"):
            fields = list(own.__dataclass_fields__)
            assert fields == list(other.__dataclass_fields__)[: len(fields)]
            continue
        for name, method in inspect.getmembers(own, inspect.isfunction):
            assert shape(method) == shape(getattr(other, name)), name
