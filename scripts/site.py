# Copyright 2026 The saisa_hf authors. Licensed under the Apache License, Version 2.0.
"""MkDocs' hooks for the site (`make docs`): pages that are written for readers of the repository, as pages of a site.

README.md, CONTRIBUTING.md and CHANGELOG.md become pages, and links to files outside docs/ lead into the repository.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.structure.files import File


ROOT = Path(__file__).resolve().parents[1]
PAGES = {"index.md": "README.md", "contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
LINK = re.compile(r"(?<=\]\()(?!https?:|mailto:|#)([^)\s#]+)(?=[)#\s])")


def on_files(files, config):
    """Adds the pages that lie beside docs/."""
    for page, source in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, config, files):
    """Makes every relative link one that works on the site; a file that is not there is an error."""
    source = PAGES.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    pages = {file: page for page, file in PAGES.items()}

    def on_site(link: re.Match) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[0]))
        if target in pages:
            inside = pages[target]
        elif target.startswith("docs/") and (ROOT / target).is_file():
            inside = target.removeprefix("docs/")
        elif (ROOT / target).exists():
            return f"{config.repo_url}/{'tree' if (ROOT / target).is_dir() else 'blob'}/main/{target}"
        else:
            return link[0]  # MkDocs says that it leads nowhere
        return posixpath.relpath(inside, posixpath.dirname(page.file.src_uri) or ".")

    return LINK.sub(on_site, markdown)
