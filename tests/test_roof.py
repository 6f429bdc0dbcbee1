# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa bench --roof`: the shapes that it measures are those that PyTorch multiplies, and its arithmetic is that of given
rates. Nothing here asserts a time."""

import argparse
import json
import math
from collections import Counter
from dataclasses import replace
from itertools import count, pairwise

import pytest
import torch
import transformers
from test_bench import arguments as arguments_of_bench
from tiny_models import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from saisa_hf.bench import rates as measuring
from saisa_hf.bench import targets
from saisa_hf.bench.models import build
from saisa_hf.bench.names import MEMBER_MODELS, MODELS, NARROW, UNPADDED
from saisa_hf.bench.rates import Meter, cache_size
from saisa_hf.bench.roof import Rates, Work, measured_as, roof, seconds
from saisa_hf.bench.work import Case, counted_as, model_of, tasks
from saisa_hf.cli import main
from saisa_hf.costs.encoder import clip_products
from saisa_hf.costs.family import MEMBERS
from saisa_hf.costs.flops import Step, cache_bytes, encoder_flops
from saisa_hf.costs.products import Pairs, products
from saisa_hf.costs.traffic import Traffic, traffic


pytestmark = pytest.mark.skipif(transformers.__version__ < "5", reason="the same on every release: runs under 5.x")

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 44, "layers": 8, "heads": 4, "kv_heads": 2}
SIZES |= {"vision_width": 24, "vision_layers": 2, "image_size": 42}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
NAMES = [*(name for name in MODELS if name != "flamingo"), *MEMBER_MODELS, *NARROW]
TEXT, VISUAL, BATCH = 12, 9, 2


def arguments(*options) -> argparse.Namespace:
    return arguments_of_bench(*OPTIONS, *options)


@pytest.fixture(scope="module")
def models():
    args = arguments("--family", "--projector-hidden-size=8")
    return build(args, members=MEMBERS, narrow=NARROW), args


@pytest.fixture(scope="module")
def flamingo():
    """The Flamingo, which knows no grouped queries, beside models without these."""
    args = arguments("--kv-heads=4", "--layers=4")
    return build(args, flamingo_every=args.cross_every), args


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """A machine whose cache is smaller than the models."""
    monkeypatch.setattr(measuring, "cache_size", lambda device: 2**14)
    monkeypatch.setattr(measuring, "LARGE_ON_CPU", 64)


# --- what is multiplied -----------------------------------------------------------------------------------------------


class Multiplied(TorchDispatchMode):
    """Counts the matrix products that PyTorch runs, by their sizes, and the attentions."""

    def __init__(self):
        super().__init__()
        self.products: Counter = Counter()
        self.attention: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        packet = function.overloadpacket
        if packet in (torch.ops.aten.mm, torch.ops.aten.addmm):
            x, weight = args[-2:]
            self.products[(len(x), *weight.shape)] += 1
        elif packet == torch.ops.aten.convolution:
            inputs, weight = args[:2]
            out = function(*args, **(kwargs or {}))
            self.products[out.numel() // out.shape[1], weight[0].numel(), len(weight)] += 1
            assert len(inputs) == len(out)
            return out
        elif "scaled_dot_product" in packet.__name__:
            query, key = args[:2]
            self.attention[query.shape[0], query.shape[1], query.shape[2], key.shape[2]] += 1
        elif packet in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            x, weight = args[-2:]
            if weight.stride(0) == 0:  # one for all samples
                self.products[(len(x) * x.shape[1], *weight.shape[1:])] += 1
            else:  # angles of the rotation: frequencies times positions
                assert weight.shape[1] == 1
        else:
            with self:
                decomposed = function.decompose(*args, **(kwargs or {}))
            if decomposed is not NotImplemented:
                return decomposed
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("which", ["models", "flamingo"])
@pytest.mark.parametrize("work", ["prefill", "mixed", "first-token", "second-question", "decode"])
def test_shapes_are_those_that_pytorch_multiplies(request, work, which):
    models, args = request.getfixturevalue(which)
    case = Case(work, BATCH, TEXT, VISUAL, tokens=2)
    names = NAMES if which == "models" else ["flamingo"] * (work != "second-question")
    names = [name for name in names if work != "mixed" or name not in UNPADDED]
    names = [name for name in names if (work, name) != ("second-question", "llava")]
    with tasks(models, names, case, args, args.cross_every) as todo:
        for name, task in todo.items():
            with Multiplied() as seen:
                task.call()
            assert sum((one.products for one in task.passes), Counter()) == seen.products, name
            pairs = Counter()
            for one, times in sum((one.attention for one in task.passes), Counter()).items():
                pairs[one.samples, one.heads, one.queries, one.keys] += times
            assert pairs == seen.attention, name
            found = sum(2 * math.prod(sizes) * times for one in task.passes for sizes, times in one.products.items())
            found += sum(pairs.flops * times for one in task.passes for pairs, times in one.attention.items())
            assert found == task.flops, name


def test_an_encoder_of_so_many_images_multiplies_what_pytorch_counts(models):
    config = models[0].saisa.config
    assert sum(product.flops for product in clip_products(config, 3)) == 3 * encoder_flops(config)


def test_pairs_that_a_causal_mask_hides_do_not_count():
    pairs = Pairs(samples=2, queries=3, keys=7, heads=4, key_heads=2, size=8, cached=2)
    visible = [[key <= query + 4 for key in range(7)] for query in range(3)]
    assert pairs.visible_flops == 2 * 4 * 2 * 2 * 8 * sum(map(sum, visible))
    assert replace(pairs, causal=False).visible_flops == pairs.flops == 2 * 4 * 2 * 2 * 8 * 21
    assert replace(pairs, queries=1).visible_flops == replace(pairs, queries=1).flops


# --- what is moved ----------------------------------------------------------------------------------------------------


def elements_through(model, pieces: tuple[str, ...], call) -> int:
    """Elements that enter the language model's modules whose names contain one of `pieces`, during a call."""
    seen, handles = [], []
    for name, module in model.named_modules():
        if any(piece in name.split(".")[-1] for piece in pieces) and "vision" not in name:
            handles.append(module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].numel())))
    call()
    for handle in handles:
        handle.remove()
    return sum(seen)


