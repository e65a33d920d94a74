"""What fewer bits a weight cost in quality: how far a model's predictions move, beside llama.cpp's formats.

Every way to round the weights goes through the same text, cut into windows that begin with BOS, and is held against the
weights as they are, token by token:

  KL          the mean of sum p ln(p / q) in nats, where p is what the weights as they are predict: 0 if nothing changed
  perplexity  of the text
  same        how often the likeliest next token is the same

Ours: "int4 g32 int16" has 4 bits in groups of 32 and rounds the inputs of products to int16; "bf16 bfloat16" leaves the
weights as they are and rounds the inputs of those in bf16 to bf16. llama.cpp's formats are those of its own library
(K types and IQ4_NL) or of the package gguf (the others), widened again and computed with in float32: what the weights
lose, without what its products lose. Embedding and output have 8 bits everywhere: ours beside ours, Q8_0 beside theirs.
Rows that their blocks do not divide are filled up with zeros. Peers need: pip install gguf
llama-cpp-python; what is not installed is left out.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import common
import numpy as np
from common import finish, notice, parser_for, status

import mistral_ref
from mistral_ref.display import markdown_table
from mistral_ref.errors import InputError, checked_int
from mistral_ref.files.quantization import Scheme, quantized_weights
from mistral_ref.loading import DEMO_MODEL
from mistral_ref.measure.machine import machine, machine_lines
from mistral_ref.model import Model
from mistral_ref.sampling import log_softmax
from mistral_ref.weights import Matrix, Weights, matrices, with_matrices

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EXAMPLES = """\
examples:
  python benchmarks/quality.py STORIES.txt                        the demonstration model
  python benchmarks/quality.py --model DIR BOOK.txt --tokens 8192 --figure quality.svg
  python benchmarks/quality.py --model DIR --ids IDS.json         token ids, for a model without a tokenizer
"""

OURS: dict[str, tuple[Scheme | None, dict[str, Any]]] = {
    f"int{bits} g{group_size} {inputs}": (Scheme(bits, group_size), {"quantized_inputs": inputs})
    for bits, group_size, inputs in (
        (8, 32, "int16"), (8, 32, "int8"), (8, 64, "int16"),
        (4, 32, "float"), (4, 32, "int16"), (4, 32, "int8"), (4, 64, "int16"), (4, 128, "int16"),
    )
} | {"bf16 bfloat16": (None, {"bf16_inputs": "bfloat16"})}  # fmt: skip
THEIRS = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0", "IQ4_NL", "Q3_K", "Q2_K")
AROUND = ("tok_embeddings", "output")
QUICK_TOKENS = 2048


@dataclass(frozen=True)
class Variant:
    """A way to round a model: its name, its bits a weight, and the model."""

    name: str
    bits: float
    model: Model


@dataclass(frozen=True)
class Quality:
    """What a variant came to, for every token: KL (N,), nats of the next token (N,), and whether the likeliest is."""

    variant: Variant
    divergences: np.ndarray
    nlls: np.ndarray
    agrees: np.ndarray

    def cells(self) -> list[str]:
        """Return a row of the table."""
        error = self.divergences.std() / np.sqrt(self.divergences.size)
        perplexity, same = np.exp(self.nlls.mean()), 100 * self.agrees.mean()
        name, bits = self.variant.name, f"{self.variant.bits:.2f}"
        return [name, bits, f"{self.divergences.mean():.3e}", f"{error:.0e}", f"{perplexity:.4f}", f"{same:.2f}"]


def ours(model: Model, names: Sequence[str]) -> Iterator[Variant]:
    """Yield our ways of these names."""
    for name in (name for name in names if name in OURS):
        scheme, rounding = OURS[name]
        weights = model.weights if scheme is None else quantized_weights(model.weights, scheme)
        backend = "numpy" if "float" in rounding.values() else "numba"
        ops = mistral_ref.load(backend=backend, **rounding).ops
        yield Variant(name, bits_a_weight(weights), Model(model.config, weights, ops))


def theirs(model: Model, names: Sequence[str]) -> Iterator[Variant]:
    """Yield llama.cpp's of these names, as far as what they need is installed."""
    for name in (name for name in names if name in THEIRS):
        needs = ("gguf", "llama_cpp") if rounded_by_llama(name) else ("gguf",)
        missing = [module for module in needs if importlib.util.find_spec(module) is None]
        if missing:
            notice(f"{name} is left out: {', '.join(missing)} is not installed")
        else:
            yield in_gguf(name, model)


