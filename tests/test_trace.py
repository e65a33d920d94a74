"""Traces: what is kept is what ran, files that come back as they went, dumps of other engines, and files that lie."""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import time
import tracemalloc
import warnings
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support.adapters import adapted
from support.checkpoints import FAMILIES, rows_in_halves, to_bfloat16, write_tensor_file
from support.errors import refused, unsaid, warned
from support.hostile import VALUES, other_bytes, other_json, tensor_file
from support.tiny import BACKENDS, configs, model_of, tokens_for

from mistral_ref import CheckpointError, InputError, MistralRefError, MistralRefWarning, Trace
from mistral_ref.config import ModelConfig
from mistral_ref.ops import KeyView
from mistral_ref.steps import CATALOGUE, EXPERT_CATALOGUE, Step, StepFactory, Steps, step_names
from mistral_ref.study import lens
from mistral_ref.trace import MissingStepError

DENSE = FAMILIES["dense_windowed"].config  # a window of 5
MIXTURE = FAMILIES["mixtral_windowed"].config
FORMAT = "mistral_ref.trace.v1"
MAX_BYTES = 16 * 2**20  # beyond the size of the file
BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1, "BOOL": 1}


# ------------------------------------------------------------------------------------------------- what a trace holds


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25)
@given(data=st.data())
def test_tracing_everything_is_running(backend: str, data: st.DataObject) -> None:
    """To the bit, also where the ring has wrapped; and the cache goes on as after a run."""
    config = data.draw(configs(max_window=4))
    n_tokens, past = data.draw(st.integers(1, 9)), data.draw(st.integers(0, 30))
    chunk = n_tokens + data.draw(st.integers(0, 2))
    model, tokens = model_of(config, backend=backend), tokens_for(config, past + n_tokens + 1)
    traced, run = model.new_cache(chunk=chunk), model.new_cache(chunk=chunk)
    for cache in (traced, run) if past else ():
        model.forward(tokens[:past], cache)
    trace = model.trace(tokens[past:-1], cache=traced)
    np.testing.assert_array_equal(trace["logits"], model.forward(tokens[past:-1], run))
    assert (trace.start, trace.n_tokens, traced.length) == (past, n_tokens, past + n_tokens)
    assert list(trace) == [step.name for step in trace.steps.values()] == list(step_names(config))
    np.testing.assert_array_equal(model.forward(tokens[-1:], traced), model.forward(tokens[-1:], run))


@pytest.mark.parametrize(
    ("keep", "names"),
    [
        ("layers.1.q", ["layers.1.q"]),
        ("layers.*.ffn_out", ["layers.0.ffn_out", "layers.1.ffn_out", "layers.2.ffn_out"]),
        (["logits", "layers.1.[kv]", "embedding"], ["embedding", "layers.1.k", "layers.1.v", "logits"]),
        (
            ("layers.2.*norm", "layers.[12].ffn_norm"),
            ["layers.1.ffn_norm", "layers.2.attention_norm", "layers.2.ffn_norm"],
        ),
        ([], []),
    ],
)
def test_what_is_kept_and_in_which_order(keep: object, names: list[str]) -> None:
    model, tokens = model_of(DENSE), [1, 2, 3]
    trace, everything = model.trace(tokens, keep=keep), model.trace(tokens)
    assert list(trace) == list(trace.steps) == list(trace.keys()) == names
    assert len(trace) == len(names)
    for name, value in trace.items():
        np.testing.assert_array_equal(value, everything[name])
    assert (trace.tokens, trace.n_tokens, trace.start) == (tokens, 3, 0)
    assert trace.nbytes == sum(everything[name].nbytes for name in names)


def test_a_trace_is_a_mapping() -> None:
    trace = model_of(DENSE).trace([1, 2], keep="layers.*.q")
    assert "layers.0.q" in trace
    assert "layers.0.k" not in trace
    assert trace.get("layers.0.q") is trace["layers.0.q"] is trace.steps["layers.0.q"].value
    assert trace.get("layers.0.k") is None
    with pytest.raises(ValueError, match="read-only"):
        trace["layers.0.q"][:] = 0
    with refused(InputError, "layers.0.q", "past"):
        trace.steps["layers.0.q"].value = trace["layers.0.q"] * 2
    everything = model_of(DENSE).trace([1, 2])
    for step in everything.steps.values():  # the last one too
        assert not step.value.flags.writeable
        with refused(InputError, step.name, "past"):
            step.value = step.value.copy()


def test_a_missing_step_is_one_readable_line() -> None:
    trace = model_of(DENSE).trace([1], keep="layers.*.q")
    with refused(MissingStepError, "layers.9.\\x1b[2J", "layers.0.q", "layers.1.q", "layers.2.q", "keep") as caught:
        trace["layers.9.\x1b[2J"]
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, InputError)
    with refused(MissingStepError, "'q'", "embedding", "layers.0.attention_norm", "layers.0.q") as caught:
        model_of(DENSE).trace([1])["q"]
    assert "layers.0.k" not in str(caught.value)
    with refused(MissingStepError, "'q'", "nothing"):
        Trace([], [], [])["q"]


