# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Lists every name of transformers, peft and accelerate used by the files that travel with a checkpoint, as a Markdown table.

A name counts if a file imports it, requests it through `optional` or `needed` (see `compat_saisa.py`), reads it as an
attribute of an imported module or class, or calls it through `super()`. It is on the core path if importing the file needs it
and nothing substitutes for it. It is private if a part of it begins with an underscore, or if it is reached through a module
name that is composed at run time.

`--write PAGE` replaces the table between two markers of that page. `--list` prints the names alone, which a test compares
with `tests/fixtures/transformers_names.txt`. `--of FOLDER` reads the files of another folder.
"""

from __future__ import annotations

import argparse
import ast
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parents[1]
CODE = ROOT / "src" / "saisa_hf"
PACKAGES = ("transformers", "peft", "accelerate")
START, END = "<!-- names: start -->", "<!-- names: end -->"
# methods of `object`, `dict` and PyTorch's modules, which `super()` can also reach
NOT_TRANSFORMERS = ("__init__", "__getattr__", "__getitem__", "__call__", "forward")
# the last commit before the core path was made narrow
BEFORE = "5c6bc16"

# The feature that a name serves if it is not on the core path; the first matching pattern decides.
FEATURES = {
    r"get_decoder|get_output_embeddings|AutoModelForCausalLM": "`from_parts`",
    r"tensor_parallel": "tensor parallelism",
    r"quantizers": "quantization",
    r"initialization": "new weights",
    r"masking_utils": "masks of transformers' own",
    r"LogitsProcessor": "images in `generate`",
    r"chat_template": "chat templates",
    r"select_best_resolution": "images in tiles",
    r"image_utils": "images from addresses",
    r"AddedToken": "adding an image token",
    r"MultiModalData": "serving engines' question about sizes",
    r"processing_utils\.(?:ProcessingKwargs|Unpack)|_merge_kwargs": "a processor's arguments",
    r"MAPPING_NAMES": "`transformers serve`",
    r"TrainingArguments": "training",  # in the files at `BEFORE`
    r"ALL_ATTENTION_FUNCTIONS": "attention other than sdpa and eager",
    r"modeling_layers": "gradient checkpointing",
    r"cache_utils\.DynamicLayer": "a copy less in the cache",
    r"conversion_mapping": "encoders that 5.x has renamed",
    r"can_return_tuple": "`return_dict=False`",
    r"logging": "warnings",
    r"ACT2FN": "rarer activations",
    r"CONFIG_MAPPING": "names in an error message",
    r"_model_mapping": "encoders without a choice of attention",
    r"_get_key_renaming_mapping": "LLaVA checkpoints on 4.57",
    r"set_attn_implementation": "`set_attn_implementation`",
    r"push_to_hub": "`push_to_hub`",
    r"get_attributes": "the parts of a processor",
    r"convert_to_tensors|super\(\)\.to$": "visual states in a processor's output",
    r"^transformers\.\{name\}$": "image processors that work with Pillow",
}

# Files of a single feature: names used in their functions serve that feature.
FEATURE_FILES = {"parts": "`from_parts`", "quantization": "quantization", "model_card": "model cards"}


class Use(NamedTuple):
    """A use of a name: its file, whether it happens when the file is imported, and whether it fails without the name."""

    name: str
    file: str
    at_import: bool
    core: bool


class Names(ast.NodeVisitor):
    """Collects `uses` of one file."""

    def __init__(self, file: str, own_methods: dict[str, set[str]]):
        self.file, self.uses, self.bound = file, [], {}
        self.own_methods, self.class_name = own_methods, None
        self.functions = 0  # number of functions around the node

    def add(self, name: str, core: bool) -> None:
        self.uses.append(Use(name, self.file, not self.functions, core))

    def visit_Import(self, node):
        for alias in node.names:
            if alias.name.split(".")[0] in PACKAGES:
                bound = alias.asname or alias.name.split(".")[0]
                self.bound[bound] = alias.name if alias.asname else bound
                self.add(alias.name, not self.functions)

    def visit_ImportFrom(self, node):
        if node.level == 0 and (node.module or "").split(".")[0] in PACKAGES:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                self.bound[alias.asname or alias.name] = name
                self.add(name, not self.functions)

    def visit_If(self, node):
        if not (isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            self.generic_visit(node)

    def visit_ClassDef(self, node):
        outer, self.class_name = self.class_name, node.name
        self.generic_visit(node)
        self.class_name = outer

    def visit_FunctionDef(self, node):
        for outside in (*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(outside)
        self.functions += 1
        for inside in node.body:
            self.visit(inside)
        self.functions -= 1

    def visit_Attribute(self, node):
        if isinstance(node.value, ast.Name) and node.value.id in self.bound:
            self.add(f"{self.bound[node.value.id]}.{node.attr}", True)
        elif isinstance(node.value, ast.Call) and ast.unparse(node.value) == "super()":
            if node.attr in self.own_methods.get(self.class_name, NOT_TRANSFORMERS):
                return
            self.add(f"super().{node.attr}", True)
        self.generic_visit(node)

    def visit_Call(self, node):
        called = ast.unparse(node.func)
        if called in ("optional", "needed"):
            module, name = (self._text(x) for x in node.args[-2 if called == "needed" else 0 :][:2])
            if module.split(".")[0] in PACKAGES:
                self.add(f"{module}.{name}", False)
        elif called == "self.part":
            name = self._text(node.args[0])
            prefix = "" if name.islower() else "{prefix}"  # a function, in the files at `BEFORE`
            self.add(f"transformers.models.{{family}}.modeling_{{family}}.{prefix}{name}", True)
        elif called in ("getattr", "hasattr") and isinstance(node.args[0], ast.Name) and node.args[0].id in self.bound:
            fallback = called == "hasattr" or len(node.args) > 2
            self.add(f"{self.bound[node.args[0].id]}.{self._text(node.args[1])}", not fallback)
        self.generic_visit(node)

    @staticmethod
    def _text(node) -> str:
        if isinstance(node, ast.Constant):
            return str(node.value)
        if isinstance(node, ast.JoinedStr):
            return ast.unparse(node)[2:-1]
        return f"{{{ast.unparse(node)}}}"


def own_methods(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """{class: the methods that `super()` finds in its bases in these files, in PyTorch or in Python}"""
    classes = {node.name: node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}

    def defined(name: str) -> set[str]:
        own = {node.name for node in classes[name].body if isinstance(node, ast.FunctionDef)}
        return own | inherited(name)

    def inherited(name: str) -> set[str]:
        bases = [ast.unparse(base) for base in classes[name].bases]
        return set(NOT_TRANSFORMERS).union(*(defined(base) for base in bases if base in classes and base != name))

    return {name: inherited(name) for name in classes}


def names(code: Path) -> dict[str, list[Use]]:
    """{name: its uses}, sorted."""
    found = defaultdict(list)
    trees = {path.stem: ast.parse(path.read_text(encoding="utf-8")) for path in sorted(code.glob("*_saisa.py"))}
    methods = own_methods(trees)
    for file, tree in trees.items():
        visitor = Names(file.removesuffix("_saisa"), methods)
        visitor.visit(tree)
        for use in visitor.uses:
            found[use.name].append(use)
    return {name: found[name] for name in sorted(found)}


def is_core(uses: list[Use]) -> bool:
    """Whether loading, forward, generate or saving of any checkpoint fails without the name."""
    at_use = [use for use in uses if use.core and use.file not in FEATURE_FILES and not _feature(use.name)]
    return any(use.core and use.at_import for use in uses) or bool(at_use)


def is_private(name: str) -> bool:
    """Whether the name is not part of transformers' public interface."""
    return any(part.startswith("_") and not part.startswith("__") for part in name.split(".")) or "{" in name


