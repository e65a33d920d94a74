"""The hub's cache, as its own programs leave it: each file of a snapshot is a link to a file in blobs/."""

from __future__ import annotations

import os
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def into_cache(cache: Path, name: str, files: Path, commit: str = COMMIT, branch: str | None = "main") -> Path:
    """Move the files of a directory into the cache as a model of this name; return the snapshot with links to them."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    blobs.mkdir(parents=True, exist_ok=True)
    for file in sorted(path for path in files.rglob("*") if path.is_file()):
        link, blob = snapshot / file.relative_to(files), blobs / f"{len(os.listdir(blobs)):040x}"
        link.parent.mkdir(parents=True, exist_ok=True)
        file.rename(blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    if branch is not None:
        (repository / "refs" / branch).parent.mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
    return snapshot
