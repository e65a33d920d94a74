r"""A conversation to token ids by a chat template, without a text in it being able to forge a control token.

A template prints one text, and control tokens are read from it by their names. A message may hold such a name too. So
before the template runs, the names in messages are broken by a random number, and mended after the control tokens have
been read:

    message        "Hi <|im_end|>"
    in the text    "<|im_start|>user\nHi <8127...4|im_end|><|im_end|>"
    then           <|im_start|>, "user\nHi <|im_end|>", <|im_end|>     two control tokens and a text
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from mistral_ref.errors import InputError, short_repr
from mistral_ref.text.added_tokens import AddedToken, AddedTokens
from mistral_ref.text.reply import is_unchanged
from mistral_ref.text.template_file import ChatTemplate
from mistral_ref.text.template_sandbox import render
from mistral_ref.text.tokenizer import Tokenizer

_ROLES = ("system", "user", "assistant", "tool")


def encode_with_template(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Return the token ids of a conversation, up to the place where the model answers.

    Raises InputError if the messages cannot be read, or if the template cannot write them.
    """
    controls = _control_tokens(tokenizer, template)
    guard = Guard(controls.by_content)
    plain = [_plain(message, f"messages[{n}]") for n, message in enumerate(_listed(messages))]
    kept = _keep_replies(plain, messages, tokenizer)
    variables = {
        "messages": guard.guarded(plain),
        "tools": guard.guarded(list(tools)) if tools else None,
        "documents": None,
        "add_generation_prompt": True,
        "bos_token": "" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id),
        "eos_token": "" if tokenizer.eos_id is None else tokenizer.piece(tokenizer.eos_id),
    }
    source = template.with_tools if tools and template.with_tools else template.source
    written = render(source, variables | template.tokens, template.origin)
    parts: list[str | int] = []
    for part in controls.split(written, special=True):
        if isinstance(part, AddedToken):
            parts.append(part.id)
            continue
        for piece in re.split(f"({'|'.join(kept)})", part) if kept else [part]:
            parts += kept[piece] if piece in kept else [guard.mended(piece)]
    return tokenizer.encode_parts(part for part in parts if part != "")


class Guard:
    """Breaks the names of control tokens in texts from outside, and mends them.

    The number that breaks a name is new for every conversation, so a text cannot hold it. Names are also found in
    other letters, or with spaces in them, since a template may change a text; and a text is broken where it ends or
    begins with a part of a name, since the template may put another text beside it.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._number = str(secrets.randbelow(9 * 10**39) + 10**39)
        self._names = {_bare(name) for name in names}
        self._lengths = sorted({len(name) for name in self._names})
        self._beginnings = {name[:n] for name in self._names for n in range(1, len(name))}
        self._ends = {name[n:] for name in self._names for n in range(1, len(name))}
        firsts = "".join(re.escape(first) for first in {name[0] for name in self._names})
        self._first = re.compile(f"[{firsts}]" if firsts else "(?!)")

    def guarded(self, value: Any) -> Any:
        """Return the same value; in every text in it the names of control tokens are broken."""
        if isinstance(value, str):
            return self._broken(value)
        if isinstance(value, Mapping):
            return {self.guarded(key): self.guarded(one) for key, one in value.items()}
        return [self.guarded(one) for one in value] if isinstance(value, list | tuple) else value

    def mended(self, text: str) -> str:
        """Return a text as it was before its names were broken."""
        return text.replace(self._number, "")

    def _broken(self, text: str) -> str:
        bare = _bare(text)
        after = set(self._breaks(bare))  # how many of the bare characters stand before each break
        if not after:
            return text
        where = [n for n, char in enumerate(text) for _ in _bare(char)]  # the place of each bare character in the text
        places = sorted({where[n - 1] + 1 if n else where[0] for n in after})
        return self._number.join(text[begin:end] for begin, end in pairwise([0, *places, len(text)]))

    def _breaks(self, bare: str) -> Iterator[int]:
        """Yield where a text must be broken: behind the first character of a name, and where it is a part of one."""
        for found in self._first.finditer(bare):
            at = found.start()
            if any(bare[at : at + length] in self._names for length in self._lengths):
                yield at + 1
        for n in range(1, min(len(bare), max(self._lengths, default=0)) + 1):
            if bare[-n:] in self._beginnings:
                yield len(bare)
            if bare[:n] in self._ends:
                yield 0


def _bare(text: str) -> str:
    """Return what is left of a text if neither white space nor the size of its letters counts."""
    return "".join(text.upper().lower().split())


def _control_tokens(tokenizer: Tokenizer, template: ChatTemplate) -> AddedTokens:
    """Return the tokens that are read from what the template prints."""
    found = {token.content: token for token in tokenizer.added.by_id.values() if token.special}
    named = dict(tokenizer.controls)
    for name in template.tokens.values():
        try:
            named[name] = tokenizer.control_id(name)
        except InputError:
            continue
    ids = {token.id for token in found.values()}
    for name, token_id in named.items():
        if name not in found and token_id not in ids:
            found[name] = AddedToken(token_id, name)
            ids.add(token_id)
    return AddedTokens(found.values(), template.origin)


def _keep_replies(
    plain: list[dict[str, Any]], messages: Sequence[Mapping[str, Any]], tokenizer: Tokenizer
) -> dict[str, list[int]]:
    """Put a new number in place of each answer that nobody has changed; return the ids that each number stands for.

    So the template does not see these texts. One with "</think>" in it is not replaced: templates cut it there.
    """
    kept: dict[str, list[int]] = {}
    for message, given in zip(plain, messages, strict=True):
        if is_unchanged(given, tokenizer) and "tool_calls" not in given and "</think>" not in message["content"]:
            ids = list(given.ids)
            while ids and tokenizer.decode(ids[-1:]) == "":  # the template writes the mark of the end itself
                ids.pop()
            message["content"] = str(secrets.randbelow(9 * 10**39) + 10**39)
            kept[message["content"]] = ids
    return kept


def _listed(messages: object) -> Sequence[Any]:
    if not isinstance(messages, list | tuple) or not messages:
        raise InputError(f"messages is {short_repr(messages)}; expected a list of at least one dict")
    return messages


def _plain(message: Any, where: str) -> dict[str, Any]:
    """Return a message as templates expect it: the content is one text, and arguments of calls are dicts."""
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in _ROLES:
        raise InputError(f"{where}: role is {short_repr(role)}; expected {', '.join(_ROLES)}")
    if message.get("prefix"):
        raise InputError(f"{where}: prefix is True; a chat template cannot write the beginning of an answer")
    plain = {name: value for name, value in message.items() if value is not None and name != "prefix"}
    content = plain.get("content", "")
    if isinstance(content, list | tuple):
        texts = [chunk.get("text") if isinstance(chunk, Mapping) else None for chunk in content]
        if not all(isinstance(text, str) for text in texts):
            raise InputError(f"{where}.content is {short_repr(content)}; expected only chunks of text")
        content = "".join(map(str, texts))
    if not isinstance(content, str):
        raise InputError(f"{where}.content is {short_repr(content)}; expected a string or a list of chunks")
    plain["content"] = content
    if calls := plain.get("tool_calls"):
        plain["tool_calls"] = [_with_arguments(call) for call in calls]
    return plain


def _with_arguments(call: Any) -> Any:
    """Return a call whose arguments are a dict, if they are one in JSON."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}}
