"""Text id by id: what a stream must return after each id."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import strategies as st

from mistral_ref.text.byte_tokenizer import ByteTokenizer
from mistral_ref.text.sentencepiece import SentencePieceTokenizer


def can_become_a_character(run: list[int | None]) -> bool:
    """Return whether these bytes begin a character, and do not end it; None is no byte."""
    if not run or None in run:
        return False
    # The byte after the leading one has a range of its own; 0x80 or 0xBF lies in each of them. Surrogates are no
    # characters, but Python's decoder sees that only at their last byte.
    for n in (1, 2, 3):
        for rest in itertools.product((0x80, 0xBF), repeat=n):
            try:
                return len(bytes([*run, *rest]).decode(errors="surrogatepass")) == 1
            except UnicodeDecodeError:
                continue
    return False


def count_open(run: Sequence[int | None]) -> int:
    """Return how many bytes at the end some continuation would make a character of."""
    return next((n for n in (3, 2, 1) if len(run) >= n and can_become_a_character(list(run[-n:]))), 0)


def stable(tokenizer: SentencePieceTokenizer, ids: list[int]) -> str:
    """Return the text of `ids` without the bytes at their end that some continuation would make a character of."""
    n_open = count_open([tokenizer.byte(token_id) for token_id in ids])
    return tokenizer.decode(ids[: len(ids) - n_open])


def check_stream(tokenizer: SentencePieceTokenizer, context: list[int], ids: list[int]) -> None:
    stream = tokenizer.stream(context)
    text = stable(tokenizer, context)
    for n, token_id in enumerate(ids, start=1):
        text += stream.push(token_id)
        assert text == stable(tokenizer, context + ids[:n]), (context, ids[:n])
    assert text + stream.flush() == tokenizer.decode(context + ids), (context, ids)


def ids_for(tokenizer: SentencePieceTokenizer) -> st.SearchStrategy[list[int]]:
    """Draw ids of which any may follow any, and those more often that matter: bytes of characters, controls, spaces."""
    of_byte = {tokenizer.byte(token_id): token_id for token_id in range(tokenizer.vocab_size)}
    byte_ids = [of_byte[byte] for byte in {*"é☀🙂\ufffd\ud7ff".encode(), 0x41, 0x80, 0xC0, 0xE0, 0xED, 0xF4, 0xFF}]
    spaces = [token_id for token_id in range(tokenizer.vocab_size) if tokenizer.piece(token_id).startswith("▁")]
    shortest = sorted(spaces, key=lambda token_id: len(tokenizer.piece(token_id)))[:4]
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    return st.lists(any_id | st.sampled_from(byte_ids) | st.sampled_from(shortest) | st.integers(0, 4), max_size=12)


def check_byte_stream(tokenizer: ByteTokenizer, context: list[int], ids: list[int]) -> None:
    """Check a stream of a tokenizer whose pieces are bytes: what it has returned is the text without an open end."""

    def stable_text(ids: list[int]) -> str:
        pieces = [tokenizer.bytes_of(token_id) for token_id in ids]
        begin = max((at + 1 for at, piece in enumerate(pieces) if piece is None), default=0)
        run = b"".join(pieces[begin:])
        return tokenizer.decode(ids[:begin]) + run[: len(run) - count_open(run)].decode(errors="replace")

    stream = tokenizer.stream(context)
    text = stable_text(context)
    for n, token_id in enumerate(ids, start=1):
        text += stream.push(token_id)
        assert text == stable_text(context + ids[:n]), (context, ids[:n])
    assert text + stream.flush() == tokenizer.decode(context + ids), (context, ids)
