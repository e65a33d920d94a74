"""Directories that somebody made to hurt: they load, or are refused in one line, in bounded time and memory."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import FAMILIES, write_consolidated, write_hf
from support.errors import assert_says, unsaid
from support.hostile import (
    MAX_BYTES,
    MAX_SECONDS,
    Files,
    attempt,
    fill,
    header_of,
    other_bytes,
    other_json,
    tensor_file,
)
from support.paths import GOLDEN
from support.tiny_tekken import tiny_tekken
from support.tiny_tokenizers import more_pieces, tiny_tokenizer

from mistral_ref.files.json_file import MAX_JSON_BYTES

LAYOUTS = ("consolidated", "hf", "shards", "tekken", "tokenizer.json")
# What a tokenizer may cost at the most: published ones have up to 256,000 pieces.
MAX_TOKENIZER_BYTES, MAX_TOKENIZER_SECONDS = 96 * 2**20, 3.0


@cache
def valid(layout: str) -> Files:
    """Return the files of a directory that loads, by name."""

    def family(name: str) -> Any:
        small = FAMILIES[name]
        return dataclasses.replace(small, config=small.config.replace(dim=8, hidden_dim=12, vocab_size=vocab_size))

    n_ids = {"tekken": 520, "tokenizer.json": 362}
    vocab_size = n_ids.get(layout, 384)

    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        if layout in ("consolidated", "tekken"):
            write_consolidated(directory, family("interleaved_windows"), fp8=True)
        elif layout in ("hf", "tokenizer.json"):
            write_hf(directory, family("mixtral_windowed"), fused_experts=True)
        else:
            write_hf(directory, family("ministral3"), shards=3, fp8="block", wrapper="v5")
        if layout == "tekken":
            (directory / "tekken.json").write_text(json.dumps(tiny_tekken("v15")))
        elif layout == "tokenizer.json":
            goldens = json.loads((GOLDEN / "tokenizer_json.json").read_text())
            (directory / "tokenizer.json").write_text(json.dumps(goldens[-1]["tokenizer"]))
        else:
            (directory / "tokenizer.model").write_bytes(tiny_tokenizer())
        (directory / "generation_config.json").write_text('{"eos_token_id": 2}')
        listed = {"2": {"content": "</s>", "special": True}, "383": {"content": "<tool>", "special": False}}
        config = {
            "added_tokens_decoder": {} if layout in ("tekken", "tokenizer.json") else listed,
            "legacy": False,
            "eos_token": "</s>",
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(config))
        return {file.name: file.read_bytes() for file in directory.iterdir()}


@dataclasses.dataclass
class Hostile:
    """A valid directory, and the files that are put in the place of its own."""

    layout: str
    changed: Files

    def __repr__(self) -> str:
        """Show what is needed to see the fault, and not a whole file of weights."""
        shown = {name: (content[:1500], len(content)) for name, content in self.changed.items()}
        return f"{self.layout} with {shown}"


@st.composite
def hostile_directories(draw: st.DrawFn) -> Hostile:
    """Draw a directory in which one file, or two, are not what they were."""
    hostile = Hostile(draw(st.sampled_from(LAYOUTS)), {})
    files = valid(hostile.layout)
    for name in draw(st.lists(st.sampled_from(sorted(files)), min_size=1, max_size=2, unique=True)):
        content = files[name]
        if name == "tokenizer.model" or draw(st.integers(0, 2)) == 0:
            hostile.changed[name] = draw(other_bytes(content))
        elif name.endswith(".safetensors"):
            header, data = header_of(content)
            hostile.changed[name] = tensor_file(draw(other_json(header)), data)
        else:
            hostile.changed[name] = json.dumps(draw(other_json(json.loads(content)))).encode()
    return hostile


def check(hostile: Hostile) -> None:
    with tempfile.TemporaryDirectory() as directory:
        fill(Path(directory), valid(hostile.layout) | hostile.changed)
        attempt(Path(directory))


@given(hostile_directories())
@settings(max_examples=150)
def test_hostile_files(hostile: Hostile) -> None:
    check(hostile)


@pytest.mark.slow
@given(hostile_directories())
@settings(max_examples=2_000)
def test_more_hostile_files(hostile: Hostile) -> None:
    check(hostile)


@pytest.mark.soak
@given(hostile_directories())
@settings(max_examples=10_000)
def test_many_hostile_files(hostile: Hostile) -> None:
    check(hostile)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_files_are_valid_before_they_are_changed(layout: str, tmp_path: Path) -> None:
    fill(tmp_path, valid(layout))
    assert attempt(tmp_path) == ""


# ------------------------------------------------------------------------------- what costs the most, as far as we know


WEIGHTS = "consolidated.safetensors"
INDEX = f"{WEIGHTS}.index.json"


def weights(header: Any, data: bytes = b"") -> Files:
    return {WEIGHTS: tensor_file(header, data)}


def tensor(*shape: int, end: int = 0, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


def names(text: str, n: int, first: int = 0) -> Files:
    return weights({text % i: tensor(0) for i in range(first, first + n)})


def beside(filler: str) -> Files:
    """A tensor with something in its entry that nobody asked for."""
    return weights(f'{{"norm.weight": {json.dumps(tensor(0))[:-1]}, "x": {filler}}}}}'.encode())


def with_scale(scale: dict[str, object], data: bytes) -> Files:
    """The fp8 model with another scale, in front of all; the old one is ignored."""
    header, rest = header_of(valid("consolidated")[WEIGHTS])
    for entry in header.values():
        entry["data_offsets"] = [offset + len(data) for offset in entry["data_offsets"]]
    header["layers.0.attention.wq.qscale_act"] = header.pop("layers.0.attention.wq.qscale_weight")
    return weights({"layers.0.attention.wq.qscale_weight": scale} | header, data + rest)


def shards(n_files: int, n_tensors: int) -> Files:
    """Shards full of tensors without bytes, under names that a model of as many layers would have."""
    name = "layers.%d.a.weight"
    files = {f"{i}.safetensors": names(name, n_tensors, i * n_tensors)[WEIGHTS] for i in range(n_files)}
    index = {name % (i * n_tensors): f"{i}.safetensors" for i in range(n_files)}
    return files | {INDEX: json.dumps({"weight_map": index}).encode()}


def params(field: str, text: str) -> Files:
    content = json.loads(valid("consolidated")["params.json"])
    content.pop(field, None)
    return {"params.json": json.dumps(content).encode()[:-1] + f', "{field}": {text}}}'.encode()}


def tokenizer_with(more: bytes) -> Files:
    return {"tokenizer.model": tiny_tokenizer() + more}


def protobuf(number: int, content: bytes) -> bytes:
    """Return a field of a protobuf message; the content has 2**21 to 2**28 bytes, so its length takes four."""
    length = len(content)
    return bytes([number << 3 | 2, *(length >> shift & 127 | 128 for shift in (0, 7, 14)), length >> 21]) + content


def added_tokens(first: int, n: int) -> Files:
    tokens = {f"a{token_id:x}": token_id for token_id in range(first, first + n)}
    return {"added_tokens.json": json.dumps(tokens).encode(), "tokenizer_config.json": b"{}"}


COSTLY: dict[str, Callable[[], Files]] = {
    "metadata": lambda: weights({"__metadata__": {f"{i:x}": "" for i in range(40_000)}}),
    "tensors": lambda: names("layers.%d.a.weight", 5_500),
    "too many tensors": lambda: names("%d", 6_800),
    "tensors ignored": lambda: names("%d.qscale_act", 6_600),
    "tensors of the vision tower": lambda: names("vision_tower.%d", 6_600),
    "shards": lambda: shards(12, 5_000),
    "shards that are not there": lambda: {
        INDEX: json.dumps({"weight_map": {f"{i:x}": f"{i:x}.safetensors" for i in range(15_000)}}).encode()
    },
    "a name that takes squares": lambda: names("kv_fake_quantizer." * 28_000 + "\n%d", 1),
    "a name of digits": lambda: names("layers." + "1" * 500_000 + "%d.weight", 1),
    "a name of dots": lambda: names("layers.0" + "." * 500_000 + "%d", 1),
    "a long dtype": lambda: weights({"a": tensor(dtype="\n" * 200_000)}),
    "lists beside": lambda: beside("[" + "[]," * 150_000 + "[]]"),
    "texts beside": lambda: beside("[" + '"a",' * 120_000 + "0]"),
    "numbers beside": lambda: beside("[" + "12345," * 80_000 + "0]"),
    "wide text beside": lambda: beside('"' + "x" * 500_000 + '\U0001f642"'),
    "dimensions": lambda: weights({"norm.weight": tensor(*(1,) * 170_000, end=4)}, bytes(4)),
    "a scale of 100 dimensions": lambda: with_scale(tensor(*(1,) * 100, end=4), bytes(4)),
    "a scale of no numbers": lambda: with_scale(tensor(0, 2**63), b""),
    "lists in a configuration": lambda: {"params.json": b"[" * 500_000},
    "lists beside each other": lambda: params("x", "[" + "[]," * 150_000 + "0]"),
    "windows": lambda: params("sliding_window", "[" + "9," * 250_000 + "9]"),
    "windows as text": lambda: params("sliding_window", '"[' + "9," * 250_000 + '9]"'),
    "unknown fields": lambda: params("x", "0, " + ", ".join(f'"{i:x}": 0' for i in range(40_000))),
    "layers": lambda: params("n_layers", "1024"),
    "ends": lambda: {"generation_config.json": b'{"eos_token_id": [' + b"9," * 250_000 + b"9]}"},
    "pieces": lambda: tokenizer_with(more_pieces(255_000, "%012x")),
    "pieces from users": lambda: tokenizer_with(more_pieces(255_000, "%012x", b"\x18\x04")),
    "pieces of few bytes": lambda: tokenizer_with(more_pieces(255_000, "_%x")),
    "too many pieces": lambda: tokenizer_with(more_pieces(400_000, "%x_")),
    "empty pieces": lambda: tokenizer_with(b"\x0a\x00" * 4_000_000),
    "a long piece": lambda: tokenizer_with(protobuf(1, protobuf(1, b"a" * 8_000_000))),
    "a table of characters": lambda: tokenizer_with(protobuf(3, protobuf(2, b"\0\4\0\0" * 2_000_000))),
    "texts in a tokenizer": lambda: tokenizer_with(b"\x12\x02\x0a\x00" * 2_000_000),
    "groups in a tokenizer": lambda: tokenizer_with(b"\x0b" * 8_000_000),
    "added tokens": lambda: added_tokens(384, 24_000),
    "added tokens in the place of pieces": lambda: added_tokens(1, 383),
}  # fmt: skip


# The memory that safetensors and SentencePiece take is not Python's, so the process is measured. Each directory is
# loaded in a child of its own, since the high-water mark of a process never sinks.
LOAD_EACH = """
import json, os, resource, sys, time, warnings
import mistral_ref

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