@pytest.mark.parametrize("work", ["prefill", "mixed", "decode"])
def test_norms_and_activations_move_what_passes_through_them(models, work):
    models, args = models
    # hooks on its norms would make a folded model run its modules
    names = [name for name in NAMES if not name.endswith("-folded") and (work != "mixed" or name not in UNPADDED)]
    with tasks(models, names, Case(work, BATCH, TEXT, VISUAL, tokens=1), args, args.cross_every) as todo:
        for name, task in todo.items():
            step = Step(TEXT, VISUAL, batch=BATCH, seeing=1 if work == "mixed" else None)
            moved = list(traffic(*counted_as(models, name), step.next_token() if work == "decode" else step, 4))
            model = model_of(models, name)
            norms = sum(one.rows * one.width for one in moved if one.part == "norms")
            assert norms == elements_through(model, ("norm",), task.call), name
            activations = sum(one.rows * one.width for one in moved if one.part == "activations")
            assert activations == elements_through(model, ("act", "act_fn"), task.call), name


def written(moved) -> int:
    return sum(one.rows * one.width * one.times for one in moved if one.part == "cache")


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_is_written_once(models, name):
    config, architecture = counted_as(models[0], name)
    step = Step(TEXT, VISUAL, batch=BATCH)
    moved = written(traffic(config, architecture, step, 4))
    assert 4 * moved == 2 * cache_bytes(config, architecture, step, 4)  # read and written
    kept = replace(step, visual=0, cached_visual=VISUAL)
    if architecture == "saisa" and not config.in_embedding_space:
        assert written(traffic(config, architecture, kept, 4, placed=VISUAL)) == moved


# --- the arithmetic ---------------------------------------------------------------------------------------------------


def rates_of(work: Work, cache: int = 0) -> Rates:
    """Rates that differ for all shapes."""
    found = {sizes: 1e9 + 1e6 * number for number, sizes in enumerate(sorted(work.products), 1)}
    attention = {measured_as(pairs): 5e8 + 1e6 * pairs.keys for pairs in work.attention}
    return Rates(found, attention, {size: 1e8 + size for size in work.tensors}, 2e8, 4e9, cache)


