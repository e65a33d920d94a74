"""Stories for the demonstration model: two overlapping samples in, a clean training text and a hold-out out.

The samples are of TinyStories (Eldan and Li, 2023, arXiv:2305.07759; licence CDLA-Sharing-1.0):

    tinystories_sample_2M.txt    cased, <|endoftext|> between stories, the last one cut off
    tinystories_sample_4M.txt    lower-cased, curly quotes garbled; begins with the same stories, then as many others

The cased sample teaches where capitals belong, and the other one gets them back. Held-out stories are cased ones, and
whatever resembles one of them is taken out of the training text.
"""

from __future__ import annotations

import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import sentencepiece

CASED, LOWERED = "tinystories_sample_2M.txt", "tinystories_sample_4M.txt"
WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
# How a story begins, learnt by eye from the cased sample; used only to tell stories from paragraphs in the other one.
OPENING = re.compile(r"(once|one|there (once|was|were|lived)|a long time|long ago|it was|in a|today|the sun)\b")
# UTF-8 read as Windows-1252 and lower-cased; the closing quote's last byte is lost, so its rule comes last.
GARBLED = {"â€œ": '"', "â€™": "'", "â€˜": "'", "â€“": "-", "â€”": "-", "â€¦": "...", "â€": '"'}
GARBLED |= {"â": "", "Â": "", "ã©": "é", "ã±": "ñ", "ã³": "ó", "ã¡": "á"}
PLAIN = {"“": '"', "”": '"', "«": '"', "»": '"', "’": "'", "‘": "'", "–": "-", "—": "-", "…": "..."}


def clean(text: str) -> str:
    """Return a story with straight quotes, single spaces, and one newline between paragraphs."""
    for odd, plain in (GARBLED | PLAIN).items():
        text = text.replace(odd, plain)
    paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n"))
    return "\n".join(paragraph for paragraph in paragraphs if paragraph)


def fingerprint(text: str) -> str:
    """Return the words alone, the same for every copy of a story: "Hi, Tom!" and "hi tom" are both "hi tom"."""
    return " ".join(WORD.findall(text.lower()))


def read_cased(path: Path) -> list[str]:
    """Return the complete stories of the cased sample."""
    return [clean(story) for story in path.read_text(encoding="utf-8").split("<|endoftext|>")[:-1]]


def read_lowered(path: Path) -> list[str]:
    """Return the stories of the lower-cased sample.

    A single newline ends a story, but now and then also a paragraph. A part that does not begin as stories begin, and
    is short or follows a short one, is therefore taken as a paragraph of the story before it.
    """
    text = re.sub(r"\n[ \t]*\n\s*", "\n\n", path.read_text(encoding="utf-8"))
    stories: list[str] = []
    before = 1000
    for part in re.split(r"(?<!\n)\n(?!\n)", text):
        if stories and not OPENING.match(part) and min(len(part), before) < 300:
            stories[-1] += "\n" + part
        else:
            stories.append(part)
        before = len(part)
    return [clean(story) for story in stories]


def words_in_context(text: str) -> Iterator[tuple[int, str, str, str]]:
    """Yield for each word where it starts, the word, the word before it, and all that stands between the two."""
    before, end = "", 0
    for match in WORD.finditer(text):
        yield match.start(), match[0], before, text[end : match.start()] if before else "^"
        before, end = match[0].lower(), match.end()


class Capitals:
    """Where capitals belong, by majority in cased text: the more context has been seen, the more it counts.

    Votes are kept for (word before, gap, word), (gap, word), (word before, gap) and (gap): "." and a space ask for a
    capital, "said" after '!" ' does not, an unknown word after "named" is a name and stays one to the story's end.
    """

    def __init__(self, stories: Iterable[str]) -> None:
        self.votes: Counter[tuple[str, ...]] = Counter()
        self.shape: dict[str, Counter[str]] = {}
        for story in stories:
            for _, word, before, gap in words_in_context(story):
                low, vote = word.lower(), 1 if word[0].isupper() else -1
                self.votes.update(dict.fromkeys(self.keys(before, gap, low), vote))
                self.shape.setdefault(low, Counter())[word[0].upper() + word[1:]] += word[0].isupper()

    @staticmethod
    def keys(before: str, gap: str, word: str) -> list[tuple[str, ...]]:
        return [(before, gap, word), ("", gap, word), (before, gap, ""), ("", gap, "")]

    def restore(self, text: str) -> str:
        """Return lower-cased `text` with its capitals."""
        names: set[str] = set()
        out, end = [], 0
        for start, word, before, gap in words_in_context(text):
            known = (vote for key in self.keys(before, gap, word) if (vote := self.votes[key]))
            capital = next(known, -1) > 0
            if capital and before in ("named", "called"):
                names.add(word)
            if capital or word in names:
                shapes = self.shape.get(word)
                out += [text[end:start], shapes.most_common(1)[0][0] if shapes else word.capitalize()]
            else:
                out += [text[end:start], word]
            end = start + len(word)
        return "".join(out) + text[end:]


