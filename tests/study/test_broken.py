"""Every broken model departs from the right one at the step that its bug claims, by far, and only where it should."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import FAMILIES, rows_in_halves, write_consolidated
from support.errors import refused
from support.tiny import configs, model_of, tokens_for

import mistral_ref
from mistral_ref import CacheError, InputError, KVCache, Model, ModelConfig
from mistral_ref.config import MixtureOfExperts
from mistral_ref.rope import inverse_frequencies
from mistral_ref.steps import step_names
from mistral_ref.study.broken import BUGS, broken, possible_bugs
from mistral_ref.transformer import drain
from mistral_ref.weights import Matrix, bf16_bits, bf16_values, with_matrices

CHUNK = 8
CONFIGS = {name: family.config for name, family in FAMILIES.items()}
IN_WINDOWED_LAYERS = (
    *("no-window", "extra-key", "one-key-less", "prompt-extra-key", "cache-key-less"),
    *("short-ring", "small-ring", "slot-order"),
)
# They depart only in a pass over a cache that holds something.
AFTER_A_FIRST_PASS = ("cache-key-less", "positions-restart", "short-ring", "slot-order")
SUBTLE = {"eps-default": 1e-7, "eps-outside": 1e-7, "norm-cast": 1e-4, "temperature-early": 1e-3}

NEMO = CONFIGS["nemo"]  # no window, grouped heads, and a head width of its own
WINDOWED = CONFIGS["dense_windowed"]  # 5 keys


CASES = [
    pytest.param(config, bug, id=f"{bug}-{family}")
    for family, config in CONFIGS.items()
    for bug in possible_bugs(model_of(config))
    if bug != "bos-twice"  # it changes the number of tokens
]


def broken_configs(bugs: Collection[str] = BUGS) -> st.SearchStrategy[tuple[ModelConfig, str]]:
    """Draw a configuration and one of these bugs that it can have."""
    cases = st.tuples(configs(), st.sampled_from([*bugs]))
    return cases.filter(lambda case: case[1] in possible_bugs(model_of(case[0])))


def steps_of(model: Model, tokens: Sequence[int], cache: KVCache | None = None) -> dict[str, np.ndarray]:
    return {step.name: step.value for step in model.steps(tokens, cache)}


def filled(model: Model, tokens: Sequence[int]) -> KVCache:
    cache = model.new_cache(chunk=CHUNK)
    model.forward(tokens, cache)
    return cache


def departures(right: dict[str, np.ndarray], wrong: dict[str, np.ndarray]) -> list[str]:
    """Return the names of the steps that differ in any bit."""
    return [name for name in right if not np.array_equal(right[name], wrong[name])]


def distance(right: np.ndarray, wrong: np.ndarray) -> float:
    return float(np.abs(right - wrong).max() / np.abs(right).max())


def expected_step(config: ModelConfig, bug: str) -> str:
    layer = 0
    if bug in IN_WINDOWED_LAYERS:
        layer = next(index for index, window in enumerate(config.sliding_window) if window)
    if bug == "window-everywhere":
        layer = config.sliding_window.index(None)
    if bug == "tied-head":
        return "logits"
    return f"layers.{layer}.{BUGS[bug].first_step}"


# ------------------------------------------------------------------------------------------------------ where it shows


def test_every_bug_is_described() -> None:
    assert len(BUGS) == 31
    names = {name.rpartition(".")[2] for config in CONFIGS.values() for name in step_names(config)}
    for name, bug in BUGS.items():
        assert re.fullmatch(r"[a-z]+8?(-[a-z]+)*", name)
        assert bug.sentence.endswith(".")
        assert bug.cure.endswith(".")
        assert bug.first_step in names
        assert re.fullmatch(r"(\w[\w.-]*#\d+(, (?!$))?)*", bug.seen_in)
        assert "lambda" not in repr(bug)


def test_some_family_shows_every_bug() -> None:
    assert {case.values[1] for case in CASES} == {*BUGS} - {"bos-twice", "fp8-unscaled"}  # these have their own tests


@pytest.mark.parametrize(("config", "bug"), CASES)
def test_it_departs_first_where_it_says_and_by_far(config: ModelConfig, bug: str) -> None:
    right = model_of(config, dtype="float64")
    wrong = broken(right, bug)
    tokens = tokens_for(config, 50)  # the widest window has 24 keys, and the temperature rises at 48
    right_steps, wrong_steps = (
        steps_of(model, tokens[-CHUNK:], filled(model, tokens[:-CHUNK]))
        if bug in AFTER_A_FIRST_PASS
        else steps_of(model, tokens)
        for model in (right, wrong)
    )
    assert departures(right_steps, wrong_steps)[0] == expected_step(config, bug)
    assert distance(right_steps["logits"], wrong_steps["logits"]) > SUBTLE.get(bug, 1e-2)


@pytest.mark.parametrize(("config", "bug"), CASES)
def test_passes_over_a_cache_are_broken_too(config: ModelConfig, bug: str) -> None:
    right = model_of(config, dtype="float64")
    wrong = broken(right, bug)
    tokens = tokens_for(config, 56)
    right_logits, wrong_logits = (model.forward(tokens, model.new_cache(chunk=CHUNK)) for model in (right, wrong))
    if (
        bug == "prompt-extra-key" and max(filter(None, config.sliding_window)) >= CHUNK
    ):  # the first pass has no such key
        np.testing.assert_array_equal(wrong_logits, right_logits)
    else:
        assert distance(right_logits, wrong_logits) > SUBTLE.get(bug, 1e-3)


# --------------------------------------------------------------------------------------------- where it should not show


@pytest.mark.parametrize(
    ("bug", "config", "hidden", "shown"),
    [
        pytest.param("not-causal", NEMO, [1] * 6, [1, 2], id="not-causal: token by token"),
        pytest.param("no-window", WINDOWED, [5], [6], id="no-window: W tokens"),
        pytest.param("extra-key", WINDOWED, [3, 2], [3, 3], id="extra-key: W tokens"),
        pytest.param("one-key-less", WINDOWED, [4], [5], id="one-key-less: W - 1 tokens"),
        pytest.param("row-order", NEMO, [1], [2], id="row-order: position 0"),
        pytest.param("theta", NEMO, [1], [2], id="theta: position 0"),
        pytest.param("positions-restart", NEMO, [8], [7, 1], id="positions-restart: one pass"),
        pytest.param("short-ring", WINDOWED, [8, 3], [8, 8], id="short-ring: not wrapped"),
        pytest.param("short-ring", WINDOWED, [7] * 6, [7] * 5 + [8], id="short-ring: no full pass"),
    ],
)
def test_where_it_does_not_show_and_the_next_call_where_it_does(
    bug: str, config: ModelConfig, hidden: list[int], shown: list[int]
) -> None:
    right = model_of(config, dtype="float64")
    wrong = broken(right, bug)
    tokens = tokens_for(config, sum(shown) + sum(hidden))

    def after(model: Model, calls: list[int]) -> np.ndarray:
        cache = model.new_cache(chunk=CHUNK)
        return np.concatenate([model.forward(tokens[: cache.length + n][-n:], cache) for n in calls])

    if bug == "row-order":  # at position 0 nothing is turned, and only the order of the sums is another
        np.testing.assert_allclose(after(right, hidden), after(wrong, hidden), rtol=1e-9, atol=1e-9)
    else:
        np.testing.assert_array_equal(after(right, hidden), after(wrong, hidden))
    assert distance(after(right, shown), after(wrong, shown)) > 1e-4


@pytest.mark.parametrize("bug", AFTER_A_FIRST_PASS)
def test_a_bug_of_the_cache_does_not_show_without_one(bug: str) -> None:
    right = model_of(WINDOWED, dtype="float64")
    tokens = tokens_for(WINDOWED, 40)
    np.testing.assert_array_equal(broken(right, bug).forward(tokens), right.forward(tokens))


# ------------------------------------------------------------------------------------- that it is this bug and no other


def naive_attention(
    steps: dict[str, np.ndarray],
    kv_head: Callable[[int], int],
    scale: float,
    sees: Callable[[int, int], bool],
) -> np.ndarray:
    """Return the heads of layer 0 of a pass without a cache, head by head and query by query, by the rules given."""
    q_THK, k_TGK, v_TGK = (steps[f"layers.0.{name}"] for name in ("q_rotated", "k_rotated", "v"))
    heads_THK = np.empty_like(q_THK)
    for i, h in np.ndindex(q_THK.shape[:2]):
        seen = [j for j in range(len(k_TGK)) if sees(i, j)]
        e = np.exp([q_THK[i, h] @ k_TGK[j, kv_head(h)] * scale for j in seen])
        heads_THK[i, h] = sum(w * v_TGK[j, kv_head(h)] for w, j in zip(e / e.sum(), seen, strict=True))
    return heads_THK


@given(
    case=broken_configs(["not-causal", "no-window", "extra-key", "one-key-less", "tiled-heads", "wrong-scale"]),
    n_tokens=st.integers(1, 12),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60)
def test_attention_is_wrong_by_the_rule(case: tuple[ModelConfig, str], n_tokens: int, seed: int) -> None:
    config, bug = case
    n_heads, n_kv_heads, window = config.n_heads, config.n_kv_heads, n_tokens
    if config.sliding_window[0] is not None and bug != "no-window":
        window = config.sliding_window[0] + {"extra-key": 1, "one-key-less": -1}.get(bug, 0)
    least = -n_tokens if bug == "not-causal" else 0
    steps = steps_of(broken(model_of(config, seed, "float64"), bug), tokens_for(config, n_tokens, seed))
    expected = naive_attention(
        steps,
        kv_head=(lambda h: h % n_kv_heads) if bug == "tiled-heads" else (lambda h: h // (n_heads // n_kv_heads)),
        scale=(config.dim / n_heads if bug == "wrong-scale" else config.head_dim) ** -0.5,
        sees=lambda i, j: least <= i - j < window,
    )
    np.testing.assert_allclose(steps["layers.0.heads"], expected, rtol=1e-9, atol=1e-9)


def turned(x_THK: np.ndarray, theta: float, positions: Sequence[int]) -> np.ndarray:
    """Return pairs of neighbours turned as complex numbers: x · exp(i p theta^(-2j/K))."""
    angle = np.outer(positions, theta ** (-np.arange(0, x_THK.shape[-1], 2) / x_THK.shape[-1]))
    return (x_THK[..., ::2] + 1j * x_THK[..., 1::2]) * np.exp(1j * angle)[:, np.newaxis]


@pytest.mark.parametrize(
    ("bug", "theta", "positions"),
    [("theta", 1e4, range(8, 14)), ("positions-restart", NEMO.rope_theta, range(6))],
)
def test_rotation_is_wrong_by_the_rule(bug: str, theta: float, positions: Sequence[int]) -> None:
    wrong, tokens = broken(model_of(NEMO, dtype="float64"), bug), tokens_for(NEMO, 14)
    steps = steps_of(wrong, tokens[8:], filled(wrong, tokens[:8]))
    for name in ("q", "k"):
        found = steps[f"layers.1.{name}_rotated"]
        expected = turned(steps[f"layers.1.{name}"], theta, positions)
        np.testing.assert_allclose(found[..., ::2] + 1j * found[..., 1::2], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("family", "factor"), [("ministral3", 0.1 * np.log(16) + 1), ("yarn_mistral", 1.0)])
def test_yarn_has_the_other_scale(family: str, factor: float) -> None:
    config = CONFIGS[family]
    steps = steps_of(broken(model_of(config, dtype="float64"), "yarn-scale"), tokens_for(config, 6))
    lengths = (np.linalg.norm(steps[f"layers.0.{name}"], axis=-1) for name in ("k_rotated", "k"))
    np.testing.assert_allclose(np.divide(*lengths), factor)


def test_yarn_has_the_usual_ramp() -> None:
    config = CONFIGS["ministral3"]
    usual = dataclasses.replace(config.yarn, beta_fast=32, beta_slow=1)
    right, wrong = inverse_frequencies(1e6, 24, config.yarn), inverse_frequencies(1e6, 24, usual)
    k_TGK, turned_TGK = (
        steps_of(broken(model_of(config, dtype="float64"), "yarn-ramp"), tokens_for(config, 2))[f"layers.0.{name}"]
        for name in ("k", "k_rotated")
    )
    pairs = [x_TGK[1, 0, ::2] + 1j * x_TGK[1, 0, 1::2] for x_TGK in (k_TGK, turned_TGK)]
    np.testing.assert_allclose(np.angle(pairs[1] / pairs[0]), wrong, atol=1e-12)
    assert np.abs(right - wrong).max() > 1e-4


def test_pairs_are_those_of_the_other_layout() -> None:
    right = model_of(NEMO, dtype="float64")
    tokens = tokens_for(NEMO, 6)
    q_right, q_wrong = (steps_of(model, tokens)["layers.0.q"] for model in (right, broken(right, "row-order")))
    first_half, second_half = np.split(q_right, 2, axis=-1)  # rows are interleaved, and taken for halves
    np.testing.assert_array_equal(q_wrong[..., ::2], first_half)
    np.testing.assert_array_equal(q_wrong[..., 1::2], second_half)
    halves = Model(NEMO.replace(rope_row_order="halves"), right.weights, right.ops)
    np.testing.assert_array_equal(broken(halves, "row-order").forward(tokens), right.forward(tokens))


def test_shares_of_experts_do_not_add_up() -> None:
    config = CONFIGS["mixtral"]
    steps = steps_of(broken(model_of(config, dtype="float64"), "experts-unnormalised"), tokens_for(config, 9))
    for r_E, e_E in zip(steps["layers.0.router_logits"], steps["layers.0.expert_weights"], strict=True):
        shares_E, chosen = np.exp(r_E) / np.exp(r_E).sum(), np.argsort(r_E)[-2:]
        np.testing.assert_allclose(e_E[chosen], shares_E[chosen])
        assert np.count_nonzero(e_E) == 2


def test_the_newest_key_lies_over_the_oldest(tmp_path: Path) -> None:
    right = model_of(WINDOWED, dtype="float64")
    wrong, tokens, window = broken(right, "short-ring"), tokens_for(WINDOWED, 40), 5
    caches = [filled(model, tokens[:-CHUNK]) for model in (right, wrong)]
    assert [cache.rings[0].capacity for cache in caches] == [window + CHUNK - 1, window + CHUNK - 2]
    caches[1].save(tmp_path / "cache")
    right_steps = steps_of(right, tokens[-CHUNK:], caches[0])
    for cache in (wrong.load_cache(tmp_path / "cache"), caches[1]):
        steps = steps_of(wrong, tokens[-CHUNK:], cache)
        scores_HTS = steps["layers.0.scores"].copy()
        newest_HK = np.repeat(steps["layers.0.k_rotated"][-1], 3, axis=0)  # three query heads read each key head
        expected = np.sum(steps["layers.0.q_rotated"][0] * newest_HK, axis=-1) * WINDOWED.head_dim**-0.5
        np.testing.assert_allclose(scores_HTS[:, 0, 0], expected)
        scores_HTS[:, 0, 0] = right_steps["layers.0.scores"][:, 0, 0]
        np.testing.assert_allclose(scores_HTS, right_steps["layers.0.scores"])


def test_a_layer_without_a_window_keeps_everything() -> None:
    config = CONFIGS["interleaved_windows"]
    model = broken(model_of(config), "short-ring")
    assert [ring.max_capacity for ring in model.new_cache(chunk=4).rings] == [None, 8, 8, 8]
    assert [ring.max_capacity for ring in model.new_cache(chunk=4, max_tokens=7).rings] == [7] * 4
    for bug, windows in {
        "no-window": (None,) * 4,
        "extra-key": (None, 7, 7, 7),
        "one-key-less": (None, 5, 5, 5),
    }.items():
        assert broken(model_of(config), bug).config.sliding_window == windows


def test_rows_are_reordered_once_too_often() -> None:
    right, tokens = model_of(NEMO, dtype="float64"), tokens_for(NEMO, 6)
    right_steps, wrong_steps = (steps_of(model, tokens) for model in (right, broken(right, "permuted-twice")))
    for name in ("layers.0.q", "layers.0.k"):
        first_of_pairs, second_of_pairs = right_steps[name][..., ::2], right_steps[name][..., 1::2]
        np.testing.assert_array_equal(wrong_steps[name], np.concatenate([first_of_pairs, second_of_pairs], axis=-1))
    np.testing.assert_array_equal(wrong_steps["layers.0.v"], right_steps["layers.0.v"])


def test_keys_are_reordered_by_the_number_of_query_heads() -> None:
    right, tokens = model_of(NEMO, dtype="float64"), tokens_for(NEMO, 6)
    k_TGK = steps_of(right, tokens)["layers.0.k"]
    published_TO = np.concatenate([k_TGK[..., ::2], k_TGK[..., 1::2]], axis=-1).reshape(6, -1)  # each head in halves
    halves = published_TO.reshape(6, NEMO.n_heads, 2, -1)  # right would be n_kv_heads
    expected = np.stack([halves[:, :, 0], halves[:, :, 1]], axis=-1).reshape(k_TGK.shape)
    np.testing.assert_array_equal(steps_of(broken(right, "keys-permuted-as-queries"), tokens)["layers.0.k"], expected)


@pytest.mark.parametrize("bug", ["permuted-twice", "keys-permuted-as-queries"])
def test_rows_are_wrong_alike_in_both_layouts(bug: str) -> None:
    ours = model_of(NEMO, dtype="float64")

    def published(matrix: Matrix) -> Matrix:
        n_heads = {"wq": NEMO.n_heads, "wk": NEMO.n_kv_heads}.get(matrix.name[-2:])
        return matrix if n_heads is None else dataclasses.replace(matrix, data=rows_in_halves(matrix.data, n_heads))

    weights = with_matrices(ours.weights, published)
    theirs = Model(NEMO.replace(rope_row_order="halves"), weights, ours.ops)
    tokens = tokens_for(NEMO, 9)
    found, expected = (broken(model, bug).forward(tokens) for model in (theirs, ours))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("bug", "of_queries", "of_keys"),
    [
        ("no-temperature", lambda p: 1.0, lambda p: 1.0),
        ("temperature-on-keys", lambda p: 1.0, lambda p: 1 + 0.1 * np.log(1 + p // 48)),
        ("temperature-early", lambda p: 1 + 0.1 * np.log(1 + (p + 1) // 48), lambda p: 1.0),
    ],
)
def test_temperature_is_wrong_by_the_rule(
    bug: str, of_queries: Callable[[int], float], of_keys: Callable[[int], float]
) -> None:
    config = CONFIGS["ministral3"]
    steps = steps_of(broken(model_of(config, dtype="float64"), bug), tokens_for(config, 100))
    for name, scale in (("q", of_queries), ("k", of_keys)):
        before, after = (np.linalg.norm(steps[f"layers.0.{name}{end}"], axis=-1) for end in ("", "_rotated"))
        np.testing.assert_allclose(after, before * [[scale(p)] for p in range(100)])


@pytest.mark.parametrize(
    ("bug", "rule"),
    [
        ("eps-default", lambda x: x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)),
        ("eps-outside", lambda x: x / (np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + 1e-5)),
        (
            "norm-cast",
            lambda x: bf16_values(bf16_bits(x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-5))),
        ),
    ],
)
def test_norms_are_wrong_by_the_rule(bug: str, rule: Callable[[np.ndarray], np.ndarray]) -> None:
    wrong = broken(model_of(NEMO, dtype="float64"), bug)
    steps = steps_of(wrong, tokens_for(NEMO, 6))
    expected = rule(steps["embedding"]).astype(np.float64) * wrong.weights.layers[0].attention_norm
    np.testing.assert_allclose(steps["layers.0.attention_norm"], expected, rtol=1e-12)


def test_raw_logits_are_shares() -> None:
    config = CONFIGS["mixtral"]
    steps = steps_of(broken(model_of(config, dtype="float64"), "experts-raw"), tokens_for(config, 9))
    for r_E, e_E in zip(steps["layers.0.router_logits"], steps["layers.0.expert_weights"], strict=True):
        chosen = np.argsort(r_E)[-2:]
        np.testing.assert_array_equal(e_E[chosen], r_E[chosen])
        assert np.count_nonzero(e_E) == 2


def test_a_second_bos_is_a_token_more() -> None:
    right = model_of(NEMO, dtype="float64")
    wrong, tokens = broken(right, "bos-twice"), [1, *tokens_for(NEMO, 5)]
    np.testing.assert_array_equal(wrong.forward(tokens), right.forward([1, *tokens]))
    np.testing.assert_array_equal(wrong.forward(wrong.token_ids(tokens)), right.forward([1, *tokens]))
    np.testing.assert_array_equal(wrong.forward(tokens[1:]), right.forward(tokens[1:]))


def test_fp8_weights_lose_their_scales(tmp_path: Path) -> None:
    write_consolidated(tmp_path, FAMILIES["nemo"], fp8=True)
    right = mistral_ref.load(tmp_path, dtype="float64")
    wrong, matrix = broken(right, "fp8-unscaled"), right.weights.layers[0].wq
    tokens = tokens_for(NEMO, 6)
    right_steps, wrong_steps = steps_of(right, tokens), steps_of(wrong, tokens)
    assert departures(right_steps, wrong_steps)[0] == "layers.0.q"
    np.testing.assert_allclose(wrong_steps["layers.0.q"] * matrix.scale, right_steps["layers.0.q"])


@pytest.mark.parametrize(("bug", "first", "later"), [("prompt-extra-key", 6, 5), ("cache-key-less", 5, 4)])
def test_windows_of_the_first_pass_and_of_later_ones(bug: str, first: int, later: int) -> None:
    wrong, tokens = broken(model_of(WINDOWED, dtype="float64"), bug), tokens_for(WINDOWED, 24)
    cache = wrong.new_cache(chunk=CHUNK)
    for expected in (first, later, later):
        scores_HTS = steps_of(wrong, tokens[cache.length : cache.length + CHUNK], cache)["layers.0.scores"]
        assert np.isfinite(scores_HTS[0, -1]).sum() == expected


@pytest.mark.parametrize(("bug", "n_slots"), [("small-ring", 5), ("slot-order", 12)])
def test_keys_come_from_the_slots_that_the_bug_says(bug: str, n_slots: int) -> None:
    right = model_of(WINDOWED, dtype="float64")
    wrong, tokens = broken(right, bug), tokens_for(WINDOWED, 40)
    k_TGK = steps_of(right, tokens)["layers.0.k_rotated"]  # the keys of layer 0 are right: they see no attention
    scores_HTS = steps_of(wrong, tokens[-CHUNK:], filled(wrong, tokens[:-CHUNK]))["layers.0.scores"]
    positions = np.arange(32 - 4, 40)
    if bug == "small-ring":  # the newest position in the slot of each
        positions = np.array([max(q for q in range(40) if q % n_slots == p % n_slots) for p in positions])
    else:
        positions = positions[np.argsort(positions % n_slots)]
    q_THK = steps_of(right, tokens)["layers.0.q_rotated"][-CHUNK:]
    expected = np.einsum("thk,shk->hts", q_THK, np.repeat(k_TGK[positions], 3, axis=1)) * WINDOWED.head_dim**-0.5
    seen = np.isfinite(scores_HTS)
    np.testing.assert_allclose(scores_HTS[seen], expected[seen])


# --------------------------------------------------------------------------------------------- a model like any other


@given(
    case=broken_configs(),
    chunk=st.integers(1, 5),
    n_calls=st.integers(1, 6),
    dtype=st.sampled_from(["float32", "float64"]),
)
@settings(max_examples=60)
def test_an_observed_pass_is_the_unobserved_one(
    case: tuple[ModelConfig, str], chunk: int, n_calls: int, dtype: str
) -> None:
    config, bug = case
    model, tokens = broken(model_of(config, dtype=dtype), bug), tokens_for(config, chunk * n_calls)
    drained, walked = model.new_cache(chunk=chunk), model.new_cache(chunk=chunk)
    for start in range(0, len(tokens), chunk):
        part = tokens[start : start + chunk]
        logits_TV = drain(model.transformer.forward_steps(np.array(part), drained.begin(len(part))), model.ops)
        steps = steps_of(model, part, walked)
        np.testing.assert_array_equal(steps["logits"], logits_TV)
        assert {value.dtype.name for value in steps.values()} == {dtype}


@pytest.mark.parametrize(("config", "bug"), CASES)
def test_the_right_model_stays_right(config: ModelConfig, bug: str) -> None:
    right, tokens = model_of(config), tokens_for(config, 12)
    before, ops, weights = right.forward(tokens), right.ops, right.weights
    wrong = broken(right, bug)
    wrong.forward(tokens)
    assert wrong is not right
    assert right.weights is weights
    assert (right.config, right.ops) == (config, ops)
    np.testing.assert_array_equal(right.forward(tokens), before)


def test_it_says_that_it_is_broken() -> None:
    wrong = broken(model_of(NEMO), "tiled-heads")
    assert wrong.ops.name == "numpy, broken: tiled-heads"
    assert "float32 by numpy, broken: tiled-heads" in repr(wrong)
    right = model_of(NEMO)
    with refused(CacheError, "another model"):
        right.forward([1], broken(right, "tiled-heads").new_cache())


def test_settings_of_the_operations_are_kept() -> None:
    ops = mistral_ref.load(backend="numpy", threads=1, rope_angles="float32").ops
    model = Model(NEMO, model_of(NEMO).weights, ops)
    wrong = broken(model, "not-causal")
    np.testing.assert_array_equal(wrong.forward([5]), model.forward([5]))  # nothing comes after it
    assert wrong.ops.angles == "float32"
    assert wrong.ops.threads == 1


def test_a_numba_model_is_broken_with_numpy() -> None:
    tokens = tokens_for(NEMO, 12)
    wrong = broken(model_of(NEMO, backend="numba"), "tiled-heads")
    np.testing.assert_array_equal(wrong.forward(tokens), broken(model_of(NEMO), "tiled-heads").forward(tokens))


@pytest.mark.slow
def test_the_demonstration_model() -> None:
    model = mistral_ref.load(backend="numpy", threads=1)
    text = model.complete("Once upon a time", max_tokens=40)
    tokens = model.token_ids("Once upon a time" + text) * 3  # twice the window
    for bug in BUGS:
        if bug not in possible_bugs(model):
            with refused(InputError, "model", f"'{bug}'", BUGS[bug].needs):
                broken(model, bug)
            continue
        wrong = broken(model, bug)
        assert wrong.tokenizer is model.tokenizer
        assert wrong.eos_ids == model.eos_ids
        logits = [m.forward(tokens, m.new_cache(chunk=66))[-135:] for m in (model, wrong)]  # the window has 64 keys
        assert distance(*logits) > SUBTLE.get(bug, 1e-4)
        assert wrong.complete("Once upon a time", max_tokens=3)
    assert broken(model, "tiled-heads").complete("Once upon a time", max_tokens=40) != text


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("bug", ["nothing", "Theta", None, 3, ["theta"]])
def test_an_unknown_bug_is_refused_with_the_list(bug: object) -> None:
    with refused(InputError, "bug", repr(bug), ", ".join(BUGS)):
        broken(model_of(NEMO), bug)


def test_a_broken_model_is_not_broken_again() -> None:
    with refused(InputError, "broken: theta", "already"):
        broken(broken(model_of(NEMO), "theta"), "not-causal")


MOE = MixtureOfExperts(num_experts=2, num_experts_per_tok=2)
FACTOR_1 = dataclasses.replace(CONFIGS["ministral3"].yarn, factor=1)


@pytest.mark.parametrize(
    ("bug", "config", "why"),
    [
        ("no-window", NEMO, "a sliding window"),
        ("extra-key", NEMO, "a sliding window"),
        ("one-key-less", NEMO, "windows of at least 2"),
        ("one-key-less", WINDOWED.replace(sliding_window=(3, None, 1)), "windows of at least 2"),
        ("short-ring", NEMO, "windows of at least 2"),
        ("short-ring", WINDOWED.replace(sliding_window=(3, None, 1)), "windows of at least 2"),
        ("tiled-heads", CONFIGS["llama"], "1 < n_kv_heads < n_heads"),
        ("tiled-heads", CONFIGS["tied_multi_query"], "1 < n_kv_heads < n_heads"),
        ("wrong-scale", CONFIGS["dense_no_window"], "head_dim unlike dim / n_heads"),
        ("row-order", NEMO.replace(head_dim=2), "head_dim above 2"),
        ("permuted-twice", NEMO.replace(head_dim=2), "head_dim above 2"),
        ("keys-permuted-as-queries", NEMO.replace(n_kv_heads=4), "n_kv_heads < n_heads"),
        ("keys-permuted-as-queries", NEMO.replace(n_kv_heads=1, head_dim=6), "whole pairs"),
        ("window-everywhere", WINDOWED, "with and without"),
        ("yarn-ramp", CONFIGS["yarn_mistral"], "32 and 1"),
        ("no-temperature", NEMO, "query temperature"),
        ("tied-head", CONFIGS["ministral3"], "output matrix"),
        ("fp8-unscaled", NEMO, "fp8"),
        ("theta", NEMO.replace(head_dim=2), "head_dim above 2"),
        ("yarn-scale", NEMO, "YaRN"),
        ("yarn-scale", NEMO.replace(yarn=FACTOR_1), "factor above 1"),
        ("experts-unnormalised", NEMO, "more experts"),
        ("experts-unnormalised", NEMO.replace(moe=MOE), "more experts"),
    ],
)
def test_a_model_that_cannot_have_it_is_refused(bug: str, config: ModelConfig, why: str) -> None:
    with refused(InputError, "model", f"'{bug}'", why):
        broken(model_of(config), bug)


def test_no_bug_at_all_is_refused() -> None:
    with refused(InputError, "bug"):
        broken(model_of(NEMO))


def test_several_bugs_at_once() -> None:
    right, tokens = model_of(CONFIGS["ministral3"], dtype="float64"), tokens_for(CONFIGS["ministral3"], 60)
    wrong = broken(right, "yarn-scale", "tiled-heads", "eps-outside", "tiled-heads")
    assert wrong.ops.name == "numpy, broken: yarn-scale, tiled-heads, eps-outside, tiled-heads"
    apart = broken(Model(wrong.config, right.weights, right.ops), "tiled-heads", "eps-outside")
    np.testing.assert_array_equal(wrong.forward(tokens), apart.forward(tokens))
    for bug in ("tiled-heads", "eps-outside"):
        assert distance(wrong.forward(tokens), broken(right, bug, "yarn-scale").forward(tokens)) > 1e-8


def test_what_is_refused_would_not_show() -> None:
    """Where both rules are the same for a model, the bug's own computation gives the right logits."""
    for config in (NEMO.replace(n_kv_heads=4), NEMO.replace(n_kv_heads=1)):
        right = model_of(config, dtype="float64")
        wrong = Model(config, right.weights, BUGS["tiled-heads"]._ops("tiled-heads", right))
        tokens = tokens_for(config, 9)
        np.testing.assert_allclose(wrong.forward(tokens), right.forward(tokens))
