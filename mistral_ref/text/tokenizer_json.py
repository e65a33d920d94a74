"""Read tokenizer.json, the file of the library `tokenizers`, if it holds a byte-level BPE.

The file describes a row of stages. Each can be of many kinds; those of byte-level BPE are few:

    added_tokens        tokens that are cut out of the text first (added_tokens.py)
    normalizer          what is done to the text between them: nothing, or a Unicode normal form
    pre_tokenizer       how the text is split into words (split_patterns.py), and that its bytes become letters
    model               the pieces and the merges (byte_bpe.py)
    post_processor      which tokens stand in front of a text and behind it
    decoder             that letters become bytes

Everything else is refused by name. `truncation` and `padding` are not read: they shorten or fill a text, and do not say
what its tokens are.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from mistral_ref.errors import MistralRefWarning, TokenizerError, UnknownTokenizerError, short_repr, warn
from mistral_ref.text.added_tokens import AddedToken, AddedTokens, added_token
from mistral_ref.text.byte_bpe import LETTERS, MergeListBPE
from mistral_ref.text.byte_tokenizer import ByteTokenizer, NormalForm
from mistral_ref.text.split_patterns import DIGITS, GPT2, KNOWN, LLAMA3, NUMBERS, TEKKEN
from mistral_ref.text.tokenizer_config import TokenizerConfig

_MAX_ID = 2**31 - 1
# A hostile file must not use much memory. The largest files of these models have 131,000 pieces and 280,000 merges.
_MAX_PIECES, _MAX_MERGES = 300_000, 400_000
_NORMAL_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


class WrongPatternWarning(MistralRefWarning):
    """A tokenizer.json of Mistral's vocabulary has Llama 3's pattern. Tekken's is used."""


def tokenizer_json(document: dict[str, Any], origin: str, config: TokenizerConfig) -> ByteTokenizer:
    """Return the tokenizer in the contents of a tokenizer.json.

    config      what tokenizer_config.json says: it names the token that ends a text, and may say whether texts begin
                with BOS

    Raises UnknownTokenizerError if the file asks for more than byte-level BPE, and TokenizerError if it is wrong.
    Warns if it has the wrong pattern that some of Mistral's models were published with; Tekken's own is used.
    """
    file = _File(origin)
    normal_forms = file.normal_forms(document.get("normalizer"))
    patterns, in_letters = file.patterns(document.get("pre_tokenizer"))
    if not in_letters or file.kinds(document.get("decoder"), "decoder", "decoders") != ["ByteLevel"]:
        raise UnknownTokenizerError(f"{origin}: has no pre_tokenizer and decoder ByteLevel; expected byte-level BPE")
    model = file.part(document.get("model"), "model")
    ids, ranks = file.vocabulary(model)
    if patterns == [LLAMA3] and [ids.get(LETTERS[byte]) for byte in (0, 255)] == [1000, 1255]:
        warn(
            f"{origin}: has a wrong pattern, with which Mistral's models were once published; Tekken's is used",
            WrongPatternWarning,
        )
        patterns = [TEKKEN]
    added = file.added(document.get("added_tokens") or [], ids, config)
    begin, end = file.ends(document.get("post_processor"))
    named = ids | {token.content: token.id for token in added.by_id.values()}
    if config.add_bos_token is not None:
        begin = config.named_id("bos_token", named.get, begin) if config.add_bos_token else None
    end = config.named_id("eos_token", named.get, end)
    known = {*named.values(), None}
    if begin not in known or end not in known:
        raise TokenizerError(f"{origin}: post_processor begins and ends a text with {begin} and {end}; one is no token")
    # No word of a text becomes a mark: neither is it looked up as one, nor merged to one.
    marks = {token.content for token in added.by_id.values() if token.special and len(token.content) > 1}
    ids = {piece: token_id for piece, token_id in ids.items() if piece not in marks}
    ranks = {merge: rank for merge, rank in ranks.items() if merge.replace(" ", "") not in marks}
    return ByteTokenizer(
        MergeListBPE(patterns, ids, ranks, whole_words=model.get("ignore_merges") is True),
        kind="byte-level BPE (tokenizer.json)",
        origin=origin,
        controls={},
        bos_id=begin,
        eos_id=end,
        added=added,
        normal_forms=normal_forms,
    )


