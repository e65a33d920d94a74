"""Every kernel against what the machine can do: the bytes that it reads a second, or the multiply-adds.

Groups of measurements, each printed as a Markdown table when it is done:

  decode      products with one vector, as in decoding, against plain reads; weights of every kind, rotated so that no
              cache holds them; int8 and int4 are in groups of 32, with what inputs are rounded to after them;
              "bf16 bfloat16" rounds them to bf16
  prompt      products with T tokens at once, against the multiply-add peak, and NumPy's float32 product beside them,
              with as many BLAS threads; products in bfloat16 against their own peak, where it is higher
  attention   one token over 4096 keys, against plain reads; prompts of 512 and 2048 tokens, against the peak
  depth       one token's attention at growing depths with a sliding window: flat once the window is full

Each sample comes right after one of its limit, and candidates take turns: the last two columns are the ones to trust.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle

import numpy as np
from common import (
    add_output_options,
    add_threads_option,
    add_timing_options,
    buffer_bytes,
    filled_cache,
    finish,
    parser_for,
    rows_with_ranges,
    status,
    write_files,
)
from threadpoolctl import threadpool_limits

from mistral_kernels.pairs import PAIRS_ARE_FASTER
from mistral_ref.compiled_ops import CompiledOps
from mistral_ref.config import ModelConfig, tensor_shapes
from mistral_ref.display import markdown_table
from mistral_ref.errors import checked_int
from mistral_ref.files.quantized_format import quantized_tensors
from mistral_ref.host import available_memory
from mistral_ref.measure import benchmark
from mistral_ref.measure.benchmark import Candidate, Limit, Measurement
from mistral_ref.measure.machine import machine, machine_lines
from mistral_ref.measure.shapes import SHAPES, shape
from mistral_ref.measure.synthetic import fp8_scale, random_weights
from mistral_ref.quantized_matrix import GROUP_SIZE, QuantizedMatrix
from mistral_ref.weights import Kind, Matrix

EXAMPLES = """\
examples:
  python benchmarks/kernels.py                                everything, at the shapes of Mistral 7B: some minutes
  python benchmarks/kernels.py --only decode --threads 1      products of decoding on one core
  python benchmarks/kernels.py --quick --figure out.svg       fewer sizes and samples
