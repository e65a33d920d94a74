"""Drafts: the same text with and without in every setting, the exact rule for drawn drafts, and what is refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.checkpoints import FAMILIES
from support.errors import refused
from support.tiny import configs, model_of, tokens_for
from support.tiny_tokenizers import tiny_tokenizer

import mistral_ref
from mistral_ref import CacheError, InputError, Token, drafts
from mistral_ref.config import ModelConfig
from mistral_ref.drafts import Ahead, Guess, Lookup
from mistral_ref.model import Model
from mistral_ref.pace import MOST, Pace, PassTimes
from mistral_ref.sampling import Distribution, SamplingSettings, choose_drafted, distribution
from mistral_ref.text.sentencepiece import SentencePieceTokenizer

CONFIG = FAMILIES["dense_windowed"].config.replace(vocab_size=11)  # few tokens, so that texts repeat themselves


class Scripted:
    """A drafter that knows the text, and is wrong at some places."""

    trust, is_free = 0.5, False

    def __init__(self, text: Sequence[int], wrong: set[int] = frozenset()) -> None:
        self.text, self.wrong = text, wrong

    def prepare(self, n_tokens: int) -> None:
        pass

    def begin(self, ids: Sequence[int]) -> None:
        pass

    def guesses(self, ids: Sequence[int], n: int) -> list[Guess]:
        places = range(len(ids), min(len(ids) + n, len(self.text)))
        return [Guess((self.text[place] + (place in self.wrong)) % CONFIG.vocab_size) for place in places]


@pytest.fixture(autouse=True)
def clockwork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let passes take the time that a Pace expects, whatever else the machine does."""
    monkeypatch.setattr(PassTimes, "took", lambda self, n, seconds: setattr(self, "one", 1.0))


# ---------------------------------------------------------------------------------------------------------- same text

SAMPLING = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.7, 1.5])},
    optional={
        "top_k": st.integers(1, 5),
        "top_p": st.sampled_from([0.5, 0.9]),
        "min_p": st.sampled_from([0.1]),
        "repetition_penalty": st.sampled_from([1.3]),
    },
)
ENDS = st.fixed_dictionaries(
    {"max_tokens": st.integers(1, 40)},
    optional={"stop": st.lists(st.integers(0, 1), max_size=1), "top_logprobs": st.just(2), "max_seconds": st.just(60)},
)


def texts(model: Model, prompt: Sequence[int], cache: dict[str, Any], **options: Any) -> Iterator[tuple[Token, list]]:
    """Yield each token, and the tokens that the cache then has."""
    kept = model.new_cache(**cache)
    for token in model.generate(prompt, cache=kept, **options):
        yield token, kept.tokens


