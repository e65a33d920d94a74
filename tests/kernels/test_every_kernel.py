"""Every kernel: threads that really run at once, the ends of arrays, and what is compiled for other machines.

Run as a script, this file multiplies, attends and normalizes with arrays that end where readable memory ends.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import llvmlite.binding as llvm
import numpy as np
import pytest
from support.blocks import block_product, random_blocks
from support.kernels import (
    ALL_STORED,
    SOME_WAYS,
    WAYS,
    Past,
    Shares,
    any_quantized,
    attended,
    filled,
    gated,
    normal,
    possible_inputs,
    product,
    quantized_product,
    random_matrix,
    shared,
)
from support.paths import ROOT

from mistral_kernels import attention, elementwise, panels, quantized
from mistral_kernels.matmul import DEPTH
from mistral_kernels.processor import LANES
from mistral_kernels.tile import WIDTH
from mistral_ref.block_matrix import BLOCK_TYPES
from mistral_ref.weights import FP8_BLOCK

HOST_FEATURES = {name for name, present in llvm.get_host_cpu_features().items() if present}


@pytest.mark.slow
def test_threads_that_really_run_at_once_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above share the work out and let one thread do it; here as many run as there are."""
    x_TI, past = normal(3, 30, 700), Past(normal(4, 30, 6, 16), *normal(5, 2, 900, 3, 16), 700)

    def outputs(n_threads: int) -> list[np.ndarray]:
        products = [
            product(random_matrix(stored, 300, 700, 9), x_TI[: 1 if way == "one" else 30], n_threads, way=way)
            for stored in ALL_STORED
            for way in WAYS
        ]
        products += [
            quantized_product(how, any_quantized(how, 300, 700, 9), x_TI[:n_tokens], n_threads, one_by_one=one_by_one)
            for how in SOME_WAYS
            for n_tokens, one_by_one in ((1, True), (30, False))
        ]
        products += [
            block_product(
                random_blocks(kind, 300, 3),
                normal(6, 30, 3 * packed.weights),
                "int16",
                n_threads,
                one_by_one=one_by_one,
            )
            for kind, packed in BLOCK_TYPES.items()
            for one_by_one in (True, False)
        ]
        few = past._replace(q=past.q[-2:])
        heads = [attended(part, *filled(part, 5, "float32"), n_threads=n_threads) for part in (past, few)]
        normed, turned = np.full_like(x_TI, np.nan), np.full_like(past.q, np.nan)
        elementwise.rms_norm()(x_TI, x_TI[0], 1e-5, normed, shared(n_threads))
        elementwise.rotate()(past.q, x_TI[:, :8].copy(), x_TI[:, 8:16].copy(), turned, shared(n_threads))
        return [*products, *heads, normed, turned, gated(x_TI.ravel(), x_TI.ravel(), n_threads)]

    alone = outputs(1)
    monkeypatch.setattr(Shares, "run_at_once", True)
    for n_threads in (2, 3, 7):
        for found, expected in zip(outputs(n_threads), alone, strict=True):
            np.testing.assert_array_equal(found, expected)


