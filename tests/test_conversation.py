"""Conversations: what is computed in each turn, what is kept, taken back and saved; kinds of tokens; system prompts."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest
from support.checkpoints import FAMILIES
from support.errors import refused
from support.scripted import V13, Scripted, ids_of
from support.tiny import model_of
from support.tiny_tekken import tiny_tekken
from support.tiny_tokenizers import tiny_tokenizer

from mistral_ref import Token
from mistral_ref.conversation import Conversation, read_system_prompt
from mistral_ref.errors import InputError
from mistral_ref.text import encode_chat, load_tokenizer, parse_reply
from mistral_ref.text.sentencepiece import SentencePieceTokenizer

USER = {"role": "user", "content": "Hi"}


def text(tokens: list[Token], kind: str = "text") -> str:
    return "".join(token.text for token in tokens if token.kind == kind)


def test_tokens_say_what_they_belong_to_and_why_the_answer_ended() -> None:
    model = Scripted(["[THINK]", "hm", "[/THINK]", " Yo ", "[TOOL_CALLS]", "f", "[ARGS]", "{}"], ["Yo"])
    tokens = list(model.chat([USER]))
    assert [text(tokens, kind) for kind in ("thinking", "text", "tool_call")] == ["hm", " Yo ", "f{}"]
    assert [token.finish_reason for token in tokens[:-1]] == [None] * (len(tokens) - 1)
    assert tokens[-1].finish_reason == "tool_calls"
    assert list(model.chat([USER]))[-1].finish_reason == "eos"


def test_the_text_of_an_answer_is_the_content_of_its_message() -> None:
    tokenizer = SentencePieceTokenizer(tiny_tokenizer())  # which puts a space before a text
    model = Scripted(["The mill"], tokenizer=tokenizer)
    tokens = list(model.chat([USER], chat_format="v1"))
    assert text(tokens) == parse_reply([token.id for token in tokens], tokenizer)["content"] == "The mill"
    model = Scripted(["The mill"], tokenizer=tokenizer)
    begun = [USER, {"role": "assistant", "content": "It is", "prefix": True}]
    assert text(list(model.chat(begun, chat_format="v1"))) == " The mill"


def test_each_turn_reads_only_what_is_new() -> None:
    model = Scripted(["Yo"], ["Bye"])
    conversation = Conversation(model, system="Be kind.")
    assert text(list(conversation.say("Hi"))) == "Yo"
    first = model.n_read
    n_said = len(ids_of("Yo", V13))
    assert first == len(encode_chat(conversation.messages[:2], V13)) + n_said
    assert text(list(conversation.say("And?"))) == "Bye"
    whole = encode_chat(conversation.messages[:4], V13)
    assert model.n_read == len(whole) + len(ids_of("Bye", V13))
    assert conversation.cache.tokens == [*whole, *ids_of("Bye", V13)]
    assert [one["role"] for one in conversation.messages] == ["system", *["user", "assistant"] * 2]


def test_ids_of_an_answer_are_never_encoded_anew() -> None:
    letters: list[str | None] = list("mill")  # other ids than those of the text
    model = Scripted(letters, ["Yes"])
    conversation = Conversation(model)
    list(conversation.say("Hi"))
    before = model.n_read
    list(conversation.say("What?"))
    new = [V13.control_id("</s>"), V13.control_id("[INST]"), *ids_of("What?", V13), V13.control_id("[/INST]")]
    assert model.n_read - before == len(new) + len(ids_of("Yes", V13))


def test_what_was_said_can_be_taken_back_and_said_again() -> None:
    model = Scripted(["One"], ["Two"], ["Three"])
    conversation = Conversation(model, system="S")
    list(conversation.say("Hi"))
    assert text(list(conversation.again())) == "Two"
    assert [one["content"] for one in conversation.messages] == ["S", "Hi", "Two"]
    assert conversation.undo() == "Hi"
    with refused(InputError, "nothing"):
        conversation.undo()
    conversation.settings["seed"] = 3
    with refused(InputError, "nothing"):
        conversation.again()
    assert conversation.settings.pop("seed") == 3
    list(conversation.say("Hi"))
    conversation.reset()
    assert conversation.system == "S"
    conversation.set_system("")
    assert conversation.messages == []


def test_an_answer_that_is_stopped_is_what_was_said() -> None:
    conversation = Conversation(Scripted(["O", "n", "e"], ["Two"]))
    tokens = conversation.say("Hi")
    next(tokens)
    tokens.close()
    assert conversation.messages[-1] == {"role": "assistant", "content": "O"}
    model = Scripted(["Yo", "[TOOL_CALLS]", "f", "[ARGS]", "{", None], ["Two"])
    conversation = Conversation(model, max_tokens=len(model.script) - len(ids_of("Two", V13)) - 1)
    list(conversation.say("Hi"))  # a call that is not said to its end is none
    assert conversation.messages[-1] == {"role": "assistant", "content": "Yo"}
    assert text(list(conversation.say("And?"))) == "Two"
    conversation = Conversation(Scripted([""]))
    assert text(list(conversation.say("Hi"))) == ""
    assert conversation.messages == []  # an answer without a word is none
    with refused(InputError, "reasoning_effort"):
        list(Conversation(Scripted(["x"]), effort="high").say("Hi"))


def test_tools_are_called_and_their_results_given() -> None:
    model = Scripted(["[TOOL_CALLS]", "f", "[ARGS]", "{}", "[TOOL_CALLS]", "g", "[ARGS]", "{}"], ["22 and 3"])
    conversation = Conversation(model)
    list(conversation.say("Hi"))
    with refused(InputError, 1, 2):
        conversation.give_results(["22"])
    with refused(InputError, "results"):
        conversation.say("And?")
    assert text(list(conversation.give_results(["22", "3"]))) == "22 and 3"
    assert [one["role"] for one in conversation.messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert encode_chat([*conversation.messages, USER], V13)


def test_a_saved_conversation_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "talk.json"
    letters: list[str | None] = list("mill")
    conversation = Conversation(Scripted(letters), system="S")
    list(conversation.say("Hi"))
    conversation.save(path)
    other = Conversation(Scripted(["Two"]))
    other.load(path)
    assert other.messages == conversation.messages
    follow = [*other.messages, USER]
    assert encode_chat(follow, V13) == encode_chat([*conversation.messages, USER], V13)
    assert encode_chat(follow, V13) != encode_chat([dict(one) for one in follow], V13)
    assert text(list(other.say("And?"))) == "Two"
    saved = json.loads(path.read_text(encoding="utf-8"))
    for wrong, fact in (
        (saved | {"messages": "x"}, "messages"),
        (saved | {"messages": [5]}, "messages"),
        (saved | {"ids": []}, "ids"),
        (saved | {"ids": [None, None, [10**6]]}, "ids"),
    ):
        path.write_text(json.dumps(wrong))
        with refused(InputError, path, fact):
            other.load(path)


def test_a_model_that_was_not_trained_to_talk_continues_each_text() -> None:
    tokenizer = SentencePieceTokenizer(tiny_tokenizer())
    conversation = Conversation(Scripted(["river"], ["ran"], tokenizer=tokenizer))
    assert not conversation.is_chat
    assert text(list(conversation.say("The mill"))) == " river"
    list(conversation.say("It"))
    assert conversation.cache.tokens == [*tokenizer.encode("It"), *tokenizer.encode("ran", bos=False)]
    with refused(InputError, "system"):
        conversation.set_system("Be kind.")


def test_what_a_conversation_cannot_be_had_with() -> None:
    model = model_of(FAMILIES["dense_windowed"].config)
    for talk in (lambda: Conversation(model), lambda: model.chat([USER])):
        with refused(InputError, "tokenizer"):
            talk()
    with refused(InputError, "tools[0].function.name", "'a b'"):
        Conversation(Scripted(["x"]), tools=[{"type": "function", "function": {"name": "a b"}}])
    scripted = Scripted(["x"])
    with refused(InputError, "cache", "prompt_cache"):
        scripted.chat([USER], cache=scripted.new_cache())


def test_the_system_prompt_of_a_directory(tmp_path: Path) -> None:
    assert read_system_prompt(tmp_path) == ""
    path = tmp_path / "SYSTEM_PROMPT.txt"
    path.write_text("It is {today}, was {yesterday}. {name}\n", encoding="utf-8")
    today = datetime.date.today()
    yesterday = today - datetime.timedelta(days=1)
    assert read_system_prompt(tmp_path) == f"It is {today}, was {yesterday}. {{name}}"
    path.write_bytes(b"\xff")
    with refused(InputError, path, "UTF-8"):
        read_system_prompt(tmp_path)


@pytest.mark.parametrize("version", ["v7", "v13"])
def test_a_system_prompt_may_show_thinking_if_its_format_has_it(version: str, tmp_path: Path) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps(tiny_tekken(version)))
    tokenizer = load_tokenizer(tmp_path)
    conversation = Conversation(Scripted(["Yo"], tokenizer=tokenizer), system="A [THINK]draft[/THINK] B")
    list(conversation.say("Hi"))
    assert (tokenizer.control_id("[THINK]") in conversation.cache.tokens) == (version == "v13")
    assert conversation.system == ("A  B" if version == "v13" else "A [THINK]draft[/THINK] B")
