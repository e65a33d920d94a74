"""An adapter for the lm-evaluation-harness (pip install lm-eval): its tasks, computed by mistral_ref.

    import lm_eval
    import mistral_ref
    from lm_eval_adapter import MistralRefLM

    found = lm_eval.simple_evaluate(MistralRefLM(mistral_ref.load("DIR")), tasks=["lambada_openai"])

Copy this file beside your program.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM

from mistral_ref import InputError, Model

_MAX_TOKENS = 256  # of a generated text, if the task does not say


class MistralRefLM(LM):  # type: ignore[misc]
    """A model of mistral_ref, as the harness asks a model.

    at_once     how many texts are generated together
    """

    def __init__(self, model: Model, *, at_once: int = 8) -> None:
        super().__init__()
        if model.tokenizer is None or model.tokenizer.bos_id is None:
            raise InputError("the harness asks with texts; expected a model with a tokenizer that has BOS")
        self.model, self.tokenizer, self.bos_id = model, model.tokenizer, model.tokenizer.bos_id
        self.at_once = at_once
        self.longest = model.config.max_seq_len

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) the log-probability of the continuation, and whether it is greedy."""
        all_ids, counts = [], []
        for context, continuation in (request.args for request in requests):
            ids, n = self.ids_of(context, continuation)
            all_ids.append(ids if self.longest is None else ids[-self.longest :])
            counts.append(n)
        found = []
        for scores, ids, n in zip(self.model.score_batch(all_ids, top=1), all_ids, counts, strict=True):
            is_greedy = bool(np.array_equal(scores.top_ids[-n:, 0], ids[1:][-n:]))
            found.append((float(scores.logprobs[-n:].sum()), is_greedy))
        return found

    def ids_of(self, context: str, continuation: str) -> tuple[list[int], int]:
        """Return the ids of both texts together, and how many of them are the continuation's.

        Spaces at the end of the context belong to the word that follows.
        """
        n_context = len(context.rstrip())
        context, continuation = context[:n_context], context[n_context:] + continuation
        whole, before = (self.tokenizer.encode(text, added=True) for text in (context + continuation, context))
        n = len(whole) - len(before)
        if n <= 0:
            raise InputError(f"the continuation {continuation!r} has no token of its own")
        return whole, n

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of each text. A text longer than the model's longest is cut into pieces.

        The first token of a piece is known: BOS, or the last token of the piece before.
        """
        pieces, counts = [], []
        for (text,) in (request.args for request in requests):
            ids = [self.bos_id, *self.tokenizer.encode(text, bos=False)]
            step = len(ids) if self.longest is None else self.longest - 1
            starts = range(0, max(len(ids) - 1, 1), step)
            pieces += [ids[start : start + step + 1] for start in starts]
            counts.append(len(starts))
        sums = [float(logprobs.sum()) for logprobs in self.model.score_batch(pieces)]
        ends = np.cumsum(counts)
        return [sum(sums[end - count : end]) for end, count in zip(ends, counts, strict=True)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return for each (context, settings) the text that the model generates before a stop string."""
        together: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            together.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(number)
        found = [""] * len(requests)
        for numbers in together.values():
            settings = requests[numbers[0]].args[1]
            texts = self.generated([requests[number].args[0] for number in numbers], settings)
            for number, text in zip(numbers, texts, strict=True):
                found[number] = text
        return found

    def generated(self, contexts: Sequence[str], settings: dict[str, Any]) -> list[str]:
        """Return the texts that follow some contexts, by settings as the harness has them."""
        n_most = int(settings.get("max_gen_toks", _MAX_TOKENS))
        until = settings.get("until") or ()
        temperature = float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0
        prompts = [self.tokenizer.encode(context, added=True) for context in contexts]
        if self.longest is not None:
            prompts = [ids[-max(self.longest - n_most, 1) :] for ids in prompts]
        rows = self.model.generate_batch(
            prompts,
            at_once=self.at_once,
            max_tokens=n_most,
            stop=[until] if isinstance(until, str) else list(until),
            temperature=temperature,
        )
        texts = [""] * len(prompts)
        for row in rows:
            for number, token in enumerate(row):
                texts[number] += "" if token is None else token.text
        return texts
