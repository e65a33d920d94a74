"""Measure a model's directory through mistral_ref itself: the figures of the model card.

    python docs/demo-model/evaluate.py loss  MODEL heldout.json     nats a token and bits a byte of held-out stories
    python docs/demo-model/evaluate.py far   MODEL heldout.json     the same tokens at the start and far past the window
    python docs/demo-model/evaluate.py long  MODEL heldout.json     thousands of tokens written: NaN? a loop?

heldout.json is the list of stories that train.py has written. Every story is scored as BOS, its pieces, EOS.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from pathlib import Path

import numpy as np

import mistral_ref
from mistral_ref.sampling import SamplingSettings, sample


def with_ends(model: mistral_ref.Model, story: str) -> list[int]:
    """Return a story as it is scored."""
    return model.tokenizer.encode(story, bos=True, eos=True)


def loss(model: mistral_ref.Model, stories: list[str]) -> dict[str, object]:
    """Score each story alone. Bits a byte count the story's UTF-8 bytes, without and with the bits that EOS costs."""
    text_nats = eos_nats = 0.0
    tokens = n_bytes = 0
    for story in stories:
        nats = -model.score(with_ends(model, story))
        text_nats, eos_nats = text_nats + nats[:-1].sum(), eos_nats + nats[-1]
        tokens, n_bytes = tokens + len(nats), n_bytes + len(story.encode())
    scored = len(stories)
    return {
        "stories": scored,
        "bytes": n_bytes,
        "tokens, EOS included": tokens,
        "bytes a token": round(n_bytes / (tokens - scored), 3),
        "nats a token, EOS included": round((text_nats + eos_nats) / tokens, 4),
        "nats a token, text alone": round(text_nats / (tokens - scored), 4),
        "bits a byte, EOS included": round((text_nats + eos_nats) / math.log(2) / n_bytes, 4),
        "bits a byte, text alone": round(text_nats / math.log(2) / n_bytes, 4),
    }


def compare(near: list[np.ndarray], far: list[np.ndarray]) -> dict[str, float]:
    """Return both means in nats a token, and by how many percent far is above near, with its standard error.

    The error is that of a ratio of sums over stories, which are what was drawn.
    """
    near_sums, far_sums = np.array([x.sum() for x in near]), np.array([x.sum() for x in far])
    tokens = sum(map(len, near))
    ratio = far_sums.sum() / near_sums.sum()
    error = math.sqrt(len(near)) * np.std(far_sums - ratio * near_sums, ddof=1) / near_sums.sum()
    figures = {"near": near_sums.sum() / tokens, "far": far_sums.sum() / tokens}
    figures |= {"percent above": 100 * (ratio - 1), "standard error": 100 * error}
    return {"tokens": tokens, **{name: round(float(value), 4) for name, value in figures.items()}}


def far(model: mistral_ref.Model, stories: list[str], orders: int, seed: int) -> dict[str, object]:
    """Score the same tokens twice: their story at the start of a sequence, and after more than 10 W L other tokens.

    Stories are laid end to end in several random orders, those at the end repeated in front as the run-up. Compared are
    positions W to 2W of each story, and whole stories.
    """
    W, L = model.config.sliding_window[0], model.config.n_layers
    ids = [with_ends(model, story) for story in stories]
    alone = [-model.score(story) for story in ids]
    near, distant, longest = [], [], 0
    for order in range(orders):
        chosen = random.Random(f"{seed} {order}").sample(range(len(ids)), len(ids))
        run_up: list[int] = []
        for i in reversed(chosen):
            run_up = run_up if len(run_up) > 10 * W * L else ids[i] + run_up
        sequence = run_up + [token for i in chosen for token in ids[i]]
        nats, start = -model.score(sequence), len(run_up)
        longest = max(longest, len(sequence))
        for i in chosen:
            near.append(alone[i])
            distant.append(nats[start : start + len(alone[i])])
            start += len(ids[i])
    in_reach = [(a[W : 2 * W], b[W : 2 * W]) for a, b in zip(near, distant, strict=True) if len(a) > W]
    return {
        "far means beyond position": 10 * W * L,
        "longest sequence": longest,
        "positions W to 2W of a story": compare(*map(list, zip(*in_reach, strict=True))),
        "whole stories": compare(near, distant),
    }


def distinct(ids: list[int], n: int = 8) -> float:
    """Return the share of different runs of n tokens among all runs of n: 1 without repetition, near 0 in a loop."""
    runs = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return round(len(set(runs)) / len(runs), 4)


def write(model: mistral_ref.Model, tokens: int, temperature: float, seed: int) -> list[int]:
    """Write on and on: where a story ends the next begins, in the same cache. Raises if a logit is not finite."""
    rng, settings = np.random.default_rng(seed), SamplingSettings(temperature=temperature)
    bos, eos = model.tokenizer.bos_id, model.tokenizer.eos_id
    cache, ids = model.new_cache(), [bos]
    for _ in range(tokens):
        logits_V = model.forward(ids[cache.length :], cache, last_only=True)[0]
        if not np.isfinite(logits_V).all():
            raise SystemExit(f"a logit is not finite at position {cache.length - 1}")
        ids.append(sample(logits_V, settings, rng, ids))
        if ids[-1] == eos:
            ids.append(bos)
    return ids


def long(model: mistral_ref.Model, stories: list[str], tokens: int, seed: int) -> dict[str, object]:
    """Measure repetition in the last 1000 tokens written, and in every 1000 tokens of the held-out stories."""
    real = [token for story in stories for token in with_ends(model, story)]
    shares = [distinct(real[start : start + 1000]) for start in range(0, len(real) - 999, 1000)]
    result: dict[str, object] = {"held-out stories": {"lowest": min(shares), "mean": round(float(np.mean(shares)), 4)}}
    for temperature in (0.8, 0.0):
        ids = write(model, tokens, temperature, seed)
        ends = [i for i, token in enumerate(ids) if token == model.tokenizer.eos_id]
        result[f"temperature {temperature}"] = {
            "tokens": len(ids),
            "stories ended": len(ends),
            "distinct runs of 8 in the last 1000": distinct(ids[-1000:]),
            "last words": model.tokenizer.decode(ids[-60:]),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=("loss", "far", "long"))
    parser.add_argument("model", type=Path, help="a model's directory")
    parser.add_argument("heldout", type=Path, help="heldout.json as train.py writes it")
    parser.add_argument(
        "--fitting", type=Path, metavar="DIR", help="leave out what a second model has no positions for"
    )
    parser.add_argument("--orders", type=int, default=3, help="far: how many orders of the stories (%(default)s)")
    parser.add_argument("--tokens", type=int, default=4000, help="long: how many tokens to write (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="far: of the orders; long: of the draws (%(default)s)")
    args = parser.parse_args()
    model = mistral_ref.load(args.model)
    stories = json.loads(args.heldout.read_text(encoding="utf-8"))
    if args.fitting is not None:
        other = mistral_ref.load(args.fitting)
        stories = [story for story in stories if len(with_ends(other, story)) <= other.config.max_seq_len]
    if args.measure == "loss":
        result = loss(model, stories)
    elif args.measure == "far":
        result = far(model, stories, args.orders, args.seed)
    else:
        result = long(model, stories, args.tokens, args.seed)
    print(json.dumps(result, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
