"""Attention metadata of runs, from the builders of the backends that vLLM has for CPUs and GPUs, as far as these can be made
without a GPU; and from what both of its model runners give them."""

import os
import random

import pytest
import torch


pytest.importorskip("vllm")
os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}

import vllm_parts as parts
from test_vllm_runs import random_step
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.kv_cache_interface import FullAttentionSpec

from saisa_hf.serving.vllm.metadata import StepRecord, common_of_runs, remembering
from saisa_hf.serving.vllm.runs import runs_of


BLOCK, BLOCKS = 16, 8
BACKENDS = {
    "flash": ("vllm.v1.attention.backends.flash_attn", "FlashAttentionBackend"),
    "triton": ("vllm.v1.attention.backends.triton_attn", "TritonAttentionBackend"),
    "flashinfer": ("vllm.v1.attention.backends.flashinfer", "FlashInferBackend"),
    "cpu": ("vllm.v1.attention.backends.cpu_attn", "CPUAttentionBackend"),
}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    checkpoint = parts.make_checkpoint(tmp_path_factory.mktemp("llama"))
    return EngineArgs(model=checkpoint, dtype="float32", max_model_len=256, enforce_eager=True).create_engine_config()


def common_metadata(seed):
    """What a model runner makes of a random step, and where its rows are visual."""
    starts, seq_lens, visual, rows = random_step(seed)
    requests, chooser = len(seq_lens), random.Random(seed)
    table = torch.tensor([chooser.sample(range(1, 200), BLOCKS) for _ in range(requests)], dtype=torch.int32)
    slots = [int(table[request, position // BLOCK]) * BLOCK + position % BLOCK for request, position in rows]
    common = CommonAttentionMetadata(
        query_start_loc=starts.int(),
        query_start_loc_cpu=starts.int(),
        seq_lens=seq_lens.int(),
        seq_lens_cpu_upper_bound=seq_lens.int(),
        num_reqs=requests,
        num_actual_tokens=len(rows),
        max_query_len=int(starts.diff().max()),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=table,
        slot_mapping=torch.tensor(slots),
        positions=torch.tensor([position for _, position in rows]),
        is_prefilling=starts.diff() > 1,
        req_idx=torch.arange(requests).numpy(),
    )
    return common, visual, rows


@pytest.mark.parametrize("seed", range(30))
def test_each_run_is_a_sequence_over_the_blocks_of_its_request(seed):
    common, visual, rows = common_metadata(seed)
    runs = runs_of(common.query_start_loc_cpu, common.seq_lens_cpu_upper_bound, visual)
    if not len(runs):
        return
    of_runs = common_of_runs(common, runs)
    text = [n for n in range(len(rows)) if not visual[n]]
    assert of_runs.num_actual_tokens == len(text) and of_runs.num_reqs == len(runs) == len(of_runs.seq_lens)
    assert of_runs.slot_mapping.equal(common.slot_mapping[text]) and of_runs.positions.equal(common.positions[text])
    for r, request in enumerate(runs.request.tolist()):
        assert of_runs.block_table_tensor[r].equal(common.block_table_tensor[request])
        assert of_runs.req_idx[r] == request and of_runs.is_prefilling[r] == common.is_prefilling[request]
        last = text[int(of_runs.query_start_loc[r + 1]) - 1]
        assert rows[last] == (request, int(of_runs.seq_lens[r]) - 1)
    assert of_runs.max_query_len == int(of_runs.query_start_loc.diff().max())
    assert of_runs.max_seq_len == int(of_runs.seq_lens.max())


@pytest.mark.parametrize("name", BACKENDS)
def test_builders_remember_the_step_and_build_runs(name, config):
    module, backend = BACKENDS[name]
    backend = getattr(pytest.importorskip(module), backend)
    record, names = StepRecord(), ["layers.0.self_attn.attn", "layers.1.self_attn.attn"]
    kind = remembering(backend, record)
    assert issubclass(kind, backend) and kind.get_name() == backend.get_name()
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=32, dtype=torch.float32)
    builder_class = kind.get_builder_cls()
    with set_current_vllm_config(config):
        assert builder_class.get_cudagraph_support(config, spec).value <= (
            AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE.value
        )
        builder = builder_class(spec, names, config, torch.device("cpu"))
        common, visual, _ = common_metadata(4)
        builder.build(0, common)
        runs = runs_of(common.query_start_loc_cpu, common.seq_lens_cpu_upper_bound, visual)
        built = record.metadata_of_runs(names, runs)
    assert record.common(names[1]) is common and built[names[0]] is built[names[1]]
    metadata = built[names[0]]
    assert metadata.num_actual_tokens == len(runs.text_rows)
    assert metadata.query_start_loc.equal(runs.query_start) and metadata.seq_lens.equal(runs.seq_lens)
    assert metadata.block_table.equal(common.block_table_tensor[runs.request])
    assert metadata.slot_mapping.equal(common.slot_mapping[runs.text_rows])
