"""Tokenizers: their files against each other, against the model's vocabulary, and against the chat template."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from mistral_ref.errors import InputError, MistralRefError, TokenizerError, escaped, short_repr
from mistral_ref.files.json_file import TOKENIZER, read_json
from mistral_ref.measure.doctor.finding import Finding
from mistral_ref.measure.doctor.patient import Patient
from mistral_ref.text import tokenizer_files
from mistral_ref.text.byte_tokenizer import ByteTokenizer
from mistral_ref.text.chat_format import CHAT_FORMATS, ChatFormat
from mistral_ref.text.sentencepiece import SentencePieceTokenizer
from mistral_ref.text.template_file import ChatTemplate
from mistral_ref.text.tokenizer import Tokenizer

# Models are published with more rows than tokens, so that their number is a multiple of what a GPU likes. Fewer are
# left over than between two versions of Mistral's vocabulary.
_FEW_ROWS = 256
_MOST_IDS = 2**20
_OWN_CONTROL = re.compile(r"<SPECIAL_\d+>|\[control_\d+\]|\[/?[A-Z_]+\]|<pad>")
_TEMPLATE_CURE = "Take the chat template of the same model and revision. This program writes Mistral's formats itself."


def check_tokenizers(patient: Patient) -> Iterator[Finding]:
    """Check every tokenizer that could be read."""
    if patient.path.is_dir() and patient.tokenizers:
        yield from _against_first(patient)
    if patient.tokenizer is not None:
        path = next(iter(patient.tokenizers))
        if patient.config is not None:
            yield from _vocabulary(path, patient.tokenizer, patient.config.vocab_size)
        yield from _ends(patient, path, patient.tokenizer)
        if patient.tokenizer.chat_template is not None:
            yield from _template(patient.tokenizer, patient.tokenizer.chat_template)


def _against_first(patient: Patient) -> Iterator[Finding]:
    """Compare the tokens of each other file with those of the file that counts."""
    (first, tokenizer), *_ = patient.tokenizers.items()
    ours = _names(tokenizer)
    for path in tokenizer_files(patient.path):
        other = patient.tokenizers.get(path)
        is_comparable = path.name == "tokenizer.json" and isinstance(tokenizer, SentencePieceTokenizer)
        theirs = _names(other) if other is not None else _listed(path) if is_comparable else {}
        if path == first or not theirs:
            continue
        yield from _pattern(path, tokenizer, other, first.name)
        used = _used(tokenizer.chat_format)
        pairs = ((token, ours.get(token, ""), theirs.get(token, "")) for token in sorted({*ours, *theirs}))
        differing = [token for token, one, another in pairs if one != another and not _unused(one, another, used)]
        if not differing:
            continue
        n_ours, n_theirs = 1 + max(ours), 1 + max(theirs)
        sizes = f"it has {n_theirs:,} ids and {first.name} has {n_ours:,}; " if n_ours != n_theirs else ""
        here, there = (names.get(differing[0], "no token") for names in (theirs, ours))
        yield Finding(
            "wrong",
            path,
            f"{sizes}{len(differing):,} tokens differ: id {differing[0]} is {short_repr(here)}, and in {first.name} "
            f"{short_repr(there)}",
            f"Programs that read this file give the model other ids than those that read {first.name}, as this one.",
            "Take both files from one model and revision. Tokens that a fine-tune has added must be in both.",
        )


def _unused(one: str, another: str, used: set[str]) -> bool:
    """Return whether two names are of control tokens of Mistral's that the model does not use.

    Published files name these in different ways: id 17 of Mistral Nemo is [SYSTEM_PROMPT] or <SPECIAL_17>.
    """
    return all(_OWN_CONTROL.fullmatch(name) and name not in used for name in (one, another))


def _names(tokenizer: Tokenizer) -> dict[int, str]:
    """Return the name of each id that has one. A hostile file may give a token the id 2,147,483,647."""
    ids = {*range(min(tokenizer.vocab_size, _MOST_IDS)), *tokenizer.added.by_id}
    names = ((token, tokenizer.piece(token)) for token in ids)
    return {token: name for token, name in names if name != f"[{token}]"}


def _listed(path: Path) -> dict[int, str]:
    """Return the names of the ids in a tokenizer.json of SentencePiece, as `piece` has them; {} of another file."""
    try:
        file = read_json(path, TokenizerError, TOKENIZER)
    except MistralRefError:  # this is a finding already
        return {}
    model, added = file.get("model"), file.get("added_tokens")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocabulary, dict):
        return {}
    names = {token: escaped(piece) for piece, token in vocabulary.items() if type(token) is int}
    for entry in added if isinstance(added, list) else ():
        match entry:
            case {"id": int(token), "content": str(content)}:
                names[token] = escaped(content)
    return names


def _pattern(path: Path, first: Tokenizer, other: Tokenizer | None, name: str) -> Iterator[Finding]:
    """Compare how two files split a text into words."""
    if not (isinstance(first, ByteTokenizer) and isinstance(other, ByteTokenizer)):
        return
    if first.bpe.patterns != other.bpe.patterns:
        yield Finding(
            "wrong",
            path,
            f"splits texts by the pattern {short_repr(other.bpe.patterns)}; expected that of {name}",
            "Words are cut in other places than the model has learnt.",
            f"Use {name}, or take both files from one model and revision.",
        )


def _vocabulary(path: Path, tokenizer: Tokenizer, vocab_size: int) -> Iterator[Finding]:
    if tokenizer.n_pieces > vocab_size:
        yield Finding(
            "wrong",
            path,
            f"has {tokenizer.n_pieces:,} pieces; the model's vocabulary is {vocab_size:,}",
            "The embedding has no row for some of the tokens: the tokenizer belongs to another model.",
            "Take the tokenizer of the same model.",
        )
        return
    beyond = [token for token in tokenizer.added.by_id.values() if token.id >= vocab_size]
    if beyond:
        yield Finding(
            "suspicious",
            path.parent,
            f"added token {short_repr(beyond[0].content)} has id {beyond[0].id}; the model's vocabulary is "
            f"{vocab_size:,}" + (f", and {len(beyond) - 1} more have none of its ids" if beyond[1:] else ""),
            "The embedding has no row for it, so a prompt with this token is refused.",
            "If the model was trained with this token, take the weights with the longer embedding; otherwise leave it.",
        )
    if vocab_size - tokenizer.vocab_size >= _FEW_ROWS:
        yield Finding(
            "suspicious",
            path,
            f"has {tokenizer.vocab_size:,} ids; the model's vocabulary is {vocab_size:,}",
            "The embedding has rows that no token has: the tokenizer may be of an older version, without the control "
            "tokens that the model has learnt.",
            "Compare it with the tokenizer of the model's publisher.",
        )


def _ends(patient: Patient, path: Path, tokenizer: Tokenizer) -> Iterator[Finding]:
    """Check the ids that begin and end a text."""
    beside = [patient.path / name for name in ("generation_config.json", "config.json")]
    said_in = next((file for file in beside if file.exists()), path)
    for name, ids, own, why in (
        ("bos", patient.bos_ids, tokenizer.bos_id, "Programs begin texts with a token that the model does not expect."),
        ("eos", patient.eos_ids, tokenizer.eos_id, "Answers may never end."),
    ):
        if patient.config is not None and ids and max(ids) >= patient.config.vocab_size:
            yield Finding(
                "wrong",
                said_in,
                f"{name}_token_id is {max(ids)}; expected 0 to {patient.config.vocab_size - 1}",
                "The model has no such token, and can neither read nor write it.",
                f"Take the id of the tokenizer, {own}.",
            )
        elif ids and own is not None and own not in ids:
            yield Finding(
                "suspicious",
                said_in,
                f"{name}_token_id is {', '.join(map(str, ids))}; the tokenizer's own is {own}, "
                f"{short_repr(tokenizer.piece(own))}",
                why,
                f"Write {own} here, or correct {name}_token in tokenizer_config.json.",
            )
    for end in sorted({*patient.eos_ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])}):
        is_piece = end < tokenizer.vocab_size and end not in tokenizer.added.by_id
        if is_piece and (text := tokenizer.decode([end])):
            yield Finding(
                "suspicious",
                said_in if end in patient.eos_ids else path,
                f"eos_token_id {end} is {short_repr(text)}, a piece of text; expected a control token",
                "Texts end in the middle, where this piece is written.",
                "Take the id of the control token that ends a text, usually </s>.",
            )


# --- the chat template ------------------------------------------------------------------------------------------------


def _marks(form: ChatFormat) -> set[str]:
    """Return the control tokens by which templates of Mistral's formats differ."""
    said = {
        "[SYSTEM_PROMPT]": form.system == "turn",
        "[AVAILABLE_TOOLS]": form.tools is not None,
        "[ARGS]": form.calls in ("apart", "apart, no ids"),
        "[CALL_ID]": form.calls == "apart",
        "[TOOL_CONTENT]": form.results == "id and text",
        "[THINK]": bool(form.thinking),
        "[MODEL_SETTINGS]": form.settings,
    }
    return {mark for mark, is_said in said.items() if is_said}


