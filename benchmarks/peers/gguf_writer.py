"""A checkpoint in Mistral's own layout as a GGUF file for llama.cpp, bit for bit, a tensor at a time.

llama.cpp's "llama" architecture turns neighbouring rows of q and k, as Mistral's own files do, so nothing is permuted.
It knows no sliding window: every layer attends to everything. The file has no vocabulary ("none"), only its size.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import gguf
import numpy as np

from mistral_ref.config import ModelConfig
from mistral_ref.errors import InputError
from mistral_ref.files.checkpoint import open_checkpoint
from mistral_ref.files.config_files import read_config
from mistral_ref.files.tensor_file import Tensor, require_space
from mistral_ref.files.tensor_names import gguf_name

_TYPES = {
    "F32": gguf.GGMLQuantizationType.F32,
    "F16": gguf.GGMLQuantizationType.F16,
    "BF16": gguf.GGMLQuantizationType.BF16,
}


def _require_plain(config: ModelConfig, tensors: list[Tensor]) -> None:
    if config.moe or config.yarn or config.query_temperature:
        raise InputError("only models without experts, YaRN and query temperature are written as GGUF here")
    if other := {tensor.dtype for tensor in tensors} - set(_TYPES):
        raise InputError(f"weights are {', '.join(sorted(other))}; expected {', '.join(_TYPES)} for GGUF")


def _contents(tensor: Tensor) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """Return a tensor as llama.cpp wants it: matrices as stored, norms in float32."""
    kind, data = tensor.mapped()
    if data.ndim > 1:
        return data, _TYPES[tensor.dtype]
    widened = np.left_shift(data, 16, dtype=np.uint32).view(np.float32) if kind == "bf16" else data.astype(np.float32)
    return widened, gguf.GGMLQuantizationType.F32


def write_gguf(directory: Path, path: Path) -> None:
    """Write the model in a directory as one GGUF file; raise InputError if llama.cpp could not compute the same."""
    config, checkpoint = read_config(directory), open_checkpoint(directory)
    tensors = list(checkpoint.tensors.values())
    if checkpoint.row_order != "interleaved":
        raise InputError(f"{directory}: expected Mistral's own layout, consolidated.safetensors")
    _require_plain(config, tensors)
    require_space(path, sum(tensor.raw.nbytes for tensor in tensors))
    with _beside(path) as partial:
        writer = gguf.GGUFWriter(partial, "llama")
        _add_metadata(writer, config)
        for tensor in tensors:
            data, kind = _contents(tensor)
            writer.add_tensor_info(gguf_name(tensor.name), data.shape, data.dtype, data.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            writer.write_tensor_data(_contents(tensor)[0])
        writer.close()


def quantize_gguf(path: Path, target: Path, name: str, threads: int) -> None:
    """Let llama.cpp quantize a GGUF file to one of its types, such as "Q4_K_M", by its own rules for each tensor."""
    import llama_cpp  # noqa: PLC0415 (writing a file needs gguf alone)

    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}"), threads
    require_space(target, path.stat().st_size)
    with _beside(target) as partial:
        if llama_cpp.llama_model_quantize(os.fsencode(path), os.fsencode(partial), settings):
            raise InputError(f"llama.cpp cannot quantize {path} to {name}")


@contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """Give the path of a file to write, in a new folder beside `target`; rename it to `target` at the end."""
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        yield Path(folder) / target.name
        (Path(folder) / target.name).replace(target)


def gguf_bytes(path: Path) -> dict[str, int]:
    """Return the bytes of each tensor of a GGUF file."""
    return {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}


def _add_metadata(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_name("benchmark")
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_seq_len or 2**15)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
