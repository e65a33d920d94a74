"""Text to token ids and back, with a SentencePiece model.

Three rules that other programs often break:

- Only `encode(text, bos=True)` adds the beginning-of-sequence id, and it adds it exactly once.
- Text is always text. `encode("<s>")` returns the ids of the three characters, never the control id. So a text cannot
  forge the marks of a conversation. Added tokens (added_tokens.py) are no text: `encode(text, added=True)` reads them
  all. Without it those are read that are not special.
- The text of several ids is not the joined texts of the single ids. SentencePiece drops the space before a piece if
  the piece comes first, and one emoji may be four ids. So text that arrives id by id goes through a `TokenStream`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property

from sentencepiece import SentencePieceProcessor

from mistral_ref.errors import InputError, TokenizerError, escaped, short_repr, warn
from mistral_ref.text.added_tokens import AddedToken, AddedTokens
from mistral_ref.text.byte_bpe import merge_by_merge
from mistral_ref.text.stream import SentencePieceStream
from mistral_ref.text.tokenizer import Tokenizer, checked_text
from mistral_ref.text.tokenizer_config import TokenizerConfig

TOKENIZER_FILE = "tokenizer.model"
_SPACE = "▁".encode()  # SentencePiece's mark for a space
# A protobuf field: the normalizer (3), in which `add_dummy_prefix` (3) is 0. Of a field that comes twice in a file, the
# last one counts.
_NO_SPACE = b"\x1a\x02\x18\x00"
_NO_OTHER_FILES = TokenizerConfig()


class SentencePieceTokenizer(Tokenizer):
    """Text to ids and back, with one SentencePiece model and the added tokens beside it.

    model       the bytes of the model's file
    origin      begins every message about the model, for example the path of its file
    config      what other files say about the tokenizer

    The whole model is checked at creation: the ids that begin and end a sequence must exist and differ, and every
    piece must be valid text. Raises TokenizerError if they are not, or if an added token has the name of a piece and
    another id. Warns if an added token takes the id of a piece and another name, or if `config.eos_token` is unknown.
    """

    kind = "SentencePiece"

    def __init__(self, model: bytes, origin: str = TOKENIZER_FILE, config: TokenizerConfig = _NO_OTHER_FILES) -> None:
        self._processor, self.origin, self._config = SentencePieceProcessor(), origin, config
        try:
            self._processor.LoadFromSerializedProto(model + (_NO_SPACE if config.add_prefix_space is False else b""))
            self.n_pieces: int = self._processor.get_piece_size()
            # Every piece is read and decoded once here, so a piece that is not valid UTF-8 cannot fail a later call.
            for first in range(0, self.n_pieces, 1024):  # one call for all pieces would take megabytes
                ids = list(range(first, min(first + 1024, self.n_pieces)))
                self._processor.id_to_piece(ids)
                self._processor.decode(ids)
        except Exception as error:  # the library raises several unrelated built-in exceptions
            raise TokenizerError(f"{origin}: is not a usable SentencePiece model: {short_repr(str(error))}") from error
        self._bos_id: int = self._processor.bos_id()
        eos_id: int = self._processor.eos_id()
        if self._bos_id < 0 or eos_id < 0 or self._bos_id == eos_id:
            raise TokenizerError(
                f"{origin}: begins a sequence with id {self._bos_id} and ends it with id {eos_id}; "
                "expected two different ids of at least 0 (-1 means absent)"
            )
        self.added = self._added_tokens()
        self.vocab_size: int = max([self.n_pieces, *(token_id + 1 for token_id in self.added.by_id)])
        begins = config.named_id("bos_token", self._id_of_name, self._bos_id)
        self.bos_id = None if config.add_bos_token is False else begins
        self.eos_id = config.named_id("eos_token", self._id_of_name, eos_id)
        # The first piece of whole characters. Ids are decoded behind it if they do not begin a text.
        self.anchor_id = next((i for i in range(self.n_pieces) if self._is_text(i)), -1)
        if self.anchor_id < 0:
            raise TokenizerError(f"{origin}: has no piece of text; expected at least one")
        self.chat_format = self._chat_format()

    def _chat_format(self) -> str | None:
        """Return the format of conversations, by what tells the files of Mistral's models apart."""
        if self._id_of_piece("[INST]") is None:  # then "[INST]" is text, in the first models; Llama's "▁" is another id
            return "v1" if self._id_of_piece("▁") == 28705 and self.n_pieces == 32000 else None
        if self._id_of_piece("[INST]") != 3:
            return None
        by_name = {"[SYSTEM_PROMPT]": "v7", "[PREFIX]": "v3", "[TOOL_CALLS]": "v2"}
        return next((version for name, version in by_name.items() if self._id_of_piece(name) is not None), None)

    def _is_text(self, token_id: int) -> bool:
        is_whole = self._processor.decode([token_id]).strip("\ufffd") != ""
        return is_whole and token_id not in self.added.by_id

    def _added_tokens(self) -> AddedTokens:
        """Return the added tokens. Files list the model's own control pieces among them; these stay what they are."""
        tokens, renamed = [], []
        for token in self._config.added:
            named = self._id_of_piece(token.content)
            if named not in (None, token.id):
                raise TokenizerError(
                    f"{self._config.origin}: {short_repr(token.content)} is an added token with id {token.id}; "
                    f"expected {named}, its id in {self.origin}"
                )
            is_control = token.id < self.n_pieces and self._is_control(token.id)
            if is_control and named is not None:
                continue
            if token.id < self.n_pieces and named is None:
                renamed.append(token)
            tokens.append(dataclasses.replace(token, special=True) if is_control else token)
        if renamed:
            token, others = renamed[0], f", and {len(renamed) - 1} more" if renamed[1:] else ""
            warn(
                f"{self._config.origin}: id {token.id} is called {short_repr(token.content)}; in {self.origin} it is "
                f"{short_repr(self._processor.id_to_piece(token.id))}, which is replaced{others}"
            )
        return AddedTokens(tokens, self._config.origin)

    def _id_of_name(self, name: str) -> int | None:
        """Return the id of the added token, or of the model's piece, with this name; None if there is none."""
        added = self.added.by_content.get(name)
        return self._id_of_piece(name) if added is None else added.id

    def _id_of_piece(self, name: str) -> int | None:
        """Return the id of the model's piece with this name; None if it has no such piece."""
        found: int = self._processor.piece_to_id(name)  # the id of "<unk>" for a name that no piece has
        return found if self._processor.id_to_piece(found) == name else None

    def _is_control(self, token_id: int) -> bool:
        """Return whether one of the model's pieces is a mark: no characters of a text become this piece."""
        kinds = (self._processor.is_control, self._processor.is_unknown, self._processor.is_byte)
        return any(is_kind(token_id) for is_kind in kinds)

    def _ids_of(self, text: str, *, added: bool) -> list[int]:
        """Return the ids of a checked text.

        If the model was trained in this way, SentencePiece puts a space before the text: "Hello" becomes the piece
        "▁Hello". Behind an added token `TokenizerConfig.legacy` decides.
        """
        return self._ids_behind([], text, added=added)

    def encode_parts(self, parts: Iterable[str | int]) -> list[int]:
        """Return the ids of texts with control tokens between them; see `Tokenizer.encode_parts`."""
        ids: list[int] = []
        for part in parts:
            ids += [part] if isinstance(part, int) else self._ids_behind(ids, checked_text(part), added=False)
        return ids

    def _ids_behind(self, before: list[int], text: str, *, added: bool) -> list[int]:
        """Return the ids of a text behind the ids `before`."""
        ids: list[int] = []
        for part in self.added.split(text, special=added):
            if isinstance(part, AddedToken):
                ids.append(part.id)
            else:
                begins = not before and not ids
                processor = self._processor if self._config.legacy or begins else self._without_space
                ids += processor.encode(part)
        return ids

    @cached_property
    def _without_space(self) -> SentencePieceProcessor:
        """The same model, except that it puts no space before a text."""
        processor = SentencePieceProcessor()
        processor.LoadFromSerializedProto(self._processor.serialized_model_proto() + _NO_SPACE)
        return processor

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Control ids and special added tokens have no text.

        A byte that is not part of a character becomes U+FFFD. Raises InputError unless every id is an integer in
        [0, vocab_size).
        """
        text = ""
        run: list[int] = []  # pieces up to the next added token that has a text
        for token_id in self.checked(ids):
            token = self.added.by_id.get(token_id)
            if token is not None and not token.special:
                text += self._text_of_pieces(run, begins=not text) + token.content
                run = []
            else:
                is_piece = token is None and token_id < self.n_pieces
                run.append(token_id if is_piece else self._bos_id)  # which has no text either
        return text + self._text_of_pieces(run, begins=not text)

    def _text_of_pieces(self, ids: list[int], *, begins: bool) -> str:
        """Return the text of pieces. If they begin a text, SentencePiece drops the space before it."""
        before = [] if begins else [self.anchor_id]
        return self._processor.decode(before + ids)[len(self._processor.decode(before)) :]

    def stream(self, context_ids: Iterable[int] = ()) -> SentencePieceStream:
        """Return a stream for the text of the ids that follow `context_ids`. It does not repeat the context's text."""
        return SentencePieceStream(self, context_ids)

    def piece(self, token_id: int) -> str:
        r"""Return the name of one id, for tables: "▁Hello", "<s>", "<0x0A>", "<|im_start|>", or "[7]" if 7 has no name.

        Characters that cannot be printed are escaped. Raises InputError unless the id is an integer in [0, vocab_size).
        """
        (token_id,) = self.checked([token_id])
        if token := self.added.by_id.get(token_id):
            return escaped(token.content)
        return escaped(self._processor.id_to_piece(token_id)) if token_id < self.n_pieces else f"[{token_id}]"

    def word_of(self, ids: Sequence[int], at: int) -> str:
        """Return the word that ids[at] is a part of, from a piece with a space in front to the next one."""
        pieces = [self._bytes_of(token_id) for token_id in self.checked(ids)]
        word = pieces[at] or b""
        begin, end = at, at + 1
        while word and begin > 0 and not word.startswith(_SPACE) and (piece := pieces[begin - 1]) is not None:
            begin, word = begin - 1, piece + word
        while word and end < len(pieces) and (piece := pieces[end]) is not None and not piece.startswith(_SPACE):
            end, word = end + 1, word + piece
        return word.decode(errors="replace")

    def _bytes_of(self, token_id: int) -> bytes | None:
        """Return the bytes of a piece of text, with its space mark; None for an id without text or an added token."""
        byte = self.byte(token_id)
        if byte is not None:
            return bytes([byte])
        is_text = token_id < self.n_pieces and token_id not in self.added.by_id and not self._is_control(token_id)
        return self._processor.id_to_piece(token_id).encode() if is_text else None

    def merges(self, word: str) -> Iterator[list[str]]:
        """Yield the parts of a word before each merge, and at the end. Its first parts are characters.

        A character that is no piece becomes its bytes behind the last merge; this is not shown. Raises InputError if
        merging does not lead to the pieces of this word: some models change a text first, and some are no BPE.
        """

        def rank(left: str, right: str) -> float | None:
            found = self._id_of_piece(left + right)
            return None if found is None or self._is_control(found) else -self._processor.get_score(found)

        states = list(merge_by_merge(word.replace(" ", "▁"), rank))
        pieces = [self._bytes_of(token_id) for token_id in self._without_space.encode(word.replace("▁", " "))]
        found: list[bytes] = []
        for part in states[-1]:
            data = part.encode()
            found += [bytes([byte]) for byte in data] if rank(part, "") is None else [data]
        if found != pieces:
            raise InputError(f"{self.origin}: makes other pieces of {short_repr(word)} than merging does")
        yield from ([escaped(part) for part in state] for state in states)

    def control_id(self, name: str) -> int:
        """Return the id of a control piece or an added token by its name; raise InputError if there is none."""
        if token := self.added.by_content.get(name):
            return token.id
        found = self._id_of_piece(name)
        if found is None or found in self.added.by_id or not self._processor.is_control(found):
            raise InputError(f"{self.origin}: has no control token {short_repr(name)}")
        return found

    def byte(self, token_id: int) -> int | None:
        """Return the byte that a piece like "<0x0A>" stands for; None for every other id."""
        is_byte = token_id < self.n_pieces and token_id not in self.added.by_id and self._processor.is_byte(token_id)
        return int(self._processor.id_to_piece(token_id)[1:-1], 16) if is_byte else None
