"""Print how far each step of a float32 pass lies from the float64 oracle, over the golden families.

    python tests/measure_rounding.py

Columns, in float32 ulps of the step's largest value, for NumPy and for the compiled kernels: what a step adds by
itself, and what has come together since the embedding, at 24 and at 96 tokens. support/tiny.py holds the bounds.
"""

from __future__ import annotations

from collections import defaultdict

from support.checkpoints import FAMILIES
from support.tiny import BACKENDS, distances_in_ulps

SEEDS = 20


def largest(n_tokens: int, *, own: bool, backend: str) -> dict[str, float]:
    """Return the largest distance of each kind of step over all families and seeds."""
    distances: dict[str, float] = defaultdict(float)
    for family in FAMILIES.values():
        for seed in range(SEEDS):
            for name, ulps in distances_in_ulps(family.config, n_tokens, seed, own=own, backend=backend).items():
                kind = name.rpartition(".")[2]
                distances[kind] = max(distances[kind], ulps)
    return distances


if __name__ == "__main__":
    settings = [(own, n_tokens, backend) for own in (True, False) for n_tokens in (24, 96) for backend in BACKENDS]
    columns = [largest(n_tokens, own=own, backend=backend) for own, n_tokens, backend in settings]
    titles = [f"{'own' if own else 'all'} {n_tokens} {backend}" for own, n_tokens, backend in settings]
    print(f"{len(FAMILIES)} families, {SEEDS} random models each")
    print("| step | " + " | ".join(titles) + " |\n|---" + "|--:" * len(titles) + "|")
    for kind in columns[0]:
        print(f"| `{kind}` | " + " | ".join(f"{column[kind]:.1f}" for column in columns) + " |")
