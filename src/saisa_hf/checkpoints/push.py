# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""`model.push_to_hub`: weights, config, code files and a model card, in one commit."""

import tempfile

from huggingface_hub import HfApi

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
    """
    for name in ("use_temp_dir", "safe_serialization", "organization", "repo_url"):
        save_arguments.pop(name, None)
    tags = [*([tags] if isinstance(tags, str) else tags or []), *(getattr(model, "model_tags", None) or [])]
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not revision.startswith("refs/pr"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, **save_arguments)
        if not api.file_exists(repo_id, "README.md", revision=revision):
            write_model_card(folder, model, repo_id=repo_id, tags=tags)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            delete_patterns=None if save_arguments.get("variant") else WEIGHT_FILES,
            revision=revision,
            create_pr=create_pr,
        )
