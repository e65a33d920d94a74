"""A conversation to token ids, in each of Mistral's chat formats, and a text with a gap to fill.

A conversation is a row of marks, which are control tokens such as [INST], and texts. Each text is encoded apart from
the others, and a text is always text. So no message can forge a mark, whatever is written in it.

The ids are those of Mistral's own library. `chat_format.py` has the table of what differs between the formats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mistral_ref.errors import InputError, checked_choice, short_repr, warn
from mistral_ref.text.chat_format import CHAT_FORMATS, ChatFormat
from mistral_ref.text.messages import (
    Call,
    Message,
    Thinking,
    function_name,
    json_or_text,
    json_text,
    known_fields,
    merged,
    read_messages,
)
from mistral_ref.text.reply import is_unchanged
from mistral_ref.text.template import encode_with_template
from mistral_ref.text.tokenizer import Tokenizer
from mistral_ref.text.tool_schema import check_schema

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


class Mark(str):
    """The name of a control token, as one part of a conversation."""

    __slots__ = ()


BEGIN, END = Mark("<s>"), Mark("</s>")
Part = Mark | str | int  # a control token, a text, or an id that is kept as it is


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    reasoning_effort: str | None = None,
    chat_format: str | None = None,
) -> list[int]:
    """Return the token ids of a conversation, up to the place where the model answers.

    messages          dicts as in Mistral's and OpenAI's APIs: `role`, `content`, `tool_calls`, `tool_call_id`, `name`,
                      `prefix`. A message of `parse_reply` keeps the ids that the model generated
    tools             the functions that the model may call: dicts {"type": "function", "function": {...}}
    reasoning_effort  how much the model thinks ("none", "high", ...); only models of format "v15" are told. None: the
                      default of the tokenizer's file
    chat_format       "v1", "v2", "v3", "v7", "v11", "v13" or "v15"; "template": as the chat template beside the
                      tokenizer writes it. None: as the files say. A template counts if it writes no format of Mistral's

    Raises InputError for what Mistral's library refuses too; the message names the message and the field. Warns if the
    conversation has no place for the tools.
    """
    if tokenizer is None:
        raise InputError("there is no tokenizer; a conversation cannot be encoded")
    template = tokenizer.chat_template
    if template is not None and _is_by_template(tokenizer, chat_format):
        if reasoning_effort is not None:
            raise InputError(f"reasoning_effort is {short_repr(reasoning_effort)}; a chat template has no such setting")
        return encode_with_template(messages, tokenizer, template, tools)
    form = find_format(tokenizer, chat_format)
    read = read_messages(messages, form)
    kept = [_with_ids(one, message, tokenizer) for one, message in zip(read, messages, strict=True)]
    settings = _read_settings(reasoning_effort, tokenizer, form)
    parts = _conversation(kept, form, read_tools(tools), settings)
    return _ids_of(parts, tokenizer)


def can_chat(tokenizer: Tokenizer) -> bool:
    """Return whether the tokenizer's files say how its model talks."""
    return tokenizer.chat_format is not None or tokenizer.chat_template is not None


def _is_by_template(tokenizer: Tokenizer, chat_format: str | None) -> bool:
    """Return whether a conversation is written by the tokenizer's chat template, and not in a format of Mistral's."""
    if chat_format is not None:
        return chat_format == "template"
    template = tokenizer.chat_template
    return template is not None and not (tokenizer.chat_format is not None and template.is_mistrals)


def encode_fim(prompt: str, suffix: str | None, tokenizer: Tokenizer, *, chat_format: str | None = None) -> list[int]:
    """Return the token ids of a text with a gap; the model then writes what stands between `prompt` and `suffix`.

    Formats "v1" and "v2" have no control tokens for this. Raises InputError for them, and for what is not a text.
    """
    form = find_format(tokenizer, chat_format)
    if form in (CHAT_FORMATS["v1"], CHAT_FORMATS["v2"]):
        raise InputError("this chat format has no control tokens for a gap in a text; expected v3 or later")
    for name, text in (("prompt", prompt), ("suffix", suffix or "")):
        if not isinstance(text, str):
            raise InputError(f"{name} is {short_repr(text)}; expected a string")
    # Behind "☺", which is two ids, SentencePiece puts no space before the text.
    behind = tokenizer.encode("☺" + suffix, bos=False)[2:] if suffix else []
    return _ids_of([BEGIN, Mark("[SUFFIX]"), *behind, Mark("[PREFIX]"), prompt], tokenizer)


