# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""What travels with a checkpoint beside its weights: the code that runs it, and the names under which it is found."""

import os
import shutil
import tempfile
from pathlib import Path


# The same in every checkpoint, whichever release saved it: 5.x has no AutoModelForVision2Seq, but 4.57 looks for it, and
# `transformers serve` loads by AutoModelForMultimodalLM, which 4.57 does not have.
AUTO_MAP = {
    "AutoConfig": "configuration_saisa.SaisaConfig",
    "AutoModel": "modeling_saisa.SaisaModel",
    "AutoModelForImageTextToText": "modeling_saisa.SaisaForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_saisa.SaisaForConditionalGeneration",
    "AutoModelForVision2Seq": "modeling_saisa.SaisaForConditionalGeneration",
    "AutoProcessor": "processing_saisa.SaisaProcessor",
}
PROCESSOR_AUTO_MAP = {"AutoProcessor": AUTO_MAP["AutoProcessor"]}

WEIGHT_FILES = ["model.safetensors", "model-*.safetensors", "model.safetensors.index.json"]


def code_files() -> list[Path]:
    """The modules that a checkpoint carries: this file and its siblings whose names end in `_saisa.py`."""
    return sorted(Path(__file__).parent.glob("*_saisa.py"))


def write_code_files(save_directory) -> None:
    """Copies `code_files()` into the folder `save_directory`, which is made if need be.

    Each file is written under a temporary name and renamed, so that a reader never meets half a module.
    """
    target = Path(save_directory)
    target.mkdir(parents=True, exist_ok=True)
    for source in code_files():
        destination = target / source.name
        if destination.exists() and destination.samefile(source):
            continue
        handle, temporary = tempfile.mkstemp(dir=target, prefix=f".{source.name}.")
        os.close(handle)
        try:
            shutil.copyfile(source, temporary)
            os.chmod(temporary, 0o644)
            os.replace(temporary, destination)
        except BaseException:
            os.unlink(temporary)
            raise


def push_model_to_hub(
    model,
    write_card,
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
        write_card: function of (folder, model, repo_id=..., tags=...) that writes the card.
        repo_id: `owner/name`, or `name` in one's own namespace. Made if it does not exist.
        tags: for the card, beside those of `model.add_model_tags`.
        save_arguments: for `save_pretrained`, `max_shard_size` for instance.

    Returns:
        `huggingface_hub.CommitInfo`.
    """
    from huggingface_hub import HfApi

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
            write_card(folder, model, repo_id=repo_id, tags=tags)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=commit_message,
            commit_description=commit_description,
            delete_patterns=None if save_arguments.get("variant") else WEIGHT_FILES,
            revision=revision,
            create_pr=create_pr,
        )
