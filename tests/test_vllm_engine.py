"""vLLM's answers beside those of this package under transformers. One engine for all of its tests, as they start slowly.

`make test-vllm` runs these; they are skipped where vLLM is not installed."""

import re

import pytest


pytest.importorskip("vllm")

import torch
import vllm_parts as parts
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import StructuredOutputsParams
from vllm_engine import Engine, assert_equal, greedy

from saisa_hf import SaisaForConditionalGeneration, SaisaProcessor


NEW_TOKENS = 8
GREEDY = greedy(NEW_TOKENS)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return parts.make_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def cases(checkpoint):
    return parts.answer(parts.random_cases(24, seed=1), checkpoint, NEW_TOKENS)


@pytest.fixture(scope="module")
def engine(checkpoint):
    made = Engine(checkpoint)
    yield made
    made.close()


@pytest.fixture(scope="module")
def processor(checkpoint):
    return SaisaProcessor.from_pretrained(checkpoint)


def image_token(engine):
    return engine.model.config.image_token_id


# --- right ------------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_transformers_and_visual_rows_pass_no_layer(engine, cases):
    """Chunks of 48 tokens cut images; prefills and decoding steps share steps."""
    engine.llm.reset_prefix_cache()
    assert_equal(cases, engine.answers(cases, GREEDY))
    token = image_token(engine)
    visual = sum(case.prompt_ids.count(token) for case in cases)
    text = sum(len(case.prompt_ids) for case in cases) - visual
    cached = visual - sum(engine.projected)  # blocks that prompts of this batch share
    assert sum(engine.fed) <= text + len(cases) * (NEW_TOKENS - 1)
    assert visual > 0 and cached >= 0


def test_a_second_question_encodes_nothing_and_projects_what_block_boundaries_leave(engine, checkpoint):
    images, token = parts.pictures(2, seed=5), image_token(engine)
    texts = ["<image>\n<image>\nwhat is red ASSISTANT:", "<image>\n<image>\nhow many circles are there ASSISTANT:"]
    asked = parts.answer([parts.Case(text, images) for text in texts], checkpoint, NEW_TOKENS)
    engine.llm.reset_prefix_cache()
    assert_equal(asked[:1], engine.answers(asked[:1], GREEDY))
    assert len(engine.encoded) > 0 and sum(engine.projected) == asked[0].prompt_ids.count(token)
    outputs = engine.answers(asked[1:], GREEDY)
    assert_equal(asked[1:], outputs)
    assert outputs[0].num_cached_tokens == 32 and not engine.encoded  # one block of 32
    assert sum(engine.projected) == asked[1].prompt_ids[32:].count(token) > 0


def test_every_request_alone_answers_as_in_a_batch(engine, cases):
    engine.llm.reset_prefix_cache()
    for case in cases[:6]:
        assert_equal([case], engine.answers([case], GREEDY))


def test_prompts_of_ids_with_one_token_per_image_or_per_visual_token(engine, cases, processor):
    chosen = [case for case in cases if case.images][:3]
    token = image_token(engine)
    for case in chosen:
        units, options = processor._units([1] * len(case.images)), {"return_mm_token_type_ids": False}
        short = processor._tokenize([case.text], units, {processor.image_token}, options)
        for ids in (case.prompt_ids, short["input_ids"][0]):
            request = {"prompt_token_ids": ids, "multi_modal_data": {"image": case.images}}
            assert_equal([case], engine.llm.generate([request], GREEDY, use_tqdm=False))
    assert chosen[0].prompt_ids.count(token) > len(chosen[0].images)


def test_chats_become_the_ids_that_the_processor_makes(engine, processor):
    images = parts.pictures(2)
    for content in (
        "what is red",
        [{"type": "image", "image": images[0]}, {"type": "text", "text": " what is in the image"}],
        [{"type": "text", "text": "left "}, {"type": "image", "image": images[0]}, {"type": "image", "image": images[1]},
         {"type": "text", "text": "  and"}],
    ):  # fmt: skip
        ours = [{"role": "user", "content": content}]
        expected = processor.apply_chat_template(ours, tokenize=True, add_generation_prompt=True)
        theirs = content if isinstance(content, str) else [
            part if part["type"] == "text" else {"type": "image_pil", "image_pil": part["image"]} for part in content
        ]  # fmt: skip
        chat = [{"role": "user", "content": theirs}]
        output = engine.llm.chat(chat, SamplingParams(max_tokens=1), use_tqdm=False)[0]
        assert list(output.prompt_token_ids) == expected[0]


def test_sampled_answers_have_the_log_probabilities_of_transformers(engine, cases, checkpoint, processor):
    case = next(case for case in cases if len(case.images) == 2)
    sampling = SamplingParams(n=3, temperature=1.0, max_tokens=6, ignore_eos=True, logprobs=0)
    output = engine.answers([case], sampling)[0]
    model = SaisaForConditionalGeneration.from_pretrained(checkpoint).eval()
    assert len({tuple(one.token_ids) for one in output.outputs}) > 1
    for one in output.outputs:
        inputs = processor(text=case.text, images=case.images, return_tensors="pt")
        inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([list(one.token_ids)])], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.no_grad():
            logits = model(**inputs).logits[0, len(case.prompt_ids) - 1 : -1]
        logits[:, image_token(engine)] = -torch.inf
        expected = logits.log_softmax(-1)[range(6), list(one.token_ids)]
        found = torch.tensor([step[token].logprob for step, token in zip(one.logprobs, one.token_ids)])
        assert (found - expected).abs().max() < 1e-4


