"""Batches: many texts at once, each with the tokens that it gets alone; and the scores of many texts."""

from __future__ import annotations

from itertools import chain
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.errors import refused, warned
from support.tiny import BACKENDS, LARGE, MIXTURE, SMALL, configs, model_of, tokens_for

import mistral_ref
from mistral_ref import InputError, Model, Token, batch, passes
from mistral_ref.loading import DEMO_MODEL

SETTINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 0.9, "seed": 5},
    "filtered": {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": [7, 3, 7, 0, 11]},
    "penalized": {"repetition_penalty": 1.6, "top_logprobs": 3},
    "processed": {"logits_processor": lambda ids, logits_V: logits_V - 9 * (np.arange(len(logits_V)) == ids[-1])},
    "stopped": {"stop": [7, 20, 33], "temperature": 1.2, "seed": 1},
}
LENGTHS = (4, 31, 1, 12, 7)  # 31 is beyond every window


def columns(rows: list[batch.Row], n: int) -> list[list[Token]]:
    """Return the tokens of each prompt."""
    assert all(len(row) == n for row in rows)
    return [[token for row in rows if (token := row[number]) is not None] for number in range(n)]


def alone(model: Model, prompts: list[Any], seed: Any = None, **settings: Any) -> list[list[Token]]:
    """Return the tokens that each prompt gets by itself."""
    seeds = [None] * len(prompts) if seed is None else seed if isinstance(seed, list) else range(seed, seed + 99)
    return [list(model.generate(prompt, seed=one, **settings)) for prompt, one in zip(prompts, seeds, strict=False)]