"""

KINDS: tuple[Kind, ...] = ("f32", "f16", "bf16", "fp8", "int8", "int4")
QUANTIZED: tuple[Kind, ...] = ("int8", "int4")
ROUNDINGS: dict[Kind, tuple[str, ...]] = {"bf16": ("bfloat16",)} | dict.fromkeys(QUANTIZED, ("int16", "int8"))
SHARES = 48  # of memory: more than a group has candidates; each candidate holds the bytes that are rotated through
TOKENS = (2, 4, 8, 15, 16, 32, 128, 512, 2048)
BLAS_REST = 0.3  # seconds; OpenBLAS's threads go on spinning after a product


@dataclass(frozen=True)
class Bench:
    """What all groups share. `n_bytes` of weights or keys, at least, are gone through before any is read again."""

    config: ModelConfig
    ops: CompiledOps
    n_bytes: int
    quick: bool

    @cached_property
    def rounding_ops(self) -> dict[str, CompiledOps]:
        """Operations for each way to round inputs."""
        n_threads = self.ops.threads
        return {
            "int16": CompiledOps(threads=n_threads, quantized_inputs="int16"),
            "int8": CompiledOps(threads=n_threads, quantized_inputs="int8"),
            "bfloat16": CompiledOps(threads=n_threads, bf16_inputs="bfloat16"),
        }

    def ways(self, kind: Kind) -> list[tuple[str, CompiledOps, Limit]]:
        """What a product with matrices of a kind is called, what computes it, and its limit with many tokens."""
        plain = [] if kind in QUANTIZED else [(kind, self.ops, self.peak)]
        peak = self.peak_of_pairs if kind == "bf16" and PAIRS_ARE_FASTER else self.peak
        return plain + [(f"{kind} {name}", self.rounding_ops[name], peak) for name in ROUNDINGS.get(kind, ())]

    @cached_property
    def read(self) -> Limit:
        return benchmark.read_limit(self.ops.threads, self.n_bytes)

    @cached_property
    def peak(self) -> Limit:
        return benchmark.multiply_add_limit(self.ops.threads)

    @cached_property
    def peak_of_pairs(self) -> Limit:
        return benchmark.multiply_add_limit(self.ops.threads, "pairs")

    @cached_property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """One matrix of each shape that the model has, by its last name, (O, I) each."""
        shapes = {name.split(".")[-2]: shape for name, shape in tensor_shapes(self.config) if len(shape) == 2}
        shapes.setdefault("output", shapes["tok_embeddings"])
        return {name: shapes[name] for name in ("w1", "w2", "wq", "wk", "output")}


def rotated(kind: Kind, n_out: int, n_in: int, n_bytes: int) -> list[Matrix]:
    """Return equal random matrices that together have at least n_bytes."""
    rng, std = np.random.default_rng(0), n_in**-0.5
    scale = fp8_scale(std).reshape(1, 1) if kind == "fp8" else None
    if kind in QUANTIZED:
        parts = quantized_tensors(n_out, n_in, 4 if kind == "int4" else 8, GROUP_SIZE)
        data = rng.integers(0, 256, parts["weight"].shape, np.uint8)
        zeros = np.full(parts["scales"].shape, 128, np.uint8)
        first: Matrix = QuantizedMatrix("random", kind, data, scales=zeros, n_out=n_out, n_in=n_in)
    else:
        data = np.concatenate(list(random_weights(rng, n_out * n_in, std, kind))).reshape(n_out, n_in)
        first = Matrix("random", kind, data, scale)
    return [first, *(deepcopy(first) for _ in range(math.ceil(n_bytes / first.nbytes) - 1))]


def decode_group(bench: Bench) -> list[Candidate]:
    """Products with one vector."""
    rng = np.random.default_rng(1)
    candidates = []
    names = ["w1"] if bench.quick else list(bench.matrices)
    for name, kind in ((name, kind) for name in names for kind in KINDS):
        n_out, n_in = bench.matrices[name]
        matrices = rotated(kind, n_out, n_in, bench.n_bytes)
        x_TI = rng.standard_normal((1, n_in), np.float32)
        for way, ops, _ in bench.ways(kind):
            candidates.append(_product(bench, ops, f"{name} {n_out} x {n_in}, {way}", x_TI, matrices))
    return candidates


def _product(bench: Bench, ops: CompiledOps, name: str, x_TI: np.ndarray, matrices: list[Matrix]) -> Candidate:
    following = cycle(matrices)
    return Candidate(name, lambda: ops.linear(x_TI, next(following)), matrices[0].nbytes / 1e9, bench.read)


def prompt_group(bench: Bench) -> list[Candidate]:
    """Products with T tokens, and NumPy's beside them."""
    rng = np.random.default_rng(2)
    n_out, n_in = bench.matrices["w1"]
    weights = {kind: rotated(kind, n_out, n_in, 1)[0] for kind in KINDS}
    candidates = []
    for n_tokens in (2, 16, 128) if bench.quick else TOKENS:
        x_TI = rng.standard_normal((n_tokens, n_in), np.float32)
        work = 2e-9 * n_tokens * n_out * n_in
        for kind in ("f32", "bf16", *QUANTIZED) if bench.quick else KINDS:
            for way, ops, limit in bench.ways(kind):
                candidates.append(_prompt_product(ops, f"T = {n_tokens}, {way}", x_TI, weights[kind], work, limit))
        candidates.append(_numpy_product(bench, f"T = {n_tokens}, NumPy f32", x_TI, weights["f32"], work))
    return candidates


def _prompt_product(
    ops: CompiledOps, name: str, x_TI: np.ndarray, weight: Matrix, work: float, limit: Limit
) -> Candidate:
    return Candidate(name, lambda: ops.linear(x_TI, weight), work, limit)


def _numpy_product(bench: Bench, name: str, x_TI: np.ndarray, weight: Matrix, work: float) -> Candidate:
    return Candidate(name, lambda: x_TI @ weight.data.T, work, bench.peak, rest=BLAS_REST)


