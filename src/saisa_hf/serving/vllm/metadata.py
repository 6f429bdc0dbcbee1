# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Attention metadata in which each run of text is a sequence of its own that shares its request's blocks.

Both of vLLM's model runners hand a `CommonAttentionMetadata` to the metadata builder of each group of attention layers. The
builders here are vLLM's own, made to remember what they were given, so that the model can ask for metadata of runs.
"""

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata, subclass_attention_backend

from .runs import Runs


class StepRecord:
    """What the metadata builders were last given: that of the step which the model runner has prepared."""

    def __init__(self):
        self._builder_of = {}  # by layer name
        self._common_of = {}  # by builder

    def keep(self, builder, common: CommonAttentionMetadata) -> None:
        self._common_of[builder] = common
        self._builder_of |= dict.fromkeys(builder.layer_names, builder)

    def common(self, layer_name: str) -> CommonAttentionMetadata:
        """What the builder of that layer was given."""
        return self._common_of[self._builder_of[layer_name]]

    def metadata_of_runs(self, layer_names, runs: Runs) -> dict:
        """For each layer, the metadata of `runs` that its backend makes."""
        built = {}
        for name in layer_names:
            builder = self._builder_of[name]
            if builder not in built:
                built[builder] = builder.of_runs(common_of_runs(self._common_of[builder], runs))
        return {name: built[self._builder_of[name]] for name in layer_names}


def remembering(backend, record: StepRecord):
    """`backend`, whose metadata builders keep in `record` what they are given."""
    underlying: Any = backend.get_builder_cls()

    class Builder(underlying):
        supports_update_block_table = False  # each group is to be built, so that its blocks are known

        def build(self, common_prefix_len, common_attn_metadata, fast_build=False, **kwargs):
            record.keep(self, common_attn_metadata)
            return super().build(common_prefix_len, common_attn_metadata, fast_build, **kwargs)

        def of_runs(self, common):
            return super().build(0, common)

        @classmethod
        def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
            # a graph of the whole model replays without Python: never for a batch that may hold visual rows next to others
            support = super().get_cudagraph_support(vllm_config, kv_cache_spec)
            return min(support, AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE, key=lambda one: one.value)

        @classmethod
        def get_varlen_cudagraph_max_query_len(cls, vllm_config, kv_cache_spec):
            return None

    return subclass_attention_backend("Saisa", backend, Builder)


def common_of_runs(common: CommonAttentionMetadata, runs: Runs) -> CommonAttentionMetadata:
    """`common`, which is about requests, for `runs`: T rows in place of N, R sequences in place of Q."""
    rows, request = _Picked(runs.text_rows), _Picked(runs.request)
    return common.replace(
        query_start_loc=runs.query_start.to(common.query_start_loc.device, non_blocking=True),
        query_start_loc_cpu=runs.query_start,
        seq_lens=runs.seq_lens.to(common.seq_lens.device, common.seq_lens.dtype, non_blocking=True),
        seq_lens_cpu_upper_bound=runs.seq_lens,
        num_reqs=len(runs),
        num_actual_tokens=len(runs.text_rows),
        max_query_len=runs.longest,
        max_seq_len=int(runs.seq_lens.max()),
        block_table_tensor=request.of(common.block_table_tensor),
        slot_mapping=rows.of(common.slot_mapping),
        positions=rows.of(common.positions),
        is_prefilling=request.of(common.is_prefilling),
        req_idx=request.of(common.req_idx),
        rswa_prefix_lens=request.of(common.rswa_prefix_lens),
        logits_indices_padded=None,
        num_logits_indices=None,
        max_logits_per_req=None,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
    )


class _Picked:
    """Chosen rows of tensors on any device, or of arrays; of nothing, nothing."""

    def __init__(self, index: Tensor):
        self.index, self._on = index, {}

    def of(self, x):
        if x is None:
            return None
        if not isinstance(x, Tensor):
            return x[self.index.numpy()]
        if x.device not in self._on:
            self._on[x.device] = self.index.to(x.device, non_blocking=True)
        return torch.index_select(x, 0, self._on[x.device])
