"""backend="numba" through the public face: the oracle's steps to a few ulps, whatever is done with a model."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.cache_machine import run_cache_machine
from support.checkpoints import FAMILIES, write_consolidated
from support.errors import assert_says, refused
from support.marks import slow, slow_but
from support.paths import ROOT
from support.tiny import (
    ACCUMULATED_BOUND,
    BACKENDS,
    LARGE,
    MIXTURE,
    OWN_BOUND,
    SMALL,
    chunkings,
    configs,
    distances_in_ulps,
    model_of,
    ops_of,
    tokens_for,
)

import mistral_ref
from mistral_kernels import KernelWarning, caches, products, threads
from mistral_kernels.team import team
from mistral_ref import CacheError, InputError, MistralRefError, compiled_ops, kernel_choice
from mistral_ref.compare import compare_walks
from mistral_ref.compiled_ops import CompiledOps
from mistral_ref.config import ModelConfig
from mistral_ref.errors import short_repr
from mistral_ref.files.quantization import Scheme, quantized_weights
from mistral_ref.files.rounding import quantized
from mistral_ref.model import Model
from mistral_ref.reference_ops import ReferenceOps
from mistral_ref.steps import step_names
from mistral_ref.weights import Matrix, Weights, bf16_bits, with_matrices

# Fused attention is one step, with the rounding of its scores in it: they are shown beside it, and the oracle, which
# does not go on from what is only shown, has exact ones. Twice what was measured over 12 random models a family.
FUSED_BOUND = OWN_BOUND | {"attention_weights": 24, "heads": 32}

# Of the largest logit. Random models can be so sharp that rounding grows a thousandfold on the way to the logits; a key
# too many, a wrong slot or a swapped head changes them by about 1.
CLOSE = 1e-3
CLEAR = 1e-4  # the choice of an expert that rounding does not decide, as a part of the largest router logit


@st.composite
def wide_configs(draw: st.DrawFn, least: int = 1) -> ModelConfig:
    """Draw a configuration some of whose widths are more than a vector or a panel, and multiples of nothing.

    Ulps are those of the largest value of a step. Where a step has few values, all may be small because sums cancel,
    and a right value may then be many ulps away. Tests that count ulps draw widths of 8 at least, and 8 tokens.
    """
    widths = {name: draw(st.integers(least, 140)) for name in ("dim", "hidden_dim", "vocab_size")}
    return draw(configs(max_window=30)).replace(head_dim=2 * draw(st.integers(1, 20)), **widths)


def compiled(config: ModelConfig, **options: int) -> Model:
    return model_of(config, backend="numba", **options)


def exact_logits(config: ModelConfig, tokens: list[int]) -> tuple[np.ndarray, float]:
    """Return the oracle's logits; and by what part of the largest router logit the choice of experts is clear."""
    clear, walk = 1.0, model_of(config, dtype="float64").steps(tokens)
    for step in walk:
        if step.name.endswith("router_logits"):
            chosen = config.moe.num_experts_per_tok
            descending = -np.sort(-step.value)
            gaps = descending[:, chosen - 1] - descending[:, chosen]
            clear = min(clear, gaps.min() / np.abs(step.value).max())
    return walk.logits, clear


def distance(logits: np.ndarray, exact: np.ndarray) -> float:
    """Return the largest difference, as a part of the largest logit."""
    assert logits.shape == exact.shape
    assert logits.dtype == np.float32
    return float(np.abs(logits - exact).max() / np.abs(exact).max())


# --------------------------------------------------------------------------------------------- what is made beforehand


@settings(max_examples=60)
@given(wide_configs(), st.data())
def test_kernels_are_made_before_a_pass_and_warm_knows_them_all(config: ModelConfig, data: st.DataObject) -> None:
    """Any weights, cache and chunk: a compilation within a generation would come in the middle of the text."""
    model = compiled(config)
    bits = data.draw(st.sampled_from([None, 8, 4]))
    if bits is not None:
        model = Model(config, quantized_weights(model.weights, Scheme(bits, 32)), model.ops)
    cache = model.new_cache(
        chunk=data.draw(st.integers(1, 70)), dtype=data.draw(st.sampled_from(["float32", "float16", "int8"]))
    )
    made: list[object] = []
    prepared: list[object] = []
    prepare = model.ops.prepare

    def noted_prepare(*arguments: Any, **options: Any) -> None:
        prepare(*arguments, **options)
        prepared.extend(made)
        made.clear()

    factories = [(products, name) for name in ("matmul", "matvec", "matvec_quantized", "matmul_quantized")]
    factories += [(kernel_choice.elementwise, name) for name in ("rms_norm", "rotate", "swiglu", "mix_experts")]
    factories += [(kernel_choice.panels, name) for name in ("write", "write_int8")]
    factories += [(kernel_choice.attention, "attention")]
    with pytest.MonkeyPatch.context() as patch:
        for module, name in factories:
            patch.setattr(module, name, noting(made, getattr(module, name)))
        patch.setattr(model.ops, "prepare", noted_prepare)
        every = kernel_choice.of_a_model(config, model.weights)
        prompt = tokens_for(config, data.draw(st.integers(1, 150)))
        if data.draw(st.booleans()):
            model.forward(prompt, cache)
        else:
            assert len(list(model.generate(prompt, max_tokens=3, cache=cache))) == 3
    assert made
    assert set(made) <= set(prepared)
    assert set(prepared) <= {(kernel.func.__name__, kernel.args) for kernel in every}


