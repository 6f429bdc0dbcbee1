# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What this plug-in does not serve, and why, in words. All of it is found before a wrong answer can be.

`SaisaChecks` is what vLLM calls with the settings of an engine, `check_layers` what the model calls with the decoder that
vLLM built, and `check_prompt` what the renderer calls with each prompt.
"""

from collections.abc import Sequence
from typing import Any

from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.v1.sample.logits_processor import LogitsProcessor as LogitsProcessorOfFirstRunner
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from ...language_models_saisa import FAMILIES
from ...vision_saisa import image_size


# families of language models that vLLM has a decoder of its own for
DECODERS = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
}
ALWAYS_TIED = ("gemma2", "gemma3_text")
FIXED_SIZE = ("clip_vision_model", "siglip_vision_model")  # encoders whose positions are those of one size
MIXTURES = ("qwen3_moe", "mixtral")
# rotary embeddings that vLLM computes from the longest possible sequence, transformers from the sequence at hand
STRETCHED = ("dynamic", "longrope")
QUANTIZATIONS = (
    "fp8",
)  # of linear layers, while they are loaded; visual keys and values then come from whole projections
IN_TRANSFORMERS = "Serve it with `transformers serve`."


class SaisaChecks(VerifyAndUpdateConfig):
    """Checks of an engine's settings. Raises ValueError with the setting, its value, and what to do."""

    @staticmethod
    def verify_and_update_model_config(model_config) -> None:
        check_checkpoint(model_config.hf_config)
        if model_config.quantization not in (None, *QUANTIZATIONS):
            allowed = ", ".join(QUANTIZATIONS)
            why = f"SAISA's tensors were not tried with it. vLLM can quantize while it loads: {allowed}."
            raise refusal(f"quantization={model_config.quantization!r}", why)
        if model_config.runner_type != "generate":
            raise refusal(f"runner={model_config.runner_type!r}", "visual rows have no hidden states to pool.")
        if model_config.enable_prompt_embeds:
            raise refusal("enable_prompt_embeds=True", "embeddings do not tell which tokens are visual. Leave it out.")
        multimodal = model_config.multimodal_config
        if multimodal is not None and multimodal.enable_mm_embeds:
            raise refusal("enable_mm_embeds=True", "images are taken as pixels. Leave it out.")
        if multimodal is not None and multimodal.mm_encoder_only:
            raise refusal("mm_encoder_only=True", "features are made where they are used. Leave it out.")
        if multimodal is not None:
            # A request that is refused after its images were processed (`n` is too large, say) leaves them in the cache of
            # the process that answers HTTP, as if the engine had them too: each later request with one of them would fail.
            multimodal.mm_processor_cache_gb = 0
        if model_config.tokenizer_mode in ("auto", "hf"):
            model_config.tokenizer_mode = "saisa"  # tokenizes as SaisaProcessor does

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        for given, why in engine_problems(vllm_config):
            raise refusal(given, why)
        # the two model runners have logits processors of different classes, and each refuses those of the other
        own = NoPromptLogprobs if vllm_config.use_v2_model_runner else NoPromptLogprobsInFirstRunner
        others = vllm_config.model_config.logits_processors or []
        vllm_config.model_config.logits_processors = [*others, own]


def refusal(given: str, why: str) -> ValueError:
    """The error about a setting that does not go with SAISA in vLLM."""
    return ValueError(f"SAISA in vLLM does not support {given}: {why}")


