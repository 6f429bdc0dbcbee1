# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The family on real weights: LLaVA, NAAViT, ShortV, SAISA, SAISA with one projector, and ViCA over SmolLM2-135M-Instruct (30
layers) and an EfficientNet trained on ImageNet, all from one start and on one set of samples, in the paper's two stages.

    python benchmarks/real_weights.py --work FOLDER --json benchmarks/real_weights.json
    python benchmarks/real_weights.py --work FOLDER --json benchmarks/real_weights.json --costs  # on a quiet machine
    python benchmarks/real_page.py benchmarks/real_weights.json PAGE.md IMAGES

What is in the file already is not computed again, and a training that was interrupted goes on from its last state in
FOLDER: run it as often as you like, `--until` so many minutes each, or twice at once with other `--members`. The samples are
those of `drawn_scenes.py`.
"""

import argparse
import dataclasses
import fcntl
import json
import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import count
from pathlib import Path

import drawings
import torch
from drawn_scenes import Sample, make, small_world
from drawn_words import text_turns
from real_page import draw_samples
from real_parts import install
from real_training import (
    IMAGE,
    SIDE,
    SYSTEM,
    Encoded,
    Stage,
    Talk,
    encoded,
    loss_of,
    new_member,
    perplexity,
    right,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import EfficientNetModel

from saisa_hf import SaisaConfig, SaisaProcessor
from saisa_hf.bench import measure
from saisa_hf.bench.measure import interleaved, quartiles
from saisa_hf.chat.templates import chat_template
from saisa_hf.checkpoints.build import build
from saisa_hf.checkpoints.gguf import gguf_file, gguf_model
from saisa_hf.compat_saisa import CACHE
from saisa_hf.costs.family import member
from saisa_hf.costs.flops import Step, account


ORDER = ("saisa", "llava", "vica", "saisa-shared", "naavit", "shortv")
RATES = (1e-4, 3e-4, 1e-3)  # of the second stage, tried for each member
FIRST_RATE = 1e-3  # of the first stage: the paper's
CONTROLS = {  # name -> a member, and the one whose rate it has
    "llava-at-saisas-rate": ("llava", "saisa"),
    "saisa-at-llavas-rate": ("saisa", "llava"),
    "vica-at-saisas-rate": ("vica", "saisa"),
}
SIZES = {  # of the study, and of its smoke run
    "study": {
        "captions": 2000,
        "conversations": 1200,
        "texts": 45,
        "text_every": 16,  # samples, of which one is of text alone
        "valid": 160,
        "artist": 600,
        "unseen": 400,
        "passages": 48,
        "first": {"size": 4, "steps": 500},
        "second": {"size": 4, "steps": 318},  # all conversations and texts once
        "search": {"size": 4, "steps": 40},
    },
    "smoke": {
        "captions": 8,
        "conversations": 8,
        "texts": 2,
        "text_every": 4,
        "valid": 4,
        "artist": 8,
        "unseen": 8,
        "passages": 2,
        "first": {"size": 4, "steps": 2},
        "second": {"size": 4, "steps": 2},
        "search": {"size": 4, "steps": 1},
    },
}
EXAMS = ("artist", "unseen")
CHANCE = 2000  # samples of training, whose answers are counted
PASSAGE = 128  # tokens
ANSWER = 96  # tokens, of the language model to a prompt of text


class Study:
    """The study in a folder: what all members share, then one run after the other.

    Args:
        work: parts, samples and training states.
        path: the JSON file of the results.
        sizes: one of `SIZES`.
        until: `time.monotonic` after which nothing new is begun.
    """

    def __init__(self, work: Path, path: Path, sizes: str, until: float):
        self.work, self.path, self.sizes, self.until = work, path, SIZES[sizes], until
        work.mkdir(parents=True, exist_ok=True)
        self.result = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        settings = {"sizes": self.sizes, "rates": list(RATES), "first_rate": FIRST_RATE}
        if self.result and self.result["settings"] != settings:
            raise ValueError(f"{path} was made with {self.result['settings']}, not {settings}: choose another --json.")
        if not self.result:
            self.result = {"machine": measure.machine("cpu"), "settings": settings}
        language_model, encoder = install(work / "parts")
        drawings.install(work / "drawings")
        self.language_model, self.things = language_model, drawings.read(work / "drawings")
        self.known = small_world(self.things)
        self.base = work / "base"
        if not self.base.is_dir():
            build(language_model, encoder, self.base, vision_feature_layer=-1, vision_feature_select_strategy="full")
        self.processor = SaisaProcessor.from_pretrained(self.base)
        self.encoder = EfficientNetModel.from_pretrained(encoder).eval()

    # --- samples ---

    def samples(self, name: str) -> Encoded:
        """Made once: `captions`, `conversations`, `valid`, and one for each of `EXAMS`."""
        path = self.work / f"{name}.pt"
        if not path.exists():
            print(f"samples: {name}")
            makers = {"captions": self._captions, "conversations": self._conversations}
            makers.get(name, lambda: self._questions(name))().save(path)
        return Encoded.load(path)

    def scene(self, split: str, number: int) -> Sample:
        """A sample of the small world of this study."""
        return make(split, number, self.things, known=self.known)

    def _captions(self) -> Encoded:
        talks = [
            Talk(
                [{"role": "user", "content": IMAGE}, {"role": "assistant", "content": f"{one.caption}\n"}], one.picture
            )
            for one in (self.scene("train", index) for index in range(self.sizes["captions"]))
        ]
        return encoded(talks, self.processor, self.encoder, chat_template("plain", IMAGE))

    def _conversations(self) -> Encoded:
        start = self.sizes["captions"]
        scenes = [self.scene("train", index) for index in range(start, start + self.sizes["conversations"])]
        talks = [Talk.of([(t.question, t.answer) for t in one.turns], one.picture, one.turns[0].kind) for one in scenes]
        texts = self._answered(text_turns()[: self.sizes["texts"]])
        print(f"{len(texts)} conversations of text alone")
        for number, place in enumerate(range(0, len(talks) if texts else 0, self.sizes["text_every"])):
            talks.insert(place, texts[number % len(texts)])
        return encoded(talks, self.processor, self.encoder)

    def _questions(self, split: str) -> Encoded:
        talks = [
            Talk.of([(one.question, one.answer)], scene.picture, one.kind)
            for scene in self._asked(split)
            for one in scene.turns
        ]
        return encoded(talks, self.processor, self.encoder)

    def _asked(self, split: str) -> Iterator[Sample]:
        """Scenes with one question each."""
        for number in range(self.sizes[split]):
            scene = self.scene(split, number)
            yield dataclasses.replace(scene, turns=[scene.turns[number % len(scene.turns)]])

    def _answered(self, conversations: Sequence[list[str]]) -> list[Talk]:
        """Messages of text with the language model's own greedy answers, where all of these come to an end."""
        model, tokenizer = gguf_model(gguf_file(self.language_model)), self.processor.tokenizer
        talks: list[list[dict]] = [[SYSTEM] for _ in conversations]
        ended = [True] * len(conversations)
        for turn in range(max(map(len, conversations))):
            asked = [number for number, texts in enumerate(conversations) if turn < len(texts)]
            for number in asked:
                talks[number].append({"role": "user", "content": conversations[number][turn]})
            form = {"add_generation_prompt": True, "tokenize": False}
            prompts = [self.processor.apply_chat_template(talks[number], **form) for number in asked]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
            made = model.generate(**inputs, max_new_tokens=ANSWER, do_sample=False)[:, inputs["input_ids"].shape[1] :]
            for number, ids, text in zip(asked, made, tokenizer.batch_decode(made, skip_special_tokens=True)):
                ended[number] &= is_whole(ids, tokenizer)
                talks[number].append({"role": "assistant", "content": text.strip()})
        return [Talk(messages) for messages, whole in zip(talks, ended) if whole]

    def passages(self) -> list[list[int]]:
        """English prose that no sample has: Python's reference, in pieces of `PASSAGE` tokens."""
        from pydoc_data.topics import topics

        text = "\n".join(re.sub(r"\s+", " ", topics[name]) for name in sorted(topics))
        ids = self.processor.tokenizer(text[: 12 * PASSAGE * self.sizes["passages"]], add_special_tokens=False)
        pieces = [ids["input_ids"][start : start + PASSAGE] for start in range(0, len(ids["input_ids"]), PASSAGE)]
        return pieces[: self.sizes["passages"]]

    # --- what members cost, and what guessing is worth ---

    def costs(self, repeats: int = 7, batch: int = 8) -> None:
        """FLOPs, bytes and parameters by the formulas of `saisa flops`; the time of a prompt of the mean length and of the
        token behind it, in float32: untrained members take turns."""
        base = SaisaConfig.from_pretrained(self.base)
        lengths = [len(sample["input_ids"]) for sample in self.samples(EXAMS[0]).samples]
        visual = base.image_seq_length
        step = Step(round(sum(lengths) / len(lengths)) - visual, visual)
        ids = torch.full((batch, step.text + visual), 5)
        ids[:, 3 : 3 + visual] = self.processor.image_token_id
        images = {"pixel_values": torch.randn(batch, base.vision_feature_size, SIDE, SIDE)}
        prompts, tokens, costs = {}, {}, {}
        for name in ORDER:
            found = account(member(base, name), step, itemsize=4)["llava" if name == "llava" else "saisa"]
            costs[name] = {"prompt_flops": found["language_model"], "token_flops": found["next_token"]}
            costs[name] |= {"cache_bytes": found["cache_bytes"], "projectors": found["parameters"]["projectors"]}
            model = self.model(name, 0)
            prompts[name] = partial(asked, model, ids, images)
            tokens[name] = partial(answered, model, ids[:, :1], prompts[name]()[CACHE])
        times = {what: interleaved(calls, repeats, "cpu") for what, calls in (("prompt", prompts), ("token", tokens))}
        found = {name: {what: quartiles(times[what][name])[1] / batch for what in times} for name in ORDER}
        prompt = {"text": step.text, "visual": visual, "batch": batch, "threads": torch.get_num_threads()}
        self.write({"prompt": prompt, "costs": costs, "times": found})

    def chance(self) -> None:
        """The kind of each question, and whether the most frequent answer of its kind in training is right, to the letter as
        for members: "0" or "1" for each."""
        answers = defaultdict(Counter)
        for index in range(CHANCE):
            for turn in self.scene("train", index).turns:
                answers[turn.kind][turn.answer] += 1
        usual = {kind: counts.most_common(1)[0][0] for kind, counts in answers.items()}
        asked = {exam: [scene.turns[0] for scene in self._asked(exam)] for exam in EXAMS}
        kinds = {exam: [turn.kind for turn in turns] for exam, turns in asked.items()}
        hits = {exam: digits(turn.answer == usual.get(turn.kind) for turn in turns) for exam, turns in asked.items()}
        self.write({"asked": kinds, "chance": hits})

    # --- runs ---

    def before(self) -> None:
        """What the language model is before any training."""
        if "before" not in self.result:
            model = gguf_model(gguf_file(self.language_model))
            self.write({"before": {"perplexity": perplexity(model, self.passages())}})

    def run(self, name: str, seed: int) -> bool:
        """Both stages of a member or a control, and its examination. Returns False if there was no time for all of it."""
        if str(seed) in self.result.get("runs", {}).get(name, {}):
            return True
        built, rated = CONTROLS.get(name, (name, name))
        rate = self.best_rate(rated) if self.first_stage(built, seed) else None
        if rate is None:
            return False
        model = self.second_model(built, seed)
        stage = self.stage(model, "conversations", "second", rate, seed, f"second-{name}-{seed}")
        if not stage.run(self.until):
            return False
        with safe_open(self.first_file(built, seed), framework="pt") as file:
            found = {"rate": rate, "first_losses": json.loads(file.metadata()["losses"])}
        found |= {"losses": thinned(stage.losses)} | {exam: digits(right(model, self.samples(exam))) for exam in EXAMS}
        found["perplexity"] = perplexity(model, self.passages())
        if seed == 0:
            weights = {key: x.bfloat16() for key, x in model.state_dict().items() if "vision_tower" not in key}
            weights.pop("lm_head.weight", None)
            save_whole(weights, self.work / f"trained-{name}.safetensors")
        self.write({"runs": {name: {str(seed): found}}})
        stage.forget()
        shares = {exam: f"{found[exam].count('1') / len(found[exam]):.3f}" for exam in EXAMS}
        print(f"{name}, seed {seed}: {shares}, perplexity {found['perplexity']:.2f}")
        return True

    def first_stage(self, name: str, seed: int) -> bool:
        """Trains the projectors alone on captions; SAISA's as one projector, which its second stage copies to every layer."""
        path = self.first_file(name, seed)
        if path.exists():
            return True
        model = self.model(self.first_name(name), seed)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_("visual_projector" in key)
        stage = self.stage(model, "captions", "first", FIRST_RATE, seed, path.stem)
        if not stage.run(self.until):
            return False
        weights = {key: x.detach().contiguous() for key, x in stage.trained.items()}
        save_whole(weights, path, {"losses": json.dumps(thinned(stage.losses))})
        stage.forget()
        return True

    def first_file(self, name: str, seed: int) -> Path:
        """The projectors of a member's first stage."""
        return self.work / f"first-{self.first_name(name)}-{seed}.safetensors"

    def best_rate(self, name: str) -> float | None:
        """The rate of the second stage with the least loss on held-out phrasings after a short training; None if there was
        no time to find it."""
        if not self.first_stage(name, 0):
            return None
        for rate in RATES:
            if f"{rate:g}" in self.result.get("search", {}).get(name, {}):
                continue
            model = self.second_model(name, 0)
            stage = self.stage(model, "conversations", "search", rate, 99, f"search-{name}-{rate:g}")
            if not stage.run(self.until):
                return None
            loss = loss_of(model, self.samples("valid"))
            self.write({"search": {name: {f"{rate:g}": round(loss, 4) if math.isfinite(loss) else None}}})
            stage.forget()
            print(f"{name}, rate {rate:g}: {loss:.4f}")
        tried = self.result["search"][name]
        return float(min((rate for rate in tried if tried[rate] is not None), key=tried.get))

    def stage(self, model, data: str, sizes: str, rate: float, seed: int, name: str) -> Stage:
        return Stage(
            model, self.samples(data), **self.sizes[sizes], rate=rate, seed=seed, state=self.work / f"{name}.pt"
        )

    def model(self, name: str, seed: int):
        return new_member(name, self.language_model, self.encoder, seed, self.processor.image_token_id)

    def second_model(self, name: str, seed: int):
        """The member with the projectors of its first stage, all of it but the encoder to be trained."""
        model = self.model(self.first_name(name), seed)
        first = load_file(self.first_file(name, seed))
        missing = model.load_state_dict(first, strict=False).unexpected_keys
        if missing:
            raise ValueError(f"the first stage of {name} has other projectors: {missing[:3]}")
        if name == "saisa":
            model.unshare_projectors()
        model.requires_grad_(True)
        model.model.vision_tower.requires_grad_(False)
        return model

    @staticmethod
    def first_name(name: str) -> str:
        """Whose first stage a member has: SAISA's is that of one projector for all layers."""
        return "saisa-shared" if name == "saisa" else name

    def write(self, found: dict) -> None:
        """Adds to the results, and to those that another process has written meanwhile."""
        with open(self.work / "results.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            written = json.loads(self.path.read_text(encoding="utf-8")) if self.path.exists() else {}
            self.result = joined(joined(self.result, written), found)
            measure.write_json(str(self.path), self.result)


def joined(one: dict, other: dict) -> dict:
    """`one` with what `other` has, at every depth; where both have something, that of `other`."""
    both = [key for key in other if isinstance(one.get(key), dict) and isinstance(other[key], dict)]
    return one | other | {key: joined(one[key], other[key]) for key in both}


def is_whole(ids: torch.Tensor, tokenizer) -> bool:
    """Whether an answer comes to an end."""
    return tokenizer.eos_token_id in ids.tolist()


def thinned(losses: list[float], points: int = 16) -> list[float]:
    """Means of equal parts."""
    size = max(1, len(losses) // points)
    return [round(sum(part) / len(part), 4) for part in (losses[s : s + size] for s in range(0, len(losses), size))]


def digits(hits: Iterable[bool]) -> str:
    """ "0" or "1" for each."""
    return "".join(str(int(hit)) for hit in hits)


def save_whole(weights: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file that is complete or not there."""
    part = path.with_suffix(".part")
    save_file(weights, part, metadata=metadata)
    part.replace(path)


@torch.no_grad()
def asked(model, ids: torch.Tensor, images: dict):
    """A prompt, up to the logits of the next token."""
    return model(input_ids=ids, **images, use_cache=True, logits_to_keep=1)


@torch.no_grad()
def answered(model, token: torch.Tensor, cache):
    """One token behind a prompt, which is forgotten again."""
    output = model(input_ids=token, **{CACHE: cache}, use_cache=True)
    cache.crop(-1)
    return output


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--work", metavar="FOLDER", type=Path, required=True, help="parts, samples and training states")
    parser.add_argument("--json", metavar="PATH", type=Path, required=True, help="all results")
    parser.add_argument("--sizes", choices=SIZES, default="study", help="(default: %(default)s)")
    runs = (*ORDER, *CONTROLS)
    parser.add_argument("--members", nargs="+", choices=runs, default=ORDER, help="(default: all but the controls)")
    parser.add_argument("--seeds", type=int, nargs="+", default=(0, 1, 2), help="(default: 0 1 2)")
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's (default: %(default)s)")
    parser.add_argument("--costs", action="store_true", help="count and time what members cost, and train nothing")
    parser.add_argument(
        "--example", metavar="PATH", type=Path, help="draw samples into this image file, and train nothing"
    )
    parser.add_argument("--until", type=float, default=math.inf, metavar="MINUTES", help="stop after this many")
    return parser.parse_args(argv)


def main(argv=None) -> dict:
    args = arguments(argv)
    torch.set_num_threads(args.threads)
    study = Study(args.work, args.json, args.sizes, time.monotonic() + 60 * args.until)
    if args.example:
        draw_samples((study.scene("train", number) for number in count()), args.example)
        return study.result
    study.before()
    if args.costs:
        study.costs()
        return study.result
    if "chance" not in study.result:
        study.chance()
    for seed in args.seeds:
        for name in args.members:
            if not study.run(name, seed):
                print(f"no time for {name}, seed {seed}: run again to go on")
                return study.result
    return study.result


if __name__ == "__main__":
    main()