def rounded_by_llama(name: str) -> bool:
    """Return whether the package gguf cannot round to a type, so that llama.cpp's own library has to."""
    return name.endswith("_K") or name.startswith("IQ")


def in_gguf(name: str, model: Model) -> Variant:
    """Return a model rounded to one of llama.cpp's types, embedding and output to Q8_0."""
    rounding, around = through_gguf(name), through_gguf("Q8_0")
    n_bits: dict[str, float] = {}

    def change(matrix: Matrix) -> Matrix:
        if matrix.name.endswith("feed_forward.gate"):
            n_bits[matrix.name] = 8 * matrix.nbytes
            return matrix
        values, bits = (around if matrix.name in AROUND else rounding)(matrix.rows(slice(None), np.float32))
        n_bits[matrix.name] = bits * matrix.size
        return Matrix(matrix.name, "f32", values)

    weights = with_matrices(model.weights, change)
    total = sum(matrix.size for matrix in matrices(model.weights))
    return Variant(name, sum(n_bits.values()) / total, Model(model.config, weights, model.ops))


def through_gguf(name: str) -> Callable[[np.ndarray], tuple[np.ndarray, float]]:
    """Return a function that rounds a matrix (O, I) to one of llama.cpp's types: what it becomes, and bits a weight."""
    import gguf  # noqa: PLC0415 (a peer's)

    kind = gguf.GGMLQuantizationType[name]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]

    def rounded(rows: np.ndarray) -> np.ndarray:
        if not rounded_by_llama(name):
            return gguf.quants.quantize(rows, kind)
        packed = np.empty((len(rows), rows.shape[1] // block * block_bytes), np.uint8)
        pointers = (array.ctypes.data_as(ctypes.c_void_p) for array in (rows, packed))
        wholes = (ctypes.c_int64(number) for number in (0, *rows.shape))
        quantize_chunk = _ggml().ggml_quantize_chunk
        quantize_chunk(ctypes.c_int(kind.value), *pointers, *wholes, ctypes.c_void_p(None))
        return packed

    def round_trip(matrix_OI: np.ndarray) -> tuple[np.ndarray, float]:
        n_in = matrix_OI.shape[1]
        filled = np.pad(matrix_OI, ((0, 0), (0, -n_in % block)))
        values = gguf.quants.dequantize(rounded(filled), kind)[:, :n_in]
        return np.ascontiguousarray(values, np.float32), 8 * block_bytes / block

    return round_trip


def _ggml() -> ctypes.CDLL:
    """Return the library of llama.cpp that rounds."""
    import llama_cpp  # noqa: PLC0415 (a peer's)

    found = sorted((Path(llama_cpp.__file__).parent / "lib").glob("*ggml-base.*"))
    if not found:
        raise InputError("llama_cpp has no library ggml-base beside it, which rounds to its types")
    return ctypes.CDLL(str(found[0]))


def bits_a_weight(weights: Weights) -> float:
    """Return the bits of matrices in all for each weight in them."""
    every = matrices(weights)
    return 8 * sum(matrix.nbytes for matrix in every) / sum(matrix.size for matrix in every)


def quality(variant: Variant, model: Model, windows: Sequence[list[int]]) -> Quality:
    """Take all windows through both, one after the other."""
    divergences, nlls, agrees = [], [], []
    for ids in windows:
        p, q = (log_softmax(one.forward(ids).astype(np.float64)) for one in (model, variant.model))
        divergences.append((np.exp(p) * (p - q)).sum(axis=-1))
        nlls.append(-q[np.arange(len(ids) - 1), ids[1:]])
        agrees.append(p.argmax(axis=-1) == q.argmax(axis=-1))
    return Quality(variant, *map(np.concatenate, (divergences, nlls, agrees)))


def windows_of(arguments: argparse.Namespace, model: Model) -> list[list[int]]:
    """Return the text as windows of token ids, each with BOS in front where there is a tokenizer."""
    if (arguments.file is None) == (arguments.ids is None):
        raise InputError("expected a FILE with text, or --ids")
    path = Path(arguments.file if arguments.ids is None else arguments.ids)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    bos_id = None if model.tokenizer is None else model.tokenizer.bos_id
    first = [] if bos_id is None else [bos_id]
    if arguments.ids is None:
        if model.tokenizer is None:
            raise InputError(f"{arguments.model}: holds no tokenizer; expected --ids")
        ids = model.tokenizer.encode(text, bos=False)
    else:
        try:
            ids = model.token_ids(json.loads(text))
        except ValueError as error:
            raise InputError(f"{path}: expected a list of token ids: {error}") from None
    n_tokens = QUICK_TOKENS if arguments.quick and arguments.tokens is None else arguments.tokens
    if n_tokens is not None:
        ids = ids[: checked_int("tokens", n_tokens, least=2)]
    length = checked_int("context", arguments.context, least=2, most=model.config.max_seq_len) - len(first)
    windows = [first + ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    if not windows:
        raise InputError(f"{path}: {len(ids)} tokens; expected at least {length}, one window")
    return windows


def draw(results: Sequence[Quality]) -> Axes:
    """Draw the KL of every way to round, the fewest bits a weight first."""
    from mistral_ref.study.drawing import BLUE, VERMILLION, axes_or_new, title  # noqa: PLC0415

    ordered = sorted(results, key=lambda result: (result.variant.bits, float(result.divergences.mean())))
    ax, handles = axes_or_new(None, 6.4, 1.0 + 0.3 * len(ordered)), []
    for is_ours, color, marker, label in ((True, BLUE, "o", "ours"), (False, VERMILLION, "s", "llama.cpp's formats")):
        rows = [row for row, result in enumerate(ordered) if (result.variant.name in OURS) == is_ours]
        if rows:
            values = [float(ordered[row].divergences.mean()) for row in rows]
            handles += ax.plot(values, rows, marker, color=color, ms=5, label=label)
    names = [f"{result.variant.name}   {result.variant.bits:.2f} bits" for result in ordered]
    ax.set(xscale="log", xlabel="KL to the weights as they are, nats a token", yticks=range(len(names)))
    ax.set_yticklabels(names)
    ax.invert_yaxis()
    ax.grid(axis="y", alpha=0.3)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    title(ax, "How far predictions move, by how weights are rounded", handles)
    return ax


def parse_arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = parser_for(__doc__, EXAMPLES)
    parser.add_argument("file", nargs="?", metavar="FILE", help="text")
    parser.add_argument("--model", default=DEMO_MODEL, metavar="DIR", help="default: the demonstration model")
    parser.add_argument("--ids", metavar="FILE", help="a JSON list of token ids instead of a text")
    every = [*OURS, *THEIRS]
    parser.add_argument("--only", nargs="+", choices=every, default=every, metavar="NAME", help=", ".join(every))
    parser.add_argument("--context", type=int, default=256, metavar="N", help="of a window (default: %(default)s)")
    parser.add_argument("--tokens", type=int, metavar="N", help="take only the first N (default: all)")
    common.add_threads_option(parser)
    common.add_output_options(parser, f"the first {QUICK_TOKENS} tokens", "KL against bits a weight")
    return parser.parse_args()


def measure(arguments: argparse.Namespace) -> None:
    """Measure all ways, print the table, and write the files."""
    model = mistral_ref.load(arguments.model, threads=arguments.threads)
    windows = windows_of(arguments, model)
    about = {"model": Path(arguments.model).name, "windows": len(windows), "context": arguments.context}
    as_it_is = Variant("as it is", bits_a_weight(model.weights), model)
    description = machine(model.ops.threads) | about | {"text": Path(arguments.file or arguments.ids).name}
    print("\n".join(machine_lines(description)))
    results = []
    for variant in chain([as_it_is], ours(model, arguments.only), theirs(model, arguments.only)):
        status(f"{variant.name}, {variant.bits:.2f} bits a weight")
        results.append(quality(variant, model, windows))
    headings = ["rounded to", "bits a weight", "KL", "±", "perplexity", "same %"]
    status()
    print(f"\n{markdown_table(headings, [result.cells() for result in results])}")
    rows = [
        {
            "name": result.variant.name,
            "bits_a_weight": result.variant.bits,
            "kl": float(result.divergences.mean()),
            "kl_error": float(result.divergences.std() / np.sqrt(result.divergences.size)),
            "perplexity": float(np.exp(result.nlls.mean())),
            "same": float(result.agrees.mean()),
            "tokens": result.divergences.size,
        }
        for result in results
    ]
    common.write_files(arguments, {"machine": description, "results": rows}, lambda: draw(results[1:]))


if __name__ == "__main__":
    sys.exit(finish(measure, parse_arguments()))
