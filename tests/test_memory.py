"""What a model is said to need is what a process takes, and what does not fit is refused before anything is taken."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.adapters import draw_deltas, write_peft
from support.blocks import random_blocks
from support.checkpoints import FAMILIES, write_consolidated
from support.errors import refused
from support.gguf_files import IN_LAYER, NAMES, Stored, config_fields, gguf_bytes, stored
from support.tiny import MIXTURE, SMALL, model_of

import mistral_ref
from mistral_ref import InputError, Model
from mistral_ref.config import ModelConfig, tensor_shapes
from mistral_ref.errors import CacheError, MistralRefError
from mistral_ref.files.adapters import with_adapters
from mistral_ref.files.build_weights import open_model
from mistral_ref.files.quantization import Scheme, rounded_bytes
from mistral_ref.host import bytes_told
from mistral_ref.measure.synthetic import make_checkpoint
from mistral_ref.memory import longest_context, memory_needs
from mistral_ref.weights import matrices

MIB = 2**20
# Of a few layers, with much to compute with and many keys and values.
DENSE = SMALL.replace(
    dim=512, hidden_dim=4096, n_heads=16, n_kv_heads=16, head_dim=128, vocab_size=2048, max_seq_len=None, n_layers=2,
    sliding_window=(None, None), rope_row_order="interleaved", tied_embeddings=False,
)  # fmt: skip
WINDOWED = DENSE.replace(sliding_window=(1024, 1024))
# The last layer of a prompt leaves experts hardly anything to do, so what kernels keep of others takes several layers.
EXPERTS = DENSE.replace(n_layers=4, sliding_window=(None,) * 4, moe=MIXTURE.moe)
N_TOKENS = 2048

# ------------------------------------------------------------------------------------- what is predicted and measured

# Loads a model twice: so that kernels and BLAS are there, and to generate. It waits for a line before the second time.
CHILD = """
import ctypes, gc, json, sys
import numpy as np
import mistral_ref
from mistral_ref import passes

