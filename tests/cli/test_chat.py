"""mistral-ref chat: over a pipe, in a terminal, its commands, its files, and what a user may get wrong."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import FAMILIES, write_hf
from support.command import COMMAND, heed_signals, run
from support.errors import assert_complains
from support.scripted import Scripted
from support.tiny_tekken import tiny_tekken

import mistral_ref
from mistral_ref.cli.chat_shell import COMMANDS, ChatShell, LineReader, Printer
from mistral_ref.conversation import Conversation
from mistral_ref.text import encode_chat, parse_reply

SHORT = ("--max-tokens", 6, "--temperature", 0, "--backend", "numpy")


@pytest.fixture(scope="module")
def chat_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a model that can chat, and says nonsense, and a system prompt."""
    directory = tmp_path_factory.mktemp("chat")
    document = tiny_tekken("v13")
    family = FAMILIES["llama"]
    vocab_size = document["config"]["default_vocab_size"]
    write_hf(directory, replace(family, config=family.config.replace(vocab_size=vocab_size)))
    (directory / "tekken.json").write_text(json.dumps(document))
    (directory / "SYSTEM_PROMPT.txt").write_text("Be kind.\n")
    return directory


def answer_of(directory: Path, messages: list[dict[str, Any]], **others: Any) -> dict[str, Any]:
    """Return the message that the model answers."""
    model = mistral_ref.load(directory, backend="numpy")
    assert model.tokenizer is not None
    return parse_reply([token.id for token in model.chat(messages, max_tokens=6, **others)], model.tokenizer)


def test_each_line_of_a_pipe_is_a_message(chat_dir: Path) -> None:
    done = run("chat", "--model", chat_dir, *SHORT, "--json", stdin="Hi\n\nAnd\\\nyou?\n")
    messages: list[dict[str, Any]] = [{"role": "system", "content": "Be kind."}]
    for line, said in zip(done.stdout.splitlines(), ("Hi", "And\nyou?"), strict=True):
        messages.append({"role": "user", "content": said})
        answer = answer_of(chat_dir, messages)
        assert json.loads(line) == answer | {"finish_reason": "length", "n_tokens": 6}
        messages.append(answer)
    assert (done.returncode, done.stderr) == (0, "")
    text = run("chat", "--model", chat_dir, *SHORT, "--system", "", stdin='"""\nHi\nyou\n"""\n').stdout
    assert text == answer_of(chat_dir, [{"role": "user", "content": "Hi\nyou"}])["content"] + "\n"


def test_commands_change_the_conversation(chat_dir: Path, tmp_path: Path) -> None:
    lines = [
        "/system", "/system Be brief.", "Hi", f"/save {tmp_path / 'talk.json'}", "/undo", "/stats",
        f"/load {tmp_path / 'talk.json'}", "/tokens", "/regen", "/reset", "/system", "/quit", "not read",
    ]  # fmt: skip
    done = run("chat", "--model", chat_dir, *SHORT, stdin="\n".join(lines))
    saved_line, reset_line = done.stderr.splitlines()
    assert done.returncode == 0
    assert str(tmp_path / "talk.json") in saved_line
    assert "3 messages" in saved_line
    assert "forgotten" in reset_line
    saved = json.loads((tmp_path / "talk.json").read_text())["messages"]
    model = mistral_ref.load(chat_dir, backend="numpy")
    assert model.tokenizer is not None
    begun = "|".join(map(model.tokenizer.piece, encode_chat(saved[:2], model.tokenizer)))
    printed = done.stdout.split("\n")
    assert printed[0] == "Be kind."
    assert begun in done.stdout
    assert printed[-2:] == ["Be brief.", ""]
    assert done.stdout.count(saved[2]["content"]) == 2  # said, and said again
    assert "6 tokens" in done.stdout or "5 tokens" in done.stdout


def test_the_demonstration_model_says_that_it_tells_stories() -> None:
    done = run("chat", "--max-tokens", 8, "--temperature", 0, stdin="Once upon a time\nTom had\n")
    model = mistral_ref.load()
    continued = [model.complete(text, max_tokens=8) for text in ("Once upon a time", "Tom had")]
    assert done.stdout == "".join(f"{text}\n" for text in continued)
    assert "stor" in done.stderr


def test_generate_answers_one_message_behind_a_system_prompt(chat_dir: Path) -> None:
    done = run("generate", "--model", chat_dir, *SHORT, "--system", "Be brief.", "Hi")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert done.stdout == answer_of(chat_dir, messages)["content"] + "\n"
    done = run("generate", "--backend", "numpy", "--system", "Be brief.", "Hi")
    assert done.returncode == 2
    assert_complains(done.stderr, "continue texts", "system prompt")


def test_help_lists_every_command() -> None:
    shown = run("chat", "--help").stdout
    assert all(command.usage in shown for command in COMMANDS)
    shell = ChatShell(Conversation(mistral_ref.load(backend="numpy")), LineReader(keeps_history=False))
    assert {*shell._commands, "/quit"} == {command.usage.split()[0] for command in COMMANDS}


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "objekt"}}}]


