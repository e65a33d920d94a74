"""Tokenizer: what every kind of tokenizer has, so that the rest of the package need not know which kind it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from mistral_ref.errors import InputError, short_repr
from mistral_ref.text.added_tokens import AddedTokens
from mistral_ref.text.stream import TokenStream
from mistral_ref.text.template_file import ChatTemplate


class Tokenizer(ABC):
    """Text to ids and back.

    kind        the kind in words, such as "SentencePiece"
    origin      begins every message about the tokenizer: the path of its file
    n_pieces    number of ids that the tokenizer's own file gives
    vocab_size  number of ids: one more than the largest id of a piece or an added token
    bos_id      the id that begins a sequence; None: no id does
    eos_id      the id that ends a sequence; None: the tokenizer's files do not say
    added       the added tokens
    chat_format "v1", "v2", "v3", "v7", "v11", "v13" or "v15": the format of conversations that Mistral's models with
                this tokenizer have learnt; None: not known
    chat_template   the chat template beside the tokenizer; None: there is none
    controls    the ids of control tokens by their names, where the tokenizer's file lists them
    settings    `model_settings_builder` of tekken.json, which says what a conversation of format "v15" may set; None:
                the file has none
    """

    kind: str
    origin: str
    n_pieces: int
    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    added: AddedTokens
    chat_format: str | None = None
    settings: object = None
    chat_template: ChatTemplate | None = None
    controls: Mapping[str, int] = {}

    def encode(self, text: str, *, bos: bool = True, eos: bool = False, added: bool = False) -> list[int]:
        """Return the ids of `text`. `bos` and `eos` add the ids that begin and end a sequence, if there are such.

        added       read special added tokens too, such as "<|im_start|>". Control tokens of the tokenizer's own file,
                    such as "[INST]" in tekken.json, are never read

        Raises InputError if `text` is not a string, or holds half of a surrogate pair, which UTF-8 cannot express.
        """
        ids = self._ids_of(checked_text(text), added=added)
        if bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Return the ids of texts with control tokens between them. `parts` are texts, and ids that stay as they are.

        No special added token is read from the texts. Raises InputError as `encode`.
        """
        return [
            token_id
            for part in parts
            for token_id in ([part] if isinstance(part, int) else self._ids_of(checked_text(part), added=False))
        ]

    @abstractmethod
    def _ids_of(self, text: str, *, added: bool) -> list[int]:
        """Return the ids of a checked text."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Control tokens and special added tokens have no text.

        A byte that is not part of a character becomes U+FFFD. Raises InputError unless every id is an integer in
        [0, vocab_size).
        """

    @abstractmethod
    def stream(self, context_ids: Iterable[int] = ()) -> TokenStream:
        """Return a stream for the text of the ids that follow `context_ids`. It does not repeat the context's text."""

    @abstractmethod
    def piece(self, token_id: int) -> str:
        r"""Return the name of one id, for tables: "▁Hello", "<s>", "\n", "<|im_start|>", or "[7]" if 7 has no name.

        A space is shown as "▁". Characters that cannot be printed are escaped. Raises InputError unless the id is an
        integer in [0, vocab_size).
        """

    @abstractmethod
    def control_id(self, name: str) -> int:
        """Return the id of a control token or an added token by its name; raise InputError if there is none."""

    @abstractmethod
    def word_of(self, ids: Sequence[int], at: int) -> str:
        """Return the word that ids[at] is a part of: what BPE merges by itself. It is "" if this id has no text."""

    @abstractmethod
    def merges(self, word: str) -> Iterator[list[str]]:
        """Yield the parts of a word before each merge, and at the end, as names for tables (`piece`)."""

    def checked(self, ids: Iterable[int]) -> list[int]:
        """Return `ids` as a list of Python integers; raise InputError unless each is an integer in [0, vocab_size)."""
        if not isinstance(ids, Iterable):
            raise InputError(f"token ids are {short_repr(ids)}; expected a list of integers")
        ids = list(ids)
        for token_id in ids:
            if isinstance(token_id, bool) or not isinstance(token_id, (int, np.integer)):
                raise InputError(f"token id is {short_repr(token_id)}; expected an integer")
            if not 0 <= token_id < self.vocab_size:
                raise InputError(f"token id is {short_repr(token_id)}; expected at least 0 and below {self.vocab_size}")
        return [int(token_id) for token_id in ids]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.origin!r}, vocab_size={self.vocab_size})"


def checked_text(text: str) -> str:
    """Return a text; raise InputError unless UTF-8 can express it."""
    if not isinstance(text, str):
        raise InputError(f"text is {short_repr(text)}; expected a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text holds {text[error.start]!a} at {error.start}, half of a surrogate pair; expected valid Unicode"
        ) from error
    return text