@dataclasses.dataclass(frozen=True)
class _File:
    """Reads the parts of one file; `origin` begins every message."""

    origin: str

    def part(self, value: object, name: str) -> dict[str, Any]:
        """Return a part that must be an object."""
        if not isinstance(value, dict):
            raise TokenizerError(f"{self.origin}: {name} is {short_repr(value)}; expected an object")
        return value

    def stages(self, value: object, name: str, inner: str) -> list[dict[str, Any]]:
        """Return the stages of a part, each an object with a `type`: the part itself, or those of a Sequence."""
        if value is None:
            return []
        stage = self.part(value, name)
        if stage.get("type") != "Sequence":
            return [stage]
        listed = stage.get(inner)
        if not isinstance(listed, list):
            raise TokenizerError(f"{self.origin}: {name}.{inner} is {short_repr(listed)}; expected a list")
        return [self.part(one, name) for one in listed]

    def kinds(self, value: object, name: str, inner: str) -> list[object]:
        """Return the types of the stages of a part."""
        return [stage.get("type") for stage in self.stages(value, name, inner)]

    def require(self, stage: dict[str, Any], name: str, **expected: tuple[object, ...]) -> None:
        """Raise UnknownTokenizerError unless each of these fields has one of its expected values."""
        for field, allowed in expected.items():
            value = stage.get(field)
            if not any(type(value) is type(one) and value == one for one in allowed):
                wanted = " or ".join(map(repr, allowed))
                raise UnknownTokenizerError(f"{self.origin}: {name}.{field} is {short_repr(value)}; expected {wanted}")

    def normal_forms(self, value: object) -> list[NormalForm]:
        """Return the Unicode normal forms of the normalizer, in their order."""
        stages = self.stages(value, "normalizer", "normalizers")
        for stage in stages:
            self.require(stage, "normalizer", type=_NORMAL_FORMS)
        return [stage["type"] for stage in stages]

    def patterns(self, value: object) -> tuple[list[str], bool]:
        """Return the patterns of the pre-tokenizer, and whether it ends by writing bytes as letters."""
        patterns, in_letters, name = [], False, "pre_tokenizer"
        for stage in self.stages(value, name, "pretokenizers"):
            if in_letters:
                raise UnknownTokenizerError(f"{self.origin}: {name} goes on behind ByteLevel, which must be the last")
            self.require(stage, name, type=("ByteLevel", "Digits", "Split"))
            if stage["type"] == "Split":
                self.require(stage, f"{name} Split", behavior=("Isolated",), invert=(False,))
                patterns.append(self._known(stage.get("pattern")))
            elif stage["type"] == "Digits":
                self.require(stage, f"{name} Digits", individual_digits=(False, True))
                patterns.append(DIGITS if stage["individual_digits"] else NUMBERS)
            else:
                self.require(stage, f"{name} ByteLevel", add_prefix_space=(False,), use_regex=(True, False, None))
                patterns += [] if stage.get("use_regex") is False else [GPT2]
                in_letters = True
        return patterns, in_letters

    def _known(self, pattern: object) -> str:
        """Return the pattern of a Split, which must be a known one."""
        found = pattern.get("Regex") if isinstance(pattern, dict) else None
        if found not in KNOWN:
            raise UnknownTokenizerError(
                f"{self.origin}: pre_tokenizer Split has the pattern {short_repr(pattern)}; expected that of GPT-2, "
                "Llama 3 or Tekken"
            )
        return found

    def vocabulary(self, model: dict[str, Any]) -> tuple[dict[str, int], dict[str, int]]:
        """Return the ids of the pieces and the ranks of the merges."""
        nothing = (None, "")
        self.require(model, "model", type=("BPE", None), dropout=(None, 0, 0.0), byte_fallback=(False, None))
        self.require(model, "model", continuing_subword_prefix=nothing, end_of_word_suffix=nothing)
        self.require(model, "model", ignore_merges=(False, True, None))
        ids = self.part(model.get("vocab"), "model.vocab")
        if not 0 < len(ids) <= _MAX_PIECES:
            raise TokenizerError(f"{self.origin}: model.vocab has {len(ids)} pieces; expected 1 to {_MAX_PIECES}")
        for piece, token_id in ids.items():
            if type(token_id) is not int or not 0 <= token_id <= _MAX_ID:
                raise TokenizerError(
                    f"{self.origin}: model.vocab has {short_repr(token_id)} for {short_repr(piece)}; "
                    f"expected an id from 0 to {_MAX_ID}"
                )
        if len(set(ids.values())) < len(ids):
            raise TokenizerError(f"{self.origin}: model.vocab has an id twice; expected different ids")
        if not all(letter in ids for letter in LETTERS):  # then it matters what stands for a byte that is no piece
            self.require(model, "model", unk_token=(None,))
        return ids, self._ranks(model.get("merges"), ids)

    def _ranks(self, merges: object, ids: dict[str, int]) -> dict[str, int]:
        """Return the ranks of the merges, each as "left right". The list has texts, or pairs."""
        if not isinstance(merges, list):
            raise TokenizerError(f"{self.origin}: model.merges is {short_repr(merges)}; expected a list")
        if len(merges) > _MAX_MERGES:
            raise TokenizerError(
                f"{self.origin}: model.merges has {len(merges)} merges; expected {_MAX_MERGES} at most"
            )
        ranks: dict[str, int] = {}
        for rank, merge in enumerate(merges):
            pair = merge.split(" ") if isinstance(merge, str) else merge
            is_pair = isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)
            if not is_pair or pair[0] not in ids or pair[1] not in ids or pair[0] + pair[1] not in ids:
                raise TokenizerError(
                    f"{self.origin}: merge {rank} is {short_repr(merge)}; expected two pieces that make a third"
                )
            ranks[f"{pair[0]} {pair[1]}"] = rank
        return ranks

    def added(self, listed: object, ids: dict[str, int], config: TokenizerConfig) -> AddedTokens:
        """Return the added tokens of the file, and those that tokenizer_config.json has beside them."""
        if not isinstance(listed, list):
            raise TokenizerError(f"{self.origin}: added_tokens is {short_repr(listed)}; expected a list")
        where = f"{self.origin}: added_tokens"
        tokens: list[AddedToken] = []
        for fields in listed:
            tokens.append(added_token(self.part(fields, "added_tokens").get("id"), fields, f"{where}:"))
        known = {token.content for token in tokens} | {*ids}
        tokens += [token for token in config.added if token.content not in known]
        pieces = {token_id: piece for piece, token_id in ids.items()}
        for token in tokens:
            if ids.get(token.content, token.id) != token.id or pieces.get(token.id, token.content) != token.content:
                raise TokenizerError(
                    f"{where}: {short_repr(token.content)} has id {token.id}; model.vocab has another for it, or "
                    "another piece for this id"
                )
        return AddedTokens(tokens, where)

    def ends(self, value: object) -> tuple[int | None, int | None]:
        """Return the ids that the post-processor puts in front of a text and behind it; None for none."""
        begin = end = None
        for stage in self.stages(value, "post_processor", "processors"):
            self.require(stage, "post_processor", type=("ByteLevel", "TemplateProcessing"))
            if stage["type"] == "TemplateProcessing":
                begin, end = self._ends_of_template(stage)
        return begin, end

    def _ends_of_template(self, stage: dict[str, Any]) -> tuple[int | None, int | None]:
        """Return the ids of a template such as [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {"id": "A"}}]."""
        ends: list[list[int]] = [[]]  # the ids before the text, and behind it
        try:
            for part in stage["single"]:
                ((kind, token),) = part.items()
                if kind == "Sequence":
                    ends.append([])
                else:
                    ends[-1] += stage["special_tokens"][token["id"]]["ids"]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise TokenizerError(f"{self.origin}: post_processor has no template of tokens and a text") from None
        if len(ends) != 2 or any(len(ids) > 1 or any(type(token_id) is not int for token_id in ids) for ids in ends):
            raise UnknownTokenizerError(
                f"{self.origin}: post_processor puts the ids {short_repr(ends)} around its texts; expected one text, "
                "and at most one id at each end"
            )
        begin, end = (ids[0] if ids else None for ids in ends)
        return begin, end
