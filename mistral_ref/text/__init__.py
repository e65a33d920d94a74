"""Tokenizers: read one from a file, turn text into token ids, and turn ids back into text, at once or id by id.

from mistral_ref.text import load_tokenizer

tokenizer = load_tokenizer("path/to/dir")
ids = tokenizer.encode("Once upon a time")
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mistral_ref.errors import TokenizerError
from mistral_ref.files.paths import local_path
from mistral_ref.text.added_tokens import read_tokenizer_config
from mistral_ref.text.sentencepiece import TOKENIZER_FILE, SentencePieceTokenizer
from mistral_ref.text.sentencepiece_file import read_model

__all__ = ["OTHER_FORMATS", "SentencePieceTokenizer", "find_tokenizer", "load_tokenizer"]

# Names in instruction models: tokenizer.model.v3, mistral_instruct_tokenizer_241114.model.v7m1, ...
_VERSIONED_FILE = re.compile(r".+\.model\.v\d+(m\d+)?")
OTHER_FORMATS = ("tekken.json", "tokenizer.json")


def find_tokenizer(directory: str | os.PathLike[str]) -> Path | None:
    """Return the path of the SentencePiece file in a model's directory; None if it has none.

    It is `tokenizer.model`, or else the only file with a versioned name. The file is not opened.

    Raises TokenizerError if the directory cannot be listed, or if it has several versioned names.
    """
    directory = local_path(directory)
    try:
        names = sorted(os.listdir(directory))
    except (OSError, ValueError) as error:
        raise TokenizerError(f"{directory}: cannot be listed: {getattr(error, 'strerror', error)}") from error
    if TOKENIZER_FILE in names:
        return directory / TOKENIZER_FILE
    versioned = [name for name in names if _VERSIONED_FILE.fullmatch(name)]
    if len(versioned) > 1:
        raise TokenizerError(f"{directory}: holds several tokenizers, {', '.join(versioned)}; give the path of one")
    return directory / versioned[0] if versioned else None


def load_tokenizer(path: str | os.PathLike[str]) -> SentencePieceTokenizer:
    """Return the tokenizer in a SentencePiece file. `path` is the file, or a directory with one (`find_tokenizer`).

    Added tokens are read from tokenizer_config.json or added_tokens.json beside the file. Raises TokenizerError if
    there is no such file, or if it cannot be used. The message begins with the path.
    """
    path = local_path(path)
    if os.path.isdir(path):
        found = find_tokenizer(path)
        if found is None:
            others = [name for name in OTHER_FORMATS if os.path.exists(path / name)]
            raise TokenizerError(
                f"{path}: holds {others[0]}; expected a SentencePiece file (prompts of token ids need no tokenizer)"
                if others
                else f"{path}: holds no {TOKENIZER_FILE}"
            )
        path = found
    return SentencePieceTokenizer(read_model(path), origin=str(path), config=read_tokenizer_config(path.parent))