def test_weights_of_other_kinds_and_other_options_need_other_kernels() -> None:
    weights = model_of(SMALL).weights

    def names(weights: Weights, **options: bool) -> set[str]:
        kernels = kernel_choice.of_a_model(SMALL, weights, **options)
        assert len({(kernel.func, kernel.args) for kernel in kernels}) == len(kernels)
        return {"_".join([kernel.func.__name__, *map(str, kernel.args)]) for kernel in kernels}

    plain, rounded = names(weights), names(quantized_weights(weights, Scheme(4, 32)))
    assert {"attention_f32_4", "attention_f16_4", "attention_int8_4", "matmul_f32"} <= plain
    assert {"matvec_quantized_int4_int16_32_1", "matmul_quantized_int4_int8_32"} <= rounded
    assert not any("quantized" in name for name in plain)
    with_all = names(weights, every_option=True)
    assert plain | {name for name in rounded if "quantized" in name} | {"plain_read"} <= with_all
    assert "matvec_quantized_int8_int8_32_1" in with_all


def test_a_library_call_warns_once_of_what_is_compiled_and_before_the_first_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []

    def make(kernels: list[kernel_choice.Kernel], on_compile: Callable[[int, int, str], object]) -> int:
        for done, name in enumerate(["attention_f32_4", "matvec_f32_8_1", ""]):
            on_compile(done, 2, name)
        return 2

    monkeypatch.setattr(compiled_ops.compiling, "make", make)
    model = compiled(SMALL)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tokens = model.generate([5, 6, 7], max_tokens=3)
        assert next(tokens)
        assert len(caught) == 1
        assert len(list(tokens)) == 2
    assert_says(str(caught[0].message), "compiling", "2 kernels")
    assert (caught[0].category, caught[0].filename) == (KernelWarning, __file__)
    quiet = CompiledOps(threads=1, on_compile=lambda done, total, name: said.append(f"{done} of {total} {name}"))
    Model(SMALL, model.weights, quiet).forward([5, 6, 7])
    assert said == ["0 of 2 attention_f32_4", "1 of 2 matvec_f32_8_1", "2 of 2 "]


def noting(made: list[object], factory: Callable[..., Any]) -> Callable[..., Any]:
    """Return a factory that notes what it is asked for."""

    @functools.wraps(factory)
    def make(*arguments: object) -> Any:
        made.append((factory.__name__, arguments))
        return factory(*arguments)

    return make


# -------------------------------------------------------------------------------------------------------------- steps


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_step_stays_close_to_the_oracle(family: object) -> None:
    own = distances_in_ulps(family.config, 24, family.seed, own=True, backend="numba")
    assert list(own) == list(step_names(family.config))
    assert {name: ulps for name, ulps in own.items() if ulps > FUSED_BOUND[name.rpartition(".")[2]]} == {}
    accumulated = distances_in_ulps(family.config, 24, family.seed, own=False, backend="numba")
    assert 1 < max(accumulated.values()) < ACCUMULATED_BOUND


@settings(max_examples=30)
@given(wide_configs(), st.integers(1, 40))
def test_the_logits_of_any_configuration(config: ModelConfig, n_tokens: int) -> None:
    tokens = tokens_for(config, n_tokens)
    exact, clear = exact_logits(config, tokens)
    assume(clear > CLEAR)
    assert distance(compiled(config).forward(tokens), exact) < CLOSE


@settings(max_examples=40)
@given(st.data())
def test_any_split_into_calls_gives_the_same_logits(data: st.DataObject) -> None:
    config = data.draw(wide_configs())
    chunk, n_tokens = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 60))
    model, tokens = compiled(config), tokens_for(config, n_tokens)
    cache, parts, last_only, done = model.new_cache(chunk=chunk), [], data.draw(st.booleans()), 0
    lengths = data.draw(chunkings(n_tokens, 2 * chunk))
    for length in lengths:
        parts.append(model.forward(tokens[done : done + length], cache, last_only=last_only))
        done += length
    exact, clear = exact_logits(config, tokens)
    assume(clear > CLEAR)
    assert distance(np.concatenate(parts), exact[np.cumsum(lengths) - 1] if last_only else exact) < CLOSE


@settings(max_examples=40)
@given(st.data())
def test_a_few_tokens_have_the_bits_that_each_has_alone(data: st.DataObject) -> None:
    """So drafts change no text: whatever windows, caches and experts, and long after the ring has wrapped."""
    config = data.draw(wide_configs())
    model = compiled(config)
    tokens = tokens_for(config, data.draw(st.integers(2, 70)))
    n_before = data.draw(st.integers(0, len(tokens) - 1))
    cache = model.new_cache(chunk=data.draw(st.integers(24, 40)), dtype=data.draw(st.sampled_from(["float32", "int8"])))
    if n_before:
        model.forward(tokens[:n_before], cache, last_only=True)
    alone = cache.copy()
    for length in data.draw(chunkings(len(tokens) - n_before, 24)):
        some = tokens[cache.length : cache.length + length]
        together = model.forward(some, cache)
        np.testing.assert_array_equal(together, np.concatenate([model.forward([token], alone) for token in some]))


