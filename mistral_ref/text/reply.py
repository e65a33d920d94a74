"""What a model's answer says: its text, its thinking, and the tools that it calls. It is read from ids."""

from __future__ import annotations

import hashlib
import json
import re
import string
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, TypeGuard

from mistral_ref.errors import InputError, checked_int, short_repr
from mistral_ref.text.tokenizer import Tokenizer

Kind = Literal["text", "thinking", "tool_call"]
_KINDS: dict[str, Kind] = {"": "text", "[THINK]": "thinking", "[TOOL_CALLS]": "tool_call"}
_MARKS = ("[THINK]", "[/THINK]", "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]")
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_ALPHANUMERIC = string.ascii_letters + string.digits


class Reply(dict[str, Any]):
    """A message of the assistant, with the ids of which it was read.

    `encode_chat` takes the ids, as long as nobody has changed the message: another row of ids may have the same text.

    ids     the ids that the model generated
    """

    def __init__(self, fields: dict[str, Any], ids: Iterable[int]) -> None:
        super().__init__(fields)
        self.ids = tuple(ids)


class ReplyReader:
    """Read an answer id by id.

    sections    the mark that begins each part of the answer, and the ids of the part. The marks are "" (text),
                "[THINK]", "[TOOL_CALLS]", "[CALL_ID]" and "[ARGS]"
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._marks = dict(_ids_of_marks(tokenizer))
        self.sections: list[tuple[str, list[int]]] = [("", [])]
        self._kind: Kind = "text"

    def push(self, token_id: int) -> Kind:
        """Return what this id belongs to. A mark belongs to the part that it begins or ends."""
        mark = self._marks.get(token_id)
        if mark is None:
            self.sections[-1][1].append(token_id)
        elif mark == "[/THINK]":
            self.sections.append(("", []))
            self._kind = "text"
            return "thinking"
        elif mark in _KINDS:
            self.sections.append((mark, []))
            self._kind = _KINDS[mark]
        elif self._kind == "tool_call":
            self.sections.append((mark, []))
        return self._kind

    @property
    def calls_tools(self) -> bool:
        """Whether the answer calls tools."""
        return any(mark == "[TOOL_CALLS]" for mark, _ in self.sections)


def _ids_of_marks(tokenizer: Tokenizer) -> Iterator[tuple[int, str]]:
    for mark in _MARKS:
        try:
            yield tokenizer.control_id(mark), mark
        except InputError:
            continue


def parse_reply(ids: Iterable[int], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the message that these ids are, to be appended to the conversation. They are all ids of one answer.

    role        "assistant"
    content     the text; a list of chunks if the answer holds thinking; None if it only calls tools
    tool_calls  only if tools are called: dicts {"id", "type", "function": {"name", "arguments"}}, the arguments as a
                string of JSON. A call without an id gets one that is made of the ids

    What cannot be read as a call is text. Ids without a piece are passed over. Raises InputError for what are no ids.
    """
    if tokenizer is None:
        raise InputError("there is no tokenizer; ids without one say nothing")
    if not isinstance(ids, Iterable):
        raise InputError(f"ids are {short_repr(ids)}; expected a list of token ids")
    ids = [checked_int("ids", token_id, least=0) for token_id in ids]
    reader = ReplyReader(tokenizer)
    for token_id in ids:
        if token_id < tokenizer.vocab_size:
            reader.push(token_id)
    chunks: list[dict[str, Any]] = []
    calls: list[dict[str, Any]] = []
    for parts in _grouped(reader.sections, tokenizer):
        mark, text = parts[0]
        if mark == "[THINK]":
            chunks.append({"type": "thinking", "thinking": text, "closed": len(parts) > 1})
        elif mark == "[TOOL_CALLS]" and (called := _read_calls(parts)):
            calls += called
        elif text:
            chunks.append({"type": "text", "text": text})
    for n, call in enumerate(calls):
        call["id"] = call["id"] or _made_id([*ids, n])
    fields: dict[str, Any] = {"role": "assistant", "content": _content(chunks, calls)}
    return Reply(fields | ({"tool_calls": calls} if calls else {}), ids)


def is_unchanged(message: object, tokenizer: Tokenizer) -> TypeGuard[Reply]:
    """Return whether a message is a reply that still says what its ids say."""
    return isinstance(message, Reply) and message == parse_reply(message.ids, tokenizer)


def _content(chunks: list[dict[str, Any]], calls: list[dict[str, Any]]) -> str | list[dict[str, Any]] | None:
    """Return the content of a message: chunks only if one of them is thinking."""
    if any(chunk["type"] == "thinking" for chunk in chunks):
        return chunks
    return "".join(chunk["text"] for chunk in chunks) if chunks or not calls else None


def _grouped(sections: list[tuple[str, list[int]]], tokenizer: Tokenizer) -> Iterator[list[tuple[str, str]]]:
    """Yield the marks and texts that belong together: a call with its id and arguments; thinking, and its end."""
    group: list[tuple[str, str]] = []
    for n, (mark, ids) in enumerate(sections):
        part = mark, tokenizer.decode(ids)
        if mark not in ("[CALL_ID]", "[ARGS]"):
            if group:
                yield group
            group = []
        group.append(part)
        if mark == "[THINK]" and n + 1 < len(sections):
            group.append(("[/THINK]", ""))
    yield group


def _read_calls(parts: list[tuple[str, str]]) -> list[dict[str, Any]]:
    """Return the calls behind one mark; an empty list if they cannot be read."""
    named = dict(reversed(parts))
    if "[ARGS]" in named:
        found = [(named["[TOOL_CALLS]"], named["[ARGS]"] or "{}", named.get("[CALL_ID]"))]
    else:
        try:
            listed = json.loads(named["[TOOL_CALLS]"])
            found = [(one["name"], json.dumps(one["arguments"], ensure_ascii=False), one.get("id")) for one in listed]
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            return []
    if not all(isinstance(name, str) and _NAME.fullmatch(name) for name, _, _ in found):
        return []
    return [
        {"id": call_id, "type": "function", "function": {"name": name, "arguments": arguments}}
        for name, arguments, call_id in found
    ]


def _made_id(numbers: Sequence[int]) -> str:
    """Return nine letters and digits that these numbers determine."""
    digest = hashlib.sha256(",".join(map(str, numbers)).encode()).digest()
    return "".join(_ALPHANUMERIC[byte % len(_ALPHANUMERIC)] for byte in digest[:9])
