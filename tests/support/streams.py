"""Text id by id: what a stream must return after each id."""

from __future__ import annotations

import itertools

from hypothesis import strategies as st

from mistral_ref.text.sentencepiece import SentencePieceTokenizer


def stable(tokenizer: SentencePieceTokenizer, ids: list[int]) -> str:
    """Return the text of `ids` without the bytes at their end that some continuation would make a character of."""

    def can_become_a_character(run: list[int | None]) -> bool:
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

    run = [tokenizer.byte(token_id) for token_id in ids]
    n_open = next((n for n in (3, 2, 1) if len(ids) >= n and can_become_a_character(run[-n:])), 0)
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
