# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints that are out there, brought up to this package: `saisa upgrade`.

Changed are the code files (`*_saisa.py`), `auto_map` in the JSON files, and the parts of the model card that this package
wrote. Weights are not read, and every other byte stays.

Code files import each other, so a folder in which half of them are new loads by neither generation. Therefore the new code
is first written under names of its own; `auto_map` is pointed at it; the code files are replaced; `auto_map` is pointed back.
Each of these steps is one `os.replace`, the folder loads after each, and a run that was killed is completed by the next.
"""

import glob
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.utils import validate_repo_id

from ..checkpoint_saisa import AUTO_MAP, PROCESSOR_AUTO_MAP, code_files
from ..common.destination import check_hub, write_file
from ..configuration_saisa import SaisaConfig
from .model_card import _flop_table, _usage, model_card


CONFIG, CARD = "config.json", "README.md"
JSON_FILES = (CONFIG, "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
CODE = re.compile(r"\w+_saisa\.py")

# Sections of the card as releases of this package wrote them, by `section_form`. When the text in model_card_saisa.py
# changes, its new form is added here and the old ones stay.
CARD_FORMS = {
    "Usage": {"35d6b3c8"},
    "Cost of a prompt": {"f5122daf"},
}


@dataclass
class Plan:
    """What an upgrade does: `writes` (file name: content), `removes` (file names), and `notes` on what it leaves alone."""

    writes: dict[str, bytes] = field(default_factory=dict)
    removes: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.writes or self.removes)


def upgrade(
    target: str | os.PathLike,
    check: bool = False,
    push_to_hub: bool = False,
    log: Callable[[str], None] = print,
) -> bool:
    """Brings the checkpoint `target`, a folder or a repository `user/name` on the hub, up to this package's code.

    Args:
        check: tell what would change, and change nothing.
        push_to_hub: for a repository: upload the changes, in one commit. Weights are not downloaded.
        log: gets a line for each file.

    Returns:
        Whether something changed, or would change.

    Raises:
        FileNotFoundError: `target` is no folder and no `user/name`, or has no config.json.
        ValueError: its model_type is not "saisa", a file is not JSON, or `push_to_hub` does not fit `target`.
        OSError: the hub cannot be reached or refuses, or a file cannot be written.
    """
    folder = local_folder(target)
    if folder is None:
        return _upgrade_repository(str(target), check, push_to_hub, log)
    if push_to_hub:
        raise ValueError(
            f"--push-to-hub goes with a repository 'user/name', got the folder {folder}: upgrade it without that option, "
            "then `hf upload` it."
        )
    plan = plan_upgrade(folder, str(folder))
    _tell(plan, str(folder), check, log)
    if plan and not check:
        apply(folder, plan)
    return bool(plan)


def local_folder(target: str | os.PathLike) -> Path | None:
    """The folder that `target` means, or None where it is the id of a repository, 'user/name'.

    What exists, starts with `.`, `~` or `/`, or has more than one slash is a path, and nobody asks the hub for it.

    Raises:
        FileNotFoundError: it is neither.
    """
    text = os.fspath(target)
    path = Path(os.path.expanduser(text))
    if path.is_dir():
        return path
    is_path = path.exists() or text.startswith((".", "~", "/")) or text.count("/") != 1 or os.path.isabs(text)
    if is_path or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text):
        what = "is a file" if path.exists() else "is not a folder"
        raise FileNotFoundError(
            f"FOLDER_OR_REPO {text!r} {what}: expected the folder of a checkpoint, or a repository 'user/name' on the hub."
        )
    return None


def plan_upgrade(folder: Path, name: str, repo_id: str | None = None) -> Plan:
    """What `apply` has to do to the files in `folder`; nothing is written.

    Args:
        name: of the checkpoint, for errors.
        repo_id: the repository it is, if it is one: there a missing model card is written, as `push_to_hub` does.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: model_type is not "saisa", or a file is not JSON.
    """
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"{name} has no {CONFIG}: expected a SAISA checkpoint, as save_pretrained writes it.")
    plan = Plan()
    for file in JSON_FILES:
        path = folder / file
        if not path.is_file():
            continue
        content = path.read_bytes()
        settings = _parsed(content, f"{name}/{file}")
        if file == CONFIG:
            config = settings
            if config.get("model_type") != "saisa":
                raise ValueError(f"{name} has model_type {config.get('model_type')!r}: expected 'saisa'.")
        wanted = _wanted_auto_map(file, settings)
        if wanted != settings.get("auto_map"):
            plan.writes[file] = with_auto_map(content, wanted)
    code = {path.name: path.read_bytes() for path in code_files()}
    for file, content in code.items():
        path = folder / file
        if not path.is_file() or path.read_bytes() != content:
            plan.writes[file] = content
    present = (path.name for path in folder.iterdir() if path.is_symlink() or path.is_file())
    plan.removes = sorted(file for file in present if CODE.fullmatch(file) and file not in code)
    _plan_card(plan, folder / CARD, config, repo_id)
    return plan


def apply(folder: Path, plan: Plan) -> None:
    """Carries out `plan` in `folder`. Killed at any moment, it leaves a folder that loads, with the old code or the new,
    and the next upgrade completes it. A symbolic link is replaced by a file; what it points to stays.

    Raises:
        OSError: a file cannot be written.
    """
    for left in glob.glob(f"{glob.escape(str(folder))}/.*.partial"):
        name = Path(left).name[1:]
        if "_saisa.py." in name or name.startswith(tuple(f"{file}." for file in (*JSON_FILES, CARD))):
            os.unlink(left)  # of a run that was killed
    code = [file for file in plan.writes if CODE.fullmatch(file)]
    settings = {file: plan.writes[file] for file in JSON_FILES if file in plan.writes}
    interim, aside = [], {}
    if code:
        prefix, interim = _write_interim_code(folder)
        for file in JSON_FILES:
            if not (folder / file).is_file():
                continue
            content = settings.get(file) or (folder / file).read_bytes()
            auto_map = _parsed(content, file).get("auto_map") or {}
            moved = {key: prefix + value if _is_ours(value) else value for key, value in auto_map.items()}
            if moved != auto_map:
                if file not in settings:
                    aside[file] = _set_aside(folder / file)
                settings[file] = content
                _write(folder / file, with_auto_map(content, moved))
        for file in code:
            _write(folder / file, plan.writes[file])
    for file, content in settings.items():
        if aside.get(file):
            os.replace(aside[file], folder / file)
        else:
            _write(folder / file, content)
    for file in [*plan.removes, *interim]:
        (folder / file).unlink(missing_ok=True)
    if CARD in plan.writes:
        _write(folder / CARD, plan.writes[CARD])


def _write_interim_code(folder: Path) -> tuple[str, list[str]]:
    """Writes this package's code once more, complete, under names that no other generation has. Returns what these begin
    with, and the names of the files."""
    sources = {path.stem: path.read_text(encoding="utf-8") for path in code_files()}
    digest = hashlib.sha256("".join(sources.values()).encode()).hexdigest()[:8]
    prefix = f"upgrade_{digest}_"
    names = re.compile(rf"\b({'|'.join(sources)})\b")
    for stem, source in sources.items():
        content = names.sub(lambda found: prefix + found[1], source).encode()
        path = folder / f"{prefix}{stem}.py"
        if not path.is_file() or path.read_bytes() != content:
            _write(path, content)
    return prefix, [f"{prefix}{stem}.py" for stem in sources]


def _set_aside(path: Path) -> Path | None:
    """A second name of the file `path`, so that the very file can be put back; None where the file system has no links."""
    aside = path.with_name(f".{path.name}.original.partial")
    try:
        os.link(path, aside, follow_symlinks=False)
    except (OSError, NotImplementedError):
        return None
    return aside


def _write(path: Path, content: bytes) -> None:
    mode = path.stat().st_mode & 0o777 if path.is_file() else 0o644
    write_file(path, content)
    if mode != 0o644:
        os.chmod(path, mode)


def _parsed(content: bytes, name: str) -> dict:
    try:
        settings = json.loads(content.decode("utf-8"))
    except ValueError as error:
        raise ValueError(f"{name} is not JSON: {error}. Take it from the original checkpoint again.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{name} holds a {type(settings).__name__}: expected a JSON object.")
    return settings


def _is_ours(reference) -> bool:
    """Whether a value of auto_map names code of this package: 'modeling_saisa.SaisaModel', or with 'user/name--' in front."""
    return isinstance(reference, str) and reference.split("--")[-1].split(".")[0].endswith("_saisa")


def _wanted_auto_map(file: str, settings: dict):
    """The auto_map that `file` ought to have. Entries that name other people's code stay."""
    present = settings.get("auto_map")
    entries = present if isinstance(present, dict) else {}
    others = {key: value for key, value in entries.items() if not _is_ours(value)}
    if file == CONFIG:
        return AUTO_MAP | others
    if file == "processor_config.json" and (entries or settings.get("processor_class") == "SaisaProcessor"):
        return PROCESSOR_AUTO_MAP | others
    if len(others) == len(entries):
        return present
    return {key: AUTO_MAP[key] for key in entries if key in AUTO_MAP} | others