def find_format(tokenizer: Tokenizer, chat_format: str | None) -> ChatFormat:
    """Return the format with this name, or else the tokenizer's own. Raises InputError if there is none."""
    name = tokenizer.chat_format if chat_format is None else chat_format
    if name is None:
        raise InputError(
            "the tokenizer does not say how its model talks: it has no control tokens of Mistral's, and no chat "
            f"template; expected chat_format, one of {', '.join(CHAT_FORMATS)}"
        )
    return CHAT_FORMATS[checked_choice("chat_format", name, CHAT_FORMATS)]


def _ids_of(parts: Iterator[Part] | Sequence[Part], tokenizer: Tokenizer) -> list[int]:
    ids: list[int] = []
    for part in parts:
        if isinstance(part, int):
            ids.append(part)
        elif isinstance(part, Mark):
            ids.append(tokenizer.control_id(part))
        else:
            ids += tokenizer.encode(part, bos=False)
    return ids


# --- the conversation -------------------------------------------------------------------------------------------------


def _conversation(
    messages: Sequence[Message], form: ChatFormat, tools: list[dict[str, Any]], settings: dict[str, str]
) -> Iterator[Part]:
    """Yield the marks and texts of a conversation."""
    system, turns = merged(messages, form)
    users = [n for n, turn in enumerate(turns) if turn.role == "user"]
    place = {"first user": users[:1], "last user": users[-1:], "turn": [], None: []}
    if tools and not place[form.tools]:
        warn("the tools are not part of this conversation: its chat format has none, or it has no user message")
    yield BEGIN
    for n, turn in enumerate(turns):
        is_past = bool(users) and n < users[-1]
        if turn.role == "user":
            if n in place[form.tools]:
                yield from _tools_and_settings(tools, settings)
            yield from _user_turn(turn.text, system if n in place[form.system] else "", form)
        elif turn.role == "system":
            yield from (Mark("[SYSTEM_PROMPT]"), *_content(turn.parts), Mark("[/SYSTEM_PROMPT]"))
        elif turn.role == "assistant":
            yield from _assistant_turn(turn, form, is_past=is_past)
        elif not (form.forgets and is_past):
            yield from (Mark("[TOOL_RESULTS]"), *_result(turn, form), Mark("[/TOOL_RESULTS]"))
    if form.results == "list":
        _check_one_result(turns[users[-1] :])


def _tools_and_settings(tools: list[dict[str, Any]], settings: dict[str, str]) -> Iterator[Part]:
    if tools:
        yield from (Mark("[AVAILABLE_TOOLS]"), json_text(tools, "tools"), Mark("[/AVAILABLE_TOOLS]"))
    if settings:
        yield from (Mark("[MODEL_SETTINGS]"), json_text(settings, "settings"), Mark("[/MODEL_SETTINGS]"))


def _user_turn(text: str, system: str, form: ChatFormat) -> Iterator[Part]:
    text = f"{system}\n\n{text}" if system else text
    yield from [f"[INST] {text} [/INST]"] if form.inst == "text" else [Mark("[INST]"), text, Mark("[/INST]")]


def _content(parts: Sequence[str | Thinking]) -> Iterator[Part]:
    for part in parts:
        if isinstance(part, str):
            yield part
        else:
            yield from (Mark("[THINK]"), part.text, *([Mark("[/THINK]")] if part.closed else []))


def _assistant_turn(turn: Message, form: ChatFormat, *, is_past: bool) -> Iterator[Part]:
    if not turn.parts and not turn.calls:
        raise InputError("an assistant message is empty; expected a content or tool_calls")
    if turn.parts and turn.calls and not form.content_with_calls:
        raise InputError(
            "assistant messages that follow each other have a content and tool_calls; expected one of them"
        )
    if turn.calls and form.forgets and is_past:
        return
    if turn.ids is not None:
        yield from turn.ids
        return
    if all(isinstance(part, str) for part in turn.parts):
        # The format of the first models keeps the spaces at the end. Between thinking all formats do.
        yield turn.text if form.inst == "text" else turn.text.rstrip(" ")
    else:
        yield from _content(turn.parts)
    yield from _calls(turn.calls, form)
    if not turn.prefix:
        yield END


