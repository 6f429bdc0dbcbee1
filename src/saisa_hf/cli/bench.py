# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa bench`: speed and memory, measured."""

import argparse

from ..bench.options import add_arguments
from .options import Commands, add_command, given


HELP = """\
Measures SAISA beside other ways to read images, with random weights of the same language model and encoder,
on the same work in the same run: transformers' LLaVA, a Flamingo (transformers' Idefics), and the language
model on the text alone, which is the lower bound.

  saisa bench --batch 1 8
  saisa bench --curve --llava-up-to 8192 --plot curve.png --json curve.json
  saisa bench --preset vicuna-7b --device cuda --dtype bfloat16 --batch 1 8 32
  saisa bench --family --models llava
  saisa bench --work prefill second-question --roof
  saisa bench --projector-hidden-size 0.25 --fold

In each round all models take turns. Prints medians with quartiles, ratios first, each beside the ratio of FLOPs, which
is its limit.

--roof measures, without a model, what the machine can do: matrix products and attention at each shape that occurs, with
weights as cold as a model's, and moves of bytes. Beside each time it prints the roof: what all products of the pass take at
these rates (those of the encoder too), attention over the pairs that the causal mask leaves, one pass over the tensors of
norms, residuals, activations, rotations and embedding, and keys and values written into the cache. It does not count the
encoder's own norms and activations, softmax, masks, sampling, memory given back to the system and cleared again, copies that
a model could do without (such as a dynamic cache that grows), and the time in which Python and PyTorch start operations.
"""


def add_to(commands: Commands) -> None:
    command = add_command(
        commands,
        "bench",
        run,
        summary="measure speed and memory, beside LLaVA, a Flamingo and the language model alone",
        description=HELP,
        usage="saisa bench [options]",
    )
    add_arguments(command)


def run(arguments: argparse.Namespace) -> int:
    from ..bench.run import bench

    bench(argparse.Namespace(**given(arguments)))
    return 0
