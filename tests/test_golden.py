"""The forward pass against transformers: the same logits for every family, in every layout, whole and in chunks.

And proof that agreeing means something: every mistake that has been made with this architecture, made here on purpose,
moves the logits by at least a hundred times the tolerance.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support.checkpoints import FAMILIES, Family, Tensors, draw_weights, fp8_rounded, write_consolidated, write_hf
from support.errors import warned
from support.gguf_files import write_gguf
from support.paths import GOLDEN
from support.tiny import BACKENDS

import mistral_ref
from mistral_ref.config import ModelConfig

TOLERANCE = 2e-5  # of the largest logit; what transformers computes in float32 is up to 0.7e-5 from the float64 truth
SHARPNESS = 100 * TOLERANCE

LAYOUTS: dict[str, Callable[[Path, Family], None]] = {
    "consolidated": write_consolidated,
    "hf": write_hf,
    "hf_shards": partial(write_hf, shards=3),
    "hf_fused_experts": partial(write_hf, fused_experts=True),
    "hf_wrapper_v4": partial(write_hf, wrapper="v4"),
    "hf_wrapper_v5": partial(write_hf, wrapper="v5"),
    "consolidated_vision": partial(write_consolidated, vision=True),
    "gguf": lambda directory, family: write_gguf(directory / "model.gguf", family),
    "gguf_old_experts": lambda directory, family: write_gguf(directory / "model.gguf", family, stacked=False),
}


def layouts_of(family: Family) -> list[str]:
    names = ["consolidated", "hf", "hf_shards"]
    if family.config.moe is not None:
        names.append("hf_fused_experts")
    if family.model_type == "ministral3":
        names += ["hf_wrapper_v4", "hf_wrapper_v5", "consolidated_vision"]
    if len(set(family.config.sliding_window)) == 1:  # a GGUF file has one window for all layers
        names += ["gguf"] if family.config.moe is None else ["gguf", "gguf_old_experts"]
    return names


def golden(family: Family) -> tuple[np.ndarray, np.ndarray]:
    """Return the tokens (T,) and transformers' logits (T, V)."""
    stored = load_file(GOLDEN / f"{family.name}.safetensors")
    return stored["tokens"], stored["logits"]


