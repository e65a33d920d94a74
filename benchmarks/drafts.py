"""How much sooner a text comes with drafts: by lookup, whether or not the text quotes its prompt, and by a model.

Weights are random, so the model would write nonsense. A logits processor therefore forces the tokens of a given text.
The draft model is a tenth as large, and computes all that a draft computes. But its tokens are scripted: they agree
with the text at a given rate. Sampling is measured too, the prompt is not. With and without drafts take turns; a gain
is the ratio of such a pair.

    quoting         pieces of 16 to 48 tokens of the prompt, with 3 new tokens before each: editing, summing up
    not quoting     tokens as common as words are, the commonest in every tenth place: two of them often meet again
    draft model     new tokens; of the drafted ones 70 percent agree
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from common import add_threads_option, finish, parser_for, random_model, status

from mistral_ref.cache import KVCache
from mistral_ref.compiled_ops import CompiledOps
from mistral_ref.display import markdown_table
from mistral_ref.drafts import DraftModel, Guess
from mistral_ref.errors import checked_int
from mistral_ref.generation import Generation
from mistral_ref.measure.benchmark import ratios, spread, write_json
from mistral_ref.measure.machine import machine, machine_lines
from mistral_ref.measure.shapes import SHAPES, shape
from mistral_ref.model import Model

EXAMPLES = """\
examples:
  python benchmarks/drafts.py --quick
  python benchmarks/drafts.py --layers 4 --tokens 256 --json drafts.json
