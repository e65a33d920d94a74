"""The doctor on weights: what is no number, rows of zeros, outliers, scales, and the order of rows in two layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import Tensors, draw_weights, rows_in_halves, write_consolidated, write_hf, write_tensor_file
from support.gguf_files import Stored, config_fields, family_tensors, gguf_bytes, write_gguf
from support.paths import GOLDEN
from support.patients import assert_finds, assert_healthy, changed_weights, family, write_patient

import mistral_ref
from mistral_ref.files.tensor_file import open_tensor_file
from mistral_ref.measure.doctor import examine

W1, NORM = "layers.1.feed_forward.w1.weight", "layers.1.ffn_norm.weight"


def nan(weights: Tensors) -> None:
    weights[W1][7, 3] = np.nan


def infinite(weights: Tensors) -> None:
    weights[W1][7, 3] = weights[W1][9, 0] = -np.inf


def dead(weights: Tensors) -> None:
    weights[W1][7] = 0


def outlier(weights: Tensors) -> None:
    weights[W1][7, 3] = 2e4


def tiny(weights: Tensors) -> None:
    weights[W1] *= 1e-9


def norm(weights: Tensors) -> None:
    weights[NORM][2] = np.nan


def silent_norm(weights: Tensors) -> None:
    weights[NORM][:] = 0


@pytest.mark.parametrize("name", ["dense_windowed", "float16", "bfloat16"])
@pytest.mark.parametrize(
    ("plant", "severity", "facts"),
    [
        (nan, "wrong", ["layers.1.feed_forward.w1", "NaN", "row 7"]),
        (infinite, "wrong", ["layers.1.feed_forward.w1", "infinite", "2 of", 7]),
        (dead, "suspicious", ["layers.1.feed_forward.w1", "zeros", "row 7"]),
        (outlier, "suspicious", ["layers.1.feed_forward.w1", "outliers", "row 7", "2e+04"]),
        (norm, "wrong", [NORM, "NaN", "1 of"]),
        (silent_norm, "wrong", [NORM, "zeros"]),
    ],
)
def test_values_in_every_kind_of_float(
    tmp_path: Path, name: str, plant: Callable[[Tensors], None], severity: str, facts: list[object]
) -> None:
    path = tmp_path / "model.safetensors"
    write_hf(tmp_path, family(name))
    assert_healthy(tmp_path)
    write_hf(tmp_path, family(name), changed_weights(name, plant))
    assert_finds(tmp_path, severity, path, *facts)
    assert_healthy(tmp_path, quick=True)


def test_weights_are_much_too_small(tmp_path: Path) -> None:
    write_hf(tmp_path, family("bfloat16"), changed_weights("bfloat16", tiny))
    assert_finds(tmp_path, "suspicious", tmp_path / "model.safetensors", "layers.1.feed_forward.w1", "median")


@pytest.mark.parametrize(("row", "has_text"), [(30, False), (1005, True)])
def test_rows_that_no_text_becomes_may_be_zero(tmp_path: Path, row: int, has_text: bool) -> None:
    def dead(weights: Tensors) -> None:
        weights["tok_embeddings.weight"][row] = 0

    write_patient(tmp_path, hf=False)
    write_consolidated(tmp_path, family(), changed_weights("dense_windowed", dead))
    if has_text:
        assert_finds(tmp_path, "suspicious", tmp_path / "consolidated.safetensors", "tok_embeddings", "row 1005")
    else:  # a control token that is never used
        assert_healthy(tmp_path)


GATE = "model.layers.1.mlp.gate_proj.weight"  # layers.1.feed_forward.w1


def stored(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Return the tensors of a file with F8_E4M3 and F32, to be changed and written again."""
    tensors = open_tensor_file(path)
    kinds = {"F8_E4M3": "u1", "F32": "<f4"}
    return {one.name: (one.dtype, one.raw.view(kinds[one.dtype]).reshape(one.shape).copy()) for one in tensors}


@pytest.mark.parametrize("block", ["tensor", "block"])
@pytest.mark.parametrize(
    ("scale", "n", "severity", "facts"),
    [
        (np.nan, 2, "wrong", ["scales", "nan"]),  # and the weights are NaN, too
        (0.0, 2, "wrong", ["scales", 0]),  # and zero
        (-1e-3, 1, "wrong", ["scales", -0.001]),
        (1e4, 1, "suspicious", ["median"]),  # the inverse of a scale
    ],
)
def test_scales_of_fp8(tmp_path: Path, block: Any, scale: float, n: int, severity: str, facts: list[object]) -> None:
    path = tmp_path / "model.safetensors"
    write_hf(tmp_path, family(), fp8=block)
    assert_healthy(tmp_path)
    tensors = stored(path)
    tensors[f"{GATE}_scale_inv"][1][...] = scale
    write_tensor_file(path, tensors)
    assert_finds(tmp_path, severity, path, "layers.1.feed_forward.w1", *facts, n=n)


