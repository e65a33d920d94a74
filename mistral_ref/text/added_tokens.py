"""Added tokens: tokens that a fine-tuned model has beside those of its base model, such as "<|im_start|>".

Files beside the tokenizer list them (tokenizer_config.py). Each is one id, and is found in a text by its content.
There are two kinds:

    special         a mark, such as the end of a turn in a conversation. It is not part of what is said. So it is read
                    only from a text whose writer may set marks, and it has no text when ids are decoded
    not special     a word, such as "<tool_call>". It is read from every text, and its text is its content

For a SentencePiece model the ids are those of transformers 4's LlamaTokenizer, which is written in Python. There is one
exception: no space is put before a text that begins with a token that is not special, as in LlamaTokenizerFast. The
golden file added_tokens.json has both cases.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from mistral_ref.errors import TokenizerError, short_repr

MAX_CONTENT = 128  # characters; with this maximum the time that `split` takes is in proportion to the text
_MAX_ID = 2**31 - 1
# White space as `tokenizers` has it, Unicode's White_Space; Python's own \s also takes \x1c to \x1f.
_SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
_SPACES_HERE = re.compile(f"[{_SPACES}]*")


@dataclass(frozen=True, slots=True)
class AddedToken:
    """One added token.

    id          its id
    content     the characters that it is in a text
    special     whether it is a mark, and not part of what a text says
    lstrip      the token takes the white space before it
    rstrip      the token takes the white space behind it
    """

    id: int
    content: str
    special: bool = True
    lstrip: bool = False
    rstrip: bool = False


class AddedTokens:
    """The added tokens of one tokenizer, and how a text is cut at them.

    by_id, by_content   the tokens by their ids and by their contents

    Raises TokenizerError if two tokens have the same id or the same content; the message begins with `origin`.
    """

    def __init__(self, tokens: Iterable[AddedToken] = (), origin: str = "added tokens") -> None:
        self.by_id: dict[int, AddedToken] = {}
        self.by_content: dict[str, AddedToken] = {}
        for token in tokens:
            if other := self.by_content.get(token.content) or self.by_id.get(token.id):
                pair = " and ".join(f"id {one.id} {short_repr(one.content)}" for one in (other, token))
                raise TokenizerError(f"{origin}: holds {pair}; expected different ids and different contents")
            self.by_id[token.id] = self.by_content[token.content] = token
        self._lengths = sorted({len(content) for content in self.by_content}, reverse=True)
        first = {re.escape(content[0]) for content in self.by_content}
        self._first = re.compile(f"[{''.join(sorted(first))}]") if first else None

    def split(self, text: str, *, special: bool) -> Iterator[str | AddedToken]:
        """Yield the added tokens in a text, and the texts between them, in their order. No text is empty.

        special     False: the contents of special tokens are text

        The first token is found first; of several that begin at the same character it is the longest.

        >>> tokens = AddedTokens([AddedToken(8, "<a>"), AddedToken(9, "<b>", special=False, lstrip=True)])
        >>> [part if isinstance(part, str) else part.id for part in tokens.split("one<a> two <b> ", special=True)]
        ['one', 8, ' two', 9, ' ']
        >>> [part if isinstance(part, str) else part.id for part in tokens.split("one<a> two <b> ", special=False)]
        ['one<a> two', 9, ' ']
        """
        begin = free = 0  # where the next text begins; where the next token may begin
        for match in self._first.finditer(text) if self._first else ():
            at = match.start()
            token = self._found_at(text, at) if at >= free else None
            if token is None:
                continue
            free = at + len(token.content)
            if token.special and not special:
                continue
            if before := text[begin:at].rstrip(_SPACES) if token.lstrip else text[begin:at]:
                yield before
            yield token
            if token.rstrip and (spaces := _SPACES_HERE.match(text, free)):
                free = spaces.end()
            begin = free
        if begin < len(text):
            yield text[begin:]

    def _found_at(self, text: str, at: int) -> AddedToken | None:
        """Return the longest added token whose content begins at this character; None if there is none."""
        found = (self.by_content.get(text[at : at + length]) for length in self._lengths)
        return next((token for token in found if token is not None), None)


def added_token(token_id: object, fields: Any, where: str) -> AddedToken:
    """Return the added token with this id that `fields`, an object of a JSON file, describes. Absent flags are false.

    The flag `normalized` is not read: the token is found in the text as it was written. `single_word` cannot be
    followed. Raises TokenizerError for a wrong value; the message begins with `where`.
    """
    if type(token_id) is not int or not 0 <= token_id <= _MAX_ID:
        raise TokenizerError(f"{where} an id is {short_repr(token_id)}; expected a whole number from 0 to {_MAX_ID}")
    if not isinstance(fields, dict):
        raise TokenizerError(f"{where} is {short_repr(fields)}; expected an object")
    content = fields.get("content")
    if not isinstance(content, str) or not 0 < len(content) <= MAX_CONTENT or not _is_unicode(content):
        expected = f"valid Unicode of 1 to {MAX_CONTENT} characters"
        raise TokenizerError(f"{where} the content is {short_repr(content)}; expected {expected}")
    flags = {name: fields.get(name, False) for name in ("special", "lstrip", "rstrip", "single_word")}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TokenizerError(f"{where} {name} is {short_repr(flag)}; expected true or false")
    if flags.pop("single_word"):
        raise TokenizerError(f"{where} single_word is true; expected false, the only value that can be followed")
    return AddedToken(token_id, content, **flags)


def _is_unicode(text: str) -> bool:
    """Return whether UTF-8 can express a text; it cannot if half of a surrogate pair is in it."""
    return not any("\ud800" <= char <= "\udfff" for char in text)
