"""What steps cost: counts against arrays, brute force and hand-worked numbers; predictions; measurements; the table."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from statistics import median
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters import adapted
from support.checkpoints import FAMILIES
from support.errors import refused
from support.paths import ROOT
from support.tiny import BACKENDS, configs, model_of, tokens_for

from mistral_ref import InputError
from mistral_ref.config import ModelConfig
from mistral_ref.errors import CacheError
from mistral_ref.measure.cost import Limits, StepCost, step_costs, visible_pairs
from mistral_ref.measure.cost_table import CostTable, cost_table, machine_limits, measure
from mistral_ref.measure.shapes import SHAPES
from mistral_ref.measure.synthetic import hollow_weights
from mistral_ref.model import Model
from mistral_ref.reference_ops import attends
from mistral_ref.steps import MATRIX_OF, Step, step_names
from mistral_ref.weights import FeedForward, Layer, Matrix

MAX_VALUES = Limits(bandwidth=1e9, peak=4e9)
WINDOWS = st.none() | st.integers(1, 50)


def arrays_in(part: Any) -> Iterator[Matrix | np.ndarray]:
    """Yield every matrix and norm of a part of the weights, adapters included, but not their scales."""
    if isinstance(part, Matrix | np.ndarray):
        yield part
    else:
        parts = part if isinstance(part, tuple) else [getattr(part, field.name) for field in dataclasses.fields(part)]
        if isinstance(part, Layer):
            parts = [*parts[:-1], *((lora.a, lora.b) for lora in part.lora.values())]
        for one in parts:
            yield from arrays_in(one)


def by_name(costs: list[StepCost]) -> dict[str, StepCost]:
    return {cost.name: cost for cost in costs}


def pass_of(model: Model, tokens: list[int]) -> list[Step]:
    """Return the steps of one unobserved pass."""
    going = model.transformer.forward_steps(np.array(tokens), model.new_cache().begin(len(tokens)))
    steps = [next(going)]
    while steps[-1].name != "logits":
        steps.append(going.send(steps[-1].value))
    with pytest.raises(StopIteration):
        going.send(steps[-1].value)
    return steps


# ----------------------------------------------------------------------------------------------------------- counting


@given(config=configs(), n_tokens=st.integers(1, 12), is_adapted=st.booleans())
@settings(max_examples=40)
def test_steps_are_those_of_the_pass_and_write_at_least_their_values(
    config: ModelConfig, n_tokens: int, is_adapted: bool
) -> None:
    model = adapted(model_of(config)) if is_adapted else model_of(config)
    config = model.config
    costs = step_costs(config, model.weights, n_tokens)
    observed_only = (".scores", ".attention_weights")
    assert [cost.name for cost in costs] == [n for n in step_names(config) if not n.endswith(observed_only)]
    for cost, step in zip(costs, pass_of(model, tokens_for(config, n_tokens)), strict=True):
        assert cost.name == step.name
        assert cost.other_bytes >= step.value.nbytes, cost


@given(config=configs(), n_tokens=st.integers(1, 12))
@settings(max_examples=40)
def test_products_take_two_flops_for_each_weight_and_token(config: ModelConfig, n_tokens: int) -> None:
    weights = model_of(config).weights
    costs = by_name(step_costs(config, weights, n_tokens))
    assert costs["logits"].flops == 2 * n_tokens * weights.output.data.size
    for index, layer in enumerate(weights.layers):
        network, n_rows = layer.feed_forward, n_tokens
        matrices = {"q": layer.wq, "k": layer.wk, "v": layer.wv, "attention_out": layer.wo}
        if not isinstance(network, FeedForward):
            matrices["router_logits"] = network.gate
            network, n_rows = network.experts[0], n_tokens * config.moe.num_experts_per_tok
        rows = dict.fromkeys(matrices, n_tokens) | dict.fromkeys(("gate", "up", "ffn_out"), n_rows)
        matrices |= {"gate": network.w1, "up": network.w3, "ffn_out": network.w2}
        for name, matrix in matrices.items():
            mixing = 2 * n_rows * config.dim if config.moe and name == "ffn_out" else 0
            cost = costs[f"layers.{index}.{name}"]
            assert cost.flops == 2 * rows[name] * matrix.data.size + mixing, name


@given(config=configs(), n_tokens=st.integers(1, 12), start=st.integers(0, 12))
@settings(max_examples=40)
def test_of_the_last_token_alone(config: ModelConfig, n_tokens: int, start: int) -> None:
    """In the last layer, and after it, all but keys and values costs what it costs in a pass of the last token."""
    weights, last = model_of(config).weights, f"layers.{config.n_layers - 1}."
    whole = by_name(step_costs(config, weights, n_tokens, start))
    alone = by_name(step_costs(config, weights, 1, start + n_tokens - 1))
    for name, cost in by_name(step_costs(config, weights, n_tokens, start, last_only=True)).items():
        is_last = name in {"norm", "logits"} or name.startswith(last)
        if name == f"{last}heads":  # reads the keys of one query, and writes those of all tokens
            assert cost.flops == alone[name].flops
            assert alone[name].other_bytes <= cost.other_bytes <= whole[name].other_bytes
        elif is_last and name.removeprefix(last) not in {"attention_norm", "k", "v", "k_rotated"}:
            assert cost == alone[name]
        else:
            assert cost == whole[name]


@given(config=configs(), n_tokens=st.integers(1, 6), rank=st.integers(1, 5))
@settings(max_examples=20)
def test_an_adapter_adds_two_products_a_scale_and_a_sum(config: ModelConfig, n_tokens: int, rank: int) -> None:
    plain, model = model_of(config), adapted(model_of(config), rank=rank)
    before, after = (by_name(step_costs(m.config, m.weights, n_tokens)) for m in (plain, model))
    n_rows = n_tokens * (config.moe.num_experts_per_tok if config.moe else 1)
    for name, cost in before.items():
        short = name.rpartition(".")[2]
        if short not in MATRIX_OF:
            assert after[name] == cost
            continue
        lora = model.weights.layers[int(name.split(".")[1])].lora[short]
        (n_out, _), n_in = lora.b[0].shape, lora.a[0].shape[1]
        rows = n_rows if config.moe and short in ("gate", "up", "ffn_out") else n_tokens
        a, b = after[f"{name}_lora_a"], after[f"{name}_lora_b"]
        assert (a.flops, b.flops) == (2 * rows * rank * n_in, 2 * rows * rank * n_out + rows * rank)
        assert (a.other_bytes, b.other_bytes) == (4 * rows * (n_in + rank), 4 * rows * (rank + n_out))
        assert after[name].flops == cost.flops + rows * n_out
        assert (after[name].weight_bytes, after[name].other_bytes) == (
            cost.weight_bytes,
            cost.other_bytes + 4 * rows * n_out,
        )


@given(config=configs(), n_tokens=st.integers(1, 30), is_adapted=st.booleans())
@settings(max_examples=40)
def test_a_dense_pass_reads_every_weight_once_and_rows_of_the_embedding(
    config: ModelConfig, n_tokens: int, is_adapted: bool
) -> None:
    model = model_of(config.replace(moe=None))
    model = adapted(model) if is_adapted else model
    config, weights = model.config, model.weights
    costs = step_costs(config, weights, n_tokens)
    rows = 4 * config.dim * min(n_tokens, config.vocab_size)
    assert costs[0].weight_bytes == rows
    once = sum(array.nbytes for array in arrays_in((weights.layers, weights.norm, weights.output)))
    assert sum(cost.weight_bytes for cost in costs) == once + rows


def test_weights_count_as_they_are_stored() -> None:
    config = FAMILIES["bfloat16"].config
    weights = hollow_weights(config)
    assert by_name(step_costs(config, weights, 1))["logits"].weight_bytes == 2 * 71 * 44
    scale = np.ones((1, 1), np.float32)
    output = Matrix("fp8", "fp8", np.zeros((71, 44), np.uint8), scale)
    fp8 = step_costs(config, dataclasses.replace(weights, output=output), 1)
    assert by_name(fp8)["logits"].weight_bytes == 71 * 44 + 4


@pytest.mark.parametrize("family", ["mixtral", "mixtral_windowed"])
@pytest.mark.parametrize("n_tokens", [1, 2, 7])
def test_experts_read_are_bounded_and_exact_for_one_token(family: str, n_tokens: int) -> None:
    config = FAMILIES[family].config
    model = model_of(config)
    costs = by_name(step_costs(config, model.weights, n_tokens))
    chosen = {}
    for step in pass_of(model, tokens_for(config, n_tokens)):
        if step.name.endswith(".expert_weights"):
            chosen[step.name.removesuffix("expert_weights")] = np.count_nonzero(step.value.any(axis=0))
    for prefix, n_chosen in chosen.items():
        for name in ("gate", "up", "ffn_out"):
            read, one = costs[prefix + name].weight_bytes, 4 * config.dim * config.hidden_dim
            assert n_chosen * one <= read <= config.moe.num_experts * one
            assert n_tokens > 1 or read == n_chosen * one


def test_steps_of_experts_by_hand() -> None:
    config = FAMILIES["mixtral"].config  # D 36, F 44, 8 experts, 2 for each token, float32
    costs = by_name(step_costs(config, model_of(config).weights, 3))
    names = ("router_logits", "expert_weights", "gate", "ffn_hidden", "ffn_out")
    found = {name: dataclasses.astuple(costs[f"layers.0.{name}"])[1:] for name in names}
    network = 36 * 44
    assert found == {
        "router_logits": (2 * 3 * 36 * 8, 4 * 36 * 8, 4 * 3 * (36 + 8)),
        "expert_weights": (4 * 6, 0, 4 * 2 * 3 * 8),
        "gate": (2 * 6 * network, 4 * 6 * network, 4 * 6 * (36 + 44)),
        "ffn_hidden": (5 * 6 * 44, 0, 4 * 3 * 6 * 44),
        "ffn_out": (2 * 6 * network + 2 * 6 * 36, 4 * 6 * network, 4 * (6 * (36 + 44) + 6 * 36 + 3 * 36)),
    }


@given(n_tokens=st.integers(1, 40), start=st.integers(0, 60), window=WINDOWS)
def test_visible_pairs_are_those_that_attend(n_tokens: int, start: int, window: int | None) -> None:
    queries, keys = np.arange(start, start + n_tokens)[:, np.newaxis], np.arange(start + n_tokens)
    assert visible_pairs(n_tokens, start, window) == attends(queries, keys, window).sum()


@given(n_tokens=st.integers(1, 40), start=st.integers(0, 60), window=WINDOWS)
def test_heads_read_each_visible_key_once_in_the_dtype_of_the_cache(
    n_tokens: int, start: int, window: int | None
) -> None:
    config = SHAPES["tiny"].replace(n_layers=1, sliding_window=(window,))
    queries, keys = np.arange(start, start + n_tokens)[:, np.newaxis], np.arange(start + n_tokens)
    n_keys = attends(queries, keys, window).any(axis=0).sum()
    n_activations, n_cached = 2 * n_tokens * (4 + 2) * 32, 2 * (n_keys + n_tokens) * 2 * 32
    weights = hollow_weights(config)
    cases = [
        ("float32", 4, 4),
        ("float16", 2, 4),
        ("float64", 8, 8),
        ("int8", 1 + 4 / 32, 4),
    ]  # heads of 32, and a step
    for dtype, cached_bytes, activation_bytes in cases:
        costs = step_costs(config, weights, n_tokens, start, cache_dtype=dtype, activation_bytes=activation_bytes)
        heads = by_name(costs)["layers.0.heads"]
        assert heads.other_bytes == activation_bytes * n_activations + cached_bytes * n_cached
        assert (heads.weight_bytes, heads.flops) == (0, 4 * 4 * 32 * visible_pairs(n_tokens, start, window))


def test_mistral_7b_for_one_token_by_hand() -> None:
    config = SHAPES["mistral-7b"]
    costs = step_costs(config, hollow_weights(config), 1, cache_dtype="float16")
    # Multiply-adds of a layer: wq and wo 4096 * 4096, wk and wv 1024 * 4096; w1, w2 and w3 4096 * 14336.
    layer = 2 * 16_777_216 + 2 * 4_194_304 + 3 * 58_720_256
    assert layer == 218_103_808
    products = 32 * layer + 131_072_000  # and the output, 32000 * 4096
    assert products == 7_110_393_856
    # 65 norms of 4 FLOPs a number, 64 sums; RoPE on 40 heads, SwiGLU, and one key for each of 32 query heads.
    norms, sums = 65 * 4 * 4096, 64 * 4096
    rest = norms + sums + 32 * (3 * 40 * 128 + 5 * 14336 + 4 * 128 * 32)
    assert (norms, sums, rest) == (1_064_960, 262_144, 4_636_672)
    assert sum(cost.flops for cost in costs) == 14_225_424_384 == 2 * products + rest
    # Two bytes for each weight of the products, four for those of norms, and a row of the embedding.
    assert sum(cost.weight_bytes for cost in costs) == 14_221_860_864 == 2 * products + 65 * 4 * 4096 + 2 * 4096
    full = by_name(step_costs(config, hollow_weights(config), 1, 4095, cache_dtype="float16"))["layers.31.heads"]
    assert full.flops == 67_108_864  # 4 * 128 * 32 * 4096
    # Queries and gathered values 2 * 4096, new keys and values 2 * 1024; then 4096 keys and values read, one written.
    assert full.other_bytes == 4 * (8192 + 2048) + 2 * 2 * 1024 * 4097 == 16_822_272


def test_attention_is_flat_within_a_window_and_grows_without() -> None:
    config = SHAPES["mistral-7b"].replace(max_seq_len=None)
    weights = hollow_weights(config)

    def heads(config: ModelConfig, start: int) -> StepCost:
        return by_name(step_costs(config, weights, 1, start))["layers.0.heads"]

    assert heads(config, 10_000) == heads(config, 5_000)
    everything = config.replace(sliding_window=(None,) * 32)
    assert heads(everything, 10_000).flops == 4 * 4096 * 10_001
    assert heads(everything, 10_000).other_bytes - heads(everything, 5_000).other_bytes == 5_000 * 2 * 4 * 1024


@pytest.mark.parametrize(
    "arguments", [{"n_tokens": 0}, {"start": -1}, {"activation_bytes": 0}, {"cache_dtype": "int3"}]
)
def test_wrong_arguments_are_named(arguments: dict[str, Any]) -> None:
    config = SHAPES["tiny"]
    with refused(InputError, *arguments, *map(repr, arguments.values())):
        step_costs(config, hollow_weights(config), **{"n_tokens": 1} | arguments)


def test_counting_goes_without_numba() -> None:
    code = (
        "import sys; sys.modules['numba'] = None\n"
        "import mistral_ref\n"
        "from mistral_ref.measure.cost import Limits\n"
        "from mistral_ref.measure.cost_table import cost_table\n"
        "print(cost_table(mistral_ref.load(backend='numpy'), [1], limits=Limits(1e9, 1e9)))"
    )
    root = ROOT
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr
    assert "| total " in done.stdout


# --------------------------------------------------------------------------------------------- predicting, measuring


def test_predictions_on_hand_made_limits() -> None:
    limits = Limits(bandwidth=10.0, peak=100.0)
    read = StepCost("read", flops=100, weight_bytes=30, other_bytes=10)
    assert (read.bytes, read.intensity, read.predicted(limits), read.bound(limits)) == (40, 2.5, 4.0, "memory")
    compute = StepCost("compute", flops=1000, weight_bytes=30, other_bytes=10)
    assert (compute.intensity, compute.predicted(limits), compute.bound(limits)) == (25.0, 10.0, "arithmetic")


def test_decoding_is_bound_by_memory_and_a_prompt_by_arithmetic() -> None:
    config = SHAPES["mistral-7b"]
    weights, limits = hollow_weights(config), Limits(bandwidth=30e9, peak=600e9)
    for n_tokens, bound in [(1, "memory"), (512, "arithmetic")]:
        costs = by_name(step_costs(config, weights, n_tokens))
        assert {costs[f"layers.0.{name}"].bound(limits) for name in ("q", "gate", "up", "ffn_out")} == {bound}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["dense_windowed", "mixtral_windowed"])
def test_measuring_leaves_the_cache_as_it_was(family: str, backend: str) -> None:
    config = FAMILIES[family].config
    model = model_of(config, backend=backend)
    cache = model.new_cache(chunk=4)
    model.forward(tokens_for(config, 21), cache)
    twin, calls = cache.copy(), []
    runs = measure(model, [1, 2, 3], cache, repeats=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [len(run) for run in runs] == [len(step_costs(config, model.weights, 3, 21))] * 2
    assert all(seconds > 0 for run in runs for seconds in run)
    assert cache.length == 21
    assert np.array_equal(model.forward([4, 5, 6], cache), model.forward([4, 5, 6], twin))


def test_what_cannot_be_measured_is_refused() -> None:
    model = model_of(FAMILIES["dense_windowed"].config)
    assert len(measure(model, [1, 2], repeats=np.int64(1))) == 1
    with refused(InputError, "repeats", 0):
        measure(model, [1, 2], repeats=0)
    with refused(InputError, "token id", 101, "0 to 100"):
        measure(model, [101])
    with refused(CacheError, "2 tokens", 1, "chunk"):
        measure(model, [1, 2], model.new_cache(chunk=1))


def test_limits_of_the_machine_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistral_ref.measure.machine.cache_bytes", lambda: 2**20)
    limits = machine_limits(1, weights_bytes=2**23)
    assert limits.bandwidth > 1e8
    assert limits.peak > 1e8


# ----------------------------------------------------------------------------------------------------------- the table


@pytest.mark.parametrize("family", ["interleaved_windows", "mixtral"])
def test_the_totals_of_the_table_add_up(family: str) -> None:
    config = FAMILIES[family].config
    model = model_of(config)
    cache = model.new_cache(dtype="float16")
    model.forward(tokens_for(config, 9), cache)
    table = cost_table(model, [1, 2], cache, repeats=3, limits=MAX_VALUES)
    costs = step_costs(config, model.weights, 2, 9, cache_dtype="float16")
    assert table.costs == costs
    *steps, total = table.rows(by_kind=False)
    assert [row.cost for row in steps] == costs
    *kinds, same_total = table.rows(by_kind=True)
    assert [row.cost.name for row in kinds] == list(dict.fromkeys(cost.name.rpartition(".")[2] for cost in costs))
    assert same_total == total
    for rows in (steps, kinds):
        for count in ("flops", "weight_bytes", "other_bytes", "bytes"):
            assert sum(getattr(row.cost, count) for row in rows) == getattr(total.cost, count)
        assert sum(row.predicted for row in rows) == pytest.approx(total.predicted)
        for repeat in range(3):
            assert sum(row.seconds[repeat] for row in rows) == pytest.approx(total.seconds[repeat])
    assert total.ratio == pytest.approx(median(total.seconds) / sum(cost.predicted(MAX_VALUES) for cost in costs))
    assert len(str(table).splitlines()) == 2 + 2 + len(kinds) + 1
    assert len(str(dataclasses.replace(table, by_kind=False)).splitlines()) == 2 + 2 + len(steps) + 1


def test_a_table_without_a_cache_counts_from_the_start_in_the_dtype_of_the_operations() -> None:
    config = FAMILIES["dense_windowed"].config
    model = model_of(config, dtype="float64")
    table = cost_table(model, [1, 2], repeats=1, limits=MAX_VALUES)
    assert table.costs == step_costs(config, model.weights, 2, cache_dtype="float64", activation_bytes=8)


def test_a_table_as_text() -> None:
    costs = [StepCost("layers.0.gate", 8000, 1500, 500), StepCost("layers.1.gate", 8000, 1500, 500)]
    costs.append(StepCost("logits", 16000, 800, 200))
    table = CostTable(costs, [[4e-6, 4e-6, 8e-6], [2e-6, 3e-6, 8e-6], [4e-6, 5e-6, 6e-6]], MAX_VALUES)
    limits, blank, headings, rule, *lines = str(table).splitlines()
    assert (limits, blank) == ("limits: 1.0 GB/s, 4.0 GFLOP/s", "")
    assert headings.startswith("| step   |   FLOP | bytes | FLOP/byte |   bound by | predicted us | measured us | ")
    assert {len(line) for line in (headings, rule, *lines)} == {len(headings)}
    assert [[cell.strip() for cell in line.strip("|").split("|")] for line in lines] == [
        ["gate", "16,000", "4,000", "4.00", "memory", "4.0", "8.0", "5.0 to 9.0", "2.00"],
        ["logits", "16,000", "1,000", "16.00", "arithmetic", "4.0", "8.0", "6.0 to 8.0", "2.00"],
        ["total", "32,000", "5,000", "6.40", "arithmetic", "8.0", "15.0", "13.0 to 16.0", "1.88"],
    ]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_table_measures_the_limits_itself(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []

    def limits(n_threads: int, weights_bytes: int) -> Limits:
        asked.append((n_threads, weights_bytes))
        return MAX_VALUES

    monkeypatch.setattr("mistral_ref.measure.cost_table.machine_limits", limits)
    monkeypatch.setenv("MISTRAL_REF_THREADS", "3")
    model = model_of(FAMILIES["dense_no_window"].config, backend=backend)
    table = cost_table(model, [1, 2, 3], repeats=1)
    assert table.limits == MAX_VALUES
    assert asked == [(1 if backend == "numba" else 3, sum(cost.weight_bytes for cost in table.costs))]
