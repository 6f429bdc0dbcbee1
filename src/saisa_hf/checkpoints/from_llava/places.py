# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""Where a run that fits projectors reads and writes: images, work folder, destination."""

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from ...common.destination import Destination, size_in_bytes
from ..model_card import write_model_card
from .reading import picture_files
from .work_folder import Workbench, write_json


class Places:
    """What a run reads, and where it works and writes, looked at before anything is loaded.

    Args:
        source: folder or hub id of the checkpoint that is read.
        images, destination, work_folder, max_shard_size, overwrite, push_to_hub, private, log: see `from_llava`.

    Attributes:
        files: the images.
        work: the work folder.

    Raises:
        ValueError, OSError: one of them is not as expected, or the destination contains what is read.
    """

    def __init__(
        self,
        source: str | os.PathLike,
        images: str | os.PathLike | Sequence,
        destination: str | os.PathLike,
        *,
        work_folder: str | os.PathLike | None,
        max_shard_size: int | str,
        overwrite: bool,
        push_to_hub: str | None,
        private: bool | None,
        log: Callable[[str], None],
    ):
        self.source, self.log, self._is_kept = source, log, bool(work_folder)
        self._max_shard_size = size_in_bytes(max_shard_size)
        self._place = Destination(destination, overwrite, push_to_hub, private, log)
        for part in (source, images, work_folder):
            if isinstance(part, (str, os.PathLike)) and (part is work_folder or Path(part).expanduser().is_dir()):
                self._place.check_outside(Path(part).expanduser())
        self.files = picture_files(images) if isinstance(images, (str, os.PathLike)) else list(images)
        path = self._place.path
        self.work = Path(work_folder).expanduser() if work_folder else path.parent / f".{path.name}.work"

    def write(self, bench: Workbench, report: dict, name: str, text: str) -> None:
        """Writes model, processor, card and the report, as the file `name`; logs `text`; uploads if that was asked for."""
        with self._place.new_folder() as partial:
            bench.model.save_pretrained(partial, max_shard_size=self._max_shard_size)
            bench.processor.save_pretrained(partial)
            base_model = None if Path(self.source).expanduser().is_dir() else str(self.source)
            write_model_card(partial, bench.model.config, repo_id=self._place.repo_id, base_model=base_model)
            write_json(partial / name, report)
        if not self._is_kept:
            shutil.rmtree(self.work, ignore_errors=True)
        self.log(text)
        self._place.publish()