def check_checkpoint(config) -> None:
    """Raises ValueError if a `SaisaConfig` describes a model that vLLM cannot run."""
    text = config.text_config
    if config.in_embedding_space:
        why = f"its visual tokens pass the decoder layers in ways that vLLM has no kernels for. {IN_TRANSFORMERS}"
        raise refusal('a checkpoint with alignment="embedding_space"', why)
    if config.visual_layers is not None and sorted(config.visual_layers) != list(range(text.num_hidden_layers)):
        why = f"a paged cache has the tokens of all layers, and its kernels cannot hide visual ones. {IN_TRANSFORMERS}"
        raise refusal(f"visual_layers={config.visual_layers}", why)
    if config.leading_text_skips_attention:
        raise refusal("leading_text_skips_attention=True", f"its decoders let all text attend. {IN_TRANSFORMERS}")
    if text.model_type not in DECODERS:
        missing = ", ".join(sorted(set(FAMILIES) - set(DECODERS)))
        why = f"vLLM has no decoder of its own for it (nor for others of {missing}). {IN_TRANSFORMERS}"
        raise refusal(f"a language model of type {text.model_type!r}", why)
    if text.model_type in ALWAYS_TIED and not config.tie_word_embeddings:
        raise refusal(
            "tie_word_embeddings=False",
            f"vLLM's decoder for {text.model_type} has no head of its own. {IN_TRANSFORMERS}",
        )
    if config.image_grid_pinpoints is not None:
        why = f"each projector has a learned row for the ends of their lines, which is not read here. {IN_TRANSFORMERS}"
        raise refusal("image_grid_pinpoints, images in tiles", why)
    for rope_type in rope_types(text):
        if rope_type in STRETCHED:
            why = f"vLLM stretches it by the longest possible sequence, not by the one at hand. {IN_TRANSFORMERS}"
            raise refusal(f"a rotary embedding of type {rope_type!r}", why)


def rope_types(text) -> set[str]:
    """The types of rotary embedding that a language model's config names."""
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    each = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    return {one.get("rope_type", one.get("type", "default")) for one in each}


def engine_problems(vllm_config):
    """Yields (setting, why not) of an engine's configuration."""
    parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
    if vllm_config.lora_config is not None:
        yield "LoRA adapters", "merge the adapter into the checkpoint (PEFT's merge_and_unload)."
    if vllm_config.speculative_config is not None:
        yield (
            "speculative decoding",
            "a drafter would need the visual keys and values too. Leave speculative_config out.",
        )
    if parallel.pipeline_parallel_size > 1:
        size = parallel.pipeline_parallel_size
        yield f"pipeline_parallel_size={size}", "visual features reach the first stage alone. Use tensor_parallel_size."
    for name in ("prefill_context_parallel_size", "decode_context_parallel_size"):
        if (size := getattr(parallel, name, 1)) > 1:
            yield f"{name}={size}", "runs of text are not spread over processes. Use tensor_parallel_size."
    if getattr(parallel, "use_ubatching", False):
        yield "dual batch overlap", "a step with images is run at once. Leave enable_dbo out."
    mixture = vllm_config.model_config.hf_config.text_config.model_type in MIXTURES
    if mixture and (parallel.data_parallel_size > 1 or getattr(parallel, "use_sequence_parallel_moe", False)):
        yield "experts spread by data or sequence parallelism", "its processes expect equally many rows. Use 1."
    if getattr(compilation.pass_config, "enable_sp", False):
        yield "sequence parallelism (pass_config.enable_sp)", "steps with images have any number of rows. Leave it out."
    if vllm_config.kv_transfer_config is not None:
        yield "a KV connector (kv_transfer_config)", "it would hash and move prompts without their images' features."
    if getattr(vllm_config, "ec_transfer_config", None) is not None:
        yield "an encoder cache connector (ec_transfer_config)", "features are made where they are used. Leave it out."
    if vllm_config.cache_config.kv_sharing_fast_prefill:
        yield "kv_sharing_fast_prefill=True", "no language model of SAISA shares keys and values between layers."
    offload = getattr(vllm_config, "offload_config", None)
    if offload is not None and (offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0):
        yield (
            "offloading of weights",
            "visual keys and values are made outside of the layers that it wraps. Leave it out.",
        )
    if uses_breakable_graphs():
        yield "VLLM_USE_BREAKABLE_CUDAGRAPH=1", "a replayed graph would skip the visual rows of a step. Set it to 0."


def uses_breakable_graphs() -> bool:
    """Whether vLLM captures the whole model in pieces, Python and all."""
    try:
        from vllm.compilation.breakable_cudagraph import is_breakable_cudagraph_enabled
    except ImportError:
        return False
    return is_breakable_cudagraph_enabled()


