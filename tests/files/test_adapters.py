"""Models with adapters against models whose weights hold what the adapters add, in float64 and exact."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters import WRITERS, Deltas, adaptable, draw_deltas, in_halves
from support.checkpoints import FAMILIES, write_consolidated, write_hf
from support.errors import refused
from support.hub_cache import into_cache
from support.paths import GOLDEN
from support.tiny import BACKENDS, OWN_BOUND, configs, model_of, ops_of, tokens_for

import mistral_ref
from mistral_ref import kernel_choice
from mistral_ref.compare import compare_walks
from mistral_ref.config import ModelConfig
from mistral_ref.errors import CheckpointError
from mistral_ref.files.adapters import with_adapters
from mistral_ref.files.tensor_file import open_tensor_file
from mistral_ref.model import Model
from mistral_ref.reference_ops import ReferenceOps
from mistral_ref.weights import Matrix, Weights, interleaved_rows, matrices, with_matrices


def merged_by_hand(config: ModelConfig, weights: Weights, deltas: Deltas, scale: float = 1.0) -> Weights:
    """Return weights to which the deltas are added in float64."""

    def change(matrix: Matrix) -> Matrix:
        whole = matrix.rows(slice(None), np.float64)
        if matrix.name in deltas:
            delta = deltas[matrix.name].whole * scale
            whole = whole + (in_halves(config, matrix.name, delta) if config.rope_row_order == "halves" else delta)
        return Matrix(matrix.name, "f32", whole)

    return with_matrices(weights, change)


def oracle(config: ModelConfig, weights: Weights) -> Model:
    """Return a model in float64."""
    return Model(config, weights, ReferenceOps("float64"))


def assert_equal(adapted: Model, by_hand: Model, tokens: Sequence[int] = (1, 2, 3, 4)) -> None:
    """Assert that each step of an adapted model is that of the other one, of the same values before it, in float64."""
    comparison = compare_walks(adapted.steps(tokens), by_hand.steps(tokens), own=True)
    assert all("_lora_" in name for name in comparison.unmatched)
    assert len(comparison.unmatched) == 2 * len(adapted.config.adapted) > 0
    assert max(difference.ulps for difference in comparison) < 1e-4  # of float32


@given(config=configs(), data=st.data())
@settings(max_examples=60)
def test_an_adapter_is_what_merged_weights_are(config: ModelConfig, data: st.DataObject) -> None:
    made_by = data.draw(st.sampled_from(list(WRITERS)))
    names = adaptable(config)
    if config.moe is None:
        names = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    deltas = draw_deltas(config, names, rank=data.draw(st.integers(1, 5)), scale=data.draw(st.sampled_from([0.5, 3.0])))
    scale = data.draw(st.sampled_from([1.0, 0.25, -2.0]))
    weights, tokens = model_of(config).weights, tokens_for(config, 9)
    with tempfile.TemporaryDirectory() as directory:
        path = WRITERS[made_by](Path(directory), config, deltas, data.draw(st.sampled_from(["F32", "F16", "BF16"])))
        adapted = oracle(*with_adapters(config, weights, [(path, scale)]))
    assert_equal(adapted, oracle(config, merged_by_hand(config, weights, deltas, scale)), tokens)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["huggingface", "consolidated"])
@pytest.mark.parametrize("name", ["plain", "patterns", "experts"])
def test_adapters_of_peft_give_the_logits_of_peft(name: str, layout: str, backend: str, tmp_path: Path) -> None:
    golden = open_tensor_file(GOLDEN / f"peft_{name}.safetensors")
    tokens, logits, without = (tensor.raw for tensor in golden)
    family = FAMILIES[golden.metadata["family"]]
    (write_hf if layout == "huggingface" else write_consolidated)(tmp_path, family)
    expected = logits.view("<f4").reshape(-1, family.config.vocab_size)
    model = mistral_ref.load(tmp_path, backend=backend, adapters=[GOLDEN / f"peft_{name}"])
    found = model.forward(tokens.view("<i8").tolist())
    tolerance = 5e-5 * np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance)
    assert np.abs(found - without.view("<f4").reshape(found.shape)).max() > 1000 * tolerance


@pytest.mark.parametrize("bits", [8, 4])
def test_adapters_of_quantized_weights_are_not_rounded(bits: int, tmp_path: Path) -> None:
    config = FAMILIES["nemo"].config
    (tmp_path / "model").mkdir()
    write_hf(tmp_path / "model", FAMILIES["nemo"])
    deltas = draw_deltas(config, rank=3)
    path = WRITERS["mlx-lm"](tmp_path / "adapter", config, deltas)
    plain = mistral_ref.load(tmp_path / "model", dtype="float64", quantize=bits)
    adapted = mistral_ref.load(tmp_path / "model", dtype="float64", quantize=bits, adapters=[path])
    assert_equal(adapted, oracle(plain.config, merged_by_hand(plain.config, plain.weights, deltas)))
    mistral_ref.quantize(tmp_path / "model", tmp_path / "small", bits, embedding=bits, head=bits)
    plain = mistral_ref.load(tmp_path / "small", dtype="float64")
    adapted = mistral_ref.load(tmp_path / "small", dtype="float64", adapters=[path])
    assert_equal(adapted, oracle(plain.config, merged_by_hand(plain.config, plain.weights, deltas)))


@pytest.mark.parametrize("name", ["gguf_types", "gguf_mistral3", "gguf_mixtral"])
@pytest.mark.parametrize("made_by", WRITERS)
def test_adapters_of_gguf_files(name: str, made_by: str, tmp_path: Path) -> None:
    plain = mistral_ref.load(GOLDEN / f"{name}.gguf", dtype="float64")
    deltas = draw_deltas(plain.config, rank=3)
    path = WRITERS[made_by](tmp_path, plain.config, deltas)
    adapted = mistral_ref.load(GOLDEN / f"{name}.gguf", dtype="float64", adapters=[path])
    assert_equal(adapted, oracle(plain.config, merged_by_hand(plain.config, plain.weights, deltas)))


def test_an_adapter_in_the_hub_s_cache_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    config = FAMILIES["dense_windowed"].config
    into_cache(tmp_path / "hub", "org/tuned", WRITERS["PEFT"](tmp_path / "files", config, draw_deltas(config, rank=3)))
    adapted, _ = with_adapters(config, model_of(config).weights, ["org/tuned"])
    assert dict(adapted.adapted)["layers.2.ffn_out"] == 3
    with refused(CheckpointError, "org/absent"):
        with_adapters(config, model_of(config).weights, ["org/absent"])


def test_several_adapters_add_up(tmp_path: Path) -> None:
    config = FAMILIES["mixtral_windowed"].config
    weights, names = model_of(config).weights, adaptable(config)
    wq = [name for name in names if name.endswith(".wq")]
    first, second = draw_deltas(config, rank=3, seed=1), draw_deltas(config, wq, rank=2, seed=2, scale=7.0)
    paths = [
        WRITERS["PEFT"](tmp_path / "first", config, first, "BF16"),
        WRITERS["mistral-finetune"](tmp_path / "second", config, second, "F16"),
    ]
    adapted = oracle(*with_adapters(config, weights, [paths[0], (paths[1], 0.5)]))
    assert dict(adapted.config.adapted)["layers.0.q"] == 5
    assert dict(adapted.config.adapted)["layers.0.k"] == 3
    by_hand = merged_by_hand(config, merged_by_hand(config, weights, first), second, 0.5)
    assert_equal(adapted, oracle(config, by_hand))
    assert mistral_ref.Model(*with_adapters(config, weights, []), adapted.ops).config == config


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize(("rank", "n_tokens"), [(1, 40), (8, 1), (8, 9), (17, 1), (17, 9)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_step_of_an_adapter_is_as_exact_as_a_product(
    backend: str, rank: int, n_tokens: int, kind: str, tmp_path: Path
) -> None:
    for family in ("dense_windowed", "mixtral_windowed"):
        config = FAMILIES[family].config
        path = WRITERS["PEFT"](tmp_path / family, config, draw_deltas(config, rank=rank), kind)
        plain = Model(*with_adapters(config, model_of(config).weights, [path]), ops_of(backend))
        exact = oracle(plain.config, plain.weights)
        tokens = tokens_for(config, n_tokens)
        for difference in compare_walks(plain.steps(tokens), exact.steps(tokens), own=True):
            if "_lora_" in difference.name:
                assert difference.ulps < OWN_BOUND["q"], difference


def test_kernels_of_adapters_are_compiled_before_the_first_token(tmp_path: Path) -> None:
    config = FAMILIES["dense_windowed"].config
    path = WRITERS["PEFT"](tmp_path, config, draw_deltas(config), "BF16")
    weights = model_of(config).weights  # all of them float32
    for adapters, is_there in (([], False), ([path], True)):
        _, adapted = with_adapters(config, weights, adapters)
        kernels = kernel_choice.of_passes(
            config, adapted, "float32", {1, 9}, last_only=False, quantized_inputs="int16", bf16_inputs="float32"
        )
        assert any("bf16" in kernel.args for kernel in kernels) == is_there


# --------------------------------------------------------------------------------------------------- merged for good


@pytest.mark.parametrize("layout", ["huggingface", "consolidated"])
@pytest.mark.parametrize("family", ["dense_windowed", "mixtral_windowed"])
def test_quantize_merges(family: str, layout: str, tmp_path: Path) -> None:
    config = FAMILIES[family].config
    (tmp_path / "model").mkdir()
    (write_hf if layout == "huggingface" else write_consolidated)(tmp_path / "model", FAMILIES[family])
    deltas = draw_deltas(config, rank=3)
    path = WRITERS["PEFT"](tmp_path / "adapter", config, deltas)
    mistral_ref.quantize(tmp_path / "model", tmp_path / "small", 8, adapters=[(path, 2.0)])
    merged = mistral_ref.load(tmp_path / "small", backend="numpy")
    assert merged.config == config  # Mistral's own row order, and no adapter is left
    plain = mistral_ref.load(tmp_path / "model", backend="numpy").weights
    for matrix, before in zip(matrices(merged.weights), matrices(plain), strict=True):
        expected = before.rows(slice(None), np.float64)
        if layout == "huggingface" and matrix.name.endswith((".wq", ".wk")):
            expected = expected[interleaved_rows(len(expected), config.head_dim)]
        expected = expected + 2 * deltas[matrix.name].whole if matrix.name in deltas else expected
        off = np.abs(matrix.rows(slice(None), np.float64) - expected).max()
        assert off <= np.abs(expected).max() / (1e6 if matrix.name.endswith(".gate") else 100), matrix