path, settings, cache_dtype, n_tokens = json.loads(sys.argv[1])
model = mistral_ref.load(path, **settings)
passes.prepare(model.transformer, model.new_cache(dtype=cache_dtype), {1, 512}, last_only=True)
np.ones((512, 512), np.float32) @ np.ones((512, 512), np.float32)
del model
gc.collect()
ctypes.CDLL(None).malloc_trim(0)
print(flush=True)
input()
model = mistral_ref.load(path, **settings)
cache = model.new_cache(max_tokens=n_tokens, dtype=cache_dtype)
tokens = list(model.generate([5 + i % 50 for i in range(n_tokens - 3)], max_tokens=4, cache=cache))
print(flush=True)
"""


def most_memory(*arguments: Any) -> int:
    """Return the most bytes of no file that generating takes in a process, beyond those that it has before."""
    command = [sys.executable, "-W", "ignore", "-c", CHILD, json.dumps(arguments)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        status = Path("/proc") / str(child.pid) / "status"
        child.stdout.readline()
        before = bytes_told(status, "RssAnon:")
        if before is None:
            child.kill()
            pytest.skip("the system does not tell this process's memory")
        child.stdin.write("\n")
        child.stdin.flush()
        most = before
        while child.poll() is None:
            most = max(most, bytes_told(status, "RssAnon:") or 0)
            time.sleep(0.0005)
    assert child.returncode == 0
    return most - before


def write_q4_k(path: Path, config: ModelConfig) -> None:
    """Write a GGUF file of random blocks."""
    tensors = {}
    for full_name, shape in tensor_shapes(config):
        name = full_name.removesuffix(".weight")
        theirs = NAMES.get(name) or f"blk.{name.split('.')[1]}.{IN_LAYER[name.split('.', 2)[2]]}"
        blocks = None if len(shape) == 1 else random_blocks("q4_k", shape[0], shape[1] // 256).data
        tensors[f"{theirs}.weight"] = (
            stored(np.ones(shape, np.float32)) if blocks is None else Stored("Q4_K", shape, blocks.tobytes())
        )
    path.write_bytes(gguf_bytes(config_fields(config), tensors))


CASES = {
    "bf16": ("bf16", DENSE, {}, "float32"),
    "bf16, float16 cache": ("bf16", DENSE, {}, "float16"),
    "8 bits, int8 cache": ("int8", DENSE, {}, "int8"),
    "4 bits": ("int4", DENSE, {}, "float32"),
    "window": ("f32", WINDOWED, {}, "float32"),
    "experts": ("bf16", EXPERTS, {}, "float32"),
    "adapters": ("bf16", DENSE, {"adapters": []}, "float32"),
    "GGUF": ("q4_k", DENSE, {}, "float16"),
    "rounded in memory": ("bf16", DENSE, {"quantize": 8}, "float32"),
    "numpy": ("f32", DENSE, {"backend": "numpy"}, "float32"),
    "numpy, float16 cache": ("bf16", DENSE, {"backend": "numpy"}, "float16"),
    "numpy, int8 cache": ("bf16", DENSE, {"backend": "numpy"}, "int8"),
    "numpy, window": ("f16", WINDOWED, {"backend": "numpy"}, "float32"),
    "numpy, float64": ("f32", DENSE, {"backend": "numpy", "dtype": "float64"}, "float64"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_is_predicted_is_what_a_process_takes(case: str, tmp_path: Path) -> None:
    kind, config, settings, cache_dtype = CASES[case]
    path = tmp_path / "model.gguf"
    if kind == "q4_k":
        write_q4_k(path, config)
    else:
        path = make_checkpoint(tmp_path / "model", config, kind=kind)
    config, weights = open_model(path)
    if "adapters" in settings:
        settings = {"adapters": [str(write_peft(tmp_path / "adapter", config, draw_deltas(config, rank=64)))]}
        config, weights = with_adapters(config, weights, settings["adapters"])
    how = {name: settings[name] for name in ("backend", "dtype") if name in settings}
    predicted = memory_needs(config, weights, N_TOKENS, cache_dtype=cache_dtype, **how).total
    if "quantize" in settings:
        predicted += rounded_bytes(weights, Scheme(settings["quantize"]))
    measured = most_memory(str(path), settings, cache_dtype, N_TOKENS)
    assert predicted > 64 * MIB, "too little to be measured"
    assert 0.9 < predicted / measured < 1.1, (predicted / MIB, measured / MIB)


def test_weights_in_files_and_in_memory_are_told_apart(tmp_path: Path) -> None:
    family = FAMILIES["dense_windowed"]
    write_consolidated(tmp_path, replace(family, dtype="bf16"))
    config, weights = open_model(tmp_path)
    in_file = sum(matrix.nbytes for matrix in matrices(weights))
    norms = 4 * config.dim * (2 * config.n_layers + 1)  # bf16 in the file
    needs = memory_needs(config, weights, 8)
    assert (needs.mapped, needs.weights) == (in_file, norms)
    rounded = mistral_ref.load(tmp_path, quantize=8)
    needs = memory_needs(config, rounded.weights, 8)
    scheme_bytes = rounded_bytes(weights, Scheme(8))
    assert (needs.mapped, needs.weights) == (0, scheme_bytes + norms)
    assert scheme_bytes == sum(matrix.nbytes for matrix in matrices(rounded.weights))
    assert memory_needs(config, None, 8)._replace(mapped=needs.mapped, weights=needs.weights) == needs


@pytest.mark.parametrize("config", [SMALL, MIXTURE, DENSE, WINDOWED])
def test_longer_texts_need_more_and_smaller_caches_less(config: ModelConfig) -> None:
    needs = [memory_needs(config, None, 2**n).total for n in range(16)]
    assert needs == sorted(needs)
    of_dtype = [memory_needs(config, None, 5000, cache_dtype=dtype).cache for dtype in ("float32", "float16", "int8")]
    assert of_dtype[0] == 2 * of_dtype[1] < 4 * of_dtype[2]


# -------------------------------------------------------------------------------------------------- what does not fit

LEFT = 96 * MIB


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistral_ref.host.available_memory", lambda: LEFT)
    monkeypatch.setattr("mistral_ref.memory.available_memory", lambda: LEFT)


# Nearly all that it takes is its cache: a MiB for 8 tokens.
LONG = DENSE.replace(dim=8, hidden_dim=8, vocab_size=64, n_layers=8, sliding_window=(None,) * 8)
IDS = [5] * 20


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.generate(IDS, max_tokens=10_000),
        lambda model: model.generate(IDS, max_tokens=10_000, cache=model.new_cache(max_tokens=10_000)),
        lambda model: model.generate(IDS, max_tokens=10_000, prompt_cache=model.new_cache(max_tokens=10_000)),
        lambda model: model.score(IDS * 500),
        lambda model: model.embed(IDS * 500),
        lambda model: model.forward(IDS * 500, last_only=True),
    ],
    ids=["generate", "cache", "prompt_cache", "score", "embed", "forward"],
)
@pytest.mark.usefixtures("little_memory")
def test_a_text_is_refused_with_figures_and_a_way_out(use: Callable[[Model], object]) -> None:
    model = model_of(LONG)
    with refused(CacheError, "GiB of it", "96.00 MiB", "tokens fit", "int8", "check_memory", "--no-memory-check"):
        use(model)


@pytest.mark.usefixtures("little_memory")
def test_who_insists_is_not_refused() -> None:
    right = model_of(LONG)
    model = Model(LONG, right.weights, right.ops, check_memory=False)
    for cache in (None, model.new_cache()):
        assert model.generate(IDS, max_tokens=10_000, cache=cache) is not None
    cache = model.new_cache()
    cache.make_room(10_000)
    assert cache.bytes_for(10_000) > LEFT


@pytest.mark.usefixtures("little_memory")
def test_the_way_out_leads_out() -> None:
    """As many tokens as are said to fit do; one more does not. With keys of int8 more fit."""
    model = model_of(LONG)
    fit = []
    for dtype in ("float32", "int8"):
        with pytest.raises(CacheError) as error:
            model.generate(IDS, max_tokens=2**20, cache=model.new_cache(max_tokens=2**20, dtype=dtype))
        (found,) = re.findall(r"(\d+) tokens fit", str(error.value))
        fit.append(int(found))
    assert fit[1] > 3 * fit[0]
    for n, cache in ((fit[0], model.new_cache()), (fit[1], model.new_cache(dtype="int8"))):
        capacity = 2 ** (n.bit_length() - 1)  # that of a ring that doubles
        model.generate(IDS, max_tokens=capacity - len(IDS) + 1, cache=cache)
        with refused(CacheError, "tokens fit"):
            model.generate(IDS, max_tokens=4 * capacity, cache=cache)


WIDE = LONG.replace(n_layers=1, sliding_window=(None,), vocab_size=100_000)  # what is kept of a token takes most


@pytest.mark.parametrize(
    ("config", "use"),
    [
        (LONG, lambda model, n: model.generate(IDS, max_tokens=n - len(IDS) + 1)),
        (LONG, lambda model, n: model.embed([5] * n)),
        (WIDE, lambda model, n: model.forward([5] * n)),
        (WIDE, lambda model, n: model.trace([5] * n, keep="logits")),
        (DENSE, lambda model, n: model.steps([5] * n)),
    ],
    ids=["generate", "embed", "forward", "trace", "steps"],
)
@pytest.mark.usefixtures("little_memory")
def test_as_many_tokens_fit_as_are_said_to_and_no_more(
    config: ModelConfig, use: Callable[[Model, int], object]
) -> None:
    model = model_of(config)
    with pytest.raises(MistralRefError) as error:
        use(model, 9000)
    (found,) = re.findall(r"(\d+) tokens fit", str(error.value))
    assert 64 < int(found) < 9000
    with pytest.raises(MistralRefError, match=f"{int(found)} tokens fit"):
        use(model, int(found) + 1)
    use(model, int(found))


@pytest.mark.usefixtures("little_memory")
def test_the_longest_context_is_what_fits_beside_the_weights() -> None:
    weights = model_of(LONG).weights
    own = memory_needs(LONG, weights, 8).weights
    longest = longest_context(LONG, weights)
    assert longest is not None
    assert memory_needs(LONG, None, longest).total + own <= LEFT < memory_needs(LONG, None, longest + 1).total + own
    assert longest_context(LONG.replace(max_seq_len=100), weights) == 100


def test_no_context_where_memory_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mistral_ref.memory.available_memory", lambda: None)
    assert longest_context(SMALL, model_of(SMALL).weights) is None


def test_weights_that_do_not_fit_are_not_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_consolidated(tmp_path, FAMILIES["dense_windowed"])
    needed = rounded_bytes(open_model(tmp_path)[1], Scheme(8))
    monkeypatch.setattr("mistral_ref.host._MUCH", 1)
    monkeypatch.setattr("mistral_ref.host.available_memory", lambda: needed)
    mistral_ref.load(tmp_path, quantize=8, backend="numpy")
    monkeypatch.setattr("mistral_ref.host.available_memory", lambda: needed - 1)
    with refused(InputError, tmp_path, "8 bits", "KiB", "mistral-ref quantize", "check_memory"):
        mistral_ref.load(tmp_path, quantize=8, backend="numpy")
    mistral_ref.load(tmp_path, quantize=8, backend="numpy", check_memory=False)
