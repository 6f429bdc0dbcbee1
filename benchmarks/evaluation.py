# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Questions that a model answers in a second where each image has several, as in most benchmarks: SAISA with visual states
and without, and transformers' LLaVA of the same language model and encoder, through the same engine, by turns in one run.

    python benchmarks/evaluation.py --keep-memory --json benchmarks/evaluation.json   # ten minutes on two cores
    python benchmarks/evaluation.py --layers 2 --hidden-size 256 --repeats 2                      # a quick look

Models, questions and images are random. A run answers all questions, from opening the images to the text of the answers. What
counts is the ratio of times, beside that of the FLOPs.
"""

import argparse
import random

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import CLIPImageProcessor, PreTrainedTokenizerFast

from saisa_hf import SaisaProcessor
from saisa_hf.answering import Answerer, Question
from saisa_hf.bench import measure
from saisa_hf.bench.models import build
from saisa_hf.bench.names import PATCH_SIZE
from saisa_hf.bench.options import add_size_options, with_sizes
from saisa_hf.common.tables import table
from saisa_hf.costs.encoder import encoder_flops
from saisa_hf.costs.flops import Step, step_flops


WITH, WITHOUT, LLAVA = (
    "SAISA, images encoded once",
    "SAISA, an image for each question",
    "LLaVA, an image for each question",
)
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else ' ' + part.text }}{% endfor %}{% endfor %}"
)


def processor_of(args: argparse.Namespace) -> SaisaProcessor:
    """Words w3, w4 ... for the whole vocabulary of the models; the last one is the image token."""
    words = ["<pad>", "<s>", "<unk>", *(f"w{index}" for index in range(3, args.vocab_size - 1)), "<image>"]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", extra_special_tokens={"image_token": "<image>"}
    )
    side = args.image_size
    images = CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})
    return SaisaProcessor(images, tokenizer, PATCH_SIZE, "default", 1, chat_template=TEMPLATE)


def questions_of(args: argparse.Namespace) -> list[Question]:
    """Questions of `text_tokens` words about images of noise, those about an image one after the other."""
    generator, asked = random.Random(args.seed), []
    for number in range(args.images):
        torch.manual_seed(args.seed + number)
        side = (args.image_size, args.image_size, 3)
        image = Image.fromarray(torch.randint(256, side, dtype=torch.uint8).numpy())
        for _ in range(args.questions):
            words = (f"w{generator.randrange(3, args.vocab_size - 1)}" for _ in range(args.text_tokens))
            asked.append(Question(" ".join(words), [image]))
    return asked


def flops(config, args: argparse.Namespace) -> dict[str, float]:
    """Of all questions of one image, encoder and answers included, by the formulas of `saisa_hf.costs`."""
    visual, encoder = config.image_seq_length, encoder_flops(config)

    def question(architecture: str, step: Step) -> int:
        steps = [step]
        while len(steps) < args.new_tokens:
            steps.append(steps[-1].next_token())
        return sum(sum(step_flops(config, architecture, one).values()) for one in steps)

    first = {name: question(name, Step(args.text_tokens, visual)) for name in ("saisa", "llava")}
    further = question("saisa", Step(args.text_tokens, 0, cached_visual=visual))
    count = args.questions
    return {
        WITH: float(encoder + first["saisa"] + (count - 1) * further),
        WITHOUT: float(count * (encoder + first["saisa"])),
        LLAVA: float(count * (encoder + first["llava"])),
    }


def main(argv: list[str] | None = None) -> dict:
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.keep_memory:
        measure.keep_memory()
    result: dict = {"machine": measure.machine(args.device), "settings": vars(args)}
    print(measure.describe(result["machine"]))
    models, processor, asked = build(args), processor_of(args), questions_of(args)
    for model in (models.saisa, models.llava):
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None
    how = {"batch_size": args.batch_size, "max_new_tokens": args.new_tokens}
    answerers = {
        WITH: Answerer(models.saisa, processor, **how),
        WITHOUT: Answerer(models.saisa, processor, visual_states=False, **how),
        LLAVA: Answerer(models.llava, processor, visual_states=False, **how),
    }
    answers: dict[str, list[str]] = {}

    def ask(name: str) -> None:
        answers[name] = [answer.text for answer in answerers[name].answer(asked)]

    calls = {name: (lambda name=name: ask(name)) for name in answerers}
    seconds = measure.interleaved(calls, args.repeats, args.device, args.cpu_time)
    counted = flops(models.saisa.config, args)
    result["rows"] = [
        {
            "name": name,
            "seconds": seconds[name],
            "questions_per_second": len(asked) / measure.quartiles(seconds[name])[1],
            "flops_per_question": counted[name] / args.questions,
        }
        for name in answerers
    ]
    result["equal_answers"] = sum(one == other for one, other in zip(answers[WITH], answers[WITHOUT]))
    print(show(result, len(asked), args))
    if args.json:
        measure.write_json(args.json, result)
    return result


def show(result: dict, count: int, args: argparse.Namespace) -> str:
    last = result["rows"][-1]
    rows = [
        [
            row["name"],
            f"{row['questions_per_second']:.2f}",
            f"{row['questions_per_second'] / last['questions_per_second']:.2f}",
            f"{row['flops_per_question'] / 1e9:.1f}",
            f"{last['flops_per_question'] / row['flops_per_question']:.2f}",
        ]
        for row in result["rows"]
    ]
    header = ["", "questions a second", "x LLaVA", "GFLOPs a question", "LLaVA's FLOPs / own"]
    sizes = (
        f"{args.layers} layers, hidden {args.hidden_size}, {args.dtype}; {args.images} images with {args.questions} "
    )
    sizes += f"questions of {args.text_tokens} tokens each, answers of {args.new_tokens}; batches of {args.batch_size}"
    equal = f"{result['equal_answers']} of {count} answers of SAISA are the same with images encoded once"
    sizes += f"; medians of {args.repeats} rounds, {'CPU' if args.cpu_time else 'wall'} time"
    return f"{sizes}\n\n{table(header, rows)}\n\n{equal}"


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_size_options(parser)
    add = parser.add_argument
    add("--images", type=int, default=2)
    add("--questions", type=int, default=10, help="about each image")
    add("--new-tokens", type=int, default=4, help="of an answer")
    add("--batch-size", type=int, default=10)
    add("--repeats", type=int, default=3, help="timed rounds, after one that is not")
    add("--threads", type=int, help="threads of PyTorch on a CPU; None: PyTorch's default")
    cpu_time = "measure CPU time of this process, which is less sensitive to other load; use with --threads 1"
    add("--cpu-time", action="store_true", help=cpu_time)
    add("--keep-memory", action="store_true", help="make the C library keep freed memory")
    add("--json", metavar="PATH", help="write all results to this file")
    return with_sizes(parser.parse_args(argv))


if __name__ == "__main__":
    main()
