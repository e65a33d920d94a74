"""The messages of a conversation: read from dicts, checked by the rules of a chat format, and merged.

A message is a dict as in Mistral's and OpenAI's APIs. What Mistral's own library refuses raises an InputError here too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from mistral_ref.errors import InputError, short_repr
from mistral_ref.text.chat_format import ChatFormat

_FUNCTION_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_NINE = re.compile(r"[a-zA-Z0-9]{9}")
_FIELDS = {
    "system": {"content"},
    "user": {"content"},
    "assistant": {"content", "tool_calls", "prefix"},
    "tool": {"content", "tool_call_id", "name"},
}
_MAY_FOLLOW = {  # the roles that may follow a role
    "system": {"user", "assistant", "system"},
    "user": {"assistant", "system", "user"},
    "assistant": {"assistant", "user", "tool"},
    "tool": {"assistant", "tool", "user"},
}


@dataclass(frozen=True)
class Thinking:
    """A part of a message that is thinking. `closed` says whether it has ended."""

    text: str
    closed: bool = True


@dataclass(frozen=True)
class Call:
    """One call of a tool: its name, its arguments as a JSON value, and its id; "null" if it has none."""

    name: str
    arguments: Any
    id: str = "null"


@dataclass(frozen=True)
class Message:
    """One message, or several that are merged into one.

    role        "system", "user", "assistant" or "tool"
    parts       texts and thinking. Two texts that stand beside each other have not been joined yet
    calls       what an assistant calls
    prefix      whether an assistant's message is the beginning of the answer
    call_id     the id of the call that a tool answers
    name        the name of the tool
    ids         the token ids of a reply that is kept as it was generated; None: the message is encoded
    """

    role: str
    parts: tuple[str | Thinking, ...] = ()
    calls: tuple[Call, ...] = ()
    prefix: bool = False
    call_id: str | None = None
    name: str | None = None
    ids: tuple[int, ...] | None = field(default=None, compare=False)

    @property
    def text(self) -> str:
        """All its text; a message of a user or a tool holds nothing else."""
        return "".join(part for part in self.parts if isinstance(part, str))


def json_text(value: Any, where: str) -> str:
    """Return a value as JSON in the form in which models have seen it; raise InputError if it has none."""
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where} cannot be written as JSON: {error}") from None


def json_or_text(text: str, where: str) -> Any:
    """Return the value of a JSON text; the text itself if it is not JSON, and {} if it is empty."""
    try:
        return json.loads(text) if text else {}
    except json.JSONDecodeError:
        return text
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or nesting too deep to read
        raise InputError(f"{where} is JSON that cannot be read: {error}") from None


# --- from dicts -------------------------------------------------------------------------------------------------------


def read_messages(messages: Sequence[Mapping[str, Any]], form: ChatFormat) -> list[Message]:
    """Return the messages in these dicts; raise InputError for what the format does not allow.

    The message of an error begins with the index of the dict, for example "messages[2]".
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InputError(f"messages is {short_repr(messages)}; expected a list of dicts")
    if not messages:
        raise InputError("messages is empty; expected at least one message")
    read = [_read_message(message, form, f"messages[{n}]") for n, message in enumerate(messages)]
    _check_order(read)
    _check_pairs(read[1:], form)  # Mistral's library does not look at what the first message calls
    return read


def known_fields(value: Any, known: Iterable[str], where: str) -> dict[str, Any]:
    """Return the fields of a dict that are not None; raise InputError unless all of them are known."""
    if not isinstance(value, Mapping):
        raise InputError(f"{where} is {short_repr(value)}; expected a dict")
    fields = {name: one for name, one in value.items() if one is not None}
    if unknown := [name for name, one in fields.items() if name not in known and one not in ([], {})]:
        raise InputError(f"{where} has the field {short_repr(unknown[0])}; expected only {', '.join(sorted(known))}")
    return fields


def function_name(value: object, where: str) -> str:
    """Return the name of a function; raise InputError if it cannot be one."""
    if not isinstance(value, str) or not _FUNCTION_NAME.fullmatch(value):
        raise InputError(f"{where} is {short_repr(value)}; expected 1 to 64 letters, digits, '_' and '-'")
    return value