def distance(logits: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, as a part of the largest logit."""
    assert logits.shape == expected.shape
    assert logits.dtype == np.float32
    return float(np.abs(logits - expected).max() / np.abs(expected).max())


def load(directory: Path, backend: str = "numpy") -> mistral_ref.Model:
    """Load a model; one thread is enough for it, whatever else the machine is doing."""
    return mistral_ref.load(directory, backend=backend, threads=1 if backend == "numba" else None)


def load_layout(
    directory: Path, family: Family, layout: str = "consolidated", backend: str = "numpy"
) -> mistral_ref.Model:
    LAYOUTS[layout](directory, family)
    if "wrapper" in layout or "vision" in layout:
        with warned(directory, "vision_tower" if "wrapper" in layout else "vision_encoder"):
            return load(directory, backend)
    return load(directory, backend)


each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


@each_backend
@pytest.mark.parametrize(
    ("family", "layout"),
    [
        pytest.param(family, layout, id=f"{name}-{layout}")
        for name, family in FAMILIES.items()
        for layout in layouts_of(family)
    ],
)
def test_every_layout_gives_the_logits_of_transformers(
    family: Family, layout: str, backend: str, tmp_path: Path
) -> None:
    model = load_layout(tmp_path, family, layout, backend)
    assert model.ops.name == backend
    row_order = "halves" if layout.startswith("hf") else "interleaved"
    assert model.config == family.config.replace(rope_row_order=row_order)
    tokens, logits = golden(family)
    assert distance(model.forward(tokens), logits) <= TOLERANCE


@each_backend
@each_family
def test_every_split_into_passes_gives_the_same_logits(family: Family, backend: str, tmp_path: Path) -> None:
    model = load_layout(tmp_path, family, backend=backend)
    tokens, logits = golden(family)
    for chunk, part in ((1, 1), (3, 3), (5, 13), (16, 7), (len(tokens), len(tokens))):
        cache = model.new_cache(chunk=chunk)
        parts = [model.forward(tokens[start : start + part], cache) for start in range(0, len(tokens), part)]
        assert distance(np.concatenate(parts), logits) <= TOLERANCE, f"chunk {chunk}, {part} tokens in a call"


@each_backend
@pytest.mark.parametrize(
    ("write", "block"),
    [
        pytest.param(partial(write_consolidated, fp8=True), None, id="consolidated"),
        pytest.param(partial(write_hf, fp8="tensor"), None, id="hf"),
        pytest.param(partial(write_hf, fp8="block"), 128, id="hf-blocks"),
    ],
)
def test_fp8_gives_the_logits_of_the_weights_that_it_holds(
    write: Callable[[Path, Family], None], block: int | None, backend: str, tmp_path: Path
) -> None:
    nemo = FAMILIES["nemo"]
    family = dataclasses.replace(nemo, config=nemo.config.replace(dim=136, hidden_dim=260), dtype="f32")
    tokens, _ = golden(nemo)
    stored, widened = tmp_path / "stored", tmp_path / "widened"
    stored.mkdir()
    widened.mkdir()
    write(stored, family)
    write_consolidated(widened, family, fp8_rounded(draw_weights(family), block))
    expected = load(widened).forward(tokens)
    assert distance(load(stored, backend).forward(tokens), expected) <= TOLERANCE


# Mistakes. Each returns the configuration with a mistake in it, or as it is where the mistake cannot be made.


def one_key_more(family: Family, more: int = 1) -> ModelConfig:
    windows = tuple(window and window + more for window in family.config.sliding_window)
    return family.config.replace(sliding_window=windows)


def other_attention_factor(family: Family) -> ModelConfig:
    """1 where it should be 0.1 ln(factor) + 1, and that where it should be 1."""
    yarn = family.config.yarn
    if yarn is None:
        return family.config
    other = 1.0 if yarn.attention_factor != 1 else 0.1 * np.log(yarn.factor) + 1
    return family.config.replace(yarn=dataclasses.replace(yarn, attention_factor=float(other)))


def frequencies_not_stretched(family: Family) -> ModelConfig:
    yarn = family.config.yarn
    return family.config.replace(yarn=yarn and dataclasses.replace(yarn, factor=1))


def one_expert_fewer(family: Family) -> ModelConfig:
    moe = family.config.moe
    fewer = moe and dataclasses.replace(moe, num_experts_per_tok=moe.num_experts_per_tok - 1)
    return family.config.replace(moe=fewer)


CONFIG_MISTAKES: dict[str, Callable[[Family], ModelConfig]] = {
    "one_key_more": one_key_more,
    "one_key_fewer": partial(one_key_more, more=-1),
    "rows_of_the_other_layout": lambda family: family.config.replace(rope_row_order="halves"),
    "other_theta": lambda family: family.config.replace(rope_theta=1e6 if family.config.rope_theta == 1e4 else 1e4),
    "other_attention_factor": other_attention_factor,
    "frequencies_not_stretched": frequencies_not_stretched,
    "no_query_temperature": lambda family: family.config.replace(query_temperature=None),
    "one_expert_fewer": one_expert_fewer,
    "norm_eps_1e-6": lambda family: family.config.replace(norm_eps=1e-6 if family.stream < 1 else 1e-5),
}


@pytest.mark.parametrize(
    ("family", "config"),
    [
        pytest.param(family, config, id=f"{family.name}-{name}")
        for family in FAMILIES.values()
        for name, mistake in CONFIG_MISTAKES.items()
        if (config := mistake(family)) != family.config
    ],
)
def test_a_mistake_in_the_configuration_is_seen(family: Family, config: ModelConfig, tmp_path: Path) -> None:
    model = load_layout(tmp_path, family)
    tokens, logits = golden(family)
    mistaken = mistral_ref.Model(config, model.weights, model.ops, tokenizer=None)
    assert distance(mistaken.forward(tokens), logits) >= SHARPNESS


# Mistakes in the computation: weights with which the right computation gives what a wrong one gives with the family's.


def tiled_heads(config: ModelConfig, weights: Tensors) -> Tensors:
    """h % G in place of h // (H/G): head h moves to h % G * (H/G) + h // G, from where it reads key head h % G."""
    group = config.n_heads // config.n_kv_heads
    heads = np.arange(config.n_heads)
    head_at = np.argsort(heads % config.n_kv_heads * group + heads // config.n_kv_heads)
    rows = (head_at[:, np.newaxis] * config.head_dim + np.arange(config.head_dim)).ravel()
    moved = dict(weights)
    for layer in range(config.n_layers):
        wq, wo = (f"layers.{layer}.attention.{kind}.weight" for kind in ("wq", "wo"))
        moved |= {wq: weights[wq][rows], wo: weights[wo][:, rows]}
    return moved


def scale_from_width(config: ModelConfig, weights: Tensors) -> Tensors:
    """Scores divided by sqrt(D/H) in place of sqrt(K)."""
    scale = np.float32((config.head_dim * config.n_heads / config.dim) ** 0.5)
    return {name: weight * scale if name.endswith("wq.weight") else weight for name, weight in weights.items()}


def gate_and_up_swapped(config: ModelConfig, weights: Tensors) -> Tensors:
    """silu of the up projection in place of the gate's."""
    swapped = {"w1.weight": "w3.weight", "w3.weight": "w1.weight"}
    return {name: weights[name[:-9] + swapped.get(name[-9:], name[-9:])] for name in weights}


WEIGHT_MISTAKES: dict[Callable[[ModelConfig, Tensors], Tensors], Callable[[ModelConfig], bool]] = {
    tiled_heads: lambda config: 1 < config.n_kv_heads < config.n_heads,
    scale_from_width: lambda config: config.n_heads * config.head_dim != config.dim,
    gate_and_up_swapped: lambda config: True,
}


@pytest.mark.parametrize(
    ("family", "mistake"),
    [
        pytest.param(family, mistake, id=f"{family.name}-{mistake.__name__}")
        for family in FAMILIES.values()
        for mistake, applies in WEIGHT_MISTAKES.items()
        if applies(family.config)
    ],
)
def test_a_mistake_in_the_computation_is_seen(
    family: Family, mistake: Callable[[ModelConfig, Tensors], Tensors], tmp_path: Path
) -> None:
    weights = mistake(family.config, draw_weights(family))
    write_consolidated(tmp_path, dataclasses.replace(family, dtype="f32"), weights)
    tokens, logits = golden(family)
    assert distance(load(tmp_path).forward(tokens), logits) >= SHARPNESS
