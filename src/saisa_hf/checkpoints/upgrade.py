# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`saisa upgrade`: existing checkpoints get the code of this package.

It changes the code files (`*_saisa.py`), `auto_map` in the JSON files, and the parts of the model card that this package
wrote. Weights are not read, and every other byte stays the same.

Code files import each other, so a folder in which half of them are new cannot be loaded. Therefore the new code is first
written under names of its own; `auto_map` is pointed at it; the code files are replaced; `auto_map` is pointed back. Each of
these steps is one `os.replace`, the folder loads after each, and a run that was killed is completed by the next one.
"""

import glob
import hashlib
import os
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.utils import validate_repo_id

from ..checkpoint_saisa import code_files
from ..common import sources
from ..common.destination import check_hub, write_file
from ..configuration_saisa import SaisaConfig
from ..saving_saisa import ENTRIES, UNFINISHED, check_finished, finish_saving
from .auto_map import is_ours, parsed, wanted_auto_map, with_auto_map
from .model_card import flop_section, model_card, usage_section


CONFIG, CARD = "config.json", "README.md"
JSON_FILES = (CONFIG, "processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
CODE = re.compile(r"\w+_saisa\.py")

# Sections of the card as releases of this package wrote them, by `section_form`. When the text of a section changes, its new
# form is added here and the old ones stay.
CARD_FORMS = {
    "Usage": {"35d6b3c8"},
    "Cost of a prompt": {"f5122daf"},
}


@dataclass
class Plan:
    """What an upgrade does: `writes` (file name: content), `removes` (file names), and `notes` on what it does not change."""

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
    """Gives the checkpoint `target` the code of this package.

    Args:
        target: a folder, or a repository `user/name` on the hub.
        check: report what would change, and change nothing.
        push_to_hub: for a repository: upload the changes, in one commit. Weights are not downloaded.
        log: gets a line for each file.

    Returns:
        Whether anything changed, or would change.

    Raises:
        FileNotFoundError: `target` is neither a folder nor a `user/name`, or has no config.json.
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
    if _was_interrupted(folder):
        if check:
            check_finished(folder, ENTRIES)
        finish_saving(folder)
        if _was_interrupted(folder):
            raise FileNotFoundError(
                f"{folder}: saving into it was interrupted, and its new files, in a hidden folder there, are gone. "
                "Save again, or copy the folder again with all that is in it."
            )
        log(f"finished the saving into {folder} that was interrupted")
        if not (folder / CONFIG).is_file():  # a processor's alone
            return True
    plan = plan_upgrade(folder, str(folder))
    _report(plan, str(folder), check, log)
    if plan and not check:
        apply(folder, plan)
    return bool(plan)


def _was_interrupted(folder: Path) -> bool:
    try:
        check_finished(folder, ENTRIES)
    except ValueError:
        return True
    return False


def local_folder(target: str | os.PathLike) -> Path | None:
    """The folder that `target` means, or None if it is the id of a repository, 'user/name'.

    Raises:
        FileNotFoundError: it is neither.
    """
    folder = sources.local_folder(target, "FOLDER_OR_REPO")
    if folder is None and "/" not in os.fspath(target):
        raise FileNotFoundError(
            f"FOLDER_OR_REPO {os.fspath(target)!r} is not a folder: expected the folder of a checkpoint, or a repository "
            "'user/name' on the hub."
        )
    return folder


