# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""The console script `saisa`: one sub-command per thing that can be done without writing Python.

Heavy modules are imported by the sub-command that needs them, so that `saisa --help` answers at once.
"""

import argparse
import math
import os
import sys
from importlib.metadata import version


CONVERT_HELP = """\
Converts a checkpoint in the layout of the SAISA authors' code (yuanqianhao/saisa-vicuna, yuanqianhao/saisa-llama3, or
one trained with that code) into one that transformers loads:

  saisa convert yuanqianhao/saisa-vicuna ./saisa-vicuna

The result holds weights, configuration, code files, model card and, where SRC has a tokenizer, the processor with its
chat template. DST appears when everything is written and checked; on failure nothing is left behind.
"""

CHAT_HELP = """\
Answers questions about pictures in the terminal:

  saisa chat ./saisa-vicuna --image cat.jpg dog.jpg
  echo "how many cats are there?" | saisa chat ./saisa-vicuna --image cat.jpg

Keys and values of the conversation are kept: each turn computes its own tokens alone. Commands,
among them /image PATH at any turn, are listed by /help; Ctrl-C stops an answer. Where stdin or stdout
is no terminal, each line of stdin is a question or a command, stdout holds nothing but answers, and
the first error ends the program.
"""

BUILD_HELP = """\
Makes a SAISA of a trained LLaVA, without training on text. Language model and encoder are the LLaVA's own; the projector
of each layer is fitted to the states that the LLaVA's visual tokens have there, on any pictures:

  saisa build --from-llava llava-hf/llava-1.5-7b-hf --images ./photos ./saisa-of-llava

DST holds model, processor and a report: errors by layer, and how well the next-token distributions agree with the LLaVA's
on pictures that were held out. An interrupted run goes on where it was.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line `argv` (None: the process's own) and returns the exit status.

    0: done. 1: a file, folder, repository or optional package is missing or cannot be used. 2: the command line or
    something in the input is not as expected. Errors are one line on stderr.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        if argv[:1] == ["demo"]:  # it has an argument parser of its own
            from .demo.run import main as demo

            return demo(argv[1:]) or 0
        arguments = _parser().parse_args(argv)
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ImportError) as error:
        return _fail(error, 1)
    except ValueError as error:
        return _fail(error, 2)


def _fail(error: object, status: int) -> int:
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    print(f"saisa: error: {' '.join(text.split()) or type(error).__name__}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="saisa", description="SAISA vision-language models for transformers.")
    parser.add_argument("--version", action="version", version=f"saisa-hf {version('saisa-hf')}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    commands.add_parser("demo", help="ask a small model about pictures of handwritten digits, or train it again")

    command = commands.add_parser(
        "convert",
        help="convert a checkpoint of the SAISA authors' code",
        description=CONVERT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("source", metavar="SRC", help="folder, or hub id, of the checkpoint")
    command.add_argument("destination", metavar="DST", help="folder to make")
    command.add_argument(
        "--vision-tower",
        metavar="PATH",
        help="folder, or hub id, of the vision encoder (default: mm_vision_tower in SRC's config.json); its weights are "
        "used where SRC has none of its own",
    )
    command.add_argument(
        "--chat-template",
        metavar="NAME",
        help="vicuna, llama_3, chatml, plain, or a .jinja file (default: llama_3 for Llama 3 tokenizers, else vicuna)",
    )
    command.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), help="store the weights so (default: as SRC does)"
    )
    command.add_argument(
        "--max-shard-size", metavar="SIZE", default="5GB", help="largest weight file (default: %(default)s)"
    )
    command.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    command.set_defaults(run=_convert)

    command = commands.add_parser(
        "build",
        help="make a SAISA of a trained LLaVA",
        description=BUILD_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("destination", metavar="DST", help="folder to make")
    _add_llava_options(command)
    command.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="run and store the model so (default: as MODEL is stored)",
    )
    command.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps ... (default: auto, the fastest there is)"
    )
    command.set_defaults(run=_build)

    command = commands.add_parser(
        "chat",
        help="talk with a model about pictures",
        description=CHAT_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("model", metavar="MODEL", help="folder, or hub id, of a SAISA checkpoint")
    command.add_argument(
        "--image",
        metavar="PATH",
        nargs="+",
        default=[],
        action="extend",
        help="pictures (or addresses) for the first question",
    )
    command.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="compute in this (default: auto, what the checkpoint is stored in)",
    )
    command.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, mps ... (default: auto, the fastest there is)"
    )
    command.add_argument(
        "--attn-implementation", metavar="NAME", help="eager, sdpa, flex_attention, flash_attention_2 ..."
    )
    command.add_argument(
        "--max-new-tokens", metavar="N", type=_positive, default=512, help="longest answer (default: %(default)s)"
    )
    command.add_argument("--system", metavar="TEXT", help="system message, where the model's chat template has one")
    command.add_argument(
        "--temperature", metavar="T", type=_temperature, help="of sampling; 0: greedy (default: as the checkpoint says)"
    )
    command.set_defaults(run=_chat)
    return parser