@pytest.mark.parametrize("chunk", [1, 2, 50, 512])
@pytest.mark.parametrize("name", ["dense_windowed", "interleaved_windows", "mixtral_windowed"])
def test_long_after_the_ring_has_wrapped(name: str, chunk: int) -> None:
    config = FAMILIES[name].config
    tokens = tokens_for(config, 400, seed=4)
    model = compiled(config)
    cache = model.new_cache(chunk=chunk)
    logits = np.concatenate([model.forward(tokens[i : i + chunk], cache) for i in range(0, 400, chunk)])
    exact, clear = exact_logits(config, tokens)
    assert clear > CLEAR
    assert distance(logits, exact) < 1e-4


def test_any_order_of_operations(tmp_path: Path) -> None:
    """Over compiled kernels and their way to keep keys."""
    run_cache_machine(tmp_path, {"backend": "numba"}, {"rtol": 0, "atol": 1e-3}, max_examples=20)


@settings(max_examples=30)
@given(wide_configs(), st.integers(1, 40))
def test_stepping_is_running_and_shows_the_references_attention(config: ModelConfig, n_tokens: int) -> None:
    """To the bit. What attention shows is what NumPy makes of the same rotated queries and keys."""
    model, tokens = compiled(config), tokens_for(config, n_tokens)
    walk = model.steps(tokens)
    values = {step.name: (step, step.value.copy()) for step in walk}
    np.testing.assert_array_equal(walk.logits, model.forward(tokens))
    for step, as_it_was in values.values():
        np.testing.assert_array_equal(step.value, as_it_was)
        assert not step.value.flags.writeable
    plain = model_of(config).steps(tokens)
    for step in plain:
        found, value = values[step.name]
        assert (step.axes, step.key_positions, value.dtype) == (found.axes, found.key_positions, np.float32)
        if step.name.endswith(("scores", "attention_weights")):
            visible = np.isfinite(step.value)
            np.testing.assert_array_equal(np.isfinite(value), visible)
            size = np.abs(step.value[visible]).max()
            np.testing.assert_allclose(value[visible], step.value[visible], rtol=0, atol=1e-5 * size)
        else:
            step.value = value


EDITABLE = list(step_names(MIXTURE))

# What people hand over: arrays in every order that NumPy knows.
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "fortran": np.asfortranarray,
    "reversed": lambda value: np.ascontiguousarray(value[::-1])[::-1],
    "strided": lambda value: value.repeat(2, axis=-1)[..., ::2],
    "broadcast": lambda value: np.broadcast_to(value[:1], value.shape),
    "unaligned": lambda value: (
        np.frombuffer(b"x" + value.tobytes(), np.uint8)[1:].view(value.dtype).reshape(value.shape)
    ),
    "list": lambda value: value[::-1],
}


@pytest.mark.parametrize("name", EDITABLE)
def test_edits_in_any_layout_work_as_in_numpy(name: str) -> None:
    """Each is of another size than what it replaces, so that it has an effect."""
    tokens = [5, 6, 7, 8, 9]
    plain, model = model_of(MIXTURE), compiled(MIXTURE)
    for layout, change in LAYOUTS.items():
        edits = {name: lambda value, change=change: change(np.flip(value, 0) * np.float32(0.5))}
        assert distance(model.forward(tokens, edits=edits), plain.forward(tokens, edits=edits)) < 1e-4, layout
    unchanged = model.forward(tokens, edits={name: np.copy})
    is_inside = name.endswith(("scores", "attention_weights"))  # NumPy goes on from there
    np.testing.assert_allclose(unchanged, model.forward(tokens), atol=1e-5 if is_inside else 0)


@pytest.mark.parametrize("value", [*[np.nan, np.inf, -np.inf, 1e30, -1e30], 0, 1e-40])
@pytest.mark.parametrize("name", EDITABLE)
def test_edits_to_any_number_do_what_they_do_in_numpy(name: str, value: float) -> None:
    """One token's numbers are replaced: logits are numbers where NumPy's are, and about the same."""

    def edit(array: np.ndarray) -> np.ndarray:
        changed = array.copy()
        changed[1:2] = value
        return changed

    expected, found = (
        model_of(MIXTURE, backend=backend).forward([5, 6, 7], edits={name: edit}) for backend in BACKENDS
    )
    np.testing.assert_array_equal(np.isfinite(found[0]), np.isfinite(expected[0]))
    if np.isfinite(expected).all():
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_a_token_without_any_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    for zero in (np.zeros_like, lambda shares: shares * np.array([[0], [1]], np.float32)):
        edits = {"layers.*.expert_weights": zero}
        expected, found = (model_of(MIXTURE, backend=backend).forward([5, 6], edits=edits) for backend in BACKENDS)
        assert distance(found, expected) < 1e-5


# -------------------------------------------------------------------------------------------------------------- caches


