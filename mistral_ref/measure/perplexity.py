"""Perplexity: how surprised a model is by a text.

It is exp of the mean negative log-probability of the text's tokens. To score a token is to compute its log-probability,
given the tokens before it in the same window.

A text is longer than what a model reads at once, so the text is cut into windows. How it is cut changes the result.
There are two ways here. Other engines use both, so their figures can be compared with these:

    halves      The text is cut into windows of `context` tokens that do not overlap. The first token of each window is
                replaced by BOS. The tokens after the middle one are scored. Tokens left over at the end of the text
                are not used. llama.cpp's llama-perplexity does the same, and gives the same standard error.
    strided     Each window of `context` tokens begins `stride` tokens after the one before it. A window scores the
                tokens that no earlier window has scored. So every token but the first is scored. After the first
                window each of them has at least context - stride tokens before it. A smaller stride gives the tokens
                more context, but costs more: the whole text goes through the model context / stride times. If the
                stride equals the context, windows do not overlap, and the first token of each window is not scored,
                since no token of its window is before it. Hugging Face's recipe has the same windows (transformers,
                "Perplexity of fixed-length models"). Its mean counts one token too few for each window that overlaps
                the one before it.

    tokens              0 1 2 3 4 5 6 7 8 9
    halves of 4         B 1 2[3]                (the scored tokens are in brackets, B is BOS)
                                B 5 6[7]
    strided, 4 by 2     0[1 2 3]
                            2 3[4 5]
                                4 5[6 7]
                                    6 7[8 9]
    strided, 4 by 4     0[1 2 3]
                                4[5 6 7]
                                        8[9]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mistral_ref.errors import InputError, Progress, checked_int
from mistral_ref.model import Model
from mistral_ref.prompt import Prompt


class Window(NamedTuple):
    """Tokens start to stop - 1 go through the model; tokens `scored` to stop - 1 are scored."""

    start: int
    stop: int
    scored: int


@dataclass(frozen=True, eq=False)
class Perplexity:
    """The result of scoring a text.

    nlls            negative log-probability of each scored token (n_scored,), in nats, in the order of the text
    n_evaluated     how many tokens went through the model; the last token of a window does not: nothing is scored
                    after it
    """

    nlls: np.ndarray
    n_evaluated: int

    @property
    def n_scored(self) -> int:
        """How many tokens were scored."""
        return self.nlls.size

    @property
    def nll(self) -> float:
        """The mean of nlls."""
        return float(self.nlls.mean())

    @property
    def nll_error(self) -> float:
        """The standard error of that mean, s / sqrt(n), where s² = sum (nll_i - nll)² / (n - 1); NaN for one token.

        The formula assumes that the tokens are independent. The tokens of a text are not quite independent.
        """
        return float(self.nlls.std(ddof=1) / math.sqrt(self.n_scored)) if self.n_scored > 1 else math.nan

    @property
    def perplexity(self) -> float:
        """exp(nll)"""
        with np.errstate(over="ignore"):
            return float(np.exp(self.nll))

    @property
    def error(self) -> float:
        """The standard error of the perplexity, to first order: perplexity * nll_error."""
        return self.perplexity * self.nll_error

    def bits_per_byte(self, n_bytes: int) -> float:
        """Sum of nlls / ln 2 / bytes of the text. If all of the text was scored, tokenizers can be compared by it."""
        return float(self.nlls.sum()) / math.log(2) / n_bytes


def half_windows(n_tokens: int, context: int) -> Iterator[Window]:
    """Yield the windows of the way "halves", which the module's docstring explains.

    >>> [tuple(window) for window in half_windows(10, context=4)]
    [(0, 4, 3), (4, 8, 7)]
    """
    for start in range(0, n_tokens - context + 1, context):
        yield Window(start, start + context, start + context // 2 + 1)


def strided_windows(n_tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Yield the windows of the way "strided", which the module's docstring explains.

    >>> [tuple(window) for window in strided_windows(9, context=4, stride=2)]
    [(0, 4, 1), (2, 6, 4), (4, 8, 6), (6, 9, 8)]
    >>> [tuple(window) for window in strided_windows(9, context=4, stride=4)]
    [(0, 4, 1), (4, 8, 5)]
    """
    start, scored = 0, 1
    while scored < n_tokens:
        stop = min(start + context, n_tokens)
        yield Window(start, stop, scored)
        start += stride
        scored = max(stop, start + 1)


