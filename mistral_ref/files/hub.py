"""Find models by name in the cache of the Hugging Face Hub, as its own programs leave it. Nothing is downloaded.

The folder models--ORG--NAME in the cache holds:

    refs/BRANCH             a file with the commit of this branch
    snapshots/COMMIT/FILE   a link to a file in blobs/, or the file itself
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mistral_ref.errors import MistralRefError, short_repr

_PART = r"\w[\w.-]*"
# org/name, org/name@REVISION, org/name/FILE.gguf or org/name@REVISION/FILE.gguf; only refs/pr/1 and its like and a
# revision without a file may hold a slash.
_NAME = re.compile(
    rf"(?P<repository>{_PART}/{_PART})"
    rf"(?:@(?P<revision>refs/\w+/{_PART}|{_PART}|{_PART}(?:/{_PART})+?))?"
    rf"(?:/(?P<file>(?:{_PART}/)*{_PART}\.gguf))?",
    re.ASCII,
)
# What may be read of a model: other links, such as those of pictures, may be broken.
_READ = re.compile(r".+\.(safetensors|gguf|json|jinja|model(\..+)?)")
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})(\.\w+)")


def cache_folder() -> Path:
    """Return the folder of the hub's cache: of HF_HUB_CACHE, else in HF_HOME, else in the user's cache folder."""
    user = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    home = os.environ.get("HF_HOME") or os.path.join(user, "huggingface")
    folder = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expanduser(os.path.expandvars(folder)))


class Name(NamedTuple):
    """The parts of a model's name. Without a revision it means the branch main."""

    repository: str
    revision: str | None
    file: str | None


def parsed(name: str) -> Name | None:
    """Return the parts of a name, "org/name", "org/name@REVISION" or "org/name/FILE.gguf"; None for any other text.

    >>> parsed("org/name@v1/a.gguf"), parsed("a/b/c")
    (Name(repository='org/name', revision='v1', file='a.gguf'), None)
    """
    found = _NAME.fullmatch(name)
    if found is None or ".." in name or "--" in found["repository"]:
        return None
    return Name(**found.groupdict())


def snapshot_folder(repository: str, commit: str) -> Path:
    """Return the folder in the cache for the files of a commit."""
    return _folder(repository) / "snapshots" / commit


def _folder(repository: str) -> Path:
    return cache_folder() / f"models--{repository.replace('/', '--')}"


def find(name: str, error: type[MistralRefError], *, whole: bool = True) -> Path | None:
    """Return the snapshot of a model, or the GGUF file in it; None if `name` is none of the hub's names.

    Names are "org/name", "org/name@REVISION" and "org/name/FILE.gguf". A revision is a branch, a tag, a commit, or the
    beginning of one; without it the branch main is taken. Raises `error` if the cache does not hold the model, or, with
    `whole`, if a file of it is missing.
    """
    asked = parsed(name)
    if asked is None:
        return None
    fetch = f"`mistral-ref download {name}`"
    repository = _folder(asked.repository)
    if not os.path.isdir(repository):
        raise error(
            f"{name}: no such directory or file, and no model of this name in the hub's cache, {repository.parent}; "
            f"{fetch} fetches it"
        )
    snapshot = _snapshot(repository, asked.revision or "main")
    if snapshot is None:
        names = [path.name for path in _snapshots(repository)]
        raise error(
            f"{name}: the hub's cache, {repository.parent}, does not have {short_repr(asked.revision or 'main')} of "
            f"this model; {fetch} fetches it"
            + (f"; to take what is there, write {asked.repository}@{names[-1]}" if names else "")
        )
    for path, problem in lacking(snapshot, asked.file) if whole else ():
        raise error(f"{path}: {problem}; {fetch} fetches it")
    return snapshot / asked.file if asked.file else snapshot


def models() -> Iterator[tuple[str, Path]]:
    """Yield the name and the snapshot of each model in the hub's cache.

    It is the snapshot of the branch main; of a model without this branch each snapshot, by its commit.
    """
    for repository in sorted(cache_folder().glob("models--*--*")):
        name = repository.name.removeprefix("models--").replace("--", "/", 1)
        if main := _snapshot(repository, "main"):
            yield name, main
        else:
            yield from ((f"{name}@{snapshot.name}", snapshot) for snapshot in _snapshots(repository))


def usual_snapshot(repository: Path) -> Path:
    """Return the snapshot in a repository's folder of the cache: the one of its branch main, or else the newest."""
    return _snapshot(repository, "main") or [repository / "snapshots" / "COMMIT", *_snapshots(repository)][-1]


def _snapshots(repository: Path) -> list[Path]:
    """Return the snapshots of a repository, the newest last."""
    found = [path for path in (repository / "snapshots").glob("*") if os.path.isdir(path)]
    return sorted(found, key=lambda path: path.stat().st_mtime)


def _snapshot(repository: Path, revision: str) -> Path | None:
    """Return the snapshot of a branch, a tag, a commit or the beginning of a commit; None if there is none."""
    try:
        commit = (repository / "refs" / revision).read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        commit = ""
    snapshots = _snapshots(repository)
    if exact := [path for path in snapshots if path.name in (commit, revision)]:
        return exact[0]
    begun = [path for path in snapshots if path.name.startswith(revision)] if len(revision) >= 7 else []
    return begun[0] if len(begun) == 1 else None


def lacking(directory: Path, file: str | None = None) -> Iterator[tuple[Path, str]]:
    """Yield what a snapshot or another directory lacks, as a path and what is wrong there.

    That is `file`, or without it any file that may be read, whose link leads nowhere; and weights that are not there if
    a download of them has begun. What is being downloaded is in blobs/HASH.incomplete, and has no link yet.
    """
    read = [directory / file] if file else [path for path in sorted(directory.iterdir()) if _READ.fullmatch(path.name)]
    for path in read:
        if not os.path.exists(path):
            is_link = path.is_symlink()
            yield path, f"a link to {os.readlink(path)}, which is not there" if is_link else "not in the hub's cache"
    begun = Path(os.path.abspath(directory / "../../blobs")).glob("*.incomplete")
    if not file and any(begun) and _lacks_weights([path.name for path in read]):
        yield directory, "the download of its weights has not ended"


def _lacks_weights(names: list[str]) -> bool:
    """Return whether there is no file of weights among these names, or one of several shards is missing."""
    weights = {name for name in names if name.endswith((".safetensors", ".gguf"))}
    shards = [shard for name in weights if (shard := _SHARD.fullmatch(name))]
    others = (f"{one[1]}-{number:05}-of-{one[2]}{one[3]}" for one in shards for number in range(1, int(one[2]) + 1))
    return not weights or not weights.issuperset(others)