@pytest.mark.parametrize(
    ("arguments", "stdin", "facts"),
    [
        (["--tools", "absent.json"], "Hi", [Path("absent.json")]),
        (["--system", "x"], "Hi", ["system"]),
        ([], "/undo", ["nothing"]),
        ([], "/regenerate", ["'/regenerate'", "/regen"]),
        ([], "/save", ["file"]),
        ([], "/load absent.json", [Path("absent.json")]),
        ([], b"\xff\n", ["UTF-8"]),
        (["--chat-format", "v4"], "Hi", ["v4"]),
        (["--max-tokens", "0"], "Hi", ["max_tokens", 0]),
    ],
)
def test_a_mistake_is_one_line(arguments: list[str], stdin: str | bytes, facts: list[object]) -> None:
    done = run("chat", "--backend", "numpy", *arguments, stdin=stdin)
    assert done.returncode == 2
    assert_complains(done.stderr.splitlines(keepends=True)[-1], *facts)


def test_tools_that_are_no_tools(chat_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "tools.json"
    for text, facts in (("{}", [path, "list"]), ("[", [path, "JSON"]), (json.dumps(TOOLS), ["'objekt'"])):
        path.write_text(text)
        done = run("chat", "--model", chat_dir, *SHORT, "--tools", path, stdin="Hi")
        assert done.returncode == 2
        assert_complains(done.stderr, *facts)


def test_a_user_says_what_a_tool_returns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[str | None] = ["[TOOL_CALLS]", "f", "[ARGS]", '{"a": 1}', "[TOOL_CALLS]", "g", "[ARGS]", "{}"]
    for typed, roles in (("Hi\n22\n3\n", ["user", "assistant", "tool", "tool", "assistant"]), ("Hi\n22\n", [])):
        conversation = Conversation(Scripted(calls, ["22 and 3"]))
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        ChatShell(conversation, LineReader(keeps_history=False)).run()
        assert [one["role"] for one in conversation.messages] == roles  # without results the turn is taken back
        assert capsys.readouterr().out == ("22 and 3\n" if roles else "")


# --- in a terminal ----------------------------------------------------------------------------------------------------


PATIENCE = 240  # seconds: the start alone takes 10 beside four programs that compute, on two cores


class Terminal:
    """A terminal in which the command runs."""

    def __init__(self, state: Path, *arguments: object) -> None:
        self.master, slave = pty.openpty()
        environment = os.environ | {"XDG_STATE_HOME": str(state), "TERM": "xterm"}

        def begin() -> None:
            heed_signals()
            os.login_tty(slave)  # the terminal sends Ctrl-C as a signal to its own processes

        command = [*COMMAND, "chat", *map(str, arguments)]
        self.process = subprocess.Popen(command, env=environment, pass_fds=[slave], preexec_fn=begin)  # noqa: PLW1509
        os.close(slave)
        self.shown = ""

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def expect(self, text: str) -> str:
        """Wait until the terminal shows a text, behind what was expected before; return what stands between."""
        end = time.monotonic() + PATIENCE
        while text not in self.shown:
            assert time.monotonic() < end, (text, self.shown)
            ready, _, _ = select.select([self.master], [], [], 0.2)
            if ready:
                try:
                    self.shown += os.read(self.master, 4096).decode(errors="replace")
                except OSError:
                    assert text in self.shown, self.shown
        before, _, self.shown = self.shown.partition(text)
        return before

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    """Return a terminal in which a conversation with the demonstration model has begun."""
    opened = Terminal(tmp_path, "--backend", "numpy", "--max-tokens", 30, "--temperature", 0)
    yield opened
    opened.close()


@pytest.mark.slow
def test_a_terminal_goes_on_after_mistakes_and_keeps_a_history(terminal: Terminal, tmp_path: Path) -> None:
    terminal.expect("> ")
    terminal.send("/nothing\n")
    terminal.expect("no command")
    terminal.expect("> ")
    terminal.send("Once upon a time\n")
    terminal.expect("there was")
    terminal.expect("> ")
    time.sleep(1)  # Python misses a signal that comes after its prompt and before it waits for a key
    terminal.send("\x03")
    terminal.expect("> ")
    terminal.send("\x04")
    assert terminal.process.wait(PATIENCE) == 0
    history = tmp_path / "mistral_ref" / "chat_history"
    assert "Once upon a time" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(tmp_path: Path) -> None:
    terminal = Terminal(tmp_path, "--backend", "numpy", "--max-tokens", 1000, "--temperature", 0, "--no-history")
    try:
        terminal.expect("> ")
        terminal.send("Once upon a time\n")
        terminal.expect("there")
        terminal.send("\x03")
        stopped = terminal.expect("> ")
        assert "\r\n" in stopped
        assert "\r\n\r\n" not in stopped  # the next prompt stands on the next line
        terminal.send("/tokens\n")
        terminal.expect("time|,")
        terminal.expect("> ")
        terminal.send("/quit\n")
        assert terminal.process.wait(PATIENCE) == 0
    finally:
        terminal.close()
    assert not (tmp_path / "mistral_ref").exists()


def test_thinking_is_dim_in_a_terminal_and_absent_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    tokens = [mistral_ref.Token(1, text, 0.0, None, kind) for text, kind in
              (("hm", "thinking"), ("Yo", "text"), ("f{}", "tool_call"))]  # fmt: skip
    for is_terminal, expected in ((False, "Yo\n"), (True, "\x1b[2mhm\x1b[22m\nYo\n")):
        printer = Printer(is_silent=False)
        printer.is_terminal = is_terminal
        for token in tokens:
            printer.print(token)
        printer.end()
        assert capsys.readouterr().out == expected
