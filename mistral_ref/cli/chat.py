"""mistral-ref chat: talk with a model."""

from __future__ import annotations

import argparse
from typing import Any

from mistral_ref.cli.chat_shell import HELP, ChatShell, LineReader
from mistral_ref.cli.common import add_cache_option, add_compute_options, add_model_option, as_text, load_model
from mistral_ref.cli.draft_options import add_draft_options, draft_settings
from mistral_ref.cli.output import say
from mistral_ref.cli.prompt_cache import add_prompt_cache_option, prompt_cache
from mistral_ref.cli.sampling_options import add_sampling_options, sampling_settings
from mistral_ref.conversation import SYSTEM_PROMPT_FILE, Conversation, read_system_prompt
from mistral_ref.errors import InputError, escaped, short_repr
from mistral_ref.files.json_file import MAX_JSON_BYTES, parse_json
from mistral_ref.files.paths import local_path, model_path
from mistral_ref.files.text_file import read_text
from mistral_ref.text.chat_format import CHAT_FORMATS

_DESCRIPTION = f"""\
Talk with a model. Each line is a message; the answer is printed token by token.
A line that ends with a backslash goes on in the next line, and so does
everything between two lines of \"\"\". Ctrl-C stops an answer, Ctrl-D leaves.

{HELP}

A model that was trained to continue texts continues each message by itself.
"""
_EXAMPLES = """\
examples:
  mistral-ref chat --model DIR
  mistral-ref chat --model DIR --system "Answer in one sentence." --temperature 0
  mistral-ref chat --model DIR --tools tools.json
  echo "What is a tensor?" | mistral-ref chat --model DIR --json
"""


def add_to(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add this command to the command line."""
    parser = commands.add_parser("chat", help="talk with a model", description=_DESCRIPTION, epilog=_EXAMPLES)
    add_model_option(parser)
    add_compute_options(parser)
    add_cache_option(parser)
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help=f'the system prompt; "" means none (default: what {SYSTEM_PROMPT_FILE} in the model\'s directory says)',
    )
    parser.add_argument(
        "--tools",
        metavar="FILE",
        help="a JSON file with a list of functions that the model may call; you are asked for what they return",
    )
    parser.add_argument(
        "--reasoning-effort", metavar="EFFORT", help="how much the model thinks, such as none or high (format v15)"
    )
    parser.add_argument(
        "--chat-format",
        choices=[*CHAT_FORMATS, "template"],
        metavar="FORMAT",
        help=f"{', '.join(CHAT_FORMATS)}, or template: the model's own chat template (default: as its files say)",
    )
    parser.add_argument(
        "--max-tokens", type=int, default=1024, metavar="N", help="most tokens in an answer (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print each answer as one line of JSON, at its end")
    parser.add_argument(
        "--no-history", action="store_true", help="neither read nor write the file in which typed lines are kept"
    )
    parser.add_argument("--stats", action="store_true", help="after each answer print its times to standard error")
    add_sampling_options(parser)
    add_draft_options(parser)
    add_prompt_cache_option(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Talk with the user, or answer the lines of a pipe, until the input ends."""
    tools = None if arguments.tools is None else read_tools(arguments.tools)
    model = load_model(arguments)
    conversation = Conversation(
        model,
        tools=tools,
        effort=arguments.reasoning_effort,
        chat_format=arguments.chat_format,
        cache_dtype=arguments.cache_dtype,
        max_tokens=arguments.max_tokens,
        **sampling_settings(arguments),
        **draft_settings(arguments),
    )
    if arguments.system is not None:
        conversation.set_system(as_text(arguments.system))
    elif conversation.is_chat:
        conversation.set_system(read_system_prompt(model_path(arguments.model)))
    with prompt_cache(model, arguments.prompt_cache, arguments.cache_dtype) as kept:
        if kept is not None:
            conversation.cache = kept
        with LineReader(keeps_history=not arguments.no_history) as reader:
            if reader.is_terminal or not conversation.is_chat:
                say(introduction(conversation, str(arguments.model)), error=True)
            shell = ChatShell(
                conversation, reader, as_json=arguments.json, stats=arguments.stats, marks=arguments.mark_accepted
            )
            shell.run()


def introduction(conversation: Conversation, name: str) -> str:
    """Return what is said before the first message."""
    if not conversation.is_chat:
        return (
            "This model was trained to continue texts, and not to talk. Write the beginning of a story, and it goes on "
            "from there. /help lists the commands."
        )
    lines = [f"Talking with {escaped(name)}. /help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves."]
    if conversation.system:
        lines.append(f"The system prompt has {len(conversation.system)} characters; /system shows it.")
    return "\n".join(lines)


def read_tools(name: str) -> list[dict[str, Any]]:
    """Return the list of tools in a JSON file; raise InputError if it holds none. Each is checked when it is used."""
    path = local_path(name)
    text = read_text(path, InputError, MAX_JSON_BYTES)
    try:
        tools = parse_json(text)
    except ValueError as error:
        raise InputError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(tools, list):
        raise InputError(f"{path}: holds {short_repr(tools)}; expected a list of tools")
    return tools