@pytest.mark.slow
def test_a_float16_cache_is_close_to_numpys() -> None:
    """Both round the same keys and values, or nearly: where they differ by an ulp of float16, logits do a little."""
    tokens = tokens_for(SMALL, 60)
    logits = {}
    for backend in BACKENDS:
        model = model_of(SMALL, backend=backend)
        cache = model.new_cache(dtype="float16", chunk=7)
        logits[backend] = model.forward(tokens, cache)
        assert {ring.store.k.dtype for ring in cache.rings} == {np.dtype(np.float16)}
    full = compiled(SMALL).forward(tokens)
    assert 1e-5 < distance(logits["numba"], full) < 0.02
    assert distance(logits["numba"], logits["numpy"]) < 0.01


@pytest.mark.parametrize("dtype", ["float32", *slow(["float16"])])
@pytest.mark.parametrize(("saving", "loading"), [BACKENDS, BACKENDS[::-1], ("numba", "numba")])
@pytest.mark.parametrize("n_before", [3, 300])
def test_a_cache_saved_by_one_backend_is_taken_up_by_the_other(
    saving: str, loading: str, dtype: str, n_before: int, tmp_path: Path
) -> None:
    config, path = FAMILIES["interleaved_windows"].config, tmp_path / "cache.safetensors"
    tokens = tokens_for(config, n_before + 10)
    first, second = (model_of(config, backend=backend) for backend in (saving, loading))
    cache = first.new_cache(chunk=9, dtype=dtype)
    first.forward(tokens[:n_before], cache)
    cache.save(path)
    taken_up = second.load_cache(path)
    assert (taken_up.length, taken_up.chunk, taken_up.dtype) == (n_before, 9, dtype)
    expected = first.forward(tokens[n_before:], cache)
    found = second.forward(tokens[n_before:], taken_up)
    assert distance(found, expected) < (1e-4 if dtype == "float32" else 0.01)
    if saving == loading:
        np.testing.assert_array_equal(found, expected)


def test_a_cache_of_another_backend_or_model_is_refused() -> None:
    model = compiled(SMALL)
    cases = ((model_of(SMALL), ("backend", "'numpy'", "'numba'")), (compiled(SMALL), ("the same",)))
    for other, facts in (*cases, (compiled(SMALL.replace(rope_theta=5.0)), ("rope_theta", 5.0, SMALL.rope_theta))):
        with refused(CacheError, "cache", "another model", *facts):
            model.forward([1], other.new_cache())
        with refused(CacheError, "cache", "another model", *facts):
            other.forward([1], model.new_cache())


# ------------------------------------------------------------------------------------------------------------- threads


def test_threads_do_not_change_a_bit() -> None:
    model, tokens = compiled(LARGE), tokens_for(LARGE, 120)
    all_logits = []
    for n_threads in range(1, 9):
        same = Model(LARGE, model.weights, ops_of("numba", threads=n_threads))
        cache = same.new_cache(chunk=100)
        all_logits.append(np.concatenate([same.forward(part, cache) for part in (tokens[:-2], *zip(tokens[-2:]))]))
    for logits in all_logits:
        np.testing.assert_array_equal(logits, all_logits[0])


@pytest.mark.parametrize("bad", ["0", "-1", "1.5", "two", "1025", "1 2", "9" * 5000, "\N{SUPERSCRIPT TWO}"])
def test_the_environments_number_of_threads_is_checked(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_REF_THREADS", bad)
    with refused(InputError, "MISTRAL_REF_THREADS", short_repr(bad).strip("'"), "whole number", 1, 1024) as caught:
        mistral_ref.load(backend="numba")
    assert len(str(caught.value)) < 200
    assert mistral_ref.load(backend="numba", threads=1).ops.threads == 1  # what is asked for goes before


def test_how_many_threads_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MISTRAL_REF_THREADS", "3")
    assert mistral_ref.load(backend="numba").ops.threads == 3
    for unset in (
        lambda: monkeypatch.setenv("MISTRAL_REF_THREADS", ""),
        lambda: monkeypatch.delenv("MISTRAL_REF_THREADS"),
    ):
        unset()
        assert 1 <= mistral_ref.load(backend="numba").ops.threads == threads.performance_cores() <= os.cpu_count()
    for bad in (0, -1, True, 1.5, "2", 1025):
        with refused(InputError, "threads", repr(bad)):
            mistral_ref.load(backend="numba", threads=bad)


def test_performance_cores_are_counted_as_the_system_tells(tmp_path: Path) -> None:
    """Two hyperthreads are one core; of cores of two kinds only the fast ones count; what is missing is no error."""
    root = tmp_path / "system" / "cpu"

    def tell(cpu: int, file: str, text: str) -> None:
        path = root / f"cpu{cpu}" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    count = threads._performance_cores_of_linux
    assert count({0, 1, 2, 3}, root) == 4
    for cpu in range(4):
        tell(cpu, "topology/thread_siblings_list", ["0-1", "0,1", "2-3", "2-3"][cpu])
    assert count({0, 1, 2, 3}, root) == 2
    assert count({0, 2}, root) == 2
    assert count({0, 1}, root) == 1
    for cpu, capacity in enumerate([512, 512, 1024, 1024]):
        tell(cpu, "cpu_capacity", str(capacity))
    assert count({0, 1, 2, 3}, root) == 1
    assert count({0, 1}, root) == 1
    (tmp_path / "cpu_core").mkdir()
    (tmp_path / "cpu_core" / "cpus").write_text("0-1\n")
    for cpu in range(4):
        tell(cpu, "cpu_capacity", "1024")
    assert count({0, 1, 2, 3}, root) == 1
    assert count({2, 3}, root) == 1


def test_caches_are_what_the_system_tells(tmp_path: Path) -> None:
    """Nearest first, without the one for instructions; what cannot be read is left out."""
    assert caches._data_caches_of_linux(tmp_path) == ()
    told = [("3", "Unified", "16384K"), ("1", "Data", "32K"), ("1", "Instruction", "64K"), ("2", "Unified", "1024K")]
    for index, values in enumerate([*told, ("4", "Unified", "many")]):
        folder = tmp_path / "cpu0" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, value in zip(("level", "type", "size"), values, strict=True):
            (folder / name).write_text(f"{value}\n")
    assert caches._data_caches_of_linux(tmp_path) == (2**15, 2**20, 2**24)


def lines_of(code: str, **environment: str) -> list[str]:
    """Return the lines that a process of its own prints, but for notices of compiling."""
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if "compiling" not in line]