def _read_message(message: Mapping[str, Any], form: ChatFormat, where: str) -> Message:
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or role not in _FIELDS:
        raise InputError(f"{where}: role is {short_repr(role)}; expected {', '.join(_FIELDS)}")
    fields = known_fields(message, {"role", *_FIELDS[role]}, where)
    if role != "assistant" and "content" not in fields:
        raise InputError(f"{where}: a {role} message has no content; expected a string or a list of chunks")
    thinks = role in form.thinking
    parts = _read_content(fields.get("content", ""), thinks, f"{where}.content")
    if role == "tool":
        if form.tools is None:
            raise InputError(f"{where}: is a tool message; this chat format has no tools")
        name = fields.get("name")
        name = None if name is None else function_name(name, f"{where}.name")
        return Message(
            role, parts, call_id=_read_id(fields.get("tool_call_id"), form, f"{where}.tool_call_id"), name=name
        )
    if role != "assistant":
        return Message(role, parts)
    calls = _read_calls(fields.get("tool_calls", []), form, f"{where}.tool_calls")
    prefix = fields.get("prefix", False)
    if not isinstance(prefix, bool):
        raise InputError(f"{where}.prefix is {short_repr(prefix)}; expected True or False")
    if not form.content_with_calls and bool(parts) == bool(calls):
        found = "both a content and tool_calls" if parts else "neither a content nor tool_calls"
        raise InputError(f"{where}: an assistant message has {found}; this chat format expects one of them")
    return Message(role, parts, calls, prefix)


def _read_content(content: object, thinks: bool, where: str) -> tuple[str | Thinking, ...]:
    if isinstance(content, str):
        return (content,) if content else ()
    if not isinstance(content, list | tuple):
        raise InputError(f"{where} is {short_repr(content)}; expected a string or a list of chunks")
    return tuple(_read_chunk(chunk, thinks, f"{where}[{n}]") for n, chunk in enumerate(content))


def _read_chunk(chunk: Any, thinks: bool, where: str) -> str | Thinking:
    kind: Any = chunk.get("type") if isinstance(chunk, Mapping) else None
    kinds = ("text", "thinking") if thinks else ("text",)
    if kind not in kinds:
        expected = " or ".join(kinds)
        raise InputError(f"{where}: the type of a chunk is {short_repr(kind)}; expected {expected} here")
    fields = known_fields(chunk, {"type", kind, *(("closed",) if kind == "thinking" else ())}, where)
    text, closed = fields.get(kind), fields.get("closed", True)
    if not isinstance(text, str):
        raise InputError(f"{where}.{kind} is {short_repr(text)}; expected a string")
    if not isinstance(closed, bool):
        raise InputError(f"{where}.closed is {short_repr(closed)}; expected True or False")
    return Thinking(text, closed) if kind == "thinking" else text


def _read_calls(calls: object, form: ChatFormat, where: str) -> tuple[Call, ...]:
    if not isinstance(calls, list | tuple):
        raise InputError(f"{where} is {short_repr(calls)}; expected a list")
    if calls and form.tools is None:
        raise InputError(f"{where}: this chat format has no tools")
    return tuple(_read_call(call, form, f"{where}[{n}]") for n, call in enumerate(calls))


def _read_call(call: Any, form: ChatFormat, where: str) -> Call:
    fields = known_fields(call, {"id", "type", "function"}, where)
    if fields.get("type", "function") != "function":
        raise InputError(f"{where}.type is {short_repr(fields['type'])}; expected 'function'")
    function = known_fields(fields.get("function"), {"name", "arguments"}, f"{where}.function")
    name = function_name(function.get("name"), f"{where}.function.name")
    at = f"{where}.function.arguments"
    arguments = function.get("arguments", {})
    if isinstance(arguments, Mapping):
        arguments = json_text(dict(arguments), at)
    if not isinstance(arguments, str):
        raise InputError(f"{at} is {short_repr(arguments)}; expected a dict, or a string of JSON")
    call_id = _read_id(fields.get("id", "null"), form, f"{where}.id")
    return Call(name, json_or_text(arguments, at), "null" if call_id is None else call_id)


def _read_id(call_id: object, form: ChatFormat, where: str) -> str | None:
    if not isinstance(call_id, str | None):
        raise InputError(f"{where} is {short_repr(call_id)}; expected a string")
    if form.call_ids == "nine" and not _NINE.fullmatch(call_id or ""):
        raise InputError(f"{where} is {short_repr(call_id)}; expected nine letters and digits")
    if form.call_ids == "any" and call_id in (None, "", "null"):
        raise InputError(f"{where} is {short_repr(call_id)}; expected the id of a call")
    return call_id