def at_the_end(array: np.ndarray) -> np.ndarray:
    """Return a copy whose last byte is the last one that may be touched: the page after it is forbidden."""
    n_bytes = -(-array.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, n_bytes + mmap.PAGESIZE)
    last_page = ctypes.addressof(ctypes.c_char.from_buffer(memory, n_bytes))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    if protect(last_page, mmap.PAGESIZE, 0):
        raise OSError(ctypes.get_errno(), "mprotect")
    copy = np.frombuffer(memory, array.dtype, array.size, n_bytes - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy


def run_blocks_to_the_ends() -> None:
    """Run the kernels for packed types in the same way."""
    for kind, packed in BLOCK_TYPES.items():
        for n_out, n_blocks in ((1, 1), (7, 3), (8, 2), (9, 1), (33, 1), (WIDTH, 2), (WIDTH + 1, 9)):
            drawn_blocks = random_blocks(kind, n_out, n_blocks)
            packed_matrix = dataclasses.replace(drawn_blocks, data=at_the_end(drawn_blocks.data))
            x_TI = at_the_end(normal(n_out, 5, n_blocks * packed.weights))
            for inputs in ("int16", "int8"):
                for one_by_one in (True, False):
                    into = at_the_end(np.empty((5, n_out), np.float32))
                    found = block_product(packed_matrix, x_TI, inputs, one_by_one=one_by_one, into=into)
                    expected = block_product(drawn_blocks, x_TI.copy(), inputs, one_by_one=one_by_one)
                    np.testing.assert_array_equal(found, expected)


def run_to_the_ends() -> None:
    """Run every kernel on arrays at whose ends the process would be killed for one step further."""
    for stored in ALL_STORED:
        for n_out in (1, 7, 8, 9, 33, WIDTH, WIDTH + 1, FP8_BLOCK + 5):
            for n_in in (1, 3, 8, LANES - 1, 2 * LANES + 1, FP8_BLOCK + 2, DEPTH + 1):
                drawn = random_matrix(stored, n_out, possible_inputs(stored, n_in), n_in)
                scale = None if drawn.scale is None else at_the_end(drawn.scale)
                matrix = dataclasses.replace(drawn, data=at_the_end(drawn.data), scale=scale)
                x_TI = at_the_end(normal(n_in, 5, drawn.shape[1]))
                for way in WAYS:
                    into = at_the_end(np.empty((5, n_out), np.float32))
                    found = product(matrix, x_TI, way=way, into=into)
                    np.testing.assert_array_equal(found, product(drawn, x_TI.copy(), way=way))
    for how in SOME_WAYS:
        for n_out in (1, 7, 8, 9, 33, WIDTH, WIDTH + 1):
            for n_in in (1, 3, 31, 33, how.group, how.group + 1, quantized.DEPTH, quantized.DEPTH + 1):
                drawn = any_quantized(how, n_out, n_in, n_in)
                matrix = dataclasses.replace(drawn, data=at_the_end(drawn.data), scales=at_the_end(drawn.scales))
                x_TI = at_the_end(normal(n_in, 5, n_in))
                for one_by_one in (True, False):
                    into = at_the_end(np.empty((5, n_out), np.float32))
                    found = quantized_product(how, matrix, x_TI, one_by_one=one_by_one, into=into)
                    expected = quantized_product(how, drawn, x_TI.copy(), one_by_one=one_by_one)
                    np.testing.assert_array_equal(found, expected)
    run_blocks_to_the_ends()
    for n_tokens, head_dim, window in ((1, 2, None), (1, 10, 70), (5, 18, None), (30, 34, 9), (2, 36, 600)):
        for n_rows in (attention.FEW_ROWS, attention.MANY_ROWS):
            for dtype in ("float32", "float16"):
                drawn_q, drawn_kv = normal(1, n_tokens, 6, head_dim), normal(2, 2, 700 + n_tokens, 2, head_dim)
                past = Past(at_the_end(drawn_q), *drawn_kv, window)
                store, slots = filled(past, 3, dtype)
                at_end = panels.PanelStore(*map(at_the_end, store))
                found = attended(past, at_end, slots, n_rows, into=at_the_end(np.empty_like(drawn_q)))
                np.testing.assert_array_equal(found, attended(past, store, slots, n_rows))
    for n in (1, LANES - 1, LANES, 2 * LANES + 3):
        x, weight = at_the_end(normal(n, 3, n)), at_the_end(normal(n, n))
        elementwise.rms_norm()(x, weight, 1e-5, at_the_end(x), 1)
        elementwise.swiglu()(weight, at_the_end(weight), at_the_end(weight), 1)
        heads, angles = at_the_end(normal(n, 3, 2, 2 * n)), at_the_end(normal(n, 3, n))
        elementwise.rotate()(heads, angles, at_the_end(angles), at_the_end(heads), 1)


@pytest.mark.slow
def test_nothing_is_touched_beyond_the_end_of_an_array() -> None:
    """In a process of its own, which a step too far would kill."""
    if os.name == "posix":  # elsewhere memory is protected by other calls; what kernels read does not depend on it
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), *sys.path])}
        command = [sys.executable, __file__]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
        assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr


# Bytes are multiplied with bytes four at once where there is an instruction for it (VNNI), else in pairs if the codes
# have 4 bits, else as int16: so with no instruction sets. This machine's own way is tried above.
VARIANTS = {
    "4 lanes, no instruction sets": {"NUMBA_CPU_NAME": "generic"},
    "8 lanes": {"MISTRAL_KERNELS_LANES": "8"},
}
_AVX2 = "+sse,+sse2,+sse3,+ssse3,+sse4.1,+sse4.2,+popcnt,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+lzcnt,+movbe"
_AVX512 = f"{_AVX2},+avx512f,+avx512bw,+avx512cd,+avx512dq,+avx512vl"
for _name, _cpu, _features in (
    ("8 lanes, pairs of bytes", "haswell", _AVX2),
    ("16 lanes, pairs of bytes", "skylake-avx512", _AVX512),
    ("16 lanes, pairs of bf16 in prompts", "znver4", f"{_AVX512},+avx512bf16,+avx512vnni"),
):
    if {name[1:] for name in _features.split(",")} <= HOST_FEATURES:  # else its instructions would be illegal here
        VARIANTS[_name] = {"NUMBA_CPU_NAME": _cpu, "NUMBA_CPU_FEATURES": _features}


