"""load: a directory becomes a Model."""

from __future__ import annotations

import os
from pathlib import Path

from mistral_ref.activations import Activations
from mistral_ref.config import ModelConfig
from mistral_ref.errors import ConfigError, InputError, Progress, TokenizerError, short_repr, warn
from mistral_ref.files.build_weights import open_model
from mistral_ref.files.checkpoint import checked_directory
from mistral_ref.files.config_files import read_eos_ids
from mistral_ref.files.quantization import Scheme, checked_bits, quantized_weights
from mistral_ref.model import Model
from mistral_ref.reference_ops import ReferenceOps
from mistral_ref.rope import AnglePrecision
from mistral_ref.text import OTHER_FORMATS, SentencePieceTokenizer, find_tokenizer, load_tokenizer
from mistral_ref.weights import repacked

DEMO_MODEL = Path(__file__).parent / "demo_model"


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    backend: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    rope_angles: AnglePrecision = "float64",
    repack: bool = False,
    quantize: int | None = None,
    activations: Activations | None = None,
    progress: Progress | None = None,
) -> Model:
    """Return the model in a directory, weights mapped, not copied; without a path the demonstration model.

    path          directory with params.json or config.json, safetensors in either published layout, and a tokenizer
    backend       "numba", compiled kernels, or "numpy", the plain mathematics; by default the first that has the dtype
    dtype         of all activations: "float32", or "float64" for the oracle, with NumPy alone
    threads       None: for "numba" as in MISTRAL_REF_THREADS, or as many as there are performance cores; for "numpy"
                  as many as its products use already
    rope_angles   "float32" rounds RoPE's angles as the published implementations do
    repack        copy matrices of 16 bits into the order in which the kernels read them fastest. Decoding gets a few
                  percent faster, a prompt of 2 to 24 tokens up to three times slower; memory grows by the size of these
                  matrices, and loading takes seconds a GB
    quantize      8 or 4: round the weights to so many bits, in memory, as `mistral_ref.quantize` does for good
    activations   what the inputs of quantized matrices are rounded to: "int16", "int8", which is faster and less exact,
                  or "float", not at all, with NumPy alone; None: "int16", and "float" with dtype="float64". "bfloat16"
                  rounds the inputs of bf16 matrices instead, to 8 bits, as other runtimes do: prompts are twice as
                  fast on AMD's processors with AVX512_BF16, and decoding a little faster
    progress      called with (done, in all) while repacking (matrices) or rounding (weights)

    Raises a MistralRefError that names the file and what is wrong with it; warns (MistralRefWarning) of what was
    assumed or left aside.
    """
    directory = checked_directory(DEMO_MODEL if path is None else path)
    ops = _make_ops(backend, dtype, threads, rope_angles, activations)
    scheme = None if quantize is None else Scheme(checked_bits("quantize", quantize))
    config, weights = open_model(directory)
    if scheme is not None:
        weights = quantized_weights(weights, scheme, progress)
    if repack:
        weights = repacked(weights, progress)
    tokenizer, eos_ids = _text_side(directory, config)
    return Model(config, weights, ops, tokenizer=tokenizer, eos_ids=eos_ids)


def _make_ops(
    backend: str | None, dtype: str, threads: int | None, angles: AnglePrecision, activations: Activations | None
) -> ReferenceOps:
    """Return the operations of a backend: "numba", "numpy", or None for the first of the two that has the dtype."""
    if backend not in (None, "numba", "numpy"):
        raise InputError(f"backend is {short_repr(backend)}; expected 'numba' or 'numpy'")
    if backend == "numpy" or (backend is None and dtype == "float64"):
        return ReferenceOps(dtype, threads=threads, angles=angles, activations=activations)
    if dtype != "float32":
        raise InputError(f"dtype is {short_repr(dtype)}; expected 'float32' with backend='numba', which has no other")
    try:  # here, since Numba takes a third of a second, and NumPy alone goes without
        from mistral_ref.compiled_ops import CompiledOps  # noqa: PLC0415
    except (ImportError, ValueError) as error:
        raise InputError(f"backend 'numba' cannot be used: {error}; backend='numpy' goes without") from None
    return CompiledOps(threads=threads, angles=angles, activations=activations)


def _text_side(directory: Path, config: ModelConfig) -> tuple[SentencePieceTokenizer | None, tuple[int, ...]]:
    """Return the tokenizer of a directory, None where there is none that can be read, and the ids that end a text."""
    eos_ids = read_eos_ids(directory)
    if eos_ids and max(eos_ids) >= config.vocab_size:
        raise ConfigError(f"{directory}: eos_token_id is {max(eos_ids)}; expected 0 to {config.vocab_size - 1}")
    if find_tokenizer(directory) is None:
        if others := [name for name in OTHER_FORMATS if (directory / name).exists()]:
            warn(f"{directory}: holds {others[0]}, but this version reads SentencePiece only; prompts are token ids")
        return None, eos_ids
    tokenizer = load_tokenizer(directory)
    if tokenizer.vocab_size > config.vocab_size:
        raise TokenizerError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size} pieces; "
            f"expected at most the model's vocabulary of {config.vocab_size}"
        )
    return tokenizer, eos_ids