warnings.simplefilter("ignore")
mistral_ref.load(sys.argv[1], backend="numpy")
for directory in sys.argv[2:]:
    if os.fork() == 0:
        message, memory, started = "", peak(), time.thread_time()
        try:
            mistral_ref.load(directory, backend="numpy")
        except mistral_ref.MistralRefError as error:
            message = str(error)
        except Exception as error:  # the line feed tells it from a message
            message = repr(error) + "\\n"
        print(json.dumps([time.thread_time() - started, peak() - memory, message]), flush=True)
        os._exit(0)
    os.wait()
"""


Costs = dict[str, tuple[float, int, str]]


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> Costs:
    return costs_of(COSTLY, tmp_path_factory.mktemp("costly"))


@pytest.fixture(scope="module")
def json_tokenizer_costs(tmp_path_factory: pytest.TempPathFactory) -> Costs:
    return costs_of(COSTLY_JSON_TOKENIZERS, tmp_path_factory.mktemp("costly"))


def costs_of(costly: dict[str, Callable[[], Files]], root: Path) -> Costs:
    """Load every costly directory; return seconds, bytes beyond the size of the files, and the message, by name."""
    directories = [root / str(number) for number in range(1 + len(costly))]
    for directory, make in zip(directories, [dict, *costly.values()], strict=True):
        directory.mkdir()
        files = valid("consolidated") | make()
        if INDEX in files:
            del files[WEIGHTS]
        fill(directory, files)
    command = [sys.executable, "-c", LOAD_EACH, *map(str, directories)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    sizes = [sum(file.stat().st_size for file in directory.iterdir()) for directory in directories[1:]]
    measured = zip(costly, map(json.loads, lines), sizes, strict=True)
    return {name: (seconds, peak - size, message) for name, (seconds, peak, message), size in measured}


@pytest.mark.parametrize("name", COSTLY)
def test_costly_files(name: str, costs: Costs) -> None:
    seconds, memory, message = costs[name]
    assert message.isprintable()
    assert not message or unsaid(message, "header", MAX_JSON_BYTES)  # which would be no test of what comes after
    assert len(message) < 3000
    has_pieces = name.startswith("pieces")
    assert seconds < (MAX_TOKENIZER_SECONDS if has_pieces else MAX_SECONDS)
    assert memory < (MAX_TOKENIZER_BYTES if has_pieces else MAX_BYTES)


def tekken(**parts: Any) -> Files:
    """A tekken.json with other parts; a part may be the bytes of its JSON."""
    made = {
        name: json.dumps(part).encode()
        for name, part in (tiny_tekken("v13") | parts).items()
        if type(part) is not bytes
    }
    made |= {name: part for name, part in parts.items() if type(part) is bytes}
    return {"tekken.json": b"{" + b", ".join(b'"%s": %s' % (name.encode(), part) for name, part in made.items()) + b"}"}


def tekken_of(n: int) -> Files:
    document = tiny_tekken("v13")
    more = [{"rank": rank, "token_bytes": f"{rank:08x}", "token_str": ""} for rank in range(len(document["vocab"]), n)]
    document["config"] |= {"default_vocab_size": n + 64}
    return tekken(vocab=document["vocab"] + more, config=document["config"])


def tokenizer_json(n_pieces: int, merges: list[Any], n_added: int = 0) -> Files:
    content = json.loads((GOLDEN / "tokenizer_json.json").read_text())[-1]["tokenizer"]
    content["model"]["vocab"] |= {f"x{n:x}": n for n in range(500, 500 + n_pieces)}
    content["model"]["merges"] = merges
    content["added_tokens"] += [{"id": 10**6 + n, "content": f"<{n:x}>"} for n in range(n_added)]
    return {"tekken.json": json.dumps(content).encode()}


def merges_of(made: Callable[[str, str], Any]) -> Files:
    """A tokenizer.json with 200,000 merges of a piece "ab" with a letter, each written as `made` does."""
    content = json.loads((GOLDEN / "tokenizer_json.json").read_text())[-1]["tokenizer"]
    letters = [piece for piece in content["model"]["vocab"] if len(piece) == 1]
    pairs = [left + right for left in letters[:4] for right in letters]
    triples = [(pair, letter) for pair in pairs for letter in letters][:200_000]
    pieces = dict.fromkeys([*content["model"]["vocab"], *pairs, *(pair + letter for pair, letter in triples)])
    content["model"]["vocab"] |= {
        piece: 500 + n for n, piece in enumerate(pieces) if piece not in content["model"]["vocab"]
    }
    content["model"]["merges"] = [made(*triple) for triple in triples]
    return {"tekken.json": json.dumps(content).encode()}


COSTLY_JSON_TOKENIZERS: dict[str, Callable[[], Files]] = {
    "pieces": lambda: tekken_of(300_000),
    "pieces of tokenizer.json": lambda: tokenizer_json(299_000, []),
    "too many pieces": lambda: tokenizer_json(1_190_000, []),
    "merges": lambda: merges_of(lambda left, right: [left, right]),
    "merges as texts": lambda: merges_of("{} {}".format),
    "too many merges": lambda: tokenizer_json(0, ["Ġ t"] * 1_190_000),
    "added tokens": lambda: tokenizer_json(0, [], 300_000),
    "control tokens": lambda: tekken(special_tokens=[{"rank": n, "token_str": f"{n:x}"} for n in range(390_000)]),
    "texts": lambda: tekken(x=b"[" + b'"abc",' * 1_190_000 + b"0]"),
    "wide texts": lambda: tekken(x=b"[" + b'"\xc3\xa9\xf0\x9f\x99\x82aaaaaaaaaaaaaaa",' * 1_190_000 + b"0]"),
    "a wide text": lambda: tekken(x=b'"' + b"x" * 33_000_000 + b'\xf0\x9f\x99\x82"'),
    "a long piece": lambda: tekken(vocab=b'[{"rank": 0, "token_str": 0, "token_bytes": "' + b"A" * 33_000_000 + b'"}]'),
    "numbers": lambda: tekken(x=b"[" + b"12345.5," * 1_190_000 + b"0]"),
    "too many values": lambda: tekken(x=b"[" + b"1," * 1_600_000 + b"0]"),
    "too many lists": lambda: tekken(x=b"[" + b"[]," * 400_000 + b"0]"),
    "too many bytes": lambda: tekken(x=b'"' + b"x" * 34_000_000 + b'"'),
}  # fmt: skip
MAX_JSON_TOKENIZER_BYTES, MAX_JSON_TOKENIZER_SECONDS = 320 * 2**20, 5.0


@pytest.mark.slow
@pytest.mark.parametrize("name", COSTLY_JSON_TOKENIZERS)
def test_costly_json_tokenizers(name: str, json_tokenizer_costs: Costs) -> None:
    seconds, memory, message = json_tokenizer_costs[name]
    assert message.isprintable()
    assert len(message) < 3000
    assert seconds < MAX_JSON_TOKENIZER_SECONDS
    assert memory < MAX_JSON_TOKENIZER_BYTES


# ------------------------------------------------------------------------------------------- what is no file of its own


@pytest.mark.parametrize("kind", ["directory", "pipe", "device", "loop", "nowhere"])
@pytest.mark.parametrize(
    "name",
    [*sorted(valid("consolidated")), "config.json", "model-00002-of-00003.safetensors", "model.safetensors.index.json"],
)
def test_what_is_no_regular_file(kind: str, name: str, tmp_path: Path) -> None:
    fill(tmp_path, valid("consolidated" if name in valid("consolidated") else "shards"))
    file = tmp_path / name
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to({"device": "/dev/zero", "loop": name, "nowhere": "nowhere"}[kind])
    assert_says(attempt(tmp_path), file)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123456789abcdef\nsize 14483464192\n"


@pytest.mark.parametrize("layout", ["consolidated", "shards"])
def test_a_pointer_of_git_lfs_is_told_apart_from_a_broken_file(layout: str, tmp_path: Path) -> None:
    for name, content in valid(layout).items():
        fill(tmp_path, valid(layout) | {name: POINTER})
        assert_says(attempt(tmp_path), tmp_path / name, "pointer", "git lfs pull")
        fill(tmp_path, {name: content})