def with_auto_map(content: bytes, auto_map: dict) -> bytes:
    """The JSON object `content`, which is not empty, with this `auto_map`; every byte outside of it stays.

    Raises:
        ValueError: `content` is not JSON.
    """
    text = content.decode("utf-8")
    newline = "\r\n" if "\r\n" in text else "\n"
    span = _span_of_auto_map(text)
    if span is None:  # it becomes the first member
        start = re.match(r"\s*\{\s*", text).end()
        space = text[text.index("{") + 1 : start]
        indent = space.rpartition("\n")[2] if "\n" in space else None
        member = f'"auto_map": {_rendered(auto_map, indent, newline)},{" " if indent is None else space}'
        return (text[:start] + member + text[start:]).encode("utf-8")
    start, end = span
    line = text[text.rfind("\n", 0, start) + 1 : start]
    indent = line[: len(line) - len(line.lstrip())] if "\n" in text[start:end] else None
    return (text[:start] + _rendered(auto_map, indent, newline) + text[end:]).encode("utf-8")


def _rendered(auto_map: dict, indent: str | None, newline: str) -> str:
    if indent is None:
        return json.dumps(auto_map, sort_keys=True, ensure_ascii=False)
    text = json.dumps(auto_map, sort_keys=True, ensure_ascii=False, indent=indent or 2)
    return text.replace("\n", f"{newline}{indent}")


