"""Two passes side by side: distances worked by hand, the first step that departs, and every faulty step by itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.checkpoints import FAMILIES, write_tensor_file
from support.errors import refused
from support.tiny import BACKENDS, configs, model_of, tokens_for

from mistral_ref import InputError, Model, Trace
from mistral_ref.compare import DEFAULT_BOUND, OWN_BOUND, Comparison, Difference, compare_walks, difference
from mistral_ref.config import ModelConfig
from mistral_ref.measure.synthetic import encoded
from mistral_ref.reference_ops import ReferenceOps
from mistral_ref.steps import CATALOGUE, Step, step_names
from mistral_ref.weights import Matrix

DENSE = FAMILIES["dense_windowed"].config
MIXTURE = FAMILIES["mixtral_windowed"].config
INF, NAN = math.inf, math.nan


def between(value: list[float], reference: list[float], bound: float = 1.0) -> Difference:
    return difference("x", np.array(value), np.array(reference), bound)


# ------------------------------------------------------------------------------------------------- one step, by hand


def test_a_difference_by_hand() -> None:
    """Of 1, -6, 0.25 and 1, -4, 0.5: |a - b| is 0, 2, 0.25; the largest of the reference, 4, has a gap of 2^-21."""
    value, reference = np.array([[1.0, -6.0], [0.25, 0.0]], np.float32), np.array([[1.0, -4.0], [0.5, 0.0]])
    found = difference("layers.0.q", value, reference, bound=0.25 * 2**21)
    assert found == Difference("layers.0.q", 2.0, 0.5, 2 * 2**21, (0, 1), (0, 1), -6.0, -4.0)
    assert found.departs
    assert difference("q", value, reference, bound=2**19 - 1).first == (0, 1)
    assert difference("q", value[::-1], reference[::-1], bound=2**19 - 1).first == (0, 0)  # not the largest
    assert difference("q", value[::-1], reference[::-1], bound=2**19 - 1).worst == (1, 1)


def test_an_element_at_the_bound_does_not_depart() -> None:
    gap = 2.0**-23  # of float32 at 1
    value, reference = [1 + 4 * gap, 0.5], [1.0, 0.5]
    assert between(value, reference, bound=4).first is None
    assert not between(value, reference, bound=4).departs
    assert between(value, reference, bound=3.999).first == (0,)
    assert between(value, reference, bound=4).ulps == 4
    assert between(value, reference, bound=0).first == (0,)
    assert between(value, reference, bound=INF).first is None


def test_the_relative_difference_counts_small_values_as_large_ones() -> None:
    found = between([1e6, 1e-3], [1e6 + 1, -1e-3])
    assert (found.max_abs, found.worst, found.max_rel) == (1.0, (0,), 2.0)
    assert between([3.0], [0.0]).max_rel == 1.0
    assert between([0.0, 4.0], [0.0, 5.0]).max_rel == 0.2


@pytest.mark.parametrize("same", [0.0, -0.0, 1.0, NAN, INF, -INF, 5e-324])
def test_what_is_the_same_does_not_differ(same: float) -> None:
    found = between([same, 1.0], [same, 1.0], bound=0)
    assert (found.max_abs, found.max_rel, found.ulps) == (0, 0, 0)
    assert (found.worst, found.first) == (None, None)
    np.testing.assert_equal((found.value, found.expected), (same, same))
    assert between([0.0], [-0.0], bound=0).first is None


@pytest.mark.parametrize(
    ("value", "reference"),
    [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, -INF), (INF, -INF), (NAN, INF), (-INF, NAN), (0.0, INF), (NAN, 0.0)],
)
def test_what_is_no_number_in_one_of_the_two_is_infinitely_far(value: float, reference: float) -> None:
    found = between([1.0, value, 2.0], [1.0, reference, 2.5], bound=1e30)
    assert (found.max_abs, found.max_rel, found.ulps) == (INF, INF, INF)
    assert found.worst == found.first == (1,)
    np.testing.assert_equal((found.value, found.expected), (value, reference))


def test_values_out_of_sight_in_both_hide_nothing() -> None:
    found = between([-INF, 1.0, NAN, -INF], [-INF, 1.5, NAN, -INF], bound=0)
    assert (found.max_abs, found.max_rel, found.worst, found.first) == (0.5, 0.5 / 1.5, (1,), (1,))
    assert found.ulps == 0.5 * 2**23
    all_hidden = between([-INF, -INF], [-INF, -INF])
    assert (all_hidden.max_abs, all_hidden.worst) == (0.0, None)
    assert between([0.0, -INF], [NAN, -INF]).ulps == INF  # without a finite value in the reference


def test_beside_zeros_and_subnormals_one_ulp_is_the_smallest_number() -> None:
    smallest = 2.0**-149
    assert between([smallest, 0.0], [0.0, 0.0], bound=1).first is None
    assert between([2 * smallest, 0.0], [0.0, 0.0], bound=1).first == (0,)
    assert between([3 * smallest], [5 * smallest]).ulps == 2
    assert between([2.0**-126], [0.0]).ulps == 2**23
    assert between([2.0**-126], [2.0**-126 + smallest]).ulps == 1
    assert between([0.0, 0.0], [0.0, 0.0]).ulps == 0


def test_values_beyond_float32_are_measured_too() -> None:
    """By its last gap, 2^104."""
    largest = float(np.finfo(np.float32).max)
    assert between([largest], [largest - 2.0**104]).ulps == 1
    assert between([largest - 2.0**105], [largest]).ulps == 2
    assert between([1e39], [2e39]).ulps == 1e39 / 2.0**104
    assert between([1e39], [2e39]).departs
    assert between([1.5e308], [-1.5e308]).ulps == INF


def test_numbers_with_strange_bits_raise_no_warning() -> None:
    signalling = np.array([0x7F800001, 0x3F800000], np.uint32).view(np.float32)
    assert difference("x", signalling, signalling, 0).first is None
    assert difference("x", signalling, np.ones(2, np.float32), 0).first == (0,)


def test_nothing_does_not_differ_from_nothing() -> None:
    found = difference("layers.0.gate", np.zeros((0, 4)), np.zeros((0, 4)), 0)
    assert (found.max_abs, found.ulps, found.worst, found.first) == (0, 0, None, None)


@pytest.mark.parametrize("bound", [-1, NAN, -INF])
def test_a_bound_has_to_be_one(bound: float) -> None:
    with refused(InputError, "bound", bound, "number", 0):
        between([1.0], [1.0], bound)
    model = model_of(DENSE)
    with refused(InputError, "bound", bound):
        compare_walks(model.steps([1]), model.steps([1]), bound=bound)
    with refused(InputError, "bound", bound):
        model.trace([1]).compare(model.trace([1]), bound=bound)


def test_shapes_have_to_be_the_same() -> None:
    with refused(InputError, "x", "(2,)", "(1,)"):
        between([1.0, 2.0], [1.0])


FLOATS = st.floats(width=32) | st.floats() | st.sampled_from([0.0, -0.0, INF, -INF, NAN, 2.0**-149, 3e38, 1e300])


@given(st.lists(st.tuples(FLOATS, FLOATS) | FLOATS.map(lambda x: (x, x)), min_size=1, max_size=6), st.floats(0, 1e9))
def test_a_difference_is_what_a_loop_finds(pairs: list[tuple[float, float]], bound: float) -> None:
    value, reference = (list(side) for side in zip(*pairs, strict=True))
    found = between(value, reference, bound)
    distances = []
    for a, b in pairs:
        same = a == b or (math.isnan(a) and math.isnan(b))
        distances.append(0.0 if same else abs(a - b) if math.isfinite(a - b) else INF)
    largest = max((abs(b) for b in reference if math.isfinite(b)), default=0.0)
    _, exponent = math.frexp(np.float32(max(min(largest, 2.0**127), 2.0**-126)))
    gap = 2.0 ** (exponent - 24)
    assert found.max_abs == max(distances)
    assert found.ulps == max(distances) / gap
    beyond = [index for index, distance in enumerate(distances) if distance > bound * gap]
    assert found.first == ((beyond[0],) if beyond else None)
    assert found.departs == bool(beyond)
    assert found.worst == ((distances.index(max(distances)),) if max(distances) else None)
    relative = [
        0.0 if d == 0 else INF if d == INF else d / max(abs(a), abs(b))
        for d, (a, b) in zip(distances, pairs, strict=True)
    ]
    assert found.max_rel == max(relative)


# ---------------------------------------------------------------------------------------------------- a comparison


def comparison_of(*ulps: float, bound: float = 10.0) -> Comparison:
    """Return a comparison of steps of one value each, near 1, that lie so many ulps apart."""
    names = list(step_names(DENSE))
    return Comparison(
        [
            difference(name, np.array([1 + u * 2.0**-23]), np.array([1.0]), bound)
            for name, u in zip(names, ulps, strict=False)
        ],
        bound,
    )


def test_verdicts() -> None:
    assert comparison_of(0, 0, 0).verdict() == "all 3 steps are equal"
    assert comparison_of(0, 10, 3).verdict() == (
        "all 3 steps agree within 10 ulps; the furthest is layers.0.attention_norm, 10 ulps"
    )
    assert comparison_of(0, 11, 2**20, 3).verdict() == (
        "2 of 4 steps depart by more than 10 ulps; the first is layers.0.attention_norm, from [0] on: "
        "11 ulps at [0], 1 where 1 was expected"
    )
    broken = Comparison([between([0.25, NAN], [0.25, 0.5])], 1.0)
    assert broken.verdict() == (
        "1 of 1 steps depart by more than 1 ulps; the first is x, from [1] on: inf ulps at [1], "
        "nan where 0.5 was expected"
    )


def test_a_comparison_is_a_sequence_of_its_differences() -> None:
    comparison = comparison_of(0, 11, 5, 12)
    assert len(comparison) == 4
    assert [d.name for d in comparison] == list(step_names(DENSE))[:4]
    assert comparison[1] is comparison.differences[1]
    assert comparison[-2:] == comparison.differences[2:]
    assert [d.ulps for d in comparison.departed] == [11, 12]
    assert comparison.first is comparison[1]
    assert comparison_of(1, 2).first is None
    assert comparison_of(1, 2).departed == []


def test_a_comparison_is_shown_as_a_table() -> None:
    comparison = Comparison([between([1.0, 3.0], [1.0, 2.0], 5), between([1.0], [1.0])], 5, ["logits", "norm"])
    assert str(comparison) == (
        "| step (* departs) | max abs | max rel |      ulps | worst at | first at |\n"
        "|------------------|--------:|--------:|----------:|---------:|---------:|\n"
        "| * x              |       1 |   0.333 | 4.194e+06 |      [1] |      [1] |\n"
        "|   x              |       0 |       0 |         0 |          |          |\n"
        f"{comparison.verdict()}\n"
        "2 more are in one of the two alone: logits, norm"
    )
    page = comparison._repr_html_()
    assert page.count("<tr>") == 3
    assert comparison.verdict() in page


def test_the_furthest_of_each_layer() -> None:
    """And the first that departs, even where it is not the furthest."""
    model = model_of(DENSE)
    edits = {"layers.1.attention_norm": lambda y: y * np.float32(1.001)}
    comparison = compare_walks(model.steps([1, 2], edits=edits), model.steps([1, 2]))
    short = comparison.furthest_by_layer()
    assert short[2].name == "layers.1.attention_norm"
    assert comparison.first is short.first is short[2]
    for place in ("embedding", "layers.0", "layers.1", "layers.2", "norm", "logits"):
        furthest = max((d for d in comparison if d.name.startswith(place)), key=lambda d: d.ulps)
        assert furthest in list(short)
    assert len(short) == 7
    assert [d for d in comparison if d in list(short)] == list(short)


# ---------------------------------------------------------------------------------------------------- two passes


def clear_of_ties(config: ModelConfig, tokens: list[int]) -> bool:
    """Return whether rounding decides no choice of an expert."""
    if config.moe is None:
        return True
    for step in model_of(config, dtype="float64").steps(tokens):
        if step.name.endswith("router_logits"):
            descending = -np.sort(-step.value)
            gaps = descending[:, config.moe.num_experts_per_tok - 1] - descending[:, config.moe.num_experts_per_tok]
            if gaps.min() < 1e-3 * np.abs(step.value).max():
                return False
    return True


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, derandomize=True)  # one value in a million cancels so well that any rounding is too much
@given(config=configs(), n_tokens=st.integers(4, 12))
def test_float32_departs_nowhere_from_the_oracle(backend: str, config: ModelConfig, n_tokens: int) -> None:
    tokens = tokens_for(config, n_tokens)
    assume(clear_of_ties(config, tokens))
    model, oracle = model_of(config, backend=backend), model_of(config, dtype="float64")
    for own in (False, True):
        comparison = compare_walks(model.steps(tokens), oracle.steps(tokens), own=own)
        assert comparison.departed == [], comparison.verdict()
        assert [d.name for d in comparison] == list(step_names(config))
        assert (comparison.bound, comparison.own) == ((OWN_BOUND, True) if own else (DEFAULT_BOUND, False))


@settings(max_examples=15, derandomize=True)
@given(config=configs(), n_tokens=st.integers(4, 12))
def test_the_backends_do_not_depart_from_each_other(config: ModelConfig, n_tokens: int) -> None:
    tokens = tokens_for(config, n_tokens)
    assume(clear_of_ties(config, tokens))
    numpy, numba = (model_of(config, backend=backend) for backend in BACKENDS)
    for one, other in ((numpy, numba), (numba, numpy)):
        assert not compare_walks(one.steps(tokens), other.steps(tokens)).departed
        assert not compare_walks(one.steps(tokens), other.steps(tokens), own=True).departed
        assert not one.trace(tokens).compare(other.trace(tokens)).departed


@pytest.mark.parametrize("config", [DENSE, MIXTURE], ids=["dense", "mixture"])
def test_streaming_is_comparing_traces(config: ModelConfig) -> None:
    model, oracle, tokens = model_of(config), model_of(config, dtype="float64"), tokens_for(config, 9)
    reports: list[int] = []
    streamed = compare_walks(model.steps(tokens), oracle.steps(tokens), bound=50, progress=reports.append)
    kept = model.trace(tokens).compare(oracle.trace(tokens), bound=50)
    assert streamed == kept
    assert str(streamed) == str(kept)
    assert reports == list(range(1, len(kept) + 1))
    assert 0 < max(d.ulps for d in kept) < 2000
    same = compare_walks(model.steps(tokens), model.steps(tokens), bound=0)
    assert same.verdict() == f"all {len(kept)} steps are equal"


@pytest.mark.parametrize("name", ["layers.1.ffn_out", "embedding", "layers.2.k_rotated", "logits"])
def test_an_edit_is_the_first_to_depart(name: str) -> None:
    """All before it are equal."""
    model, tokens = model_of(DENSE), tokens_for(DENSE, 6)

    def edit(value: np.ndarray) -> np.ndarray:
        changed = value.copy()
        changed[3:] *= np.float32(1.5)
        return changed

    comparison = model.trace(tokens, edits={name: edit}).compare(model.trace(tokens))
    names = list(step_names(DENSE))
    assert comparison.first.name == name
    assert comparison.first.first[0] == 3
    assert all(d.ulps == 0 for d in comparison[: names.index(name)])
    streamed = compare_walks(model.steps(tokens, edits={name: edit}), model.steps(tokens))
    assert streamed == comparison
    assert comparison.verdict().startswith(f"{len(comparison.departed)} of {len(names)} steps depart by more than 2000")
    assert f"; the first is {name}, from [3, 0" in comparison.verdict()


def test_a_changed_weight_is_found_where_it_is_used() -> None:
    model, tokens = model_of(DENSE), tokens_for(DENSE, 6)
    changed = model_of(DENSE)
    w2 = changed.weights.layers[1].feed_forward.w2
    data = w2.data.copy()
    data[7] *= 1.01  # one row, which makes one output
    object.__setattr__(w2, "data", data)
    comparison = compare_walks(changed.steps(tokens), model.steps(tokens))
    assert comparison.first.name == "layers.1.ffn_out"
    assert comparison.first.first == (0, 7)
    assert [d.ulps for d in comparison if d.name.startswith("layers.0")] == [0] * 17
    alone = compare_walks(changed.steps(tokens), model.steps(tokens), own=True)
    assert [d.name for d in alone.departed] == ["layers.1.ffn_out"]


class Faulty(ReferenceOps):
    """Operations with a mistake in the heads of one layer, and in SwiGLU of another."""

    def __init__(self, dtype: str, calls: dict[str, int]) -> None:
        super().__init__(dtype)
        self.calls, self.made = calls, dict.fromkeys(calls, 0)

    def _is_wrong(self, name: str) -> bool:
        self.made[name] = self.made.get(name, 0) + 1
        return self.made[name] == self.calls.get(name)

    def rotate(self, x_THK: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        return super().rotate(x_THK, cos, -sin if self._is_wrong("rotate") else sin)

    def swiglu(self, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
        return super().swiglu(gate, up) * self.dtype.type(1.001 if self._is_wrong("swiglu") else 1)

    def linear(self, x_TI: np.ndarray, weight_OI: Matrix) -> np.ndarray:
        y_TO = super().linear(x_TI, weight_OI)
        return -y_TO if self._is_wrong("linear") else y_TO


FAULTS: dict[str, tuple[dict[str, int], list[str]]] = {
    "two layers": ({"rotate": 2, "swiglu": 2}, ["layers.0.k_rotated", "layers.1.ffn_hidden"]),
    "neighbours": ({"rotate": 3, "linear": 8}, ["layers.1.q", "layers.1.q_rotated"]),
    "first and last": ({"linear": 22, "rotate": 1}, ["layers.0.q_rotated", "logits"]),
    "none": ({}, []),
}


@pytest.mark.parametrize("case", FAULTS)
def test_every_faulty_step_is_found_and_nothing_that_follows_from_it(case: str) -> None:
    calls, names = FAULTS[case]
    right, tokens = model_of(DENSE), tokens_for(DENSE, 6)

    def wrong() -> Model:
        return Model(DENSE, right.weights, Faulty("float32", calls))

    for reference in (right, model_of(DENSE, dtype="float64")):
        found = compare_walks(wrong().steps(tokens), reference.steps(tokens), own=True)
        assert [d.name for d in found.departed] == names
        assert (found.bound, found.own) == (OWN_BOUND, True)
        together = compare_walks(wrong().steps(tokens), reference.steps(tokens))
        assert [d.name for d in together.departed[:1]] == names[:1]
        assert not names or len(together.departed) > len(names)


def test_each_edit_of_two_is_found_alone_but_shows_in_all_that_follows() -> None:
    model, tokens = model_of(MIXTURE), tokens_for(MIXTURE, 5)
    edits = {"layers.0.attention_out": lambda o: o * np.float32(1.01), "layers.1.up": np.negative}
    found = compare_walks(model.steps(tokens, edits=edits), model.steps(tokens), own=True)
    assert [d.name for d in found.departed] == list(edits)
    assert all(d.ulps == 0 for d in found if d.name not in edits)


def test_fused_attention_takes_part_in_the_exchange() -> None:
    numpy, numba = (model_of(DENSE, backend=backend) for backend in BACKENDS)
    tokens = tokens_for(DENSE, 6)
    for one, other in ((numba, numpy), (numpy, numba)):
        found = compare_walks(one.steps(tokens), other.steps(tokens), own=True)
        assert not found.departed
        assert ([d.name for d in found], found.fixed) == (list(step_names(DENSE)), ())
        edited = one.steps(tokens, edits={"layers.1.q": lambda q: q * np.float32(2)})
        assert [d.name for d in compare_walks(edited, other.steps(tokens), own=True).departed] == ["layers.1.q"]


@pytest.mark.parametrize("n_tokens", [1, 3])
@pytest.mark.parametrize("own", [False, True])
def test_another_window_departs_at_the_scores(own: bool, n_tokens: int) -> None:
    """Keys are laid side by side by their positions; -inf and 0 stand where one of the two sees none."""
    tokens = tokens_for(DENSE, 10 + n_tokens)
    walks = []
    for window in (DENSE.sliding_window[0], DENSE.sliding_window[0] + 1):
        model = model_of(DENSE.replace(sliding_window=(window,) * DENSE.n_layers))
        cache = model.new_cache()
        model.forward(tokens[:10], cache)
        walks.append(model.steps(tokens[10:], cache))
    found = compare_walks(*walks, own=own)
    assert found.first.name == "layers.0.scores"
    assert (found.first.max_abs, found.first.first, found.first.worst) == (INF, (0, 0, 0), (0, 0, 0))
    weights = found[[d.name for d in found].index("layers.0.attention_weights")]
    assert weights.departs
    assert weights.max_abs < 1
    assert (found[0].ulps, found[6].ulps) == (0, 0)


# ------------------------------------------------------------------------------------------ what cannot be compared


def test_traces_that_say_nothing_of_each_other() -> None:
    model = model_of(DENSE)
    trace = model.trace([1, 2])
    with refused(InputError, "traces", "tokens[1]", 2, 3):
        trace.compare(model.trace([1, 3]))
    with refused(InputError, "traces", "tokens", "2 entries", 1):
        trace.compare(model.trace([1]))
    cache = model.new_cache()
    model.forward([9], cache)
    with refused(InputError, "traces", "positions", 0, 1):
        trace.compare(model.trace([1, 2], cache=cache))
    with refused(InputError, "traces", "no step", "'embedding'", "'logits'"):
        model.trace([1, 2], keep="embedding").compare(model.trace([1, 2], keep="logits"))
    shared = trace.compare(model_of(MIXTURE).trace([1, 2]))  # of another width: what cannot be compared departs
    assert shared.first.problem == "shape (2, 40), expected (2, 28)"
    assert "the first is embedding: shape (2, 40), expected (2, 28)" in shared.verdict()
    assert "shape (2, 40), expected (2, 28)" in str(shared).splitlines()[2]


def test_a_file_that_does_not_tell_its_tokens_is_compared() -> None:
    trace = model_of(DENSE).trace([1, 2])
    unknown = Trace(trace.steps.values(), [], [])
    assert unknown.compare(trace).verdict() == trace.compare(unknown).verdict() == f"all {len(trace)} steps are equal"
    longer = Trace([Step("logits", CATALOGUE["logits"], np.zeros((3, 101)))], [], [])
    assert trace.compare(longer).first.problem == "shape (2, 101), expected (3, 101)"


def test_logits_of_the_last_token_alone_are_compared_with_the_last() -> None:
    trace = model_of(DENSE).trace([1, 2, 3])
    last = Trace([Step(name, CATALOGUE[name], trace[name][-1:]) for name in ("norm", "logits")], [], [])
    assert last.compare(trace).verdict() == trace.compare(last).verdict() == "all 2 steps are equal"
    first = Trace([Step("logits", CATALOGUE["logits"], trace["logits"][:1])], [], [])
    assert first.compare(trace).first is not None


def test_swapped_axes_are_guessed() -> None:
    trace = model_of(DENSE).trace([1, 2, 3], keep="layers.0.q")
    step = trace.steps["layers.0.q"]
    swapped = Trace([Step(step.name, step.kind, step.value.swapaxes(0, 1))], [], [])
    assert swapped.compare(trace).first.problem.endswith("expected (3, 6, 8), the same axes in another order?")


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
def test_values_that_a_file_held_in_16_bits_are_allowed_their_rounding(dtype: str, tmp_path: Path) -> None:
    trace = model_of(DENSE).trace([1, 2, 3])
    if dtype == "F16":
        tensors = {name: (dtype, value.astype(np.float16)) for name, value in trace.items()}
    else:
        tensors = {name: (dtype, encoded(value, "bf16")) for name, value in trace.items()}
    write_tensor_file(tmp_path / "dump", tensors, {})
    loaded = Trace.load(tmp_path / "dump")
    comparison = loaded.compare(trace)
    assert comparison.first is None, str(comparison)
    assert "the rounding to 16 bits" in comparison.verdict()
    assert max(d.ulps for d in comparison) > 2000
    off = Trace([*loaded.steps.values()], [], [])
    off.steps["layers.1.q"] = Step("layers.1.q", CATALOGUE["q"], loaded["layers.1.q"] * np.float32(1.02))
    assert off.compare(trace).first.name == "layers.1.q"


def test_steps_of_only_one_are_named_in_the_order_of_a_pass() -> None:
    model = model_of(FAMILIES["mixtral"].config)
    one = model.trace([1, 2], keep=["layers.2.q", "layers.*.heads", "norm"])
    other = model.trace([1, 2], keep=["logits", "embedding", "layers.*.heads", "layers.1.k"])
    comparison = one.compare(other)
    assert [d.name for d in comparison] == [f"layers.{layer}.heads" for layer in range(3)]
    assert comparison.unmatched == ("embedding", "layers.1.k", "layers.2.q", "norm", "logits")
    assert str(comparison).endswith("5 more are in one of the two alone: embedding, layers.1.k, layers.2.q, ...")
    assert other.compare(one).unmatched == comparison.unmatched


@pytest.mark.parametrize(
    ("other", "facts"),
    [
        (lambda: model_of(MIXTURE.replace(moe=None)), ("layers.0.router_logits", "layers.0.gate")),
        (lambda: model_of(MIXTURE.replace(n_layers=1, sliding_window=(6,))), ("layers.1.attention_norm", "norm")),
    ],
)
def test_walks_of_other_steps(other: Callable[[], Model], facts: tuple[str, str]) -> None:
    one, second = model_of(MIXTURE), other()
    caches = [model.new_cache() for model in (one, second)]
    with refused(InputError, *facts):
        compare_walks(one.steps([1, 2], caches[0]), second.steps([1, 2], caches[1]))
    assert [cache.length for cache in caches] == [0, 0]  # neither walk has reached its end


def test_a_walk_that_has_begun_is_not_the_same() -> None:
    model = model_of(DENSE)
    walk = model.steps([1, 2])
    next(walk)
    with refused(InputError, "layers.0.attention_norm", "embedding"):
        compare_walks(walk, model.steps([1, 2]))
    over = model.steps([1, 2])
    over.finish()
    with refused(InputError, "end", "embedding"):
        compare_walks(over, model.steps([1, 2]))
    with refused(InputError, "layers.0.scores", "positions", 1, 2):
        compare_walks(model.steps([1, 2]), model.steps([1, 2, 3]))


def test_walks_of_different_positions() -> None:
    model = model_of(DENSE)
    cache = model.new_cache()
    model.forward(tokens_for(DENSE, 9), cache)
    with refused(InputError, "layers.0.scores", "position", 10, 1):
        compare_walks(model.steps([1, 2], cache), model.steps([1, 2]), bound=1e9)
    assert cache.length == 9


def test_both_passes_reach_their_end() -> None:
    model = model_of(DENSE)
    caches = [model.new_cache(), model.new_cache()]
    walks = [model.steps([1, 2], cache) for cache in caches]
    compare_walks(*walks)
    assert [cache.length for cache in caches] == [2, 2]
    np.testing.assert_array_equal(walks[0].logits, walks[1].logits)