def perplexity(
    model: Model,
    tokens: Prompt,
    *,
    context: int = 512,
    stride: int | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Return the perplexity of a text or of token ids; they may be longer than the model's max_seq_len.

    context     how many tokens a window has, at least 3
    stride      the way "strided": how many tokens after the one before it a window begins; None: the way "halves"
    progress    called with (tokens before the window, tokens in all)

    Memory: logits exist for one chunk of a window at a time. Only two things grow with the text: the list of its token
    ids, and one number for each scored token.

    Raises InputError, before anything is computed, if an argument is out of range or the text is too short.
    """
    (found,) = perplexities(model, {"": tokens}, context=context, stride=stride, progress=progress).values()
    return found


def perplexities(
    model: Model,
    texts: Mapping[str, Prompt],
    *,
    context: int = 512,
    stride: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Perplexity]:
    """Return the perplexity of each of several texts, by their names; no window reaches from a text into another one.

    The arguments are those of `perplexity`. `progress` counts the tokens of all texts. `joined` makes one Perplexity of
    several. Raises InputError, before anything is computed; it names the text that is too short.
    """
    context = checked_int("context", context, least=3, most=model.config.max_seq_len)
    if stride is not None:
        stride = checked_int("stride", stride, least=1, most=context)
    ids_of = {name: _checked_ids(model, name, tokens, context, stride) for name, tokens in texts.items()}
    done, total = 0, sum(map(len, ids_of.values()))
    report = progress or (lambda done, total: None)
    found = {}
    for name, ids in ids_of.items():
        nlls, n_evaluated = [], 0
        for start, scored_ids, n_scored in _windows(model, ids, context, stride):
            report(done + start, total)
            logprobs = model.score(scored_ids)
            nlls.append(-logprobs[-n_scored:])
            n_evaluated += len(logprobs)
        found[name] = Perplexity(np.concatenate(nlls), n_evaluated)
        done += len(ids)
    report(total, total)
    return found


def joined(parts: Iterable[Perplexity]) -> Perplexity:
    """Return the perplexity of several texts together: each scored token counts once, whatever text it is of."""
    parts = list(parts)
    return Perplexity(np.concatenate([part.nlls for part in parts]), sum(part.n_evaluated for part in parts))


def _windows(model: Model, ids: list[int], context: int, stride: int | None) -> Iterator[tuple[int, list[int], int]]:
    """Yield where each window begins, the ids that go through the model, and how many of its last tokens are scored."""
    windows = half_windows(len(ids), context) if stride is None else strided_windows(len(ids), context, stride)
    bos_id = None if model.tokenizer is None else model.tokenizer.bos_id
    first = [] if stride is not None or bos_id is None else [bos_id]
    for start, stop, scored in windows:
        yield start, first + ids[start + len(first) : stop], stop - scored


def _checked_ids(model: Model, name: str, tokens: Prompt, context: int, stride: int | None) -> list[int]:
    """Return the ids of a text. A window's length of them is checked at a time: all together may be too long."""
    if isinstance(tokens, str) and model.tokenizer is not None:
        tokens = model.tokenizer.encode(tokens, added=True)
    ids: list[int] = []
    for start in range(0, max(len(tokens), 1), context):
        ids += model.token_ids(tokens[start : start + context])
    text = f"{name}: the text" if name else "the text"
    if stride is None and len(ids) < context:
        raise InputError(
            f"{text} has {len(ids)} tokens; expected at least {context}, the context (or a stride, for a short text)"
        )
    if len(ids) < 2:
        raise InputError(f"{text} has 1 token; expected at least 2")
    return ids
