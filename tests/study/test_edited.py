"""Edited models: the same edits in every pass, in whatever way a text is computed. Steering vectors are such edits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import refused
from support.tiny import BACKENDS, MIXTURE, SMALL, configs, model_of, tokens_for

import mistral_ref
from mistral_ref.config import ModelConfig
from mistral_ref.errors import InputError
from mistral_ref.steps import step_names
from mistral_ref.study.broken import broken
from mistral_ref.study.changes import Patch, Scale, Set, Swap, Zero, apply, with_config
from mistral_ref.study.edited import edited
from mistral_ref.study.patching import ablate, patch, steered, steering_vector

TOKENS = tokens_for(SMALL, 11)


def halved(value: np.ndarray) -> np.ndarray:
    return value * value.dtype.type(0.5)


@given(st.data(), configs())
@settings(max_examples=15)
def test_chunks_and_single_tokens_get_the_edits_that_a_whole_pass_gets(
    data: st.DataObject, config: ModelConfig
) -> None:
    model = model_of(config, dtype="float64")
    name = data.draw(st.sampled_from([name for name in step_names(config) if not name.endswith("scores")]))
    tokens = tokens_for(config, 9)
    changed = edited(model, {name: halved})
    expected = model.forward(tokens, edits={name: halved})
    np.testing.assert_allclose(changed.forward(tokens), expected, atol=1e-9)
    cache = changed.new_cache(chunk=data.draw(st.integers(1, 5)))
    np.testing.assert_allclose(changed.forward(tokens[:7], cache), expected[:7], atol=1e-9)
    np.testing.assert_allclose(changed.forward(tokens[7:], cache, last_only=True), expected[-1:], atol=1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
def test_generated_tokens_are_those_of_edited_passes(backend: str) -> None:
    model = model_of(SMALL, backend=backend)
    for edits in ({"layers.1.ffn_out": np.negative}, {"layers.*.attention_weights": halved}):
        changed, tokens = edited(model, edits), list(TOKENS)
        for _ in range(6):
            tokens.append(int(model.forward(tokens, edits=edits)[-1].argmax()))
        caches = {"cache": changed.new_cache(chunk=3)}, {"prompt_cache": changed.new_cache()}
        for how in ({}, {"lookup": True}, {"draft": changed}, *caches):
            found = [token.id for token in changed.generate(TOKENS, max_tokens=6, **how)]
            assert found == tokens[len(TOKENS) :]
        ((token,),) = list(changed.generate_batch([TOKENS], max_tokens=1))
        assert token.id == tokens[len(TOKENS)]
    assert [token.id for token in model.generate(TOKENS, max_tokens=6)] != tokens[len(TOKENS) :]


def test_edits_add_up_and_the_model_stays_as_it_was() -> None:
    model = model_of(SMALL)
    plain = model.forward(TOKENS)
    twice = edited(edited(model, {"layers.0.ffn_out": halved}), [("layers.0.ffn_out", np.negative), ("norm", halved)])
    expected = [("layers.0.ffn_out", halved), ("layers.0.ffn_out", np.negative), ("norm", halved)]
    np.testing.assert_array_equal(twice.forward(TOKENS), model.forward(TOKENS, edits=expected))
    np.testing.assert_array_equal(model.forward(TOKENS), plain)
    source = next(step.source for step in twice.steps(TOKENS))
    assert source == next(step.source for step in model.steps(TOKENS))


def test_a_broken_model_can_be_edited_and_an_edited_one_not_broken() -> None:
    model = model_of(SMALL)
    wrong = edited(broken(model, "eps-outside"), {"norm": halved})
    np.testing.assert_array_equal(
        wrong.forward(TOKENS), broken(model, "eps-outside").forward(TOKENS, edits={"norm": halved})
    )
    changed = edited(model, {"norm": halved})
    for function in (lambda: broken(changed, "eps-outside"), lambda: with_config(changed, rope_theta=5.0)):
        with refused(InputError, "edits"):
            function()
    with refused(InputError, "step", "'layers.9.q'"):
        edited(model, {"layers.9.q": halved})


def test_a_sweep_of_an_edited_model_goes_on_from_its_edits() -> None:
    model = model_of(SMALL, dtype="float64")
    edits: list[Any] = [("layers.1.attention_out", halved), ("layers.2.ffn_out", np.negative)]
    found = ablate(edited(model, edits), TOKENS, by="step", metric=(3, 5))
    for row in range(3):
        for column, short in enumerate(("attention_out", "ffn_out")):
            logits_V = model.forward(TOKENS, edits=[*edits, (f"layers.{row}.{short}", np.zeros_like)])[-1]
            np.testing.assert_allclose(found.values_RC[row, column], logits_V[3] - logits_V[5], atol=1e-10)


def test_a_sweep_of_a_model_with_an_array_as_edit_is_refused() -> None:
    model, name = model_of(SMALL), "layers.0.heads"
    fixed = edited(edited(model, {name: model.trace(TOKENS, keep=name)[name]}), {"norm": halved})
    with refused(InputError, "edit", name, "array"):
        ablate(fixed, TOKENS, by="step", metric=(3, 5))
    with refused(InputError, "edit", name, "array"):
        patch(fixed, TOKENS, TOKENS, by="step", metric=(3, 5))


@pytest.mark.parametrize("name", ["layers.2.attention_out", "layers.2.scores", "layers.2.ffn_hidden", "norm", "logits"])
def test_the_last_token_changes_places_also_where_its_logits_alone_are_needed(name: str) -> None:
    model = model_of(SMALL)
    _, edits = apply(model, TOKENS, [Swap(name, -1, token=-3)])
    changed, whole = edited(model, edits), model.forward(TOKENS, edits=edits)
    np.testing.assert_allclose(changed.forward(TOKENS, last_only=True), whole[-1:], atol=1e-5)
    assert not np.allclose(whole[-1], model.forward(TOKENS)[-1], atol=1e-4)
    (token,) = changed.generate(TOKENS, max_tokens=1)
    assert token.id == whole[-1].argmax()


def test_tokens_of_several_texts_in_a_pass_keep_their_numbers() -> None:
    """In passes of several texts, and in those of a sweep, whose branches begin anywhere in the text."""
    model = model_of(SMALL, dtype="float64")
    changes = [
        Zero("layers.0.heads", token=2, head=1), Set("layers.2.attention_weights", 0.5, token=3, neuron=1),
        Patch("layers.1.residual_after_attention", tuple(TOKENS[::-1]), token=4), Scale("layers.2.ffn_out", 2, token=9),
    ]  # fmt: skip
    _, edits = apply(model, TOKENS, changes)
    changed, prompts = edited(model, edits), [TOKENS, TOKENS[:3], [*TOKENS, 5]]
    for prompt, scores in zip(prompts, changed.score_batch(prompts), strict=True):
        logits_TV = model.forward(prompt, edits=edits)[:-1]
        expected = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(scores, expected[np.arange(len(prompt) - 1), prompt[1:]], atol=1e-9)
    swaps = [Swap("layers.1.v", 5, token=0), Swap("layers.2.attention_out", -1, token=1)]
    swapped = apply(model, TOKENS, [*changes, *swaps]).edits
    for by, some in (("head", swapped), ("token", edits)):
        found = ablate(edited(model, some), TOKENS, by=by, metric=(3, 5))
        for (row, column), value in np.ndenumerate(found.values_RC):

            def silent(value: np.ndarray, by: str = by, column: int = column) -> np.ndarray:
                value = value.copy()
                value[(slice(None), column) if by == "head" else column] = 0
                return value

            logits_V = model.forward(TOKENS, edits=[*some, (found.rows[row], silent)])[-1]
            np.testing.assert_allclose(value, logits_V[3] - logits_V[5], atol=1e-9)


# ------------------------------------------------------------------------------------------------------------ steering


@pytest.mark.parametrize("name", ["layers.1.residual_after_ffn", "layers.0.heads"])
def test_a_steering_vector_is_a_difference_of_means(name: str) -> None:
    model = model_of(SMALL)
    texts, others = [[1, 2, 3], [4, 5]], [[6, 7], [8, 9, 10], [11]]
    values = [[model.trace(text, keep=name)[name].astype(np.float64) for text in some] for some in (texts, others)]
    last = [np.mean([value[-1] for value in some], axis=0) for some in values]
    mean = [np.mean([value.mean(axis=0) for value in some], axis=0) for some in values]
    for over, (plus, minus) in (("last", last), ("mean", mean)):
        found = steering_vector(model, name, texts, others, over=over)
        np.testing.assert_allclose(found, plus - minus, atol=1e-6)
        assert found.dtype == np.float32
        edits = {name: lambda value, found=found: value + np.float32(-1.5) * found}
        np.testing.assert_allclose(
            steered(model, name, found, -1.5).forward(TOKENS), model.forward(TOKENS, edits=edits), atol=1e-5
        )


def test_a_story_turns_sad_or_happy() -> None:
    model = mistral_ref.load(threads=1)
    happy = ["Lily was very happy. She smiled and laughed.", "He loved his new toy. He was glad and proud."]
    sad = ["Lily was very sad. She cried and cried.", "He lost his toy. He was sad and scared."]
    vector = steering_vector(model, "layers.3.residual_after_ffn", happy, sad, over="mean")
    texts = {
        scale: steered(model, "layers.3.residual_after_ffn", vector, scale).complete("Tom felt", max_tokens=8)
        for scale in (-2, 0, 2)
    }
    assert "sad" in texts[-2]
    assert len(set(texts.values())) == 3
    assert texts[0] == model.complete("Tom felt", max_tokens=8)


def test_what_cannot_steer_is_refused() -> None:
    model, name = model_of(SMALL), "layers.0.ffn_out"
    for arguments, facts in (
        (("layers.9.q", [[1]], [[1]]), ["'layers.9.q'"]),
        (("layers.*.q", [[1]], [[1]]), ["'layers.*.q'", "several"]),
        (("layers.0.scores", [[1]], [[1]]), ["layers.0.scores", "tokens"]),
        ((name, "text", [[1]]), ["texts", "'text'"]),
        ((name, [[1]], []), ["others", "[]"]),
        ((name, [[1], [999]], [[1]]), ["prompts[1]", 999]),
    ):
        with refused(InputError, *facts):
            steering_vector(model, *arguments)
    with refused(InputError, "over", "'first'"):
        steering_vector(model, name, [[1]], [[1]], over="first")
    for vector in (np.zeros(39), np.zeros((1, 40)), [np.nan] * 40, ["x"] * 40):
        with refused(InputError, "vector", "(40,)"):
            steered(model, name, vector)
    with refused(InputError, "scale", "nan"):
        steered(model, name, np.zeros(40), float("nan"))
    with refused(InputError, "layers.0.gate", "tokens"):
        steered(model_of(MIXTURE), "layers.0.gate", np.zeros(34))
