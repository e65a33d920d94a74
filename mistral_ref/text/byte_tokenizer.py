"""ByteTokenizer: text to token ids and back, with a byte-level BPE (byte_bpe.py), control tokens and added tokens."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, takewhile
from typing import Literal

from mistral_ref.errors import InputError, escaped, short_repr
from mistral_ref.text.added_tokens import AddedToken, AddedTokens
from mistral_ref.text.byte_bpe import ByteBPE
from mistral_ref.text.stream import ByteStream
from mistral_ref.text.tokenizer import Tokenizer

NormalForm = Literal["NFC", "NFD", "NFKC", "NFKD"]


class ByteTokenizer(Tokenizer):
    """Text to ids and back, with a byte-level BPE.

    bpe         how a text becomes pieces
    controls    the ids of the control tokens by their names. No text becomes them, and they have no text
    normal_forms    the Unicode normal forms, such as "NFC", that a text gets before it is split, one after the other

    The other arguments are attributes of every `Tokenizer`.
    """

    def __init__(
        self,
        bpe: ByteBPE,
        *,
        kind: str,
        origin: str,
        controls: Mapping[str, int],
        bos_id: int | None,
        eos_id: int | None,
        added: AddedTokens | None = None,
        chat_format: str | None = None,
        settings: object = None,
        normal_forms: Sequence[NormalForm] = (),
    ) -> None:
        self.bpe, self.kind, self.origin, self.controls = bpe, kind, origin, controls
        self.bos_id, self.eos_id, self.chat_format, self.settings = bos_id, eos_id, chat_format, settings
        self._normal_forms = normal_forms
        self.added = AddedTokens() if added is None else added
        self._pieces = {token_id: piece for piece, token_id in bpe.ids.items()}
        self._names = {token_id: name for name, token_id in controls.items()}
        self.n_pieces = len(self._pieces) + len(self._names)
        self.vocab_size = 1 + max((*self._pieces, *self._names, *self.added.by_id))

    def _ids_of(self, text: str, *, added: bool) -> list[int]:
        ids: list[int] = []
        for part in self.added.split(text, special=added):
            ids += [part.id] if isinstance(part, AddedToken) else self.bpe.encode(self._normalized(part))
        return ids

    def _normalized(self, text: str) -> str:
        for form in self._normal_forms:
            text = unicodedata.normalize(form, text)
        return text

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Control tokens and special added tokens have no text.

        A byte that is not part of a character becomes U+FFFD; so do the bytes of a character that a control token cuts
        in two. Raises InputError unless every id is an integer in [0, vocab_size).
        """
        text = ""
        for is_text, run in groupby(map(self.bytes_of, self.checked(ids)), lambda piece: piece is not None):
            text += b"".join(piece or b"" for piece in run).decode(errors="replace") if is_text else ""
        return text

    def bytes_of(self, token_id: int) -> bytes | None:
        """Return the bytes that an id adds to a text; None if it has no text."""
        if token := self.added.by_id.get(token_id):
            return None if token.special else token.content.encode()
        piece = self._pieces.get(token_id)
        return None if piece is None else self.bpe.bytes_of(piece)

    def stream(self, context_ids: Iterable[int] = ()) -> ByteStream:
        """Return a stream for the text of the ids that follow `context_ids`. It does not repeat the context's text."""
        return ByteStream(self, context_ids)

    def piece(self, token_id: int) -> str:
        r"""Return the name of one id, for tables: "▁Hello", "<s>", "\n", "\xe2", "<|im_start|>", or "[7]".

        A space is shown as "▁". Characters that cannot be printed, and bytes that are no character, are escaped; an id
        without a piece is its number. Raises InputError unless the id is an integer in [0, vocab_size).
        """
        (token_id,) = self.checked([token_id])
        if token := self.added.by_id.get(token_id):
            return escaped(token.content)
        if token_id in self._names:
            return escaped(self._names[token_id])
        piece = self.bytes_of(token_id)
        return f"[{token_id}]" if piece is None else shown(piece)

    def word_of(self, ids: Sequence[int], at: int) -> str:
        """Return the word that ids[at] is a part of. Bytes that are no character are halves of pairs in it."""
        pieces = [None if i in self.added.by_id else self.bytes_of(i) for i in self.checked(ids)]
        if pieces[at] is None:
            return ""
        before = list(takewhile(lambda piece: piece is not None, reversed(pieces[:at])))
        behind = takewhile(lambda piece: piece is not None, pieces[at:])
        run = b"".join(piece or b"" for piece in (*reversed(before), *behind))
        offset = sum(len(piece or b"") for piece in before)
        for word in self.bpe.words(run.decode(errors="surrogateescape")):
            offset -= len(word.encode(errors="surrogateescape"))
            if offset < 0:
                return word
        return ""

    def merges(self, word: str) -> Iterator[list[str]]:
        """Yield the parts of a word before each merge, and at the end, as names for tables (`piece`)."""
        for parts in self.bpe.merges(word.encode(errors="surrogateescape")):
            yield [shown(part) for part in parts]

    def control_id(self, name: str) -> int:
        """Return the id of a control token or an added token by its name; raise InputError if there is none."""
        if token := self.added.by_content.get(name):
            return token.id
        if name not in self.controls:
            raise InputError(f"{self.origin}: has no control token {short_repr(name)}")
        return self.controls[name]


def shown(piece: bytes) -> str:
    r"""Return the bytes of a piece as a text that can be printed; a space is shown as "▁".

    >>> shown(" né\n".encode()), shown("☺".encode()[:2])
    ('▁né\\n', '\\xe2\\x98')
    """
    return escaped(piece.decode(errors="backslashreplace")).replace(" ", "▁")