def _span_of_auto_map(text: str) -> tuple[int, int] | None:
    """Where the value of the outermost object's `auto_map` begins and ends."""
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    found = None
    at = space.match(text, text.index("{") + 1).end()
    while text[at] == '"':
        key, at = decoder.raw_decode(text, at)
        start = space.match(text, space.match(text, at).end() + 1).end()  # behind the colon
        _, at = decoder.raw_decode(text, start)
        if key == "auto_map":
            found = (start, at)
        at = space.match(text, at).end()
        if text[at] == ",":
            at = space.match(text, at + 1).end()
    return found


def section_form(section: str) -> str:
    """What a section of the card is recognised by: a digest of its text without the model's name and numbers."""
    name = re.search(r'from_pretrained\("([^"\n]*)"', section)
    text = section.replace(f'"{name[1]}"', '"user/name"') if name else re.sub(r"\d[\d.,]*(e[+-]?\d+)?", "0", section)
    for one, other in (("| this model |", "| SAISA |"), ("more)", "less)")):
        text = text.replace(one, other)
    return hashlib.sha256(text.strip().encode()).hexdigest()[:8]


def _plan_card(plan: Plan, path: Path, config: dict, repo_id: str | None) -> None:
    try:
        if not path.is_file():
            if repo_id is not None:
                plan.writes[CARD] = model_card(SaisaConfig.from_dict(config), repo_id=repo_id).encode()
            return
        content = path.read_bytes()
        text = content.decode("utf-8")
        recognised = False
        for title, forms in CARD_FORMS.items():
            found = re.search(rf"^## {title}\n.*?(?=^## |\Z)", text, re.M | re.S)
            if found is None or section_form(found[0]) not in forms:
                continue
            recognised = True
            if title == "Usage":
                section = _usage(re.search(r'from_pretrained\("([^"\n]*)"', found[0])[1])
            else:
                section = _flop_table(SaisaConfig.from_dict(config))
            section = section.strip() + found[0][len(found[0].rstrip()) :]
            text = text[: found.start()] + section + text[found.end() :]
        if not recognised:
            plan.notes.append(f"{CARD} is left as it is: this package did not write it")
        elif text.encode() != content:
            plan.writes[CARD] = text.encode()
    except (
        Exception
    ) as error:  # a card is no reason not to bring the code: the configuration may name parts that are not here
        plan.notes.append(f"{CARD} is left as it is: {' '.join(str(error).split()) or type(error).__name__}")


def _tell(plan: Plan, name: str, check: bool, log: Callable[[str], None]) -> None:
    would = "would be " if check else ""
    for file in sorted(plan.writes):
        what = "auto_map " if file in JSON_FILES else ""
        log(f"{file}: {what}{would}brought up to this package")
    for file in plan.removes:
        log(f"{file}: {would}removed, this package has no such file")
    for note in plan.notes:
        log(f"note: {note}")
    if not plan:
        log(f"{name} is up to date")


def _upgrade_repository(repo_id: str, check: bool, push_to_hub: bool, log: Callable[[str], None]) -> bool:
    if not check and not push_to_hub:
        raise ValueError(
            f"FOLDER_OR_REPO {repo_id!r} is no folder here. If it is a repository on the hub, pass --check to see what would "
            "change in it, or --push-to-hub to change it."
        )
    validate_repo_id(repo_id)
    if push_to_hub:
        check_hub(repo_id)
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        try:
            info = api.model_info(repo_id)
            present = {file.rfilename for file in info.siblings}
            wanted = [file for file in present if file in (*JSON_FILES, CARD) or CODE.fullmatch(file)]
            if wanted:
                snapshot_download(repo_id, revision=info.sha, allow_patterns=wanted, local_dir=folder)
        except Exception as error:  # what the HTTP library of the installed huggingface_hub raises
            reason = str(error).strip().split("\n")[0]
            raise OSError(f"{repo_id} is no folder here and cannot be had from the hub: {reason}") from error
        plan = plan_upgrade(Path(folder), repo_id, repo_id=repo_id)
    _tell(plan, repo_id, check, log)
    if not plan or check:
        return bool(plan)
    operations = [CommitOperationAdd(file, content) for file, content in sorted(plan.writes.items())]
    operations += [CommitOperationDelete(file) for file in plan.removes]
    try:
        commit = api.create_commit(
            repo_id, operations, commit_message="Code of the current saisa_hf release", parent_commit=info.sha
        )
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise OSError(f"{repo_id} was not changed: {reason}") from error
    log(f"uploaded it to {commit.commit_url}")
    return True
