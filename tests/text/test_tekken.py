"""tekken.json: ids and texts are those of mistral-common."""

from __future__ import annotations

import random
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from mistral_ref.text import load_tokenizer
from mistral_ref.text.byte_tokenizer import ByteTokenizer

try:
    from mistral_common.tokens.tokenizers import tekken as mistral_common_tekken
except ImportError:
    mistral_common_tekken = None

CHARACTERS = "aAbB  \n\r\t/'’sSéǅªⅷ٣1😀\u0301\x1c\x85\u2028\u3000漢あ,.!\u00ad\ud7ff\U0010ffff"


@cache
def published(name: str) -> tuple[ByteTokenizer, Any]:
    """Return our tokenizer and mistral-common's of a file that it carries; skip where it is not installed."""
    if mistral_common_tekken is None:
        pytest.skip("mistral-common is not installed")
    path = Path(mistral_common_tekken.__file__).parents[2] / "data" / name
    return load_tokenizer(path), mistral_common_tekken.Tekkenizer.from_file(path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tekken_240718.json", "tekken_240911.json"])
def test_ids_and_texts_of_published_files_are_those_of_mistral_common(name: str) -> None:
    ours, theirs = published(name)
    assert (ours.vocab_size, ours.bos_id, ours.eos_id) == (theirs.n_words, theirs.bos_id, theirs.eos_id)
    assert ours.chat_format == theirs.version.value == "v3"
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices(CHARACTERS, k=rng.randint(0, 30)))
        assert ours.encode(text, eos=True) == theirs.encode(text, True, True)
        ids = [rng.choice([rng.randrange(131072), rng.randrange(1256)]) for _ in range(12)]
        assert ours.decode(ids) == theirs.decode(ids)
        stream = ours.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == ours.decode(ids)
    for character in "A \n":
        started = time.thread_time()
        ids = ours.encode(character * 100_000)
        assert time.thread_time() - started < 1
        assert ours.decode(ids) == character * 100_000
