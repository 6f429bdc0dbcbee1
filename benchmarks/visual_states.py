# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Many questions about one image: the cost of the second against the first, against the language model without an image, and
against LLaVA; and whether answers from visual states equal those from the image itself.

    python benchmarks/visual_states.py
    python benchmarks/visual_states.py --preset vicuna-7b --device cuda --dtype bfloat16

All models have random weights and share one language model and one encoder. A question of the table is a prompt of one text
token, the image, and the rest of the text.
"""

import argparse
import copy
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from saisa_hf.bench import measure
from saisa_hf.bench.models import Models, build, draw_image, draw_text, prompt, visual_tokens
from saisa_hf.bench.options import add_size_options, with_sizes
from saisa_hf.common.tables import table


NOTES = """
ms: {clock} time, median of {repeats} rounds in which all rows take turns
x LM: relative to the language model without an image; x first: relative to the same model's first question
GFLOPs: matrix products of projectors, language model and head, counted while they run; without the encoder
features kept: every layer's projector runs, as in a first question whose encoder costs nothing
kept: what is kept of the image between questions; 2 * V * h_kv * L * bytes = {kept:.1f} MiB of keys and values
peak: beyond weights and what is kept, with the filled cache, as {peak}
same prefix cached: LLaVA's keys and values depend on everything before them, so they serve only prompts with the same
prefix, up to and including the image; SAISA's states serve any prompt, anywhere in it
"""


@dataclass
class Row:
    """One way to ask: its name, the name of the same model's first question, the call to measure, the bytes kept of the image
    beforehand, and whether the call runs the encoder."""

    name: str
    first: str | None
    call: Callable
    kept: int = 0
    encodes: bool = False


def ways_to_ask(models: Models, args) -> list[Row]:
    saisa, bare, llava = models.saisa, models.bare, models.llava
    options = {"use_cache": True, "logits_to_keep": 1}
    text, pixels = draw_text(args.text_tokens, args), draw_image(args)
    text_ids, ids = torch.tensor([text], device=args.device), prompt(text, 1, args)
    states = {store: saisa.get_visual_states(pixels, store) for store in ("keys_values", "features")}
    projected = llava.model.multi_modal_projector(saisa.get_image_features(pixels).pooler_output)
    embed = llava.get_input_embeddings()
    prefix = llava(input_ids=ids[:, : -(args.text_tokens - 1)], pixel_values=pixels, use_cache=True).past_key_values

    def with_states(store):
        return lambda: saisa(input_ids=ids, visual_states=states[store], **options)

    def llava_from_embeddings():
        embeds = torch.cat([embed(text_ids[:, :1]), projected, embed(text_ids[:, 1:])], dim=1)
        return llava(inputs_embeds=embeds, **options)

    def llava_behind_prefix():
        cache = copy.copy(prefix)
        cache.layers = [copy.copy(layer) for layer in prefix.layers]  # appending makes new tensors
        return llava(input_ids=text_ids[:, 1:], past_key_values=cache, **options)

    prefix_bytes = sum(x.numel() * x.element_size() for layer in prefix.layers for x in (layer.keys, layer.values))
    own, other = "SAISA, first question", "LLaVA, first question"
    return [
        Row("language model, no image", None, lambda: bare(input_ids=text_ids, **options)),
        Row(own, own, lambda: saisa(input_ids=ids, pixel_values=pixels, **options), encodes=True),
        Row("SAISA, making its states", own, lambda: saisa.get_visual_states(pixels), encodes=True),
        Row("SAISA, second, keys and values kept", own, with_states("keys_values"), states["keys_values"].nbytes),
        Row("SAISA, second, features kept", own, with_states("features"), states["features"].nbytes),
        Row(other, other, lambda: llava(input_ids=ids, pixel_values=pixels, **options), encodes=True),
        Row("LLaVA, second, embeddings kept", other, llava_from_embeddings, projected.numel() * projected.element_size()),
        Row("LLaVA, second, same prefix cached", other, llava_behind_prefix, prefix_bytes),
    ]  # fmt: skip


def measure_prefill(models: Models, args) -> list[dict]:
    """Seconds, FLOPs and bytes of each way to ask."""
    rows = ways_to_ask(models, args)
    seconds = measure.interleaved({row.name: row.call for row in rows}, args.repeats, args.device, args.cpu_time)
    with models.countable(args.attn_implementation):
        encoder = measure.flops(lambda: models.saisa.get_image_features(draw_image(args)))
        counts = {row.name: measure.flops(row.call) - encoder * row.encodes for row in rows}
    medians = {name: measure.quartiles(values)[1] for name, values in seconds.items()}
    bare = rows[0].name
    return [
        {
            "name": row.name,
            "seconds": seconds[row.name],
            "quartiles": measure.quartiles(seconds[row.name]),
            "to_language_model": medians[row.name] / medians[bare],
            "to_first_question": None if row.first is None else medians[row.name] / medians[row.first],
            "flops": counts[row.name],
            "flops_to_language_model": counts[row.name] / counts[bare],
            "kept_bytes": row.kept,
            "peak_bytes": measure.peak_memory(row.call, args.device),
        }
        for row in rows
    ]


def show_prefill(rows: list[dict]) -> str:
    header = ["prefill", "ms", "quartiles", "x LM", "x first", "GFLOPs", "their x LM", "kept MiB", "peak MiB"]
    cells = []
    for row in rows:
        low, median, high = (1e3 * second for second in row["quartiles"])
        first = "" if row["to_first_question"] is None else f"{row['to_first_question']:.3f}"
        times = [f"{median:.1f}", f"{low:.1f}-{high:.1f}", f"{row['to_language_model']:.2f}", first]
        work = [f"{row['flops'] / 1e9:.1f}", f"{row['flops_to_language_model']:.2f}"]
        cells.append([row["name"], *times, *work, *(f"{row[key] / 2**20:.1f}" for key in ("kept_bytes", "peak_bytes"))])
    return table(header, cells)


def ask_both_ways(ask: Callable, count: int) -> dict:
    """Asks each question from the image and from its states and compares the answers. `ask(number, way)` answers question
    `number` from the image (`"pixels"`) or from its states (`"states"`). One question in five is also asked from states of
    another image (`"other"`), to check that answers depend on the image."""
    seconds, equal, changed = {"pixels": 0.0, "states": 0.0}, 0, 0
    for number in measure.progress(range(count), "questions"):
        answers = {}
        for way in seconds:
            start = time.perf_counter()
            answers[way] = ask(number, way)
            seconds[way] += time.perf_counter() - start
        equal += answers["states"] == answers["pixels"]
        changed += number % 5 == 0 and ask(number, "other") != answers["pixels"]
    return {"asked": count, "equal": equal, "others": (count + 4) // 5, "others_differ": changed, "seconds": seconds}


def random_questions(models: Models, args) -> dict:
    """Questions of random tokens and lengths, with the image anywhere in them, answered by the random SAISA."""
    images = {"pixels": draw_image(args), "other": draw_image(args)}
    start = time.perf_counter()
    states = models.saisa.get_visual_states(images["pixels"])
    made = time.perf_counter() - start
    inputs = {"pixels": {"pixel_values": images["pixels"]}, "states": {"visual_states": states}}
    inputs["other"] = {"visual_states": models.saisa.get_visual_states(images["other"])}
    prompts = []
    for _ in range(args.questions):
        length = int(torch.randint(1, args.text_tokens + 1, ()))
        prompts.append(prompt(draw_text(length, args), int(torch.randint(0, length, ())), args))

    def ask(number, way):
        ids = models.saisa.generate(prompts[number], max_new_tokens=args.new_tokens, do_sample=False, **inputs[way])
        return ids[0, prompts[number].shape[1] :].tolist()

    return {**ask_both_ways(ask, args.questions), "seconds_for_states": made}


def demo_questions(args) -> dict:
    """Real questions about one image, answered by the demo's checkpoint."""
    import numpy as np
    from PIL import Image

    from saisa_hf.demo import run, scenes

    model, processor = run.load(device=args.device)
    images = [Image.fromarray(scenes.draw(scenes.make_scene("test", np.random.default_rng(seed)))) for seed in (1, 2)]
    blanks = {"place": scenes.PLACES, "ink": scenes.INKS, "digit": range(10)}
    questions = {
        template.format(place=place, ink=ink, digit=digit)
        for template in itertools.chain(*scenes.QUESTIONS.values())
        for place, ink, digit in itertools.product(*blanks.values())
    }
    questions = sorted(questions)[: args.questions]
    pixels = processor.image_processor(images, return_tensors="pt").pixel_values.to(model.device)
    start = time.perf_counter()
    states = {"states": model.get_visual_states(pixels[:1])}
    made = time.perf_counter() - start
    states["other"] = model.get_visual_states(pixels[1:])

    def ask(number, way):
        part = {"type": "image", "image": images[0]} if way == "pixels" else {"type": "image"}
        chat = [{"role": "user", "content": [part, {"type": "text", "text": questions[number]}]}]
        options = {} if way == "pixels" else {"visual_states": states[way]}
        inputs = processor.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **options
        ).to(model.device)
        return model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()

    return {**ask_both_ways(ask, len(questions)), "seconds_for_states": made}


