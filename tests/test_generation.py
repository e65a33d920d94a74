"""Generation: ends, stop strings, streamed text, prefill in chunks, seeds; and the stories model, to the id."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import FAMILIES
from support.errors import assert_says, refused, warned
from support.marks import slow
from support.tiny import SMALL, model_of, tokens_for
from support.tiny_tokenizers import tiny_tokenizer

import mistral_ref
from mistral_ref import CacheError, InputError, KVCache, Model, Token
from mistral_ref.sampling import log_softmax
from mistral_ref.stops import StopStrings
from mistral_ref.text.added_tokens import AddedToken
from mistral_ref.text.sentencepiece import SentencePieceTokenizer
from mistral_ref.text.tokenizer_config import TokenizerConfig

TOKENIZER = SentencePieceTokenizer(tiny_tokenizer())
CONFIG = FAMILIES["dense_windowed"].config.replace(vocab_size=TOKENIZER.vocab_size + 3)


class Scripted(Model):
    """A model that says what it is told to: the given ids, one after another, whatever came before."""

    def __init__(self, ids: list[int], **options: object) -> None:
        model = model_of(CONFIG.replace(max_seq_len=options.pop("max_seq_len", None)))
        super().__init__(model.config, model.weights, model.ops, **({"tokenizer": TOKENIZER} | options))
        self.script, self.n_passes = [*ids, 0], 0

    def _next_logits(self, ids: list[int], cache: KVCache, progress: object = None) -> np.ndarray:
        cache.commit(cache.begin(len(ids)), ids)
        self.n_passes += 1
        logits = np.zeros(self.config.vocab_size, np.float32)
        logits[self.script[self.n_passes - 1]] = 50
        return logits


def said(ids: list[int], **options: object) -> list[Token]:
    return list(Scripted(ids).generate("A mill", max_tokens=options.pop("max_tokens", len(ids)), **options))


@given(st.lists(st.integers(0, CONFIG.vocab_size - 1), min_size=1, max_size=20), st.text(max_size=8))
def test_prompt_and_joined_texts_are_the_decoded_ids(ids: list[int], prompt: str) -> None:
    prompt_ids = TOKENIZER.encode(prompt)
    joined = "".join(token.text for token in Scripted(ids, eos_ids=[2]).generate(prompt, max_tokens=len(ids)))
    kept = ids[: ids.index(2)] if 2 in ids else ids
    pieces = [token for token in kept if token < TOKENIZER.vocab_size]
    assert TOKENIZER.decode(prompt_ids) + joined == TOKENIZER.decode(prompt_ids + pieces)


def test_incomplete_utf8_is_held_back_and_flushed() -> None:
    emoji = TOKENIZER.encode("\N{SLIGHTLY SMILING FACE}!", bos=False)
    parts = [token.text for token in said(emoji)]
    assert "".join(parts) == TOKENIZER.decode([*TOKENIZER.encode("A mill"), *emoji])[len("A mill") :]
    byte_ids = [i for i in range(TOKENIZER.vocab_size) if TOKENIZER.byte(i) in (0xF0, 0x9F)][::-1]
    cut = said(byte_ids)
    assert [token.text for token in cut] == ["", "\ufffd\ufffd"]
    assert cut[-1].finish_reason == "length"


@given(st.text("abc ", max_size=30), st.lists(st.text("abc ", min_size=1, max_size=4), max_size=3), st.data())
def test_text_ends_before_the_first_stop_string(text: str, stops: list[str], data: st.DataObject) -> None:
    watch, out, left = StopStrings(stops), "", text
    while left and not watch.found:
        n = data.draw(st.integers(1, len(left)))
        out, left = out + watch.push(left[:n]), left[n:]
        if not watch.found:  # nothing is held back that no stop string begins with
            held = text[len(out) : len(text) - len(left)]
            assert not held or any(stop.startswith(held) for stop in stops)
    out += "" if watch.found else watch.flush()
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert (out, watch.found) == (text, None)
    else:
        # Of stop strings that are complete at the same time, the one that starts first counts; `text` may have been cut
        # anywhere, so a shorter one may have been complete before a longer one that starts earlier.
        assert watch.found in stops
        assert out == text[: text.index(watch.found)]


def test_finish_reasons() -> None:
    hello = TOKENIZER.encode("when the river ran", bos=False)
    assert said(hello)[-1].finish_reason == "length"
    assert [token.finish_reason for token in said(hello, max_tokens=1)] == ["length"]
    assert [token.finish_reason for token in said([*hello[:2], 2, *hello[2:]], max_tokens=9)] == [None, None, "eos"]
    by_id = said(hello, stop=["no", hello[1]])
    assert [(token.id, token.finish_reason) for token in by_id] == [(hello[0], None), (hello[1], "stop")]
    assert [(token.text, token.stop) for token in by_id] == [(" w", None), ("", hello[1])]
    by_text = said(hello, stop=["river", "nowhere", hello[-1]])
    assert (by_text[-1].finish_reason, by_text[-1].stop) == ("stop", "river")
    assert "".join(token.text for token in by_text) == " when the "
    both = said([*hello, 2], max_tokens=len(hello) + 1, stop=["no"])  # "n" of "ran" is held back until the end
    assert "".join(token.text for token in both) == " when the river ran"
    assert (both[-1].finish_reason, both[-1].stop) == ("eos", None)
    assert {token.kind for token in both} == {"text"}


def test_eos_may_be_a_list_and_comes_from_the_tokenizer_otherwise() -> None:
    assert Scripted([]).eos_ids == {2}
    model = Scripted([9, 7, 9], eos_ids=[7, 8])
    assert [token.finish_reason for token in model.generate("A", max_tokens=5)] == [None, "eos"]


def test_added_tokens_that_are_marks_have_no_text_and_words_have_theirs() -> None:
    mark, word = (AddedToken(384, "<|im_end|>"), AddedToken(385, "<tool>", special=False))
    tokenizer = SentencePieceTokenizer(tiny_tokenizer(), config=TokenizerConfig(added=(mark, word), eos_token="</s>"))
    (she,) = tokenizer.encode("she", bos=False)
    model = Scripted([she, mark.id, word.id, 386, she, 2], tokenizer=tokenizer)
    tokens = list(model.generate("A", max_tokens=9, stop="ool"))
    assert [token.text for token in tokens] == [" she", "", "<t"]
    assert [model.piece(token.id) for token in tokens] == ["▁she", "<|im_end|>", "<tool>"]
    assert Scripted(model.script, tokenizer=tokenizer).complete("A", max_tokens=9) == " she<tool> she"
    for name, token_id in (("<|im_end|>", mark.id), ("[INST]", 3)):  # it has no text in which a stop could be found
        *_, last = Scripted([she, token_id, she], tokenizer=tokenizer).generate("A", stop=["no", name])
        assert (last.id, last.text, last.finish_reason, last.stop) == (token_id, "", "stop", token_id)


def test_a_sequence_ends_where_the_models_positions_do() -> None:
    ids = TOKENIZER.encode("A mill")
    model = Scripted([9] * 30, max_seq_len=len(ids) + 3)
    tokens = list(model.generate("A mill", max_tokens=20))
    assert [token.finish_reason for token in tokens] == [None, None, "model_length"]
    with refused(InputError, "4 positions", "max_seq_len"):
        Scripted([9], max_seq_len=4).generate([5, 5, 5, 5])


def test_two_threads_cannot_take_the_same_next_token() -> None:
    model, waiting, go_on = model_of(SMALL), threading.Event(), threading.Event()

    def wait(ids: list[int], logits_V: np.ndarray) -> np.ndarray:
        waiting.set()
        go_on.wait(10)
        return logits_V

    text = model.generate([1, 2], max_tokens=2, logits_processor=wait)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, text)
        assert waiting.wait(10)
        with refused(InputError, "another thread"):
            next(text)
        go_on.set()
        assert [first.result().id, next(text).id] == [token.id for token in model.generate([1, 2], max_tokens=2)]


def test_no_pass_runs_after_the_last_token() -> None:
    model = Scripted([9] * 8)
    tokens = model.generate("A", max_tokens=3)
    assert model.n_passes == 0
    next(tokens)
    assert model.n_passes == 1
    assert len(list(tokens)) == 2
    assert model.n_passes == 3


def test_a_full_cache_ends_the_text() -> None:
    model = Scripted([9] * 9)
    tokens = list(model.generate([5, 5, 5], max_tokens=9, cache=model.new_cache(max_tokens=6)))
    assert [token.finish_reason for token in tokens] == [None, None, None, "length"]
    with refused(CacheError, "3 tokens", 2, "max_tokens"):
        model.generate([5, 5, 5], cache=model.new_cache(max_tokens=2))


def test_two_texts_on_one_cache_do_not_mix() -> None:
    model = Scripted([9] * 9)
    cache = model.new_cache()
    first, second = (model.generate([5], cache=cache) for _ in range(2))
    next(first), next(second)
    with refused(CacheError, "cache", "pass"):
        next(first)


def test_logprobs_are_the_models_own_whatever_is_sampled() -> None:
    model = model_of(CONFIG)
    prompt = tokens_for(CONFIG, 5)
    options = {"temperature": 1.7, "top_k": 40, "min_p": 0.01, "repetition_penalty": 1.4, "seed": 3}
    tokens = list(model.generate(prompt, max_tokens=12, **options))
    ids = [token.id for token in tokens]
    np.testing.assert_allclose([token.logprob for token in tokens], model.score(prompt + ids)[4:], atol=1e-4)
    assert [token.id for token in model.generate(prompt, max_tokens=12, **options)] == ids
    other = options | {"seed": 4}
    assert [token.id for token in model.generate(prompt, max_tokens=12, **other)] != ids


def test_greedy_generation_is_forward_and_argmax() -> None:
    model, prompt = model_of(CONFIG), tokens_for(CONFIG, 30)
    ids = list(prompt)
    for _ in range(20):
        ids.append(int(model.forward(ids, last_only=True).argmax()))
    cache = model.new_cache(chunk=7)
    assert [token.id for token in model.generate(prompt, max_tokens=20, cache=cache)] == ids[30:]
    assert cache.length == 49  # everything but the last token


# ------------------------------------------------------------------------------- limits, logits and log-probabilities


def test_top_logprobs_are_the_likeliest_of_the_models_own_distribution() -> None:
    model, prompt = model_of(CONFIG), tokens_for(CONFIG, 9)
    tokens = list(model.generate(prompt, max_tokens=5, top_logprobs=4, temperature=1.5, top_k=2, seed=1))
    for number, token in enumerate(tokens):
        ids = [*prompt, *(token.id for token in tokens[:number])]
        logprobs_V = log_softmax(model.forward(ids, last_only=True)[0])
        expected = sorted(range(CONFIG.vocab_size), key=lambda one: (-logprobs_V[one], one))[:4]
        assert [one for one, _ in token.top_logprobs] == expected
        np.testing.assert_allclose([logprob for _, logprob in token.top_logprobs], logprobs_V[expected], atol=1e-5)
    everything = next(model.generate(prompt, top_logprobs=CONFIG.vocab_size)).top_logprobs
    assert math.fsum(math.exp(logprob) for _, logprob in everything) == pytest.approx(1)
    assert next(model.generate(prompt)).top_logprobs == ()


def test_a_logits_processor_decides_before_every_sampling_setting() -> None:
    model, prompt, calls = model_of(CONFIG), tokens_for(CONFIG, 6), []

    def only_7_and_9(ids: list[int], logits_V: np.ndarray) -> np.ndarray:
        calls.append((list(ids), logits_V.copy()))
        logits_V[:] = -np.inf  # a copy: the model's own logits stay
        logits_V[[7, 9]] = [1, 2]
        ids.clear()  # and so are the ids
        return logits_V

    tokens = list(model.generate(prompt, max_tokens=4, logits_processor=only_7_and_9, repetition_penalty=3))
    assert [token.id for token in tokens] == [9, 7, 9, 9]  # 2, then 1 > 2/3, then 2/3 > 1/3
    for count, (ids, logits_V) in enumerate(calls):
        assert ids == [*prompt, *(token.id for token in tokens[:count])]
        np.testing.assert_allclose(logits_V, model.forward(ids, last_only=True)[0], atol=1e-4)
        assert tokens[count].logprob == pytest.approx(log_softmax(logits_V)[tokens[count].id])


@pytest.mark.parametrize(
    ("processor", "facts"),
    [
        (lambda ids, logits_V: None, ["None", CONFIG.vocab_size]),
        (lambda ids, logits_V: logits_V[:5], [CONFIG.vocab_size]),
        (lambda ids, logits_V: logits_V[np.newaxis], [CONFIG.vocab_size]),
        (lambda ids, logits_V: logits_V.astype(str), [CONFIG.vocab_size]),
        (lambda ids, logits_V: [[1], [1, 2]], [CONFIG.vocab_size]),
        (lambda ids, logits_V: np.where(np.arange(len(logits_V)) == 3, np.nan, logits_V), ["NaN", 3]),
    ],
)
def test_what_a_logits_processor_returns_is_checked(processor: Callable[..., object], facts: list[object]) -> None:
    with refused(InputError, "logits_processor", *facts):
        next(model_of(CONFIG).generate([5], logits_processor=processor))


def test_a_processor_may_return_a_list_and_must_leave_a_token() -> None:
    model = model_of(CONFIG)
    assert next(model.generate([5], logits_processor=lambda ids, logits_V: (-logits_V).tolist())).id == int(
        model.forward([5])[0].argmin()
    )
    with refused(InputError, "logit", "-inf"):
        next(model.generate([5], logits_processor=lambda ids, logits_V: logits_V - np.inf))


def test_time_ends_a_text_after_the_token_that_comes_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 100.5, 101.0, 101.5, 102.0, 102.5])
    monkeypatch.setattr("mistral_ref.generation.time.monotonic", lambda: next(clock))
    ids = TOKENIZER.encode("when the river ran", bos=False)
    tokens = said(ids, max_seconds=1.5, stop="verse")
    assert [token.finish_reason for token in tokens] == [None, None, "time"]
    assert "".join(token.text for token in tokens) == TOKENIZER.decode([*TOKENIZER.encode("A mill"), *ids[:3]])[6:]


def test_no_time_still_gives_one_token_and_other_reasons_come_first() -> None:
    assert [token.finish_reason for token in said([9, 9], max_seconds=0)] == ["time"]
    assert [token.finish_reason for token in said([9], max_seconds=0)] == ["length"]
    assert [token.finish_reason for token in said([2, 9], max_seconds=0)] == ["eos"]


@pytest.mark.parametrize(
    ("given", "ignored"),
    [
        ({"top_p": 0.9}, ["top_p"]),
        ({"top_k": 5, "min_p": 0.1, "seed": 0}, ["top_k", "min_p", "seed"]),
        ({}, []),
        ({"temperature": 0.5, "top_p": 0.9, "top_k": 5, "seed": 1}, []),
        ({"top_p": 1, "min_p": 0, "repetition_penalty": 1.1}, []),
    ],
    ids=str,
)
def test_settings_that_temperature_0_ignores_are_named_once(given: dict[str, float], ignored: list[str]) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        list(Scripted([9, 9, 9]).generate("A", max_tokens=3, **given))
    assert [warning.filename for warning in caught] == [__file__] * bool(ignored)
    for warning in caught:
        assert_says(str(warning.message), "temperature", 0, *ignored)
        assert not set(given) - set(ignored) & set(str(warning.message).split())


# -------------------------------------------------------------------------------------------------------------- asyncio


def test_async_for_leaves_the_event_loop_free() -> None:
    model, prompt = model_of(CONFIG), tokens_for(CONFIG, 5)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def read() -> list[Token]:
        beside = asyncio.create_task(others())
        tokens = [token async for token in model.generate(prompt, max_tokens=6)]
        beside.cancel()
        return tokens

    assert asyncio.run(read()) == list(model.generate(prompt, max_tokens=6))
    assert turns > 6


def test_a_cancelled_task_ends_the_text() -> None:
    model = Scripted([9] * 50)

    async def read() -> None:
        async for _ in model.generate("A", max_tokens=50):
            await asyncio.sleep(0.01)

    with pytest.raises(TimeoutError):
        asyncio.run(asyncio.wait_for(read(), 0.05))
    assert 1 <= model.n_passes < 50


def test_a_closed_generation_has_no_more_tokens() -> None:
    model = Scripted([9] * 8)
    tokens = model.generate("A", max_tokens=8)
    next(tokens)
    tokens.close()
    assert list(tokens) == []
    assert model.n_passes == 1


# --------------------------------------------------------------------------------------------------------------- caches


def test_a_prompt_is_read_in_chunks_with_a_callback() -> None:
    model, calls = model_of(CONFIG), []
    cache = model.new_cache(chunk=4)
    next(model.generate(tokens_for(CONFIG, 10), cache=cache, progress=lambda done, total: calls.append((done, total))))
    assert calls == [(0, 10), (4, 10), (8, 10), (10, 10)]


def test_one_prompt_can_be_continued_several_times() -> None:
    model, prompt = model_of(CONFIG), tokens_for(CONFIG, 12)
    shared = model.new_cache()
    model.forward(prompt[:-1], shared)
    again = [[t.id for t in model.generate(prompt[-1:], max_tokens=9, cache=shared.copy())] for _ in range(2)]
    assert again[0] == again[1] == [t.id for t in model.generate(prompt, max_tokens=9)]


@pytest.mark.filterwarnings("ignore:the cache shares")  # where the ring has wrapped too far
@settings(max_examples=40)
@given(st.integers(0, 60), st.integers(1, 20), st.none() | st.integers(1, 9), st.integers(1, 12), st.data())
def test_a_prompt_cache_changes_nothing_but_the_tokens_that_are_read(
    n_held: int, n_new: int, window: int | None, chunk: int, data: st.DataObject
) -> None:
    """The prompt shares any beginning with what the cache holds, which may be longer or gone from the ring."""
    config = CONFIG.replace(sliding_window=(window,) * CONFIG.n_layers, max_seq_len=None)
    model = model_of(config, dtype="float64")
    held = tokens_for(config, n_held, seed=1)
    cache = model.new_cache(chunk=chunk)
    if held:
        model.forward(held, cache)
    prompt = held[: data.draw(st.integers(0, n_held))] + tokens_for(config, n_new, seed=2)
    n_shared = next((n for n, (a, b) in enumerate(zip(held, prompt[:-1], strict=False)) if a != b), None)
    n_shared = min(len(held), len(prompt) - 1) if n_shared is None else n_shared
    is_overwritten = window is not None and n_held - n_shared > chunk
    calls: list[tuple[int, int]] = []
    options = {"max_tokens": 5, "temperature": 0.8, "seed": 3, "repetition_penalty": 1.2}
    found = list(
        model.generate(prompt, prompt_cache=cache, progress=lambda done, total: calls.append((done, total)), **options)
    )
    expected = list(model.generate(prompt, **options))
    assert [token.id for token in found] == [token.id for token in expected]
    np.testing.assert_allclose([t.logprob for t in found], [t.logprob for t in expected], atol=1e-9)
    assert cache.tokens == prompt + [token.id for token in found[:-1]]
    assert calls[-1][1] in ({len(prompt) - n_shared, len(prompt)} if is_overwritten else {len(prompt) - n_shared})


@pytest.mark.parametrize("backend", ["numpy", *slow(["numba"])])
def test_a_conversation_over_a_prompt_cache_reads_each_token_once(backend: str) -> None:
    model = mistral_ref.load(backend=backend)
    cache, text, n_read = model.new_cache(), "Once upon a time", []
    for more in (" Then Tom", " The end"):
        plain = model.complete(text, max_tokens=8)
        before = cache.length
        reply = model.complete(text, max_tokens=8, prompt_cache=cache)
        assert reply == plain
        n_read.append(cache.length - 7 - before)
        text += reply + more
    assert n_read[1] < 6
    assert model.complete(text, max_tokens=8, prompt_cache=cache) == model.complete(text, max_tokens=8)


def test_a_prompt_cache_is_checked_and_changes_when_the_first_token_is_asked_for() -> None:
    model = Scripted([9] * 9)
    cache = model.new_cache(max_tokens=6)
    cache.commit(cache.begin(5), [5, 6, 7, 8, 9])
    with refused(InputError, "cache", "prompt_cache"):
        model.generate([5], cache=cache, prompt_cache=cache)
    with refused(CacheError, "7 tokens", 6):
        model.generate([5] * 7, prompt_cache=cache)
    with refused(InputError, "'x'"):
        model.generate([5], prompt_cache="x")
    with refused(CacheError, "another model"):
        model.generate([5], prompt_cache=Scripted([]).new_cache())
    tokens = model.generate([5, 6, 1, 1, 1, 1], prompt_cache=cache)
    assert cache.tokens == [5, 6, 7, 8, 9]
    assert [token.finish_reason for token in tokens] == ["length"]
    assert cache.tokens == [5, 6, 1, 1, 1, 1]


def test_a_prompt_that_begins_like_the_cache_is_warned_of() -> None:
    text = "The mill stood where the river bends"
    model = Scripted([9] * 99)

    def caught(prompt: str | list[int], held: str | list[int], **settings: object) -> list[str]:
        cache = model.new_cache()
        ids = model.token_ids(held)
        cache.commit(cache.begin(len(ids)), ids)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            model.generate(prompt, **({"cache": cache} | settings))
        return [str(warning.message) for warning in found]

    for prompt, held in (
        (f"{text}, and the miller", text),  # the whole conversation, the old part included
        (text, f"{text}, and the miller counted in sacks, one for the baker, two for the inn"),  # again from the start
        (TOKENIZER.encode(f"{text}, and"), text),
        (f"{text}, and", TOKENIZER.encode(text, bos=False)),
    ):
        (message,) = caught(prompt, held)
        assert_says(message, "cache", "prompt_cache", "second")
    for prompt, held in (
        (", and the miller", text),
        ("The baker", text),  # one word
        ("The mill burns", f"The mill {text * 3}"),  # the same beginning of two sentences
        ([5, 6, 7], [5, 6, 7]),  # too short to tell
    ):
        assert caught(prompt, held) == []
    cache = model.new_cache()
    assert caught(text, text, cache=None, prompt_cache=cache) == []


def test_text_gets_bos_only_where_a_sequence_begins() -> None:
    model = Scripted([])
    cache = model.new_cache()
    assert model.token_ids("A mill", cache) == TOKENIZER.encode("A mill")
    cache.commit(cache.begin(1), [5])
    assert model.token_ids("A mill", cache) == TOKENIZER.encode("A mill", bos=False)
    assert model.token_ids("") == [1]
    with refused(InputError, "tokens", "at least one"):
        model.token_ids("", cache)
    with warned("BOS", "twice") as caught:
        list(Scripted([9]).generate([1, 1, 5], max_tokens=1))
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.token_ids("<s> A")


@pytest.mark.parametrize(
    "bad",
    [
        {"max_tokens": 0},
        {"max_tokens": True},
        {"max_tokens": 2.5},
        {"seed": -1},
        {"seed": 1.5},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": [None]},
        {"stop": -1},
        {"stop": [CONFIG.vocab_size]},
        {"stop": b"END"},
        {"stop": [bytearray(b"END")]},
        {"stop": 1.5},
        {"stop": True},
        {"stop": [["a"]]},
        {"stop": np.array(1.5)},
        {"progress": 1},
        {"logits_processor": "x"},
        {"top_logprobs": -1},
        {"top_logprobs": True},
        {"top_logprobs": CONFIG.vocab_size + 1},
        {"max_seconds": -1},
        {"max_seconds": float("nan")},
        {"max_seconds": "1"},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 1.1},
        {"top_k": 0},
        {"min_p": 2},
        {"repetition_penalty": 0},
    ],
    ids=str,
)
def test_settings_are_checked_before_anything_runs(bad: dict[str, object]) -> None:
    with refused(InputError, *bad):
        Scripted([9]).generate("A", **bad)


def test_a_model_without_tokenizer_takes_and_gives_ids() -> None:
    model = model_of(CONFIG)
    assert {token.text for token in model.generate([5, 6], max_tokens=4)} == {""}
    with refused(InputError, "tokenizer", "token ids", "generate([1, 2])"):
        model.generate("text")
    with refused(InputError, "tokenizer", "stops", "token ids"):
        model.generate([5], stop="x")


def test_nan_is_an_error_not_a_token() -> None:
    model = model_of(CONFIG)
    broken = mistral_ref.Model(model.config, model.weights, model.ops)
    broken.weights.norm[:] = np.nan
    with refused(InputError, "nan", "logit"):
        next(broken.generate([5]))


@pytest.mark.parametrize("layout", ["consolidated", "hf"])
@pytest.mark.parametrize(("backend", "dtype"), [("numpy", "float32"), ("numpy", "float64"), ("numba", "float32")])
def test_the_stories_model_tells_its_story_to_the_id(shared_data: Path, layout: str, backend: str, dtype: str) -> None:
    golden = json.loads((shared_data / "stories260K-greedy.json").read_text())
    model = mistral_ref.load(shared_data / f"stories260K-{layout}", backend=backend, dtype=dtype, threads=1)
    # It was trained to begin the next story with BOS where one ends.
    tokens = list(model.generate(golden["prompt"], max_tokens=400, stop=model.tokenizer.bos_id))
    assert golden["prompt_ids"] + [token.id for token in tokens[:-1]] == golden["ids"]
    assert golden["prompt"] + "".join(token.text for token in tokens) == golden["text"]
    assert (tokens[-1].id, tokens[-1].finish_reason) == (1, "stop")
    text = model.complete(golden["prompt"], max_tokens=400, stop=[model.tokenizer.bos_id])
    assert golden["prompt"] + text == golden["text"]
