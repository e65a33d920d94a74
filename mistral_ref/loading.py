"""load: make a Model of the files in a directory."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mistral_ref.config import MAX_VALUES, ModelConfig
from mistral_ref.errors import (
    ConfigError,
    InputError,
    OnCompile,
    Progress,
    TokenizerError,
    UnknownTokenizerError,
    checked_function,
    checked_int,
    short_repr,
    warn,
)
from mistral_ref.files.adapters import Source, with_adapters
from mistral_ref.files.build_weights import model_in, open_gguf_of
from mistral_ref.files.generation_config import read_eos_ids
from mistral_ref.files.gguf import GGUF
from mistral_ref.files.gguf_config import gguf_eos_ids, lost_window
from mistral_ref.files.paths import checked_model
from mistral_ref.files.quantization import Scheme, checked_bits, quantized_weights, rounded_bytes
from mistral_ref.host import require_memory
from mistral_ref.model import Model
from mistral_ref.reference_ops import ReferenceOps
from mistral_ref.rope import AnglePrecision
from mistral_ref.rounded_inputs import Bf16Inputs, QuantizedInputs
from mistral_ref.text import Tokenizer, find_tokenizer, load_tokenizer
from mistral_ref.text.gguf_tokenizer import gguf_tokenizer, has_tokenizer

DEMO_MODEL = Path(__file__).parent / "demo_model"
_ROUNDED_HINT = (
    "mistral-ref quantize writes them to files, which are mapped; load(check_memory=False), --no-memory-check tries it"
)


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    backend: str | None = None,
    dtype: str = "float32",
    threads: int | None = None,
    rope_angles: AnglePrecision = "float64",
    quantize: int | None = None,
    window: int | None = None,
    adapters: Iterable[Source | tuple[Source, float]] = (),
    quantized_inputs: QuantizedInputs | None = None,
    bf16_inputs: Bf16Inputs = "float32",
    check_memory: bool = True,
    progress: Progress | None = None,
    on_compile: OnCompile | None = None,
) -> Model:
    """Return the Model in a directory or a GGUF file. Its weights are mapped, not copied.

    path          directory with params.json or config.json, safetensors in either published layout, and a tokenizer; or
                  a GGUF file, the first of its shards, or a directory with one GGUF file and no safetensors; or, if
                  there is no such path, the name of a model in the hub's cache: "org/name", "org/name@REVISION" or
                  "org/name/FILE.gguf". Nothing is downloaded. None: the demonstration model
    backend       "numba": compiled kernels; "numpy": plain NumPy; None: "numba", or "numpy" with dtype="float64"
    dtype         number format of all activations: "float32", or "float64" (the oracle; only the NumPy backend has it)
    threads       number of threads. None: with "numba" the number in MISTRAL_REF_THREADS, or the number of performance
                  cores; with "numpy" BLAS decides
    rope_angles   "float64", or "float32": round RoPE's angles as the published implementations do
    quantize      8 or 4: round the weights to 8 or 4 bits in memory; `mistral_ref.quantize` writes them to files
    window        the sliding window of every layer, in keys; None: as the files say it. GGUF files do not hold that of
                  Mistral 7B v0.1, 4096
    adapters      LoRA adapters of PEFT, mistral-finetune or mlx-lm: for each its path, or (path, scale), where its own
                  scale is multiplied by `scale`. What they add is computed beside the model's matrices, which stay as
                  they are, also if they are quantized
    quantized_inputs    what the inputs of quantized matrices are rounded to: "int16"; "int8", faster and less exact;
                  "float": not rounded (only the NumPy backend). None: "int16", or "float" with dtype="float64"
    bf16_inputs   what the inputs of bf16 matrices are rounded to. "float32": not rounded. "bfloat16": to bf16 (8
                  significant bits), as other runtimes do; prompts are twice as fast on AMD's processors with
                  AVX512_BF16, and decoding a little faster
    check_memory  refuse what takes more memory than is left, a container's limit included, before it is begun: rounded
                  weights, and texts whose keys and values, or the work on them, are too large. False: try it
    progress      called with (done, in all), numbers of weights, while `quantize` rounds
    on_compile    called as on_compile(done, total, name) before each kernel that is compiled, and at the end without a
                  name. None: a warning says how many are compiled

    Do not change the files while the model is in use. To replace one, write a new file and rename it to the old name.
    A pass raises CheckpointError if a file has become shorter. If it becomes shorter during the pass, the system may
    end the process (SIGBUS).

    Raises MistralRefError; the message names the file and the problem. Warns with MistralRefWarning if something is
    assumed or ignored.
    """
    checked_function("progress", progress)
    checked_function("on_compile", on_compile)
    path = checked_model(DEMO_MODEL if path is None else path)
    ops = _make_ops(
        backend, dtype, on_compile,
        threads=threads, angles=rope_angles, quantized_inputs=quantized_inputs, bf16_inputs=bf16_inputs,
    )  # fmt: skip
    scheme = None if quantize is None else Scheme(checked_bits("quantize", quantize))
    gguf = open_gguf_of(path)
    config, weights = model_in(path, gguf)
    config = _with_window(config, window, gguf)
    if scheme is not None:
        if check_memory:
            require_memory(rounded_bytes(weights, scheme), f"{path}: weights of {quantize} bits", _ROUNDED_HINT)
        weights = quantized_weights(weights, scheme, progress, threads)
    config, weights = with_adapters(config, weights, adapters)
    tokenizer, eos_ids = _text_side(path, gguf, config)
    return Model(config, weights, ops, tokenizer=tokenizer, eos_ids=eos_ids, check_memory=check_memory)


def _with_window(config: ModelConfig, window: int | None, gguf: GGUF | None) -> ModelConfig:
    """Return a configuration with this window in every layer; warn if its GGUF file has lost its window."""
    if window is not None:
        window = checked_int("window", window, least=1, most=MAX_VALUES["sliding_window"])
        return config.replace(sliding_window=(window,) * config.n_layers)
    if gguf is not None and lost_window(config):
        warn(
            f"{gguf.path}: has the shape of Mistral 7B v0.1, and GGUF files of this model have lost its window; "
            "window=4096 or --window 4096 sets it. Without it texts of over 4096 tokens are computed wrongly"
        )
    return config


def _make_ops(backend: str | None, dtype: str, on_compile: OnCompile | None, **settings: Any) -> ReferenceOps:
    """Return the operations of a backend: "numba" or "numpy"; None: "numba", or "numpy" with float64."""
    if backend not in (None, "numba", "numpy"):
        raise InputError(f"backend is {short_repr(backend)}; expected 'numba' or 'numpy'")
    if backend == "numpy" or (backend is None and dtype == "float64"):
        return ReferenceOps(dtype, **settings)
    if dtype != "float32":
        raise InputError(f"dtype is {short_repr(dtype)}; expected 'float32', the only dtype of backend='numba'")
    try:  # imported here, because the import of Numba takes a third of a second, and NumPy works without it
        from mistral_ref.compiled_ops import CompiledOps  # noqa: PLC0415
    except (ImportError, ValueError) as error:
        raise InputError(f"backend 'numba' cannot be used: {error}; backend='numpy' works without Numba") from None
    return CompiledOps(**settings, on_compile=on_compile)


def _read_tokenizer(path: Path, gguf: GGUF | None) -> Tokenizer | None:
    if gguf is not None:
        return gguf_tokenizer(gguf) if has_tokenizer(gguf) else None
    found = find_tokenizer(path)
    return None if found is None else load_tokenizer(found)


def _text_side(path: Path, gguf: GGUF | None, config: ModelConfig) -> tuple[Tokenizer | None, tuple[int, ...]]:
    """Return the tokenizer of a model (None if it has none) and the ids that end a text.

    The end ids are those in generation_config.json, else in config.json, else the tokenizer's own: `eos_token` in
    tokenizer_config.json, else that of its file (`Model` takes the last two). A GGUF file names them itself.

    Raises ConfigError or TokenizerError if they do not fit the model's vocabulary. Warns if an added token does not:
    models are published with tokens that are never used, such as "[PAD]". Warns if the tokenizer is of an unknown kind.
    """
    eos_ids = read_eos_ids(path) if gguf is None else gguf_eos_ids(gguf)
    if eos_ids and max(eos_ids) >= config.vocab_size:
        raise ConfigError(f"{path}: eos_token_id is {max(eos_ids)}; expected 0 to {config.vocab_size - 1}")
    try:
        tokenizer = _read_tokenizer(path, gguf)
    except UnknownTokenizerError as error:
        warn(f"{error}; without a tokenizer, prompts must be token ids")
        return None, eos_ids
    if tokenizer is None:
        return None, eos_ids
    if tokenizer.n_pieces > config.vocab_size:
        raise TokenizerError(
            f"{path}: the tokenizer has {tokenizer.n_pieces} pieces; "
            f"expected at most the model's vocabulary of {config.vocab_size}"
        )
    if beyond := [token for token in tokenizer.added.by_id.values() if token.id >= config.vocab_size]:
        warn(
            f"{path}: added token {short_repr(beyond[0].content)} has id {beyond[0].id}; expected at most "
            f"{config.vocab_size - 1}; a prompt with this token is refused"
        )
    return tokenizer, eos_ids