def _attention(bench: Bench, name: str, n_tokens: int, depth: int, window: int | None, dtype: str) -> Candidate:
    """Attend with n tokens after `depth` others; one token does so in as many layers as no cache holds the keys of."""
    config = bench.config
    n_visible = [min(depth + t + 1, window or depth + t + 1) for t in range(n_tokens)]
    key_bytes = 2 * config.n_kv_heads * config.head_dim * np.dtype(dtype).itemsize
    n_layers = 1 if n_tokens > 1 else -(-bench.n_bytes // (n_visible[0] * key_bytes))
    cache = filled_cache(
        config.replace(n_layers=n_layers, sliding_window=(window,) * n_layers), bench.ops, depth, n_tokens, dtype
    )
    rng = np.random.default_rng(4)
    this_pass = cache.begin(n_tokens)
    for layer in range(n_layers):
        k_TGK, v_TGK = rng.standard_normal((2, n_tokens, config.n_kv_heads, config.head_dim), np.float32)
        this_pass.write(layer, k_TGK, v_TGK)
    q_THK = rng.standard_normal((n_tokens, config.n_heads, config.head_dim), np.float32)
    layers = cycle(range(n_layers))

    def run() -> None:
        for _ in bench.ops.attention(q_THK, this_pass.views(next(layers)), None):
            pass

    if n_tokens == 1:
        return Candidate(name, run, n_visible[0] * key_bytes / 1e9, bench.read)
    return Candidate(name, run, 4e-9 * sum(n_visible) * config.n_heads * config.head_dim, bench.peak)


def attention_group(bench: Bench) -> list[Candidate]:
    """One token over many keys; prompts with and without a window."""
    candidates = [
        _attention(bench, f"1 token, 4096 keys in {dtype}", 1, 4095, None, dtype) for dtype in bench.ops.cache_dtypes
    ]
    prompts = [(512, None), (512, 128)] if bench.quick else [(512, None), (512, 128), (2048, None)]
    for n_tokens, window in prompts:
        name = f"{n_tokens} tokens, {'no window' if window is None else f'window {window}'}"
        candidates.append(_attention(bench, name, n_tokens, 0, window, "float32"))
    return candidates


def depth_group(bench: Bench) -> list[Candidate]:
    """One token at depths from a quarter of the window to four times the window."""
    window = bench.config.sliding_window[0] or 4096
    depths = [window // 4, window, 4 * window] if bench.quick else [window * 2**i // 4 for i in range(5)]
    return [_attention(bench, f"depth {depth}, window {window}", 1, depth, window, "float32") for depth in depths]


GROUPS: dict[str, Callable[[Bench], list[Candidate]]] = {
    "decode": decode_group,
    "prompt": prompt_group,
    "attention": attention_group,
    "depth": depth_group,
}


def beside_numpy(measured: list[Measurement]) -> list[list[str]]:
    """Return table rows: each product's speed as a multiple of NumPy's for the same tokens, run by run."""
    numpy_rates = {m.name.partition(",")[0]: m.rates for m in measured if "NumPy" in m.name}
    rows = []
    for measurement in measured:
        tokens = measurement.name.partition(",")[0]
        if tokens in numpy_rates and "NumPy" not in measurement.name:
            times = benchmark.spread(benchmark.ratios(measurement.rates, numpy_rates[tokens]))
            rows.append([measurement.name, *times.text(2)])
    return rows


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = parser_for(__doc__, EXAMPLES)
    parser.add_argument("--only", action="append", choices=GROUPS, help="measure this group alone; may be repeated")
    parser.add_argument("--shape", default="mistral-7b", help=f"{', '.join(SHAPES)} (default: %(default)s)")
    add_threads_option(parser)
    add_timing_options(parser)
    parser.add_argument(
        "--buffer-mib",
        type=int,
        metavar="N",
        help="weights and keys to rotate through (default: 4 caches or 256, as far as memory has room)",
    )
    add_output_options(parser, "fewer sizes and samples", "each product's share of its limit")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> None:
    """Measure what was asked for; print tables, and write the file."""
    available = available_memory()
    n_bytes = buffer_bytes() if available is None else min(buffer_bytes(), available // SHARES)
    if arguments.buffer_mib is not None:
        n_bytes = checked_int("buffer-mib", arguments.buffer_mib, least=1) * 2**20
    if arguments.quick:
        arguments.repeats, arguments.seconds = min(3, arguments.repeats), min(0.03, arguments.seconds)
    bench = Bench(shape(arguments.shape), CompiledOps(threads=arguments.threads), n_bytes, arguments.quick)
    description = machine(bench.ops.threads) | {"shape": arguments.shape, "rotated_mib": n_bytes / 2**20}
    print("\n".join(machine_lines(description)))
    results = {}
    with bench.ops.running(), threadpool_limits(limits=bench.ops.threads, user_api="blas"):
        for group in arguments.only or GROUPS:
            status(f"{group}: making weights and keys")
            measured = benchmark.alternate(
                GROUPS[group](bench),
                repeats=arguments.repeats,
                seconds=arguments.seconds,
                progress=lambda text, group=group: status(f"{group}: {text}"),
            )
            status()
            print(f"\n## {group}\n\n{markdown_table(benchmark.HEADINGS, [m.cells() for m in measured])}")
            if rows := beside_numpy(measured):
                print(f"\n{markdown_table(['times as fast as NumPy', 'median', 'min to max'], rows)}")
            if group == "depth":
                shorter, deepest = measured[-2:]
                times, extremes = benchmark.spread(benchmark.ratios(deepest.seconds, shorter.seconds)).text(2)
                print(f"\n{deepest.name} takes {times} ({extremes}) times as long as {shorter.name}")
            results[group] = [m.as_json() for m in measured]
    panels = {
        group: {result["name"]: [100 * share for share in result["shares"]] for result in rows}
        for group, rows in results.items()
    }
    heading = "Kernels against what the machine can do"
    content = {"machine": description, "groups": results}
    write_files(arguments, content, lambda: rows_with_ranges(panels, heading, "% of the limit"))


if __name__ == "__main__":
    sys.exit(finish(measure, parse_arguments()))
