"""A prompt, which is a text or a sequence of token ids, becomes a list of ids that the model has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.errors import CacheError, InputError, checked_int, short_repr, warn
from mistral_ref.text.tokenizer import Tokenizer

Prompt = str | Sequence[int] | np.ndarray


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer | None, config: ModelConfig, n_before: int) -> list[int]:
    """Return the token ids of a prompt behind `n_before` tokens; see `Model.token_ids`."""
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InputError("this model has no tokenizer; expected token ids, as in generate([1, 2]) or --ids 1,2")
        prompt = tokenizer.encode(prompt, bos=n_before == 0, added=True)
    try:
        array = np.asarray(prompt)
    except ValueError:  # rows of different lengths
        array = np.empty(0)
    if array.ndim != 1 or array.size == 0 or array.dtype.kind not in "iu":
        raise InputError(f"tokens are {short_repr(prompt)}; expected text, or a flat sequence of at least one token id")
    outside = array[(array < 0) | (array >= config.vocab_size)]
    if outside.size:
        raise InputError(f"token id {outside[0]} is outside the vocabulary; expected 0 to {config.vocab_size - 1}")
    longest = config.max_seq_len
    if longest is not None and n_before + array.size > longest:
        raise InputError(
            f"the sequence has {n_before + array.size} tokens; expected at most {longest}, the model's max_seq_len"
        )
    ids: list[int] = array.tolist()
    if tokenizer is not None and ids[:2] == [tokenizer.bos_id] * 2:
        warn("the prompt begins with BOS twice; the model was trained on texts with one BOS")
    return ids


def checked_ids(name: str, ids: object, vocab_size: int) -> list[int]:
    """Return an argument that is a sequence of token ids, or of none, as a list; raise InputError if it is not."""
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise InputError(f"{name} is {short_repr(ids)}; expected a list of token ids")
    return [checked_int(name, token, 0, vocab_size - 1) for token in ids]


@contextmanager
def of_prompt(number: int) -> Iterator[None]:
    """Let an error say which prompt it is about."""
    try:
        yield
    except (InputError, CacheError) as error:
        raise type(error)(f"prompts[{number}]: {error}") from None