def _used(chat_format: str | None) -> set[str]:
    """Return the control tokens of a format, with those that close a part."""
    if chat_format is None:
        return set()
    form = CHAT_FORMATS[chat_format]
    marks = _marks(form) | {"[INST]"} | ({"[TOOL_CALLS]", "[TOOL_RESULTS]"} if form.tools else set())
    return marks | {mark.replace("[", "[/") for mark in marks}


# What a template must write if it writes this. A template may leave out tools, or the system message.
_BESIDE = {
    "[SYSTEM_PROMPT]": "system",
    "[ARGS]": "[TOOL_CALLS]",
    "[CALL_ID]": "[TOOL_CALLS]",
    "[TOOL_CONTENT]": "[TOOL_RESULTS]",
}


def _template(tokenizer: Tokenizer, template: ChatTemplate) -> Iterator[Finding]:
    source = template.source + template.with_tools
    unknown = sorted({name for name in re.findall(r"<\|\w+\|>", source) if not _has(tokenizer, name)})
    if unknown:
        yield Finding(
            "wrong",
            Path(template.origin),
            f"the chat template writes {', '.join(unknown)}; the tokenizer has no such token",
            "The marks of the conversation become pieces of text, which the model has not learnt.",
            "Take the tokenizer's files, added tokens among them, and the template of the same model.",
        )
    if template.is_mistrals and tokenizer.chat_format is not None:
        yield from _against_format(tokenizer, tokenizer.chat_format, template, source)


