"""Conversation: what was said so far, and the next answer. Each turn computes only what is new in the conversation.

conversation = Conversation(model, system="You are kind.")
for token in conversation.say("Hello!"):
    print(token.text, end="", flush=True)
"""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from mistral_ref.errors import InputError, checked_settings, short_repr
from mistral_ref.files.json_file import Limits, read_json
from mistral_ref.files.paths import local_path
from mistral_ref.files.text_file import read_text
from mistral_ref.files.whole_file import whole_file
from mistral_ref.generation import Generation, GenerationSettings, Token
from mistral_ref.model import Model
from mistral_ref.text import can_chat, parse_reply
from mistral_ref.text.chat import read_tools
from mistral_ref.text.chat_format import CHAT_FORMATS
from mistral_ref.text.reply import Reply

SYSTEM_PROMPT_FILE = "SYSTEM_PROMPT.txt"
_MAX_PROMPT_BYTES = 2**20
_SAVED = Limits(16 * 2**20, 100_000, 2_000_000)


class Conversation:
    """A conversation with a model.

    A model that was trained to continue texts, and not to talk, continues each text by itself: `is_chat` is False.

    model       the model
    tools       functions that the model may call, as in `Model.chat`
    effort, chat_format     `reasoning_effort` and `chat_format` of `Model.chat`
    settings    the settings of `Model.generate` with which answers are made
    messages    the messages so far, as `Model.chat` takes them; the answers keep the ids that were generated
    cache       the keys and values of what the model has read and said, stored in `cache_dtype`
    tokens      the last answer's, as `Model.chat` returned them; none before the first answer
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str = "",
        tools: Sequence[Mapping[str, Any]] | None = None,
        effort: str | None = None,
        chat_format: str | None = None,
        cache_dtype: str | None = None,
        **settings: Unpack[GenerationSettings],
    ) -> None:
        checked_settings(settings, GenerationSettings.__annotations__)
        if model.tokenizer is None:
            raise InputError("this model has no tokenizer; a conversation cannot be encoded")
        self.model, self.tokenizer, self.tools = model, model.tokenizer, tools
        self.effort, self.chat_format, self.settings = effort, chat_format, settings
        self.is_chat = chat_format is not None or can_chat(model.tokenizer)
        if tools and self.is_chat and model.tokenizer.chat_format is not None:
            read_tools(tools)  # a mistake in them is told before anything is said
        self.messages: list[dict[str, Any]] = []
        self.cache = model.new_cache(dtype=cache_dtype)
        self.tokens: Generation
        self.set_system(system)

    @property
    def system(self) -> str:
        """The text of the system prompt; "" if there is none."""
        content = self.messages[0]["content"] if self._n_system else ""
        return content if isinstance(content, str) else "".join(chunk.get("text", "") for chunk in content)

    @property
    def has_answer(self) -> bool:
        """Whether the last message is an answer."""
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    @property
    def _n_system(self) -> int:
        return int(bool(self.messages) and self.messages[0]["role"] == "system")

    def set_system(self, text: str) -> None:
        """Give the conversation another system prompt; with "" it has none. What was said stays."""
        if text and not self.is_chat:
            raise InputError("this model was trained to continue texts, and not to talk; it takes no system prompt")
        form = CHAT_FORMATS.get(self.chat_format or self.tokenizer.chat_format or "")
        content = _with_thinking(text) if form is not None and "system" in form.thinking else text
        prompt = [{"role": "system", "content": content}] if text else []
        self.messages[: self._n_system] = prompt

    def say(self, text: str) -> Generator[Token, None, None]:
        """Yield the tokens of the answer to a text of the user's.

        The answer becomes a message when the last token has been asked for, or when the iterator is closed or
        interrupted: then it is what was said so far. If there is no token at all, the user's text is taken back.
        Raises InputError or CacheError.
        """
        if self.messages and self.messages[-1].get("tool_calls"):
            raise InputError("the last answer calls tools; expected their results (give_results), or undo")
        return self._answer([{"role": "user", "content": text}])

    def give_results(self, results: Sequence[str]) -> Generator[Token, None, None]:
        """Yield the answer to the results of the tools that the last answer calls, in the order of the calls.

        Raises InputError unless there is one result for each call.
        """
        calls = self.messages[-1].get("tool_calls", []) if self.messages else []
        if len(calls) != len(results):
            raise InputError(f"{len(results)} results are given for {len(calls)} calls; expected as many")
        return self._answer(
            [
                {"role": "tool", "content": result, "tool_call_id": call["id"], "name": call["function"]["name"]}
                for call, result in zip(calls, results, strict=True)
            ]
        )

    def again(self) -> Generator[Token, None, None]:
        """Yield another answer to the last text of the user's, in place of the one that is there.

        If there is a seed, the next one is taken.
        """
        text = self.undo()
        if self.settings.get("seed") is not None:
            self.settings["seed"] += 1  # type: ignore[operator]
        return self._answer([{"role": "user", "content": text}])

    def undo(self) -> str:
        """Take back the last text of the user's and everything after it; return that text."""
        last = max((n for n, one in enumerate(self.messages) if one["role"] == "user"), default=None)
        if last is None:
            raise InputError("nothing has been said yet; there is nothing to take back")
        text: str = self.messages[last]["content"]
        del self.messages[last:]
        return text

    def reset(self) -> None:
        """Forget everything except the system prompt."""
        del self.messages[self._n_system :]

    def _answer(self, new: list[dict[str, Any]]) -> Generator[Token, None, None]:
        self.messages += new
        ids: list[int] = []
        reason = None
        try:
            self.tokens = self._tokens()
            for token in self.tokens:
                ids.append(token.id)
                reason = token.finish_reason
                yield token
        finally:
            reply = parse_reply(ids, self.tokenizer)
            if reason != "tool_calls":  # a call that was not said to its end
                reply.pop("tool_calls", None)
            if reply["content"] or "tool_calls" in reply:
                self.messages.append(reply)
            else:
                del self.messages[len(self.messages) - len(new) :]

    def _tokens(self) -> Generation:
        settings = self.settings | {"prompt_cache": self.cache}
        if not self.is_chat:
            return self.model.generate(self.messages[-1]["content"], **settings)
        return self.model.chat(
            self.messages,
            tools=self.tools,
            reasoning_effort=self.effort,
            chat_format=self.chat_format,
            **settings,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the messages and the ids of the answers to a JSON file. Raises InputError if it cannot be written."""
        ids = [list(one.ids) if isinstance(one, Reply) else None for one in self.messages]
        text = json.dumps({"messages": self.messages, "ids": ids}, ensure_ascii=False, indent=1)
        with whole_file(path, InputError) as file:
            file.write(text.encode())

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on with the conversation in a file of `save`. Raises InputError if it holds none."""
        path = local_path(path)
        saved = read_json(path, InputError, _SAVED)
        messages, ids = saved.get("messages"), saved.get("ids")
        if not isinstance(messages, list) or not all(isinstance(one, dict) and "role" in one for one in messages):
            raise InputError(f"{path}: messages is {short_repr(messages)}; expected a list of objects with a role")
        if not isinstance(ids, list) or len(ids) != len(messages):
            raise InputError(f"{path}: ids is {short_repr(ids)}; expected a list as long as messages")
        pairs = zip(messages, ids, strict=True)
        self.messages = [one if kept is None else Reply(one, self._ids(kept, path)) for one, kept in pairs]

    def _ids(self, ids: object, path: Path) -> list[int]:
        n_ids = self.model.config.vocab_size
        if not isinstance(ids, list) or not all(type(one) is int and 0 <= one < n_ids for one in ids):
            raise InputError(f"{path}: ids holds {short_repr(ids)}; expected a list of ids below {n_ids}")
        return ids


def read_system_prompt(directory: Path) -> str:
    """Return the system prompt that a model's directory recommends, with today's date in it; "" if it has none.

    In SYSTEM_PROMPT.txt "{today}" and "{yesterday}" stand for dates. Raises InputError if the file cannot be read.
    """
    path = directory / SYSTEM_PROMPT_FILE
    if not os.path.isfile(path):
        return ""
    text = read_text(path, InputError, _MAX_PROMPT_BYTES).removeprefix("\ufeff")
    today = datetime.date.today()
    yesterday = today - datetime.timedelta(days=1)
    return text.replace("{today}", today.isoformat()).replace("{yesterday}", yesterday.isoformat()).strip("\n")


def _with_thinking(text: str) -> str | list[dict[str, Any]]:
    """Return the content of a system message. Published prompts show what thinking looks like: "[THINK]...[/THINK]".

    >>> _with_thinking("Think first: [THINK]draft[/THINK]then answer")[1]
    {'type': 'thinking', 'thinking': 'draft', 'closed': True}
    """
    before, begin, rest = text.partition("[THINK]")
    thinking, end, after = rest.partition("[/THINK]")
    if not (begin and end):
        return text
    chunks: list[dict[str, Any]] = [
        {"type": "text", "text": before},
        {"type": "thinking", "thinking": thinking, "closed": True},
        {"type": "text", "text": after},
    ]
    return [chunk for chunk in chunks if chunk.get("text") != ""]