# --- the order of messages --------------------------------------------------------------------------------------------


def _check_order(messages: Sequence[Message]) -> None:
    """Raise InputError unless roles follow each other as they may, and the last message can be answered."""
    last = messages[-1]
    if len(messages) == 1 and last.role not in ("user", "system"):
        raise InputError(f"messages[0] is of role {last.role}, and the only one; expected a user or system message")
    for n, (before, message) in enumerate(pairwise(messages), 1):
        if message.role not in _MAY_FOLLOW[before.role]:
            expected = ", ".join(sorted(_MAY_FOLLOW[before.role]))
            raise InputError(f"messages[{n}] is of role {message.role}, after {before.role}; expected {expected}")
        if before.prefix:
            raise InputError(f"messages[{n - 1}]: prefix is True; expected it only in the last message")
    if last.role == "assistant" and not last.prefix:
        raise InputError("the last message is the assistant's; expected a user's or a tool's, or one with prefix=True")


def _check_pairs(messages: Iterable[Message], form: ChatFormat) -> None:
    """Raise InputError unless the calls of an assistant are answered before its next message."""
    called: list[str] = []
    answered: list[str] = []
    for n, message in enumerate(messages, 1):
        where = f"messages[{n}]"
        if message.role == "tool":
            call_id = message.call_id or "null"
            if form.by_id and (call_id in answered or call_id not in called):
                expected = ", ".join(one for one in called if one not in answered) or "no result"
                raise InputError(f"{where} answers the call {short_repr(call_id)}; expected {expected}")
            answered.append(call_id)
        elif message.role == "assistant":
            if len(called) != len(answered):
                raise InputError(f"{where} follows {len(called)} calls and {len(answered)} results; expected as many")
            called, answered = [call.id for call in message.calls], []
            if form.by_id and len(set(called)) < len(called):
                raise InputError(f"{where}.tool_calls has the ids {', '.join(called)}; expected different ones")


# --- merging ----------------------------------------------------------------------------------------------------------


def merged(messages: Sequence[Message], form: ChatFormat) -> tuple[str, list[Message]]:
    r"""Return the system prompt, and the messages as turns: neighbours of one role are one message.

    The system prompt is empty in formats in which system messages are turns. Neighbours are joined with "\n\n". Results
    of tools are not merged, and system messages are not.
    """
    system, turns, run = "", list[Message](), list[Message]()
    if form.system != "turn":
        prompts = [one for one in messages if one.role == "system" and one.parts]
        system = "\n\n".join(Message("system", _joined([one], form)).text for one in prompts)
    for message in messages:
        if run and run[-1].role != message.role:
            turns += _merged_run(run, turns, form)
            run = []
        run.append(message)
    turns += _merged_run(run, turns, form)
    if form.system != "turn" and (not turns or turns[0].role != "user"):
        turns.insert(0, Message("user"))
    return system, turns


def _merged_run(run: Sequence[Message], turns: Sequence[Message], form: ChatFormat) -> list[Message]:
    """Return the turns of messages of one role that follow each other, behind `turns`."""
    role = run[0].role
    if role == "system" and form.system != "turn":
        return []
    if role in ("system", "tool"):
        joined = [Message(role, _joined([one], form), call_id=one.call_id, name=one.name) for one in run]
        if role == "tool" and form.by_id:
            order = [call.id for turn in turns[-1:] for call in turn.calls]
            joined.sort(key=lambda one: order.index(one.call_id) if one.call_id in order else len(order))
        return joined
    calls = tuple(call for one in run for call in one.calls)
    ids = run[0].ids if len(run) == 1 else None
    return [Message(role, _joined(run, form), calls, run[-1].prefix, ids=ids)]


def _joined(messages: Iterable[Message], form: ChatFormat) -> tuple[str | Thinking, ...]:
    """Return the parts of these messages. Texts that follow each other are one, and none is empty."""
    parts: list[str | Thinking] = []
    for message in messages:
        join = "\n\n"
        for part in message.parts:
            if part == "":
                continue
            if isinstance(part, str) and parts and isinstance(parts[-1], str):
                parts[-1] += join + part
            else:
                parts.append(part)
            join = form.text_join
    return tuple(parts)
