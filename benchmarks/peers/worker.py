"""One runtime in a process of its own, driven by compare_peers.py: a line of JSON in, a line of JSON out.

    {"do": "logits", "n": 16}       logits of the last of n tokens
    {"do": "run", "n": 512, "depth": 0, "step": 512}
                                    seconds that n tokens take after `depth` others, `step` at a time
    {"do": "together", "n": 32}     seconds that n tokens of each of --sequences take, one of each at a time

Every runtime goes through one random sequence of tokens, so what it holds is always the beginning of that.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from typing import Any, Protocol

import numpy as np

FLASH_ATTENTION = {"auto": -1, "off": 0, "on": 1}  # llama.cpp's own numbers
CHUNK = 512  # tokens that a prompt is read in, by all


class Runtime(Protocol):
    """What a runtime has to be able to do with one sequence."""

    n_held: int

    def append(self, ids: np.ndarray) -> np.ndarray:
        """Take up to CHUNK tokens in; return the logits (V,) of the last one."""
        ...

    def keep(self, n: int) -> None:
        """Forget all but the first n tokens."""
        ...

    def about(self) -> dict[str, Any]:
        """Return versions and settings."""
        ...


class Joining(Runtime, Protocol):
    """What a runtime has to be able to do with several sequences."""

    def append_to_each(self, ids: np.ndarray, position: int) -> None:
        """Take a token of each sequence in, at a position; at position 0 the sequences begin."""
        ...


class Ours:
    """mistral_ref, without a window or with one of a given length."""

    def __init__(self, options: argparse.Namespace) -> None:
        import mistral_ref  # noqa: PLC0415 (each worker imports its own runtime alone, and its start is measured)

        loaded = mistral_ref.load(
            options.model,
            threads=options.threads,
            quantized_inputs=options.quantized_inputs,
            bf16_inputs=options.bf16_inputs,
        )
        windows = (options.window or None,) * loaded.config.n_layers
        config = loaded.config.replace(sliding_window=windows, max_seq_len=None)
        self.model = mistral_ref.Model(config, loaded.weights, loaded.ops)
        self.options = options
        self.cache = self._new_cache()
        self._too_old = mistral_ref.CacheError

    def _new_cache(self) -> Any:
        return self.model.new_cache(
            max_tokens=self.options.context, chunk=CHUNK, dtype=self.options.cache_dtype or None
        )

    @property
    def n_held(self) -> int:
        return self.cache.length

    def append(self, ids: np.ndarray) -> np.ndarray:
        return self.model.forward(ids, self.cache, last_only=True)[0]

    def keep(self, n: int) -> None:
        try:
            self.cache.truncate(n)
        except self._too_old:
            self.cache = self._new_cache()

    def append_to_each(self, ids: np.ndarray, position: int) -> None:
        from mistral_ref.passes import joined_logits  # noqa: PLC0415

        if position == 0:
            self._caches = [self._new_cache() for _ in ids]
        joined_logits(self.model.transformer, [([one], cache) for one, cache in zip(ids, self._caches, strict=True)])

    def about(self) -> dict[str, Any]:
        return {"cache": self.cache.dtype, "window": self.options.window}


class LlamaCpp:
    """llama.cpp through its C functions: no sampling, and no copies but its own."""

    def __init__(self, options: argparse.Namespace) -> None:
        import llama_cpp  # noqa: PLC0415

        self.api, self.n_held = llama_cpp, 0
        self._silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._silence, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(
            os.fsencode(options.model), llama_cpp.llama_model_default_params()
        )
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = options.context * options.sequences
        settings.n_seq_max = options.sequences
        settings.n_batch = settings.n_ubatch = CHUNK
        settings.n_threads = settings.n_threads_batch = options.threads
        settings.flash_attn_type = FLASH_ATTENTION[options.flash_attention]
        if options.cache_dtype == "float32":
            settings.type_k = settings.type_v = 0  # GGML_TYPE_F32
        if self._model is None:
            raise SystemExit("llama.cpp cannot load the file")
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._memory = llama_cpp.llama_get_memory(self._context)
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._settings, self._flash_attention = settings, options.flash_attention
        self._batch = llama_cpp.llama_batch_init(options.sequences, 0, 1)

    def append(self, ids: np.ndarray) -> np.ndarray:
        tokens = (ctypes.c_int32 * len(ids))(*ids.tolist())
        status = self.api.llama_decode(self._context, self.api.llama_batch_get_one(tokens, len(ids)))
        self.api.llama_synchronize(self._context)
        if status:
            raise SystemExit(f"llama_decode: status {status}")
        self.n_held += len(ids)
        return np.ctypeslib.as_array(self.api.llama_get_logits_ith(self._context, -1), (self._n_vocab,))

    def append_to_each(self, ids: np.ndarray, position: int) -> None:
        if position == 0:
            self.api.llama_memory_seq_rm(self._memory, -1, 0, -1)
            self.n_held = 0
        batch = self._batch
        batch.n_tokens = len(ids)
        for number, token in enumerate(ids.tolist()):
            batch.token[number], batch.pos[number], batch.logits[number] = token, position, 1
            batch.n_seq_id[number], batch.seq_id[number][0] = 1, number
        status = self.api.llama_decode(self._context, batch)
        self.api.llama_synchronize(self._context)
        if status:
            raise SystemExit(f"llama_decode: status {status}")

    def keep(self, n: int) -> None:
        self.api.llama_memory_seq_rm(self._memory, 0, n, -1)
        self.n_held = n

    def about(self) -> dict[str, Any]:
        return {
            "llama_cpp_python": self.api.__version__,
            "system_info": self.api.llama_print_system_info().decode().strip(),
            "flash_attention": self._flash_attention,
            "cache": {0: "float32", 1: "float16"}[self._settings.type_k],
            "n_batch": self._settings.n_batch,
            "n_ubatch": self._settings.n_ubatch,
        }


class Transformers:
    """Hugging Face transformers on torch, with its default attention and the checkpoint's dtype."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch  # noqa: PLC0415
        import transformers  # noqa: PLC0415

        self.torch, self.transformers = torch, transformers
        torch.set_num_threads(options.threads)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").eval()
        self.cache = transformers.DynamicCache()

    @property
    def n_held(self) -> int:
        return self.cache.get_seq_length()

    def append(self, ids: np.ndarray) -> np.ndarray:
        tokens = self.torch.from_numpy(ids.astype(np.int64))[None]
        with self.torch.inference_mode():
            output = self.model(tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1].float().numpy()

    def keep(self, n: int) -> None:
        if n == 0:
            self.cache = self.transformers.DynamicCache()
        elif n < self.n_held:
            self.cache.crop(n - self.n_held)  # a negative number: how many to take away

    def about(self) -> dict[str, Any]:
        return {
            "transformers": self.transformers.__version__,
            "torch": self.torch.__version__,
            "attention": self.model.config._attn_implementation,
            "cache": str(self.model.dtype).removeprefix("torch."),
        }


