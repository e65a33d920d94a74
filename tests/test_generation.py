"""Generation: ends, stop strings, streamed text, prefill in chunks, seeds; and the stories model, to the id."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.checkpoints import FAMILIES
from support.errors import refused, warned
from support.tiny import model_of, tokens_for
from support.tiny_tokenizers import tiny_tokenizer

import mistral_ref
from mistral_ref import CacheError, InputError, KVCache, Model, Token
from mistral_ref.generation import StopStrings
from mistral_ref.text.added_tokens import AddedToken, TokenizerConfig
from mistral_ref.text.sentencepiece import SentencePieceTokenizer

TOKENIZER = SentencePieceTokenizer(tiny_tokenizer())
CONFIG = FAMILIES["dense_windowed"].config.replace(vocab_size=TOKENIZER.vocab_size + 3)


class Scripted(Model):
    """A model that says what it is told to: the given ids, one after another, whatever came before."""

    def __init__(self, ids: list[int], **options: object) -> None:
        model = model_of(CONFIG.replace(max_seq_len=options.pop("max_seq_len", None)))
        super().__init__(model.config, model.weights, model.ops, **({"tokenizer": TOKENIZER} | options))
        self.script, self.n_passes = [*ids, 0], 0

    def _next_logits(self, ids: list[int], cache: KVCache) -> np.ndarray:
        cache.commit(cache.begin(len(ids)))
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
        assert (out, watch.found) == (text, False)
    else:
        # Of stop strings that are complete at the same time, the one that starts first counts; `text` may have been cut
        # anywhere, so a shorter one may have been complete before a longer one that starts earlier.
        assert watch.found
        assert out in {text[: text.index(stop)] for stop in stops if stop in text}


def test_finish_reasons() -> None:
    hello = TOKENIZER.encode("when the river ran", bos=False)
    assert said(hello)[-1].finish_reason == "length"
    assert [token.finish_reason for token in said(hello, max_tokens=1)] == ["length"]
    assert [token.finish_reason for token in said([*hello[:2], 2, *hello[2:]], max_tokens=9)] == [None, None, "eos"]
    by_id = said(hello, stop=hello[1])
    assert [(token.id, token.finish_reason) for token in by_id] == [(hello[0], None), (hello[1], "stop")]
    assert by_id[-1].text == ""
    by_text = said(hello, stop=["river", "nowhere"])
    assert by_text[-1].finish_reason == "stop"
    assert "".join(token.text for token in by_text) == " when the "
    both = said([*hello, 2], max_tokens=len(hello) + 1, stop=["no"])  # "n" of "ran" is held back until the end
    assert "".join(token.text for token in both) == " when the river ran"
    assert both[-1].finish_reason == "eos"


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


def test_a_sequence_ends_where_the_models_positions_do() -> None:
    ids = TOKENIZER.encode("A mill")
    model = Scripted([9] * 30, max_seq_len=len(ids) + 3)
    tokens = list(model.generate("A mill", max_tokens=20))
    assert [token.finish_reason for token in tokens] == [None, None, "model_length"]
    with refused(InputError, "4 positions", "max_seq_len"):
        Scripted([9], max_seq_len=4).generate([5, 5, 5, 5])


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


def test_text_gets_bos_only_where_a_sequence_begins() -> None:
    model = Scripted([])
    cache = model.new_cache()
    assert model.token_ids("A mill", cache) == TOKENIZER.encode("A mill")
    cache.commit(cache.begin(1))
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
        {"stop": [""]},
        {"stop": [None]},
        {"stop": -1},
        {"stop": [CONFIG.vocab_size]},
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