def _feature(name: str) -> str:
    return next((feature for pattern, feature in FEATURES.items() if re.search(pattern, name)), "")


def removable(found: dict) -> list[str]:
    """The names that a release may lack: those requested by full name through `optional` and `needed` alone."""
    return [name for name, uses in found.items() if "{" not in name and not any(use.core for use in uses)]


def serves(uses: list[Use]) -> str:
    """What a name serves: "core", or a feature."""
    feature = _feature(uses[0].name)
    if is_core(uses):
        return "core"
    in_file = next((FEATURE_FILES[use.file] for use in uses if use.file in FEATURE_FILES), None)
    return feature or in_file or "core, with a substitute"


def counts(found: dict) -> dict[str, int]:
    """The number of names: all, on the core path, and private."""
    core = [name for name, uses in found.items() if is_core(uses)]
    return {"all": len(found), "core": len(core), "private": sum(map(is_private, found))}


def before() -> dict[str, int]:
    """`counts` of the files at the commit `BEFORE`."""
    with tempfile.TemporaryDirectory() as folder:
        git = ["git", "-C", str(ROOT)]
        listed = subprocess.check_output([*git, "ls-tree", "--name-only", BEFORE, "src/saisa_hf/"], text=True).split()
        for path in listed:
            if path.endswith("_saisa.py"):
                Path(folder, Path(path).name).write_bytes(subprocess.check_output([*git, "show", f"{BEFORE}:{path}"]))
        return counts(names(Path(folder)))


def table(found: dict, old: dict[str, int] | None) -> str:
    """The two tables of the page."""
    new = counts(found)
    lines = ["| names | in all | on the core path | private |", "| --- | --- | --- | --- |"]
    if old is not None:
        lines.append(f"| before | {old['all']} | {old['core']} | {old['private']} |")
    lines += [f"| now | {new['all']} | {new['core']} | {new['private']} |", ""]
    lines += ["| name | files | for | public | asked for |", "| --- | --- | --- | --- | --- |"]
    for name, uses in sorted(found.items(), key=lambda item: (not is_core(item[1]), item[0])):
        files = ", ".join(sorted({use.file for use in uses}))
        when = "at import" if any(use.at_import for use in uses) else "when used"
        public = "private" if is_private(name) else "public"
        lines.append(f"| `{name}` | {files} | {serves(uses)} | {public} | {when} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="Markdown page to write the table into")
    parser.add_argument("--list", action="store_true", help="print the names alone")
    parser.add_argument("--of", type=Path, default=CODE, help="folder of the files to read (default: the package)")
    arguments = parser.parse_args()
    found = names(arguments.of)
    if arguments.list:
        print("\n".join(found))
        return 0
    text = table(found, before())
    print(text)
    if arguments.write:
        content = arguments.write.read_text(encoding="utf-8")
        if START not in content or END not in content:
            raise SystemExit(
                f"{arguments.write} has no markers for the table: it needs the lines {START!r} and {END!r}"
            )
        head, tail = content.split(START)[0], content.split(END)[1]
        arguments.write.write_text(f"{head}{START}\n{text}\n{END}{tail}", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
