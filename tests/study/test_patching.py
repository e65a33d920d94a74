"""Sweeps against naive passes in float64, and against a transformer written out by hand; what they cost; what fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.adapters import adapted
from support.errors import refused
from support.tiny import BACKENDS, MIXTURE, SMALL, configs, model_of, tokens_for

import mistral_ref
from mistral_ref.config import ModelConfig
from mistral_ref.errors import InputError
from mistral_ref.model import Model
from mistral_ref.steps import axis_sizes, step_names
from mistral_ref.study import patching
from mistral_ref.study.broken import broken
from mistral_ref.study.changes import Mean, apply
from mistral_ref.study.patching import Sweep, ablate, patch, variants
from mistral_ref.walk import inside_attention

TOKENS, OTHER = tokens_for(SMALL, 7), tokens_for(SMALL, 7, seed=1)
TO = (3, 5)  # two token ids


def naive(model: Model, tokens: list[int], name: str, token: int | None, head: int | None, new: np.ndarray) -> float:
    """Return the logit difference after a whole pass in which one place of a step has the values of `new`."""

    def edit(value: np.ndarray) -> np.ndarray:
        value = value.copy()
        tokens_axis = 1 if inside_attention([name]) else 0
        index: list[Any] = [slice(None)] * 2
        index[tokens_axis] = slice(None) if token is None else token
        if head is not None:
            index[1 - tokens_axis] = head
        value[tuple(index)] = new[tuple(index)]
        return value

    logits_V = model.forward(tokens, edits={name: edit})[-1]
    return float(logits_V[TO[0]] - logits_V[TO[1]])


def sweepable(config: ModelConfig) -> list[str]:
    """Return the names of the steps that any sweep can go over."""
    names = [name for name in step_names(config) if name not in ("norm", "logits")]
    return [name for name in names if "token" in axis_sizes(config, name, 1)]


def other_sweepable(config: ModelConfig, is_patch: bool) -> list[str]:
    """Return the names of the steps inside attention that can have numbers of another text, or zeros."""
    kinds = ("attention_weights", "scores") if is_patch else ("attention_weights",)
    return [f"layers.{layer}.{kind}" for layer in range(config.n_layers) for kind in kinds]


@given(st.data(), configs())
@settings(max_examples=20)
def test_sweeps_of_any_model_are_what_naive_passes_give(data: st.DataObject, config: ModelConfig) -> None:
    config = config.replace(vocab_size=config.vocab_size + 6)
    model = model_of(config, dtype="float64")
    n_tokens = data.draw(st.integers(1, 14))
    tokens, other = tokens_for(config, n_tokens), tokens_for(config, n_tokens, seed=1)
    is_patch = data.draw(st.booleans())
    name = data.draw(st.sampled_from(sweepable(config)) | st.sampled_from(other_sweepable(config, is_patch)))
    sizes = axis_sizes(config, name, n_tokens)
    n_heads = sizes.get("head", sizes.get("kv_head", 0))
    by = data.draw(st.sampled_from(["token", "step", *["head"] * bool(n_heads)]))
    at = data.draw(st.integers(0, n_tokens - 1))
    token = None if by == "token" else data.draw(st.none() | st.integers(0, at))
    head = data.draw(st.integers(0, n_heads - 1)) if n_heads and by != "head" and data.draw(st.booleans()) else None
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(variants, "TOGETHER", data.draw(st.integers(1, 40)))
        where: dict[str, Any] = {"steps": name, "token": token, "head": head, "at": at}
        if is_patch:
            found = patch(model, tokens, other, by=by, metric=TO, **where)
            new = model.trace(other, keep=name)[name]
        else:
            found = ablate(model, tokens, by=by, metric=TO, **where)
            new = np.zeros_like(model.trace(tokens, keep=name)[name])
    places = {
        "head": [(token, number) for number in range(n_heads)],
        "token": [(number, head) for number in range(at + 1)],
        "step": [(token, head)],
    }[by]
    new = new[:, : at + 1, : at + 1] if inside_attention([name]) else new[: at + 1]
    expected = [naive(model, tokens[: at + 1], name, *place, new) for place in places]
    np.testing.assert_allclose(found.values_RC, [expected], rtol=0, atol=1e-9)
    logits_TV = [model.forward(one)[at] for one in (tokens, other)]
    differences = [logits_V[TO[0]] - logits_V[TO[1]] for logits_V in logits_TV]
    np.testing.assert_allclose(found.base, differences[0], atol=1e-9)
    assert (found.other is None) == (not is_patch)
    assert found.other is None or found.other == pytest.approx(differences[1], abs=1e-9)


# -------------------------------------------------------------------------------------- a transformer written by hand


def by_hand(model: Model, tokens: list[int], change: Callable[[str, np.ndarray], np.ndarray]) -> np.ndarray:
    """Return the last token's logits of a dense model with one window, in float64: NumPy and loops, and nothing else.

    change      called with the name and the value of each step that is swept; returns the value to go on with
    """
    config, weights = model.config, model.weights

    def rows(matrix: Any) -> np.ndarray:
        return matrix.rows(slice(0, matrix.shape[0]), np.float64)

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x * x).mean(axis=1, keepdims=True) + config.norm_eps) * weight

    def turned(x_THK: np.ndarray) -> np.ndarray:
        turned_THK = x_THK.copy()
        for position in range(len(x_THK)):
            for pair in range(config.head_dim // 2):
                angle = position * config.rope_theta ** (-2 * pair / config.head_dim)
                a, b = x_THK[position, :, 2 * pair], x_THK[position, :, 2 * pair + 1]
                turned_THK[position, :, 2 * pair] = a * np.cos(angle) - b * np.sin(angle)
                turned_THK[position, :, 2 * pair + 1] = a * np.sin(angle) + b * np.cos(angle)
        return turned_THK

    def mixed(b_TD: np.ndarray, ffn: Any, layer: str) -> np.ndarray:
        """Return what a mixture of experts adds, with the pairs of a token and an expert one after the other."""
        router_TE = b_TD @ rows(ffn.gate).T
        chosen = [sorted(np.argsort(-router_E)[: config.moe.num_experts_per_tok]) for router_E in router_TE]
        pairs = [(token, expert) for token, experts in enumerate(chosen) for expert in experts]
        experts = ffn.experts
        gate_NF = change(f"{layer}.gate", np.array([rows(experts[e].w1) @ b_TD[t] for t, e in pairs]))
        up_NF = change(f"{layer}.up", np.array([rows(experts[e].w3) @ b_TD[t] for t, e in pairs]))
        hidden_NF = change(f"{layer}.ffn_hidden", gate_NF / (1 + np.exp(-gate_NF)) * up_NF)
        out_TD = np.zeros_like(b_TD)
        for (token, expert), hidden_F in zip(pairs, hidden_NF, strict=True):
            shares = np.exp(router_TE[token, chosen[token]])
            share = np.exp(router_TE[token, expert]) / shares.sum()
            out_TD[token] += share * (rows(experts[expert].w2) @ hidden_F)
        return out_TD

    n_tokens = len(tokens)
    x_TD = change("embedding", rows(weights.tok_embeddings)[tokens])
    for number, layer in enumerate(weights.layers):
        a_TD = norm(x_TD, layer.attention_norm)
        q, k, v = (
            (a_TD @ rows(matrix).T).reshape(n_tokens, -1, config.head_dim) for matrix in (layer.wq, layer.wk, layer.wv)
        )
        q, k = turned(q), turned(k)
        places = [(head, query) for head in range(config.n_heads) for query in range(n_tokens)]
        kv_heads = [head // (config.n_heads // config.n_kv_heads) for head in range(config.n_heads)]
        scores_HTS = np.full((config.n_heads, n_tokens, n_tokens), -np.inf)
        for head, query in places:
            for key in range(max(0, query - config.sliding_window[number] + 1), query + 1):
                scores_HTS[head, query, key] = q[query, head] @ k[key, kv_heads[head]] / np.sqrt(config.head_dim)
        scores_HTS = change(f"layers.{number}.scores", scores_HTS)
        weights_HTS = np.zeros_like(scores_HTS)
        for head, query in places:
            shares = np.exp(scores_HTS[head, query] - scores_HTS[head, query].max())
            weights_HTS[head, query] = shares / shares.sum()
        weights_HTS = change(f"layers.{number}.attention_weights", weights_HTS)
        heads_THK = np.zeros_like(q)
        for head, query in places:
            heads_THK[query, head] = weights_HTS[head, query] @ v[:, kv_heads[head]]
        heads_THK = change(f"layers.{number}.heads", heads_THK)
        x_TD = x_TD + change(f"layers.{number}.attention_out", heads_THK.reshape(n_tokens, -1) @ rows(layer.wo).T)
        b_TD, ffn = norm(x_TD, layer.ffn_norm), layer.feed_forward
        if config.moe is None:
            gate_TF = b_TD @ rows(ffn.w1).T
            out_TD = gate_TF / (1 + np.exp(-gate_TF)) * (b_TD @ rows(ffn.w3).T) @ rows(ffn.w2).T
        else:
            out_TD = mixed(b_TD, ffn, f"layers.{number}")
        x_TD = x_TD + change(f"layers.{number}.ffn_out", out_TD)
        x_TD = change(f"layers.{number}.residual_after_ffn", x_TD)
    return norm(x_TD, weights.norm)[-1] @ rows(weights.output).T


@pytest.mark.parametrize("by", ["head", "token", "step"])
def test_names_and_numbers_are_those_of_a_transformer_written_by_hand(by: str) -> None:
    model = model_of(SMALL, dtype="float64")
    seen: dict[str, np.ndarray] = {}

    def remembered(name: str, value: np.ndarray) -> np.ndarray:
        seen[name] = value
        return value

    by_hand(model, OTHER, remembered)
    found = patch(model, TOKENS, OTHER, by=by, metric=lambda logits_V: logits_V[3] - logits_V[5])
    for row, row_name in enumerate(found.rows):
        for column, column_name in enumerate(found.columns):
            name = f"{row_name}.{column_name}" if by == "step" else row_name
            place: Any = {"head": np.index_exp[:, column], "token": column, "step": ...}[by]

            def changed(step: str, value: np.ndarray, name: str = name, place: Any = place) -> np.ndarray:
                if step == name:
                    value = value.copy()
                    value[place] = seen[name][place]
                return value

            logits_V = by_hand(model, TOKENS, changed)
            np.testing.assert_allclose(found.values_RC[row, column], logits_V[3] - logits_V[5], atol=1e-10)


@pytest.mark.parametrize("kind", ["scores", "attention_weights"])
@pytest.mark.parametrize("by", ["head", "token", "step"])
def test_inside_attention_the_numbers_are_those_of_a_transformer_written_by_hand(by: Any, kind: str) -> None:
    model = model_of(SMALL, dtype="float64")
    seen: dict[str, np.ndarray] = {}
    by_hand(model, OTHER, seen.setdefault)
    where: dict[str, Any] = {"by": by, "steps": f"layers.*.{kind}", "metric": TO}
    sweeps = [patch(model, TOKENS, OTHER, **where)]
    if kind == "attention_weights":
        sweeps.append(ablate(model, TOKENS, **where))
    for sweep in sweeps:
        for layer, column in np.ndindex(sweep.values_RC.shape):
            name = f"layers.{layer}.{kind}"
            place: Any = {"head": np.index_exp[column], "token": np.index_exp[:, column], "step": ...}[by]
            new = np.zeros_like(seen[name]) if sweep.other is None else seen[name]

            def changed(step: str, value: np.ndarray, name: str = name, place: Any = place, new: Any = new) -> Any:
                if step == name:
                    value = value.copy()
                    value[place] = new[place]
                return value

            logits_V = by_hand(model, TOKENS, changed)
            np.testing.assert_allclose(sweep.values_RC[layer, column], logits_V[3] - logits_V[5], atol=1e-10)


@pytest.mark.parametrize("kind", ["gate", "up", "ffn_hidden"])
@pytest.mark.parametrize("by", ["token", "step"])
def test_inside_experts_zeros_give_the_numbers_of_a_transformer_written_by_hand(by: Any, kind: str) -> None:
    config = MIXTURE.replace(sliding_window=(9,) * MIXTURE.n_layers)
    model, tokens, n_pairs = model_of(config, dtype="float64"), tokens_for(config, 4), config.moe.num_experts_per_tok
    found = ablate(model, tokens, by=by, steps=f"layers.*.{kind}", metric=TO)
    for layer in range(config.n_layers):
        for column in range(found.values_RC.shape[1]):

            def changed(step: str, value: np.ndarray, layer: int = layer, token: int = column) -> np.ndarray:
                if step == f"layers.{layer}.{kind}":
                    value = value.copy()
                    value[slice(None) if by == "step" else slice(token * n_pairs, (token + 1) * n_pairs)] = 0
                return value

            logits_V = by_hand(model, tokens, changed)
            assert found.values_RC[layer, column] == pytest.approx(logits_V[3] - logits_V[5], abs=1e-10)


# ------------------------------------------------------------------------------------------------------- other sweeps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", [SMALL, MIXTURE], ids=["dense", "mixture"])
def test_both_backends_give_what_naive_passes_give(config: ModelConfig, backend: str) -> None:
    model = model_of(config, backend=backend)
    tokens, other = tokens_for(config, 12), tokens_for(config, 12, seed=1)
    source = model.trace(other)
    weights = "layers.*.attention_weights"
    found = patch(model, tokens, other, by="head", steps=weights, metric=TO)
    heads = range(config.n_heads)
    expected = [[naive(model, tokens, name, None, head, source[name]) for head in heads] for name in found.rows]
    np.testing.assert_allclose(found.values_RC, expected, atol=2e-4)
    found = patch(model, tokens, other, by="token", metric=TO)
    expected = [[naive(model, tokens, name, token, None, source[name]) for token in range(12)] for name in found.rows]
    np.testing.assert_allclose(found.values_RC, expected, atol=2e-4)
    found = ablate(model, tokens, by="head", metric=TO, token=-2)
    expected = [
        [naive(model, tokens, name, 10, head, np.zeros_like(source[name])) for head in range(config.n_heads)]
        for name in found.rows
    ]
    np.testing.assert_allclose(found.values_RC, expected, atol=2e-4)


@pytest.mark.parametrize("config", [SMALL, MIXTURE], ids=["dense", "mixture"])
def test_the_steps_of_an_adapter_can_be_swept(config: ModelConfig) -> None:
    model = adapted(model_of(config, dtype="float64"))
    tokens, other = tokens_for(config, 5), tokens_for(config, 5, seed=1)
    names = [name for name in sweepable(model.config) if "_lora_" in name and not name.startswith("layers.0")]
    source, found = model.trace(other), patch(model, tokens, other, by="token", steps=names, metric=TO)
    expected = [[naive(model, tokens, name, token, None, source[name]) for token in range(5)] for name in names]
    np.testing.assert_allclose(found.values_RC, expected, atol=1e-10)


def test_means_are_over_tokens_of_the_prompt_or_of_texts() -> None:
    model, name = model_of(SMALL, dtype="float64"), "layers.1.ffn_out"
    own, other = (model.trace(ids, keep=name)[name] for ids in (TOKENS, OTHER[:3]))
    for to, mean in (("mean", own.mean(axis=0)), ([TOKENS, OTHER[:3]], np.concatenate([own, other]).mean(axis=0))):
        for at in (6, 4):  # the mean is that of all tokens, wherever the logits are taken
            found = ablate(model, TOKENS, by="token", steps=name, metric=TO, to=to, at=at)
            new = np.tile(mean, (7, 1))
            expected = [naive(model, TOKENS[: at + 1], name, token, None, new[: at + 1]) for token in range(at + 1)]
            np.testing.assert_allclose(found.values_RC, [expected], atol=1e-10)


@pytest.mark.parametrize("by", ["head", "token", "step"])
def test_a_mean_as_a_change_is_what_a_sweep_makes_of_one_place(by: Any) -> None:
    model = model_of(SMALL, dtype="float64")
    found = ablate(model, TOKENS, by=by, metric=TO, to="mean", at=5)
    for row, row_name in enumerate(found.rows):
        for column, column_name in enumerate(found.columns):
            name = f"{row_name}.{column_name}" if by == "step" else row_name
            change = Mean(name, **({} if by == "step" else {by: column}))
            logits_V = model.forward(TOKENS, edits=apply(model, TOKENS, [change]).edits)[5]
            assert found.values_RC[row, column] == pytest.approx(logits_V[TO[0]] - logits_V[TO[1]], abs=1e-10)


def test_a_sweep_costs_a_part_of_the_naive_passes() -> None:
    """Layers times tokens: the prompt's and the other text's pass are whole, the others begin where they change."""
    model, whole = model_of(SMALL), 3 * 7
    found = patch(model, TOKENS, OTHER, by="head", metric=TO)
    assert (found.computed, found.naive) == (2 * whole + 6 * 7 * (3 + 2 + 1), (2 + 18) * whole)
    found = patch(model, TOKENS, OTHER, by="head", metric=TO, token=-1)
    assert (found.computed, found.naive) == (2 * whole + 6 * (3 + 2 + 1), (2 + 18) * whole)
    found = patch(model, TOKENS, OTHER, by="token", metric=TO)
    assert (found.computed, found.naive) == (2 * whole + 28 * (3 + 2 + 1), (2 + 28) * whole)
    found = ablate(model, TOKENS, by="step", metric=TO)
    assert (found.computed, found.naive) == (whole + 2 * 7 * (3 + 2 + 1), (1 + 6) * whole)


def test_weights_are_read_once_for_all_heads_of_a_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, n_calls = model_of(SMALL), 0
    linear = model.ops.linear

    def counted(*args: Any) -> np.ndarray:
        nonlocal n_calls
        n_calls += 1
        return linear(*args)

    monkeypatch.setattr(model.ops, "linear", counted)
    ablate(model, TOKENS, by="head", metric=TO)
    whole = 3 * 7 + 1  # products of a pass
    assert n_calls == whole + 1 + sum(7 * n_layers + 1 for n_layers in (3, 2, 1))


def test_progress_counts_places_and_ctrl_c_ends_a_sweep() -> None:
    model, seen = model_of(SMALL), []
    patch(model, TOKENS, OTHER, by="head", metric=TO, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 18) for done in range(1, 19)]

    def interrupt(done: int, total: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        patch(model, TOKENS, OTHER, by="head", metric=TO, progress=interrupt)


def test_a_result_shows_what_moved_the_metric_most() -> None:
    values = np.array([[1.0, 3.0, np.nan], [2.0, -4.0, 1.5]])
    sweep = Sweep(["embedding", "layers.0"], ["a", "b", "<c>"], values, 1.0, 3.0, "set to zero", computed=3, naive=9)
    assert sweep.top(3) == [("layers.0", "b", -5.0), ("embedding", "b", 2.0), ("layers.0", "a", 1.0)]
    np.testing.assert_array_equal(sweep.share, [[0, 1, np.nan], [0.5, -2.5, 0.25]])
    text, html = str(sweep), sweep._repr_html_()
    for fact in ("set to zero", "layers.0, b", "-5", "+2", "1", "3"):
        assert fact in text
    assert "<img" in html
    assert "<c>" not in html
    alone = Sweep(["embedding"], ["a"], np.array([[1.0]]), 1.0, None, "set to zero", computed=3, naive=9)
    assert "embedding, a" in str(alone)
    with refused(InputError, "metric", 1):
        alone.share  # noqa: B018


def test_who_carries_tom_to_he() -> None:
    """The heads that docs/notebooks/02-ablation.ipynb found with naive passes."""
    model = mistral_ref.load(threads=1)
    she, he = (model.token_ids(f"and {word}")[-1] for word in ("she", "he"))
    tom, lily = (f"{name} went to the park. Then" for name in ("Tom", "Lily"))
    found = patching.patch(model, tom, lily, by="head", metric=(she, he), token=-1)
    assert [(row, column) for row, column, _ in found.top(2)] == [
        ("layers.4.heads", "head 3"),
        ("layers.3.heads", "head 3"),
    ]
    assert found.share[4, 3] == pytest.approx(0.69, abs=0.01)
    by_token = patching.patch(model, tom, lily, by="token", metric=(she, he))
    assert by_token.columns[1] == "▁Tom @1"
    assert by_token.share[0, 1] > 0.9


# ------------------------------------------------------------------------------------------------------ what is refused


def test_a_fault_in_a_metric_is_one_line() -> None:
    model = model_of(SMALL)

    def faulty(logits_V: np.ndarray) -> float:
        raise KeyError("a\nb")

    for metric, facts in (
        (faulty, ["metric", "KeyError"]),
        (lambda logits_V: logits_V, ["metric", "number"]),
        (lambda logits_V: "x", ["metric", "'x'"]),
        (lambda logits_V: None, ["metric", "None"]),
        (5, ["metric", 5]),
        ((1, 2, 3), ["metric", "(1, 2, 3)"]),
        ((1, 101), ["metric", 101, 100]),
        (("she", "he"), ["metric", "'she'"]),
    ):
        with refused(InputError, *facts):
            ablate(model, TOKENS, by="step", metric=metric)
    seen: list[np.ndarray] = []
    ablate(model, TOKENS, by="step", metric=lambda logits_V: seen.append(logits_V) or logits_V.fill(0) or 1.0)
    assert len(seen) == 7


@pytest.mark.parametrize(
    ("where", "facts"),
    [
        ({"by": "neuron"}, ["by", "'neuron'", "head"]),
        ({"by": "head", "steps": "layers.9.q"}, ["'layers.9.q'"]),
        ({"by": "head", "steps": "layers.*.ffn_out"}, ["layers.0.ffn_out", "heads"]),
        ({"by": "head", "steps": ["layers.0.q", "layers.0.k"]}, [2, 6, "heads"]),
        ({"by": "head", "head": 1}, ["head"]),
        ({"by": "token", "token": 1}, ["token"]),
        ({"by": "token", "steps": "layers.0.scores"}, ["layers.0.scores", "tokens"]),
        ({"by": "token", "steps": "logits"}, ["logits"]),
        ({"by": "token", "steps": "layers.*.heads", "head": 6}, ["head", 6, 5]),
        ({"by": "step", "head": 1}, ["layers.0.attention_out", "heads"]),
        ({"by": "step", "token": 7}, ["token", 7, 6]),
        ({"by": "step", "token": 5, "at": 3}, ["token", 5, 3]),
        ({"by": "step", "at": 7}, ["at", 7, 6]),
    ],
)
def test_places_that_do_not_exist_are_refused(where: dict[str, Any], facts: list[object]) -> None:
    with refused(InputError, *facts):
        ablate(model_of(SMALL), TOKENS, metric=TO, **where)


def test_other_refusals() -> None:
    model = model_of(SMALL)
    with refused(InputError, "tokens", 3, 7):
        patch(model, TOKENS, [1, 2, 3], by="head", metric=TO)
    for to, facts in (("men", ["'men'"]), ([], ["[]"]), (5, ["5"]), ([[1], [999]], ["prompts[1]", 999])):
        with refused(InputError, *facts):
            ablate(model, TOKENS, by="head", metric=TO, to=to)
    with refused(InputError, "bug"):
        ablate(broken(model, "theta"), TOKENS, by="head", metric=TO)
    for to in ("mean", [[1, 2]]):
        for kind in ("scores", "attention_weights"):
            with refused(InputError, f"layers.0.{kind}", "mean", "tokens"):
                ablate(model, TOKENS, by="head", steps=f"layers.0.{kind}", metric=TO, to=to)
        with refused(InputError, "layers.0.gate", "tokens"):
            ablate(model_of(MIXTURE), [1, 2], by="token", steps="layers.0.gate", metric=TO, to=to)
    with refused(InputError, "layers.0.gate", "tokens"):
        patch(model_of(MIXTURE), [1, 2], [1, 3], by="token", steps="layers.0.gate", metric=TO)