"""
PROMPT = 400  # tokens
RATE = 0.7  # of the scripted draft's tokens that agree
TARGETS = {("quoting", "bf16"): 2.0, ("quoting", "int4"): 1.5, ("not quoting", "bf16"): 0.97,
           ("not quoting", "int4"): 0.97, ("draft model", "bf16"): 1.5}  # fmt: skip


class ScriptedDraft(DraftModel):
    """A draft model that computes as any does, and then drafts the tokens of a text, or at some places others."""

    def __init__(self, draft: Model, text: Sequence[int]) -> None:
        super().__init__(draft, draft.new_cache(), draft.config.vocab_size, None, None)
        agrees = np.random.default_rng(1).random(len(text)) < RATE
        wrong = [(token + 1) % self._n_ids for token in text]
        self._script = np.where(agrees, text, wrong).tolist()

    def _choose(self, logits_V: np.ndarray, text: Sequence[int]) -> Guess:
        super()._choose(logits_V, text)
        return Guess(self._script[len(text)] if len(text) < len(self._script) else 0)


def common_tokens(n: int, n_ids: int, rng: np.random.Generator) -> list[int]:
    """Return tokens of which few are common and most are rare, as words are (Zipf's law)."""
    shares = 1 / np.arange(1, n_ids + 1)
    return rng.choice(n_ids, n, p=shares / shares.sum()).tolist()


def quoting(prompt: list[int], n: int, n_ids: int, rng: np.random.Generator) -> list[int]:
    """Return a text that quotes its prompt again and again."""
    text: list[int] = []
    while len(text) < n:
        start = int(rng.integers(0, len(prompt) - 48))
        text += rng.integers(0, n_ids, 3).tolist() + prompt[start : start + int(rng.integers(16, 49))]
    return text[:n]


class Forced:
    """A model that is made to write a text behind a prompt."""

    def __init__(self, model: Model, prompt: list[int], text: list[int]) -> None:
        self.model, self.whole, self.n = model, prompt + text, len(text)
        self.last = prompt[-1]
        self.before: KVCache = model.new_cache()
        model.forward(prompt[:-1], self.before, last_only=True)

    def run(self, **options: Any) -> tuple[float, Generation]:
        """Return the seconds that the text takes from its second token on, when the draft has read the prompt."""
        start = len(self.whole) - self.n - 1  # the generation's own prompt is one token

        def force(ids: list[int], logits_V: np.ndarray) -> np.ndarray:
            logits_V[self.whole[start + len(ids)]] = logits_V.max() + 1
            return logits_V

        cache = self.before.copy()
        tokens = self.model.generate([self.last], max_tokens=self.n, cache=cache, logits_processor=force, **options)
        next(tokens), next(tokens)
        started = time.perf_counter()
        for _ in tokens:
            pass
        return time.perf_counter() - started, tokens


def scripted(draft: Model, text: list[int]) -> Callable[..., ScriptedDraft | None]:
    """Return what takes the place of `Model._drafter`: the scripted draft, if a draft model is given."""
    return lambda lookup, given, *_: ScriptedDraft(draft, text) if given else None


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = parser_for(__doc__ or "", EXAMPLES)
    parser.add_argument("--shape", default="mistral-7b", help=f"{', '.join(SHAPES)} (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=2, metavar="N", help="of that shape (default: %(default)s)")
    parser.add_argument(
        "--draft-layers", type=int, default=6, metavar="N", help="of the draft, of stories-110m (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", dest="kinds", nargs="+", choices=["bf16", "int8", "int4"], default=["bf16", "int4"],
        help="of the weights, one after another (default: bf16 int4)",
    )  # fmt: skip
    add_threads_option(parser)
    parser.add_argument("--tokens", type=int, default=192, metavar="N", help="of a text (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="pairs of runs (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="96 tokens, three pairs: two or three minutes")
    parser.add_argument("--json", metavar="FILE", help="write the machine and every sample there")
    return parser.parse_args()


def measured(name: str, kind: str, forced: Forced, repeats: int, options: dict[str, Any]) -> dict[str, Any]:
    """Return the seconds of every run with and without drafts, and how much was accepted in the last one."""
    plain, drafted = [], []
    forced.run(**options)
    for repeat in range(repeats):
        status(f"{kind}, {name}: {repeat + 1} of {repeats}")
        for is_plain in (repeat % 2 == 0, repeat % 2 == 1):  # neither always comes first
            if is_plain:
                plain.append(forced.run()[0])
            else:
                seconds, tokens = forced.run(**options)
                drafted.append(seconds)
    counts = {"drafted": tokens.drafted, "accepted": tokens.accepted, "tokens": forced.n}
    return {"name": name, "kind": kind, "plain": plain, "with_drafts": drafted} | counts


def measure(arguments: argparse.Namespace) -> None:
    """Measure every case with weights of every kind; print a table, and write the file."""
    n = 96 if arguments.quick else checked_int("tokens", arguments.tokens, least=8)
    repeats = 3 if arguments.quick else checked_int("repeats", arguments.repeats, least=1)
    results = []
    for kind in arguments.kinds:
        status(f"{kind}: making weights")
        ops = CompiledOps(threads=arguments.threads)
        model = random_model(shape(arguments.shape, layers=arguments.layers, window=0), kind, ops)
        n_ids, rng = model.config.vocab_size, np.random.default_rng(0)
        draft_config = shape("stories-110m", layers=arguments.draft_layers).replace(vocab_size=n_ids)
        draft = random_model(draft_config, kind, ops)
        prompt = rng.integers(0, n_ids, PROMPT).tolist()
        new, common = rng.integers(0, n_ids, n).tolist(), common_tokens(n, n_ids, rng)
        cases = {"quoting": quoting(prompt, n, n_ids, rng), "not quoting": common, "draft model": new}
        for name, text in cases.items():
            forced = Forced(model, common_tokens(PROMPT, n_ids, rng) if name == "not quoting" else prompt, text)
            options: dict[str, Any] = {"lookup": True}
            if name == "draft model":
                options = {"draft": draft}
                model._drafter = scripted(draft, forced.whole)  # type: ignore[method-assign]
            results.append(measured(name, kind, forced, repeats, options))
        size = f"the draft has {draft.config.n_parameters / model.config.n_parameters:.0%} of its parameters"
    status()
    rows = []
    for result in results:
        gain = spread(ratios(result["plain"], result["with_drafts"]))
        rate = spread([(result["tokens"] - 2) / seconds for seconds in result["plain"]]).median
        target = TARGETS.get((result["name"], result["kind"]))
        counts = f"{result['accepted']} of {result['drafted']}"
        rows.append([result["kind"], result["name"], f"{rate:.1f}", *gain.text(2), counts, f"{target or ''}"])
    about = machine(ops.threads)
    print("\n".join(machine_lines(about)))
    print(f"{arguments.layers} layers of {arguments.shape}; {size}; {n} forced tokens after {PROMPT} others\n")
    print(markdown_table(["weights", "text", "tokens/s", "gain", "min to max", "accepted", "target"], rows))
    if arguments.json:
        write_json(arguments.json, {"machine": about, "results": results})


if __name__ == "__main__":
    sys.exit(finish(measure, parse_arguments()))