def _add_llava_options(command: argparse.ArgumentParser) -> None:
    """What `saisa build --from-llava` takes; the defaults are those of `saisa_hf.from_llava.Fit`."""
    group = command.add_argument_group("a LLaVA as a starting point")
    group.add_argument(
        "--from-llava", metavar="MODEL", help="folder, or hub id, of a LLaVA or LLaVA-NeXT in transformers' layout"
    )
    group.add_argument("--images", metavar="FOLDER", help="pictures to fit the projectors on; nothing else is needed")
    group.add_argument(
        "--pictures", metavar="N", type=_positive, default=2000, help="use N of them at most (default: %(default)s)"
    )
    group.add_argument(
        "--held-out",
        metavar="N",
        type=_positive,
        default=64,
        help="keep N of these to measure on (default: %(default)s)",
    )
    group.add_argument(
        "--steps", metavar="N", type=_count, default=500, help="steps of descent for each layer (default: %(default)s)"
    )
    group.add_argument(
        "--projector-hidden-size", metavar="N", type=_positive, help="inner width of the projectors (default: MODEL's)"
    )
    group.add_argument(
        "--distill",
        metavar="STEPS",
        type=_count,
        default=0,
        help="then train the projectors, STEPS steps, on MODEL's own answers to the prompts (default: %(default)s)",
    )
    group.add_argument(
        "--prompts", metavar="FILE", help="generic prompts, one a line, to measure and distill with (default: four)"
    )
    group.add_argument(
        "--prompt-format",
        metavar="TEXT",
        help="how MODEL is asked, 'USER: <image>\\n{prompt} ASSISTANT:' for instance (default: its chat template)",
    )
    group.add_argument(
        "--work-folder",
        metavar="DIR",
        help="keep features, states and finished layers there (default: a folder beside DST, removed at the end)",
    )
    group.add_argument("--seed", metavar="N", type=_count, default=0, help="default: %(default)s")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return int(text)


def _count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number that is not negative, got {text!r}")
    return int(text)


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number that is not negative, got {text!r}")
    return value


def _chat(arguments: argparse.Namespace) -> int:
    from .chat import chat

    return chat(
        arguments.model,
        arguments.image,
        dtype=arguments.dtype,
        device=arguments.device,
        attn_implementation=arguments.attn_implementation,
        system=arguments.system,
        max_new_tokens=arguments.max_new_tokens,
        temperature=arguments.temperature,
    )


def _convert(arguments: argparse.Namespace) -> int:
    from .convert import convert

    convert(
        arguments.source,
        arguments.destination,
        vision_tower=arguments.vision_tower,
        chat_template=arguments.chat_template,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        overwrite=arguments.overwrite,
    )
    return 0


def _build(arguments: argparse.Namespace) -> int:
    from .from_llava import build

    return build(arguments)