# The plain way, which every machine has, and AVX2 alone, which most laptops have. The others are tried as soak.
USUAL_VARIANTS = ("4 lanes, no instruction sets", "8 lanes, pairs of bytes")
OF_KERNELS = [
    f"tests/kernels/test_{file}.py" for file in ("products", "quantized_products", "packed_products", "attention")
]


def each_variant(names: Iterable[str]) -> pytest.MarkDecorator:
    """Try machines by name; what is compiled for one is compiled by one worker."""
    known = [(name, VARIANTS[name]) for name in names if name in VARIANTS]
    return pytest.mark.parametrize(
        "variant", [pytest.param(one, id=name, marks=pytest.mark.xdist_group(name)) for name, one in known]
    )


def run_tests(variant: dict[str, str], cache: Path, *chosen: str) -> None:
    """Run tests of kernels again, as compiled for a machine with other instructions or wider or narrower vectors."""
    environment = os.environ | variant | {"NUMBA_CACHE_DIR": str(cache), "MISTRAL_REF_EXAMPLES": "10"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *chosen]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.slow
@each_variant(USUAL_VARIANTS)
@pytest.mark.parametrize("file", ["products", "quantized_products", "packed_products", "attention", "elementwise"])
def test_the_usual_kernels_of_other_machines(variant: dict[str, str], file: str, tmp_path: Path) -> None:
    run_tests(variant, tmp_path, f"tests/kernels/test_{file}.py")


@pytest.mark.soak
@each_variant(VARIANTS)
def test_the_usual_kernels_of_all_machines(variant: dict[str, str], tmp_path: Path) -> None:
    run_tests(variant, tmp_path, "tests/kernels", "-k", "not other_machines")


@pytest.mark.soak
@each_variant(VARIANTS)
def test_every_kernel_of_other_machines(variant: dict[str, str], tmp_path: Path) -> None:
    files = [*OF_KERNELS, "tests/kernels/test_every_kernel.py"]
    run_tests(variant, tmp_path, "-m", "slow", "-k", "not of_other_machines", *files)


EVERY_KERNEL = [
    *(
        f"from mistral_kernels.matvec import *; matvec({kind!r}, {meeting})"
        for kind in ("f32", "f16", "bf16", "fp8", "pairs")
        for meeting in ("ONE", "FEW")
    ),
    *(f"from mistral_kernels.matmul import *; matmul({kind!r})" for kind in ("f32", "f16", "bf16", "fp8", "pairs")),
    *(
        f"from mistral_kernels.attention import *; attention({kind!r}, {rows})"
        for kind in ("f32", "f16")
        for rows in ("FEW_ROWS", "MANY_ROWS")
    ),
    *(
        f"from mistral_kernels.quantized import *; {product}({kind!r}, {inputs!r}, {group}{more})"
        for kind, group in (("int4", 32), ("q4_k", 32), ("q6_k", 16))
        for product, more in (
            ("matvec_quantized", ", 1"),
            ("matvec_quantized", ", 2"),
            ("matvec_quantized", ", 4"),
            ("matmul_quantized", ""),
        )
        for inputs in ("int16", "int8")
    ),
    *(
        f"from mistral_kernels.packed import *; {product}({kind!r}, {inputs!r})"
        for product in ("matvec_blocks", "matmul_blocks")
        for kind in ("q4_k", "q6_k", "q8_0")
        for inputs in ("int16", "int8")
    ),
]


@pytest.mark.soak
def test_kernels_that_were_each_compiled_in_a_process_of_its_own_pass_their_tests(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "MISTRAL_REF_EXAMPLES": "10"}
    for code in EVERY_KERNEL:
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", *OF_KERNELS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.soak
def test_kernels_give_the_same_bits_in_the_process_that_compiles_them_and_the_next(tmp_path: Path) -> None:
    """They would not if the compiler chose what a sum is fused with: each process may call another copy of a part."""
    code = """
import hashlib
import mistral_ref
for bits in (None, 8):
    model = mistral_ref.load(backend="numba", threads=2, quantize=bits)
    cache = model.new_cache()
    outputs = [model.forward(tokens, cache) for tokens in (list(range(5, 40)), [9])]
    print([hashlib.sha256(logits.tobytes()).hexdigest() for logits in outputs])
"""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", code]
    first, second = (subprocess.check_output(command, env=environment, timeout=300) for _ in range(2))
    assert first == second


if __name__ == "__main__":
    run_to_the_ends()
    print("done")
