r"""The formats of Mistral's conversations, "v1" to "v15": a table of what differs between them.

What a conversation looks like in each is written here with the names of its control tokens. `chat.py` writes it.

    v1       <s>[INST] SYSTEM\n\nHi [/INST]Yo</s>[INST] Bye [/INST]                      "[INST]" is text here
    v2, v3   <s>[INST]Hi[/INST]Yo</s>[AVAILABLE_TOOLS]TOOLS[/AVAILABLE_TOOLS][INST]SYSTEM\n\nBye[/INST]
    v7, v11  <s>[SYSTEM_PROMPT]SYSTEM[/SYSTEM_PROMPT][INST]Hi[/INST]Yo</s>[AVAILABLE_TOOLS]...[INST]Bye[/INST]
    v13      <s>[SYSTEM_PROMPT]SYSTEM[/SYSTEM_PROMPT][AVAILABLE_TOOLS]...[INST]Hi[/INST][THINK]hm[/THINK]Yo</s>...
    v15      ... [AVAILABLE_TOOLS]...[/AVAILABLE_TOOLS][MODEL_SETTINGS]{...}[/MODEL_SETTINGS][INST]Hi[/INST]...
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ChatFormat:
    """What one format does that another does not.

    system      where system messages go. "first user", "last user": all of them together stand before the text of that
                user message, and a conversation that does not begin with a user message gets an empty one. "turn": each
                stays where it is, between control tokens of its own
    tools       before which user message the tools stand; None: the format has no tools, calls and results
    calls       how an assistant calls. "names": one JSON list; "names and ids": the same with the ids of the calls;
                "apart": [TOOL_CALLS] name [CALL_ID] id [ARGS] arguments for each call; "apart, no ids": without the id
    results     how a tool answers. "list": a JSON list of one result; "object": a JSON object with the id;
                "id and text": id [TOOL_CONTENT] text; "text": the text alone
    call_ids    which ids calls may have. "nine": nine letters and digits; "any": what is neither empty nor "null";
                None: ids are not looked at
    by_id       True: each result names the call that it answers, and results stand in the order of the calls. False:
                there must be as many results as calls
    forgets     True: calls and results before the last user message are left out
    thinking    the roles whose messages may hold thinking
    text_join   what stands between two chunks of text in one message
    settings    whether the conversation says the reasoning effort
    inst        "text": [INST] is not a control token
    """

    system: Literal["first user", "last user", "turn"]
    tools: Literal["first user", "last user"] | None
    calls: Literal["names", "names and ids", "apart", "apart, no ids"] | None
    results: Literal["list", "object", "id and text", "text"] | None
    call_ids: Literal["nine", "any"] | None
    by_id: bool = False
    forgets: bool = False
    thinking: Collection[str] = ()
    text_join: str = "\n\n"
    settings: bool = False
    inst: Literal["control", "text"] = "control"

    @property
    def content_with_calls(self) -> bool:
        """Whether one assistant message may hold both a text and calls."""
        return self.system == "turn"


CHAT_FORMATS = {
    "v1": ChatFormat(
        system="first user", tools=None, calls=None, results=None, call_ids=None, inst="text",
    ),
    "v2": ChatFormat(
        system="last user", tools="last user", calls="names", results="list", call_ids=None, forgets=True,
    ),
    "v3": ChatFormat(
        system="last user", tools="last user", calls="names and ids", results="object", call_ids="nine",
    ),
    "v7": ChatFormat(
        system="turn", tools="last user", calls="names and ids", results="id and text", call_ids="nine",
    ),
    "v11": ChatFormat(
        system="turn", tools="last user", calls="apart", results="id and text", call_ids="nine", by_id=True,
    ),
    "v13": ChatFormat(
        system="turn", tools="first user", calls="apart, no ids", results="text", call_ids="any", by_id=True,
        thinking=("assistant", "system"),
    ),
    "v15": ChatFormat(
        system="turn", tools="first user", calls="apart, no ids", results="text", call_ids="any", by_id=True,
        thinking=("assistant",), text_join="", settings=True,
    ),
}  # fmt: skip
