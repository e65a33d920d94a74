"""Read the chat template beside a tokenizer: how models of other families want a conversation to be written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mistral_ref.errors import TokenizerError, short_repr
from mistral_ref.files.text_file import read_text

TEMPLATE_FILE = "chat_template.jinja"
_MAX_BYTES = 2**20


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template: a program in the language of jinja2 that prints a conversation.

    source      the program
    with_tools  the program for conversations with tools; "": the same
    tokens      contents of tokens that it may name: {"bos_token": "<s>", ...}
    origin      begins every message about it: the path of its file
    """

    source: str
    with_tools: str = ""
    tokens: dict[str, str] = field(default_factory=dict)
    origin: str = "chat template"

    @property
    def is_mistrals(self) -> bool:
        """Whether it writes one of Mistral's formats, which need no template. Llama 2 also writes [INST]."""
        return "[INST]" in self.source and "<<SYS>>" not in self.source


def chat_template(config: Mapping[str, Any], directory: Path, origin: Path) -> ChatTemplate | None:
    """Return the chat template of a model's directory; None if it has none.

    It is in the file chat_template.jinja, or else in `config`, the contents of tokenizer_config.json at `origin`.
    Raises TokenizerError if the file cannot be read, or if the template is no text.
    """
    template_file = directory / TEMPLATE_FILE
    tokens = {name: _content(value) for name, value in config.items() if name.endswith("_token")}
    tokens = {name: content for name, content in tokens.items() if content}
    if os.path.lexists(template_file):
        return ChatTemplate(
            read_text(template_file, TokenizerError, _MAX_BYTES), tokens=tokens, origin=str(template_file)
        )
    found = config.get("chat_template")
    named: dict[str, Any] = {"default": found} if isinstance(found, str) else {}
    if isinstance(found, list):
        named = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}
    if found is None or (isinstance(found, list) and not found):
        return None
    default, with_tools = named.get("default"), named.get("tool_use", "")
    if not isinstance(default, str) or not isinstance(with_tools, str):
        expected = "a text, or a list of objects with a name and a template, one of them called default"
        raise TokenizerError(f"{origin}: chat_template is {short_repr(found)}; expected {expected}")
    return ChatTemplate(default, with_tools, tokens, str(origin))


def _content(token: Any) -> str:
    """Return the content of a token that tokenizer_config.json names; "" if it names none."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) else ""