RUNTIMES = {"mistral_ref": Ours, "llama.cpp": LlamaCpp, "transformers": Transformers}


def run(runtime: Runtime, ids: np.ndarray, n: int, depth: int, step: int) -> float:
    """Return the seconds that n tokens take, `step` at a time, after `depth` others."""
    runtime.keep(min(depth, runtime.n_held))
    while runtime.n_held < depth:
        runtime.append(ids[runtime.n_held : min(runtime.n_held + CHUNK, depth)])
    start = time.perf_counter()
    for first in range(depth, depth + n, step):
        runtime.append(ids[first : min(first + step, depth + n)])
    return time.perf_counter() - start


def run_together(runtime: Joining, ids: np.ndarray, n: int, n_sequences: int) -> float:
    """Return the seconds that n tokens of each sequence take, one of each at a time."""
    start = time.perf_counter()
    for position in range(n):
        runtime.append_to_each(ids[np.arange(n_sequences) * 7 + position], position)
    return time.perf_counter() - start


def main() -> None:
    """Load a runtime, take one token, and answer requests until there are no more."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("model", help="directory or GGUF file")
    parser.add_argument("--vocabulary", type=int, required=True, help="token ids are drawn below this")
    parser.add_argument("--context", type=int, required=True, help="tokens at most")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--sequences", type=int, default=1, help="how many go together")
    parser.add_argument("--window", type=int, default=0)
    parser.add_argument("--quantized-inputs", help="what ours rounds the inputs of quantized matrices to")
    parser.add_argument("--bf16-inputs", default="float32", help="what ours rounds the inputs of bf16 matrices to")
    parser.add_argument("--cache-dtype", default="", help="of keys and values; empty: the runtime's own choice")
    parser.add_argument("--flash-attention", choices=FLASH_ATTENTION, default="auto", help="llama.cpp's")
    options = parser.parse_args()
    # Whatever a runtime prints goes to standard error; answers have a stream of their own.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)

    ids = np.random.default_rng(0).integers(0, options.vocabulary, options.context)
    runtime: Any = RUNTIMES[options.runtime](options)
    runtime.append(ids[:1])
    print(json.dumps({"about": runtime.about()}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "logits":
            runtime.keep(0)
            answer: dict[str, Any] = {"logits": runtime.append(ids[: request["n"]]).tolist()}
        elif request["do"] == "together":
            answer = {"seconds": run_together(runtime, ids, request["n"], options.sequences)}
        else:
            answer = {"seconds": run(runtime, ids, request["n"], request["depth"], request["step"])}
        print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
