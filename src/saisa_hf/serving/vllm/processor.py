# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Images of requests as tensors that `SaisaProcessor` makes of them, and prompts with a placeholder for each visual token."""

from itertools import groupby

from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
)

from ...configuration_saisa import SaisaConfig
from ...processing_saisa import SaisaProcessor
from ...vision_saisa import image_size, reduced_length
from .refusals import IN_TRANSFORMERS, check_pixels, check_request_settings, refusal


class SaisaProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about a SAISA checkpoint."""

    def get_hf_config(self):
        return self.ctx.get_hf_config(SaisaConfig)

    def get_hf_processor(self, **kwargs):
        return self.ctx.get_hf_processor(SaisaProcessor, **kwargs)

    def get_supported_mm_limits(self):
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len, mm_counts):
        """The visual tokens of the image that has most."""
        config, processor = self.get_hf_config(), self.get_hf_processor()
        if config.vision_config.model_type != "siglip2_vision_model":
            return {"image": processor._get_num_multimodal_tokens([self.dummy_size()]).num_image_tokens[0]}
        patches = getattr(processor.image_processor, "max_num_patches", None) or config.vision_config.num_patches
        reduction = config.visual_token_reduction, config.reduced_visual_tokens
        grids = [(rows, patches // rows) for rows in range(1, patches + 1)]
        return {"image": max(reduced_length(*reduction, rows * columns, (rows, columns)) for rows, columns in grids)}

    def dummy_size(self) -> tuple[int, int]:
        """(height, width) of an image to measure memory with."""
        return image_size(self.get_hf_config().vision_config)


class SaisaDummyInputs(BaseDummyInputsBuilder[SaisaProcessingInfo]):
    """Requests to measure memory with."""

    def get_dummy_text(self, mm_counts):
        return self.info.get_hf_processor().image_token * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len, mm_counts, mm_options):
        height, width = self.info.dummy_size()
        count, options = mm_counts.get("image", 0), mm_options.get("image")
        return {"image": self._get_dummy_images(width=width, height=height, num_images=count, overrides=options)}


class SaisaMultiModalProcessor(BaseMultiModalProcessor[SaisaProcessingInfo]):
    """From the ids of a prompt with one image token per image to those with one per visual token."""

    def apply(self, inputs, timing_ctx):
        check_request_settings(inputs.hf_processor_mm_kwargs)
        return super().apply(inputs, timing_ctx)

    def _get_mm_fields_config(self, hf_inputs, hf_processor_mm_kwargs):
        if "num_tiles" in hf_inputs:
            why = f"an image has one picture here. {IN_TRANSFORMERS}"
            raise refusal("an image processor that makes tiles of images", why)
        names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
        return {name: MultiModalFieldConfig.batched("image") for name in names if name in hf_inputs}

    def _get_prompt_updates(self, mm_items, hf_processor_mm_kwargs, out_mm_kwargs):
        config, processor = self.info.get_hf_config(), self.info.get_hf_processor()

        def placeholders(index: int) -> list[int]:
            item = out_mm_kwargs["image"][index]
            sizes = {name: [item[name].data] for name in ("pixel_values", "spatial_shapes") if name in item}
            count = processor._counts(sizes)[0]
            check_pixels(config, tuple(sizes["pixel_values"][0].shape), count)
            return [config.image_token_id] * count

        return [PromptReplacement(modality="image", target=[config.image_token_id], replacement=placeholders)]

    def _apply_prompt_updates(self, token_ids, mm_prompt_updates):
        """vLLM's own, for ids with one image token per image or, as `SaisaProcessor` makes them, one per visual token."""
        token = self.info.get_hf_config().image_token_id
        lengths = [len(updates[0].content.full) for updates in mm_prompt_updates.get("image", ())]
        found = token_ids.count(token)
        if found == sum(lengths) != len(lengths):
            token_ids = _one_per_image(token_ids, token, lengths)
        elif found != len(lengths):
            raise ValueError(
                f"The prompt has {found} image tokens ({token}) for {len(lengths)} images: expected one for each image"
                f"{f', or all {sum(lengths)} placeholders' if lengths else ''}."
            )
        return super()._apply_prompt_updates(token_ids, mm_prompt_updates)


def _one_per_image(token_ids: list[int], token: int, lengths: list[int]) -> list[int]:
    """Ids with a placeholder for each visual token -> ids with one for each image."""
    remaining, kept = list(lengths), []
    for is_image, group in groupby(token_ids, key=token.__eq__):
        ids = list(group)
        if not is_image:
            kept += ids
            continue
        left = len(ids)
        while left > 0:
            length = remaining.pop(0)
            if length > left:
                raise ValueError(
                    f"The prompt has {len(ids)} image tokens ({token}) in a row, which the images, of {lengths} visual "
                    "tokens, do not fill one after the other."
                )
            left -= length
            kept.append(token)
    return kept
