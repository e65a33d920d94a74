"""What `bench` measures: tests and their names, and what a run is counted as."""

from __future__ import annotations

import numpy as np
import pytest
from support.checkpoints import FAMILIES
from support.errors import refused
from support.tiny import BACKENDS, model_of

from mistral_ref import InputError
from mistral_ref.measure.benchmark import Limit
from mistral_ref.measure.cost import step_costs
from mistral_ref.measure.shapes import shape
from mistral_ref.measure.speed import SpeedResult, SpeedTest, measure_speed, speed_tests, work_of
from mistral_ref.measure.synthetic import checkpoint_bytes
from mistral_ref.weights import matrices

READ, PEAK = Limit("GB/s", lambda: 2.0), Limit("GFLOP/s", lambda: 8.0)


def test_tests_are_named_as_llama_bench_names_them() -> None:
    tests = speed_tests([512, 0], [128], [0, 4096])
    assert [test.name for test in tests] == ["pp512", "tg128", "pp512 @ d4096", "tg128 @ d4096"]
    assert [test.n for test in tests] == [512, 128, 512, 128]
    assert speed_tests([0], [0], [0]) == []
    with refused(InputError, "n-gen", -1):
        speed_tests([1], [-1], [0])


def test_figures_of_a_result() -> None:
    result = SpeedResult(SpeedTest(0, 10, 0), "GB/s", work=4.0, seconds=[1.0, 2.0], limits=[8.0, 4.0])
    assert result.rates == [10.0, 5.0]
    assert result.mean == 7.5
    assert result.deviation == pytest.approx(3.5355, abs=1e-4)
    assert result.work_rates == [4.0, 2.0]
    assert result.shares == [0.5, 0.5]
    assert SpeedResult(SpeedTest(1, 0, 0), "GFLOP/s", 1.0, [1.0], [1.0]).deviation == 0


def test_what_a_run_is_counted_as() -> None:
    model = model_of(FAMILIES["dense_windowed"].config)
    config, weights = model.config, model.weights
    one = step_costs(config, weights, 1, 7)
    flops, n_bytes = work_of(model, SpeedTest(0, 4, 5), "float32")
    assert (flops, n_bytes) == (4 * sum(c.flops for c in one), 4 * sum(c.bytes for c in one))
    # A prompt of 3: in the last layer keys and values of three tokens, and everything else of one. One of 512 + 3: the
    # first chunk ends with the last layer's keys.
    prompt = step_costs(config, weights, 3, 512, last_only=True)
    assert work_of(model, SpeedTest(3, 0, 512), "float32")[0] == sum(c.flops for c in prompt)
    costs = step_costs(config, weights, 512, last_only=True)
    names = [c.name for c in costs]
    first = costs[: names.index("layers.2.k_rotated") + 1]
    assert work_of(model, SpeedTest(515, 0, 0), "float32")[0] == sum(c.flops for c in [*first, *prompt])


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_run_does_the_same(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(FAMILIES["dense_windowed"].config, backend=backend)  # a window of 5
    monkeypatch.setattr("mistral_ref.measure.speed.CHUNK", 4)
    seen, forward = [], model.forward

    def spied(ids: np.ndarray, cache: object, **options: object) -> np.ndarray:
        seen.append((cache.length, tuple(ids)))
        return forward(ids, cache, **options)

    monkeypatch.setattr(model, "forward", spied)
    tests = speed_tests([10], [3], [0, 9])
    said: list[str] = []
    results = measure_speed(model, tests, repeats=2, read=READ, peak=PEAK, progress=said.append)
    assert [result.test for result in results] == tests
    for result in results:
        assert len(result.seconds) == len(result.limits) == 2
        assert min(result.seconds) > 0
        assert result.limits == ([2.0] * 2 if result.test.n_gen else [8.0] * 2)
    assert seen[0][0] == 0
    assert seen[0] == seen[1] == seen[2]  # a prompt of 10, three times
    assert [length for length, _ in seen[3:11]] == [0, 1, 0, 1, 2, 0, 1, 2]  # two tokens to warm up, then twice three
    assert [length for length, _ in seen[-8:]] == [9, 10, 9, 10, 11, 9, 10, 11]
    assert "tg3 @ d9: 2 of 2" in said
    assert len(said) == 4 * 3 + 2


def test_a_slow_test_runs_less_often() -> None:
    model = model_of(FAMILIES["dense_windowed"].config)
    (result,) = measure_speed(model, speed_tests([8], [0], [0]), repeats=50, read=READ, peak=PEAK, seconds=1e-9)
    assert len(result.seconds) == 1
    (result,) = measure_speed(model, speed_tests([8], [0], [0]), repeats=3, read=READ, peak=PEAK, warm_up=False)
    assert len(result.seconds) == 3


def test_what_a_checkpoint_takes_is_known_before() -> None:
    config = shape("mistral-7b")
    # 7.24 billion weights of 2 bytes: 7,241,732,096 by the published parameter count
    assert checkpoint_bytes(config, "bf16") == 2 * 7_241_732_096


def test_matrices_are_counted_once() -> None:
    tied = model_of(FAMILIES["tied_multi_query"].config)
    per_layer = 7
    assert len(matrices(tied.weights)) == 1 + per_layer * tied.config.n_layers
    apart = model_of(FAMILIES["dense_windowed"].config)
    assert len(matrices(apart.weights)) == 2 + per_layer * apart.config.n_layers