@pytest.mark.parametrize("keep", ["layers.9.q", "router_logits", ["embedding", "layers.*.gates"], "\x1b[2J", [3]])
def test_a_pattern_that_matches_nothing_is_an_error(keep: object) -> None:
    model = model_of(DENSE)
    cache = model.new_cache()
    with refused(InputError, "step", repr(keep[-1] if isinstance(keep, list) else keep)):
        model.trace([1], keep=keep, cache=cache)
    with refused(InputError, "step", "layers.9.q"):
        model.trace([1], edits={"layers.9.q": np.zeros_like}, cache=cache)
    assert cache.length == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_kept_is_what_the_pass_went_on_with(backend: str) -> None:
    model, edits = model_of(MIXTURE, backend=backend), {"layers.1.heads": np.zeros_like, "layers.*.v": lambda v: v * 2}
    tokens, cache = [5, 6, 7], model.new_cache()
    plain, trace = model.trace(tokens), model.trace(tokens, edits=edits, cache=cache)
    np.testing.assert_array_equal(trace["logits"], model.forward(tokens, edits=edits))
    np.testing.assert_array_equal(trace["layers.0.v"], 2 * plain["layers.0.v"])
    assert not trace["layers.1.heads"].any()
    assert not trace["layers.1.attention_out"].any()
    assert cache.length == 3
    with refused(InputError, "layers.0.q", "(1, 4, 7)", "float32", "(1, 4, 8)"):
        model.trace([1], edits={"layers.0.q": lambda q: q[..., 1:]}, cache=cache)
    assert cache.length == 3


# ---------------------------------------------------------------------------------------------- what it does not cost


