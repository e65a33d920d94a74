"""Print how far each step of a float32 pass lies from the float64 oracle, over the golden families.

    python tests/measure_rounding.py

Columns, in float32 ulps of the step's largest value: what a step adds by itself, and what has come together since the
embedding, at 24 and at 96 tokens. test_reference_ops.py holds the bounds.
"""

from __future__ import annotations

from collections import defaultdict

from checkpoints import FAMILIES
from test_reference_ops import distances_in_ulps

SEEDS = 20


def largest(n_tokens: int, *, own: bool) -> dict[str, float]:
    """Return the largest distance of each kind of step over all families and seeds."""
    distances: dict[str, float] = defaultdict(float)
    for family in FAMILIES.values():
        for seed in range(SEEDS):
            for name, ulps in distances_in_ulps(family.config, n_tokens, seed, own=own).items():
                kind = name.rpartition(".")[2]
                distances[kind] = max(distances[kind], ulps)
    return distances


if __name__ == "__main__":
    columns = [largest(n_tokens, own=own) for own in (True, False) for n_tokens in (24, 96)]
    print(f"{len(FAMILIES)} families, {SEEDS} random models each")
    print(f"{'step':<26}{'own, 24':>10}{'own, 96':>10}{'all, 24':>10}{'all, 96':>10}")
    for kind in columns[0]:
        print(f"{kind:<26}" + "".join(f"{column[kind]:>10.1f}" for column in columns))
