"""GGUF files that somebody made to hurt: they load, or are refused in one line, in bounded time and memory."""

from __future__ import annotations

import dataclasses
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import FAMILIES, draw_weights
from support.gguf_files import byte_bpe_fields, family_tensors, sentencepiece_fields, tekken_fields
from support.hostile import MAX_BYTES, MAX_SECONDS, TEXTS, attempt, fill, other_bytes
from support.marks import slow_but
from support.tiny_tekken import tiny_tekken
from support.tiny_tokenizers import tiny_tokenizer

import mistral_ref
from mistral_ref.errors import MistralRefError
from mistral_ref.files.gguf_writer import TYPE_IDS, Stored, Typed, config_fields, gguf_bytes
from mistral_ref.text.byte_bpe import LETTERS
from mistral_ref.text.tekken import tekken_tokenizer

Parts = tuple[dict[str, Any], dict[str, Stored]]
KINDS = ("sentencepiece", "tekken", "merges", "no tokenizer")


@cache
def valid(kind: str) -> Parts:
    """Return the fields and the tensors of a file that loads."""
    family = FAMILIES["mixtral_windowed" if kind == "tekken" else "ministral3"]
    letters = {letter: n for n, letter in enumerate(LETTERS)} | {"ab": 256, "abc": 257}
    merges = {"model": {"vocab": letters, "merges": ["a b", "ab c"]}, "added_tokens": []}
    tokenizer: dict[str, Any] = {
        "sentencepiece": lambda: sentencepiece_fields(tiny_tokenizer()),
        "tekken": lambda: tekken_fields(tekken_tokenizer(tiny_tekken("v13"), "tekken.json")),
        "merges": lambda: byte_bpe_fields(merges, "gpt-2"),
        "no tokenizer": dict,
    }[kind]()
    vocab_size = max(16, len(tokenizer.get("tokenizer.ggml.tokens", [])))
    family = dataclasses.replace(family, config=family.config.replace(dim=8, hidden_dim=12, vocab_size=vocab_size))
    architecture = "mistral3" if family.model_type == "ministral3" else "llama"
    template = {"tokenizer.chat_template": "{{ messages[0]['content'] }}", "general.name": "tiny"}
    tensors = family_tensors(draw_weights(family), "F16")
    return config_fields(family.config, architecture) | tokenizer | template, tensors


SIZES = st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1]) | st.integers(0, 2**64 - 1)
COUNTS = st.sampled_from([0, 1, 2**31, 2**32 - 1]) | st.integers(0, 40)
VALUES = (
    COUNTS
    | st.booleans()
    | TEXTS.map(lambda text: text.encode(errors="surrogatepass"))
    | st.binary(max_size=9)
    | st.floats(width=32)
    | st.lists(st.binary(max_size=4), max_size=5)
    | st.builds(Typed, st.just("i32"), st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5))
    | st.builds(Typed, st.just("f32"), st.lists(st.floats(width=32), max_size=5))
    | st.builds(Typed, st.just("i64"), st.integers(-(2**63), 2**63 - 1))
)
NAMES = st.sampled_from(
    [
        *("split.count", "split.no", "split.tensors.count", "general.alignment", "general.type"),
        *("llama.expert_count", "mistral3.rope.scaling.attn_factor", "llama.attention.sliding_window", "llama.x"),
        *("tokenizer.ggml.eot_token_id", "tokenizer.chat_template.tool_use", "tokenizer.ggml.add_bos_token"),
    ]
)
TENSOR_NAMES = st.sampled_from(["output.weight", "rope_freqs.weight", "blk.0.attn_q.bias", "blk.1.ffn_up_exps.weight"])


class Hostile:  # hypothesis would print every field of a dataclass
    """A file, made of one that loads."""

    def __init__(self, kind: str, content: bytes, changed: dict[str, Any]) -> None:
        self.kind, self.content, self.changed = kind, content, changed

    def __repr__(self) -> str:
        """Show what is needed to see the fault, and not a whole file of weights."""
        shown = {name: repr(value)[:1500] for name, value in self.changed.items()}
        return f"{self.kind} with {shown}, {len(self.content)} bytes"