def check_layers(layers: Sequence) -> None:
    """Raises ValueError if the decoder that vLLM built has not what visual keys and values are made with."""
    for layer in layers:
        attention: Any = getattr(layer, "self_attn", None)
        parts = [(layer, "input_layernorm"), *((attention, name) for name in ("qkv_proj", "q_size", "kv_size", "attn"))]
        missing = [name for owner, name in parts if not hasattr(owner, name)]
        if missing:
            raise refusal(f"a decoder of {type(layer).__name__}", f"it has no {', '.join(missing)}.")
        backend = attention.attn.get_attn_backend()
        if backend.forward_includes_kv_cache_update:
            why = "it writes keys and values together with attention. Choose another with attention_backend."
            raise refusal(f"the attention backend {backend.get_name()}", why)


def check_prompt(token_ids: list[int], image_token: int, visual_tokens: int) -> None:
    """Raises ValueError if the prompt of a request has image tokens without images, or ends in an image.

    Args:
        token_ids: with a placeholder for each visual token.
        visual_tokens: how many the request's images have.
    """
    found = token_ids.count(image_token)
    if found != visual_tokens:
        raise ValueError(
            f"The prompt has {found} image tokens ({image_token}), its images have {visual_tokens} visual tokens: give "
            "one image for each image token in the text."
        )
    if token_ids and token_ids[-1] == image_token:
        raise ValueError(
            "The prompt ends in an image, but visual tokens predict nothing: put a text token behind it, for instance a "
            "newline."
        )


def check_names(names) -> None:
    """Raises ValueError if a chat's images bring names of their own (`uuid`): vLLM takes the name for the content, so that
    one client could put another image into its caches in place of someone else's."""
    if any(name is not None for each in (names or {}).values() for name in each or ()):
        raise refusal("uuid of an image", "images are known by their pixels. Leave it out.")


def check_request_settings(settings) -> None:
    """Raises ValueError if a request brings settings of the processor (`mm_processor_kwargs`): with other numbers of visual
    tokens than the model makes, the engine would stop for everybody."""
    if settings:
        raise refusal(
            f"mm_processor_kwargs in a request ({', '.join(sorted(settings))})",
            "they are the server's to choose. Give them when you start it, or save them with the checkpoint.",
        )


def check_pixels(config, shape: tuple[int, ...], placeholders: int) -> None:
    """Raises ValueError if the encoder does not take an image of processed pixels (channels, height, width), or makes other
    than so many visual tokens of it. Patches of SigLIP 2, which bring their grid, are of any number."""
    if len(shape) != 3:
        return
    size, own = shape[1:], image_size(config.vision_config)
    if config.vision_config.model_type in FIXED_SIZE and size != own:
        raise ValueError(
            f"The image processor makes images of {size[0]} x {size[1]} pixels, but {config.vision_config.model_type} takes "
            f"{own[0]} x {own[1]}: set its size in the checkpoint's preprocessor_config.json."
        )
    expected = config.visual_tokens_of(*size)
    if expected is not None and expected != placeholders:
        raise ValueError(
            f"The processor puts {placeholders} placeholders for an image of {size[0]} x {size[1]} pixels, but the model "
            f"makes {expected} visual tokens of it: make processor_config.json fit config.json."
        )


class NoPromptLogprobs(LogitsProcessor):
    """Refuses `prompt_logprobs`. It leaves logits alone: vLLM asks logits processors whether a request is all right."""

    @classmethod
    def validate_params(cls, sampling_params) -> None:
        if sampling_params.prompt_logprobs is not None:
            raise refusal(
                f"prompt_logprobs={sampling_params.prompt_logprobs}",
                "a visual token predicts nothing, so that a prompt with images has no log-probabilities. Leave it out.",
            )

    def add_request(self, req_idx, sampling_params) -> bool:
        return False

    def apply(self, logits, ctx):
        return logits


class NoPromptLogprobsInFirstRunner(LogitsProcessorOfFirstRunner):
    """The same for vLLM's older model runner, which runs on CPUs."""

    validate_params = NoPromptLogprobs.validate_params

    def __init__(self, vllm_config, device, is_pin_memory):
        pass

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update) -> None:
        pass

    def apply(self, logits):
        return logits