def test_fp8_without_a_scale_and_with_nan(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_hf(tmp_path, family(), fp8="tensor")
    tensors = stored(path)
    write_tensor_file(path, {name: one for name, one in tensors.items() if name != f"{GATE}_scale_inv"})
    assert_finds(tmp_path, "wrong", path, GATE, "fp8", "scale")
    tensors[GATE][1][5, 2] = 0x7F
    write_tensor_file(path, tensors)
    assert_finds(tmp_path, "wrong", path, "layers.1.feed_forward.w1", "NaN", "row 5")


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_of_8_and_4_bits(tmp_path: Path, bits: int) -> None:
    (tmp_path / "float").mkdir()
    write_consolidated(tmp_path / "float", family())
    mistral_ref.quantize(tmp_path / "float", tmp_path / "small", bits)
    assert_healthy(tmp_path / "small")
    path = tmp_path / "small" / "consolidated.safetensors"
    content = bytearray(path.read_bytes())
    scales = next(one for one in open_tensor_file(path) if one.name == "layers.1.feed_forward.w1.scales")
    begin = content.index(scales.raw.tobytes())
    content[begin : begin + scales.raw.nbytes] = bytes(scales.raw.nbytes)  # as a hole in the file
    path.write_bytes(content)
    assert_finds(tmp_path / "small", "suspicious", path, "layers.1.feed_forward.w1", "zeros")


def test_packed_types_of_gguf_files(tmp_path: Path) -> None:
    assert_healthy(GOLDEN / "gguf_types.gguf")
    path, config = tmp_path / "tiny.gguf", family().config.replace(hidden_dim=96)
    weights = draw_weights(replace(family(), config=config))
    tensors, fields = family_tensors(weights), config_fields(config)
    blocks = np.ones((40 * 3, 34), np.uint8)  # Q8_0: a float16, the scale, and 32 codes
    for scale, found in ((0.01, []), (np.inf, ["layers.1.feed_forward.w2", "row 1"])):
        blocks[5, :2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        blocks[6:, :2] = blocks[:5, :2] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
        tensors["blk.1.ffn_down.weight"] = Stored("Q8_0", (40, 96), blocks.tobytes())
        path.write_bytes(gguf_bytes(fields, tensors))
        if found:
            assert_finds(path, "wrong", path, *found)
        else:
            assert_healthy(path)


def test_progress_counts_weights(tmp_path: Path) -> None:
    write_hf(tmp_path, family("bfloat16"))
    calls: list[tuple[int, int]] = []
    examine(tmp_path, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1]


# --- two layouts ------------------------------------------------------------------------------------------------------


def moved(name: str, matrix: str, move: Callable[[np.ndarray, int], np.ndarray]) -> Tensors:
    """Return the weights with the rows of wq or wk moved; `move` takes the rows and the number of heads."""
    head_dim = family(name).config.head_dim

    def change(weights: Tensors) -> None:
        for key in [key for key in weights if key.endswith(matrix)]:
            weights[key] = move(weights[key], weights[key].shape[0] // head_dim)

    return changed_weights(name, change)


def interleaved(rows: np.ndarray, n_heads: int) -> np.ndarray:
    """Undo what `rows_in_halves` does."""
    return rows.reshape(n_heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("name", ["dense_windowed", "nemo", "mixtral"])
def test_the_rows_of_hugging_faces_layout_were_not_moved(tmp_path: Path, name: str) -> None:
    write_patient(tmp_path, name)
    assert_healthy(tmp_path, quick=True)
    for matrix in ("wq", "wk"):
        write_hf(tmp_path, family(name), moved(name, f".{matrix}.weight", interleaved))
        facts = (f"layers.0.attention.{matrix}", "not moved", "interleaved", "halves")
        assert_finds(tmp_path, "wrong", tmp_path / "model.safetensors", *facts, quick=True)


def test_keys_were_moved_as_if_they_had_as_many_heads_as_queries(tmp_path: Path) -> None:
    """As llama2.c's export does it."""
    write_patient(tmp_path, "nemo")
    n_heads, head_dim = family("nemo").config.n_heads, family("nemo").config.head_dim
    wrong = moved("nemo", ".wk.weight", lambda rows, n: interleaved(rows_in_halves(rows, n_heads), n))
    write_hf(tmp_path, family("nemo"), wrong)
    facts = ("layers.0.attention.wk", n_heads, head_dim, head_dim // 2)
    assert_finds(tmp_path, "wrong", tmp_path / "model.safetensors", *facts, quick=True)


def test_the_consolidated_file_has_rows_in_halves_beside_a_gguf_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", family("bfloat16"))
    write_consolidated(tmp_path, family("bfloat16"))
    assert_healthy(tmp_path, quick=True)

    write_consolidated(tmp_path, family("bfloat16"), moved("bfloat16", ".wq.weight", rows_in_halves))
    assert_finds(
        tmp_path, "wrong", tmp_path / "tiny.gguf", "layers.0.attention.wq", "halves", "interleaved", quick=True
    )


def test_two_layouts_of_two_models(tmp_path: Path) -> None:
    write_consolidated(tmp_path, family())

    def tuned(weights: Tensors) -> None:
        weights[W1] += 1e-3

    write_hf(tmp_path, family(), changed_weights("dense_windowed", tuned))
    path = tmp_path / "model.safetensors"
    assert_finds(tmp_path, "wrong", path, "layers.1.feed_forward.w1", "consolidated.safetensors", quick=True)
    write_hf(tmp_path, family(), fp8="block")  # rounding is no other model
    assert_healthy(tmp_path)


def test_a_gguf_file_with_more_rows_is_compared_where_it_can_be(tmp_path: Path) -> None:
    write_consolidated(tmp_path, family())
    longer = family().config.replace(vocab_size=family().config.vocab_size + 8)
    write_gguf(tmp_path / "tiny.gguf", replace(family(), config=longer))
    # The weights are drawn one after the other, so only the names of what is compared count here.
    facts = [one.what for one in examine(tmp_path, quick=True).findings]
    assert any("vocab_size" in what for what in facts)
    assert not any("tok_embeddings" in what for what in facts)