def test_values_that_are_not_kept_are_gone_before_the_next_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, swiglu = model_of(DENSE), model_of(DENSE).ops.swiglu
    made: list[weakref.ref[np.ndarray]] = []
    alive: list[int] = []

    def watched(gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        alive.append(sum(ref() is not None for ref in made))
        hidden = swiglu(gate, up)
        made.append(weakref.ref(hidden))
        return hidden

    monkeypatch.setattr(model.ops, "swiglu", watched)
    for keep, expected in (("logits", [0, 0, 0]), ("layers.[01].ffn_hidden", [0, 1, 2])):
        made.clear(), alive.clear()
        trace = model.trace([1, 2, 3], keep=keep)
        assert alive == expected
        assert sum(ref() is not None for ref in made) == (2 if "ffn" in keep else 0)
    assert trace["layers.1.ffn_hidden"].any()


def test_memory_is_bounded_by_what_is_kept() -> None:
    config = FAMILIES["dense_no_window"].config
    model, tokens = model_of(config), tokens_for(config, 300)
    peaks = {}
    for keep in ("logits", "*"):
        tracemalloc.start()
        trace = model.trace(tokens, keep=keep)
        peaks[keep] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peaks[keep] > trace.nbytes
    assert trace.nbytes > 8 * 2**20  # of which scores and weights are most
    assert peaks["logits"] < 6 * 2**20


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_is_looked_into_only_where_it_is_asked_for(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, looked = model_of(DENSE, backend=backend), []
    attention = model.ops.attention

    def watched(q_THK: np.ndarray, views: Sequence[KeyView], observed: StepFactory | None) -> Steps:
        looked.append(observed is not None)
        return attention(q_THK, views, observed)

    monkeypatch.setattr(model.ops, "attention", watched)
    cases: list[tuple[dict[str, Any], bool]] = [
        ({"keep": ["logits", "layers.*.q", "layers.*.heads"]}, False),
        ({"keep": "layers.*.attention_norm", "edits": {"layers.0.heads": np.zeros_like}}, False),
        ({"keep": "layers.1.scores"}, True),
        ({"keep": "layers.1.attention_*"}, True),
        ({"keep": "*"}, True),
    ]
    if backend == "numpy":
        cases.append(({"keep": "logits", "edits": {"layers.1.attention_weights": np.zeros_like}}, True))
    for settings_, expected in cases:
        looked.clear()
        model.trace([1, 2], **settings_)
        assert looked == [expected] * 3, settings_


# -------------------------------------------------------------------------------------------------- there and back


def assert_same(found: Trace, expected: Trace) -> None:
    """Assert that two traces are the same to the bit, with all that is known of each step."""
    about = [(trace.tokens, trace.pieces, trace.start, trace.made_by, trace.n_tokens) for trace in (found, expected)]
    assert about[0] == about[1]
    assert list(found) == list(expected)
    for name, step in expected.steps.items():
        other = found.steps[name]
        assert (other.value.dtype, other.value.shape) == (step.value.dtype, step.value.shape)
        assert other.value.tobytes() == step.value.tobytes()
        known = [(one.name, one.kind, one.key_positions, one.source) for one in (other, step)]
        assert known[0] == known[1]
        assert other.source
        assert not other.value.flags.writeable
        with refused(InputError, other.name, "past"):
            other.value = step.value


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_a_trace_comes_back_as_it_was_saved(config: ModelConfig, dtype: str, tmp_path: Path) -> None:
    model, tokens = model_of(config, dtype=dtype), tokens_for(config, 20)
    cache = model.new_cache(chunk=3)
    model.forward(tokens, cache)
    trace = model.trace([4, 5, 4], cache=cache)
    trace.save(tmp_path / "t.safetensors")
    loaded = Trace.load(str(tmp_path / "t.safetensors"))
    assert_same(loaded, trace)
    assert (loaded.start, loaded.tokens, loaded.pieces) == (20, [4, 5, 4], ["[4]", "[5]", "[4]"])
    assert loaded.steps["layers.1.scores"].key_positions.stop == 23
    assert (loaded.made_by, loaded.windows) == (f"{dtype} by numpy", config.sliding_window)
    assert os.listdir(tmp_path) == ["t.safetensors"]
    loaded.save(tmp_path / "t.safetensors")  # over the file that its values are mapped from
    assert_same(Trace.load(tmp_path / "t.safetensors"), trace)
    assert loaded.compare(trace).verdict() == f"all {len(trace)} steps are equal"


@pytest.mark.parametrize("kind", EXPERT_CATALOGUE)
def test_a_trace_of_one_kind_of_step_comes_back(kind: str, tmp_path: Path) -> None:
    """Without the router's steps too, whose presence tells a mixture of experts."""
    keep = kind if kind in ("embedding", "norm", "logits") else f"layers.*.{kind}"
    for config in (MIXTURE,) if kind.startswith(("router_logits", "expert_weights")) else (DENSE, MIXTURE):
        model = adapted(model_of(config)) if "_lora_" in kind else model_of(config)
        trace = model.trace([5, 6, 7], keep=keep)
        assert trace.n_tokens == 3
        trace.save(tmp_path / "t")
        assert_same(Trace.load(tmp_path / "t"), trace)


def test_where_no_expert_is_chosen_there_are_no_pairs(tmp_path: Path) -> None:
    trace = model_of(MIXTURE).trace([5, 6], edits={"layers.*.expert_weights": np.zeros_like})
    assert trace["layers.0.gate"].shape == (0, MIXTURE.hidden_dim)
    trace.save(tmp_path / "t")
    loaded = Trace.load(tmp_path / "t")
    assert_same(loaded, trace)
    assert loaded.compare(trace).verdict() == f"all {len(trace)} steps are equal"


def test_any_pieces_and_any_number_of_them_come_back(tmp_path: Path) -> None:
    """Pieces of a model without a tokenizer are in brackets, and JSON is read up to a number of brackets."""
    steps = model_of(DENSE).trace([1], keep="embedding").steps["embedding"]
    many = Step("embedding", steps.kind, np.zeros((20_100, 1), np.float32))
    pieces = ["[1]", "{", '"', "\\u005b", "\\", "é", "🙂", "日本", "", "▁"]
    trace = Trace([many], [7] * 20_100, [*pieces, *["[7]"] * 20_090])
    trace.save(tmp_path / "t")
    loaded = Trace.load(tmp_path / "t")
    assert loaded.pieces == trace.pieces
    assert loaded.pieces[:10] == pieces
    assert [loaded.label(position) for position in (0, 1, 20_099, 20_100, -1)] == ["[1]", "{", "[7]", "@20100", "@-1"]


def test_pieces_are_made_safe_to_print_whoever_makes_them() -> None:
    trace = Trace([], [1, 2], ["\x1b[2J\u202e", "a\nb"])
    assert trace.pieces == ["\\x1b[2J\\u202e", "a\\nb"]
    model, long = model_of(DENSE), SimpleNamespace(vocab_size=2, piece=lambda token: "x" * 300)
    model.tokenizer = long
    assert [len(model.piece(token)) for token in (1, 2)] == [200, len("[2]")]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    trace = model_of(DENSE).trace([1], keep="logits")
    with refused(CheckpointError, tmp_path / "no" / "t", "written"):
        trace.save(tmp_path / "no" / "t")
    with refused(CheckpointError, tmp_path, "written", "directory"):
        trace.save(tmp_path)
    assert not list(tmp_path.iterdir())


def is_mapped(array: np.ndarray) -> bool:
    """Return whether an array's numbers lie in a file."""
    base: object = array
    while isinstance(base, np.ndarray):
        base = base.base
    return isinstance(base, mmap.mmap)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_loading_copies_nothing(dtype: str, tmp_path: Path) -> None:
    model_of(DENSE, dtype=dtype).trace(tokens_for(DENSE, 300)).save(tmp_path / "t")
    tracemalloc.start()
    trace = Trace.load(tmp_path / "t")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert all(is_mapped(value) for value in trace.values())
    assert peak < 2**20 < trace.nbytes


# ------------------------------------------------------------------------------------------- dumps of other engines


def halves(x_THK: np.ndarray) -> np.ndarray:
    """Return queries or keys as an engine has them that turns pairs half a head apart."""
    n_tokens, n_heads, head_dim = x_THK.shape
    rows = [rows_in_halves(x_HK.reshape(-1, 1), n_heads).reshape(n_heads, head_dim) for x_HK in x_THK]
    return np.ascontiguousarray(rows).reshape(n_tokens, n_heads, head_dim)


def test_a_file_that_gives_its_row_order_is_believed(tmp_path: Path) -> None:
    ours = model_of(FAMILIES["dense_windowed"].config).trace([1, 2, 3])
    ours.save(tmp_path / "ours")
    for order in (None, "interleaved", "halves"):
        assert Trace.load(tmp_path / "ours", rope_row_order=order).compare(ours).verdict() == "all 54 steps are equal"
    about = {FORMAT: json.dumps({"rope_row_order": "halves"})}
    save_file({"layers.0.q": halves(ours["layers.0.q"])}, tmp_path / "theirs", metadata=about)
    np.testing.assert_array_equal(Trace.load(tmp_path / "theirs")["layers.0.q"], ours["layers.0.q"])


@pytest.mark.parametrize("mask", [-1e9, -3.4e38, -65504.0])
def test_masks_that_are_added_are_out_of_sight(mask: float, tmp_path: Path) -> None:
    ours = model_of(FAMILIES["dense_windowed"].config).trace([1, 2, 3])
    scores = ours["layers.0.scores"]
    save_file({"layers.0.scores": np.where(np.isinf(scores), np.float32(mask), scores)}, tmp_path / "dump")
    np.testing.assert_array_equal(Trace.load(tmp_path / "dump")["layers.0.scores"], scores)


@pytest.mark.parametrize("shape", [(101,), (1, 101), (1, 1, 101)])
def test_logits_of_the_last_token_alone_can_be_dumped(shape: tuple[int, ...], tmp_path: Path) -> None:
    ours = model_of(FAMILIES["dense_windowed"].config).trace([1, 2, 3])
    tokens = np.array([1, 2, 3], np.uint32)
    tensors = {"embedding": ours["embedding"], "logits": np.ascontiguousarray(ours["logits"][-1]).reshape(shape)}
    save_file(tensors | {"tokens": tokens}, tmp_path / "dump")
    theirs = Trace.load(tmp_path / "dump")
    assert (theirs.tokens, theirs.n_tokens, theirs["logits"].shape) == ([1, 2, 3], 3, (1, 101))
    assert theirs.compare(ours).verdict() == "all 2 steps are equal"


def test_names_that_are_nearly_right_are_guessed(tmp_path: Path) -> None:
    save_file(
        {"embedding": np.ones((1, 2), np.float32), "layer.0.q_rot": np.ones((1, 1, 2), np.float32)}, tmp_path / "d"
    )
    with warned("layer.0.q_rot", "layers.N.q_rotated"):
        Trace.load(tmp_path / "d")


@pytest.mark.parametrize("family", ["dense_windowed", "mixtral_windowed", "nemo"])
def test_a_dump_of_another_engine(family: str, tmp_path: Path) -> None:
    """Some steps, a batch axis, tokens in 32 bits, something unknown, no metadata, and heads in halves."""
    config = FAMILIES[family].config
    tokens = tokens_for(config, 7)
    ours = model_of(config).trace(tokens)
    turned = ("q", "k", "q_rotated", "k_rotated")
    dumped = ["embedding", *(f"layers.1.{kind}" for kind in (*turned, "v", "scores", "heads", "ffn_out")), "logits"]
    tensors = {name: halves(ours[name]) if name.endswith(turned) else ours[name] for name in dumped}
    tensors = {name: np.ascontiguousarray(value[np.newaxis]) for name, value in tensors.items()}
    tensors |= {"tokens": np.array(tokens, np.int32)[np.newaxis], "\x1b[2J.mask": np.ones((2, 2), np.int8)}
    save_file(tensors, tmp_path / "dump")
    with warned(tmp_path / "dump", 1, "'\\x1b[2J.mask'") as caught:
        theirs = Trace.load(tmp_path / "dump", rope_row_order="halves")
    assert caught[0].filename == __file__
    assert list(theirs) == [name for name in ours if name in dumped]  # in the order of the pass
    for name, value in theirs.items():
        assert value.tobytes() == ours[name].tobytes(), name
    assert (theirs.tokens, theirs.pieces, theirs.start) == (tokens, [str(token) for token in tokens], 0)
    assert theirs.steps["layers.1.scores"].key_positions == range(7)
    for comparison in (ours.compare(theirs), theirs.compare(ours)):
        assert comparison.verdict() == f"all {len(dumped)} steps are equal"
        assert set(comparison.unmatched) == set(ours) - set(theirs)
    with warned(1, "'\\x1b[2J.mask'"):
        as_it_is = Trace.load(tmp_path / "dump")
    assert {d.name for d in as_it_is.compare(ours).departed} == {f"layers.1.{kind}" for kind in turned}


def test_heads_in_halves_by_hand(tmp_path: Path) -> None:
    save_file({"layers.0.q": np.arange(12, dtype=np.float32).reshape(1, 2, 6)}, tmp_path / "t")
    q_THK = Trace.load(tmp_path / "t", rope_row_order="halves")["layers.0.q"]
    assert q_THK.tolist() == [[[0, 3, 1, 4, 2, 5], [6, 9, 7, 10, 8, 11]]]
    assert not q_THK.flags.writeable
    with refused(InputError, "rope_row_order", "'half'", "'interleaved'", "'halves'"):
        Trace.load(tmp_path / "t", rope_row_order="half")


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_numbers_of_16_bits(dtype: str, tmp_path: Path) -> None:
    ours = model_of(MIXTURE).trace([5, 6, 7], keep=["layers.*.ffn_out", "layers.*.gate", "layers.*.router_logits"])
    stored = {name: value.astype(np.float16) if dtype == "F16" else to_bfloat16(value) for name, value in ours.items()}
    expected = {
        name: value.astype(np.float32) if dtype == "F16" else (value.astype(np.uint32) << 16).view(np.float32)
        for name, value in stored.items()
    }
    tensors: dict[str, tuple[str, np.ndarray]] = {"pieces": ("U8", np.frombuffer(b'["a"]', np.uint8))}  # an odd length
    tensors |= {name: (dtype, value[np.newaxis]) for name, value in stored.items()}
    write_tensor_file(tmp_path / "t", tensors)
    theirs = Trace.load(tmp_path / "t")
    for name, value in theirs.items():
        assert value.dtype == np.float32
        assert value.flags.aligned
        assert not value.flags.writeable
        assert value.tobytes() == expected[name].tobytes()
    comparison = theirs.compare(ours, bound=2**14 if dtype == "F16" else 2**17)  # 2^13 or 2^16 ulps are one of theirs
    assert not comparison.departed
    assert comparison.verdict().startswith(f"all {len(ours)} steps agree within")
    assert theirs.label(0) == "a"


def test_numbers_at_odd_addresses(tmp_path: Path) -> None:
    value = np.arange(6, dtype=np.float64).reshape(2, 3)
    tensors = {"pieces": ("U8", np.frombuffer(b"[]", np.uint8)), "norm": ("F64", value)}
    write_tensor_file(tmp_path / "t", tensors | {"embedding": ("F32", value.astype(np.float32))})
    trace = Trace.load(tmp_path / "t")
    assert all(step.value.flags.aligned for step in trace.steps.values())
    np.testing.assert_array_equal(trace["norm"], value)
    np.testing.assert_array_equal(trace["embedding"], value)


def test_where_a_dump_begins(tmp_path: Path) -> None:
    save_file({"layers.0.scores": np.zeros((1, 2, 5), np.float32)}, tmp_path / "t", {FORMAT: '{"start": 7}'})
    trace = Trace.load(tmp_path / "t")
    assert (trace.start, trace.n_tokens, trace.made_by) == (7, 2, "")
    assert trace.steps["layers.0.scores"].key_positions == range(4, 9)
    assert trace.label(8) == "@8"


@pytest.mark.parametrize("sign", ["router_logits", "expert_weights"])
def test_a_dump_with_a_routers_step_is_of_experts(sign: str, tmp_path: Path) -> None:
    tensors = {"layers.0.gate": np.zeros((6, 4), np.float32), f"layers.0.{sign}": np.zeros((3, 5), np.float32)}
    save_file(tensors, tmp_path / "t")
    trace = Trace.load(tmp_path / "t")
    assert trace.n_tokens == 3
    assert trace.steps["layers.0.gate"].kind == EXPERT_CATALOGUE["gate"] != CATALOGUE["gate"]


# ---------------------------------------------------------------------------------------------------- files that lie


def tensors_of(**shapes: tuple[object, ...]) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a file of zeros; names have __ for dots, and a shape may begin with a dtype."""
    header, end = {}, 0
    for name, shape in shapes.items():
        dtype, sizes = (shape[0], shape[1:]) if shape and isinstance(shape[0], str) else ("F32", shape)
        begin = end
        end += int(np.prod(sizes, dtype=object)) * BYTES[dtype]
        header[name.replace("__", ".")] = {"dtype": dtype, "shape": sizes, "data_offsets": [begin, end]}
    return header, bytes(end)


def file_of(**shapes: tuple[object, ...]) -> bytes:
    return tensor_file(*tensors_of(**shapes))


def with_metadata(metadata: object) -> bytes:
    header, data = tensors_of(embedding=(2, 3))
    return tensor_file({"__metadata__": metadata} | header, data)


def with_about(text: str) -> bytes:
    return with_metadata({FORMAT: text})


def with_pieces(content: bytes) -> bytes:
    header, data = tensors_of(embedding=(2, 3), pieces=("U8", len(content)))
    return tensor_file(header, data[: -len(content) or None] + content)


WHOLE = file_of(embedding=(2, 3), logits=(2, 5))
HOSTILE: dict[str, tuple[bytes, tuple[object, ...]]] = {
    "empty": (b"", ("truncated", 0)),
    "truncated header": (WHOLE[:50], ("truncated",)),
    "truncated data": (WHOLE[:-1], ("truncated", len(WHOLE) - 1, len(WHOLE))),
    "something after": (WHOLE + b"x", ("safetensors",)),
    "no JSON": (tensor_file(b"\x1b[2J{"), ("safetensors",)),
    "no tensors": (tensor_file({}), ("step", "embedding")),
    "only others": (file_of(tokens=("I64", 2), x=(2, 3)), ("step", "embedding")),
    "a lying shape": (WHOLE.replace(b"[2, 3]", b"[2, 4]"), ("safetensors",)),
    "an axis too few": (file_of(embedding=(3,)), ("embedding", "(3,)", "token, dim")),
    "no axis": (file_of(embedding=()), ("embedding", "()", "token, dim")),
    "a batch of two": (file_of(embedding=(2, 2, 3)), ("embedding", "(2, 2, 3)", "token, dim")),
    "axes too many": (file_of(layers__0__q=(1, 1, 2, 2, 4)), ("layers.0.q", "token, head")),
    "200 axes": (file_of(embedding=(1,) * 200), ("embedding", "(1, 1, 1, 1, ...)", "token, dim")),
    "tokens of 200 axes": (file_of(embedding=(1, 2), tokens=("I64", *(1,) * 200)), ("tokens", "I64", "one axis")),
    "no numbers": (file_of(embedding=(0, 3)), ("embedding", "(0, 3)")),
    "no numbers, a huge axis": (file_of(embedding=(0, 2**63)), ("embedding", "(0, 9223372036854775808)")),
    "no pairs, a huge axis": (file_of(layers__0__gate=(0, 2**62), layers__0__router_logits=(1, 2)), ("gate", 2**62)),
    "no pairs without experts": (file_of(layers__0__gate=(0, 3)), ("layers.0.gate", "(0, 3)")),
    "no heads": (file_of(layers__0__q=(2, 0, 4)), ("layers.0.q", "(2, 0, 4)")),
    "other tokens": (file_of(embedding=(2, 3), logits=(3, 5)), ("logits", "(3, 5)", "token, vocabulary")),
    "other queries": (file_of(embedding=(2, 3), layers__0__scores=(2, 3, 3)), ("layers.0.scores", "3 tokens", "order")),
    "other ids": (file_of(embedding=(2, 3), tokens=("I64", 3)), ("tokens", "3 ids", 2)),
    "tokens as numbers": (file_of(embedding=(2, 3), tokens=(2,)), ("tokens", "F32", "(2,)", "I64", "I32", "U32")),
    "a batch of tokens": (file_of(embedding=(2, 3), tokens=("I32", 2, 2)), ("tokens", "I32", "(2, 2)", "one axis")),
    "tokens without an axis": (file_of(embedding=(1, 3), tokens=("I64",)), ("tokens", "I64", "()", "one axis")),
    "whole numbers": (file_of(embedding=("I32", 2, 3)), ("embedding", "I32", "F64", "F32", "F16", "BF16")),
    "truths": (file_of(embedding=("BOOL", 2, 3)), ("embedding", "BOOL", "F64")),
    "fewer keys than queries": (
        file_of(layers__0__scores=(1, 3, 2)),
        ("layers.0.scores", "(1, 3, 2)", "3 to 3", "head, query, key", 0),
    ),
    "keys before the first": (file_of(layers__0__attention_weights=(1, 1, 2)), ("attention_weights", "1 to 1")),
    "pieces not UTF-8": (with_pieces(b'["\xff"]'), ("pieces", "utf-8")),
    "pieces not JSON": (with_pieces(b'["\x1b[2J'), ("pieces",)),
    "pieces no list": (with_pieces(b'{"\\u001b[2J": 1}'), ("pieces", "x1b[2J", "list")),
    "pieces no texts": (with_pieces(b'["a", 1]'), ("pieces", "['a', 1]", "list")),
    "pieces longer than the pass": (with_pieces(b'["a", "b", "\\\\\\""]'), ("pieces", "3 texts", "2 tokens")),
    "pieces nested": (with_pieces(b"[" * 9000), ("pieces", "nested")),
    "pieces costly": (with_pieces(b"[" + b"[]," * 30_000 + b"[]]"), ("pieces", 20000)),
    "no pieces": (with_pieces(b""), ("pieces", "Expecting value")),
    "metadata no texts": (with_metadata({FORMAT: 3}), ("safetensors",)),
    "about not JSON": (with_about("\x1b[2J"), (FORMAT, "Expecting value")),
    "about a list": (with_about("[]"), (FORMAT, "[]", "dict")),
    "start negative": (with_about('{"start": -1}'), ("start", -1, 0)),
    "start huge": (with_about('{"start": 1e99}'), ("start", 1e99)),
    "start too huge": (with_about(f'{{"start": {2**41}}}'), ("start", 2199023255552)),
    "start a digit too many": (with_about(f'{{"start": {"9" * 5000}}}'), (FORMAT,)),
    "start a truth": (with_about('{"start": true}'), ("start", True, "whole number")),
    "start twice": (with_about('{"start": 1, "start": 2}'), (FORMAT, "'start'", "twice")),
    "windows a number": (with_about('{"windows": 3}'), ("windows", 3, "list")),
    "a window of 0": (with_about('{"windows": [null, 0]}'), ("windows", 0)),
    "a window that is text": (with_about('{"windows": ["4"]}'), ("windows", "'4'")),
    "maker a list": (with_about('{"made_by": ["\\u001b[2J"]}'), ("made_by", r"['\x1b[2J']", "str")),
    "sources a list": (with_about('{"sources": []}'), ("sources", "[]", "dict")),
    "experts a number": (with_about('{"has_experts": 1}'), ("has_experts", 1, "bool")),
    "experts that are none": (with_about('{"has_experts": true, "start": -5}'), ("start", -5, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_file_that_lies_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    content, facts = HOSTILE[name]
    (tmp_path / "t").write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MistralRefWarning)
        with refused(CheckpointError, tmp_path / "t", *facts) as caught:
            Trace.load(tmp_path / "t")
    assert len(str(caught.value)) < 500


def test_many_pieces_for_few_tokens_are_not_even_read(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(with_pieces(b"[" + b'"",' * 2_000_000 + b'""]'))
    started = time.thread_time()
    with refused(CheckpointError, tmp_path / "t", "pieces", "2000001 texts", "2 tokens"):
        Trace.load(tmp_path / "t")
    assert time.thread_time() - started < 0.2


@pytest.mark.parametrize("kind", ["directory", "nowhere", "pipe"])
def test_what_is_no_file_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "t"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    with refused(CheckpointError, path):
        Trace.load(path)


@pytest.mark.parametrize("kind", ["q", "k", "q_rotated", "k_rotated"])
def test_a_head_of_an_odd_width_has_no_halves(kind: str, tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(file_of(**{f"layers__0__{kind}": (1, 1, 3)}))
    assert Trace.load(tmp_path / "t")[f"layers.0.{kind}"].shape == (1, 1, 3)
    with refused(CheckpointError, tmp_path / "t", f"layers.0.{kind}", "(1, 1, 3)", "even"):
        Trace.load(tmp_path / "t", rope_row_order="halves")


@pytest.mark.parametrize(
    "name",
    [
        *("layers.00.q", "layers.99999.q", "layers.-1.q", "layers.1٣.q", "layers.+1.q", "layers.0.q\n", "layers.0.q."),
        *("layers.0.Q", "q", " embedding", "embeddings", "layers.0.embedding", "layers.0.norm", "\x1b[2J"),
    ],
)
def test_names_that_are_no_steps_are_ignored(name: str, tmp_path: Path) -> None:
    header, data = tensors_of(x=(1, 1, 2), embedding=(1, 2))
    (tmp_path / "t").write_bytes(tensor_file({name: header["x"], "embedding": header["embedding"]}, data))
    with warned(tmp_path / "t", 1, repr(name)):
        assert list(Trace.load(tmp_path / "t")) == ["embedding"]


def test_a_file_without_anything_to_tell(tmp_path: Path) -> None:
    for metadata in (None, {}, {FORMAT: "{}"}, {"format": "pt"}):
        (tmp_path / "t").write_bytes(with_metadata(metadata))
        trace = Trace.load(tmp_path / "t")
        assert (trace.start, trace.made_by, trace.tokens, trace.pieces) == (0, "", [], [])
        assert (trace.n_tokens, trace.steps["embedding"].source) == (2, "")


def test_what_a_file_says_of_itself_is_shown_and_not_obeyed(tmp_path: Path) -> None:
    hostile = "\x1b[2J\n\u202e<script>alert(1)</script>"
    about = {"made_by": hostile, "sources": {"embedding": hostile, hostile: 3}, hostile: hostile}
    header, _ = tensors_of(embedding=(1, 2), pieces=("U8", len(json.dumps([hostile]))))
    data = bytes(8) + json.dumps([hostile]).encode()
    (tmp_path / "t").write_bytes(tensor_file({"__metadata__": {FORMAT: json.dumps(about)}} | header, data))
    trace = Trace.load(tmp_path / "t")
    texts = [repr(trace), trace.made_by, trace.label(0), *trace.pieces, trace.steps["embedding"].source]
    assert all(text.isprintable() for text in texts)
    for page in (trace._repr_html_(), trace.steps["embedding"]._repr_html_()):
        assert page.isprintable()
        assert "<script" not in page


# What a fuzzed file is made from: every field of the metadata, every kind of tensor.
SEED_ABOUT = {"start": 3, "made_by": "x", "windows": [4, None], "has_experts": False, "sources": {"q": "a.py:1"}}
SEED = tensors_of(
    embedding=(2, 4),
    layers__0__q=(1, 2, 2, 4),
    layers__0__scores=(2, 2, 5),
    layers__1__gate=("F16", 2, 6),
    layers__1__ffn_out=("BF16", 2, 4),
    logits=("F64", 2, 3),
    tokens=("I64", 2),
    pieces=("U8", 10),
)


def seed_file(header: Any, about: str | None, seed: int = 0) -> bytes:
    if about is not None and isinstance(header, dict):
        header = {"__metadata__": {FORMAT: about}} | header
    return tensor_file(header, np.random.RandomState(seed).bytes(len(SEED[1]) - 10) + b'["a", "b"]')


def check(content: bytes) -> None:
    """Load a file and look at all that it holds: an error is ours, one line, and names the file; memory is bounded."""
    messages, names_the_file = [], True
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = Path(folder) / "t"
        path.write_bytes(content)
        tracemalloc.start()
        try:
            for order in ("interleaved", "halves"):
                trace = Trace.load(path, rope_row_order=order)
                shown = [repr(trace), trace.made_by, *trace.pieces, *map(trace.label, range(3)), trace._repr_html_()]
                for step in trace.steps.values():
                    shown += [repr(step), step.source, step._repr_html_()]
                assert all(text.isprintable() for text in shown)
                assert not trace.compare(trace).departed
                for layer in range(2):
                    if f"layers.{layer}.attention_weights" in trace:
                        assert str(lens.attention(trace, layer, 0))
                trace.save(Path(folder) / "again")
                Trace.load(Path(folder) / "again")
        except MistralRefError as error:
            messages.append(str(error))
            names_the_file = not unsaid(messages[-1], path)
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert names_the_file, messages
    assert all(warning.category is MistralRefWarning for warning in caught), caught[0]
    messages += [str(warning.message) for warning in caught]
    assert all(message.isprintable() and len(message) < 3000 for message in messages), messages
    assert peak < len(content) + MAX_BYTES


def test_the_seed_of_the_fuzzer_loads(tmp_path: Path) -> None:
    (tmp_path / "t").write_bytes(seed_file(SEED[0], json.dumps(SEED_ABOUT)))
    trace = Trace.load(tmp_path / "t")
    assert (len(trace), trace.start, trace.pieces) == (6, 3, ["a", "b"])
    assert trace.steps["layers.0.scores"].key_positions == range(5)
    check(seed_file(SEED[0], None).replace(b'"layers.0.scores"', b'"layers.0.v"     '))


@settings(max_examples=200)
@given(st.dictionaries(st.sampled_from(sorted(SEED_ABOUT)) | st.text(max_size=3), VALUES) | VALUES)
def test_any_metadata(about: Any) -> None:
    check(seed_file(SEED[0], json.dumps(about)))


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1))
def test_any_numbers(seed: int) -> None:
    check(seed_file(SEED[0], None, seed).replace(b'"layers.0.scores"', b'"layers.0.gate"  '))
    check(seed_file(SEED[0], '{"start": 3}', seed))


@settings(max_examples=100)
@given(other_json(SEED_ABOUT))
def test_other_metadata(about: Any) -> None:
    check(seed_file(SEED[0], json.dumps(about)))


@settings(max_examples=150)
@given(other_json(SEED[0]))
def test_other_headers(header: Any) -> None:
    check(seed_file(header, None))


@settings(max_examples=100)
@given(other_bytes(seed_file(SEED[0], json.dumps(SEED_ABOUT))))
def test_other_bytes(content: bytes) -> None:
    check(content)


SIZES = st.integers(0, 5) | st.sampled_from([2**31, 2**40, 2**63])


@settings(max_examples=150)
@given(
    st.sampled_from(["embedding", "layers.0.q", "layers.0.scores", "layers.7.gate", "layers.0.expert_weights"]),
    st.lists(SIZES, max_size=5) | st.lists(st.just(1), max_size=70),
    st.sampled_from(["F64", "F32", "F16", "BF16", "F8_E4M3", "BOOL"]),
)
def test_any_shape(name: str, shape: list[int], dtype: str) -> None:
    size = int(np.prod(shape, dtype=object)) * BYTES[dtype]
    header = {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}}
    header["layers.0.router_logits"] = {"dtype": "F64", "shape": [2, 1], "data_offsets": [size, size + 16]}
    check(tensor_file(header, bytes(min(size, 10_000) + 16)))


def test_each_way_to_look_at_a_trace() -> None:
    trace = model_of(DENSE).trace([1, 2, 3], keep=["embedding", "layers.0.scores"])
    assert repr(trace) == "<Trace of 3 tokens from position 0: 2 steps, 696 bytes, float32 by numpy>"
    assert [trace.label(position) for position in (-1, 0, 2, 3)] == ["@-1", "[1]", "[3]", "@3"]
    looks: list[Callable[[], str]] = [trace._repr_html_, trace.steps["layers.0.scores"]._repr_html_]
    assert all("layers.0.scores" in look() for look in looks)
