"""A model that says what it is told to, for tests of conversations."""

from __future__ import annotations

from typing import Any

import numpy as np
from support.checkpoints import FAMILIES
from support.tiny import model_of
from support.tiny_tekken import tiny_tekken

from mistral_ref import KVCache, Model
from mistral_ref.errors import InputError
from mistral_ref.text.tekken import tekken_tokenizer
from mistral_ref.text.tokenizer import Tokenizer

V13 = tekken_tokenizer(tiny_tekken("v13"), "tekken.json")


class Scripted(Model):
    """A model that says the given answers, one after another. It counts the tokens that it reads.

    An answer is a list of control tokens and texts. It ends with "</s>" unless the last part is None.
    """

    def __init__(self, *answers: list[str | None], tokenizer: Tokenizer = V13) -> None:
        model = model_of(FAMILIES["llama"].config.replace(vocab_size=tokenizer.vocab_size))
        super().__init__(model.config, model.weights, model.ops, tokenizer=tokenizer)
        self.n_read = 0
        self.script: list[int] = []
        for answer in answers:
            for part in [*answer, "</s>"] if answer[-1] is not None else answer[:-1]:
                self.script += ids_of(str(part), tokenizer)

    def _next_logits(self, ids: Any, cache: KVCache, progress: object = None) -> np.ndarray:
        cache.commit(cache.begin(len(ids)), ids)
        self.n_read += len(ids)
        logits = np.zeros(self.config.vocab_size, np.float32)
        logits[self.script[0]] = 50
        self.script = self.script[1:]
        return logits


def ids_of(part: str, tokenizer: Tokenizer) -> list[int]:
    try:
        return [tokenizer.control_id(part)]
    except InputError:
        return tokenizer.encode(part, bos=False)