def _calls(calls: Sequence[Call], form: ChatFormat) -> Iterator[Part]:
    if form.calls in ("names", "names and ids") and calls:
        listed = [{"name": call.name, "arguments": call.arguments} for call in calls]
        if form.calls == "names and ids":
            listed = [one | {"id": call.id} for one, call in zip(listed, calls, strict=True)]
        yield from (Mark("[TOOL_CALLS]"), json_text(listed, "tool_calls"))
        return
    for call in calls:
        yield from (Mark("[TOOL_CALLS]"), call.name)
        if form.calls == "apart":
            yield from (Mark("[CALL_ID]"), call.id)
        yield from (Mark("[ARGS]"), json_text(call.arguments, "tool_calls"))


def _result(turn: Message, form: ChatFormat) -> Iterator[Part]:
    if form.results == "list":
        content = json_or_text(turn.text, "the content of a tool message")
        yield json_text([{"name": turn.name, "content": content}], "a tool message")
    elif form.results == "object":
        content = json_or_text(turn.text, "the content of a tool message")
        yield json_text({"content": content, "call_id": turn.call_id}, "a tool message")
    elif form.results == "id and text":
        yield from (turn.call_id or "", Mark("[TOOL_CONTENT]"), turn.text)
    else:
        yield turn.text


def _check_one_result(turns: Sequence[Message]) -> None:
    """Raise InputError if calls of one assistant message have several results, which "v2" cannot write."""
    roles = [turn.role if turn.role != "assistant" or turn.calls else "" for turn in turns]
    if any(roles[n : n + 3] == ["assistant", "tool", "tool"] for n in range(len(roles))):
        raise InputError("one assistant message has several tool results; chat format v2 expects one")


# --- tools, settings, and replies that are kept -----------------------------------------------------------------------


def read_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[dict[str, Any]]:
    """Return the tools in the form in which models have seen them; raise InputError for what is no tool."""
    if not isinstance(tools, list | tuple | None):
        raise InputError(f"tools is {short_repr(tools)}; expected a list of dicts")
    read = []
    for n, tool in enumerate(tools or ()):
        fields = known_fields(tool, {"type", "function"}, f"tools[{n}]")
        if fields.get("type", "function") != "function":
            raise InputError(f"tools[{n}].type is {short_repr(fields['type'])}; expected 'function'")
        where = f"tools[{n}].function"
        function = known_fields(fields.get("function"), {"name", "description", "parameters", "strict"}, where)
        name = function_name(function.get("name"), f"{where}.name")
        description, parameters = function.get("description", ""), function.get("parameters", {})
        if not isinstance(description, str):
            raise InputError(f"{where}.description is {short_repr(description)}; expected a string")
        if not isinstance(function.get("strict", False), bool):
            raise InputError(f"{where}.strict is {short_repr(function['strict'])}; expected True or False")
        if not isinstance(parameters, dict):
            raise InputError(f"{where}.parameters is {short_repr(parameters)}; expected a dict, a JSON schema")
        check_schema(parameters, f"{where}.parameters")
        read.append(
            {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
        )
    return read


def _read_settings(effort: str | None, tokenizer: Tokenizer, form: ChatFormat) -> dict[str, str]:
    """Return the settings that the conversation says. The tokenizer's file has their values and defaults."""
    if not form.settings:
        if effort is not None:
            raise InputError(f"reasoning_effort is {short_repr(effort)}; only chat format v15 says it; expected None")
        return {}
    listed = tokenizer.settings
    if not isinstance(listed, Mapping):
        raise InputError("the tokenizer's file has no model_settings_builder; chat format v15 expects one")
    efforts = listed.get("reasoning_effort")
    if efforts is None:
        if effort is not None:
            raise InputError(f"reasoning_effort is {short_repr(effort)}; this model has no such setting; expected None")
        return {}
    if not isinstance(efforts, Mapping) or not isinstance(efforts.get("values"), list | tuple):
        raise InputError(f"reasoning_effort in the tokenizer's file is {short_repr(efforts)}; expected its values")
    effort = efforts.get("default") if effort is None else effort
    if effort not in efforts["values"] or effort not in _EFFORTS:
        expected = ", ".join(map(str, efforts["values"])) or "None: this model has no such setting"
        raise InputError(f"reasoning_effort is {short_repr(effort)}; expected {expected}")
    return {"reasoning_effort": effort}


def _with_ids(message: Message, given: Mapping[str, Any], tokenizer: Tokenizer) -> Message:
    """Return the message with the ids that the model generated, if it is a reply that nobody has changed."""
    if not is_unchanged(given, tokenizer):
        return message
    end = tokenizer.control_id(END)
    return replace(message, ids=given.ids if given.ids[-1:] == (end,) else (*given.ids, end))
