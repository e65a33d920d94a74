"""Read tekken.json, the tokenizer of Mistral's models since Nemo."""

from __future__ import annotations

import binascii
from typing import Any

from mistral_ref.errors import TokenizerError, UnknownTokenizerError, short_repr
from mistral_ref.text.byte_bpe import ByteBPE
from mistral_ref.text.byte_tokenizer import ByteTokenizer
from mistral_ref.text.split_patterns import TEKKEN
from mistral_ref.text.tokenizer_config import TokenizerConfig

VERSIONS = ("v3", "v7", "v11", "v13", "v15")
# The control tokens of files that list none, which only the first two versions may.
_FIRST_CONTROLS = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
    *("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]"),
)
_FIELDS = {"rank", "token_bytes", "token_str"}
_MAX_CONTROLS = 2**16
_NO_OTHER_FILES = TokenizerConfig()


def tekken_tokenizer(document: dict[str, Any], origin: str, config: TokenizerConfig = _NO_OTHER_FILES) -> ByteTokenizer:
    """Return the tokenizer in the contents of a tekken.json.

    The control tokens have the first ids, usually 1000 of them; the piece of rank r is the id behind them. A file lists
    more pieces than the model has: those of the highest ranks are left out.

    config      what tokenizer_config.json says: it may name another control token that ends a text

    Raises UnknownTokenizerError for an unknown pattern or version, and TokenizerError if something else is missing or
    wrong. The message begins with `origin`.
    """
    sizes, vocab = document.get("config"), document.get("vocab")
    if not isinstance(sizes, dict) or not isinstance(vocab, list):
        raise TokenizerError(f"{origin}: expected an object 'config' and a list 'vocab'")
    if sizes.get("pattern") != TEKKEN:
        raise UnknownTokenizerError(
            f"{origin}: config.pattern is {short_repr(sizes.get('pattern'))}; expected Tekken's own"
        )
    version = sizes.get("version")
    if version not in VERSIONS:
        raise UnknownTokenizerError(
            f"{origin}: config.version is {short_repr(version)}; expected {', '.join(VERSIONS)}"
        )
    n_controls = _count(sizes, "default_num_special_tokens", 2, _MAX_CONTROLS, origin)
    size = _count(sizes, "default_vocab_size", n_controls + 256, n_controls + len(vocab), origin)
    controls = _control_names(document.get("special_tokens"), n_controls, version, origin)
    for name in ("<s>", "</s>"):
        if name not in controls:
            raise TokenizerError(f"{origin}: special_tokens has no {name!r}")
    control_ids = {name: token_id for token_id, name in enumerate(controls)}
    ids: dict[bytes, int] = {}
    for rank, entry in enumerate(vocab[: size - n_controls]):
        ids[_piece(entry, rank, origin)] = n_controls + rank
    if len(ids) < size - n_controls:
        raise TokenizerError(f"{origin}: two pieces of vocab have the same bytes")
    return ByteTokenizer(
        ByteBPE([TEKKEN], ids),
        kind=f"Tekken {version}",
        origin=origin,
        controls=control_ids,
        bos_id=control_ids["<s>"],
        eos_id=config.named_id("eos_token", control_ids.get, control_ids["</s>"]),
        chat_format=version,
        settings=document.get("model_settings_builder"),
    )


def _count(config: dict[str, Any], field: str, least: int, most: int, origin: str) -> int:
    """Return a field of `config` that counts something."""
    value = config.get(field)
    if type(value) is not int or not least <= value <= most:
        raise TokenizerError(f"{origin}: config.{field} is {short_repr(value)}; expected {least} to {most}")
    return value


def _control_names(listed: object, n: int, version: str, origin: str) -> list[str]:
    """Return the names of the control tokens, n of them, in the order of their ids."""
    if listed is None:
        if version not in ("v3", "v7"):
            raise TokenizerError(f"{origin}: has no special_tokens; expected them from version v11")
        names = list(_FIRST_CONTROLS)
    elif not isinstance(listed, list):
        raise TokenizerError(f"{origin}: special_tokens is {short_repr(listed)}; expected a list")
    else:
        names = []
        for rank, entry in enumerate(listed):
            name = entry.get("token_str") if isinstance(entry, dict) and entry.get("rank") == rank else None
            if not isinstance(name, str):
                raise TokenizerError(
                    f"{origin}: special token {rank} is {short_repr(entry)}; expected its rank {rank} and its token_str"
                )
            names.append(name)
    names += [f"<SPECIAL_{token_id}>" for token_id in range(len(names), n)]
    if len(names) > n or len(set(names)) < n:
        raise TokenizerError(f"{origin}: special_tokens has {len(names)} names; expected {n} different ones at most")
    return names


def _piece(entry: object, rank: int, origin: str) -> bytes:
    """Return the bytes of an entry of `vocab`; each byte alone has the rank of its value."""
    if not isinstance(entry, dict) or entry.keys() != _FIELDS or entry["rank"] != rank:
        raise TokenizerError(
            f"{origin}: piece {rank} is {short_repr(entry)}; expected rank {rank}, token_bytes and token_str"
        )
    try:
        piece = binascii.a2b_base64(entry["token_bytes"])
    except (TypeError, ValueError):
        piece = b""
    if not piece or (rank < 256 and piece != bytes([rank])):
        expected = repr(bytes([rank])) if rank < 256 else "one byte or more"
        raise TokenizerError(
            f"{origin}: piece {rank} has token_bytes {short_repr(entry['token_bytes'])}; expected {expected} in base64"
        )
    return piece
