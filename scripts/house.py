# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""How big the code is and how it hangs together: python scripts/house.py [--before REVISION] [--help-times]

Counts lines as `wc -l` does. An import circle is a group of modules that reach each other by import statements anywhere in
their files, those for type checkers excepted. `--before` shows the same of a revision of this repository beside it;
`--help-times` the processor time of `saisa --help` and `saisa train --help`, which are run.
"""

import argparse
import ast
import io
import resource
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


ROOT = Path(__file__).parents[1]


def python_files(package: Path) -> list[Path]:
    """The package's modules; the code in the demo's checkpoint is that at the top, or a copy of it."""
    copies = package / "demo" / "checkpoint"
    return sorted(path for path in package.rglob("*.py") if copies not in path.parents)


def lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


def module_name(package: Path, path: Path) -> str:
    parts = path.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.Module, name: str, is_package: bool) -> set[str]:
    """Full names of what a module imports, but for type checkers."""
    found = set()
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for part in node.body
        for inner in ast.walk(part)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: None if is_package else -1]
            base = base[: len(base) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def circles(package: Path) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""
    files = {module_name(package, path): path for path in python_files(package)}
    reached = {}
    for name, path in files.items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        reached[name] = imports(tree, name, path.name == "__init__.py") & files.keys() - {name}
    for through in files:
        for name in files:
            if through in reached[name]:
                reached[name] = reached[name] | reached[through]
    groups = {tuple(sorted(b for b in files if b in reached[a] and a in reached[b])) for a in files}
    return sorted(list(group) for group in groups if len(group) > 1)


def longest_function(path: Path) -> tuple[int, str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return max((node.end_lineno - node.lineno + 1, node.name) for node in functions)


def counts(root: Path) -> dict[str, str]:
    """What is counted of a checkout, by what it is."""
    package = root / "src" / "saisa_hf"
    travelling = sorted(package.glob("*_saisa.py"))
    model = package / "modeling_saisa.py"
    copies = [path for path in (package / "demo" / "checkpoint").glob("*.py") if not path.is_symlink()]
    groups = circles(package)
    shown = {
        "lines of modeling_saisa.py": str(lines(model)),
        "its longest function": "{} ({})".format(*longest_function(model)),
        "lines that travel": f"{sum(map(lines, travelling)):,}",
        "files that travel": str(len(travelling)),
        "lines of code that stand twice": f"{sum(map(lines, copies)):,}",
        "import circles": str(len(groups)) + (f" (modules: {', '.join(map(str, map(len, groups)))})" if groups else ""),
        "lines of README.md": str(lines(root / "README.md")),
    }
    rooms = {}
    for path in python_files(package):
        if path not in travelling:
            room = path.relative_to(package).parts[0] if path.parent != package else "(top)"
            rooms.setdefault(room, []).append((lines(path), path.name))
    for room, files in sorted(rooms.items()):
        shown[f"longest file of {room}"] = "{:,} ({})".format(*max(files))
    return shown


def help_time(*command: str) -> str:
    """Processor time of `saisa COMMAND --help`, the better of two runs."""
    seconds = []
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        call = [sys.executable, "-m", "saisa_hf", *command, "--help"]
        subprocess.run(call, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return f"{min(seconds):.2f} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", metavar="REVISION", help="show the counts of this revision as well")
    parser.add_argument("--help-times", action="store_true", help="time the help texts of the installed package")
    arguments = parser.parse_args()
    columns = {"now": counts(ROOT)}
    if arguments.before:
        archive = subprocess.run(["git", "archive", arguments.before], cwd=ROOT, check=True, stdout=subprocess.PIPE)
        with tempfile.TemporaryDirectory() as folder:
            with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
                tar.extractall(folder, filter="data")
            columns = {arguments.before: counts(Path(folder)), **columns}
    if arguments.help_times:
        columns["now"] |= {"saisa --help": help_time(), "saisa train --help": help_time("train")}
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    print("| | " + " | ".join(columns) + " |")
    print("|---" + "|---:" * len(columns) + "|")
    for row in rows:
        print(f"| {row} | " + " | ".join(column.get(row, "") for column in columns.values()) + " |")


if __name__ == "__main__":
    main()
