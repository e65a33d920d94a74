"""Read what the files beside a tokenizer say about it: tokenizer_config.json, and others that transformers writes."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mistral_ref.errors import TokenizerError, short_repr, warn
from mistral_ref.files.json_file import CONFIG, read_json
from mistral_ref.text.added_tokens import AddedToken, added_token
from mistral_ref.text.template_file import ChatTemplate, chat_template

_FILE = "tokenizer_config.json"
_LIMITS = CONFIG._replace(n_bytes=2 * 2**20)  # with a chat template in it


@dataclass(frozen=True)
class TokenizerConfig:
    """What the files beside a tokenizer say about it. They are those that transformers writes.

    origin      the directory of the files
    added       the added tokens
    eos_token   the content of the token that ends a text; None: the tokenizer's own file names it
    bos_token   the content of the token that begins a text
    add_bos_token       whether texts begin with it; None: the tokenizer's own file says it
    add_prefix_space    False: SentencePiece puts no space before a text, whatever its own file says
    legacy      True: the text behind an added token is encoded like a text of its own, so SentencePiece puts a space
                before it. False: no space is put there. Files from before there was this choice mean True
    chat_template   the chat template; None: there is none
    """

    origin: str = "tokenizer"
    added: tuple[AddedToken, ...] = ()
    eos_token: str | None = None
    bos_token: str | None = None
    add_bos_token: bool | None = None
    add_prefix_space: bool | None = None
    legacy: bool = True
    chat_template: ChatTemplate | None = None

    def named_id(
        self, field: Literal["bos_token", "eos_token"], id_of: Callable[[str], int | None], otherwise: int | None
    ) -> int | None:
        """Return the id of the token that a field names, and `otherwise` if it names none.

        id_of   returns the id of the token with a name; None if there is no such token. Then there is a warning
        """
        name: str | None = getattr(self, field)
        found = None if name is None else id_of(name)
        if name is not None and found is None:
            warn(
                f"{Path(self.origin, _FILE)}: {field} is {short_repr(name)}, which is no token of this tokenizer; "
                f"{'no id' if otherwise is None else f'id {otherwise}'} is used"
            )
        return otherwise if found is None else found


def read_tokenizer_config(directory: Path, *, with_added: bool = True) -> TokenizerConfig:
    """Return what the files in a directory say; each may be absent.

    with_added  whether added tokens are read, too. As in transformers, added_tokens.json counts only if
                tokenizer_config.json has no `added_tokens_decoder`. It has no flags. All its tokens are taken as
                special, since a text must not forge a mark

    Raises TokenizerError if a file cannot be read, or has a wrong value. Warns if added_tokens.json is not used and
    says something else.
    """
    config_json = directory / _FILE
    config = _read_if_there(config_json)
    flags = {name: config.get(name) for name in ("add_bos_token", "add_prefix_space", "legacy")}
    for name, flag in flags.items():
        if not isinstance(flag, bool | None):
            raise TokenizerError(f"{config_json}: {name} is {short_repr(flag)}; expected true or false")
    return TokenizerConfig(
        str(directory),
        tuple(_added_tokens(config, config_json)) if with_added else (),
        eos_token=_content_of(config, "eos_token", config_json),
        bos_token=_content_of(config, "bos_token", config_json),
        add_bos_token=flags["add_bos_token"],
        add_prefix_space=flags["add_prefix_space"],
        legacy=flags["legacy"] is not False,
        chat_template=chat_template(config, directory, config_json),
    )


def _added_tokens(config: dict[str, Any], config_json: Path) -> list[AddedToken]:
    added_json = config_json.with_name("added_tokens.json")
    ids = _read_if_there(added_json)
    added = [added_token(found, {"content": name, "special": True}, f"{added_json}:") for name, found in ids.items()]
    listed = config.get("added_tokens_decoder")
    if listed is None:
        return added
    where = f"{config_json}: added_tokens_decoder"
    if not isinstance(listed, dict):
        raise TokenizerError(f"{where} is {short_repr(listed)}; expected an object")
    unused = {token.content: token.id for token in added}
    added = [added_token(_id_of(key, where), fields, f"{where} {key}:") for key, fields in listed.items()]
    _warn_of_unused(unused, added, added_json, config_json)
    return added


def _content_of(config: dict[str, Any], field: str, config_json: Path) -> str | None:
    """Return the content of the token that a field names: a text, or an object with it."""
    value = config.get(field)
    if isinstance(value, dict):
        value = value.get("content")
    if not isinstance(value, str | None):
        raise TokenizerError(f"{config_json}: {field} is {short_repr(value)}; expected the content of a token")
    return value


def _read_if_there(path: Path) -> dict[str, Any]:
    return read_json(path, TokenizerError, _LIMITS) if os.path.lexists(path) else {}


def _id_of(key: str, where: str) -> int:
    """Return the id that a key of `added_tokens_decoder` is."""
    if not re.fullmatch(r"0|[1-9][0-9]{0,9}", key):
        raise TokenizerError(f"{where} has the key {short_repr(key)}; expected an id")
    return int(key)


def _warn_of_unused(unused: dict[str, int], added: list[AddedToken], added_json: Path, config_json: Path) -> None:
    """Warn if added_tokens.json says something else than the tokens that are used."""
    used = {token.content: token.id for token in added}
    if other := {content: token_id for content, token_id in unused.items() if used.get(content) != token_id}:
        content, token_id = next(iter(other.items()))
        theirs = f"it has {short_repr(content)} as id {token_id}"
        ours = f"as id {used[content]}" if content in used else "without it"
        warn(f"{added_json}: is ignored; {theirs}, and {config_json.name} has added_tokens_decoder {ours}")
