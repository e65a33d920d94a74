"""Added tokens: tokens that a fine-tuned model has beside those of its base model, such as "<|im_start|>".

Files beside the tokenizer list them. Each is one id, and is found in a text by its content. There are two kinds:

    special         a mark, such as the end of a turn in a conversation. It is not part of what is said. So it is read
                    only from a text whose writer may set marks, and it has no text when ids are decoded
    not special     a word, such as "<tool_call>". It is read from every text, and its text is its content

For a SentencePiece model the ids are those of transformers 4's LlamaTokenizer, which is written in Python. There is one
exception: no space is put before a text that begins with a token that is not special, as in LlamaTokenizerFast. The
golden file added_tokens.json has both cases.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_ref.errors import TokenizerError, short_repr, warn
from mistral_ref.files.json_file import read_json

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


@dataclass(frozen=True)
class TokenizerConfig:
    """What the files beside a tokenizer say about it. They are those that transformers writes.

    origin      the directory of the files
    added       the added tokens
    eos_token   the content of the token that ends a text; None: the tokenizer's own file names it
    bos_token   the content of the token that begins a text
    add_bos_token       whether texts begin with it; None: the tokenizer's own file says it
    legacy      True: the text behind an added token is encoded like a text of its own, so SentencePiece puts a space
                before it. False: no space is put there. Files from before there was this choice mean True
    """

    origin: str = "tokenizer"
    added: tuple[AddedToken, ...] = ()
    eos_token: str | None = None
    bos_token: str | None = None
    add_bos_token: bool | None = None
    legacy: bool = True


def read_tokenizer_config(directory: Path) -> TokenizerConfig:
    """Return what tokenizer_config.json and added_tokens.json in a directory say; both may be absent.

    As in transformers, added_tokens.json counts only if tokenizer_config.json has no `added_tokens_decoder`. It has no
    flags. All its tokens are taken as special, since a text must not forge a mark.

    Raises TokenizerError if a file cannot be read, or has a wrong value. Warns if added_tokens.json is not used and
    says something else.
    """
    config_json, added_json = directory / "tokenizer_config.json", directory / "added_tokens.json"
    config, ids = (_read_if_there(path) for path in (config_json, added_json))
    added = [added_token(found, {"content": name, "special": True}, f"{added_json}:") for name, found in ids.items()]
    listed = config.get("added_tokens_decoder")
    if listed is not None:
        where = f"{config_json}: added_tokens_decoder"
        if not isinstance(listed, dict):
            raise TokenizerError(f"{where} is {short_repr(listed)}; expected an object")
        unused = {token.content: token.id for token in added}
        added = [added_token(_id_of(key, where), fields, f"{where} {key}:") for key, fields in listed.items()]
        _warn_of_unused(unused, added, added_json, config_json)
    for field in ("add_bos_token", "legacy"):
        if not isinstance(config.get(field), bool | None):
            raise TokenizerError(f"{config_json}: {field} is {short_repr(config[field])}; expected true or false")
    return TokenizerConfig(
        str(directory),
        tuple(added),
        eos_token=_content_of(config, "eos_token", config_json),
        bos_token=_content_of(config, "bos_token", config_json),
        add_bos_token=config.get("add_bos_token"),
        legacy=config.get("legacy") is not False,
    )


def _content_of(config: dict[str, Any], field: str, config_json: Path) -> str | None:
    """Return the content of the token that a field names: a text, or an object with it."""
    value = config.get(field)
    if isinstance(value, dict):
        value = value.get("content")
    if not isinstance(value, str | None):
        raise TokenizerError(f"{config_json}: {field} is {short_repr(value)}; expected the content of a token")
    return value


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path, TokenizerError) if os.path.lexists(path) else {}


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


def _id_of(key: str, where: str) -> int:
    """Return the id that a key of `added_tokens_decoder` is."""
    if not re.fullmatch(r"0|[1-9][0-9]{0,9}", key):
        raise TokenizerError(f"{where} has the key {short_repr(key)}; expected an id")
    return int(key)


def _is_unicode(text: str) -> bool:
    """Return whether UTF-8 can express a text; it cannot if half of a surrogate pair is in it."""
    return not any("\ud800" <= char <= "\udfff" for char in text)


def _warn_of_unused(unused: dict[str, int], added: list[AddedToken], added_json: Path, config_json: Path) -> None:
    """Warn if added_tokens.json says something else than the tokens that are used."""
    used = {token.content: token.id for token in added}
    if other := {content: token_id for content, token_id in unused.items() if used.get(content) != token_id}:
        content, token_id = next(iter(other.items()))
        theirs = f"it has {short_repr(content)} as id {token_id}"
        ours = f"as id {used[content]}" if content in used else "without it"
        warn(f"{added_json}: is ignored; {theirs}, and {config_json.name} has added_tokens_decoder {ours}")
