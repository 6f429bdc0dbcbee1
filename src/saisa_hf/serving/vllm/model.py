# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The model that vLLM runs: this package's encoder and projectors around vLLM's own decoder.

A step of the engine, in either of its model runners:

    embed_multimodal(pixels)               features of images that are not in the encoder cache
    embed_input_ids(ids, features, mask)   embeddings of the text; features and mask are kept for the step
    forward(...)                           keys and values of the visual rows into the cache, text rows through the decoder
    compute_logits(hidden states)          the head; the image token is never predicted

Shape suffixes: N rows of the step, T text rows, V visual rows, C width of the features, D hidden size.
"""

import re
from dataclasses import replace

import torch
from torch import Tensor, nn
from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context, override_forward_context
from vllm.model_executor.models.interfaces import SupportsMultiModal
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    init_vllm_registered_model,
    maybe_prefix,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from .metadata import StepRecord, remembering
from .processor import SaisaDummyInputs, SaisaMultiModalProcessor, SaisaProcessingInfo
from .refusals import DECODERS, check_layers
from .runs import Runs, runs_of
from .visual import VisualCacheWriter, VisualEncoder


TOWER = "model.vision_tower."


@MULTIMODAL_REGISTRY.register_processor(
    SaisaMultiModalProcessor, info=SaisaProcessingInfo, dummy_inputs=SaisaDummyInputs
)
class SaisaForConditionalGeneration(nn.Module, SupportsMultiModal):
    """SAISA in vLLM. `refusals.py` says what is refused, and has been checked when this is built."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_regex={
            re.compile(r"^model\.language_model\.layers\.(\d+)\.visual_projector\."): r"visual.projectors.\1.",
            re.compile(r"^model\.visual_projector\."): "visual.projectors.0.",
        },
        orig_to_new_prefix={
            "model.language_model.": "language_model.model.",
            "model.visual_resampler.": "encoder.visual_resampler.",
            "lm_head.": "language_model.lm_head.",
        },
    )

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return "<image>"

    def __init__(self, *, vllm_config, prefix: str = ""):
        super().__init__()
        self.config = config = vllm_config.model_config.hf_config
        text = config.text_config
        self.configure_mm_token_handling(text.vocab_size, [config.image_token_id])
        with self._mark_language_model(vllm_config):
            self.language_model = init_vllm_registered_model(
                vllm_config,
                hf_config=text,
                architectures=[DECODERS[text.model_type]],
                prefix=maybe_prefix(prefix, "language_model"),
            )
        layers = self.language_model.model.layers
        check_layers(layers)
        with self._mark_tower_model(vllm_config, "image"):
            self.encoder = VisualEncoder(config)
            quant_config = vllm_config.quant_config
            self.visual = VisualCacheWriter(layers, config, quant_config, maybe_prefix(prefix, "visual"))
        self.record = StepRecord()
        for layer in layers:
            cached = layer.self_attn.attn
            cached.attn_backend = remembering(cached.attn_backend, self.record)
        self._attention_names = [layer.self_attn.attn.layer_name for layer in layers]
        self._on_cpu = vllm_config.device_config.device_type == "cpu"
        # metadata builders on GPUs have buffers for so many sequences
        self._most_runs = None if self._on_cpu else vllm_config.scheduler_config.max_num_seqs
        self._graphs_of_all = vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        self._pending: tuple[Tensor, Tensor] | None = None

    # --- what the model runners call ---

    def embed_multimodal(self, **images) -> tuple[Tensor, ...]:
        """The encoder's features of images, (V, C) each."""
        return self.encoder.features(**images) if images.get("pixel_values") is not None else ()

    def embed_input_ids(self, input_ids: Tensor, multimodal_embeddings=None, *, is_multimodal: Tensor | None = None):
        """(N, D) embeddings. Where some rows are visual, their features are kept for `forward`; what stands in their rows is
        never read."""
        self._pending = None
        if multimodal_embeddings is not None and len(multimodal_embeddings):
            assert is_multimodal is not None  # the model runners give both
            features, visual = torch.cat(list(multimodal_embeddings)), is_multimodal.cpu()
            if len(features) != int(visual.sum()):
                raise ValueError(
                    f"{len(features)} visual tokens for {int(visual.sum())} placeholders: see check_pixels."
                )
            if self._graphs_of_all and self.record.common(self._attention_names[0]).max_query_len == 1:
                self._write_before_decoding(features, visual)
            else:
                self._pending = features, visual
        return self.language_model.embed_input_ids(input_ids)

    def forward(self, input_ids, positions, intermediate_tensors=None, inputs_embeds=None, **kwargs):
        """(N, D) hidden states; zeros in visual rows."""
        pending, self._pending = self._pending, None
        context = get_forward_context()
        if pending is None or context.attn_metadata is None:
            return self.language_model.model(input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds)
        features_VC, visual_N = pending
        common = self.record.common(self._attention_names[0])
        seq_lens = common.seq_lens if common.seq_lens_cpu_upper_bound is None else common.seq_lens_cpu_upper_bound
        runs = runs_of(common.query_start_loc_cpu, seq_lens, visual_N)
        visual_rows = visual_N.nonzero().squeeze(1).to(positions.device)
        slots_of = {name: slots[visual_rows] for name, slots in context.slot_mapping.items()}
        self.visual.write(features_VC, positions[visual_rows], slots_of)
        hidden_ND = inputs_embeds.new_zeros(len(positions), self.config.text_config.hidden_size)
        for part in runs.parts(self._most_runs) if len(runs) else []:
            self._run_text(part, hidden_ND, positions, inputs_embeds, context)
        return hidden_ND

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """(N, vocabulary). The image token stands for visual tokens in prompts, and is no answer."""
        logits = self.language_model.compute_logits(hidden_states)
        if logits is not None:
            logits[..., self.config.image_token_id] = -torch.inf
        return logits

    def load_weights(self, weights) -> set[str]:
        tower: dict[str, Tensor] = {}

        def others():
            for name, tensor in weights:
                if name.startswith(TOWER):
                    tower[name.removeprefix(TOWER)] = tensor
                else:
                    yield name, tensor

        loaded = AutoWeightsLoader(self).load_weights(others(), mapper=self.hf_to_vllm_mapper)
        if isinstance(self.encoder, VisualEncoder):  # vLLM leaves it out of an engine that takes no images
            loaded |= {f"encoder.vision_tower.{name}" for name in self.encoder.load_tower(tower)}
            if self._on_cpu:
                self.visual.copy_weights()
        return loaded

    # --- a step with visual rows ---

    def _run_text(self, runs: Runs, hidden_ND: Tensor, positions, inputs_embeds, context) -> None:
        """The text rows of `runs` through the decoder, into their rows of `hidden_ND`."""
        rows = runs.text_rows.to(positions.device)
        text_context = replace(
            context,
            attn_metadata=self.record.metadata_of_runs(context.attn_metadata, runs),
            slot_mapping={name: slots[rows] for name, slots in context.slot_mapping.items()},
            # captured for other numbers of rows
            cudagraph_runtime_mode=CUDAGraphMode.NONE,
            batch_descriptor=None,
            is_padding=None,
        )
        with override_forward_context(text_context):
            hidden_ND[rows] = self.language_model.model(None, positions[rows], None, inputs_embeds=inputs_embeds[rows])
        if self._most_runs is not None and len(runs) == self._most_runs:
            torch.accelerator.synchronize()  # the next part's metadata may use the same buffers

    def _write_before_decoding(self, features_VC: Tensor, visual_N: Tensor) -> None:
        """For a step of one row per request, which the model runner may replay as a captured graph of the whole model,
        without `forward`: the keys and values of visual rows are written now, and their slots taken out of the step, so
        that what the decoder makes of these rows is written nowhere. Nothing reads their outputs."""
        common = self.record.common(self._attention_names[0])
        visual_rows = visual_N.nonzero().squeeze(1).to(common.slot_mapping.device)
        mappings = {name: self.record.common(name).slot_mapping for name in self._attention_names}
        slots_of = {name: slots[visual_rows] for name, slots in mappings.items()}
        self.visual.write(features_VC, common.positions[visual_rows], slots_of)
        for slots in mappings.values():
            slots[visual_rows] = -1
