"""Download a model from the Hugging Face Hub: one layout or one GGUF file, and the small files that go with it.

A repository often holds the same weights several times. It is listed first, and what is needed of it is chosen; pickles
never are. The package huggingface_hub does the transfer, into the hub's cache (hub.py) or into a directory.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mistral_ref.errors import CheckpointError, InputError, Progress, printable, short_repr, size
from mistral_ref.files import hub
from mistral_ref.files.paths import begins_gguf_model, local_path
from mistral_ref.files.quantized_copy import is_text_file
from mistral_ref.files.tensor_file import require_space

Layout = Literal["mistral", "hf", "gguf"]
LAYOUTS: tuple[Layout, ...] = ("mistral", "hf", "gguf")

_WEIGHTS: dict[Layout, re.Pattern[str]] = {
    "mistral": re.compile(r"consolidated([.-].+)?\.safetensors(\.index\.json)?"),
    "hf": re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json"),
}
_CONFIGS: dict[Layout, str] = {"mistral": "params.json", "hf": "config.json"}


class RemoteFile(NamedTuple):
    """The number of bytes of a file on the hub, and its hash, which also names it in the cache."""

    n_bytes: int
    hash: str


@dataclass(frozen=True)
class Download:
    """What is to be downloaded.

    repository  "org/name"
    revision    the branch, tag or commit that was asked for, and `commit`, what it is now
    files       the files, by name
    missing     the names of those that are not there yet; half a file is not there
    target      the directory that they go to; None: the hub's cache
    source      what `load` takes afterwards: a directory, a GGUF file, or a name
    """

    repository: str
    revision: str
    commit: str
    files: Mapping[str, RemoteFile]
    missing: tuple[str, ...]
    target: Path | None
    source: str

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.n_bytes for file in self.files.values())

    @property
    def n_missing(self) -> int:
        """Bytes of the files that are missing."""
        return sum(self.files[name].n_bytes for name in self.missing)

    def run(self, progress: Progress | None = None) -> None:
        """Download what is missing. `progress` is called with (bytes done, bytes of all files).

        What was interrupted goes on where it stopped. Raises InputError if the disk has too little room or the hub
        refuses, and CheckpointError if a file is not as the hub lists it.
        """
        left = self.n_missing
        require_space((self.target or hub.cache_folder()) / "model", left)
        for name in self.missing:
            with _told(self.repository, self.revision) as library:
                self._fetch(library, name, _counter(self.n_bytes - left, self.n_bytes, progress))
            left -= self.files[name].n_bytes

    def _fetch(self, library: Any, name: str, counter: Callable[..., Any]) -> None:
        """Download a file: by the parts of huggingface_hub, which itself begins again after an interruption."""
        from huggingface_hub.file_download import http_get  # noqa: PLC0415

        file = self.files[name]
        blobs = hub.snapshot_folder(self.repository, self.commit).parents[1] / "blobs"
        place = blobs / file.hash if self.target is None else self.target / name
        if self.target is not None or not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            begun = place.with_name(f"{place.name}.{file.hash[:8]}.incomplete")
            url = library.hf_hub_url(self.repository, name, revision=self.commit, endpoint=_endpoint())
            options = {"headers": library.utils.build_hf_headers(), "expected_size": file.n_bytes}
            with begun.open("ab") as opened:
                http_get(url, opened, resume_size=opened.tell(), tqdm_class=counter, **options)
            if (found := hash_of(begun, file.hash)) != file.hash:
                begun.unlink()
                raise CheckpointError(f"{begun}: came with the hash {found}; expected {file.hash}, as the hub lists it")
            begun.replace(place)
        if self.target is None:  # now it makes the link to the blob, and notes the commit of the branch
            link = library.hf_hub_download(
                self.repository, name, revision=self.revision, cache_dir=hub.cache_folder(), endpoint=_endpoint()
            )
            if self.commit not in Path(link).parts:
                raise CheckpointError(f"{self.repository}: {short_repr(self.revision)} has changed; download it again")


def hash_of(path: Path, like: str) -> str:
    """Return the hash of a file in the form of another one: of SHA-256, or Git's, which are shorter.

    >>> hash_of(Path(os.devnull), "0" * 40)  # that of nothing
    'e69de29bb2d1d6434b8b29ae775ad8c2e48c5391'
    """
    with path.open("rb") as file:
        if len(like) == 64:
            return hashlib.file_digest(file, "sha256").hexdigest()
        content = file.read()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def plan(
    name: str,
    *,
    layout: Layout | None = None,
    file: str | None = None,
    revision: str | None = None,
    to: str | os.PathLike[str] | None = None,
) -> Download:
    """Return what is to be downloaded of a repository; only its list of files is read.

    name        "org/name", "org/name@REVISION" or "org/name/FILE.gguf", as `load` takes it
    layout      "mistral", "hf" or "gguf"; None: "gguf" if a file is named, or else the first of them that is there
    file        which GGUF file: its name, a part of its name, or a pattern such as "*Q4_K_M*"
    revision    a branch, a tag or a commit; None: as in `name`, or main
    to          the directory that the files go to; None: the hub's cache

    Raises InputError if there is no such model, or if `file` does not name one of its GGUF files.
    """
    asked = hub.parsed(name)
    if asked is None:
        raise InputError(f"{short_repr(name)} is no name of a model; expected ORG/NAME, as on its page")
    if asked.revision and revision and asked.revision != revision:
        raise InputError(f"revision is {short_repr(revision)}, and the name says {short_repr(asked.revision)}")
    if asked.file and file and asked.file != file:
        raise InputError(f"file is {short_repr(file)}, and the name says {short_repr(asked.file)}")
    revision, file = revision or asked.revision, file or asked.file
    if file is not None and layout not in (None, "gguf"):
        raise InputError(f"file is {short_repr(file)}, and layout is {layout}; only gguf has files to choose from")
    with _told(asked.repository, revision or "main") as library:
        info = library.HfApi(endpoint=_endpoint()).model_info(asked.repository, revision=revision, files_metadata=True)
    files = {
        one.rfilename: RemoteFile(one.size or 0, one.lfs.sha256 if one.lfs else one.blob_id or "")
        for one in info.siblings or []
    }
    names = chosen({one: file.n_bytes for one, file in files.items()}, asked.repository, layout=layout, file=file)
    target = None if to is None else local_path(to)
    first = names[0] if begins_gguf_model(names[0]) else ""
    if target is not None:
        source = str(target / first)
    else:
        source = asked.repository + (f"@{revision}" if revision else "") + (f"/{first}" if first else "")
    folder = target or hub.snapshot_folder(asked.repository, info.sha)
    missing = tuple(one for one in names if not _is_there(folder / one, files[one], is_named_by_hash=target is None))
    wanted = {one: files[one] for one in names}
    return Download(asked.repository, revision or "main", info.sha, wanted, missing, target, source)


def _is_there(path: Path, file: RemoteFile, *, is_named_by_hash: bool) -> bool:
    if not os.path.isfile(path) or os.stat(path).st_size != file.n_bytes:
        return False
    return is_named_by_hash or hash_of(path, file.hash) == file.hash


def chosen(
    sizes: Mapping[str, int], repository: str, *, layout: Layout | None = None, file: str | None = None
) -> list[str]:
    """Return the names of the files to download; the first one is the GGUF file, if it is one.

    With either layout both configurations are taken: each may say what the other does not.

    sizes           the name and the bytes of every file of the repository
    layout, file    as in `plan`

    >>> names = "params.json", "consolidated.safetensors", "config.json", "model.safetensors", "model.bin"
    >>> files = dict.fromkeys(names, 1)
    >>> chosen(files, "org/name"), chosen(files, "org/name", layout="hf")
    (['consolidated.safetensors', 'config.json', 'params.json'], ['model.safetensors', 'config.json', 'params.json'])
    """
    sizes = {name: n for name, n in sizes.items() if ".." not in name.split("/")}  # nothing outside the directory
    there = [one for one in LAYOUTS if _weights_of(one, sizes)]
    if layout is None:
        layout = "gguf" if file is not None else next(iter(there), None)
    if layout not in there:
        found = "no weights" if layout is None else f"no weights of layout {layout}"
        expected = " or ".join(there) or "params.json or config.json, with safetensors, or GGUF files"
        raise InputError(f"{repository}: holds {found} that can be read; expected {expected}")
    weights = _weights_of(layout, sizes)
    if layout == "gguf":
        return _with_shards(_one_gguf(weights, sizes, repository, file), sizes)
    return [*weights, *(name for name in sorted(sizes) if is_text_file(name) and "/" not in name)]


def _weights_of(layout: Layout, names: Mapping[str, int]) -> list[str]:
    """Return the files of weights of a layout, of GGUF those that begin a model; [] without its configuration."""
    if layout == "gguf":
        return sorted(name for name in names if begins_gguf_model(os.path.basename(name)))
    found = sorted(name for name in names if _WEIGHTS[layout].fullmatch(name))
    return found if _CONFIGS[layout] in names else []


def _one_gguf(found: list[str], sizes: Mapping[str, int], repository: str, file: str | None) -> str:
    """Return the GGUF file that a text names: by its name, or as a pattern or a part of the name."""
    fitting = [name for name in found if file in (None, name, os.path.basename(name))]
    if not fitting:
        pattern = f"*{file}*".lower()
        fitting = [name for name in found if fnmatch.fnmatchcase(name.lower(), pattern)]
    if len(fitting) == 1:
        return fitting[0]
    problem = "holds several GGUF files"
    if file is not None:
        problem = f"{short_repr(file)} fits {'several' if fitting else 'none'} of its GGUF files"
    choices = [f"{name} ({size(sum(sizes[one] for one in _with_shards(name, sizes)))})" for name in fitting or found]
    raise InputError(f"{repository}: {problem}; --file names one of {', '.join(choices)}")


def _with_shards(first: str, names: Mapping[str, int]) -> list[str]:
    stem, _, rest = first.partition("-00001-of-")
    return sorted(name for name in names if name.startswith(f"{stem}-") and name.endswith(f"-of-{rest}")) or [first]


def _counter(before: int, total: int, progress: Progress | None) -> Callable[..., Any]:
    """Return what huggingface_hub takes for a class of progress bars: it reports the bytes done, of all files."""

    class Counter:
        def __init__(self, *, initial: int = 0, **_: object) -> None:
            self.done = before + initial
            self.update(0)

        def update(self, n: float | None = 1) -> None:
            self.done += int(n or 0)
            if progress is not None:
                progress(min(self.done, total), total)

        def __enter__(self) -> Counter:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __getattr__(self, name: str) -> Callable[..., None]:
            return lambda *_, **__: None  # what else a bar can do, for example show a rate

    return Counter


@contextmanager
def _told(repository: str, revision: str) -> Iterator[Any]:
    """Return the context in which huggingface_hub is used: what goes wrong there becomes one line of ours."""
    library, errors = _library()
    site = _endpoint() or library.constants.ENDPOINT
    try:
        yield library
    except errors.GatedRepoError:
        problem = f"its licence has to be accepted first, on {site}/{repository}; then `hf auth login` logs in"
    except errors.RevisionNotFoundError:
        problem = f"has no revision {short_repr(revision)}; {site}/{repository}/tree/main lists them"
    except errors.RepositoryNotFoundError:
        problem = f"no such model on {site}, or a private one, for which `hf auth login` logs in"
    except errors.OfflineModeIsEnabled:
        problem = "HF_HUB_OFFLINE is set, so nothing is downloaded; expected HF_HUB_OFFLINE=0"
    except errors.HfHubHTTPError as error:
        problem = f"{site} answers: {_first_line(error)}"
    except (errors.HTTPError, OSError, RuntimeError) as error:
        problem = f"{site} cannot be reached, or broke off: {_first_line(error)}; the same command goes on from here"
        if isinstance(error, OSError) and error.filename is not None:
            problem = f"{error.filename}: cannot be written: {error.strerror}"
    else:
        return
    raise InputError(f"{repository}: {problem}")


def _first_line(error: Exception) -> str:
    return printable(str(error).strip().partition("\n")[0]) or type(error).__name__


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _library() -> tuple[Any, Any]:
    """Return huggingface_hub and its errors. It is an extra, and slow to import."""
    try:
        import huggingface_hub  # noqa: PLC0415
        from huggingface_hub import constants, errors  # noqa: F401, PLC0415
    except ImportError:
        huggingface_hub = errors = None
    if huggingface_hub is None or tuple(map(int, huggingface_hub.__version__.split(".")[:2])) < (1, 20):
        raise InputError(
            "downloads need the package huggingface_hub, from 1.20 on: `pip install -U huggingface_hub` installs it"
        )
    return huggingface_hub, errors
