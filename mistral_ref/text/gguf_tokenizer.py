"""Make a tokenizer of the fields of a GGUF file. They are what the file of the tokenizer held, in other words.

    tokenizer.ggml.model        "llama": SentencePiece, with the scores of the pieces; "gpt2": byte-level BPE
    tokenizer.ggml.pre          how byte-level BPE splits a text: "tekken", "llama-bpe", "smollm", "gpt-2"
    tokenizer.ggml.tokens       the pieces, in the order of their ids
    tokenizer.ggml.token_type   what each piece is: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 a byte
    tokenizer.ggml.merges       the merges of byte-level BPE; Tekken needs none

SentencePiece is given a model that is rebuilt of the fields; byte-level BPE is read as the tokenizer.json that it came
from. Chat formats follow from the control tokens. The chat template is used for other models only.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mistral_ref.errors import CheckpointError, TokenizerError, UnknownTokenizerError, short_repr
from mistral_ref.files.gguf import GGUF, Texts, open_gguf
from mistral_ref.text.added_tokens import AddedToken, AddedTokens, added_token
from mistral_ref.text.byte_bpe import ByteBPE, bytes_of_letters
from mistral_ref.text.byte_tokenizer import ByteTokenizer
from mistral_ref.text.sentencepiece import SentencePieceTokenizer
from mistral_ref.text.sentencepiece_file import MAX_FILE_BYTES, MAX_PIECES
from mistral_ref.text.split_patterns import DIGITS, GPT2, LLAMA3, TEKKEN
from mistral_ref.text.template_file import ChatTemplate
from mistral_ref.text.tokenizer import Tokenizer
from mistral_ref.text.tokenizer_config import TokenizerConfig
from mistral_ref.text.tokenizer_json import tokenizer_json

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_PATTERNS = {name: [DIGITS, GPT2] for name in ("smollm", "starcoder", "refact", "command-r")}
_PATTERNS |= {"gpt-2": [GPT2], "llama-bpe": [LLAMA3], "llama3": [LLAMA3], "llama-v3": [LLAMA3], "tekken": [TEKKEN]}
# The first of these that the vocabulary has says the version of a conversation.
_VERSIONS = {"[MODEL_SETTINGS]": "v15", "[THINK]": "v13", "[ARGS]": "v11", "[SYSTEM_PROMPT]": "v7", "[INST]": "v3"}
_MARKS = ("[", "<SPECIAL_")  # how the names of Tekken's own control tokens begin
_FIRST_MARKS = ("<unk>", "<s>", "</s>", "<pad>")


def has_tokenizer(gguf: GGUF) -> bool:
    """Return whether a GGUF file holds a tokenizer, of whatever kind."""
    model = gguf.metadata.get("tokenizer.ggml.model")
    return model is not None and not (isinstance(model, str) and model == "none")


def opened(path: Path) -> GGUF:
    """Return the contents of a GGUF file; raise TokenizerError if it cannot be read."""
    try:
        return open_gguf(path)
    except CheckpointError as error:
        raise TokenizerError(str(error)) from None


def gguf_tokenizer(gguf: GGUF) -> Tokenizer:
    """Return the tokenizer in a GGUF file, with the chat template of the file.

    Raises UnknownTokenizerError if it is of another kind than SentencePiece or byte-level BPE, or if its pattern is not
    known; TokenizerError if the file has none, or if a field is missing or wrong.
    """
    file = _File(gguf)
    model, pre = (gguf.metadata.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if not has_tokenizer(gguf):
        raise TokenizerError(f"{gguf.path}: tokenizer.ggml.model is {short_repr(model)}; expected a tokenizer")
    if not isinstance(model, str) or model not in ("llama", "gpt2"):
        raise UnknownTokenizerError(f"{gguf.path}: tokenizer.ggml.model is {short_repr(model)}; expected llama or gpt2")
    if model == "gpt2" and (not isinstance(pre, str) or pre not in _PATTERNS):
        raise UnknownTokenizerError(
            f"{gguf.path}: tokenizer.ggml.pre is {short_repr(pre)}; expected one of {', '.join(_PATTERNS)}"
        )
    read = _sentencepiece if model == "llama" else _tekken if pre == "tekken" else _byte_bpe
    tokenizer: Tokenizer = read(file)
    tokenizer.chat_template = _chat_template(file)
    return tokenizer


class _File:
    """The fields of a file about its tokenizer. `origin` begins every message."""

    def __init__(self, gguf: GGUF) -> None:
        self.metadata, self.origin = gguf.metadata, str(gguf.path)

    def texts(self, name: str, most: int) -> list[str]:
        """Return a field that is an array of texts."""
        found = self.metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(found, Texts) or not 0 < len(found) <= most:
            what = f"{len(found)} texts" if isinstance(found, Texts) else short_repr(found)
            raise TokenizerError(f"{self.origin}: tokenizer.ggml.{name} is {what}; expected 1 to {most} texts")
        try:
            return [text.decode() for text in found]
        except UnicodeDecodeError as error:
            where = f"{self.origin}: tokenizer.ggml.{name}"
            raise TokenizerError(f"{where} has a text that is not UTF-8: {error.reason}") from None

    @cached_property
    def tokens(self) -> list[str]:
        """The pieces, each of them different."""
        tokens = self.texts("tokens", MAX_PIECES)
        if len(set(tokens)) < len(tokens):
            raise TokenizerError(f"{self.origin}: tokenizer.ggml.tokens has a token twice; expected different tokens")
        return tokens

    def numbers(self, name: str) -> list[Any]:
        """Return a field that is an array with a number for each token."""
        found = self.metadata.get(f"tokenizer.ggml.{name}")
        if not isinstance(found, np.ndarray) or len(found) != len(self.tokens):
            what = f"has {len(found)} numbers" if isinstance(found, np.ndarray) else f"is {short_repr(found)}"
            raise TokenizerError(
                f"{self.origin}: tokenizer.ggml.{name} {what}; expected a number for each of {len(self.tokens)} tokens"
            )
        return found.tolist()

    @cached_property
    def types(self) -> list[int]:
        """What each piece is."""
        types = self.numbers("token_type")
        wrong = [kind for kind in types if type(kind) is not int or not 0 <= kind <= _BYTE]
        if wrong:
            where = f"{self.origin}: tokenizer.ggml.token_type"
            raise TokenizerError(f"{where} has a type {wrong[0]}; expected whole numbers from 0 to {_BYTE}")
        return types

    def named(self, name: str) -> str | None:
        """Return the token that a field such as `bos_token_id` names by its id; None if it names none in use."""
        token_id = self.metadata.get(f"tokenizer.ggml.{name}")
        if token_id is None:
            return None
        if type(token_id) is not int or not 0 <= token_id < len(self.tokens):
            found, most = short_repr(token_id), len(self.tokens) - 1
            raise TokenizerError(f"{self.origin}: tokenizer.ggml.{name} is {found}; expected an id from 0 to {most}")
        return None if self.types[token_id] == _UNUSED else self.tokens[token_id]

    def flag(self, name: str, default: bool) -> bool:
        """Return a field that is true or false."""
        found = self.metadata.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(found, bool):
            raise TokenizerError(f"{self.origin}: tokenizer.ggml.{name} is {short_repr(found)}; expected true or false")
        return found

    def added(self, start: int = 0) -> Iterator[AddedToken]:
        """Yield the control tokens, as special ones, and the user-defined tokens, from id `start` on."""
        where = f"{self.origin}: tokenizer.ggml.tokens"
        for token_id in range(start, len(self.tokens)):
            if self.types[token_id] in (_CONTROL, _USER_DEFINED):
                special = self.types[token_id] == _CONTROL
                yield added_token(token_id, {"content": self.tokens[token_id], "special": special}, where)


def _sentencepiece(file: _File) -> SentencePieceTokenizer:
    """Return the tokenizer of a SentencePiece model that is rebuilt of its pieces.

    What stands behind the last piece of text was added by a fine-tune. In Mistral's own models control tokens stand
    before them.
    """
    kinds = (_NORMAL, _UNKNOWN, _BYTE)
    n_pieces = max((n for n, kind in enumerate(file.types, 1) if kind in kinds), default=0)
    scores = file.numbers("scores")
    pieces = b"".join(
        _message(1, _message(1, token.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(kind))
        for token, score, kind in zip(file.tokens[:n_pieces], scores, file.types, strict=False)
    )
    trainer = b"\x18\x02" + _message(46, b"<s>") + _message(47, b"</s>")  # the model is a BPE
    own, begins, ends = set(file.tokens[:n_pieces]), file.named("bos_token_id"), file.named("eos_token_id")
    if begins in own:
        trainer += _message(46, begins.encode())
    if ends in own:
        trainer += _message(47, ends.encode())
    if _BYTE in file.types:
        trainer += _varint(35 << 3) + b"\x01"  # characters that are no piece become bytes
    prefix = file.flag("add_space_prefix", True), file.flag("remove_extra_whitespaces", False)
    normalizer = _message(1, b"identity") + struct.pack("<6B", 3 << 3, prefix[0], 4 << 3, prefix[1], 5 << 3, 1)
    model = pieces + _message(2, trainer) + _message(3, normalizer)
    if len(model) > MAX_FILE_BYTES:
        raise TokenizerError(f"{file.origin}: its pieces have {len(model)} bytes; expected at most {MAX_FILE_BYTES}")
    config = TokenizerConfig(file.origin, tuple(file.added(n_pieces)), eos_token=ends)
    return SentencePieceTokenizer(model, file.origin, config)


def _message(number: int, content: bytes) -> bytes:
    """Return a field of a protobuf message that is a text, or a message itself."""
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(number: int) -> bytes:
    """Return a number of at least 0 in seven bits a byte, the lowest first; the last byte is below 128."""
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def _tekken(file: _File) -> ByteTokenizer:
    """Return Tekken: the order of the pieces is that of the merges, behind the control tokens."""
    n_controls = next((n for n, kind in enumerate(file.types) if kind == _NORMAL), len(file.types))
    first = {name: token_id for token_id, name in enumerate(file.tokens[:n_controls])}
    controls = {name: i for name, i in first.items() if name.startswith(_MARKS) or name in _FIRST_MARKS}
    ids: dict[bytes, int] = {}
    for token_id in range(n_controls, len(file.tokens)):
        if file.types[token_id] == _NORMAL:
            ids[_bytes_of(file.tokens[token_id], token_id, file.origin)] = token_id
    missing = [byte for byte in range(256) if bytes([byte]) not in ids]
    if missing:
        raise TokenizerError(f"{file.origin}: tokenizer.ggml.tokens has no token for byte {missing[0]}; expected all")
    named = {**first, **{file.tokens[i]: i for i in range(n_controls, len(file.tokens))}}
    begins, ends = file.named("bos_token_id"), file.named("eos_token_id")
    added = [token for token in file.added() if token.content not in controls]
    return ByteTokenizer(
        ByteBPE([TEKKEN], ids),
        kind="Tekken (GGUF)",
        origin=file.origin,
        controls=controls,
        bos_id=named[begins] if begins is not None and file.flag("add_bos_token", True) else None,
        eos_id=None if ends is None else named[ends],
        added=AddedTokens(added, file.origin),
        chat_format=next((version for name, version in _VERSIONS.items() if name in controls), None),
    )


def _bytes_of(token: str, token_id: int, origin: str) -> bytes:
    try:
        return bytes_of_letters(token)
    except KeyError:
        raise TokenizerError(
            f"{origin}: token {token_id} is {short_repr(token)}; expected letters that stand for bytes"
        ) from None


def _byte_bpe(file: _File) -> ByteTokenizer:
    """Return the tokenizer of a byte-level BPE with a list of merges."""
    patterns = _PATTERNS[file.metadata["tokenizer.ggml.pre"]]
    ids = {token: i for i, (token, kind) in enumerate(zip(file.tokens, file.types, strict=True)) if kind != _UNUSED}
    is_llama = patterns == [LLAMA3]
    split = [
        {"type": "Digits", "individual_digits": True}
        if pattern == DIGITS
        else {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in patterns
    ]
    letters = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    document = {
        "added_tokens": [
            {"id": token.id, "content": token.content, "special": token.special} for token in file.added()
        ],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, letters]},
        "decoder": letters,
        "model": {
            "type": "BPE",
            "vocab": ids,
            "merges": file.texts("merges", MAX_PIECES * 2),
            "ignore_merges": is_llama,
        },
    }
    config = TokenizerConfig(
        file.origin,
        bos_token=file.named("bos_token_id"),
        eos_token=file.named("eos_token_id"),
        add_bos_token=file.flag("add_bos_token", is_llama),
    )
    tokenizer = tokenizer_json(document, file.origin, config)
    tokenizer.kind = "byte-level BPE (GGUF)"
    return tokenizer


def _chat_template(file: _File) -> ChatTemplate | None:
    """Return the chat template of the file; None without one."""
    source, with_tools = (file.metadata.get(f"tokenizer.chat_template{end}", "") for end in ("", ".tool_use"))
    if not isinstance(source, str) or not isinstance(with_tools, str):
        raise TokenizerError(f"{file.origin}: tokenizer.chat_template is {short_repr(source)}; expected a text")
    fields = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    named = {f"{name}_token": file.named(f"{field}_token_id") for name, field in fields.items()}
    tokens = {name: content for name, content in named.items() if content is not None}
    return ChatTemplate(source, with_tools, tokens, file.origin) if source else None