AT_ONCE = """
import threading, warnings
import numpy as np
from support.tiny import LARGE, MIXTURE, model_of, tokens_for

def run(model, tokens, results):
    cache = model.new_cache(chunk=10)
    results.append(model.forward(tokens, cache))
    for token in tokens:
        results.append(model.forward([token], cache))
    for step in model.steps(tokens):
        results.append(step.value.copy())

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    models = [model_of(config, backend="numba", threads=2) for config in (LARGE, MIXTURE, LARGE)]
    models.append(models[0])
    tasks = [(model, tokens_for(model.config, 5, seed)) for seed, model in enumerate(models)]
    at_once, alone = ([[] for _ in tasks] for _ in range(2))
    running = [threading.Thread(target=run, args=(*task, into)) for task, into in zip(tasks, at_once)]
    [thread.start() for thread in running]
    [thread.join() for thread in running]
    [run(*task, into) for task, into in zip(tasks, alone)]
for found, expected in zip(at_once, alone, strict=True):
    assert len(found) == len(expected) > 5
    for one, other in zip(found, expected):
        np.testing.assert_array_equal(one, other)
for message in {str(warning.message) for warning in caught}:
    print(message)
"""


def test_two_threads_that_use_models_at_once_get_what_one_gets() -> None:
    """Two of one model, and others beside it, each with a cache of its own. They find the team of threads in use."""
    assert lines_of(AT_ONCE) == []


LEFT_BEHIND = """
from numba.core.runtime import rtsys
from support.tiny import LARGE, MIXTURE, model_of, tokens_for

for config in (LARGE, MIXTURE):
    model = model_of(config, backend="numba", threads=2)
    tokens = tokens_for(config, 70)
    for dtype in model.ops.cache_dtypes:
        cache = model.new_cache(chunk=64, dtype=dtype)
        model.forward(tokens, cache)
        model.forward(tokens[:1], cache)
arrays = rtsys.get_allocation_stats()
print(arrays.mi_alloc > 100, arrays.mi_alloc - arrays.mi_free)
"""


@pytest.mark.slow
def test_kernels_leave_no_arrays_behind() -> None:
    """A part that borrows its arrays frees none, so one that makes an array after all would lose its memory."""
    assert lines_of(LEFT_BEHIND, NUMBA_NRT_STATS="1") == ["True 0"]


# ------------------------------------------------------------------------------------------ inputs rounded to bfloat16

CLOSE_BF16 = 0.05  # as with int8 below: an ulp before may make an input the next number, 2^-8 of it away


