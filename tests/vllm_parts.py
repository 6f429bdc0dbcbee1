"""Tiny random SAISA checkpoints, random prompts with images, and this package's answers, to compare vLLM's with.

Everything is small enough that an engine on one core answers in seconds."""

import contextlib
import random
import socket
import subprocess
import time
import urllib.request
from dataclasses import dataclass, field

import numpy as np
import torch
import transformers
from PIL import Image
from tiny_models import randomize
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from saisa_hf import SaisaConfig, SaisaForConditionalGeneration, SaisaProcessor
from saisa_hf.processing_saisa import add_image_token


WORDS = "what is in the image a digit red blue green left right of and how many circles squares are there"
WORDS = WORDS.split(" ")
SPECIALS = ["<pad>", "<s>", "</s>"]
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endif %}{{ ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # vLLM's attention on CPUs knows no smaller ones
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {"num_experts_per_tok": 2}
TEXT_CONFIGS = {
    "llama": ("LlamaConfig", {}),
    "llama_biases": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "rms_norm_eps": 0.1}),
    "llama3_scaling": (
        "LlamaConfig",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 100.0,
            }
        },
    ),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral_window": ("MistralConfig", {"sliding_window": 24}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True, "head_dim": None, "hidden_size": 128}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": (
        "Gemma2Config",
        {
            "query_pre_attn_scalar": 40,
            "sliding_window": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 9.0,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "query_pre_attn_scalar": 5,
            "sliding_window": 24,
            "rope_local_base_freq": 30.0,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "phi3": ("Phi3Config", {"partial_rotary_factor": 0.5, "head_dim": None, "hidden_size": 128}),
    "granite": (
        "GraniteConfig",
        {
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
            "head_dim": None,
            "hidden_size": 128,
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        _MOE | {"num_experts": 4, "moe_intermediate_size": 32, "mlp_only_layers": [1], "norm_topk_prob": True},
    ),
    "mixtral": (
        "MixtralConfig",
        _MOE | {"num_local_experts": 4, "sliding_window": None, "head_dim": None, "hidden_size": 128},
    ),
    "olmo2": ("Olmo2Config", {"head_dim": None, "hidden_size": 128}),
}

_VISION = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
_GRID = _VISION | {"image_size": 32, "patch_size": 8}


def tokenizer():
    """A byte-level BPE tokenizer in which a word with a space in front is one token."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=SPECIALS, initial_alphabet=alphabet)
    text = " ".join(WORDS)
    made.train_from_iterator([f"USER: {text} ASSISTANT:", f"\n{text}\n{text}"] * 4, trainer)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )
    add_image_token(wrapped)
    return wrapped


def _vision(name: str):
    """(config, image processor, arguments of `SaisaProcessor`)."""
    size = {"height": 32, "width": 32}
    plain = {"do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": size}
    patches = {"patch_size": 8, "vision_feature_select_strategy": "default"}
    if name == "clip":
        config = transformers.CLIPVisionConfig(**_GRID, projection_dim=16)
        return config, transformers.CLIPImageProcessor(**plain), patches | {"num_additional_image_tokens": 1}
    if name == "siglip":
        return transformers.SiglipVisionConfig(**_GRID), transformers.SiglipImageProcessor(**plain), patches
    if name == "siglip2":
        config = transformers.Siglip2VisionConfig(**_VISION, num_patches=16, patch_size=8)
        return config, transformers.Siglip2ImageProcessor(patch_size=8, max_num_patches=16), patches
    if name == "convnext":
        config = transformers.ConvNextConfig(
            num_stages=3, patch_size=2, hidden_sizes=[16, 24, 32], depths=[1, 1, 1], image_size=32
        )
        return config, transformers.CLIPImageProcessor(**plain), {"image_seq_length": 64}
    if name == "dinov2":
        config = transformers.Dinov2Config(**_GRID | {"mlp_ratio": 2})
        return config, transformers.CLIPImageProcessor(**plain), patches | {"num_additional_image_tokens": 1}
    raise ValueError(name)


def make_checkpoint(folder, text="llama", vision="clip", seed=0, dtype=torch.float32, **kwargs):
    """Writes a random checkpoint with processor into `folder`, and returns its path as a string."""
    words = tokenizer()
    name, settings = TEXT_CONFIGS[text]
    settings = {key: value for key, value in (_TEXT | settings).items() if value is not None}
    text_config = getattr(transformers, name)(vocab_size=len(words), **settings)
    if name == "MistralConfig":
        text_config.sliding_window = settings.get("sliding_window")
    vision_config, image_processor, arguments = _vision(vision)
    reduction = {key: kwargs.get(key) for key in ("visual_token_reduction", "reduced_visual_tokens")}
    if any(reduction.values()):
        arguments.pop("image_seq_length", None)
    made = SaisaConfig(
        vision_config=vision_config,
        text_config=text_config,
        image_token_id=words.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=bool(getattr(text_config, "tie_word_embeddings", False)),
        **kwargs,
    )
    model = randomize(SaisaForConditionalGeneration(made), seed).to(dtype).eval()
    if text.startswith("gemma"):  # embeddings are scaled up in front and are the head behind: else one logit takes all
        model.get_input_embeddings().weight.data *= 0.1
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    model.save_pretrained(folder)
    processor = SaisaProcessor(image_processor, words, chat_template=TEMPLATE, **arguments, **reduction)
    processor.save_pretrained(folder)
    return str(folder)


def pictures(count=8, seed=0, sizes=((40, 30), (32, 32), (20, 50), (64, 24))):
    """Random images of different sizes."""
    random_state = np.random.RandomState(seed)
    made = []
    for i in range(count):
        width, height = sizes[i % len(sizes)]
        low = random_state.rand(4, 5, 3) * 255
        made.append(Image.fromarray(low.astype("uint8")).resize((width, height), Image.Resampling.BICUBIC))
    return made


@dataclass
class Case:
    """A prompt, and what `expected` made of it."""

    text: str
    images: list
    prompt_ids: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)  # between the best two, in logits

    @property
    def request(self):
        """What `LLM.generate` takes."""
        images = {"multi_modal_data": {"image": self.images}} if self.images else {}
        return {"prompt": self.text, **images}


def random_cases(count: int, seed=0, most_images=4, images=None) -> list[Case]:
    """Prompts with none to `most_images` images among words: in front, adjacent, with and without spaces around them."""
    chooser, images = random.Random(seed), images or pictures()

    def words(low, high):
        return " ".join(chooser.choice(WORDS) for _ in range(chooser.randint(low, high)))

    cases = []
    for index in range(count):
        parts, chosen = [chooser.choice(["USER: ", "", "USER:"])], []
        for _ in range(index % (most_images + 1)):
            between = words(0, 5) if chooser.random() < 0.7 else ""
            parts += [between, chooser.choice(["", " ", "\n"]), "<image>", chooser.choice(["", " ", "\n", "  "])]
            chosen.append(chooser.choice(images))
        parts += [words(1, 9), " ASSISTANT:"]
        cases.append(Case("".join(parts), chosen))
    return cases


def answer(cases: list[Case], checkpoint: str, new_tokens=12, dtype=torch.float32) -> list[Case]:
    """Fills in what this package answers under transformers: greedy, without end."""
    torch.set_num_threads(1)
    # transformers' sdpa leaves out the bound of the scores that Gemma 2 was trained with; vLLM's kernels have it
    bounded = getattr(SaisaConfig.from_pretrained(checkpoint).text_config, "attn_logit_softcapping", None) is not None
    choice = {"attn_implementation": "eager"} if bounded else {}
    model = SaisaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype, **choice).eval()
    processor = SaisaProcessor.from_pretrained(checkpoint)
    image_token = model.config.image_token_id
    for case in cases:
        inputs = processor(text=case.text, images=case.images or None, return_tensors="pt")
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        made = model.generate(
            **inputs,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            suppress_tokens=[image_token],
            output_logits=True,
            return_dict_in_generate=True,
        )
        case.prompt_ids = inputs["input_ids"][0].tolist()
        case.ids = made.sequences[0, len(case.prompt_ids) :].tolist()
        logits = torch.stack([step[0].float() for step in made.logits])
        logits[:, image_token] = -torch.inf
        logprobs, best = logits.log_softmax(-1), logits.topk(2).values
        case.logprobs = logprobs[range(len(case.ids)), case.ids].tolist()
        case.gaps = (best[:, 0] - best[:, 1]).tolist()
    return cases


@dataclass
class Comparison:
    """How vLLM's answers compare with those in the cases."""

    equal: int
    count: int
    error: float  # the largest of log-probabilities, of tokens up to the first that differs
    ties: int  # answers that differ where the best two logits are closer than the error
    different: list[int]  # all others, by index

    def __str__(self):
        return f"{self.equal}/{self.count} equal, {self.ties} ties, log-probability error {self.error:.1e}"


def compare(cases: list[Case], outputs, tolerance=1e-4) -> Comparison:
    """Compares `RequestOutput`s of vLLM, greedy and with `logprobs=0`, with the answers in `cases`."""
    equal, ties, error, different = 0, 0, 0.0, []
    for index, (case, output) in enumerate(zip(cases, outputs)):
        assert list(output.prompt_token_ids) == case.prompt_ids, (
            index,
            case.text,
            output.prompt_token_ids,
            case.prompt_ids,
        )
        found, logprobs = list(output.outputs[0].token_ids), output.outputs[0].logprobs
        values = [step[token].logprob for step, token in zip(logprobs, found)]
        first = next((i for i, (a, b) in enumerate(zip(found, case.ids)) if a != b), len(found))
        error = max([error, *(abs(a - b) for a, b in zip(values[:first], case.logprobs[:first]))])
        if found == case.ids[: len(found)]:
            equal += 1
        elif case.gaps[first] < tolerance:
            ties += 1
        else:
            different.append(index)
    return Comparison(equal, len(cases), error, ties, different)


# --- servers ---


@contextlib.contextmanager
def served(command, environment, log):
    """A server, whose command line `command` makes of a port: started, ready to answer, and stopped at the end. Yields the
    port. What it prints goes into the file `log`."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    environment = environment | {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with log.open("w") as output:
        server = subprocess.Popen(command(port), env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            for _ in range(300):
                time.sleep(2)
                assert server.poll() is None, log.read_text()[-3000:]
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except OSError:
                    continue
            yield port
        finally:
            server.terminate()
            server.wait(60)