def _against_format(tokenizer: Tokenizer, version: str, template: ChatTemplate, source: str) -> Iterator[Finding]:
    own = _marks(CHAT_FORMATS[version])
    written = {mark for form in CHAT_FORMATS.values() for mark in _marks(form) if mark in source}
    if tokenizer.kind.endswith("(GGUF)") or tokenizer.origin.endswith(".gguf"):  # which do not tell all versions apart
        strange = sorted(mark for mark in written if not _has(tokenizer, mark))
    else:
        strange = sorted(written - own)
    problems = [f"writes {', '.join(strange)}"] if strange else []
    problems += [f"writes no {mark}" for mark, what in _BESIDE.items() if mark in own - written and what in source]
    if isinstance(tokenizer, ByteTokenizer) and "[INST] " in source:
        problems.append("puts a space behind [INST], which Tekken does not expect")
    if problems:
        yield Finding(
            "wrong",
            Path(template.origin),
            f"the chat template {', and '.join(problems)}; the tokenizer's conversations are of version {version}",
            "Programs that follow the template write conversations in a form that the model has not learnt.",
            _TEMPLATE_CURE,
        )


def _has(tokenizer: Tokenizer, name: str) -> bool:
    try:
        tokenizer.control_id(name)
    except InputError:
        return False
    return True