def rounding_model(config: ModelConfig, backend: str = "numba", seed: int = 0) -> Model:
    """Return a random model with matrices of bf16 and inputs rounded to it; "oracle" is NumPy in float64."""

    def to_bf16(matrix: Matrix) -> Matrix:
        return Matrix(matrix.name, "bf16", bf16_bits(matrix.rows(slice(None), np.float32)))

    weights = with_matrices(model_of(config, seed).weights, to_bf16)
    if backend == "numba":
        return Model(config, weights, CompiledOps(threads=1, bf16_inputs="bfloat16"))
    return Model(config, weights, ReferenceOps("float64" if backend == "oracle" else "float32", bf16_inputs="bfloat16"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_every_step_with_inputs_in_bf16_stays_close_to_the_oracle(family: object) -> None:
    model = rounding_model(family.config, "numba", family.seed)
    oracle = rounding_model(family.config, "oracle", family.seed)
    tokens = tokens_for(family.config, 24, family.seed)
    assert_each_step_is_close(model, oracle, tokens)
    plain = rounding_model(family.config, "numpy", family.seed)
    assert distance(model.forward(tokens), plain.forward(tokens)) < CLOSE_BF16


@pytest.mark.slow
@settings(max_examples=30)
@given(wide_configs(least=8), st.integers(8, 40))
def test_every_step_of_any_configuration_with_inputs_in_bf16(config: ModelConfig, n_tokens: int) -> None:
    """Rows of an odd length among them, which are not taken as pairs."""
    model, oracle = (rounding_model(config, backend) for backend in ("numba", "oracle"))
    assert_each_step_is_close(model, oracle, tokens_for(config, n_tokens), slack=2)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_in_bf16_matter_as_much_as_they_should(backend: str) -> None:
    """The weights are the same, so what is left is the inputs' rounding: 2^-9 of each at most, in every product."""
    model, tokens = rounding_model(LARGE, backend), tokens_for(LARGE, 20)
    unrounded = Model(LARGE, model.weights, ops_of(backend))
    assert 1e-3 < distance(model.forward(tokens), unrounded.forward(tokens)) < 0.1
    plain = model_of(LARGE)  # float32 matrices: nothing is rounded
    rounding = Model(LARGE, plain.weights, model.ops)
    np.testing.assert_array_equal(
        rounding.forward(tokens), Model(LARGE, plain.weights, ops_of(backend)).forward(tokens)
    )


@pytest.mark.slow
def test_threads_steps_and_cache_do_not_change_inputs_in_bf16() -> None:
    model, tokens = rounding_model(LARGE), tokens_for(LARGE, 30)
    expected = model.forward(tokens)
    walk = model.steps(tokens)
    for _ in walk:
        pass
    np.testing.assert_array_equal(walk.logits, expected)
    ops = CompiledOps(threads=5, bf16_inputs="bfloat16")
    ops._threads_for = lambda work, few: team(5)
    np.testing.assert_array_equal(Model(LARGE, model.weights, ops).forward(tokens), expected)
    cache = model.new_cache(chunk=7)
    parts = [model.forward(tokens[start : start + 7], cache) for start in range(0, 28, 7)]
    parts += [model.forward([token], cache) for token in tokens[28:]]
    assert distance(np.concatenate(parts), expected) < CLOSE_BF16


# --------------------------------------------------------------------------------------------------- quantized weights

# Where two passes differ by an ulp before inputs are rounded, one of them may become the next number: a step of 1/32767
# or 1/127 of the largest in its group. So steps agree to the ulps of any others if they are given the same inputs, and
# whole models, as a part of the largest logit, to a few such steps: over 48 random models of the families to 4e-4 with
# int16, and with int8 to 1e-6 or, where one input has moved, to 2e-2. These are twice that and a bit.
CLOSE_QUANTIZED = {"int16": 1e-3, "int8": 0.05}

each_bits = pytest.mark.parametrize("bits", [8, 4])
# A window, experts, and YaRN with a query temperature: of what is tried with every kind of weights.
each_usual_family = pytest.mark.parametrize(
    "family", slow_but(["dense_windowed", "mixtral_windowed", "ministral3"], FAMILIES)
)
each_rounding = pytest.mark.parametrize("quantized_inputs", CLOSE_QUANTIZED)


@functools.lru_cache(maxsize=16)
def weights_in(config: ModelConfig, bits: int, seed: int, group_size: int) -> Weights:
    """Return random weights rounded to 8 or 4 bits."""
    return quantized_weights(model_of(config, seed).weights, Scheme(bits, group_size))


def quantized_model(
    config: ModelConfig, bits: int, quantized_inputs: str, backend: str = "numba", seed: int = 0, group_size: int = 32
) -> Model:
    """Return a random model with matrices of 8 or 4 bits; "oracle" for a backend is NumPy in float64."""
    weights = weights_in(config, bits, seed, group_size)
    if backend == "numba":
        return Model(config, weights, CompiledOps(threads=1, quantized_inputs=quantized_inputs))
    dtype = "float64" if backend == "oracle" else "float32"
    return Model(config, weights, ReferenceOps(dtype, quantized_inputs=quantized_inputs))


def assert_each_step_is_close(model: Model, oracle: Model, tokens: list[int], *, slack: float = 1) -> None:
    """Fail where a step, from the same inputs, is further from the oracle's than `slack` times its bound."""
    own = compare_walks(model.steps(tokens), oracle.steps(tokens), own=True)
    assert [difference.name for difference in own] == list(step_names(model.config))
    bounds = {difference.name: slack * FUSED_BOUND[difference.name.rpartition(".")[2]] for difference in own}
    assert {difference.name: difference.ulps for difference in own if difference.ulps > bounds[difference.name]} == {}
    assert max(difference.ulps for difference in own) > 0


@each_rounding
@each_bits
@each_usual_family
def test_every_step_with_quantized_weights_stays_close_to_the_oracle(
    family: object, bits: int, quantized_inputs: str
) -> None:
    model, oracle = (
        quantized_model(family.config, bits, quantized_inputs, backend, family.seed) for backend in ("numba", "oracle")
    )
    assert {layer.wo.kind for layer in model.weights.layers} == {f"int{bits}"}
    assert_each_step_is_close(model, oracle, tokens_for(family.config, 24, family.seed))


@pytest.mark.parametrize("group_size", [32, *slow([64, 128])])
@settings(max_examples=30)
@given(wide_configs(least=8), st.integers(8, 40), st.sampled_from([8, 4]), st.booleans())
def test_every_step_of_any_configuration_with_quantized_weights(
    group_size: int, config: ModelConfig, n_tokens: int, bits: int, is_int8: bool
) -> None:
    """Sums cancel in random models more than in trained ones: hence the slack."""
    model, oracle = (
        quantized_model(config, bits, "int8" if is_int8 else "int16", backend, group_size=group_size)
        for backend in ("numba", "oracle")
    )
    assert_each_step_is_close(model, oracle, tokens_for(config, n_tokens), slack=4)


@each_rounding
@each_bits
@each_usual_family
def test_the_logits_of_quantized_models(family: object, bits: int, quantized_inputs: str) -> None:
    """Whole, in chunks, token by token and from a saved state of a cache: NumPy's, as far as rounded inputs allow."""
    tokens = tokens_for(family.config, 40, family.seed)
    model, plain = (
        quantized_model(family.config, bits, quantized_inputs, backend, family.seed) for backend in ("numba", "numpy")
    )
    expected, close = plain.forward(tokens), CLOSE_QUANTIZED[quantized_inputs]
    assert distance(model.forward(tokens), expected) < close
    for chunk in (1, 7):
        for tried in (model, plain):
            cache = tried.new_cache(chunk=chunk)
            parts = [tried.forward(tokens[start : start + chunk], cache) for start in range(0, 40, chunk)]
            assert distance(np.concatenate(parts), expected) < close
    walk = model.steps(tokens)
    for _ in walk:
        pass
    np.testing.assert_array_equal(walk.logits, model.forward(tokens))


@each_bits
def test_rounded_inputs_matter_as_much_as_they_should(bits: int) -> None:
    """int8 is further from inputs that are not rounded than int16, and both are far from nothing at all."""
    config = LARGE
    tokens = tokens_for(config, 20)
    exact = quantized_model(config, bits, "float", "oracle").forward(tokens)
    int16, int8 = (distance(quantized_model(config, bits, one).forward(tokens), exact) for one in ("int16", "int8"))
    assert 1e-6 < int16 < 2e-3 < int8 < 0.2
    unrounded = quantized_model(config, bits, "float", "numpy").forward(tokens)
    assert distance(unrounded, exact) < 1e-4
    assert distance(model_of(config).forward(tokens), exact) > (0.003 if bits == 8 else 0.05)


@each_rounding
@each_bits
def test_threads_do_not_change_a_bit_of_a_quantized_model(bits: int, quantized_inputs: str) -> None:
    """Its matrices are so small that one thread would do their work, which all are told here to share out."""
    model, tokens = quantized_model(LARGE, bits, quantized_inputs), tokens_for(LARGE, 30)
    results = []
    for n_threads in (1, 2, 5):
        ops = CompiledOps(threads=n_threads, quantized_inputs=quantized_inputs)
        ops._threads_for = lambda work, few, n_threads=n_threads: team(n_threads)
        same = Model(LARGE, model.weights, ops)
        cache = same.new_cache(chunk=30)
        results.append(np.concatenate([same.forward(part, cache) for part in (tokens[:-1], tokens[-1:])]))
    for logits in results[1:]:
        np.testing.assert_array_equal(logits, results[0])


@each_bits
@pytest.mark.parametrize("n_tokens", [1, 3, 600])
def test_products_with_quantized_weights_for_any_number_of_tokens(bits: int, n_tokens: int) -> None:
    """One, some, and more than are multiplied at once; in any layout of the inputs."""
    matrix = quantized(Matrix("w", "f32", np.random.RandomState(0).normal(size=(50, 40)).astype("f4")), bits, 32)
    x = np.random.RandomState(1).normal(size=(n_tokens, 40)).astype(np.float32)
    ops, oracle = CompiledOps(threads=1), ReferenceOps("float64", quantized_inputs="int16")
    expected = oracle.linear(x.astype(np.float64), matrix)
    for laid_out in (x, np.asfortranarray(x), x.repeat(2, axis=1)[:, ::2], x.astype(np.float64)):
        found = ops.linear(laid_out, matrix)
        assert (found.shape, found.dtype) == ((n_tokens, 50), np.float32)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    with refused(InputError, "w", 40, "(2, 39)"):
        ops.linear(np.zeros((2, 39), np.float32), matrix)


@pytest.mark.parametrize("kind", ["f32", "int8", "int4"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_no_outputs(backend: str, kind: str) -> None:
    matrix = Matrix("w", "f32", np.ones((50, 40), np.float32))
    if kind != "f32":
        matrix = quantized(matrix, int(kind[-1]), 32)
    found = ops_of(backend).linear(np.zeros((0, 40), np.float32), matrix)
    assert (found.shape, found.dtype) == ((0, 50), np.float32)


@each_bits
def test_a_token_without_any_expert_of_quantized_ones(bits: int) -> None:
    for zero in (np.zeros_like, lambda shares: shares * np.array([[0], [1]], np.float32)):
        edits = {"layers.*.expert_weights": zero}
        found, expected = (
            quantized_model(MIXTURE, bits, "int16", backend).forward([5, 6], edits=edits) for backend in BACKENDS[::-1]
        )
        assert distance(found, expected) < CLOSE_QUANTIZED["int16"]


@each_rounding
@each_bits
@pytest.mark.parametrize("value", [*[np.nan, np.inf], 0, 1e30, 1e-40])
def test_edits_to_any_number_do_with_quantized_weights_what_they_do_in_numpy(
    bits: int, quantized_inputs: str, value: float
) -> None:
    """One token's inputs of a product are replaced: logits are numbers where NumPy's are, and about the same."""

    def edit(array: np.ndarray) -> np.ndarray:
        changed = array.copy()
        changed[1:2] = value
        return changed

    for name in ("layers.1.attention_norm", "layers.0.heads", "layers.1.ffn_norm", "norm"):
        found, expected = (
            quantized_model(MIXTURE, bits, quantized_inputs, backend).forward([5, 6, 7], edits={name: edit})
            for backend in BACKENDS[::-1]
        )
        np.testing.assert_array_equal(np.isfinite(found[0]), np.isfinite(expected[0]))
        np.testing.assert_array_equal(np.isfinite(found).all(axis=1), np.isfinite(expected).all(axis=1))
        if np.isfinite(expected).all():
            assert distance(found, expected) < CLOSE_QUANTIZED[quantized_inputs]


# --------------------------------------------------------------------------------------------- what people hand over


@functools.cache
def pair() -> list[Model]:
    """Return the same model with each backend."""
    return [model_of(MIXTURE, backend=backend) for backend in BACKENDS]


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3) | st.integers(-3, 2**70) | st.integers(0, 100),
        lambda inner: st.lists(inner, max_size=4) | st.tuples(inner, inner),
        max_leaves=5,
    )
    | st.sampled_from([np.float32, np.int8, np.uint64, ">i4", "U3", "O", "M8[s]", np.complex64, np.float16]).flatmap(
        lambda dtype: st.lists(st.integers(0, 3), max_size=3).map(lambda shape: np.ones(shape, "i4").astype(dtype))
    )
)
@settings(max_examples=100)
def test_any_tokens_are_an_error_of_ours_or_give_what_numpy_gives(tokens: object) -> None:
    results = []
    for model in pair():
        try:
            results.append(model.forward(tokens))
        except MistralRefError as error:
            results.append(str(error))
    plain, found = results
    if isinstance(plain, str):
        assert plain == found
        assert plain.isprintable()  # one line
    else:
        assert distance(found, plain) < 1e-4


@given(
    st.sampled_from(EDITABLE),
    st.lists(st.integers(0, 40), max_size=4),
    st.sampled_from([np.float32, np.float64, np.float16, np.int32, ">f4", "O", "U2", np.complex64, bool]),
)
@settings(max_examples=100)
def test_edits_of_any_shape_and_dtype_are_errors_of_ours_unless_they_fit(
    name: str, shape: list[int], dtype: object
) -> None:
    _, model = pair()
    value = next(step.value for step in model.steps([1, 2]) if step.name == name)
    new = np.ones(shape, np.int32).astype(dtype)
    if new.shape == value.shape and new.dtype == value.dtype:
        assert model.forward([1, 2], edits={name: new}).shape == (2, MIXTURE.vocab_size)
    else:
        with refused(InputError, name, new.dtype, new.shape, value.dtype, value.shape):
            model.forward([1, 2], edits={name: new})


@pytest.mark.slow
@pytest.mark.parametrize("family", ["float16", "bfloat16", "dense_windowed"])
def test_weights_may_lie_at_any_address(family: str, tmp_path: Path) -> None:
    """A header of an odd length, which the format allows and no writer makes, puts every tensor at an odd address."""
    aligned, odd = tmp_path / "aligned", tmp_path / "odd"
    for directory in (aligned, odd):
        directory.mkdir()
        write_consolidated(directory, FAMILIES[family])
    path = odd / "consolidated.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little") + 1
    path.write_bytes(length.to_bytes(8, "little") + content[8 : 7 + length] + b" " + content[7 + length :])
    tokens = tokens_for(FAMILIES[family].config, 20)
    for part in (tokens, tokens[:1]):
        logits = [mistral_ref.load(directory, backend="numba", threads=1).forward(part) for directory in (aligned, odd)]
        np.testing.assert_array_equal(*logits)


@pytest.mark.parametrize("options", [{"dtype": "float64"}, {"dtype": "float16"}, {"rope_angles": "f32"}])
def test_options_are_checked(options: dict[str, str]) -> None:
    with refused(InputError, *options, *map(repr, options.values())):
        mistral_ref.load(backend="numba", **options)


def test_angles_are_rounded_where_they_are_asked_for() -> None:
    exact, rounded = (mistral_ref.load(threads=1, rope_angles=angles) for angles in ("float64", "float32"))
    tokens = tokens_for(exact.config, 900)
    assert 0 < distance(rounded.forward(tokens), exact.forward(tokens)) < 0.1


def test_one_backend_says_which_it_is() -> None:
    assert [ops_of(backend).name for backend in BACKENDS] == list(BACKENDS)
    assert mistral_ref.load().ops.name == "numba"