def restoration_accuracy(capitals: Capitals, stories: Iterable[str]) -> dict[str, float]:
    """Lower-case cased stories that `capitals` has not seen, restore them, and compare word by word."""
    words = right = upper = found = 0
    for story in stories:
        pairs = zip(WORD.findall(story), WORD.findall(capitals.restore(story.lower())), strict=True)
        for truth, guess in pairs:
            words, right = words + 1, right + (truth == guess)
            upper, found = upper + (truth[0].isupper()), found + (truth[0].isupper() and truth == guess)
    return {"words": words, "right": right / words, "capitalised": upper, "of which found": found / upper}


def shingles(words: str, width: int = 8) -> set[str]:
    """Return every run of `width` words."""
    parts = words.split()
    return {" ".join(parts[i : i + width]) for i in range(len(parts) - width + 1)}


def split(cased: list[str], lowered: list[str], held_out: int, seed: int) -> tuple[list[str], list[str], dict]:
    """Return stories to train on, stories held out, and a count of what was done.

    A training story is dropped if its words are another's, or if more than a tenth of its runs of eight words occur in
    the held-out stories.
    """
    order = random.Random(seed).sample(range(len(cased)), held_out)
    hidden = [cased[i] for i in sorted(order)]
    hidden_prints = {fingerprint(story) for story in hidden}
    hidden_runs = set().union(*(shingles(words) for words in hidden_prints))
    capitals = Capitals(story for story in cased if fingerprint(story) not in hidden_prints)
    joined = " | ".join(fingerprint(story) for story in cased)
    train: dict[str, str] = {}
    counts = Counter()
    for story, is_cased in [(s, True) for s in cased] + [(s, False) for s in lowered]:
        words = fingerprint(story)
        runs = shingles(words)
        if words in hidden_prints or words in train or (not is_cased and words in joined):
            counts["copies or held out"] += 1
        elif len(words) < 100 or len(runs & hidden_runs) > 0.1 * len(runs):
            counts["too short" if len(words) < 100 else "like a held-out story"] += 1
        else:
            train[words] = story if is_cased else capitals.restore(story)
            counts["cased" if is_cased else "restored"] += 1
    facts = {"train": len(train), "held out": len(hidden), **counts}
    facts["restoration"] = restoration_accuracy(capitals, hidden)
    return list(train.values()), hidden, facts


def train_tokenizer(stories: Iterable[str], path: Path, vocab_size: int) -> None:
    """Write a SentencePiece BPE model like Mistral's own: bytes for what it has no piece for, a newline among them."""
    model = io.BytesIO()  # written by us, so that no folder of this machine's gets into the file
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(paragraph for story in stories for paragraph in story.split("\n")),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def prepare(corpora: Path, out: Path, vocab_size: int, held_out: int, seed: int) -> dict:
    """Write train.json, heldout.json (lists of stories) and tokenizer.model into `out`; return the counts."""
    train, hidden, facts = split(read_cased(corpora / CASED), read_lowered(corpora / LOWERED), held_out, seed)
    train_tokenizer(train, out / "tokenizer.model", vocab_size)
    for name, stories in (("train", train), ("heldout", hidden)):
        (out / f"{name}.json").write_text(json.dumps(stories, indent=0, ensure_ascii=False), encoding="utf-8")
        facts[f"{name} bytes"] = sum(len(story.encode()) for story in stories)
    return facts