@pytest.mark.filterwarnings("ignore:temperature is 0")
@given(config=configs(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_drafts_change_no_token_and_no_cache(config: ModelConfig, data: st.DataObject) -> None:
    config = config.replace(max_seq_len=data.draw(st.none() | st.integers(8, 40)))
    model, prompt = model_of(config, dtype="float64"), tokens_for(config, data.draw(st.integers(1, 6)))
    options = data.draw(SAMPLING) | data.draw(ENDS) | {"seed": 5}
    options["top_logprobs"] = min(options.get("top_logprobs", 0), config.vocab_size)
    dtype = data.draw(st.sampled_from(["float64", "float16", "int8"]))
    cache = {
        "chunk": data.draw(st.integers(1, 20)),
        "max_tokens": data.draw(st.none() | st.integers(8, 40)),
        "dtype": dtype,
    }
    expected = list(texts(model, prompt, cache, **options))
    for draft in (
        {"lookup": True},
        {"draft": model},
        {"draft": model_of(config.replace(sliding_window=(2,) * config.n_layers), seed=1)},
    ):
        found = list(texts(model, prompt, cache, **options, **draft))
        assert [tokens for _, tokens in found] == [tokens for _, tokens in expected]
        for (ours, _), (plain, _) in zip(found, expected, strict=True):
            assert (ours.id, ours.finish_reason, ours.stop) == (plain.id, plain.finish_reason, plain.stop)
            np.testing.assert_allclose(ours.logprob, plain.logprob, atol=1e-6)
            assert [token for token, _ in ours.top_logprobs] == [token for token, _ in plain.top_logprobs]


def test_many_tokens_take_few_passes_and_the_ring_wraps_meanwhile() -> None:
    model, text = model_of(CONFIG, dtype="float64"), [3, 1, 4, 1, 5, 9, 2, 6] * 40  # a window of 5
    lengths = count_passes(model)

    def forced(ids: list[int], logits_V: np.ndarray) -> np.ndarray:
        logits_V[np.arange(len(logits_V)) != text[len(ids)]] = -np.inf
        return logits_V

    settings = {"max_tokens": 300, "logits_processor": forced}
    plain = list(model.generate(text[:8], **settings))
    del lengths[:]
    drafted = model.generate(text[:8], **settings, lookup=True, cache=model.new_cache(chunk=8))
    logprobs = [token.logprob for token in drafted]
    np.testing.assert_allclose(logprobs, [token.logprob for token in plain], atol=1e-9)
    assert len(lengths) == 300 - drafted.accepted < 60  # every pass gives one token, and those that are accepted


def count_passes(model: Model) -> list[int]:
    """Return a list that gets the number of tokens of every pass that begins."""
    lengths, forward_steps = [], model.transformer.forward_steps

    def counted(tokens_T: np.ndarray, *args: Any, **options: Any) -> Any:
        lengths.append(len(tokens_T))
        return forward_steps(tokens_T, *args, **options)

    object.__setattr__(model.transformer, "forward_steps", counted)
    return lengths


def test_the_logits_processor_is_called_as_without_a_draft() -> None:
    model, seen = model_of(CONFIG, dtype="float64"), {True: [], False: []}
    for lookup in (True, False):

        def odd(ids: list[int], logits_V: np.ndarray, calls: list = seen[lookup]) -> np.ndarray:
            calls.append((list(ids), logits_V.round(6).tolist()))
            logits_V[:: 2 + len(ids) % 2] = -np.inf
            return logits_V

        text = model.generate([1, 2, 1, 2], max_tokens=30, stop=[9], lookup=lookup, logits_processor=odd)
        assert sum(token.from_draft for token in text) == text.accepted
        assert bool(text.accepted) == lookup
    assert seen[True] == seen[False]


def test_a_text_that_is_left_leaves_its_tokens_in_the_cache() -> None:
    model = model_of(CONFIG, dtype="float64")
    for n in range(1, 12):
        cache, ids = model.new_cache(), []
        text = model.generate([1, 2], lookup=True, cache=cache)
        for _ in range(n):
            ids.append(next(text).id)
        text.close()
        assert cache.tokens == [1, 2, *ids[:-1]]
        again = model.forward(ids[-1:], cache)
        np.testing.assert_allclose(again, model.forward([1, 2, *ids])[-1:], atol=1e-9)


def test_another_pass_in_the_middle_of_a_draft_is_an_error() -> None:
    model = model_of(CONFIG, dtype="float64")
    cache = model.new_cache()
    text = model.generate([1, 2, 1, 2, 1, 2], cache=cache, lookup=True)
    while not next(text).from_draft:
        pass
    model.forward([3], cache)
    with refused(CacheError, "another pass"):
        list(text)


def test_a_draft_model_reads_only_what_is_new_in_a_prompt_that_grows() -> None:
    model, draft = model_of(CONFIG, dtype="float64"), model_of(CONFIG, seed=1)
    lengths, cache, text = count_passes(draft), model.new_cache(), tokens_for(CONFIG, 60)
    for turn in range(4):
        del lengths[:]
        plain = [token.id for token in model.generate(text, max_tokens=12)]
        assert [token.id for token in model.generate(text, max_tokens=12, draft=draft, prompt_cache=cache)] == plain
        assert max(lengths) == 60 if turn == 0 else max(lengths) < 20
        text = [*text, *plain, 3, 1, 4][: 200 if turn % 2 else -5]  # sometimes the end is taken back
    other = model.generate(text, max_tokens=12, draft=model_of(CONFIG, seed=2), prompt_cache=cache.copy())
    assert [token.id for token in other] == [token.id for token in model.generate(text, max_tokens=12)]


def test_a_draft_model_whose_memory_is_not_checked_is_given_any(monkeypatch: pytest.MonkeyPatch) -> None:
    right, text = model_of(CONFIG), tokens_for(CONFIG, 200)
    model, draft = (Model(CONFIG, right.weights, right.ops, check_memory=check) for check in (False, True))
    monkeypatch.setattr("mistral_ref.host._MUCH", 1)
    monkeypatch.setattr("mistral_ref.host.available_memory", lambda: 0)
    assert len(list(model.generate(text, draft=model, max_tokens=9))) == 9
    with refused(CacheError, "memory"):
        list(model.generate(text, draft=draft, max_tokens=9))


@pytest.mark.parametrize("unknown", [0, 1, 3])
def test_behind_an_id_that_a_draft_lacks_it_drafts_nothing(unknown: int) -> None:
    """Vocabularies of one tokenizer may be padded to other sizes."""
    own = model_of(CONFIG)
    draft, prompt = model_of(CONFIG.replace(vocab_size=9)), [1, 2, 3, 4]
    prompt[unknown] = 10
    for small in (draft, own):
        own._checked_drafts.add(small)  # without tokenizers their sizes would have to be the same
        text = own.generate(prompt, draft=small, max_tokens=12)
        assert [token.id for token in text] == [token.id for token in own.generate(prompt, max_tokens=12)]
        assert (text.drafted > 0) == (small is own)


def test_how_much_was_drafted_and_accepted() -> None:
    model = mistral_ref.load(backend="numpy")
    plain, drafted = (
        model.generate("Tom had a red ball. Tom had", max_tokens=30, lookup=lookup) for lookup in (False, True)
    )
    assert "".join(token.text for token in plain) == "".join(token.text for token in drafted)
    assert (plain.drafted, plain.accepted) == (0, 0)
    assert drafted.drafted >= drafted.accepted > 0


# ------------------------------------------------------------------------------------------------------- drawn drafts


def chi_square(counts: Sequence[int], expected: Sequence[float]) -> float:
    return sum((count - mean) ** 2 / mean for count, mean in zip(counts, expected, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_a_drafted_token_or_another_is_distributed_as_the_model_says(seed: int) -> None:
    rng, n = np.random.default_rng(seed), 4000
    p, q = (Distribution(rng.permutation(8)[:n_ids], rng.random(n_ids) ** 3) for n_ids in (8, 5))
    found = Counter(choose_drafted(q.draw(rng), q, p, rng) for _ in range(n))
    chi = chi_square([found[token] for token in range(8)], n * p.shares(np.arange(8)))
    assert chi < 24.3  # 7 degrees of freedom: more than this once in a thousand times


def test_a_token_that_only_the_draft_takes_for_possible_is_refused() -> None:
    rng = np.random.default_rng(0)
    p, q = Distribution(np.array([3]), np.array([1.0])), Distribution(np.array([4]), np.array([1.0]))
    assert {choose_drafted(4, q, p, rng) for _ in range(50)} == {3}
    assert {choose_drafted(3, p, p, rng) for _ in range(50)} == {3}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"repetition_penalty": 1.5, "min_p": 0.1}])
def test_texts_with_drawn_drafts_are_as_likely_as_without(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All texts of four tokens over a vocabulary of four, against their exact probabilities."""
    monkeypatch.setattr(Pace, "length", lambda self, times, most: min(2, most))
    config = CONFIG.replace(vocab_size=4)
    model, draft, n = model_of(config, 3), model_of(config, 4), 1000
    settings = {"temperature": 1.2, "max_tokens": 4} | options
    found: Counter[tuple[int, ...]] = Counter()
    accepted = 0
    for seed in range(n):
        text = model.generate([1, 2], seed=seed, draft=draft, draft_sampling=True, **settings)
        found[tuple(token.id for token in text)] += 1
        accepted += text.accepted
    assert 0.2 < accepted / n < 2.8  # some are accepted, and some are not
    expected = {ids: n * probability for ids, probability in exact(model, [1, 2], settings).items()}
    often = [ids for ids, mean in expected.items() if mean >= 5]
    rest = [n - sum(found[ids] for ids in often), n - sum(expected[ids] for ids in often)]
    chi = chi_square([*(found[ids] for ids in often), rest[0]], [*(expected[ids] for ids in often), rest[1] + 1e-9])
    degrees = len(often)
    assert chi < degrees + 4 * np.sqrt(2 * degrees)  # more than this less than once in a thousand times


def exact(model: Model, prompt: list[int], settings: dict[str, Any]) -> dict[tuple[int, ...], float]:
    """Return how likely each text is."""
    found = {(): 1.0}
    own = SamplingSettings(**{name: value for name, value in settings.items() if name != "max_tokens"})
    for _ in range(settings["max_tokens"]):
        longer = {}
        for ids, probability in found.items():
            seen = [*prompt, *ids]
            shares = distribution(model.forward(seen, last_only=True)[0], own, seen).shares(np.arange(4))
            longer |= {(*ids, token): probability * share for token, share in enumerate(shares) if share}
        found = longer
    return found


# ------------------------------------------------------------------------------------------------------------- drafts


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 20))
def test_a_lookup_takes_the_longest_match_and_the_newest(ids: list[int], n: int) -> None:
    found = [guess.token for guess in Lookup().guesses(ids, n)]
    for length in range(min(12, len(ids) - 1), 1, -1):
        starts = [at for at in range(len(ids) - length) if ids[at : at + length] == ids[-length:]]
        if starts:
            text = list(ids)
            for _ in range(n):  # what follows the match, token by token: it may reach into the draft
                text.append(text[len(text) - len(ids) + starts[-1] + length])
            assert found == text[len(ids) :]
            return
    assert found == []


@given(st.lists(st.integers(0, 2**24), min_size=1, max_size=10))
def test_a_lookup_takes_any_token_ids_also_in_pieces(ids: list[int]) -> None:
    lookup = Lookup()
    for n in range(1, 3 * len(ids)):
        found = lookup.guesses((ids * 3)[:n], 4)
    assert [guess.token for guess in found] == (ids * 6)[n : n + 4] or len(set(ids)) < len(ids) or len(ids) == 1


def verified(wrong: set[int], n: int = 400) -> tuple[list[int], Ahead]:
    """Return the lengths of the passes of a text with a scripted draft, and what verified it."""
    model = model_of(CONFIG)
    text = tokens_for(CONFIG, n)
    lengths, cache, times = count_passes(model), model.new_cache(), PassTimes()
    ahead = Ahead(model.transformer, cache, Scripted(text, wrong))
    for place, token in enumerate(text):
        ahead.logits_after(token, n - place - 1, times)
        assert cache.tokens == text[: place + 1]
    return lengths, ahead


def test_the_number_of_drafted_tokens_follows_what_was_right_lately() -> None:
    lengths, _ = verified(set())
    assert max(lengths) == MOST + 1
    assert len(lengths) < 40
    lengths, ahead = verified(set(range(400)))
    assert 0.25 * ahead.drafted < 0.03 * len(lengths)  # a draft that is never right costs less than 3 percent
    lengths, _ = verified(set(range(100)))
    assert max(lengths[100:]) == MOST + 1  # it is tried again
    assert len(lengths) < 200


def test_no_draft_is_longer_than_the_text_or_a_pass_may_be() -> None:
    model = model_of(CONFIG, dtype="float64")
    lengths = count_passes(model)
    cache = model.new_cache(chunk=4, max_tokens=120)
    *_, last = model.generate([1, 2, 1, 2], max_tokens=200, draft=model_of(CONFIG), cache=cache)
    assert (max(lengths), cache.length, last.finish_reason) == (4, 120, "length")


# ------------------------------------------------------------------------------------------------------------ refusals


def test_mistakes_are_told_before_anything_is_computed() -> None:
    model, other = model_of(CONFIG), model_of(CONFIG.replace(vocab_size=12))
    with refused(InputError, "lookup", "draft"):
        model.generate([1], lookup=True, draft=model)
    with refused(InputError, "draft_sampling", "draft="):
        model.generate([1], draft_sampling=True)
    with refused(InputError, "draft_sampling", "draft="):
        model.generate([1], draft_sampling=True, lookup=True)
    with refused(InputError, "draft", "'demo'", "model"):
        model.generate([1], draft="demo")
    with refused(InputError, "draft", "12 ids", "11 ids"):
        model.generate([1], draft=other)


def test_the_pieces_of_two_vocabularies_are_compared() -> None:
    one, two = SentencePieceTokenizer(tiny_tokenizer()), SentencePieceTokenizer(tiny_tokenizer())
    config = CONFIG.replace(vocab_size=one.vocab_size)
    tiny = model_of(config)
    model, same, other = (Model(config, tiny.weights, tiny.ops, tokenizer=tokenizer) for tokenizer in (one, one, two))
    assert len(list(model.generate("A mill", max_tokens=5, draft=same))) > 0
    with refused(InputError, "vocabulary", "without a tokenizer"):
        model.generate("A mill", draft=tiny)
    two.piece = lambda token: "other" if token == 20 else one.piece(token)
    with refused(InputError, "vocabulary", 20, "other", one.piece(20)):
        model.generate("A mill", draft=other)


# --------------------------------------------------------------------------------------------------------------- pace


def test_a_draft_that_takes_longer_than_what_it_saves_is_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()

    def drafted(first: float, each: float, right: float, n_passes: int = 100) -> list[int]:
        """Return the lengths of drafts where time is as given, and so many guesses are right."""
        pace, times, lengths = Pace(0.5), PassTimes(), []
        for _ in range(n_passes):
            lengths.append(pace.length(times, MOST))
            times.took(lengths[-1], 0.01 * (1 + first * bool(lengths[-1]) + each * lengths[-1]))
            pace.right = right
        return lengths

    assert drafted(0, 0.1, 0.95)[0] == 0  # what one token takes is not known yet
    assert min(drafted(0, 0.1, 0.95)[20:]) >= 8
    assert min(drafted(1.5, 0.1, 0.97)[20:]) >= 8  # as with weights of 4 bits
    assert sum(drafted(1.5, 0.1, 0.5)) <= 5
    assert sum(n > 0 for n in drafted(0, 1.1, 1.0)) < 30  # as of a draft that is as large as the model


def test_a_pass_that_was_held_up_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pace, times = Pace(0.5), PassTimes()
    times.took(0, 0.01)
    times.took(0, 0.01)
    pace.right = 0.9
    times.took(4, 100.0)  # once does not matter much
    assert pace.length(times, MOST) > 0
    for _ in range(20):
        times.took(4, 100.0)
    assert pace.length(times, MOST) == 0
    for _ in range(300):
        times.took(0, 0.01)
    assert pace.length(times, MOST) > 4


def test_a_first_pass_that_was_held_up_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is what every other is measured by: with a draft that costs as much as its tokens, none is written."""
    monkeypatch.undo()
    pace, times = Pace(0.5), PassTimes()
    times.took(0, 10.0)
    assert pace.length(times, MOST) == 0
    times.took(0, 0.01)
    for _ in range(40):
        pace.right = 0.6
        n = pace.length(times, MOST)
        times.took(n, 0.01 * (1 + n))
    assert times.one == 0.01
    assert pace.length(times, MOST) == 0


def test_what_reading_the_text_takes_counts_as_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(drafts, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    taken = []
    monkeypatch.setattr(PassTimes, "took", lambda self, n, seconds: taken.append(seconds))

    class Slow(Scripted):
        def begin(self, ids: Sequence[int]) -> None:
            now[0] += 100

    model, text = model_of(CONFIG), tokens_for(CONFIG, 4)
    ahead = Ahead(model.transformer, model.new_cache(), Slow(text, set()))
    for place, token in enumerate(text):
        ahead.logits_after(token, 3 - place, PassTimes())
    assert taken == [0.0] * len(taken) != []
    assert now == [100.0]
