"""Tokenizers: read one from a file, turn text into token ids, and turn ids back into text, at once or id by id.

from mistral_ref.text import load_tokenizer

tokenizer = load_tokenizer("path/to/dir")
ids = tokenizer.encode("Once upon a time")
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mistral_ref.errors import TokenizerError, UnknownTokenizerError
from mistral_ref.files.json_file import TOKENIZER, read_json
from mistral_ref.files.paths import gguf_in, gguf_of, is_gguf, model_path
from mistral_ref.text.chat import can_chat, encode_chat, encode_fim
from mistral_ref.text.gguf_tokenizer import gguf_tokenizer, has_tokenizer, opened
from mistral_ref.text.reply import parse_reply
from mistral_ref.text.sentencepiece import TOKENIZER_FILE, SentencePieceTokenizer
from mistral_ref.text.sentencepiece_file import read_model
from mistral_ref.text.tekken import tekken_tokenizer
from mistral_ref.text.tokenizer import Tokenizer
from mistral_ref.text.tokenizer_config import read_tokenizer_config
from mistral_ref.text.tokenizer_json import tokenizer_json

__all__ = [
    "SentencePieceTokenizer",
    "Tokenizer",
    "can_chat",
    "encode_chat",
    "encode_fim",
    "find_tokenizer",
    "load_tokenizer",
    "parse_reply",
]

# Names in instruction models: tokenizer.model.v3, mistral_instruct_tokenizer_241114.model.v7m1, ...
_VERSIONED_FILE = re.compile(r".+\.model\.v\d+(m\d+)?")


def find_tokenizer(directory: str | os.PathLike[str]) -> Path | None:
    """Return the path of the tokenizer's file in a model's directory; None if it has none.

    It is `tekken.json`, else `tokenizer.model`, else the only file with a versioned name, or else `tokenizer.json`,
    which is made from the others, and sometimes made wrongly. A GGUF file holds its tokenizer itself, or has none; a
    directory without these files may have one.

    Raises TokenizerError if the directory cannot be listed, or if it has several versioned names.
    """
    directory = model_path(directory, TokenizerError)
    if is_gguf(directory):
        return directory if has_tokenizer(opened(directory)) else None
    found = tokenizer_files(directory)
    versioned = [path.name for path in found if _VERSIONED_FILE.fullmatch(path.name)]
    if found and found[0].name in versioned[:-1]:
        raise TokenizerError(f"{directory}: holds several tokenizers, {', '.join(versioned)}; give the path of one")
    gguf = None if found else gguf_of(directory) or gguf_in(directory, os.listdir(directory))
    return found[0] if found else gguf and find_tokenizer(gguf)


def tokenizer_files(directory: Path) -> list[Path]:
    """Return the paths of a directory's tokenizers, in the order in which `find_tokenizer` looks for them.

    Raises TokenizerError if the directory cannot be listed.
    """
    try:
        names = sorted(os.listdir(directory))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{directory}: cannot be listed: {getattr(error, 'strerror', error)}") from error
    first = [name for name in ("tekken.json", TOKENIZER_FILE) if name in names]
    versioned = [name for name in names if _VERSIONED_FILE.fullmatch(name)]
    return [directory / name for name in (*first, *versioned, *({"tokenizer.json"} & {*names}))]


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Return the tokenizer in a file, a GGUF file too, or in a directory (`find_tokenizer`), or of a model by its name.

    The file's content tells its kind. Beside any file but a GGUF file, tokenizer_config.json or added_tokens.json are
    read, too. Beside tekken.json, which lists its own control tokens, they say no more than which of these ends a text,
    and the chat template.

    Raises TokenizerError if there is no such file, or if it cannot be used; UnknownTokenizerError, a kind of it, if the
    file is of another kind than these. The message begins with the path.
    """
    path = model_path(path, TokenizerError)
    if os.path.isdir(path):
        found = find_tokenizer(path)
        if found is None:
            raise TokenizerError(
                f"{path}: holds no tokenizer; expected tekken.json, {TOKENIZER_FILE} or tokenizer.json"
            )
        path = found
    if is_gguf(path):
        return gguf_tokenizer(opened(path))
    if not _begins_as_json(path):
        config = read_tokenizer_config(path.parent)
        tokenizer: Tokenizer = SentencePieceTokenizer(read_model(path), origin=str(path), config=config)
    else:
        document = read_json(path, TokenizerError, TOKENIZER)
        is_tekken = "config" in document and "vocab" in document
        if not is_tekken and "model" not in document:
            raise UnknownTokenizerError(f"{path}: has neither the fields of tekken.json nor those of tokenizer.json")
        config = read_tokenizer_config(path.parent, with_added=not is_tekken)
        tokenizer = (tekken_tokenizer if is_tekken else tokenizer_json)(document, str(path), config)
    tokenizer.chat_template = config.chat_template
    return tokenizer


def _begins_as_json(path: Path) -> bool:
    """Return whether the first character of a file that is no space is "{"."""
    if not os.path.isfile(path):  # open() of a named pipe would wait for its other end
        raise TokenizerError(f"{path}: there is no such file, or it is not a regular one")
    try:
        with path.open("rb") as file:
            return file.read(64).lstrip()[:1] == b"{"
    except OSError as error:
        raise TokenizerError(f"{path}: cannot be read: {error.strerror}") from error