def test_stop_strings_and_guided_answers(engine, cases, processor):
    case = next(case for case in cases if case.images)
    whole = engine.answers([case], GREEDY)[0].outputs[0]
    stop = processor.tokenizer.decode(case.ids[3:4])
    stopped = engine.answers([case], SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, stop=[stop]))
    assert whole.text.startswith(stopped[0].outputs[0].text) and stop not in stopped[0].outputs[0].text
    guided = StructuredOutputsParams(regex="(red|blue) (left|right)")
    sampling = SamplingParams(temperature=1.0, max_tokens=12, structured_outputs=guided)
    assert re.fullmatch("(red|blue) (left|right)", engine.answers([case], sampling)[0].outputs[0].text)


def test_the_image_token_is_never_an_answer(engine, cases):
    token = image_token(engine)
    sampling = SamplingParams(temperature=1.0, max_tokens=6, ignore_eos=True, logit_bias={token: 100.0})
    for output in engine.answers(cases[:6], sampling):
        assert token not in output.outputs[0].token_ids


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        ("what is <image>", 1, "ends in an image.*put a text token behind it"),
        ("what is <image> red", 0, "1 image tokens .* images have 0 visual tokens"),
        ("what is red", 1, "image"),
        ("<image> and <image> red", 1, "2 image tokens .* for 1 images"),
    ],
)
def test_prompts_that_do_not_fit_their_images_are_refused(engine, text, images, message):
    data = {"multi_modal_data": {"image": parts.pictures(images)}} if images else {}
    with pytest.raises(ValueError, match=message):
        engine.llm.generate([{"prompt": text, **data}], GREEDY, use_tqdm=False)


def test_log_probabilities_of_prompts_are_refused(engine, cases):
    with pytest.raises(VLLMValidationError, match="prompt_logprobs=1: a visual token predicts nothing"):
        engine.answers(cases[:1], SamplingParams(max_tokens=1, prompt_logprobs=1))


# --- steps of one row, which graphs replay ----------------------------------------------------------------------------


def test_a_step_of_one_visual_row_is_right_without_forward(engine, cases, monkeypatch):
    """As with graphs of the whole model: visual keys are written before the step, and the step writes none of its own."""
    monkeypatch.setattr(engine.model, "_graphs_of_all", True)
    monkeypatch.setattr(engine.scheduler, "max_num_scheduled_tokens", 1)
    engine.llm.reset_prefix_cache()
    calls = []
    monkeypatch.setattr(engine.model, "_run_text", lambda *arguments: calls.append(arguments))
    chosen = [case for case in cases if case.images][:3]
    assert_equal(chosen, engine.answers(chosen, GREEDY))
    assert not calls and set(engine.fed) == {1}


def test_runs_in_parts_answer_alike(engine, cases, monkeypatch):
    """On GPUs metadata builders have buffers for max_num_seqs sequences; runs can be more."""
    monkeypatch.setattr(engine.model, "_most_runs", 2)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    engine.llm.reset_prefix_cache()
    assert_equal(cases, engine.answers(cases, GREEDY))


def test_metadata_of_the_newer_model_runner_answer_alike(engine, cases, monkeypatch):
    """vLLM's second model runner, which does not run on CPUs, makes attention metadata in another function."""
    from vllm.v1.worker.gpu.attn_utils import build_attn_metadata

    calls = []

    def build(num_tokens, num_reqs, max_query_len, slot_mappings, **kwargs):
        calls.append(num_reqs)
        computed = runner.input_batch.num_computed_tokens_cpu_tensor[:num_reqs]
        metadata = build_attn_metadata(
            attn_groups=runner.attn_groups,
            num_reqs=num_reqs,
            num_tokens=num_tokens,
            query_start_loc_gpu=runner.query_start_loc.gpu[: num_reqs + 1],
            query_start_loc_cpu=torch.from_numpy(runner.query_start_loc.np[: num_reqs + 1]),
            max_query_len=max_query_len,
            seq_lens=runner.seq_lens,
            max_seq_len=int(runner.optimistic_seq_lens_cpu[:num_reqs].max()),
            block_tables=[table.get_device_tensor(num_reqs) for table in runner.input_batch.block_table.block_tables],
            slot_mappings=torch.stack([slot_mappings[i] for i in sorted(slot_mappings)]),
            kv_cache_config=runner.kv_cache_config,
            seq_lens_cpu_upper_bound=runner.optimistic_seq_lens_cpu,
            positions=runner.positions,
            is_prefilling=computed < runner.input_batch.num_prompt_tokens_cpu_tensor[:num_reqs],
            req_idx=torch.arange(num_reqs).numpy(),
        )
        return metadata, None

    runner = engine.runner
    monkeypatch.setattr(runner, "_build_attention_metadata", build)
    engine.llm.reset_prefix_cache()
    assert_equal(cases, engine.answers(cases, GREEDY))
    assert calls


def test_preempted_requests_are_computed_again(checkpoint, engine):
    """Last: this engine takes the place of the shared one."""
    engine.close()
    cases = [case for case in parts.random_cases(40, seed=2) if 1 <= len(case.images) <= 2][:8]
    cases = parts.answer(cases, checkpoint, 60)
    small = Engine(checkpoint, num_gpu_blocks_override=9, enable_prefix_caching=False)
    preempted, own = [], small.scheduler._preempt_request

    def preempt(request, *arguments, **kwargs):
        preempted.append(request.request_id)
        return own(request, *arguments, **kwargs)

    small.scheduler._preempt_request = preempt
    try:
        sampling = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logprobs=0)
        assert_equal(cases, small.answers(cases, sampling))
        assert preempted
    finally:
        small.close()
