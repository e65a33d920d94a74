"""What a reader has typed: a text, or a token. A model without a tokenizer takes numbers."""

from __future__ import annotations

from mistral_ref.errors import InputError, checked_int, short_repr
from mistral_ref.model import Model


def typed_ids(model: Model, name: str, text: object) -> list[int]:
    """Return the ids of a text; for a model without a tokenizer the text is a list of ids. Raises InputError."""
    if not isinstance(text, str):
        raise InputError(f"{name} is {short_repr(text)}; expected a text")
    if model.tokenizer is not None:
        return model.token_ids(text)
    words = text.replace(",", " ").split()
    if not all(word.isdecimal() and len(word) < 10 for word in words):
        raise InputError(f"{name} is {short_repr(text)}; expected token ids, since this model has no tokenizer")
    return model.token_ids(list(map(int, words)))


def token_named(model: Model, name: str, text: object) -> int:
    """Return the id of the token that a reader has typed: a piece, or a word, whose piece begins with a space.

    For a model without a tokenizer it is the id. Raises InputError if there is no such token.
    """
    text = text.strip() if isinstance(text, str) else ""
    if model.tokenizer is None:
        if text.isdecimal() and len(text) < 10:
            return checked_int(name, int(text), 0, model.config.vocab_size - 1)
        raise InputError(f"{name} is {short_repr(text)}; expected a token id, since this model has no tokenizer")
    spellings = {f"▁{text}": 0, f" {text}": 1, text: 2}
    n_ids = min(model.tokenizer.vocab_size, model.config.vocab_size)
    found = [(spellings[piece], token) for token in range(n_ids) if (piece := model.piece(token)) in spellings]
    if not text or not found:
        raise InputError(f"{name} is {short_repr(text)}; expected one token, such as those that the page lists")
    return min(found)[1]