@st.composite
def hostile_files(draw: st.DrawFn) -> Hostile:
    """Draw a file in which one to three things are not what they were, or not true."""
    kind = draw(st.sampled_from(KINDS))
    fields, tensors = (dict(part) for part in valid(kind))
    changes = draw(st.lists(st.sampled_from(["field", "more", "less", "tensor", "bytes"]), min_size=1, max_size=3))
    for change in changes:
        if change in ("field", "more"):
            name = draw(st.sampled_from(sorted(fields)) if change == "field" else NAMES)
            fields[name] = draw(VALUES)
        elif change == "less":
            part = fields if draw(st.booleans()) else tensors
            del part[draw(st.sampled_from(sorted(part)))]
        elif change == "tensor":
            old, name = draw(st.sampled_from(sorted(tensors))), draw(TENSOR_NAMES)
            other = {
                "dtype": st.sampled_from(sorted(TYPE_IDS)) | st.integers(0, 2**32 - 1),
                "shape": st.lists(st.integers(0, 300) | SIZES, max_size=5).map(tuple),
                "begin": SIZES | st.integers(0, 9).map(lambda n: n * 32),
            }
            field = draw(st.sampled_from(sorted(other)))
            place = draw(st.sampled_from([old, name]))
            tensors[place] = tensors[old]._replace(**{field: draw(other[field])})
    content = gguf_bytes(fields, tensors, version=draw(st.sampled_from([2, 3])))
    if "bytes" in changes:
        content = draw(other_bytes(content))
    before, after = ({**part[0], **part[1]} for part in (valid(kind), (fields, tensors)))
    changed = {name: after.get(name) for name in {*before, *after} if before.get(name) is not after.get(name)}
    return Hostile(kind, content, changed)


def check(hostile: Hostile) -> None:
    with tempfile.TemporaryDirectory() as directory:
        fill(Path(directory), {"model.gguf": hostile.content})
        attempt(Path(directory))


@given(hostile_files())
@settings(max_examples=80)
def test_hostile_files(hostile: Hostile) -> None:
    check(hostile)


@pytest.mark.slow
@given(hostile_files())
@settings(max_examples=1_500)
def test_more_hostile_files(hostile: Hostile) -> None:
    check(hostile)


@pytest.mark.soak
@given(hostile_files())
@settings(max_examples=10_000)
def test_many_hostile_files(hostile: Hostile) -> None:
    check(hostile)


@pytest.mark.parametrize("kind", KINDS)
def test_the_files_are_valid_before_they_are_changed(kind: str, tmp_path: Path) -> None:
    fill(tmp_path, {"model.gguf": gguf_bytes(*valid(kind))})
    assert attempt(tmp_path) == ""


# ------------------------------------------------------------------------------- what costs the most, as far as we know


def with_fields(kind: str = "no tokenizer", **changes: Any) -> bytes:
    fields, tensors = valid(kind)
    return gguf_bytes(fields | {name.replace("__", "."): value for name, value in changes.items()}, tensors)


def many_tensors(n: int) -> bytes:
    fields, tensors = valid("no tokenizer")
    one = Stored("F32", (1, 1), b"", begin=0)
    more = {f"blk.{i}.attn_q.weight": one._replace(begin=32 * i) for i in range(n)}
    return gguf_bytes(fields, tensors | more) + bytes(32 * n)


COSTLY: dict[str, Callable[[], bytes]] = {
    "fields": lambda: with_fields(**{f"x{i}": True for i in range(900)}),
    "unknown fields of the architecture": lambda: with_fields(**{f"mistral3.x{i}": True for i in range(900)}),
    "tensors": lambda: many_tensors(7_900),
    "experts": lambda: gguf_bytes(
        valid("no tokenizer")[0], {"blk.0.ffn_up_exps.weight": Stored("F32", (2**20, 1, 1), bytes(2**22))}
    ),
    "a long text": lambda: with_fields(general__name="a" * (4 * 2**20 - 2**12)),
    "a long text of wide letters": lambda: with_fields(general__name="a" * (3 * 2**20) + "\U0001f642"),
    "broken text": lambda: with_fields(general__name=b"\xff" * (2 * 2**20)),
    "a long name of an architecture": lambda: with_fields(general__architecture="a" * (4 * 2**20 - 2**12)),
    "texts": lambda: with_fields(x=[""] * 790_000),
    "layers": lambda: with_fields(mistral3__block_count=1024),
    "a number for each of many layers": lambda: with_fields(mistral3__feed_forward_length=Typed("u32", [12] * 10**6)),
    "different numbers for layers": lambda: with_fields(mistral3__block_count=Typed("u32", list(range(10**5)))),
}


@pytest.mark.filterwarnings("ignore::mistral_ref.MistralRefWarning")
@pytest.mark.parametrize("make", slow_but(set(COSTLY) - {"texts"}, COSTLY))
def test_costly_files(make: Callable[[], bytes], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(make())
    started = time.thread_time()
    message = load(path)
    seconds = time.thread_time() - started  # the tracing of memory would take most of it
    tracemalloc.start()
    load(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message.isprintable()
    assert len(message) < 3000
    assert seconds < MAX_SECONDS
    assert peak < path.stat().st_size + MAX_BYTES


def load(path: Path) -> str:
    """Load a file; return the message of the error, or "" if there was none."""
    try:
        mistral_ref.load(path, backend="numpy")
    except MistralRefError as error:
        return str(error)
    return ""