def test_the_roof_is_the_sum_over_products_attention_and_bytes(models):
    models, _ = models
    config, (t, v, b) = models.saisa.config, (TEXT, VISUAL, BATCH)
    h, m, k, c, layers, vocabulary = 32, 44, 16, 24, 8, 97
    step = Step(t, v, batch=b)
    work = Work.of(products(config, "saisa", step, 4), traffic(config, "saisa", step, 4), 4)
    given = rates_of(work)
    expected = dict.fromkeys(("weights", "flops", "bytes"), 0.0)

    def product(rows, inputs, outputs, times):
        rate = given.products[rows, inputs, outputs]
        by_flops = 2 * rows * inputs * outputs / rate
        by_bytes = (inputs * outputs + rows * inputs + rows * outputs) * 4 / given.memory  # nothing fits into no cache
        waits = "weights" if inputs * outputs * 4 / given.memory > 2 * rows * inputs * outputs / given.peak else "flops"
        expected[waits] += times * max(by_flops, by_bytes)

    for rows, inputs, outputs, times in (
        (b * v, c, h, layers), (b * v, h, h, layers), (b * v, h, k, 2 * layers),
        (b * t, h, h, 2 * layers), (b * t, h, k, 2 * layers), (b * t, h, m, 2 * layers), (b * t, m, h, layers),
        (b, h, vocabulary, 1),
    ):  # fmt: skip
        product(rows, inputs, outputs, times)
    seen = t * v + t * (t + 1) // 2
    expected["flops"] += layers * 4 * b * h * seen / (5e8 + 1e6 * (t + v))

    def moved(rows, width, times):
        size = 4 * rows * width
        expected["bytes"] += times * size / (1e8 + size)

    # embedding, two norms and two residuals per layer, last norm, and the rotation of the queries
    moved(b * t, h, 2 + layers * (4 + 4 + 2) + 2)
    moved(b * v, h, layers * (2 + 2))  # the projector's activation, and the norm behind it
    moved(b * t, m, 3 * layers)
    moved(b * (t + v), k, 4 * layers)
    found = roof([work], given)
    assert found == pytest.approx(expected | {"seconds": sum(expected.values())})
    assert found["weights"] > 0 and found["flops"] > 0
    twice = roof([work, work], given)
    assert twice == pytest.approx({key: 2 * value for key, value in found.items()})


def test_what_the_cache_holds_does_not_come_from_memory():
    sizes, pairs = (1, 100, 50), Pairs(1, 1, 600, 4, 4, 8, cached=599)
    work = Work(Counter({sizes: 3}), Counter({pairs: 1}), Counter(), 4)
    assert work.weight_bytes == 3 * 4 * 5000 and work.cached_bytes(pairs) == 2 * 599 * 32 * 4
    fast = Rates({sizes: 1e15}, {measured_as(pairs): 1e15}, {}, 1.0, 1e15, cache=work.weight_bytes)
    share = 1 - 60000 / (60000 + 153344)
    found = seconds(work, fast)
    assert found["weights"] == pytest.approx(share * 60000) and found["bytes"] == pytest.approx(share * 153344)
    assert seconds(work, replace(fast, cache=10**6))["weights"] == 0.0


def test_numbers_of_keys_that_grow_by_one_are_measured_together():
    pairs = Pairs(2, 1, 641, 4, 2, 8, cached=640)
    assert measured_as(pairs) == measured_as(replace(pairs, keys=704, cached=703)) == Pairs(2, 1, 704, 4, 2, 8)
    assert measured_as(replace(pairs, queries=64)).keys == 641


# --- the rates --------------------------------------------------------------------------------------------------------


def work_of(models, name="saisa", **settings) -> Work:
    config, architecture = counted_as(models, name)
    step = Step(TEXT, VISUAL, batch=BATCH, **settings)
    return Work.of(products(config, architecture, step, 4), traffic(config, architecture, step, 4), 4)