def show_questions(what: str, result: dict) -> str:
    seconds = result["seconds"]
    return (
        f"{what}: {result['equal']} of {result['asked']} answers equal from pixels, in {seconds['pixels']:.1f} s, and from "
        f"states, in {seconds['states']:.1f} s plus {result['seconds_for_states']:.2f} s to compute them. From another "
        f"image's states {result['others_differ']} of {result['others']} answers differ."
    )


def arguments(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measures the prefill of a second question about an image with visual states, against the first, the "
        "language model without an image and LLaVA, and compares answers from states with those from pixels.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_size_options(parser)
    parser.add_argument("--threads", type=int, help="threads of PyTorch on a CPU; None: PyTorch's default")
    cpu_time = "measure CPU time of this process, which is less sensitive to other load; use with --threads 1"
    parser.add_argument("--cpu-time", action="store_true", help=cpu_time)
    parser.add_argument("--repeats", type=int, default=15, help="timed rounds")
    parser.add_argument(
        "--questions", type=int, default=100, help="questions to ask from pixels and from states; 0: none"
    )
    parser.add_argument("--new-tokens", type=int, default=8, help="length of the answers")
    parser.add_argument("--demo", action="store_true", help="also ask the demo's checkpoint as many real questions")
    parser.add_argument("--json", metavar="PATH", help="write all results to this file")
    return with_sizes(parser.parse_args(argv))


@torch.no_grad()
def main(argv=None) -> dict:
    args = arguments(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    result = {"machine": measure.machine(args.device), "settings": vars(args)}
    print(measure.describe(result["machine"]))
    print(f"{args.layers} layers, hidden {args.hidden_size}, {args.heads} heads, {args.kv_heads} key heads; "
          f"{args.text_tokens} text and {visual_tokens(args)} visual tokens; {args.dtype}, "
          f"{args.attn_implementation}\n")  # fmt: skip
    models = build(args)
    result["prefill"] = measure_prefill(models, args)
    key_width = args.kv_heads * (args.hidden_size // args.heads)
    item_size = torch.finfo(getattr(torch, args.dtype)).bits // 8
    result["kept_formula"] = 2 * visual_tokens(args) * key_width * args.layers * item_size
    print(show_prefill(result["prefill"]))
    clock, peak = "CPU" if args.cpu_time else "wall", measure.PEAK_MEMORY[torch.device(args.device).type]
    print(NOTES.format(clock=clock, repeats=args.repeats, kept=result["kept_formula"] / 2**20, peak=peak))
    if args.questions:
        result["questions"] = random_questions(models, args)
        print(show_questions("random model", result["questions"]))
    if args.demo:
        result["demo"] = demo_questions(args)
        print(show_questions("demo checkpoint", result["demo"]))
    if args.json:
        measure.write_json(args.json, result)
    return result


if __name__ == "__main__":
    main()
