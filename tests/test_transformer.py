"""The generator of steps: its catalogue, walking, replacing, editing, abandoning, and float64 throughout."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters import adapted
from support.checkpoints import FAMILIES
from support.errors import refused
from support.tiny import chunkings, configs, model_of, tokens_for

import mistral_ref
from mistral_ref import InputError, Walk
from mistral_ref.config import ModelConfig
from mistral_ref.steps import CATALOGUE, EXPERT_CATALOGUE, step_names


def sizes_of(config: ModelConfig, n_tokens: int, n_keys: int, n_pairs: int) -> dict[str, int]:
    """Return the size that each axis of the catalogue has."""
    return {
        "token": n_tokens,
        "query": n_tokens,
        "key": n_keys,
        "pair": n_pairs,
        "dim": config.dim,
        "head": config.n_heads,
        "kv_head": config.n_kv_heads,
        "head_dim": config.head_dim,
        "ffn": config.hidden_dim,
        "vocabulary": config.vocab_size,
        "expert": config.moe.num_experts if config.moe else 0,
        "rank": 3,
    }


@pytest.mark.parametrize("is_adapted", [False, True], ids=["", "adapted"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_a_walk_yields_the_catalogue(family: object, dtype: str, is_adapted: bool) -> None:
    model = model_of(family.config, dtype=dtype)
    model = adapted(model, rank=3) if is_adapted else model
    config = model.config
    catalogue = EXPERT_CATALOGUE if config.moe else CATALOGUE
    steps = list(model.steps(tokens_for(config, 6)))
    assert [step.name for step in steps] == list(step_names(config))
    pairs = 6 * config.moe.num_experts_per_tok if config.moe else 0
    for step in steps:
        kind = catalogue[step.name.rpartition(".")[2]]
        sizes = sizes_of(config, 6, len(step.key_positions or ()), pairs)
        assert (step.axes, step.formula) == (kind.axes, kind.formula)
        assert step.value.shape == tuple(sizes[axis] for axis in step.axes), step
        assert step.value.dtype == dtype, step
    assert {step.name.rpartition(".")[2] for step in steps} == {
        name
        for name in EXPERT_CATALOGUE
        if (is_adapted or "_lora_" not in name) and (config.moe or not name.startswith(("router_", "expert_")))
    }


def test_a_step_says_where_it_comes_from() -> None:
    model = adapted(model_of(FAMILIES["dense_windowed"].config))
    root = Path(mistral_ref.__file__).parents[1]
    for step in model.steps([1, 2]):
        file, line = step.source.split(":")
        short = re.sub("^.+(?=_lora)", "{name}", step.name.rpartition(".")[2])
        assert f'"{short}"' in (root / file).read_text().splitlines()[int(line) - 1], step.source


@settings(max_examples=40)
@given(configs(), st.integers(1, 20), st.sampled_from(["float32", "float64"]))
def test_stepping_without_editing_is_running(config: ModelConfig, n_tokens: int, dtype: str) -> None:
    model, tokens = model_of(config, dtype=dtype), tokens_for(config, n_tokens)
    walk = model.steps(tokens)
    values = [(step, step.value.copy()) for step in walk]
    np.testing.assert_array_equal(walk.logits, model.forward(tokens))
    for step, as_it_was in values:  # what a walk has shown stays as it was, and cannot be written to
        np.testing.assert_array_equal(step.value, as_it_was)
        assert not step.value.flags.writeable


def test_stepping_is_running_also_when_scores_are_computed_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(FAMILIES["dense_windowed"].config)
    tokens = tokens_for(model.config, 50)
    in_one = model.forward(tokens)
    monkeypatch.setattr("mistral_ref.reference_ops.SCORE_ELEMENTS", 700)  # 2 queries of 6 heads and 50 keys
    walk = model.steps(tokens)
    assert len(list(walk)) > 0
    np.testing.assert_array_equal(walk.logits, model.forward(tokens))
    np.testing.assert_allclose(walk.logits, in_one, rtol=0, atol=1e-5 * np.abs(in_one).max())


@given(configs(), st.integers(1, 12))
@settings(max_examples=30)
def test_attention_weights_are_a_distribution_over_the_window(config: ModelConfig, n_tokens: int) -> None:
    for step in model_of(config, dtype="float64").steps(tokens_for(config, n_tokens)):
        if step.name.endswith("attention_weights"):
            window = config.sliding_window[int(step.name.split(".")[1])] or n_tokens
            distance = np.arange(n_tokens)[:, np.newaxis] - np.array(step.key_positions)
            assert not step.value[:, (distance < 0) | (distance >= window)].any()
            np.testing.assert_allclose(step.value.sum(axis=-1), 1, rtol=1e-12)


def test_a_walk_from_a_cache_shows_the_positions_of_its_keys() -> None:
    model = model_of(FAMILIES["dense_windowed"].config)  # a window of 5
    cache = model.new_cache(chunk=3)
    model.forward(tokens_for(model.config, 20), cache)
    positions = {step.name: step.key_positions for step in model.steps([1, 2], cache)}
    assert positions["layers.1.scores"] == positions["layers.1.attention_weights"] == range(16, 22)
    assert positions["layers.1.q"] is None
    assert cache.length == 22


def test_replacing_a_value_changes_what_comes_after_and_nothing_before() -> None:
    model, tokens = model_of(FAMILIES["mixtral"].config), [5, 6, 7]
    plain = {step.name: step.value for step in model.steps(tokens)}
    walk = model.steps(tokens)
    for step in walk:
        if step.name == "layers.1.heads":
            step.value = np.zeros_like(step.value)
            assert not step.value.any()
        elif step.name.startswith("layers.1.attention_out"):
            assert not step.value.any()
        elif step.name in list(plain)[: list(plain).index("layers.1.heads")]:
            np.testing.assert_array_equal(step.value, plain[step.name])
    assert np.abs(walk.logits - plain["logits"]).max() > 0.01
    np.testing.assert_array_equal(model.forward(tokens, edits={"layers.1.heads": np.zeros_like}), walk.logits)


@pytest.mark.parametrize("name", list(step_names(FAMILIES["mixtral"].config)))
def test_every_step_can_be_edited(name: str) -> None:
    model, tokens = model_of(FAMILIES["mixtral"].config, dtype="float64"), [5, 6, 7]
    plain = model.forward(tokens)

    def reversed_tokens(value: np.ndarray) -> np.ndarray:
        axis = 1 if name.endswith(("scores", "attention_weights")) else 0
        return np.flip(value, axis)

    assert np.abs(model.forward(tokens, edits={name: reversed_tokens}) - plain).max() > 1e-6
    np.testing.assert_array_equal(model.forward(tokens, edits={name: lambda value: value}), plain)


def test_edited_attention_weights_may_look_beyond_the_window() -> None:
    model = model_of(FAMILIES["dense_windowed"].config, dtype="float64")
    tokens = tokens_for(model.config, 12)

    def all_on_first(weights_HTS: np.ndarray) -> np.ndarray:
        return np.eye(12)[np.zeros(weights_HTS.shape[:2], int)]

    walk = model.steps(tokens)
    for step in walk:
        if step.name == "layers.0.attention_weights":
            step.value = all_on_first(step.value)
        if step.name == "layers.0.v":
            v_TGK = step.value
        if step.name == "layers.0.heads":
            group = model.config.n_heads // model.config.n_kv_heads
            np.testing.assert_allclose(step.value, np.broadcast_to(v_TGK[:1].repeat(group, axis=1), step.value.shape))


def test_globs_edit_every_layer() -> None:
    model, seen = model_of(FAMILIES["dense_windowed"].config), []
    model.forward([1, 2], edits={"layers.*.ffn_out": lambda value: seen.append(value.shape) or value})
    assert seen == [(2, model.config.dim)] * 3


def test_a_list_of_edits_makes_each_in_its_turn() -> None:
    model = model_of(FAMILIES["dense_windowed"].config)
    name = "layers.1.ffn_out"
    edits = [(name, lambda x: x + np.float32(1)), ("layers.*.ffn_out", lambda x: x * np.float32(2)), (name, np.square)]
    trace, plain = model.trace([1, 2], edits=edits), model.trace([1, 2], edits={"layers.0.ffn_out": edits[1][1]})
    np.testing.assert_array_equal(trace[name], ((plain[name] + np.float32(1)) * np.float32(2)) ** 2)
    np.testing.assert_array_equal(trace["layers.0.ffn_out"], plain["layers.0.ffn_out"])


def test_an_edited_pass_appends_to_its_cache() -> None:
    model = model_of(FAMILIES["dense_windowed"].config, dtype="float64")
    cache, edits = model.new_cache(), {"layers.0.k": lambda k_TGK: -k_TGK}
    model.forward([1, 2, 3], cache, edits=edits)
    last = model.forward([4], cache, edits=edits, last_only=True)
    np.testing.assert_allclose(last, model.forward([1, 2, 3, 4], edits=edits)[-1:], atol=1e-9)


def test_an_abandoned_walk_leaves_the_cache_as_it_was() -> None:
    model = model_of(FAMILIES["interleaved_windows"].config, dtype="float64")
    tokens = tokens_for(model.config, 40)
    cache = model.new_cache(chunk=4)
    model.forward(tokens[:30], cache)
    n_steps = len(list(step_names(model.config)))
    for left_after in (1, n_steps // 2, n_steps):  # the last: shown every step, but never asked to go on
        with model.steps([3, 1, 4, 1], cache) as walk:
            for _ in range(left_after):
                next(walk)
        assert cache.length == 30
    continued = model.forward(tokens[30:], cache)
    np.testing.assert_allclose(continued, model.forward(tokens)[30:], atol=1e-9)


def test_an_interrupt_in_the_middle_of_a_pass_leaves_the_cache_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(FAMILIES["dense_windowed"].config, dtype="float64")
    tokens = tokens_for(model.config, 30)
    cache = model.new_cache(chunk=4)
    model.forward(tokens[:20], cache)
    swiglu, calls = model.ops.swiglu, []

    def interrupted(*args: np.ndarray) -> np.ndarray:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return swiglu(*args)

    monkeypatch.setattr(model.ops, "swiglu", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.forward(tokens[20:24], cache)
    assert cache.length == 20
    np.testing.assert_allclose(model.forward(tokens[20:], cache), model.forward(tokens)[20:], atol=1e-9)


def test_mistakes_in_edits_are_errors() -> None:
    model = model_of(FAMILIES["dense_windowed"].config)
    with refused(InputError, "step", "'layers.9.q'"):
        model.forward([1], edits={"layers.9.q": np.zeros_like})
    with refused(InputError, "step", "'router_logits'"):
        model.forward([1], edits={"router_logits": np.zeros_like})
    with refused(InputError, "layers.0.q", "float64", "float32", "(1, 6, 8)"):
        model.forward([1], edits={"layers.0.q": lambda q: q.astype(float)})
    with refused(InputError, "layers.0.q", "(1, 6, 7)", "(1, 6, 8)"):
        model.forward([1], edits={"layers.0.q": lambda q: q[..., 1:]})
    with pytest.raises(ValueError, match="read-only"):
        model.forward([1], edits={"layers.0.q": lambda q: q.fill(0)})
    with refused(InputError, "layers.0.q", "[[1], [2, 3]]", "array"):
        model.forward([1], edits={"layers.0.q": [[1], [2, 3]]})
    with refused(InputError, "edits", "['embedding']"):
        model.forward([1], edits=["embedding"])
    walk = model.steps([1])
    first, _ = next(walk), next(walk)
    with refused(InputError, "past", "embedding"):
        first.value = first.value * 2
    with refused(InputError, "end"):
        _ = walk.logits


@given(config=configs(), data=st.data())
@settings(max_examples=40, deadline=None)
def test_last_only_is_the_last_row(config: ModelConfig, data: st.DataObject) -> None:
    """Whatever chunks, windows and caches: the last layer skips what does not reach the last logits, nothing else."""
    model, tokens = model_of(config, dtype="float64"), tokens_for(config, data.draw(st.integers(1, 20)))
    cache = model.new_cache(chunk=data.draw(st.integers(1, 9)))
    expected, start = model.forward(tokens), 0
    for length in data.draw(chunkings(len(tokens), len(tokens))):
        logits_1V = model.forward(tokens[start : start + length], cache, last_only=True)
        start += length
        np.testing.assert_allclose(logits_1V, expected[start - 1 : start], rtol=0, atol=1e-9)
    assert cache.tokens == tokens


@pytest.mark.parametrize("family", ["dense_windowed", "mixtral"])
def test_which_tokens_the_steps_have_with_last_only(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(FAMILIES[family].config)
    tokens, last = np.array(tokens_for(model.config, 6)), f"layers.{model.config.n_layers - 1}."
    going = model.transformer.forward_steps(tokens, model.new_cache().begin(6), last_only=True)
    n_rows, value = {}, None
    with contextlib.suppress(StopIteration):
        while True:
            step = going.send(value)
            n_rows[step.name], value = len(step.value), step.value
    whole = {step.name: step.value.shape[0] for step in model.steps(tokens)}
    of_all = {f"{last}{name}" for name in ("attention_norm", "k", "v", "k_rotated")}
    for name, rows in n_rows.items():
        is_last = (name.startswith(last) or name in {"norm", "logits"}) and name not in of_all
        assert rows == (whole[name] // 6 if is_last else whole[name]), name


def test_whoever_watches_sees_all_tokens_also_with_last_only() -> None:
    model, seen = model_of(FAMILIES["dense_windowed"].config, dtype="float64"), []
    tokens = tokens_for(model.config, 6)

    def watched(value: np.ndarray) -> np.ndarray:
        seen.append(len(value))
        return value

    last = model.forward(tokens, edits={"layers.2.q": watched, "logits": watched}, last_only=True)
    assert seen == [6, 6]
    np.testing.assert_array_equal(last, model.forward(tokens)[-1:])


def test_a_walk_can_be_iterated_in_pieces() -> None:
    walk = model_of(FAMILIES["dense_windowed"].config).steps([1, 2])
    assert isinstance(walk, Walk)
    names = [next(walk).name, *(step.name for step in walk)]
    assert names[0] == "embedding"
    assert names[-1] == "logits"
    assert list(walk) == []
    assert walk.logits.shape == (2, 101)


def test_score_is_the_log_probability_of_each_next_token() -> None:
    model = model_of(FAMILIES["dense_windowed"].config, dtype="float64")
    tokens = tokens_for(model.config, 1100)  # more than two chunks
    logits = model.forward(tokens[:-1])
    expected = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    np.testing.assert_allclose(model.score(tokens), expected[np.arange(1099), tokens[1:]], atol=1e-9)
    assert model.score([3]).shape == (0,)


@pytest.mark.parametrize(
    ("tokens", "facts"),
    [
        ([], ("tokens", "[]", "at least one")),
        ([[1, 2]], ("tokens", "[[1, 2]]", "flat")),
        ([[1], [2, 3]], ("tokens", "[[1], [2, 3]]", "flat")),
        ([1.0], ("tokens", "[1.0]", "flat")),
        ([True], ("tokens", "[True]", "flat")),
        (None, ("tokens", "None", "flat")),
        ([2**70], ("tokens", f"[{2**70}]", "flat")),
        ([-1], ("token id", -1, "0 to 100")),
        ([0, 101], ("token id", 101, "0 to 100")),
        (np.zeros(2049, int), (2049, 2048)),
        ("text", ("tokenizer", "token ids")),
    ],
)
def test_tokens_are_checked(tokens: object, facts: tuple[object, ...]) -> None:
    model = model_of(FAMILIES["dense_windowed"].config)
    for call in (model.forward, model.steps, model.score, model.generate):
        with refused(InputError, *facts):
            call(tokens)


def test_positions_end_where_the_model_does() -> None:
    model = model_of(FAMILIES["dense_windowed"].config.replace(max_seq_len=10))
    cache = model.new_cache()
    model.forward([1] * 10, cache)
    with refused(InputError, "11 tokens", 10, "max_seq_len"):
        model.forward([1], cache)