def same(found: list[list[Token]], expected: list[list[Token]]) -> None:
    """Assert that tokens are the same up to the rounding of their log-probabilities."""
    assert [[token.id for token in tokens] for tokens in found] == [[one.id for one in tokens] for tokens in expected]
    for token, other in zip(chain(*found), chain(*expected), strict=True):
        assert (token.text, token.finish_reason, token.stop) == (other.text, other.finish_reason, other.stop)
        assert [one for one, _ in token.top_logprobs] == [one for one, _ in other.top_logprobs]
        assert token.logprob == pytest.approx(other.logprob, abs=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_each_text_is_as_alone_in_every_sampling_setting(at_once: int, name: str) -> None:
    model, prompts = model_of(SMALL), [tokens_for(SMALL, n, n) for n in LENGTHS]
    rows = list(model.generate_batch(prompts, at_once=at_once, max_tokens=14, **SETTINGS[name]))
    same(columns(rows, 5), alone(model, prompts, max_tokens=14, **SETTINGS[name]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cache_dtype", [None, "int8"])
@settings(max_examples=25)
@given(data=st.data())
def test_any_model_any_lengths(backend: str, cache_dtype: str | None, data: st.DataObject) -> None:
    model = model_of(data.draw(configs()), backend=backend)
    prompts = [tokens_for(model.config, n, n) for n in data.draw(st.lists(st.integers(1, 20), max_size=5))]
    at_once, max_tokens = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    how = {"max_tokens": max_tokens, "temperature": 0.8}
    rows = list(model.generate_batch(prompts, at_once=at_once, cache_dtype=cache_dtype, seed=4, **how))
    expected = [
        list(model.generate(prompt, cache=model.new_cache(dtype=cache_dtype), seed=4 + n, **how))
        for n, prompt in enumerate(prompts)
    ]
    same(columns(rows, len(prompts)), expected)


@pytest.mark.parametrize("config", [LARGE, MIXTURE])
def test_kernels_give_floats_the_same_bits_as_alone(config: Any) -> None:
    model = model_of(config, backend="numba", threads=2)
    prompts = [tokens_for(config, n, n) for n in LENGTHS]
    how = {"max_tokens": 30, "temperature": 1.0, "top_logprobs": 2}
    rows = list(model.generate_batch(prompts, at_once=4, seed=2, **how))
    assert columns(rows, 5) == alone(model, prompts, seed=2, **how)


def test_rows_hold_what_one_pass_gave_and_the_next_prompt_enters_when_one_ends() -> None:
    model, ended = model_of(SMALL), []
    stops = {0: 2, 2: 0}  # how many tokens these prompts get before a stop

    def end(ids: list[int], logits_V: np.ndarray) -> np.ndarray:
        number, count = ids[0] - 1, len(ids) - ids[0]
        logits_V[:] = 0
        logits_V[60 if stops.get(number) == count else 9] = 1
        return logits_V

    prompts = [[number + 1] * (number + 1) for number in range(4)]
    rows = model.generate_batch(
        prompts, at_once=2, max_tokens=5, stop=[60], logits_processor=end,
        progress=lambda done, total: ended.append((done, total)),
    )  # fmt: skip
    found = ["".join("." if token is None else "S" if token.id == 60 else "x" for token in row) for row in rows]
    assert found == ["x...", ".x..", "xx..", "Sx..", "..S.", "...x", ".x.x", ".x.x", "...x", "...x"]
    assert ended == [(0, 4), (1, 4), (2, 4), (3, 4), (4, 4)]


def test_no_pass_runs_before_a_row_is_asked_for_nor_after_the_last() -> None:
    model = model_of(SMALL)
    with mock.patch("mistral_ref.passes.logits_ahead", side_effect=passes.logits_ahead) as joined:
        rows = model.generate_batch([[1], [2, 3]], max_tokens=4)
        assert not joined.called
        assert len(list(rows)) == 2 + 3
        assert joined.call_count == 3


def test_texts_have_streams_and_stop_strings_of_their_own() -> None:
    model = mistral_ref.load(DEMO_MODEL, backend="numpy")
    prompts = ["Once upon a time", "The dog", "A", "One day, a bird"]
    how: dict[str, Any] = {"max_tokens": 40, "temperature": 0.7, "stop": [".", "the"]}
    rows = list(model.generate_batch(prompts, at_once=3, seed=1, **how))
    same(columns(rows, 4), alone(model, prompts, seed=1, **how))
    texts = ["".join(token.text for token in column if token) for column in zip(*rows, strict=True)]
    assert texts == [model.complete(prompt, seed=1 + n, **how) for n, prompt in enumerate(prompts)]


def test_fewer_texts_are_begun_where_memory_holds_no_more_caches() -> None:
    model, prompts = model_of(SMALL), [tokens_for(SMALL, 61, n) for n in range(4)]
    whole, begun = (model.new_cache(max_tokens=65).bytes_for(length) for length in (65, 64))
    for left, most in ((0, 1), (whole, 1), (whole + (whole - begun), 2), (None, 4)):
        with mock.patch.object(batch, "available_memory", return_value=left):
            rows = list(model.generate_batch(prompts, max_tokens=5))
        assert max(sum(token is not None for token in row) for row in rows) == most
        same(columns(rows, 4), alone(model, prompts, max_tokens=5))


def test_no_cache_is_longer_than_the_model_s_positions() -> None:
    model = model_of(SMALL.replace(max_seq_len=64))
    with mock.patch.object(batch, "available_memory", return_value=model.new_cache().bytes_for(200)):
        rows = list(model.generate_batch([[1, 2], [3]], max_tokens=10**8))
    assert max(sum(token is not None for token in row) for row in rows) == 2
    same(columns(rows, 2), alone(model, [[1, 2], [3]], max_tokens=10**8))


def test_what_is_wrong_is_said_before_anything_is_computed() -> None:
    model = model_of(SMALL.replace(max_seq_len=9))
    cases: list[tuple[dict[str, Any], tuple[object, ...]]] = [
        ({"prompts": [[1], []]}, ("prompts[1]", "at least one token id")),
        ({"prompts": [[1], [2], [3] * 10]}, ("prompts[2]", 10, 9, "max_seq_len")),
        ({"prompts": [[3] * 9]}, ("prompts[0]", 9, "max_seq_len")),
        ({"prompts": [[1], [SMALL.vocab_size]]}, ("prompts[1]", SMALL.vocab_size)),
        ({"prompts": [[1], "text"]}, ("prompts[1]", "tokenizer")),
        ({"prompts": "text"}, ("text", "list")),
        ({"prompts": [[1]], "at_once": 0}, ("at_once", 0)),
        ({"prompts": [[1]], "seed": [1, 2]}, (2, "seeds", 1)),
        ({"prompts": [[1], [1]], "seed": [1, -2]}, ("seed", -2)),
        ({"prompts": [[1]], "seed": -1}, ("seed", -1)),
        ({"prompts": [[1]], "cache_dtype": "int4"}, ("dtype", "int4")),
        ({"prompts": [[1]], "temperature": -1}, ("temperature", -1)),
        ({"prompts": [[1]], "progress": 5}, ("progress", 5)),
        ({"prompts": [[1]], "draft": model}, ("draft", "no setting", "max_tokens")),
    ]
    for arguments, facts in cases:
        with refused(InputError, *facts):
            model.generate_batch(**arguments)
    assert list(model.generate_batch([])) == []
    with warned("temperature", "top_k"):
        model.generate_batch([[1], [2]], top_k=3)


def test_an_error_on_the_way_says_which_prompt_it_is_about() -> None:
    def broken(ids: list[int], logits_V: np.ndarray) -> Any:
        return logits_V if ids[0] == 1 or len(ids) < 3 else "nothing"

    rows = model_of(SMALL).generate_batch([[1], [2]], logits_processor=broken)
    assert [next(rows)[0] is not None, next(rows)[1] is not None] == [True, True]
    with refused(InputError, "prompts[1]", "logits_processor", "nothing"):
        list(rows)


# ------------------------------------------------------------------------------------------------------ many texts


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25)
@given(data=st.data())
def test_scores_of_many_texts_are_those_of_each(backend: str, data: st.DataObject) -> None:
    model = model_of(data.draw(configs()), backend=backend)
    texts = [tokens_for(model.config, n, n) for n in data.draw(st.lists(st.integers(1, 25), max_size=6))]
    n_top, chunk = data.draw(st.none() | st.integers(1, model.config.vocab_size)), data.draw(st.integers(1, 30))
    new_cache = model.new_cache
    with mock.patch.object(model, "new_cache", lambda max_tokens: new_cache(max_tokens=max_tokens, chunk=chunk)):
        found = list(model.score_batch(texts, top=n_top))
    assert len(found) == len(texts)
    for scores, text in zip(found, texts, strict=True):
        expected = model.score(text, top=n_top)
        if n_top is None:
            np.testing.assert_allclose(scores, expected, atol=1e-4)
        else:
            np.testing.assert_allclose(scores.logprobs, expected.logprobs, atol=1e-4)
            np.testing.assert_allclose(scores.top_logprobs, expected.top_logprobs, atol=1e-4)


def test_texts_that_fit_into_a_chunk_share_a_pass() -> None:
    model, lengths = model_of(SMALL), []
    texts = [tokens_for(SMALL, n, n) for n in (20, 20, 20, 1, 100, 4)]
    new_cache, prepare = model.new_cache, model.ops.prepare

    def watched(*arguments: Any, **options: Any) -> None:
        lengths.append(max(arguments[3]))
        prepare(*arguments, **options)

    with (
        mock.patch.object(model, "new_cache", lambda max_tokens: new_cache(max_tokens=max_tokens, chunk=51)),
        mock.patch.object(model.ops, "prepare", watched),
    ):
        assert [len(logprobs) for logprobs in model.score_batch(texts)] == [19, 19, 19, 0, 99, 3]
    assert lengths == [2 * 19, 19, 51, (99 - 51) + 3]
    with refused(InputError, "prompts[1]", "at least one"):
        model.score_batch([[1, 2], []])