def plan_upgrade(folder: Path, name: str, repo_id: str | None = None) -> Plan:
    """What `apply` has to do to the files in `folder`; nothing is written.

    Args:
        folder: of the checkpoint, or of its files without weights.
        name: of the checkpoint, for error messages.
        repo_id: the repository, if it is one: a missing model card is then written, as `push_to_hub` does.

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
        settings = parsed(content, f"{name}/{file}")
        if file == CONFIG:
            config = settings
            if UNFINISHED in config:
                raise ValueError(config[UNFINISHED])
            if config.get("model_type") != "saisa":
                raise ValueError(f"{name} has model_type {config.get('model_type')!r}: expected 'saisa'.")
        wanted = wanted_auto_map(file, settings)
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
    """Carries out `plan` in `folder`. If it is killed, the folder loads, with the old code or the new, and the next upgrade
    completes it. A symbolic link is replaced by a file; what it points to stays.

    Raises:
        OSError: a file cannot be written.
    """
    for left in glob.glob(f"{glob.escape(str(folder))}/.*.partial"):
        name = Path(left).name[1:]
        if "_saisa.py." in name or name.startswith(tuple(f"{file}." for file in (*JSON_FILES, CARD))):
            os.unlink(left)  # left by a run that was killed
    code = [file for file in plan.writes if CODE.fullmatch(file)]
    settings = {file: plan.writes[file] for file in JSON_FILES if file in plan.writes}
    interim: list[str] = []
    aside: dict[str, Path | None] = {}
    if code:
        prefix, interim = _write_interim_code(folder)
        for file in JSON_FILES:
            if not (folder / file).is_file():
                continue
            content = settings.get(file) or (folder / file).read_bytes()
            auto_map = parsed(content, file).get("auto_map") or {}
            moved = {key: prefix + value if is_ours(value) else value for key, value in auto_map.items()}
            if moved != auto_map:
                if file not in settings:
                    aside[file] = _set_aside(folder / file)
                settings[file] = content
                _write(folder / file, with_auto_map(content, moved))
        for file in code:
            _write(folder / file, plan.writes[file])
    for file, content in settings.items():
        original = aside.get(file)
        if original is not None:
            os.replace(original, folder / file)
        else:
            _write(folder / file, content)
    for file in [*plan.removes, *interim]:
        (folder / file).unlink(missing_ok=True)
    if CARD in plan.writes:
        _write(folder / CARD, plan.writes[CARD])


def _write_interim_code(folder: Path) -> tuple[str, list[str]]:
    """Writes this package's code a second time, complete, under names that no other release has. Returns the prefix of these
    names, and the names of the files."""
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
    """A second name of the file `path`, so that the same file can be put back; None if the file system has no links."""
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


def section_form(section: str) -> str:
    """How a section of the card is recognised: a digest of its text without the model's name and numbers."""
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
                repository = re.search(r'from_pretrained\("([^"\n]*)"', found[0])
                section = usage_section(repository[1] if repository else "user/name")
            else:
                section = flop_section(SaisaConfig.from_dict(config))
            section = section.strip() + found[0][len(found[0].rstrip()) :]
            text = text[: found.start()] + section + text[found.end() :]
        if not recognised:
            plan.notes.append(f"{CARD} is not changed: this package did not write it")
        elif text.encode() != content:
            plan.writes[CARD] = text.encode()
    except Exception as error:  # the code is upgraded in any case: the configuration may name parts that are not here
        plan.notes.append(f"{CARD} is not changed: {' '.join(str(error).split()) or type(error).__name__}")


def _report(plan: Plan, name: str, check: bool, log: Callable[[str], None]) -> None:
    would = "would be " if check else ""
    for file in sorted(plan.writes):
        what = "auto_map " if file in JSON_FILES else ""
        log(f"{file}: {what}{would}brought up to date")
    for file in plan.removes:
        log(f"{file}: {would}removed, this package has no such file")
    for note in plan.notes:
        log(f"note: {note}")
    if not plan:
        log(f"{name} is up to date")


def _upgrade_repository(repo_id: str, check: bool, push_to_hub: bool, log: Callable[[str], None]) -> bool:
    if not check and not push_to_hub:
        raise ValueError(
            f"FOLDER_OR_REPO {repo_id!r} is not a folder here. If it is a repository on the hub, pass --check to see what "
            "would change in it, or --push-to-hub to change it."
        )
    validate_repo_id(repo_id)
    if push_to_hub:
        check_hub(repo_id)
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        try:
            info = api.model_info(repo_id)
            present = {file.rfilename for file in info.siblings or ()}
            wanted = [file for file in present if file in (*JSON_FILES, CARD) or CODE.fullmatch(file)]
            if wanted:
                snapshot_download(repo_id, revision=info.sha, allow_patterns=wanted, local_dir=folder)
        except Exception as error:  # what the HTTP library of the installed huggingface_hub raises
            raise OSError(
                f"{repo_id} is not a folder here and cannot be downloaded from the hub: {sources.first_line(error)}"
            ) from error
        plan = plan_upgrade(Path(folder), repo_id, repo_id=repo_id)
    _report(plan, repo_id, check, log)
    if not plan or check:
        return bool(plan)
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    operations += [CommitOperationAdd(file, content) for file, content in sorted(plan.writes.items())]
    operations += [CommitOperationDelete(file) for file in plan.removes]
    try:
        commit = api.create_commit(
            repo_id, operations, commit_message="Code of the current saisa_hf release", parent_commit=info.sha
        )
    except Exception as error:
        raise OSError(f"{repo_id} was not changed: {sources.first_line(error)}") from error
    log(f"uploaded it to {commit.commit_url}")
    return True
