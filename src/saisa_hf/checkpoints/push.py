# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`model.push_to_hub`: weights, config, code files and a model card, in one commit."""

import contextlib
import tempfile
from collections.abc import Iterator

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from ..common.sources import first_line
from .model_card import write_model_card


WEIGHT_FILES = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]


def push_model_to_hub(
    model,
    repo_id: str,
    commit_message: str = "Upload SAISA model",
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    tags: str | list[str] | None = None,
    **save_arguments,
):
    """Uploads what `model.save_pretrained` writes and a model card, in one commit.

    A card that the repository has already is left as it is. Weights of an earlier upload that are not written over, shards
    for instance, are deleted: they could be loaded in place of these.

    Args:
        repo_id: `owner/name`, or `name` in one's own namespace. Made if it does not exist.
        tags: for the card, beside those of `model.add_model_tags`.
        save_arguments: for `save_pretrained`, `max_shard_size` for instance.

    Returns:
        `huggingface_hub.CommitInfo`.

    Raises:
        ValueError: `repo_id` is not a valid name.
        OSError: the hub cannot be reached, or does not accept the login; nothing is left on this machine.
    """
    validate_repo_id(repo_id)
    for name in ("use_temp_dir", "safe_serialization", "organization", "repo_url"):
        save_arguments.pop(name, None)
    tags = [*([tags] if isinstance(tags, str) else tags or []), *(getattr(model, "model_tags", None) or [])]
    api = HfApi(token=token)
    with _explained(repo_id):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **save_arguments)
        with _explained(repo_id):
            has_card = api.file_exists(repo_id, "README.md", revision=revision)
        if not has_card:
            write_model_card(folder, model, repo_id=repo_id, tags=tags)
        with _explained(repo_id):
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                commit_description=commit_description,
                delete_patterns=None if save_arguments.get("variant") else WEIGHT_FILES,
                revision=revision,
                create_pr=create_pr,
            )


@contextlib.contextmanager
def _explained(repo_id: str) -> Iterator[None]:
    """Inside, what the hub refuses, or cannot be asked, becomes an error that says what to do."""
    try:
        yield
    except Exception as error:  # what the HTTP library of the installed huggingface_hub raises
        raise OSError(
            f"push_to_hub: nothing was uploaded to {repo_id}: {first_line(error)} Log in with `hf auth login`, or set "
            f"HF_TOKEN. Without a network, save_pretrained(FOLDER) now and `hf upload {repo_id} FOLDER` later."
        ) from error