def test_rates_are_those_of_the_clock(models):
    work = [work_of(models[0]), work_of(models[0], "llava")]
    meter = Meter(work, "cpu", torch.float32, clock=count().__next__)
    meter.measure(rounds=2)  # every run takes a second
    rates = meter.rates
    assert rates.products == {sizes: 2 * math.prod(sizes) for sizes in meter.products}
    assert set(rates.products) == {*work[0].products, *work[1].products, (64, 64, 64)}
    assert rates.peak == 2 * 64**3
    for pairs, rate in rates.attention.items():
        assert rate == pairs.flops  # of plain products, in one second
    assert rates.tensors == {size: 2 * size for one in work for size in one.tensors}
    assert rates.memory == 2 * 4 * 2**14
    assert seconds(work[0], rates)["bytes"] > 0
    described = meter.described()
    assert [one["sizes"] for one in described["products"]] == list(map(list, rates.products))
    assert described["peak_flops_per_second"] == rates.peak and described["cache_bytes"] == 2**14


def test_the_best_run_counts(models):
    times = iter([0.0] * 10**6)
    meter = Meter([work_of(models[0])], "cpu", torch.float32, clock=lambda: next(times))
    key = ("product", meter.reference)
    for took, best in ((5.0, 5.0), (2.0, 2.0), (9.0, 2.0)):
        times = (took * tick for tick in count())
        meter.measure(rounds=1)
        assert meter.best[key] == best


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_as_cold_as_those_of_the_model(models, dtype):
    work = replace(work_of(models[0]), itemsize=dtype.itemsize)
    meter = Meter([work], "cpu", dtype, clock=count().__next__)
    assert meter.streamed == 4 * 2**14 < work.weight_bytes
    seen: list = []

    class Weights(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket is torch.ops.aten.mm:
                seen.append((args[1].data_ptr(), args[1].numel() * args[1].element_size()))
            return function(*args, **(kwargs or {}))

    calls = meter._calls()
    with Weights():
        for _ in range(40):
            calls["product", (BATCH * VISUAL, 24, 32)]()
    places = sorted(set(seen))
    size = 24 * 32 * dtype.itemsize
    assert {bytes_ for _, bytes_ in places} == {size}
    assert all(after - before >= size for (before, _), (after, _) in pairwise(places))
    assert places[-1][0] + size - places[0][0] >= 3 * 2**14  # more than the cache
    assert seen[: len(places)] == seen[len(places) : 2 * len(places)]


def test_a_model_that_fits_into_the_cache_has_hot_weights(models, monkeypatch):
    monkeypatch.setattr(measuring, "cache_size", lambda device: 2**30)
    work = work_of(models[0])
    assert Meter([work], "cpu", torch.float32, clock=count().__next__).streamed == work.weight_bytes
    assert work.from_memory(2**30) == 0


def test_grouped_queries_are_attended_to_as_products(models):
    pairs = Pairs(2, 3, 5, heads=4, key_heads=2, size=8)
    work = Work(Counter({(2, 3, 4): 1}), Counter({pairs: 1}), Counter(), 4)
    meter = Meter([work], "cpu", torch.float32, clock=count().__next__)
    calls = meter._calls()
    assert calls["fused", pairs]().shape == (2, 4, 3, 8)
    calls["plain", pairs]()
    meter.measure(rounds=1)
    assert meter.rates.attention[pairs] == pairs.flops
    square = replace(pairs, queries=5)
    assert measuring._is_square(square) and not measuring._is_square(replace(square, causal=False))


def test_scores_that_are_too_large_are_left_to_fused_attention(models, monkeypatch):
    monkeypatch.setattr(measuring, "LARGEST_SCORES", 0)
    meter = Meter([work_of(models[0], "llava")], "cpu", torch.float32, clock=count().__next__)
    meter.measure(rounds=1)
    assert [pairs.visible_flops for pairs in meter.attention] == list(meter.rates.attention.values())


def test_the_last_cache_of_all_cores_counts(monkeypatch, tmp_path):
    monkeypatch.setattr(measuring.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(measuring, "CPUS", tmp_path)
    assert cache_size("cpu") == measuring.UNKNOWN_CACHE
    for core, (index, level, shared, size) in enumerate(
        [(2, 2, "0", "512K"), (3, 3, "0-1", "32768K"), (3, 3, "0-1", "32768K"), (3, 3, "2", "16M")], -1
    ):
        folder = tmp_path / f"cpu{max(core, 0)}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, text in (("level", level), ("shared_cpu_list", shared), ("size", size)):
            (folder / name).write_text(f"{text}\n")
    (tmp_path / "cpu0" / "cache" / "index4").mkdir()  # says nothing
    assert cache_size("cpu") == 48 * 2**20


# --- the command ------------------------------------------------------------------------------------------------------


def bench(capsys, tmp_path, *options):
    path = tmp_path / "result.json"
    options = [*OPTIONS, "--layers=2", "--text=12", "--visual=9", "--repeats=1", "--no-memory", *options]
    assert main(["bench", *options, "--cross-every=2", f"--json={path}"]) == 0
    return capsys.readouterr().out, json.loads(path.read_text())


def test_the_roof_is_printed_and_written(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "RUN_SECONDS", 1e-4)
    options = ["--work", "prefill", "decode", "train", "--roof", "--tokens=2", "--member", "vica", "--models", *MODELS]
    printed, result = bench(capsys, tmp_path, *options)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if line.startswith("|")]
    head = ["", "ms", "roof", "by weights", "by FLOPs", "by bytes", "reached"]
    roofs = {line[0]: line[1:] for line in lines[lines.index(head) + 2 :]}
    *timed, training = result["results"]
    assert "rates" not in training and all("roof" not in found for found in training["models"].values())
    for one in timed:
        assert set(one["models"]) == {*MODELS, "member-llava", "member-vica"}
        for name, found in one["models"].items():
            own = found["roof"]
            assert own["seconds"] == pytest.approx(own["weights"] + own["flops"] + own["bytes"])
            assert own["reached"] == pytest.approx(own["seconds"] / found["seconds"]["wall"][0]) and own["seconds"] > 0
            label = (MODELS | {"member-llava": "member llava", "member-vica": "member vica"})[name]
            shown = roofs[f"{one['name']}: {label}"]
            assert shown[1] == f"{1e3 * own['seconds']:.1f}" and shown[-1] == f"{own['reached']:.0%}"
        for other, ratio in one["ratios"].items():
            expected = one["models"]["saisa"]["roof"]["seconds"] / one["models"][other]["roof"]["seconds"]
            assert ratio["roof"] == pytest.approx(expected)
        assert one["member_ratios"]["member-vica"]["member-llava"]["roof"] > 0
        for measured in one["rates"]["products"]:
            assert measured["flops_per_second"] > 0 and measured["bound"] in ("weights", "flops")
            assert "{:,} x {:,} x {:,}".format(*measured["sizes"]) in roofs
    ratios = next(line for line in lines if line[1:3] == ["ratio", "FLOPs"])
    assert ratios[-1] == "roof" and {len(line) for line in lines if " / " in line[0]} == {len(ratios)}
    assert "memory: " in printed and "\nroof: " in printed


def test_the_share_that_is_reached_is_one_of_the_targets(monkeypatch):
    found = {"saisa": {"seconds": {"wall": [0.4]}, "flops": 2, "roof": {"reached": 0.91}}}
    found["llava"] = {"seconds": {"wall": [1.0]}, "flops": 5}
    result = {"name": "x", "models": found}
    monkeypatch.setattr(targets, "build", lambda *_, **__: None)
    monkeypatch.setattr(targets, "measure_case", lambda *_: result)
    for options, expected in (([], [None]), (["--roof"], [None, 0.90])):
        _, rows = next(targets._cpu_rows(arguments(*options)))
        assert [row["target"] if row["at_least"] else None for row in rows] == expected
        assert all(row["met"] for row in rows)


def test_without_the_option_nothing_is_measured_for_it(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(Meter, "measure", None)
    printed, result = bench(capsys, tmp_path, "--work", "prefill")
    assert "roof" not in printed and "rates" not in result["results"][0]


def test_folded_projectors_are_normed_at_their_own_width():
    config = tiny_config(projector_hidden_size=4, fold_projectors=True)
    moved = Counter(one for one in traffic(config, "saisa", Step(TEXT, VISUAL), 4) if one.rows == VISUAL)
    layers, width = config.text_config.num_hidden_layers, config.folded_width
    assert width < config.text_config.hidden_size
    assert moved == {Traffic("activations", VISUAL, 4, 2): layers, Traffic("norms", VISUAL, width, 2): layers}


def test_traffic_is_of_rows_that_are_there(models):
    config = models[0].saisa.config
    moved = list(traffic(config, "language_model", Step(TEXT, VISUAL), 4))
    assert all(one.rows == TEXT for one in moved)
    assert moved[0] == Traffic("embedding", TEXT, 32, 2)
