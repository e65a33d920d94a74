"""Files that somebody made to hurt, and what loading them may cost."""

from __future__ import annotations

import copy
import gc
import json
import struct
import time
import tracemalloc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

import mistral_ref
from mistral_ref.errors import MistralRefError, MistralRefWarning

MAX_SECONDS = 1.0
MAX_BYTES = 16 * 2**20  # beyond the size of the files

Files = dict[str, bytes]


def header_of(content: bytes) -> tuple[Any, bytes]:
    start = 8 + struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8:start]), content[start:]


def tensor_file(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def attempt(directory: Path) -> str:
    """Load a directory and run three tokens; return the message of the error, or "" if there was none.

    Fails unless the error is one of ours, every message is one line, and time and memory keep to their bounds.
    """
    size = sum(file.stat().st_size for file in directory.iterdir() if file.is_file())
    messages = [""]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", MistralRefWarning)
        gc.disable()  # to collect what hypothesis has piled up is not the library's time
        tracemalloc.start()
        before = time.thread_time()  # of this thread alone, however busy the machine is
        try:
            mistral_ref.load(directory, backend="numpy").forward([0, 1, 2])
        except MistralRefError as error:
            messages[0] = str(error)
        finally:
            seconds = time.thread_time() - before
            _, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            gc.enable()
    messages += [str(warning.message) for warning in caught if warning.category is MistralRefWarning]
    assert all(message.isprintable() and len(message) < 3000 for message in messages), messages
    assert seconds < MAX_SECONDS
    assert peak < size + MAX_BYTES
    return messages[0]


def fill(directory: Path, files: Files) -> None:
    for name, content in files.items():
        (directory / name).write_bytes(content)


# --------------------------------------------------------------------------------------------- what hypothesis changes

INTEGERS = st.sampled_from([0, -1, 1, 2**31, 2**53, 2**63, 2**64 - 1, 2**64, 10**400]) | st.integers(-(2**70), 2**70)
TEXTS = st.text(max_size=9) | st.sampled_from(
    ["\0", "a\nb", "\x1b[2J", "\ud800", "\u2028", "x" * 5000, "../a.safetensors", "I64", "F8_E4M3", "yarn", "mixtral"]
)
VALUES = st.recursive(
    st.none() | st.booleans() | INTEGERS | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=40) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)


def places(document: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place in a JSON document as a list or object and the index or key in it."""
    keys = document if isinstance(document, dict) else range(len(document)) if isinstance(document, list) else ()
    for key in keys:
        yield document, key
        yield from places(document[key])


@st.composite
def other_json(draw: st.DrawFn, document: Any) -> Any:
    """Draw a document that differs in one to three places."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        if not (found := list(places(document))):
            break
        container, key = draw(st.sampled_from(found))
        value = container[key]
        change = draw(st.sampled_from(["replace", "nudge", "delete", "rename", "copy"]))
        if change == "nudge" and type(value) is int:
            container[key] = value + draw(st.integers(-9, 9))
        elif change == "copy":
            other, at = draw(st.sampled_from(found))
            container[key] = copy.deepcopy(other[at])
        elif change == "delete":
            del container[key]
        elif change == "rename" and isinstance(container, dict):
            name = draw(st.sampled_from(list(container)) | TEXTS)
            container[name] = container.pop(key)
        else:
            container[key] = draw(VALUES)
    return document


@st.composite
def other_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a content that is cut off, overwritten here and there, or another altogether; mostly in its first part."""
    first = min(len(content), 8 + 3000)
    at = st.integers(0, first - 1) | st.integers(0, len(content) - 1)
    change = draw(st.sampled_from(["cut", "overwrite", "insert", "length", "random"]))
    if change == "cut":
        return content[: draw(at)]
    if change == "random":
        return draw(st.binary(max_size=200))
    if change == "length":
        return struct.pack("<Q", draw(st.integers(0, 2**64 - 1) | st.integers(0, first))) + content[8:]
    changed = bytearray(content)
    for position in draw(st.lists(at, min_size=1, max_size=4)):
        stop = position + (change == "overwrite")
        changed[position:stop] = draw(st.binary(min_size=1, max_size=3))
    return bytes(changed)
