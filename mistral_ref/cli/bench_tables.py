"""What `mistral-ref bench` prints: the figures of its tests, and those of two files side by side."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from mistral_ref.cli.width import fitted, terminal_width
from mistral_ref.display import markdown_table
from mistral_ref.errors import InputError, escaped, size
from mistral_ref.measure.machine import machine_lines
from mistral_ref.measure.records import Measured, Record, different_conditions, pairs

_HEADINGS = ["model", "size", "params", "backend", "threads", "test", "t/s", "reached", "limit", "others"]
_MEMORY = {"peak_resident": "resident at most", "anonymous": "not mapped from a file"}
_BUSY = 10.0  # percent of the processors' time: if others take more, a line says so


def figures(records: Sequence[Record], description: Record) -> str:
    """Return the table of the records, and below it what they depend on."""
    first = records[0]
    times = ", ".join(f"{name} {first[f'{name}_s']:.2f} s" for name in ("load", "first_token", "compile"))
    memory = ", ".join(f"{size(first[key])} {words}" for key, words in _MEMORY.items() if first[key] is not None)
    throttled = {None: "unknown", 0: "no"}.get(first["throttled"], f"{first['throttled']} times")
    lines = [
        markdown_table(_HEADINGS, [_cells(record) for record in records], terminal_width()),
        "",
        *_busy_lines(records),
        times.replace("_", " "),
        f"memory: {memory or 'unknown'}",
        f"throttled: {throttled}",
        *machine_lines(description),
    ]
    return fitted("\n".join(lines))


def _busy_lines(records: Sequence[Record]) -> list[str]:
    most = max((record["percent_of_others"] or 0.0 for record in records), default=0.0)
    if most <= _BUSY:
        return []
    return [f"others computed too: they took up to {most:.0f}% of the processors' time, so the figures may be too low"]


def _cells(record: Record) -> list[str]:
    unit = "gbs" if "gbs" in record else "gflops"
    return [
        escaped(record["model_type"]),
        size(record["model_size"]),
        parameters(record["model_n_params"]),
        record["backends"],
        str(record["n_threads"]),
        record["test"],
        f"{record['avg_ts']:.2f} ± {record['stddev_ts']:.2f}",
        f"{record[unit]:.1f} {'GB/s' if unit == 'gbs' else 'GFLOP/s'}",
        f"{record['percent_of_limit']:.0f}% of {record[f'{unit}_limit']:.1f}",
        percent(record["percent_of_others"]),
    ]


def parameters(n: int) -> str:
    """Return a number of parameters in billions or millions.

    >>> parameters(7_241_732_096), parameters(2_763_264), parameters(400)
    ('7.24 B', '2.76 M', '0.00 M')
    """
    return f"{n / 1e9:.2f} B" if n >= 10**9 else f"{n / 1e6:.2f} M"


def percent(value: float | None) -> str:
    """Return a number of percent as a cell."""
    return "unknown" if value is None else f"{value:.0f}%"


def comparison(a: Sequence[Measured], b: Sequence[Measured]) -> str:
    """Return the table of the tests that A and B share, what only one of them has, and how their conditions differ.

    B/A compares the medians. The range beside it goes from B's slowest run against A's fastest to B's fastest run
    against A's slowest.
    """
    shared = pairs(a, b)
    if not shared:
        raise InputError(f"A has the tests {_names(a)}, and B has {_names(b)}; expected a test in both")
    headings = ["test", "threads", "A t/s", "B t/s", "B/A", "range", "A of limit", "B of limit"]
    lines = [markdown_table(headings, [_pair_cells(*pair) for pair in shared], terminal_width())]
    for name, side, others in (("A", a, 0), ("B", b, 1)):
        if alone := [one for one in side if all(one is not pair[others] for pair in shared)]:
            lines.append(f"only in {name}: {_names(alone)}")
    return fitted("\n".join([*lines, *different_conditions(a[0].record, b[0].record)]))


def _pair_cells(a: Measured, b: Measured) -> list[str]:
    threads = [str(a.n_threads)] if a.n_threads == b.n_threads else [str(a.n_threads), str(b.n_threads)]
    return [
        a.test,
        ", ".join(threads),
        f"{median(a.rates):.2f}",
        f"{median(b.rates):.2f}",
        f"{median(b.rates) / median(a.rates):.2f}",
        f"{min(b.rates) / max(a.rates):.2f} to {max(b.rates) / min(a.rates):.2f}",
        *(percent(side.percent) for side in (a, b)),
    ]


def _names(records: Sequence[Measured]) -> str:
    return ", ".join(dict.fromkeys(one.test for one in records))
